"""The rolling cache: a text in pieces gives the logits of the whole, and what is kept of it does not grow."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.window_attention import WindowPattern
from models.cache import MIN_SPARE, LayerCache
from tests.models.test_char_lm import EVERY_PATTERN, PATTERNS, POSITIONS
from tests.models.tiny import text, tiny_model

pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture
def no_gradients():
    with torch.no_grad():
        yield


def in_pieces(model, ids, sizes):
    """Logits of a text given in pieces of these sizes, the last as large as is left."""
    cache, logits, first = model.new_cache(len(ids)), [], 0
    for size in (*sizes, ids.shape[1]):
        logits.append(model(ids[:, first : first + size], cache=cache))
        first = min(first + size, ids.shape[1])
        assert cache.position == first
    return torch.cat(logits, dim=1)


@POSITIONS
@EVERY_PATTERN
@pytest.mark.parametrize("impl", ["blocked", "reference"])
@pytest.mark.parametrize(
    "sizes",
    [(), (1,) * 60, (7,) * 9, (30, 1, 1, 20), (1, 59), (59, 1), (0, 3, 0, 50)],
    ids=["whole", "one_by_one", "sevens", "mixed", "all_but_one", "one_left", "empty_pieces"],
)
def test_a_text_in_pieces_is_the_text(positions, window, dilation, impl, sizes):
    model = tiny_model(window=window, dilation=dilation, positions=positions, impl=impl)
    ids = text(60)
    torch.testing.assert_close(in_pieces(model, ids, sizes), model(ids), rtol=0, atol=1e-10)


@POSITIONS
@pytest.mark.parametrize(
    "sizes",
    [(1,) * 700, (255, 1, 1, 256, 100), (257, 1, 300, 1), (900, 1, 1), (1250, 400, 1, 9), (64,) * 20],
    ids=["one_by_one", "full_buffer", "one_too_many", "longer_than_one_buffer", "longer_than_the_spare", "blocks"],
)
def test_moving_to_the_front_of_the_buffer_loses_nothing(positions, sizes):
    """Reaches of 0, 60 and 1,200: buffers of 256, 316 and 1,500 tokens."""
    window, dilation = [0, 20, [300, 8, 0, 20]], [1, 3, [4, 1, 2, 7]]
    model = tiny_model(window=window, dilation=dilation, positions=positions)
    ids = text(1_700, batch=1)
    torch.testing.assert_close(in_pieces(model, ids, sizes), model(ids), rtol=0, atol=1e-10)


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(st.sampled_from(list(PATTERNS)), st.lists(st.integers(0, 400), max_size=8), st.booleans())
def test_any_split_gives_the_same(name, sizes, rotary):
    window, dilation = PATTERNS[name]
    model = tiny_model(window=window, dilation=dilation, positions="rotary" if rotary else "relative")
    ids = text(sum(sizes) + 5)
    with torch.no_grad():
        torch.testing.assert_close(in_pieces(model, ids, sizes), model(ids), rtol=0, atol=1e-10)


def test_bfloat16_pieces_are_the_text_to_rounding():
    model = tiny_model(dtype=torch.float32, loud=False).eval()
    with torch.autocast("cpu", torch.bfloat16):
        whole, pieces = model(text(90)), in_pieces(model, text(90), (50, 1, 1))
    torch.testing.assert_close(pieces, whole, rtol=0.02, atol=0.02)


def test_what_is_kept_does_not_grow_with_the_text():
    model = tiny_model(window=[2, 30, 500], dilation=[1, 4, 1])
    cache, ids = model.new_cache(2), text(100)

    def kept():
        return [sum(part.untyped_storage().nbytes() for part in layer._buffers) for layer in cache.layers]

    for _ in range(8):
        model(ids, cache=cache)
    start = kept()
    token = 2 * 2 * 16 * 8  # a key and a value of 16 float64 in each of two texts
    assert start == [token * (reach + max(MIN_SPARE, reach // 4)) for reach in (2, 120, 500)]
    for _ in range(40):
        model(ids, cache=cache)
    assert kept() == start and cache.position == 4_800


def test_a_window_wider_than_any_text_takes_the_room_of_the_text():
    cache = LayerCache(1, WindowPattern((10**9,), (1,), True))
    numbers = torch.arange(3_000.0).view(1, -1, 1, 1)
    for first in range(0, 3_000, 100):
        keys, _, start = cache.append(numbers[:, first : first + 100], numbers[:, first : first + 100])
        assert start == first and torch.equal(keys, numbers[:, : first + 100])
    assert cache._buffers[0].shape[1] < 2 * 3_000


def test_the_keys_handed_out_are_those_within_reach():
    cache = LayerCache(1, WindowPattern((3, 2), (2, 1), True))
    numbers = torch.arange(2_000.0).view(1, -1, 1, 1).expand(-1, -1, 2, 1)
    first = 0
    for size in (1, 2, 9, 400, 1, 1, 250, 1, 700, 3):
        keys, values, start = cache.append(numbers[:, first : first + size], -numbers[:, first : first + size])
        assert start == min(first, 6)
        expected = numbers[:, first - start : first + size]
        assert torch.equal(keys, expected) and torch.equal(values, -expected)
        first += size


def test_a_cache_made_for_other_windows_is_refused():
    model = tiny_model(window=4)
    cache = model.new_cache(2)
    model(text(5), cache=cache)
    model.set_attention(window=[4, 5, 4])
    with pytest.raises(ValueError, match=r"layer 1: the cache was made for window \(4, 4, 4, 4\) .*call new_cache\(\)"):
        model(text(5), cache=cache)
    model(text(5), cache=model.new_cache(2))


@pytest.mark.parametrize(
    "call, message",
    [
        pytest.param(
            lambda model: model(text(5), cache=model.new_cache(3)), "made for 3 texts at once, got 2", id="batch"
        ),
        pytest.param(
            lambda model: torch.enable_grad()(model)(text(5), cache=model.new_cache(2)),
            r"holds no gradients: call the model under torch.no_grad\(\)",
            id="gradients",
        ),
        pytest.param(
            lambda model: LayerCache(1, WindowPattern((3,), (1,), False)), "serves causal attention", id="both_sides"
        ),
    ],
)
def test_what_a_cache_cannot_do_is_said(call, message):
    with pytest.raises(ValueError, match=message):
        call(tiny_model())


def test_padding_behind_a_cache_is_named():
    layer = tiny_model().blocks[0].attention
    with pytest.raises(NotImplementedError, match="valid together with a cache"):
        layer(torch.zeros(1, 2, 16).double(), valid=torch.ones(1, 2, dtype=torch.bool), cache=layer.new_cache(1))
