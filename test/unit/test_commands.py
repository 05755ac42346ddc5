"""The client's octets: command lines, verbs, paths, XFORWARD and XCLIENT.

Every stream of octets is cut three ways: whole, octet by octet, and with another
command after it.
"""

from __future__ import annotations

import contextlib
import socket
import time
import tracemalloc
from collections.abc import Iterator

import pytest

import proxsmtpd as program
from helpers import MakeServer, StartDaemon, octetwise, outcomes
from proxsmtpd import Command, CommandBuffer, Peer, Refusal, Reply

LIMIT = 12_288  # of AUTH's line with its CRLF (RFC 4954 section 4)


def refusal(line: bytes) -> Reply | None:
    """Return the reply that refuses a line, if it is refused."""
    try:
        Command.parse(line)
    except Refusal as error:
        return error.reply
    return None


# --- Verbs -------------------------------------------------------------------

# A line, and its verb and argument.
COMMANDS = {
    "verb": (b"DATA", b"DATA", b""),
    "lower case": (b"data", b"DATA", b""),
    "mixed case": (b"dAtA", b"DATA", b""),
    "empty": (b"", b"", b""),
    "blanks alone": (b" \t \v\f", b"", b""),
    "blank after": (b"DATA ", b"DATA", b""),
    "blanks after": (b"DATA \t  ", b"DATA", b""),
    "blank before": (b" DATA", b"DATA", b""),
    "blanks around": (b"\t  data\t ", b"DATA", b""),
    "tab before": (b"\tDATA", b"DATA", b""),
    "VT before": (b"\vDATA", b"DATA", b""),
    "VT after": (b"DATA\v", b"DATA", b""),
    "FF before": (b"\fDATA", b"DATA", b""),
    "FF after": (b"DATA\f", b"DATA", b""),
    "argument": (b"DATA now", b"DATA", b"now"),
    "argument after a tab": (b"DATA\tnow", b"DATA", b"now"),
    "argument after VT": (b"DATA\vnow", b"DATA", b"now"),
    "argument after FF": (b"DATA\fnow", b"DATA", b"now"),
    "four letters and more": (b"DATAX", b"DATA", b"X"),
    "four letters and more, lower case": (b"datax", b"DATA", b"x"),
    "four letters and a colon": (b"DATA:", b"DATA", b":"),
    "BDAT": (b"BDAT 10 LAST", b"BDAT", b"10 LAST"),
    "BDATX": (b"BDATX 10", b"BDAT", b"X 10"),
    "BDAT with the size attached": (b"bdat10", b"BDAT", b"10"),
    "BURLX": (b"BURLX imap://h", b"BURL", b"X imap://h"),
    "MAIL": (b"MAIL FROM:<a@b>", b"MAIL", b"FROM:<a@b>"),
    "MAIL after a tab": (b"MAIL\tFROM:<a@b>", b"MAIL", b"FROM:<a@b>"),
    "verb within a word": (b"XDATA", b"XDATA", b""),
    "verb as an argument": (b"NOOP DATA", b"NOOP", b"DATA"),
    "EHLOX is unknown": (b"EHLOX host", b"EHLOX", b"host"),
    "XCLIENT": (b"xclient ADDR=10.0.0.1", b"XCLIENT", b"ADDR=10.0.0.1"),
    "argument keeps its case and blanks": (b"vrfy A  b ", b"VRFY", b"A  b"),
    "blanks after the argument": (b"VRFY a \t\v\f", b"VRFY", b"a"),
    "8-bit argument": (b"VRFY \xe4\xff", b"VRFY", b"\xe4\xff"),
    "control characters in the argument": (b"VRFY \x01\x7f", b"VRFY", b"\x01\x7f"),
    "unknown": (b"FOO bar", b"FOO", b"bar"),
    "punctuation": (b"!~ x", b"!~", b"x"),
}


@pytest.mark.parametrize(
    ("line", "verb", "argument"), COMMANDS.values(), ids=COMMANDS.keys()
)
def test_command(line: bytes, verb: bytes, argument: bytes) -> None:
    assert Command.parse(line) == Command(line, verb, argument)


REFUSED = {
    "NUL before": b"\0DATA",
    "NUL after": b"DATA\0",
    "NUL within": b"DA\0TA",
    "NUL in the argument": b"NOOP a\0b",
    "CR before": b"\rDATA",
    "CR after": b"DATA\r",
    "CR within": b"NOOP\rDATA",
    "LF before": b"\nDATA",
    "LF after": b"DATA\n",
    "LF within": b"NOOP\nDATA",
    "LF CR": b"NOOP\n\rDATA",
    "CR in the argument": b"MAIL FROM:<a@b>\r SIZE=1",
    "backspace": b"DAT\bA",
    "escape": b"\x1bDATA",
    "delete": b"\x7fDATA",
    "unit separator": b"\x1fDATA",
    "no-break space before": b"\xa0DATA",
    "no-break space after": b"DATA\xa0",
    "no-break space in UTF-8": b"DATA\xc2\xa0x",
    "next line (ISO 6429)": b"DATA\x85",
    "high bit set": bytes(octet | 0x80 for octet in b"DATA"),
    "one high bit set": b"DAT\xc1",
    "long s in UTF-8": "\u017fTARTTLS".encode(),
    "fullwidth in UTF-8": "\uff24\uff21\uff34\uff21".encode(),
    "byte order mark": b"\xef\xbb\xbfDATA",
}


