"""The fault table: what breaks, when, and what the client and the server then receive.

Data, and the few lines that make cases of it; `test_faults.py` runs them.  A case
is one mail transaction in which one thing breaks:

way     how proxsmtpd is set up: `pipe` and `file` are types of filters, `stream` is
        no filter, `kept` is a pipe with KeepAlives.  Several ways are several cases.
when    the step of the dialogue: greeting, EHLO, MAIL, RCPT, DATA, body, dot, QUIT;
        in cases named so also XCLIENT and the EHLO after it (EHLO2), HELP, RSET,
        proxsmtpd's own RSET after a refusal, and its NOOP while the client sends
        or, as filter-NOOP, while the filter runs.
replies what the client receives that it does not when all is well: `STEP reply`,
        and `end` where the connection ends before the client said QUIT.  Where the
        fault is the client's: all replies that come after it.  ` or ` stands between
        what the system may make of it.
verbs   the verbs that the server received, a regular expression.
#       how many messages the server accepted.

In tables, ` / ` stands between replies, `-` is nothing, `~` is
`EHLO MAIL RCPT`, and {name} is one of the replies in `REPLIES`.  A client that is
refused something says QUIT next, if the connection is still there.
"""

from __future__ import annotations

import itertools
import signal
from collections.abc import Iterable, Iterator
from typing import NamedTuple

REPLIES = {
    "4xx": "450 4.0.0 not now",
    "5xx": "550 5.0.0 never",
    "shut": "421 4.3.2 closing",
    "lost": "421 Connection to server lost",
    "slow": "421 Server timed out",
    "odd": "421 Server gave an unusable reply",
    "away": "421 Server not available",
    "late": "421 Timed out waiting for client",
    "gone": "421 Client closed the connection before the message was accepted",
    "thread": "421 Local Error, cannot start thread",
    "none": "421 Local Error, try again later",
    "error": "451 Local Error",
    "no": "550 Content Rejected; no",
    "hi": "220 smtp.passthru ESMTP",
    "hello": "250-smtp.passthru",  # and so on
    "mail": "250 2.1.0 Ok",
    "rcpt": "250 2.1.5 Ok",
    "go": "354 End data with <CR><LF>.<CR><LF>",
    "start": "354 Start mail input; end with <CRLF>.<CRLF>",
    "queued": "250 2.0.0 Ok: queued",
    "ok": "250 2.0.0 Ok",
    "bye": "221 2.0.0 Bye",
}

# What a filter does until the test tells it to go on; `$reached`, `$go` and `pass`
# (which lets the message through) are the test's.
WAIT = 'read line <"$go"'
REACHED = 'echo >"$reached"'
REJECT = "echo no >&2; exit 1"
FOR_EVER = "exec sleep 60"


class Case(NamedTuple):
    """One fault at one moment; see the module's text for the fields."""

    way: str
    party: str  # whose fault it is: server, client, filter, disk or limit
    when: str
    what: str
    replies: str
    verbs: str
    delivered: int
    script: str = "pass"  # of the filter
    message: str = "short"  # or `long`: longer than proxsmtpd keeps in memory
    left: int = 0  # processes that the filter leaves behind and that may stay
    impatient: bool = False  # the fault is to be noticed by a time out

    def __str__(self) -> str:
        return f"{self.way}: {self.party} {self.what} at {self.when}"


def rows(table: str) -> Iterator[list[str]]:
    """The fields of a table's lines, with the abbreviations resolved."""
    for line in table.strip().splitlines():
        fields = [field.strip() for field in line.split("|")]
        yield ["" if field == "-" else resolved(field) for field in fields]


def resolved(text: str) -> str:
    """A field with its abbreviations resolved."""
    return text.replace("~", "EHLO MAIL RCPT").format(**REPLIES)


# --- The server ---

