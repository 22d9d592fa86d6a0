"""Masked-language-model pretraining: bits per masked token, as Longformer's and BigBird's papers report it."""

import math
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from data.errors import DataError
from data.masking import IGNORED, MaskedBatch, Masking
from data.rows import TokenRows
from data.sentence_order import SentenceOrderRows
from data.tokens import TokenCorpus, load_tokens
from models.tokenizer import MASK, Tokenizer, load_tokenizer
from tasks.prediction import fill_masks, masked_ids

EVALUATION_SEED = 0  # what is masked in a split is the same for every model
SAMPLE_TOKENS, SAMPLE_EVERY = 40, 8  # of the text a finished run fills, and which of its tokens are hidden


class MaskedLMTask:
    """Hidden tokens of a corpus told from those around them.

    Args:
        tokenizer: a folder or hub name with the tokenizer of the model, such as the one its weights come from.
        data: `path`, `cache_dir` and `workers` of the run's data node; path as `data.documents.read_documents` has it.
        rate: share of the tokens that is hidden (80 % masked, 10 % replaced, 10 % left as they are).
        whole_words: hide words, not tokens.
        join: join documents to full rows; else each is a row, cut to that length, in batches of like length.
        order: rows are two segments of one document, swapped in half of them, and the model tells that too (sentence
            order; it needs the head "pretraining").
        holdout: share of the documents that is the validation split, and as many the test split.
    """

    name = "masked_lm"
    metric = "bits_per_token"
    settings = ("context", "batch_tokens")  # of the run's `eval` node, for `evaluate`

    def __init__(
        self,
        tokenizer: str,
        *,
        data: Mapping,
        rate: float = 0.15,
        whole_words: bool = False,
        join: bool = True,
        order: bool = False,
        holdout: float = 0.02,
    ):
        if not 0 < rate < 1:
            raise ValueError(f"rate is {rate}, it must be above 0 and below 1")
        if not 0 < holdout < 0.5:
            raise ValueError(f"holdout is {holdout}, it must be above 0 and below 0.5")
        self.folder = Path(tokenizer).expanduser()
        if order and not join:
            raise ValueError("order has rows of its own: leave join true")
        self.rate, self.whole_words, self.join, self.order, self.holdout = rate, whole_words, join, order, holdout
        self.data = data
        self.head = "pretraining" if order else "masked_lm"

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """What makes ids of text, read when first asked for."""
        return load_tokenizer(self.folder)

    @cached_property
    def corpus(self) -> TokenCorpus:
        """The splits as ids, encoded on first use."""
        if self.data["path"] is None:
            raise DataError("data.path is missing: name a folder, a .txt or .jsonl file, or an archive of them")
        return load_tokens(
            self.data["path"],
            encode=self.tokenizer.encode,
            vocab_size=self.tokenizer.vocab_size,
            tokenizer_digest=self.tokenizer.digest,
            cache_dir=self.data["cache_dir"],
            holdout=self.holdout,
        )

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the parts of the data."""
        return tuple(self.corpus.splits)

    @property
    def fingerprint(self) -> dict:
        """What was read: digests, sizes, versions. A run goes on only with the same."""
        return dict(self.corpus.fingerprint)

    @property
    def vocab_size(self) -> int:
        """Symbols a model must know."""
        return self.tokenizer.vocab_size

    @property
    def min_seq_len(self) -> int:
        """The shortest row: a token and the two that frame it, or two segments and three."""
        return 5 if self.order else 3

    @property
    def max_seq_len(self) -> int:
        """The longest training sequence the data can give."""
        return self._longest("train")

    @property
    def max_context(self) -> int:
        """The longest rows that a split can be scored in."""
        return min(self._longest(split) for split in self.splits)

    def _longest(self, split) -> int:
        documents = self.corpus.splits[split]
        return documents.num_tokens + documents.num_documents + 1  # separators between them, and a frame around all

    @cached_property
    def masking(self) -> Masking:
        """What is hidden, and by what."""
        tokenizer = self.tokenizer
        return Masking(
            mask_id=tokenizer.mask_id,
            pad_id=tokenizer.pad_id,
            vocab_size=tokenizer.vocab_size,
            special_ids=tuple(tokenizer.special_ids),
            rate=self.rate,
            word_start=tokenizer.word_starts() if self.whole_words else None,
        )

    def batches(
        self,
        split: str,
        *,
        seq_len: int,
        batch_size: int,
        seed: int,
        start_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> Iterable[MaskedBatch]:
        """Endless batches of [batch_size / world_size, seq_len]; step s gives the same ones whatever came before."""
        return self._rows(
            split,
            seq_len=seq_len,
            batch_size=batch_size,
            seed=seed,
            start_step=start_step,
            rank=rank,
            world_size=world_size,
            workers=self.data["workers"],
        )

    def _rows(self, split, **options) -> Any:
        options |= {"cls_id": self.tokenizer.cls_id, "sep_id": self.tokenizer.sep_id, "masking": self.masking}
        if self.order:
            return SentenceOrderRows(self.corpus.splits[split], **options)
        return TokenRows(self.corpus.splits[split], join=self.join, **options)

    def loss(self, model: nn.Module, batch: MaskedBatch) -> tuple[torch.Tensor, int, dict[str, torch.Tensor]]:
        """(summed nats, number of hidden tokens, sums to divide by that number).

        With `order` the loss of the segments' order is added, a mean over rows beside one over hidden tokens.
        """
        found = model(
            batch.input_ids, batch.valid, token_type_ids=batch.token_type_ids, logit_positions=batch.positions
        )
        logits, relationship = found if self.order else (found, None)
        nats = F.cross_entropy(
            logits.float().flatten(0, 1), batch.targets.flatten(), reduction="sum", ignore_index=IGNORED
        )
        correct = (logits.argmax(dim=-1) == batch.targets).sum()
        metrics = {"bits_per_token": nats.detach() / math.log(2), "accuracy": correct}
        if relationship is None:
            return nats, batch.num_targets, metrics
        if batch.order_labels is None:
            raise ValueError("the batch has no order_labels: the task was built with order=False")
        # a row has as many hidden tokens whatever its batch, so this weight makes of it a mean over rows
        weight = batch.positions.shape[1]
        order = F.cross_entropy(relationship.float(), batch.order_labels, reduction="sum") * weight
        right = (relationship.argmax(dim=-1) == batch.order_labels).sum() * weight
        return nats + order, batch.num_targets, {**metrics, "order_loss": order.detach(), "order_accuracy": right}

    @torch.no_grad()
    def evaluate(
        self,
        model: Any,
        split: str,
        *,
        context: int = 512,
        share: float = 1.0,
        batch_tokens: int = 65_536,
        rank: int = 0,
        world_size: int = 1,
        reduce: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> dict:
        """Bits per hidden token of the first `share` of a split, in rows of `context` tokens, the same for every model.

        Up to `batch_tokens` tokens are read at a time. `reduce` sums a tensor over processes, which share the rows by
        `rank`; `progress(done, total)` counts rows of this process.
        """
        device = next(model.parameters()).device
        rows = self._rows(split, seq_len=context, batch_size=1, seed=EVALUATION_SEED, shuffle=False)
        num_rows = max(1, int(share * rows.num_rows))
        mine = range(rank, num_rows, world_size)
        size = max(1, batch_tokens // context)
        sums: dict[str, torch.Tensor] = {}
        num_targets = 0
        was_training = model.training
        model.eval()
        for first in range(0, len(mine), size):
            _, count, metrics = self.loss(model, rows.rows(mine[first : first + size]).to(device))
            num_targets += count
            for name, value in metrics.items():
                sums[name] = sums.get(name, 0.0) + value.double().cpu()
            progress(min(first + size, len(mine)), len(mine))
        model.train(was_training)
        names = ["bits_per_token", "accuracy", *(["order_loss", "order_accuracy"] if self.order else [])]
        totals = torch.tensor([num_targets, *(float(sums.get(name, 0.0)) for name in names)], dtype=torch.float64)
        count, *values = reduce(totals.to(device)).tolist()
        # each row counts with the weight that `loss` gives it
        weights = {name: num_rows * self.masking.num_positions(context) for name in names if name.startswith("order")}
        scores = {name: value / weights.get(name, count) for name, value in zip(names, values, strict=True)}
        scores = {"loss": scores["bits_per_token"] * math.log(2) + scores.get("order_loss", 0.0), **scores}
        return {**scores, "num_tokens": int(count), "num_rows": num_rows, "share": share, "context": context}

    def baselines(self, split: str, share: float) -> dict:
        """Bits per token of the training split's unigram frequencies, over all tokens of the same part."""
        train, text = (np.asarray(self.corpus.splits[name].tokens) for name in ("train", split))
        counts = np.bincount(train, minlength=self.vocab_size) + 1.0
        part = text[: max(1, int(share * len(text)))]
        return {"unigram": float(-np.log2(counts[part] / counts.sum()).mean())}

    def sample(self, model: Any) -> str:
        """The first tokens of the validation split, some of them hidden, and how the model fills them."""
        ids = np.asarray(self.corpus.splits["valid"].tokens[:SAMPLE_TOKENS]).tolist()
        shown = [self.tokenizer.mask_id if place % SAMPLE_EVERY == 4 else token for place, token in enumerate(ids)]
        text = self.tokenizer.decode(shown).replace(self.tokenizer.fast.mask_token, MASK)
        return f"{text}\n-> {self.answer(model, text)['filled']}"

    def check(self, model: Any, text: str) -> None:
        """The DataError that `answer` would raise of a text, without asking the model."""
        masked_ids(self.tokenizer, text, max_positions=model.max_positions)

    def answer(self, model: Any, text: str) -> dict[str, Any]:
        """What `predict.py` writes of one text: as `tasks.prediction.fill_masks`."""
        was_training = model.training
        model.eval()
        try:
            return fill_masks(model, self.tokenizer, text, max_positions=model.max_positions)
        finally:
            model.train(was_training)
