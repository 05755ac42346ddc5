"""FilterMode and FilterFailure: when the client's own message goes on.

Each case goes through a real daemon, with either type of filter, with a short
message and with one that does not fit into memory.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import shutil
import signal
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Callable

import pytest

from filter_cases import (
    FAILED,
    FAILURES,
    FIELD,
    HEADER,
    KINDS,
    NOT_RUN,
    OBSERVE,
    PASS,
    TERMINATED,
    VERDICTS,
    applicable,
    both,
    settings_of,
)
from helpers import (
    LOCAL_ERROR,
    MEGABYTE,
    QUEUED,
    Daemon,
    MakeServer,
    StartDaemon,
    deliver,
    long_message,
    marked_processes,
    poll,
    status_of,
    stuffed,
    verbs,
)
from smtp import RawClient, Recorded, ScriptedServer

# Dots, 8-bit octets, a NUL, blanks at line ends: nothing of it may change.
SHORT = (
    b"Subject: caf\xe9\r\n\r\n.\r\n..\r\n...Hello\r\n\0Hello\xff\xfe \r\n \t \r\n"
    b"From me\r\n\r\n"
)
LONG = SHORT + long_message(MEGABYTE * 3 // 2) + b".end\r\n"


# The filter has said what is to become of the message, or somebody ended it.
NO_FAILURES = {
    "refuses": (b"554 5.7.1 Spam\r\n", VERDICTS["refuses"]),
    "refuses without a word": (b"550 Content Rejected\r\n", both("exit 1", "550 .*")),
    "defers": (b"451 4.7.1 Later\r\n", VERDICTS["defers"]),
    "its own 451": (
        LOCAL_ERROR,
        both("echo 451 Local Error >&2; exit 1", "451 Local Error"),
    ),
    "drops": (b"250 dropped\r\n", VERDICTS["drops"]),
    "127 with a code": (
        b"554 Spam\r\n",
        both("echo 554 Spam >&2; exit 127", "554 Spam"),
    ),
    "137 with a code": (
        b"554 Spam\r\n",
        both("echo 554 Spam >&2; exit 137", "554 Spam"),
    ),
    "SIGTERM": (LOCAL_ERROR, both("kill -TERM $$", "FILTER-ERROR")),
    "SIGTERM in a shell": (
        LOCAL_ERROR,
        both("sh -c 'kill -TERM $$'; exit $?", "FILTER-ERROR"),
    ),
}


def with_field(message: bytes) -> bytes:
    """Return a message as the server gets it, with the Header setting's field."""
    head, _, body = message.partition(b"\r\n\r\n")
    return stuffed(head + b"\r\n" + FIELD + b"\r\n" + body)


def send_messages(daemon: Daemon, *messages: bytes) -> list[bytes]:
    """Send messages on one connection; returns the replies to them.

    When one is answered, nothing of it is left in TempDirectory.
    """
    client = daemon.connect(timeout=30)
    client.start()
    replies = []
    for number, message in enumerate(messages):
        if number:
            client.envelope()
        replies.append(client.message(stuffed(message)))
        assert list(daemon.tempdir.iterdir()) == []
    client.quit()
    return replies


def statuses(daemon: Daemon, count: int) -> list[str]:
    """Return the statuses of so many messages from the log."""
    line = r"client=127\.0\.0\.1, from=a@example\.com, to=b@example\.com, status=(.*)$"
    daemon.wait_log(rf"(?s:(?:.*?status=){{{count}}})")
    return re.findall(line, daemon.log(), re.M)


def errors(daemon: Daemon, pattern: str) -> list[str]:
    """Return the log lines of sessions, or their parts, that are just so."""
    return re.findall(rf"^proxsmtpd: [0-9A-F]{{6}}: {pattern}$", daemon.log(), re.M)


# --- Observe ---


