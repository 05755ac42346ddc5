"""The command line, the configuration file and the daemon's life, seen from outside."""

from __future__ import annotations

import contextlib
import grp
import os
import random
import re
import resource
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Callable

import pytest

import proxsmtpd as module
from detached import Detach
from helpers import (
    GREETING,
    MARKER,
    MESSAGE,
    PATIENCE,
    QUEUED,
    TRACEBACK,
    Daemon,
    MakeServer,
    StartDaemon,
    as_root,
    fake_devices,
    idle_user,
    is_listening,
    marked_processes,
    mounted,
    on_other_systems_too,
    poll,
    port_of,
    program_under_test,
    reserve_port,
    run,
    send,
    some_user,
    with_mounts,
)
from proxsmtpd import connect
from smtp import RawClient, ScriptedServer

BUSY = b"421 Server busy, too many connections\r\n"
USAGE = """\
usage: proxsmtpd [-d debuglevel] [-f configfile] [-p pidfile]
       proxsmtpd -t [-d debuglevel] [-f configfile] [message ...]
       proxsmtpd -v
"""


@pytest.fixture
def config(tmp_path: Path) -> Callable[[str], Path]:
    """Provide a factory of configuration files: text in, path out."""

    def make(text: str) -> Path:
        path = tmp_path / "proxsmtpd.conf"
        path.write_bytes(os.fsencode(text))
        return path

    return make


# --- The command line ---


@pytest.mark.parametrize(
    "args", [["-x"], ["file"], ["-f"], ["-p"], ["-d"], ["-v", "file"], ["--hope"]]
)
def test_usage(args: list[str]) -> None:
    result = run(*args)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.endswith(USAGE)


@pytest.mark.parametrize("level", ["5", "-1", "x", "", "1x", "1 0"])
def test_invalid_debug_level(level: str, config: Callable[[str], Path]) -> None:
    result = run("-d", level, "-f", config("OutAddress: 25\n"))
    assert result.returncode == 2
    assert "proxsmtpd: invalid debug log level" in result.stderr


def test_version() -> None:
    result = run("-v")
    assert result.returncode == 0
    assert result.stderr == ""
    lines = r"proxsmtpd \(version \d[\w.]*\)\n          \(config: /.*\.conf\)\n"
    assert re.fullmatch(lines, result.stdout)


def test_version_by_its_long_option() -> None:
    assert run("--version").stdout == run("-v").stdout


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help(option: str) -> None:
    """It is what was asked for: on standard output, with exit status 0."""
    result = run(option)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith(USAGE)
    for flag in ("-d LEVEL", "-f FILE", "-p FILE", "-t ", "-v, --version"):
        assert f"\n  {flag}" in result.stdout
    assert max(map(len, result.stdout.splitlines())) < 80


@pytest.mark.parametrize("path", ["/dev/full", "/dev/null"])
def test_version_with_full_output(path: str) -> None:
    with open(path, "wb") as output:
        result = subprocess.run(
            [*program_under_test(), "-v"],
            check=False,
            stdout=output,
            stderr=subprocess.PIPE,
            timeout=PATIENCE,
        )
    full = b"proxsmtpd: couldn't write to standard output: No space left on device\n"
    assert (result.returncode, result.stderr) == (
        (1, full) if path == "/dev/full" else (0, b"")
    )


def test_check(config: Callable[[str], Path], server: ScriptedServer) -> None:
    """An address that is in use is no fault: the daemon itself may be there."""
    text = f"OutAddress: 25\nListen: {server.address}\nFilterCommand: cat\n"
    result = run("-t", "-f", config(text))
    assert (result.returncode, result.stdout) == (0, "configuration is OK\n")
    assert result.stderr == ""


def test_check_finds_errors(config: Callable[[str], Path]) -> None:
    path = config("OutAddress: 25\n\nFilterTimeout: soon\n")
    result = run("-t", "-f", path)
    assert (result.returncode, result.stdout) == (2, "")
    assert f"{path}:3:" in result.stderr


WARNED = {
    "Header: X-A: %q %i": "invalid header symbol: %q",
    "TempDirectory: /nowhere/at/all": "/nowhere/at/all",
    "TempDirectory: /etc/passwd": "/etc/passwd",
    "FilterCommand: /nowhere/filter --strict": "/nowhere/filter",
    "FilterCommand: no-such-filter": "no-such-filter",
    'FilterCommand: /nowhere/filter "$SENDER" | cat': "/nowhere/filter",
    "FilterCommand: A=b C= exec no-such-filter; cat": "no-such-filter",
    "FilterCommand: cat; fi": "FilterCommand is refused by the shell: sh: ",
    'FilterCommand: cat "': "FilterCommand is refused by the shell: sh: ",
    "User: no-such-user": "no-such-user",
}


NOT_WARNED = (
    "FilterCommand: cat",
    "FilterCommand: LC_ALL=C exec cat",
    "FilterCommand: exec sed s/a/b/",
    "FilterCommand: cat;/nowhere/filter",
    "FilterCommand: { cat; }",
    'FilterCommand: "$FILTER"',
    "FilterCommand: (no-such-filter)",
    "FilterCommand: if true; then cat; fi",
)


@pytest.mark.parametrize("line", NOT_WARNED)
def test_check_does_not_warn(line: str, config: Callable[[str], Path]) -> None:
    """The command is found, or only the shell understands it."""
    result = run("-t", "-f", config(f"OutAddress: 25\n{line}\n"))
    assert (result.stdout, result.stderr) == ("configuration is OK\n", "")


def test_check_warns_of_both_addresses(config: Callable[[str], Path]) -> None:
    result = run("-t", "-f", config("OutAddress: 25\nTransparentProxy: client\n"))
    ignored = "the OutAddress option will be ignored when TransparentProxy is enabled"
    assert result.stderr == f"proxsmtpd: {ignored}\n"


def test_check_of_a_filter_in_the_callers_directory(
    config: Callable[[str], Path], tmp_path: Path
) -> None:
    """The daemon looks for it in its own, which is / except with -d."""
    (tmp_path / "filter").write_text("#!/bin/sh\n")
    (tmp_path / "filter").chmod(0o755)
    path = config("OutAddress: 25\nFilterCommand: ./filter\n")
    warning = "proxsmtpd: FilterCommand's program not found: ./filter\n"
    assert run("-t", "-f", path, cwd=tmp_path).stderr == warning
    assert run("-d1", "-t", "-f", path, cwd=tmp_path).stderr == ""


NOT_EXECUTABLE = "FilterCommand's program is not executable: "


