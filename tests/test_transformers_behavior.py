"""transformers' models on our kernels: packing, continuous batching, training, torch.compile, attention weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from .numerics import assert_close

hf = pytest.importorskip("transformers", reason="transformers is not installed")

from fused_attention.integrations import transformers as integration  # noqa: E402
from fused_attention.integrations.transformers_masks import StructuredMask  # noqa: E402

from .transformers_models import BATCH, LENGTH, MODELS, PAD, VOCABULARY, build  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("error::fused_attention.FallbackWarning"),
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*:FutureWarning"),
]
LENGTHS = (5, 1, 9, 7)


@pytest.fixture(autouse=True)
def registered() -> None:
    integration.register()


def tokens(length: int, seed: int) -> Tensor:
    return torch.randint(5, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(seed))


# --- packing ----------------------------------------------------------------------------------------------------------

SEQUENCES = [tokens(n, seed) for seed, n in enumerate(LENGTHS)]
PACKED = torch.cat(SEQUENCES, 1)
POSITIONS = torch.cat([torch.arange(n) for n in LENGTHS])[None]
STARTS = torch.tensor([0, *LENGTHS]).cumsum(0).int()
_LENGTH_KEYWORDS = {"max_length_q": max(LENGTHS), "max_length_k": max(LENGTHS)}
OFFSETS = {"cu_seq_lens_q": STARTS, "cu_seq_lens_k": STARTS, **_LENGTH_KEYWORDS}
PACKINGS: dict[str, dict[str, Any]] = {
    "position_ids": {"position_ids": POSITIONS},
    "cu_seq_lens": {"position_ids": POSITIONS, **OFFSETS},
    "cu_seq_lens and a mask": {"position_ids": POSITIONS, "attention_mask": torch.ones_like(PACKED), **OFFSETS},
}


# gpt-oss does not look at position_ids for its masks, nor does Llama 4 for its chunks beside an attention_mask.
_NOT_PACKED = (("gpt-oss", "position_ids"), ("Llama 4", "cu_seq_lens and a mask"))
_PACKING = [(n, h) for n in ("Llama", "Mistral", "Gemma 2", "gpt-oss", "Llama 4") for h in PACKINGS]


@pytest.mark.parametrize(("name", "how"), [case for case in _PACKING if case not in _NOT_PACKED])
def test_packed_sequences_do_not_see_each_other(name: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(implementation: str, dtype: torch.dtype) -> Tensor:
        model = build(name, implementation, dtype)
        return torch.cat([model(s, use_cache=False).logits for s in SEQUENCES], 1)

    made: list[StructuredMask] = []
    dense = StructuredMask.dense
    monkeypatch.setattr(StructuredMask, "dense", lambda self: [made.append(self), dense(self)][1])
    out = build(name, integration.NAME)(PACKED, use_cache=False, **PACKINGS[how]).logits
    assert_close(out, run("eager", torch.float32), run("eager", torch.float64))
    assert not made or name == "Llama 4", "packing needs no mask"


@pytest.mark.parametrize(("name", "how"), _NOT_PACKED)
def test_packing_that_a_model_leaves_out_is_left_out_as_in_eager(name: str, how: str) -> None:
    options = {k: v for k, v in PACKINGS[how].items() if name == "gpt-oss" or not k.startswith(("cu_", "max_"))}
    ref, same = (
        build(name, "eager", d)(PACKED, use_cache=False, **options).logits for d in (torch.float64, torch.float32)
    )
    out = build(name, integration.NAME)(PACKED, use_cache=False, **options).logits
    assert_close(out, same, ref)


def test_packing_beside_chunks() -> None:
    """Both are applied: chunks of 5 by index, and sequences."""
    options = {**OFFSETS, "position_ids": POSITIONS, "attention_mask": torch.ones_like(PACKED)}
    out = build("Llama 4", integration.NAME)(PACKED, use_cache=False, **options).logits
    index = torch.arange(PACKED.shape[1])
    sequence = torch.bucketize(index, STARTS[1:], right=True)
    causal = (index[:, None] >= index) & (sequence[:, None] == sequence)
    chunked = causal & (index[:, None] // 5 == index // 5)
    masks = {"full_attention": causal[None, None], "chunked_attention": chunked[None, None]}

    def eager(dtype: torch.dtype) -> Tensor:
        nothing = torch.zeros((), dtype=dtype)
        float_masks = {k: torch.where(m, nothing, torch.finfo(dtype).min) for k, m in masks.items()}
        model = build("Llama 4", "eager", dtype)
        return model(PACKED, use_cache=False, position_ids=POSITIONS, attention_mask=float_masks).logits

    assert_close(out, eager(torch.float32), eager(torch.float64))


def test_packing_trains() -> None:
    """The collator's keywords, the loss and its gradients, against the sequences one by one."""
    collate = hf.DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    batch = collate([{"input_ids": s[0].tolist()} for s in SEQUENCES if s.shape[1] > 1])
    model = build("Llama", integration.NAME)
    model(**batch, use_cache=False).loss.backward()
    packed = torch.cat([p.grad.flatten() for p in model.parameters()])

    def separately(dtype: torch.dtype) -> Tensor:
        model = build("Llama", "eager", dtype)
        wanted = [s for s in SEQUENCES if s.shape[1] > 1]
        total = sum(s.shape[1] - 1 for s in wanted)
        for s in wanted:
            (model(s, labels=s, use_cache=False).loss * (s.shape[1] - 1) / total).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    assert_close(packed, separately(torch.float32), separately(torch.float64), grad=True)


