"""Swap the attention of an ordinary torch.nn.TransformerEncoder with one call, and measure what changed.

The model reads scikit-learn's handwritten digits (1,797 real pictures of 8 x 8 pixels) as a scanner delivers
them: each line of pixels is a token, and up to two of the eight lines have not arrived yet: they are padding.

1. the logits of a trained model before and after the swap, beside torch's own float32 error;
2. training with torch's attention and with ours from the same seed: the loss curve and the accuracy;
3. the time per training step of both, taken in turns;
4. the peak memory of both at a long sequence, each in a process of its own;
5. which kernel ran, and why the others did not.

    python examples/replace_mha.py [--quick] [--device cpu|cuda] [--output DIR]
"""

from __future__ import annotations

import argparse
import copy
import math
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn, track
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import fused_attention

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  (after the choice of its backend)

LINES, PIXELS, CLASSES = 8, 8, 10
WIDTH, HEADS, LAYERS = 64, 4, 2
FEWEST_LINES, TEST_PICTURES = 6, 360
BATCH, LEARNING_RATE = 64, 1.5e-3
SEED = 0

Step = Callable[[], None]
console = Console(width=None if sys.stdout.isatty() else 100)


@dataclass(frozen=True)
class Scale:
    epochs: int
    long_tokens: int  # sequence length of the memory measurement
    rounds: int  # of the timing


FULL = Scale(epochs=24, long_tokens=4096, rounds=60)
QUICK = Scale(epochs=12, long_tokens=1024, rounds=10)


# --- the data and the model: nothing here knows of fused_attention ---


@dataclass(frozen=True)
class Digits:
    train_x: Tensor  # [pictures, LINES, PIXELS] in 0..1
    train_y: Tensor  # [pictures]
    test_x: Tensor
    test_y: Tensor
    test_padding: Tensor  # [pictures, LINES], True: this line has not arrived

    @classmethod
    def load(cls, device: torch.device) -> Digits:
        raw = load_digits()
        x = torch.tensor(raw.images, dtype=torch.float32, device=device) / 16
        y = torch.tensor(raw.target, device=device)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(SEED)).to(device)
        test, train = order[:TEST_PICTURES], order[TEST_PICTURES:]
        padding = draw_padding(TEST_PICTURES, torch.Generator().manual_seed(SEED)).to(device)
        return cls(x[train], y[train], x[test], y[test], padding)


def draw_padding(pictures: int, generator: torch.Generator) -> Tensor:
    """[pictures, LINES], True where a line has not arrived: the last zero to two of each picture."""
    arrived = torch.randint(FEWEST_LINES, LINES + 1, (pictures, 1), generator=generator)
    return torch.arange(LINES) >= arrived


def make_encoder() -> nn.TransformerEncoder:
    # Without dropout: the two draw different random masks, and the curves could not be compared.
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, LAYERS)


class DigitClassifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(PIXELS, WIDTH)
        self.position = nn.Parameter(0.02 * torch.randn(LINES, WIDTH))
        self.encoder = make_encoder()
        self.classify = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        # A line that has not arrived holds no picture: what it contains must not matter.
        x = x.masked_fill(padding[..., None], 0)
        x = self.encoder(self.embed(x) + self.position, src_key_padding_mask=padding)
        x = x.masked_fill(padding[..., None], 0)
        return self.classify(x.sum(1) / (~padding).sum(1, keepdim=True))


# --- training ---


@dataclass
class History:
    loss: list[float] = field(default_factory=list)  # per step
    accuracy: list[float] = field(default_factory=list)  # per epoch, on the test pictures

    def epoch_losses(self) -> list[float]:
        steps = len(self.loss) // len(self.accuracy)
        return [statistics.fmean(self.loss[i : i + steps]) for i in range(0, len(self.loss), steps)]


def make_model(device: torch.device, dtype: torch.dtype = torch.float32) -> DigitClassifier:
    torch.manual_seed(SEED)
    return DigitClassifier().to(device, dtype)