@pytest.mark.parametrize(
    ("name", "locale", "mode"),
    [
        ("filter", "C", 0o755),
        ("filter", "C", 0o644),
        ("filtr\xe9", "C", 0o755),
        ("filtr\xe9", "C.UTF-8", 0o644),
        ("filtr\xe9", "en_US.ISO-8859-1", 0o755),
        ("\u0444", "C.UTF-8", 0o755),
        ("\u0444", "en_US.ISO-8859-1", 0o644),
    ],
)
def test_check_of_a_program_that_is_there(
    name: str, locale: str, mode: int, config: Callable[[str], Path], tmp_path: Path
) -> None:
    """Found by its octets, by its path or in PATH; and it may be executable or not."""
    program = os.fsencode(tmp_path) + b"/" + name.encode()
    Path(os.fsdecode(program)).write_text("#!/bin/sh\n")
    os.chmod(program, mode)
    environment = {**os.environ, "LC_ALL": locale, "PYTHONUTF8": "0"}
    environment["PATH"] = f"{tmp_path}:{environment['PATH']}"
    for command in (name, f"{tmp_path}/{name}"):
        path = config(f"OutAddress: 25\nFilterCommand: {command}\n")
        result = run("-t", "-f", path, env=environment)
        assert result.returncode == 0
        assert (NOT_EXECUTABLE in result.stderr) == (mode == 0o644)
        assert "not found" not in result.stderr


@as_root
@pytest.mark.parametrize(
    ("mode", "directory_mode", "is_warned"),
    [(0o755, 0o755, False), (0o700, 0o755, True), (0o755, 0o700, True)],
)
def test_check_of_a_program_for_the_user(
    mode: int, directory_mode: int, is_warned: bool, config: Callable[[str], Path]
) -> None:
    """The user has to be able to run it, not root."""
    with tempfile.TemporaryDirectory() as place:
        program = Path(place) / "filter"
        program.write_text("#!/bin/sh\n")
        program.chmod(mode)
        Path(place).chmod(directory_mode)
        path = config(f"OutAddress: 25\nUser: nobody\nFilterCommand: {program}\n")
        result = run("-t", "-f", path)
        warning = f"proxsmtpd: {NOT_EXECUTABLE}{program}\n"
        assert result.stderr == (warning if is_warned else "")


OWN_LISTENER = "OutAddress leads to this proxy's own Listen address"
LOOPS = {
    "the same": ("127.0.0.1:10025", "127.0.0.1:10025"),
    "the default port": ("127.0.0.1:25", "127.0.0.1"),
    "any, loopback": ("10025", "127.0.0.1:10025"),
    "any, another loopback": ("0.0.0.0:10025", "127.0.0.9:10025"),
    "any of both, IPv4": ("[::]:10025", "127.0.0.1:10025"),
    "any of both, IPv6": ("[::]:10025", "[::1]:10025"),
    "IPv6 of another form": ("[::1]:10025", "[0:0:0::1]:10025"),
    "IPv4 as IPv6": ("127.0.0.1:10025", "[::ffff:127.0.0.1]:10025"),
    "a name": ("10025", "localhost:10025"),
    "names": ("localhost:10025", "localhost:10025"),
    "a unix socket": ("/run/x.sock", "/run/../run//x.sock"),
}
NO_LOOPS = {
    "another port": ("10025", "127.0.0.1:1"),
    "another loopback": ("127.0.0.1:10025", "127.0.0.2:10025"),
    "another machine": ("10025", "192.0.2.1:10025"),
    "a port alone": ("10025", "10025"),
    "another unix socket": ("/run/x.sock", "/run/y.sock"),
    "a unix socket and a port": ("/run/x.sock", "10025"),
}


@pytest.mark.parametrize("how", [["-t"], ["-d", "0"]], ids=["t", "d"])
@pytest.mark.parametrize("name", ["a name", "a unix socket"])
def test_own_listener_is_no_server(
    name: str, how: list[str], config: Callable[[str], Path]
) -> None:
    listen, out = LOOPS[name]
    result = run(*how, "-f", config(f"Listen: {listen}\nOutAddress: {out}\n"))
    assert (result.returncode, result.stdout) == (2, "")
    assert OWN_LISTENER in result.stderr


@pytest.mark.parametrize(
    ("listen", "out", "is_loop"),
    [
        *((*addresses, True) for addresses in LOOPS.values()),
        *((*addresses, False) for addresses in NO_LOOPS.values()),
    ],
    ids=[*LOOPS, *NO_LOOPS],
)
def test_loops(listen: str, out: str, *, is_loop: bool) -> None:
    text = f"Listen: {listen}\nOutAddress: {out}\n"
    config, errors = module.parse_config(text.encode(), "conf")
    assert errors == []
    assert module.is_loop(config) == is_loop


def test_loop_at_run_time(proxsmtpd: StartDaemon) -> None:
    """A port alone, for a client of this machine: one connection and one line."""
    with reserve_port() as holder:
        port = port_of(holder)
    daemon = proxsmtpd(f"Listen: 127.0.0.1:{port}\nOutAddress: {port}\n")
    assert daemon.connect().reply() == b"421 Server not available\r\n"
    daemon.wait_log(f"loop detected: {OWN_LISTENER}")
    assert daemon.stop() == 0
    assert daemon.log().count("accepted connection from") == 1
    assert "too many connections" not in daemon.log()


