"""The pure parts against random octets, from a seed that is always the same.

Every function takes any octets and raises nothing but its own exception; every
block transformer gives the same however its input is cut, and what it gives is
what an obvious, slow reference says.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from typing import Callable, TypeVar
from unittest import mock

import pytest

import proxsmtpd as program
from helpers import outcomes
from proxsmtpd import (
    BadReply,
    Command,
    CommandBuffer,
    DotStuffer,
    FilterFailure,
    HeaderInserter,
    LastLine,
    LineRepair,
    MailDataReader,
    MailDataWriter,
    Peer,
    Refusal,
    Reply,
    ReplyBuffer,
)

ROUNDS = 2500  # of each test, so that all of them take some seconds
FIELD = b"X-Filter: yes\r\n\tand more\r\n"
RECEIVED = b"received: from x\r\n"

Result = TypeVar("Result")
Failure = TypeVar("Failure", bound=Exception)

# What each kind of octets is made of: mostly what means something there.
ANY = [bytes([octet]) for octet in range(256)]
LINES = [b"\r\n", b"\r", b"\n", b".", b"\r\n.", b"\r\n.\r\n", b"\0", b"a", b"b c", b""]
HEADER = [
    *(b"\r\n", b"\n", b"\r", b" ", b"\t", b":", b"a", b"Subject", b"b: c\r\n", b"\0"),
    *(
        b"From x\r\n",
        b"From",
        b">From ",
        b">",
        b"\r\n\r\n",
        b"x y: z\r\n",
        b"e: f\n g\n",
    ),
]
COMMANDS = [
    *(b"DATA", b"bdat", b"MAIL FROM:", b"RCPT TO:", b"EHLO ", b"AUTH ", b"XFORWARD "),
    *(b"<", b">", b'"', b"\\", b":", b"@", b" ", b"\t", b"\v", b"\f", b"a", b"=", b"+"),
    *(b"<a", b"@b>", b"@b.c>", b".", b"(", b")"),
    *(b"+0A", b"ADDR=", b"HELO=", b"[UNAVAILABLE]", b"IPV6:", b"\r\n", b"\r", b"\n"),
]
REPLIES = [
    *(b"250", b"250-", b"250 ", b"354 ", b"421-", b"550 ", b"000 ", b"25", b"x", b"-"),
    *(b"STARTTLS", b"XCLIENT ADDR", b"PIPELINING", b"=", b" ", b"\t", b"\r\n", b"\n"),
    *(b"\r", b"\0", b"\x1b", b"\xff"),
]
SETTINGS = [
    *(setting.name.encode() for setting in program.SETTINGS),
    *(b": ", b":", b"\n", b"\r\n", b"#", b" ", b"0", b"25", b"on", b"file", b"/x"),
    *(b"[", b"::1", b"]:25", b"localhost", b"%i", b"%", b"\\n", b"\\", b"550 "),
    *(b"250 No", b"\0", b"\xe4", b"\xc3\xa4", b"\xc2\xa0", b"\x1b"),
]


def mixture(rng: random.Random, words: Sequence[bytes], most: int = 40) -> bytes:
    """Return some of the words in any order, with a few octets of any value."""
    picked = (
        rng.choice(ANY) if rng.random() < 0.1 else rng.choice(words)
        for _ in range(rng.randrange(most))
    )
    return b"".join(picked)


def mixtures(
    seed: str, *kinds: Sequence[bytes]
) -> Iterator[tuple[random.Random, bytes]]:
    """Return mixtures of each kind, with the generator for other random choices."""
    rng = random.Random(seed)
    for _ in range(ROUNDS):
        for words in kinds:
            yield rng, mixture(rng, words)


def pieces_of(rng: random.Random, octets: bytes) -> list[bytes]:
    """Cut the octets at some places, or at many."""
    number = rng.choice([0, 1, 2, 5, len(octets)])
    places = sorted(rng.randrange(len(octets) + 1) for _ in range(number))
    return [octets[i:j] for i, j in zip([0, *places], [*places, len(octets)])]


# --- References: obvious, slow, and for whole messages only --------------------


def reference_read(octets: bytes) -> tuple[bytes, bytes | None]:
    """Return the message in mail data and the octets after it; None: no end."""
    message = b""
    while b"\r\n" in octets:
        line, _, octets = octets.partition(b"\r\n")
        if line == b".":
            return message, octets
        message += reference_unstuff(line) + b"\r\n"
    return message, None


def reference_unstuff(line: bytes) -> bytes:
    """Remove the dots that a client may have added between two CRLF."""
    first, *others = line.split(b"\n")
    others = [part[1:] if part.startswith(b"..") else part for part in others]
    return b"\n".join([first.removeprefix(b"."), *others])


def reference_repair(octets: bytes) -> bytes:
    """Return the same lines, each ended by CRLF, without any other CR or LF."""
    lines = octets.split(b"\n")
    if lines[-1] == b"":
        lines.pop()
    stripped = (line.rstrip(b"\r") for line in lines)
    return b"".join(line.replace(b"\r", b" ") + b"\r\n" for line in stripped)


def reference_insert(field: bytes, message: bytes) -> bytes:
    """Return a message of clean lines, with the field in its place."""
    lines = message.split(b"\r\n")[:-1]
    place = 0
    while place < len(lines) and re.match(rb">{0,9}From ", lines[place]):
        place += 1
    is_folded = lines[place : place + 1] and lines[place][:1] in (b" ", b"\t")
    separator = [b""] if field and is_folded else []
    if field != RECEIVED and not separator:
        starts = re.compile(rb"[ \t]|[!-9;-~]+[ \t]*:")
        while place < len(lines) and starts.match(lines[place]):
            place += 1
    head, body = lines[:place], separator + lines[place:]
    return (
        b"".join(line + b"\r\n" for line in head)
        + field
        + b"".join(line + b"\r\n" for line in body)
    )


def reference_stuff(message: bytes) -> bytes:
    """Return a message of clean lines, with a dot before each that begins with one.

    NULs before that dot do not count.
    """
    lines = message.split(b"\r\n")[:-1]
    return b"".join(
        (b"." if line.lstrip(b"\0")[:1] == b"." else b"") + line + b"\r\n"
        for line in lines
    )


# --- The block transformers ----------------------------------------------------


def read(pieces: Sequence[bytes]) -> tuple[bytes, bytes | None]:
    """Read pieces with the reader, in the reference's form."""
    reader = MailDataReader()
    message = b""
    for number, piece in enumerate(pieces, 1):
        message += reader.feed(piece)
        if reader.ended:
            return message, reader.rest + b"".join(pieces[number:])
    return message, None


