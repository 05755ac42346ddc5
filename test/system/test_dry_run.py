"""The dry run (-t): it runs messages through the filter and asks the server.

Each test runs the real program.  All that it writes is printable ASCII, and it leaves
neither a file nor a process.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Callable, NamedTuple, Protocol, Union

import pytest

from filter_cases import (
    FAILURES,
    FIELD,
    HEADER,
    KINDS,
    OBSERVE,
    PASS,
    VERDICTS,
    applicable,
    both,
    settings_of,
)
from helpers import (
    MARKER,
    QUEUED,
    TRACEBACK,
    MakeServer,
    StartDaemon,
    free_port,
    marked_processes,
    poll,
    program_under_test,
    saved_environment,
    settings_text,
    stuffed,
    unstuffed,
    write_config,
)
from proxsmtpd import crc32c, envelope_of, printable, to_octets
from smtp import (
    EXTENSIONS,
    Chunks,
    Close,
    Reply,
    Reset,
    ScriptedServer,
    Stall,
)

PATIENCE = 30.0
MESSAGE = (
    b"Return-Path: <bounce@example.com>\r\n"
    b"From: A <a@example.com>\r\n"
    b"To: b@example.net\r\n"
    b"Subject: test\r\n"
    b"\r\n"
    b"Hello\r\n"
)
KINDS_OF_END = ("passed", "dropped", "refused", "broken")


BARE = (
    "refused without a reply of its own: a crash would look the same; see FilterVerdict"
)
HINT = "; -d 3 shows more"
MARK = " (example)"


class Result(NamedTuple):
    """The output on one message, at level 3 or 4."""

    end: str  # one of KINDS_OF_END
    name: str
    summary: str  # what else stands in the message's line
    environment: dict[str, str]
    examples: set[str]  # the variables that are marked as such
    filter: str
    errors: list[str]  # the filter's standard error
    reply: str
    status: str
    changes: list[str]  # the unified diff
    is_bare: bool  # marked as a refusal without a reply

    @classmethod
    def parse(cls, lines: Sequence[str], before: Mapping[str, str]) -> Result:
        """Parse the lines on one message; `before` is the environment above them."""
        match = re.fullmatch(r"(\w+) +(\S+): (.*)", lines[0])
        assert match, lines[0]
        parts: dict[str, list[str]] = {}
        facts: dict[str, str] = {}
        title = ""
        for line in lines[1:]:
            if line.startswith("    "):
                parts[title].append(line[4:])
            elif line.endswith(":"):
                title = line[2:-1]
                parts[title] = []
            else:
                word, _, value = line[2:].partition(": ")
                facts[word] = value
        variables = {} if "environment" in parts else dict(before)
        own = parts.get("environment") or parts.get("environment, otherwise as above")
        name = ""
        for line in own or []:
            if line.startswith("  "):
                variables[name] += "\n" + line[2:]
            else:
                name, _, value = line.removesuffix(MARK).partition("=")
                variables[name] = value
        return cls(
            end=match[1],
            name=match[2],
            summary=match[3],
            environment=variables if own else {},
            examples={ln.partition("=")[0] for ln in own or [] if ln.endswith(MARK)},
            filter=facts.get("filter", ""),
            errors=parts.get("standard error", []),
            reply=facts.get("reply", ""),
            status=facts.get("status", ""),
            changes=parts.get("changes", []),
            is_bare=f"  {BARE}" in lines,
        )


class DryRun(NamedTuple):
    """The exit status and the output of a dry run."""

    exit_status: int
    output: str
    errors: str

    @property
    def results(self) -> list[Result]:
        found: list[Result] = []
        heads = rf"^(?=(?:{'|'.join(KINDS_OF_END)})  )|^(?=\d+ messages?: )"
        for part in re.split(heads, self.output, flags=re.M)[1:-1]:
            before = found[0].environment if found else {}
            found.append(Result.parse(part.splitlines(), before))
        return found

    @property
    def only(self) -> Result:
        """Return what the output says of the only message."""
        (result,) = self.results
        return result

    @property
    def counts(self) -> dict[str, int]:
        """Return the summary, without what did not happen."""
        kinds = ", ".join(rf"(\d+) {kind}" for kind in KINDS_OF_END)
        form = rf"(\d+) messages?: {kinds}(?:{HINT})?"
        match = re.fullmatch(form, self.output.splitlines()[-1])
        assert match, self.output
        total, *numbers = map(int, match.groups())
        assert total == sum(numbers)
        return {kind: n for kind, n in zip(KINDS_OF_END, numbers) if n}


def is_plain(text: bytes) -> bool:
    """Return whether text can do no harm to any terminal."""
    return re.fullmatch(rb"[ -~\n]*", text) is not None


class StartDryRun(Protocol):
    """Runs `-t` on messages: octets, or the names of files that may be there."""

    def __call__(
        self,
        settings: Mapping[str, object],
        *messages: Union[bytes, str],
        stdin: bytes = b"",
        env: Mapping[str, Union[str, bytes]] | None = None,
        level: int | None = 3,
        **options: Any,
    ) -> DryRun: ...


class Workspace:
    """A configuration file and messages in a directory, and the command for them."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.config, self.tempdir = place / "proxsmtpd.conf", place / "temp"
        self.tempdir.mkdir()
        self._numbers = 0

    def command(
        self,
        settings: Mapping[str, object],
        *messages: Union[bytes, str],
        level: int | None = None,
    ) -> list[str]:
        """Return the command line for a dry run of these messages."""
        debug = [] if level is None else [f"-d{level}"]
        defaults = {"OutAddress": "192.0.2.25:25", "TempDirectory": self.tempdir}
        write_config(self.config, settings_text(settings), **defaults)
        names = [m if isinstance(m, str) else self._file(m) for m in messages]
        arguments = ["-t", *debug, "-f", str(self.config), *names]
        return [*program_under_test(), *arguments]

    def _file(self, message: bytes) -> str:
        self._numbers += 1
        path = self.place / f"message-{self._numbers}"
        path.write_bytes(message)
        return path.name


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path)


@pytest.fixture
def dry_run(workspace: Workspace) -> StartDryRun:
    """See `StartDryRun`."""

    def run(
        settings: Mapping[str, object],
        *messages: Union[bytes, str],
        stdin: bytes = b"",
        env: Mapping[str, Union[str, bytes]] | None = None,
        level: int | None = 3,
        **options: Any,
    ) -> DryRun:
        mark = uuid.uuid4().hex
        process = subprocess.run(
            workspace.command(settings, *messages, level=level if messages else None),
            check=False,
            input=stdin,
            capture_output=True,
            timeout=PATIENCE,
            env={"PATH": os.environ["PATH"], MARKER: mark, **(env or {})},
            **{"cwd": workspace.place, **options},
        )
        assert is_plain(process.stdout), process.stdout
        assert is_plain(process.stderr), process.stderr
        assert TRACEBACK.encode() not in process.stderr, process.stderr.decode()
        assert list(workspace.tempdir.iterdir()) == []
        assert marked_processes(mark) == {}
        return DryRun(
            process.returncode, process.stdout.decode(), process.stderr.decode()
        )

    return run


# --- What becomes of a message ---


