r"""The dialogue, by the transcripts in `dialogues/*.txt`.

A transcript begins with what is set up, one thing a line, and goes on, after an
empty line, with what must happen, in this order.  `#` begins a comment line; the
first of them say what the transcript shows.

Set-up:

    Set Name: value     a line of proxsmtpd's configuration
    Server VERB: reply  what the server answers to VERB; several such lines are used
                        in turn, the last one repeats.  GREETING, DOT (the end of
                        the mail data) and 334 (an AUTH answer) count as verbs.
                        ` | ` stands between the lines of a reply, and may be
                        followed by a last `close!`, `reset!` or `stall!`

What happens:

    -> line     the client sends this and CRLF
    -+ octets   the client sends just this; all that it sends in adjoining lines of
                the transcript leaves in one write
    -! how      the client leaves: `close` (FIN), `reset` (RST) or `half` (FIN, but
                it goes on reading)
    <- line     the client receives exactly this line
    <~ pattern  the client receives a line that matches this as a whole
    <?~ pattern the same, but the line may be absent where the connection ends
    <!          the client's connection ends, and nothing came before that
    => line     the next line that the server receives is exactly this
    =~ pattern  the next line that the server receives matches this as a whole
    =? line     the server may receive this line before the next one
    =| line     a line of a message that the server accepts, as on the wire;
                adjoining lines make one message
    =0          the server accepts a message without any line
    =!          the server's connection has ended
    <= reply    the server says this unasked (in the set-up's notation)
    log~ pattern    the log has, or will have, a line in which this is found
    log!~ pattern   the log of the whole dialogue has no such line

In lines and replies, `\r`, `\n`, `\t`, `\\` and `\xNN` stand for their octets.
What is not in a transcript must not happen: a line that the server received, a
message that it accepted, or an octet that the client got, fails it.  What
proxsmtpd tells the server after the client has gone is not looked at.
"""

from __future__ import annotations

import contextlib
import re
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Callable

import pytest

from helpers import Daemon, MakeServer, ShareDaemon, StartDaemon, port_of, reserve_port
from proxsmtpd import REPLY_HOLD
from smtp import (
    Action,
    Chunks,
    Close,
    Delay,
    Handler,
    RawClient,
    Recorded,
    Reply,
    Reset,
    ScriptedServer,
    Stall,
    reset,
)

TRANSCRIPTS = sorted((Path(__file__).parent / "dialogues").glob("*.txt"))

SETTING = re.compile(r"Set (\w+: .*|\w+:)")
SERVER_REPLY = re.compile(r"Server ([\w-]+): (.*)")
STEP = re.compile(
    r"(->|-\+|-!|<-|<~|<\?~|<!|=>|=~|=\?|=\||=0|=!|<=|log~|log!~)(?: (.*))?"
)
ESCAPE = re.compile(rb"\\(?:x([0-9a-f]{2})|([rnt\\]))")
ENDINGS: dict[str, Callable[[bytes], Action]] = {
    "close!": Close,
    "reset!": Reset,
    "stall!": lambda _: Stall(),
}


def octets(text: str) -> bytes:
    """Return the octets that a transcript's text stands for."""
    plain = {b"r": b"\r", b"n": b"\n", b"t": b"\t", b"\\": b"\\"}

    def octet(found: re.Match[bytes]) -> bytes:
        code, letter = found.groups()
        return bytes([int(code, 16)]) if code else plain[letter]

    return ESCAPE.sub(octet, text.encode())


def scripted(text: str) -> Action:
    """Return the server's action for a transcript's `line | line | close!`."""
    *lines, last = text.split(" | ")
    ending = ENDINGS.get(last)
    if not ending:
        lines.append(last)
    reply = b"".join(octets(line) + b"\r\n" for line in lines)
    return ending(reply) if ending else reply


