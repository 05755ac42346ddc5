"""`make install` and `make uninstall`, into a directory of the test's own."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Callable

import pytest

from helpers import ROOT, StartDaemon, requires
from install import INSTALLED, make

MAN8 = "usr/share/man/man8/proxsmtpd.8"
MAN5 = "usr/share/man/man5/proxsmtpd.conf.5"
SAMPLE = "etc/proxsmtpd.conf.sample"
CONFIG = "etc/proxsmtpd.conf"
LOCAL_CONFIG = "usr/local/etc/proxsmtpd.conf"
UNIT = "usr/lib/systemd/system/proxsmtpd.service"


FORMATTERS = [
    pytest.param(
        ["mandoc", "-T", "utf8", "-W", "warning"],
        marks=requires("mandoc", "/usr/bin/mandoc"),
        id="mandoc",
    ),
    pytest.param(
        ["man", "--warnings=all", "-l"],
        marks=requires("man-db", "/usr/bin/man"),
        id="man",
    ),
]
NO_HOME = {
    "unset": ["env", "-u", "HOME", "-u", "PATH", "-u", "USER"],
    "nowhere": ["env", "HOME=/nonexistent/home"],
    "not a directory": ["env", "HOME=/etc/passwd"],
}


def fails(
    place: Path, *, path: Path | None = None, python: str = sys.executable
) -> str:
    """Run `make install`, which must fail, and return its errors."""
    with pytest.raises(subprocess.CalledProcessError) as failed:
        make("install", place, python=python, path=path)
    return str(failed.value.stderr.decode())


def modes(place: Path, wanted: Callable[[Path], bool]) -> dict[str, int]:
    """Return the entries of this kind below a directory, with their modes."""
    return {
        str(path.relative_to(place)): stat.S_IMODE(path.stat().st_mode)
        for path in place.rglob("*")
        if wanted(path)
    }


def files(place: Path) -> dict[str, int]:
    """Return the files below a directory, with their modes."""
    return modes(place, Path.is_file)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Provide the root of a tree in which it is installed."""
    root = tmp_path / "root"
    make("install", root)
    return root


def interpreter(path: Path) -> str:
    """Make a link to this Python and return its path."""
    path.parent.mkdir(parents=True)
    path.symlink_to(sys.executable)
    return str(path)


def test_directories_that_are_there_keep_their_modes(tmp_path: Path) -> None:
    root = tmp_path / "root"
    kept = {"etc": 0o700, "usr": 0o711, "usr/sbin": 0o2775, "usr/share/man": 0o750}
    for name, mode in kept.items():
        (root / name).mkdir(parents=True)
        (root / name).chmod(mode)
    make("install", root)
    found = modes(root, Path.is_dir)
    assert {name: found.pop(name) for name in kept} == kept
    assert set(found.values()) == {0o755}


# Programs of the system that fail: at once, after half of their work, or only for one
# of the files that are installed.
HALF = """case "$*" in
*{}) head -c 20; exit 1 ;;
*) exec "$SYSTEM_SED" "$@" ;;
esac"""
BROKEN = {
    "sed fails": ("sed", "exit 1"),
    "sed writes half": ("sed", HALF.format("proxsmtpd.py")),
    "sed is no sed": ("sed", "echo 'exit 0'"),
    "chmod fails": ("chmod", "exit 1"),
}