# 4xx, 5xx and 421 are replies, 421 with the connection's end.  At `connect`,
# `refuses` is a port where nobody listens, `stalls` one whose queue is full, and the
# others come before the first octet.  At `greeting`, `resets` and `closes` come in
# the midst of it.  In the `body`, each reply comes while proxsmtpd is sending, and is
# the last.
SERVER_STEPS = (
    *("greeting", "EHLO", "XCLIENT", "EHLO2", "MAIL", "RCPT", "DATA", "body"),
    *("dot", "RSET", "own-RSET", "QUIT", "NOOP", "filter-NOOP"),
)
SERVER_FAULTS = ("4xx", "5xx", "421", "resets", "closes", "stalls")
CONNECT_FAULTS = ("refuses", "resets", "closes", "stalls")

SERVER = """
connect     | refuses | pipe stream | greeting {away} / end | - | 0
connect | resets | pipe stream | greeting {lost} / end or greeting {away} / end | - | 0
connect     | closes  | pipe stream | greeting {lost} / end | - | 0
connect     | stalls  | pipe stream | greeting {away} / end | - | 0
greeting    | 4xx     | pipe stream | greeting {4xx} | QUIT | 0
greeting    | 5xx     | pipe stream | greeting {5xx} | QUIT | 0
greeting    | 421     | pipe stream | greeting {shut} / end | - | 0
greeting | resets | pipe stream | greeting {lost} / end or greeting {away} / end | - | 0
greeting    | closes  | pipe stream | greeting {lost} / end | - | 0
greeting    | stalls  | pipe stream | greeting {slow} / end | - | 0
EHLO        | 4xx     | pipe stream | EHLO {4xx} | EHLO QUIT | 0
EHLO        | 5xx     | pipe stream | EHLO {5xx} | EHLO QUIT | 0
EHLO        | 421     | pipe stream | EHLO {shut} / end | EHLO | 0
EHLO        | resets  | pipe stream | EHLO {lost} / end | EHLO | 0
EHLO        | closes  | pipe stream | EHLO {lost} / end | EHLO | 0
EHLO        | stalls  | pipe stream | EHLO {slow} / end | EHLO | 0
XCLIENT     | 4xx     | pipe stream | EHLO {4xx} | EHLO XCLIENT QUIT | 0
XCLIENT     | 5xx     | pipe stream | - | EHLO XCLIENT MAIL RCPT DATA QUIT | 1
XCLIENT     | 421     | pipe stream | EHLO {shut} / end | EHLO XCLIENT | 0
XCLIENT     | resets  | pipe stream | EHLO {lost} / end | EHLO XCLIENT | 0
XCLIENT     | closes  | pipe stream | EHLO {lost} / end | EHLO XCLIENT | 0
XCLIENT     | stalls  | pipe stream | EHLO {slow} / end | EHLO XCLIENT | 0
EHLO2       | 4xx     | pipe stream | EHLO {4xx} | EHLO XCLIENT EHLO QUIT | 0
EHLO2       | 5xx     | pipe stream | EHLO {5xx} | EHLO XCLIENT EHLO QUIT | 0
EHLO2       | 421     | pipe stream | EHLO {shut} / end | EHLO XCLIENT EHLO | 0
EHLO2       | resets  | pipe stream | EHLO {lost} / end | EHLO XCLIENT EHLO | 0
EHLO2       | closes  | pipe stream | EHLO {lost} / end | EHLO XCLIENT EHLO | 0
EHLO2       | stalls  | pipe stream | EHLO {slow} / end | EHLO XCLIENT EHLO | 0
MAIL        | 4xx     | pipe stream | MAIL {4xx} | EHLO MAIL QUIT | 0
MAIL        | 5xx     | pipe stream | MAIL {5xx} | EHLO MAIL QUIT | 0
MAIL        | 421     | pipe stream | MAIL {shut} / end | EHLO MAIL | 0
MAIL        | resets  | pipe stream | MAIL {lost} / end | EHLO MAIL | 0
MAIL        | closes  | pipe stream | MAIL {lost} / end | EHLO MAIL | 0
MAIL        | stalls  | pipe stream | MAIL {slow} / end | EHLO MAIL | 0
RCPT        | 4xx     | pipe stream | RCPT {4xx} | ~ QUIT | 0
RCPT        | 5xx     | pipe stream | RCPT {5xx} | ~ QUIT | 0
RCPT        | 421     | pipe stream | RCPT {shut} / end | ~ | 0
RCPT        | resets  | pipe stream | RCPT {lost} / end | ~ | 0
RCPT        | closes  | pipe stream | RCPT {lost} / end | ~ | 0
RCPT        | stalls  | pipe stream | RCPT {slow} / end | ~ | 0
DATA        | 4xx     | pipe        | dot {4xx} | ~ DATA RSET QUIT | 0
DATA        | 5xx     | pipe        | dot {5xx} | ~ DATA RSET QUIT | 0
DATA        | 421     | pipe        | dot {shut} / end | ~ DATA | 0
DATA        | resets  | pipe        | dot {lost} / end | ~ DATA | 0
DATA        | closes  | pipe        | dot {lost} / end | ~ DATA | 0
DATA        | stalls  | pipe        | dot {slow} / end | ~ DATA | 0
DATA        | 4xx     | stream      | DATA {4xx} | ~ DATA RSET QUIT | 0
DATA        | 5xx     | stream      | DATA {5xx} | ~ DATA RSET QUIT | 0
DATA        | 421     | stream      | DATA {shut} / end | ~ DATA | 0
DATA        | resets  | stream      | DATA {lost} / end | ~ DATA | 0
DATA        | closes  | stream      | DATA {lost} / end | ~ DATA | 0
DATA        | stalls  | stream      | DATA {slow} / end | ~ DATA | 0
body        | 4xx     | pipe stream | dot {4xx} / end | ~ DATA | 0
body        | 5xx     | pipe stream | dot {5xx} / end | ~ DATA | 0
body        | 421     | pipe stream | dot {shut} / end | ~ DATA | 0
body        | resets  | pipe stream | dot {lost} / end | ~ DATA | 0
body        | closes  | pipe stream | dot {lost} / end | ~ DATA | 0
body        | stalls  | pipe stream | dot {slow} / end | ~ DATA | 0
dot         | 4xx     | pipe stream | dot {4xx} | ~ DATA QUIT | 0
dot         | 5xx     | pipe stream | dot {5xx} | ~ DATA QUIT | 0
dot         | 421     | pipe stream | dot {shut} / end | ~ DATA | 0
dot         | resets  | pipe stream | dot {lost} / end | ~ DATA | 0
dot         | closes  | pipe stream | dot {lost} / end | ~ DATA | 0
dot         | stalls  | pipe stream | dot {slow} / end | ~ DATA | 0
RSET        | 4xx     | pipe stream | RSET {4xx} | ~ RSET QUIT | 0
RSET        | 5xx     | pipe stream | RSET {5xx} | ~ RSET QUIT | 0
RSET        | 421     | pipe stream | RSET {shut} / end | ~ RSET | 0
RSET        | resets  | pipe stream | RSET {lost} / end | ~ RSET | 0
RSET        | closes  | pipe stream | RSET {lost} / end | ~ RSET | 0
RSET        | stalls  | pipe stream | RSET {slow} / end | ~ RSET | 0
own-RSET    | 4xx     | pipe        | dot {no} / QUIT {odd} | ~ RSET | 0
own-RSET    | 5xx     | pipe        | dot {no} / QUIT {odd} | ~ RSET | 0
own-RSET    | 421     | pipe        | dot {no} / QUIT {shut} | ~ RSET | 0
own-RSET    | resets  | pipe        | dot {no} / QUIT {lost} | ~ RSET | 0
own-RSET    | closes  | pipe        | dot {no} / QUIT {lost} | ~ RSET | 0
own-RSET    | stalls  | pipe        | dot {no} / QUIT {slow} | ~ RSET | 0
own-RSET    | 4xx     | stream      | DATA {5xx} / QUIT {odd} | ~ DATA RSET | 0
own-RSET    | 5xx     | stream      | DATA {5xx} / QUIT {odd} | ~ DATA RSET | 0
own-RSET    | 421     | stream      | DATA {5xx} / QUIT {shut} | ~ DATA RSET | 0
own-RSET    | resets  | stream      | DATA {5xx} / QUIT {lost} | ~ DATA RSET | 0
own-RSET    | closes  | stream      | DATA {5xx} / QUIT {lost} | ~ DATA RSET | 0
own-RSET    | stalls  | stream      | DATA {5xx} / QUIT {slow} | ~ DATA RSET | 0
QUIT        | 4xx     | pipe stream | QUIT {4xx} | ~ DATA QUIT | 1
QUIT        | 5xx     | pipe stream | QUIT {5xx} | ~ DATA QUIT | 1
QUIT        | 421     | pipe stream | QUIT {shut} | ~ DATA QUIT | 1
QUIT        | resets  | pipe stream | QUIT {lost} | ~ DATA QUIT | 1
QUIT        | closes  | pipe stream | QUIT {lost} | ~ DATA QUIT | 1
QUIT        | stalls  | pipe stream | QUIT {slow} | ~ DATA QUIT | 1
NOOP        | 4xx     | kept        | - | ~ NOOP DATA QUIT | 1
NOOP        | 5xx     | kept        | - | ~ NOOP DATA QUIT | 1
NOOP        | 421     | kept        | dot {shut} / end | ~ NOOP | 0
NOOP        | resets  | kept        | dot {lost} / end | ~ NOOP | 0
NOOP        | closes  | kept        | dot {lost} / end | ~ NOOP | 0
NOOP        | stalls  | kept        | dot {slow} / end | ~ NOOP | 0
filter-NOOP | 4xx     | kept        | - | ~( NOOP)+ DATA QUIT | 1
filter-NOOP | 5xx     | kept        | - | ~( NOOP)+ DATA QUIT | 1
filter-NOOP | 421     | kept        | dot {shut} / end | ~ NOOP | 0
filter-NOOP | resets  | kept        | dot {lost} / end | ~ NOOP | 0
filter-NOOP | closes  | kept        | dot {lost} / end | ~ NOOP | 0
filter-NOOP | stalls  | kept        | dot {slow} / end | ~ NOOP | 0
"""