@pytest.mark.parametrize(("kind", "name"), applicable(VERDICTS))
def test_observed(
    kind: str, name: str, proxsmtpd: StartDaemon, server: ScriptedServer
) -> None:
    """The verdict is in the log, and the client's own message at the server."""
    case = VERDICTS[name]
    daemon = proxsmtpd({**settings_of(kind, case.command(kind)), **OBSERVE})
    assert send_messages(daemon, SHORT, LONG) == [QUEUED, QUEUED]
    assert [m.data for m in server.messages] == [with_field(SHORT), with_field(LONG)]
    assert statuses(daemon, 2) == [f"OBSERVED: {case.outcome}"] * 2


@pytest.mark.parametrize("failure", [{}, PASS], ids=["defer", "pass"])
@pytest.mark.parametrize("kind", KINDS)
def test_observed_failure(
    kind: str, failure: dict[str, str], proxsmtpd: StartDaemon, server: ScriptedServer
) -> None:
    """It holds up nothing, not even where somebody ended the filter."""
    command = "case $SENDER in term*) kill -TERM $$;; *) exit 127;; esac"
    daemon = proxsmtpd({**settings_of(kind, command), **OBSERVE, **failure})
    client = daemon.connect(timeout=30)
    assert client.message(stuffed(SHORT)) == QUEUED
    client.envelope(b"<term@example.com>")
    assert client.message(stuffed(LONG)) == QUEUED
    assert [m.data for m in server.messages] == [with_field(SHORT), with_field(LONG)]
    daemon.wait_log(r"from=term@.* status=OBSERVED: FILTER-ERROR$")
    assert len(re.findall(r"status=OBSERVED: FILTER-ERROR\b", daemon.log())) == 2
    assert len(errors(daemon, NOT_RUN)) == 1
    assert len(errors(daemon, TERMINATED)) == 1


def test_observing_without_a_filter(
    proxsmtpd: StartDaemon, server: ScriptedServer
) -> None:
    daemon = proxsmtpd({**OBSERVE, **PASS, **HEADER})
    assert send_messages(daemon, SHORT) == [QUEUED]
    assert server.messages[0].data == with_field(SHORT)
    assert statuses(daemon, 1) == ["PASSED"]


def test_observing_rejects_what_is_always_rejected(
    proxsmtpd: StartDaemon, server: ScriptedServer
) -> None:
    """FilterType reject has no verdict that one could observe."""
    daemon = proxsmtpd({"FilterType": "reject", **OBSERVE, **PASS})
    client = daemon.connect()
    client.reply()
    client.expect(b"EHLO client.example", b"250")
    reply = client.command(b"MAIL FROM:<a@example.com>")
    assert reply == b"530 Email Rejected\r\n"
    assert verbs(server.connections[0]) == [b"EHLO"]


def test_enforcing_and_deferring_are_the_defaults(proxsmtpd: StartDaemon) -> None:
    for settings in ({}, {"FilterMode": "Enforce", "FilterFailure": "Defer"}):
        command = "case $SENDER in a@*) exit 1;; *) exit 127;; esac"
        client = proxsmtpd({"FilterCommand": command, **settings}).connect()
        assert client.message(stuffed(SHORT)) == b"550 Content Rejected\r\n"
        client.envelope(b"<c@example.com>")
        assert client.message(stuffed(SHORT)) == LOCAL_ERROR


# --- The server has the last word ---

REFUSALS = {
    "DATA": b"451 4.3.0 Not now\r\n",
    "DOT": b"554 5.6.0 Not this\r\n",
}


@pytest.mark.parametrize("verb", REFUSALS)
@pytest.mark.parametrize(
    ("settings", "command"), [(OBSERVE, "exit 1"), (PASS, "exit 127")]
)
def test_servers_refusal(
    verb: str,
    settings: dict[str, str],
    command: str,
    proxsmtpd: StartDaemon,
    make_server: MakeServer,
) -> None:
    server = make_server({verb: REFUSALS[verb]})
    daemon = proxsmtpd({"FilterCommand": command, **settings}, server=server)
    assert send_messages(daemon, SHORT) == [REFUSALS[verb]]
    assert statuses(daemon, 1) == [REFUSALS[verb].decode().strip()]
    assert server.messages == []


# --- Failures ---


