"""XClient against a real Postfix, as the server that gets the client's attributes.

    client -> proxsmtpd (XClient: on) -> smtpd -> queue -> maildir

There are several smtpds in one private Postfix, which differ in what they think of
proxsmtpd and of its clients.
"""

from __future__ import annotations

import re
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import pytest

from helpers import (
    MESSAGE,
    Daemon,
    StartDaemon,
    one_process,
    port_of,
    requires,
    reserve_port,
)
from postfix import POSTFIX, RECIPIENT, SENDER, PrivatePostfix, require_root, smtpd
from smtp import RawClient

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

pytestmark = [requires("postfix", POSTFIX), one_process("postfix_xclient")]

TRUST = {
    "smtpd_authorized_xclient_hosts": "127.0.0.0/8",
    # So that mail only goes on when HELO was sent again after XCLIENT.
    "smtpd_helo_required": "yes",
}
# What an access table says of clients, which is how their refusal begins and ends.
UNWANTED = {
    "127.0.0.66": ("554 5.7.1", "No spam"),
    "127.0.0.67": ("450 4.7.1", "Not now"),
    "127.0.0.68": ("550 5.7.1", "Not ever"),
    "127.0.0.69": ("421 4.7.1", "Not here"),
    "127.0.0.70": ("521 5.7.1", "Go away"),
    "::1": ("554 5.7.1", "No spam"),
}
TABLE = ", ".join(f"{{{ip} {code} {text}}}" for ip, (code, text) in UNWANTED.items())
STRICT = {**TRUST, "smtpd_client_restrictions": f"check_client_access cidr:{{{TABLE}}}"}
SMTPDS: Mapping[str, Mapping[str, str]] = {
    "trusting": TRUST,
    "distrusting": {"smtpd_helo_required": "yes"},
    "without IPv6": {**TRUST, "inet_protocols": "ipv4"},
    "strict": STRICT,
    "strict at once": {**STRICT, "smtpd_delay_reject": "no"},
    "with names": {**TRUST, "smtpd_peername_lookup": "yes"},
}

HELLO = b"EHLO far.example"
MAIL = f"MAIL FROM:<{SENDER}>".encode()
RCPT = f"RCPT TO:<{RECIPIENT}>".encode()
DID_NOT_ACCEPT = "server didn't (accept|offer) XCLIENT$"


@dataclass(frozen=True)
class Servers:
    """The private Postfix and the ports of its smtpds."""

    postfix: PrivatePostfix
    ports: Mapping[str, int]

    def settings(self, name: str, listen: str = "") -> Mapping[str, object]:
        """Give a proxsmtpd in front of one of them."""
        settings = {
            "OutAddress": f"127.0.0.1:{self.ports[name]}",
            "FilterCommand": "cat",
            "XClient": "on",
        }
        return {"Listen": listen, **settings} if listen else settings


@pytest.fixture(scope="module")
def postfix_servers() -> Iterator[Servers]:
    """Provide one Postfix for all tests here, since it takes long to start."""
    require_root()
    with ExitStack() as stack:
        ports = {name: port_of(stack.enter_context(reserve_port())) for name in SMTPDS}
        services = [smtpd(port, SMTPDS[name]) for name, port in ports.items()]
        main = {"inet_protocols": "all", "notify_classes": ""}
        yield Servers(stack.enter_context(PrivatePostfix(services, main)), ports)


@pytest.fixture
def servers(postfix_servers: Servers) -> Iterator[Servers]:
    """Give the servers; whatever a test leaves in them is thrown away."""
    yield postfix_servers
    postfix_servers.postfix.clear()


@pytest.fixture
def listen_on_ipv6() -> Iterator[str]:
    """Give a setting of Listen for IPv6."""
    try:
        holder = reserve_port("::1")
    except OSError:
        pytest.skip("this machine has no IPv6")
    with holder:
        yield f"[::1]:{port_of(holder)}"


def connect(daemon: Daemon, source: str = "") -> RawClient:
    """Connect from that address; the greeting has been read."""
    client = daemon.connect(source=(source, 0) if source else None)
    assert client.reply() == b"220 smtp.passthru ESMTP\r\n"
    return client


def refusal_of(address: str) -> str:
    """Give the reply that a client of this address gets."""
    code, text = UNWANTED[address]
    return f"{code} <unknown[{address}]>: Client host rejected: {text}"


