"""`python -m fused_attention.models.gemini.quantize`: a trained model in 8 bits, beside what that costs.

    python -m fused_attention.models.gemini.quantize runs/base runs/base-int8

Linear layers and the embedding hold int8 weights (`quantization.py`); with `--kv-cache int8`, the default, keys and
values too. Prints both models' scores and sizes, and writes them as `scores.json`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from .data.batches import WEIGHTS
from .evaluation import evaluate
from .quantization import load_quantized, quantize, save_quantized
from .train import load


def run(args: argparse.Namespace) -> dict[str, Any]:
    model, processor = load(args.model)
    before_bytes = (args.model / "model" / "model.safetensors").stat().st_size
    before = evaluate(model, processor, args.tasks, args.limit)
    path = save_quantized(quantize(model), args.folder / "model")
    processor.save_pretrained(args.folder / "processor")
    options = {} if args.kv_cache == "model" else {"kv_dtype": args.kv_cache}
    after = evaluate(load_quantized(args.folder / "model"), processor, args.tasks, args.limit, **options)
    after_bytes = path.stat().st_size
    print(f"{'':<12} {'float32':>8} {'int8':>8}")
    for task in before:
        print(f"{task:<12} {before[task]:8.4f} {after[task]:8.4f}")
    print(f"{'bytes':<12} {before_bytes:8} {after_bytes:8}  {after_bytes / before_bytes:.3f} of the size")
    found = {"before": before, "after": after, "bytes": [before_bytes, after_bytes], "kv_cache": args.kv_cache}
    (args.folder / "scores.json").write_text(json.dumps(found, indent=1) + "\n")
    return found


def main(arguments: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(prog="python -m fused_attention.models.gemini.quantize", description=__doc__)
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    p.add_argument("model", type=Path, help="a folder that `train` or `distill` wrote")
    p.add_argument("folder", type=Path, help="where the 8-bit model goes")
    p.add_argument("--kv-cache", choices=("int8", "fp8", "model"), default="int8", help="model: in the model's dtype")
    p.add_argument("--tasks", nargs="+", choices=WEIGHTS, default=list(WEIGHTS), help="default: all")
    p.add_argument("--limit", type=int, help="held-out examples of each task to measure; default all")
    run(p.parse_args(arguments))


if __name__ == "__main__":
    main()
