"""Manuals, sample, README and NEWS say what the program does.

Names, defaults, variables, log words, replies and options are compared with the
program's own tables, and every configuration and filter in the documents is run.
"""

from __future__ import annotations

import ast
import configparser
import os
import re
import shlex
import smtplib
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

import proxsmtpd as program
from haproxy import HAPROXY, LISTEN
from helpers import (
    PEER_PATIENCE,
    ROOT,
    MakeFilter,
    StartDaemon,
    as_root,
    is_listening,
    poll,
    port_of,
    program_under_test,
    requires,
    reserve_port,
)
from manual import items, read, rendered, section, unescaped
from postfix import POSTFIX, PrivatePostfix, require_root, smtpd
from smtp import ScriptedServer
from tls import Certificates

DOCUMENTS = ("proxsmtpd.8", "proxsmtpd.conf.5", "README", "proxsmtpd.conf.sample")
SETTING_NAMES = {setting.name for setting in program.SETTINGS}
DEFAULTS = {setting.name: setting.default for setting in program.SETTINGS}
# SpamAssassin's own text for tests.
GTUBE = b"XJS*C4JDBQADN1.NSBN3*2IDNEN*GTUBE-STANDARD-ANTI-UBE-TEST-EMAIL*C.34X"
MESSAGE = b"From: a@example.com\r\nSubject: Hello\r\n\r\nSubject: not a header\r\n"


def literal_blocks(name: str) -> list[str]:
    """Return the literal displays of a document, unindented."""
    text = read(name)
    if name == "README":
        blocks = re.findall(r"(?:^ {4}.*\n)+", text, re.M)
        return [textwrap.dedent(block) for block in blocks]
    found = re.findall(r"^\.Bd -literal.*?\n(.*?)^\.Ed", text, re.M | re.S)
    return [unescaped(block) for block in found]


def is_configuration(block: str) -> bool:
    """Return whether a literal block is a configuration of proxsmtpd."""
    lines = [ln for ln in block.splitlines() if ln and not ln.startswith("#")]
    return bool(lines) and all(
        re.match(r"([A-Za-z]+):", ln) and ln.split(":")[0] in SETTING_NAMES
        for ln in lines
    )


def configurations(name: str) -> list[str]:
    """Return a document's example configurations; one without OutAddress gets one."""
    if name.endswith(".sample"):
        return [read(name)]
    return [
        block if "OutAddress:" in block else f"OutAddress: 10026\n{block}"
        for block in literal_blocks(name)
        if is_configuration(block)
    ]


def scripts(name: str) -> list[str]:
    """Return the literal blocks of a document that are whole scripts."""
    return [block for block in literal_blocks(name) if block.startswith("#!")]


