"""The judges of generated pictures and clips: trained on real data alone, measured on held-out real data."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

pytest.importorskip("sklearn", reason="scikit-learn is not installed")
pytest.importorskip("scipy", reason="scipy is not installed")
pytest.importorskip("espeakng_loader", reason="espeakng-loader is not installed")

from fused_attention.models.gemini import judges  # noqa: E402
from fused_attention.models.gemini.audio import griffin_lim  # noqa: E402
from fused_attention.models.gemini.data import digits, speech  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("gemini-data")]


def test_digits_of_the_test(say: Callable[[str], None]) -> None:
    data = digits.load("test")
    accuracy = float((judges.digit_judge().recognise(data.images) == data.labels).float().mean())
    say(f"judge of pictures: {accuracy:.1%} of {len(data.labels)} held-out digits")
    assert accuracy > 0.97


def test_voices_of_the_test(say: Callable[[str], None]) -> None:
    frames, labels = judges.spoken_digits("test")
    right = judges.speech_judge().recognise(frames) == labels
    say(f"judge of clips: {float(right.float().mean()):.1%} of {len(labels)} clips of held-out voices")
    assert right.float().mean() > 0.9
    voices = [clip.voice.variant for clip in speech.load("test") if clip.word < 10]
    for variant in speech.HELD_OUT_VARIANTS:
        assert right[torch.tensor([voice == variant for voice in voices])].float().mean() > 0.7, variant


def test_waveforms_and_what_griffin_lim_makes_of_frames() -> None:
    frames, labels = judges.spoken_digits("test")
    chosen = list(range(0, len(frames), 24))
    judge, spoken = judges.speech_judge(), [clip for clip in speech.load("test") if clip.word < 10]
    assert torch.equal(
        judge.recognise([spoken[i].samples for i in chosen]), judge.recognise([frames[i] for i in chosen])
    )
    made = judge.recognise([griffin_lim(frames[i]) for i in chosen])
    assert (made == labels[chosen]).float().mean() > 0.85


def test_a_medium_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"images: got \[8, 8\]"):
        judges.digit_judge().recognise(torch.zeros(8, 8))
    with pytest.raises(ValueError, match=r"clips: got one of shape \[2, 16000\]"):
        judges.speech_judge().recognise([torch.zeros(2, 16000)])
    assert judges.speech_judge().recognise([]).shape == (0,)


def test_noise_and_shuffled_labels_are_not_recognised() -> None:
    """The figures above are not what the classes alone give."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(500, 1, 8, 8, generator=generator)
    truth = torch.randint(0, 10, (500,), generator=generator)
    assert (judges.digit_judge().recognise(noise) == truth).float().mean() < 0.2
