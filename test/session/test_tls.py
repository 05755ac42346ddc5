"""TLS with scripted peers: the matrices of modes and peers, and the pitfalls.

The first matrix is OutTls and what stands at OutAddress, the second ListenTls and what
clients do.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import select
import shutil
import signal
import socket
import ssl
import struct
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Callable, NamedTuple

import pytest

import proxsmtpd as program
from helpers import (
    GREETING,
    MEGABYTE,
    MESSAGE,
    PEER_PATIENCE,
    PROGRAM,
    QUEUED,
    STALE_ENVIRONMENT,
    Daemon,
    DaemonFactory,
    MakeFilter,
    MakeServer,
    ShareDaemon,
    StartDaemon,
    as_root,
    deliver,
    long_message,
    octetwise,
    poll,
    program_under_test,
    requires,
    run,
    settings_text,
    some_user,
    stuffed,
    unstuffed,
)
from smtp import Close, RawClient, Recorded, ScriptedServer, Stall, reset
from tls import (
    HOST,
    READY,
    Certificates,
    both_sides,
    client_context,
    encrypted,
    encrypted_greeting,
    hello,
    hello_by_tls,
    is_encrypted,
    listen_tls,
    old_version,
    server_context,
    start_tls,
    starttls,
)

# --- The server's side: OutTls and what it meets ---

CANNOT = b"421 Connection to server cannot be encrypted\r\n"
TIMED_OUT = b"421 Server timed out\r\n"

Script = dict[str, Any]


def offering(action: Any) -> Script:
    """Return a script that offers STARTTLS until it has been used."""
    return {"EHLO": hello_by_tls([b"STARTTLS"], [b"AUTH PLAIN"]), "STARTTLS": action}


def with_certificate(name: str) -> Callable[[Certificates], Script]:
    return lambda certificates: offering(
        starttls(server_context(certificates.path(name)))
    )


def implicit(certificates: Certificates) -> Script:
    context = server_context(certificates.path("good"))
    return {"GREETING": encrypted_greeting(context)}


def with_tls_1_1(certificates: Certificates) -> Script:
    context = old_version(server_context(certificates.path("good")))
    return offering(starttls(context))


def injects(certificates: Certificates) -> Script:
    context = server_context(certificates.path("good"))
    return offering(starttls(context, READY + b"250 injected\r\n"))


def go_silent(connection: Recorded, _line: bytes) -> Stall:
    connection.sock.sendall(READY)
    return Stall()


def go_on_in_clear(connection: Recorded, _line: bytes) -> Stall:
    connection.sock.sendall(READY)
    connection.sock.recv(65536)
    connection.sock.sendall(b"250 What?\r\n")
    return Stall()


# What stands at OutAddress.
UPSTREAMS: Mapping[str, Callable[[Certificates], Script]] = {
    "clear": lambda _: {},
    "starttls": with_certificate("good"),
    "implicit": implicit,
    "wrong-name": with_certificate("wrong-name"),
    "expired": with_certificate("expired"),
    "other-authority": with_certificate("other"),
    "tls-1.1": with_tls_1_1,
    "closes": lambda _: offering(Close(READY)),
    "refuses": lambda _: offering(b"454 4.7.0 TLS not available\r\n"),
    "refuses-ehlo": lambda _: {"EHLO": b"502 5.5.2 No EHLO\r\n"},
    "injects": injects,
    "silent": lambda _: offering(go_silent),
    "garbage": lambda _: offering(go_on_in_clear),
    "refuses-us": lambda _: {"GREETING": b"554 5.7.1 Go away\r\n"},
}


class Outcome(NamedTuple):
    """What becomes of a session: the greeting, and whether the message is encrypted.

    `log` is a pattern; empty if there must be no warning and no error.
    """

    greeting: bytes = GREETING
    is_encrypted: bool = True
    log: str = ""


def fails(log: str, greeting: bytes = CANNOT) -> Outcome:
    return Outcome(greeting, log=f"SERVER: {log}$")


def falls_back(log: str) -> Outcome:
    return Outcome(is_encrypted=False, log=f"SERVER: {log}; going on without$")


IN_TLS, IN_CLEAR = Outcome(), Outcome(is_encrypted=False)
SLOW = fails("network read operation timed out", TIMED_OUT)
NOT_OFFERED = fails("doesn't offer STARTTLS")
REFUSED = "refused STARTTLS: 454 4.7.0 TLS not available"
INJECTED = fails("more came after the reply to STARTTLS")
AWAY = Outcome(b"554 5.7.1 Go away\r\n")
START = "couldn't start TLS:"
OLD = f"{START} (tlsv1 alert protocol version|unsupported protocol)"
CLOSED = f"{START} connection closed by peer"
NO_RECORD = f"{START} wrong version number"
STALLED = f"{START} timed out"

# By mode and upstream.
OUTCOMES: Mapping[str, Mapping[str, Outcome]] = {
    "off": {
        **dict.fromkeys(UPSTREAMS, IN_CLEAR),
        "implicit": SLOW,
        "refuses-us": AWAY,
    },
    "may": {
        "clear": IN_CLEAR,
        "starttls": IN_TLS,
        "implicit": SLOW,
        "wrong-name": IN_TLS,
        "expired": IN_TLS,
        "other-authority": IN_TLS,
        "tls-1.1": falls_back(OLD),
        "closes": falls_back(CLOSED),
        "refuses": Outcome(is_encrypted=False, log=f"SERVER: {REFUSED}$"),
        "refuses-ehlo": IN_CLEAR,
        "injects": INJECTED,
        "silent": falls_back(STALLED),
        "garbage": falls_back(NO_RECORD),
        "refuses-us": AWAY,
    },
    "require": {
        "clear": NOT_OFFERED,
        "starttls": IN_TLS,
        "implicit": SLOW,
        "wrong-name": IN_TLS,
        "expired": IN_TLS,
        "other-authority": IN_TLS,
        "tls-1.1": fails(OLD),
        "closes": fails(CLOSED),
        "refuses": fails(REFUSED),
        "refuses-ehlo": NOT_OFFERED,
        "injects": INJECTED,
        "silent": fails(STALLED),
        "garbage": fails(NO_RECORD),
        "refuses-us": AWAY,
    },
    "verify": {
        "clear": NOT_OFFERED,
        "starttls": IN_TLS,
        "implicit": SLOW,
        "wrong-name": fails(
            f"{START} Hostname mismatch, certificate is not valid for '{HOST}'\\."
        ),
        "expired": fails(f"{START} certificate has expired"),
        "other-authority": fails(f"{START} unable to get local issuer certificate"),
        "tls-1.1": fails(OLD),
        "closes": fails(CLOSED),
        "refuses": fails(REFUSED),
        "refuses-ehlo": NOT_OFFERED,
        "injects": INJECTED,
        "silent": fails(STALLED),
        "garbage": fails(NO_RECORD),
        "refuses-us": AWAY,
    },
    "implicit": {
        **dict.fromkeys(UPSTREAMS, fails(NO_RECORD)),
        "implicit": IN_TLS,
    },
}
CASES = [(mode, name) for mode, row in OUTCOMES.items() for name in row]


def out_tls(
    mode: str, certificates: Certificates, **settings: object
) -> dict[str, object]:
    """Return settings for the server's side; they verify if the mode does."""
    settings = {"OutTls": mode, **settings}
    if mode in ("verify", "implicit"):
        settings = {"OutTlsName": HOST, "OutTlsTrust": certificates.ca, **settings}
    return settings


