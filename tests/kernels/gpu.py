"""What the GPU tests of all mechanisms share."""

from collections.abc import Callable

import torch

from tests.kernels.window import in_double


def on_gpu(entries: dict) -> dict:
    """The entries with tensors moved to the GPU, without their history."""
    return {name: entry.detach().cuda() if torch.is_tensor(entry) else entry for name, entry in entries.items()}


def results(function: Callable, inputs: dict, **options) -> list[torch.Tensor]:
    """Result and gradients under one fixed random weighting."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    out = function(**leaves, **options)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return [out.detach(), *torch.autograd.grad(out, list(leaves.values()), weights)]


def assert_as_good_as_plain(function: Callable, inputs: dict, options: dict) -> None:
    """1e-5 relative, or twice the error of dense attention in the same dtype."""
    exact = results(function, in_double(inputs), **options, impl="reference")
    plain = results(function, inputs, **options, impl="reference")
    ours = results(function, inputs, **options, impl="triton")
    for truth, peer, found in zip(exact, plain, ours, strict=True):
        assert torch.isfinite(found).all() and found.dtype == peer.dtype
        largest = truth.abs().max().clamp(min=1e-30)
        error, allowed = (((tensor.double() - truth).abs().max() / largest).item() for tensor in (found, peer))
        assert error <= max(1e-5, 2 * allowed)


def assert_nothing_waits(step: Callable[[], object]) -> None:
    """A second call of `step` synchronises nowhere."""
    step()
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def assert_replays_the_same(step: Callable[[], tuple], leaves: list[torch.Tensor]) -> None:
    """A captured graph of `step` gives what a call gives, on new values of the leaves."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for leaf in leaves:
            leaf.copy_(torch.randn_like(leaf))
    graph.replay()
    torch.cuda.synchronize()
    for replayed, expected in zip(captured, step(), strict=True):
        assert replayed.equal(expected)
