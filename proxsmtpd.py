#!/usr/bin/env python3
# Copyright (c) 2026, the proxsmtpd authors.  BSD 3-clause; see LICENSE.
"""proxsmtpd: an SMTP proxy that runs every message through a filter command.

    client <-- ClientChannel -- Session -- ServerChannel --> server
                                   |
                              Transaction -- FilterRun --> filter command
                                   |
                                 Spool

One message.  A client connects to the `Listener`; its connection gets a thread and a
`Session`, which connects to the server.  The session relays: a command to the server,
the server's whole reply to the client, then the next command.  For DATA it makes a
`Transaction`: the mail data goes into a `Spool`, a `FilterRun` runs the filter on it,
and its exit decides.  The server gets DATA and the filtered message only if the filter
agrees, and the client gets 250 only if the server has accepted (or the filter, by a
2xx reply, has dropped the message).  Without a filter the mail data streams through in
large blocks.

Processes.  `Daemon` starts: it binds, writes the pid file, drops privileges.  Then it
serves alone, or a `Supervisor` forks workers that share its listening socket, each for
one processor.  The main thread of each process handles signals and, except in the
supervisor, accepts connections; a session's thread owns its two sockets, its spools and
its filter.  The sessions of a process have `Shared` in common, with `Shutdown`, which
ends them and their filters; all processes have `ConnectionLimit` in common.

TLS.  Where a side is encrypted, its channel has a `TlsSocket` in place of its socket,
which may have nothing to give although the socket could be read.  `TlsState` says which
commands have to wait for TLS.  Each function that needs the module ssl imports it, so
that a daemon without TLS never loads it.

Where to begin reading: `VERBS` and `Session` are the dialogue, `Transaction` is the
message, `FilterRun` the filter, `SETTINGS` the configuration, `Daemon` the process.
The sections before "The log" are octets in, and octets or decisions out.  Octets on the
wire are bytes; configuration and log are str.

To add a setting: a row in `SETTINGS`, an attribute of `Config`, a line in the sample.
A verb: a row in `VERBS`, a method of `Session` if no handler fits, and its name in
`_TLS_REFUSALS` if it may come before TLS.  A reply: a constant below "Replies", for
`Refusal` or, to end the session, for `Hangup`.  A variable of the filter:
`FILTER_VARIABLES`, `Envelope.filter_variables`, `EXAMPLES`.  A field of a message's log
lines: `Envelope.describe` (first line) or `Transaction._log_message` (second line).
Each has an entry in the manuals, and so has each error or warning.  `make check` names
what is missing, except for verbs and for fields of the second line.
"""

from __future__ import annotations

import _thread
import contextlib
import errno
import fcntl
import functools
import gc
import getopt
import io
import marshal
import math
import mmap
import os
import pwd
import queue
import re
import resource
import select
import signal
import socket
import socketserver
import stat
import struct
import sys
import syslog
import threading
import time
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from enum import Enum, auto
from typing import (
    TYPE_CHECKING,
    Any,
    Callable,
    NamedTuple,
    NoReturn,
    Optional,
    TypeVar,
    Union,
)

if TYPE_CHECKING:
    import ssl

# ---------------------------------------------------------------------------
# Constants
# ---------------------------------------------------------------------------

VERSION = "2.0"
NAME = "proxsmtpd"
CONFIG_FILE = "/usr/local/etc/proxsmtpd.conf"

USAGE = """\
usage: proxsmtpd [-d debuglevel] [-f configfile] [-p pidfile]
       proxsmtpd -t [-d debuglevel] [-f configfile] [message ...]
       proxsmtpd -v"""
HELP = f"""\
{USAGE}

  -d LEVEL  stay in the foreground and log to standard error: 0 errors,
            1 warnings, 2 notices, 3 connections and messages, 4 all
  -f FILE   the configuration ({CONFIG_FILE})
  -p FILE   where to write the process number
  -t        check the configuration; with MESSAGE files (- is standard input)
            show what the filter makes of them
  -v, --version  print the version
  -h, --help     print this

See proxsmtpd(8) and proxsmtpd.conf(5)."""

IS_LINUX = sys.platform == "linux"

DEFAULT_LISTEN_PORT = 10025
DEFAULT_SERVER_PORT = 25
MAX_CONNECTIONS = 10240
MAX_PROCESSES = 256
MOST_SOCKET_PATH = 107 if IS_LINUX else 103  # octets of sun_path without its NUL
MAX_SECONDS = 2_000_000  # 23 days; poll takes milliseconds as an int

# The levels of -d.
ERROR, WARNING, NOTICE, INFO, DEBUG = range(5)

# Octets of a command line with its CRLF.  Postfix cuts longer lines here and executes
# the rest.  RFC 5321 asks for less, RFC 4954 section 4 for more after AUTH.
COMMAND_LIMIT = 2048
AUTH_LIMIT = 12288
REPLY_LINE_LIMIT = 512  # octets with the CRLF (RFC 5321 4.5.3.1.5)
REPLY_SHOWN = 1024  # octets of a reply in the log
# A longer line may be torn apart on a pipe (PIPE_BUF: 4,096) and cut by syslogd.
LOG_LINE_LIMIT = 4000

# One environment variable with its name and NUL: MAX_ARG_STRLEN, 32 pages on
# Linux.  The other systems bound only the sum, by more than this.
VARIABLE_LIMIT = 128 * 1024
RECIPIENTS_LIMIT = VARIABLE_LIMIT - len(b"RECIPIENTS=\0")

BLOCK = 256 * 1024  # mail data read from a socket or a file at a time
SMALL_BLOCK = 16 * 1024  # commands and replies
PIPE_BLOCK = 64 * 1024  # the usual capacity of a pipe

CHECK_SECONDS = 3.0  # for -t to connect to the server, and again for its replies
# Seconds at the daemon's end: for messages in their DATA phase, then for filters after
# SIGTERM, then for sessions after SIGKILL.  Together less than 5: then Debian's init
# script kills us, but not the filters.
DATA_GRACE = 3.2
FILTER_GRACE = 1.0
LAST_GRACE = 0.3


# ---------------------------------------------------------------------------
# Text and octets
# ---------------------------------------------------------------------------


def to_octets(text: str) -> bytes:
    """Return configuration text as the octets that stood in the file."""
    return text.encode("utf-8", "surrogateescape")


def to_text(octets: bytes) -> str:
    """Return octets as text that `to_octets` turns back into the same octets."""
    return octets.decode("utf-8", "surrogateescape")


_UNPRINTABLE = {n: f"\\x{n:02x}" for n in (*range(32), 127)}


def printable(octets: bytes) -> str:
    """Return octets as printable ASCII for the log, all others as ``\\xNN``."""
    return octets.decode("ascii", "backslashreplace").translate(_UNPRINTABLE)


def shown(text: str) -> str:
    """Return configuration text as printable ASCII, for the log."""
    return printable(to_octets(text))


# ---------------------------------------------------------------------------
# Replies (RFC 5321 section 4.2)
# ---------------------------------------------------------------------------


class Reply(bytes):
    """A whole reply as it goes over the wire, every line with its CRLF."""

    __slots__ = ()

    @classmethod
    def of(cls, *lines: bytes) -> Reply:
        """Make a reply of its lines, without CRLF."""
        return cls(b"\r\n".join((*lines, b"")))

    @property
    def code(self) -> int:
        return int(self[:3])

    @property
    def is_success(self) -> bool:
        return self[:1] == b"2"

    @property
    def is_refusal(self) -> bool:
        return self[:1] in (b"4", b"5")

    @property
    def lines(self) -> list[bytes]:
        return self.split(b"\r\n")[:-1]

    @property
    def text(self) -> str:
        """All lines on one, cut after `REPLY_SHOWN` octets, for the log."""
        return " ".join(map(printable, self[:REPLY_SHOWN].split(b"\r\n"))).rstrip(" ")


# Our own replies; all others are the server's or the filter's.
GREETING = Reply.of(b"220 smtp.passthru")
GREETING_ESMTP = Reply.of(b"220 smtp.passthru ESMTP")
HELLO = b"smtp.passthru"
READY_FOR_TLS = Reply.of(b"220 Ready to start TLS")
START_INPUT = Reply.of(b"354 Start mail input; end with <CRLF>.<CRLF>")
BUSY = Reply.of(b"421 Server busy, too many connections")
NO_THREAD = Reply.of(b"421 Local Error, cannot start thread")
NO_RESOURCES = Reply.of(b"421 Local Error, try again later")
NO_SERVER = Reply.of(b"421 Server not available")
NO_DESTINATION = Reply.of(b"421 No original destination to connect to")
SERVER_LOST = Reply.of(b"421 Connection to server lost")
SERVER_TIMED_OUT = Reply.of(b"421 Server timed out")
SERVER_CONFUSED = Reply.of(b"421 Server gave an unusable reply")
CANNOT_ENCRYPT = Reply.of(b"421 Connection to server cannot be encrypted")
CLIENT_TIMED_OUT = Reply.of(b"421 Timed out waiting for client")
CLIENT_GONE = Reply.of(
    b"421 Client closed the connection before the message was accepted"
)
SHUTTING_DOWN = Reply.of(b"421 Service shutting down")
LOCAL_ERROR = Reply.of(b"451 Local Error")
TOO_MANY_RECIPIENTS = Reply.of(b"452 Too many recipients")
TOO_LARGE = Reply.of(b"552 Message too large")
LINE_TOO_LONG = Reply.of(b"500 Line too long")
BAD_CHARACTER = Reply.of(b"500 Bad character in command")
UNRECOGNIZED = Reply.of(b"500 Command unrecognized")
BARE_LINE_FEED = Reply.of(b"500 Lines must end in CRLF")
BAD_ADDRESS = Reply.of(b"501 Syntax error in address or parameters")
DATA_ARGUMENT = Reply.of(b"501 DATA takes no argument")
STARTTLS_ARGUMENT = Reply.of(b"501 STARTTLS takes no argument")
NOT_IMPLEMENTED = Reply.of(b"502 Command not implemented")
NO_TRANSACTION = Reply.of(b"503 DATA needs an accepted MAIL and RCPT first")
HELLO_FIRST = Reply.of(b"503 EHLO has to come first after STARTTLS")
IS_ENCRYPTED = Reply.of(b"503 Connection is encrypted already")
TLS_REQUIRED = Reply.of(b"530 5.7.0 Must issue a STARTTLS command first")
AUTH_NEEDS_TLS = Reply.of(
    b"538 5.7.11 Encryption required for requested authentication mechanism"
)
WAIT_FOR_STARTTLS = Reply.of(b"554 Wait for the reply to STARTTLS")
INSUFFICIENT_AUTHORIZATION = Reply.of(b"554 Insufficient authorization")
TOO_MANY_ERRORS = Reply.of(b"421 Too many errors")
UNEXPECTED_DATA = Reply.of(b"554 Unexpected mail data after a refused DATA")
# The start of a reply, and a setting's default.
CONTENT_REJECTED = b"550 Content Rejected"
EMAIL_REJECTED = "530 Email Rejected"


# ---------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------


class ProxsmtpdError(Exception):
    """The root of this program's own errors."""


class UsageError(ProxsmtpdError):
    """The command line is wrong; the arguments are the lines to print."""


class ConfigError(ProxsmtpdError):
    """One fault of a configuration file; `line` is 0 if it is in none of the lines."""

    def __init__(self, text: str, path: str, line: int = 0) -> None:
        super().__init__(shown(f"{path}:{line}: {text}" if line else text))


class SystemRefused(ProxsmtpdError):
    """The system refused something that the daemon cannot start without."""


class Refusal(ProxsmtpdError):
    """We refuse a command with `reply`.

    `is_error` says that it counts towards `MAX_ERRORS`.
    """

    def __init__(self, reply: Reply, *, is_error: bool = True) -> None:
        super().__init__(reply.text)
        self.reply = reply
        self.is_error = is_error


class FilterFailure(ProxsmtpdError):
    """The filter failed, or something that it needs: the client has to try again."""

    reply = LOCAL_ERROR


class SpoolFailure(FilterFailure):
    """A message cannot be kept in TempDirectory: the filter is not at fault."""


class BadProxyHeader(ProxsmtpdError):
    """A connection begins with something else than a PROXY header."""


class BadReply(ProxsmtpdError):
    """The server sent something that is not an SMTP reply (RFC 5321 4.2)."""


class TlsFailure(ProxsmtpdError):
    """A connection could not be encrypted."""


class Hangup(ProxsmtpdError):
    """Ends a session; `reply` is the last one to the client, None for silence.

    `level` is the log level of its text.
    """

    level = WARNING

    def __init__(self, cause: str, reply: Optional[Reply] = None) -> None:
        super().__init__(cause)
        self.reply = reply


class ShuttingDown(Hangup):
    """The daemon ends."""

    level = DEBUG

    def __init__(self) -> None:
        super().__init__("shutting down", SHUTTING_DOWN)


class ClientLost(Hangup):
    """The client closed or broke its connection, or stopped reading."""

    level = DEBUG


class ServerLost(Hangup):
    """The server closed or broke its connection, fell silent or sent nonsense."""

    level = ERROR


# ---------------------------------------------------------------------------
# Addresses
# ---------------------------------------------------------------------------

# RFC 1035 2.3.4 and 2.3.1, and the underscores that people use.
_LABEL = r"[A-Za-z0-9_][A-Za-z0-9_-]{0,62}"
_HOST_NAME = re.compile(rf"{_LABEL}(?:\.{_LABEL})*\.?")
_NUMERIC_HOST = re.compile(r"[0-9.]+")
_ANY_HOSTS = ("", "0.0.0.0", "::")


class Address(NamedTuple):
    """Where to listen or connect: a unix socket's path, or a host and a port."""

    text: str  # as it stands in the configuration
    host: str  # name, IPv4 or IPv6 address; "" where only a port is given
    port: int  # 0 for a unix socket
    path: str = ""  # of a unix socket, else ""

    @property
    def is_any(self) -> bool:
        """Whether it names no host: all local addresses, or the loopback feature."""
        return not self.path and self.host in _ANY_HOSTS

    @classmethod
    def parse(cls, text: str, default_port: int) -> Address:
        """Parse one of the forms in proxsmtpd.conf(5); ValueError if it is none."""
        if text.startswith("/"):
            return cls(text, "", 0, text)
        if text.isdigit():
            return cls(text, "", _port(text))
        host, port = _split_host(text)
        if not is_host(host):
            raise ValueError(text)
        return cls(text, host, _port(port) if port is not None else default_port)


def _split_host(text: str) -> tuple[str, Optional[str]]:
    """Split ``host``, ``host:port``, ``[v6]``, ``[v6]:port`` or bare ``v6``."""
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        if not bracket or not is_ipv6(host) or (rest and rest[0] != ":"):
            raise ValueError(text)
        return host, rest[1:] if rest else None
    if is_ipv6(text):
        return text, None
    host, colon, port = text.partition(":")
    return host, port if colon else None


def _port(text: str) -> int:
    text = text.strip(" \t")
    if not text.isascii() or not text.isdigit() or not 0 < int(text) < 65536:
        raise ValueError(text)
    return int(text)


def _is_numeric(family: int, host: str) -> bool:
    try:
        socket.inet_pton(family, host)
    except (OSError, UnicodeError):
        return False
    return True


def is_numeric(host: str) -> bool:
    """Return whether `host` is an IP address."""
    return _is_numeric(socket.AF_INET, host) or is_ipv6(host)


def is_ipv6(host: str) -> bool:
    """Return whether `host` is an IPv6 address, perhaps with a scope (``%eth0``)."""
    return _is_numeric(socket.AF_INET6, host.partition("%")[0])


def is_host(host: str) -> bool:
    """Return whether `host` is an IP address or could be a name."""
    if is_numeric(host):
        return True
    if _NUMERIC_HOST.fullmatch(host):
        return False
    return len(host) < 256 and _HOST_NAME.fullmatch(host) is not None


class Peer(NamedTuple):
    """One end of a connection; both are empty for a unix socket."""

    host: str
    port: int

    @classmethod
    def of(cls, sockaddr: Any) -> Peer:
        """Make it of a socket's address; a v4-mapped one becomes plain IPv4."""
        if not isinstance(sockaddr, tuple):
            return cls("", 0)
        host = sockaddr[0]
        if host.startswith("::ffff:") and "." in host:
            host = host[len("::ffff:") :]
        if len(sockaddr) == 4 and sockaddr[3]:
            # A link-local address needs its interface (RFC 4007).
            host = f"{host}%{socket.if_indextoname(sockaddr[3])}"
        return cls(host, sockaddr[1])


# ---------------------------------------------------------------------------
# Commands (RFC 5321 section 4.1)
# ---------------------------------------------------------------------------

# Servers skip more white space than the grammar has.
_BLANKS = b" \t\v\f"
_FORBIDDEN_IN_COMMAND = re.compile(rb"[\0\r\n]")
_VERB = re.compile(rb"[ \t\v\f]*([^ \t\v\f]*)[ \t\v\f]*")
_PLAIN_VERB = re.compile(rb"[!-~]*")


class Match(Enum):
    """Which other words a server may take for a verb.

    Some servers compare four letters only, some take abbreviations.
    """

    EXACT = auto()  # none that matters
    GUARDED = auto()  # such words are refused
    PREFIX = auto()  # four letters of the verb stand for it, fewer are refused


class Verb(NamedTuple):
    """One row of the table of verbs."""

    handler: str  # the method of Session
    match: Match = Match.EXACT
    hides: tuple[bytes, ...] = ()  # keywords that EHLO's list must not show
    is_secret: bool = False  # the argument must not get into the log


# All other verbs are relayed, and their arguments are not logged.
VERBS: dict[bytes, Verb] = {
    b"HELO": Verb("_helo"),
    b"EHLO": Verb("_helo"),
    b"MAIL": Verb("_mail", Match.GUARDED),
    b"RCPT": Verb("_rcpt", Match.GUARDED),
    b"DATA": Verb("_data", Match.PREFIX),
    b"RSET": Verb("_rset"),
    b"QUIT": Verb("_quit"),
    b"NOOP": Verb("_relay"),
    b"HELP": Verb("_relay"),
    b"VRFY": Verb("_relay"),
    b"EXPN": Verb("_relay"),
    b"ETRN": Verb("_relay"),
    # Authentication; X-EXPS is Exchange's.
    b"AUTH": Verb("_auth", Match.GUARDED, is_secret=True),
    b"X-EXPS": Verb("_auth", is_secret=True),
    # Mail data by other ways than DATA.
    b"BDAT": Verb("_bdat", Match.PREFIX, (b"CHUNKING", b"BINARYMIME")),
    b"BURL": Verb("_not_implemented", Match.PREFIX, (b"BURL",), is_secret=True),
    b"XEXCH50": Verb("_not_implemented", hides=(b"XEXCH50",)),
    b"LHLO": Verb("_not_implemented"),
    # Encryption of the client's side, which is ours to do.  REQUIRETLS promises what
    # no filter can keep (RFC 8689).
    b"STARTTLS": Verb("_starttls", hides=(b"STARTTLS", b"REQUIRETLS")),
    b"X-ANONYMOUSTLS": Verb("_not_implemented", hides=(b"X-ANONYMOUSTLS",)),
    # The client and the server change their parts.
    b"TURN": Verb("_not_implemented"),
    b"ATRN": Verb("_not_implemented"),
    # What servers grant to our address must not be granted to our clients.
    b"XFORWARD": Verb("_xforward"),
    b"XCLIENT": Verb("_privileged", Match.PREFIX, (b"XCLIENT",)),
    b"PROXY": Verb("_privileged"),  # Haraka
    b"INTERNALCMD": Verb("_privileged", is_secret=True),  # Haraka
}
AUTH_VERBS = frozenset(name for name, verb in VERBS.items() if verb.handler == "_auth")
UNKNOWN_VERB = Verb("_relay", is_secret=True)

# Extensions without a verb that change what a reply or the mail data means, and
# PIPELINING, which we do ourselves.
_OTHER_HIDDEN = (
    b"CHECKPOINT PRDR PIPECONNECT PIPE_CONNECT X_PIPE_CONNECT PIPELINING".split()
)
REMOVED_EXTENSIONS = frozenset(_OTHER_HIDDEN).union(*(v.hides for v in VERBS.values()))

# Which verb a server might take a word for, by up to four letters of it.
_LOOKALIKES = {
    name[:length]: name
    for name, verb in reversed(VERBS.items())
    if verb.match is not Match.EXACT
    for length in range(1, 5)
}


def check_octets(line: bytes) -> None:
    """Raise `Refusal` (500) for a NUL, a bare CR or a bare LF in a client's line.

    Some server might take it for two lines.
    """
    if _FORBIDDEN_IN_COMMAND.search(line):
        raise Refusal(BAD_CHARACTER)


class Command(NamedTuple):
    """A command line (without CRLF), its verb in upper case, and the rest."""

    line: bytes
    verb: bytes
    argument: bytes

    @classmethod
    def parse(cls, line: bytes) -> Command:
        """Parse a line without its CRLF.

        Raises `Refusal` (500) as `check_octets`, for a verb with octets outside of
        printable ASCII, which some servers fold into ASCII letters, and for one
        that some servers might take for a verb which it is not.
        """
        check_octets(line)
        match = _VERB.match(line)
        assert match is not None  # the pattern matches anything
        verb = match[1].upper()
        if not _PLAIN_VERB.fullmatch(verb):
            raise Refusal(BAD_CHARACTER)
        other = _LOOKALIKES.get(verb[:4], b"")
        if other in (b"", verb):
            return cls(line, verb, line[match.end() :].rstrip(_BLANKS))
        if VERBS[other].match is Match.GUARDED or other.startswith(verb):
            raise Refusal(UNRECOGNIZED)
        return cls(line, other, line[match.start(1) + 4 :].rstrip(_BLANKS))

    @property
    def log_as(self) -> bytes:
        """The line for the log, without passwords."""
        if not self.argument or not VERBS.get(self.verb, UNKNOWN_VERB).is_secret:
            return self.line
        words = self.line.split()
        public = words[:2] if self.verb == b"AUTH" else words[:1]
        return b" ".join([*public, *(b"[...]" for _ in words[len(public) :])])


# What nearly all paths are, up to the parameters.
_ORDINARY_PATH = re.compile(
    rb"<([\w.+=-]+@[\w-]+(?:\.[\w-]+)*)>(?:\Z|[ \t]+(?=[A-Za-z0-9]))"
)
# The pieces of a path (RFC 5321 4.1.2), and of what RFC 822 allows more of.  Dots may
# stand anywhere in a local part: `a..b@c` is in use.  8-bit octets are SMTPUTF8's.
_PATH_PREFIX = re.compile(rb"([A-Za-z]+)[ \t\v\f]*:[ \t\v\f]*")
_PLAIN_PREFIX = re.compile(rb"[A-Za-z]+:[ \t]*")
_BLANKS_OR_COMMENT = re.compile(rb"[ \t\v\f]+|\(")
_IN_COMMENT = re.compile(rb"[^()\\]+|\\.|[()]")
_WORD = re.compile(
    rb'"(?:[ !#-\[\]-~\x80-\xff]|\\[ -~])*"'
    rb"|(?:[\w!#$%&'*+/=?^`{|}~\x80-\xff-]|\\[ -~])+"
    rb"|\.+"
)
_DOT_STRING = re.compile(rb"[\w!#$%&'*+./=?^`{|}~\x80-\xff-]+")
# Without a domain, Postfix takes `a%b` and `b!a` for a@b.
_LOCAL_USER = re.compile(rb"[\w#$&'*+./=?^`{|}~\x80-\xff-]+")
_DOMAIN_LABEL = re.compile(rb"[\w\x80-\xff-]+")
# RFC 5321 4.1.3, without what some server might take for the path's own syntax.
_ADDRESS_LITERAL = re.compile(rb"\[[!#-'*+.-;=?A-Z^-~-]+\]")
_PARAMETER = re.compile(rb"[A-Za-z0-9][\w-]*(?:=.*)?")
_QUOTING = re.compile(rb'\\(.)|"')
_TO_BE_QUOTED = re.compile(rb'["\\]')

# Servers take `<<a@b>>` and `<Name <a@b>>`, but no more brackets than these.
_BRACKETS_LIMIT = 2


class Path(NamedTuple):
    """The path of MAIL or RCPT.

    `address` is what goes between the angle brackets, for the null reverse-path
    ``<>``; `parameters` is the text after the path.  A plain path was spelled so by
    the client, so that its line may go to the server as it came.
    """

    address: bytes
    parameters: bytes
    is_plain: bool

    def spell(self, command: Command, start: bytes) -> Command:
        """Give the command for the server; `start` is ``MAIL FROM:`` or ``RCPT TO:``.

        Raises `Refusal` (500) for a line that has become too long.
        """
        if self.is_plain:
            return command
        path = self.address if self.address == b"<>" else b"<%s>" % self.address
        line = b" ".join((start + path, *self.parameters.split()))
        if len(line) + 2 > COMMAND_LIMIT:
            raise Refusal(LINE_TOO_LONG)
        return command._replace(line=line)


def read_path(argument: bytes, prefix: bytes) -> Path:
    """Read the argument of MAIL (`prefix` is ``FROM``) or RCPT (``TO``).

    A path that does not follow RFC 5321 is read as Postfix and Exim read it.  Raises
    `Refusal` (501) if they disagree about it, or do not accept it.
    """
    match = _PATH_PREFIX.match(argument)
    if match is None or match[1].upper() != prefix:
        raise Refusal(BAD_ADDRESS)
    ordinary = _ORDINARY_PATH.match(argument, match.end())
    if ordinary is not None:  # which takes a tenth of the reader's time
        address, end = ordinary[1], ordinary.end()
    else:
        reader = _PathReader(argument, match.end())
        address, end = reader.path(), reader.position
    parameters = argument[end:].rstrip(_BLANKS)
    is_separate = end == len(argument) or argument[end - 1] in _BLANKS
    if not is_separate or not all(map(_PARAMETER.fullmatch, parameters.split())):
        raise Refusal(BAD_ADDRESS)
    is_plain = (
        argument[match.end() : end].rstrip(_BLANKS) == b"<" + address + b">"
        and _PLAIN_PREFIX.fullmatch(match[0]) is not None
    )
    return Path(address or b"<>", parameters, is_plain)


class _PathReader:
    """Reads the pieces of a path, each of which raises `Refusal` (501) if it is bad."""

    def __init__(self, text: bytes, position: int) -> None:
        self.text = text
        self.position = position

    def take(self, pattern: re.Pattern[bytes]) -> bytes:
        """Take what matches here, if anything does."""
        match = pattern.match(self.text, self.position)
        if match is None:
            return b""
        self.position = match.end()
        return match[0]

    def accept(self, octet: bytes) -> bool:
        """Take this octet, if it is the next one."""
        is_next = self.text.startswith(octet, self.position)
        self.position += is_next
        return is_next

    def expect(self, octet: bytes) -> None:
        if not self.accept(octet):
            raise Refusal(BAD_ADDRESS)

    def skip(self) -> None:
        """Skip blanks and comments, which nest (RFC 5322 section 3.2.2)."""
        depth = 0
        while found := self.take(_IN_COMMENT if depth else _BLANKS_OR_COMMENT):
            depth += {b"(": 1, b")": -1}.get(found, 0)
        if depth:
            raise Refusal(BAD_ADDRESS)

    def path(self) -> bytes:
        """Take the path up to the parameters; return its address."""
        brackets = self.open_brackets()
        address = self.address(is_bracketed=brackets > 0)
        for _ in range(brackets):
            self.skip()
            self.expect(b">")
        self.skip()
        return address

    def open_brackets(self) -> int:
        """Skip display names and the brackets after them; returns their number."""
        for count in range(_BRACKETS_LIMIT):
            start = self.position
            words = self.words()
            # No name, but an address without a domain, and a parameter: AUTH=<>.
            is_parameter = len(words) > 1 and self.text[self.position - 1] in b"="
            if is_parameter or not self.accept(b"<"):
                self.position = start
                return count
        return _BRACKETS_LIMIT

    def words(self) -> list[bytes]:
        """Take atoms, quoted strings and dots; skip blanks and comments."""
        words = []
        self.skip()
        while word := self.take(_WORD):
            words.append(word)
            self.skip()
        return words

    def address(self, *, is_bracketed: bool) -> bytes:
        """Take a mailbox with or without a domain; nothing is the null reverse-path."""
        start = self.position
        words = self.words()
        if not words and self.accept(b"@"):
            self.source_route()
            words = self.words()
        if self.accept(b"@"):
            return local_part(words) + b"@" + self.domain(is_bracketed=is_bracketed)
        self.position = start
        self.skip()
        user = self.take(_LOCAL_USER)
        if not user and not is_bracketed:
            raise Refusal(BAD_ADDRESS)
        return user

    def source_route(self) -> None:
        """Take the domains up to a colon, of which the first `@` has been taken."""
        self.domain(is_bracketed=True)
        while self.accept(b","):
            self.skip()
            self.expect(b"@")
            self.domain(is_bracketed=True)
        self.expect(b":")

    def domain(self, *, is_bracketed: bool) -> bytes:
        """Take a domain or an address literal; without brackets, a blank ends it."""
        self.skip()
        if literal := self.take(_ADDRESS_LITERAL):
            return literal
        labels = []
        while label := self.take(_DOMAIN_LABEL):
            labels.append(label)
            if is_bracketed:
                self.skip()
            if not self.accept(b"."):
                break
            if is_bracketed:
                self.skip()
        if not labels:
            raise Refusal(BAD_ADDRESS)
        return b".".join(labels)  # without a dot at the end, as Postfix


def local_part(words: Sequence[bytes]) -> bytes:
    """Join the words of a local part, quoted as a whole if it needs quotes.

    Raises `Refusal` (501) if there is no word, or no dot between two of them.
    """
    pairs = zip(words, words[1:])
    if not words or any(b"." not in (a[:1], b[:1]) for a, b in pairs):
        raise Refusal(BAD_ADDRESS)
    joined = b"".join(words)
    if len(words) == 1 and joined.startswith(b'"'):
        return joined
    text = _QUOTING.sub(rb"\1", joined)
    if _DOT_STRING.fullmatch(text):
        return text
    return b'"%s"' % _TO_BE_QUOTED.sub(rb"\\\g<0>", text)


_SIZE_PARAMETER = re.compile(rb"SIZE=([0-9]{1,20})", re.IGNORECASE)


def take_size(parameters: bytes) -> tuple[bytes, int]:
    """Split SIZE off the parameters of MAIL; return the others and it (RFC 1870).

    The size is in octets, 0 if there is none.  What does not follow RFC 1870 stays for
    the server to judge.
    """
    words = parameters.split()
    sizes = [match for match in map(_SIZE_PARAMETER.fullmatch, words) if match]
    if not sizes:
        return parameters, 0
    others = [word for word in words if not _SIZE_PARAMETER.fullmatch(word)]
    return b" ".join(others), max(int(size[1]) for size in sizes)


# RFC 3461 section 4: xtext = *( xchar / "+" 2HEXDIG ).
_XTEXT_ESCAPE = re.compile(rb"\+([0-9A-Fa-f]{2})")
_XTEXT_UNSAFE = re.compile(rb"[^!-*,-<>-~]")


def xtext_decode(text: bytes) -> bytes:
    """Decode xtext; octets that are not xtext stay as they are."""
    return _XTEXT_ESCAPE.sub(lambda m: bytes([int(m[1], 16)]), text)


def xtext_encode(octets: bytes) -> bytes:
    """Encode any octets as xtext."""
    return _XTEXT_UNSAFE.sub(lambda m: b"+%02X" % m[0][0], octets)


_NO_VALUE = (b"[UNAVAILABLE]", b"[TEMPUNAVAIL]", b"")
_CONTROL = re.compile(rb"[\x00-\x1f\x7f]")


def parse_xforward(argument: bytes) -> dict[bytes, Optional[bytes]]:
    """Return the attributes of an XFORWARD command, by their names in upper case.

    None stands for a value that the client does not know, and for one that decodes to
    control characters, which no address or host name has.
    """
    attributes: dict[bytes, Optional[bytes]] = {}
    for word in argument.split():
        name, _, value = word.partition(b"=")
        decoded = xtext_decode(value)
        missing = value.upper() in _NO_VALUE or _CONTROL.search(decoded)
        attributes[name.upper()] = None if missing else decoded
    return attributes


def strip_ipv6_tag(address: bytes) -> bytes:
    """Return an address without the tag ``IPV6:`` (RFC 5321 4.1.3)."""
    return address[5:] if address[:5].upper() == b"IPV6:" else address


def xclient_address(host: str) -> bytes:
    """Return an address as XCLIENT and XFORWARD write it."""
    if not host:
        return b"[UNAVAILABLE]"
    plain = host.partition("%")[0]  # a scope means nothing elsewhere
    tagged = f"IPV6:{plain}" if ":" in plain else plain
    return xtext_encode(tagged.encode("ascii"))


XCLIENT_LIMIT = 512
XCLIENT_VALUE_LIMIT = 255  # octets of an attribute's value that Postfix takes


def xclient_command(
    offered: frozenset[bytes], client: Peer, local: Peer, hello: Optional[Command]
) -> bytes:
    """Return the XCLIENT command line (without CRLF) for a client.

    `offered` are the attributes that the server lists; ADDR is always sent.  `hello` is
    the client's HELO or EHLO, if there was one.  HELO is left out if it, or the line
    with it, would be too long: a long name must not keep the address from the server.
    """
    values = {
        b"NAME": b"[UNAVAILABLE]",
        b"PORT": b"%d" % client.port if client.port else b"[UNAVAILABLE]",
        b"DESTADDR": xclient_address(local.host),
        b"DESTPORT": b"%d" % local.port if local.port else b"[UNAVAILABLE]",
    }
    if hello is not None:
        values[b"PROTO"] = b"ESMTP" if hello.verb == b"EHLO" else b"SMTP"
        values[b"HELO"] = xtext_encode(hello.argument) or b"[UNAVAILABLE]"
    line = b"XCLIENT ADDR=" + xclient_address(client.host)
    for name, value in values.items():
        attribute = b" " + name + b"=" + value
        fits = len(line) + len(attribute) + 2 <= XCLIENT_LIMIT
        if name in offered and fits and len(value) <= XCLIENT_VALUE_LIMIT:
            line += attribute
    return line


