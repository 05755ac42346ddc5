"""The configuration: addresses, the table of settings, and the file."""

from __future__ import annotations

import functools
import inspect
import re
from typing import NamedTuple

import pytest

import proxsmtpd as program
from proxsmtpd import SETTINGS, Address, Config, FilterType, TlsMode

PATH = "/etc/proxsmtpd.conf"
MINIMAL = b"OutAddress: 25\n"
BY_NAME = {setting.name: setting for setting in SETTINGS}


def parsed(octets: bytes) -> Config:
    """Return the settings of a file that has OutAddress besides, and must be right."""
    config, errors = program.parse_config(MINIMAL + octets, PATH)
    assert [str(error) for error in errors] == []
    return config


def faults(octets: bytes, path: str = PATH) -> list[str]:
    """Return the complaints about a file."""
    _, errors = program.parse_config(octets, path)
    return [str(error) for error in errors]


# --- Addresses ---------------------------------------------------------------


class Parts(NamedTuple):
    """An address's parts, with 99 for the default port."""

    host: str
    port: int
    path: str = ""
    is_any: bool = False


ADDRESSES = {
    "10025": Parts("", 10025, is_any=True),
    "1": Parts("", 1, is_any=True),
    "65535": Parts("", 65535, is_any=True),
    "00025": Parts("", 25, is_any=True),
    "127.0.0.1": Parts("127.0.0.1", 99),
    "127.0.0.1:10025": Parts("127.0.0.1", 10025),
    "0.0.0.0": Parts("0.0.0.0", 99, is_any=True),
    "0.0.0.0:25": Parts("0.0.0.0", 25, is_any=True),
    "host.example": Parts("host.example", 99),
    "host.example:25": Parts("host.example", 25),
    "host.example.:25": Parts("host.example.", 25),
    "localhost": Parts("localhost", 99),
    "A-1.B": Parts("A-1.B", 99),
    "under_score:25": Parts("under_score", 25),
    "4.example": Parts("4.example", 99),
    "[::1]:25": Parts("::1", 25),
    "[::1]": Parts("::1", 99),
    "::1": Parts("::1", 99),
    "2001:db8::25": Parts("2001:db8::25", 99),
    "[2001:DB8::1]:65535": Parts("2001:DB8::1", 65535),
    "[::]:25": Parts("::", 25, is_any=True),
    "[::]": Parts("::", 99, is_any=True),
    "::": Parts("::", 99, is_any=True),
    "[::ffff:192.0.2.1]:25": Parts("::ffff:192.0.2.1", 25),
    "[fe80::1%eth0]:25": Parts("fe80::1%eth0", 25),
    "/run/some.sock": Parts("", 0, "/run/some.sock"),
    "/run/a b:25": Parts("", 0, "/run/a b:25"),
    "/": Parts("", 0, "/"),
}


@pytest.mark.parametrize(("text", "parts"), ADDRESSES.items(), ids=ADDRESSES.keys())
def test_address(text: str, parts: Parts) -> None:
    address = Address.parse(text, 99)
    assert address == (text, parts.host, parts.port, parts.path)
    assert address.is_any is parts.is_any


NO_ADDRESSES = [
    "",
    "0",
    "65536",
    "99999999999999999999",
    "-1",
    "+25",
    "2 5",
    "\u0662\u0665",
    "\u00b2",
    ":",
    ":25",
    "host:",
    "host:0",
    "host:65536",
    "host:x",
    "host:+25",
    "host :25",
    "host:25:26",
    "host:\u0662\u0665",
    "two words",
    "-host",
    "a..b",
    ".example",
    "ex\u00e4mple",
    "\udce4",
    "a/b",
    "run/some.sock",
    "x" * 256,
    "1.2.3",
    "1.2.3.4.5",
    "256.0.0.1",
    "1.2.3.4:",
    "1.2.3.4:0",
    "[]",
    "[]:25",
    "[",
    "[::1",
    "::1]",
    "[::1]25",
    "[::1]:",
    "[::1]:0",
    "[::1]:65536",
    "[::1]:x",
    "[:::1]:25",
    "[1.2.3.4]:25",
    "[host]:25",
    ":::",
    "::1::2",
    "a\nb",
    "host\n",
    "25\n",
    "[::1]:25\n",
]


