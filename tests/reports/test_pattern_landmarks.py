"""Segments and scores of Nystrom attention against their definition."""

import numpy as np
import pytest

from reports.errors import ReportError
from reports.pattern_landmarks import landmark_figure, landmark_numbers, segment_lengths
from reports.pattern_named import drawing


@pytest.mark.parametrize(("seq_len", "num_landmarks"), [(64, 8), (100, 8), (9, 8), (7, 1), (4097, 64)])
def test_segments_differ_by_one_token_at_most(seq_len, num_landmarks):
    lengths = segment_lengths(seq_len, num_landmarks)
    assert len(lengths) == num_landmarks and lengths.sum() == seq_len
    assert lengths.max() - lengths.min() <= 1


def test_scores_are_those_of_the_three_matrices():
    numbers = landmark_numbers([2, 3, 3])
    assert numbers["pairs"] == 8 * 3 + 3 * 3 + 3 * 8 and numbers["share_of_dense"] == 57 / 64
    assert (numbers["shortest_segment"], numbers["longest_segment"]) == (2, 3)


def test_segments_are_drawn_with_their_own_lengths():
    axes = landmark_figure([2, 3, 5]).axes[0]
    strip = axes.collections[0]
    corners = strip.get_coordinates()[0, :, 0]  # the first stripe: segments along the keys
    np.testing.assert_allclose(corners, [0, 0.2, 0.5, 1.0])


def test_as_many_landmarks_as_tokens_are_full_attention():
    numbers = drawing("nystrom", ["seq_len=16", "num_landmarks=16"]).numbers
    assert numbers["share_of_dense"] == 1.0 and numbers["layers_to_all"] == 1


def test_no_landmarks_are_refused():
    with pytest.raises(ReportError, match="num_landmarks=0: expected a whole number from 1 to"):
        drawing("nystrom", ["num_landmarks=0"])
