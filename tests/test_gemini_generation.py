"""The multimodal model generates: on every cache the same, with beams and padding; images and sound slot by slot."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

hf = pytest.importorskip("transformers", reason="transformers is not installed")

from fused_attention.cache import KVCache, PagedKVCache  # noqa: E402
from fused_attention.models.gemini.audio import SILENCE  # noqa: E402

from .gemini_models import VOCABULARY, build, config, frames, pad, pixels, prompts, text  # noqa: E402
from .numerics import assert_close  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("error::fused_attention.FallbackWarning"),
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*:FutureWarning"),
]
BEAMS = {"num_beams": 5, "no_repeat_ngram_size": 2, "early_stopping": True, "max_length": 100}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False, "max_new_tokens": 20},
    "sampling": {"do_sample": True, "temperature": 1.5, "max_new_tokens": 20},
    "beams": {**BEAMS, "do_sample": False},
    "several beams": {"num_beams": 4, "num_return_sequences": 3, "do_sample": True, "max_new_tokens": 12},
}
CACHES: dict[str, dict[str, Any]] = {
    "dense": {"kv_cache": "dense"},
    "paged": {"kv_cache": "paged"},
    "transformers' own": {"cache_implementation": "dynamic"},
}


def generate(model: Any, **options: Any) -> Tensor:
    torch.manual_seed(3)
    return model.generate(**prompts(model.config), **options)


@pytest.fixture(scope="module")
def without_cache() -> dict[str, Tensor]:
    found = {way: generate(build(), use_cache=False, **options) for way, options in WAYS.items()}
    for way, ids in found.items():
        written = ids[:, prompts(config())["input_ids"].shape[1] :]
        assert len({tuple(row.tolist()) for row in written}) > 3, (
            f"{way}: nothing is tested, all sequences are the same"
        )
    return found


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("way", WAYS)
def test_every_cache_gives_what_no_cache_gives(way: str, cache: str, without_cache: dict[str, Tensor]) -> None:
    assert torch.equal(generate(build(), **WAYS[way], **CACHES[cache]), without_cache[way])


@pytest.mark.parametrize("way", ["greedy", "beams"])
def test_eager_generates_the_same(way: str, without_cache: dict[str, Tensor]) -> None:
    for options in ({}, {"kv_cache": "dense"}):
        assert torch.equal(generate(build("eager"), **WAYS[way], **options), without_cache[way])


def test_default_cache_is_ours_and_slots_are_never_text() -> None:
    model = build()
    out = generate(model, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    assert isinstance(out.past_key_values.layers[0].kv, KVCache)
    paged = generate(model, max_new_tokens=3, kv_cache="paged", kv_dtype="fp8", return_dict_in_generate=True)
    kv = paged.past_key_values.layers[0].kv
    assert isinstance(kv, PagedKVCache) and kv.kv_dtype == torch.float8_e4m3fn
    with torch.no_grad():
        model.lm_head.weight[model.config.slot_token_ids] += 10 * model.lm_head.weight.abs().max()
    written = generate(model, max_new_tokens=9, do_sample=True)[:, prompts(model.config)["input_ids"].shape[1] :]
    assert not torch.isin(written, torch.tensor(model.config.slot_token_ids)).any()
    with pytest.raises(ValueError, match="kv_cache, kv_dtype.*use_cache=False"):
        generate(model, kv_cache="dense", use_cache=False)
    with pytest.raises(ValueError, match="kv_dtype: got 'int4'"):
        generate(model, kv_dtype="int4")
    with pytest.raises(ValueError, match="kind: got 'ring'"):
        generate(model, kv_cache="ring")


def logits_in_steps(model: Any, cache: Any, sizes: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Logits at the real positions of left-padded sequences, whose first tokens hold the images."""
    inputs = prompts(model.config)
    more = torch.randint(11, VOCABULARY, (5, sum(sizes)), generator=torch.Generator().manual_seed(2))
    ids = torch.cat([inputs.pop("input_ids"), more], 1)
    mask = torch.cat([inputs.pop("attention_mask"), torch.ones_like(more)], 1)
    media = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    if cache is None:
        return model(ids, attention_mask=mask, **media).logits[mask.bool()]
    end, found = ids.shape[1] - sum(sizes), []
    for size in (0, *sizes):
        start, end = (0, end) if not size else (end, end + size)
        out = model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, **media)
        media = {}
        found.append(out.logits)
    return torch.cat(found, 1)[mask.bool()]


