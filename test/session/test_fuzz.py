"""The real process under fire from all three sides: clients, server and filter.

Each test throws seeded nonsense from one side while the others keep the rules, and
holds that the daemon stays what it was (alive, of the same size, silent about what
should not be in a log), that the server gets nothing but what the filter has made, and
that a client gets a success only for what the server or the filter has accepted.

Wherever the server is honest it stops reading at everything that some server takes for
the end of the data, and wherever the filter is honest it stamps each message with a
digest of the message and a secret: what has got by the filter, or only half of it
through, has no stamp or a wrong one.

FUZZ_SEED and FUZZ_ROUNDS, environment variables, say what is thrown and how much.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import random
import re
import select
import shlex
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Callable, NamedTuple

import pytest

from helpers import (
    LOCAL_ERROR,
    MEGABYTE,
    PATIENCE,
    PROGRAM,
    Daemon,
    MakeFilter,
    MakeServer,
    StartDaemon,
    marked_processes,
    poll,
    program_under_test,
    unstuffed,
)
from smtp import (
    END_OF_DATA,
    REPLIES,
    Action,
    Chunks,
    Close,
    Handler,
    RawClient,
    Recorded,
    Reply,
    Reset,
    ScriptedServer,
    Stall,
    multiline,
)
from soak import Usage

SEED = os.environ.get("FUZZ_SEED", "1")
ROUNDS = int(os.environ.get("FUZZ_ROUNDS", "150"))
TOO_FEW = "too few rounds to show anything"
WORKERS = 8
MOST_MEMORY = 64 * MEGABYTE  # at any time, with eight sessions in full swing
SECRET = hashlib.sha256(f"secret {SEED}".encode()).hexdigest().encode()

SETTINGS: Mapping[str, object] = {
    "TimeOut": 1,
    "FilterTimeout": 1,
    "KeepAlives": 1,
    "XClient": "on",
}
EXTENSIONS = (
    *(b"PIPELINING", b"8BITMIME", b"CHUNKING", b"STARTTLS", b"AUTH PLAIN LOGIN"),
    *(b"XFORWARD NAME ADDR PROTO HELO SOURCE", b"XCLIENT ADDR NAME PORT HELO PROTO"),
)
FILTER_AHEAD = b"354 Start mail input; end with <CRLF>.<CRLF>\r\n"

# The digest is over all but line ends and blanks: proxsmtpd mends those after the
# filter.  What begins with 0 is dropped, with 1 rejected.
STAMP = """\
exec 3>&1
test -z "$EMAIL" || exec <"$EMAIL" 3>/dev/null
sum=$({ printf %s "$SECRET"; tee /dev/fd/3; } | tr -d '\\r\\n ' | sha256sum)
sum=${sum%% *}
test -z "$EMAIL" || exec 3>>"$EMAIL"
case $sum in
0*) echo "$sum" >>"$DROPPED"; echo "250 2.0.0 $sum dropped" >&2; exit 1 ;;
1*) echo "$sum rejected" >&2; exit 1 ;;
esac
printf '\\nX-Stamp: %s\\n' "$sum" >&3
"""
WHOLE_REPLY = re.compile(rb"(?:([2-5]\d\d)-[^\r\n]*\r\n)*([2-5]\d\d)(?: [^\r\n]*)?\r\n")
ANY_END = re.compile(END_OF_DATA["lenient"])
QUEUED = re.compile(rb"250 2\.0\.0 (T\d+) queued\r\n")
DROPPED = re.compile(rb"250 2\.0\.0 ([0-9a-f]{64}) dropped\r\n")


def is_stamped(data: bytes) -> bool:
    """Return whether mail data on the wire is what the filter has made, and whole."""
    body, _, stamp = unstuffed(data).rpartition(b"\r\nX-Stamp: ")
    digest = hashlib.sha256((SECRET + body).translate(None, b"\r\n ")).hexdigest()
    return stamp == digest.encode() + b"\r\n"


# --- What is under fire ---


class Target:
    """The daemon, and what must be true of it before and after."""

    def __init__(self, daemon: Daemon, log: Path, dropped: Path) -> None:
        self.daemon = daemon
        self.address = daemon.address
        self._log = log
        self._dropped = dropped
        self._pid = daemon.process.pid
        self._base = self._usage_when_idle()

    def dropped(self) -> set[bytes]:
        """Return the digests that the filter says it has dropped."""
        return set(self._dropped.read_bytes().split())

    def _usage_when_idle(self) -> Usage:
        assert poll(lambda: Usage.of(self._pid).is_idle), Usage.of(self._pid)
        return Usage.of(self._pid)

    def check_unharmed(self) -> None:
        """It lives, uses what it used before, and its log can be read by anybody."""
        assert self.daemon.process.poll() is None
        assert self._usage_when_idle().counts == self._base.counts
        assert self.daemon.peak_memory() < MOST_MEMORY
        assert not list(self.daemon.tempdir.iterdir())
        assert poll(lambda: marked_processes(self.daemon.mark).keys() == {self._pid})
        log = self._log.read_bytes()
        assert log.count(b"\n") > ROUNDS
        unprintable = re.search(rb"^.*[^\n -~].*$", log, re.M)
        assert not unprintable, unprintable[0]
        fault = re.search(rb"^.*(session failed|Traceback).*$", log, re.M)
        assert not fault, log[fault.start() :][:2000]


MakeTarget = Callable[..., Target]


@pytest.fixture
def target(proxsmtpd: StartDaemon, tmp_path: Path) -> MakeTarget:
    """Provide a factory of daemons to be fired at, with all of their log in a file."""

    def make(server: ScriptedServer, settings: Mapping[str, object]) -> Target:
        log, dropped = tmp_path / "log", tmp_path / "dropped"
        dropped.touch()
        script = f'exec "$@" 2>{shlex.quote(str(log))}'
        daemon = proxsmtpd(
            {**SETTINGS, **settings},
            server=server,
            env={"SECRET": SECRET.decode(), "DROPPED": str(dropped)},
            program=["/bin/sh", "-c", script, "sh", *program_under_test()],
        )
        with RawClient(daemon.address) as client:
            client.reply()
        return Target(daemon, log, dropped)

    return make


def in_rounds(one_round: Callable[[int, random.Random], None], times: int = 1) -> None:
    """Run ROUNDS times `times` rounds, each with random numbers of its own."""
    print(f"FUZZ_SEED={SEED} FUZZ_ROUNDS={ROUNDS}")
    with ThreadPoolExecutor(WORKERS) as pool:
        rounds = [
            pool.submit(one_round, number, random.Random(f"{SEED} {number}"))
            for number in range(ROUNDS * times)
        ]
        for each in rounds:
            each.result()


class Inbox:
    """Accepts messages for an honest server, each under a token of its own."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self.accepted: dict[bytes, bytes] = {}
        self.strangers: list[bytes] = []

    def accept(self, _connection: Recorded, data: bytes) -> bytes:
        """Take any message."""
        token = b"T%d" % next(self._numbers)
        self.accepted[token] = data
        return b"250 2.0.0 %s queued\r\n" % token

    def accept_stamped(self, connection: Recorded, data: bytes) -> bytes:
        """Take a message that the filter has made."""
        if is_stamped(data):
            return self.accept(connection, data)
        self.strangers.append(data)
        return b"554 5.7.0 Whose is that?\r\n"

    def refuse(self, _connection: Recorded, line: bytes) -> bytes:
        """Take note of a command that should not have come."""
        self.strangers.append(line)
        return b"250 2.0.0 This should not be\r\n"


