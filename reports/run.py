"""The page of one run: `report.html` with its numbers, curves, attention pattern, text and settings.

    python -m reports.run run_dir=runs/default/latest

writes `report.html` (one file, to be opened or sent as it is) and its pictures under `plots/` into the run
folder. A part whose files are missing is left out with a sentence.
"""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from matplotlib.figure import Figure

from configs.saved import flatten
from reports import page
from reports.console import command_path, run_command, take_option
from reports.errors import ReportError
from reports.metrics import (
    format_bytes,
    format_count,
    format_score,
    format_seconds,
    headline_metric,
    is_number,
    number,
)
from reports.pattern_figures import (
    attention_pattern_figure,
    phase_figure,
    receptive_field_figure,
    window_figure,
)
from reports.pattern_numbers import Pattern, pattern_numbers
from reports.run_figures import baseline_figure, baseline_label, training_figure
from reports.run_folder import RunFolder, read_run
from reports.style import render
from reports.summary import prompt_for, scored
from training.files import write_text

MAX_SAMPLE = 4000  # characters of generated text shown per sample
MAX_SAMPLES = 10
MAX_DRAWN = 32_768  # positions of the longest row drawn in the attention pattern


def write_report(run_dir: str | Path, patterns: Sequence[Sequence[Pattern]] | None = None) -> Path:
    """Write `report.html` and `plots/` into a run folder and return the path of the page.

    `patterns` holds one list of layers for every phase of the schedule. Files that are missing or broken
    leave their part out with a sentence. Raises ReportError where `run_dir` is no run folder.
    """
    run = read_run(run_dir)
    phases = _named_phases(run, patterns or [])
    name = str(run.config.get("experiment_name") or "default")
    parts = [
        f"<h1>{page.escape(name)}</h1>",
        _state_line(run),
        _headline(run),
        _training(run),
        *_attention(run, phases),
        _samples(run),
        _commands(run),
        _settings(run),
        _environment(run),
    ]
    if run.problems:
        parts.append(page.section("Could not be read", *(page.paragraph(text) for text in run.problems)))
    path = run.path / "report.html"
    write_text(path, page.document(f"{name}: {run.path.name}", parts))
    return path


def _plot(run: RunFolder, name: str, figure: Figure, description: str, caption: str = "") -> str:
    """Store a figure as plots/<name>.png and .svg and return it as a part of the page."""
    folder = run.path / "plots"
    folder.mkdir(exist_ok=True)
    image = render(figure)
    (folder / f"{name}.png").write_bytes(image)
    (folder / f"{name}.svg").write_bytes(render(figure, "svg"))
    return page.picture(image, description, caption)


def _phase_settings(run: RunFolder) -> list[dict[str, Any]]:
    schedule = run.config.get("schedule")
    phases = schedule.get("phases") if isinstance(schedule, dict) else None
    phases = [dict(phase) for phase in phases if isinstance(phase, dict)] if isinstance(phases, list) else []
    limit = flatten(schedule).get("cap.seq_len")  # lies over every phase
    for phase in phases:
        if isinstance(limit, int) and isinstance(phase.get("seq_len"), int):
            phase["seq_len"] = min(phase["seq_len"], limit)
    return phases


def _named_phases(run: RunFolder, patterns: Sequence[Sequence[Pattern]]) -> dict[str, Sequence[Pattern]]:
    return {f"phase {index + 1}": layers for index, layers in enumerate(patterns) if layers}


def _state_line(run: RunFolder) -> str:
    status = {key: value for key, value in run.status.items() if key != "status" and value not in (None, "")}
    shown = " · ".join(f"{key} {value}" for key, value in status.items() if not isinstance(value, dict | list))
    state = f'<span class="state">{page.escape(run.state)}</span>'
    name = run.path.absolute().name
    return f'<p>{state} <span class="muted">{page.escape(name)} {page.escape(shown)}</span></p>'


