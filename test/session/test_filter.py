"""The filter and what becomes of the message, seen from outside.

Each test runs the real process between a scripted server and a raw client, with a
filter of its own, and looks at the client's replies, what the server received and
what the filter read.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pwd
import re
import resource
import select
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from email.utils import parsedate_to_datetime
from pathlib import Path

import pytest

from helpers import (
    LOCAL_ERROR,
    MEGABYTE,
    MESSAGE,
    PROGRAM,
    QUEUED,
    STALE_ENVIRONMENT,
    Daemon,
    MakeFilter,
    MakeServer,
    StartDaemon,
    deliver,
    is_alive,
    long_message,
    marked_processes,
    on_other_systems_too,
    open_files,
    poll,
    saved_environment,
    status_of,
    verbs,
)
from smtp import Delay, RawClient, Recorded, ScriptedServer


def start_message(
    daemon: Daemon, sender: bytes = b"<a@example.com>", data: bytes = MESSAGE
) -> RawClient:
    """Return a client that has sent a whole message and waits for its reply."""
    client = daemon.connect(timeout=15)
    client.start(sender)
    client.expect(b"DATA", b"354")
    client.send(data + b".\r\n")
    return client


# --- The verdict ---

# Some rows of what test_filter_contract.py has: a filter's script, and the reply.
REJECTING = {
    "silent": ("exit 1", b"550 Content Rejected\r\n"),
    "last-line-not-blank": (
        r"printf 'first\r\n554 5.7.1 Spam\r\n\r\n  \n\n' >&2; exit 1",
        b"554 5.7.1 Spam\r\n",
    ),
    "code-4xx": ("echo 451 4.7.1 Later >&2; exit 1", b"451 4.7.1 Later\r\n"),
    "code-2xx": ("echo 250 2.0.0 Thanks >&2; exit 1", b"250 2.0.0 Thanks\r\n"),
    "code-127": ("echo 554 Spam >&2; exit 127", b"554 Spam\r\n"),
    "control-characters": (
        r"printf '554 a\tb\001c\033[2Jd\177e\303\251f\rg\000h\n' >&2; exit 1",
        b"554 a?b?c?[2Jd?e??f?g?h\r\n",
    ),
    "output-and-text": (
        "cat; echo No thanks >&2; exit 255",
        b"550 Content Rejected; No thanks\r\n",
    ),
}
FAILING = {
    "exit-127": "exit 127",
    "killed": "echo 554 Spam >&2; kill -KILL $$",
    "sysexits": "echo no daemon >&2; exit 69",
    "syntax": "cat; fi",
    "empty-output": "cat > /dev/null",
    "closed-output": "exec >&-; cat > /dev/null",
}


@on_other_systems_too
def test_rejected(
    proxsmtpd: StartDaemon, server: ScriptedServer, tmp_path: Path
) -> None:
    for name, (script, _) in REJECTING.items():
        (tmp_path / name).write_text(script)
    daemon = proxsmtpd({"FilterCommand": f'sh {tmp_path}/"${{SENDER%@*}}"'})
    for name, (_, expected) in REJECTING.items():
        client = daemon.connect()
        client.start(b"<%s@example.com>" % name.encode())
        assert client.message(MESSAGE) == expected, name
        client.quit()
        received = verbs(server.connections[-1])
        assert received == [b"EHLO", b"MAIL", b"RCPT", b"RSET", b"QUIT"], name
    assert server.messages == []


@on_other_systems_too
@pytest.mark.parametrize("name", FAILING)
def test_failing(name: str, proxsmtpd: StartDaemon, server: ScriptedServer) -> None:
    daemon = proxsmtpd({"FilterCommand": FAILING[name]})
    assert deliver(daemon) == LOCAL_ERROR
    assert verbs(server.connections[0]) == [b"EHLO", b"MAIL", b"RCPT", b"RSET", b"QUIT"]
    assert server.messages == []
    assert status_of(daemon) == "FILTER-ERROR"


@on_other_systems_too
def test_program_that_is_killed(
    proxsmtpd: StartDaemon, server: ScriptedServer, filter_script: MakeFilter
) -> None:
    """The shell in between must not make a verdict of an accident."""
    daemon = proxsmtpd({"FilterCommand": filter_script("kill -KILL $$")})
    assert deliver(daemon) == LOCAL_ERROR
    assert server.messages == []


def test_missing_program(proxsmtpd: StartDaemon, server: ScriptedServer) -> None:
    daemon = proxsmtpd({"FilterCommand": "/nowhere/filter --strict"})
    assert deliver(daemon) == LOCAL_ERROR
    assert server.messages == []


def test_program_that_is_not_executable(
    proxsmtpd: StartDaemon, server: ScriptedServer, tmp_path: Path
) -> None:
    (tmp_path / "filter").write_text("#!/bin/sh\nexit 1\n")
    daemon = proxsmtpd({"FilterCommand": tmp_path / "filter"})
    assert deliver(daemon) == LOCAL_ERROR
    assert server.messages == []


@pytest.mark.parametrize("start", ["554 ", ""])
def test_long_last_line_fits_in_a_reply(start: str, proxsmtpd: StartDaemon) -> None:
    command = f"printf '{start}'; head -c 3000 /dev/zero | tr '\\0' x"
    daemon = proxsmtpd({"FilterCommand": f"({command}) >&2; exit 1"})
    reply = deliver(daemon)
    assert re.fullmatch(rb"(554|550 Content Rejected;) x{400,}\r\n", reply)
    assert len(reply) <= 512


def test_accepted_with_words_on_standard_error(
    proxsmtpd: StartDaemon, server: ScriptedServer
) -> None:
    daemon = proxsmtpd({"FilterCommand": "echo 554 Spam >&2; cat"})
    assert deliver(daemon) == QUEUED
    assert server.wait_message().data == MESSAGE
    assert status_of(daemon) == "FILTERED"


def test_session_goes_on_after_each_verdict(
    proxsmtpd: StartDaemon, server: ScriptedServer, filter_script: MakeFilter
) -> None:
    verdict = "read line; case $line in *ok*) echo ok; exit 0;; esac; exit ${line%?}"
    daemon = proxsmtpd({"FilterCommand": filter_script(verdict)})
    client = daemon.connect()
    client.start()
    assert client.message(b"1\r\n") == b"550 Content Rejected\r\n"
    for data, reply in (
        (b"ok\r\n", QUEUED),
        (b"127\r\n", LOCAL_ERROR),
        (b"ok\r\n", QUEUED),
    ):
        client.envelope()
        assert client.message(data) == reply
    client.quit()
    assert [message.data for message in server.messages] == [b"ok\r\n"] * 2


def test_rejection_is_logged_with_its_words(proxsmtpd: StartDaemon) -> None:
    daemon = proxsmtpd({"FilterCommand": "echo 554 5.7.1 Spam >&2; exit 1"}, level=3)
    deliver(daemon, sender=b"<>", recipients=(b"<b@example.com>", b"<c@example.com>"))
    line = daemon.wait_log(r"^proxsmtpd: [0-9A-F]{6}: (client=.*)$")[1]
    assert line == (
        "client=127.0.0.1, from=<>, to=b@example.com, to=c@example.com, "
        "status=554 5.7.1 Spam"
    )


def logged_errors(daemon: Daemon) -> list[str]:
    """Return the filter's standard error as the log has it."""
    return re.findall(r"^proxsmtpd: [0-9A-F]{6}: FILTER < (.*)$", daemon.log(), re.M)


@pytest.mark.parametrize("end", ["exec cat", "exit 1", "kill -KILL $$", "sleep 60"])
def test_standard_error_is_logged_at_level_4(end: str, proxsmtpd: StartDaemon) -> None:
    """Each line of it, also where the filter agrees, and as printable ASCII."""
    text = r"printf 'one\n\ncaf\303\251 \033[2J\n554 no' >&2"
    settings = {"FilterCommand": f"{text}; {end}", "FilterTimeout": 1}
    daemon = proxsmtpd(settings, level=4)
    deliver(daemon)
    assert logged_errors(daemon) == ["one", "", r"caf\xc3\xa9 \x1b[2J", "554 no"]
    daemon = proxsmtpd(settings, level=3)
    deliver(daemon)
    assert logged_errors(daemon) == []


