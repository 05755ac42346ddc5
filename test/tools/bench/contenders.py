"""The programs that are compared: how each is started, looked at and ended."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, NamedTuple, Optional

from interrupts import INTERRUPTS

HOST = "127.0.0.1"
HERE = Path(__file__).resolve().parent
PROGRAM = HERE.parents[2] / "proxsmtpd.py"
C_PROGRAM = "/usr/sbin/proxsmtpd"
PATIENCE = 10.0  # seconds for a program to listen
GRACE = 2.0  # seconds for a program to end before it is killed
REST = 0.3  # seconds for a program to forget who looked whether it listens
TICKS = os.sysconf("SC_CLK_TCK")


class BenchError(Exception):
    """The benchmark cannot go on; the message is for the user."""


class Cpu(NamedTuple):
    """Processor seconds, of a process and of its children that have ended."""

    own: float = 0.0
    children: float = 0.0

    def __sub__(self, other: Cpu) -> Cpu:
        return Cpu(self.own - other.own, self.children - other.children)


def find(program: str) -> str | None:
    """The path of a program, which ordinary users may not have in their PATH."""
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def needed(program: str) -> str:
    """The path of a program that nothing can be measured without."""
    path = find(program)
    if path is None:
        raise BenchError(f"{program} is needed; it is in the Debian package postfix")
    return path


def our_command() -> list[str]:
    """The command line of our program, or what the variable PROXSMTPD says."""
    given = os.environ.get("PROXSMTPD")
    # The interpreter's options are those that `make install` writes.
    return shlex.split(given) if given else [sys.executable, "-IS", str(PROGRAM)]


def reserve_port() -> socket.socket:
    """A socket that keeps a port for a program that is about to listen there.

    A port that nobody holds could go to an outgoing connection meanwhile, even to
    the one that looks whether the program listens.
    """
    holder = socket.socket()
    holder.bind((HOST, 0))
    # Set only now: nobody else gets the port, but who binds it by number may.
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return holder


def is_listening(port: int) -> bool:
    """Whether somebody accepts connections there."""
    with socket.socket() as probe:
        probe.settimeout(PATIENCE)
        return probe.connect_ex((HOST, port)) == 0


def end(process: subprocess.Popen[bytes], grace: float = GRACE) -> None:
    """End a process, by force if it takes too long, and what is left of its group."""
    with INTERRUPTS.held():
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def smtp_sink(port: int) -> list[str]:
    """The command line of the usual server behind the contenders."""
    # It refuses to stay root.
    user = ["-u", "nobody"] if os.geteuid() == 0 else []
    options = ["-4", "-m", "10000", "-t", "1000", *user]
    return [needed("smtp-sink"), *options, f"{HOST}:{port}", "1024"]


def bulk_sink(port: int) -> list[str]:
    """The command line of the server for large messages."""
    return [sys.executable, "-IS", str(HERE / "bulk.py"), "sink", HOST, str(port)]


def tls_sink(port: int, certificate: str, key: str) -> list[str]:
    """The command line of that server with STARTTLS."""
    return [*bulk_sink(port), certificate, key]


class Daemon:
    """A running program that listens on `port`."""

    def __init__(
        self, command: Sequence[str], port: int, environment: Mapping[str, str]
    ) -> None:
        self.port = port
        self.start_time = 0.0  # seconds from exec to listening
        self._began = time.monotonic()
        self.process = subprocess.Popen(
            command,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # the terminal's ^C is for the benchmark alone
        )
        self._cpu = Cpu()
        self._threads_at_rest = 1

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self.process.poll() is None

    def wait_listening(self) -> None:
        """Return when it accepts connections; `BenchError` if that does not come."""
        deadline = self._began + PATIENCE
        while not is_listening(self.port):
            if not self.alive or time.monotonic() > deadline:
                raise BenchError(f"{self.process.args!r} does not listen")
            time.sleep(0.0002)
        self.start_time = time.monotonic() - self._began

    def come_to_rest(self) -> None:
        """Note how many threads it has without a client."""
        deadline = time.monotonic() + REST
        self._threads_at_rest = self.threads()
        while time.monotonic() < deadline:
            time.sleep(0.01)
            if len(self.processes()) > 1:  # its workers may only be starting
                self._threads_at_rest = self.threads()
            else:
                self._threads_at_rest = min(self._threads_at_rest, self.threads())

    def settle(self) -> None:
        """Wait until clients that were killed are forgotten, or not much longer."""
        deadline = time.monotonic() + GRACE
        while self.threads() > self._threads_at_rest and time.monotonic() < deadline:
            time.sleep(0.005)

    def processes(self) -> list[int]:
        """Return its process and those that have its name: its workers."""
        pid = self.process.pid
        found = [pid]
        with contextlib.suppress(OSError):
            name = Path(f"/proc/{pid}/comm").read_text()
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            same = [n for n in children if Path(f"/proc/{n}/comm").read_text() == name]
            found += map(int, same)
        return found

    def threads(self) -> int:
        """Return the number of its threads; 0 when it has ended."""
        try:
            return sum(len(os.listdir(f"/proc/{pid}/task")) for pid in self.processes())
        except OSError:
            return 0

    def memory(self) -> float:
        """Return its proportional set size in KiB."""
        total = 0.0
        for pid in self.processes():
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
            total += float(re.findall(r"^Pss:\s*(\d+) kB$", rollup, re.M)[0])
        return total

    def cpu(self) -> Cpu:
        """Return the processor time that it has taken until now, or until its end."""
        with contextlib.suppress(OSError):
            own, children = 0.0, 0
            for pid in self.processes():
                # What clock_getcpuclockid(3) makes of a process id on Linux: stat has
                # the same time, but only in hundredths of a second.
                own += time.clock_gettime(~pid << 3 | 2)
                stat = Path(f"/proc/{pid}/stat").read_text()
                children += sum(map(int, stat.rpartition(")")[2].split()[13:15]))
            self._cpu = Cpu(own, children / TICKS)
        return self._cpu


class Site:
    """Where it all takes place: a directory, a server, and what is started here."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.sink_port = 0
        self.shim = directory / "shim.so"

    @contextlib.contextmanager
    def running(
        self,
        command: Callable[[int], Sequence[str]],
        environment: Optional[Mapping[str, str]] = None,
    ) -> Iterator[Daemon]:
        """Start the command that a port makes; it listens then, and ends with this."""
        with reserve_port() as holder, contextlib.ExitStack() as stack:
            port: int = holder.getsockname()[1]
            with INTERRUPTS.held():
                daemon = Daemon(command(port), port, environment or {})
                stack.callback(end, daemon.process)
            daemon.wait_listening()
            daemon.come_to_rest()
            yield daemon

    @contextlib.contextmanager
    def sink(self, command: Callable[[int], Sequence[str]]) -> Iterator[Site]:
        """Run the server behind all contenders, on `sink_port`."""
        with self.running(command) as daemon:
            self.sink_port = daemon.port
            yield self

    def build_shim(self) -> bool:
        """Compile shim.c; whether that went well."""
        compiler = find("cc")
        if compiler is None:
            return False
        options = ["-shared", "-fPIC", "-O2", "-o", str(self.shim)]
        command = [compiler, *options, str(HERE / "shim.c"), "-ldl"]
        return subprocess.run(command, check=False).returncode == 0


