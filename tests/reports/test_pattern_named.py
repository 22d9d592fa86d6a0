"""`python -m reports.pattern pattern=...`: a name and its options in, picture and numbers out; what is refused."""

import itertools
import json

import numpy as np
import pytest

from kernels.block_sparse_attention import BlockPattern
from reports.errors import ReportError
from reports.pattern import main
from reports.pattern_named import drawing
from reports.style import render
from tests.helpers import run_python

SMALL = ["seq_len=1024", "block_size=64", "num_heads=2"]
KINDS = {
    "full": ["seq_len=16"],
    "window": ["window=4", "dilation=[1,3]", "global=[0,20]"],
    "bigbird": SMALL,
    "etc": [*SMALL, "num_global_blocks=2"],
    "uniform": [*SMALL, "num_random_blocks=2", "window=5", "front=0", "back=2"],
    "nystrom": ["seq_len=100", "num_landmarks=8"],
}


def numbers_of(capsys, *arguments):
    main([*arguments, "--json"])
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("suffix", ["png", "svg"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_drawn_and_printed(kind, suffix, tmp_path, capsys):
    target = tmp_path / "new folder" / f"{kind}.{suffix}"
    main([f"pattern={kind}", *KINDS[kind], f"output={target}"])
    out = capsys.readouterr().out
    assert f"picture: {target}" in out and "of dense" in out
    assert target.read_bytes()[:5] in (b"\x89PNG\r", b"<?xml")


@pytest.mark.parametrize("kind", KINDS)
def test_equal_input_gives_equal_files(kind):
    first, second = (render(drawing(kind, list(KINDS[kind])).draw(), "svg") for _ in range(2))
    assert first == second


@pytest.mark.parametrize("kind", KINDS)
def test_labels_do_not_overlap(kind):
    figure = drawing(kind, list(KINDS[kind])).draw()
    figure.draw_without_rendering()
    texts = [axes.title for axes in figure.axes if axes.get_visible() and axes.get_title()]
    texts += [label for axes in figure.axes for label in axes.get_yticklabels() if axes.get_visible()]
    texts += [text for text in (figure._suptitle, figure._supxlabel, *figure.legends) if text]
    boxes = [text.get_window_extent() for text in texts if text.get_visible()]
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))


def test_options_reach_the_pattern(capsys):
    options = ["num_random_blocks=2", "seed=5", "compat=hf_train", "max_position_embeddings=1024"]
    found = numbers_of(capsys, "pattern=bigbird", *SMALL, *options)
    pattern = BlockPattern.bigbird(1024, 64, 2, 2, seed=5, compat="hf_train", max_position_embeddings=1024)
    columns = pattern.counts(16).numpy().sum(1) * 64
    longest = {head: row["longest_ordinary_column"] for row in found["heads"] for head in row["heads"]}
    assert [longest[head] for head in range(2)] == columns[:, 1:-1].max(1).tolist()
    assert found["pattern"] == "bigbird" and found["pairs"] == sum(pattern.num_pairs(1024))
    front = numbers_of(capsys, "pattern=bigbird", *SMALL, "global_blocks=front")
    pattern = BlockPattern.bigbird(1024, 64, 2, global_blocks="front")
    assert front["pairs"] == sum(pattern.num_pairs(1024)) != found["pairs"]
    short = numbers_of(capsys, "pattern=bigbird", "seq_len=700", "num_heads=1", "full_when_short=true")
    assert short["share_of_dense"] == 1.0 and short["layers_to_all"] == 1
    etc = numbers_of(capsys, "pattern=etc", *SMALL, "num_global_blocks=3")
    assert etc["pairs"] == sum(BlockPattern.etc(1024, 64, 2, 3).num_pairs(1024))
    options = {"num_random_blocks": 2, "seed": 3, "window": 5, "front": 0, "back": 2}
    uniform = numbers_of(capsys, "pattern=uniform", *SMALL, *(f"{name}={value}" for name, value in options.items()))
    pattern = BlockPattern.uniform(1024, 64, 2, **options)
    assert uniform["pairs"] == sum(pattern.num_pairs(1024))
    assert uniform["heads"][0]["fewest_keys"] == pattern.counts(16)[0].sum(1).min() * 64


def test_a_row_holds_four_times_the_reach_and_every_global_token(capsys):
    found = numbers_of(capsys, "pattern=window", "window=64", "dilation=[1,2]", "global=[0,5]")
    assert (found["seq_len"], found["num_heads"], found["reach"], found["global"]) == (512, 2, 128, [0, 5])
    assert numbers_of(capsys, "pattern=window", "window=1", "global=[70]")["seq_len"] == 128


def test_head_is_chosen():
    images = {}
    for head in range(2):
        axes = drawing("bigbird", [*SMALL, f"head={head}"]).draw().axes
        images[head] = [np.asarray(panel.images[0].get_array()) for panel in axes]
    counts = BlockPattern.bigbird(1024, 64, 2).counts(16).numpy()
    for head, panels in images.items():
        assert ((panels[-1] < 1).any(-1) == (counts[head] > 0)).all()
        # the last panel shows the three before it
        assert ((panels[-1] < 1).any(-1) == sum((panel < 1).any(-1) for panel in panels[:-1]).astype(bool)).all()


