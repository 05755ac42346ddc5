"""Started by init: scripts in Debian's and in Red Hat's manner, and systemd's ways.

The scripts run on a machine of their own, see initscripts.py, with the program as
`make install` leaves it.
"""

from __future__ import annotations

import configparser
import os
import pwd
import re
import signal
import socket
import struct
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from subprocess import CompletedProcess
from typing import Callable, NamedTuple, TypeVar

import pytest

from detached import Detach, DetachedFactory
from helpers import (
    MARKER,
    MESSAGE,
    PATIENCE,
    QUEUED,
    MakeServer,
    StartDaemon,
    as_root,
    poll,
    requires,
    send,
    settings_text,
)
from initscripts import Machine, machine
from install import INSTALLED, make
from smtp import RawClient, ScriptedServer

SYSTEM_PYTHON = "/usr/bin/python3"  # which other users can run as well
INIT_SCRIPT = "/etc/init.d/proxsmtp"
UNIT = "/lib/systemd/system/proxsmtp@.service"
LSB_FUNCTIONS = "/lib/lsb/init-functions"
SERVER_PORT = 10026  # the machine has all ports for itself
PORTS = {"first": 10025, "second": 10027, "smtp": 25}
PAIR = ("first", "second")

Test = TypeVar("Test", bound=Callable[..., None])


def on_a_machine(*needed: tuple[str, str]) -> Callable[[Test], Test]:
    """Mark a test that runs on a machine, with what it needs besides."""
    always = [
        ("iproute2", "/usr/sbin/ip"),
        ("procps", "/usr/bin/ps"),
        ("python3", SYSTEM_PYTHON),
        ("util-linux", "/usr/bin/unshare"),
    ]

    def mark(test: Test) -> Test:
        for package in (*always, *needed):
            test = requires(*package)(test)
        return test

    return mark


class Site:
    """A machine with our program, its configurations, and a server for the mail."""

    def __init__(
        self, host: Machine, program: Path, place: Path, server: ScriptedServer
    ) -> None:
        self.machine, self.program, self.server = host, program, server
        self.configurations = place / "conf"
        self.configurations.mkdir()

    def configure(
        self, name: str, settings: Mapping[str, object] | None = None
    ) -> Path:
        """Write a configuration that marks its mail with its name; None unsets."""
        values: dict[str, object] = {
            "Listen": f"127.0.0.1:{PORTS[name]}",
            "OutAddress": f"127.0.0.1:{SERVER_PORT}",
            "User": "nobody",
            "FilterCommand": "cat",
            "Header": f"X-Proxy: {name}",
            **(settings or {}),
        }
        path = self.configurations / f"{name}.conf"
        given = {key: value for key, value in values.items() if value is not None}
        path.write_text(settings_text(given))
        return path

    def take_debians_place(self) -> None:
        """Put our program and configurations where Debian's package has its own."""
        self.machine.mount(
            {self.program: "/usr/sbin/proxsmtpd", self.configurations: "/etc/proxsmtp"}
        )

    def init(self, action: str) -> CompletedProcess[str]:
        """Run Debian's init script."""
        return self.machine.run('exec "$1" "$2"', INIT_SCRIPT, action)

    def processes(self) -> set[int]:
        """Return the numbers of all proxsmtpd there are."""
        return self.machine.processes("proxsmtpd")

    def pid(self, name: str) -> int:
        """Return the number in the pid file of Debian's script for a configuration."""
        return int(self.machine.output(f"cat /run/proxsmtp/{name}.pid"))

    def pids(self) -> set[int]:
        """Return the numbers in all these pid files."""
        return {self.pid(path.stem) for path in self.configurations.iterdir()}

    def pid_files(self) -> str:
        """Return the content of all pid files, joined."""
        return self.machine.output("cat /run/proxsmtp/*.pid 2>/dev/null || :")

    def kill(self) -> None:
        """End all proxsmtpd in the way of a crash."""
        self.machine.output('kill -KILL "$@"', *self.processes())
        assert poll(lambda: not self.processes())

    def connect(self, name: str) -> RawClient:
        """Return a client of a configuration; an OSError if nobody listens."""
        with self.machine.network.inside():
            return RawClient(f"127.0.0.1:{PORTS[name]}")

    def serves(self, name: str) -> bool:
        """Return whether a message gets through the proxy of this configuration."""
        before = len(self.server.messages)
        with self.connect(name) as client:
            assert client.message(MESSAGE) == QUEUED
        return f"X-Proxy: {name}".encode() in self.server.messages[before].data

    def is_down(self, name: str) -> bool:
        """Return whether nobody listens where this configuration says."""
        try:
            self.connect(name).close()
        except ConnectionRefusedError:
            return True
        return False


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Provide the program as `make install` leaves it; nobody writes to it."""
    root = tmp_path_factory.mktemp("root")
    make("install", root, python=SYSTEM_PYTHON)
    return root / INSTALLED


@pytest.fixture
def site(installed: Path, tmp_path: Path, make_server: MakeServer) -> Iterator[Site]:
    """Provide a machine on which nothing runs yet."""
    with ExitStack() as at_end:
        try:
            host = at_end.enter_context(machine())
        except OSError as error:
            pytest.skip(f"no machine can be made: {error}")
        with host.network.inside():
            server = make_server(port=SERVER_PORT)
        yield Site(host, installed, tmp_path, server)


# --- Debian's init script ---


@pytest.fixture
def debian(site: Site) -> Site:
    """Provide a machine where Debian's init script finds two configurations."""
    site.take_debians_place()
    for name in PAIR:
        site.configure(name)
    return site


