"""Local security: files, privileges, the log, and what the filter inherits.

The enemy is another user of the machine, who plants files where we write; the filter,
which may be fooled by the mail that it reads; and whoever talks to us, whose words get
into the log.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import stat
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Callable, NamedTuple

import pytest

import proxsmtpd as program
from detached import Detach
from helpers import (
    LOCAL_ERROR,
    MARKER,
    MESSAGE,
    PATIENCE,
    QUEUED,
    STALE_ENVIRONMENT,
    Daemon,
    MakeServer,
    StartDaemon,
    as_root,
    children,
    fake_devices,
    mounted,
    open_files,
    poll,
    port_of,
    program_under_test,
    reserve_port,
    run,
    some_user,
    with_mounts,
)
from smtp import Action, Close, Handler, RawClient, ScriptedServer

SECRET = b"nobody else's business\n"


# --- Temporary files ---


def descriptors_in(pid: int, directory: Path) -> list[Path]:
    """Return the descriptors of a process, in /proc, for files in a directory."""
    files = open_files(pid).items()
    return [path for path, name in files if name.startswith(f"{directory}/")]


def test_spooled_mail_has_no_name(proxsmtpd: StartDaemon) -> None:
    """A file that nobody else can open, and that no filter inherits."""
    daemon = proxsmtpd({"FilterCommand": "cat"}, umask=0)
    client = daemon.connect()
    client.start()
    client.expect(b"DATA", b"354")
    client.send(b"0123456789abcde\r\n" * 180_000)
    pid = daemon.process.pid
    assert poll(lambda: descriptors_in(pid, daemon.tempdir)), (
        "the mail is not in a file"
    )
    assert list(daemon.tempdir.iterdir()) == []
    (spool,) = descriptors_in(pid, daemon.tempdir)
    status = spool.stat()
    assert stat.S_ISREG(status.st_mode)
    assert stat.S_IMODE(status.st_mode) == 0o600
    assert (status.st_nlink, status.st_uid) == (0, os.geteuid())
    info = Path(f"/proc/{pid}/fdinfo/{spool.name}").read_text()
    flags = int(re.findall(r"^flags:\s*(\d+)$", info, re.M)[0], 8)
    assert flags & os.O_CLOEXEC
    assert client.command(b".") == QUEUED
    assert descriptors_in(pid, daemon.tempdir) == []


def test_names_of_files_for_filters(proxsmtpd: StartDaemon, tmp_path: Path) -> None:
    """They are in TempDirectory, are not used again, and reveal nothing."""
    names = tmp_path / "names"
    command = f'echo "$EMAIL" >> {names}'
    daemon = proxsmtpd({"FilterType": "file", "FilterCommand": command})
    client = daemon.connect()
    client.start()
    for _ in range(20):
        assert client.message(MESSAGE) == QUEUED
        client.envelope()
    paths = [Path(line) for line in names.read_text().splitlines()]
    assert {path.parent for path in paths} == {daemon.tempdir}
    ends = {path.name.rpartition(".")[2] for path in paths}
    assert len(ends) == 20
    assert all(re.fullmatch("[0-9a-f]{12}", end) for end in ends)
    # Of random names hardly two begin alike; of a counter's or a clock's all do.
    assert len({end[:4] for end in ends}) > 15


class Target(NamedTuple):
    """A place where a file of ours is expected, and what must stay as it is."""

    path: Path
    untouched: Path
    absent: Path

    def check(self) -> None:
        """See that nobody has walked into it."""
        assert self.untouched.read_bytes() == SECRET
        assert stat.S_IMODE(self.untouched.stat().st_mode) == 0o640
        assert not self.absent.exists()

    def hard_link(self) -> None:
        """Plant another name of the file that must stay as it is."""
        os.link(self.untouched, self.path)

    def clear(self) -> None:
        """Take away what was planted."""
        if not self.path.is_symlink() and self.path.is_dir():
            self.path.rmdir()
        else:
            self.path.unlink()


@pytest.fixture
def target(place: Path) -> Target:
    """Provide a directory like /tmp, and a file beside it that must stay as it is."""
    untouched = place / "untouched"
    untouched.write_bytes(SECRET)
    untouched.chmod(0o640)
    return Target(place / "temp" / "file", untouched, place / "absent")


Plant = Callable[[Target], object]
PLANT: Mapping[str, Plant] = {
    "link": lambda target: target.path.symlink_to(target.untouched),
    "dangling link": lambda target: target.path.symlink_to(target.absent),
    "link to itself": lambda target: target.path.symlink_to(target.path),
    "hard link": lambda target: target.hard_link(),
    "file": lambda target: target.path.write_bytes(
        b"planted, and longer than a number\n"
    ),
    "fifo": lambda target: os.mkfifo(target.path),
}
PLANT_MORE: Mapping[str, Plant] = {
    **PLANT,
    "directory": lambda target: target.path.mkdir(),
}


def planted(target: Target, what: str) -> None:
    """Plant something, as another user where we are root."""
    PLANT_MORE[what](target)
    if os.geteuid() == 0:
        user = some_user()
        os.chown(target.path, user.pw_uid, user.pw_gid, follow_symlinks=False)
        os.chown(target.untouched, 0, 0)  # a hard link's other name


@pytest.mark.parametrize("unnamed", [False, True])
@pytest.mark.parametrize("what", PLANT_MORE)
def test_planted_temporary_file(
    what: str, unnamed: bool, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that has the name already is left alone, and another name is taken."""
    directory = os.fsencode(target.path.parent)
    randoms = iter([b"\xaa" * 6, b"\xaa" * 6, b"\xbb" * 6])
    monkeypatch.setattr(os, "urandom", lambda _size: next(randoms))
    target = target._replace(path=target.path.with_name("proxsmtpd." + "aa" * 6))
    planted(target, what)
    before = target.path.lstat()
    if unnamed:
        monkeypatch.delattr(os, "O_TMPFILE", raising=False)
        descriptor = program.create_unnamed_file(directory)
        assert os.listdir(directory) == [os.fsencode(target.path.name)]
    else:
        descriptor, path = program.create_file(directory)
        assert path == directory + b"/proxsmtpd." + b"bb" * 6
        os.unlink(path)
    status = os.fstat(descriptor)
    os.write(descriptor, b"mail")
    os.close(descriptor)
    assert stat.S_IMODE(status.st_mode) == 0o600
    after = target.path.lstat()
    assert (after.st_ino, after.st_size) == (before.st_ino, before.st_size)
    target.check()
    target.clear()