# --- continuous batching --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Llama", "Mistral", "gpt-oss", "Qwen 3"])
def test_continuous_batching(name: str) -> None:
    """Requests of different lengths that come and go, against each generated alone."""
    prompts = [tokens(n, 40 + n)[0].tolist() for n in (3, 11, 6, 17, 1)]
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": -1, "pad_token_id": PAD}
    alone = build(name, "eager")
    expected = [alone.generate(torch.tensor([p]), **options)[0, len(p) :].tolist() for p in prompts]
    model = build(name, integration.NAME)
    theirs = hf.AttentionInterface._global_mapping["paged|eager"]
    config = hf.ContinuousBatchingConfig(num_blocks=32, block_size=8, max_batch_tokens=24)
    with integration.continuous_batching(model):
        found = model.generate_batch(
            prompts, generation_config=hf.GenerationConfig(**options), continuous_batching_config=config
        )
    assert [found[k].generated_tokens for k in sorted(found, key=lambda k: int(k.split("_")[-1]))] == expected
    assert model.config._attn_implementation == integration.NAME
    assert hf.AttentionInterface._global_mapping["paged|eager"] is theirs


# --- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "checkpointing", "reentrant"])
@pytest.mark.parametrize("name", ["GPT-2", "Llama", "gpt-oss", "T5", "Whisper"])
def test_a_training_step_with_dropout(name: str, checkpointing: bool | None) -> None:
    model = build(name, integration.NAME)
    for key in ("attention_dropout", "attn_pdrop", "dropout_rate"):
        if hasattr(model.config, key):
            setattr(model.config, key, 0.2)
    for module in model.modules():
        for key in ("attention_dropout", "dropout"):
            if isinstance(getattr(module, key, None), float):
                setattr(module, key, 0.2)
    inputs = MODELS[name].inputs(MODELS[name].sides[0])
    before = model(**inputs).loss.item()
    model.train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        optimizer.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == losses[1] != losses[2], "the seed governs the dropout"
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    for _ in range(8):
        optimizer.zero_grad()
        model(**inputs).loss.backward()
        optimizer.step()
    assert model.eval()(**inputs).loss.item() < before - 0.1


def test_the_gradient_of_the_sinks() -> None:
    inputs = MODELS["gpt-oss"].inputs("left")

    def run(implementation: str, dtype: torch.dtype) -> Tensor:
        model = build("gpt-oss", implementation, dtype)
        model(**inputs).loss.backward()
        return torch.stack([layer.self_attn.sinks.grad for layer in model.model.layers])

    ref = run("eager", torch.float64)
    assert ref.abs().min() > 1e-6
    assert_close(run(integration.NAME, torch.float32), run("eager", torch.float32), ref, grad=True)


