"""Which keys a query sees under an experiment's attention or a named pattern, as a picture and as exact numbers.

    python -m reports.pattern experiment=enwik8_small
    python -m reports.pattern experiment=enwik8_small phase=0 seq_len=512 output=first.png
    python -m reports.pattern model.attention.window=[16,32,64,64] --json
    python -m reports.pattern run_dir=runs/default/latest

Takes the overrides of train.py, or `run_dir=DIR` for the settings of a run. `phase=i` (from 0) picks a phase
of the schedule, by default the last; `seq_len=N` is the row that is drawn and counted, by default the length
of that phase; `output=FILE.png|.svg` is where the picture goes, by default `pattern.png` in the current folder or
under `plots/` of the run; `--json` prints the numbers alone.

A pattern without an experiment, a colour for each of its parts:

    python -m reports.pattern pattern=window window=8 dilation=[1,2] global=[0,20] seq_len=64
    python -m reports.pattern pattern=bigbird seq_len=1024 block_size=64 num_heads=4 compat=hf_train head=1
    python -m reports.pattern pattern=mask file=mask.npy block_size=64 output=mask.svg

    full      seq_len causal
    window    window dilation global causal num_heads seq_len   a number or one a head; global=[positions]
    bigbird   seq_len block_size num_heads num_random_blocks seed compat=tf|hf_train|hf_eval
              max_position_embeddings global_blocks=ends|front full_when_short head
    etc       seq_len block_size num_heads num_global_blocks
    uniform   seq_len block_size num_heads num_random_blocks seed window front back head
    mask      file=FILE.npy|.csv (blocks x blocks or heads x blocks x blocks, true or how often) block_size seq_len head
    nystrom   seq_len num_landmarks

`seq_len` and `block_size` are in tokens, `window`, `front` and `back` of uniform in blocks; `head=i` is the one drawn.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reports.console import console, take_option
from reports.errors import ReportError
from reports.pattern_numbers import Pattern, index_label, layer_runs, pattern_numbers, receptive_field
from reports.pattern_options import whole_number

__all__ = ["main", "patterns_by_phase", "pattern_numbers", "print_numbers", "receptive_field"]

MAX_SEQ_LEN = 2**20  # the row is held as bits and walked once a layer


def patterns_by_phase(config: Any) -> list[list[Pattern]]:
    """The attention patterns of the model of a checked config, one list of layers for every phase."""
    from configs.phases import effective_phases, phase_patterns

    return phase_patterns(config, effective_phases(config))


def print_numbers(numbers: Mapping[str, Any], patterns: Sequence[Pattern]) -> None:
    """The numbers of `pattern_numbers` as a table; neighbouring layers with equal patterns share a line."""
    from rich.table import Table

    direction = "to the left" if numbers["causal"] else "on each side"
    table = Table(title=f"row of {numbers['seq_len']:,} positions, {numbers['num_heads']} heads")
    for name in ("layers", "window", "dilation"):
        table.add_column(name, justify="left" if name == "layers" else "right")
    for name in ("reach", "receptive field", "gaps", "unreached", "pairs", "share of dense"):
        table.add_column(name, justify="right")
    for first, last in layer_runs(patterns):
        layer = numbers["layers"][last]
        pairs = sum(numbers["layers"][index]["pairs"] for index in range(first, last + 1))
        table.add_row(
            index_label("layer", range(first, last + 1)).split(" ", 1)[1],
            _values(layer["window"]),
            _values(layer["dilation"]),
            f"{layer['reach']:,}",
            f"{layer['receptive_field']:,}",
            f"{layer['gaps']:,}",
            f"{layer['dead']:,}",
            f"{pairs:,}",
            f"{layer['share_of_dense']:.2%}",
        )
    out = console()
    out.print(table)
    out.print(
        f"reach, receptive field: positions {direction} (the field of the last layer of the line); "
        f"gaps: positions within the layer's reach that no head sees; unreached: positions within the field "
        f"that no path through the layers reaches (query {numbers['query']:,})."
    )
    out.print(
        f"[bold]{numbers['pairs']:,} query-key pairs[/bold], {numbers['share_of_dense']:.2%} of dense; "
        f"receptive field [bold]{numbers['receptive_field']:,}[/bold] positions {direction}, "
        f"{numbers['dead']:,} of them unreached."
    )


def _values(values: Sequence[int]) -> str:
    """[32, 32, 32, 64] -> "32 (heads 0–2), 64 (head 3)"."""
    if len(set(values)) == 1:
        return f"{values[0]:,}"
    heads: dict[int, list[int]] = {}
    for head, value in enumerate(values):
        heads.setdefault(value, []).append(head)
    return ", ".join(f"{value:,} ({index_label('head', group)})" for value, group in heads.items())


def _choose(arguments: list[str], run_dir: str | None) -> Any:
    if run_dir is None:
        from configs.compose import compose_config

        return compose_config(arguments)
    if arguments:
        raise ReportError(
            f"{arguments[0]}: with run_dir= the settings of the run are shown; only phase=, seq_len=, "
            "output= and --json go with it"
        )
    from configs.run import load_run

    return load_run(run_dir)


def main(arguments: Sequence[str]) -> None:
    """The command; raises errors with an `exit_code` for what the user can mend."""
    arguments = list(arguments)
    if "-h" in arguments or "--help" in arguments:
        print(__doc__)
        return
    as_json = "--json" in arguments
    arguments = [argument for argument in arguments if argument != "--json"]
    kind = take_option(arguments, "pattern")
    if kind is not None:
        _named(kind, arguments, as_json)
        return
    options = {name: take_option(arguments, name) for name in ("run_dir", "output", "seq_len", "phase")}
    output = _picture(options["output"] or _default_output(options["run_dir"]))
    config = _choose(arguments, options["run_dir"])
    from configs.phases import effective_phases

    phases = patterns_by_phase(config)
    if not phases or not phases[-1]:
        raise ReportError(
            "this model has no window attention, there is no pattern to show; others are shown by name, as "
            "pattern=bigbird or pattern=nystrom"
        )
    last = len(phases) - 1
    phase = last if options["phase"] is None else whole_number(options["phase"], "phase", 0, last)
    patterns = phases[phase]
    seq_len = min(effective_phases(config)[phase].seq_len, MAX_SEQ_LEN)
    if options["seq_len"] is not None:
        seq_len = whole_number(options["seq_len"], "seq_len", 1, MAX_SEQ_LEN)
    numbers = {"phase": phase, "num_phases": len(phases), **pattern_numbers(patterns, seq_len)}
    if as_json and options["output"] is None:
        print(json.dumps(numbers))
        return
    from reports.pattern_figures import attention_pattern_figure
    from reports.style import label_text, save_figure

    title = f"{label_text(config.experiment_name)}, phase {phase + 1} of {len(phases)}"
    save_figure(attention_pattern_figure(patterns, seq_len, title=title), output)
    if as_json:
        print(json.dumps({**numbers, "picture": str(output)}))
        return
    print_numbers(numbers, patterns)
    print(f"picture: {output}")


def _named(kind: str, arguments: list[str], as_json: bool) -> None:
    from reports.pattern_named import drawing

    given = take_option(arguments, "output")
    output = _picture(given or "pattern.png")
    named = drawing(kind, arguments)
    if as_json and given is None:
        print(json.dumps({"pattern": kind, **named.numbers}))
        return
    from reports.style import save_figure

    save_figure(named.draw(), output)
    if as_json:
        print(json.dumps({"pattern": kind, **named.numbers, "picture": str(output)}))
        return
    named.show()
    print(f"picture: {output}")


def _picture(path: str | Path) -> Path:
    path = Path(path)
    if path.suffix.lower() not in (".png", ".svg"):
        raise ReportError(f"output={path}: the picture is a .png or an .svg file")
    return path


def _default_output(run_dir: str | None) -> Path:
    return Path(run_dir, "plots", "pattern.png") if run_dir else Path("pattern.png")


if __name__ == "__main__":
    from configs.cli import outcome

    sys.exit(outcome(lambda: main(sys.argv[1:])))
