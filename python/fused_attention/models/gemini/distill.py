"""`python -m fused_attention.models.gemini.distill`: a student of at most a quarter of the teacher's size.

    python -m fused_attention.models.gemini.distill runs/student --teacher runs/base

The student learns from the labels, the teacher's probabilities and its hidden states (`distillation.py`); the same
student from the labels alone is what `train --size student` makes. The folder gets what `train` writes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from .configuration import student_config
from .distillation import Distillation
from .generation import GeminiForConditionalGeneration
from .train import add_recipe_arguments, batches_of, complete, load, recipe_of
from .training import Trainer


def distill(args: argparse.Namespace) -> dict[str, float]:
    teacher, processor = load(args.teacher)
    torch.manual_seed(args.seed)
    student = GeminiForConditionalGeneration(student_config(vocab_size=teacher.config.vocab_size))
    share = student.num_parameters() / teacher.num_parameters()
    print(f"a student of {student.num_parameters():,} parameters, {share:.1%} of the teacher's")
    batches = batches_of(processor, student.config, args)
    losses = Distillation(teacher, args.temperature, args.alpha, args.hint)
    trainer = Trainer(student, recipe_of(args), batches, losses, args.folder)
    return complete(trainer, processor, args)


def main(arguments: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(prog="python -m fused_attention.models.gemini.distill", description=__doc__)
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    add_recipe_arguments(p, steps=400, rate=2e-3)
    p.add_argument("--teacher", type=Path, required=True, metavar="FOLDER", help="what `train` wrote")
    p.add_argument("--temperature", type=float, default=2.0)
    p.add_argument("--alpha", type=float, default=0.5, help="the teacher's share of the text's loss, 0 to 1")
    p.add_argument("--hint", type=float, default=8.0, help="the weight of the hidden states' distance to the teacher's")
    distill(p.parse_args(arguments))


if __name__ == "__main__":
    main()