def test_long_standard_error_is_logged_in_part(proxsmtpd: StartDaemon) -> None:
    daemon = proxsmtpd({"FilterCommand": "yes 12345678 | head -c 9M >&2; cat"}, level=4)
    assert deliver(daemon) == QUEUED
    lines = logged_errors(daemon)
    assert f"... {9 * MEGABYTE - 2 * 8192} octets left out" in lines
    assert len(lines) < 2000


# --- The filter's environment ---


@pytest.fixture
def saving(proxsmtpd: StartDaemon, tmp_path: Path) -> Daemon:
    """Provide a daemon whose filter saves its environment in `environ`."""
    saved = tmp_path / "environ"
    command = f"cat /proc/self/environ > {saved}; cat"
    environ = {**STALE_ENVIRONMENT, "KEPT": "kept"}
    return proxsmtpd({"FilterCommand": command}, env=environ)


def test_environment(saving: Daemon, tmp_path: Path) -> None:
    recipients = (b"<b@example.com>", b"<c@example.com>")
    assert deliver(saving, recipients=recipients) == QUEUED
    seen = saved_environment(tmp_path / "environ")
    assert seen[b"CLIENT"] == b"127.0.0.1"
    assert seen[b"SERVER"] == b"127.0.0.1"
    assert seen[b"SENDER"] == b"a@example.com"
    assert seen[b"RECIPIENTS"] == b"b@example.com\nc@example.com"
    assert seen[b"TMPDIR"] == os.fsencode(saving.tempdir)
    assert seen[b"KEPT"] == b"kept"
    assert not {b"REMOTE", b"REMOTE_HELO", b"EMAIL"} & set(seen)


PATHS = {
    "null": (b"<>", b"<>"),
    "8-bit": (b"<\xe9\xff@example.com>", b"\xe9\xff@example.com"),
    "quoted": (rb'<"a b>c\"d@e"@example.com>', rb'"a b>c\"d@e"@example.com'),
    "parameters": (b"<a@example.com> SIZE=23 BODY=8BITMIME", b"a@example.com"),
    "blank": (b" <a@example.com>", b"a@example.com"),
    "shell": (
        b'<"$(id)`id`;\'"@example.com>',
        b'"$(id)`id`;\'"@example.com',
    ),
}


@pytest.mark.parametrize("name", PATHS)
def test_paths(name: str, saving: Daemon, tmp_path: Path) -> None:
    wire, value = PATHS[name]
    recipient = wire if value != b"<>" else b"<b@example.com>"
    assert deliver(saving, sender=wire, recipients=(recipient,)) == QUEUED
    seen = saved_environment(tmp_path / "environ")
    assert seen[b"SENDER"] == value
    assert seen[b"RECIPIENTS"] == (value if value != b"<>" else b"b@example.com")


def test_only_accepted_recipients(
    make_server: MakeServer, proxsmtpd: StartDaemon, tmp_path: Path
) -> None:
    replies = [b"250 Ok\r\n", b"550 No\r\n", b"251 Elsewhere\r\n", b"450 Later\r\n"]
    server = make_server({"RCPT": replies})
    saved = tmp_path / "environ"
    command = f"cat /proc/self/environ > {saved}; cat"
    daemon = proxsmtpd({"FilterCommand": command}, server=server)
    client = daemon.connect()
    client.start(recipients=())
    for number, reply in enumerate(replies):
        assert client.command(b"RCPT TO:<%d@example.com>" % number) == reply
    assert client.message(MESSAGE) == QUEUED
    assert saved_environment(saved)[b"RECIPIENTS"] == b"0@example.com\n2@example.com"


XFORWARDS: Mapping[str, tuple[list[bytes], bytes | None, bytes | None]] = {
    "one-line": (
        [b"NAME=a ADDR=192.0.2.7 HELO=mx.example"],
        b"192.0.2.7",
        b"mx.example",
    ),
    "two-lines": (
        [b"NAME=a ADDR=192.0.2.7", b"PROTO=ESMTP HELO=mx.example SOURCE=REMOTE"],
        b"192.0.2.7",
        b"mx.example",
    ),
    "lower-case": ([b"addr=192.0.2.7 helo=Mx"], b"192.0.2.7", b"Mx"),
    "ipv6": ([b"ADDR=IPV6:2001:db8::7"], b"2001:db8::7", None),
    "xtext": ([b"ADDR=192.0.2.7 HELO=a+2Bb+20c+E9"], b"192.0.2.7", b"a+b c\xe9"),
    "unavailable": ([b"ADDR=[UNAVAILABLE] HELO=[TEMPUNAVAIL]"], None, None),
    "taken-back": ([b"ADDR=192.0.2.7", b"ADDR=[UNAVAILABLE]"], None, None),
    "within-a-value": ([b"NAME=ADDR=6.6.6.6 X-HELO=b"], None, None),
}


@pytest.mark.parametrize("name", XFORWARDS)
def test_xforward(name: str, saving: Daemon, tmp_path: Path) -> None:
    lines, remote, helo = XFORWARDS[name]
    client = saving.connect()
    client.start(sender=b"<>", recipients=())
    client.expect(b"RSET", b"250")
    for line in lines:
        client.expect(b"XFORWARD " + line, b"250")
    client.envelope()
    assert client.message(MESSAGE) == QUEUED
    seen = saved_environment(tmp_path / "environ")
    assert seen.get(b"REMOTE") == remote
    assert seen.get(b"REMOTE_HELO") == helo
    client.envelope()
    assert client.message(MESSAGE) == QUEUED
    assert not {b"REMOTE", b"REMOTE_HELO"} & set(
        saved_environment(tmp_path / "environ")
    )


def test_xforward_cannot_be_forged(saving: Daemon, tmp_path: Path) -> None:
    client = saving.connect()
    client.start(helo=b"EHLO addr=6.6.6.6")
    client.expect(b"NOOP XFORWARD ADDR=6.6.6.6", b"250")
    assert client.message(MESSAGE) == QUEUED
    assert not {b"REMOTE", b"REMOTE_HELO"} & set(
        saved_environment(tmp_path / "environ")
    )


def test_xforward_that_the_server_refuses(
    make_server: MakeServer, proxsmtpd: StartDaemon, tmp_path: Path
) -> None:
    server = make_server({"XFORWARD": b"550 Not you\r\n"})
    saved = tmp_path / "environ"
    command = f"cat /proc/self/environ > {saved}; cat"
    daemon = proxsmtpd({"FilterCommand": command}, server=server)
    client = daemon.connect()
    client.reply()
    client.expect(b"XFORWARD ADDR=192.0.2.7", b"550")
    client.envelope()
    assert client.message(MESSAGE) == QUEUED
    assert b"REMOTE" not in saved_environment(saved)


def test_too_many_recipients(
    saving: Daemon, server: ScriptedServer, tmp_path: Path
) -> None:
    client = saving.connect(timeout=30)
    client.start(recipients=())
    accepted = []
    for number in range(200):
        path = b"%0900d@example.com" % number
        reply = client.command(b"RCPT TO:<%s>" % path)
        if reply.startswith(b"452"):
            assert reply == b"452 Too many recipients\r\n"
            break
        accepted.append(path)
    assert len(b"\n".join([*accepted, path])) > 128 * 1024 - 20
    assert client.message(MESSAGE) == QUEUED
    assert saved_environment(tmp_path / "environ")[b"RECIPIENTS"] == b"\n".join(
        accepted
    )
    assert len(server.messages[0].recipients) == len(accepted)
    client.envelope(recipients=(b"<%s>" % path,))
    assert client.message(MESSAGE) == QUEUED


# --- What the filter runs in ---


def test_descriptors(
    proxsmtpd: StartDaemon, server: ScriptedServer, tmp_path: Path
) -> None:
    """Pipes on 0, 1 and 2, and nothing else, even with other sessions around."""
    here, go = tmp_path / "here", tmp_path / "go"
    os.mkfifo(here)
    os.mkfifo(go)
    wait = f"case $SENDER in first*) echo > {here}; read line < {go};; esac"
    show = "ls /proc/self/fd; stat -L -c %F /proc/self/fd/[012]"
    daemon = proxsmtpd({"FilterCommand": f"{wait}; {show}"})
    first = start_message(daemon, b"<first@example.com>")
    here.read_text()
    assert deliver(daemon) == QUEUED
    go.write_text("\n")
    assert first.reply() == QUEUED
    # 3 is the directory that ls reads.
    expected = b"0 1 2 3 fifo fifo fifo".replace(b" ", b"\r\n") + b"\r\n"
    assert [message.data for message in server.messages] == [expected] * 2