@dataclass
class Transcript:
    """A transcript file: what to set up, and the steps with their line numbers."""

    settings: str = ""
    script: dict[str, Reply] = field(default_factory=dict)
    steps: list[tuple[int, str, str]] = field(default_factory=list)

    def set_up(self, line: str) -> None:
        """Take a line of the set-up."""
        if found := SETTING.fullmatch(line):
            self.settings += found[1] + "\n"
            return
        found = SERVER_REPLY.fullmatch(line)
        assert found, f"not a line of a set-up: {line}"
        replies = self.script.setdefault(found[1], [])
        assert isinstance(replies, list)
        replies.append(scripted(found[2]))

    def add_step(self, number: int, line: str) -> None:
        """Take a line of what happens."""
        found = STEP.fullmatch(line)
        assert found, f"line {number} is not a step: {line}"
        self.steps.append((number, found[1], found[2] or ""))


def read(path: Path) -> Transcript:
    """Read a transcript file."""
    transcript = Transcript()
    text = path.read_text(encoding="utf-8")
    heading, _, body = text.partition("\n\n")
    for line in heading.splitlines():
        if not line.startswith("#"):
            transcript.set_up(line)
    first = heading.count("\n") + 3
    for number, line in enumerate(body.splitlines(), first):
        if line and not line.startswith("#"):
            transcript.add_step(number, line)
    assert transcript.steps, "nothing happens in this transcript"
    return transcript


class Runner:
    """Takes the steps of a transcript, as the client and as the server."""

    def __init__(self, daemon: Daemon, server: ScriptedServer) -> None:
        self.daemon, self.server = daemon, server
        self.client = daemon.connect()
        self.gone = False  # The client's connection has ended.
        self.claimed = 0  # Lines that the server received and a step named.
        self.messages = 0  # Messages likewise.
        self.optional: list[bytes] = []  # Lines that the server may receive.
        self.forbidden: list[str] = []

    def run(self, steps: Sequence[tuple[int, str, str]]) -> None:
        """Take all steps; an AssertionError names the line of the file."""
        for operator, number, texts in merged(steps):
            try:
                self.step(operator, texts)
            except AssertionError as error:
                raise AssertionError(f"line {number}: {error}") from error
        self.finish()

    def step(self, operator: str, texts: list[str]) -> None:
        """Take one step, or several that belong together."""
        if operator == "->":
            self.client.send(b"".join(map(octets, texts)))
        elif operator == "-!":
            self.leave(texts[0])
        elif operator.startswith("<"):
            self.client_hears(operator, texts[0])
        elif operator in ("=|", "=0"):
            self.message(texts if operator == "=|" else [])
        elif operator.startswith("="):
            self.server_hears(operator, texts[0])
        elif operator == "log~":
            self.daemon.wait_log(texts[0])
        else:
            self.forbidden.append(texts[0])

    def leave(self, how: str) -> None:
        """End the client's connection, or its sending half."""
        ways = {
            "close": self.client.close,
            "reset": self.client.reset,
            "half": self.client.half_close,
        }
        ways[how]()
        self.gone = how != "half"

    def client_hears(self, operator: str, text: str) -> None:
        """Check what the client receives, or make the server say something."""
        if operator == "<=":
            self.server_says(scripted(text))
        elif operator == "<!":
            assert self.client.eof(), "the client's connection goes on"
            self.gone = True
        elif operator == "<-":
            received = self.client.line()
            assert received == octets(text) + b"\r\n", received
        elif operator == "<~" or not self.client.at_end():
            received = self.client.line()
            assert re.fullmatch(octets(text) + b"\r\n", received), received

    def server_says(self, action: Action) -> None:
        """Make the server say, or do, something unasked."""
        connection = self.server.wait_connection()
        if isinstance(action, bytes):
            connection.send(action)
        elif isinstance(action, Close):
            connection.send(action.last)
            connection.hang_up()
        else:
            raise AssertionError("the server can only speak or close unasked")

    def server_hears(self, operator: str, text: str) -> None:
        """Check the next line that the server received."""
        connection = self.server.wait_connection()
        if operator == "=!":
            self.server.wait_for(lambda: connection.closed)
            return
        if operator == "=?":
            self.optional.append(octets(text))
            return
        pattern = octets(text) if operator == "=~" else re.escape(octets(text))
        while not re.fullmatch(pattern, received := self.next_line(connection)):
            assert received in self.optional, f"the server received {received!r}"
            self.optional.remove(received)

    def next_line(self, connection: Recorded) -> bytes:
        """Return the next line that the server receives."""
        self.server.wait_for(lambda: len(connection.lines) > self.claimed)
        self.claimed += 1
        return connection.lines[self.claimed - 1]

    def message(self, texts: list[str]) -> None:
        """Check the next message that the server accepted."""
        self.messages += 1
        message = self.server.wait_message(self.messages)
        assert message.data == b"".join(octets(text) + b"\r\n" for text in texts)

    def finish(self) -> None:
        """Check that nothing else has happened until both connections ended."""
        known: Recorded | None = None
        if self.server.connections:
            known = self.server.connections[0]
            more = [x for x in known.lines[self.claimed :] if x not in self.optional]
            assert more == [], "the server received more"
        if not self.gone:
            self.client.half_close()
            rest = self.client.rest()
            assert rest == b"", f"the client received {rest!r}"
        if known:
            self.server.wait_for(lambda: known.closed)
        assert len(self.server.messages) == self.messages
        if self.forbidden:
            self.daemon.wait_log("CLIENT connection closed$")
        for pattern in self.forbidden:
            assert not re.search(pattern, self.daemon.log(), re.M), pattern