SERVER_SCRIPTS = {"own-RSET": REJECT, "filter-NOOP": f"{WAIT}; pass"}


def server_cases() -> Iterator[Case]:
    """The server's faults."""
    for when, what, ways, replies, verbs, delivered in rows(SERVER):
        for way in ways.split():
            yield Case(
                *(way, "server", when, what, replies, verbs, int(delivered)),
                script=SERVER_SCRIPTS.get(when, "pass"),
                message="huge" if when == "body" else "short",
                impatient=what == "stalls",
            )


# --- The client ---

# It does something wrong when the server has seen the command of that step and has
# not answered yet; at `line` it has sent half a command, in the `body` half of the
# message, and at `DATA`, where there is a filter, only proxsmtpd knows of it.
# `half-closes` is a client that goes on reading.  At `HELP` it asks for more than
# the buffers hold and never reads.
CLIENT_STEPS = (
    *("greeting", "EHLO", "XCLIENT", "line", "MAIL", "RCPT", "DATA", "body"),
    *("filter", "dot", "RSET", "own-RSET", "QUIT", "NOOP", "filter-NOOP"),
)
CLIENT_FAULTS = ("resets", "closes", "half-closes", "stalls")

CLIENT = """
greeting    | resets      | pipe stream | - | - | 0
greeting    | closes      | pipe stream | - | - | 0
greeting    | half-closes | pipe stream | {hi} | - | 0
greeting    | stalls      | pipe stream | {hi} / {late} | - | 0
EHLO        | resets      | pipe stream | - | EHLO | 0
EHLO        | closes      | pipe stream | - | EHLO | 0
EHLO        | half-closes | pipe stream | {hello} | EHLO | 0
EHLO        | stalls      | pipe stream | {hello} / {late} | EHLO | 0
XCLIENT     | resets      | pipe stream | - | EHLO XCLIENT EHLO | 0
XCLIENT     | closes      | pipe stream | - | EHLO XCLIENT EHLO | 0
XCLIENT     | half-closes | pipe stream | {hello} | EHLO XCLIENT EHLO | 0
XCLIENT     | stalls      | pipe stream | {hello} / {late} | EHLO XCLIENT EHLO | 0
line        | resets      | pipe stream | - | EHLO | 0
line        | closes      | pipe stream | - | EHLO | 0
line        | half-closes | pipe stream | - | EHLO | 0
line        | stalls      | pipe stream | {late} | EHLO | 0
MAIL        | resets      | pipe stream | - | EHLO MAIL | 0
MAIL        | closes      | pipe stream | - | EHLO MAIL | 0
MAIL        | half-closes | pipe stream | {mail} | EHLO MAIL | 0
MAIL        | stalls      | pipe stream | {mail} / {late} | EHLO MAIL | 0
RCPT        | resets      | pipe stream | - | ~ | 0
RCPT        | closes      | pipe stream | - | ~ | 0
RCPT        | half-closes | pipe stream | {rcpt} | ~ | 0
RCPT        | stalls      | pipe stream | {rcpt} / {late} | ~ | 0
DATA        | resets      | pipe file   | - | ~ | 0
DATA        | closes      | pipe file   | - | ~ | 0
DATA        | half-closes | pipe file   | {start} | ~ | 0
DATA        | stalls      | pipe file   | {start} / {late} | ~ | 0
DATA        | resets      | stream      | - | ~ DATA | 0
DATA        | closes      | stream      | - | ~ DATA | 0
DATA        | half-closes | stream      | {go} | ~ DATA | 0
DATA        | stalls      | stream      | {go} / {late} | ~ DATA | 0
body        | resets      | pipe file   | - | ~ | 0
body        | closes      | pipe file   | - | ~ | 0
body        | half-closes | pipe file   | - | ~ | 0
body        | stalls      | pipe file   | {late} | ~ | 0
body        | resets      | stream      | - | ~ DATA | 0
body        | closes      | stream      | - | ~ DATA | 0
body        | half-closes | stream      | - | ~ DATA | 0
body        | stalls      | stream      | {late} | ~ DATA | 0
filter      | resets      | pipe file   | - | ~ DATA | 0
filter      | closes      | pipe file   | - | ~ DATA | 0
filter      | half-closes | pipe file   | {gone} | ~ DATA | 0
filter      | stalls      | pipe file   | {queued} / {late} | ~ DATA | 1
dot         | resets      | pipe stream | - | ~ DATA | 1
dot         | closes      | pipe stream | - | ~ DATA | 1
dot         | half-closes | pipe stream | {queued} | ~ DATA | 1
dot         | stalls      | pipe stream | {queued} / {late} | ~ DATA | 1
RSET        | resets      | pipe stream | - | ~ RSET | 0
RSET        | closes      | pipe stream | - | ~ RSET | 0
RSET        | half-closes | pipe stream | {ok} | ~ RSET | 0
RSET        | stalls      | pipe stream | {ok} / {late} | ~ RSET | 0
own-RSET    | resets      | pipe file   | - | ~ RSET | 0
own-RSET    | closes      | pipe file   | - | ~ RSET | 0
own-RSET    | half-closes | pipe file   | - | ~ RSET | 0
own-RSET    | stalls      | pipe file   | {late} | ~ RSET | 0
QUIT        | resets      | pipe stream | - | ~ DATA QUIT | 1
QUIT        | closes      | pipe stream | - | ~ DATA QUIT | 1
QUIT        | half-closes | pipe stream | {bye} | ~ DATA QUIT | 1
QUIT        | stalls      | pipe stream | {bye} | ~ DATA QUIT | 1
NOOP        | resets      | kept        | - | ~ NOOP | 0
NOOP        | closes      | kept        | - | ~ NOOP | 0
NOOP        | half-closes | kept        | - | ~ NOOP | 0
NOOP        | stalls      | kept        | {late} | ~( NOOP)+ | 0
NOOP        | pauses      | kept-stream | - | ~ DATA QUIT | 1
filter-NOOP | resets      | kept        | - | ~( NOOP)+ DATA | 0
filter-NOOP | closes      | kept        | - | ~( NOOP)+ DATA | 0
filter-NOOP | half-closes | kept        | {gone} | ~( NOOP)+ DATA | 0
filter-NOOP | stalls      | kept        | {queued} / {late} | ~( NOOP)+ DATA | 1
HELP        | stalls      | pipe stream | - | EHLO( HELP)+ | 0
"""