@pytest.mark.parametrize("name", ["Listen", "OutAddress"])
def test_socket_path_that_is_too_long(name: str, config: Callable[[str], Path]) -> None:
    most = module.MOST_SOCKET_PATH
    text = f"the socket path of {name} has {most + 1} octets (at most {most})"
    for path in ("/" + "x" * most, "/" + "\xe9" * (most // 2) + "x" * (most % 2)):
        result = run("-t", "-f", config(f"OutAddress: 25\n{name}: {path}\n"))
        assert result.returncode == 2
        assert text in result.stderr
    path = "/" + "x" * (most - 1)
    assert run("-t", "-f", config(f"OutAddress: 25\n{name}: {path}\n")).returncode == 0


@pytest.mark.parametrize("line", WARNED)
def test_check_warns(line: str, config: Callable[[str], Path]) -> None:
    result = run("-t", "-f", config(f"OutAddress: 25\n{line}\n"))
    assert (result.returncode, result.stdout) == (0, "configuration is OK\n")
    (warning,) = result.stderr.splitlines()
    assert WARNED[line] in warning


def test_check_warns_of_a_directory_for_everybody(
    config: Callable[[str], Path], tmp_path: Path
) -> None:
    place = tmp_path / "temp"
    place.mkdir()
    path = config(f"OutAddress: 25\nTempDirectory: {place}\n")
    for mode, warned in ((0o777, True), (0o1777, False), (0o700, False)):
        place.chmod(mode)
        result = run("-t", "-f", path)
        assert result.returncode == 0
        assert (str(place) in result.stderr) == warned, oct(mode)


# --- The configuration file ---

BAD_LINES = {
    "Nonsense": "invalid config line: Nonsense",
    "Unknown: x": "invalid config line: Unknown",
    "FilterTimeout: 0": "invalid setting: FilterTimeout",
    "FilterTimeout: 1x": "invalid setting: FilterTimeout",
    "FilterTimeout:": "invalid setting: FilterTimeout",
    "TimeOut: -1": "invalid setting: TimeOut",
    "KeepAlives: -1": "invalid setting: KeepAlives",
    "MaxConnections: 0": "invalid setting: MaxConnections",
    "MaxConnections: 10241": "invalid setting: MaxConnections",
    "FilterType: sieve": "invalid value for FilterType",
    "XClient: maybe": "invalid value for XClient",
    "FilterMode: obey": "invalid value for FilterMode",
    "FilterFailure: ignore": "invalid value for FilterFailure",
    "FilterVerdict: 5xx": "invalid value for FilterVerdict",
    "ProxyProtocol: v2": "invalid value for ProxyProtocol",
    "MaxMessageSize: 10M": "invalid setting: MaxMessageSize",
    "TransparentProxy: maybe": "invalid value for TransparentProxy",
    "Skip: everybody": "invalid value for Skip",
    "TempDirectory:": "invalid setting: TempDirectory",
    "User:": "invalid setting: User",
    "Listen: one:two:three": "invalid Listen socket name or ip: one:two:three",
    "Listen: 127.0.0.1:65536": "invalid Listen socket name or ip: 127.0.0.1:65536",
    "OutAddress: [::1": "invalid OutAddress socket name or ip: [::1",
}


@pytest.mark.parametrize("foreground", [["-d", "0"], ["-t"], []], ids=["d", "t", ""])
def test_all_errors_at_once(
    foreground: list[str], config: Callable[[str], Path]
) -> None:
    """Each fault is one line, with the file, the number and the original's words."""
    text = "OutAddress: 25\n" + "".join(f"\n{line}\n" for line in BAD_LINES)
    path = config(text)
    result = run(*foreground, "-f", path)
    assert (result.returncode, result.stdout) == (2, "")
    said = result.stderr.splitlines()
    for number, (line, words) in enumerate(BAD_LINES.items()):
        (about,) = [
            x for x in said if x.startswith(f"proxsmtpd: {path}:{number * 2 + 3}:")
        ]
        assert words in about, line
    assert len(said) == len(BAD_LINES)


SWITCHES = ("0", "no", "false", "f", "off", "1", "yes", "true", "t", "on", "ON", "No")
VALID_LINES = [
    *(f"XClient: {word}" for word in SWITCHES),
    "MaxConnections: 1",
    "MaxConnections: 10240",
    "KeepAlives: 0",
    "MaxMessageSize: 0",
    "FilterMode: Observe",
    "FilterFailure: PASS",
    "FilterVerdict: Coded",
    "ProxyProtocol: on",
    "FilterCommand:",
    "Header:",
    "Listen: 1",
    "Listen: ::1",
    "Listen: [::1]",
    "Listen: [::]:25",
    "Listen: /run/some.sock",
    "OutAddress: mx.example.com",
    "OutAddress: 127.0.0.1",
]


def test_valid_lines(config: Callable[[str], Path]) -> None:
    """All in one file, where every line is checked and the later one wins."""
    lines = [*VALID_LINES, "OutAddress: 25", ""]  # with a host, -t would connect
    result = run("-t", "-f", config("\n".join(lines)))
    assert (result.returncode, result.stderr) == (0, "")


def test_odd_spellings(proxsmtpd: StartDaemon, tmp_path: Path) -> None:
    with reserve_port() as holder:
        port = port_of(holder)
        daemon = proxsmtpd(
            f"\r\n   # Listen: 1\n#\n\t lIsTeN \t:\t 127.0.0.1:{port} \r\n"
            f"FILTERCOMMAND:echo 554 a:b \udce9 \\# c >&2; exit 1 # no\n"
            f"tempdirectory : /nowhere\ntempdirectory : {tmp_path}/proxsmtpd-0/temp"
        )
        reply = daemon.connect().message(MESSAGE)
    assert reply == b"554 a:b ? # c\r\n"


def test_bytes_pass_through_unharmed(proxsmtpd: StartDaemon) -> None:
    daemon = proxsmtpd("FilterType: reject\nFilterReject: 554 \udce9\udcff nein\n")
    client = daemon.connect()
    client.reply()
    assert client.command(b"MAIL FROM:<>") == b"554 \xe9\xff nein\r\n"


def test_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "none"
    result = run("-d", "1", "-f", path)
    assert result.returncode == 2
    assert f"proxsmtpd: configuration file not found: {path}\n" in result.stderr
    assert "OutAddress" in result.stderr


def test_unreadable_file(tmp_path: Path) -> None:
    result = run("-d", "1", "-f", tmp_path)
    assert result.returncode == 1
    assert str(tmp_path) in result.stderr


def test_out_address_is_required(config: Callable[[str], Path]) -> None:
    result = run("-f", config("FilterCommand: cat\n"))
    assert result.returncode == 2
    assert "no OutAddress specified" in result.stderr


# --- Addresses ---


def greeted(address: str) -> bool:
    """Return whether a client of this address is served."""
    with RawClient(address) as client:
        return client.reply() == GREETING


def test_listen_on_a_port(proxsmtpd: StartDaemon) -> None:
    with reserve_port("0.0.0.0") as holder:
        port = port_of(holder)
        proxsmtpd({"Listen": port})
        assert greeted(f"127.0.0.1:{port}")
        assert greeted(f"127.0.0.2:{port}")


def is_localhost_known() -> bool:
    """Return whether localhost has its IPv4 address, as /etc/hosts gives it mostly."""
    try:
        return socket.gethostbyname("localhost") == "127.0.0.1"
    except OSError:
        return False


with_localhost = pytest.mark.skipif(
    not is_localhost_known(), reason="localhost has no address"
)


@with_localhost
def test_listen_on_a_name(proxsmtpd: StartDaemon) -> None:
    with reserve_port() as holder:
        daemon = proxsmtpd({"Listen": f"localhost:{port_of(holder)}"})
        assert greeted(f"127.0.0.1:{daemon.port}")


def test_listen_on_ipv6(proxsmtpd: StartDaemon, tmp_path: Path) -> None:
    saved = tmp_path / "client"
    with reserve_port("::1") as holder:
        listen = f"[::1]:{port_of(holder)}"
        command = f"echo $CLIENT $SERVER > {saved}; cat"
        daemon = proxsmtpd({"Listen": listen, "FilterCommand": command})
        assert daemon.connect().message(MESSAGE) == QUEUED
    assert saved.read_text() == "::1 127.0.0.1\n"
    daemon.wait_log(r": client=::1, from=a@example\.com")


@on_other_systems_too
def test_listen_on_everything(proxsmtpd: StartDaemon, tmp_path: Path) -> None:
    """`[::]` serves IPv4 too, and calls an IPv4 client by its plain address."""
    saved = tmp_path / "client"
    with reserve_port("::") as holder:
        port = port_of(holder)
        daemon = proxsmtpd(
            {"Listen": f"[::]:{port}", "FilterCommand": f"echo $CLIENT > {saved}; cat"}
        )
        for host, client_address in (("127.0.0.1", "127.0.0.1"), ("[::1]", "::1")):
            with RawClient(f"{host}:{port}") as client:
                assert client.message(MESSAGE) == QUEUED
            assert saved.read_text() == f"{client_address}\n"
            daemon.wait_log(rf": client={client_address}, from=a@example\.com")
    assert "ffff" not in daemon.log()


def test_listen_on_a_unix_socket(proxsmtpd: StartDaemon, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    daemon = proxsmtpd({"Listen": path, "FilterCommand": "cat"})
    assert daemon.connect().message(MESSAGE) == QUEUED
    assert stat.S_ISSOCK(path.stat().st_mode)


def test_stale_unix_socket_is_replaced(proxsmtpd: StartDaemon, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    assert proxsmtpd({"Listen": path}).connect().reply() == GREETING


@pytest.mark.parametrize("kind", ["file", "directory", "link", "fifo"])
def test_other_file_at_the_sockets_path_stays(
    kind: str, config: Callable[[str], Path], tmp_path: Path
) -> None:
    path = tmp_path / "precious"
    makers: dict[str, Callable[[Path], object]] = {
        "file": lambda path: path.write_text("precious"),
        "directory": Path.mkdir,
        "link": lambda path: path.symlink_to("elsewhere"),
        "fifo": os.mkfifo,
    }
    makers[kind](path)
    before = path.lstat()
    result = run("-d", "1", "-f", config(f"OutAddress: 25\nListen: {path}\n"))
    assert result.returncode == 1
    assert str(path) in result.stderr
    assert (path.lstat().st_ino, path.lstat().st_size) == (
        before.st_ino,
        before.st_size,
    )


def test_unix_socket_in_use_stays(
    proxsmtpd: StartDaemon, config: Callable[[str], Path], tmp_path: Path
) -> None:
    path = tmp_path / "socket"
    daemon = proxsmtpd({"Listen": path})
    result = run("-d", "1", "-f", config(f"OutAddress: 25\nListen: {path}\n"))
    assert result.returncode == 1
    assert str(path) in result.stderr
    assert daemon.connect().reply() == GREETING


def test_unix_socket_of_another_instance_stays(
    proxsmtpd: StartDaemon, tmp_path: Path
) -> None:
    path = tmp_path / "socket"
    first = proxsmtpd({"Listen": path})
    path.unlink()
    second = proxsmtpd({"Listen": path})
    second.wait_log("accepting connections$")  # the first one's socket has the name too
    assert first.stop() == 0
    assert second.connect().reply() == GREETING
    assert second.stop() == 0
    assert not path.exists()


@pytest.mark.parametrize("host", ["::1", "127.0.0.3"])
def test_server_address(
    host: str, make_server: MakeServer, proxsmtpd: StartDaemon, tmp_path: Path
) -> None:
    saved = tmp_path / "server"
    server = make_server(host=host)
    command = f"echo $SERVER > {saved}; cat"
    daemon = proxsmtpd({"FilterCommand": command}, server=server)
    assert daemon.connect().message(MESSAGE) == QUEUED
    assert saved.read_text() == f"{host}\n"


@with_localhost
def test_server_by_name(make_server: MakeServer, proxsmtpd: StartDaemon) -> None:
    server = make_server()
    daemon = proxsmtpd({"OutAddress": f"localhost:{server.port}"})
    assert daemon.connect().message(MESSAGE) == QUEUED


def test_server_on_a_unix_socket(
    make_server: MakeServer, proxsmtpd: StartDaemon, tmp_path: Path
) -> None:
    daemon = proxsmtpd(server=make_server(host=str(tmp_path / "server")))
    assert daemon.connect().message(MESSAGE) == QUEUED


@on_other_systems_too
@pytest.mark.parametrize("form", ["{}", "0.0.0.0:{}", "[::]:{}"])
def test_connect_back(
    form: str, make_server: MakeServer, proxsmtpd: StartDaemon
) -> None:
    """Without an address of its own, the server is where the client came from."""
    server = make_server(host="127.0.0.7")
    daemon = proxsmtpd({"OutAddress": form.format(server.port)})
    client = daemon.connect(source=("127.0.0.7", 0))
    assert client.message(MESSAGE) == QUEUED
    assert server.connections[0].closed is False


def test_connect_back_over_ipv6(
    make_server: MakeServer, proxsmtpd: StartDaemon
) -> None:
    server = make_server(host="::1")
    with reserve_port("::1") as holder:
        listen = f"[::1]:{port_of(holder)}"
        daemon = proxsmtpd({"OutAddress": server.port, "Listen": listen})
        assert daemon.connect().message(MESSAGE) == QUEUED


@with_mounts
def test_names_are_resolved_again_and_all_addresses_tried(
    make_server: MakeServer, proxsmtpd: StartDaemon, tmp_path: Path
) -> None:
    server = make_server(host="127.0.0.9")
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.8 sink.example\n")
    daemon = proxsmtpd(
        {"OutAddress": f"sink.example:{server.port}"},
        program=[*mounted(hosts, "/etc/hosts"), *program_under_test()],
    )
    client = daemon.connect()
    assert client.reply().startswith(b"421 ")
    assert client.eof()
    with hosts.open("a") as more:
        more.write("::1 sink.example\n127.0.0.9 sink.example\n")
    assert daemon.connect().message(MESSAGE) == QUEUED


def test_address_family_that_the_system_lacks(server: ScriptedServer) -> None:
    """A name may have such an address all the same: the next one is tried."""
    absent = 255, ("", 0)
    present = socket.AF_INET, ("127.0.0.1", server.port)
    sock, sockaddr = connect([absent, present], PATIENCE)
    with sock:
        assert sockaddr == present[1]
    with pytest.raises(OSError, match="not supported"):
        connect([absent], PATIENCE)


IPV6_ONLY = "::1 here.example\n"
BOTH = IPV6_ONLY + "127.0.0.9 here.example\n"


@with_mounts
@pytest.mark.parametrize(("hosts", "host"), [(IPV6_ONLY, "::1"), (BOTH, "127.0.0.9")])
def test_listen_on_a_name_of_both_families(
    hosts: str, host: str, proxsmtpd: StartDaemon, tmp_path: Path
) -> None:
    """Its IPv4 address is what the original listened on."""
    file = tmp_path / "hosts"
    file.write_text(hosts)
    with reserve_port(host) as holder:
        port = port_of(holder)
        proxsmtpd(
            {"Listen": f"here.example:{port}"},
            program=[*mounted(file, "/etc/hosts"), *program_under_test()],
        )
        assert greeted(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")


# --- As a daemon ---


def test_daemon(detach: Detach) -> None:
    daemon = detach({"FilterCommand": "cat"}, umask=0o077)
    assert daemon.result.stdout == ""
    assert daemon.pid_file.read_text() == f"{daemon.pid}\n"
    assert stat.S_IMODE(daemon.pid_file.stat().st_mode) == 0o644
    assert daemon.pid != os.getpid()
    assert os.getsid(daemon.pid) in (daemon.pid, int(daemon.status("PPid")[0]))
    assert os.getsid(daemon.pid) != os.getsid(0)
    assert os.readlink(f"/proc/{daemon.pid}/cwd") == "/"
    for number in range(3):
        assert os.readlink(f"/proc/{daemon.pid}/fd/{number}") == "/dev/null"
    assert send(daemon.address) == QUEUED
    daemon.end()
    assert not daemon.pid_file.exists()


def test_process_is_called_proxsmtpd(detach: Detach) -> None:
    daemon = detach()
    assert Path(f"/proc/{daemon.pid}/comm").read_text() == "proxsmtpd\n"


def test_started_without_standard_descriptors(detach: Detach) -> None:
    """An init script may close them; a socket must not become number 2."""

    def close_all() -> None:
        for number in range(3):
            os.close(number)

    daemon = detach(
        {"FilterCommand": "echo 554 to standard error >&2; exit 1"},
        preexec_fn=close_all,
        capture_output=False,
    )
    assert send(daemon.address) == b"554 to standard error\r\n"


def test_second_start(detach: Detach, place: Path) -> None:
    """It fails before the parent's eyes and leaves the first one's pid file alone."""
    daemon = detach()
    before = daemon.pid_file.stat()
    result = run("-f", place / "0.conf")
    assert result.returncode == 1
    assert daemon.address in result.stderr
    assert result.stderr.startswith("proxsmtpd: ")
    assert daemon.pid_file.read_text() == f"{daemon.pid}\n"
    assert daemon.pid_file.stat().st_ino == before.st_ino
    assert send(daemon.address) == QUEUED


def test_pid_file_that_cannot_be_written(place: Path, server: ScriptedServer) -> None:
    with reserve_port() as holder:
        listen = f"127.0.0.1:{port_of(holder)}"
        path = place / "conf"
        path.write_text(f"OutAddress: {server.address}\nListen: {listen}\n")
        result = run("-f", path, "-p", place / "none" / "pid")
        assert result.returncode == 1
        assert str(place / "none" / "pid") in result.stderr
        assert not is_listening(listen)


def test_stale_pid_file_is_replaced(detach: Detach, place: Path) -> None:
    (place / "0.pid").write_text("999999\nand more than that\n")
    daemon = detach()
    assert daemon.pid_file.read_text() == f"{daemon.pid}\n"


def test_pid_file_of_somebody_else_stays(detach: Detach) -> None:
    daemon = detach()
    daemon.pid_file.write_text("1\n")
    daemon.end()
    assert daemon.pid_file.read_text() == "1\n"


def test_pid_file_in_the_foreground(proxsmtpd: StartDaemon, tmp_path: Path) -> None:
    """The setting wins over -p, with a warning."""
    wins, loses = tmp_path / "wins", tmp_path / "loses"
    daemon = proxsmtpd({"PidFile": wins}, args=["-p", loses], level=1)
    daemon.wait_log("^proxsmtpd: ignoring pid file specified on the command line")
    assert wins.read_text() == f"{daemon.process.pid}\n"
    assert not loses.exists()
    assert daemon.stop() == 0
    assert not wins.exists()


def test_pid_file_of_the_command_line(proxsmtpd: StartDaemon, tmp_path: Path) -> None:
    daemon = proxsmtpd(args=["-p", tmp_path / "pid"], level=1)
    assert (tmp_path / "pid").read_text() == f"{daemon.process.pid}\n"
    assert daemon.stop(signal.SIGINT) == 0
    assert not (tmp_path / "pid").exists()
    assert "ignoring" not in daemon.log()


# --- Another user ---


@as_root
@pytest.mark.parametrize("by_number", [False, True])
def test_user(by_number: bool, detach: Detach, place: Path) -> None:
    user = some_user()
    name = user.pw_uid if by_number else user.pw_name
    saved = place / "temp" / "id"
    command = f"id -u > {saved}; cat"
    daemon = detach({"User": name, "FilterCommand": command}, extra_groups=[0, 4, 20])
    assert daemon.status("Uid") == [str(user.pw_uid)] * 4
    assert daemon.status("Gid") == [str(user.pw_gid)] * 4
    groups = os.getgrouplist(user.pw_name, user.pw_gid)
    assert sorted(map(int, daemon.status("Groups"))) == sorted(groups)
    assert set(daemon.status("CapEff")) == {"0" * 16}
    assert send(daemon.address) == QUEUED
    assert saved.read_text() == f"{user.pw_uid}\n"
    saved.unlink()
    assert daemon.pid_file.stat().st_uid == 0
    daemon.end()
    # The directory is root's, so that the file cannot be removed but emptied.
    assert daemon.pid_file.read_text() == ""


@as_root
@pytest.mark.parametrize("mode", [0o755, 0o700, 0o777])
def test_check_of_a_directory_that_user_cannot_write_to(
    mode: int, config: Callable[[str], Path], place: Path
) -> None:
    directory = place / "temp" / "of-root"
    directory.mkdir()
    directory.chmod(mode | stat.S_ISVTX)
    settings = f"User: {some_user().pw_name}\nTempDirectory: {directory}\n"
    result = run("-t", "-f", config(f"OutAddress: 25\n{settings}"))
    warning = f"proxsmtpd: TempDirectory {directory} is not writable\n"
    assert result.stderr == ("" if mode == 0o777 else warning)


@as_root
@with_mounts
def test_user_gets_supplementary_groups(detach: Detach, place: Path) -> None:
    user = some_user()
    groups = place / "group"
    lines = [f"{g.gr_name}:x:{g.gr_gid}:" for g in grp.getgrall()]
    groups.write_text("\n".join([*lines, f"mailfilter:x:54321:{user.pw_name}"]) + "\n")
    program = mounted(groups, "/etc/group")
    daemon = detach({"User": user.pw_name}, program=program)
    assert sorted(map(int, daemon.status("Groups"))) == [user.pw_gid, 54321]


@as_root
def test_privileged_port(detach: Detach) -> None:
    """It is bound before privileges are dropped."""
    user = some_user()
    with socket.socket() as probe:
        for port in range(1023, 511, -1):
            try:
                probe.bind(("127.0.0.1", port))
                break
            except OSError:
                continue
    daemon = detach({"Listen": f"127.0.0.1:{port}", "User": user.pw_name})
    assert send(daemon.address) == QUEUED


def test_unknown_user(place: Path, server: ScriptedServer) -> None:
    with reserve_port() as holder:
        listen = f"127.0.0.1:{port_of(holder)}"
        path = place / "conf"
        path.write_text(
            f"OutAddress: {server.address}\nListen: {listen}\nUser: no-such-user\n"
            f"PidFile: {place}/pid\n"
        )
        result = run("-f", path)
        assert result.returncode == 1
        assert "couldn't look up user: no-such-user" in result.stderr
        assert not is_listening(listen)
        assert not (place / "pid").exists()


@as_root
def test_root_is_warned(proxsmtpd: StartDaemon) -> None:
    daemon = proxsmtpd(level=1)
    daemon.wait_log("^proxsmtpd: running as root is NOT recommended$")


# --- Signals ---


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_ended_by_a_signal(number: int, proxsmtpd: StartDaemon) -> None:
    """Idle clients get a 421, whatever they have sent before."""
    daemon = proxsmtpd()
    fresh, talking = daemon.connect(), daemon.connect()
    fresh.reply()
    talking.start()
    daemon.process.send_signal(number)
    for client in (fresh, talking):
        assert re.fullmatch(rb"421 .+\r\n", client.reply())
        assert client.eof()
        client.close()
    assert daemon.wait(3) == 0


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGPIPE])
def test_ignored_signals(number: int, proxsmtpd: StartDaemon) -> None:
    daemon = proxsmtpd()
    client = daemon.connect()
    client.start()
    for _ in range(3):
        daemon.process.send_signal(number)
        client.expect(b"NOOP", b"250")
    assert client.message(MESSAGE) == QUEUED
    assert daemon.connect().reply() == GREETING


@pytest.mark.parametrize("command", ["cat", None], ids=["filtered", "streamed"])
def test_message_under_way_may_finish(
    command: str | None, proxsmtpd: StartDaemon, server: ScriptedServer
) -> None:
    daemon = proxsmtpd({"FilterCommand": command} if command else {})
    client = daemon.connect()
    client.start()
    client.expect(b"DATA", b"354")
    client.send(b"Subject: te")
    daemon.process.send_signal(signal.SIGTERM)
    assert poll(lambda: not is_listening(daemon.address))
    client.send(b"st\r\n\r\nHello\r\n")
    assert client.command(b".") == QUEUED
    assert re.fullmatch(rb"421 .+\r\n", client.reply())
    assert client.eof()
    client.close()
    assert daemon.wait(3) == 0
    assert server.wait_message().data == MESSAGE


def test_second_signal_ends_at_once(
    proxsmtpd: StartDaemon, server: ScriptedServer
) -> None:
    daemon = proxsmtpd()
    client = daemon.connect()
    client.start()
    client.expect(b"DATA", b"354")
    client.send(b"Subject: te")
    daemon.process.send_signal(signal.SIGTERM)
    assert poll(lambda: not is_listening(daemon.address))
    daemon.process.send_signal(signal.SIGTERM)
    assert daemon.wait(2) == 0
    server.wait_for(lambda: server.connections[0].closed)
    assert server.messages == []


# --- Too much ---


def test_max_connections(proxsmtpd: StartDaemon) -> None:
    daemon = proxsmtpd({"MaxConnections": 1})
    first = daemon.connect()
    first.reply()
    for _ in range(3):
        late = daemon.connect()
        assert late.reply() == BUSY
        assert late.eof()
    first.quit()
    assert poll(lambda: daemon.connect().reply() == GREETING)


def test_max_connections_is_64(proxsmtpd: StartDaemon) -> None:
    daemon = proxsmtpd(level=1)
    clients = [daemon.connect() for _ in range(65)]
    greetings = [client.reply() for client in clients]
    assert greetings == [b"220 smtp.passthru ESMTP\r\n"] * 64 + [BUSY]


def test_long_queue(proxsmtpd: StartDaemon) -> None:
    """Clients that come while the daemon cannot run are not dropped."""
    daemon = proxsmtpd({"MaxConnections": 2}, level=1)
    daemon.process.send_signal(signal.SIGSTOP)
    clients = [daemon.connect() for _ in range(200)]
    daemon.process.send_signal(signal.SIGCONT)
    greetings = [client.reply() for client in clients]
    assert greetings == [b"220 smtp.passthru ESMTP\r\n"] * 2 + [BUSY] * 198


def cpu_seconds(daemon: Daemon) -> float:
    """Return the processor time that a process has used until now."""
    text = Path(f"/proc/{daemon.process.pid}/stat").read_text()
    words = text.rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def limited(what: int, number: int) -> Callable[[], None]:
    """Return a preexec_fn that sets a limit."""
    return lambda: resource.setrlimit(what, (number, number))


def test_limit_of_descriptors_is_raised(proxsmtpd: StartDaemon) -> None:
    """The limit is the manual's number for so many connections."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    daemon = proxsmtpd(
        {"MaxConnections": 30},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, most)),
    )
    raised = resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE)
    assert raised == (min(30 * 10 + 32, most), most)


def test_no_descriptors_left(proxsmtpd: StartDaemon) -> None:
    """Whoever cannot be served is refused or waits; the daemon lives and sleeps."""
    daemon = proxsmtpd(
        {"MaxConnections": 500},
        level=1,
        preexec_fn=limited(resource.RLIMIT_NOFILE, 48),
    )
    served = daemon.connect()
    assert served.reply() == GREETING
    for _ in range(4):  # Threads race for the last descriptor: not one storm alone.
        clients = [daemon.connect() for _ in range(80)]
        served.expect(b"NOOP", b"250")
        before = cpu_seconds(daemon)
        time.sleep(0.4)  # The span in which it must not spin.
        assert cpu_seconds(daemon) - before < 0.2
        answers = [received(client) for client in clients]
        assert {answer[:4] for answer in answers} <= {b"220 ", b"421 ", b""}
        assert any(not answer.startswith(b"220 ") for answer in answers)
        for client in clients:
            client.close()
        assert poll(lambda: greeted(daemon.address))
    served.envelope()
    assert served.message(MESSAGE) == QUEUED


def received(client: RawClient) -> bytes:
    """Return the octets that a client has received until now."""
    client.sock.setblocking(False)
    try:
        return client.sock.recv(4096)
    except (BlockingIOError, ConnectionResetError):
        return b""


@as_root
def test_no_threads_left(detach: Detach) -> None:
    daemon = detach(
        {"User": idle_user(), "Processes": 1},
        preexec_fn=limited(resource.RLIMIT_NPROC, 6),
    )
    clients = [RawClient(daemon.address) for _ in range(12)]
    greetings = [client.reply() for client in clients]
    assert greetings[0] == GREETING
    assert re.fullmatch(rb"421 .+\r\n", greetings[-1])
    for client in clients:
        client.close()
    assert poll(lambda: greeted(daemon.address))


def test_idle_connections_cost_nothing(proxsmtpd: StartDaemon) -> None:
    daemon = proxsmtpd({"KeepAlives": 1}, level=1)
    clients = [daemon.connect() for _ in range(20)]
    for client in clients:
        client.start()
    before = cpu_seconds(daemon)
    time.sleep(0.5)  # The span that is measured.
    assert cpu_seconds(daemon) - before <= 0.05


def test_memory_runs_out(server: ScriptedServer, config: Callable[[str], Path]) -> None:
    """The daemon neither ends, nor spins, nor forgets how to end in good order."""
    served = []
    for limit in range(22, 60, 2):  # in MiB, from where it cannot start
        status = end_of_starved(limit, server, config)
        if status is not None:
            served.append(status)
        if len(served) == 3:
            break
    assert served == [0, 0, 0]


def end_of_starved(
    limit: int, server: ScriptedServer, config: Callable[[str], Path]
) -> int | None:
    """Return the exit status with so much memory; None if it cannot start."""
    with reserve_port() as holder:
        address = f"127.0.0.1:{port_of(holder)}"
        settings = f"OutAddress: {server.address}\nFilterCommand: cat\n"
        path = config(f"{settings}Listen: {address}\n")
        limiting = ["prlimit", f"--as={limit << 20}"]
        process = subprocess.Popen(
            [*limiting, *program_under_test(), "-d0", "-f", path],
            stderr=subprocess.DEVNULL,
        )
        try:
            poll(lambda: is_listening(address) or process.poll() is not None)
            if process.poll() is not None:
                return None
            crowd(address, clients=12, seconds=2)
            assert process.poll() is None
            process.send_signal(signal.SIGUSR1)
            process.send_signal(signal.SIGTERM)
            return process.wait(PATIENCE)
        finally:
            process.kill()
            process.wait()


def crowd(address: str, clients: int, seconds: float) -> None:
    """Messages of all sizes, whatever comes of them."""
    deadline = time.monotonic() + seconds

    def send_some(number: int) -> None:
        rng = random.Random(number)
        while time.monotonic() < deadline:
            size = rng.choice([1, 100, 10_000, 90_000, 200_000])
            # Refusals and silence alike are to be expected.
            with (
                contextlib.suppress(AssertionError, OSError),
                RawClient(address, timeout=5) as client,
            ):
                client.message(b"0123456\r\n" * size)

    threads = [threading.Thread(target=send_some, args=[n]) for n in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


# --- The surroundings ---


def test_sigchld_ignored_by_the_parent(proxsmtpd: StartDaemon) -> None:
    """Some service managers and nohup wrappers leave it so."""
    program = ["env", "--ignore-signal=CHLD", *program_under_test()]
    daemon = proxsmtpd({"FilterCommand": "cat"}, program=program)
    assert daemon.connect().message(MESSAGE) == QUEUED


def test_signals_blocked_by_the_parent(proxsmtpd: StartDaemon) -> None:
    program = ["env", "--block-signal=TERM", *program_under_test()]
    daemon = proxsmtpd({"FilterCommand": "cat"}, program=program)
    assert daemon.stop() == 0


ODD_ENVIRONMENT = """
import ctypes, sys
def array(words): return (ctypes.c_char_p * (len(words) + 1))(*words, None)
words = [word.encode() for word in sys.argv[1:]]
entries = [b"PATH=/usr/bin:/bin", b"=odd=1", b"nothing", b"=", b"LAST=1"]
ctypes.CDLL(None).execve(words[0], array(words), array(entries))
"""


def test_environment_with_odd_entries(proxsmtpd: StartDaemon, tmp_path: Path) -> None:
    """They are not passed on, and hinder nothing."""
    saved = tmp_path / "environment"
    program = [sys.executable, "-c", ODD_ENVIRONMENT, *program_under_test()]
    command = f"cat /proc/self/environ >{saved}; cat"
    daemon = proxsmtpd({"FilterCommand": command}, program=program)
    assert daemon.connect().message(MESSAGE) == QUEUED
    entries = saved.read_bytes().split(b"\0")
    assert b"LAST=1" in entries
    assert not {b"=odd=1", b"nothing", b"="} & set(entries)


@with_mounts
def test_filter_without_path(
    proxsmtpd: StartDaemon, server: ScriptedServer, tmp_path: Path
) -> None:
    """The shell then looks in places of its own, so that its word counts."""
    (tmp_path / "cat").write_text("#!/bin/sh\nexec /bin/sed s/Hello/Goodbye/\n")
    (tmp_path / "cat").chmod(0o755)
    program = ["/usr/bin/env", "-u", "PATH", *program_under_test()]
    daemon = proxsmtpd(
        {"FilterCommand": "cat"},
        program=[*mounted(tmp_path, "/usr/local/bin"), *program],
    )
    assert daemon.connect().message(MESSAGE) == QUEUED
    assert server.wait_message().data == MESSAGE.replace(b"Hello", b"Goodbye")


@as_root
@with_mounts
@pytest.mark.parametrize("arguments", [["-d", "0"], [], ["-t"]], ids=str)
def test_machine_without_dev_null(
    arguments: list[str], config: Callable[[str], Path], tmp_path: Path
) -> None:
    devices = tmp_path / "dev"
    devices.mkdir()
    path = config("OutAddress: 25\n")
    command = [*program_under_test(), *arguments, "-f", str(path)]
    result = subprocess.run(
        [*mounted(devices, "/dev"), *command],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    reason = "couldn't open /dev/null: No such file or directory"
    assert f"proxsmtpd: {reason}" in result.stderr.splitlines()


def test_start_that_waits_for_its_pid_file(
    config: Callable[[str], Path], server: ScriptedServer
) -> None:
    """A signal ends it, though nobody reads the pid; nothing is left of it."""
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(write_end, b"x")
    os.set_blocking(write_end, True)
    with reserve_port() as holder:
        address = f"127.0.0.1:{port_of(holder)}"
        path = config(f"Listen: {address}\nOutAddress: {server.address}\n")
        command = [*program_under_test(), "-d0", "-f", str(path), "-p/dev/stdout"]
        process = subprocess.Popen(command, stdout=write_end)
        try:
            assert poll(lambda: is_listening(address))
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE) == 0
        finally:
            process.kill()
            process.wait()
            os.close(read_end)
            os.close(write_end)
    assert Path("/dev/stdout").is_symlink()


@as_root
@pytest.mark.parametrize("stays", [False, True])
def test_pid_file_that_is_a_device(
    stays: bool, proxsmtpd: StartDaemon, tmp_path: Path
) -> None:
    """Some give -p /dev/null for no pid file: the device must not be replaced."""
    null = tmp_path / "null"
    os.mknod(null, stat.S_IFCHR | 0o666, os.makedev(1, 3))
    args = ["-p", null] if stays else []
    settings = {} if stays else {"PidFile": null}
    daemon = proxsmtpd(settings, args=args)
    assert stat.S_ISCHR(null.lstat().st_mode)
    assert daemon.stop() == 0
    assert stat.S_ISCHR(null.lstat().st_mode)


@pytest.mark.parametrize("kind", ["pipe", "file"])
def test_pid_file_that_is_standard_output(
    kind: str, tmp_path: Path, server: ScriptedServer
) -> None:
    """Through a chain of links, as /dev/stdout is one; none of them is replaced."""
    link = tmp_path / "stdout"
    link.symlink_to("/proc/self/fd/1")
    conf = tmp_path / "conf"
    out = (tmp_path / "out").open("w+b")
    with reserve_port() as holder, out:
        out.write(b"before\n")
        out.flush()
        listen = f"127.0.0.1:{port_of(holder)}"
        conf.write_text(f"OutAddress: {server.address}\nListen: {listen}\n")
        process = subprocess.Popen(
            [*program_under_test(), "-d", "0", "-f", conf, "-p", link],
            stdout=subprocess.PIPE if kind == "pipe" else out,
        )
        expected = b"%d\n" % process.pid
        if process.stdout:
            assert process.stdout.readline() == expected
        else:
            wanted = b"before\n" + expected
            assert poll(lambda: (tmp_path / "out").read_bytes() == wanted)
        process.terminate()
        assert process.wait(PATIENCE) == 0
        if process.stdout:
            process.stdout.close()
    assert link.is_symlink()


def test_pid_file_that_is_a_fifo(proxsmtpd: StartDaemon, tmp_path: Path) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    daemon = proxsmtpd({"PidFile": path})
    daemon.connect().reply()
    assert os.read(reader, 100) == b"%d\n" % daemon.process.pid
    os.close(reader)
    assert daemon.stop() == 0
    assert stat.S_ISFIFO(path.lstat().st_mode)


def test_inherited_descriptors_are_closed(proxsmtpd: StartDaemon) -> None:
    """The caller may wait for the end of one of them."""
    read_end, write_end = os.pipe()
    proxsmtpd(pass_fds=[write_end])
    os.close(write_end)
    assert os.read(read_end, 1) == b""
    os.close(read_end)


# --- The log ---


def test_lines_begin_with_the_name(proxsmtpd: StartDaemon) -> None:
    daemon = proxsmtpd({"FilterCommand": "cat"})
    client = daemon.connect()
    client.message(MESSAGE)
    client.quit()
    assert daemon.stop() == 0
    assert all(line.startswith("proxsmtpd: ") for line in daemon.log().splitlines())


@pytest.mark.parametrize(
    ("level", "shown", "hidden"),
    [
        (0, None, "."),
        (3, r"^proxsmtpd: [0-9A-F]{6}: client=127\.0\.0\.1, ", "CLIENT [<>]"),
        (4, "^proxsmtpd: [0-9A-F]{6}: CLIENT < RCPT TO:<b@example.com>$", None),
        (4, "^proxsmtpd: [0-9A-F]{6}: SERVER > RCPT TO:<b@example.com>$", None),
        (4, "^proxsmtpd: [0-9A-F]{6}: SERVER < 250 2.1.5 Ok$", None),
        (4, "^proxsmtpd: [0-9A-F]{6}: CLIENT > 250 2.1.5 Ok$", None),
    ],
)
def test_levels(
    level: int, shown: str | None, hidden: str | None, proxsmtpd: StartDaemon
) -> None:
    daemon = proxsmtpd({"FilterCommand": "cat"}, level=level)
    client = daemon.connect()
    client.message(MESSAGE)
    client.quit()
    assert daemon.stop() == 0
    if shown:
        assert re.search(shown, daemon.log(), re.M)
    if hidden:
        assert not re.search(hidden, daemon.log(), re.M)


def test_missing_filter_is_logged_once(proxsmtpd: StartDaemon) -> None:
    daemon = proxsmtpd()
    client = daemon.connect()
    client.message(MESSAGE)
    client.envelope()
    client.message(MESSAGE)
    client.quit()
    daemon.stop()
    assert daemon.log().count("no filter command specified") == 1


@as_root
@with_mounts
def test_syslog(detach: Detach, place: Path) -> None:
    """A daemon logs to facility mail, as proxsmtpd, everything but debug."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as log:
        log.settimeout(PATIENCE)
        program = mounted(fake_devices(place, log), "/dev")
        daemon = detach({"FilterCommand": "exit 127"}, program=program)
        assert send(daemon.address) == b"451 Local Error\r\n"
        records: list[bytes] = []
        while not records or b"status=FILTER-ERROR" not in records[-1]:
            records.append(log.recv(65536))
        os.kill(daemon.pid, signal.SIGUSR1)
        while b": statistics: " not in records[-1]:
            records.append(log.recv(65536))
        daemon.end()
    form = rb"<(\d+)>[A-Z][a-z]{2} [ \d]\d \d\d:\d\d:\d\d proxsmtpd(\[\d+\])?: .*"
    found = [re.fullmatch(form, record.rstrip(b"\0\n")) for record in records]
    assert all(found), records
    priorities = [int(match[1]) for match in found if match]
    assert {priority >> 3 for priority in priorities} == {2}
    levels = dict(zip(records, (priority & 7 for priority in priorities)))
    for text, level in {
        b": filter command could not be run": 3,
        b": running as root is NOT recommended": 4,
        b": statistics: since ": 5,
        b": running as a daemon": 6,
        b": client=127.0.0.1, from=a@example.com": 6,
    }.items():
        assert [n for r, n in levels.items() if text in r] == [level], text
    assert max(levels.values()) < 7


@as_root
@with_mounts
def test_message_is_answered_while_the_system_log_is_stuck(
    detach: Detach, place: Path, server: ScriptedServer
) -> None:
    """A client without a reply would send the accepted message again."""
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as log,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other,
    ):
        program = mounted(fake_devices(place, log), "/dev")
        daemon = detach({"FilterCommand": "cat"}, program=program)
        with RawClient(daemon.address) as client:
            client.start()
            client.expect(b"DATA", b"354")
            other.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    other.sendto(b"x", log.getsockname())
            assert client.command(b"x\r\n.") == b"250 2.0.0 Ok: queued\r\n"
            while b"status=FILTERED" not in log.recv(65536):
                pass
            client.quit()
        daemon.end()
    assert len(server.messages) == 1


@as_root
@with_mounts
def test_syslog_of_very_many_recipients(detach: Detach, place: Path) -> None:
    """Each line is short enough for a daemon that takes 8 KiB, and is whole."""
    recipients = [b"<%03d%s@example.com>" % (n, b"\xe4" * 200) for n in range(500)]
    found: list[bytes] = []

    def read(log: socket.socket) -> None:
        while len(found) < len(recipients):
            record = log.recv(1 << 20).rstrip(b"\0\n")
            if b"client=" in record:
                assert record.endswith(b", status=FILTERED")
                assert len(record) < 8192
                found.extend(re.findall(rb", to=(\d{3})", record))

    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as log,
        ThreadPoolExecutor() as reader,
    ):
        log.settimeout(PATIENCE)
        program = mounted(fake_devices(place, log), "/dev")
        daemon = detach({"FilterCommand": "cat"}, program=program)
        reading = reader.submit(read, log)
        with RawClient(daemon.address) as client:
            assert client.message(MESSAGE, recipients=recipients) == QUEUED
        reading.result()
        daemon.end()
    assert found == [b"%03d" % number for number in range(500)]


# --- The end of a start ---


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("is_stopped", [False, True], ids=["", "stopped"])
def test_signal_for_the_parent_of_a_starting_daemon(
    number: int, is_stopped: bool, config: Callable[[str], Path], server: ScriptedServer
) -> None:
    """The parent passes it on, and fails when its child has ended."""
    read_end, write_end = full_pipe()
    with reserve_port() as holder:
        address = f"127.0.0.1:{port_of(holder)}"
        path = config(f"Listen: {address}\nOutAddress: {server.address}\n")
        command = [*program_under_test(), "-f", str(path), "-p/dev/stdout"]
        mark = uuid.uuid4().hex
        parent = subprocess.Popen(
            command,
            env={**os.environ, MARKER: mark},
            stdout=write_end,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            # The child waits for a reader of its pid.
            assert poll(lambda: len(marked_processes(mark)) == 2)
            (child,) = marked_processes(mark).keys() - {parent.pid}
            if is_stopped:
                os.kill(child, signal.SIGSTOP)
            parent.send_signal(number)
            _, errors = parent.communicate(timeout=PATIENCE)
            assert parent.returncode == 1
            assert TRACEBACK not in errors
            assert marked_processes(mark) == {}
            assert not is_listening(address)
        finally:
            for pid in marked_processes(mark):
                os.kill(pid, signal.SIGKILL)
            parent.wait()
            os.close(read_end)
            os.close(write_end)


def full_pipe() -> tuple[int, int]:
    """Return a pipe's two ends; whoever writes more to it has to wait."""
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(write_end, b"x")
    os.set_blocking(write_end, True)
    return read_end, write_end
