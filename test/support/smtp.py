"""The two SMTP peers that the tests put around proxsmtpd.

`ScriptedServer` answers each verb as its script says, misbehaves when told to and
records every octet; `RawClient` sends what it is given and reads whole replies.
Neither knows pytest, so that the demo and the benchmarks may use them too.  All
octets are bytes as on the wire, all times are seconds.
"""

from __future__ import annotations

import contextlib
import re
import socket
import struct
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Callable, Optional, Union

BLOCK = 1 << 18


# --- What a scripted server can do instead of, or besides, sending a reply ---


@dataclass(frozen=True)
class Close:
    """Send `last`, then end the connection with a FIN."""

    last: bytes = b""


@dataclass(frozen=True)
class Reset:
    """Send `last`, then end the connection with a RST."""

    last: bytes = b""


@dataclass(frozen=True)
class Stall:
    """Never answer again; go on recording until the peer gives up."""


@dataclass(frozen=True)
class Delay:
    """Send `reply` after so many seconds, reading nothing in between."""

    seconds: float
    reply: bytes


@dataclass(frozen=True)
class Chunks:
    """Send the pieces one by one, so many seconds apart."""

    pieces: Sequence[bytes]
    pause: float = 0.01


Action = Union[bytes, Close, Reset, Stall, Delay, Chunks]
Handler = Callable[["Recorded", bytes], Optional[Action]]
Reply = Union[Action, Sequence[Action], Handler]

REPLIES: Mapping[str, Reply] = {
    "HELO": b"250 sink.example\r\n",
    "MAIL": b"250 2.1.0 Ok\r\n",
    "RCPT": b"250 2.1.5 Ok\r\n",
    "DATA": b"354 End data with <CR><LF>.<CR><LF>\r\n",
    "DOT": b"250 2.0.0 Ok: queued\r\n",
    "RSET": b"250 2.0.0 Ok\r\n",
    "NOOP": b"250 2.0.0 Ok\r\n",
    "VRFY": b"252 2.0.0 Send some mail\r\n",
    "AUTH": b"235 2.7.0 Authentication successful\r\n",
    "334": b"235 2.7.0 Authentication successful\r\n",
    "XFORWARD": b"250 2.0.0 Ok\r\n",
    "XCLIENT": b"220 sink.example ESMTP\r\n",
    "QUIT": Close(b"221 2.0.0 Bye\r\n"),
}
UNKNOWN_VERB = b"502 5.5.2 Error: command not recognized\r\n"
EXTENSIONS = (
    b"PIPELINING",
    b"SIZE 104857600",
    b"8BITMIME",
    b"XFORWARD NAME ADDR PROTO HELO SOURCE",
)

# The first group is the line end that still belongs to the mail data.
END_OF_DATA = {
    "strict": rb"(\r\n)\.\r\n",
    "lenient": rb"(\r\n?|\n)\.(?:\r\n?|\n)",
}


class _Ended(Exception):
    """The peer has ended the connection."""


def multiline(code: bytes, lines: Sequence[bytes]) -> bytes:
    """Return a reply of several lines: `250-first`, ..., `250 last`, with CRLFs."""
    marks = [b"-"] * (len(lines) - 1) + [b" "]
    return b"".join(code + mark + line + b"\r\n" for mark, line in zip(marks, lines))