def test_reader() -> None:
    for rng, octets in mixtures("reader", LINES, ANY):
        found = read(pieces_of(rng, octets))
        message, rest = reference_read(octets)
        if rest is not None:
            assert found == (message, rest)
            continue
        # Not all of the message needs to be out before its end has come.
        ended = octets + b"\r\n.\r\n"
        message, rest = reference_read(ended)
        assert read(pieces_of(rng, ended)) == (message, rest)
        assert message.startswith(found[0])
        assert found[1] is None


def test_line_repair() -> None:
    for rng, octets in mixtures("repair", LINES, ANY):
        repair = LineRepair()
        made = b"".join(map(repair.feed, pieces_of(rng, octets))) + repair.finish()
        assert made == reference_repair(octets)


@pytest.mark.parametrize("field", [FIELD, RECEIVED, b""], ids=["end", "top", "none"])
def test_header_inserter(field: bytes) -> None:
    for rng, octets in mixtures(f"header {field!r}", LINES, HEADER):
        message = reference_repair(octets)
        inserter = HeaderInserter(field)
        pieces = pieces_of(rng, message)
        made = b"".join(map(inserter.feed, pieces)) + inserter.finish()
        assert made == reference_insert(field, message)


def test_dot_stuffer() -> None:
    for rng, octets in mixtures("stuffer", LINES):
        message = reference_repair(octets)
        stuffer = DotStuffer()
        made = b"".join(map(stuffer.feed, pieces_of(rng, message)))
        assert made == reference_stuff(message)


def written(pieces: Sequence[bytes], field: bytes) -> bytes:
    """Return the mail data that the writer makes of pieces."""
    writer = MailDataWriter(field)
    return b"".join(map(writer.feed, pieces)) + writer.finish()


@pytest.mark.parametrize("field", [FIELD, RECEIVED, b""], ids=["end", "top", "none"])
def test_writer(field: bytes) -> None:
    for rng, octets in mixtures(f"writer {field!r}", LINES, HEADER, ANY):
        wire = written(pieces_of(rng, octets), field)
        message = reference_insert(field, reference_repair(octets))
        assert wire == reference_stuff(message) + b".\r\n"
        *lines, end, nothing = wire.split(b"\r\n")
        assert (end, nothing) == (b".", b"")
        assert b"." not in lines
        assert not any(b"\r" in line or b"\n" in line for line in lines)


