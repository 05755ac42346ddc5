"""Real mail to real servers other than Postfix, and from real clients.

    client -> proxsmtpd -> Exim, OpenSMTPD or the scripted server

What a server says through proxsmtpd is compared with what it says to the same client
without it.
"""

from __future__ import annotations

import os
import re
import smtplib
import subprocess
import sys
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from email.message import EmailMessage
from email.policy import SMTPUTF8
from pathlib import Path
from typing import Callable

import pytest

from helpers import (
    Daemon,
    MakeFilter,
    MakeServer,
    StartDaemon,
    as_root,
    poll,
    requires,
    stuffed,
)
from mtas import EXIM, OPENSMTPD, PASSWORD, SIZE_LIMIT, USER, Kind, Peer
from smtp import RawClient, ScriptedServer

needs = {kind: requires(kind.package, kind.program) for kind in (EXIM, OPENSMTPD)}
only_exim = pytest.mark.parametrize(
    "peer", [pytest.param(EXIM, marks=needs[EXIM], id=str(EXIM))], indirect=True
)

SENDER = b"<sender@example.com>"
RECIPIENT = b"<recipient@example.net>"
OFFER = b"Subject: offer\r\n\r\ncheap watches\r\n"
HELLO = b"Subject: hello\r\n\r\nhello\r\n"

# Everything that can be lost or changed on the way through SMTP.
BODY = (
    b".\r\n..\r\n...dots\r\n\r\n.\r\n\r\n"
    + bytes(range(0x80, 0x100))
    + b"\r\n \r\nFrom here\r\nblanks \r\n"
    + b"long" * 200
    + b"\r\n\r\n"
)

FILTERED = pytest.mark.parametrize(
    "filtering", [{"FilterCommand": "cat"}, {}], ids=["filtered", "streamed"]
)


@pytest.fixture(
    params=[
        pytest.param(kind, marks=mark, id=str(kind)) for kind, mark in needs.items()
    ]
)
def peer(request: pytest.FixtureRequest) -> Iterator[Peer]:
    """Give a running server."""
    kind: Kind = request.param
    with Peer(kind) as running:
        yield running


def deliver(client: RawClient, data: bytes) -> bytes:
    """Send a message in a session that has begun; gives the reply to its end."""
    client.envelope(SENDER, [RECIPIENT])
    return client.message(stuffed(data))


def begin(address: str) -> RawClient:
    """Give a client that has said EHLO."""
    client = RawClient(address)
    assert client.reply().startswith(b"220")
    client.expect(b"EHLO client.example", b"250")
    return client


def bodies(peer: Peer, count: int) -> list[bytes]:
    """Give the bodies of `count` messages, with CRLF; no other was accepted."""
    mails = peer.wait_mails(count)
    assert peer.accepted() == count
    return sorted(mail.body.replace(b"\n", b"\r\n") for mail in mails)


# --- Servers ---


@as_root
@pytest.mark.parametrize(
    ("verdict", "reply", "arrived"),
    [
        pytest.param(
            'sed -i s/cheap/expensive/ "$EMAIL"',
            b"250 ",
            [b"expensive watches\r\n"],
            id="changes",
        ),
        pytest.param(
            "echo '554 5.7.1 No watches' >&2; exit 1",
            b"554 5.7.1 No watches\r\n",
            [],
            id="refuses",
        ),
        pytest.param(
            "echo '451 4.7.1 Not now' >&2; exit 1",
            b"451 4.7.1 Not now\r\n",
            [],
            id="defers",
        ),
        pytest.param(
            "echo '250 2.0.0 Gone' >&2; exit 1",
            b"250 2.0.0 Gone\r\n",
            [],
            id="drops",
        ),
    ],
)
def test_verdict(
    peer: Peer,
    proxsmtpd: StartDaemon,
    filter_script: MakeFilter,
    verdict: str,
    reply: bytes,
    arrived: Sequence[bytes],
) -> None:
    """What the filter decides of one message happens to it, and not to the next."""
    command = filter_script(f'grep -q cheap "$EMAIL" || exit 0\n{verdict}\n')
    daemon = proxsmtpd(
        {"OutAddress": peer.address, "FilterCommand": command, "FilterType": "file"}
    )
    with begin(daemon.address) as client:
        assert deliver(client, OFFER).startswith(reply)
        assert deliver(client, HELLO).startswith(b"250 ")
        client.quit()
    assert bodies(peer, len(arrived) + 1) == [*arrived, b"hello\r\n"]