def test_pipes_can_be_opened_again(
    proxsmtpd: StartDaemon, server: ScriptedServer, filter_script: MakeFilter
) -> None:
    script = """
        cat < /dev/stdin > /dev/stdout
        echo one > /dev/stdout
        echo two > /dev/fd/1
        echo words > /dev/stderr"""
    daemon = proxsmtpd({"FilterCommand": filter_script(script)})
    assert deliver(daemon) == QUEUED
    assert server.wait_message().data == MESSAGE + b"one\r\ntwo\r\n"


def test_process_group_and_signals(proxsmtpd: StartDaemon, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = f"(cat /proc/self/stat; grep ^Sig /proc/self/status) > {out}; cat"
    daemon = proxsmtpd({"FilterCommand": command})
    assert deliver(daemon) == QUEUED
    first, *rest = out.read_text().splitlines()
    group = int(first.rpartition(")")[2].split()[2])
    assert group != os.getpgid(daemon.process.pid)
    masks = dict(line.split(":\t") for line in rest)
    assert int(masks["SigBlk"], 16) == 0
    # Only the ordinary ones: posix_spawn ignores two that are the C library's own.
    assert int(masks["SigIgn"], 16) & 0x7FFFFFFF == 0


@pytest.mark.skipif(not hasattr(fcntl, "F_SETLEASE"), reason="only Linux has leases")
def test_program_that_takes_long_to_start(
    proxsmtpd: StartDaemon, server: ScriptedServer, tmp_path: Path
) -> None:
    """Nobody else waits until its file system has found it."""
    cat = shutil.which("cat")
    assert cat is not None
    slow = tmp_path / "slow"
    shutil.copy(cat, slow)
    daemon = proxsmtpd({"FilterCommand": slow})
    with slow.open("rb") as file:
        # Whoever opens the file waits until we have given the lease back.
        fcntl.fcntl(file, fcntl.F_SETSIG, signal.SIGURG)  # which ends nobody
        fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        with start_message(daemon) as client:
            assert poll(lambda: fcntl.fcntl(file, fcntl.F_GETLEASE) != fcntl.F_WRLCK)
            assert daemon.connect().reply() == b"220 smtp.passthru ESMTP\r\n"
            assert server.messages == []
            fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_UNLCK)
            assert client.reply() == QUEUED
    assert server.wait_message().data == MESSAGE


@pytest.fixture
def hanging(tmp_path: Path) -> Iterator[Path]:
    """Provide a program that nobody can open, as on a file system that hangs."""
    if not hasattr(fcntl, "F_SETLEASE"):
        pytest.skip("only Linux has leases")
    cat = shutil.which("cat")
    assert cat is not None
    path = tmp_path / "hanging"
    shutil.copy(cat, path)
    with path.open("rb") as file:
        fcntl.fcntl(file, fcntl.F_SETSIG, signal.SIGURG)  # which ends nobody
        fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        yield path


def test_program_that_does_not_start(
    hanging: Path, proxsmtpd: StartDaemon, server: ScriptedServer
) -> None:
    """FilterTimeout bounds that, too."""
    daemon = proxsmtpd({"FilterCommand": hanging, "FilterTimeout": 1})
    with start_message(daemon) as client:
        assert daemon.connect().reply() == b"220 smtp.passthru ESMTP\r\n"
        assert client.reply() == LOCAL_ERROR
    daemon.wait_log("timeout while starting filter command$")
    assert server.messages == []


@pytest.mark.parametrize("signals", [1, 2])
def test_program_that_does_not_start_at_the_daemons_end(
    signals: int, hanging: Path, proxsmtpd: StartDaemon, server: ScriptedServer
) -> None:
    daemon = proxsmtpd({"FilterCommand": hanging})
    with start_message(daemon):
        assert poll(lambda: len(marked_processes(daemon.mark)) == 2)
        daemon.process.send_signal(signal.SIGTERM)
        if signals == 2:
            assert poll(lambda: not accepts(daemon))
            daemon.process.send_signal(signal.SIGTERM)
        assert daemon.wait(8) == 0
    assert server.messages == []


def test_shell_command_line(proxsmtpd: StartDaemon, server: ScriptedServer) -> None:
    command = "sed -e 's/Hello/\"Good\" bye/' | { cat; X='a  b'; echo \"$X\" & wait; }"
    daemon = proxsmtpd({"FilterCommand": command})
    assert deliver(daemon) == QUEUED
    expected = MESSAGE.replace(b"Hello", b'"Good" bye') + b"a  b\r\n"
    assert server.wait_message().data == expected


def test_started_when_the_message_is_here(
    proxsmtpd: StartDaemon, tmp_path: Path
) -> None:
    started = tmp_path / "started"
    daemon = proxsmtpd(
        {"FilterCommand": f"date +%s.%N > {started}; cat", "FilterTimeout": 1}
    )
    client = daemon.connect()
    client.start()
    client.expect(b"DATA", b"354")
    client.send(long_message(MEGABYTE * 2))
    # A filter that ran already would see nothing for longer than its time out.
    time.sleep(1.2)
    assert not started.exists()
    before = time.time()
    assert client.command(b".") == QUEUED
    assert float(started.read_text()) > before - 0.01


# Each hands the message, on descriptor 3, and its output to a later process.
LATER_STAGES = {
    "child": "exec 3<&0; { read line <GO; cat <&3; } & exit 0",
    "apart": "exec 3<&0; setsid sh -c 'read line <GO; cat <&3' & exit 0",
    "substitution": "bash -c 'exec > >(read line <GO; cat); cat'",
}