@pytest.mark.parametrize(("mode", "upstream"), CASES)
def test_server_side(
    mode: str,
    upstream: str,
    certificates: Certificates,
    shared_daemon: ShareDaemon,
) -> None:
    """A session is encrypted, or in clear, or the client gets a 421 for a greeting."""
    outcome = OUTCOMES[mode][upstream]
    is_slow = outcome is SLOW or STALLED in outcome.log
    settings = out_tls(mode, certificates, TimeOut=2 if is_slow else 20)
    script = UPSTREAMS[upstream](certificates)
    daemon, server = shared_daemon(settings, script, level=3)
    client = daemon.connect(timeout=30)
    assert client.reply() == outcome.greeting
    if outcome.greeting == GREETING:
        verb = b"HELO" if upstream == "refuses-ehlo" else b"EHLO"
        helo = verb + b" client.example"
        reply = client.expect(helo, b"250")
        assert b"STARTTLS" not in reply
        assert (b"AUTH PLAIN" in reply) == (outcome.is_encrypted and mode != "implicit")
        client.envelope()
        client.expect(b"DATA", b"354")
        client.send(MESSAGE + b".\r\n")
        assert client.reply() == QUEUED
        client.quit()
        message = server.wait_message()
        assert is_encrypted(message.connection) == outcome.is_encrypted
        assert message.data == MESSAGE
    elif outcome is not AWAY:
        assert client.at_end()
        assert server.messages == []
    log = daemon.log()
    assert bool(re.search(r"SERVER encrypted: TLSv1\.[23] \S+$", log, re.M)) == (
        outcome.is_encrypted and outcome.greeting == GREETING
    )
    if outcome.log:
        daemon.wait_log(outcome.log)
    else:
        assert "SERVER: " not in log


# --- The clients' side: ListenTls and what clients do ---

EHLO = b"EHLO client.example"
BAD_AUTH = b"AUTH PLAIN AHVzZXIAc2VjcmV0"  # user, secret


class Listening(NamedTuple):
    """A client that has just connected, and the daemon that it connected to."""

    client: RawClient
    daemon: Daemon
    certificates: Certificates

    def ready(self) -> None:
        """Go on to the 220 after STARTTLS; AssertionError if there is none."""
        assert self.client.reply() == GREETING
        self.client.expect(EHLO, b"250")
        self.client.expect(b"STARTTLS", b"220")

    def deliver(self) -> str:
        self.client.expect(EHLO, b"250")
        self.client.envelope()
        self.client.expect(b"DATA", b"354")
        self.client.send(MESSAGE + b".\r\n")
        assert self.client.reply() == QUEUED
        self.client.quit()
        return "delivered"


def in_clear(peer: Listening) -> str:
    assert peer.client.reply() == GREETING
    return peer.deliver()


def by_starttls(peer: Listening) -> str:
    peer.ready()
    start_tls(peer.client, client_context(peer.certificates.ca))
    return peer.deliver()


def at_once(peer: Listening) -> str:
    start_tls(peer.client, client_context(peer.certificates.ca))
    assert peer.client.reply() == GREETING
    return peer.deliver()


def begin(peer: Listening, context: ssl.SSLContext) -> str:
    """Begin TLS as the daemon has it, with this context."""
    if "ListenTls: implicit" not in peer.daemon.config.read_text():
        peer.ready()
    start_tls(peer.client, context)
    return "encrypted"


def by_tls_1_1(peer: Listening) -> str:
    return begin(peer, old_version(client_context()))


def distrusting(peer: Listening) -> str:
    return begin(peer, client_context(peer.certificates.other_ca))


def authenticating(peer: Listening) -> str:
    """Send a password in clear."""
    assert peer.client.reply() == GREETING
    assert b"AUTH" not in peer.client.expect(EHLO, b"250") or is_off(peer.daemon)
    return peer.client.command(BAD_AUTH)[:3].decode()


def is_off(daemon: Daemon) -> bool:
    return "ListenTls: off" in daemon.config.read_text()


def without_ehlo(peer: Listening) -> str:
    """Go on after STARTTLS as if EHLO were known."""
    peer.ready()
    start_tls(peer.client, client_context())
    verbs = (
        b"MAIL FROM:<a@x.example>",
        BAD_AUTH,
        b"STARTTLS",
        b"RSET",
        b"NOOP",
        b"DATA",
    )
    return " ".join(peer.client.command(verb)[:3].decode() for verb in verbs)


def twice(peer: Listening) -> str:
    peer.ready()
    start_tls(peer.client, client_context())
    assert b"STARTTLS" not in peer.client.expect(EHLO, b"250")
    return peer.client.command(b"STARTTLS")[:3].decode()


def injecting(peer: Listening) -> str:
    """Send commands together with STARTTLS, to be read as if encrypted."""
    assert peer.client.reply() == GREETING
    peer.client.expect(EHLO, b"250")
    return peer.client.command(b"STARTTLS\r\nMAIL FROM:<evil@x.example>")[:3].decode()


def with_argument(peer: Listening) -> str:
    assert peer.client.reply() == GREETING
    return peer.client.command(b"STARTTLS now")[:3].decode()


def half_a_record(peer: Listening) -> str:
    """Send the beginning of a ClientHello, and the end of the connection."""
    if "ListenTls: implicit" not in peer.daemon.config.read_text():
        peer.ready()
    peer.client.send(b"\x16\x03\x01\x02\x00\x01\x00")
    peer.client.sock.shutdown(socket.SHUT_WR)
    return ended(peer)


def silent(peer: Listening) -> str:
    if "ListenTls: implicit" not in peer.daemon.config.read_text():
        peer.ready()
    return ended(peer)


def garbage(peer: Listening) -> str:
    if "ListenTls: implicit" not in peer.daemon.config.read_text():
        peer.ready()
    peer.client.send(b"MAIL FROM:<a@x.example>\r\n")
    return ended(peer)


def sigterm(peer: Listening) -> str:
    """Fall silent, while the daemon is told to end."""
    if "ListenTls: implicit" in peer.daemon.config.read_text():
        peer.daemon.wait_log("accepted connection")
    else:
        peer.ready()
    peer.daemon.process.send_signal(signal.SIGTERM)
    try:
        return ended(peer)
    finally:
        assert peer.daemon.wait() == 0