@pytest.mark.parametrize("text", NO_ADDRESSES, ids=ascii)
def test_no_address(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  (its text is the caller's)
        Address.parse(text, 99)


# --- The table of settings -----------------------------------------------------

# Each name with its default, as proxsmtpd.conf(5) has them.
DEFAULTS = {
    "FilterCommand": "",
    "FilterFailure": "defer",
    "FilterMode": "enforce",
    "FilterReject": "530 Email Rejected",
    "FilterTimeout": "30",
    "FilterType": "pipe",
    "FilterVerdict": "any",
    "Header": "",
    "KeepAlives": "0",
    "Listen": "10025",
    "ListenCertificate": "",
    "ListenKey": "",
    "ListenTls": "off",
    "MaxConnections": "64",
    "MaxMessageSize": "0",
    "OutAddress": "",
    "OutTls": "off",
    "OutTlsName": "",
    "OutTlsTrust": "",
    "PidFile": "",
    "Processes": "auto",
    "ProxyProtocol": "off",
    "Skip": "",
    "TempDirectory": "/tmp",
    "TimeOut": "180",
    "TransparentProxy": "off",
    "User": "",
    "XClient": "off",
}


def test_settings() -> None:
    assert {setting.name: setting.default for setting in SETTINGS} == DEFAULTS
    assert len(SETTINGS) == len(DEFAULTS)


def test_defaults() -> None:
    config = parsed(b"")
    assert config.filter_command == ""
    assert config.filter_reject == b"530 Email Rejected\r\n"
    assert config.filter_timeout == 30
    assert config.filter_type is FilterType.PIPE
    assert config.header == b""
    assert config.keep_alives == 0
    assert config.listen == ("10025", "", 10025, "")
    assert config.max_connections == 64
    assert config.max_message_size == 0
    assert config.observes is config.passes_failures is False
    assert config.proxy_protocol is False
    assert config.out_address == ("25", "", 25, "")
    assert config.out_tls is TlsMode.OFF
    assert config.listen_tls is TlsMode.OFF
    assert config.server_tls is config.client_tls is None
    assert config.pid_file == ""
    assert config.skip_authenticated is False
    assert config.temp_directory == b"/tmp"
    assert config.timeout == 180
    assert config.user == ""
    assert config.xclient is False


# A name, a value as it stands in the file, and what comes of it.
VALUES: dict[str, tuple[str, str, object]] = {
    "command": ("FilterCommand", "/bin/f -a 'b  c' #d: $E", "/bin/f -a 'b  c' #d: $E"),
    "no command": ("FilterCommand", "", ""),
    "reject text": ("FilterReject", "Go away", b"550 Content Rejected; Go away\r\n"),
    "reject reply": ("FilterReject", "554 5.7.1 No", b"554 5.7.1 No\r\n"),
    "reject reply, 4xx": ("FilterReject", "450 Later", b"450 Later\r\n"),
    "reject reply of several lines": ("FilterReject", "554-No", b"554 No\r\n"),
    "reject 8-bit": ("FilterReject", "554 \u00e4", b"554 \xc3\xa4\r\n"),
    "reject default": ("FilterReject", "", b"530 Email Rejected\r\n"),
    "filter time": ("FilterTimeout", "1", 1),
    "failure defer": ("FilterFailure", "defer", False),
    "failure pass": ("FilterFailure", "PASS", True),
    "mode enforce": ("FilterMode", "enforce", False),
    "verdict any": ("FilterVerdict", "Any", False),
    "verdict coded": ("FilterVerdict", "coded", True),
    "mode observe": ("FilterMode", "Observe", True),
    "size": ("MaxMessageSize", "52428800", 52428800),
    "no size": ("MaxMessageSize", "0", 0),
    "proxy protocol": ("ProxyProtocol", "on", True),
    "type pipe": ("FilterType", "pipe", FilterType.PIPE),
    "type file": ("FilterType", "file", FilterType.FILE),
    "type reject": ("FilterType", "reject", FilterType.REJECT),
    "type upper case": ("FilterType", "FILE", FilterType.FILE),
    "header": ("Header", r"X: %i\t\\n\r\n %%", b"X: %i\t\\n\r\n %%"),
    "no header": ("Header", "", b""),
    "keep alive": ("KeepAlives", "15", 15),
    "no keep alive": ("KeepAlives", "0", 0),
    "listen": ("Listen", "[::1]", ("[::1]", "::1", 10025, "")),
    "listen on a name": ("Listen", "localhost", ("localhost", "localhost", 10025, "")),
    "listen on a path": ("Listen", "/run/x:y", ("/run/x:y", "", 0, "/run/x:y")),
    "out": ("OutAddress", "192.0.2.1", ("192.0.2.1", "192.0.2.1", 25, "")),
    "out with port": ("OutAddress", "h.x:26", ("h.x:26", "h.x", 26, "")),
    "certificate": ("ListenCertificate", "/etc//x.pem", b"/etc/x.pem"),
    "key": ("ListenKey", "/etc/x y.key", b"/etc/x y.key"),
    "listen, off": ("ListenTls", "OFF", TlsMode.OFF),
    "out, may": ("OutTls", "May", TlsMode.MAY),
    "out, require": ("OutTls", "require", TlsMode.REQUIRE),
    "out, name": ("OutTlsName", "mail.example", "mail.example"),
    "out, address for a name": ("OutTlsName", "::1", "::1"),
    "out, trust": ("OutTlsTrust", "/etc//ca.pem", b"/etc/ca.pem"),
    "connections, least": ("MaxConnections", "1", 1),
    "connections, most": ("MaxConnections", "10240", 10240),
    "all processors": ("Processes", "Auto", 0),
    "processes, least": ("Processes", "1", 1),
    "processes, most": ("Processes", "256", 256),
    "pid file": ("PidFile", "/run/p d.pid", "/run/p d.pid"),
    # As C, where an empty value is no pid file.
    "no pid file": ("PidFile", "", ""),
    "skip": ("Skip", "authenticated", True),
    "skip upper case": ("Skip", "AUTHENTICATED", True),
    "directory": ("TempDirectory", "/var/tmp", b"/var/tmp"),
    "directory with more": ("TempDirectory", "/var//tmp/../tmp/", b"/var/tmp"),
    "time": ("TimeOut", "7", 7),
    "time with zeros": ("TimeOut", "007", 7),
    # As C, which reads numbers by strtol.
    "time with a sign": ("TimeOut", "+7", 7),
    "user": ("User", "nobody", "nobody"),
    "user number": ("User", "65534", "65534"),
}


@pytest.mark.parametrize(("name", "text", "value"), VALUES.values(), ids=VALUES.keys())
def test_value(name: str, text: str, value: object) -> None:
    config = parsed(f"{name}: {text}\n".encode())
    assert getattr(config, BY_NAME[name].attribute) == value


ON = ["1", "yes", "true", "t", "on", "ON", "Yes", "T", "TRUE"]
OFF = ["0", "no", "false", "f", "off", "OFF", "No", "F", "FALSE"]


@pytest.mark.parametrize("word", ON)
def test_on(word: str) -> None:
    assert parsed(f"XClient: {word}\n".encode()).xclient is True


@pytest.mark.parametrize("word", OFF)
def test_off(word: str) -> None:
    off = f"XClient: on\nXClient: {word}\nTransparentProxy: {word}\n"
    assert parsed(off.encode()).xclient is False


# What is more than poll can wait for means no limit; C takes all of them too.
@pytest.mark.parametrize("name", ["FilterTimeout", "TimeOut", "KeepAlives"])
@pytest.mark.parametrize("number", [2_000_001, 2**31, 2**32 + 1, 2**63, 10**30])
def test_clamped(name: str, number: int) -> None:
    config = parsed(f"{name}: {number}\n".encode())
    assert getattr(config, BY_NAME[name].attribute) == 2_000_000


def test_longest_time_that_is_not_clamped() -> None:
    assert parsed(b"TimeOut: 2000000\n").timeout == 2_000_000
    assert parsed(b"TimeOut: 1999999\n").timeout == 1_999_999


SECONDS = ["", "x", "-1", "1.5", "1s", "1 2", "0x10", "1_0", "\u0662", "\u00b2", "1\\n"]
CONNECTIONS = ["0", "10241", "99999999999999999999", *SECONDS]
WORDS = ["", "2", "maybe", "o", "yes no", "onn", "\u0131"]

SWITCH = "(must specify 'on' or 'off')"

# A name, values that it cannot have, and the complaint about them.
BAD_VALUES: dict[str, tuple[list[str], str]] = {
    "FilterTimeout": (
        ["0", *SECONDS],
        "invalid setting: FilterTimeout (must be a whole number of seconds, 1 or more)",
    ),
    "TimeOut": (
        ["0", *SECONDS],
        "invalid setting: TimeOut (must be a whole number of seconds, 1 or more)",
    ),
    "KeepAlives": (
        SECONDS,
        "invalid setting: KeepAlives (must be a whole number of seconds, 0 or more)",
    ),
    "MaxConnections": (
        CONNECTIONS,
        "invalid setting: MaxConnections (must be between 1 and 10240)",
    ),
    "FilterType": (
        ["", "cat", "pipes", "pipe file"],
        "invalid value for FilterType (must specify 'pipe' or 'file' or 'reject')",
    ),
    "FilterFailure": (
        ["", "on", "accept"],
        "invalid value for FilterFailure (must specify 'defer' or 'pass')",
    ),
    "FilterMode": (
        ["", "off", "observed"],
        "invalid value for FilterMode (must specify 'enforce' or 'observe')",
    ),
    "FilterVerdict": (
        ["", "on", "code"],
        "invalid value for FilterVerdict (must specify 'any' or 'coded')",
    ),
    "MaxMessageSize": (
        ["", "-1", "10M", "1e6", "1 000"],
        "invalid setting: MaxMessageSize (must be a whole number of octets, 0 or more)",
    ),
    "Processes": (
        ["", "0", "257", "-1", "two", "autos", "1.5"],
        "invalid setting: Processes (must be 'auto' or a number from 1 to 256)",
    ),
    "ProxyProtocol": (WORDS, f"invalid value for ProxyProtocol {SWITCH}"),
    "FilterReject": (
        ["250 Ok", "200", "299-x"],
        "invalid setting: FilterReject (must be a 4xx or 5xx reply)",
    ),
    "Skip": (
        ["", "no", "all", "authenticate"],
        "invalid value for Skip (must specify 'authenticated')",
    ),
    "TempDirectory": (
        [""],
        "invalid setting: TempDirectory (must be a directory)",
    ),
    "ListenCertificate": (
        [""],
        "invalid setting: ListenCertificate (must be a file)",
    ),
    "ListenKey": ([""], "invalid setting: ListenKey (must be a file)"),
    "ListenTls": (
        ["verify", *WORDS],
        "invalid value for ListenTls"
        " (must specify 'off' or 'may' or 'require' or 'implicit')",
    ),
    "OutTls": (
        WORDS,
        "invalid value for OutTls"
        " (must specify 'off' or 'may' or 'require' or 'verify' or 'implicit')",
    ),
    "OutTlsName": (
        ["", "a b", "x:25", "[::1]", "1.2.3"],
        "invalid setting: OutTlsName (must be a host's name or address)",
    ),
    "OutTlsTrust": ([""], "invalid setting: OutTlsTrust (must be a file)"),
    "User": ([""], "invalid setting: User (must be a user's name or number)"),
    "XClient": (WORDS, f"invalid value for XClient {SWITCH}"),
    "TransparentProxy": (
        WORDS,
        "invalid value for TransparentProxy (must specify 'off' or 'client' or 'full')",
    ),
}
BAD_LINES = [
    pytest.param(name, text, complaint, id=f"{name}-{text!a}")
    for name, (texts, complaint) in BAD_VALUES.items()
    for text in texts
]


@pytest.mark.parametrize(("name", "text", "complaint"), BAD_LINES)
def test_bad_value(name: str, text: str, complaint: str) -> None:
    octets = MINIMAL + f"{name}: {text}\n".encode()
    assert faults(octets) == [f"{PATH}:2: {complaint}"]


@pytest.mark.parametrize("name", ["Listen", "OutAddress"])
@pytest.mark.parametrize("text", ["", "0", ":", "a b", "x\u00e4", "[::1"], ids=ascii)
def test_bad_address(name: str, text: str) -> None:
    octets = MINIMAL + f"{name}: {text}\n".encode()
    complaint = f"invalid {name} socket name or ip: {text}"
    assert faults(octets) == [f"{PATH}:2: {program.shown(complaint)}"]


# Settings that are right one by one, and the complaint about them together.
CONTRADICTIONS = {
    # The header's addresses and the redirection's exclude each other.
    "ProxyProtocol: on\nTransparentProxy: client": (
        "ProxyProtocol cannot be used with TransparentProxy"
    ),
    "OutTls: verify\nTransparentProxy: client": (
        "OutTls: verify cannot be used with TransparentProxy"
    ),
    "OutTls: implicit\nTransparentProxy: full\nOutTlsName: x.example": (
        "OutTls: implicit cannot be used with TransparentProxy"
    ),
    "ListenTls: may\nListenKey: /etc/x.key": "ListenTls needs ListenCertificate",
    "OutTls: verify": "OutTls needs OutTlsName here",
    "OutTls: implicit\nOutAddress: /run/x": "OutTls needs OutTlsName here",
}


@pytest.mark.parametrize(("lines", "complaint"), CONTRADICTIONS.items())
def test_contradiction(lines: str, complaint: str) -> None:
    assert faults(MINIMAL + lines.encode()) == [complaint]


# OutAddress, OutTlsName, and the name that the certificate has to have.
SERVER_NAMES = [
    ("mail.example", "", "mail.example"),
    ("mail.example.:25", "", "mail.example"),
    ("192.0.2.1:25", "", "192.0.2.1"),
    ("[fe80::1%eth0]:25", "", "fe80::1"),
    ("192.0.2.1:25", "mail.example.", "mail.example"),
    ("25", "mail.example", "mail.example"),
    ("25", "", ""),
    ("[::]:25", "", ""),
    ("/run/sock", "", ""),
]


@pytest.mark.parametrize(("address", "name", "result"), SERVER_NAMES)
def test_server_name(address: str, name: str, result: str) -> None:
    lines = f"OutAddress: {address}\n" + (f"OutTlsName: {name}\n" if name else "")
    assert parsed(lines.encode()).server_name == result


# --- The file ------------------------------------------------------------------

# A line that sets FilterCommand to /bin/f, in each way in which it can be written.
SPELLINGS = {
    "plain": b"FilterCommand: /bin/f",
    "no blank": b"FilterCommand:/bin/f",
    "lower case": b"filtercommand: /bin/f",
    "upper case": b"FILTERCOMMAND: /bin/f",
    "blanks around": b"  FilterCommand  :   /bin/f  ",
    "tabs around": b"\tFilterCommand\t:\t/bin/f\t",
    "VT and FF around": b"\v\fFilterCommand\v\f:\v\f/bin/f\v\f",
    "CR at the end": b"FilterCommand: /bin/f\r",
    "CR and a blank at the end": b"FilterCommand: /bin/f \r",
    "CRs around": b"\rFilterCommand\r:\r/bin/f\r",
}


@pytest.mark.parametrize("line", SPELLINGS.values(), ids=SPELLINGS.keys())
@pytest.mark.parametrize(
    ("before", "after"),
    [(b"", b""), (b"", b"\n"), (b"", b"\r\n"), (b"User: x\n", b"\nUser: y\n")],
    ids=["alone", "LF", "CRLF", "among others"],
)
def test_spelling(before: bytes, line: bytes, after: bytes) -> None:
    assert parsed(before + line + after).filter_command == "/bin/f"


NO_SETTINGS = {
    "nothing": b"",
    "empty lines": b"\n\n\r\n\n",
    "blanks": b"  \t \n \r\n",
    "comment": b"# FilterCommand: /bin/f\n",
    "comment without blank": b"#FilterCommand: /bin/f",
    "comment after blanks": b"  \t# FilterCommand: /bin/f\n",
    "comment with CR": b"# FilterCommand: /bin/f\r\n",
    "comment that is no setting": b"# what it is\n",
    "comment with a NUL": b"# \0\n",
}


@pytest.mark.parametrize("octets", NO_SETTINGS.values(), ids=NO_SETTINGS.keys())
def test_no_setting(octets: bytes) -> None:
    assert parsed(octets).filter_command == ""


# The value as it stands in the file, and the octets that the program uses.
KEPT_OCTETS = {
    "hash": (b"a # b", b"a # b"),
    "colons": (b"a: b:c", b"a: b:c"),
    "colon first": (b": a", b": a"),
    "blanks within": (b"a  \t b", b"a  \t b"),
    "quotes": (b"'a' \"b\" \\", b"'a' \"b\" \\"),
    "UTF-8": ("\u00e4\u20ac".encode(), "\u00e4\u20ac".encode()),
    "not UTF-8": (b"/\xe4\xff\x80/x", b"/\xe4\xff\x80/x"),
    "half of UTF-8": (b"a\xc3", b"a\xc3"),
    "surrogate": (b"a\xed\xb3\xbfb", b"a\xed\xb3\xbfb"),
    "no-break space at the end": (b"a\xc2\xa0", b"a\xc2\xa0"),
    "no-break space, one octet": (b"\xa0a\xa0", b"\xa0a\xa0"),
    "next line (ISO 6429)": (b"a\xc2\x85b\x85", b"a\xc2\x85b\x85"),
    "line separator": ("a\u2028b".encode(), "a\u2028b".encode()),
    "separators of ASCII": (b"a\x1cb\x1d\x1e\x1f", b"a\x1cb\x1d\x1e\x1f"),
    "CR within": (b"a\rb", b"a\rb"),
    "FF within": (b"a\x0cb", b"a\x0cb"),
}


@pytest.mark.parametrize(
    ("text", "octets"), KEPT_OCTETS.values(), ids=KEPT_OCTETS.keys()
)
def test_octets_are_kept(text: bytes, octets: bytes) -> None:
    config = parsed(b"FilterCommand: " + text + b"\nUser: " + text + b"\n")
    assert program.to_octets(config.filter_command) == octets
    assert program.to_octets(config.user) == octets


def test_octets_of_a_directory_and_a_header_are_kept() -> None:
    config = parsed(b"TempDirectory: /\xe4\xff\nHeader: X: \xe4\xff\n")
    assert config.temp_directory == b"/\xe4\xff"
    assert config.header == b"X: \xe4\xff"


def test_later_setting_wins() -> None:
    config = parsed(
        b"FilterCommand: /bin/f\nTimeOut: 5\nHeader: X: y\nXClient: on\n"
        b"filtercommand: /bin/g\nTIMEOUT: 6\nHeader:\nXClient: off\nOutAddress: 26\n"
    )
    assert config.filter_command == "/bin/g"
    assert config.timeout == 6
    assert config.header == b""
    assert config.xclient is False
    assert config.out_address == ("26", "", 26, "")


def test_no_command_takes_an_earlier_one_back() -> None:
    assert not parsed(b"FilterCommand: /bin/f\nFilterCommand:\n").has_filter


@pytest.mark.parametrize(
    ("octets", "filters"),
    [
        (b"", False),
        (b"FilterType: file\n", False),
        (b"FilterCommand: cat\n", True),
        (b"FilterType: reject\n", True),
    ],
    ids=["nothing", "type alone", "command", "reject"],
)
def test_filters(octets: bytes, filters: bool) -> None:
    assert parsed(octets).has_filter is filters


# A line that is none, and what is said of it.
NO_LINES = {
    "no colon": (
        b"filtercommand cat",
        "invalid config line: filtercommand cat (a colon must follow FilterCommand)",
    ),
    "equals sign": (
        b"Listen = 10025",
        "invalid config line: Listen = 10025 (a colon must follow Listen)",
    ),
    "equals sign and a colon": (
        b"Listen=[::1]:10025",
        "invalid config line: Listen=[ (a colon must follow Listen)",
    ),
    "misspelt": (
        b"OutAdress: 25",
        "invalid config line: OutAdress (did you mean OutAddress?)",
    ),
    "no colon, blanks": (b"  xyz \r", "invalid config line: xyz"),
    "unknown name": (b"Bogus: 1", "invalid config line: Bogus"),
    "unknown name, blanks": (b" Bogus x : 1", "invalid config line: Bogus x"),
    "no name": (b": 1", "invalid config line: "),
    "abbreviation": (
        b"Filter: cat",
        "invalid config line: Filter (did you mean FilterType?)",
    ),
    "more than a name": (
        b"FilterCommands: cat",
        "invalid config line: FilterCommands (did you mean FilterCommand?)",
    ),
    "control characters": (b"a\x1b[2J: 1", "invalid config line: a\\x1b[2J"),
    "not UTF-8": (b"\xe4: 1", "invalid config line: \\xe4"),
    "UTF-8": ("\u00e4: 1".encode(), "invalid config line: \\xc3\\xa4"),
    "byte order mark": (
        b"\xef\xbb\xbfFilterCommand: cat",
        "invalid config line: \\xef\\xbb\\xbfFilterCommand"
        " (did you mean FilterCommand?)",
    ),
}


@pytest.mark.parametrize(("line", "said"), NO_LINES.values(), ids=NO_LINES.keys())
def test_no_line(line: bytes, said: str) -> None:
    assert faults(MINIMAL + line + b"\n") == [f"{PATH}:2: {said}"]


@pytest.mark.parametrize(
    "line",
    [b"FilterCommand: a\0b", b"FilterCommand: a\0", b"User\0: x", b"\0", b"Header: \0"],
    ids=repr,
)
def test_nul(line: bytes) -> None:
    """No path, command or environment can have one."""
    (fault,) = faults(MINIMAL + line)
    assert fault.startswith(f"{PATH}:2: invalid ")
    assert "\0" not in fault


def test_all_errors_in_one_go() -> None:
    octets = (
        b"# several faults\n"
        b"FilterTimeout: soon\r\n"
        b"\n"
        b"Bogus: 1\n"
        b"FilterCommand: cat\n"
        b"no colon here\n"
        b"Listen: here\n"
        b"Listen: [here]\n"
        b"  xclient :  perhaps \n"
        b"XClient: on"
    )
    config, errors = program.parse_config(octets, PATH)
    assert [str(error) for error in errors] == [
        f"{PATH}:2: invalid setting: FilterTimeout"
        " (must be a whole number of seconds, 1 or more)",
        f"{PATH}:4: invalid config line: Bogus",
        f"{PATH}:6: invalid config line: no colon here",
        f"{PATH}:8: invalid Listen socket name or ip: [here]",
        f"{PATH}:9: invalid value for XClient {SWITCH}",
        "no OutAddress specified.",
    ]
    assert config.filter_command == "cat"
    assert config.listen.host == "here"
    assert config.xclient is True


def test_no_out_address() -> None:
    assert faults(b"") == ["no OutAddress specified."]
    assert faults(b"# OutAddress: 25\n") == ["no OutAddress specified."]
    assert faults(b"OutAddress: 0\n") == [
        f"{PATH}:1: invalid OutAddress socket name or ip: 0"
    ]


# Faults of other lines, in which the name OutAddress happens to stand.
@pytest.mark.parametrize(
    ("octets", "path", "first"),
    [
        (
            b"Listen: OutAddress:x\n",
            "f",
            "f:1: invalid Listen socket name or ip: OutAddress:x",
        ),
        (b"Bogus: 1\n", "/OutAddress/f", "/OutAddress/f:1: invalid config line: Bogus"),
    ],
    ids=["value", "path"],
)
def test_no_out_address_but_its_name(octets: bytes, path: str, first: str) -> None:
    assert faults(octets, path) == [first, "no OutAddress specified."]


def test_path_is_shown_in_printable_ascii() -> None:
    assert faults(MINIMAL + b"x", "/\udce4\n\u20ac") == [
        "/\\xe4\\x0a\\xe2\\x82\\xac:2: invalid config line: x"
    ]


# --- The program ---------------------------------------------------------------


@functools.cache
def source_of_users() -> str:
    """The program without the class of settings and the checks of a file."""
    source = inspect.getsource(program)
    for own in (Config, program.parse_config):
        source = source.replace(inspect.getsource(own), "")
    return source


@pytest.mark.parametrize("setting", program.SETTINGS, ids=lambda setting: setting.name)
def test_setting_is_used(setting: program.Setting) -> None:
    """Something reads it other than the class of settings and the checks of a file."""
    used = rf"config\.{setting.attribute}\b"
    by_property = {
        name
        for name, value in vars(Config).items()
        if isinstance(value, property)
        and f"self.{setting.attribute}" in inspect.getsource(value.fget or len)
    }
    uses = [rf"config\.{name}\b" for name in by_property]
    assert re.search("|".join([used, *uses]), source_of_users())