def test_whole_output(dry_run: StartDryRun) -> None:
    command = "echo Note >&2; sed s/Hello/Goodbye/"
    message = b"Subject: x\n\nHello\n"
    result = dry_run({"FilterCommand": command}, MESSAGE, message)
    output = re.sub(r"\d+\.\d{3} s", "N s", result.output)
    temporary = f"{output.partition('TMPDIR=')[2].splitlines()[0]}"
    assert (
        output
        == f"""\
passed   message-1: FILTERED, +1 -1 lines, N s
  environment:
    CLIENT=192.0.2.1 (example)
    SERVER=192.0.2.25
    SENDER=bounce@example.com
    RECIPIENTS=b@example.net
    REMOTE=198.51.100.1 (example)
    REMOTE_HELO=client.example (example)
    TMPDIR={temporary}
  filter: exit status 0, N s
  standard error:
    Note
  reply: the server's
  status: FILTERED
  changes:
    @@ -3,4 +3,4 @@
     To: b@example.net
     Subject: test
    {" "}
    -Hello
    +Goodbye
passed   message-2: FILTERED, +1 -1 lines, N s
  environment, otherwise as above:
    SENDER=sender@example.com (example)
    RECIPIENTS=recipient@example.net (example)
  filter: exit status 0, N s
  standard error:
    Note
  reply: the server's
  status: FILTERED
  changes:
    @@ -1,3 +1,3 @@
     Subject: x
    {" "}
    -Hello
    +Goodbye
2 messages: 2 passed, 0 dropped, 0 refused, 0 broken
"""
    )
    assert (result.exit_status, result.errors) == (0, "")


PASSES = "sed s/Hello/Goodbye/"
LINES = {
    PASSES: "passed   message-1: FILTERED, +1 -1 lines, N s",
    "echo Note >&2; cat": "passed   message-1: FILTERED, unchanged, N s",
    "echo 250 2.0.0 Ok >&2; exit 1": "dropped  message-1: 250 2.0.0 Ok, N s",
    "(echo No; echo 554 Spam) >&2; exit 1": "refused  message-1: 554 Spam, N s",
    "(echo No; echo Spam) >&2; exit 1": (
        f"refused  message-1: 550 Content Rejected; Spam, N s\n  {BARE}\n"
        "  standard error:\n    No\n    Spam"
    ),
    "exit 1": f"refused  message-1: 550 Content Rejected, N s\n  {BARE}",
    "(echo No; echo Spam) >&2; exit 75": (
        "broken   message-1: FILTER-ERROR, the client gets 451 Local Error, N s\n"
        "  standard error:\n    No\n    Spam"
    ),
}


@pytest.mark.parametrize(
    ("command", "level"),
    [
        *((command, None) for command in LINES),
        *((command, level) for level in (0, 1, 2) for command in ("exit 1", PASSES)),
    ],
)
def test_a_line_for_each_message(
    command: str, level: int | None, dry_run: StartDryRun
) -> None:
    """There is more where the filter has failed, or may have."""
    result = dry_run({"FilterCommand": command}, MESSAGE, level=level)
    *lines, summary = result.output.splitlines()
    assert re.sub(r"\d+\.\d{3} s", "N s", "\n".join(lines)) == LINES[command]
    end = LINES[command].split()[0]
    counts = [f"{int(kind == end)} {kind}" for kind in KINDS_OF_END]
    assert summary == f"1 message: {', '.join(counts)}{HINT}"


def test_refusal_without_a_reply_is_marked(dry_run: StartDryRun) -> None:
    """Others are not: a reply, a drop, a failure, a message that passes."""
    commands = {"exit 1": True, "echo oops >&2; exit 3": True, "exit 75": False}
    commands.update(dict.fromkeys(("cat", "echo 554 x >&2; exit 1"), False))
    for settings in ({}, OBSERVE):
        for command, is_bare in commands.items():
            result = dry_run({**settings, "FilterCommand": command}, MESSAGE)
            assert result.only.is_bare == is_bare, command
    assert not dry_run({"FilterType": "reject"}, MESSAGE).only.is_bare


def test_standard_error_is_shown(dry_run: StartDryRun) -> None:
    """All of it, but for the middle of what is long; it is the text of strangers."""
    octets = r"printf 'caf\303\251 \033[2J\351\n' >&2"
    result = dry_run({"FilterCommand": f"echo One >&2; {octets}; cat"}, MESSAGE)
    assert result.only.errors == ["One", r"caf\xc3\xa9 \x1b[2J\xe9"]
    settings = {"FilterCommand": "seq 1000 1100 >&2; cat"}
    numbers = [str(n) for n in range(1000, 1101)]
    note = "... 61 lines left out, -d 4 shows all"
    errors = dry_run(settings, MESSAGE).only.errors
    assert errors == [*numbers[:20], note, *numbers[-20:]]
    assert dry_run(settings, MESSAGE, level=4).only.errors == numbers


def test_standard_error_without_end_is_cut(dry_run: StartDryRun) -> None:
    """Its first and its last 8 kilobytes are kept."""
    command = "seq 1 200000 >&2; echo 554 Spam >&2; exit 1"
    numbers = b"".join(b"%d\n" % n for n in range(1, 200_001)) + b"554 Spam\n"
    result = dry_run({"FilterCommand": command}, MESSAGE, level=4)
    errors = result.only.errors
    (place,) = (n for n, line in enumerate(errors) if "left out" in line)
    assert errors[place] == f"... {len(numbers) - 2 * 8192} octets left out"
    assert errors[:place] == numbers[:8192].decode().splitlines()
    assert errors[place + 1 :] == numbers[-8192:].decode().splitlines()
    logged = [ln for ln in result.errors.splitlines() if ": FILTER < " in ln]
    assert [ln.partition(" < ")[2] for ln in logged] == errors


def test_long_changes_are_cut(dry_run: StartDryRun) -> None:
    settings = {"FilterCommand": "cat; seq 1 50; printf '%0200d\\n' 0"}
    whole = dry_run(settings, MESSAGE, level=4).only.changes
    numbers = [f"+{n}" for n in range(1, 51)]
    assert whole[-51:] == [*numbers, f"+{'0' * 200}"]
    note = f"... {len(whole) - 40} lines left out, -d 4 shows all"
    assert dry_run(settings, MESSAGE).only.changes == [*whole[:40], note]
    settings = {"FilterCommand": "cat; printf '%0200d\\n' 0"}
    changes = dry_run(settings, MESSAGE).only.changes
    assert changes[-1] == f"+{'0' * 159} ... 41 columns left out"


def test_many_recipients_are_cut(dry_run: StartDryRun) -> None:
    addresses = [f"r{n}@example.com" for n in range(60)]
    given = {"RECIPIENTS": "\n".join(addresses)}
    settings = {"FilterCommand": "cat"}
    whole = dry_run(settings, MESSAGE, env=given, level=4).only.environment
    assert whole["RECIPIENTS"].split("\n") == addresses
    output = dry_run(settings, MESSAGE, env=given).output
    assert "    ... 26 lines left out, -d 4 shows all\n" in output


UTF_8 = {"LANG": "C.UTF-8"}
TEXT = "Gr\u00fc\u00dfe \u4f60\u597d \U0001f600"
TRICKS = "\u202e\u2066\u200b\u0085\u2028\u00a0\x1b"


