"""Run proxsmtpd.py as on a system that has nothing of what is Linux's own.

Usage: python3 other_system.py [argument ...]; the arguments are proxsmtpd's.  It stands
in for macOS and the BSDs where there are none to test on, and for old kernels:

    PROXSMTPD="python3 $PWD/test/support/other_system.py" make check
"""

from __future__ import annotations

import errno
import os
import runpy
import select
import sys
from pathlib import Path

PLACE = Path(__file__).resolve().parents[2]
OF_LINUX = {
    os: "O_TMPFILE pidfd_open sched_getaffinity sched_setaffinity waitid",
    select: "POLLRDHUP epoll",
}


def hide_proc(event: str, arguments: tuple[object, ...]) -> None:
    """An audit hook by which there is no /proc."""
    if event in ("open", "os.listdir") and str(arguments[0]).startswith("/proc"):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))


for module, names in OF_LINUX.items():
    for name in names.split():
        if hasattr(module, name):
            delattr(module, name)
sys.platform = "freebsd14"
sys.addaudithook(hide_proc)
sys.argv[0] = str(PLACE / "proxsmtpd.py")
sys.path.append(str(PLACE))
# By its byte code if there is any.
runpy.run_module("proxsmtpd", run_name="__main__", alter_sys=True)
