"""What the benchmark measures and what is to be reached, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Load:
    """How messages are sent: the arguments of smtp-source, in substance."""

    sessions: int = 1
    lasting: bool = False  # many messages a connection, not a connection a message
    length: int = 0  # octets of payload; 0: the few lines that smtp-source makes up
    clients: int = 1  # processes, each with that many sessions
    bulk: bool = False  # bulk.py, which is fast with large messages, not smtp-source

    @property
    def parallel(self) -> int:
        """Messages that are under way at a time."""
        return self.sessions * self.clients


@dataclass(frozen=True)
class Filter:
    """A filter, as proxsmtpd's configuration names it."""

    key: str
    title: str
    settings: Mapping[str, str] = field(default_factory=dict)

    @property
    def command(self) -> str:
        """The shell command; empty without a filter."""
        return self.settings.get("FilterCommand", "")


@dataclass(frozen=True)
class Case:
    """One row of the tables."""

    key: str
    title: str
    load: Load
    filters: tuple[str, ...] = ("none", "cat", "file")
    contenders: tuple[str, ...] = ("ours", "c", "cured", "haproxy", "floor")


@dataclass(frozen=True)
class Pace:
    """How long everything takes."""

    rounds: int
    window: float  # seconds that the messages of one measurement should take
    patience: float  # seconds after which a message that is not through has failed
    starts: int  # starts that are timed
    idle: tuple[int, ...]  # numbers of idle connections, rising
    visits: int  # new connections made beside the idle ones
    handshakes: int  # seconds of a round of them


FULL = Pace(5, 0.7, 3.5, 20, (0, 500, 1000, 2000), 1000, 2)
QUICK = Pace(1, 0.15, 2.0, 3, (0, 50, 100), 100, 1)

VISITS_A_SECOND = 200
SLOW_CLIENTS = 50

FILTERS = (
    Filter("none", "no filter"),
    Filter("cat", "cat, a pipe", {"FilterType": "pipe", "FilterCommand": "cat"}),
    Filter("file", "true, on a file", {"FilterType": "file", "FilterCommand": "true"}),
)

CASES = (
    Case("1", "1 session", Load()),
    Case("20", "20 sessions", Load(20)),
    Case("100", "100 sessions", Load(100)),
    Case("lasting", "10 lasting sessions", Load(10, lasting=True)),
    Case("100k", "100 KB, 10 lasting", Load(10, lasting=True, length=100_000)),
    Case("20m", "20 MB, 1 lasting", Load(1, lasting=True, length=20_000_000)),
    Case("bulk", "20 MB, bulk.py", Load(1, True, 20_000_000, bulk=True)),
    # smtp-source opens its sessions' connections one at a time, so that one SYN that
    # a full listen queue drops holds up all of its sessions for a second.  Clients
    # that know nothing of each other show what that queue alone does.
    Case("20c", "20 lone clients", Load(clients=20), ("none",), ("ours", "c", "cured")),
    Case(
        "100c", "100 lone clients", Load(clients=100), ("none",), ("ours", "c", "cured")
    ),
)

# To be reached, in messages a second of ours divided by those of the other: the
# columns, and for each case (key) a number for each of them.
GOAL_COLUMNS = (
    ("c", "none"),
    ("c", "cat"),
    ("c", "file"),
    ("cured", "none"),
    ("cured", "cat"),
    ("cured", "file"),
)
GOALS: Mapping[str, tuple[float, ...]] = {
    "1": (45, 20, 25, 0.8, 1.4, 1.4),
    "20": (25, 8, 8, 0.9, 2.2, 1.6),
    "100": (14, 5, 5, 0.9, 2.5, 1.6),
    "lasting": (12, 3, 3.5, 1.3, 2.6, 2),
    "100k": (7, 4, 4, 2, 2.5, 2),
    "20m": (12, 20, 8, 25, 30, 20),
    "bulk": (12, 20, 8, 25, 30, 20),
}
IDLE_GOAL = 22.0  # KiB of proportional set size an idle connection, at the most


def goal(case: str, other: str, kind: str) -> float | None:
    """The ratio to be reached against a contender with a filter; None: no goal."""
    if case not in GOALS or (other, kind) not in GOAL_COLUMNS:
        return None
    return GOALS[case][GOAL_COLUMNS.index((other, kind))]
