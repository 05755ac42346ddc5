"""Faults of client, server, filter and system: replies, recovery, what is left.

`support/fault_table.py` is the table.  Each of its cases is one mail transaction
through a real process, run together with others that need the same settings.
OutAddress is a port alone, so that proxsmtpd connects back to where a client comes
from: each case has a loopback address of its own, there a scripted server that breaks
as the case says, and, by $CLIENT, a filter of its own.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import re
import resource
import select
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, Optional, cast

import pytest

import fault_table
from fault_table import Case
from helpers import (
    MEGABYTE,
    NETWORK,
    PATIENCE,
    StartDaemon,
    as_root,
    children,
    idle_user,
    in_clear_and_in_tls,
    marked_processes,
    open_files,
    poll,
    port_of,
    processes,
    reserve_port,
)
from smtp import (
    EXTENSIONS,
    Action,
    Close,
    RawClient,
    Recorded,
    Reply,
    Reset,
    ScriptedServer,
    Stall,
    multiline,
)
from tls import (
    Certificates,
    TlsClient,
    TlsServer,
    is_encrypted,
)

# So many cases at a time; those that wait for time outs do little else.
FEW, MANY = 6, 16

SETTINGS: Mapping[str, Mapping[str, object]] = {
    "pipe": {"FilterType": "pipe"},
    "file": {"FilterType": "file"},
    "kept": {"KeepAlives": 1},
    "stream": {"FilterCommand": ""},
    "kept-stream": {"FilterCommand": "", "KeepAlives": 1},
}
PATIENT = {"TimeOut": 30, "FilterTimeout": 30}
# A NOOP, too, comes after a second.
IMPATIENT = ({"TimeOut": 1, "FilterTimeout": 1}, {"TimeOut": 2, "FilterTimeout": 9})

HEADER = b"Subject: test\r\n\r\n"
LINES = b"".join(b"%070d\r\n" % number for number in range(40_000))
BODIES = {"short": b"Hello\r\n", "long": LINES, "huge": LINES * 3}

DIALOGUE = ("greeting", "EHLO", "MAIL", "RCPT", "DATA", "body", "dot", "QUIT")
OTHER_DIALOGUES = {
    "RSET": ("greeting", "EHLO", "MAIL", "RCPT", "RSET", "QUIT"),
    "line": ("greeting", "EHLO", "line"),
    "HELP": ("greeting", "EHLO", "HELP"),
}
SAYS = {
    "greeting": b"",
    "EHLO": b"EHLO client.example\r\n",
    "MAIL": b"MAIL FROM:<a@example.com>\r\n",
    "RCPT": b"RCPT TO:<b@example.com>\r\n",
    "DATA": b"DATA\r\n",
    "body": HEADER,
    "dot": b".\r\n",
    "RSET": b"RSET\r\n",
    "QUIT": b"QUIT\r\n",
    "line": b"MAIL FROM:<a@exam",
    "HELP": b"HELP\r\n" * 400,
}
HELLO = multiline(b"250", [b"smtp.passthru", *EXTENSIONS])
GO = b"354 End data with <CR><LF>.<CR><LF>\r\n"
USUAL = frozenset(
    fault_table.REPLIES[name]
    for name in ("hi", "hello", "mail", "rcpt", "go", "start", "queued", "ok", "bye")
)

# Where a moment of the table is another step for the client, or for the server.
CLIENT_STEP = {
    "XCLIENT": "EHLO",
    "filter": "dot",
    "own-RSET": "dot",
    "NOOP": "body",
    "filter-NOOP": "dot",
}
SERVER_STEP = {
    "connect": "GREETING",
    "greeting": "GREETING",
    "EHLO2": "EHLO",
    "body": "DATA",
    "dot": "DOT",
    "own-RSET": "RSET",
    "filter-NOOP": "NOOP",
}
# What the server does that is wrong, and what it says of it in the midst of things.
ACTIONS: Mapping[str, Action] = {
    "4xx": b"450 4.0.0 not now\r\n",
    "5xx": b"550 5.0.0 never\r\n",
    "421": Close(b"421 4.3.2 closing\r\n"),
    "resets": Reset(),
    "closes": Close(),
    "stalls": Stall(),
}
LAST_WORDS: Mapping[str, Action] = {
    **ACTIONS,
    "4xx": Close(b"450 4.0.0 not now\r\n"),
    "5xx": Close(b"550 5.0.0 never\r\n"),
}
GREETINGS: Mapping[str, Action] = {
    **ACTIONS,
    "resets": Reset(b"220 sink.exam"),
    "closes": Close(b"220 sink.exam"),
}


Condition = contextlib.AbstractContextManager[None]  # while it lasts, something fails


class Barrier:
    """Holds a filter, or the server, until the test lets it go on."""

    def __init__(self, stem: Path) -> None:
        self.reached, self.go = Path(f"{stem}.reached"), Path(f"{stem}.go")
        self._ends = [self._open(self.reached), self._open(self.go)]
        self._is_open = threading.Event()

    @staticmethod
    def _open(path: Path) -> int:
        os.mkfifo(path)
        path.chmod(0o666)
        return os.open(path, os.O_RDWR | os.O_NONBLOCK)

    def pass_through(self) -> None:
        """Say that the moment has come, and wait; a filter uses the fifos."""
        os.write(self._ends[0], b"\n")
        self.wait_open()

    def wait_open(self) -> None:
        """Wait until the test goes on."""
        self._is_open.wait(PATIENCE)

    def wait_reached(self) -> None:
        """Wait until the moment has come."""
        poller = select.poll()
        poller.register(self._ends[0], select.POLLIN)
        assert poller.poll(PATIENCE * 1000), "it has not come to this"

    def open(self) -> None:
        """Let everybody go on."""
        self._is_open.set()
        os.write(self._ends[1], b"go\n")

    def close(self) -> None:
        """Release everybody who still waits."""
        self._is_open.set()
        for end in self._ends:
            os.close(end)


class Scenario:
    """A daemon, and the addresses for the cases that need its settings."""

    def __init__(
        self,
        start: StartDaemon,
        way: str,
        place: Path,
        settings: Mapping[str, object],
        tls: Optional[Certificates] = None,
        **options: Any,
    ) -> None:
        """`options` are for the daemon; `tls` is the fixture."""
        self.server_tls = tls and tls.context()
        self.way, self.filters = way, place / "filters"
        self.filters.mkdir()
        self._holder = reserve_port()
        self.port = port_of(self._holder)
        self.daemon = start(
            {
                "OutAddress": self.port,
                "FilterCommand": f'. "{self.filters}/$CLIENT"',
                "XClient": "on",
                **SETTINGS[way],
                **settings,
            },
            level=3,
            **options,
        )
        self.pid = self.daemon.process.pid
        self._hosts = (f"{NETWORK}.{n // 250}.{n % 250 + 1}" for n in itertools.count())
        self._before = footprint(self.pid)
        self._others = processes()  # none of these is a filter

    def close(self) -> None:
        """Give the port back."""
        self._holder.close()

    def next_host(self) -> str:
        """Return a loopback address that no case has had."""
        return next(self._hosts)

    def run(self, case: Case) -> str:
        """Run one case; returns what is wrong with it, or nothing."""
        with contextlib.closing(Trial(case, self)) as trial:
            return trial.verdict(trial.fail) or trial.verdict(trial.recover)

    def run_all(self, cases: Iterable[Case], workers: int) -> None:
        """Run cases, so many at a time; fails for all that are wrong."""
        with ThreadPoolExecutor(workers) as pool:
            wrong = list(filter(None, pool.map(self.run, cases)))
        if wrong:
            pytest.fail("\n".join(wrong), pytrace=False)

    def run_during(self, fault: Condition, case: Case) -> None:
        """Run one case as long as the fault lasts; fails if it is wrong."""
        with contextlib.closing(Trial(case, self)) as trial:
            with fault:
                wrong = trial.verdict(trial.fail)
                left = {path.name for path in self.daemon.tempdir.glob("*")}
            assert not wrong
            assert left <= {FILLING}
            trial.recover()

    def run_starved(self, spare: int) -> None:
        """Send a message while the daemon can have only so much more memory."""
        case = Case(self.way, "limit", "", "memory", "", "", 0, message="long")
        with contextlib.closing(Trial(case, self)) as trial:
            trial.set_filter("pass")
            trial.start_server()
            most = virtual_memory(self.pid) + spare
            with limit(self.pid, resource.RLIMIT_AS, most):
                got = trial.converse(trial.connect())
            assert trial.server
            assert fault_table.MEMORY.get(got) == len(trial.server.messages), got
            delivered = len(trial.server.messages)
            trial.case = case._replace(delivered=delivered, message="short")
            trial.recover()

    @contextlib.contextmanager
    def busy(self, sessions: int) -> Iterator[None]:
        """So many sessions do nothing but be there, and no thread waits for one."""
        self._await_last_thread()
        with contextlib.ExitStack() as trials:
            for _ in range(sessions):
                trial = Trial(Case(self.way, "limit", "", "", "", "", 0), self)
                trials.enter_context(contextlib.closing(trial))
                trial.start_server()
                assert next_reply(trial.connect())
            yield
        self._await_last_thread()

    def _await_last_thread(self) -> None:
        assert poll(lambda: len(os.listdir(f"/proc/{self.pid}/task")) == 1)

    def check_nothing_left(self) -> None:
        """See that the daemon has no more than before: see `footprint`."""
        poll(lambda: footprint(self.pid) == self._before)
        assert footprint(self.pid) == self._before

    def processes_of(self, host: str) -> list[str]:
        """Return the names of the processes of this address' filters that live."""
        mark = self.daemon.mark
        return list(marked_processes(mark, self._others, f"CLIENT={host}").values())