# ---------------------------------------------------------------------------
# The server's replies
# ---------------------------------------------------------------------------

# Reply-line = *( Reply-code "-" [ textstring ] CRLF ) Reply-code [ SP textstring ] CRLF
_REPLY_LINE = re.compile(rb"([2-5][0-9][0-9])(?:([ -])|$)", re.DOTALL)
# What nearly every reply is.
_PLAIN_REPLY = re.compile(
    rb"[2-5][0-9][0-9](?: [^\0\r\n]{0,%d})?\r\n" % REPLY_LINE_LIMIT
)
_CODED_LINE = re.compile(rb"([245][0-9][0-9])(?:[ -](.*))?", re.DOTALL)
# A client might take a bare CR for the end of the line.
_LINE_BREAKS_TO_MARK = bytes.maketrans(b"\r\n\0", b"???")


REPLY_LIMIT = 256 * 1024  # octets; RFC 5321 does not limit the number of lines


class ReplyBuffer:
    """Cuts the octets that come from the server into replies."""

    def __init__(self) -> None:
        self._octets = bytearray()
        self._scanned = 0
        self._lines: list[bytes] = []
        self._size = 0

    def __bool__(self) -> bool:
        return bool(self._octets or self._lines)

    def feed(self, octets: bytes) -> None:
        self._octets += octets

    def take(self, octets: bytes) -> Optional[Reply]:
        """Feed octets, and return the next reply, as `next_reply` does."""
        if not self and _PLAIN_REPLY.fullmatch(octets):
            return Reply(octets)
        self.feed(octets)
        return self.next_reply()

    def next_reply(self) -> Optional[Reply]:
        """Return the next whole reply, or None until more has come.

        A bare CR or NUL in it becomes a question mark.  If its lines have different
        codes, all get the last line's (postscreen greets with 220- and then refuses).
        Raises `BadReply` for a line without a code, and for an endless reply.
        """
        if not self._octets:
            return None
        line = self._next_line()
        while line is not None:
            if self._add(line):
                lines, self._lines, self._size = self._lines, [], 0
                code = lines[-1][:3]
                return Reply.of(*(code + line[3:] for line in lines))
            line = self._next_line()
        if self._size + len(self._octets) > REPLY_LIMIT:
            raise BadReply("reply without end")
        return None

    def _next_line(self) -> Optional[bytes]:
        end = self._octets.find(b"\n", self._scanned)
        if end < 0:
            self._scanned = len(self._octets)
            return None
        line = bytes(self._octets[:end])
        del self._octets[: end + 1]
        self._scanned = 0
        return line[:-1] if line.endswith(b"\r") else line

    def _add(self, line: bytes) -> bool:
        """Take a line of a reply; True if it is the last one."""
        match = _REPLY_LINE.match(line)
        if match is None:
            raise BadReply(f"not a reply: {printable(line[:REPLY_LINE_LIMIT])}")
        self._size += len(line)
        if self._size > REPLY_LIMIT:
            raise BadReply("reply without end")
        self._lines.append(line.translate(_LINE_BREAKS_TO_MARK))
        return match[2] != b"-"


def hide_greeting(reply: Reply) -> Reply:
    """Return a 220 without the server's name, on one line, for the client.

    The word ESMTP stays: some clients send EHLO only if they see it.
    """
    is_extended = any(b"ESMTP" in line[4:].upper().split() for line in reply.lines)
    return GREETING_ESMTP if is_extended else GREETING


def rewrite_hello(
    reply: Reply, *, extended: bool, size: int = 0, starttls: bool = False
) -> Reply:
    """Return the server's 250 to EHLO (`extended`) or HELO, for the client.

    The first line hides the server's name (RFC 5321 4.1.1.1).  Service extensions that
    cannot pass are removed, PIPELINING, which we implement, is added (RFC 2920), and so
    is SIZE if `size` is not 0: the smaller of that and the server's (RFC 1870).  With
    `starttls`, that is offered (RFC 3207), and no authentication before it is used.
    """
    texts = [line[4:] for line in reply.lines[1:]]
    if extended:
        texts = [text for text in texts if _keyword(text) not in REMOVED_EXTENSIONS]
        if size:
            limit = smaller_limit(offered_attributes(reply, b"SIZE"), size)
            texts = [text for text in texts if _keyword(text) != b"SIZE"]
            texts.insert(0, b"SIZE %d" % limit)
        if starttls:
            texts = [text for text in texts if _keyword(text) not in AUTH_VERBS]
            texts.insert(0, b"STARTTLS")
        texts.insert(0, b"PIPELINING")
    texts.insert(0, HELLO)
    return Reply.of(*(b"250-" + text for text in texts[:-1]), b"250 " + texts[-1])


def _keyword(extension: bytes) -> bytes:
    return re.split(rb"[ \t=]", extension.lstrip(_BLANKS), maxsplit=1)[0].upper()


def smaller_limit(offered: Optional[frozenset[bytes]], size: int) -> int:
    """Return the smaller of our limit and the server's, if it has one."""
    numbers = (word for word in offered or () if re.fullmatch(rb"[0-9]{1,20}", word))
    limits = (int(number) for number in numbers)
    return min([size, *(limit for limit in limits if limit)])


def offered_attributes(reply: Reply, extension: bytes) -> Optional[frozenset[bytes]]:
    """Return the parameters of an extension in an EHLO reply, or None."""
    for line in reply.lines[1:]:
        if _keyword(line[4:]) == extension:
            return frozenset(re.split(rb"[\s=]+", line[4:].strip().upper())[1:])
    return None


def coded_reply(line: bytes) -> Optional[Reply]:
    """Return an administrator's or a filter's line as a reply, if it has a code.

    The code is 2xx, 4xx or 5xx.  ``NNN-text`` becomes ``NNN text``, since our reply is
    one line, of 512 octets at most (RFC 5321 4.5.3.1.5).  CR, LF and NUL become
    question marks.  None stands for a line without a code.
    """
    match = _CODED_LINE.fullmatch(line)
    if match is None:
        return None
    return _one_line(match[1] if match[2] is None else match[1] + b" " + match[2])


def rejection(line: bytes) -> Reply:
    """Return a line with a code as a reply, or 550 with any other line."""
    coded = coded_reply(line)
    if coded is not None:
        return coded
    return _one_line(CONTENT_REJECTED + b"; " + line if line else CONTENT_REJECTED)


def _one_line(text: bytes) -> Reply:
    return Reply.of(text.translate(_LINE_BREAKS_TO_MARK)[: REPLY_LINE_LIMIT - 2])


# ---------------------------------------------------------------------------
# A client's octets as command lines
# ---------------------------------------------------------------------------


_AUTH_LINE = re.compile(rb"[ \t\v\f]*(?:AUTH|X-EXPS)[ \t\v\f]", re.IGNORECASE)
_QUIT_AT_END = re.compile(rb"(?:^|\n)[ \t]*QUIT[ \t]*\r\n\Z", re.IGNORECASE)


class CommandBuffer:
    """Cuts the octets that come from the client into command lines.

    Only CRLF ends a line (RFC 5321 2.3.8).  Memory is bounded by the limit of a
    line and what one `feed` brought.
    """

    def __init__(self) -> None:
        self._octets = bytearray()
        self._scanned = 0
        self._is_overlong = False  # the line whose rest is thrown away

    def __bool__(self) -> bool:
        return bool(self._octets)

    def feed(self, octets: bytes) -> None:
        self._octets += octets

    def take_all(self) -> bytes:
        """Take all octets, as mail data."""
        octets = bytes(self._octets)
        self._octets.clear()
        self._scanned = 0
        return octets

    def ends_in_quit(self, more: bytes) -> bool:
        """Tell whether the last line, once `more` has been fed, is QUIT."""
        return bool(_QUIT_AT_END.search(self._octets[-COMMAND_LIMIT:] + more))

    def next_line(self, *, is_answer: bool = False) -> Optional[bytes]:
        """Return the next line without its CRLF, or None until more has come.

        `is_answer` says that it answers a challenge of an authentication.  Raises
        `Refusal` (500) for a line that is too long, and for one that ends in a bare LF
        if nothing follows: such a client waits for the reply.
        """
        if not self._octets:
            return None
        is_long = is_answer or _AUTH_LINE.match(self._octets)
        limit = AUTH_LIMIT if is_long else COMMAND_LIMIT
        end = self._octets.find(b"\r\n", self._scanned)
        if end < 0:
            self._check_unfinished(limit)
            return None
        line = bytes(self._octets[:end])
        del self._octets[: end + 2]
        is_overlong = self._is_overlong or end + 2 > limit
        self._is_overlong, self._scanned = False, 0
        if is_overlong:
            raise Refusal(LINE_TOO_LONG)
        return line

    def _check_unfinished(self, limit: int) -> None:
        if len(self._octets) > limit:
            self._is_overlong = True
            del self._octets[:-1]  # the last octet may be the CR of the end
        elif self._octets.endswith(b"\n") and not self._is_overlong:
            self.take_all()
            raise Refusal(BARE_LINE_FEED)
        self._scanned = max(0, len(self._octets) - 1)


# ---------------------------------------------------------------------------
# Mail data (RFC 5321 section 4.5.2)
#
# A client chooses these octets.  None may cost much more time than base64 does, so each
# step is a few calls that look at a whole block.
# ---------------------------------------------------------------------------

_END = b"\r\n.\r\n"
# At the end of a block: the beginning of _END, or of a bare LF and two dots.
_UNDECIDED_END = re.compile(rb"(?:\r\n\.\r|\r?\n\.?|\r)\Z")


class MailDataReader:
    """Finds the end of mail data and undoes the dot-stuffing.

    Blocks of any size go in as they come from the wire, however they are cut;
    the message comes out as its author wrote it.
    """

    def __init__(self) -> None:
        # The data begins at the start of a line: as if after a CRLF, which is
        # removed again from the first octets that leave.
        self._held = b"\r\n"
        self._is_first = True
        self.ended = False
        self.rest = b""

    def feed(self, block: bytes) -> bytes:
        """Take wire octets, return message octets.

        At the end of the data `ended` becomes true, and `rest` holds the octets
        after it.
        """
        octets = self._held + block
        # What makes a message large is base64, which has no dots.
        has_dots = b"." in octets and b"\n." in octets
        end = octets.find(_END) if has_dots else -1
        if end >= 0:
            self.ended, self.rest = True, octets[end + len(_END) :]
            octets = octets[: end + 2]
        else:
            undecided = _UNDECIDED_END.search(octets[-4:])
            self._held = undecided[0] if undecided else b""
            octets = octets[: len(octets) - len(self._held)]
        message = _unstuff(octets) if has_dots else octets
        if self._is_first and message:
            self._is_first = False
            return message[2:]
        return message


def _unstuff(octets: bytes) -> bytes:
    """Remove the first dot after each CRLF, and one of two dots after a bare LF.

    Some clients stuff after a bare LF (Python's smtplib) and some do not.
    """
    octets = octets.replace(b"\r\n.", b"\r\n")
    if b"\n.." in octets:
        # The second step takes a dot from all lines, so CRLF's get one before it.
        octets = octets.replace(b"\r\n..", b"\r\n...").replace(b"\n..", b"\n.")
    return octets


class LineRepair:
    """Makes every line end in CRLF.

    Bare LF becomes CRLF.  CRs before a line's end, or at the end of the message,
    are removed, as Postfix does, so that an empty line stays empty.  Any other CR
    becomes a space; a run of more than BLOCK of them counts as BLOCK.
    """

    def __init__(self) -> None:
        self._held = 0  # CRs at the end of the last block
        self._at_start = True

    def feed(self, block: bytes) -> bytes:
        """Take octets, return whole or partial lines without a CR at the end."""
        if len(block) > BLOCK:
            starts = range(0, len(block), BLOCK)
            return b"".join(self.feed(block[i : i + BLOCK]) for i in starts)
        text = block.rstrip(b"\r")
        crs = len(block) - len(text)
        if text:
            octets = self._with_held(text) if self._held else text
            self._held = crs
            self._at_start = octets.endswith(b"\n")
            return _repair(octets)
        self._held = min(self._held + crs, BLOCK)
        return b""

    def _with_held(self, text: bytes) -> bytes:
        rest = text.lstrip(b"\r")
        return b"\r" * min(self._held + len(text) - len(rest), BLOCK) + rest

    def finish(self) -> bytes:
        """Return the end of the last line, if it has none yet."""
        return b"" if self._at_start and not self._held else b"\r\n"


def _repair(octets: bytes) -> bytes:
    # One look, in C, at a fifth of the cost of counting CRLF, CR and LF.
    decoder = io.IncrementalNewlineDecoder(None, translate=False)
    decoder.decode(octets.decode("latin-1"), final=True)
    if decoder.newlines in (None, "\r\n"):
        return octets
    if b"\r" in octets:
        octets = _without_crs_before_lf(octets).replace(b"\r", b" ")
    return octets.replace(b"\n", b"\r\n")


_MANY_CRS = b"\r" * 32


def _without_crs_before_lf(octets: bytes) -> bytes:
    if b"\r\r\n" in octets:
        *parts, last = octets.split(_MANY_CRS + b"\n")
        octets = b"\n".join([*(part.rstrip(b"\r") for part in parts), last])
        # Fewer than 32 are left before each LF: the sum of some of these numbers.
        for number in (16, 8, 4, 2):
            octets = octets.replace(b"\r" * number + b"\n", b"\n")
    return octets.replace(b"\r\n", b"\n")


# The start of a header field (RFC 5322 2.2 and, for the blanks, 4.5) as Postfix
# reads it.  A name has less than a line's octets (2.1.1).
_FIELD_NAME = rb"[!-9;-~]{1,998}[ \t]{0,998}"
# A block may end in a line that may still become a field or an mbox's line.
_UNDECIDED_LINE = rb"(?:" + _FIELD_NAME + rb")?\Z"
_LAST_LINE_UNDECIDED = re.compile(rb"\r\n" + _UNDECIDED_LINE + rb"|\r\Z")
# The line end before the header section, which is after the From lines of an mbox
# (Postfix makes fields of them), and the one at its end.
_SECTION_START = re.compile(rb"\n(?!>{0,9}From |" + _UNDECIDED_LINE + rb")")
_SECTION_END = re.compile(
    rb"\n(?!" + _FIELD_NAME + rb":|[ \t]|" + _UNDECIDED_LINE + rb")"
)


class HeaderInserter:
    """Puts a header field into a message whose lines all end in CRLF.

    A ``Received:`` field goes to the top (RFC 5321 4.4), any other to the end of
    the header section: before the first line that is neither a field nor folded.
    """

    def __init__(self, field: bytes) -> None:
        self._field = field
        self._placed = not field
        self._on_top = field[:9].lower() == b"received:"
        self._in_section = False
        # A line end that may be the place, and the undecided line after it.  The
        # message begins as if after one, which is removed again.
        self._held = b"\r\n"
        self._is_first = True

    def feed(self, block: bytes) -> bytes:
        """Take octets of the message, return those that are decided."""
        if self._placed or not block:
            return block
        octets = self._held + block
        place = self._place_in(octets)
        if place is not None:
            self._placed = True
            before, after = octets[:place], octets[place:]
            # No field may be there that such a line continues.
            end = b"\r\n" if after.startswith((b" ", b"\t")) else b""
            return self._without_first_end(before) + self._field + end + after
        last_line = max(octets.rfind(b"\r\n"), 0)
        undecided = _LAST_LINE_UNDECIDED.search(octets, last_line)
        self._held = undecided[0] if undecided else b""
        return self._without_first_end(octets[: len(octets) - len(self._held)])

    def finish(self) -> bytes:
        """Return the field, if the message ended before its place came."""
        return (
            b"" if self._placed else self._without_first_end(self._held) + self._field
        )

    def _place_in(self, octets: bytes) -> Optional[int]:
        start = 0
        if not self._in_section:
            found = _SECTION_START.search(octets)
            if found is None:
                return None
            self._in_section = True
            if self._on_top or octets[found.end()] in b" \t":
                return found.end()
            start = found.start()
        found = _SECTION_END.search(octets, start)
        return found.end() if found else None

    def _without_first_end(self, octets: bytes) -> bytes:
        if self._is_first and octets:
            self._is_first = False
            return octets[2:]
        return octets


NULS_HELD = 64 * 1024  # NULs at the start of a line, until it is clear what follows


class DotStuffer:
    """Gives every line that begins with a dot another one.

    The same goes for a line with NULs before that dot, since some servers drop
    NULs; the others take the dot off again (RFC 5321 4.5.2).  After more NULs
    than can be held back, a space goes before the dot instead.
    """

    def __init__(self) -> None:
        self._at_start = True  # nothing but NULs since the start of the line
        self._held = 0  # these NULs
        self._is_late = False  # some of them have gone, so no dot can come first

    def feed(self, block: bytes) -> bytes:
        """Take whole or partial lines that end in CRLF, return wire octets."""
        if not self._at_start:
            return self._hold_last_nuls(_stuff(block))
        text = block.lstrip(b"\0")
        nuls = self._held + len(block) - len(text)
        if not text:
            return self._hold(nuls)
        self._held = 0
        start = b"\0" * nuls
        if self._is_late:
            start += b" " if text.startswith(b".") else b""
            return self._hold_last_nuls(start + _stuff(text))
        return self._hold_last_nuls(_stuff(b"\n" + start + text)[1:])

    def _hold(self, nuls: int) -> bytes:
        """Hold NULs at the start of a line; return them if they are too many."""
        if nuls <= NULS_HELD and not self._is_late:
            self._held = nuls
            return b""
        self._held, self._is_late = 0, True
        return b"\0" * nuls

    def _hold_last_nuls(self, stuffed: bytes) -> bytes:
        kept = stuffed.rstrip(b"\0")
        self._at_start = kept.endswith(b"\n")
        self._is_late = False
        if not self._at_start:
            return stuffed
        return kept + self._hold(len(stuffed) - len(kept))


def _stuff(octets: bytes) -> bytes:
    if b"." not in octets:
        return octets
    octets = octets.replace(b"\n.", b"\n..")
    return _stuff_after_nuls(octets) if b"\0" in octets else octets


_MANY_NULS_AND_MARK = re.compile(rb"\n(?=\0+\r\0)")


def _stuff_after_nuls(octets: bytes) -> bytes:
    octets = octets.replace(b"\n\0.", b"\n.\0.")
    if b"\n\0\0" not in octets or b"\0\0." not in octets:
        return octets
    # CR NUL, which cannot occur here, marks the dot and is moved back over its NULs.
    # A regular expression that finds these takes ten times as long.
    octets = octets.replace(b"\0\0.", b"\r\0\0.")
    if b"\0\r\0" in octets:
        for number in (16, 8, 4, 2, 1):
            nuls = b"\0" * number
            octets = octets.replace(nuls + b"\r\0", b"\r\0" + nuls)
    octets = octets.replace(b"\n\r\0", b"\n.\0")
    if b"\0\r\0" in octets:
        octets = _MANY_NULS_AND_MARK.sub(b"\n.", octets)
    return octets.replace(b"\r\0", b"\0")


class MailDataWriter:
    """Turns a message of any octets into mail data that has one meaning only.

    Every line ends in CRLF, no CR or LF stands alone, no line but the last is a
    lone dot: whatever a server takes for the end, it takes only ours.
    """

    def __init__(self, field: bytes = b"") -> None:
        self._repair = LineRepair()
        self._header = HeaderInserter(field)
        self._stuffer = DotStuffer()

    def feed(self, block: bytes) -> bytes:
        """Take message octets, return wire octets."""
        repaired = self._repair.feed(block)
        return self._stuffer.feed(self._header.feed(repaired))

    def finish(self) -> bytes:
        """Return the last octets, and the end of the mail data."""
        last = self._header.feed(self._repair.finish()) + self._header.finish()
        return self._stuffer.feed(last) + b".\r\n"


# ---------------------------------------------------------------------------
# The header template
# ---------------------------------------------------------------------------

_ESCAPE = re.compile(r"\\([rnt\\])")
_ESCAPES = {"r": "\r", "n": "\n", "t": "\t", "\\": "\\"}
_SYMBOL = re.compile(rb"%(.)", re.DOTALL)
HEADER_SYMBOLS = frozenset((b"i", b"l", b"d", b"t", b"%"))


def unescape(text: str) -> str:
    """Resolve the escapes of the Header setting; unknown ones stay as they are."""
    return _ESCAPE.sub(lambda m: _ESCAPES[m[1]], text)


def unknown_symbols(template: bytes) -> list[bytes]:
    """Return the symbols in a header template that have no meaning."""
    return [s for s in _SYMBOL.findall(template) if s not in HEADER_SYMBOLS]


def expand_header(
    template: bytes, client: str, local: str, date: str, tls: str = ""
) -> bytes:
    """Return the header field for one message, its lines ended by CRLF.

    `client` and `local` are addresses, `date` is a date-time of RFC 5322 3.3, `tls` the
    protocol and the cipher.  Unknown symbols are removed, as in the C program; empty
    lines, too, since they would end the header section.
    """
    values = {b"i": client.encode(), b"l": local.encode(), b"d": date.encode()}
    values.update({b"t": tls.encode(), b"%": b"%"})
    field = _SYMBOL.sub(lambda m: values.get(m[1], b""), template)
    return b"".join(line + b"\r\n" for line in re.split(rb"[\r\n]+", field) if line)


def rfc5322_date(seconds: float) -> str:
    """Return a time in seconds since the epoch as local date-time (RFC 5322 3.3)."""
    # The process never calls setlocale, so the names are English.
    return time.strftime("%a, %d %b %Y %H:%M:%S %z", time.localtime(seconds))


# ---------------------------------------------------------------------------
# The PROXY header (HAProxy's proxy-protocol.txt, versions 1 and 2)
# ---------------------------------------------------------------------------


PROXY_1_LIMIT = 107  # octets with the CRLF, says the protocol
PROXY_2_LIMIT = 4096  # the protocol allows 64 KiB; no real sender uses 4 KiB


class ProxyHeader(NamedTuple):
    """The header before the first octet of SMTP: who connected, and where to."""

    length: int  # in octets
    client: Optional[Peer] = None  # None: the one that has connected to us
    local: Optional[Peer] = None
    tls: str = ""  # protocol and cipher of the client's connection to the sender
    is_check: bool = False  # the sender's own connection, which is no client's

    @classmethod
    def parse(cls, octets: bytes) -> Optional[ProxyHeader]:
        """Parse what a connection began with; None until more has come.

        Raises `BadProxyHeader` for what cannot become a header.
        """
        if octets.startswith(_PROXY_2_SIGNATURE):
            return _parse_proxy_2(octets)
        if octets.startswith(_PROXY_1_START):
            return _parse_proxy_1(octets)
        if any(s.startswith(octets) for s in (_PROXY_1_START, _PROXY_2_SIGNATURE)):
            return None
        raise BadProxyHeader("it begins otherwise")


_PROXY_1_START = b"PROXY "
_PROXY_1_LINE = re.compile(
    rb"PROXY (?:UNKNOWN(?: .*)?"
    rb"|TCP([46]) ([0-9A-Fa-f.:]+) ([0-9A-Fa-f.:]+)"
    rb" (0|[1-9][0-9]{0,4}) (0|[1-9][0-9]{0,4}))"
)
_PROXY_2_SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
_PROXY_2_FIXED = struct.Struct("!12sBBH")
_CRC32C_TYPE = 3
_TLS_TYPE, _TLS_VERSION_TYPE, _TLS_CIPHER_TYPE = 0x20, 0x21, 0x23
_TLS_START = 5  # octets of its field before others: flags, and how verification went
_TLS_USED = 1  # of the flags
_TLS_WORD = re.compile(rb"[!-~]{1,64}")
_PROXY_2_LOCAL, _PROXY_2_PROXY = 0x20, 0x21
# Of a stream's two families: the family, and an address's octets.
_PROXY_2_FAMILIES = {0x11: (socket.AF_INET, 4), 0x21: (socket.AF_INET6, 16)}


def _parse_proxy_1(octets: bytes) -> Optional[ProxyHeader]:
    line, end, _ = octets[:PROXY_1_LIMIT].partition(b"\r\n")
    if not end:
        if len(octets) >= PROXY_1_LIMIT:
            raise BadProxyHeader("a line without end")
        return None
    match = _PROXY_1_LINE.fullmatch(line)
    if match is None:
        raise BadProxyHeader(printable(line))
    length = len(line) + 2
    if match[1] is None:
        return ProxyHeader(length)
    family = socket.AF_INET if match[1] == b"4" else socket.AF_INET6
    try:
        hosts = [socket.inet_pton(family, match[n].decode("ascii")) for n in (2, 3)]
    except OSError:
        raise BadProxyHeader(printable(line)) from None
    client, local = (
        _numeric_peer(family, host, int(port))
        for host, port in zip(hosts, (match[4], match[5]))
    )
    return ProxyHeader(length, client, local)


def _parse_proxy_2(octets: bytes) -> Optional[ProxyHeader]:
    if len(octets) < _PROXY_2_FIXED.size:
        return None
    _, command, family_and_protocol, length = _PROXY_2_FIXED.unpack_from(octets)
    length += _PROXY_2_FIXED.size
    if command not in (_PROXY_2_LOCAL, _PROXY_2_PROXY):
        raise BadProxyHeader(f"version and command {command:#x}")
    is_known = family_and_protocol >> 4 <= 3 and family_and_protocol & 15 <= 2
    if command == _PROXY_2_PROXY and not is_known:
        raise BadProxyHeader(f"family and protocol {family_and_protocol:#x}")
    if length > PROXY_2_LIMIT:
        raise BadProxyHeader(f"{length} octets")
    if len(octets) < length:
        return None
    family, size = _PROXY_2_FAMILIES.get(family_and_protocol, (None, 0))
    start, rest = _PROXY_2_FIXED.size, length - _PROXY_2_FIXED.size
    if command == _PROXY_2_LOCAL:
        return ProxyHeader(length, is_check=True)
    if family is None:
        return ProxyHeader(length)
    if rest < 2 * size + 4:
        raise BadProxyHeader("no room for its addresses")
    hosts = octets[start : start + size], octets[start + size : start + 2 * size]
    ports = struct.unpack_from("!HH", octets, start + 2 * size)
    tls = _check_proxy_2(octets[:length], start + 2 * size + 4)
    client, local = map(_numeric_peer, (family, family), hosts, ports)
    return ProxyHeader(length, client, local, tls)


def _check_proxy_2(header: bytes, start: int) -> str:
    """Check the fields after the addresses, and the checksum; return the client's TLS.

    That is its protocol and cipher, as far as they are known.
    """
    words: dict[int, bytes] = {}
    for kind, begin, end in _proxy_2_fields(header, start):
        if kind == _CRC32C_TYPE:
            blank = header[:begin] + bytes(end - begin) + header[end:]
            if header[begin:end] != crc32c(blank).to_bytes(4, "big"):
                raise BadProxyHeader("wrong checksum")
        elif kind == _TLS_TYPE and begin < end and header[begin] & _TLS_USED:
            for inner, *place in _proxy_2_fields(header[:end], begin + _TLS_START):
                words[inner] = header[slice(*place)]
    known = [words.get(kind, b"") for kind in (_TLS_VERSION_TYPE, _TLS_CIPHER_TYPE)]
    return b" ".join(filter(_TLS_WORD.fullmatch, known)).decode("ascii")


def _proxy_2_fields(octets: bytes, start: int) -> Iterator[tuple[int, int, int]]:
    """Yield the fields' types, and where their values begin and end."""
    while start < len(octets):
        kind, size = struct.unpack("!BH", octets[start : start + 3].ljust(3, b"\xff"))
        end = start + 3 + size
        if end > len(octets):
            raise BadProxyHeader("a field without end")
        yield kind, start + 3, end
        start = end


def _numeric_peer(family: int, host: bytes, port: int) -> Peer:
    if port > 65535:
        raise BadProxyHeader(f"port {port}")
    return Peer.of((socket.inet_ntop(family, host), port))


def crc32c(octets: bytes) -> int:
    """Return the checksum of RFC 3720 appendix B.4; slow, but a header is short."""
    crc = 0xFFFFFFFF
    for octet in octets:
        crc ^= octet
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


# ---------------------------------------------------------------------------
# The mail transaction
# ---------------------------------------------------------------------------


class Envelope:
    """The envelope of one mail transaction, as the server has accepted it."""

    __slots__ = (
        "_size",
        "has_begun",
        "recipients",
        "remote",
        "remote_helo",
        "sender",
        "unlisted",
    )

    def __init__(self) -> None:
        self.sender: Optional[bytes] = None
        self.recipients: list[bytes] = []
        self.unlisted = 0  # recipients that did not fit; no filter needs them
        self.has_begun = False  # MAIL or RCPT came, even if it was refused
        self.remote: Optional[bytes] = None
        self.remote_helo: Optional[bytes] = None
        self._size = 0  # of the recipients, a line each

    @property
    def is_complete(self) -> bool:
        """Whether DATA may come (RFC 5321 4.1.1.4)."""
        return self.sender is not None and bool(self.recipients)

    def begin(self, sender: bytes) -> None:
        """Remember an accepted MAIL, which clears the recipients."""
        self.sender = sender
        self.recipients = []
        self.unlisted = 0
        self._size = 0

    def has_room_for(self, recipient: bytes) -> bool:
        """Whether RECIPIENTS with one more fits into an environment variable."""
        return self._size + len(recipient) <= RECIPIENTS_LIMIT

    def add_recipient(self, recipient: bytes) -> None:
        """Remember an accepted RCPT, or only count it when there are very many."""
        if self.has_room_for(recipient):
            self.recipients.append(recipient)
            self._size += len(recipient) + 1
        else:
            self.unlisted += 1

    def add_xforward(self, attributes: Mapping[bytes, Optional[bytes]]) -> None:
        """Remember ADDR and HELO of an XFORWARD command for the filter."""
        if b"ADDR" in attributes:
            address = attributes[b"ADDR"]
            self.remote = address and strip_ipv6_tag(address)
        if b"HELO" in attributes:
            self.remote_helo = attributes[b"HELO"]

    def filter_variables(
        self, client: Peer, server: Peer, tls: str
    ) -> dict[bytes, Optional[bytes]]:
        """Return the variables that tell the filter about the message."""
        return {
            b"CLIENT": client.host.encode(),
            b"SERVER": server.host.encode(),
            b"SENDER": self.sender,
            b"RECIPIENTS": b"\n".join(self.recipients),
            b"REMOTE": self.remote,
            b"REMOTE_HELO": self.remote_helo,
            b"TLS": tls.encode(),
        }

    def describe(self, client: str, status: str) -> Iterator[str]:
        """Return the log lines of a message: one, or more for many recipients.

        Long lists are split, so that syslogd does not truncate a line.  Each line has
        the client and the status, the first one also the sender.
        """
        end = f", status={status}"
        line = f"client={client}"
        if self.sender is not None:
            line += f", from={loggable_address(self.sender)}"
        for recipient in self.recipients:
            field = f", to={loggable_address(recipient)}"
            if len(line) + len(field) + len(end) > LOG_LINE_LIMIT:
                yield line + end
                line = f"client={client}"
            line += field
        if self.unlisted:
            line += f", to=({self.unlisted} more)"
        yield line + end


ADDRESS_SHOWN = 256  # characters of an address in the log line of a message


_NOT_LOGGABLE = re.compile(rb"[^!-~]|[,\\]")


def loggable_address(address: bytes) -> str:
    """Return an address as one word for the log line of a message."""
    octets = _NOT_LOGGABLE.sub(lambda m: b"\\x%02x" % m[0][0], address)
    text = octets[:ADDRESS_SHOWN].decode("ascii")
    return re.sub(r"\\x?[0-9a-f]?$", "", text) if len(octets) > len(text) else text


# ---------------------------------------------------------------------------
# The filter's contract
# ---------------------------------------------------------------------------

FILTER_VARIABLES = (
    b"CLIENT",
    b"SERVER",
    b"SENDER",
    b"RECIPIENTS",
    b"REMOTE",
    b"REMOTE_HELO",
    b"TLS",
    b"TMPDIR",
    b"EMAIL",
)


class Status:
    """What the log says of a message, if not the reply that refused it.

    OBSERVED is followed by what FilterMode: observe kept from happening.
    """

    FILTERED = "FILTERED"
    SKIPPED = "SKIPPED"
    PASSED = "PASSED"
    REJECTED = "REJECTED"
    FILTER_ERROR = "FILTER-ERROR"
    ERROR_PASSED = "FILTER-ERROR, passed"
    OBSERVED = "OBSERVED"


def filter_environment(
    inherited: Mapping[bytes, bytes], values: Mapping[bytes, Optional[bytes]]
) -> dict[bytes, bytes]:
    """Return the filter's environment; a variable without a value is unset."""
    environment = dict(inherited)
    for name in FILTER_VARIABLES:
        environment.pop(name, None)
    environment.update((name, value) for name, value in values.items() if value)
    return environment


# Words that mean nothing but themselves to the shell.
_PLAIN_WORDS = re.compile(r"[A-Za-z0-9_./+:@%,-]+(?:[ \t]+[A-Za-z0-9_./+:@%,=-]+)*")
# Keywords and builtins of shells.
_SHELL_WORDS = frozenset(
    b". : alias bg bind break builtin caller case cd chdir command compgen complete"
    b" compopt continue coproc declare dirs disown do done echo elif else enable esac"
    b" eval exec exit export false fc fg fi for function getopts hash help history if"
    b" in jobs kill let local logout mapfile newgrp popd printf print pushd pwd read"
    b" readarray readonly return select set shift shopt source suspend test then time"
    b" times trap true type typeset ulimit umask unalias unset until wait"
    b" while".split()
)


