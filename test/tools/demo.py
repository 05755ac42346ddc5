"""`make demo`: three messages through the real proxsmtpd, and what becomes of them.

Everything runs on free ports of 127.0.0.1 and in a temporary directory: an embedded
SMTP sink as the server, the real program with a filter between, and a client. It
shows what the client sent, the reply and what the sink received, and exits with
1 if anything of this is not as it should be.
"""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Optional

from smtp import RawClient, ScriptedServer

PROGRAM = Path(__file__).resolve().parents[2] / "proxsmtpd.py"
ACCEPTED = "250 2.0.0 Ok: queued"  # the sink's own words
PATIENCE = 10.0  # seconds for the program to answer, and to end
LONGEST = 60  # seconds for all of it, which takes less than one

FILTER = """\
#!/bin/sh
# The message is on standard input, the envelope is in the environment.
case "$SENDER" in
mallory@*)  echo '550 5.7.1 Mallory may not write to us' >&2; exit 1 ;;
robot@*)    echo '250 2.0.0 Thank you very much' >&2; exit 1 ;;
esac
exec sed '1,/^.\\{0,1\\}$/ s/^Subject: /&[filtered] /'
"""


class Case(NamedTuple):
    """A message, and what is to become of it."""

    title: str
    sender: str
    subject: str
    reply: str  # that the client is to get
    received: Optional[str]  # the subject that the sink is to receive; None: nothing
    status: str  # that the log is to show


CASES = (
    Case(
        "changed by the filter",
        "alice@example.com",
        "Lunch?",
        ACCEPTED,
        "[filtered] Lunch?",
        "FILTERED",
    ),
    Case(
        "rejected in the filter's words",
        "mallory@example.com",
        "You have won",
        "550 5.7.1 Mallory may not write to us",
        None,
        "550 5.7.1 Mallory may not write to us",
    ),
    Case(
        "silently dropped by the filter",
        "robot@example.com",
        "Are you satisfied with us?",
        "250 2.0.0 Thank you very much",
        None,
        "250 2.0.0 Thank you very much",
    ),
)


class Outcome(NamedTuple):
    """What became of a message."""

    reply: str
    received: Optional[bytes]
    log_line: str


class Proxy(NamedTuple):
    """The running program: where it listens, and the process with its log."""

    address: str
    process: subprocess.Popen[str]

    def wait_log(self, pattern: str) -> str:
        """Read the log on to a line with the pattern; returns the line."""
        assert self.process.stderr is not None
        seen = []
        for line in self.process.stderr:
            if re.search(pattern, line):
                return line.rstrip("\n")
            seen.append(line)
        raise SystemExit(f"{PROGRAM.name} has ended early:\n{''.join(seen)}")


def message(case: Case) -> bytes:
    """The message of a case as it goes over the wire."""
    lines = (
        f"From: {case.sender}",
        "To: bob@example.net",
        f"Subject: {case.subject}",
        "",
        "Hello Bob.",
        "",
    )
    return "\r\n".join(lines).encode()


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def write_files(directory: Path, server: ScriptedServer) -> tuple[Path, str]:
    """Write filter and configuration; returns the latter and where to listen."""
    script = directory / "filter"
    script.write_text(FILTER)
    script.chmod(0o755)
    listen = f"127.0.0.1:{free_port()}"
    config = directory / "proxsmtpd.conf"
    config.write_text(
        f"Listen: {listen}\n"
        f"OutAddress: {server.address}\n"
        f"FilterCommand: {script}\n"
        f"TempDirectory: {directory}\n"
    )
    return config, listen


@contextmanager
def running_proxy(config: Path, listen: str) -> Iterator[Proxy]:
    """The program in the foreground, ended by SIGTERM on leaving."""
    command = [sys.executable, str(PROGRAM), "-d", "4", "-f", str(config)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            proxy = Proxy(listen, process)
            proxy.wait_log("accepting connections")
            yield proxy
        finally:
            process.terminate()
            process.communicate(timeout=PATIENCE)


def send(case: Case, proxy: Proxy, server: ScriptedServer) -> Outcome:
    """Send one message through the proxy."""
    count = len(server.messages)
    with RawClient(proxy.address, PATIENCE) as client:
        sender = f"<{case.sender}>".encode()
        reply = client.message(message(case), sender, [b"<bob@example.net>"])
        client.quit()
    received = server.messages[count].data if len(server.messages) > count else None
    log_line = proxy.wait_log("status=")
    return Outcome(reply.decode().rstrip("\r\n"), received, log_line)


def faults(case: Case, outcome: Outcome) -> list[str]:
    """What is not as it should be."""
    found = []
    wanted = None
    if case.received is not None:
        wanted = message(case._replace(subject=case.received))
    if outcome.reply != case.reply:
        found.append(f"the client should have got {case.reply!r}")
    if outcome.received != wanted:
        found.append(f"the sink should have received {wanted!r}")
    if not outcome.log_line.endswith(f"status={case.status}"):
        found.append(f"the log should have said status={case.status}")
    return found


def indented(text: str) -> str:
    return textwrap.indent(text.replace("\r\n", "\n").rstrip("\n"), "      ")


def show(number: int, case: Case, outcome: Outcome) -> list[str]:
    """Print one message's fate; returns what is wrong with it."""
    received = outcome.received
    print(f"\n{number}. {case.title}")
    print(f"   the client sent\n{indented(message(case).decode())}")
    print(f"   the client got\n{indented(outcome.reply)}")
    print("   the server received")
    print(indented("(nothing)" if received is None else received.decode()))
    print(f"   the log says\n{indented(outcome.log_line)}")
    wrong = faults(case, outcome)
    for fault in wrong:
        print(f"   WRONG: {fault}")
    return wrong


def run(cases: Sequence[Case]) -> int:
    """Send all messages through one proxy; returns how many went wrong."""
    failed = 0
    with tempfile.TemporaryDirectory() as name, ScriptedServer() as server:
        config, listen = write_files(Path(name), server)
        print(f"client -> proxsmtpd ({listen}) -> server ({server.address})")
        print(f"\nThe configuration:\n{indented(config.read_text())}")
        print(f"\nThe filter:\n{indented(FILTER)}")
        with running_proxy(config, listen) as proxy:
            for number, case in enumerate(cases, 1):
                failed += bool(show(number, case, send(case, proxy, server)))
    return failed


def main() -> int:
    signal.alarm(LONGEST)  # a demonstration that hangs has failed
    failed = run(CASES)
    print(f"\n{len(CASES) - failed} of {len(CASES)} messages went as they should.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