@pytest.mark.parametrize("name", LATER_STAGES)
def test_output_is_read_to_its_end(
    name: str, proxsmtpd: StartDaemon, server: ScriptedServer, tmp_path: Path
) -> None:
    """Output that comes after the end of the filter's own process counts, too."""
    go = tmp_path / "go"
    os.mkfifo(go)
    daemon = proxsmtpd({"FilterCommand": LATER_STAGES[name].replace("GO", str(go))})
    message = long_message(MEGABYTE // 32)  # a pipe holds it
    with start_message(daemon, data=message) as client:
        pid = int(daemon.wait_log(r"executed filter command: .* \(pid: (\d+)\)")[1])
        assert poll(lambda: not is_alive(pid))
        assert server.messages == []
        go.write_text("go\n")
        assert client.reply() == QUEUED
    assert server.wait_message().data == message


def test_output_that_stays_open_in_silence(
    proxsmtpd: StartDaemon, server: ScriptedServer, tmp_path: Path
) -> None:
    """Nobody knows whether the message is whole."""
    pid = tmp_path / "pid"
    command = f"sleep 60 & echo $! > {pid}; cat"
    daemon = proxsmtpd({"FilterCommand": command, "FilterTimeout": 1})
    assert deliver(daemon) == LOCAL_ERROR
    assert server.messages == []
    assert not is_alive(int(pid.read_text()))
    daemon.wait_log("timeout while listening to filter command$")


@on_other_systems_too
def test_silent_background_process_does_not_hold_up_mail(
    proxsmtpd: StartDaemon,
    server: ScriptedServer,
    filter_script: MakeFilter,
    tmp_path: Path,
) -> None:
    """The process may keep standard error open."""
    pid = tmp_path / "pid"
    script = f"sleep 60 >/dev/null & echo $! > {pid}; cat"
    daemon = proxsmtpd({"FilterCommand": filter_script(script)})
    begin = time.monotonic()
    assert deliver(daemon) == QUEUED
    assert time.monotonic() - begin < 5
    assert server.wait_message().data == MESSAGE
    end_process(int(pid.read_text()))


def end_process(pid: int) -> None:
    """End a filter's left-over, where it still is one."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    assert poll(lambda: not is_alive(pid))


def test_filter_need_not_read_its_input(
    proxsmtpd: StartDaemon, server: ScriptedServer
) -> None:
    daemon = proxsmtpd({"FilterCommand": "echo Subject: other"})
    assert deliver(daemon, long_message(4 * MEGABYTE)) == QUEUED
    assert server.wait_message().data == b"Subject: other\r\n"


def test_filter_may_write_all_before_it_reads(
    proxsmtpd: StartDaemon, server: ScriptedServer
) -> None:
    command = "yes line | head -n 500000; cat >/dev/null; echo words >&2"
    daemon = proxsmtpd({"FilterCommand": command})
    assert deliver(daemon, long_message(4 * MEGABYTE)) == QUEUED
    assert server.wait_message().data == b"line\r\n" * 500000


# --- FilterTimeout ---


@on_other_systems_too
def test_time_out_ends_the_whole_group(
    proxsmtpd: StartDaemon,
    server: ScriptedServer,
    filter_script: MakeFilter,
    tmp_path: Path,
) -> None:
    """SIGTERM to everybody in the group, and SIGKILL to who stays on."""
    told, pids = tmp_path / "told", tmp_path / "pids"
    script = f"""
        sh -c 'trap "echo TERM > {told}; exit" TERM; while :; do sleep 0.05; done' &
        echo $! > {pids}
        trap '' TERM
        sleep 60 &
        echo $$ $! >> {pids}
        wait"""
    daemon = proxsmtpd({"FilterCommand": filter_script(script), "FilterTimeout": 1})
    begin = time.monotonic()
    assert deliver(daemon) == LOCAL_ERROR
    assert 1 <= time.monotonic() - begin < 6
    assert told.read_text() == "TERM\n"
    group = [int(pid) for pid in pids.read_text().split()]
    assert poll(lambda: not any(map(is_alive, group)), timeout=1)
    assert server.messages == []
    assert status_of(daemon) == "FILTER-ERROR"


def test_time_out_of_a_filter_that_has_left_its_group(
    proxsmtpd: StartDaemon, filter_script: MakeFilter, tmp_path: Path
) -> None:
    pid = tmp_path / "pid"
    script = f"""#!{sys.executable}
import os, time
os.setpgid(0, os.getpgid(os.getppid()))
open({str(pid)!r}, "w").write(str(os.getpid()))
time.sleep(60)
"""
    daemon = proxsmtpd({"FilterCommand": filter_script(script), "FilterTimeout": 1})
    begin = time.monotonic()
    assert deliver(daemon) == LOCAL_ERROR
    assert time.monotonic() - begin < 6
    assert not is_alive(int(pid.read_text()))


def test_time_out_of_a_filter_that_has_stopped_itself(
    proxsmtpd: StartDaemon, tmp_path: Path
) -> None:
    """It is woken, so that it can clean up."""
    told = tmp_path / "told"
    command = f"trap 'echo clean > {told}; exit' TERM; kill -STOP $$; sleep 60 & wait"
    daemon = proxsmtpd({"FilterCommand": command, "FilterTimeout": 1})
    assert deliver(daemon) == LOCAL_ERROR
    assert told.read_text() == "clean\n"


def test_time_out_gives_all_of_the_group_time_to_clean_up(
    proxsmtpd: StartDaemon, tmp_path: Path
) -> None:
    """Processes that hold none of the pipes get that time, too."""
    told = tmp_path / "told"
    member = f'trap "sleep 0.5; echo clean > {told}; exit" TERM; sleep 60 & wait'
    command = f"sh -c '{member}' </dev/null >/dev/null 2>&1 & sleep 60"
    daemon = proxsmtpd({"FilterCommand": command, "FilterTimeout": 1})
    assert deliver(daemon) == LOCAL_ERROR
    assert told.read_text() == "clean\n"


SIGNS_OF_LIFE = {
    "output": "for i in 1 2 3; do sleep 0.5; echo; done; cat",
    "standard-error": "for i in 1 2 3; do sleep 0.5; echo x >&2; done; cat",
    "input": "for i in 1 2 3; do sleep 0.5; head -c 200000 >/dev/null; done; echo",
}


def test_signs_of_life(proxsmtpd: StartDaemon) -> None:
    """Each sort of progress keeps a slow filter alive."""
    clients = {}
    for name, command in SIGNS_OF_LIFE.items():
        daemon = proxsmtpd({"FilterCommand": command, "FilterTimeout": 1})
        clients[name] = start_message(daemon, data=long_message(MEGABYTE))
    assert {name: client.reply() for name, client in clients.items()} == dict.fromkeys(
        SIGNS_OF_LIFE, QUEUED
    )


# --- FilterType file ---


@pytest.fixture
def by_file(proxsmtpd: StartDaemon, filter_script: MakeFilter) -> StartDaemon:
    """Provide a factory of daemons with FilterType file and a script for the filter."""

    def start(script: str, **settings: object) -> Daemon:
        command = {"FilterType": "file", "FilterCommand": filter_script(script)}
        # A umask that forbids nothing shows who cares for the file's mode.
        return proxsmtpd({**command, **settings}, umask=0)

    return start


def test_file(by_file: StartDaemon, server: ScriptedServer, tmp_path: Path) -> None:
    out, copy = tmp_path / "out", tmp_path / "copy"
    daemon = by_file(f"""
        list=$(stat -c '%a %F' "$EMAIL"; dirname "$EMAIL"
            readlink /proc/$$/fd/[01]; stat -L -c %F /proc/$$/fd/2)
        echo "$list" > {out}
        cat "$EMAIL" > {copy}
        echo not the message
        echo added >> "$EMAIL" """)
    assert deliver(daemon, b"Subject: x\r\n\r\n..dot\r\n") == QUEUED
    assert copy.read_bytes() == b"Subject: x\r\n\r\n.dot\r\n"
    assert out.read_text().splitlines() == [
        "600 regular file",
        str(daemon.tempdir),
        "/dev/null",
        "/dev/null",
        "fifo",
    ]
    assert server.wait_message().data == b"Subject: x\r\n\r\n..dot\r\nadded\r\n"


REPLACING = {
    "unchanged": (":", MESSAGE),
    "rename": (
        'echo new > "$EMAIL.new"; mv "$EMAIL.new" "$EMAIL"',
        b"new\r\n",
    ),
    "unlink": ('rm "$EMAIL"; echo new > "$EMAIL"', b"new\r\n"),
    "in-place": ('sed -i s/Hello/Bye/ "$EMAIL"', MESSAGE.replace(b"Hello", b"Bye")),
}


@pytest.mark.parametrize("name", REPLACING)
def test_file_replaced(name: str, by_file: StartDaemon, server: ScriptedServer) -> None:
    script, expected = REPLACING[name]
    assert deliver(by_file(script)) == QUEUED
    assert server.wait_message().data == expected


UNUSABLE = {
    "removed": 'rm "$EMAIL"',
    "emptied": ': > "$EMAIL"',
    "link": 'rm "$EMAIL"; ln -s /etc/passwd "$EMAIL"',
    "link-to-itself": 'rm "$EMAIL"; ln -s "$EMAIL" "$EMAIL"',
    "directory": 'rm "$EMAIL"; mkdir "$EMAIL"',
    "fifo": 'rm "$EMAIL"; mkfifo "$EMAIL"',
    "device": 'rm "$EMAIL"; mknod "$EMAIL" c 1 5 || exit 126',
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_file_unusable(name: str, by_file: StartDaemon, server: ScriptedServer) -> None:
    daemon = by_file(UNUSABLE[name])
    assert deliver(daemon) == LOCAL_ERROR
    assert server.messages == []
    assert verbs(server.connections[0])[-2:] == [b"RSET", b"QUIT"]


@pytest.mark.parametrize("name", ["last-line-not-blank", "silent", "code-2xx"])
def test_file_rejected(name: str, by_file: StartDaemon, server: ScriptedServer) -> None:
    script, expected = REJECTING[name]
    assert deliver(by_file(script)) == expected
    assert server.messages == []


def test_file_long_message(by_file: StartDaemon, server: ScriptedServer) -> None:
    message = long_message(3 * MEGABYTE)
    assert deliver(by_file('wc -c < "$EMAIL" >> "$EMAIL"'), message) == QUEUED
    assert server.wait_message().data == message + b"%d\r\n" % len(message)


# --- The message itself ---


@pytest.mark.parametrize(
    ("sent", "seen", "relayed"),
    [
        (b"..\r\n...\r\n..x\r\n", b".\r\n..\r\n.x\r\n", b"..\r\n...\r\n..x\r\n"),
        (b".y\r\n", b"y\r\n", b"y\r\n"),
        (b"a\n.\nb\n..c\r\n", b"a\n.\nb\n.c\r\n", b"a\r\n..\r\nb\r\n..c\r\n"),
        (b"a\rb\r\r\nc\r\n", b"a\rb\r\r\nc\r\n", b"a b\r\nc\r\n"),
        (b"\n.\r\nx\r\n", b"\n.\r\nx\r\n", b"\r\n..\r\nx\r\n"),
        (b"x\r\n.\nx\r\n", b"x\r\n\nx\r\n", b"x\r\n\r\nx\r\n"),
        (b"\0\x80\xff\x1a\r\n", b"\0\x80\xff\x1a\r\n", b"\0\x80\xff\x1a\r\n"),
        (b"\r\n\r\n", b"\r\n\r\n", b"\r\n\r\n"),
    ],
)
def test_filter_sees_the_message_and_the_server_a_clean_one(
    sent: bytes,
    seen: bytes,
    relayed: bytes,
    proxsmtpd: StartDaemon,
    server: ScriptedServer,
    tmp_path: Path,
) -> None:
    copy = tmp_path / "copy"
    daemon = proxsmtpd({"FilterCommand": f"tee {copy}"})
    assert deliver(daemon, sent) == QUEUED
    assert copy.read_bytes() == seen
    assert server.wait_message().data == relayed


@pytest.mark.parametrize(
    ("written", "relayed"),
    [
        (r"one\ntwo\n", b"one\r\ntwo\r\n"),
        (r"no end", b"no end\r\n"),
        (r".\n..\n.x", b"..\r\n...\r\n..x\r\n"),
        (r"a\n.\nMAIL FROM:<b>\n", b"a\r\n..\r\nMAIL FROM:<b>\r\n"),
        (r"a\r\n.\r\nRSET\r\n", b"a\r\n..\r\nRSET\r\n"),
        (r"a\r.\rb\r", b"a . b\r\n"),
        (r"a\r\r\n\n", b"a\r\n\r\n"),
        (r"\000\n", b"\0\r\n"),
    ],
)
def test_output_is_made_clean(
    written: str, relayed: bytes, proxsmtpd: StartDaemon, server: ScriptedServer
) -> None:
    daemon = proxsmtpd({"FilterCommand": f"printf '{written}'"})
    assert deliver(daemon) == QUEUED
    assert server.wait_message().data == relayed


@pytest.mark.parametrize("command", ["cat", None], ids=["filtered", "streamed"])
def test_one_long_line(
    command: str | None, proxsmtpd: StartDaemon, server: ScriptedServer
) -> None:
    daemon = proxsmtpd({"FilterCommand": command} if command else {})
    line = b"." + b"\0x\r\xff" * (MEGABYTE // 2)
    assert deliver(daemon, b"." + line + b"\r\n") == QUEUED
    assert server.wait_message().data == b"." + line.replace(b"\r", b" ") + b"\r\n"


@on_other_systems_too
@pytest.mark.parametrize(
    "settings",
    [
        {"FilterCommand": "cat"},
        {"FilterCommand": "true", "FilterType": "file"},
        {},
    ],
    ids=["pipe", "file", "streamed"],
)
def test_memory_is_bounded(
    settings: Mapping[str, object], proxsmtpd: StartDaemon, server: ScriptedServer
) -> None:
    daemon = proxsmtpd(settings, level=3)
    assert deliver(daemon) == QUEUED
    before = daemon.peak_memory()
    message = long_message(24 * MEGABYTE)
    assert deliver(daemon, message) == QUEUED
    assert server.wait_message(2).data == message
    assert daemon.peak_memory() - before < 8 * MEGABYTE


def test_memory_for_standard_error_is_bounded(proxsmtpd: StartDaemon) -> None:
    flood = "head -c 50000000 /dev/zero >&2; echo >&2; yes no | head -c 50000000 >&2"
    daemon = proxsmtpd({"FilterCommand": f"{flood}; echo >&2; echo 554 x >&2; exit 1"})
    before = daemon.peak_memory()
    assert deliver(daemon) == b"554 x\r\n"
    assert daemon.peak_memory() - before < 16 * MEGABYTE


@on_other_systems_too
def test_nothing_is_left_after_kill(proxsmtpd: StartDaemon) -> None:
    """Spilled mail data has no name, so that even SIGKILL leaves none."""
    daemon = proxsmtpd({"FilterCommand": "cat"})
    client = daemon.connect()
    client.start()
    client.expect(b"DATA", b"354")
    client.send(long_message(8 * MEGABYTE))
    spilled, pid = re.escape(str(daemon.tempdir)), daemon.process.pid
    assert poll(lambda: re.search(spilled, str(open_files(pid))))
    assert daemon.stop(signal.SIGKILL) == -signal.SIGKILL
    assert list(daemon.tempdir.iterdir()) == []


@pytest.mark.parametrize("kind", ["pipe", "file"])
def test_temp_directory_missing(
    kind: str, proxsmtpd: StartDaemon, server: ScriptedServer, tmp_path: Path
) -> None:
    """The data is read to its end, then refused; the session goes on."""
    settings = {"FilterCommand": "cat", "FilterType": kind}
    daemon = proxsmtpd({**settings, "TempDirectory": tmp_path / "nowhere"})
    client = daemon.connect()
    assert client.message(long_message(3 * MEGABYTE)) == LOCAL_ERROR
    client.expect(b"NOOP", b"250")
    client.quit()
    assert verbs(server.connections[0]) == [
        b"EHLO",
        b"MAIL",
        b"RCPT",
        b"RSET",
        b"NOOP",
        b"QUIT",
    ]
    assert status_of(daemon) == "FILTER-ERROR"


@pytest.mark.parametrize("kind", ["pipe", "file"])
def test_disk_full(kind: str, proxsmtpd: StartDaemon, server: ScriptedServer) -> None:
    limit = (MEGABYTE * 3 // 2,) * 2
    daemon = proxsmtpd(
        {"FilterCommand": "cat", "FilterType": kind},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit),
    )
    client = daemon.connect()
    assert client.message(long_message(8 * MEGABYTE)) == LOCAL_ERROR
    client.quit()
    assert server.messages == []
    assert verbs(server.connections[0])[-2:] == [b"RSET", b"QUIT"]


def test_filter_output_fills_the_disk(
    proxsmtpd: StartDaemon, server: ScriptedServer
) -> None:
    limit = (MEGABYTE * 3 // 2,) * 2
    daemon = proxsmtpd(
        {"FilterCommand": "yes | head -c 8000000"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit),
    )
    assert deliver(daemon) == LOCAL_ERROR
    assert server.messages == []


# --- The Header setting ---

HEADERS = {
    "end": ("X-By: me", MESSAGE, b"Subject: test\r\nX-By: me\r\n\r\nHello\r\n"),
    "received": ("Received: by me", MESSAGE, b"Received: by me\r\n" + MESSAGE),
    "received-case": ("RECEIVED: by me", MESSAGE, b"RECEIVED: by me\r\n" + MESSAGE),
    "addresses": (
        "X-By: %i to %l 100%%",
        MESSAGE,
        b"Subject: test\r\nX-By: 127.0.0.1 to 127.0.0.1 100%\r\n\r\nHello\r\n",
    ),
    "folded": (
        r"Received: from x\r\n\tby y",
        MESSAGE,
        b"Received: from x\r\n\tby y\r\n" + MESSAGE,
    ),
    "line-feed": (
        r"X-One: 1\nX-Two: \\",
        MESSAGE,
        b"Subject: test\r\nX-One: 1\r\nX-Two: \\\r\n\r\nHello\r\n",
    ),
    "own-end": (r"X-By: me\n", MESSAGE, b"Subject: test\r\nX-By: me\r\n\r\nHello\r\n"),
    "no-body": ("X-By: me", b"Subject: test\r\n", b"Subject: test\r\nX-By: me\r\n"),
    "no-header": ("X-By: me", b"\r\nHello\r\n", b"X-By: me\r\n\r\nHello\r\n"),
    "bare-lf": (
        "X-By: me",
        b"Subject: test\n\nHello\r\n",
        b"Subject: test\r\nX-By: me\r\n\r\nHello\r\n",
    ),
    "no-field": ("X-By: me", b"Hello\r\n\r\na\r\n", b"X-By: me\r\nHello\r\n\r\na\r\n"),
    "no-separator": (
        "X-By: me",
        b"Subject: test\r\nHello\r\n\r\na\r\n",
        b"Subject: test\r\nX-By: me\r\nHello\r\n\r\na\r\n",
    ),
    "mbox": (
        "Received: by me",
        b"From a Thu\r\n" + MESSAGE,
        b"From a Thu\r\nReceived: by me\r\n" + MESSAGE,
    ),
    "blank-first": ("X-By: me", b" a\r\n", b"X-By: me\r\n\r\n a\r\n"),
    "cr-cr-lf": (
        "X-By: me",
        MESSAGE.replace(b"\r\n", b"\r\r\n"),
        b"Subject: test\r\nX-By: me\r\n\r\nHello\r\n",
    ),
    "taken-back": ("X-By: me\nHeader:", MESSAGE, MESSAGE),
    "last-wins": (
        "X-By: me\nHeader: X-By: you",
        MESSAGE,
        b"Subject: test\r\nX-By: you\r\n\r\nHello\r\n",
    ),
}


@pytest.mark.parametrize("template", sorted({row[0] for row in HEADERS.values()}))
def test_header(template: str, proxsmtpd: StartDaemon, server: ScriptedServer) -> None:
    daemon = proxsmtpd(f"FilterCommand: cat\nHeader: {template}\n")
    rows = {name: row[1:] for name, row in HEADERS.items() if row[0] == template}
    for count, (name, (sent, relayed)) in enumerate(rows.items(), 1):
        assert deliver(daemon, sent) == QUEUED, name
        assert server.wait_message(count).data == relayed, name


def test_header_with_file(by_file: StartDaemon, server: ScriptedServer) -> None:
    assert deliver(by_file(":", Header="X-By: %i")) == QUEUED
    expected = MESSAGE.replace(b"\r\n\r\n", b"\r\nX-By: 127.0.0.1\r\n\r\n")
    assert server.wait_message().data == expected


def test_header_in_a_long_header_section(
    proxsmtpd: StartDaemon, server: ScriptedServer
) -> None:
    section = b"".join(b"X-%07d: x\r\n" % number for number in range(100_000))
    daemon = proxsmtpd({"FilterCommand": "cat", "Header": "X-By: me"})
    assert deliver(daemon, section + b"\r\nHello\r\n") == QUEUED
    assert server.wait_message().data == section + b"X-By: me\r\n\r\nHello\r\n"


def test_header_date(proxsmtpd: StartDaemon, server: ScriptedServer) -> None:
    settings = {"FilterCommand": "cat", "Header": "X-At: (%d)"}
    daemon = proxsmtpd(settings, env={"TZ": "XYZ-3:30", "LC_ALL": "de_DE.UTF-8"})
    deliver(daemon)
    found = re.search(rb"^X-At: \((.*)\)\r$", server.wait_message().data, re.M)
    assert found
    date = found[1].decode()
    assert re.match(
        r"[A-Z][a-z]{2}, \d\d? [A-Z][a-z]{2} \d{4} \d\d:\d\d:\d\d \+0330", date
    )
    assert abs(parsedate_to_datetime(date).timestamp() - time.time()) < 60


# --- Keeping the server's patience ---


def test_keep_alives(
    make_server: MakeServer, proxsmtpd: StartDaemon, tmp_path: Path
) -> None:
    """NOOPs are sent while the client sends and while the filter runs."""
    server = make_server({"NOOP": b"250-kept\r\n250 alive\r\n"})
    go = tmp_path / "go"
    os.mkfifo(go)
    daemon = proxsmtpd(
        {"FilterCommand": f"read line < {go}; cat", "KeepAlives": 1}, server=server
    )
    client = daemon.connect()
    client.start()
    client.expect(b"DATA", b"354")
    server.wait_line(b"NOOP")
    connection = server.connections[0]
    seen = verbs(connection).count(b"NOOP")
    client.send(MESSAGE + b".\r\n")
    server.wait_for(lambda: verbs(connection).count(b"NOOP") > seen)
    go.write_text("go\n")
    assert client.reply() == QUEUED
    client.quit()
    assert server.wait_message().data == MESSAGE
    others = [verb for verb in verbs(connection) if verb != b"NOOP"]
    assert others == [b"EHLO", b"MAIL", b"RCPT", b"DATA", b"QUIT"]


def test_keep_alives_while_the_client_never_pauses(
    proxsmtpd: StartDaemon, server: ScriptedServer
) -> None:
    client = proxsmtpd({"FilterCommand": "cat", "KeepAlives": 1}).connect()
    client.start()
    client.expect(b"DATA", b"354")
    deadline = time.monotonic() + 10
    while b"NOOP" not in verbs(server.connections[0]):
        client.send(b"line\r\n")
        time.sleep(0.01)  # well below what counts as a pause
        assert time.monotonic() < deadline
    assert client.command(b".") == QUEUED


def test_keep_alives_come_an_interval_after_the_last_answer(
    make_server: MakeServer, proxsmtpd: StartDaemon
) -> None:
    """Else a server slower than KeepAlives would be asked without a pause."""
    asked: list[float] = []

    def answer(_connection: Recorded, _line: bytes) -> Delay:
        asked.append(time.monotonic())
        return Delay(1.5, b"250 alive\r\n")

    server = make_server({"NOOP": answer})
    settings = {"FilterCommand": "sleep 4; cat", "KeepAlives": 1}
    assert deliver(proxsmtpd(settings, server=server)) == QUEUED
    assert asked[1] - asked[0] >= 2.4


def test_slow_answer_to_a_keep_alive_is_no_silence_of_the_filter(
    make_server: MakeServer, proxsmtpd: StartDaemon
) -> None:
    server = make_server({"NOOP": Delay(2.5, b"250 alive\r\n")})
    command = "for i in 1 2 3 4 5 6 7 8; do sleep 0.3; echo; done; cat"
    settings = {"FilterCommand": command, "KeepAlives": 1, "FilterTimeout": 2}
    assert deliver(proxsmtpd(settings, server=server)) == QUEUED


def test_server_gone_while_the_filter_runs(
    proxsmtpd: StartDaemon, server: ScriptedServer, tmp_path: Path
) -> None:
    go = tmp_path / "go"
    os.mkfifo(go)
    daemon = proxsmtpd({"FilterCommand": f"read line < {go}; cat"})
    client = start_message(daemon)
    writer = go.open("w")
    server.connections[0].hang_up()
    writer.write("go\n")
    writer.close()
    assert client.reply() == b"421 Connection to server lost\r\n"
    assert server.messages == []


CONFUSED = b"421 Server gave an unusable reply\r\n"


@pytest.mark.parametrize(
    ("stray", "reply"),
    [
        (b"421 4.4.2 Timed out\r\n", b"421 4.4.2 Timed out\r\n"),
        (b"250 2.0.0 Ok\r\n", CONFUSED),
        (b"354 Go on\r\n", CONFUSED),
    ],
)
def test_stray_reply_while_the_filter_runs(
    stray: bytes,
    reply: bytes,
    proxsmtpd: StartDaemon,
    server: ScriptedServer,
    tmp_path: Path,
) -> None:
    """It is neither the reply to DATA nor the one to the end of the data."""
    go = tmp_path / "go"
    os.mkfifo(go)
    daemon = proxsmtpd({"FilterCommand": f"read line < {go}; cat"})
    client = start_message(daemon)
    with go.open("w") as writer:
        server.connections[0].send(stray)
        writer.write("go\n")
    assert client.reply() == reply
    assert server.messages == []


# --- Many at once ---


@on_other_systems_too
def test_concurrent_messages(proxsmtpd: StartDaemon, server: ScriptedServer) -> None:
    """20 sessions with 5 messages each: nothing lost, doubled or mixed up."""
    daemon = proxsmtpd({"FilterCommand": "cat"}, level=3)
    failures: list[str] = []

    def session(number: int) -> None:
        client = RawClient(daemon.address, timeout=30)
        client.start()
        for turn in range(5):
            if turn:
                client.envelope()
            reply = client.message(b"Subject: %d %d\r\n" % (number, turn))
            if reply != QUEUED:
                failures.append(repr(reply))
        client.quit()

    threads = [threading.Thread(target=session, args=(n,)) for n in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []
    expected = {b"Subject: %d %d\r\n" % (n, t) for n in range(20) for t in range(5)}
    assert sorted(m.data for m in server.messages) == sorted(expected)


# --- The daemon's end ---


def test_filter_may_finish_at_the_daemons_end(
    proxsmtpd: StartDaemon, server: ScriptedServer, tmp_path: Path
) -> None:
    started, go = tmp_path / "started", tmp_path / "go"
    os.mkfifo(started)
    os.mkfifo(go)
    command = f"echo up > {started}; read line < {go}; cat"
    daemon = proxsmtpd({"FilterCommand": command})
    client = start_message(daemon)
    assert started.read_text() == "up\n"
    daemon.process.send_signal(signal.SIGTERM)
    assert poll(lambda: not accepts(daemon))
    go.write_text("go\n")
    assert client.reply() == QUEUED
    client.close()
    assert daemon.wait() == 0
    assert server.wait_message().data == MESSAGE


def accepts(daemon: Daemon) -> bool:
    """Return whether the daemon still listens."""
    try:
        RawClient(daemon.address, timeout=1).close()
    except ConnectionError:
        return False
    except OSError:
        pass  # The backlog is full of earlier tries: it has not come to the end yet.
    return True


BOTH = ("filter", "daemon")


@pytest.mark.parametrize("order", [BOTH, BOTH[::-1]], ids="-".join)
@pytest.mark.parametrize(
    ("end", "settings", "reply"),
    [
        ("exit 1", {}, LOCAL_ERROR),
        ("echo stopped >&2; exit 2", {}, LOCAL_ERROR),
        ("exit 127", {"FilterFailure": "pass"}, LOCAL_ERROR),
        ("echo 554 Spam >&2; exit 1", {}, b"554 Spam\r\n"),
    ],
)
def test_stop_of_the_filter_and_the_daemon(
    end: str,
    settings: Mapping[str, object],
    reply: bytes,
    order: tuple[str, str],
    proxsmtpd: StartDaemon,
    server: ScriptedServer,
    tmp_path: Path,
) -> None:
    """Like systemd's stop, in either order: without a code there is no verdict."""
    started = tmp_path / "started"
    os.mkfifo(started)
    end = f"kill $!; {end}"
    command = f"sleep 60 & trap '{end}' TERM; echo $$ >{started}; wait"
    daemon = proxsmtpd({"FilterCommand": command, **settings})
    with start_message(daemon) as client:
        pids = {"daemon": daemon.process.pid, "filter": int(started.read_text())}
        # Stopped, so that it sees both at once, however slow this test may be.
        os.kill(daemon.process.pid, signal.SIGSTOP)
        for name in order:
            os.kill(pids[name], signal.SIGTERM)
        assert poll(lambda: not is_alive(pids["filter"]))
        os.kill(daemon.process.pid, signal.SIGCONT)
        assert client.reply() == reply
    assert daemon.wait() == 0
    assert server.messages == []


def test_many_filters_at_the_daemons_end(proxsmtpd: StartDaemon) -> None:
    """All is gone before an init script loses its patience, after 5 seconds."""
    daemon = proxsmtpd({"FilterCommand": "sleep 30", "MaxConnections": 200}, level=1)
    clients = [start_message(daemon) for _ in range(200)]
    assert poll(lambda: len(marked_processes(daemon.mark)) == 201, 30)
    daemon.process.send_signal(signal.SIGTERM)
    assert daemon.wait(5) == 0
    assert marked_processes(daemon.mark) == {}
    for client in clients:
        assert client.reply() == LOCAL_ERROR
        client.close()


# Once there is input the limit has been lowered; the first octets come after that.
LIMITS_SHOWN = "read line; ulimit -S -n; ulimit -H -n"


@pytest.mark.parametrize("command", [LIMITS_SHOWN, "SCRIPT"])
def test_filter_has_the_limit_that_the_daemon_was_started_with(
    command: str,
    proxsmtpd: StartDaemon,
    server: ScriptedServer,
    filter_script: MakeFilter,
) -> None:
    script = filter_script(LIMITS_SHOWN)
    daemon = proxsmtpd(
        {"FilterCommand": command.replace("SCRIPT", script)},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (256, 2048)),
    )
    assert deliver(daemon) == QUEUED
    assert server.wait_message().data == b"256\r\n2048\r\n"
    assert resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE)[0] > 256


