"""Real mail through a real Postfix, with proxsmtpd as its before-queue filter.

    client -> smtpd (smtpd_proxy_filter) -> proxsmtpd -> smtpd -> queue -> maildir

The client waits while the filter runs, and gets its verdict.  Both smtpds are of one
private Postfix, which is entered by several ports: "streamed" passes on each command
as it comes, "speed_adjust" takes the whole message first, and "hasty" is like the
first but does not wait for long.  All trust XCLIENT, so that a test can come from
any address.
"""

from __future__ import annotations

import os
import random
import re
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Callable, NamedTuple, Optional

import pytest

from helpers import (
    Daemon,
    MakeFilter,
    StartDaemon,
    one_process,
    poll,
    port_of,
    requires,
    reserve_port,
)
from postfix import (
    POSTFIX,
    RECIPIENT,
    SENDER,
    TELL,
    PrivatePostfix,
    body_of,
    message_id,
    require_root,
    smtp_source,
    smtpd,
)
from smtp import RawClient

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

pytestmark = [requires("postfix", POSTFIX), one_process("postfix_proxy")]

ENTRANCES: Mapping[str, Mapping[str, str]] = {
    "streamed": {},
    "speed_adjust": {"smtpd_proxy_options": "speed_adjust"},
    "hasty": {"smtpd_proxy_timeout": "3s"},
}
both_ways = pytest.mark.parametrize("entrance", ["streamed", "speed_adjust"])

SIZE_LIMIT = 2 << 20
BLOCKS = 1 << 19  # octets that are more than one read of a socket
MESSAGE = b"Subject: offer\r\n\r\ncheap watches\r\n"
ENVELOPE = (f"MAIL FROM:<{SENDER}>".encode(), f"RCPT TO:<{RECIPIENT}>".encode())
QUEUED = rb"250 2\.0\.0 Ok: queued as \w+\r\n"
# What Postfix tells a client when something is wrong with its proxy filter.
NO_FILTER = b"451 4.3.0 Error: queue file write error\r\n"


def verdict(client: RawClient, data: bytes = MESSAGE) -> bytes:
    """Send a message; gives the reply that decides: the first refusal or the last."""
    for command in (*ENVELOPE, b"DATA", data + b"."):
        reply = client.command(command)
        if reply[:1] in b"45":
            break
    return reply


@dataclass(frozen=True)
class Chain:
    """The private Postfix, with a hole on `filter_port` for proxsmtpd."""

    postfix: PrivatePostfix
    entrances: Mapping[str, int]
    filter_port: int
    reentry: int

    def settings(self, command: str, **more: object) -> Mapping[str, object]:
        """Give a proxsmtpd that fits the hole and runs `command` as its filter."""
        return {
            "Listen": f"127.0.0.1:{self.filter_port}",
            "OutAddress": f"127.0.0.1:{self.reentry}",
            "FilterCommand": command,
            **more,
        }

    def client(self, entrance: str, address: str = "192.0.2.7") -> RawClient:
        """Connect from that address (in XCLIENT's form), and say EHLO."""
        client = RawClient(("127.0.0.1", self.entrances[entrance]), timeout=30)
        client.reply()
        client.expect(b"EHLO client.example", b"250")
        client.expect(b"XCLIENT NAME=far.example ADDR=" + address.encode(), b"220")
        client.expect(b"EHLO far.example", b"250")
        return client

    def wait_inner_session(self, how: str) -> None:
        """Wait until the second smtpd logs the end of a session of such commands."""
        self.postfix.wait_log(rf"disconnect from unknown\[127\.0\.0\.1\] ehlo=1 {how}")


def before_queue(
    entrances: Mapping[str, int], filter_port: int, reentry: int
) -> PrivatePostfix:
    """Give a Postfix set up as its SMTPD_PROXY_README says."""
    common = {
        "smtpd_proxy_filter": f"127.0.0.1:{filter_port}",
        "smtpd_authorized_xclient_hosts": "127.0.0.0/8",
    }
    inner = {
        "smtpd_authorized_xforward_hosts": "127.0.0.0/8",
        "receive_override_options": "no_unknown_recipient_checks",
    }
    main = {
        "inet_protocols": "all",  # XCLIENT gives IPv6 addresses too
        "message_size_limit": str(SIZE_LIMIT),
        "notify_classes": "",  # no mail to the postmaster about faults
        "smtpd_client_connection_count_limit": "0",
    }
    outer = [smtpd(p, {**common, **ENTRANCES[name]}) for name, p in entrances.items()]
    return PrivatePostfix([*outer, smtpd(reentry, inner)], main)