def test_round_trip() -> None:
    """A reader reads the writer's message, with clean line ends."""
    for rng, octets in mixtures("round trip", LINES, ANY):
        wire = written(pieces_of(rng, octets), b"")
        after = mixture(rng, LINES)
        found = read(pieces_of(rng, wire + after))
        assert found == (reference_repair(octets), after)


# How clients stuff: only where SMTP has a line's end, or also after a bare LF, as
# smtplib does.  From the first one, two dots after a bare LF cannot be told from the
# second one's.
STUFFINGS = {
    "CRLF": (rb"(\A|\r\n)\.", rb"\n\.\."),
    "every LF": (rb"(\A|\n)\.", None),
}


@pytest.mark.parametrize(
    ("line_start", "excluded"), STUFFINGS.values(), ids=STUFFINGS.keys()
)
def test_relayed_lines_are_the_clients(
    line_start: bytes, excluded: bytes | None
) -> None:
    """However it is stuffed and cut, the server gets the lines that were meant."""
    relayed = 0
    for rng, octets in mixtures(f"relay {line_start!r}", LINES, ANY):
        bare = octets.replace(b"\r\n", b"")
        if excluded and re.search(excluded, bare):
            continue
        meant = octets if octets.endswith(b"\r\n") else octets + b"\r\n"
        wire = re.sub(line_start, rb"\1..", meant) + b".\r\n"
        reader, writer = MailDataReader(), MailDataWriter()
        sent = b"".join(writer.feed(reader.feed(p)) for p in pieces_of(rng, wire))
        assert reader.ended
        assert reader.rest == b""
        assert sent + writer.finish() == reference_stuff(reference_repair(meant)) + (
            b".\r\n"
        )
        relayed += 1
    assert relayed > ROUNDS


# --- The buffers ---------------------------------------------------------------


def without_cuts_at_bare_lf(pieces: Sequence[bytes]) -> list[bytes]:
    """Return the pieces so that none ends in a bare LF, for which nobody waits."""
    joined = [b""]
    for piece in pieces:
        joined[-1] += piece
        if not b"".join(joined).replace(b"\r\n", b"").endswith(b"\n"):
            joined.append(b"")
    return joined


@pytest.mark.parametrize("limit", [8, 2_048])
def test_command_buffer(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "COMMAND_LIMIT", limit)
    monkeypatch.setattr(program, "AUTH_LIMIT", limit)
    too_long = Reply(b"500 Line too long\r\n")
    for rng, octets in mixtures("commands", COMMANDS):
        stream = octets + b"."  # so that it does not end in a bare LF
        *lines, begun = stream.split(b"\r\n")
        expected = [line if len(line) + 2 <= limit else too_long for line in lines]
        buffer = CommandBuffer()
        pieces = without_cuts_at_bare_lf(pieces_of(rng, stream))
        assert outcomes(buffer, pieces) == expected
        assert begun.endswith(buffer.take_all())


def test_command_buffer_cut_anywhere() -> None:
    """A line may be refused for a bare LF, but each that is given is one line."""
    for rng, octets in mixtures("cut commands", COMMANDS, LINES):
        for line in outcomes(CommandBuffer(), pieces_of(rng, octets)):
            assert isinstance(line, bytes)
            if isinstance(line, Reply):
                assert line == b"500 Lines must end in CRLF\r\n"
            else:
                assert b"\r\n" not in line
                assert line + b"\r\n" in octets


def reference_replies(octets: bytes) -> list[bytes] | None:
    """Return the replies in a stream of octets; None if something in it is none."""
    found: list[bytes] = []
    begun: list[bytes] = []
    for whole in octets.split(b"\n")[:-1]:
        line = whole.removesuffix(b"\r")
        code, mark = line[:3], line[3:4]
        if len(code) < 3 or code[0] not in b"2345" or not code.isdigit():
            return None
        if mark not in (b"", b" ", b"-"):
            return None
        begun.append(line.replace(b"\r", b"?").replace(b"\0", b"?"))
        if mark != b"-":
            found.append(b"".join(code + line[3:] + b"\r\n" for line in begun))
            begun = []
    return found


def replies_in(pieces: Sequence[bytes]) -> list[bytes] | None:
    """Read pieces with the buffer, in the reference's form."""
    buffer = ReplyBuffer()
    found: list[bytes] = []
    try:
        for piece in pieces:
            reply = buffer.take(piece)
            while reply is not None:
                found.append(reply)
                reply = buffer.next_reply()
    except BadReply:
        return None
    return found


