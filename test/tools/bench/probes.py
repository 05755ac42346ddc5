"""What is not a rate of messages: starting, idle connections, and slow filters."""

from __future__ import annotations

import contextlib
import socket
import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

from cases import SLOW_CLIENTS, VISITS_A_SECOND, Load, Pace
from contenders import HOST, Contender, Daemon, Site, Start
from load import send, sources

CONNECTIONS = 4096  # MaxConnections: more than ever are opened here
TIMEOUT = 5.0  # seconds for a greeting
VISITORS = 64  # new connections that may be under way at a time
FAST_MESSAGES = 10
# How long the slow filter sleeps bounds how long the fast messages may take.
SLOW_SECONDS = 2
SLOW_PATIENCE = 1.0


def starters(contenders: Sequence[Contender]) -> list[tuple[str, Start]]:
    """The keys and start functions of those contenders that are programs."""
    return [(each.key, each.start) for each in contenders if each.start is not None]


# --- From exec to listening ---------------------------------------------------


def start_times(
    site: Site, contenders: Sequence[Contender], count: int
) -> dict[str, float]:
    """The median seconds from exec to listening, for each contender's key."""
    found: dict[str, list[float]] = {key: [] for key, _ in starters(contenders)}
    for _ in range(count):
        for key, start in starters(contenders):
            with start(site, {}, CONNECTIONS) as daemon:
                found[key].append(daemon.start_time)
    return {key: statistics.median(seconds) for key, seconds in found.items()}


# --- Idle connections ---------------------------------------------------------


@dataclass(frozen=True)
class Weight:
    """What a program takes up with so many idle connections."""

    connections: int
    memory: float  # KiB of proportional set size
    threads: int


@dataclass
class Idle:
    """How a contender bears connections on which nothing happens."""

    weights: list[Weight] = field(default_factory=list)
    ended_at: Optional[int] = None  # connections that were open when it gave up
    visits: Optional[Visits] = None

    @property
    def each(self) -> float:
        """KiB that one more idle connection takes."""
        first, last = self.weights[0], self.weights[-1]
        more = last.connections - first.connections
        return (last.memory - first.memory) / more if more else 0.0


@dataclass(frozen=True)
class Visits:
    """What new connections met, beside so many idle ones."""

    beside: int
    asked: int
    waits: list[float]  # seconds to the greeting, of those that were greeted
    seconds: float  # in which all were opened

    @property
    def refused(self) -> int:
        """Those that got no greeting."""
        return self.asked - len(self.waits)


def greet(port: int) -> socket.socket:
    """Connect and read a 220; OSError if none comes."""
    client = socket.create_connection((HOST, port), TIMEOUT)
    try:
        greeting = b""
        while not greeting.endswith(b"\n"):
            octets = client.recv(512)
            if not octets:
                raise ConnectionError("closed before the greeting")
            greeting += octets
        if not greeting.startswith(b"220"):
            raise ConnectionError(greeting.decode("ascii", "replace"))
    except OSError:
        client.close()
        raise
    return client


def idle(site: Site, start: Start, pace: Pace) -> Idle:
    """Weigh a program with more and more idle connections, then open new ones."""
    found = Idle()
    with contextlib.ExitStack() as stack:
        daemon = stack.enter_context(start(site, {}, CONNECTIONS))
        opened = 0
        for connections in pace.idle:
            opened += open_idle(daemon, connections - opened, stack)
            if opened < connections or not daemon.alive:
                found.ended_at = opened
                break
            found.weights.append(weigh(daemon, connections))
        else:
            found.visits = visit_many(daemon, opened, pace.visits)
    return found


def open_idle(daemon: Daemon, count: int, stack: contextlib.ExitStack) -> int:
    """Open connections that last as long as the stack; returns how many came up."""
    for number in range(count):
        try:
            stack.enter_context(greet(daemon.port))
        except OSError:
            return number
    return count


def weigh(daemon: Daemon, connections: int) -> Weight:
    """Look at a program that has so many idle connections."""
    return Weight(connections, daemon.memory(), daemon.threads())


def visit(port: int) -> float:
    """Connect and leave; returns the seconds to the greeting, OSError without one."""
    began = time.monotonic()
    with greet(port) as client:
        greeted = time.monotonic() - began
        client.sendall(b"QUIT\r\n")
        client.recv(512)
    return greeted


def visit_many(daemon: Daemon, beside: int, count: int) -> Visits:
    """Open new connections at an even pace, whatever becomes of those before."""
    began = time.monotonic()
    with ThreadPoolExecutor(VISITORS) as pool:
        visits = []
        for number in range(count):
            due = began + number / VISITS_A_SECOND
            time.sleep(max(0.0, due - time.monotonic()))
            visits.append(pool.submit(visit, daemon.port))
        seconds = time.monotonic() - began
    return Visits(beside, count, list(greeted(visits)), seconds)


def greeted(visits: Sequence[Future[float]]) -> Iterator[float]:
    """The results of the visits that had one."""
    for each in visits:
        with contextlib.suppress(OSError):
            yield each.result()


# --- Slow filters -------------------------------------------------------------


@dataclass(frozen=True)
class Patience:
    """What one message takes, in seconds, alone and beside slow filters."""

    alone: float
    beside: float
    slow: int  # slow filters that ran


def slow_filter(site: Site, start: Start, rounds: int) -> Patience:
    """Send messages whose filter is fast while others' filters sleep."""
    started = site.directory / "slow-filters"
    slow = f"echo >>{started}; sleep {SLOW_SECONDS}"
    command = f"case $SENDER in *slow*) {slow};; esac; cat"
    found = []
    with start(site, {"FilterCommand": command}, CONNECTIONS) as daemon:
        for _ in range(rounds):
            started.write_bytes(b"")
            found.append(slow_round(daemon, started))
            daemon.settle()
    return Patience(
        statistics.median(each.alone for each in found),
        statistics.median(each.beside for each in found),
        min(each.slow for each in found),
    )


def slow_round(daemon: Daemon, started: Path) -> Patience:
    """Time the fast messages alone, then while all the slow filters run."""
    alone = seconds_a_message(daemon)
    crowd = Load(clients=SLOW_CLIENTS)
    with sources(daemon.port, crowd, SLOW_CLIENTS, "slow@example.com"):
        deadline = time.monotonic() + SLOW_PATIENCE
        while line_count(started) < SLOW_CLIENTS and time.monotonic() < deadline:
            time.sleep(0.01)
        return Patience(alone, seconds_a_message(daemon), line_count(started))


def seconds_a_message(daemon: Daemon) -> float:
    """What one message takes, of several that are sent one after the other."""
    outcome = send(daemon.port, Load(), FAST_MESSAGES, TIMEOUT)
    return outcome.seconds / max(outcome.accepted, 1)


def line_count(path: Path) -> int:
    """The lines of a file."""
    return path.read_bytes().count(b"\n")
