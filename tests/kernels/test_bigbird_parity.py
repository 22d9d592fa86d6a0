"""BigBird's random plans and its compat modes against transformers: ids to the last bit, outputs in float64."""

import numpy as np
import pytest
import torch

from kernels.block_sparse_attention import BlockPattern, block_sparse_attention
from tests.kernels.block_cases import make_block_valid
from tests.kernels.window import error, make_inputs

pytestmark = pytest.mark.slow  # the import of transformers


def module(num_heads, num_random, block_size, seed, training, max_position_embeddings=4096):
    """Hugging Face's block-sparse attention layer."""
    from transformers import BigBirdConfig
    from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention

    config = BigBirdConfig(
        hidden_size=4 * num_heads,
        num_attention_heads=num_heads,
        num_random_blocks=num_random,
        block_size=block_size,
        max_position_embeddings=max_position_embeddings,
    )
    return BigBirdBlockSparseAttention(config, seed=seed).train(training)


def listed(pattern):
    """int [H, N - 2, r]: the lists of rows 1 to N - 2, in their order."""
    ((offsets, blocks),) = pattern.lists
    assert (offsets[:, 1] == offsets[:, 0]).all() and (offsets[:, -1] == offsets[:, -2]).all()
    return blocks.view(pattern.num_heads, pattern.num_blocks - 2, -1).numpy()


@pytest.mark.parametrize(
    "num_blocks, block_size, num_random, num_heads, seed",
    [
        (12, 64, 3, 12, 0),
        (13, 64, 3, 12, 5),
        (24, 16, 3, 4, 23),
        (8, 64, 3, 3, 1),  # one region: as many blocks as r + 5
        (6, 64, 1, 2, 2),
        (8, 64, 1, 2, 2),
        (25, 64, 10, 2, 3),  # two regions
        (45, 32, 20, 2, 4),
        (100, 64, 5, 3, 11),
        (6, 64, 0, 2, 0),
    ],
)
def test_the_new_plan_is_theirs(num_blocks, block_size, num_random, num_heads, seed):
    theirs = module(num_heads, num_random, block_size, seed, training=True)
    seq_len = num_blocks * block_size
    np.random.seed(seed)
    ends, shares = theirs._get_rand_attn_plan(seq_len, block_size, num_random)
    sizes = (seq_len, seq_len, block_size, block_size, num_heads)
    expected = theirs._bigbird_block_rand_mask_with_head(*sizes, ends, shares)
    pattern = BlockPattern.bigbird(seq_len, block_size, num_heads, num_random, seed, compat="hf_train")
    assert np.array_equal(listed(pattern), np.stack(expected))


