"""One case: all contenders in turn, round after round."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from cases import Case, Filter, Load, Pace
from contenders import Contender, Cpu, Site
from load import Outcome, Relay, Spawner, Straight, Subject

# More messages than this in one measurement would only use up the machine's ports.
MOST = 4000
BOUNDLESS = 1_000_000
CALIBRATION = 0.4  # of the window
CONNECTIONS = 1000  # MaxConnections


@dataclass
class Series:
    """What one contender did in all rounds of a case."""

    outcomes: list[Outcome] = field(default_factory=list)
    cpu: Cpu = field(default_factory=Cpu)

    def add(self, outcome: Outcome, cpu: Cpu) -> None:
        """Add a round."""
        self.outcomes.append(outcome)
        self.cpu = Cpu(self.cpu.own + cpu.own, self.cpu.children + cpu.children)

    @property
    def rate(self) -> float:
        """Messages a second: the median of the rounds."""
        return statistics.median(outcome.rate for outcome in self.outcomes)

    @property
    def asked(self) -> int:
        """The messages of all rounds."""
        return sum(outcome.asked for outcome in self.outcomes)

    @property
    def failed(self) -> int:
        """Those of them that were not accepted in time."""
        return sum(outcome.failed for outcome in self.outcomes)

    @property
    def complaint(self) -> str:
        """A complaint of the load program, if there was one."""
        return next((o.complaint for o in self.outcomes if o.complaint), "")

    def cpu_per_thousand(self) -> Cpu:
        """Processor seconds that 1,000 accepted messages took."""
        thousands = max(self.asked - self.failed, 1) / 1000
        return Cpu(self.cpu.own / thousands, self.cpu.children / thousands)


# A contender's key gives its series, a filter's those, a case's those.
Results = dict[str, dict[str, dict[str, Series]]]


@dataclass(frozen=True)
class Plan:
    """A number of messages that fits a contender's speed, and a bound in seconds."""

    count: int
    seconds: float


def calibrate(subject: Subject, load: Load, pace: Pace) -> Plan:
    """Find out with a short run how many messages fill a window."""
    outcome = subject.send(load, BOUNDLESS, pace.window * CALIBRATION)
    subject.settle()
    fitting = min(round(outcome.rate * pace.window), MOST)
    return Plan(max(fitting, load.parallel), pace.patience)


def subject_of(
    contender: Contender, site: Site, kind: Filter, stack: contextlib.ExitStack
) -> Subject:
    """Start a contender, or take the floor of that filter; ends with the stack."""
    if contender.start is not None:
        running = contender.start(site, kind.settings, CONNECTIONS)
        return Relay(stack.enter_context(running))
    if kind.command:
        return Spawner(kind.command, site.directory)
    return Straight(site.sink_port)


def in_turn(items: Sequence[str], number: int) -> Iterator[str]:
    """The items, another one first in each round."""
    start = number % len(items)
    return iter([*items[start:], *items[:start]])


def measure_round(subject: Subject, load: Load, plan: Plan, series: Series) -> None:
    """Send a plan's messages and note what became of them."""
    before = subject.cpu()
    outcome = subject.send(load, plan.count, plan.seconds)
    subject.settle()
    series.add(outcome, subject.cpu() - before)


def measure(
    site: Site, case: Case, kind: Filter, contenders: Sequence[Contender], pace: Pace
) -> dict[str, Series]:
    """Measure one case with one filter; returns a series for each contender's key."""
    taking_part = [
        contender
        for contender in contenders
        if contender.key in case.contenders and (contender.filters or not kind.command)
    ]
    with contextlib.ExitStack() as stack:
        subjects = {
            contender.key: subject_of(contender, site, kind, stack)
            for contender in taking_part
        }
        plans = {
            key: calibrate(subject, case.load, pace)
            for key, subject in subjects.items()
        }
        found = {key: Series() for key in subjects}
        for number in range(pace.rounds):
            for key in in_turn(list(subjects), number):
                measure_round(subjects[key], case.load, plans[key], found[key])
    return found


def ratio(series: Mapping[str, Series], key: str, other: str) -> float | None:
    """One contender's rate divided by another's, if both were measured."""
    if key not in series or other not in series or not series[other].rate:
        return None
    return series[key].rate / series[other].rate