def merged(
    steps: Sequence[tuple[int, str, str]],
) -> Iterator[tuple[str, int, list[str]]]:
    """Steps with the adjoining ones that make one write, or one message, joined."""

    def kind(step: tuple[int, str, str]) -> object:
        number, operator, _ = step
        if operator in ("->", "-+"):
            return "->"
        return "=|" if operator == "=|" else number

    for what, group in groupby(steps, kind):
        members = list(group)
        number, operator, _ = members[0]
        ends = {"->": "\\r\\n"}
        texts = [text + ends.get(each, "") for _, each, text in members]
        yield (what if isinstance(what, str) else operator), number, texts


@pytest.mark.parametrize("path", TRANSCRIPTS, ids=lambda path: path.stem)
def test_transcript(path: Path, shared_daemon: ShareDaemon) -> None:
    transcript = read(path)
    daemon, server = shared_daemon(transcript.settings, transcript.script)
    Runner(daemon, server).run(transcript.steps)


# --- What a transcript cannot say ---


def test_one_command_at_a_time(make_server: MakeServer, proxsmtpd: StartDaemon) -> None:
    """The server never gets a command before it has answered the last one."""
    early: list[bytes] = []

    def slowly(reply: bytes) -> Handler:
        def answer(connection: Recorded, line: bytes) -> Action:
            if not connection.received.endswith(line + b"\r\n"):
                early.append(connection.received)
            return Chunks([reply[:5], reply[5:]], pause=0.05)

        return answer

    verbs = {"MAIL": b"250 one\r\n", "RCPT": b"250-two\r\n250 three\r\n"}
    script = {verb: slowly(reply) for verb, reply in verbs.items()}
    server = make_server({**script, "VRFY": slowly(b"252 four\r\n")})
    client = proxsmtpd(server=server).connect()
    client.reply()
    client.send(
        b"MAIL FROM:<a@example.com>\r\nRCPT TO:<b@example.com>\r\n"
        b"RCPT TO:<c@example.com>\r\nVRFY d\r\nRSET\r\nQUIT\r\n"
    )
    assert client.rest() == (
        b"250 one\r\n250-two\r\n250 three\r\n250-two\r\n250 three\r\n"
        b"252 four\r\n250 2.0.0 Ok\r\n221 2.0.0 Bye\r\n"
    )
    assert early == []


SLOW = REPLY_HOLD + 1  # seconds


def test_replies_are_not_held_back_for_a_slow_server(
    make_server: MakeServer, proxsmtpd: StartDaemon
) -> None:
    """A client waits minutes for each reply, but not for all together."""
    server = make_server({"RCPT": [b"250 one\r\n", Delay(SLOW, b"250 two\r\n")]})
    client = proxsmtpd(server=server).connect()
    client.reply()
    commands = b"MAIL FROM:<a@example.com>\r\n" + b"RCPT TO:<b@example.com>\r\n" * 2
    begin = time.monotonic()
    client.send(commands)
    assert client.reply() == b"250 2.1.0 Ok\r\n"
    assert client.reply() == b"250 one\r\n"
    assert time.monotonic() - begin < SLOW
    assert client.reply() == b"250 two\r\n"