def ended(peer: Listening) -> str:
    """Read to the end; nothing in clear may come."""
    octets = b""
    with contextlib.suppress(ConnectionResetError):
        while block := peer.client.sock.recv(65536):
            octets += block
    return octets.decode("latin-1") or "closed"


class Ending(NamedTuple):
    """What a client sees, and a pattern for a warning in the log, if there is one."""

    seen: str
    log: str = ""


DELIVERED = Ending("delivered")
NO_OFFER = Ending("502")
HUNG_UP = "CLIENT: couldn't start TLS: connection closed by peer"
SILENT = "CLIENT: couldn't start TLS: timed out"
SHUT_DOWN = "CLIENT: couldn't start TLS: shutting down"
NO_TLS = Ending("closed", "CLIENT: couldn't start TLS: wrong version number")
OLD_CLIENT = Ending(
    "TLSV1_ALERT_PROTOCOL_VERSION",  # and no reset of the connection
    "CLIENT: couldn't start TLS: (unsupported protocol|tlsv1 alert protocol version"
    "|no shared cipher)",
)
DISTRUST = Ending("distrust", "CLIENT: couldn't start TLS: tlsv1 alert unknown ca")
STARTTLS_ROW: Mapping[Callable[[Listening], str], Ending] = {
    in_clear: DELIVERED,
    by_starttls: DELIVERED,
    by_tls_1_1: OLD_CLIENT,
    distrusting: DISTRUST,
    authenticating: Ending("538"),
    without_ehlo: Ending("503 503 503 250 250 503"),
    twice: Ending("503"),
    injecting: Ending("554", "client sent more after STARTTLS"),
    with_argument: Ending("501"),
    half_a_record: Ending("closed", HUNG_UP),
    silent: Ending("closed", SILENT),
    garbage: NO_TLS,
    sigterm: Ending("closed", SHUT_DOWN),
}
ENDINGS: Mapping[str, Mapping[Callable[[Listening], str], Ending]] = {
    "off": {
        in_clear: DELIVERED,
        by_starttls: NO_OFFER,
        authenticating: Ending("235"),
        with_argument: NO_OFFER,
    },
    "may": STARTTLS_ROW,
    "require": {
        **STARTTLS_ROW,
        in_clear: Ending("530"),
        authenticating: Ending("530"),
    },
    "implicit": {
        at_once: DELIVERED,
        by_tls_1_1: OLD_CLIENT,
        distrusting: DISTRUST,
        half_a_record: Ending("closed", HUNG_UP),
        silent: Ending("closed", SILENT),
        garbage: NO_TLS,
        sigterm: Ending("closed", SHUT_DOWN),
    },
}
CLIENTS = [
    pytest.param(mode, act, ending, id=f"{mode}-{act.__name__}")
    for mode, row in ENDINGS.items()
    for act, ending in row.items()
]


def seen_by(act: Callable[[Listening], str], peer: Listening) -> str:
    """Return what a client sees, or the reply that it did not expect."""
    try:
        return act(peer)
    except ssl.SSLCertVerificationError:
        return "distrust"
    except ssl.SSLError as error:
        return error.reason or ""
    except AssertionError as error:
        reply = re.search(r"b['\"](5\d\d) ", str(error))
        if reply is None:
            raise
        return reply[1]


@pytest.mark.parametrize(("mode", "act", "ending"), CLIENTS)
def test_clients_side(
    mode: str,
    act: Callable[[Listening], str],
    ending: Ending,
    certificates: Certificates,
    make_server: MakeServer,
    proxsmtpd: StartDaemon,
    shared_daemon: ShareDaemon,
) -> None:
    script = {"EHLO": hello(b"STARTTLS", b"AUTH PLAIN")}
    settings = listen_tls(
        mode, certificates.path("good"), TimeOut=1 if act is silent else 20
    )
    if act is sigterm:
        server = make_server(script)
        daemon = proxsmtpd(settings, server=server, level=3)
    else:
        daemon, server = shared_daemon(settings, script, level=3)
    client = daemon.connect(timeout=30)
    assert seen_by(act, Listening(client, daemon, certificates)) == ending.seen
    client.close()
    if ending.log:
        daemon.wait_log(f"{ending.log}$")
    else:
        assert "CLIENT:" not in daemon.log()
    is_delivered = ending is DELIVERED
    assert len(server.messages) == is_delivered
    shows_tls = bool(
        re.search(r"CLIENT encrypted: TLSv1\.3 TLS_\w+$", daemon.log(), re.M)
    )
    assert shows_tls == (
        act in (by_starttls, at_once, without_ehlo, twice) and mode != "off"
    )
    commands = [line for c in server.connections for line in c.lines]
    assert not any(b"evil" in line or b"STARTTLS" in line for line in commands)
    assert (BAD_AUTH in commands) == (ending.seen == "235")


# --- What goes wrong with TLS elsewhere, and must not here ---


def test_session_tickets_are_no_reply(
    certificates: Certificates, make_server: MakeServer, proxsmtpd: StartDaemon
) -> None:
    """They make the server's socket readable, while the client says nothing."""
    context = server_context(certificates.path("good"))
    assert context.num_tickets == 2
    is_time = threading.Event()

    def start(connection: Recorded, _line: bytes) -> None:
        connection.sock.sendall(READY)
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = context.wrap_bio(incoming, outgoing, server_side=True)
        while True:
            incoming.write(connection.sock.recv(65536))
            try:
                tls.do_handshake()
            except ssl.SSLWantReadError:
                connection.sock.sendall(outgoing.read())
            else:
                break
        is_time.wait(30)
        connection.sock.sendall(outgoing.read())  # the tickets
        connection.sock.recv(65536)

    server = make_server(offering(start))
    daemon = proxsmtpd({"OutTls": "require", "TimeOut": 2}, server=server)
    client = daemon.connect()
    assert client.reply() == GREETING
    is_time.set()
    # It was the client that was silent, and not the server that began a reply.
    assert client.reply() == b"421 Timed out waiting for client\r\n"


def in_two_records(connection: Recorded, _line: bytes) -> None:
    """Answer twice, in two records that come in one segment."""
    connection.sock.sendall(b"250 Ok\r\n")
    connection.sock.sendall(b"421 Going away\r\n")


@pytest.mark.parametrize("answer", [b"250 Ok\r\n421 Going away\r\n", in_two_records])
def test_two_replies_are_one_too_many(
    answer: Any,
    certificates: Certificates,
    make_server: MakeServer,
    proxsmtpd: StartDaemon,
) -> None:
    """What is decrypted already, poll cannot see; it must not answer the next verb."""
    context = server_context(certificates.path("good"))
    script = {**offering(starttls(context)), "NOOP": answer}
    daemon = proxsmtpd({"OutTls": "require"}, server=make_server(script))
    client = daemon.connect()
    assert client.reply() == GREETING
    assert client.command(b"NOOP") == b"250 Ok\r\n"
    assert client.reply() == b"421 Going away\r\n"
    assert client.at_end()


