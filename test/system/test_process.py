"""Filters' processes and sessions' threads, and how they stand what goes wrong."""

from __future__ import annotations

import contextlib
import errno
import os
import queue
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest

import proxsmtpd as program
from helpers import ROOT, poll, port_of, reserve_port
from proxsmtpd import (
    FilterFailure,
    FilterRun,
    KeepAlive,
    Log,
    Spawn,
    Threads,
    Transaction,
    UnlockedSpawn,
)

NO_KEEP_ALIVE = (KeepAlive(0), lambda: None)


class LogLines(list[str]):
    """A log, and the lines that were written to it."""

    def __init__(self) -> None:
        self.log = Log(program.DEBUG, lambda _level, text: self.append(text))


@pytest.fixture
def log_lines() -> LogLines:
    return LogLines()


@pytest.fixture
def process(log_lines: LogLines) -> FilterRun:
    """Provide a filter's process that has not been started."""
    config, _ = program.parse_config(b"OutAddress: 25\n", "")
    shared = program.Shared(config, log_lines.log, {})
    return FilterRun(shared, log_lines.log)


def is_there(pid: int) -> bool:
    """Return whether a process lives, or is a zombie that nobody has reaped."""
    return Path(f"/proc/{pid}").exists()


@pytest.fixture
def immune(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nobody may send a signal to a filter, as to one that sudo(8) has started."""

    def not_permitted(*_arguments: int) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "killpg", not_permitted)
    monkeypatch.setattr(os, "kill", not_permitted)
    monkeypatch.setattr(program, "KILL_GRACE", 0.2)
    yield
    monkeypatch.undo()


@pytest.mark.usefixtures("immune")
def test_filter_that_cannot_be_ended(process: FilterRun, log_lines: LogLines) -> None:
    """It holds up neither the client nor the daemon, and is reaped at its end."""
    begin = time.monotonic()
    process.start("sleep 5", os.environb, 1)
    pid = process._pid
    with pytest.raises(FilterFailure, match="timeout"), process:
        process.finish(*NO_KEEP_ALIVE)
    assert time.monotonic() - begin < 4.5
    assert log_lines[-1] == f"couldn't kill filter process (pid {pid})"
    process.send_signal(signal.SIGTERM)  # as the daemon's end does
    assert is_there(pid)
    assert poll(lambda: not is_there(pid))


@pytest.mark.usefixtures("immune")
def test_daemon_that_ends_waits_for_no_lock(process: FilterRun) -> None:
    """The lock is held while a filter is being ended that cannot be ended."""
    process.start("sleep 2", os.environb, 5)
    pid = process._pid
    ending = threading.Thread(target=process.__exit__)
    ending.start()
    while ending.is_alive():
        begin = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert time.monotonic() - begin < 0.2
        ending.join(0.02)
    assert poll(lambda: not is_there(pid))


def test_filter_that_is_ended_before_it_starts(process: FilterRun) -> None:
    """It never does, since nobody would end it any more."""
    with process._shared.shutdown.listed(process):
        process._shared.shutdown.kill()
    with pytest.raises(FilterFailure, match="the daemon ends"), process:
        process.start("sleep 60", os.environb, 5)
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


@pytest.mark.parametrize("command", ["true", "false"])
def test_filter_that_is_ended_at_its_end(command: str, process: FilterRun) -> None:
    """Whether the signal was still in time, nobody can know."""
    process.start(command, os.environb, 5)
    assert poll(lambda: process._pid not in program.live_groups())
    with process._shared.shutdown.listed(process):
        process._shared.shutdown.stop()
    with pytest.raises(FilterFailure, match="the daemon ends"), process:
        process.finish(*NO_KEEP_ALIVE)


def test_filter_that_would_start_when_all_are_ended(process: FilterRun) -> None:
    shutdown = program.Shutdown()
    shutdown.stop()
    with pytest.raises(FilterFailure, match="the daemon ends"):
        shutdown.listed(process).__enter__()


def test_filters_that_are_not_running_any_more(process: FilterRun) -> None:
    """They are forgotten, and nobody sends them a signal."""
    shutdown = program.Shutdown()
    with shutdown.listed(process):
        pass
    shutdown.stop()
    with process:
        process.start("true", os.environb, 5)
        assert process.finish(*NO_KEEP_ALIVE) == (0, b"")
        process.release()


# --- How a program is started ---


@pytest.fixture(params=["locked", "unlocked"])
def spawn(request: pytest.FixtureRequest) -> Spawn:
    if request.param == "locked":
        return program.spawn_locked
    if not program.IS_LINUX:
        pytest.skip("only Linux's C library is called by us")
    return UnlockedSpawn()


@pytest.fixture
def files(tmp_path: Path) -> Iterator[list[int]]:
    """Open files as a program's standard input, output and error."""
    opened = []
    for name in ("in", "out", "err"):
        (tmp_path / name).write_text("to be read\n" if name == "in" else "")
        opened.append(os.open(tmp_path / name, os.O_RDWR))
    yield opened
    for file in opened:
        os.close(file)


def test_attributes_of_a_new_process(
    spawn: Spawn, files: list[int], tmp_path: Path
) -> None:
    script = """
        cat
        printf '%s\\n' "$0" "$@" "$VARIABLE"
        env | wc -l
        echo error >&2"""
    words = [b"name", b"-c", script.encode(), b"zero", b"\xe4 b", b""]
    environment = {b"PATH": os.environb[b"PATH"], b"VARIABLE": b"a=b\n\xff"}
    assert program.wait_for_exit(spawn(b"/bin/sh", words, environment, files)) == 0
    assert (tmp_path / "err").read_text() == "error\n"
    begin = b"to be read\nzero\n\xe4 b\n\na=b\n\xff\n"
    written = (tmp_path / "out").read_bytes()
    assert written.startswith(begin)
    # The second variable has two lines; a shell adds PWD, and some more.
    assert int(written.removeprefix(begin)) >= 3


def test_process_that_a_program_is_started_as(
    spawn: Spawn, files: list[int], tmp_path: Path
) -> None:
    """It leads its own group, and no signal is blocked or ignored.

    The program shows its own state: a shell blocks signals now and then.
    """
    words = [b"cat", b"/proc/self/stat", b"/proc/self/status"]
    ignored = signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        pid = spawn(b"cat", words, os.environb, files)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        signal.signal(signal.SIGUSR2, ignored)
    assert program.wait_for_exit(pid) == 0
    assert (tmp_path / "err").read_text() == ""
    process, *status = (tmp_path / "out").read_text().splitlines()
    masks = dict(line.split(":\t") for line in status if line.startswith("Sig"))
    assert int(process.rpartition(")")[2].split()[2]) == pid
    assert int(masks["SigBlk"], 16) == 0
    assert int(masks["SigIgn"], 16) & 0x7FFFFFFF == 0


def test_program_is_found_by_path(spawn: Spawn) -> None:
    pid = spawn(b"true", [b"true"], {}, (0, 1, 2))
    assert program.wait_for_exit(pid) == 0


@pytest.mark.parametrize(
    ("name", "argument", "number"),
    [
        (b"/nowhere/filter", b"", errno.ENOENT),
        (b"no-such-filter", b"", errno.ENOENT),
        (b"/etc/passwd", b"", errno.EACCES),
        (b"/bin/true", bytes([65]) * program.VARIABLE_LIMIT, errno.E2BIG),
    ],
)
def test_program_that_cannot_be_started(
    name: bytes, argument: bytes, number: int, spawn: Spawn
) -> None:
    with pytest.raises(OSError, match=os.strerror(number)) as caught:
        spawn(name, [name, argument], os.environb, (0, 1, 2))
    assert caught.value.errno == number


def test_descriptor_that_a_program_cannot_have(spawn: Spawn) -> None:
    with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
        spawn(b"true", [b"true"], {}, (0, 1, 1_000_000))


@pytest.fixture
def best_spawn() -> Iterator[Callable[[], Spawn]]:
    """Provide the function of that name, which has not been asked yet."""
    program.best_spawn.cache_clear()
    yield program.best_spawn
    program.best_spawn.cache_clear()


def test_python_without_ctypes(
    best_spawn: Callable[[], Spawn], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ctypes", None)
    assert best_spawn() is program.spawn_locked


def test_python_that_may_not_execute_memory(
    best_spawn: Callable[[], Spawn], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SELinux makes libffi fail in ctypes like this."""

    def refuse(_self: UnlockedSpawn) -> None:
        raise MemoryError

    monkeypatch.setattr(UnlockedSpawn, "__init__", refuse)
    assert best_spawn() is program.spawn_locked


# --- Without what a filter is watched by ---


def descriptors() -> set[str]:
    """List the open descriptors of this process."""
    return set(os.listdir("/proc/self/fd"))


def test_no_thread_to_watch_a_filter(
    process: FilterRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The filter is ended, and nothing of it is left."""

    def no_thread(*_arguments: Any) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.delattr(os, "pidfd_open")
    monkeypatch.setattr(threading.Thread, "start", no_thread)
    before = descriptors()
    failure = "couldn't start filter command: can't start new thread"
    with pytest.raises(FilterFailure, match=failure), process:
        process.start("sleep 60", os.environb, 5)
    assert descriptors() == before
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_no_descriptor_to_watch_a_process(
    process: FilterRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(*_arguments: Any) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "pidfd_open", none_left)
    monkeypatch.setattr(os, "pipe", none_left)
    with pytest.raises(OSError, match="Too many open files"):
        process._watch_exit()


# --- Threads ---


def test_thread_waits_for_its_next_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """It makes that one, if it comes soon, and ends if none comes."""
    monkeypatch.setattr(program, "NEXT_CALL", 0.5)
    made: list[tuple[int, int]] = []
    threads = Threads(lambda call: made.append((call, threading.get_native_id())))
    for call in range(3):
        threads.start(call)
        assert poll(lambda: len(threads._waiting) == 1)
    assert [call for call, _ in made] == [0, 1, 2]
    (thread,) = {thread for _, thread in made}
    if program.IS_LINUX:
        task = Path(f"/proc/self/task/{thread}")
        assert task.exists()
        assert poll(lambda: not task.exists())
    assert poll(lambda: threads._waiting == [])
    threads.start(3)
    assert poll(lambda: [call for call, _ in made] == [0, 1, 2, 3])


def test_call_when_a_thread_has_waited_long_enough(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The thread makes it, though its waiting time was over a moment before."""
    made: list[int] = []
    threads = Threads(made.append)

    class LateQueue(queue.SimpleQueue[Any]):
        def get(self, block: bool = True, timeout: Any = None) -> Any:
            if timeout is not None and made == [1]:
                threads.start(2)
                raise queue.Empty
            return super().get(block, timeout)

    monkeypatch.setattr(queue, "SimpleQueue", LateQueue)
    monkeypatch.setattr(program, "NEXT_CALL", 0.01)
    threads.start(1)
    assert poll(lambda: made == [1, 2])
    assert poll(lambda: threads._waiting == [])


# --- What another process may do meanwhile ---


@pytest.mark.skipif(not program.IS_LINUX, reason="Linux alone has RWF_NOWAIT")
def test_no_log_line_blocks_though_poll_found_room() -> None:
    """Another worker may have filled the pipe between poll and write."""
    reader, writer = os.pipe()
    try:
        for _ in range(16):
            program.write_at_once(writer, bytes(4096))
        with pytest.raises(BlockingIOError):
            program.write_at_once(writer, b"one more")
        os.read(reader, 4096)
        program.write_at_once(writer, b"one more")
        assert os.get_blocking(writer)
    finally:
        os.close(reader)
        os.close(writer)


def test_log_line_to_a_file(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as file:
        program.write_at_once(file.fileno(), b"a line\n")
    assert (tmp_path / "log").read_bytes() == b"a line\n"


def without_flags(*_arguments: object) -> None:
    raise NotImplementedError("pwritev: flags unavailable on this platform")


def without_the_flag(*_arguments: object) -> None:
    raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))


@pytest.mark.parametrize("pwritev", [without_flags, without_the_flag])
def test_log_line_where_no_write_can_say_that_it_would_block(
    pwritev: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with musl, or a terminal."""
    monkeypatch.setattr(os, "pwritev", pwritev)
    monkeypatch.setattr(program, "_NOWAIT", 8)
    reader, writer = os.pipe()
    program.write_at_once(writer, b"a line\n")
    os.close(writer)
    with open(reader, "rb") as pipe:
        assert pipe.read() == b"a line\n"


def test_socket_of_the_daemon_before_it_detached() -> None:
    """At a reload Listen is still not used."""
    script = (
        "import os, proxsmtpd; os.environ.update(LISTEN_PID=str(os.getpid()), "
        "LISTEN_FDS='1'); assert proxsmtpd.is_socket_passed(); child = os.fork(); "
        "child or os._exit(not proxsmtpd.is_socket_passed()); "
        "assert os.waitpid(child, 0)[1] == 0"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


def test_linger_is_bounded() -> None:
    """Octets that come meanwhile do not prolong it."""
    ours, theirs = socket.socketpair()
    with theirs:
        channel = program.ClientChannel(ours, 30, program.Log(0))
        timer = threading.Timer(1.5, theirs.send, [b"more"])
        timer.start()
        begun = time.monotonic()
        channel.linger(2)
        assert 2 <= time.monotonic() - begun < 3.4
        timer.join()
        channel.close()


# --- What else the system may say ---


def test_fault_whose_traceback_cannot_be_had(
    log_lines: LogLines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the system has no descriptor left, or another version of Python."""
    monkeypatch.setitem(sys.modules, "traceback", None)
    with pytest.raises(FileNotFoundError) as fault:
        os.stat("/nowhere")
    program.log_fault(log_lines.log, "session", fault.type, fault.value, fault.tb)
    assert log_lines == [f"session failed: FileNotFoundError: {fault.value}"]


def test_file_that_cannot_be_removed(
    log_lines: LogLines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message's outcome stays the same."""
    config, errors = program.parse_config(
        b"OutAddress: 25\nFilterType: file\nTempDirectory: %s\n" % bytes(tmp_path), ""
    )
    assert errors == []
    shared = program.Shared(config, log_lines.log, {})

    def read_only(*_arguments: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with contextlib.closing(Transaction(shared, log_lines.log, {})) as transaction:
        transaction.receive(iter([b"Hello\r\n"]))
        monkeypatch.setattr(os, "unlink", read_only)
    assert log_lines[-1] == "couldn't remove cache file: Read-only file system"


def test_limit_of_descriptors_that_the_system_does_not_take(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """macOS refuses more than 10240, whatever it says of the hard limit."""
    limits = []

    def set_limit(_what: int, limit: tuple[int, int]) -> None:
        if limit[0] > 10240:
            raise ValueError("current limit exceeds maximum limit")
        limits.append(limit)

    unlimited = resource.RLIM_INFINITY
    monkeypatch.setattr(resource, "getrlimit", lambda _what: (256, unlimited))
    monkeypatch.setattr(resource, "setrlimit", set_limit)
    config, _ = program.parse_config(b"OutAddress: 25\nMaxConnections: 5000\n", "")
    program.raise_descriptor_limit(config)
    assert limits == [(10240, unlimited)]


@pytest.mark.parametrize("host", ["[::1]", "[::]"])
def test_ipv6_where_a_socket_cannot_serve_ipv4(
    host: str, log_lines: LogLines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenBSD refuses the very question."""
    set_option = socket.socket.setsockopt

    def refuse(sock: Any, level: int, option: int, value: Any) -> None:
        if (level, option) == (socket.IPPROTO_IPV6, socket.IPV6_V6ONLY):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        set_option(sock, level, option, value)

    monkeypatch.setattr(socket.socket, "setsockopt", refuse)
    with reserve_port(host.strip("[]")) as holder:
        listen = f"{host}:{port_of(holder)}"
        config, errors = program.parse_config(
            f"OutAddress: 25\nListen: {listen}\n".encode(), ""
        )
        assert errors == []
        limit = program.ConnectionLimit(b"/tmp", is_shared=False)
        with program.Listener(config, log_lines.log, limit).socket:
            assert log_lines == [f"created socket: {listen}"]


def test_pid_file_where_nobody_may_make_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reason is that, and not that there is none yet."""
    open_file = os.open

    def refuse(path: bytes, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_CREAT:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return open_file(path, flags, mode)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(PermissionError):
        program.PidFile(str(tmp_path / "pid")).write()


def test_privileges_that_can_be_had_again(
    log_lines: LogLines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The daemon checks the result of the change of user."""

    def succeed(*_arguments: Any) -> None:
        pass

    for name in ("initgroups", "setgid", "setuid"):
        monkeypatch.setattr(os, name, succeed)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    config, _ = program.parse_config(b"OutAddress: 25\nUser: nobody\n", "")
    with pytest.raises(program.SystemRefused, match="completely drop privileges"):
        program.drop_privileges(config, log_lines.log)
