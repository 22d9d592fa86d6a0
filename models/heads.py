"""Heads on an encoder: models that take what `Encoder` takes and give logits."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.encoder import Encoder, init_bert_weights
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
        self.dense.apply(init_bert_weights)

    def forward(self, input_ids: Tensor, valid=None, is_global=None, **inputs) -> Tensor:
        """[B, T] -> [B, T, V]; with `logit_positions` [B, P] at those alone, [B, P, V]. As `Encoder.forward`."""
        return self.logits(self.encoder(input_ids, valid, is_global, **inputs))

    def logits(self, states: Tensor) -> Tensor:
        """States [..., M] -> scores of the vocabulary [..., V]."""
        return F.linear(self.norm(self.activation(self.dense(states))), self.encoder.word.weight, self.bias)


class Pretraining(MaskedLM):
    """`MaskedLM`, and how two sentences belong together (next sentence, sentence order): two logits of the pooler's."""

    def __init__(self, encoder: Encoder, *, activation: str = "gelu", norm_eps: float = 1e-5):
        super().__init__(encoder, activation=activation, norm_eps=norm_eps)
        self.relationship = nn.Linear(_dim(encoder), 2)
        self.relationship.apply(init_bert_weights)

    def forward(
        self, input_ids: Tensor, valid=None, is_global=None, *, logit_positions: Tensor | None = None, **inputs
    ) -> tuple[Tensor, Tensor]:
        """[B, T] -> ([B, T, V], [B, 2]); with `logit_positions` [B, P] the first is [B, P, V]. As `Encoder.forward`."""
        states = self.encoder(input_ids, valid, is_global, **inputs)
        relationship = self.relationship(self.encoder.pool(states))
        if logit_positions is not None:
            states = states.take_along_dim(logit_positions[..., None], dim=1)
        return self.logits(states), relationship


class TokenClassifier(nn.Module):
    """A linear layer over each token: [B, T] -> [B, T, L].

    dropout: before it.
    """

    def __init__(self, encoder: Encoder, num_labels: int, *, dropout: float = 0.0):
        super().__init__()
        self.encoder = encoder
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(_dim(encoder), num_labels)
        self.out.apply(init_bert_weights)

    def forward(self, input_ids: Tensor, valid=None, is_global=None, **inputs) -> Tensor:
        """[B, T] -> [B, T, L]; with `logit_positions` [B, P] at those alone, [B, P, L]. As `Encoder.forward`."""
        return self.out(self.dropout(self.encoder(input_ids, valid, is_global, **inputs)))


