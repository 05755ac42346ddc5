"""Mail data: its end, dot-stuffing, line ends, and the header field.

Each transformer's case is run whole, octet by octet, and cut in two at every place;
the reader's also with more after the end.
"""

from __future__ import annotations

import base64
import re
import smtplib
import time
from collections.abc import Iterator
from typing import Callable, Protocol

import pytest

import proxsmtpd as program
from proxsmtpd import (
    DotStuffer,
    HeaderInserter,
    LineRepair,
    MailDataReader,
    MailDataWriter,
)

END = b"\r\n.\r\n"
FIELD = b"X-Filter: yes\r\n"
RECEIVED = b"Received: from x\r\n"


class Transformer(Protocol):
    """Takes blocks and gives blocks, and the rest at the end."""

    def feed(self, block: bytes, /) -> bytes: ...

    def finish(self) -> bytes: ...


def cuts(octets: bytes) -> Iterator[list[bytes]]:
    """Return the octets whole, one by one, with empty blocks, and cut everywhere."""
    yield [octets]
    yield [octets[i : i + 1] for i in range(len(octets))]
    yield [b"", octets, b""]
    for place in range(1, len(octets)):
        yield [octets[:place], octets[place:]]


def transformed(transformer: Transformer, pieces: list[bytes]) -> bytes:
    """Return all that comes out when the pieces have gone in."""
    return b"".join(map(transformer.feed, pieces)) + transformer.finish()


def read(pieces: list[bytes]) -> tuple[bytes, bytes | None]:
    """Return the message that the reader finds and the rest; None: no end."""
    reader = MailDataReader()
    message = b""
    for number, piece in enumerate(pieces, 1):
        message += reader.feed(piece)
        if reader.ended:
            return message, reader.rest + b"".join(pieces[number:])
    return message, None


# --- From the client: the end, and the dots ----------------------------------

# Mail data with its end, and the message in it.
MAIL_DATA = {
    "one line": (b"x\r\n.\r\n", b"x\r\n"),
    "nothing": (b".\r\n", b""),
    "empty line": (b"\r\n.\r\n", b"\r\n"),
    "empty lines": (b"\r\n\r\n\r\n.\r\n", b"\r\n\r\n\r\n"),
    "header and body": (b"A: b\r\n\r\nc\r\n.\r\n", b"A: b\r\n\r\nc\r\n"),
    "dot stuffed": (b"..\r\n.\r\n", b".\r\n"),
    "two dots stuffed": (b"...\r\n.\r\n", b"..\r\n"),
    "dot and text stuffed": (b"a\r\n..b\r\n.\r\n", b"a\r\n.b\r\n"),
    "dot that nobody stuffed": (b"a\r\n.b\r\n.\r\n", b"a\r\nb\r\n"),
    "first line stuffed": (b"..a\r\n.\r\n", b".a\r\n"),
    "first line not stuffed": (b".a\r\n.\r\n", b"a\r\n"),
    "lines of dots": (b"..\r\n..\r\n...\r\n.\r\n", b".\r\n.\r\n..\r\n"),
    "dots within": (b"a.b\r\n .\r\na.\r\n.\r\n", b"a.b\r\n .\r\na.\r\n"),
    "dot blank": (b".. \r\n. \r\n.\r\n", b". \r\n \r\n"),
    "one dot after LF stays": (b"a\n.b\r\n.\r\n", b"a\n.b\r\n"),
    "two dots after LF": (b"a\n..b\r\n.\r\n", b"a\n.b\r\n"),
    "three dots after LF": (b"a\n...b\r\n.\r\n", b"a\n..b\r\n"),
    "two dots after LF LF": (b"a\n\n..\r\n.\r\n", b"a\n\n.\r\n"),
    "two dots between LF": (b"a\n..\n..\n.\r\n.\r\n", b"a\n.\n.\n.\r\n"),
    "dots after LF and CRLF": (
        b"...a\n..b\r\n..c\r\n.d\r\n...e\n.f\r\n.\r\n",
        b"..a\n.b\r\n.c\r\nd\r\n..e\n.f\r\n",
    ),
    "dots after CR CR LF": (b"a\r\r\n..b\r\n.\r\n", b"a\r\r\n.b\r\n"),
    "dot dot LF": (b"a\r\n..\n..b\r\n.\r\n", b"a\r\n.\n.b\r\n"),
    "dot after CR stays": (b"a\r..b\r\n.\r\n", b"a\r..b\r\n"),
    "NUL and 8-bit": (b"\0\xff\x80\r\n.\r\n", b"\0\xff\x80\r\n"),
    "CR CR LF": (b"a\r\r\n.\r\n", b"a\r\r\n"),
    "dot CR alone": (b"a\r\n.\rb\r\n.\r\n", b"a\r\n\rb\r\n"),
    "dot CR CR LF": (b"a\r\n.\r\r\n.\r\n", b"a\r\n\r\r\n"),
    "dot LF": (b"a\r\n.\nb\r\n.\r\n", b"a\r\n\nb\r\n"),
    "CR at the start": (b"\rx\r\n.\r\n", b"\rx\r\n"),
    "LF at the start": (b"\n.\r\nx\r\n.\r\n", b"\n.\r\nx\r\n"),
    "dot dot after the start": (b"..\r\n..\r\n.\r\n", b".\r\n.\r\n"),
}


