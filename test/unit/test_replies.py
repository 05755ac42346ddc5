"""The server's octets: replies, and what the client gets to see of EHLO's.

Every stream of octets is cut three ways: whole, octet by octet, and with another
reply after it.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence

import pytest

import proxsmtpd as program
from helpers import octetwise
from proxsmtpd import BadReply, Reply, ReplyBuffer

LIMIT = program.REPLY_LIMIT


def replies(buffer: ReplyBuffer, pieces: Sequence[bytes]) -> list[Reply]:
    """Return the replies that come out of a buffer as the pieces go in."""
    found = []
    for piece in pieces:
        reply = buffer.take(piece)
        while reply is not None:
            found.append(reply)
            reply = buffer.next_reply()
    return found


# --- One reply ---------------------------------------------------------------


def test_reply_of_lines() -> None:
    assert Reply.of(b"250 Ok") == b"250 Ok\r\n"
    assert Reply.of(b"250-a", b"250 b") == b"250-a\r\n250 b\r\n"
    assert Reply.of(b"250-a", b"250 b").lines == [b"250-a", b"250 b"]


@pytest.mark.parametrize(
    ("reply", "code", "is_success"),
    [
        (b"250 Ok\r\n", 250, True),
        (b"220\r\n", 220, True),
        (b"299-a\r\n299 b\r\n", 299, True),
        (b"354 Go on\r\n", 354, False),
        (b"421 Bye\r\n", 421, False),
        (b"550 No\r\n", 550, False),
    ],
)
def test_reply_code(reply: bytes, code: int, is_success: bool) -> None:
    assert Reply(reply).code == code
    assert Reply(reply).is_success is is_success


def test_reply_in_the_log() -> None:
    reply = Reply.of(b"550-No\x1b[2J", b"550 way \xe4")
    assert reply.text == "550-No\\x1b[2J 550 way \\xe4"


# --- The buffer --------------------------------------------------------------

# Octets of the server, and the replies that they make.
STREAMS: dict[str, tuple[bytes, list[bytes]]] = {
    "one line": (b"250 Ok\r\n", [b"250 Ok\r\n"]),
    "two replies": (b"250 a\r\n550 b\r\n", [b"250 a\r\n", b"550 b\r\n"]),
    "several lines": (b"250-a\r\n250-b\r\n250 c\r\n", [b"250-a\r\n250-b\r\n250 c\r\n"]),
    "several lines twice": (
        b"250-a\r\n250 b\r\n250-c\r\n250 d\r\n",
        [b"250-a\r\n250 b\r\n", b"250-c\r\n250 d\r\n"],
    ),
    # One reply with the last line's code, as RFC 5321 4.2.1 does not have it.
    "codes that differ": (
        b"220-mx.example\r\n521 5.7.1 no\r\n",
        [b"521-mx.example\r\n521 5.7.1 no\r\n"],
    ),
    "codes that differ in the middle": (
        b"250-a\r\n550-b\r\n250-c\r\n421\r\n",
        [b"421-a\r\n421-b\r\n421-c\r\n421\r\n"],
    ),
    "no text": (b"250 \r\n", [b"250 \r\n"]),
    "bare code": (b"250\r\n", [b"250\r\n"]),
    "bare code at the end": (b"250-a\r\n250\r\n", [b"250-a\r\n250\r\n"]),
    "hyphen alone": (b"250-\r\n250 b\r\n", [b"250-\r\n250 b\r\n"]),
    "lowest code": (b"200 x\r\n", [b"200 x\r\n"]),
    "highest code": (b"599 x\r\n", [b"599 x\r\n"]),
    "3xx": (b"334 VXNlcm5hbWU6\r\n", [b"334 VXNlcm5hbWU6\r\n"]),
    "LF only": (b"250-a\n250 b\n", [b"250-a\r\n250 b\r\n"]),
    "bare code and LF": (b"250\n", [b"250\r\n"]),
    "LF and CRLF": (b"250-a\n250 b\r\n", [b"250-a\r\n250 b\r\n"]),
    "stray CR": (b"250 a\rb\r\n", [b"250 a?b\r\n"]),
    "CR CR LF": (b"250 a\r\r\n", [b"250 a?\r\n"]),
    "stray CR that hides a line": (b"250 a\r550 b\r\n", [b"250 a?550 b\r\n"]),
    "NUL": (b"250 a\0b\r\n", [b"250 a?b\r\n"]),
    "control characters": (
        b"250 \x01\x08\v\f\x1b\x1f\x7f\r\n",
        [b"250 \x01\x08\v\f\x1b\x1f\x7f\r\n"],
    ),
    "tab": (b"250 a\tb\r\n", [b"250 a\tb\r\n"]),
    "8-bit": (b"250 \x80\xe4\xff\r\n", [b"250 \x80\xe4\xff\r\n"]),
    "longer than 512 octets": (
        b"250 " + b"x" * 5000 + b"\r\n",
        [b"250 " + b"x" * 5000 + b"\r\n"],
    ),
}


@pytest.mark.parametrize(("octets", "expected"), STREAMS.values(), ids=STREAMS.keys())
def test_replies(octets: bytes, expected: list[bytes]) -> None:
    for pieces in ([octets], octetwise(octets)):
        buffer = ReplyBuffer()
        assert replies(buffer, pieces) == expected
        assert not buffer
    more = octets + b"221 Bye\r\n"
    assert replies(ReplyBuffer(), [more]) == [*expected, b"221 Bye\r\n"]
    assert replies(ReplyBuffer(), octetwise(more)) == [*expected, b"221 Bye\r\n"]
    assert replies(ReplyBuffer(), [octets + b"221"]) == expected


@pytest.mark.parametrize("octets", [b"2", b"250", b"250 Ok\r", b"250-a\r\n"])
def test_unfinished_reply(octets: bytes) -> None:
    for pieces in ([octets], octetwise(octets)):
        buffer = ReplyBuffer()
        assert not buffer
        assert replies(buffer, pieces) == []
        assert buffer


NO_REPLIES = {
    "no code": b"Ok\r\n",
    "empty line": b"\r\n",
    "empty line by LF": b"\n",
    "blank alone": b" \r\n",
    "blank before": b" 250 Ok\r\n",
    "letters": b"2x0 Ok\r\n",
    "letters after the code": b"250Ok\r\n",
    "tab after the code": b"250\tOk\r\n",
    "NUL after the code": b"250\0Ok\r\n",
    "CR after the code": b"250\r\r\n",
    "two digits": b"25 Ok\r\n",
    "four digits": b"2500 Ok\r\n",
    "000": b"000 Ok\r\n",
    "1xx": b"150 Ok\r\n",
    "6xx": b"600 Ok\r\n",
    "9xx": b"999 Ok\r\n",
    "negative": b"-50 Ok\r\n",
    "digits that are no ASCII": "\u0662\u0665\u0660 Ok\r\n".encode(),
    "8-bit": b"\xb250 Ok\r\n",
    "no code after a good line": b"250-a\r\nOk\r\n",
    "no code at the end": b"250-a\r\n\r\n",
}


@pytest.mark.parametrize("octets", NO_REPLIES.values(), ids=NO_REPLIES.keys())
def test_no_reply(octets: bytes) -> None:
    for pieces in ([octets], octetwise(octets), [octets + b"250 Ok\r\n"]):
        with pytest.raises(BadReply, match=r"^not a reply: "):
            replies(ReplyBuffer(), pieces)
    after = ReplyBuffer()
    after.feed(b"250 Ok\r\n" + octets)
    assert after.next_reply() == b"250 Ok\r\n"
    with pytest.raises(BadReply):
        after.next_reply()


def test_no_reply_is_shown_in_printable_ascii() -> None:
    buffer = ReplyBuffer()
    buffer.feed(b"\x1b[2J\xff" + b"x" * 5000 + b"\r\n")
    with pytest.raises(BadReply) as error:
        buffer.next_reply()
    assert str(error.value).startswith("not a reply: \\x1b[2J\\xffxxx")
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 1000


# Octets without the end of a line or of a reply, up to the limit and beyond it.
ENDLESS_LINE = b"250 " + b"x" * LIMIT
ENDLESS_LIST = (b"250-" + b"x" * 1020 + b"\r\n") * (LIMIT // 1024)


def test_longest_reply() -> None:
    line = ENDLESS_LINE[:LIMIT] + b"\r\n"
    assert replies(ReplyBuffer(), [line]) == [line]
    most = ENDLESS_LIST[: 1026 * (LIMIT // 1024 - 1)] + b"250 end\r\n"
    assert replies(ReplyBuffer(), [most]) == [most]
    assert replies(ReplyBuffer(), [most[:1500], most[1500:]]) == [most]


OVERLONG = {
    "line": ENDLESS_LINE[: LIMIT + 1],
    "line that ends": ENDLESS_LINE[: LIMIT + 1] + b"\r\n",
    "list": ENDLESS_LIST + b"250-",
    "list that ends": ENDLESS_LIST + b"250 end\r\n",
}


@pytest.mark.parametrize("octets", OVERLONG.values(), ids=OVERLONG.keys())
@pytest.mark.parametrize("size", [1, 999, 65_536, 10 * LIMIT])
def test_reply_without_end(octets: bytes, size: int) -> None:
    pieces = [octets[i : i + size] for i in range(0, len(octets), size)]
    with pytest.raises(BadReply, match=r"^reply without end$"):
        replies(ReplyBuffer(), pieces)


def test_memory_is_bounded() -> None:
    tracemalloc.start()
    try:
        with pytest.raises(BadReply):
            replies(ReplyBuffer(), [b"x" * 65_536] * 100)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * LIMIT


# --- EHLO and HELO -----------------------------------------------------------

REMOVED = [
    b"STARTTLS",
    b"CHUNKING",
    b"BINARYMIME",
    b"CHECKPOINT",
    b"XCLIENT",
    b"XEXCH50",
    b"BURL",
    b"PRDR",
    b"PIPECONNECT",
    b"PIPE_CONNECT",
    b"X_PIPE_CONNECT",
]
KEPT = [
    b"SIZE",
    b"SIZE 104857600",
    b"8BITMIME",
    b"SMTPUTF8",
    b"ENHANCEDSTATUSCODES",
    b"DSN",
    b"VRFY",
    b"ETRN",
    b"AUTH PLAIN LOGIN",
    b"AUTH=PLAIN LOGIN",
    b"AUTH=LOGIN",
    b"XFORWARD NAME ADDR PROTO HELO SOURCE",
    b"LIMITS RCPTMAX=100",
    b"DELIVERBY 240",
    # Names that only resemble those which are taken out.
    b"STARTTLSX",
    b"XSTARTTLS",
    b"STARTTLS-X",
    b"BURLY",
    b"PIPE",
    b"SIZE STARTTLS",
    b"X-CHUNKING",
]


def hello(*texts: bytes) -> Reply:
    """Return the server's 250 to EHLO, with these texts."""
    return Reply.of(
        *(b"250-" + text for text in texts[:-1]),
        b"250 " + texts[-1],
    )


