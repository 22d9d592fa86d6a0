"""The GPU rows of block-sparse attention, run on a CPU: block lists, references, rows, cases and targets."""

from dataclasses import replace

import pytest
import torch

from benchmarks import flex, gpu, gpu_block_sparse, peers
from benchmarks.cases import BIGBIRD, BOTH, DENSE, FLEX, FORWARD, OURS
from benchmarks.gpu_block_sparse import (
    BLOCKS,
    EVERYTHING,
    HF_TRAIN,
    PUBLISHED,
    TILES,
    UNIFORM,
    BlockCase,
    BlockProblem,
    flex_maker,
)
from benchmarks.gpu_case import FLEX_BEST, MODULE
from benchmarks.gpu_cases import CASES, chosen
from benchmarks.roofline import Ceilings, Work
from benchmarks.timing import interleave
from kernels.block_sparse_attention import BlockPattern, block_sparse_attention

SMALL = BlockCase("small", "a test", (FLEX, DENSE), seq_len=208, head_dim=16, block_size=16, num_heads=2,
                  num_kv_heads=2, dtype="float32")  # fmt: skip


def session(**options):
    def clock(calls, rounds):
        return interleave(calls, num_rounds=rounds, device="cpu", num_warmup=0)

    return gpu.Session("cpu", Ceilings({"float32": 1e12, "bfloat16": 1e12}, 1e12), clock, 3, **options)


def measured(case, on):
    return {(row.contender, row.passes): row for row in gpu.measure(case, on)}


def by_lists(mask, *, grouped=False, options=None, mode=None):
    """What compiled FlexAttention makes of the lists of a BlockMask: uncompiled it looks at the mask function alone."""
    size = mask.BLOCK_SIZE[0]
    seen = mask.to_dense()[0].bool().repeat_interleave(size, 1).repeat_interleave(size, 2)
    if mask.mask_mod.__name__ == "lookup":
        heads, rows = torch.arange(len(seen))[:, None, None], torch.arange(seen.shape[1])
        seen = seen & mask.mask_mod(None, heads, rows[:, None], rows)

    def attend(query, key, value):
        parts = (tensor.transpose(1, 2) for tensor in (query, key, value))
        return torch.nn.functional.scaled_dot_product_attention(*parts, attn_mask=seen).transpose(1, 2)

    return attend


@pytest.fixture(autouse=True)
def peers_of_a_cpu(monkeypatch):
    monkeypatch.setattr(flex, "attention", by_lists)
    everything = BlockPattern.from_function(lambda row, column: True, 4096, 16, 2)
    monkeypatch.setattr(peers, "dense_flash", lambda *given: lambda *qkv: block_sparse_attention(*qkv, everything))


@pytest.mark.parametrize("plan", [PUBLISHED, UNIFORM])
def test_rows_of_both_passes(plan):
    on = session()
    case = replace(SMALL, plan=plan)
    rows = measured(case, on)
    assert on.failures == []
    assert set(rows) == {(name, passes) for name in (OURS, FLEX, DENSE) for passes in (FORWARD, BOTH)}
    for (contender, _), row in rows.items():
        assert row.median_ms > 0 and row.note is None and row.table == BLOCKS and row.window is None
        assert row.roofline_share > 0 and (row.ratio is None) == (contender == OURS)
        assert row.reference_error is None if contender == DENSE else row.reference_error < 1e-5
    seconds = rows[OURS, FORWARD].median_ms * 1e-3
    assert rows[OURS, FORWARD].tflops == pytest.approx(4 * 16 * sum(case.pattern.num_pairs(208)) / seconds / 1e12)
    seconds = rows[DENSE, FORWARD].median_ms * 1e-3
    assert rows[DENSE, FORWARD].tflops == pytest.approx(4 * 16 * 2 * 208 * 208 / seconds / 1e12)


