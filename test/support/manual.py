"""Parts of the manuals, read from their mdoc source."""

from __future__ import annotations

import re

from helpers import ROOT


def read(name: str) -> str:
    """Return a document's text."""
    return (ROOT / name).read_text()


def rendered(text: str) -> str:
    r"""mdoc source as plain text: without macros, quotation marks and escapes."""
    lines = []
    for line in text.splitlines():
        if line.startswith('.\\"'):
            continue
        words = line.split()
        if line.startswith("."):
            words = [w for w in words[1:] if not re.fullmatch("[A-Z][a-z]", w)]
        lines.append(" ".join(words))
    return unescaped(" ".join(lines)).replace('"', "")


def unescaped(text: str) -> str:
    r"""mdoc's escapes resolved: ``\e``, ``\&``, ``\(dq`` and ``\(ga``."""
    for escape, meaning in {"\\&": "", "\\(dq": '"', "\\(ga": "`", "\\e": "\\"}.items():
        text = text.replace(escape, meaning)
    return text


def section(name: str, title: str) -> str:
    """Return the source of one section of a manual."""
    found = re.search(
        rf'^\.S[hs] "?{re.escape(title)}"?\n(.*?)(?=^\.S[hs] |\Z)',
        read(name),
        re.M | re.S,
    )
    assert found, f"{name} has no section {title}"
    return found[1]


def displays(name: str, title: str) -> list[str]:
    """Return the literal displays of a section of a manual."""
    found = re.findall(
        r"^\.Bd -literal.*?\n(.*?)^\.Ed", section(name, title), re.M | re.S
    )
    return [unescaped(text) for text in found]


def display(name: str, title: str, words: str) -> str:
    """Return the one display of a section of a manual that has these words."""
    (text,) = (text for text in displays(name, title) if words in text)
    return text


def items(source: str, macro: str) -> list[str]:
    """Return the first arguments of a list's items that begin with a macro."""
    found = re.findall(rf'^\.It {macro} (?:"(.+?)"|(\S+))', source, re.M)
    return [quoted or plain for quoted, plain in found]