def run_program(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "proxsmtpd.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def uncommented(sample: str) -> str:
    """Return the sample with the # taken off each setting."""
    return re.sub(r"^#(?=[A-Za-z]+: )", "", sample, flags=re.M)


# --- Settings ---


def test_manual_has_each_setting_once_in_alphabetical_order() -> None:
    names = items(section("proxsmtpd.conf.5", "SETTINGS"), "Cm")
    assert names == sorted(SETTING_NAMES)


@pytest.mark.parametrize("name", sorted(SETTING_NAMES))
def test_manual_says_each_default_last(name: str) -> None:
    entry = re.search(
        rf"^\.It Cm {name} :.*?(?=^\.It Cm |^\.El\n\.Pp\nWhere)",
        section("proxsmtpd.conf.5", "SETTINGS"),
        re.M | re.S,
    )
    assert entry
    sentences = re.split(r"(?<=[.:]) (?=[A-Z])", rendered(entry[0]))
    default = DEFAULTS[name] or "none"
    assert re.match(rf"The default is {re.escape(default)}( ?\.|, )", sentences[-1])


@pytest.mark.parametrize("name", sorted(SETTING_NAMES))
def test_sample_has_each_setting_with_its_default(name: str) -> None:
    shown = re.findall(rf"^#?{name}: (.*)$", read("proxsmtpd.conf.sample"), re.M)
    assert shown, f"the sample does not have {name}"
    assert shown[0] == DEFAULTS[name] or not DEFAULTS[name]


def test_sample_has_no_other_settings() -> None:
    shown = re.findall(r"^#?([A-Za-z]+): ", read("proxsmtpd.conf.sample"), re.M)
    assert set(shown) == SETTING_NAMES


def test_sample_says_no_more_than_what_is_required() -> None:
    assert re.findall(r"^[^#\s].*", read("proxsmtpd.conf.sample"), re.M) == [
        "OutAddress: 10026"
    ]


# --- Configurations and filters ---


def test_documents_have_the_examples_that_these_tests_are_about() -> None:
    assert {name: len(configurations(name)) for name in DOCUMENTS} == {
        "proxsmtpd.8": 10,
        "proxsmtpd.conf.5": 5,
        "README": 2,
        "proxsmtpd.conf.sample": 1,
    }


def check(text: str, directory: Path) -> tuple[int, str]:
    """Return the exit status and the output of -t for a configuration."""
    config = directory / "proxsmtpd.conf"
    config.write_text(text)
    result = run_program("-t", "-f", str(config))
    return result.returncode, result.stdout


@pytest.mark.parametrize("name", DOCUMENTS)
def test_example_configurations_are_right(
    name: str, tmp_path: Path, certificates: Certificates
) -> None:
    for example in configurations(name):
        path = certificates.path("good")
        text = example.replace("/etc/ssl/mail.example.pem", path)
        assert check(text, tmp_path) == (0, "configuration is OK\n"), text


def test_sample_is_right_with_every_line_in_force(tmp_path: Path) -> None:
    text = uncommented(read("proxsmtpd.conf.sample"))
    assert check(text, tmp_path) == (0, "configuration is OK\n")


def run_script(text: str, directory: Path, **env: str) -> tuple[int, bytes, bytes]:
    """Run a filter on MESSAGE; returns exit status, output and error output."""
    script = directory / "script"
    script.write_text(text)
    script.chmod(0o755)
    result = subprocess.run(
        [str(script)],
        input=env.pop("message", MESSAGE.decode()).encode(),
        capture_output=True,
        env={"PATH": os.environ["PATH"], "SENDER": "a@example.com", **env},
        check=False,
    )
    return result.returncode, result.stdout, result.stderr


def script_with(name: str, words: str) -> str:
    """Return the one script of a document that contains these words."""
    (script,) = (text for text in scripts(name) if words in text)
    return script


def test_one_line_filter_of_the_manual_marks_the_subject_only(tmp_path: Path) -> None:
    (command,) = (
        text.partition(": ")[2]
        for text in literal_blocks("proxsmtpd.8")
        if text.startswith("FilterCommand: sed")
    )
    assert run_script(f"#!/bin/sh\n{command}", tmp_path) == (
        0,
        MESSAGE.replace(b"Subject: Hello", b"Subject: [list] Hello"),
        b"",
    )


def attachment(parameters: str, kind: str = "application/octet-stream") -> str:
    """Return a message with an attachment, whose Content-Disposition has these."""
    return (
        "Subject: x\r\nMIME-Version: 1.0\r\nContent-Type: multipart/mixed; "
        f'boundary="b"\r\n\r\n--b\r\nContent-Type: {kind}\r\n'
        f"Content-Disposition: attachment; {parameters}\r\n\r\nx\r\n--b--\r\n"
    )


@pytest.mark.parametrize("name", ["letter.pdf", "exe", "caf\u00e9.txt", "exe.", ""])
def test_attachment_filter_of_the_manual_passes(name: str, tmp_path: Path) -> None:
    script = script_with("proxsmtpd.8", "FORBIDDEN")
    message = attachment(f'filename="{name}"')
    assert run_script(script, tmp_path, message=message) == (0, message.encode(), b"")


@pytest.mark.parametrize(
    "message",
    [
        *(attachment(f'filename="{n}"') for n in ("a.exe", "A.VBS", "caf\u00e9.js")),
        attachment('filename="evil.exe. ."'),
        attachment('filename="=?utf-8?Q?evil=2Eexe?="'),
        attachment('filename="=?utf-8?B?ZXZpbC5leGU=?="'),
        attachment("filename*=utf-8''evil%2Eexe"),
        attachment('filename*0="evil."; filename*1="exe"'),
        attachment('filename="a.txt"', 'application/x; name="evil.exe"'),
        attachment(
            'filename="a.txt"\r\nContent-Disposition: attachment; filename="evil.exe"'
        ),
    ],
)
def test_attachment_filter_of_the_manual_refuses(message: str, tmp_path: Path) -> None:
    script = script_with("proxsmtpd.8", "FORBIDDEN")
    refusal = b"550 5.7.1 Programs are not accepted by mail\n"
    assert run_script(script, tmp_path, message=message) == (1, b"", refusal)


UNWANTED = "/usr/local/etc/unwanted"


@pytest.mark.parametrize(
    ("sender", "verdict"),
    [
        ("a@example.com", (0, MESSAGE, b"")),
        ("-v@example.com", (0, MESSAGE, b"")),
        ("$(touch x)`touch x`@example.com", (0, MESSAGE, b"")),
        ("Ads@Example.com", (1, b"", b"250 2.0.0 Ok\n")),
        ('"ads"@example.com', (1, b"", b"250 2.0.0 Ok\n")),
        (r'"a\ds"@example.com', (1, b"", b"250 2.0.0 Ok\n")),
        ("more-ads@example.com", (0, MESSAGE, b"")),
    ],
)
def test_dropping_filter_of_the_manual(
    sender: str, verdict: tuple[int, bytes, bytes], tmp_path: Path
) -> None:
    unwanted = tmp_path / "unwanted"
    unwanted.write_text("ads@example.com\n")
    script = script_with("proxsmtpd.8", UNWANTED).replace(UNWANTED, str(unwanted))
    assert run_script(script, tmp_path, SENDER=sender) == verdict


def test_dropping_filter_of_the_manual_without_its_list(tmp_path: Path) -> None:
    """Mail waits, and does not pass, until there is one."""
    script = script_with("proxsmtpd.8", UNWANTED).replace(UNWANTED, "/nowhere/list")
    status, output, errors = run_script(script, tmp_path, SENDER="ads@example.com")
    assert (status, output) == (1, b"")
    assert errors.endswith(b"451 4.3.0 The list of senders cannot be read\n")


@pytest.mark.parametrize(
    ("sender", "verdict"),
    [
        (
            "a@example.com",
            (0, MESSAGE.replace(b"Subject: H", b"Subject: [filtered] H"), b""),
        ),
        ("a@spam.example", (1, b"", b"550 5.7.1 No, thanks\n")),
    ],
)
def test_first_filter_of_the_readme(
    sender: str, verdict: tuple[int, bytes, bytes], tmp_path: Path
) -> None:
    """The commands make it, at any indentation and more than once."""
    block = script_of_readme("printf '%s")
    commands = block.replace("/usr/local/libexec", str(tmp_path / "libexec"))
    for text in (textwrap.indent(commands, "    "), commands):
        subprocess.run(["sh", "-e", "-c", text], check=True)
    script = tmp_path / "libexec/filter"
    assert script.stat().st_mode & 0o777 == 0o755
    assert len(script.read_text().splitlines()) <= 6
    assert run_script(script.read_text(), tmp_path, SENDER=sender) == verdict


def script_of_readme(words: str) -> str:
    """Return the one block of commands in README that has these words."""
    (block,) = (block for block in literal_blocks("README") if words in block)
    return block


@requires("passwd", "/usr/sbin/useradd")
@requires("util-linux", "/usr/bin/unshare")
def test_user_and_directory_of_the_readme(tmp_path: Path) -> None:
    """Made on a machine that has neither; nothing changes the second time."""
    require_root()
    commands = script_of_readme("useradd").replace("_proxsmtp", "_newproxsmtp")
    spool = "/var/spool"
    script = f"""
cp -a /etc "{tmp_path}/etc"
mount --bind "{tmp_path}/etc" /etc
mount -t tmpfs none {spool}
{commands}
{commands}
getent passwd _newproxsmtp
stat -c '%U:%G %a' {spool}/proxsmtpd
"""
    result = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script],
        capture_output=True,
        text=True,
        check=True,
    )
    *_, entry, directory = result.stdout.splitlines()
    name, *_, home, shell = entry.split(":")
    assert (name, home, shell) == ("_newproxsmtp", "/nonexistent", "/usr/sbin/nologin")
    assert directory == "_newproxsmtp:_newproxsmtp 700"