CLIENT_SCRIPTS = {
    "filter": f"{REACHED}; {WAIT}; pass",
    "filter-NOOP": f"{WAIT}; pass",
    "own-RSET": REJECT,
}


def client_cases() -> Iterator[Case]:
    """The client's faults."""
    for when, what, ways, replies, verbs, delivered in rows(CLIENT):
        for way in ways.split():
            yield Case(
                *(way, "client", when, what, replies, verbs, int(delivered)),
                script=CLIENT_SCRIPTS.get(when, "pass"),
                impatient=what == "stalls",
            )


# --- The filter ---


class Filter(NamedTuple):
    """A bad filter, and what becomes of the message."""

    what: str
    script: str
    replies: str = "dot {error}"
    ways: str = "pipe file"
    message: str = "short"
    left: int = 0


FLOOD = "head -c 60000000"
SILENT = "exec <&- >&- 2>&-"
DEAF = "trap '' TERM"
CHILD = f"({WAIT}) &"
STOPPED = "sh -c 'kill -STOP $$' &"
APART = f"({WAIT}) </dev/null >/dev/null 2>&1 &"
TALKING = f"({WAIT}) </dev/null >/dev/null &"
HANDED_ON = "exec 3<&0; (sleep 0.2; pass <&3) &"

ENDLESS = (
    Filter("never reads", FOR_EVER),
    Filter("never reads much", FOR_EVER, ways="pipe", message="long"),
    Filter("stops reading", f"head -c 9; {FOR_EVER}", ways="pipe", message="long"),
    Filter("never ends", f"pass; {FOR_EVER}"),
    Filter("goes on in silence", f"pass; {SILENT}; {FOR_EVER}"),
    Filter("ignores SIGTERM", f"{DEAF}; {FOR_EVER}"),
    Filter("ignores SIGTERM, stops", f"{DEAF}; kill -STOP $$; {FOR_EVER}"),
    Filter("stops its group", "kill -STOP 0; pass"),
    Filter("never ends, has children", f"{CHILD} {FOR_EVER}"),
    Filter("never ends, has silent children", f"{APART} {FOR_EVER}"),
    Filter("never ends, has deaf children", f"({DEAF}; {WAIT}) & {FOR_EVER}"),
    Filter("never ends, has stopped children", f"{STOPPED} {FOR_EVER}"),
    # Whose children keep standard output open: the message has no end.
    Filter("leaves children", f"{CHILD} pass", ways="pipe"),
    Filter("dies, has children", f"{CHILD} kill -KILL $$", ways="pipe"),
    Filter("cannot run, has children", f"{CHILD} exec /nonexistent", ways="pipe"),
    Filter("empties it, has children", f"{CHILD} exec cat >/dev/null", ways="pipe"),
    Filter("rejects, leaves children", f"{CHILD} {REJECT}", ways="pipe"),
)

