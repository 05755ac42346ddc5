"""SIGUSR1: the daemon logs statistics, and goes on with its work."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

from helpers import QUEUED, Daemon, MakeServer, StartDaemon, deliver, poll
from proxsmtpd import Statistics, describe_times
from smtp import Close, Delay, Reply, ScriptedServer

MESSAGE = b"Subject: test\r\n\r\n.Hello\r\n"
STUFFED = b"Subject: test\r\n\r\n..Hello\r\n"

LINE = r"^proxsmtpd: statistics: (.*)$"
TIMES = (
    r"last (\d+) times: median (\d+\.\d{3}) s, 95% within (\d+\.\d{3}) s,"
    r" longest (\d+\.\d{3}) s"
)
NO_TIMES = "no times yet"
FORMS = (
    r"since (.*), (\d+) seconds",
    r"connections: (\d+) now, (\d+) at most, (\d+) accepted,"
    r" (\d+) refused as too many",
    r"messages: (\d+)((?:, \d+ [^,;]+(?:, passed)?)*); (\d+) octets",
    rf"filter: (?:{NO_TIMES}|{TIMES})",
    rf"server: (?:{NO_TIMES}|{TIMES})",
    r"threads: (\d+), descriptors: (\d+)",
)


class Times(NamedTuple):
    """The filter's or the server's times in a report, in seconds."""

    number: int
    median: float
    high: float
    longest: float


class Report(NamedTuple):
    """The lines that one SIGUSR1 brings."""

    seconds: int
    connections: dict[str, int]
    messages: int
    kinds: str  # as they are written
    octets: int
    filter: Times | None
    server: Times | None
    threads: int
    descriptors: int


def times_of(words: Sequence[str | None]) -> Times | None:
    if words[0] is None:
        return None
    number, *seconds = (float(word or "") for word in words)
    return Times(int(number), *seconds)


def parse(lines: Sequence[str]) -> Report:
    """Return a report of its lines, each of which must have its form."""
    assert len(lines) == len(FORMS), lines
    found = [re.fullmatch(form, line) for form, line in zip(FORMS, lines)]
    assert all(found), lines
    since, connections, messages, *times, process = (m.groups() for m in found if m)
    names = ("now", "at most", "accepted", "refused")
    return Report(
        int(since[1]),
        dict(zip(names, map(int, connections))),
        int(messages[0]),
        messages[1].removeprefix(", "),
        int(messages[2]),
        times_of(times[0]),
        times_of(times[1]),
        int(process[0]),
        int(process[1]),
    )


def lines_of(daemon: Daemon) -> list[str]:
    return re.findall(LINE, daemon.log(), re.M)


def report(daemon: Daemon) -> Report:
    """Ask for a report, and wait for all of it."""
    before = len(lines_of(daemon))
    daemon.process.send_signal(signal.SIGUSR1)
    assert poll(lambda: len(lines_of(daemon)) >= before + len(FORMS)), daemon.log()
    return parse(lines_of(daemon)[before:])


def report_when_idle(daemon: Daemon) -> Report:
    """Return the report after the last client has gone."""
    reports = [report(daemon)]

    def is_idle() -> bool:
        reports.append(report(daemon))
        return reports[-1].connections["now"] == 0

    assert poll(is_idle)
    return reports[-1]


def entries(daemon: Daemon, name: str) -> int:
    return len(os.listdir(f"/proc/{daemon.process.pid}/{name}"))


# --- Messages ---

# By the sender's name.
FILTER = """case $SENDER in
    pass*) cat;;
    spam*) echo 554 5.7.1 Spam $$ >&2; exit 1;;
    reject*) exit 1;;
    drop*) echo 250 dropped >&2; exit 1;;
    fail*) exit 127;;