# --- What a filter leaves at EMAIL ---

# By its last name, since the whole path may be too long for a socket.
PYTHON_SOCKET = (
    "import os, socket; place, name = os.path.split(os.environ['EMAIL']);"
    " os.chdir(place); socket.socket(1).bind(name)"
)
LEFT = {
    "link": 'ln -s {outside}/secret "$EMAIL"',
    "link to a link": 'ln -s {outside}/link "$EMAIL"',
    "link to a directory": 'ln -s {outside} "$EMAIL"',
    "link to a fifo": 'ln -s {outside}/fifo "$EMAIL"',
    "link to a device": 'ln -s /dev/zero "$EMAIL"',
    "dangling link": 'ln -s {outside}/absent "$EMAIL"',
    "fifo": 'mkfifo "$EMAIL"',
    "fifo with a writer": 'mkfifo "$EMAIL"; echo $$ > "$EMAIL" &',
    "socket": f'{sys.executable} -ISc "{PYTHON_SOCKET}"',
    "directory": 'mkdir "$EMAIL"',
    "directory with a link": 'mkdir "$EMAIL"; ln -s {outside} "$EMAIL/link"',
    "directory with much in it": (
        'mkdir -p "$EMAIL/a/b/c"; ln {outside}/secret "$EMAIL/a/b/hard"; '
        'mkfifo "$EMAIL/a/fifo"; chmod 0 "$EMAIL/a"'
    ),
    "directory deeper than a stack": (
        "levels=$(head -c 1500 /dev/zero | sed 's|.|d/|g'); mkdir -p \"$EMAIL/$levels\""
    ),
    "directory through a link": 'mkdir "$EMAIL.d"; mv "$EMAIL.d" "$EMAIL"',
}