@pytest.mark.parametrize(
    ("octets", "message"), MAIL_DATA.values(), ids=MAIL_DATA.keys()
)
def test_reader(octets: bytes, message: bytes) -> None:
    for pieces in cuts(octets):
        assert read(pieces) == (message, b"")
    for more in (b"Q", b"QUIT\r\n", b".\r\n", b"\r\n.\r\n", END * 2):
        for pieces in cuts(octets + more):
            assert read(pieces) == (message, more)


# What some servers take for the end of the data, and we must not.
NO_ENDS = {
    "LF . LF": b"\n.\n",
    "LF . CRLF": b"\n.\r\n",
    "LF . CR": b"\n.\r",
    "CR . CR": b"\r.\r",
    "CR . LF": b"\r.\n",
    "CR . CRLF": b"\r.\r\n",
    "CRLF . CR": b"\r\n.\r",
    "CRLF . LF": b"\r\n.\n",
    "CRCRLF . CRCRLF": b"\r\r\n.\r\r\n",
    "CRLF . CRCRLF": b"\r\n.\r\r\n",
    "LFCR . LFCR": b"\n\r.\n\r",
    "NUL before the dot": b"\r\n\0.\r\n",
    "NUL after the dot": b"\r\n.\0\r\n",
    "NUL before the CRLF": b"\0\r\n\0.\0\r\n",
    "blank after the dot": b"\r\n. \r\n",
    "blank before the dot": b"\r\n .\r\n",
    "tab after the dot": b"\r\n.\t\r\n",
    "two dots": b"\r\n..\r\n",
    "dot with its high bit": b"\r\n\xae\r\n",
    "CR with its high bit": b"\x8d\n.\x8d\n",
    "vertical tab": b"\v.\v",
    "next line (ISO 6429)": b"\x85.\x85",
    "line separator": "\u2028.\u2028".encode(),
    "NUL within the end": b"\r\0\n.\r\n",
    "CR NUL LF after the dot": b"\r\n.\r\0\n",
}


@pytest.mark.parametrize("ending", NO_ENDS.values(), ids=NO_ENDS.keys())
def test_no_end_of_data(ending: bytes) -> None:
    """Commands after such an ending are part of the message."""
    commands = b"MAIL FROM:<e@vil>\r\nRCPT TO:<v@ictim>\r\nDATA\r\n"
    octets = b"a" + ending + commands
    # A dot at the start of a line is taken for one of the stuffing.
    message = b"a" + ending.replace(b"\r\n.", b"\r\n") + commands
    for pieces in cuts(octets + b"more"):
        assert read(pieces) == (message + b"more", None)
    for pieces in cuts(octets + b".\r\nQUIT\r\n"):
        assert read(pieces) == (message, b"QUIT\r\n")


@pytest.mark.parametrize("ending", NO_ENDS.values(), ids=NO_ENDS.keys())
def test_no_end_of_data_at_the_start(ending: bytes) -> None:
    """The data begins as if after a CRLF; such an ending is no end there either."""
    octets = ending.removeprefix(b"\r\n") + b"x\r\n.\r\n"
    for pieces in cuts(octets):
        message, rest = read(pieces)
        assert (message[-3:], rest) == (b"x\r\n", b"")


@pytest.mark.parametrize("octets", [b"", b"\r", b"\r\n", b".", b".\r", b"a\r\n.\r"])
def test_reader_waits(octets: bytes) -> None:
    for pieces in cuts(octets):
        assert read(pieces)[1] is None
    assert read([octets, b"b\r\n.\r\n"])[1] == b""


def test_reader_gives_all_but_a_possible_end() -> None:
    reader = MailDataReader()
    assert reader.feed(b"Subject: x\r\n\r\nabc") == b"Subject: x\r\n\r\nabc"
    assert reader.feed(b"d\r\n") == b"d"
    assert reader.feed(b"e") == b"\r\ne"
    assert reader.feed(b"\n") == b""
    assert reader.feed(b".") == b""
    assert reader.feed(b".f") == b"\n.f"
    assert reader.feed(b"\r\n.\r\nQUIT") == b"\r\n"
    assert reader.ended
    assert reader.rest == b"QUIT"


