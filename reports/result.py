"""What a run leaves behind when its model is trained and tested: result.json, a sample, the report."""

import logging
from typing import Any

import reports.run
from reports.summary import closing
from training.evaluation import write_evaluation
from training.files import write_text
from training.numerics import check_score

log = logging.getLogger(__name__)


def write_result(folder: Any, task: Any, model: Any, result: dict, patterns: list, tracker: Any) -> str:
    """Add baselines and a sample to `result`, write it with the report into the run folder; returns the closing words.

    folder: `training.run_dir.RunDir`; patterns: of each phase, a list with one pattern a layer. Raises NumericsError
    for a score that is not finite, when the two files that hold it are written.
    """
    step = result["step"]
    result = {**result, "baselines": task.baselines(result["split"], result["share"])}
    _, kept = write_evaluation(folder, result)
    folder.write_json("result.json", result)
    check_score(result, task.metric, folder.path)
    sample = _sample(task, model)
    (folder.path / "samples").mkdir(exist_ok=True)
    write_text(folder.path / "samples" / f"step-{step}.txt", sample)
    tracker.text("sample", sample, step)
    tracker.log({f"test/{task.metric}": result[task.metric]}, step)
    folder.status("finished", step=step)
    report = reports.run.write_report(folder.path, patterns)
    for picture in sorted((folder.path / "plots").glob("*.png")):
        tracker.image(picture.stem, picture, step)
    said = [f"the evaluation of this step with other settings is kept as {kept}"] if kept else []
    return "\n".join([*said, closing(result, task.metric, sample, folder.path, report)])


def _sample(task: Any, model: Any) -> str:
    """What the model writes; a failure there costs the sample, not the result."""
    try:
        return task.sample(model)
    except Exception as error:  # generation runs through somebody else's loop
        log.warning("no sample was generated: %s: %s", type(error).__name__, error)
        return ""
