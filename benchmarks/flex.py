"""FlexAttention as a peer: the same masks, its block lists in linear memory, its defaults and its best options."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from benchmarks.agreement import in_a_line
from benchmarks.gpu_case import FLEX_BLOCK

if TYPE_CHECKING:
    from benchmarks.gpu_window import WindowCase
    from kernels.block_sparse_attention import BlockPattern

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Maker = Callable[[int, dict], Attention]  # from the block size of a mask and kernel options
MASK_ELEMENTS = 2**27  # of the mask, held at a time while its blocks are counted
SAFE = {"ROWS_GUARANTEED_SAFE": True, "PRESCALE_QK": True}  # every row sees itself
# (block size of the mask, options): the default's neighbours, and smaller tiles where a window wastes less of them
FORWARD_OPTIONS = (
    (FLEX_BLOCK, {}),
    (FLEX_BLOCK, {**SAFE, "fwd_BLOCK_M": 128, "fwd_BLOCK_N": 64, "fwd_num_warps": 4, "fwd_num_stages": 3}),
    (FLEX_BLOCK, {**SAFE, "fwd_BLOCK_M": 128, "fwd_BLOCK_N": 64, "fwd_num_warps": 8, "fwd_num_stages": 3}),
    (FLEX_BLOCK, {**SAFE, "fwd_BLOCK_M": 64, "fwd_BLOCK_N": 64, "fwd_num_warps": 4, "fwd_num_stages": 3}),
    (64, {**SAFE, "fwd_BLOCK_M": 64, "fwd_BLOCK_N": 64, "fwd_num_warps": 4, "fwd_num_stages": 3}),
)
# rows and keys of the tiles that make dk and dv, then of those that make dq; warps, stages
BACKWARD_TILES = (None, (64, 64, 64, 64, 4, 3), (32, 64, 64, 32, 4, 3), (32, 128, 128, 32, 4, 3))


def mask_mod(case: "WindowCase", device: str) -> Callable:
    """(batch, head, row, key) -> seen, in tensor operations: the case's window and its global keys."""
    window, dilation, causal = case.window, case.dilation, case.causal
    is_global = None
    if case.num_globals:
        is_global = torch.zeros(case.seq_len, dtype=torch.bool, device=device)
        is_global[case.global_positions] = True

    def seen(batch, head, row, key):
        distance = (row - key).abs()
        near = distance <= window * dilation
        if dilation > 1:
            near = near & (distance % dilation == 0)
        if is_global is not None:
            near = near | is_global[key]
        return near & (row >= key) if causal else near

    return seen


