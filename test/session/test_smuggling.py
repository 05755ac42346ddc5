"""No message gets past the filter: false ends of the data, and odd commands.

The first half sends mail data with everything that some server takes for its end, from
the client and from the filter, to a scripted server that takes all of it and to a
real Postfix that takes some.  The second half sends every spelling of the commands that
could bring mail past the filter to a server that reads them as badly as it can, and
lets the server answer as badly as it can.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import re
import select
import socketserver
import ssl
import termios
import threading
import time
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Callable, NamedTuple

import pytest

import proxsmtpd as program
from helpers import (
    MEGABYTE,
    PATIENCE,
    QUEUED,
    Daemon,
    MakeFilter,
    MakeServer,
    StartDaemon,
    in_clear_and_in_tls,
    one_process,
    port_of,
    requires,
    reserve_port,
)
from postfix import POSTFIX, PrivatePostfix, smtpd
from smtp import Action, RawClient, Recorded, Reply, ScriptedServer

CRLF = b"\r\n"
EHLO = b"EHLO client.example"


def listed(wrong: Mapping[str, object]) -> str:
    """Format the failures, a line each."""
    return "\n".join(f"{where}: {what}" for where, what in wrong.items())


# --- What some server takes for the end of the data ---

LINE_ENDS = {"CRLF": b"\r\n", "LF": b"\n", "CR": b"\r", "CRCRLF": b"\r\r\n"}
DOTS = {"dot": b".", "two dots": b".."}
NUL_ENDS = {**LINE_ENDS, "CR NUL LF": b"\r\0\n"}
NUL_DOTS = {"NUL dot": b"\0.", "dot NUL": b".\0", "NUL dot NUL": b"\0.\0"}


def false_ends(
    dots: Mapping[str, bytes], ends: Mapping[str, bytes] = LINE_ENDS
) -> dict[str, bytes]:
    """Combine line end, dot and line end in all ways except the true end."""
    return {
        f"{before} {dot} {after}": ends[before] + dots[dot] + ends[after]
        for before, dot, after in itertools.product(ends, dots, ends)
        if b"\r\n.\r\n" not in ends[before] + dots[dot] + ends[after]
    }


FALSE_ENDS = {"dots": false_ends(DOTS), "NULs": false_ends(NUL_DOTS, NUL_ENDS)}
LONGEST = max(len(end) for ends in FALSE_ENDS.values() for end in ends.values())

# A server that takes them all: it ignores a NUL, and a CR before a line's end.
TAKES_ALL = rb"(\r\0?\n|\r|\n)\0?\.\0?(?:\r\0?\n|\r|\n)"
SMUGGLED = b"MAIL FROM:<smuggled@example.com>\r\nRCPT TO:<b@example.com>\r\nDATA\r\n"


def sections(ends: Mapping[str, bytes]) -> list[tuple[bytes, bytes, bytes]]:
    """For each false end: what stands before it, itself, and what follows."""
    return [
        (b"before %d" % number, end, b"after %d\r\n" % number + SMUGGLED)
        for number, end in enumerate(ends.values())
    ]


def pieces(ends: Mapping[str, bytes], cut: int) -> list[bytes]:
    """Return one message with all false ends, each cut in two after so many octets."""
    found, piece = [], b""
    for before, end, after in sections(ends):
        found.append(piece + before + end[:cut])
        piece = end[cut:] + after
    return [*found, piece]


def cleaned(data: bytes) -> bytes:
    """Return the data that the server must get for a message of these octets."""
    lines = re.split(rb"\r*\n", data)
    spaced = [line.replace(b"\r", b" ") for line in lines]
    return CRLF.join(b"." + line if line[:1] == b"." else line for line in spaced)


def unstuffed(data: bytes) -> bytes:
    """Remove the dots of data on the wire, also the first of two after a bare LF."""
    return re.sub(rb"(\r\n)\.|(\n)\.(?=\.)", rb"\1\2", data)


def check_one_meaning(data: bytes) -> None:
    """See that no server can read an end into mail data from the wire."""
    bare = data.replace(CRLF, b"")
    assert b"\r" not in bare
    assert b"\n" not in bare
    lone = [line for line in data.split(CRLF) if line.replace(b"\0", b"") == b"."]
    assert lone == []


def wait_taken(client: RawClient) -> None:
    """Wait until the daemon has read all that this client of a unix socket sent.

    No event tells that; but the system knows how much is still on its way.
    """
    deadline = time.monotonic() + PATIENCE
    while any(fcntl.ioctl(client.sock, termios.TIOCOUTQ, bytes(4))):
        assert time.monotonic() < deadline, "the daemon does not read"
        time.sleep(0.0001)


MODES: Mapping[str, Mapping[str, object]] = {
    "no filter": {},
    "Skip": {"Skip": "authenticated", "FilterCommand": "exit 1"},
    "pipe": {"FilterCommand": "cat"},
    "file": {"FilterType": "file", "FilterCommand": ":"},
}

ALL_MODES = {**MODES, "reject": {"FilterType": "reject"}}


def authenticated(client: RawClient) -> None:
    """Go from the greeting to a successful AUTH."""
    client.reply()
    client.expect(EHLO, b"250")
    client.expect(b"AUTH PLAIN c2VzYW1l", b"235")


@pytest.fixture
def credulous(make_server: MakeServer) -> ScriptedServer:
    """Provide a server that takes any false end for the end of the data."""
    return make_server(end_of_data=TAKES_ALL)


@in_clear_and_in_tls
@pytest.mark.parametrize("kind", FALSE_ENDS)
@pytest.mark.parametrize("mode", MODES)
def test_client_smuggles(
    kind: str,
    mode: str,
    credulous: ScriptedServer,
    proxsmtpd: StartDaemon,
    tmp_path: Path,
) -> None:
    """All false ends in one message, each cut over two writes, at every place."""
    settings = {**MODES[mode], "Listen": tmp_path / "s"}
    client = proxsmtpd(settings, server=credulous, level=3).connect()
    authenticated(client)
    for cut in range(LONGEST + 1):
        client.envelope()
        client.expect(b"DATA", b"354")
        for piece in pieces(FALSE_ENDS[kind], cut):
            client.send(piece)
            wait_taken(client)
        assert client.command(b".") == QUEUED, cut
        message = credulous.wait_message(cut + 1)
        assert len(credulous.messages) == cut + 1, "more than one message came"
        check_one_meaning(message.data)
        if kind == "dots":
            sent = b"".join(pieces(FALSE_ENDS[kind], cut))
            assert message.data == cleaned(unstuffed(sent))
    client.quit()
    assert len(credulous.messages) == LONGEST + 1
    assert b"after" not in b"".join(credulous.connections[0].lines)


# Writes its output in many pieces: a shell's own printf makes one write each.
WRITERS = {"pipe": "cat > /dev/null", "file": 'exec > "$EMAIL"'}


def printing(piece: bytes) -> str:
    """Return a shell command that writes these octets at once."""
    return "printf '" + "".join(f"\\{octet:03o}" for octet in piece) + "'\n"


@in_clear_and_in_tls
@pytest.mark.parametrize("kind", FALSE_ENDS)
@pytest.mark.parametrize("mode", WRITERS)
def test_filter_smuggles(
    kind: str,
    mode: str,
    credulous: ScriptedServer,
    proxsmtpd: StartDaemon,
    tmp_path: Path,
) -> None:
    """The same from the filter's output; there <CRLF>.<CRLF> is just as false."""
    ends = {**FALSE_ENDS[kind], "true": b"\r\n.\r\n", "nearly": b"\r\r\n.\r\n"}
    for cut in range(LONGEST + 1):
        prints = "".join(printing(piece) for piece in pieces(ends, cut))
        (tmp_path / str(cut)).write_text(f"{WRITERS[mode]}\n{prints}")
    # The command's number is the sender's local part.
    command = f'. {tmp_path}/"${{SENDER%@*}}"'
    settings = {"FilterType": mode, "FilterCommand": command}
    client = proxsmtpd(settings, server=credulous, level=3).connect()
    client.start()
    for cut in range(LONGEST + 1):
        client.command(b"RSET")
        client.envelope(b"<%d@example.com>" % cut)
        assert client.message(b"x\r\n") == QUEUED, cut
        message = credulous.wait_message(cut + 1)
        assert len(credulous.messages) == cut + 1, "more than one message came"
        check_one_meaning(message.data)
        if kind == "dots":
            assert message.data == cleaned(b"".join(pieces(ends, cut)))
    client.quit()
    assert len(credulous.messages) == LONGEST + 1
    assert b"after" not in b"".join(credulous.connections[0].lines)


