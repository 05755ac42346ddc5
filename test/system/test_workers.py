"""Processes, SIGHUP and socket activation: a supervisor, its workers, the old ones."""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import proxsmtpd as program
from helpers import (
    MESSAGE,
    QUEUED,
    Daemon,
    MakeFilter,
    MakeServer,
    StartDaemon,
    children,
    is_listening,
    marked_processes,
    poll,
    port_of,
    program_under_test,
    requires,
    reserve_port,
)
from smtp import Delay, RawClient, ScriptedServer

PROCESSORS = os.sched_getaffinity(0) if sys.platform == "linux" else {0}
ACTIVATE = "/usr/bin/systemd-socket-activate"
TRANSACTION = b"EHLO c.example\r\nMAIL FROM:<a@b.example>\r\nRCPT TO:<c@d.example>\r\n"


def workers(daemon: Daemon, count: int) -> list[int]:
    """Wait until a daemon has so many workers, and return their pids."""
    pid = daemon.process.pid
    assert poll(lambda: len(children(pid)) == count), children(pid)
    return children(pid)


def status_of(pid: int, name: str) -> str:
    """A field of a process's status (proc(5))."""
    text = Path(f"/proc/{pid}/status").read_text()
    [value] = re.findall(rf"^{name}:\s*(.*)$", text, re.M)
    return str(value)


def rewrite(daemon: Daemon, settings: Mapping[str, object]) -> None:
    """Replace settings in a daemon's configuration, at once."""
    lines = daemon.config.read_text().splitlines()
    kept = [n for n in lines if n.partition(":")[0] not in settings]
    more = [f"{name}: {value}" for name, value in settings.items()]
    beside = daemon.config.with_suffix(".new")
    beside.write_text("\n".join([*kept, *more, ""]))
    beside.rename(daemon.config)


def reload(daemon: Daemon, **settings: object) -> None:
    """Change settings, and wait until the daemon has taken them."""
    done = daemon.log().count("configuration reloaded")
    rewrite(daemon, settings)
    daemon.process.send_signal(signal.SIGHUP)
    assert poll(lambda: daemon.log().count("configuration reloaded") > done)


def serving(daemon: Daemon, client: RawClient) -> int:
    """The process that has the connection of a client."""
    ours = f":{client.sock.getsockname()[1]:04X}"
    table = Path("/proc/net/tcp").read_text().splitlines()[1:]
    inodes = [row.split()[9] for row in table if row.split()[2].endswith(ours)]
    for pid in (daemon.process.pid, *children(daemon.process.pid)):
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                if os.readlink(entry) in [f"socket:[{inode}]" for inode in inodes]:
                    return pid
    raise AssertionError("nobody has the connection")


def client_of(daemon: Daemon, pid: int) -> RawClient:
    """A client whose session is in a certain worker."""
    for _ in range(200):
        client = daemon.connect()
        client.start()
        if serving(daemon, client) == pid:
            return client
        client.close()
    raise AssertionError(f"{pid} accepts nothing")


def sender_of_a_message(daemon: Daemon) -> RawClient:
    """A client that has sent a whole message and waits for the reply."""
    client = daemon.connect()
    client.start()
    client.send(TRANSACTION + b"DATA\r\n")
    for code in (b"250", b"250", b"250", b"354"):
        assert client.reply()[:3] == code
    client.send(MESSAGE + b".\r\n")
    return client


# --- How many processes, and what they are ---

COUNTS = {
    "Processes: 1": 0,
    "Processes: 2": 2,
    "Processes: 3": 3,
    "Processes: auto\nMaxConnections: 15": 0,
    "Processes: auto\nMaxConnections: 16": min(2, len(PROCESSORS)),
}


@pytest.mark.parametrize("settings", COUNTS)
def test_number_of_workers(settings: str, proxsmtpd: StartDaemon) -> None:
    daemon = proxsmtpd(settings)
    expected = COUNTS[settings]
    found = workers(daemon, expected if expected != 1 else 0)
    names = {status_of(pid, "Name") for pid in (daemon.process.pid, *found)}
    assert names == {"proxsmtpd"}
    assert daemon.connect().message(MESSAGE) == QUEUED