KINDS = [("dense", None), ("paged", None), ("dense", "int8"), ("paged", "int8"), ("dense", "fp8"), ("paged", "fp8")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("kind", "kv_dtype"), KINDS)
@torch.no_grad()
def test_logits_in_steps(kind: str, kv_dtype: str | None, dtype: torch.dtype, say: Callable[[str], None]) -> None:
    sizes = (1, 1, 7, 1, 60, 1)  # past the first allocation, and past several windows and pages
    ref = logits_in_steps(build(dtype=torch.float64), None, sizes, torch.float64)
    same = logits_in_steps(build("eager", dtype), None, sizes, dtype)
    model = build(dtype=dtype)
    cache = model.make_cache(kind, kv_dtype, max_length=100)
    ours = logits_in_steps(model, cache, sizes, dtype)
    assert cache.get_seq_length() == prompts(config())["input_ids"].shape[1] + sum(sizes)
    error = float((ours.double() - ref).norm() / ref.norm())
    if kv_dtype is None:
        assert_close(ours, same, ref, name="logits")
    else:
        # A code is 1/254 or 1/32 of the largest value off at most, and three layers add up.
        assert error < (0.03 if kv_dtype == "int8" else 0.1)
        assert error > 1e-4, "nothing was quantised"
    say(f"cache {kind:<6}{kv_dtype or 'exact':<6}{str(dtype).removeprefix('torch.'):<9}relative error {error:.1e}")


@torch.no_grad()
def test_cache_methods_that_transformers_calls() -> None:
    model = build()
    ids = torch.tensor([text(8, 1), text(8, 2), text(8, 3)])
    mask = torch.ones_like(ids)
    mask[1, :3] = 0

    def step(cache: Any, ids: Tensor, mask: Tensor) -> Tensor:
        return model(ids, attention_mask=mask, past_key_values=cache).logits[:, -1]

    for kind in ("dense", "paged"):
        cache = model.make_cache(kind, max_length=40)
        first = step(cache, ids, mask)
        chosen = torch.tensor([2, 1, 1, 0])
        cache.batch_select_indices(chosen)
        more = torch.nn.functional.pad(mask[chosen], (0, 1), value=1)
        new = torch.tensor([[12], [13], [14], [15]])
        alone = model(torch.cat([ids[chosen], new], 1), attention_mask=more).logits[:, -1]
        torch.testing.assert_close(step(cache, new, more), alone)
        cache.crop(-1)
        assert cache.get_seq_length() == 8
        torch.testing.assert_close(step(cache, new, more), alone)
        cache.reset()
        assert cache.get_seq_length() == 0
        torch.testing.assert_close(step(cache, ids[chosen], mask[chosen]), first[chosen])
        cache.batch_repeat_interleave(2)
        twice, new = more.repeat_interleave(2, 0), torch.arange(11, 19)[:, None]
        alone = model(torch.cat([ids[chosen].repeat_interleave(2, 0), new], 1), attention_mask=twice).logits[:, -1]
        torch.testing.assert_close(step(cache, new, twice), alone)
        with pytest.raises(ValueError, match="tokens_to_remove"):
            cache.crop(1)
        with pytest.raises(TypeError, match="decode_attention"):
            cache.update(torch.zeros(1), torch.zeros(1), 0)


def test_streams_tokens() -> None:
    class Streamer:
        def __init__(self) -> None:
            self.put_in: list[Tensor] = []
            self.ended = False

        def put(self, value: Tensor) -> None:
            self.put_in.append(value.flatten())

        def end(self) -> None:
            self.ended = True

    model, streamer = build(), Streamer()
    ids = torch.tensor([text(5, 1)])
    out = model.generate(ids, streamer=streamer, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert streamer.ended and len(streamer.put_in) == 7
    assert torch.equal(torch.cat(streamer.put_in), out[0])


def test_assisted_generation_takes_rejected_tokens_back() -> None:
    model, ids = build(), torch.tensor([text(6, 4)])
    options = {"max_new_tokens": 12, "do_sample": False}
    plain = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=3, **options), plain)


# --- images and sound -------------------------------------------------------------------------------------------------


def teacher_forced_image(model: Any, prompt: dict[str, Tensor], images: Tensor) -> Tensor:
    """The likeliest image, each patch given the patches before it in `images`."""
    c, count = model.config, len(images)
    slots = torch.tensor([[c.boi_token_id, *[c.image_out_token_id] * c.image_out_tokens]]).expand(count, -1)
    ids = torch.cat([prompt["input_ids"], slots], 1)
    mask = torch.cat([prompt["attention_mask"], torch.ones_like(slots)], 1)
    media = {k: v for k, v in prompt.items() if k not in ("input_ids", "attention_mask")}
    hidden = model(ids, attention_mask=mask, image_targets=images, **media).last_hidden_state
    levels = model.image_decoder(hidden[:, -c.image_out_tokens - 1 : -1]).argmax(-1)
    return model.image_decoder.join(levels / (c.image_levels - 1))