ENDING = (
    # That leave children.
    Filter("dies, has children", f"{CHILD} kill -KILL $$", ways="file"),
    Filter("dies, has silent children", f"{APART} kill -KILL $$"),
    Filter("cannot run, has children", f"{CHILD} exec /nonexistent", ways="file"),
    Filter("cannot run, has silent children", f"{APART} exec /nonexistent"),
    Filter("sees a signal, has silent children", f"{APART} exit 137"),
    Filter("empties it, has silent children", f"{APART} exec cat >&2", ways="pipe"),
    Filter("empties it, has children", f"{CHILD} : >$EMAIL", ways="file"),
    Filter("leaves it to children", HANDED_ON, replies="", ways="pipe"),
    Filter("leaves much to children", HANDED_ON, "", "pipe", message="long"),
    Filter("leaves children", f"{CHILD} pass", replies="", ways="file", left=1),
    Filter("leaves talking children", f"{TALKING} pass", replies="", left=1),
    Filter("leaves silent children", f"{APART} pass", replies="", left=1),
    Filter("rejects, leaves children", f"{APART} {REJECT}", replies="dot {no}", left=1),
    # That say too much on standard error; on standard output, see `flood` below.
    Filter("floods", f"{FLOOD} /dev/zero >&2; pass", replies=""),
    Filter("floods with lines", f"yes | {FLOOD} >&2; pass", replies=""),
    Filter("floods and rejects", f"yes | {FLOOD} >&2; {REJECT}", replies="dot {no}"),
    # That cannot be run, or stop in the middle.
    Filter("is not there", "exec /nonexistent/filter"),
    Filter("is not executable", "exec /etc/passwd"),
    Filter("is a directory", "exec /"),
    Filter("closes all and fails", f"{SILENT}; exit 1", "dot 550 Content Rejected"),
    Filter("closes all and goes on", f"pass; {SILENT}; sleep 0.2", replies=""),
    Filter("reads nothing", "echo Subject: none", "", ways="pipe"),
    Filter("reads nothing of much", "echo Subject: none", "", "pipe", message="long"),
    Filter("takes it away", "rm $EMAIL", ways="file"),
)

