"""What a trained encoder says of one text: words for its masks, a label, labels of its words."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from data.errors import DataError
from models.pretrained import load_pretrained, published_of
from models.tokenizer import MASK, Tokenizer, load_tokenizer

SHOWN = 5  # candidates of a mask


@torch.no_grad()
def fill_masks(model: Any, tokenizer: Tokenizer, text: str, *, max_positions: int) -> dict[str, Any]:
    """The likeliest words in place of the masks of a text.

    Returns `filled`, the text with the likeliest word in each place, and `masks`: of each its best candidates as
    `token` and `probability`. Raises DataError where the text has no mask, or has more than `max_positions` tokens,
    and where the probabilities are not finite.
    """
    ids, masked = masked_ids(tokenizer, text, max_positions=max_positions)
    device = next(model.parameters()).device
    positions = torch.tensor([masked], device=device)
    found = model(torch.tensor([ids], device=device), logit_positions=positions)
    # the head "pretraining" tells the order of segments, too
    logits = (found[0] if isinstance(found, tuple) else found)[0].float()  # [P, V]
    # rows beyond the tokenizer's last id, and special tokens, are no words
    logits[:, tokenizer.vocab_size :] = -torch.inf
    logits[:, tokenizer.special_ids] = -torch.inf
    best = _finite(logits.softmax(dim=-1)).topk(SHOWN)
    masks = [
        [{"token": tokenizer.decode([token]).strip(), "probability": probability} for token, probability in pairs]
        for pairs in (zip(*row, strict=True) for row in zip(best.indices.tolist(), best.values.tolist(), strict=True))
    ]
    for position, tokens in zip(masked, best.indices.tolist(), strict=True):
        ids[position] = tokens[0]
    return {"filled": tokenizer.decode(ids[1:-1]), "masks": masks}


def masked_ids(tokenizer: Tokenizer, text: str, *, max_positions: int) -> tuple[list[int], list[int]]:
    """(ids of a text in its frame, places of its masks); DataError as `fill_masks`."""
    ids = _framed(tokenizer, text, max_positions)
    masked = [position for position, token in enumerate(ids) if token == tokenizer.mask_id]
    if not masked:
        raise DataError(f"there is nothing to fill: the text has no {MASK}")
    return ids, masked


def _framed(tokenizer, text, max_positions) -> list[int]:
    """The ids of a text between the tokens of its start and its end."""
    ids = [tokenizer.cls_id, *tokenizer.encode_prompt(text), tokenizer.sep_id]
    if len(ids) > max_positions:
        raise DataError(
            f"the text has {len(ids):,} tokens, the position table of this model {max_positions:,}: cut the text, or "
            "lengthen the model with python -m models.convert"
        )
    return ids


def _finite(shares: torch.Tensor) -> torch.Tensor:
    """The shares themselves; DataError where the model's weights give none."""
    if not shares.isfinite().all():
        raise DataError("what the model gives for this text is not finite: its weights are damaged, or its run failed")
    return shares


@torch.no_grad()
def label_text(model: Any, tokenizer: Tokenizer, text: str, *, max_positions: int) -> dict[str, Any]:
    """What a text is said to be, by the `problem_type` of the model's config.json, as transformers has it.

    Returns, for "single_label_classification" (also where nothing is said of more than one label), `label` and
    `labels`, of all of them `label` and `probability`, best first; for "multi_label_classification" `labels` with
    probabilities of their own, as several may hold; for "regression" (also where nothing is said of one label)
    `score`, the number itself, a list where there are several. Raises DataError for a text beyond `max_positions`
    tokens, for another `problem_type`, and where the numbers are not finite.
    """
    ids = torch.tensor([_framed(tokenizer, text, max_positions)], device=next(model.parameters()).device)
    logits = _finite(model(ids, is_global=_first(ids))[0].float())  # [labels]
    kind = published_of(model).config.get("problem_type")
    kind = kind or ("regression" if len(logits) == 1 else "single_label_classification")
    if kind == "regression":
        return {"score": logits.item() if len(logits) == 1 else logits.tolist()}
    if kind not in ("single_label_classification", "multi_label_classification"):
        raise DataError(
            f"problem_type in the model's config.json is {kind!r}, it must be regression, single_label_classification "
            "or multi_label_classification"
        )
    shares = logits.sigmoid() if kind == "multi_label_classification" else logits.softmax(dim=-1)
    pairs = zip(_labels(model, len(shares)), shares.tolist(), strict=True)
    labels = [{"label": label, "probability": share} for label, share in sorted(pairs, key=lambda pair: -pair[1])]
    if kind == "multi_label_classification":
        return {"labels": labels}
    return {"label": labels[0]["label"], "labels": labels}


@torch.no_grad()
def label_words(model: Any, tokenizer: Tokenizer, text: str, *, max_positions: int) -> dict[str, Any]:
    """The label of each word of a text, by its first token: `words`, each with `word`, `label`, `probability`."""
    ids = torch.tensor([_framed(tokenizer, text, max_positions)], device=next(model.parameters()).device)
    shares = _finite(model(ids)[0].float().softmax(dim=-1))  # [T, labels]
    best, labels = shares.max(dim=-1), _labels(model, shares.shape[-1])
    words = [
        {"word": text[start:end], "label": labels[best.indices[place]], "probability": best.values[place].item()}
        for place, start, end in tokenizer.words(text)
    ]
    return {"words": words}


def published_answer(folder: str, *, device: Any) -> tuple[Callable[[str], Any], Callable[[str], dict[str, Any]]]:
    """(check, answer) of the published model in a folder, by its head: masks filled, a label, labels of words.

    `check(text)` raises the DataError that `answer(text)` would, without asking the model.
    """
    model: Any = load_pretrained(folder).to(device)
    tokenizer = load_tokenizer(folder)
    head = published_of(model).head
    kinds = {"masked_lm": fill_masks, "pretraining": fill_masks, "sequence": label_text, "token": label_words}
    if head not in kinds:
        raise DataError(
            f"{folder} has the head {head!r}, which says nothing of one text: {', '.join(kinds)} do; the logits of "
            "all are to be had in Python, by load_pretrained"
        )
    answer, most = kinds[head], model.encoder.max_positions
    check = partial(masked_ids, max_positions=most) if answer is fill_masks else partial(_framed, max_positions=most)
    return partial(check, tokenizer), partial(answer, model, tokenizer, max_positions=most)


def _first(ids: torch.Tensor) -> torch.Tensor:
    """The first token is global, as in classification (arXiv 2004.05150, section 3.1)."""
    return torch.arange(ids.shape[1], device=ids.device).expand_as(ids) == 0


def _labels(model, count) -> list[str]:
    named = model.published.config.get("id2label") or {}
    return [str(named.get(str(number), named.get(number, f"LABEL_{number}"))) for number in range(count)]