def plain_words(command: str) -> Optional[list[bytes]]:
    """Return the words of a command that needs no shell.

    None stands for one that does: it has syntax, a keyword or a builtin.
    """
    if not _PLAIN_WORDS.fullmatch(command.strip(" \t")):
        return None
    words = command.encode("ascii").split()
    return None if words[0] in _SHELL_WORDS else words


LINE_KEPT = 1024  # octets of a line of the filter's standard error


class LastLine:
    """Keeps the last line of a stream that is not blank, in bounded memory."""

    def __init__(self) -> None:
        self._whole = b""
        self._begun = b""

    def feed(self, octets: bytes) -> None:
        whole, newline, self._begun = (self._begun + octets).rpartition(b"\n")
        if newline:
            # Blank lines do not count.
            line = whole.rstrip().rpartition(b"\n")[2].lstrip()
            self._whole = line[:LINE_KEPT] or self._whole
        self._begun = self._begun.lstrip()[:LINE_KEPT]

    @property
    def text(self) -> bytes:
        """The line without blanks around it, or empty if there was none."""
        return self._begun.strip() or self._whole.strip()


EXCERPT_KEPT = 8 * 1024  # octets of its start, and as many of its end


class Excerpt:
    """Keeps the first and the last octets of a stream, in bounded memory."""

    def __init__(self) -> None:
        self._first = self._last = b""
        self._left_out = 0  # octets between them

    def feed(self, octets: bytes) -> None:
        room = EXCERPT_KEPT - len(self._first)
        self._first += octets[:room]
        last = self._last + octets[room:]
        self._last = last[-EXCERPT_KEPT:]
        self._left_out += len(last) - len(self._last)

    @property
    def lines(self) -> list[bytes]:
        """The lines, with a note in the place of what was left out."""
        if not self._left_out:
            return (self._first + self._last).splitlines()
        note = b"... %d octets left out" % self._left_out
        return [*self._first.splitlines(), note, *self._last.splitlines()]


_UNPRINTABLE_TO_MARK = bytes.maketrans(
    bytes((*range(32), *range(127, 256))), b"?" * 161
)
# 128 and a signal: the last command of a shell was killed.
_SHELL_SAW_SIGNAL = range(129, 128 + 65)
# The shell could not run the command, or not find it.
_SHELL_FOUND_NOTHING = (126, 127)
# sysexits(3): EX_UNAVAILABLE to EX_TEMPFAIL, and EX_CONFIG.
_CANNOT_WORK = (*range(69, 76), 78)
# Errors of dash, bash and ash themselves: exit status 2, or 254 if bash cannot fork.
# They begin with the name of the shell, or of the script that it runs.
_SHELL_GAVE_UP = (2, 254)
_SCRIPT_WORDS = re.compile(
    rb"[^\s:]+: (?:line )?(?:[0-9]+: )?"
    rb"(?:[Ss]yntax error|unexpected EOF|[Cc]an(?:not|'t) fork|fork: |`)"
)


def is_shell_failure(exit_status: int, last_line: bytes) -> bool:
    """Return whether a shell failed, and not the filter."""
    return (
        exit_status in _SHELL_FOUND_NOTHING
        or last_line.startswith(b"sh: ")
        or (exit_status in _SHELL_GAVE_UP and bool(_SCRIPT_WORDS.match(last_line)))
    )


def judge(
    exit_status: int, last_line: bytes, *, only_coded: bool = False
) -> Optional[Reply]:
    """Return the verdict of a filter: the reply that ends the message here, or None.

    A 2xx reply drops the message; with None it goes on.
    `exit_status` is negative for the signal that killed it.  Octets of the last line
    that are not printable ASCII become question marks.  Raises `FilterFailure` if the
    exit is no verdict; with `only_coded` that is any exit but 0 without a code.
    """
    if exit_status == 0:
        return None
    why = f": {printable(last_line)}" if last_line else ""
    if exit_status < 0:
        raise FilterFailure(f"filter command terminated abnormally{why}")
    if coded_reply(last_line) is None:
        if is_shell_failure(exit_status, last_line):
            raise FilterFailure(f"filter command could not be run{why}")
        if exit_status in _SHELL_SAW_SIGNAL:
            raise FilterFailure(f"filter command terminated abnormally{why}")
        if only_coded or exit_status in _CANNOT_WORK:
            raise FilterFailure(f"filter command failed with {exit_status}{why}")
    return rejection(last_line.translate(_UNPRINTABLE_TO_MARK))


# ---------------------------------------------------------------------------
# Configuration
# ---------------------------------------------------------------------------


class FilterType(Enum):
    PIPE = "pipe"
    FILE = "file"
    REJECT = "reject"


class Transparency(Enum):
    """How the original destination of a client's connection is found."""

    OFF = "off"  # not at all
    CLIENT = "client"  # NAT has redirected the connection, and knows the destination
    FULL = "full"  # the connection's local address is the destination


class TlsMode(Enum):
    """When the connection to one side is encrypted."""

    OFF = "off"
    MAY = "may"  # by STARTTLS, if the other side takes part
    REQUIRE = "require"  # by STARTTLS, else no mail passes; any certificate will do
    VERIFY = "verify"  # as REQUIRE, but the server's certificate is verified
    IMPLICIT = "implicit"  # from the first octet; a server's certificate is verified


# The modes in which the server's certificate is verified.
_VERIFYING = (TlsMode.VERIFY, TlsMode.IMPLICIT)
_BY_STARTTLS = (TlsMode.MAY, TlsMode.REQUIRE, TlsMode.VERIFY)


class Config:
    """The settings, as `SETTINGS` reads them from the file.

    A setting without a default has its empty value here.
    """

    filter_command: str = ""
    filter_reject: Reply
    filter_timeout: int
    filter_type: FilterType
    observes: bool  # FilterMode
    only_coded_verdicts: bool  # FilterVerdict
    passes_failures: bool  # FilterFailure
    header: bytes = b""
    keep_alives: int
    listen: Address
    listen_certificate: bytes = b""
    listen_key: bytes = b""  # empty: it is in `listen_certificate`
    listen_tls: TlsMode
    max_connections: int
    max_message_size: int  # 0: any
    out_address: Optional[Address] = None
    out_tls: TlsMode
    out_tls_name: str = ""
    out_tls_trust: bytes = b""
    pid_file: str = ""
    processes: int  # 0: auto
    proxy_protocol: bool
    skip_authenticated: bool = False
    temp_directory: bytes
    timeout: int
    transparent_proxy: Transparency
    user: str = ""
    xclient: bool
    # Made of the settings by `client_context` and `server_context`; None: TLS is off.
    client_tls: Optional[ssl.SSLContext] = None
    server_tls: Optional[ssl.SSLContext] = None

    @property
    def server_name(self) -> str:
        """The name or IP address that the server's certificate must have, or ""."""
        host = self.out_address.host if self.out_address is not None else ""
        if self.is_transparent or host in _ANY_HOSTS:
            host = ""
        # Neither a dot at the end nor a scope is ever in a certificate.
        return (self.out_tls_name or host).partition("%")[0].rstrip(".")

    @property
    def is_transparent(self) -> bool:
        return self.transparent_proxy is not Transparency.OFF

    @property
    def has_filter(self) -> bool:
        """Whether there is a filter, or FilterReject."""
        return bool(self.filter_command) or self.filter_type is FilterType.REJECT

    @property
    def keeps_original(self) -> bool:
        """Whether a message may go on unchanged although there is a filter."""
        return self.observes or self.passes_failures


class Kind(NamedTuple):
    """What a setting takes, and the error for anything else.

    `parse` raises ValueError for a text that it does not take.  `complaint` is a
    format of the setting's name and text.
    """

    parse: Callable[[str], Any]
    complaint: str = "invalid setting: {name}"


class Setting(NamedTuple):
    """One row of the configuration."""

    name: str  # in the file
    attribute: str  # of `Config`
    default: str  # as it would stand in the file; empty: none
    kind: Kind
    needs_restart: bool = False  # SIGHUP does not change it


_WHOLE_NUMBER = re.compile(r"\+?[0-9]+")


def _number(
    what: str, minimum: int, maximum: float = math.inf, clamp: float = math.inf
) -> Kind:
    """Take a whole number of `what`; one above `clamp` counts as that."""

    def parse(text: str) -> int:
        if not _WHOLE_NUMBER.fullmatch(text):
            raise ValueError(text)
        if not minimum <= int(text) <= maximum:
            raise ValueError(text)
        return int(min(int(text), clamp))

    takes = f"a whole number of {what}, {minimum} or more"
    if maximum < math.inf:
        takes = f"between {minimum} and {maximum}"
    return Kind(parse, f"invalid setting: {{name}} (must be {takes})")


def _seconds(minimum: int) -> Kind:
    # No time is longer than poll can wait: its milliseconds are an int of C.
    return _number("seconds", minimum, clamp=MAX_SECONDS)


def _choice(
    values: Mapping[str, Any], others: Optional[Mapping[str, Any]] = None
) -> Kind:
    """Take one of some words, in any case; the complaint does not name the `others`."""
    known = {**values, **(others or {})}

    def parse(text: str) -> Any:
        if text.lower() not in known:
            raise ValueError(text)
        return known[text.lower()]

    words = " or ".join(f"'{word}'" for word in values)
    return Kind(parse, f"invalid value for {{name}} (must specify {words})")


_ON = ("1", "yes", "true", "t", "on")
_OFF = ("0", "no", "false", "f", "off")
_SWITCH = _choice(
    {"on": True, "off": False},
    {**dict.fromkeys(_ON, True), **dict.fromkeys(_OFF, False)},
)


def _processes(text: str) -> int:
    return int(_number("processes", 1, MAX_PROCESSES).parse(text))


def _reject_reply(text: str) -> Reply:
    reply = rejection(to_octets(text or EMAIL_REJECTED))
    if reply.is_success:
        raise ValueError(text)  # the client would take the mail for accepted
    return reply


def _nonempty(text: str) -> str:
    if not text:
        raise ValueError(text)
    return text


def _address(default_port: int) -> Kind:
    return Kind(
        lambda text: Address.parse(text, default_port),
        "invalid {name} socket name or ip: {text}",
    )


def _file_name(text: str) -> bytes:
    """Return a path, perhaps a relative one, for `load_config` to make absolute."""
    return os.path.normpath(to_octets(_nonempty(text)))


def _host(text: str) -> str:
    if not is_host(text):
        raise ValueError(text)
    return text


_ANY_TEXT = Kind(str)
_FILE = Kind(_file_name, "invalid setting: {name} (must be a file)")

SETTINGS = (
    Setting("FilterCommand", "filter_command", "", _ANY_TEXT),
    Setting(
        "FilterFailure",
        "passes_failures",
        "defer",
        _choice({"defer": False, "pass": True}),
    ),
    Setting(
        "FilterMode",
        "observes",
        "enforce",
        _choice({"enforce": False, "observe": True}),
    ),
    Setting(
        "FilterReject",
        "filter_reject",
        EMAIL_REJECTED,
        Kind(_reject_reply, "invalid setting: {name} (must be a 4xx or 5xx reply)"),
    ),
    Setting("FilterTimeout", "filter_timeout", "30", _seconds(1)),
    Setting(
        "FilterType",
        "filter_type",
        "pipe",
        _choice({kind.value: kind for kind in FilterType}),
    ),
    Setting(
        "FilterVerdict",
        "only_coded_verdicts",
        "any",
        _choice({"any": False, "coded": True}),
    ),
    Setting("Header", "header", "", Kind(lambda text: to_octets(unescape(text)))),
    Setting("KeepAlives", "keep_alives", "0", _seconds(0)),
    Setting(
        "Listen",
        "listen",
        str(DEFAULT_LISTEN_PORT),
        _address(DEFAULT_LISTEN_PORT),
        needs_restart=True,
    ),
    Setting("ListenCertificate", "listen_certificate", "", _FILE),
    Setting("ListenKey", "listen_key", "", _FILE),
    Setting(
        "ListenTls",
        "listen_tls",
        "off",
        _choice({m.value: m for m in TlsMode if m is not TlsMode.VERIFY}),
    ),
    Setting(
        "MaxConnections",
        "max_connections",
        "64",
        _number("connections", 1, MAX_CONNECTIONS),
    ),
    Setting("MaxMessageSize", "max_message_size", "0", _number("octets", 0)),
    Setting("OutAddress", "out_address", "", _address(DEFAULT_SERVER_PORT)),
    Setting(
        "OutTls", "out_tls", "off", _choice({mode.value: mode for mode in TlsMode})
    ),
    Setting(
        "OutTlsName",
        "out_tls_name",
        "",
        Kind(_host, "invalid setting: {name} (must be a host's name or address)"),
    ),
    Setting("OutTlsTrust", "out_tls_trust", "", _FILE),
    Setting("PidFile", "pid_file", "", _ANY_TEXT, needs_restart=True),
    Setting(
        "Processes",
        "processes",
        "auto",
        Kind(
            lambda text: 0 if text.lower() == "auto" else _processes(text),
            "invalid setting: {name} (must be 'auto' or a number from 1 to"
            f" {MAX_PROCESSES})",
        ),
    ),
    Setting("ProxyProtocol", "proxy_protocol", "off", _SWITCH),
    Setting("Skip", "skip_authenticated", "", _choice({"authenticated": True})),
    Setting(
        "TempDirectory",
        "temp_directory",
        "/tmp",
        Kind(_file_name, "invalid setting: {name} (must be a directory)"),
    ),
    Setting("TimeOut", "timeout", "180", _seconds(1)),
    Setting(
        "TransparentProxy",
        "transparent_proxy",
        "off",
        _choice(
            {word.value: word for word in Transparency},
            {
                **dict.fromkeys(_ON, Transparency.CLIENT),
                **dict.fromkeys(_OFF, Transparency.OFF),
            },
        ),
        needs_restart=True,
    ),
    Setting(
        "User",
        "user",
        "",
        Kind(_nonempty, "invalid setting: {name} (must be a user's name or number)"),
        needs_restart=True,
    ),
    Setting("XClient", "xclient", "off", _SWITCH),
)
_WHITE = " \t\r\v\f"
_SETTINGS_BY_NAME = {setting.name.lower(): setting for setting in SETTINGS}


def default_config() -> Config:
    """Return the settings of an empty file."""
    config = Config()
    for setting in SETTINGS:
        if setting.default:
            value = setting.kind.parse(setting.default)
            setattr(config, setting.attribute, value)
    return config


def parse_config(
    octets: bytes, path: str, adapt: Optional[Callable[[Config], None]] = None
) -> tuple[Config, list[ConfigError]]:
    """Parse a configuration file's octets; `path` is for the error texts.

    `adapt` may change the settings before they are checked against each other.
    Returns the settings and every fault that was found.
    """
    config = default_config()
    errors = []
    mentioned = set()
    lines = (line.strip(_WHITE) for line in to_text(octets).split("\n"))
    for number, line in enumerate(lines, 1):
        if line and not line.startswith("#"):
            try:
                setting, text = split_line(line)
                mentioned.add(setting.name)
                setattr(config, setting.attribute, parse_value(setting, text))
            except ValueError as error:
                errors.append(ConfigError(str(error), path, number))
    if adapt is not None:
        adapt(config)
    if "OutAddress" not in mentioned and not config.is_transparent:
        errors.append(ConfigError("no OutAddress specified.", path))
    errors += [ConfigError(text, path) for text in contradictions_in(config)]
    return config, errors


def contradictions_in(config: Config) -> list[str]:
    """Return what is wrong with settings that are right one by one."""
    found = []
    if config.is_transparent and not IS_LINUX:
        found.append("invalid value for TransparentProxy (only Linux has it)")
    for name, address in (
        ("Listen", config.listen),
        ("OutAddress", config.out_address),
    ):
        length = len(to_octets(address.path)) if address else 0
        if length > MOST_SOCKET_PATH:
            text = f"the socket path of {name} has {length} octets"
            found.append(f"{text} (at most {MOST_SOCKET_PATH})")
    if config.proxy_protocol and config.is_transparent:
        found.append("ProxyProtocol cannot be used with TransparentProxy")
    if config.listen_tls is not TlsMode.OFF and not config.listen_certificate:
        found.append("ListenTls needs ListenCertificate")
    if config.out_tls in _VERIFYING and config.is_transparent:
        # Only an address is known there.
        mode = config.out_tls.value
        found.append(f"OutTls: {mode} cannot be used with TransparentProxy")
    elif config.out_tls in _VERIFYING and not config.server_name:
        found.append("OutTls needs OutTlsName here")
    return found


def split_line(line: str) -> tuple[Setting, str]:
    """Return the setting that a line names, and its text for it.

    Raises ValueError with the complaint if the line names none.
    """
    name, colon, text = (part.strip(_WHITE) for part in line.partition(":"))
    setting = _SETTINGS_BY_NAME.get(name.lower())
    if setting is None or not colon or "\0" in text:
        raise ValueError(f"invalid config line: {name if colon else line}{hint(line)}")
    return setting, text


def hint(line: str) -> str:
    """Return what a line that names no setting probably means, if anything."""
    import difflib  # only an error needs it

    if "\0" in line:
        return " (it has a NUL)"
    name = re.split(r"[\s=:]", line, maxsplit=1)[0]
    near = difflib.get_close_matches(name.lower(), _SETTINGS_BY_NAME, 1, cutoff=0.75)
    if not near:
        return ""
    meant = _SETTINGS_BY_NAME[near[0]].name
    is_exact = meant.lower() == name.lower()
    return (
        f" (a colon must follow {meant})" if is_exact else f" (did you mean {meant}?)"
    )


def parse_value(setting: Setting, text: str) -> Any:
    """Return a setting's value; raises ValueError with the complaint."""
    try:
        return setting.kind.parse(text)
    except ValueError:
        complaint = setting.kind.complaint.format(name=setting.name, text=text)
        raise ValueError(complaint) from None


# ---------------------------------------------------------------------------
# The log
# ---------------------------------------------------------------------------

_PRIORITIES = (
    syslog.LOG_ERR,
    syslog.LOG_WARNING,
    syslog.LOG_NOTICE,
    syslog.LOG_INFO,
    syslog.LOG_DEBUG,
)


LOG_PATIENCE = 2.0  # seconds to wait for a reader of standard error that has stopped


class StandardError:
    """Writes log lines to standard error, each in one system call to stay whole.

    A reader that stops reading must hold up neither mail nor a signal: after
    `LOG_PATIENCE` seconds lines are dropped until it reads again, and then counted.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._poller = select.poll()
        self._poller.register(2, select.POLLOUT)
        self._dropped = 0  # lines since the reader stopped

    def __call__(self, _level: int, text: str) -> None:
        # If nobody reads standard error any more, there is nowhere to report it.
        with self._lock, contextlib.suppress(OSError):
            lost = f"{self._dropped} log lines lost: standard error was not read"
            if self._dropped and self._write(lost, 0):
                self._dropped = 0
            if not self._write(text, 0 if self._dropped else LOG_PATIENCE):
                self._dropped += 1

    def _write(self, text: str, seconds: float) -> bool:
        # Where poll finds room in a pipe, PIPE_BUF octets fit in, unless another worker
        # is faster.
        try:
            if not self._poller.poll(seconds * 1000):
                return False
            write_at_once(2, f"{NAME}: {text}\n".encode("ascii", "backslashreplace"))
        except BlockingIOError:
            return False
        return True


def write_at_once(descriptor: int, octets: bytes) -> None:
    """Write octets; on Linux BlockingIOError if a pipe or socket has no room."""
    if _NOWAIT and not stat.S_ISREG(os.fstat(descriptor).st_mode):
        try:
            # Not O_NONBLOCK, which would hold for all who have this open.
            os.pwritev(descriptor, [octets], -1, _NOWAIT)
            return
        except NotImplementedError:  # by this C library
            pass
        except OSError as error:
            if error.errno not in _HAVE_NO_NOWAIT:
                raise
    os.write(descriptor, octets)


_NOWAIT = getattr(os, "RWF_NOWAIT", 0)
# How a kernel, or a kind of file, says that it does not know the flag.
_HAVE_NO_NOWAIT = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ESPIPE)


to_standard_error = StandardError()


def to_syslog(level: int, text: str) -> None:
    syslog.syslog(_PRIORITIES[level], text)


class Log:
    """Log lines up to a level, each with a prefix, to one or more places."""

    def __init__(
        self,
        level: int,
        *places: Callable[[int, str], None],
        prefix: str = "",
    ) -> None:
        self.level = level
        self.places = places
        self.prefix = prefix
        self.is_info = level >= INFO
        self.is_debug = level >= DEBUG

    def with_prefix(self, prefix: str) -> Log:
        return Log(self.level, *self.places, prefix=prefix)

    def of_session(self, number: int) -> Log:
        return self.with_prefix(f"{number:06X}: ")

    def write(self, level: int, text: str) -> None:
        """Log a text; a very long one takes several lines, marked with dots."""
        if level > self.level:
            return
        for place in self.places:
            place(level, self.prefix + text[:LOG_LINE_LIMIT])
            for start in range(LOG_LINE_LIMIT, len(text), LOG_LINE_LIMIT):
                part = text[start : start + LOG_LINE_LIMIT]
                place(level, f"{self.prefix}... {part}")

    def error(self, text: str) -> None:
        self.write(ERROR, text)

    def warning(self, text: str) -> None:
        self.write(WARNING, text)

    def notice(self, text: str) -> None:
        self.write(NOTICE, text)

    def info(self, text: str) -> None:
        self.write(INFO, text)

    def debug(self, text: str) -> None:
        self.write(DEBUG, text)

    def dialogue(self, side: str, mark: str, lines: bytes) -> None:
        """Log what was sent to (``>``) or received from (``<``) a side, at level 4."""
        if self.is_debug:
            for line in lines.removesuffix(b"\r\n").split(b"\r\n"):
                self.debug(f"{side} {mark} {printable(line)}")


def reason(error: OSError) -> str:
    """Return the system's text for an error, without Python's additions."""
    return error.strerror or str(error)


# ---------------------------------------------------------------------------
# TLS (RFC 8446)
# ---------------------------------------------------------------------------

# OpenSSL's X509_V_FLAG_PARTIAL_CHAIN, which Python has from 3.10 on, and
# X509_V_FLAG_NO_CHECK_TIME.
_PARTIAL_CHAIN = 0x80000
_NO_CHECK_TIME = 0x200000


def tls_context(*, is_server: bool) -> ssl.SSLContext:
    """Return a context for TLS 1.2 or later; `TlsFailure` if Python has no TLS.

    Which ciphers are used is for the system's policy to say.
    """
    try:
        import ssl
    except ImportError as error:
        raise TlsFailure("this Python has no TLS") from error
    context = ssl.SSLContext(
        ssl.PROTOCOL_TLS_SERVER if is_server else ssl.PROTOCOL_TLS_CLIENT
    )
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    return context


def client_context(config: Config) -> Optional[ssl.SSLContext]:
    """Return the context for the clients' side, None if ListenTls is off.

    Raises `TlsFailure` if the certificate or the key cannot be used.
    """
    if config.listen_tls is TlsMode.OFF:
        return None
    context = tls_context(is_server=True)
    import ssl

    certificate = config.listen_certificate
    key = config.listen_key or certificate
    read_certificates(certificate)  # since OpenSSL does not say which of them is wrong
    try:
        with open(key, "rb"):
            pass
        # Without a function for the passphrase, it would be asked for at the terminal.
        context.load_cert_chain(certificate, key, password=lambda: b"")
    except ssl.SSLError as error:
        where = printable(key)
        words = tls_reason(error)
        if "mismatch" in words:
            text = f"certificate and key do not belong together: {where}"
        elif words.endswith(("too small", "too weak")):  # for the system's policy
            text = f"couldn't use certificate: {printable(certificate)}: {words}"
        else:
            text = f"no key in PEM form, or one with a passphrase: {where}"
        raise TlsFailure(text) from error
    except OSError as error:
        what = f"{printable(key)}: {reason(error)}"
        raise TlsFailure(f"couldn't read key: {what}") from error
    return context


def server_context(config: Config) -> Optional[ssl.SSLContext]:
    """Return the context for the server's side, None if OutTls is off.

    Raises `TlsFailure` if OutTlsTrust cannot be used.
    """
    if config.out_tls is TlsMode.OFF:
        return None
    context = tls_context(is_server=False)
    import ssl

    if config.out_tls not in _VERIFYING:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    elif config.out_tls_trust:
        # A certificate in the file need not be an authority's.
        context.verify_flags |= _PARTIAL_CHAIN
        context.load_verify_locations(cadata=read_certificates(config.out_tls_trust))
    else:
        context.set_default_verify_paths()
    return context


def read_certificates(path: bytes) -> str:
    """Return the text of a file that has certificates; `TlsFailure` if it has none."""
    import ssl

    try:
        with open(path, "rb") as file:
            text = file.read().decode("ascii", "ignore")
    except OSError as error:
        what = f"{printable(path)}: {reason(error)}"
        raise TlsFailure(f"couldn't read certificate: {what}") from error
    try:
        tls_context(is_server=False).load_verify_locations(cadata=text)
    except (ssl.SSLError, ValueError) as error:
        raise TlsFailure(f"no certificate in PEM form: {printable(path)}") from error
    return text


def expiry_of(context: ssl.SSLContext, path: bytes) -> float:
    """Return when the certificate of the clients' context expires, as `time.time` does.

    `path` is its file.  Python shows the certificates of peers alone, so the context
    shakes hands with one that trusts it.  Raises `TlsFailure`, ssl.SSLError, or
    ValueError if the handshake takes more steps.
    """
    import ssl

    trusting = tls_context(is_server=False)
    trusting.check_hostname = False
    trusting.verify_flags |= _PARTIAL_CHAIN | _NO_CHECK_TIME
    trusting.load_verify_locations(cadata=read_certificates(path))
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = context.wrap_bio(to_server, to_client, server_side=True)
    client = trusting.wrap_bio(to_client, to_server)
    for side in (client, server, client, server, client):  # TLS 1.2 takes five steps
        with contextlib.suppress(ssl.SSLWantReadError):
            side.do_handshake()
    certificate = client.getpeercert()
    assert certificate is not None  # since it is verified
    return ssl.cert_time_to_seconds(str(certificate["notAfter"]))


def tls_reason(error: OSError) -> str:
    """Return the reason for an error of OpenSSL's or the system's, for the log."""
    if error.errno in _AGAIN:
        return "timed out"
    # OpenSSL's numbers are not the system's, and its text names lines of C.
    verdict = getattr(error, "verify_message", "")
    words = (getattr(error, "reason", None) or "").replace("_", " ").lower()
    return shown(verdict or words or reason(error))


# Octets for one call of OpenSSL.  OpenSSL's buffers never shrink, so that larger blocks
# would cost each session memory, and larger blocks are not faster (measured).
TLS_BLOCK = 32 * 1024


class TlsSocket(socket.socket):
    """A connected socket that encrypts what it sends, for a `Channel`.

    It takes the descriptor of a plain socket, which is detached.  OpenSSL reads and
    writes memory only, so that time limits and `MSG_PEEK` work as without TLS: OpenSSL
    itself would wait for the socket without a limit.
    """

    def __init__(
        self,
        sock: socket.socket,
        context: ssl.SSLContext,
        *,
        name: bytes = b"",
        is_server: bool = False,
        received: bytes = b"",
    ) -> None:
        """`name` is the peer's, as a client; `received` has come from it already."""
        import ssl

        # First: if the rest fails, nobody can send anything in clear.
        super().__init__(sock.family, sock.type, sock.proto, sock.detach())
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(
            self._incoming,
            self._outgoing,
            server_side=is_server,
            server_hostname=name or None,
        )
        self._incoming.write(received)
        self._ahead = b""  # decrypted, but not taken yet
        self._is_at_end = False
        self._failure: Optional[OSError] = None  # of the record after `_ahead`
        self._unsent = b""  # encrypted, from `_taken` octets of a `send` that blocked
        self._taken = 0

    def shake_hands(self) -> bool:
        """Do what can be done of the handshake; return whether it is complete.

        Raises `TlsFailure`.
        """
        import ssl

        try:
            with contextlib.suppress(BlockingIOError):
                self._receive(socket.MSG_DONTWAIT)
            try:
                self._tls.do_handshake()
            finally:
                self._send_pending()  # also the alert that tells why it has failed
            self._decrypt()
            if self._failure:
                raise self._failure
        except ssl.SSLWantReadError:
            if self._is_at_end:
                raise TlsFailure("connection closed by peer") from None
            return False
        except OSError as error:
            raise TlsFailure(tls_reason(error)) from error
        return True

    def describe(self) -> str:
        """Return the protocol and the cipher."""
        cipher = self._tls.cipher()
        assert cipher is not None  # after the handshake
        return f"{self._tls.version()} {cipher[0]}"

    def recv(self, bufsize: int, flags: int = 0, /) -> bytes:
        """Return octets as a plain socket does, but maybe more than `bufsize`.

        Only `MSG_PEEK` leaves decrypted octets behind, since `poll` cannot see them.
        Raises `BlockingIOError` if no octets could be decrypted yet, even where the
        socket could be read: a record may be incomplete or empty.
        """
        is_peek = flags & socket.MSG_PEEK
        while not (self._is_at_end or self._failure) and len(self._ahead) < (
            bufsize if is_peek else 1
        ):
            try:
                self._receive(flags & socket.MSG_DONTWAIT)
                self._decrypt()
            except BlockingIOError:
                break
            if not is_peek:
                break
        octets = self._ahead
        if not octets and self._failure:
            raise self._failure
        if not octets and not self._is_at_end:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        if is_peek:
            return octets[:bufsize]
        self._ahead = b""
        return octets

    def _receive(self, flags: int) -> None:
        octets = super().recv(TLS_BLOCK, flags)
        if octets:
            self._incoming.write(octets)
        else:
            self._is_at_end = True  # even if the peer has not announced it

    def _decrypt(self) -> None:
        """Decrypt whatever whole records have come, up to one that is wrong."""
        import ssl

        octets = [self._ahead]
        try:
            while octets[-1] or len(octets) == 1:
                octets.append(self._tls.read(TLS_BLOCK))
            self._is_at_end = True
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLZeroReturnError:
            self._is_at_end = True
        except ssl.SSLError as error:
            self._failure = OSError(errno.EPROTO, tls_reason(error))
        self._ahead = b"".join(octets)
        # An answer of the protocol's own, if there is any.  What does not go now goes
        # before what is sent next.
        with contextlib.suppress(OSError):
            self._send_pending(socket.MSG_DONTWAIT)

    def send(self, data: Any, flags: int = 0, /) -> int:
        """Send the first octets and return how many, as a plain socket does.

        After `BlockingIOError` it has to be called again with the same octets.  Raises
        OSError before the handshake is complete.
        """
        import ssl

        if self._failure:
            raise self._failure  # OpenSSL would say nothing but that it is over
        if not self._taken:
            rest = memoryview(data)
            while rest and self._outgoing.pending < TLS_BLOCK:
                try:
                    rest = rest[self._tls.write(rest) :]  # a record at a time
                except ssl.SSLError as error:
                    raise OSError(errno.EPROTO, tls_reason(error)) from error
            self._taken = len(data) - len(rest)
        self._send_pending(flags)
        taken, self._taken = self._taken, 0
        return taken

    def sendall(self, data: Any, flags: int = 0, /) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[self.send(rest, flags) :]

    def _send_pending(self, flags: int = 0) -> None:
        """Send what OpenSSL has written; what is left by an OSError is kept."""
        rest = memoryview(self._unsent + self._outgoing.read())
        try:
            while rest:
                rest = rest[super().send(rest, flags) :]
        finally:
            self._unsent = bytes(rest)

    def _announce_end(self) -> None:
        """Send the alert close_notify (RFC 8446 6.1), if that does not block.

        After a failure, sends the alert with the reason that OpenSSL has written.
        """
        with contextlib.suppress(OSError):
            self._tls.unwrap()  # raises, since the peer's close_notify is not here
        with contextlib.suppress(OSError):
            self._send_pending(socket.MSG_DONTWAIT)

    def shutdown(self, how: int, /) -> None:
        self._announce_end()
        super().shutdown(how)

    def close(self) -> None:
        self._announce_end()
        super().close()


# ---------------------------------------------------------------------------
# Channels: the connections to both sides
# ---------------------------------------------------------------------------

_AGAIN = (errno.EAGAIN, errno.EWOULDBLOCK)
_PEEK = int(socket.MSG_PEEK | socket.MSG_DONTWAIT)
# The peer has closed its sending side; Linux and FreeBSD report that even before
# its last octets were read.
_HUNG_UP = select.POLLHUP | getattr(select, "POLLRDHUP", 0)
# The connection is broken; only on Linux does POLLHUP mean both directions.
_RESET = select.POLLERR | (select.POLLHUP if IS_LINUX else 0)


# struct timeval by its size; on 32 bits a time has 32 or, since 2038 is near, 64.
_TIMEVALS = {
    8: struct.Struct("=ii"),
    12: struct.Struct("=qi"),
    16: struct.Struct("=qq"),
}


@functools.cache
def timeval_form() -> struct.Struct:
    """Return the form of this system's struct timeval, which Python does not have."""
    with socket.socket(socket.AF_UNIX) as probe:
        value = probe.getsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, 32)
    return _TIMEVALS[len(value)]


@functools.lru_cache
def timeval(seconds: float) -> bytes:
    """Return a time as struct timeval."""
    whole = int(seconds)
    return timeval_form().pack(whole, int((seconds - whole) * 1_000_000))


def set_timeout(sock: socket.socket, option: int, seconds: float) -> None:
    """Set SO_RCVTIMEO or SO_SNDTIMEO.

    That takes one system call a wait; Python's own time-outs call poll before each.
    """
    sock.setsockopt(socket.SOL_SOCKET, option, timeval(seconds))