def test_file_filter_leaves_no_file(
    proxsmtpd: StartDaemon, server: ScriptedServer, tmp_path: Path
) -> None:
    """Nothing outside is read, sent, changed or removed, and nobody waits."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(SECRET)
    (outside / "link").symlink_to(outside / "secret")
    os.mkfifo(outside / "fifo")
    for number, script in enumerate(LEFT.values()):
        text = 'rm "$EMAIL"\n' + script.format(outside=outside)
        (tmp_path / str(number)).write_text(text)
    before = {path: path.lstat().st_ino for path in outside.iterdir()}
    command = f'. {tmp_path}/"${{SENDER%@*}}"'
    settings = {"FilterType": "file", "FilterCommand": command, "FilterTimeout": 5}
    daemon = proxsmtpd(settings)
    client = daemon.connect()
    client.start()
    for number, name in enumerate(LEFT):
        client.command(b"RSET")
        client.envelope(b"<%d@example.com>" % number)
        assert client.message(MESSAGE) == LOCAL_ERROR, name
        assert list(daemon.tempdir.iterdir()) == [], name
    client.quit()
    assert b"DATA" not in server.connections[0].lines
    assert {path: path.lstat().st_ino for path in outside.iterdir()} == before
    assert (outside / "secret").read_bytes() == SECRET


# --- The pid file ---


@pytest.mark.parametrize("what", PLANT)
def test_planted_pid_file(what: str, target: Target, proxsmtpd: StartDaemon) -> None:
    """It is replaced by one of ours, in a directory where all may write."""
    planted(target, what)
    if what == "fifo":  # our own would be written to
        if os.geteuid() != 0:
            pytest.skip("needs root")
        os.chown(target.path, some_user().pw_uid, -1)
    daemon = proxsmtpd({"PidFile": target.path})
    status = target.path.lstat()
    assert stat.S_ISREG(status.st_mode)
    assert stat.S_IMODE(status.st_mode) == 0o644
    assert (status.st_uid, status.st_nlink) == (os.geteuid(), 1)
    assert target.path.read_text() == f"{daemon.process.pid}\n"
    target.check()
    assert daemon.stop() == 0
    target.check()
    assert list(target.path.parent.iterdir()) == []


def test_directory_in_place_of_the_pid_file(
    target: Target, place: Path, server: ScriptedServer
) -> None:
    planted(target, "directory")
    with reserve_port() as holder:
        config = place / "conf"
        listen = f"127.0.0.1:{port_of(holder)}"
        config.write_text(f"OutAddress: {server.address}\nListen: {listen}\n")
        result = run("-f", config, "-p", target.path)
    assert result.returncode == 1
    assert f"couldn't open pid file: {target.path}: " in result.stderr
    assert list(target.path.parent.iterdir()) == [target.path]
    target.path.rmdir()


@pytest.mark.parametrize("what", PLANT)
def test_planted_beside_the_pid_file(what: str, target: Target) -> None:
    """The name of the new file, before it is renamed, is no secret."""
    beside = target.path.with_name(f"file.{os.getpid()}")
    planted(target._replace(path=beside), what)
    pid_file = program.PidFile(str(target.path))
    pid_file.write()
    assert target.path.read_text() == f"{os.getpid()}\n"
    assert list(target.path.parent.iterdir()) == [target.path]
    target.check()
    pid_file.remove()
    assert list(target.path.parent.iterdir()) == []


@as_root
@pytest.mark.parametrize("what", ["link", "dangling link", "link to itself", "fifo"])
def test_pid_file_of_a_user(what: str, target: Target) -> None:
    """One who may not remove what is planted does not follow it either."""
    user = some_user()
    PLANT[what](target)  # as root: what is his, a sticky directory keeps
    os.chown(target.untouched, user.pw_uid, user.pw_gid)
    target.absent.parent.chmod(0o777)
    os.seteuid(user.pw_uid)
    try:
        with pytest.raises(OSError, match=r"Permission denied|symbolic links"):
            program.PidFile(str(target.path)).write()
    finally:
        os.seteuid(0)
    target.check()
    assert list(target.path.parent.iterdir()) == [target.path]
    target.clear()


@pytest.mark.parametrize("what", PLANT_MORE)
def test_pid_file_exchanged(what: str, target: Target, proxsmtpd: StartDaemon) -> None:
    """The daemon ends, and leaves alone a file that is not its own."""
    daemon = proxsmtpd({"PidFile": target.path})
    target.path.unlink()
    planted(target, what)
    before = target.path.lstat()
    assert daemon.stop(timeout=4) == 0
    target.check()
    after = target.path.lstat()
    assert (after.st_ino, after.st_size) == (before.st_ino, before.st_size)
    target.clear()


# --- Privileges ---


@as_root
def test_listening_socket_exchanged(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The socket's owner is changed as root: a link in its place is not followed."""
    planted(target, "link")
    for name in ("initgroups", "setgid", "setuid"):
        monkeypatch.setattr(os, name, lambda *_: None)
    monkeypatch.setattr(program, "_can_be_root", lambda: False)
    config = program.default_config()
    config.user = some_user().pw_name
    config.listen = program.Address.parse(str(target.path), 10025)
    # Whether it refuses to go on, or changes the link's owner, is all the same.
    with contextlib.suppress(program.SystemRefused):
        program.drop_privileges(config, program.Log(0))
    assert target.untouched.stat().st_uid == 0
    target.path.unlink()


