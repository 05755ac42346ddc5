"""The path of MAIL and RCPT: filter and log get what the server takes.

    client -> proxsmtpd -> Exim, OpenSMTPD, Postfix or the scripted server

A server gets each spelling of an address directly and through proxsmtpd.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Callable, NamedTuple

import pytest

from helpers import MakeFilter, StartDaemon, port_of, requires, reserve_port
from mtas import EXIM, OPENSMTPD, Kind, Peer
from postfix import POSTFIX, TELL, Mail, PrivatePostfix, smtpd
from smtp import RawClient, ScriptedServer

BAD_ADDRESS = b"501 Syntax error in address or parameters\r\n"

# Spellings of the address U@D that some server takes for it.
SPELLINGS = [
    *(b"<U@D>", b" <U@D>", b"\t<U@D>", b"<<U@D>>", b"U@D", b"  U@D", b"< U@D >"),
    *(b"<U @ D>", b"U @ D", b"<Name <U@D>>", b"Name<U@D>", b"First Last <U@D>"),
    *(b'"x@good.example" <U@D>', b'"<x@good.example>"<U@D>', b"=?utf-8?q?x?= <U@D>"),
    *(b"<U@D(x)>", b"<U(x)@D>", b"<(<x@good.example>)U@D>", b"(x@good.example) <U@D>"),
    *(b"<U@D>(x)", b"<U@D> (x)", b"U@D (x)", b"<U@D((>)x)>", b"<U@D.>"),
    *(b"<@x.example:U@D>", b"@x.example:U@D"),
    *(b"<U@D> BODY=7BIT", b"U@D BODY=7BIT", b"<U@D> (x) BODY=7BIT"),
]
# What must not get to a server, which might take it for another address.
AMBIGUOUS = [
    *(b"x@good.example <U@D>", b"x@good.example<U@D>", b"<U@D> <x@good.example>"),
    *(b"<x@good.example> <U@D>", b"<x@good.example><U@D>", b"<x@good.example,U@D>"),
    *(b"<x:U@D>", b"<x:U@D;>", b"<@x.example:@y.example:U@D>", b'<"U@D">', b"<D!U>"),
    *(b"<U@D", b"<U@D(x>", b"<U%D>", b"<@x.example:<U@D>>", b":<U@D>", b"<U@D>x"),
]


def spelled(spelling: bytes, address: bytes) -> bytes:
    """Give a spelling with this address in the place of U@D."""
    user, _, domain = address.partition(b"@")
    return spelling.replace(b"U", user).replace(b"D", domain, 1)


class Server(NamedTuple):
    """A real server, and how to get the messages that it has delivered."""

    address: str
    wait_mails: Callable[[int], list[Mail]]


@contextmanager
def running_postfix() -> Iterator[Server]:
    """Run a Postfix that delivers all mail."""
    with reserve_port() as reserved:
        port = port_of(reserved)
        with PrivatePostfix([smtpd(port)], {"smtpd_error_sleep_time": "0"}) as postfix:
            yield Server(f"127.0.0.1:{port}", postfix.wait_mails)


@contextmanager
def running_peer(kind: Kind) -> Iterator[Server]:
    """Run Exim or OpenSMTPD."""
    with Peer(kind) as peer:
        yield Server(peer.address, peer.wait_mails)


@pytest.fixture(
    params=[
        pytest.param(EXIM, marks=requires(EXIM.package, EXIM.program), id="exim"),
        pytest.param(
            OPENSMTPD, marks=requires(OPENSMTPD.package, OPENSMTPD.program), id="smtpd"
        ),
        pytest.param(None, marks=requires("postfix", POSTFIX), id="postfix"),
    ]
)
def real(request: pytest.FixtureRequest) -> Iterator[Server]:
    """Give a running real server."""
    with running_peer(request.param) if request.param else running_postfix() as server:
        yield server


def send_all(address: str, way: str) -> list[str]:
    """Send a message with each spelling of sender and recipient.

    Returns the names, which are in a header field, of those that were accepted.
    """
    names = []
    for number, spelling in enumerate(SPELLINGS):
        with RawClient(address) as client:
            client.reply()
            client.expect(b"EHLO client.example", b"250")
            sender = spelled(spelling, b"sender@example.com")
            recipient = spelled(
                spelling.replace(b" BODY=7BIT", b""), b"recipient@example.net"
            )
            if not client.command(b"MAIL FROM:" + sender).startswith(b"250"):
                continue
            if not client.command(b"RCPT TO:" + recipient).startswith(b"250"):
                continue
            names.append(f"{way} {number}")
            client.started = True
            data = f"X-Name: {names[-1]}\r\n\r\nhello\r\n".encode()
            assert client.message(data).startswith(b"250")
    return names


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start servers")
def test_envelope_is_what_the_filter_is_told(
    real: Server, proxsmtpd: StartDaemon, filter_script: MakeFilter
) -> None:
    """Every spelling arrives through us, and as what the server alone takes it for."""
    settings = {"OutAddress": real.address, "FilterCommand": filter_script(TELL)}
    daemon = proxsmtpd(settings)
    direct = send_all(real.address, "direct")
    through = send_all(daemon.address, "through")
    assert through == [f"through {number}" for number in range(len(SPELLINGS))]
    mails = {m.header("X-Name"): m for m in real.wait_mails(len(direct + through))}
    for name in direct + through:
        mail = mails[name]
        expected = ("<sender@example.com>", "recipient@example.net")
        assert (name, mail.sender, mail.recipient) == (name, *expected)
        if name in through:
            told = mail.header("X-Filter-Sender"), mail.header("X-Filter-Recipients")
            assert (name, *told) == (name, "sender@example.com", expected[1])
    assert direct, "the server itself takes none of them"


# Drops all mail of and to one address, as proxsmtpd(8)'s own example does.
DROP = """
printf '%s\\n%s\\n' "$SENDER" "$RECIPIENTS" | grep -q -x -F bad@evil.example || exec cat
echo '554 Bad' >&2
exit 1
"""


def test_no_spelling_evades_the_filter(
    proxsmtpd: StartDaemon, server: ScriptedServer, filter_script: MakeFilter
) -> None:
    """What a server takes for the address, the filter does too, or it is refused."""
    client = proxsmtpd({"FilterCommand": filter_script(DROP)}).connect()
    client.reply()
    client.expect(b"EHLO client.example", b"250")
    client.started = True
    for spelling in SPELLINGS:
        path = spelled(spelling, b"bad@evil.example")
        client.envelope(path, [b"<b@example.com>"])
        assert client.message(b"hello\r\n") == b"554 Bad\r\n", path
        client.envelope(b"<a@example.com>", [path.replace(b" BODY=7BIT", b"")])
        assert client.message(b"hello\r\n") == b"554 Bad\r\n", path
    for spelling in AMBIGUOUS:
        path = spelled(spelling, b"bad@evil.example")
        assert client.command(b"MAIL FROM:" + path) == BAD_ADDRESS
        client.expect(b"MAIL FROM:<a@example.com>", b"250")
        assert client.command(b"RCPT TO:" + path) == BAD_ADDRESS
        client.expect(b"RSET", b"250")
    client.quit()
    assert server.messages == []
    told = [line for line in server.connections[0].lines if b"evil" in line]
    assert len(told) == 2 * len(SPELLINGS)
    for line in told:
        assert re.match(rb"(MAIL FROM|RCPT TO):[ \t]*<bad@evil\.example>", line)
