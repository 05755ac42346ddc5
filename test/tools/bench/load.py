"""Sending messages: through a contender, straight to the sink, or to a bare filter."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Callable

from cases import Load
from contenders import HERE, HOST, BenchError, Cpu, Daemon, needed
from interrupts import INTERRUPTS

SENDER = "sender@example.com"
# The longest that one measurement waits for its first message: a 20 MB one through
# the slowest contender takes some seconds.
PATIENCE = 15.0
POLL = 0.02  # seconds between two looks at the load programs
LINE = b"This is a line of a message that a filter is to read and to write.\r\n"


@dataclass(frozen=True)
class Outcome:
    """What has become of the messages of one measurement."""

    asked: int
    accepted: int
    seconds: float  # until the last one was accepted
    complaint: str = ""  # why the load program gave up, if it did

    @property
    def rate(self) -> float:
        """Accepted messages a second."""
        return self.accepted / self.seconds if self.accepted else 0.0

    @property
    def failed(self) -> int:
        """Messages refused, dropped, or not through when the time was up."""
        return self.asked - self.accepted


class Source:
    """A running smtp-source (or bulk.py), which counts into a file what was accepted.

    A pipe would have this process woken up for each message, on a processor that the
    contenders need.
    """

    def __init__(
        self, port: int, load: Load, count: int, sender: str, output: IO[bytes]
    ) -> None:
        # Each session is to have a message at least.
        self.count = max(count, load.sessions)
        self._output = output
        self._process = subprocess.Popen(
            source_command(port, load, self.count, sender),
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._given_up = False

    @property
    def running(self) -> bool:
        """Whether it still sends."""
        return self._process.poll() is None

    def accepted(self) -> int:
        """The messages that were accepted until now."""
        counts = re.findall(rb"(\d+)\r", self._tail())
        return int(counts[-1]) if counts else 0

    def accepted_at(self) -> float:
        """The time, as time.time() has it, of the last one that was accepted."""
        return os.fstat(self._output.fileno()).st_mtime

    def complaint(self) -> str:
        """Its error, if it has ended with one."""
        if not self._given_up:
            return ""
        return self._tail().decode("ascii", "replace").split("\r")[-1].strip()

    def stop(self) -> None:
        """End it, whether or not it has sent everything."""
        with INTERRUPTS.held():
            status = self._process.poll()
            if status is None:
                self._process.kill()
                self._process.wait()
            elif status > 0:
                self._given_up = True

    def _tail(self) -> bytes:
        size = os.fstat(self._output.fileno()).st_size
        return os.pread(self._output.fileno(), 512, max(0, size - 512))


def source_command(port: int, load: Load, count: int, sender: str) -> list[str]:
    """The command line that sends so many messages."""
    if load.bulk:
        program = [sys.executable, "-IS", str(HERE / "bulk.py"), "source"]
        return [*program, HOST, str(port), str(load.length), str(count)]
    return [
        *[needed("smtp-source"), "-4", "-c", "-M", "client.example"],
        *["-s", str(load.sessions), "-m", str(count)],
        *(["-d"] if load.lasting else []),
        *(["-l", str(load.length)] if load.length else []),
        *["-f", sender, "-t", "recipient@example.com", f"inet:{HOST}:{port}"],
    ]


@contextlib.contextmanager
def sources(
    port: int, load: Load, count: int, sender: str = SENDER
) -> Iterator[list[Source]]:
    """Start the clients that send `count` messages together; they end with this."""
    with contextlib.ExitStack() as stack:
        each = -(-count // load.clients)
        started = []
        for _ in range(load.clients):
            output = stack.enter_context(tempfile.TemporaryFile())
            with INTERRUPTS.held():
                started.append(Source(port, load, each, sender, output))
                stack.callback(started[-1].stop)
        yield started


def wait_for(clients: Sequence[Source], seconds: float) -> None:
    """Return when all is sent or the time is up, but not before a first message."""
    began = time.monotonic()
    while any(source.running for source in clients):
        passed = time.monotonic() - began
        if passed > seconds and any(source.accepted() for source in clients):
            return
        if passed > PATIENCE:
            return
        time.sleep(POLL)


def send(port: int, load: Load, count: int, seconds: float, **options: str) -> Outcome:
    """Send at least `count` messages, for so many seconds at the most."""
    began = time.time()
    with sources(port, load, count, **options) as clients:
        wait_for(clients, seconds)
        for source in clients:
            source.stop()
        last = max(source.accepted_at() for source in clients)
        complaints = [source.complaint() for source in clients]
        return Outcome(
            sum(source.count for source in clients),
            sum(source.accepted() for source in clients),
            max(last - began, 0.001),
            next(filter(None, complaints), ""),
        )


class Subject:
    """What messages are sent through, and what they cost there."""

    def send(self, load: Load, count: int, seconds: float) -> Outcome:
        """Send `count` messages, for so many seconds at the most."""
        raise NotImplementedError

    def cpu(self) -> Cpu:
        """Processor time taken until now."""
        return Cpu()

    def settle(self) -> None:
        """Return when nothing of the last measurement goes on."""


class Straight(Subject):
    """No program at all: the source talks to the sink."""

    def __init__(self, sink_port: int) -> None:
        self._port = sink_port

    def send(self, load: Load, count: int, seconds: float) -> Outcome:
        return send(self._port, load, count, seconds)


class Relay(Subject):
    """A program between the source and the sink."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    def send(self, load: Load, count: int, seconds: float) -> Outcome:
        return send(self._daemon.port, load, count, seconds)

    def cpu(self) -> Cpu:
        return self._daemon.cpu()

    def settle(self) -> None:
        self._daemon.settle()


