"""HAProxy in front of proxsmtpd: several machines, and the PROXY header.

    clients -> HAProxy -> proxsmtpd a, with its filter -> server
                       -> proxsmtpd b, with its filter ->

The clients try each message again under a new key until the reply says that it was
accepted, as an MTA does.  Meanwhile one proxsmtpd after the other ends and comes
back; each time the server has stored a message of just this one and not said so.

What SIGKILL can do is to take the reply to such a message from its client, who sends
it again, and there are two (RFC 1047).  Every other copy is an error, and with
SIGTERM there is none: the message in transit is finished.

With ProxyProtocol, HAProxy says before the first octet of SMTP who has connected to
it.  What HAProxy itself sends is one thing; what others may send stands in tables.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import random
import re
import select
import signal
import socket
import struct
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, NamedTuple, Optional, Protocol

import pytest

import proxsmtpd as program
from haproxy import HAPROXY, HAProxy, listen_section
from helpers import (
    GREETING,
    MESSAGE,
    Daemon,
    MakeFilter,
    MakeServer,
    ShareDaemon,
    StartDaemon,
    is_listening,
    octetwise,
    poll,
    port_of,
    requires,
    reserve_port,
)
from ledger import ACCEPTED, Lost, key_and_plan, message_data, say
from smtp import Action, RawClient, Recorded, ScriptedServer

needs_haproxy = requires("haproxy", HAPROXY)

SEED = "haproxy"
WORKERS = 8
SESSION = 4  # messages that a client sends at most before it connects again
SIZES = (80, 3_000, 60_000)
STRETCH = 60  # messages accepted between one event and the next
PATIENCE = 60.0

NAMES = ("a", "b")
SHUTTING_DOWN = b"421 Service shutting down"


def mark_of(name: str) -> bytes:
    """Return the line that this proxsmtpd's filter puts at the end of each message."""
    return b"filtered by %s\r\n" % name.encode()


def append_mark(name: str) -> str:
    return f"cat && echo 'filtered by {name}'"


class PutInFront(Protocol):
    """Starts a HAProxy, which listens on a port of `host`; see `listen_section`."""

    def __call__(
        self,
        servers: Mapping[str, str],
        *,
        host: str = ...,
        **replacements: str,
    ) -> HAProxy: ...


@pytest.fixture
def put_in_front(tmp_path: Path) -> Iterator[PutInFront]:
    """Provide a HAProxy that ends with the test."""
    with ExitStack() as stack:

        def put(
            servers: Mapping[str, str],
            *,
            host: str = "127.0.0.1",
            **replacements: str,
        ) -> HAProxy:
            port = port_of(stack.enter_context(reserve_port(host)))
            address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            section = listen_section(address, servers, **replacements)
            return stack.enter_context(HAProxy(tmp_path, section, address))

        yield put


# --- The server ---


class Store:
    """Stores the server's messages, each before it is acknowledged."""

    def __init__(self) -> None:
        self.data: list[bytes] = []
        self._wanted: list[bytes] = []
        self._is_held = threading.Event()
        self._go_on = threading.Event()

    def accept(self, _connection: Recorded, data: bytes) -> Action:
        """Answer the end of mail data."""
        self.data.append(data)
        if any(data.endswith(mark) for mark in self._wanted):
            self._hold()
        return ACCEPTED.replace(b"K", key_and_plan(data)[0]) + b"\r\n"

    def _hold(self) -> None:
        self._wanted.clear()
        self._is_held.set()
        assert self._go_on.wait(PATIENCE)

    @contextlib.contextmanager
    def holding_an_answer(self, mark: bytes) -> Iterator[None]:
        """Do something while a message with this mark is stored, but not answered."""
        self._is_held.clear()
        self._go_on.clear()
        self._wanted.append(mark)
        assert self._is_held.wait(PATIENCE), f"no message {mark!r}"
        try:
            yield
        finally:
            self._go_on.set()


# --- The two proxsmtpds ---


class End(NamedTuple):
    """The end of a proxsmtpd: whose, and the time in which it may be noticed."""

    mark: bytes
    start: float
    stop: float