@pytest.mark.parametrize("implementation", ["fused_attention", "eager"])
@torch.no_grad()
def test_generated_images(implementation: str) -> None:
    model = build(implementation)
    prompt = prompts(model.config)
    drawn = model.generate_images(**prompt, do_sample=False)
    assert drawn.shape == (5, 1, 8, 8) and torch.equal((drawn * 16).round() / 16, drawn)
    assert len({tuple(x.flatten().tolist()) for x in drawn}) > 3
    assert torch.equal(teacher_forced_image(model, prompt, drawn), drawn)

    def sample(seed: int, temperature: float) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return model.generate_images(**prompt, temperature=temperature, generator=generator)

    assert torch.equal(sample(1, 1.0), sample(1, 1.0)) and not torch.equal(sample(1, 1.0), sample(2, 1.0))
    assert torch.equal(sample(1, 1e-4), drawn)
    with pytest.raises(ValueError, match="temperature"):
        sample(1, 0.0)


@torch.no_grad()
def test_sampled_levels_have_the_models_frequencies() -> None:
    decoder = build().image_decoder
    hidden = torch.randn(1, 32, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    drawn = decoder.draw(hidden.expand(20_000, -1), 2.0, generator)  # [20000, 16]
    chance = (decoder(hidden)[0] / 2.0).softmax(-1)  # [16, 17]
    found = torch.nn.functional.one_hot((drawn * 16).round().long(), 17).float().mean(0)
    assert float((found - chance).abs().max()) < 5 * (0.25 / 20_000) ** 0.5


STOP_LATER = 2.0  # with the random weights alone, all clips end at once


@pytest.mark.parametrize("implementation", ["fused_attention", "eager"])
@torch.no_grad()
def test_generated_sound(implementation: str) -> None:
    model = build(implementation)
    model.audio_decoder.head.bias[-1] -= STOP_LATER
    c, prompt = model.config, prompts(model.config)
    boa = torch.full((5, 1), c.boa_token_id)
    # A prompt that ends in boa already is the same prompt.
    ended = {**prompt, "input_ids": torch.cat([prompt["input_ids"], boa], 1)}
    ended["attention_mask"] = torch.nn.functional.pad(prompt["attention_mask"], (0, 1), value=1)
    sound, lengths = model.generate_audio(**prompt)
    again, same_lengths = model.generate_audio(**ended)
    assert torch.equal(sound, again) and torch.equal(lengths, same_lengths)
    assert len(set(lengths.tolist())) > 1 and int(lengths.max()) == sound.shape[2] and not (lengths % 4).any()
    slots = sound.shape[2] // 4
    out = torch.full((5, slots), c.audio_out_token_id)
    ids = torch.cat([ended["input_ids"], out], 1)
    mask = torch.nn.functional.pad(ended["attention_mask"], (0, slots), value=1)
    media = {k: prompt[k] for k in ("pixel_values", "input_features", "feature_lengths")}
    forced = model(ids, attention_mask=mask, audio_targets=sound, **media).last_hidden_state
    said, last = model.audio_decoder(forced[:, -slots - 1 : -1])
    for b, length in enumerate(lengths.tolist()):
        torch.testing.assert_close(model.audio_decoder.join(said)[b, :, :length], sound[b, :, :length])
        assert (sound[b, :, length:] == SILENCE).all()
        ends = (last[b] > 0).nonzero().flatten().tolist()
        assert length == 4 * (ends[0] + 1 if ends else c.max_audio_slots)
    short, short_lengths = model.generate_audio(**prompt, max_slots=1)
    assert short.shape[2] == 4 and torch.equal(short, sound[:, :, :4]) and (short_lengths == 4).all()
    with pytest.raises(ValueError, match="max_slots"):
        model.generate_audio(**prompt, max_slots=9)


def test_prompts_that_end_differently_are_refused() -> None:
    model = build()
    rows = pad([[1, 12, model.config.boi_token_id], [1, 12, 13]], "left")
    with pytest.raises(ValueError, match="all of them or none"):
        model.generate_images(**rows)
    with pytest.raises(ValueError, match="expected it in front"):
        model.generate_images(**pad([[1, 12], [1, 12, 13]], "right"))


def test_media_after_the_first_tokens_are_refused() -> None:
    model = build()
    cache = model.make_cache()
    with torch.no_grad():
        model(torch.tensor([text(3, 1)]), past_key_values=cache)
        ids = torch.tensor([[3, 7, 7, 7, 7, 4]])
        with pytest.raises(ValueError, match="first tokens"):
            model(ids, pixel_values=pixels(1), past_key_values=cache)
        with pytest.raises(ValueError, match=r"attention_mask: got shape \[1, 1\]"):
            model(torch.tensor([[12]]), attention_mask=torch.ones(1, 1), past_key_values=cache)
    assert frames(1, 4).shape == (1, 6, 4)
