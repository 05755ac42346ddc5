"""The filters of the manual's examples, each with the real program that it is for.

The programs are Debian's.  Each has a server of the tests' own, without the network,
that is started once for the module, and a configuration in a temporary directory.
"""

from __future__ import annotations

import base64
import grp
import os
import pwd
import re
import smtplib
import subprocess
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from helpers import (
    MakeFilter,
    StartDaemon,
    is_listening,
    one_process,
    poll,
    port_of,
    requires,
    reserve_port,
)
from manual import read
from postfix import POSTFIX, PrivatePostfix, require_root, smtp, smtpd
from recipes import (
    ACCOUNT,
    RecipeRunner,
    own,
    public_directory,
    recipe,
    replaced,
    running,
)
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


pytestmark = one_process("recipes")


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """A directory for the servers of the module."""
    with public_directory() as path:
        yield path


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory for the daemons of a test."""
    with public_directory() as path:
        yield path


# The directory comes first, and so stays until the daemons' last check of it.
@pytest.fixture
def runner(
    directory: Path, proxsmtpd: StartDaemon, server: ScriptedServer
) -> RecipeRunner:
    return RecipeRunner(directory, proxsmtpd, server)


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
def test_spamassassin_tags(runner: RecipeRunner, spamd: str) -> None:
    """A field in the message that looks like one of its own does not stay."""
    daemon = runner.start("SpamAssassin", "FilterCommand", {SPAMD_ADDRESS: spamd})
    forged = b"X-Spam-Status: No, all is well\r\n" + MESSAGE
    ham = runner.passed(daemon, forged, HOSTILE)
    assert b"X-Spam-Status: No, score=" in ham
    assert b"all is well" not in ham
    assert ham.endswith(MESSAGE)
    assert b"X-Spam-Status: Yes, score=" in header(runner.passed(daemon, SPAM))


@requires("spamc", SPAMC)
@requires("spamd", SPAMD)
def test_spamassassin_refuses_above_a_score(runner: RecipeRunner, spamd: str) -> None:
    daemon = runner.start("SpamAssassin", "#!/usr/bin/python3", {SPAMD_ADDRESS: spamd})
    assert runner.reply(daemon, SPAM) == "550 5.7.1 This message looks like spam"
    folded = SPAM.replace(b"Subject: ", b"Subject: x\r\n \r\n ")
    assert runner.reply(daemon, folded).startswith("550 5.7.1")
    ham = runner.passed(daemon, b"X-Spam-Level: " + b"*" * 20 + b"\r\n" + MESSAGE)
    assert b"X-Spam-Status: No, score=" in ham
    quoted = MESSAGE + b"X-Spam-Level: " + b"*" * 20 + b"\r\n"
    assert runner.passed(daemon, quoted).endswith(quoted)


@requires("spamc", SPAMC)
@pytest.mark.parametrize(
    ("words", "status"), [("FilterCommand", 69), ("#!/usr/bin/python3", 75)]
)
def test_spamassassin_is_away(words: str, status: int, runner: RecipeRunner) -> None:
    with reserve_port() as nobody:
        away = f"-d 127.0.0.1 -p {port_of(nobody)}"
        daemon = runner.start("SpamAssassin", words, {SPAMD_ADDRESS: away})
        assert runner.reply(daemon, MESSAGE) == LOCAL_ERROR
        daemon.wait_log(f"filter command failed with {status}$")


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
        StreamMaxLength 1M
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


def private_directory(runner: RecipeRunner) -> Path:
    """A directory for what filters keep."""
    directory = runner.place / "kept"
    directory.mkdir(0o700)
    own(directory)
    return directory


def envelope_fields(sender: bytes, recipients: Sequence[bytes]) -> bytes:
    """The header fields that hold the envelope in what is kept."""
    fields = [b"X-Sender: %s\n" % sender[1:-1]]
    fields += [b"X-Recipient: %s\n" % recipient[1:-1] for recipient in recipients]
    return b"".join(fields)


@requires("clamd", CLAMD)
@requires("clamdscan", CLAMDSCAN)
def test_clamav_refuses(runner: RecipeRunner, clamd: Path) -> None:
    daemon = runner.start("ClamAV", "$EMAIL", {CLAMD_CONF: clamd}, FilterType="file")
    assert runner.passed(daemon, MESSAGE, HOSTILE) == MESSAGE
    refusal = "550 5.7.1 This message contains Test.Harmless.UNOFFICIAL"
    assert runner.reply(daemon, INFECTED) == refusal
    assert runner.reply(daemon, ATTACHED) == refusal


@requires("clamd", CLAMD)
@requires("clamdscan", CLAMDSCAN)
def test_clamav_puts_aside_and_drops(runner: RecipeRunner, clamd: Path) -> None:
    directory = private_directory(runner)
    changes = {CLAMD_CONF: clamd, QUARANTINE: directory}
    daemon = runner.start("ClamAV", QUARANTINE, changes)
    assert runner.passed(daemon, MESSAGE, HOSTILE) == MESSAGE
    assert list(directory.iterdir()) == []
    recipients = [b"<b@example.net>", b'<"c d"@example.net>']
    assert runner.reply(daemon, ATTACHED, HOSTILE, recipients) == "250 2.0.0 Ok"
    assert len(runner.server.messages) == 1
    (copy,) = directory.iterdir()
    assert copy.suffix == ".eml"
    assert copy.stat().st_mode & 0o777 == 0o600
    found = b"X-Found: Test.Harmless.UNOFFICIAL FOUND\n"
    assert copy.read_bytes() == found + envelope_fields(HOSTILE, recipients) + ATTACHED


@requires("clamd", CLAMD)
@requires("clamdscan", CLAMDSCAN)
@pytest.mark.parametrize(("words", "kind"), [("$EMAIL", "file"), (QUARANTINE, "pipe")])
def test_clamav_sees_all_of_a_large_message(
    words: str, kind: str, runner: RecipeRunner, clamd: Path
) -> None:
    """Not only what is before StreamMaxLength."""
    changes: dict[str, object] = {CLAMD_CONF: clamd}
    if kind == "pipe":
        changes[QUARANTINE] = private_directory(runner)
    daemon = runner.start("ClamAV", words, changes, FilterType=kind)
    large = MESSAGE + b"%078d\r\n" % 0 * 15000 + VIRUS + b"\r\n"
    reply = "550 5.7.1 This message" if kind == "file" else "250 2.0.0 Ok"
    assert runner.reply(daemon, large).startswith(reply)
    assert runner.server.messages == []


@requires("clamd", CLAMD)
@requires("clamdscan", CLAMDSCAN)
def test_clamav_cannot_put_aside(runner: RecipeRunner, clamd: Path) -> None:
    """So the message stays with the client."""
    missing = {QUARANTINE: "/nowhere"}
    full = {QUARANTINE: private_directory(runner), '>"$copy"': ">/dev/full"}
    for changes in (missing, full):
        daemon = runner.start("ClamAV", QUARANTINE, {CLAMD_CONF: clamd, **changes})
        assert runner.reply(daemon, INFECTED) == LOCAL_ERROR


@requires("clamdscan", CLAMDSCAN)
@pytest.mark.parametrize(("words", "kind"), [("$EMAIL", "file"), (QUARANTINE, "pipe")])
def test_clamav_is_away(words: str, kind: str, runner: RecipeRunner) -> None:
    config = clamd_configuration(runner.place)
    daemon = runner.start("ClamAV", words, {CLAMD_CONF: config}, FilterType=kind)
    reply = "451 4.3.0 The virus scanner is not available"
    assert runner.reply(daemon, MESSAGE) == reply


# --- rspamd ---

RSPAMD = "/usr/bin/rspamd"
RSPAMD_ADDRESS = '"127.0.0.1", 11333'

# What needs the network, Redis or files of the machine.
RSPAMD_OFF = """
    arc asn bayes_expiry bimi dkim dkim_signing dmarc elastic fuzzy_check greylist
    hfilter history_redis mid multimap mx_check neural p0f phishing ratelimit rbl
    replies reputation rspamd_update spf surbl url_redirector whitelist
    worker-controller worker-fuzzy worker-proxy