def virtual_memory(pid: int) -> int:
    """How much memory a process has, used or not, in octets."""
    pages = Path(f"/proc/{pid}/statm").read_text().split()[0]
    return int(pages) * resource.getpagesize()


def footprint(pid: int) -> dict[str, list[str]]:
    """Return the threads, descriptors and children, zombies too, of a process."""
    process = Path(f"/proc/{pid}")
    return {
        "threads": sorted(os.listdir(process / "task")),
        # Files of /proc are open for a moment only, now and then.
        "descriptors": sorted(
            name for name in open_files(pid).values() if not name.startswith("/proc/")
        ),
        "children": list(map(str, children(pid))),
    }


class Trial:
    """One case's address, with its client, its server and its filter."""

    def __init__(self, case: Case, scenario: Scenario) -> None:
        self.case, self.scenario = case, scenario
        self.host = scenario.next_host()
        self._filter = scenario.filters / self.host
        self._closing = contextlib.ExitStack()
        self.barrier = Barrier(self._filter)
        self._closing.callback(self.barrier.close)
        self.server: Optional[ScriptedServer] = None
        self._usual: dict[str, Action] = {}

    def close(self) -> None:
        """End what is left of the case itself."""
        self._closing.close()

    def verdict(self, part: Callable[[], None]) -> str:
        """Do this; returns what was wrong about it, or nothing."""
        try:
            part()
        except (AssertionError, OSError) as error:
            return f"{self.case}: {part.__name__}: {error!r}"
        return ""

    # The two parts of a case

    def fail(self) -> None:
        """Run the case."""
        self.set_filter(self.case.script)
        self.start_server()
        client = self.connect()
        got = self.break_off(client) if self.is_clients else self.converse(client)
        client.close()
        assert got in self.case.replies.split(" or ")
        self.check_filter()
        self.check_server()

    def recover(self) -> None:
        """See that the next message gets through when nothing breaks any more."""
        self.set_filter("pass")
        server = self.mend_server()
        client = self.connect()
        data = HEADER + BODIES[self.case.message]
        assert client.message(data) == b"250 2.0.0 Ok: queued\r\n"
        client.quit()
        assert len(server.messages) == self.case.delivered + 1
        assert server.messages[-1].data == data
        in_tls = self.scenario.server_tls is not None
        assert is_encrypted(server.messages[-1].connection) == in_tls
        assert isinstance(client.sock, ssl.SSLSocket) == in_tls

    @property
    def is_clients(self) -> bool:
        return self.case.party == "client" and self.case.what != "pauses"

    # The client

    def connect(self) -> RawClient:
        """Return a client with the case's address."""
        daemon = self.scenario.daemon.address
        client = self.scenario.daemon.client_type(daemon, PATIENCE, (self.host, 0))
        self._closing.callback(client.close)
        return client

    def converse(self, client: RawClient) -> str:
        """Have the whole dialogue; returns the replies that are not the usual ones."""
        for step in OTHER_DIALOGUES.get(self.case.when, DIALOGUE):
            self.say(client, step)
            text = "" if step == "body" else next_reply(client)
            if step != "body" and text not in USUAL:
                return " / ".join(self.part(client, step, text))
        assert client.eof()
        return ""

    def part(self, client: RawClient, step: str, text: str) -> Iterator[str]:
        """Return the replies from the first one on that is not usual."""
        yield f"{step} {text}" if text else "end"
        if text and step != "QUIT" and not text.startswith("421"):
            step = "QUIT"
            self.say(client, step)
            text = next_reply(client)
            if text not in USUAL:
                yield f"{step} {text}" if text else "end"
        was_refused = step == "QUIT" and text[:2] in ("45", "55")
        if text and not was_refused:
            assert client.eof()
            if step != "QUIT":
                yield "end"

    def say(self, client: RawClient, step: str) -> None:
        """Send what belongs to this step."""
        with contextlib.suppress(ConnectionError):  # It says so when we read.
            if step == "dot":
                client.send(BODIES[self.case.message])
                self.check_patience(client)
            client.send(SAYS[step])
        if step == CLIENT_STEP.get(self.case.when):
            self.await_keep_alive()

    def check_patience(self, client: RawClient) -> None:
        """See that the client's data is read to its end before it is answered."""
        if self.case.party in ("server", "disk"):
            assert not select.select([client.sock], [], [], 0)[0], "answered too early"

    def await_keep_alive(self) -> None:
        """Wait for proxsmtpd's NOOP where that is the moment, and go on."""
        if self.case.what == "pauses":
            time.sleep(1.2)  # The span in which it must not come.
        elif self.case.party == "server" and self.case.when in ("NOOP", "filter-NOOP"):
            assert self.server
            self.server.wait_line(b"NOOP")
            self.barrier.open()

    def break_off(self, client: RawClient) -> str:
        """Go on up to the client's fault; returns the replies after that."""
        when = self.case.when
        last = CLIENT_STEP.get(when, when)
        for step in OTHER_DIALOGUES.get(when, DIALOGUE):
            self.say(client, step)
            if step == last:
                break
            assert step == "body" or next_reply(client) in USUAL
        if when == "own-RSET":
            assert next_reply(client) == fault_table.REPLIES["no"]
        if self.is_seen:
            self.barrier.wait_reached()
        return self.leave(client)

    @property
    def is_seen(self) -> bool:
        """Return whether anybody but proxsmtpd notices that the moment has come."""
        unseen = {"line", "body", "HELP"}
        if self.scenario.way != "stream":
            unseen.add("DATA")
        return self.case.when not in unseen

    def leave(self, client: RawClient) -> str:
        """Do what is wrong; returns the replies after that."""
        if isinstance(client, TlsClient) and self.case.when == "greeting":
            client.stay_in_clear()
        if self.case.when == "HELP":
            server = self.server
            assert server
            server.wait_for(lambda: server.connections[0].closed)
            return ""
        ways = {
            "resets": client.reset,
            "closes": client.close,
            "half-closes": client.half_close,
        }
        ways.get(self.case.what, lambda: None)()
        self.barrier.open()
        if self.case.what in ("resets", "closes"):
            return ""
        return " / ".join(iter(lambda: next_reply(client), ""))

    # The server

    def start_server(self) -> None:
        """Start the server with the case's fault, if it can be connected to."""
        moment = (self.case.when, self.case.what)
        if moment == ("connect", "stalls"):
            self._blocked = self._closing.enter_context(contextlib.ExitStack())
            for sock in blocked_port((self.host, self.scenario.port)):
                self._blocked.enter_context(sock)
        elif moment != ("connect", "refuses"):
            self.server = self.good_server()
            self._usual = cast("dict[str, Action]", dict(self.server.script))
            self.server.script.update(self.faulty_script())

    def good_server(self) -> ScriptedServer:
        """Return a server that accepts everything."""
        xclient = (b"XCLIENT ADDR",)
        offers = xclient if self.case.when in ("XCLIENT", "EHLO2") else ()
        tls = self.scenario.server_tls
        make = functools.partial(TlsServer, tls) if tls else ScriptedServer
        server = make(
            host=self.host, port=self.scenario.port, extensions=(*EXTENSIONS, *offers)
        )
        self._closing.callback(server.close)
        return server

    def mend_server(self) -> ScriptedServer:
        """Return the server without its fault."""
        if self.server is None:
            if self.case.what == "stalls":
                self._blocked.close()
            return self.good_server()
        self.server.script.update(self._usual)
        return self.server

    def faulty_script(self) -> Iterator[tuple[str, Reply]]:
        """Return the steps at which the server is at fault, and its actions there."""
        when, what = self.case.when, self.case.what
        step = SERVER_STEP.get(when, when)
        if self.is_clients and self.is_seen and step in self._usual:
            yield step, self.held(self._usual[step])
        if when == "HELP":
            yield step, multiline(b"214", [b"x" * 70] * 900)
        if self.case.party != "server":
            return
        actions = {"greeting": GREETINGS, "body": LAST_WORDS}.get(when, ACTIONS)
        yield step, actions[what]
        if when == "EHLO2":
            yield step, [self._usual[step], actions[what]]
        if when == "body":
            yield step, self.in_the_body(actions[what])
        if when == "own-RSET" and self.scenario.way == "stream":
            yield "DATA", ACTIONS["5xx"]

    def held(self, usual: Action) -> Reply:
        """Return the usual reply, but only when the client has done its worst."""

        def answer(_connection: Recorded, _line: bytes) -> Optional[Action]:
            self.barrier.pass_through()
            return usual

        return answer

    def in_the_body(self, action: Action) -> Reply:
        """Take the beginning of a message, then act."""

        def answer(connection: Recorded, _line: bytes) -> Optional[Action]:
            # Small, so that the rest of the message does not fit into it.
            connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
            connection.send(GO)
            connection.sock.recv(1)
            if isinstance(action, Stall):
                self.barrier.wait_open()  # reading nothing, unlike other stalls
            return action

        return answer

    def check_server(self) -> None:
        """See that it got what it should, and that its connection is closed."""
        self.barrier.open()
        seen, accepted = "", 0
        if self.server:
            server = self.server
            server.wait_for(lambda: all(c.closed for c in server.connections))
            lines = [line for c in server.connections for line in c.lines]
            seen = " ".join(line.split()[0].decode() for line in lines)
            accepted = len(server.messages)
        assert re.fullmatch(self.case.verbs, seen), (self.case.verbs, seen)
        assert accepted == self.case.delivered
        if accepted and self.server and "pass" in self.case.script:
            assert self.server.messages[0].data == HEADER + BODIES[self.case.message]

    # The filter

    def set_filter(self, script: str) -> None:
        """Have messages of this address filtered by this script."""
        passing = ":" if self.scenario.way == "file" else "cat"
        names = f"reached={self.barrier.reached} go={self.barrier.go}"
        self._filter.write_text(f"{names}\npass() {{ {passing}; }}\n{script}\n")

    def check_filter(self) -> None:
        """See that no process of it is left but those that may stay."""
        if self.case.script != "pass":
            left = self.case.left
            poll(lambda: len(self.scenario.processes_of(self.host)) == left, 2)
            found = self.scenario.processes_of(self.host)
            assert len(found) == left, found


