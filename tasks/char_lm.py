"""Character language modelling: bits per character by the protocol of Longformer (arXiv 2004.05150, appendix B)."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import groupby
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from data.baselines import baselines
from data.chars import load_chars
from data.sampler import CharBatches, max_seq_len

PROMPT_CHARS = 64


class CharLMTask:
    """text8, enwik8 or the standard library's sources, as bytes.

    Args:
        dataset: "text8", "enwik8" or "python_source".
        data: `path`, `cache_dir` and `workers` of the run's data node.
        sample_chars: length of the text a finished run writes.
    """

    name = "char_lm"
    metric = "bpc"

    def __init__(self, dataset: Literal["text8", "enwik8", "python_source"], *, data: Mapping, sample_chars: int = 300):
        if sample_chars < 0:
            raise ValueError(f"sample_chars is {sample_chars}, it must be at least 0")
        self.dataset = dataset
        self.sample_chars = sample_chars
        self.workers = data["workers"]
        self.corpus = load_chars(dataset, path=data["path"], cache_dir=data["cache_dir"])

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the parts of the data."""
        return tuple(self.corpus.splits)

    @property
    def fingerprint(self) -> dict:
        """What was read: digests, sizes, versions. A run goes on only with the same."""
        return {"dataset": self.dataset, **self.corpus.fingerprint}

    @property
    def vocab_size(self) -> int:
        """Symbols a model must know."""
        return self.corpus.vocab_size

    @property
    def max_seq_len(self) -> int:
        """The longest training sequence the data can give."""
        return max_seq_len(self.corpus.splits["train"])

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
    ) -> Iterable[torch.Tensor]:
        """Endless int64 [batch_size / world_size, seq_len + 1]; step s gives the same rows whatever came before."""
        return CharBatches(
            self.corpus.splits[split],
            seq_len=seq_len,
            batch_size=batch_size,
            seed=seed,
            start_step=start_step,
            rank=rank,
            world_size=world_size,
            workers=self.workers,
        )

    def loss(self, model: nn.Module, batch: torch.Tensor) -> tuple[torch.Tensor, int, dict[str, torch.Tensor]]:
        """batch [B, T + 1] -> (summed nats, number of characters, {"bpc": summed bits}); divide sums by the number."""
        logits = model(batch[:, :-1])
        targets = batch[:, 1:]
        nats = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum")
        return nats, targets.numel(), {"bpc": nats.detach() / math.log(2)}

    @torch.no_grad()
    def evaluate(
        self,
        model: Any,
        split: str,
        *,
        context: int = 32_256,
        stride: int = 512,
        share: float = 1.0,
        batch_tokens: int = 65_536,
        rank: int = 0,
        world_size: int = 1,
        reduce: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> dict:
        """Bits per character of the first `share` of a split, each character after as much context as the paper gives.

        `model` has a `receptive_field`, by which windows are cut where they are longer (see `scoring_spans`).
        `reduce` sums a tensor over processes, which share the windows by `rank`; `progress(done, total)` counts
        characters of this process.
        """
        text = self.corpus.splits[split]
        num_targets = max(1, int(share * (len(text) - 1)))
        reach = model.receptive_field
        spans = scoring_spans(num_targets, context=context, stride=stride, receptive_field=reach)
        batches = [batch for batch in span_batches(spans, batch_tokens)][rank::world_size]
        device = next(model.parameters()).device
        total = torch.zeros(2, dtype=torch.float64)
        mine = sum(end - start for batch in batches for _, start, end in batch)
        was_training = model.training
        model.eval()
        for batch in batches:
            begin, start, end = batch[0]
            rows = np.stack([text[first : last + 1] for first, _, last in batch]).astype(np.int64)
            rows = torch.from_numpy(rows).to(device)
            logits = model(rows[:, :-1])[:, start - begin :]
            nats = F.cross_entropy(
                logits.float().flatten(0, 1), rows[:, 1 + start - begin :].flatten(), reduction="none"
            )
            total += torch.tensor([nats.double().sum().item(), nats.numel()], dtype=torch.float64)
            progress(int(total[1]), mine)
        model.train(was_training)
        nats, count = reduce(total.to(device)).tolist()
        return {
            "bpc": nats / count / math.log(2),
            "loss": nats / count,
            "num_characters": int(count),
            "share": share,
            "context": context,
            "stride": stride,
            "receptive_field": reach,
            "window_cut_to": min(context, reach + stride),
        }

    def baselines(self, split: str, share: float) -> dict:
        """Bits per character of compressors and Markov models that have seen the training split, on the same part."""
        text = self.corpus.splits[split]
        return baselines(self.corpus.splits["train"], text[: max(1, int(share * (len(text) - 1))) + 1])

    @torch.no_grad()
    def sample(self, model: Any, *, temperature: float = 0.8, seed: int = 0) -> str:
        """The first characters of the validation split, continued by the model."""
        prompt = self.corpus.splits["valid"][:PROMPT_CHARS]
        device = next(model.parameters()).device
        ids = torch.from_numpy(prompt.astype(np.int64)).to(device)
        generator = torch.Generator().manual_seed(seed)
        was_training = model.training
        model.eval()
        for _ in range(self.sample_chars):
            seen = ids[-(model.receptive_field + 1) :]
            probabilities = torch.softmax(model(seen[None])[0, -1].float().cpu() / temperature, dim=-1)
            ids = torch.cat([ids, torch.multinomial(probabilities, 1, generator=generator).to(device)])
        model.train(was_training)
        return bytes(ids.tolist()).decode("utf-8", errors="replace")


def scoring_spans(num_targets: int, *, context: int, stride: int, receptive_field: int) -> list[tuple[int, int, int]]:
    """(begin, start, end): positions begin..end - 1 are read, start..end - 1 scored; together each position once.

    The paper's windows are `context` long and `stride` apart and their last `stride` positions count; the first
    window counts whole, and what is left at the end is scored by one more window. A model that looks back
    `receptive_field` characters gives the same logits from a window cut to that many before the scored ones.
    """
    if stride > context:
        raise ValueError(f"a stride of {stride} leaves gaps between windows with a context of {context}")
    if receptive_field <= context - stride:
        starts = range(0, num_targets, stride)
        return [(max(0, start - receptive_field), start, min(start + stride, num_targets)) for start in starts]
    spans = [(0, 0, min(context, num_targets))]
    for start in range(context, num_targets, stride):
        end = min(start + stride, num_targets)
        spans.append((end - context, start, end))
    return spans


def span_batches(spans: list[tuple[int, int, int]], batch_tokens: int) -> Iterator[list[tuple[int, int, int]]]:
    """Neighbouring spans of one shape, as many as fit in `batch_tokens` positions, at least one."""
    for (length, _), group in groupby(spans, key=lambda span: (span[2] - span[0], span[1] - span[0])):
        group = list(group)
        size = max(1, batch_tokens // length)
        for first in range(0, len(group), size):
            yield group[first : first + size]