def test_pipelined_commands_in_one_record(
    certificates: Certificates, proxsmtpd: StartDaemon, server: ScriptedServer
) -> None:
    daemon = proxsmtpd(listen_tls("may", certificates.path("good")))
    client = daemon.connect()
    encrypted(client)
    client.send(
        b"MAIL FROM:<a@x.example>\r\nRCPT TO:<b@x.example>\r\nDATA\r\n"
        + MESSAGE
        + b".\r\nQUIT\r\n"
    )
    codes = [client.reply()[:3] for _ in range(5)]
    assert codes == [b"250", b"250", b"354", b"250", b"221"]
    assert client.at_end()
    assert server.wait_message().data == MESSAGE


@pytest.mark.parametrize("size", [1, 16384, 3 * MEGABYTE])
@pytest.mark.parametrize("command", ["", "cat"], ids=["stream", "filter"])
def test_large_messages_on_both_sides(
    size: int,
    command: str,
    certificates: Certificates,
    make_server: MakeServer,
    proxsmtpd: StartDaemon,
) -> None:
    context = server_context(certificates.path("good"))
    server = make_server(offering(starttls(context)))
    settings = {**both_sides(certificates), "FilterCommand": command}
    client = proxsmtpd(settings, server=server, level=3).connect(timeout=30)
    encrypted(client)
    data = long_message(size)
    client.started = True
    client.envelope()
    assert client.message(stuffed(data)) == QUEUED
    client.quit()
    assert unstuffed(server.wait_message().data) == data


def test_octet_by_octet(
    certificates: Certificates, proxsmtpd: StartDaemon, server: ScriptedServer
) -> None:
    """Records that come in pieces, and others that hold one octet."""
    daemon = proxsmtpd(listen_tls("may", certificates.path("good")))
    with socket.create_server(("127.0.0.1", 0)) as between:
        relay = threading.Thread(
            target=relay_in_pieces, args=(between, daemon.port), daemon=True
        )
        relay.start()
        client = RawClient(between.getsockname(), 30)
        encrypted(client)
        for octet in octetwise(b"MAIL FROM:<a@x.example>\r\n"):
            client.send(octet)
        assert client.reply().startswith(b"250")
        client.expect(b"RCPT TO:<b@x.example>", b"250")
        client.expect(b"DATA", b"354")
        client.send(MESSAGE + b".\r\n")
        assert client.reply() == QUEUED
        client.close()
        relay.join(10)
    assert server.wait_message().data == MESSAGE


def relay_in_pieces(between: socket.socket, port: int) -> None:
    """Relay one connection; what the client sends goes on in pieces of 7 octets."""
    client, _ = between.accept()
    with client, socket.create_connection(("127.0.0.1", port)) as daemon:
        daemon.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while True:
            ready, _, _ = select.select([client, daemon], [], [])
            for source in ready:
                octets = source.recv(65536)
                if not octets:
                    return
                if source is daemon:
                    client.sendall(octets)
                    continue
                for start in range(0, len(octets), 7):
                    daemon.sendall(octets[start : start + 7])


def end_of(sock: socket.socket) -> bytes:
    """Read to the end; ssl.SSLError if the peer did not announce it."""
    assert isinstance(sock, ssl.SSLSocket)
    setattr(sock, "suppress_ragged_eofs", False)  # noqa: B010
    return sock.recv(1)


def test_end_is_announced(
    certificates: Certificates, make_server: MakeServer, proxsmtpd: StartDaemon
) -> None:
    """Both peers get close_notify: GnuTLS and OpenSSL 3 complain about a bare end."""
    context = server_context(certificates.path("good"))
    ends: list[bytes] = []

    def quit_(connection: Recorded, _line: bytes) -> None:
        sock = connection.sock
        sock.sendall(b"221 Bye\r\n")
        ends.append(end_of(sock))

    script = {**offering(starttls(context)), "QUIT": quit_}
    server = make_server(script)
    client = proxsmtpd(both_sides(certificates), server=server).connect()
    encrypted(client)
    assert client.command(b"QUIT") == b"221 Bye\r\n"
    assert end_of(client.sock) == b""
    server.wait_for(lambda: server.connections[0].closed)
    assert ends == [b""]


@pytest.mark.parametrize("is_announced", [True, False])
def test_client_that_ends_before_its_message_is_accepted(
    is_announced: bool,
    certificates: Certificates,
    proxsmtpd: StartDaemon,
    server: ScriptedServer,
    tmp_path: Path,
) -> None:
    """With QUIT it still listens, and without it has gone; close_notify or not."""
    has_ended = tmp_path / "has-ended"
    filter_command = f"cat; until test -e {has_ended}; do sleep 0.02; done"
    settings = {**both_sides(certificates), "FilterCommand": filter_command}
    daemon = proxsmtpd({**settings, "OutTls": "off"})
    for rest, count in ((b"QUIT\r\n", 1), (b"", 1)):
        client = daemon.connect()
        encrypted(client)
        client.envelope()
        client.expect(b"DATA", b"354")
        client.send(MESSAGE + b".\r\n" + rest)
        if is_announced:
            sock = client.sock
            assert isinstance(sock, ssl.SSLSocket)
            sock.setblocking(False)
            with pytest.raises(ssl.SSLWantReadError):  # until the daemon's own
                sock.unwrap()
        else:
            client.half_close()
        has_ended.touch()
        daemon.wait_log("CLIENT connection closed")
        has_ended.unlink()
        daemon.forget_log()
        client.close()
        assert len(server.messages) == count


def test_passphrase_is_not_asked_for(
    certificates: Certificates, tmp_path: Path
) -> None:
    """OpenSSL would ask at the terminal, whatever standard input is."""
    config = tmp_path / "proxsmtpd.conf"
    key = certificates.directory / "locked.key"
    config.write_text(
        f"OutAddress: 25\nListenTls: may\nListenKey: {key}\n"
        f"ListenCertificate: {certificates.directory}/good.pem\n"
    )
    result = run("-t", "-f", config, start_new_session=True)
    text = f"no key in PEM form, or one with a passphrase: {key}"
    assert result.stderr == f"proxsmtpd: {text}\n"
    assert result.returncode == 2


# ListenCertificate, ListenKey, and the complaint; NAMEs are in the directory.
BAD_KEYS = {
    "no file": ("none", "", "couldn't read certificate: {0}/none: No such file"),
    "no certificate": ("good.key", "", "no certificate in PEM form: {0}/good.key"),
    "no key in it": ("good.pem", "", "no key in PEM form, or one with a passphrase"),
    "no key": ("good.pem", "none", "couldn't read key: {0}/none: No such file"),
    "another key": (
        "good.pem",
        "renewed.key",
        "certificate and key do not belong together: {0}/renewed.key",
    ),
    "a directory": (".", "", "couldn't read certificate: {0}: Is a directory"),
}


