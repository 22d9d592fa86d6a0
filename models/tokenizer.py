"""A checkpoint's own tokenizer: `load_tokenizer`. Words in, ids without special tokens out, and back."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers.models import WordPiece

from models.checkpoint_files import CONFIG, folder_of, read_json
from models.errors import PretrainedError

# marks at the start of a token that begins a word: byte-level BPE, SentencePiece; WordPiece marks the others
WORD_STARTS, CONTINUATION = ("Ġ", "▁"), "##"
MASK = "<mask>"  # what a prompt may hold, whatever the tokenizer calls it
SETTINGS = "tokenizer_config.json"


@dataclass(frozen=True)
class Tokenizer:
    """A fast tokenizer of transformers, and the ids that a task needs.

    cls_id, sep_id, pad_id, mask_id: its special tokens by their use. vocab_size: one more than its largest id.
    """

    fast: Any
    folder: Path
    cls_id: int
    sep_id: int
    pad_id: int
    mask_id: int
    vocab_size: int

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, none of them special: what looks like a special token is text."""
        backend = self.fast.backend_tokenizer
        before = backend.encode_special_tokens
        backend.encode_special_tokens = True
        try:
            return [found.ids for found in backend.encode_batch(list(texts), add_special_tokens=False)]
        finally:
            backend.encode_special_tokens = before

    def encode_prompt(self, text: str) -> list[int]:
        """The ids of a text whose <mask> stands for the tokenizer's own mask."""
        parts = self.fast.backend_tokenizer.encode(text.replace(MASK, self.fast.mask_token), add_special_tokens=False)
        return parts.ids

    def words(self, text: str) -> list[tuple[int, int, int]]:
        """(place, start, end) of each word of a text: its first token's place behind a start token, its characters."""
        found = self.fast(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        words: list[tuple[int, int, int]] = []
        seen = None
        for place, (number, (start, end)) in enumerate(zip(found.word_ids(), found["offset_mapping"], strict=True), 1):
            if number is not None and number == seen:
                words[-1] = (*words[-1][:2], end)
            elif number is not None:
                words.append((place, start, end))
            seen = number
        return words

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids."""
        return self.fast.decode(list(ids))

    def save(self, folder: str | Path, *, max_positions: int | None = None) -> None:
        """Write it as tokenizer.json, with the name of its class beside it, as transformers' AutoTokenizer reads it.

        max_positions: the longest text in tokens of the model it goes along with; None keeps what it says itself.
        """
        own = self.fast.model_max_length
        self.fast.model_max_length = own if max_positions is None else max_positions
        try:
            self.fast.save_pretrained(folder)
        finally:
            self.fast.model_max_length = own

    @property
    def digest(self) -> str:
        """sha256 of all that decides which ids a text gets."""
        return hashlib.sha256(self.fast.backend_tokenizer.to_str().encode()).hexdigest()

    @property
    def special_ids(self) -> list[int]:
        """Ids that stand for no text."""
        return sorted({*self.fast.all_special_ids, self.cls_id, self.sep_id, self.pad_id, self.mask_id})

    def word_starts(self) -> np.ndarray:
        """bool [V]: which ids begin a word."""
        tokens = self.fast.convert_ids_to_tokens(range(self.vocab_size))
        if isinstance(self.fast.backend_tokenizer.model, WordPiece):
            return np.array([token is not None and not token.startswith(CONTINUATION) for token in tokens])
        return np.array([token is not None and token.startswith(WORD_STARTS) for token in tokens])


def load_tokenizer(path_or_name: str | Path) -> Tokenizer:
    """The tokenizer in a folder, or of a model of the hub: tokenizer.json, or the vocabulary files of RoBERTa or BERT.

    Raises PretrainedError where there is none, or where it has no mask, start, end or padding token.
    """
    from models.hf import fast_tokenizer

    folder = folder_of(path_or_name, "tokenizer")
    fast = fast_tokenizer(folder)
    # their hint about forks concerns Python workers, which never call it
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    ids = {
        "cls_id": fast.cls_token_id if fast.cls_token_id is not None else fast.bos_token_id,
        "sep_id": fast.sep_token_id if fast.sep_token_id is not None else fast.eos_token_id,
        "pad_id": fast.pad_token_id,
        "mask_id": fast.mask_token_id,
    }
    lacking = [name.removesuffix("_id") for name, number in ids.items() if number is None]
    if lacking:
        raise PretrainedError(f"the tokenizer in {folder} has no {' and no '.join(lacking)} token")
    return Tokenizer(fast, folder, **ids, vocab_size=max(fast.get_vocab().values()) + 1)


def tokenizer_kind(folder: Path) -> str:
    """Which files of a folder hold its tokenizer: "json", "bpe" or "wordpiece"; PretrainedError where none do."""
    files = {"json": ["tokenizer.json"], "bpe": ["vocab.json", "merges.txt"], "wordpiece": ["vocab.txt"]}
    for kind, names in files.items():
        if all((folder / name).is_file() for name in names):
            return kind
    if (folder / "spiece.model").is_file() or (folder / "sentencepiece.bpe.model").is_file():
        raise PretrainedError(
            f"{folder} holds a SentencePiece model but no tokenizer.json: make one where the sentencepiece package is "
            "installed (transformers' AutoTokenizer.from_pretrained(folder).save_pretrained(folder))"
        )
    raise PretrainedError(
        f"{folder} holds no tokenizer: neither tokenizer.json, nor vocab.json with merges.txt, nor vocab.txt"
    )


def lower_cases(folder: Path) -> bool:
    """Whether tokenizer_config.json says that a WordPiece vocabulary is of small letters, as by default."""
    return _settings(folder).get("do_lower_case", True)


def names_class(folder: Path) -> bool:
    """Whether tokenizer_config.json names a class of transformers."""
    return "tokenizer_class" in _settings(folder)


def refuse_code(folder: Path) -> None:
    """PretrainedError where a folder names Python files of its own as what reads its tokenizer."""
    named = {SETTINGS: "auto_map" in _settings(folder)}
    if (folder / CONFIG).is_file():
        # the code of a model is not asked for here, that of its configuration is, on the way to a tokenizer
        classes = read_json(folder / CONFIG).get("auto_map")
        named[CONFIG] = isinstance(classes, dict) and bool({"AutoConfig", "AutoTokenizer"} & set(classes))
    for file, found in named.items():
        if found:
            raise PretrainedError(
                f"{folder / file} names code of the folder's own (auto_map), and no code that comes with a model is "
                "run: take the entry out if the files can be read without"
            )


def _settings(folder):
    path = folder / SETTINGS
    return read_json(path) if path.is_file() else {}