def block_mask(seen: Callable, seq_len: int, device: str, block_size: int = FLEX_BLOCK):
    """The BlockMask that create_block_mask gives, counted a few rows of blocks at a time: T x T is never held."""
    from torch.nn.attention.flex_attention import BlockMask

    num_blocks = -(-seq_len // block_size)
    padded = num_blocks * block_size
    keys = torch.arange(padded, device=device)
    blocks_at_once = max(1, MASK_ELEMENTS // (padded * block_size))
    counts = []
    for first in range(0, padded, blocks_at_once * block_size):
        rows = torch.arange(first, min(first + blocks_at_once * block_size, padded), device=device)[:, None]
        inside = (rows < seq_len) & (keys < seq_len)
        mask = seen(None, None, rows.clamp(max=seq_len - 1), keys.clamp(max=seq_len - 1)) & inside
        counts.append(mask.view(-1, block_size, num_blocks, block_size).sum((1, 3)))
    count = torch.cat(counts)[None, None]  # [1, 1, num_blocks, num_blocks]
    full = count == block_size**2
    partial = (count > 0) & ~full
    return BlockMask.from_kv_blocks(
        *_listed(partial), *_listed(full), BLOCK_SIZE=block_size, mask_mod=seen, seq_lengths=(seq_len, seq_len)
    )


def pattern_mask(pattern: "BlockPattern", seq_len: int, device: str, block_size: int):
    """A pattern as a BlockMask with lists for each head, its own blocks or larger ones: a whole number of its own.

    Blocks that are seen wholly need no mask; larger ones that are seen in part look the pattern up. ValueError where a
    block counts twice: a BlockMask cannot say so.
    """
    from torch.nn.attention.flex_attention import BlockMask

    counts = pattern.counts(pattern.blocks_of(seq_len)).to(device)  # [H, n, n]
    if (counts > 1).any():
        raise ValueError(f"of {seq_len} tokens some rows count a block twice, which a BlockMask cannot")
    if seq_len % block_size or block_size % pattern.block_size:
        raise ValueError(f"blocks of {block_size} do not divide {seq_len} tokens in blocks of {pattern.block_size}")
    seen, factor = counts > 0, block_size // pattern.block_size
    inside = seen.unflatten(2, (-1, factor)).unflatten(1, (-1, factor)).sum((2, 4))[None]  # [1, H, n, n] of large ones
    full = inside == factor**2

    def lookup(batch, head, row, key):
        return seen[head, row // pattern.block_size, key // pattern.block_size]

    return BlockMask.from_kv_blocks(
        *_listed((inside > 0) & ~full),
        *_listed(full),
        BLOCK_SIZE=block_size,
        mask_mod=None if full.equal(inside > 0) else lookup,
        seq_lengths=(seq_len, seq_len),
    )


def _listed(chosen):
    """How many blocks of each row are chosen, and their numbers in rising order before the others'."""
    numbers = chosen.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(-1).to(torch.int32), numbers.to(torch.int32).contiguous()


def attention(mask, *, grouped: bool = False, options: Mapping | None = None, mode: str | None = None) -> Attention:
    """FlexAttention compiled for the sizes it meets; `mask` a BlockMask or None, `mode` that of torch.compile."""
    from torch.nn.attention.flex_attention import flex_attention

    # one call in the graph, and no way out of it: uncompiled it would make every score
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True, mode=mode)
    chosen: Any = dict(options) if options else None  # their type for it is closed, and grows by the version

    def attend(query, key, value):
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        out = compiled(query, key, value, block_mask=mask, enable_gqa=grouped, kernel_options=chosen)
        return out.transpose(1, 2)

    return attend


def of_case(case: "WindowCase", device: str) -> Attention:
    """The window of a case with its global keys, at the defaults."""
    return maker(case, device)(FLEX_BLOCK, {})


def maker(case: "WindowCase", device: str) -> Maker:
    """The same from a block size of the mask and kernel options; a mask is made once."""
    seen, masks, grouped = mask_mod(case, device), {}, case.num_heads != case.num_kv_heads

    def make(block_size, options):
        if block_size not in masks:
            masks[block_size] = block_mask(seen, case.seq_len, device, block_size)
        return attention(masks[block_size], grouped=grouped, options=options)

    return make


@dataclass(frozen=True)
class Candidate:
    """Options that ran, agreed and were timed: median seconds, block size of the mask, kernel options."""

    seconds: float
    block_size: int
    options: dict
    attention: Attention

    def __str__(self) -> str:
        return _words(self.block_size, self.options)


def search(
    candidates: Iterable[tuple[int, dict]],
    make: Maker,
    *,
    make_timed_call: Callable[[Attention], Callable],
    agrees: Callable[[Attention], bool],
    clock: Callable[[Mapping], Mapping],
    out_of_time: Callable[[], bool],
) -> list[Candidate]:
    """The candidates (block size of the mask, kernel options) that run and agree, the fastest first.

    `make` makes the attention of a candidate, `make_timed_call(attention)` what `clock` times. Options that do not
    compile, do not fit or give other results are passed over; `out_of_time()` is asked before each candidate but the
    first. RuntimeError where none is left.
    """
    found, reason = [], "no time"
    for index, (block_size, options) in enumerate(candidates):
        if index and out_of_time():
            break
        try:
            attend = make(block_size, options)
            if not agrees(attend):
                reason = f"another result with {_words(block_size, options)}"
                continue
            (rounds,) = clock({"candidate": make_timed_call(attend)}).values()
        except Exception as error:  # whatever a compiler makes of options it cannot have
            reason = f"{in_a_line(error)}; {_words(block_size, options)}"
            continue
        found.append(Candidate(float(np.median(rounds)), block_size, options, attend))
    if not found:
        raise RuntimeError(f"no options of FlexAttention ran ({reason})")
    return sorted(found, key=lambda candidate: candidate.seconds)


def _words(block_size, options):
    chosen = [f"{name}={value}" for name, value in options.items()] or ["the defaults"]
    return ", ".join([f"mask blocks of {block_size}"] * (block_size != FLEX_BLOCK) + chosen)


def backward_candidates(base: Mapping) -> list[tuple[int, dict]]:
    """Options of forward + backward around forward options that are known to be good."""
    names = ("BLOCK_M1", "BLOCK_N1", "BLOCK_M2", "BLOCK_N2", "num_warps", "num_stages")
    tiles = [{} if tile is None else dict(zip((f"bwd_{name}" for name in names), tile, strict=True))
             for tile in BACKWARD_TILES]  # fmt: skip
    return [(FLEX_BLOCK, {**base, **tile}) for tile in tiles]


@contextlib.contextmanager
def compile_settings() -> Iterator[None]:
    """Room for as many compiled variants as the cases need, and compilation in this process.

    A pool of compiler workers would start up during the timing.
    """
    import torch._dynamo.config as dynamo
    import torch._inductor.config as inductor

    with dynamo.patch(recompile_limit=256, accumulated_recompile_limit=4096), inductor.patch(compile_threads=1):
        yield


def forget_compiled() -> None:
    """Let go of what was compiled for another case, and of the masks it holds."""
    import torch._dynamo

    torch._dynamo.reset()