class Deadline:
    """A time limit of so many seconds from now."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """The seconds that are left, at least 0."""
        return max(0.0, self._end - time.monotonic())

    @property
    def has_passed(self) -> bool:
        return time.monotonic() >= self._end


def await_readable(seconds: float, *descriptors: int) -> list[int]:
    """Wait, and return the descriptors that can be read or have hung up.

    The list is empty if the time is over.
    """
    poller = select.poll()
    for descriptor in descriptors:
        poller.register(descriptor, select.POLLIN)
    return [descriptor for descriptor, _ in poller.poll(seconds * 1000)]


class Channel:
    """A blocking socket to one side, with time limits.

    If the connection breaks, its methods raise the `Hangup` of that side.
    """

    side: str
    lost: type[Hangup]
    broken: Optional[Reply] = None  # to the client, when the connection breaks
    silent: Optional[Reply] = None  # and when it stalls

    def __init__(
        self,
        sock: socket.socket,
        timeout: float,
        log: Log,
        *,
        receive_timeout: float,
        send_timeout: float,
    ) -> None:
        """The two last say how long one system call may block."""
        self._socket = sock
        self._timeout = timeout
        self._log = log
        self.tls = ""  # protocol and cipher, once it is encrypted
        sock.setblocking(True)
        set_timeout(sock, socket.SO_RCVTIMEO, receive_timeout)
        set_timeout(sock, socket.SO_SNDTIMEO, send_timeout)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def fileno(self) -> int:
        return self._socket.fileno()

    def receive(self, most: int = SMALL_BLOCK) -> Optional[bytes]:
        """Return some octets, or None if none came within the receive time limit."""
        try:
            octets = self._socket.recv(most)
        except OSError as error:
            if error.errno in _AGAIN:
                return None
            raise self._broken(
                f"couldn't read data from socket: {reason(error)}"
            ) from error
        if not octets:
            raise self._broken("connection closed by peer")
        return octets

    def send(self, octets: bytes) -> None:
        """Send all octets; TimeOut limits how long none at all can be sent."""
        rest = memoryview(octets)
        try:
            while rest:
                rest = rest[self._send_some(rest) :]
        except OSError as error:
            if error.errno in _AGAIN:
                text = f"{self.side}: network write operation timed out"
                raise self.lost(text, self.silent) from error
            raise self._broken(
                f"couldn't write data to socket: {reason(error)}"
            ) from error

    def _send_some(self, octets: memoryview) -> int:
        """Send the first octets and return how many; OSError if that fails."""
        return self._socket.send(octets)

    def _broken(self, what: str) -> Hangup:
        return self.lost(f"{self.side}: {what}", self.broken)

    def _encrypt(self, sock: TlsSocket, *stop: int) -> None:
        """Shake hands on `sock`, and use it from now on in place of the plain socket.

        Raises `TlsFailure` if the handshake fails or exceeds the time limit, and
        `ShuttingDown` when the descriptor `stop` can be read.  After either nothing can
        be sent.
        """
        self._socket = sock
        deadline = Deadline(self._timeout)
        while not sock.shake_hands():
            ready = await_readable(deadline.left, sock.fileno(), *stop)
            if any(descriptor in ready for descriptor in stop):
                raise ShuttingDown
            if not ready or deadline.has_passed:
                raise TlsFailure("timed out")
        self.tls = sock.describe()
        self._log.info(f"{self.side} encrypted: {self.tls}")

    def wait(self, seconds: float) -> bool:
        """Wait until this side sends or closes; return False if the time is over."""
        return bool(await_readable(seconds, self.fileno()))

    def _peek(self, most: int = 1) -> Optional[bytes]:
        """Return the next octets without taking them; None if none have come yet."""
        try:
            return self._socket.recv(most, _PEEK)
        except OSError as error:
            return None if error.errno in _AGAIN else b""

    def local_peer(self) -> Peer:
        """Return our end of the connection."""
        return Peer.of(self._socket.getsockname())

    def close(self) -> None:
        self._socket.close()
        self._log.debug(f"{self.side} connection closed")


CLIENT_POLL = 0.05  # seconds to wait for a busy client before others are looked at
REPLIES_HELD = 64 * 1024  # octets of replies to pipelined commands in one write
LINGER = 2.0  # seconds for a client to read our last reply
LINGER_OCTETS = 16 * 1024 * 1024


class ClientChannel(Channel):
    """The client's side: command lines and mail data in, replies out."""

    side = "CLIENT"
    lost = ClientLost

    def __init__(self, sock: socket.socket, timeout: float, log: Log) -> None:
        # A busy client costs one recv.  If it pauses, `Session.watch` polls it together
        # with the server and the shutdown.
        super().__init__(
            sock, timeout, log, receive_timeout=CLIENT_POLL, send_timeout=timeout
        )
        self.commands = CommandBuffer()
        self._replies: list[bytes] = []
        self._held = 0

    def encrypt(self, context: ssl.SSLContext, stop: int) -> None:
        """Start TLS as its server; what has come already belongs to the handshake.

        See `_encrypt`.
        """
        received = self.commands.take_all()
        sock = TlsSocket(self._socket, context, is_server=True, received=received)
        self._encrypt(sock, stop)

    def answer(self, reply: Reply) -> None:
        """Hold a reply until the next `flush`; many are sent at once."""
        self._log.dialogue(self.side, ">", reply)
        self._replies.append(reply)
        self._held += len(reply)
        if self._held > REPLIES_HELD:
            self.flush()

    @property
    def holds_replies(self) -> bool:
        """Whether there are replies to flush."""
        return bool(self._replies)

    def flush(self) -> None:
        """Send the replies that were held back, in one write."""
        if self._replies:
            octets = b"".join(self._replies)
            self._replies.clear()
            self._held = 0
            self.send(octets)

    def has_spoken(self) -> bool:
        """Return whether the client has sent more than was taken."""
        return bool(self.commands) or bool(self._peek())

    def has_gone(self) -> bool:
        """Return whether the client has gone and will not read our reply.

        One that has sent QUIT and closed its sending side still reads (RFC 5321
        4.1.1.10); Exim does so with each message.
        """
        poller = select.poll()
        poller.register(self._socket, select.POLLIN | _HUNG_UP)
        events = sum(event for _, event in poller.poll(0))
        if not events and not self.tls:  # TLS may have read the connection's end
            return False
        if events & _RESET:
            return True
        waiting = self._peek(BLOCK)
        if waiting is None or (waiting and not events & _HUNG_UP):
            return False
        # A client that has sent more than a block is in its next message.
        return len(waiting) < BLOCK and not self.commands.ends_in_quit(waiting)

    @staticmethod
    def timed_out() -> Hangup:
        """Return the error for a client that was silent for TimeOut."""
        return Hangup("CLIENT: network read operation timed out", CLIENT_TIMED_OUT)

    def original_destination(self, peer: Peer) -> Peer:
        """Return where the client of a transparent proxy connected to."""
        return original_destination(self._socket, peer)

    def linger(self, seconds: float = LINGER) -> None:
        """Wait until the client has read our last reply, or so many seconds.

        If we closed with octets unread, the connection would be reset, and the client's
        system would discard that reply.
        """
        deadline = Deadline(seconds)
        left = LINGER_OCTETS
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)
            while left > 0 and await_readable(deadline.left, self.fileno()):
                octets = socket.socket.recv(self._socket, SMALL_BLOCK)  # even if TLS
                if not octets:
                    break
                left -= len(octets)


SERVER_POLL = 0.05  # seconds to wait for a busy server before its words are looked for
REPLY_HOLD = 0.5  # seconds to hold pipelined replies back while the server is silent


class ServerChannel(Channel):
    """The server's side: commands and mail data out, replies in."""

    side = "SERVER"
    lost = ServerLost
    broken = SERVER_LOST
    silent = SERVER_TIMED_OUT

    def __init__(
        self,
        sock: socket.socket,
        timeout: float,
        log: Log,
        client: Optional[ClientChannel] = None,
    ) -> None:
        """`client` gets its held replies while this side is slow."""
        super().__init__(
            sock, timeout, log, receive_timeout=timeout, send_timeout=SERVER_POLL
        )
        self._client = client
        self._replies = ReplyBuffer()

    def ask(self, line: bytes, log_as: Optional[bytes] = None) -> Reply:
        """Send a command line (without CRLF), log it, and wait for its reply.

        `log_as` is logged in its place.  Raises `ServerLost` if there is no reply, or
        if it is 354, which only `ask_for_data` may get.
        """
        reply = self._ask(line, line if log_as is None else log_as)
        if reply.code == 354:
            # The server would take what comes next for mail data, past the filter.
            text = "SERVER: asked for mail data, but no DATA was sent"
            raise ServerLost(text, SERVER_CONFUSED)
        return reply

    def ask_for_data(self) -> Reply:
        """Send DATA; return the server's reply, 354 or a refusal."""
        if self.has_spoken():
            # An unread reply would be taken for the one to DATA.
            self.relay_unsolicited()
        reply = self._ask(b"DATA", b"DATA")
        if reply.code != 354 and not reply.is_refusal:
            raise self.confused(reply)
        return reply

    @staticmethod
    def confused(reply: Reply) -> ServerLost:
        """Return the error for a reply that means nothing for mail data."""
        text = f"SERVER: unusable reply to mail data: {reply.text}"
        return ServerLost(text, SERVER_CONFUSED)

    def _ask(self, line: bytes, log_as: bytes) -> Reply:
        if self.has_buffered_reply:
            self.relay_unsolicited()
        self._log.dialogue(self.side, ">", log_as)
        self.send(line + b"\r\n")
        return self.read_reply()

    def own_command(self, line: bytes) -> Reply:
        """Send a command that is not the client's; `ServerLost` if the reply is 421."""
        reply = self.ask(line)
        if reply.code == 421:
            raise ServerLost(f"SERVER: {reply.text}", reply)
        return reply

    def read_reply(self) -> Reply:
        """Wait for the server's next reply; Hangup if there will be none."""
        deadline = Deadline(self._timeout)
        try:
            reply = self._replies.next_reply()
            while reply is None:
                reply = self._replies.take(self._receive_by(deadline))
        except BadReply as error:
            raise ServerLost(f"SERVER: {error}", SERVER_CONFUSED) from error
        self._log.dialogue(self.side, "<", reply)
        return reply

    def _receive_by(self, deadline: Deadline) -> bytes:
        """Wait for octets of a reply, which has to be whole by the deadline."""
        client = self._client
        if client is not None and client.holds_replies and not self.wait(REPLY_HOLD):
            client.flush()
        # No poll before the first recv: SO_RCVTIMEO limits that already.  It may give
        # nothing but a part of a TLS record.
        octets = None if self.has_buffered_reply else self.receive()
        while octets is None and not deadline.has_passed and self.wait(deadline.left):
            octets = self.receive()
        if octets is None:
            text = "SERVER: network read operation timed out"
            raise ServerLost(text, SERVER_TIMED_OUT)
        return octets

    def relay_unsolicited(self, *, client_waits: bool = True) -> NoReturn:
        """Relay an unsolicited reply, and end the session.

        If `client_waits` for the reply to a command, a 2xx is not relayed, since it
        would be taken for that.
        """
        reply = self.read_reply()
        is_news = reply.is_refusal or (reply.is_success and not client_waits)
        last_word = reply if is_news else SERVER_CONFUSED
        raise ServerLost(f"SERVER: unsolicited reply: {reply.text}", last_word)

    def _send_some(self, octets: memoryview) -> int:
        """See `Channel`; here a server that speaks meanwhile ends the session.

        It may have stopped reading, or closed the connection and sent the reason.
        """
        deadline = Deadline(self._timeout)
        while True:
            try:
                return self._socket.send(octets)
            except BlockingIOError:
                if deadline.has_passed:
                    raise
            except OSError:
                self._relay_last_word()
                raise
            poller = select.poll()
            poller.register(self._socket, select.POLLIN | select.POLLOUT)
            poller.poll(deadline.left * 1000)
            if self.has_spoken():
                self.relay_unsolicited()

    def _relay_last_word(self) -> None:
        with contextlib.suppress(ServerLost):
            if self._peek():
                self._replies.feed(self.receive() or b"")
        if self.has_buffered_reply:
            self.relay_unsolicited()

    @property
    def has_buffered_reply(self) -> bool:
        """Whether octets are here of an unsolicited reply, or of the one being read."""
        return bool(self._replies)

    def has_spoken(self) -> bool:
        """Return whether an unsolicited reply, or the connection's end, has come."""
        return self.has_buffered_reply or self._peek() is not None

    def encrypt(self, context: ssl.SSLContext, name: str, *stop: int) -> None:
        """Start TLS as its client; `name` is the server's.  See `_encrypt`."""
        sock = TlsSocket(self._socket, context, name=name.encode("ascii"))
        self._encrypt(sock, *stop)


def resolve(address: Address, host: str) -> list[tuple[int, Any]]:
    """Return the families and socket addresses of an address, with `host` as its host.

    Raises OSError if the name cannot be resolved.
    """
    if address.path:
        return [(socket.AF_UNIX, to_octets(address.path))]
    # As octets, since Python would convert text to IDNA first.
    found = socket.getaddrinfo(to_octets(host), address.port, type=socket.SOCK_STREAM)
    return [(family, sockaddr) for family, _, _, _, sockaddr in found]


def listen_target(listen: Address) -> tuple[int, Any]:
    """Return the family and socket address to listen on; OSError as `resolve`."""
    targets = resolve(listen, listen.host or "0.0.0.0")
    # IPv4 first: the C program knows nothing else.
    return min(targets, key=lambda target: target[0] != socket.AF_INET)


def leads_to_listener(
    targets: Sequence[tuple[int, Any]], listener: tuple[int, Any]
) -> bool:
    """Return whether one of the targets is the listener, the same kind of pair."""
    listener_family, name = listener
    if listener_family == socket.AF_UNIX:
        paths = [path for family, path in targets if family == socket.AF_UNIX]
        own = os.fsencode(name)  # systemd may pass an abstract one, which is no path
        own = own if own.startswith(b"\0") else os.path.realpath(own)
        return any(os.path.realpath(path) == own for path in paths)
    for family, sockaddr in targets:
        if family != socket.AF_UNIX and sockaddr[1] == name[1]:
            host = Peer.of(sockaddr).host
            if host == Peer.of(name).host:
                return True
            is_reached = name[0] == "::" or (name[0] == "0.0.0.0" and ":" not in host)
            if is_reached and is_own_target(family, sockaddr):
                return True
    return False


OWN_LISTENER = "OutAddress leads to this proxy's own Listen address"


def is_loop(config: Config, *, may_wait: bool = True) -> bool:
    """Return whether OutAddress is surely Listen, as far as it is known now.

    A name is resolved only if we `may_wait`; otherwise the sessions find out.
    """
    address = config.out_address
    # A port alone is on the client's machine, which a session knows.
    if address is None or address.is_any or config.is_transparent:
        return False
    hosts = [each.host for each in (address, config.listen) if each.host]
    if address.port != config.listen.port:
        return False  # without resolving the name
    if not may_wait and not all(map(is_numeric, hosts)):
        return False
    try:
        targets = resolve(address, address.host)
        return leads_to_listener(targets, listen_target(config.listen))
    except OSError:
        return False


def is_own_target(family: int, sockaddr: Any) -> bool:
    """Return whether a socket address has an IP address of this machine's.

    The system sends to its own addresses from the same one, or from 127.0.0.1.  That
    one can bind to it shows nothing if net.ipv4.ip_nonlocal_bind is set.
    """
    if Peer.of(sockaddr).host.startswith("127."):
        return True
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(sockaddr)
            return bool(probe.getsockname()[0] == probe.getpeername()[0])
    except OSError:
        return False  # there is no route


def connect(
    targets: Sequence[tuple[int, Any]], timeout: float, source: str = ""
) -> tuple[socket.socket, Any]:
    """Connect to the first target that answers, all within `timeout` seconds.

    `source` is a foreign address to connect from (TransparentProxy: full).  Each target
    gets an equal share of the time that is left.  Raises the OSError of the last target
    if none answers.
    """
    deadline = Deadline(timeout)
    failure: OSError = TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
    for number, (family, sockaddr) in enumerate(targets):
        if deadline.has_passed:
            break
        share = deadline.left / (len(targets) - number)
        try:
            return _connect_one(family, sockaddr, share, source), sockaddr
        except OSError as error:
            failure = error
    raise failure


def _connect_one(
    family: int, sockaddr: Any, timeout: float, source: str
) -> socket.socket:
    # The name may have addresses of a family that this system does not have.
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.settimeout(timeout)
        if source:
            be_transparent(sock)
            sock.bind((source, 0))
        sock.connect(sockaddr)
    except OSError:
        sock.close()
        raise
    return sock


# ---------------------------------------------------------------------------
# The transparent proxy (Linux)
# ---------------------------------------------------------------------------

# From linux/netfilter_ipv4.h, linux/netfilter_ipv6/ip6_tables.h and linux/in.h;
# the socket module does not have them in every version.
_SO_ORIGINAL_DST = 80
_IP_TRANSPARENT = 19

NEEDS_NET_ADMIN = (
    "couldn't set transparent mode on socket: start as root, or with"
    " CAP_NET_ADMIN (systemd: AmbientCapabilities=CAP_NET_ADMIN)"
)


def be_transparent(sock: socket.socket) -> None:
    """Let a socket have addresses that are not this machine's.

    Raises PermissionError without CAP_NET_ADMIN.
    """
    # IPv6 has an option of its own for the same bit of a socket.
    sock.setsockopt(socket.IPPROTO_IP, _IP_TRANSPARENT, 1)


def original_destination(sock: socket.socket, peer: Peer) -> Peer:
    """Return the destination of a connection from `peer` before NAT changed it.

    Raises OSError if the kernel does not know.
    """
    if ":" in peer.host:
        name = sock.getsockopt(socket.IPPROTO_IPV6, _SO_ORIGINAL_DST, 28)
        host = socket.inet_ntop(socket.AF_INET6, name[8:24])
    else:
        name = sock.getsockopt(socket.IPPROTO_IP, _SO_ORIGINAL_DST, 16)
        host = socket.inet_ntop(socket.AF_INET, name[4:8])
    return Peer(host, int.from_bytes(name[2:4], "big"))


def is_own_address(host: str) -> bool:
    """Return whether an address is one of this machine's, so that it can be bound."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((host, 0))
        except OSError as error:
            # A link-local address lacks its scope here.  It is ours, since those of
            # other machines are not routed to us.
            return error.errno == errno.EINVAL
    return True


# ---------------------------------------------------------------------------
# Spools: messages in memory and in files
# ---------------------------------------------------------------------------


def write_all(descriptor: int, octets: Union[bytes, bytearray]) -> None:
    """Write all octets to a file; OSError when the disk is full."""
    rest = memoryview(octets)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def create_file(directory: bytes) -> tuple[int, bytes]:
    """Create a new file of mode 600; returns its descriptor and path."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    while True:
        suffix = os.urandom(6).hex().encode()
        path = os.path.join(directory, b"proxsmtpd." + suffix)
        with contextlib.suppress(FileExistsError):
            descriptor = os.open(path, flags, 0o600)
            os.fchmod(descriptor, 0o600)  # whatever the umask is
            return descriptor, path


def create_unnamed_file(directory: bytes) -> int:
    """Create a file without a name, which cannot be left behind."""
    unnamed = getattr(os, "O_TMPFILE", 0)
    if unnamed:
        # Not every file system can do it.
        with contextlib.suppress(OSError):
            return os.open(directory, unnamed | os.O_RDWR, 0o600)
    descriptor, path = create_file(directory)
    os.unlink(path)
    return descriptor


@contextlib.contextmanager
def spool_errors() -> Iterator[None]:
    """Raise `SpoolFailure` for an OSError of what is written in here."""
    try:
        yield
    except OSError as error:
        raise SpoolFailure(f"couldn't write to cache file: {reason(error)}") from error


SPOOL_MEMORY = 1024 * 1024  # longer messages are kept in a file


AnySpool = TypeVar("AnySpool", bound="Spool")


class Spool:
    """The octets of a message, in memory or, beyond `SPOOL_MEMORY`, in a file.

    Its methods raise OSError if the file cannot be made, written or read.
    """

    def __init__(self, directory: bytes) -> None:
        self._directory = directory
        self._memory = bytearray()
        self._file = -1
        self.size = 0

    def write(self, octets: bytes) -> None:
        if self._file < 0 and self.size + len(octets) > SPOOL_MEMORY:
            self._file = create_unnamed_file(self._directory)
            write_all(self._file, self._memory)
            self._memory = bytearray()
        if self._file < 0:
            self._memory += octets
        else:
            write_all(self._file, octets)
        self.size += len(octets)

    def read(self, offset: int, length: int) -> bytes:
        if self._file < 0:
            return bytes(memoryview(self._memory)[offset : offset + length])
        return os.pread(self._file, length, offset)

    def blocks(self) -> Iterator[bytes]:
        """Yield all octets in large blocks."""
        offset = 0
        block = self.read(offset, BLOCK)
        while block:
            yield block
            offset += len(block)
            block = self.read(offset, BLOCK)

    def close(self) -> None:
        self._memory = bytearray()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


class NamedSpool(Spool):
    """The octets of a message in a file with a name, for a filter to change.

    The name is in `names` while the file exists, so that the main thread can remove
    it.  Raises OSError if the file cannot be made.
    """

    def __init__(self, directory: bytes, names: dict[bytes, None]) -> None:
        super().__init__(directory)
        self._file, self.path = create_file(directory)
        self._names = names
        self._names[self.path] = None

    def reopen(self) -> None:
        """Open the file as the filter has left it.

        Raises `FilterFailure` if it is not a regular file any more.
        """
        # A fifo would make open wait; a link would lead out of the directory.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
        written, self._file = self._file, -1
        try:
            os.close(written)
            self._file = os.open(self.path, flags)
        except OSError as error:
            text = f"couldn't open cache file: {printable(self.path)}: {reason(error)}"
            raise FilterFailure(text) from error
        status = os.fstat(self._file)
        if not stat.S_ISREG(status.st_mode):
            text = f"filter left no regular file: {printable(self.path)}"
            raise FilterFailure(text)
        self.size = status.st_size

    def close(self) -> None:
        self._names.pop(self.path, None)
        super().close()
        # The filter may have removed it.
        with contextlib.suppress(FileNotFoundError):
            remove(self.path)


def remove(path: bytes) -> None:
    """Remove a file, or a directory and all in it; OSError for what has to stay.

    Directories may be closed to their owner: the filter is another program.
    """
    try:
        os.unlink(path)
        return
    except (IsADirectoryError, PermissionError):  # Linux says the one, others the other
        if not stat.S_ISDIR(os.lstat(path).st_mode):
            raise
    failures: list[OSError] = []
    directories, others = [path], list[bytes]()
    for directory in directories:  # each adds those in it
        try:
            with contextlib.suppress(PermissionError):  # another user's may be empty
                os.chmod(directory, stat.S_IRWXU)
            for entry in os.scandir(directory):
                is_directory = entry.is_dir(follow_symlinks=False)
                (directories if is_directory else others).append(entry.path)
        except OSError as error:  # all that can go shall go
            failures.append(error)
    for call, places in (os.unlink, others), (os.rmdir, reversed(directories)):
        for place in places:
            try:
                call(place)
            except OSError as error:
                failures.append(error)
    if failures:
        raise failures[0]


# ---------------------------------------------------------------------------
# Processors
# ---------------------------------------------------------------------------


@functools.cache  # before `Affinity.pin` leaves only one
def usable_processors() -> Sequence[int]:
    """Return the processors that we may use, as far as the system lets us choose."""
    if hasattr(os, "sched_getaffinity"):
        with contextlib.suppress(OSError):
            return sorted(os.sched_getaffinity(0))
    return []


class Affinity:
    """Keeps the threads of this process on one processor, but not its filters.

    Only the holder of the GIL runs.  If the threads of a process were spread over
    processors, the GIL would move with every system call, which costs half of the
    throughput (make bench).
    """

    def __init__(self) -> None:
        self._all = usable_processors()
        self._own: Optional[int] = None  # once `pin` has been called

    def pin(self, number: int) -> None:
        """Choose a processor for this thread and those that it will start.

        Workers have numbers that follow each other; ours begin at our pid, so that
        several daemons do not choose the same.
        """
        has_gil = getattr(sys, "_is_gil_enabled", lambda: True)()
        if has_gil and len(self._all) > 1:
            own = self._all[number % len(self._all)]
            with contextlib.suppress(OSError):
                os.sched_setaffinity(0, {own})
                self._own = own

    @contextlib.contextmanager
    def lifted(self) -> Iterator[None]:
        """Allow this thread all processors, so that a child inherits them."""
        if self._own is None:
            yield
            return
        # The system may have taken a processor away; that must not stop a filter.
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, self._all)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                os.sched_setaffinity(0, {self._own})


# ---------------------------------------------------------------------------
# Filters
# ---------------------------------------------------------------------------


class KeepAlive:
    """Says when the next NOOP is due, `interval` seconds after the last; 0: never."""

    def __init__(self, interval: float) -> None:
        self._interval = interval
        self.restart()

    def restart(self) -> None:
        """Count from now on: the last one has been answered."""
        self._due = time.monotonic() + self._interval

    def cut(self, seconds: float) -> float:
        """Return how long to wait instead of `seconds`, so that none is missed."""
        if not self._interval:
            return seconds
        return max(0.0, min(seconds, self._due - time.monotonic()))

    def stop(self) -> None:
        """Stop for good."""
        self._interval = 0

    @property
    def is_due(self) -> bool:
        return bool(self._interval) and time.monotonic() >= self._due


def peek_exit_status(pid: int) -> int:
    """Wait for a process, but leave it a zombie: its process group stays ours."""
    if not hasattr(os, "waitid"):
        return wait_for_exit(pid)
    ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert ended is not None  # without WNOHANG
    return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status


def wait_for_exit(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_children(thread: int) -> None:
    """Kill the children of one of our threads, by its number (Linux, proc(5)).

    One that has begun already may have children of its own, in its process group.
    """
    with contextlib.suppress(OSError):
        with open(f"/proc/self/task/{thread}/children", "rb") as file:
            children = file.read().split()
        for pid in children:
            # One may be another user's by now, or be gone.
            for kill in (os.kill, os.killpg):
                with contextlib.suppress(OSError):
                    kill(int(pid), signal.SIGKILL)


def live_groups() -> dict[int, None]:
    """Return the process groups that have others than zombies, as /proc has them."""
    groups: dict[int, None] = {}
    with contextlib.suppress(OSError):  # not Linux
        for name in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
                state, _, group, *_ = file.read().rpartition(b")")[2].split(None, 3)
                if state not in (b"Z", b"X"):
                    groups[int(group)] = None
    return groups


GROUP_CHECK = 0.05  # seconds between checks of what is left of process groups


class GroupWatch:
    """Knows which process groups live; all sessions share one look at /proc."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._looked = -math.inf
        self._live: dict[int, None] = {}

    def may_live(self, group: int, since: float) -> bool:
        """Return False if a look later than `since` found no member of a group."""
        with self._lock:
            now = time.monotonic()
            if now - self._looked >= GROUP_CHECK:
                self._looked = now
                self._live = live_groups()
            return self._looked < since or group in self._live


# A function that starts a program, given its name, arguments, environment, and the
# descriptors that become its 0, 1 and 2; in a process group of its own, no signal
# blocked or ignored.  Returns the process id; raises OSError if it cannot be executed.
Spawn = Callable[[bytes, Sequence[bytes], Mapping[bytes, bytes], Sequence[int]], int]

_DEFAULT_SIGNALS = signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}


def spawn_locked(
    program: bytes,
    arguments: Sequence[bytes],
    environment: Mapping[bytes, bytes],
    standard: Sequence[int],
) -> int:
    """Start a program by Python's function, which holds the GIL until it has begun."""
    return os.posix_spawnp(
        program,
        list(arguments),
        environment,
        file_actions=[
            (os.POSIX_SPAWN_DUP2, end, number) for number, end in enumerate(standard)
        ],
        setpgroup=0,
        setsigmask=(),
        setsigdef=_DEFAULT_SIGNALS,
    )


# From Linux's spawn.h.  The types of glibc and musl differ in size, the flags do not.
_SPAWN_SETPGROUP, _SPAWN_SETSIGDEF, _SPAWN_SETSIGMASK = 2, 4, 8
_SPAWN_TYPE_SIZE = 1024  # octets, three times what the largest has


class UnlockedSpawn:
    """Starts a program by the C library, so that the GIL is free meanwhile.

    With 20 sessions and `cat` that gives 1.28 times the messages (make bench).
    """

    def __init__(self) -> None:
        """Raises ImportError without ctypes, MemoryError if the system forbids it."""
        import ctypes

        # With the interpreter's lock, since none of these ever waits.
        library = ctypes.PyDLL(None)
        self._init_actions = library.posix_spawn_file_actions_init
        self._add_dup2 = library.posix_spawn_file_actions_adddup2
        self._destroy_actions = library.posix_spawn_file_actions_destroy
        self._spawn = ctypes.CDLL(None).posix_spawnp
        for function in (self._init_actions, self._add_dup2, self._spawn):
            function.errcheck = self._check
        self._attributes = ctypes.create_string_buffer(_SPAWN_TYPE_SIZE)
        signals = ctypes.create_string_buffer(_SPAWN_TYPE_SIZE)
        flags = _SPAWN_SETPGROUP | _SPAWN_SETSIGDEF | _SPAWN_SETSIGMASK
        library.posix_spawnattr_init(self._attributes)  # group 0, an empty mask
        library.posix_spawnattr_setflags(self._attributes, flags)
        library.sigemptyset(signals)
        for number in _DEFAULT_SIGNALS:
            library.sigaddset(signals, int(number))
        library.posix_spawnattr_setsigdefault(self._attributes, signals)

    @staticmethod
    def _check(number: Any, _function: Any, _arguments: Any) -> Any:
        if number:
            raise OSError(number, os.strerror(number))
        return number

    def __call__(
        self,
        program: bytes,
        arguments: Sequence[bytes],
        environment: Mapping[bytes, bytes],
        standard: Sequence[int],
    ) -> int:
        import ctypes

        def strings(items: Sequence[bytes]) -> object:
            return (ctypes.c_char_p * (len(items) + 1))(*items, None)

        pid = ctypes.c_int()
        actions = ctypes.create_string_buffer(_SPAWN_TYPE_SIZE)
        self._init_actions(actions)
        try:
            for number, end in enumerate(standard):
                self._add_dup2(actions, end, number)
            self._spawn(
                ctypes.byref(pid),
                program,
                actions,
                self._attributes,
                strings(arguments),
                strings([b"%s=%s" % variable for variable in environment.items()]),
            )
        finally:
            self._destroy_actions(actions)
        return pid.value


@functools.cache
def best_spawn() -> Spawn:
    """Return the best way to start a program on this system."""
    if IS_LINUX:
        # ctypes wants memory to execute, which SELinux may forbid.
        with contextlib.suppress(ImportError, MemoryError):
            return UnlockedSpawn()
    return spawn_locked


def open_null() -> int:
    """Open /dev/null for both directions; OSError, which names it, if that failed."""
    try:
        return os.open(os.devnull, os.O_RDWR)
    except OSError as error:
        text = f"couldn't open {os.devnull}: {reason(error)}"
        raise OSError(error.errno, text) from error


KILL_GRACE = 2.0  # seconds between SIGTERM and SIGKILL
END_CHECK = 0.5  # seconds between checks for the shutdown while a filter runs
PIPE_MOST = 1024 * 1024  # the capacity that a filter may give it (pipe(7))


class FilterRun:
    """One run of the filter command, in a process group of its own.

    `source` goes to its standard input, and its standard output to `sink`; None
    stands for /dev/null.  To be used as a context manager: at the end nothing
    of its process group is left, unless `release` was called.
    """

    def __init__(
        self,
        shared: Shared,
        log: Log,
        source: Optional[Spool] = None,
        sink: Optional[Spool] = None,
    ) -> None:
        self._shared = shared
        self._log = log
        self._source = source
        self._sink = sink
        self._poller = select.poll()
        self._open: dict[int, None] = {}  # our descriptors, by these names
        self._input = self._output = self._error = self._end = -1
        self.given = 0  # octets of `source` that the filter has taken
        self.standard_error = Excerpt()
        self._last_line = LastLine()
        self._timeout = 0.0  # seconds between signs of life
        self._deadline = Deadline(math.inf)  # of the next one
        self._waiter: Optional[threading.Thread] = None
        self._exit_status: Optional[int] = None
        # What follows is under the lock: the main thread may end a run, too, and a
        # signal handler that interrupts it.
        self._lock = threading.RLock()
        self._pid = 0  # of the process, until it is reaped
        self._starter = 0  # the thread that waits for the program to begin

    def __enter__(self) -> FilterRun:
        return self

    def __exit__(self, *_exception: object) -> None:
        if self._pid:
            self._terminate()
        for descriptor in list(self._open):
            self._close(descriptor)

    # The start

    def start(
        self, command: str, environment: Mapping[bytes, bytes], timeout: float
    ) -> None:
        """Start the command.

        `timeout` is in seconds, from now on and from each sign of life.  Raises
        `FilterFailure` if it passes, the system refuses or the daemon ends.
        """
        self._timeout = timeout
        self._deadline = Deadline(timeout)
        try:
            with contextlib.ExitStack() as child_ends:
                self._spawn(command, environment, self._make_pipes(child_ends))
            self._lower_descriptor_limit()
            self._watch_exit()
        except (OSError, RuntimeError) as error:
            text = reason(error) if isinstance(error, OSError) else str(error)
            raise FilterFailure(f"couldn't start filter command: {text}") from error
        self._log.debug(f"executed filter command: {shown(command)} (pid: {self._pid})")
        self._shared.shutdown.check()
        if self._deadline.has_passed:
            raise FilterFailure("timeout while starting filter command")

    def _make_pipes(self, child_ends: contextlib.ExitStack) -> list[int]:
        """Return the child's descriptors 0, 1 and 2, which `child_ends` closes."""
        if self._source is None or self._sink is None:
            null = open_null()
            child_ends.callback(os.close, null)
            standard = [null, null]
        else:
            self._input, child_input = self._make_pipe(child_ends, select.POLLOUT)
            self._output, child_output = self._make_pipe(child_ends, select.POLLIN)
            standard = [child_input, child_output]
            if not self._source.size:
                self._close(self._input)
        self._error, child_error = self._make_pipe(child_ends, select.POLLIN)
        return [*standard, child_error]

    def _make_pipe(
        self, child_ends: contextlib.ExitStack, event: int
    ) -> tuple[int, int]:
        """Return our end of a pipe, which waits for `event`, and the child's."""
        ours, childs = os.pipe() if event == select.POLLIN else os.pipe()[::-1]
        child_ends.callback(os.close, childs)
        os.set_blocking(ours, False)
        self._register(ours, event)
        return ours, childs

    def _spawn(
        self, command: str, environment: Mapping[bytes, bytes], standard: Sequence[int]
    ) -> None:
        """Start the process; without the lock, since its file system may hang."""
        with self._lock:
            self._shared.shutdown.check()
            self._starter = threading.get_native_id()
        pid = 0
        try:
            with self._shared.affinity.lifted():
                pid = self._spawn_command(command, environment, standard)
        finally:
            with self._lock:
                self._starter, self._pid = 0, pid

    def _spawn_command(
        self, command: str, environment: Mapping[bytes, bytes], standard: Sequence[int]
    ) -> int:
        spawn = best_spawn()
        words = plain_words(command)
        # Without PATH the shell has a default of its own.
        if words and (b"PATH" in environment or b"/" in words[0]):
            # The shell would do nothing but the same.  What cannot be executed
            # is for it to explain.
            with contextlib.suppress(OSError):
                return spawn(words[0], words, environment, standard)
        shell = (b"sh", b"-c", to_octets(command))
        return spawn(b"/bin/sh", shell, environment, standard)

    def _lower_descriptor_limit(self) -> None:
        """Give the process the limit that we were started with.

        Some programs close all descriptors up to it, which takes long with ours.  It
        may have begun, but has no input yet.
        """
        if self._shared.descriptor_limit and hasattr(resource, "prlimit"):
            _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            limits = self._shared.descriptor_limit, hard
            with contextlib.suppress(OSError):  # another user's, or gone
                resource.prlimit(self._pid, resource.RLIMIT_NOFILE, limits)

    def _watch_exit(self) -> None:
        """Open a descriptor that is readable once the process has ended."""
        try:
            self._end = os.pidfd_open(self._pid)
        except (AttributeError, OSError):
            # Not Linux, or a kernel before 5.3: a thread waits and closes a pipe.
            end, writer = os.pipe()
            waiter = threading.Thread(target=self._wait_and_close, args=(writer,))
            try:
                waiter.start()
            except RuntimeError:
                os.close(end)
                os.close(writer)
                raise
            self._end, self._waiter = end, waiter
        self._register(self._end, select.POLLIN)

    def _wait_and_close(self, writer: int) -> None:
        self._exit_status = peek_exit_status(self._pid)
        os.close(writer)

    def _register(self, descriptor: int, event: int) -> None:
        self._poller.register(descriptor, event)
        self._open[descriptor] = None

    def _close(self, descriptor: int) -> None:
        self._poller.unregister(descriptor)
        del self._open[descriptor]
        if descriptor == self._input:
            self._input = -1  # the next pipe may get its number
        os.close(descriptor)

    # The run

    def finish(
        self, keep_alive: KeepAlive, send_noop: Callable[[], None]
    ) -> tuple[int, bytes]:
        """Wait until the process, and its standard output, have come to an end.

        Returns the exit status, negative for a signal, and the last line of its
        standard error.  Raises `FilterFailure` when the time for a sign of life has
        passed, the daemon ends, or TempDirectory fails (`SpoolFailure`).
        """
        while self._is_running():
            left = self._deadline.left
            has_moved = False
            wait = keep_alive.cut(min(left, END_CHECK))
            for descriptor, _ in self._poller.poll(wait * 1000):
                if descriptor == self._input:
                    has_moved |= self._give()
                elif descriptor == self._end:
                    self._close(descriptor)
                    has_moved = True
                else:
                    has_moved |= self._take(descriptor)
            if has_moved:
                self._deadline = Deadline(self._timeout)
            elif not left:  # and poll was asked: the server may have held us up
                raise FilterFailure("timeout while listening to filter command")
            if self._end not in self._open:
                self._shared.shutdown.check()
            if keep_alive.is_due:
                send_noop()
        if self._error in self._open:
            # Not to its end, since a child in the background may go on writing.
            self._take(self._error, PIPE_MOST)
        status = self._wait()
        self._log.debug(f"filter exit code: {status}")
        return status, self._last_line.text

    def _is_running(self) -> bool:
        return self._end in self._open or self._output in self._open

    def _give(self) -> bool:
        """Write to standard input what fits; return whether anything did."""
        assert self._source is not None
        try:
            octets = self._source.read(self.given, PIPE_BLOCK)
        except OSError as error:
            raise SpoolFailure(f"error reading cache file: {reason(error)}") from error
        try:
            self.given += os.write(self._input, octets)
        except BlockingIOError:
            return False
        except BrokenPipeError:
            self._log.debug("filter command closed input early")
            self._close(self._input)
            return False
        if self.given == self._source.size:
            self._close(self._input)
        return True

    def _take(self, descriptor: int, most: int = PIPE_BLOCK) -> bool:
        """Read from standard output or error; return whether there was anything."""
        try:
            octets = os.read(descriptor, most)
        except BlockingIOError:
            return False
        if not octets:
            self._close(descriptor)
        elif descriptor == self._error:
            self._last_line.feed(octets)
            self.standard_error.feed(octets)
        else:
            assert self._sink is not None
            with spool_errors():
                self._sink.write(octets)
        return bool(octets)

    def _wait(self) -> int:
        """Wait for the process, which stays a zombie; return its exit status."""
        if self._waiter is not None:
            self._waiter.join()
        if self._exit_status is None:
            self._exit_status = peek_exit_status(self._pid)
        return self._exit_status

    def _reap(self, pid: int) -> None:
        """Wait for the process, and have the system forget it."""
        if self._waiter is not None:
            self._waiter.join()
        # Where there was no way to peek, the system has forgotten it already.
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)

    # The end

    def release(self) -> None:
        """Let run on what the filter has left in the background."""
        self._wait()  # without the lock, which the main thread may want
        with self._lock:
            self._reap(self._pid)
            self._pid = 0

    def send_signal(self, number: int) -> None:
        """Send a signal to the process group, as long as it is surely ours.

        A program that has not begun yet is killed.
        """
        with self._lock:
            if self._starter:
                kill_children(self._starter)
            if self._pid:
                self._signal_all(number)

    def end_late_start(self) -> None:
        """Kill a program that has not begun in time, so that its thread goes on."""
        with self._lock:
            if self._starter and self._deadline.has_passed:
                kill_children(self._starter)

    def _signal_all(self, number: int) -> None:
        # A filter may have become another user's process; then so be it.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._pid, number)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.getpgid(self._pid) != self._pid:  # it has left its group
                os.kill(self._pid, number)

    def _terminate(self) -> None:
        """End the whole group: SIGTERM, and SIGKILL for what is still there."""
        try:
            if self._is_running():
                self._log.warning(f"killing filter process (pid {self._pid})")
            self.send_signal(signal.SIGTERM)
            self.send_signal(signal.SIGCONT)  # a stopped process handles nothing else
            self._await_end(KILL_GRACE)
        finally:
            # Also where somebody interrupts a dry run for the second time.
            self.send_signal(signal.SIGKILL)
            if self._end in self._open and not await_readable(KILL_GRACE, self._end):
                self._give_up()
            else:
                self.release()

    def _await_end(self, seconds: float) -> None:
        """Wait until the process and its group have ended.

        A process that has left the group may keep the pipes open; nobody waits for it.
        """
        begun = time.monotonic()
        deadline = Deadline(seconds)
        if self._input in self._open:
            self._close(self._input)
        while not deadline.has_passed:
            wait = deadline.left
            if self._end not in self._open:
                if not self._shared.groups.may_live(self._pid, begun):
                    break
                wait = min(wait, GROUP_CHECK)  # the system does not report its end
            for descriptor, _ in self._poller.poll(wait * 1000):
                with contextlib.suppress(BlockingIOError):
                    if descriptor == self._end or not os.read(descriptor, PIPE_BLOCK):
                        self._close(descriptor)

    def _give_up(self) -> None:
        """Leave a process that cannot be killed; it must not hold up the client."""
        self._log.error(f"couldn't kill filter process (pid {self._pid})")
        with self._lock:
            pid, self._pid = self._pid, 0
        with contextlib.suppress(RuntimeError):  # then it stays a zombie
            threading.Thread(target=self._reap, args=(pid,), daemon=True).start()


