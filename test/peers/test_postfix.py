"""Real mail through a real Postfix, with proxsmtpd as its after-queue content filter.

    client -> smtpd -> queue -> scan (smtp) -> proxsmtpd -> smtpd -> queue -> maildir

Both smtpds are of one private Postfix.  The first one trusts XCLIENT, so that a test
can come from any address; the second one takes XFORWARD and filters no more.
"""

from __future__ import annotations

import collections
import email
import email.policy
import random
import re
import signal
import smtplib
from contextlib import ExitStack
from dataclasses import dataclass
from email.message import EmailMessage
from typing import TYPE_CHECKING

import pytest

from helpers import (
    MakeFilter,
    StartDaemon,
    marked_processes,
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
    Mail,
    PrivatePostfix,
    body_of,
    message_id,
    require_root,
    smtp,
    smtp_source,
    smtpd,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from smtp import ScriptedServer

pytestmark = [requires("postfix", POSTFIX), one_process("postfix")]


@dataclass(frozen=True)
class Loop:
    """The private Postfix, with a hole on `filter_port` for proxsmtpd."""

    postfix: PrivatePostfix
    entrance: int
    filter_port: int
    reentry: int

    def settings(self, command: str) -> Mapping[str, object]:
        """Give a proxsmtpd that fits the hole and runs `command` as its filter."""
        return {
            "Listen": f"127.0.0.1:{self.filter_port}",
            "OutAddress": f"127.0.0.1:{self.reentry}",
            "FilterCommand": command,
        }

    def client(self, xclient: str = "", helo: str = "client.example") -> smtplib.SMTP:
        """Connect to the entrance; `xclient` are XCLIENT's words, if any."""
        client = smtplib.SMTP("127.0.0.1", self.entrance, helo, timeout=20)
        if xclient:
            client.ehlo()
            assert client.docmd("XCLIENT", xclient)[0] == 220
        client.ehlo()
        return client

    def send(
        self,
        data: bytes,
        sender: str = SENDER,
        recipients: Sequence[str] = (RECIPIENT,),
        options: Sequence[str] = (),
    ) -> None:
        """Send a message in; its `data` has CRLF line ends and no stuffing."""
        with self.client() as client:
            refused = client.sendmail(sender, recipients, data, options)
        assert not refused


def after_queue(entrance: int, filter_port: int, reentry: int) -> PrivatePostfix:
    """Give a Postfix set up as its FILTER_README says for the advanced filter."""
    return PrivatePostfix(
        [
            smtpd(entrance, {"smtpd_authorized_xclient_hosts": "127.0.0.0/8"}),
            smtp("scan", {"smtp_send_xforward_command": "yes"}),
            smtpd(
                reentry,
                {
                    "content_filter": "",
                    "receive_override_options": "no_unknown_recipient_checks,"
                    "no_header_body_checks,no_milters",
                    "smtpd_authorized_xforward_hosts": "127.0.0.0/8",
                    "smtpd_client_connection_count_limit": "0",
                },
            ),
        ],
        {
            "content_filter": f"scan:[127.0.0.1]:{filter_port}",
            "smtpd_client_connection_count_limit": "0",
            # A warm connection would outlive the proxsmtpd of its test.
            "smtp_connection_cache_on_demand": "no",
            # XCLIENT gives IPv6 addresses too.
            "inet_protocols": "all",
        },
    )


@pytest.fixture(scope="module")
def postfix_loop() -> Iterator[Loop]:
    """Provide one Postfix for all tests here, since it takes long to start."""
    require_root()
    with ExitStack() as stack:
        ports = [port_of(stack.enter_context(reserve_port())) for _ in range(3)]
        yield Loop(stack.enter_context(after_queue(*ports)), *ports)


@pytest.fixture
def loop(postfix_loop: Loop) -> Iterator[Loop]:
    """Give the loop; whatever a test leaves in it is thrown away."""
    yield postfix_loop
    postfix_loop.postfix.clear()


def attachment(message: bytes) -> bytes:
    """Give the content of a message's only attachment."""
    parsed = email.message_from_bytes(message, policy=email.policy.default)
    (part,) = parsed.iter_attachments()
    content: bytes = part.get_content()
    return content


def test_xforward_reaches_the_filter(
    loop: Loop, proxsmtpd: StartDaemon, filter_script: MakeFilter
) -> None:
    proxsmtpd(loop.settings(filter_script(TELL)))
    with loop.client("ADDR=192.0.2.7 NAME=far.example", "far.example") as client:
        client.sendmail(SENDER, [RECIPIENT], b"Subject: hello\r\n\r\nhello\r\n")
    (mail,) = loop.postfix.wait_mails(1)
    assert mail.header("X-Filter-Client") == "127.0.0.1"
    assert mail.header("X-Filter-Server") == "127.0.0.1"
    assert mail.header("X-Filter-Remote") == "192.0.2.7"
    assert mail.header("X-Filter-Helo") == "far.example"
    # And the second smtpd has taken the client's address from it too.
    loop.postfix.wait_log(r"orig_client=far\.example\[192\.0\.2\.7\]")


def test_helo_that_looks_like_an_attribute(
    loop: Loop, proxsmtpd: StartDaemon, filter_script: MakeFilter
) -> None:
    proxsmtpd(loop.settings(filter_script(TELL)))
    with loop.client("ADDR=192.0.2.7", "addr=198.51.100.66") as client:
        client.sendmail(SENDER, [RECIPIENT], b"Subject: hello\r\n\r\nhello\r\n")
    (mail,) = loop.postfix.wait_mails(1)
    assert mail.header("X-Filter-Remote") == "192.0.2.7"
    assert mail.header("X-Filter-Helo") == "addr=198.51.100.66"


def test_ipv6_client(
    loop: Loop, proxsmtpd: StartDaemon, filter_script: MakeFilter
) -> None:
    proxsmtpd(loop.settings(filter_script(TELL)))
    with loop.client("ADDR=IPV6:2001:db8::7", "six.example") as client:
        client.sendmail(SENDER, [RECIPIENT], b"Subject: hello\r\n\r\nhello\r\n")
    (mail,) = loop.postfix.wait_mails(1)
    assert mail.header("X-Filter-Remote") == "2001:db8::7"


def test_several_recipients(
    loop: Loop, proxsmtpd: StartDaemon, filter_script: MakeFilter
) -> None:
    proxsmtpd(loop.settings(filter_script(TELL)))
    recipients = [f"user{n}@example.net" for n in range(1, 6)]
    loop.send(b"Subject: to all\r\n\r\nhello\r\n", recipients=recipients)
    mails = loop.postfix.wait_mails(len(recipients))
    assert sorted(str(m.recipient) for m in mails) == recipients
    paths = str(mails[0].header("X-Filter-Recipients")).split()
    assert sorted(paths) == recipients
    assert {m.body for m in mails} == {b"hello\n"}


def test_null_sender(
    loop: Loop, proxsmtpd: StartDaemon, filter_script: MakeFilter
) -> None:
    proxsmtpd(loop.settings(filter_script(TELL)))
    loop.send(b"Subject: report\r\n\r\nhello\r\n", sender="")
    (mail,) = loop.postfix.wait_mails(1)
    assert mail.header("X-Filter-Sender") == "<>"
    assert mail.sender == "<>"


@pytest.mark.parametrize(
    ("data", "options"),
    [
        pytest.param(
            b"Subject: 8 bits\r\nMIME-Version: 1.0\r\n"
            b"Content-Type: text/plain; charset=iso-8859-1\r\n"
            b"Content-Transfer-Encoding: 8bit\r\n\r\n"
            + bytes(range(0xA0, 0x100))
            + b"\r\n",
            ["BODY=8BITMIME"],
            id="8-bit text",
        ),
        pytest.param(
            b"Subject: dots\r\n\r\n.\r\n..\r\n...\r\n.a\r\n\r\n.\r\n\r\n.\r\n",
            [],
            id="lines of dots",
        ),
        pytest.param(b"Subject: none\r\n\r\n", [], id="no body"),
        pytest.param(
            b"Subject: blanks\r\n\r\n\r\n \r\n\t\r\nend \r\n\r\n", [], id="blank lines"
        ),
    ],
)
def test_body_arrives_as_it_was_sent(
    loop: Loop, proxsmtpd: StartDaemon, data: bytes, options: Sequence[str]
) -> None:
    proxsmtpd(loop.settings("cat"))
    loop.send(data, options=options)
    (mail,) = loop.postfix.wait_mails(1)
    assert mail.body == body_of(data)


# Messages with their header section, or the end of it, in doubt.
ODD_HEADERS = {
    "usual": b"Subject: a\r\n\r\nb\r\n",
    "no field": b"Hello\r\n\r\nSubject: a\r\n",
    "no empty line": b"Subject: a\r\nHello world: b\r\n\r\nc\r\n",
    "no name": b"Subject: a\r\n: b\r\nc: d\r\n\r\ne\r\n",
    "blanks before the colon": b"Subject : a\r\nX-A\t : b\r\n\r\nc\r\n",
    "line of blanks": b"Subject: a\r\n \r\nX-A: b\r\n\r\nc\r\n",
    "8-bit name": b"Subject: a\r\n\xe4: b\r\n\r\nc\r\n",
    "mbox": b"From a@b Thu\r\nSubject: a\r\n\r\nb\r\n",
    "mbox, quoted and twice": b">>From a\r\nFrom b\r\nSubject: a\r\n\r\nb\r\n",
    "mbox line in the section": b"Subject: a\r\nFrom b\r\nX-A: c\r\n\r\nd\r\n",
    "first line begins with a blank": b" a\r\nSubject: b\r\n\r\nc\r\n",
    "mbox and a blank": b"From a\r\n b\r\nSubject: c\r\n\r\nd\r\n",
    "bare LF": b"Subject: a\n.b\n\nc\n.d\n..e\r\n",
    "CR CR LF": b"Subject: a\r\r\n\r\r\nReply-To: b\r\r\n\r\nc\r\n",
}


@pytest.mark.parametrize("field", ["X-By", "Received"])
def test_header_where_postfix_has_the_section(
    loop: Loop, proxsmtpd: StartDaemon, field: str
) -> None:
    """The field becomes part of the header section, and nothing else changes."""
    daemon = proxsmtpd({**loop.settings("cat"), "Header": f"{field}: by me"})
    for what, message in ODD_HEADERS.items():
        mails = []
        for port in (loop.reentry, loop.filter_port):
            with smtplib.SMTP(
                "127.0.0.1", port, "client.example", timeout=20
            ) as client:
                client.sendmail(SENDER, RECIPIENT, message)
            mails += loop.postfix.wait_mails(1)
            loop.postfix.wait_idle()
            loop.postfix.clear()
        direct, relayed = mails
        assert relayed.body == direct.body, what
        for name in ("Subject", "X-A", "Reply-To", "X-Mailbox-Line"):
            assert relayed.header(name) == direct.header(name), what
        section = relayed.content.partition(b"\n\n")[0].decode("latin-1").split("\n")
        assert section.count(f"{field}: by me") == 1, what
        assert f"{field}: by me" not in direct.content.decode("latin-1"), what
    assert daemon.log().count("status=FILTERED") == len(ODD_HEADERS)


def test_filter_that_adds_crs(loop: Loop, proxsmtpd: StartDaemon) -> None:
    """A message that has CRLF already ends up with CR CR LF."""
    proxsmtpd(loop.settings(r"sed 's/$/\r/'"))
    data = b"Subject: a\r\nX-A: b\r\n\r\nReply-To: c\r\n\r\nd\r\n"
    loop.send(data)
    (mail,) = loop.postfix.wait_mails(1)
    assert (mail.header("Subject"), mail.header("X-A")) == ("a", "b")
    assert mail.header("Reply-To") is None
    assert mail.body == body_of(data)


def test_large_attachment(loop: Loop, proxsmtpd: StartDaemon) -> None:
    proxsmtpd(loop.settings("cat"), level=1)
    content = random.Random(5).randbytes(5 << 20)
    message = EmailMessage(policy=email.policy.SMTP)
    message["Subject"] = "five megabytes"
    message.set_content("Here it is.\n")
    message.add_attachment(content, maintype="application", subtype="octet-stream")
    loop.send(message.as_bytes())
    (mail,) = loop.postfix.wait_mails(1)
    assert mail.body == body_of(message.as_bytes())
    assert attachment(mail.content) == content


def test_file_filter(
    loop: Loop, proxsmtpd: StartDaemon, filter_script: MakeFilter
) -> None:
    command = filter_script("sed -i -e 's/cheap/expensive/' \"$EMAIL\"")
    proxsmtpd({**loop.settings(command), "FilterType": "file"})
    loop.send(b"Subject: offer\r\n\r\ncheap watches\r\n")
    (mail,) = loop.postfix.wait_mails(1)
    assert mail.body == b"expensive watches\n"


@pytest.mark.parametrize(
    ("words", "reply"),
    [
        pytest.param("554 5.7.1 No watches", "554 5.7.1 No watches", id="a reply"),
        pytest.param("No watches", "550 Content Rejected; No watches", id="words"),
    ],
)
def test_rejecting_filter(
    loop: Loop,
    proxsmtpd: StartDaemon,
    filter_script: MakeFilter,
    words: str,
    reply: str,
) -> None:
    proxsmtpd(loop.settings(filter_script(f"echo '{words}' >&2; exit 1")))
    loop.send(b"Subject: offer\r\n\r\ncheap watches\r\n")
    (bounce,) = loop.postfix.wait_mails(1)
    assert (bounce.sender, bounce.recipient) == ("<>", SENDER)
    said = f"said: {reply} (in reply to end of DATA command)"
    assert said in " ".join(bounce.body.decode().split())
    loop.postfix.wait_idle()


@pytest.mark.parametrize(
    ("failing", "reply"),
    [
        pytest.param(
            "echo '451 4.7.1 Come back later' >&2; exit 1",
            "451 4.7.1 Come back later",
            id="defers",
        ),
        pytest.param("exit 127", "451 Local Error", id="cannot be run"),
        pytest.param("kill -9 $$", "451 Local Error", id="is killed"),
        pytest.param("sleep 600", "451 Local Error", id="is silent"),
        pytest.param("exit 0", "451 Local Error", id="leaves nothing"),
    ],
)
def test_message_waits_until_the_filter_agrees(
    loop: Loop,
    proxsmtpd: StartDaemon,
    filter_script: MakeFilter,
    tmp_path: Path,
    failing: str,
    reply: str,
) -> None:
    """The queue shows why, and the next flush delivers it."""
    ready = tmp_path / "ready"
    command = filter_script(f"test -e {ready} && exec cat\n{failing}")
    daemon = proxsmtpd({**loop.settings(command), "FilterTimeout": 2})
    loop.send(b"Subject: patience\r\n\r\nhello\r\n")
    said = f"said: {reply} (in reply to end of DATA command)"
    loop.postfix.wait_log(rf"status=deferred .* {re.escape(said)}")
    assert said in loop.postfix.wait_deferred()
    assert loop.postfix.mails() == []
    ready.touch()
    loop.postfix.flush()
    (mail,) = loop.postfix.wait_mails(1)
    assert mail.body == b"hello\n"
    loop.postfix.wait_idle()
    daemon.wait_log("status=FILTERED")


def test_message_waits_until_proxsmtpd_is_there(
    loop: Loop, proxsmtpd: StartDaemon
) -> None:
    loop.send(b"Subject: patience\r\n\r\nhello\r\n")
    queue = loop.postfix.wait_deferred()
    assert f"127.0.0.1[127.0.0.1]:{loop.filter_port}: Connection refused" in queue
    proxsmtpd(loop.settings("cat"))
    loop.postfix.flush()
    (mail,) = loop.postfix.wait_mails(1)
    assert mail.body == b"hello\n"
    loop.postfix.wait_idle()


def test_proxsmtpd_killed_while_it_filters(
    loop: Loop, proxsmtpd: StartDaemon, filter_script: MakeFilter, tmp_path: Path
) -> None:
    """The message stays in the queue, and is delivered once."""
    started, ready = tmp_path / "started", tmp_path / "ready"
    wait = f"touch {started}; until test -e {ready}; do sleep 0.05; done; exec cat"
    settings = loop.settings(filter_script(wait))
    daemon = proxsmtpd(settings)
    loop.send(b"Subject: patience\r\n\r\nhello\r\n")
    assert poll(started.exists), daemon.log()
    daemon.stop(signal.SIGKILL)
    assert "lost connection with 127.0.0.1" in loop.postfix.wait_deferred()
    assert loop.postfix.mails() == []
    ready.touch()  # for the filter that was left alone, too
    assert poll(lambda: not marked_processes(daemon.mark))
    proxsmtpd(settings)
    loop.postfix.flush()
    (mail,) = loop.postfix.wait_mails(1)
    assert mail.body == b"hello\n"
    loop.postfix.wait_idle()
    assert len(loop.postfix.mails()) == 1


def test_dropped_message(
    loop: Loop, proxsmtpd: StartDaemon, filter_script: MakeFilter
) -> None:
    proxsmtpd(loop.settings(filter_script("echo '250 2.0.0 Gone' >&2; exit 1")))
    loop.send(b"Subject: offer\r\n\r\ncheap watches\r\n")
    loop.postfix.wait_log(r"status=sent \(250 2\.0\.0 Gone\)")
    loop.postfix.wait_idle()
    assert loop.postfix.mails() == []


def test_concurrent_sessions(server: ScriptedServer, proxsmtpd: StartDaemon) -> None:
    count = 300
    daemon = proxsmtpd({"FilterCommand": "cat"}, level=1)
    smtp_source(daemon.port, sessions=20, messages=count)
    ids = collections.Counter(message_id(m.data) for m in server.messages)
    assert len(ids) == count, "lost"
    assert set(ids.values()) == {1}, "doubled"
    recipients = {m.recipients for m in server.messages}
    assert len(recipients) == count, "envelopes mixed up"


def test_concurrent_sessions_through_postfix(
    loop: Loop, proxsmtpd: StartDaemon
) -> None:
    count = 60
    proxsmtpd(loop.settings("cat"), level=1)
    smtp_source(loop.entrance, sessions=20, messages=count)
    mails: list[Mail] = loop.postfix.wait_mails(count)
    loop.postfix.wait_idle()
    assert len({message_id(m.content) for m in mails}) == count
    assert len(loop.postfix.mails()) == count
