"""`make soak`: some minutes of mixed load, after which nothing may have grown.

    python3 test/tools/soak.py [MINUTES]

The time is 3 minutes, or the environment variable MINUTES, or the argument.  A daemon
of each type of filter runs at the same time, all with one server behind them, and a
few clients visit them at random: small and large messages, filters that reject, crash,
flood or stall, a server that refuses, resets, closes or stalls, clients that leave in
the midst, talk nonsense or say nothing, and more connections than allowed.  After a
first part of the time, and at the end, each daemon is left alone and measured.  The
exit status is 1 if memory, threads, descriptors or children have grown, or if a client
has got another reply than it should.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shlex
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Callable, NamedTuple

from smtp import (
    REPLIES,
    Action,
    Close,
    Handler,
    RawClient,
    Recorded,
    Reset,
    ScriptedServer,
    Stall,
)

Visit = Callable[["Daemon", random.Random, "Tally"], None]

PROGRAM = Path(__file__).resolve().parents[2] / "proxsmtpd.py"
PATIENCE = 10.0  # seconds for what is to come at once
SILENCE = 30.0  # seconds for a daemon to end what it is at
MINUTES = "3"
WORKERS = 16
MOST = 32  # MaxConnections: the clients alone never reach it, a crowd does
TIMEOUT = 2  # of network and filter, in seconds
ROUND = 30.0  # seconds at most until the daemons are left alone and measured
KILOBYTE = 1024
MEGABYTE = KILOBYTE * KILOBYTE
# The allocator keeps what it may need again, now more, now less of it.  A daemon that
# lost a kilobyte of each connection would have lost twice as much in three minutes.
SWAY = 5 * MEGABYTE
# glibc has a heap for each of some threads, and what it keeps in all of them would hide
# the rest; whoever wants to see it can set this.
ONE_HEAP = {"MALLOC_ARENA_MAX": "1"}

SMALL = b"Subject: small\r\n\r\n" + b"A line of text.\r\n" * 100
LARGE = b"Subject: large\r\n\r\n" + b"A line of text.\r\n" * (3 * MEGABYTE // 17)

FILTER = """\
#!/bin/sh
case $SENDER in
filter-rejects@*) echo 'not this one' >&2; exit 1 ;;
filter-crashes@*) kill -KILL $$ ;;
filter-floods@*)  head -c 3000000 /dev/zero | tr '\\0' x >&2; exit 1 ;;
filter-stalls@*)  exec sleep 60 ;;
filter-strews@*)  sleep 0.2 & ;;
esac
test -n "$EMAIL" || exec cat
"""

KINDS = {
    "pipe": "FilterType: pipe\nFilterCommand: {filter}\nKeepAlives: 1\nXClient: on\n",
    "file": "FilterType: file\nFilterCommand: {filter}\nHeader: X-Soak: %d\n",
    "none": "XClient: on\n",
    "reject": "FilterType: reject\n",
}


class Case(NamedTuple):
    """How often a message comes, and its client's reply code."""

    weight: int
    filtered: bytes
    plain: bytes  # where there is no filter


# By the local part of the sender, which the filter and the server go by.
CASES = {
    "all-is-well": Case(40, b"250", b"250"),
    "filter-rejects": Case(6, b"550", b"250"),
    "filter-crashes": Case(2, b"451", b"250"),
    "filter-floods": Case(1, b"550", b"250"),
    "filter-stalls": Case(1, b"451", b"250"),
    "filter-strews": Case(2, b"250", b"250"),
    "mail-refused": Case(2, b"450", b"450"),
    "mail-closed": Case(1, b"421", b"421"),
    "data-refused": Case(2, b"450", b"450"),
    "data-reset": Case(1, b"421", b"421"),
    "dot-refused": Case(2, b"450", b"450"),
    "dot-closed": Case(1, b"421", b"421"),
    "dot-stalled": Case(1, b"421", b"421"),
}
BUSY = b"421 Server busy"
REJECTED = b"530"  # by FilterType reject, whatever the message
ACTIONS: dict[bytes, Action] = {
    b"refused": b"450 4.0.0 not now\r\n",
    b"closed": Close(),
    b"reset": Reset(),
    b"stalled": Stall(),
}


# --- What a process uses ---


