"""Which tokens a landmark averages, and that the means and their gradient are what the tables say."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.nystrom_attention.landmarks import cut, means, spread
from kernels.nystrom_attention.reference import averaging
from tests.kernels.window import error


def segments_of(seq_len, num_landmarks, valid=None, dtype=torch.float64):
    return cut(seq_len, num_landmarks, valid, dtype=dtype, device=torch.device("cpu"))


def lengths(segments):
    return segments.first.diff(dim=1).tolist()


@pytest.mark.parametrize(
    "seq_len, num_landmarks, expected",
    [(12, 4, [3, 3, 3, 3]), (10, 4, [2, 2, 3, 3]), (11, 4, [2, 3, 3, 3]), (5, 4, [1, 1, 1, 2]), (7, 1, [7])],
)
def test_short_segments_come_first(seq_len, num_landmarks, expected):
    """The rule of the vision model of mlpen/Nystromformer for a length that the landmarks do not divide."""
    segments = segments_of(seq_len, num_landmarks)
    assert lengths(segments) == [expected]
    assert segments.index.tolist() == [[j for j, length in enumerate(expected) for _ in range(length)]]
    assert segments.real is None and segments.single is None


def test_each_example_is_cut_by_its_own_tokens():
    valid = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 1], [0, 1, 0, 1, 1, 1, 0, 1], [0, 0, 1, 1, 0, 0, 0, 0], [0] * 8]).bool()
    segments = segments_of(8, 3, valid)
    assert lengths(segments) == [[2, 3, 3], [1, 2, 2], [0, 1, 1], [0, 0, 0]]
    assert segments.index[1].tolist() == [-1, 0, -1, 1, 1, 2, -1, 2]
    assert segments.index[2].tolist() == [-1, -1, 1, 2, -1, -1, -1, -1]
    assert segments.real is not None and segments.single is not None
    assert segments.real.tolist() == [[True] * 3, [True] * 3, [False, True, True], [False] * 3]
    assert segments.single.tolist() == [False, False, True, True]


@st.composite
def masks(draw):
    seq_len = draw(st.integers(2, 40))
    rows = st.lists(st.booleans(), min_size=seq_len, max_size=seq_len)
    return torch.tensor(draw(st.lists(rows, min_size=1, max_size=3)))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(valid=masks(), data=st.data())
def test_means_are_those_of_the_oracle(valid, data):
    seq_len = valid.shape[1]
    num_landmarks = data.draw(st.integers(1, seq_len - 1))
    segments = segments_of(seq_len, num_landmarks, valid)
    weights = torch.stack([averaging(each, num_landmarks) for each in valid])  # [B, N, T]
    tensor = torch.randn(len(valid), seq_len, 2, 3, dtype=torch.float64, requires_grad=True)
    expected = torch.einsum("bnt,bthd->bnhd", weights, tensor)
    grad = torch.randn_like(expected)
    found = means(tensor, segments)
    assert error(found.detach(), expected.detach()) < 1e-14
    (expected_grad,) = torch.autograd.grad(expected, tensor, grad)
    (found_grad,) = torch.autograd.grad(found, tensor, grad)
    assert error(found_grad, expected_grad) < 1e-14 and spread(grad, segments).equal(found_grad)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seq_len=st.integers(2, 60), data=st.data())
def test_a_text_without_padding_needs_no_mask(seq_len, data):
    num_landmarks = data.draw(st.integers(1, seq_len - 1))
    plain, masked = segments_of(seq_len, num_landmarks), segments_of(seq_len, num_landmarks, torch.ones(2, seq_len) > 0)
    tensor = torch.randn(2, seq_len, 2, 3, dtype=torch.float64)
    assert error(means(tensor, plain), means(tensor, masked)) < 1e-14
    for one, other in ((plain.start, masked.start), (plain.index, masked.index), (plain.share, masked.share)):
        assert one.expand_as(other).equal(other)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(valid=masks(), data=st.data())
def test_a_landmark_lies_between_its_start_and_the_next_one(valid, data):
    """As the kernel reads them: positions from start[j] on that are in a landmark are in landmark j."""
    num_landmarks = data.draw(st.integers(1, valid.shape[1] - 1))
    segments = segments_of(valid.shape[1], num_landmarks, valid)
    for start, index in zip(segments.start.tolist(), segments.index.tolist(), strict=True):
        found = [[each for each in index[start[j] : start[j + 1]] if each >= 0] for j in range(num_landmarks)]
        assert [set(each) for each in found] == [{j} if j in index else set() for j in range(num_landmarks)]
        assert sum(map(len, found)) == sum(each >= 0 for each in index)


def test_a_landmark_of_one_token_is_that_token():
    tensor = torch.randn(1, 6, 2, 3)
    valid = torch.tensor([[True, False, True, True, False, False]])
    found = means(tensor, segments_of(6, 5, valid, torch.float32))
    assert found[:, :2].eq(0).all() and found[:, 2:].equal(tensor[:, valid[0]])
