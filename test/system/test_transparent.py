"""The transparent proxy between machines, and addresses of both families.

The rules and routes that these tests load are those of proxsmtpd(8), TRANSPARENT
PROXY, as they stand there.  What the server says of who has connected to it, and
what the kernel says of the daemon's rights, is what counts.
"""

from __future__ import annotations

import functools
import os
import pwd
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Callable, NamedTuple

import pytest

import proxsmtpd as program
from helpers import (
    GREETING,
    PROGRAM,
    QUEUED,
    Daemon,
    MakeServer,
    StartDaemon,
    as_root,
    mounted,
    poll,
    port_of,
    program_under_test,
    requires,
    reserve_port,
    with_mounts,
)
from manual import display, displays, section, unescaped
from namespaces import (
    FAMILIES,
    IPV4,
    IPV6,
    OTHER_LINK_LOCAL,
    ROUTER_LINK_LOCAL,
    Family,
    Network,
    network,
)
from smtp import RawClient, ScriptedServer
from tls import (
    Certificates,
    encrypted,
    hello_by_tls,
    is_encrypted,
    server_context,
    starttls,
)

NO_DESTINATION = b"421 No original destination to connect to\r\n"
NO_SERVER = b"421 Server not available\r\n"
MESSAGE = b"Subject: Hello\r\n\r\n" + b"0123456789abcdef" * 4 + b"\r\n"
LONG_MESSAGE = b"Subject: Hello\r\n\r\n" + (b"x" * 70 + b"\r\n") * 8000

LISTEN_PORT = program.DEFAULT_LISTEN_PORT  # the namespaces are ours alone
EVERYWHERE = f"[::]:{LISTEN_PORT}"
NET_ADMIN = 1 << 12  # from linux/capability.h
ADVICE = (
    "couldn't set transparent mode on socket: start as root, or with CAP_NET_ADMIN"
    " (systemd: AmbientCapabilities=CAP_NET_ADMIN)"
)

TITLES = {"client": "Redirecting, for client", "full": "Diverting, for full"}
KINDS = tuple(TITLES)

of_each_kind = pytest.mark.parametrize("kind", KINDS)
of_each_family = pytest.mark.parametrize("family", FAMILIES, ids=str)


# --- What the manual has ---


def lines(title: str) -> list[str]:
    """Return the displays of one line in a section of the manual."""
    source = section("proxsmtpd.8", title)
    return [unescaped(line) for line in re.findall(r"^\.Dl (.*)$", source, re.M)]


def rules(kind: str) -> str:
    """Return the rule set that hands the clients' connections over."""
    (found,) = (
        b for b in displays("proxsmtpd.8", TITLES[kind]) if "chain prerouting" in b
    )
    return found


def routes(kind: str) -> str:
    """Return the commands for policy routing; none for `client`."""
    return "".join(
        b for b in displays("proxsmtpd.8", TITLES[kind]) if b.startswith("ip ")
    )


# --- What the machine has ---


def missing(kind: str) -> str:
    """Why this machine cannot do what the manual has for a kind, or nothing."""
    try:
        with network() as machines:
            machines.router.load(rules(kind))
            machines.router.run(routes(kind))
    except (OSError, AssertionError) as error:
        return str(error).partition("\n")[0]
    return ""


@functools.cache
def complaints() -> Mapping[str, str]:
    """Return the missing requirements of each kind; looks for them once."""
    return {kind: missing(kind) for kind in KINDS}


def requires_kind(kind: str) -> None:
    """Skip the test if the kernel, or our rights, will not do."""
    complaint = complaints()[kind]
    if complaint:
        pytest.skip(f"TransparentProxy: {kind} cannot be tried here: {complaint}")


pytestmark = [
    requires("nftables", "/usr/sbin/nft"),
    requires("iproute2", "/usr/sbin/ip"),
    requires("util-linux", "/usr/bin/setpriv"),
]


def test_requirements_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    """The output says which kinds can be tried here."""
    with capsys.disabled():
        for kind, complaint in complaints().items():
            print(f"\n  TransparentProxy: {kind}: {complaint or 'can be tried here'}")
    assert set(complaints()) == set(KINDS)