esac"""
MIX = ("pass", "spam", "drop", "pass", "fail", "reject", "pass", "spam", "fail")
COUNTED: Mapping[str, tuple[Mapping[str, object], str]] = {
    "enforce": ({}, "1 250, 1 550, 2 554, 2 FILTER-ERROR, 3 FILTERED"),
    "pass": (
        {"FilterFailure": "pass"},
        "1 250, 1 550, 2 554, 2 FILTER-ERROR, passed, 3 FILTERED",
    ),
    "observe": (
        {"FilterMode": "observe"},
        "1 OBSERVED: 250, 1 OBSERVED: 550, 2 OBSERVED: 554,"
        " 2 OBSERVED: FILTER-ERROR, 3 OBSERVED: FILTERED",
    ),
}


@pytest.mark.parametrize("mode", COUNTED)
def test_messages_by_status(mode: str, proxsmtpd: StartDaemon) -> None:
    """Replies count by their codes, and octets as the client wrote them."""
    settings, kinds = COUNTED[mode]
    daemon = proxsmtpd({"FilterCommand": FILTER.replace("\n", " "), **settings})
    client = daemon.connect()
    client.start(b"<%s@example.com>" % MIX[0].encode())
    for number, name in enumerate(MIX):
        if number:
            client.envelope(b"<%s@example.com>" % name.encode())
        client.message(STUFFED)
    found = report(daemon)
    assert (found.messages, found.kinds) == (len(MIX), kinds)
    assert found.octets == len(MIX) * len(MESSAGE)
    assert found.filter is not None
    assert found.filter.number == len(MIX)


def test_messages_past_the_filter(
    proxsmtpd: StartDaemon, make_server: MakeServer
) -> None:
    """Those that the server refuses count by its code, and no filter took time."""
    refusal = b"451 4.3.0 Later\r\n"
    server = make_server({"DOT": [QUEUED, QUEUED, refusal, QUEUED, QUEUED]})
    daemon = proxsmtpd({"MaxMessageSize": 1000}, server=server)
    for reply in (QUEUED, QUEUED, refusal, QUEUED):
        assert deliver(daemon, STUFFED) == reply
    found = report_when_idle(daemon)
    assert (found.messages, found.kinds) == (4, "1 451, 3 PASSED")
    assert found.octets == 4 * len(MESSAGE)
    assert found.filter is None
    assert found.server is not None
    assert found.server.number == 4
    with daemon.connect() as client:
        assert client.message(bytes(2000)) == b"552 Message too large\r\n"
    assert report_when_idle(daemon).kinds == "1 451, 1 552, 3 PASSED"


def test_rejected_and_skipped_messages(
    proxsmtpd: StartDaemon, server: ScriptedServer
) -> None:
    daemon = proxsmtpd({"FilterType": "reject", "Skip": "authenticated"})
    client = daemon.connect()
    client.reply()
    client.expect(b"EHLO client.example", b"250")
    client.expect(b"MAIL FROM:<a@example.com>", b"530")
    client.expect(b"DATA", b"530")
    client.expect(b"AUTH PLAIN AGEAYg==", b"235")
    client.envelope()
    assert client.message(STUFFED) == QUEUED
    found = report(daemon)
    assert (found.messages, found.kinds) == (2, "1 REJECTED, 1 SKIPPED")
    assert found.octets == len(MESSAGE)
    assert len(server.messages) == 1


def test_nothing_yet(proxsmtpd: StartDaemon) -> None:
    found = report(proxsmtpd())
    assert (found.messages, found.kinds, found.octets) == (0, "", 0)
    assert set(found.connections.values()) == {0}
    assert (found.filter, found.server) == (None, None)
    assert 0 <= found.seconds < 60


# --- Connections, threads, descriptors ---


def test_connections(proxsmtpd: StartDaemon) -> None:
    daemon = proxsmtpd({"MaxConnections": 2})
    clients = [daemon.connect() for _ in range(2)]
    for client in clients:
        client.start()
    for _ in range(3):
        refused = daemon.connect()
        assert refused.reply() == b"421 Server busy, too many connections\r\n"
        refused.close()
    counts = {"now": 2, "at most": 2, "accepted": 2, "refused": 3}
    assert report(daemon).connections == counts
    for client in clients:
        client.quit()
    idle = {**counts, "now": 0}
    assert report_when_idle(daemon).connections == idle
    deliver(daemon, STUFFED)
    assert report_when_idle(daemon).connections == {**idle, "accepted": 3}


def test_threads_and_descriptors(proxsmtpd: StartDaemon) -> None:
    """The counts are the system's, except for the descriptor that counting takes."""
    daemon = proxsmtpd({"FilterCommand": "cat"})
    idle = report(daemon)
    assert idle.threads == entries(daemon, "task") == 1
    assert 0 <= idle.descriptors - entries(daemon, "fd") <= 1
    clients = [daemon.connect() for _ in range(5)]
    for client in clients:
        client.start()
    busy = report(daemon)
    assert busy.threads == entries(daemon, "task") == 6
    assert busy.descriptors == idle.descriptors + 10
    for client in clients:
        client.quit()
    assert poll(lambda: report(daemon)[-2:] == idle[-2:])


# --- Times ---