def test_filter_is_at_home_where_the_user_is(
    proxsmtpd: StartDaemon, server: ScriptedServer
) -> None:
    user = pwd.getpwuid(os.geteuid())
    names = ("HOME", "USER", "LOGNAME", "SHELL")
    daemon = proxsmtpd(
        {"FilterCommand": "printenv " + " ".join(names), "User": user.pw_name},
        env=dict.fromkeys(names, "stale"),
    )
    assert deliver(daemon) == QUEUED
    values = (user.pw_dir, user.pw_name, user.pw_name, user.pw_shell)
    assert server.wait_message().data.decode().split() == list(values)


CLOSED = """
    rm "$EMAIL"; mkdir -p "$EMAIL/a/b"; echo >"$EMAIL/a/b/c"
    chmod 0 "$EMAIL/a/b" "$EMAIL/a" "$EMAIL" """


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_directories_in_the_place_of_the_file(
    proxsmtpd: StartDaemon, open_place: Path
) -> None:
    """They go, too, whatever their modes are."""
    daemon = proxsmtpd(
        {
            "FilterType": "file",
            "FilterCommand": CLOSED.replace("\n", ";").strip("; "),
            "User": "nobody",
            "TempDirectory": open_place,
        }
    )
    assert deliver(daemon) == LOCAL_ERROR
    assert list(open_place.iterdir()) == []


