"""The main job on a system that has nothing of what is Linux's own.

These are tests of other modules, with the program run by support/other_system.py.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from helpers import QUEUED, StartDaemon, deliver, on_other_systems

pytestmark = on_other_systems


@pytest.mark.parametrize("kind", ["client", "full"])
def test_transparent_proxy_is_an_error(kind: str, proxsmtpd: StartDaemon) -> None:
    daemon = proxsmtpd({"TransparentProxy": kind}, wait=False)
    assert daemon.wait() == 2
    daemon.wait_log(r"invalid value for TransparentProxy \(only Linux has it\)$")


def test_environment_of_a_filter(proxsmtpd: StartDaemon, tmp_path: Path) -> None:
    saved = tmp_path / "environment"
    command = f"env >{saved}; cat"
    daemon = proxsmtpd({"FilterCommand": command}, env={"OURS": "1", "SENDER": "x"})
    assert deliver(daemon) == QUEUED
    found = dict(line.split("=", 1) for line in saved.read_text().splitlines())
    assert (found["OURS"], found["SENDER"]) == ("1", "a@example.com")
    assert found["PATH"] == os.environ["PATH"]


def test_statistics_of_what_can_be_counted(proxsmtpd: StartDaemon) -> None:
    daemon = proxsmtpd()
    daemon.process.send_signal(signal.SIGUSR1)
    daemon.wait_log(r"statistics: threads: unknown, descriptors: \d+$")


def test_filters_get_no_inherited_descriptor(
    proxsmtpd: StartDaemon, tmp_path: Path
) -> None:
    """Not even where /dev/fd has the standard ones only."""
    saved = tmp_path / "descriptors"
    command = f"ls /proc/self/fd >{saved}; cat"
    with open(os.devnull) as inherited:
        number = inherited.fileno()
        os.set_inheritable(number, True)
        daemon = proxsmtpd({"FilterCommand": command}, pass_fds=[number])
    assert deliver(daemon) == QUEUED
    assert saved.read_text().split() == ["0", "1", "2", "3"]  # 3 is the listing's