def next_reply(client: RawClient) -> str:
    """Return the client's next reply as text; empty if the connection has ended."""
    if client.at_end():
        return ""
    reply = client.reply()
    return (reply[:17] if reply == HELLO else reply).decode().rstrip()


def blocked_port(where: tuple[str, int]) -> Iterator[socket.socket]:
    """Open sockets by which no connection to this address is ever accepted."""
    yield (listener := socket.create_server(where, backlog=0))
    yield socket.create_connection(listener.getsockname())


# --- Peers and filters ---

CASES = [
    *fault_table.server_cases(),
    *fault_table.client_cases(),
    *fault_table.filter_cases(),
]
GROUPS = sorted({(case.way, case.impatient) for case in CASES})


@pytest.mark.parametrize(("way", "impatient"), GROUPS)
@in_clear_and_in_tls
def test_peers_and_filters(
    way: str,
    impatient: bool,
    proxsmtpd: StartDaemon,
    tls: Optional[Certificates],
    tmp_path: Path,
) -> None:
    settings = IMPATIENT[way == "kept"] if impatient else PATIENT
    scenario = Scenario(proxsmtpd, way, tmp_path, settings, tls)
    with contextlib.closing(scenario):
        before = scenario.daemon.peak_memory()
        cases = (c for c in CASES if (c.way, c.impatient) == (way, impatient))
        scenario.run_all(cases, MANY if impatient or way == "kept" else FEW)
        scenario.check_nothing_left()
        assert scenario.daemon.peak_memory() - before < 32 * MEGABYTE


