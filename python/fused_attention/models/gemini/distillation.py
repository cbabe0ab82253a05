"""Knowledge distillation (Hinton, Vinyals and Dean, 2015): a small model learns from a large one's probabilities.

    loss = (1 - alpha) * label_loss + alpha * T^2 * KL(softmax(teacher / T) || softmax(student / T))

KL(p || q) = sum p (log p - log q), mean over the positions that count. T^2 keeps the gradient of the second part as
large as that of the first whatever T is.
"""

from __future__ import annotations

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


class Distillation:
    """`losses(student, batch)` for the `Trainer`: the student's own losses, and the teacher's word on its text.

    Slots and what is generated in them count through the labels alone: the two models' slots are the same numbers.
    """

    def __init__(self, teacher: nn.Module, temperature: float = 2.0, alpha: float = 0.5) -> None:
        if not 0.0 <= alpha <= 1.0:
            raise ValueError(f"alpha: got {alpha}, expected 0 .. 1")
        self.teacher = teacher.eval().requires_grad_(False)
        self.temperature, self.alpha = temperature, alpha

    def __call__(self, student: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        found = student(**batch)
        losses = {n: found[n] for n in ("text_loss", "image_loss", "audio_loss") if found.get(n) is not None}
        with torch.no_grad():
            wanted = self.teacher(**batch).logits
        weights = batch["label_weights"] if "label_weights" in batch else batch["labels"] != -100
        # Position s predicts token s + 1.
        kl = distillation_loss(found.logits[:, :-1], wanted[:, :-1], self.temperature, weights[:, 1:])
        loss = found.loss - self.alpha * found.text_loss + self.alpha * kl
        return {"loss": loss, "distillation_loss": kl, **losses}
