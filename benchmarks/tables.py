"""The three tables of the CPU benchmark, for any mechanism: modules with projections, attention alone, its scaling.

A mechanism is described by a `Mechanism` in a file of its own. Nothing is timed before its outputs agree.
"""

import importlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from benchmarks.agreement import Disagreement
from benchmarks.cases import BOTH, FORWARD, OURS, Shape, make_call, random_tensors
from benchmarks.memory import LargestTensor, extra_peak_bytes
from benchmarks.peers import Attention
from benchmarks.timing import Row, interleave, log_slope

TOLERANCE = 1e-4
MAX_SLOPE = 1.05  # of time and memory over length, in logarithms
MAX_SHARE = 0.5  # of T x T elements in the largest tensor: far enough from having made one
LENGTHS = (4096, 8192, 16384, 32768, 65536)


@dataclass(frozen=True)
class Peer:
    """Another attention on the same query, key and value."""

    make: Callable[[Any], Attention]  # from the shape; what that takes is set-up and not timed
    is_same: bool = True  # whether its output must be ours
    note: str | None = None  # of its rows
    passes: tuple[str, ...] = (FORWARD, BOTH)
    why_not_both: str = ""  # why it lacks one of the passes


@dataclass(frozen=True)
class Mechanism:
    """What is measured of one mechanism, against what, and what it is held to: `MECHANISM` in the file of its name.

    A shape is a subclass of `cases.Shape` whose fields are columns of `timing.Row`.
    """

    name: str
    shape: Shape
    quick: Shape  # a tiny one, to see that everything runs
    quick_lengths: tuple[int, ...]
    # (contender, shape) -> self-attention [B, T, dim] -> [B, T, dim], with the same weights for both contenders;
    # parameters that require no gradient are none of the comparison
    module: Callable[[str, Any], torch.nn.Module]
    module_peer: str
    attention: Callable[[Any], Attention]  # ours for a shape
    peers: Mapping[str, Peer]
    min_ratio: Mapping[str, float]  # by passes: times as fast as the peer's module
    max_memory_ratio: float  # of our module's extra memory over theirs
    min_kernel_ratio: Mapping[tuple[str, str], float] = field(default_factory=dict)  # by peer and passes
    # whether the largest tensor can be seen: a path that is one operator for PyTorch hides what it makes
    is_open: bool = True


def mechanism_of(name: str) -> Mechanism:
    """The mechanism that a file of this folder describes."""
    return importlib.import_module(f"benchmarks.{name}").MECHANISM


def all_tables(mechanism: Mechanism, *, is_quick: bool, num_rounds: int) -> Iterator[Iterator[Row]]:
    """The three tables, each to be measured as its rows are asked for."""
    shape = mechanism.quick if is_quick else mechanism.shape
    yield module_rows(mechanism, shape, num_rounds)
    yield kernel_rows(mechanism, shape, num_rounds)
    yield scaling_rows(mechanism, shape, mechanism.quick_lengths if is_quick else LENGTHS, num_rounds)


def row_of(mechanism: Mechanism, table: str, contender: str, passes: str, shape: Shape, **entries) -> Row:
    """An empty row of a case."""
    sizes = {"window": None} | asdict(shape)
    return Row(table, contender, passes, mechanism=mechanism.name, **sizes, **entries)


def module_call(mechanism: str, contender: str, passes: str, sizes: dict) -> Callable:
    """One side of the module table as a call without arguments, from what a fresh process can be told."""
    described = mechanism_of(mechanism)
    shape = type(described.shape)(**sizes)
    module = described.module(contender, shape).to(shape.device, getattr(torch, shape.dtype))
    inputs = random_tensors(1, (shape.batch, shape.seq_len, shape.dim), shape, requires_grad=passes == BOTH)
    return make_call(module, inputs, passes, [value for value in module.parameters() if value.requires_grad])


def attention_call(mechanism: str, passes: str, sizes: dict) -> Callable:
    """Our attention alone as a call without arguments."""
    described = mechanism_of(mechanism)
    shape = type(described.shape)(**sizes)
    return make_call(described.attention(shape), _inputs(shape, passes), passes)


def module_rows(mechanism: Mechanism, shape: Shape, num_rounds: int) -> Iterator[Row]:
    """Both modules, forward and forward + backward: times, their ratio, peak memory of a fresh process."""
    peer, sizes = mechanism.module_peer, asdict(shape)
    outputs = (module_call(mechanism.name, side, FORWARD, sizes)() for side in (OURS, peer))
    error = disagreement(peer, *outputs)
    for passes in (FORWARD, BOTH):
        calls = {side: module_call(mechanism.name, side, passes, sizes) for side in (OURS, peer)}
        seconds = interleave(calls, num_rounds=num_rounds, device=shape.device)
        memory = {side: _extra_memory("module_call", mechanism, shape, contender=side, passes=passes) for side in calls}
        for side, times in seconds.items():
            row = row_of(mechanism, "module", side, passes, shape, extra_memory_bytes=memory[side]).time(times)
            if side == peer:
                row.ratio_to(times, seconds[OURS])
                row.max_error, row.memory_ratio = error, memory[OURS] / max(memory[peer], 1)
                row.target = mechanism.min_ratio[passes]
            yield row