@in_clear_and_in_tls
def test_false_ends_across_blocks(
    credulous: ScriptedServer, proxsmtpd: StartDaemon, tmp_path: Path
) -> None:
    """A false end that lies across two of the blocks that go to the server."""
    ends = [*false_ends({"dot": b"."}).values(), b"\r\n.\r\n"]
    data = bytearray(b"x")
    for end in ends:
        for cut in range(1, len(end)):
            room = program.BLOCK - (len(data) + cut) % program.BLOCK
            data += b"x" * room + end + SMUGGLED
    (tmp_path / "output").write_bytes(data)
    settings = {"FilterCommand": f"cat {tmp_path}/output"}
    client = proxsmtpd(settings, server=credulous, level=3).connect(timeout=30)
    assert client.message(b"x\r\n") == QUEUED
    assert credulous.wait_message().data == cleaned(bytes(data))
    client.quit()
    assert len(credulous.messages) == 1


def test_many_nuls_before_a_dot(
    credulous: ScriptedServer, proxsmtpd: StartDaemon
) -> None:
    """However many they are, what follows is not waited for in memory."""
    size = 24 << 20
    daemon = proxsmtpd(server=credulous, level=3)
    client = daemon.connect(timeout=30)
    client.message(b"x\r\n")
    before = daemon.peak_memory()
    client.envelope()
    assert client.message(b"x\r\n" + bytes(size) + b".\r\n" + SMUGGLED) == QUEUED
    data = credulous.wait_message(2).data
    assert len(credulous.messages) == 2
    check_one_meaning(data)
    assert data.count(b"\0") == size
    assert daemon.peak_memory() - before < size // 2


# --- The same with a real server ---

C_PROGRAM = "/usr/sbin/proxsmtpd"
needs_postfix = [
    requires("postfix", POSTFIX),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can start a Postfix"),
    one_process("lenient"),
]
ALL_ENDS = {**FALSE_ENDS["dots"], **FALSE_ENDS["NULs"]}
# What Postfix takes for the end unless smtpd_forbid_bare_newline tells it not to.
TAKEN_BY_POSTFIX = {
    f"{before} dot {after}"
    for before in ("CRLF", "LF", "CRCRLF")
    for after in ("CRLF", "LF", "CRCRLF")
} & set(ALL_ENDS)


class LenientPostfix(NamedTuple):
    """A Postfix with two SMTP servers that take bare line feeds, and its mail."""

    postfix: PrivatePostfix
    servers: Mapping[str, int]  # their ports

    def recipients(self) -> list[str]:
        """Return the recipients, sorted, once all mail is delivered, and remove it."""
        self.postfix.wait_idle()
        mails = self.postfix.mails()
        self.postfix.clear()
        return sorted(str(mail.recipient) for mail in mails)


@pytest.fixture(scope="module")
def lenient() -> Iterator[LenientPostfix]:
    """One Postfix for all tests: bare line feeds forbidden to nobody, or to all but
    the local networks, in which these tests and every local proxy are."""
    options = {
        "no": {"smtpd_forbid_bare_newline": "no"},
        "excluded": {
            "smtpd_forbid_bare_newline": "yes",
            "smtpd_forbid_bare_newline_exclusions": "$mynetworks",
        },
    }
    with contextlib.ExitStack() as stack:
        ports = {name: stack.enter_context(reserve_port()) for name in options}
        numbers = {name: port_of(holder) for name, holder in ports.items()}
        services = [smtpd(numbers[name], options[name]) for name in options]
        yield LenientPostfix(stack.enter_context(PrivatePostfix(services)), numbers)


def attack(end: bytes, number: int) -> bytes:
    """Return a message that has another one, to `inner`, after a false end."""
    return (
        b"Subject: outer\r\n\r\nx%s"
        b"MAIL FROM:<a@example.com>\r\nRCPT TO:<inner%d@example.com>\r\nDATA\r\n"
        b"Subject: inner\r\n\r\nx\r\n" % (end, number)
    )


def outer(number: int) -> bytes:
    """Return the forward-path of an attack's outer message."""
    return b"<outer%d@example.com>" % number


