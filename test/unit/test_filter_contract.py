"""The filter's contract: envelope, environment, last line, verdict, header."""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

import proxsmtpd as program
from proxsmtpd import Envelope, Excerpt, FilterFailure, LastLine, Reply

VARIABLE = 131_072  # MAX_ARG_STRLEN of Linux: a variable, its name and a NUL
REPLY_LINE = 512  # RFC 5321 4.5.3.1.5


# --- The envelope ------------------------------------------------------------


def envelope(
    sender: bytes | None, *recipients: bytes, xforward: bytes = b""
) -> Envelope:
    """Return an envelope as a session would have gathered it."""
    made = Envelope()
    made.add_xforward(program.parse_xforward(xforward))
    made.sender = sender
    for recipient in recipients:
        made.add_recipient(recipient)
    return made


def test_complete_envelope() -> None:
    assert not envelope(None).is_complete
    assert not envelope(b"a@b").is_complete
    assert not envelope(None, b"c@d").is_complete
    assert envelope(b"a@b", b"c@d").is_complete
    assert envelope(b"<>", b"c@d", b"e@f").is_complete


# XFORWARD's arguments in turn, and what is remembered of ADDR and HELO.
XFORWARDS: dict[str, tuple[list[bytes], bytes | None, bytes | None]] = {
    "none": ([], None, None),
    "one line": ([b"ADDR=10.0.0.1 HELO=mx"], b"10.0.0.1", b"mx"),
    "two lines": ([b"NAME=x ADDR=10.0.0.1", b"HELO=mx SOURCE=y"], b"10.0.0.1", b"mx"),
    "other attributes": ([b"NAME=x PROTO=ESMTP"], None, None),
    "IPv6": ([b"ADDR=IPV6:2001:db8::1"], b"2001:db8::1", None),
    "IPv6, lower case": ([b"addr=ipv6:2001:db8::1"], b"2001:db8::1", None),
    "unavailable": ([b"ADDR=[UNAVAILABLE] HELO=[TEMPUNAVAIL]"], None, None),
    "unavailable later": ([b"ADDR=1 HELO=2", b"ADDR=[UNAVAILABLE]"], None, b"2"),
    "another address later": ([b"ADDR=1 HELO=2", b"ADDR=3"], b"3", b"2"),
    "forged": ([b"ADDR=10.0.0.1", b"HELO=addr=6.6.6.6"], b"10.0.0.1", b"addr=6.6.6.6"),
    "control characters": ([b"ADDR=1+0D+0A HELO=x+00"], None, None),
}


@pytest.mark.parametrize(
    ("arguments", "remote", "helo"), XFORWARDS.values(), ids=XFORWARDS.keys()
)
def test_xforward_in_the_envelope(
    arguments: list[bytes], remote: bytes | None, helo: bytes | None
) -> None:
    gathered = Envelope()
    for argument in arguments:
        gathered.add_xforward(program.parse_xforward(argument))
    assert (gathered.remote, gathered.remote_helo) == (remote, helo)


# The recipients that are there, and how many octets of RECIPIENTS they take with
# the line feed in front of the next one.
TAKEN: dict[str, tuple[list[bytes], int]] = {
    "none": ([], 0),
    "one": ([b"a@b"], 4),
    "two": ([b"a@b", b"cc@d"], 9),
    "many": ([b"x" * 1000] * 100, 100_100),
}


@pytest.mark.parametrize(("recipients", "taken"), TAKEN.values(), ids=TAKEN.keys())
def test_room_for_recipients(recipients: list[bytes], taken: int) -> None:
    """RECIPIENTS is exactly as long as one variable may be, and no longer."""
    room = VARIABLE - len(b"RECIPIENTS=\0") - taken
    gathered = envelope(b"a@b", *recipients)
    assert gathered.has_room_for(b"r" * room)
    assert not gathered.has_room_for(b"r" * (room + 1))


@pytest.mark.skipif(os.uname().sysname != "Linux", reason="Linux has this limit")
def test_kernel_has_the_room_for_arguments() -> None:
    gathered = envelope(b"a@b", b"x" * 100_000)
    room = next(n for n in range(40_000, 0, -1) if gathered.has_room_for(b"r" * n))
    gathered.add_recipient(b"r" * room)
    value = b"\n".join(gathered.recipients)
    child = os.posix_spawn("/bin/sh", ("sh", "-c", ":"), {b"RECIPIENTS": value})
    assert os.waitpid(child, 0)[1] == 0


