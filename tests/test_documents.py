"""The programs of examples/documents, each as its user runs it, on a checkpoint of a few steps of training."""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples" / "documents"
NEEDED = ("transformers", "accelerate", "sklearn", "espeakng_loader", "vaderSentiment", "PIL")
MISSING = [name for name in NEEDED if find_spec(name) is None]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("documents"),  # they share the checkpoint
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]


Run = Callable[..., str]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a program as `python name.py arguments` in an empty folder; returns what it printed."""

    def call(name: str, *arguments: object) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *(str(argument) for argument in arguments)])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return call


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from fused_attention.models.gemini import train

    folder = tmp_path_factory.mktemp("documents") / "base"
    train.main([str(folder), *"--size student --steps 3 --batch-size 4 --no-scores".split()])
    return folder


@pytest.mark.parametrize(("name", "shape"), [("self_attention", (32, 10, 64)), ("multi_head_attention", (32, 10, 512))])
def test_textbook_modules(name: str, shape: tuple[int, ...], run: Run) -> None:
    printed = run(name)
    assert f"torch.Size({list(shape)})" in printed
    assert float(re.findall(r"difference: (\S+)", printed)[0]) < 1e-5


def test_gpt2(run: Run, tmp_path: Path) -> None:
    printed = run("gpt2_text_generation", "--model", tmp_path / "gpt2", "--steps", 2)
    assert "once upon a time" in printed


def test_text_generation(checkpoint: Path, run: Run) -> None:
    printed = run("text_generation", "--model", checkpoint)
    assert "one pass:" in printed and "beams: once upon a time" in printed and "beams: 写一首关于春天的诗" in printed


@pytest.mark.parametrize(
    ("name", "label"),
    [("image_description", "Generated Image Description:"), ("audio_transcription", "Transcribed Text:")],
)
def test_joint_inference(name: str, label: str, checkpoint: Path, run: Run) -> None:
    printed = run(name, "--model", checkpoint)
    assert "First token:" in printed and label in printed


def test_sentiment_and_generation(checkpoint: Path, run: Run) -> None:
    printed = run("sentiment_and_generation", "--model", checkpoint)
    assert re.search(r"Sentiment: (Positive|Negative)", printed)
    assert "Generated Text: the future of ai in healthcare is" in printed


def test_distillation(checkpoint: Path, run: Run) -> None:
    options = ("--epochs", 3, "--steps", 6)
    printed = run("distillation", "--model", checkpoint, *options)
    losses = [float(number) for number in re.findall(r"Loss: (\S+)", printed)]
    assert len(losses) == 3 and losses[-1] < losses[0]


def test_dynamic_quantization(checkpoint: Path, run: Run) -> None:
    printed = run("dynamic_quantization", "--model", checkpoint)
    assert "int8:    this book is so good. is this positive or negative?" in printed
    assert float(re.findall(r"(\S+) of the size", printed)[0]) < 0.6


def test_every_program_is_run_here() -> None:
    source = Path(__file__).read_text()
    assert all(path.stem in source for path in EXAMPLES.glob("*.py"))
