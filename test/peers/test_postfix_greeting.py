"""Greetings that a real Postfix reads, as our client, and gives, as our server."""

from __future__ import annotations

import re
import socket
import threading
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING

import pytest

from helpers import MakeServer, StartDaemon, port_of, requires, reserve_port
from postfix import POSTFIX, PrivatePostfix, Service, require_root, smtp, smtpd
from smtp import RawClient

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

POSTSCREEN = "/usr/lib/postfix/sbin/postscreen"
MESSAGE = b"Subject: hello\r\n\r\nhello\r\n"

pytestmark = requires("postfix", POSTFIX)


@pytest.fixture
def at_end() -> Iterator[ExitStack]:
    """What closes all that a test opens."""
    require_root()
    with ExitStack() as stack:
        yield stack


# --- A client that looks for ESMTP in the greeting ---


@pytest.mark.parametrize(
    ("greeting", "hello"),
    [(b"220 sink.example ESMTP\r\n", b"EHLO"), (b"220 sink.example\r\n", b"HELO")],
    ids=["ESMTP", "SMTP"],
)
def test_client_that_does_not_always_say_ehlo(
    greeting: bytes,
    hello: bytes,
    proxsmtpd: StartDaemon,
    make_server: MakeServer,
    at_end: ExitStack,
) -> None:
    """It says EHLO where the server's greeting, as we give it, has ESMTP in it."""
    server = make_server(greeting=greeting)
    daemon = proxsmtpd({"FilterCommand": "cat"}, server=server)
    entrance = port_of(at_end.enter_context(reserve_port()))
    services = [smtpd(entrance), smtp("scan", {"smtp_always_send_ehlo": "no"})]
    main = {"content_filter": f"scan:[127.0.0.1]:{daemon.port}"}
    at_end.enter_context(PrivatePostfix(services, main))
    client = at_end.enter_context(RawClient(("127.0.0.1", entrance), timeout=30))
    client.message(MESSAGE)
    client.quit()
    connection = server.wait_message().connection
    assert connection.lines[0].split()[0] == hello


# --- postscreen ---


def answer_dnsblog(listener: socket.socket) -> None:
    """Tell postscreen, in the place of dnsblog(8), that its client is on the list."""
    connection, _ = listener.accept()
    with connection:
        request = connection.recv(4096)
        answer = b"rbl_addr\x00127.0.0.2\x00ttl\x00100\x00"
        connection.sendall(request[:-1] + answer + b"\x00")


def start_dnsblog(queue: Path, at_end: ExitStack) -> None:
    """Listen for one question of postscreen, and answer it in a thread."""
    listener = at_end.enter_context(closing(socket.socket(socket.AF_UNIX)))
    path = queue / "private/dnsblog"
    listener.bind(str(path))
    path.chmod(0o666)
    listener.listen()
    answering = threading.Thread(target=answer_dnsblog, args=(listener,), daemon=True)
    answering.start()
    at_end.callback(answering.join, 10)


@requires("postfix", POSTSCREEN)
def test_postscreen_that_refuses_after_its_teaser(
    proxsmtpd: StartDaemon, at_end: ExitStack
) -> None:
    """Its greeting begins with 220- and ends with 521: the last code is the reply's."""
    port = port_of(at_end.enter_context(reserve_port()))
    postscreen = Service(
        f"127.0.0.1:{port}", "inet", "postscreen", private="n", process_limit="1"
    )
    main = {
        "postscreen_access_list": "",
        "postscreen_cache_map": "",
        "postscreen_dnsbl_action": "drop",
        "postscreen_dnsbl_sites": "dnsbl.example",
        "postscreen_greet_banner": "wait a moment",
        "postscreen_greet_wait": "1s",
        "postscreen_tls_security_level": "none",
    }
    postfix = at_end.enter_context(PrivatePostfix([postscreen], main))
    start_dnsblog(postfix.directory / "queue", at_end)
    client = proxsmtpd({"OutAddress": f"127.0.0.1:{port}"}).connect(timeout=30)
    reply = client.reply()
    text = rb"5\.7\.1 Service unavailable; client \[127\.0\.0\.1\] blocked .*"
    assert re.fullmatch(rb"521-wait a moment\r\n521 " + text + rb"\r\n", reply), reply
    assert client.rest() == b"421 Connection to server lost\r\n"