# --- A router, with a daemon ---


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """Provide a directory that every user can get at (pytest's own are its user's)."""
    path = Path(tempfile.mkdtemp(prefix="proxsmtpd-test-"))
    path.chmod(0o755)
    (path / "temp").mkdir()
    (path / "temp").chmod(0o1777)
    (path / "saved").mkdir()
    (path / "saved").chmod(0o1777)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def machines() -> Iterator[Network]:
    """Client, router and server, where the router does not yet know of the proxy."""
    if all(complaints().values()):
        pytest.skip(f"no three machines can be made: {complaints()['client']}")
    with network() as made:
        strict = "sysctl -w net.ipv4.conf.all.rp_filter=1"
        made.router.run("".join(displays("proxsmtpd.8", "TRANSPARENT PROXY")) + strict)
        yield made


def nobody() -> pwd.struct_passwd:
    """Return the user that the daemon becomes."""
    return pwd.getpwnam("nobody")


class Router:
    """The router of three machines, with a proxsmtpd of some kind on it."""

    def __init__(
        self,
        machines: Network,
        proxsmtpd: StartDaemon,
        make_server: MakeServer,
        place: Path,
        at_end: ExitStack,
    ) -> None:
        self.machines = machines
        self._at_end = at_end
        self._proxsmtpd, self._make_server = proxsmtpd, make_server
        self._place = place

    def divert(self, kind: str) -> None:
        """Hand connections over as the manual has it."""
        requires_kind(kind)
        self.machines.router.load(rules(kind))
        self.machines.router.run(routes(kind))

    def start(
        self,
        settings: Mapping[str, object],
        program: Sequence[str] | None = None,
    ) -> Daemon:
        """Return a daemon on the router, as another user and with a telling filter."""
        saved = self._place / "saved"
        probe = f'echo "$CLIENT $SERVER" >{saved}/addresses'
        probe += f"; grep -E '^(Uid|Cap)' /proc/self/status >{saved}/status; cat"
        defaults = {
            "Listen": EVERYWHERE,
            "User": "nobody",
            "TempDirectory": self._place / "temp",
            "FilterCommand": probe,
        }
        with self.machines.router.inside():
            return self._proxsmtpd({**defaults, **settings}, program=program)

    def proxy(self, kind: str) -> Daemon:
        """Return a daemon of this kind, which has the connections handed over."""
        self.divert(kind)
        return self.start({"TransparentProxy": kind})

    def server(
        self, host: str, where: str = "server", port: int = 25
    ) -> ScriptedServer:
        """Return a server on one of the machines."""
        with getattr(self.machines, where).inside():
            return self._make_server(host=host, port=port)

    def client(self, host: str, port: int = 25, where: str = "client") -> RawClient:
        """Return a client on one of the machines."""
        with getattr(self.machines, where).inside():
            return self._at_end.enter_context(RawClient((host, port)))

    def addresses(self) -> str:
        """Return CLIENT and SERVER of the last filter."""
        return (self._place / "saved" / "addresses").read_text().strip()

    def filter_status(self) -> Status:
        """Return the rights of the last filter."""
        return Status.of((self._place / "saved" / "status").read_text())


class Status(NamedTuple):
    """The rights of a process or thread, as in /proc/PID/status."""

    uids: frozenset[int]  # real, effective, saved, of the file system
    permitted: int
    effective: int
    inheritable: int
    ambient: int

    @classmethod
    def of(cls, text: str) -> Status:
        """Parse the lines that begin with Uid and Cap."""
        found = dict(re.findall(r"^(\w+):\t(.*)$", text, re.M))
        words = [found[name] for name in ("CapPrm", "CapEff", "CapInh", "CapAmb")]
        uids = frozenset(map(int, found["Uid"].split()))
        return cls(uids, *(int(word, 16) for word in words))


def thread_statuses(daemon: Daemon) -> list[Status]:
    """Return the rights of each thread of a daemon."""
    tasks = Path(f"/proc/{daemon.process.pid}/task").glob("*/status")
    return [Status.of(path.read_text()) for path in tasks]