"""
RSPAMD_SETTINGS = {
    "force_actions.conf": """
        rules {
            WAIT {
                action = "soft reject";
                expression = "MISSING_SUBJECT & !MISSING_FROM";
            }
        }
        """,
    "options.inc": """
        dns { nameserver = ["127.0.0.1:1"]; timeout = 0.05s; retransmits = 1; }
        filters = "regexp"; local_addrs = []; disable_hyperscan = true;
        url_tld = "DIRECTORY/tld";
        """,
    "logging.inc": 'type = "file"; filename = "DIRECTORY/log"; level = "info";',
    "worker-normal.inc": 'bind_socket = "127.0.0.1:PORT"; count = 1;',
}


@dataclass(frozen=True)
class Rspamd:
    """A running rspamd: where it is in a recipe's words, and its log."""

    address: str
    log: Path


def lay_out_rspamd(directory: Path, port: int) -> None:
    """Write its configuration beside Debian's, which it includes."""
    local = directory / "local.d"
    local.mkdir(parents=True)
    settings = {**RSPAMD_SETTINGS, "milter_headers.conf": recipe("rspamd", "use =")}
    for name in RSPAMD_OFF.split():
        suffix = "inc" if name.startswith("worker-") else "conf"
        settings[f"{name}.{suffix}"] = "enabled = false;"
    for name, text in settings.items():
        ours = text.replace("DIRECTORY", str(directory)).replace("PORT", str(port))
        (local / name).write_text(ours + "\n")
    (directory / "tld").write_text("com\n")
    own(directory)