@pytest.mark.parametrize(
    ("certificate", "key", "complaint"), BAD_KEYS.values(), ids=BAD_KEYS.keys()
)
def test_bad_key(
    certificate: str,
    key: str,
    complaint: str,
    certificates: Certificates,
    tmp_path: Path,
) -> None:
    place = certificates.directory
    config = tmp_path / "proxsmtpd.conf"
    lines = (
        f"OutAddress: 25\nListenTls: may\nListenCertificate: {place}/{certificate}\n"
    )
    config.write_text(lines + (f"ListenKey: {place}/{key}\n" if key else ""))
    result = run("-t", "-f", config)
    assert result.returncode == 2
    assert complaint.format(place) in result.stderr


def test_octets_after_a_proxy_header_belong_to_the_handshake(
    certificates: Certificates, proxsmtpd: StartDaemon, server: ScriptedServer
) -> None:
    settings = listen_tls("implicit", certificates.path("good"), ProxyProtocol="on")
    daemon = proxsmtpd(settings)
    client = daemon.connect()
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = client_context().wrap_bio(incoming, outgoing, server_hostname=HOST)
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    client.send(b"PROXY TCP4 192.0.2.7 192.0.2.1 5 25\r\n" + outgoing.read())
    while True:
        incoming.write(client.sock.recv(65536))
        try:
            tls.do_handshake()
        except ssl.SSLWantReadError:
            continue
        break
    client.send(outgoing.read())
    daemon.wait_log("accepted connection from: 192.0.2.7")
    daemon.wait_log("CLIENT encrypted: ")
    server.wait_connection()


def test_nothing_in_clear_while_a_proxy_header_is_due(
    certificates: Certificates, proxsmtpd: StartDaemon
) -> None:
    settings = listen_tls("implicit", certificates.path("good"), ProxyProtocol="on")
    daemon = proxsmtpd(settings)
    client = daemon.connect()
    client.send(b"PROXY ")
    assert poll(lambda: has_session(daemon))
    daemon.process.send_signal(signal.SIGTERM)
    assert client.eof()
    assert daemon.wait() == 0


def has_session(daemon: Daemon) -> bool:
    return len(os.listdir(f"/proc/{daemon.process.pid}/task")) > 1


def test_reset_in_the_handshake(
    certificates: Certificates, proxsmtpd: StartDaemon
) -> None:
    """It may be seen while we read, or while we write."""
    daemon = proxsmtpd(listen_tls("implicit", certificates.path("good")))
    tls = client_context().wrap_bio(ssl.MemoryBIO(), begun := ssl.MemoryBIO())
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    octets = begun.read()
    for _ in range(20):
        client = daemon.connect()
        client.send(octets)
        reset(client.sock)
        daemon.wait_log("CLIENT: couldn't start TLS: (Connection reset|Broken pipe)")
        daemon.wait_log("CLIENT connection closed")
        assert "session failed" not in daemon.log()
        daemon.forget_log()


def test_last_reply_is_read_though_more_is_on_its_way(
    certificates: Certificates, proxsmtpd: StartDaemon
) -> None:
    """Octets that come after it must not reset the connection, whole record or not."""
    client = proxsmtpd(listen_tls("may", certificates.path("good"))).connect()
    encrypted(client)
    sock = client.sock
    client.send(b"BDAT 100\r\n")
    socket.socket.send(sock, b"\x17\x03\x03\x40\x00" + bytes(100))
    assert client.reply().startswith(b"502 ")
    assert sock.recv(1) == b""

    def is_broken() -> bool:
        try:
            socket.socket.send(sock, b"x")
        except OSError:
            return True
        return False

    assert not poll(is_broken, 0.3)  # it lingers for two seconds


def test_trailing_dot_is_not_in_the_certificate(
    certificates: Certificates, make_server: MakeServer, proxsmtpd: StartDaemon
) -> None:
    context = server_context(certificates.path("good"))
    server = make_server(offering(starttls(context)))
    settings = out_tls("verify", certificates, OutTlsName=f"{HOST}.")
    daemon = proxsmtpd(settings, server=server)
    assert deliver(daemon) == QUEUED


def test_address_is_matched_with_the_addresses_of_the_certificate(
    certificates: Certificates, make_server: MakeServer, proxsmtpd: StartDaemon
) -> None:
    """Without OutTlsName it is the host in OutAddress: 127.0.0.1 here."""
    context = server_context(certificates.path("good"))
    server = make_server(offering(starttls(context)))
    settings = {"OutTls": "verify", "OutTlsTrust": certificates.ca}
    assert deliver(proxsmtpd(settings, server=server)) == QUEUED
    settings["OutTlsName"] = "127.0.0.2"
    daemon = proxsmtpd(settings, server=server)
    assert daemon.connect().reply() == CANNOT
    daemon.wait_log("IP address mismatch, certificate is not valid for '127.0.0.2'\\.$")


@pytest.mark.parametrize("name", ["self-signed", "good"])
def test_pinned_certificate(
    name: str,
    certificates: Certificates,
    make_server: MakeServer,
    proxsmtpd: StartDaemon,
) -> None:
    """The server's own certificate is enough, and no other is accepted then."""
    context = server_context(certificates.path(name))
    server = make_server(offering(starttls(context)))
    pinned = certificates.directory / f"{name}.pem"
    settings = out_tls("verify", certificates, OutTlsTrust=pinned)
    assert deliver(proxsmtpd(settings, server=server)) == QUEUED
    settings = {**settings, "OutTlsTrust": certificates.directory / "renewed.pem"}
    assert proxsmtpd(settings, server=server).connect().reply() == CANNOT


def test_trickled_empty_records_do_not_hold_a_slot(
    certificates: Certificates, make_server: MakeServer, proxsmtpd: StartDaemon
) -> None:
    """A client that sends parts of records sees the server's end all the same."""
    server = make_server()
    daemon = proxsmtpd(listen_tls("may", certificates.path("good")), server=server)
    client = daemon.connect()
    encrypted(client)
    # The beginning of a record, past OpenSSL.
    socket.socket.send(client.sock, b"\x17\x03\x03\x40")
    server.connections[0].send(b"421 Bye\r\n")
    assert client.reply() == b"421 Bye\r\n"


def test_trickled_record_is_bounded_by_time_out(
    certificates: Certificates, proxsmtpd: StartDaemon
) -> None:
    """Octets that are no whole record are no command, and do not count as one."""
    daemon = proxsmtpd({**listen_tls("may", certificates.path("good")), "TimeOut": 1})
    client = daemon.connect()
    encrypted(client)
    begun = time.monotonic()
    socket.socket.send(client.sock, b"\x17\x03\x03\x40")
    while not select.select([client.sock], [], [], 0.3)[0]:
        socket.socket.send(client.sock, b"\x00")
        assert time.monotonic() - begun < PEER_PATIENCE
    assert client.reply() == b"421 Timed out waiting for client\r\n"


BAD_RECORD = b"\x17\x03\x03\x00\x15" + bytes(21)


