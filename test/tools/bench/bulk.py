"""A source and a sink of large messages that cost next to nothing themselves.

smtp-sink looks at each octet and is slower with 20 MB than the proxies that are to be
measured.  These two know just enough SMTP for that: one session, no refusals.

    bulk.py sink HOST PORT
    bulk.py source HOST PORT OCTETS MESSAGES

The source counts what was accepted on standard output, as `smtp-source -c` does.
"""

from __future__ import annotations

import socket
import sys
import threading

BLOCK = 1024 * 1024
LINE = b"X" * 78 + b"\r\n"  # as long as those of smtp-source
END = b"\r\n.\r\n"
ENVELOPE = (b"MAIL FROM:<sender@example.com>", b"RCPT TO:<recipient@example.com>")


class Dialogue:
    """One connection's lines and blocks."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connection = connection
        self._block = memoryview(bytearray(BLOCK))

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

    def send_message(self, message: bytes) -> None:
        """Send a message, with its end."""
        for command in ENVELOPE:
            self.say(command)
            self.expect(b"250")
        self.say(b"DATA")
        self.expect(b"354")
        self._connection.sendall(message)
        self.expect(b"250")

    def skip_message(self) -> None:
        """Read up to the end of a message."""
        end = b""
        while not end.endswith(END):
            count = self._connection.recv_into(self._block)
            if not count:
                return
            end = (end + self._block[max(0, count - len(END)) : count])[-len(END) :]


def serve(connection: socket.socket) -> None:
    """Accept all messages of one connection."""
    with connection:
        dialogue = Dialogue(connection)
        dialogue.say(b"220 bulk.example ESMTP")
        while True:
            verb = dialogue.line()[:4].upper()
            if verb == b"DATA":
                dialogue.say(b"354 go on")
                dialogue.skip_message()
            elif not verb:
                return
            dialogue.say(b"221 bye" if verb == b"QUIT" else b"250 fine")


def sink(host: str, port: int) -> None:
    """Serve for ever, each connection in a thread."""
    with socket.create_server((host, port), backlog=1024) as listener:
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=serve, args=(connection,), daemon=True).start()


def source(host: str, port: int, octets: int, count: int) -> None:
    """Send so many messages over one connection."""
    message = b"Subject: bulk\r\n\r\n" + LINE * (octets // len(LINE)) + END[2:]
    with socket.create_connection((host, port)) as connection:
        dialogue = Dialogue(connection)
        dialogue.expect(b"220")
        dialogue.say(b"EHLO client.example")
        dialogue.expect(b"250")
        for number in range(count):
            dialogue.send_message(message)
            print(number + 1, end="\r", flush=True)
        dialogue.say(b"QUIT")
        dialogue.expect(b"221")


if __name__ == "__main__":
    if sys.argv[1] == "sink":
        sink(sys.argv[2], int(sys.argv[3]))
    else:
        source(sys.argv[2], *map(int, sys.argv[3:6]))