@pytest.mark.skipif(len(PROCESSORS) < 2, reason="needs two processors")
def test_each_on_a_processor_of_its_own(
    proxsmtpd: StartDaemon, filter_script: MakeFilter
) -> None:
    """The filters may run on all."""
    script = filter_script("grep ^Cpus_allowed_list: /proc/self/status >&2; exit 1")
    daemon = proxsmtpd({"Processes": 2, "FilterCommand": script})
    places = []
    for pid in workers(daemon, 2):
        client = client_of(daemon, pid)
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        assert len(tasks) >= 2  # one for each session that was not long ago
        [place] = {frozenset(os.sched_getaffinity(int(task.name))) for task in tasks}
        places.append(place)
        allowed = status_of(os.getpid(), "Cpus_allowed_list")
        answer = client.message(MESSAGE)
        assert answer.endswith(f"?{allowed}\r\n".encode()), answer
    assert {len(place) for place in places} == {1}
    assert len(set(places)) == 2


def test_numbers_are_unique(proxsmtpd: StartDaemon) -> None:
    daemon = proxsmtpd({"Processes": 3}, level=3)
    workers(daemon, 3)
    for _ in range(60):
        daemon.connect().start()
    daemon.wait_log(r": 10003b: accepted|: 10003B: accepted")
    numbers = re.findall(r": (\w{6}): accepted", daemon.log())
    assert sorted(int(number, 16) for number in numbers) == list(
        range(0x100000, 0x100000 + 60)
    )


def test_bound_over_all(proxsmtpd: StartDaemon) -> None:
    daemon = proxsmtpd({"Processes": 3, "MaxConnections": 10})
    workers(daemon, 3)
    clients = [daemon.connect() for _ in range(10)]
    for client in clients:
        client.start()
    busy = b"421 Server busy, too many connections\r\n"
    for _ in range(5):
        assert daemon.connect().reply() == busy
    clients[0].close()

    def accepts() -> bool:
        with RawClient(daemon.address) as client:
            return client.reply() != busy

    assert poll(accepts)


# --- Workers that die, stop, or lose their supervisor ---


def test_killed_worker_is_replaced(proxsmtpd: StartDaemon) -> None:
    """Its connections are given back, the others do not notice."""
    daemon = proxsmtpd({"Processes": 2, "MaxConnections": 6})
    killed, other = workers(daemon, 2)
    kept = client_of(daemon, other)
    lost = [client_of(daemon, killed) for _ in range(3)]
    os.kill(killed, signal.SIGKILL)
    for client in lost:
        with pytest.raises((AssertionError, OSError)):
            client.reply()
    daemon.wait_log(rf"worker process died \(pid {killed}\): killed by signal 9$")
    assert killed not in workers(daemon, 2)
    clients = [daemon.connect() for _ in range(5)]
    for client in clients:
        client.start()
    assert daemon.connect().reply()[:3] == b"421"
    kept.expect(b"NOOP", b"250")


KILLS = 12
CLIENTS = 6


def test_kills_under_load(proxsmtpd: StartDaemon, server: ScriptedServer) -> None:
    """Nothing acknowledged is lost, no more is doubled than went unanswered.

    Afterwards all of MaxConnections is free again.
    """
    daemon = proxsmtpd({"Processes": 3, "FilterCommand": "cat", "MaxConnections": 20})
    workers(daemon, 3)
    ended = threading.Event()
    acknowledged: set[bytes] = set()
    unanswered: set[bytes] = set()

    def send_mail(number: int) -> None:
        for count in itertools.count():
            if ended.is_set():
                return
            key = b"%d-%d" % (number, count)
            try:
                with RawClient(daemon.address) as client:
                    assert client.message(key + b"\r\n") == QUEUED
                    acknowledged.add(key)
            except (AssertionError, OSError):
                unanswered.add(key)

    threads = [threading.Thread(target=send_mail, args=[n]) for n in range(CLIENTS)]
    for thread in threads:
        thread.start()
    try:
        for number in range(KILLS):
            enough = len(acknowledged) + 10
            assert poll(functools.partial(has_grown, acknowledged, enough))
            pids = children(daemon.process.pid)
            os.kill(pids[number % len(pids)], signal.SIGKILL)
    finally:
        ended.set()
        for thread in threads:
            thread.join()
    stored = [message.data.rstrip() for message in server.messages]
    assert acknowledged <= set(stored) <= acknowledged | unanswered
    assert len(stored) == len(set(stored))
    assert len(unanswered) <= KILLS * CLIENTS
    workers(daemon, 3)
    clients = [daemon.connect() for _ in range(20)]
    for client in clients:
        client.start()
    assert daemon.connect().reply()[:3] == b"421"