@pytest.mark.parametrize(("kind", "name"), applicable(FAILURES))
def test_passed_failure(
    kind: str, name: str, proxsmtpd: StartDaemon, server: ScriptedServer
) -> None:
    """The client's own message goes on, and the log says once why."""
    case = FAILURES[name]
    daemon = proxsmtpd({**settings_of(kind, case.command(kind)), **PASS})
    assert send_messages(daemon, SHORT, LONG) == [QUEUED, QUEUED]
    assert [m.data for m in server.messages] == [with_field(SHORT), with_field(LONG)]
    assert statuses(daemon, 2) == ["FILTER-ERROR, passed"] * 2
    assert len(errors(daemon, f"{case.outcome}")) == 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NO_FAILURES)
def test_not_passed(
    kind: str, name: str, proxsmtpd: StartDaemon, server: ScriptedServer
) -> None:
    """A refusal is a refusal, and ending the filter gets no mail past it."""
    reply, case = NO_FAILURES[name]
    daemon = proxsmtpd({**settings_of(kind, case.command(kind)), **PASS})
    assert send_messages(daemon, SHORT, LONG) == [reply, reply]
    assert server.messages == []
    assert all(re.fullmatch(case.outcome, status) for status in statuses(daemon, 2))
    assert verbs(server.connections[0]) == (
        b"EHLO MAIL RCPT RSET MAIL RCPT RSET QUIT".split()
    )


@pytest.mark.parametrize("settings", [PASS, OBSERVE], ids=["pass", "observe"])
def test_filter_has_ended_when_its_message_goes_on(
    settings: dict[str, str],
    proxsmtpd: StartDaemon,
    make_server: MakeServer,
    tmp_path: Path,
) -> None:
    """A filter that ignores SIGTERM is killed first."""
    shell, child = tmp_path / "shell", tmp_path / "child"
    alive_at_data = []

    def answer_data(_connection: Recorded, _line: bytes) -> bytes:
        alive_at_data.append(Path(f"/proc/{int(shell.read_text())}").exists())
        return b"354 Go on\r\n"

    command = f"trap '' TERM; sleep 60 & echo $! >{child}; echo $$ >{shell}; wait"
    server = make_server({"DATA": answer_data})
    daemon = proxsmtpd({**settings_of("pipe", command), **settings}, server=server)
    assert send_messages(daemon, SHORT) == [QUEUED]
    assert alive_at_data == [False]
    assert poll(lambda: set(marked_processes(daemon.mark)) == {daemon.process.pid})
    killing = errors(
        daemon, rf"killing filter process \(pid {shell.read_text().strip()}\)"
    )
    assert len(killing) == 1
    log = daemon.log()
    assert log.index("timeout while listening") < log.index(killing[0])
    assert log.index(killing[0]) < log.index("SERVER > DATA")


# --- FilterVerdict ---

CODED = {"FilterVerdict": "coded"}
UNCODED = {
    "silent": ("exit 1", f"{FAILED} with 1"),
    "exception": (
        "python3 -Ic 'raise ValueError'",
        f"{FAILED} with 1: ValueError",
    ),
    "3xx": ("echo 354 x >&2; exit 3", f"{FAILED} with 3: 354 x"),
    "255": ("exit 255", f"{FAILED} with 255"),
}


@pytest.mark.parametrize(
    ("failure", "reply", "status"),
    [
        ({}, LOCAL_ERROR, "FILTER-ERROR"),
        (PASS, QUEUED, "FILTER-ERROR, passed"),
        (OBSERVE, QUEUED, "OBSERVED: FILTER-ERROR"),
    ],
    ids=["defer", "pass", "observe"],
)
@pytest.mark.parametrize("name", UNCODED)
def test_end_without_a_code(
    name: str,
    failure: dict[str, str],
    reply: bytes,
    status: str,
    proxsmtpd: StartDaemon,
    server: ScriptedServer,
) -> None:
    command, error = UNCODED[name]
    daemon = proxsmtpd({**settings_of("pipe", command), **CODED, **failure})
    assert send_messages(daemon, SHORT) == [reply]
    passed = [with_field(SHORT)] if reply == QUEUED else []
    assert [m.data for m in server.messages] == passed
    assert statuses(daemon, 1) == [status]
    assert len(errors(daemon, error)) == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["passes", "refuses", "defers", "drops"])
