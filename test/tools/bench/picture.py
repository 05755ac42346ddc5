"""The results as a picture (SVG) that people rather look at than tables."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape
from typing import NamedTuple

from measure import Series
from report import Report, number

COLORS = {
    "ours": "#0b6e4f",
    "c": "#b3b3b3",
    "cured": "#7f8fa6",
    "haproxy": "#d9a441",
    "floor": "#d8cfc4",
}
WIDTH, LEFT, BAR, GAP = 760, 190, 14, 16  # pixels
SCALE = WIDTH - LEFT - 90  # of the longest bar
FONT = 'font-family="sans-serif" font-size="12"'


class Row(NamedTuple):
    """A case with its bars: key and messages a second of each contender."""

    title: str
    bars: Sequence[tuple[str, float]]


def rows(report: Report) -> Iterator[Row]:
    """Yield a row for each case and filter that was measured."""
    for kind in report.filters:
        for case in report.cases:
            series = report.series(case, kind)
            bars = [(key, rate(found)) for key, found in series.items()]
            if bars:
                yield Row(f"{case.title}, {kind.key}", bars)


def rate(series: Series) -> float:
    """Return the messages a second, at least a small number for the logarithm."""
    return max(series.rate, 0.1)


def draw(report: Report) -> str:
    """Return the picture: messages a second by case, on a logarithmic scale."""
    found = list(rows(report))
    rates = [value for row in found for _, value in row.bars]
    if not rates:
        return ""
    lowest = 10 ** math.floor(math.log10(min(rates)))
    per_decade = SCALE / max(math.log10(max(rates) / lowest), 1)

    def length(value: float) -> float:
        return per_decade * math.log10(value / lowest) + 2

    parts = []
    y = 64
    for row in found:
        middle = y + len(row.bars) * BAR / 2 + 4
        parts.append(
            f'<text x="{LEFT - 8}" y="{middle:.0f}" text-anchor="end" {FONT}>'
            f"{escape(row.title)}</text>"
        )
        for key, value in row.bars:
            parts.append(
                f'<rect x="{LEFT}" y="{y}" width="{length(value):.1f}"'
                f' height="{BAR - 2}" fill="{COLORS[key]}"/>'
                f'<text x="{LEFT + length(value) + 5:.1f}" y="{y + 10}" {FONT}>'
                f"{number(value)}</text>"
            )
            y += BAR
        y += GAP
    keys = [each.key for each in report.contenders]
    legend = "".join(
        f'<rect x="{LEFT + 110 * n}" y="34" width="12" height="12"'
        f' fill="{COLORS[key]}"/>'
        f'<text x="{LEFT + 110 * n + 17}" y="45" {FONT}>'
        f"{escape(report.title(key))}</text>"
        for n, key in enumerate(keys)
    )
    title = "Messages a second (logarithmic scale; longer is better)"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y}"'
        f' viewBox="0 0 {WIDTH} {y}">\n'
        f'<rect width="100%" height="100%" fill="white"/>\n'
        f'<text x="{LEFT}" y="20" {FONT} font-weight="bold">{title}</text>\n'
        f"{legend}\n" + "\n".join(parts) + "\n</svg>\n"
    )