@as_root
@FILTERED
def test_octets_arrive(
    peer: Peer, proxsmtpd: StartDaemon, filtering: Mapping[str, str]
) -> None:
    """A message of nearly the largest size arrives as it was sent."""
    daemon = proxsmtpd({"OutAddress": peer.address, **filtering})
    body = BODY * (SIZE_LIMIT * 9 // 10 // len(BODY))
    with begin(daemon.address) as client:
        assert deliver(client, b"Subject: octets\r\n\r\n" + body).startswith(b"250 ")
    assert bodies(peer, 1) == [body]


@as_root
@FILTERED
def test_message_too_large(
    peer: Peer, proxsmtpd: StartDaemon, filtering: Mapping[str, str]
) -> None:
    """The server's refusal at the end reaches the client, and the session goes on."""
    daemon = proxsmtpd({"OutAddress": peer.address, **filtering})
    large = b"Subject: large\r\n\r\n" + b"0123456789abcde\r\n" * (SIZE_LIMIT // 10)
    with begin(peer.address) as client:
        refusal = deliver(client, large)
    assert refusal[:3] in (b"552", b"554")
    with begin(daemon.address) as client:
        assert deliver(client, large) == refusal
        assert deliver(client, HELLO).startswith(b"250 ")
    assert bodies(peer, 1) == [b"hello\r\n"]
    daemon.wait_log(f"status={re.escape(refusal.decode().strip())}$")


@as_root
def test_some_recipients_are_refused(
    peer: Peer, proxsmtpd: StartDaemon, filter_script: MakeFilter
) -> None:
    """Of an envelope sent in one go, the accepted recipients get the message."""
    tell = """printf 'X-Recipients: %s\\r\\n' "$(echo $RECIPIENTS)"; exec cat"""
    daemon = proxsmtpd(
        {"OutAddress": peer.address, "FilterCommand": filter_script(tell)}
    )
    users = [f"{'refused' if n % 3 == 0 else 'user'}{n}" for n in range(20)]
    addresses = [f"{user}@example.net" for user in users]
    accepted = [address for address in addresses if address.startswith("user")]
    with begin(daemon.address) as client:
        lines = [
            b"MAIL FROM:" + SENDER,
            *(f"RCPT TO:<{address}>".encode() for address in addresses),
            b"DATA",
        ]
        client.send(b"".join(line + b"\r\n" for line in lines))
        codes = [client.reply()[:3] for _ in lines]
        client.send(HELLO + b".\r\nQUIT\r\n")
        assert [client.reply()[:3], client.reply()[:3]] == [b"250", b"221"]
    expected = [b"250" if address in accepted else b"550" for address in addresses]
    assert codes == [b"250", *expected, b"354"]
    mails = peer.wait_mails(len(accepted))
    assert sorted(str(mail.recipient) for mail in mails) == sorted(accepted)
    assert {mail.header("X-Recipients") for mail in mails} == {" ".join(accepted)}


@as_root
@FILTERED
def test_pipelined_transactions(
    peer: Peer, proxsmtpd: StartDaemon, filtering: Mapping[str, str]
) -> None:
    """Commands that come with the end of a message are those of the next one."""
    daemon = proxsmtpd({"OutAddress": peer.address, **filtering})
    messages = [b"Subject: %d\r\n\r\nmessage %d\r\n" % (n, n) for n in range(5)]
    envelope = b"MAIL FROM:%s\r\nRCPT TO:%s\r\nDATA\r\n" % (SENDER, RECIPIENT)
    with begin(daemon.address) as client:
        client.send(envelope)
        for message in messages:
            assert [client.reply()[:3] for _ in range(3)] == [b"250", b"250", b"354"]
            last = message is messages[-1]
            client.send(message + b".\r\n" + (b"QUIT\r\n" if last else envelope))
            assert client.reply().startswith(b"250")
        assert client.reply().startswith(b"221")
    assert bodies(peer, 5) == [b"message %d\r\n" % n for n in range(5)]


def extensions(address: str) -> set[bytes]:
    """Give the service extensions that are offered there."""
    with RawClient(address) as client:
        client.reply()
        lines = client.expect(b"EHLO client.example", b"250-").splitlines()
    return {line[4:] for line in lines[1:]}


@as_root
@pytest.mark.parametrize(
    ("peer", "removed", "passed"),
    [
        pytest.param(
            EXIM,
            {b"STARTTLS", b"CHUNKING", b"PRDR", b"PIPECONNECT"},
            {b"AUTH PLAIN LOGIN", b"SIZE %d" % SIZE_LIMIT, b"8BITMIME", b"SMTPUTF8"},
            marks=needs[EXIM],
            id=str(EXIM),
        ),
        pytest.param(
            OPENSMTPD,
            set(),
            {b"SIZE %d" % SIZE_LIMIT, b"8BITMIME", b"ENHANCEDSTATUSCODES", b"DSN"},
            marks=needs[OPENSMTPD],
            id=str(OPENSMTPD),
        ),
    ],
    indirect=["peer"],
)
def test_extensions(
    peer: Peer, proxsmtpd: StartDaemon, removed: set[bytes], passed: set[bytes]
) -> None:
    """What would get mail past the filter is not offered, all else is."""
    daemon = proxsmtpd({"OutAddress": peer.address, "FilterCommand": "cat"})
    direct, through = extensions(peer.address), extensions(daemon.address)
    assert removed | passed <= direct
    assert through == direct - removed | {b"PIPELINING"}


def encoded(*words: str) -> bytes:
    """Give an answer to AUTH of these words with NULs between them."""
    return b64encode("\0".join(words).encode())


DIALOGUES = {
    "address verified": ([b"VRFY recipient@example.net"], "250", "500"),
    "list expanded": ([b"EXPN everyone"], "550", "500"),
    "help": ([b"HELP"], "214", "214"),
    "no operation": ([b"NOOP", b"RSET"], "250 250", "250 250"),
    "unknown verb": ([b"FROBNICATE now"], "500", "500"),
    "too large": (
        [b"MAIL FROM:%s SIZE=%d" % (SENDER, SIZE_LIMIT + 1), b"MAIL FROM:" + SENDER],
        "552 250",
        "250 503",  # It ignores SIZE.
    ),
    "small enough": ([b"MAIL FROM:%s SIZE=1000" % SENDER], "250", "250"),
    "recipients": (
        [
            b"MAIL FROM:" + SENDER,
            b"RCPT TO:<refused@example.net>",
            b"RCPT TO:<elsewhere@example.org>",
            b"RCPT TO:<deferred@example.net>",
            b"RCPT TO:" + RECIPIENT,
        ],
        "250 550 550 451 250",
        "250 550 550 250 250",
    ),
    "no transaction": ([b"RCPT TO:" + RECIPIENT], "503", "503"),
    "second transaction": ([b"MAIL FROM:<>"] * 2, "250 503", "250 503"),
    "8-bit": ([b"MAIL FROM:%s BODY=8BITMIME" % SENDER], "250", "250"),
    "UTF-8": (["MAIL FROM:<jürgen@example.com> SMTPUTF8".encode()], "250", "553"),
    "unknown parameter": ([b"MAIL FROM:%s FOO=BAR" % SENDER], "501", "503"),
    "wrong password": ([b"AUTH PLAIN " + encoded("", USER, "no")], "535", "503"),
    "unknown mechanism": ([b"AUTH CRAM-MD5"], "504", "503"),
}


@as_root
def test_replies_pass(peer: Peer, proxsmtpd: StartDaemon) -> None:
    """The server's replies to all kinds of commands reach the client unchanged."""
    daemon = proxsmtpd({"OutAddress": peer.address, "FilterCommand": "cat"})
    for name, (lines, *codes) in DIALOGUES.items():
        with begin(peer.address) as client:
            direct = [client.command(line) for line in lines]
        with begin(daemon.address) as client:
            through = [client.command(line) for line in lines]
        assert (name, through) == (name, direct)
        expected = codes[[EXIM, OPENSMTPD].index(peer.kind)]
        said = b" ".join(reply[:3] for reply in through).decode()
        assert (name, said) == (name, expected)


@as_root
@only_exim
def test_international_mail(
    peer: Peer, proxsmtpd: StartDaemon, filter_script: MakeFilter
) -> None:
    """Addresses in UTF-8 reach the filter and the server, and so do parameters."""
    tell = """printf 'X-Sender: %s\\r\\n' "$SENDER"; exec cat"""
    daemon = proxsmtpd(
        {"OutAddress": peer.address, "FilterCommand": filter_script(tell)}
    )
    message = EmailMessage(SMTPUTF8)
    message["From"] = "Jürgen <jürgen@example.com>"
    message["To"] = "Müller <müller@example.net>"
    message["Subject"] = "Grüße"
    message.set_content("schöne Grüße\n", cte="8bit")
    with smtplib.SMTP("127.0.0.1", daemon.port, "client.example", 20) as client:
        assert client.send_message(message) == {}
    (mail,) = peer.wait_mails(1)
    assert "X-Sender: jürgen@example.com\n".encode() in mail.content
    assert "Delivered-To: müller@example.net\n".encode() in mail.content
    assert "Subject: Grüße\n".encode() in mail.content
    assert mail.body == "schöne Grüße\n".encode()
    assert re.search(r" <= jürgen@example\.com .* P=utf8esmtp .* M8S=8", peer.log())


# --- Authentication ---

WRONG_PASSWORD = PASSWORD[::-1]

EXCHANGES: Mapping[str, Callable[[str], list[bytes]]] = {
    "PLAIN": lambda password: [b"AUTH PLAIN", encoded("", USER, password)],
    "PLAIN at once": lambda password: [b"AUTH PLAIN " + encoded("", USER, password)],
    "LOGIN": lambda password: [b"AUTH LOGIN", encoded(USER), encoded(password)],
    "LOGIN at once": lambda password: [
        b"AUTH LOGIN " + encoded(USER),
        encoded(password),
    ],
}


def authenticate(client: RawClient, exchange: str, password: str) -> bytes:
    """Go through an exchange; gives the last reply."""
    *first, last = EXCHANGES[exchange](password)
    for line in first:
        client.expect(line, b"334")
    return client.command(last)


def assert_no_secrets(daemon: Daemon) -> None:
    """No name or password is in the log, where the exchange itself is."""
    log = daemon.log()
    assert "AUTH" in log
    for password in (PASSWORD, WRONG_PASSWORD):
        answers = [encoded(word) for word in (USER, password)]
        for secret in (*answers, encoded("", USER, password), password.encode()):
            assert secret.decode() not in log


@as_root
@only_exim
@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("skip", [True, False], ids=["skipped", "filtered"])
def test_authentication(
    peer: Peer, proxsmtpd: StartDaemon, exchange: str, skip: bool
) -> None:
    """The server decides on a password, and with Skip, whether the filter is asked."""
    daemon = proxsmtpd(
        {
            "OutAddress": peer.address,
            "FilterCommand": "echo 554 No watches >&2; exit 1",
            **({"Skip": "authenticated"} if skip else {}),
        }
    )
    with begin(daemon.address) as client:
        refusal = authenticate(client, exchange, WRONG_PASSWORD)
        assert refusal == b"535 Incorrect authentication data\r\n"
        assert deliver(client, OFFER) == b"554 No watches\r\n"
        success = authenticate(client, exchange, PASSWORD)
        assert success == b"235 Authentication succeeded\r\n"
        reply = deliver(client, HELLO)
        assert reply[:3] == (b"250" if skip else b"554")
        client.quit()
    assert bodies(peer, int(skip)) == [b"hello\r\n"] * skip
    if skip:
        assert f"P=esmtpa A={exchange.partition(' ')[0]}:{USER} " in peer.log()
        daemon.wait_log(r"status=SKIPPED$")
    assert_no_secrets(daemon)


# --- Clients ---

# What a client is given to send.  Its last line has no end, which all add: swaks would
# add another one, and Python puts a `>` before From, as mailboxes want it.
MESSAGE = (
    b"Date: Mon, 23 Nov 2026 12:00:00 +0000\r\n"
    b"From: sender@example.com\r\n"
    b"To: recipient@example.net\r\n"
    b"Message-ID: <1@client.example>\r\n"
    b"Subject: all sorts\r\n"
    b"\r\n" + BODY.replace(b"From here", b"> From here") + b"end"
)

# Its arguments are the port and, to authenticate, mechanism, user and password.
SMTPLIB = """
import email, smtplib, sys

port, *login = sys.argv[1:]
message = email.message_from_binary_file(sys.stdin.buffer)
with smtplib.SMTP("127.0.0.1", int(port), "client.example", 20) as client:
    if login:
        mechanism, client.user, client.password = login
        client.ehlo()
        client.auth(mechanism, getattr(client, "auth_" + mechanism.lower()))
    client.send_message(message)
"""


def swaks(port: int, mechanism: str, password: str) -> list[str]:
    """Give swaks's command line."""
    login = ["--auth", mechanism, "-au", USER, "-ap", password]
    return [
        *("swaks", "--server", "127.0.0.1", "--port", str(port)),
        *("--from", "sender@example.com", "--to", "recipient@example.net"),
        *("--ehlo", "client.example", "--data", "-"),
        *(login if mechanism else []),
    ]


def msmtp(port: int, mechanism: str, password: str) -> list[str]:
    """Give msmtp's command line."""
    login = [
        *(f"--auth={mechanism.lower()}", f"--user={USER}"),
        f"--passwordeval=echo '{password}'",
    ]
    return [
        *("msmtp", "--host=127.0.0.1", f"--port={port}", "--domain=client.example"),
        *("--from=sender@example.com", *(login if mechanism else [])),
        "recipient@example.net",
    ]


def curl(port: int, mechanism: str, password: str) -> list[str]:
    """Give curl's command line."""
    login = ["--user", f"{USER}:{password}", "--login-options", f"AUTH={mechanism}"]
    return [
        *("curl", "-q", "-v", f"smtp://127.0.0.1:{port}/client.example", "-T", "-"),
        *("--mail-from", "sender@example.com"),
        *("--mail-rcpt", "recipient@example.net"),
        *(login if mechanism else []),
    ]


def python(port: int, mechanism: str, password: str) -> list[str]:
    """Give the command line of a program that uses smtplib."""
    login = [mechanism, USER, password] if mechanism else []
    return [sys.executable, "-c", SMTPLIB, str(port), *login]


@dataclass(frozen=True)
class Client:
    """A program that sends what is on its standard input.

    `command` gives its command line for a port, a mechanism (or none) and a password.
    """

    path: str
    command: Callable[[int, str, str], list[str]]


CLIENTS = pytest.mark.parametrize(
    "client",
    [
        pytest.param(
            Client(path, command),
            marks=requires(command.__name__, path),
            id=command.__name__,
        )
        for path, command in (
            ("/usr/bin/swaks", swaks),
            ("/usr/bin/msmtp", msmtp),
            ("/usr/bin/curl", curl),
            (sys.executable, python),
        )
    ],
)


@dataclass(frozen=True)
class Result:
    """How a client ended, and all that it wrote."""

    status: int
    output: str


def send(
    client: Client, home: Path, daemon: Daemon, mechanism: str = "", password: str = ""
) -> Result:
    """Let a client send the message."""
    done = subprocess.run(
        client.command(daemon.port, mechanism, password),
        input=MESSAGE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={"PATH": os.environ["PATH"], "HOME": str(home)},
        timeout=60,
        check=False,
    )
    return Result(done.returncode, done.stdout.decode("utf-8", "replace"))


@CLIENTS
def test_client_sends(
    client: Client,
    tmp_path: Path,
    server: ScriptedServer,
    proxsmtpd: StartDaemon,
    filter_script: MakeFilter,
) -> None:
    """A client's message arrives whole, with what the filter has added."""
    add = filter_script(r"printf 'X-Filtered: yes\r\n'; exec cat")
    daemon = proxsmtpd({"FilterCommand": add})
    result = send(client, tmp_path, daemon)
    assert result.status == 0, result.output
    server.wait_line(b"QUIT")
    (message,) = server.messages
    assert message.sender == SENDER
    assert message.recipients == (RECIPIENT,)
    assert message.data == stuffed(b"X-Filtered: yes\r\n" + MESSAGE + b"\r\n")
    daemon.wait_log(
        "from=sender@example.com, to=recipient@example.net, status=FILTERED$"
    )


@CLIENTS
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        pytest.param(
            {"FilterCommand": "echo '554 5.7.1 No watches' >&2; exit 1"},
            "554 5.7.1 No watches",
            id="by the filter",
        ),
        pytest.param(
            {"FilterType": "reject", "FilterReject": "550 5.7.1 Nothing today"},
            "550 5.7.1 Nothing today",
            id="before the filter",
        ),
        pytest.param(
            {"FilterCommand": "cat"}, "552 5.2.2 Mailbox full", id="by the server"
        ),
    ],
)
def test_client_hears_refusal(
    client: Client,
    tmp_path: Path,
    make_server: MakeServer,
    proxsmtpd: StartDaemon,
    settings: Mapping[str, str],
    words: str,
) -> None:
    """A client fails, and says why in the words of who has refused the message."""
    server = make_server({"DOT": b"552 5.2.2 Mailbox full\r\n"})
    result = send(client, tmp_path, proxsmtpd(settings, server=server))
    assert result.status != 0, result.output
    code, _, text = words.partition(" ")
    assert code in result.output
    assert text in result.output
    assert server.messages == []