@pytest.mark.parametrize(
    ("locale", "is_text"),
    [
        (UTF_8, True),
        ({"LANG": "C", "LC_CTYPE": "C.UTF-8"}, True),
        ({"LANG": "C.UTF-8", "LC_ALL": "C"}, False),
        ({"LANG": "C.UTF-8", "LC_CTYPE": "C"}, False),
        ({"LANG": "C.UTF-8", "LC_ALL": ""}, True),
        ({"LANG": "de_DE.ISO-8859-1"}, False),
        ({"LANG": "xx_XX.UTF-8"}, True),
        ({}, False),
    ],
    ids=str,
)
def test_utf_8_where_the_locale_has_it(
    locale: Mapping[str, str], *, is_text: bool, workspace: Workspace
) -> None:
    """Characters that could deceive a reader or a terminal are never shown as such."""
    message = f"To: {TEXT[:5]}@example.com\n\n{TEXT}\n{TRICKS}\n".encode()
    message += b"\xff\xc3\n"
    command = workspace.command(
        {"FilterCommand": "cat >/dev/null; echo Gone"}, message, level=3
    )
    output = subprocess.run(
        command,
        check=True,
        capture_output=True,
        cwd=workspace.place,
        env={"PATH": os.environ["PATH"], **locale},
    ).stdout
    shown = TEXT if is_text else printable(TEXT.encode())
    assert f"    -{shown}\n".encode() in output
    assert f"RECIPIENTS={shown.partition('e ')[0]}e@".encode() in output
    tricks = "".join(rf"\x{octet:02x}" for octet in TRICKS.encode())
    assert f"    -{tricks}\n".encode() in output
    assert rb"-\xff\xc3" in output


@pytest.mark.parametrize(
    ("environment", "is_coloured"),
    [({}, True), ({"NO_COLOR": ""}, True), ({"NO_COLOR": "1"}, False)],
    ids=str,
)
def test_colours_on_a_terminal(
    environment: Mapping[str, str], *, is_coloured: bool, workspace: Workspace
) -> None:
    """In a pipe there are none: see `is_plain`, which all of these tests look at."""
    ours, terminal = os.openpty()
    command = workspace.command(
        {"FilterCommand": "sed s/Hello/Goodbye/"}, MESSAGE, level=3
    )
    inherited = {"PATH": os.environ["PATH"]}
    subprocess.run(
        command,
        check=True,
        stdout=terminal,
        cwd=workspace.place,
        env={**inherited, **environment},
    )
    os.close(terminal)
    output = b""
    with contextlib.suppress(OSError):  # EIO: nobody has the terminal open
        while block := os.read(ours, 4096):
            output += block
    os.close(ours)
    assert (b"\x1b[32m+Goodbye\x1b[m" in output) == is_coloured
    assert (b"\x1b[31m-Hello\x1b[m" in output) == is_coloured
    assert (b"\x1b[32mpassed" in output) == is_coloured
    assert (b"\x1b" in output) == is_coloured


@pytest.mark.parametrize(("kind", "name"), applicable(VERDICTS))
def test_verdict(kind: str, name: str, dry_run: StartDryRun) -> None:
    case = VERDICTS[name]
    result = dry_run(settings_of(kind, case.command(kind)), MESSAGE)
    only = result.only
    assert only.status == case.outcome
    assert result.errors == ""
    if case.outcome == "FILTERED":
        assert (result.exit_status, result.counts) == (0, {"passed": 1})
        assert only.reply == "the server's"
        assert f"+{FIELD.decode().strip()}" not in only.changes
        assert "+X-Seen: by 192.0.2.1" in only.changes
    else:
        end = "dropped" if case.outcome.startswith("2") else "refused"
        assert (result.exit_status, result.counts) == (1, {end: 1})
        assert only.reply == case.outcome
        assert only.changes == []


@pytest.mark.parametrize(("kind", "name"), applicable(FAILURES))
def test_failure(kind: str, name: str, dry_run: StartDryRun) -> None:
    case = FAILURES[name]
    result = dry_run(settings_of(kind, case.command(kind)), MESSAGE)
    assert (result.exit_status, result.counts) == (2, {"broken": 1})
    assert result.only.reply == "451 Local Error"
    assert result.only.status == "FILTER-ERROR"
    assert re.match(f"proxsmtpd: message-1: {case.outcome}\n", result.errors), (
        result.errors
    )


ENDS = {
    "cat": "exit status 0",
    "exit 3": "exit status 3",
    "exit 127": "exit status 127",
    "kill -KILL $$": "was ended by signal 9",
    "kill -TERM $$": "was ended by signal 15",
    "sleep 60": "did not end by itself",
    f": {'x' * 140_000}": "did not end by itself",
}


@pytest.mark.parametrize("command", ENDS, ids=lambda command: command[:20])
def test_end_of_the_filter(command: str, dry_run: StartDryRun) -> None:
    result = dry_run(settings_of("pipe", command), MESSAGE)
    assert re.fullmatch(rf"{ENDS[command]}, \d+\.\d{{3}} s", result.only.filter)


def test_time_of_the_filter(dry_run: StartDryRun) -> None:
    begun = time.monotonic()
    result = dry_run({"FilterCommand": "sleep 0.3; cat"}, MESSAGE)
    most = time.monotonic() - begun
    assert 0.3 <= float(result.only.filter.split()[-2]) < most


