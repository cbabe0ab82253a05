"""The training loop, distillation and quantisation, by themselves: on networks of a few numbers."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("accelerate", reason="training needs accelerate: pip install 'fused-attention[gemini]'")
pytest.importorskip("transformers", reason="the models need transformers: pip install 'fused-attention[gemini]'")

from fused_attention.models.gemini.distillation import Distillation, alignment, distillation_loss, hint_loss
from fused_attention.models.gemini.precision import Float32Products
from fused_attention.models.gemini.training import Recipe, Trainer, draw_losses, make_optimizer


def _batches(step: int, rank: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return {"x": torch.randn(8, 4, generator=generator)}


def _losses(model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    loss = (model(batch["x"]) - batch["x"].sum(1, keepdim=True)).square().mean()
    return {"loss": loss, "text_loss": loss}


def _trainer(folder: Path, recipe: Recipe) -> Trainer:
    torch.manual_seed(1)
    # Dropout draws: a run that resumes has to draw what the other one draws.
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 1))
    return Trainer(model, recipe, _batches, _losses, folder)


def test_a_run_that_resumes_is_bit_equal(tmp_path: Path) -> None:
    recipe = Recipe(steps=9, warmup=2, save_every=100)
    whole = _trainer(tmp_path / "whole", recipe)
    whole.run(show=False)
    first = _trainer(tmp_path / "parts", recipe)
    first.run(until=4, show=False)
    torch.manual_seed(77)  # what another program draws in between
    second = _trainer(tmp_path / "parts", recipe)
    assert second.resume() and second.step == 4
    second.run(show=False)
    for a, b in zip(whole.plain_model.parameters(), second.plain_model.parameters(), strict=True):
        assert torch.equal(a, b)
    strip = [{k: v for k, v in e.items() if k != "seconds"} for e in whole.log]
    assert strip == [{k: v for k, v in e.items() if k != "seconds"} for e in second.log]
    assert json.loads((tmp_path / "parts" / "log.json").read_text())[-1]["step"] == 9
    assert (tmp_path / "parts" / "loss.png").stat().st_size > 1000


def test_one_process_trains_in_several_precisions(tmp_path: Path) -> None:
    for number, precision in enumerate(("no", "bf16", "no")):
        trainer = _trainer(tmp_path / str(number), Recipe(steps=2, warmup=1, precision=precision))
        trainer.run(show=False)
        assert trainer.accelerator.mixed_precision == precision and trainer.step == 2


def test_it_does_not_go_on_with_another_recipe(tmp_path: Path) -> None:
    _trainer(tmp_path, Recipe(steps=2, warmup=1)).run(show=False)
    with pytest.raises(ValueError, match="learning_rate"):
        _trainer(tmp_path, Recipe(steps=2, warmup=1, learning_rate=1e-4)).resume()
    assert not _trainer(tmp_path / "empty", Recipe()).resume()


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, Recipe(steps=60, warmup=5, learning_rate=2e-2, save_every=1000))
    trainer.run(show=False)
    assert trainer.log[-1]["loss"] < 0.3 * trainer.log[0]["loss"]


def test_a_loss_that_is_not_finite_stops(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, Recipe(steps=3))
    trainer.losses = lambda model, batch: {"loss": _losses(model, batch)["loss"] * math.nan}
    with pytest.raises(FloatingPointError, match="step 1"):
        trainer.run(show=False)


def test_the_learning_rate() -> None:
    recipe = Recipe(steps=100, warmup=10, floor=0.1)
    assert recipe.rate(0) == pytest.approx(0.1) and recipe.rate(9) == 1.0 == recipe.rate(10)
    assert recipe.rate(55) == pytest.approx(0.1 + 0.9 * 0.5)  # halfway down the cosine
    assert recipe.rate(100) == pytest.approx(0.1) == recipe.rate(1000)


def test_vectors_have_no_weight_decay() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    groups = make_optimizer(model, Recipe()).param_groups
    assert [len(g["params"]) for g in groups] == [1, 3] and groups[1]["weight_decay"] == 0.0


class _Products(nn.Module):
    """A convolution, a linear layer and a batched product."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.linear = nn.Conv1d(3, 5, 3), nn.Linear(6, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(self.convolution(x))
        return y @ y.mT


def test_products_of_bfloat16_are_rounded_once() -> None:
    """Every product against float64 of the same bfloat16 operands, to one rounding; no other dtype is touched."""
    torch.manual_seed(2)
    x, w, bias = (torch.randn(*s).bfloat16() for s in ((9, 300), (300, 11), (11,)))
    signal, kernel = torch.randn(2, 3, 20).bfloat16(), torch.randn(5, 3, 4).bfloat16()
    calls = {
        "mm": lambda a, b, c, s, k: a @ b,
        "addmm": lambda a, b, c, s, k: torch.addmm(c, a, b),
        "bmm": lambda a, b, c, s, k: a.expand(2, 9, 300) @ b.expand(2, 300, 11),
        "convolution": lambda a, b, c, s, k: torch.conv1d(s, k, stride=2),
    }
    for name, call in calls.items():
        with Float32Products():
            got = call(x, w, bias, signal, kernel)
        exact = call(*(t.double() for t in (x, w, bias, signal, kernel)))
        assert got.dtype is torch.bfloat16
        assert (got - exact).abs().le(exact.abs() * 2.0**-8 + 1e-4).all(), name
        with Float32Products():
            assert call(*(t.float() for t in (x, w, bias, signal, kernel))).dtype is torch.float32


