"""The block-sparse kernels in the interpreter against the oracle: values and every gradient, at awkward shapes."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.block_sparse_attention import BlockPattern, block_sparse_attention
from tests.kernels.block_cases import CASES, build, drawn_cases, make_block_valid, make_pattern
from tests.kernels.window import assert_same, error, in_double, make_inputs
from tests.kernels.window import run as run_function

pytestmark = pytest.mark.interpreter


def run(inputs, impl="triton", **options):
    return run_function(inputs, function=block_sparse_attention, impl=impl, **options)


def assert_kernels_are_the_oracle(inputs, options):
    assert_same(run(inputs, **options), run(inputs, **options, impl="reference"))


@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["all", "dropout"])
@pytest.mark.parametrize("case", CASES)
def test_kernels_are_the_oracle(case, dropout):
    assert_kernels_are_the_oracle(*build(CASES[case], block_size=16, head_dim=8, dropout=dropout))