@pytest.mark.parametrize("line", REFUSED.values(), ids=REFUSED.keys())
def test_command_refused(line: bytes) -> None:
    assert refusal(line) == b"500 Bad character in command\r\n"


# What some server might take for a verb that we must know.
MISTAKABLE = [
    "MAILX FROM:<a@b>", "mailfrom:<a@b>", "MAIL:FROM:<a@b>", "MAI FROM:<a@b>", "M",
    "RCPTX TO:<a@b>", "rcptto:<a@b>", "RCP TO:<a@b>", "AUTHX PLAIN", "AUTH=PLAIN", "AU",
    "DAT", "da", "D", "BDA 3", "B", "BUR x", "XCL ADDR=x", "XC",
]  # fmt: skip


@pytest.mark.parametrize("line", MISTAKABLE)
def test_mistakable_verb(line: str) -> None:
    assert refusal(line.encode()) == b"500 Command unrecognized\r\n"


BLANKS = [9, 11, 12, 32]
PRINTABLE = range(33, 127)
OTHERS = sorted({*range(256)} - {*BLANKS} - {*PRINTABLE})


@pytest.mark.parametrize("octet", BLANKS)
def test_every_blank_around_a_verb(octet: int) -> None:
    blank = bytes([octet])
    assert Command.parse(blank + b"DATA")[1:] == (b"DATA", b"")
    assert Command.parse(b"DATA" + blank)[1:] == (b"DATA", b"")
    assert Command.parse(b"FO" + blank + b"DATA")[1:] == (b"FO", b"DATA")


@pytest.mark.parametrize("octet", PRINTABLE)
def test_every_printable_octet_around_a_verb(octet: int) -> None:
    extra = bytes([octet])
    # With a B before it, it is BDAT to a server that compares four letters.
    assert Command.parse(extra + b"DATA").verb[:4] == extra.upper() + b"DAT"
    assert Command.parse(b"DA" + extra + b"TA").verb == b"DA" + extra.upper() + b"TA"
    after = Command.parse(b"DATA" + extra)
    assert (after.verb, after.argument.upper()) == (b"DATA", extra.upper())


@pytest.mark.parametrize("octet", OTHERS)
def test_every_other_octet_around_a_verb(octet: int) -> None:
    extra = bytes([octet])
    for line in (extra + b"DATA", b"DATA" + extra, b"DA" + extra + b"TA", extra):
        assert refusal(line) == b"500 Bad character in command\r\n"


@pytest.mark.parametrize("octet", [b"\0", b"\r", b"\n"], ids=["NUL", "CR", "LF"])
def test_check_octets(octet: bytes) -> None:
    """Answers to AUTH, which are no commands, must be one line too."""
    program.check_octets(b"AGpvZQ==\xff\x01\t")
    for line in (octet, b"a" + octet, octet + b"a", b"a" + octet + b"DATA"):
        with pytest.raises(Refusal) as refused:
            program.check_octets(line)
        assert refused.value.reply == b"500 Bad character in command\r\n"


SECRETS = {
    "initial response": b"AUTH PLAIN AHNlc2FtZQ==",
    "lower case": b"auth plain AHNlc2FtZQ==",
    "tab": b"AUTH\tPLAIN\tAHNlc2FtZQ==",
    "VT": b"AUTH PLAIN\vAHNlc2FtZQ==",
    "FF": b"\fAUTH PLAIN\fAHNlc2FtZQ==",
    "several blanks": b"AUTH  PLAIN  AHNlc2FtZQ==",
    "several words": b"AUTH PLAIN c2Vz AHNlc2FtZQ==",
    "Exchange's": b"X-EXPS LOGIN AHNlc2FtZQ==",
    "unknown": b"XYZZY AHNlc2FtZQ==",
    "unknown, like another": b"NOOPS AHNlc2FtZQ==",
    "unknown, blanks": b"  xyzzy\tAHNlc2FtZQ==",
    "of another's": b"INTERNALCMD AHNlc2FtZQ== shutdown",
    "URL": b"BURL imap://joe;AHNlc2FtZQ==@example.com/",
}


@pytest.mark.parametrize("line", SECRETS.values(), ids=SECRETS.keys())
def test_secrets_are_not_logged(line: bytes) -> None:
    shown = Command.parse(line).log_as
    assert shown.split()[0] == line.split()[0]
    assert shown.endswith(b"[...]")
    assert b"AHNlc2FtZQ" not in shown


def test_other_lines_are_logged() -> None:
    command = Command.parse(b" noop shown  as it is ")
    assert command.log_as == command.line


# --- The buffer --------------------------------------------------------------

TOO_LONG = Reply(b"500 Line too long\r\n")
BARE_LF = Reply(b"500 Lines must end in CRLF\r\n")
LONGEST = b"AUTH PLAIN ".ljust(LIMIT - 2, b"=")


