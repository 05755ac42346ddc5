"""The results as text that people read."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Optional

from cases import (
    IDLE_GOAL,
    SLOW_CLIENTS,
    VISITS_A_SECOND,
    Case,
    Filter,
    Pace,
    goal,
)
from contenders import C_PROGRAM, HERE, Contender, find, our_command
from encryption import HAND_SHAKERS, Encryption, Side, median
from measure import Results, Series, ratio
from probes import Idle, Patience

UNKNOWN = "-"


@dataclass
class Report:
    """All that one run has found; parts that were not asked for are empty."""

    pace: Pace
    cases: Sequence[Case]
    filters: Sequence[Filter]
    contenders: Sequence[Contender]
    absent: Sequence[str] = ()
    load_average: tuple[float, float, float] = (0.0, 0.0, 0.0)
    results: Results = field(default_factory=dict)
    starts: dict[str, float] = field(default_factory=dict)
    idle: dict[str, Idle] = field(default_factory=dict)
    slow: dict[str, Patience] = field(default_factory=dict)
    encryption: Optional[Encryption] = None

    def series(self, case: Case, kind: Filter) -> Mapping[str, Series]:
        """What the contenders did in a case with a filter; empty if not measured."""
        return self.results.get(case.key, {}).get(kind.key, {})

    def title(self, key: str) -> str:
        """The title of the contender with that key."""
        return next(each.title for each in self.contenders if each.key == key)


# --- Numbers and tables -------------------------------------------------------


def number(value: float) -> str:
    """A number with about three digits that count."""
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def marked(value: float | None, aim: float | None) -> str:
    """A ratio with its goal, and a mark where it is missed."""
    if value is None:
        return UNKNOWN + " "
    if aim is None:
        return number(value) + " "
    return f"{number(value)} ({aim:g}){' ' if value >= aim else '!'}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lines of columns: the first to the left, the others to the right."""
    widths = [
        max(len(row[column]) for row in [header, *rows])
        for column in range(len(header))
    ]
    lines = []
    for row in [header, *rows]:
        cells = [f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:])]
        lines.append("  ".join([f"{row[0]:{widths[0]}}", *cells]).rstrip())
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)


def section(title: str, *parts: str) -> str:
    """A titled part of the report."""
    return "\n\n".join([f"{title}\n{'=' * len(title)}", *parts])


# --- The sections -------------------------------------------------------------


def ratios(report: Report, others: Sequence[str]) -> str:
    """A table of ours divided by others, a column for each other and filter."""
    columns = [
        (other, kind)
        for other in others
        for kind in report.filters
        if any(other in report.series(case, kind) for case in report.cases)
    ]
    header = [f"/ {report.title(other)}, {kind.key} " for other, kind in columns]
    rows = [
        [case.title]
        + [
            marked(
                ratio(report.series(case, kind), "ours", other),
                goal(case.key, other, kind.key),
            )
            for other, kind in columns
        ]
        for case in report.cases
    ]
    return table(["ours", *header], rows) if columns else ""


def ratio_section(report: Report) -> str:
    """All that compares ours with another."""
    text = """\
Messages a second of ours divided by those of the other.  In brackets what is to be
reached, `!` where it is not.  "none" is no filter, "cat" the filter `cat` as a pipe,
"file" the filter `true` on a file.  The floor is smtp-source straight to smtp-sink, or
the filter started alone, by as many as are under way, at most one a processor."""
    tables = [ratios(report, others) for others in (["c"], ["cured"])]
    tables.append(ratios(report, ["haproxy", "floor"]))
    return section("Ratios", text, *filter(None, tables))


def rounds(report: Report) -> str:
    """How many rounds there were, in words."""
    return f"{report.pace.rounds} round{'s' if report.pace.rounds > 1 else ''}"


def rate_cell(series: Series | None) -> str:
    """A rate, or what there is instead."""
    return UNKNOWN if series is None else number(series.rate)


def keyed(report: Report, kind: Filter) -> list[str]:
    """The keys of the contenders that were measured with a filter."""
    return [
        each.key
        for each in report.contenders
        if any(each.key in report.series(case, kind) for case in report.cases)
    ]


