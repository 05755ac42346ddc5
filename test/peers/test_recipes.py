"""The filters of the manual's examples, each with the real program that it is for.

The programs are Debian's.  Each has a server of the tests' own, without the network,
that is started once for the module, and a configuration in a temporary directory.
"""

from __future__ import annotations

import base64
import os
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers import StartDaemon, is_listening, port_of, requires, reserve_port
from recipes import ACCOUNT, Kitchen, own, public_directory, running
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


# --- ClamAV ---

CLAMD, CLAMDSCAN = "/usr/sbin/clamd", "/usr/bin/clamdscan"
CLAMD_CONF = "/etc/clamav/clamd.conf"
QUARANTINE = "/var/spool/quarantine"
VIRUS = b"proxsmtpd's harmless test virus"
INFECTED = MESSAGE.replace(b"noon?", b"noon? " + VIRUS)
ATTACHED = b"""\
Subject: Look at this\r
MIME-Version: 1.0\r
Content-Type: multipart/mixed; boundary="b"\r
\r
--b\r
Content-Type: application/octet-stream; name="a.bin"\r
Content-Transfer-Encoding: base64\r
\r
%s\r
--b--\r
""" % base64.b64encode(b"\0" + VIRUS)


def clamd_configuration(directory: Path) -> Path:
    """A configuration of clamd that has everything in a directory."""
    config = directory / "clamd.conf"
    text = f"""\
        LocalSocket {directory}/socket
        LocalSocketMode 666
        DatabaseDirectory {directory}
        TemporaryDirectory {directory}
        Foreground true
        """
    if os.geteuid() == 0:
        text += f"User {ACCOUNT}\n"
    config.write_text(textwrap.dedent(text))
    return config


@pytest.fixture(scope="module")
def clamd(place: Path) -> Iterator[Path]:
    """The configuration file of a running clamd that knows one virus."""
    directory = place / "clamd"
    directory.mkdir()
    own(directory)
    config = clamd_configuration(directory)
    (directory / "own.ndb").write_text(f"Test.Harmless:0:*:{VIRUS.hex()}\n")

    def ready() -> bool:
        return is_listening(f"{directory}/socket")

    with running([CLAMD, "-c", config], ready, place / "clamd.log", 30):
        yield config


def quarantine(kitchen: Kitchen) -> Path:
    """A directory for what filters keep."""
    directory = kitchen.place / "quarantine"
    directory.mkdir(0o700)
    own(directory)
    return directory


@requires("clamd", CLAMD)
@requires("clamdscan", CLAMDSCAN)
def test_clamav_refuses(kitchen: Kitchen, clamd: Path) -> None:
    daemon = kitchen("ClamAV", "$EMAIL", {CLAMD_CONF: clamd}, FilterType="file")
    assert kitchen.passed(daemon, MESSAGE, HOSTILE) == MESSAGE
    refusal = "550 5.7.1 This message contains Test.Harmless.UNOFFICIAL"
    assert kitchen.reply(daemon, INFECTED) == refusal
    assert kitchen.reply(daemon, ATTACHED) == refusal


@requires("clamd", CLAMD)
@requires("clamdscan", CLAMDSCAN)
def test_clamav_puts_aside_and_drops(kitchen: Kitchen, clamd: Path) -> None:
    directory = quarantine(kitchen)
    changes = {CLAMD_CONF: clamd, QUARANTINE: directory}
    daemon = kitchen("ClamAV", QUARANTINE, changes)
    assert kitchen.passed(daemon, MESSAGE, HOSTILE) == MESSAGE
    assert list(directory.iterdir()) == []
    recipients = [b"<b@example.net>", b'<"c d"@example.net>']
    assert kitchen.reply(daemon, ATTACHED, HOSTILE, recipients) == "250 2.0.0 Ok"
    assert len(kitchen.server.messages) == 1
    (copy,) = directory.iterdir()
    assert copy.suffix == ".eml"
    assert copy.stat().st_mode & 0o777 == 0o600
    envelope = [b"X-Found: Test.Harmless.UNOFFICIAL FOUND", b"X-Sender: %s" % HOSTILE]
    envelope += [b"X-Recipient: %s" % recipient for recipient in recipients]
    lines = [line.replace(b"<", b"").replace(b">", b"") + b"\n" for line in envelope]
    assert copy.read_bytes() == b"".join(lines) + ATTACHED


@requires("clamd", CLAMD)
@requires("clamdscan", CLAMDSCAN)
def test_clamav_cannot_put_aside(kitchen: Kitchen, clamd: Path) -> None:
    """So the message stays with the client."""
    changes = {CLAMD_CONF: clamd, QUARANTINE: "/nowhere"}
    daemon = kitchen("ClamAV", QUARANTINE, changes)
    assert kitchen.reply(daemon, INFECTED) == LOCAL_ERROR


@requires("clamdscan", CLAMDSCAN)
@pytest.mark.parametrize(("words", "kind"), [("$EMAIL", "file"), (QUARANTINE, "pipe")])
def test_clamav_is_away(words: str, kind: str, kitchen: Kitchen) -> None:
    config = clamd_configuration(kitchen.place)
    daemon = kitchen("ClamAV", words, {CLAMD_CONF: config}, FilterType=kind)
    reply = "451 4.3.0 The virus scanner is not available"
    assert kitchen.reply(daemon, MESSAGE) == reply
