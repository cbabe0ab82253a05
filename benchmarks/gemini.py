"""The multimodal model with our attention and with attn_implementation="eager": the same weights, the same batches.

    python -m benchmarks.gemini [--seconds 10] [--json PATH]

Prints, for a batch of examples and for longer text: the largest error of the logits against float64, beside eager's;
the time of a training step and its extra memory at the peak; and tokens generated per second, one sequence, eight, and
five beams, greedily. Calls are taken in turn; a ratio above 1 says that ours is faster, or takes less.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fused_attention.bench.machine import describe, extra_memory
from fused_attention.bench.timing import take_turns
from fused_attention.models.gemini import GeminiForConditionalGeneration, teacher_config

OURS, EAGER = "fused_attention", "eager"
NEW = 48  # tokens of a generation
TEXTS = {"32 x 40": (32, 40), "4 x 480": (4, 480)}  # sequences x tokens
GENERATIONS: dict[str, tuple[int, dict[str, Any]]] = {
    "one sequence": (1, {}),
    "eight sequences": (8, {}),
    "five beams": (1, {"num_beams": 5, "no_repeat_ngram_size": 2, "early_stopping": True}),
}
Models = dict[str, GeminiForConditionalGeneration]
Row = dict[str, Any]


def make_models() -> Models:
    torch.manual_seed(0)
    model = GeminiForConditionalGeneration(teacher_config(1024))
    found = {OURS: model, EAGER: copy.deepcopy(model)}
    found[EAGER].set_attn_implementation(EAGER)
    return found


def make_batch(size: int, tokens: int) -> dict[str, Tensor]:
    """Texts of different lengths, padded on the right; the first half of them has a picture in front."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(11, 1024, (size, tokens), generator=generator)
    half = size // 2
    ids[:half, 1:7] = torch.tensor([3, 7, 7, 7, 7, 4])
    lengths = torch.randint(tokens // 2, tokens + 1, (size, 1), generator=generator)
    mask = (torch.arange(tokens) < lengths).long()
    labels = ids.masked_fill(mask == 0, -100)
    pixels = torch.rand(half, 1, 8, 8, generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "pixel_values": pixels}


def errors(models: Models, batch: dict[str, Tensor]) -> dict[str, float]:
    """The largest error of a logit that is no padding's, against eager float64."""
    exact_model = copy.deepcopy(models[EAGER]).double()
    seen = batch["attention_mask"].bool()
    with torch.no_grad():
        exact = exact_model(**{**batch, "pixel_values": batch["pixel_values"].double()}).logits[seen]
        return {name: float((m(**batch).logits[seen] - exact).abs().max()) for name, m in models.items()}


def training(models: Models, batch: dict[str, Tensor], seconds: float) -> Row:
    def step(model: GeminiForConditionalGeneration) -> Callable[[], None]:
        def run() -> None:
            model.zero_grad()
            loss = model(**batch).loss
            assert loss is not None
            loss.backward()

        return run

    runs: dict[str, Callable[[], object]] = {name: step(model.train()) for name, model in models.items()}
    times = take_turns(runs, seconds, torch.device("cpu"))
    memory = {name: extra_memory(run) for name, run in runs.items()}
    return {"seconds": {name: t.median for name, t in times.items()}, "bytes": memory}


def generation(models: Models, size: int, options: dict[str, Any], seconds: float) -> Row:
    ids = torch.randint(11, 1024, (size, 12), generator=torch.Generator().manual_seed(2))

    def make(model: GeminiForConditionalGeneration) -> Callable[[], Tensor]:
        model.eval()
        return lambda: model.generate(ids, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, **options)

    runs = {name: make(model) for name, model in models.items()}
    assert torch.equal(*(run() for run in runs.values())), "other tokens than eager's"
    times = take_turns(dict(runs), seconds, torch.device("cpu"))
    return {"seconds": {name: t.median for name, t in times.items()}}


def show(name: str, row: Row, table: Table) -> None:
    seconds = row["seconds"]
    table.add_row(name, *(f"{1e3 * seconds[n]:.0f} ms" for n in (OURS, EAGER)), f"{seconds[EAGER] / seconds[OURS]:.2f}")
    memory = row.get("bytes")
    if memory and None not in memory.values():
        texts = (f"{memory[n] / 2**20:.1f} MiB" for n in (OURS, EAGER))
        table.add_row(f"{name}: memory", *texts, f"{memory[EAGER] / memory[OURS]:.2f}")


def main() -> None:
    p = argparse.ArgumentParser(prog="python -m benchmarks.gemini", description=__doc__)
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    p.add_argument("--seconds", type=float, default=10.0, help="of each row")
    p.add_argument("--json", type=Path)
    args = p.parse_args()
    models = make_models()
    found: dict[str, Any] = {"machine": describe(torch.device("cpu"))}
    table = Table("", OURS, EAGER, "ratio")
    for name, sizes in TEXTS.items():
        batch = make_batch(*sizes)
        error = errors(models, batch)
        table.add_row(f"logits of {name}: error", *(f"{error[n]:.1e}" for n in (OURS, EAGER)), "")
        found[f"training {name}"] = training(models, batch, args.seconds) | {"error": error}
        show(f"training step, {name}", found[f"training {name}"], table)
    for name, (size, options) in GENERATIONS.items():
        found[name] = row = generation(models, size, options, args.seconds)
        row["tokens_per_second"] = {n: size * NEW / s for n, s in row["seconds"].items()}
        show(f"{size * NEW} tokens, {name}", row, table)
    Console(width=110).print(table)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
