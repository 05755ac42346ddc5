"""For all tests: the real process, its configuration, messages, ports and waiting.

The program under test is the environment variable PROXSMTPD (a command line), or
else `proxsmtpd.py` beside this directory.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import functools
import os
import pwd
import py_compile
import re
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Callable, Union

import pytest

from proxsmtpd import CommandBuffer, Refusal
from smtp import RawClient, Recorded, Reply, ScriptedServer

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = str(ROOT / "proxsmtpd.py")
OTHER_SYSTEM = str(Path(__file__).resolve().parent / "other_system.py")
ORIGINAL = "/usr/sbin/proxsmtpd"  # Debian's package of the C program
MARKER = "PROXSMTPD_TEST"
TRACEBACK = "Traceback (most recent call last)"
PATIENCE = 10.0  # seconds for the program
PEER_PATIENCE = 30.0  # seconds for another package's program
MEGABYTE = 1 << 20

# A loopback network of this process's own: no other run of the tests takes its ports.
NETWORK = f"127.{os.getpid() % 250 + 2}"

MESSAGE = b"Subject: test\r\n\r\nHello\r\n"
GREETING = b"220 smtp.passthru ESMTP\r\n"
QUEUED = b"250 2.0.0 Ok: queued\r\n"
LOCAL_ERROR = b"451 Local Error\r\n"

# The variables that a filter gets, as they should never reach it.
STALE_ENVIRONMENT = dict.fromkeys(
    "CLIENT SERVER SENDER RECIPIENTS REMOTE REMOTE_HELO TLS EMAIL TMPDIR".split(),
    "stale",
)

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

Settings = Union[str, Mapping[str, object]]
StartDaemon = Callable[..., "Daemon"]
MakeServer = Callable[..., ScriptedServer]
MakeFilter = Callable[[str], str]
ShareDaemon = Callable[..., tuple["Daemon", ScriptedServer]]


@functools.cache
def compiled_program() -> str:
    """Return the path of the program's byte code, which saves 2,000 compilations."""
    # Other users run it as well.
    place = tempfile.mkdtemp(prefix="proxsmtpd-tests-", dir="/tmp")
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    Path(place).chmod(0o755)
    path = py_compile.compile(PROGRAM, f"{place}/proxsmtpd.pyc", doraise=True)
    return str(path)


def program_under_test() -> list[str]:
    """Return the command line of the program that the tests are about."""
    given = os.environ.get("PROXSMTPD")
    # The interpreter's options are those that `make install` writes.
    return shlex.split(given) if given else [sys.executable, "-IS", compiled_program()]


def one_process(name: str) -> pytest.MarkDecorator:
    """Mark tests that share what takes long to start, or disturb each other.

    With pytest-xdist, one process runs all of that name.
    """
    return pytest.mark.xdist_group(name)


def requires(name: str, path: str) -> pytest.MarkDecorator:
    """Mark a test that needs a program of another package.

    It is skipped where the program is absent, and fails there when the environment
    variable PROXSMTPD_REQUIRE_PEERS is set (as it is in CI).
    """
    return pytest.mark.requires_program(name, path)


