"""A machine within this one, on which init scripts can do as they please.

It has mounts, processes and a network of its own, and an empty /run.  All else is
this machine's.  Its first process reads a pipe from us: when that is closed, or we
end however that comes, the kernel ends all processes of the machine.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager

from namespaces import Namespace

# What root gets from init: no HOME, nothing of the session that runs the tests.
ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}
PATIENCE = 60  # seconds for a script, which may itself wait for a daemon's end

UNSHARE = "unshare --mount --pid --fork --mount-proc --kill-child".split()
# With SIGCHLD ignored the kernel reaps what this process adopts.
INIT = "mount -t tmpfs none /run; echo up; exec env --ignore-signal=CHLD cat"


class Machine:
    """The machine; an OSError where there can be none."""

    def __init__(self, network: Namespace) -> None:
        self.network = network
        network.configure("link set lo up")
        with network.inside():
            self._init = subprocess.Popen(
                [*UNSHARE, "sh", "-e", "-c", INIT],
                env=ENVIRONMENT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        assert self._init.stdout is not None
        said = self._init.stdout.readline()
        if said != "up\n":
            self.close()
            raise PermissionError(said.strip())

    def close(self) -> None:
        """End all that runs on it; returns when that is gone."""
        with self._init:
            assert self._init.stdin is not None
            self._init.stdin.close()

    def run(
        self, script: str, *arguments: object, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a shell script on it as root, with $1 and so on and the environment."""
        namespaces = f"/proc/{self._init.pid}/ns"
        enter = ["nsenter", f"--mount={namespaces}/mnt"]
        enter += [f"--pid={namespaces}/pid_for_children"]
        with self.network.inside():
            return subprocess.run(
                [*enter, "sh", "-e", "-c", script, "sh", *map(str, arguments)],
                env={**ENVIRONMENT, **variables},
                cwd="/",
                check=False,
                stdin=subprocess.DEVNULL,
                capture_output=True,  # ends only when a daemon has let go of it
                text=True,
                timeout=PATIENCE,
            )

    def output(self, script: str, *arguments: object, **variables: str) -> str:
        """Return the standard output of a script that must succeed."""
        done = self.run(script, *arguments, **variables)
        assert not done.returncode, f"{done.stdout}{done.stderr}, from:\n{script}"
        return done.stdout

    def mount(self, places: Mapping[object, object]) -> None:
        """Put files or directories, the keys, in the place of others."""
        for source, target in places.items():
            self.output('mount --bind "$1" "$2"', source, target)

    def processes(self, name: str) -> set[int]:
        """Return the machine's own numbers of the processes with a name.

        Those that another one of them has started, as workers, are left out.
        """
        script = "ps -e -o pid= -o ppid= -o comm="
        lines = (line.split(None, 2) for line in self.output(script).splitlines())
        parents = {int(p): int(pp) for p, pp, found in lines if found.strip() == name}
        return {pid for pid, parent in parents.items() if parent not in parents}


@contextmanager
def machine() -> Iterator[Machine]:
    """Provide a machine that is gone at the end, with all its processes."""
    if os.geteuid() != 0:
        raise PermissionError("only root can make a machine")
    with closing(Namespace()) as network, closing(Machine(network)) as made:
        yield made