# ---------------------------------------------------------------------------
# What the sessions share
# ---------------------------------------------------------------------------


class PollableEvent:
    """An event with a descriptor, which becomes readable when it is set."""

    def __init__(self) -> None:
        self._read_end, self._write_end = os.pipe()
        self.is_set = False

    def fileno(self) -> int:
        return self._read_end

    def set(self) -> None:
        """Set it, if it is not set yet."""
        if not self.is_set:
            self.is_set = True
            os.close(self._write_end)


class Shutdown:
    """The state of the daemon's end, and the filters that it ends.

        running --drain--> draining --stop, kill--> stopping

    draining: sessions end, except those in their DATA phase.  stopping: these end, too;
    `stop` sends SIGTERM to the filters, `kill` SIGKILL.
    """

    def __init__(self) -> None:
        self.draining = PollableEvent()
        self.stopping = PollableEvent()
        self._lock = threading.RLock()  # a second signal may interrupt its holder
        self._runs: dict[FilterRun, None] = {}

    def drain(self) -> None:
        """Let sessions end after the message that they are at."""
        self.draining.set()

    def stop(self) -> None:
        """End all sessions, and ask the filters to end."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End all sessions, and kill the filters."""
        self._end(signal.SIGKILL)

    def _end(self, number: int) -> None:
        self.draining.set()
        with self._lock:
            self.stopping.set()
            runs = list(self._runs)
        for run in runs:
            run.send_signal(number)

    def check(self) -> None:
        """Raise `FilterFailure` if filters must end."""
        if self.stopping.is_set:
            raise FilterFailure("the daemon ends")

    @contextlib.contextmanager
    def listed(self, run: FilterRun) -> Iterator[None]:
        """List a run while it lasts; `FilterFailure` if it must not begin."""
        with self._lock:
            self.check()
            self._runs[run] = None
        try:
            yield
        finally:
            with self._lock:
                self._runs.pop(run, None)

    def end_late_starts(self) -> None:
        """Kill each program that has not begun within FilterTimeout.

        Its session cannot do that: the system holds its thread until then.
        """
        with self._lock:
            runs = list(self._runs)
        for run in runs:
            run.end_late_start()


TIMES_KEPT = 1000  # of the last messages, for the statistics


class Statistics:
    """What was done since the start, for SIGUSR1.

    Each worker has its own; `pack` and `add` bring them to the supervisor.
    """

    def __init__(self, begun: Optional[tuple[float, float]] = None) -> None:
        """`begun` is the start by the two clocks, if it was not now."""
        self._lock = threading.Lock()
        # The second clock measures: nobody can set it back.
        self._since, self._begun = begun or (time.time(), time.monotonic())
        counted = ("accepted", "refused", "encrypted", "octets")
        self._counts = dict.fromkeys(counted, 0)
        self._messages: dict[str, int] = {}
        # (when, seconds) of the last messages.
        self._filter_times: deque[tuple[float, float]] = deque(maxlen=TIMES_KEPT)
        self._server_times: deque[tuple[float, float]] = deque(maxlen=TIMES_KEPT)
        self._in_use = dict.fromkeys(("threads", "descriptors"), 0)

    def count(self, what: str, number: int = 1) -> None:
        """Count connections ("accepted", "refused", "encrypted"), or "octets"."""
        with self._lock:
            self._counts[what] += number

    def note_message(
        self,
        status: str,
        octets: int,
        filter_seconds: float = 0.0,
        server_seconds: float = 0.0,
    ) -> None:
        """Count a message; 0 seconds stand for a side that was not asked."""
        kind = _STATUS_KIND.match(status)
        assert kind is not None  # the pattern matches anything
        now = time.monotonic()
        with self._lock:
            self._counts["octets"] += octets
            self._messages[kind[0]] = self._messages.get(kind[0], 0) + 1
            if filter_seconds:
                self._filter_times.append((now, filter_seconds))
            if server_seconds:
                self._server_times.append((now, server_seconds))

    def note_resources(self) -> None:
        """Measure what this process uses."""
        self._in_use = {
            "threads": count_entries("/proc/self/task"),
            "descriptors": count_entries("/dev/fd"),
        }

    def forget_resources(self) -> None:
        """Leave out what processes use, since they have ended."""
        self._in_use = dict.fromkeys(self._in_use, 0)

    def pack(self) -> bytes:
        """Return the figures, for `add` in another process."""
        with self._lock:
            times = list(self._filter_times), list(self._server_times)
            return marshal.dumps((self._counts, self._messages, times, self._in_use))

    def add(self, packed: bytes) -> None:
        """Add the figures of another process."""
        counts, messages, times, in_use = marshal.loads(packed)  # noqa: S302
        for mine, others in (
            (self._counts, counts),
            (self._messages, messages),
            (self._in_use, in_use),
        ):
            for name, number in others.items():
                mine[name] = mine.get(name, 0) + number
        for kept, more in zip((self._filter_times, self._server_times), times):
            in_order = sorted([*kept, *more])
            kept.clear()
            kept.extend(in_order)

    def report(self, connections: int, peak: int) -> list[str]:
        """Return the report as lines for the log.

        `connections` and `peak` are the present number of connections and the highest.
        """
        with self._lock:
            messages = dict(sorted(self._messages.items()))
            filter_times = sorted(seconds for _, seconds in self._filter_times)
            server_times = sorted(seconds for _, seconds in self._server_times)
        seconds = time.monotonic() - self._begun
        kinds = "".join(f", {count} {kind}" for kind, count in messages.items())
        encrypted = self._counts["encrypted"]
        used = {name: number or "unknown" for name, number in self._in_use.items()}
        return [
            f"since {rfc5322_date(self._since)}, {seconds:.0f} seconds",
            f"connections: {connections} now, {peak} at most,"
            f" {self._counts['accepted']} accepted,"
            f" {self._counts['refused']} refused as too many"
            + (f", {encrypted} encrypted" if encrypted else ""),
            f"messages: {sum(messages.values())}{kinds};"
            f" {self._counts['octets']} octets",
            f"filter: {describe_times(filter_times)}",
            f"server: {describe_times(server_times)}",
            f"threads: {used['threads']}, descriptors: {used['descriptors']}",
        ]


# The text of a reply may differ each time; its code is enough.
_STATUS_KIND = re.compile(r"(?:OBSERVED: )?(?:[0-9]{3}|.*)")