def has_grown(things: set[bytes], size: int) -> bool:
    return len(things) >= size


def test_workers_that_die_at_once_do_not_spin(proxsmtpd: StartDaemon) -> None:
    daemon = proxsmtpd({"Processes": 2})
    ended = threading.Event()

    def kill_all() -> None:
        while not ended.is_set():
            for pid in children(daemon.process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            ended.wait(0.01)

    workers(daemon, 2)
    killer = threading.Thread(target=kill_all)
    killer.start()
    try:
        time.sleep(2)  # The span that is measured.
    finally:
        ended.set()
        killer.join()
    assert 4 <= daemon.log().count("worker process died") <= 12
    workers(daemon, 2)
    assert daemon.connect().message(MESSAGE) == QUEUED


def test_stopped_worker_holds_up_its_own_clients_only(proxsmtpd: StartDaemon) -> None:
    daemon = proxsmtpd({"Processes": 2})
    stopped, other = workers(daemon, 2)
    waiting = client_of(daemon, stopped)
    os.kill(stopped, signal.SIGSTOP)
    for _ in range(20):
        client = daemon.connect()
        assert client.message(MESSAGE) == QUEUED
        assert serving(daemon, client) == other
    os.kill(stopped, signal.SIGCONT)
    waiting.expect(b"NOOP", b"250")


def test_stopped_worker_ends_with_the_daemon(proxsmtpd: StartDaemon) -> None:
    daemon = proxsmtpd({"Processes": 2})
    stopped, _ = workers(daemon, 2)
    os.kill(stopped, signal.SIGSTOP)
    assert daemon.stop() == 0


def test_workers_without_a_supervisor_end_in_good_order(
    make_server: MakeServer, proxsmtpd: StartDaemon
) -> None:
    """A message in its DATA phase is brought to its end."""
    server = make_server({"DOT": Delay(1, QUEUED)})
    daemon = proxsmtpd({"Processes": 2}, server=server)
    pids = workers(daemon, 2)
    idle = daemon.connect()
    idle.start()
    client = sender_of_a_message(daemon)
    server.wait_line(b"DATA")
    daemon.process.kill()
    daemon.wait()
    assert idle.reply() == b"421 Service shutting down\r\n"
    assert client.reply() == QUEUED
    assert poll(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))


@pytest.mark.parametrize("signals", [1, 2])
def test_signal_for_all_processes_at_once(
    signals: int, proxsmtpd: StartDaemon, server: ScriptedServer
) -> None:
    """As systemd sends it: no worker takes it for a second one."""
    daemon = proxsmtpd({"Processes": 2, "FilterCommand": f"sleep {signals}; cat"})
    pids = [daemon.process.pid, *workers(daemon, 2)]
    client = sender_of_a_message(daemon)
    daemon.wait_log(": executed filter command")
    begun = time.monotonic()
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
    if signals == 1:
        assert client.reply() == QUEUED
    else:
        assert poll(lambda: not is_listening(daemon.address))
        os.kill(daemon.process.pid, signal.SIGTERM)
    assert daemon.wait() == 0
    assert len(server.messages) == (1 if signals == 1 else 0)
    if signals == 2:
        assert time.monotonic() - begun < 1.5
    assert poll(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))


def test_statistics_of_all(proxsmtpd: StartDaemon) -> None:
    """Also of those that have ended, as far as they have reported."""
    daemon = proxsmtpd({"Processes": 2, "FilterCommand": "cat"}, level=2)
    first, second = workers(daemon, 2)
    for pid in (first, second):
        client = client_of(daemon, pid)
        assert client.message(MESSAGE) == QUEUED
        client.command(b"QUIT")
    daemon.process.send_signal(signal.SIGUSR1)
    daemon.wait_log(r"statistics: messages: 2, 2 FILTERED; \d+ octets$")
    daemon.wait_log("statistics: filter: last 2 times: ")
    os.kill(first, signal.SIGKILL)
    daemon.wait_log("worker process died")
    assert first not in workers(daemon, 2)
    assert daemon.connect().message(MESSAGE) == QUEUED
    daemon.process.send_signal(signal.SIGUSR1)
    daemon.wait_log(r"statistics: messages: 3, 3 FILTERED; \d+ octets$")
    daemon.wait_log(r"statistics: connections: 1 now, \d+ at most, \d+ accepted")