@as_root
@only_exim
@CLIENTS
@pytest.mark.parametrize("mechanism", ["PLAIN", "LOGIN"])
def test_client_authenticates(
    peer: Peer,
    client: Client,
    tmp_path: Path,
    proxsmtpd: StartDaemon,
    mechanism: str,
) -> None:
    """A client's password is checked by the server, and does not get into the log."""
    daemon = proxsmtpd({"OutAddress": peer.address, "FilterCommand": "cat"})
    result = send(client, tmp_path, daemon, mechanism, PASSWORD)
    assert result.status == 0, result.output
    assert bodies(peer, 1) == [MESSAGE.partition(b"\r\n\r\n")[2] + b"\r\n"]
    assert f"P=esmtpa A={mechanism}:{USER} " in peer.log()
    result = send(client, tmp_path, daemon, mechanism, WRONG_PASSWORD)
    assert result.status != 0, result.output
    assert peer.accepted() == 1
    # Exim logs this after its reply.
    assert poll(lambda: f"{mechanism} authenticator failed" in peer.log()), peer.log()
    assert_no_secrets(daemon)


@as_root
@only_exim
def test_smtplib_tells_recipients_apart(peer: Peer, proxsmtpd: StartDaemon) -> None:
    """smtplib learns which recipients were refused, and why; the others get it."""
    daemon = proxsmtpd({"OutAddress": peer.address, "FilterCommand": "cat"})
    users = ["refused", "one", "deferred", "two"]
    with smtplib.SMTP("127.0.0.1", daemon.port, "client.example", 20) as client:
        refused = client.sendmail(
            "sender@example.com", [f"{user}@example.net" for user in users], HELLO
        )
    assert refused == {
        "refused@example.net": (550, b"no such user here"),
        "deferred@example.net": (451, b"mailbox is busy"),
    }
    recipients = sorted(str(mail.recipient) for mail in peer.wait_mails(2))
    assert recipients == ["one@example.net", "two@example.net"]


# --- Exim in front of proxsmtpd ---


@as_root
@only_exim
@FILTERED
def test_exim_delivers_at_its_first_attempt(
    peer: Peer,
    filtering: dict[str, str],
    proxsmtpd: StartDaemon,
    server: ScriptedServer,
) -> None:
    """Exim sends the end of data, QUIT and a FIN at once, and then reads."""
    daemon = proxsmtpd(filtering)
    peer.send_to(daemon.port)
    with begin(peer.address) as client:
        client.envelope(SENDER, [b"<recipient@elsewhere.example>"])
        assert client.message(HELLO).startswith(b"250 ")
        client.quit()
    assert server.wait_message().data.endswith(HELLO)
    assert poll(lambda: " Completed" in peer.log()), peer.log()
    assert re.search(r" => recipient@elsewhere\.example .* C=\"250 ", peer.log())
    assert " == " not in peer.log()  # what Exim logs for an attempt that it repeats
    assert len(server.messages) == 1
