"""A trained model in 8 bits, saved, loaded and asked again.

`torch.quantization.quantize_dynamic` is deprecated; torchao does the same: int8 weights, activations quantised as they
come.
"""

import argparse
from pathlib import Path

from fused_attention.models.gemini.quantization import load_quantized, quantize, save_quantized
from fused_attention.models.gemini.train import load


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--model", type=Path, default=Path("runs/base"))
    p.add_argument("--out", type=Path, default=Path("quantized_gemini_model"))
    args = p.parse_args()
    model, processor = load(args.model)
    inputs = processor(text="this book is so good. Is this positive or negative?")
    before = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    size = (args.model / "model" / "model.safetensors").stat().st_size

    weights = save_quantized(quantize(model), args.out)
    quantized = load_quantized(args.out)
    after = quantized.generate(**inputs, max_new_tokens=4, do_sample=False, kv_dtype="int8")

    print(f"float32: {processor.tokenizer.decode(before[0], skip_special_tokens=True)}")
    print(f"int8:    {processor.tokenizer.decode(after[0], skip_special_tokens=True)}")
    print(f"{weights.stat().st_size / size:.3f} of the size")


if __name__ == "__main__":
    main()
