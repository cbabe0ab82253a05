"""Two tasks, one set of parameters: a sentence is judged, and a sentence is continued.

The model is one that `python -m fused_attention.models.gemini.train runs/base` made.
"""

import argparse
from pathlib import Path

import torch

from fused_attention.models.gemini import GeminiForConditionalGeneration, GeminiTokenizer


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--model", type=Path, default=Path("runs/base"))
    args = p.parse_args()
    model = GeminiForConditionalGeneration.from_pretrained(args.model / "model").eval()
    tokenizer = GeminiTokenizer.from_pretrained(args.model / "processor")

    # The answer is a word: its first token decides, and only "negative" and "positive" are compared.
    inputs = tokenizer("I love this new phone! Is this positive or negative?", return_tensors="pt")
    labels = [tokenizer(name, add_special_tokens=False).input_ids[0] for name in ("negative", "positive")]
    with torch.no_grad():
        sentiment = int(model(**inputs).logits[0, -1, labels].argmax())  # 0 negative, 1 positive

    inputs = tokenizer("The future of AI in healthcare is", return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=30, do_sample=False)

    print(f"Sentiment: {'Positive' if sentiment == 1 else 'Negative'}")
    print(f"Generated Text: {tokenizer.decode(output[0], skip_special_tokens=True)}")


if __name__ == "__main__":
    main()