IDENTITY = ("Uid", "Gid", "Groups", "CapPrm", "CapEff", "CapAmb")


def identity(status: str) -> dict[str, list[str]]:
    """Return the users and groups of a thread, from its status in /proc."""
    return {
        name: re.findall(rf"^{name}:\s*(.*)$", status, re.M)[0].split()
        for name in IDENTITY
    }


@as_root
def test_every_thread_and_the_filter(detach: Detach, place: Path) -> None:
    """None of them has kept anything of root, its groups or its capabilities."""
    user = some_user()
    saved = place / "temp" / "status"
    settings = {
        "User": user.pw_name,
        "FilterCommand": f"cat /proc/self/status > {saved}; cat",
        "Processes": 2,
    }
    daemon = detach(settings, extra_groups=[0, 1, 4, 20])
    with RawClient(daemon.address) as idle, RawClient(daemon.address) as client:
        idle.reply()
        assert client.message(MESSAGE) == QUEUED
        pids = [daemon.pid, *children(daemon.pid)]
        tasks = [t for pid in pids for t in Path(f"/proc/{pid}/task").iterdir()]
        threads = [identity((task / "status").read_text()) for task in tasks]
        client.quit()
    groups = sorted(os.getgrouplist(user.pw_name, user.pw_gid))
    expected = {
        "Uid": [str(user.pw_uid)] * 4,
        "Gid": [str(user.pw_gid)] * 4,
        "Groups": [str(group) for group in groups],
        **{name: ["0" * 16] for name in ("CapPrm", "CapEff", "CapAmb")},
    }
    assert len(threads) >= 4
    assert threads == [expected] * len(threads)
    assert identity(saved.read_text()) == expected
    saved.unlink()


# --- The log ---

# What could forge a line, hide one, or write to the administrator's terminal.
HOSTILE = [
    bytes(octet for octet in range(1, 256) if octet not in b"\r\n<>"),
    b"\rproxsmtpd: FORGED",
    b"\nproxsmtpd: FORGED",
    b"\r\0\nproxsmtpd: FORGED",
    b"\vproxsmtpd: FORGED\f",
    b"\x85proxsmtpd: FORGED",
    "\u0085proxsmtpd: FORGED\u2028proxsmtpd: FORGED\u2029".encode(),
    b"\x1b[2K\x1b[1Gproxsmtpd: FORGED",
    b"\x1b]0;FORGED\x07\x9b31m\x08\x08\x7f",
    "\u202eDEGROF\u200f".encode(),
    b"%s%n%m%d%%s",
    b"\\n\\x0aproxsmtpd: FORGED",
]
LINES = [
    b"%s",
    b"NOOP %s",
    b"HELO %s",
    b"EHLO %s",
    b"VRFY %s",
    b"XFORWARD ADDR=%s HELO=%s",
    b"XCLIENT ADDR=%s",
    b"BURL %s",
    b"AUTH %s",
    b"DATA %s",
    b"MAIL FROM:<%s>",
    b"RCPT TO:<%s>",
]


def talk(daemon: Daemon, octets: bytes) -> None:
    """Say everything that a client can say, with these octets in it."""
    with RawClient(daemon.address) as client:
        say_all(client, octets)


def say_all(client: RawClient, octets: bytes) -> None:
    """Have the whole dialogue of `talk`."""
    client.reply()
    for line in LINES:
        client.send(line.replace(b"%s", octets) + b"\r\n")
        client.reply()
    path = b"<%s@example.com>" % octets.translate(None, b"\r\n\0")
    client.send(b"MAIL FROM:%s\r\n" % path)  # refused for a control character
    client.reply()
    client.expect(b"RSET", b"250")
    client.envelope(b'<"%s"@example.com>' % quotable(octets))
    client.expect(b"DATA", b"354")
    client.send(octets + b"\r\n.\r\nQUIT\r\n")
    client.rest()


