"""A small model learns from a large one: the loop, with the Kullback-Leibler divergence the right way round.

    loss = T^2 * KL(softmax(teacher / T) || softmax(student / T))

`nn.KLDivLoss` takes the student's *log* probabilities first; its mean is taken over positions ("batchmean"), padding
does not count, and T^2 keeps the gradient's size. The teacher is frozen. `python -m
fused_attention.models.gemini.distill` is this with labels, a schedule and checkpoints.
"""

import argparse
from pathlib import Path

import torch
from torch import optim

from fused_attention.models.gemini import GeminiForConditionalGeneration, student_config
from fused_attention.models.gemini.data.batches import WEIGHTS
from fused_attention.models.gemini.distillation import distillation_loss
from fused_attention.models.gemini.train import Batches, load


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--model", type=Path, default=Path("runs/base"), help="the teacher")
    p.add_argument("--epochs", type=int, default=10)
    p.add_argument("--steps", type=int, default=5, help="of each epoch")
    args = p.parse_args()
    teacher, processor = load(args.model)
    teacher.eval().requires_grad_(False)
    torch.manual_seed(0)
    student = GeminiForConditionalGeneration(student_config(vocab_size=teacher.config.vocab_size))
    batches = Batches(
        processor, student.config, {"sentiment": WEIGHTS["sentiment"], "text": WEIGHTS["text"]}, 8, seed=0
    )

    optimizer = optim.Adam(student.parameters(), lr=1e-3)
    for epoch in range(args.epochs):
        student.train()
        for step in range(args.steps):
            batch = batches(epoch * args.steps + step, 0)
            inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
            with torch.no_grad():
                teacher_outputs = teacher(**inputs)
            student_outputs = student(**inputs)
            loss = distillation_loss(
                student_outputs.logits, teacher_outputs.logits, temperature=2.0, weights=batch["attention_mask"].bool()
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"Epoch {epoch + 1}, Loss: {loss.item():.4f}")


if __name__ == "__main__":
    main()
