"""A Postfix of the test's own, to stand before, after or around proxsmtpd.

It shares nothing with the machine's Postfix but the programs: configuration, queue,
data directory, log and mailboxes lie in one temporary directory, and its ports are
free ones on 127.0.0.1.  Every domain is local to it and every message ends in one
maildir, so that mail never leaves the machine, bounces included.  Needs root, since
master(8) does.
"""

from __future__ import annotations

import grp
import json
import os
import pwd
import re
import shutil
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Callable, TypeVar

import pytest

from helpers import PEER_PATIENCE

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

POSTFIX = "/usr/sbin/postfix"
MASTER = "/usr/lib/postfix/sbin/master"
POSTQUEUE = "/usr/sbin/postqueue"
POSTSUPER = "/usr/sbin/postsuper"
SMTP_SOURCE = "/usr/sbin/smtp-source"

SENDER = "sender@example.com"
RECIPIENT = "recipient@example.net"

# A filter that puts its environment into the message's header, for tests to read.
TELL = r"""
recipients=$(printf '%s' "$RECIPIENTS" | tr '\n' ' ')
printf 'X-Filter-%s: %s\r\n' Client "$CLIENT" Server "$SERVER" Sender "$SENDER" \
    Recipients "$recipients" Remote "$REMOTE" Helo "$REMOTE_HELO"
exec cat
"""

# The directories of its queue, with their modes: setgid_group may enter some.
QUEUE = {
    **dict.fromkeys("active bounce corrupt defer deferred flush hold".split(), 0o700),
    **dict.fromkeys("incoming private saved trace".split(), 0o700),
    "maildrop": 0o730,
    "public": 0o710,
}

# Seconds between two looks: files give no event that Python can wait for.
POLL = 0.02

T = TypeVar("T")


class PostfixError(Exception):
    """Postfix did not do what the test needs; the message ends with its log."""


@dataclass(frozen=True)
class Service:
    """One service of master.cf (master(5)); every one runs without a chroot."""

    name: str
    type: str
    command: str
    private: str = "-"
    unprivileged: str = "-"
    process_limit: str = "-"
    options: Mapping[str, str] = field(default_factory=dict)

    def entry(self) -> str:
        """Give the service's entry, a continuation line for each ``-o`` option."""
        columns = (self.name, self.type, self.private, self.unprivileged, "n", "-")
        lines = ["\t".join((*columns, self.process_limit, self.command))]
        lines += [f"  -o {{ {k} = {v} }}" for k, v in self.options.items()]
        return "\n".join(lines) + "\n"


def smtpd(port: int, options: Mapping[str, str] | None = None) -> Service:
    """Give a Postfix SMTP server on 127.0.0.1:`port`, with its own ``-o`` options."""
    return Service(
        f"127.0.0.1:{port}", "inet", "smtpd", private="n", options=options or {}
    )


def smtp(name: str, options: Mapping[str, str] | None = None) -> Service:
    """Give a Postfix SMTP client as transport `name`, with its own ``-o`` options."""
    return Service(name, "unix", "smtp", options=options or {})


# What mail needs inside Postfix, whatever the test adds: master.cf's usual services
# without those for local users, scheduled flushing and TLS.
INTERNAL_SERVICES = (
    Service("postlog", "unix-dgram", "postlogd", private="n", process_limit="1"),
    Service("pickup", "unix", "pickup", private="n", process_limit="1"),
    Service("cleanup", "unix", "cleanup", private="n", process_limit="0"),
    Service("qmgr", "unix", "qmgr", private="n", process_limit="1"),
    Service("showq", "unix", "showq", private="n"),
    Service("rewrite", "unix", "trivial-rewrite"),
    Service("bounce", "unix", "bounce", process_limit="0"),
    Service("defer", "unix", "bounce", process_limit="0"),
    Service("trace", "unix", "bounce", process_limit="0"),
    Service("verify", "unix", "verify", process_limit="1"),
    Service("error", "unix", "error"),
    Service("retry", "unix", "error"),
    Service("anvil", "unix", "anvil", process_limit="1"),
    Service("smtp", "unix", "smtp"),
    Service("virtual", "unix", "virtual", unprivileged="n"),
)


def require_root() -> None:
    """Skip the test, or fail it in CI, where this process cannot start a Postfix."""
    if os.geteuid() != 0:
        required = os.environ.get("PROXSMTPD_REQUIRE_PEERS")
        (pytest.fail if required else pytest.skip)("only root can start a Postfix")


