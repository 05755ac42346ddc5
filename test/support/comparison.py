"""One dialogue with two programs: the C original and ours.

Each program stands between the same client and the same scripted server, with the
same configuration.  What the client receives, what the server receives and what the log
says is written down as lines, so that two accounts can be compared line by line.
"""

from __future__ import annotations

import re
import shutil
import socket
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from helpers import (
    NETWORK,
    Daemon,
    Settings,
    poll,
    port_of,
    reserve_port,
    settings_text,
    write_config,
)
from smtp import EXTENSIONS, ScriptedServer

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from smtp import Reply


# The addresses of the programs and of their servers.
HOST, SERVER_HOST = f"{NETWORK}.251.1", f"{NETWORK}.251.2"

# Seconds that a program may wait for a peer (its TimeOut), and after which a client
# that still gets nothing gives up.  The first must end what the original lets hang.
TIME_OUT = 3
SILENCE = 8.0

SIDES = ("client", "server", "log")

# What differs from run to run, and the name that stands for it in an account.
TIME = r"\d\d:\d\d:\d\d"
VARIABLE = (
    (r"^(proxsmtpd: )[0-9A-F]{6}: ", r"\1ID: "),
    (re.escape(f"{NETWORK}."), "127.1."),
    (r"\b(127\.[\d.]+):\d+", r"\1:PORT"),
    (r"(XCLIENT .* PORT=)\d+", r"\1N"),
    (r"PLACE/temp/[\w.-]+", "PLACE/temp/NAME"),
    (r"\(pid \d+\)", "(pid N)"),
    (rf"\w{{3}} \w{{3}} [\d ]\d {TIME} \d{{4}} [+-]\d{{4}} \(\w+\)", "CTIME"),
    (rf"\w{{3}}, \d\d? \w{{3}} \d{{4}} {TIME} [+-]\d{{4}}", "RFC5322-DATE"),
)


@dataclass(frozen=True)
class Dialogue:
    """A client's lines, with the settings, the server and the filter.

    Each of `turns` is sent with a CRLF after it, and then one reply is awaited; for
    None nothing is sent.  The greeting is awaited before the first.  `script`,
    `greeting` and `extensions` are the server's, as ScriptedServer has them;
    `program` is the text of a shell script that becomes the FilterCommand; with an
    empty one there is none.
    """

    name: str
    turns: Sequence[bytes | None]
    program: str = "cat"
    settings: Settings = field(default_factory=dict)
    script: Mapping[str, Reply] = field(default_factory=dict)
    greeting: bytes = b"220 sink.example\r\n"
    extensions: Sequence[bytes] = EXTENSIONS


@dataclass(frozen=True)
class Account:
    """One program's part in a dialogue, as lines; `faults` is how it misbehaved."""

    client: tuple[str, ...]
    server: tuple[str, ...]
    log: tuple[str, ...]
    faults: tuple[str, ...]


class Programs:
    """One program's daemons; with `is_shared`, one for all dialogues of its settings.

    Who shares one must see it idle between two dialogues, so that its log is whole; of
    the original that cannot be said.
    """

    def __init__(self, command: Sequence[str], *, is_shared: bool) -> None:
        self._command, self._is_shared = command, is_shared
        self._sites: dict[object, Site] = {}

    def run(self, dialogue: Dialogue) -> Account:
        """Have the dialogue with a daemon, new or idle."""
        key = settings_text(dialogue.settings), bool(dialogue.program)
        site = self._sites.pop(key, None) or Site(self._command, dialogue)
        account = site.run(dialogue, stays=self._is_shared)
        if not site.has_ended:
            self._sites[key] = site
        return account

    def finish(self) -> list[str]:
        """End all daemons; returns what was wrong with them."""
        return [fault for site in self._sites.values() for fault in site.finish()]


