"""What goes out is one write, and goes at once: no stall by Nagle's algorithm.

The daemon's own sockets are looked at, by copies of its descriptors.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from helpers import Daemon, StartDaemon

PIDFD_GETFD = 438  # the number of pidfd_getfd(2), in all of Linux but Alpha's
# Offsets in struct tcp_info, from linux/tcp.h.
TOTAL_RETRANS, DATA_SEGS_OUT = 100, 156

MESSAGE = b"Subject: test\r\n\r\nHello\r\n"
QUEUED = b"250 2.0.0 Ok: queued\r\n"
MESSAGES = 5


def copy_of(pidfd: int, descriptor: int) -> int:
    """Copy another process's descriptor into this one."""
    libc = ctypes.CDLL(None, use_errno=True)
    copy = int(libc.syscall(PIDFD_GETFD, pidfd, descriptor, 0))
    if copy < 0:
        pytest.skip(f"pidfd_getfd: {os.strerror(ctypes.get_errno())}")
    return copy


def connections(daemon: Daemon) -> Iterator[socket.socket]:
    """Copies of the sockets that a daemon has connected to somebody."""
    pidfd = os.pidfd_open(daemon.process.pid)
    try:
        for entry in Path(f"/proc/{daemon.process.pid}/fd").iterdir():
            if os.readlink(entry).startswith("socket:"):
                sock = socket.socket(fileno=copy_of(pidfd, int(entry.name)))
                try:
                    sock.getpeername()
                except OSError:
                    sock.close()  # the listener
                else:
                    yield sock
    finally:
        os.close(pidfd)


def segments(sock: socket.socket) -> int:
    """The segments with data that it has sent, repeated ones not counted."""
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    if len(info) < DATA_SEGS_OUT + 4:
        pytest.skip("the system does not count segments")
    sent, again = (
        int(struct.unpack_from("I", info, offset)[0])
        for offset in (DATA_SEGS_OUT, TOTAL_RETRANS)
    )
    return sent - again


@pytest.mark.parametrize("command", ["cat", None], ids=["filtered", "streamed"])
def test_each_thing_is_one_segment_at_once(
    command: str | None, proxsmtpd: StartDaemon
) -> None:
    """A reply of many lines, a command, and a message's data with its end."""
    settings = {"FilterCommand": command} if command else {}
    daemon = proxsmtpd(settings, level=0)
    client = daemon.connect()
    assert client.message(MESSAGE) == QUEUED
    with ExitStack() as stack:
        socks = [stack.enter_context(closing(s)) for s in connections(daemon)]
        assert len(socks) == 2
        for sock in socks:
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        before = [segments(sock) for sock in socks]
        reply = client.expect(b"EHLO client.example", b"250-")
        assert reply.count(b"\r\n") > 1
        for _ in range(MESSAGES):
            client.envelope()
            client.expect(b"DATA", b"354")
            # At once, since what is streamed goes on as it comes.
            assert client.command(MESSAGE + b".") == QUEUED
        # EHLO; MAIL, RCPT, DATA and the data, or the replies to them.
        sent = [segments(sock) - count for sock, count in zip(socks, before)]
        assert sent == [1 + 4 * MESSAGES] * 2