def send(client: RawClient, data: bytes = MESSAGE) -> None:
    """Send a message in a session that has begun; it must be accepted."""
    for line, code in ((MAIL, b"250"), (RCPT, b"250"), (b"DATA", b"354")):
        client.expect(line, code)
    client.expect(data + b".", b"250 2.0.0 Ok: queued as ")


# --- Attributes ---


class Attributes(NamedTuple):
    """A client's attributes, and the ones that Postfix then has."""

    hello: bytes
    source: str
    received: str


ATTRIBUTES = {
    "EHLO": Attributes(
        b"EHLO far.example",
        "127.0.0.2",
        "from far.example (unknown [127.0.0.2]) by mail.example (Postfix) with ESMTP ",
    ),
    "HELO": Attributes(
        b"HELO far.example",
        "127.0.0.3",
        "from far.example (unknown [127.0.0.3]) by mail.example (Postfix) with SMTP ",
    ),
    "octets that xtext encodes": Attributes(
        b"EHLO a+b=c",
        "127.0.0.4",
        "from a+b=c (unknown [127.0.0.4]) by mail.example (Postfix) with ESMTP ",
    ),
    "address literal": Attributes(
        b"EHLO [127.0.0.5]",
        "127.0.0.5",
        "from [127.0.0.5] (unknown [127.0.0.5]) by mail.example (Postfix) with ESMTP ",
    ),
}


@pytest.mark.parametrize("case", ATTRIBUTES.values(), ids=ATTRIBUTES)
def test_server_gets_the_clients_attributes(
    servers: Servers, proxsmtpd: StartDaemon, case: Attributes
) -> None:
    daemon = proxsmtpd(servers.settings("trusting"), level=1)
    client = connect(daemon, case.source)
    client.expect(case.hello, b"250")
    send(client)
    client.quit()
    servers.postfix.wait_log(
        rf"disconnect from unknown\[{re.escape(case.source)}\] (ehlo|helo)=2 "
        r"xclient=0/1 mail=1 rcpt=1 data=1 quit=1"
    )
    (mail,) = servers.postfix.wait_mails(1)
    assert str(mail.header("Received")).startswith(case.received)
    assert "XCLIENT" not in daemon.log()


@pytest.mark.parametrize("mapped", [False, True], ids=["IPv6", "mapped IPv4"])
def test_addresses_of_a_listener_for_both_families(
    servers: Servers, proxsmtpd: StartDaemon, listen_on_ipv6: str, mapped: bool
) -> None:
    assert listen_on_ipv6  # there is IPv6
    with reserve_port("::") as holder:
        listen = f"[::]:{port_of(holder)}"
        daemon = proxsmtpd(servers.settings("trusting", listen))
    host, source = ("127.0.0.1", "127.0.0.2") if mapped else ("::1", "::1")
    with RawClient((host, daemon.port), source=(source, 0)) as client:
        client.reply()
        client.expect(HELLO, b"250")
        send(client)
        client.quit()
    (mail,) = servers.postfix.wait_mails(1)
    literal = source if mapped else f"IPv6:{source}"
    assert f"from far.example (unknown [{literal}]) " in str(mail.header("Received"))
    servers.postfix.wait_log(rf"client=unknown\[{re.escape(source)}\]")


def test_told_once(servers: Servers, proxsmtpd: StartDaemon) -> None:
    """It lasts for the connection: messages, RSET and another EHLO included."""
    daemon = proxsmtpd(servers.settings("trusting"))
    client = connect(daemon, "127.0.0.2")
    client.expect(HELLO, b"250")
    send(client)
    client.expect(b"RSET", b"250")
    client.expect(b"EHLO again.example", b"250")
    send(client)
    client.quit()
    servers.postfix.wait_log(
        r"disconnect from unknown\[127\.0\.0\.2\] ehlo=3 xclient=0/1 mail=2 rcpt=2 "
    )
    mails = servers.postfix.wait_mails(2)
    names = {str(m.header("Received")).partition(" by ")[0] for m in mails}
    assert names == {
        "from far.example (unknown [127.0.0.2])",
        "from again.example (unknown [127.0.0.2])",
    }


