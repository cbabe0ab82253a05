"""The commands that train, distil, quantise and show the model, end to end, with a few steps of each."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

NEEDED = ("transformers", "accelerate", "torchao", "sklearn", "scipy", "espeakng_loader", "vaderSentiment", "PIL")
MISSING = [name for name in NEEDED if find_spec(name) is None]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("gemini_commands"),  # they share the checkpoint
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]

SMALL = "--batch-size 4 --limit 6".split()


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from fused_attention.models.gemini import train

    folder = tmp_path_factory.mktemp("gemini") / "base"
    train.main([str(folder), "--size", "student", "--steps", "3", *SMALL])
    return folder


def test_train_writes_what_it_says(base: Path) -> None:
    for name in ("model/model.safetensors", "processor/tokenizer.json", "loss.png", "checkpoint/trainer.json"):
        assert (base / name).stat().st_size > 0, name
    assert [entry["step"] for entry in json.loads((base / "log.json").read_text())] == [1, 2, 3]
    scores = json.loads((base / "scores.json").read_text())["scores"]
    assert set(scores) == {"describe", "transcribe", "sentiment", "joint", "draw", "say", "text"}
    assert scores["text"] > 1.0 and all(0.0 <= scores[task] <= 1.0 for task in set(scores) - {"text"})


def test_a_model_is_fine_tuned_on_one_task(base: Path, tmp_path: Path) -> None:
    from fused_attention.models.gemini import train

    options = ["--from", str(base), "--tasks", "sentiment", "--steps", "2", *SMALL]
    train.main([str(tmp_path / "tuned"), *options])
    before, _ = train.load(base)
    after, _ = train.load(tmp_path / "tuned")
    assert not torch.equal(before.embed_tokens.weight, after.embed_tokens.weight)
    assert set(json.loads((tmp_path / "tuned" / "scores.json").read_text())["scores"]) == {"sentiment"}


def test_training_goes_on_where_it_stopped(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bit for bit, on the model itself: four steps at once are two, and two more."""
    from fused_attention.models.gemini import train
    from fused_attention.models.gemini.training import Recipe, Trainer

    model, processor = train.load(base)
    start = {name: t.clone() for name, t in model.state_dict().items()}
    recipe = Recipe(steps=4, warmup=2, save_every=2)

    def trainer(folder: str) -> Trainer:
        model.load_state_dict(start)
        batches = train.Batches(processor, model.config, {"text": 1.0, "say": 1.0}, 4, seed=0, insertion=0.2)
        return Trainer(model, recipe, batches, train.losses, tmp_path / folder)

    with pytest.raises(ValueError, match="moved: got 1.5"):
        train.Batches(processor, model.config, {"describe": 1.0}, 4, seed=0, moved=1.5)
    with pytest.raises(ValueError, match="insertion: got 1.5"):
        train.Batches(processor, model.config, {"text": 1.0}, 4, seed=0, insertion=1.5)
    whole = trainer("whole")
    whole.run(show=False)
    expected = {name: t.clone() for name, t in model.state_dict().items()}
    trainer("parts").run(until=2, show=False)
    rest = trainer("parts")
    assert rest.resume() and rest.step == 2
    rest.run(show=False)
    assert all(torch.equal(t, expected[name]) for name, t in model.state_dict().items())


def test_distil(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fused_attention.models.gemini import distill

    options = ["--teacher", str(base), "--steps", "2", "--tasks", "sentiment", "text", *SMALL]
    distill.main([str(tmp_path / "student"), *options])
    assert "parameters" in capsys.readouterr().out
    log = json.loads((tmp_path / "student" / "log.json").read_text())
    assert all(entry["distillation_loss"] > 0.0 and 0.0 < entry["hint_loss"] < 1.0 for entry in log)


def test_quantise(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fused_attention.models.gemini import quantize
    from fused_attention.models.gemini.quantization import load_quantized
    from fused_attention.models.gemini.quantization import quantize as in_place
    from fused_attention.models.gemini.train import load

    quantize.main([str(base), str(tmp_path / "int8"), "--limit", "4"])
    printed = capsys.readouterr().out
    assert float(re.findall(r"(\S+) of the size", printed)[0]) < 0.5
    loaded = load_quantized(tmp_path / "int8" / "model")
    ids = torch.tensor([[1, 40, 50, 60, 70, 80]])
    model, _ = load(base)
    exact = model(ids).logits
    kept = in_place(model)(ids).logits
    assert torch.equal(loaded(ids).logits, kept)
    error = (kept - exact).norm() / exact.norm()
    print(f"int8 logits: relative error {error:.1e}")
    assert error < 0.05


def test_demo(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fused_attention.models.gemini import demo

    demo.main([str(base), "--out", str(tmp_path / "shown"), "--each", "1"])
    printed = capsys.readouterr().out
    for task in ("describe", "transcribe", "joint", "sentiment", "drawn", "said"):
        assert task in printed
    (picture,) = (tmp_path / "shown").glob("*.png")
    (clip,) = (tmp_path / "shown").glob("*.wav")
    assert picture.read_bytes()[:4] == b"\x89PNG" and clip.read_bytes()[:4] == b"RIFF"


def _pretend(monkeypatch: pytest.MonkeyPatch, called: list[list[str]]) -> None:
    """Every command reads its arguments as ever, and writes scores that follow from its folder instead of training."""
    from fused_attention.models.gemini import distill, quantize, train

    def write(args: Any) -> None:
        called.append([args.folder.parent.name, args.folder.name])
        seed = int(args.folder.parent.name[-1])
        scores = {task: 50.0 if task == "text" else 0.9 + seed / 100 for task in args.tasks}
        if args.folder.name == "judge":
            scores["text"] = 51.0
        parameters = 20 if args.folder.name.startswith("student") else 100
        found: dict[str, Any] = {"scores": scores, "training_seconds": 60.0, "parameters": parameters}
        if args.folder.name.endswith("int8"):
            found = {"before": scores, "after": {t: s - 0.004 for t, s in scores.items()}, "bytes": [100, 30]}
        args.folder.mkdir(parents=True)
        (args.folder / "scores.json").write_text(json.dumps(found))

    monkeypatch.setattr(train, "train", write)
    monkeypatch.setattr(distill, "distill", write)
    monkeypatch.setattr(quantize, "run", write)


def test_the_table_of_abilities(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Every stage once, each after those it starts from; the means of the seeds beside what is asked for."""
    from fused_attention.models.gemini import abilities

    called: list[list[str]] = []
    _pretend(monkeypatch, called)
    written = tmp_path / "scores.json"
    abilities.main([str(tmp_path / "runs"), "--seeds", "0", "2", "--bf16", "--json", str(written)])
    assert len(called) == 2 * 20 and called[0] == ["seed-0", "base"] and called[20] == ["seed-2", "base"]
    abilities.main([str(tmp_path / "runs"), "--seeds", "0", "2"])
    assert len(called) == 2 * 20, "a stage with scores ran again"
    printed = " ".join(capsys.readouterr().out.split())
    for row in (
        "describe an image │ 91.0% │ 90.0% 92.0% │ >= 97%",
        "its perplexity, over that of text alone │ 102.0% │ 102.0% 102.0% │ <= 105%",
        "student of the reader: parameters │ 20.0%",
        "speaker-int8: say lost │ 0.4%",
        "transcribe: bfloat16 less float32 │ 0.0%",
    ):
        assert row in printed, row
    assert len(json.loads(written.read_text())["judge"]) == 2