# Moments that there are only where there is a filter.
FILTERED = {"filter", "own-RSET", "NOOP", "filter-NOOP"}


@pytest.mark.parametrize(
    ("party", "steps", "whats"),
    [
        ("server", ["connect"], fault_table.CONNECT_FAULTS),
        ("server", fault_table.SERVER_STEPS, fault_table.SERVER_FAULTS),
        ("client", fault_table.CLIENT_STEPS, fault_table.CLIENT_FAULTS),
    ],
)
def test_table_is_complete(
    party: str, steps: Sequence[str], whats: Sequence[str]
) -> None:
    """Every fault at every moment, both with a filter and without one."""
    cases = [case for case in CASES if case.party == party]
    streamed = {(case.when, case.what) for case in cases if case.way == "stream"}
    filtered = {(case.when, case.what) for case in cases if case.way != "stream"}
    assert set(itertools.product(steps, whats)) <= filtered
    assert set(itertools.product({*steps} - FILTERED, whats)) <= streamed


# --- The machine ---


@contextlib.contextmanager
def small_file_system(where: Path, size: str) -> Iterator[None]:
    """Mount a small file system; nothing of it may be in use at the end."""
    options = f"mode=1777,size={size}"
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(where)]
    if subprocess.run(command, check=False).returncode:
        pytest.skip("cannot mount")
    try:
        yield
    finally:
        subprocess.run(["umount", str(where)], check=True)