@pytest.mark.parametrize("settings", [{}, {"FilterCommand": "cat"}], ids=["", "cat"])
def test_acceptance_is_sent_before_the_next_command(
    settings: dict[str, object], make_server: MakeServer, proxsmtpd: StartDaemon
) -> None:
    """A client that gave up meanwhile would send the message again."""
    ok = b"250 2.1.0 Ok\r\n"
    server = make_server({"MAIL": [ok, Delay(REPLY_HOLD, ok)]})
    client = proxsmtpd(settings, server=server).connect()
    client.start()
    client.expect(b"DATA", b"354")
    begin = time.monotonic()
    client.send(b"Hello\r\n.\r\nMAIL FROM:<a@example.com>\r\n")
    assert client.reply() == b"250 2.0.0 Ok: queued\r\n"
    assert time.monotonic() - begin < REPLY_HOLD
    assert client.reply() == ok


def test_pipelined_replies_come_in_one_write(
    make_server: MakeServer, proxsmtpd: StartDaemon
) -> None:
    slow = Delay(0.1, b"250 2.1.5 Ok\r\n")
    server = make_server({"RCPT": [slow, slow, b"550 5.1.1 Who\r\n"]})
    client = proxsmtpd({"FilterCommand": "cat"}, server=server).connect()
    client.reply()
    rcpt = b"".join(b"RCPT TO:<%d@example.com>\r\n" % number for number in range(3))
    client.send(b"MAIL FROM:<a@example.com>\r\n" + rcpt + b"DATA\r\n")
    assert client.sock.recv(65536) == (
        b"250 2.1.0 Ok\r\n250 2.1.5 Ok\r\n250 2.1.5 Ok\r\n550 5.1.1 Who\r\n"
        b"354 Start mail input; end with <CRLF>.<CRLF>\r\n"
    )


def test_replies_are_not_held_back_for_half_a_command(proxsmtpd: StartDaemon) -> None:
    client = proxsmtpd().connect()
    client.reply()
    client.send(b"NOOP\r\nNOO")
    assert client.reply() == b"250 2.0.0 Ok\r\n"
    client.send(b"P\r\n")
    assert client.reply() == b"250 2.0.0 Ok\r\n"


def test_commands_and_replies_octet_by_octet(
    make_server: MakeServer, proxsmtpd: StartDaemon
) -> None:
    reply = b"250-one\r\n250 two\r\n"
    server = make_server({"NOOP": Chunks([bytes([o]) for o in reply], pause=0.002)})
    client = proxsmtpd(server=server).connect()
    client.reply()
    for octet in b"NOOP\r\n":
        client.send(bytes([octet]))
        time.sleep(0.002)
    assert client.reply() == reply
    assert server.connections[0].lines == [b"NOOP"]


# Verbs, how they are answered, and the octets that a line of them may have.
LIMITS = {b"NOOP": (b"250", 2048), b"AUTH": (b"235", 12288), b"x-exps": (b"502", 12288)}


@pytest.mark.parametrize(("verb", "limit"), LIMITS.items(), ids=str)
def test_longest_lines(
    verb: bytes,
    limit: tuple[bytes, int],
    proxsmtpd: StartDaemon,
    server: ScriptedServer,
) -> None:
    """Postfix executes what stands before 2,048 octets; AUTH needs more."""
    code, length = limit
    client = proxsmtpd().connect()
    client.reply()
    longest = verb + b" " + b"x" * (length - len(verb) - 3)
    client.expect(longest, code)
    client.send(longest + b"x\r\nRSET\r\n")
    assert client.reply() == b"500 Line too long\r\n"
    assert client.reply() == b"250 2.0.0 Ok\r\n"
    assert server.connections[0].lines == [longest, b"RSET"]


def test_longest_answer(make_server: MakeServer, proxsmtpd: StartDaemon) -> None:
    """One in an authentication that is too long cancels it."""
    server = make_server({"AUTH": b"334 \r\n", "334": b"501 5.7.0 Cancelled\r\n"})
    client = proxsmtpd(server=server).connect()
    client.reply()
    client.expect(b"AUTH PLAIN", b"334")
    client.expect(b"x" * 12286, b"501")
    client.expect(b"AUTH PLAIN", b"334")
    assert client.command(b"x" * 12287) == b"500 Line too long\r\n"
    lines = [b"AUTH PLAIN", b"x" * 12286, b"AUTH PLAIN", b"*"]
    assert server.connections[0].lines == lines


