"""`python -m fused_attention.models.gemini.train`: pretrain on all modalities, or fine-tune on chosen tasks.

    python -m fused_attention.models.gemini.train runs/base
    python -m fused_attention.models.gemini.train runs/joint --from runs/base --tasks joint --steps 300

A folder gets `model` (for `from_pretrained`), `processor`, `log.json`, `loss.png`, `scores.json` and `checkpoint`, from
which the same command goes on where it stopped, bit for bit. With several processes: `accelerate launch -m
fused_attention.models.gemini.train ...`, whose options choose DDP or FSDP.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...integrations.transformers import NAME
from .configuration import GeminiConfig, student_config, teacher_config
from .data.batches import WEIGHTS, Collator, MixedBatches
from .data.tasks import insert_words, tokenizer_corpus
from .evaluation import evaluate
from .generation import GeminiForConditionalGeneration
from .processing import GeminiProcessor
from .tokenization import train_tokenizer
from .training import Recipe, Trainer

SIZES = {"teacher": teacher_config, "student": student_config}
VOCABULARY = 1024


def make_processor(config: GeminiConfig | None = None, vocab_size: int = VOCABULARY) -> GeminiProcessor:
    """A processor whose tokenizer has learned from the training texts."""
    config = GeminiConfig() if config is None else config
    tokenizer = train_tokenizer(tokenizer_corpus(), vocab_size)
    return GeminiProcessor(tokenizer, image_tokens=config.image_tokens, audio_stride=config.audio_reduction)


class Batches:
    """`batches(step, rank)` for the `Trainer`: tasks mixed by weight; moved: see `training_example`; insertion: see
    `insert_words`."""

    def __init__(
        self,
        processor: GeminiProcessor,
        config: GeminiConfig,
        weights: Mapping[str, float],
        size: int,
        seed: int,
        moved: float = 1.0,
        insertion: float = 0.0,
    ):
        if not 0.0 <= insertion <= 1.0:
            raise ValueError(f"insertion: got {insertion}, expected a share, 0 to 1")
        self.collate = Collator(processor, config.image_out_tokens, config.audio_reduction)
        self.seed, self.insertion = seed, insertion
        self._stream_from = functools.partial(MixedBatches, weights, size, seed, moved=moved)
        self._stream = self._stream_from()

    def __call__(self, step: int, rank: int) -> dict[str, Tensor]:
        if (self._stream.step, self._stream.rank) != (step, rank):
            self._stream = self._stream_from(start=step, rank=rank)
        examples = next(self._stream)
        if self.insertion:
            rng = np.random.default_rng([self.seed, rank, step])
            examples = [insert_words(example, rng, self.insertion) for example in examples]
        return self.collate(examples)


def losses(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The model's own: their weighted sum, and each."""
    found = model(**batch)
    names = ("loss", "text_loss", "image_loss", "audio_loss")
    return {name: found[name] for name in names if found.get(name) is not None}


def add_recipe_arguments(p: argparse.ArgumentParser, steps: int, rate: float) -> None:
    """What every command that trains takes."""
    p.add_argument("folder", type=Path, help="where the model and all that belongs to it goes")
    p.add_argument("--steps", type=int, default=steps)
    p.add_argument("--batch-size", type=int, default=32)
    p.add_argument("--learning-rate", type=float, default=rate)
    p.add_argument("--seed", type=int, default=0)
    more = "the share of pictures that are moved by up to a pixel and dimmed, default 1; the others stay as they are"
    p.add_argument("--moved", type=float, default=1.0, metavar="SHARE", help=more)
    more = "put words without meaning before this share of the prompts' words"
    p.add_argument("--insertion", type=float, default=0.0, metavar="SHARE", help=more)
    p.add_argument("--bf16", action="store_true", help="mixed precision: bfloat16 autocast")
    p.add_argument("--tasks", nargs="+", choices=WEIGHTS, default=list(WEIGHTS), help="default: all")
    p.add_argument("--limit", type=int, help="held-out examples of each task to measure; default all")
    p.add_argument("--no-scores", action="store_true", help="do not measure at the end")


def batches_of(processor: GeminiProcessor, config: GeminiConfig, args: argparse.Namespace) -> Batches:
    weights = {task: WEIGHTS[task] for task in args.tasks}
    return Batches(processor, config, weights, args.batch_size, args.seed, args.moved, args.insertion)


def recipe_of(args: argparse.Namespace) -> Recipe:
    return Recipe(
        steps=args.steps,
        learning_rate=args.learning_rate,
        warmup=min(50, max(1, args.steps // 10)),
        seed=args.seed,
        precision="bf16" if args.bf16 else "no",
    )


def complete(trainer: Trainer, processor: GeminiProcessor, args: argparse.Namespace) -> dict[str, float]:
    """Train, from where the folder's checkpoint stands if it has one; write the model beside its processor, measure it,
    and write and print the scores.
    """
    if trainer.resume():
        print(f"goes on after step {trainer.step}")
    trainer.run()
    model, folder = trainer.plain_model, args.folder
    scores: dict[str, float] = {}
    if trainer.accelerator.is_main_process:
        model.save_pretrained(folder / "model")
        processor.save_pretrained(folder / "processor")
        if not args.no_scores:
            scores = evaluate(model, processor, args.tasks, args.limit)
            seconds = sum(entry["seconds"] for entry in trainer.log)
            found = {"scores": scores, "training_seconds": seconds, "parameters": model.num_parameters()}
            (folder / "scores.json").write_text(json.dumps(found, indent=1) + "\n")
            print_scores(scores)
    return scores


def print_scores(scores: dict[str, float]) -> None:
    for task, score in scores.items():
        print(f"{task:<12} {'perplexity ' if task == 'text' else ''}{score:.4f}")


def load(folder: Path, **options: Any) -> tuple[GeminiForConditionalGeneration, GeminiProcessor]:
    """The model and the processor of a folder that a training command filled; options go to `from_pretrained`."""
    model = GeminiForConditionalGeneration.from_pretrained(folder / "model", **options)
    return model, GeminiProcessor.from_pretrained(folder / "processor")


def train(args: argparse.Namespace) -> dict[str, float]:
    torch.manual_seed(args.seed)
    options = {"attn_implementation": args.attention}
    if args.start is not None:
        model, processor = load(args.start, **options)
    else:
        processor = make_processor()
        config = SIZES[args.size](vocab_size=len(processor.tokenizer))
        model = GeminiForConditionalGeneration._from_config(config, **options)
    if args.checkpoint_layers:
        model.gradient_checkpointing_enable()
    batches = batches_of(processor, model.config, args)
    trainer = Trainer(model, recipe_of(args), batches, losses, args.folder)
    return complete(trainer, processor, args)


def main(arguments: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(prog="python -m fused_attention.models.gemini.train", description=__doc__)
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    add_recipe_arguments(p, steps=500, rate=1e-3)
    p.add_argument("--size", choices=SIZES, default="teacher")
    p.add_argument("--from", dest="start", type=Path, metavar="FOLDER", help="go on from a trained model: fine-tune")
    p.add_argument("--attention", choices=(NAME, "eager"), default=NAME)
    p.add_argument("--checkpoint-layers", action="store_true", help="recompute layers in the backward pass, for memory")
    train(p.parse_args(arguments))


if __name__ == "__main__":
    main()
