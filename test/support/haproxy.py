"""A HAProxy of the test's own, configured as an administrator should do it.

`LISTEN` is the section that goes into haproxy.cfg, after which only the lines of the
machines are missing; the tests change nothing in it but where it listens and how
often it checks.
"""

from __future__ import annotations

import re
import subprocess
from typing import TYPE_CHECKING

from helpers import PEER_PATIENCE, is_listening, poll

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

HAPROXY = "/usr/sbin/haproxy"

LISTEN = """\
listen smtp
    bind :25
    mode tcp
    log global
    option tcplog
    balance leastconn
    option redispatch 1
    option smtpchk EHLO haproxy.example
    timeout connect 5s
    timeout queue 2m
    timeout client 20m
    timeout server 20m
    timeout check 30s
    default-server check inter 60s fastinter 5s downinter 5s fall 2 rise 2
    default-server observe layer4 error-limit 1 on-error fastinter maxconn 60
"""
# Those of a test cannot wait for a minute.
CHECKS = ("inter 60s fastinter 5s downinter 5s", "inter 100ms")

GLOBAL = """\
global
    log stdout format raw local0
defaults
    log global
    unique-id-format %[uuid()]
"""


def listen_section(bind: str, servers: Mapping[str, str], **replacements: str) -> str:
    """`LISTEN` with its machines: their names, and addresses with what else they need.

    In `replacements`, `maxconn="2"` stands for another value of that word.
    """
    section = LISTEN.replace("bind :25", f"bind {bind}").replace(*CHECKS)
    for name, value in replacements.items():
        section, count = re.subn(rf"\b{name} \S+", f"{name} {value}", section)
        assert count == 1, name
    return section + "".join(f"    server {n} {a}\n" for n, a in servers.items())


class HAProxy:
    """A running HAProxy between ``with`` and the end of its block.

    It is in the foreground; all that it says goes to one file in `directory`.
    """

    def __init__(self, directory: Path, section: str, address: str) -> None:
        self._directory, self.address = directory, address
        self._config = directory / "haproxy.cfg"
        self._config.write_text(GLOBAL + section)

    def __enter__(self) -> HAProxy:
        with (self._directory / "haproxy.log").open("wb") as log:
            self._process = subprocess.Popen(
                [HAPROXY, "-db", "-f", self._config],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        try:
            assert poll(self._is_up, PEER_PATIENCE), self.log()
            assert self._process.poll() is None, self.log()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()  # It has nothing to finish in the foreground.
        try:
            self._process.wait(PEER_PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise

    def _is_up(self) -> bool:
        return self._process.poll() is not None or is_listening(self.address)

    def log(self) -> str:
        """Return all that it has logged until now."""
        return (self._directory / "haproxy.log").read_text()

    def wait_log(self, pattern: str, count: int = 1) -> None:
        """Wait until its log has so many matches of the pattern."""
        expression = re.compile(pattern, re.M)
        found = poll(
            lambda: len(expression.findall(self.log())) >= count, PEER_PATIENCE
        )
        assert found, (
            f"no {pattern!r} within {PEER_PATIENCE} s in this log:\n{self.log()}"
        )

    def wait_state(self, server: str, state: str) -> None:
        """Wait until the checks have found that a machine is UP or DOWN."""
        # Changes are on standard output once, and for a DOWN in other words besides.
        self.wait_log(rf"^Server smtp/{server} is {state}\b")