with_debians_script = on_a_machine(
    ("proxsmtp", INIT_SCRIPT), ("sysvinit-utils", LSB_FUNCTIONS)
)


@with_debians_script
def test_debian_start_and_stop(debian: Site) -> None:
    """All configurations are up when it says so, and down again."""
    started = debian.init("start")
    assert (started.returncode, started.stderr) == (0, "")
    assert started.stdout == "Starting smtp proxies: first second.\n"
    assert debian.processes() == debian.pids()
    assert len(debian.pids()) == len(PAIR)
    assert all(debian.serves(name) for name in PAIR)

    stopped = debian.init("stop")
    assert (stopped.returncode, stopped.stderr) == (0, "")
    assert stopped.stdout == "Stopping smtp proxies: first second.\n"
    assert debian.processes() == set()
    assert all(debian.is_down(name) for name in PAIR)
    assert debian.pid_files() == ""

    again = debian.init("stop")
    assert (again.returncode, again.stderr) == (0, "")


@with_debians_script
@pytest.mark.parametrize("action", ["restart", "force-reload"])
def test_debian_restart(action: str, debian: Site) -> None:
    """The new processes have the new configuration; one is enough to be stopped."""
    assert debian.init("start").returncode == 0
    before = debian.pids()
    debian.configure("second", {"Header": "X-Changed: %i"})
    assert debian.init(action).returncode == 0
    assert debian.processes() == debian.pids()
    assert not debian.pids() & before
    assert debian.serves("first")
    assert not debian.serves("second")
    assert b"X-Changed: 127.0.0.1\r\n" in debian.server.messages[-1].data


@with_debians_script
def test_debian_restart_starts_what_does_not_run(debian: Site) -> None:
    assert debian.init("restart").returncode == 0
    assert debian.processes() == debian.pids()
    assert all(debian.serves(name) for name in PAIR)


@with_debians_script
def test_debian_second_start(debian: Site) -> None:
    """The running daemons go on, whatever the script prints, and stop finds them."""
    debian.init("start")
    before = {name: debian.pid(name) for name in PAIR}
    debian.init("start")
    assert {name: debian.pid(name) for name in PAIR} == before
    assert debian.processes() == set(before.values())
    assert all(debian.serves(name) for name in PAIR)
    assert debian.init("stop").returncode == 0
    assert debian.processes() == set()


@with_debians_script
def test_debian_start_that_fails(debian: Site) -> None:
    """The script's exit status and standard error say so, and why."""
    debian.configure("second", {"FilterTimeout": "soon"})
    started = debian.init("start")
    assert started.returncode != 0
    assert "proxsmtpd: /etc/proxsmtp/second.conf:" in started.stderr
    assert "invalid setting: FilterTimeout" in started.stderr
    assert debian.serves("first")
    assert debian.processes() == {debian.pid("first")}


