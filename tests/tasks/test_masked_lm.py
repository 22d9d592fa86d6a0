"""The masked-LM task: what counts as bits per token, the same rows for every model, masks filled in a text."""

import math

import pytest
import torch
import torch.nn.functional as F

from data.errors import DataError
from data.masking import IGNORED
from models.published import PublishedModel
from tasks.masked_lm import MaskedLMTask
from tests.corpus import write_corpus, write_tokenizer

CONTEXT = 24


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("masked")
    return {
        "tokenizer": str(write_tokenizer(folder)),
        "path": str(write_corpus(folder)),
        "cache": str(folder / "cache"),
    }


def task_of(folders, **options) -> MaskedLMTask:
    data = {"path": folders["path"], "cache_dir": folders["cache"], "workers": 0}
    return MaskedLMTask(folders["tokenizer"], data=data, holdout=0.1, **options)


def model_of(kind="longformer", head="masked_lm", **entries) -> PublishedModel:
    config = {
        "model_type": kind, "vocab_size": 330, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 24, "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1,
        "max_position_embeddings": 66, "type_vocab_size": 2, "layer_norm_eps": 1e-5, "pad_token_id": 1,
        "attention_window": 8, "segment_means_seq_len": 32, "num_landmarks": 4, "conv_kernel_size": 5, **entries,
    }  # fmt: skip
    torch.manual_seed(0)
    return PublishedModel(config=config, head=head)


def test_loss_is_that_of_the_hidden_tokens_alone(folders):
    task, model = task_of(folders), model_of().eval()
    batch = next(iter(task.batches("train", seq_len=CONTEXT, batch_size=3, seed=1)))
    loss, count, metrics = task.loss(model, batch)
    logits = model(batch.input_ids, batch.valid)  # [B, T, V]
    nats = right = number = 0
    for row in range(3):
        for position, target in zip(batch.positions[row].tolist(), batch.targets[row].tolist(), strict=True):
            if target != IGNORED:
                nats += F.cross_entropy(logits[row, position], torch.tensor(target)).item()
                right += int(logits[row, position].argmax() == target)
                number += 1
    assert count == number == batch.num_targets
    assert loss.item() == pytest.approx(nats, rel=1e-5)
    assert metrics["bits_per_token"].item() == pytest.approx(nats / math.log(2), rel=1e-5)
    assert metrics["accuracy"].item() == right


def test_order_of_segments_has_the_weight_of_a_mean(folders):
    task, model = task_of(folders, order=True), model_of("nystromformer", "pretraining").eval()
    batch = next(iter(task.batches("train", seq_len=CONTEXT, batch_size=4, seed=1)))
    assert batch.order_labels is not None and task.head == "pretraining"
    loss, count, metrics = task.loss(model, batch)
    logits, order = model(
        batch.input_ids, batch.valid, token_type_ids=batch.token_type_ids, logit_positions=batch.positions
    )
    mlm = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORED)
    # a row weighs as much as the tokens that a full one hides
    full = batch.positions.numel() / count
    expected = mlm + full * F.cross_entropy(order, batch.order_labels)
    assert 1 <= full < 1.6 and loss.item() / count == pytest.approx(expected.item(), rel=1e-5)
    share = (order.argmax(dim=-1) == batch.order_labels).double().mean().item()
    assert metrics["order_accuracy"].item() / count == pytest.approx(share * full)
    parts = [task.loss(model, part)[0].item() for part in batch.split(1)]
    assert sum(parts) == pytest.approx(loss.item(), rel=1e-5)


ORDERS = pytest.mark.parametrize("order", [False, True], ids=["words", "words_and_order"])


def pair_of(folders, order):
    if order:
        return task_of(folders, order=True), model_of("nystromformer", "pretraining")
    return task_of(folders), model_of()


@ORDERS
@pytest.mark.parametrize("batch_tokens", [1, 70, 10_000])
def test_score_depends_on_neither_batches_nor_mode(folders, batch_tokens, order):
    task, model = pair_of(folders, order)
    model.train()
    whole = task.evaluate(model, "test", context=CONTEXT)
    scores = task.evaluate(model, "test", context=CONTEXT, batch_tokens=batch_tokens)
    assert model.training
    assert scores.keys() == whole.keys() and scores["num_tokens"] == whole["num_tokens"] > 0
    assert all(scores[name] == pytest.approx(whole[name], rel=1e-5) for name in whole)
    assert whole["loss"] == pytest.approx(whole["bits_per_token"] * math.log(2) + whole.get("order_loss", 0.0))


def test_order_is_scored_by_rows(folders):
    task, model = pair_of(folders, True)
    model.eval()
    scores = task.evaluate(model, "test", context=CONTEXT)
    rows = task._rows("test", seq_len=CONTEXT, batch_size=1, seed=0, shuffle=False)
    right = 0
    for number in range(scores["num_rows"]):
        batch = rows.rows([number])
        _, order = model(batch.input_ids, batch.valid, token_type_ids=batch.token_type_ids)
        right += int(order.argmax() == batch.order_labels)
    assert scores["order_accuracy"] == pytest.approx(right / scores["num_rows"])


