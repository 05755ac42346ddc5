"""Ours against the C original: the same, except what is meant to differ.

Both programs have the same `DIALOGUES`.  The table in differences.txt lists whatever
may come out differently, under the sentence of the specification that is the reason.
A difference that is not in the table fails, and so does one in the table that does
not occur.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from comparison import SIDES, Dialogue, Programs
from helpers import ORIGINAL, program_under_test, requires
from smtp import Close, Reply, Reset

pytestmark = requires("proxsmtp", ORIGINAL)

# --- Pieces of dialogues and filters ---

HELO, EHLO, QUIT = b"HELO client.example", b"EHLO client.example", b"QUIT"
MAIL, RCPT = b"MAIL FROM:<a@example.com>", b"RCPT TO:<b@example.net>"
TEXT = b"Subject: hello\r\n\r\nhello"


def data(text: bytes = TEXT) -> tuple[bytes, ...]:
    """Give the turns that send mail data: DATA, and the data with its ending dot."""
    return b"DATA", text + b"\r\n."


def session(*turns: bytes, hello: bytes = HELO) -> tuple[bytes, ...]:
    """Give the turns between a HELO and a QUIT, and these."""
    return hello, *turns, QUIT


def message(text: bytes = TEXT) -> tuple[bytes, ...]:
    """Give a session with one usual message."""
    return session(MAIL, RCPT, *data(text))


def tell(*names: str) -> str:
    """Give a filter that puts variables of its environment before the message."""
    values = "".join(f"{name}=${name}\n" for name in names)
    return f"sed -e 's/$/\\r/' <<VALUES\n{values}VALUES\nexec cat"


def refuse(error: str, status: int = 1) -> str:
    """Give a filter that reads all, prints this printf(1) text as an error and ends."""
    return f"cat >/dev/null\nprintf '{error}' >&2\nexit {status}"


# A stage in the background, which writes after the filter's own process has ended.
LATE = "{ sleep 1; printf 'late\\r\\n'; } &"
ENVELOPE = ("SENDER", "RECIPIENTS")
REMOTE = ("REMOTE", "REMOTE_HELO")
FILE: Mapping[str, object] = {"FilterType": "file"}
REJECT: Mapping[str, object] = {"FilterType": "reject"}
SKIP: Mapping[str, object] = {"Skip": "authenticated"}
XCLIENT: Mapping[str, object] = {"XClient": "on"}
OFFER_XCLIENT = (b"XCLIENT NAME ADDR PORT PROTO HELO", b"SIZE 5000")
ADMITTED: Mapping[str, Reply] = {"XCLIENT": b"220 sink.example ESMTP\r\n"}
LOGIN: Mapping[str, Reply] = {
    "AUTH": b"334 VXNlcm5hbWU6\r\n",
    "334": [b"334 UGFzc3dvcmQ6\r\n", b"235 2.7.0 Ok\r\n"],
}
PROMPT: Mapping[str, Reply] = {
    "AUTH": b"334 VXNlcm5hbWU6\r\n",
    "334": b"501 5.7.0 Aborted\r\n",
}
PLAIN = b"AUTH PLAIN AGEAYg=="


# --- The dialogues ---

GREETINGS = [
    Dialogue("greeting", (QUIT,)),
    Dialogue(
        "greeting-multi-line",
        session(),
        greeting=b"220-sink.example\r\n220-Welcome\r\n220 ESMTP\r\n",
    ),
    Dialogue("greeting-554", session(), greeting=b"554 5.3.2 No service\r\n"),
    Dialogue(
        "greeting-554-multi-line", session(), greeting=b"554-No\r\n554 service\r\n"
    ),
    Dialogue("greeting-421", (None,), script={"GREETING": Close(b"421 Busy\r\n")}),
    Dialogue("server-absent", session(), settings={"OutAddress": "127.0.0.1:1"}),
]

HELLOS = [
    Dialogue("helo", message()),
    Dialogue("ehlo", session(MAIL, RCPT, *data(), hello=EHLO)),
    Dialogue(
        "helo-multi-line",
        session(),
        script={"HELO": b"250-sink\r\n250-two\r\n250 three\r\n"},
    ),
    Dialogue("helo-refused", session(), script={"HELO": b"550-go\r\n550 away\r\n"}),
    Dialogue("ehlo-refused", session(HELO, hello=EHLO), script={"EHLO": b"502 No\r\n"}),
    Dialogue("ehlo-no-extensions", session(hello=EHLO), extensions=()),
    Dialogue(
        "ehlo-removed",
        session(hello=EHLO),
        extensions=(
            b"SIZE 1000",
            b"STARTTLS",
            b"CHUNKING",
            b"8BITMIME",
            b"BINARYMIME",
            b"CHECKPOINT",
            b"AUTH PLAIN LOGIN",
            b"XCLIENT NAME ADDR",
            b"XEXCH50",
            b"XFORWARD NAME ADDR",
        ),
    ),
    Dialogue(
        "ehlo-removed-last",
        session(hello=EHLO),
        extensions=(b"SIZE 1000", b"STARTTLS"),
    ),
    Dialogue(
        "ehlo-removed-all",
        session(hello=EHLO),
        extensions=(b"STARTTLS", b"CHUNKING", b"XCLIENT NAME"),
    ),
    Dialogue(
        "ehlo-removed-since",
        session(hello=EHLO),
        extensions=(
            b"BURL imap",
            b"PRDR",
            b"PIPECONNECT",
            b"PIPE_CONNECT",
            b"X_PIPE_CONNECT",
            b"SIZE 1000",
        ),
    ),
    Dialogue(
        "ehlo-lower-case",
        session(hello=EHLO),
        extensions=(b"starttls", b"Chunking", b"size 1000"),
    ),
    Dialogue(
        "ehlo-similar",
        session(hello=EHLO),
        extensions=(b"STARTTLSX", b"XCLIENTELE", b"SIZE 1000"),
    ),
]

VERBS: list[Dialogue] = [
    Dialogue("starttls", session(b"STARTTLS", b"starttls")),
    Dialogue("bdat", (HELO, MAIL, RCPT, b"BDAT 5 LAST", b"NOOP")),
    Dialogue("xclient-from-client", session(b"XCLIENT ADDR=192.0.2.1", b"NOOP")),
    *(
        Dialogue(
            f"never-passed-{verb}",
            session(verb.encode() + b" x"),
            script={verb: b"500 server\r\n"},
        )
        for verb in ("BURL", "XEXCH50", "TURN", "ATRN", "LHLO")
    ),
    Dialogue(
        "verbs-pass",
        session(b"FOO bar", b"VRFY <b@example.net>", b"HELP", b"NOOP x", b"EXPN list"),
        script={
            "HELP": b"214-a\r\n214-b\r\n214 c\r\n",
            "EXPN": b"250 <c@d.example>\r\n",
        },
    ),
    Dialogue(
        "lower-case",
        (b"helo x", MAIL.lower(), RCPT.lower(), b"data", TEXT + b"\r\n.", b"quit"),
    ),
    Dialogue(
        "blanks-around",
        session(b"NOOP ", b" NOOP", b"\tNOOP"),
        script={"\tNOOP": b"250 2.0.0 Ok\r\n"},
    ),
    Dialogue("empty-line", session(b""), script={"": b"500 5.5.2 What?\r\n"}),
    Dialogue("bare-lf", session(b"NOOP\nNOOP")),
    Dialogue("bare-cr", session(b"NO\rOP")),
    Dialogue("nul", session(b"NO\0OP", b"NOOP")),
    Dialogue("line-of-2000", session(b"NOOP " + b"x" * 2000)),
    Dialogue("line-of-20000", session(b"NOOP " + b"x" * 20000, b"NOOP")),
    Dialogue("pipelined", (HELO, b"NOOP\r\nHELP", QUIT), script={"HELP": b"214 a\r\n"}),
    Dialogue("rset", session(MAIL, b"RSET", b"RSET")),
    Dialogue("quit-refused", session(), script={"QUIT": b"500 No\r\n"}),
    Dialogue("client-leaves", (HELO, MAIL, RCPT)),
]

AUTHENTICATION = [
    Dialogue("auth-plain", session(PLAIN, MAIL, RCPT, *data())),
    Dialogue(
        "auth-plain-prompted",
        session(b"AUTH PLAIN", b"AGEAYg=="),
        script={"AUTH": b"334 \r\n"},
    ),
    Dialogue(
        "auth-login",
        session(b"AUTH LOGIN", b"YQ==", b"Yg==", MAIL, RCPT, *data()),
        script=LOGIN,
    ),
    Dialogue("auth-refused", session(PLAIN), script={"AUTH": b"535 5.7.8 No\r\n"}),
    Dialogue("auth-aborted", session(b"AUTH LOGIN", b"*", b"NOOP"), script=PROMPT),
    Dialogue("auth-answer-spells-data", session(b"AUTH LOGIN", b"DATA"), script=PROMPT),
    Dialogue(
        "skip", session(PLAIN, MAIL, RCPT, *data()), refuse("no\\n"), settings=SKIP
    ),
    Dialogue("skip-not-authenticated", message(), refuse("550 no\\n"), settings=SKIP),
    Dialogue(
        "skip-auth-refused",
        session(PLAIN, MAIL, RCPT, *data()),
        refuse("550 no\\n"),
        settings=SKIP,
        script={"AUTH": b"535 5.7.8 No\r\n"},
    ),
    Dialogue(
        "skip-login",
        session(b"AUTH LOGIN", b"YQ==", b"Yg==", MAIL, RCPT, *data()),
        refuse("550 no\\n"),
        settings=SKIP,
        script=LOGIN,
    ),
    Dialogue(
        "skip-reject",
        session(PLAIN, MAIL, RCPT, *data()),
        settings={**SKIP, **REJECT},
    ),
    Dialogue(
        "skip-header",
        session(PLAIN, MAIL, RCPT, *data()),
        settings={**SKIP, "Header": "X-A: 1"},
    ),
]

MESSAGES = [
    Dialogue("no-filter", message(), ""),
    Dialogue("cat", message()),
    Dialogue("sed", message(), "sed -e s/hello/goodbye/"),
    Dialogue(
        "other-message",
        message(),
        "cat >/dev/null; printf 'Subject: other\\r\\n\\r\\nother\\r\\n'",
    ),
    Dialogue("stderr-and-exit-0", message(), "echo 550 warned >&2; cat"),
    Dialogue("file", message(), 'sed -i -e s/hello/goodbye/ "$EMAIL"', settings=FILE),
    Dialogue("file-unchanged", message(), "exit 0", settings=FILE),
    Dialogue(
        "file-replaced",
        message(),
        "printf 'Subject: new\\r\\n\\r\\nnew\\r\\n' >\"$EMAIL.new\"\n"
        'mv "$EMAIL.new" "$EMAIL"',
        settings=FILE,
    ),
    Dialogue("file-output", message(), "echo ignored", settings=FILE),
    Dialogue("file-refused", message(), refuse("554 no\\n"), settings=FILE),
    Dialogue("file-emptied", message(), ': >"$EMAIL"', settings=FILE),
    Dialogue("file-gone", message(), 'rm "$EMAIL"', settings=FILE),
    Dialogue("filter-absent", message(), settings={"FilterCommand": "/absent/filter"}),
    Dialogue("reject", session(MAIL, RCPT, b"DATA"), settings=REJECT),
    Dialogue(
        "reject-reply",
        session(MAIL, RCPT, b"DATA"),
        settings={**REJECT, "FilterReject": "550 5.7.1 Go away"},
    ),
    Dialogue(
        "reject-text",
        session(MAIL, RCPT, b"DATA"),
        settings={**REJECT, "FilterReject": "Go away"},
    ),
    Dialogue("two-messages", (*message()[:-1], *message(b"Subject: 2")[1:])),
    Dialogue(
        "two-refused", (*message()[:-1], *message()[1:]), refuse("550 5.7.1 No\\n")
    ),
    Dialogue("empty-message", session(MAIL, RCPT, b"DATA", b".")),
    Dialogue("no-end-of-line", message(), "cat >/dev/null; printf 'a: b\\r\\n\\r\\nc'"),
    Dialogue("lf-output", message(), "cat >/dev/null; printf 'a: b\\n\\nc\\n.\\nd\\n'"),
    Dialogue("bare-line-ends", message(b"a: b\r\n\r\nc\nd\re\n.\nf\r.\rg")),
    Dialogue(
        "bare-line-ends-no-filter", message(b"a: b\r\n\r\nc\nd\re\n.\nf\r.\rg"), ""
    ),
    Dialogue("cr-cr-lf", message(b"a: b\r\r\n\r\r\nc\r\r\n\r\rd")),
    Dialogue("dots-after-lf", message(b"a: b\r\n\r\nc\n..d\n.e")),
    Dialogue("dots", message(b"a: b\r\n\r\n..\r\n...c\r\n..d")),
    Dialogue("dots-no-filter", message(b"a: b\r\n\r\n..\r\n...c\r\n..d"), ""),
    Dialogue("dots-seen", message(b"a: b\r\n\r\n..\r\n..c"), "sed -e 's/^/>/'"),
    Dialogue("eight-bit", message(b"a: b\r\n\r\n" + bytes(range(128, 256)))),
    Dialogue("background-writer", message(), f"cat\n{LATE}"),
    Dialogue("background-writer-refused", message(), f"{LATE}\n{refuse('554 no')}"),
]

VERDICTS = [
    Dialogue("exit-0-empty", message(), "cat >/dev/null"),
    Dialogue("exit-1-silent", message(), refuse("")),
    Dialogue("exit-200-silent", message(), refuse("", 200)),
    Dialogue("exit-1-2xx", message(), refuse("250 2.0.0 Dropped\\n")),
    Dialogue("exit-1-4xx", message(), refuse("450 4.7.1 Later\\n")),
    Dialogue("exit-1-5xx", message(), refuse("554 5.7.1 No\\n")),
    Dialogue("exit-1-3xx", message(), refuse("354 Go on\\n")),
    Dialogue("exit-1-1xx", message(), refuse("150 Odd\\n")),
    Dialogue("exit-1-9xx", message(), refuse("999 Odd\\n")),
    Dialogue("exit-1-code-alone", message(), refuse("554\\n")),
    Dialogue("exit-1-code-of-four", message(), refuse("5541 x\\n")),
    Dialogue("exit-1-hyphen", message(), refuse("550-No\\n")),
    Dialogue("exit-1-text", message(), refuse("no good\\n")),
    Dialogue("exit-1-enhanced-code", message(), refuse("5.7.1 no good\\n")),
    Dialogue("exit-1-multi-line", message(), refuse("one\\ntwo\\n554 three\\n")),
    Dialogue("exit-1-multi-line-text", message(), refuse("554 one\\ntwo\\nthree\\n")),
    Dialogue("exit-1-no-newline", message(), refuse("one\\n554 two")),
    Dialogue("exit-1-blank-lines", message(), refuse("554 one\\n\\n \\n\\r\\n")),
    Dialogue("exit-1-blanks-around", message(), refuse("  554 no  \\n")),
    Dialogue("exit-1-crlf", message(), refuse("one\\r\\n554 two\\r\\n")),
    Dialogue("exit-1-control", message(), refuse("\\001no\\033[2J\\n")),
    Dialogue("exit-1-8-bit", message(), refuse("caf\\303\\251\\n")),
    Dialogue("exit-1-long", message(), refuse("554 " + "x" * 600 + "\\n")),
    Dialogue("exit-126", message(), refuse("", 126)),
    Dialogue("exit-127", message(), refuse("", 127)),
    Dialogue("exit-127-coded", message(), refuse("550 5.7.1 No\\n", 127)),
    Dialogue("exit-75", message(), refuse("", 75)),
    Dialogue("exit-75-text", message(), refuse("mail disk is away\\n", 75)),
    Dialogue("exit-75-coded", message(), refuse("450 4.7.1 Later\\n", 75)),
    Dialogue("killed", message(), "cat >/dev/null; kill -9 $$"),
    Dialogue("killed-coded", message(), "cat >/dev/null; echo 554 x >&2; kill $$"),
    Dialogue(
        "shell-complains",
        message(),
        settings={"FilterCommand": "cat >/dev/null; absent-command; exit 1"},
    ),
    Dialogue(
        "shell-killed",
        message(),
        settings={"FilterCommand": "cat >/dev/null; kill -9 $$"},
    ),
    Dialogue(
        "shell-killed-coded",
        message(),
        settings={"FilterCommand": "cat >/dev/null; echo 554 x >&2; kill $$"},
    ),
    Dialogue(
        "timed-out",
        message(),
        "cat >/dev/null; exec sleep 30",
        settings={"FilterTimeout": 1},
    ),
]

HEADERS = [
    Dialogue("header", message(), settings={"Header": "X-A: 1"}),
    Dialogue("header-values", message(), settings={"Header": "X-A: %i %l %%"}),
    Dialogue("header-date", message(), settings={"Header": "X-A: %d"}),
    Dialogue("header-escapes", message(), settings={"Header": r"X-A:\r\n\t1\\"}),
    Dialogue("header-two", message(), settings={"Header": r"X-A: 1\nX-B: 2\r\n"}),
    Dialogue("header-received", message(), settings={"Header": "Received: by %l"}),
    Dialogue("header-taken-back", message(), settings="Header: X-A: 1\nHeader:\n"),
    Dialogue(
        "header-no-body",
        message(b"Subject: x"),
        settings={"Header": "X-A: 1"},
    ),
    Dialogue(
        "header-no-header",
        message(b"\r\nbody"),
        settings={"Header": "X-A: 1"},
    ),
    Dialogue(
        "header-no-field",
        message(b"Hello\r\n\r\nc"),
        settings={"Header": "X-A: 1"},
    ),
    Dialogue("header-no-filter", message(), "", settings={"Header": "X-A: 1"}),
    Dialogue("header-file", message(), "exit 0", settings={**FILE, "Header": "X-A: 1"}),
]

ENVELOPES = [
    Dialogue("environment", message(), tell("CLIENT", "SERVER", *ENVELOPE, "TMPDIR")),
    Dialogue("environment-email", message(), "printf '%s\\r\\n' ${EMAIL-unset}; cat"),
    Dialogue("null-sender", session(b"MAIL FROM:<>", RCPT, *data()), tell(*ENVELOPE)),
    Dialogue(
        "quoted-local-parts",
        session(
            b'MAIL FROM:<"a b"@example.com>', b'RCPT TO:<"c>d"@example.net>', *data()
        ),
        tell(*ENVELOPE),
    ),
    Dialogue(
        "parameters",
        session(MAIL + b" SIZE=100 BODY=8BITMIME", RCPT + b" NOTIFY=NEVER", *data()),
        tell(*ENVELOPE),
    ),
    Dialogue(
        "blanks",
        session(b"MAIL FROM: <a@example.com> ", b"RCPT TO:  <b@example.net> ", *data()),
        tell(*ENVELOPE),
    ),
    Dialogue(
        "no-brackets",
        session(b"MAIL FROM:a@example.com", b"RCPT TO:b@example.net", *data()),
        tell(*ENVELOPE),
    ),
    Dialogue(
        "source-route",
        session(
            b"MAIL FROM:<@r.example:a@example.com>", b"RCPT TO:<postmaster>", *data()
        ),
        tell(*ENVELOPE),
    ),
    Dialogue(
        "many-recipients",
        session(MAIL, *(b"RCPT TO:<u%d@example.net>" % n for n in range(40)), *data()),
        tell("RECIPIENTS"),
    ),
    Dialogue(
        "some-refused",
        session(MAIL, *(b"RCPT TO:<u%d@example.net>" % n for n in range(3)), *data()),
        tell("RECIPIENTS"),
        script={"RCPT": [b"250 Ok\r\n", b"550-no\r\n550 such\r\n", b"251 Ok\r\n"]},
    ),
    Dialogue(
        "rset-forgets",
        session(
            b"MAIL FROM:<x@x.example>",
            b"RCPT TO:<y@y.example>",
            b"RSET",
            *message()[1:-1],
        ),
        tell(*ENVELOPE),
    ),
    Dialogue(
        "helo-forgets",
        session(b"MAIL FROM:<x@x.example>", b"RCPT TO:<y@y.example>", *message()[:-1]),
        tell(*ENVELOPE),
    ),
    Dialogue(
        "second-message-forgets",
        (
            *message()[:-1],
            *session(b"MAIL FROM:<x@x.example>", b"RCPT TO:<y@y.example>", *data())[1:],
        ),
        tell(*ENVELOPE),
    ),
    Dialogue("mail-before-helo", message()[1:]),
]

XFORWARDS = [
    Dialogue(
        "xforward-one-line",
        session(
            b"XFORWARD NAME=far.example ADDR=192.0.2.7 PROTO=ESMTP HELO=far.example",
            *message()[1:-1],
        ),
        tell(*REMOTE),
    ),
    Dialogue(
        "xforward-two-lines",
        session(
            b"XFORWARD NAME=far.example ADDR=192.0.2.7",
            b"XFORWARD PROTO=ESMTP HELO=far.example",
            *message()[1:-1],
        ),
        tell(*REMOTE),
    ),
    Dialogue(
        "xforward-lower-case",
        session(b"xforward addr=192.0.2.7", *message()[1:-1]),
        tell(*REMOTE),
    ),
    Dialogue(
        "xforward-no-value",
        session(
            b"XFORWARD ADDR=[UNAVAILABLE]",
            b"XFORWARD HELO=[TEMPUNAVAIL]",
            *message()[1:-1],
        ),
        tell(*REMOTE),
    ),
    Dialogue(
        "xforward-ipv6",
        session(
            b"XFORWARD ADDR=IPV6:2001:db8::7",
            b"XFORWARD HELO=a+20b",
            *message()[1:-1],
        ),
        tell(*REMOTE),
    ),
    Dialogue(
        "xforward-forged",
        session(b"XFORWARD HELO=addr=192.0.2.66 ADDR=192.0.2.7", *message()[1:-1]),
        tell(*REMOTE),
    ),
    Dialogue(
        "xforward-refused",
        session(b"XFORWARD ADDR=192.0.2.7", *message()[1:-1]),
        tell(*REMOTE),
        script={"XFORWARD": b"550 5.7.0 No\r\n"},
    ),
    Dialogue(
        "xforward-lasts-one-message",
        session(b"XFORWARD ADDR=192.0.2.7", *message()[1:-1], *message()[1:-1]),
        tell(*REMOTE),
    ),
    Dialogue(
        "xforward-rset",
        session(b"XFORWARD ADDR=192.0.2.7", b"RSET", *message()[1:-1]),
        tell(*REMOTE),
    ),
]

XCLIENTS = [
    Dialogue("xclient-helo", message(), settings=XCLIENT, script=ADMITTED),
    Dialogue(
        "xclient-ehlo",
        session(*message()[1:-1], *message()[1:-1], hello=EHLO),
        settings=XCLIENT,
        script=ADMITTED,
        extensions=OFFER_XCLIENT,
    ),
    Dialogue(
        "xclient-not-offered",
        session(*message()[1:-1], hello=EHLO),
        settings=XCLIENT,
    ),
    Dialogue(
        "xclient-refused",
        session(*message()[1:-1], hello=EHLO),
        settings=XCLIENT,
        script={"XCLIENT": b"550 5.7.0 No\r\n"},
        extensions=OFFER_XCLIENT,
    ),
]

REFUSALS: list[Dialogue] = [
    Dialogue(
        "server-refuses-mail",
        session(MAIL, MAIL),
        script={"MAIL": b"550-no\r\n550 mail\r\n"},
    ),
    Dialogue(
        "server-refuses-rcpt", session(MAIL, RCPT), script={"RCPT": b"550 5.1.1 No\r\n"}
    ),
    Dialogue(
        "server-refuses-data",
        message(),
        script={"DATA": b"451-later\r\n451 please\r\n"},
    ),
    Dialogue(
        "server-refuses-data-no-filter",
        session(MAIL, RCPT, b"DATA"),
        "",
        script={"DATA": b"451-later\r\n451 please\r\n"},
    ),
    Dialogue(
        "server-refuses-message",
        message(),
        script={"DOT": b"552-too\r\n552 big\r\n"},
    ),
    Dialogue(
        "server-refuses-message-no-filter",
        message(),
        "",
        script={"DOT": b"552-too\r\n552 big\r\n"},
    ),
    Dialogue(
        "server-accepts-in-lines",
        message(),
        script={"DOT": b"250-thank\r\n250 you\r\n"},
    ),
    Dialogue("data-before-mail", session(b"DATA")),
    Dialogue("data-before-rcpt", session(MAIL, b"DATA")),
    Dialogue(
        "data-after-refused-rcpt",
        session(MAIL, RCPT, b"DATA"),
        script={"RCPT": b"550 5.1.1 No\r\n"},
    ),
    Dialogue("data-argument", session(MAIL, RCPT, b"DATA x")),
    Dialogue("data-blanks", session(MAIL, RCPT, b"DATA \t", TEXT + b"\r\n.")),
    Dialogue("server-354-unasked", session(b"NOOP"), script={"NOOP": b"354 Go\r\n"}),
    Dialogue("server-closes-at-mail", (HELO, MAIL, None), script={"MAIL": Close()}),
    Dialogue("server-resets-at-mail", (HELO, MAIL, None), script={"MAIL": Reset()}),
    Dialogue(
        "server-421-at-mail",
        (HELO, MAIL, None),
        script={"MAIL": Close(b"421 Bye\r\n")},
    ),
    Dialogue(
        "server-closes-at-data",
        (*message()[:-1], None),
        script={"DATA": Close()},
    ),
    Dialogue("server-closes-at-dot", (*message()[:-1], None), script={"DOT": Close()}),
]

DIALOGUES: list[Dialogue] = [
    *GREETINGS,
    *HELLOS,
    *VERBS,
    *AUTHENTICATION,
    *MESSAGES,
    *VERDICTS,
    *HEADERS,
    *ENVELOPES,
    *XFORWARDS,
    *XCLIENTS,
    *REFUSALS,
]


# --- What is meant to differ ---


@dataclass(frozen=True)
class Difference:
    """A row of the table: lines of the original's account that ours has not, lines
    that only ours has, and the sentence of the specification that says so.
    """

    dialogue: str
    side: str
    original: Sequence[str]
    ours: Sequence[str]
    reason: str


def read_table(text: str) -> Iterator[Difference]:
    """Give the rows of the table, whose form its own first lines explain."""
    reason = ""
    for block in text.split("\n\n"):
        head, *lines = block.splitlines()
        if head.startswith("=="):
            reason = " ".join(line.lstrip("= ") for line in (head, *lines))
        elif not head.startswith("#"):
            names, _, side = head.rpartition(": ")
            original = [line[1:] for line in lines if line.startswith("-")]
            ours = [line[1:] for line in lines if line.startswith("+")]
            for name in names.split():
                yield Difference(name, side, original, ours, reason)


TABLE = Path(__file__).with_name("differences.txt")
DIFFERENCES = list(read_table(TABLE.read_text("utf-8")))


# --- The comparison ---


def change(side: str, original: Sequence[str], ours: Sequence[str]) -> list[str]:
    """Give the lines that only the original's account of a side has, with `-`, and
    then those that only ours has, with `+`.
    """
    lines = [f"{side} {x[0]}{x[2:]}" for x in difflib.ndiff(original, ours)]
    marks = [f"{side} {mark}" for mark in "-+"]
    return [line for mark in marks for line in lines if line.startswith(mark)]


def listed(dialogue: str, side: str) -> list[str]:
    """Give what the table has for a side of a dialogue, in the form of `change`."""
    rows = [d for d in DIFFERENCES if (d.dialogue, d.side) == (dialogue, side)]
    removed = [f"{side} -{line}" for row in rows for line in row.original]
    return removed + [f"{side} +{line}" for row in rows for line in row.ours]


@pytest.fixture(scope="module")
def programs() -> Iterator[tuple[Programs, Programs]]:
    """Provide the original, and ours."""
    ours = Programs(program_under_test(), is_shared=True)
    yield Programs([ORIGINAL], is_shared=False), ours
    assert ours.finish() == []


@pytest.mark.parametrize("dialogue", DIALOGUES, ids=[d.name for d in DIALOGUES])
def test_dialogue(dialogue: Dialogue, programs: tuple[Programs, Programs]) -> None:
    with ThreadPoolExecutor() as pool:  # at once: the original mostly waits
        original, ours = pool.map(lambda each: each.run(dialogue), programs)
    found, expected = "", ""
    for side in SIDES:
        lines = change(side, getattr(original, side), getattr(ours, side))
        found += "\n".join([*lines, ""])
        expected += "\n".join([*listed(dialogue.name, side), ""])
    assert found == expected
    assert ours.faults == ()


def test_the_table_fits_the_dialogues() -> None:
    names = [d.name for d in DIALOGUES]
    assert len(names) == len(set(names))
    assert {d.dialogue for d in DIFFERENCES} <= set(names)
    assert {d.side for d in DIFFERENCES} <= set(SIDES)
    assert all(d.reason and (d.original or d.ours) for d in DIFFERENCES)
