"""Measure tile sizes on this GPU and write its rows of the tile table: `python -m benchmarks.tune --help`.

Each kernel is timed with every candidate on the launches that a real call makes of it; what does not compile or does
not fit the device is passed over. Users never pay for this: without it the shipped table is used as it is.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from kernels import tile_table
from kernels.block_sparse_attention import BlockPattern, block_sparse_attention
from kernels.nystrom_attention import nystrom_attention
from kernels.window_attention import global_rows_attention, window_attention

SEQ_LEN, NUM_HEADS, NUM_GLOBAL, BLOCK_SIZE, NUM_LANDMARKS, NUM_TAPS = 16384, 12, 64, 64, 64, 33
NARROW, WIDE = 256, 1024  # keys on each side
MAX_NARROW = 640  # keys that a query sees, up to which a row counts as narrow
HEAD_DIMS = (64, 128, 32, 256, 16)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
ROWS = (16, 32, 64, 128)
WARPS = (4, 8)
STAGES = (1, 2, 3, 4)
# kernel -> whether it needs the backward pass
WINDOWED = {"window_forward": False, "window_query_grad": True, "window_key_grad": True}
GLOBAL = {"global_columns": True}
FULL_ROWS = {"global_rows_forward": False, "global_rows_key_grad": True, "global_rows_query_grad": True}
BLOCK_SPARSE = {"block_forward": False, "block_query_grad": True, "block_key_grad": True}
LANDMARK_ROWS = {"nystrom_keys_forward": False, "nystrom_keys_key_grad": True, "nystrom_keys_query_grad": True}
LANDMARK_KEYS = {"nystrom_queries_forward": False, "nystrom_queries_key_grad": True, "nystrom_queries_query_grad": True}
NYSTROM = {**LANDMARK_ROWS, **LANDMARK_KEYS, "nystrom_convolve": False, "nystrom_band_grad": True}
BACKWARD = {**WINDOWED, **GLOBAL, **FULL_ROWS, **BLOCK_SPARSE, **NYSTROM}


def candidates(kernel: str, block_d: int, element_size: int) -> Iterator[dict[str, Any]]:
    """Tile sizes worth a try: neither tiny beside a narrow head nor beyond what registers and shared memory hold."""
    splits = (False, True) if kernel in tile_table.WINDOW_KERNELS else (None,)
    # a larger tile would be cut down to a block, or to the landmarks
    most_rows = BLOCK_SIZE if kernel in BLOCK_SPARSE else NUM_LANDMARKS if kernel in LANDMARK_ROWS else ROWS[-1]
    most_columns = BLOCK_SIZE if kernel in BLOCK_SPARSE else NUM_LANDMARKS if kernel in LANDMARK_KEYS else ROWS[-1]
    rows = [number for number in ROWS if number <= most_rows]
    columns = [number for number in ROWS if number <= most_columns]
    for block_m, block_n, warps, stages, split in itertools.product(rows, columns, WARPS, STAGES, splits):
        tiles = (block_m + block_n * stages) * block_d * element_size
        if block_m * block_n < 16 * 32 * warps // 2 or tiles > 200_000 or block_m * block_d * 4 > 32 * 1024 * warps:
            continue
        options = {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": warps, "num_stages": stages}
        yield options if split is None else {**options, "SPLIT": split}


def best_of(options: Iterator[dict[str, Any]], seconds: Callable[[dict[str, Any]], float]) -> tuple[float, dict]:
    """(seconds, options) of the fastest; those whose launch fails are passed over. ValueError where all of them do."""
    timed, reason = [], "no candidate"
    for option in options:
        try:
            timed.append((seconds(option), option))
        except Exception as error:  # Triton has no common type for what does not compile or fit
            reason = f"{type(error).__name__}: {error}"
    if not timed:
        raise ValueError(f"nothing could be launched, at last: {reason}")
    return min(timed, key=lambda pair: pair[0])


def replace_rows(table: list[dict[str, Any]], found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The table with the rows of the same kernel, architecture, element size and block_d replaced, in its order."""

    def place(row):
        return row["kernel"], row["arch"], row["element_size"], row["block_d"]

    new = {place(row) for row in found}
    rows = [row for row in table if place(row) not in new] + found
    return sorted(
        rows,
        key=lambda row: (
            -int(row["arch"][3:]),
            row["kernel"],
            -row["element_size"],
            row["block_d"],
            row["max_seen"] or sys.maxsize,
        ),
    )