# --- Octets that mean something, and mutations of them ---

WORDS = (
    *(b"\r\n", b"\r\n", b"\r", b"\n", b".", b"..", b"\r\n.", b"\n.\n", b"\r.\r", b"\0"),
    *(b" ", b"\t", b"A: b", b"a line of text", b"\x1b[2J", b"\x80", b"\xff", b"\xe4"),
    *(b"MAIL FROM:<c@example.com>\r\n", b"RCPT TO:<d@example.com>\r\n", b"DATA\r\n"),
    *(b"QUIT\r\n", b"\nX-Stamp: 0\n", b"x" * 1100, b"%s%n", b"250 2.0.0 T1 queued"),
)
COMMANDS = (
    *(b"EHLO c.example\r\n", b"HELO c.example\r\n", b"NOOP\r\n", b"RSET\r\n"),
    *(b"MAIL FROM:<a@example.com>\r\n", b"RCPT TO:<b@example.com>\r\n", b"DATA\r\n"),
    *(b".\r\n", b"QUIT\r\n", b"VRFY a\r\n", b"HELP\r\n", b"\r\n", b"STARTTLS\r\n"),
    *(b"AUTH PLAIN AHUAcA==\r\n", b"AUTH LOGIN\r\n", b"dXNlcg==\r\n", b"*\r\n"),
    *(b"XFORWARD ADDR=10.0.0.1 HELO=x\r\n", b"XCLIENT ADDR=9.9.9.9\r\n"),
    *(b"BDAT 20 LAST\r\nSubject: x\r\n\r\nhello\r\n", b"BURL imap://x LAST\r\n"),
    *(b"DATA x\r\n", b"data \t\r\n", b"DATAX\r\n", b"X" * 13_000 + b"DATA\r\n"),
    *(b"TURN\r\n", b"ATRN example.com\r\n", b"LHLO c.example\r\n", b"XEXCH50 1 2\r\n"),
)
FORBIDDEN_VERBS = ("BDAT", "BURL", "STARTTLS", "XEXCH50", "TURN", "ATRN", "LHLO")


