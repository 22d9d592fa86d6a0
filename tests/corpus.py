"""A small corpus of sentences with a structure to learn, and a tokenizer trained on it."""

import json
import random
from pathlib import Path

from tokenizers import ByteLevelBPETokenizer

PLACES = {"Paris": "France", "Rome": "Italy", "Madrid": "Spain", "Berlin": "Germany", "Vienna": "Austria"}
SPECIALS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


def sentences(count: int, *, seed: int = 0) -> list[str]:
    """Sentences that say where cities are."""
    draw = random.Random(seed)
    kinds = ["{} is the capital of {}.", "The city of {} lies in {}.", "From {} one travels through {}."]
    return [draw.choice(kinds).format(*draw.choice(list(PLACES.items()))) for _ in range(count)]


def write_corpus(folder: Path, *, documents: int = 60) -> Path:
    """A file corpus.jsonl of documents of four to twelve sentences."""
    draw = random.Random(1)
    path = folder / "corpus.jsonl"
    texts = [" ".join(sentences(draw.randint(4, 12), seed=number)) for number in range(documents)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def write_tokenizer(folder: Path, *, vocab_size: int = 320) -> Path:
    """A folder with vocab.json and merges.txt, as RoBERTa's."""
    folder = folder / "tokenizer"
    folder.mkdir()
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(sentences(300), vocab_size=vocab_size, special_tokens=SPECIALS, show_progress=False)
    tokenizer.save_model(str(folder))
    return folder
