"""Baselines against a few lines of plain counting, and the figures known for real text."""

from __future__ import annotations

import bz2
import lzma
import math
import zlib
from collections import Counter

import numpy as np
import pytest

from data.baselines import baselines, markov_bits
from data.chars import load_chars


def sample(length: int, seed: int) -> bytes:
    return np.random.default_rng(seed).choice(np.frombuffer(b"abcab \xff", np.uint8), length).tobytes()


def slow_probability(train: bytes, history: bytes, character: int, order: int) -> float:
    """Witten-Bell by counting, one character at a time."""
    if order < 0:
        return 1 / 256
    below = slow_probability(train, history, character, order - 1)
    if len(history) < order:
        return below
    context = history[len(history) - order :]
    followers = Counter(train[at + order] for at in range(len(train) - order) if train[at : at + order] == context)
    if not followers:
        return below
    total, distinct = followers.total(), len(followers)
    return (followers[character] + distinct * below) / (total + distinct)


@pytest.mark.parametrize("order", range(4))
@pytest.mark.parametrize(("num_train", "num_test"), [(300, 60), (2, 9), (1, 1), (5, 3)])
def test_markov_equals_counting(order, num_train, num_test):
    train, test = sample(num_train, 0), sample(num_test, 1)
    expected = [-math.log2(slow_probability(train, test[:at], test[at], order)) for at in range(num_test)]
    np.testing.assert_allclose(markov_bits(train, test)[order], expected, rtol=1e-12)


@pytest.mark.parametrize("order", range(4))
def test_probabilities_of_all_characters_sum_to_one(order):
    train = sample(200, 0)
    total = 0.0
    for character in range(256):
        total += 2.0 ** -markov_bits(train, b"cab" + bytes([character]))[order][-1]
    assert total == pytest.approx(1.0, abs=1e-12)


def test_compressors_are_the_difference_of_two_sizes():
    train, test = sample(5_000, 0), sample(900, 1)
    result = baselines(train, test)
    for name, size in {
        "gzip": lambda text: len(zlib.compress(text, 9)),
        "bzip2": lambda text: len(bz2.compress(text)),
        "xz": lambda text: len(lzma.compress(text)),
    }.items():
        assert result[name] == 8 * (size(train + test) - size(train)) / len(test)


def test_training_bytes_are_bounded_and_said():
    train, test = np.frombuffer(sample(5_000, 0), np.uint8), np.frombuffer(sample(500, 1), np.uint8)
    bounded = baselines(train, test, max_train_bytes=1_000)
    assert bounded["train_bytes_used"] == 1_000 and bounded["train_bytes"] == 5_000
    last = baselines(train[-1_000:], test)
    assert {**bounded, "train_bytes": 0} == {**last, "train_bytes": 0}


@pytest.mark.parametrize(("train", "test"), [(b"", b"x"), (b"x", b"")])
def test_nothing_to_learn_or_score(train, test):
    with pytest.raises(ValueError, match=f"got {len(train)} and {len(test)}"):
        baselines(train, test)


def test_known_figures_on_the_enwik8_prefix(data_file, tmp_path):
    corpus = load_chars("enwik8", path=data_file("enwik8/enwik8_head.xz"), cache_dir=tmp_path)
    result = baselines(corpus.splits["train"], corpus.splits["test"])
    assert result["xz"] == pytest.approx(2.10, abs=0.01)
    assert result["markov_3"] == pytest.approx(2.56, abs=0.01)
    orders = [result[f"markov_{order}"] for order in range(4)]
    assert orders == sorted(orders, reverse=True)
    assert result["xz"] < result["bzip2"] < result["gzip"]