# --- attention weights ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Llama", "Mistral", "BERT", "T5"])
def test_attention_weights(name: str) -> None:
    inputs = MODELS[name].inputs("right")
    inputs.pop("labels") if name != "T5" else None
    theirs, ours = (build(name, i)(**inputs, output_attentions=True) for i in ("eager", integration.NAME))
    keys = [k for k in ("attentions", "encoder_attentions", "decoder_attentions", "cross_attentions") if k in theirs]
    visible = inputs["attention_mask"].bool()
    assert keys
    for key in keys:
        for mine, other in zip(ours[key], theirs[key], strict=True):
            rows = visible[:, None, :, None] if mine.shape[2] == LENGTH and "cross" not in key else torch.tensor(True)
            torch.testing.assert_close(mine * rows, other * rows, rtol=1e-4, atol=1e-5)


# --- torch.compile ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Llama", "Mistral", "Gemma 2", "gpt-oss", "BERT", "T5"])
def test_compiles_into_one_graph(name: str) -> None:
    torch.compiler.reset()
    inputs = MODELS[name].inputs(MODELS[name].sides[0])
    model = build(name, integration.NAME)
    if name == "gpt-oss":
        model.set_experts_implementation("grouped_mm")  # the eager experts loop over data
    options = {} if name == "BERT" else {"use_cache": False}
    expected = model(**inputs, **options)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    out = compiled(**inputs, **options)
    out.loss.backward()
    shape = inputs["attention_mask"].bool() if out.logits.shape[:2] == inputs["attention_mask"].shape else ...
    torch.testing.assert_close(out.logits[shape], expected.logits[shape], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.loss, expected.loss)


@pytest.mark.slow
def test_layers_compile_one_by_one() -> None:
    """A mask that is made outside a graph goes in as what it is."""
    torch.compiler.reset()
    model, theirs = build("Mistral", integration.NAME), build("Mistral", "eager")
    for layer in model.model.layers:
        layer.compile(backend="aot_eager", fullgraph=True)
    for side in ("left", "right", "left"):
        inputs = MODELS["Mistral"].inputs(side)
        torch.testing.assert_close(model(**inputs, use_cache=False).loss, theirs(**inputs, use_cache=False).loss)


@pytest.mark.slow
def test_exports() -> None:
    model = build("Llama", integration.NAME)
    inputs = {k: v for k, v in MODELS["Llama"].inputs("left").items() if k != "labels"}
    exported = torch.export.export(model, (), {**inputs, "use_cache": False}, strict=False)
    visible = inputs["attention_mask"].bool()
    out, expected = exported.module()(**inputs, use_cache=False).logits, model(**inputs, use_cache=False).logits
    torch.testing.assert_close(out[visible], expected[visible], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_generates_with_a_compiled_static_cache() -> None:
    inputs = {k: v for k, v in MODELS["Mistral"].inputs("left").items() if k != "labels"}
    config = hf.CompileConfig(backend="aot_eager", mode=None, fullgraph=True)
    config._compile_all_devices = True
    options = {"max_new_tokens": 6, "cache_implementation": "static", "compile_config": config}
    expected = build("Mistral", "eager").generate(**inputs, max_new_tokens=6)
    torch.compiler.reset()
    assert torch.equal(build("Mistral", integration.NAME).generate(**inputs, **options), expected)


# --- a model that is loaded already ----------------------------------------------------------------------------------


def test_register_switches_a_model() -> None:
    model = build("Gemma 3 multimodal", "eager")
    inputs = MODELS["Gemma 3 multimodal"].inputs("left")
    expected = model(**inputs).loss
    integration.register(model)
    parts = [m for m in model.modules() if isinstance(m, hf.PreTrainedModel)]
    assert len(parts) > 2 and {m.config._attn_implementation for m in parts} == {integration.NAME}
    torch.testing.assert_close(model(**inputs).loss, expected)


def test_saved_and_loaded(tmp_path: Any) -> None:
    build("Llama", "eager").save_pretrained(tmp_path)
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=integration.NAME)
    assert model.config._attn_implementation == integration.NAME
    inputs = MODELS["Llama"].inputs("right")
    torch.testing.assert_close(model(**inputs).loss, build("Llama", "eager")(**inputs).loss)


def test_learned_queries_of_batch_one() -> None:
    module = nn.Module()
    module.is_causal = False
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(n, 4, 7, 8, generator=generator) for n in (1, BATCH, BATCH))
    out, _ = integration.fused_attention_forward(module, query, key, value, None)
    expected = nn.functional.scaled_dot_product_attention(query.expand(BATCH, -1, -1, -1), key, value)
    torch.testing.assert_close(out, expected.transpose(1, 2))
