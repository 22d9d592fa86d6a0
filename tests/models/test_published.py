"""Models by published configurations as they are trained: what begins where, what learns, what comes out."""

import json

import pytest
import torch

from models.errors import PretrainedError
from models.pretrained import load_pretrained, save_pretrained
from models.published import PublishedModel, copy_to_global

ROBERTA = {
    "model_type": "roberta", "vocab_size": 40, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3,
    "intermediate_size": 20, "hidden_act": "gelu", "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    "max_position_embeddings": 22, "type_vocab_size": 1, "layer_norm_eps": 1e-5, "pad_token_id": 1, "bos_token_id": 0,
    "eos_token_id": 2,
}  # fmt: skip
LONGFORMER = {**ROBERTA, "model_type": "longformer", "attention_window": 4}
BIG_BIRD = {"attention_type": "block_sparse", "block_size": 4, "num_random_blocks": 1, "use_bias": True}
IDS = torch.randint(3, 40, (2, 17), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def source(tmp_path):
    """A folder with a Longformer and a tokenizer file."""
    torch.manual_seed(0)
    model = PublishedModel(config=LONGFORMER).model
    folder = tmp_path / "source"
    save_pretrained(model, folder)
    (folder / "vocab.json").write_text("{}")
    return folder


def learn(model, *, steps=3):
    """Some updates on noise by torch's own AdamW without decay."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        model(IDS).logsumexp(dim=-1).sum().backward()
        optimizer.step()


def test_begins_with_the_weights_of_its_source(source):
    model = PublishedModel(config={}, source=str(source)).eval()
    expected = load_pretrained(source)(IDS)
    assert not torch.allclose(model(IDS), expected)  # built without reading them: a shape is all that is asked for
    model.load_source()
    assert torch.equal(model(IDS), expected)
    assert (model.vocab_size, model.max_positions) == (40, 20)


def test_without_a_source_there_is_nothing_to_begin_with():
    model = PublishedModel(config=ROBERTA)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_source()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_its_configuration_outlives_its_source(source):
    node = PublishedModel.complete({"config": {"attention_window": [2, 6]}, "source": str(source)})
    assert node["config"]["attention_window"] == [2, 6] and node["config"]["hidden_size"] == 12
    for file in source.iterdir():
        file.unlink()
    assert PublishedModel.complete(node) == node
    model = PublishedModel(**node)
    assert [pattern.window for pattern in model.attention_patterns()] == [(1,) * 3, (3,) * 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"config": {}, "source": "/nowhere"}, "is no folder with config.json"),
        ({"config": {}}, "model_type is None"),
        ({"config": {"hidden_sizes": 3}}, "did you mean hidden_size"),
    ],
)
def test_wrong_settings_are_refused(source, options, message):
    if "hidden_sizes" in options["config"]:
        options = {**options, "source": str(source)}
    with pytest.raises(PretrainedError, match=message):
        PublishedModel(**options)


@pytest.mark.parametrize("model_type", ["roberta", "longformer", "big_bird"])
@pytest.mark.parametrize("head", ["masked_lm", "pretraining"])
def test_what_the_loss_does_not_reach_is_not_trained(model_type, head):
    """Several processes would wait for a gradient that never comes."""
    model = PublishedModel(config={**LONGFORMER, **BIG_BIRD, "model_type": model_type}, head=head)
    found = model(IDS)
    sum(part.square().sum() for part in (found if isinstance(found, tuple) else (found,))).backward()
    frozen = ("_global",) if head == "pretraining" else ("_global", "pooler")
    for name, parameter in model.named_parameters():
        reached = parameter.grad is not None
        assert reached == parameter.requires_grad == (not any(part in name for part in frozen)), name
    names = {name for name, _ in model.named_parameters()}
    assert any("_global" in name for name in names) == (model_type == "longformer")
    assert any("pooler" in name for name in names) == (head == "pretraining" or model_type == "big_bird")


def test_only_new_position_rows_learn():
    model = PublishedModel(config=LONGFORMER, train="positions", first_position=8)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    learn(model)
    for name, tensor in model.state_dict().items():
        changed = (tensor != before[name]).flatten(1).any(dim=1) if tensor.dim() > 1 else tensor != before[name]
        if name == "model.encoder.position.weight":
            # two reserved rows, eight old ones; the text has 17 tokens
            assert changed.nonzero().flatten().tolist() == list(range(10, 19))
        else:
            assert not changed.any(), name


def test_first_position_must_lie_in_the_table():
    with pytest.raises(ValueError, match="first_position is 20, it must be at least 0 and below the table's 20"):
        PublishedModel(config=LONGFORMER, train="positions", first_position=20)


def global_projections(model):
    """Weights and biases of the global projections of the last layer, queries, keys, values; and of the local ones."""
    attention = model.encoder.layers[1].attention
    own = [torch.cat([getattr(attention.query_global, part), getattr(attention.key_value_global, part)])
           for part in ("weight", "bias")]  # fmt: skip
    return own, [attention.qkv.weight, attention.qkv.bias]


def make_copies(folder):
    """Turn the global projections of a folder into copies of its local ones, as a conversion does."""
    model = load_pretrained(folder)
    with torch.no_grad():
        for layer in model.encoder.layers:
            copy_to_global(layer.attention)
    save_pretrained(model, folder)


@pytest.mark.parametrize("origin", ["new", "converted", "learned"])
def test_export_is_a_folder_that_loads_with_the_global_weights_it_should_have(source, tmp_path, origin):
    if origin == "converted":
        make_copies(source)
    options = {"config": LONGFORMER} if origin == "new" else {"config": {}, "source": str(source)}
    torch.manual_seed(1)
    model = PublishedModel(**options)
    model.load_source()
    before, _ = global_projections(model)
    learn(model)
    # a run that goes on is not told of its source again
    resumed = PublishedModel(**options)
    resumed.load_state_dict(model.state_dict())
    resumed.export(tmp_path / "out", tokenizer=source)
    loaded = load_pretrained(tmp_path / "out")
    assert torch.equal(loaded(IDS), model.eval()(IDS))
    found, local = global_projections(loaded)
    for one, two, old in zip(found, local, before, strict=True):
        assert torch.equal(one, old if origin == "learned" else two)
        assert not torch.equal(old, two)
    assert (tmp_path / "out" / "vocab.json").exists()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["LongformerForMaskedLM"]


def test_a_model_without_global_projections_is_exported(source, tmp_path):
    model = PublishedModel(config=ROBERTA)
    assert set(model.state_dict()) == {f"model.{name}" for name in model.model.state_dict()}
    model.export(tmp_path / "out", tokenizer=source)
    assert torch.equal(load_pretrained(tmp_path / "out")(IDS), model.eval()(IDS))


def test_attention_is_changed_between_phases():
    model = PublishedModel(config=LONGFORMER)
    model.set_attention(window=[3, 5])
    assert [pattern.window[0] for pattern in model.attention_patterns()] == [3, 5]
    with pytest.raises(ValueError, match="unknown attention option windw, did you mean window"):
        model.set_attention(windw=3)
    dense = PublishedModel(config=ROBERTA)
    assert dense.attention_patterns() == []
    dense.set_attention()
    with pytest.raises(ValueError, match="window: this model's attention has no options that a phase can change"):
        dense.set_attention(window=3)


def test_dropout_of_the_configuration_reaches_the_attention():
    model = PublishedModel(config={**LONGFORMER, "attention_probs_dropout_prob": 0.25})
    assert [layer.dropout for layer in model.attention_layers()] == [0.25, 0.25]


def test_recomputed_blocks_give_the_same_gradients():
    gradients = []
    for recomputed in (False, True):
        torch.manual_seed(1)
        model = PublishedModel(config=LONGFORMER, checkpoint_activations=recomputed).train()
        model(IDS).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.allclose(gradients[0][name], gradients[1][name], rtol=1e-5, atol=1e-6) for name in gradients[0])


def test_what_is_written_may_be_read_by_others(source, tmp_path):
    modes = {(source / name).stat().st_mode & 0o777 for name in ("config.json", "model.safetensors")}
    assert len(modes) == 1 and modes.pop() & 0o044
    (tmp_path / "file").write_text("")
    with pytest.raises(PretrainedError, match="file/below cannot be written: Not a directory"):
        save_pretrained(PublishedModel(config=ROBERTA).model, tmp_path / "file" / "below")
