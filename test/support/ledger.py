"""Messages that have a key, for tests that count what becomes of each of them."""

from __future__ import annotations

import contextlib
import re

from smtp import RawClient

ACCEPTED = b"250 2.0.0 K queued"


class Lost(Exception):
    """The connection has ended without a word."""


def message_data(key: bytes, plan: str, size: int) -> bytes:
    """A message as on the wire, with what the filter and the server go by."""
    head = b"X-Key: %s\r\nX-Plan: %s\r\n\r\n" % (key, plan.encode())
    line = b".." + key + b" was here\r\n"
    return head + line * (size // len(line) + 1)


def key_and_plan(data: bytes) -> tuple[bytes, str]:
    """What `message_data` was made with."""
    found = re.match(rb"X-Key: (\S+)\r\nX-Plan: (\S+)\r\n", data)
    assert found, data[:200]
    return found[1], found[2].decode()


def say(client: RawClient, octets: bytes) -> bytes:
    """Send something; returns the reply without its last CRLF."""
    # What was said before the connection broke is there to be read still.
    with contextlib.suppress(ConnectionError):
        client.send(octets)
    if client.at_end():
        raise Lost
    return client.reply()[:-2]