# What the system does where nobody handles them (signal(7)).
IGNORED = {signal.SIGCHLD, signal.SIGCONT, signal.SIGURG, signal.SIGWINCH}
STOPPING = {signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU}


def hit_filters(numbers: Iterable[int]) -> Iterator[Filter]:
    """Filters that get these signals, themselves or what the shell runs for them."""
    for number in sorted(map(int, numbers)):
        replies = "" if number in IGNORED else "dot {error}"
        script = f"ulimit -c 0; kill -{number} $$; pass"
        yield Filter(f"gets signal {number}", script, replies)
        inner = f"ulimit -c 0; sh -c 'kill -{number} $$' && pass"
        yield Filter(f"sees signal {number}", inner, replies, ways="pipe")


def filter_cases() -> Iterator[Case]:
    """The filter's faults."""
    others = signal.valid_signals() - STOPPING
    yield from cases_of((*ENDLESS, *hit_filters(STOPPING)), impatient=True)
    yield from cases_of((*ENDING, *hit_filters(others)), impatient=False)


def cases_of(filters: Iterable[Filter], impatient: bool) -> Iterator[Case]:
    """The cases of filters that are to be ended, or end, by themselves."""
    for what, script, replies, ways, message, left in filters:
        verbs = resolved("~ RSET QUIT" if replies else "~ DATA QUIT")
        for way in ways.split():
            yield Case(
                *(
                    way,
                    "filter",
                    "filter",
                    what,
                    resolved(replies),
                    verbs,
                    int(not replies),
                ),
                *(script, message, left, impatient),
            )