@pytest.fixture
def open_place() -> Iterator[Path]:
    """Provide a directory that everybody can write to, as /tmp."""
    with tempfile.TemporaryDirectory(prefix="proxsmtpd-test-") as name:
        Path(name).chmod(0o1777)
        yield Path(name)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_file_of_another_user_in_the_place_of_the_file(
    proxsmtpd: StartDaemon, open_place: Path
) -> None:
    """It cannot be removed, and the log has that."""
    out, go = open_place / "out", open_place / "go"
    os.mkfifo(go)
    go.chmod(0o666)
    daemon = proxsmtpd(
        {
            "FilterType": "file",
            "FilterCommand": f'echo "$EMAIL" >{out}; read line <{go}',
            "User": "nobody",
            "TempDirectory": open_place,
        }
    )
    with start_message(daemon) as client:
        assert poll(lambda: out.exists() and out.read_text())
        email = Path(out.read_text().strip())
        email.unlink()
        email.write_bytes(MESSAGE)
        email.chmod(0o644)
        go.write_text("go\n")
        assert client.reply() == QUEUED
    daemon.wait_log("couldn't remove cache file: Operation not permitted$")
    for path in open_place.iterdir():
        path.unlink()


TIDY = {
    "rejects": "trap 'exit 1' TERM; cat",
    "says": "trap 'echo terminated >&2; exit 1' TERM",
    "refuses": "trap 'echo 554 ended >&2; exit 1' TERM",
    "drops": "trap 'echo 250 dropped >&2; exit 1' TERM",
    "passes-a-part": "trap 'exit 0' TERM; head -n 1",
}


