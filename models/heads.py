"""Heads on an encoder. Each is a model: it takes what `Encoder` takes and gives logits."""

import torch
import torch.nn.functional as F
from torch import nn

from models.encoder import Encoder
from models.layers import ACTIVATIONS, MLP


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


class SpanQA(nn.Module):
    """Scores of each token as the start and the end of the answer: [B, T] -> [B, T, 2].

    hidden: width of a feed-forward layer with LayerNorm before the scores (BigBird), None for none.
    """

    def __init__(
        self, encoder: Encoder, *, hidden: int | None = None, activation: str = "gelu", norm_eps: float = 1e-5
    ):
        super().__init__()
        dim, dropout = encoder.word.embedding_dim, encoder.dropout.p
        self.encoder = encoder
        self.dropout = nn.Dropout(dropout)
        self.mlp = self.norm = None
        if hidden is not None:
            self.mlp = MLP(dim, hidden, dropout, activation=activation, inner_dropout=0.0)
            self.norm = nn.LayerNorm(dim, eps=norm_eps)
        self.out = nn.Linear(dim, 2)

    def forward(self, input_ids: torch.Tensor, valid=None, is_global=None, **inputs) -> torch.Tensor:
        """[B, T] -> [B, T, 2], start and end. As `Encoder.forward`."""
        states = self.encoder(input_ids, valid, is_global, **inputs)
        if self.mlp is not None and self.norm is not None:
            states = self.norm(states + self.mlp(self.dropout(states)))
        return self.out(states)


class SequenceClassifier(nn.Module):
    """Scores of labels for a text, from its first token: [B, T] -> [B, num_labels].

    activation: of a dense layer before the scores; None takes the encoder's pooler instead.
    """

    def __init__(self, encoder: Encoder, num_labels: int, *, activation: str | None = "tanh"):
        super().__init__()
        dim = encoder.word.embedding_dim
        self.encoder = encoder
        self.dropout = nn.Dropout(encoder.dropout.p)
        self.dense = None if activation is None else nn.Linear(dim, dim)
        self.activation = None if activation is None else ACTIVATIONS[activation]
        self.out = nn.Linear(dim, num_labels)

    def forward(self, input_ids: torch.Tensor, valid=None, is_global=None, **inputs) -> torch.Tensor:
        """[B, T] -> [B, num_labels]. As `Encoder.forward`."""
        states = self.encoder(input_ids, valid, is_global, **inputs)
        if self.dense is None or self.activation is None:
            return self.out(self.dropout(self.encoder.pool(states)))
        return self.out(self.dropout(self.activation(self.dense(self.dropout(states[:, 0])))))


class TokenClassifier(nn.Module):
    """Scores of labels for each token: [B, T] -> [B, T, num_labels]."""

    def __init__(self, encoder: Encoder, num_labels: int):
        super().__init__()
        self.encoder = encoder
        self.dropout = nn.Dropout(encoder.dropout.p)
        self.out = nn.Linear(encoder.word.embedding_dim, num_labels)

    def forward(self, input_ids: torch.Tensor, valid=None, is_global=None, **inputs) -> torch.Tensor:
        """[B, T] -> [B, T, num_labels]. As `Encoder.forward`."""
        return self.out(self.dropout(self.encoder(input_ids, valid, is_global, **inputs)))
