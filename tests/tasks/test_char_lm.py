"""The character task: what is scored with how much context, and that shortcuts give the same number."""

import math
from types import SimpleNamespace

import pytest
import torch

from data.errors import DataError
from models.char_lm import CharLM
from tasks.char_lm import PROMPT_CHARS, CharLMTask
from tasks.scoring import choose_protocol, scoring_spans, span_batches
from tests.models.tiny import tiny_model

PROTOCOLS = [
    pytest.param(1000, 64, 16, id="many_windows"),
    pytest.param(1003, 64, 16, id="a_rest"),
    pytest.param(65, 64, 16, id="one_more_than_a_window"),
    pytest.param(64, 64, 16, id="one_window"),
    pytest.param(40, 64, 16, id="less_than_a_window"),
    pytest.param(1, 64, 16, id="one_character"),
    pytest.param(100, 16, 16, id="stride_is_context"),
    pytest.param(50, 2, 1, id="stride_1"),
]
REACHES = pytest.mark.parametrize("reach", [0, 1, 15, 48, 49, 10_000])


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> CharLMTask:
    """A local text of 4,000 characters, so 200 to test on."""
    folder = tmp_path_factory.mktemp("text")
    generator = torch.Generator().manual_seed(0)
    words = ["the ", "cat ", "sat ", "on ", "a ", "mat. "]
    chosen = torch.randint(len(words), (2000,), generator=generator).tolist()
    (folder / "text.txt").write_text("".join(words[word] for word in chosen)[:4000])
    data = {"path": str(folder / "text.txt"), "cache_dir": str(folder / "cache"), "workers": 0}
    return CharLMTask("python_source", data=data, sample_chars=12)


def byte_model(**options) -> CharLM:
    return tiny_model(**{"vocab_size": 256, "num_layers": 2, **options})


@pytest.mark.parametrize("num_targets, context, stride", PROTOCOLS)
@REACHES
def test_every_position_is_scored_once_with_enough_context(num_targets, context, stride, reach):
    spans = scoring_spans(num_targets, context=context, stride=stride, receptive_field=reach)
    scored = [position for _, start, end in spans for position in range(start, end)]
    assert scored == list(range(num_targets))
    for begin, start, end in spans:
        assert 0 <= begin <= start < end
        assert end - begin <= context
        # the text before a scored position: all there is, all the model can see, or all the protocol grants
        assert start - begin >= min(start, reach, context - stride)


@pytest.mark.parametrize("num_targets, context, stride", PROTOCOLS)
def test_windows_are_the_papers_for_a_model_that_sees_far(num_targets, context, stride):
    spans = scoring_spans(num_targets, context=context, stride=stride, receptive_field=context)
    first, *others = spans
    assert first == (0, 0, min(context, num_targets)), "the first window is scored whole"
    for begin, start, end in others:
        assert end - begin == context, "every other window is full"
        assert end - start == stride or end == num_targets, "and its last characters count"


@pytest.mark.parametrize("num_targets, context, stride", PROTOCOLS)
def test_windows_are_cut_to_what_the_model_sees(num_targets, context, stride):
    spans = scoring_spans(num_targets, context=context, stride=stride, receptive_field=context - stride)
    assert all(end - begin <= context for begin, _, end in spans)
    cut = scoring_spans(num_targets, context=10_000, stride=stride, receptive_field=3)
    assert all(start - begin == min(3, start) for begin, start, _ in cut)


def test_a_stride_beyond_the_context_is_refused():
    """Characters between two windows would be scored by neither."""
    with pytest.raises(ValueError, match="stride .*16.* context .*8"):
        choose_protocol("windowed", context=8, stride=16, receptive_field=30)


@pytest.mark.parametrize("reach, expected", [(24, "streaming"), (25, "windowed")])
def test_auto_streams_where_that_is_the_same_number(reach, expected):
    assert choose_protocol("auto", context=32, stride=8, receptive_field=reach) == expected
    for protocol in ("streaming", "windowed", "uncut"):
        assert choose_protocol(protocol, context=32, stride=8, receptive_field=reach) == protocol


def test_an_unknown_protocol_is_refused():
    with pytest.raises(ValueError, match="protocol is 'stream', it must be one of auto, streaming, windowed, uncut"):
        choose_protocol("stream", context=32, stride=8, receptive_field=1)


@pytest.mark.parametrize("batch_tokens", [1, 100, 10**6])
@REACHES
def test_batches_hold_all_spans_in_order(batch_tokens, reach):
    spans = scoring_spans(1003, context=64, stride=16, receptive_field=reach)
    batches = list(span_batches(spans, batch_tokens))
    assert [span for batch in batches for span in batch] == spans
    for batch in batches:
        assert len({(end - begin, start - begin) for begin, start, end in batch}) == 1, "one shape a batch"
        tokens = sum(end - begin for begin, _, end in batch)
        assert tokens <= batch_tokens or len(batch) == 1
    if batch_tokens == 10**6:
        assert len(batches) <= 2 + 64 // 16, "alike neighbours go together"