@pytest.mark.parametrize("num_heads", [None, 3])
@pytest.mark.parametrize("name", ["mask.npy", "mask.csv"])
def test_masks_from_files(name, num_heads, tmp_path, capsys):
    mask = np.random.default_rng(0).integers(0, 3, (num_heads or 1, 7, 7))
    path = tmp_path / name
    if name.endswith(".npy"):
        np.save(path, mask if num_heads else mask[0] > 0)
        mask = mask if num_heads else (mask > 0).astype(int)
    else:
        mask = mask[:1]
        np.savetxt(path, mask[0], fmt="%d", delimiter=",")
    found = numbers_of(capsys, "pattern=mask", f"file={path}", "block_size=4")
    assert (found["seq_len"], found["num_heads"]) == (28, len(mask))
    assert found["pairs"] == mask.sum() * 16
    assert numbers_of(capsys, "pattern=mask", f"file={path}", "block_size=4", "seq_len=25")["seq_len"] == 25


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (np.ones((3, 4), bool), "it holds 3 x 4 entries, expected blocks x blocks or heads x blocks x blocks"),
        (np.full((3, 3), 0.5), "it holds float64 entries, expected true and false, or how often"),
        (-np.eye(3, dtype=int), "mask holds -1"),
        (np.array([[{}]]), "allow_pickle"),
    ],
    ids=["shape", "numbers", "negative", "objects"],
)
def test_masks_that_are_none(entries, message, tmp_path):
    np.save(tmp_path / "mask.npy", entries)
    with pytest.raises(ReportError, match=message):
        drawing("mask", [f"file={tmp_path / 'mask.npy'}"])


@pytest.mark.parametrize("name", ["empty.npy", "words.csv", "missing.npy", "mask.txt"])
def test_files_that_hold_no_mask(name, tmp_path):
    if name != "missing.npy":
        (tmp_path / name).write_text("a,b\nc,d\n" if name == "words.csv" else "")
    with pytest.raises(ReportError, match=f"^file={tmp_path / name}: "):
        drawing("mask", [f"file={tmp_path / name}"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pattern=bigbrid"], "pattern=bigbrid: expected one of full, window, bigbird, etc, uniform, mask, nystrom, "
                              "did you mean bigbird?"),
        (["pattern=window", "windw=3"], "windw=3: pattern=window has no option windw, did you mean window? (window, "
                                        "dilation, global, causal, num_heads, seq_len)"),
        (["pattern=window", "phase=1"], "phase=1: pattern=window has no option phase (window, dilation, global, "
                                        "causal, num_heads, seq_len)"),
        (["pattern=window", "window"], "window: expected window=value"),
        (["pattern=window", "window=-1"], "window=-1: expected whole numbers from 0 to 1,048,576, such as [1,2]"),
        (["pattern=window", "dilation=[1,0]"],
         "dilation=[1,0]: expected whole numbers from 1 to 1,048,576, such as [1,2]"),
        (["pattern=window", "window=[1,2]", "dilation=[1,2,3]"],
         "pattern=window: window has 2 entries for 3 heads: [1, 2]"),
        (["pattern=window", "seq_len=64", "global=[0,64]"],
         "global=64: with seq_len=64 positions go from 0 to 63"),
        (["pattern=window", "causal=yes"], "causal=yes: expected one of true, false"),
        (["pattern=bigbird", "compat=hf_tran"],
         "compat=hf_tran: expected one of tf, hf_train, hf_eval, did you mean hf_train?"),
        (["pattern=bigbird", "num_heads=0"], "num_heads=0: expected a whole number from 1 to 1,024"),
        (["pattern=bigbird", "head=12"], "head=12: heads go from 0 to 11"),
        (["pattern=bigbird", "seq_len=1048576"],
         "seq_len=1048576: 16,384 blocks in 12 heads are too many to count, the limit is 2,364, 151,296 tokens"),
        (["pattern=mask"], "pattern=mask: file= is missing, a .npy or .csv file with a row of entries for each block"),
        (["pattern=full", "output=full.gif"], "output=full.gif: the picture is a .png or an .svg file"),
    ],
)  # fmt: skip
def test_bad_options_name_value_limit_and_the_nearest_choice(arguments, message):
    with pytest.raises(ReportError) as error:
        main(arguments)
    assert str(error.value) == message


def test_refusals_of_the_builders_are_passed_on():
    """The released code has no pattern for 9 to 11 blocks."""
    with pytest.raises(ReportError, match="^pattern=bigbird: seq_len is .* blocks"):
        drawing("bigbird", ["seq_len=640", "compat=tf"])


@pytest.mark.slow
def test_command_ends_in_one_line_and_code_2(tmp_path):
    done = run_python("-m", "reports.pattern", "pattern=unifrom", f"output={tmp_path}/pattern.png")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "did you mean uniform?" in done.stderr
    done = run_python("-m", "reports.pattern", "pattern=etc", *SMALL, f"output={tmp_path}/pattern.png")
    assert done.returncode == 0 and (tmp_path / "pattern.png").is_file()
