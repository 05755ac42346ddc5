"""TLS with real peers: mail programs, Postfix, Exim, HAProxy and OpenSSL's client.

client -- ListenTls -- proxsmtpd -- OutTls -- server
"""

from __future__ import annotations

import re
import shutil
import smtplib
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Callable

import pytest

from haproxy import HAPROXY, LISTEN, HAProxy
from helpers import (
    MESSAGE,
    PEER_PATIENCE,
    Daemon,
    MakeFilter,
    StartDaemon,
    as_root,
    deliver,
    port_of,
    requires,
    reserve_port,
)
from manual import display
from mtas import EXIM, Peer
from postfix import (
    POSTFIX,
    RECIPIENT,
    SENDER,
    PrivatePostfix,
    Service,
    require_root,
    smtp,
    smtpd,
)
from smtp import ScriptedServer
from tls import HOST, Certificates


@pytest.fixture
def readable(certificates: Certificates, place: Path) -> Path:
    """Provide a directory with the certificates that all users can read."""
    for file in certificates.directory.iterdir():
        shutil.copy(file, place / file.name)
        (place / file.name).chmod(0o644)
    return place


# --- Mail programs ---

SCRIPT = """
import smtplib, ssl, sys
mode, port, authority = sys.argv[1:]
context = ssl.create_default_context(cafile=authority)
if mode == "implicit":
    client = smtplib.SMTP_SSL("127.0.0.1", int(port), context=context)
else:
    client = smtplib.SMTP("127.0.0.1", int(port))
    client.starttls(context=context)
client.sendmail("a@example.com", ["b@example.net"], sys.stdin.read())
client.quit()
"""


def swaks(*options: str) -> Callable[[int, str], list[str]]:
    return lambda port, _authority: [
        *("swaks", "--server", "127.0.0.1", "--port", str(port)),
        *("--from", SENDER, "--to", RECIPIENT, "--data", "-", *options),
        *("--ehlo", "client.example"),
    ]


def msmtp(*options: str) -> Callable[[int, str], list[str]]:
    return lambda port, authority: [
        *("msmtp", "--host=127.0.0.1", f"--port={port}", f"--from={SENDER}"),
        *("--tls=on", f"--tls-trust-file={authority}", *options, RECIPIENT),
    ]


def curl(scheme: str, *options: str) -> Callable[[int, str], list[str]]:
    return lambda port, authority: [
        *("curl", "-q", "-sS", f"{scheme}://127.0.0.1:{port}/client.example"),
        *("-T", "-", "--mail-from", SENDER, "--mail-rcpt", RECIPIENT),
        *("--cacert", authority, *options),
    ]


def python(mode: str) -> Callable[[int, str], list[str]]:
    return lambda port, authority: [
        *(sys.executable, "-c", SCRIPT, mode, str(port), authority)
    ]


SWAKS = requires("swaks", "/usr/bin/swaks")
MSMTP = requires("msmtp", "/usr/bin/msmtp")
CURL = requires("curl", "/usr/bin/curl")

# ListenTls, the client's command line, and whether it is encrypted.
PROGRAMS = [
    pytest.param("may", swaks(), False, id="swaks-clear", marks=SWAKS),
    pytest.param("may", swaks("--tls"), True, id="swaks-tls", marks=SWAKS),
    pytest.param("require", swaks("--tls"), True, id="swaks-require", marks=SWAKS),
    pytest.param(
        "off", swaks("--tls-optional"), False, id="swaks-optional-off", marks=SWAKS
    ),
    pytest.param(
        "may", swaks("--tls-optional"), True, id="swaks-optional", marks=SWAKS
    ),
    pytest.param(
        "may",
        swaks("--tls", "--tls-protocol", "tlsv1_2"),
        True,
        id="swaks-tls-1.2",
        marks=SWAKS,
    ),
    pytest.param(
        "implicit", swaks("--tls-on-connect"), True, id="swaks-on-connect", marks=SWAKS
    ),
    pytest.param("require", msmtp(), True, id="msmtp", marks=MSMTP),
    pytest.param(
        "implicit", msmtp("--tls-starttls=off"), True, id="msmtp-implicit", marks=MSMTP
    ),
    pytest.param("require", curl("smtp", "--ssl-reqd"), True, id="curl", marks=CURL),
    pytest.param("implicit", curl("smtps"), True, id="curl-implicit", marks=CURL),
    pytest.param("require", python("starttls"), True, id="smtplib"),
    pytest.param("implicit", python("implicit"), True, id="smtplib-implicit"),
]


