"""The one look of every picture, and how a picture becomes a file or a part of a web page.

Figures are made without pyplot, so drawing leaves no global state behind and needs no display.
"""

from __future__ import annotations

import base64
import io
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import matplotlib.style
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

# the palette of Okabe and Ito, which stays apart under the common kinds of colour blindness
BLUE, ORANGE, GREEN, RED, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
SERIES = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY)
INK, MUTED, PALE = "#222222", "#6b7280", "#e5e7eb"

# nothing seen is white, and the smallest share is already a visible tint
SHARE_MAP = LinearSegmentedColormap.from_list("share", ["#b9d7ec", "#4a97c9", "#00456f"]).with_extremes(under="white")
VALUE_MAP = LinearSegmentedColormap.from_list("value", ["#eef5fa", "#7fb6d9", "#0b5a8c"])

_RC = {
    "figure.dpi": 100,
    "figure.facecolor": "white",
    "savefig.dpi": 144,
    "savefig.facecolor": "white",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # the font matplotlib ships: the same picture on every machine
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.labelsize": 10,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": PALE,
    "grid.linewidth": 0.8,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "svg.hashsalt": "longspan",  # equal input gives an equal file
    "text.parse_math": False,  # names come from configs: a dollar sign is a dollar sign
}
_METADATA = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}

POSITIONS = FuncFormatter(lambda value, _: f"{value:,.0f}")  # 23040 -> 23,040


Layout = Literal["constrained", "compressed", "tight"]


@contextmanager
def drawing() -> Iterator[None]:
    """Our settings on top of matplotlib's own defaults, whatever the user's matplotlibrc says."""
    with matplotlib.style.context(["default", _RC]):
        yield


def new_figure(width: float, height: float, *, layout: Layout = "constrained") -> Figure:
    """An empty figure of `width` x `height` inches whose parts are kept from overlapping.

    `layout` is matplotlib's; "compressed" is the one for grids of panels with a fixed aspect.
    """
    return Figure(figsize=(width, height), layout=layout)


def label_text(text: str, limit: int = 60) -> str:
    """`text` as a label of a picture: one line of at most `limit` characters, nothing unprintable."""
    shown = "".join(character if character.isprintable() else " " for character in text)
    return shown if len(shown) <= limit else f"{shown[: limit - 1]}…"


def render(figure: Figure, file_type: str = "png") -> bytes:
    """The figure as the bytes of a `png` or `svg` file."""
    buffer = io.BytesIO()
    with drawing(), warnings.catch_warnings():
        # a name in a script that the font lacks is drawn as boxes; training is not to be told
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(
            buffer, format=file_type, metadata=_METADATA.get(file_type), bbox_inches="tight", pad_inches=0.08
        )
    return buffer.getvalue()


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Write the figure to `path`; its suffix (.png or .svg) chooses the format, missing folders are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(render(figure, path.suffix.lstrip(".").lower()))
    return path


def data_uri(image: bytes, file_type: str = "png") -> str:
    """The image as a `data:` address, so that a page can show it without a second file."""
    kind = "image/svg+xml" if file_type == "svg" else f"image/{file_type}"
    return f"data:{kind};base64,{base64.b64encode(image).decode('ascii')}"