def mixture(rng: random.Random, most: int = 60) -> bytes:
    """Return some words in any order, with octets of any value among them."""
    picked = (
        rng.randbytes(rng.randrange(8)) if rng.random() < 0.1 else rng.choice(WORDS)
        for _ in range(rng.randrange(most))
    )
    return b"".join(picked)


def dialogue(rng: random.Random) -> list[bytes]:
    """Return a client's lines, in order, many of them right."""
    lines = [b"EHLO c.example\r\n"]
    for _ in range(rng.randrange(1, 4)):
        if rng.random() < 0.5:
            lines.append(rng.choice(COMMANDS))
        body = re.sub(rb"\r\n\.", b"\r\n..", b"\r\n" + mixture(rng))[2:]
        lines += [*COMMANDS[4:7], b"Subject: x\r\n\r\n", body, b"\r\n.\r\n"]
    return mutated(rng, lines)


def mutated(rng: random.Random, lines: Sequence[bytes]) -> list[bytes]:
    """Take away, put in, change or cut some of the lines."""
    result = list(lines)
    for _ in range(rng.choice((0, 0, 1, 1, 2, 3, 8))):
        place = rng.randrange(len(result))
        result[place : place + 1] = rng.choice(MUTATIONS)(rng, result[place])
    return result or [b""]


def changed_octet(rng: random.Random, octets: bytes) -> bytes:
    place = rng.randrange(len(octets) + 1)
    return octets[:place] + rng.randbytes(1) + octets[place + 1 :]


def other_line_end(rng: random.Random, octets: bytes) -> bytes:
    return octets.replace(b"\r\n", rng.choice((b"\n", b"\r", b"\r\r\n", b"\0\r\n")))


# Each makes any number of pieces of one.
MUTATIONS: Sequence[Callable[[random.Random, bytes], list[bytes]]] = (
    lambda _rng, _piece: [],
    lambda _, piece: [piece, piece],
    lambda rng, piece: [piece, rng.choice(COMMANDS)],
    lambda rng, piece: [rng.choice(COMMANDS), piece],
    lambda rng, piece: [mixture(rng), piece],
    lambda rng, piece: [changed_octet(rng, piece)],
    lambda rng, piece: [other_line_end(rng, piece)],
    lambda rng, piece: [piece[: rng.randrange(len(piece) + 1)]],
    lambda _, piece: [piece.swapcase()],
    lambda _, piece: [b" " + piece],
    lambda rng, _piece: [rng.randbytes(rng.randrange(20_000)), b"\r\n"],
)


def pieces_of(rng: random.Random, octets: bytes) -> list[bytes]:
    """Cut the octets at some places."""
    places = sorted(rng.randrange(len(octets) + 1) for _ in range(rng.randrange(9)))
    return [octets[i:j] for i, j in zip([0, *places], [*places, len(octets)])]


# --- Hostile clients ---


def listen(sock: socket.socket, seconds: float) -> bytes | None:
    """Return the octets of so many seconds: None if nothing came, b"" at the end."""
    if not select.select([sock], [], [], seconds)[0]:
        return None
    try:
        return sock.recv(MEGABYTE)
    except ConnectionResetError:
        return b""


