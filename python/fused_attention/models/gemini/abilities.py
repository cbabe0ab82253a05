"""`python -m fused_attention.models.gemini.abilities runs`: train every model of the table, and print it.

    python -m fused_attention.models.gemini.abilities runs                # three seeds, one after the other
    python -m fused_attention.models.gemini.abilities runs --seeds 1      # one of them, in a process of its own
    python -m fused_attention.models.gemini.abilities runs --print-only   # the table of what is there

For each seed: a teacher pretrained on all tasks, then fine-tuned: once to read pictures and clips, once to judge
sentences and go on writing text with the same parameters, once each to compare, to draw and to say. Beside it a model
of text alone, which starts where the judge does and sees as much text; a student of the reader and the same student
without it; the fine-tuned models in 8 bits; and with `--bf16` the teacher and the models made of it, all over again in
bfloat16. A stage whose folder has scores is not run again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from . import distill, quantize, train
from .data.batches import WEIGHTS


class Model(NamedTuple):
    """A fine-tuned model: its tasks, the steps, further options of the training command."""

    tasks: tuple[str, ...]
    steps: int
    options: tuple[str, ...] = ()


MODELS = {
    # A picture of 8 x 8 that is moved by a pixel is quite another: half of them are as in the test.
    "reader": Model(("describe", "transcribe"), 1000, ("--learning-rate", "2e-3", "--moved", "0.5")),
    # Without words between, it learns the training sentences by heart and misjudges three in ten of another shape.
    "judge": Model(("sentiment", "text"), 1000, ("--insertion", "0.15")),
    "comparer": Model(("joint",), 600),
    "drawer": Model(("draw",), 400),
    "speaker": Model(("say",), 150),
}
ABILITIES = {  # task -> what it is called, the least that is asked for
    "describe": ("describe an image", 0.97),
    "transcribe": ("transcribe audio, unseen voices", 0.90),
    "sentiment": ("sentiment, one model with generation", 0.90),
    "joint": ("is the spoken digit the one in the picture", 0.95),
    "draw": ("draw a digit on request", 0.90),
    "say": ("say a digit on request", 0.80),
}
_BASE, _STUDENT = 500, 300  # steps
_BF16 = "-bf16"  # ends the names of models trained in bfloat16
# So much of the judge's training is text.
_TEXT = round(MODELS["judge"].steps * WEIGHTS["text"] / (WEIGHTS["sentiment"] + WEIGHTS["text"]))


class Stage(NamedTuple):
    """One command: its `main`, the folder that it fills, its arguments."""

    main: Callable[[list[str]], None]
    folder: Path
    arguments: list[str]


def stages(root: Path, seed: int, bf16: bool = False) -> Iterator[Stage]:
    """What is trained for one seed, in an order in which everything that a stage starts from is there."""
    at = root / f"seed-{seed}"

    def stage(main: Callable[[list[str]], None], name: str, *arguments: Any) -> Stage:
        return Stage(main, at / name, [str(a) for a in (at / name, "--seed", seed, *arguments)])

    def trained(kind: str, *options: str) -> Iterator[Stage]:
        yield stage(train.main, f"base{kind}", "--steps", _BASE, "--limit", 60, *options)
        for name, m in MODELS.items():
            fine = ("--from", at / f"base{kind}", "--steps", m.steps, "--tasks", *m.tasks, *m.options)
            yield stage(train.main, f"{name}{kind}", *fine, *options)

    yield from trained("")
    for name, m in MODELS.items():
        yield Stage(quantize.main, at / f"{name}-int8", [str(at / name), str(at / f"{name}-int8"), "--tasks", *m.tasks])
    yield stage(train.main, "text", "--from", at / "base", "--steps", _TEXT, "--tasks", "text")
    student = ("--steps", _STUDENT, "--tasks", *MODELS["reader"].tasks, *MODELS["reader"].options)
    yield stage(distill.main, "student", *student, "--teacher", at / "reader")
    yield stage(train.main, "student-alone", *student, "--size", "student")
    if bf16:
        yield from trained(_BF16, "--bf16")


def run(root: Path, seed: int, bf16: bool) -> None:
    for number, stage in enumerate(stages(root, seed, bf16)):
        if not (stage.folder / "scores.json").exists():
            print(f"-- seed {seed}, {number + 1}: {stage.folder.name}", flush=True)
            stage.main(stage.arguments)


Found = dict[str, list[dict[str, Any]]]


def collect(root: Path, seeds: list[int]) -> Found:
    """The scores of every stage, one entry a seed."""
    found: Found = {}
    for seed in seeds:
        for stage in stages(root, seed, bf16=True):
            path = stage.folder / "scores.json"
            if path.exists():
                found.setdefault(stage.folder.name, []).append({"seed": seed, **json.loads(path.read_text())})
    return found


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _together(found: Found, *stages: str) -> list[tuple[dict[str, Any], ...]]:
    """The entries of these stages, for every seed that has all of them."""
    by_seed = [{entry["seed"]: entry for entry in found.get(stage, [])} for stage in stages]
    return [tuple(entries[seed] for entries in by_seed) for seed in by_seed[0] if all(seed in e for e in by_seed)]


def _accuracy(entry: dict[str, Any], tasks: tuple[str, ...]) -> float:
    return _mean([entry["scores"][task] for task in tasks])


def rows(found: Found) -> Iterator[tuple[str, list[float], str]]:
    """Each line of the table: what, its value for every seed that has it, what is asked for."""
    for model, (tasks, *_) in MODELS.items():
        for task in tasks:
            if task in ABILITIES:
                name, least = ABILITIES[task]
                yield name, [e["scores"][task] for (e,) in _together(found, model)], f">= {least:.0%}"
    pairs = _together(found, "judge", "text")
    ratios = [judge["scores"]["text"] / text["scores"]["text"] for judge, text in pairs]
    yield "its perplexity, over that of text alone", ratios, "<= 105%"
    read = MODELS["reader"].tasks
    taught = _together(found, "student", "reader", "student-alone")
    yield "student of the reader: parameters", [s["parameters"] / t["parameters"] for s, t, _ in taught], "<= 25%"
    of_teacher = [_accuracy(s, read) / _accuracy(t, read) for s, t, _ in taught]
    yield "accuracy, of the reader's", of_teacher, ">= 97%"
    more = [_accuracy(s, read) - _accuracy(alone, read) for s, _, alone in taught]
    yield "accuracy, less that without the reader", more, "> 0%"
    for model, (tasks, *_) in MODELS.items():
        name = f"{model}-int8"
        made = [e for (e,) in _together(found, name)]
        yield f"{name}: bytes, of float32's", [e["bytes"][1] / e["bytes"][0] for e in made], "<= 35%"
        for task in [t for t in tasks if t in ABILITIES]:
            yield f"{name}: {task} lost", [e["before"][task] - e["after"][task] for e in made], "<= 1%"
    for model, (tasks, *_) in MODELS.items():
        both = _together(found, model + _BF16, model)
        for task in [t for t in tasks if t in ABILITIES]:
            apart = [narrow["scores"][task] - single["scores"][task] for narrow, single in both]
            yield f"{task}: bfloat16 less float32", apart, "-1% .. 1%"


def show(found: Found) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("ability, on held-out data", "mean", "each seed", "asked")
    for name, values, asked in rows(found):
        if not values:
            continue
        table.add_row(name, f"{_mean(values):.1%}", " ".join(f"{value:.1%}" for value in values), asked)
    Console(width=120).print(table)
    minutes = {
        name: _mean([e["training_seconds"] for e in entries]) / 60
        for name, entries in found.items()
        if "training_seconds" in entries[0]
    }
    print("minutes of training: " + ", ".join(f"{name} {value:.1f}" for name, value in minutes.items()))


def main(arguments: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(prog="python -m fused_attention.models.gemini.abilities", description=__doc__)
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    p.add_argument("folder", type=Path, help="where all models go, or are")
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    p.add_argument("--bf16", action="store_true", help="train all but text and students in bfloat16, too")
    p.add_argument("--print-only", action="store_true", help="train nothing")
    p.add_argument("--json", type=Path, help="write all scores there")
    args = p.parse_args(arguments)
    for seed in [] if args.print_only else args.seeds:
        run(args.folder, seed, args.bf16)
    found = collect(args.folder, args.seeds)
    show(found)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