def _headline(run: RunFolder) -> str:
    result = run.result
    if not result:
        text = "No result yet: result.json is written by the final test, when the run has finished."
        return page.section("Result", page.paragraph(text), _last_line(run))
    items = []
    metric = headline_metric(result)
    value = number(result[metric.name]) if metric else None
    if metric:
        items.append((format_score(value), f"{result.get('split', 'test')} {metric.label}", ""))
    readable: list[tuple[str, str, Callable[[float], str]]] = [
        ("num_parameters", "parameters", format_count),
        ("tokens_per_second", "tokens per second in training", _whole),
        ("peak_memory_bytes", "peak memory", format_bytes),
        ("train_seconds", "training time", format_seconds),
        ("step", "steps", _whole),
    ]
    items += [(show(result[key]), label, "") for key, label, show in readable if is_number(result.get(key))]
    data = flatten(result["data"]) if isinstance(result.get("data"), dict) else {}
    dataset = result.get("dataset") or data.get("dataset")
    if dataset:
        items.append((str(dataset), "data set", ""))
    parts = [page.cards(items), page.paragraph(_protocol(result), muted=True)]
    baselines = result.get("baselines")
    if metric and isinstance(baselines, dict) and baselines:
        # beside the scores stands how many training bytes the baselines were given
        used = baselines.get("train_bytes_used")
        note = f"The baselines were given {used:,} bytes of the training split." if is_number(used) else ""
        scores = {name: score for name, score in baselines.items() if not name.startswith("train_bytes")}
        if value is not None and math.isfinite(value):
            figure = baseline_figure(metric, value, scores)
            parts.append(_plot(run, "baselines", figure, "score of the model beside the baselines", note))
        parts.append(page.table([(baseline_label(name), _shown(score)) for name, score in scores.items()]))
    shown = {key for key, _, _ in readable} | {"baselines", "data", "dataset"}
    rest = {key: value for key, value in result.items() if key not in shown}
    rest |= {f"data.{key}": value for key, value in data.items()}
    parts.append(page.details("all numbers of result.json", page.table(rest)))
    if run.evaluations:
        rows = [(name, _one_line(numbers)) for name, numbers in run.evaluations.items()]
        parts.append(page.details("evaluations (eval/)", page.table(rows)))
    return page.section("Result", *parts)


def _shown(score: Any) -> str:
    return format_score(score) if is_number(score) else str(score)


def _whole(value: float) -> str:
    return f"{value:,.0f}"


def _protocol(result: Mapping[str, Any]) -> str:
    """How the score was taken, in one sentence."""
    said = []
    if scored(result):
        said.append(f"{scored(result)} scored")
    if is_number(result.get("share")):
        said.append(f"{result['share']:.4g} of the split" if result["share"] < 1 else "the whole split")
    for key, label in (("context", "context"), ("stride", "stride"), ("receptive_field", "receptive field")):
        if is_number(result.get(key)):
            said.append(f"{label} {result[key]:,}")
    if isinstance(result.get("protocol"), str):
        said.append(f"{result['protocol']} protocol")
    return ", ".join(said) + "." if said else ""