def describe_times(times: Sequence[float]) -> str:
    """Describe sorted times in seconds."""
    if not times:
        return "no times yet"
    median, high = (times[len(times) * percent // 100] for percent in (50, 95))
    return (
        f"last {len(times)} times: median {median:.3f} s, 95% within {high:.3f} s,"
        f" longest {times[-1]:.3f} s"
    )


def count_entries(directory: str) -> int:
    """Return how many entries a directory has, 0 where it does not exist."""
    with contextlib.suppress(OSError):
        return len(os.listdir(directory))
    return 0


LOCK_PATIENCE = 0.1  # seconds for a lock whose holder may have been stopped


class ConnectionLimit:
    """The bound of MaxConnections over all processes, and the numbers of connections.

    The counts, one for each process, are in memory that the processes share.  A record
    lock serializes `take`.  If its holder dies, the system releases the lock, and the
    supervisor clears the dead process's count.
    """

    _NUMBER, _PEAK, _ROWS, _FIRST = range(4)  # cells; the counts begin at the last one
    MOST_ROWS = 4 * MAX_PROCESSES  # old workers may last while new ones come

    def __init__(self, directory: bytes, *, is_shared: bool) -> None:
        """`directory` is for the lock's file, where the system needs one.

        OSError if it cannot be made.
        """
        size = self._FIRST + self.MOST_ROWS
        self._cells = memoryview(mmap.mmap(-1, 4 * size)).cast("I")
        self._cells[self._ROWS] = 1
        self._lock = threading.Lock()  # of the threads of this process
        self._file = -1
        if is_shared and hasattr(os, "memfd_create"):
            self._file = os.memfd_create(NAME)
        elif is_shared:
            self._file = create_unnamed_file(directory)
        self._row = 0  # of this process
        self._used: dict[int, None] = {}  # rows, as the supervisor knows

    def take(self, most: int) -> int:
        """Take a connection and return its number; 0 if there are `most` already."""
        with self._lock, self._locked():
            total = self.total + 1
            if total > most:
                return 0
            self._cells[self._FIRST + self._row] += 1
            self._cells[self._PEAK] = max(self._cells[self._PEAK], total)
            number = self._cells[self._NUMBER]
            self._cells[self._NUMBER] = (number + 1) % 0xF00000
            return 0x100000 + number

    def give_back(self) -> None:
        """Give a connection of this process back."""
        with self._lock:
            self._cells[self._FIRST + self._row] -= 1

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        if self._file < 0:
            yield
            return
        deadline = Deadline(LOCK_PATIENCE)
        while not deadline.has_passed:
            # After LOCK_PATIENCE go on without it, since its holder may have been
            # stopped.  Then there may be a connection too many, or a number twice.
            with contextlib.suppress(OSError):
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            time.sleep(0.001)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                fcntl.lockf(self._file, fcntl.LOCK_UN)

    @property
    def own(self) -> int:
        """The connections of this process."""
        return self._cells[self._FIRST + self._row]

    @property
    def total(self) -> int:
        """The connections of all processes."""
        return sum(self._cells[self._FIRST : self._FIRST + self._cells[self._ROWS]])

    @property
    def peak(self) -> int:
        """The highest total so far."""
        return self._cells[self._PEAK]

    def assign_row(self) -> int:
        """Return a row for a new process (in the supervisor)."""
        row = next(n for n in range(self.MOST_ROWS) if n not in self._used)
        self._used[row] = None
        self._cells[self._ROWS] = max(self._used) + 1
        return row

    def use_row(self, row: int) -> None:
        """Count the connections of this process in a row (in a worker)."""
        self._row = row

    def clear_row(self, row: int) -> None:
        """Forget the connections of a process that has ended (in the supervisor)."""
        self._cells[self._FIRST + row] = 0
        self._used.pop(row, None)


class Shared:
    """What all sessions of a process have in common.

    Threads share dicts, never sets: after a failed resize for lack of memory CPython's
    set is full, and the next look into it loops.
    """

    def __init__(
        self,
        config: Config,
        log: Log,
        environment: Mapping[bytes, bytes],
        listening_on: tuple[int, Any] = (socket.AF_UNIX, b""),
        descriptor_limit: int = 0,
    ) -> None:
        self.config = config
        self.log = log
        self.listening_on = listening_on  # family and address of the listener
        self.environment = environment  # that the filters inherit
        self.descriptor_limit = descriptor_limit  # of the filters; 0: ours
        self.affinity = Affinity()
        self.groups = GroupWatch()
        self.statistics = Statistics()
        self.named_files: dict[bytes, None] = {}  # temporary files that exist now
        self.shutdown = Shutdown()

    def with_config(self, config: Config, descriptor_limit: int) -> Shared:
        """Return it for later sessions: other settings, and all else in common."""
        other = Shared.__new__(Shared)
        vars(other).update(vars(self))
        other.config, other.descriptor_limit = config, descriptor_limit
        return other


# ---------------------------------------------------------------------------
# One message
# ---------------------------------------------------------------------------


# Seconds to wait for SIGTERM before an uncoded verdict is trusted: systemd may have
# signalled the filter first.
STOP_NOTICE = 0.2
MESSAGE_ID_WITHIN = 16 * 1024  # octets of a message in which the field is looked for


class Transaction:
    """One message, from DATA to the final reply.

    With a filter, the client sends the message first (`receive`), the filter runs
    (`run_filter`), and the server gets DATA and the message (`_send`) only if the
    filter agrees.  Without one the server gets DATA first, and the message streams
    through.  Either way the client gets one reply, then the message is logged, and
    no mail transaction stays open at the server.

    A dry run calls `receive` and `run_filter` only, and has no session.
    """

    def __init__(
        self, shared: Shared, log: Log, variables: Mapping[bytes, Optional[bytes]]
    ) -> None:
        """`variables` are those that tell the filter about the message."""
        self._shared = shared
        self._config = shared.config
        self._log = log
        self._variables = variables
        self._begun = time.monotonic()
        self._session: Session  # from `run` on, as the next one
        self._keep_alive = KeepAlive(0)  # likewise: a dry run has no server
        # The mail data as it comes in.
        self._is_streamed = False  # to the server as it comes in: no filter runs
        self._adds_header = True
        self._is_invited = False  # the client has got 354
        self._reader = MailDataReader()
        self._start = b""  # of the message, for its Message-ID
        self._watches_server = True  # while the client sends
        self._next_look = self._begun + CLIENT_POLL  # at the server and the shutdown
        self.size = 0  # of the message, in octets
        # The message in memory or on disk.
        self._spools = contextlib.ExitStack()
        # As the client sent it; the filter changes it if that is the file, too.
        self.original: Spool
        self._file: Optional[NamedSpool] = None  # with FilterType: file
        # With FilterMode: observe, why the filter's file could not be written.
        self._file_failure: Optional[SpoolFailure] = None
        self.message: Spool  # that goes to the server
        # The filter.
        self.environment: Mapping[bytes, bytes] = {}  # of its process
        self.exit_status: Optional[int] = None  # as `judge` takes it
        self.standard_error: Sequence[bytes] = ()  # its lines, as `Excerpt` has them
        self.has_failed = False
        self.is_bare_refusal = False  # the filter refused, and gave no reply
        self.filter_seconds = 0.0
        # What has become of the message.
        self.reply: Optional[Reply] = None  # for the client; None: the server decides
        self.status = ""  # for the log
        self._is_open = True  # the mail transaction at the server
        self._server_reply: Optional[Reply] = None  # to the mail data, or no to DATA
        self._server_seconds = 0.0  # from the end of the mail data to the reply

    def close(self) -> None:
        """Remove what is left of the message.

        An error is only logged: what has become of the message stands.
        """
        try:
            self._spools.close()
        except OSError as error:
            self._log.error(f"couldn't remove cache file: {reason(error)}")

    def run(
        self, session: Session, envelope: Envelope, unfiltered_status: Optional[str]
    ) -> None:
        """Relay the message of a session, answer the client, log the message.

        `unfiltered_status` is the status of a message that no filter runs for.  Raises
        `Hangup` if the session has to end; then the client has been answered, too.
        """
        self._session = session
        if unfiltered_status is not None:
            self._is_streamed, self.status = True, unfiltered_status
            self._adds_header = unfiltered_status != Status.SKIPPED
        self._keep_alive = KeepAlive(self._config.keep_alives)
        try:
            with contextlib.closing(self):
                reply = self._deliver()
        except Hangup as hangup:
            if hangup.reply is not None:
                self._count(hangup.reply.text)
            session.say_last_word(hangup)
            if hangup.reply is not None:
                self._log_message(envelope, hangup.reply.text)
            else:
                self._log.warning("unexpected end of data from client")
            raise
        self._count(self.status)
        try:
            # Answer before logging: the log may block, and a client that gives up
            # meanwhile would send an accepted message again.
            session.answer(reply)
            session.client.flush()
        finally:
            self._log_message(envelope, self.status)
        if self._is_open and reply.code != 421:
            self._reset_server()

    def _deliver(self) -> Reply:
        """Take the message to the server, if the filter agrees; return the reply."""
        try:
            if not self._is_streamed:
                self._invite(START_INPUT)
                self.receive(self._incoming())
                self.run_filter()
            return self.reply or self._send()
        except (Refusal, FilterFailure, ServerLost) as failure:
            # The client is answered when it has sent all of its data.
            if self._is_invited and not self._reader.ended:
                self._discard_rest(failure)
            if isinstance(failure, ServerLost):
                raise
            if isinstance(failure, Refusal):
                if self._is_streamed:  # the server must not take a part as the whole
                    raise Hangup("message is too large", failure.reply) from failure
                self.status = failure.reply.text
            else:
                self._log.error(str(failure))
                self.status = Status.FILTER_ERROR
            return failure.reply

    def _count(self, status: str) -> None:
        times = self.filter_seconds, self._server_seconds
        self._shared.statistics.note_message(status, self.size, *times)

    def _log_message(self, envelope: Envelope, status: str) -> None:
        """Log the message, and a line by which it is found in other logs.

        That has the size in octets, the seconds that the filter and the server took,
        and the server's reply, which often names the message in the server's log.
        """
        if not self._log.is_info:
            return
        self._session.log_message(envelope, status)
        fields = [f"size={self.size}"]
        found = _MESSAGE_ID.search(self._start)
        if found is not None:
            fields.insert(0, f"message-id={loggable_address(found[1])}")
        if envelope.remote:
            fields.append(f"remote={loggable_address(envelope.remote)}")
        if self.filter_seconds:
            fields.append(f"filter={self.filter_seconds:.3f}")
        if self._server_seconds:
            fields.append(f"server={self._server_seconds:.3f}")
        if self._server_reply is not None:
            fields.append(f"reply={self._server_reply.text}")
        self._log.info(", ".join(fields))
        if self._log.is_debug:
            times = self.filter_seconds, self._server_seconds
            whole = time.monotonic() - self._begun
            text = "took {:.3f} s: filter {:.3f} s, server {:.3f} s"
            self._log.debug(text.format(whole, *times))

    # From the client

    def _invite(self, reply: Reply) -> None:
        """Answer DATA with 354: from now on the client sends mail data."""
        self._is_invited = True
        self._session.answer(reply)
        self._session.client.flush()

    def _incoming(self) -> Iterator[bytes]:
        """Yield the message as it comes; `Refusal` (552) if it gets too large."""
        limit = self._config.max_message_size or math.inf
        for block in self._blocks():
            if self.size < MESSAGE_ID_WITHIN:
                self._start += block[: MESSAGE_ID_WITHIN - self.size]
            self.size += len(block)
            if self.size > limit:
                raise Refusal(TOO_LARGE)
            yield block

    def _blocks(self) -> Iterator[bytes]:
        """Yield the client's mail data to its end, without the dot-stuffing."""
        commands = self._session.client.commands
        octets = commands.take_all()
        while True:
            block = self._reader.feed(octets)
            if self._reader.ended:
                break
            yield block
            octets = self._await_octets()
        # Before the last block: the consumer may not resume this generator.
        commands.feed(self._reader.rest)
        yield block

    def _await_octets(self) -> bytes:
        """Wait for mail data, and watch the server and the shutdown meanwhile."""
        deadline = Deadline(self._config.timeout)
        seconds = 0.0
        while True:
            # These come before octets are taken: an exception would lose the octets.
            if seconds or time.monotonic() >= self._next_look:
                self._session.watch(seconds, with_server=self._watches_server)
                self._next_look = time.monotonic() + CLIENT_POLL
            if self._keep_alive.is_due:
                self._send_noop()
            octets = self._session.client.receive(BLOCK)
            if octets is not None:
                return octets
            if deadline.has_passed:
                raise self._session.client.timed_out()
            seconds = self._keep_alive.cut(deadline.left)

    def _discard_rest(self, failure: Union[FilterFailure, Refusal, ServerLost]) -> None:
        """Read mail data to its end; `Hangup` if that takes longer than TimeOut."""
        self._keep_alive.stop()
        self._watches_server = False
        deadline = Deadline(self._config.timeout)
        try:
            for _ in self._blocks():
                if deadline.has_passed and not self._reader.ended:
                    text = "client was too slow with the rest of its mail data"
                    raise Hangup(text, failure.reply)
        except Hangup:
            if not isinstance(failure, Refusal):
                self._log.error(str(failure))
            raise

    # Through the filter

    def receive(self, blocks: Iterator[bytes]) -> None:
        """Keep the message for the filter; raises `SpoolFailure`.

        With FilterMode: observe, a file that only the filter needs may fail: then
        `run_filter` reports it.
        """
        directory = self._config.temp_directory
        if self._config.filter_type is FilterType.FILE:
            with self._file_needed():
                self._file = self._keep(NamedSpool(directory, self._shared.named_files))
        file = self._file
        if file is None or self._config.keeps_original:
            self.original = self._keep(Spool(directory))
        else:
            self.original = file
        for block in blocks:
            with spool_errors():
                self.original.write(block)
            if file is not None and file is not self.original:
                with self._file_needed():
                    if self._file_failure is None:
                        file.write(block)
        self.size = self.original.size
        self._log.debug(f"wrote {self.size} bytes to cache")

    def _keep(self, spool: AnySpool) -> AnySpool:
        return self._spools.enter_context(contextlib.closing(spool))

    @contextlib.contextmanager
    def _file_needed(self) -> Iterator[None]:
        """Raise `SpoolFailure` for an OSError in here, or keep it for `run_filter`."""
        try:
            with spool_errors():
                yield
        except SpoolFailure as failure:
            if not self._config.observes:
                raise
            self._file_failure = failure

    def run_filter(self) -> None:
        """Run the filter on the message.

        Afterwards `reply` is None if the message goes on, the filter has ended, and
        why it failed, if it did, is in the log.
        """
        with contextlib.ExitStack() as running:
            try:
                self._run_command(running)
            except FilterFailure as failure:
                self._log.error(str(failure))  # before the end of the filter is logged
                self._settle_failure(failure)
        if self._config.observes:
            self.reply, self.message = None, self.original
            self.status = f"{Status.OBSERVED}: {self.status}"

    def _run_command(self, running: contextlib.ExitStack) -> None:
        """Run FilterCommand to its end and take its verdict; `running` ends it."""
        config = self._config
        if self._file_failure is not None:
            raise self._file_failure
        variables = {**self._variables, b"TMPDIR": config.temp_directory}
        if self._file is None:
            self.message = self._keep(Spool(config.temp_directory))
            run = FilterRun(self._shared, self._log, self.original, self.message)
        else:
            self.message = self._file
            run = FilterRun(self._shared, self._log)
            variables[b"EMAIL"] = self._file.path
        self.environment = filter_environment(self._shared.environment, variables)
        running.enter_context(self._shared.shutdown.listed(run))
        running.enter_context(run)
        begun = time.monotonic()
        try:
            run.start(config.filter_command, self.environment, config.filter_timeout)
            self.exit_status, last_line = run.finish(self._keep_alive, self._send_noop)
        finally:
            self.filter_seconds = time.monotonic() - begun
            self.standard_error = run.standard_error.lines
            for line in self.standard_error:
                self._log.dialogue("FILTER", "<", line)
        refusal = judge(
            self.exit_status, last_line, only_coded=config.only_coded_verdicts
        )
        self.is_bare_refusal = refusal is not None and coded_reply(last_line) is None
        if self.is_bare_refusal and self._is_ending():
            raise FilterFailure("the daemon ends")
        if self._file is None:
            read = self.message.size
            self._log.debug(f"wrote {run.given} bytes to filter, read {read} bytes")
        elif refusal is None:
            self._file.reopen()
        if refusal is None and self.size and not self.message.size:
            raise FilterFailure("filter command returned an empty message")
        run.release()
        self.reply = refusal
        self.status = refusal.text if refusal is not None else Status.FILTERED

    def _settle_failure(self, failure: FilterFailure) -> None:
        """Decide, by the setting FilterFailure, whether the message goes on."""
        self.has_failed = True
        # A filter that systemd or we have signalled to end must not let mail pass.
        if (
            self._config.passes_failures
            and not isinstance(failure, SpoolFailure)
            and self.exit_status not in _WAS_ENDED
            and not self._is_ending()
        ):
            self.message, self.status = self.original, Status.ERROR_PASSED
        else:
            self.reply, self.status = LOCAL_ERROR, Status.FILTER_ERROR

    def _is_ending(self) -> bool:
        """Return whether the daemon ends, after a moment for its signal to come.

        systemd signals the filter as well, and perhaps first.
        """
        draining = self._shared.shutdown.draining.fileno()
        return bool(await_readable(STOP_NOTICE, draining))

    # To the server

    def _send(self) -> Reply:
        """Send DATA and the message; return the server's reply."""
        server = self._session.server
        field = self._session.header_field() if self._adds_header else b""
        reply = server.ask_for_data()
        if reply.code != 354:
            if self._is_streamed:
                self._session.expect_silence()
            self._server_reply, self.status = reply, reply.text
            return reply
        if self._is_streamed:
            self._invite(reply)
            self._keep_alive.stop()  # NOOP would become mail data
            blocks = self._incoming()
        else:
            blocks = self.message.blocks()
        try:
            reply = self._transmit(blocks, field)
        except OSError as error:
            text = f"error reading cache file: {reason(error)}"
            raise Hangup(text, LOCAL_ERROR) from error
        self._is_open = False
        if not reply.is_success:
            self.status = reply.text
        return reply

    def _transmit(self, blocks: Iterator[bytes], field: bytes) -> Reply:
        """Send mail data and its end; return the server's reply to it.

        `field` is a header field to add.
        """
        session, server = self._session, self._session.server
        writer = MailDataWriter(field)
        pending = b""
        for block in blocks:
            if pending:
                server.send(pending)
            pending = writer.feed(block)
        # A client that has gone would miss the 250 and send the message again: then
        # the end of the data is held back.
        if session.client.has_gone():
            raise Hangup("client went before its message was accepted", CLIENT_GONE)
        if server.has_spoken():
            server.relay_unsolicited()
        begun = time.monotonic()  # a thread may have to wait for its turn after `send`
        server.send(pending + writer.finish())
        self._log.debug("sent email data")
        reply = self._server_reply = server.read_reply()
        self._server_seconds = time.monotonic() - begun
        if not reply.is_success and not reply.is_refusal:
            raise server.confused(reply)
        return reply

    def _send_noop(self) -> None:
        """Keep the server's connection alive; a refused NOOP is the last one."""
        reply = self._session.server.own_command(b"NOOP")
        if reply.is_success:
            self._keep_alive.restart()
        else:
            self._log.warning(f"SERVER: refused NOOP, no more KeepAlives: {reply.text}")
            self._keep_alive.stop()

    def _reset_server(self) -> None:
        """End the mail transaction at the server; `Hangup` if it goes on."""
        reply = self._session.server.own_command(b"RSET")
        if not reply.is_success:
            raise ServerLost(f"SERVER: refused RSET: {reply.text}", SERVER_CONFUSED)


# In the header section, perhaps folded (RFC 5322 section 3.6.4).
_MESSAGE_ID = re.compile(
    rb"\A(?:[^\r\n]+\r?\n)*?message-id[ \t]*:[ \t]*(?:\r?\n[ \t]+)?(<[^\r\n]*>)",
    re.IGNORECASE,
)

# SIGTERM, also as a shell reports it.
_WAS_ENDED = frozenset((-signal.SIGTERM, 128 + signal.SIGTERM))


# ---------------------------------------------------------------------------
# The session
# ---------------------------------------------------------------------------


class State(Enum):
    """The states of a session: what the next octets from the client are.

    state            event                     next state
    COMMAND          334                       AUTHENTICATION
                     DATA with an envelope     DATA
    AUTHENTICATION   any other reply           COMMAND
    DATA             the final reply           COMMAND
    any              QUIT, 421                 CLOSED

    In any state, a `Hangup` ends the session.
    """

    COMMAND = auto()  # a command line
    AUTHENTICATION = auto()  # the answer to a challenge (RFC 4954 section 4)
    DATA = auto()  # mail data, or nothing until the final reply
    CLOSED = auto()  # nothing any more


class TlsState(Enum):
    """How far the client's side is encrypted (ListenTls).

        off        OFF
        may        OFFERED  --STARTTLS--> HANDSHAKE --> HELLO_DUE --EHLO--> ENCRYPTED
        require    REQUIRED --STARTTLS--> HANDSHAKE --> HELLO_DUE --EHLO--> ENCRYPTED
        implicit   HANDSHAKE --> ENCRYPTED

    The handshake ends a transaction and a login that began in clear (RFC 3207 4.2).
    """

    OFF = auto()
    OFFERED = auto()
    REQUIRED = auto()
    HANDSHAKE = auto()  # nothing may go out in clear
    HELLO_DUE = auto()
    ENCRYPTED = auto()


_WITH_TLS = (TlsState.HANDSHAKE, TlsState.HELLO_DUE, TlsState.ENCRYPTED)
# By state: the refusals of some verbs (None: the verb passes) and that of all others.
# BDAT passes, since `_bdat` must end the session.  HANDSHAKE reads no commands.
_TLS_REFUSALS: dict[
    TlsState, tuple[Mapping[bytes, Optional[Reply]], Optional[Reply]]
] = {
    TlsState.OFF: ({}, None),
    # If the server's side is encrypted, the server offers AUTH for passwords in clear.
    TlsState.OFFERED: (dict.fromkeys(AUTH_VERBS, AUTH_NEEDS_TLS), None),
    TlsState.REQUIRED: (
        dict.fromkeys((b"EHLO", b"HELO", b"NOOP", b"QUIT", b"STARTTLS", b"BDAT")),
        TLS_REQUIRED,
    ),
    TlsState.HELLO_DUE: (
        dict.fromkeys((b"EHLO", b"HELO", b"NOOP", b"RSET", b"QUIT", b"BDAT")),
        HELLO_FIRST,
    ),
    TlsState.ENCRYPTED: ({b"STARTTLS": IS_ENCRYPTED}, None),
}
_FIRST_TLS_STATES = {
    TlsMode.OFF: TlsState.OFF,
    TlsMode.MAY: TlsState.OFFERED,
    TlsMode.REQUIRE: TlsState.REQUIRED,
    TlsMode.IMPLICIT: TlsState.HANDSHAKE,
}


class XclientState(Enum):
    """Whether the server has the client's address by XCLIENT."""

    DUE = auto()
    TRIED = auto()  # in vain, since it was not offered; a later EHLO may find it
    DONE = auto()  # sent, or refused, or not wanted


MAX_ERRORS = 100  # commands that we refuse in a session, before it ends
MAX_ERRORS_IN_A_ROW = 20
# Replies to XCLIENT that refuse the command, or us, but not the client.
XCLIENT_UNAVAILABLE = frozenset((500, 501, 502, 503, 504, 550))
# Attributes to assume if there was no EHLO reply to list them.  Without NAME the server
# would keep our own host's name for the client.
XCLIENT_UNLISTED = frozenset((b"NAME",))


class Session:
    """The relay between one client and the server, from the greeting to QUIT."""

    def __init__(
        self, number: int, sock: socket.socket, sockaddr: Any, shared: Shared
    ) -> None:
        """`number` is the session's in the log.  OSError if the client has gone."""
        self.shared = shared
        self.config = shared.config
        self.log = shared.log.of_session(number)
        self.client = ClientChannel(sock, self.config.timeout, self.log)
        self.client_peer = Peer.of(sockaddr)
        self._local_peer: Optional[Peer] = None  # from a PROXY header, as the next one
        self._outer_tls = ""
        self.server: ServerChannel  # from `_connect` on, as the next one
        self.server_peer: Peer
        self._state = State.COMMAND
        self._tls = _FIRST_TLS_STATES[self.config.listen_tls]
        self._envelope = Envelope()
        self._xclient_state = (
            XclientState.DUE if self.config.xclient else XclientState.DONE
        )
        # The server's, for HELO, EHLO and MAIL from now on.
        self._xclient_refusal: Optional[Reply] = None
        self._is_authenticated = False
        self._server_has_size = False
        self._errors = 0  # of the client, since the start
        self._errors_in_a_row = 0
        # What is logged once a session.
        self._has_logged_privileged = False
        self._has_logged_rejection = False
        self._has_said_last_word = False

    @property
    def local_peer(self) -> Peer:
        """The end of the connection that the client connected to."""
        return self._local_peer or self.client.local_peer()

    @property
    def client_cipher(self) -> str:
        """Protocol and cipher of the client's side; empty if it is in clear."""
        return self.client.tls or self._outer_tls

    def run(self) -> None:
        """Relay until one side, or the shutdown, ends the session."""
        try:
            level = INFO
            if self.config.proxy_protocol and self._read_proxy_header().is_check:
                level = DEBUG  # each line would be like the others
            self.log.write(level, f"accepted connection from: {self.client_peer.host}")
            if self._tls is TlsState.HANDSHAKE:
                self._encrypt_client()
                self._tls = TlsState.ENCRYPTED
            greeting = self._open_server()
            with contextlib.closing(self.server):
                self._relay_greeting(greeting)
                while self._state is not State.CLOSED:
                    self._handle_line()
                self.client.flush()
                if self.client.has_spoken():
                    self.client.linger()
        except Hangup as hangup:
            self.say_last_word(hangup)
            self.log.write(hangup.level, str(hangup))
            if hangup.reply is not None:
                is_late = self.shared.shutdown.stopping.is_set
                self.client.linger(LAST_GRACE if is_late else LINGER)
        except Exception:
            if self._tls in _WITH_TLS:  # `Listener` can reach clients in clear only
                self.client.close()
            raise
        self.client.close()

    def say_last_word(self, hangup: Hangup) -> None:
        """Give the client the reply of a `Hangup`, if it has one; only once."""
        is_mute = self._has_said_last_word or self._tls is TlsState.HANDSHAKE
        if hangup.reply is not None and not is_mute:
            self._has_said_last_word = True
            with contextlib.suppress(ClientLost):
                self.client.answer(hangup.reply)
                self.client.flush()

    # The start

    def _read_proxy_header(self) -> ProxyHeader:
        """Learn who the client is from the header before its first octet."""
        deadline = Deadline(self.config.timeout)
        draining = self.shared.shutdown.draining.fileno()
        source = self.client_peer.host
        octets = b""
        header = None
        try:
            while header is None:
                ready = await_readable(deadline.left, self.client.fileno(), draining)
                if not ready:
                    raise Hangup(f"no PROXY header from {source} in time")
                if draining in ready:
                    raise ShuttingDown
                octets += self.client.receive() or b""
                header = ProxyHeader.parse(octets)
        except BadProxyHeader as error:
            raise Hangup(f"bad PROXY header from {source}: {error}") from error
        except ClientLost:
            # Perhaps a port scan, which no other line would show.
            self.log.info(f"no PROXY header from {source}: closed")
            raise
        self.client.commands.feed(octets[header.length :])
        if header.client is not None:
            self.log.debug(f"PROXY header from: {source}")
            self.client_peer, self._local_peer = header.client, header.local
            self._outer_tls = header.tls
        return header

    def _open_server(self) -> Reply:
        """Connect to the server, encrypted as OutTls wants it; return its greeting.

        The client has not been greeted yet, so that each failure, a `ServerLost`, is a
        clean 421.
        """
        mode = self.config.out_tls
        self._connect()
        try:
            if mode is TlsMode.IMPLICIT:
                try:
                    self._encrypt_server()
                except TlsFailure as fault:
                    text = f"couldn't start TLS: {fault}"
                    raise self._not_encrypted(text) from fault
            greeting = self.server.read_reply()
            if greeting.code == 220 and mode in _BY_STARTTLS:
                greeting = self._start_server_tls(greeting)
        except Hangup:
            self.server.close()
            raise
        return greeting

    def _start_server_tls(self, greeting: Reply) -> Reply:
        """Encrypt the server's side by STARTTLS (RFC 3207), or go on without (may).

        Returns the greeting, which is another one if it took another connection.
        """
        is_optional = self.config.out_tls is TlsMode.MAY
        hello = self.server.own_command(b"EHLO " + HELLO)
        if offered_attributes(hello, b"STARTTLS") is None:
            if not is_optional:
                raise self._not_encrypted("doesn't offer STARTTLS")
            return greeting
        reply = self.server.own_command(b"STARTTLS")
        if self.server.has_buffered_reply:
            # An attacker may have added octets, to be read as if they came encrypted.
            raise self._not_encrypted("more came after the reply to STARTTLS")
        if reply.code != 220:
            failure = self._not_encrypted(f"refused STARTTLS: {reply.text}")
            if not is_optional:
                raise failure
            self.log.warning(str(failure))
            return greeting
        try:
            self._encrypt_server()
        except TlsFailure as fault:
            failure = self._not_encrypted(f"couldn't start TLS: {fault}")
            if not is_optional:
                raise failure from fault
            self.log.warning(f"{failure}; going on without")
            self.server.close()
            self._connect()
            return self.server.read_reply()
        return greeting

    def _encrypt_server(self) -> None:
        """Shake hands with the server; `TlsFailure` if that fails."""
        context, draining = self.config.server_tls, self.shared.shutdown.draining
        assert context is not None  # load_config sees to it
        self.server.encrypt(context, self.config.server_name, draining.fileno())

    @staticmethod
    def _not_encrypted(why: str) -> ServerLost:
        return ServerLost(f"SERVER: {why}", CANNOT_ENCRYPT)

    def _connect(self) -> None:
        """Connect to the server; `ServerLost` if that fails."""
        address = self._server_address()
        is_full = self.config.transparent_proxy is Transparency.FULL
        source = self.client_peer.host if is_full else ""
        try:
            targets = resolve(address, address.host)
            # `_original_destination` has a check of its own.
            if not self.config.is_transparent and leads_to_listener(
                targets, self.shared.listening_on
            ):
                raise ServerLost(f"loop detected: {OWN_LISTENER}", NO_SERVER)
            sock, sockaddr = connect(targets, self.config.timeout, source)
            self.server = ServerChannel(
                sock, self.config.timeout, self.log, self.client
            )
        except OSError as error:
            where = shown(address.text)
            text = f"SERVER: couldn't connect to: {where}: {reason(error)}"
            raise ServerLost(text, NO_SERVER) from error
        # Not asked of the socket: the server may have reset it by now.
        self.server_peer = Peer.of(sockaddr)
        self.log.debug(f"SERVER connected to: {self.server_peer.host}")

    def _server_address(self) -> Address:
        """Return OutAddress, or the address that stands in for it."""
        if self.config.is_transparent:
            return self._original_destination()
        address = self.config.out_address
        assert address is not None  # parse_config sees to it
        if not address.is_any:
            return address
        if not self.client_peer.host:
            raise ServerLost("no address to connect back to", NO_SERVER)
        return address._replace(host=self.client_peer.host)

    def _original_destination(self) -> Address:
        """Return the address that the client of a transparent proxy connected to."""
        try:
            if not self.client_peer.host:
                raise OSError(errno.EAFNOSUPPORT, "a unix socket has no destination")
            if self.config.transparent_proxy is Transparency.FULL:
                host, port = self.local_peer
            else:
                host, port = self.client.original_destination(self.client_peer)
            family, name = self.shared.listening_on
            is_our_port = family != socket.AF_UNIX and port == name[1]
            leads_back = is_our_port and is_own_address(host)
        except OSError as error:
            text = "couldn't get source address for transparent proxying"
            raise ServerLost(f"{text}: {reason(error)}", NO_DESTINATION) from error
        if leads_back:
            raise ServerLost("loop detected in transparent proxying", NO_DESTINATION)
        text = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        return Address(text, host, port)

    def _relay_greeting(self, greeting: Reply) -> None:
        if not greeting.is_success and not greeting.is_refusal:
            text = f"SERVER: unusable greeting: {greeting.text}"
            raise ServerLost(text, SERVER_CONFUSED)
        self.answer(hide_greeting(greeting) if greeting.code == 220 else greeting)

    # Lines from the client

    def answer(self, reply: Reply) -> None:
        """Give the client a reply; 421 ends the session (RFC 5321 section 3.8)."""
        self.client.answer(reply)
        if reply.code == 421:
            self._state = State.CLOSED

    def _handle_line(self) -> None:
        """Wait for a command, or for the answer to a challenge, and answer it."""
        try:
            line = self._next_line()
            if self._state is State.AUTHENTICATION:
                check_octets(line)
                reply = self._authenticate(line, b"[...]")
            else:
                command = self._parse(line)
                self.log.dialogue("CLIENT", "<", command.log_as)
                self._check_tls(command.verb)
                verb = VERBS.get(command.verb, UNKNOWN_VERB)
                reply = getattr(self, verb.handler)(command)
        except Refusal as refusal:
            self._refuse(refusal)
        else:
            self._errors_in_a_row = 0
            if reply is not None:
                self.answer(reply)

    def _next_line(self) -> bytes:
        """Return the client's next line without CRLF.

        Replies are flushed before anything is waited for.  Raises `Refusal` for a
        line that is no command line.
        """
        if self.shared.shutdown.draining.is_set:
            raise ShuttingDown
        while True:
            is_answer = self._state is State.AUTHENTICATION
            line = self.client.commands.next_line(is_answer=is_answer)
            if line is not None:
                return line
            self.client.flush()
            if self.server.has_buffered_reply:
                self.server.relay_unsolicited(client_waits=False)
            if self.client.commands:  # a client may send its line octet by octet
                self.watch(0)
            octets = self.client.receive()
            deadline = Deadline(self.config.timeout)  # also for a whole TLS record
            while octets is None:
                if not self.watch(deadline.left):
                    raise self.client.timed_out()
                octets = self.client.receive()
            self.client.commands.feed(octets)

    def watch(self, seconds: float, *, with_server: bool = True) -> bool:
        """Wait until the client sends something; return False if the time is over.

        Raises `Hangup` when the server sends an unsolicited reply, or when the shutdown
        leaves this session no more time.
        """
        is_idle = self._state is not State.DATA
        shutdown = self.shared.shutdown
        end = (shutdown.draining if is_idle else shutdown.stopping).fileno()
        client, server = self.client.fileno(), self.server.fileno()
        others = (end, server) if with_server else (end,)
        deadline = Deadline(seconds)
        while True:
            ready = await_readable(deadline.left, client, *others)
            if end in ready:
                raise ShuttingDown
            if server not in ready:
                return client in ready
            # TLS has messages of its own, such as session tickets.
            if self.server.has_spoken():
                self.server.relay_unsolicited(client_waits=not is_idle)
            if deadline.has_passed:
                return client in ready

    def _check_tls(self, verb: bytes) -> None:
        """Refuse what has to wait for TLS, or comes too late."""
        refusals, of_others = _TLS_REFUSALS[self._tls]
        refusal = refusals.get(verb, of_others)
        if refusal is None:
            return
        if verb == b"DATA":
            self._refuse_data(refusal)
        raise Refusal(refusal)

    def _parse(self, line: bytes) -> Command:
        """Parse a command line; one that is refused is logged here."""
        try:
            return Command.parse(line)
        except Refusal:
            # Its first word is enough: the others may be a password.
            word = _VERB.match(line[:REPLY_LINE_LIMIT])
            assert word is not None  # the pattern matches anything
            self.log.dialogue("CLIENT", "<", word[1] + b" [...]")
            raise

    def _refuse(self, refusal: Refusal) -> None:
        """Answer what we refuse ourselves; `Hangup` after too many errors."""
        if self._state is State.AUTHENTICATION:
            self._cancel_authentication()
        self.answer(refusal.reply)
        if refusal.is_error:
            self._errors += 1
            self._errors_in_a_row += 1
            if (
                self._errors >= MAX_ERRORS
                or self._errors_in_a_row >= MAX_ERRORS_IN_A_ROW
            ):
                raise Hangup("client made too many errors", TOO_MANY_ERRORS)

    def _cancel_authentication(self) -> None:
        """Cancel the exchange, whose challenge stays unanswered (RFC 4954)."""
        self._state = State.COMMAND
        self.server.own_command(b"*")

    # The handlers of `VERBS`: each returns the reply, or None if the client has it, and
    # raises `Refusal` to refuse the command, or `Hangup` to end the session.

    def _relay(self, command: Command) -> Reply:
        return self._ask_server(command.line, command.log_as)

    def _ask_server(self, line: bytes, log_as: bytes) -> Reply:
        """Relay a line; 334 to any command begins an authentication (RFC 4954)."""
        reply = self.server.ask(line, log_as)
        is_challenge = reply.code == 334
        self._state = State.AUTHENTICATION if is_challenge else State.COMMAND
        return reply

    def _auth(self, command: Command) -> Reply:
        return self._authenticate(command.line, command.log_as)

    def _authenticate(self, line: bytes, log_as: bytes) -> Reply:
        """Relay AUTH, or the answer to a challenge."""
        reply = self._ask_server(line, log_as)
        if reply.code == 235:
            self._is_authenticated = True
            self.log.debug("Client authenticated successfully")
        return reply

    def _helo(self, command: Command) -> Reply:
        """Relay HELO or EHLO; after the first, send XCLIENT."""
        self._check_xclient_refusal()
        is_extended = command.verb == b"EHLO"
        reply = self._relay(command)
        ehlo_reply = reply if is_extended else None
        if reply.code == 250 and self._send_xclient(command, ehlo_reply):
            # The server is back at its greeting, and may offer other things.
            reply = self._relay(command)
        if reply.code != 250:
            return reply
        self._envelope = Envelope()
        self._server_has_size = offered_attributes(reply, b"SIZE") is not None
        if self._tls is TlsState.HELLO_DUE:
            self._tls = TlsState.ENCRYPTED
        return rewrite_hello(
            reply,
            extended=is_extended,
            size=self.config.max_message_size,
            starttls=self._tls in (TlsState.OFFERED, TlsState.REQUIRED),
        )

    def _starttls(self, command: Command) -> None:
        """Encrypt the client's side; what came before is forgotten (RFC 3207)."""
        if self._tls is TlsState.OFF:
            self._not_implemented(command)
        if command.argument:
            raise Refusal(STARTTLS_ARGUMENT)
        if self.client.has_spoken():
            # These octets would be taken for a command that came encrypted.
            text = "client sent more after STARTTLS"
            raise Hangup(text, WAIT_FOR_STARTTLS)
        self.answer(READY_FOR_TLS)
        self.client.flush()
        self._tls = TlsState.HANDSHAKE
        self._encrypt_client()
        # The client has to send EHLO next, which resets the server, too.
        self._envelope = Envelope()
        self._is_authenticated = False
        self._tls = TlsState.HELLO_DUE

    def _encrypt_client(self) -> None:
        """Shake hands with the client; if that fails, end without a word in clear."""
        context, draining = self.config.client_tls, self.shared.shutdown.draining
        assert context is not None  # load_config sees to it
        try:
            self.client.encrypt(context, draining.fileno())
        except (TlsFailure, ShuttingDown) as failure:
            raise Hangup(f"CLIENT: couldn't start TLS: {failure}") from failure
        self.shared.statistics.count("encrypted")

    def _send_xclient(
        self, hello: Optional[Command], ehlo_reply: Optional[Reply]
    ) -> bool:
        """Send the client's address by XCLIENT; return whether it was accepted.

        `hello` is the client's HELO or EHLO, if it has sent one.  Without a reply to
        EHLO nobody knows what the server offers: then XCLIENT is worth one try.
        Raises `Refusal` with the server's reply if that is about the client.
        """
        if self._xclient_state is XclientState.DONE:
            return False
        offered = None
        if ehlo_reply is not None:
            offered = offered_attributes(ehlo_reply, b"XCLIENT")
        if offered is not None:
            self._xclient_state = XclientState.DONE
        elif self._xclient_state is XclientState.TRIED:
            return False
        else:
            self._xclient_state = XclientState.TRIED
            if ehlo_reply is not None:
                self.log.warning("server didn't offer XCLIENT")
                return False
            offered = XCLIENT_UNLISTED
        peers = self.client_peer, self.local_peer
        line = xclient_command(offered, *peers, hello)
        shortest = xclient_command(frozenset(), *peers, None)
        reply = self.server.ask(line)
        if reply.code == 501 and line != shortest:
            # The server does not like an attribute, such as the client's HELO.
            reply = self.server.ask(shortest)
        if reply.is_success:
            self._xclient_state = XclientState.DONE
            self._is_authenticated = False  # the server has started the session again
        elif reply.code in XCLIENT_UNAVAILABLE:
            self.log.warning("server didn't accept XCLIENT")
        else:
            self._xclient_refusal = reply
            self._check_xclient_refusal()
        return reply.is_success

    def _check_xclient_refusal(self) -> None:
        """Refuse a client whose address the server has refused.

        What the server says to the next command might be something else, and make
        a temporary refusal permanent.
        """
        if self._xclient_refusal is not None:
            raise Refusal(self._xclient_refusal, is_error=False)

    def _begin_envelope(self) -> None:
        """Note that MAIL or RCPT has come; `Refusal` with FilterType: reject."""
        self._envelope.has_begun = True
        if self._rejects:
            raise Refusal(self.config.filter_reject, is_error=False)

    def _mail(self, command: Command) -> Reply:
        self._begin_envelope()
        # Not every server insists on EHLO, but each must know whose mail it is.
        self._send_xclient(None, None)
        self._check_xclient_refusal()
        path = read_path(command.argument, b"FROM")
        if self.config.max_message_size:
            others, size = take_size(path.parameters)
            if size > self.config.max_message_size:
                raise Refusal(TOO_LARGE, is_error=False)
            if not self._server_has_size and others != path.parameters:
                # Only we offered SIZE; the server does not know it.
                path = path._replace(parameters=others, is_plain=False)
        reply = self._relay(path.spell(command, b"MAIL FROM:"))
        if reply.is_success:
            self._envelope.begin(path.address)
        return reply

    def _rcpt(self, command: Command) -> Reply:
        self._begin_envelope()
        path = read_path(command.argument, b"TO")
        has_filter = self.config.has_filter and not self._skips
        if has_filter and not self._envelope.has_room_for(path.address):
            # The client sends the rest in another transaction (RFC 5321 4.5.3.1.10).
            raise Refusal(TOO_MANY_RECIPIENTS, is_error=False)
        reply = self._relay(path.spell(command, b"RCPT TO:"))
        if reply.is_success:
            self._envelope.add_recipient(path.address)
        return reply

    def _data(self, command: Command) -> None:
        if command.argument:
            self._refuse_data(DATA_ARGUMENT)
        if self._rejects:
            self._log_rejection()
            self._refuse_data(self.config.filter_reject)
        if not self._envelope.is_complete:
            self._refuse_data(NO_TRANSACTION)
        envelope, self._envelope = self._envelope, Envelope()
        unfiltered_status = None
        if not self.config.has_filter:
            unfiltered_status = Status.PASSED
        elif self._skips:
            unfiltered_status = Status.SKIPPED
        self._state = State.DATA
        variables = envelope.filter_variables(
            self.client_peer, self.server_peer, self.client_cipher
        )
        transaction = Transaction(self.shared, self.log, variables)
        transaction.run(self, envelope, unfiltered_status)
        if self._state is State.DATA:
            self._state = State.COMMAND

    def _rset(self, command: Command) -> Reply:
        reply = self._relay(command)
        if reply.is_success:
            self._envelope = Envelope()
        return reply

    def _quit(self, command: Command) -> Reply:
        reply = self._relay(command)
        if reply.is_success:
            self._state = State.CLOSED
        return reply

    def _xforward(self, command: Command) -> Reply:
        reply = self._relay(command)
        if reply.is_success:
            self._envelope.add_xforward(parse_xforward(command.argument))
        return reply

    def _privileged(self, command: Command) -> NoReturn:
        if not self._has_logged_privileged:
            self._has_logged_privileged = True
            verb = printable(command.verb)
            text = f"client attempted use of privileged {verb} feature"
            self.log.warning(text)
        raise Refusal(INSUFFICIENT_AUTHORIZATION)

    def _not_implemented(self, _command: Command) -> NoReturn:
        self.log.debug("ESMTP feature not supported")
        raise Refusal(NOT_IMPLEMENTED)

    def _bdat(self, _command: Command) -> NoReturn:
        # What follows is mail data, not commands (RFC 3030 section 2).
        raise Hangup("client sent BDAT, which was not offered", NOT_IMPLEMENTED)

    # DATA

    @property
    def _skips(self) -> bool:
        """Whether Skip exempts this client from the filter."""
        return self.config.skip_authenticated and self._is_authenticated

    @property
    def _rejects(self) -> bool:
        return self.config.filter_type is FilterType.REJECT and not self._skips

    def _log_rejection(self) -> None:
        """Count a DATA despite FilterReject, and log the first of a session."""
        self.shared.statistics.note_message(Status.REJECTED, 0)
        if not self._has_logged_rejection:
            self._has_logged_rejection = True
            self.log_message(self._envelope, Status.REJECTED)

    def _refuse_data(self, reply: Reply) -> NoReturn:
        """Refuse DATA; a client may pipeline it after a refused MAIL or RCPT."""
        self.expect_silence()
        is_error = not self._envelope.has_begun
        self._envelope.has_begun = False  # it excuses one DATA
        raise Refusal(reply, is_error=is_error)

    def expect_silence(self) -> None:
        """Raise `Hangup` if the client has already sent more after a refused DATA.

        That is mail data of a client that does not wait for 354, and must not be read
        as commands.
        """
        if self.client.has_spoken():
            raise Hangup("client sent mail data after a refused DATA", UNEXPECTED_DATA)

    def header_field(self) -> bytes:
        """Return the field that Header adds to a message now; empty for none."""
        if not self.config.header:
            return b""
        return expand_header(
            self.config.header,
            self.client_peer.host,
            self.local_peer.host,
            rfc5322_date(time.time()),
            self.client_cipher,
        )

    def log_message(self, envelope: Envelope, status: str) -> None:
        """Log a message: one line, or more for many recipients."""
        for line in envelope.describe(self.client_peer.host, status):
            self.log.info(line)


# ---------------------------------------------------------------------------
# The listener
# ---------------------------------------------------------------------------


LISTEN_QUEUE = 1024
MEMORY_MARGIN = 4 * 1024 * 1024  # octets that must be free to start a session
ACCEPT_PAUSE = 0.2  # seconds without accepting when the system is exhausted
LATE_START_CHECK = 1.0  # seconds between checks for programs that do not begin


NEXT_CALL = 1.0  # seconds that a thread waits for the next call


class Threads:
    """Runs each call of a function in a thread, new or waiting for its next call.

    A new thread costs some 40 us more, which is a twentieth of a short session.
    """

    def __init__(self, function: Callable[..., None]) -> None:
        self._function = function
        # The last to wait is the first to go on, so that the others may end.
        self._waiting: list[queue.SimpleQueue[tuple[Any, ...]]] = []

    def start(self, *arguments: Any) -> None:
        """Call the function in a thread; RuntimeError if none can be started."""
        try:
            calls = self._waiting.pop()
        except IndexError:
            # Not threading.Thread, whose start waits until the thread runs.
            _thread.start_new_thread(self._run, arguments)
        else:
            calls.put(arguments)

    def _run(self, *arguments: Any) -> None:
        while True:
            self._function(*arguments)
            calls: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
            self._waiting.append(calls)
            try:
                arguments = calls.get(timeout=NEXT_CALL)
            except queue.Empty:
                try:
                    self._waiting.remove(calls)
                    return
                except ValueError:  # `start` was faster
                    arguments = calls.get()


class Listener(socketserver.ThreadingTCPServer):
    """Accepts connections and gives each a thread and a `Session`.

    It is bound once, and then served by this process or by each worker: `attach`,
    `serve` until a signal comes, `end`.  A connection beyond MaxConnections, or one
    that the system has no resources for, is refused and closed.
    """

    allow_reuse_address = True
    request_queue_size = LISTEN_QUEUE

    def __init__(
        self,
        config: Config,
        log: Log,
        limit: ConnectionLimit,
        passed: Optional[socket.socket] = None,
    ) -> None:
        """Bind and listen, unless a listening socket was `passed` to this process.

        Raises `SystemRefused` if that fails.
        """
        self._config = config
        self._log = log
        self._limit = limit
        self.shared: Shared  # from `attach` on, as the next one
        self._signals: Signals
        # Given up when no descriptor is left, so that one more connection can be
        # accepted and refused.
        self._spare: Optional[int] = None
        self._take_spare()
        self._session_threads = Threads(self.process_request_thread)
        self._is_exhausted = False  # and the log has said so
        self._is_closing = False  # and waits for the sessions
        self._owner = os.getpid()  # removes the file of a Unix socket
        self._socket_file: Optional[os.stat_result] = None  # of a Unix socket
        try:
            if passed is not None:
                self.address_family = passed.family
                super().__init__(("", 0), SessionHandler, bind_and_activate=False)
                self.socket.close()
                self.socket = passed
                self.server_address = passed.getsockname()
                self._allow_transparency()
            else:
                self.address_family, sockaddr = listen_target(config.listen)
                super().__init__(sockaddr, SessionHandler)
            # A connection that poll has seen may have gone when it is accepted.
            self.socket.setblocking(False)
        except OSError as error:
            where = shown(config.listen.text)
            text = f"couldn't bind to address: {where}: {reason(error)}"
            raise SystemRefused(text) from error
        self._log.debug(f"created socket: {shown(config.listen.text)}")

    def server_bind(self) -> None:
        is_unix = self.address_family == socket.AF_UNIX
        path = to_octets(self._config.listen.path)
        if is_unix:
            remove_stale_socket(path)
        elif self.server_address[0] == "::":
            # OpenBSD does not have it.
            with contextlib.suppress(OSError):
                self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        self._allow_transparency()
        super().server_bind()
        if is_unix:
            self._socket_file = os.lstat(path)

    def _allow_transparency(self) -> None:
        is_full = self._config.transparent_proxy is Transparency.FULL
        if is_full and self.address_family != socket.AF_UNIX:
            try:
                be_transparent(self.socket)
            except PermissionError as error:
                raise SystemRefused(NEEDS_NET_ADMIN) from error

    def server_close(self) -> None:
        """Stop listening; a Unix socket's file is removed first, if it is still ours.

        While we listen nobody else takes its place, and its inode stays in use.
        """
        if self._socket_file is not None and os.getpid() == self._owner:
            path = to_octets(self._config.listen.path)
            # Where the directory is root's, it stays and is replaced next time.
            with contextlib.suppress(OSError):
                if os.path.samestat(os.lstat(path), self._socket_file):
                    os.unlink(path)
            self._socket_file = None
        super().server_close()

    def take_ownership(self) -> None:
        """Let this process remove a Unix socket's file, not the one that bound it."""
        self._owner = os.getpid()

    def attach(self, shared: Shared, signals: Signals) -> None:
        """Serve connections from now on with these settings."""
        self._log.debug("accepting connections")
        self.shared = shared
        self._config = shared.config
        self._signals = signals

    # Accepting

    @property
    def connections(self) -> int:
        """The number of sessions in this process."""
        return self._limit.own

    def serve(self, supervisor: int = -1) -> None:
        """Accept connections until a signal comes.

        That counts as SIGTERM if `supervisor`, a descriptor, hangs up.
        """
        self._poll(supervisor, self.fileno())

    def finish_sessions(self, supervisor: int) -> None:
        """Accept no more; return when a signal comes or a session has ended."""
        self._is_closing = True  # from now on each session that ends wakes us
        self.socket.close()
        if self.connections:
            self._poll(supervisor, -1)

    def _poll(self, supervisor: int, listening: int) -> None:
        poller = select.poll()
        for descriptor in (self._signals.fileno(), supervisor, listening):
            if descriptor >= 0:
                poller.register(descriptor, select.POLLIN)
        while True:
            self.shared.shutdown.end_late_starts()
            seconds = LATE_START_CHECK if self.connections else None
            for ready, _ in poller.poll(seconds and seconds * 1000):
                if ready == listening:
                    self._accept()
                else:
                    if ready == supervisor:
                        self._signals.count = max(self._signals.count, 1)
                    self._signals.drain()
                    return

    def _accept(self) -> None:
        """Accept a connection; where the system is exhausted, refuse it or wait."""
        try:
            request, sockaddr = self.get_request()
            self._is_exhausted = False
            self._take_spare()
            self.process_request(request, sockaddr)
        except OSError as error:
            if error.errno in _CONNECTION_GONE:
                return
            was_refused = self._refuse_with_spare()
            if not self._is_exhausted:  # one line for all connections that it hits
                self._is_exhausted = True
                self._log.error(f"couldn't accept a connection: {reason(error)}")
            if not was_refused:
                # To try again at once would change nothing.  A signal must stay for
                # `_poll` to see.
                await_readable(ACCEPT_PAUSE, self._signals.fileno())

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start a session in a thread of its own, if there is room for it."""
        most = self._config.max_connections
        number = self._limit.take(most)
        if not number:
            text = f"too many connections open (max {most}). sent busy response"
            self._log.warning(text)
            self._refuse(request, BUSY)
            self.shared.statistics.count("refused")
            return
        try:
            # Sessions must not take all memory: without any, CPython's handling of an
            # exception may start again and again.
            mmap.mmap(-1, MEMORY_MARGIN, mmap.MAP_PRIVATE).close()
            # The session gets both as socketserver's client_address.
            self._session_threads.start(request, (number, client_address))
            self.shared.statistics.count("accepted")
        except (OSError, RuntimeError, MemoryError) as error:
            self._limit.give_back()
            what = reason(error) if isinstance(error, OSError) else error
            self._log.error(f"couldn't create thread: {what}")
            self._refuse(request, NO_THREAD)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._limit.give_back()
            if self._is_closing:
                self._signals.wake()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Refuse a client whose session failed by a fault of ours."""
        self._refuse(request, NO_RESOURCES)
        number, _ = client_address
        log_fault(self._log.of_session(number), "session", *sys.exc_info())

    def shutdown_request(self, request: Any) -> None:
        """Close a connection; a session has done all that comes before."""
        self.close_request(request)

    # Refusing

    def _refuse(self, request: socket.socket, reply: Reply) -> None:
        # A reply in clear would be no TLS.
        with contextlib.suppress(OSError):
            if self._config.listen_tls is not TlsMode.IMPLICIT:
                request.sendall(reply, socket.MSG_DONTWAIT)
            request.recv(SMALL_BLOCK, socket.MSG_DONTWAIT)
        self.shutdown_request(request)

    def _take_spare(self) -> None:
        if self._spare is None:
            with contextlib.suppress(OSError):
                self._spare = open_null()

    def _refuse_with_spare(self) -> bool:
        """Refuse a connection with the spare descriptor; return whether it worked."""
        if self._spare is None:
            self._take_spare()
            return False
        os.close(self._spare)
        self._spare = None
        try:
            request, _ = self.get_request()
        except OSError:
            return False
        self._refuse(request, NO_RESOURCES)
        self._take_spare()
        return True

    # The end

    def end(self) -> None:
        """Stop listening, and shut the sessions and their filters down."""
        self._log.debug("waiting for threads to quit")
        self._is_closing = True
        self.server_close()
        self.shared.shutdown.drain()
        self._await_sessions(DATA_GRACE)
        self.shared.shutdown.stop()
        self._await_sessions(FILTER_GRACE)
        self.end_now()

    def end_now(self) -> None:
        """Kill all filters, and give the sessions `LAST_GRACE` to end."""
        self._is_closing = True
        self.server_close()
        self.shared.shutdown.kill()
        self._await_sessions(LAST_GRACE, signals=math.inf)
        for path in tuple(self.shared.named_files):
            with contextlib.suppress(OSError):
                remove(path)

    def _await_sessions(self, seconds: float, signals: float = 2) -> None:
        """Wait until no session is left, `signals` have come, or the time is over."""
        deadline = Deadline(seconds)
        while (
            self.connections
            and self._signals.count < signals
            and not deadline.has_passed
        ):
            self._signals.wait(deadline.left)


class SessionHandler(socketserver.BaseRequestHandler):
    """Runs the session of a connection, in its thread."""

    server: Listener

    def handle(self) -> None:
        number, sockaddr = self.client_address
        shared = self.server.shared
        try:
            session = Session(number, self.request, sockaddr, shared)
        except OSError as error:
            # Some systems report only now that the client has gone.
            shared.log.of_session(number).debug(f"client gone: {reason(error)}")
        else:
            session.run()


# accept reports what happened to a connection while it waited (accept(2)).
_CONNECTION_GONE = frozenset(
    (errno.ECONNABORTED, errno.EAGAIN, errno.EPROTO, errno.ECONNRESET, errno.EPERM)
)


def remove_stale_socket(path: bytes) -> None:
    """Remove a unix socket that nobody listens on any more.

    Raises OSError if somebody does, or if it is no socket; then it stays.
    """
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise FileExistsError(errno.EEXIST, "a file that is no socket is there")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)  # its queue may be full
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except BlockingIOError:
            pass
    raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))