# An envelope, and what the log says of it.
DESCRIPTIONS = {
    "one recipient": (
        envelope(b"a@b", b"c@d"),
        "client=192.0.2.9, from=a@b, to=c@d, status=X",
    ),
    "several recipients": (
        envelope(b"a@b", b"c@d", b"e@f"),
        "client=192.0.2.9, from=a@b, to=c@d, to=e@f, status=X",
    ),
    "null sender": (
        envelope(b"<>", b"c@d"),
        "client=192.0.2.9, from=<>, to=c@d, status=X",
    ),
    "nothing": (envelope(None), "client=192.0.2.9, status=X"),
    "control characters": (
        envelope(b"a\x1b[2J\x7f@b", b"\t\x00c@d"),
        "client=192.0.2.9, from=a\\x1b[2J\\x7f@b, to=\\x09\\x00c@d, status=X",
    ),
    "line ends": (
        envelope(b"a\r\n@b", b"c@d"),
        "client=192.0.2.9, from=a\\x0d\\x0a@b, to=c@d, status=X",
    ),
    "8-bit": (
        envelope(b"\xe4@b", b"\xc3\xa4@d"),
        "client=192.0.2.9, from=\\xe4@b, to=\\xc3\\xa4@d, status=X",
    ),
    "fields in a quoted local part": (
        envelope(b'"a, to=ceo@corp, status=FILTERED"@x', b'"c, status=X"@d'),
        'client=192.0.2.9, from="a\\x2c\\x20to=ceo@corp\\x2c\\x20status=FILTERED"@x,'
        ' to="c\\x2c\\x20status=X"@d, status=X',
    ),
    "an escape in an address": (
        envelope(b'"a\\x2cb,"@x', b"c@d"),
        'client=192.0.2.9, from="a\\x5cx2cb\\x2c"@x, to=c@d, status=X',
    ),
    "no half of an escape": (
        envelope(b"a" * 253 + b",", b"a" * 252 + b",,"),
        f"client=192.0.2.9, from={'a' * 253}, to={'a' * 252}\\x2c, status=X",
    ),
    "longest addresses": (
        envelope(b"a" * 256, b"c" * 256),
        f"client=192.0.2.9, from={'a' * 256}, to={'c' * 256}, status=X",
    ),
    "longer addresses": (
        envelope(b"a" * 2000, b" " * 2000),
        f"client=192.0.2.9, from={'a' * 256}, to={chr(92) + 'x20':s}"
        f"{(chr(92) + 'x20') * 63}, status=X",
    ),
}


@pytest.mark.parametrize(
    ("gathered", "line"), DESCRIPTIONS.values(), ids=DESCRIPTIONS.keys()
)
def test_log_line(gathered: Envelope, line: str) -> None:
    assert list(gathered.describe("192.0.2.9", "X")) == [line]


def test_log_line_of_more_recipients_than_are_kept() -> None:
    """Without a filter nothing else bounds their number."""
    gathered = envelope(b"a@b", *(b"%06d" % n * 50 for n in range(1000)))
    lines = list(gathered.describe("192.0.2.9", "X"))
    listed = sum(line.count("to=0") for line in lines)
    assert listed == len(gathered.recipients) == 435
    assert lines[-1].endswith(f", to=({1000 - listed} more), status=X")


