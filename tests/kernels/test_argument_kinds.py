"""What is no tensor, no flag or no whole number is named before anything is computed."""

import pytest
import torch

from kernels.block_sparse_attention import BlockPattern, block_sparse_attention
from kernels.nystrom_attention import nystrom_attention
from kernels.window_attention import global_rows_attention, window_attention

Q = torch.randn(1, 8, 2, 4)
CALLS = {
    "window": lambda query, key, value, **options: window_attention(query, key, value, window=2, **options),
    "global_rows": lambda query, key, value, **options: global_rows_attention(
        query, key, value, global_index=torch.arange(8)[None], **options
    ),
    "block_sparse": lambda query, key, value, **options: block_sparse_attention(
        query, key, value, BlockPattern.bigbird(8, 4, 2), **options
    ),
    "nystrom": lambda query, key, value, **options: nystrom_attention(query, key, value, num_landmarks=2, **options),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_what_is_no_tensor_is_named(call):
    name = "query_global" if call is CALLS["global_rows"] else "query"
    with pytest.raises(ValueError, match=f"{name} is list, it must be a tensor"):
        call(Q.tolist(), Q, Q)
    with pytest.raises(ValueError, match="key is ndarray, it must be a tensor"):
        call(Q, Q.numpy(), Q)
    with pytest.raises(ValueError, match="value is NoneType, it must be a tensor"):
        call(Q, Q, None)
    with pytest.raises(ValueError, match="valid is str, it must be a tensor"):
        call(Q, Q, Q, valid="all")
    with pytest.raises(ValueError, match=r"key \(1, 8, 0, 4\) has no heads"):
        call(Q, Q[:, :, :0], Q[:, :, :0])


@pytest.mark.parametrize("call", [CALLS["window"], CALLS["global_rows"]], ids=["window", "global_rows"])
def test_a_word_is_no_flag(call):
    with pytest.raises(ValueError, match="causal is 'no', it must be True or False"):
        call(Q, Q, Q, causal="no")


def test_a_place_is_a_whole_number():
    for start in (1.5, "3", -1):
        with pytest.raises(ValueError, match="query_start is .*, it must be a whole number of at least 0"):
            window_attention(Q, Q, Q, window=2, query_start=start)


def test_taps_are_a_tensor():
    with pytest.raises(ValueError, match="conv_weight is list, it must be a tensor"):
        nystrom_attention(Q, Q, Q, num_landmarks=2, conv_weight=[1, 2, 3])
