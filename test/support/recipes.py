"""Filters of the manual's examples, run by a real proxsmtpd with the real programs.

A recipe's text is what the manual prints; only paths, ports and accounts are replaced.
The daemon is configured as the manual says, with User where the tests run as root.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import shutil
import signal
import subprocess
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Callable

from helpers import Daemon, StartDaemon, poll, port_of, reserve_port
from manual import section, unescaped
from smtp import ScriptedServer

FILTER = "/usr/local/libexec/filter"
# In place of _proxsmtp: another account can be had by root only.
ACCOUNT = "nobody" if os.geteuid() == 0 else pwd.getpwuid(os.geteuid()).pw_name
RECIPIENTS = (b"<b@example.net>",)
SLOW = 30.0  # seconds that a filter may take on a machine that is busy


def blocks(title: str) -> list[str]:
    """The literal displays of one of the manual's subsections, as they are printed."""
    source = section("proxsmtpd.8", title)
    displays = re.findall(r"^\.Bd -literal.*?\n(.*?)^\.Ed", source, re.M | re.S)
    return [unescaped(display) for display in displays]


def recipe(title: str, words: str) -> str:
    """The one display of a subsection that has these words."""
    (text,) = (block for block in blocks(title) if words in block)
    return text


def replaced(text: str, changes: Mapping[str, object]) -> str:
    """The text with other paths, ports or accounts; each must be in it."""
    for old, new in changes.items():
        assert old in text, f"{old} is not in this recipe:\n{text}"
        text = text.replace(old, str(new))
    return text


def own(path: Path) -> None:
    """Give a file to the account that the filters run as."""
    if os.geteuid() == 0:
        account = pwd.getpwnam(ACCOUNT)
        os.chown(path, account.pw_uid, account.pw_gid)


@contextlib.contextmanager
def public_directory() -> Iterator[Path]:
    """A directory that other accounts can reach, unlike pytest's."""
    place = Path(tempfile.mkdtemp(prefix="recipes-", dir="/tmp"))
    place.chmod(0o755)
    try:
        yield place
    finally:
        shutil.rmtree(place)


@contextlib.contextmanager
def running(
    command: Sequence[object], ready: Callable[[], object], log: Path, patience: float
) -> Iterator[subprocess.Popen[bytes]]:
    """A server in a process group of its own, once it is ready; ended afterwards."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        up = poll(lambda: process.poll() is not None or ready(), patience)
        assert up, f"{command[0]} is not ready:\n{log.read_text()}"
        assert process.poll() is None, f"{command[0]} ended:\n{log.read_text()}"
        yield process
    finally:
        process.terminate()  # so that it waits for its own processes
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


class RecipeRunner:
    """Starts daemons with recipes as filters, and sends them messages."""

    def __init__(self, place: Path, start: StartDaemon, server: ScriptedServer) -> None:
        self.place, self.server = place, server
        self._start_daemon = start

    def start(
        self,
        title: str,
        words: str,
        changes: Mapping[str, object] | None = None,
        **settings: str,
    ) -> Daemon:
        """Return a running daemon whose filter is the recipe with these words.

        The recipe is a script, or lines of the configuration; `settings` are what the
        text around it asks for.
        """
        config = recipe("Filters", "User: _proxsmtp")
        if recipe(title, words).startswith("#!"):
            script = self.script(title, words, changes)
            config = replaced(config, {FILTER: script})
        else:
            config += replaced(recipe(title, words), changes or {})
        return self._daemon(config, settings)

    def script(
        self, title: str, words: str, changes: Mapping[str, object] | None = None
    ) -> Path:
        """The script with these words, as a file that can be run."""
        script = self.place / f"filter-{uuid.uuid4().hex[:8]}"
        script.write_text(replaced(recipe(title, words), changes or {}))
        script.chmod(0o755)
        return script

    def _daemon(self, config: str, settings: Mapping[str, str]) -> Daemon:
        temporary = self.place / f"temp-{uuid.uuid4().hex[:8]}"
        temporary.mkdir(0o700)
        own(temporary)
        with reserve_port() as holder:
            changes = {
                "127.0.0.1:10025": f"127.0.0.1:{port_of(holder)}",
                "127.0.0.1:10026": self.server.address,
                "/var/spool/proxsmtpd": temporary,
                "User: _proxsmtp\n": f"User: {ACCOUNT}\n" if os.geteuid() == 0 else "",
            }
            config = replaced(config, changes)
            config += "".join(f"{k}: {v}\n" for k, v in settings.items())
            return self._start_daemon(config)

    def reply(
        self,
        daemon: Daemon,
        data: bytes,
        sender: bytes = b"<a@example.com>",
        recipients: Sequence[bytes] = RECIPIENTS,
    ) -> str:
        """Send a message and return the final reply."""
        with daemon.connect(SLOW) as client:
            reply = client.message(data, sender, recipients)
        return reply.decode().rstrip()

    def passed(
        self,
        daemon: Daemon,
        data: bytes,
        sender: bytes = b"<a@example.com>",
        recipients: Sequence[bytes] = RECIPIENTS,
    ) -> bytes:
        """Send a message that must pass, and return the mail data the server got."""
        before = len(self.server.messages)
        reply = self.reply(daemon, data, sender, recipients)
        assert reply.startswith("250 2.0.0 Ok: queued"), (reply, daemon.log())
        return self.server.wait_message(before + 1).data