@pytest.mark.parametrize(("mode", "command", "is_encrypted"), PROGRAMS)
def test_mail_program(
    mode: str,
    command: Callable[[int, str], list[str]],
    is_encrypted: bool,
    certificates: Certificates,
    proxsmtpd: StartDaemon,
    server: ScriptedServer,
) -> None:
    daemon = proxsmtpd(
        {"ListenTls": mode, "ListenCertificate": certificates.path("good")}
    )
    done = subprocess.run(
        command(daemon.port, certificates.ca),
        input=MESSAGE.replace(b"\r\n", b"\n"),
        capture_output=True,
        timeout=PEER_PATIENCE,
        check=False,
    )
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert b"Hello" in server.wait_message().data
    assert ("CLIENT encrypted: " in daemon.log()) == is_encrypted


@requires("openssl", "/usr/bin/openssl")
@pytest.mark.parametrize("version", ["tls1_2", "tls1_3"])
@pytest.mark.parametrize("mode", ["may", "implicit"])
def test_openssl(
    mode: str, version: str, certificates: Certificates, proxsmtpd: StartDaemon
) -> None:
    """It verifies, and sees the end announced."""
    daemon = proxsmtpd(
        {"ListenTls": mode, "ListenCertificate": certificates.path("good")}
    )
    done = subprocess.run(
        [
            *("openssl", "s_client", "-connect", f"127.0.0.1:{daemon.port}"),
            *(f"-{version}", "-crlf", "-ign_eof", "-verify_return_error"),
            *("-CAfile", certificates.ca, "-verify_hostname", HOST),
            *(("-starttls", "smtp") if mode == "may" else ()),
        ],
        input=b"EHLO client.example\nQUIT\n",
        capture_output=True,
        timeout=PEER_PATIENCE,
        check=False,
    )
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert b"Verify return code: 0 (ok)" in done.stdout
    assert b"\n221 2.0.0 Bye\r\n" in done.stdout
    assert b"unexpected eof" not in done.stderr


# --- Postfix ---

TLS_MANAGER = Service("tlsmgr", "unix", "tlsmgr", process_limit="1")


def through_postfix(
    daemon: Daemon, level: str, place: Path, **options: str
) -> PrivatePostfix:
    """Return a Postfix that sends all mail to a daemon."""
    with reserve_port() as holder:
        entrance = port_of(holder)
    main = {"content_filter": f"out:[127.0.0.1]:{daemon.port}"}
    client = {
        "smtp_tls_security_level": level,
        "smtp_tls_CAfile": f"{place}/ca.pem",
        "smtp_tls_verify_cert_match": HOST,
        "smtp_tls_loglevel": "1",
        **options,
    }
    services = [TLS_MANAGER, smtpd(entrance), smtp("out", client)]
    postfix = PrivatePostfix(services, main)
    postfix.entrance = entrance  # type: ignore[attr-defined]
    return postfix


# ListenTls, the client's level and options, and whether mail comes encrypted; None for
# a bounce.
POSTFIX_CLIENTS: Mapping[str, tuple[str, str, Mapping[str, str], bool | None]] = {
    "none": ("may", "none", {}, False),
    "none-require": ("require", "none", {}, None),
    "may": ("may", "may", {}, True),
    "may-off": ("off", "may", {}, False),
    "encrypt": ("require", "encrypt", {}, True),
    "verify": ("require", "verify", {}, True),
    "wrapper": ("implicit", "encrypt", {"smtp_tls_wrappermode": "yes"}, True),
}


@as_root
@requires("postfix", POSTFIX)
@pytest.mark.parametrize(
    ("mode", "level", "options", "is_encrypted"),
    POSTFIX_CLIENTS.values(),
    ids=POSTFIX_CLIENTS.keys(),
)
def test_postfix_as_client(
    mode: str,
    level: str,
    options: Mapping[str, str],
    is_encrypted: bool | None,
    readable: Path,
    proxsmtpd: StartDaemon,
    server: ScriptedServer,
) -> None:
    require_root()
    settings = {"ListenTls": mode, "ListenCertificate": readable / "good.both"}
    daemon = proxsmtpd(settings)
    with through_postfix(daemon, level, readable, **options) as postfix:
        send_to_port(postfix.entrance)  # type: ignore[attr-defined]
        if is_encrypted is None:
            postfix.wait_log(r"530 5\.7\.0 Must issue a STARTTLS command first")
            assert server.messages == []
            return
        assert b"Hello" in server.wait_message(timeout=PEER_PATIENCE).data
        assert ("CLIENT encrypted: " in daemon.log()) == is_encrypted
        if level == "verify":
            postfix.wait_log(r"Verified TLS connection established")


def send_to_port(port: int) -> None:
    with smtplib.SMTP("127.0.0.1", port, "client.example") as client:
        client.sendmail(SENDER, [RECIPIENT], MESSAGE)