@pytest.fixture
def router(
    machines: Network, proxsmtpd: StartDaemon, make_server: MakeServer, tmp_path: Path
) -> Iterator[Router]:
    """Provide a router without a daemon; its clients close at the end of the test."""
    with ExitStack() as at_end:
        yield Router(machines, proxsmtpd, make_server, tmp_path, at_end)


def seen_by_server(kind: str, family: Family) -> str:
    """Return the address that the server must see as its client's."""
    return {"client": family.router_out, "full": family.client}[kind]


def peer_of(server: ScriptedServer) -> str:
    """Return the peer of the server's first connection."""
    peer = server.wait_connection().peer
    assert isinstance(peer, tuple)
    return str(peer[0])


# --- Handed over ---

# A packet filter as it should be: what it is not told to let in stays out.
FIREWALL = """
table inet firewall {{
    chain input {{
        type filter hook input priority filter; policy drop;
        ct state established,related accept
        meta l4proto {{ icmp, ipv6-icmp }} accept
        {rule}
    }}
    chain forward {{
        type filter hook forward priority filter; policy drop;
    }}
}}
"""
TRACKED = "cat /proc/sys/net/netfilter/nf_conntrack_count"


@of_each_family
@of_each_kind
@pytest.mark.parametrize("firewall", [False, True], ids=["open", "firewall"])
def test_mail_goes_where_the_client_meant_it_to(
    firewall: bool, kind: str, family: Family, router: Router
) -> None:
    """Without a packet filter `full` has no connection tracking, with one it has."""
    if firewall:
        (rule,) = lines(TITLES[kind])
        router.machines.router.load(FIREWALL.format(rule=rule))
    daemon = router.proxy(kind)
    servers = [router.server(family.server), router.server(family.second_server)]
    for server, host in zip(servers, (family.server, family.second_server)):
        client = router.client(host)
        assert client.message(LONG_MESSAGE) == QUEUED
        client.quit()
        message = server.wait_message()
        assert message.data == LONG_MESSAGE
        assert peer_of(server) == seen_by_server(kind, family)
        assert router.addresses() == f"{family.client} {host}"
    assert [len(server.connections) for server in servers] == [1, 1]
    logged = rf"^proxsmtpd: \w+: client={re.escape(family.client)}, from=a@example.com"
    daemon.wait_log(rf"{logged}[\s\S]*{logged}")
    tracks = int(router.machines.router.run(TRACKED)) > 0
    assert tracks is (firewall or kind == "client")


@of_each_kind
@pytest.mark.parametrize("can_encrypt", [True, False], ids=["tls", "clear"])
def test_both_ways_are_encrypted_where_the_peers_can(
    can_encrypt: bool, kind: str, router: Router, certificates: Certificates
) -> None:
    """The server's STARTTLS does not reach the client, so we do both."""
    server = router.server(IPV4.server)
    if can_encrypt:
        context = server_context(certificates.path("good"))
        server.script["EHLO"] = hello_by_tls([b"STARTTLS"], [])
        server.script["STARTTLS"] = starttls(context)
    router.divert(kind)
    text = display("proxsmtpd.8", "Encrypted connections", "TransparentProxy: client")
    text = text.replace("client", kind)
    text += f"ListenTls: may\nListenCertificate: {certificates.path('good')}\n"
    router.start(dict(line.split(": ") for line in text.splitlines()))
    client = router.client(IPV4.server)
    if can_encrypt:
        encrypted(client)
        client.envelope()
        client.started = True
    assert client.message(LONG_MESSAGE) == QUEUED
    client.quit()
    assert server.wait_message().data == LONG_MESSAGE
    assert is_encrypted(server.connections[0]) == can_encrypt
    assert peer_of(server) == seen_by_server(kind, IPV4)
    assert router.addresses() == f"{IPV4.client} {IPV4.server}"


@of_each_kind
def test_many_clients_at_a_time(kind: str, router: Router) -> None:
    """Each thread has its own client's address and destination."""
    router.proxy(kind)
    servers = {family: router.server(family.server) for family in FAMILIES}
    clients = [router.client(family.server) for family in FAMILIES * 10]
    for client in clients:
        client.start()
    for client in clients:
        assert client.message(MESSAGE) == QUEUED
    for family, server in servers.items():
        server.wait_message(10)
        peers = {c.peer[0] for c in server.connections if isinstance(c.peer, tuple)}
        assert peers == {seen_by_server(kind, family)}