@requires("dpkg", "/usr/bin/dpkg-divert")
def test_diversions_of_the_readme_and_their_undo(tmp_path: Path) -> None:
    """Debian's program and manuals come back."""
    names = ["sbin/proxsmtpd", "share/man/man8/proxsmtpd.8.gz"]
    names.append("share/man/man5/proxsmtpd.conf.5.gz")
    for name in names:
        path = tmp_path / "usr" / name
        path.parent.mkdir(parents=True)
        path.write_text(f"Debian's {name}")
    (tmp_path / "var/lib/dpkg").mkdir(parents=True)
    (tmp_path / "var/lib/dpkg/status").touch()
    elsewhere = f"""
dpkg-divert() {{ command dpkg-divert --root "{tmp_path}" "$@"; }}
make() {{ command make DESTDIR="{tmp_path}" PYTHON="{sys.executable}" "$@"; }}
"""

    def do(words: str) -> None:
        commands = ["bash", "-e", "-c", elsewhere + script_of_readme(words)]
        subprocess.run(commands, cwd=ROOT, check=True, capture_output=True)

    do('--divert "$file.orig"')
    program_file = tmp_path / "usr" / names[0]
    assert program_file.read_text().startswith("#!")
    for name in names:
        assert (tmp_path / f"usr/{name}.orig").read_text() == f"Debian's {name}"
    do('--remove "$file"')
    for name in names:
        assert (tmp_path / "usr" / name).read_text() == f"Debian's {name}"
        assert not (tmp_path / f"usr/{name}.orig").exists()


def test_manual_makes_user_and_directory_as_the_readme_does() -> None:
    (block,) = (b for b in literal_blocks("proxsmtpd.8") if "useradd" in b)
    assert block.startswith(script_of_readme("useradd"))


@as_root
@requires("nftables", "/usr/sbin/nft")
def test_rate_limit_of_the_manual_is_taken_by_nft(tmp_path: Path) -> None:
    (rules,) = (b for b in literal_blocks("proxsmtpd.8") if "limit rate" in b)
    file = tmp_path / "rules"
    file.write_text(rules)
    subprocess.run(["unshare", "--net", "nft", "-f", file], check=True)