def names_of(recipients: Sequence[str], kind: str) -> set[str]:
    """Return the false ends that mail to `outer` or `inner` recipients stands for."""
    names = list(ALL_ENDS)
    found = (re.match(rf"{kind}(\d+)@", recipient) for recipient in recipients)
    return {names[int(match[1])] for match in found if match}


class TestPostfix:
    """A server that is in use and does take some of the false ends."""

    pytestmark = needs_postfix

    @pytest.mark.parametrize("name", ["no", "excluded"])
    def test_it_can_be_fooled(self, name: str, lenient: LenientPostfix) -> None:
        """Without anything in between; so the following tests are not idle."""
        for number, end in enumerate(ALL_ENDS.values()):
            client = RawClient(("127.0.0.1", lenient.servers[name]))
            client.start(recipients=[outer(number)])
            assert client.message(attack(end, number)).startswith(b"250 ")
            client.send(b"QUIT\r\n")
            client.rest()
            client.close()
        got = lenient.recipients()
        assert names_of(got, "outer") == set(ALL_ENDS)
        assert names_of(got, "inner") == TAKEN_BY_POSTFIX

    @requires("proxsmtp", C_PROGRAM)
    def test_the_original_lets_it_through(
        self, lenient: LenientPostfix, proxsmtpd: StartDaemon
    ) -> None:
        """The attack is real: a second message that the filter has not seen."""
        settings = {
            "OutAddress": f"127.0.0.1:{lenient.servers['excluded']}",
            "FilterCommand": "sed '1i X-Filter: seen\\r'",
        }
        daemon = proxsmtpd(settings, program=[C_PROGRAM], level=1)
        client = daemon.connect()
        client.start(recipients=[outer(0)])
        assert client.message(attack(b"\n.\n", 0)).startswith(b"250 ")
        lenient.postfix.wait_idle()
        mails = {mail.recipient: mail for mail in lenient.postfix.wait_mails(2)}
        lenient.postfix.clear()
        assert mails["outer0@example.com"].header("X-Filter") == "seen"
        assert mails["inner0@example.com"].header("X-Filter") is None

    @pytest.mark.parametrize(
        ("mode", "name"),
        [("no filter", "no"), ("pipe", "no"), ("file", "no"), ("pipe", "excluded")],
    )
    def test_client_smuggles(
        self, mode: str, name: str, lenient: LenientPostfix, proxsmtpd: StartDaemon
    ) -> None:
        server = {"OutAddress": f"127.0.0.1:{lenient.servers[name]}"}
        client = proxsmtpd({**MODES[mode], **server}, level=3).connect()
        client.start()
        for number, end in enumerate(ALL_ENDS.values()):
            client.command(b"RSET")
            client.envelope(recipients=[outer(number)])
            assert client.message(attack(end, number)).startswith(b"250 ")
        client.quit()
        self.check_none_but_outer(lenient)

    @pytest.mark.parametrize("mode", WRITERS)
    def test_filter_smuggles(
        self, mode: str, lenient: LenientPostfix, proxsmtpd: StartDaemon, tmp_path: Path
    ) -> None:
        for number, end in enumerate(ALL_ENDS.values()):
            (tmp_path / str(number)).write_bytes(attack(end, number))
        command = f'{WRITERS[mode]}; cat {tmp_path}/"${{SENDER%@*}}"'
        settings = {
            "OutAddress": f"127.0.0.1:{lenient.servers['no']}",
            "FilterType": mode,
            "FilterCommand": command,
        }
        client = proxsmtpd(settings, level=3).connect()
        client.start()
        for number in range(len(ALL_ENDS)):
            client.command(b"RSET")
            client.envelope(b"<%d@example.com>" % number, [outer(number)])
            assert client.message(b"x\r\n").startswith(b"250 ")
        client.quit()
        self.check_none_but_outer(lenient)

    def check_none_but_outer(self, lenient: LenientPostfix) -> None:
        got = lenient.recipients()
        assert names_of(got, "inner") == set()
        assert names_of(got, "outer") == set(ALL_ENDS)
        assert len(got) == len(ALL_ENDS)


# --- Commands, however they are spelt ---


def readings(line: bytes) -> set[str]:
    """Return the verbs, in upper case, that a server may read in a line of any octets.

    It may drop control characters, what is not ASCII, or the high bit; know UTF-8 and
    the plain and capital forms of its letters; end lines at a bare CR, LF or NUL.
    """
    pieces = [*re.split(rb"[\r\n\0]+", line), re.sub(rb"[\r\n\0]+", b"", line)]
    return {first_word(text) for piece in pieces for text in decodings(piece)}


def decodings(octets: bytes) -> set[str]:
    """Return the octets in the encodings that a server might assume."""
    return {
        bytes(octet & 0x7F for octet in octets).decode("ascii"),
        octets.decode("ascii", "ignore"),
        octets.decode("latin-1"),
        octets.decode("utf-8", "ignore"),
    }


def first_word(text: str) -> str:
    """Return the letters of the first word in plain capitals."""
    capitals = unicodedata.normalize("NFKC", text.lower()).upper()
    plain = unicodedata.normalize("NFD", capitals)
    return re.split(r"[^A-Z]", re.sub(r"[^\t-\r -~]", "", plain).strip())[0]


def is_taken_for(word: str, verb: str) -> bool:
    """Return whether a server may take a word for a verb: four letters do, and three of
    which it knows what they abbreviate."""
    return word[:4] == verb[:4] or (len(word) >= 3 and verb.startswith(word))


class Taken(NamedTuple):
    """A message that the credulous server took."""

    sender: bytes
    recipients: tuple[bytes, ...]
    data: bytes


class CredulousServer(socketserver.ThreadingTCPServer):
    """An SMTP server that takes a line for any command that it resembles."""

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), CredulousDialogue)
        self.messages: list[Taken] = []
        self.verbs: list[str] = []  # what the lines were taken for
        self.address = f"127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def forget(self) -> None:
        """Forget what was taken until now."""
        self.messages.clear()
        self.verbs.clear()