@pytest.fixture(scope="module")
def rspamd(place: Path) -> Iterator[Rspamd]:
    """A running rspamd without the network."""
    directory = place / "rspamd"
    with reserve_port() as holder:
        port = port_of(holder)
        lay_out_rspamd(directory, port)
        command = [RSPAMD, "-f", "-c", "/etc/rspamd/rspamd.conf"]
        for name in ("DBDIR", "LOGDIR", "RUNDIR", "LOCAL_CONFDIR"):
            command += [f"--var={name}={directory}"]
        if os.geteuid() == 0:
            command += [
                "-u",
                ACCOUNT,
                "-g",
                grp.getgrgid(pwd.getpwnam(ACCOUNT).pw_gid).gr_name,
            ]

        def ready() -> bool:
            return is_listening(f"127.0.0.1:{port}")

        with running(command, ready, place / "rspamd.out", 30):
            yield Rspamd(f'"127.0.0.1", {port}', directory / "log")


@requires("rspamd", RSPAMD)
def test_rspamd_adds_and_removes_fields(runner: RecipeRunner, rspamd: Rspamd) -> None:
    daemon = runner.start("rspamd", "/checkv2", {RSPAMD_ADDRESS: rspamd.address})
    forged = b"X-Spam-Status: No,\r\n all is well\r\nx-spamd-RESULT: x\r\n"
    message = MESSAGE.replace(b"Lunch", b"Lunch \351\377")
    message = message.replace(b"To:", forged + b"To:") + b"X-Spam-Status: here too\r\n"
    ham = runner.passed(daemon, message, b'<"\351\377"@example.com>')
    assert re.search(rb"^X-Spam-Status: (Yes|No), score=", header(ham), re.M)
    assert len(re.findall(rb"(?i)^x-spamd-result:", ham, re.M)) == 1
    assert ham.endswith(message.replace(forged, b""))
    assert b"all is well" not in ham
    header_only = runner.passed(daemon, b"Subject: x\r\n")
    assert header_only.startswith(b"X-Spam")
    assert header_only.endswith(b"\r\nSubject: x\r\n")
    no_header = runner.passed(daemon, b"\r\nX-Spam-Status: x\r\n")
    assert no_header.endswith(b"\r\n\r\nX-Spam-Status: x\r\n")


@requires("rspamd", RSPAMD)
def test_rspamd_refuses_and_defers(runner: RecipeRunner, rspamd: Rspamd) -> None:
    daemon = runner.start("rspamd", "/checkv2", {RSPAMD_ADDRESS: rspamd.address})
    assert runner.reply(daemon, SPAM) == "550 5.7.1 This message looks like spam"
    waits = MESSAGE.replace(b"Subject: Lunch\r\n", b"")
    assert runner.reply(daemon, waits) == "451 4.7.1 Please try again later"


