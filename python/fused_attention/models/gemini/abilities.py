"""`python -m fused_attention.models.gemini.abilities runs`: train every model of the table, and print it.

    python -m fused_attention.models.gemini.abilities runs                # three seeds, one after the other
    python -m fused_attention.models.gemini.abilities runs --seeds 1      # one of them, in a process of its own
    python -m fused_attention.models.gemini.abilities runs --print-only   # the table of what is there

For each seed: a teacher pretrained on all tasks, then fine-tuned once to answer (texts from pictures, clips and
sentences, with generation of text beside it: one set of parameters) and once to draw and say; a model of text alone
that starts where the teacher's answers start and sees as much text; a student with and without the teacher, and with
`--bf16` the latter in bfloat16; both fine-tuned models in 8 bits. A stage whose folder has scores is not run again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from . import distill, quantize, train
from .data.batches import WEIGHTS

ANSWERS = ("describe", "transcribe", "sentiment", "joint", "text")
MEDIA = ("draw", "say")
ABILITIES = {  # task -> what it is called, the least that is asked for
    "describe": ("describe an image", 0.97),
    "transcribe": ("transcribe audio, unseen voices", 0.90),
    "sentiment": ("sentiment, one model with generation", 0.90),
    "joint": ("is the spoken digit the one in the picture", 0.95),
    "draw": ("draw a digit on request", 0.90),
    "say": ("say a digit on request", 0.80),
}
_BASE, _ANSWERS, _MEDIA, _STUDENT = 800, 1000, 700, 1500  # steps
# So much of the answers' training is text.
_TEXT = round(_ANSWERS * WEIGHTS["text"] / sum(WEIGHTS[task] for task in ANSWERS))


class Stage(NamedTuple):
    """One command: its `main`, the folder that it fills, its arguments."""

    main: Callable[[list[str]], None]
    folder: Path
    arguments: list[str]


def stages(root: Path, seed: int, bf16: bool = False) -> Iterator[Stage]:
    """What is trained for one seed, in an order in which everything that a stage starts from is there."""
    at = root / f"seed-{seed}"
    same = ["--seed", str(seed)]
    fine = [*same, "--from", str(at / "base"), "--learning-rate", "1e-3"]

    def stage(main: Callable[[list[str]], None], name: str, *arguments: Any, before: tuple[Path, ...] = ()) -> Stage:
        return Stage(main, at / name, [str(a) for a in (*before, at / name, *arguments)])

    yield stage(train.main, "base", *same, "--steps", _BASE, "--learning-rate", "1e-3", "--limit", 60)
    yield stage(train.main, "answers", *fine, "--steps", _ANSWERS, "--tasks", *ANSWERS)
    yield stage(train.main, "media", *fine, "--steps", _MEDIA, "--tasks", *MEDIA)
    yield stage(train.main, "text", *fine, "--steps", _TEXT, "--tasks", "text")
    student = [*same, "--steps", _STUDENT, "--learning-rate", "2e-3", "--tasks", *ANSWERS]
    yield stage(distill.main, "student", *student, "--teacher", at / "answers")
    yield stage(train.main, "student-alone", *student, "--size", "student")
    if bf16:
        yield stage(train.main, "student-alone-bf16", *student, "--size", "student", "--bf16")
    yield stage(quantize.main, "answers-int8", "--tasks", *ANSWERS, before=(at / "answers",))
    yield stage(quantize.main, "media-int8", "--tasks", *MEDIA, before=(at / "media",))


def run(root: Path, seed: int, bf16: bool) -> None:
    for number, stage in enumerate(stages(root, seed, bf16)):
        if not (stage.folder / "scores.json").exists():
            print(f"-- seed {seed}, {number + 1}: {stage.folder.name}", flush=True)
            stage.main(stage.arguments)


def collect(root: Path, seeds: list[int]) -> dict[str, list[dict[str, Any]]]:
    """The scores of every stage, one entry a seed."""
    found: dict[str, list[dict[str, Any]]] = {}
    for seed in seeds:
        for stage in stages(root, seed, bf16=True):
            path = stage.folder / "scores.json"
            if path.exists():
                found.setdefault(stage.folder.name, []).append({"seed": seed, **json.loads(path.read_text())})
    return found


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _score(found: dict[str, list[dict[str, Any]]], stage: str, task: str, key: str = "scores") -> list[float]:
    return [entry[key][task] for entry in found[stage]]


def rows(found: dict[str, list[dict[str, Any]]]) -> Iterator[tuple[str, list[float], str]]:
    """Each line of the table: what, its value for every seed, what is asked for."""
    for task, (name, least) in ABILITIES.items():
        yield name, _score(found, "answers" if task in ANSWERS else "media", task), f">= {least:.0%}"
    pairs = zip(_score(found, "answers", "text"), _score(found, "text", "text"), strict=True)
    yield "perplexity, over that of the model of text alone", [ours / alone for ours, alone in pairs], "<= 1.05"
    answered = [task for task in ANSWERS if task in ABILITIES]

    def answers(stage: str, key: str = "scores") -> list[float]:
        """The mean accuracy of the answers, for every seed."""
        return [_mean(list(values)) for values in zip(*(_score(found, stage, t, key) for t in answered), strict=True)]

    teacher, student, alone = answers("answers"), answers("student"), answers("student-alone")
    sizes = [s["parameters"] / t["parameters"] for s, t in zip(found["student"], found["answers"], strict=True)]
    yield "student's share of the parameters", sizes, "<= 25%"
    yield "student's accuracy, of the teacher's", [s / t for s, t in zip(student, teacher, strict=True)], ">= 97%"
    yield (
        "student's accuracy less that of one without teacher",
        [s - a for s, a in zip(student, alone, strict=True)],
        "> 0",
    )
    for stage, tasks in (("answers-int8", answered), ("media-int8", MEDIA)):
        lost = [
            [b - a for b, a in zip(*(_score(found, stage, t, k) for k in ("before", "after")), strict=True)]
            for t in tasks
        ]
        yield f"{stage}: bytes, of float32's", [e["bytes"][1] / e["bytes"][0] for e in found[stage]], "<= 35%"
        yield f"{stage}: the most that an ability lost", [max(column) for column in zip(*lost, strict=True)], "<= 1%"
    if "student-alone-bf16" in found:
        for task in answered:
            by_seed = {entry["seed"]: entry["scores"][task] for entry in found["student-alone"]}
            apart = [e["scores"][task] - by_seed[e["seed"]] for e in found["student-alone-bf16"]]
            yield f"student in bfloat16 less float32: {task}", apart, "-1% .. 1%"


def show(found: dict[str, list[dict[str, Any]]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("ability, on held-out data", "mean", "each seed", "asked")
    for name, values, asked in rows(found):
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
    p.add_argument("--bf16", action="store_true", help="also a student in bfloat16; slow where a processor has none")
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