def smtp_source(port: int, sessions: int, messages: int) -> None:
    """Run Postfix's load generator against a local port; it ends when all is sent."""
    flags = ["-s", str(sessions), "-m", str(messages), "-l", "4096", "-N"]
    envelope = ["-f", SENDER, "-t", RECIPIENT, "-M", "client.example"]
    subprocess.run(
        [SMTP_SOURCE, *flags, *envelope, f"inet:127.0.0.1:{port}"],
        check=True,
        timeout=50,
    )


def message_id(data: bytes) -> bytes:
    """Give the Message-Id, which smtp-source makes different for each message."""
    found = re.search(rb"^Message-Id: (<.*>)", data, re.MULTILINE)
    assert found, data[:500]
    return found[1]


def body_of(data: bytes) -> bytes:
    """Give the body of a message with CRLF line ends as it lies in a maildir."""
    return data.partition(b"\r\n\r\n")[2].replace(b"\r\n", b"\n")


def is_alive(group: int) -> bool:
    """Return whether a process of this process group still runs (a zombie does not)."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, its_group = stat.read_text().rpartition(") ")[2].split()[:3]
        except (FileNotFoundError, ProcessLookupError):
            continue  # It has ended since /proc was listed.
        if its_group == str(group) and state != "Z":
            return True
    return False


@dataclass(frozen=True)
class Mail:
    """One delivered message, as it lies in the maildir (lines end in LF)."""

    content: bytes

    @property
    def body(self) -> bytes:
        """Return everything after the header section and its empty line."""
        return self.content.partition(b"\n\n")[2]

    def header(self, name: str) -> str | None:
        """Give the value of the first header field `name`, unfolded, or None."""
        section = self.content.partition(b"\n\n")[0].decode("ascii", "replace")
        pattern = rf"^{re.escape(name)}:[ \t]*(.*(?:\n[ \t].*)*)"
        found = re.search(pattern, section, re.MULTILINE | re.IGNORECASE)
        return found and re.sub(r"\n[ \t]+", " ", found[1])

    @property
    def sender(self) -> str | None:
        """Return the reverse-path at delivery (``<>`` for the null sender)."""
        path = self.header("Return-Path")
        return path and path.strip()

    @property
    def recipient(self) -> str | None:
        """Return the forward-path that it was delivered to."""
        return self.header("Delivered-To")


class PrivatePostfix:
    """A running Postfix between ``with`` and the end of its block.

    `services` are the test's own entries of master.cf, such as ``smtpd(port)``;
    they replace internal ones of the same name.  `main` are main.cf's parameters; they
    win over the ones that are set here.
    """

    def __init__(
        self, services: Iterable[Service], main: Mapping[str, str] | None = None
    ) -> None:
        self._services = {s.name: s for s in (*INTERNAL_SERVICES, *services)}
        self._main = dict(main or {})
        self._log_start = 0
        self.directory = Path()

    def __enter__(self) -> PrivatePostfix:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Write the configuration and start; return when Postfix listens."""
        # Its daemons run as other users and must get through: pytest's directories
        # are root's alone, and sockets below them may have too long a name.
        self.directory = Path(tempfile.mkdtemp(prefix="postfix-", dir="/tmp"))
        try:
            self._lay_out()
            # `postfix start` would look through the installation first: half of the
            # processor time that most tests with a Postfix take.
            self._run(MASTER, "-w")
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End every process of it and remove its directory."""
        pid_file = self.directory / "queue/pid/master.pid"
        if pid_file.exists():
            self._end_group(int(pid_file.read_text()))
        shutil.rmtree(self.directory)

    def _lay_out(self) -> None:
        owner = pwd.getpwnam("postfix")
        self.directory.chmod(0o755)
        for name in ("etc", "queue", "data", "mail"):
            (self.directory / name).mkdir()
        for name in ("data", "mail"):
            os.chown(self.directory / name, owner.pw_uid, owner.pw_gid)
        (self.directory / "queue/pid").mkdir()
        for name, mode in QUEUE.items():
            path = self.directory / "queue" / name
            path.mkdir()
            os.chown(path, owner.pw_uid, grp.getgrnam("postdrop").gr_gid)
            path.chmod(mode)
        parameters = {**self._parameters(owner), **self._main}
        main = "".join(f"{name} = {value}\n" for name, value in parameters.items())
        self._write("main.cf", main)
        master = "".join(s.entry() for s in self._services.values())
        self._write("master.cf", master)

    def _write(self, name: str, text: str) -> None:
        file = self.directory / "etc" / name
        file.write_text(text)
        # Postfix waits until a file that was changed just now has been at rest.
        os.utime(file, (0, 0))

    def _parameters(self, owner: pwd.struct_passwd) -> dict[str, str]:
        return {
            "compatibility_level": "3.6",
            "queue_directory": f"{self.directory}/queue",
            "data_directory": f"{self.directory}/data",
            "maillog_file": f"{self.directory}/mail.log",
            "maillog_file_prefixes": str(self.directory),
            "myhostname": "mail.example",
            "mydestination": "",
            "mynetworks": "127.0.0.0/8",
            "inet_interfaces": "127.0.0.1",
            "inet_protocols": "ipv4",
            # Otherwise cleanup pauses a second while qmgr is still starting.
            "in_flow_delay": "0",
            "alias_maps": "",
            "alias_database": "",
            "local_recipient_maps": "",
            "smtpd_peername_lookup": "no",
            "disable_dns_lookups": "yes",
            # Every address is a virtual mailbox, and all share one maildir.
            "virtual_mailbox_domains": "static:all",
            "virtual_mailbox_maps": "static:./",
            "virtual_mailbox_base": f"{self.directory}/mail",
            "virtual_uid_maps": f"static:{owner.pw_uid}",
            "virtual_gid_maps": f"static:{owner.pw_gid}",
            "virtual_minimum_uid": "1",
            "default_transport": "error:mail must not leave the test",
        }

    def _run(self, program: str, *arguments: str) -> str:
        command = [program, "-c", f"{self.directory}/etc", *arguments]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=60, check=False
        )
        if done.returncode != 0:
            raise self._error(f"{command} failed: {done.stdout}{done.stderr}")
        return done.stdout

    def _end_group(self, group: int) -> None:
        # Nothing of it is kept, so none of the seconds of grace that `postfix stop`
        # gives; but it must be gone before its directory can be.
        if is_alive(group):
            os.killpg(group, signal.SIGKILL)
        self.wait(f"the end of process group {group}", lambda: not is_alive(group))

    def _error(self, problem: str) -> PostfixError:
        return PostfixError(f"{problem}\n--- {self.directory}/mail.log\n{self.log()}")

    def log(self) -> str:
        """Give what Postfix has logged since its start or the last `clear`."""
        return self._whole_log()[self._log_start :]

    def _whole_log(self) -> str:
        file = self.directory / "mail.log"
        return file.read_text("latin-1") if file.exists() else ""

    def wait(self, what: str, look: Callable[[], T | None]) -> T:
        """Give what `look` gives as soon as it is neither None, False nor empty.

        Raises PostfixError, which names `what`, when it takes too long.
        """
        deadline = time.monotonic() + PEER_PATIENCE
        while not (seen := look()):
            if time.monotonic() > deadline:
                raise self._error(f"waited in vain for {what}")
            time.sleep(POLL)
        return seen

    def wait_log(self, pattern: str) -> re.Match[str]:
        """Give the first match of `pattern` in the log, waiting until there is one."""
        compiled = re.compile(pattern)
        return self.wait(f"{pattern!r} in the log", lambda: compiled.search(self.log()))

    def mails(self) -> list[Mail]:
        """Give the delivered messages, one for each recipient, in no order."""
        return [Mail(f.read_bytes()) for f in (self.directory / "mail/new").glob("*")]

    def wait_mails(self, count: int) -> list[Mail]:
        """Give the delivered messages when there are `count`.

        Raises PostfixError when there are too few in time, or too many.
        """
        new = self.directory / "mail/new"
        self.wait(
            f"{count} messages in {new}", lambda: len(list(new.glob("*"))) >= count
        )
        mails = self.mails()
        if len(mails) > count:
            raise self._error(f"{len(mails)} messages were delivered, not {count}")
        return mails

    def queue(self) -> list[dict[str, object]]:
        """Give what waits in the queue, as postqueue(1) -j reports it."""
        report = self._run(POSTQUEUE, "-j")
        return [json.loads(line) for line in report.splitlines()]

    def wait_deferred(self) -> str:
        """Give what mailq(1) shows, on one line, when all that is queued is deferred.

        Before, `flush` would pass by a message that is still being put back.
        """
        self.wait(
            "a message in the deferred queue",
            lambda: {str(m["queue_name"]) for m in self.queue()} == {"deferred"},
        )
        return " ".join(self._run(POSTQUEUE, "-p").split())

    def wait_idle(self) -> None:
        """Wait until the queue is empty: each message is delivered or given up."""
        self.wait("an empty queue", lambda: not self.queue())

    def flush(self) -> None:
        """Try to deliver everything in the queue now."""
        self._run(POSTQUEUE, "-f")

    def clear(self) -> None:
        """Throw away what waits in the queue, what was delivered and the log."""
        self._run(POSTSUPER, "-d", "ALL")
        for file in (self.directory / "mail/new").glob("*"):
            file.unlink()
        self._log_start = len(self._whole_log())
