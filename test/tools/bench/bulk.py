"""A source and a sink of large messages that cost next to nothing themselves.

smtp-sink looks at each octet and is slower with 20 MB than the proxies that are to be
measured.  These two know just enough SMTP for that: one session, no refusals.

    bulk.py sink HOST PORT [CERTIFICATE KEY]
    bulk.py source HOST PORT OCTETS MESSAGES

The source counts what was accepted on standard output, as `smtp-source -c` does.  With
a certificate, the sink has STARTTLS.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
from typing import TYPE_CHECKING, Optional

if TYPE_CHECKING:
    import ssl

BLOCK = 1024 * 1024
LINE = b"X" * 78 + b"\r\n"  # as long as those of smtp-source
END = b"\r\n.\r\n"
ENVELOPE = (b"MAIL FROM:<sender@example.com>", b"RCPT TO:<recipient@example.com>")


class Dialogue:
    """One connection's lines and blocks."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connection = connection

    def line(self) -> bytes:
        """The next line; empty at the end.  Nobody sends two without an answer."""
        line = b""
        while not line.endswith(b"\n"):
            octets = self._connection.recv(4096)
            if not octets:
                return b""
            line += octets
        return line

    def say(self, line: bytes) -> None:
        """Send a line."""
        self._connection.sendall(line + b"\r\n")

    def expect(self, code: bytes) -> None:
        """Read a reply, of one line or several; exits if it is another."""
        reply = self.line()
        while reply.rpartition(b"\r\n")[0].rpartition(b"\n")[2][3:4] == b"-":
            reply += self.line()
        if not reply.startswith(code):
            sys.exit(f"bulk: {reply.decode('ascii', 'replace').strip()}")

    def ask(self, line: bytes, code: bytes) -> None:
        """Send a command and read its reply."""
        self.say(line)
        self.expect(code)

    def send_message(self, message: bytes) -> None:
        """Send a message, with its end."""
        for command in ENVELOPE:
            self.ask(command, b"250")
        self.ask(b"DATA", b"354")
        self._connection.sendall(message)
        self.expect(b"250")

    def skip_message(self) -> None:
        """Read up to the end of a message."""
        end, block = b"", memoryview(bytearray(BLOCK))
        while not end.endswith(END):
            count = self._connection.recv_into(block)
            if not count:
                return
            end = (end + block[max(0, count - len(END)) : count])[-len(END) :]


def serve(connection: socket.socket, context: Optional[ssl.SSLContext]) -> None:
    """Accept all messages of one connection."""
    with contextlib.ExitStack() as stack:
        dialogue = Dialogue(stack.enter_context(connection))
        dialogue.say(b"220 bulk.example ESMTP")
        while True:
            verb = dialogue.line()[:4].upper()
            if verb == b"DATA":
                dialogue.say(b"354 go on")
                dialogue.skip_message()
            elif verb == b"STAR" and context:
                dialogue.say(b"220 go on")
                encrypted = context.wrap_socket(connection, server_side=True)
                dialogue = Dialogue(stack.enter_context(encrypted))
                continue
            elif not verb:
                return
            if verb == b"EHLO" and context:
                dialogue.say(b"250-bulk.example\r\n250 STARTTLS")
            else:
                dialogue.say(b"221 bye" if verb == b"QUIT" else b"250 fine")


def sink(host: str, port: int, *certificate: str) -> None:
    """Serve for ever, each connection in a thread."""
    context = None
    if certificate:
        import ssl

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*certificate)
    with socket.create_server((host, port), backlog=1024) as listener:
        while True:
            connection, _ = listener.accept()
            threading.Thread(
                target=serve, args=(connection, context), daemon=True
            ).start()


def message_of(octets: int) -> bytes:
    """Return a message, with its end."""
    return b"Subject: bulk\r\n\r\n" + LINE * (octets // len(LINE)) + END[2:]


def source(host: str, port: int, octets: int, count: int) -> None:
    """Send so many messages over one connection."""
    message = message_of(octets)
    with socket.create_connection((host, port)) as connection:
        dialogue = Dialogue(connection)
        dialogue.expect(b"220")
        dialogue.ask(b"EHLO client.example", b"250")
        for number in range(count):
            dialogue.send_message(message)
            print(number + 1, end="\r", flush=True)
        dialogue.ask(b"QUIT", b"221")


if __name__ == "__main__":
    if sys.argv[1] == "sink":
        sink(sys.argv[2], int(sys.argv[3]), *sys.argv[4:])
    else:
        source(sys.argv[2], *map(int, sys.argv[3:6]))