STALE = {
    "the number of the dead process": "",
    "nothing": ": >{}",
    "the number of another process": "echo 1 >{}",
    "no number": "echo proxsmtpd >{}",
    "the number of a process that cannot be": "echo 999999999 >{}",
}


@with_debians_script
@pytest.mark.parametrize("action", ["start", "restart"])
@pytest.mark.parametrize("left", STALE.values(), ids=STALE)
def test_debian_start_after_a_crash(left: str, action: str, debian: Site) -> None:
    """A stale pid file neither hinders the start nor hurts another process."""
    assert debian.init("start").returncode == 0
    before = debian.pids()
    debian.kill()
    assert debian.pids() == before
    for name in PAIR:
        debian.machine.output(left.format(f"/run/proxsmtp/{name}.pid"))
    started = debian.init(action)
    assert (started.returncode, started.stderr) == (0, "")
    assert debian.processes() == debian.pids()
    assert not debian.pids() & before
    assert all(debian.serves(name) for name in PAIR)


@with_debians_script
def test_debian_stop_after_a_crash(debian: Site) -> None:
    """It does not mistake for ours who has the number of the dead process now."""
    debian.init("start")
    debian.kill()
    other = int(debian.machine.output("sleep 1000 >/dev/null 2>&1 & echo $!"))
    for name in PAIR:
        debian.machine.output(f"echo {other} >/run/proxsmtp/{name}.pid")
    assert debian.init("stop").returncode == 0
    assert other in debian.machine.processes("sleep")


@with_debians_script
def test_debian_stop_while_the_client_is_silent(debian: Site) -> None:
    """It ends in order before the script loses its patience, which lasts 5 s."""
    debian.init("start")
    with debian.connect("first") as client:
        client.start()
        client.expect(b"DATA", b"354")
        client.send(b"Subject: te")
        assert debian.init("stop").returncode == 0
        assert debian.processes() == set()
        assert debian.pid_files() == ""
        assert not client.rest().startswith(b"2")
    assert debian.server.messages == []


@with_debians_script
def test_debian_stop_while_a_filter_is_stubborn(debian: Site) -> None:
    """Nothing of the filter is left when the script has done its worst."""
    debian.configure("first", {"FilterCommand": "trap '' TERM; exec sleep 1000"})
    debian.init("start")
    with debian.connect("first") as client:
        client.start()
        client.expect(b"DATA", b"354")
        client.send(MESSAGE + b".\r\n")
        assert poll(lambda: debian.machine.processes("sleep"))
        assert debian.init("stop").returncode == 0
        assert debian.processes() == set()
        assert debian.machine.processes("sleep") == set()
        assert debian.pid_files() == ""
        assert not client.rest().startswith(b"2")
    assert debian.server.messages == []


# --- Scripts in other manners ---


class Manner(NamedTuple):
    """How a script finds the daemon, and how it ends it."""

    find: str
    end: str

    def script(self) -> str:
        """Return an init script: $1 is the program, $2 the configuration."""
        return f"""
            . {LSB_FUNCTIONS}
            set +e
            DAEMON=$1 PIDFILE=/run/other.pid
            find() {{ {self.find}; }}
            start() {{ find >/dev/null || "$DAEMON" -f "$2"; }}
            stop() {{
                {self.end} || return
                while find >/dev/null; do sleep 0.05; done
            }}
            case $3 in
            start)      start "$@" ;;
            stop)       stop ;;
            restart)    stop; start "$@" ;;
            status)     find ;;
            esac
            """


MANNERS = {
    "pidof": Manner("pidof -c -o %PPID -x proxsmtpd", "kill $(find)"),
    "pidof with the path": Manner('pidof -c -o %PPID -x "$DAEMON"', "kill $(find)"),
    "pgrep": Manner("pgrep -x proxsmtpd", "pkill -x proxsmtpd"),
    "ps and killall": Manner("ps -C proxsmtpd -o pid=", "killall -e proxsmtpd"),
    "pidofproc and killproc": Manner('pidofproc "$DAEMON"', 'killproc "$DAEMON"'),
    "with a pid file of the script's choice": Manner(
        'pidofproc -p "$PIDFILE" "$DAEMON"', 'killproc -p "$PIDFILE" "$DAEMON"'
    ),
}