@pytest.fixture(scope="module")
def postfix_chain() -> Iterator[Chain]:
    """Provide one Postfix for all tests here, since it takes long to start."""
    require_root()
    with ExitStack() as stack:

        def port() -> int:
            return port_of(stack.enter_context(reserve_port()))

        places = ({name: port() for name in ENTRANCES}, port(), port())
        yield Chain(stack.enter_context(before_queue(*places)), *places)


@pytest.fixture
def chain(postfix_chain: Chain) -> Iterator[Chain]:
    """Give the chain; whatever a test leaves in it is thrown away."""
    yield postfix_chain
    postfix_chain.postfix.clear()


# --- Verdicts ---


class Verdict(NamedTuple):
    """A filter, the client's reply, our status and the delivered line."""

    script: str
    reply: bytes  # a pattern
    status: str
    delivered: Optional[bytes] = None


VERDICTS = {
    "passes": Verdict("exec cat", QUEUED, "FILTERED", b"cheap watches\n"),
    "changes": Verdict(
        "sed 's/^cheap/expensive/'", QUEUED, "FILTERED", b"expensive watches\n"
    ),
    "rejects": Verdict(
        "echo '550 5.7.1 No watches' >&2; exit 1",
        rb"550 5\.7\.1 No watches\r\n",
        "550 5.7.1 No watches",
    ),
    "rejects by words": Verdict(
        "echo 'No watches' >&2; exit 1",
        rb"550 Content Rejected; No watches\r\n",
        "550 Content Rejected; No watches",
    ),
    "defers": Verdict(
        "echo '451 4.7.1 Come back later' >&2; exit 1",
        rb"451 4\.7\.1 Come back later\r\n",
        "451 4.7.1 Come back later",
    ),
    "drops": Verdict(
        "echo '250 2.0.0 Gone' >&2; exit 1",
        rb"250 2\.0\.0 Gone\r\n",
        "250 2.0.0 Gone",
    ),
    "cannot be run": Verdict("exit 127", rb"451 Local Error\r\n", "FILTER-ERROR"),
    "is killed": Verdict("kill -9 $$", rb"451 Local Error\r\n", "FILTER-ERROR"),
}


@both_ways
@pytest.mark.parametrize("case", VERDICTS.values(), ids=VERDICTS)
def test_client_gets_the_verdict(
    chain: Chain,
    proxsmtpd: StartDaemon,
    filter_script: MakeFilter,
    entrance: str,
    case: Verdict,
) -> None:
    daemon = proxsmtpd(chain.settings(filter_script(case.script)), level=3)
    with chain.client(entrance) as client:
        reply = verdict(client)
        assert re.fullmatch(case.reply, reply)
        client.quit()
    daemon.wait_log(
        rf"client=127\.0\.0\.1, from={SENDER}, to={RECIPIENT}, "
        rf"status={re.escape(case.status)}$"
    )
    outcome = "accept" if reply[:1] == b"2" else "reject"
    said = re.escape(reply.decode().strip())
    chain.postfix.wait_log(
        rf"proxy-{outcome}: END-OF-MESSAGE: {said}; from=<{SENDER}> to=<{RECIPIENT}> "
        r"proto=ESMTP helo=<far\.example>"
    )
    # The second smtpd has seen no more of a refused message than its envelope.
    ended = "data=1" if case.delivered else "rset=1"
    chain.wait_inner_session(f"xforward=1 mail=1 rcpt=1 {ended} quit=1 commands=6")
    if case.delivered:
        chain.postfix.wait_mails(1)
    chain.postfix.wait_idle()
    bodies = [mail.body for mail in chain.postfix.mails()]
    assert bodies == ([case.delivered] if case.delivered else [])


