"""OneProcessor: where the threads and the filters run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import PROGRAM, QUEUED, Daemon, MakeFilter, StartDaemon, poll

PROCESSORS = os.sched_getaffinity(0) if sys.platform == "linux" else {0}

pytestmark = pytest.mark.skipif(len(PROCESSORS) < 2, reason="needs two processors")


def placed(daemon: Daemon) -> set[frozenset[int]]:
    """The sets of processors that the threads may run on."""
    tasks = Path(f"/proc/{daemon.process.pid}/task").iterdir()
    return {frozenset(os.sched_getaffinity(int(task.name))) for task in tasks}


def only(daemon: Daemon) -> int:
    """The one processor of all threads; they move there one by one."""
    assert poll(lambda: [len(where) for where in placed(daemon)] == [1])
    ((processor,),) = placed(daemon)
    return processor


def test_threads_on_one_and_filters_on_all(
    proxsmtpd: StartDaemon, filter_script: MakeFilter
) -> None:
    script = filter_script("grep ^Cpus_allowed: /proc/self/status >&2; exit 1")
    for command in (script, f"{script};"):  # without the shell, and with it
        daemon = proxsmtpd({"FilterCommand": command})
        clients = [daemon.connect() for _ in range(3)]
        for client in clients:
            client.start()
        assert len(list(Path(f"/proc/{daemon.process.pid}/task").iterdir())) == 4
        assert only(daemon) in PROCESSORS
        words = clients[0].message(b"x\r\n").decode()
        mask = re.search(r"([0-9a-f,]+)\r\n$", words)
        assert mask, words
        allowed = int(mask[1].replace(",", ""), 16)
        assert {n for n in PROCESSORS if allowed & 1 << n} == PROCESSORS
        assert only(daemon) in PROCESSORS


def test_off(proxsmtpd: StartDaemon) -> None:
    daemon = proxsmtpd({"OneProcessor": "off"})
    client = daemon.connect()
    client.start()
    assert placed(daemon) == {frozenset(PROCESSORS)}


# The test says what the others use: on a busy machine they cannot be arranged.
MOVES = """
import os, sys, threading, proxsmtpd
first, second = sorted(os.sched_getaffinity(0))[:2]
used = dict.fromkeys(os.sched_getaffinity(0), 50.0)
used[first] = 10.0
proxsmtpd.processor_seconds = lambda: dict(used)
held = threading.Event()
threading.Thread(target=held.wait).start()
processors = proxsmtpd.Processors(True)
def check(seconds, by_others):
    processors._checked -= seconds
    used[first] += by_others
    processors.check()
    tasks = [int(task) for task in os.listdir("/proc/self/task")]
    print(*({*os.sched_getaffinity(task)} == {where} for task in tasks))
where = first
processors.choose()
check(0.1, 0.2)
check(2.0, 0.1)
where = second
check(2.0, 1.5)
held.set()
"""


def test_moves_away_from_others() -> None:
    """To the least used at the start; then at most once a second, and for a gain.

    The three looks are too early, at a processor that others hardly use, and at
    one that they use by half.
    """
    environment = {**os.environ, "PYTHONPATH": str(Path(PROGRAM).parent)}
    run = subprocess.run(
        [sys.executable, "-c", MOVES],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.stdout, run.stderr) == ("True True\n" * 3, "")


def test_where_there_is_no_choice(proxsmtpd: StartDaemon) -> None:
    """What the administrator has chosen, with taskset(1) for one, stays."""
    chosen = min(PROCESSORS)
    daemon = proxsmtpd(
        {"FilterCommand": "cat"}, preexec_fn=lambda: os.sched_setaffinity(0, {chosen})
    )
    client = daemon.connect()
    client.start()
    assert client.message(b"x\r\n") == QUEUED
    assert placed(daemon) == {frozenset({chosen})}


# As a container may have /proc, which numbers the processors in its own way.
RENUMBERED = """
import proxsmtpd
proxsmtpd.processor_seconds = lambda: {1000: 0.0, 1001: 0.0}
"""
# And as it may have it a while later.
TAKEN_AWAY = """
import os, proxsmtpd
seconds = dict.fromkeys(os.sched_getaffinity(0), 0.0)
proxsmtpd.processor_seconds = lambda: dict(seconds)
processors = proxsmtpd.Processors(True)
processors.choose()
del seconds[max(seconds)]
processors._checked -= 2.0
processors.check()
processors.check()
"""
NOT_ALLOWED = """
import os, proxsmtpd
def not_allowed(_pid): raise PermissionError(1, "Operation not permitted")
os.sched_getaffinity = not_allowed
"""
ONCE_MORE = """
processors = proxsmtpd.Processors(True)
processors.choose()
processors.check()
with processors.all():
    pass
"""


@pytest.mark.parametrize("surroundings", [RENUMBERED, TAKEN_AWAY, NOT_ALLOWED])
def test_where_nothing_can_be_told(surroundings: str) -> None:
    """The threads then stay where they are."""
    environment = {**os.environ, "PYTHONPATH": str(Path(PROGRAM).parent)}
    run = subprocess.run(
        [sys.executable, "-c", surroundings + ONCE_MORE],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.returncode, run.stderr) == (0, "")
