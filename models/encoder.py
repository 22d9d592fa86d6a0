"""BERT-shaped encoder, written once: embeddings, blocks around a mechanism that is handed in, hidden states out."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from kernels.window_attention import global_positions
from models.layers import Block, check_sizes


class Encoder(nn.Module):
    """Embeddings and transformer blocks: RoBERTa, BERT, Longformer, BigBird, Nyströmformer differ in arguments alone.

    Args:
        attention: called as attention(dim, num_heads, layer, num_layers=) once a layer.
        vocab_size, num_token_types: rows of their tables; 0 token types for none.
        max_positions: longest text in tokens.
        position_offset: rows at the start of the position table that no token of a text reads (RoBERTa's two).
        positions: "index", or "counted" as RoBERTa does: the number of tokens up to here that are not `pad_id`, so that
            padding on the left changes nothing; a pad reads the last reserved row.
        hidden: width of the feed-forward layer.
        activation: of the feed-forward layer, a key of `layers.ACTIVATIONS`.
        pre_norm: LayerNorm before attention and feed-forward layer, and after the last one, instead of behind the sums.
        dropout: after the embedding, the attention output and the feed-forward layer.
        dropout_before_norm: whether that of the embedding comes before its LayerNorm (BigBird).
        embedding_scale: factor on the word embeddings.
        pooler: whether there is a dense layer over the first token, `pool`.
        max_global_tokens: most global tokens of one text.
        checkpoint_activations: recompute each block in the backward pass instead of keeping its activations.
    """

    def __init__(
        self,
        *,
        attention: Callable[..., nn.Module],
        vocab_size: int,
        max_positions: int,
        dim: int = 768,
        num_layers: int = 12,
        num_heads: int = 12,
        hidden: int = 3072,
        num_token_types: int = 1,
        position_offset: int = 0,
        positions: Literal["index", "counted"] = "index",
        pad_id: int | None = None,
        activation: str = "gelu",
        norm_eps: float = 1e-5,
        pre_norm: bool = False,
        dropout: float = 0.1,
        dropout_before_norm: bool = False,
        embedding_scale: float = 1.0,
        pooler: bool = False,
        max_global_tokens: int = 128,
        checkpoint_activations: bool = False,
    ):
        super().__init__()
        sizes = {"vocab_size": vocab_size, "max_positions": max_positions, "num_layers": num_layers, "hidden": hidden}
        check_sizes(dim=dim, num_heads=num_heads, dropout=dropout, **sizes)
        if positions not in ("index", "counted"):
            raise ValueError(f"positions is {positions!r}, it must be 'index' or 'counted'")
        if positions == "counted" and (pad_id is None or position_offset < 1):
            raise ValueError("positions='counted' needs a pad_id, and a position_offset of at least 1 for its row")
        self.max_positions, self.position_offset = max_positions, position_offset
        self.positions, self.pad_id = positions, pad_id
        self.max_global_tokens, self.embedding_scale = max_global_tokens, embedding_scale
        self.dropout_before_norm, self.checkpoint_activations = dropout_before_norm, checkpoint_activations
        self.word = nn.Embedding(vocab_size, dim)
        self.position = nn.Embedding(max_positions + position_offset, dim)
        self.token_type = nn.Embedding(num_token_types, dim) if num_token_types else None
        self.norm = nn.LayerNorm(dim, eps=norm_eps)
        self.dropout = nn.Dropout(dropout)
        options: dict[str, Any] = {"activation": activation, "norm_eps": norm_eps, "pre_norm": pre_norm}
        self.layers = nn.ModuleList(
            Block(attention(dim, num_heads, layer, num_layers=num_layers), dim, hidden, dropout, inner_dropout=0.0,
                  **options)
            for layer in range(num_layers)
        )  # fmt: skip
        self.pre_norm = pre_norm
        self.pooler = nn.Linear(dim, dim) if pooler else None
        self.apply(init_bert_weights)

    def forward(
        self,
        input_ids: torch.Tensor,
        valid: torch.Tensor | None = None,
        is_global: torch.Tensor | None = None,
        *,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        document_start: torch.Tensor | None = None,
        document_end: torch.Tensor | None = None,
        logit_positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states [B, T, M] of input_ids [B, T], of the last layer.

        Args:
            valid: [B, T] bool, True = real; all if None. is_global: [B, T] bool, which tokens see and are seen by all;
                mechanisms without global tokens ignore it.
            token_type_ids, position_ids: [B, T]; position_ids count from 0.
            logit_positions: [B, P] int64, positions whose states are returned, [B, P, M].

        Raises:
            ValueError: a text longer than the position table, more global tokens than `max_global_tokens`.
        """
        if document_start is not None or document_end is not None:
            raise NotImplementedError("Encoder.forward: document_start and document_end are not implemented yet")
        x = self.embed(input_ids, token_type_ids, position_ids)
        global_index = None
        if is_global is not None:
            global_index = global_positions(is_global, valid, self._global_capacity(is_global, input_ids.shape[1]))
        for layer in self.layers:
            if self.checkpoint_activations and self.training:
                x = checkpoint(layer, x, valid=valid, global_index=global_index, use_reentrant=False)
            else:
                x = layer(x, valid=valid, global_index=global_index)
        if self.pre_norm:
            x = self.norm(x)
        if logit_positions is None:
            return x
        # take_along_dim would do, but makes a compiler take all sizes for constants
        return x.gather(1, logit_positions[..., None].expand(-1, -1, x.shape[2]))

    def _global_capacity(self, is_global, seq_len):
        """Length of the lists of global tokens: on a CPU, where reading waits for nothing, as many as there are."""
        if torch.compiler.is_compiling():  # where a minimum would tell short texts from long ones
            return self.max_global_tokens
        capacity = min(self.max_global_tokens, seq_len)
        if is_global.device.type != "cpu" or not is_global.numel():
            return capacity
        # one at least: with none the projections of global rows would have no gradient
        return min(capacity, max(1, int(is_global.sum(dim=-1).max())))

    def embed(
        self, input_ids: torch.Tensor, token_type_ids: torch.Tensor | None, position_ids: torch.Tensor | None
    ) -> torch.Tensor:
        """[B, T] -> [B, T, M], what the first layer takes."""
        x = self.word(input_ids) * self.embedding_scale if self.embedding_scale != 1.0 else self.word(input_ids)
        rows = self._position_rows(input_ids) if position_ids is None else position_ids + self.position_offset
        x = x + self.position(rows)
        if self.token_type is not None:
            kinds = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
            x = x + self.token_type(kinds)
        if self.pre_norm:
            return self.dropout(x)
        return self.norm(self.dropout(x)) if self.dropout_before_norm else self.dropout(self.norm(x))

    def _position_rows(self, input_ids):
        """Rows of the position table, [T] or [B, T]."""
        seq_len = input_ids.shape[1]
        if seq_len > self.max_positions:
            raise ValueError(
                f"the text has {seq_len} tokens, the position table of this model {self.max_positions}: cut the text, "
                "or lengthen the model with python -m models.convert"
            )
        if self.positions == "index":
            return torch.arange(seq_len, device=input_ids.device) + self.position_offset
        is_token = input_ids != self.pad_id
        return is_token.cumsum(dim=1) * is_token + self.position_offset - 1

    def pool(self, states: torch.Tensor) -> torch.Tensor:
        """States [B, T, M] -> [B, M]: the first token's through the pooler and tanh."""
        if self.pooler is None:
            raise ValueError("this encoder was built without a pooler")
        return torch.tanh(self.pooler(states[:, 0]))


def init_bert_weights(module: nn.Module) -> None:
    """For `Module.apply`: matrices N(0, 0.02), biases 0; LayerNorm keeps its gains of 1 (BERT, RoBERTa)."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
