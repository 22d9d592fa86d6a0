"""Use a trained model: python predict.py run_dir=DIR|checkpoint=PATH input=FILE|-|DIR|prompt=TEXT.

A character model continues the text, a masked-language model fills its masks; a published model, checkpoint=FOLDER with
a config.json, fills masks or gives labels, by its head.
"""

import codecs
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from configs.cli import entry

SHOWN = 64  # last bytes of a prompt that are printed and written beside what follows them


def main(cfg) -> None:
    """What the task makes of each input: shown as it comes, or a row of JSON a file; `output` takes the rows."""
    inputs = find_inputs(cfg)
    output = None if cfg.output is None else check_output(Path(cfg.output).expanduser())

    import torch

    from eval import is_published, open_run
    from tasks.prediction import published_answer
    from training.distributed import choose_device
    from training.precision import autocast

    device = choose_device(cfg.device)
    if is_published(cfg.checkpoint):
        if cfg.num_threads:
            torch.set_num_threads(cfg.num_threads)
        answer_texts(inputs, *published_answer(cfg.checkpoint, device=device), output)
        return
    run = open_run(cfg.run_dir, cfg.checkpoint, device=device, strict=cfg.strict, num_threads=cfg.num_threads)
    if hasattr(run.task, "continue_text"):
        continue_texts(cfg, run, inputs, output, device)
        return
    with autocast(run.precision, device):
        answer_texts(inputs, partial(run.task.check, run.model), partial(run.task.answer, run.model), output)


def answer_texts(
    inputs: dict[str, bytes], check: Callable[[str], Any], answer: Callable[[str], dict], output: Path | None
) -> None:
    """A row of JSON for each text, to `output` or stdout; what is said of a single one is shown instead.

    A file is one text, or, a .jsonl, one a line in the field "text". `check` looks at all of them first: where it
    raises DataError, which gets the name of the text, nothing is written.
    """
    from data.errors import DataError

    texts = filled_texts(inputs)
    for name, text in texts:
        try:
            check(text)
        except DataError as error:
            raise DataError(f"{name}: {error}") from None
    for number, (name, text) in enumerate(texts, start=1):
        if len(texts) > 1:
            print(f"{number}/{len(texts)} {name}", file=sys.stderr)
        row = {"input": name, "text": text, **answer(text)}
        if output is not None:
            with output.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        print(json.dumps(row, ensure_ascii=False) if len(texts) > 1 and output is None else shown(row), flush=True)


def filled_texts(inputs: dict[str, bytes]) -> list[tuple[str, str]]:
    """(name, text) of the texts of all inputs; those of white space alone are told on stderr and left out.

    DataError where none is left.
    """
    from data.errors import DataError

    texts = [text for name, content in inputs.items() for text in texts_of(name, content)]
    blank = [name for name, text in texts if not text.strip()]
    if len(blank) == len(texts):
        raise DataError(f"{', '.join(inputs)}: there is no text, only white space")
    if blank:
        print(f"left out, as there is only white space in them: {', '.join(blank)}", file=sys.stderr)
    return [(name, text) for name, text in texts if text.strip()]


def texts_of(name: str, content: bytes) -> list[tuple[str, str]]:
    """(name, text) of the texts in a file; DataError where it is no UTF-8 or a line, which is named, has no text."""
    from data.errors import DataError

    try:
        whole = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{name} is no text: byte {error.start:,} is not UTF-8") from None
    if not name.endswith(".jsonl"):
        return [(name, whole.strip())]
    # not splitlines, which also cuts at marks that JSON has within a text
    lines = [(f"{name}:{number}", line) for number, line in enumerate(whole.split("\n"), 1) if line.strip()]
    return [(place, _text_in(place, line)) for place, line in lines]


def _text_in(place: str, line: str) -> str:
    """The text of a line of a .jsonl."""
    from data.errors import DataError

    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{place}: the line is no JSON ({error})") from None
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise DataError(f"{place}: the line must be an object with a string in the field text")
    return row["text"]


def shown(row: dict) -> str:
    """An answer for people."""
    lines = [str(row[key]) for key in ("filled", "label", "score") if key in row]
    for number, candidates in enumerate(row.get("masks", ()), start=1):
        said = ", ".join(f"{found['token']!r} {found['probability']:.2f}" for found in candidates)
        lines.append(f"  mask {number}: {said}")
    lines += [f"  {found['label']}: {found['probability']:.4f}" for found in row.get("labels", ())]
    lines += [f"  {found['word']}: {found['label']} {found['probability']:.2f}" for found in row.get("words", ())]
    return "\n".join(lines)