@on_a_machine(("psmisc", "/usr/bin/killall"), ("sysvinit-utils", LSB_FUNCTIONS))
@pytest.mark.parametrize("manner", MANNERS.values(), ids=MANNERS)
def test_other_scripts(manner: Manner, site: Site) -> None:
    """Each way to find the daemon finds it and nobody else, and each ends it."""
    pid_file = "/run/other.pid" if "PIDFILE" in manner.find else "/run/proxsmtpd.pid"
    path = site.configure("first", {"PidFile": pid_file})

    def init(action: str) -> CompletedProcess[str]:
        return site.machine.run(manner.script(), site.program, path, action)

    def running() -> int:
        """Return the number that is in status, in the pid file and in use."""
        status = init("status")
        assert status.returncode == 0
        (pid,) = site.processes()
        assert site.machine.output(f"cat {pid_file}").strip() == str(pid)
        assert str(pid) in status.stdout.split()  # with its workers, or alone
        assert site.serves("first")
        return pid

    assert init("start").returncode == 0
    pid = running()
    assert init("start").returncode == 0
    assert running() == pid
    assert init("restart").returncode == 0
    assert running() != pid
    assert init("stop").returncode == 0
    assert site.processes() == set()
    assert site.is_down("first")
    assert init("status").returncode != 0
    assert init("start").returncode == 0
    site.kill()
    assert init("start").returncode == 0
    running()


# --- systemd, Type=forking: Debian's unit ---


def unit(path: str) -> configparser.SectionProxy:
    """Return the section of a unit that says how to run it."""
    parser = configparser.ConfigParser(interpolation=None, strict=False)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read(path)
    return parser["Service"]


def confined(service: configparser.SectionProxy) -> list[str]:
    """Return the beginning of a command line that runs with the rights of a unit."""
    rights = ["-all"]
    rights += [
        f"+{name.removeprefix('CAP_').lower()}"
        for name in service["AmbientCapabilities"].split()
    ]
    script = "mount -o remount,bind,ro /; mount -t tmpfs none /tmp"
    return [
        *("unshare", "--mount", "sh", "-e", "-c", f'{script}; exec "$@"', "sh"),
        *("setpriv", "--no-new-privs", "--clear-groups"),
        *(f"--reuid={service['User']}", f"--regid={service['Group']}"),
        *(f"--{which}={','.join(rights)}" for which in ("inh-caps", "ambient-caps")),
        f"--bounding-set={','.join(rights)}",
    ]


@on_a_machine(("proxsmtp", UNIT))
def test_debian_unit(site: Site) -> None:
    """Its user has port 25 by a capability, no home, and may write hardly anywhere.

    When the command returns there is one process, which systemd takes for the main
    one, and all is ready.
    """
    service = unit(UNIT)
    assert service["Type"] == "forking"
    user = pwd.getpwnam(service["User"])
    site.take_debians_place()
    site.configure("smtp", {"User": None})
    directory = f"/run/{service['RuntimeDirectory']}"
    site.machine.output('mkdir "$1"; chown "$2:$3" "$1"', directory, *user[2:4])
    command = re.sub("%[iI]", "smtp", service["ExecStart"])

    started = site.machine.run(
        'exec "$@"', *confined(service), *command.split(), HOME="/nonexistent"
    )
    assert (started.returncode, started.stderr) == (0, "")
    pid = site.pid("smtp")
    assert site.processes() == {pid}
    has = site.machine.output("ps -o user:32=,ppid= -p $1", pid).split()
    assert has == [user.pw_name, "1"]
    assert site.serves("smtp")

    site.machine.output("kill $1", pid)
    assert poll(lambda: not site.processes())
    assert site.machine.output('ls "$1"', directory) == ""


# --- systemd, Type=notify ---


class Notice(NamedTuple):
    """A datagram from the socket, and its sender."""

    text: bytes
    pid: int
    uid: int


