"""Names of the Hugging Face hub: of a model no more is fetched than is asked for."""

import shutil
from fnmatch import fnmatch

import huggingface_hub
import pytest

from models.errors import PretrainedError
from models.pretrained import load_pretrained, save_pretrained
from models.published import PublishedModel
from models.tokenizer import load_tokenizer
from tests.corpus import write_tokenizer
from tests.models.test_published import IDS, LONGFORMER

NAME = "somebody/longformer"
VOCABULARY = {"vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"}


@pytest.fixture
def fetched(tmp_path, monkeypatch):
    """Names of the files that a hub with one model has given; its cache is a folder `cache`."""
    hub, cache, names = tmp_path / "hub", tmp_path / "cache", []
    save_pretrained(PublishedModel(config=LONGFORMER).model, hub, tokenizer=write_tokenizer(tmp_path))

    def snapshot_download(name, *, allow_patterns):
        assert name == NAME
        cache.mkdir(exist_ok=True)
        for file in hub.iterdir():
            if any(fnmatch(file.name, pattern) for pattern in allow_patterns):
                shutil.copy(file, cache / file.name)
                names.append(file.name)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return names


def test_a_configuration_is_checked_before_any_weights_come(fetched):
    node = PublishedModel.complete({"config": {}, "source": NAME})
    assert fetched == ["config.json"] and node["config"]["hidden_size"] == 12
    model = PublishedModel(**node)
    assert fetched == ["config.json"]
    model.load_source()
    assert "model.safetensors" in fetched
    assert model.eval()(IDS).equal(load_pretrained(NAME)(IDS))


def test_a_tokenizer_comes_without_weights(fetched, tmp_path):
    tokenizer = load_tokenizer(NAME)
    assert set(fetched) == {"config.json", *VOCABULARY}
    assert tokenizer.encode(["Paris lies in France."]) == load_tokenizer(tmp_path / "hub").encode(
        ["Paris lies in France."]
    )


def test_an_export_takes_the_tokenizer_of_a_hub_name_along(fetched, tmp_path):
    model = PublishedModel(config={}, source=NAME)
    model.load_source()
    model.export(tmp_path / "out", tokenizer=NAME)
    assert load_tokenizer(tmp_path / "out").digest == load_tokenizer(NAME).digest


def test_a_folder_that_is_missing_is_no_name(tmp_path):
    with pytest.raises(PretrainedError, match="missing is no folder with tokenizer files"):
        load_tokenizer(tmp_path / "missing")