@pytest.mark.parametrize(
    ("title", "port", "body"),
    [("FIRST FILTER", "10025", b"Hello"), ("WITH POSTFIX", "25", GTUBE)],
)
def test_messages_that_the_readme_sends(
    title: str, port: str, body: bytes, server: ScriptedServer
) -> None:
    """Pasted with their blanks."""
    (command,) = re.findall(r"^ +python3 -c '[^']*'$", readme_part(title), re.M)
    ours = server.address.rpartition(":")[2]
    command = command.replace(f", {port})", f", {ours})")
    subprocess.run(["sh", "-c", command], check=True)
    assert server.wait_message(1).data == b"Subject: Hello\r\n\r\n" + body + b"\r\n"


def test_speed_in_the_readme_is_the_measured_one() -> None:
    """The numbers of RESULTS, in the order C, cured C, ours."""
    results = read("test/tools/bench/RESULTS")
    without, _, with_cat = results.partition("\ncat, a pipe  ")
    without = without.partition("\nMessages a second\n")[2]
    rows = re.findall(
        r"^    (no filter|filter cat), (\d+ \w+) .*?([\d.,]+) +([\d.,]+) +([\d.,]+)$",
        readme_part("HOW FAST"),
        re.M,
    )
    assert len(rows) == 6
    for kind, load, original, cured, ours in rows:
        table = without if kind == "no filter" else with_cat
        found = re.search(rf"^{load} .*?([\d.,]+) +([\d.,]+) +([\d.,]+)", table, re.M)
        assert found
        assert found.groups() == (ours, original, cured)


def test_readme_has_ten_differences() -> None:
    part = readme_part("COMING FROM PROXSMTP 1.10")
    numbers = re.findall(r"^ ?(\d+)\. ", part, re.M)
    assert numbers == [str(n) for n in range(1, 11)]


# --- Postfix ---

PORTS = ("10025", "10026")  # of proxsmtpd, and of Postfix after it
POSTFIX_EXAMPLES = ("Postfix, after the queue", "Postfix, before the queue")
MARKING = """\
if [ "$SENDER" = mallory@example.com ]; then
    echo '550 5.7.1 We do not like you' >&2; exit 1
fi
printf 'X-Filter-Remote: %s %s\\r\\n' "$REMOTE" "$REMOTE_HELO"
exec cat
"""


# Each command works on the Postfix of a test.  Postfix waits until a file that was
# changed just now has been at rest.
ON_OURS = r"""
postconf() { command postconf -c "$ETC" "$@" || exit 1; }
postsuper() { command postsuper -c "$ETC" "$@" || exit 1; }
postfix() { touch -d @0 "$ETC"/*.cf; command postfix -c "$ETC" "$@" || exit 1; }
"""


@dataclass(frozen=True)
class PostfixExample:
    """A set-up with Postfix: a configuration, and commands to make and undo it."""

    settings: str
    commands: str
    undo: str

    @classmethod
    def of(cls, title: str, ports: Sequence[int] = ()) -> PostfixExample:
        """Return the manual's; `ports` are those of a test in place of 25 and PORTS."""
        source = section("proxsmtpd.8", title)
        blocks = re.findall(r"^\.Bd -literal.*?\n(.*?)^\.Ed", source, re.M | re.S)
        settings, commands, undo = map(unescaped, blocks)
        return cls(settings, commands, undo).on(ports)

    def on(self, ports: Sequence[int]) -> PostfixExample:
        """Return the same with other ports."""
        places = [f"127.0.0.1:{port}" for port in ports]
        names = ["smtp/inet", *(f"127.0.0.1:{port}" for port in PORTS)]
        changes = dict(
            zip(names, [f"{place}/inet" for place in places[:1]] + places[1:])
        )
        for port, of_test in zip(PORTS, ports[1:]):
            changes[f"[127.0.0.1]:{port}"] = f"[127.0.0.1]:{of_test}"
        texts = [self.settings, self.commands, self.undo]
        for old, new in changes.items():
            texts = [text.replace(old, new) for text in texts]
        return PostfixExample(*texts)


def paste(commands: str, postfix: PrivatePostfix) -> None:
    """Have a shell execute commands for a Postfix."""
    subprocess.run(
        ["sh", "-c", f"{ON_OURS}\n{commands}"],
        env={**os.environ, "ETC": f"{postfix.directory}/etc"},
        check=True,
        capture_output=True,
    )


def configuration_of(postfix: PrivatePostfix) -> list[bytes]:
    """Return what a Postfix's main.cf and master.cf say."""
    command = ["postconf", "-c", f"{postfix.directory}/etc"]
    return [
        subprocess.run([*command, option], check=True, capture_output=True).stdout
        for option in ("-n", "-M")
    ]


def readme_part(title: str) -> str:
    """Return a section of README."""
    return read("README").partition(f"\n\n{title}\n\n")[2].partition("\n\n\n")[0]