@pytest.mark.parametrize("tokens", [1024, 3072, 4096])
@pytest.mark.parametrize("max_positions", [4096, 8192])
@pytest.mark.parametrize(
    "block_size, num_random, num_heads, seed", [(64, 3, 12, 0), (32, 5, 2, 7), (16, 3, 2, 1), (128, 3, 2, 3)]
)
def test_the_old_plan_is_theirs(tokens, max_positions, block_size, num_random, num_heads, seed):
    theirs = module(num_heads, num_random, block_size, seed, training=True)
    np.random.seed(seed)
    grid = (max_positions, max_positions, block_size, block_size, num_random)
    drawn = [theirs._bigbird_block_rand_mask(*grid, last_idx=1024) for _ in range(num_heads)]
    sizes = (tokens, block_size, num_heads, num_random, seed)
    pattern = BlockPattern.bigbird(*sizes, compat="hf_train", max_position_embeddings=max_positions)
    assert np.array_equal(listed(pattern), np.stack(drawn)[:, : tokens // block_size - 2])


@pytest.mark.parametrize("max_positions", [1024, 2048])
def test_the_old_plan_of_a_small_grid_is_theirs(max_positions):
    """Its last rows draw from blocks of their own windows too."""
    theirs = module(2, 3, 64, 0, training=True)
    np.random.seed(9)
    drawn = [theirs._bigbird_block_rand_mask(*[max_positions] * 2, 64, 64, 3, last_idx=1024) for _ in range(2)]
    pattern = BlockPattern.bigbird(1024, 64, 2, 3, 9, compat="hf_train", max_position_embeddings=max_positions)
    assert np.array_equal(listed(pattern), np.stack(drawn)[:, :14])


def stops(num_blocks, block_size, num_random, training, max_position_embeddings=4096):
    """Whether their layer raises for a sequence of so many blocks."""
    theirs = module(2, num_random, block_size, 0, training, max_position_embeddings).double()
    try:
        run_theirs(theirs, make_inputs(num_blocks * block_size, batch=1, head_dim=4), None)
    except (ValueError, RuntimeError, IndexError):
        return True
    return False


@pytest.mark.parametrize("compat", ["hf_train", "hf_eval"])
@pytest.mark.parametrize("num_random", [1, 2, 3, 6])
@pytest.mark.parametrize("block_size, most", [(2, 18), (256, 4), (512, 2)])
def test_what_stops_theirs_is_refused(compat, num_random, block_size, most):
    for num_blocks in range(1, most + 1):
        try:
            BlockPattern.bigbird(num_blocks * block_size, block_size, 2, num_random, compat=compat)
            refused = False
        except ValueError:
            refused = True
        assert refused == stops(num_blocks, block_size, num_random, compat == "hf_train"), num_blocks


def run_theirs(theirs, inputs, valid):
    """Their result [B, T, H, D] for our inputs, past the projections."""
    from transformers.models.big_bird.modeling_big_bird import BigBirdModel

    batch, seq_len, num_heads, head_dim = inputs["query"].shape
    attention_mask = torch.ones(batch, seq_len) if valid is None else valid
    blocked, band, from_mask, to_mask = BigBirdModel.create_masks_for_block_sparse_attn(
        attention_mask.double(), theirs.block_size
    )
    tensors = [tensor.transpose(1, 2) for tensor in inputs.values()]
    masks = (band, from_mask, to_mask, blocked, blocked)
    sizes = (num_heads, theirs.num_random_blocks, head_dim, theirs.block_size, theirs.block_size)
    lengths = (batch, seq_len, seq_len)
    return theirs.bigbird_block_sparse_attention(
        *tensors, *masks, *sizes, *lengths, seed=theirs.seed, plan_from_length=None, plan_num_rand_blocks=None
    )[0]


@pytest.mark.parametrize("mask", ["none", "tail", "ragged"])
@pytest.mark.parametrize("compat", ["hf_train", "hf_eval"])
@pytest.mark.parametrize(
    "seq_len, block_size, num_random, seed",
    [(96, 4, 3, 0), (48, 4, 3, 3), (60, 2, 2, 1), (1024, 64, 3, 0), (2048, 128, 2, 5)],
)
def test_the_oracle_is_their_layer(compat, mask, seq_len, block_size, num_random, seed):
    batch = 3 if seq_len < 1000 else 1
    inputs = {name: tensor.detach() for name, tensor in make_inputs(seq_len, batch=batch, head_dim=4).items()}
    valid = make_block_valid(mask, batch, seq_len)
    if valid is not None:
        valid[:, 0] = True  # theirs spreads over masked keys where no other is left
    expected = run_theirs(module(2, num_random, block_size, seed, compat == "hf_train").double(), inputs, valid)
    pattern = BlockPattern.bigbird(seq_len, block_size, 2, num_random, seed, compat=compat)
    out = block_sparse_attention(**inputs, pattern=pattern, valid=valid, impl="reference")
    assert error(out, expected) <= 1e-12


def test_without_compat_full_blocks_are_as_in_training():
    """The same function in train() and eval(): the released pattern of that length."""
    inputs = {name: tensor.detach() for name, tensor in make_inputs(1280, batch=1, head_dim=4).items()}
    theirs = module(2, 3, 64, 4, training=True).double()
    pattern = BlockPattern.bigbird(4096, 64, 2, 3, 4)
    out = block_sparse_attention(**inputs, pattern=pattern, impl="reference")
    assert error(out, run_theirs(theirs, inputs, None)) <= 1e-12