@of_each_kind
@pytest.mark.parametrize(
    ("listen", "family"),
    [
        (str(LISTEN_PORT), IPV4),
        (f"{IPV4.router}:{LISTEN_PORT}", IPV4),
        (f"[{IPV6.router}]:{LISTEN_PORT}", IPV6),
    ],
)
def test_listener_of_one_family(
    listen: str, family: Family, kind: str, router: Router
) -> None:
    """A listener at the router's address towards the clients will do."""
    router.divert(kind)
    router.start({"TransparentProxy": kind, "Listen": listen})
    server = router.server(family.server)
    assert router.client(family.server).message(MESSAGE) == QUEUED
    assert peer_of(server) == seen_by_server(kind, family)


@of_each_family
@of_each_kind
def test_listener_on_the_port_of_the_servers(
    kind: str, family: Family, router: Router
) -> None:
    """Other machines' port 25 is not ours, though it has the same number."""
    requires_kind(kind)
    router.machines.router.load(rules(kind).replace(f":{LISTEN_PORT}", ":25"))
    router.machines.router.run(routes(kind))
    router.start({"TransparentProxy": kind, "Listen": "[::]:25"})
    server = router.server(family.server)
    assert router.client(family.server).message(MESSAGE) == QUEUED
    assert peer_of(server) == seen_by_server(kind, family)
    assert router.client(family.router).reply() == NO_DESTINATION


@of_each_family
@of_each_kind
def test_server_that_is_not_there(kind: str, family: Family, router: Router) -> None:
    daemon = router.proxy(kind)
    client = router.client(family.server)
    assert client.reply() == NO_SERVER
    assert client.eof()
    host = f"[{family.server}]" if family is IPV6 else family.server
    where = f"couldn't connect to: {host}:25: Connection refused"
    daemon.wait_log(rf": SERVER: {re.escape(where)}$")


@of_each_family
def test_mail_for_the_router_itself(family: Family, router: Router) -> None:
    """It is filtered, and not taken for a loop."""
    router.proxy("client")
    server = router.server(family.router, where="router")
    assert router.client(family.router).message(MESSAGE) == QUEUED
    server.wait_message()
    assert router.addresses() == f"{family.client} {family.router}"


@of_each_family
def test_full_leaves_alone_what_it_is_not_for(family: Family, router: Router) -> None:
    """The router's own mail, and other machines' ports with our number."""
    daemon = router.proxy("full")
    own = router.server(family.router, where="router")
    other = router.server(family.server, port=LISTEN_PORT)
    for server, host, port in (
        (own, family.router, 25),
        (other, family.server, LISTEN_PORT),
    ):
        assert router.client(host, port).reply() == b"220 sink.example ESMTP\r\n"
        assert peer_of(server) == family.client
    assert "accepted connection" not in daemon.log()


@of_each_family
def test_programs_of_the_router(family: Family, router: Router) -> None:
    """The rules for output divert them, but not the proxy's own connections."""
    requires_kind("client")
    (found,) = (
        b for b in displays("proxsmtpd.8", TITLES["client"]) if "chain output" in b
    )
    router.machines.router.load(found.replace("_proxsmtp", "nobody"))
    daemon = router.start({"TransparentProxy": "client"})
    server = router.server(family.server)
    client = router.client(family.server, where="router")
    assert client.message(MESSAGE) == QUEUED
    assert peer_of(server) == family.router_out
    assert poll(lambda: daemon.log().count("accepted connection") == 1)


# --- Not handed over ---


