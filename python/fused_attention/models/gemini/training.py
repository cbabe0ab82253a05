"""The training loop: AdamW, a cosine schedule, gradient clipping, checkpoints that go on as if nothing had happened.

Step i takes batch i of a source that is a function of (seed, i): a run that stops and resumes sees the same batches.
`accelerate` brings mixed precision and, under `accelerate launch`, several processes (DDP, FSDP), each with its share.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from torch import Tensor, nn

from .precision import bfloat16_products

Batch = dict[str, Tensor]
Losses = dict[str, Tensor]


@dataclass(frozen=True)
class Recipe:
    """How to train.

    steps: optimizer steps in all; the learning rate warms up over `warmup` of them and falls to `floor` times its peak.
    weight_decay: of matrices; vectors (norms, biases) have none.
    clip: the largest gradient norm.
    precision: "no" (float32) or "bf16" (autocast; parameters and optimizer stay float32).
    """

    steps: int = 1500
    learning_rate: float = 2e-3
    warmup: int = 50
    floor: float = 0.05
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float = 1.0
    seed: int = 0
    precision: str = "no"
    save_every: int = 500

    def rate(self, step: int) -> float:
        """The learning rate of a step, as a fraction of its peak."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.floor + (1.0 - self.floor) * 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0)))


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW in two groups: matrices with weight decay, everything else without."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, recipe.learning_rate, recipe.betas, foreach=True)


class Trainer:
    """Trains `model` on `batches(step, rank)`; `losses(model, batch)` gives "loss" and whatever else is to be logged.

    folder: where checkpoints, the log (log.json, one entry a step) and the plot of the losses go.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        batches: Callable[[int, int], Batch],
        losses: Callable[[nn.Module, Batch], Losses],
        folder: Path,
    ) -> None:
        set_seed(recipe.seed)
        self.recipe, self.batches, self.losses, self.folder = recipe, batches, losses, folder
        AcceleratorState._reset_state()  # a process may train several models, each in its own precision
        self.accelerator = Accelerator(mixed_precision=recipe.precision, cpu=not torch.cuda.is_available())
        optimizer = make_optimizer(model, recipe)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self._products = bfloat16_products if recipe.precision == "bf16" else contextlib.nullcontext
        self.step = 0
        self.log: list[dict[str, float]] = []

    @property
    def plain_model(self) -> Any:
        """The model without what several processes wrap around it."""
        return self.accelerator.unwrap_model(self.model)

    def run(self, until: int | None = None, show: bool = True) -> None:
        """Train up to step `until` (default: all of them), saving on the way."""
        from rich.progress import Progress, TextColumn, TimeRemainingColumn

        last = self.recipe.steps if until is None else min(until, self.recipe.steps)
        columns = (*Progress.get_default_columns()[:3], TimeRemainingColumn(), TextColumn("{task.fields[loss]}"))
        hidden = not show or not self.accelerator.is_main_process
        with Progress(*columns, disable=hidden) as progress:
            task = progress.add_task("training", total=last, completed=self.step, loss="")
            while self.step < last:
                entry = self.one_step()
                progress.update(task, completed=self.step, loss=f"loss {entry['loss']:.3f}")
                if self.step % self.recipe.save_every == 0 or self.step == last:
                    self.save()

    def one_step(self) -> dict[str, float]:
        """One batch, one update; returns what was logged."""
        start = time.perf_counter()
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.learning_rate * self.recipe.rate(self.step)
        batch = self.batches(self.step, self.accelerator.process_index)
        batch = {name: t.to(self.accelerator.device) for name, t in batch.items()}
        with self._products():
            with self.accelerator.autocast():
                found = self.losses(self.model, batch)
            self.accelerator.backward(found["loss"])
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        entry = {name: float(t.detach()) for name, t in found.items()}
        if not math.isfinite(entry["loss"]):
            raise FloatingPointError(f"the loss of step {self.step} is {entry['loss']}")
        entry |= {"step": self.step, "gradient_norm": float(norm), "seconds": time.perf_counter() - start}
        self.log.append(entry)
        return entry

    # --- on disk ------------------------------------------------------------------------------------------------------

    @property
    def _checkpoint(self) -> Path:
        return self.folder / "checkpoint"

    def save(self) -> None:
        """Model, optimizer, random numbers and log: everything that the next step depends on; then the loss plot."""
        self.accelerator.save_state(str(self._checkpoint), safe_serialization=True)
        if self.accelerator.is_main_process:
            state = {"step": self.step, "recipe": asdict(self.recipe), "log": self.log}
            (self._checkpoint / "trainer.json").write_text(json.dumps(state))
            (self.folder / "log.json").write_text(json.dumps(self.log, indent=1) + "\n")
            draw_losses(self.log, self.folder / "loss.png")

    def resume(self) -> bool:
        """Go on from the folder's checkpoint, if it has one; the next steps are bit-equal to those of a run that
        never stopped.

        Raises:
            ValueError: it was made with another recipe.
        """
        path = self._checkpoint / "trainer.json"
        if not path.exists():
            return False
        state = json.loads(path.read_text())
        ours = json.loads(json.dumps(asdict(self.recipe)))
        if state["recipe"] != ours:
            other = {k: (v, ours.get(k)) for k, v in state["recipe"].items() if ours.get(k) != v}
            raise ValueError(f"{path}: made with another recipe, (then, now): {other}")
        self.accelerator.load_state(str(self._checkpoint))
        self.step, self.log = state["step"], state["log"]
        return True


def draw_losses(log: list[dict[str, float]], path: Path) -> None:
    """Every loss against the step, smoothed over about a fiftieth of the run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4))
    names = dict.fromkeys(name for entry in log for name in entry if name.endswith("loss"))
    width = max(1, len(log) // 50)
    for name in names:
        points = [(entry["step"], entry[name]) for entry in log if name in entry]
        chunks = [points[i : i + width] for i in range(0, len(points), width)]
        x = [chunk[-1][0] for chunk in chunks]
        y = [sum(value for _, value in chunk) / len(chunk) for chunk in chunks]
        axis.plot(x, y, label=name.replace("_", " "))
    axis.set(xlabel="step", ylabel="loss", yscale="log")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