@contextlib.contextmanager
def missing(directory: Path, _pid: int) -> Iterator[None]:
    """Rename the directory, so that it is not there."""
    away = directory.rename(directory.with_name("away"))
    try:
        yield
    finally:
        away.rename(directory)


@contextlib.contextmanager
def read_only(directory: Path, _pid: int) -> Iterator[None]:
    """Take away the right of the daemon's user to write there."""
    mode = directory.stat().st_mode
    directory.chmod(0o555)
    try:
        yield
    finally:
        directory.chmod(mode)


@contextlib.contextmanager
def full(directory: Path, _pid: int) -> Iterator[None]:
    """Give it a file system without a free block."""
    with small_file_system(directory, "64k"):
        with contextlib.suppress(OSError):
            (directory / FILLING).write_bytes(bytes(MEGABYTE))
        yield


@contextlib.contextmanager
def small(directory: Path, _pid: int) -> Iterator[None]:
    """Give it a file system that is smaller than a long message."""
    with small_file_system(directory, "2m"):
        yield


def limited(_directory: Path, pid: int) -> Condition:
    """Forbid the process to write more into one file."""
    return limit(pid, resource.RLIMIT_FSIZE, MEGABYTE * 3 // 2)


@contextlib.contextmanager
def limit(pid: int, kind: int, number: int) -> Iterator[None]:
    """Give a process that runs another limit."""
    soft, hard = resource.prlimit(pid, kind)
    resource.prlimit(pid, kind, (number, hard))
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):  # It has not survived this.
            resource.prlimit(pid, kind, (soft, hard))


