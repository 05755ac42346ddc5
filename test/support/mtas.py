"""Servers other than Postfix to stand after proxsmtpd: Exim and OpenSMTPD.

Exim can stand in front of it as well: it sends mail for elsewhere.example to the
port of this machine that `send_to` has named.

Their packages and Postfix's exclude each other, so these are only unpacked, into the
directory that the environment variable PROXSMTPD_PEERS names (see .ci/run).  Each
server runs in mount and process namespaces of its own, where the users and the
directories that it insists on are mounted: the machine knows nothing of it, and all
of its processes end with the first one.  Needs root.

Both keep their files in one temporary directory, take mail for example.net alone,
put every message, once for each recipient, into one maildir, and refuse recipients
whose name begins with `refused` and messages of more than SIZE_LIMIT octets.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from helpers import PEER_PATIENCE, is_listening, poll, port_of, reserve_port
from postfix import Mail

PEERS = Path(os.environ.get("PROXSMTPD_PEERS", "/"))

SIZE_LIMIT = 100 * 1024
USER, PASSWORD = "user", "open sesame"  # Exim's only account

# Of the users that are mounted; nobody outside has them.
FIRST_ID = 64_900

EXIM_CONFIGURATION = r"""
primary_hostname = mail.example
local_interfaces = 127.0.0.1
daemon_smtp_ports = @PORT@
exim_path = @PROGRAM@
spool_directory = @PLACE@/spool
log_file_path = @PLACE@/log/%s
log_selector = +8bitmime
write_rejectlog = false
# The maildir is its own user's, so that delivery needs no root.
deliver_drop_privilege
keep_environment =
host_lookup =
message_size_limit = @SIZE_LIMIT@
# All that it can offer, as far as that is not the default.
prdr_enable
smtputf8_advertise_hosts = *
acl_smtp_vrfy = accept
acl_smtp_rcpt = recipient

begin acl
recipient:
  require message = relay not permitted
          domains = example.net : elsewhere.example
  deny    local_parts = ^refused
          message = no such user here
  defer   local_parts = ^deferred
          message = mailbox is busy
  accept

begin routers
elsewhere:
  driver = manualroute
  domains = elsewhere.example
  route_list = * 127.0.0.1 byname
  self = send
  transport = elsewhere
everyone:
  driver = accept
  transport = maildir

begin transports
elsewhere:
  driver = smtp
  port = ${readfile{@PLACE@/elsewhere}{}}
maildir:
  driver = appendfile
  directory = @PLACE@/mail
  maildir_format
  return_path_add
  headers_add = Delivered-To: $local_part@$domain

begin authenticators
PLAIN:
  driver = plaintext
  public_name = PLAIN
  server_prompts = :
  server_condition = ${if and{{eq{$auth2}{@USER@}}{eq{$auth3}{@PASSWORD@}}}}
  server_set_id = $auth2
LOGIN:
  driver = plaintext
  public_name = LOGIN
  server_prompts = Username:: : Password::
  server_condition = ${if and{{eq{$auth1}{@USER@}}{eq{$auth2}{@PASSWORD@}}}}
  server_set_id = $auth1
"""

OPENSMTPD_CONFIGURATION = """
smtp max-message-size @SIZE_LIMIT@
listen on 127.0.0.1 port @PORT@ hostname mail.example
table everyone { "@" = mailbox }
action deliver maildir "@PLACE@/mail" virtual <everyone>
match from any for rcpt-to regex "^refused" reject
match from any for domain "example.net" action deliver
"""

# Its programs, chroot, queue and control socket have their places in the binary.
OPENSMTPD_PLACES = """
mount --bind @PEERS@/usr/libexec /usr/libexec
for place in /var/lib /var/spool /run; do
    mount -t tmpfs -o mode=755 tmpfs $place