def test_bfloat16_products_have_gradients() -> None:
    """Under autocast, as in training: what torch's own kernels give, but for the rounding of bfloat16."""
    torch.manual_seed(3)
    model, x = _Products(), torch.randn(4, 3, 8)
    found = []
    for products in (contextlib.nullcontext(), Float32Products()):
        model.zero_grad()
        with products:
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(x).float().square().mean()
            loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    for torchs, ours in zip(*found, strict=True):
        assert torch.allclose(ours, torchs, rtol=2e-2, atol=2e-2 * torchs.abs().max().item())


def test_a_plot_of_losses(tmp_path: Path) -> None:
    draw_losses([{"step": i, "loss": 3.0 / i, "image_loss": 1.0} for i in range(1, 120)], tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 1000


# --- distillation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_the_distillation_loss_is_the_formula(temperature: float) -> None:
    torch.manual_seed(0)
    student, teacher = (3 * torch.randn(2, 5, 7, dtype=torch.float64) for _ in range(2))
    p, q = ((t / temperature).exp() / (t / temperature).exp().sum(-1, keepdim=True) for t in (teacher, student))
    expected = temperature**2 * (p * (p / q).log()).sum(-1).mean()
    torch.testing.assert_close(distillation_loss(student, teacher, temperature).double(), expected, rtol=1e-5, atol=0)
    where = torch.rand(2, 5) > 0.5
    expected = temperature**2 * (p * (p / q).log()).sum(-1)[where].mean()
    found = distillation_loss(student, teacher, temperature, where)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    weights = torch.rand(2, 5, dtype=torch.float64)
    expected = temperature**2 * ((p * (p / q).log()).sum(-1) * weights).sum() / weights.sum()
    found = distillation_loss(student, teacher, temperature, weights)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


def test_the_distillation_loss_is_zero_for_the_teacher_alone() -> None:
    torch.manual_seed(0)
    teacher = torch.randn(4, 9)
    student = (teacher + 3.0).requires_grad_()  # a constant changes no probability
    distillation_loss(student, teacher).backward()
    assert student.grad is not None and student.grad.abs().max() < 1e-6
    assert distillation_loss(torch.randn(4, 9), teacher) > 0.01


def test_the_gradient_of_the_distillation_loss_keeps_its_size() -> None:
    """What T^2 is for: at a high temperature it is the difference of the logits, whatever T."""
    torch.manual_seed(0)
    teacher, student = torch.randn(3, 6), torch.randn(3, 6)
    gradients = []
    for temperature in (50.0, 100.0):
        x = student.clone().requires_grad_()
        distillation_loss(x, teacher, temperature).backward()
        assert x.grad is not None
        gradients.append(x.grad)
    centred = [t - t.mean(-1, keepdim=True) for t in (student, teacher)]
    torch.testing.assert_close(gradients[1], (centred[0] - centred[1]) / 6 / 3, rtol=0.1, atol=1e-3)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0.1, atol=1e-3)


def test_distillation_refuses_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="teacher"):
        distillation_loss(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="temperature"):
        distillation_loss(torch.zeros(2, 3), torch.zeros(2, 3), 0.0)
    with pytest.raises(ValueError, match="alpha"):
        Distillation(nn.Linear(1, 1), alpha=1.5)
    with pytest.raises(ValueError, match="hint"):
        Distillation(nn.Linear(1, 1), hint=-1.0)


def test_the_alignment_is_that_of_the_kernels() -> None:
    """tr(K L) / sqrt(tr(K K) tr(L L)) with K and L the centred matrices of inner products."""
    torch.manual_seed(0)
    x, y = torch.randn(9, 4, dtype=torch.float64), torch.randn(9, 7, dtype=torch.float64)
    y[:, :2] += x[:, :2]
    centre = torch.eye(9, dtype=torch.float64) - 1.0 / 9.0
    k, m = (centre @ t @ t.T @ centre for t in (x, y))
    expected = (k @ m).trace() / ((k @ k).trace() * (m @ m).trace()).sqrt()
    torch.testing.assert_close(alignment(x, y).double(), expected, rtol=1e-5, atol=0)


def test_the_alignment_sees_through_turns_scales_and_shifts_alone() -> None:
    torch.manual_seed(0)
    x = torch.randn(20, 6)
    turn = torch.linalg.qr(torch.randn(6, 6)).Q
    assert abs(float(alignment(x, 3.0 * x @ turn + 5.0)) - 1.0) < 1e-5
    other = torch.randn(20, 6)
    assert float(alignment(x, other)) < 0.7
    torch.testing.assert_close(alignment(x, other), alignment(other, x))
    same = torch.ones(20, 6, requires_grad=True)
    found = alignment(same, x)
    found.backward()
    assert found.item() == 0.0 and same.grad is not None and bool(same.grad.isfinite().all())
    with torch.autocast("cpu", torch.bfloat16):
        assert float(alignment(x, other)) == float(alignment(x, other.clone())) and alignment(x, x) > 0.99999


def test_hints_compare_the_like_depth_at_each_place() -> None:
    torch.manual_seed(0)
    teacher = tuple(torch.randn(2, 5, 8) for _ in range(6))
    place = torch.rand(2, 5) > 0.3
    copied = tuple(2.0 * teacher[i] + 1.0 for i in (0, 2, 3, 5))  # three layers beside five
    assert float(hint_loss(copied, teacher, [place, ~place])) < 1e-5
    elsewhere = tuple(torch.where(place[..., None], x, torch.randn_like(x)) for x in copied)
    assert float(hint_loss(elsewhere, teacher, [place])) < 1e-5 < 0.05 < float(hint_loss(elsewhere, teacher, [~place]))
    moved = tuple(teacher[i].clone().requires_grad_() for i in (1, 2, 3, 5))
    loss = hint_loss(moved, teacher, [place])
    loss.backward()
    gradients = [float(x.grad.abs().max()) for x in moved if x.grad is not None]
    assert gradients[0] > 1e-3 and max(gradients[1:]) < 1e-5