def rate_table(report: Report, kind: Filter) -> str:
    """The messages a second with one filter."""
    keys = keyed(report, kind)
    rows = [
        [case.title, *(rate_cell(report.series(case, kind).get(key)) for key in keys)]
        for case in report.cases
        if report.series(case, kind)
    ]
    return table([kind.title, *map(report.title, keys)], rows)


def failures(report: Report) -> str:
    """The messages that failed, a line for each series that had some."""
    lines = [
        f"  {report.title(key)}, {case.title}, {kind.title}: {series.failed} of"
        f" {series.asked}{f' ({series.complaint})' if series.complaint else ''}"
        for case in report.cases
        for kind in report.filters
        for key, series in report.series(case, kind).items()
        if series.failed
    ]
    if not lines:
        return "No message failed."
    when = f"refused, dropped, or not through after {report.pace.patience:g} s"
    return "\n".join([f"Messages that failed ({when}):", *lines])


def rate_section(report: Report) -> str:
    """The rates themselves."""
    text = f"""\
Of messages that were accepted; median of {rounds(report)}, in which the contenders take
turns.  A lone client is a process of its own; starting them all is in the time."""
    tables = [rate_table(report, kind) for kind in report.filters]
    return section("Messages a second", text, *tables, failures(report))


def cpu_cell(series: Series | None) -> str:
    """Processor seconds: of the program, and of its children if there are any."""
    if series is None or series.failed == series.asked:
        return UNKNOWN
    cpu = series.cpu_per_thousand()
    own = f"{cpu.own:.2f}"
    return f"{own} + {cpu.children:.2f}" if cpu.children else own


def cpu_section(report: Report) -> str:
    """What the processors had to do."""
    text = """\
User and system time of the program, plus that of its children (the filters)."""
    tables = []
    for kind in report.filters:
        keys = [key for key in keyed(report, kind) if key != "floor"]
        rows = [
            [
                case.title,
                *(cpu_cell(report.series(case, kind).get(key)) for key in keys),
            ]
            for case in report.cases
            if report.series(case, kind)
        ]
        tables.append(table([kind.title, *map(report.title, keys)], rows))
    return section("Processor seconds a 1,000 messages", text, *tables)


def start_section(report: Report) -> str:
    """How long a start takes."""
    rows = [
        [report.title(key), f"{seconds * 1000:.1f} ms"]
        for key, seconds in report.starts.items()
    ]
    title = f"From exec to listening, median of {report.pace.starts}"
    return section(title, table(["", "time"], rows))


def weight_cell(found: Idle, connections: int) -> str:
    """Memory and threads with so many connections, or where it gave up."""
    for weight in found.weights:
        if weight.connections == connections:
            return f"{weight.memory / 1024:.1f} MiB, {weight.threads}"
    return UNKNOWN if found.ended_at is None else f"gave up at {found.ended_at}"


def idle_each(key: str, found: Idle) -> str:
    """Memory for one connection, with a goal if it is ours."""
    cell = f"{found.each:.1f} KiB"
    if key != "ours":
        return cell + " "
    return f"{cell} ({IDLE_GOAL:g}){'!' if found.each > IDLE_GOAL else ' '}"


def visit_cells(found: Idle) -> list[str]:
    """How new connections fared beside the idle ones."""
    visits = found.visits
    if visits is None or not visits.waits:
        return [UNKNOWN] * 4
    waits = sorted(visits.waits)
    return [
        f"{visits.asked / visits.seconds:.0f} a second",
        f"{visits.refused} of {visits.asked}",
        f"{waits[len(waits) // 2] * 1000:.1f} ms",
        f"{waits[-1] * 1000:.1f} ms",
    ]


def idle_section(report: Report) -> str:
    """What idle connections cost, and whether others still get in."""
    sizes = report.pace.idle
    weights = [
        [
            report.title(key),
            *(weight_cell(found, size) for size in sizes),
            idle_each(key, found),
        ]
        for key, found in report.idle.items()
    ]
    visits = [
        [report.title(key), *visit_cells(found)] for key, found in report.idle.items()
    ]
    columns = [f"{size:,} open" for size in sizes]
    text = f"""\
Proportional set size and number of threads with connections that have been greeted and
say nothing, and what one more of them takes.  Then new connections beside the most idle
ones, {VISITS_A_SECOND} a second: refused are those that got no greeting.  Not tried
with a program that gave up before."""
    return section(
        "Idle connections",
        text,
        table(["", *columns, "each "], weights),
        table(["", "opened", "refused", "greeted in", "the last in"], visits),
    )