def test_times_of_filter_and_server(
    proxsmtpd: StartDaemon, make_server: MakeServer
) -> None:
    server = make_server({"DOT": Delay(0.2, QUEUED)})
    daemon = proxsmtpd({"FilterCommand": "sleep 0.3; cat"}, server=server)
    begun = time.monotonic()
    for _ in range(3):
        assert deliver(daemon, STUFFED) == QUEUED
    most = time.monotonic() - begun
    found = report_when_idle(daemon)
    for times, least in ((found.filter, 0.3), (found.server, 0.2)):
        assert times is not None
        assert times.number == 3
        assert least <= times.median <= times.high <= times.longest < most
    assert found.seconds >= 1


def test_times_of_each_message(proxsmtpd: StartDaemon, make_server: MakeServer) -> None:
    """They stand at level 4 beside the message's own line, which keeps its form."""
    server = make_server({"DOT": Delay(0.2, QUEUED)})
    command = "case $SENDER in a*) sleep 0.3; cat;; *) exit 1;; esac"
    daemon = proxsmtpd({"FilterCommand": command}, server=server)
    assert deliver(daemon, STUFFED) == QUEUED
    deliver(daemon, STUFFED, sender=b"<spam@example.com>")
    form = r"proxsmtpd: (\w{6}): took (\S+) s: filter (\S+) s, server (\S+) s$"
    daemon.wait_log(r"(?s:(?:.*?: took ){2})")  # comes after the reply
    accepted, refused = re.findall(form, daemon.log(), re.M)
    whole, in_filter, at_server = map(float, accepted[1:])
    assert in_filter >= 0.3
    assert at_server >= 0.2
    # Each is rounded by itself.
    assert in_filter + at_server <= whole + 0.002 < 30
    assert refused[3] == "0.000"
    assert 0 < float(refused[2]) <= float(refused[1]) + 0.001
    lines = re.findall(r"(\w{6}): client=.*, status=", daemon.log())
    assert lines == [accepted[0], refused[0]]


def test_times_are_not_shown_at_level_3(proxsmtpd: StartDaemon) -> None:
    daemon = proxsmtpd({"FilterCommand": "cat"}, level=3)
    assert deliver(daemon, STUFFED) == QUEUED
    daemon.wait_log("status=FILTERED")
    assert report(daemon).messages == 1
    daemon.stop()
    assert "took" not in daemon.log()


# --- The line by which a message is found in two logs ---

DETAILS = r"^proxsmtpd: (\w{6}): ((?:message-id=|size=).*)$"


def details(daemon: Daemon) -> dict[str, str]:
    """Wait for that line, which follows the message's own, and return its fields."""
    number, line = daemon.wait_log(DETAILS).groups()
    daemon.wait_log(
        rf"^proxsmtpd: {number}: client=.*\nproxsmtpd: {number}: {line[:4]}"
    )
    return dict(field.split("=", 1) for field in line.split(", "))


def test_details_of_a_filtered_message(
    proxsmtpd: StartDaemon, make_server: MakeServer
) -> None:
    server = make_server({"DOT": b"250 2.0.0 Ok: queued as 4BXyz\r\n"})
    daemon = proxsmtpd({"FilterCommand": "cat"}, level=3, server=server)
    client = daemon.connect()
    client.start()
    client.expect(b"XFORWARD ADDR=192.0.2.7 HELO=c.example", b"250")
    message = b"Subject: x\r\nMessage-ID:\r\n <1.a@b.example>\r\n\r\nHello\r\n"
    assert client.message(message) == b"250 2.0.0 Ok: queued as 4BXyz\r\n"
    found = details(daemon)
    assert list(found) == ["message-id", "size", "remote", "filter", "server", "reply"]
    assert found["message-id"] == "<1.a@b.example>"
    assert found["size"] == str(len(message))
    assert found["remote"] == "192.0.2.7"
    assert found["reply"] == "250 2.0.0 Ok: queued as 4BXyz"
    for side in ("filter", "server"):
        assert 0 <= float(found[side]) < 30


WITHOUT: dict[str, tuple[dict[str, str], dict[str, Reply], list[str]]] = {
    "refused by the filter": ({"FilterCommand": "exit 1"}, {}, ["size", "filter"]),
    "passed": ({}, {}, ["size", "server", "reply"]),
    "refused at DATA": (
        {"FilterCommand": "cat"},
        {"DATA": b"451 no\r\n"},
        ["size", "filter", "reply"],
    ),
    "lost at the end": ({"FilterCommand": "cat"}, {"DOT": Close()}, ["size", "filter"]),
    "refused at the end": (
        {"FilterCommand": "cat"},
        {"DOT": b"554 no\r\n"},
        ["size", "filter", "server", "reply"],
    ),
}