@pytest.mark.parametrize("mode", [{}, {"FilterFailure": "pass"}], ids=["", "pass"])
def test_ended_filter_gives_no_verdict(
    mode: Mapping[str, object],
    proxsmtpd: StartDaemon,
    server: ScriptedServer,
    tmp_path: Path,
) -> None:
    """The filter cleans up and exits; the client has to try again."""
    for name, script in TIDY.items():
        os.mkfifo(tmp_path / f"{name}.started")
        started = f"echo >{tmp_path}/{name}.started"
        (tmp_path / name).write_text(f"{script}; {started}; sleep 60 & wait\n")
    command = f". {tmp_path}/${{SENDER%@*}}"
    daemon = proxsmtpd({"FilterCommand": command, **mode})
    clients = {}
    for name in TIDY:
        clients[name] = start_message(daemon, b"<%s@example.com>" % name.encode())
        (tmp_path / f"{name}.started").read_text()
    daemon.process.send_signal(signal.SIGTERM)
    for name, client in clients.items():
        assert client.reply() == LOCAL_ERROR, name
        client.close()
    assert daemon.wait() == 0
    ended = re.findall(r"status=(.*)$", daemon.log(), re.M)
    assert ended == ["FILTER-ERROR"] * len(TIDY)
    assert server.messages == []