def quotable(octets: bytes) -> bytes:
    """Return the octets without those that a quoted local part may not have."""
    return re.sub(rb'[\x00-\x1f\x7f"\\]', b"", octets)


def reply_with(octets: bytes) -> bytes:
    """Return a server's reply with these octets, in a form that still is a reply."""
    inline = octets.translate(None, b"\n")
    return b"250-" + inline + b"\r\n250 " + inline + b"\r\n"


def check_lines(lines: Iterable[bytes], start: bytes = b"proxsmtpd: ") -> None:
    """See that log lines are ours, each of them one line of printable ASCII."""
    wrong = [
        line
        for line in lines
        if not re.fullmatch(start + rb"[ -~]*", line)
        or re.match(start + rb"(?:FORGED|$)", line)
    ]
    assert wrong == []


@pytest.fixture
def raw_log(tmp_path: Path) -> Path:
    """Return the path of the log of `logging`, octet by octet."""
    return tmp_path / "log"


def logging_to(path: Path) -> list[str]:
    """Return the program under test, with standard error in a file."""
    script = 'exec 2> "$0"; exec "$@"'
    return ["sh", "-c", script, str(path), *program_under_test()]


@pytest.mark.parametrize("command", ["cat", None], ids=["filtered", "streamed"])
def test_log_of_the_dialogue(
    command: str | None,
    make_server: MakeServer,
    proxsmtpd: StartDaemon,
    raw_log: Path,
) -> None:
    """Level 4 logs the lines of client and server, which cannot forge one."""
    server = make_server()
    usual = dict(server.script)
    settings = {"FilterCommand": command} if command else {}
    daemon = proxsmtpd(settings, server=server, program=logging_to(raw_log))
    for octets in HOSTILE:
        talk(daemon, octets)
        for verb in ("NOOP", "VRFY", "HELO", "EHLO", "XFORWARD", "MAIL", "RCPT"):
            server.script[verb] = reply_with(octets)
        talk(daemon, b"x")
        server.script.update(usual)
        for verb in ("GREETING", "EHLO", "DATA", "DOT", "QUIT"):
            for reply in (b"554 " + octets + b"\r\n", octets + b"\r\n"):
                server.script.update({**usual, verb: Close(reply)})
                drain(daemon)
        server.script.update(usual)
    assert daemon.stop() == 0
    log = raw_log.read_bytes()
    assert log.count(b"FORGED") > 100
    assert log.endswith(b"\n")
    check_lines(log[:-1].split(b"\n"))


DIALOGUE = b"""\
EHLO client.example
MAIL FROM:<a@example.com>
RCPT TO:<b@example.com>
DATA
x
.
QUIT
""".replace(b"\n", b"\r\n")


def drain(daemon: Daemon) -> None:
    """Send a whole message without reading, then read all replies."""
    with RawClient(daemon.address) as client:
        with contextlib.suppress(ConnectionError):
            client.send(DIALOGUE)
        client.rest()


# How a filter gets its words into the log.
SAYING = {
    "refusal": "cat {words} >&2; exit 1",
    "refusal with a code": "printf '554 ' >&2; cat {words} >&2; exit 1",
    "no such program": "cat {words} >&2; exit 127",
    "killed": "cat {words} >&2; kill -9 $$",
    "flood": 'yes "$(tr -d "\\0" < {words})" | head -c 99999 >&2; exit 1',
}


def test_log_of_the_filter(
    proxsmtpd: StartDaemon, tmp_path: Path, raw_log: Path
) -> None:
    """The filter's words come into the log as one line."""
    for number, octets in enumerate(HOSTILE):
        (tmp_path / f"words{number}").write_bytes(octets)
    words = f'{tmp_path}/words"${{SENDER%@*}}"'
    script = "case $RECIPIENTS in\n"
    for number, command in enumerate(SAYING.values()):
        script += f"{number}@*) {command.format(words=words)};;\n"
    (tmp_path / "script").write_text(script + "esac")
    settings = {"FilterCommand": f". {tmp_path}/script"}
    daemon = proxsmtpd(settings, program=logging_to(raw_log))
    client = daemon.connect()
    client.start()
    for words_number in range(len(HOSTILE)):
        for number in range(len(SAYING)):
            client.command(b"RSET")
            recipient = b"<%d@example.com>" % number
            client.envelope(b"<%d@example.com>" % words_number, [recipient])
            reply = client.message(MESSAGE)
            assert re.fullmatch(rb"[45]\d\d[ -~]*\r\n", reply), reply
    client.quit()
    assert daemon.stop() == 0
    log = raw_log.read_bytes()
    assert log.count(b"FORGED") > 20
    check_lines(log[:-1].split(b"\n"))


