"""The program as a daemon in the background, as an init script starts it."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Callable, NamedTuple

from helpers import (
    PATIENCE,
    is_alive,
    is_listening,
    poll,
    port_of,
    program_under_test,
    reserve_port,
    settings_text,
)
from smtp import ScriptedServer


class Detached(NamedTuple):
    """A proxsmtpd that has become a daemon."""

    pid: int
    address: str
    pid_file: Path
    result: subprocess.CompletedProcess[str]

    def status(self, name: str) -> list[str]:
        """A line of /proc/PID/status, as words."""
        text = Path(f"/proc/{self.pid}/status").read_text()
        line: str = re.findall(rf"^{name}:\s*(.*)$", text, re.M)[0]
        return line.split()

    def end(self, number: int = signal.SIGTERM) -> None:
        """End it and wait until it is gone; nobody can wait for its exit status."""
        os.kill(self.pid, number)
        assert poll(lambda: not is_alive(self.pid)), "did not end"


Detach = Callable[..., Detached]


class DetachedFactory:
    """Starts daemons as an init script does, without -d."""

    def __init__(self, place: Path, server: ScriptedServer) -> None:
        self._place, self._server = place, server
        self._started: list[Detached] = []
        self._holders: list[socket.socket] = []

    def __call__(
        self,
        settings: Mapping[str, object] | None = None,
        *,
        program: Sequence[str] = (),
        **options: Any,
    ) -> Detached:
        """A daemon whose first process has succeeded; `options` are for `run`."""
        values = {**self._defaults(), **(settings or {})}
        path = self._place / f"{len(self._started)}.conf"
        path.write_text(settings_text(values))
        result = subprocess.run(
            [*program, *program_under_test(), "-f", str(path)],
            check=False,
            **{"capture_output": True, "text": True, "timeout": PATIENCE, **options},
        )
        assert result.returncode == 0, result.stderr
        pid_file = Path(str(values["PidFile"]))
        pid = int(pid_file.read_text())
        self._started.append(Detached(pid, str(values["Listen"]), pid_file, result))
        assert is_listening(self._started[-1].address), "does not listen yet"
        return self._started[-1]

    def _defaults(self) -> Mapping[str, object]:
        self._holders.append(reserve_port())
        return {
            "Listen": f"127.0.0.1:{port_of(self._holders[-1])}",
            "OutAddress": self._server.address,
            "TempDirectory": self._place / "temp",
            "PidFile": self._place / f"{len(self._started)}.pid",
        }

    def finish(self) -> None:
        """End all daemons that still live."""
        for daemon in self._started:
            if is_alive(daemon.pid):
                daemon.end()
        for holder in self._holders:
            holder.close()
        assert list((self._place / "temp").iterdir()) == []