def test_reply_buffer() -> None:
    for rng, octets in mixtures("replies", REPLIES, ANY):
        assert replies_in(pieces_of(rng, octets)) == reference_replies(octets)


def likely_reply(rng: random.Random) -> bytes:
    """Return octets that are a 250 of some lines more often than not."""
    marks = [b"-"] * rng.randrange(6) + [rng.choice([b" ", b""])]
    texts = (mixture(rng, REPLIES, 5).replace(b"\n", b"") for _ in marks)
    return b"".join(
        b"250" + mark + (text if mark else b"") + b"\r\n"
        for mark, text in zip(marks, texts)
    )


def test_hello() -> None:
    rng = random.Random("hello")
    for _ in range(ROUNDS):
        for reply in map(Reply, replies_in([likely_reply(rng)]) or []):
            for extended in (False, True):
                made = program.rewrite_hello(reply, extended=extended)
                assert replies_in([made]) == [made]
                assert made[4:].startswith(b"smtp.passthru\r\n")
                words = [line[4:].split(b" ")[0].upper() for line in made.lines[1:]]
                assert words.count(b"PIPELINING") == 1 or not extended
                assert b"STARTTLS" not in words or not extended
            offered = program.offered_attributes(reply, b"XCLIENT")
            assert offered is None or b"XCLIENT" in reply.upper()


def test_last_line() -> None:
    words = [b"\n", b"\r\n", b" ", b"\t", b"550 No", b"x", b"\n\n", b" " * 600]
    for rng, octets in mixtures("last line", words):
        whole, cut = LastLine(), LastLine()
        whole.feed(octets)
        for piece in pieces_of(rng, octets):
            cut.feed(piece)
        expected = octets.strip().rpartition(b"\n")[2].strip()
        assert cut.text == whole.text
        # A long one is cut, but not to nothing.
        assert whole.text == expected[: len(whole.text)]
        assert len(whole.text) >= min(len(expected), 1)
        assert len(octets) > 1000 or whole.text == expected


# --- Every other function -------------------------------------------------------


def outcome(
    function: Callable[[], Result], expected: type[Failure]
) -> Result | Failure:
    """Return a function's result, or the exception of its own that it raises."""
    try:
        return function()
    except expected as error:
        return error


def is_one_line(reply: bytes) -> bool:
    """Return whether a reply is one line of 512 octets at most to every client."""
    text = reply[:-2]
    return (
        reply.endswith(b"\r\n")
        and not re.search(rb"[\r\n\0]", text)
        and len(reply) <= 512
        and text[:3].isdigit()
        and text[3:4] in (b"", b" ")
    )


def check_command(octets: bytes) -> None:
    """Check that a line is refused, or has a verb of printable ASCII."""
    command = outcome(lambda: Command.parse(octets), Refusal)
    if isinstance(command, Refusal):
        assert is_one_line(command.reply)
        return
    assert command.line == octets
    assert not set(octets) & set(b"\0\r\n")
    assert all(33 <= octet <= 126 for octet in command.verb)
    # What some server may take for these must be these for us.
    word = octets.strip(b" \t\v\f").upper()
    for verb in (b"DATA", b"BDAT", b"MAIL", b"RCPT"):
        assert (command.verb == verb) == word.startswith(verb)


def check_path(octets: bytes) -> None:
    """Check that a path is refused, or spelt in the one way."""
    command = Command(octets, b"MAIL", b"FROM:" + octets)
    path = outcome(lambda: program.read_path(command.argument, b"FROM"), Refusal)
    with mock.patch.object(program, "_ORDINARY_PATH", re.compile(rb"(?!)")):
        read = outcome(lambda: program.read_path(command.argument, b"FROM"), Refusal)
    if isinstance(path, Refusal) or isinstance(read, Refusal):
        assert path.reply == read.reply == program.BAD_ADDRESS  # type: ignore[union-attr]
        return
    assert path == read  # the short way for ordinary paths and the long one agree
    told = path._replace(is_plain=False)
    line = outcome(lambda: told.spell(command, b"MAIL FROM:").line, Refusal)
    if isinstance(line, Refusal):
        assert line.reply == program.LINE_TOO_LONG
        return
    again = program.read_path(line[len(b"MAIL ") :], b"FROM")
    assert (again.address, again.is_plain) == (path.address, True)
    assert again.parameters.split() == path.parameters.split()