@both_ways
def test_large_message(chain: Chain, proxsmtpd: StartDaemon, entrance: str) -> None:
    """Octets above 127, dots and blank lines arrive as they were sent."""
    rng = random.Random(6)
    lines = [b".", b"..", b"", b". dot", bytes(range(0xA0, 0x100))]
    body = b"".join(rng.choice(lines) * 8 + b"\r\n" for _ in range(8000))
    assert BLOCKS < len(body) < SIZE_LIMIT
    data = b"Subject: much\r\n\r\n" + body
    proxsmtpd(chain.settings("cat"), level=1)
    with chain.client(entrance) as client:
        reply = verdict(client, re.sub(rb"(?m)^\.", b"..", data))
    assert re.fullmatch(QUEUED, reply)
    (mail,) = chain.postfix.wait_mails(1)
    assert mail.body == body_of(data)


@both_ways
@pytest.mark.parametrize(
    ("address", "remote"),
    [
        pytest.param("192.0.2.7", "192.0.2.7", id="IPv4"),
        pytest.param("IPV6:2001:db8::7", "2001:db8::7", id="IPv6"),
    ],
)
def test_xforward_reaches_the_filter(
    chain: Chain,
    proxsmtpd: StartDaemon,
    filter_script: MakeFilter,
    entrance: str,
    address: str,
    remote: str,
) -> None:
    proxsmtpd(chain.settings(filter_script(TELL)))
    with chain.client(entrance, address) as client:
        assert re.fullmatch(QUEUED, verdict(client))
    (mail,) = chain.postfix.wait_mails(1)
    assert mail.header("X-Filter-Client") == "127.0.0.1"
    assert mail.header("X-Filter-Sender") == SENDER
    assert mail.header("X-Filter-Remote") == remote
    assert mail.header("X-Filter-Helo") == "far.example"
    # And the second smtpd has taken the client's address from it too.
    chain.postfix.wait_log(rf"orig_client=far\.example\[{re.escape(remote)}\]")


@both_ways
def test_concurrent_sessions(
    chain: Chain, proxsmtpd: StartDaemon, entrance: str
) -> None:
    count = 40
    proxsmtpd(chain.settings("cat"), level=1)
    smtp_source(chain.entrances[entrance], sessions=10, messages=count)
    mails = chain.postfix.wait_mails(count)
    chain.postfix.wait_idle()
    assert len({message_id(m.content) for m in mails}) == count
    assert len(chain.postfix.mails()) == count


# --- QUIT, for whose answer Postfix does not wait ---


def faults(daemon: Daemon) -> list[str]:
    """Give the errors and warnings in the log of a daemon of level 1."""
    return [x for x in daemon.log().splitlines() if "running as root" not in x]


def resources(daemon: Daemon) -> tuple[int, int]:
    """Give how many threads and descriptors a daemon has."""
    process = f"/proc/{daemon.process.pid}"
    return len(os.listdir(f"{process}/task")), len(os.listdir(f"{process}/fd"))


@both_ways
def test_quit_without_waiting(
    chain: Chain, proxsmtpd: StartDaemon, filter_script: MakeFilter, entrance: str
) -> None:
    """No error, no thread and no descriptor remains, whatever the verdict was."""
    script = "grep -q cheap && { echo '550 5.7.1 No watches' >&2; exit 1; }; echo; echo"
    daemon = proxsmtpd(chain.settings(filter_script(script)), level=1)
    before = resources(daemon)
    sessions = 10
    for _ in range(sessions):
        with chain.client(entrance) as client:
            assert verdict(client).startswith(b"550 5.7.1 ")
            assert re.fullmatch(QUEUED, verdict(client, b"Subject: hello\r\n\r\n"))
            client.quit()
    # Each message was a connection of its own, and ended in an orderly way.
    ends = re.compile(r"disconnect from unknown\[127\.0\.0\.1\] ehlo=1 .* quit=1 ")
    chain.postfix.wait(
        "the end of all sessions",
        lambda: len(ends.findall(chain.postfix.log())) == 2 * sessions,
    )
    assert "lost connection" not in chain.postfix.log()
    assert poll(lambda: resources(daemon) == before), (before, resources(daemon))
    assert faults(daemon) == []
    chain.postfix.wait_mails(sessions)


# --- Time limits ---


@both_ways
def test_filter_timeout_is_before_the_proxy_timeout(
    chain: Chain, proxsmtpd: StartDaemon, entrance: str
) -> None:
    daemon = proxsmtpd(chain.settings("sleep 600", FilterTimeout=1))
    with chain.client(entrance) as client:
        assert verdict(client) == b"451 Local Error\r\n"
        client.quit()
    daemon.wait_log("timeout while listening to filter command$")
    chain.postfix.wait_log("proxy-reject: END-OF-MESSAGE: 451 Local Error; ")
    chain.wait_inner_session("xforward=1 mail=1 rcpt=1 rset=1 quit=1 commands=6")
    assert "warning" not in chain.postfix.log()
    assert chain.postfix.mails() == []