def continue_texts(cfg, run, inputs: dict[str, bytes], output: Path | None, device) -> None:
    """Each input continued by a character model: as it comes in the terminal, or a row of JSON a file."""
    from training.errors import NumericsError
    from training.precision import autocast
    from training.signals import Signals

    prompts = prepare(run.task, inputs)
    several = cfg.input is not None and Path(cfg.input).expanduser().is_dir()
    how = {name: cfg[name] for name in ("length", "temperature", "top_k", "top_p", "seed")}
    for number, (name, prompt) in enumerate(prompts.items(), start=1):
        if several:
            print(f"{number}/{len(prompts)} {name}", file=sys.stderr)
        row, added = {"input": name, "prompt": _text(prompt[-SHOWN:])}, bytearray()
        show = added.extend if several else terminal(row["prompt"], added)
        try:
            with autocast(run.precision, device), Signals() as signals, signals.held():
                # looked for between two pieces: thrown anywhere, an interruption may be lost in a library
                run.task.continue_text(run.model, prompt, **how, show=partial(stoppable, show, signals))
        except FloatingPointError as error:
            raise NumericsError(
                f"{run.checkpoint} cannot continue this text: {error}. Take an earlier checkpoint of the run "
                f"(checkpoint={run.path / 'checkpoints'}/step-N), or train it again with a lower learning rate."
            ) from None
        finally:
            # what came before an interruption stays
            row |= {
                "continuation": _text(added),
                "complete": len(added) == cfg.length,
                **how,
                "step": run.state["step"],
            }
            line = json.dumps(row, ensure_ascii=False)
            if not several:
                print(flush=True)
            if output is not None:
                with output.open("a", encoding="utf-8") as file:
                    file.write(line + "\n")
            elif several:
                print(line, flush=True)


def stoppable(show: Callable[[bytes], None], signals, piece: bytes) -> None:
    """Show a piece; Interrupted where a signal came."""
    show(piece)
    if signals.received is not None:
        raise signals.interruption()


def find_inputs(cfg) -> dict[str, bytes]:
    """Name -> text of what is to be continued: the prompt, stdin, a file, or the files of a folder that hold any.

    ConfigError for a file that is not there or cannot be read, DataError where there is no text.
    """
    from configs.schema import ConfigError
    from data.errors import DataError

    if cfg.prompt is not None:
        return {"prompt": cfg.prompt.encode("utf-8", "surrogateescape")}
    if cfg.input == "-":
        texts = {"-": sys.stdin.buffer.read()}
    else:
        path = Path(cfg.input).expanduser()
        if not path.exists():
            raise ConfigError(f"input={cfg.input} does not exist: name a file, a folder, or - for stdin")
        files = sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
        try:
            texts = {str(file): file.read_bytes() for file in files if not file.name.startswith(".")}
        except OSError as error:
            raise ConfigError(f"input={cfg.input}: {error.filename} cannot be read: {error.strerror}") from None
    empty = [name for name, text in texts.items() if not text]
    if len(empty) == len(texts):
        what = f"holds no files ({len(texts)})" if not texts else "is empty (0 bytes)"
        raise DataError(f"input={cfg.input} {what}: there is nothing to continue, give at least one character")
    if empty:
        print(f"left out, as there is nothing in them to continue: {', '.join(empty)}", file=sys.stderr)
    return {name: text for name, text in texts.items() if text}


def check_output(path: Path) -> Path:
    """The path itself; ConfigError where its folder is missing or something lies there already."""
    from configs.schema import ConfigError

    if not path.parent.is_dir():
        raise ConfigError(f"output={path}: there is no folder {path.parent}, make it first")
    if path.exists():
        raise ConfigError(f"output={path} exists already: remove it, or name another file")
    return path


def prepare(task, inputs: dict[str, bytes]) -> dict[str, bytes]:
    """The inputs as the task takes them, each change told on stderr; DataError names the input that it refuses."""
    from data.errors import DataError

    prompts = {}
    for name, text in inputs.items():
        try:
            prompts[name], note = task.prepare_prompt(text)
        except DataError as error:
            raise DataError(f"{name}: {error}") from None
        if note:
            print(f"{name}: {note}", file=sys.stderr)
    return prompts


def terminal(prompt: str, added: bytearray) -> Callable[[bytes], None]:
    """A function that keeps each piece in `added` and shows the characters it completes, after the prompt.

    What is no UTF-8 shows as the replacement character.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    print(prompt, end="", flush=True)

    def show(piece: bytes) -> None:
        added.extend(piece)
        print(decoder.decode(piece), end="", flush=True)

    return show


def _text(text: bytes | bytearray) -> str:
    return text.decode("utf-8", errors="replace")


if __name__ == "__main__":
    entry("predict", main)