Start = Callable[
    [Site, Mapping[str, str], int], contextlib.AbstractContextManager[Daemon]
]


@dataclass(frozen=True)
class Contender:
    """A program that is measured; `start` takes FilterCommand and such settings and
    the most connections, and is None for the floor, which is no program of its own."""

    key: str
    title: str
    available: Callable[[Site], bool]
    start: Optional[Start] = None
    filters: bool = True


def write_config(
    site: Site, port: int, settings: Mapping[str, str], connections: int
) -> str:
    """Write a configuration of proxsmtpd; returns its path."""
    lines = {
        "Listen": f"{HOST}:{port}",
        "OutAddress": f"{HOST}:{site.sink_port}",
        "TempDirectory": str(site.directory),
        "MaxConnections": str(connections),
        **settings,
    }
    path = site.directory / f"proxsmtpd-{port}.conf"
    path.write_text("".join(f"{name}: {value}\n" for name, value in lines.items()))
    return str(path)


def proxsmtpd(program: Callable[[], list[str]], preload: bool = False) -> Start:
    """How a proxsmtpd is started, with errors in its log only."""

    def start(
        site: Site, settings: Mapping[str, str], connections: int
    ) -> contextlib.AbstractContextManager[Daemon]:
        def command(port: int) -> list[str]:
            config = write_config(site, port, settings, connections)
            return [*program(), "-d", "0", "-f", config]

        return site.running(command, {"LD_PRELOAD": str(site.shim)} if preload else {})

    return start


HAPROXY_CONFIG = """\
global
    maxconn {connections}
defaults
    mode tcp
    timeout connect 10s
    timeout client 180s
    timeout server 180s
listen smtp
    bind {host}:{port}
    server sink {host}:{sink}
"""


def start_haproxy(
    site: Site, _settings: Mapping[str, str], connections: int
) -> contextlib.AbstractContextManager[Daemon]:
    """Start HAProxy as a relay of octets that does not know SMTP."""

    def command(port: int) -> list[str]:
        path = site.directory / f"haproxy-{port}.cfg"
        path.write_text(
            HAPROXY_CONFIG.format(
                connections=connections, host=HOST, port=port, sink=site.sink_port
            )
        )
        return [find("haproxy") or "haproxy", "-db", "-q", "-f", str(path)]

    return site.running(command)


def has_c_program(_site: Site) -> bool:
    """Whether the original is installed."""
    return os.access(C_PROGRAM, os.X_OK)


CONTENDERS = (
    Contender("ours", "ours", lambda _site: True, proxsmtpd(our_command)),
    Contender("c", "C", has_c_program, proxsmtpd(lambda: [C_PROGRAM])),
    Contender(
        "cured",
        "cured C",
        lambda site: has_c_program(site) and site.build_shim(),
        proxsmtpd(lambda: [C_PROGRAM], preload=True),
    ),
    Contender(
        "haproxy",
        "HAProxy",
        lambda _site: find("haproxy") is not None,
        start_haproxy,
        filters=False,
    ),
    Contender("floor", "floor", lambda _site: True),
)


def raise_descriptor_limit() -> None:
    """Allow this process and its children as many descriptors as the system does."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