@pytest.mark.parametrize("fault", BROKEN.values(), ids=BROKEN)
def test_fault_leaves_the_old_program(
    fault: tuple[str, str], place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither an empty nor half a program, and nothing beside it."""
    monkeypatch.setenv("SYSTEM_SED", shutil.which("sed") or "")
    name, script = fault
    broken = tmp_path / "broken" / name
    broken.parent.mkdir()
    broken.write_text(f"#!/bin/sh\n{script}\n")
    broken.chmod(0o755)
    before = {path: (place / path).read_bytes() for path in files(place)}
    assert f"not installed: {place / INSTALLED}\n" in fails(place, path=broken.parent)
    assert {path: (place / path).read_bytes() for path in files(place)} == before


def test_fault_of_a_later_file_leaves_the_old_one(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SYSTEM_SED", shutil.which("sed") or "")
    broken = tmp_path / "broken" / "sed"
    broken.parent.mkdir()
    broken.write_text(f"#!/bin/sh\n{HALF.format('proxsmtpd.8')}\n")
    broken.chmod(0o755)
    before = (place / MAN8).read_bytes()
    assert f"not installed: {place / MAN8}\n" in fails(place, path=broken.parent)
    assert (place / MAN8).read_bytes() == before
    assert set(files(place)) == {INSTALLED, MAN8, MAN5, SAMPLE}


@pytest.mark.parametrize("directory", ["a blank", "a\ttab", "x" * 250])
def test_interpreter_that_no_first_line_can_name(
    directory: str, tmp_path: Path
) -> None:
    python = interpreter(tmp_path / directory / "python3")
    errors = fails(tmp_path / "root", python=python)
    assert "a #! line cannot name" in errors
    assert "set PYTHON" in errors
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize("name", ["a&b", "a|b", "a\\b"])
def test_interpreter_that_sed_would_misread(name: str, tmp_path: Path) -> None:
    python = interpreter(tmp_path / name / "python3")
    make("install", tmp_path / "root", python=python)
    program = tmp_path / "root" / INSTALLED
    assert program.read_text().splitlines()[0] == f"#!{python} -IS"
    subprocess.run([program, "-v"], capture_output=True, check=True)


def test_interpreter_that_cannot_run_the_program(tmp_path: Path) -> None:
    """Long paths are up to the system; what is installed runs in any case."""
    python = interpreter(tmp_path / ("y" * (200 - len(str(tmp_path)))) / "p")
    root = tmp_path / "root"
    with suppress(subprocess.CalledProcessError):
        make("install", root, python=python)
    assert set(files(root)) in (set(), {INSTALLED, MAN8, MAN5, SAMPLE})
    if files(root):
        subprocess.run([root / INSTALLED, "-v"], capture_output=True, check=True)


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_files_and_modes(umask: int, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    make("install", root, umask)
    assert files(root) == {
        INSTALLED: 0o755,
        MAN8: 0o644,
        MAN5: 0o644,
        SAMPLE: 0o644,
    }
    assert set(modes(root, Path.is_dir).values()) == {0o755}


def test_default_places(tmp_path: Path) -> None:
    """Everything is below /usr/local, and is called that in what is installed."""
    root = tmp_path / "a root"
    make("install", root, where=())
    assert set(files(root)) == {
        f"usr/local/{name.removeprefix('usr/')}"
        for name in (INSTALLED, MAN8, MAN5, SAMPLE, CONFIG)
    }
    program = (root / "usr/local/sbin/proxsmtpd").read_text()
    assert 'CONFIG_FILE = "/usr/local/etc/proxsmtpd.conf"\n' in program
    make("uninstall", root, where=())
    assert set(files(root)) == {"usr/local/etc/proxsmtpd.conf"}


def test_first_line_names_the_interpreter_itself(place: Path) -> None:
    first = (place / INSTALLED).read_text().splitlines()[0]
    assert first == f"#!{sys.executable} -IS"


def test_program_is_the_same_but_for_two_lines(place: Path) -> None:
    ours = (ROOT / "proxsmtpd.py").read_text().splitlines()
    installed = (place / INSTALLED).read_text().splitlines()
    assert len(installed) == len(ours)
    changed = {new for old, new in zip(ours, installed) if old != new}
    assert changed == {installed[0], 'CONFIG_FILE = "/etc/proxsmtpd.conf"'}


def test_configuration_path_is_in_program_and_manuals(place: Path) -> None:
    result = subprocess.run([place / INSTALLED, "-v"], capture_output=True, check=True)
    assert result.stdout.splitlines()[1].strip() == b"(config: /etc/proxsmtpd.conf)"
    for manual in (MAN8, MAN5):
        text = (place / manual).read_text()
        assert ".It Pa /etc/proxsmtpd.conf\n" in text
        assert "/usr/local/etc" not in text


@pytest.mark.parametrize("formatter", FORMATTERS)
@pytest.mark.parametrize("manual", [MAN8, MAN5])
def test_manuals_are_rendered(
    manual: str, formatter: Sequence[str], place: Path
) -> None:
    """Without a warning, and with all that the source has a heading for."""
    result = subprocess.run(
        [*formatter, place / manual],
        env={"PATH": os.defpath, "LC_ALL": "C.UTF-8", "MANWIDTH": "80"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stderr == ""
    lines = re.sub(".\b", "", result.stdout).splitlines()
    title = Path(manual).name.rpartition(".")[0].upper()
    assert lines[0].startswith(title)
    headings = re.findall(r"^\.S[hs] (.*)$", (place / manual).read_text(), re.M)
    assert len(headings) > 5
    assert not set(headings) - {line.strip() for line in lines}


@pytest.mark.parametrize("environment", NO_HOME.values(), ids=NO_HOME)
def test_runs_isolated_and_without_a_home(
    environment: Sequence[str], place: Path, proxsmtpd: StartDaemon
) -> None:
    program = [*environment, sys.executable, "-I", str(place / INSTALLED)]
    daemon = proxsmtpd({"FilterCommand": "cat"}, program=program)
    reply = daemon.connect().message(b"Subject: Hello\r\n\r\nHello\r\n")
    assert reply == b"250 2.0.0 Ok: queued\r\n"
    assert Path(f"/proc/{daemon.process.pid}/comm").read_text() == "proxsmtpd\n"


def test_process_has_the_programs_name(place: Path, proxsmtpd: StartDaemon) -> None:
    """ps, pgrep -x and killproc find it by that name."""
    daemon = proxsmtpd(program=[str(place / INSTALLED)])
    assert Path(f"/proc/{daemon.process.pid}/comm").read_text() == "proxsmtpd\n"


def test_nothing_of_the_environment_gets_in(place: Path, tmp_path: Path) -> None:
    """No module of somebody else's, by PYTHONPATH or beside the program."""
    for directory in (tmp_path, (place / INSTALLED).parent):
        (directory / "socket.py").write_text("raise SystemExit('taken over')\n")
    env = {"PYTHONPATH": str(tmp_path)}
    subprocess.run([place / INSTALLED, "-v"], env=env, cwd=tmp_path, check=True)


def test_sample_becomes_the_first_configuration(tmp_path: Path) -> None:
    make("install", tmp_path, where=())
    sample = tmp_path / f"{LOCAL_CONFIG}.sample"
    assert (tmp_path / LOCAL_CONFIG).read_bytes() == sample.read_bytes()


def test_configuration_that_is_there_stays(tmp_path: Path) -> None:
    make("install", tmp_path, where=())
    (tmp_path / LOCAL_CONFIG).write_text("OutAddress: 25\n")
    (tmp_path / LOCAL_CONFIG).chmod(0o600)
    make("install", tmp_path, where=())
    make("uninstall", tmp_path, where=())
    assert (tmp_path / LOCAL_CONFIG).read_text() == "OutAddress: 25\n"
    assert files(tmp_path) == {LOCAL_CONFIG: 0o600}


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_unit_is_the_one_of_the_manual(umask: int, place: Path) -> None:
    """With the paths of this installation."""
    make("unit", place, umask)
    assert files(place)[UNIT] == 0o644
    unit = (place / UNIT).read_text()
    assert unit.startswith("[Unit]\n")
    assert "Type=notify\nExecStart=/usr/sbin/proxsmtpd -d 3\n" in unit
    assert f"\n{unit}.Ed\n" in (place / MAN8).read_text()


def test_uninstall_leaves_nothing_of_its_own(place: Path) -> None:
    make("unit", place)
    make("uninstall", place)
    assert files(place) == {}


@pytest.mark.parametrize("there", [True, False], ids=["systemd", "no systemd"])
def test_install_says_what_to_do_next(there: bool, tmp_path: Path) -> None:
    systemd = tmp_path if there else tmp_path / "nowhere"
    said = make("install", tmp_path / "root", where=[f"SYSTEMD={systemd}"])
    first, second, third = said.splitlines()[-3:]
    assert first.startswith("1. ")
    assert "README, INSTALL IT" in first
    assert "\nINSTALL IT\n" in (ROOT / "README").read_text()
    assert second.startswith("2. Edit /usr/local/etc/proxsmtpd.conf,")
    assert third.startswith("3. ")
    assert ("make unit && systemctl enable --now proxsmtpd" in third) is there
    assert ("/usr/local/sbin/proxsmtpd" in third) is not there


def test_in_debians_place_its_configurations_stay_the_ones(tmp_path: Path) -> None:
    said = make("install", tmp_path)
    assert CONFIG not in files(tmp_path)
    assert "/etc/proxsmtp/*.conf" in said.splitlines()[-2]


@pytest.mark.parametrize("target", ["install", "unit", "uninstall", "check"])
@pytest.mark.parametrize(
    "name",
    ["DESTDIR", "PREFIX", "SBINDIR", "SYSCONFDIR", "MANDIR", "UNITDIR", "PYTHON"],
)
def test_quote_that_the_shell_would_misread(
    name: str, target: str, tmp_path: Path
) -> None:
    value = f"{tmp_path}/it's"
    python = value if name == "PYTHON" else sys.executable
    with pytest.raises(subprocess.CalledProcessError) as failed:
        make(target, tmp_path / "root", python=python, where=[f"{name}={value}"])
    first = failed.value.stderr.decode().splitlines()[0]
    assert first == f"{name} must not contain a single quote: {value}"
    assert list(tmp_path.iterdir()) == []