def shown(*extensions: bytes) -> Reply:
    """Return the client's reply to EHLO with these service extensions left."""
    return hello(b"smtp.passthru", b"PIPELINING", *extensions)


@pytest.mark.parametrize("name", REMOVED, ids=bytes.decode)
@pytest.mark.parametrize(
    "form",
    [b"%b", b"%b ", b"%b X Y=1", b"%b=X", b"%b\tX"],
    ids=["alone", "blank", "parameters", "equals", "tab"],
)
def test_removed_extension(name: bytes, form: bytes) -> None:
    for text in (form % name, form % name.lower()):
        first = hello(b"sink.example", text, b"SIZE 10", b"DSN")
        middle = hello(b"sink.example", b"SIZE 10", text, b"DSN")
        last = hello(b"sink.example", b"SIZE 10", b"DSN", text)
        for reply in (first, middle, last):
            answer = program.rewrite_hello(reply, extended=True)
            assert answer == shown(b"SIZE 10", b"DSN")
        alone = program.rewrite_hello(hello(b"sink.example", text), extended=True)
        assert alone == shown()


@pytest.mark.parametrize("blanks", [b" ", b"  ", b"\t"], ids=["one", "two", "tab"])
def test_removed_extension_after_blanks(blanks: bytes) -> None:
    """Clients skip them: Postfix takes `250- STARTTLS` for an offer."""
    texts = [blanks + name for name in REMOVED]
    reply = hello(b"sink.example", *texts, b"DSN")
    assert program.rewrite_hello(reply, extended=True) == shown(b"DSN")