# Octets of the client, and what comes out.
STREAMS: dict[str, tuple[bytes, list[object]]] = {
    "line": (b"NOOP\r\n", [b"NOOP"]),
    "lines": (b"RSET\r\nNOOP\r\n", [b"RSET", b"NOOP"]),
    "empty line": (b"\r\n", [b""]),
    "empty lines": (b"\r\n\r\n\r\n", [b"", b"", b""]),
    "CR within": (b"NO\rOP\r\n", [b"NO\rOP"]),
    "CR CR LF": (b"NOOP\r\r\n", [b"NOOP\r"]),
    "NUL within": (b"NO\0OP\r\n", [b"NO\0OP"]),
    "8-bit": (b"\xff\x80\r\n", [b"\xff\x80"]),
    "blanks": (b" NOOP \r\n", [b" NOOP "]),
    "longest": (LONGEST + b"\r\n", [LONGEST]),
    "longest twice": ((LONGEST + b"\r\n") * 2, [LONGEST, LONGEST]),
    "too long by one": (LONGEST + b"=\r\n", [TOO_LONG]),
    "too long by two": (LONGEST + b"==\r\n", [TOO_LONG]),
    "too long by three": (LONGEST + b"===\r\n", [TOO_LONG]),
    "far too long": (b"A" * 5 * LIMIT + b"\r\n", [TOO_LONG]),
    "too long, with a command as tail": (b"A" * LIMIT + b"DATA\r\n", [TOO_LONG]),
    "too long, with a CR before the tail": (b"A" * LIMIT + b"\rDATA\r\n", [TOO_LONG]),
    "too long, the CR as the last that fits": (LONGEST + b"A\rDATA\r\n", [TOO_LONG]),
    "too long, then a good one": (b"A" * LIMIT + b"\r\nNOOP\r\n", [TOO_LONG, b"NOOP"]),
    "too long twice": ((b"A" * LIMIT + b"\r\n") * 2, [TOO_LONG, TOO_LONG]),
    "good, too long, good": (
        b"RSET\r\n" + b"A" * LIMIT + b"\r\nNOOP\r\n",
        [b"RSET", TOO_LONG, b"NOOP"],
    ),
    "CR alone, at the limit": (b"\r" * LIMIT + b"\r\n", [TOO_LONG]),
}


@pytest.mark.parametrize(("octets", "expected"), STREAMS.values(), ids=STREAMS.keys())
def test_lines(octets: bytes, expected: list[object]) -> None:
    assert outcomes(CommandBuffer(), [octets]) == expected
    assert outcomes(CommandBuffer(), octetwise(octets)) == expected
    assert outcomes(CommandBuffer(), [octets + b"QUIT\r\n"]) == [*expected, b"QUIT"]
    assert outcomes(CommandBuffer(), [octets + b"QUIT"]) == expected


@pytest.mark.parametrize("octets", [b"NOOP", b"NOOP\r", b"\r", b"A" * LIMIT])
def test_unfinished_line(octets: bytes) -> None:
    for pieces in ([octets], octetwise(octets)):
        buffer = CommandBuffer()
        assert outcomes(buffer, pieces) == []
        assert buffer


def test_line_ended_by_bare_lf() -> None:
    """A client that waits for an answer to its LF gets one, and can go on."""
    for pieces in ([b"NOOP\n"], octetwise(b"NOOP\n")):
        buffer = CommandBuffer()
        assert outcomes(buffer, pieces) == [BARE_LF]
        assert not buffer
        assert outcomes(buffer, [b"NOOP\r\n"]) == [b"NOOP"]


def test_bare_lf_within_a_line_is_no_end() -> None:
    assert outcomes(CommandBuffer(), [b"NOOP\nDATA\r\n"]) == [b"NOOP\nDATA"]


def test_emptiness() -> None:
    buffer = CommandBuffer()
    assert not buffer
    buffer.feed(b"NOOP\r\nx")
    assert buffer
    buffer.next_line()
    assert buffer
    assert buffer.take_all() == b"x"
    assert not buffer
    assert buffer.take_all() == b""


def test_mail_data_after_a_command() -> None:
    buffer = CommandBuffer()
    buffer.feed(b"DATA\r\nSubject: x\r\n.\r\nQUIT\r\n")
    assert buffer.next_line() == b"DATA"
    assert buffer.take_all() == b"Subject: x\r\n.\r\nQUIT\r\n"
    assert outcomes(buffer, [b"NOOP\r\n"]) == [b"NOOP"]


def test_memory_is_bounded() -> None:
    block = b"A" * 65_536
    buffer = CommandBuffer()
    tracemalloc.start()
    try:
        assert outcomes(buffer, [block] * 200) == []
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8 * len(block)
    assert outcomes(buffer, [b"DATA\r\nNOOP\r\n"]) == [TOO_LONG, b"NOOP"]


# --- Paths (RFC 5321 4.1.2) --------------------------------------------------

# A path as a client spells it after ``FROM:``, which goes to the server as it came.
PLAIN = {
    "upper case": b"<A@B.example>",
    "null": b"<>",
    "Postmaster": b"<Postmaster>",
    "user alone": b"<a.b>",
    "quoted": b'<"a b"@c>',
    "quoted bracket": b'<"a>b"@c>',
    "quoted comment": b'<"(a)"@c>',
    "quoted address": b'<"<a@b>"@c>',
    "quoted colon": b'<"x:y"@b>',
    "quoted escaped quote": rb'<"a\"b"@c>',
    "quoted escaped quote, then a bracket": rb'<"a\">b"@c>',
    "quoted escaped backslash": rb'<"a\\"@c>',
    "quoted empty": b'<""@c>',
    "dots anywhere": b"<.a..b.@c>",
    "signs": b"<a!#$%&'*+/=?^_`{|}~-@b>",
    "underscore in the domain": b"<a@b_c.d>",
    "IPv4 literal": b"<a@[192.0.2.1]>",
    "IPv6 literal": b"<a@[IPv6:2001:db8::1]>",
    "UTF-8": "<ä@ü.example>".encode(),
    "8-bit": b"<\xe4@\xff>",
}