@as_root
@with_mounts
def test_log_in_the_system_log(
    detach: Detach, place: Path, server: ScriptedServer
) -> None:
    """There too, every message of ours is one, and says what it was given."""
    server.script["DOT"] = b"554 " + HOSTILE[0] + b"\r\n"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as log:
        log.settimeout(PATIENCE)
        program = mounted(fake_devices(place, log), "/dev")
        daemon = detach({"FilterCommand": "cat"}, program=program)
        records: list[bytes] = []
        for octets in HOSTILE:
            with RawClient(daemon.address) as client:
                client.start(b'<"%s"@example.com>' % quotable(octets))
                client.message(MESSAGE)
                client.quit()
            while not records or b"status=554 " not in records[-1]:
                records.append(log.recv(65536).rstrip(b"\0\n"))
            records[-1] += b" seen"
            records[-1] = records[-1].replace(b"status=554 ", b"")
        daemon.end()
    header = rb"<\d+>[A-Z][a-z]{2} [ \d]\d \d\d:\d\d:\d\d proxsmtpd(?:\[\d+\])?: "
    check_lines(records, header)
    assert sum(record.endswith(b" seen") for record in records) == len(HOSTILE)
    assert any(b'from="%s%n%m%d%%s"@example.com,' in record for record in records)


# --- Secrets ---

CHALLENGE = b"334 VXNlcm5hbWU6\r\n"
REFUSED = b"535 5.7.8 Error: authentication failed\r\n"
USER, PASSWORD = b"c2VzYW1lLXVzZXI=", b"c2VzYW1lLXBhc3M="


class Exchange(NamedTuple):
    """An AUTH exchange: what the client sends at once, and the server's replies."""

    writes: Sequence[bytes]
    auth: bytes
    answers: Sequence[Action] = (b"235 2.7.0 Yes\r\n",)

    def run(self, client: RawClient) -> None:
        """Be the client, from the greeting to its end."""
        client.reply()
        for octets in self.writes:
            client.send(octets + b"\r\n")
            client.reply()
        with contextlib.suppress(ConnectionError):
            client.send(b"QUIT\r\n")
        client.rest()


EXCHANGES = {
    "initial response": Exchange([b"AUTH PLAIN " + USER], b"235 2.7.0 Yes\r\n"),
    "initial response refused": Exchange([b"AUTH PLAIN " + USER], REFUSED),
    "initial response unknown": Exchange([b"AUTH X " + USER], b"504 5.5.4 What\r\n"),
    "initial response goes on": Exchange([b"AUTH LOGIN " + USER, PASSWORD], CHALLENGE),
    "lower case": Exchange([b"auth plain " + USER], REFUSED),
    "blanks": Exchange([b" AUTH\t PLAIN \t" + USER + b" "], REFUSED),
    "odd blanks": Exchange([b"\vAUTH\fPLAIN\v" + USER], REFUSED),
    "two responses": Exchange([b"AUTH PLAIN " + USER + b" " + PASSWORD], REFUSED),
    "with a NUL": Exchange([b"AUTH PLAIN \0" + USER], REFUSED),
    "with an LF": Exchange([b"AUTH PLAIN\n" + USER], REFUSED),
    "over-long": Exchange([b"AUTH PLAIN " + USER * 1000], REFUSED),
    "long": Exchange([b"AUTH PLAIN " + USER * 700], REFUSED),
    "LOGIN": Exchange([b"AUTH LOGIN", USER, PASSWORD], CHALLENGE, [CHALLENGE, REFUSED]),
    "LOGIN at once": Exchange(
        [b"\r\n".join([b"AUTH LOGIN", USER, PASSWORD])], CHALLENGE, [CHALLENGE, REFUSED]
    ),
    "answer refused": Exchange([b"AUTH LOGIN", USER], CHALLENGE, [REFUSED]),
    "answer too long": Exchange([b"AUTH LOGIN", USER * 1000], CHALLENGE, [REFUSED]),
    "answer far too long": Exchange(
        [b"AUTH LOGIN", USER * 50000], CHALLENGE, [REFUSED]
    ),
    "answer with a NUL": Exchange([b"AUTH LOGIN", b"\0" + USER], CHALLENGE, [REFUSED]),
    "answer with an LF": Exchange(
        [b"AUTH LOGIN", USER + b"\n" + PASSWORD], CHALLENGE, [REFUSED]
    ),
    "answer with a CR": Exchange([b"AUTH LOGIN", USER + b"\r"], CHALLENGE, [REFUSED]),
    "answer like a command": Exchange(
        [b"AUTH LOGIN", b"NOOP " + USER], CHALLENGE, [REFUSED]
    ),
    "answer nobody reads": Exchange([b"AUTH LOGIN", USER], CHALLENGE, [Close()]),
    "server goes": Exchange(
        [b"AUTH LOGIN", USER], CHALLENGE, [Close(b"421 4.3.2 Going\r\n")]
    ),
    "unusable reply": Exchange([b"AUTH LOGIN", USER], CHALLENGE, [b"what?\r\n"]),
    "354": Exchange([b"AUTH LOGIN", USER], CHALLENGE, [b"354 Go\r\n"]),
}


