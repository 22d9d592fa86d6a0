"""Which number format is chosen, and what it applies to."""

import pytest
import torch
from torch import nn

from training.precision import autocast, resolve_precision

CPU, GPU = torch.device("cpu"), torch.device("cuda")
PROBES = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("device", [CPU, GPU], ids=str)
def test_a_named_precision_is_taken(precision, device):
    assert resolve_precision(precision, device) == precision


@pytest.mark.parametrize(
    "avx512, amx, expected", [(False, False, "fp32"), (True, False, "bf16"), (False, True, "bf16")]
)
def test_auto_on_a_cpu_asks_for_native_products(monkeypatch, avx512, amx, expected):
    for name, answer in zip(PROBES, (avx512, amx), strict=True):
        monkeypatch.setattr(torch.cpu, name, lambda answer=answer: answer, raising=False)
    assert resolve_precision("auto", CPU) == expected


def test_auto_without_the_probes_is_fp32(monkeypatch):
    for name in PROBES:
        monkeypatch.delattr(torch.cpu, name, raising=False)
    assert resolve_precision("auto", CPU) == "fp32"


@pytest.mark.parametrize("supported, expected", [(True, "bf16"), (False, "fp32")])
def test_auto_on_a_gpu_does_not_count_emulation(monkeypatch, supported, expected):
    def is_bf16_supported(including_emulation=True):
        return including_emulation or supported

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    assert resolve_precision("auto", GPU) == expected


def test_this_machine_gets_an_answer():
    assert resolve_precision("auto", CPU) in ("fp32", "bf16")


@pytest.mark.parametrize("precision, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_products_run_in_the_precision_and_weights_stay(precision, dtype):
    layer = nn.Linear(4, 3)
    with autocast(precision, CPU):
        out = layer(torch.randn(2, 4))
        total = torch.nn.functional.cross_entropy(out, torch.tensor([0, 1]))
    assert out.dtype == dtype
    assert total.dtype == torch.float32, "sums stay in float32"
    total.backward()
    assert layer.weight.dtype == layer.weight.grad.dtype == torch.float32


def test_the_precision_ends_with_the_context():
    with autocast("bf16", CPU):
        pass
    assert nn.Linear(4, 3)(torch.randn(2, 4)).dtype == torch.float32
