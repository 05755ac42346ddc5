"""The benchmark runs.  How fast it is, is no test: see test/tools/bench/RESULTS."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from helpers import requires

BENCH = Path(__file__).resolve().parents[1] / "tools" / "bench" / "bench.py"
NUMBER = r"[\d,.]*[1-9][\d,.]*"


def run_bench(output: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the shortest benchmark of what the arguments say."""
    return subprocess.run(
        [sys.executable, str(BENCH), "--quick", "--output", str(output), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def row(report: str, table: str, title: str) -> list[str]:
    """Return the numbers of a line in the table whose header begins so."""
    lines = report.split(f"\n{table} ", 1)[1].splitlines()
    return next(line for line in lines if line.startswith(title)).split()[2:]


@requires("postfix", "/usr/sbin/smtp-source")
def test_a_case_is_measured_with_whoever_is_installed(tmp_path: Path) -> None:
    output = tmp_path / "RESULTS"
    done = run_bench(output, "--only", "1,start", "--filters", "none,cat")
    assert done.returncode == 0, done.stderr
    report = output.read_text()
    for table in ("no filter", "cat, a pipe"):
        rates = row(report, table, "1 session")
        # Ours and the floor are always there.
        assert len(rates) >= 2, report
        measured = [rate for rate in rates if rate != "-"]
        assert all(re.fullmatch(NUMBER, rate) for rate in measured), report
    assert re.search(rf"^ours +{NUMBER} ms$", report, re.M), report
    assert "ours, 1 session" not in report, "messages of ours have failed"


@requires("postfix", "/usr/sbin/smtp-source")
@requires("openssl", "/usr/bin/openssl")
def test_encryption_is_measured(tmp_path: Path) -> None:
    output = tmp_path / "RESULTS"
    done = run_bench(output, "--only", "tls")
    assert done.returncode == 0, done.stderr
    report = output.read_text()
    for side in ("neither", "client", "server", "both"):
        times = rf"({NUMBER} ms +){{4}}"
        # Only root may look at the memory of a process with a key.
        idle = rf"({NUMBER} KiB|-)"
        assert re.search(rf"^{side} +{times}{idle}$", report, re.M), report
    assert re.search(rf" shake hands: {NUMBER} a second, {NUMBER} ms", report), report


def test_an_unknown_case_is_refused(tmp_path: Path) -> None:
    done = run_bench(tmp_path / "RESULTS", "--only", "nonesuch")
    assert done.returncode == 2
    assert "nonesuch is none of 1, 20, 100" in done.stderr
    assert not (tmp_path / "RESULTS").exists()