def test_coded_verdict(
    name: str, kind: str, proxsmtpd: StartDaemon, server: ScriptedServer
) -> None:
    case = VERDICTS[name]
    daemon = proxsmtpd({**settings_of(kind, case.command(kind)), **CODED})
    expected = QUEUED if name == "passes" else case.outcome.encode() + b"\r\n"
    assert send_messages(daemon, SHORT) == [expected]
    assert len(server.messages) == (name == "passes")
    assert statuses(daemon, 1) == [case.outcome]


# --- The daemon's end ---


def filter_and_idle_client(daemon: Daemon, ready: Path) -> tuple[RawClient, RawClient]:
    """Return a client whose message is in the filter, and another who does nothing."""
    idle = daemon.connect()
    idle.start()
    client = daemon.connect(timeout=30)
    client.start()
    client.expect(b"DATA", b"354")
    client.send(stuffed(SHORT) + b".\r\n")
    assert poll(ready.exists)
    return client, idle


@pytest.mark.parametrize(
    ("end", "reply"),
    [("kill -KILL $$", LOCAL_ERROR), ("exit 127", LOCAL_ERROR), ("cat", QUEUED)],
)
def test_failure_while_the_daemon_ends(
    end: str,
    reply: bytes,
    proxsmtpd: StartDaemon,
    server: ScriptedServer,
    tmp_path: Path,
) -> None:
    """A stop must not bring mail past the filter, which may have been stopped too."""
    ready, go = tmp_path / "ready", tmp_path / "go"
    os.mkfifo(go)
    daemon = proxsmtpd({"FilterCommand": f": >{ready}; read go <{go}; {end}", **PASS})
    client, idle = filter_and_idle_client(daemon, ready)
    daemon.process.send_signal(signal.SIGTERM)
    assert idle.reply() == b"421 Service shutting down\r\n"
    idle.close()
    go.write_text("go\n")
    assert client.reply() == reply
    client.close()
    assert daemon.wait() == 0
    assert len(server.messages) == (reply == QUEUED)


@pytest.mark.parametrize(
    "command", ["exec sleep 60", "trap 'exit 127' TERM; sleep 60 & wait"]
)
def test_filter_that_the_daemon_ends(
    command: str, proxsmtpd: StartDaemon, server: ScriptedServer, tmp_path: Path
) -> None:
    ready = tmp_path / "ready"
    daemon = proxsmtpd({"FilterCommand": f": >{ready}; {command}", **PASS})
    client, _ = filter_and_idle_client(daemon, ready)
    daemon.process.send_signal(signal.SIGTERM)
    assert client.reply() == LOCAL_ERROR
    assert daemon.wait(30) == 0
    assert server.messages == []
    assert status_of(daemon) == "FILTER-ERROR"


# --- TempDirectory ---


@contextlib.contextmanager
def gone(daemon: Daemon) -> Iterator[None]:
    """It is not there."""
    shutil.rmtree(daemon.tempdir)
    yield
    daemon.tempdir.mkdir()


