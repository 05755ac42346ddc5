"""The ledger: whatever dies, nothing acknowledged is lost, and nothing is doubled.

Many clients send messages, each under a key of its own, and try each again under a
new key until the reply says that it was accepted or rejected.  Meanwhile the daemon is
killed with -9 and started again with another kind of filter, the server goes and
comes back, and by a seeded plan for each attempt the filter drops, rejects, defers
or crashes, the server refuses or dies, or the client leaves.  Three ledgers are then
compared: the replies to the clients, what the server stored, what the filter dropped.

An attempt can be stored without its client knowing it in two ways only, and no relay
can help it (RFC 1047): the server stored it and died before it said so, or the
daemon was killed before the client had its reply.  The client sends it again, and
there are two; these are counted, and every other one is an error.

LEDGER_SEED and LEDGER_MESSAGES, environment variables, say which load and how much.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import signal
import threading
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, NamedTuple, Optional

import pytest

from helpers import (
    PATIENCE,
    Daemon,
    MakeFilter,
    StartDaemon,
    in_clear_and_in_tls,
    is_listening,
    marked_processes,
    poll,
    port_of,
    reserve_port,
)
from ledger import ACCEPTED, Lost, key_and_plan, message_data, say
from smtp import Action, RawClient, Recorded, Reset, ScriptedServer
from tls import Certificates, TlsServer

SEED = os.environ.get("LEDGER_SEED", "1")
MESSAGES = int(os.environ.get("LEDGER_MESSAGES", "320"))
WORKERS = 8
ALL_DONE = 60.0  # seconds in which a disturbance must come to its end
SESSION = 4  # messages that a client sends at most before it connects again
SIZES = (*(80, 3_000, 60_000) * 6, 1_500_000)

ERROR = b"451 Local Error"
SERVER_LOST = b"421 Connection to server lost"
NO_SERVER = b"421 Server not available"
NOT_ENCRYPTED = b"421 Connection to server cannot be encrypted"  # it has died meanwhile
FILTER_AHEAD = b"354 Start mail input; end with <CRLF>.<CRLF>"


class Plan(NamedTuple):
    """The weight of a kind of attempt, and its client's reply.

    K stands for the attempt's key.  Without a filter, what the filter should have
    done does not happen.
    """

    weight: int
    reply: bytes
    by_filter: bool = False


PLANS = {
    "pass": Plan(20, ACCEPTED),
    "drop": Plan(4, b"250 2.0.0 K dropped", by_filter=True),
    "reject": Plan(3, b"550 Content Rejected; K is no good", by_filter=True),
    "defer": Plan(2, b"450 4.7.1 K later", by_filter=True),
    "crash": Plan(2, ERROR, by_filter=True),
    "crash-late": Plan(2, ERROR, by_filter=True),
    "empty": Plan(1, ERROR, by_filter=True),
    "absent": Plan(1, ERROR, by_filter=True),
    "server-defers": Plan(2, b"452 4.3.1 K too much"),
    "server-refuses": Plan(2, b"554 5.6.0 K not here"),
    "server-dies": Plan(2, SERVER_LOST),  # before it has stored anything
    "server-stores-and-dies": Plan(2, SERVER_LOST),
    "leave": Plan(2, b""),  # in the midst of the data
    "reset": Plan(1, b""),
    "leave-filter": Plan(3, b""),  # when all is said, and the filter runs
}

# It says what it drops before it says so; a signal's sender needs no time to die.
FILTER = """\
test -z "$EMAIL" || exec <"$EMAIL"
read -r _ key; key=${key%?}
read -r _ plan; plan=${plan%?}
pass() {
    test -z "$EMAIL" || return 0
    printf 'X-Key: %s\\r\\nX-Plan: %s\\r\\n' "$key" "$plan"
    cat
}
case $plan in
drop)   echo "$key" >>"$LEDGER"; echo "250 2.0.0 $key dropped" >&2; exit 1 ;;
reject) echo "$key is no good" >&2; exit 1 ;;
defer)  pass; echo "450 4.7.1 $key later" >&2; exit 75 ;;
crash)  printf 'half of it'; kill -KILL $$ ;;
crash-late) pass; kill -TERM $$ ;;
empty)  test -z "$EMAIL" || : >"$EMAIL" ;;
absent) exec /nonexistent/filter ;;
leave-filter) read -r _ <"$FIFOS/$key"; pass ;;
*)      pass ;;
esac
"""

# FilterType and the like of one daemon after the other.
KINDS: Sequence[dict[str, object]] = (
    {"FilterType": "pipe"},
    {"FilterType": "file"},
    {"FilterCommand": ""},
)


@dataclass
class Attempt:
    """One try at one message, with the reply that the client got."""

    number: int
    key: bytes
    plan: str
    data: bytes
    server_kills: int  # when its session began
    is_sent: bool = False
    is_filtered: bool = False
    has_left: bool = False  # the client has, before its message was accepted
    # To the data, or to what was refused before; None if there was none, since the
    # client has left or the daemon was killed.
    reply: Optional[bytes] = None

    @property
    def is_settled(self) -> bool:
        """Return whether the client need not try again."""
        return self.reply is not None and self.reply.startswith((b"2", b"5"))

    @property
    def expected(self) -> bytes:
        """Return the reply to the data where only the plan matters."""
        plan = PLANS[self.plan]
        reply = ACCEPTED if plan.by_filter and not self.is_filtered else plan.reply
        return reply.replace(b"K", self.key)


# --- The server ---


class Sink:
    """A server that is killed and comes back at the same address.

    `stored` is all that it ever accepted, key and data; it stores before it says so,
    as every server must.  `said` is the keys of which it said so.
    """

    def __init__(self, port: int, tls: Optional[Certificates]) -> None:
        self._port, self._tls = port, tls and tls.context()
        self.stored: list[tuple[bytes, bytes]] = []
        self.said: set[bytes] = set()
        self.kills = 0
        self._hold_next = threading.Event()
        self._is_held = threading.Event()
        self._go_on = threading.Event()
        self._start()

    def _start(self) -> None:
        script = {"DOT": self._end_of_data}
        kind = functools.partial(TlsServer, self._tls) if self._tls else ScriptedServer
        self._server = kind(script, port=self._port)
        self.address = self._server.address

    def _end_of_data(self, _connection: Recorded, data: bytes) -> Action:
        key, plan = key_and_plan(data)
        if plan == "server-dies":
            return Reset()
        if plan in ("server-defers", "server-refuses"):
            return PLANS[plan].reply.replace(b"K", key) + b"\r\n"
        self.stored.append((key, data))
        if self._hold_next.is_set():
            self._hold()
        if plan == "server-stores-and-dies":
            return Reset()
        return ACCEPTED.replace(b"K", key) + b"\r\n"

    def _hold(self) -> None:
        self._hold_next.clear()
        self._is_held.set()
        assert self._go_on.wait(PATIENCE)

    def restart(self) -> None:
        """Die, and come back."""
        self.kills += 1
        self.close()
        self._start()

    def close(self) -> None:
        """Die."""
        self._server.close()
        self.said.update(key_and_plan(m.data)[0] for m in self._server.messages)

    @contextlib.contextmanager
    def holding_an_answer(self) -> Iterator[None]:
        """Do something while a message is stored, but the answer not yet given."""
        self._hold_next.set()
        assert self._is_held.wait(PATIENCE)
        yield
        self._go_on.set()


# --- The daemon ---


class Daemons:
    """The daemon, killed and started again with another kind of filter."""

    def __init__(self, start: Callable[[dict[str, object]], Daemon]) -> None:
        self._start = start
        self.all: list[Daemon] = []
        self.kills = 0
        self.is_up = threading.Event()
        self._next()

    def _next(self) -> None:
        self.all.append(self._start(KINDS[len(self.all) % len(KINDS)]))
        self.is_up.set()

    @property
    def address(self) -> str:
        return self.all[-1].address

    def restart(self, during: contextlib.AbstractContextManager[None]) -> None:
        """Kill it with -9 while something goes on, and start the next one then."""
        with during:
            self.is_up.clear()
            self.kills += 1
            self.all[-1].stop(signal.SIGKILL)
        # A filter that was just being started has its socket until it is executed.
        assert poll(lambda: not is_listening(self.address))
        self._next()

    def sweep(self) -> None:
        """Remove what a killed daemon cannot: files that its filters know by name.

        Of filters of any other type nothing may be left, and the fixture sees to it.
        """
        for number, daemon in enumerate(self.all[:-1]):
            assert poll(functools.partial(no_process_has, daemon.mark))
            if KINDS[number % len(KINDS)].get("FilterType") == "file":
                for path in daemon.tempdir.glob("proxsmtpd.*"):
                    path.unlink()


def no_process_has(mark: str) -> bool:
    """Return whether nothing is left of a daemon and its filters."""
    return not marked_processes(mark)


# --- The clients ---


class Load:
    """All the messages, the attempts at them, and the clients that make them."""

    def __init__(self, daemons: Daemons, sink: Sink, fifos: Path) -> None:
        self._daemons, self._sink, self._fifos = daemons, sink, fifos
        self._waiting = deque(range(MESSAGES))
        self._tries = Counter[int]()
        self._open_fifos: list[int] = []
        self._progress = threading.Condition()
        self._done = 0
        self._has_ended = False  # one of the clients: nothing is left, or it failed
        self.attempts: list[Attempt] = []

    def wait_done(self, count: int) -> None:
        """Wait until so many messages are settled, or a client has ended."""
        with self._progress:
            assert self._progress.wait_for(
                lambda: self._done >= count or self._has_ended, ALL_DONE
            )

    def work(self) -> None:
        """Be a client, until nothing is left to be sent."""
        try:
            while self._waiting:
                self._visit()
        finally:
            with self._progress:
                self._has_ended = True
                self._progress.notify_all()

    def _visit(self) -> None:
        """Make one connection."""
        kills = self._daemons.kills
        assert self._daemons.is_up.wait(PATIENCE)
        try:
            with self._daemons.all[-1].connect() as client:
                self._converse(client)
        except (ConnectionError, Lost):
            # A daemon that lives leaves no client without an answer.
            if self._daemons.kills == kills:
                raise

    def _converse(self, client: RawClient) -> None:
        server_kills = self._sink.kills
        if not self._greet(client):
            return
        for _ in range(SESSION):
            number = self._take()
            if number is None or not self._try(client, number, server_kills):
                return

    @staticmethod
    def _greet(client: RawClient) -> bool:
        """Begin a session; False if there is no server."""
        for line, code in ((b"", b"220"), (b"EHLO client.example\r\n", b"250")):
            reply = say(client, line)
            if reply[:3] != code:
                assert reply in (NO_SERVER, SERVER_LOST, NOT_ENCRYPTED)
                return False
        return True

    def _take(self) -> Optional[int]:
        with contextlib.suppress(IndexError):
            return self._waiting.popleft()
        return None

    def _try(self, client: RawClient, number: int, server_kills: int) -> bool:
        """Make an attempt at a message; whether the session can go on."""
        attempt = self._new_attempt(number, server_kills)
        try:
            self._send(client, attempt)
        finally:
            self._note(attempt)
        return attempt.reply is not None and attempt.reply[:3] != b"421"

    def _new_attempt(self, number: int, server_kills: int) -> Attempt:
        self._tries[number] += 1
        key = f"m{number}-{self._tries[number]}"
        rng = random.Random(f"{SEED} {key}")
        [plan] = rng.choices(list(PLANS), [plan.weight for plan in PLANS.values()])
        data = message_data(key.encode(), plan, rng.choice(SIZES))
        return Attempt(number, key.encode(), plan, data, server_kills)

    def _note(self, attempt: Attempt) -> None:
        if not attempt.is_settled:
            self._waiting.append(attempt.number)
        with self._progress:
            self.attempts.append(attempt)
            self._done += attempt.is_settled
            self._progress.notify_all()

    def _send(self, client: RawClient, attempt: Attempt) -> None:
        sender = b"MAIL FROM:<%s@example.com>\r\n" % attempt.key
        for line in (sender, b"RCPT TO:<b@example.com>\r\n", b"DATA\r\n"):
            reply = say(client, line)
            if not reply.startswith((b"2", b"3")):
                attempt.reply = reply
                return
        attempt.is_filtered = reply == FILTER_AHEAD
        attempt.is_sent = True
        if PLANS[attempt.plan].reply:
            attempt.reply = say(client, attempt.data + b".\r\n")
        else:
            self._leave(client, attempt)

    def _leave(self, client: RawClient, attempt: Attempt) -> None:
        """Go before the message is accepted."""
        attempt.has_left = True
        with contextlib.suppress(ConnectionError):
            if attempt.plan == "leave-filter" and attempt.is_filtered:
                self._leave_filter(client, attempt)
            else:
                client.send(attempt.data)
        if attempt.plan == "reset":
            client.reset()

    def _leave_filter(self, client: RawClient, attempt: Attempt) -> None:
        """Go while the filter runs: it ends only when we have gone."""
        fifo = self._fifos / attempt.key.decode()
        os.mkfifo(fifo)
        self._open_fifos.append(os.open(fifo, os.O_RDWR))
        try:
            client.send(attempt.data + b".\r\n")
        finally:
            client.close()
            os.write(self._open_fifos[-1], b"\n")

    def close(self) -> None:
        for fifo in self._open_fifos:
            os.close(fifo)


# --- The ledger ---


class Ledger:
    """Compares the three ledgers, attempt by attempt."""

    def __init__(self, load: Load, sink: Sink, dropped: set[bytes]) -> None:
        self.attempts = load.attempts
        self._sink = sink
        self._dropped = dropped
        self._stored: dict[bytes, list[bytes]] = {}
        for key, data in sink.stored:
            self._stored.setdefault(key, []).append(data)
        self.count = Counter[str]()

    def check(self) -> None:
        """Compare them, attempt by attempt and all in all."""
        for attempt in self.attempts:
            entry = self._check_attempt(attempt)
            self.count[entry] += 1
        known = {attempt.key for attempt in self.attempts}
        assert set(self._stored) <= known
        self._check_sums()

    def _check_attempt(self, attempt: Attempt) -> str:
        """Name the kind of entry that an attempt is in the ledger."""
        stored = self._stored.get(attempt.key, [])
        assert len(stored) <= 1, f"the daemon itself has doubled {attempt}"
        assert stored in ([], [attempt.data]), f"stored otherwise: {attempt.key!r}"
        reply = attempt.reply
        if attempt.has_left:
            assert not stored, f"delivered for a client that had gone: {attempt.key!r}"
            return "left"
        if reply is None:
            return "killed, but stored" if stored else "killed"
        self._check_reply(attempt, reply)
        if reply[:1] == b"2":
            return self._check_acknowledged(attempt, bool(stored))
        if stored:
            assert attempt.key not in self._sink.said, f"{reply!r}, but {attempt.key!r}"
            return "refused, but stored"
        return "rejected" if reply[:1] == b"5" else "refused"

    def _check_reply(self, attempt: Attempt, reply: bytes) -> None:
        """Check that the reply is the plan's, or that the server has gone."""
        if attempt.is_sent and reply == attempt.expected:
            return
        assert reply in (SERVER_LOST, NO_SERVER), (attempt.key, attempt.plan, reply)
        assert self._sink.kills > attempt.server_kills or "dies" in attempt.plan

    def _check_acknowledged(self, attempt: Attempt, is_stored: bool) -> str:
        was_dropped = attempt.key in self._dropped
        assert is_stored != was_dropped, f"lost, or not dropped: {attempt.key!r}"
        return "dropped" if was_dropped else "accepted"

    def _check_sums(self) -> None:
        """Check that each message is settled once, and each further copy excused."""
        count = self.count
        settled = Counter(a.number for a in self.attempts if a.is_settled)
        excused = count["killed, but stored"] + count["refused, but stored"]
        assert len(self._sink.stored) == count["accepted"] + excused
        assert settled == Counter(range(MESSAGES))

    def check_all_happened(self) -> None:
        """Check that every kind of event has happened."""
        happened = {a.plan for a in self.attempts if a.is_sent}
        assert happened == set(PLANS)
        assert self.count["killed, but stored"]  # the staged one at least
        assert self.count["refused, but stored"]
        assert self.count.keys() >= {"accepted", "dropped", "rejected", "left"}


