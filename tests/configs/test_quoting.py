"""Paths and texts reach the configuration as they were typed, whatever letters they hold."""

import pytest

from configs.compose import compose_config, open_keys

TEXTS = [
    "runs/plain",
    "~/a b",
    "ü b",
    "a'b",
    "a\\'b",
    "x\\",
    "a,b",
    "(x)",
    "[1",
    'it\'s, "really"',
    "{a",
    "two\\\\ slashes",
    "#!;&",
    "a=b",
    "zażółć 'x'\\",
]


@pytest.mark.fault(38)
@pytest.mark.parametrize("text", TEXTS)
def test_a_path_is_taken_as_typed(text):
    assert compose_config([f"run_dir={text}"]).run_dir == text


def test_quotes_of_the_user_and_null_stay():
    assert open_keys(["run_dir='a b'", "run_dir=null", 'run_dir="c"']) == [
        "run_dir='a b'",
        "run_dir=null",
        'run_dir="c"',
    ]


def test_several_paths_of_data_stay_a_sweep():
    assert open_keys(["data.path=a.txt,b.txt", "run_dir=a,b"]) == ["data.path=a.txt,b.txt", "run_dir='a,b'"]