@of_each_family
@of_each_kind
def test_direct_connection_is_a_loop(kind: str, family: Family, router: Router) -> None:
    daemon = router.proxy(kind)
    server = router.server(family.server)
    hosts = [family.router, family.router_out]
    if family is IPV6:
        hosts[1] = f"{ROUTER_LINK_LOCAL}%eth0"
    for host in hosts:
        client = router.client(host, LISTEN_PORT)
        assert client.reply() == NO_DESTINATION
        assert client.eof()
    loop = r"^proxsmtpd: 10000\d: loop detected in transparent proxying$"
    daemon.wait_log(rf"{loop}[^$]*{loop}")
    assert "SERVER" not in daemon.log()
    assert poll(lambda: daemon.log().count("accepted connection") == 2)
    assert not server.connections


@of_each_family
def test_direct_connection_without_nat(family: Family, router: Router) -> None:
    """Nothing has ever been redirected here, and so nobody knows from where."""
    daemon = router.start({"TransparentProxy": "client"})
    client = router.client(family.router, LISTEN_PORT)
    assert client.reply() == NO_DESTINATION
    assert client.eof()
    daemon.wait_log(r": couldn't get source address for transparent proxying: [A-Z]")
    assert "SERVER" not in daemon.log()


@of_each_kind
def test_unix_socket_has_no_destination(
    kind: str, proxsmtpd: StartDaemon, tmp_path: Path
) -> None:
    requires_kind(kind)
    daemon = proxsmtpd({"Listen": tmp_path / "socket", "TransparentProxy": kind})
    client = daemon.connect()
    assert client.reply() == NO_DESTINATION
    assert client.eof()
    daemon.wait_log(
        r": couldn't get source address for transparent proxying:"
        r" a unix socket has no destination$"
    )


# --- Rights ---


def reachable_program(place: Path) -> list[str]:
    """Return a command line for the program that every user can run."""
    if os.environ.get("PROXSMTPD"):
        return program_under_test()
    for interpreter in (os.path.realpath(sys.executable), "/usr/bin/python3"):
        command = [*as_nobody(), interpreter, "-c", ""]
        if not subprocess.run(command, capture_output=True, check=False).returncode:
            return [interpreter, "-IS", str(shutil.copy(PROGRAM, place))]
    pytest.skip("no Python that every user can run")


def as_nobody(*options: str) -> list[str]:
    """Return the beginning of a command line that runs as an unprivileged user."""
    ids = [f"--reuid={nobody().pw_uid}", f"--regid={nobody().pw_gid}"]
    return ["setpriv", *ids, "--clear-groups", *options]


def as_the_unit_has_it() -> list[str]:
    """Return the setpriv command that does what systemd does by the manual's unit."""
    (unit,) = (
        b for b in displays("proxsmtpd.8", TITLES["full"]) if b.startswith("[Service]")
    )
    found = dict(line.split("=", 1) for line in unit.splitlines()[1:])
    names = {
        name: "-all,+" + found[name].lower().replace("cap_", "")
        for name in ("AmbientCapabilities", "CapabilityBoundingSet")
    }
    assert found["NoNewPrivileges"] == "yes"
    return as_nobody(
        f"--inh-caps={names['AmbientCapabilities']}",
        f"--ambient-caps={names['AmbientCapabilities']}",
        f"--bounding-set={names['CapabilityBoundingSet']}",
        "--no-new-privs",
    )


def check_rights(kind: str, router: Router, daemon: Daemon) -> None:
    """While one client is served, see what the daemon and a filter may do."""
    server = router.server(IPV4.server)
    client = router.client(IPV4.server)
    assert client.message(MESSAGE) == QUEUED
    uids = frozenset((nobody().pw_uid,))
    kept = NET_ADMIN if kind == "full" else 0
    threads = thread_statuses(daemon)
    assert len(threads) == 2
    for thread in threads:
        # Nobody, with nothing but this, can become root again.
        assert thread._replace(inheritable=0) == Status(uids, kept, kept, 0, 0)
    status = router.filter_status()
    assert status._replace(inheritable=0) == Status(uids, 0, 0, 0, 0)
    assert peer_of(server) == seen_by_server(kind, IPV4)


@of_each_kind
def test_root_is_given_up(kind: str, router: Router) -> None:
    check_rights(kind, router, router.proxy(kind))


