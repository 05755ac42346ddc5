"""The manual's units, started by a real systemd on a machine of the test's own.

The machine has mounts, processes, a network and control groups of its own; what is
written there is gone with it.  Its systemd starts one service, the script of the test,
and then powers the machine off.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import tempfile
from pathlib import Path

import pytest

from helpers import ROOT, as_root, one_process, requires
from manual import display

PATIENCE = 60  # seconds, for all that a machine does
SYSTEMD = "/lib/systemd/systemd"
# Each machine's systemd starts at the root of the control groups.
LOCK = Path(tempfile.gettempdir(), "proxsmtpd-test-systemd.lock")
SHARED = "/mnt"  # the test's directory; systemd covers /tmp

MACHINE = """
mount -t tmpfs none "$PLACE/machine"
cd "$PLACE/machine"
mkdir upper work root
mount -t overlay none -o lowerdir=/,upperdir=$PWD/upper,workdir=$PWD/work root
ip link set lo up
cd root
mount -t proc proc proc
mount --rbind /dev dev
mount -t sysfs sysfs sys
mount -t cgroup2 none sys/fs/cgroup
mount -t tmpfs none run
mkdir -p ".$ROOT"
mount --bind "$ROOT" ".$ROOT"
mount --bind "$PLACE/shared" .$SHARED
rm -rf etc/systemd/system/*.wants etc/systemd/system/proxsmtpd*
rm -rf usr/local/lib/systemd/system/proxsmtpd* usr/lib/tmpfiles.d/*
cp "$PLACE/shared/try.service" etc/systemd/system
export container=lxc
exec chroot . $SYSTEMD --unit=try.service --show-status=0 --log-target=null
"""
SERVICE = f"""
[Unit]
Wants=systemd-journald.service
[Service]
Type=oneshot
ExecStart=/bin/sh -c "sh {SHARED}/script; systemctl -ff poweroff >/dev/null 2>&1"
WorkingDirectory={ROOT}
StandardOutput=append:{SHARED}/output
StandardError=inherit
"""
# User, directory, configuration, server, and what the tests do.  A session that a stop
# meets before DATA is told 421: no failure of `connect`.
PREPARE = """
make install PYTHON=/usr/bin/python3 >/dev/null
id -u _proxsmtp >/dev/null ||
    useradd --system --user-group --home-dir /nonexistent _proxsmtp
install -d -o _proxsmtp -g _proxsmtp -m 700 /var/spool/proxsmtpd
cat >/usr/local/etc/proxsmtpd.conf <<END
Listen: 127.0.0.1:10025
OutAddress: 127.0.0.1:10026
FilterCommand: cat
User: _proxsmtp
TempDirectory: /var/spool/proxsmtpd
END
smtp-sink -u _proxsmtp 127.0.0.1:10026 100 &
send() {
    /usr/bin/python3 -c 'import smtplib, sys
smtplib.SMTP("127.0.0.1", 10025).sendmail("a@example.com", ["b@example.net"],
    "Subject: Hello\\n\\n" + "Hello\\n" * int(sys.argv[1]))' "$1"
}
connect() {
    /usr/bin/python3 -c 'import smtplib
try:
    smtplib.SMTP("127.0.0.1", 10025)
except smtplib.SMTPResponseException as error:
    assert error.smtp_code == 421, error'
}
report() { echo "$1: $?"; }
"""
# The second message is longer than what is kept in memory.
USE = """
send 1; report message
send 400000; report "large message"
systemctl reload proxsmtpd; report reload
systemctl restart proxsmtpd; report restart
send 1; report "message after restart"
systemctl stop proxsmtpd; report stop

"""
GOOD = [
    f"{what}: 0"
    for what in (
        *("start", "message", "large message", "reload", "restart"),
        *("message after restart", "stop"),
    )
]


def run(script: str, place: Path, **files: str) -> list[str]:
    """Run a script on a machine and return the lines of its output."""
    shared = place / "shared"
    for directory in (shared, place / "machine"):
        directory.mkdir()
    for name, text in files.items():
        (shared / name).write_text(text)
    (shared / "script").write_text(f"{PREPARE}\n{script}\necho end\n")
    (shared / "try.service").write_text(SERVICE)
    with LOCK.open("w") as lock:  # another run of these tests may have one, too
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = subprocess.run(
            [
                *("unshare", "--mount", "--net", "--pid", "--fork", "--cgroup"),
                *("--kill-child", "sh", "-e", "-c", MACHINE),
            ],
            env={
                "PATH": os.defpath + ":/usr/sbin:/sbin",
                "PLACE": str(place),
                "ROOT": str(ROOT),
                "SHARED": SHARED,
                "SYSTEMD": SYSTEMD,
            },
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
    output = shared / "output"
    if not output.exists():
        pytest.skip(f"no systemd can be started: {result.stderr}")
    lines = output.read_text().splitlines()
    assert lines.pop() == "end", lines
    return lines


pytestmark = [
    as_root,
    one_process("systemd"),
    requires("systemd", SYSTEMD),
    requires("postfix", "/usr/sbin/smtp-sink"),
    requires("python3", "/usr/bin/python3"),
    requires("passwd", "/usr/sbin/useradd"),
    requires("iproute2", "/usr/sbin/ip"),
]


def results(lines: list[str]) -> list[str]:
    """Return the reports among the lines of a script's output."""
    return [line for line in lines if line[-3:-1] == ": "]


def test_unit_that_make_installs(tmp_path: Path) -> None:
    start = "make unit && systemctl enable --now proxsmtpd; report start"
    assert results(run(f"{start}\n{USE}", tmp_path)) == GOOD


def test_unit_that_starts_as_root(tmp_path: Path) -> None:
    start = f"""
cp {SHARED}/unit /etc/systemd/system/proxsmtpd.service
systemctl enable --now proxsmtpd; report start
"""
    lines = run(
        f"{start}\n{USE}",
        tmp_path,
        unit=display("proxsmtpd.8", "systemd", "Type=forking"),
    )
    assert results(lines) == GOOD


def test_clients_wait_for_the_socket_unit(tmp_path: Path) -> None:
    """None is refused while the service restarts."""
    script = f"""
make unit
cp {SHARED}/unit /etc/systemd/system/proxsmtpd.socket
systemctl enable --now proxsmtpd.socket; report socket
systemctl start proxsmtpd; report start
done=$(mktemp -u)
(while test ! -e "$done"; do connect || report refused; done) &
systemctl restart proxsmtpd; report restart
send 1; report message
systemctl restart proxsmtpd; report restart
touch "$done"
wait $!
"""
    lines = run(script, tmp_path, unit=display("proxsmtpd.8", "systemd", "[Socket]"))
    expected = ("socket", "start", "restart", "message", "restart")
    assert results(lines) == [f"{what}: 0" for what in expected]