FILLING = "filling"
DISK_FAULTS: Mapping[str, Callable[[Path, int], Condition]] = {
    "missing": missing,
    "read-only": read_only,
    "full": full,
    "small": small,
    "limited": limited,
}


@pytest.mark.parametrize("way", ["pipe", "file", "stream"])
@pytest.mark.parametrize(
    "what",
    [
        *("missing", "read-only", "limited"),
        *(pytest.param(what, marks=as_root) for what in ("full", "small")),
    ],
)
def test_disk(way: str, what: str, proxsmtpd: StartDaemon, place: Path) -> None:
    settings = {**PATIENT, "TempDirectory": place / "temp"}
    if os.geteuid() == 0 and what != "limited":  # which holds for root too
        settings["User"] = idle_user()
    with contextlib.closing(Scenario(proxsmtpd, way, place, settings)) as scenario:
        for case in fault_table.disk_cases():
            if (case.way, case.what) == (way, what):
                fault = DISK_FAULTS[what](place / "temp", scenario.pid)
                scenario.run_during(fault, case)
        scenario.check_nothing_left()


LIMIT_CASES = list(fault_table.limit_cases())


@pytest.mark.parametrize("way", ["pipe", "file", "stream"])
def test_no_descriptors(way: str, proxsmtpd: StartDaemon, place: Path) -> None:
    with contextlib.closing(Scenario(proxsmtpd, way, place, PATIENT)) as scenario:
        for case in LIMIT_CASES:
            if (case.way, case.what) == (way, "descriptors"):
                number = below_which_are(int(case.when), scenario.pid)
                fault = limit(scenario.pid, resource.RLIMIT_NOFILE, number)
                scenario.run_during(fault, case)
        scenario.check_nothing_left()