class CredulousDialogue(socketserver.BaseRequestHandler):
    """One connection of it.

    proxsmtpd sends one command at a time, so all that is here at once is a command.
    """

    server: CredulousServer
    REPLIES: Mapping[str, bytes] = {
        "BDAT": b"250 Taken\r\n",
        "BURL": b"250 Taken\r\n",
        "XCLIENT": b"220 Taken\r\n",
        "MAIL": b"250 Ok\r\n",
        "RCPT": b"250 Ok\r\n",
        "DATA": b"354 Go\r\n",
        "AUTH": b"334 Go\r\n",
        "EHLO": b"250 sink.example\r\n",
        "NOOP": b"250 Ok\r\n",
        "RSET": b"250 Ok\r\n",
        "QUIT": b"221 Bye\r\n",
    }

    def handle(self) -> None:
        """Answer every line until the connection ends."""
        self.sender = b""
        self.recipients: list[bytes] = []
        with contextlib.suppress(ConnectionError):
            self.request.sendall(b"220 sink.example\r\n")
            while line := self.read_until(rb"\n$"):
                self.obey(line)

    def read_until(self, pattern: bytes) -> bytes:
        """Return all octets until they end like this; empty if the connection ends."""
        octets = bytearray()
        while not re.search(pattern, octets):
            block = self.request.recv(65536)
            if not block:
                return b""
            octets += block
        return bytes(octets)

    def obey(self, line: bytes) -> None:
        """Do the worst that a line may mean, in any of the pieces it may have."""
        words = readings(line)
        for verb, reply in self.REPLIES.items():
            if any(is_taken_for(word, verb) for word in words):
                self.server.verbs.append(verb)
                self.note(verb, line)
                self.request.sendall(reply)
                if verb == "DATA":
                    self.take_message()
                elif verb == "AUTH":
                    self.read_until(rb"\n$")
                    self.request.sendall(b"235 Welcome\r\n")
                return
        self.request.sendall(b"500 What?\r\n")

    def note(self, verb: str, line: bytes) -> None:
        """Keep the envelope."""
        path = line.rpartition(b"<")[2].partition(b">")[0]
        if verb in ("MAIL", "EHLO", "RSET"):
            self.sender, self.recipients = path, []
        elif verb == "RCPT":
            self.recipients.append(path)

    def take_message(self) -> None:
        """Take mail data up to anything that may be its end."""
        data = self.read_until(rb"(^|[\r\n])\.\r?\n$")
        if data:
            taken = Taken(self.sender, tuple(self.recipients), data)
            self.server.messages.append(taken)
            self.request.sendall(b"250 Taken\r\n")


@pytest.fixture
def worst() -> Iterator[CredulousServer]:
    """Provide a server that takes a line for any command that it resembles."""
    with CredulousServer() as server:
        yield server
        server.shutdown()


BLANKS = {"SP": b" ", "HT": b"\t", "VT": b"\v", "FF": b"\f"}
ENDS = {"NUL": b"\0", "CR": b"\r", "LF": b"\n"}
# Every other octet has its test with the parser; these are one of each kind.
ODD_OCTETS = {
    **BLANKS,
    **ENDS,
    "ESC": b"\x1b",
    "DEL": b"\x7f",
    "NEL": b"\x85",
    "NBSP in UTF-8": b"\xc2\xa0",
    "line separator": b"\xe2\x80\xa8",
    "byte order mark": b"\xef\xbb\xbf",
}
# Letters that become ASCII ones when a program folds case or width.
LETTERS = {
    "long s": ("s", "\u017f"),
    "dotless i": ("i", "\u0131"),
    "dotted I": ("i", "\u0130"),
    "Kelvin-like wide a": ("a", "\uff41"),
    "wide x": ("x", "\uff38"),
    "circled r": ("r", "\u24e1"),
    "bold b": ("b", "\U0001d401"),
}


def spellings(verb: bytes, argument: bytes) -> dict[str, bytes]:
    """Return the spellings of a command that a server may take for it, without CRLF."""
    rest = b" " + argument if argument else b""
    found = {
        "plain": verb + rest,
        "lower case": verb.lower() + rest,
        "mixed case": verb.title() + rest,
        "no blank": verb + argument,
        "argument": verb + rest + b" x",
        "extra letter": verb + b"X" + rest,
        "colon": verb + b":" + rest,
        "equals sign": verb + b"=" + argument,
        "four letters": verb[:4] + rest,
        "four letters and another": verb[:4] + b"Q" + rest,
        "three letters": verb[:3] + rest,
        "every high bit": bytes(octet | 0x80 for octet in verb) + rest,
        "one high bit": verb[:-1] + bytes([verb[-1] | 0x80]) + rest,
    }
    for name, octet in ODD_OCTETS.items():
        found[f"{name} before"] = octet + verb + rest
        if name not in BLANKS:
            found[f"{name} within"] = verb[:2] + octet + verb[2:] + rest
        found[f"{name} after"] = verb + octet + argument
        if name in ENDS:
            found[f"{name} at the end"] = verb + rest + octet
    for name, (letter, like) in LETTERS.items():
        if letter in verb.decode().lower():
            word = verb.decode().lower().replace(letter, like).encode()
            found[name] = word + rest
    return {**found, **hidden(verb + rest)}


def hidden(line: bytes) -> dict[str, bytes]:
    """Put commands after something else, which a server may cut off."""
    limit = program.COMMAND_LIMIT
    return {
        "after a CR": b"NOOP\r" + line,
        "after an LF": b"NOOP\n" + line,
        "after LF CR": b"NOOP\n\r" + line,
        "after a NUL": b"NOOP\0" + line,
        "after CR NUL": b"NOOP\r\0" + line,
        "over-long with LF": b"NOOP " + b"x" * limit + b"\n" + line,
        "over-long with CR": b"NOOP " + b"x" * limit + b"\r" + line,
        "over-long blanks": b" " * limit + line,
    }


def next_reply(client: RawClient) -> bytes:
    """Return the next reply, or nothing if the connection has ended."""
    return b"" if client.at_end() else client.reply()


def say(client: RawClient, *lines: bytes) -> bytes:
    """Send lines one by one as long as the connection lasts; the last reply."""
    reply = b""
    for line in lines:
        with contextlib.suppress(ConnectionError):
            client.send(line + CRLF)
        reply = next_reply(client)
    return reply


def say_rest(client: RawClient, octets: bytes) -> None:
    """Send all of it, also to a closed connection, and wait for the end."""
    with contextlib.suppress(ConnectionError):
        client.send(octets + b"QUIT\r\n")
    client.rest()