# --- The machine ---

# TempDirectory: `small` is a file system of 2 MB, `full` one without a free block,
# and `limited` the process's own limit, 1.5 MB for a file.  The `flood` is a short
# message of which the filter makes an endless one.
DISK = """
missing   | short | pipe stream | - | ~ DATA QUIT | 1
missing   | short | file        | dot {error} | ~ RSET QUIT | 0
missing   | long  | stream      | - | ~ DATA QUIT | 1
missing   | long  | pipe file   | dot {error} | ~ RSET QUIT | 0
missing   | flood | pipe        | dot {error} | ~ RSET QUIT | 0
read-only | short | pipe stream | - | ~ DATA QUIT | 1
read-only | short | file        | dot {error} | ~ RSET QUIT | 0
read-only | long  | stream      | - | ~ DATA QUIT | 1
read-only | long  | pipe file   | dot {error} | ~ RSET QUIT | 0
read-only | flood | pipe        | dot {error} | ~ RSET QUIT | 0
full      | short | pipe stream | - | ~ DATA QUIT | 1
full      | short | file        | dot {error} | ~ RSET QUIT | 0
full      | long  | stream      | - | ~ DATA QUIT | 1
full      | long  | pipe file   | dot {error} | ~ RSET QUIT | 0
full      | flood | pipe        | dot {error} | ~ RSET QUIT | 0
small     | short | pipe file stream | - | ~ DATA QUIT | 1
small     | long  | stream      | - | ~ DATA QUIT | 1
small     | long  | pipe file   | dot {error} | ~ RSET QUIT | 0
small     | flood | pipe        | dot {error} | ~ RSET QUIT | 0
limited   | short | pipe file stream | - | ~ DATA QUIT | 1
limited   | long  | stream      | - | ~ DATA QUIT | 1
limited   | long  | pipe file   | dot {error} | ~ RSET QUIT | 0
limited   | flood | pipe        | dot {error} | ~ RSET QUIT | 0
"""