@pytest.mark.parametrize("length", [12289, 1 << 20])
def test_lines_far_too_long(
    length: int, proxsmtpd: StartDaemon, server: ScriptedServer
) -> None:
    client = proxsmtpd().connect()
    client.reply()
    client.send(b"NOOP " + b"x" * (length - 5) + b"\r\nRSET\r\n")
    assert client.reply() == b"500 Line too long\r\n"
    assert client.reply() == b"250 2.0.0 Ok\r\n"
    assert server.connections[0].lines == [b"RSET"]


# What we refuse, and a server that would take it all.
REFUSED = {
    b"XCLIENT ADDR=192.0.2.1": b"554",
    b"PROXY x": b"554",
    b"STARTTLS": b"502",
    b"DATA": b"503",
    b"DATA x": b"501",
    b"MAILX": b"500",
    b"NO\0OP": b"500",
    b"NOOP " + b"x" * 3000: b"500",
}


@pytest.mark.parametrize(("line", "code"), REFUSED.items(), ids=lambda x: x[:12])
def test_errors_in_a_row(line: bytes, code: bytes, proxsmtpd: StartDaemon) -> None:
    daemon = proxsmtpd()
    client = daemon.connect()
    client.reply()
    for _ in range(19):
        client.expect(line, code)
    client.expect(b"NOOP", b"250")
    for _ in range(20):
        client.expect(line, code)
    assert client.reply() == b"421 Too many errors\r\n"
    assert client.eof()
    daemon.wait_log("client made too many errors$")
    assert daemon.log().count("attempted use of privileged") <= 1


def test_errors_in_a_session(proxsmtpd: StartDaemon) -> None:
    """Pipelined commands are answered until there are too many errors."""
    client = proxsmtpd().connect()
    client.send(b"NOOP\r\nSTARTTLS\r\n" * 1000)
    client.reply()
    codes = [client.reply()[:3] for _ in range(200)]
    assert codes == [b"250", b"502"] * 100
    assert client.reply() == b"421 Too many errors\r\n"


def test_rejecting_is_no_error_of_the_client(proxsmtpd: StartDaemon) -> None:
    """A client may pipeline what FilterType: reject refuses."""
    client = proxsmtpd("FilterType: reject\n").connect()
    client.send(b"MAIL FROM:<a@b>\r\n" + b"RCPT TO:<c@d>\r\n" * 200)
    client.reply()
    replies = {client.reply() for _ in range(201)}
    assert replies == {b"530 Email Rejected\r\n"}
    client.expect(b"NOOP", b"250")


def test_pipelined_data_is_no_error_of_the_client(
    make_server: MakeServer, proxsmtpd: StartDaemon
) -> None:
    """It was sent before the client could know that its recipients are refused."""
    server = make_server({"RCPT": b"550 5.1.1 No\r\n"})
    client = proxsmtpd(server=server).connect()
    client.reply()
    for _ in range(120):
        client.send(b"MAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nDATA\r\n")
        assert [client.reply()[:3] for _ in range(3)] == [b"250", b"550", b"503"]
        client.expect(b"RSET", b"250")
    for _ in range(19):
        client.expect(b"DATA", b"503")
    client.send(b"DATA\r\n")
    assert client.rest().endswith(b"421 Too many errors\r\n")


def test_rejecting_is_logged_once_a_session(proxsmtpd: StartDaemon) -> None:
    daemon = proxsmtpd("FilterType: reject\n")
    client = daemon.connect()
    client.reply()
    for _ in range(200):
        client.send(b"MAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nDATA\r\n")
        assert {client.reply() for _ in range(3)} == {b"530 Email Rejected\r\n"}
    client.quit()
    daemon.wait_log("CLIENT connection closed")
    assert daemon.log().count("status=REJECTED") == 1