@ORDERS
def test_processes_share_the_score(folders, order):
    task, model = pair_of(folders, order)
    totals = []
    for rank in range(3):
        # what every process hands in; the sum of all is what each gets back
        task.evaluate(model, "test", context=CONTEXT, rank=rank, world_size=3,
                      reduce=lambda tensor: totals.append(tensor.clone()) or tensor)  # fmt: skip
    whole = task.evaluate(model, "test", context=CONTEXT, reduce=lambda tensor: totals.append(tensor) or tensor)
    assert torch.allclose(sum(totals[:3]), totals[3], rtol=1e-6) and totals[3][0] == whole["num_tokens"]


def test_part_of_a_split_is_its_first_rows(folders):
    task, model = task_of(folders), model_of()
    whole = task.evaluate(model, "train", context=CONTEXT)
    part = task.evaluate(model, "train", context=CONTEXT, share=0.3)
    assert part["num_rows"] == int(0.3 * whole["num_rows"]) and part["share"] == 0.3
    rows = task._rows("train", seq_len=CONTEXT, batch_size=1, seed=0, shuffle=False)
    batch = rows.rows([0])
    shown = batch.input_ids.scatter(1, batch.positions, batch.targets)[0, 1:-1].tolist()
    assert shown == task.corpus.splits["train"].tokens[: CONTEXT - 2].tolist()


def test_documents_one_a_row(folders):
    task, model = task_of(folders, join=False), model_of(max_position_embeddings=402)
    batch = next(iter(task.batches("train", seq_len=400, batch_size=4, seed=0)))
    lengths = batch.valid.sum(dim=1)
    assert batch.input_ids.shape[1] == lengths.max() and len(set(lengths.tolist())) > 1
    assert (batch.input_ids[:, 0] == task.tokenizer.cls_id).all()
    loss, count, _ = task.loss(model, batch)
    assert count == batch.num_targets > 0 and loss.isfinite()
    assert task.evaluate(model, "test", context=400)["num_rows"] == task.corpus.splits["test"].num_documents
    with pytest.raises(ValueError, match="order has rows of its own"):
        task_of(folders, join=False, order=True)


def test_longest_rows_of_the_data(folders):
    task = task_of(folders)
    longest = task.max_seq_len
    next(iter(task.batches("train", seq_len=longest, batch_size=1, seed=0)))
    with pytest.raises(DataError):
        task.batches("train", seq_len=longest + 1, batch_size=1, seed=0)
    assert task.max_context <= longest


def test_whole_words_are_hidden_together(folders):
    task = task_of(folders, whole_words=True)
    starts = task.tokenizer.word_starts()
    batch = next(iter(task.batches("train", seq_len=60, batch_size=8, seed=0)))
    # where a hidden token goes on a word, the one before it is hidden, too
    for row in range(8):
        hidden = set(batch.positions[row][batch.targets[row] != IGNORED].tolist())
        targets = dict(zip(batch.positions[row].tolist(), batch.targets[row].tolist(), strict=True))
        for position in hidden:
            before = int(batch.input_ids[row, position - 1])
            if not starts[targets[position]] and before not in task.tokenizer.special_ids:
                assert position - 1 in hidden


def test_baseline_is_the_entropy_of_single_tokens(folders):
    task = task_of(folders)
    train, test = (task.corpus.splits[name].tokens.tolist() for name in ("train", "test"))
    bits = [-math.log2((train.count(token) + 1) / (len(train) + task.vocab_size)) for token in test]
    assert task.baselines("test", 1.0)["unigram"] == pytest.approx(sum(bits) / len(bits))
    half = bits[: len(bits) // 2]
    assert task.baselines("test", 0.5)["unigram"] == pytest.approx(sum(half) / len(half))


def test_masks_are_filled_with_words(folders):
    task, model = task_of(folders), model_of()
    found = task.answer(model, "Paris is the <mask> of <mask>.")
    assert len(found["masks"]) == 2 and all(len(candidates) == 5 for candidates in found["masks"])
    for candidates in found["masks"]:
        shares = [candidate["probability"] for candidate in candidates]
        assert shares == sorted(shares, reverse=True) and 0 < sum(shares) <= 1
    assert found["filled"].startswith("Paris is the") and "<mask>" not in found["filled"]
    special = set(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    assert not special & {candidate["token"] for candidates in found["masks"] for candidate in candidates}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Paris.", "there is nothing to fill: the text has no <mask>"),
        ("Paris <mask> " * 50, "tokens, the position table"),
    ],
)
def test_texts_that_cannot_be_filled(folders, text, message):
    with pytest.raises(DataError, match=message):
        task_of(folders).answer(model_of(), text)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"rate": 0.0}, "rate is 0.0"), ({"rate": 1.0}, "rate is 1.0"), ({"holdout": 0.5}, "holdout is 0.5")],
)
def test_impossible_options(folders, options, message):
    with pytest.raises(ValueError, match=message):
        MaskedLMTask(folders["tokenizer"], data={"path": None}, **options)


def test_a_corpus_must_be_named(folders):
    task = MaskedLMTask(folders["tokenizer"], data={"path": None, "cache_dir": folders["cache"], "workers": 0})
    with pytest.raises(DataError, match="data.path is missing"):
        task.splits  # noqa: B018