RAW = b"raw message\r\n.\r\n"
MAIL, RCPT = b"MAIL FROM:<a@example.com>", b"RCPT TO:<b@example.com>"


def use_data(client: RawClient, line: bytes) -> None:
    """DATA in some spelling, and the message, whatever the reply was."""
    say(client, MAIL, RCPT, line)
    say_rest(client, RAW)


def use_data_at_once(client: RawClient, line: bytes) -> None:
    """The same by a client that waits for nothing."""
    lines = [MAIL, RCPT, line, RAW]
    say_rest(client, CRLF.join(lines))


def use_mail(client: RawClient, line: bytes) -> None:
    """Send MAIL in some spelling after a plain one, then a message."""
    say(client, MAIL, line, RCPT, b"DATA")
    say_rest(client, RAW)


def use_rcpt(client: RawClient, line: bytes) -> None:
    """Send RCPT in some spelling after a plain one, then a message."""
    say(client, MAIL, RCPT, line, b"DATA")
    say_rest(client, RAW)


def use_other(client: RawClient, line: bytes) -> None:
    """Send a command within a mail transaction, then what it may have announced."""
    say(client, MAIL, RCPT, line)
    say_rest(client, b"raw message\r\nRSET\r\n")


Use = Callable[[RawClient, bytes], None]
USES: Mapping[str, tuple[bytes, bytes, Use]] = {
    "DATA": (b"DATA", b"", use_data),
    "DATA at once": (b"DATA", b"", use_data_at_once),
    "MAIL": (b"MAIL", b"FROM:<raw@example.com>", use_mail),
    "RCPT": (b"RCPT", b"TO:<raw@example.com>", use_rcpt),
    "BDAT": (b"BDAT", b"13 LAST", use_other),
    "BURL": (b"BURL", b"imap://raw.example/1 LAST", use_other),
    "XCLIENT": (b"XCLIENT", b"ADDR=192.0.2.66", use_other),
}
# The filter writes its envelope above what it has read of the message's one line.
READ = 'read -r line < "${EMAIL:-/dev/stdin}"; '
TELL = r"""printf '%s\r\n' "$SENDER" "$RECIPIENTS"; printf '%s\n' "seen${line#raw}" """
FILTERS = {
    "pipe": READ + TELL,
    "file": READ + 'exec > "$EMAIL"; ' + TELL,
    "reject": "cat",
}


def got_past(taken: Taken) -> bool:
    """Return whether a message differs from the filter's input, or its envelope."""
    told = CRLF.join([taken.sender, *taken.recipients, b""])
    return taken.data != told + b"seen message\r\n.\r\n"


def wrongs(server: CredulousServer, filter_type: str) -> list[object]:
    """Return the messages and commands that the server must not get."""
    if filter_type == "reject":
        forbidden = {"MAIL", "RCPT", "BDAT", "BURL", "XCLIENT"}
    else:
        forbidden = {"BDAT", "BURL", "XCLIENT"}
    wrong: list[object] = [verb for verb in server.verbs if verb in forbidden]
    return wrong + [taken for taken in server.messages if got_past(taken)]


@pytest.mark.parametrize("filter_type", FILTERS)
def test_spellings(
    filter_type: str,
    worst: CredulousServer,
    proxsmtpd: StartDaemon,
    filter_script: MakeFilter,
) -> None:
    """No spelling brings a message, or a command that is refused, past the filter."""
    settings = {
        "OutAddress": worst.address,
        "FilterType": filter_type,
        "FilterCommand": filter_script(FILTERS[filter_type]),
    }
    daemon = proxsmtpd(settings, level=3)
    wrong = {}
    for use, (verb, argument, act) in USES.items():
        for name, line in spellings(verb, argument).items():
            worst.forget()
            with RawClient(daemon.address) as client:
                client.reply()
                act(client, line)
            if found := wrongs(worst, filter_type):
                wrong[f"{use}, {name} ({line[:40]!r})"] = found
    assert not wrong, listed(wrong)


@pytest.mark.parametrize("use", USES)
def test_the_criterion_of_readings(use: str) -> None:
    """The credulous server takes all spellings for the command."""
    verb, argument, _ = USES[use]
    strange = [
        name
        for name, line in spellings(verb, argument).items()
        if not any(is_taken_for(word, verb.decode()) for word in readings(line))
    ]
    assert strange == []


def test_the_criterion_of_messages(
    worst: CredulousServer, proxsmtpd: StartDaemon, filter_script: MakeFilter
) -> None:
    """The criterion of `test_spellings` holds for a message with plain commands."""
    command = filter_script(FILTERS["pipe"])
    settings = {"OutAddress": worst.address, "FilterCommand": command}
    client = proxsmtpd(settings).connect()
    client.reply()
    say(client, MAIL, RCPT, b"RCPT TO:<c@example.com>", b"DATA")
    say_rest(client, RAW)
    (taken,) = worst.messages
    assert taken.recipients == (b"b@example.com", b"c@example.com")
    assert not got_past(taken)


LIMIT = program.COMMAND_LIMIT
TAILS = {
    "after the limit": [b"x" * LIMIT, MAIL + CRLF],
    "right after it": [b"x" * (LIMIT + 1), MAIL + CRLF],
    "right before it": [b"x" * (LIMIT - 1), MAIL + CRLF],
    "after blanks": [b" " * LIMIT, MAIL + CRLF],
    "after a CR": [b"x" * LIMIT + b"\r", MAIL + CRLF],
    "after two CR": [b"x" * LIMIT + b"\r", b"\r" + MAIL + CRLF],
    "after a CR and a NUL": [b"x" * LIMIT + b"\r", b"\0\n" + MAIL + CRLF],
    "after an LF": [b"x" * LIMIT + b"\n" + MAIL, CRLF],
    "after many pieces": [b"x" * 5000] * 20 + [MAIL + CRLF],
    "line end in two pieces": [b"x" * LIMIT + MAIL + b"\r", b"\n"],
}


@in_clear_and_in_tls
def test_tails_of_overlong_lines(
    server: ScriptedServer, proxsmtpd: StartDaemon, tmp_path: Path
) -> None:
    """Wherever the network cuts it, it is one line, with one answer."""
    client = proxsmtpd({"Listen": tmp_path / "s"}).connect()
    client.reply()
    wrong = {}
    for name, parts in TAILS.items():
        for part in parts:
            client.send(part)
            wait_taken(client)
        client.send(b"NOOP\r\n")
        received = client.reply() + client.reply()
        if received != b"500 Line too long\r\n250 2.0.0 Ok\r\n":
            wrong[name] = received
    assert not wrong, listed(wrong)
    assert server.connections[0].lines == [b"NOOP"] * len(TAILS)