def test_too_many_recipients_are_no_error_of_the_client(
    proxsmtpd: StartDaemon, server: ScriptedServer
) -> None:
    """It sends the others in another transaction (RFC 5321 4.5.3.1.10)."""
    client = proxsmtpd({"FilterCommand": "cat"}).connect()
    client.start(recipients=[])
    line = b"RCPT TO:<%s@example.com>" % (b"x" * 1900)
    codes = [client.command(line)[:3] for _ in range(100)]
    assert codes == [b"250"] * 68 + [b"452"] * 32
    assert client.message(b"x\r\n") == b"250 2.0.0 Ok: queued\r\n"
    assert len(server.messages[0].recipients) == 68


@pytest.mark.parametrize(
    "settings", ["", "FilterCommand: exit 1\nSkip: authenticated\n"], ids=str
)
def test_all_recipients_where_no_filter_runs(
    settings: str, proxsmtpd: StartDaemon, server: ScriptedServer
) -> None:
    client = proxsmtpd(settings).connect()
    client.reply()
    client.expect(b"AUTH PLAIN x", b"235")
    recipients = [b"<%d%s@example.com>" % (n, b"x" * 1900) for n in range(80)]
    client.envelope(recipients=recipients)
    assert client.message(b"x\r\n") == b"250 2.0.0 Ok: queued\r\n"
    assert server.messages[0].recipients == tuple(recipients)


def test_authentication_ends_with_a_late_xclient(
    make_server: MakeServer, proxsmtpd: StartDaemon
) -> None:
    """XCLIENT puts the server back to its greeting, where nobody is authenticated."""
    ehlo = b"250-sink.example\r\n250 XCLIENT NAME ADDR\r\n"
    server = make_server({"EHLO": [b"250 sink.example\r\n", ehlo]})
    settings = {"XClient": "on", "Skip": "authenticated", "FilterCommand": "exit 1"}
    client = proxsmtpd(settings, server=server).connect()
    client.reply()
    client.expect(b"EHLO client.example", b"250")
    client.expect(b"AUTH PLAIN x", b"235")
    client.expect(b"EHLO client.example", b"250")
    client.envelope()
    assert client.message(b"x\r\n") == b"550 Content Rejected\r\n"
    verbs = [line.split()[0] for line in server.connections[0].lines]
    assert verbs[:5] == [b"EHLO", b"AUTH", b"EHLO", b"XCLIENT", b"EHLO"]


def test_endless_line_in_bounded_memory(
    proxsmtpd: StartDaemon, server: ScriptedServer
) -> None:
    daemon = proxsmtpd()
    client = daemon.connect()
    client.reply()
    before = daemon.peak_memory()
    for _ in range(30):
        client.send(b"x" * 1_000_000)
    client.send(b"\r\n")
    assert client.reply() == b"500 Line too long\r\n"
    assert client.command(b"NOOP") == b"250 2.0.0 Ok\r\n"
    assert daemon.peak_memory() - before < 8_000_000
    assert server.connections[0].lines == [b"NOOP"]


def test_endless_reply_in_bounded_memory(
    make_server: MakeServer, proxsmtpd: StartDaemon
) -> None:
    flood = b"250-" + b"x" * 500 + b"\r\n"
    server = make_server({"NOOP": Chunks([flood * 2000] * 30, pause=0)})
    daemon = proxsmtpd(server=server, level=3)
    client = daemon.connect()
    client.reply()
    before = daemon.peak_memory()
    assert client.command(b"NOOP") == b"421 Server gave an unusable reply\r\n"
    assert client.eof()
    assert daemon.peak_memory() - before < 8_000_000


# --- The end of the mail data ---

STRETCH = b"one\r\n..two\r\n.\nthree\n.\r\nfour\r.\r\r\n..\r\n"


@pytest.mark.parametrize("command", ["cat", None], ids=["filtered", "streamed"])
def test_data_cut_anywhere(
    command: str | None, proxsmtpd: StartDaemon, server: ScriptedServer
) -> None:
    """Wherever the network cuts the mail data, the server gets the same."""
    daemon = proxsmtpd({"FilterCommand": command} if command else {})
    client = daemon.connect()
    client.start(recipients=())
    data = STRETCH + b".\r\n"
    for cut in range(len(data)):
        client.send(b"RSET\r\n")
        client.reply()
        client.envelope()
        client.expect(b"DATA", b"354")
        client.send(data[:cut])
        client.send(data[cut:])
        assert client.reply() == b"250 2.0.0 Ok: queued\r\n"
    expected = b"one\r\n..two\r\n\r\nthree\r\n..\r\nfour .\r\n..\r\n"
    assert {message.data for message in server.messages} == {expected}
    assert len(server.messages) == len(data)