def reset(sock: socket.socket) -> None:
    """End a connection with a RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def hang_up(sock: socket.socket) -> None:
    """End a connection with a FIN, and wake the thread that reads from it, if any.

    That thread closes the socket.  If another did, the descriptor might be somebody
    else's before the thread has noticed: `ssl` reads an octet of what is no connection.
    """
    with contextlib.suppress(OSError):  # The peer may have been faster.
        socket.socket.shutdown(sock, socket.SHUT_RDWR)  # leaves an SSLSocket usable


# --- The server ---


@dataclass(eq=False)
class Recorded:
    """One connection to the scripted server, while it lives and afterwards."""

    sock: socket.socket
    peer: object
    log: bytearray = field(default_factory=bytearray)
    lines: list[bytes] = field(default_factory=list)
    closed: bool = False
    end: str | None = None  # How the peer ended it: "fin", "rst", or not at all.

    @property
    def received(self) -> bytes:
        """Return every octet that came."""
        return bytes(self.log)

    def send(self, data: bytes) -> None:
        """Send something that no command asked for."""
        self.sock.sendall(data)

    def hang_up(self) -> None:
        """End the connection from our side with a FIN."""
        hang_up(self.sock)


@dataclass(frozen=True)
class Message:
    """A message that the server accepted; `data` is stuffed, as on the wire."""

    sender: bytes
    recipients: tuple[bytes, ...]
    data: bytes
    connection: Recorded


def _listen(host: str, port: int) -> tuple[socket.socket, str]:
    """Return a listening socket, and its address as proxsmtpd's settings have it."""
    if host.startswith("/"):
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(host)
        listener.listen(1024)
        return listener, host
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, port), family=family, backlog=1024)
    port = listener.getsockname()[1]
    return listener, f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class ScriptedServer:
    """An SMTP server that follows a script, with a thread for each connection.

    `script` maps a verb to its reply; "GREETING", "DOT" (the end of the mail data)
    and "334" (the client's answer to a 334) count as verbs.  A reply is bytes sent
    as they are, one of the actions above, a sequence of these (used in turn over
    all connections; the last one repeats), or a function of connection and line.
    `host` may be the path of a unix socket.
    `end_of_data` is "strict", "lenient" or a pattern whose first group ends the data.
    """

    def __init__(
        self,
        script: Mapping[str, Reply] | None = None,
        *,
        greeting: bytes = b"220 sink.example ESMTP\r\n",
        extensions: Sequence[bytes] = EXTENSIONS,
        host: str = "127.0.0.1",
        port: int = 0,
        end_of_data: str | bytes = "strict",
    ) -> None:
        ehlo = multiline(b"250", [b"sink.example", *extensions])
        self.script: dict[str, Reply] = {
            **REPLIES,
            "GREETING": greeting,
            "EHLO": ehlo,
            **(script or {}),
        }
        if isinstance(end_of_data, str):
            end_of_data = END_OF_DATA[end_of_data]
        self.end_of_data = re.compile(end_of_data)
        self.connections: list[Recorded] = []
        self.messages: list[Message] = []
        self._turns: dict[str, int] = {}
        self._changed = threading.Condition()
        self._stopped = threading.Event()
        self._threads: list[threading.Thread] = []
        self._listener, self.address = _listen(host, port)
        self.port = 0 if host.startswith("/") else self._listener.getsockname()[1]
        self._start(self._accept)

    def __enter__(self) -> ScriptedServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def wait_for(self, condition: Callable[[], bool], timeout: float = 10) -> None:
        """Return once `condition` holds; it is looked at after every event."""
        with self._changed:
            if not self._changed.wait_for(condition, timeout):
                state = [(c.lines, c.closed, c.end) for c in self.connections]
                raise AssertionError(f"not within {timeout} s; the server saw {state}")

    def wait_message(self, count: int = 1, timeout: float = 10) -> Message:
        """Return the `count`th accepted message."""
        self.wait_for(lambda: len(self.messages) >= count, timeout)
        return self.messages[count - 1]

    def wait_connection(self, count: int = 1, timeout: float = 10) -> Recorded:
        """Return the `count`th accepted connection."""
        self.wait_for(lambda: len(self.connections) >= count, timeout)
        return self.connections[count - 1]

    def wait_line(self, start: bytes, timeout: float = 10) -> Recorded:
        """Return the first connection with a command line that begins like this."""
        found: list[Recorded] = []

        def seen() -> bool:
            found[:] = [
                c for c in self.connections if any(x.startswith(start) for x in c.lines)
            ]
            return bool(found)

        self.wait_for(seen, timeout)
        return found[0]

    def close(self) -> None:
        """Stop listening and end all connections and threads."""
        self._stopped.set()
        hang_up(self._listener)
        with self._changed:
            connections = list(self.connections)
        for connection in connections:
            hang_up(connection.sock)
        for thread in self._threads:
            thread.join(10)
        self._listener.close()

    def _start(self, target: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._stopped.is_set():
            try:
                sock, peer = self._listener.accept()
            except OSError:
                return
            if sock.family != socket.AF_UNIX:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection = Recorded(sock, peer)
            with self._changed:
                self.connections.append(connection)
                self._changed.notify_all()
            self._start(_Dialogue(self, connection).run)

    def _act(self, verb: str, connection: Recorded, line: bytes) -> Action | None:
        """Return the script's action for this line."""
        reply = self.script.get(verb, UNKNOWN_VERB)
        if callable(reply):
            return reply(connection, line)
        if isinstance(reply, (list, tuple)):
            with self._changed:
                turn = self._turns.get(verb, 0)
                self._turns[verb] = turn + 1
            action: Action = reply[min(turn, len(reply) - 1)]
            return action
        return reply  # type: ignore[return-value]

    def _note(self, change: Callable[[], object]) -> None:
        """Change what is recorded and wake whoever waits for it."""
        with self._changed:
            change()
            self._changed.notify_all()


class _Dialogue:
    """The server's side of one connection."""

    def __init__(self, server: ScriptedServer, connection: Recorded) -> None:
        self._server = server
        self._connection = connection
        self._buffer = bytearray()
        self._sender = b""
        self._recipients: list[bytes] = []

    def run(self) -> None:
        end = None
        try:
            self._converse()
        except _Ended:
            end = "fin"
        except ConnectionError:
            end = "rst"
        except (OSError, ValueError):
            pass  # The test has closed this socket itself; ValueError: in TLS.
        finally:
            self._connection.sock.close()
            self._server._note(lambda: self._ended(end))

    def _ended(self, end: str | None) -> None:
        self._connection.closed = True
        self._connection.end = end

    def _converse(self) -> None:
        code = self._answer("GREETING", b"")
        while True:
            line = self._line()
            verb = line.strip().split(b" ", 1)[0].upper().decode("latin-1")
            if code == b"334":
                verb = "334"
            code = self._answer(verb, line)
            self._remember(verb, line, code)
            if verb == "DATA" and code == b"354":
                code = self._data()

    def _answer(self, verb: str, line: bytes, message: Message | None = None) -> bytes:
        """Do what the script says and return the reply's code.

        A message that it accepts is recorded.
        """
        action = self._server._act(verb, self._connection, line)
        if isinstance(action, bytes):
            return self._send([action], message)
        if isinstance(action, Delay):
            self._server._stopped.wait(action.seconds)
            return self._send([action.reply], message)
        if isinstance(action, Chunks):
            return self._send(action.pieces, message, action.pause)
        if isinstance(action, Stall):
            self._drain()
        if isinstance(action, (Close, Reset)):
            self._leave(action)
        return b""

    def _send(
        self, pieces: Sequence[bytes], message: Message | None, pause: float = 0
    ) -> bytes:
        code = b"".join(pieces)[:3]
        if message is None or code[:1] != b"2":
            self._send_pieces(pieces, pause)
            return code
        # Before it is said, since the client may look at once.
        messages = self._server.messages
        self._server._note(lambda: messages.append(message))
        try:
            self._send_pieces(pieces, pause)
        except OSError:
            self._server._note(lambda: messages.remove(message))
            raise
        return code

    def _send_pieces(self, pieces: Sequence[bytes], pause: float) -> None:
        for piece in pieces:
            self._connection.sock.sendall(piece)
            if pause:
                self._server._stopped.wait(pause)

    def _drain(self) -> None:
        while True:
            self._more()

    def _leave(self, action: Close | Reset) -> None:
        sock = self._connection.sock
        if action.last:
            sock.sendall(action.last)
        if isinstance(action, Reset):
            reset(sock)
        else:
            # Half of the close first: a FIN with octets unread would become a RST.
            sock.shutdown(socket.SHUT_WR)
        self._drain()

    def _remember(self, verb: str, line: bytes, code: bytes) -> None:
        """Keep the envelope."""
        if verb in ("MAIL", "HELO", "EHLO", "RSET", "XCLIENT"):
            self._sender, self._recipients = b"", []
        if code[:1] == b"2" and verb in ("MAIL", "RCPT"):
            path = line.partition(b":")[2].strip()
            found = re.match(rb'<(?:"(?:\\.|[^"\\])*"|[^">])*>', path)
            path = found.group() if found else path
            if verb == "MAIL":
                self._sender = path
            else:
                self._recipients.append(path)

    def _more(self) -> None:
        """Read once more."""
        data = self._connection.sock.recv(BLOCK)
        if not data:
            raise _Ended
        self._buffer += data
        self._server._note(lambda: self._connection.log.extend(data))

    def _line(self) -> bytes:
        """Return the next command line, without its CRLF."""
        start = 0
        while (end := self._buffer.find(b"\r\n", start)) < 0:
            start = max(0, len(self._buffer) - 1)
            self._more()
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 2]
        self._server._note(lambda: self._connection.lines.append(line))
        return line

    def _data(self) -> bytes:
        """Read mail data, answer its end, and keep it if that was a 2xx."""
        self._buffer[:0] = b"\r\n"  # So that a dot in the first line is found too.
        start = 0
        while not (found := self._server.end_of_data.search(self._buffer, start)):
            start = max(0, len(self._buffer) - 5)
            self._more()
        data = bytes(self._buffer[2 : found.end(1)])
        del self._buffer[: found.end()]
        message = Message(self._sender, tuple(self._recipients), data, self._connection)
        self._sender, self._recipients = b"", []
        return self._answer("DOT", message.data, message)