def run(*args: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the program until it, or as a daemon its first process, ends."""
    command = [*program_under_test(), *map(str, args)]
    return subprocess.run(
        command,
        check=False,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        **options,
    )


# Marks for tests by which `proxsmtpd` starts the program as on a system without
# Linux's own calls: there only, or there as well.
on_other_systems = pytest.mark.parametrize(
    "proxsmtpd", [[sys.executable, "-IS", OTHER_SYSTEM]], ids=["other"], indirect=True
)
on_other_systems_too = pytest.mark.parametrize(
    "proxsmtpd",
    [[], [sys.executable, "-IS", OTHER_SYSTEM]],
    ids=["here", "other"],
    indirect=True,
)


# A mark for tests that run once more with TLS on both sides.  The program needs it, and
# the servers of `make_server` and what `Daemon.connect` returns use it, by themselves;
# what they record and do comes after STARTTLS.
in_clear_and_in_tls = pytest.mark.parametrize("tls", ["clear", "tls"], indirect=True)


def reserve_port(host: str = "127.0.0.1") -> socket.socket:
    """Return a socket that keeps a port for a daemon that is about to listen there.

    Merely finding a free port would let another connection take it meanwhile.
    """
    holder = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    holder.bind((host, 0))
    # Set only now: nobody else gets the port, but who binds it by number may.
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return holder


def port_of(sock: socket.socket) -> int:
    """Return the port that a socket is bound to."""
    port: int = sock.getsockname()[1]
    return port


def free_port(host: str = "127.0.0.1") -> int:
    """Return a port that nobody listens on now; see `reserve_port`."""
    with reserve_port(host) as holder:
        return port_of(holder)


def poll(condition: Callable[[], object], timeout: float = PATIENCE) -> bool:
    """Return whether a condition comes true in time; for states that send no event."""
    deadline = time.monotonic() + timeout
    pause = 0.005
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
        pause = min(pause * 1.2, 0.05)
    return True


def processes() -> set[str]:
    """Return the numbers of all processes, zombies too."""
    return set(filter(str.isdigit, os.listdir("/proc")))  # Path.glob is slow here


def marked_processes(
    mark: str, others: Collection[str] = (), *variables: str
) -> dict[int, str]:
    """Return the live processes that have the mark, with their names.

    They must have these variables (NAME=VALUE) in the environment as well.  It costs
    10 us to look at one, so `others` are those that cannot have it.
    """
    found = {}
    wanted = {word.encode() for word in (f"{MARKER}={mark}", *variables)}
    for pid in processes().difference(others):
        try:
            with open(f"/proc/{pid}/environ", "rb") as environ:
                if wanted <= set(environ.read().split(b"\0")):
                    found[int(pid)] = Path(f"/proc/{pid}/comm").read_text().strip()
        except OSError:
            continue  # It has ended meanwhile, or is not ours.
    return found


def is_alive(pid: int) -> bool:
    """Return whether a process runs (a zombie does not)."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return words[0] != "Z"


def open_files(pid: int) -> dict[Path, str]:
    """Return a process's descriptors, as paths in /proc, and their files."""
    found = {}
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            found[descriptor] = os.readlink(descriptor)
    return found


def sockets(pid: int) -> set[str]:
    """Return the names of a process's sockets."""
    return {name for name in open_files(pid).values() if name.startswith("socket:")}


def children(pid: int) -> list[int]:
    """Return the processes that a process has started, zombies too."""
    found: list[int] = []
    with contextlib.suppress(FileNotFoundError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/children") as file:
                found += map(int, file.read().split())
    return sorted(found)


def is_listening(address: str) -> bool:
    """Return whether somebody listens there, found out without connecting."""
    if address.startswith("/"):
        flag_and_path = re.compile(rf" 00010000 .* {re.escape(address)}$", re.M)
        return bool(flag_and_path.search(Path("/proc/net/unix").read_text()))
    host, _, port = address.rpartition(":")
    return any(is_taken(*where, int(port)) for where in places(host.strip("[]")))


def places(host: str) -> list[tuple[socket.AddressFamily, str]]:
    """Return the places where a socket that serves an address is, or can be."""
    for family in (socket.AF_INET, socket.AF_INET6):
        with contextlib.suppress(OSError):
            socket.inet_pton(family, host)
            return [(family, host)]
    return [(socket.AF_INET, ""), (socket.AF_INET6, "")]  # a name, or a port alone


def is_taken(family: socket.AddressFamily, host: str, port: int) -> bool:
    """Return whether the port cannot be bound by somebody who wants to reuse it.

    That is so when somebody listens there.  To read it in /proc/net/tcp takes 10 ms.
    """
    with contextlib.suppress(OSError), socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return error.errno == errno.EADDRINUSE
    return False


class Daemon:
    """A running proxsmtpd in the foreground, with its log on standard error."""

    client_type = RawClient

    def __init__(
        self,
        command: Sequence[str],
        config: Path,
        address: str,
        tempdir: Path,
        env: Mapping[str, str],
        **options: Any,
    ) -> None:
        self.config, self.address, self.tempdir = config, address, tempdir
        self.mark = uuid.uuid4().hex
        self._log = ""
        self._unfinished = b""  # a line of the log
        self.is_faulty = False  # it is to show what a fault of ours does
        self._clients: list[RawClient] = []
        self._changed = threading.Condition()
        self._stopped = False
        self._older = processes()  # than any of its own
        self.process: subprocess.Popen[bytes] = subprocess.Popen(
            command,
            env={**env, MARKER: self.mark},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            **options,
        )
        assert self.process.stderr is not None
        self._stderr = self.process.stderr
        os.set_blocking(self._stderr.fileno(), False)
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()

    @property
    def port(self) -> int:
        """Return the port that it listens on."""
        return int(self.address.rpartition(":")[2])

    def log(self) -> str:
        """Return all that it has written to standard error until now.

        What it wrote before it gave a reply is in it once the reply is here.
        """
        with self._changed:
            self._take_log()
            return self._log

    def forget_log(self) -> None:
        """Begin the log anew, for the next of several tests of one daemon."""
        with self._changed:
            assert TRACEBACK not in self.log()
            self._log = ""

    def wait_log(self, pattern: str, timeout: float = PATIENCE) -> re.Match[str]:
        """Wait for the first match (of several lines' mode) in the log."""
        expression = re.compile(pattern, re.M)
        with self._changed:
            self._changed.wait_for(
                lambda: expression.search(self._log) or self._stderr.closed, timeout
            )
            found = expression.search(self._log)
        assert found, f"no {pattern!r} within {timeout} s in this log:\n{self._log}"
        return found

    def wait_listening(self) -> None:
        """Return once it listens and waits for mail; fails when it ends instead."""
        up = poll(lambda: self.process.poll() is not None or self._awaits_mail())
        if self.process.poll() is not None:
            self._reader.join(PATIENCE)
            pytest.fail(f"ended with {self.process.returncode}:\n{self.log()}")
        assert up, f"does not listen on {self.address}:\n{self.log()}"

    def _awaits_mail(self) -> bool:
        """Whether it listens, and sleeps: what it does between the two is done."""
        stat = Path(f"/proc/{self.process.pid}/stat")
        return is_listening(self.address) and ") S " in stat.read_text()

    def connect(self, timeout: float = PATIENCE, source: Any = None) -> RawClient:
        """Return a new client's connection to it, closed at the end of the test."""
        client = self.client_type(self.address, timeout, source)
        self._clients.append(client)
        return client

    def close_clients(self) -> None:
        """End the connections that `connect` has made."""
        while self._clients:
            self._clients.pop().close()

    def resources(self) -> tuple[object, ...]:
        """Return its processes, their sockets, and its temporary files.

        They are the same whenever it is idle.  Threads do not count, since one waits
        for the next session when its own has ended.
        """
        pids = [self.process.pid, *children(self.process.pid)]
        of_each = [(pid, children(pid), sockets(pid)) for pid in pids]
        return of_each, list(self.tempdir.iterdir())

    def has_traceback(self) -> bool:
        """Return whether the log has a traceback that is not a filter's."""
        text = rf"^(?!.*: FILTER < ).*{re.escape(TRACEBACK)}"
        return bool(re.search(text, self.log(), re.M))

    def stop(self, how: int = signal.SIGTERM, timeout: float = PATIENCE) -> int:
        """Send it a signal and return its exit status."""
        self.process.send_signal(how)
        return self.wait(timeout)

    def wait(self, timeout: float = PATIENCE) -> int:
        """Return its exit status once it has ended, with the whole log read."""
        self._stopped = True
        try:
            status = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still runs; its log:\n{self.log()}") from None
        self._reader.join(PATIENCE)
        return status

    def peak_memory(self) -> int:
        """Return the most memory, in octets, that the process has had until now."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.findall(r"^VmHWM:\s*(\d+) kB$", status, re.M)[0]) * 1024

    def finish(self) -> list[str]:
        """End it if it still runs; returns what is wrong with how it has lived."""
        wrong = []
        self.close_clients()
        if self.process.poll() is not None and not self._stopped:
            wrong.append(f"it ended by itself with {self.process.returncode}")
        wrong += self._end()
        if self.has_traceback() != self.is_faulty:
            wrong.append("it printed a traceback" if not self.is_faulty else "no fault")
        wrong += [f"it left {path}" for path in self.tempdir.glob("*")]
        return wrong + self._end_children()

    def _end(self) -> list[str]:
        if self.process.poll() is not None:
            return []
        try:
            self.stop()
            return []
        except AssertionError:
            self.process.kill()
            self.process.wait()
            return ["it did not end at SIGTERM"]

    def _end_children(self) -> list[str]:
        left = marked_processes(self.mark, self._older)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        return [f"it left the process {pid} ({name})" for pid, name in left.items()]

    def _read_log(self) -> None:
        poller = select.poll()
        poller.register(self._stderr, select.POLLIN)
        more = True
        while more:
            poller.poll()
            with self._changed:
                more = self._take_log()
                self._changed.notify_all()

    def _take_log(self) -> bool:
        """Take what there is of the log; False at its end."""
        if self._stderr.closed:
            return False
        try:
            while octets := os.read(self._stderr.fileno(), 1 << 20):
                whole, newline, self._unfinished = (
                    self._unfinished + octets
                ).rpartition(b"\n")
                self._log += (whole + newline).decode("utf-8", "backslashreplace")
        except BlockingIOError:
            return True
        self._stderr.close()
        return False


def settings_text(settings: Settings) -> str:
    """Return settings as the lines of a configuration file."""
    if isinstance(settings, str):
        return settings if settings.endswith("\n") or not settings else settings + "\n"
    return "".join(f"{name}: {value}\n" for name, value in settings.items())


def has_setting(text: str, name: str) -> bool:
    """Return whether a configuration sets this name."""
    return bool(re.search(rf"^\s*{name}\s*:", text, re.M | re.I))


def setting(text: str, name: str) -> str:
    """Return the last value that a configuration gives to this name."""
    return str(re.findall(rf"^\s*{name}\s*:\s*(.*?)\s*$", text, re.M | re.I)[-1])


def write_config(path: Path, text: str, **defaults: object) -> str:
    """Write a configuration file, with the defaults not set in it; returns it."""
    missing = {k: v for k, v in defaults.items() if not has_setting(text, k)}
    text = settings_text(missing) + text
    path.write_bytes(os.fsencode(text))
    return text


class DaemonFactory:
    """Starts daemons and, at the end, says what is wrong with any of them."""

    def __init__(
        self,
        place: Path,
        server: ScriptedServer | None = None,
        program: Sequence[str] = (),
    ) -> None:
        self._place, self._server, self._program = place, server, program
        self.defaults: Mapping[str, object] = {}
        self.client_type = RawClient
        self._daemons: list[Daemon] = []
        self._holders: list[socket.socket] = []

    def __call__(
        self,
        settings: Settings = "",
        *,
        level: int = 4,
        args: Sequence[object] = (),
        env: Mapping[str, str] | None = None,
        server: ScriptedServer | None = None,
        program: Sequence[str] | None = None,
        wait: bool = True,
        **options: Any,
    ) -> Daemon:
        """Return a running daemon; `options` are for its Popen."""
        config = self._place / f"proxsmtpd-{len(self._daemons)}" / "proxsmtpd.conf"
        logs_elsewhere = bool(program)
        program = program or self._program or program_under_test()
        text = settings_text(settings)
        if ORIGINAL not in program and not has_setting(text, "Processes"):
            # One process, whose threads and files a test can look at.
            text += f"Processes: {os.environ.get('PROXSMTPD_PROCESSES', '1')}\n"
        text = self._configure(config, text, server or self._server)
        command = [*program, "-d", level, "-f", config, *args]
        daemon = Daemon(
            [str(word) for word in command],
            config,
            setting(text, "Listen"),
            Path(setting(text, "TempDirectory")),
            {**os.environ, **(env or {})},
            **options,
        )
        daemon.client_type = self.client_type
        self._daemons.append(daemon)
        if wait and level >= 4 and not logs_elsewhere:
            daemon.wait_log("accepting connections$")
        if wait:
            daemon.wait_listening()
        return daemon

    def _configure(self, config: Path, text: str, server: ScriptedServer | None) -> str:
        """Write a configuration file, with what is not set in `text` added."""
        temporary = config.parent / "temp"
        temporary.mkdir(parents=True)
        self._holders.append(reserve_port())
        defaults: dict[str, object] = {
            **self.defaults,
            "Listen": f"127.0.0.1:{port_of(self._holders[-1])}",
            "TempDirectory": temporary,
        }
        if server and not has_setting(text, "TransparentProxy"):
            defaults["OutAddress"] = server.address
        return write_config(config, text, **defaults)

    def finish(self) -> None:
        """End all daemons; an AssertionError if one has lived or ended badly."""
        wrong = [(daemon, daemon.finish()) for daemon in self._daemons]
        for holder in self._holders:
            holder.close()
        for daemon, problems in wrong:
            assert not problems, f"{'; '.join(problems)}; its log:\n{daemon.log()}"


class SharedDaemons:
    """Daemons that serve several tests, one after the other; see `shared_daemon`.

    Tests whose sessions have nothing to do with each other, nor with the start and the
    end of a daemon, need none of their own: its start takes ten times what most take.
    """

    def __init__(self, place: Path) -> None:
        self._holder = reserve_port()  # for the servers of the tests
        self._factory = DaemonFactory(place)
        self._daemons: dict[tuple[str, int], tuple[Daemon, object]] = {}
        self._server: ScriptedServer | None = None

    def __call__(
        self,
        settings: Settings,
        script: Mapping[str, Reply],
        *,
        level: int = 4,
        **options: Any,
    ) -> tuple[Daemon, ScriptedServer]:
        """Return an idle daemon with an empty log, and a new server that it uses.

        `options` are for the server.
        """
        self._server = ScriptedServer(script, port=port_of(self._holder), **options)
        key = settings_text(settings), level
        if key not in self._daemons:
            daemon = self._factory(settings, level=level, server=self._server)
            self._daemons[key] = daemon, daemon.resources()
        daemon, _ = self._daemons[key]
        daemon.forget_log()
        return daemon, self._server

    def end_test(self) -> None:
        """End the sessions of a test; an AssertionError if anything is left of them."""
        if self._server:
            self._server.close()
        for key, (daemon, idle) in list(self._daemons.items()):
            daemon.close_clients()
            if not poll(lambda: daemon.resources() == idle):  # noqa: B023
                del self._daemons[key]  # its faults are not the next test's
                raise AssertionError(f"it is not idle; its log:\n{daemon.log()}")
            assert TRACEBACK not in daemon.log()

    def finish(self) -> None:
        """End all daemons; an AssertionError if one has lived or ended badly."""
        self._factory.finish()
        self._holder.close()


# --- Messages ---


def long_message(size: int) -> bytes:
    """Return a message of about so many octets, no two lines of it the same."""
    lines = (b"%09d" % number + b"." * 60 + b"\r\n" for number in range(size // 71))
    return b"Subject: long\r\n\r\n" + b"".join(lines)


def stuffed(data: bytes) -> bytes:
    """Return mail data with the dots of the transparency procedure (RFC 5321 4.5.2)."""
    return re.sub(rb"^(?=\0?\.)", b".", data, flags=re.M)


def unstuffed(data: bytes) -> bytes:
    """Return mail data without the dots of the transparency procedure."""
    return re.sub(rb"^\.", b"", data, flags=re.M)


def octetwise(octets: bytes) -> list[bytes]:
    """Return the octets one by one."""
    return [octets[i : i + 1] for i in range(len(octets))]


def outcomes(buffer: CommandBuffer, pieces: Sequence[bytes]) -> list[object]:
    """Return the lines as the pieces go in, and the replies that refused some."""
    found: list[object] = []
    for piece in pieces:
        buffer.feed(piece)
        while True:
            try:
                line = buffer.next_line()
            except Refusal as error:
                found.append(error.reply)
                continue
            if line is None:
                break
            found.append(line)
    return found


def send(address: str, data: bytes = MESSAGE) -> bytes:
    """Send a message to a daemon; returns the reply to its end."""
    with RawClient(address) as client:
        reply = client.message(data)
        client.quit()
        return reply


def deliver(daemon: Daemon, data: bytes = MESSAGE, **envelope: object) -> bytes:
    """Send one message on a connection of its own; returns the reply to its end."""
    client = daemon.connect(timeout=30)
    reply = client.message(data, **envelope)  # type: ignore[arg-type]
    client.quit()
    return reply


def verbs(connection: Recorded) -> list[bytes]:
    """Return the verbs of all command lines that the server received."""
    return [line.split(b" ")[0].upper() for line in connection.lines]


def status_of(daemon: Daemon) -> str:
    """Return the message's status from the log."""
    return daemon.wait_log(r"client=.*, status=(.*)$")[1]


def saved_environment(path: Path) -> dict[bytes, bytes]:
    """Return the environment that a filter has saved with `cat /proc/self/environ`."""
    pairs = path.read_bytes().rstrip(b"\0").split(b"\0")
    return {name: value for name, _, value in (pair.partition(b"=") for pair in pairs)}


# --- What the system has ---


def mounted(source: object, target: str) -> list[str]:
    """Return the first words of a command line, to run with `source` on `target`."""
    script = f'mount --bind "$0" {target} && exec "$@"'
    return ["unshare", "-m", "sh", "-c", script, str(source)]


def can_mount() -> bool:
    """Return whether a process may have a mount namespace of its own."""
    try:
        command = [*mounted("/etc/hosts", "/etc/hosts"), "true"]
        return not subprocess.run(command, check=False, capture_output=True).returncode
    except FileNotFoundError:
        return False


with_mounts = pytest.mark.skipif(not can_mount(), reason="cannot mount")


def some_user() -> pwd.struct_passwd:
    """Return an unprivileged user who probably has no processes."""
    for name in ("games", "nobody"):
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    pytest.skip("no unprivileged user")


_LOCKS: list[socket.socket] = []


@functools.cache
def idle_user() -> str:
    """Return a user whom the system's limits hold for, and whom nobody else uses.

    It is one of those that any system has, though not `some_user`, and its name is
    locked until this process ends: a limit on processes counts those of all daemons.
    """
    busy = {some_user().pw_uid}
    for process in processes():
        with contextlib.suppress(FileNotFoundError):  # It has ended meanwhile.
            busy.add(os.stat(f"/proc/{process}").st_uid)
    for entry in pwd.getpwall():
        if 0 < entry.pw_uid < 100 and entry.pw_uid not in busy:
            lock = socket.socket(socket.AF_UNIX)
            with contextlib.suppress(OSError):  # Another run of these tests has it.
                lock.bind(f"\0proxsmtpd-test-{entry.pw_name}")
                _LOCKS.append(lock)
                return entry.pw_name
            lock.close()
    raise AssertionError("each user of the system has processes")


def fake_devices(place: Path, log: socket.socket) -> Path:
    """Return a directory for /dev, in which `log` is the system's log."""
    devices = place / "dev"
    devices.mkdir()
    for name in ("null", "zero", "random", "urandom", "tty"):
        real = os.stat(f"/dev/{name}")
        os.mknod(devices / name, real.st_mode, real.st_rdev)
    (devices / "fd").symlink_to("/proc/self/fd")
    log.bind(str(devices / "log"))
    return devices
