"""What TLS costs: handshakes, sessions, large messages, and idle connections.

The client is this process and the server is bulk.py; both use STARTTLS if asked to.
The handshakes are those of `openssl s_time`, which says nothing after them.
"""

from __future__ import annotations

import contextlib
import re
import socket
import ssl
import statistics
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, NamedTuple, Optional

from bulk import Dialogue, message_of
from cases import Pace
from contenders import HOST, BenchError, Daemon, Site, Start, find, tls_sink
from interrupts import INTERRUPTS
from probes import CONNECTIONS

TIMEOUT = 15.0  # seconds for whatever is waited for
SMALL, LARGE = 1_000, 20_000_000  # octets of a message
SESSIONS = 5  # one after the other, for each start that other probes time
HAND_SHAKERS = 3  # programs that make handshakes at a time

LISTEN = {"ListenTls": "may", "ListenCertificate": "certificate", "ListenKey": "key"}
OUT = {"OutTls": "require"}
# On which sides there is TLS; the values of LISTEN are files of the site's directory.
SIDES: Mapping[str, Mapping[str, str]] = {
    "neither": {},
    "client": LISTEN,
    "server": OUT,
    "both": {**LISTEN, **OUT},
}


class Spent(NamedTuple):
    """Seconds that something took, and processor seconds of ours for it."""

    seconds: float
    cpu: float


@dataclass
class Side:
    """What was measured with TLS on these sides."""

    sessions: list[Spent] = field(default_factory=list)
    large: list[Spent] = field(default_factory=list)
    idle: Optional[float] = None  # KiB a connection; None if we may not look


@dataclass
class Encryption:
    """All that TLS costs."""

    sides: dict[str, Side] = field(default_factory=dict)
    handshakes: float = 0.0  # a second
    handshake_cpu: float = 0.0  # processor seconds of ours for each


def median(spent: Sequence[Spent]) -> Spent:
    """The median time, and the average processor time."""
    seconds = statistics.median(each.seconds for each in spent)
    return Spent(seconds, statistics.fmean(each.cpu for each in spent))


def make_certificate(directory: Path) -> bool:
    """Make a certificate and its key there; whether there is an openssl for it."""
    openssl = find("openssl")
    if openssl is None:
        return False
    words = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2"
    files = "-subj /CN=bench.example -keyout key -out certificate"
    command = [openssl, *words.split(), *files.split()]
    subprocess.run(command, cwd=directory, capture_output=True, check=True)
    return True


def settings_of(site: Site, settings: Mapping[str, str]) -> dict[str, str]:
    """Settings with the paths of the site's files."""
    files = ("certificate", "key")
    return {
        name: str(site.directory / value) if value in files else value
        for name, value in settings.items()
    }


def encryption(site: Site, start: Start, pace: Pace) -> Encryption:
    """Measure ours with TLS on no side, either side and both; they take turns."""
    found = Encryption({name: Side() for name in SIDES})
    with contextlib.ExitStack() as stack:
        certificate = str(site.directory / "certificate")
        key = str(site.directory / "key")
        sink = Site(site.directory)
        stack.enter_context(sink.sink(lambda port: tls_sink(port, certificate, key)))
        daemons = {}
        for name, wanted in SIDES.items():
            settings = settings_of(site, wanted)
            daemons[name] = stack.enter_context(start(sink, settings, CONNECTIONS))
        clients = {name: client_of(daemons[name].port, name) for name in SIDES}
        for _ in range(pace.starts * SESSIONS):
            for name, side in found.sides.items():
                side.sessions.append(timed(daemons[name], clients[name], SMALL))
        for name, side in found.sides.items():
            side.idle = idle(daemons[name], clients[name], pace.idle[1])
        for _ in range(pace.rounds):
            for name, side in found.sides.items():
                side.large.append(timed(daemons[name], clients[name], LARGE))
        settings = settings_of(site, {**LISTEN, "ListenTls": "implicit"})
        daemon = stack.enter_context(start(sink, settings, CONNECTIONS))
        found.handshakes, found.handshake_cpu = shake_hands(daemon, pace)
    return found


# --- Sessions -----------------------------------------------------------------

Client = Callable[[], contextlib.AbstractContextManager[Dialogue]]


def client_of(port: int, side: str) -> Client:
    """Return what begins a session, up to the last EHLO, with STARTTLS if need be."""
    context = None
    if side in ("client", "both"):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE

    @contextlib.contextmanager
    def begin() -> Iterator[Dialogue]:
        with socket.create_connection((HOST, port), TIMEOUT) as connection:
            dialogue = Dialogue(connection)
            dialogue.expect(b"220")
            dialogue.ask(b"EHLO client.example", b"250")
            if context is None:
                yield dialogue
                return
            dialogue.ask(b"STARTTLS", b"220")
            with context.wrap_socket(connection) as encrypted:
                dialogue = Dialogue(encrypted)
                dialogue.ask(b"EHLO client.example", b"250")
                yield dialogue

    return begin


def timed(daemon: Daemon, client: Client, length: int) -> Spent:
    """Send one message in a session of its own."""
    message = message_of(length)
    before, began = daemon.cpu(), time.monotonic()
    with client() as dialogue:
        dialogue.send_message(message)
        dialogue.ask(b"QUIT", b"221")
    seconds = time.monotonic() - began
    daemon.settle()
    return Spent(seconds, (daemon.cpu() - before).own)


def idle(daemon: Daemon, client: Client, count: int) -> Optional[float]:
    """The KiB that a connection takes on which nothing happens after EHLO."""
    try:
        before = daemon.memory()
    except PermissionError:
        return None  # of a process with a key
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            stack.enter_context(client())
        weight = daemon.memory()
    daemon.settle()
    return (weight - before) / count


# --- Handshakes ---------------------------------------------------------------


def shake_hands(daemon: Daemon, pace: Pace) -> tuple[float, float]:
    """Full handshakes a second, and processor seconds of ours for each."""
    before, made, rates = daemon.cpu(), 0, []
    for _ in range(pace.rounds):
        began = time.monotonic()
        count = shake_hands_once(daemon.port, pace.handshakes)
        rates.append(count / (time.monotonic() - began))
        made += count
    daemon.settle()
    return statistics.median(rates), (daemon.cpu() - before).own / max(made, 1)


def shake_hands_once(port: int, seconds: int) -> int:
    """How many handshakes some clients make in that time.

    s_time ends when that number of seconds has begun.
    """
    command = [
        *(find("openssl") or "openssl", "s_time", "-new", "-time", str(seconds)),
        *("-connect", f"{HOST}:{port}"),
    ]
    clients: list[subprocess.Popen[str]] = []
    with contextlib.ExitStack() as stack:
        for _ in range(HAND_SHAKERS):
            with INTERRUPTS.held():
                client = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    start_new_session=True,
                )
                stack.callback(client.wait)
                stack.callback(client.kill)
            clients.append(client)
        return sum(
            count_of(client.communicate(timeout=TIMEOUT)[0]) for client in clients
        )


def count_of(output: str) -> int:
    """The connections that s_time says it has made; `BenchError` if it does not."""
    found = re.search(r"(\d+) connections in \d+ real seconds", output)
    if found is None:
        raise BenchError(f"openssl s_time: {output.strip()[-200:]}")
    return int(found[1])
