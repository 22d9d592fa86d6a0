"""A short dense model turned into a long one: `python -m models.convert --help`.

Position rows are repeated along the longer table, the reserved ones copied; Longformer's global projections begin as
copies of the local ones (arXiv 2004.05150, sections 3.1 and 5), Nyströmformer's convolution begins at zero.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.architectures import model_type
from models.errors import PretrainedError
from models.pretrained import build_pretrained, load_pretrained, published_of, save_pretrained
from models.tokenizer import Tokenizer, load_tokenizer

SOURCES = ("bert", "roberta", "xlm-roberta")
COPY, RANDOM = "copy", "random"
CHECK_TOKENS, TOLERANCE = 32, 1e-3
SENTENCE = "Two roads diverged in a yellow wood, 1916; déjà vu."


def convert(
    source: str | Path,
    target: str | Path,
    *,
    to: str,
    max_positions: int,
    window: int = 256,
    block_size: int = 64,
    num_random_blocks: int = 3,
    num_landmarks: int = 64,
    positions: str = COPY,
) -> float:
    """Write the folder `target`, a Longformer, BigBird or Nyströmformer of a BERT or RoBERTa.

    Args:
        source: a folder or hub name, as `load_pretrained` takes it.
        to: "longformer", "big_bird" or "nystromformer".
        max_positions: its longest text in tokens.
        window: Longformer's, keys on each side. block_size, num_random_blocks: BigBird's. num_landmarks:
            Nyströmformer's.
        positions: "copy" repeats the rows of the position table, "random" draws all but the reserved ones anew.

    Returns:
        The largest difference between the outputs of both for a text that is short enough for plain attention.

    Raises:
        PretrainedError: a source of another architecture, a target that exists, sizes that do not fit, a tokenizer
            that gives other ids once it is written.
    """
    target = Path(target)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        what = "not empty" if target.is_dir() else "no folder"
        raise PretrainedError(f"{target} is there already and {what}: name a new folder")
    original = load_pretrained(source)
    old, folder, head = published_of(original)
    kind = model_type(old)
    if kind not in SOURCES:
        raise PretrainedError(f"{source} is a {kind}, only {', '.join(SOURCES)} are converted")
    tokenizer = _tokenizer_of(folder)
    config = _long_config(old, to, max_positions, window, block_size, num_random_blocks, num_landmarks)
    config |= _separator(old, tokenizer)
    model = build_pretrained(config, folder, head=head, pooler=_encoder(original).pooler is not None).eval()
    state = _long_state(original, model, positions)
    model.load_state_dict(state)
    difference = 0.0
    if positions == COPY:
        within = {"longformer": window, "big_bird": block_size, "nystromformer": num_landmarks}[to]
        difference = _difference(original, model, min(within, CHECK_TOKENS))
        if not difference <= TOLERANCE:
            raise PretrainedError(
                f"the converted model differs by {difference:.3g} on a short text: nothing is written"
            )
    save_pretrained(model, target)
    if tokenizer is not None and _ids(load_tokenizer(target)) != _ids(tokenizer):
        raise PretrainedError(f"the tokenizer written to {target} gives other ids than that of {folder}")
    return difference


def _tokenizer_of(folder: Path) -> Tokenizer | None:
    try:
        return load_tokenizer(folder)
    except PretrainedError:
        return None  # which `save_pretrained` says


def _ids(tokenizer: Tokenizer) -> list[int]:
    return tokenizer.fast(SENTENCE)["input_ids"]


def _separator(old: dict[str, Any], tokenizer: Tokenizer | None) -> dict[str, int]:
    """The entry for the token that ends a question: transformers has numbers of its own where there is none."""
    known = (old.get("sep_token_id"), tokenizer and tokenizer.sep_id, old.get("eos_token_id"))
    return next(({"sep_token_id": number} for number in known if number is not None), {})


def _long_config(old, to, max_positions, window, block_size, num_random_blocks, num_landmarks) -> dict[str, Any]:
    config = {name: value for name, value in old.items() if name not in ("architectures", "torch_dtype", "dtype")}
    config |= {"model_type": to, "architectures": old.get("architectures")}
    if to == "longformer":
        if old.get("pad_token_id") is None:
            raise PretrainedError("config.json has no pad_token_id: a Longformer counts its positions by it")
        rows = max_positions + old["pad_token_id"] + 1
        return config | {"max_position_embeddings": rows, "attention_window": [2 * window] * old["num_hidden_layers"]}
    if to == "big_bird":
        sizes = {"block_size": block_size, "num_random_blocks": num_random_blocks}
        same = {"attention_type": "block_sparse", "use_bias": True, "rescale_embeddings": False}
        return config | {"max_position_embeddings": max_positions, **sizes, **same}
    if to == "nystromformer":
        sizes = {"num_landmarks": num_landmarks, "segment_means_seq_len": max_positions, "conv_kernel_size": 65}
        return config | {"max_position_embeddings": max_positions, "inv_coeff_init_option": False, **sizes}
    raise PretrainedError(f"to is {to!r}, it must be longformer, big_bird or nystromformer")


def _long_state(original, model, positions) -> dict[str, Tensor]:
    """The tensors of the long model, from those of the short one."""
    state, short = model.state_dict(), original.state_dict()
    own = "" if model is _encoder(model) else "encoder."
    place = f"{own}position.weight"
    for name, tensor in state.items():
        if name == place:
            continue
        if name in short:
            state[name] = short[name]
        elif ".attention.query_global." in name:
            state[name] = short[name.replace("query_global", "qkv")].chunk(3)[0]
        elif ".attention.key_value_global." in name:
            state[name] = torch.cat(short[name.replace("key_value_global", "qkv")].chunk(3)[1:])
        elif name.endswith("conv_weight"):
            state[name] = torch.zeros_like(tensor)
        elif ".pooler." in name:
            continue  # one that the long model's class has, and the short one's has not, is new
        else:
            raise PretrainedError(f"the source has no {name}")
    reserved, rows = short[place].split([_encoder(original).position_offset, _encoder(original).max_positions])
    offset, most = _encoder(model).position_offset, _encoder(model).max_positions
    if positions == RANDOM:
        rows = torch.randn(most, rows.shape[1], generator=torch.Generator().manual_seed(0)) * 0.02
    rows = rows.repeat(-(-most // len(rows)), 1)[:most]
    # a table with more reserved rows than the source has: nothing of a text reads them
    reserved = torch.cat([reserved, rows[:1].expand(max(0, offset - len(reserved)), -1)])[:offset]
    state[place] = torch.cat([reserved, rows])
    return state


@torch.no_grad()
def _difference(original, model, num_tokens) -> float:
    """Of the outputs for a text that both read by plain attention."""
    encoder = _encoder(original)
    generator = torch.Generator().manual_seed(0)
    num_tokens = min(num_tokens, encoder.max_positions, _encoder(model).max_positions)
    shape = (2, 2, num_tokens) if published_of(model).head in ("multiple_choice", "retrieval") else (2, num_tokens)
    input_ids = torch.randint(3, encoder.word.num_embeddings, shape, generator=generator)
    found, expected = model(input_ids), original(input_ids)
    if isinstance(found, Tensor):
        found, expected = (found,), (expected,)
    return max((one - two).abs().max().item() for one, two in zip(found, expected, strict=True))


def _encoder(model: nn.Module) -> Any:
    return getattr(model, "encoder", model)


def main(arguments: list[str] | None = None) -> int:
    """Convert, saying what was written; 0, or 4 where it cannot be done."""
    parser = argparse.ArgumentParser(
        prog="python -m models.convert",
        description="Turn a BERT or RoBERTa into a Longformer, BigBird or Nyströmformer for long texts.",
    )
    parser.add_argument("source", help="folder or hub name of the short model")
    parser.add_argument("target", type=Path, help="folder to write")
    parser.add_argument("--to", required=True, choices=("longformer", "big_bird", "nystromformer"))
    parser.add_argument("--max-positions", type=int, default=4096, help="longest text in tokens (default 4096)")
    parser.add_argument("--window", type=int, default=256, help="longformer: keys on each side (default 256)")
    parser.add_argument("--block-size", type=int, default=64, help="big_bird: default 64")
    parser.add_argument("--num-random-blocks", type=int, default=3, help="big_bird: default 3")
    parser.add_argument("--num-landmarks", type=int, default=64, help="nystromformer: default 64")
    parser.add_argument("--positions", choices=(COPY, RANDOM), default=COPY, help=f"default {COPY}")
    options = vars(parser.parse_args(arguments))
    source, target = options.pop("source"), options.pop("target")
    try:
        difference = convert(source, target, **options)
    except (PretrainedError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 2)
    print(f"written: {target}; a short text differs by {difference:.2g}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
