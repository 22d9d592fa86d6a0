"""Pictures of patterns: every distinct panel is there, labels do not overlap, any size can be drawn."""

import itertools

import pytest

from kernels.window_attention.pattern import WindowPattern
from reports.pattern_figures import (
    attention_pattern_figure,
    has_dead,
    phase_figure,
    receptive_field_figure,
    window_figure,
)
from reports.style import render


def stack(windows, gaps, *, num_heads=8, causal=True):
    kinds = zip(windows, gaps, strict=True)
    return [WindowPattern((w,) * num_heads, (1,) * (num_heads - 2) + (g, g), causal) for w, g in kinds]


def titles(figure):
    return [axes.get_title() for axes in figure.axes if axes.get_visible() and axes.get_title()]


def overlaps(figure):
    """Pairs of panel titles and tick labels whose boxes cut into each other."""
    figure.draw_without_rendering()
    texts = [axes.title for axes in figure.axes if axes.get_visible() and axes.get_title()]
    for axes in figure.axes:
        texts += [label for label in axes.get_yticklabels() if axes.get_visible() and label.get_text()]
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts if text.get_visible()]
    return [(a, b) for (a, one), (b, other) in itertools.combinations(boxes, 2) if one.overlaps(other)]


def test_equal_layers_and_heads_are_drawn_once():
    figure = attention_pattern_figure(stack([4, 4, 8], [1, 1, 2]), 64)
    assert titles(figure) == [
        "layers 0–1, all heads\nwindow 4",
        "layer 2, heads 0–5\nwindow 8",
        "layer 2, heads 6–7\nwindow 8, dilation 2",
    ]


def test_long_rows_say_that_they_are_drawn_in_blocks():
    assert "every pair drawn" in attention_pattern_figure(stack([4], [1]), 128).get_supxlabel()
    note = attention_pattern_figure(stack([512], [4]), 23_040).get_supxlabel()
    assert "row of 23,040 positions in blocks of 180 × 180 pairs" in note and "insets" in note


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("windows", "gaps", "seq_len"),
    [
        ([0], [1], 1),
        ([4, 8, 16, 16], [1, 1, 1, 2], 64),
        ([32 + 16 * layer for layer in range(30)], [1] * 15 + [2] * 5 + [3] * 5 + [4] * 5, 2048),
        ([512] * 6 + [8192] * 6, [1] * 6 + [4] * 6, 23_040),
        ([10**6], [1], 100),
    ],
    ids=["one", "four", "thirty", "long", "full"],
)
def test_any_size_is_drawn_without_overlap(windows, gaps, seq_len, causal):
    patterns = stack(windows, gaps, causal=causal)
    figures = [
        attention_pattern_figure(patterns, seq_len),
        window_figure(patterns),
        phase_figure({"phase 1": patterns, "phase 2": patterns}),
        receptive_field_figure({"phase 1": patterns}, {"training length": seq_len, "evaluation context": 32_256}),
    ]
    for figure in figures:
        assert overlaps(figure) == []
        width, height = figure.get_size_inches()
        assert width < 13 and 0.25 < width / height < 4
    assert render(figures[0]).startswith(b"\x89PNG")


def test_equal_input_gives_equal_files():
    patterns = stack([4, 8], [1, 2])
    for kind in ("png", "svg"):
        first, second = (render(attention_pattern_figure(patterns, 64), kind) for _ in range(2))
        assert first == second


def test_has_dead_finds_gaps_by_dilation():
    dilated = WindowPattern((4,), (3,), True)
    assert has_dead([dilated]) and has_dead([dilated, dilated])
    assert not has_dead([WindowPattern((2,), (1,), True), dilated])
    assert not has_dead([WindowPattern((10**9,), (1,), True)])