def in_turn(replies: Sequence[Action]) -> Handler:
    """Answer one line after the other with these replies."""
    left = iter(replies)
    return lambda _connection, _line: next(left)


def test_secrets_are_not_logged(
    server: ScriptedServer, proxsmtpd: StartDaemon, raw_log: Path
) -> None:
    """Neither what AUTH is given nor any answer, whatever becomes of it."""
    daemon = proxsmtpd(program=logging_to(raw_log))
    for exchange in EXCHANGES.values():
        server.script["AUTH"] = exchange.auth
        server.script["334"] = in_turn(exchange.answers)
        with RawClient(daemon.address) as client:
            exchange.run(client)
    # The last octets of a client that leaves, or ends its lines otherwise.
    server.script["AUTH"], server.script["334"] = CHALLENGE, REFUSED
    for rest in (USER, USER + b"\r", USER + b"\n"):
        with RawClient(daemon.address) as client:
            client.reply()
            client.expect(b"AUTH LOGIN", b"334")
            client.send(rest)
            client.half_close()
            client.rest()
    assert daemon.stop() == 0
    log = raw_log.read_bytes()
    assert [line for line in log.split(b"\n") if re.search(rb"c2VzYW1|lLX", line)] == []
    # It does log the rest, so that there was something to be seen.
    assert log.count(b"SERVER > AUTH PLAIN [...]\n") >= 5
    assert log.count(b"CLIENT < AUTH LOGIN\n") >= 10


# --- What the filter inherits ---

# A shell's own doing.
SHELLS = {b"PWD", b"OLDPWD", b"SHLVL", b"_"}


def environment(path: Path) -> dict[bytes, bytes]:
    """Return the environment that a filter has saved there."""
    pairs = [entry.partition(b"=") for entry in path.read_bytes().split(b"\0")[:-1]]
    return {name: value for name, _, value in pairs if name not in SHELLS}


def test_whole_environment(proxsmtpd: StartDaemon, tmp_path: Path) -> None:
    """The filter has the daemon's environment, with our variables for stale ones."""
    saved = tmp_path / "environ"
    plain = {"PATH": os.environ["PATH"], "ODD": "a=b\nc\udcff", "EMPTY": ""}
    given = [
        f"{name}={value}" for name, value in {**plain, **STALE_ENVIRONMENT}.items()
    ]
    keep_mark = f'exec env -i {MARKER}="${MARKER}" "$@"'
    daemon = proxsmtpd(
        {"FilterCommand": f"cat /proc/self/environ > {saved}; cat"},
        program=["sh", "-c", keep_mark, "sh", *given, *program_under_test()],
    )
    assert daemon.connect().message(MESSAGE) == QUEUED
    seen = environment(saved)
    assert seen.pop(os.fsencode(MARKER)) == daemon.mark.encode()
    assert seen == {
        **{os.fsencode(name): os.fsencode(value) for name, value in plain.items()},
        b"CLIENT": b"127.0.0.1",
        b"SERVER": b"127.0.0.1",
        b"SENDER": b"a@example.com",
        b"RECIPIENTS": b"b@example.com",
        b"TMPDIR": os.fsencode(daemon.tempdir),
    }


