"""A character model small enough to differentiate in float64."""

from functools import partial

import torch

from models.attention.sliding_window import SlidingWindowAttention
from models.char_lm import CharLM

VOCAB = 23


def tiny_model(
    *,
    window=4,
    dilation=1,
    impl: str = "auto",
    seed: int = 0,
    dtype=torch.float64,
    loud: bool = True,
    **options,
) -> CharLM:
    """CharLM of three layers and four heads; `loud` scales the matrices up, so that every key counts."""
    torch.manual_seed(seed)
    attention = partial(SlidingWindowAttention, window=window, dilation=dilation, impl=impl)
    model = CharLM(attention=attention, **{"vocab_size": VOCAB, "dim": 16, "num_layers": 3, "num_heads": 4, **options})
    if loud:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(8 if parameter.dim() > 1 else 1)
    return model.to(dtype)


def text(seq_len: int, batch: int = 2, seed: int = 0) -> torch.Tensor:
    """Random characters [batch, seq_len]."""
    return torch.randint(VOCAB, (batch, seq_len), generator=torch.Generator().manual_seed(seed))


def loss_and_gradients(model: CharLM, ids: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Mean next-character loss and the gradient of every parameter by name."""
    model.zero_grad()
    logits = model(ids[:, :-1])
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