def test_client_in_its_data_at_the_daemons_end(by_file: StartDaemon) -> None:
    """When its time is over it gets SIGTERM, and its file is removed."""
    daemon = by_file("cat")
    client = daemon.connect()
    client.start()
    client.expect(b"DATA", b"354")
    client.send(MESSAGE)
    assert poll(lambda: list(daemon.tempdir.iterdir()))
    daemon.process.send_signal(signal.SIGTERM)
    assert client.reply() == b"421 Service shutting down\r\n"
    assert list(daemon.tempdir.iterdir()) == []
    assert status_of(daemon) == "421 Service shutting down"
    client.close()
    assert daemon.wait() == 0


def test_steady_client_at_the_daemons_end(proxsmtpd: StartDaemon) -> None:
    """A client that never pauses does not hold up the end."""
    daemon = proxsmtpd({"FilterCommand": "cat"})
    client = daemon.connect()
    client.start()
    client.expect(b"DATA", b"354")
    ended = threading.Event()

    def send() -> None:
        with contextlib.suppress(OSError):
            while not ended.wait(0.01):
                client.send(b"line\r\n")

    sender = threading.Thread(target=send)
    sender.start()
    try:
        assert daemon.stop() == 0
    finally:
        ended.set()
        sender.join()
    assert status_of(daemon) == "421 Service shutting down"


def test_second_signal_leaves_no_file(by_file: StartDaemon, tmp_path: Path) -> None:
    started = tmp_path / "started"
    os.mkfifo(started)
    daemon = by_file(f"trap '' TERM; echo up > {started}; sleep 60 & wait")
    start_message(daemon)
    started.read_text()
    daemon.process.send_signal(signal.SIGTERM)
    assert poll(lambda: not accepts(daemon))
    assert daemon.stop() == 0
    assert list(daemon.tempdir.iterdir()) == []


def test_stubborn_filter_at_the_daemons_end(
    proxsmtpd: StartDaemon, server: ScriptedServer, tmp_path: Path
) -> None:
    """A client whose filter has to be killed gets a reply, and the log its line."""
    pids = tmp_path / "pids"
    os.mkfifo(pids)
    command = f"trap '' TERM; sleep 60 & echo $$ $! > {pids}; wait"
    daemon = proxsmtpd({"FilterCommand": command})
    client = start_message(daemon)
    running = [int(pid) for pid in pids.read_text().split()]
    daemon.process.send_signal(signal.SIGTERM)
    assert client.reply() == LOCAL_ERROR
    client.close()
    assert daemon.wait() == 0
    assert status_of(daemon) == "FILTER-ERROR"
    assert not any(map(is_alive, running))
    assert server.messages == []


@on_other_systems_too
@pytest.mark.parametrize("signals", [1, 2])
def test_filter_is_ended_with_the_daemon(
    signals: int, proxsmtpd: StartDaemon, server: ScriptedServer, tmp_path: Path
) -> None:
    """After some seconds of grace, or at once with a second signal."""
    pids = tmp_path / "pids"
    os.mkfifo(pids)
    command = f"sleep 60 & echo $$ $! > {pids}; wait"
    daemon = proxsmtpd({"FilterCommand": command})
    client = start_message(daemon)
    running = [int(pid) for pid in pids.read_text().split()]
    begin = time.monotonic()
    daemon.process.send_signal(signal.SIGTERM)
    if signals == 2:
        assert poll(lambda: not accepts(daemon))
        daemon.process.send_signal(signal.SIGTERM)
    else:
        assert client.reply() == LOCAL_ERROR
        client.close()
    assert daemon.wait() == 0
    took = time.monotonic() - begin
    assert took < 3 if signals == 2 else 3 < took < 8
    assert poll(lambda: not any(map(is_alive, running)), timeout=1)
    assert server.messages == []


DIRECTORIES = {
    "ends by SIGTERM": "exec sleep 60",
    "ends by SIGKILL": "trap '' TERM; sleep 60 & wait",
}


@pytest.mark.parametrize("signals", [1, 2])
@pytest.mark.parametrize("rest", DIRECTORIES.values(), ids=DIRECTORIES)
def test_directory_in_the_place_of_the_file_at_the_daemons_end(
    rest: str, signals: int, by_file: StartDaemon, tmp_path: Path
) -> None:
    """It goes, too, with all that is in it."""
    made = tmp_path / "made"
    os.mkfifo(made)
    directory = 'rm "$EMAIL"; mkdir "$EMAIL"; echo >"$EMAIL/a"'
    daemon = by_file(f"{directory}; echo >{made}; {rest}")
    client = start_message(daemon)
    made.read_text()
    (entry,) = daemon.tempdir.iterdir()
    assert entry.is_dir()
    daemon.process.send_signal(signal.SIGTERM)
    if signals == 2:
        assert poll(lambda: not accepts(daemon))
        daemon.process.send_signal(signal.SIGTERM)
    else:
        assert client.reply() == LOCAL_ERROR
    assert daemon.wait() == 0
    assert list(daemon.tempdir.iterdir()) == []


# --- A cache file that cannot be read ---

BROKEN_READING = """\
import errno, os, runpy, sys
def pread(descriptor, length, offset):
    raise OSError(errno.EIO, os.strerror(errno.EIO))
os.pread = pread
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""
SPILLED = MEGABYTE + 1
UNREADABLE = {
    "message": ({"FilterCommand": "cat"}, long_message(2 * MEGABYTE)),
    "output": ({"FilterCommand": f"head -c {SPILLED} /dev/zero"}, MESSAGE),
    "file": ({"FilterCommand": "true", "FilterType": "file"}, MESSAGE),
    "passed": (
        {"FilterCommand": "cat", "FilterFailure": "pass"},
        long_message(2 * MEGABYTE),
    ),
}


@pytest.mark.parametrize(("settings", "message"), UNREADABLE.values(), ids=UNREADABLE)
def test_cache_file_that_cannot_be_read(
    settings: Mapping[str, str],
    message: bytes,
    proxsmtpd: StartDaemon,
    server: ScriptedServer,
) -> None:
    """The message is deferred, and the log does not blame the writing."""
    command = [sys.executable, "-c", BROKEN_READING, PROGRAM]
    daemon = proxsmtpd(settings, program=command)
    client = daemon.connect(timeout=30)
    assert client.message(message) == LOCAL_ERROR
    daemon.wait_log(r": error reading cache file: Input/output error$")
    daemon.wait_log(r"client=.*, status=(451 Local Error|FILTER-ERROR)$")
    assert "couldn't write" not in daemon.log()
    assert server.messages == []


# --- Other sessions ---

SLEEPERS = 100


def test_others_hear_at_once_while_filters_time_out(proxsmtpd: StartDaemon) -> None:
    """Many that have to be ended at the same time hold up nobody else."""
    settings = {"FilterCommand": "sleep 60", "FilterTimeout": 1}
    daemon = proxsmtpd({**settings, "MaxConnections": SLEEPERS + 1}, level=1)
    other = daemon.connect(timeout=30)
    other.start()
    clients = [daemon.connect(timeout=30) for _ in range(SLEEPERS)]
    for client in clients:
        client.start()
        client.expect(b"DATA", b"354")
    for client in clients:
        client.send(MESSAGE + b".\r\n")
    waiting = {client.sock: client for client in clients}
    longest = 0.0
    while waiting:
        begun = time.monotonic()
        other.expect(b"NOOP", b"250")
        longest = max(longest, time.monotonic() - begun)
        answered, _, _ = select.select(list(waiting), [], [], 0.01)
        for sock in answered:
            assert waiting.pop(sock).reply() == LOCAL_ERROR
    assert longest < 1
