"""Turn a Wikipedia XML dump into text8 form: a-z and single spaces, digits spelled out.

The rules are those of the filter that made text8 (Matt Mahoney, "About the Test Data", appendix A). They work
on bytes, on records that end with each ">", and keep the visible text of articles: captions and link labels
stay, markup, tables, references and links to other languages go.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

_DIGIT_NAMES = (b"zero", b"one", b"two", b"three", b"four", b"five", b"six", b"seven", b"eight", b"nine")

_XML_TAG = re.compile(rb"<.*>")  # one line, the longest
# in this order; an entity decoded or a bracket removed by one rule is what the next one sees
_MARKUP = [
    (re.compile(rb"&amp;"), b"&"),
    (re.compile(rb"&lt;"), b"<"),
    (re.compile(rb"&gt;"), b">"),
    (re.compile(rb"<ref[^<]*</ref>"), b""),
    (re.compile(rb"<[^>]*>"), b""),
    (re.compile(rb"\[http:[^\] ]*"), b"["),  # keep the label
    (re.compile(rb"\|thumb", re.I), b""),
    (re.compile(rb"\|left", re.I), b""),
    (re.compile(rb"\|right", re.I), b""),
    (re.compile(rb"\|[0-9]+px", re.I), b""),
    (re.compile(rb"\[\[image:[^\[\]]*\|", re.I), b""),  # keep the caption
    (re.compile(rb"\[\[category:([^|\]]*)[^\]]*\]\]", re.I), rb"[[\1]]"),
    (re.compile(rb"\[\[[a-z\-]*:[^\]]*\]\]"), b""),  # the same article in another language
    (re.compile(rb"\[\[[^|\]]*\|"), b"[["),  # keep the label
    (re.compile(rb"\{\{[^}]*\}\}"), b""),
    (re.compile(rb"\{[^}]*\}"), b""),
    (re.compile(rb"[\[\]]"), b""),
    (re.compile(rb"&[^;]*;"), b" "),
]
_DIGIT = re.compile(rb"[0-9]")
_NOT_LETTERS = re.compile(rb"[^a-z]+")
_REDIRECT = re.compile(rb"#redirect", re.I)


def clean_dump(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The text8 form, record by record, of a dump given in pieces; nothing where it has no article text."""
    in_text = False
    for record in _records(pieces):
        if b"<text " in record:
            in_text = True
        if b"#" in record and _REDIRECT.search(record):
            in_text = False
        if not in_text:
            continue
        if b"</text>" in record:
            in_text = False
        cleaned = _letters(_without_markup(record))
        if cleaned:
            yield cleaned


def _without_markup(record: bytes) -> bytes:
    record = _XML_TAG.sub(b"", record, count=1)
    for pattern, replacement in _MARKUP:
        record = pattern.sub(replacement, record)
    return record


def _letters(text: bytes) -> bytes:
    """Lower case, digits as words, one space for anything else; starts with a space, ends without one."""
    text = _DIGIT.sub(lambda digit: b" %b " % _DIGIT_NAMES[digit[0][0] - ord("0")], text.lower())
    return _NOT_LETTERS.sub(b" ", b" %b " % text)[:-1]


def _records(pieces: Iterable[bytes]) -> Iterator[bytes]:
    pending: list[bytes] = []
    for piece in pieces:
        *whole, rest = piece.split(b">")
        for record in whole:
            yield b"".join((*pending, record, b">"))
            pending.clear()
        if rest:
            pending.append(rest)
    if pending:
        yield b"".join(pending)