def test_statistics_despite_a_stopped_worker(proxsmtpd: StartDaemon) -> None:
    daemon = proxsmtpd({"Processes": 2}, level=2)
    stopped, _ = workers(daemon, 2)
    os.kill(stopped, signal.SIGSTOP)
    daemon.process.send_signal(signal.SIGUSR1)
    daemon.wait_log("statistics: threads: ")
    os.kill(stopped, signal.SIGCONT)


def test_unix_socket_goes_with_the_supervisor_only(
    proxsmtpd: StartDaemon, tmp_path: Path
) -> None:
    path = tmp_path / "listen.sock"
    daemon = proxsmtpd({"Processes": 2, "Listen": path})
    os.kill(workers(daemon, 2)[0], signal.SIGTERM)
    daemon.wait_log("worker process died .*: exit status 0$")
    workers(daemon, 2)
    assert path.is_socket()
    assert daemon.connect().message(MESSAGE) == QUEUED
    reload(daemon, FilterCommand="cat")
    assert daemon.connect().message(MESSAGE) == QUEUED
    assert daemon.stop() == 0
    assert not path.exists()


def test_killed_worker_that_finishes_its_sessions_is_reported(
    proxsmtpd: StartDaemon,
) -> None:
    daemon = proxsmtpd({"Processes": 2})
    old, _ = workers(daemon, 2)
    client = client_of(daemon, old)
    reload(daemon, FilterCommand="cat")
    assert poll(lambda: len(children(daemon.process.pid)) == 3)
    os.kill(old, signal.SIGKILL)
    daemon.wait_log(rf"worker process died \(pid {old}\): killed by signal 9$")
    workers(daemon, 2)
    with pytest.raises((AssertionError, OSError)):
        client.reply()


# --- The parts ---


@pytest.fixture
def parts() -> Iterator[Any]:
    """What a supervisor needs of the daemon, with a listener that serves nobody."""
    lines: list[str] = []
    log = program.Log(program.DEBUG, lambda _level, text: lines.append(text))
    with reserve_port() as holder:
        text = f"OutAddress: 25\nListen: 127.0.0.1:{port_of(holder)}\nProcesses: 2\n"
        config, errors = program.parse_config(text.encode(), "")
        assert errors == []
        limit = program.ConnectionLimit(b"/tmp", is_shared=True)
        with program.Listener(config, log, limit) as listener:
            yield SimpleNamespace(
                config=config,
                limit=limit,
                listener=listener,
                lines=lines,
                log=log,
                signals=program.Signals(),
            )