class Pair:
    """The two proxsmtpds."""

    def __init__(
        self, start: StartDaemon, server: ScriptedServer, at_end: ExitStack
    ) -> None:
        self._start, self._server = start, server
        self._holders = {n: at_end.enter_context(reserve_port()) for n in NAMES}
        self._now: dict[str, Daemon] = {}
        self.all: list[Daemon] = []
        self.ends: list[End] = []
        for name in NAMES:
            self.start(name)

    @property
    def addresses(self) -> dict[str, str]:
        return {n: f"127.0.0.1:{port_of(h)}" for n, h in self._holders.items()}

    def start(self, name: str) -> None:
        """Start this one, for the first time or again."""
        settings = {
            "Listen": self.addresses[name],
            "OutAddress": self._server.address,
            "FilterCommand": append_mark(name),
        }
        self._now[name] = self._start(settings, level=3)
        self.all.append(self._now[name])

    def end(self, name: str, how: signal.Signals, store: Store) -> None:
        """End this one while a message of it has been stored and not answered."""
        daemon = self._now[name]
        with store.holding_an_answer(mark_of(name)):
            start = time.monotonic()
            daemon.process.send_signal(how)
            # Killed, a filter that was being started has its socket a little longer.
            assert poll(lambda: not is_listening(daemon.address))
        assert daemon.wait() == (0 if how == signal.SIGTERM else -how)
        self.ends.append(End(mark_of(name), start, time.monotonic()))


# --- The clients ---


@dataclass
class Attempt:
    """One try at one message, with the reply that the client got."""

    number: int
    key: bytes
    data: bytes
    began: float  # its session
    ended: float = 0.0
    is_sent: bool = False  # to the last octet
    reply: Optional[bytes] = None  # to the data, or to what was refused before

    @property
    def is_accepted(self) -> bool:
        return self.reply is not None and self.reply.startswith(b"250")


class Load:
    """Clients that send messages until they are told to finish."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._new = itertools.count()
        self._again: deque[int] = deque()
        self._tries = Counter[int]()
        self._finish = threading.Event()
        self._progress = threading.Condition()
        self._accepted = 0
        self._has_ended = False  # one of the clients
        self.attempts: list[Attempt] = []

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Have the clients at work; at the end every message is accepted."""
        with ThreadPoolExecutor(WORKERS) as pool:
            workers = [pool.submit(self._work) for _ in range(WORKERS)]
            try:
                yield
            finally:
                self._finish.set()
            for worker in workers:
                worker.result()

    def stretch(self) -> None:
        """Wait until some more messages are accepted."""
        with self._progress:
            goal = self._accepted + STRETCH
            assert self._progress.wait_for(
                lambda: self._accepted >= goal or self._has_ended, PATIENCE
            )

    def _work(self) -> None:
        try:
            while self._again or not self._finish.is_set():
                self._visit()
        finally:
            with self._progress:
                self._has_ended = True
                self._progress.notify_all()

    def _take(self) -> Optional[int]:
        with contextlib.suppress(IndexError):
            return self._again.popleft()
        return None if self._finish.is_set() else next(self._new)

    def _visit(self) -> None:
        """Make one connection."""
        began = time.monotonic()
        with RawClient(self._address, PATIENCE) as client:
            is_open = True
            for turn in range(SESSION):
                number = self._take()
                if number is None:
                    return
                attempt = self._new_attempt(number, began)
                is_open = self._try(client, attempt, is_first=not turn)
                if not is_open:
                    return

    def _new_attempt(self, number: int, began: float) -> Attempt:
        self._tries[number] += 1
        key = f"m{number}-{self._tries[number]}"
        size = random.Random(f"{SEED} {key}").choice(SIZES)
        data = message_data(key.encode(), "pass", size)
        return Attempt(number, key.encode(), data, began)

    def _try(self, client: RawClient, attempt: Attempt, *, is_first: bool) -> bool:
        """Make an attempt; whether the session can go on."""
        try:
            self._send(client, attempt, is_first=is_first)
        except (Lost, ConnectionError):
            pass  # The ledger knows whether it may be.
        finally:
            attempt.ended = time.monotonic()
            self._note(attempt)
        return attempt.is_accepted

    @staticmethod
    def _send(client: RawClient, attempt: Attempt, *, is_first: bool) -> None:
        greetings = [(b"", b"220"), (b"EHLO client.example\r\n", b"250")]
        for line, code in (
            *(greetings if is_first else []),
            (b"MAIL FROM:<%s@example.com>\r\n" % attempt.key, b"250"),
            (b"RCPT TO:<b@example.com>\r\n", b"250"),
            (b"DATA\r\n", b"354"),
        ):
            reply = say(client, line)
            if not reply.startswith(code):
                attempt.reply = reply
                return
        attempt.is_sent = True
        attempt.reply = say(client, attempt.data + b".\r\n")

    def _note(self, attempt: Attempt) -> None:
        if not attempt.is_accepted:
            self._again.append(attempt.number)
        with self._progress:
            self.attempts.append(attempt)
            self._accepted += attempt.is_accepted
            self._progress.notify_all()


# --- The ledger ---