class Usage(NamedTuple):
    """The resources of a process."""

    memory: int  # octets, its proportional share of what it shares included
    threads: int
    descriptors: int
    children: int

    @classmethod
    def of(cls, pid: int) -> Usage:
        """Measure a process now."""
        proc = Path(f"/proc/{pid}")
        rollup = (proc / "smaps_rollup").read_text()
        return cls(
            int(re.findall(r"^Pss:\s*(\d+) kB$", rollup, re.M)[0]) * KILOBYTE,
            len(list((proc / "task").iterdir())),
            len(list((proc / "fd").iterdir())),
            count_children(pid),
        )

    @property
    def counts(self) -> tuple[int, int, int]:
        """Return the counts that must be the same again; memory may vary a little."""
        return self.threads, self.descriptors, self.children

    @property
    def is_idle(self) -> bool:
        """Return whether no connection is being served."""
        return self.threads == 1 and not self.children


def count_children(pid: int) -> int:
    """How many children a process has, dead ones included."""
    count = 0
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(FileNotFoundError):  # the thread has ended
            count += len(path.read_text().split())
    return count


def growth(start: Usage, end: Usage) -> list[str]:
    """Return the resources that have grown, or changed where they must not."""
    names = ("threads", "descriptors", "children")
    found = [
        f"{before} {name} have become {after}"
        for name, before, after in zip(names, start.counts, end.counts)
        if before != after
    ]
    if end.memory > start.memory + SWAY:
        found.append(f"memory has grown by {(end.memory - start.memory) >> 10} kB")
    return found


# --- The server ---


def sabotaged(verb: str) -> Handler:
    """Return a handler that breaks at this verb if the sender's name says so."""
    usual = REPLIES[verb]
    assert isinstance(usual, bytes)

    def handler(connection: Recorded, _line: bytes) -> Action:
        mail = next(x for x in reversed(connection.lines) if x.startswith(b"MAIL"))
        found = re.search(rb"<%s-(\w+)@" % verb.lower().encode(), mail)
        return ACTIONS[found[1]] if found else usual

    return handler


def make_server(port: int) -> ScriptedServer:
    """Start the server of all daemons, for a round."""
    extensions = (b"PIPELINING", b"8BITMIME", b"XCLIENT ADDR NAME PORT")
    script = {verb: sabotaged(verb) for verb in ("MAIL", "DATA")}
    server = ScriptedServer(script, extensions=extensions, port=port)
    answer = sabotaged("DOT")

    def end_of_data(connection: Recorded, data: bytes) -> Action | None:
        # A server that remembers all that it gets is for shorter tests.
        server.messages.clear()
        connection.log.clear()
        return answer(connection, data)

    server.script["DOT"] = end_of_data
    return server


def reserve_port() -> socket.socket:
    """Return a socket that keeps a port for one that is going to listen there."""
    holder = socket.socket()
    holder.bind(("127.0.0.1", 0))
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return holder


def port_of(holder: socket.socket) -> int:
    port: int = holder.getsockname()[1]
    return port


# --- The daemons ---


