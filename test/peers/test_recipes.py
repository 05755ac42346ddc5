"""The filters of the manual's examples, each with the real program that it is for.

The programs are Debian's.  Each has a server of the tests' own, without the network,
that is started once for the module, and a configuration in a temporary directory.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers import StartDaemon, is_listening, port_of, requires, reserve_port
from recipes import ACCOUNT, Kitchen, public_directory, running
from smtp import ScriptedServer

LOCAL_ERROR = "451 Local Error"
HOSTILE = b'<"$(touch x)`touch x`;-x\'"@example.com>'
MESSAGE = b"""\
Received: from client.example by mail.example; Thu, 26 Nov 2026 15:00:00 +0000\r
From: Ann <a@example.com>\r
To: b@example.net\r
Subject: Lunch\r
Date: Thu, 26 Nov 2026 15:00:00 +0000\r
Message-Id: <1234567890.lunch@example.com>\r
\r
Shall we meet at noon?\r
"""
GTUBE = b"XJS*C4JDBQADN1.NSBN3*2IDNEN*GTUBE-STANDARD-ANTI-UBE-TEST-EMAIL*C.34X"
SPAM = MESSAGE.replace(b"Shall we meet at noon?", GTUBE)


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """A directory for the servers of the module."""
    with public_directory() as path:
        yield path


@pytest.fixture
def kitchen(proxsmtpd: StartDaemon, server: ScriptedServer) -> Iterator[Kitchen]:
    with public_directory() as path:
        yield Kitchen(path, proxsmtpd, server)


def header(message: bytes) -> bytes:
    """A message's header section."""
    return message.partition(b"\r\n\r\n")[0]


# --- SpamAssassin ---

SPAMC, SPAMD = "/usr/bin/spamc", "/usr/sbin/spamd"
SPAMD_ADDRESS = "-d 127.0.0.1 -p 783"


@pytest.fixture(scope="module")
def spamd(place: Path) -> Iterator[str]:
    """The options for spamc that lead to a running spamd."""
    with reserve_port() as holder:
        port = port_of(holder)
        command = [SPAMD, "-L", "-x", "-m", 2, "--min-children=1", "-s", "stderr"]
        command += ["-i", f"127.0.0.1:{port}", "-r", place / "spamd.pid"]
        if os.geteuid() == 0:
            command += ["-u", ACCOUNT]
        log = place / "spamd.log"

        def ready() -> bool:
            return is_listening(f"127.0.0.1:{port}")

        with running(command, ready, log, 30):
            yield f"-d 127.0.0.1 -p {port}"


@requires("spamc", SPAMC)
@requires("spamd", SPAMD)
def test_spamassassin_tags(kitchen: Kitchen, spamd: str) -> None:
    """A field in the message that looks like one of its own does not stay."""
    daemon = kitchen("SpamAssassin", "FilterCommand", {SPAMD_ADDRESS: spamd})
    forged = b"X-Spam-Status: No, all is well\r\n" + MESSAGE
    ham = kitchen.passed(daemon, forged, HOSTILE)
    assert b"X-Spam-Status: No, score=" in ham
    assert b"all is well" not in ham
    assert ham.endswith(MESSAGE)
    assert b"X-Spam-Status: Yes, score=" in header(kitchen.passed(daemon, SPAM))


@requires("spamc", SPAMC)
@requires("spamd", SPAMD)
def test_spamassassin_refuses_above_a_score(kitchen: Kitchen, spamd: str) -> None:
    daemon = kitchen("SpamAssassin", "#!/bin/sh", {SPAMD_ADDRESS: spamd})
    assert kitchen.reply(daemon, SPAM) == "550 5.7.1 This message looks like spam"
    folded = SPAM.replace(b"Subject: ", b"Subject: x\r\n \r\n ")
    assert kitchen.reply(daemon, folded).startswith("550 5.7.1")
    ham = kitchen.passed(daemon, b"X-Spam-Level: " + b"*" * 20 + b"\r\n" + MESSAGE)
    assert b"X-Spam-Status: No, score=" in ham
    quoted = MESSAGE + b"X-Spam-Level: " + b"*" * 20 + b"\r\n"
    assert kitchen.passed(daemon, quoted).endswith(quoted)


@requires("spamc", SPAMC)
@pytest.mark.parametrize("words", ["FilterCommand", "#!/bin/sh"])
def test_spamassassin_is_away(words: str, kitchen: Kitchen) -> None:
    with reserve_port() as nobody:
        away = f"-d 127.0.0.1 -p {port_of(nobody)}"
        daemon = kitchen("SpamAssassin", words, {SPAMD_ADDRESS: away})
        assert kitchen.reply(daemon, MESSAGE) == LOCAL_ERROR