class Ledger:
    """Compares the replies to the clients with what the server stored."""

    def __init__(self, load: Load, store: Store, pair: Pair) -> None:
        self._attempts, self._ends = load.attempts, pair.ends
        self._stored: dict[bytes, list[bytes]] = {}
        for data in store.data:
            self._stored.setdefault(key_and_plan(data)[0], []).append(data)
        self.count = Counter[str]()

    def check(self) -> None:
        """Compare them, attempt by attempt and all in all."""
        for attempt in self._attempts:
            self.count[self._check(attempt)] += 1
        numbers = [a.number for a in self._attempts if a.is_accepted]
        assert sorted(numbers) == list(range(len(numbers))), "accepted not just once"
        assert self._stored.keys() <= {attempt.key for attempt in self._attempts}

    def _check(self, attempt: Attempt) -> str:
        """Name the kind of entry that an attempt is in the ledger."""
        stored = self._stored.get(attempt.key, [])
        whole = [attempt.data + mark_of(name) for name in NAMES]
        assert len(stored) <= 1, f"doubled on the way: {attempt.key!r}"
        assert not stored or stored[0] in whole, f"stored otherwise: {attempt.key!r}"
        if attempt.is_accepted:
            assert attempt.reply == ACCEPTED.replace(b"K", attempt.key)
            assert stored, f"lost: {attempt.key!r}"
            return "accepted"
        assert attempt.reply in (None, SHUTTING_DOWN), attempt
        excuses = [
            end.mark
            for end in self._ends
            if attempt.began <= end.stop and end.start <= attempt.ended
        ]
        assert excuses, f"disturbed though nothing ended: {attempt}"
        if not stored:
            return "unanswered" if attempt.reply is None else "refused"
        assert attempt.is_sent
        assert attempt.reply is None, f"refused, but stored: {attempt}"
        assert stored[0].endswith(tuple(excuses)), "doubled by the one that lived"
        return "unanswered, but stored"


def has_connection(port: int) -> bool:
    """Return whether a connection to this local port is open in both directions."""
    table = Path("/proc/net/tcp").read_text()
    return bool(re.search(rf"^ *\d+: [0-9A-F]+:{port:04X} [0-9A-F:]+ 01 ", table, re.M))


@needs_haproxy
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM], ids=lambda s: s.name)
def test_one_ends_after_the_other(
    how: signal.Signals,
    make_server: MakeServer,
    proxsmtpd: StartDaemon,
    put_in_front: PutInFront,
) -> None:
    """Under load, whatever ends and comes back, nothing is lost or unfiltered."""
    store = Store()
    server = make_server({"DOT": store.accept})
    with ExitStack() as at_end:
        pair = Pair(proxsmtpd, server, at_end)
        haproxy = put_in_front(pair.addresses)
        load = Load(haproxy.address)
        with load.running():
            for name in NAMES:
                load.stretch()
                pair.end(name, how, store)
                load.stretch()
                haproxy.wait_state(name, "DOWN")
                pair.start(name)
                haproxy.wait_state(name, "UP")
            load.stretch()
    ledger = Ledger(load, store, pair)
    ledger.check()
    print(ledger.count)
    doubles = ledger.count["unanswered, but stored"]
    assert len(store.data) == ledger.count["accepted"] + doubles
    if how == signal.SIGKILL:
        assert doubles >= len(NAMES), "those that were staged"
    else:
        assert not doubles
        assert all(a.is_accepted for a in load.attempts if a.is_sent)
    for daemon in pair.all:
        daemon.wait_log("status=FILTERED")


@needs_haproxy
def test_one_is_not_there(proxsmtpd: StartDaemon, put_in_front: PutInFront) -> None:
    """Until the checks have found it out, its clients are sent to another one."""
    daemon = proxsmtpd()
    with reserve_port() as nobody:
        gone = f"127.0.0.1:{port_of(nobody)} no-check"
        haproxy = put_in_front({"a": gone, "b": f"{daemon.address} no-check"})
        for _ in range(4):
            with RawClient(haproxy.address) as client:
                assert client.reply() == GREETING


@needs_haproxy
def test_more_clients_than_places(
    proxsmtpd: StartDaemon, put_in_front: PutInFront
) -> None:
    """A HAProxy with maxconn below MaxConnections makes clients wait: no 421."""
    daemon = proxsmtpd({"MaxConnections": 4})
    haproxy = put_in_front({"a": f"{daemon.address} no-check"}, maxconn="2")
    with ExitStack() as stack:
        clients = [stack.enter_context(RawClient(haproxy.address)) for _ in range(6)]
        waiting = {client.sock: client for client in clients}
        while waiting:
            greeted, _, _ = select.select(list(waiting), [], [], PATIENCE)
            assert greeted
            client = waiting.pop(greeted[0])
            assert client.reply() == GREETING
            client.quit()
    assert "sent busy response" not in daemon.log()


