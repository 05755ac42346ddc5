"""TLS for the tests: certificates that openssl makes, and scripted peers that use them.

The names of the certificates are NAMES; all are for server.example and 127.0.0.1,
and signed by the authority in `ca.pem`, if their name does not say otherwise.  The
other authority has signed `other` and `private-provider`.
"""

from __future__ import annotations

import contextlib
import fcntl
import ssl
import subprocess
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from smtp import Action, RawClient, Recorded, Reply, ScriptedServer, multiline

HOST = "server.example"
NAMES = (
    "good",
    "renewed",
    "wrong-name",
    "expired",
    "expiring",
    "self-signed",
    "provider",
)
_HOSTS = {
    "wrong-name": "wrong.example",
    "provider": "smtp.example.com",
    "private-provider": "smtp.example.com",
}
READY = b"220 2.0.0 Ready to start TLS\r\n"
GREETING = b"220 sink.example ESMTP\r\n"

_NEW_KEY = "-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes"
_DAYS = {"expired": -1, "expiring": 5}


class Certificates:
    """Certificates in a directory: NAME.pem, NAME.key and, in one file, NAME.both.

    The first process that needs them makes them for all that name this directory.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.ca, self.other_ca = (
            str(directory / f"{name}.pem") for name in ("ca", "other-ca")
        )
        with open(f"{directory}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not directory.exists():
                self._make_all()

    def _make_all(self) -> None:
        self.directory.mkdir()
        for name in ("ca", "other-ca"):
            self._make_authority(name)
        for name in NAMES:
            self._make(name)
        for name in ("other", "private-provider"):
            self._make(name, authority="other-ca")
        self._openssl("ec -aes128 -passout pass:secret -in good.key -out locked.key")

    def path(self, name: str) -> str:
        """Return the path of a certificate with its key."""
        return str(self.directory / f"{name}.both")

    def context(self) -> ssl.SSLContext:
        """Return the context of a server with the good certificate."""
        return server_context(self.path("good"))

    def _openssl(self, words: str, *more: str) -> None:
        subprocess.run(
            ["openssl", *words.split(), *more],
            cwd=self.directory,
            check=True,
            capture_output=True,
            timeout=60,
        )

    def _make_authority(self, name: str) -> None:
        words = f"req -x509 {_NEW_KEY} -keyout {name}.key -out {name}.pem -days 30"
        self._openssl(words, "-subj", f"/CN={name} of the tests")

    def _make(self, name: str, authority: str = "ca") -> None:
        host = _HOSTS.get(name, f"{HOST},IP:127.0.0.1")
        names = f"subjectAltName=DNS:{host}"
        subject = ("-subj", f"/CN={name}")
        days = _DAYS.get(name, 30)
        if name == "self-signed":
            words = f"req -x509 {_NEW_KEY} -keyout {name}.key -out {name}.pem -days 30"
            leaf = "basicConstraints=critical,CA:FALSE"
            self._openssl(words, *subject, "-addext", names, "-addext", leaf)
        else:
            words = f"req -new {_NEW_KEY} -keyout {name}.key -out {name}.csr"
            self._openssl(words, *subject)
            (self.directory / f"{name}.ext").write_text(names + "\n")
            self._openssl(
                f"x509 -req -in {name}.csr -CA {authority}.pem -CAkey {authority}.key"
                f" -CAcreateserial -days {days} -extfile {name}.ext -out {name}.pem"
            )
        parts = [self.directory / f"{name}{end}" for end in (".pem", ".key")]
        (self.directory / f"{name}.both").write_text(
            "".join(part.read_text() for part in parts)
        )


def old_version(context: ssl.SSLContext) -> ssl.SSLContext:
    """Let a context offer TLS 1.1 and nothing else."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = ssl.TLSVersion.TLSv1_1
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    context.set_ciphers("ALL:@SECLEVEL=0")
    return context


def server_context(path: str) -> ssl.SSLContext:
    """Return the context of a scripted server with this certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    return context


def client_context(authority: str = "") -> ssl.SSLContext:
    """Return the context of a client, which verifies if there is an authority."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = bool(authority)
    context.verify_mode = ssl.CERT_REQUIRED if authority else ssl.CERT_NONE
    if authority:
        context.load_verify_locations(authority)
    return context


def listen_tls(mode: str, certificate: str, **settings: object) -> dict[str, object]:
    """Return settings for the clients' side."""
    return {"ListenTls": mode, "ListenCertificate": certificate, **settings}


def both_sides(certificates: Certificates) -> dict[str, object]:
    """Return settings with which a client may use TLS, and the server has to."""
    return {**listen_tls("may", certificates.path("good")), "OutTls": "require"}


# --- The scripted server ---