def test_forks_that_fail_leak_nothing(
    parts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> int:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    supervisor = program.Supervisor(parts)
    monkeypatch.setattr(os, "fork", refuse)
    before = os.listdir("/dev/fd")
    for _ in range(5):
        supervisor._fork(0)
    assert os.listdir("/dev/fd") == before
    failed = "couldn't start worker process: Resource temporarily unavailable"
    assert parts.lines.count(failed) == 5
    assert parts.limit.assign_row() == 0  # the row is free, too


def test_signal_while_nothing_can_be_accepted(
    parts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is seen although the listener has waited for a moment."""
    listener, signals = parts.listener, parts.signals
    listener.attach(program.Shared(parts.config, parts.log, {}), signals)

    def refuse(_self: object) -> None:
        raise OSError(errno.ENFILE, os.strerror(errno.ENFILE))

    def end() -> None:
        signals.count = 1
        signals.wake()

    monkeypatch.setattr(program.Listener, "get_request", refuse)
    monkeypatch.setattr(program.Listener, "_refuse_with_spare", lambda _self: False)
    with socket.create_connection(listener.server_address):
        serving_thread = threading.Thread(target=listener.serve, daemon=True)
        serving_thread.start()
        assert poll(lambda: any("couldn't accept" in line for line in parts.lines))
        end()
        serving_thread.join(10)
        assert not serving_thread.is_alive()


def test_retired_worker_without_sessions_does_not_wait(parts: Any) -> None:
    parts.listener.attach(program.Shared(parts.config, parts.log, {}), parts.signals)
    parts.listener.finish_sessions(-1)


# --- SIGHUP ---


@pytest.mark.parametrize("processes", [1, 2])
def test_relative_directory_after_a_reload(
    processes: int, proxsmtpd: StartDaemon, tmp_path: Path
) -> None:
    """It is still relative to where the daemon was started."""
    saved = tmp_path / "saved"
    (tmp_path / "spool").mkdir()
    command = f'echo "$TMPDIR" >{saved}; cat'
    settings = {"Processes": processes, "TempDirectory": "spool"}
    daemon = proxsmtpd({**settings, "FilterCommand": "cat"}, cwd=tmp_path)
    reload(daemon, FilterCommand=command)

    def is_new() -> bool:
        assert daemon.connect().message(MESSAGE) == QUEUED
        return saved.exists()

    assert poll(is_new)
    assert saved.read_text() == f"{tmp_path}/spool\n"


@pytest.mark.parametrize("processes", [1, 2])
def test_reload_is_for_new_connections(
    processes: int, proxsmtpd: StartDaemon, server: ScriptedServer
) -> None:
    """Old ones go on with the settings that they have begun with."""
    daemon = proxsmtpd({"Processes": processes, "FilterCommand": "sed s/Hello/A/"})
    old = daemon.connect()
    old.start()
    reload(daemon, FilterCommand="sed s/Hello/B/")

    def is_new() -> bool:
        with RawClient(daemon.address) as client:
            assert client.message(b"Hello\r\n") == QUEUED
        return bool(server.messages[-1].data == b"B\r\n")

    assert poll(is_new)
    assert old.message(b"Hello\r\n") == QUEUED
    assert server.messages[-1].data == b"A\r\n"
    old.command(b"QUIT")
    if processes > 1:
        workers(daemon, processes)
    for _ in range(10):
        assert is_new()


@pytest.mark.parametrize("processes", [1, 2])
def test_reload_with_errors_changes_nothing(
    processes: int, proxsmtpd: StartDaemon
) -> None:
    daemon = proxsmtpd({"Processes": processes})
    before = workers(daemon, processes if processes > 1 else 0)
    with daemon.config.open("a") as file:
        file.write("Bogus: 1\nTimeOut: soon\n")
    daemon.process.send_signal(signal.SIGHUP)
    daemon.wait_log("configuration has errors, and stays as it was$")
    for word in ("invalid config line: Bogus", "invalid setting: TimeOut"):
        assert word in daemon.log()
    assert daemon.connect().message(MESSAGE) == QUEUED
    assert children(daemon.process.pid) == before
    daemon.config.unlink()
    daemon.process.send_signal(signal.SIGHUP)
    daemon.wait_log("configuration file not found: ")
    assert daemon.connect().message(MESSAGE) == QUEUED


@pytest.mark.parametrize("processes", [1, 2])
def test_reload_of_what_needs_a_restart(processes: int, proxsmtpd: StartDaemon) -> None:
    daemon = proxsmtpd({"Processes": processes, "FilterCommand": "cat"})
    with reserve_port() as holder:
        fixed = {
            "Listen": f"127.0.0.1:{port_of(holder)}",
            "PidFile": "/nowhere/pid",
            "User": "nobody",
        }
        reload(daemon, **fixed, FilterCommand="exit 1")
    for name in fixed:
        daemon.wait_log(f"{name} stays as it was: it needs a restart to change$")
    assert poll(lambda: daemon.connect().message(MESSAGE)[:3] == b"550")


def test_reload_cannot_make_workers_of_one_process(proxsmtpd: StartDaemon) -> None:
    daemon = proxsmtpd({"Processes": 1})
    reload(daemon, Processes=2)
    daemon.wait_log("Processes stays as it was: it needs a restart to change$")
    assert children(daemon.process.pid) == []
    assert daemon.connect().message(MESSAGE) == QUEUED


def test_reload_changes_the_number_of_workers(proxsmtpd: StartDaemon) -> None:
    daemon = proxsmtpd({"Processes": 2})
    old = workers(daemon, 2)
    reload(daemon, Processes=3)
    assert poll(lambda: not {*old} & {*children(daemon.process.pid)})
    workers(daemon, 3)
    reload(daemon, Processes=1)
    workers(daemon, 1)
    assert daemon.connect().message(MESSAGE) == QUEUED


@pytest.mark.parametrize("processes", [1, 2])
def test_reload_of_the_bound(processes: int, proxsmtpd: StartDaemon) -> None:
    """It counts the old connections, too."""
    daemon = proxsmtpd({"Processes": processes, "MaxConnections": 2})
    clients = [daemon.connect() for _ in range(2)]
    for client in clients:
        client.start()
    reload(daemon, MaxConnections=3)
    assert poll(lambda: daemon.connect().reply()[:3] == b"220")


def has_come(server: ScriptedServer, data: bytes) -> bool:
    return any(message.data == data for message in server.messages)


def test_ten_reloads_under_load(proxsmtpd: StartDaemon, server: ScriptedServer) -> None:
    """No client sees anything but success, and no message passes unfiltered."""
    daemon = proxsmtpd({"Processes": 2, "FilterCommand": "sed s/Hello/0/"}, level=2)
    ended = threading.Event()
    answers: list[bytes] = []

    def send_mail() -> None:
        while not ended.is_set():
            with RawClient(daemon.address) as client:
                answers.append(client.message(b"Hello\r\n"))

    threads = [threading.Thread(target=send_mail) for _ in range(5)]
    for thread in threads:
        thread.start()
    try:
        for number in range(1, 11):
            reload(daemon, FilterCommand=f"sed s/Hello/{number}/")
            assert poll(functools.partial(has_come, server, b"%d\r\n" % number))
    finally:
        ended.set()
        for thread in threads:
            thread.join()
    assert set(answers) == {QUEUED}
    assert len(server.messages) == len(answers)
    assert {message.data for message in server.messages} == {
        b"%d\r\n" % number for number in range(11)
    }
    workers(daemon, 2)


@pytest.mark.parametrize("processes", [1, 2])
def test_systemd_is_told_of_a_reload(
    processes: int, proxsmtpd: StartDaemon, tmp_path: Path
) -> None:
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(str(path))
        notify.settimeout(10)
        daemon = proxsmtpd({"Processes": processes}, env={"NOTIFY_SOCKET": str(path)})
        assert notify.recv(100) == b"READY=1"
        daemon.process.send_signal(signal.SIGHUP)
        assert re.fullmatch(rb"RELOADING=1\nMONOTONIC_USEC=\d+", notify.recv(100))
        assert notify.recv(100) == b"READY=1"
        assert daemon.stop() == 0
        assert notify.recv(100) == b"STOPPING=1"


@pytest.mark.parametrize("is_right", [True, False])
def test_hangup_for_all_processes_at_once(
    is_right: bool, proxsmtpd: StartDaemon
) -> None:
    """As pkill sends it: only the supervisor reads the configuration."""
    daemon = proxsmtpd({"Processes": 2})
    pids = workers(daemon, 2)
    clients = [client_of(daemon, pid) for pid in pids]
    if not is_right:
        rewrite(daemon, {"Bogus": "1"})
    for pid in (*pids, daemon.process.pid):
        os.kill(pid, signal.SIGHUP)
    daemon.wait_log("configuration (reloaded|has errors, and stays as it was)$")
    workers(daemon, 4 if is_right else 2)
    assert daemon.connect().message(MESSAGE) == QUEUED
    for client in clients:
        client.expect(b"NOOP", b"250")
    assert "died" not in daemon.log()


BAD_TOGETHER = {
    "no OutAddress": ("TransparentProxy: client\n", r"no OutAddress specified\.$"),
    "a loop": (
        "Listen: 127.0.0.1:1\nOutAddress: {listen}\n",
        "OutAddress leads to this proxy's own Listen address$",
    ),
}


@pytest.mark.parametrize(("text", "error"), BAD_TOGETHER.values(), ids=BAD_TOGETHER)
@pytest.mark.parametrize("processes", [1, 2])
def test_reload_that_fits_only_what_needs_a_restart(
    processes: int, text: str, error: str, proxsmtpd: StartDaemon
) -> None:
    """The new settings are checked beside those that stay."""
    daemon = proxsmtpd({"Processes": processes})
    daemon.config.write_text(
        text.format(listen=daemon.address) + f"Processes: {processes}\n"
    )
    daemon.process.send_signal(signal.SIGHUP)
    daemon.wait_log(error)
    daemon.wait_log("configuration has errors, and stays as it was$")
    assert daemon.connect().message(MESSAGE) == QUEUED


@pytest.mark.parametrize("processes", [1, 2])
def test_reload_without_a_file_lets_nothing_pass_the_filter(
    processes: int, proxsmtpd: StartDaemon
) -> None:
    """An editor may remove it for a moment; all that has a default would be right."""
    settings = {"TransparentProxy": "client", "FilterCommand": "exit 1"}
    daemon = proxsmtpd({"Processes": processes, **settings})
    daemon.config.unlink()
    daemon.process.send_signal(signal.SIGHUP)
    daemon.wait_log("configuration file not found: ")
    daemon.wait_log("configuration has errors, and stays as it was$")
    assert "configuration reloaded" not in daemon.log()


def test_reload_while_nothing_can_be_forked(
    parts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old workers go on accepting."""

    def refuse() -> int:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    def read_again() -> bool:
        parts.config, _ = program.parse_config(b"OutAddress: 26\n", "")
        return True

    former = parts.config
    parts.reload = read_again
    parts.notify_ready = lambda: None
    supervisor = program.Supervisor(parts)
    with subprocess.Popen(["sleep", "60"]) as process:
        reports, reports_end = os.pipe()
        worker = program.Worker(process.pid, 0, 0, reports)
        supervisor._workers[reports] = worker
        monkeypatch.setattr(os, "fork", refuse)
        supervisor._reload()
        assert not worker.is_retired
        assert process.poll() is None
        process.kill()
    os.close(reports_end)
    worker.close()
    assert parts.lines[-1] == "couldn't reload: the old worker processes go on"
    assert parts.config is former  # for those that replace dead ones


def test_ready_when_the_new_workers_are_there(
    proxsmtpd: StartDaemon, tmp_path: Path
) -> None:
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(str(path))
        notify.settimeout(10)
        daemon = proxsmtpd({"Processes": 2}, env={"NOTIFY_SOCKET": str(path)})
        old = workers(daemon, 2)
        assert notify.recv(100) == b"READY=1"
        daemon.process.send_signal(signal.SIGHUP)
        assert notify.recv(100).startswith(b"RELOADING=1\n")
        assert notify.recv(100) == b"READY=1"
        assert len({*children(daemon.process.pid)} - {*old}) == 2


# --- Socket activation ---


@contextlib.contextmanager
def activated(
    factory: StartDaemon, listening: socket.socket, **options: object
) -> Iterator[Daemon]:
    """A daemon that gets a listening socket as systemd would pass it."""
    first = 3
    shell = (
        "import os, sys; os.dup2(int(sys.argv[1]), 3); os.set_inheritable(3, True);"
        "os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='1');"
        "os.execv(sys.argv[2], sys.argv[2:])"
    )
    assert listening.fileno() > first
    command = [sys.executable, "-c", shell, str(listening.fileno())]
    daemon = factory(
        {"Listen": "127.0.0.1:1", **options},
        program=[*command, *program_under_test()],
        pass_fds=[listening.fileno()],
        wait=False,
    )
    if listening.family == socket.AF_INET:
        daemon.address = f"127.0.0.1:{port_of(listening)}"
    yield daemon


@pytest.mark.parametrize("processes", [1, 2])
def test_passed_socket(
    processes: int, proxsmtpd: StartDaemon, server: ScriptedServer
) -> None:
    """It takes the place of Listen, and the filters do not hear of it."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        names = "env | grep ^LISTEN_; cat"
        with activated(
            proxsmtpd, listening, Processes=processes, FilterCommand=names
        ) as daemon:
            assert daemon.connect().message(MESSAGE) == QUEUED
            assert server.messages[-1].data == MESSAGE
            assert daemon.stop() == 0
        # The next one takes what has waited meanwhile.
        waiting = RawClient(f"127.0.0.1:{port_of(listening)}")
        with waiting, activated(proxsmtpd, listening, Processes=processes) as daemon:
            assert waiting.message(MESSAGE) == QUEUED
            assert daemon.stop() == 0


def test_passed_socket_is_a_loop(proxsmtpd: StartDaemon) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        own = f"127.0.0.1:{port_of(listening)}"
        with activated(proxsmtpd, listening, OutAddress=own) as daemon:
            assert daemon.connect().reply() == b"421 Server not available\r\n"
            daemon.wait_log("loop detected: OutAddress leads to")


def test_passed_unix_socket_is_a_loop(proxsmtpd: StartDaemon, tmp_path: Path) -> None:
    path = str(tmp_path / "passed")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()
        with activated(proxsmtpd, listening, OutAddress=path) as daemon:
            daemon.address = path
            assert daemon.connect().reply() == b"421 Server not available\r\n"
            daemon.wait_log("loop detected: OutAddress leads to")


def test_worker_killed_while_a_program_does_not_begin(
    proxsmtpd: StartDaemon, tmp_path: Path
) -> None:
    """Its end is seen although the one that was to become the filter lives."""
    script = tmp_path / "fifo"
    os.mkfifo(script, 0o755)
    daemon = proxsmtpd({"Processes": 2, "FilterCommand": f"exec 3<{script}; cat"})
    killed, other = workers(daemon, 2)
    client = client_of(daemon, killed)
    client.send(TRANSACTION + b"DATA\r\n")
    for code in (b"250", b"250", b"250", b"354"):
        assert client.reply()[:3] == code
    client.send(MESSAGE + b".\r\n")
    daemon.wait_log(": executed filter command")
    os.kill(killed, signal.SIGKILL)
    daemon.wait_log(rf"worker process died \(pid {killed}\): killed by signal 9$")
    found = workers(daemon, 2)
    assert other in found
    with script.open("wb"):
        pass
    live = {daemon.process.pid, *found}
    assert poll(lambda: marked_processes(daemon.mark).keys() == live)


def test_passed_socket_that_does_not_listen(proxsmtpd: StartDaemon) -> None:
    with socket.socket() as idle:
        idle.bind(("127.0.0.1", 0))
        with activated(proxsmtpd, idle) as daemon:
            assert daemon.wait() == 1
            daemon.wait_log("couldn't use passed socket: it is no listening stream$")


@pytest.mark.parametrize("processes", [1, 2])
def test_restarts_refuse_nobody(
    processes: int, proxsmtpd: StartDaemon, server: ScriptedServer
) -> None:
    """Under load, while somebody keeps the listening socket (systemd does)."""
    answers: list[bytes] = []
    ended = threading.Event()
    with socket.create_server(("127.0.0.1", 0), backlog=100) as listening:
        address = f"127.0.0.1:{port_of(listening)}"

        def send_mail() -> None:
            while not ended.is_set():
                with RawClient(address) as client:
                    client.send(TRANSACTION + b"DATA\r\n")
                    replies = [client.reply()]
                    while replies[-1][:3] in (b"220", b"250") and len(replies) < 5:
                        replies.append(client.reply())
                    if replies[-1][:3] == b"354":
                        client.send(MESSAGE + b".\r\n")
                        replies.append(client.reply())
                    answers.append(replies[-1])

        def have_come(number: int) -> bool:
            return len(answers) >= number

        threads = [threading.Thread(target=send_mail) for _ in range(3)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(4):
                with activated(proxsmtpd, listening, Processes=processes) as daemon:
                    assert poll(functools.partial(have_come, len(answers) + 5))
                    assert daemon.stop() == 0
            with activated(proxsmtpd, listening, Processes=processes):
                assert poll(functools.partial(have_come, len(answers) + 5))
                ended.set()
                for thread in threads:
                    thread.join()
        finally:
            ended.set()
    assert set(answers) <= {QUEUED, b"421 Service shutting down\r\n"}
    assert len(server.messages) == answers.count(QUEUED)


@requires("systemd", ACTIVATE)
def test_socket_of_systemd(server: ScriptedServer, tmp_path: Path) -> None:
    """The real systemd-socket-activate starts it at the first connection."""
    config = tmp_path / "activated.conf"
    config.write_text(f"OutAddress: {server.address}\nProcesses: 2\n")
    with reserve_port() as holder:
        address = f"127.0.0.1:{port_of(holder)}"
        command = [*program_under_test(), "-d1", "-f", str(config)]
        process = subprocess.Popen(
            [ACTIVATE, "-l", address, *command], stderr=subprocess.DEVNULL
        )
        try:
            assert poll(lambda: connects(address))
            with RawClient(address) as client:
                assert client.message(MESSAGE) == QUEUED
        finally:
            process.terminate()
            assert process.wait(10) == 0


def connects(address: str) -> bool:
    with contextlib.suppress(OSError), RawClient(address):
        return True
    return False


# --- Memory ---


def proportional(pid: int) -> int:
    """The proportional set size of a process, in KiB."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return int(re.findall(r"^Pss:\s*(\d+) kB$", text, re.M)[0])


def test_memory_of_idle_processes(proxsmtpd: StartDaemon) -> None:
    daemon = proxsmtpd({"Processes": 2}, level=1)
    pids = [daemon.process.pid, *workers(daemon, 2)]
    for pid in pids[1:]:
        client_of(daemon, pid)
    assert sum(map(proportional, pids)) <= 34 * 1024