@needs_haproxy
@pytest.mark.parametrize("leave", [RawClient.close, RawClient.reset])
def test_client_leaves_before_it_is_accepted(
    leave: Callable[[RawClient], None],
    server: ScriptedServer,
    proxsmtpd: StartDaemon,
    put_in_front: PutInFront,
    filter_script: MakeFilter,
    tmp_path: Path,
) -> None:
    """HAProxy passes it on that a client has gone, and nothing is delivered."""
    fifo, running = tmp_path / "fifo", tmp_path / "running"
    os.mkfifo(fifo)
    script = filter_script(f"echo >{running}; read -r _ <{fifo}; cat")
    daemon = proxsmtpd({"FilterCommand": script})
    haproxy = put_in_front({"a": f"{daemon.address} no-check"})
    with RawClient(haproxy.address) as client:
        client.start()
        client.expect(b"DATA", b"354")
        client.send(MESSAGE + b".\r\n")
        assert poll(running.exists)
        assert has_connection(daemon.port)
        leave(client)
        assert poll(lambda: not has_connection(daemon.port))
        fifo.write_text("\n")
        daemon.wait_log("client went before its message was accepted")
    (connection,) = server.connections
    server.wait_for(lambda: connection.closed)
    assert not connection.received.endswith(b".\r\n")
    assert server.messages == []


# --- The PROXY header: what HAProxy sends ---


PROXY_XCLIENT = b"XCLIENT ADDR PORT DESTADDR DESTPORT"
TELL_CLIENT = 'printf "X-Client: $CLIENT\\r\\n"; cat'


class Ends(NamedTuple):
    """The two ends of a client's connection."""

    client: str
    client_port: int
    local: str
    local_port: int


def ends_of(client: RawClient) -> Ends:
    """Those that the client itself knows of."""
    return Ends(*client.sock.getsockname()[:2], *client.sock.getpeername()[:2])


PROXIED = {
    "ProxyProtocol": "on",
    "XClient": "on",
    "FilterCommand": TELL_CLIENT,
    "Header": "X-Ends: %i %l",
}


def start_proxied(start: StartDaemon, **settings: object) -> Daemon:
    """Start a proxsmtpd that expects the header and passes the client's address on."""
    return start({**PROXIED, **settings})


def check_ends(daemon: Daemon, server: ScriptedServer, ends: Ends) -> None:
    """Check that filter, log, header and server have these ends for the message."""
    message = server.wait_message()
    assert f"X-Client: {ends.client}\r\n".encode() in message.data
    assert f"X-Ends: {ends.client} {ends.local}\r\n".encode() in message.data
    daemon.wait_log(rf"accepted connection from: {re.escape(ends.client)}$")
    daemon.wait_log(rf"client={re.escape(ends.client)}, .*status=FILTERED$")
    (xclient,) = (x for x in message.connection.lines if x.startswith(b"XCLIENT"))
    tag = "IPV6:" if ":" in ends.client else ""
    assert dict(word.split("=") for word in xclient.decode().split()[1:]) == {
        "ADDR": tag + ends.client,
        "PORT": str(ends.client_port or "[UNAVAILABLE]"),
        "DESTADDR": tag + ends.local,
        "DESTPORT": str(ends.local_port),
    }


SENDS = (
    "send-proxy",
    "send-proxy-v2",
    "send-proxy-v2-ssl-cn proxy-v2-options crc32c,unique-id",
)


@needs_haproxy
@pytest.mark.parametrize(
    ("host", "client_host"), [("127.0.0.1", "127.0.0.2"), ("::1", "::1")]
)
@pytest.mark.parametrize("send", SENDS)
def test_header_of_haproxy(
    send: str,
    host: str,
    client_host: str,
    make_server: MakeServer,
    proxsmtpd: StartDaemon,
    put_in_front: PutInFront,
) -> None:
    """All have the address of HAProxy's client, to which OutAddress leads back."""
    server = make_server(extensions=[PROXY_XCLIENT], host=client_host)
    daemon = start_proxied(proxsmtpd, OutAddress=server.port)
    haproxy = put_in_front({"a": f"{daemon.address} no-check {send}"}, host=host)
    with RawClient(haproxy.address, source=(client_host, 0)) as client:
        assert client.message(MESSAGE).startswith(b"250")
        check_ends(daemon, server, ends_of(client))


