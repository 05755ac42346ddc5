"""Peers and logs that keep the daemon waiting: none of them may hold a session.

Clients and servers that send an octet now and then, servers that leave meanwhile,
and a log that nobody reads.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers import (
    MEGABYTE,
    PATIENCE,
    QUEUED,
    Daemon,
    MakeServer,
    StartDaemon,
    is_listening,
    long_message,
    poll,
    port_of,
    program_under_test,
    reserve_port,
    write_config,
)
from proxsmtpd import DATA_GRACE, LOG_LINE_LIMIT
from smtp import Chunks, Delay, RawClient, Recorded, ScriptedServer
from tls import Certificates, hello_by_tls, server_context, starttls

GONE = b"421 Connection to server lost\r\n"


class Trickle:
    """Sends one octet at a time, between ``with`` and the end of its block.

    It stops when the connection breaks.
    """

    def __init__(self, client: RawClient, seconds: float) -> None:
        self._client, self._seconds = client, seconds
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Trickle:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            while not self._over.wait(self._seconds):
                self._client.send(b"x")


def in_data(daemon: Daemon) -> RawClient:
    """Return a client that may send its mail data."""
    client = daemon.connect()
    client.start()
    client.expect(b"DATA", b"354")
    return client


# --- A client that sends octet by octet ---


def test_server_leaves_during_half_a_command(
    proxsmtpd: StartDaemon, server: ScriptedServer
) -> None:
    client = proxsmtpd().connect()
    client.start()
    with Trickle(client, 0.03):
        server.connections[0].hang_up()
        assert client.reply() == GONE


def test_daemon_ends_during_half_a_command(proxsmtpd: StartDaemon) -> None:
    daemon = proxsmtpd()
    client = daemon.connect()
    client.start()
    with Trickle(client, 0.03):
        daemon.process.send_signal(signal.SIGTERM)
        assert client.reply() == b"421 Service shutting down\r\n"
    assert daemon.wait() == 0


@pytest.mark.parametrize("command", ["cat", ""], ids=["filtered", "streamed"])
@pytest.mark.parametrize("seconds", [0.03, 0.2])
def test_server_leaves_during_data(
    seconds: float, command: str, proxsmtpd: StartDaemon, server: ScriptedServer
) -> None:
    """The client is answered when TimeOut has passed, however slow its data is."""
    client = in_data(proxsmtpd({"FilterCommand": command, "TimeOut": 1}))
    with Trickle(client, seconds):
        server.connections[0].hang_up()
        assert client.reply() == GONE


@pytest.mark.parametrize("command", ["cat", ""], ids=["filtered", "streamed"])
def test_server_gives_its_reason_during_data(
    command: str, proxsmtpd: StartDaemon, server: ScriptedServer
) -> None:
    daemon = proxsmtpd({"FilterCommand": command})
    client = in_data(daemon)
    server.connections[0].send(b"421 4.3.2 Going down\r\n")
    daemon.wait_log("SERVER < 421 4.3.2 Going down")
    assert client.command(b"x\r\n.") == b"421 4.3.2 Going down\r\n"
    assert server.messages == []


# --- A server that does not read ---

TOO_MUCH = 24 * MEGABYTE  # for the buffers of a connection


def stops_reading(
    connection: Recorded, last_word: bytes = b"", *, shut_down: bool = False
) -> None:
    """Reply to DATA, read nothing more, and after a while say the last word."""
    connection.send(b"354 Go ahead\r\n")
    time.sleep(1)  # until the daemon cannot send any more
    connection.send(last_word)
    if shut_down:
        connection.sock.shutdown(socket.SHUT_WR)
    ended = select.poll()
    ended.register(connection.sock, select.POLLRDHUP)
    ended.poll(PATIENCE * 1000)


@pytest.mark.parametrize("is_encrypted", [False, True], ids=["clear", "tls"])
@pytest.mark.parametrize("command", ["cat", ""], ids=["filtered", "streamed"])
@pytest.mark.parametrize("shut_down", [False, True], ids=["stays", "shuts-down"])
def test_server_that_stops_reading_says_why(
    shut_down: bool,
    command: str,
    is_encrypted: bool,
    certificates: Certificates,
    make_server: MakeServer,
    proxsmtpd: StartDaemon,
) -> None:
    """Its reply is looked for while nothing can be sent, long before TimeOut."""
    script: dict[str, Any] = {
        "DATA": lambda connection, _line: stops_reading(
            connection, b"421 4.3.2 Disk full\r\n", shut_down=shut_down
        )
    }
    settings: dict[str, object] = {"FilterCommand": command}
    if is_encrypted:
        context = server_context(certificates.path("good"))
        script["EHLO"] = hello_by_tls([b"STARTTLS"], [])
        script["STARTTLS"] = starttls(context)
        settings["OutTls"] = "require"
    client = in_data(proxsmtpd(settings, server=make_server(script)))
    client.send(long_message(TOO_MUCH) + b".\r\n")
    assert client.reply() == b"421 4.3.2 Disk full\r\n"


@pytest.mark.parametrize("command", ["cat", ""], ids=["filtered", "streamed"])
def test_server_that_stops_reading_says_nothing(
    command: str, make_server: MakeServer, proxsmtpd: StartDaemon
) -> None:
    server = make_server({"DATA": lambda connection, _line: stops_reading(connection)})
    daemon = proxsmtpd({"FilterCommand": command, "TimeOut": 2}, server=server)
    client = in_data(daemon)
    client.send(long_message(TOO_MUCH) + b".\r\n")
    assert client.reply() == b"421 Server timed out\r\n"
    daemon.wait_log("SERVER: network write operation timed out")


def test_refused_message_that_never_ends(proxsmtpd: StartDaemon) -> None:
    """A message that is too large is read on, but not beyond TimeOut."""
    client = in_data(proxsmtpd({"MaxMessageSize": 1, "TimeOut": 1}))
    with Trickle(client, 0.03):
        assert client.reply() == b"552 Message too large\r\n"


def test_keep_alive_finds_the_server_gone(
    make_server: MakeServer, proxsmtpd: StartDaemon
) -> None:
    """The octets that came with the final dot meanwhile are not lost."""
    server = make_server({"NOOP": b"250 Ok\r\n"})
    daemon = proxsmtpd({"FilterCommand": "cat", "KeepAlives": 1}, server=server)
    client = in_data(daemon)
    client.send(b"x\r\n")
    server.wait_line(b"NOOP")
    server.connections[0].hang_up()
    started = time.monotonic()
    assert client.command(b".") == GONE
    assert time.monotonic() - started < 60  # TimeOut is 180


# --- A server that sends octet by octet ---


@pytest.mark.parametrize("verb", ["GREETING", "EHLO", "NOOP", "DOT"])
def test_reply_octet_by_octet(
    verb: str, make_server: MakeServer, proxsmtpd: StartDaemon
) -> None:
    """TimeOut is the time for a whole reply."""
    octets = [bytes([octet]) for octet in b"250 2.0.0 " + b"x" * 20 + b"\r\n"]
    script = {verb: Chunks(octets, 0.2)}
    settings = {"TimeOut": 2, "FilterCommand": "cat"}
    client = proxsmtpd(settings, server=make_server(script)).connect()
    client.send(b"EHLO x\r\nNOOP\r\nMAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\n")
    replies = [client.reply()]
    while replies[-1][:1] == b"2" and len(replies) < 5:
        replies.append(client.reply())
    if verb == "DOT":
        client.expect(b"DATA", b"354")
        replies.append(client.command(b"x\r\n."))
    assert replies[-1] == b"421 Server timed out\r\n"
    assert len(replies) == {"GREETING": 1, "EHLO": 2, "NOOP": 3, "DOT": 6}[verb]


# --- A log that nobody reads ---


class Unread:
    """A daemon whose standard error is a pipe that is full and not read."""

    def __init__(self, place: Path, server: ScriptedServer) -> None:
        self.place = place
        with reserve_port() as holder:
            self.address = f"127.0.0.1:{port_of(holder)}"
            config = place / "proxsmtpd.conf"
            write_config(
                config,
                "FilterCommand: cat\n",
                Listen=self.address,
                OutAddress=server.address,
                TempDirectory=place,
            )
            self.read_end, self.write_end = os.pipe()
            self.process = subprocess.Popen(
                [*program_under_test(), "-d", "4", "-f", str(config)],
                stderr=self.write_end,
            )
            assert poll(lambda: is_listening(self.address))

    def fill(self) -> None:
        """Fill the pipe, until there is no room for a line."""
        os.set_blocking(self.write_end, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(self.write_end, b"x" * select.PIPE_BUF)
        os.set_blocking(self.write_end, True)

    def drain(self) -> bytes:
        """Read what is in the pipe now."""
        os.set_blocking(self.read_end, False)
        octets = b""
        with contextlib.suppress(BlockingIOError):
            while block := os.read(self.read_end, 1 << 20):
                octets += block
        return octets

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.read_end)
        os.close(self.write_end)


@pytest.fixture
def unread(tmp_path: Path, server: ScriptedServer) -> Iterator[Unread]:
    daemon = Unread(tmp_path, server)
    yield daemon
    daemon.close()


def test_mail_with_a_log_that_nobody_reads(
    unread: Unread, server: ScriptedServer
) -> None:
    unread.fill()
    with RawClient(unread.address, 60) as client:
        assert client.message(b"x\r\n") == QUEUED
        client.quit()
    assert len(server.messages) == 1


def test_end_with_a_log_that_nobody_reads(unread: Unread) -> None:
    with RawClient(unread.address) as client:
        client.start()
        unread.fill()
        unread.process.send_signal(signal.SIGTERM)
        assert client.reply() == b"421 Service shutting down\r\n"
    assert unread.process.wait(PATIENCE) == 0


def test_second_signal_with_a_log_that_nobody_reads(unread: Unread) -> None:
    """It does not wait for the message that the first one lets finish."""
    with RawClient(unread.address) as client:
        client.start()
        client.expect(b"DATA", b"354")
        unread.fill()
        unread.process.send_signal(signal.SIGTERM)
        assert poll(lambda: not is_listening(unread.address))
        began = time.monotonic()
        unread.process.send_signal(signal.SIGTERM)
        assert unread.process.wait(PATIENCE) == 0
        assert time.monotonic() - began < DATA_GRACE


def test_log_that_is_read_again(unread: Unread) -> None:
    """It has the number of lines that are missing, and goes on."""
    unread.fill()
    with RawClient(unread.address) as client:
        client.reply()
        client.expect(b"NOOP first", b"250")
        unread.drain()
        client.expect(b"NOOP second", b"250")
        client.quit()
    text = b""

    def has_ended() -> bool:
        nonlocal text
        text += unread.drain()
        return b"221 2.0.0 Bye" in text

    assert poll(has_ended)
    assert re.search(rb"proxsmtpd: [1-9]\d* log lines lost: standard error", text)
    assert b"NOOP second" in text
    assert b"NOOP first" not in text


# --- Long lines ---


def test_long_lines_are_not_torn(proxsmtpd: StartDaemon) -> None:
    """A line of the log fits into a pipe at once, and says that it goes on."""
    daemon = proxsmtpd()
    client = daemon.connect()
    client.reply()
    client.command(b"NOOP " + b"\xff" * 2000)
    daemon.wait_log(r"SERVER < 250 2\.0\.0 Ok")
    text = daemon.log()
    assert max(map(len, text.splitlines())) <= select.PIPE_BUF
    parts = re.findall(r"(?:CLIENT < NOOP |: \.\.\. )((?:\\xff|[\\xf])+)$", text, re.M)
    assert sum(len(part) for part in parts[:3]) == 2000 * len(r"\xff")
    assert len(parts[0]) > LOG_LINE_LIMIT - 100


def test_accepted_message_is_logged_though_the_client_has_gone(
    make_server: MakeServer, proxsmtpd: StartDaemon
) -> None:
    """It has gone after the last look at it, before it could read the reply."""
    server = make_server({"DOT": Delay(1, b"250 2.0.0 Ok: queued\r\n")})
    daemon = proxsmtpd({"FilterCommand": "cat"}, server=server)
    client = daemon.connect()
    client.start()
    client.expect(b"DATA", b"354")
    client.send(b"Hello\r\n.\r\n")
    daemon.wait_log(": sent email data$")
    client.reset()
    daemon.wait_log(r": client=127\.0\.0\.1, from=.*, status=FILTERED$")
    daemon.wait_log(r": size=7, filter=.*, reply=250 2\.0\.0 Ok: queued$")
    assert len(server.messages) == 1