def test_readme_sets_postfix_up_as_the_manual_does() -> None:
    """Before the queue: its filter refuses mail, which must not become bounces."""
    part = readme_part("WITH POSTFIX")
    setup, _, undo = re.findall(r"(?:^ {4}.*\n?)+", part, re.M)
    manual = PostfixExample.of("Postfix, before the queue")
    assert textwrap.dedent(setup).strip() == manual.commands.strip()
    assert textwrap.dedent(undo).strip() == manual.undo.strip()


@requires("postfix", POSTFIX)
@pytest.mark.parametrize("title", POSTFIX_EXAMPLES)
def test_postfix_example_of_the_manual_filters(
    title: str, proxsmtpd: StartDaemon, filter_script: MakeFilter
) -> None:
    """Mail goes through, the filter knows the client, and can refuse."""
    require_root()
    with ExitStack() as held:
        free = [port_of(held.enter_context(reserve_port())) for _ in range(3)]
        check_postfix_example(title, free, proxsmtpd, filter_script)


def check_postfix_example(
    title: str,
    free_ports: Sequence[int],
    proxsmtpd: StartDaemon,
    filter_script: MakeFilter,
) -> None:
    """Send a message that the filter passes, one that it refuses, and one without it.

    The commands are pasted twice, at different indentations.
    """
    entrance, _, reentry = free_ports
    example = PostfixExample.of(title, free_ports)
    settings = example.settings.replace(
        "/usr/local/libexec/filter", filter_script(MARKING)
    )
    proxsmtpd(re.sub("^(User|TempDirectory): .*\n", "", settings, flags=re.M))
    with PrivatePostfix([smtpd(entrance)]) as postfix:
        before = configuration_of(postfix)
        paste(textwrap.indent(example.commands, "    "), postfix)
        once = configuration_of(postfix)
        paste(example.commands, postfix)
        assert configuration_of(postfix) == once
        assert poll(lambda: is_listening(f"127.0.0.1:{reentry}"), PEER_PATIENCE)
        with smtplib.SMTP("127.0.0.1", entrance, "client.example") as client:
            client.sendmail("a@example.com", ["b@example.net"], MESSAGE)
        (mail,) = postfix.wait_mails(1)
        assert mail.header("X-Filter-Remote") == "127.0.0.1 client.example"
        assert mail.body == b"Subject: not a header\n"
        assert_refused(title, postfix, entrance)
        postfix.clear()
        paste(example.undo, postfix)
        assert configuration_of(postfix) == before
        assert poll(lambda: not is_listening(f"127.0.0.1:{reentry}"), PEER_PATIENCE)
        with smtplib.SMTP("127.0.0.1", entrance, "client.example") as client:
            client.sendmail("a@example.com", ["b@example.net"], MESSAGE)
        (mail,) = postfix.wait_mails(1)
        assert mail.header("X-Filter-Remote") is None


def assert_refused(title: str, postfix: PrivatePostfix, entrance: int) -> None:
    """Check that the client, or a bounce, has the filter's refusal."""
    refusal = "550 5.7.1 We do not like you"
    with smtplib.SMTP("127.0.0.1", entrance, "client.example") as client:
        client.ehlo()
        client.mail("mallory@example.com")
        client.rcpt("b@example.net")
        code, text = client.data(MESSAGE)
    if "before" in title:
        assert f"{code} {text.decode()}" == refusal
    else:
        assert code == 250
        bounce = next(m for m in postfix.wait_mails(2) if m.sender == "<>")
        assert refusal.encode() in b" ".join(bounce.body.split())


@requires("postfix", POSTFIX)
def test_postfix_says_what_the_manual_explains_without_proxsmtpd() -> None:
    """The reply, and the line of its log that has the reason."""
    require_root()
    title = "Postfix, before the queue"
    with ExitStack() as held:
        ports = [port_of(held.enter_context(reserve_port())) for _ in range(3)]
        postfix = held.enter_context(PrivatePostfix([smtpd(ports[0])]))
        paste(PostfixExample.of(title, ports).commands, postfix)
        assert poll(lambda: is_listening(f"127.0.0.1:{ports[2]}"), PEER_PATIENCE)
        with smtplib.SMTP("127.0.0.1", ports[0], "client.example") as client:
            client.ehlo()
            client.mail("a@example.com")
            client.rcpt("b@example.net")
            code, text = client.data(MESSAGE)
        postfix.wait_log("connect to .*: Connection refused")
    reply = f"{code} {text.decode()}"
    assert reply == "451 4.3.0 Error: queue file write error"
    for document in ("proxsmtpd.8", "README"):
        assert reply in " ".join(read(document).split())