# --- The client ---


def parse_address(address: str) -> tuple[str, int] | str:
    """`127.0.0.1:PORT`, `[::1]:PORT` or `/path` in the form that connect takes."""
    if address.startswith("/"):
        return address
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def _connect(
    where: str | tuple[str, int], timeout: float, source: tuple[str, int] | None
) -> socket.socket:
    """Return a connection to the address, from the source address if one is given."""
    address: Any = where
    family = socket.AF_UNIX
    if not isinstance(where, str):
        (family, *_, address), *_ = socket.getaddrinfo(*where, type=socket.SOCK_STREAM)
    sock = socket.socket(family)
    try:
        sock.settimeout(timeout)
        if source is not None:
            # Else its port could not be listened on for a minute after the end.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(source)
        sock.connect(address)
        if family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except OSError:
        sock.close()
        raise
    return sock


class RawClient:
    """A client that sends any octets; every read is whole or an AssertionError."""

    def __init__(
        self,
        address: str | tuple[str, int],
        timeout: float = 10.0,
        source: tuple[str, int] | None = None,
    ) -> None:
        where = parse_address(address) if isinstance(address, str) else address
        self.timeout = timeout
        self.started = False
        self._buffer = bytearray()
        self.sock = _connect(where, timeout, source)

    def __enter__(self) -> RawClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def send(self, data: bytes) -> None:
        """Send these octets."""
        self.sock.sendall(data)

    def reply(self) -> bytes:
        """Return one whole reply, all its lines, with their CRLFs."""
        lines = [self.line()]
        while lines[-1][3:4] == b"-":
            lines.append(self.line())
        reply = b"".join(lines)
        assert re.fullmatch(rb"(\d{3}([- ][^\r\n]*)?\r\n)+", reply), reply
        return reply

    def line(self) -> bytes:
        """Return one line of a reply, with its line end."""
        start = 0
        while (end := self._buffer.find(b"\n", start)) < 0:
            start = len(self._buffer)
            try:
                self._more()
            except socket.timeout:
                raise self._missing(f"silence for {self.timeout} s") from None
            except EOFError:
                raise self._missing("end of the connection") from None
            except ConnectionResetError:
                raise self._missing("reset of the connection") from None
        line = bytes(self._buffer[: end + 1])
        del self._buffer[: end + 1]
        return line

    def at_end(self) -> bool:
        """Wait for the next octet, or the end; whether it was the end."""
        try:
            while not self._buffer:
                self._more()
        except (EOFError, ConnectionResetError):
            return True
        return False

    def command(self, line: bytes) -> bytes:
        """Send a line (without its CRLF) and return the reply."""
        self.send(line + b"\r\n")
        return self.reply()

    def expect(self, line: bytes, code: bytes) -> bytes:
        """Like `command`, but the reply must begin with `code`."""
        reply = self.command(line)
        assert reply.startswith(code), (line, reply)
        return reply

    def start(
        self,
        sender: bytes = b"<a@example.com>",
        recipients: Sequence[bytes] = (b"<b@example.com>",),
        helo: bytes = b"EHLO client.example",
    ) -> None:
        """Go from the greeting to the last RCPT; every reply must be a success."""
        greeting = self.reply()
        assert greeting.startswith(b"220"), greeting
        self.expect(helo, b"250")
        self.envelope(sender, recipients)

    def envelope(
        self,
        sender: bytes = b"<a@example.com>",
        recipients: Sequence[bytes] = (b"<b@example.com>",),
    ) -> None:
        """MAIL and all RCPTs of one mail transaction, all accepted."""
        self.expect(b"MAIL FROM:" + sender, b"250")
        for recipient in recipients:
            self.expect(b"RCPT TO:" + recipient, b"25")
        self.started = True

    def message(
        self,
        data: bytes,
        sender: bytes = b"<a@example.com>",
        recipients: Sequence[bytes] = (b"<b@example.com>",),
        helo: bytes = b"EHLO client.example",
    ) -> bytes:
        """Send a whole message and return the reply to its end.

        `data` goes out as it is (the caller stuffs dots); the envelope is made
        first unless `start` or `envelope` has just done so.
        """
        if not self.started:
            self.start(sender, recipients, helo)
        self.expect(b"DATA", b"354")
        self.started = False
        self.send(data + (b"" if not data or data.endswith(b"\r\n") else b"\r\n"))
        return self.command(b".")

    def eof(self) -> bool:
        """Return whether the connection ends within the time out; no octet may come."""
        try:
            rest = bytes(self._buffer) + self.sock.recv(BLOCK)
        except ConnectionResetError:
            rest = bytes(self._buffer)
        except socket.timeout:
            return False
        assert not rest, rest
        return True

    def rest(self) -> bytes:
        """Return all octets until the connection ends."""
        deadline = time.monotonic() + self.timeout
        while time.monotonic() < deadline:
            try:
                self._more()
            except (EOFError, ConnectionResetError):
                return bytes(self._buffer)
        raise AssertionError(f"no end after {bytes(self._buffer)!r}")

    def half_close(self) -> None:
        """Send a FIN, but go on reading, in TLS as well."""
        socket.socket.shutdown(self.sock, socket.SHUT_WR)

    def quit(self) -> bytes:
        """QUIT, and the end of the connection; returns QUIT's reply."""
        reply = self.expect(b"QUIT", b"221")
        assert self.eof(), "the connection stayed open after QUIT"
        self.close()
        return reply

    def close(self) -> None:
        """End the connection with a FIN."""
        self.sock.close()

    def reset(self) -> None:
        """End the connection with a RST."""
        reset(self.sock)

    def _more(self) -> None:
        data = self.sock.recv(BLOCK)
        if not data:
            raise EOFError
        self._buffer += data

    def _missing(self, what: str) -> AssertionError:
        return AssertionError(f"{what} instead of a reply; had {bytes(self._buffer)!r}")