@pytest.mark.parametrize("path", PLAIN.values(), ids=PLAIN.keys())
@pytest.mark.parametrize("prefix", [b"FROM:", b"from:", b"From: ", b"FROM: \t"])
@pytest.mark.parametrize("parameters", [b"", b"SIZE=1 AUTH=<> X"])
def test_plain_path(path: bytes, prefix: bytes, parameters: bytes) -> None:
    command = Command.parse(b"Mail  " + prefix + path + b" \t" + parameters)
    address = path if path == b"<>" else path[1:-1]
    read = program.read_path(command.argument, b"FROM")
    assert read == (address, parameters, True)
    assert read.spell(command, b"MAIL FROM:") is command


# The argument of RCPT, and address and parameters for the server.
REWRITTEN = {
    "blank before the colon": (b"TO : <a@b>", b"a@b", b""),
    "VT after the colon": (b"TO:\v<a@b>", b"a@b", b""),
    "doubled brackets": (b"TO:<<a@b>> X=1", b"a@b", b"X=1"),
    "doubled brackets, null": (b"TO:<<>>", b"<>", b""),
    "no brackets": (b"TO:a@b", b"a@b", b""),
    "no brackets, blanks around": (b"TO: a@b\tX=<c@d> Y", b"a@b", b"X=<c@d> Y"),
    "no brackets, blanks inside": (b"TO:a @ b", b"a@b", b""),
    "no brackets, quoted": (b'TO:"a b"@c X', b'"a b"@c', b"X"),
    "no brackets, a quoted bracket": (b'TO:"<a>"@c', b'"<a>"@c', b""),
    "no brackets, literal": (b"TO:a@[192.0.2.1] X", b"a@[192.0.2.1]", b"X"),
    "no brackets, user alone": (b"TO:postmaster X Y=1", b"postmaster", b"X Y=1"),
    "no brackets, user and AUTH": (b"TO:root AUTH=<> Y", b"root", b"AUTH=<> Y"),
    "no brackets, a comment": (b"TO:a@b (x) SIZE=1", b"a@b", b"SIZE=1"),
    "blanks inside": (b"TO:< a@b >", b"a@b", b""),
    "blanks around dots": (b"TO:<a . b@c. d>", b"a.b@c.d", b""),
    "blanks around @": (b"TO:<a @\tb>", b"a@b", b""),
    "blanks alone": (b"TO:< >", b"<>", b""),
    "name": (b"TO:Name <a@b> X", b"a@b", b"X"),
    "name attached": (b"TO:Name<a@b>", b"a@b", b""),
    "names": (b"TO:First M. Last <a@b> X=1", b"a@b", b"X=1"),
    "name and null": (b"TO:Name <>", b"<>", b""),
    "name in brackets": (b"TO:<Name <a@b>>", b"a@b", b""),
    "name quoted": (b'TO:"x@good" <a@b>', b"a@b", b""),
    "name quoted with brackets": (b'TO:"<x@good>"<a@b>', b"a@b", b""),
    "name quoted, null": (b'TO:"x@good" <>', b"<>", b""),
    "name encoded": (b"TO:=?utf-8?q?x?= <a@b>", b"a@b", b""),
    "name of one sign": (b"TO:=<a@b>", b"a@b", b""),
    "comment after": (b"TO:<a@b(x)>", b"a@b", b""),
    "comment before": (b"TO:<(x@good)a@b>", b"a@b", b""),
    "comment within": (b"TO:<a(x)@(y)b>", b"a@b", b""),
    "comment before brackets": (b"TO:(<x@good>) <a@b>", b"a@b", b""),
    "comment after brackets": (b"TO:<a@b>(x)", b"a@b", b""),
    "comment before parameters": (b"TO:<a@b> (x) SIZE=1", b"a@b", b"SIZE=1"),
    "comment nested": (b"TO:<a@b((>)y)>", b"a@b", b""),
    "comment with an escape": (rb"TO:<a@b(\)x\()>", b"a@b", b""),
    "comment alone": (b"TO:<()>", b"<>", b""),
    "source route": (b"TO:<@x,@y.z:a@b> X", b"a@b", b"X"),
    "source route, blanks": (b"TO:<@x, @y : a@b>", b"a@b", b""),
    "source route, no brackets": (b"TO:@x:a@b", b"a@b", b""),
    "source route, quoted": (b'TO:<@x:"a:b"@c>', b'"a:b"@c', b""),
    "dot at the end": (b"TO:<a@b.c.>", b"a@b.c", b""),
    "quoted twice": (b'TO:<"a>"."b"@c>', b'"a>.b"@c', b""),
    "quoted in part": (b'TO:<a."b"@c>', b"a.b@c", b""),
    "escaped": (rb"TO:<a\>b@c>", b'"a>b"@c', b""),
    "escaped quote": (rb"TO:<a\"b\\@c>", rb'"a\"b\\"@c', b""),
    "escaped without need": (rb"TO:<\a@c>", b"a@c", b""),
    "no brackets, an escaped blank": (rb"TO:a\ b@c X", b'"a b"@c', b"X"),
}


