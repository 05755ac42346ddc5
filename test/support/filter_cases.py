"""Filters and their outcomes, for the tests of FilterMode and of the dry run."""

from __future__ import annotations

from typing import NamedTuple

FIELD = b"X-Seen: by 127.0.0.1\r\n"
HEADER = {"Header": "X-Seen: by %i"}
PASS = {"FilterFailure": "pass"}
OBSERVE = {"FilterMode": "observe"}
KINDS = ("pipe", "file")


class Case(NamedTuple):
    """A filter's command as either type; empty where that type cannot do it."""

    pipe: str
    file: str
    outcome: str  # the status, or for a failure a pattern of the error line

    def command(self, kind: str) -> str:
        return self.pipe if kind == "pipe" else self.file


def both(command: str, outcome: str) -> Case:
    return Case(command, command, outcome)


VERDICTS = {
    "passes": Case("cat", ":", "FILTERED"),
    "changes": Case(
        "sed s/Hello/Goodbye/", 'sed -i s/Hello/Goodbye/ "$EMAIL"', "FILTERED"
    ),
    "replaces": Case("echo gone", 'echo gone >"$EMAIL"', "FILTERED"),
    "refuses": both("echo 554 5.7.1 Spam >&2; exit 1", "554 5.7.1 Spam"),
    "refuses without a word": both("exit 1", "550 Content Rejected"),
    "defers": both("echo 451 4.7.1 Later >&2; exit 1", "451 4.7.1 Later"),
    "drops": both("echo 250 dropped >&2; exit 1", "250 dropped"),
    "changes and refuses": Case(
        "echo gone; exit 1", 'echo gone >"$EMAIL"; exit 1', "550 Content Rejected"
    ),
}
TERMINATED = "filter command terminated abnormally"
NOT_RUN = "filter command could not be run"
FAILED = "filter command failed"
# Some of what test_filter_contract.py has, and what only a filter that runs can do.
FAILURES = {
    # More than one argument of a program may be.
    "cannot start": both(
        f": {'x' * 140_000}", "couldn't start filter command: Argument list too long"
    ),
    "times out": both("exec sleep 60", "timeout while listening to filter command"),
    "SIGKILL": both("kill -KILL $$", TERMINATED),
    "SIGABRT with words": both(
        "ulimit -c 0; echo oops >&2; kill -ABRT $$", f"{TERMINATED}: oops"
    ),
    "127": both("echo oops >&2; exit 127", f"{NOT_RUN}: oops"),
    "75 with words": both("echo oops >&2; exit 75", f"{FAILED} with 75: oops"),
    "syntax": both("exit 0; fi", f"{NOT_RUN}: sh: .*"),
    "empty output": Case(
        "cat >/dev/null", ': >"$EMAIL"', "filter command returned an empty message"
    ),
    "no output": Case(
        "exec >&-; exec cat >&2", "", "filter command returned an empty message"
    ),
    "no file": Case(
        "", 'rm "$EMAIL"', "couldn't open cache file: .*: No such file or directory"
    ),
    "a directory": Case(
        "", 'rm "$EMAIL"; mkdir "$EMAIL"', "filter left no regular file: .*"
    ),
    "a link": Case(
        "", 'rm "$EMAIL"; ln -s /etc/passwd "$EMAIL"', "couldn't open cache file: .*"
    ),
}


def applicable(table: dict[str, Case]) -> list[tuple[str, str]]:
    """Return the types of filter, and what each can do."""
    return [(k, name) for k in KINDS for name in table if table[name].command(k)]


def settings_of(kind: str, command: str) -> dict[str, object]:
    return {
        "FilterType": kind,
        "FilterCommand": command,
        "FilterTimeout": 1 if "sleep" in command else 30,
        **HEADER,
    }