def test_postfix_waits_longer_than_proxsmtpd() -> None:
    """The whole run of the filter, and the server's answers to DATA and message."""
    example = PostfixExample.of("Postfix, before the queue")
    limits = r"timeout -s KILL (\d+) |^TimeOut: (\d+)|smtpd_proxy_timeout=(\d+)s"
    found = re.findall(limits, example.settings + example.commands, re.M)
    run, answer, patience = (int("".join(groups)) for groups in found)
    assert run + 2 * answer < patience


@pytest.mark.parametrize(
    ("options", "reply"),
    [("-s KILL ", (451, b"Local Error")), ("", (550, b"Content Rejected"))],
)
def test_timeout_has_mail_tried_again_with_sigkill_only(
    options: str, reply: tuple[int, bytes], proxsmtpd: StartDaemon
) -> None:
    daemon = proxsmtpd(f"FilterCommand: timeout {options}0.1 sleep 60")
    with smtplib.SMTP("127.0.0.1", daemon.port, "client.example") as client:
        client.ehlo()
        client.mail("a@example.com")
        client.rcpt("b@example.net")
        assert client.data(MESSAGE) == reply


# --- HAProxy, init script, systemd ---


def test_haproxy_section_of_the_manual_is_the_one_that_is_tested() -> None:
    (block,) = (b for b in literal_blocks("proxsmtpd.8") if b.startswith("listen "))
    assert block.startswith(LISTEN)
    machines = block[len(LISTEN) :].splitlines()
    assert len(machines) == 2
    assert all(re.fullmatch(r"    server \w+ [0-9.]+:10025", m) for m in machines)


@requires("haproxy", HAPROXY)
def test_haproxy_takes_the_section_of_the_manual(tmp_path: Path) -> None:
    (block,) = (b for b in literal_blocks("proxsmtpd.8") if b.startswith("listen "))
    config = tmp_path / "haproxy.cfg"
    config.write_text(block)
    subprocess.run([HAPROXY, "-q", "-c", "-f", config], check=True)


@requires("dpkg", "/sbin/start-stop-daemon")
def test_init_script_of_the_manual(tmp_path: Path, server: ScriptedServer) -> None:
    """Each action does what it should, with the exit status that LSB gives it."""
    daemon, config, script = (tmp_path / name for name in ("daemon", "config", "init"))
    paths = {
        "/usr/local/sbin/proxsmtpd": daemon,
        program.CONFIG_FILE: config,
        "/run/proxsmtpd.pid": tmp_path / "pid",
    }
    with reserve_port() as holder:
        listen = f"127.0.0.1:{port_of(holder)}"
        # As this user it may empty its pid file, and not remove it.
        user = "" if os.geteuid() else "User: nobody\n"
        config.write_text(f"Listen: {listen}\nOutAddress: {server.address}\n{user}")
        daemon.write_text(f'#!/bin/sh\nexec {shlex.join(program_under_test())} "$@"\n')
        text = script_with("proxsmtpd.8", "BEGIN INIT INFO")
        for path, ours in paths.items():
            text = text.replace(path, str(ours))
        script.write_text(text)
        for executable in (daemon, script):
            executable.chmod(0o755)
        try:
            check_init_script(script, holder)
        finally:
            subprocess.run([script, "stop"], check=True)


def check_init_script(script: Path, holder: socket.socket) -> None:
    running, stopped = 0, 3

    def act(action: str) -> int:
        return subprocess.run([script, action], check=False).returncode

    assert act("status") == stopped
    for action in ("start", "start", "reload", "restart", "force-reload"):
        assert act(action) == 0
        assert act("status") == running
        with smtplib.SMTP("127.0.0.1", port_of(holder)) as client:
            assert client.noop()[0] == 250
    for _ in range(2):
        assert act("stop") == 0
        assert act("status") == stopped
    assert act("walk") == 2


def units() -> list[str]:
    """Return the systemd units in the manual: whole services, and a part of one."""
    blocks = literal_blocks("proxsmtpd.8")
    return [block for block in blocks if "\nExecStart=" in block]


def socket_unit() -> str:
    """Return the manual's socket unit for systemd."""
    (unit,) = (b for b in literal_blocks("proxsmtpd.8") if "\n[Socket]\n" in b)
    return unit


def parsed(unit: str) -> configparser.ConfigParser:
    """Return the sections of a unit; no line may stand twice."""
    parser = configparser.ConfigParser(interpolation=None)
    parser.read_string(unit)
    return parser


@pytest.mark.parametrize("unit", units())
def test_unit_of_the_manual_starts_the_program(unit: str) -> None:
    """The command line fits the unit's Type."""
    service = parsed(unit)["Service"]
    command, *arguments = service["ExecStart"].split()
    assert command == "/usr/local/sbin/proxsmtpd"
    options = program.parse_options(arguments)
    if service["Type"] == "forking":
        assert options.debug_level is None
        assert options.pid_file == service["PIDFile"]
        assert options.pid_file.startswith(f"/run/{service['RuntimeDirectory']}/")
    else:
        assert service["Type"] == "notify"
        assert options.debug_level == 3