# ---------------------------------------------------------------------------
# The supervisor and its workers
# ---------------------------------------------------------------------------


class Worker:
    """What the supervisor knows of a worker process."""

    def __init__(self, pid: int, number: int, row: int, reports: int) -> None:
        self.pid = pid
        self.number = number  # among the workers of its configuration
        self.row = row  # of `ConnectionLimit`
        self.reports = reports  # a pipe for its statistics, which ends with it
        os.set_blocking(reports, False)
        # A child of the worker holds the pipe open until the filter is executed.
        self.end = -1  # the worker's pidfd, readable when it has ended; -1: none
        with contextlib.suppress(AttributeError, OSError):
            self.end = os.pidfd_open(pid)
        self.is_retired = False  # it only finishes its sessions
        self.is_asked = False  # for a report
        self.snapshot = b""  # the last report
        self._received = b""

    def signal(self, *numbers: int) -> None:
        """Send it signals, if it has not ended yet."""
        for number in numbers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def receive(self) -> bool:
        """Take what has come through the pipe; return False at its end."""
        try:
            octets = os.read(self.reports, PIPE_BLOCK)
        except BlockingIOError:
            return True
        self._received += octets
        while len(self._received) >= 4:
            end = 4 + int.from_bytes(self._received[:4], "big")
            if len(self._received) < end:
                break
            self.snapshot, self._received = self._received[4:end], self._received[end:]
            self.is_asked = False
        return bool(octets)

    def close(self) -> None:
        """Close its descriptors."""
        os.close(self.reports)
        if self.end >= 0:
            os.close(self.end)


FORK_PAUSE = 0.25  # seconds between two workers that replace others
REPORT_PATIENCE = 1.0  # seconds for the workers to report their statistics
WORKERS_GRACE = 0.4  # seconds from SIGQUIT to SIGKILL for the workers


class Supervisor:
    """Forks workers, replaces those that die, and passes signals on to them.

        SIGTERM, SIGINT   close the pipe that the workers watch; each ends in good order
        a second one      SIGQUIT to the workers, which end at once
        SIGUSR1           the same to each worker, and one report of their answers
        SIGHUP            fork workers with the new configuration, and SIGUSR2 to the
                          old ones, which finish their sessions and end

    If the supervisor dies, the workers see the end of the same pipe.  The supervisor
    has one thread only, since a fork copies no other.
    """

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._listener = daemon.listener
        self._limit = daemon.limit
        self._signals = daemon.signals
        self._log = daemon.log
        self._workers: dict[int, Worker] = {}  # by the descriptors of their reports
        self._life, self._life_end = os.pipe()  # for the workers to watch
        self._next_fork = 0.0  # when the next worker may be replaced
        self._begun = time.time(), time.monotonic()
        self._ended = Statistics(self._begun)  # of the workers that have ended

    def run(self) -> None:
        """Supervise until a signal ends the daemon, and then end the workers."""
        gc.collect()
        gc.freeze()  # so that the workers share more memory
        try:
            for number in range(process_count(self._daemon.config)):
                self._fork(number)
            while not self._signals.count:
                is_complete = self._replace()
                self._wait(None if is_complete else FORK_PAUSE)
                while self._signals.take(signal.SIGUSR1):  # another may come meanwhile
                    self._report()
                if self._signals.take(signal.SIGHUP):
                    self._reload()
        finally:
            self._daemon.notify_end()
            self.end()

    # Workers

    def _current(self) -> list[Worker]:
        return [worker for worker in self._workers.values() if not worker.is_retired]

    def _replace(self) -> bool:
        """Fork a missing worker after FORK_PAUSE; return whether none was missing."""
        numbers = {worker.number for worker in self._current()}
        count = process_count(self._daemon.config)
        missing = [n for n in range(count) if n not in numbers]
        if not missing:
            return True
        now = time.monotonic()
        if now >= self._next_fork:
            self._next_fork = now + FORK_PAUSE
            self._fork(missing[0])
        return False

    def _fork(self, number: int) -> bool:
        """Fork a worker; an error is logged, and `_replace` tries again."""
        row = self._limit.assign_row()
        pipe: tuple[int, ...] = ()
        try:
            with held_signals():
                reports, reports_end = pipe = os.pipe()
                pid = os.fork()
                if not pid:
                    self._be_worker(number, row, reports, reports_end)
                os.close(reports_end)
                self._workers[reports] = Worker(pid, number, row, reports)
        except OSError as error:
            for descriptor in pipe:
                os.close(descriptor)
            self._log.error(f"couldn't start worker process: {reason(error)}")
            self._limit.clear_row(row)
            return False
        self._log.debug(f"started worker process (pid {pid})")
        return True

    def _be_worker(
        self, number: int, row: int, reports: int, reports_end: int
    ) -> NoReturn:
        """Serve connections as a worker; the whole life of its process."""
        status = 1
        try:
            self._signals.close()
            os.close(self._life_end)
            os.close(reports)
            for worker in self._workers.values():
                worker.close()
            self._limit.use_row(row)
            shared = self._daemon.make_shared()
            shared.affinity.pin(os.getppid() + number)
            signals = Signals(is_worker=True)
            signals.on_end(functools.partial(end_at_once, self._listener.end_now))
            self._listener.attach(shared, signals)
            signals.install()
            serve_as_worker(self._listener, shared, signals, self._life, reports_end)
            status = 0
        finally:
            try:
                if status:
                    log_fault(self._log, "daemon", *sys.exc_info())
            finally:
                os._exit(status)

    def _wait(self, seconds: Optional[float]) -> None:
        """Wait for a signal, or for what a worker reports."""
        poller = select.poll()
        poller.register(self._signals.fileno(), select.POLLIN)
        for worker in self._workers.values():
            poller.register(worker.reports, select.POLLIN)
            if worker.end >= 0:
                poller.register(worker.end, select.POLLIN)
        found = poller.poll(None if seconds is None else seconds * 1000)
        ready = [descriptor for descriptor, _ in found]
        if self._signals.fileno() in ready:
            self._signals.drain()
        for worker in list(self._workers.values()):
            has_ended = worker.end in ready
            if worker.reports in ready or has_ended:
                has_ended |= not worker.receive()
            if has_ended:
                del self._workers[worker.reports]
                self._bury(worker)

    def _bury(self, worker: Worker) -> None:
        """Forget a worker that has ended."""
        worker.close()
        status = wait_for_exit(worker.pid)
        self._limit.clear_row(worker.row)
        if worker.snapshot:
            self._ended.add(worker.snapshot)
            self._ended.forget_resources()
        if status == 0 and (worker.is_retired or self._signals.count):
            self._log.debug(f"worker process has ended (pid {worker.pid})")
            return
        how = f"killed by signal {-status}" if status < 0 else f"exit status {status}"
        self._log.error(f"worker process died (pid {worker.pid}): {how}")

    # Signals

    def _report(self) -> None:
        """Log one report over all workers."""
        for worker in self._workers.values():
            worker.is_asked = True
            worker.signal(signal.SIGUSR1)
        deadline = Deadline(REPORT_PATIENCE)
        while (
            any(worker.is_asked for worker in self._workers.values())
            and not deadline.has_passed
        ):
            self._wait(deadline.left)
        total = Statistics(self._begun)
        total.note_resources()
        total.add(self._ended.pack())
        for worker in self._workers.values():
            if worker.snapshot:
                total.add(worker.snapshot)
        log_report(total, self._limit, self._log)

    def _reload(self) -> None:
        """Read the configuration again; new workers serve new connections by it."""
        if len(self._workers) > self._limit.MOST_ROWS - MAX_PROCESSES:
            self._log.error("couldn't reload: too many old worker processes")
            return
        former = self._daemon.config
        if self._daemon.reload():
            old = self._current()
            numbers = range(process_count(self._daemon.config))
            if sum(map(self._fork, numbers)):  # else the old ones go on accepting
                for worker in old:
                    worker.is_retired = True
                    worker.signal(signal.SIGUSR2)
            else:
                self._daemon.config = former
                self._log.error("couldn't reload: the old worker processes go on")
        self._daemon.notify_ready()

    # The end

    def end(self) -> None:
        """Stop listening, and see the workers end in good order."""
        self._listener.server_close()
        os.close(self._life_end)
        for worker in self._workers.values():
            worker.signal(signal.SIGCONT)  # one that has been stopped could not end
        deadline = Deadline(DATA_GRACE + FILTER_GRACE + LAST_GRACE)
        while self._workers and self._signals.count < 2 and not deadline.has_passed:
            self._wait(deadline.left)
        if self._workers:
            self.end_now()

    def end_now(self) -> None:
        """End the workers at once; nothing here may write to the log."""
        self._listener.server_close()
        workers = list(self._workers.values())
        for worker in workers:
            worker.signal(signal.SIGQUIT, signal.SIGCONT)
        deadline = Deadline(WORKERS_GRACE)
        last = Deadline(2 * WORKERS_GRACE)  # for one that the system cannot even kill
        while workers and not last.has_passed:
            if deadline.has_passed:
                for worker in workers:
                    worker.signal(signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):  # it has been waited for
                if not os.waitpid(workers[-1].pid, os.WNOHANG)[0]:
                    time.sleep(0.01)
                    continue
            workers.pop()


def serve_as_worker(
    listener: Listener, shared: Shared, signals: Signals, life: int, reports: int
) -> None:
    """Serve connections until this worker is retired, or has to end.

    `life` hangs up when the supervisor has ended; `reports` takes statistics.
    """
    statistics = shared.statistics
    is_retired = False
    try:
        while not signals.count and (listener.connections or not is_retired):
            if is_retired:
                listener.finish_sessions(life)
            else:
                listener.serve(life)
            if signals.take(signal.SIGUSR1):
                send_report(statistics, reports)
            is_retired |= signals.take(signal.SIGUSR2)
    finally:
        listener.end()
        send_report(statistics, reports)


def send_report(statistics: Statistics, reports: int) -> None:
    """Send the statistics of this worker to the supervisor, if it still lives."""
    statistics.note_resources()
    packed = statistics.pack()
    with contextlib.suppress(OSError):
        write_all(reports, len(packed).to_bytes(4, "big") + packed)


def serve_alone(daemon: Daemon) -> None:
    """Serve connections without workers until a signal ends the daemon."""
    listener, signals = daemon.listener, daemon.signals
    listener.shared.affinity.pin(os.getpid())
    try:
        while not signals.count:
            listener.serve()
            if signals.take(signal.SIGUSR1):
                statistics = listener.shared.statistics
                statistics.note_resources()
                log_report(statistics, daemon.limit, daemon.log)
            if signals.take(signal.SIGHUP):
                if daemon.reload():
                    shared = daemon.reconfigure(listener.shared)
                    listener.attach(shared, signals)
                daemon.notify_ready()
    finally:
        daemon.notify_end()
        listener.end()


def log_report(statistics: Statistics, limit: ConnectionLimit, log: Log) -> None:
    for line in statistics.report(limit.total, limit.peak):
        log.notice(f"statistics: {line}")


CONNECTIONS_EACH = 8  # connections that are worth a process (Processes: auto)


def process_count(config: Config) -> int:
    """Return how many processes serve connections (Processes)."""
    if config.processes:
        return config.processes
    processors = len(usable_processors()) or os.cpu_count() or 1
    most = min(MAX_PROCESSES, config.max_connections // CONNECTIONS_EACH)
    return max(1, min(processors, most))


# ---------------------------------------------------------------------------
# The dry run (-t with messages)
# ---------------------------------------------------------------------------

# The values of variables that neither the environment nor the message has.
EXAMPLES = {
    b"CLIENT": b"192.0.2.1",
    b"SENDER": b"sender@example.com",
    b"RECIPIENTS": b"recipient@example.net",
    b"REMOTE": b"198.51.100.1",
    b"REMOTE_HELO": b"client.example",
    b"TLS": b"",
}
# What may become of a message, with its colour on a terminal (ECMA-48, SGR).
ENDS = {"passed": 32, "dropped": 33, "refused": 33, "broken": 31}
DIFF_COLOURS = {"+": 32, "-": 31, "@": 36}
SHOWN_LINES = 40  # of standard error, of a diff or of the environment, below level 4
SHOWN_COLUMNS = 160  # of each of them
FROM_SERVER = "the server's"
BARE_REFUSAL = (
    "refused without a reply of its own: a crash would look the same; see FilterVerdict"
)


class DryRun:
    """Runs messages through the filter as the daemon does, but sends them nowhere.

    Standard output gets a line for each message and one for all of them.  Below a
    message stands the filter's standard error where the filter has failed, or may
    have, and from level 3 on the whole run of the filter.
    """

    def __init__(self, config: Config, log: Log, directory: bytes) -> None:
        """`directory` is what the names of messages are relative to."""
        self._config = config
        self._log = log
        self._directory = directory
        self._given = inherited_environment()
        self._shared = Shared(config, log, self._given)
        self._printer = Printer(self._given, is_whole=log.is_debug)
        self._is_detailed = log.level >= INFO
        of_message = {b"SENDER", b"RECIPIENTS"} - self._given.keys() | {b"EMAIL"}
        self._constant = {*FILTER_VARIABLES} - of_message  # the same for all messages
        self._shown: set[bytes] = set()  # those of them that have been shown
        self._counts = dict.fromkeys(ENDS, 0)

    def run(self, names: Sequence[str]) -> int:
        """Run each message file (``-``: standard input); return the exit status."""
        for number in (signal.SIGHUP, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler)
        try:
            for name in names:
                self._counts[self._run_message(name)] += 1
            counts = ", ".join(f"{n} {end}" for end, n in self._counts.items())
            what = "1 message" if len(names) == 1 else f"{len(names)} messages"
            hint = "" if self._is_detailed else "; -d 3 shows more"
            print(f"{what}: {counts}{hint}", flush=True)
        except KeyboardInterrupt:
            return 2
        except OSError as error:
            give_up_output(error, self._log)
            return 2
        if self._counts["broken"]:
            return 2
        return 1 if self._counts["refused"] or self._counts["dropped"] else 0

    def _run_message(self, name: str) -> str:
        """Run one message; return what has become of it, a key of `ENDS`."""
        try:
            message = as_sent(read_message(name, self._directory))
        except OSError as error:
            self._log.error(f"couldn't read message: {shown(name)}: {reason(error)}")
            self._printer.outcome("broken", name, "couldn't be read")
            return "broken"
        known = {**envelope_of(message), **self._given}
        variables = self._variables(known)
        log = self._log.with_prefix(f"{shown(name)}: ")
        transaction = Transaction(self._shared, log, variables)
        with contextlib.closing(transaction):
            self._decide(transaction, message, log)
            changes = None
            if transaction.reply is None:
                client = printable(variables[b"CLIENT"])
                sent = self._sent(transaction.message, client)
                changes = changes_between(message, sent)
        if transaction.has_failed:
            end = "broken"
        elif transaction.reply is None:
            end = "passed"
        else:
            end = "dropped" if transaction.reply.is_success else "refused"
        self._printer.outcome(end, name, describe_outcome(transaction, changes))
        if transaction.is_bare_refusal:
            self._printer.fact(BARE_REFUSAL)
        if self._is_detailed:
            self._print_details(transaction, EXAMPLES.keys() - known.keys(), changes)
        elif transaction.is_bare_refusal or transaction.has_failed:
            self._printer.standard_error(transaction.standard_error)
        print(end="", flush=True)
        return end

    def _variables(self, known: Mapping[bytes, bytes]) -> dict[bytes, bytes]:
        """Return the variables of a message, with examples for unknown ones."""
        address = self._config.out_address
        server = to_octets(address.host) if address else b""
        found = {name: known.get(name, example) for name, example in EXAMPLES.items()}
        return {b"SERVER": server, **found}

    def _decide(self, transaction: Transaction, message: bytes, log: Log) -> None:
        """Do with a message what the daemon would do."""
        config = self._config
        try:
            transaction.receive(iter([message]))
        except FilterFailure as failure:
            log.error(str(failure))
            transaction.has_failed = True
            transaction.reply, transaction.status = failure.reply, Status.FILTER_ERROR
            return
        transaction.message = transaction.original
        if config.filter_type is FilterType.REJECT:
            transaction.reply = config.filter_reject
            transaction.status = Status.REJECTED
        elif config.max_message_size and len(message) > config.max_message_size:
            transaction.reply = TOO_LARGE
            transaction.status = TOO_LARGE.text
        elif config.filter_command:
            transaction.run_filter()
        else:
            transaction.status = Status.PASSED

    def _sent(self, message: Spool, client: str) -> bytes:
        """Return the message that the server would get."""
        date = rfc5322_date(time.time())
        tls = printable(self._given.get(b"TLS", b""))
        field = expand_header(self._config.header, client, "127.0.0.1", date, tls)
        writer = MailDataWriter(field)
        blocks = [writer.feed(block) for block in message.blocks()]
        return MailDataReader().feed(b"".join([*blocks, writer.finish()]))

    def _print_details(
        self,
        transaction: Transaction,
        examples: Collection[bytes],
        changes: Optional[Sequence[bytes]],
    ) -> None:
        """Print what the filter got, did and changed."""
        printer, environment = self._printer, transaction.environment
        if environment:
            names = [name for name in FILTER_VARIABLES if name not in self._shown]
            title = "environment, otherwise as above" if self._shown else "environment"
            printer.lines(title, environment_lines(environment, names, examples))
            self._shown = self._constant
            printer.fact(f"filter: {describe_end(transaction)}")
            printer.standard_error(transaction.standard_error)
        reply = transaction.reply
        printer.fact(f"reply: {FROM_SERVER if reply is None else reply.text}")
        printer.fact(f"status: {transaction.status}")
        printer.lines("changes", changes or (), is_diff=True)


def describe_outcome(
    transaction: Transaction, changes: Optional[Sequence[bytes]]
) -> str:
    """Return the status of a message, and in short what else came of it."""
    facts = [transaction.status]
    reply = transaction.reply
    if reply is not None and reply.text != transaction.status:
        facts.append(f"the client gets {reply.text}")
    if changes is not None:
        added, removed = (
            sum(line.startswith(mark) for line in changes) for mark in (b"+", b"-")
        )
        facts.append(f"+{added} -{removed} lines" if changes else "unchanged")
    if transaction.environment:
        facts.append(f"{transaction.filter_seconds:.3f} s")
    return ", ".join(facts)


def describe_end(transaction: Transaction) -> str:
    """Return how the filter ended, and after how long."""
    status = transaction.exit_status
    if status is None:
        end = "did not end by itself"
    elif status < 0:
        end = f"was ended by signal {-status}"
    else:
        end = f"exit status {status}"
    return f"{end}, {transaction.filter_seconds:.3f} s"


def environment_lines(
    environment: Mapping[bytes, bytes],
    names: Sequence[bytes],
    examples: Collection[bytes],
) -> list[bytes]:
    """Return the lines of some variables; `examples` are marked as such."""
    lines = []
    for name in names:
        if name in environment:
            first, *others = environment[name].split(b"\n")
            mark = b" (example)" if name in examples else b""
            lines += [name + b"=" + first + mark, *(b"  " + line for line in others)]
    return lines


def changes_between(before: bytes, after: bytes) -> list[bytes]:
    """Return how two messages differ, as a unified diff without names of files."""
    import difflib  # only a dry run needs it

    old, new = (message.split(b"\r\n")[:-1] for message in (before, after))
    diff = difflib.diff_bytes(difflib.unified_diff, old, new, lineterm=b"")
    return list(diff)[2:]


def escaped(octets: bytes) -> str:
    """Return each octet as ``\\xNN``."""
    return "".join(f"\\x{octet:02x}" for octet in octets)


_UTF_8 = re.compile(rb"utf-?8", re.IGNORECASE)


class Printer:
    """Prints text that no terminal takes for commands, cut to what can be read.

    UTF-8 is text where the locale says so.  Colours are for a terminal.
    """

    def __init__(self, environment: Mapping[bytes, bytes], *, is_whole: bool) -> None:
        """`environment` has the locale, and NO_COLOR; `is_whole`: nothing is cut."""
        variables = (b"LC_ALL", b"LC_CTYPE", b"LANG")  # the first that is set holds
        locale = next(filter(None, map(environment.get, variables)), b"")
        encoding = "" if sys.stdout is None else sys.stdout.encoding
        self._is_utf8 = bool(_UTF_8.search(locale)) and encoding.lower() == "utf-8"
        self._has_colours = os.isatty(1) and not environment.get(b"NO_COLOR")
        self._is_whole = is_whole

    def _text(self, octets: bytes) -> str:
        """Return octets as printable characters, all others as ``\\xNN``."""
        if not self._is_utf8:
            return printable(octets)
        text = to_text(octets)
        if text.isprintable():
            return text
        return "".join(c if c.isprintable() else escaped(to_octets(c)) for c in text)

    def _painted(self, text: str, colour: int) -> str:
        return f"\x1b[{colour}m{text}\x1b[m" if self._has_colours and colour else text

    def outcome(self, end: str, name: str, text: str) -> None:
        """Print the line of a message."""
        word = self._painted(f"{end:8}", ENDS[end])
        print(f"{word} {self._text(to_octets(name))}: {text}", flush=True)

    def fact(self, text: str) -> None:
        """Print a line below a message."""
        print(f"  {text}")

    def standard_error(self, lines: Sequence[bytes]) -> None:
        """Print the filter's standard error, of which the end says most."""
        self.lines("standard error", lines, last=SHOWN_LINES // 2)

    def lines(
        self,
        title: str,
        lines: Sequence[bytes],
        *,
        last: int = 0,
        is_diff: bool = False,
    ) -> None:
        """Print lines, if any, below a title; `last` of those shown are the last."""
        if not lines:
            return
        left_out = 0 if self._is_whole else max(0, len(lines) - SHOWN_LINES)
        rest = len(lines) - last
        self.fact(f"{title}:")
        for line in lines[: rest - left_out]:
            self._print_line(line, is_diff=is_diff)
        if left_out:
            self.fact(f"  ... {left_out} lines left out, -d 4 shows all")
        for line in lines[rest:]:
            self._print_line(line, is_diff=is_diff)

    def _print_line(self, octets: bytes, *, is_diff: bool) -> None:
        text = self._text(octets)
        colour = DIFF_COLOURS.get(text[:1], 0) if is_diff else 0
        left_out = len(text) - SHOWN_COLUMNS
        if left_out > 0 and not self._is_whole:
            text = f"{text[:SHOWN_COLUMNS]} ... {left_out} columns left out"
        self.fact(f"  {self._painted(text, colour)}")


def read_message(name: str, directory: bytes) -> bytes:
    """Return the octets of a file or of standard input; OSError if that fails."""
    if name == "-":
        if sys.stdin is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return sys.stdin.buffer.read()
    with open(os.path.join(directory, to_octets(name)), "rb") as file:
        return file.read()


def as_sent(message: bytes) -> bytes:
    """Return a message from a file as it goes over the wire: lines end in CRLF."""
    repair = LineRepair()
    return repair.feed(message) + repair.finish()


def envelope_of(message: bytes) -> dict[bytes, bytes]:
    """Return SENDER and RECIPIENTS as a message's header has them (RFC 5322 3.6)."""
    import email.parser  # only a dry run needs them
    import email.utils

    header = email.parser.BytesHeaderParser().parsebytes(message)

    def fields(name: str) -> list[str]:
        """Return the bodies of all fields of a name, unfolded, their octets as is."""
        bodies = (text for key, text in header.raw_items() if key.lower() == name)
        octets = (text.encode("ascii", "surrogateescape") for text in bodies)
        return [to_text(re.sub(rb"\r\n(?=[ \t])", b"", body)) for body in octets]

    def addresses(*names: str) -> list[bytes]:
        found = email.utils.getaddresses([f for name in names for f in fields(name)])
        octets = [to_octets(address) for _, address in found]
        return [a for a in octets if a and not _CONTROL.search(a)]

    envelope = Envelope()
    for recipient in addresses("to", "cc"):
        if envelope.has_room_for(recipient):
            envelope.add_recipient(recipient)
    senders = addresses("return-path") or addresses("from")
    if [path.strip() for path in fields("return-path")[:1]] == ["<>"]:
        senders = [b"<>"]
    values = {
        b"SENDER": b"".join(senders[:1]),
        b"RECIPIENTS": b"\n".join(envelope.recipients),
    }
    return {name: value for name, value in values.items() if value}


# ---------------------------------------------------------------------------
# Signals, pid file, privileges
# ---------------------------------------------------------------------------


def stop_start() -> NoReturn:
    """Interrupt a start that has not succeeded yet; it is undone."""
    raise KeyboardInterrupt


class Signals:
    """Counts the signals that end the process, notes the others, wakes the main thread.

    Until `on_end` is called, a signal interrupts the start.  A worker counts SIGTERM
    once, since systemd and the supervisor may both send it.  SIGQUIT, which only the
    supervisor sends, is its second signal.
    """

    def __init__(self, *, is_worker: bool = False) -> None:
        self.count = 0
        self._at_first: Callable[[], object] = stop_start
        self._at_second: Callable[[], object] = lambda: None
        self._is_worker = is_worker
        self._noted: dict[int, bool] = {}
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._read_end, False)
        os.set_blocking(self._write_end, False)

    def install(self) -> None:
        signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, self._count)
        signal.signal(signal.SIGINT, self._count)
        if self._is_worker:
            signal.signal(signal.SIGQUIT, self._quit)
            signal.signal(signal.SIGUSR2, self._note)
        signal.signal(signal.SIGUSR1, self._note)
        signal.signal(signal.SIGHUP, self._note)
        # Not SIG_IGN, which the filters would inherit.
        signal.signal(signal.SIGPIPE, lambda _number, _frame: None)
        # SIGCHLD is blocked, since it would interrupt some thread's system call each
        # time a filter exits.  All others are unblocked.
        signal.pthread_sigmask(signal.SIG_SETMASK, {signal.SIGCHLD})

    def on_end(self, end_at_once: Callable[[], object]) -> None:
        """From now on the first signal is only counted, and the second calls this.

        It is called by the signal handler, whatever the main thread waits for.
        """
        self._at_second = end_at_once
        self._at_first = lambda: None

    def close(self) -> None:
        """Close the descriptors, in a process that makes its own."""
        signal.set_wakeup_fd(-1)
        os.close(self._read_end)
        os.close(self._write_end)

    def _count(self, _number: int, _frame: object) -> None:
        self.count += not (self._is_worker and self.count)
        if self.count == 1:
            self._at_first()
        elif self.count == 2:
            self._at_second()

    def _quit(self, _number: int, _frame: object) -> None:
        self.count = 2
        self._at_second()

    def _note(self, number: int, _frame: object) -> None:
        self._noted[number] = True

    def take(self, number: int) -> bool:
        """Return whether this signal has come since the last call."""
        return self._noted.pop(number, False)

    def fileno(self) -> int:
        return self._read_end

    def wake(self) -> None:
        """Wake the main thread, from another one."""
        with contextlib.suppress(BlockingIOError):
            os.write(self._write_end, b"\0")

    def wait(self, seconds: float) -> None:
        """Wait for a signal, or `wake`."""
        if await_readable(seconds, self._read_end):
            self.drain()

    def drain(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._read_end, 512)


