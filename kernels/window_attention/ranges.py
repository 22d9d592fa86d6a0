"""Which tiles a program of the window kernels visits, and which of them need no mask.

A dilation d splits a sequence into d residue classes; within one, the window is plain. Rows and keys of a class are
counted in steps: row m of class `residue` is token residue + m * d, and stands at key `first_key + (shift + m) * d`.
"""

import triton
import triton.language as tl

from kernels.tiles import load_tile, tile_offsets


@triton.jit
def head_pattern(window_ptr, dilation_ptr, head, T, S, query_start, CAUSAL: tl.constexpr):
    """(left, right, dilation) of a head in steps; a dilation beyond every distance leaves each row its own key."""
    longest = tl.maximum(query_start + T, S)
    dilation = tl.load(dilation_ptr + head)
    alone = dilation >= longest
    left = tl.where(alone, 0, tl.minimum(tl.load(window_ptr + head), longest))
    return left, left * 0 if CAUSAL else left, tl.where(alone, 1, dilation)


@triton.jit
def tile_of_class(tile, length, dilation, BLOCK: tl.constexpr):
    """(residue, first step) of a tile of a sequence; beyond the last one, the residue is `dilation` or more."""
    tiles_per_class = tl.cdiv(tl.cdiv(length, dilation), BLOCK)
    return tile // tiles_per_class, tile % tiles_per_class * BLOCK


@triton.jit
def class_length(length, residue, dilation):
    """Tokens of a residue class among `length`."""
    return tl.maximum(length - residue + dilation - 1, 0) // dilation


@triton.jit
def rows_of_program(tile, dilation, T, S, query_start, BLOCK: tl.constexpr):
    """(residue, first row, num_rows, shift, first_key, num_keys) of a tile of rows; to skip as `tile_of_class` says."""
    residue, first_row = tile_of_class(tile, T, dilation, BLOCK)
    shift = (query_start + residue) // dilation
    first_key = (query_start + residue) % dilation
    return (
        residue,
        first_row,
        class_length(T, residue, dilation),
        shift,
        first_key,
        class_length(S, first_key, dilation),
    )


@triton.jit
def split_tiles(first, last, full_first, full_last, BLOCK: tl.constexpr):
    """(num_tiles, begin, end): tiles that cover [first, last) from `first` on; those in [begin, end) lie wholly inside
    [full_first, full_last), where every pair is seen.
    """
    num_tiles = tl.cdiv(tl.maximum(last - first, 0), BLOCK)
    begin = tl.minimum(tl.cdiv(tl.maximum(full_first - first, 0), BLOCK), num_tiles)
    end = tl.maximum(begin, tl.minimum(tl.maximum(full_last - first, 0) // BLOCK, num_tiles))
    return num_tiles, begin, end


@triton.jit
def key_tiles(first_step, last_step, left, right, num_keys, BLOCK: tl.constexpr):
    """(first key, num_tiles, begin, end) for the rows at key steps first_step to last_step, both included."""
    first = tl.maximum(first_step - left, 0)
    last = tl.minimum(last_step + right + 1, num_keys)
    num_tiles, begin, end = split_tiles(
        first, last, last_step - left, tl.minimum(first_step + right + 1, num_keys), BLOCK
    )
    return first, num_tiles, begin, end


@triton.jit
def row_tiles(first_key, last_key, shift, left, right, num_rows, BLOCK: tl.constexpr):
    """(first row, num_tiles, begin, end) for the keys first_key to last_key, both included; row m is at shift + m."""
    first = tl.maximum(first_key - right - shift, 0)
    last = tl.minimum(last_key + left - shift + 1, num_rows)
    full_last = tl.minimum(first_key + left - shift + 1, num_rows)
    num_tiles, begin, end = split_tiles(first, last, last_key - right - shift, full_last, BLOCK)
    return first, num_tiles, begin, end


@triton.jit
def edge_tile(index, begin, end):
    """The tile that comes `index`-th when those in [begin, end) are left out."""
    return tl.where(index < begin, index, index + end - begin)


@triton.jit
def in_window(row_steps, key_steps, left, right):
    """Whether rows see keys, by the steps they stand at; the arguments broadcast against each other."""
    distance = key_steps - row_steps
    return (distance <= right) & (distance >= -left)


@triton.jit
def global_tile(
    start, count, positions, key_base, key_stride_t, key_stride_d, value_base, value_stride_t, value_stride_d,
    dims, dim_mask, MASK_DIMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(key, value [BLOCK, D], columns, real [BLOCK]) of global keys from slot `start` on, of `count` in `positions`."""
    slots = start + tl.arange(0, BLOCK)
    real = slots < count
    columns = tl.load(positions + slots, mask=real, other=0).to(tl.int32)
    key_tile = key_base + tile_offsets(columns, key_stride_t, dims, key_stride_d)
    value_tile = value_base + tile_offsets(columns, value_stride_t, dims, value_stride_d)
    key = load_tile(key_tile, real, dim_mask, True, MASK_DIMS)
    value = load_tile(value_tile, real, dim_mask, True, MASK_DIMS)
    return key, value, columns, real


@triton.jit
def global_seen(rows, row_steps, columns, real, left, right, first_key, dilation, CAUSAL: tl.constexpr):
    """Whether rows (positions and steps) see global keys at `columns`: those in a row's window are seen there already.

    The arguments broadcast against each other.
    """
    # a key of another class is put beyond every window, so that the tile of pairs needs one comparison
    steps = tl.where(columns % dilation == first_key, columns // dilation, -0x40000000)
    seen = real & (in_window(row_steps, steps, left, right) == 0)
    return seen & (columns <= rows) if CAUSAL else seen


def grid_tiles(dilation: tuple[int, ...], length: int, longest: int, block: int) -> int:
    """Tiles of the head that has most, for a grid over `length` tokens; `longest` as in `head_pattern`."""
    kept = (1 if step >= longest else step for step in set(dilation))
    return max(step * triton.cdiv(triton.cdiv(length, step), block) for step in kept)
