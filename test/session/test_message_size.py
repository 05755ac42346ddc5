"""MaxMessageSize: what is offered, what MAIL may announce, what data may come."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Callable, Optional

import pytest

from helpers import (
    MEGABYTE,
    MESSAGE,
    QUEUED,
    Daemon,
    MakeServer,
    StartDaemon,
    long_message,
    status_of,
    verbs,
)
from proxsmtpd import Reply, rewrite_hello, smaller_limit, take_size
from smtp import RawClient, ScriptedServer, multiline

LIMIT = 1000
TOO_LARGE = b"552 Message too large\r\n"
SIZE = b"SIZE 104857600"


def of_size(octets: int) -> bytes:
    """Return a message of just so many octets."""
    return MESSAGE + b"x" * (octets - len(MESSAGE) - 2) + b"\r\n"


def verbs_of(daemon: Daemon, server: ScriptedServer) -> list[bytes]:
    """Return the verbs of an ended session; the daemon must still live."""
    assert daemon.process.poll() is None
    server.wait_for(lambda: server.connections[0].closed)
    return verbs(server.connections[0])


# --- EHLO ---

# The server's word on SIZE, and ours with a limit of 1000.
OFFERS: dict[Optional[bytes], bytes] = {
    b"SIZE 104857600": b"SIZE 1000",
    b"SIZE 1001": b"SIZE 1000",
    b"SIZE 1000": b"SIZE 1000",
    b"SIZE 999": b"SIZE 999",
    b"size 999": b"SIZE 999",
    b"SIZE 0": b"SIZE 1000",
    b"SIZE 000": b"SIZE 1000",
    b"SIZE": b"SIZE 1000",
    b"SIZE many": b"SIZE 1000",
    b"SIZE -1": b"SIZE 1000",
    None: b"SIZE 1000",
}


def hello(*extensions: bytes) -> bytes:
    return multiline(b"250", [b"smtp.passthru", *extensions])


@pytest.mark.parametrize("offered", OFFERS)
def test_ehlo_has_the_smaller_limit(
    offered: Optional[bytes], proxsmtpd: StartDaemon, make_server: MakeServer
) -> None:
    extensions = [b"8BITMIME", *([offered] if offered is not None else []), b"DSN"]
    daemon = proxsmtpd(
        {"MaxMessageSize": LIMIT}, server=make_server(extensions=extensions)
    )
    client = daemon.connect()
    client.reply()
    expected = hello(b"PIPELINING", OFFERS[offered], b"8BITMIME", b"DSN")
    assert client.command(b"EHLO client.example") == expected


@pytest.mark.parametrize("setting", ["", "MaxMessageSize: 0"])
@pytest.mark.parametrize("extensions", [(b"8BITMIME", b"SIZE 5", b"DSN"), (b"DSN",)])
def test_without_a_limit_ehlo_is_the_servers(
    setting: str,
    extensions: tuple[bytes, ...],
    proxsmtpd: StartDaemon,
    make_server: MakeServer,
) -> None:
    daemon = proxsmtpd(setting, server=make_server(extensions=extensions))
    client = daemon.connect()
    client.reply()
    expected = hello(b"PIPELINING", *extensions)
    assert client.command(b"EHLO client.example") == expected


def test_helo_has_no_extensions(proxsmtpd: StartDaemon) -> None:
    client = proxsmtpd({"MaxMessageSize": LIMIT}).connect()
    client.reply()
    assert client.command(b"HELO client.example") == b"250 smtp.passthru\r\n"


# --- MAIL ---


@pytest.mark.parametrize("extensions", [[SIZE], [b"SIZE 10"], []])
def test_mail_that_announces_too_much(
    extensions: list[bytes], proxsmtpd: StartDaemon, make_server: MakeServer
) -> None:
    """It is refused at once and not forwarded, and the session goes on."""
    server = make_server(extensions=extensions)
    daemon = proxsmtpd({"MaxMessageSize": LIMIT}, server=server)
    client = daemon.connect()
    client.reply()
    client.expect(b"EHLO client.example", b"250")
    for parameters in (
        b"SIZE=1001",
        b"BODY=8BITMIME SIZE=18446744073709551616",
        b"size=1001",
        b"SIZE=1 SIZE=1001",
    ):
        mail = b"MAIL FROM:<a@example.com> "
        assert client.command(mail + parameters) == TOO_LARGE
    client.expect(b"RCPT TO:<b@example.com>", b"250")
    client.expect(b"DATA", b"503")
    client.expect(b"MAIL FROM:<a@example.com> SIZE=1000", b"250")
    client.expect(b"RCPT TO:<b@example.com>", b"250")
    client.started = True
    assert client.message(MESSAGE) == QUEUED
    client.quit()
    said = [line for line in server.connections[0].lines if line.startswith(b"MAIL")]
    kept = b" SIZE=1000" if extensions else b""
    assert said == [b"MAIL FROM:<a@example.com>" + kept]


# The client's MAIL, and the one for a server that has not offered SIZE.
MAILS = {
    b"MAIL FROM:<a@example.com> SIZE=10": b"MAIL FROM:<a@example.com>",
    b"MAIL FROM:<a@example.com> size=10": b"MAIL FROM:<a@example.com>",
    b"mail from:<a@example.com> SIZE=10": b"MAIL FROM:<a@example.com>",
    b"MAIL FROM:<> SIZE=0": b"MAIL FROM:<>",
    b"MAIL FROM:<a@example.com> BODY=8BITMIME SIZE=10 RET=HDRS": (
        b"MAIL FROM:<a@example.com> BODY=8BITMIME RET=HDRS"
    ),
    b'MAIL FROM:<" SIZE=1 "@example.com> SIZE=10': (
        b'MAIL FROM:<" SIZE=1 "@example.com>'
    ),
    rb'MAIL FROM:<"\" SIZE=5000 > SIZE=2 "@example.com> SIZE=10': (
        rb'MAIL FROM:<"\" SIZE=5000 > SIZE=2 "@example.com>'
    ),
    # What is no SIZE is for the server to judge.
    b"MAIL FROM:<a@example.com>": b"MAIL FROM:<a@example.com>",
    b'MAIL FROM:<" SIZE=5000 "@example.com>': b'MAIL FROM:<" SIZE=5000 "@example.com>',
    b"MAIL FROM:<a@example.com> SIZE=": b"MAIL FROM:<a@example.com> SIZE=",
    b"MAIL FROM:<a@example.com> SIZE=-1": b"MAIL FROM:<a@example.com> SIZE=-1",
    b"MAIL FROM:<a@example.com> SIZES=1": b"MAIL FROM:<a@example.com> SIZES=1",
    b"MAIL FROM:<a@example.com> AUTH=a+3DSIZE=5000": (
        b"MAIL FROM:<a@example.com> AUTH=a+3DSIZE=5000"
    ),
}


@pytest.mark.parametrize("verb", [b"EHLO", b"HELO"])
@pytest.mark.parametrize("extensions", [[SIZE], []], ids=["offered", "not offered"])
def test_server_gets_size_as_it_offered_it(
    verb: bytes,
    extensions: list[bytes],
    proxsmtpd: StartDaemon,
    make_server: MakeServer,
) -> None:
    server = make_server(extensions=extensions)
    client = proxsmtpd({"MaxMessageSize": LIMIT}, server=server).connect()
    client.reply()
    client.expect(verb + b" client.example", b"250")
    for line in MAILS:
        client.expect(line, b"250")
    is_offered = bool(extensions) and verb == b"EHLO"
    expected = list(MAILS if is_offered else MAILS.values())
    assert server.connections[0].lines[1:] == expected


@pytest.mark.parametrize("extensions", [[SIZE], []], ids=["offered", "not offered"])
def test_size_after_a_path_that_is_rewritten(
    extensions: list[bytes], proxsmtpd: StartDaemon, make_server: MakeServer
) -> None:
    server = make_server(extensions=extensions)
    client = proxsmtpd({"MaxMessageSize": LIMIT}, server=server).connect()
    client.reply()
    client.expect(b"EHLO client.example", b"250")
    client.expect(b'MAIL FROM:" SIZE=5000 "@example.com SIZE=10 X', b"250")
    assert client.command(b'MAIL FROM:"SIZE=1" <a@b> SIZE=5000') == TOO_LARGE
    size = b" SIZE=10" if extensions else b""
    told = b'MAIL FROM:<" SIZE=5000 "@example.com>%s X' % size
    assert server.connections[0].lines[1:] == [told]


def test_without_a_limit_size_is_the_servers(
    proxsmtpd: StartDaemon, make_server: MakeServer
) -> None:
    server = make_server(extensions=[])
    client = proxsmtpd(server=server).connect()
    client.reply()
    client.expect(b"EHLO client.example", b"250")
    client.expect(b"MAIL  FROM:<a@example.com>  SIZE=99999999", b"250")
    said = server.connections[0].lines[-1]
    assert said == b"MAIL  FROM:<a@example.com>  SIZE=99999999"


def test_offer_of_the_last_hello_counts(
    proxsmtpd: StartDaemon, make_server: MakeServer
) -> None:
    with_size, without = hello(SIZE), hello(b"DSN")
    server = make_server({"EHLO": [with_size, without, with_size]})
    client = proxsmtpd({"MaxMessageSize": LIMIT}, server=server).connect()
    client.reply()
    for expected in (b" SIZE=1", b"", b" SIZE=1"):
        client.expect(b"EHLO client.example", b"250")
        client.expect(b"MAIL FROM:<a@example.com> SIZE=1", b"250")
        said = server.connections[0].lines[-1]
        assert said == b"MAIL FROM:<a@example.com>" + expected


# --- More than that, with a filter ---

FILTERS = {
    "pipe": {},
    "file": {"FilterType": "file"},
    "observing": {"FilterMode": "observe"},
    "passing": {"FilterFailure": "pass"},
    "observing file": {"FilterMode": "observe", "FilterType": "file"},
}


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("octets", [LIMIT + 1, 3 * MEGABYTE])
def test_filtered_message_that_is_too_large(
    name: str,
    octets: int,
    proxsmtpd: StartDaemon,
    server: ScriptedServer,
    tmp_path: Path,
) -> None:
    """It gets to neither filter nor server; a message pipelined after it does."""
    ran = tmp_path / "ran"
    settings = {"FilterCommand": f"echo x >> {ran}; cat", "MaxMessageSize": LIMIT}
    daemon = proxsmtpd({**settings, **FILTERS[name]}, level=3)
    client = daemon.connect()
    client.start()
    client.expect(b"DATA", b"354")
    envelope = b"MAIL FROM:<c@example.com>\r\nRCPT TO:<d@example.com>\r\nDATA\r\n"
    client.send(of_size(octets) + b".\r\n" + envelope)
    assert client.reply() == TOO_LARGE
    assert [client.reply()[:3] for _ in range(3)] == [b"250", b"250", b"354"]
    assert not ran.exists()
    assert status_of(daemon) == "552 Message too large"
    client.send(of_size(LIMIT) + b".\r\nQUIT\r\n")
    assert client.reply() == QUEUED
    assert client.reply()[:3] == b"221"
    assert verbs_of(daemon, server) == (
        b"EHLO MAIL RCPT RSET MAIL RCPT DATA QUIT".split()
    )
    (message,) = server.messages
    assert (message.sender, message.data) == (b"<c@example.com>", of_size(LIMIT))
    assert ran.read_text() == "x\n"


def test_too_large_a_message_is_read_and_not_kept(proxsmtpd: StartDaemon) -> None:
    """Memory and TempDirectory have what the limit allows, whatever is sent."""
    settings = {"FilterCommand": "cat", "MaxMessageSize": 2 * MEGABYTE}
    daemon = proxsmtpd(settings, level=3)
    client = daemon.connect(timeout=60)
    assert client.message(of_size(LIMIT)) == QUEUED
    before = daemon.peak_memory()
    block = long_message(MEGABYTE)
    client.envelope()
    client.expect(b"DATA", b"354")
    for _ in range(48):
        client.send(block)
    assert client.command(b".") == TOO_LARGE
    assert daemon.peak_memory() - before < 12 * MEGABYTE
    client.envelope()
    assert client.message(MESSAGE) == QUEUED


# --- More than that, past the filter ---


Start = Callable[[RawClient], None]


def start_authenticated(client: RawClient) -> None:
    client.reply()
    client.expect(b"EHLO client.example", b"250")
    client.expect(b"AUTH PLAIN AGEAYg==", b"235")
    client.envelope()


PAST_THE_FILTER: dict[str, tuple[Mapping[str, object], Start]] = {
    "no filter": ({}, RawClient.start),
    "skipped": (
        {"FilterCommand": "false", "Skip": "authenticated"},
        start_authenticated,
    ),
}


@pytest.mark.parametrize("name", PAST_THE_FILTER)
@pytest.mark.parametrize("octets", [LIMIT + 1, 3 * MEGABYTE])
def test_streamed_message_that_is_too_large(
    name: str, octets: int, proxsmtpd: StartDaemon, server: ScriptedServer
) -> None:
    """The server has a part of it: the session ends, so that it takes none."""
    settings, start = PAST_THE_FILTER[name]
    daemon = proxsmtpd({**settings, "MaxMessageSize": LIMIT}, level=3)
    client = daemon.connect()
    start(client)
    client.expect(b"DATA", b"354")
    client.send(of_size(octets) + b".\r\nMAIL FROM:<c@example.com>\r\n")
    assert client.reply() == TOO_LARGE
    assert client.eof()
    assert status_of(daemon) == "552 Message too large"
    daemon.wait_log(r"proxsmtpd: [0-9A-F]{6}: message is too large$")
    assert verbs_of(daemon, server)[-1] == b"DATA"
    assert b"\r\n.\r\n" not in server.connections[0].received
    assert server.messages == []
    assert len(server.connections[0].received) < LIMIT + 400


# --- Just as much as that ---


@pytest.mark.parametrize("command", ["cat", ""], ids=["filter", "stream"])
@pytest.mark.parametrize("size", [LIMIT, 2 * MEGABYTE])
def test_just_the_limit(
    command: str, size: int, proxsmtpd: StartDaemon, server: ScriptedServer
) -> None:
    """Neither the dots of the transparency procedure nor the last dot count."""
    daemon = proxsmtpd({"FilterCommand": command, "MaxMessageSize": size}, level=3)
    dots = MESSAGE + b".\r\n" * ((size - len(MESSAGE) - 4) // 3)
    message = dots + b"y" * (size - len(dots) - 2) + b"\r\n"
    assert len(message) == size
    stuffed = message.replace(b"\r\n.", b"\r\n..")
    client = daemon.connect(timeout=30)
    assert client.message(stuffed) == QUEUED
    assert server.wait_message().data == stuffed
    client.envelope()
    assert client.message(b"z" + stuffed) == TOO_LARGE
    assert len(server.messages) == 1


def test_additions_of_filter_and_header_do_not_count(
    proxsmtpd: StartDaemon, server: ScriptedServer
) -> None:
    settings = {"MaxMessageSize": LIMIT, "Header": "X-Long: " + "x" * 900}
    daemon = proxsmtpd({**settings, "FilterCommand": "cat && echo; printf %0900d 1"})
    assert daemon.connect().message(of_size(LIMIT)) == QUEUED
    assert len(server.wait_message().data) > LIMIT + 1800


# --- The functions ---

TAKEN = {
    b"": (b"", 0),
    b"SIZE=10": (b"", 10),
    b"Size=0010": (b"", 10),
    b"SIZE=0": (b"", 0),
    b"A=1 SIZE=10  B": (b"A=1 B", 10),
    b"A=1  B": (b"A=1  B", 0),
    b"SIZE=7 SIZE=9 SIZE=8": (b"", 9),
    b"SIZE=" + b"9" * 20: (b"", 10**20 - 1),
    b"SIZE=" + b"9" * 21: (b"SIZE=" + b"9" * 21, 0),
    b"SIZE=1x": (b"SIZE=1x", 0),
    b"SIZE=+1": (b"SIZE=+1", 0),
    b"SIZE 1": (b"SIZE 1", 0),
    "SIZE=\N{ARABIC-INDIC DIGIT ONE}".encode(): (
        "SIZE=\N{ARABIC-INDIC DIGIT ONE}".encode(),
        0,
    ),
}


@pytest.mark.parametrize("parameters", TAKEN)
def test_take_size(parameters: bytes) -> None:
    assert take_size(parameters) == TAKEN[parameters]


@pytest.mark.parametrize(
    ("offered", "expected"),
    [
        (None, 1000),
        ((), 1000),
        ((b"0",), 1000),
        ((b"999",), 999),
        ((b"1001",), 1000),
        ((b"X", b"999"), 999),
        ((b"-1",), 1000),
        ((b"9" * 20,), 1000),
        ((b"1" * 21,), 1000),
    ],
)
def test_smaller_limit(offered: Optional[tuple[bytes, ...]], expected: int) -> None:
    words = None if offered is None else frozenset(offered)
    assert smaller_limit(words, 1000) == expected


@pytest.mark.parametrize(
    ("lines", "extended", "size", "expected"),
    [
        ([b"a"], True, 0, [b"PIPELINING"]),
        ([b"a"], True, 7, [b"PIPELINING", b"SIZE 7"]),
        ([b"a", b"SIZE 5"], True, 7, [b"PIPELINING", b"SIZE 5"]),
        ([b"a", b"SIZE 5"], True, 0, [b"PIPELINING", b"SIZE 5"]),
        ([b"a", b"SIZE=5"], True, 7, [b"PIPELINING", b"SIZE 5"]),
        ([b"a", b"DSN", b"SIZE"], True, 7, [b"PIPELINING", b"SIZE 7", b"DSN"]),
        ([b"a"], False, 7, []),
    ],
)
def test_rewrite_hello(
    lines: list[bytes], extended: bool, size: int, expected: list[bytes]
) -> None:
    reply = Reply(multiline(b"250", lines))
    assert rewrite_hello(reply, extended=extended, size=size) == hello(*expected)