# --- AUTH ---


def test_spellings_of_auth(worst: CredulousServer, proxsmtpd: StartDaemon) -> None:
    """No secret gets into the log, however AUTH is spelt."""
    daemon = proxsmtpd({"OutAddress": worst.address})
    for number, line in enumerate(spellings(b"AUTH", b"LOGIN").values()):
        with RawClient(daemon.address) as client:
            client.reply()
            first = b"FIRST%03d" % number
            if say(client, line + b" " + first).startswith(b"334"):
                say(client, b"SECOND%03d" % number)
            say_rest(client, b"")
    assert "AUTH" in worst.verbs
    assert daemon.stop() == 0
    assert re.findall(r".*(?:FIRST|SECOND)\d+.*", daemon.log()) == []


ANSWERS = [
    b"DATA",
    b"BDAT 12 LAST",
    b"BURL imap://x LAST",
    b"MAIL FROM:<raw@example.com>",
    b"RCPT TO:<raw@example.com>",
    b"XCLIENT ADDR=192.0.2.66",
    b"EHLO raw.example",
    b"AUTH PLAIN AGpvZQBzZXNhbWU=",
    b"STARTTLS",
    b"QUIT",
    b"RSET",
    b" DATA\t",
    b"D\xc1T\xc1",
    b"",
]


@in_clear_and_in_tls
@pytest.mark.parametrize("filter_type", FILTERS)
def test_answers_that_spell_verbs(
    filter_type: str, make_server: MakeServer, proxsmtpd: StartDaemon
) -> None:
    """They are answers: they go to the server as they are, and mean nothing to us."""
    challenges = [b"334 more\r\n"] * (len(ANSWERS) - 1)
    script = {"AUTH": b"334 more\r\n", "334": [*challenges, b"535 no\r\n"]}
    server = make_server(script)
    settings = {"FilterType": filter_type, "FilterCommand": "cat"}
    client = proxsmtpd(settings, server=server).connect()
    client.reply()
    client.expect(EHLO, b"250")
    client.expect(b"AUTH LOGIN", b"334")
    for answer in ANSWERS[:-1]:
        assert client.command(answer) == b"334 more\r\n"
    assert client.command(ANSWERS[-1]) == b"535 no\r\n"
    assert server.connections[0].lines == [EHLO, b"AUTH LOGIN", *ANSWERS]
    # None of them has made an envelope, and now they are commands again.
    refusal = b"530" if filter_type == "reject" else b"503"
    client.expect(b"DATA", refusal)
    client.expect(b"XCLIENT ADDR=192.0.2.66", b"554")
    client.expect(b"BDAT 12 LAST", b"502")
    assert client.eof()


BAD_ANSWERS = {
    "LF": b"abc\nDATA",
    "CR": b"abc\rDATA",
    "NUL": b"abc\0DATA",
    "CR NUL": b"abc\r\0DATA",
    "over-long": b"x" * program.AUTH_LIMIT + b"DATA",
    "over-long with LF": b"x" * program.AUTH_LIMIT + b"\nDATA",
}


@in_clear_and_in_tls
@pytest.mark.parametrize("reply", [b"501 Cancelled\r\n", b"235 Welcome\r\n"])
def test_refused_answers(
    reply: bytes, make_server: MakeServer, proxsmtpd: StartDaemon
) -> None:
    """Nothing of them reaches the server, and nobody is authenticated by them."""
    server = make_server({"AUTH": b"334 go\r\n", "334": reply})
    settings = {"Skip": "authenticated", "FilterCommand": "tr a-z A-Z"}
    daemon = proxsmtpd(settings, server=server)
    for number, answer in enumerate(BAD_ANSWERS.values()):
        client = daemon.connect()
        client.reply()
        client.expect(EHLO, b"250")
        client.expect(b"AUTH LOGIN", b"334")
        client.expect(answer, b"500")
        client.envelope()
        assert client.message(b"raw\r\n") == QUEUED
        assert server.wait_message(number + 1).data == b"RAW\r\n", answer
        assert server.connections[number].lines[1:4] == [b"AUTH LOGIN", b"*", MAIL]
        client.quit()


# --- What is refused, while its mail data is on its way ---


class RefusedData(NamedTuple):
    """DATA that is refused: what the server says, and the client's lines up to it."""

    script: Mapping[str, Reply]
    lines: Sequence[bytes]


REFUSED: Reply = b"452 4.3.1 full\r\n"
BY_US = {
    "no MAIL": RefusedData({}, [b"DATA"]),
    "no RCPT": RefusedData({}, [MAIL, b"DATA"]),
    "MAIL refused": RefusedData(
        {"MAIL": REFUSED, "RCPT": REFUSED}, [MAIL, RCPT, b"DATA"]
    ),
    "RCPT refused": RefusedData({"RCPT": REFUSED}, [MAIL, RCPT, b"DATA"]),
    "after RSET": RefusedData({}, [MAIL, RCPT, b"RSET", b"DATA"]),
    "argument": RefusedData({}, [MAIL, RCPT, b"DATA 5"]),
    "extra letter": RefusedData({}, [MAIL, RCPT, b"DATAX"]),
}
BY_SERVER = {
    "later": RefusedData({"DATA": REFUSED}, [MAIL, RCPT, b"DATA"]),
    "for good": RefusedData({"DATA": b"554-no\r\n554 no\r\n"}, [MAIL, RCPT, b"DATA"]),
}
REJECTED = {"all of it": RefusedData({}, [MAIL, RCPT, b"DATA"])}
REFUSED_DATA: Mapping[str, Mapping[str, RefusedData]] = {
    "no filter": {**BY_US, **BY_SERVER},
    "Skip": BY_SERVER,
    "pipe": BY_US,
    "reject": REJECTED,
}
MORE = {
    "a message": b"raw\r\n.\r\n",
    "commands": SMUGGLED + b"raw\r\n.\r\n",
    "the end": b".\r\n",
    "half a line": b"MAIL",
    "a megabyte": (b"raw" * 300 + CRLF) * 1150 + b".\r\n",
}