@pytest.mark.parametrize("user", ["nobody", ""])
def test_start_with_the_capability(user: str, router: Router, tmp_path: Path) -> None:
    """It starts with systemd's capability, with User in the configuration or not."""
    router.divert("full")
    command = [*as_the_unit_has_it(), *reachable_program(tmp_path)]
    settings = {"TransparentProxy": "full", "User": user or nobody().pw_uid}
    check_rights("full", router, router.start(settings, program=command))


WITHOUT_THE_RIGHT: Mapping[str, Callable[[], list[str]]] = {
    "a user": as_nobody,
    "root": lambda: ["setpriv", "--bounding-set=-net_admin,-net_raw"],
    # Docker's root: the listener can be had, but what is to be kept is not there.
    "root of a container": lambda: ["setpriv", "--bounding-set=-net_admin"],
}


@as_root
@pytest.mark.parametrize("who", WITHOUT_THE_RIGHT)
@pytest.mark.parametrize("options", [["-d", "1"], []], ids=["foreground", "daemon"])
def test_start_without_the_right(
    options: Sequence[str], who: str, tmp_path: Path
) -> None:
    """The error says why not, and what to do."""
    requires_kind("full")
    pid_file = tmp_path / "temp" / "pid"
    with reserve_port() as holder:
        config = tmp_path / "proxsmtpd.conf"
        text = f"TransparentProxy: full\nListen: 127.0.0.1:{port_of(holder)}\n"
        config.write_text(text + f"User: nobody\nPidFile: {pid_file}\n")
        command = [*WITHOUT_THE_RIGHT[who](), *reachable_program(tmp_path), *options]
        done = subprocess.run(
            [*command, "-f", str(config)],
            capture_output=True,
            text=True,
            check=False,
            timeout=10,
        )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"proxsmtpd: {ADVICE}"
    # Not there; or emptied, where rights were found wanting after it was made.
    assert not pid_file.exists() or not pid_file.read_text()


# --- What shows that it works ---

EPHEMERAL = 32768  # the first of the ports that the kernel chooses from


def connections(text: str) -> list[list[str]]:
    """Local and peer addresses as ss and the manual list them, in some order.

    Ports that the kernel has chosen are left out.
    """
    plain = text.replace("::ffff:", "").replace("[", "").replace("]", "")
    found = []
    for line in plain.splitlines():
        ends = re.findall(r"([0-9.]+):(\d+)\b", line)
        if ends:
            found.append([f"{h}:{p if int(p) < EPHEMERAL else ''}" for h, p in ends])
    return sorted(found)


@of_each_kind
def test_commands_that_show_it(kind: str, router: Router) -> None:
    """ss prints for the manual's addresses the lines that are in the manual."""
    router.proxy(kind)
    router.server(IPV4.server)
    client = router.client(IPV4.server)
    assert client.reply() == GREETING
    (command,) = (ln for ln in lines("Seeing that it works") if ln.startswith("ss "))
    shown = dict(zip(KINDS, displays("proxsmtpd.8", "Seeing that it works")))
    listed = connections(router.machines.router.run(command))
    assert listed == connections(shown[kind])
    assert len(listed) == 2


@requires("conntrack", "/usr/sbin/conntrack")
def test_conntrack_shows_the_redirection(router: Router) -> None:
    router.proxy("client")
    router.server(IPV4.server)
    client = router.client(IPV4.server)
    assert client.reply() == GREETING
    words = lines("Seeing that it works")
    (command,) = (line for line in words if line.startswith("conntrack "))
    assert re.search(
        rf" src={IPV4.client} dst={IPV4.server} sport=\d+ dport=25"
        rf" src={IPV4.router} dst={IPV4.client} sport={LISTEN_PORT} ",
        router.machines.router.run(command),
    )


# --- Both families on one socket ---


