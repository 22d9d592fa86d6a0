"""What every refusal of a configuration must be like, whatever it says."""

import re

import pytest

from tests.command import run_train


@pytest.fixture
def refused(tmp_path, monkeypatch):
    """`refused("model.dim=0")` is what train.py says to that, which must refuse it before it builds anything."""

    def built(*arguments, **named):
        raise AssertionError("built before the configuration was checked")

    monkeypatch.setattr("tasks.char_lm.load_chars", built)
    monkeypatch.setattr("training.run_dir.create_run_dir", built)

    def message(*arguments: str) -> str:
        ended = run_train(*arguments, cwd=tmp_path)
        assert ended.code == 2, ended
        assert ended.err.startswith("error: ") and ended.out == ""
        assert len(ended.err.splitlines()) <= 2 and "Traceback" not in ended.err
        assert not re.search(r"(?i)append|hydra|(use|with|write|as) '?\+\w", ended.err)
        assert list(tmp_path.iterdir()) == []
        return ended.err.removeprefix("error: ").rstrip("\n")

    return message