class Manager:
    """The end of systemd that services notify."""

    def __init__(self, name: str) -> None:
        """Listen at a path, or at `@name` in the abstract namespace."""
        self.name = name
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._sock.settimeout(PATIENCE)
        self._sock.bind(name.replace("@", "\0", 1))
        if name.startswith("/"):
            Path(name).chmod(0o777)  # as systemd's own

    def close(self) -> None:
        """Listen no more."""
        self._sock.close()

    def fill(self) -> None:
        """Have so much come that no more can."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.setblocking(False)
            with suppress(BlockingIOError):
                while True:
                    sender.sendto(b"WATCHDOG=1", self.name)

    @property
    def env(self) -> Mapping[str, str]:
        """Return the variables that the service gets."""
        return {"NOTIFY_SOCKET": self.name}

    def notice(self) -> Notice:
        """Wait for the next notice and return it."""
        form = struct.Struct("3i")
        space = socket.CMSG_SPACE(form.size)
        text, ((_, _, credentials),), _, _ = self._sock.recvmsg(4096, space)
        pid, uid, _ = form.unpack(credentials)
        return Notice(text, pid, uid)

    def has_nothing(self) -> bool:
        """Return whether nothing more has come until now."""
        self._sock.setblocking(False)
        try:
            return not self._sock.recv(4096)
        except BlockingIOError:
            return True
        finally:
            self._sock.settimeout(PATIENCE)


@pytest.fixture
def public() -> Iterator[Path]:
    """Provide a directory that every user can get at (pytest's own are its user's)."""
    with tempfile.TemporaryDirectory(prefix="proxsmtpd-test-") as name:
        path = Path(name)
        path.chmod(0o755)
        yield path


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, public: Path) -> Iterator[Manager]:
    """Provide a manager of each kind."""
    abstract = request.param == "abstract"
    name = f"@proxsmtpd-test-{uuid.uuid4().hex}" if abstract else f"{public}/notify"
    with closing(Manager(name)) as made:
        yield made


@as_root
def test_ready(manager: Manager, proxsmtpd: StartDaemon, tmp_path: Path) -> None:
    """At READY it accepts, has its pid file and is the configured user."""
    pid_file = tmp_path / "pid"
    settings = {"User": "nobody", "PidFile": pid_file}
    daemon = proxsmtpd(settings, wait=False, env=manager.env)
    ready = manager.notice()
    client = daemon.connect()
    number = pid_file.read_text()
    uid = pwd.getpwnam("nobody").pw_uid
    assert ready == (b"READY=1", daemon.process.pid, uid)
    assert number == f"{daemon.process.pid}\n"
    assert client.reply() == b"220 smtp.passthru ESMTP\r\n"
    assert manager.has_nothing()
    client.close()
    assert daemon.stop() == 0
    assert manager.notice() == (b"STOPPING=1", daemon.process.pid, uid)
    assert manager.has_nothing()


def test_stopping_is_notified_first(manager: Manager, proxsmtpd: StartDaemon) -> None:
    """A message under way finishes after that."""
    daemon = proxsmtpd(env=manager.env)
    assert manager.notice().text == b"READY=1"
    client = daemon.connect()
    client.start()
    client.expect(b"DATA", b"354")
    client.send(MESSAGE)
    daemon.process.send_signal(signal.SIGTERM)
    assert manager.notice().text == b"STOPPING=1"
    assert client.command(b".") == QUEUED
    client.close()
    assert daemon.wait() == 0
    assert manager.has_nothing()


FAULTS = {
    "configuration": ({"FilterTimeout": "soon"}, 2),
    "user": ({"User": "no-such-user"}, 1),
    "pid file": ({"PidFile": "/nowhere/at/all/pid"}, 1),
    "address": ({"Listen": "192.0.2.1:25"}, 1),
}


@pytest.mark.parametrize(("settings", "status"), FAULTS.values(), ids=FAULTS)
def test_failed_start_is_not_ready(
    settings: Mapping[str, object],
    status: int,
    manager: Manager,
    proxsmtpd: StartDaemon,
) -> None:
    daemon = proxsmtpd(settings, wait=False, env=manager.env)
    assert daemon.wait() == status
    assert manager.has_nothing()


def test_filters_have_no_manager(
    manager: Manager, proxsmtpd: StartDaemon, tmp_path: Path
) -> None:
    """A filter's own systemd-notify would be taken for ours."""
    saved = tmp_path / "environment"
    command = f"cat /proc/self/environ >{saved}; cat"
    daemon = proxsmtpd({"FilterCommand": command}, env=manager.env)
    assert daemon.connect().message(MESSAGE) == QUEUED
    names = {entry.partition(b"=")[0] for entry in saved.read_bytes().split(b"\0")}
    assert MARKER.encode() in names
    assert b"NOTIFY_SOCKET" not in names