CHANGES = {
    "none": ("cat", []),
    "a line more at the end": (
        "cat; echo More",
        ["@@ -4,3 +4,4 @@", " Subject: test", " ", " Hello", "+More"],
    ),
    "a line less at the start": (
        "sed 1d",
        [
            "@@ -1,4 +1,3 @@",
            "-Return-Path: <bounce@example.com>",
            " From: A <a@example.com>",
            " To: b@example.net",
            " Subject: test",
        ],
    ),
    "LF only": (r"tr -d '\r'", []),
    "an end without newline": ("head -c -2", []),
    "a last line without newline": (
        "cat; printf More",
        ["@@ -4,3 +4,4 @@", " Subject: test", " ", " Hello", "+More"],
    ),
    "a lone dot": (
        "cat; echo .",
        ["@@ -4,3 +4,4 @@", " Subject: test", " ", " Hello", "+."],
    ),
    "bare CR": (
        r"sed 's/Hello/a\rb/'",
        [
            "@@ -3,4 +3,4 @@",
            " To: b@example.net",
            " Subject: test",
            " ",
            "-Hello",
            "+a b",
        ],
    ),
    "octets": (
        r"sed 's/Hello/\x00\x1b\xe9\t/'",
        [
            "@@ -3,4 +3,4 @@",
            " To: b@example.net",
            " Subject: test",
            " ",
            "-Hello",
            r"+\x00\x1b\xe9\x09",
        ],
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changes(name: str, dry_run: StartDryRun) -> None:
    """Lines as the server would get them, before the transparency procedure."""
    command, expected = CHANGES[name]
    result = dry_run({"FilterCommand": command}, MESSAGE, env={"LC_ALL": "C"})
    assert result.only.changes == expected
    counts = [[line[0] for line in expected].count(mark) for mark in "+-"]
    lines = "+{} -{} lines".format(*counts) if expected else "unchanged"
    assert result.only.summary.startswith(f"FILTERED, {lines}, ")


def test_change_that_looks_like_none(dry_run: StartDryRun) -> None:
    """An octet and its printed name look alike and are not the same."""
    message = MESSAGE + b"caf\xe9\r\n"
    command = r"sed 's/\xe9/\\xe9/'"
    result = dry_run({"FilterCommand": command}, message, env={"LC_ALL": "C"})
    assert result.only.summary.startswith("FILTERED, +1 -1 lines, ")


# Settings beyond the filter's own; the exit status, what it counts as, the reply, the
# status, and whether the filter ran.
SETTINGS: Mapping[str, tuple[Mapping[str, object], int, str, str, str, bool]] = {
    "no filter": ({"FilterCommand": ""}, 0, "passed", "the server's", "PASSED", False),
    "reject": (
        {"FilterType": "reject"},
        1,
        "refused",
        "530 Email Rejected",
        "REJECTED",
        False,
    ),
    "reject with words": (
        {"FilterType": "reject", "FilterReject": "451 4.7.1 Later"},
        1,
        "refused",
        "451 4.7.1 Later",
        "REJECTED",
        False,
    ),
    "observe": (
        {**OBSERVE, "FilterCommand": "echo 554 Spam >&2; exit 1"},
        0,
        "passed",
        "the server's",
        "OBSERVED: 554 Spam",
        True,
    ),
    "observe a change": (
        {**OBSERVE, "FilterCommand": "echo gone"},
        0,
        "passed",
        "the server's",
        "OBSERVED: FILTERED",
        True,
    ),
    "observe a failure": (
        {**OBSERVE, "FilterCommand": "exit 127"},
        2,
        "broken",
        "the server's",
        "OBSERVED: FILTER-ERROR",
        True,
    ),
    "pass": (
        {**PASS, "FilterCommand": "exit 127"},
        2,
        "broken",
        "the server's",
        "FILTER-ERROR, passed",
        True,
    ),
    "pass, but terminated": (
        {**PASS, "FilterCommand": "kill -TERM $$"},
        2,
        "broken",
        "451 Local Error",
        "FILTER-ERROR",
        True,
    ),
    "too large": (
        {"MaxMessageSize": len(MESSAGE) - 1},
        1,
        "refused",
        "552 Message too large",
        "552 Message too large",
        False,
    ),
    "just not too large": (
        {"MaxMessageSize": len(MESSAGE)},
        0,
        "passed",
        "the server's",
        "FILTERED",
        True,
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings(name: str, dry_run: StartDryRun) -> None:
    settings, exit_status, end, reply, status, ran = SETTINGS[name]
    result = dry_run({"FilterCommand": "cat", **HEADER, **settings}, MESSAGE)
    only = result.only
    assert (result.exit_status, result.counts) == (exit_status, {end: 1})
    assert (only.reply, only.status) == (reply, status)
    assert bool(only.environment) == bool(only.filter) == ran
    expected = ["@@ -2,5 +2,6 @@", " From: A <a@example.com>", " To: b@example.net"]
    expected += [" Subject: test", "+X-Seen: by 192.0.2.1", " ", " Hello"]
    assert only.changes == (expected if reply == "the server's" else [])


@pytest.mark.parametrize("settings", [{}, OBSERVE, PASS], ids=str)
def test_message_that_cannot_be_stored(
    settings: Mapping[str, object], workspace: Workspace
) -> None:
    """The daemon would answer 451, in whichever mode."""
    large = MESSAGE + b"x" * 2_000_000
    whole = {"FilterCommand": "cat", "TempDirectory": "/proc", **settings}
    result = with_descriptors(workspace, workspace.command(whole, large, level=3), "")
    assert (result.exit_status, result.counts) == (2, {"broken": 1})
    assert result.only.reply == "451 Local Error"
    assert result.only.status == "FILTER-ERROR"
    text = "couldn't write to cache file: No such file or directory"
    assert result.errors == f"proxsmtpd: message-1: {text}\n"


# --- Several messages, and where they come from ---


def test_several_messages(dry_run: StartDryRun) -> None:
    verdicts = 'p*) cat;; b*) exit 127;; *) echo "$verdict" >&2; exit 1;;'
    command = f"read x verdict; case $verdict in {verdicts} esac"
    settings = {"FilterCommand": command}
    passed, dropped, refused, broken = (
        b"X: %s\n\nHello\n" % verdict for verdict in (b"p", b"250 x", b"554 x", b"b")
    )
    result = dry_run(settings, passed, refused, passed, dropped, broken, dropped)
    assert [p.name for p in result.results] == [f"message-{n}" for n in range(1, 7)]
    assert [p.status for p in result.results] == (
        ["FILTERED", "554 x", "FILTERED", "250 x", "FILTER-ERROR", "250 x"]
    )
    assert result.counts == {"passed": 2, "dropped": 2, "refused": 1, "broken": 1}
    assert result.exit_status == 2
    assert dry_run(settings, passed, passed).exit_status == 0
    assert dry_run(settings, passed, dropped).exit_status == 1
    assert dry_run(settings, passed, refused).exit_status == 1
    assert dry_run(settings, refused, broken, passed).exit_status == 2


def test_standard_input(dry_run: StartDryRun) -> None:
    settings = {"FilterCommand": "sed s/Hello/Goodbye/"}
    result = dry_run(settings, "-", stdin=MESSAGE)
    assert (result.exit_status, result.counts) == (0, {"passed": 1})
    assert result.only.name == "-"
    assert result.only.changes[-2:] == ["-Hello", "+Goodbye"]
    assert result.only.environment["SENDER"] == "bounce@example.com"


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("nowhere", "No such file or directory"),
        ("temp", "Is a directory"),
        ("proxsmtpd.conf/x", "Not a directory"),
        ("\x1b[2J\udce9", "No such file or directory"),
    ],
)
def test_message_that_cannot_be_read(
    name: str, error: str, dry_run: StartDryRun
) -> None:
    """It counts as broken, and the others are filtered."""
    result = dry_run({"FilterCommand": "cat"}, MESSAGE, name, MESSAGE)
    assert (result.exit_status, result.counts) == (2, {"passed": 2, "broken": 1})
    shown = printable(os.fsencode(name))
    assert result.errors == f"proxsmtpd: couldn't read message: {shown}: {error}\n"
    assert [p.name for p in result.results] == ["message-1", shown, "message-2"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "message",
    [
        MESSAGE.replace(b"\r\n", b"\n"),
        MESSAGE,
        MESSAGE.replace(b"\r\n", b"\n")[:-1],
        MESSAGE.replace(b"Hello\r\n", b"Hello"),
    ],
    ids=["LF", "CRLF", "LF without the last", "CRLF without the last"],
)
def test_filter_gets_crlf(
    message: bytes, kind: str, dry_run: StartDryRun, tmp_path: Path
) -> None:
    saved = tmp_path / "saved"
    command = f"tee {saved}" if kind == "pipe" else f'cp "$EMAIL" {saved}'
    result = dry_run({"FilterCommand": command, "FilterType": kind}, message)
    assert result.counts == {"passed": 1}
    assert saved.read_bytes() == MESSAGE
    assert result.only.changes == []


@pytest.mark.parametrize("kind", KINDS)
def test_any_octets(kind: str, dry_run: StartDryRun, tmp_path: Path) -> None:
    """The filter gets them as they are; on the terminal they are harmless."""
    octets = bytes(n for n in range(256) if n not in b"\r\n")
    message = MESSAGE + octets + b"\r\n" + octets * 9 + b"\r\n"
    saved = tmp_path / "saved"
    command, more = f"tee {saved}; echo More", "printf '554 \\033[2J\\351' >&2; exit 1"
    if kind == "file":
        command = f'cp "$EMAIL" {saved}; echo More >>"$EMAIL"'
    settings = {"FilterType": kind}
    result = dry_run({**settings, "FilterCommand": command}, message, level=4)
    assert saved.read_bytes() == message
    assert result.only.changes[-1] == "+More"
    assert result.only.changes[-3] == f" {printable(octets)}"
    result = dry_run({**settings, "FilterCommand": f"{command}; {more}"}, message)
    assert result.only.reply == result.only.status == "554 ?[2J?"


@pytest.mark.parametrize("message", [b"", b"\n", b"\r\n", b"no header"])
def test_strange_messages(message: bytes, dry_run: StartDryRun) -> None:
    result = dry_run({"FilterCommand": "cat"}, message)
    assert (result.exit_status, result.counts) == (0, {"passed": 1})
    assert result.only.changes == []


def test_large_messages(dry_run: StartDryRun) -> None:
    """Megabytes take no longer than the user of a terminal may wait."""
    lines = b"".join(b"%070d\r\n" % number for number in range(60_000))
    result = dry_run(
        {"FilterCommand": "sed s/Hello/Goodbye/", **HEADER}, MESSAGE + lines
    )
    assert result.counts == {"passed": 1}
    assert [c for c in result.only.changes if c[0] in "+-"] == (
        ["+X-Seen: by 192.0.2.1", "-Hello", "+Goodbye"]
    )


# --- The environment ---

EXAMPLES = {
    "CLIENT": "192.0.2.1",
    "SENDER": "sender@example.com",
    "RECIPIENTS": "recipient@example.net",
    "REMOTE": "198.51.100.1",
    "REMOTE_HELO": "client.example",
}
GIVEN = {
    "CLIENT": "203.0.113.7",
    "SENDER": "<>",
    "RECIPIENTS": "one@example.net\ntwo@example.net",
    "REMOTE": "2001:db8::1",
    "REMOTE_HELO": "mx.example",
}
FROM_HEADER = {
    b"Subject: none\n": {},
    b"Return-Path: <r@example.com>\nFrom: f@example.com\n": {"SENDER": "r@example.com"},
    b"Return-Path: r@example.com\n": {"SENDER": "r@example.com"},
    b"Return-Path: <>\nFrom: f@example.com\n": {"SENDER": "<>"},
    b"From: F <f@example.com>, g@example.com\n": {"SENDER": "f@example.com"},
    b"To: t@example.com\n": {"RECIPIENTS": "t@example.com"},
    b"Cc: c@example.com\n": {"RECIPIENTS": "c@example.com"},
    b"Cc: c@example.com\nTo: T <t@example.com>,\n u@example.com\nBcc: x@y\n": {
        "RECIPIENTS": "t@example.com\nu@example.com\nc@example.com"
    },
    b"To: t@example.com\nTo: u@example.com\n": {
        "RECIPIENTS": "t@example.com\nu@example.com"
    },
    b"To: undisclosed-recipients:;\n": {},
    b"To: list: t@example.com, u@example.com;\n": {
        "RECIPIENTS": "t@example.com\nu@example.com"
    },
    b'To: "T, U" <t@example.com>, "a b"@example.com\n': {
        "RECIPIENTS": 't@example.com\n"a b"@example.com'
    },
    b"From: J\xf6rg <f@example.com>\nTo: =?utf-8?q?=C3=B6?= <t@example.com>\n": {
        "SENDER": "f@example.com",
        "RECIPIENTS": "t@example.com",
    },
    b'From: "Long Name Of The Company,\n Department" <f@example.com>\n': {
        "SENDER": "f@example.com"
    },
    b"From: j\xc3\xb6rg@example.com\nTo: j\xf6rg@example.com\n": {
        "SENDER": "j\xf6rg@example.com",
        "RECIPIENTS": "j\udcf6rg@example.com",
    },
    b"from: f@example.com\nTO: t@example.com\n": {
        "SENDER": "f@example.com",
        "RECIPIENTS": "t@example.com",
    },
    b"Subject: x\n\nFrom: f@example.com\nTo: t@example.com\n": {},
}


@pytest.mark.parametrize("header", FROM_HEADER)
def test_envelope_of_the_header(header: bytes) -> None:
    expected = {
        name.encode(): to_octets(value) for name, value in FROM_HEADER[header].items()
    }
    message = header.replace(b"\n", b"\r\n") + b"\r\nHello\r\n"
    assert envelope_of(message) == expected


def test_environment_of_examples_header_and_caller(dry_run: StartDryRun) -> None:
    """Each goes before those that stand before it."""
    settings = {"FilterCommand": "cat"}
    only = dry_run(settings, b"Subject: none\n\nHello\n").only
    assert only.examples == EXAMPLES.keys()
    bare = only.environment
    temporary = {"TMPDIR": bare["TMPDIR"], "SERVER": "192.0.2.25"}
    assert bare == {**EXAMPLES, **temporary}
    told = {"SENDER": "bounce@example.com", "RECIPIENTS": "b@example.net"}
    assert dry_run(settings, MESSAGE).only.environment == (
        {**EXAMPLES, **told, **temporary}
    )
    for name, value in GIVEN.items():
        only = dry_run(settings, MESSAGE, env={name: value}).only
        assert only.environment == {**EXAMPLES, **told, name: value, **temporary}
        assert only.examples == EXAMPLES.keys() - told.keys() - {name}
    stale = {"TMPDIR": "/nowhere", "EMAIL": "/nowhere/mail", "SERVER": "192.0.2.99"}
    result = dry_run(settings, MESSAGE, env={**GIVEN, **stale})
    assert result.only.environment == {**GIVEN, **temporary}
    assert result.only.examples == set()


@pytest.mark.parametrize("kind", KINDS)
def test_environment_that_is_the_same_is_shown_once(
    kind: str, dry_run: StartDryRun
) -> None:
    settings = {"FilterCommand": "exec cat", "FilterType": kind}
    for given, own in (
        ({}, {"SENDER", "RECIPIENTS"}),
        ({"SENDER": "<>"}, {"RECIPIENTS"}),
        ({"SENDER": "<>", "RECIPIENTS": "x@y"}, set[str]()),
    ):
        messages = (MESSAGE, b"To: t@example.com\n\n", MESSAGE)
        output = dry_run(settings, *messages, env=given).output
        names = re.findall(r"^    ([A-Z_]+)=", output, re.M)
        expected = own | ({"EMAIL"} if kind == "file" else set())
        assert {name for name in names if names.count(name) == 3} == expected
        assert {name for name in names if names.count(name) == 1} == (
            {*EXAMPLES, "SERVER", "TMPDIR"} - expected
        )


def test_environment_shown_is_the_filters(dry_run: StartDryRun, tmp_path: Path) -> None:
    saved = tmp_path / "environ"
    given: dict[str, Union[str, bytes]] = {**GIVEN, "OTHER": "kept"}
    given["SENDER"] = b"caf\xe9\x1b[2J@example.com"
    command = f'cat /proc/self/environ >{saved}; test -f "$EMAIL"'
    settings = {"FilterCommand": command, "FilterType": "file"}
    result = dry_run(settings, MESSAGE, env=given)
    assert result.counts == {"passed": 1}
    found = saved_environment(saved)
    shown = {
        name: "\n".join(printable(line) for line in found[name.encode()].split(b"\n"))
        for name in (*EXAMPLES, "SERVER", "TMPDIR", "EMAIL")
    }
    assert result.only.environment == shown
    assert found[b"SENDER"] == b"caf\xe9\x1b[2J@example.com"
    assert found[b"OTHER"] == b"kept"
    assert found[b"EMAIL"].startswith(found[b"TMPDIR"] + b"/")


def test_variable_that_the_caller_has_emptied(
    dry_run: StartDryRun, tmp_path: Path
) -> None:
    """So one sees what the filter does without it, as in the daemon."""
    saved = tmp_path / "environ"
    empty = dict.fromkeys(("REMOTE", "REMOTE_HELO"), "")
    command = f"cat /proc/self/environ >{saved}; cat"
    result = dry_run({"FilterCommand": command}, MESSAGE, env=empty)
    assert not result.only.environment.keys() & empty.keys()
    assert not saved_environment(saved).keys() & {b"REMOTE", b"REMOTE_HELO"}


@pytest.mark.parametrize(
    ("address", "server"),
    [
        ("192.0.2.25", "192.0.2.25"),
        ("[2001:db8::25]:25", "2001:db8::25"),
        ("mx.example:25", "mx.example"),
        ("25", None),
        ("/run/lmtp.sock", None),
    ],
)
def test_server_is_what_out_address_says(
    address: str, server: str | None, dry_run: StartDryRun
) -> None:
    settings = {"FilterCommand": "cat", "OutAddress": address}
    assert dry_run(settings, MESSAGE).only.environment.get("SERVER") == server


@pytest.mark.parametrize("field", [b"From", b"To"])
def test_nul_in_an_address(field: bytes, dry_run: StartDryRun) -> None:
    result = dry_run({"FilterCommand": "cat"}, field + b": a\0b@example.com\n\nHello\n")
    assert result.exit_status in (0, 2)


def test_more_recipients_than_a_transaction_has(dry_run: StartDryRun) -> None:
    """The daemon would have had the client send the rest in another transaction."""
    names = (b"recipient-%05d@example.com" % number for number in range(6000))
    message = b"To: " + b",\n ".join(names) + b"\n\nHello\n"
    assert dry_run({"FilterCommand": "cat"}, message).counts == {"passed": 1}


# --- The daemon says the same ---

MODES = {"enforce": {}, "pass": PASS, "observe": OBSERVE}


def all_cases(kind: str) -> dict[str, str]:
    """Return the commands of all cases for a type of filter, by a name for each."""
    table = {**VERDICTS, **FAILURES, "terminated": both("kill -TERM $$", "")}
    # Only a command of the configuration can be too long for the system.
    commands = [table[name].command(kind) for name in table if name != "cannot start"]
    return {f"case-{n}@example.com": c for n, c in enumerate(filter(None, commands))}


def changes_between(before: bytes, after: bytes) -> list[str]:
    old, new = (
        [printable(line) for line in message.split(b"\r\n")[:-1]]
        for message in (before, after)
    )
    return list(difflib.unified_diff(old, new, lineterm=""))[2:]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_daemon_does_the_same(
    kind: str,
    mode: str,
    workspace: Workspace,
    proxsmtpd: StartDaemon,
    server: ScriptedServer,
) -> None:
    """Environment, reply, status and message, with the very same configuration."""
    cases = all_cases(kind)
    scripts = workspace.place / "scripts"
    scripts.mkdir()
    for name, command in cases.items():
        saving = f'cat /proc/self/environ >"$SAVED.{name}"\n'
        (scripts / name).write_text(
            f"{saving}{command.replace('sleep 60', 'sleep 9')}\n"
        )
    settings = {**settings_of(kind, f'. "{scripts}/$SENDER"'), "FilterTimeout": 1}
    same = {"PWD": os.getcwd(), "CLIENT": "127.0.0.1"}
    daemon = proxsmtpd(
        {**settings, **MODES[mode]},
        env={**same, "SAVED": str(workspace.place / "daemon")},
    )
    messages = {
        name: b"Return-Path: <%s>\r\nTo: b@example.com\r\n\r\n.\r\n..Hello \xe9\0\r\n"
        % name.encode()
        for name in cases
    }

    names = []
    for name, message in messages.items():
        names.append(str(workspace.place / f"{name}.eml"))
        Path(names[-1]).write_bytes(message)
    dry_run = subprocess.run(
        # With -d for the daemon's directory, which is not / then.
        [*program_under_test(), "-d4", "-t", "-f", str(daemon.config), *names],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **same, "SAVED": str(workspace.place / "dry_run")},
    )
    results = DryRun(dry_run.returncode, dry_run.stdout, dry_run.stderr).results
    assert len(results) == len(cases)

    client = daemon.connect(timeout=PATIENCE)
    client.start(b"<nobody@example.com>")
    client.expect(b"RSET", b"250")
    for result, (name, message) in zip(results, messages.items()):
        client.expect(b"XFORWARD ADDR=198.51.100.1 HELO=client.example", b"250")
        client.envelope(b"<%s>" % name.encode())
        accepted = len(server.messages)
        reply = client.message(stuffed(message))
        name_in_log = re.escape(f"from={name}, to=b@example.com")
        assert result.status == daemon.wait_log(rf"{name_in_log}, status=(.*)$")[1]
        if result.reply == "the server's":
            assert reply == QUEUED
            sent = unstuffed(server.messages[accepted].data)
            assert result.changes == changes_between(message, sent)
        else:
            assert reply.decode() == result.reply + "\r\n"
            assert len(server.messages) == accepted
        found, expected = (
            saved_environment(workspace.place / f"{who}.{name}")
            for who in ("dry_run", "daemon")
        )
        assert found.keys() | {MARKER.encode()} == expected.keys()
        differing = {v for v in found if found[v] != expected[v]}
        assert differing <= {b"SAVED", b"EMAIL"}


# --- How it ends before its end ---


class Running:
    """A dry run under way, with its output in a pipe."""

    def __init__(self, workspace: Workspace, command: Sequence[str]) -> None:
        self._tempdir, self._mark = workspace.tempdir, uuid.uuid4().hex
        self.process: subprocess.Popen[bytes] = subprocess.Popen(
            # Of a shell's background job the signal is ignored.
            ["env", "--default-signal=INT", *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=workspace.place,
            env={**os.environ, MARKER: self._mark},
        )

    def line(self) -> bytes:
        """Return the next line of what it says."""
        assert self.process.stdout
        return self.process.stdout.readline()

    def wait_error(self, text: bytes) -> None:
        """Wait until this is in a line on standard error."""
        assert self.process.stderr
        assert any(text in line for line in self.process.stderr)

    def rest(self) -> tuple[bytes, bytes]:
        """Wait for its end; returns the rest of its output and its errors."""
        assert self.process.stdout
        assert self.process.stderr
        self.process.wait(PATIENCE)
        output, errors = self.process.stdout.read(), self.process.stderr.read()
        assert TRACEBACK.encode() not in errors, errors.decode()
        assert b"Exception" not in errors, errors.decode()
        return output, errors

    def left(self) -> list[str]:
        """List its files in TempDirectory and its processes."""
        files = [path.name for path in self._tempdir.iterdir()]
        return files + list(marked_processes(self._mark).values())

    def close(self) -> None:
        """End all that is left."""
        for pid in marked_processes(self._mark):
            os.kill(pid, signal.SIGKILL)
        with self.process:
            pass


Start = Callable[..., Running]


@pytest.fixture
def start(workspace: Workspace) -> Iterator[Start]:
    """Starts a dry run of these settings and messages."""
    with contextlib.ExitStack() as at_end:

        def start(
            settings: Mapping[str, object],
            *messages: Union[bytes, str],
            level: int | None = 4,
        ) -> Running:
            running = Running(
                workspace, workspace.command(settings, *messages, level=level)
            )
            return at_end.enter_context(contextlib.closing(running))

        yield start


def test_reader_that_has_seen_enough(start: Start, tmp_path: Path) -> None:
    """It ends silently when the reader, like ``head -1``, goes."""
    go = tmp_path / "go"
    os.mkfifo(go)
    running = start(
        {"FilterCommand": f"grep Hello || {{ read x <{go}; echo x; }}"},
        MESSAGE,
        b"Second\n",
        MESSAGE,
        level=None,
    )
    assert running.line().startswith(b"passed   message-1: FILTERED, ")
    assert running.process.stdout
    running.process.stdout.close()
    go.write_text("go\n")
    assert running.process.wait(PATIENCE) == 2
    assert running.process.stderr
    assert running.process.stderr.read() == b""
    assert running.left() == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("defence", ["", "trap '' TERM; "], ids=["", "SIGTERM ignored"])
def test_interrupt(kind: str, defence: str, start: Start, tmp_path: Path) -> None:
    """The filter is ended with all of its processes; the next message is not run."""
    ready = tmp_path / "ready"
    command = f"{defence}sleep 60 & : >{ready}; wait"
    settings = {"FilterCommand": command, "FilterType": kind}
    running = start(settings, MESSAGE, MESSAGE)
    running.wait_error(b"executed filter command")
    assert poll(ready.exists)
    running.process.send_signal(signal.SIGINT)
    output, errors = running.rest()
    assert running.process.returncode == 2
    assert output == b""
    assert len(re.findall(rb"killing filter process \(pid \d+\)\n", errors)) == 1
    assert poll(lambda: running.left() == [])


@pytest.mark.parametrize("kind", KINDS)
def test_second_interrupt(kind: str, start: Start, tmp_path: Path) -> None:
    """Whoever cannot wait for the filter's end gets it at once."""
    ready = tmp_path / "ready"
    command = f"trap '' TERM; sleep 60 & : >{ready}; wait"
    running = start({"FilterCommand": command, "FilterType": kind}, MESSAGE)
    running.wait_error(b"executed filter command")
    assert poll(ready.exists)
    running.process.send_signal(signal.SIGINT)
    running.wait_error(b"killing filter process")
    running.process.send_signal(signal.SIGINT)
    running.rest()
    assert running.process.returncode == 2
    assert poll(lambda: running.left() == [], 5)


def test_interrupt_while_it_reads(start: Start) -> None:
    running = start({"FilterCommand": "cat"}, MESSAGE, "-", level=None)
    assert running.line().startswith(b"passed   message-1: ")
    running.process.send_signal(signal.SIGINT)
    assert running.rest() == (b"", b"")
    assert running.process.returncode == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_termination(number: signal.Signals, start: Start, tmp_path: Path) -> None:
    """SIGTERM comes from timeout(1), SIGHUP from the end of the terminal."""
    ready = tmp_path / "ready"
    settings = {"FilterCommand": f": >{ready}; exec sleep 60", "FilterType": "file"}
    running = start(settings, MESSAGE)
    running.wait_error(b"executed filter command")
    assert poll(ready.exists)
    running.process.send_signal(number)
    running.rest()
    assert running.process.returncode != 0
    assert poll(lambda: running.left() == [], 5)


# --- Standard descriptors that are not as usual ---


def with_descriptors(
    workspace: Workspace, arguments: Sequence[str], how: str
) -> DryRun:
    """Run the program with what the shell makes of its descriptors."""
    process = subprocess.run(
        ["sh", "-c", f'exec "$@" {how}', "sh", *arguments],
        check=False,
        capture_output=True,
        timeout=PATIENCE,
        cwd=workspace.place,
    )
    errors = process.stderr.decode()
    assert TRACEBACK not in errors, errors
    assert "Exception" not in errors, errors
    return DryRun(process.returncode, process.stdout.decode(), errors)


def test_no_standard_input(workspace: Workspace) -> None:
    settings = {"FilterCommand": "sed s/Hello/Goodbye/"}
    command = workspace.command(settings, MESSAGE, level=3)
    result = with_descriptors(workspace, command, "<&-")
    assert (result.exit_status, result.counts) == (0, {"passed": 1})
    assert result.only.changes[-2:] == ["-Hello", "+Goodbye"]


@pytest.mark.parametrize(
    ("how", "message", "exit_status"),
    [("<&-", "-", 2), (">&-", MESSAGE, 0), (">/dev/full", MESSAGE, 2)],
    ids=["no input", "no output", "full output"],
)
def test_descriptor_that_is_missing_or_full(
    how: str, message: Union[bytes, str], exit_status: int, workspace: Workspace
) -> None:
    command = workspace.command({"FilterCommand": "cat"}, message)
    assert with_descriptors(workspace, command, how).exit_status == exit_status


def test_check_with_full_output(workspace: Workspace) -> None:
    result = with_descriptors(
        workspace, workspace.command({"OutAddress": 25}), ">/dev/full"
    )
    assert result.exit_status == 1
    assert re.fullmatch(
        r"proxsmtpd: couldn't write to standard output: No space left on device",
        result.errors.splitlines()[-1],
    )


@pytest.mark.parametrize("how", [">&-", "<&- >&-", "<&- 2>&-"])
def test_check_with_descriptors_closed(how: str, workspace: Workspace) -> None:
    command = workspace.command({"OutAddress": 25})
    assert with_descriptors(workspace, command, how).exit_status == 0


def test_filter_runs_where_the_daemons_does(workspace: Workspace) -> None:
    """Its directory is / unless -d is given; messages are found in the caller's."""
    saved = workspace.place / "directory"
    (workspace.place / "here.eml").write_bytes(MESSAGE)
    settings = {"FilterCommand": f"pwd >{saved}; env | grep ^PWD= >>{saved}; cat"}
    for level, directory in (None, "/"), (1, str(workspace.place)):
        command = workspace.command(settings, level=level)
        result = with_descriptors(workspace, [*command, "here.eml"], "")
        assert result.counts == {"passed": 1}
        assert saved.read_text() == f"{directory}\nPWD={directory}\n"


def test_check_in_limited_time(workspace: Workspace, make_server: MakeServer) -> None:
    """It takes seconds, however slow the server is."""
    drops = [b"220-x\r\n"] * 100
    server = make_server({"GREETING": Chunks(drops, 0.5)})
    command = workspace.command({"OutAddress": server.address})
    begin = time.monotonic()
    result = with_descriptors(workspace, command, "")
    assert time.monotonic() - begin < 6
    assert re.search(r"does not talk SMTP: .*timed out$", result.errors, re.M)
    assert result.exit_status == 0


def test_filter_gets_no_descriptor_of_the_callers(workspace: Workspace) -> None:
    """A filter has three, as in the daemon."""
    saved = workspace.place / "descriptors"
    command = workspace.command(
        {"FilterCommand": f"ls /proc/$$/fd >{saved}; cat"}, MESSAGE
    )
    assert with_descriptors(workspace, command, "7</dev/null").counts == {"passed": 1}
    assert "7" not in saved.read_text().split()


# --- The command line ---


def test_configuration_that_is_wrong(dry_run: StartDryRun) -> None:
    result = dry_run({"FilterCommand": "cat", "FilterMode": "look"}, MESSAGE)
    assert (result.exit_status, result.output) == (2, "")
    expected = "invalid value for FilterMode (must specify 'enforce' or 'observe')"
    assert result.errors.endswith(f": {expected}\n")


def test_levels(workspace: Workspace) -> None:
    """More of the log is on standard error."""
    command = workspace.command({"FilterCommand": "cat"}, MESSAGE, level=4)
    result = with_descriptors(workspace, command, "")
    assert result.counts == {"passed": 1}
    assert re.search(
        r"^proxsmtpd: message-1: executed filter command: cat ", result.errors, re.M
    )


def test_dry_run_needs_no_server(dry_run: StartDryRun, server: ScriptedServer) -> None:
    settings = {"FilterCommand": "cat", "OutAddress": server.address, "XClient": "on"}
    result = dry_run(settings, MESSAGE)
    assert (result.exit_status, result.errors) == (0, "")
    assert server.connections == []


# --- The server, by -t alone ---

NO_XFORWARD = tuple(e for e in EXTENSIONS if not e.startswith(b"XFORWARD"))
XCLIENT = (*EXTENSIONS, b"XCLIENT NAME ADDR")
ASKING = ': "$REMOTE"; cat'  # a filter that uses what XFORWARD brings
ALL = {"XClient": "on", "FilterCommand": ASKING}
NO_SMTP = "does not talk SMTP: .*"


class ServerCase(NamedTuple):
    """A server, our settings, and patterns of the warnings after its address."""

    script: Mapping[str, Reply]
    extensions: Sequence[bytes]
    settings: Mapping[str, object]
    warnings: Sequence[str] = ()


SERVERS = {
    "has all": ServerCase({}, XCLIENT, ALL),
    "has it in lower case": ServerCase({}, (b"xclient addr", b"xforward addr"), ALL),
    "needs nothing": ServerCase({}, (), {}),
    "no XCLIENT": ServerCase({}, EXTENSIONS, ALL, ["does not offer XCLIENT"]),
    "no XFORWARD": ServerCase(
        {}, NO_XFORWARD, {"FilterCommand": ASKING}, ["does not offer XFORWARD"]
    ),
    "no XFORWARD, and no use for it": ServerCase(
        {}, NO_XFORWARD, {"FilterCommand": "cat"}
    ),
    "neither": ServerCase(
        {}, (), ALL, ["does not offer XCLIENT", "does not offer XFORWARD"]
    ),
    "no EHLO": ServerCase(
        {"EHLO": b"502 5.5.1 No\r\n"}, (), {"XClient": "on"}, ["does not offer XCLIENT"]
    ),
    "closes": ServerCase({"GREETING": Close()}, (), {}, [f"{NO_SMTP}closed.*"]),
    "closes at EHLO": ServerCase({"EHLO": Close()}, (), ALL, [f"{NO_SMTP}closed.*"]),
    "resets": ServerCase(
        {"GREETING": Reset(b"220 s")},
        (),
        {},
        # Perhaps before connect() has returned.
        [rf"(?:{NO_SMTP}|cannot be connected to: Connection )reset.*"],
    ),
    "nonsense": ServerCase(
        {"GREETING": b"SSH-2.0-x\x1b[2J\xe9\r\n"},
        (),
        {},
        [rf"{NO_SMTP}not a reply: SSH-2\.0-x\\x1b\[2J\\xe9"],
    ),
    "nonsense at EHLO": ServerCase(
        {"EHLO": b"What?\r\n"}, (), {}, [f"{NO_SMTP}What\\?"]
    ),
    "no end of a reply": ServerCase(
        {"EHLO": b"250-x\r\n" * 100_000}, (), {}, [f"{NO_SMTP}without end"]
    ),
    "silent": ServerCase({"GREETING": Stall()}, (), {}, [f"{NO_SMTP}timed out"]),
    "silent at EHLO": ServerCase({"EHLO": Stall()}, (), {}, [f"{NO_SMTP}timed out"]),
    "silent at QUIT": ServerCase({"QUIT": Stall()}, XCLIENT, ALL),
}


def check(
    dry_run: StartDryRun, settings: Mapping[str, object], most: float = 15
) -> list[str]:
    """Return the warnings of `-t` about OutAddress; the exit status stays 0.

    It has done so within `most` seconds.
    """
    begun = time.monotonic()
    result = dry_run(settings)
    assert time.monotonic() - begun < most
    assert (result.exit_status, result.output) == (0, "configuration is OK\n")
    lines = result.errors.splitlines()
    start = f"proxsmtpd: OutAddress {settings['OutAddress']} "
    assert all(line.startswith(start) for line in lines), lines
    return [line.removeprefix(start) for line in lines]


@pytest.mark.parametrize("name", SERVERS)
def test_server(name: str, make_server: MakeServer, dry_run: StartDryRun) -> None:
    case = SERVERS[name]
    server = make_server(case.script, extensions=case.extensions)
    warnings = check(dry_run, {"OutAddress": server.address, **case.settings})
    assert len(warnings) == len(case.warnings), warnings
    for warning, pattern in zip(warnings, case.warnings):
        assert re.fullmatch(pattern, warning)
    assert len(server.connections) == 1


def test_server_is_left_in_good_order(
    server: ScriptedServer, dry_run: StartDryRun
) -> None:
    assert check(dry_run, {"OutAddress": server.address}) == []
    connection = server.wait_connection()
    server.wait_for(lambda: connection.closed)
    assert connection.lines == [b"EHLO smtp.passthru", b"QUIT"]


def test_server_that_is_not_there(dry_run: StartDryRun, tmp_path: Path) -> None:
    refused = ["cannot be connected to: Connection refused"]
    assert check(dry_run, {"OutAddress": f"127.0.0.1:{free_port()}"}) == refused
    missing = ["cannot be connected to: No such file or directory"]
    assert check(dry_run, {"OutAddress": tmp_path / "nowhere"}) == missing


def test_server_at_a_unix_socket(
    make_server: MakeServer, dry_run: StartDryRun, tmp_path: Path
) -> None:
    server = make_server(host=str(tmp_path / "socket"), extensions=())
    script = tmp_path / "filter"
    script.write_text('#!/bin/sh\nexec echo "$REMOTE"\n')
    script.chmod(0o755)
    settings = {"OutAddress": server.address, "FilterCommand": script}
    warnings = check(dry_run, settings)
    assert warnings == ["does not offer XFORWARD"]


@pytest.mark.parametrize("host", ["", "0.0.0.0:", "[::]:"])
def test_port_alone_is_not_connected_to(
    host: str, server: ScriptedServer, dry_run: StartDryRun
) -> None:
    """It is the server of whoever will connect, and nobody has yet."""
    assert check(dry_run, {"OutAddress": f"{host}{server.port}", **ALL}) == []
    assert server.connections == []


def test_transparent_proxy_has_no_server_of_its_own(
    server: ScriptedServer, dry_run: StartDryRun
) -> None:
    result = dry_run({"TransparentProxy": "on", "OutAddress": server.address})
    assert (result.exit_status, result.output) == (0, "configuration is OK\n")
    assert server.connections == []


@pytest.mark.parametrize("greeting", [b"554 5.7.1 Not you\r\n", b"421 Too busy\r\n"])
def test_server_that_does_not_want_us(
    greeting: bytes, make_server: MakeServer, dry_run: StartDryRun
) -> None:
    server = make_server({"GREETING": greeting, "EHLO": b"503 5.5.1 No\r\n"})
    (warning,) = check(dry_run, {"OutAddress": server.address})
    assert greeting.decode().strip() in warning


# --- A checksum (RFC 3720 appendix B.4) ---


@pytest.mark.parametrize(
    ("octets", "checksum"),
    [
        (bytes(32), "aa36918a"),
        (b"\xff" * 32, "43aba862"),
        (bytes(range(32)), "4e79dd46"),
        (bytes(reversed(range(32))), "5cdb3f11"),
        (
            bytes.fromhex(
                "01c00000 00000000 00000000 00000000 14000000 00000400"
                " 00000014 00000018 28000000 00000000 02000000 00000000"
            ),
            "563a96d9",
        ),
        (b"", "00000000"),
    ],
)
def test_crc32c(octets: bytes, checksum: str) -> None:
    """The vectors have their octets in the order in which they are sent."""
    assert crc32c(octets).to_bytes(4, "little").hex() == checksum
