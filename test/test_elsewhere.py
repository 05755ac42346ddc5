"""The main job on a system that has nothing of what is Linux's own.

These are tests of other modules, with the program run by elsewhere.py.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import test_daemon
import test_filter
from conftest import StartDaemon
from proxsmtpd import ExitWatch, FilterFailure, FilterProcess, Log, Processors

ELSEWHERE = [sys.executable, "-IS", str(Path(__file__).with_name("elsewhere.py"))]


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
test_background_process = test_filter.test_background_process_does_not_hold_up_mail
test_time_out = test_filter.test_time_out_ends_the_whole_group
test_memory_is_bounded = test_filter.test_memory_is_bounded
test_nothing_is_left_after_kill = test_filter.test_nothing_is_left_after_kill
test_concurrent_messages = test_filter.test_concurrent_messages


@pytest.mark.parametrize("kind", ["client", "full"])
def test_transparent_proxy_is_an_error(kind: str, proxsmtpd: StartDaemon) -> None:
    daemon = proxsmtpd({"TransparentProxy": kind}, wait=False)
    assert daemon.wait() == 2
    daemon.wait_log(r":\d+: invalid value for TransparentProxy \(only Linux has it\)$")


def test_statistics_of_what_can_be_counted(proxsmtpd: StartDaemon) -> None:
    daemon = proxsmtpd()
    daemon.process.send_signal(signal.SIGUSR1)
    daemon.wait_log(r"statistics: threads: unknown, descriptors: \d+$")


# --- Where no thread can be had to wait for a filter ---


def no_thread(*_arguments: Any) -> None:
    """What threading says then."""
    raise RuntimeError("can't start new thread")


def descriptors() -> set[str]:
    """What this process has open."""
    return set(os.listdir("/proc/self/fd"))


def test_no_thread_to_watch_a_filter(monkeypatch: pytest.MonkeyPatch) -> None:
    """The filter is ended, and nothing of it is left."""
    monkeypatch.delattr(os, "pidfd_open")
    monkeypatch.setattr(threading.Thread, "start", no_thread)
    before = descriptors()
    log = Log(0, lambda _level, _text: None)
    failure = "couldn't start filter command: can't start new thread"
    process = FilterProcess(None, None, Processors(wanted=False), log)
    with process, pytest.raises(FilterFailure, match=failure):
        process.start("sleep 60", os.environb)
    assert descriptors() == before
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_no_descriptor_to_watch_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(*_arguments: Any) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "pidfd_open", none_left)
    monkeypatch.setattr(os, "pipe", none_left)
    with pytest.raises(OSError, match="Too many open files"):
        ExitWatch(os.getpid()).open()
