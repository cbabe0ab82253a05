"""An image and a question in, a description out.

The model is one that `python -m fused_attention.models.gemini.train runs/base` made. The image is a file, or a digit
that no training has seen.
"""

import argparse
from pathlib import Path

from PIL import Image

from fused_attention.models.gemini import GeminiForConditionalGeneration, GeminiTokenizer
from fused_attention.models.gemini.data import digits


def held_out_digit() -> Image.Image:
    pixels = digits.load("test").images[0, 0]
    return Image.fromarray((pixels * 255).round().byte().numpy())


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--model", type=Path, default=Path("runs/base"))
    p.add_argument("--image", type=Path, help="bright on dark; default a handwritten digit")
    args = p.parse_args()
    model = GeminiForConditionalGeneration.from_pretrained(args.model / "model").eval()
    tokenizer = GeminiTokenizer.from_pretrained(args.model / "processor")

    image = held_out_digit() if args.image is None else Image.open(args.image)
    inputs_text = tokenizer("Describe the content of this image.", return_tensors="pt")
    inputs_image = model.preprocess_image(image)

    outputs = model(input_text=inputs_text, input_image=inputs_image)  # one pass: the first token of the answer
    first = outputs.logits[0, -1].argmax()
    print(f"First token: {tokenizer.decode(first)}")

    inputs = model.join_inputs(inputs_text, inputs_image)
    output = model.generate(**inputs, max_new_tokens=12)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    print(f"Generated Image Description: {answer.strip()}")


if __name__ == "__main__":
    main()