def test_parameters_of_mail(servers: Servers, proxsmtpd: StartDaemon) -> None:
    daemon = proxsmtpd(servers.settings("trusting"))
    client = connect(daemon, "127.0.0.2")
    offered = client.expect(HELLO, b"250")
    assert b"XCLIENT" not in offered
    limit = re.search(rb"SIZE (\d+)\r\n", offered)
    assert limit
    assert b"250-8BITMIME\r\n" in offered
    too_much = b" SIZE=%d" % (int(limit[1]) + 1)
    client.expect(MAIL + too_much, b"552 5.3.4 ")
    client.expect(MAIL + b" SIZE=many", b"501 5.5.4 ")
    client.expect(MAIL + b" BODY=9BIT", b"555 5.5.4 ")
    client.expect(MAIL + b" SIZE=1000 BODY=8BITMIME RET=HDRS ENVID=QQ314159", b"250")
    client.expect(RCPT, b"250")
    client.expect(b"DATA", b"354")
    body = bytes(range(0xA0, 0x100))
    client.expect(b"Subject: 8 bits\r\n\r\n" + body + b"\r\n.", b"250")
    client.quit()
    (mail,) = servers.postfix.wait_mails(1)
    assert mail.body == body + b"\n"


@pytest.mark.parametrize(
    "hello",
    [b"EHLO", b"HELO"],
    ids=bytes.decode,
)
def test_client_does_not_inherit_the_name_of_the_proxy(
    servers: Servers, proxsmtpd: StartDaemon, hello: bytes
) -> None:
    """Otherwise tables that allow localhost would allow everybody."""
    daemon = proxsmtpd(servers.settings("with names"))
    client = connect(daemon, "127.0.0.5")
    client.expect(hello + b" far.example", b"250")
    send(client)
    client.quit()
    servers.postfix.wait_log(r" connect from localhost\[127\.0\.0\.1\]")
    (mail,) = servers.postfix.wait_mails(1)
    assert "(unknown [127.0.0.5])" in str(mail.header("Received"))


# --- Servers that refuse XCLIENT ---


@pytest.mark.parametrize("hello", [b"EHLO", b"HELO"], ids=bytes.decode)
def test_server_that_does_not_authorise_us(
    servers: Servers, proxsmtpd: StartDaemon, hello: bytes
) -> None:
    """Mail goes on, as if it were the proxy's own, and the log warns of it."""
    daemon = proxsmtpd(servers.settings("distrusting"), level=1)
    client = connect(daemon, "127.0.0.2")
    client.expect(hello + b" far.example", b"250")
    send(client)
    client.quit()
    (mail,) = servers.postfix.wait_mails(1)
    assert "(unknown [127.0.0.1])" in str(mail.header("Received"))
    daemon.stop()
    assert re.search(DID_NOT_ACCEPT, daemon.log(), re.M)


def test_server_that_has_no_ipv6(
    servers: Servers, proxsmtpd: StartDaemon, listen_on_ipv6: str
) -> None:
    daemon = proxsmtpd(servers.settings("without IPv6", listen_on_ipv6))
    client = connect(daemon)
    client.expect(HELLO, b"250")
    send(client)
    client.quit()
    daemon.wait_log(r"SERVER < 501 5\.5\.4 Bad ADDR syntax: IPV6:::1$")
    daemon.wait_log(DID_NOT_ACCEPT)
    (mail,) = servers.postfix.wait_mails(1)
    assert "from far.example (unknown [127.0.0.1])" in str(mail.header("Received"))


# --- Clients that the server does not want ---


@pytest.mark.parametrize("source", ["127.0.0.66", "127.0.0.67"])
def test_restriction_at_the_recipient(
    servers: Servers, proxsmtpd: StartDaemon, source: str
) -> None:
    daemon = proxsmtpd(servers.settings("strict"))
    client = connect(daemon, source)
    client.expect(HELLO, b"250")
    client.expect(MAIL, b"250")
    refusal = refusal_of(source)
    assert client.command(RCPT) == refusal.encode() + b"\r\n"
    client.expect(b"DATA", b"503")
    client.quit()
    servers.postfix.wait_log(
        rf"reject: RCPT from unknown\[{source}\]: {re.escape(refusal)}; "
        rf"from=<{SENDER}> to=<{RECIPIENT}> proto=ESMTP helo=<far\.example>"
    )
    wanted = connect(daemon, "127.0.0.2")
    wanted.expect(b"EHLO far.example", b"250")
    send(wanted)
    wanted.quit()
    servers.postfix.wait_mails(1)