@needs_haproxy
@pytest.mark.parametrize("send", SENDS)
def test_health_checks_with_header(
    send: str,
    server: ScriptedServer,
    proxsmtpd: StartDaemon,
    put_in_front: PutInFront,
) -> None:
    """HAProxy's own connections are served like direct ones; version 2 names them."""
    daemon = proxsmtpd({"ProxyProtocol": "on"}, level=3)
    haproxy = put_in_front({"a": f"{daemon.address} {send}"})
    for number in (1, 2, 3):
        connection = server.wait_connection(number)
        server.wait_for(functools.partial(getattr, connection, "closed"))
        assert connection.lines == [b"EHLO haproxy.example", b"QUIT"]
    names_checks = send != "send-proxy"
    assert ("accepted connection" in daemon.log()) == (not names_checks)
    with RawClient(haproxy.address) as client:
        assert client.message(MESSAGE).startswith(b"250")
    assert "DOWN" not in haproxy.log()
    if names_checks:
        assert daemon.log().count("accepted connection from: 127.0.0.1\n") == 1


# --- The PROXY header: what others may send ---


SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
LOCAL, PROXY = 0x20, 0x21
UNSPEC, TCP4, UDP4, TCP6, UDP6, UNIX = 0, 0x11, 0x12, 0x21, 0x22, 0x31
NOOP, UNIQUE_ID, CUSTOM, CRC32C = 4, 5, 0xE0, 3

FOUR = Ends("192.0.2.1", 4711, "198.51.100.2", 25)
SIX = Ends("2001:db8::1", 65535, "2001:db8:2::2", 25)
FOUR_IN_SIX = Ends("::ffff:192.0.2.1", 4711, "::ffff:198.51.100.2", 25)


def v1(line: bytes) -> bytes:
    return b"PROXY " + line + b"\r\n"


def v1_ends(family: str, ends: Ends) -> bytes:
    """Return a header of version 1 that names these ends."""
    client, client_port, local, local_port = ends
    return v1(f"{family} {client} {local} {client_port} {local_port}".encode())


def v2(kind: int, rest: bytes = b"", command: int = PROXY) -> bytes:
    """Return a header of version 2."""
    return SIGNATURE + struct.pack("!BBH", command, kind, len(rest)) + rest


def block(ends: Ends) -> bytes:
    """Return the addresses and ports in a header of version 2."""
    family = socket.AF_INET6 if ":" in ends.client else socket.AF_INET
    hosts = [socket.inet_pton(family, host) for host in (ends.client, ends.local)]
    return b"".join(hosts) + struct.pack("!HH", ends.client_port, ends.local_port)


def tlv(kind: int, value: bytes = b"") -> bytes:
    return struct.pack("!BH", kind, len(value)) + value


def checksum(octets: bytes) -> int:
    """CRC32c, by division of one long polynomial (RFC 4960 appendix B)."""
    reflected = [int(f"{octet:08b}"[::-1], 2) for octet in octets] + [0] * 4
    dividend = int.from_bytes(bytes(reflected), "big")
    dividend ^= 0xFFFFFFFF << 8 * len(octets)
    for place in range(8 * len(octets) + 31, 31, -1):
        if dividend >> place & 1:
            dividend ^= 0x11EDC6F41 << place - 32
    return int(f"{dividend:032b}"[::-1], 2) ^ 0xFFFFFFFF


def test_checksum() -> None:
    assert checksum(b"123456789") == 0xE3069283


def checked(kind: int, before: bytes, after: bytes = b"", change: int = 0) -> bytes:
    """Return a header of version 2 with its checksum, to which `change` is done."""
    blank = v2(kind, before + tlv(CRC32C, bytes(4)) + after)
    value = checksum(blank) ^ change
    return v2(kind, before + tlv(CRC32C, struct.pack("!I", value)) + after)


def filled(size: int) -> bytes:
    """Return a header of version 2 of so many octets."""
    return v2(TCP4, block(FOUR) + tlv(NOOP, bytes(size - 16 - 12 - 3)))


LONGEST_V1 = b"UNKNOWN " + b" ".join([b"ffff:" * 7 + b"ffff"] * 2 + [b"65535"] * 2)
LIMIT_V1 = 107
LIMIT_V2 = program.PROXY_2_LIMIT