def train(model: DigitClassifier, data: Digits, epochs: int, advance: Step) -> History:
    """Same seed, same batches, same padding for every model."""
    dtype = model.position.dtype
    generator = torch.Generator().manual_seed(SEED + 1)
    steps = math.ceil(len(data.train_x) / BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, epochs * steps)
    history = History()
    for _ in range(epochs):
        model.train()
        for chosen in torch.randperm(len(data.train_x), generator=generator).split(BATCH):
            padding = draw_padding(len(chosen), generator).to(data.train_x.device)
            chosen = chosen.to(data.train_x.device)
            loss = F.cross_entropy(model(data.train_x[chosen].to(dtype), padding), data.train_y[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            history.loss.append(loss.item())
            advance()
        right = logits_of(model, data).argmax(-1) == data.test_y
        history.accuracy.append(right.double().mean().item())
    return history


@torch.no_grad()
def logits_of(model: DigitClassifier, data: Digits) -> Tensor:
    model.eval()
    return model(data.test_x.to(model.position.dtype), data.test_padding)


def train_all(data: Digits, device: torch.device, epochs: int) -> tuple[DigitClassifier, dict[str, History]]:
    """Train with torch, with ours and with torch in float64. Returns torch's trained float32 model, too."""
    models = {
        "torch": make_model(device),
        "fused_attention": make_model(device),
        "torch, float64": make_model(device, torch.float64),
    }
    console.print("\n[bold]fused_attention.replace_attention(model)[/]")
    console.print(f"{fused_attention.replace_attention(models['fused_attention'])}\n", markup=False)
    histories = {}
    columns = (TextColumn("{task.description:<45}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        for name, model in models.items():
            total = epochs * math.ceil(len(data.train_x) / BATCH)
            task = progress.add_task(f"training with {name}", total=total)
            histories[name] = train(model, data, epochs, lambda task=task: progress.advance(task))
    return models["torch"], histories


# --- the same logits ---


def compare_logits(trained: DigitClassifier, data: Digits) -> dict[str, float]:
    """Worst absolute errors against torch in float64, for the same weights."""
    exact = logits_of(copy.deepcopy(trained).double(), data)
    swapped = copy.deepcopy(trained)
    fused_attention.replace_attention(swapped)
    before, after = logits_of(trained, data), logits_of(swapped, data)
    # The project's rule: at most twice the error of torch itself, plus a few units in the last place.
    last_place = 2 * ((exact.float() + 0.3 - 0.3) - exact.float()).abs().max().item()
    result = {
        "torch": (before - exact).abs().max().item(),
        "fused_attention": (after - exact).abs().max().item(),
        "largest logit": exact.abs().max().item(),
    }
    assert result["fused_attention"] <= 2 * result["torch"] + last_place, result
    return result


# --- time and memory ---


def encoder_step(ours: bool, batch: int, tokens: int, device: torch.device) -> Step:
    """One training step of the encoder on random data whose last eighth is padding."""
    torch.manual_seed(SEED)
    encoder = make_encoder().to(device)
    if ours:
        fused_attention.replace_attention(encoder)
    x = torch.randn(batch, tokens, WIDTH, device=device)
    padding = (torch.arange(tokens, device=device) >= tokens - tokens // 8).expand(batch, tokens)

    def step() -> None:
        encoder.zero_grad()
        encoder(x, src_key_padding_mask=padding).square().mean().backward()

    return step


def weights_step(ours: bool, batch: int, tokens: int, device: torch.device) -> Step:
    """One training step of nn.MultiheadAttention called as it is by default: with the attention weights."""
    torch.manual_seed(SEED)
    attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).to(device)
    if ours:
        fused_attention.replace_attention(attention)
    x = torch.randn(batch, tokens, WIDTH, device=device)

    def step() -> None:
        attention.zero_grad()
        output, _weights = attention(x, x, x)
        output.square().mean().backward()

    return step


STEPS = {"encoder": encoder_step, "attention with weights": weights_step}


def time_in_turns(label: str, pair: list[Step], rounds: int, device: torch.device) -> list[float]:
    """Median seconds of each, measured A B A B ... so that both see the same machine."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times: list[list[float]] = [[], []]
    for step in pair:
        step()
    for _ in track(range(rounds), f"timing {label:<38}", console=console):
        for step, taken in zip(pair, times, strict=True):
            synchronize()
            start = time.perf_counter()
            step()
            synchronize()
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in times]


def time_steps(scale: Scale, device: torch.device) -> dict[str, list[float]]:
    cases = [("encoder", BATCH, LINES, 4), ("encoder", 4, 512, 1), ("attention with weights", 4, 512, 1)]
    result = {}
    for kind, batch, tokens, repeat in cases:
        pair = [STEPS[kind](ours, batch, tokens, device) for ours in (False, True)]
        label = f"{kind}, {batch} x {tokens} tokens"
        result[label] = time_in_turns(label, pair, scale.rounds * repeat, device)
    return result


def high_water_bytes(reset: bool = False) -> int:
    """The most memory that this process has held; on Linux since the last reset."""
    status = Path("/proc/self/status")
    if not status.exists():  # macOS counts bytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = status.read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def memory_of(kind: str, ours: bool, tokens: int, device: torch.device) -> int:
    """Bytes that one training step needs at its peak, beyond model and data. Call it in a fresh process."""
    STEPS[kind](ours, 1, 64, device)()  # loads libraries and starts threads
    step = STEPS[kind](ours, 1, tokens, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    before = high_water_bytes(reset=True)
    step()
    return high_water_bytes() - before


def measure_memory(scale: Scale, device: torch.device) -> dict[str, list[float]]:
    jobs = [(kind, ours) for kind in STEPS for ours in (False, True)]
    result: dict[str, list[float]] = {}
    for kind, ours in track(jobs, f"memory {'':<38}", console=console):
        who = "fused_attention" if ours else "torch"
        case = ["--memory-of", kind, who, str(scale.long_tokens)]
        command = [sys.executable, __file__, "--device", device.type, *case]
        output = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout
        result.setdefault(f"{kind}, 1 x {scale.long_tokens} tokens", []).append(int(output))
    return result


# --- what is shown ---


def explain(device: torch.device) -> str:
    """The attention inside a training step of the classifier."""
    size = (BATCH, HEADS, LINES, WIDTH // HEADS)
    q, k, v = (torch.randn(size, device=device, requires_grad=True) for _ in range(3))
    mask = ~draw_padding(BATCH, torch.Generator())[:, None, None, :].to(device)
    return str(fused_attention.explain(q, k, v, mask=mask))


def print_pairs(title: str, rows: dict[str, list[float]], unit: float, digits: int) -> None:
    table = Table("", "torch", "fused_attention", "torch / ours", title=title, title_justify="left")
    for label, (theirs, ours) in rows.items():
        cells = (f"{unit * value:.{digits}f}" for value in (theirs, ours))
        table.add_row(label, *cells, f"{theirs / max(ours, 1e-9):.2f}")
    console.print(table)


def plot(path: Path, histories: dict[str, History], memory: dict[str, list[float]]) -> None:
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.5))
    ours, theirs, exact = (histories[n] for n in ("fused_attention", "torch", "torch, float64"))
    left.plot(theirs.loss, linewidth=3, alpha=0.4, label="torch")
    left.plot(ours.loss, linewidth=0.8, label="fused_attention")
    left.set(title="Training loss, same seed", xlabel="step", ylabel="cross-entropy", yscale="log")
    for history, label in ((theirs, "torch float32"), (ours, "fused_attention float32")):
        gap = [abs(a - b) for a, b in zip(history.epoch_losses(), exact.epoch_losses(), strict=True)]
        middle.plot(range(1, len(gap) + 1), gap, marker="o", markersize=3, label=label)
    middle.set(title="Distance from torch in float64", xlabel="epoch", ylabel="of mean losses", yscale="log")
    for offset, label in ((-0.2, "torch"), (0.2, "fused_attention")):
        values = [pair[offset > 0] / 2**20 for pair in memory.values()]
        bars = right.bar([i + offset for i in range(len(values))], values, 0.4, label=label)
        right.bar_label(bars, fmt="%.0f")
    right.set(title="Peak memory of a training step", ylabel="MiB", xticks=range(len(memory)))
    right.set_xticklabels([label.replace(", ", "\n") for label in memory])
    for axes in (left, middle, right):
        axes.legend()
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def show_training(data: Digits, device: torch.device, scale: Scale) -> dict[str, History]:
    trained, histories = train_all(data, device, scale.epochs)
    ours, theirs, exact = (histories[n] for n in ("fused_attention", "torch", "torch, float64"))
    logits = compare_logits(trained, data)
    console.print("\n[bold]The same logits[/]: worst error against float64 over the test pictures")
    console.print("  " + ", ".join(f"{name} {value:.2e}" for name, value in logits.items()))

    apart, own = (
        max(abs(a - b) for a, b in zip(theirs.epoch_losses(), other.epoch_losses(), strict=True))
        for other in (ours, exact)
    )
    console.print(f"\n[bold]The same training[/]: {len(ours.loss)} steps, {scale.epochs} epochs")
    console.print(f"  test accuracy: torch {theirs.accuracy[-1]:.2%}, fused_attention {ours.accuracy[-1]:.2%}")
    console.print(f"  loss of an epoch: at most {apart:.4f} apart (torch in float32 and in float64: {own:.4f})\n")
    assert min(theirs.accuracy[-1], ours.accuracy[-1]) >= 0.95, "the classifier did not learn"
    assert apart <= 0.02, "the loss curves differ"
    return histories


def show(scale: Scale, device: torch.device, output: Path) -> None:
    start = time.perf_counter()
    console.print(f"torch {torch.__version__}, fused_attention {fused_attention.__version__}, {device}")
    histories = show_training(Digits.load(device), device, scale)
    times = time_steps(scale, device)
    memory = measure_memory(scale, device)
    print_pairs("Time per training step, ms (median, in turns)", times, 1e3, 2)
    print_pairs("Peak memory of a training step, MiB", memory, 2**-20, 0)
    console.print("[bold]What ran[/]")
    console.print(explain(device), markup=False, highlight=False, soft_wrap=True)

    output.mkdir(parents=True, exist_ok=True)
    plot(output / "replace_mha.png", histories, memory)
    console.print(f"\nwritten: {output / 'replace_mha.png'}", soft_wrap=True)
    console.print(f"done in {time.perf_counter() - start:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer epochs, shorter sequences")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output")
    parser.add_argument("--memory-of", nargs=3, help=argparse.SUPPRESS)  # a process of its own for each
    args = parser.parse_args()
    name = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    # torch packs padded batches into nested tensors in eval mode and warns that these are a prototype.
    warnings.filterwarnings("ignore", message=".*nested tensors.*")
    if args.memory_of:
        kind, whose, tokens = args.memory_of
        print(memory_of(kind, whose == "fused_attention", int(tokens), torch.device(name)))
    else:
        show(QUICK if args.quick else FULL, torch.device(name), args.output)


if __name__ == "__main__":
    main()
