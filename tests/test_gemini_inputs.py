"""How images and sound get into the multimodal model: preprocessing, the form of the documents, what is refused."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

hf = pytest.importorskip("transformers", reason="transformers is not installed")

from fused_attention.models.gemini import audio  # noqa: E402
from fused_attention.models.gemini.encoders import AudioEncoder  # noqa: E402

from .gemini_models import batch, build, config, frames, pixels  # noqa: E402

pytestmark = pytest.mark.filterwarnings("error::fused_attention.FallbackWarning")


def tone(hertz: float, seconds: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return 0.5 * torch.sin(2 * math.pi * hertz * torch.arange(int(16_000 * seconds), dtype=dtype) / 16_000)


# --- sound ------------------------------------------------------------------------------------------------------------


def test_log_mel_is_its_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    samples = 0.3 * torch.randn(1_111, generator=generator, dtype=torch.float64)
    found = audio.log_mel(samples)
    assert found.shape == (40, 1 + 1_111 // 160) and found.dtype == torch.float64
    wave, window = np.pad(samples.numpy(), 200), 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)
    hertz = np.arange(201) * 40.0
    top = 2595 * np.log10(1 + 8000 / 700)
    edges = 700 * (10 ** (np.linspace(0, top, 42) / 2595) - 1)
    for i in range(found.shape[1]):
        power = np.abs(np.fft.rfft(wave[160 * i : 160 * i + 400] * window)) ** 2
        for m in range(40):
            weight = np.interp(hertz, edges[m : m + 3], [0.0, 1.0, 0.0])
            expected = max(np.log10(max(weight @ power, 1e-300)), -4.0) / 4.0
            assert abs(float(found[m, i]) - expected) < 1e-9


def test_scale_and_silence() -> None:
    loud = audio.log_mel(2 * tone(440, 0.5).float())
    assert loud.dtype == torch.float32 and 0.9 < float(loud.max()) < 1.5
    assert (audio.log_mel(torch.zeros(1000)) == audio.SILENCE).all()
    noise = torch.randint(-1, 2, (8000,), generator=torch.Generator().manual_seed(1)) / 32768
    assert (audio.log_mel(noise) == audio.SILENCE).all(), "the rounding of 16-bit samples is heard"
    filters = audio._filters(40)
    assert (filters.max(1).values > 0.3).all(), "a filter falls between the frequencies of the transform"


@pytest.mark.parametrize("hertz", [220.0, 1000.0, 3000.0])
def test_griffin_lim_gives_the_sound_back(hertz: float) -> None:
    mel = audio.log_mel((tone(hertz, 0.4) * torch.linspace(0, 1, 6400)).float())
    wave = audio.griffin_lim(mel)
    assert wave.shape == (160 * (mel.shape[1] - 1),) and float(wave.abs().max()) <= 1.0
    assert torch.equal(wave, audio.griffin_lim(mel))
    peak = float(torch.fft.rfft(wave).abs().argmax()) * 16_000 / len(wave)
    assert abs(peak - hertz) < 0.05 * hertz + 20
    again = audio.log_mel(wave)
    heard = mel > -0.2
    assert float((again - mel)[heard].abs().mean()) < 0.08
    rough = audio.log_mel(audio.griffin_lim(mel, iterations=0))
    assert float((again - mel)[heard].abs().mean()) < float((rough - mel)[heard].abs().mean()), "iterating does nothing"


def test_griffin_lim_of_silence_is_silent() -> None:
    assert float(audio.griffin_lim(torch.full((40, 10), audio.SILENCE)).abs().max()) < 1e-3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: audio.log_mel(torch.zeros(100), 8000), "sampling_rate: got 8000"),
        (lambda: audio.log_mel(torch.zeros(2, 100)), "samples"),
        (lambda: audio.log_mel(torch.zeros(100, dtype=torch.int16)), "samples"),
        (lambda: audio.griffin_lim(torch.zeros(40, 1)), "at least 2 frames"),
    ],
)
def test_bad_sound_is_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("reduction", [1, 2, 4, 8])
def test_slots_of_a_clip(reduction: int) -> None:
    c = config(audio_reduction=reduction)
    encoder = AudioEncoder(c).double()
    sound = frames(3, 13).double()
    for length in range(1, 14):
        alone = encoder(sound[:1, :, :length])
        assert alone.shape == (c.audio_slots(length), 32) and c.audio_slots(length) == math.ceil(length / reduction)
        padded = encoder(sound, torch.tensor([length, 2, 13]))
        torch.testing.assert_close(padded[: len(alone)], alone, rtol=1e-12, atol=1e-12)


# --- images -----------------------------------------------------------------------------------------------------------


def test_preprocess_image() -> None:
    model = build()
    levels = (pixels(1)[0, 0] * 16).round()
    wanted = (levels / 16)[None, None]
    assert torch.equal(model.preprocess_image(levels / 16), wanted)
    assert torch.equal(model.preprocess_image((levels / 16).double().numpy()), wanted)
    eight_bit = (levels * 15).to(torch.uint8)
    torch.testing.assert_close(model.preprocess_image(eight_bit), levels[None, None] * 15 / 255)
    torch.testing.assert_close(model.preprocess_image(eight_bit.numpy()[:, :, None]), levels[None, None] * 15 / 255)
    large = eight_bit.repeat_interleave(4, 0).repeat_interleave(4, 1)
    small = model.preprocess_image(large)
    assert small.shape == (1, 1, 8, 8) and float((small - levels * 15 / 255).abs().mean()) < 0.12
    for bad, message in ((levels, "outside of 0 .. 1"), (torch.zeros(3, 8, 8), "1 channel")):
        with pytest.raises(ValueError, match=message):
            model.preprocess_image(bad)


def test_preprocess_a_pil_image() -> None:
    pil = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    array = np.arange(64, dtype=np.uint8).reshape(8, 8) * 3
    picture = pil.fromarray(array).convert("RGB")
    torch.testing.assert_close(build().preprocess_image(picture)[0, 0], torch.from_numpy(array) / 255)
    assert build(image_channels=3).preprocess_image(picture).shape == (1, 3, 8, 8)


# --- the form of the documents ----------------------------------------------------------------------------------------


@torch.no_grad()
def test_forward_as_the_documents_call_it() -> None:
    model = build()
    text = {"input_ids": torch.tensor([[1, 20, 21, 22]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    image = model.preprocess_image(pixels(1)[0, 0])
    sound = model.preprocess_audio(tone(440, 0.2).numpy().astype(np.float32))
    assert sound.shape == (1, 6, 21) and model.audio_slots(21) == 6
    clip = [5, *[8] * 6, 6]
    for given, ids in (
        ({}, [1, 20, 21, 22]),
        ({"input_image": image}, [1, 3, 7, 7, 7, 7, 4, 20, 21, 22]),
        ({"input_audio": sound}, [1, *clip, 20, 21, 22]),
        ({"input_image": image, "input_audio": sound}, [1, 3, 7, 7, 7, 7, 4, *clip, 20, 21, 22]),
    ):
        media = {"pixel_values": given.get("input_image"), "input_features": given.get("input_audio")}
        expected = model(torch.tensor([ids]), **media).logits
        assert torch.equal(model(input_text=text, **given).logits, expected)
        joined = model.join_inputs(text, given.get("input_image"), given.get("input_audio"))
        assert joined["input_ids"].tolist() == [ids] and joined["attention_mask"].shape == (1, len(ids))
        assert model.generate(**joined, max_new_tokens=2).shape[1] <= len(ids) + 2
    frames_of_a_video = torch.cat([image, 1 - image])
    ids = model.join_inputs(torch.tensor([[20]]), frames_of_a_video)["input_ids"][0].tolist()
    assert ids == [3, 7, 7, 7, 7, 4, 3, 7, 7, 7, 7, 4, 20], "no bos: media come first"


def changed(**fields: Any) -> dict[str, Any]:
    return {**batch(config()), **fields}


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (changed(pixel_values=None), "pixel_values: got None for 12 slots"),
        (changed(pixel_values=pixels(2)), "pixel_values: got 8 vectors for 12 slots"),
        (changed(pixel_values=torch.zeros(3, 1, 9, 8)), r"pixel_values: got shape \[3, 1, 9, 8\]"),
        (changed(feature_lengths=None), "input_features: got 9 vectors for 8 slots"),
        (changed(feature_lengths=torch.tensor([9, 5])), "input_features: got lengths of shape"),
        (changed(feature_lengths=torch.tensor([9, 0, 12])), "expected 1 .. 12 frames"),
        (changed(input_features=torch.zeros(3, 7, 12)), r"input_features: got shape \[3, 7, 12\]"),
        (changed(image_targets=None), "image_targets: got None for 8 slots"),
        (changed(image_targets=2 * torch.ones(2, 1, 8, 8)), "outside of 0 .. 1"),
        (changed(image_targets=torch.zeros(2, 8, 8)), "image_targets: got shape"),
        (changed(audio_targets=torch.zeros(2, 6, 33), target_lengths=None), "max_audio_slots"),
        (changed(inputs_embeds=torch.zeros(7, 3, 32)), "got both or neither"),
        ({"input_ids": torch.tensor([[9, 9, 9, 9]]), "image_targets": pixels(1)}, "as a first token"),
        ({"inputs_embeds": torch.zeros(1, 3, 32), "pixel_values": pixels(1)}, "inputs_embeds"),
        ({"input_text": torch.ones(2, 3, dtype=torch.long), "input_image": pixels(1)}, "got 2 sequences"),
    ],
)
def test_mismatches_are_refused(inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()(**inputs)


def test_package_does_not_import_the_model() -> None:
    code = (
        "import sys, fused_attention\n"
        "assert not any(name.startswith('fused_attention.models') for name in sys.modules)\n"
        "import fused_attention.models\n"
        "assert 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