@pytest.mark.parametrize("octet", [b"r", b"\xe4"])
@pytest.mark.parametrize("size", [1, 200, 300])
def test_log_lines_that_syslog_takes(octet: bytes, size: int) -> None:
    """Each has the status and as many recipients as there is room for."""
    recipients = [
        octet * size + b"@%d" % number for number in range(2 + 90_000 // min(size, 256))
    ]
    if len(recipients) > 2000:
        recipients = recipients[:2000]
    lines = list(envelope(b"a@b", *recipients).describe("192.0.2.9", "X"))
    assert len(lines) > 1
    found = []
    for number, line in enumerate(lines):
        start = "client=192.0.2.9, " + ("to=" if number else "from=a@b, to=")
        assert line.startswith(start)
        assert line.endswith(", status=X")
        found += re.findall(r", to=([^,]*)", line)
        assert len(line) <= program.LOG_LINE_LIMIT
    assert found == [program.printable(recipient)[:256] for recipient in recipients]
    assert all(
        len(a) + len(b) > program.LOG_LINE_LIMIT for a, b in zip(lines, lines[1:])
    )


# --- The filter's environment ------------------------------------------------

STALE = dict.fromkeys(program.FILTER_VARIABLES, b"stale")

# What the daemon has, the values of the message, and what the filter gets.
ENVIRONMENTS: dict[
    str, tuple[dict[bytes, bytes], dict[bytes, bytes | None], dict[bytes, bytes]]
] = {
    "inherited": ({b"PATH": b"/bin"}, {}, {b"PATH": b"/bin"}),
    "set": ({}, {b"SENDER": b"<>"}, {b"SENDER": b"<>"}),
    "set again": ({b"SENDER": b"stale"}, {b"SENDER": b"a@b"}, {b"SENDER": b"a@b"}),
    "no value": ({b"REMOTE": b"stale"}, {b"REMOTE": None}, {}),
    "empty value": ({b"CLIENT": b"stale"}, {b"CLIENT": b""}, {}),
    "not named": (STALE, {}, {}),
    "not named, others kept": ({**STALE, b"HOME": b"/"}, {}, {b"HOME": b"/"}),
    "octets as they are": (
        {b"X": b"\xff"},
        {b"SENDER": b'"a >b"\xe4@c', b"RECIPIENTS": b"a\nb"},
        {b"X": b"\xff", b"SENDER": b'"a >b"\xe4@c', b"RECIPIENTS": b"a\nb"},
    ),
}


@pytest.mark.parametrize(
    ("inherited", "values", "expected"), ENVIRONMENTS.values(), ids=ENVIRONMENTS.keys()
)
def test_environment(
    inherited: dict[bytes, bytes],
    values: dict[bytes, bytes | None],
    expected: dict[bytes, bytes],
) -> None:
    before = dict(inherited)
    assert program.filter_environment(inherited, values) == expected
    assert inherited == before


def test_variables() -> None:
    names = b"CLIENT SERVER SENDER RECIPIENTS REMOTE REMOTE_HELO TLS TMPDIR EMAIL"
    assert sorted(program.FILTER_VARIABLES) == sorted(names.split())


# --- The filter's command ------------------------------------------------------

# Commands without anything for the shell to do, and their words.
PLAIN_COMMANDS = {
    "cat": [b"cat"],
    "/usr/bin/spamc -d 127.0.0.1 -p783": [
        b"/usr/bin/spamc",
        b"-d",
        b"127.0.0.1",
        b"-p783",
    ],
    " ./filter\t--user=mail,nobody  a@b:c%d+e_f ": [
        b"./filter",
        b"--user=mail,nobody",
        b"a@b:c%d+e_f",
    ],
    "nice exec": [b"nice", b"exec"],
}
COMMANDS_FOR_THE_SHELL = (
    "",
    " ",
    *(f"cat a{octet}b" for octet in "~*?[]{}()<>|&;!#$`\\'\"^\n\0"),
    *(f"cat {octet}" for octet in "~*?[!#$"),
    "LC_ALL=C cat",
    "a=b",
    "exec cat",
    ". /etc/filter",
    ": >/dev/null",
    "test -f x",
    "caf\u00e9",
    "cat\u00a0x",
)


@pytest.mark.parametrize("command", PLAIN_COMMANDS)
def test_plain_words(command: str) -> None:
    assert program.plain_words(command) == PLAIN_COMMANDS[command]


@pytest.mark.parametrize("command", COMMANDS_FOR_THE_SHELL, ids=repr)
def test_command_for_the_shell(command: str) -> None:
    assert program.plain_words(command) is None


def test_shell_makes_the_same_words(tmp_path: Path) -> None:
    """The shell splits a plain command into the same words."""
    for name in ("a", "b", "-", "a,b", "x=y"):
        (tmp_path / name).touch()
    rng = random.Random(1)
    octets = [chr(n) for n in range(33, 127)] + [" "] * 20 + ["a", "-", "="] * 10
    plain = []
    for _ in range(20_000):
        command = "a" + "".join(rng.choices(octets, k=rng.randrange(1, 8)))
        words = program.plain_words(command)
        if words is not None:
            plain.append((command, words))
    assert len(plain) > 1000
    script = "".join(
        f"printf '%s\\1' {command}; printf '\\2'\n" for command, _ in plain
    )
    shell = subprocess.run(
        ["sh", "-s"],
        input=script.encode(),
        cwd=tmp_path,
        capture_output=True,
        check=True,
    )
    made = [said.split(b"\1")[:-1] for said in shell.stdout.split(b"\2")[:-1]]
    assert made == [words for _, words in plain]


def said_by(*command: str) -> str:
    """Return a program's standard output."""
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


@pytest.mark.parametrize("shell", ["sh", "bash"])
def test_commands_for_the_shell_itself(shell: str) -> None:
    """No program is run in the place of a word that means something to a shell."""
    if shutil.which("bash") is None:
        pytest.skip("only bash says which words these might be")
    words = {*said_by("bash", "-c", "compgen -b -k").split(), "chdir", "newgrp"}
    types = said_by(shell, "-c", 'for w; do type "$w"; done', shell, *sorted(words))
    own = re.findall(r"^(\S+) is a (?:special )?shell (?:builtin|keyword)", types, re.M)
    assert len(own) > 30
    assert [word for word in own if program.plain_words(f"{word} x")] == []


# --- The last line of standard error -----------------------------------------

# What a filter writes, and the last line of it.
LAST_LINES = {
    "nothing": (b"", b""),
    "line": (b"No\n", b"No"),
    "without an end": (b"No", b"No"),
    "last of several": (b"a\nb\nNo\n", b"No"),
    "last without an end": (b"a\nb\nNo", b"No"),
    "empty line after": (b"No\n\n", b"No"),
    "blank lines after": (b"No\n \n\t\n  \n", b"No"),
    "blanks without an end after": (b"No\n   ", b"No"),
    "CRLF": (b"a\r\nNo\r\n", b"No"),
    "CRLF and an empty line": (b"No\r\n\r\n", b"No"),
    "CR alone after": (b"No\n\r", b"No"),
    "blanks around": (b"  No way \t\n", b"No way"),
    "blanks within": (b"No  way\n", b"No  way"),
    "blank lines alone": (b"\n \n\t", b""),
    "empty lines alone": (b"\n\n", b""),
    "empty lines before": (b"\n\nNo\n", b"No"),
    "NUL is no blank": (b"a\n\0\n", b"\0"),
    "8-bit": (b"a\n\xe4\xff\n", b"\xe4\xff"),
    "much before": (b"x" * 5000 + b"\nNo\n", b"No"),
    "many lines": (b"x y z\n" * 2000 + b"No", b"No"),
    "many blanks before it": (b"a\n" + b" " * 5000 + b"No\n", b"No"),
    "many blanks before it, no end": (b"a\n" + b" " * 5000 + b"No", b"No"),
    "many blanks after it": (b"a\nNo" + b" " * 5000 + b"\n", b"No"),
    "many blank lines after it": (b"a\nNo\n" + b" \n" * 5000, b"No"),
    "a long blank line after it": (b"a\nNo\n" + b" " * 5000 + b"\n\n", b"No"),
}


SIZES = (10_000_000, 1, 2, 3, 1000, 4096)  # of the pieces, in octets


def last_line_of(octets: bytes, size: int) -> bytes:
    """Return the last line of octets that come in pieces of a size."""
    last_line = LastLine()
    for start in range(0, len(octets), size):
        last_line.feed(octets[start : start + size])
    return last_line.text


@pytest.mark.parametrize(("octets", "text"), LAST_LINES.values(), ids=LAST_LINES.keys())
def test_last_line(octets: bytes, text: bytes) -> None:
    assert [last_line_of(octets, size) for size in SIZES] == [text] * len(SIZES)


@pytest.mark.parametrize("end", [b"", b"\n", b"\n\n"], ids=["none", "one", "two"])
def test_long_last_line(end: bytes) -> None:
    """It may be cut, but not where a reply still has room for it."""
    octets = b"550 " + b"x" * 5000 + end
    texts = {last_line_of(octets, size) for size in SIZES}
    assert len(texts) == 1
    text = texts.pop()
    assert octets.startswith(text)
    assert len(text) >= REPLY_LINE


def test_memory_for_the_last_line_is_bounded() -> None:
    last_line = LastLine()
    block = b"x" * 65_536
    tracemalloc.start()
    try:
        for _ in range(100):
            last_line.feed(block)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * len(block)
    assert last_line.text == block[: len(last_line.text)]


def excerpt_of(octets: bytes, size: int) -> list[bytes]:
    """Return the excerpt of octets that come in pieces of a size."""
    excerpt = Excerpt()
    for start in range(0, len(octets), size):
        excerpt.feed(octets[start : start + size])
    return excerpt.lines


@pytest.mark.parametrize(
    ("octets", "lines"),
    [
        (b"", []),
        (b"one\n\ntwo", [b"one", b"", b"two"]),
        (b"one\r\ntwo\rthree\n", [b"one", b"two", b"three"]),
        (b"x" * 2 * 8192, [b"x" * 2 * 8192]),
        (
            b"a" * 8192 + b"b" + b"c" * 8192,
            [b"a" * 8192, b"... 1 octets left out", b"c" * 8192],
        ),
        (
            b"first\n" + b"x" * 20_000 + b"\nlast\n",
            [
                *[b"first", b"x" * (8192 - 6), b"... 3628 octets left out"],
                *[b"x" * (8192 - 6), b"last"],
            ],
        ),
    ],
    ids=["empty", "short", "line ends", "just whole", "one too many", "long"],
)
def test_excerpt(octets: bytes, lines: list[bytes]) -> None:
    assert [excerpt_of(octets, size) for size in SIZES] == [lines] * len(SIZES)


# --- The verdict -------------------------------------------------------------

# A last line, and the reply with its code; None if it has none.
CODED = {
    "5xx": (b"550 No", b"550 No\r\n"),
    "4xx": (b"451 Later", b"451 Later\r\n"),
    "2xx": (b"250 Dropped", b"250 Dropped\r\n"),
    "lowest": (b"200 x", b"200 x\r\n"),
    "highest": (b"599 x", b"599 x\r\n"),
    "enhanced status code": (b"554 5.7.1 No", b"554 5.7.1 No\r\n"),
    "several lines' form": (b"550-No", b"550 No\r\n"),
    "hyphen in the text": (b"550 -No-", b"550 -No-\r\n"),
    "several blanks": (b"550  No", b"550  No\r\n"),
    "code alone": (b"550", b"550\r\n"),
    "control characters": (b"550 a\r\n\0\t\x1b\x7fb", b"550 a???\t\x1b\x7fb\r\n"),
    "8-bit": (b"550 \x80\xe4\xff", b"550 \x80\xe4\xff\r\n"),
    "1xx": (b"150 x", None),
    "3xx": (b"354 x", None),
    "6xx": (b"650 x", None),
    "000": (b"000 x", None),
    "text": (b"No", None),
    "nothing": (b"", None),
    "two digits": (b"55 x", None),
    "four digits": (b"5500 x", None),
    "code elsewhere": (b"x 550 y", None),
    "code after a blank": (b" 550 y", None),
    "digits that are no ASCII": ("\u0665\u0665\u0660 x".encode(), None),
}


@pytest.mark.parametrize(("line", "reply"), CODED.values(), ids=CODED.keys())
def test_coded_reply(line: bytes, reply: bytes | None) -> None:
    assert program.coded_reply(line) == reply


@pytest.mark.parametrize("line", [row[0] for row in CODED.values() if row[1]], ids=repr)
def test_rejection_with_a_code(line: bytes) -> None:
    assert program.rejection(line) == program.coded_reply(line)


# A last line without a code, and the reply.
REJECTIONS = {
    "nothing": (b"", b"550 Content Rejected\r\n"),
    "text": (b"Virus found", b"550 Content Rejected; Virus found\r\n"),
    "1xx": (b"150 x", b"550 Content Rejected; 150 x\r\n"),
    "3xx": (b"354 x", b"550 Content Rejected; 354 x\r\n"),
    "6xx": (b"650 x", b"550 Content Rejected; 650 x\r\n"),
    "four digits": (b"2500 x", b"550 Content Rejected; 2500 x\r\n"),
    "control characters": (b"a\r\n250\0\t", b"550 Content Rejected; a??250?\t\r\n"),
    "8-bit": (b"\xc3\xa4", b"550 Content Rejected; \xc3\xa4\r\n"),
}


@pytest.mark.parametrize(("line", "reply"), REJECTIONS.values(), ids=REJECTIONS.keys())
def test_rejection(line: bytes, reply: bytes) -> None:
    assert program.rejection(line) == reply


@pytest.mark.parametrize(
    ("start", "given"),
    [
        (b"550 ", b"550 "),
        (b"250-", b"250 "),
        (b"", b"550 Content Rejected; "),
        (b"354 ", b"550 Content Rejected; 354 "),
    ],
)
def test_longest_reply(start: bytes, given: bytes) -> None:
    room = REPLY_LINE - len(given) - len(b"\r\n")
    fits, too_long = start + b"x" * room, start + b"x" * room + b"y"
    assert program.rejection(fits) == given + b"x" * room + b"\r\n"
    assert program.rejection(too_long) == given + b"x" * room + b"\r\n"
    assert len(program.rejection(too_long)) == REPLY_LINE


# Exit status, last line, and the reply; None: the message goes on.
VERDICTS: dict[str, tuple[int, bytes, bytes | None]] = {
    "0": (0, b"", None),
    "0 with words": (0, b"warning: slow", None),
    "0 with a code": (0, b"550 No", None),
    "1": (1, b"", b"550 Content Rejected\r\n"),
    "1 with words": (1, b"Virus", b"550 Content Rejected; Virus\r\n"),
    "1 with 5xx": (1, b"554 5.7.1 Virus", b"554 5.7.1 Virus\r\n"),
    "1 with 4xx": (1, b"450 Later", b"450 Later\r\n"),
    "1 with 2xx": (1, b"250 Dropped", b"250 Dropped\r\n"),
    "1 with 3xx": (1, b"354 Go on", b"550 Content Rejected; 354 Go on\r\n"),
    "1 with 1xx": (1, b"150 x", b"550 Content Rejected; 150 x\r\n"),
    "1 with NNN-text": (1, b"550-No", b"550 No\r\n"),
    "2": (2, b"No", b"550 Content Rejected; No\r\n"),
    "EX_NOHOST": (68, b"", b"550 Content Rejected\r\n"),
    "EX_TEMPFAIL with 5xx": (75, b"550 No", b"550 No\r\n"),
    "EX_TEMPFAIL with 2xx": (75, b"250 Dropped", b"250 Dropped\r\n"),
    "EX_PROTOCOL": (76, b"No", b"550 Content Rejected; No\r\n"),
    "EX_NOPERM": (77, b"No", b"550 Content Rejected; No\r\n"),
    "79": (79, b"No", b"550 Content Rejected; No\r\n"),
    "not the shell's": (1, b"sh 1: No", b"550 Content Rejected; sh 1: No\r\n"),
    "no more than a line": (
        2,
        b"rules: line 3: No",
        b"550 Content Rejected; rules: line 3: No\r\n",
    ),
    "syntax error of the mail": (
        1,
        b"mail: 3: Syntax error",
        b"550 Content Rejected; mail: 3: Syntax error\r\n",
    ),
    "shell's words with 5xx": (2, b"550 sh: 1: No", b"550 sh: 1: No\r\n"),
    "125": (125, b"No", b"550 Content Rejected; No\r\n"),
    "126 with 5xx": (126, b"550 No", b"550 No\r\n"),
    "127 with 2xx": (127, b"250 Dropped", b"250 Dropped\r\n"),
    "128": (128, b"No", b"550 Content Rejected; No\r\n"),
    "137 with 5xx": (137, b"550 No", b"550 No\r\n"),
    "255": (255, b"No", b"550 Content Rejected; No\r\n"),
    "255 with 4xx": (255, b"451 Later", b"451 Later\r\n"),
}


@pytest.mark.parametrize(
    ("status", "line", "reply"), VERDICTS.values(), ids=VERDICTS.keys()
)
def test_verdict(status: int, line: bytes, reply: bytes | None) -> None:
    assert program.judge(status, line) == reply


# Exit status and last line where the end says nothing about the message.
FAILURES = {
    "not executable": (126, b"sh: 1: ./f: Permission denied"),
    "not found": (127, b"sh: 1: nosuch: not found"),
    "126 in silence": (126, b""),
    "127 in silence": (127, b""),
    "127 with 3xx": (127, b"354 x"),
    "127 with four digits": (127, b"5500 x"),
    "SIGTERM": (-15, b""),
    "SIGKILL with words": (-9, b"Virus"),
    "SIGSEGV with 5xx": (-11, b"550 No"),
    "SIGPIPE with 2xx": (-13, b"250 Ok"),
    "SIGSEGV, seen by the shell": (139, b"Segmentation fault"),
    "SIGKILL, seen by the shell": (137, b"Killed"),
    "EX_UNAVAILABLE": (69, b"spamc: connection refused"),
    "EX_SOFTWARE": (70, b""),
    "EX_OSERR": (71, b"cannot fork"),
    "EX_OSFILE": (72, b""),
    "EX_CANTCREAT": (73, b""),
    "EX_IOERR": (74, b""),
    "EX_TEMPFAIL": (75, b"try again"),
    "EX_TEMPFAIL with 3xx": (75, b"354 x"),
    "EX_CONFIG": (78, b""),
    # What dash, bash and BusyBox say.
    "dash, syntax": (2, b"sh: 1: Syntax error: Unterminated quoted string"),
    "dash, process": (2, b"sh: 0: Cannot fork"),
    "dash, memory": (2, b"sh: 0: Out of space"),
    "dash, file": (2, b"sh: 1: cannot open /nowhere: No such file"),
    "bash, syntax": (2, b"sh: -c: line 2: syntax error: unexpected end of file"),
    "bash, its line": (2, b"sh: -c: line 1: `if )'"),
    "bash, process": (254, b"sh: fork: Resource temporarily unavailable"),
    "bash, file": (1, b"sh: line 1: /nowhere: No such file or directory"),
    "ash, syntax": (2, b'sh: syntax error: unexpected ")"'),
    "ash, process": (2, b"sh: can't fork: Resource temporarily unavailable"),
    "dash, script's syntax": (2, b'/f/filter: 3: Syntax error: "fi" unexpected'),
    "dash, script's process": (2, b"/f/filter: 12: Cannot fork"),
    "bash, script's syntax": (2, b"filter: line 3: syntax error near `fi'"),
    "bash, script's line": (2, b"/f/filter: line 3: `if fi'"),
    "bash, script's process": (254, b"/f/filter: fork: Resource unavailable"),
    "ash, script's syntax": (2, b'./f: line 3: syntax error: unexpected "fi"'),
    "ash, script's process": (2, b"./f: line 3: can't fork: Resource unavailable"),
}


@pytest.mark.parametrize(("status", "line"), FAILURES.values(), ids=FAILURES.keys())
def test_failure(status: int, line: bytes) -> None:
    with pytest.raises(FilterFailure) as failure:
        program.judge(status, line)
    assert line.decode() in str(failure.value)


@pytest.mark.parametrize(
    ("status", "line", "reply"), VERDICTS.values(), ids=VERDICTS.keys()
)
def test_coded_verdict(status: int, line: bytes, reply: bytes | None) -> None:
    """Each end without a code is a failure, and the others are what they were."""
    if reply is None or program.coded_reply(line):
        assert program.judge(status, line, only_coded=True) == reply
    else:
        with pytest.raises(FilterFailure) as failure:
            program.judge(status, line, only_coded=True)
        assert str(failure.value).startswith(f"filter command failed with {status}")
        assert line.decode() in str(failure.value)


@pytest.mark.parametrize(("status", "line"), FAILURES.values(), ids=FAILURES.keys())
def test_coded_failure(status: int, line: bytes) -> None:
    with pytest.raises(FilterFailure) as failure:
        program.judge(status, line, only_coded=True)
    assert line.decode() in str(failure.value)


def test_failure_is_logged_in_printable_ascii() -> None:
    for status in (127, 137, -9):
        with pytest.raises(FilterFailure) as failure:
            program.judge(status, b"a\nproxsmtpd: \x1b\xff")
        assert str(failure.value).endswith(": a\\x0aproxsmtpd: \\x1b\\xff")


# --- The header field ---------------------------------------------------------

DATE = "Thu, 01 Jan 1970 00:00:00 +0000"

# The setting as it stands in the file, and the field for a message.
HEADERS = {
    "nothing": ("", b""),
    "plain": ("X-Filter: yes", b"X-Filter: yes\r\n"),
    "client": ("X-Client: %i", b"X-Client: 192.0.2.9\r\n"),
    "local": ("X-Local: [%l]", b"X-Local: [2001:db8::1]\r\n"),
    "date": ("X-Date: %d.", b"X-Date: " + DATE.encode() + b".\r\n"),
    "TLS": ("X-TLS: (%t)", b"X-TLS: (TLSv1.3 AES)\r\n"),
    "percent": ("X: 100%%", b"X: 100%\r\n"),
    "percent before a symbol's letter": ("X: %%i", b"X: %i\r\n"),
    "percent twice": ("X: %%%i%%", b"X: %192.0.2.9%\r\n"),
    "percent at the end": ("X: 100%", b"X: 100%\r\n"),
    "unknown symbol": ("X: a%qb", b"X: ab\r\n"),
    "symbols are lower case": ("X: %I%L%D.", b"X: .\r\n"),
    "the same twice": ("X: %i %i", b"X: 192.0.2.9 192.0.2.9\r\n"),
    "tab": (r"X: a\tb", b"X: a\tb\r\n"),
    "backslash": (r"X: a\\b", b"X: a\\b\r\n"),
    "escaped backslash before a letter": (r"X: a\\nb", b"X: a\\nb\r\n"),
    "unknown escape": (r"X: \x\0\"", b'X: \\x\\0\\"\r\n'),
    "backslash at the end": ("X: a\\", b"X: a\\\r\n"),
    "line end by LF": (r"X: a\n\tb", b"X: a\r\n\tb\r\n"),
    "line end by CRLF": (r"X: a\r\n\tb", b"X: a\r\n\tb\r\n"),
    "line end by CR": (r"X: a\r\tb", b"X: a\r\n\tb\r\n"),
    "two fields": (r"X: a\nY: b", b"X: a\r\nY: b\r\n"),
    "a line end of its own": (r"X: a\r\n", b"X: a\r\n"),
    "empty lines": (r"\nX: a\n\r\n\nY: b\n\n", b"X: a\r\nY: b\r\n"),
    "nothing but line ends": (r"\r\n\n", b""),
    "Received": (
        r"Received: from [%i]\r\n\tby [%l]; %d",
        b"Received: from [192.0.2.9]\r\n\tby [2001:db8::1]; " + DATE.encode() + b"\r\n",
    ),
    "8-bit": ("X: \u00e4\udcff", b"X: \xc3\xa4\xff\r\n"),
}


@pytest.mark.parametrize(("setting", "field"), HEADERS.values(), ids=HEADERS.keys())
def test_header(setting: str, field: bytes) -> None:
    template = program.to_octets(program.unescape(setting))
    values = ("192.0.2.9", "2001:db8::1", DATE, "TLSv1.3 AES")
    assert program.expand_header(template, *values) == field


@pytest.mark.parametrize(
    ("template", "unknown"),
    [
        (b"", []),
        (b"X: %i %l %d %% %%q", []),
        (b"X: %q", [b"q"]),
        (b"X: %%%q %I", [b"q", b"I"]),
        (b"X: %", []),
        (b"X: %\xff%\n", [b"\xff", b"\n"]),
    ],
    ids=repr,
)
def test_unknown_symbols(template: bytes, unknown: list[bytes]) -> None:
    assert program.unknown_symbols(template) == unknown


@pytest.fixture
def set_zone(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Provide the environment for setting TZ, which is restored afterwards."""
    with monkeypatch.context() as environment:
        yield environment
    time.tzset()


# A zone, seconds since the epoch, and the date there.
DATES = {
    "UTC": ("UTC0", 0, DATE),
    "east": ("CET-1CEST,M3.5.0,M10.5.0/3", 0, "Thu, 01 Jan 1970 01:00:00 +0100"),
    "summer time": (
        "CET-1CEST,M3.5.0,M10.5.0/3",
        1_782_000_000,
        "Sun, 21 Jun 2026 02:00:00 +0200",
    ),
    "west": ("EST5", 0, "Wed, 31 Dec 1969 19:00:00 -0500"),
    "half an hour": ("IST-5:30", 0, "Thu, 01 Jan 1970 05:30:00 +0530"),
    "fractions are cut": ("UTC0", 86_399.9, "Thu, 01 Jan 1970 23:59:59 +0000"),
}


@pytest.mark.parametrize(("zone", "seconds", "date"), DATES.values(), ids=DATES.keys())
def test_date(
    zone: str, seconds: float, date: str, set_zone: pytest.MonkeyPatch
) -> None:
    set_zone.setenv("TZ", zone)
    time.tzset()
    assert program.rfc5322_date(seconds) == date


# --- Octets and text ----------------------------------------------------------

PRINTABLE = {
    "nothing": (b"", ""),
    "plain": (b"a b~", "a b~"),
    "backslash": (rb"\n", r"\n"),
    "line ends": (b"a\r\nb", r"a\x0d\x0ab"),
    "controls": (b"\0\t\x1b\x1f\x7f", r"\x00\x09\x1b\x1f\x7f"),
    "8-bit": (b"\x80\xff\xc3\xa4", r"\x80\xff\xc3\xa4"),
}


@pytest.mark.parametrize(("octets", "text"), PRINTABLE.values(), ids=PRINTABLE.keys())
def test_printable(octets: bytes, text: str) -> None:
    assert program.printable(octets) == text


def test_octets_come_back_from_text() -> None:
    every = bytes(range(256)) + "\u00e4\u20ac\U0001f4a9".encode()
    assert program.to_octets(program.to_text(every)) == every
    assert program.to_text(b"\xc3\xa4") == "\u00e4"
    assert program.shown("\u00e4\udcff\n") == r"\xc3\xa4\xff\x0a"


def test_refusal_has_a_whole_reply() -> None:
    assert program.Refusal(Reply.of(b"500-a", b"500 b")).reply == b"500-a\r\n500 b\r\n"
    assert str(program.Refusal(Reply.of(b"500 No"))) == "500 No"
    assert program.Hangup("x", Reply.of(b"421 Bye")).reply == b"421 Bye\r\n"
    assert program.Hangup("x").reply is None