def bombard(address: str, rng: random.Random) -> tuple[bytes, bool]:
    """Be a hostile client; returns all replies, and whether there are no more."""
    lines = dialogue(rng) if rng.random() < 0.8 else [mixture(rng, 400)]
    received = bytearray()
    with RawClient(address) as client:
        sock = client.sock
        with contextlib.suppress(ConnectionError):
            for piece in pieces_of(rng, b"".join(lines)):
                sock.sendall(piece)
                received += listen(sock, rng.choice((0, 0, 0.005))) or b""
            if rng.random() < 0.1:
                leave(client, rng)
                return bytes(received), False
            sock.sendall(b"\r\n.\r\nQUIT\r\n")
        while more := listen(sock, PATIENCE):
            received += more
    assert more is not None, f"no end after {bytes(received)!r}"
    return bytes(received), True


def leave(client: RawClient, rng: random.Random) -> None:
    """Go, softly or not."""
    if rng.random() < 0.5:
        client.reset()
    client.close()


def successes(received: bytes, *, is_all: bool) -> Iterator[bytes]:
    """Yield the successes among the replies to mail data; all must be whole replies.

    Mail data follows a 354 only, and its reply is the next one.
    """
    before, place = b"", 0
    while found := WHOLE_REPLY.match(received, place):
        reply, place = found[0], found.end()
        if before.startswith(b"354") and reply.startswith(b"2"):
            yield reply
        elif not before.startswith(b"354"):
            assert not QUEUED.fullmatch(reply), f"{reply!r} after {before!r}"
        before = reply
    assert place == len(received) or not is_all, f"no reply: {received[place:]!r}"


def strict_server(inbox: Inbox, make_server: MakeServer) -> ScriptedServer:
    """Return an honest server that would take every false end, and wants a stamp."""

    def xclient(connection: Recorded, line: bytes) -> bytes:
        if re.search(rb" ADDR=9\.9", line, re.I):
            return inbox.refuse(connection, line)
        return b"220 again\r\n"

    script: dict[str, Reply] = {
        "DOT": inbox.accept_stamped,
        "XCLIENT": xclient,
        "AUTH": [b"334 VXNlcm5hbWU6\r\n", b"235 2.7.0 Ok\r\n", b"535 5.7.8 No\r\n"],
        "334": [b"334 UGFzc3dvcmQ6\r\n", b"235 2.7.0 Ok\r\n"],
        **dict.fromkeys(FORBIDDEN_VERBS, inbox.refuse),
    }
    return make_server(script, extensions=EXTENSIONS, end_of_data="lenient")


@pytest.mark.parametrize("filter_type", ["pipe", "file"])
def test_hostile_clients(
    filter_type: str,
    make_server: MakeServer,
    target: MakeTarget,
    filter_script: MakeFilter,
) -> None:
    inbox = Inbox()
    server = strict_server(inbox, make_server)
    settings = {"FilterType": filter_type, "FilterCommand": filter_script(STAMP)}
    fired_at = target(server, settings)
    received: list[bytes] = []

    def one_round(_number: int, rng: random.Random) -> None:
        replies, is_all = bombard(fired_at.address, rng)
        received.extend(successes(replies, is_all=is_all))

    in_rounds(one_round, 3)  # they take the least time
    fired_at.check_unharmed()
    assert not inbox.strangers
    lines = [line for connection in server.connections for line in connection.lines]
    assert not [line for line in lines if re.search(rb"[\0\r\n]", line)]
    check_promises(received, inbox, fired_at)


def check_promises(received: Sequence[bytes], inbox: Inbox, target: Target) -> None:
    """Check that each success is for a message of its own, accepted or dropped."""
    tokens = [found[1] for found in map(QUEUED.fullmatch, received) if found]
    digests = [found[1] for found in map(DROPPED.fullmatch, received) if found]
    assert len(tokens) + len(digests) == len(received), received
    assert len(set(tokens)) == len(tokens)
    assert set(tokens) <= inbox.accepted.keys()
    assert set(digests) <= target.dropped()
    assert tokens, TOO_FEW
    assert digests, TOO_FEW


# --- Hostile servers ---


