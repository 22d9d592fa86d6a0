"""Character language modelling: bits per character by the protocol of Longformer (arXiv 2004.05150, appendix B)."""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from data.baselines import baselines
from data.chars import CharCorpus, load_chars
from data.errors import DataError
from data.sampler import CharBatches, max_seq_len
from models.hf import generate
from tasks.scoring import choose_protocol, nats_by_stream, nats_by_window, scoring_spans, span_batches

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
    settings = ("protocol", "context", "stride", "batch_tokens")  # of the run's `eval` node, for `evaluate`

    def __init__(self, dataset: Literal["text8", "enwik8", "python_source"], *, data: Mapping, sample_chars: int = 300):
        if sample_chars < 0:
            raise ValueError(f"sample_chars is {sample_chars}, it must be at least 0")
        self.dataset = dataset
        self.sample_chars = sample_chars
        self.workers = data["workers"]
        self.data = data

    @cached_property
    def corpus(self) -> CharCorpus:
        """The text and its splits, read when first asked for: to continue a text takes none of it."""
        return load_chars(self.dataset, path=self.data["path"], cache_dir=self.data["cache_dir"])

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
        protocol: str = "auto",
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

        `protocol`: "uncut" reads the paper's windows as they are, "windowed" cuts them to what the model can see where
        that changes nothing (see `scoring_spans`), "streaming" reads the text once with a rolling cache, each
        character after all that the model can see; "auto" streams where that is the same number, else "windowed".
        Up to `batch_tokens` characters are read at a time. `reduce` sums a tensor over processes, which share the work
        by `rank`; `progress(done, total)` counts characters of this process.
        """
        text = self.corpus.splits[split]
        num_targets = max(1, int(share * (len(text) - 1)))
        reach = model.receptive_field
        protocol = choose_protocol(protocol, context=context, stride=stride, receptive_field=reach)
        if protocol == "streaming":
            start, end = (num_targets * part // world_size for part in (rank, rank + 1))
            mine = end - start
            pieces = nats_by_stream(model, text, start, end, piece=batch_tokens) if mine else ()
        else:
            visible = context if protocol == "uncut" else reach
            spans = scoring_spans(num_targets, context=context, stride=stride, receptive_field=visible)
            batches = list(span_batches(spans, batch_tokens))[rank::world_size]
            mine = sum(end - start for batch in batches for _, start, end in batch)
            pieces = nats_by_window(model, text, batches)
        total = torch.zeros(2, dtype=torch.float64)
        was_training = model.training
        model.eval()
        for nats in pieces:
            total += torch.tensor([nats.double().sum().item(), nats.numel()], dtype=torch.float64)
            progress(int(total[1]), mine)
        model.train(was_training)
        nats, count = reduce(total.to(next(model.parameters()).device)).tolist()
        scores = {
            "bpc": nats / count / math.log(2),
            "loss": nats / count,
            "num_characters": int(count),
            "share": share,
            "protocol": protocol,
            "context": context,
            "stride": stride,
            "receptive_field": reach,
        }
        return scores | ({"window_cut_to": min(context, reach + stride)} if protocol == "windowed" else {})

    def baselines(self, split: str, share: float) -> dict:
        """Bits per character of compressors and Markov models that have seen the training split, on the same part."""
        text = self.corpus.splits[split]
        return baselines(self.corpus.splits["train"], text[: max(1, int(share * (len(text) - 1))) + 1])

    def sample(self, model: Any, *, temperature: float = 0.8, seed: int = 0) -> str:
        """The first characters of the validation split, continued by the model."""
        prompt = self.corpus.splits["valid"][:PROMPT_CHARS].tobytes()
        text = self.continue_text(model, prompt, length=self.sample_chars, temperature=temperature, seed=seed)
        return (prompt + text).decode("utf-8", errors="replace")

    def prepare_prompt(self, text: bytes) -> tuple[bytes, str]:
        """What the model can go on from, and a sentence about what was changed, or "".

        text8 holds a-z and single spaces: capitals become small, white space a space. DataError names what is left.
        """
        if self.dataset != "text8":
            return text, ""
        prompt = re.sub(rb"\s+", b" ", text.lower())
        foreign = re.search(rb"[^a-z ]", prompt)
        if foreign:
            symbol = prompt[foreign.start() :].decode("utf-8", "replace")[0]
            raise DataError(
                f"this model knows a-z and space alone, the text has {symbol!r}: spell digits out, and leave "
                "punctuation and other letters away"
            )
        return (
            prompt,
            "" if prompt == text else "capitals and white space were changed to what text8 has, a-z and space",
        )

    def continue_text(
        self,
        model: Any,
        prompt: bytes,
        *,
        length: int,
        temperature: float = 0.8,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        show: Callable[[bytes], None] = lambda piece: None,
    ) -> bytes:
        """The next `length` bytes after `prompt`, which holds at least one; `show` gets each as it comes.

        `temperature`, `top_k`, `top_p`, `seed`: as in `models.hf.generate`.
        """
        if not length:
            return b""
        # what the model cannot see need not be read
        ids = torch.tensor(list(prompt[-model.receptive_field - 1 :]))
        was_training = model.training
        model.eval()
        try:
            found = generate(
                model,
                ids,
                length=length,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                seed=seed,
                num_symbols=256,  # a model may have room for more than bytes
                show=lambda token: show(bytes([token])),
            )
        finally:
            model.train(was_training)
        return bytes(found.tolist())