@pytest.mark.parametrize(
    ("argument", "address", "parameters"), REWRITTEN.values(), ids=REWRITTEN.keys()
)
def test_rewritten_path(argument: bytes, address: bytes, parameters: bytes) -> None:
    command = Command.parse(b"rcpt " + argument)
    path = program.read_path(command.argument, b"TO")
    assert path == (address, parameters, False)
    bracketed = address if address == b"<>" else b"<%s>" % address
    line = (b"RCPT TO:%s %s" % (bracketed, parameters)).strip()
    assert path.spell(command, b"RCPT TO:").line == line
    # What the server gets has this one meaning.
    again = program.read_path(line[len(b"RCPT ") :], b"TO")
    assert again == (address, parameters, True)


# What only some servers make sense of, or each makes something else of.
REFUSED = {
    "nothing": b"",
    "no colon": b"FROM <a@b>",
    "no colon, no blank": b"FROM<a@b>",
    "no prefix": b"<a@b>",
    "colon alone": b":<a@b>",
    "prefix alone": b"FROM",
    "the other prefix": b"TO:<a@b>",
    "another prefix": b"FROMM:<a@b>",
    "two colons": b"FROM::<a@b>",
    "no path": b"FROM:",
    "comment alone": b"FROM:(a@b)",
    "three brackets": b"FROM:<<<a@b>>>",
    "unclosed": b"FROM:<a@b",
    "unclosed, parameters": b"FROM:<a@b SIZE=1",
    "unclosed once": b"FROM:<<a@b>",
    "closed twice": b"FROM:<a@b>>",
    "closed only": b"FROM:a@b>",
    "unclosed quote": b'FROM:<"a@b>',
    "unclosed quote, no brackets": b'FROM:"a@b',
    "quote in a word": b'FROM:<a"b"@c>',
    "unclosed escape": b"FROM:<a\\>",
    "unclosed comment": b"FROM:<a@b(x>",
    "unclosed comment, nested": b"FROM:<a@b((x)>",
    "comment closed twice": b"FROM:<a@b(x))>",
    "escape at a comment's end": b"FROM:<a@b>(x\\",
    "unclosed literal": b"FROM:<a@[192.0.2.1>",
    "bracket in a literal": b"FROM:<a@[x>y]>",
    "blank in a literal": b"FROM:<a@[192.0 .2.1]>",
    "text after a literal": b"FROM:<a@[192.0.2.1]x>",
    "two words": b"FROM:<a b@c>",
    "two words, no brackets": b"FROM:a b@c",
    "two quoted words": b'FROM:<"a""b"@c>',
    "two domains": b"FROM:<a@b@c>",
    "two labels": b"FROM:<a@b c>",
    "two addresses": b"FROM:<a@b,c@d>",
    "two paths": b"FROM:<a@b><c@d>",
    "two paths, a blank": b"FROM:<a@b> <c@d>",
    "two paths, the first without brackets": b"FROM:x@good <a@b>",
    "two paths, no blank": b"FROM:x@good<a@b>",
    "two paths, the second without brackets": b"FROM:<a@b> x@good",
    "parameter attached": b"FROM:<a@b>SIZE=1",
    "no parameter": b"FROM:<a@b> =1",
    "comment among parameters": b"FROM:<a@b> SIZE=1 (x)",
    "no local part": b"FROM:<@b>",
    "no domain": b"FROM:<a@>",
    "dots in the domain": b"FROM:<a@b..c>",
    "dot before the domain": b"FROM:<a@.b>",
    "sign in the domain": b"FROM:<a@b#c>",
    "group": b"FROM:<g:a@b;>",
    "scheme": b"FROM:<mailto:a@b>",
    "route alone": b"FROM:<@x:>",
    "two routes": b"FROM:<@x:@y:a@b>",
    "route, then brackets": b"FROM:<@x:<a@b>>",
    "address quoted": b'FROM:<"a@b">',
    "address quoted, no brackets": b'FROM:"a@b"',
    "UUCP": b"FROM:<b!a>",
    "percent alone": b"FROM:<a%b>",
    "control character": b"FROM:<a\x01@b>",
    "quoted tab": b'FROM:<"a\tb"@c>',
    "DEL": b"FROM:<a\x7f@b>",
}


@pytest.mark.parametrize("argument", REFUSED.values(), ids=REFUSED.keys())
def test_refused_path(argument: bytes) -> None:
    with pytest.raises(Refusal) as raised:
        program.read_path(argument, b"FROM")
    assert raised.value.reply == b"501 Syntax error in address or parameters\r\n"


def test_rewritten_line_has_a_limit() -> None:
    """Brackets that we add must not have a server cut the line."""
    start, longest = b"MAIL FROM:<a@b> X=", program.COMMAND_LIMIT - len(b"\r\n")
    value = b"x" * (longest - len(start))
    for spelled, added in ((b"a@b", b""), (b"a@b", b"x"), (b"<a@b>", b"x")):
        command = Command.parse(b"MAIL FROM:%s X=%s%s" % (spelled, value, added))
        path = program.read_path(command.argument, b"FROM")
        if added and not path.is_plain:
            with pytest.raises(Refusal, match="500 Line too long"):
                path.spell(command, b"MAIL FROM:")
        else:
            line = path.spell(command, b"MAIL FROM:").line
            assert line == start + value + added


# Repeated many times, each is hard on a parser that looks back or ahead.
NASTY = [
    *(b'"', b"\\", b'"a"', b"<", b":", b"<:", b' "', b"(", b"()", b"(\\)", b"a ", b"."),
    *(b"@a,", b"@a:", b"a@", b"a.", b"[", b"a(", b'a"', b"a<", b" X=<", b'\\"'),
]