NAMES = {
    "nothing there": "{}/none",
    "a file": "{}/file",
    "a stream": "{}/stream",
    "too long": "{}/" + "x" * 200,
    "abstract": "@{}/none",
    "relative": "no/such",
    "another family": "vsock:2:1",
    "no name": "@",
    "empty": "",
}


@pytest.fixture
def deaf(public: Path) -> Iterator[Path]:
    """Provide a directory of what takes no notice."""
    (public / "file").touch()
    with socket.socket(socket.AF_UNIX) as stream:
        stream.bind(f"{public}/stream")
        stream.listen()
        yield public


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_unreachable_manager(name: str, deaf: Path, proxsmtpd: StartDaemon) -> None:
    """It is nobody's loss: no word of it, and mail goes through."""
    env = {"NOTIFY_SOCKET": name.format(deaf)}
    daemon = proxsmtpd({"FilterCommand": "cat"}, level=3, env=env)
    client = daemon.connect()
    assert client.message(MESSAGE) == QUEUED
    client.quit()
    assert daemon.stop() == 0
    about_mail = r"proxsmtpd: ([0-9A-F]{6}: .*|running as root is NOT recommended)"
    assert all(re.fullmatch(about_mail, line) for line in daemon.log().splitlines())
    assert "notify" not in daemon.log().lower()


def test_busy_manager(public: Path, proxsmtpd: StartDaemon) -> None:
    """One that takes nothing more does not keep us from the mail, nor from ending."""
    with closing(Manager(f"{public}/notify")) as busy:
        busy.fill()
        daemon = proxsmtpd({"FilterCommand": "cat"}, env=busy.env)
        client = daemon.connect()
        assert client.message(MESSAGE) == QUEUED
        client.quit()
        assert daemon.stop() == 0


@pytest.fixture
def detach(public: Path, server: ScriptedServer) -> Iterator[Detach]:
    """Provide a factory of daemons without -d; see `DetachedFactory`."""
    (public / "temp").mkdir()
    factory = DetachedFactory(public, server)
    yield factory
    factory.finish()


def test_daemon_tells_its_parent_only(
    manager: Manager, detach: Detach, public: Path
) -> None:
    """Type=forking: the exit is the notice, and the factory looks at what is ready."""
    saved = public / "environment"
    command = f"cat /proc/self/environ >{saved}; cat"
    daemon = detach({"FilterCommand": command}, env={**os.environ, **manager.env})
    assert send(daemon.address) == QUEUED
    assert b"NOTIFY_SOCKET=" not in saved.read_bytes()
    daemon.end()
    assert manager.has_nothing()


# --- status_of_proc of the LSB functions ---


@on_a_machine(("sysvinit-utils", LSB_FUNCTIONS))
@pytest.mark.parametrize("option", ["", "-p /run/other.pid"], ids=["", "p"])
def test_status_of_proc(option: str, site: Site) -> None:
    """It finds the daemon by its name and by its pid file, and that it is gone."""
    path = site.configure("first", {"PidFile": "/run/other.pid"})

    def status() -> tuple[int, str]:
        script = f'. {LSB_FUNCTIONS}; status_of_proc {option} "$1" proxsmtpd'
        done = site.machine.run(script, site.program)
        said = re.match(r"proxsmtpd is (not )?running", done.stdout)
        assert said, done
        return done.returncode, said[0]

    stopped = 3, "proxsmtpd is not running"
    assert status() == stopped
    site.machine.output('"$1" -f "$2"', site.program, path)
    assert status() == (0, "proxsmtpd is running")
    site.machine.output("kill $(cat /run/other.pid)")
    assert poll(lambda: not site.processes())
    assert status() == stopped
    site.machine.output('"$1" -f "$2"', site.program, path)
    site.kill()
    # 1 stands for "dead, and its pid file exists", in the LSB.
    assert status() == ((1, stopped[1]) if option else stopped)