def _one_line(numbers: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{key} {value:.6g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in numbers.items()
        if not isinstance(value, dict | list)
    )


def _last_line(run: RunFolder) -> str:
    if not run.train:
        return ""
    return page.paragraph(f"Last logged step: {_one_line(run.train[-1])}.", muted=True)


def _training(run: RunFolder) -> str:
    if not run.train and not run.valid:
        return page.section("Training", page.paragraph("metrics.jsonl holds no logged step yet."))
    labels = {
        index: f"phase {index + 1} (length {phase['seq_len']:,})"
        for index, phase in enumerate(_phase_settings(run))
        if isinstance(phase.get("seq_len"), int)
    }
    figure = training_figure(run.train, run.valid, labels)
    caption = "Faint: logged steps; line: centred mean over a fortieth of them; the first steps are cut off."
    return page.section("Training", _plot(run, "loss", figure, "loss over training steps", caption))


def _attention(run: RunFolder, phases: Mapping[str, Sequence[Pattern]]) -> list[str]:
    if not phases:
        text = "No attention patterns were given, or the model has none; `python -m reports.run` rebuilds them."
        return [page.section("Attention", page.paragraph(text))]
    settings, last = _phase_settings(run), list(phases.values())[-1]
    length = settings[-1].get("seq_len") if settings else None
    length = length if isinstance(length, int) and length > 0 else 1024
    numbers = pattern_numbers(last, min(length, MAX_DRAWN))
    side = "to the left" if numbers["causal"] else "on each side"
    windows = [_plot(run, "windows", window_figure(last), "window, dilation and reach of every layer")]
    if len(phases) > 1:
        windows[0:0] = [_plot(run, "phases", phase_figure(phases), "window of every layer in every phase")]
        windows.insert(1, page.paragraph("The last phase:", muted=True))
    pattern_caption = (
        f"At {numbers['seq_len']:,} positions: {numbers['pairs']:,} query-key pairs, "
        f"{numbers['share_of_dense']:.2%} of dense attention."
    )
    pattern = attention_pattern_figure(last, numbers["seq_len"])
    evaluation = run.config.get("eval")
    context = evaluation.get("context") if isinstance(evaluation, dict) else None
    lengths = {"training length": length, "evaluation context": context if isinstance(context, int) else 0}
    field_caption = (
        f"Positions {side} of a query that can reach it: {numbers['receptive_field']:,} after all layers; "
        f"{numbers['dead']:,} positions inside the field are unreached (dilation)."
    )
    field = receptive_field_figure(phases, lengths)
    return [
        page.section("Window and dilation by layer", *windows),
        page.section("Attention pattern", _plot(run, "pattern", pattern, "keys every query sees", pattern_caption)),
        page.section("Receptive field", _plot(run, "receptive_field", field, "reach by layer", field_caption)),
    ]


def _samples(run: RunFolder) -> str:
    if not run.samples:
        return page.section("Generated text", page.paragraph("No samples yet: samples/ holds no text."))
    shown = []
    for name, text in list(run.samples.items())[:MAX_SAMPLES]:
        cut = f"\n[… {len(text) - MAX_SAMPLE:,} more characters]" if len(text) > MAX_SAMPLE else ""
        shown.append((name, page.preformatted(text[:MAX_SAMPLE] + cut, wrap=True)))
    (first_name, first), *older = shown
    return page.section(
        "Generated text",
        page.paragraph(first_name, muted=True),
        first,
        *(page.details(*sample) for sample in older),
    )


def _commands(run: RunFolder) -> str:
    path = f"run_dir={command_path(run.path)}"
    overrides = [override for override in run.overrides if not override.startswith("run_dir=")]
    lines = [("The same run again", "train.py", *overrides)]
    if run.state != "finished":
        lines.append(("on with this one", "train.py", *overrides, path))
    lines.append(("its evaluation", "eval.py", path, "split=test"))
    if run.result:
        lines.append(("a text to try it on", "predict.py", path, f"prompt={prompt_for(run.result)}"))
    lines.append(("its patterns", "-m", "reports.pattern", path))
    return page.section(
        "Commands",
        page.paragraph("; ".join(line[0] for line in lines) + ":", muted=True),
        page.preformatted("\n".join(shlex.join(("python", *line[1:])) for line in lines), wrap=True),
    )


def _settings(run: RunFolder) -> str:
    given = page.preformatted("\n".join(run.overrides)) if run.overrides else page.paragraph("No overrides.")
    # lists on one line: a window for every layer and head is long enough
    text = yaml.safe_dump(run.config, sort_keys=False, default_flow_style=None, width=100, allow_unicode=True)
    config = page.preformatted((text if run.config else run.config_text).rstrip())
    return page.section("Settings", given, page.details("config.yaml (everything, resolved)", config))


def _environment(run: RunFolder) -> str:
    if not run.env:
        return page.section("Environment", page.paragraph("env.json is missing."))
    rows = [(key, " ".join(map(str, value)) if isinstance(value, list) else value) for key, value in
            flatten(run.env).items() if value not in (None, [], "")]  # fmt: skip
    return page.section("Environment", page.details("versions, machine, commit", page.table(rows)))


def main(arguments: Sequence[str]) -> None:
    """The command; raises errors with an `exit_code` for what the user can mend."""
    arguments = list(arguments)
    if "-h" in arguments or "--help" in arguments:
        print(__doc__)
        return
    run_dir = take_option(arguments, "run_dir")
    if run_dir is None or arguments:
        wrong = f"{arguments[0]} is unknown" if arguments else "run_dir= is missing"
        raise ReportError(f"{wrong}; usage: python -m reports.run run_dir=DIR")
    read_run(run_dir)  # a path that is no run folder is refused before anything is built
    from configs.run import load_run
    from reports.pattern import patterns_by_phase

    patterns = patterns_by_phase(load_run(run_dir))
    try:
        print(f"report: {write_report(run_dir, patterns)}")
    except OSError as error:
        raise ReportError(f"the report of {run_dir} cannot be written: {error}") from error


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