def processor_seconds(argument: bytes) -> Iterator[float]:
    """Give the time that reading this path takes, three times."""
    for _ in range(3):
        start = time.process_time()
        with contextlib.suppress(Refusal):
            program.read_path(argument, b"TO")
        yield time.process_time() - start


@pytest.mark.parametrize("unit", NASTY)
@pytest.mark.parametrize("start", [b"TO:", b"TO:<", b"TO:a@b("])
def test_path_is_parsed_in_linear_time(start: bytes, unit: bytes) -> None:
    """Sixteen times the octets take some sixteen times as long, not 256 times."""
    small, large = 8 * 1024, 128 * 1024
    seconds = min(processor_seconds(start + unit * (small // len(unit))))
    # Less than a millisecond tells the clock's grain rather than the parser's time.
    bound = max(seconds, 0.001) * 4 * large / small
    times = processor_seconds(start + unit * (large // len(unit)))
    assert any(seconds < bound for seconds in times)


# --- XFORWARD ----------------------------------------------------------------

# Text in xtext, and what it means.
XTEXT = {
    "nothing": (b"", b""),
    "plain": (b"abc", b"abc"),
    "plus": (b"+2B", b"+"),
    "equals": (b"+3D", b"="),
    "blank": (b"a+20b", b"a b"),
    "several": (b"+41+42c+7E", b"ABc~"),
    "NUL": (b"+00", b"\0"),
    "8-bit": (b"+FF", b"\xff"),
    "lower case": (b"+2b+fe", b"+\xfe"),
    "decoded once": (b"+2B41", b"+41"),
    "no hexadecimal": (b"+zz", b"+zz"),
    "half of one": (b"a+4", b"a+4"),
    "plus at the end": (b"a+", b"a+"),
    "raw 8-bit": (b"\xe4+41", b"\xe4A"),
}


@pytest.mark.parametrize(("text", "octets"), XTEXT.values(), ids=XTEXT.keys())
def test_xtext_decode(text: bytes, octets: bytes) -> None:
    assert program.xtext_decode(text) == octets


ENCODED = {
    "plain": (b"mail.example", b"mail.example"),
    "printable": (b"!*,<>~[]", b"!*,<>~[]"),
    "plus and equals": (b"a+b=c", b"a+2Bb+3Dc"),
    "blank": (b"a b", b"a+20b"),
    "controls": (b"\0\r\n\x1f\x7f", b"+00+0D+0A+1F+7F"),
    "8-bit": (b"\x80\xff", b"+80+FF"),
}


@pytest.mark.parametrize(("octets", "text"), ENCODED.values(), ids=ENCODED.keys())
def test_xtext_encode(octets: bytes, text: bytes) -> None:
    assert program.xtext_encode(octets) == text


def test_xtext_encode_is_undone() -> None:
    every = bytes(range(256))
    text = program.xtext_encode(every)
    assert all(33 <= octet <= 126 and octet != ord("=") for octet in text)
    assert program.xtext_decode(text) == every


# The argument of XFORWARD, and its attributes.
XFORWARD: dict[str, tuple[bytes, dict[bytes, bytes | None]]] = {
    "nothing": (b"", {}),
    "blanks": (b" \t ", {}),
    "address": (b"ADDR=10.0.0.1", {b"ADDR": b"10.0.0.1"}),
    "several": (
        b"NAME=mx.example ADDR=10.0.0.1 HELO=mx.example PROTO=ESMTP",
        {
            b"NAME": b"mx.example",
            b"ADDR": b"10.0.0.1",
            b"HELO": b"mx.example",
            b"PROTO": b"ESMTP",
        },
    ),
    "lower case": (b"addr=10.0.0.1 helo=MX", {b"ADDR": b"10.0.0.1", b"HELO": b"MX"}),
    "blanks between": (b" ADDR=1  HELO=2\t", {b"ADDR": b"1", b"HELO": b"2"}),
    "tab between": (b"ADDR=1\tHELO=2", {b"ADDR": b"1", b"HELO": b"2"}),
    "xtext": (b"HELO=a+2Bb+3Dc", {b"HELO": b"a+b=c"}),
    "xtext with a blank": (
        b"HELO=x+20ADDR+3D6.6.6.6",
        {b"HELO": b"x ADDR=6.6.6.6"},
    ),
    "no xtext": (b"HELO=+zz", {b"HELO": b"+zz"}),
    "forged": (
        b"ADDR=10.0.0.1 HELO=addr=6.6.6.6",
        {b"ADDR": b"10.0.0.1", b"HELO": b"addr=6.6.6.6"},
    ),
    "forged, the other order": (
        b"HELO=addr=6.6.6.6 ADDR=10.0.0.1",
        {b"HELO": b"addr=6.6.6.6", b"ADDR": b"10.0.0.1"},
    ),
    "attribute within a name": (b"XADDR=6.6.6.6", {b"XADDR": b"6.6.6.6"}),
    "unavailable": (b"ADDR=[UNAVAILABLE]", {b"ADDR": None}),
    "unavailable, lower case": (b"ADDR=[unavailable]", {b"ADDR": None}),
    "temporarily unavailable": (b"NAME=[TEMPUNAVAIL]", {b"NAME": None}),
    "in brackets": (b"HELO=[10.0.0.1]", {b"HELO": b"[10.0.0.1]"}),
    "empty": (b"HELO=", {b"HELO": None}),
    "no equals sign": (b"HELO", {b"HELO": None}),
    "decoded NUL": (b"HELO=a+00b", {b"HELO": None}),
    "decoded CR LF": (b"HELO=a+0D+0Ab", {b"HELO": None}),
    "decoded tab": (b"ADDR=+09", {b"ADDR": None}),
    "decoded delete": (b"ADDR=1+7F", {b"ADDR": None}),
    "raw control": (b"ADDR=1\x01", {b"ADDR": None}),
    "8-bit": (b"HELO=\xe4+E4", {b"HELO": b"\xe4\xe4"}),
    "IPv6": (b"ADDR=IPV6:2001:db8::1", {b"ADDR": b"IPV6:2001:db8::1"}),
    "twice": (b"ADDR=1 ADDR=2", {b"ADDR": b"2"}),
}


@pytest.mark.parametrize(
    ("argument", "attributes"), XFORWARD.values(), ids=XFORWARD.keys()
)
def test_xforward(argument: bytes, attributes: dict[bytes, bytes | None]) -> None:
    assert program.parse_xforward(argument) == attributes


IPV6_TAGS = {
    "tagged": (b"IPV6:2001:db8::1", b"2001:db8::1"),
    "lower case": (b"ipv6:::1", b"::1"),
    "plain": (b"2001:db8::1", b"2001:db8::1"),
    "IPv4": (b"10.0.0.1", b"10.0.0.1"),
    "tag alone": (b"IPV6:", b""),
    "nothing": (b"", b""),
}


@pytest.mark.parametrize(("tagged", "plain"), IPV6_TAGS.values(), ids=IPV6_TAGS.keys())
def test_ipv6_tag(tagged: bytes, plain: bytes) -> None:
    assert program.strip_ipv6_tag(tagged) == plain


# --- XCLIENT -----------------------------------------------------------------

CLIENT = Peer("192.0.2.9", 4321)
LOCAL = Peer("192.0.2.1", 25)
CLIENT6 = Peer("2001:db8::9", 4321)
LOCAL6 = Peer("2001:db8::1", 25)
UNIX = Peer("", 0)
EHLO = Command(b"EHLO mx.example", b"EHLO", b"mx.example")
HELO = Command(b"HELO mx.example", b"HELO", b"mx.example")
ODD = Command(b"EHLO a b=c", b"EHLO", b"a b=c")
NAMELESS = Command(b"EHLO", b"EHLO", b"")
ALL = b"NAME ADDR PORT HELO PROTO DESTADDR DESTPORT"

# The attributes that the server lists, both ends of the connection, EHLO or HELO,
# and the words of the command after its first; ADDR is always the first.
XCLIENT: dict[str, tuple[bytes, Peer, Peer, Command | None, bytes]] = {
    "nothing listed": (b"", CLIENT, LOCAL, EHLO, b"ADDR=192.0.2.9"),
    "ADDR alone": (b"ADDR", CLIENT, LOCAL, EHLO, b"ADDR=192.0.2.9"),
    "NAME": (b"NAME", CLIENT, LOCAL, EHLO, b"ADDR=192.0.2.9 NAME=[UNAVAILABLE]"),
    "PORT": (b"PORT", CLIENT, LOCAL, EHLO, b"ADDR=192.0.2.9 PORT=4321"),
    "HELO": (b"HELO", CLIENT, LOCAL, EHLO, b"ADDR=192.0.2.9 HELO=mx.example"),
    "PROTO after EHLO": (b"PROTO", CLIENT, LOCAL, EHLO, b"ADDR=192.0.2.9 PROTO=ESMTP"),
    "PROTO after HELO": (b"PROTO", CLIENT, LOCAL, HELO, b"ADDR=192.0.2.9 PROTO=SMTP"),
    "destination": (
        b"DESTADDR DESTPORT",
        CLIENT,
        LOCAL,
        EHLO,
        b"ADDR=192.0.2.9 DESTADDR=192.0.2.1 DESTPORT=25",
    ),
    "all": (
        ALL,
        CLIENT,
        LOCAL,
        EHLO,
        b"ADDR=192.0.2.9 NAME=[UNAVAILABLE] PORT=4321 HELO=mx.example PROTO=ESMTP"
        b" DESTADDR=192.0.2.1 DESTPORT=25",
    ),
    "unknown attributes": (b"LOGIN FOO", CLIENT, LOCAL, EHLO, b"ADDR=192.0.2.9"),
    "IPv6": (
        b"DESTADDR",
        CLIENT6,
        LOCAL6,
        EHLO,
        b"ADDR=IPV6:2001:db8::9 DESTADDR=IPV6:2001:db8::1",
    ),
    "unix socket": (
        ALL,
        UNIX,
        UNIX,
        EHLO,
        b"ADDR=[UNAVAILABLE] NAME=[UNAVAILABLE] PORT=[UNAVAILABLE] HELO=mx.example"
        b" PROTO=ESMTP DESTADDR=[UNAVAILABLE] DESTPORT=[UNAVAILABLE]",
    ),
    "HELO in xtext": (b"HELO", CLIENT, LOCAL, ODD, b"ADDR=192.0.2.9 HELO=a+20b+3Dc"),
    "HELO without a name": (
        b"HELO",
        CLIENT,
        LOCAL,
        NAMELESS,
        b"ADDR=192.0.2.9 HELO=[UNAVAILABLE]",
    ),
    "no HELO at all": (b"HELO PROTO", CLIENT, LOCAL, None, b"ADDR=192.0.2.9"),
    "scope": (
        b"DESTADDR",
        Peer("fe80::9%eth0", 4321),
        Peer("fe80::1%eth0", 25),
        EHLO,
        b"ADDR=IPV6:fe80::9 DESTADDR=IPV6:fe80::1",
    ),
}


@pytest.mark.parametrize(
    ("offered", "client", "local", "hello", "expected"),
    XCLIENT.values(),
    ids=XCLIENT.keys(),
)
def test_xclient(
    offered: bytes, client: Peer, local: Peer, hello: Command | None, expected: bytes
) -> None:
    attributes = frozenset(offered.split())
    line = program.xclient_command(attributes, client, local, hello)
    first, address, *others = line.split(b" ")
    wanted_address, *wanted = expected.split()
    assert (first, address) == (b"XCLIENT", wanted_address)
    assert sorted(others) == sorted(wanted)


def xclient_with_helo(name: bytes) -> bytes:
    """Return the XCLIENT command for a client that calls itself so."""
    hello = Command(b"", b"EHLO", name)
    offered = frozenset((b"HELO", b"PORT"))
    return program.xclient_command(offered, CLIENT, LOCAL, hello)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (b"h" * 255, b"h" * 255),
        (b"h" * 256, None),
        (b"h" * LIMIT, None),
        (b"+" * 85, b"+2B" * 85),
        (b"+" * 86, None),
    ],
)
def test_overlong_helo_is_left_out(name: bytes, value: bytes | None) -> None:
    """Postfix takes 255 octets, as they are on the wire, and else nothing at all."""
    rest = b"XCLIENT ADDR=192.0.2.9 PORT=4321"
    expected = rest if value is None else rest + b" HELO=" + value
    assert xclient_with_helo(name) == expected
    assert len(expected) + 2 <= 512  # RFC 5321 4.5.3.1.4


LOOPBACK = socket.if_nameindex()[0][0]
PEERS: dict[str, tuple[object, Peer]] = {
    "IPv4": (("192.0.2.9", 4321), Peer("192.0.2.9", 4321)),
    "IPv6": (("2001:db8::9", 4321, 0, 0), Peer("2001:db8::9", 4321)),
    "v4-mapped": (("::ffff:192.0.2.9", 4321, 0, 0), Peer("192.0.2.9", 4321)),
    "not quite v4-mapped": (("::ffff:c000:0", 1, 0, 0), Peer("::ffff:c000:0", 1)),
    "link-local": (
        ("fe80::2", 4321, 0, LOOPBACK),
        Peer(f"fe80::2%{socket.if_indextoname(LOOPBACK)}", 4321),
    ),
    "unix socket": ("", Peer("", 0)),
    "named unix socket": ("/run/x.sock", Peer("", 0)),
    "unix socket as octets": (b"", Peer("", 0)),
}


@pytest.mark.parametrize(("sockaddr", "peer"), PEERS.values(), ids=PEERS.keys())
def test_peer(sockaddr: object, peer: Peer) -> None:
    assert Peer.of(sockaddr) == peer


# --- The table of verbs ------------------------------------------------------

# What becomes of each verb: which reply of ours, or of the server's (its own words).
TREATED = {
    b"HELO x": b"250 smtp.passthru",
    b"EHLO x": b"250-smtp.passthru",
    b"MAIL FROM:<a@b>": b"server MAIL",
    b"RCPT TO:<a@b>": b"server RCPT",
    b"DATA": b"503 DATA needs",
    b"RSET": b"server RSET",
    b"QUIT": b"server QUIT",
    b"NOOP": b"server NOOP",
    b"HELP": b"server HELP",
    b"VRFY x": b"server VRFY",
    b"EXPN x": b"server EXPN",
    b"ETRN x": b"server ETRN",
    b"AUTH x": b"server AUTH",
    b"X-EXPS x": b"server X-EXPS",
    b"BDAT 1": b"502 Command not implemented",
    b"BURL x": b"502 Command not implemented",
    b"XEXCH50 1 2": b"502 Command not implemented",
    b"LHLO x": b"502 Command not implemented",
    b"STARTTLS": b"502 Command not implemented",
    b"X-ANONYMOUSTLS": b"502 Command not implemented",
    b"TURN": b"502 Command not implemented",
    b"ATRN": b"502 Command not implemented",
    b"XFORWARD ADDR=1.2.3.4": b"server XFORWARD",
    b"XCLIENT ADDR=1.2.3.4": b"554 Insufficient authorization",
    b"PROXY x": b"554 Insufficient authorization",
    b"INTERNALCMD x": b"554 Insufficient authorization",
}


def test_every_verb_is_treated() -> None:
    assert {Command.parse(line).verb for line in TREATED} == set(program.VERBS)


def test_verbs(make_server: MakeServer, proxsmtpd: StartDaemon) -> None:
    """A row of the table that lost its handler would show here."""
    verbs = [line.split()[0] for line in TREATED]
    script = {verb.decode(): b"250 server %s\r\n" % verb for verb in verbs}
    daemon = proxsmtpd(server=make_server(script))
    for line, reply in TREATED.items():
        with daemon.connect() as client:
            client.reply()
            answer = client.command(line)
        expected = reply if reply[:1].isdigit() else b"250 " + reply
        assert answer.startswith(expected), line