def _extra_memory(call, mechanism, shape, **arguments):
    """Of a call of this file, made by name in a process of its own; a small one before has the libraries ready."""
    small = replace(mechanism.quick, seq_len=mechanism.quick.seq_len // 2)
    orders = [{"mechanism": mechanism.name, "sizes": asdict(size), **arguments} for size in (shape, small)]
    num_threads = torch.get_num_threads()
    return extra_peak_bytes(f"{__name__}:{call}", *orders, device=shape.device, num_threads=num_threads)


def kernel_rows(mechanism: Mechanism, shape: Shape, num_rounds: int) -> Iterator[Row]:
    """The attention alone, beside the peers that can be made here."""
    functions: dict[str, Callable] = {OURS: mechanism.attention(shape)}
    setup, errors, notes = {}, {}, {}
    qkv = _inputs(shape, FORWARD)
    with torch.no_grad():
        expected = functions[OURS](*qkv)
        for name, peer in mechanism.peers.items():
            start = time.perf_counter()
            try:
                function = peer.make(shape)
            except (RuntimeError, NotImplementedError) as error:  # no compiler, or a head size it does not take
                notes[name] = f"not available: {str(error).splitlines()[0]}"
                continue
            setup[name] = time.perf_counter() - start
            if peer.is_same:
                errors[name] = disagreement(name, expected, function(*qkv))
            functions[name] = function
    for passes in (FORWARD, BOTH):
        qkv = _inputs(shape, passes)
        lacking = {name for name, peer in mechanism.peers.items() if passes not in peer.passes}
        calls = {name: make_call(call, qkv, passes) for name, call in functions.items() if name not in lacking}
        seconds = interleave(calls, num_rounds=num_rounds, device=shape.device)
        for name, times in seconds.items():
            entries = {"setup_s": setup.get(name), "max_error": errors.get(name)}
            row = row_of(mechanism, "kernel", name, passes, shape, **entries).time(times)
            if name != OURS:
                row.ratio_to(times, seconds[OURS])
                row.note = mechanism.peers[name].note
                row.target = mechanism.min_kernel_ratio.get((name, passes))
            yield row
        for name in mechanism.peers:
            note = notes.get(name)
            if name in lacking and note is None:
                note = f"not available: {mechanism.peers[name].why_not_both}"
            if note is not None:
                yield row_of(mechanism, "kernel", name, passes, shape, note=note)


def scaling_rows(mechanism: Mechanism, shape: Shape, lengths: tuple[int, ...], num_rounds: int) -> Iterator[Row]:
    """Our attention alone over lengths: the slopes of its time and of its memory, and the largest tensor it made."""
    for passes in (FORWARD, BOTH):
        calls, largest = {}, {}
        shapes = {length: replace(shape, seq_len=length) for length in lengths}
        for length, size in shapes.items():
            calls[length] = make_call(mechanism.attention(size), _inputs(size, passes), passes)
            with LargestTensor() as seen:
                calls[length]()
            largest[length] = seen.elements if mechanism.is_open else None
        seconds = interleave(calls, num_rounds=num_rounds, device=shape.device, num_warmup=1)
        ends = (lengths[0], lengths[-1])
        memory = {}
        if passes == BOTH:  # which needs more
            for length in ends:
                memory[length] = _extra_memory("attention_call", mechanism, shapes[length], passes=passes)
        for length, size in shapes.items():
            entries = {"largest_tensor": largest[length], "extra_memory_bytes": memory.get(length)}
            yield row_of(mechanism, "scaling", OURS, passes, size, **entries).time(seconds[length])
        slope = log_slope(list(lengths), seconds)
        row = row_of(mechanism, "scaling", OURS, passes, shapes[lengths[-1]], num_rounds=num_rounds)
        row.slope, row.slope_p20, row.slope_p80 = slope.median, slope.low, slope.high
        if memory:
            growth = max(memory[ends[1]], 1) / max(memory[ends[0]], 1)
            row.memory_slope = math.log(growth) / math.log(ends[1] / ends[0])
        row.note = f"slope over {ends[0]} to {ends[1]} tokens"
        if mechanism.is_open:
            row.largest_tensor = largest[ends[1]]
            row.largest_share = max(largest[length] / length**2 for length in lengths)
        yield row


def _inputs(shape, passes):
    sizes = (shape.batch, shape.seq_len, shape.num_heads, shape.head_dim)
    return random_tensors(3, sizes, shape, requires_grad=passes == BOTH)


def disagreement(name: str, ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest absolute difference; Disagreement where it is not that of rounding."""
    error = (ours - theirs).abs().max().item()
    if not error <= TOLERANCE:
        raise Disagreement(f"{name} differs from ours by {error:.3g}, more than {TOLERANCE}: nothing is timed")
    return error