# The ends that it names, or None for those of the connection itself.
GOOD: dict[str, tuple[bytes, Optional[Ends]]] = {
    "v1-tcp4": (v1_ends("TCP4", FOUR), FOUR),
    "v1-tcp4-longest": (
        v1(b"TCP4 255.255.255.254 255.255.255.255 65535 65535"),
        Ends("255.255.255.254", 65535, "255.255.255.255", 65535),
    ),
    "v1-tcp4-port-0": (
        v1(b"TCP4 192.0.2.1 198.51.100.2 0 25"),
        FOUR._replace(client_port=0),
    ),
    "v1-tcp6": (v1_ends("TCP6", SIX), SIX),
    "v1-tcp6-longest": (
        v1(
            b"TCP6 2001:0DB8:%s:0001 2001:0db8:0002:%s:0002 65535 25"
            % (b":".join([b"0000"] * 5), b":".join([b"0000"] * 4))
        ),
        SIX,
    ),
    "v1-tcp6-mapped": (v1_ends("TCP6", FOUR_IN_SIX), FOUR),
    "v1-unknown": (v1(b"UNKNOWN"), None),
    "v1-unknown-and-more": (v1(b"UNKNOWN 192.0.2.1 \xff TCP4"), None),
    "v1-unknown-longest": (v1(LONGEST_V1), None),
    "v2-tcp4": (v2(TCP4, block(FOUR)), FOUR),
    "v2-tcp6": (v2(TCP6, block(SIX)), SIX),
    "v2-tcp6-mapped": (v2(TCP6, block(FOUR_IN_SIX)), FOUR),
    "v2-unspec": (v2(UNSPEC), None),
    "v2-unspec-and-more": (v2(UNSPEC, block(FOUR)), None),
    "v2-udp4": (v2(UDP4, block(FOUR)), None),
    "v2-udp6": (v2(UDP6, block(SIX)), None),
    "v2-unix": (v2(UNIX, b"/a".ljust(108, b"\0") + b"/b".ljust(108, b"\0")), None),
    "v2-local": (v2(UNSPEC, command=LOCAL), None),
    "v2-local-with-fields": (v2(UNSPEC, tlv(NOOP, b"12"), command=LOCAL), None),
    "v2-local-with-addresses": (v2(TCP4, block(FOUR), command=LOCAL), None),
    "v2-local-unix": (v2(UNIX, bytes(216), command=LOCAL), None),
    "v2-local-of-no-known-family": (v2(0xFF, bytes(5), command=LOCAL), None),
    "v2-fields": (
        v2(
            TCP4,
            block(FOUR) + tlv(NOOP) + tlv(UNIQUE_ID, b"\0" * 128) + tlv(CUSTOM, b"x"),
        ),
        FOUR,
    ),
    "v2-fields-tcp6": (v2(TCP6, block(SIX) + tlv(CUSTOM, b"QUIT\r\n")), SIX),
    "v2-checksum": (checked(TCP4, block(FOUR)), FOUR),
    "v2-checksum-between": (
        checked(TCP6, block(SIX) + tlv(UNIQUE_ID, b"1"), tlv(NOOP, b"23")),
        SIX,
    ),
    "v2-largest": (filled(LIMIT_V2), FOUR),
}