def test_proxy_timeout_before_the_filter_is_done(
    chain: Chain, proxsmtpd: StartDaemon, filter_script: MakeFilter, tmp_path: Path
) -> None:
    """The client has to try again, so nothing is delivered when the filter is done."""
    ready = tmp_path / "ready"
    command = filter_script(f"until test -e {ready}; do sleep 0.05; done; exec cat")
    daemon = proxsmtpd(chain.settings(command))
    with chain.client("hasty") as client:
        assert verdict(client) == NO_FILTER
        client.quit()
    chain.postfix.wait_log("warning: timeout talking to proxy 127.0.0.1:")
    ready.touch()
    daemon.wait_log("client went before its message was accepted$")
    daemon.wait_log("status=421 Client closed the connection before the message was")
    chain.wait_inner_session("xforward=1 mail=1 rcpt=1 .*")
    chain.postfix.wait_idle()
    assert chain.postfix.mails() == []


# --- No proxsmtpd, or one that can do nothing ---


Obstacle = Callable[[Chain, StartDaemon], str]  # gives Postfix's warning


def not_there(_chain: Chain, _start: StartDaemon) -> str:
    return "connect to proxy filter 127.0.0.1:{}: Connection refused"


def busy(chain: Chain, start: StartDaemon) -> str:
    daemon = start(chain.settings("cat", MaxConnections=1))
    assert daemon.connect().reply().startswith(b"220")
    words = "421 Server busy, too many connections"
    return f'proxy 127.0.0.1:{{}} rejected "connection request": "{words}"'


def without_server(chain: Chain, start: StartDaemon) -> str:
    with reserve_port() as nobody:
        out = f"127.0.0.1:{port_of(nobody)}"
        start({**chain.settings("cat"), "OutAddress": out})
    words = "421 Server not available"
    return f'proxy 127.0.0.1:{{}} rejected "connection request": "{words}"'


@both_ways
@pytest.mark.parametrize("obstacle", [not_there, busy, without_server])
def test_proxsmtpd_cannot_be_used(
    chain: Chain, proxsmtpd: StartDaemon, entrance: str, obstacle: Obstacle
) -> None:
    """The client has to try again, and Postfix logs our reply."""
    warning = obstacle(chain, proxsmtpd).format(chain.filter_port)
    with chain.client(entrance) as client:
        assert verdict(client) == NO_FILTER
        client.quit()
    chain.postfix.wait_log(re.escape(f"warning: {warning}"))
    assert chain.postfix.queue() == []
    assert chain.postfix.mails() == []


# --- Messages that never end ---


Abandon = Callable[[RawClient], None]


def hang_up(client: RawClient) -> None:
    """Leave half way through the message."""
    client.send(b"Subject: long\r\n\r\n" + b"hello\r\n" * 30000)
    client.close()


def exceed_the_size(client: RawClient) -> None:
    """Postfix stops passing on what is longer than message_size_limit."""
    client.send(b"Subject: long\r\n\r\n" + (b"x" * 70 + b"\r\n") * (SIZE_LIMIT // 70))
    assert client.command(b".").startswith(b"552 5.3.4 ")


@pytest.mark.parametrize("abandon", [hang_up, exceed_the_size])
def test_message_without_an_end(
    chain: Chain,
    proxsmtpd: StartDaemon,
    filter_script: MakeFilter,
    tmp_path: Path,
    abandon: Abandon,
) -> None:
    """Neither the filter nor the second smtpd gets to see any of it."""
    seen = tmp_path / "seen"
    command = filter_script(f"touch {seen}; exec cat")
    daemon = proxsmtpd(chain.settings(command), level=1)
    before = resources(daemon)
    with chain.client("streamed") as client:
        for line in (*ENVELOPE, b"DATA"):
            client.command(line)
        abandon(client)
    daemon.wait_log("unexpected end of data from client$")
    chain.wait_inner_session("xforward=1 mail=1 rcpt=1 commands=4")
    assert poll(lambda: resources(daemon) == before), (before, resources(daemon))
    assert not seen.exists()
    assert chain.postfix.queue() == []
    assert chain.postfix.mails() == []
