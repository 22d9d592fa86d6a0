"""Which number format the matrix products run in."""

import contextlib

import torch


def resolve_precision(precision: str, device: torch.device) -> str:
    """ "fp32" or "bf16": "auto" takes bf16 where the device multiplies it natively (a GPU, AVX512-BF16, AMX)."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    # private names, the same in torch 2.11 to 2.13; where they are gone the safe answer is fp32
    probes = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return "bf16" if any(probe is not None and probe() for probe in probes) else "fp32"


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager:
    """Context for forward passes in a resolved precision; weights, sums and the optimizer stay in float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