@pytest.mark.parametrize("text", KEPT, ids=bytes.decode)
def test_kept_extension(text: bytes) -> None:
    reply = hello(b"sink.example greets you", text, b"DSN")
    assert program.rewrite_hello(reply, extended=True) == shown(text, b"DSN")
    reply = hello(b"sink.example", text)
    assert program.rewrite_hello(reply, extended=True) == shown(text)


# The server's reply to EHLO, and what the client gets.
EHLO_REPLIES = {
    "no list": (b"250 sink.example\r\n", shown()),
    "no text": (b"250\r\n", shown()),
    "nothing but PIPELINING": (b"250-x\r\n250 PIPELINING\r\n", shown()),
    "PIPELINING in lower case": (b"250-x\r\n250 Pipelining\r\n", shown()),
    "PIPELINING twice": (b"250-x\r\n250-PIPELINING\r\n250 PIPELINING\r\n", shown()),
    "all taken out": (b"250-x\r\n250-STARTTLS\r\n250 CHUNKING\r\n", shown()),
    "order kept": (
        b"250-x\r\n250-SIZE\r\n250-PIPELINING\r\n250-STARTTLS\r\n250 DSN\r\n",
        shown(b"SIZE", b"DSN"),
    ),
}


@pytest.mark.parametrize(
    ("reply", "expected"), EHLO_REPLIES.values(), ids=EHLO_REPLIES.keys()
)
def test_ehlo(reply: bytes, expected: bytes) -> None:
    assert program.rewrite_hello(Reply(reply), extended=True) == expected