@pytest.mark.parametrize(("settings", "script", "names"), WITHOUT.values(), ids=WITHOUT)
def test_details_leave_out_what_is_not_known(
    settings: dict[str, str],
    script: dict[str, Reply],
    names: list[str],
    proxsmtpd: StartDaemon,
    make_server: MakeServer,
) -> None:
    daemon = proxsmtpd(settings, level=3, server=make_server(script))
    daemon.connect().message(MESSAGE)
    assert list(details(daemon)) == names


IDS = {
    b"message-id : <a@b>\r\n\r\n": "<a@b>",
    b"X: 1\r\nMESSAGE-ID:<a@b>\r\nY: 2\r\n\r\nx\r\n": "<a@b>",
    b"Message-ID: <a b,c\x1b=1>\r\n\r\n": r"<a\x20b\x2cc\x1b=1>",
    b"Message-ID: <" + b"x" * 300 + b">\r\n\r\n": "<" + "x" * 255,
    b"Subject: x\r\n\r\nMessage-ID: <a@b>\r\n": None,
    b"Message-ID:\r\n\r\n<a@b>\r\n": None,
    b"X-Message-ID: <a@b>\r\n\r\n": None,
    b"Message-ID: none\r\n\r\n": None,
    b"X: " + b"x" * 20_000 + b"\r\nMessage-ID: <a@b>\r\n\r\n": None,
}


@pytest.mark.parametrize("command", ["", "cat"])
def test_message_id(command: str, proxsmtpd: StartDaemon) -> None:
    """It cannot forge a field or a line, nor make one long."""
    daemon = proxsmtpd({"FilterCommand": command}, level=3)
    client = daemon.connect()
    client.start()
    ids = {}
    for message in IDS:
        client.envelope(b"<a@b.example>", [b"<c@d.example>"])
        client.expect(b"DATA", b"354")
        for part in (message[:7], message[7:30], message[30:], b".\r\n"):
            client.send(part)
        assert client.reply() == QUEUED
        ids[message] = details(daemon).get("message-id")
        daemon.forget_log()
    assert ids == IDS


def test_filter_counts_where_the_server_is_lost(
    proxsmtpd: StartDaemon, make_server: MakeServer
) -> None:
    server = make_server({"DOT": Close()})
    daemon = proxsmtpd({"FilterCommand": "cat"}, level=2, server=server)
    assert daemon.connect().message(STUFFED).startswith(b"421")
    found = report_when_idle(daemon)
    assert found.kinds == "1 421"
    assert found.filter is not None
    assert found.filter.number == 1
    assert found.server is None


# --- The signal ---


def test_level_is_notice(proxsmtpd: StartDaemon) -> None:
    assert report(proxsmtpd(level=2)).messages == 0
    silent = proxsmtpd(level=1)
    silent.process.send_signal(signal.SIGUSR1)
    assert deliver(silent, STUFFED) == QUEUED
    assert silent.stop() == 0
    assert lines_of(silent) == []


def test_each_signal_brings_a_new_report(proxsmtpd: StartDaemon) -> None:
    """The first wakes a daemon that has nothing to do."""
    daemon = proxsmtpd({"FilterCommand": "cat"}, level=2)
    counts = []
    for _ in range(3):
        counts.append(report(daemon).messages)
        deliver(daemon, STUFFED)
    assert counts == [0, 1, 2]
    assert daemon.process.poll() is None


CLIENTS, MESSAGES = 6, 25


def work(daemon: Daemon) -> None:
    """Send messages on one connection, each of which must be accepted."""
    client = daemon.connect(timeout=60)
    client.start()
    for number in range(MESSAGES):
        if number:
            client.envelope()
        assert client.message(STUFFED) == QUEUED
    client.quit()


def test_reports_under_load(proxsmtpd: StartDaemon, server: ScriptedServer) -> None:
    """None is torn, nothing in them goes back, and no client notices them."""
    daemon = proxsmtpd({"FilterCommand": "cat"}, level=2)
    reports = []
    with ThreadPoolExecutor(CLIENTS) as pool:
        at_work = [pool.submit(work, daemon) for _ in range(CLIENTS)]
        while not all(future.done() for future in at_work):
            reports.append(report(daemon))
    for future in at_work:
        future.result()
    last = report_when_idle(daemon)
    assert last.kinds == f"{CLIENTS * MESSAGES} FILTERED"
    assert last.octets == CLIENTS * MESSAGES * len(MESSAGE)
    assert last.connections == {
        "now": 0,
        "at most": CLIENTS,
        "accepted": CLIENTS,
        "refused": 0,
    }
    assert last.filter is not None
    assert last.filter.number == CLIENTS * MESSAGES
    assert len(server.messages) == CLIENTS * MESSAGES
    for counted in ([r.messages for r in reports], [r.octets for r in reports]):
        assert counted == sorted(counted)
    for found in reports:
        numbers = map(int, re.findall(r"(?:^|, )(\d+) ", found.kinds))
        assert sum(numbers) == found.messages
        assert found.connections["now"] <= found.connections["at most"] <= CLIENTS


