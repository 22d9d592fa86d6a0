"""Pieces of a page that stands alone: no script, no second file, every text escaped."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from reports.style import data_uri

# the page may show inline pictures and its own style, and nothing else, whatever a text in it contains
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"

_STYLE = """
:root { color-scheme: light;
  --ink: #1f2328; --muted: #59636e; --line: #d8dee4; --soft: #f6f8fa; --blue: #0072b2; }
* { box-sizing: border-box; }
body { margin: 0; color: var(--ink); background: #fff;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 1rem 1rem 4rem; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .6rem 0 .2rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem;
  padding-bottom: .25rem; border-bottom: 1px solid var(--line); }
p { margin: .5rem 0; max-width: 46rem; }
.muted, figcaption { color: var(--muted); font-size: .9rem; }
.state { display: inline-block; padding: .05rem .6rem; border-radius: 1rem; background: var(--soft);
  border: 1px solid var(--line); font-size: .9rem; }
.cards { display: flex; flex-wrap: wrap; gap: .6rem; margin: 1rem 0; }
.card { flex: 1 1 8.5rem; border: 1px solid var(--line); border-radius: .5rem; padding: .55rem .75rem;
  background: var(--soft); }
.card b { display: block; font-size: 1.3rem; line-height: 1.3; overflow-wrap: anywhere; }
.card.first { border-color: var(--blue); }
.card.first b { color: var(--blue); }
.card span { color: var(--muted); font-size: .85rem; }
figure { margin: .8rem 0; }
.scroll { overflow-x: auto; }
.scroll img { display: block; max-width: max(100%, 30rem); height: auto; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { text-align: left; padding: .25rem .9rem .25rem 0; vertical-align: top;
  border-bottom: 1px solid var(--line); }
td { overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
th { font-weight: 600; white-space: nowrap; }
pre { background: var(--soft); border: 1px solid var(--line); border-radius: .5rem; padding: .7rem .9rem;
  overflow-x: auto; font: .85rem/1.45 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; }
pre.wrap { white-space: pre-wrap; overflow-wrap: anywhere; }
details { margin: .6rem 0; }
summary { cursor: pointer; color: var(--blue); }
"""


def escape(value: Any) -> str:
    """The value as text that the page shows and never interprets; control characters become visible."""
    text = str(value)
    shown = "".join(character if character in "\n\t" or ord(character) >= 32 else "\ufffd" for character in text)
    return html.escape(shown, quote=True)


def paragraph(text: str, *, muted: bool = False) -> str:
    """One paragraph of plain text."""
    return f'<p class="muted">{escape(text)}</p>' if muted else f"<p>{escape(text)}</p>"


def section(title: str, *parts: str) -> str:
    """A headed part of the page; `parts` are markup."""
    return f"<section>\n<h2>{escape(title)}</h2>\n" + "\n".join(parts) + "\n</section>"


def preformatted(text: str, *, wrap: bool = False) -> str:
    """Text shown line by line."""
    return f"<pre{' class=wrap' if wrap else ''}>{escape(text)}</pre>"


def details(summary: str, body: str) -> str:
    """Markup that is folded away until asked for."""
    return f"<details><summary>{escape(summary)}</summary>\n{body}\n</details>"


def table(rows: Mapping[str, Any] | Sequence[tuple[str, Any]]) -> str:
    """Two columns: name and value."""
    pairs = rows.items() if isinstance(rows, Mapping) else rows
    body = "\n".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in pairs)
    return f'<div class="scroll"><table>\n{body}\n</table></div>'


def cards(items: Sequence[tuple[str, str, str]]) -> str:
    """Headline numbers: (number, what it is, detail or ""); the first stands out."""
    shown = []
    for index, (number, label, detail) in enumerate(items):
        extra = f"<br><span>{escape(detail)}</span>" if detail else ""
        kind = "card first" if index == 0 else "card"
        shown.append(f'<div class="{kind}"><b>{escape(number)}</b><span>{escape(label)}</span>{extra}</div>')
    return f'<div class="cards">{"".join(shown)}</div>'


def picture(image: bytes, description: str, caption: str = "") -> str:
    """An inline PNG; on a narrow screen it keeps a readable size and scrolls sideways."""
    note = f"\n<figcaption>{escape(caption)}</figcaption>" if caption else ""
    width = int.from_bytes(image[16:20], "big") * 2 // 3  # pixels of the PNG header; shown small, sharp on a phone
    shown = f'<img src="{data_uri(image)}" width="{width}" alt="{escape(description)}">'
    return f'<figure><div class="scroll">{shown}</div>{note}</figure>'


def document(title: str, parts: Sequence[str]) -> str:
    """The whole document; `parts` are markup."""
    body = "\n".join(parts)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""