TLS_1_1_ONLY = {
    "smtpd_tls_security_level": "may",
    "smtpd_tls_protocols": "TLSv1.1",
    "smtpd_tls_ciphers": "medium",
    "tls_medium_cipherlist": "ALL:@SECLEVEL=0",
}

# OutTls, the server's options, and whether mail goes there encrypted; None for a 421.
POSTFIX_SERVERS: Mapping[str, tuple[str, Mapping[str, str], bool | None]] = {
    "none-may": ("may", {"smtpd_tls_security_level": "none"}, False),
    "none-require": ("require", {"smtpd_tls_security_level": "none"}, None),
    "may-may": ("may", {"smtpd_tls_security_level": "may"}, True),
    "may-off": ("off", {"smtpd_tls_security_level": "may"}, False),
    "encrypt-require": ("require", {"smtpd_tls_security_level": "encrypt"}, True),
    "encrypt-verify": ("verify", {"smtpd_tls_security_level": "encrypt"}, True),
    "tls-1.2": (
        "verify",
        {
            "smtpd_tls_security_level": "encrypt",
            "smtpd_tls_mandatory_protocols": "TLSv1.2",
        },
        True,
    ),
    "tls-1.1-may": ("may", TLS_1_1_ONLY, False),
    "tls-1.1-verify": ("verify", TLS_1_1_ONLY, None),
    "wrapper-implicit": ("implicit", {"smtpd_tls_wrappermode": "yes"}, True),
    "wrong-name": (
        "verify",
        {"smtpd_tls_security_level": "may", "smtpd_tls_chain_files": "wrong-name"},
        None,
    ),
    "expired": (
        "verify",
        {"smtpd_tls_security_level": "may", "smtpd_tls_chain_files": "expired"},
        None,
    ),
    "other-authority": (
        "verify",
        {"smtpd_tls_security_level": "may", "smtpd_tls_chain_files": "other"},
        None,
    ),
}


def chain_of(readable: Path, name: str) -> str:
    """Return a file as Postfix wants it: the key first."""
    path = readable / f"{name}.chain"
    path.write_text(
        (readable / f"{name}.key").read_text() + (readable / f"{name}.pem").read_text()
    )
    return str(path)


@as_root
@requires("postfix", POSTFIX)
@pytest.mark.parametrize(
    ("mode", "options", "is_encrypted"),
    POSTFIX_SERVERS.values(),
    ids=POSTFIX_SERVERS.keys(),
)
def test_postfix_as_server(
    mode: str,
    options: Mapping[str, str],
    is_encrypted: bool | None,
    readable: Path,
    proxsmtpd: StartDaemon,
) -> None:
    require_root()
    name = options.get("smtpd_tls_chain_files", "good")
    server = {**options, "smtpd_tls_chain_files": chain_of(readable, name)}
    with reserve_port() as holder:
        port = port_of(holder)
        settings = {"OutAddress": f"127.0.0.1:{port}", "OutTls": mode}
        if mode in ("verify", "implicit"):
            settings.update({"OutTlsName": HOST, "OutTlsTrust": f"{readable}/ca.pem"})
        daemon = proxsmtpd({**settings, "XClient": "on"})
        xclient = {"smtpd_authorized_xclient_hosts": "127.0.0.1"}
        service = smtpd(port, {**server, **xclient})
        with PrivatePostfix([TLS_MANAGER, service]) as postfix:
            if is_encrypted is None:
                reply = daemon.connect(timeout=PEER_PATIENCE).reply()
                assert reply.startswith(b"421 Connection to server cannot be enc")
                return
            assert deliver(daemon).startswith(b"250 ")
            (mail,) = postfix.wait_mails(1)
            assert ("ESMTPS" in (mail.header("Received") or "")) == is_encrypted
            has_failed = "alert protocol version; going on without" in daemon.log()
            assert has_failed == (options is TLS_1_1_ONLY)
            version = options.get("smtpd_tls_mandatory_protocols", "")
            assert (f"SERVER encrypted: {version}" in daemon.log()) == is_encrypted


# --- Exim ---


IN_CLEAR = r" => b@elsewhere\.example .* T=elsewhere (?!.* X=TLS)"
ENCRYPTED = r" => b@elsewhere\.example .* X=TLS1\.3:\S+ CV=%s "
VERIFYING = ("tls_verify_hosts = *", "tls_verify_certificates = @AUTHORITY@")

