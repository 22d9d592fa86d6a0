"""A toy model with its optimizer, and checkpoints of it: written, damaged on purpose, sealed again."""

import json
from pathlib import Path

import torch
from torch import nn

from training import checkpoint
from training.checkpoint_writer import CheckpointWriter
from training.optim import build_optimizer


class Toy(nn.Module):
    """A tied embedding, a buffer and dropout, as the language model has them."""

    def __init__(self, dim: int = 8):
        super().__init__()
        self.embedding = nn.Embedding(11, dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(3 * dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(dim, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, ids):
        self.seen += ids.numel()
        x = self.embedding(ids)
        return self.head(self.norm(x + self.dropout(self.out(self.qkv(x).relu()))))


def make(name: str = "adamw", seed: int = 0, dim: int = 8):
    torch.manual_seed(seed)
    model = Toy(dim)
    settings = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "muon_lr_ratio": 1.0}
    return model, build_optimizer(model, name=name, lr=0.01, **settings)


def train(model, optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        ids = torch.randint(11, (4, 6), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
        loss.backward()
        optimizer.set_lr(0.01 / (step + 1))
        optimizer.step()
        losses.append(loss.item())
    return losses


def save(run_dir: Path, step: int, model=None, optimizer=None, keep: int = 2, **state) -> Path:
    if model is None:
        model, optimizer = make()
    writer = CheckpointWriter(run_dir, keep=keep, asynchronous=False)
    writer.save(step, model=model, optimizer=optimizer, state=state)
    return run_dir / "checkpoints" / f"step-{step}"


def flip(path: Path, position: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def reseal(path: Path) -> None:
    """Make the manifest true again after a file was changed on purpose."""
    manifest = json.loads((path / "manifest.json").read_text())
    for name in manifest["files"]:
        file = path / name
        manifest["files"][name] = {"size": file.stat().st_size, "sha256": checkpoint.file_digest(file)}
    (path / "manifest.json").write_text(json.dumps(manifest))


class Payload:
    """Unpickling it makes a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)
