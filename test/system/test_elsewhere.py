"""The main job on a system that has nothing of what is Linux's own.

These are tests of other modules, with the program run by support/other_system.py.
"""

from __future__ import annotations

import os
import signal
import sys
from functools import partial
from pathlib import Path

import pytest
import test_daemon
import test_filter

from helpers import StartDaemon

OTHER_SYSTEM = Path(__file__).parents[1] / "support" / "other_system.py"
ELSEWHERE = [sys.executable, "-IS", str(OTHER_SYSTEM)]


@pytest.fixture
def proxsmtpd(proxsmtpd: StartDaemon) -> StartDaemon:
    """The factory of that name, for daemons that are elsewhere."""
    return partial(proxsmtpd, program=ELSEWHERE)


test_listen_on_everything = test_daemon.test_listen_on_everything
test_connect_back = test_daemon.test_connect_back
test_messages_and_the_end = test_filter.test_filter_is_ended_with_the_daemon
test_rejected = test_filter.test_rejected
test_failing = test_filter.test_failing
test_program_that_is_killed = test_filter.test_program_that_is_killed
test_background_process = (
    test_filter.test_silent_background_process_does_not_hold_up_mail
)
test_time_out = test_filter.test_time_out_ends_the_whole_group
test_memory_is_bounded = test_filter.test_memory_is_bounded
test_nothing_is_left_after_kill = test_filter.test_nothing_is_left_after_kill
test_concurrent_messages = test_filter.test_concurrent_messages


@pytest.mark.parametrize("kind", ["client", "full"])
def test_transparent_proxy_is_an_error(kind: str, proxsmtpd: StartDaemon) -> None:
    daemon = proxsmtpd({"TransparentProxy": kind}, wait=False)
    assert daemon.wait() == 2
    daemon.wait_log(r"invalid value for TransparentProxy \(only Linux has it\)$")


def test_environment_of_a_filter(proxsmtpd: StartDaemon, tmp_path: Path) -> None:
    saved = tmp_path / "environment"
    command = f"env >{saved}; cat"
    daemon = proxsmtpd({"FilterCommand": command}, env={"OURS": "1", "SENDER": "x"})
    assert test_filter.deliver(daemon) == test_filter.QUEUED
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
    assert test_filter.deliver(daemon) == test_filter.QUEUED
    assert saved.read_text().split() == ["0", "1", "2", "3"]  # 3 is the listing's