done
mkdir -p /var/lib/opensmtpd/empty
mkdir -m 711 /var/spool/smtpd
"""


class PeerError(Exception):
    """A server did not do what the test needs; the message ends with its log."""


@dataclass(frozen=True)
class Kind:
    """One of the servers.

    Words between two `@` stand for their values in `configuration`, `arguments` and
    `places`, the commands of sh that mount what it needs besides its users.
    """

    package: str
    program: str
    configuration: str
    arguments: Sequence[str]
    users: Sequence[str]  # the last one has the maildir
    accepted: str  # pattern of what it logs before it accepts a message
    places: str = ""

    def __str__(self) -> str:
        return self.package


EXIM = Kind(
    package="exim4-daemon-light",
    program=str(PEERS / "usr/sbin/exim4"),
    configuration=EXIM_CONFIGURATION,
    arguments=("-C", "@PLACE@/configuration", "-bdf"),
    users=("Debian-exim",),
    accepted=r" <= ",
)
OPENSMTPD = Kind(
    package="opensmtpd",
    program=str(PEERS / "usr/sbin/smtpd"),
    configuration=OPENSMTPD_CONFIGURATION,
    arguments=("-d", "-f", "@PLACE@/configuration"),
    users=("opensmtpd", "opensmtpq", "mailbox"),
    accepted=r" smtp message msgid=",
    places=OPENSMTPD_PLACES,
)


class Peer:
    """A running server between ``with`` and the end of its block."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self.address = ""
        self._place = Path()

    def __enter__(self) -> Peer:
        with ExitStack() as at_end:
            port = port_of(at_end.enter_context(reserve_port()))
            self.address = f"127.0.0.1:{port}"
            # Its users must get through, and pytest's directories are root's alone.
            self._place = Path(tempfile.mkdtemp(prefix="peer-", dir="/tmp"))
            at_end.callback(shutil.rmtree, self._place)
            self._start(self._lay_out(port))
            at_end.callback(self._end)
            self._wait_listening()
            self._at_end = at_end.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._at_end.close()

    def _lay_out(self, port: int) -> str:
        """Make its directories and files; returns the script that becomes it."""
        values = {
            "PEERS": PEERS,
            "PLACE": self._place,
            "PORT": port,
            "PROGRAM": self.kind.program,
            "SIZE_LIMIT": SIZE_LIMIT,
            "USER": USER,
            "PASSWORD": PASSWORD,
        }
        self._place.chmod(0o755)
        owner = FIRST_ID + len(self.kind.users) - 1
        for name in ("log", "mail", "spool"):
            (self._place / name).mkdir()
            os.chown(self._place / name, owner, owner)
        configuration = filled(self.kind.configuration, values)
        (self._place / "configuration").write_text(configuration)
        (self._place / "run").write_text(filled(self._script(), values))
        # OpenSMTPD would ask a name server even who 127.0.0.1 is.
        (self._place / "resolv.conf").write_text("nameserver 127.0.0.1\nlookup file\n")
        self._add_users("passwd", "{name}:x:{id}:{id}::/nonexistent:/bin/false\n")
        self._add_users("group", "{name}:x:{id}:\n")
        return f"{self._place}/run"

    def _script(self) -> str:
        mounts = "".join(
            f"mount --bind @PLACE@/{name} /etc/{name}\n"
            for name in ("passwd", "group", "resolv.conf")
        )
        run = " ".join(["exec", "@PROGRAM@", *self.kind.arguments])
        return f"{mounts}{self.kind.places}{run}\n"

    def _add_users(self, name: str, entry: str) -> None:
        added = "".join(
            entry.format(name=user, id=number)
            for number, user in enumerate(self.kind.users, FIRST_ID)
        )
        known = (Path("/etc") / name).read_text()
        (self._place / name).write_text(known + added)

    def _start(self, script: str) -> None:
        namespaces = ["unshare", "--mount", "--pid", "--fork", "--kill-child"]
        with (self._place / "log/output").open("wb") as output:
            self._process = subprocess.Popen(
                [*namespaces, "sh", "-e", script],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def _wait_listening(self) -> None:
        ended = self._process.poll
        poll(lambda: ended() is not None or is_listening(self.address), PEER_PATIENCE)
        if ended() is not None or not is_listening(self.address):
            raise self._error("it does not listen")

    def _end(self) -> None:
        """Kill it, and return when its files are at rest."""
        # The first process in there takes all others with it, and is gone after them.
        pid = self._process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text()
        subprocess.run(["kill", "-KILL", *(children.split() or [str(pid)])], check=True)
        self._process.wait(PEER_PATIENCE)

    def _error(self, problem: str) -> PeerError:
        return PeerError(f"{self.kind}: {problem}; its log:\n{self.log()}")

    def log(self) -> str:
        """Return all that it has written to any of its logs."""
        files = sorted((self._place / "log").iterdir())
        return "".join(file.read_text("utf-8", "replace") for file in files)

    def wait_log(self, pattern: str) -> None:
        """Return once a line of its logs matches; PeerError if none does."""
        if not poll(lambda: re.search(pattern, self.log(), re.M), PEER_PATIENCE):
            raise self._error(f"no {pattern!r} in its log")

    def send_to(self, port: int) -> None:
        """Have it send mail for elsewhere.example to this port, from now on."""
        (self._place / "elsewhere").write_text(str(port))

    def accepted(self) -> int:
        """How many messages it has accepted until its last reply."""
        return len(re.findall(self.kind.accepted, self.log()))

    def mails(self) -> list[Mail]:
        """Return the delivered messages, one for each recipient, in no order."""
        return [Mail(f.read_bytes()) for f in self._place.glob("mail/new/*")]

    def wait_mails(self, count: int) -> list[Mail]:
        """Return `count` delivered messages; PeerError if there are not so many."""
        if not poll(lambda: len(self.mails()) >= count, PEER_PATIENCE):
            raise self._error(f"{len(self.mails())} of {count} messages were delivered")
        mails = self.mails()
        if len(mails) > count:
            raise self._error(f"{len(mails)} messages were delivered, not {count}")
        return mails


def filled(text: str, values: Mapping[str, object]) -> str:
    """Return the text with each `@NAME@` in it replaced by its value."""
    return re.sub(r"@([A-Z_]+)@", lambda found: str(values[found[1]]), text)