class PidFile:
    """The file with the daemon's process id, made before privileges are dropped."""

    def __init__(self, path: str) -> None:
        self._path = os.path.abspath(to_octets(path))
        self._text = b"%d\n" % os.getpid()
        self._descriptor: Optional[int] = None  # of the file to remove at the end

    def write(self) -> None:
        """Write the file; OSError if that cannot be."""
        if self._is_special():
            self._write_through()  # which may wait: a signal interrupts it
        else:
            with held_signals():
                self._write_file()

    def _write_file(self) -> None:
        try:
            self._descriptor = self._replace()
        except PermissionError as error:
            # The directory is not ours, but the file may be.
            try:
                self._descriptor = self._overwrite()
            except FileNotFoundError:
                raise error from None

    def _is_special(self) -> bool:
        """Return whether the path leads to something that must stay: a device, a FIFO,
        or what is our standard output or error.

        What another user put there may be a trap, and is replaced.
        """
        try:
            entry, file = os.lstat(self._path), os.stat(self._path)
        except OSError:
            return False
        if entry.st_uid not in (0, os.geteuid()):
            return False
        if not stat.S_ISLNK(entry.st_mode):
            return not stat.S_ISREG(entry.st_mode)
        return not stat.S_ISREG(file.st_mode) or self._standard_descriptor() is not None

    def _standard_descriptor(self) -> Optional[int]:
        """Return the descriptor, 1 or 2, of what the path leads to."""
        file = os.stat(self._path)
        standard = (1, 2)
        return next((n for n in standard if os.path.samestat(file, os.fstat(n))), None)

    def _write_through(self) -> None:
        # A file has an offset there, and a socket cannot be opened by its path.
        standard = self._standard_descriptor()
        if standard is not None:
            write_all(standard, self._text)
            return
        # A FIFO without a reader must not hold up the start.
        descriptor = os.open(self._path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
        try:
            write_all(descriptor, self._text)
        finally:
            os.close(descriptor)

    def _overwrite(self) -> int:
        flags = os.O_RDWR | os.O_TRUNC | os.O_NOFOLLOW
        descriptor = os.open(self._path, flags)
        write_all(descriptor, self._text)
        return descriptor

    def _replace(self) -> int:
        """Write beside and rename, so that nobody reads half of it, and a link
        that somebody planted leads nowhere."""
        beside = b"%s.%d" % (self._path, os.getpid())
        with contextlib.suppress(FileNotFoundError):
            os.unlink(beside)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        descriptor = os.open(beside, flags, 0o644)
        try:
            os.fchmod(descriptor, 0o644)  # whatever the umask is
            write_all(descriptor, self._text)
            os.rename(beside, self._path)
        except OSError:
            os.close(descriptor)
            os.unlink(beside)
            raise
        return descriptor

    def remove(self) -> None:
        """Remove the file, if it is still ours; empty it where we may not."""
        with contextlib.suppress(OSError):
            if self._descriptor is not None and self._is_ours(self._descriptor):
                try:
                    os.unlink(self._path)
                except OSError:
                    # Privileges are dropped, but the descriptor is from before.
                    os.ftruncate(self._descriptor, 0)

    def _is_ours(self, descriptor: int) -> bool:
        """Return whether what is at the path is what we wrote there."""
        is_same = os.path.samestat(os.lstat(self._path), os.fstat(descriptor))
        return is_same and os.pread(descriptor, 32, 0) == self._text


def write_pid_file(path: str, at_end: contextlib.ExitStack) -> None:
    """Write the pid file, if there is to be one, and have it removed at the end."""
    if not path:
        return
    pid_file = PidFile(path)
    at_end.callback(pid_file.remove)
    try:
        pid_file.write()
    except OSError as error:
        text = f"couldn't open pid file: {shown(path)}: {reason(error)}"
        raise SystemRefused(text) from error


def drop_privileges(config: Config, log: Log, *, is_passed: bool = False) -> None:
    """Become User for good, if it is set; `SystemRefused` if that fails."""
    withhold_capabilities()
    user = config.user
    if not user:
        if os.geteuid() == 0:
            log.warning("running as root is NOT recommended")
        return
    entry = find_user(user)
    if entry is None:
        raise SystemRefused(f"couldn't look up user: {shown(user)}")
    if os.geteuid() != 0:
        if os.geteuid() == entry.pw_uid:
            return
        text = f"must be started as root to switch to user: {shown(user)}"
        raise SystemRefused(text)
    try:
        if config.listen.path and not is_passed:
            # It has been made as root; the original made it as the user.
            path = to_octets(config.listen.path)
            os.chown(path, entry.pw_uid, entry.pw_gid, follow_symlinks=False)
        os.initgroups(entry.pw_name, entry.pw_gid)
        os.setgid(entry.pw_gid)
        if config.transparent_proxy is Transparency.FULL:
            keep_net_admin(lambda: os.setuid(entry.pw_uid))
        else:
            os.setuid(entry.pw_uid)
    except OSError as error:
        what = f"{shown(user)} (uid {entry.pw_uid}, gid {entry.pw_gid})"
        text = f"unable to switch to user: {what}: {reason(error)}"
        raise SystemRefused(text) from error
    if entry.pw_uid != 0 and _can_be_root():
        raise SystemRefused("unable to completely drop privileges")
    log.debug(
        f"switched to user {shown(user)} (uid {entry.pw_uid}, gid {entry.pw_gid})"
    )


# From linux/prctl.h and linux/capability.h.
_PR_SET_DUMPABLE = 4
_PR_SET_KEEPCAPS = 8
_PR_CAP_AMBIENT = 47
_PR_CAP_AMBIENT_CLEAR_ALL = 4
_CAPABILITY_VERSION_3 = 0x20080522
_CAP_NET_ADMIN = 12


def keep_net_admin(change_user: Callable[[], None]) -> None:
    """Change the user, and keep CAP_NET_ADMIN of all that root may do.

    The filters do not get it: it is not inheritable.  Raises OSError if the user
    cannot be changed, and `SystemRefused` if there is no such capability to keep.
    """
    _call_libc("prctl", _PR_SET_KEEPCAPS, 1, 0, 0, 0)
    change_user()
    bits = 1 << _CAP_NET_ADMIN
    header = struct.pack("@Ii", _CAPABILITY_VERSION_3, 0)
    # Effective, permitted, inheritable: the low words, then the high ones.
    try:
        _call_libc("capset", header, struct.pack("@6I", bits, bits, 0, 0, 0, 0))
    except PermissionError as error:
        # In a container root may only have CAP_NET_RAW, which is enough to listen.
        raise SystemRefused(NEEDS_NET_ADMIN) from error


def protect_keys(config: Config) -> None:
    """See that no filter reads a key from our memory (Linux): it may be our user."""
    if config.client_tls is not None and IS_LINUX:
        # User may be unable to import ctypes, but a change of the user does the same.
        with contextlib.suppress(ImportError, OSError):
            _call_libc("prctl", _PR_SET_DUMPABLE, 0, 0, 0, 0)


_AMBIENT = re.compile(rb"^CapAmb:\s*0*[1-9a-f]", re.MULTILINE)


def withhold_capabilities() -> None:
    """See that no filter inherits what systemd's AmbientCapabilities gave us."""
    try:
        with open("/proc/self/status", "rb") as file:
            status = file.read()
    except OSError:
        return  # not Linux
    if _AMBIENT.search(status):
        _call_libc("prctl", _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)


def _call_libc(name: str, *arguments: Union[int, bytes]) -> None:
    import ctypes  # only capabilities and keys need it

    libc = ctypes.CDLL(None, use_errno=True)
    words = [ctypes.c_ulong(a) if isinstance(a, int) else a for a in arguments]
    if getattr(libc, name)(*words) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _can_be_root() -> bool:
    try:
        os.setuid(0)
    except OSError:
        return False
    return True


def find_user(user: str) -> Optional[pwd.struct_passwd]:
    """Return the password entry of a name, or else of a number, or None."""
    with contextlib.suppress(KeyError):
        return pwd.getpwnam(user)
    with contextlib.suppress(KeyError, ValueError, OverflowError):
        return pwd.getpwuid(int(user))
    return None


# ---------------------------------------------------------------------------
# What is probably wrong with a configuration
# ---------------------------------------------------------------------------


def warnings_of(config: Config) -> list[str]:
    """Return what is probably wrong with the settings on this machine."""
    found = [
        f"invalid header symbol: %{printable(symbol)}"
        for symbol in unknown_symbols(config.header)
    ]
    found += _directory_warnings(config.temp_directory, config.user)
    found += _program_warnings(program_of(config.filter_command), config.user)
    complaint = shell_complaint(config.filter_command)
    if complaint:
        found.append(f"FilterCommand is refused by the shell: {complaint}")
    if config.client_tls is not None:
        found += _certificate_warnings(config.client_tls, config.listen_certificate)
    if config.out_tls_trust and config.out_tls not in _VERIFYING:
        found.append("OutTlsTrust has no use unless OutTls is verify or implicit")
    if config.is_transparent and config.out_address is not None:
        found.append(
            "the OutAddress option will be ignored when TransparentProxy is enabled"
        )
    return found


EXPIRY_NOTICE = 14  # days before a certificate expires


def _certificate_warnings(context: ssl.SSLContext, path: bytes) -> list[str]:
    """Return a warning if a certificate has expired, or soon will."""
    try:
        left = expiry_of(context, path) - time.time()
    except (TlsFailure, OSError, ValueError):
        return []  # the file is another one by now, or OpenSSL allows no handshake
    name = f"certificate {printable(path)}"
    if left <= 0:
        return [f"{name} has expired"]
    days = int(left // 86400)
    return [f"{name} expires in {days} days"] if days < EXPIRY_NOTICE else []


def _directory_warnings(directory: bytes, user: str) -> list[str]:
    name = f"TempDirectory {printable(directory)}"
    if not os.path.isdir(directory):
        return [f"{name} is not a directory"]
    mode = os.stat(directory).st_mode
    found = []
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        found.append(f"{name} is writable by all and has no sticky bit")
    if not is_writable(directory, find_user(user) if user else None):
        found.append(f"{name} is not writable")
    return found


def is_writable(directory: bytes, user: Optional[pwd.struct_passwd]) -> bool:
    """Return whether we may make files in a directory, as this user if we are root."""
    return holds_for(user, lambda: os.access(directory, os.W_OK | os.X_OK))


def holds_for(user: Optional[pwd.struct_passwd], is_so: Callable[[], bool]) -> bool:
    """Return what `is_so` returns, called as this user if we are root."""
    if user is None or os.geteuid() != 0:
        return is_so()
    pid = os.fork()
    if pid:
        return wait_for_exit(pid) == 0
    status = 1
    try:
        os.initgroups(user.pw_name, user.pw_gid)
        os.setgid(user.pw_gid)
        os.setuid(user.pw_uid)
        status = 0 if is_so() else 1
    finally:
        os._exit(status)


def _program_warnings(program: str, user: str) -> list[str]:
    """Return what keeps this user, or us if it is empty, from running a program."""
    places = places_of(to_octets(program))

    def is_executable() -> bool:
        return any(os.path.isfile(p) and os.access(p, os.X_OK) for p in places)

    if not program or holds_for(find_user(user) if user else None, is_executable):
        return []
    is_there = any(map(may_exist if "/" in program else os.path.isfile, places))
    what = "is not executable" if is_there else "not found"
    return [f"FilterCommand's program {what}: {shown(program)}"]


def places_of(program: bytes) -> list[bytes]:
    """Return the paths where the shell looks for a program, by PATH if it has to."""
    if b"/" in program:
        return [program]
    path = os.environb.get(b"PATH", os.fsencode(os.defpath))
    return [os.path.join(directory, program) for directory in path.split(b":")]


def may_exist(path: bytes) -> bool:
    """Return whether the path exists, as far as we may know."""
    try:
        os.stat(path)
    except OSError as error:
        return error.errno == errno.EACCES
    return True


# The first word of a command after assignments and exec.
_FIRST_WORD = re.compile(
    r"\s*(?:\w+=[\w./+:@%,-]*\s+)*(?:exec\s+)?([\w./+:@%,-]+)(?=[\s|&;<>]|$)"
)


def program_of(command: str) -> str:
    """Return the program that a filter command starts; "" if that is not plain."""
    match = _FIRST_WORD.match(command)
    if match is None or to_octets(match[1]) in _SHELL_WORDS:
        return ""
    return match[1]


def shell_complaint(command: str) -> str:
    """Return the shell's complaint about the syntax of a command; empty for none."""
    if not command or plain_words(command) is not None:
        return ""
    import subprocess  # only this needs it

    try:
        shell = subprocess.run(  # noqa: S603
            [b"sh", b"-n", b"-c", to_octets(command)],
            executable="/bin/sh",
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=CHECK_SECONDS,
            check=False,
        )
    except OSError as error:
        return reason(error)
    except subprocess.TimeoutExpired:
        return ""  # whatever it waits for is not the command's fault
    if not shell.returncode:
        return ""
    return printable((shell.stderr.strip() or b"no reason given").splitlines()[0])


class CheckedChannel(ServerChannel):
    """The server's side for -t, with one time limit for all replies."""

    def __init__(self, sock: socket.socket, seconds: float) -> None:
        super().__init__(sock, seconds, Log(ERROR))
        self._all = Deadline(seconds)

    def read_greeting(self) -> Reply:
        """Return the greeting; `TlsFailure` if the server waits for a handshake."""
        try:
            return self.read_reply()
        except ServerLost:
            if self.tls or not self._takes_tls():
                raise
            text = "speaks TLS at once; set OutTls: implicit"
            raise TlsFailure(text) from None

    def _takes_tls(self) -> bool:
        """Return whether the server shakes hands, whatever its certificate is."""
        config = default_config()
        config.out_tls = TlsMode.REQUIRE
        try:
            config.server_tls = server_context(config)
            self.start_tls(config)
        except TlsFailure:
            return False
        return True

    def start_tls(self, config: Config, reply: Reply = READY_FOR_TLS) -> None:
        """Shake hands, if the reply to STARTTLS allows it; `TlsFailure` if not."""
        assert config.server_tls is not None  # load_config sees to it
        try:
            if reply.code != 220:
                raise TlsFailure(reply.text)
            self.encrypt(config.server_tls, config.server_name)
        except TlsFailure as failure:
            raise TlsFailure(f"cannot be encrypted to: {failure}") from failure

    def _receive_by(self, deadline: Deadline) -> bytes:  # noqa: ARG002
        left = max(0.001, self._all.left)  # 0 would be no limit
        set_timeout(self._socket, socket.SO_RCVTIMEO, left)
        return super()._receive_by(self._all)


def server_warnings(config: Config) -> list[str]:
    """Connect to OutAddress; return what it lacks for these settings."""
    address = config.out_address
    if address is None or address.is_any or config.is_transparent:
        return []
    name = f"OutAddress {shown(address.text)}"
    try:
        targets = resolve(address, address.host)
        sock, _ = connect(targets, CHECK_SECONDS)
        server = CheckedChannel(sock, CHECK_SECONDS)
        with contextlib.closing(server):
            if config.out_tls is TlsMode.IMPLICIT:
                server.start_tls(config)
            greeting = server.read_greeting()
            if not greeting.is_success:
                return [f"{name} does not take mail from here: {greeting.text}"]
            hello = server.ask(b"EHLO " + HELLO)
            can_start = offered_attributes(hello, b"STARTTLS") is not None
            if can_start and config.out_tls in _BY_STARTTLS:
                server.start_tls(config, server.ask(b"STARTTLS"))
                hello = server.ask(b"EHLO " + HELLO)
            server.send(b"QUIT\r\n")
    except TlsFailure as failure:
        return [f"{name} {failure}"]
    except OSError as error:
        return [f"{name} cannot be connected to: {reason(error)}"]
    except ServerLost as error:
        return [f"{name} does not talk SMTP: {error}"]
    wanted = {
        b"STARTTLS": config.out_tls in _BY_STARTTLS and not server.tls,
        b"XCLIENT": config.xclient,
        b"XFORWARD": uses_remote(config),
    }
    return [
        f"{name} does not offer {extension.decode()}"
        for extension, is_wanted in wanted.items()
        if is_wanted and offered_attributes(hello, extension) is None
    ]


SCRIPT_LOOKED_AT = 1024 * 1024  # octets of a filter that may use REMOTE


def uses_remote(config: Config) -> bool:
    """Return whether the filter has a use for XFORWARD, as far as its text shows."""
    if "REMOTE" in config.filter_command:
        return True
    for place in places_of(to_octets(program_of(config.filter_command))):
        with contextlib.suppress(OSError), open(place, "rb") as file:
            return b"REMOTE" in file.read(SCRIPT_LOOKED_AT)
    return False


# ---------------------------------------------------------------------------
# What the process inherits
# ---------------------------------------------------------------------------


def working_directory() -> bytes:
    """Return the current directory, the root if it has been removed."""
    try:
        return os.getcwdb()
    except FileNotFoundError:
        return b"/"


def inherited_environment() -> dict[bytes, bytes]:
    """Return the environment that this process was started with, for the filters.

    PWD is our directory, as the shell sees to it.  If no locale was set, Python sets
    one in its own environment (PEP 538), which filters would read 8-bit mail by.
    """
    try:
        with open("/proc/self/environ", "rb") as file:
            entries = file.read().split(b"\0")
    except OSError:
        environment = dict(os.environb)
    else:
        pairs = (entry.partition(b"=") for entry in entries if entry.find(b"=") > 0)
        environment = {name: value for name, _, value in pairs}
    with contextlib.suppress(FileNotFoundError):
        environment[b"PWD"] = os.getcwdb()
    return environment


def filters_environment(user: str) -> dict[bytes, bytes]:
    """Return the environment that filters inherit, before a message adds to it."""
    environment = {**inherited_environment(), **user_environment(user)}
    for name in (b"NOTIFY_SOCKET", b"LISTEN_PID", b"LISTEN_FDS", b"LISTEN_FDNAMES"):
        environment.pop(name, None)
    return environment


def user_environment(user: str) -> dict[bytes, bytes]:
    """Return what login(1) would set for the User that the filters run as, if set."""
    entry = find_user(user) if user else None
    if entry is None:
        return {}
    name = to_octets(entry.pw_name)
    return {
        b"HOME": to_octets(entry.pw_dir),
        b"USER": name,
        b"LOGNAME": name,
        b"SHELL": to_octets(entry.pw_shell or "/bin/sh"),
    }


def open_standard_descriptors() -> None:
    """Open 0, 1 and 2 if they are closed: a pipe or a socket must not take their place.

    Raises `SystemRefused` without /dev/null.
    """
    try:
        spare = open_null()
        while spare <= 2:
            spare = open_null()
    except OSError as error:
        raise SystemRefused(reason(error)) from error
    os.close(spare)


def close_on_exec() -> None:
    """Let no filter inherit any descriptor but 0, 1 and 2."""
    for descriptor in possible_descriptors():
        if descriptor > 2:
            with contextlib.suppress(OSError):
                os.set_inheritable(descriptor, False)


FIRST_PASSED = 3  # SD_LISTEN_FDS_START


@functools.cache  # `detach` changes the process
def is_socket_passed() -> bool:
    """Return whether systemd has passed sockets to the process that was started."""
    is_ours = os.environ.get("LISTEN_PID") == str(os.getpid())
    return is_ours and os.environ.get("LISTEN_FDS", "0") != "0"


def passed_socket() -> Optional[socket.socket]:
    """Return the listening socket that systemd has passed (sd_listen_fds(3)), or None.

    Raises `SystemRefused` if it has passed something else.
    """
    if not is_socket_passed():
        return None
    count = os.environ["LISTEN_FDS"]
    if count != "1":
        raise SystemRefused(f"expected one listening socket, got {shown(count)}")
    try:
        sock = socket.socket(fileno=FIRST_PASSED)
        is_listening = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as error:
        raise SystemRefused(f"couldn't use passed socket: {reason(error)}") from error
    if sock.type != socket.SOCK_STREAM or not is_listening:
        raise SystemRefused("couldn't use passed socket: it is no listening stream")
    sock.set_inheritable(False)
    return sock


def close_inherited(kept: Optional[socket.socket]) -> None:
    """Close what the caller left open above 2, before anything of ours is open."""
    syslog.closelog()  # the start may have logged already
    syslog.openlog(NAME, 0, syslog.LOG_MAIL)
    for descriptor in possible_descriptors():
        if descriptor > 2 and (kept is None or descriptor != kept.fileno()):
            with contextlib.suppress(OSError):
                os.close(descriptor)


MOST_INHERITED = 65536  # descriptors to try where the system does not list them


def possible_descriptors() -> Sequence[int]:
    """Return the descriptors that we have, and perhaps others."""
    if IS_LINUX:  # elsewhere the directory may have the standard ones only
        with contextlib.suppress(OSError):
            return [int(name) for name in os.listdir("/dev/fd")]
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    is_bounded = 0 <= soft < MOST_INHERITED  # RLIM_INFINITY may be below 0
    return range(soft if is_bounded else MOST_INHERITED)


DESCRIPTORS_APART = 32  # descriptors of the process besides the connections'
DESCRIPTORS_EACH = 10  # descriptors of a connection with a filter
MACOS_DESCRIPTORS = 10240  # OPEN_MAX, the highest limit that macOS accepts


def raise_descriptor_limit(config: Config) -> int:
    """Allow enough descriptors for all connections.

    Returns what the limit was, 0 if it has not changed.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = DESCRIPTORS_APART + config.max_connections * DESCRIPTORS_EACH
    if soft != resource.RLIM_INFINITY and soft < needed:
        most = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        for limit in (most, min(most, MACOS_DESCRIPTORS)):
            with contextlib.suppress(ValueError, OSError):
                resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
                return soft
    return 0


def name_process() -> None:
    """Be called proxsmtpd, also when started as an argument of python3."""
    with contextlib.suppress(OSError), open("/proc/self/comm", "w") as file:
        file.write(NAME)


NOTIFY_SECONDS = 1.0  # to wait for a busy service manager


class ServiceManager:
    """systemd, or whatever started us and waits to be notified (sd_notify(3))."""

    def __init__(self, path: bytes) -> None:
        """`path` is NOTIFY_SOCKET; empty if nobody waits."""
        self._path = b"\0" + path[1:] if path.startswith(b"@") else path

    def tell(self, state: bytes) -> None:
        """Send a state, if somebody takes it."""
        if self._path:
            with (
                contextlib.suppress(OSError),
                socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock,
            ):
                sock.settimeout(NOTIFY_SECONDS)
                sock.sendto(state, self._path)


# ---------------------------------------------------------------------------
# The command line and the life of the process
# ---------------------------------------------------------------------------


class Options(NamedTuple):
    """The command line."""

    debug_level: Optional[int] = None  # None: be a daemon
    config_file: str = CONFIG_FILE
    pid_file: str = ""
    check: bool = False
    messages: Sequence[str] = ()  # for a dry run
    text: str = ""  # to print, and do nothing else


def parse_options(arguments: Sequence[str]) -> Options:
    """Parse the command line without its first word; raises `UsageError`."""
    try:
        pairs, rest = getopt.getopt(list(arguments), "d:f:hp:tv", ["help", "version"])
    except getopt.GetoptError as error:
        raise UsageError(error.msg, USAGE) from error
    options = Options(messages=rest)
    for flag, value in pairs:
        if flag == "-d":
            if value not in ("0", "1", "2", "3", "4"):
                raise UsageError("invalid debug log level (must be between 0 and 4)")
            options = options._replace(debug_level=int(value))
        elif flag == "-f":
            options = options._replace(config_file=value)
        elif flag == "-p":
            options = options._replace(pid_file=value)
        elif flag == "-t":
            options = options._replace(check=True)
        elif flag in ("-h", "--help"):
            return Options(text=HELP)
        else:
            text = f"{NAME} (version {VERSION})\n          (config: {CONFIG_FILE})"
            options = options._replace(text=text)
    if rest and not options.check:
        raise UsageError(USAGE)
    return options


def main(arguments: Sequence[str]) -> int:
    """Run the program; return its exit status (proxsmtpd(8), EXIT STATUS)."""
    # If the caller has it ignored, the system does not report the end of a filter.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        options = parse_options(arguments)
    except UsageError as error:
        for text in error.args:
            line = text if text == USAGE else f"{NAME}: {shown(text)}"
            with contextlib.suppress(OSError):
                os.write(2, f"{line}\n".encode())
        return 2
    log = make_log(options)
    if options.text:
        return print_answer(options.text, log)
    try:
        return carry_out(options, log)
    except SystemRefused as error:
        log.error(str(error))
    except KeyboardInterrupt:
        pass  # before there was anything to end in good order
    return 1


def carry_out(options: Options, log: Log) -> int:
    """Read the configuration, and be the daemon, or check, or run dry."""
    open_standard_descriptors()
    directory = working_directory()
    config = load_config(options.config_file, directory, log)
    if config is None:
        return 2
    if options.debug_level is None:
        os.chdir("/")  # where a daemon works
    if options.messages:
        close_on_exec()
        return DryRun(config, log, directory).run(options.messages)
    if options.check:
        return check_config(config, log)
    return Daemon(config, options, log, directory).run()


def make_log(options: Options) -> Log:
    """Return the log for the start; a daemon leaves standard error later."""
    if options.debug_level is not None:
        return Log(options.debug_level, to_standard_error)
    if options.check or options.text:
        return Log(WARNING, to_standard_error)
    syslog.openlog(NAME, 0, syslog.LOG_MAIL)
    return Log(INFO, to_standard_error, to_syslog)


def load_keys(config: Config, old: Optional[Config], log: Log) -> list[str]:
    """Read the certificates and the key that the settings name; return the errors.

    If the certificate or the key for clients cannot be used, both stay as in `old`: a
    key that only root may read cannot be read after the start.
    """
    errors = []
    try:
        config.server_tls = server_context(config)
    except TlsFailure as failure:
        errors.append(str(failure))
    try:
        config.client_tls = client_context(config)
    except TlsFailure as failure:
        config.client_tls = old.client_tls if old is not None else None
        if config.client_tls is None:
            errors.append(str(failure))
        else:
            log.error(f"{failure}; the certificate stays as it was")
    return errors


def load_config(
    path: str,
    directory: bytes,
    log: Log,
    old: Optional[Config] = None,
    adapt: Optional[Callable[[Config], None]] = None,
) -> Optional[Config]:
    """Read the configuration; log what is wrong with it, and then return None.

    Paths in the file are relative to `directory`; `adapt` is as in `parse_config`;
    `old` has the settings before a reload.  Raises `SystemRefused` if the file exists
    but cannot be read, or, at a reload, is missing.
    """
    try:
        with open(to_octets(path), "rb") as file:
            octets = file.read()
        log.debug(f"read config file: {shown(path)}")
    except FileNotFoundError:
        text = f"configuration file not found: {shown(path)}"
        if old is not None:  # without its filter, mail would pass unfiltered
            raise SystemRefused(text) from None
        log.warning(text)
        octets = b""
    except OSError as error:
        text = f"couldn't read config file: {shown(path)}: {reason(error)}"
        raise SystemRefused(text) from error
    config, errors = parse_config(octets, path, adapt)
    for setting in SETTINGS:
        name = getattr(config, setting.attribute)
        if setting.kind.parse is _file_name and name:
            whole = os.path.abspath(os.path.join(directory, name))
            setattr(config, setting.attribute, whole)
    if not errors:
        if not is_socket_passed() and is_loop(config, may_wait=old is None):
            errors.append(ConfigError(OWN_LISTENER, path))
        errors += [ConfigError(text, path) for text in load_keys(config, old, log)]
    for fault in errors:
        log.error(str(fault))
    return None if errors else config


def check_config(config: Config, log: Log) -> int:
    """Look for what is probably wrong (-t); the configuration itself is right."""
    found = warnings_of(config)
    if config.user and find_user(config.user) is None:
        found.append(f"couldn't look up user: {shown(config.user)}")
    for text in found + server_warnings(config):
        log.warning(text)
    return print_answer("configuration is OK", log)


def print_answer(text: str, log: Log) -> int:
    """Print the one thing that was asked for; return the exit status."""
    try:
        print(text, flush=True)
    except OSError as error:
        give_up_output(error, log)
        return 1
    return 0


def give_up_output(error: OSError, log: Log) -> None:
    """Log why nothing more can be printed, unless the reader has seen enough."""
    if error.errno != errno.EPIPE:
        log.error(f"couldn't write to standard output: {reason(error)}")
    # What is still buffered must not fail once more.
    try:
        os.dup2(open_null(), sys.stdout.fileno())
    except OSError as fault:
        log.error(reason(fault))


STACK_SIZE = 512 * 1024


class Daemon:
    """The daemon from binding to its end, as the only process or the supervisor."""

    def __init__(
        self, config: Config, options: Options, log: Log, directory: bytes
    ) -> None:
        """`directory` is what the configuration's path is relative to."""
        self.config = config
        self.log = log
        self._directory = directory
        self.is_alone = process_count(config) == 1
        self.signals: Signals  # from `_start` on, as the next two
        self.limit: ConnectionLimit
        self.listener: Listener
        self._is_detached = options.debug_level is None
        self._path = to_text(os.path.join(directory, to_octets(options.config_file)))
        self._pid_file = config.pid_file or options.pid_file
        self._has_two_pid_files = bool(config.pid_file and options.pid_file)
        self._environment: dict[bytes, bytes] = {}  # of the filters
        self._descriptor_limit = 0  # of the filters, if it is not ours
        self._manager = ServiceManager(b"")

    def run(self) -> int:
        """Start, serve connections until a signal comes, and end; return the status."""
        with contextlib.ExitStack() as at_end:
            try:
                supervisor = self._start(at_end)
            except OSError as error:
                raise SystemRefused(f"couldn't start: {reason(error)}") from error
            except KeyboardInterrupt:
                # The parent of a daemon has not reported success yet.
                return 1 if self._is_detached else 0
            sys.excepthook = functools.partial(log_fault, self.log, "daemon")
            if supervisor is None:
                serve_alone(self)
            else:
                supervisor.run()
        self.log.debug("stopped processing")
        return 0

    def _start(self, at_end: contextlib.ExitStack) -> Optional[Supervisor]:
        """Do all that can fail, and only then report success.

        What has to be undone is left to `at_end`.  Returns the supervisor, if there are
        to be workers.
        """
        config = self.config
        self.log.debug(f"starting up ({VERSION})...")
        name_process()
        passed = passed_socket()
        close_inherited(passed)
        self._raise_descriptor_limit()
        timeval_form()  # while there are descriptors
        if config.filter_command:
            best_spawn()  # loads now, not at the first message, what it needs
        self._log_warnings()
        self.signals = Signals()
        self.signals.install()  # whoever sees us listen may send one
        self._environment = filters_environment(config.user)
        if not self._is_detached:  # else the exit of the parent is the notification
            self._manager = ServiceManager(os.environb.get(b"NOTIFY_SOCKET", b""))
        self.limit = ConnectionLimit(config.temp_directory, is_shared=not self.is_alone)
        with held_signals():
            self.listener = Listener(config, self.log, self.limit, passed)
            at_end.callback(self.listener.server_close)
        parent = detach() if self._is_detached else None
        self.listener.take_ownership()
        write_pid_file(self._pid_file, at_end)
        protect_keys(config)
        drop_privileges(config, self.log, is_passed=passed is not None)
        protect_keys(config)  # again, since the change of the user may have undone it
        threading.stack_size(STACK_SIZE)
        if parent is not None:
            self.log.places = (to_syslog,)
            self.log.info("running as a daemon")
            announce(parent)
        self.notify_ready()
        supervisor = None
        if self.is_alone:
            self.listener.attach(self.make_shared(), self.signals)
        else:
            supervisor = Supervisor(self)
        end_now = (supervisor or self.listener).end_now
        self.signals.on_end(functools.partial(end_at_once, end_now, at_end))
        return supervisor

    def _raise_descriptor_limit(self) -> None:
        former = raise_descriptor_limit(self.config)
        self._descriptor_limit = self._descriptor_limit or former

    def notify_ready(self) -> None:
        """Tell the service manager that the start or a reload is over."""
        self._manager.tell(b"READY=1")

    def notify_end(self) -> None:
        """Tell the service manager that the daemon is about to end."""
        self._manager.tell(b"STOPPING=1")

    def _log_warnings(self) -> None:
        """Log what is probably not meant, but no reason not to start."""
        for text in warnings_of(self.config):
            self.log.warning(text)
        if not self.config.has_filter:
            self.log.warning("no filter command specified. passing message through")
        if self._has_two_pid_files:
            self.log.warning("ignoring pid file specified on the command line.")

    def make_shared(self) -> Shared:
        """Return what the sessions of a process share, under the present settings."""
        address = self.listener.address_family, self.listener.server_address
        return Shared(
            self.config, self.log, self._environment, address, self._descriptor_limit
        )

    def reconfigure(self, shared: Shared) -> Shared:
        """Return what the sessions that begin from now on share."""
        return shared.with_config(self.config, self._descriptor_limit)

    def reload(self) -> bool:
        """Read the configuration again (SIGHUP); return whether it was taken.

        If it has errors, they are logged, and all stays as it was.
        """
        monotonic = time.monotonic_ns() // 1000
        self._manager.tell(b"RELOADING=1\nMONOTONIC_USEC=%d" % monotonic)
        config = None
        try:
            keep = self._keep_settings_of_the_start
            config = load_config(
                self._path, self._directory, self.log, self.config, keep
            )
        except SystemRefused as error:
            self.log.error(str(error))
        if config is None:
            self.log.error("configuration has errors, and stays as it was")
        else:
            self.config = config
            self._log_warnings()
            self._raise_descriptor_limit()
            protect_keys(config)
            self.log.notice("configuration reloaded")
        return config is not None

    def _keep_settings_of_the_start(self, config: Config) -> None:
        """Take back what cannot change without a restart."""
        changed = []
        for setting in SETTINGS:
            old = getattr(self.config, setting.attribute)
            if setting.needs_restart and getattr(config, setting.attribute) != old:
                changed.append(setting.name)
                setattr(config, setting.attribute, old)
        if self.is_alone and process_count(config) > 1:
            changed.append("Processes")
        for name in changed:
            self.log.warning(f"{name} stays as it was: it needs a restart to change")


def end_at_once(
    end_now: Callable[[], object], at_end: Optional[contextlib.ExitStack] = None
) -> NoReturn:
    """End the process from a signal handler; nothing here may write to the log."""
    end_now()
    if at_end is not None:
        at_end.close()
    os._exit(0)


def log_fault(
    log: Log,
    what: str,
    kind: type[BaseException],
    fault: BaseException,
    where: Any,
) -> None:
    """Log that `what` has failed, and the traceback.

    The other arguments are those of `sys.excepthook`.
    """
    try:
        import traceback  # only a fault needs it

        texts = traceback.format_exception(kind, fault, where)
    except (ImportError, OSError, MemoryError):
        texts = [f"{kind.__name__}: {fault}"]
    for line in "".join(texts).splitlines():
        log.error(f"{what} failed: {shown(line)}")


_ENDING = (signal.SIGTERM, signal.SIGINT)
_HANDLED = (
    *_ENDING,
    signal.SIGQUIT,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
)


@contextlib.contextmanager
def held_signals() -> Iterator[None]:
    """Hold back the signals that interrupt the start, for a step of it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _HANDLED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _HANDLED)


def detach() -> int:
    """Go on in a child with a session of its own.

    Returns, in the child, the descriptor for `announce`.  The parent waits for that,
    and exits with 0, or with the child's exit status if the child ends first.
    """
    reader, writer = os.pipe()
    with held_signals():  # until each of the two has its handlers
        pid = os.fork()
        if pid:
            for number in _ENDING:
                signal.signal(number, lambda number, _frame: pass_on(pid, number))
            os.close(writer)
        else:
            os.close(reader)
            os.setsid()
    if pid:
        # The parent's exit is the init script's answer; it cleans up nothing.
        os._exit(0 if os.read(reader, 1) else wait_for_exit(pid) & 0xFF)
    return writer


def pass_on(pid: int, number: int) -> None:
    """Send the child a signal that ends it, even if it is stopped."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
        os.kill(pid, signal.SIGCONT)


def announce(ready: int) -> None:
    """Leave the terminal, and let the parent exit with 0."""
    null = open_null()
    for descriptor in range(3):
        os.dup2(null, descriptor)
    os.close(null)
    os.write(ready, b"\0")
    os.close(ready)


def leave(status: int) -> NoReturn:
    """End the process.

    Python's own way would take the interpreter down around threads that still run.
    """
    if sys.stdout is not None:
        sys.stdout.flush()
    os._exit(status)


if __name__ == "__main__":
    leave(main([to_text(os.fsencode(word)) for word in sys.argv[1:]]))
