"""kill -9 inside the writing of a checkpoint never costs the one before."""

import json

import pytest

from tests.helpers import run_python


@pytest.mark.fault(1)
@pytest.mark.slow
def test_kills_inside_a_write_never_lose_the_checkpoint_before(tmp_path, soak):
    num_kills = 20 if soak else 3
    done = run_python("-m", "tests.checkpoint_kills", "random", tmp_path, num_kills, OMP_NUM_THREADS="1")
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sum(line.startswith("kill ") for line in done.stdout.splitlines()) == num_kills


# (newest found at once, after the sweep, number of things swept, target of latest, names at the end)
EXPECTED = {
    "before the manifest": (2, 2, 1, "step-2", ["best.json", "latest", "step-1", "step-2"]),
    "in the manifest": (2, 2, 1, "step-2", ["best.json", "latest", "step-1", "step-2"]),
    "before the rename": (2, 2, 1, "step-2", ["best.json", "latest", "step-1", "step-2"]),
    "before the link": (3, 3, 0, "step-2", ["best.json", "latest", "step-1", "step-2", "step-3"]),
    "before the mark of the best": (3, 3, 1, "step-3", ["best.json", "latest", "step-2", "step-3"]),
    "before a removal": (3, 3, 1, "step-3", ["best.json", "latest", "step-2", "step-3"]),
    "in a removal": (3, 3, 1, "step-3", ["best.json", "latest", "step-2", "step-3"]),
    "in a replacement": (1, 2, 1, "step-2", ["best.json", "latest", "step-1", "step-2"]),
}


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """What a process leaves that dies at each of the points, by point."""
    folder = tmp_path_factory.mktemp("killed")
    done = run_python("-m", "tests.checkpoint_kills", "points", folder, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout + done.stderr
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    return {report["point"]: report for report in reports}


@pytest.mark.fault(1)
@pytest.mark.fault(2)
@pytest.mark.parametrize("point", EXPECTED)
def test_a_kill_between_two_steps_of_a_write_leaves_a_sound_newest(killed, point):
    report = killed[point]
    found = tuple(report[key] for key in ("found", "after_sweep", "swept", "link", "names"))
    assert found == EXPECTED[point]