def test_restriction_of_an_ipv6_client(
    servers: Servers, proxsmtpd: StartDaemon, listen_on_ipv6: str
) -> None:
    daemon = proxsmtpd(servers.settings("strict", listen_on_ipv6))
    client = connect(daemon)
    client.expect(HELLO, b"250")
    client.expect(MAIL, b"250")
    assert client.command(RCPT) == refusal_of("::1").encode() + b"\r\n"
    client.quit()


@pytest.mark.parametrize(
    ("source", "first"),
    [
        ("127.0.0.66", HELLO),
        ("127.0.0.66", MAIL),
        ("127.0.0.67", HELLO),
        ("127.0.0.69", HELLO),
        ("127.0.0.70", HELLO),
    ],
)
def test_restriction_at_xclient(
    servers: Servers, proxsmtpd: StartDaemon, source: str, first: bytes
) -> None:
    """The answer to XCLIENT itself is the refusal with smtpd_delay_reject=no.

    But for 550, which SPEC has as a word about us (127.0.0.68): mail goes nowhere then.
    """
    daemon = proxsmtpd(servers.settings("strict at once"))
    client = connect(daemon, source)
    refusal = refusal_of(source)
    assert client.command(first) == refusal.encode() + b"\r\n"
    servers.postfix.wait_log(
        rf"reject: XCLIENT from unknown\[{source}\]: {re.escape(refusal)}; "
    )


@pytest.mark.parametrize("source", ["127.0.0.66", "127.0.0.67"])
def test_refusal_lasts(servers: Servers, proxsmtpd: StartDaemon, source: str) -> None:
    """A client that tries HELO when EHLO was refused must not take 4xx for 5xx.

    Postfix is such a client, and returns the mail to its sender then.
    """
    daemon = proxsmtpd(servers.settings("strict at once"))
    client = connect(daemon, source)
    kind = UNWANTED[source][0][:1].encode()
    client.expect(HELLO, kind)
    client.expect(b"HELO far.example", kind)
    client.expect(MAIL, kind)


# --- Pipelining, while XCLIENT makes the server start again ---


def codes(client: RawClient, count: int) -> list[bytes]:
    """Give the codes of the next replies."""
    return [client.reply()[:3] for _ in range(count)]


@pytest.mark.parametrize("hello", [b"EHLO", b"HELO"], ids=bytes.decode)
def test_pipelining(servers: Servers, proxsmtpd: StartDaemon, hello: bytes) -> None:
    """Each command gets its own reply, in order, from the greeting to QUIT."""
    daemon = proxsmtpd(servers.settings("trusting"))
    client = daemon.connect(source=("127.0.0.2", 0))
    hello_line = hello + b" far.example"
    commands = [hello_line, MAIL, b"RCPT TO:<>", RCPT, b"NOOP", b"DATA", b""]
    client.send(b"\r\n".join(commands))
    assert client.reply() == b"220 smtp.passthru ESMTP\r\n"
    assert client.reply().splitlines()[0][4:] == b"smtp.passthru"
    assert codes(client, 5) == [b"250", b"501", b"250", b"250", b"354"]
    commands = [MESSAGE + b".", MAIL, RCPT, b"RSET", b"VRFY root", b"QUIT", b""]
    client.send(b"\r\n".join(commands))
    assert client.reply().startswith(b"250 2.0.0 Ok: queued as ")
    assert codes(client, 5) == [b"250", b"250", b"250", b"252", b"221"]
    assert client.eof()
    (mail,) = servers.postfix.wait_mails(1)
    protocol = {b"EHLO": "ESMTP", b"HELO": "SMTP"}[hello]
    received = str(mail.header("Received"))
    assert received.startswith("from far.example (unknown [127.0.0.2]) by mail.example")
    assert f" with {protocol} id " in received


def test_pipelining_of_a_refused_client(
    servers: Servers, proxsmtpd: StartDaemon
) -> None:
    daemon = proxsmtpd(servers.settings("strict at once"))
    client = daemon.connect(source=("127.0.0.66", 0))
    client.send(b"\r\n".join([HELLO, MAIL, RCPT, b"NOOP", b"QUIT", b""]))
    assert client.reply() == b"220 smtp.passthru ESMTP\r\n"
    assert client.reply() == refusal_of("127.0.0.66").encode() + b"\r\n"
    for _ in (MAIL, RCPT, b"NOOP"):
        assert client.reply().startswith(b"5")
    assert client.reply().startswith(b"221 ")
    assert client.eof()