def bits_by_the_protocol(model, text, num_targets, context, stride) -> float:
    """The paper's windows one by one, each character looked up by itself."""
    bits, ends = [], [min(context, num_targets)]
    while ends[-1] < num_targets:
        ends.append(min(ends[-1] + stride, num_targets))
    for previous, end in zip([0, *ends], ends, strict=False):
        begin = max(0, end - context)
        window = torch.tensor(text[begin:end].tolist())[None]
        logarithms = torch.log_softmax(model(window)[0], dim=-1)
        for position in range(previous, end):
            bits.append(-logarithms[position - begin, int(text[position + 1])].item() / math.log(2))
    assert len(bits) == num_targets
    return sum(bits) / num_targets


@torch.no_grad()
@pytest.mark.parametrize("positions", ["rotary", "relative"])
@pytest.mark.parametrize(
    "window, dilation, context, stride",
    [
        pytest.param(3, 1, 32, 8, id="reach_6_of_24"),
        pytest.param([2, [1, 2, 3, 2]], [1, [1, 4, 1, 1]], 32, 8, id="reach_10_dilated"),
        pytest.param(6, 2, 32, 8, id="reach_24_of_24"),
        pytest.param([6, 7], 2, 32, 8, id="reach_26_beyond_24"),
        pytest.param(60, 1, 32, 8, id="reach_120_beyond_context"),
        pytest.param(60, 1, 25, 7, id="uneven_windows"),
        pytest.param(4, 1, 500, 500, id="context_beyond_text"),
    ],
)
def test_bits_per_character_are_the_papers(task, positions, window, dilation, context, stride):
    """Cut or not, batched or not, streamed where the model sees no further: the protocol taken word by word."""
    model = byte_model(window=window, dilation=dilation, positions=positions)
    text = task.corpus.splits["test"]
    expected = bits_by_the_protocol(model.eval(), text, len(text) - 1, context, stride)
    settings = {"context": context, "stride": stride}
    same = ["auto", "windowed", "uncut"] + ["streaming"] * (model.receptive_field <= context - stride)
    for protocol in same:
        for batch_tokens in (7, 150, 10**6):
            result = task.evaluate(model, "test", **settings, protocol=protocol, batch_tokens=batch_tokens)
            assert result["bpc"] == pytest.approx(expected, rel=1e-12, abs=0), (protocol, batch_tokens)


@torch.no_grad()
def test_a_stream_gives_each_character_all_that_the_model_can_see(task):
    """Further back than the window's context, where the two protocols differ."""
    model = byte_model(window=60).eval()
    ids = torch.tensor(task.corpus.splits["test"].tolist())[None]
    nats = torch.nn.functional.cross_entropy(model(ids[:, :-1])[0], ids[0, 1:])
    for batch_tokens in (1, 64, 1000):
        settings = {"context": 32, "stride": 8, "batch_tokens": batch_tokens}
        streamed = task.evaluate(model, "test", **settings, protocol="streaming")
        assert streamed["loss"] == pytest.approx(nats.item(), rel=1e-12)
        assert streamed["protocol"] == "streaming"
        windowed = task.evaluate(model, "test", **settings)
        assert windowed["protocol"] == "windowed" and abs(windowed["loss"] - streamed["loss"]) > 1e-6


class Counting(torch.nn.Module):
    """A model that counts the characters it is given."""

    def __init__(self, model):
        super().__init__()
        self.model, self.read, self.longest = model, 0, 0
        self.new_cache, self.receptive_field = model.new_cache, model.receptive_field

    def forward(self, ids, **options):
        self.read += ids.numel()
        self.longest = max(self.longest, ids.numel())
        return self.model(ids, **options)