def below_which_are(free: int, pid: int) -> int:
    """Return the number below which a process has so many descriptors left."""
    used = {int(number) for number in os.listdir(f"/proc/{pid}/fd")}
    unused = (number for number in itertools.count() if number not in used)
    return next(itertools.islice(unused, free, None))


def test_no_descriptor_even_to_refuse(proxsmtpd: StartDaemon, place: Path) -> None:
    """Then the client waits, and is served when there are some again."""
    with contextlib.closing(Scenario(proxsmtpd, "pipe", place, PATIENT)) as scenario:
        trial = Trial(Case("pipe", "limit", "", "descriptors", "", "", 0), scenario)
        with contextlib.closing(trial):
            trial.start_server()
            with limit(scenario.pid, resource.RLIMIT_NOFILE, 3):
                client = trial.connect()
                scenario.daemon.wait_log("couldn't accept a connection")
            assert next_reply(client) == fault_table.REPLIES["hi"]
            trial.recover()
        scenario.check_nothing_left()


@as_root
@pytest.mark.parametrize("way", ["pipe", "file", "stream"])
def test_no_processes(way: str, proxsmtpd: StartDaemon, place: Path) -> None:
    """Sessions that do nothing take the processes that the daemon's user may have."""
    settings = {**PATIENT, "User": idle_user(), "TempDirectory": place / "temp"}
    spare = 3
    scenario = Scenario(
        *(proxsmtpd, way, place, settings),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NPROC, (1 + spare,) * 2),
    )
    with contextlib.closing(scenario):
        for case in LIMIT_CASES:
            if (case.way, case.what) == (way, "processes"):
                fault = scenario.busy(spare - int(case.when))
                scenario.run_during(fault, case)
        scenario.check_nothing_left()


@pytest.mark.parametrize("way", ["pipe", "file", "stream"])
def test_no_memory(way: str, proxsmtpd: StartDaemon, place: Path) -> None:
    """A session that gets no memory ends, and no other one."""
    settings = {**PATIENT, "MaxConnections": 4}
    with contextlib.closing(Scenario(proxsmtpd, way, place, settings)) as scenario:
        for left in fault_table.MEMORY_LEFT:
            scenario.run_starved(left * 1024)
        scenario.check_nothing_left()