@requires("rspamd", RSPAMD)
def test_rspamd_learns_the_envelope(runner: RecipeRunner, rspamd: Rspamd) -> None:
    """Of the original client too, where there is XFORWARD."""
    daemon = runner.start("rspamd", "/checkv2", {RSPAMD_ADDRESS: rspamd.address})
    with daemon.connect() as client:
        client.reply()
        client.expect(b"EHLO mta.example", b"250")
        client.expect(b"XFORWARD ADDR=192.0.2.9 HELO=client.example", b"250")
        client.envelope(b"<s@example.com>", [b"<c@example.net>", b"<d@example.net>"])
        assert client.message(MESSAGE).startswith(b"250")
    addresses = "from: <s@example.com>.* rcpts: <c@example.net,d@example.net>"
    line = rf"ip: 192\.0\.2\.9, {addresses}"
    assert poll(lambda: re.search(line, rspamd.log.read_text("latin-1")))


@requires("rspamd", RSPAMD)
def test_rspamd_takes_any_sender(runner: RecipeRunner, rspamd: Rspamd) -> None:
    daemon = runner.start("rspamd", "/checkv2", {RSPAMD_ADDRESS: rspamd.address})
    for sender in (b"<>", HOSTILE):
        assert runner.passed(daemon, MESSAGE, sender).endswith(MESSAGE)


@requires("rspamd", RSPAMD)
def test_rspamd_is_away(runner: RecipeRunner) -> None:
    with reserve_port() as nobody:
        away = f'"127.0.0.1", {port_of(nobody)}'
        daemon = runner.start("rspamd", "/checkv2", {RSPAMD_ADDRESS: away})
        assert runner.reply(daemon, MESSAGE) == LOCAL_ERROR
        daemon.wait_log("filter command failed with 75: ConnectionRefusedError")


# --- DKIM ---

PYTHON, DKIMPY = "/usr/bin/python3", "/usr/lib/python3/dist-packages/dkim"
GENKEY = "/usr/sbin/opendkim-genkey"
DKIM_KEYS = "/usr/local/etc/dkim"
VERIFY = """
import sys
import dkim
record = sys.argv[1].encode()
message = sys.stdin.buffer.read()
print(dkim.verify(message, dnsfunc=lambda name, timeout=5: record))
"""


def is_signed(data: bytes, keys: Path) -> bool:
    """Whether mail data has a DKIM signature that fits the DNS record."""
    record = "".join(re.findall(r'"([^"]*)"', (keys / "mail.txt").read_text()))
    result = subprocess.run(
        [PYTHON, "-c", VERIFY, record],
        input=re.sub(rb"(?m)^\.", b"", data),
        capture_output=True,
        check=True,
    )
    return result.stdout == b"True\n"


@requires("python3-dkim", DKIMPY)
@requires("opendkim-tools", GENKEY)
def test_dkim_signs(runner: RecipeRunner) -> None:
    """Also what would be changed on the way to the server."""
    keys = runner.place / "keys"
    changes = {DKIM_KEYS: keys, "_proxsmtp": ACCOUNT}
    make = replaced(recipe("DKIM signatures", "opendkim-genkey"), changes)
    subprocess.run(["sh", "-ec", make], check=True)
    daemon = runner.start("DKIM signatures", "import dkim", {DKIM_KEYS: keys})
    signed = runner.passed(daemon, MESSAGE, HOSTILE)
    assert signed.endswith(MESSAGE)
    assert signed.startswith(b"DKIM-Signature: v=1; a=rsa-sha256; c=relaxed/relaxed;")
    assert is_signed(signed, keys)
    assert not is_signed(signed.replace(b"noon", b"five"), keys)
    odd = b"bare\rCR\r\r\nand\nLF, 8 bits \351\377\r\n..dots\r\n  blanks \r\n\r\n\r\n"
    assert is_signed(runner.passed(daemon, MESSAGE + odd), keys)
    assert runner.reply(daemon, b"Subject: x\r\n\r\nx\r\n").startswith("550 5.6.0")


@requires("python3-dkim", DKIMPY)
def test_dkim_has_no_key(runner: RecipeRunner) -> None:
    """Then nothing goes out unsigned."""
    daemon = runner.start("DKIM signatures", "import dkim", {DKIM_KEYS: "/nowhere"})
    assert runner.reply(daemon, MESSAGE) == LOCAL_ERROR
    daemon.wait_log("filter command failed with 75: FileNotFoundError")


# --- Disclaimers ---

ALTERMIME = "/usr/bin/altermime"
DISCLAIMER = "/usr/local/etc/disclaimer"
TEXT = b"--b\r\nContent-Type: text/plain\r\n\r\nHello\r\n"
CSV = (
    b"--b\r\nContent-Type: text/plain\r\n"
    b'Content-Disposition: attachment; filename="a.csv"\r\n\r\n1,2\r\n'
)
PLAIN_WORDS, HTML_WORDS = b"No liability.", b"<p>None at all.</p>"