@pytest.mark.parametrize(
    ("host", "tagged"), [("127.0.0.1", "127.0.0.1"), ("::1", "IPV6:::1")]
)
def test_both_families_on_one_socket(
    host: str,
    tagged: str,
    proxsmtpd: StartDaemon,
    make_server: MakeServer,
    tmp_path: Path,
) -> None:
    """An IPv4 client has its IPv4 address everywhere."""
    attributes = b"XCLIENT NAME ADDR DESTADDR"
    server = make_server(extensions=[attributes])
    with reserve_port("::") as holder:
        settings = {
            "Listen": f"[::]:{port_of(holder)}",
            "FilterCommand": f"echo $CLIENT >{tmp_path}/saved/client; cat",
            "Header": "X-Client: %i, to %l",
            "XClient": "on",
        }
        daemon = proxsmtpd(settings, server=server)
        with RawClient((host, daemon.port)) as client:
            assert client.message(MESSAGE) == QUEUED
    assert (tmp_path / "saved" / "client").read_text() == f"{host}\n"
    daemon.wait_log(rf"^proxsmtpd: \w+: accepted connection from: {host}$")
    daemon.wait_log(rf"^proxsmtpd: \w+: client={host}, from=")
    message = server.wait_message()
    assert f"\r\nX-Client: {host}, to {host}\r\n".encode() in message.data
    (told,) = (x for x in message.connection.lines if x.startswith(b"XCLIENT"))
    values = dict(word.split(b"=") for word in told.split()[1:])
    assert (values[b"ADDR"], values[b"DESTADDR"]) == (tagged.encode(),) * 2


@of_each_family
def test_loopback_to_another_machine(family: Family, router: Router) -> None:
    """Mail goes back to where it comes from, over the same family."""
    router.start({"Listen": EVERYWHERE, "OutAddress": 10026})
    server = router.server(family.client, where="client", port=10026)
    assert router.client(family.router, LISTEN_PORT).message(MESSAGE) == QUEUED
    assert peer_of(server) == family.router
    assert router.addresses() == f"{family.client} {family.client}"


def test_scoped_addresses(router: Router) -> None:
    """Link-local addresses mean nothing without the link."""
    listen = f"[{ROUTER_LINK_LOCAL}%eth0]:{LISTEN_PORT}"
    out = f"[{OTHER_LINK_LOCAL}%eth1]:25"
    router.start({"Listen": listen, "OutAddress": out})
    server = router.server("::")
    client = router.client(f"{ROUTER_LINK_LOCAL}%eth0", LISTEN_PORT)
    assert client.message(MESSAGE) == QUEUED
    assert peer_of(server).partition("%")[0] == ROUTER_LINK_LOCAL


# --- Names with several addresses ---

BLACK_HOLE = """
table inet blackhole {{
    chain output {{
        type filter hook output priority filter; policy accept;
        {drop}
    }}
}}
"""


def start_with_names(
    router: Router, place: Path, seconds: int, *dropped: str
) -> Daemon:
    """Return a daemon whose server has two addresses, some of which never answer."""
    router.machines.router.load(BLACK_HOLE.format(drop="\n".join(dropped)))
    hosts = place / "hosts"
    hosts.write_text(f"{IPV6.server} sink.example\n{IPV4.server} sink.example\n")
    command = [*mounted(hosts, "/etc/hosts"), *program_under_test()]
    settings = {"OutAddress": "sink.example:25", "TimeOut": seconds}
    return router.start(settings, program=command)


@with_mounts
def test_address_that_never_answers_leaves_time_for_the_next(
    router: Router, tmp_path: Path
) -> None:
    """Many a machine has an IPv6 address that leads nowhere."""
    server = router.server(IPV4.server)
    dropped = f"ip6 daddr {IPV6.server} drop"
    start_with_names(router, tmp_path, 2, dropped)
    before = time.monotonic()
    client = router.client(IPV4.router, LISTEN_PORT)
    assert client.reply() == GREETING
    assert 0.9 < time.monotonic() - before < 2
    assert len(server.connections) == 1


@with_mounts
def test_all_addresses_together_have_one_time_out(
    router: Router, tmp_path: Path
) -> None:
    dropped = (f"ip6 daddr {IPV6.server} drop", f"ip daddr {IPV4.server} drop")
    daemon = start_with_names(router, tmp_path, 1, *dropped)
    before = time.monotonic()
    client = router.client(IPV4.router, LISTEN_PORT)
    assert client.reply() == NO_SERVER
    assert client.eof()
    assert 0.9 < time.monotonic() - before < 2
    daemon.wait_log(r": SERVER: couldn't connect to: sink\.example:25: ")
