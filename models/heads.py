"""Heads on an encoder: a model that takes what `Encoder` takes and gives logits."""

import torch
import torch.nn.functional as F
from torch import nn

from models.encoder import Encoder
from models.layers import ACTIVATIONS


class MaskedLM(nn.Module):
    """Scores of the vocabulary for each token, the output matrix tied to the word embeddings: [B, T] -> [B, T, V].

    activation, norm_eps: of the dense layer before.
    """

    def __init__(self, encoder: Encoder, *, activation: str = "gelu", norm_eps: float = 1e-5):
        super().__init__()
        num_tokens, dim = encoder.word.weight.shape
        self.encoder = encoder
        self.dense = nn.Linear(dim, dim)
        self.activation = ACTIVATIONS[activation]
        self.norm = nn.LayerNorm(dim, eps=norm_eps)
        self.bias = nn.Parameter(torch.zeros(num_tokens))

    def forward(self, input_ids: torch.Tensor, valid=None, is_global=None, **inputs) -> torch.Tensor:
        """[B, T] -> [B, T, V]; with `logit_positions` [B, P] at those alone, [B, P, V]. As `Encoder.forward`."""
        states = self.encoder(input_ids, valid, is_global, **inputs)
        return F.linear(self.norm(self.activation(self.dense(states))), self.encoder.word.weight, self.bias)