def test_bad_record_of_an_idle_server(
    certificates: Certificates, make_server: MakeServer, proxsmtpd: StartDaemon
) -> None:
    """It ends the session at once, and the log has the reason."""
    context = server_context(certificates.path("good"))
    script = {"EHLO": hello(b"STARTTLS"), "STARTTLS": starttls(context)}
    server = make_server(script)
    daemon = proxsmtpd({"OutTls": "require"}, server=server)
    client = daemon.connect()
    client.start()
    socket.socket.send(server.connections[0].sock, BAD_RECORD)
    assert client.reply() == b"421 Connection to server lost\r\n"
    daemon.wait_log(r"SERVER: couldn't read data from socket: .*bad record mac")


def test_bad_record_after_a_good_one(
    certificates: Certificates, proxsmtpd: StartDaemon, server: ScriptedServer
) -> None:
    """What came before it is relayed; then the log has the reason."""
    daemon = proxsmtpd(listen_tls("may", certificates.path("good")))
    client = daemon.connect()
    encrypted(client)
    client.send(b"NOOP\r\n")
    socket.socket.send(client.sock, BAD_RECORD)
    server.wait_line(b"NOOP")
    daemon.wait_log(r"CLIENT: couldn't (?:read|write) data .*bad record mac")


FAULTY = """\
import os, runpy, sys
def pread(descriptor, length, offset):
    raise ZeroDivisionError("a fault of ours")
os.pread = pread
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


@pytest.mark.parametrize("is_encrypted", [False, True], ids=["clear", "tls"])
def test_fault_of_ours_ends_the_connection(
    is_encrypted: bool, certificates: Certificates, proxsmtpd: StartDaemon
) -> None:
    """The client need not wait until the garbage is collected."""
    settings = {**listen_tls("may", certificates.path("good")), "FilterCommand": "cat"}
    command = [sys.executable, "-c", FAULTY, PROGRAM]
    daemon = proxsmtpd(settings, program=command)
    daemon.is_faulty = True
    client = daemon.connect()
    if is_encrypted:
        encrypted(client)
        client.envelope()
    else:
        client.start()
    client.expect(b"DATA", b"354")
    client.send(stuffed(long_message(2 * MEGABYTE)) + b".\r\n")
    if not is_encrypted:
        assert client.reply() == b"421 Local Error, try again later\r\n"
    assert client.at_end()
    daemon.wait_log(": [0-9A-F]{6}: session failed: ZeroDivisionError: a fault of ours")


# --- Many at once ---

IDLE = 500
# Measured: 71 to 101 by Python's version.
MOST_OF_EACH = 200 * 1024  # octets


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    """Allow this process, and the daemon, as many as the system does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def memory_of(daemon: Daemon) -> int:
    status = Path(f"/proc/{daemon.process.pid}/status").read_text()
    return int(re.findall(r"^VmRSS:\s*(\d+) kB$", status, re.M)[0]) * 1024


@pytest.mark.usefixtures("many_descriptors")
@pytest.mark.parametrize("tls", ["tls"], indirect=True)
def test_idle_connections(proxsmtpd: StartDaemon, server: ScriptedServer) -> None:
    """With TLS on both sides all are served, and take little memory."""
    daemon = proxsmtpd({"MaxConnections": IDLE + 1, "TimeOut": 120}, level=3)

    def more(count: int) -> list[RawClient]:
        clients = [daemon.connect(timeout=PEER_PATIENCE) for _ in range(count)]
        for client in clients:
            assert client.reply() == GREETING
            client.expect(EHLO, b"250")
        return clients

    idle = more(20)
    before = memory_of(daemon)
    idle += more(IDLE - 20)
    each = (memory_of(daemon) - before) / (IDLE - 20)
    print(f"{each / 1024:.1f} KiB each")
    assert each < MOST_OF_EACH
    assert deliver(daemon) == QUEUED
    for client in idle:
        client.send(b"NOOP\r\n")
    assert {client.reply() for client in idle} == {b"250 2.0.0 Ok\r\n"}
    assert len(server.connections) == IDLE + 1
    assert all(is_encrypted(connection) for connection in server.connections)
    daemon.process.send_signal(signal.SIGUSR1)
    daemon.wait_log(f"statistics: connections: {IDLE} now, .* {IDLE + 1} encrypted$")
    for client in idle:
        client.quit()
    assert poll(lambda: not has_session(daemon))


# --- What the filter, the header and the statistics show ---

SYSTEM_PYTHON = "/usr/bin/python3"
CIPHER = rb"TLSv1\.3 TLS_\w+"


def test_filter_and_header_know_the_protocol_and_the_cipher(
    certificates: Certificates,
    proxsmtpd: StartDaemon,
    server: ScriptedServer,
    filter_script: MakeFilter,
) -> None:
    tell = filter_script('printf "X-Filter: %s\\r\\n" "${TLS-unset}"; exec cat')
    settings = {
        **both_sides(certificates),
        "OutTls": "off",
        "FilterCommand": tell,
        "Header": "X-Header: (%t)",
    }
    daemon = proxsmtpd(settings, env=STALE_ENVIRONMENT)
    client = daemon.connect()
    encrypted(client)
    client.envelope()
    client.started = True
    assert client.message(MESSAGE) == QUEUED
    data = server.wait_message().data
    assert re.match(rb"X-Filter: %b\r\n" % CIPHER, data)
    assert re.search(rb"\r\nX-Header: \(%b\)\r\n" % CIPHER, data)
    assert deliver(daemon) == QUEUED
    data = server.wait_message(2).data
    assert data.startswith(b"X-Filter: unset\r\n")
    assert b"\r\nX-Header: ()\r\n" in data
    daemon.process.send_signal(signal.SIGUSR1)
    daemon.wait_log(r"statistics: connections: .* 0 refused as too many, 1 encrypted$")


def test_connection_too_many_gets_no_word_in_clear(
    certificates: Certificates, proxsmtpd: StartDaemon
) -> None:
    settings = listen_tls("implicit", certificates.path("good"), MaxConnections=1)
    daemon = proxsmtpd(settings)
    first = daemon.connect()
    start_tls(first, client_context())
    assert first.reply() == GREETING
    assert daemon.connect().eof()
    daemon.wait_log("too many connections open")


def test_xclient_goes_through_tls(
    certificates: Certificates, make_server: MakeServer, proxsmtpd: StartDaemon
) -> None:
    """Nothing but our own EHLO and STARTTLS is in clear."""
    context = server_context(certificates.path("good"))
    script = offering(starttls(context))
    script["EHLO"] = hello_by_tls([b"STARTTLS"], [b"XCLIENT ADDR"])
    server = make_server(script)
    daemon = proxsmtpd({"OutTls": "require", "XClient": "on"}, server=server)
    assert deliver(daemon) == QUEUED
    assert server.connections[0].lines[:5] == [
        b"EHLO smtp.passthru",
        b"STARTTLS",
        b"EHLO client.example",
        b"XCLIENT ADDR=127.0.0.1",
        b"EHLO client.example",
    ]