def multipart(kind: str, *parts: bytes) -> bytes:
    """A message of several parts, each of which begins with its boundary."""
    field = f'MIME-Version: 1.0\r\nContent-Type: multipart/{kind}; boundary="b"\r\n\r\n'
    return b"Subject: x\r\n" + field.encode() + b"".join(parts) + b"--b--\r\n"


@pytest.fixture
def disclaimers(runner: RecipeRunner) -> str:
    """What stands before .txt and .html in the names of two disclaimers."""
    place = runner.place / "disclaimer"
    place.with_suffix(".txt").write_bytes(PLAIN_WORDS + b"\n")
    place.with_suffix(".html").write_bytes(HTML_WORDS + b"\n")
    return str(place)


@requires("altermime", ALTERMIME)
def test_disclaimer_is_added(runner: RecipeRunner, disclaimers: str) -> None:
    """To the text, and to no attachment."""
    daemon = runner.start("Disclaimers", "altermime", {DISCLAIMER: disclaimers})
    added = PLAIN_WORDS + b"\r\n"
    assert runner.passed(daemon, MESSAGE, HOSTILE) == MESSAGE + added
    mixed = multipart("mixed", TEXT, CSV)
    expected = multipart("mixed", TEXT + added, CSV)
    assert runner.passed(daemon, mixed) == expected
    html = TEXT.replace(b"plain", b"html").replace(b"Hello", b"<html>Hi</html>")
    both = runner.passed(daemon, multipart("alternative", TEXT, html))
    assert both.count(PLAIN_WORDS) == both.count(HTML_WORDS) == 1


SIGNATURE = b"--b\r\nContent-Type: application/pgp-signature\r\n\r\nx\r\n"
LEFT_ALONE = {
    "DKIM": b"dkim-signature: v=1; b=x\r\n" + MESSAGE,
    "PGP": multipart("signed", TEXT, SIGNATURE),
    "PGP, forwarded by a list": multipart(
        "mixed", multipart("signed", TEXT, SIGNATURE).replace(b"--b", b"--c"), TEXT
    ),
    "encrypted": multipart("encrypted", TEXT),
    "S/MIME": MESSAGE.replace(
        b"Subject:", b"Content-Type: application/pkcs7-mime\r\nSubject:"
    ),
    "an attachment alone": b"Subject: x\r\n" + CSV.partition(b"\r\n")[2],
}


@requires("altermime", ALTERMIME)
@pytest.mark.parametrize("kind", LEFT_ALONE)
def test_disclaimer_is_not_added(
    kind: str, runner: RecipeRunner, disclaimers: str
) -> None:
    daemon = runner.start("Disclaimers", "altermime", {DISCLAIMER: disclaimers})
    assert runner.passed(daemon, LEFT_ALONE[kind]) == LEFT_ALONE[kind]


@requires("altermime", ALTERMIME)
def test_disclaimer_is_missing(runner: RecipeRunner) -> None:
    daemon = runner.start("Disclaimers", "altermime", {DISCLAIMER: "/nowhere/text"})
    assert runner.reply(daemon, MESSAGE) == LOCAL_ERROR


# --- Archive, attachments, several recipients ---

ARCHIVE = "/var/spool/archive"


def test_archive_has_a_copy(runner: RecipeRunner) -> None:
    directory = private_directory(runner)
    daemon = runner.start("Archive", "#!/bin/sh", {ARCHIVE: directory})
    recipients = [b"<b@example.net>", b'<"c d"@example.net>']
    assert runner.passed(daemon, MESSAGE, HOSTILE, recipients) == MESSAGE
    (copy,) = directory.iterdir()
    assert copy.suffix == ".eml"
    assert copy.stat().st_mode & 0o777 == 0o600
    assert copy.read_bytes() == envelope_fields(HOSTILE, recipients) + MESSAGE


def test_archive_is_missing_or_full(runner: RecipeRunner) -> None:
    """Then the message stays with the client."""
    missing = {ARCHIVE: "/nowhere"}
    full = {ARCHIVE: private_directory(runner), '"$copy" && mv': "/dev/full && mv"}
    for changes in (missing, full):
        daemon = runner.start("Archive", "#!/bin/sh", changes)
        assert runner.reply(daemon, MESSAGE) == LOCAL_ERROR