@in_clear_and_in_tls
@pytest.mark.parametrize("mode", REFUSED_DATA)
def test_refused_data_with_more(
    mode: str, server: ScriptedServer, proxsmtpd: StartDaemon
) -> None:
    """It is not read as commands: 554, and the end of both connections."""
    daemon = proxsmtpd(ALL_MODES[mode], level=3)
    usual = dict(server.script)
    wrong = {}
    for name, case in REFUSED_DATA[mode].items():
        server.script.update({**usual, **case.script})
        for what, more in MORE.items():
            with daemon.connect() as client:
                authenticated(client)
                known = [EHLO, b"AUTH PLAIN c2VzYW1l", *case.lines]
                for line in case.lines[:-1]:
                    client.command(line)
                received = all_replies(client, case.lines[-1] + CRLF + more)
            connection = server.connections[-1]
            server.wait_for(lambda seen=connection: seen.closed)  # type: ignore[misc]
            beyond = [line for line in connection.lines if line not in known]
            if not re.fullmatch(rb"554 [ -~]+\r\n", received) or beyond:
                wrong[f"{name}, {what}"] = received, beyond
    assert not wrong, listed(wrong)


def all_replies(client: RawClient, octets: bytes) -> bytes:
    """Send all of this without waiting for replies; returns all to the end.

    No thread sends while another one reads: OpenSSL does not allow that.
    """
    client.sock.setblocking(False)
    rest, received = memoryview(octets), b""
    would_block = BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError
    while True:
        wants = select.select(
            [client.sock], [client.sock] if rest else [], [], PATIENCE
        )
        assert any(wants), f"no end after {received!r}"
        try:
            with contextlib.suppress(*would_block):
                rest = rest[client.sock.send(rest) :] if rest else rest
        except OSError:
            rest = rest[:0]  # The daemon reads no more, and has said why.
        try:
            with contextlib.suppress(*would_block):
                block = client.sock.recv(65536)
                if not block:
                    return received
                received += block
        except ConnectionResetError:
            return received


@in_clear_and_in_tls
@pytest.mark.parametrize("mode", ["no filter", "Skip"])
def test_more_comes_while_the_server_thinks(
    mode: str, make_server: MakeServer, proxsmtpd: StartDaemon, tmp_path: Path
) -> None:
    """Data that comes before the refusal is mail data too."""
    go = threading.Event()

    def think(_connection: Recorded, _line: bytes) -> Action:
        assert go.wait(PATIENCE)
        return b"452 4.3.1 full\r\n"

    server = make_server({"DATA": think})
    settings = {**MODES[mode], "Listen": tmp_path / "s"}
    client = proxsmtpd(settings, server=server).connect()
    authenticated(client)
    client.envelope()
    client.send(b"DATA\r\n")
    server.wait_line(b"DATA")
    client.send(SMUGGLED)
    go.set()
    assert re.fullmatch(rb"554 [ -~]+\r\n", client.rest())
    assert server.connections[0].lines.count(MAIL) == 1
    assert SMUGGLED.splitlines()[0] not in server.connections[0].lines


@in_clear_and_in_tls
@pytest.mark.parametrize("mode", ALL_MODES)
def test_payload_of_bdat(
    mode: str, server: ScriptedServer, proxsmtpd: StartDaemon
) -> None:
    """The client gets the refusal, though a megabyte of its data is not read."""
    daemon = proxsmtpd(ALL_MODES[mode], level=3)
    payload = SMUGGLED + b"raw message\r\n" * 80_000
    for line in (b"BDAT 999999", b"\tbdat 9 LAST", b"BDATX 9", b"BDAT"):
        client = daemon.connect()
        authenticated(client)
        client.command(MAIL)
        client.command(RCPT)
        received = all_replies(client, line + CRLF + payload)
        assert received == b"502 Command not implemented\r\n", line
        connection = server.connections[-1]
        server.wait_for(lambda seen=connection: seen.closed)  # type: ignore[misc]
        assert b"raw" not in connection.received, line
        assert b"smuggled" not in connection.received, line


# --- What the server says ---

