"""`python -m fused_attention.models.gemini.demo runs/base`: everything that a trained model does, in a terminal.

    python -m fused_attention.models.gemini.demo runs/seed-0   # the fine-tuned models of `abilities`

Held-out digits and clips are described, transcribed and compared; sentences are judged and continued; a digit is drawn
and one is said. The pictures and the clip that it makes go to a folder as PNG and WAV files.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import TextStreamer

from .abilities import MODELS
from .audio import SAMPLING_RATE, griffin_lim
from .data import digits
from .data.held_out import held_out
from .evaluation import answers, drawn, said
from .generation import GeminiForConditionalGeneration
from .judges import digit_judge, speech_judge
from .processing import GeminiProcessor
from .train import load

_SHADES = " .:-=+*#%@"


def picture(image: Tensor) -> str:
    """[1, 8, 8] in [0, 1] as eight lines of characters."""
    rows = (image[0] * (len(_SHADES) - 1)).round().long().tolist()
    return "\n".join("    " + "".join(_SHADES[level] * 2 for level in row) for row in rows)


def save_picture(image: Tensor, path: Path, scale: int = 16) -> None:
    """Write [1, 8, 8] as a PNG, every pixel a square of `scale` pixels."""
    from PIL import Image

    grey = (image[0] * 255).round().to(torch.uint8).repeat_interleave(scale, 0).repeat_interleave(scale, 1)
    Image.fromarray(grey.numpy()).save(path)


def save_clip(samples: Tensor, path: Path) -> None:
    """Write samples [T] in [-1, 1] as a 16-bit mono WAV."""
    from scipy.io import wavfile

    scaled = samples / samples.abs().max().clamp(min=1e-6) * 0.9
    wavfile.write(path, SAMPLING_RATE, (scaled.numpy() * 32767).astype(np.int16))


def load_for(task: str, folder: Path) -> tuple[GeminiForConditionalGeneration, GeminiProcessor]:
    """The folder's own model, or that of the folder in it whose model was fine-tuned on the task."""
    if not (folder / "model").exists():
        folder /= next(name for name, (tasks, *_) in MODELS.items() if task in tasks)
    torch.manual_seed(0)
    model, processor = load(folder)
    return model.eval(), processor


def show_understanding(folder: Path, each: int) -> None:
    for task in ("describe", "transcribe", "joint", "sentiment"):
        print(f"\n== {task}")
        for example, text in answers(*load_for(task, folder), held_out(task)[:each]):
            if example.images:
                print(picture(example.images[0]))
            print(f"  {example.prompt}\n  -> {text}   (right: {example.text})")


def show_text(folder: Path, prompt: str) -> None:
    model, processor = load_for("text", folder)
    print("\n== a sentence continued, token by token, then by five beams")
    inputs = processor(text=prompt)
    streamer = TextStreamer(processor.tokenizer, skip_special_tokens=True)
    model.generate(**inputs, max_new_tokens=30, do_sample=False, streamer=streamer, kv_cache="paged")
    beams: dict[str, Any] = {"num_beams": 5, "no_repeat_ngram_size": 2, "early_stopping": True}
    start = time.perf_counter()
    out = model.generate(**inputs, max_length=100, do_sample=False, kv_dtype="int8", **beams)
    seconds, new = time.perf_counter() - start, out.shape[1] - inputs["input_ids"].shape[1]
    print(f"  {processor.tokenizer.decode(out[0], skip_special_tokens=True)}")
    print(f"  ({new} tokens in {seconds:.2f} s, five beams, int8 cache)")


def show_generation(models: Path, folder: Path, each: int) -> None:
    print("\n== digits drawn")
    chosen = held_out("draw")[:each]
    for example, image in drawn(*load_for("draw", models), chosen):
        seen = digits.NAMES[int(digit_judge().recognise(image[None])[0])]
        assert example.answer is not None
        path = folder / f"drawn-{digits.NAMES[example.answer]}.png"
        save_picture(image, path)
        print(f"  {example.prompt}\n{picture(image)}\n  a classifier of real digits sees a {seen}; written to {path}")
    print("\n== digits said")
    for example, frames in said(*load_for("say", models), held_out("say")[:each]):
        heard = digits.NAMES[int(speech_judge().recognise([frames])[0])]
        assert example.answer is not None
        path = folder / f"said-{digits.NAMES[example.answer]}.wav"
        save_clip(griffin_lim(frames), path)
        print(f"  {example.prompt}\n  {frames.shape[1] / 100:.2f} s; a classifier of real clips hears {heard}; {path}")


def main(arguments: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(prog="python -m fused_attention.models.gemini.demo", description=__doc__)
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    p.add_argument("model", type=Path, help="a folder that `train` or `distill` wrote, or one of a seed of `abilities`")
    p.add_argument("--out", type=Path, default=Path("gemini-demo"), help="where pictures and clips go")
    p.add_argument("--each", type=int, default=2, help="examples of each ability")
    p.add_argument("--prompt", default="return the")
    args = p.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    model, _ = load_for("text", args.model)
    print(f"{model.num_parameters():,} parameters, attention: {model.config._attn_implementation}")
    show_understanding(args.model, args.each)
    show_text(args.model, args.prompt)
    show_generation(args.model, args.out, args.each)


if __name__ == "__main__":
    main()
