"""A clip and a request in, its words out.

The model is one that `python -m fused_attention.models.gemini.train runs/base` made. The clip is a WAV file, or a word
said by a voice that no training has heard.
"""

import argparse
from pathlib import Path

import numpy as np
from scipy.io import wavfile

from fused_attention.models.gemini import GeminiForConditionalGeneration, GeminiTokenizer
from fused_attention.models.gemini.audio import SAMPLING_RATE
from fused_attention.models.gemini.data import speech


def read(path: Path) -> tuple[np.ndarray, int]:
    """Samples in [-1, 1] and their rate in Hz."""
    rate, samples = wavfile.read(path)
    if samples.ndim == 2:
        samples = samples.mean(1)
    return (samples / 32768 if abs(samples).max() > 1 else samples).astype(np.float32), rate


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--model", type=Path, default=Path("runs/base"))
    p.add_argument("--audio", type=Path, help="a 16 kHz WAV file; default a synthesised word")
    args = p.parse_args()
    model = GeminiForConditionalGeneration.from_pretrained(args.model / "model").eval()
    tokenizer = GeminiTokenizer.from_pretrained(args.model / "processor")

    audio_data, rate = (speech.load("test")[0].samples, SAMPLING_RATE) if args.audio is None else read(args.audio)
    inputs_text = tokenizer("Transcribe the audio to text.", return_tensors="pt")
    inputs_audio = model.preprocess_audio(audio_data, rate)

    outputs = model(input_text=inputs_text, input_audio=inputs_audio)  # one pass: the first token of the answer
    print(f"First token: {tokenizer.decode(outputs.logits[0, -1].argmax())}")

    inputs = model.join_inputs(inputs_text, sound=inputs_audio)
    output = model.generate(**inputs, max_new_tokens=12)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    print(f"Transcribed Text: {answer.strip()}")


if __name__ == "__main__":
    main()