CHALLENGE = b"334 VXNlcm5hbWU6\r\n"
SERVER_SCRIPT: Mapping[str, Reply] = {"AUTH": CHALLENGE, "XCLIENT": b"220 sink\r\n"}
# A dialogue in which the server gets to speak everywhere: what the client says, and
# the verb that the server answers to it.
DIALOGUE = (
    ("GREETING", b""),
    ("EHLO", EHLO),
    ("XCLIENT", b""),
    ("AUTH", b"AUTH LOGIN"),
    ("334", b"c2VzYW1l"),
    ("NOOP", b"NOOP"),
    ("XFORWARD", b"XFORWARD ADDR=192.0.2.1"),
    ("MAIL", MAIL),
    ("RCPT", RCPT),
    ("DATA", b"DATA"),
    ("DOT", b"raw\r\n."),
    ("RSET", b"RSET"),
    ("QUIT", b"QUIT"),
)
VERBS = [verb for verb, _ in DIALOGUE]
SPOKEN = [(verb, line) for verb, line in DIALOGUE if line]
LONG_LINE = b"250-" + b"x" * 506 + CRLF
NO_REPLIES = {
    "code 000": b"000 Ok\r\n",
    "code 199": b"199 Ok\r\n",
    "code 600": b"600 Ok\r\n",
    "code 999": b"999 Ok\r\n",
    "letters": b"Ok, go ahead\r\n",
    "letters in the code": b"2s0 Ok\r\n",
    "digits of another script": "\u0662\u0665\u0660 Ok\r\n".encode(),
    "two digits": b"25 Ok\r\n",
    "four digits": b"2500 Ok\r\n",
    "sign": b"+250 Ok\r\n",
    "blank first": b" 250 Ok\r\n",
    "NUL first": b"\x00250 Ok\r\n",
    "escape sequence first": b"\x1b[2J250 Ok\r\n",
    "no code": b"\r\n",
    "no code with LF": b"\n",
    "other mark": b"250+Ok\r\n",
    "code lost": b"250-one\r\ntwo\r\n250 three\r\n",
    "a megabyte in a line": b"250 " + b"x" * MEGABYTE + CRLF,
    "a megabyte of lines": LONG_LINE * (MEGABYTE // 512) + b"250 x\r\n",
    "no end of lines": LONG_LINE * (MEGABYTE // 512),
    "no end of line": b"250 " + b"x" * MEGABYTE,
    "354": b"354 Go ahead\r\n",
    "354 in two lines": b"354-Go\r\n354 ahead\r\n",
}


def converse(daemon: Daemon) -> dict[str, bytes]:
    """Return the replies in the dialogue, by the verbs that they answer."""
    with daemon.connect(timeout=20) as client:
        replies = {"GREETING": next_reply(client)}
        for verb, line in SPOKEN:
            received = say(client, line)
            if not received:
                break
            replies[verb] = received
    return replies


class Faulty(NamedTuple):
    """A daemon, and a server that makes one fault in each dialogue."""

    daemon: Daemon
    server: ScriptedServer
    usual: Mapping[str, Reply]

    def dialogue(self, verb: str, reply: Reply) -> dict[str, bytes]:
        """Return the replies when `verb` is answered like this."""
        self.server.connections.clear()
        self.server.messages.clear()
        self.server.script.update({**self.usual, verb: reply})
        replies = converse(self.daemon)
        (connection,) = self.server.connections
        self.server.wait_for(lambda: connection.closed)
        return replies

    def went_on(self, verb: str) -> bytes:
        """Return all that the server has received after the line of `verb`."""
        lines = {**dict(DIALOGUE), "XCLIENT": b"XCLIENT ADDR=127.0.0.1"}
        received = self.server.connections[0].received
        if verb == "GREETING":
            return received
        return received.partition(lines[verb] + CRLF)[2]


@pytest.fixture(params=["no filter", "pipe"])
def faulty(
    request: pytest.FixtureRequest, make_server: MakeServer, proxsmtpd: StartDaemon
) -> Faulty:
    """Provide a daemon with and without a filter."""
    extensions = [b"XCLIENT ADDR", b"XFORWARD ADDR", b"AUTH LOGIN"]
    server = make_server(SERVER_SCRIPT, extensions=extensions)
    settings = {**MODES[request.param], "XClient": "on"}
    daemon = proxsmtpd(settings, server=server, level=3)
    return Faulty(daemon, server, dict(server.script))


@in_clear_and_in_tls
def test_dialogue_without_a_fault(faulty: Faulty) -> None:
    """The dialogue of the tests below does reach its end."""
    codes = [int(reply[:3]) for reply in faulty.dialogue("NONE", b"").values()]
    assert codes == [220, 250, 334, 235, 250, 250, 250, 250, 354, 250, 250, 221]
    assert len(faulty.server.messages) == 1


def test_bad_replies(faulty: Faulty) -> None:
    """Said in answer to anything, it ends the session: 421, and not a word more."""
    wrong = {}
    for (name, reply), verb in itertools.product(NO_REPLIES.items(), VERBS):
        if verb == "DATA" and name.startswith("354"):
            continue
        replies = faulty.dialogue(verb, reply)
        last = list(replies.values())[-1]
        asked = [each for each, reply in replies.items() if reply[:3] == b"354"]
        acknowledged = QUEUED in replies.values()
        more = faulty.went_on(verb)
        if (
            not last.startswith(b"421 ")
            or asked not in ([], ["DATA"])
            or acknowledged != (verb in ("RSET", "QUIT"))
            or more
        ):
            wrong[f"{name} to {verb}"] = last, asked, more
    assert not wrong, listed(wrong)


@in_clear_and_in_tls
def test_two_replies(faulty: Faulty) -> None:
    """The second one is the reply to nothing; the server gets no other command."""
    wrong = {}
    for verb in VERBS[:-1]:
        reply = faulty.usual[verb]
        assert isinstance(reply, bytes)
        replies = faulty.dialogue(verb, reply * 2)
        more = faulty.went_on(verb)
        if more:
            wrong[verb] = replies, more
        # What was said is still true, but only of what it was said to.
        acknowledged = QUEUED in replies.values()
        assert acknowledged == (verb in ("DOT", "RSET"))
    assert not wrong, listed(wrong)


@pytest.mark.parametrize("mode", ["no filter", "Skip"])
def test_acknowledged_too_early(
    mode: str, server: ScriptedServer, proxsmtpd: StartDaemon
) -> None:
    """A 250 from before the end of the data says nothing about the message."""
    client = proxsmtpd(MODES[mode]).connect()
    authenticated(client)
    client.envelope()
    client.expect(b"DATA", b"354")
    server.connections[0].send(QUEUED)
    client.send(b"x\r\n.\r\n")
    assert client.reply().startswith(b"421 ")
    assert client.eof()
    server.wait_for(lambda: server.connections[0].closed)
    assert server.messages == []


class Asked(NamedTuple):
    """A 354 to a command of our own: set-up, client's lines, and that command."""

    settings: Mapping[str, object]
    script: Mapping[str, Reply]
    lines: Sequence[bytes]
    command: bytes


GO: Reply = b"354 Go ahead\r\n"
MESSAGE = [MAIL, RCPT, b"DATA", b"x\r\n."]
ASKED = {
    "RSET": Asked({"FilterCommand": "exit 1"}, {"RSET": GO}, MESSAGE, b"RSET"),
    "RSET after DATA": Asked(
        {}, {"RSET": GO, "DATA": REFUSED}, [MAIL, RCPT, b"DATA"], b"RSET"
    ),
    "cancel": Asked({}, {"AUTH": CHALLENGE, "334": GO}, [b"AUTH LOGIN", b"a\0b"], b"*"),
    "keep-alive": Asked(
        {"KeepAlives": 1, "FilterCommand": "sleep 1.1; cat"},
        {"NOOP": GO},
        MESSAGE,
        b"NOOP",
    ),
}


@in_clear_and_in_tls
@pytest.mark.parametrize("name", ASKED)
def test_354_to_our_own_command(
    name: str, make_server: MakeServer, proxsmtpd: StartDaemon
) -> None:
    """The server waits for mail data; what the client says next must not be that."""
    case = ASKED[name]
    server = make_server(case.script)
    client = proxsmtpd(case.settings, server=server).connect()
    client.reply()
    say(client, EHLO, *case.lines)
    say_rest(client, b"raw message\r\n.\r\n")
    (connection,) = server.connections
    server.wait_for(lambda: connection.closed)
    assert connection.lines[-1] == case.command
    assert server.messages == []
