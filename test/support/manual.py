"""Parts of the manuals, read from their mdoc source."""

from __future__ import annotations

import re

from helpers import ROOT


def read(name: str) -> str:
    """A document's text."""
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
    """The source of one section of a manual."""
    found = re.search(
        rf'^\.S[hs] "?{re.escape(title)}"?\n(.*?)(?=^\.S[hs] |\Z)',
        read(name),
        re.M | re.S,
    )
    assert found, f"{name} has no section {title}"
    return found[1]


def items(source: str, macro: str) -> list[str]:
    """The first arguments of a list's items, for items that begin with a macro."""
    found = re.findall(rf'^\.It {macro} (?:"(.+?)"|(\S+))', source, re.M)
    return [quoted or plain for quoted, plain in found]