# ListenTls, options of Exim's transport, what Exim logs, and whether mail comes
# encrypted; None if it must not come.  The default is opportunistic.
EXIM_CLIENTS: Mapping[str, tuple[str, Sequence[str], str, bool | None]] = {
    "off": ("off", (), IN_CLEAR, False),
    "opportunistic": ("may", (), ENCRYPTED % "no", True),
    "required": ("require", ("hosts_require_tls = *",), ENCRYPTED % "no", True),
    "required-off": (
        *("off", ("hosts_require_tls = *",)),
        *("a TLS session is required, but the server did not offer TLS", None),
    ),
    "verified": ("require", VERIFYING, ENCRYPTED % "yes", True),
    "verified-other-authority": (
        *("require", (VERIFYING[0], "tls_verify_certificates = @OTHER@")),
        *("TLS session: .*certificate verification failed", None),
    ),
    "on-connect": ("implicit", ("protocol = smtps",), ENCRYPTED % "no", True),
    "on-connect-verified": (
        *("implicit", ("protocol = smtps", *VERIFYING), ENCRYPTED % "yes", True),
    ),
}


@as_root
@requires(EXIM.package, EXIM.program)
@pytest.mark.parametrize(
    ("mode", "options", "log", "is_encrypted"),
    EXIM_CLIENTS.values(),
    ids=EXIM_CLIENTS.keys(),
)
def test_exim_as_client(
    mode: str,
    options: Sequence[str],
    log: str,
    is_encrypted: bool | None,
    readable: Path,
    proxsmtpd: StartDaemon,
    server: ScriptedServer,
) -> None:
    """The certificate has 127.0.0.1, which is the server's name to Exim."""
    daemon = proxsmtpd({"ListenTls": mode, "ListenCertificate": readable / "good.both"})
    lines = "".join(f"  {option}\n" for option in options)
    lines = lines.replace("@AUTHORITY@", f"{readable}/ca.pem")
    lines = lines.replace("@OTHER@", f"{readable}/other-ca.pem")
    marker = "  port = ${readfile"
    configuration = EXIM.configuration.replace(marker, lines + marker)
    with Peer(replace(EXIM, configuration=configuration)) as exim:
        exim.send_to(daemon.port)
        host, _, port = exim.address.rpartition(":")
        with smtplib.SMTP(host, int(port), "client.example") as client:
            client.sendmail(SENDER, ["b@elsewhere.example"], MESSAGE)
        exim.wait_log(log)
    if is_encrypted is None:
        assert server.messages == []
    else:
        assert b"Hello" in server.wait_message().data
        # With TLS 1.3 a handshake is complete for us before Exim has verified.
        assert ("CLIENT encrypted: " in daemon.log()) == is_encrypted


@as_root
@requires(EXIM.package, EXIM.program)
@pytest.mark.parametrize("mode", ["off", "may", "require", "verify"])
def test_exim_as_server(mode: str, readable: Path, proxsmtpd: StartDaemon) -> None:
    place = f"tls_certificate = {readable}/good.both\ntls_advertise_hosts = *\n"
    kind = replace(EXIM, configuration=place + EXIM.configuration)
    with Peer(kind) as exim:
        settings = {"OutAddress": exim.address, "OutTls": mode}
        if mode == "verify":
            settings.update({"OutTlsName": HOST, "OutTlsTrust": f"{readable}/ca.pem"})
        daemon = proxsmtpd(settings)
        reply = deliver(daemon, recipients=(RECIPIENT.encode().join((b"<", b">")),))
        assert reply.startswith(b"250 OK")
        exim.wait_mails(1)
    assert ("SERVER encrypted: " in daemon.log()) == (mode != "off")


# --- HAProxy ---


@requires("haproxy", HAPROXY)
def test_haproxy_that_ends_tls(
    certificates: Certificates,
    proxsmtpd: StartDaemon,
    server: ScriptedServer,
    filter_script: MakeFilter,
    tmp_path: Path,
) -> None:
    tell = filter_script('printf "X-TLS: %s\\r\\n" "$TLS"; exec cat')
    daemon = proxsmtpd({"ProxyProtocol": "on", "FilterCommand": tell})
    with reserve_port() as holder:
        address = f"127.0.0.1:{port_of(holder)}"
        bind = display("proxsmtpd.8", "Encrypted connections", "bind :465")
        bind = bind.replace(":465", address).replace(
            "/etc/haproxy/mail.example.pem", certificates.path("good")
        )
        listen = re.sub(r" +bind .*\n", bind, LISTEN)
        listen = re.sub(
            r"default-server .*", r"\g<0> send-proxy-v2-ssl", listen, count=1
        )
        listen += f"    server a 127.0.0.1:{daemon.port}\n"
        with HAProxy(tmp_path, listen, address):
            done = subprocess.run(
                python("implicit")(port_of(holder), certificates.ca),
                input=MESSAGE,
                capture_output=True,
                timeout=PEER_PATIENCE,
                check=False,
            )
            assert done.returncode == 0, done.stderr
    assert server.wait_message().data.startswith(b"X-TLS: TLSv1.3")
    daemon.wait_log(r"PROXY header from: 127\.0\.0\.1$")