class Spawner(Subject):
    """A filter alone: started with the message as its input, its output read.

    There are as many at a time as there are messages under way, but no more than
    processors.
    """

    def __init__(self, command: str, directory: Path) -> None:
        self._command = command
        self._path = directory / "message"

    def send(self, load: Load, count: int, seconds: float) -> Outcome:
        self._path.write_bytes(LINE * (1 + load.length // len(LINE)))
        began = time.monotonic()
        tasks = Tasks(count, began + seconds)
        workers = min(load.parallel, os.cpu_count() or 1)
        with ThreadPoolExecutor(workers) as pool, tasks:
            list(pool.map(tasks.work, [self._run] * workers))
        return Outcome(count, tasks.done, time.monotonic() - began)

    def _run(self) -> None:
        output, written = os.pipe()
        with open(output, "rb", buffering=0) as stream:
            with open(written, "wb"):
                pid = os.posix_spawn(
                    "/bin/sh",
                    ["sh", "-c", self._command],
                    os.environ,
                    file_actions=[
                        (os.POSIX_SPAWN_OPEN, 0, str(self._path), os.O_RDONLY, 0),
                        (os.POSIX_SPAWN_DUP2, written, 1),
                    ],
                )
            while stream.read(65536):
                pass
        if os.waitpid(pid, 0)[1]:
            raise BenchError(f"{self._command!r} has failed")


class Tasks:
    """A number of equal tasks that several threads work off until a time.

    What is left at the end of the with statement is given up.
    """

    def __init__(self, count: int, deadline: float) -> None:
        self.done = 0
        self._left = count
        self._deadline = deadline
        self._lock = threading.Lock()

    def __enter__(self) -> Tasks:
        return self

    def __exit__(self, *_error: object) -> None:
        with self._lock:
            self._left = 0

    def work(self, task: Callable[[], None]) -> None:
        """Do tasks until none is left or the time is up."""
        while self._take():
            task()
            with self._lock:
                self.done += 1

    def _take(self) -> bool:
        with self._lock:
            self._left -= 1
            late = self.done and time.monotonic() > self._deadline
            return self._left >= 0 and not late