def test_envelope_before_starttls_is_forgotten(
    certificates: Certificates, proxsmtpd: StartDaemon, server: ScriptedServer
) -> None:
    daemon = proxsmtpd(listen_tls("may", certificates.path("good")))
    client = daemon.connect()
    client.start()
    client.expect(b"STARTTLS", b"220")
    start_tls(client, client_context())
    client.expect(EHLO, b"250")
    client.expect(b"DATA", b"503")
    assert server.messages == []


def test_refused_mail_and_its_data_in_one_go(
    certificates: Certificates, proxsmtpd: StartDaemon, server: ScriptedServer
) -> None:
    """With require, pipelined mail data must not be read as commands."""
    daemon = proxsmtpd(listen_tls("require", certificates.path("good")))
    client = daemon.connect()
    assert client.reply() == GREETING
    client.expect(EHLO, b"250")
    client.send(b"MAIL FROM:<a@x.example>\r\nDATA\r\nQUIT\r\n.\r\n")
    assert client.reply().startswith(b"530 5.7.0 ")
    assert client.reply().startswith(b"554 ")
    assert client.at_end()
    assert [line[:4] for line in server.connections[0].lines] == [b"EHLO"]


# --- Keys, privileges, reload ---


def test_ssl_is_loaded_only_when_tls_is_on(
    certificates: Certificates, proxsmtpd: StartDaemon
) -> None:
    for settings, is_loaded in (({}, False), (both_sides(certificates), True)):
        daemon = proxsmtpd(settings)
        maps = Path(f"/proc/{daemon.process.pid}/maps").read_text()
        assert ("libssl" in maps or "_ssl." in maps) == is_loaded


def reload(daemon: Daemon) -> None:
    daemon.forget_log()
    daemon.process.send_signal(signal.SIGHUP)
    daemon.wait_log("configuration (reloaded|has errors)")


def subject_of(daemon: Daemon, certificates: Certificates) -> str:
    """Return the subject of the certificate that a daemon shows."""
    client = daemon.connect()
    assert client.reply() == GREETING
    client.expect(EHLO, b"250")
    client.expect(b"STARTTLS", b"220")
    sock = start_tls(client, client_context(certificates.ca))
    shown = sock.getpeercert()
    assert shown is not None
    client.close()
    return str(dict(pair[0] for pair in shown["subject"])["commonName"])  # type: ignore[misc]


@pytest.mark.parametrize("processes", [1, 2])
def test_certificate_is_read_again_at_sighup(
    processes: int,
    certificates: Certificates,
    proxsmtpd: StartDaemon,
    tmp_path: Path,
) -> None:
    """New connections get the new one, and the old one if that cannot be read."""
    path = tmp_path / "current.pem"
    shutil.copy(certificates.path("good"), path)
    daemon = proxsmtpd(listen_tls("may", str(path), Processes=processes))
    session = daemon.connect()
    encrypted(session)
    assert subject_of(daemon, certificates) == "good"
    shutil.copy(certificates.path("renewed"), path)
    reload(daemon)
    assert poll(lambda: subject_of(daemon, certificates) == "renewed")
    shutil.copy(certificates.directory / "good.pem", path)
    reload(daemon)
    daemon.wait_log("; the certificate stays as it was$")
    daemon.wait_log("configuration reloaded$")
    assert poll(lambda: subject_of(daemon, certificates) == "renewed")
    assert session.command(b"NOOP").startswith(b"250")  # which began under the first


def test_sessions_resume_in_any_worker(
    certificates: Certificates, proxsmtpd: StartDaemon
) -> None:
    daemon = proxsmtpd(listen_tls("may", certificates.path("good"), Processes=3))
    context = client_context()
    session = None
    for number in range(8):
        client = daemon.connect()
        assert client.reply() == GREETING
        client.expect(EHLO, b"250")
        client.expect(b"STARTTLS", b"220")
        client.sock = sock = context.wrap_socket(
            client.sock, server_hostname=HOST, session=session
        )
        client.expect(EHLO, b"250")
        assert sock.session_reused == (number > 0)
        session = sock.session
        client.quit()


@pytest.fixture
def for_users(place: Path, server: ScriptedServer) -> Iterator[StartDaemon]:
    """Provide a factory of daemons whose files other users can read."""
    factory = DaemonFactory(place, server)
    yield factory
    factory.finish()


def owner_of_memory(daemon: Daemon) -> int:
    return os.stat(f"/proc/{daemon.process.pid}/mem").st_uid


@as_root
def test_key_is_read_as_root_and_stays_at_sighup(
    certificates: Certificates, for_users: StartDaemon, place: Path
) -> None:
    """The user need not be able to read it, then or later."""
    path = place / "root-only.pem"
    shutil.copy(certificates.path("good"), path)
    path.chmod(0o600)
    settings = listen_tls("may", str(path), User=some_user().pw_name, Processes=2)
    daemon = for_users({**settings, "TempDirectory": place / "temp"})
    assert subject_of(daemon, certificates) == "good"
    reload(daemon)
    denied = f"couldn't read certificate: {path}: Permission denied"
    daemon.wait_log(f"{denied}; the certificate stays as it was$")
    daemon.wait_log("configuration reloaded$")
    assert subject_of(daemon, certificates) == "good"


@as_root
@requires("python3", SYSTEM_PYTHON)
def test_memory_with_a_key_is_not_for_the_filter(
    certificates: Certificates, for_users: StartDaemon, place: Path
) -> None:
    """A filter is the same user, who may read the memory of a daemon without a key.

    The interpreter has to be the system's, and the program a copy, as another user may
    not reach ours.
    """
    program = shutil.copy(PROGRAM, place)
    user = some_user()
    path = place / "key.pem"
    shutil.copy(certificates.path("good"), path)
    path.chmod(0o644)
    owners = []
    for settings in ({}, listen_tls("may", str(path))):
        daemon = for_users(
            {**settings, "TempDirectory": place / "temp"},
            program=[SYSTEM_PYTHON, "-IS", program],
            user=user.pw_uid,
            group=user.pw_gid,
            extra_groups=[],
        )
        owners.append(owner_of_memory(daemon))
        daemon.process.send_signal(signal.SIGUSR1)
        daemon.wait_log(r"statistics: threads: \d+, descriptors: \d+$")
    assert owners == [user.pw_uid, 0]


# A filter that tells whether it may look into its daemon.
LOOKS = """\
cat "/proc/$PPID/maps" >/dev/null && seen=yes
printf 'X-Seen: %s\\r\\n' "${seen-no}"; exec cat
"""
# Before a command: root, too, has no more rights then than a user.
POWERLESS = ["setpriv", "--bounding-set=-all"] if os.geteuid() == 0 else []