class Daemon(NamedTuple):
    """A running proxsmtpd."""

    kind: str
    address: str
    process: subprocess.Popen[bytes]
    log: Path

    def expects(self, case: Case) -> bytes:
        """Return the reply code that a client gets in the end."""
        if self.kind == "reject":
            return REJECTED
        return case.plain if self.kind == "none" else case.filtered

    def usage(self) -> Usage:
        """Measure it when it is left alone."""
        deadline = time.monotonic() + SILENCE
        found = Usage.of(self.process.pid)
        # Nobody tells when the last connection is done with.
        while not found.is_idle and time.monotonic() < deadline:
            time.sleep(0.1)
            found = Usage.of(self.process.pid)
        return found

    def wait_listening(self) -> None:
        """Return once it listens."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline and self.process.poll() is None:
            with contextlib.suppress(ConnectionRefusedError):
                RawClient(self.address).close()
                return
            time.sleep(0.02)
        raise AssertionError(self.log.read_text())

    def faults(self) -> list[str]:
        """Return faults of its own from its log, and the files that it has left."""
        found = re.findall(r"session failed: (?!Traceback| ).*", self.log.read_text())
        return found + [
            f"it left {path}" for path in self.log.parent.glob("proxsmtpd.*")
        ]

    def end(self) -> None:
        """End it as an administrator would."""
        self.process.terminate()
        assert self.process.wait(PATIENCE) == 0, self.log.read_text()[-KILOBYTE:]


def start(kind: str, directory: Path, port: int, server_port: int) -> Daemon:
    """Start the daemon of a kind; it has its files in the directory."""
    script = directory / "filter"
    script.write_text(FILTER)
    script.chmod(0o755)
    config = directory / f"{kind}.conf"
    config.write_text(
        f"Listen: 127.0.0.1:{port}\nOutAddress: 127.0.0.1:{server_port}\n"
        f"TempDirectory: {directory}\nMaxConnections: {MOST}\n"
        f"TimeOut: {TIMEOUT}\nFilterTimeout: {TIMEOUT}\nProcesses: 1\n"
        + KINDS[kind].format(filter=script)
    )
    given = os.environ.get("PROXSMTPD")
    command = shlex.split(given) if given else [sys.executable, "-IS", str(PROGRAM)]
    log = directory / f"{kind}.log"
    with log.open("wb") as stream:
        command += ["-d", "3", "-f", str(config)]
        process = subprocess.Popen(
            command, stderr=stream, env={**ONE_HEAP, **os.environ}
        )
    return Daemon(kind, f"127.0.0.1:{port}", process, log)


@contextlib.contextmanager
def running(server_port: int) -> Iterator[list[Daemon]]:
    """Provide a daemon of each kind, ended on leaving."""
    with contextlib.ExitStack() as at_end:
        directory = Path(at_end.enter_context(tempfile.TemporaryDirectory()))
        daemons = []
        for kind in KINDS:
            port = port_of(at_end.enter_context(reserve_port()))
            daemons.append(start(kind, directory, port, server_port))
            at_end.callback(daemons[-1].end)
        for daemon in daemons:
            daemon.wait_listening()
        yield daemons


# --- The clients ---


class Tally:
    """Counts the clients' replies, and collects the wrong ones."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.replies = Counter[str]()
        self.wrong: list[str] = []

    def note(self, daemon: Daemon, what: str, reply: bytes, expected: bytes) -> None:
        """Note a reply, by its beginning, and what it should begin with."""
        with self._lock:
            self.replies[reply[:3].decode()] += 1
            if not reply.startswith((expected, BUSY)):
                self.wrong.append(f"{daemon.kind}: {what} got {reply!r}")


def converse(client: RawClient, sender: str, body: bytes) -> bytes:
    """Send a message up to its last line; returns the last reply."""
    reply = client.reply()
    mail = b"MAIL FROM:<%s@example.com>" % sender.encode()
    for line in (b"EHLO c.example", mail, b"RCPT TO:<b@example.com>", b"DATA"):
        if reply.startswith((b"4", b"5")):
            return reply
        reply = client.command(line)
    if reply.startswith(b"354"):
        client.send(body)
    return reply


def send(daemon: Daemon, rng: random.Random, tally: Tally) -> None:
    """Send a message that has the fate of one of the cases."""
    weights = [case.weight for case in CASES.values()]
    [(name, case)] = rng.choices(list(CASES.items()), weights)
    with RawClient(daemon.address) as client:
        reply = converse(client, name, rng.choices((SMALL, LARGE), (20, 1))[0])
        if reply.startswith(b"354"):
            reply = client.command(b".")
        tally.note(daemon, name, reply, daemon.expects(case))


def send_at_once(daemon: Daemon, _rng: random.Random, tally: Tally) -> None:
    """Send two messages' commands in one go, to see pipelines drain."""
    lines = [b"MAIL FROM:<a@example.com>", b"RCPT TO:<b@example.com>", b"RSET"] * 2
    with RawClient(daemon.address) as client:
        greeting = client.reply()
        tally.note(daemon, "a pipeline", greeting, b"220")
        if greeting.startswith(b"220"):
            client.send(b"\r\n".join([b"EHLO c.example", *lines, b"QUIT", b""]))
            replies = [client.reply() for _ in range(len(lines) + 2)]
            tally.note(daemon, "the end of a pipeline", replies[-1], b"221")


def leave(daemon: Daemon, rng: random.Random, _tally: Tally) -> None:
    """Go in the midst of a message, softly or not."""
    with RawClient(daemon.address) as client:
        converse(client, "all-is-well", rng.choice((SMALL, LARGE)))
        if rng.random() < 0.5:
            client.reset()


