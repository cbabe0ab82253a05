"""Knowledge distillation (Hinton, Vinyals and Dean, 2015): a small model learns from a large one's probabilities, and
from what it makes of pictures and clips on the way to them (hints; Romero et al., "FitNets", 2015).

    loss = (1 - alpha) * label_loss + alpha * T^2 * KL(softmax(teacher / T) || softmax(student / T))
           + hint * mean over pairs of layers (1 - CKA(student's hidden states, teacher's))

KL(p || q) = sum p (log p - log q), mean over the positions that count. T^2 keeps the gradient of the second part as
large as that of the first whatever T is. CKA compares hidden states of different sizes and needs no parameters.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def distillation_loss(
    student: Tensor, teacher: Tensor, temperature: float = 2.0, weights: Tensor | None = None
) -> Tensor:
    """T^2 * KL(teacher || student) at temperature T, mean over positions, in nats.

    Args:
        student, teacher: logits [..., vocabulary]; the teacher's gets no gradient.
        temperature: T > 0; above 1, what the teacher holds for unlikely counts for more.
        weights: bool or floating [...], how much each position counts in the mean; None: all alike.

    Raises:
        ValueError: shapes that differ, or a temperature that is not positive.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"teacher: got shape {list(teacher.shape)}, expected the student's {list(student.shape)}")
    if not temperature > 0:
        raise ValueError(f"temperature: got {temperature}, expected a positive number")
    if weights is None:
        weights = student.new_ones(student.shape[:-1])
    counts = weights != 0
    log_q = F.log_softmax(student[counts].float() / temperature, -1)
    log_p = F.log_softmax(teacher.detach()[counts].float() / temperature, -1)
    # A sum over the vocabulary and a mean over the positions: the default divides by the vocabulary, too.
    each = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    return temperature**2 * (each * weights[counts]).sum() / weights[counts].sum()


def alignment(x: Tensor, y: Tensor) -> Tensor:
    """Linear centred kernel alignment (CKA; Kornblith et al., 2019) of two descriptions of the same P things.

        |Y^T X|^2 / (|X^T X| |Y^T Y|), Frobenius norms, columns less their means

    1 if the one is the other turned, scaled and moved, 0 if no column of the one varies with any of the other's.

    Args:
        x, y: [P, any size] floating.

    Returns:
        A float32 scalar, 0 to 1; 0 where all P are alike.
    """
    with torch.autocast(x.device.type, enabled=False):
        x, y = (t.float() - t.float().mean(0) for t in (x, y))
        own = (x.T @ x).norm() * (y.T @ y).norm()
        return (x.T @ y).square().sum() / own.clamp(min=torch.finfo(torch.float32).tiny)


class Distillation:
    """`losses(student, batch)` for the `Trainer`: the student's own losses, the teacher's word on its text, and how far
    the hidden states are from the teacher's.

    What is generated in slots counts through the labels alone: the two models' slots are the same numbers.

    Args:
        teacher: it is put into evaluation mode and frozen.
        temperature: T > 0 of both distributions.
        alpha: the teacher's share of the text's loss, 0 to 1.
        hint: the weight of the hidden states, 0 or more. Those before the first and after the last layer are compared,
            and after each of the student's others those at the like depth of the teacher; where an input picture or
            clip stands, and where a label is predicted, separately.
    """

    def __init__(self, teacher: nn.Module, temperature: float = 2.0, alpha: float = 0.5, hint: float = 8.0) -> None:
        if not 0.0 <= alpha <= 1.0:
            raise ValueError(f"alpha: got {alpha}, expected 0 .. 1")
        if not hint >= 0.0:
            raise ValueError(f"hint: got {hint}, expected 0 or more")
        self.teacher = teacher.eval().requires_grad_(False)
        self.temperature, self.alpha, self.hint = temperature, alpha, hint

    def __call__(self, student: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        options = {"output_hidden_states": True} if self.hint else {}
        found = student(**batch, **options)
        losses = {n: found[n] for n in ("text_loss", "image_loss", "audio_loss") if found.get(n) is not None}
        with torch.no_grad():
            wanted = self.teacher(**batch, **options)
        weights = batch["label_weights"] if "label_weights" in batch else batch["labels"] != -100
        weights = F.pad(weights[:, 1:], (0, 1))  # position s predicts token s + 1
        kl = distillation_loss(found.logits, wanted.logits, self.temperature, weights)
        loss = found.loss - self.alpha * found.text_loss + self.alpha * kl
        if self.hint:
            places = self._places(batch["input_ids"], weights != 0)
            losses["hint_loss"] = hint_loss(found.hidden_states, wanted.hidden_states, places)
            loss = loss + self.hint * losses["hint_loss"]
        return {"loss": loss, "distillation_loss": kl, **losses}

    def _places(self, ids: Tensor, predicting: Tensor) -> list[Tensor]:
        """Masks [B, S] of the slots of the input, if there are any, and of what predicts a label."""
        config: Any = self.teacher.config
        slots = (ids == config.image_token_id) | (ids == config.audio_token_id)
        return [place for place in (slots, predicting) if bool(place.any())]


def hint_loss(student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], places: list[Tensor]) -> Tensor:
    """1 - `alignment`, mean over the student's hidden states [B, S, E] and the places [B, S]; the teacher's have other
    sizes, and get no gradient.
    """
    depth = (len(teacher) - 1) / (len(student) - 1)
    pairs = [(x, teacher[round(i * depth)].detach()) for i, x in enumerate(student)]
    return 1.0 - torch.stack([alignment(x[place], y[place]) for x, y in pairs for place in places]).mean()