def complete_rows(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows but narrow ones without their wide one, which would leave wide windows to an older architecture."""
    wide = {(row["kernel"], row["element_size"], row["block_d"]) for row in found if row["max_seen"] is None}
    return [row for row in found if (row["kernel"], row["element_size"], row["block_d"]) in wide]


def make_call(kernel: str, head_dim: int, dtype: torch.dtype, window: int) -> Callable[[], object]:
    """A call that launches the kernel, with random inputs on the GPU."""
    sizes = (1, SEQ_LEN, NUM_HEADS, head_dim)
    query, key, value = (torch.randn(sizes, device="cuda", dtype=dtype, requires_grad=True) for _ in range(3))
    index = torch.arange(NUM_GLOBAL, device="cuda")[None] * (SEQ_LEN // NUM_GLOBAL)
    pattern = BlockPattern.bigbird(SEQ_LEN, BLOCK_SIZE, NUM_HEADS)
    taps = torch.randn(NUM_HEADS, NUM_TAPS, device="cuda", requires_grad=True)

    def attend():
        if kernel in NYSTROM:
            options = {"num_landmarks": NUM_LANDMARKS, "conv_weight": taps}
            return nystrom_attention(query, key, value, **options, impl="triton")
        if kernel in BLOCK_SPARSE:
            return block_sparse_attention(query, key, value, pattern, impl="triton")
        if kernel in FULL_ROWS:
            return global_rows_attention(query[:, :NUM_GLOBAL], key, value, global_index=index, impl="triton")
        chosen = index if kernel in GLOBAL else None
        return window_attention(query, key, value, window=window, global_index=chosen, impl="triton")

    weights = torch.randn_like(attend())
    if not BACKWARD[kernel]:
        return attend
    # the pass is timed as a whole: all but the kernel in question is the same for every candidate
    out = attend()
    wanted = (query, key, value, taps) if kernel in NYSTROM else (query, key, value)
    return lambda: torch.autograd.grad(out, wanted, weights, retain_graph=True)


def timer(kernel: str, head_dim: int, dtype: torch.dtype, window: int) -> Callable[[dict[str, Any]], float]:
    """A function from a candidate to the milliseconds of a call with it."""
    from triton.testing import do_bench

    call = make_call(kernel, head_dim, dtype, window)

    def milliseconds(option):
        # a backward pass in autograd's own thread would not see the trial
        with tile_table.trial(kernel, option), torch.autograd.set_multithreading_enabled(False):
            call()
            median: Any = do_bench(call, warmup=5, rep=20, quantiles=[0.5])
            return median

    return milliseconds


def tune(kernel: str, head_dim: int, dtype: torch.dtype, window: int, max_seen: int | None) -> dict[str, Any]:
    """The row of the table for this GPU."""
    element_size = torch.empty((), dtype=dtype).element_size()
    _, option = best_of(candidates(kernel, head_dim, element_size), timer(kernel, head_dim, dtype, window))
    arch = tile_table.architecture(torch.device("cuda", torch.cuda.current_device()))
    place = {"kernel": kernel, "arch": arch, "element_size": element_size, "block_d": head_dim, "max_seen": max_seen}
    return {**place, **option, "shared_bytes": 0}


def main(arguments: list[str] | None = None) -> int:
    """Measure what was asked for, printing a line each, and write the table; 0."""
    about = "Measure tile sizes on this GPU and write its rows of the tile table."
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=about)
    parser.add_argument("--kernels", nargs="+", choices=BACKWARD, default=list(BACKWARD))
    parser.add_argument("--head-dims", nargs="+", type=int, choices=HEAD_DIMS, default=list(HEAD_DIMS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which no row is begun")
    parser.add_argument(
        "--output", type=Path, default=tile_table.FILE, help="the table to write (default: the shipped)"
    )
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("torch sees no CUDA device: tile sizes are measured on a GPU, the shipped table stays as it is")
    console, start, found, shipped = Console(), time.monotonic(), [], tile_table.rows()
    for dtype, head_dim, kernel in itertools.product(options.dtypes, options.head_dims, options.kernels):
        widths = [(NARROW, MAX_NARROW), (WIDE, None)] if kernel in WINDOWED else [(NARROW, None)]
        for window, max_seen in widths:
            if time.monotonic() - start > options.budget:
                console.print(f"left out for lack of time: {kernel} {dtype} head dim {head_dim} max_seen {max_seen}")
                continue
            try:
                found.append(tune(kernel, head_dim, DTYPES[dtype], window, max_seen))
            except ValueError as error:
                console.print(f"left as it is: {kernel} {dtype} head dim {head_dim} max_seen {max_seen}: {error}")
                continue
            console.print(found[-1])
            # after each row: an hour's work outlives whatever ends the next one
            kept = complete_rows(found)
            options.output.write_text(tile_table.table_text(replace_rows(shipped, kept)), encoding="utf-8")
    console.print(
        f"written: {len(complete_rows(found))} rows to {options.output}; `python -m benchmarks.compile --update` adds "
        "their memory"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