def starttls(context: ssl.SSLContext, ready: bytes = READY) -> Reply:
    """Return a script's reply to STARTTLS that does as asked."""

    def start(connection: Recorded, _line: bytes) -> None:
        connection.sock.sendall(ready)
        encrypt(connection, context)

    return start


def encrypted_greeting(context: ssl.SSLContext, greeting: bytes = GREETING) -> Reply:
    """Return a script's greeting in TLS, as on port 465."""

    def greet(connection: Recorded, _line: bytes) -> None:
        encrypt(connection, context)
        connection.sock.sendall(greeting)

    return greet


def encrypt(connection: Recorded, context: ssl.SSLContext) -> None:
    """Go on in TLS as the server."""
    wrap(connection, context).do_handshake()


def wrap(connection: Recorded, context: ssl.SSLContext) -> ssl.SSLSocket:
    """Put TLS into a connection, before the handshake: others may end it there."""
    connection.sock = sock = context.wrap_socket(
        connection.sock, server_side=True, do_handshake_on_connect=False
    )
    return sock


def is_encrypted(connection: Recorded) -> bool:
    """Return whether a connection to the scripted server has come to use TLS."""
    return isinstance(connection.sock, ssl.SSLSocket)


def hello(*extensions: bytes) -> bytes:
    """Return an EHLO reply with these service extensions."""
    return multiline(b"250", [b"sink.example", b"PIPELINING", *extensions])


def hello_by_tls(in_clear: Sequence[bytes], in_tls: Sequence[bytes]) -> Reply:
    """Return EHLO replies that differ with TLS, as real servers' do."""

    def answer(connection: Recorded, _line: bytes) -> bytes:
        return hello(*(in_tls if is_encrypted(connection) else in_clear))

    return answer


class TlsServer(ScriptedServer):
    """A scripted server that is used after STARTTLS; the script is for what follows.

    In clear it answers EHLO and STARTTLS by itself, and `lines` forgets them.
    """

    def __init__(self, context: ssl.SSLContext, *args: Any, **kwargs: Any) -> None:
        self._context = context
        super().__init__(*args, **kwargs)

    def _act(self, verb: str, connection: Recorded, line: bytes) -> Action | None:
        if is_encrypted(connection) or verb not in ("EHLO", "STARTTLS"):
            return super()._act(verb, connection, line)
        if verb == "EHLO":
            return hello(b"STARTTLS")
        connection.sock.sendall(READY)
        connection.lines.clear()
        sock = wrap(connection, self._context)
        if self._stopped.is_set():
            raise OSError("closed while this was another socket")
        sock.do_handshake()
        return None


# --- The client ---


def start_tls(
    client: RawClient, context: ssl.SSLContext, name: str = HOST
) -> ssl.SSLSocket:
    """Shake hands as the client, whose 220 or connection has come."""
    sock = context.wrap_socket(client.sock, server_hostname=name)
    client.sock = sock
    return sock


class TlsClient(RawClient):
    """A client that sends STARTTLS as soon as it is greeted; else as in clear."""

    _awaits_greeting = True

    def stay_in_clear(self) -> None:
        """Read the greeting and leave it at that."""
        self._awaits_greeting = False

    def reply(self) -> bytes:
        """Return one whole reply.

        After the greeting TLS has been started.  If that is refused with 421, as when
        the server has gone meanwhile, this stands for the greeting.
        """
        reply = super().reply()
        if self._awaits_greeting:
            self._awaits_greeting = False
            if reply.startswith(b"220"):
                return self._start_tls() or reply
        return reply

    def _start_tls(self) -> bytes:
        """Shake hands; a ConnectionError if the connection ends meanwhile.

        Returns the refusal, if there is one.
        """
        self.send(b"STARTTLS\r\n")
        if self.at_end():
            raise ConnectionAbortedError("end of the connection after STARTTLS")
        reply = super().reply()
        if reply.startswith(b"421"):
            return reply
        assert reply.startswith(b"220"), reply
        with broken_off():
            start_tls(self, client_context())
        return b""

    def send(self, data: bytes) -> None:
        """Send these octets."""
        with broken_off():
            super().send(data)


@contextlib.contextmanager
def broken_off() -> Iterator[None]:
    """Turn the end of a connection, as ssl reports it, into a ConnectionError."""
    try:
        yield
    except (ssl.SSLEOFError, ssl.SSLZeroReturnError) as error:
        raise ConnectionAbortedError(str(error)) from error


def encrypted(client: RawClient, helo: bytes = b"EHLO client.example") -> bytes:
    """Take a new connection through STARTTLS; return the second EHLO's reply."""
    assert client.reply().startswith(b"220")
    client.expect(helo, b"250")
    client.expect(b"STARTTLS", b"220")
    start_tls(client, client_context())
    return client.expect(helo, b"250")