@requires("util-linux", "/usr/bin/setpriv")
@pytest.mark.parametrize("processes", [1, 2])
def test_filter_of_the_same_user_cannot_read_the_key(
    processes: int,
    certificates: Certificates,
    proxsmtpd: StartDaemon,
    server: ScriptedServer,
    filter_script: MakeFilter,
) -> None:
    """Whether the key was there at the start, or came with SIGHUP."""
    settings = {"FilterCommand": f". {filter_script(LOOKS)}", "Processes": processes}
    with_key = listen_tls("may", certificates.path("good"))
    program = [*POWERLESS, *program_under_test()]

    def is_seen(daemon: Daemon) -> bool:
        assert deliver(daemon) == QUEUED
        data = server.messages[-1].data
        assert data.startswith((b"X-Seen: yes\r\n", b"X-Seen: no\r\n"))
        return data.startswith(b"X-Seen: yes")

    assert not is_seen(proxsmtpd({**settings, **with_key}, program=program))
    daemon = proxsmtpd(settings, program=program)
    assert is_seen(daemon)
    with daemon.config.open("a") as config:
        config.write(settings_text(with_key))
    reload(daemon)
    daemon.wait_log("configuration reloaded$")
    assert poll(lambda: not is_seen(daemon))


# --- What -t and the start find ---


def check(directory: Path, settings: Mapping[str, object]) -> str:
    """Return the warnings of -t."""
    config = directory / "proxsmtpd.conf"
    config.write_text("".join(f"{name}: {value}\n" for name, value in settings.items()))
    result = run("-t", "-f", config)
    assert (result.returncode, result.stdout) == (0, "configuration is OK\n")
    return str(result.stderr)


@pytest.mark.parametrize(
    ("name", "warning"),
    [
        ("good", ""),
        ("expired", r"certificate \S+ has expired"),
        ("expiring", r"certificate \S+ expires in [45] days"),
    ],
)
def test_end_of_a_certificate(
    name: str,
    warning: str,
    certificates: Certificates,
    proxsmtpd: StartDaemon,
    server: ScriptedServer,
    tmp_path: Path,
) -> None:
    settings = listen_tls("may", certificates.path(name), OutAddress=server.address)
    found = check(tmp_path, settings)
    assert re.fullmatch(f"(proxsmtpd: {warning}\n)?" if warning else "", found)
    assert bool(found) == bool(warning)
    daemon = proxsmtpd(settings, level=1)
    assert ("certificate" in daemon.log()) == bool(warning)


# OutTls, what stands at OutAddress, and the warning about it.
CHECKS = [
    ("off", "starttls", ""),
    ("off", "implicit", "speaks TLS at once; set OutTls: implicit"),
    ("may", "starttls", ""),
    ("may", "clear", "does not offer STARTTLS"),
    ("may", "closes", "cannot be encrypted to: connection closed by peer"),
    ("require", "refuses", "cannot be encrypted to: 454 4.7.0 TLS not available"),
    ("require", "implicit", "speaks TLS at once; set OutTls: implicit"),
    ("verify", "starttls", ""),
    ("verify", "expired", "cannot be encrypted to: certificate has expired"),
    ("implicit", "implicit", ""),
    ("implicit", "clear", "cannot be encrypted to: wrong version number"),
]


@pytest.mark.parametrize(("mode", "upstream", "warning"), CHECKS)
def test_check_tries_the_server(
    mode: str,
    upstream: str,
    warning: str,
    certificates: Certificates,
    make_server: MakeServer,
    tmp_path: Path,
) -> None:
    address = make_server(UPSTREAMS[upstream](certificates)).address
    found = check(tmp_path, out_tls(mode, certificates, OutAddress=address))
    name = f"proxsmtpd: OutAddress {address}"
    assert found == (f"{name} {warning}\n" if warning else "")


def test_check_looks_at_the_encrypted_list(
    certificates: Certificates, make_server: MakeServer, tmp_path: Path
) -> None:
    script = UPSTREAMS["starttls"](certificates)
    script["EHLO"] = hello_by_tls([b"STARTTLS"], [b"XCLIENT ADDR"])
    address = make_server(script).address
    settings = out_tls("require", certificates, OutAddress=address, XClient="on")
    assert check(tmp_path, settings) == ""


def test_check_warns_of_trust_without_use(
    certificates: Certificates, server: ScriptedServer, tmp_path: Path
) -> None:
    settings = {"OutAddress": server.address, "OutTlsTrust": certificates.ca}
    text = "OutTlsTrust has no use unless OutTls is verify or implicit"
    assert check(tmp_path, settings) == f"proxsmtpd: {text}\n"


# --- TLS in a PROXY header ---

V2 = b"\r\n\r\n\0\r\nQUIT\n\x21\x11"
ENDS = bytes([192, 0, 2, 7, 192, 0, 2, 1]) + struct.pack("!HH", 4711, 465)


def field(kind: int, value: bytes) -> bytes:
    return struct.pack("!BH", kind, len(value)) + value


def tls_field(*fields: bytes, flags: int = 1) -> bytes:
    return field(0x20, struct.pack("!BI", flags, 0) + b"".join(fields))


VERSION, CIPHER_NAME = field(0x21, b"TLSv1.3"), field(0x23, b"TLS_AES_256_GCM_SHA384")
PROXY_FIELDS = {
    "both": (tls_field(VERSION, CIPHER_NAME), "TLSv1.3 TLS_AES_256_GCM_SHA384"),
    "cipher first": (
        tls_field(CIPHER_NAME, field(0x22, b"cn"), VERSION),
        "TLSv1.3 TLS_AES_256_GCM_SHA384",
    ),
    "version alone": (tls_field(VERSION), "TLSv1.3"),
    "nothing": (tls_field(), ""),
    "not used": (tls_field(VERSION, flags=0), ""),
    "empty": (field(0x20, b""), ""),
    "cut": (field(0x20, b"\1\0"), ""),
    "control characters": (tls_field(field(0x21, b"x\r\nEvil: y")), ""),
    "no field": (b"", ""),
    "after another": (field(4, b"xx") + tls_field(VERSION), "TLSv1.3"),
}


@pytest.mark.parametrize(
    ("fields", "tls"), PROXY_FIELDS.values(), ids=PROXY_FIELDS.keys()
)
def test_tls_of_a_proxy_header(fields: bytes, tls: str) -> None:
    rest = ENDS + fields
    header = program.ProxyHeader.parse(V2 + struct.pack("!H", len(rest)) + rest)
    assert header is not None
    assert header.tls == tls


def test_broken_tls_field_of_a_proxy_header() -> None:
    rest = ENDS + tls_field(VERSION[:-1])
    with pytest.raises(program.BadProxyHeader):
        program.ProxyHeader.parse(V2 + struct.pack("!H", len(rest)) + rest)


def test_expiry_where_the_system_allows_tls_1_2_only(
    certificates: Certificates,
) -> None:
    """That handshake takes a step more."""
    path = certificates.path("good")
    context = server_context(path)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    left = program.expiry_of(context, os.fsencode(path)) - time.time()
    assert left > 14 * 86400