SMUGGLED = b"MAIL FROM:<x@example.com>"
FALSE_ENDS = [
    b"\n.\n", b"\n.\r\n", b"\r\n.\n", b"\r.\r", b"\r\n.\r", b"\r.\r\n", b"\r.\n",
    b"\n.\r", b"\r\n.\r\r\n", b"\r\n.\0\r\n", b"\r\n\0.\r\n", b"\n\n.\n\n",
    b"\r\r\n.\r\r\n", b"\r\n..\n.\r\n",
]  # fmt: skip


@pytest.mark.parametrize("command", ["cat", None], ids=["filtered", "streamed"])
def test_no_smuggling(
    command: str | None, make_server: MakeServer, proxsmtpd: StartDaemon
) -> None:
    """Even a server that takes any end of the data for one gets single messages."""
    server = make_server(end_of_data="lenient")
    daemon = proxsmtpd({"FilterCommand": command} if command else {}, server=server)
    client = daemon.connect()
    client.start()
    for number, end in enumerate(FALSE_ENDS, 1):
        reply = client.message(b"Subject: x" + end + SMUGGLED + b"\r\n")
        assert reply == b"250 2.0.0 Ok: queued\r\n", end
        assert server.wait_message(number).data.endswith(SMUGGLED + b"\r\n"), end
        client.envelope()
    assert len(server.messages) == len(FALSE_ENDS)
    assert SMUGGLED not in server.connections[0].lines


@pytest.mark.parametrize("how", [Close(b"354 Go\r\n"), Reset(b"354 Go\r\n")])
def test_server_gone_in_streamed_data(
    how: Action, make_server: MakeServer, proxsmtpd: StartDaemon
) -> None:
    """The client's data is read to its end before it is answered."""
    server = make_server({"DATA": how})
    client = proxsmtpd(server=server).connect()
    client.start()
    client.expect(b"DATA", b"354")
    for _ in range(40):
        client.send(b"0123456789abcdef" * 8192 + b"\r\n")
    assert client.command(b".") == b"421 Connection to server lost\r\n"
    assert client.eof()


def test_server_says_why_it_goes_in_streamed_data(
    make_server: MakeServer, proxsmtpd: StartDaemon
) -> None:
    """The client gets that reply, and not just that it has gone."""
    server = make_server()
    client = proxsmtpd(server=server).connect()
    client.start()
    client.expect(b"DATA", b"354")
    client.send(b"0123456789abcdef\r\n" * 100_000)
    connection = server.connections[0]
    server.wait_for(lambda: b"0123456789abcdef" in connection.received)
    connection.send(b"421 4.3.2 Closing\r\n")
    connection.hang_up()
    for _ in range(40):
        client.send(b"0123456789abcdef" * 8192 + b"\r\n")
    assert client.command(b".") == b"421 4.3.2 Closing\r\n"
    assert client.eof()


# --- XCLIENT with all its attributes ---

ALL_ATTRIBUTES = b"XCLIENT NAME ADDR PORT PROTO HELO LOGIN DESTADDR DESTPORT"


def xclient_attributes(connection: Recorded) -> dict[bytes, bytes]:
    """Return the attributes of the one XCLIENT command that the server received."""
    (line,) = [x for x in connection.lines if x.startswith(b"XCLIENT ")]
    words = line.split(b" ")[1:]
    pairs = [word.partition(b"=")[::2] for word in words]
    assert len(dict(pairs)) == len(words)
    return dict(pairs)