def test_attachments_are_refused_by_name(runner: RecipeRunner) -> None:
    daemon = runner.start("Filters", "FORBIDDEN")
    mixed = multipart("mixed", TEXT, CSV)
    assert runner.passed(daemon, mixed, HOSTILE) == mixed
    program = multipart("mixed", TEXT, CSV.replace(b"a.csv", b"Invoice.EXE"))
    reply = "550 5.7.1 Programs are not accepted by mail"
    assert runner.reply(daemon, program) == reply


@requires("spamc", SPAMC)
@requires("spamd", SPAMD)
def test_spam_is_refused_if_all_recipients_want_so(
    runner: RecipeRunner, spamd: str
) -> None:
    refuse = runner.script("SpamAssassin", "#!/usr/bin/python3", {SPAMD_ADDRESS: spamd})
    strict = runner.place / "strict"
    strict.write_text("b@example.net\nc@example.net\n")
    changes = {
        SPAMD_ADDRESS: spamd,
        "/usr/local/libexec/refuse-spam": refuse,
        "/usr/local/etc/strict": strict,
    }
    daemon = runner.start("Several recipients", "strict", changes)
    both = [b"<B@example.net>", b"<c@example.net>"]
    assert runner.reply(daemon, SPAM, HOSTILE, both).startswith("550 5.7.1")
    marked = runner.passed(daemon, SPAM, HOSTILE, [*both, b"<other@example.net>"])
    assert b"X-Spam-Status: Yes" in header(marked)
    assert b"X-Spam-Status: No" in runner.passed(daemon, MESSAGE, HOSTILE, both)
    strict.unlink()
    assert runner.reply(daemon, MESSAGE) == LOCAL_ERROR


CHOOSY = """
case $RECIPIENTS in *never*) echo '550 5.7.1 Not for them' >&2; exit 1 ;; esac
printf 'X-Recipients: %s\\n' "$RECIPIENTS"
exec cat
"""


@requires("postfix", POSTFIX)
def test_postfix_has_a_message_for_each_recipient(
    proxsmtpd: StartDaemon, filter_script: MakeFilter
) -> None:
    """So that the filter can refuse one of them, and pass the others."""
    require_root()
    (limit,) = re.findall(
        r"^\.Dl postconf -e '(proxsmtpd_destination_recipient_limit) = (.*)'",
        read("proxsmtpd.8"),
        re.M,
    )
    with ExitStack() as held:
        holders = [held.enter_context(reserve_port()) for _ in range(3)]
        entrance, filtered, reentry = map(port_of, holders)
        services = [
            smtpd(entrance),
            smtp("proxsmtpd"),
            smtpd(reentry, {"content_filter": ""}),
        ]
        main = {"content_filter": f"proxsmtpd:[127.0.0.1]:{filtered}"}
        postfix = held.enter_context(
            PrivatePostfix(services, {**main, **dict([limit])})
        )
        proxsmtpd(
            {
                "Listen": f"127.0.0.1:{filtered}",
                "OutAddress": f"127.0.0.1:{reentry}",
                "FilterCommand": filter_script(CHOOSY),
            }
        )
        recipients = ["b@example.net", "never@example.net", "c@example.net"]
        with smtplib.SMTP("127.0.0.1", entrance, "client.example") as client:
            client.sendmail("a@example.com", recipients, MESSAGE)
        mails = postfix.wait_mails(3)
    seen = {mail.recipient: mail.header("X-Recipients") for mail in mails}
    assert seen == {
        "b@example.net": "b@example.net",
        "c@example.net": "c@example.net",
        "a@example.com": None,
    }
    (bounce,) = (mail for mail in mails if mail.sender == "<>")
    assert b"<never@example.net>: host 127.0.0.1" in bounce.body
    assert b"Not for them" in bounce.body


@pytest.mark.parametrize(
    ("title", "words"), [("ClamAV", "X-Found"), ("Disclaimers", "altermime")]
)
def test_temporary_directory_is_full(
    title: str, words: str, runner: RecipeRunner
) -> None:
    daemon = runner.start(title, words, {'3>"$file"': "3>/dev/full"})
    assert runner.reply(daemon, MESSAGE) == LOCAL_ERROR
    daemon.wait_log("filter command failed with 75: cat: ")