# So many descriptors, or processes, are free.  Sessions are threads and count too;
# `pass` is a shell alone where it does not have to run cat.
LIMITS = """
descriptors | 0           | pipe file stream | greeting {none} / end | - | 0
descriptors | 1           | pipe file stream | greeting {away} / end | - | 0
descriptors | 2 3 4 5 6 7 | pipe             | dot {error} | ~ RSET QUIT | 0
descriptors | 8           | pipe             | - | ~ DATA QUIT | 1
descriptors | 2 3 4 5     | file             | dot {error} | ~ RSET QUIT | 0
descriptors | 6           | file             | - | ~ DATA QUIT | 1
descriptors | 2           | stream           | - | ~ DATA QUIT | 1
processes   | 0           | pipe file stream | greeting {thread} / end | - | 0
processes   | 1           | pipe file        | dot {error} | ~ RSET QUIT | 0
processes   | 1           | stream           | - | ~ DATA QUIT | 1
processes   | 2           | file             | - | ~ DATA QUIT | 1
processes   | 3           | pipe             | - | ~ DATA QUIT | 1
"""

# So much more memory, in KiB, may the process get; at first less than nothing, more
# often than it may have connections.  The moment is left to chance, but not what the
# client may receive, and whether the message is delivered then.
MEMORY_LEFT = (*[-64] * 6, *range(0, 512, 32))
MEMORY = {
    "end": 0,
    resolved("greeting {thread} / end"): 0,
    resolved("greeting {none} / end"): 0,
    resolved("dot {none} / end"): 0,
    resolved("dot {error}"): 0,
    "": 1,
}


def disk_cases() -> Iterator[Case]:
    """What is wrong with TempDirectory."""
    for what, message, ways, replies, verbs, delivered in rows(DISK):
        for way in ways.split():
            yield Case(
                *(way, "disk", message, what, replies, verbs, int(delivered)),
                script="yes" if message == "flood" else "pass",
                message="long" if message == "long" else "short",
            )


def limit_cases() -> Iterator[Case]:
    """What the system has no more of; `when` is the number that is left."""
    for what, numbers, ways, replies, verbs, delivered in rows(LIMITS):
        for number, way in itertools.product(numbers.split(), ways.split()):
            yield Case(way, "limit", number, what, replies, verbs, int(delivered))
