"""What the tests of window attention share: inputs, masks, an implementation by loops, and how to compare."""

import torch

from kernels.window_attention import window_attention

# the paths whose values and laws are tested in one place; the kernels have files of their own
IMPLEMENTATIONS = ("reference", "blocked")
MASKS = ("none", "tail", "holes", "one_all_masked", "isolated")


def make_inputs(
    seq_len: int,
    *,
    batch: int = 2,
    num_heads: int = 2,
    key_heads: int | None = None,
    head_dim: int = 4,
    dtype: torch.dtype = torch.float64,
    columns: int | None = None,
    key_len: int | None = None,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """Random query, key, value, and with `columns` the relative term, all of them leaves with a gradient.

    `key_len` keys, else as many as there are queries.
    """
    generator = torch.Generator().manual_seed(seed)
    keys = (batch, seq_len if key_len is None else key_len, key_heads or num_heads, head_dim)
    shapes = {"query": (batch, seq_len, num_heads, head_dim), "key": keys, "value": keys}
    if columns is not None:
        shapes["position_query"] = shapes["query"]
        shapes["position_key"] = (num_heads, columns, head_dim)
    tensors = {}
    for name, shape in shapes.items():
        tensor = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        tensors[name] = tensor.requires_grad_()
    return tensors


def num_columns(window, causal: bool) -> int:
    """Window columns of the relative term: the widest head decides."""
    widest = window if isinstance(window, int) else max(window)
    return widest * (1 if causal else 2) + 1


def make_valid(kind: str, batch: int, seq_len: int, seed: int = 0) -> torch.Tensor | None:
    """A `valid` mask [batch, seq_len] by name."""
    if kind == "none":
        return None
    valid = torch.ones(batch, seq_len, dtype=torch.bool)
    if kind == "tail":
        valid[0, seq_len - seq_len // 3 :] = False
    elif kind == "holes":
        valid = torch.rand(batch, seq_len, generator=torch.Generator().manual_seed(seed)) > 0.4
    elif kind == "one_all_masked":
        valid[0] = False
    elif kind == "isolated":
        valid = (torch.arange(seq_len) % 7 == 3).expand(batch, seq_len).clone()
    return valid


def run(inputs: dict[str, torch.Tensor], function=window_attention, **options) -> dict[str, torch.Tensor]:
    """Result "out" and the gradient of every input under one fixed random weighting of the result."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    out = function(**leaves, **options)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    out.backward(weights.to(out.dtype))
    return {"out": out.detach()} | {name: leaf.grad for name, leaf in leaves.items()}


def in_double(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same numbers in float64."""
    return {name: tensor.detach().double() for name, tensor in inputs.items()}


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over the largest magnitude expected; absolute where all that is expected is zero."""
    assert actual.shape == expected.shape
    if not expected.numel():
        return 0.0
    assert torch.isfinite(actual).all(), "nan or inf"
    difference = (actual.double() - expected.double()).abs().max().item()
    return difference / (expected.double().abs().max().item() or 1.0)


def rms_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square of the difference over that of what is expected."""
    assert torch.isfinite(actual).all(), "nan or inf"
    return ((actual.double() - expected).pow(2).mean() / expected.pow(2).mean()).sqrt().item()


def assert_same(actual: dict, expected: dict, tolerance: float = 1e-12) -> None:
    """Every tensor of two results agrees to `tolerance`, relative to its largest entry."""
    assert actual.keys() == expected.keys()
    errors = {name: error(actual[name], expected[name]) for name in expected}
    assert max(errors.values()) <= tolerance, errors


def assert_blocked_is_the_oracle(inputs: dict, options: dict) -> None:
    """Values and all gradients of the two paths agree."""
    assert_same(run(inputs, **options, impl="blocked"), run(inputs, **options, impl="reference"))


def by_loops(
    query,
    key,
    value,
    *,
    window,
    dilation,
    causal,
    valid=None,
    global_index=None,
    position_query=None,
    position_key=None,
    query_start=0,
):
    """Window attention written as the definition says: one query, one key at a time."""
    batch, seq_len, num_heads, head_dim = query.shape
    num_keys = key.shape[1]
    shared = num_heads // key.shape[2]
    rows = []
    for b in range(batch):
        for i in range(seq_len):
            for h in range(num_heads):
                scores, values = [], []
                here = query_start + i
                seen = {here + step * dilation[h] for step in range(-window[h], window[h] + 1)}
                if global_index is not None:
                    seen |= set(global_index[b].tolist())
                for j in sorted(seen):
                    if not 0 <= j < num_keys or (causal and j > here) or (valid is not None and not valid[b, j]):
                        continue
                    if valid is not None and here < num_keys and not valid[b, here]:
                        continue
                    score = torch.dot(query[b, i, h], key[b, j, h // shared])
                    if position_query is not None:
                        column = (j - here) // dilation[h] + window[h]
                        score = score + torch.dot(position_query[b, i, h], position_key[h, column])
                    scores.append(score / head_dim**0.5)
                    values.append(value[b, j, h // shared])
                if scores:
                    weights = torch.stack(scores).exp()
                    rows.append((weights / weights.sum()) @ torch.stack(values))
                else:
                    rows.append(query.new_zeros(head_dim))
    return torch.stack(rows).view(query.shape)