class HostileServer:
    """A server that breaks the rules at every other step or so.

    `odds` are those of breaking one at a step.
    """

    def __init__(self, make_server: MakeServer, rng: random.Random) -> None:
        self._rng = rng
        self.odds = 0.0
        usual = {
            **REPLIES,
            "GREETING": b"220 sink.example ESMTP\r\n",
            "EHLO": multiline(b"250", [b"sink.example", *EXTENSIONS]),
            "QUIT": b"221 2.0.0 Bye\r\n",
        }
        script = {verb: self._handler(reply) for verb, reply in usual.items()}
        self.server = make_server(script)

    def _handler(self, usual: Reply) -> Handler:
        assert isinstance(usual, bytes)

        def handler(_connection: Recorded, _line: bytes) -> Action:
            if self._rng.random() >= self.odds:
                return usual
            return self._rng.choice(HOSTILITIES)(self._rng, usual)

        return handler

    def messages(self) -> Iterator[bytes]:
        """Yield all that it has received to anything that ends mail data somewhere."""
        for connection in self.server.connections:
            for data in connection.received.split(b"DATA\r\n")[1:]:
                end = ANY_END.search(data)
                if end:
                    yield data[: end.end(1)]


def other_code(rng: random.Random, usual: bytes) -> bytes:
    codes = (b"000", b"999", b"2x0", b"25", b"", b"354", b"250", b"334", b"421", b"550")
    return rng.choice(codes) + usual[3:]


def many_lines(rng: random.Random, usual: bytes) -> bytes:
    return (usual[:3] + b"-" + mixture(rng, 5) + b"\r\n") * 300 + usual


# Each makes an action of the usual reply.
HOSTILITIES: Sequence[Callable[[random.Random, bytes], Action]] = (
    lambda rng, _: mixture(rng) + b"\r\n",
    lambda rng, usual: usual[:4] + mixture(rng, 10) + b"\r\n",
    changed_octet,
    other_line_end,
    lambda _, usual: usual + usual,
    lambda rng, usual: usual + other_code(rng, usual),
    other_code,
    other_code,
    many_lines,
    lambda _, usual: usual[:3] + b"-" + b"x" * 2 * MEGABYTE,
    lambda _, usual: (usual[:3] + b"-more\r\n") * 50_000,
    lambda rng, usual: Chunks(pieces_of(rng, usual + usual), 0.001),
    lambda rng, usual: Chunks(pieces_of(rng, usual), 0.001),
    lambda rng, usual: Close(usual[: rng.randrange(len(usual) + 1)]),
    lambda rng, usual: Reset(usual[: rng.randrange(len(usual) + 1)]),
    lambda _rng, _usual: Close(b"421 4.3.2 closing\r\n"),
    lambda _rng, _usual: Stall(),
)


def endure(address: str, key: bytes, rng: random.Random) -> bytes:
    """Be an honest client; returns the reply to its message, or nothing.

    Silence is an AssertionError at the greeting, and at the end of the data.
    """
    commands = [b"EHLO c.example", *(line[:-2] for line in COMMANDS[4:6])]
    with RawClient(address) as client:
        reply = client.reply()
        for line in (*commands, b"DATA"):
            if not reply.startswith((b"2", b"3")):
                return b""
            with contextlib.suppress(ConnectionError):
                client.send(line + b"\r\n")
            if client.at_end():
                return b""  # the last reply was one that nobody had asked for
            reply = client.reply()
        if reply != FILTER_AHEAD:
            return b""
        lines = 300_000 if rng.random() < 0.1 else 9
        client.send(key + b"\r\n\r\n" + b"..line\r\n" * lines)
        return client.command(b".")


def test_hostile_servers(
    make_server: MakeServer, target: MakeTarget, filter_script: MakeFilter
) -> None:
    hostile = HostileServer(make_server, random.Random(SEED))
    fired_at = target(hostile.server, {"FilterCommand": filter_script(STAMP)})
    hostile.odds = 0.12
    received: list[tuple[bytes, bytes]] = []

    def one_round(number: int, rng: random.Random) -> None:
        key = b"X-Key: k%d" % number
        received.append((key, endure(fired_at.address, key, rng)))

    in_rounds(one_round)
    hostile.odds = 0
    fired_at.check_unharmed()
    messages = list(hostile.messages())
    assert not [message for message in messages if not is_stamped(message)]
    taken = {message.partition(b"\r\n")[0] for message in messages}
    dropped = fired_at.dropped()
    for key, reply in received:
        by_filter = DROPPED.fullmatch(reply)
        if reply.startswith(b"2"):
            assert by_filter[1] in dropped if by_filter else key in taken, reply
    assert {reply[:1] for _, reply in received} == {b"", b"2", b"4", b"5"}, TOO_FEW


# --- Hostile filters ---


class Script(NamedTuple):
    """A filter for one message, and what it does."""

    text: str
    output: bytes
    errors: bytes
    status: int | None  # negative for a signal, None for one that never ends


