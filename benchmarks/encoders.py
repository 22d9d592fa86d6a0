"""Whole encoders, ours and transformers' with the same weights: the cases of `benchmarks.models`, and how one is made.

Both sides are the encoder without pooler and head, for texts without padding, with dropout 0. Ours is read from the
folder that theirs wrote, with compat="hf". BigBird stands in train() on both sides, forward pass included: in eval()
transformers' random blocks are all block 0. The others are in eval() for the forward pass alone.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks import peers
from benchmarks.cases import BIGBIRD, BOTH, FORWARD, LONGFORMER, NYSTROMFORMER, OURS, ROBERTA, Shape, make_call
from models.pretrained import load_pretrained

PEERS = {"longformer": LONGFORMER, "big_bird": BIGBIRD, "nystromformer": NYSTROMFORMER, "roberta": ROBERTA}
FIRST_ID = 3  # those before are padding and ends of texts
ROBERTA_ENTRIES = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "type_vocab_size": 1,
                   "layer_norm_eps": 1e-5}  # fmt: skip


@dataclass(frozen=True)
class EncoderCase(Shape):
    """One encoder at one length in one of the passes. Fields of the mechanism are None where it has no such thing."""

    name: str = ""
    model: str = "longformer"  # a key of PEERS
    passes: str = FORWARD
    num_layers: int = 12
    vocab_size: int = 50265
    num_rounds: int = 7
    min_ratio: float | None = None  # times as fast as theirs
    max_memory_ratio: float | None = None  # of our extra peak memory over theirs
    window: int | None = None  # on each side; there is one global token then, the first
    block_size: int | None = None
    num_random_blocks: int | None = None
    num_landmarks: int | None = None
    num_taps: int | None = None

    @property
    def peer(self) -> str:
        """Name of the other contender."""
        return PEERS[self.model]

    @property
    def in_training(self) -> bool:
        """Whether both sides stand in train()."""
        return self.passes == BOTH or self.model == "big_bird"

    def quick(self) -> "EncoderCase":
        """The same with tiny sizes and two rounds."""
        smaller: dict[str, Any] = {"seq_len": 256, "num_layers": 2, "num_heads": 2, "head_dim": 16, "vocab_size": 100}
        for name, part in (("window", 8), ("block_size", 8), ("num_landmarks", 4)):
            size = getattr(self, name)
            smaller[name] = None if size is None else size // part
        return replace(self, num_rounds=2, **smaller)


MECHANISMS: dict[str, dict[str, Any]] = {
    "longformer": {"window": 256},
    "big_bird": {"block_size": 64, "num_random_blocks": 3, "vocab_size": 50358},
    "nystromformer": {"num_landmarks": 64, "num_taps": 65, "vocab_size": 30000},
    "roberta": {},
}
ENDINGS = {FORWARD: "forward", BOTH: "backward"}
CASES: tuple[EncoderCase, ...] = tuple(
    EncoderCase(
        name=f"{model}-{seq_len // 1024}k-{ENDINGS[passes]}",
        model=model,
        seq_len=seq_len,
        passes=passes,
        num_layers=num_layers,
        num_rounds=num_rounds,
        min_ratio=min_ratio,
        max_memory_ratio=max_memory_ratio,
        **MECHANISMS[model],
    )
    for model, seq_len, passes, num_layers, num_rounds, min_ratio, max_memory_ratio in (
        ("longformer", 4096, FORWARD, 12, 7, 1.2, 1.0),
        ("longformer", 4096, BOTH, 12, 7, 1.35, 1.0),
        ("big_bird", 4096, FORWARD, 12, 7, 1.35, 1.0),
        ("big_bird", 4096, BOTH, 12, 7, 1.35, 1.0),
        # here it is memory that has a target: one pair, whose times say little
        ("longformer", 16384, FORWARD, 12, 1, None, 0.5),
        ("longformer", 16384, BOTH, 2, 1, None, 0.5),
        ("big_bird", 16384, FORWARD, 12, 1, None, 0.5),
        ("big_bird", 16384, BOTH, 2, 1, None, 0.5),
        # for comparison, without a target: two layers show as much
        ("nystromformer", 4096, FORWARD, 2, 7, None, None),
        ("nystromformer", 4096, BOTH, 2, 7, None, None),
        ("roberta", 4096, FORWARD, 2, 7, None, None),
        ("roberta", 4096, BOTH, 2, 7, None, None),
    )
)


def config_of(case: EncoderCase) -> dict[str, Any]:
    """Entries of config.json: the published architecture, its position table as long as the text."""
    entries: dict[str, Any] = {
        "vocab_size": case.vocab_size,
        "hidden_size": case.dim,
        "num_hidden_layers": case.num_layers,
        "num_attention_heads": case.num_heads,
        "intermediate_size": 4 * case.dim,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "max_position_embeddings": case.seq_len,
    }
    if case.model in ("longformer", "roberta"):  # two rows of their position table are reserved
        entries |= {**ROBERTA_ENTRIES, "max_position_embeddings": case.seq_len + 2}
    if case.window is not None:
        entries["attention_window"] = 2 * case.window
    if case.block_size is not None:
        entries |= {"attention_type": "block_sparse", "block_size": case.block_size,
                    "num_random_blocks": case.num_random_blocks}  # fmt: skip
    if case.num_landmarks is not None:
        entries |= {"num_landmarks": case.num_landmarks, "segment_means_seq_len": case.seq_len,
                    "conv_kernel_size": case.num_taps}  # fmt: skip
    return entries


def build(case: EncoderCase, contender: str) -> torch.nn.Module:
    """One side: (input_ids [B, T], is_global=) -> [B, T, dim]. The weights follow from the case alone."""
    torch.manual_seed(0)
    module: Any = peers.whole_encoder(case.model, config_of(case))
    if contender == OURS:
        with tempfile.TemporaryDirectory() as folder:
            module.model.save_pretrained(folder)
            module = load_pretrained(folder, head="none", compat="hf")
    return module.to(case.device, getattr(torch, case.dtype)).train(case.in_training)


def states(case: EncoderCase, module: torch.nn.Module) -> Callable[[], torch.Tensor]:
    """The forward pass of a side on the text of the case."""
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(FIRST_ID, case.vocab_size, (case.batch, case.seq_len), generator=generator)
    input_ids, is_global = input_ids.to(case.device), None
    if case.window is not None:
        is_global = torch.zeros(case.batch, case.seq_len, dtype=torch.bool, device=case.device)
        is_global[:, 0] = True
    return lambda: module(input_ids, is_global=is_global)


def call_of(case: EncoderCase, module: torch.nn.Module) -> Callable:
    """What is measured of a side: the states, or the gradients of all parameters from a random one of the states."""
    generator = torch.Generator().manual_seed(2)
    gradient = torch.randn(case.batch, case.seq_len, case.dim, generator=generator)
    gradient = gradient.to(case.device, getattr(torch, case.dtype))
    return make_call(states(case, module), (), case.passes, list(module.parameters()), gradient)


def encoder_call(contender: str, sizes: dict[str, Any]) -> Callable:
    """One side as a call without arguments, from what a fresh process can be told."""
    case = EncoderCase(**sizes)
    return call_of(case, build(case, contender))