def test_signal_while_the_daemon_ends(
    proxsmtpd: StartDaemon, server: ScriptedServer, tmp_path: Path
) -> None:
    """It counts for none of those by which the daemon gives up on a message."""
    ready, go = tmp_path / "ready", tmp_path / "go"
    os.mkfifo(go)
    daemon = proxsmtpd({"FilterCommand": f": >{ready}; read go <{go}; cat"})
    idle = daemon.connect()
    idle.start()
    client = daemon.connect()
    client.start()
    client.expect(b"DATA", b"354")
    client.send(STUFFED + b".\r\n")
    assert poll(ready.exists)
    daemon.process.send_signal(signal.SIGTERM)
    assert idle.reply() == b"421 Service shutting down\r\n"
    idle.close()
    for _ in range(3):
        daemon.process.send_signal(signal.SIGUSR1)
    go.write_text("go\n")
    assert client.reply() == QUEUED
    client.close()
    assert daemon.wait() == 0
    assert len(server.messages) == 1


def test_filters_do_not_inherit_the_handling(
    proxsmtpd: StartDaemon, tmp_path: Path
) -> None:
    """A filter has the signal at its default, as all others."""
    saved = tmp_path / "signals"
    daemon = proxsmtpd({"FilterCommand": f"grep ^Sig /proc/self/status >{saved}; cat"})
    assert deliver(daemon, STUFFED) == QUEUED
    masks = dict(re.findall(r"^(Sig\w+):\s*([0-9a-f]+)$", saved.read_text(), re.M))
    bit = 1 << (signal.SIGUSR1 - 1)
    for name in ("SigBlk", "SigIgn", "SigCgt"):
        assert not int(masks[name], 16) & bit


# --- The functions ---


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ([], None),
        ([0.5], (1, 0.5, 0.5, 0.5)),
        ([1, 2, 3], (3, 2, 3, 3)),
        ([0.001, 0.002, 0.003, 0.004, 20], (5, 0.003, 20, 20)),
        (range(1, 102), (101, 51, 96, 101)),
        ([0] * 95 + [9] * 6, (101, 0, 9, 9)),
        ([0] * 96 + [9] * 5, (101, 0, 0, 9)),
        ([0.0004, 0.0006, 1000], (3, 0.001, 1000, 1000)),
    ],
)
def test_describe_times(
    times: Sequence[float], expected: tuple[float, ...] | None
) -> None:
    match = re.fullmatch(rf"{NO_TIMES}|{TIMES}", describe_times(times))
    assert match
    assert times_of(match.groups()) == expected


def test_last_thousand_times_are_kept() -> None:
    statistics = Statistics()
    for number in range(1500):
        statistics.note_message("FILTERED", 0, float(number))
    statistics.note_resources()
    found = parse(statistics.report(0, 0))
    assert found.filter is not None
    assert (found.filter.number, found.filter.longest) == (1000, 1499)
    assert 999 <= found.filter.median <= 1001
    assert found.server is None


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        ("FILTERED", "FILTERED"),
        ("FILTER-ERROR, passed", "FILTER-ERROR, passed"),
        ("550 Content Rejected; x", "550"),
        ("550", "550"),
        ("250 2.0.0 first 250 second", "250"),
        ("OBSERVED: 550 x", "OBSERVED: 550"),
        ("OBSERVED: FILTERED", "OBSERVED: FILTERED"),
    ],
)
def test_kinds(status: str, kind: str) -> None:
    statistics = Statistics()
    statistics.note_message(status, 7)
    statistics.note_resources()
    found = parse(statistics.report(0, 0))
    assert (found.kinds, found.octets) == (f"1 {kind}", 7)


def test_clock_that_is_set_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Durations are measured by a clock that nobody sets."""
    statistics = Statistics()
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert re.fullmatch(r"since .*, [0-9]+ seconds", statistics.report(0, 0)[0])
