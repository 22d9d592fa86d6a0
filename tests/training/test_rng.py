"""The generators repeat their draws after a round trip through tensors and JSON."""

import json
import random

import numpy as np
import torch

from training import rng


def draw() -> list[float]:
    torch_draw = torch.nn.functional.dropout(torch.ones(5), 0.5).tolist()
    return [
        random.random(),
        random.gauss(0, 1),
        float(np.random.rand()),
        float(np.random.randn()),
        *torch_draw,
    ]


def test_every_generator_repeats():
    random.gauss(0, 1)
    np.random.randn()
    tensors, values = rng.capture()
    tensors = {key: value.clone() for key, value in tensors.items()}
    values = json.loads(json.dumps(values))
    expected = draw()
    assert draw() != expected
    rng.restore(tensors, values)
    assert draw() == expected
