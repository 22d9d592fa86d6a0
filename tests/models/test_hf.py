"""Generation: the text of a plain loop over whole forward passes, at a cost a token that does not grow."""

import pytest
import torch

from models import hf
from tests.models.test_char_lm import POSITIONS
from tests.models.tiny import VOCAB, text, tiny_model


@torch.no_grad()
def by_whole_passes(model, prompt, length, seed=0, temperature=0.0, top_k=None, top_p=None):
    """The same tokens, everything computed anew for each."""
    ids = prompt.tolist()
    torch.manual_seed(seed)
    for _ in range(length):
        logits = model(torch.tensor([ids]))[0, -1].float()
        if temperature == 0:
            ids.append(int(logits.argmax()))
            continue
        order = logits.argsort(descending=True)
        cumulative = torch.softmax(logits[order] / temperature, -1).cumsum(-1)
        kept = VOCAB if top_k is None else top_k
        if top_p is not None:
            kept = int((cumulative < top_p).sum()) + 1
        logits = logits / temperature
        logits[order[kept:]] = -torch.inf
        ids.append(int(torch.multinomial(torch.softmax(logits, -1), 1)))
    return ids[len(prompt) :]


@pytest.mark.parametrize("how", [{"temperature": 0.0}, {"temperature": 0.7}], ids=["greedy", "drawn"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_output_that_is_not_finite_is_an_error(how, value):
    model = tiny_model(window=4).eval()
    with torch.no_grad():
        model.embed.weight[3] = value
    assert len(hf.generate(model, torch.tensor([1]), length=1, num_symbols=3, **how)) == 1  # what is not taken may be
    with pytest.raises(FloatingPointError, match="not finite"):
        hf.generate(model, torch.tensor([1]), length=1, **how)


@POSITIONS
@pytest.mark.parametrize(
    "how",
    [{"temperature": 0.0}, {"temperature": 0.7}, {"temperature": 1.3, "top_k": 3}, {"temperature": 1.0, "top_p": 0.6}],
    ids=["greedy", "drawn", "top_k", "top_p"],
)
@pytest.mark.parametrize("prompt_len", [1, 50])
def test_text_is_that_of_whole_forward_passes(positions, how, prompt_len):
    model = tiny_model(window=[3, 9, 4], dilation=[1, [1, 1, 3, 2], 2], positions=positions).eval()
    prompt = text(prompt_len, batch=1)[0]
    expected = by_whole_passes(model, prompt, 40, seed=5, **how)
    shown = []
    found = hf.generate(model, prompt, length=40, seed=5, show=shown.append, **how)
    assert found.tolist() == expected == shown


def test_a_long_prompt_is_read_in_pieces(monkeypatch):
    model = tiny_model().eval()
    whole = hf.generate(model, text(90, batch=1)[0], length=20, temperature=0)
    monkeypatch.setattr(hf, "PIECE", 7)
    assert torch.equal(hf.generate(model, text(90, batch=1)[0], length=20, temperature=0), whole)


def test_each_token_is_computed_once():
    model, given = tiny_model().eval(), []
    model.register_forward_pre_hook(lambda module, inputs: given.append(inputs[0].shape[1]))
    hf.generate(model, text(30, batch=1)[0], length=25)
    assert given == [30] + [1] * 24


def test_the_seed_decides_and_the_global_generator_is_left_alone():
    model = tiny_model(loud=False).eval()
    prompt = text(5, batch=1)[0]
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, again, other = (hf.generate(model, prompt, length=30, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_what_is_shown_stays_when_it_is_interrupted():
    shown = []

    def stop(token):
        shown.append(token)
        if len(shown) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hf.generate(tiny_model().eval(), text(5, batch=1)[0], length=30, show=stop)
    assert len(shown) == 4


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match=r"prompt must be \[T\] with at least one token, got \(0,\)"):
        hf.generate(tiny_model(), torch.zeros(0, dtype=torch.int64), length=3)


def test_tokens_beyond_the_symbols_are_never_taken():
    """A model may have room for more than a byte can say."""
    model = tiny_model().eval()
    free = hf.generate(model, text(30, batch=1)[0], length=60, temperature=5.0)
    assert free.max() >= 5
    assert hf.generate(model, text(30, batch=1)[0], length=60, temperature=5.0, num_symbols=5).max() < 5
