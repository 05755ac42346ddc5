"""The set-ups of proxsmtpd(8), Encrypted connections, as they stand there.

Each is the whole configuration, but for a filter, on a machine of its own that has the
addresses, names, files and the user that the manual names.  HAProxy's is in
test_tls_peers.py, the router in test_transparent.py.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers import (
    Daemon,
    MakeServer,
    StartDaemon,
    as_root,
    poll,
    program_under_test,
    requires,
    with_mounts,
)
from manual import display
from namespaces import Namespace
from smtp import RawClient, ScriptedServer
from tls import (
    Certificates,
    client_context,
    encrypted_greeting,
    hello_by_tls,
    is_encrypted,
    server_context,
    start_tls,
    starttls,
)

TITLE = "Encrypted connections"
HOST_OF_THE_BORDER = "192.0.2.25"
PROVIDER = "192.0.2.26"
USER = 64990  # a number that is free
LOGIN = ("--auth", "PLAIN", "--auth-user", "user", "--auth-password", "secret")
REFUSE = "FilterCommand: echo 550 5.7.1 Refused >&2; exit 1\n"
SHOW = 'FilterCommand: printf "X-TLS: %s\\r\\n" "$TLS"; exec cat\n'

pytestmark = [
    as_root,
    with_mounts,
    requires("iproute2", "/usr/sbin/ip"),
    requires("swaks", "/usr/bin/swaks"),
]


class Machine:
    """A machine with files of its own, and the network of the servers beside it."""

    def __init__(
        self,
        place: Path,
        certificates: Certificates,
        proxsmtpd: StartDaemon,
        make_server: MakeServer,
    ) -> None:
        self.ssl, self.run = place / "ssl", place / "run"
        self._place, self._certificates = place, certificates
        self._proxsmtpd, self._make_server = proxsmtpd, make_server
        (self.ssl / "certs").mkdir(parents=True)
        self.run.mkdir()
        self.install("good", "mail.example.pem")
        shutil.copy(certificates.other_ca, self.ssl / "private-authority.pem")
        shutil.copy(certificates.ca, self.ssl / "certs" / "ca-certificates.crt")
        self._append("passwd", f"_proxsmtp:x:{USER}:{USER}::/nonexistent:/bin/false")
        self._append("group", f"_proxsmtp:x:{USER}:")
        self._append("hosts", f"{PROVIDER} smtp.example.com")
        self._inside, self._outside = Namespace(), Namespace()
        other = self._outside.path
        self._inside.configure(f"link add eth0 type veth peer eth0 netns {other}")
        for namespace, addresses in (
            (self._inside, ("192.0.2.1",)),
            (self._outside, (HOST_OF_THE_BORDER, PROVIDER)),
        ):
            namespace.configure(
                *("link set lo up", "link set eth0 up"),
                *(f"address add {address}/24 dev eth0" for address in addresses),
            )

    def close(self) -> None:
        self._inside.close()
        self._outside.close()

    def install(self, name: str, file: str) -> None:
        """Put a certificate with its key where the daemon finds it."""
        path = self.ssl / file
        shutil.copy(self._certificates.path(name), path)
        path.chmod(0o640)
        os.chown(path, 0, USER)

    def _append(self, name: str, line: str) -> None:
        lines = Path("/etc", name).read_text().splitlines()
        others = [other for other in lines if not other.startswith("_proxsmtp:")]
        (self._place / name).write_text("\n".join([*others, line, ""]))

    def start(self, configuration: str) -> Daemon:
        """Return a daemon with this configuration."""
        places = {self.ssl: "/etc/ssl", self.run: "/run"}
        for name in ("passwd", "group", "hosts"):
            places[self._place / name] = f"/etc/{name}"
        mounts = [shlex.join(["mount", "--bind", str(a), b]) for a, b in places.items()]
        script = " && ".join([*mounts, 'exec "$@"'])
        program = ["unshare", "--mount", "sh", "-c", script, "sh"]
        text = f"{configuration}TempDirectory: {self._place}/temp\n"
        with self._inside.inside():
            return self._proxsmtpd(text, program=[*program, *program_under_test()])

    def server(self, host: str, port: int) -> ScriptedServer:
        """Return a server on this machine or beyond it."""
        is_here = host.startswith("127.")
        with (self._inside if is_here else self._outside).inside():
            return self._make_server(host=host, port=port)

    def encrypting_server(self, host: str, port: int, name: str) -> ScriptedServer:
        """Return a server that offers STARTTLS, or is greeted in TLS at port 465."""
        context = server_context(self._certificates.path(name))
        server = self.server(host, port)
        if port == 465:
            server.script["GREETING"] = encrypted_greeting(context)
        server.script["EHLO"] = hello_by_tls([b"STARTTLS"], [b"XCLIENT NAME ADDR"])
        server.script["STARTTLS"] = starttls(context)
        return server

    def swaks(self, *options: str) -> subprocess.CompletedProcess[str]:
        """Send a message with swaks."""
        command = ["swaks", "--from", "a@example.com", "--to", "b@example.net"]
        with self._inside.inside():
            return subprocess.run(
                [*command, "--ehlo", "client.example", *options],
                capture_output=True,
                text=True,
                timeout=30,
                check=False,
            )

    def client(self, port: int) -> RawClient:
        """Return a client that has not been greeted."""
        with self._inside.inside():
            return RawClient(("127.0.0.1", port))


@pytest.fixture
def tmp_path(place: Path) -> Path:
    """Provide a directory in which User can read the configuration."""
    return place


@pytest.fixture
def machine(
    place: Path,
    certificates: Certificates,
    proxsmtpd: StartDaemon,
    make_server: MakeServer,
) -> Iterator[Machine]:
    """Provide a machine with what the manual names."""
    with contextlib.closing(
        Machine(place, certificates, proxsmtpd, make_server)
    ) as made:
        yield made


@pytest.mark.parametrize("port", [465, 587])
def test_users_who_log_in(port: int, machine: Machine) -> None:
    """Their mail skips the filter, and no password crosses the network in clear."""
    server = machine.server("127.0.0.1", 10587)
    server.script["EHLO"] = b"250-sink.example\r\n250 AUTH PLAIN LOGIN\r\n"
    text = display("proxsmtpd.8", TITLE, "Skip: authenticated")
    option = "--tls-on-connect"
    if port == 587:
        text = text.replace("465", "587").replace("implicit", "require")
        option = "--tls"
    daemon = machine.start(text + REFUSE)
    where = ("--server", "127.0.0.1", "--port", str(port))
    done = machine.swaks(*where, option, *LOGIN)
    assert done.returncode == 0, done.stdout
    server.wait_message()
    daemon.wait_log(r"CLIENT encrypted: TLSv1\.3 ")
    daemon.wait_log(r"status=SKIPPED$")
    done = machine.swaks(*where, option)
    assert " 550 5.7.1 Refused" in done.stdout
    if port == 587:
        done = machine.swaks(*where, *LOGIN)
        assert "AUTH" not in " ".join(
            line for line in done.stdout.splitlines() if line.startswith("<-")
        )
    assert len(server.messages) == 1


@pytest.mark.parametrize("option", ["--tls", "--timeout=30"], ids=["tls", "clear"])
def test_other_mail_servers(option: str, machine: Machine) -> None:
    server = machine.encrypting_server(HOST_OF_THE_BORDER, 25, "self-signed")
    text = display("proxsmtpd.8", TITLE, "Listen: [::]:25\n")
    daemon = machine.start(text + SHOW)
    done = machine.swaks("--server", "127.0.0.1", option)
    assert done.returncode == 0, done.stdout
    message = server.wait_message()
    assert is_encrypted(message.connection)
    is_tls = option == "--tls"
    assert message.data.startswith(b"X-TLS: TLSv1.3" if is_tls else b"X-TLS: \r\n")
    assert any(line.startswith(b"XCLIENT ") for line in message.connection.lines)
    assert ("CLIENT encrypted: " in daemon.log()) == is_tls


# The port, the server's certificate, what is added, and whether it is right.
PROVIDERS = {
    "right": (587, "provider", "", True),
    "wrong name": (587, "good", "", False),
    "private authority": (587, "private-provider", "", False),
    "trusted": (587, "private-provider", "OutTlsTrust", True),
    "port 465": (465, "provider", "OutTls: implicit", True),
}


@pytest.mark.parametrize(
    ("port", "certificate", "change", "is_right"), PROVIDERS.values(), ids=PROVIDERS
)
def test_a_providers_server(
    port: int, certificate: str, change: str, is_right: bool, machine: Machine
) -> None:
    server = machine.encrypting_server(PROVIDER, port, certificate)
    text = display("proxsmtpd.8", TITLE, "OutTls: verify\n")
    if change == "OutTlsTrust":
        text += f"{change}: /etc/ssl/private-authority.pem\n"
    elif change:
        text = text.replace("OutTls: verify", change).replace("587", "465")
    machine.start(text + SHOW)
    done = machine.swaks("--server", "127.0.0.1", "--port", "10025")
    assert (done.returncode == 0) == is_right, done.stdout
    if not is_right:
        assert "421 Connection to server cannot be encrypted" in done.stdout
    assert len(server.messages) == is_right


def test_certificate_that_certbot_renews(
    machine: Machine, certificates: Certificates, tmp_path: Path
) -> None:
    """The hook runs as root, and the daemon reads the file as its User."""
    machine.server("127.0.0.1", 10587)
    text = display("proxsmtpd.8", TITLE, "Skip: authenticated")
    daemon = machine.start(f"{text}{SHOW}PidFile: /run/proxsmtpd.pid\n")
    lineage = tmp_path / "lineage"
    lineage.mkdir()
    for kind, name in (("pem", "fullchain"), ("key", "privkey")):
        source = certificates.directory / f"renewed.{kind}"
        shutil.copy(source, lineage / f"{name}.pem")
    hook = tmp_path / "hook"
    hook.write_text(display("proxsmtpd.8", TITLE, "RENEWED_LINEAGE"))
    hook.chmod(0o755)
    inside = ["nsenter", "--mount", "--target", str(daemon.process.pid)]
    environment = {**os.environ, "RENEWED_LINEAGE": str(lineage)}
    subprocess.run([*inside, str(hook)], env=environment, check=True, timeout=30)

    def subject() -> str:
        with machine.client(465) as client:
            sock = start_tls(client, client_context(certificates.ca))
            return str(sock.getpeercert())

    assert poll(lambda: "renewed" in subject()), daemon.log()