# --- Line ends ---------------------------------------------------------------

# What a client or a filter wrote, and the same with every line ended by CRLF.
LINE_ENDS = {
    "nothing": (b"", b""),
    "clean": (b"a\r\nb\r\n", b"a\r\nb\r\n"),
    "empty lines": (b"\r\n\r\n", b"\r\n\r\n"),
    "LF": (b"a\nb\n", b"a\r\nb\r\n"),
    "LF alone": (b"\n", b"\r\n"),
    "LF twice": (b"a\n\nb\n", b"a\r\n\r\nb\r\n"),
    "LF and CRLF": (b"a\nb\r\nc\n", b"a\r\nb\r\nc\r\n"),
    "CRLF LF": (b"a\r\n\nb\r\n", b"a\r\n\r\nb\r\n"),
    "LF CR": (b"a\n\rb\r\n", b"a\r\n b\r\n"),
    "CR": (b"a\rb\r\n", b"a b\r\n"),
    "CR at the start": (b"\ra\r\n", b" a\r\n"),
    "CR CR": (b"a\r\rb\r\n", b"a  b\r\n"),
    "CR CR LF": (b"a\r\r\nb\r\n", b"a\r\nb\r\n"),
    "CR CR CR LF": (b"a\r\r\r\n", b"a\r\n"),
    "CR LF CR": (b"a\r\n\rb\r\n", b"a\r\n b\r\n"),
    "as many CR as LF": (b"a\rb\nc\r\n", b"a b\r\nc\r\n"),
    "last line without end": (b"a\r\nb", b"a\r\nb\r\n"),
    "only line without end": (b"a", b"a\r\n"),
    "last line ends in CR": (b"a\r\nb\r", b"a\r\nb\r\n"),
    "CR alone": (b"\r", b"\r\n"),
    "CR after a clean line": (b"a\r\n\r", b"a\r\n\r\n"),
    "last line ends in CR CR": (b"a\r\r", b"a\r\n"),
    "last line ends in LF": (b"a\r\nb\n", b"a\r\nb\r\n"),
    "NUL and 8-bit": (b"\0\xff\n\x85\x0b\x0c", b"\0\xff\r\n\x85\x0b\x0c\r\n"),
    "CR before an empty line": (
        b"Subject: a\r\r\n\r\r\nReply-To: b\r\r\n",
        b"Subject: a\r\n\r\nReply-To: b\r\n",
    ),
    "CR LF CR CR LF": (b"\r\n\r\r\n\n\r\r\r\n", b"\r\n\r\n\r\n\r\n"),
    "stray CRs and CRs before LF": (
        b"\r\ra\r\r\rb\r\r\n\rc\r\r",
        b"  a   b\r\n c\r\n",
    ),
    "many CRs before LF": (b"a" + b"\r" * 77 + b"\nb\r\n", b"a\r\nb\r\n"),
    "many stray CRs": (b"a" + b"\r" * 77 + b"b\r\n", b"a" + b" " * 77 + b"b\r\n"),
    "NUL between CR and LF": (b"a\r\0\nb\r\n", b"a \0\r\nb\r\n"),
}


@pytest.mark.parametrize(("octets", "clean"), LINE_ENDS.values(), ids=LINE_ENDS.keys())
def test_line_repair(octets: bytes, clean: bytes) -> None:
    for pieces in cuts(octets):
        assert transformed(LineRepair(), pieces) == clean
    for pieces in cuts(clean):
        assert transformed(LineRepair(), pieces) == clean


def test_line_repair_keeps_long_lines() -> None:
    line = b"x" * 1_000_000
    assert transformed(LineRepair(), [line, b"\r\n" + line]) == (line + b"\r\n") * 2