def test_socket_unit_has_the_port_of_the_examples() -> None:
    assert parsed(socket_unit())["Socket"]["ListenStream"] == "127.0.0.1:10025"


@requires("systemd", "/usr/bin/systemd-analyze")
def test_systemd_knows_every_line_of_the_units(tmp_path: Path) -> None:
    assert len(units()) == 3
    files = [tmp_path / f"proxsmtpd{n}.service" for n in range(len(units()))]
    for file, unit in zip(files, units()):
        file.write_text(unit.replace("/usr/local/sbin/proxsmtpd", "/bin/true"))
    files.append(tmp_path / "proxsmtpd0.socket")
    files[-1].write_text(socket_unit())
    command = ["systemd-analyze", "verify", "--man=no", *map(str, files)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert [ln for ln in result.stderr.splitlines() if str(tmp_path) in ln] == []


@requires("systemd", "/usr/bin/systemd-analyze")
@pytest.mark.parametrize("unit", [u for u in units() if u.startswith("[Unit]")])
def test_unit_of_the_manual_is_hardly_exposed(unit: str, tmp_path: Path) -> None:
    """The one that starts as root is not much more exposed than the other."""
    file = tmp_path / "proxsmtpd.service"
    file.write_text(unit)
    command = ["systemd-analyze", "security", "--offline=true", "--no-pager", str(file)]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    exposure = re.search(r"Overall exposure level .*: ([0-9.]+) ", report)
    assert exposure
    assert float(exposure[1]) <= 4


# --- The filter's contract, the log, the command line ---


def test_manual_has_each_variable_of_the_filter() -> None:
    names = items(section("proxsmtpd.8", "Environment"), "Ev")
    assert sorted(names) == sorted(n.decode() for n in program.FILTER_VARIABLES)


def test_manual_has_each_status_of_the_log() -> None:
    names = items(section("proxsmtpd.8", "LOGGING"), "Cm")
    fields = ["client", "from", "to", "status"]
    assert [n for n in names if n in fields] == fields
    statuses = {text for name, text in vars(program.Status).items() if name.isupper()}
    assert {n for n in names if n not in fields} == statuses


def test_manual_has_each_end_of_the_dry_run() -> None:
    text = section("proxsmtpd.8", "DRY RUN")
    assert items(text, "Li") == list(program.ENDS)
    assert program.BARE_REFUSAL in rendered(text)
    numbers = f"{program.SHOWN_LINES} lines", f"{program.SHOWN_COLUMNS} characters"
    for words in (*numbers, f"{program.EXCERPT_KEPT // 1024} kilobytes"):
        assert words in rendered(text)


@pytest.mark.parametrize(
    "reply", [program.LOCAL_ERROR.text, program.CONTENT_REJECTED.decode()]
)
def test_manual_quotes_the_replies_of_the_verdict(reply: str) -> None:
    assert reply in rendered(section("proxsmtpd.8", "Verdict"))


def replies_of_the_program() -> list[str]:
    """Return all the replies that stand at the top of the module."""
    texts = (value for name, value in vars(program).items() if name.isupper())
    lines = (
        program.to_text(text).rstrip("\r\n") if isinstance(text, bytes) else str(text)
        for text in texts
    )
    return sorted(line for line in lines if re.fullmatch(r"[2-5]\d\d .+", line))


def test_manual_has_each_reply_of_the_program() -> None:
    entries = re.findall(r"^\.It (.*)", section("proxsmtpd.8", "REPLIES"), re.M)
    assert sorted(e.replace(r"\&", "") for e in entries) == replies_of_the_program()


def test_manual_names_each_removed_service_extension() -> None:
    text = section("proxsmtpd.8", "THE PATH OF A MESSAGE")
    removed = {name.decode() for name in program.REMOVED_EXTENSIONS}
    for name in removed - {"PIPE_CONNECT", "X_PIPE_CONNECT"}:  # older spellings
        assert re.search(rf"\b{name}\b", text), name


def test_usage_and_manual_have_the_same_options() -> None:
    usage = run_program("-?").stderr
    synopsis = section("proxsmtpd.8", "SYNOPSIS")
    described = items(section("proxsmtpd.8", "DESCRIPTION"), "Fl")
    in_usage = re.findall(r"-([a-z])\b", usage)
    assert sorted({*in_usage, "h"}) == sorted(described)
    assert re.findall(r"Fl ([a-z])", synopsis) == in_usage


def test_version_is_the_same_everywhere() -> None:
    shown = run_program("-v").stdout.splitlines()[0]
    assert shown == f"proxsmtpd (version {program.VERSION})"
    assert re.findall(r"^\d+\.\d+\S*$", read("NEWS"), re.M)[0] == program.VERSION
    assert f"This is version {program.VERSION}," in read("proxsmtpd.8")
    assert read("README").splitlines()[0] == f"proxsmtpd {program.VERSION}"


def test_default_configuration_file_is_the_same_everywhere() -> None:
    for name in ("proxsmtpd.8", "proxsmtpd.conf.5"):
        assert f".It Pa {program.CONFIG_FILE}\n" in section(name, "FILES")


def test_readme_names_two_commands_to_try() -> None:
    """The demonstration first, the tests second, and no third."""
    part = read("README").partition("TRY IT")[2].partition("\n\n\n")[0]
    assert re.findall(r"make \w+", part) == ["make demo", "make check"]


def test_readme_and_news_name_the_list_of_differences() -> None:
    """It is in the manual, in one piece, and there only."""
    title = "DIFFERENCES FROM PROXSMTP 1.10"
    for name in ("README", "NEWS"):
        assert f"proxsmtpd(8), {title}" in " ".join(read(name).split())
    whole = read("proxsmtpd.8").partition(f".Sh {title}\n")[2].partition("\n.Sh ")[0]
    parts = re.split(r"^\.Ss ", whole, flags=re.M)[1:]
    assert len(parts) == 7
    for part in parts:
        entries = re.findall(r"^\.It (.+)\n(?!\.It |\.El)", part, re.M)
        assert len(entries) == part.count("\n.It ") > 2


def test_manuals_refer_to_sections_that_exist() -> None:
    """`section` fails for one that does not."""
    for name in ("proxsmtpd.8", "proxsmtpd.conf.5"):
        for title in re.findall(r"^\.Sx (.*?)(?: [.,;])?$", read(name), re.M):
            section(name, title)
    elsewhere = re.findall(r"Xr proxsmtpd 8 ,\n([A-Z ]+)\.", read("proxsmtpd.conf.5"))
    assert elsewhere
    for title in elsewhere:
        section("proxsmtpd.8", title)


# --- DIAGNOSTICS ---

# What stands in capitals in an entry differs each time.
ENTRIES = re.findall(r"^\.It (.*)", section("proxsmtpd.8", "DIAGNOSTICS"), re.M)
# A function's name and the beginning of a statement that has a text for the log.
LOGGING = re.compile(
    r"\S*warnings\S* (return|found)|\S+ (self\._?)?log\.(error|warning|notice)\("
    r"|\S+ (errors|found)\.append\(|\S+ raise (?!BadProxy|File|OSError|Refusal|Usage)"
)


def pattern(text: str) -> str:
    """Return a regular expression for a text that has {} where it differs."""
    return re.sub(r"\\{\w*\\}", "(.*?)", re.escape(text))


def literals(node: ast.AST) -> Iterator[str]:
    """Find the string literals in a part of the source, as regular expressions."""
    if isinstance(node, ast.JoinedStr):
        parts = [getattr(part, "value", None) for part in node.values]
        yield pattern("".join(p if isinstance(p, str) else "{}" for p in parts))
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield pattern(node.value)
    else:
        for child in ast.iter_child_nodes(node):
            yield from literals(child)


def logged(function: ast.FunctionDef, source: ast.Module) -> Iterator[str]:
    """Find the literals that a function logs, also those that have a name there."""
    nodes = [node for node in ast.walk(function) if isinstance(node, ast.stmt)]
    texts = [n for n in nodes if LOGGING.match(f"{function.name} {ast.unparse(n)}")]
    names = {ast.unparse(part) for text in texts for part in ast.walk(text)}
    named = [n for n in (*nodes, *source.body) if isinstance(n, ast.Assign)]
    texts += [node for node in named if ast.unparse(node.targets[0]) in names]
    for text in texts:
        yield from (found for found in literals(text) if re.search(r"[a-z]\\ ", found))


@pytest.fixture(scope="module")
def source() -> ast.Module:
    """Provide the program's syntax tree, which not every process needs to build."""
    return ast.parse(read("proxsmtpd.py"))


def complaints() -> set[str]:
    """Return what is logged about settings, as regular expressions."""
    return {pattern(setting.kind.complaint) for setting in program.SETTINGS}


def can_be_made(text: str, literals: Sequence[re.Pattern[str]]) -> bool:
    """Return whether a text is one of the literals, with others in its gaps."""
    if not re.search("[a-z]", text):
        return True
    matches = (literal.fullmatch(text) for literal in literals)
    return any(
        match and all(can_be_made(gap, literals) for gap in match.groups())
        for match in matches
    )


def test_diagnostics_have_each_text_of_the_program(source: ast.Module) -> None:
    functions = [n for n in ast.walk(source) if isinstance(n, ast.FunctionDef)]
    texts = {text for each in functions for text in logged(each, source)}
    missing = [
        text
        for text in sorted(texts | complaints())
        if not any(re.search(text, entry) for entry in ENTRIES)
    ]
    assert len(texts) > 100
    assert missing == []


def test_diagnostics_are_texts_of_the_program(source: ast.Module) -> None:
    texts = {*literals(source), *complaints()}
    patterns = [re.compile(text) for text in texts if text.strip("(.*?)")]
    assert [entry for entry in ENTRIES if not can_be_made(entry, patterns)] == []
