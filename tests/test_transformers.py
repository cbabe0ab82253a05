"""transformers' models with attn_implementation="fused_attention" beside "eager" and "sdpa"."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from .numerics import assert_close

hf = pytest.importorskip("transformers", reason="transformers is not installed")

from fused_attention.integrations import transformers as integration  # noqa: E402

from .transformers_models import MODELS, build  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("error::fused_attention.FallbackWarning"),
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*:FutureWarning"),
]
GENERATING = [name for name, model in MODELS.items() if model.generates]
PADDED = [(name, side) for name, model in MODELS.items() for side in model.sides]


@pytest.fixture(autouse=True)
def registered() -> None:
    integration.register()


@contextmanager
def exact_softmax() -> Iterator[None]:
    """Eager models take their softmax in float32 whatever the dtype; the float64 reference must not."""
    plain = nn.functional.softmax

    def wide(x: Tensor, dim: Any = None, **options: Any) -> Tensor:
        return plain(x, dim=dim) if x.dtype == torch.float64 else plain(x, dim=dim, **options)

    with mock.patch.object(nn.functional, "softmax", wide):
        yield


def real_positions(logits: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """What stands at padding means nothing: eager averages there, sdpa and ours give zeros."""
    mask = inputs.get("decoder_attention_mask", inputs.get("attention_mask"))
    return logits[mask.bool()] if mask is not None and mask.shape == logits.shape[:2] else logits


def run(name: str, implementation: str, inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The logits, and the loss's gradient to all parameters as one vector."""
    model = build(name, implementation, dtype)
    cast = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    out = model(**cast)
    out.loss.backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return {"logits": real_positions(out.logits, cast).detach(), "gradients": torch.cat(gradients)}


def run_sdpa(name: str, inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor] | None:
    """sdpa's own results, or None for the two models that it refuses."""
    if name in ("Gemma 2", "gpt-oss"):
        with pytest.raises(ValueError, match="does not support an attention implementation through torch"):
            build(name, "sdpa", dtype)
        return None
    return run(name, "sdpa", inputs, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "side"), PADDED)
def test_logits_and_gradients(name: str, side: str, dtype: torch.dtype, say: Callable[[str], None]) -> None:
    inputs = MODELS[name].inputs(side)
    with exact_softmax():
        ref = run(name, "eager", inputs, torch.float64)
    same, ours = run(name, "eager", inputs, dtype), run(name, integration.NAME, inputs, dtype)
    sdpa = run_sdpa(name, inputs, dtype)
    figures = []
    for part in ref:
        assert_close(ours[part], same[part], ref[part], grad=part == "gradients", name=part)
        errors = [float((r[part].double() - ref[part]).abs().max()) for r in (ours, same, sdpa) if r is not None]
        peer = "sdpa refuses" if sdpa is None else f"sdpa {errors[2]:.1e}"
        figures.append(f"{part} {errors[0]:.1e} eager {errors[1]:.1e} {peer:<14}")
    kind = str(dtype).removeprefix("torch.")
    say(f"{name:<19}{kind:<9}padded {side:<6}error in {'in '.join(figures)}")


# --- generate ---------------------------------------------------------------------------------------------------

BEAMS = {"num_beams": 5, "no_repeat_ngram_size": 2, "early_stopping": True}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.5},
    "beams": BEAMS,
    "sampled beams": {"do_sample": True, "num_beams": 3},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "static cache and beams": {"cache_implementation": "static", "disable_compile": True, **BEAMS},
    "prefill in chunks": {"prefill_chunk_size": 4},
}
# Whisper's own generate does not take its prompt in chunks; T5's prompt is the encoder's, whose mask chunks cut short.
GENERATED = [(n, w) for n in GENERATING for w in WAYS if n not in ("Whisper", "T5") or w != "prefill in chunks"]


def generate(name: str, implementation: str, **options: Any) -> Tensor:
    """Token ids for a batch that is padded on the left, on the right for encoders."""
    inputs = MODELS[name].inputs(MODELS[name].sides[0])
    prompt = {k: v for k, v in inputs.items() if k != "labels" and not k.startswith("decoder_")}
    torch.manual_seed(11)
    return build(name, implementation).generate(**prompt, max_new_tokens=12, **options)


@pytest.mark.parametrize(("name", "way"), GENERATED)
def test_generates_the_same_tokens(name: str, way: str) -> None:
    theirs = generate(name, "eager", **WAYS[way])
    assert len({tuple(row.tolist()) for row in theirs}) > 1, "every sequence is the same: nothing is tested"
    assert torch.equal(generate(name, integration.NAME, **WAYS[way]), theirs)