@contextlib.contextmanager
def full(daemon: Daemon) -> Iterator[None]:
    """No file of the daemon may have more than a few octets."""
    soft, hard = resource.prlimit(daemon.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(daemon.process.pid, resource.RLIMIT_FSIZE, (9, hard))
    yield
    resource.prlimit(daemon.process.pid, resource.RLIMIT_FSIZE, (soft, hard))


Trouble = Callable[[Daemon], AbstractContextManager[None]]
TROUBLES: Sequence[tuple[Trouble, str]] = (
    (gone, "couldn't write to cache file: No such file or directory"),
    (full, "couldn't write to cache file: File too large"),
)


@pytest.mark.parametrize(("trouble", "error"), TROUBLES, ids=["gone", "full"])
@pytest.mark.parametrize("settings", [{}, PASS, OBSERVE], ids=["", "pass", "observe"])
@pytest.mark.parametrize("kind", KINDS)
def test_message_that_cannot_be_kept(
    kind: str,
    settings: dict[str, str],
    trouble: Trouble,
    error: str,
    proxsmtpd: StartDaemon,
    server: ScriptedServer,
) -> None:
    """It is deferred, unless it can go on from memory and the filter is only tried.

    The commands that are pipelined after it are answered.
    """
    goes_on = kind == "file" and settings == OBSERVE
    command, message = ("cat", LONG) if kind == "pipe" else (":", SHORT)
    daemon = proxsmtpd({**settings_of(kind, command), **settings})
    client = daemon.connect(timeout=30)
    client.start()
    with trouble(daemon):
        client.expect(b"DATA", b"354")
        client.send(stuffed(message) + b".\r\nNOOP\r\nMAIL FROM:<c@example.com>\r\n")
        assert client.reply() == (QUEUED if goes_on else LOCAL_ERROR)
        assert [client.reply()[:3] for _ in range(2)] == [b"250", b"250"]
    passed = [with_field(SHORT)] if goes_on else []
    assert [m.data for m in server.messages] == passed
    assert status_of(daemon) == ("OBSERVED: " if goes_on else "") + "FILTER-ERROR"
    assert len(errors(daemon, error)) == 1
    client.expect(b"RCPT TO:<b@example.com>", b"250")
    client.started = True
    assert client.message(stuffed(SHORT)) == QUEUED
    assert server.messages[-1].data == with_field(SHORT)
    first = b"DATA" if goes_on else b"RSET"
    assert (
        verbs(server.connections[0])
        == (b"EHLO MAIL RCPT %s NOOP MAIL RCPT DATA" % first).split()
    )


@pytest.mark.parametrize("settings", [{}, PASS], ids=["", "pass"])
def test_output_that_cannot_be_kept(
    settings: dict[str, str], proxsmtpd: StartDaemon, server: ScriptedServer
) -> None:
    """It is deferred: the filter has not failed, and its verdict is not known."""
    command = "cat >/dev/null; head -c 2000000 /dev/zero"
    daemon = proxsmtpd({"FilterCommand": command, **settings})
    with gone(daemon):
        assert deliver(daemon) == LOCAL_ERROR
    daemon.wait_log("couldn't write to cache file: No such file or directory$")
    assert status_of(daemon) == "FILTER-ERROR"
    assert server.messages == []


def test_message_outgrows_memory_where_it_cannot_be_kept(
    proxsmtpd: StartDaemon, server: ScriptedServer
) -> None:
    """Then observing does not help it either."""
    daemon = proxsmtpd({**settings_of("file", ":"), **OBSERVE})
    client = daemon.connect(timeout=30)
    with gone(daemon):
        assert client.message(stuffed(LONG)) == LOCAL_ERROR
    client.envelope()
    assert client.message(stuffed(LONG)) == QUEUED
    assert [m.data for m in server.messages] == [with_field(LONG)]
    assert statuses(daemon, 2) == ["FILTER-ERROR", "OBSERVED: FILTERED"]


@pytest.mark.parametrize("settings", [{}, PASS, OBSERVE], ids=["", "pass", "observe"])
def test_commands_after_a_last_block_that_cannot_be_kept(
    settings: dict[str, str], proxsmtpd: StartDaemon, server: ScriptedServer
) -> None:
    """Memory is full with the block that has the message's end, and they are in it."""
    daemon = proxsmtpd({**settings_of("pipe", "cat"), **settings})
    client = daemon.connect(timeout=30)
    client.start()
    with gone(daemon):
        client.expect(b"DATA", b"354")
        client.send(stuffed(SHORT) + b"x" * (MEGABYTE - len(SHORT) - 10))
        envelope = b"MAIL FROM:<c@example.com>\r\nRCPT TO:<d@example.com>\r\n"
        client.send(b"x" * 100 + b"\r\n.\r\nNOOP\r\n" + envelope)
        assert client.reply() == LOCAL_ERROR
        assert [client.reply()[:3] for _ in range(3)] == [b"250", b"250", b"250"]
    client.started = True
    assert client.message(stuffed(SHORT)) == QUEUED
    assert server.messages[0].recipients == (b"<d@example.com>",)
    assert verbs(server.connections[0]) == (
        b"EHLO MAIL RCPT RSET NOOP MAIL RCPT DATA".split()
    )
