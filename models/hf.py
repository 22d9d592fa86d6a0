"""Generation by transformers' loop around our character model, each token once; the tokenizers of checkpoints.

The only module of models that imports transformers, and only inside its functions: it takes seconds to load.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from models.checkpoint_files import CONFIG
from models.errors import PretrainedError, first_line
from models.tokenizer import lower_cases, names_class, refuse_code, tokenizer_kind

PIECE = 4096  # characters of a prompt that are read at a time


@torch.no_grad()
def generate(
    model: Any,
    prompt: torch.Tensor,
    *,
    length: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    num_symbols: int | None = None,
    show: Callable[[int], None] = lambda token: None,
) -> torch.Tensor:
    """Continue `prompt`, int64 [T] with T >= 1, by `length` tokens: int64 [length], on the CPU.

    `model`: a CharLM, in evaluation mode. `temperature` 0 takes the likeliest token; else one is drawn from the
    softmax of logits / temperature, among the `top_k` likeliest or the likeliest that make up `top_p`. The same seed
    draws the same on one machine; the generators of the CPU and of the model's device are left as they were. Only
    the first `num_symbols` tokens are taken, all if None. `show` gets each token as it comes. Raises
    FloatingPointError where the model's output is not finite.
    """
    if prompt.dim() != 1 or not len(prompt):
        raise ValueError(f"prompt must be [T] with at least one token, got {tuple(prompt.shape)}")
    device = next(model.parameters()).device
    how: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        how = {"do_sample": True, "temperature": temperature, "top_k": top_k or 0, "top_p": top_p or 1.0}
    continuing, streamer = _classes()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        ids = continuing(model, num_symbols).generate(
            prompt[None].to(device),
            max_new_tokens=length,
            streamer=streamer(show),
            use_cache=False,  # of theirs: ours is inside
            **how,
        )
    return ids[0, len(prompt) :].cpu()


def fast_tokenizer(folder: Path) -> Any:
    """The tokenizer that the files of a folder describe, of transformers' class for them; no code in it is run.

    PretrainedError where there are none, where they cannot be read, or where they name code of their own.
    """
    kind, named = tokenizer_kind(folder), names_class(folder)
    refuse_code(folder)

    from transformers import AutoTokenizer, BertTokenizer, PreTrainedTokenizerFast, RobertaTokenizerFast

    # left out, transformers asks on the terminal whether code may run
    safe: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        # the class that a model's type stands for may want other files than these
        if named or (kind == "json" and (folder / CONFIG).is_file()):
            return AutoTokenizer.from_pretrained(folder, **safe)
        if kind == "json":
            return PreTrainedTokenizerFast.from_pretrained(folder, **safe)
        if kind == "bpe":
            return RobertaTokenizerFast.from_pretrained(folder, **safe)
        return BertTokenizer.from_pretrained(folder, do_lower_case=lower_cases(folder), **safe)
    except Exception as error:  # somebody else's readers of JSON and text: no one class of errors
        raise PretrainedError(f"the tokenizer in {folder} cannot be read: {first_line(error)}") from None


@cache
def _classes() -> tuple[Any, Any]:
    """Our model as their loop wants it, and a streamer that calls a function."""
    from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
    from transformers.generation.streamers import BaseStreamer
    from transformers.modeling_outputs import CausalLMOutput

    class Continuing(PreTrainedModel, GenerationMixin):
        """One text that grows: of the tokens so far only those not yet read are given to the model."""

        config_class = PreTrainedConfig
        main_input_name = "input_ids"

        def __init__(self, model, num_symbols):
            super().__init__(PreTrainedConfig(is_encoder_decoder=False))
            self.model, self.num_symbols, self.read = model, num_symbols, model.new_cache(1)

        @property
        def device(self):
            return next(self.model.parameters()).device

        def forward(self, input_ids, **unused):
            pieces = input_ids[:, self.read.position :].split(PIECE, dim=1)
            *_, logits = (self.model(piece, cache=self.read)[:, -1:, : self.num_symbols] for piece in pieces)
            if not logits.isfinite().all():
                raise FloatingPointError("what the model gives for the next token is not finite")
            return CausalLMOutput(logits=logits)

        def prepare_inputs_for_generation(self, input_ids, **unused):
            return {"input_ids": input_ids}

    class Showing(BaseStreamer):
        """Calls a function with each new token."""

        def __init__(self, show):
            self.show, self.in_prompt = show, True

        def put(self, value):
            if not self.in_prompt:
                self.show(int(value))
            self.in_prompt = False

        def end(self):
            pass

    return Continuing, Showing
