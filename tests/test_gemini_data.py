"""The multimodal model's data: splits that share nothing, tasks, batches."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("sklearn", reason="scikit-learn is not installed")
pytest.importorskip("scipy", reason="scipy is not installed")
pytest.importorskip("espeakng_loader", reason="espeakng-loader is not installed")
pytest.importorskip("vaderSentiment", reason="vaderSentiment is not installed")

import numpy as np  # noqa: E402

from fused_attention.models.gemini.audio import SILENCE, griffin_lim, log_mel  # noqa: E402
from fused_attention.models.gemini.data import cache, digits, espeak, sentiment, speech, text  # noqa: E402
from fused_attention.models.gemini.data.batches import IGNORED, WEIGHTS, Collator, MixedBatches  # noqa: E402
from fused_attention.models.gemini.data.held_out import held_out  # noqa: E402
from fused_attention.models.gemini.data.tasks import TASKS, Example, insert_words, tokenizer_corpus, training_example  # noqa: E402
from fused_attention.models.gemini.processing import GeminiProcessor  # noqa: E402
from fused_attention.models.gemini.tokenization import train_tokenizer  # noqa: E402

# One group: under pytest-xdist one process makes what the cache does not hold yet.
pytestmark = pytest.mark.xdist_group("gemini-data")


@pytest.fixture(scope="module")
def collator() -> Collator:
    return Collator(GeminiProcessor(train_tokenizer(tokenizer_corpus(), 1024)))


# --- what there is ----------------------------------------------------------------------------------------------


def test_digits_are_split_by_class_and_share_no_picture() -> None:
    train, test = digits.load("train"), digits.load("test")
    assert len(train.labels) == 1437 and len(test.labels) == 360
    shares = test.labels.bincount() / (train.labels.bincount() + test.labels.bincount())
    assert (shares - 0.2).abs().max() < 0.01
    for part in (train, test):
        assert part.images.shape[1:] == (1, 8, 8) and part.images.min() == 0 and part.images.max() == 1
    seen = {tuple(image.flatten().tolist()) for image in train.images}
    assert not any(tuple(image.flatten().tolist()) in seen for image in test.images)
    with pytest.raises(ValueError, match="split: got 'valid'"):
        digits.load("valid")


def test_augmentation_moves_a_picture_by_a_pixel_at_most() -> None:
    image = torch.zeros(1, 8, 8)
    image[0, 3, 4] = 1.0
    moved = torch.stack([digits.augment(image, np.random.default_rng(seed)) for seed in range(100)])
    rows, columns = moved[:, 0].amax(2).argmax(1), moved[:, 0].amax(1).argmax(1)
    assert set(rows.tolist()) == {2, 3, 4} and set(columns.tolist()) == {3, 4, 5}
    assert (moved > 0).sum(dim=(1, 2, 3)).eq(1).all()
    assert 0.75 < moved.amax(dim=(1, 2, 3)).min() < moved.max() <= 1 and torch.equal(moved * 16, (moved * 16).round())


def test_voices_of_the_test_are_held_out() -> None:
    train, test = speech.load("train"), speech.load("test")
    assert not {clip.voice.variant for clip in train} & {clip.voice.variant for clip in test}
    assert {clip.voice.variant for clip in test} == set(speech.HELD_OUT_VARIANTS) and len(train) > 3 * len(test)
    for part in (train, test):
        assert set(Counter(clip.word for clip in part)) == set(range(len(speech.WORDS)))
        for clip in part:
            assert clip.samples.dtype == np.float32 and 1600 < len(clip.samples) <= speech.LONGEST
            assert 0.69 < np.abs(clip.samples).max() < 0.71
    assert not {voice.variant for voice in speech.SPEAKERS.values()} & set(speech.HELD_OUT_VARIANTS)


def test_clips_are_said_again_as_they_are_kept() -> None:
    """Whatever the process has said before."""
    speech.synthesise("hello", speech.SPEAKERS["woman"])
    source = espeak.Synthesiser()
    for clip in speech.load("test")[:40]:
        again = speech.synthesise(speech.WORDS[clip.word], clip.voice, source)
        assert len(again) == len(clip.samples) and np.abs(again - clip.samples).max() <= 0.5001 / 32768


@pytest.mark.parametrize(("accent", "variant", "what"), [("en-us", "nobody", "variant"), ("xx", "m1", "language")])
def test_an_unknown_voice_is_refused(accent: str, variant: str, what: str) -> None:
    with pytest.raises(ValueError, match=f"espeak-ng has no {what}"):
        espeak.Synthesiser().say("one", espeak.Voice(accent, variant))


def test_a_spoken_clip_survives_frames_and_griffin_lim() -> None:
    for digit in (0, 3, 7):
        frames = log_mel(torch.from_numpy(speech.spoken_digit(digit)))
        again = log_mel(griffin_lim(frames, iterations=32))
        assert (again - frames).abs().mean() < 0.04, "of a range of about 1.5"


def test_sentences_are_prose_and_split_by_module() -> None:
    train, valid = text.sentences("train"), text.sentences("valid")
    assert len(train) > 5000 and len(valid) > 300
    assert not set(train) & set(valid) and len(set(train)) == len(train)
    for sentence in train[::50]:
        assert 20 <= len(sentence) <= 200 and sentence[0].isupper() and sentence[-1] in ".!?" and ">>>" not in sentence


def test_sentiment_holds_out_compositions_but_no_word() -> None:
    train, test = sentiment.compose("train"), sentiment.compose("test")
    assert not {s.text for s in train} & {s.text for s in test}
    for part in (train, test):
        assert abs(np.mean([sentence.label for sentence in part]) - 0.5) < 0.02
    rated = sentiment.words()
    assert len(rated) == 300 and all((rated[word] > 0) == (sentiment.lexicon()[word] > 0) for word in rated)
    seen = {word.strip(".,!:") for sentence in train for word in sentence.text.split()}
    assert set(rated) <= seen
    assert any(sentence.text.startswith("to me the") for sentence in test)
    assert not any(sentence.text.startswith("to me the") for sentence in train)


def test_templates_say_nothing_by_themselves() -> None:
    for template in (*sentiment.TEMPLATES, *sentiment.HELD_OUT_TEMPLATES):
        bare = template.replace("{w}", "").replace("{v}", "").replace("{x}", "").lower()
        assert not {word.strip(".,!:") for word in bare.split()} & set(sentiment.lexicon()), template


# --- the tasks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_examples(task: str) -> None:
    made = held_out(task)
    drawn = [training_example(task, np.random.default_rng(seed)) for seed in range(400)]
    assert {example.task for example in (*made, *drawn)} == {task}
    if task != "text":
        answers = Counter(example.answer for example in made)
        assert min(answers.values()) > 0.7 * max(answers.values()) or task == "transcribe"
        assert set(answers) == {example.answer for example in drawn}
    if task in ("draw", "say"):
        for example in drawn:
            assert example.answer is not None and digits.NAMES[example.answer] in example.prompt
    again = training_example(task, np.random.default_rng(5))
    assert again.prompt == drawn[5].prompt and again.answer == drawn[5].answer
    with pytest.raises(ValueError, match="an example has one target"):
        Example(task, "")


def test_what_is_held_out_is_not_trained_on() -> None:
    rng = np.random.default_rng(0)
    for task in ("sentiment", "text"):
        made = {(e.prompt, e.text) for e in held_out(task)}
        assert not made & {(e.prompt, e.text) for e in (training_example(task, rng) for _ in range(2000))}
    test = {tuple(image.flatten().tolist()) for image in digits.load("test").images}
    for example in (training_example("draw", rng) for _ in range(500)):
        assert example.image is not None and tuple(example.image.flatten().tolist()) not in test


@pytest.mark.parametrize("moved, least, most", [(0.0, 1.0, 1.0), (0.5, 0.45, 0.62), (1.0, 0.0, 0.15)])
@pytest.mark.parametrize("task", ["describe", "joint"])
def test_a_share_of_the_pictures_is_moved(task: str, moved: float, least: float, most: float) -> None:
    """The others are the originals; of the moved ones a few stay where they were, at nearly full brightness."""
    originals = {tuple(image.flatten().tolist()) for image in digits.load("train").images}
    rng = np.random.default_rng(0)
    drawn = [training_example(task, rng, moved).images[0] for _ in range(500)]
    same = sum(tuple(image.flatten().tolist()) in originals for image in drawn) / len(drawn)
    assert least <= same <= most


def test_joint_examples_say_yes_to_the_same_digit() -> None:
    """The answer against the picture's label and the clip's, found again by their contents."""
    data = digits.load("test")
    label = {tuple(i.flatten().tolist()): int(d) for i, d in zip(data.images, data.labels, strict=True)}
    clips = {tuple(log_mel(torch.from_numpy(c.samples)).flatten().tolist()): c.word for c in speech.load("test")}
    made = held_out("joint")
    for example in made[:200]:
        seen = label[tuple(example.images[0].flatten().tolist())]
        heard = clips[tuple(example.sounds[0].flatten().tolist())]
        verdict = "yes" if seen == heard else "no"
        assert example.text == f"{speech.WORDS[seen]} and {speech.WORDS[heard]}: {verdict}"
        assert example.answer == int(seen == heard)
    assert Counter((example.text or "").split(": ")[1] for example in made) == {"yes": 360, "no": 360}


# --- batches ----------------------------------------------------------------------------------------------------


def one_of_each() -> list[Example]:
    return [held_out(task)[0] for task in TASKS]


def test_a_batch_is_what_the_model_takes(collator: Collator) -> None:
    examples, tokenizer = one_of_each(), collator.processor.tokenizer
    batch = collator(examples)
    ids, labels, mask = batch["input_ids"], batch["labels"], batch["attention_mask"]
    assert ids.shape == labels.shape == mask.shape and ids.shape[0] == len(TASKS)
    assert batch["pixel_values"].shape == (2, 1, 8, 8) and batch["image_targets"].shape == (1, 1, 8, 8)
    assert batch["input_features"].shape[:2] == (2, 40) and batch["feature_lengths"].dtype == torch.int64
    frames = int(batch["target_lengths"])
    assert batch["audio_targets"].shape == (1, 40, -(-frames // 4) * 4)
    assert (batch["audio_targets"][0, :, frames:] == SILENCE).all()
    slots = {"<image>": 8, "<image_out>": 16, "<audio_out>": -(-frames // 4)}
    slots["<audio>"] = sum(-(-int(length) // 4) for length in batch["feature_lengths"])
    for token, count in slots.items():
        assert ids.flatten().tolist().count(tokenizer.convert_tokens_to_ids(token)) == count, token
    for row, example in enumerate(examples):
        target = labels[row][labels[row] != IGNORED]
        assert target[-1] == tokenizer.eos_token_id and torch.equal(ids[row][labels[row] != IGNORED], target)
        assert (labels[row][mask[row] == 0] == IGNORED).all() and ids[row, 0] == tokenizer.bos_token_id
        weights = batch["label_weights"][row]
        if example.text is not None:
            assert tokenizer.decode(target[:-1]) == example.text.lower()
            assert torch.allclose(weights[labels[row] != IGNORED], torch.tensor(len(target) ** -0.5))
        assert weights[labels[row] == IGNORED].sum() == 0.0 and abs(float(weights.square().sum()) - 1.0) < 1e-5


def test_prompts_are_encoded_as_a_users_are(collator: Collator) -> None:
    """The processor on the prompt and its media gives what the collator puts in front of the target."""
    for example in one_of_each():
        (before, _), processor = collator.encode([example])[0], collator.processor
        expanded, _ = processor.expand([example.prompt], [sound.shape[1] for sound in example.sounds])
        assert before == processor.tokenizer(expanded[0]).input_ids
        if not example.sounds:
            images = [image[0] for image in example.images]
            assert processor(example.prompt, images=images)["input_ids"][0].tolist() == before


def test_answers_are_few_tokens(collator: Collator) -> None:
    for word in (*speech.WORDS, *sentiment.LABELS, "yes", "no"):
        assert len(collator.processor.tokenizer(word, add_special_tokens=False).input_ids) == 1, word
    assert all(len(target) == 4 for _, target in collator.encode(held_out("describe")[:10]))


def test_inserted_words_mean_nothing_and_leave_the_prompt_in_order() -> None:
    """About the share that was asked for, by seed; the target, the media and the words that were there stay."""
    added = there = 0
    for number, example in enumerate((*held_out("sentiment")[:200], *held_out("describe")[:20])):
        longer = insert_words(example, np.random.default_rng(number), 0.3)
        assert longer == insert_words(example, np.random.default_rng(number), 0.3)
        assert replace(longer, prompt=example.prompt) == example
        words, rest = longer.prompt.split(), example.prompt.split()
        new = Counter(words) - Counter(rest)
        assert not new.keys() & sentiment.lexicon().keys()
        left = iter(words)
        assert all(word in left for word in rest), "words are missing or in another order"
        added, there = added + new.total(), there + len(rest)
    assert 0.27 < added / there < 0.33


def test_long_texts_lose_their_end(collator: Collator) -> None:
    short = Collator(collator.processor, longest=12)
    example = max(held_out("text"), key=lambda e: len(e.text or ""))
    assert short(list(held_out("text")[:4]) + [example])["input_ids"].shape[1] == 12
    with pytest.raises(ValueError, match="an example of draw has over 12 tokens"):
        short([held_out("draw")[0]])


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def test_batches_resume_and_follow_seed_and_rank(collator: Collator) -> None:
    straight = [collator(examples) for examples in islice(MixedBatches(batch_size=4, seed=3), 22)]
    resumed = [collator(examples) for examples in islice(MixedBatches(batch_size=4, seed=3, start=14), 8)]
    assert all(same(left, right) for left, right in zip(straight[14:], resumed, strict=True))
    for other in (MixedBatches(batch_size=4, seed=4), MixedBatches(batch_size=4, seed=3, rank=1)):
        assert not same(collator(next(other)), straight[0])


def test_batches_mix_tasks_by_weight_and_are_of_like_length(collator: Collator) -> None:
    batches = list(islice(MixedBatches(batch_size=16, seed=0), 48))
    counts = Counter(example.task for examples in batches for example in examples)
    for task, weight in WEIGHTS.items():
        expected = 48 * 16 * weight / sum(WEIGHTS.values())
        assert 0.6 * expected < counts[task] < 1.4 * expected, task
    real = np.mean([float(collator(examples)["attention_mask"].float().mean()) for examples in batches])
    flat = [example for examples in batches for example in examples]
    shuffled = [flat[i] for i in np.random.default_rng(0).permutation(len(flat))]
    mixed = [collator(shuffled[i : i + 16])["attention_mask"].float().mean() for i in range(0, len(shuffled), 16)]
    assert real > np.mean(mixed) + 0.1, "sorting by length saves no padding"
    only = next(MixedBatches({"draw": 1, "say": 0}, batch_size=8))
    assert {example.task for example in only} == {"draw"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size, start: got 0, 0"),
        ({"weights": {"draw": -1}}, "weights: got"),
        ({"weights": {"draw": 0}}, "weights: got"),
    ],
)
def test_bad_streams_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MixedBatches(**arguments)


def test_an_unknown_task_is_refused() -> None:
    with pytest.raises(ValueError, match="task: got 'sing'"):
        next(MixedBatches({"sing": 1}))
    with pytest.raises(ValueError, match="task: got 'sing'"):
        held_out("sing")


def test_the_cache_never_shows_half_a_file(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.folder().is_relative_to(tmp_path)
    path = cache.folder() / "thing"

    def fails(file: Any) -> None:
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        cache.write(path, fails)
    assert list(path.parent.iterdir()) == []
    cache.write(path, lambda file: file.write(b"whole"))
    assert path.read_bytes() == b"whole" and len(list(path.parent.iterdir())) == 1
