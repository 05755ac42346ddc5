"""`make bench`: proxsmtpd beside the C program, a plain relay, and nothing at all.

The load is Postfix's smtp-source and smtp-sink; everything is on free ports of
127.0.0.1 and ends with the benchmark, an interrupted one too.  The contenders run side
by side and take turns, so that what else the machine does hits them alike; compare
ratios, not numbers of different runs.  The result is a text, test/tools/bench/RESULTS.

cases.py says what is measured and what is to be reached, contenders.py how the
programs are started, load.py how messages are sent, measure.py how a case is measured,
probes.py what else is, encryption.py what TLS costs, and report.py writes it down.
bulk.py is the load where Postfix's is itself too slow, or has no TLS.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import probes
from cases import CASES, FILTERS, FULL, QUICK, Case
from contenders import (
    CONTENDERS,
    HERE,
    BenchError,
    Site,
    bulk_sink,
    raise_descriptor_limit,
    smtp_sink,
)
from encryption import encryption, make_certificate
from interrupts import INTERRUPTS
from measure import measure
from picture import draw
from report import Report, render

PROBES = ("start", "idle", "slow", "tls")
T = TypeVar("T")


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Measure proxsmtpd and its peers.")
    names = ", ".join([*(case.key for case in CASES), *PROBES])
    parser.add_argument("--rounds", type=int, help="rounds of each case (default 5)")
    parser.add_argument("--quick", action="store_true", help="one short round")
    parser.add_argument("--only", default="", metavar="CASE,...", help=names)
    for name, known in (("filters", FILTERS), ("contenders", CONTENDERS)):
        keys = ", ".join(each.key for each in known)
        parser.add_argument(f"--{name}", default="", metavar="NAME,...", help=keys)
    parser.add_argument("--output", type=Path, default=HERE / "RESULTS")
    return parser.parse_args(arguments)


def chosen(text: str, known: dict[str, T]) -> list[T]:
    """The things with the keys in a list with commas, or all; `BenchError`."""
    keys = text.split(",") if text else list(known)
    unknown = [key for key in keys if key not in known]
    if unknown:
        raise BenchError(f"{', '.join(unknown)} is none of {', '.join(known)}")
    return [each for key, each in known.items() if key in keys]


def plan(options: argparse.Namespace, site: Site) -> tuple[Report, list[str]]:
    """An empty report of what is asked for, and the probes that are."""
    pace = QUICK if options.quick else FULL
    if options.rounds:
        pace = replace(pace, rounds=options.rounds)
    wanted = chosen(options.contenders, {each.key: each for each in CONTENDERS})
    present = [each for each in wanted if each.available(site)]
    parts: dict[str, Case | str] = {case.key: case for case in CASES}
    parts.update({name: name for name in PROBES})
    asked = chosen(options.only, parts)
    report = Report(
        pace,
        [part for part in asked if isinstance(part, Case)],
        chosen(options.filters, {each.key: each for each in FILTERS}),
        present,
        [each.title for each in wanted if each not in present],
        os.getloadavg(),
    )
    return report, [part for part in asked if isinstance(part, str)]


def tell(text: str) -> None:
    """Say on standard error how far it has come."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def run_cases(report: Report, site: Site, bulk_site: Site) -> None:
    """Measure the cases, with each filter that they have."""
    for case in report.cases:
        report.results[case.key] = {}
        where = bulk_site if case.load.bulk else site
        for kind in report.filters:
            if kind.key in case.filters:
                tell(f"{case.title}, {kind.title}")
                series = measure(where, case, kind, report.contenders, report.pace)
                report.results[case.key][kind.key] = series


def run_probes(report: Report, site: Site, names: Sequence[str]) -> None:
    """Measure what is no case."""
    if "start" in names:
        tell("from exec to listening")
        report.starts = probes.start_times(site, report.contenders, report.pace.starts)
    for key, start in probes.starters(report.contenders):
        if "idle" in names:
            tell(f"idle connections, {key}")
            report.idle[key] = probes.idle(site, start, report.pace)
    for each in report.contenders:
        if "slow" in names and each.start is not None and each.filters:
            tell(f"slow filters, {each.key}")
            rounds = min(report.pace.rounds, 3)
            report.slow[each.key] = probes.slow_filter(site, each.start, rounds)
    for key, start in probes.starters(report.contenders):
        if "tls" in names and key == "ours" and make_certificate(site.directory):
            tell("encryption")
            report.encryption = encryption(site, start, report.pace)


def run(options: argparse.Namespace) -> None:
    """Measure what is asked for and write it down."""
    with contextlib.ExitStack() as stack:
        directory = tempfile.TemporaryDirectory(prefix="proxsmtpd-bench-")
        place = Path(stack.enter_context(directory))
        report, names = plan(options, Site(place))
        site = stack.enter_context(Site(place).sink(smtp_sink))
        bulk_site = stack.enter_context(Site(place).sink(bulk_sink))
        run_probes(report, site, names)
        run_cases(report, site, bulk_site)
    options.output.write_text(render(report))
    picture = options.output.with_suffix(".svg")
    picture.write_text(draw(report))
    tell(f"the results are in {options.output} and {picture}")


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark; returns its exit status."""
    INTERRUPTS.install()
    raise_descriptor_limit()
    try:
        run(parse_arguments(arguments))
    except BenchError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
