"""The multimodal model's tokenizer and processor: what becomes of text, pictures and sound."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("tokenizers", reason="tokenizers is not installed")
pytest.importorskip("scipy", reason="scipy is not installed")
Image = pytest.importorskip("PIL.Image", reason="pillow is not installed")

import numpy as np  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from fused_attention.models.gemini.audio import SAMPLING_RATE, SILENCE, log_mel  # noqa: E402
from fused_attention.models.gemini.processing import GeminiProcessor, to_log_mel, to_pixels  # noqa: E402
from fused_attention.models.gemini.tokenization import SPECIAL_TOKENS, GeminiTokenizer, train_tokenizer  # noqa: E402

CORPUS = ["Describe the content of this image.", "a handwritten seven", "What is said? It is the word seven."] * 20
TOKENIZER = train_tokenizer(CORPUS, 512)


@pytest.fixture
def processor() -> GeminiProcessor:
    return GeminiProcessor(TOKENIZER, image_tokens=4, audio_stride=4)


def tone(seconds: float, rate: int = SAMPLING_RATE) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * 440 * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


# --- the tokenizer ----------------------------------------------------------------------------------------------


def test_special_tokens_have_names_and_fixed_ids() -> None:
    for index, (name, token) in enumerate(SPECIAL_TOKENS.items()):
        assert getattr(TOKENIZER, name) == token
        assert getattr(TOKENIZER, f"{name}_id") == TOKENIZER.convert_tokens_to_ids(token) == index
    assert TOKENIZER("<boi><image><eoi>").input_ids == [TOKENIZER.bos_token_id, 3, 7, 4]
    assert TOKENIZER.decode([1, 3, 7, 4, 2, 0], skip_special_tokens=True) == ""


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=300))
def test_every_text_comes_back_and_nothing_is_unknown(text: str) -> None:
    ids = TOKENIZER(text, add_special_tokens=False).input_ids
    assert TOKENIZER.unk_token_id not in ids
    assert TOKENIZER.decode(ids) == TOKENIZER.backend_tokenizer.normalizer.normalize_str(text)


@pytest.mark.parametrize(
    "text",
    [
        "What are the latest trends, in AI?  It's\n\n  ## new ### x#y #",
        "写一首关于春天的诗",
        "a" * 500 + " " * 300 + "!",
    ],
    ids=["punctuation", "chinese", "long"],
)
def test_the_text_comes_back_in_lower_case(text: str) -> None:
    ids = TOKENIZER(text).input_ids
    assert ids[0] == TOKENIZER.bos_token_id and TOKENIZER.unk_token_id not in ids
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == text.lower()


def test_pieces_are_learned_and_the_longest_are_taken() -> None:
    assert TOKENIZER.tokenize("a handwritten seven") == ["a", "Ġhandwritten", "Ġseven"]
    assert TOKENIZER.tokenize(" sevens") == ["Ġseven", "##s"]
    assert TOKENIZER.tokenize("写一") == ["å", "##Ĩ", "##Ļ", "ä", "##¸", "##Ģ"]


def test_training_repeats_and_keeps_the_size() -> None:
    assert train_tokenizer(CORPUS, 450).get_vocab() == train_tokenizer(CORPUS, 450).get_vocab()
    assert len(train_tokenizer(CORPUS, 400)) == 400
    assert sorted(TOKENIZER.get_vocab().values()) == list(range(len(TOKENIZER)))
    with pytest.raises(ValueError, match="vocab_size must be at least 382"):
        train_tokenizer(CORPUS, 381)


def test_tokenizer_saves_and_loads(tmp_path: Path) -> None:
    TOKENIZER.save_pretrained(tmp_path)
    loaded = GeminiTokenizer.from_pretrained(tmp_path)
    assert type(loaded) is GeminiTokenizer and loaded.get_vocab() == TOKENIZER.get_vocab()
    assert loaded.audio_out_token_id == TOKENIZER.audio_out_token_id and loaded.padding_side == "left"
    for text in ("Hello <image> seven", "写 a  b"):
        assert loaded(text).input_ids == TOKENIZER(text).input_ids
        assert loaded.decode(loaded(text).input_ids) == TOKENIZER.decode(TOKENIZER(text).input_ids)


# --- the processor ----------------------------------------------------------------------------------------------


def test_placeholders_become_slots_and_media_keep_their_order(processor: GeminiProcessor) -> None:
    clips = [tone(0.5), tone(0.123)]
    texts = ["<image> what is said <audio>", "<audio> then <video> and <image>"]
    pictures = [np.full((8, 8), level, np.float32) for level in (0.1, 0.2)]
    frames = [np.full((8, 8), level, np.float32) for level in (0.5, 0.6, 0.7)]
    batch = processor(texts, images=pictures, audio=clips, videos=frames)
    assert [round(float(p.mean()), 3) for p in batch["pixel_values"]] == [0.1, 0.5, 0.6, 0.7, 0.2]
    assert batch["pixel_values"].shape == (5, 1, 8, 8) and batch["pixel_values"].dtype == torch.float32
    lengths = [1 + len(clip) // 160 for clip in clips]
    assert batch["feature_lengths"].tolist() == lengths
    assert batch["input_features"].shape == (2, 40, max(lengths))
    assert (batch["input_features"][1, :, lengths[1] :] == SILENCE).all()
    torch.testing.assert_close(batch["input_features"][0], log_mel(torch.from_numpy(clips[0])))
    for row, images, length in zip(batch["input_ids"], (1, 4), lengths, strict=True):
        assert (row == TOKENIZER.image_token_id).sum() == images * 4
        assert (row == TOKENIZER.boi_token_id).sum() == images
        assert (row == TOKENIZER.audio_token_id).sum() == -(-length // 4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(processor: GeminiProcessor, side: str) -> None:
    batch = processor(["seven", "the content of this image"], padding_side=side)
    mask = batch["attention_mask"]
    short = int(mask[0].sum())
    assert mask[1].all() and 0 < short < mask.shape[1]
    kept = slice(-short, None) if side == "left" else slice(0, short)
    assert mask[0, kept].all() and batch["input_ids"][0, kept].tolist() == TOKENIZER("seven").input_ids
    assert ((batch["input_ids"] == TOKENIZER.pad_token_id) == (mask == 0)).all()


def test_media_without_placeholders_stand_in_front(processor: GeminiProcessor) -> None:
    picture = Image.new("L", (16, 16), 255)
    bare = processor("describe", images=picture, audio=tone(0.2))
    assert torch.equal(
        bare["input_ids"], processor("<image><audio>describe", images=picture, audio=tone(0.2)).input_ids
    )


def test_pictures_of_every_kind(processor: GeminiProcessor) -> None:
    half = np.zeros((16, 24), np.float32)
    half[:, 12:] = 1.0
    expected = to_pixels(half)
    assert expected.shape == (1, 8, 8) and expected[0, :, :3].max() == 0 and expected[0, :, 5:].min() == 1
    byte = (half * 255).astype(np.uint8)
    for same in (torch.from_numpy(half), byte, Image.fromarray(byte), byte[..., None], half[None]):
        torch.testing.assert_close(to_pixels(same), expected)
    red = Image.new("RGB", (8, 8), (255, 0, 0))
    torch.testing.assert_close(to_pixels(red), torch.full((1, 8, 8), 0.299))
    torch.testing.assert_close(to_pixels(np.array(red).transpose(2, 0, 1)), torch.full((1, 8, 8), 0.299))


def test_sound_is_resampled_and_mixed_down() -> None:
    # A tone has the same frames whatever its rate was, but for the ends, where the filter rings.
    expected = log_mel(torch.from_numpy(tone(1.0)))
    for rate in (8_000, 22_050, 44_100, 48_000):
        frames = to_log_mel(tone(1.0, rate), rate)
        assert frames.shape == expected.shape
        assert (frames - expected)[:, 5:-5].abs().max() < 0.02, f"{rate} Hz"
    integers = (tone(1.0) * 32767).astype(np.int16)
    assert (to_log_mel(np.stack([integers, integers])) - expected).abs().max() < 0.01


def test_processor_saves_and_loads(tmp_path: Path) -> None:
    GeminiProcessor(TOKENIZER, image_tokens=16, audio_stride=2).save_pretrained(tmp_path)
    loaded = GeminiProcessor.from_pretrained(tmp_path)
    assert (loaded.image_tokens, loaded.audio_stride, loaded.image_size) == (16, 2, 8)
    assert type(loaded.tokenizer) is GeminiTokenizer
    assert "tokenizer" not in json.loads((tmp_path / "processor_config.json").read_text())
    batch = loaded("<image>", images=np.zeros((8, 8), np.float32))
    assert loaded.decode(batch["input_ids"][0]) == "<bos><boi>" + "<image>" * 16 + "<eoi>"
    assert loaded.audio_slots(5) == 3


PICTURE = np.zeros((8, 8), np.float32)
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "a placeholder too many": (dict(text="<image> <image>", images=PICTURE), "images: got 1, expected 2"),
    "no clip": (dict(text="<audio>"), "audio: got 0, expected 1"),
    "a clip too many": (dict(text="<image>", images=PICTURE, audio=tone(0.1)), "audio: got 1, expected 0"),
    "no video": (dict(text="<video>"), "videos: got 0, expected 1"),
    "an empty video": (dict(text="<video>", videos=[[]]), "videos: one has no pictures"),
    "bright": (dict(images=PICTURE + 2), r"images: got floats in \[2, 2\]"),
    "NaN": (dict(images=PICTURE * np.nan), "images: got floats in"),
    "four channels": (dict(images=np.zeros((8, 8, 4), np.uint8)), "images: got torch.uint8|images: got torch.float32"),
    "integers": (dict(images=np.zeros((8, 8), np.int64)), "images: got torch.int64"),
    "no samples": (dict(audio=np.zeros(0, np.float32)), "audio: got float32"),
    "infinite": (dict(audio=np.full(400, np.inf)), "audio: holds values that are not finite"),
    "no rate": (dict(audio=tone(0.1), sampling_rate=0), "sampling_rate: got 0 Hz"),
    "no side": (dict(text="a", padding_side="top"), "padding_side: got 'top'"),
    "no texts": (dict(text=[]), "text: an empty list"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(processor: GeminiProcessor, case: str) -> None:
    arguments, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        processor(**arguments)


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="audio_stride: got 0"):
        GeminiProcessor(TOKENIZER, audio_stride=0)
