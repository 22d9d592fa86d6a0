"""Windows as people type them: odd, 0 and wider than the text are sound, negative ones and wrong lists are not."""

import pytest
import torch

from configs.compose import compose_config
from configs.phases import effective_phases, phase_patterns
from tests.command import TINY, run_train
from tests.models.test_char_lm import POSITIONS
from tests.models.tiny import text, tiny_model

pytestmark = pytest.mark.fault(28)


@pytest.mark.parametrize(
    "window, message",
    [
        ("-1", "layer 0: model.attention.window of head 0 is -1, it must be at least 0"),
        ("[8,-1]", "layer 1: model.attention.window of head 0 is -1, it must be at least 0"),
        ("[1,2,3]", "model.attention.window has 3 entries, the model has 2 layers"),
        ("[4,[1,2]]", "layer 1: model.attention.window has 2 entries for 4 heads: [1, 2]"),
        ("[[1,2,3,-4],3]", "layer 0: model.attention.window of head 3 is -4, it must be at least 0"),
    ],
)
def test_a_bad_window_is_refused_with_its_layer(tmp_path, window, message):
    ended = run_train(*TINY[:3], f"model.attention.window={window}", "device=cpu", cwd=tmp_path)
    assert (ended.code, ended.err) == (2, f"error: {message}\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("window", [0, 1, 7, 33, 100_000])
def test_any_window_from_0_on_is_taken_as_it_is(window):
    cfg = compose_config([*TINY[:3], f"model.attention.window={window}"])
    for patterns in phase_patterns(cfg, effective_phases(cfg)):
        assert [pattern.window for pattern in patterns] == [(window,) * 4] * 2


@POSITIONS
@pytest.mark.parametrize("impl", ["blocked", "reference"])
def test_a_window_wider_than_the_text_is_full_attention(positions, impl):
    ids = text(37)
    full = tiny_model(window=36, positions=positions, impl=impl)(ids)
    for window in (37, 1_000, 100_000):
        wider = tiny_model(window=window, positions=positions, impl=impl)(ids)
        torch.testing.assert_close(wider, full, rtol=0, atol=1e-11)


@POSITIONS
@pytest.mark.parametrize("window", [0, 1, 5, 33])
def test_odd_and_empty_windows_give_what_the_oracle_gives(positions, window):
    ids = text(70)
    blocked, oracle = (
        tiny_model(window=window, positions=positions, impl=impl)(ids) for impl in ("blocked", "reference")
    )
    torch.testing.assert_close(blocked, oracle, rtol=0, atol=1e-11)
