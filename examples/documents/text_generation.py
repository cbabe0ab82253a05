"""Text from text, twice: the likeliest next tokens of one forward pass, and a continuation by beams.

The model is one that `python -m fused_attention.models.gemini.train runs/base` made: Gemini's own weights are not
public.
"""

import argparse
from pathlib import Path

from fused_attention.models.gemini import GeminiForConditionalGeneration, GeminiTokenizer


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--model", type=Path, default=Path("runs/base"))
    args = p.parse_args()
    model = GeminiForConditionalGeneration.from_pretrained(args.model / "model").eval()
    tokenizer = GeminiTokenizer.from_pretrained(args.model / "processor")

    inputs = tokenizer("What are the latest trends in artificial intelligence?", return_tensors="pt")
    outputs = model(**inputs)
    print("one pass:", tokenizer.decode(outputs.logits.argmax(dim=-1)[0], skip_special_tokens=True))

    for input_text in ("Once upon a time", "写一首关于春天的诗"):
        input_ids = tokenizer(input_text, return_tensors="pt").input_ids
        output = model.generate(input_ids, max_length=100, num_beams=5, no_repeat_ngram_size=2, early_stopping=True)
        print("beams:", tokenizer.decode(output[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