@pytest.mark.parametrize("batch_tokens", [1, 16, 1000])
def test_a_stream_reads_each_character_once(task, batch_tokens):
    model = Counting(byte_model(window=3, dtype=torch.float32))
    settings = {"context": 64, "stride": 4, "batch_tokens": batch_tokens}
    task.evaluate(model, "test", **settings)
    assert (model.read, model.longest) == (199, min(batch_tokens, 199))
    model.read = 0
    task.evaluate(model, "test", **settings, rank=1, world_size=2)
    assert model.read == 100 + 6, "its half, and what the model sees before it"
    model.read = 0
    task.evaluate(model, "test", **settings, protocol="uncut")
    assert model.read == 64 * (1 + -(-(199 - 64) // 4))


def test_the_result_says_how_it_was_taken(task):
    model = byte_model(window=3)
    result = task.evaluate(model, "test", context=32, stride=8, share=0.5)
    assert result == {
        "bpc": result["bpc"],
        "loss": pytest.approx(result["bpc"] * math.log(2)),
        "num_characters": 99,
        "share": 0.5,
        "context": 32,
        "stride": 8,
        "receptive_field": 6,
        "protocol": "streaming",
    }
    for protocol, cut in (("windowed", {"window_cut_to": 14}), ("uncut", {})):
        other = task.evaluate(model, "test", context=32, stride=8, share=0.5, protocol=protocol)
        scores = {"bpc": pytest.approx(result["bpc"], rel=1e-12), "loss": pytest.approx(result["loss"], rel=1e-12)}
        assert other == {**result, "protocol": protocol, **scores, **cut}
    wide = task.evaluate(byte_model(window=60), "test", context=32, stride=8)
    assert (wide["protocol"], wide["window_cut_to"]) == ("windowed", 32)


@pytest.mark.parametrize("share, count", [(1.0, 199), (0.5, 99), (0.0001, 1)])
def test_a_share_is_taken_from_the_start(task, share, count):
    model = byte_model()
    text = task.corpus.splits["test"]
    expected = bits_by_the_protocol(model.eval(), text, count, 32, 8)
    result = task.evaluate(model, "test", context=32, stride=8, share=share)
    assert result["num_characters"] == count
    assert result["bpc"] == pytest.approx(expected, rel=1e-12, abs=0)


@pytest.mark.parametrize("world_size", [2, 3, 210])
@pytest.mark.parametrize("protocol, pieces", [("streaming", 199), ("windowed", 10), ("uncut", 22)])
def test_processes_share_the_work(task, world_size, protocol, pieces):
    """Sums of all ranks are those of one process; a rank without work adds nothing."""
    model = byte_model()
    settings = {"context": 32, "stride": 8, "batch_tokens": 60, "protocol": protocol}
    alone = task.evaluate(model, "test", **settings)
    sums = []

    def note(total):
        sums.append(total.clone())
        return torch.ones_like(total)  # what the others add is not known here

    for rank in range(world_size):
        task.evaluate(model, "test", **settings, rank=rank, world_size=world_size, reduce=note)
    nats, count = torch.stack(sums).sum(dim=0).tolist()
    assert count == alone["num_characters"] == 199
    assert nats / count == pytest.approx(alone["loss"], rel=1e-12)
    assert sum(total[1] > 0 for total in sums) == min(world_size, pieces)

    reduced = task.evaluate(model, "test", **settings, rank=1, world_size=2, reduce=lambda _: sum(sums))
    assert reduced["bpc"] == pytest.approx(alone["bpc"], rel=1e-12)


@pytest.mark.parametrize("protocol", ["streaming", "windowed", "uncut"])
def test_progress_counts_this_process_to_its_end(task, protocol):
    calls = []
    settings = {"context": 32, "stride": 8, "batch_tokens": 60, "protocol": protocol}
    for rank in range(2):
        task.evaluate(
            byte_model(),
            "test",
            **settings,
            rank=rank,
            world_size=2,
            progress=lambda *call: calls.append(call),
        )
        done, totals = zip(*calls, strict=True)
        assert list(done) == sorted(set(done)) and len(set(totals)) == 1
        assert done[-1] == totals[-1]
        calls.clear()


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_is_without_dropout_and_leaves_the_mode(task, training):
    model = byte_model(dropout=0.5).train(training)
    settings = {"context": 32, "stride": 8, "share": 0.3}
    assert task.evaluate(model, "test", **settings) == task.evaluate(model, "test", **settings)
    task.sample(model)
    assert model.training == training
    assert all(module.training == training for module in model.modules())


def test_the_loss_is_a_sum_over_characters(task):
    model = byte_model()
    batch = next(iter(task.batches("train", seq_len=20, batch_size=3, seed=0)))
    assert batch.shape == (3, 21)
    nats, num_characters, sums = task.loss(model, batch)
    logarithms = torch.log_softmax(model(batch[:, :-1]), dim=-1)
    expected = -sum(logarithms[row, t, batch[row, t + 1]] for row in range(3) for t in range(20))
    assert num_characters == 60
    assert nats.item() == pytest.approx(expected.item(), rel=1e-5)
    assert sums["bpc"].item() == pytest.approx(expected.item() / math.log(2), rel=1e-5)
    assert nats.requires_grad and not sums["bpc"].requires_grad
    # parts of a batch add up to the whole
    parts = [task.loss(model, part)[0].item() for part in batch.split(1)]
    assert sum(parts) == pytest.approx(nats.item(), rel=1e-5)


def test_the_loss_of_bfloat16_logits_is_summed_in_float32(task):
    model = byte_model(dtype=torch.bfloat16, positions="rotary")
    nats, _, _ = task.loss(model, next(iter(task.batches("train", seq_len=20, batch_size=3, seed=0))))
    assert nats.dtype == torch.float32


def test_batches_are_shared_and_repeatable(task):
    options = {"seq_len": 20, "batch_size": 4, "seed": 5}
    whole = next(iter(task.batches("train", **options, start_step=3)))
    parts = [next(iter(task.batches("train", **options, start_step=3, rank=rank, world_size=2))) for rank in range(2)]
    assert torch.equal(torch.cat(parts), whole)


def test_a_sample_follows_from_its_seed(task):
    model = byte_model(vocab_size=128)
    sample = task.sample(model, seed=1)
    assert sample == task.sample(model, seed=1) != task.sample(model, seed=2)
    prompt = task.corpus.splits["valid"][:PROMPT_CHARS].tobytes().decode()
    assert sample.startswith(prompt)
    assert len(sample) == PROMPT_CHARS + 12


class Echo(torch.nn.Module):
    """Sure that the next character is the one `receptive_field` before the last; without that many, a NUL."""

    receptive_field = 5

    def __init__(self):
        super().__init__()
        self.certainty = torch.nn.Parameter(torch.tensor(100.0))

    def new_cache(self, batch_size):
        return SimpleNamespace(position=0, seen=torch.zeros(batch_size, self.receptive_field, dtype=torch.int64))

    def forward(self, ids, cache):
        earlier = torch.cat([cache.seen, ids], dim=1)
        cache.position, cache.seen = cache.position + ids.shape[1], earlier[:, -self.receptive_field :]
        return self.certainty * torch.nn.functional.one_hot(earlier[:, : ids.shape[1]], 256)


def test_a_sample_lets_the_model_see_as_far_as_it_can(task):
    sample = task.sample(Echo())
    assert len(sample) == PROMPT_CHARS + 12
    assert all(sample[i] == sample[i - 6] for i in range(PROMPT_CHARS, len(sample)))


def test_any_bytes_make_a_sample(task):
    assert task.sample(byte_model(), temperature=5.0)


def test_a_text_is_continued_byte_by_byte(task):
    model, pieces = byte_model().train(), []
    settings = {"length": 20, "temperature": 0.9, "top_k": 9, "top_p": 0.9, "seed": 3}
    text = task.continue_text(model, b"the cat", **settings, show=pieces.append)
    assert len(text) == len(pieces) == 20 and b"".join(pieces) == text
    assert model.training
    longer = task.continue_text(model, b"xyz" * 50 + b"the cat sat on", **settings)
    assert longer == task.continue_text(model, b"the cat sat on", **settings), "the model sees 8 characters back"
    assert task.continue_text(model, b"the cat", length=0) == b""


def test_a_prompt_for_text8_is_brought_to_its_symbols(tmp_path):
    data = {"path": None, "cache_dir": str(tmp_path), "workers": 0}
    plain, changed = CharLMTask("text8", data=data), "capitals and white space were changed to what text8 has"
    assert plain.prepare_prompt(b"the cat ") == (b"the cat ", "")
    prompt, note = plain.prepare_prompt(b"The\tCat\n sat\r\n")
    assert prompt == b"the cat sat " and note.startswith(changed)
    for text, symbol in ((b"In 1999", "'1'"), ("Käse".encode(), "'ä'"), (b"a, b", "','")):
        with pytest.raises(DataError, match=f"knows a-z and space alone, the text has {symbol}: spell digits out"):
            plain.prepare_prompt(text)
    assert CharLMTask("enwik8", data=data).prepare_prompt(b"In 1999,\n") == (b"In 1999,\n", "")
    assert list(tmp_path.iterdir()) == [], "nothing is downloaded for it"


def test_what_the_task_says_of_its_data(task):
    assert task.splits == ("train", "valid", "test")
    assert task.fingerprint["dataset"] == "python_source"
    assert task.fingerprint["bytes"] == 4000
    assert task.max_seq_len == 3599
    assert (task.name, task.metric) == ("char_lm", "bpc")


def test_baselines_are_scored_on_the_same_part(task):
    whole, half = task.baselines("test", 1.0), task.baselines("test", 0.5)
    assert {"gzip", "bzip2", "xz", "markov_0", "markov_3"} <= whole.keys() == half.keys()
    assert whole["markov_1"] < whole["markov_0"] < 8
    assert whole["markov_1"] != half["markov_1"]
