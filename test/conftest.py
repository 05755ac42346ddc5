"""Fixtures: a scripted server, the real process, and filters for it to run.

See README beside this file.
"""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

import pytest

from detached import Detach, DetachedFactory
from helpers import (
    DaemonFactory,
    MakeFilter,
    MakeServer,
    ShareDaemon,
    SharedDaemons,
    StartDaemon,
)
from smtp import ScriptedServer
from tls import Certificates, TlsClient, TlsServer, both_sides


def pytest_configure(config: pytest.Config) -> None:
    # Where start-stop-daemon is, or ip; an ordinary user's PATH may lack both.
    os.environ["PATH"] = os.pathsep.join(
        [os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"]
    )
    config.addinivalue_line(
        "markers", "requires_program(name, path): needs another package's program"
    )
    config.addinivalue_line("markers", "xdist_group(name): runs in one process")


def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers("requires_program"):
        name, path = mark.args
        if not os.path.exists(path):
            absent = (
                pytest.fail
                if os.environ.get("PROXSMTPD_REQUIRE_PEERS")
                else (pytest.skip)
            )
            absent(f"{name} is not installed ({path})")


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """Provide certificates and their keys; see support/tls.py."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    directory = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # its processes have theirs in one
        directory = directory.parent
    return Certificates(directory / "certificates")


@pytest.fixture
def tls(request: pytest.FixtureRequest) -> Optional[Certificates]:
    """Provide certificates if all are to use TLS; see `in_clear_and_in_tls`."""
    if getattr(request, "param", "clear") == "clear":
        return None
    found: Certificates = request.getfixturevalue("certificates")
    return found


@pytest.fixture
def make_server(tls: Optional[Certificates]) -> Iterator[MakeServer]:
    """Provide a factory of scripted servers that end with the test."""
    servers: list[ScriptedServer] = []
    kind = functools.partial(TlsServer, tls.context()) if tls else ScriptedServer

    def make(*args: Any, **kwargs: Any) -> ScriptedServer:
        servers.append(kind(*args, **kwargs))
        return servers[-1]

    yield make
    for server in servers:
        server.close()


@pytest.fixture
def server(make_server: MakeServer) -> ScriptedServer:
    """Provide a scripted server that accepts everything."""
    return make_server()


@pytest.fixture
def filter_script(tmp_path: Path) -> MakeFilter:
    """Provide a factory of executable filters: text of a script in, its path out."""

    def make(text: str) -> str:
        path = tmp_path / f"filter-{uuid.uuid4().hex[:8]}"
        path.write_text(text if text.startswith("#!") else "#!/bin/sh\n" + text)
        path.chmod(0o755)
        return str(path)

    return make


@pytest.fixture
def proxsmtpd(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    server: ScriptedServer,
    tls: Optional[Certificates],
) -> Iterator[StartDaemon]:
    """Provide a factory of running daemons; see `DaemonFactory` and `Daemon`.

    A configuration without Listen, OutAddress or TempDirectory gets a free port,
    the scripted server and an empty directory.  At the end of the test each daemon
    must still live (or have been stopped), end at SIGTERM, and have left neither
    a traceback nor a temporary file nor a process.  The fixture's parameter, if it has
    one, is the program's command line; see `on_other_systems`.
    """
    factory = DaemonFactory(tmp_path, server, getattr(request, "param", ()))
    if tls:
        factory.defaults, factory.client_type = both_sides(tls), TlsClient
    yield factory
    factory.finish()


@pytest.fixture(scope="module")
def shared_daemons(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[SharedDaemons]:
    """Provide the daemons of `shared_daemon`, each of which must end at SIGTERM."""
    daemons = SharedDaemons(tmp_path_factory.mktemp("shared"))
    yield daemons
    daemons.finish()


@pytest.fixture
def shared_daemon(shared_daemons: SharedDaemons) -> Iterator[ShareDaemon]:
    """Provide daemons with servers, `daemon, server = shared_daemon(settings, script)`.

    The daemon has served other tests with these settings, and its log begins with this
    one.  At its end the daemon must be idle, with no traceback and no temporary file.
    """
    yield shared_daemons
    shared_daemons.end_test()


@pytest.fixture
def place() -> Iterator[Path]:
    """Provide a directory that every user can get at (pytest's own are its user's)."""
    path = Path(tempfile.mkdtemp(prefix="proxsmtpd-test-"))
    path.chmod(0o755)
    (path / "temp").mkdir()
    (path / "temp").chmod(0o1777)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def detach(place: Path, server: ScriptedServer) -> Iterator[Detach]:
    """Provide a factory of daemons: settings in, and what runs afterwards out."""
    factory = DetachedFactory(place, server)
    yield factory
    factory.finish()
