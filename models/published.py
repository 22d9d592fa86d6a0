"""A model that a published configuration describes, as `train.py` trains it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from models.architectures import model_type, published_config, refuse_unknown_entries
from models.attention.control import AttentionControl
from models.checkpoint_files import folder_of, read_config
from models.pretrained import build_pretrained, load_pretrained, save_pretrained

# what the loss of a head does not reach: there are no global tokens in it
UNREACHED = {
    "masked_lm": ("query_global", "key_value_global", "pooler"),
    "pretraining": ("query_global", "key_value_global"),
}


class PublishedModel(AttentionControl, nn.Module):
    """An encoder with a head, by the entries of its config.json: with new weights, or from a published checkpoint.

    Args:
        config: entries of config.json; without a `model_type` they replace those of the source's.
        source: folder or hub name of the weights to begin with, None for new ones.
        head, compat: as in `models.pretrained.load_pretrained`.
        train: "all", or "positions": only the rows of the position table from `first_position` on, as Longformer's
            variant that keeps RoBERTa's weights (arXiv 2004.05150, section 5).
        first_position: the first position whose row is trained with train="positions".
        checkpoint_activations: recompute each block in the backward pass instead of keeping its activations.
    """

    def __init__(
        self,
        *,
        config: Mapping,
        source: str | None = None,
        head: Literal["masked_lm", "pretraining"] = "masked_lm",
        compat: Literal["hf"] | None = None,
        train: Literal["all", "positions"] = "all",
        first_position: int = 0,
        checkpoint_activations: bool = False,
    ):
        super().__init__()
        self.globals_are_copies: torch.Tensor
        config = self.complete({"config": config, "source": source})["config"]
        self.source, self.head, self.compat = source, head, compat
        folder = Path(source) if source is not None else Path()
        self.model = build_pretrained(config, folder, head=head, compat=compat)
        self.encoder.checkpoint_activations = checkpoint_activations
        self.first_position = first_position if train == "positions" else 0
        self._choose_trained(train, first_position)
        if self._global_layers():
            # in the checkpoints of a run, as its source may be gone when it is exported
            self.register_buffer("globals_are_copies", torch.tensor(True))

    @staticmethod
    def complete(options: Mapping[str, Any]) -> dict[str, Any]:
        """These arguments with the whole of `config`, so that a run does not depend on what becomes of its source.

        PretrainedError where the source is no model.
        """
        config = dict(options.get("config") or {})
        if options.get("source") is None:
            refuse_unknown_entries(config, {})
        if "model_type" not in config and options.get("source") is not None:
            found = published_config(read_config(folder_of(options["source"], "config")))
            refuse_unknown_entries(config, found)
            config = {**found, **config}
        model_type(config)
        return {**options, "config": config}

    @property
    def encoder(self) -> Any:
        """The `Encoder` inside."""
        return self.model.encoder

    @property
    def vocab_size(self) -> int:
        """Symbols it knows."""
        return self.encoder.word.num_embeddings

    @property
    def max_positions(self) -> int:
        """The longest text in tokens."""
        return self.encoder.max_positions

    def attention_layers(self) -> list[Any]:
        """The attention module of each layer, from the bottom."""
        return [block.attention for block in self.encoder.layers]

    def load_source(self) -> None:
        """Begin with the weights of `source`, where there is one."""
        if self.source is None:
            return
        loaded = load_pretrained(self.source, head=self.head, compat=self.compat, **self.model.published.config)
        own = self.model.state_dict()
        # a pooler that the source has beside its masked-LM head is of no use here
        self.model.load_state_dict({name: tensor for name, tensor in loaded.state_dict().items() if name in own})
        if layers := self._global_layers():
            self.globals_are_copies.fill_(all(map(are_copies, layers)))

    def export(self, path: str | Path, *, tokenizer: str | Path) -> None:
        """Write the model as a folder that transformers loads, with the tokenizer files of another.

        Global projections have not been trained. Where they are new, or were copies of the local ones in the source, as
        after a conversion, they become copies of those as trained; others, which a source learned, stay as they are.
        """
        if (layers := self._global_layers()) and self.globals_are_copies:
            with torch.no_grad():
                for layer in layers:
                    copy_to_global(layer)
        save_pretrained(self.model, path, tokenizer=tokenizer)

    def forward(self, input_ids: torch.Tensor, valid=None, **inputs) -> Any:
        """As the model with its head: [B, T] -> logits."""
        return self.model(input_ids, valid, **inputs)

    def _global_layers(self) -> list[Any]:
        """Those of the attention modules that have projections for global tokens."""
        return [layer for layer in self.attention_layers() if getattr(layer, "query_global", None) is not None]

    def _choose_trained(self, train, first_position):
        for name, parameter in self.model.named_parameters():
            unreached = any(part in UNREACHED[self.head] for part in name.split("."))
            parameter.requires_grad_(train == "all" and not unreached)
        if train == "all":
            return
        if not 0 <= first_position < self.max_positions:
            raise ValueError(
                f"first_position is {first_position}, it must be at least 0 and below the table's {self.max_positions}"
            )
        table, first = self.encoder.position.weight, first_position + self.encoder.position_offset
        table.requires_grad_(True)
        # a row without gradient keeps its value: embeddings are not decayed
        table.register_hook(lambda grad: torch.cat([torch.zeros_like(grad[:first]), grad[first:]]))


def copy_to_global(layer: Any) -> None:
    """Copy the local projections of a sliding-window layer to its global ones (arXiv 2004.05150, section 3.1)."""
    for part in ("weight", "bias"):
        query, key, value = getattr(layer.qkv, part).chunk(3)
        getattr(layer.query_global, part).copy_(query)
        getattr(layer.key_value_global, part).copy_(torch.cat([key, value]))


def are_copies(layer: Any) -> bool:
    """Whether the global projections of a sliding-window layer equal its local ones."""
    return all(
        getattr(layer.qkv, part).equal(
            torch.cat([getattr(layer.query_global, part), getattr(layer.key_value_global, part)])
        )
        for part in ("weight", "bias")
    )