BAD: dict[str, bytes] = {
    "smtp": b"EHLO client.example\r\n",
    "http": b"GET / HTTP/1.1\r\nHost: mail.example\r\n\r\n",
    "tls": bytes.fromhex("16030100c8010000c40303"),
    "nul": b"\0",
    "blank-line": b"\r\nEHLO client.example\r\n",
    "v1-lower-case": v1_ends("TCP4", FOUR).lower(),
    "v1-blank-first": b" " + v1_ends("TCP4", FOUR),
    "v1-verb-only": b"PROXY\r\n",
    "v1-no-family": v1(b""),
    "v1-no-addresses": v1(b"TCP4"),
    "v1-other-family": v1_ends("TCP5", FOUR),
    "v1-longer-unknown": v1(b"UNKNOWNS"),
    "v1-no-port": v1(b"TCP4 192.0.2.1 198.51.100.2 4711"),
    "v1-one-more": v1(b"TCP4 192.0.2.1 198.51.100.2 4711 25 1"),
    "v1-blank-last": v1(b"TCP4 192.0.2.1 198.51.100.2 4711 25 "),
    "v1-two-blanks": v1(b"TCP4  192.0.2.1 198.51.100.2 4711 25"),
    "v1-tab": v1(b"TCP4\t192.0.2.1 198.51.100.2 4711 25"),
    "v1-nul": v1(b"TCP4 192.0.2.1\0 198.51.100.2 4711 25"),
    "v1-name": v1(b"TCP4 client.example 198.51.100.2 4711 25"),
    "v1-number": v1(b"TCP4 192.0.2.256 198.51.100.2 4711 25"),
    "v1-three-numbers": v1(b"TCP4 192.0.513 198.51.100.2 4711 25"),
    "v1-octal-number": v1(b"TCP4 192.0.02.1 198.51.100.2 4711 25"),
    "v1-tcp4-with-6": v1_ends("TCP4", SIX),
    "v1-tcp6-with-4": v1_ends("TCP6", FOUR),
    "v1-scope": v1(b"TCP6 fe80::1%lo 2001:db8::2 4711 25"),
    "v1-brackets": v1(b"TCP6 [2001:db8::1] 2001:db8::2 4711 25"),
    "v1-port-too-large": v1(b"TCP4 192.0.2.1 198.51.100.2 65536 25"),
    "v1-port-negative": v1(b"TCP4 192.0.2.1 198.51.100.2 -1 25"),
    "v1-port-octal": v1(b"TCP4 192.0.2.1 198.51.100.2 4711 025"),
    "v1-cr-inside": v1(b"TCP4 192.0.2.1\r 198.51.100.2 4711 25"),
    "v1-lf-inside": v1(b"TCP4 192.0.2.1\n 198.51.100.2 4711 25"),
    "v1-lf-at-the-end": b"PROXY UNKNOWN\n".ljust(LIMIT_V1, b"x"),
    "v1-too-long": v1(LONGEST_V1 + b"5"),
    "v1-without-end": b"PROXY UNKNOWN ".ljust(LIMIT_V1, b"x"),
    "v2-signature": v2(TCP4, block(FOUR)).replace(b"QUIT\n", b"QUIT\r"),
    "v2-version-1": v2(TCP4, block(FOUR), command=0x11),
    "v2-version-3": v2(TCP4, block(FOUR), command=0x31),
    "v2-command": v2(TCP4, block(FOUR), command=0x22),
    "v2-family": v2(0x41, block(FOUR)),
    "v2-protocol": v2(0x13, block(FOUR)),
    "v2-no-addresses": v2(TCP4),
    "v2-tcp4-too-short": v2(TCP4, block(FOUR)[:-1]),
    "v2-tcp6-too-short": v2(TCP6, block(SIX)[:-1]),
    "v2-tcp6-with-4": v2(TCP6, block(FOUR)),
    "v2-field-cut": v2(TCP4, block(FOUR) + tlv(NOOP, b"12")[:-1]),
    "v2-field-without-size": v2(TCP4, block(FOUR) + tlv(NOOP) + b"\x04\0"),
    "v2-field-too-large": v2(TCP4, block(FOUR) + struct.pack("!BH", NOOP, 65535)),
    "v2-checksum-wrong": checked(TCP4, block(FOUR), change=1),
    "v2-checksum-wrong-tcp6": checked(TCP6, block(SIX), tlv(NOOP), change=1 << 31),
    "v2-checksum-zero": v2(TCP4, block(FOUR) + tlv(CRC32C, bytes(4))),
    "v2-checksum-too-short": v2(TCP4, block(FOUR) + tlv(CRC32C, bytes(3))),
    "v2-checksum-empty": v2(TCP4, block(FOUR) + tlv(CRC32C)),
    "v2-too-large": filled(LIMIT_V2 + 1),
    "v2-far-too-large": filled(16 + 65535),
}

# Each might still become a header.
UNFINISHED: dict[str, bytes] = {
    "nothing": b"",
    "v1-one-octet": b"P",
    "v1-no-end": v1_ends("TCP4", FOUR)[:-2],
    "v1-half-of-the-end": v1_ends("TCP4", FOUR)[:-1],
    "v2-one-octet": b"\r",
    "v2-signature": SIGNATURE,
    "v2-half-of-the-length": v2(TCP4, block(FOUR))[:15],
    "v2-no-addresses": v2(TCP4, block(FOUR))[:16],
    "v2-addresses-cut": v2(TCP4, block(FOUR))[:-1],
    "v2-fields-cut": v2(TCP4, block(FOUR) + tlv(NOOP, b"12"))[:-1],
}
NO_HEADER = r"(?:no|bad) PROXY header from 127\.0\.0\.3\b"
ANYWHERE = "127.0.0.3"  # where those come from who make headers themselves


SOME = ("v1-tcp6", "v1-unknown", "v2-tcp4", "v2-local", "v2-checksum")  # good ones