def slow_section(report: Report) -> str:
    """Whether slow filters are in the way of others."""
    rows = [
        [
            report.title(key),
            str(found.slow),
            f"{found.alone * 1000:.1f} ms",
            f"{found.beside * 1000:.1f} ms",
        ]
        for key, found in report.slow.items()
    ]
    text = f"""\
What a message takes that is filtered by `cat`, alone and while the filter of
{SLOW_CLIENTS} other connections sleeps."""
    return section(
        "Slow filters", text, table(["", "asleep", "alone", "beside them"], rows)
    )


def side_row(name: str, side: Side) -> list[str]:
    """What was measured with TLS on these sides."""
    times = [
        f"{seconds * 1000:.1f} ms"
        for spent in (median(side.sessions), median(side.large))
        for seconds in spent
    ]
    return [name, *times, UNKNOWN if side.idle is None else f"{side.idle:.1f} KiB"]


def encryption_section(found: Encryption) -> str:
    """What TLS costs."""
    header = [
        "TLS on",
        "session",
        "(of it ours)",
        "20 MB",
        "(of it ours)",
        "idle, each",
    ]
    rows = [side_row(name, side) for name, side in found.sides.items()]
    text = """\
Of ours, with TLS 1.3 and P-256: a session of one small message, and one of 20 MB, with
our processor time in brackets; and what an idle connection takes.  Client and server
are the same in clear."""
    handshakes = f"""\
{HAND_SHAKERS} clients that only shake hands: {found.handshakes:.0f} a second, \
{found.handshake_cpu * 1000:.2f} ms of our processor time each."""
    return section("Encryption", text, table(header, rows), handshakes)


# --- The machine --------------------------------------------------------------


def output_of(*command: str) -> str:
    """What a program prints, one line of it; empty if it cannot be asked."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=10, check=False, cwd=HERE
        )
    except OSError:
        return ""
    return done.stdout.strip().partition("\n")[0]


def processor() -> str:
    """The processor's model."""
    try:
        found = re.search(
            r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M
        )
    except OSError:
        found = None
    return found.group(1) if found else platform.processor() or platform.machine()


def memory_gib() -> float:
    """The machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def versions(report: Report) -> list[tuple[str, str]]:
    """The programs that took part."""
    keys = {each.key for each in report.contenders}
    commit = output_of("git", "rev-parse", "--short", "HEAD")
    ours = output_of(*our_command(), "-v")
    found = [("Ours", f"{ours}, commit {commit}" if commit else ours)]
    found.append(("Python", platform.python_version()))
    if keys & {"c", "cured"}:
        found.append(("C", output_of(C_PROGRAM, "-v")))
    if "haproxy" in keys:
        found.append(("HAProxy", output_of(find("haproxy") or "haproxy", "-v")))
    mail_version = output_of(find("postconf") or "postconf", "-d", "-h", "mail_version")
    return [*found, ("Load", f"smtp-source and smtp-sink of Postfix {mail_version}")]


def machine(report: Report) -> str:
    """What the numbers are true for."""
    now = datetime.now(timezone.utc)
    lines = [
        ("Date", f"{now:%Y-%m-%d %H:%M} UTC"),
        ("Machine", f"{processor()}, {os.cpu_count()} of them"),
        ("Memory", f"{memory_gib():.0f} GiB"),
        ("System", f"{platform.system()} {platform.release()}"),
        *versions(report),
        ("Load average", f"{report.load_average[0]:.2f} before the start"),
    ]
    if report.absent:
        lines.append(("Left out", ", ".join(report.absent)))
    return "\n".join(f"{name:13}{text}" for name, text in lines)


def render(report: Report) -> str:
    """The whole text."""
    title = "proxsmtpd: how fast it is (make bench)"
    parts = [f"{title}\n{'#' * len(title)}", machine(report)]
    if report.results:
        parts += [ratio_section(report), rate_section(report), cpu_section(report)]
    if report.starts:
        parts.append(start_section(report))
    if report.idle:
        parts.append(idle_section(report))
    if report.slow:
        parts.append(slow_section(report))
    if report.encryption:
        parts.append(encryption_section(report.encryption))
    return "\n\n\n".join(parts) + "\n"
