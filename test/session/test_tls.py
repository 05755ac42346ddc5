"""TLS with scripted peers: the matrices of modes and peers, and the pitfalls."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Callable, NamedTuple

import pytest

from helpers import (
    GREETING,
    MESSAGE,
    QUEUED,
    MakeServer,
    Settings,
    StartDaemon,
)
from smtp import Close, Recorded, Stall
from tls import (
    HOST,
    READY,
    Certificates,
    encrypted_greeting,
    hello_by_tls,
    is_encrypted,
    old_version,
    server_context,
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
INJECTED = fails("more came behind the reply to STARTTLS")
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


def out_tls(mode: str, certificates: Certificates, **settings: object) -> Settings:
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
    make_server: MakeServer,
    proxsmtpd: StartDaemon,
) -> None:
    """A session is encrypted, or in clear, or the client gets a 421 for a greeting."""
    outcome = OUTCOMES[mode][upstream]
    server = make_server(UPSTREAMS[upstream](certificates))
    is_slow = outcome is SLOW or STALLED in outcome.log
    settings = out_tls(mode, certificates, TimeOut=2 if is_slow else 20)
    daemon = proxsmtpd(settings, server=server, level=3)
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