def check_xtext(octets: bytes) -> None:
    """Any octets survive xtext, which needs no more than printable ASCII."""
    program.xtext_decode(octets)
    text = program.xtext_encode(octets)
    assert program.xtext_decode(text) == octets
    assert all(33 <= octet <= 126 for octet in text)


def check_xforward(octets: bytes) -> None:
    """Names come without values' octets, and no value has control characters."""
    envelope = program.Envelope()
    attributes = program.parse_xforward(octets)
    envelope.add_xforward(attributes)
    for name, value in attributes.items():
        assert name in octets.upper()
        assert value is None or (value and not set(value) & {*range(32), 127})
    assert envelope.remote_helo == attributes.get(b"HELO")


def check_xclient(octets: bytes) -> None:
    """XCLIENT is one command line, whatever the client called itself."""
    hello = Command(octets, b"EHLO", octets)
    offered = frozenset((b"HELO", b"NAME", b"PORT", b"PROTO"))
    line = program.xclient_command(offered, Peer("::1", 1), Peer("", 0), hello)
    assert all(32 <= octet <= 126 for octet in line)
    assert len(line) <= 510
    assert len(line.split(b" ")) in (5, 6)


def check_verdict(octets: bytes) -> None:
    """Check that a last line gives one whole line of a reply, or a failure's text."""
    coded = program.coded_reply(octets)
    assert coded is None or is_one_line(coded)
    assert is_one_line(program.rejection(octets))
    assert program.judge(0, octets) is None
    refusal = program.judge(1, octets)
    assert refusal is not None
    assert is_one_line(refusal)
    assert all(32 <= octet <= 126 for octet in refusal[:-2])
    killed = outcome(lambda: program.judge(-9, octets), FilterFailure)
    assert str(killed).isprintable()
    missing = outcome(lambda: program.judge(127, octets), FilterFailure)
    assert isinstance(missing, FilterFailure) == (coded is None)


def check_header(octets: bytes) -> None:
    """Check that a header field is whole lines, none of them empty."""
    template = program.to_octets(program.unescape(program.to_text(octets)))
    program.unknown_symbols(template)
    field = program.expand_header(template, "192.0.2.9", "::1", "now")
    *lines, nothing = field.split(b"\r\n")
    assert nothing == b""
    assert all(line and b"\r" not in line and b"\n" not in line for line in lines)


def check_text(octets: bytes) -> None:
    """Check that octets survive as text, and are printable in the log."""
    assert program.to_octets(program.to_text(octets)) == octets
    for text in (program.printable(octets), program.shown(program.to_text(octets))):
        assert text.isascii()
        assert not text or text.isprintable()


def check_address(octets: bytes) -> None:
    """Check that an address has a port, or is a path."""
    text = program.to_text(octets)
    address = outcome(lambda: program.Address.parse(text, 25), ValueError)
    if isinstance(address, ValueError):
        return
    assert address.text == text
    assert (0 < address.port < 65_536) != bool(address.path)


def check_config(octets: bytes) -> None:
    """Check that a file gives settings and printable faults, each for its line."""
    config, errors = program.parse_config(octets, "f")
    assert config.out_address is not None or errors
    for error in errors:
        assert not str(error) or str(error).isprintable()
    assert is_one_line(config.filter_reject)


def check_log_line(octets: bytes) -> None:
    """Check that octets from strangers make one printable line."""
    envelope = program.Envelope()
    envelope.sender = octets
    envelope.add_recipient(octets)
    (line,) = envelope.describe("::1", "PASSED")
    assert line.isprintable()


CHECKS: dict[str, tuple[Callable[[bytes], None], Sequence[bytes]]] = {
    "command": (check_command, COMMANDS),
    "path": (check_path, COMMANDS),
    "xtext": (check_xtext, COMMANDS),
    "XFORWARD": (check_xforward, COMMANDS),
    "XCLIENT": (check_xclient, COMMANDS),
    "verdict": (check_verdict, REPLIES),
    "header": (check_header, SETTINGS),
    "text": (check_text, REPLIES),
    "address": (check_address, SETTINGS),
    "configuration": (check_config, SETTINGS),
    "log line": (check_log_line, COMMANDS),
}


@pytest.mark.parametrize(("check", "words"), CHECKS.values(), ids=CHECKS.keys())
def test_any_octets(check: Callable[[bytes], None], words: Sequence[bytes]) -> None:
    for _, octets in mixtures(check.__name__, words, ANY):
        check(octets)