@pytest.fixture
def fifos(tmp_path: Path) -> Path:
    """Make the directory of the fifos at which filters wait for a client to leave."""
    directory = tmp_path / "fifos"
    directory.mkdir()
    return directory


def disturbances(daemons: Daemons, sink: Sink) -> list[Callable[[], None]]:
    """Return the disturbances of daemon and server, in a seeded order."""

    def at_random() -> None:
        daemons.restart(contextlib.nullcontext())

    def at_worst() -> None:
        daemons.restart(sink.holding_an_answer())

    events = [*[at_random] * 4, at_worst, *[sink.restart] * 4]
    random.Random(SEED).shuffle(events)
    return events


def run(load: Load, events: Sequence[Callable[[], None]]) -> None:
    """Let all clients work to the end, with the events spread over their work."""
    with ThreadPoolExecutor(WORKERS) as pool:
        workers = [pool.submit(load.work) for _ in range(WORKERS)]
        for number, event in enumerate(events, 1):
            load.wait_done(MESSAGES * number // (len(events) + 1))
            event()
        for worker in workers:
            worker.result()


@in_clear_and_in_tls
def test_ledger(
    proxsmtpd: StartDaemon,
    tls: Optional[Certificates],
    filter_script: MakeFilter,
    tmp_path: Path,
    fifos: Path,
) -> None:
    print(f"LEDGER_SEED={SEED} LEDGER_MESSAGES={MESSAGES}")
    dropped = tmp_path / "dropped"
    dropped.touch()
    env = {"LEDGER": str(dropped), "FIFOS": str(fifos)}
    with reserve_port() as front, reserve_port() as back:
        sink = Sink(port_of(back), tls)
        common = {
            "Listen": f"127.0.0.1:{port_of(front)}",
            "OutAddress": sink.address,
            "FilterCommand": filter_script(FILTER),
        }
        daemons = Daemons(lambda kind: proxsmtpd({**common, **kind}, level=1, env=env))
        load = Load(daemons, sink, fifos)
        with contextlib.closing(sink), contextlib.closing(load):
            run(load, disturbances(daemons, sink))
        daemons.sweep()
    ledger = Ledger(load, sink, set(dropped.read_bytes().split()))
    ledger.check()
    print(ledger.count)
    ledger.check_all_happened()