@pytest.mark.parametrize(
    "number", [1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 200, 5000]
)
def test_line_repair_takes_any_number_of_crs(number: int) -> None:
    crs = b"\r" * number
    octets = b"a" + crs + b"\nb\r\n" + crs + b"\nc" + crs + b"d\r\r\n" + crs
    clean = b"a\r\nb\r\n\r\nc" + b" " * number + b"d\r\n\r\n"
    for place in (0, 1, number // 2, number + 1, number * 3):
        assert transformed(LineRepair(), [octets[:place], octets[place:]]) == clean


@pytest.mark.parametrize("end", [b"\r\n", b"\n", b"x\r\n", b""], ids=repr)
def test_line_repair_of_crs_without_end(end: bytes) -> None:
    """They are counted, not kept; a run that is too long shrinks to a block's."""
    megabyte = b"\r" * (1 << 20)
    repair = LineRepair()
    for _ in range(32):
        assert repair.feed(megabyte) == b""
    clean = b" " * program.BLOCK + end if end.startswith(b"x") else b"\r\n"
    assert repair.feed(end) + repair.finish() == clean
    assert transformed(LineRepair(), [megabyte * 4 + end]) == clean


# --- Dots for the server -----------------------------------------------------

# Lines, and the same lines stuffed.
STUFFED = {
    "nothing": (b"", b""),
    "no dot": (b"a\r\n", b"a\r\n"),
    "dot alone": (b".\r\n", b"..\r\n"),
    "dots alone": (b"..\r\n", b"...\r\n"),
    "dot and text": (b".a\r\n", b"..a\r\n"),
    "second line": (b"a\r\n.\r\n", b"a\r\n..\r\n"),
    "all lines": (b".\r\n.\r\n.\r\n", b"..\r\n..\r\n..\r\n"),
    "dots elsewhere": (b"a.b\r\n .\r\na.\r\n", b"a.b\r\n .\r\na.\r\n"),
    "empty lines between": (b"\r\n\r\n.\r\n", b"\r\n\r\n..\r\n"),
    "NULs and dots": (
        b"\0\0.\0.\r\n\0\r\n\0\0\0.\r\n.\0.\r\na\0.\0\0..\r\n\0a.\r\n",
        b".\0\0.\0.\r\n\0\r\n.\0\0\0.\r\n..\0.\r\na\0.\0\0..\r\n\0a.\r\n",
    ),
}


class Stuffing(DotStuffer):
    """The stuffer with the other transformers' interface."""

    def finish(self) -> bytes:
        return b""


@pytest.mark.parametrize(("octets", "stuffed"), STUFFED.values(), ids=STUFFED.keys())
def test_dot_stuffer(octets: bytes, stuffed: bytes) -> None:
    for pieces in cuts(octets):
        assert transformed(Stuffing(), pieces) == stuffed


@pytest.mark.parametrize(
    "number", [1, 2, 15, 16, 17, 31, 32, 33, 34, 63, 64, 200, 5000]
)
def test_dot_stuffer_takes_any_number_of_nuls(number: int) -> None:
    line = bytes(number) + b".\r\n"
    others = b"a" + line + bytes(number) + b"\r\n" + bytes(number) + b"a.\r\n"
    octets = line + others + b"\0.\r\n" + line
    stuffed = b"." + line + others + b".\0.\r\n." + line
    for place in (0, 1, number // 2, number + 1, number * 3):
        assert transformed(Stuffing(), [octets[:place], octets[place:]]) == stuffed


@pytest.mark.parametrize("size", [1, 1000, 1 << 20])
def test_dot_stuffer_holds_a_bounded_number_of_nuls(size: int) -> None:
    """A dot that comes later has a space before it."""
    nuls = [bytes(size)] * ((1 << 20) // size)
    stuffed = transformed(Stuffing(), [*nuls, b".\r\n", b".\r\n"])
    assert stuffed == bytes(size * len(nuls)) + b" .\r\n..\r\n"
    stuffed = transformed(Stuffing(), [*nuls, b"a.\r\n", b".\r\n"])
    assert stuffed == bytes(size * len(nuls)) + b"a.\r\n..\r\n"


# --- The header field --------------------------------------------------------

# A message with clean line ends, and the same with the field at the end of the
# header section.
WITH_FIELD = {
    "header and body": (b"A: b\r\n\r\nc\r\n", b"A: b\r\n" + FIELD + b"\r\nc\r\n"),
    "several empty lines": (
        b"A: b\r\n\r\n\r\n\r\nc\r\n",
        b"A: b\r\n" + FIELD + b"\r\n\r\n\r\nc\r\n",
    ),
    "several fields": (
        b"A: b\r\nC: d\r\n\te\r\n\r\nf\r\n",
        b"A: b\r\nC: d\r\n\te\r\n" + FIELD + b"\r\nf\r\n",
    ),
    "empty body": (b"A: b\r\n\r\n", b"A: b\r\n" + FIELD + b"\r\n"),
    "no body": (b"A: b\r\n", b"A: b\r\n" + FIELD),
    "no header": (b"\r\nc\r\n", FIELD + b"\r\nc\r\n"),
    "no header, empty lines": (b"\r\n\r\nc\r\n", FIELD + b"\r\n\r\nc\r\n"),
    "empty line alone": (b"\r\n", FIELD + b"\r\n"),
    "nothing": (b"", FIELD),
    "a line of blanks is no end": (
        b"A: b\r\n \r\n\r\nc\r\n",
        b"A: b\r\n \r\n" + FIELD + b"\r\nc\r\n",
    ),
    "a line that is no field": (
        b"A: b\r\nHello world: c\r\n\r\nD: e\r\n",
        b"A: b\r\n" + FIELD + b"Hello world: c\r\n\r\nD: e\r\n",
    ),
    "no field at all": (b"Hello\r\n\r\nA: b\r\n", FIELD + b"Hello\r\n\r\nA: b\r\n"),
    "no colon, no end": (b"A: b\r\nSubject\r\n", b"A: b\r\n" + FIELD + b"Subject\r\n"),
    "no name": (b"A: b\r\n: c\r\n\r\n", b"A: b\r\n" + FIELD + b": c\r\n\r\n"),
    "blanks before the colon": (
        b"A \t: b\r\nC : d\r\n\r\n",
        b"A \t: b\r\nC : d\r\n" + FIELD + b"\r\n",
    ),
    "8-bit name": (
        b"A: b\r\n\xe4: c\r\n\r\n",
        b"A: b\r\n" + FIELD + b"\xe4: c\r\n\r\n",
    ),
    "NUL in a name": (
        b"A: b\r\nC\0: d\r\n\r\n",
        b"A: b\r\n" + FIELD + b"C\0: d\r\n\r\n",
    ),
    "all that a name may have": (
        b"!#$%&'*+-./0^_`{|}~\\\"(),;<=>?@[]: a\r\n\r\n",
        b"!#$%&'*+-./0^_`{|}~\\\"(),;<=>?@[]: a\r\n" + FIELD + b"\r\n",
    ),
    "mbox": (
        b"From a@b Thu\r\nA: b\r\n\r\nc\r\n",
        b"From a@b Thu\r\nA: b\r\n" + FIELD + b"\r\nc\r\n",
    ),
    "mbox, quoted and twice": (
        b">From a\r\n>>From b\r\nA: b\r\nFrom c\r\n\r\n",
        b">From a\r\n>>From b\r\nA: b\r\n" + FIELD + b"From c\r\n\r\n",
    ),
    "mbox line alone": (b"From a\r\n", b"From a\r\n" + FIELD),
    "mbox and no field": (b"From a\r\nb\r\n", b"From a\r\n" + FIELD + b"b\r\n"),
    "first line begins with a blank": (
        b" x\r\nA: b\r\n\r\nc\r\n",
        FIELD + b"\r\n x\r\nA: b\r\n\r\nc\r\n",
    ),
    "first line begins with a tab": (b"\tA: b\r\n", FIELD + b"\r\n\tA: b\r\n"),
    "mbox and a blank": (b"From a\r\n x\r\n", b"From a\r\n" + FIELD + b"\r\n x\r\n"),
    "a later empty line": (
        b"A: b\r\n\r\nc\r\n\r\nd\r\n",
        b"A: b\r\n" + FIELD + b"\r\nc\r\n\r\nd\r\n",
    ),
}


@pytest.mark.parametrize(
    ("message", "expected"), WITH_FIELD.values(), ids=WITH_FIELD.keys()
)
def test_header_at_the_end(message: bytes, expected: bytes) -> None:
    for pieces in cuts(message):
        assert transformed(HeaderInserter(FIELD), pieces) == expected


@pytest.mark.parametrize(
    "field",
    [RECEIVED, RECEIVED.lower(), RECEIVED.upper(), b"Received:\r\n\tby y\r\n"],
    ids=["usual", "lower case", "upper case", "folded"],
)
@pytest.mark.parametrize("message", [row[0] for row in WITH_FIELD.values()], ids=repr)
def test_received_on_top(field: bytes, message: bytes) -> None:
    """Only an mbox's lines stay before it; a first line is not its continuation."""
    mbox = b"".join(re.findall(rb"\A(?:>*From .*\r\n)+", message))
    rest = message[len(mbox) :]
    separator = b"\r\n" if rest.startswith((b" ", b"\t")) else b""
    for pieces in cuts(message):
        made = transformed(HeaderInserter(field), pieces)
        assert made == mbox + field + separator + rest


# The start of a line without end, and whether the field has its place before it.
ENDLESS_LINES = {
    "field": (b"A: ", b"x", False),
    "folded": (b"A: b\r\n ", b" ", False),
    "mbox": (b"From ", b"x", False),
    "name": (b"A: b\r\n", b"x", True),
    "blanks after a name": (b"A: b\r\nC", b" ", True),
    "first line": (b"", b"x", True),
    "first line of >": (b"", b">", True),
    "NULs": (b"A: b\r\n", b"\0", True),
}


@pytest.mark.parametrize(
    ("size", "total"), [(1, 4_000), (100, 40_000), (300_000, 900_000)]
)
@pytest.mark.parametrize(
    ("start", "octet", "is_place"), ENDLESS_LINES.values(), ids=ENDLESS_LINES.keys()
)
def test_header_with_an_endless_line(
    start: bytes, octet: bytes, is_place: bool, size: int, total: int
) -> None:
    """Less than two lines of RFC 5322 are held back."""
    inserter = HeaderInserter(FIELD)
    line = octet * total
    made = [inserter.feed(start)]
    most = len(FIELD) if is_place else 0
    held = len(start) - len(made[0])
    for _ in range(total // size):
        made.append(inserter.feed(octet * size))
        held += size - len(made[-1])
        assert -most <= held <= 2 * 998 + 2
    made += [inserter.feed(b"\r\n\r\n"), inserter.finish()]
    expected = [FIELD, line, b"\r\n\r\n"]
    if not is_place:
        expected = [line, b"\r\n", FIELD, b"\r\n"]
    elif not start.endswith(b"\n"):
        start, name = start[:-1], start[-1:]
        expected.insert(1, name)
    assert b"".join(made) == start + b"".join(expected)


@pytest.mark.parametrize("name", [b"x" * 998, b"x" * 998 + b" " * 998])
def test_header_with_a_long_name(name: bytes) -> None:
    for line, is_field in (
        (name + b": y\r\n", True),
        (name + name[-1:] + b":\r\n", False),
    ):
        expected = line + FIELD if is_field else FIELD + line
        for size in (1, 997, 998, 999, 1997, 5000):
            octets = line + b"\r\n"
            pieces = [octets[i : i + size] for i in range(0, len(octets), size)]
            assert transformed(HeaderInserter(FIELD), pieces) == expected + b"\r\n"


def test_field_that_only_resembles_received() -> None:
    for field in (b"X-Received: x\r\n", b"Received-SPF: pass\r\n", b"Receive: x\r\n"):
        pieces = [b"A: b\r\n\r\nc\r\n"]
        expected = b"A: b\r\n" + field + b"\r\nc\r\n"
        assert transformed(HeaderInserter(field), pieces) == expected


@pytest.mark.parametrize("message", [row[0] for row in WITH_FIELD.values()], ids=repr)
def test_no_field(message: bytes) -> None:
    for pieces in cuts(message):
        assert transformed(HeaderInserter(b""), pieces) == message


# --- To the server: all of it ------------------------------------------------


def written(pieces: list[bytes], field: bytes = b"") -> bytes:
    """Return the mail data for a message that comes in these pieces."""
    return transformed(MailDataWriter(field), pieces)


def assert_unambiguous(wire: bytes) -> None:
    """No server can see more than one end, or more than one kind of line end."""
    lines = wire.split(b"\r\n")
    assert lines[-2:] == [b".", b""]
    assert b"." not in lines[:-2]
    assert all(b"\r" not in line and b"\n" not in line for line in lines)


# A message, and the mail data that the server gets for it.
MESSAGES = {
    "nothing": (b"", b".\r\n"),
    "one line": (b"a\r\n", b"a\r\n.\r\n"),
    "LF": (b"a\n.\nb\n", b"a\r\n..\r\nb\r\n.\r\n"),
    "no end": (b"a", b"a\r\n.\r\n"),
    "a dot without end": (b".", b"..\r\n.\r\n"),
    "a dot and CR without end": (b".\r", b"..\r\n.\r\n"),
    "a dot after CR": (b"a\r.\r\n", b"a .\r\n.\r\n"),
    "a dot between CRs": (b"\r\n.\r", b"\r\n..\r\n.\r\n"),
    "lines of dots": (b".\n..\n...\n", b"..\r\n...\r\n....\r\n.\r\n"),
    "empty line": (b"\n", b"\r\n.\r\n"),
    "NUL before the dot": (b"\n\0.\n", b"\r\n.\0.\r\n.\r\n"),
    "NULs before the dot": (b"\0\0.\n\0\0.", b".\0\0.\r\n.\0\0.\r\n.\r\n"),
    "NULs before no dot": (b"\0\0a.\n\0\0", b"\0\0a.\r\n\0\0\r\n.\r\n"),
}


@pytest.mark.parametrize(("message", "wire"), MESSAGES.values(), ids=MESSAGES.keys())
def test_writer(message: bytes, wire: bytes) -> None:
    for pieces in cuts(message):
        assert written(pieces) == wire
    assert_unambiguous(wire)


@pytest.mark.parametrize("ending", NO_ENDS.values(), ids=NO_ENDS.keys())
def test_writer_disarms(ending: bytes) -> None:
    """A filter's output has one end only, and so has a client's message."""
    for message in (b"a" + ending + b"QUIT\r\n", b"a" + ending, ending + b"b", ending):
        for pieces in cuts(message):
            wire = written(pieces)
            assert_unambiguous(wire)
            assert read([wire]) == (transformed(LineRepair(), [message]), b"")


WRITTEN_WITH_FIELD: dict[str, tuple[bytes, bytes]] = {
    "CRLF": (b"A: b\r\n\r\nc\r\n", b"A: b\r\n" + FIELD + b"\r\nc\r\n.\r\n"),
    "LF": (b"A: b\n\nc\n", b"A: b\r\n" + FIELD + b"\r\nc\r\n.\r\n"),
    "CRLF then LF": (b"A: b\r\n\nc\n", b"A: b\r\n" + FIELD + b"\r\nc\r\n.\r\n"),
    "LF then CRLF": (b"A: b\n\r\nc\n", b"A: b\r\n" + FIELD + b"\r\nc\r\n.\r\n"),
    "CRs before every line end": (
        b"A: b\r\r\n\r\r\nC: d\r\r\n",
        b"A: b\r\n" + FIELD + b"\r\nC: d\r\n.\r\n",
    ),
    "CR is no line end": (
        b"A: b\r\rc\r\n\r\nd\r\n",
        b"A: b  c\r\n" + FIELD + b"\r\nd\r\n.\r\n",
    ),
    "CR CR LF": (
        b"A: b\r\r\n\r\nc\r\n",
        b"A: b\r\n" + FIELD + b"\r\nc\r\n.\r\n",
    ),
    "no body": (b"A: b\n", b"A: b\r\n" + FIELD + b".\r\n"),
    "no end": (b"A: b", b"A: b\r\n" + FIELD + b".\r\n"),
    "ends in CR": (b"A: b\r", b"A: b\r\n" + FIELD + b".\r\n"),
    "no header": (b"\nc", FIELD + b"\r\nc\r\n.\r\n"),
    "empty line alone": (b"\n", FIELD + b"\r\n.\r\n"),
    "nothing": (b"", FIELD + b".\r\n"),
    "dots around the place": (
        b".A: b\n\n.c\n",
        b"..A: b\r\n" + FIELD + b"\r\n..c\r\n.\r\n",
    ),
    "dot after the place": (b"\n.\n", FIELD + b"\r\n..\r\n.\r\n"),
}


@pytest.mark.parametrize(
    ("message", "wire"), WRITTEN_WITH_FIELD.values(), ids=WRITTEN_WITH_FIELD.keys()
)
def test_writer_with_field(message: bytes, wire: bytes) -> None:
    assert_unambiguous(wire)
    for pieces in cuts(message):
        assert written(pieces, FIELD) == wire


@pytest.mark.parametrize(
    "message", [row[0] for row in WRITTEN_WITH_FIELD.values()], ids=repr
)
def test_writer_with_received(message: bytes) -> None:
    for pieces in cuts(message):
        assert written(pieces, RECEIVED) == RECEIVED + written([message])


@pytest.mark.parametrize("field", [b".X: y\r\n", b".\r\n"], ids=["dot", "dot alone"])
@pytest.mark.parametrize("message", [b"", b"A: b\n", b"A: b\n\nc\n", b"\nc\n"])
def test_writer_stuffs_the_field(field: bytes, message: bytes) -> None:
    for pieces in cuts(message):
        wire = written(pieces, field)
        assert_unambiguous(wire)
        assert b"." + field in wire


# --- Blocks of the usual size -------------------------------------------------

BLOCK = 65_536


@pytest.mark.parametrize("place", range(-6, 2))
def test_end_across_a_block(place: int) -> None:
    """The end of the data lies at each place around the border of a block."""
    message = b"x" * (BLOCK + place) + b"\r\n"
    octets = message + b".\r\n" + b"QUIT\r\n"
    pieces = [octets[:BLOCK], octets[BLOCK:]]
    assert read(pieces) == (message, b"QUIT\r\n")


@pytest.mark.parametrize("place", range(-6, 2))
@pytest.mark.parametrize(
    ("field", "where"),
    [(b"", lambda head: head), (FIELD, lambda head: head + FIELD)],
    ids=["no field", "field"],
)
def test_header_section_across_a_block(
    place: int, field: bytes, where: Callable[[bytes], bytes]
) -> None:
    """The end of the header section lies at each place around such a border."""
    head = b"A: " + b"x" * (BLOCK + place) + b"\r\n"
    octets = head + b"\r\n.c\r\n"
    pieces = [octets[:BLOCK], octets[BLOCK:]]
    assert written(pieces, field) == where(head) + b"\r\n..c\r\n.\r\n"


# --- What smtplib sends -------------------------------------------------------------


class Recorder(smtplib.SMTP):
    """smtplib's client without a server, which keeps what it would send."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = b""

    def send(self, s: bytes | str) -> None:  # type: ignore[override]
        self.sent += s if isinstance(s, bytes) else s.encode("ascii")

    def getreply(self) -> tuple[int, bytes]:
        return (250 if self.sent.endswith(b"\r\n.\r\n") else 354), b""


@pytest.mark.parametrize(
    "message",
    [b"a\n.b\r\n", b"a\n..b\n.\n", b".\n.\n\n...\r\n.", b"a\r\r\n.b\n\r.c\n"],
    ids=repr,
)
def test_smtplib(message: bytes) -> None:
    """It stuffs after each LF; the server gets the lines that were handed to it."""
    client = Recorder()
    client.data(message)
    wire = client.sent.removeprefix(b"data\r\n")
    meant = message if message.endswith(b"\r\n") else message + b"\r\n"
    for pieces in cuts(wire):
        received, rest = read(pieces)
        assert rest == b""
        assert received == meant
        assert read([written([received])])[0] == transformed(LineRepair(), [meant])


# --- Time -------------------------------------------------------------------------

# What a block consists of: octets that are many times the same.
COSTLY = {
    **{
        repr(p): p
        for p in (b"\0", b"\r", b"\n", b".", b" ", b":", b">", b"a.", b"\xff")
    },
    **{repr(p): p for p in (b"\r\n", b"\n\r", b"\r\r\n", b"a\n", b"a\r\n", b"\rx\n")},
    **{
        repr(p): p
        for p in (b"\n.", b"\n..", b"\r\n.", b"\r\n..", b"\r\n.\r", b".\r\n\n")
    },
    **{
        repr(p): p
        for p in (b"\n\0", b"\0.", b"\0\r\n", b"\r\n\0.", b"\0.\n.", b"\r\0.\n")
    },
    **{
        f"LF, {n} NULs, dot": b"\n" + bytes(n) + b"."
        for n in (1, 2, 9, 31, 32, 33, 200)
    },
    **{f"{n} CRs, LF": b"\r" * n + b"\n" for n in (3, 15, 31, 32, 33, 63, 64, 1000)},
    **{f"{n} CRs": b"\r" * n + b"x" for n in (3, 31, 1000)},
    "LF NUL dot and many NULs": b"\n\0." * 20_000 + b"\n" + bytes(100) + b"x",
    "CRs LF and many CRs": b"\r\r\n" * 20_000 + b"\r" * 100 + b"\n",
    "dots after LF and CRLF": b"\n.." * 20 + b"\r\n...",
    "fields": b"a:\r\n",
    "folded": b"a:\r\n" + b" \r\n" * 1000,
    "mbox lines": b"From \r\n",
    "long names": b"a" * 998 + b" " * 998 + b":\r\n",
    "a long line": b"a:" + b"b" * 100_000 + b"\r\n",
}


def seconds(octets: bytes, size: int, field: bytes) -> Iterator[float]:
    """Measure the processor time for octets in blocks of a size, three times."""
    blocks = [octets[i : i + size] for i in range(0, len(octets), size)]
    for _ in range(3):
        reader, writer = MailDataReader(), MailDataWriter(field)
        start = time.thread_time()
        for block in blocks:
            writer.feed(reader.feed(block))
        writer.finish()
        yield time.thread_time() - start


@pytest.mark.parametrize("field", [b"", FIELD], ids=["no field", "field"])
@pytest.mark.parametrize(
    ("size", "total"), [(1, 1 << 11), (256, 1 << 16), (1 << 18, 1 << 20)]
)
def test_no_octets_are_costly(size: int, total: int, field: bytes) -> None:
    """Nothing takes many times what base64 takes, which C's own functions do fast.

    Of blocks of 256 KiB, line feeds alone take some 20 times as long, since each of
    them becomes two octets; a Python function a line, or a match of a regular
    expression, would be some 200 times.
    """
    text = base64.encodebytes(bytes(range(57))).replace(b"\n", b"\r\n")
    usual = min(seconds((text * (total // len(text) + 1))[:total], size, field))
    for name, pattern in COSTLY.items():
        octets = (pattern * (total // len(pattern) + 1))[:total]
        # The second and the third time count only where the first is too long.
        ratios = (each / usual for each in seconds(octets, size, field))
        assert any(ratio < 120 for ratio in ratios), name