ENDLESS = ("exec sleep 60", "trap '' TERM; exec sleep 60", "kill -STOP $$; exit 0")


class Author:
    """Writes a script for one message, and keeps a record of what it writes."""

    def __init__(self, rng: random.Random, stem: Path, message: bytes) -> None:
        self._rng = rng
        self._stem = stem  # of the files' names
        self._lines: list[str] = []
        self._input: bytes | None = message  # what is to be read yet; None: closed
        self._written = {"output": [b""], "errors": [b""]}
        self._open = {"output", "errors"}

    def script(self) -> Script:
        """Write it."""
        acts = [self._say, self._complain, self._copy, self._read, self._swallow]
        acts += [self._say, self._complain, self._close, self._leave_behind]
        for _ in range(self._rng.randrange(7)):
            self._rng.choice(acts)()
        status, last_line = self._end()
        text = "\n".join([*self._lines, last_line, ""])
        output, errors = (b"".join(self._written[x]) for x in ("output", "errors"))
        return Script(text, output, errors, status)

    def _write(self, where: str, octets: bytes, command: str) -> None:
        if where in self._open:
            self._written[where].append(octets)
            self._lines.append(command)

    def _file(self, octets: bytes) -> str:
        path = Path(f"{self._stem}.{len(self._lines)}")
        path.write_bytes(octets)
        return shlex.quote(str(path))

    def _say(self) -> None:
        octets = mixture(self._rng) * self._rng.choice((1, 1, 1, 1, 500))
        self._write("output", octets, f"cat {self._file(octets)}")

    def _complain(self) -> None:
        code = self._rng.choice((b"", b"", b"250 ", b"450-", b"550", b"\n354 x"))
        octets = code + mixture(self._rng, self._rng.choice((4, 40, 4000)))
        octets += self._rng.choice((b"", b"\n", b"\n \n\n"))
        self._write("errors", octets, f"cat {self._file(octets)} >&2")

    def _copy(self) -> None:
        if self._input is not None and "output" in self._open:
            self._write("output", self._input, "cat")
            self._input = b""

    def _read(self) -> None:
        if self._input is not None:
            self._lines.append("read -r _")
            self._input = self._input.partition(b"\n")[2]

    def _swallow(self) -> None:
        if self._input is not None:
            self._lines.append("cat >/dev/null")
            self._input = b""

    def _close(self) -> None:
        which = self._rng.randrange(3)
        if which == 0:
            self._input = None
        else:
            self._open.discard(("output", "errors")[which - 1])
        self._lines.append(("exec <&-", "exec >&-", "exec 2>&-")[which])

    def _leave_behind(self) -> None:
        self._lines.append("sleep 0.2 &")

    def _end(self) -> tuple[int | None, str]:
        """How it ends: its exit status, and its last line."""
        odds = self._rng.random()
        if odds < 0.5:
            return 0, "exit 0"
        if odds < 0.85:
            status = self._rng.choice((1, 2, 75, 125, 126, 127, 128, 200, 255))
            return status, f"exit {status}"
        if odds < 0.97:
            number = self._rng.choice((1, 2, 6, 9, 13, 15))
            return -number, f"kill -{number} $$"
        return None, self._rng.choice(ENDLESS)


def verdict(script: Script) -> bytes | None:
    """Return the reply after a filter that did this; None: the server's."""
    if script.status is None or script.status < 0:
        return LOCAL_ERROR
    if script.status == 0:
        return None if script.output else LOCAL_ERROR
    lines = [line.strip() for line in script.errors.split(b"\n") if line.strip()]
    last = lines[-1] if lines else b""
    coded = re.fullmatch(rb"([245]\d\d)(?:([ -])(.*))?", last, re.S)
    # Of sysexits(3), those that speak of the filter, and the shell's own two.
    if not coded and script.status in (*range(69, 76), 78, 126, 127):
        return LOCAL_ERROR
    reply = b"550 Content Rejected" + (b"; " + last if last else b"")
    if coded:
        reply = coded[1] + (b" " + coded[3] if coded[2] else b"")
    return re.sub(rb"[^ -~]", b"?", reply)[:510] + b"\r\n"


def mended(message: bytes) -> bytes:
    """Return a message as it must arrive, whatever octets it is made of."""
    lines = re.sub(rb"\r+(?=\n|\Z)", b"", message).replace(b"\r", b" ").split(b"\n")
    if not lines[-1]:
        lines.pop()
    return b"".join(line + b"\r\n" for line in lines)