class SpanQA(nn.Module):
    """Scores of each token as the first and as the last of an answer: [B, T] -> [B, T, 2].

    Args:
        hidden: width of a feed-forward layer with a residual sum and LayerNorm before the scores (BigBird), whose
            activation, norm_eps and dropout (before it and after it) the next three are; None for no such layer.
        question_end: id of the separator that ends the question, which opens the text. Then scores up to it, the first
            token's aside, are lowered by a million, and where no token types are given they are 0 up to it and 1 behind
            (transformers' BigBird). None does neither.
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        hidden: int | None = None,
        activation: str = "gelu",
        norm_eps: float = 1e-5,
        dropout: float = 0.0,
        question_end: int | None = None,
    ):
        super().__init__()
        dim = _dim(encoder)
        self.encoder, self.question_end = encoder, question_end
        self.mlp = self.norm = None
        if hidden is not None:
            self.mlp = MLP(dim, hidden, dropout, activation=activation, inner_dropout=0.0)
            self.norm = nn.LayerNorm(dim, eps=norm_eps)
            self.mlp.apply(init_bert_weights)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(dim, 2)
        self.out.apply(init_bert_weights)

    def forward(
        self,
        input_ids: Tensor,
        valid=None,
        is_global=None,
        *,
        token_type_ids: Tensor | None = None,
        logit_positions: Tensor | None = None,
        **inputs,
    ) -> Tensor:
        """[B, T] -> [B, T, 2]; with `logit_positions` [B, P] at those alone, [B, P, 2]. As `Encoder.forward`."""
        in_question = None
        if self.question_end is not None:
            in_question = self._in_question(input_ids)
            token_type_ids = (~in_question).long() if token_type_ids is None else token_type_ids
        inputs |= {"token_type_ids": token_type_ids, "logit_positions": logit_positions}
        states = self.encoder(input_ids, valid, is_global, **inputs)
        if self.mlp is not None and self.norm is not None:
            states = self.norm(self.mlp(self.dropout(states)) + states)
        logits = self.out(states)
        if in_question is None:
            return logits
        lowered = in_question & (torch.arange(input_ids.shape[1], device=input_ids.device) > 0)
        if logit_positions is not None:
            lowered = lowered.take_along_dim(logit_positions, dim=1)
        return logits - 1e6 * lowered[..., None]

    def _in_question(self, input_ids):
        """[B, T] -> [B, T] bool: up to the first separator, that included; the first token where there is none."""
        last = (input_ids == self.question_end).int().argmax(dim=1, keepdim=True)
        return torch.arange(input_ids.shape[1], device=input_ids.device) <= last


class SequenceClassifier(nn.Module):
    """Scores of a whole text from its first token: [B, T] -> [B, L].

    Args:
        activation: of a dense layer of its own with dropout before it (RoBERTa: "tanh"); None for the encoder's pooler
            without (BERT).
        dropout: before that layer and before the scores.
    """

    def __init__(self, encoder: Encoder, num_labels: int, *, activation: str | None = None, dropout: float = 0.0):
        super().__init__()
        dim = _dim(encoder)
        self.encoder = encoder
        self.activation = None if activation is None else ACTIVATIONS[activation]
        self.dense = None if activation is None else nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(dim, num_labels)
        for own in (self.dense, self.out):
            if own is not None:
                own.apply(init_bert_weights)

    def forward(
        self, input_ids: Tensor, valid=None, is_global=None, *, token_type_ids=None, position_ids=None
    ) -> Tensor:
        """[B, T] -> [B, L]; as `Encoder.forward`."""
        states = self.encoder(input_ids, valid, is_global, token_type_ids=token_type_ids, position_ids=position_ids)
        if self.dense is None or self.activation is None:
            pooled = self.encoder.pool(states)
        else:
            pooled = self.activation(self.dense(self.dropout(states[:, 0])))
        return self.out(self.dropout(pooled))


class MultipleChoice(SequenceClassifier):
    """A score for each of several texts, one for each answer to choose from: [B, C, T] -> [B, C].

    activation, dropout: as in `SequenceClassifier`.
    """

    def __init__(self, encoder: Encoder, *, activation: str | None = None, dropout: float = 0.0):
        super().__init__(encoder, 1, activation=activation, dropout=dropout)

    def forward(self, input_ids: Tensor, valid=None, is_global=None, **inputs) -> Tensor:
        """[B, C, T] -> [B, C]; every input has that shape, else as `SequenceClassifier.forward`."""
        flat = {name: _flat(tensor) for name, tensor in inputs.items()}
        scores = super().forward(input_ids.flatten(0, 1), _flat(valid), _flat(is_global), **flat)
        return scores.view(input_ids.shape[:2])


class Retrieval(nn.Module):
    """Whether two texts belong together, from the first tokens x, y of both: [B, 2, T] -> [B, L].

    A layer over [x, y, x * y, x - y] (mlpen/Nystromformer, LRA), ReLU, a layer for the scores; both texts go through
    one encoder, neither sees the other.

    hidden: width of the layer between.
    """

    def __init__(self, encoder: Encoder, num_labels: int, *, hidden: int):
        super().__init__()
        self.encoder = encoder
        self.up = nn.Linear(4 * _dim(encoder), hidden)
        self.out = nn.Linear(hidden, num_labels)
        for own in (self.up, self.out):
            own.apply(init_bert_weights)

    def forward(
        self, input_ids: Tensor, valid=None, is_global=None, *, token_type_ids=None, position_ids=None
    ) -> Tensor:
        """[B, 2, T] -> [B, L]; every input has that shape, else as `Encoder.forward`."""
        if input_ids.dim() != 3 or input_ids.shape[1] != 2:
            raise ValueError(f"input_ids must be [B, 2, T], two texts each, got {tuple(input_ids.shape)}")
        flat = {"token_type_ids": _flat(token_type_ids), "position_ids": _flat(position_ids)}
        states = self.encoder(input_ids.flatten(0, 1), _flat(valid), _flat(is_global), **flat)
        x, y = states[:, 0].unflatten(0, (-1, 2)).unbind(1)
        return self.out(F.relu(self.up(torch.cat([x, y, x * y, x - y], dim=-1))))


class Candidates(nn.Module):
    """A score of each token as a mention of the answer: [B, T] -> [B, T]; `candidate_scores` turns them into answers.

    One linear layer without bias, as in WikiHop's script (arXiv 2004.05150, section 5.1).
    """

    def __init__(self, encoder: Encoder):
        super().__init__()
        self.encoder = encoder
        self.out = nn.Linear(_dim(encoder), 1, bias=False)
        self.out.apply(init_bert_weights)

    def forward(self, input_ids: Tensor, valid=None, is_global=None, **inputs) -> Tensor:
        """[B, T] -> [B, T]; with `logit_positions` [B, P] at those alone, [B, P]. As `Encoder.forward`."""
        return self.out(self.encoder(input_ids, valid, is_global, **inputs)).squeeze(-1)


def candidate_scores(scores: Tensor, candidate_index: Tensor, num_candidates: int) -> Tensor:
    """Scores of tokens [B, T] -> of candidates [B, C]: the mean over a candidate's mentions, -inf where it has none.

    Args:
        candidate_index: [B, T] int64, the candidate, 0 to C - 1, that a token is a mention of, -1 for any other token.
            Chunks of one text that repeat its candidates are averaged when they stand side by side in one row.

    Raises:
        ValueError: shapes that differ.
    """
    if scores.shape != candidate_index.shape:
        raise ValueError(f"scores are {tuple(scores.shape)}, candidate_index is {tuple(candidate_index.shape)}")
    place = candidate_index + 1  # the first column is for tokens that mention none
    sums = scores.new_zeros(len(scores), num_candidates + 1).scatter_add(1, place, scores)
    counts = torch.zeros_like(sums).scatter_add(1, place, torch.ones_like(scores))
    means = sums / counts.clamp(min=1.0)
    return means.masked_fill(counts == 0, -torch.inf)[:, 1:]


def _dim(encoder):
    return encoder.word.weight.shape[1]


def _flat(tensor):
    """[B, C, ...] -> [B * C, ...]; None stays."""
    return None if tensor is None else tensor.flatten(0, 1)