@pytest.mark.parametrize(
    "text", [b"AUTH PLAIN LOGIN", b"AUTH=PLAIN", b" auth x", b"X-EXPS GSSAPI"]
)
def test_ehlo_before_starttls(text: bytes) -> None:
    """We offer it, and no authentication, whatever the server offers."""
    reply = hello(b"sink.example", b"STARTTLS", text, b"DSN")
    for extended, expected in (
        (True, shown(b"STARTTLS", b"DSN")),
        (False, b"250-smtp.passthru\r\n" + hello(b"STARTTLS", text, b"DSN")),
    ):
        made = program.rewrite_hello(reply, extended=extended, starttls=True)
        assert made == expected


# The server's reply to HELO, which has no list, and what the client gets.
HELO_REPLIES = {
    "one line": (b"250 sink.example\r\n", b"250 smtp.passthru\r\n"),
    "no text": (b"250\r\n", b"250 smtp.passthru\r\n"),
    "several lines": (
        b"250-sink.example\r\n250 at your service\r\n",
        b"250-smtp.passthru\r\n250 at your service\r\n",
    ),
    "a word that is an extension's name": (
        b"250-sink.example\r\n250 STARTTLS\r\n",
        b"250-smtp.passthru\r\n250 STARTTLS\r\n",
    ),
}


@pytest.mark.parametrize(
    ("reply", "expected"), HELO_REPLIES.values(), ids=HELO_REPLIES.keys()
)
def test_helo(reply: bytes, expected: bytes) -> None:
    assert program.rewrite_hello(Reply(reply), extended=False) == expected


# The server's reply to EHLO, and the attributes that it lists for XCLIENT.
OFFERS: dict[str, tuple[bytes, set[bytes] | None]] = {
    "not listed": (b"250-x\r\n250 DSN\r\n", None),
    "no list": (b"250 XCLIENT NAME\r\n", None),
    "no attributes": (b"250-x\r\n250 XCLIENT\r\n", set()),
    "attributes": (
        b"250-x\r\n250-XCLIENT NAME ADDR\r\n250 DSN\r\n",
        {b"NAME", b"ADDR"},
    ),
    "lower case": (b"250-x\r\n250 xclient name Addr\r\n", {b"NAME", b"ADDR"}),
    "blanks": (b"250-x\r\n250 XCLIENT  NAME\t ADDR \r\n", {b"NAME", b"ADDR"}),
    "another name": (b"250-x\r\n250 XCLIENTS NAME\r\n", None),
    "as a parameter": (b"250-x\r\n250 FOO XCLIENT NAME\r\n", None),
    "an empty line": (b"250-x\r\n250-\r\n250 XCLIENT ADDR\r\n", {b"ADDR"}),
}


@pytest.mark.parametrize(("reply", "expected"), OFFERS.values(), ids=OFFERS.keys())
def test_offered_attributes(reply: bytes, expected: set[bytes] | None) -> None:
    assert program.offered_attributes(Reply(reply), b"XCLIENT") == expected