def submit(address: str, name: str, message: bytes) -> bytes:
    """Send a message as it is, stuffed after each LF; returns the reply to it."""
    stuffed = re.sub(rb"(\A|\n)\.", rb"\1..", message)
    with RawClient(address) as client:
        return client.message(stuffed, b"<%s@example.com>" % name.encode())


def test_hostile_filters(
    make_server: MakeServer, target: MakeTarget, tmp_path: Path
) -> None:
    inbox = Inbox()
    server = make_server({"DOT": inbox.accept}, end_of_data="lenient")
    command = f'exec sh {shlex.quote(str(tmp_path))}/"${{SENDER%@*}}"'
    # Only what never ends shall come too late, however busy the machine is.
    patient = {"TimeOut": 30, "FilterTimeout": 2}
    fired_at = target(server, {"FilterCommand": command, **patient})
    fates = Counter[bytes]()

    def one_round(number: int, rng: random.Random) -> None:
        path = tmp_path / f"s{number}"
        message = mixture(rng) * rng.choice((1, 1, 1, 1, 1, 500)) + b"\r\n"
        script = Author(rng, path, message).script()
        path.write_text(script.text)
        reply = submit(fired_at.address, path.name, message)
        expected = verdict(script)
        if expected is None:
            queued = QUEUED.fullmatch(reply)
            assert queued, (path, reply)
            delivered = unstuffed(inbox.accepted.pop(queued[1]))
            assert delivered == mended(script.output), path
        else:
            assert reply == expected, (path, reply)
        fates[reply[:3]] += 1

    in_rounds(one_round)
    fired_at.check_unharmed()
    assert not inbox.accepted, "more was delivered than was acknowledged"
    assert fates.keys() >= {b"250", b"451", b"550"}, TOO_FEW


# --- Faults that this has found, made to happen ---


# The program, with a connect that returns only when the connection is broken.
BREAKING_CONNECT = """\
import runpy, select, socket, sys
connect = socket.socket.connect
def connect_and_be_reset(sock, address):
    try:
        connect(sock, address)
    except ConnectionResetError:
        pass
    poller = select.poll()
    poller.register(sock, 0)
    poller.poll()
socket.socket.connect = connect_and_be_reset
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


def test_server_gone_as_soon_as_connected(
    make_server: MakeServer, proxsmtpd: StartDaemon
) -> None:
    """The system has no peer address for a socket that was reset."""
    server = make_server({"GREETING": Reset()})
    command = [sys.executable, "-c", BREAKING_CONNECT, PROGRAM]
    daemon = proxsmtpd(server=server, program=command)
    with daemon.connect() as client:
        assert client.reply() == b"421 Connection to server lost\r\n"
        assert client.eof()
    assert daemon.stop() == 0  # that line would come after the reply
    assert "session failed" not in daemon.log()


def test_no_signal_prolongs_a_time_out(
    make_server: MakeServer, proxsmtpd: StartDaemon
) -> None:
    """A wait that a signal interrupts must not begin again with its whole time.

    Each filter that ends sends SIGCHLD, and on a busy machine the kernel gives some of
    them to any thread that takes signals: a stalled server then is waited for as long
    as other sessions' filters come and go.
    """
    server = make_server({"MAIL": Stall()})
    daemon = proxsmtpd("FilterCommand: cat\nTimeOut: 1", server=server)
    with RawClient(daemon.address) as client:
        client.reply()
        client.send(b"EHLO c.example\r\nMAIL FROM:<a@example.com>\r\n")
        server.wait_line(b"MAIL")
        tasks = Path(f"/proc/{daemon.process.pid}/task")
        [session] = {path.name for path in tasks.iterdir()} - {str(daemon.process.pid)}
        status = (tasks / session / "status").read_text()
    [mask] = re.findall(r"^SigBlk:\s*(\w+)$", status, re.M)
    assert int(mask, 16) >> (signal.SIGCHLD - 1) & 1


# --- The soak test lives ---


def test_soak() -> None:
    command = [
        sys.executable,
        str(Path(__file__).parents[1] / "tools" / "soak.py"),
        "0.04",
    ]
    support = Path(__file__).parents[1] / "support"
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": str(support)},
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert not done.stderr
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("\n  pipe ") == 2, done.stdout
    assert done.stdout.endswith("\nflat\n")