def stall(daemon: Daemon, rng: random.Random, tally: Tally) -> None:
    """Say nothing more, in the midst of a message or at once."""
    with RawClient(daemon.address) as client:
        if rng.random() < 0.5:
            reply = converse(client, "all-is-well", SMALL)
        else:
            reply = client.reply()
        if not reply.startswith((b"4", b"5")):
            reply = client.reply()
            tally.note(daemon, "silence", reply, b"421 Timed out")


def babble(daemon: Daemon, rng: random.Random, tally: Tally) -> None:
    """Send octets that mean nothing."""
    with RawClient(daemon.address) as client:
        greeting = client.reply()
        tally.note(daemon, "nonsense", greeting, b"220")
        if greeting.startswith(b"220"):
            client.send(rng.randbytes(20 * KILOBYTE) + b"\r\nQUIT\r\n")
            client.rest()


def crowd(daemon: Daemon, _rng: random.Random, tally: Tally) -> None:
    """More connections than the daemon takes."""
    with contextlib.ExitStack() as at_end:
        clients = [
            at_end.enter_context(RawClient(daemon.address)) for _ in range(MOST + 1)
        ]
        replies = [client.reply() for client in clients]
        tally.note(daemon, "a crowd", max(replies), BUSY)


VISITS: dict[Visit, int] = {
    send: 80,
    send_at_once: 10,
    leave: 6,
    stall: 2,
    babble: 2,
    crowd: 1,
}


def call(visit: Visit, daemon: Daemon, rng: random.Random, tally: Tally) -> None:
    """Make a visit; one that cannot be finished is wrong."""
    try:
        visit(daemon, rng, tally)
    except (AssertionError, OSError) as error:
        tally.wrong.append(f"{daemon.kind}: {visit.__name__}: {error!r}")


def work(
    daemons: Sequence[Daemon], rng: random.Random, until: float, tally: Tally
) -> None:
    """Be one client after the other until that time."""
    while time.monotonic() < until:
        [visit] = rng.choices(list(VISITS), list(VISITS.values()))
        call(visit, rng.choice(daemons), rng, tally)


def load(daemons: Sequence[Daemon], port: int, seconds: float, tally: Tally) -> None:
    """Run some clients at a time for so many seconds, one of each kind a daemon."""
    until = time.monotonic() + seconds
    rng = [random.Random(f"{seconds} {number}") for number in range(WORKERS)]
    with make_server(port), ThreadPoolExecutor(WORKERS) as pool:
        jobs = [
            pool.submit(call, visit, daemon, rng[0], tally)
            for visit in VISITS
            for daemon in daemons
        ]
        jobs += [pool.submit(work, daemons, die, until, tally) for die in rng]
        for job in jobs:
            job.result()


# --- The report ---


def table(daemons: Sequence[Daemon], usages: Sequence[Usage], when: str) -> None:
    """Print what the daemons use."""
    print(f"\n{when:24}     memory  threads  descriptors  children")
    for daemon, usage in zip(daemons, usages):
        memory, threads, descriptors, children = usage
        print(
            f"  {daemon.kind:20} {memory >> 10:8} kB {threads:8} {descriptors:12}"
            f" {children:9}"
        )


def soak(seconds: float) -> list[str]:
    """Load and measure; returns what is wrong."""
    rounds = max(2, round(seconds / ROUND))
    tally = Tally()
    with reserve_port() as holder, running(port_of(holder)) as daemons:
        for number in range(rounds):
            load(daemons, port_of(holder), seconds / rounds, tally)
            usages = [daemon.usage() for daemon in daemons]
            if not number:
                first = usages
            table(daemons, usages, f"round {number + 1} of {rounds}")
        wrong = [
            f"{daemon.kind}: {text}"
            for daemon, before, after in zip(daemons, first, usages)
            for text in growth(before, after) + daemon.faults()
        ]
    print(f"\nreplies: {dict(sorted(tally.replies.items()))}")
    return wrong + tally.wrong


def main(arguments: Sequence[str]) -> int:
    """Run for as long as it says; the exit status is 1 if anything is wrong."""
    minutes = arguments[0] if arguments else os.environ.get("MINUTES", MINUTES)
    print(f"{minutes} minutes of mixed load")
    wrong = soak(float(minutes) * 60)
    for text in wrong:
        print(f"WRONG: {text}")
    print("not flat" if wrong else "flat")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
