"""A network of three machines in one: clients, a router, and servers beyond it.

    client eth0 ------ eth0 router eth1 ------ eth0 server

Each is a network namespace, and the lines between them are pairs of veth.  The
namespaces have no names: they, and all that is in them, are gone when they are
closed or when the process that made them ends, however it ends.

The addresses are those that are reserved for documentation, so that what is
written in the manual can be loaded as it stands.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import NamedTuple

CLONE_NEWNET = 0x40000000  # from linux/sched.h
OWN_NAMESPACE = "/proc/thread-self/ns/net"


class Family(NamedTuple):
    """The addresses of all machines in IPv4 or IPv6."""

    name: str
    client: str
    router: str  # its address on the clients' side
    router_out: str  # and on the servers'
    server: str
    second_server: str

    def __str__(self) -> str:
        return self.name


IPV4 = Family(
    "IPv4",
    client="192.0.2.2",
    router="192.0.2.1",
    router_out="198.51.100.1",
    server="198.51.100.2",
    second_server="198.51.100.3",
)
IPV6 = Family(
    "IPv6",
    client="2001:db8:1::2",
    router="2001:db8:1::1",
    router_out="2001:db8:2::1",
    server="2001:db8:2::2",
    second_server="2001:db8:2::3",
)
FAMILIES = (IPV4, IPV6)

# The router has the first address on both of its links, everybody else the second.
ROUTER_LINK_LOCAL = "fe80::1"
OTHER_LINK_LOCAL = "fe80::2"


def _call(name: str, *arguments: int) -> None:
    """Call a function of the C library that returns -1 for an error."""
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


class Namespace:
    """A network namespace; PermissionError where there can be no new one."""

    def __init__(self) -> None:
        home = os.open(OWN_NAMESPACE, os.O_RDONLY)
        try:
            _call("unshare", CLONE_NEWNET)
            self._descriptor = os.open(OWN_NAMESPACE, os.O_RDONLY)
            _call("setns", home, CLONE_NEWNET)
        finally:
            os.close(home)

    def close(self) -> None:
        """Leave it to the processes and sockets that are still in it."""
        os.close(self._descriptor)

    @property
    def path(self) -> str:
        """Return its path for `ip` and `nsenter` while it is open."""
        return f"/proc/{os.getpid()}/fd/{self._descriptor}"

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Have this thread's new sockets and processes in the namespace."""
        home = os.open(OWN_NAMESPACE, os.O_RDONLY)
        try:
            _call("setns", self._descriptor, CLONE_NEWNET)
            yield
        finally:
            _call("setns", home, CLONE_NEWNET)
            os.close(home)

    def run(self, script: str) -> str:
        """Run a shell script inside; its output, or an AssertionError."""
        with self.inside():
            done = subprocess.run(
                ["sh", "-e", "-c", script], capture_output=True, text=True, check=False
            )
        assert not done.returncode, f"{done.stderr.strip()}, from:\n{script}"
        return done.stdout

    def configure(self, *lines: str) -> None:
        """Run commands of `ip` inside, each without that word."""
        text = "\n".join(lines)
        self.run(f"ip -batch - <<'END'\n{text}\nEND")

    def load(self, rules: str) -> None:
        """Load an nft rule set."""
        self.run(f"nft -f - <<'END'\n{rules}\nEND")


def _lines(device: str, link_local: str, *machines: str) -> list[str]:
    """Return the `ip` commands that give a device these machines' addresses."""
    lengths = {IPV4: 24, IPV6: 64}
    addresses = [f"{link_local}/64"]
    for machine in machines:
        addresses += [f"{getattr(f, machine)}/{lengths[f]}" for f in FAMILIES]
    return [
        "link set lo up",
        f"link set {device} addrgenmode none",
        f"link set {device} up",
        *(
            f"address add {address} dev {device}{' nodad' if ':' in address else ''}"
            for address in addresses
        ),
    ]


def _lay(name: str, other: Namespace) -> str:
    """Return the `ip` command that connects to another machine's eth0."""
    return f"link add {name} type veth peer name eth0 netns {other.path}"


class Network(NamedTuple):
    """The three machines."""

    client: Namespace
    router: Namespace
    server: Namespace

    def connect(self) -> None:
        """Lay the lines, give out the addresses, and route."""
        self.router.configure(
            _lay("eth0", self.client),
            _lay("eth1", self.server),
            *_lines("eth0", ROUTER_LINK_LOCAL, "router"),
            *_lines("eth1", ROUTER_LINK_LOCAL, "router_out"),
        )
        self.client.configure(
            *_lines("eth0", OTHER_LINK_LOCAL, "client"),
            *(f"route add default via {family.router}" for family in FAMILIES),
        )
        self.server.configure(
            *_lines("eth0", OTHER_LINK_LOCAL, "server", "second_server"),
            *(f"route add default via {family.router_out}" for family in FAMILIES),
        )


@contextmanager
def network() -> Iterator[Network]:
    """Connect the three machines to each other; OSError if there can be none."""
    with ExitStack() as at_end:
        machines = [at_end.enter_context(closing(Namespace())) for _ in range(3)]
        made = Network(*machines)
        made.connect()
        yield made
