"""`make install` into a directory."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from helpers import ROOT

INSTALLED = "usr/sbin/proxsmtpd"
WHERE_DEBIAN_HAS_IT = ("PREFIX=/usr", "SYSCONFDIR=/etc")


def make(
    target: str,
    place: Path,
    umask: int = 0o022,
    python: str = sys.executable,
    where: Sequence[str] = WHERE_DEBIAN_HAS_IT,
    path: Path | None = None,
) -> str:
    """Run make for a target and return its output.

    `path` has programs to be found before the system's.
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    if path is not None:
        environment["PATH"] = f"{path}:{environment['PATH']}"
    done = subprocess.run(
        [
            "make",
            target,
            f"DESTDIR={place}",
            *where,
            f"PYTHON={python}",
        ],
        cwd=ROOT,
        env=environment,
        umask=umask,
        check=True,
        capture_output=True,
    )
    return done.stdout.decode()