def of_each(table: Iterable[str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("name", table)


def connect(daemon: Daemon) -> RawClient:
    """Connect as one who makes headers himself."""
    return daemon.connect(source=(ANYWHERE, 0))


def check_closed(client: RawClient, daemon: Daemon, server: ScriptedServer) -> None:
    """Check that it and the server got nothing, and that the next one is served."""
    assert client.eof()
    daemon.wait_log(NO_HEADER)
    assert server.connections == []
    with connect(daemon) as other:
        other.send(v1(b"UNKNOWN"))
        assert other.message(MESSAGE).startswith(b"250")


@pytest.mark.parametrize(
    ("name", "is_split"),
    [*((name, False) for name in GOOD), *((name, True) for name in SOME)],
)
def test_good_header(name: str, is_split: bool, shared_daemon: ShareDaemon) -> None:
    """The header's addresses count, else the connection's; SMTP begins after it."""
    header, ends = GOOD[name]
    daemon, server = shared_daemon(PROXIED, {}, extensions=[PROXY_XCLIENT])
    client = connect(daemon)
    for piece in octetwise(header) if is_split else [header]:
        client.send(piece)
    assert client.message(MESSAGE).startswith(b"250")
    check_ends(daemon, server, ends or ends_of(client))


@of_each(SOME)
def test_header_and_commands_at_once(
    name: str, make_server: MakeServer, proxsmtpd: StartDaemon
) -> None:
    """The octets after the header in the same segment are SMTP; none is lost."""
    header, ends = GOOD[name]
    server = make_server(extensions=[PROXY_XCLIENT])
    daemon = start_proxied(proxsmtpd, OutAddress=server.address)
    client = connect(daemon)
    client.send(
        header + b"EHLO client.example\r\n"
        b"MAIL FROM:<a@example.com>\r\nRCPT TO:<b@example.com>\r\nDATA\r\n"
    )
    codes = [client.reply()[:3] for _ in range(5)]
    assert codes == [b"220", b"250", b"250", b"250", b"354"]
    assert client.command(MESSAGE + b".").startswith(b"250")
    check_ends(daemon, server, ends or ends_of(client))


def test_unix_socket_with_header(
    make_server: MakeServer, proxsmtpd: StartDaemon, tmp_path: Path
) -> None:
    """A client of a socket in the file system can have an address, too."""
    server = make_server(extensions=[PROXY_XCLIENT])
    listen = tmp_path / "sock"
    daemon = start_proxied(proxsmtpd, Listen=listen, OutAddress=server.address)
    client = daemon.connect()
    client.send(v2(TCP4, block(FOUR)))
    assert client.message(MESSAGE).startswith(b"250")
    check_ends(daemon, server, FOUR)


@of_each(BAD)
def test_bad_header(name: str, shared_daemon: ShareDaemon) -> None:
    """Anything that cannot become a header ends the connection at once."""
    daemon, server = shared_daemon({"ProxyProtocol": "on"}, {})
    with connect(daemon) as client:
        client.send(BAD[name])
        check_closed(client, daemon, server)


@of_each(UNFINISHED)
def test_header_in_vain_expected(
    name: str, server: ScriptedServer, proxsmtpd: StartDaemon
) -> None:
    """A connection without a header within TimeOut is closed."""
    daemon = proxsmtpd({"ProxyProtocol": "on", "TimeOut": 1})
    client = connect(daemon)
    client.send(UNFINISHED[name])
    check_closed(client, daemon, server)


def test_header_that_never_ends(server: ScriptedServer, proxsmtpd: StartDaemon) -> None:
    """TimeOut is for the whole header, however slowly it comes."""
    daemon = proxsmtpd({"ProxyProtocol": "on", "TimeOut": 1})
    client = connect(daemon)
    for octet in v1(LONGEST_V1)[:-2]:
        if select.select([client.sock], [], [], 0.1)[0]:
            break
        client.send(bytes([octet]))
    else:
        pytest.fail("the header could be sent")
    check_closed(client, daemon, server)


@pytest.mark.parametrize("leave", [RawClient.close, RawClient.reset])
@pytest.mark.parametrize("name", ["nothing", "v1-no-end", "v2-addresses-cut"])
def test_connection_ends_before_header(
    name: str,
    leave: Callable[[RawClient], None],
    server: ScriptedServer,
    proxsmtpd: StartDaemon,
) -> None:
    """A port scan is no more than a line in the log, which says where it is from."""
    daemon = proxsmtpd({"ProxyProtocol": "on"}, level=3)
    client = connect(daemon)
    client.send(UNFINISHED[name])
    leave(client)
    daemon.wait_log(re.escape(ANYWHERE))
    assert server.connections == []


def test_daemon_ends_before_header(
    server: ScriptedServer, proxsmtpd: StartDaemon
) -> None:
    """A client that has not sent a header yet does not hold up the end."""
    daemon = proxsmtpd({"ProxyProtocol": "on"})
    client = connect(daemon)
    client.send(b"PROXY ")
    threads = Path(f"/proc/{daemon.process.pid}/task")
    assert poll(lambda: len(list(threads.iterdir())) > 1), "has not been accepted"
    daemon.process.send_signal(signal.SIGTERM)
    assert client.line() == SHUTTING_DOWN + b"\r\n"
    client.close()
    assert daemon.wait() == 0
    assert server.connections == []