def test_a_wrong_pattern_is_noticed(monkeypatch):
    """One random block of one row of one head, in bfloat16's tolerance."""

    def wrong(*qkv, pattern, impl):
        counts = pattern.counts(13)
        # of the last rows, which are compared whatever the length
        row = 11
        counts[1, row, (counts[1, row] == 0).nonzero()[0]] = 1
        return block_sparse_attention(*qkv, BlockPattern.from_mask(counts, 16), impl=impl)

    monkeypatch.setattr(gpu_block_sparse, "block_sparse_attention", wrong)
    on = session()
    rows = measured(replace(SMALL, dtype="bfloat16", contenders=()), on)
    assert all(row.median_ms is None for row in rows.values())
    assert len(on.failures) == 2 and "from the float64 reference" in on.failures[0]


@pytest.mark.parametrize("seq_len", [208, 195, 16 * 64])
def test_reference_is_the_dense_oracle(seq_len):
    """With repeated blocks too: those of 64 blocks of 16 tokens, and what is not a whole number of blocks."""
    case = replace(SMALL, seq_len=seq_len, plan=HF_TRAIN if seq_len == 1024 else PUBLISHED)
    assert (case.pattern.counts(case.pattern.num_blocks) > 1).any() == (seq_len == 1024)
    problem = BlockProblem(case, "cpu")
    query, key, value = (tensor.double() for tensor in problem.inputs)
    expected = block_sparse_attention(query, key, value, case.pattern, impl="reference")
    for first, last in ((0, 32), (seq_len - 17, seq_len)):
        found = problem._reference(query, key, value, first, last)
        torch.testing.assert_close(found, expected[:, first:last], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("block_size", [16, 32, 64])
@pytest.mark.parametrize("plan", [PUBLISHED, UNIFORM])
def test_block_lists_are_the_pattern(plan, block_size):
    case = replace(SMALL, seq_len=16 * 20, plan=plan, num_heads=3)
    seen = case.pattern.counts(20) > 0
    mask = flex.pattern_mask(case.pattern, 320, "cpu", block_size)
    blocks = 320 // block_size
    inside = seen.view(3, blocks, 20 // blocks, blocks, 20 // blocks).sum((2, 4))
    full = inside == (block_size // 16) ** 2
    for name, expected in (("kv", (inside > 0) & ~full), ("full_kv", full)):
        counts, numbers = getattr(mask, f"{name}_num_blocks")[0], getattr(mask, f"{name}_indices")[0]
        assert torch.equal(counts, expected.sum(-1).int())
        for head, row in ((head, row) for head in range(3) for row in range(blocks)):
            assert numbers[head, row, : counts[head, row]].tolist() == expected[head, row].nonzero().flatten().tolist()
    rows = torch.arange(320)
    if block_size == 16:
        assert (full == (inside > 0)).all() and mask.mask_mod.__name__ == "noop_mask"
    else:
        tokens = mask.mask_mod(None, torch.arange(3)[:, None, None], rows[:, None], rows)
        assert torch.equal(tokens, seen.repeat_interleave(16, 1).repeat_interleave(16, 2))


def test_what_block_lists_cannot_say_is_a_row_with_the_reason():
    """At 1024 tokens in blocks of 64 the released plan draws the last block, which all rows see already."""
    case = replace(SMALL, seq_len=1024, block_size=64, contenders=(FLEX,))
    on = session()
    rows = measured(case, on)
    assert on.failures == [] and rows[OURS, BOTH].median_ms > 0
    assert "of 1024 tokens some rows count a block twice, which a BlockMask cannot" in rows[FLEX, BOTH].note
    with pytest.raises(ValueError, match="blocks of 64 do not divide 208 tokens in blocks of 16"):
        flex.pattern_mask(SMALL.pattern, 208, "cpu", 64)


def test_measured_cases_have_no_repeated_block():
    for case in CASES:
        if isinstance(case, BlockCase) and case.kind == BLOCKS and case.seq_len <= 16384:
            assert not (case.pattern.counts(case.pattern.num_blocks) > 1).any()
            assert not (case.quick().pattern.counts(12) > 1).any()


def test_best_options_are_looked_for_in_both_block_sizes(monkeypatch):
    tried = []

    def attention(mask, *, grouped=False, options=None, mode=None):
        tried.append((mask.BLOCK_SIZE[0], dict(options), mode))
        return by_lists(mask)

    monkeypatch.setattr(flex, "attention", attention)
    on = session()
    case = replace(SMALL, seq_len=1280, block_size=64, plan=UNIFORM, contenders=(FLEX_BEST,))
    rows = measured(case, on)
    assert on.failures == [] and rows[FLEX_BEST, BOTH].note.startswith("the fastest: ")
    assert (64, TILES, "max-autotune-no-cudagraphs") in tried and (128, {}, None) in tried
    assert all(set(TILES) <= set(options) for size, options, _ in tried if size == 64)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("block_size, options", [(64, TILES), (128, {})], ids=["its own blocks", "larger ones"])
def test_compiled_flex_attention_reads_the_lists(block_size, options, monkeypatch):
    """Forward on a CPU, where its kernel takes the same lists; there is no backward there."""
    monkeypatch.undo()
    case = replace(SMALL, seq_len=1024, block_size=64, plan=UNIFORM)
    problem = BlockProblem(case, "cpu")
    with flex.compile_settings(), torch.no_grad():
        found = flex_maker(case, "cpu")(block_size, options)(*problem.inputs)
    torch.testing.assert_close(found, block_sparse_attention(*problem.inputs, case.pattern, impl="reference"))


def test_modules_are_compared_with_each_other():
    case = replace(SMALL, kind=MODULE, contenders=(BIGBIRD,), plan=HF_TRAIN, seq_len=16 * 16)
    on = session()
    rows = measured(case, on)
    assert on.failures == []
    for passes in (FORWARD, BOTH):
        assert rows[BIGBIRD, passes].max_error < 1e-3 and rows[BIGBIRD, passes].ratio > 0
        assert rows[OURS, passes].roofline_share > 0 and rows[OURS, passes].table == MODULE


def test_work_counts_the_pairs():
    pattern = SMALL.pattern
    pairs = int(pattern.counts(13).sum()) * 16 * 16
    assert SMALL.work == Work.of(pairs, rows=2 * 208, keys=2 * 208, head_dim=16, item_bytes=4)
    assert replace(SMALL, plan=EVERYTHING).work.flops[FORWARD] == 4 * 2 * 208**2 * 16
    module = replace(SMALL, kind=MODULE).work
    assert module.flops[FORWARD] == SMALL.work.flops[FORWARD] + 3 * 2 * 208 * 32 * 32
    assert module.needed_bytes == {}


def test_cases_and_targets():
    cases = {case.name: case for case in CASES if isinstance(case, BlockCase)}
    kernels = [case for case in cases.values() if case.kind == BLOCKS]
    lengths = {4096, 16384, 65536}
    for plan in (PUBLISHED, UNIFORM):
        assert {case.seq_len for case in kernels if case.plan == plan and FLEX in case.contenders} == lengths
    assert {(case.block_size, case.num_random_blocks, case.head_dim, case.num_heads) for case in kernels} == {
        (64, 3, 64, 12)
    }
    assert [name for name, case in cases.items() if DENSE in case.contenders] == ["bigbird-16k", "bigbird-4k"]
    assert {name: case.target(FLEX, BOTH) for name, case in cases.items() if FLEX in case.contenders} == {
        "bigbird-4k": 1.3,
        "bigbird-16k": 2.0,
        "bigbird-64k": 2.0,
        "uniform-4k": 1.3,
        "uniform-16k": 1.3,
        "uniform-64k": 1.3,
    }
    assert cases["bigbird-16k"].target(FLEX, FORWARD) is None and cases["bigbird-16k"].target(DENSE, BOTH) is None
    module = cases["bigbird-module-4k"]
    assert module.plan == HF_TRAIN and module.target(BIGBIRD, FORWARD) == module.target(BIGBIRD, BOTH) == 10.0
    assert all(case.target(FLEX, BOTH) is None for case in (case.quick() for case in kernels))
    assert [case.name for case in chosen("bigbird-*")] == [name for name in cases if name.startswith("bigbird")]