class Site:
    """A daemon, and the port of its servers, which come one after the other."""

    def __init__(self, command: Sequence[str], dialogue: Dialogue) -> None:
        self._place = Path(tempfile.mkdtemp(prefix="differential-"))
        self._holders = reserve_port(HOST), reserve_port(SERVER_HOST)
        ours, server = map(port_of, self._holders)
        (self._place / "temp").mkdir()
        defaults: dict[str, object] = {
            "Listen": f"{HOST}:{ours}",
            "OutAddress": f"{SERVER_HOST}:{server}",
            "TempDirectory": self._place / "temp",
            "TimeOut": TIME_OUT,
        }
        if dialogue.program:
            self._write_filter(dialogue)  # is looked for at the start
            defaults["FilterCommand"] = self._place / "filter"
        config = self._place / "proxsmtpd.conf"
        write_config(config, settings_text(dialogue.settings), **defaults)
        self._daemon = Daemon(
            [*command, "-d", "3", "-f", str(config)],
            config,
            str(defaults["Listen"]),
            self._place / "temp",
            {"PATH": "/usr/bin:/bin", "LC_ALL": "C"},
        )
        self._daemon.wait_listening()
        self._idle = self._daemon.resources()
        self._first_lines = self._daemon.log()
        self.has_ended = False

    def run(self, dialogue: Dialogue, *, stays: bool) -> Account:
        """Have the dialogue; end the daemon unless it `stays` and is idle again."""
        if dialogue.program:
            self._write_filter(dialogue)
        faults: list[str] = []
        with ScriptedServer(
            dialogue.script,
            greeting=dialogue.greeting,
            extensions=dialogue.extensions,
            host=SERVER_HOST,
            port=port_of(self._holders[1]),
        ) as server:
            self.has_ended = True  # if anything in here fails
            try:
                self._daemon.forget_log()
                received = converse(self._daemon.port, dialogue.turns)
                _wait_closed(server)
                self.has_ended = not stays or not poll(self._is_idle)
            finally:
                if self.has_ended:
                    faults = self.finish()
        if stays and self.has_ended:
            faults.append("it was not idle")
        log = self._first_lines + self._daemon.log()
        return Account(
            client=tuple(received),
            server=tuple(constant(server_lines(server), self._place)),
            log=tuple(constant(log_lines(log), self._place)),
            faults=tuple(faults),
        )

    def _write_filter(self, dialogue: Dialogue) -> None:
        path = self._place / "filter"
        path.write_text(f"#!/bin/sh\n{dialogue.program}\n")
        path.chmod(0o755)

    def _is_idle(self) -> bool:
        return self._daemon.resources() == self._idle

    def finish(self) -> list[str]:
        """End the daemon; returns what was wrong with it."""
        faults = self._daemon.finish()
        for holder in self._holders:
            holder.close()
        shutil.rmtree(self._place)
        return faults


def _wait_closed(server: ScriptedServer) -> None:
    """Wait until the program has ended its connections, or will not."""
    try:
        server.wait_for(lambda: all(c.closed for c in server.connections), SILENCE)
    except AssertionError:
        return  # server_lines() says so.


def connect(port: int) -> socket.socket:
    """Connect to a program, which must listen at last."""
    deadline = time.monotonic() + SILENCE
    while True:
        try:
            return socket.create_connection((HOST, port), SILENCE)
        except ConnectionRefusedError:
            # wait_listening() is content with the port of another address.
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def converse(port: int, turns: Sequence[bytes | None]) -> list[str]:
    """Say the turns to a port; give the lines that came back, and how it ended."""
    received: list[str] = []
    with connect(port) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        replies = sock.makefile("rb")
        try:
            read_reply(replies, received)
            for turn in turns:
                sock.sendall(b"" if turn is None else turn + b"\r\n")
                read_reply(replies, received)
        except (EOFError, ConnectionError):
            received.append("(end)")
        except socket.timeout:
            received.append("(silence)")
    return received


def read_reply(replies: BinaryIO, received: list[str]) -> None:
    """Add the lines of one reply to `received`; raises EOFError when there is none."""
    more = True
    while more:
        line = replies.readline()
        if not line:
            raise EOFError
        received += printable(line)
        more = bool(re.match(rb"\d{3}-", line))


def printable(data: bytes) -> list[str]:
    """Give the lines of octets as plain text, other octets as Python's escapes.

    The usual CRLF at a line's end is not shown, any other line end is.
    """
    lines = [line.removesuffix(b"\r\n") for line in re.findall(rb"[^\n]*\n|.+", data)]
    return [escape(line.decode("latin-1")) for line in lines]


def escape(text: str) -> str:
    """Give a text with Python's escapes for all that is not printable ASCII."""
    return text.encode("unicode_escape").decode("ascii")


def server_lines(server: ScriptedServer) -> list[str]:
    """Give the lines that the server got, all its connections one after another."""
    lines: list[str] = []
    for connection in server.connections:
        lines += printable(connection.received)
        lines.append("(end)" if connection.closed else "(left open)")
    return lines


def log_lines(log: str) -> list[str]:
    """Give the lines of a log as plain text.

    Whether the original finds a filter's input closed before it has written all is
    a matter of moments, so that line is left out.  So is the line that only ours has
    after each message (≠ C), which test_statistics.py is about.
    """
    lines = [escape(line) for line in log.split("\n")[:-1]]
    left_out = re.compile(
        r"filter command closed input early|proxsmtpd: \w{6}: (?:message-id=|size=)"
    )
    return [line for line in lines if not left_out.search(line)]


def constant(lines: Sequence[str], place: Path) -> list[str]:
    """Give the lines with a name for each thing that differs from run to run."""
    text = "\n".join(lines).replace(str(place), "PLACE")
    for pattern, name in VARIABLE:
        text = re.sub(pattern, name, text, flags=re.MULTILINE)
    return text.splitlines()