@pytest.mark.parametrize("code", [450, 451, 454, 500, 501, 502, 503, 504, 550, 554])
def test_xclient_that_is_refused(
    code: int, make_server: MakeServer, proxsmtpd: StartDaemon
) -> None:
    """Some codes speak of the command or of us, and then the mail goes on."""
    refusal = b"%d 5.0.0 No\r\n" % code
    server = make_server(
        {"XCLIENT": refusal}, extensions=(b"XCLIENT NAME ADDR", b"SIZE 1000")
    )
    daemon = proxsmtpd({"XClient": "on"}, server=server)
    client = daemon.connect()
    client.reply()
    if code in (500, 501, 502, 503, 504, 550):
        client.expect(b"EHLO client.example", b"250")
        daemon.wait_log("server didn't accept XCLIENT")
        client.envelope()
        assert client.message(b"Hello\r\n") == b"250 2.0.0 Ok: queued\r\n"
    else:
        assert client.command(b"EHLO client.example") == refusal
        assert client.command(b"MAIL FROM:<a@example.com>") == refusal
        assert "didn't accept" not in daemon.log()


def test_xclient_attributes(make_server: MakeServer, proxsmtpd: StartDaemon) -> None:
    server = make_server(extensions=[ALL_ATTRIBUTES])
    daemon = proxsmtpd({"XClient": "on"}, server=server)
    client = daemon.connect()
    client.reply()
    client.expect(b"EHLO a+b=c d\xe9", b"250")
    client_port = client.sock.getsockname()[1]
    assert xclient_attributes(server.connections[0]) == {
        b"NAME": b"[UNAVAILABLE]",
        b"ADDR": b"127.0.0.1",
        b"PORT": b"%d" % client_port,
        b"PROTO": b"ESMTP",
        b"HELO": b"a+2Bb+3Dc+20d+E9",
        b"DESTADDR": b"127.0.0.1",
        b"DESTPORT": b"%d" % daemon.port,
    }


def test_xclient_ipv6(make_server: MakeServer, proxsmtpd: StartDaemon) -> None:
    server = make_server(extensions=[ALL_ATTRIBUTES])
    with reserve_port("::1") as holder:
        listen = f"[::1]:{port_of(holder)}"
        daemon = proxsmtpd({"XClient": "on", "Listen": listen}, server=server)
        client = daemon.connect()
        client.start()
    seen = xclient_attributes(server.connections[0])
    assert (seen[b"ADDR"], seen[b"DESTADDR"]) == (b"IPV6:::1", b"IPV6:::1")


def test_xclient_unix_socket(
    make_server: MakeServer, proxsmtpd: StartDaemon, tmp_path: Path
) -> None:
    server = make_server(extensions=[b"XCLIENT ADDR NAME"])
    settings = {"XClient": "on", "Listen": tmp_path / "sock"}
    daemon = proxsmtpd(settings, server=server)
    daemon.connect().start()
    assert xclient_attributes(server.connections[0]) == {
        b"ADDR": b"[UNAVAILABLE]",
        b"NAME": b"[UNAVAILABLE]",
    }


def test_xclient_waits_for_the_answer(
    make_server: MakeServer, proxsmtpd: StartDaemon
) -> None:
    """Postfix ends a session that pipelines commands after XCLIENT."""
    early: list[bytes] = []

    def answer(connection: Recorded, line: bytes) -> Action:
        if not connection.received.endswith(line + b"\r\n"):
            early.append(connection.received)
        return Chunks([b"220-sink", b".example\r\n220 ESMTP\r\n"], pause=0.1)

    server = make_server({"XCLIENT": answer}, extensions=[b"XCLIENT ADDR"])
    daemon = proxsmtpd({"XClient": "on"}, server=server)
    assert daemon.connect().message(b"x\r\n") == b"250 2.0.0 Ok: queued\r\n"
    assert early == []


def test_server_that_resets_at_once(proxsmtpd: StartDaemon) -> None:
    """Even a server that is gone before we have looked at it leaves no client alone."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    port = listener.getsockname()[1]

    def reset_all() -> None:
        with contextlib.suppress(OSError):  # the listener is closed
            while True:
                reset(listener.accept()[0])

    thread = threading.Thread(target=reset_all)
    thread.start()
    daemon = proxsmtpd({"OutAddress": f"127.0.0.1:{port}"}, level=1)
    answers = set()
    for _ in range(400):
        with RawClient(daemon.address) as client:
            answers.add(client.reply()[:4])
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join()
    assert answers == {b"421 "}
    assert daemon.stop() == 0  # that line would come after the reply
    assert "session failed" not in daemon.log()