def test_variables_without_a_value_are_unset(
    make_server: MakeServer, proxsmtpd: StartDaemon, tmp_path: Path
) -> None:
    """On unix sockets nobody has an address; not the daemon's old one either."""
    saved = tmp_path / "environ"
    server = make_server(host=str(tmp_path / "server"))
    settings = {
        "Listen": tmp_path / "client",
        "FilterCommand": f"cat /proc/self/environ > {saved}; cat",
    }
    daemon = proxsmtpd(settings, server=server, env=STALE_ENVIRONMENT)
    assert daemon.connect().message(MESSAGE) == QUEUED
    seen = environment(saved)
    assert not {b"CLIENT", b"SERVER", b"REMOTE", b"REMOTE_HELO", b"EMAIL"} & set(seen)
    assert b"stale" not in seen.values()


BETWEEN = [
    b"RSET",
    b"EHLO again.example",
    b"HELO again.example",
    b"XFORWARD ADDR=[UNAVAILABLE] HELO=[TEMPUNAVAIL]",
    b"XFORWARD ADDR=+0A HELO=a+7Fb",
]


def test_nothing_of_the_last_message(proxsmtpd: StartDaemon, tmp_path: Path) -> None:
    """REMOTE and REMOTE_HELO are one mail transaction's; a null sender is empty."""
    saved = tmp_path / "environ"
    command = f"cat /proc/self/environ > {saved}; cat"
    daemon = proxsmtpd({"FilterCommand": command}, env=STALE_ENVIRONMENT)
    for between in BETWEEN:
        client = daemon.connect()
        client.start()
        assert client.message(MESSAGE) == QUEUED
        client.expect(b"XFORWARD ADDR=192.0.2.1 HELO=far.example", b"250")
        client.envelope()
        assert client.message(MESSAGE) == QUEUED
        assert environment(saved)[b"REMOTE"] == b"192.0.2.1"
        assert_forgotten(client, saved, between)
        client.close()


def assert_forgotten(client: RawClient, saved: Path, between: bytes) -> None:
    """See that neither a message nor what stands between makes a value stay."""
    for line in (None, between):
        if line is not None:
            client.expect(b"XFORWARD ADDR=192.0.2.1 HELO=far.example", b"250")
            client.expect(line, b"250")
        client.envelope(b"<>", [b"<c@example.com>"])
        assert client.message(MESSAGE) == QUEUED
        seen = environment(saved)
        assert not {b"REMOTE", b"REMOTE_HELO", b"EMAIL"} & set(seen), line
        assert (seen[b"SENDER"], seen[b"RECIPIENTS"]) == (b"<>", b"c@example.com")


@pytest.fixture
def heirlooms(tmp_path: Path) -> Iterator[list[int]]:
    """Descriptors that whoever starts the daemon has forgotten to close."""
    secret = tmp_path / "secret"
    secret.write_bytes(SECRET)
    with secret.open() as file, socket.create_server(("127.0.0.1", 0)) as listener:
        yield [file.fileno(), listener.fileno()]


@pytest.mark.parametrize("kind", ["pipe", "file"])
def test_no_descriptor_is_inherited(
    kind: str, heirlooms: list[int], proxsmtpd: StartDaemon, tmp_path: Path
) -> None:
    """These are the pid file's, another client's, its spool's, the starter's."""
    saved = tmp_path / "descriptors"
    command = f"ls -l /proc/self/fd > {saved}"
    settings = {
        "FilterType": kind,
        "FilterCommand": f"{command}; test $EMAIL || cat",
        "PidFile": tmp_path / "pid",
    }
    daemon = proxsmtpd(settings, pass_fds=heirlooms)
    other = daemon.connect()
    other.start()
    other.expect(b"DATA", b"354")
    other.send(b"0123456789abcde\r\n" * 180_000)
    pid = daemon.process.pid
    assert poll(lambda: descriptors_in(pid, daemon.tempdir)), (
        "the mail is not in a file"
    )
    assert daemon.connect().message(MESSAGE) == QUEUED
    found = dict(re.findall(r" (\d+) -> (.*)$", saved.read_text(), re.M))
    own = {"0", "1", "2"}
    # ls has the directory open that it reads.
    assert set(found) - own == {name for name in found if found[name].endswith("/fd")}
    assert found["1"] == str(saved)
    assert other.command(b".") == QUEUED
