"""Decoding where it is delicate: hidden NaN, exact codes, whole sequences, invariance, choice of backend."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fused_attention import steps
from fused_attention.backends import reference, reference_decode
from fused_attention.backends.reference_ops import Tables, rotate
from fused_attention.cache import Cache, KVCache, PagedKVCache
from fused_attention.decode import decode_attention
from fused_attention.dispatch import BackendError, FallbackWarning, use_backend
from fused_attention.spec import ArgumentError, Inputs, Options, make_spec

from .numerics import assert_close
from .test_decode import BF16, EVERYWHERE, F8, F16, F32, I8, INF, NAN, TRITON, Case, described, make, on, run
from .triton_support import DEVICE, INTERPRETED


def exactly(got: Tensor | None, wanted: Tensor | None) -> None:
    assert got is not None and wanted is not None
    assert torch.equal(got, wanted)


# --- what is hidden -----------------------------------------------------------------------------------------------


@EVERYWHERE
@pytest.mark.parametrize("kv_dtype", [F32, F16, BF16, I8, F8], ids=str)
@pytest.mark.parametrize("page", [None, 16])
def test_hidden_tokens_are_never_read(page: int | None, kv_dtype: torch.dtype, backend: str) -> None:
    """NaN and Inf behind the length and left of the window, in scales too; pages that nobody sees do not exist."""
    dtype = kv_dtype if kv_dtype in (F16, BF16) else F32
    if dtype == BF16 and backend == "triton" and INTERPRETED:
        pytest.skip("Triton's interpreter has no bfloat16")
    size = 16 if dtype == F32 else 32  # bfloat16's dot products on a CPU
    case = Case("", (3, 4, 2, 2, size, size), 150, dtype, kv_dtype=kv_dtype, page=page, window=(20, 0), append=False)
    cache, arguments = make(case)
    clean, _ = run(backend, cache, arguments)
    lengths = cache.lengths.tolist()
    for b, length in enumerate(lengths):
        seen = range(max(0, length - 2 - 20), length)
        for n in range(cache.capacity):
            if n in seen:
                continue
            block, row = (b, n) if page is None else (int(cache.block_table[b, n // page]), n % page)  # type: ignore[union-attr]
            if page is not None and not set(range(n // page * page, n // page * page + page)) & set(seen):
                cache.block_table[b, n // page] = -7  # type: ignore[union-attr]
            elif kv_dtype == dtype:
                cache.key[block, :, row], cache.value[block, :, row] = NAN, INF
            else:
                assert cache.key_scale is not None and cache.value_scale is not None
                cache.key_scale[block, :, row], cache.value_scale[block, :, row] = INF, NAN
    poisoned, _ = run(backend, cache, arguments)
    same = torch.testing.assert_close if backend == "reference" else exactly  # the reference takes another way then
    same(poisoned.output, clean.output)
    same(poisoned.lse, clean.lse)


@EVERYWHERE
@pytest.mark.parametrize("kv_dtype", [F32, I8, F8], ids=str)
@pytest.mark.parametrize("page", [None, 3])
def test_rows_before_a_broken_token_do_not_meet_it(page: int | None, kv_dtype: torch.dtype, backend: str) -> None:
    """A new value of NaN or Inf reaches the rows from its own on, and in a float cache its own dims only."""
    cache, arguments = make(Case("", (2, 2, 1, 4, 8, 8), 90, kv_dtype=kv_dtype, page=page))
    clean, _ = run(backend, cache, arguments)
    arguments["value"][0, 0, 2, 3] = NAN
    arguments["value"][1, 0, 1, 5] = INF
    broken, after = run(backend, cache, arguments)
    expected, _ = run("reference", cache, arguments)
    torch.testing.assert_close(broken.output[0, :, :2], clean.output[0, :, :2])
    torch.testing.assert_close(broken.output[1, :, :1], clean.output[1, :, :1])
    assert broken.output[0, :, 2:, 3].isnan().all() and not broken.output[1, :, 1:, 5].isfinite().any()
    if kv_dtype == F32:
        assert (broken.output[1, :, 1:, 5] == INF).all()
    else:
        assert broken.output[0, :, 2:].isnan().all()
        assert after.value_scale is not None and after.value_scale.isnan().sum() == 2
    torch.testing.assert_close(broken.output, expected.output, equal_nan=True)


@EVERYWHERE
def test_nan_scores_are_not_hidden_keys(backend: str) -> None:
    """A query of NaN gives NaN, in its row only, and not the zeros of a row that sees nothing."""
    cache, arguments = make(Case("", (2, 2, 1, 2, 8, 8), 520))
    cache.lengths.fill_(70)
    arguments["query"][1, 0, 1] = NAN
    out, _ = run(backend, cache, arguments)
    assert out.output[1, 0, 1].isnan().all() and out.lse[1, 0, 1].isnan()  # type: ignore[index]
    assert out.output.isnan().sum() == 8


@EVERYWHERE
def test_without_tokens(backend: str) -> None:
    cache, arguments = make(Case("", (2, 2, 1, 3, 8, 8), 40, append=False, sinks=True))
    cache.lengths.copy_(torch.tensor([0, 2]))
    out, after = run(backend, cache, arguments)
    assert out.lse is not None
    assert (out.output[0] == 0).all() and (out.lse[0] == -INF).all()
    assert (out.output[1, :, 0] == 0).all() and (out.lse[1, :, 0] == -INF).all()  # 3 rows, 2 tokens
    assert (out.lse[1, :, 1:] > -INF).all() and after.lengths.tolist() == [0, 2]


# --- storage --------------------------------------------------------------------------------------------------------


@EVERYWHERE
@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
@pytest.mark.parametrize("kv_dtype", [I8, F8], ids=str)
def test_every_code_is_read_exactly(kv_dtype: torch.dtype, dtype: torch.dtype, backend: str) -> None:
    """One visible token of weight 1 and scale 1 comes back as it is stored, NaN included."""
    cache = KVCache.allocate(1, 1, 4, 8, 256, dtype, kv_dtype)
    codes = torch.arange(256, dtype=torch.uint8).view(kv_dtype)
    reference_decode._bits(cache.key).zero_()
    cache.value[0, 0, 0] = codes
    assert cache.key_scale is not None and cache.value_scale is not None
    cache.key_scale[:], cache.value_scale[:] = 1.0, 1.0
    cache.lengths.fill_(1)
    out, _ = run(backend, cache, {"query": torch.zeros(1, 1, 1, 8, dtype=dtype)})
    torch.testing.assert_close(out.output[0, 0, 0], codes.to(dtype), rtol=0.0, atol=0.0, equal_nan=True)


@pytest.mark.parametrize("backend", ["reference", TRITON])
@pytest.mark.parametrize("kv_dtype", [I8, F8], ids=str)
def test_numbers_are_rounded_to_the_nearest_code(kv_dtype: torch.dtype, backend: str) -> None:
    """With a scale of exactly 1, also ties and what is subnormal in float8, bit for bit."""
    limit = 127.0 if kv_dtype == I8 else 448.0
    codes = torch.arange(256, dtype=torch.uint8).view(kv_dtype).float()
    codes = codes[codes.isfinite()].unique()
    ties = (codes[1:] + codes[:-1]) / 2
    numbers = torch.cat([codes, ties, ties * (1 + 2.0**-20), ties * (1 - 2.0**-20), codes / 3]).clamp(-limit, limit)
    tokens = torch.cat([numbers, numbers.new_zeros(-len(numbers) % 63)]).reshape(-1, 63)
    value = torch.cat([torch.full((len(tokens), 1), limit), tokens], 1)[None, None]  # [1, 1, M, 64]
    cache = KVCache.allocate(1, 1, value.shape[2], 8, 64, F32, kv_dtype)
    new = torch.zeros(1, 1, value.shape[2], 8)
    _, after = run(backend, cache, {"query": new, "key": new, "value": value})
    assert after.value_scale is not None and (after.value_scale == 1.0).all()
    assert after.key_scale is not None and (after.key_scale == 1.0).all()  # all zero
    wanted = value.round().to(I8) if kv_dtype == I8 else value.to(F8)
    assert torch.equal(after.value.view(torch.uint8), wanted.view(torch.uint8))


@pytest.mark.parametrize("backend", ["reference", TRITON])
@pytest.mark.parametrize("page", [None, 4])
def test_what_no_check_has_seen(page: int | None, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where looking would synchronise: NaN where a sequence is concerned, no write outside."""
    monkeypatch.setattr("fused_attention.cache.checks._check_values", lambda *_: None)
    cache, arguments = make(Case("", (3, 2, 1, 2, 8, 8), 40, page=page))
    cache.lengths.copy_(torch.tensor([5, cache.capacity - 1, 20]))
    if isinstance(cache, PagedKVCache):
        cache.block_table[0, 2:] = -1  # unused
        cache.block_table[0, 1] = 1000
    out, after = run(backend, cache, arguments)
    assert out.lse is not None
    assert out.output[0].isnan().all() == (page is not None) == bool(out.lse[0].isnan().all())
    assert out.output[1].isnan().all() and out.lse[1].isnan().all()
    assert out.output[2].isfinite().all()
    changed = (after.key != cache.key).any(-1).sum()
    assert changed == (0 if page else 2) + 1 + 2  # of sequence 0 where it has a page, of sequence 1 what has room


@pytest.mark.parametrize("backend", ["reference", TRITON])
def test_positions_outside_the_tables(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fused_attention.cache.checks._check_values", lambda *_: None)
    cache, arguments = make(Case("", (2, 2, 1, 2, 8, 8), 40, rope=(4, False)))
    cos, sin, interleaved = arguments["rope"]
    arguments["rope"] = (cos[:21], sin[:21], interleaved)
    cache.lengths.copy_(torch.tensor([20, 5]))  # the last row of sequence 0 stands at 21
    out, _ = run(backend, cache, arguments)
    assert out.output[0, :, 0].isfinite().all() and out.output[0, :, 1].isnan().all()
    assert out.output[1].isfinite().all()


# --- whole sequences ------------------------------------------------------------------------------------------------

MODELS = {
    "gqa": {},
    "window": {"window": (6, 0)},
    "sinks-softcap": {"softcap": 3.0, "sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])},
    "alibi-window": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 1.0]), "window": (9, None)},
}


@EVERYWHERE
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize(
    ("model", "page"), [("gqa", None), ("gqa", 4), ("window", 4), ("sinks-softcap", None), ("alibi-window", 4)]
)
def test_token_by_token_equals_all_at_once(model: str, page: int | None, dtype: torch.dtype, backend: str) -> None:
    if backend == "triton" and INTERPRETED and dtype == BF16:
        dtype = F16  # the interpreter cuts off instead of rounding to bfloat16
    g = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, h, 15, d, generator=g).to(dtype) for h, d in ((4, 16), (2, 16), (2, 8)))
    angles = torch.rand(40, 8, generator=g) * 7
    options = {n: o.to(dtype) if n == "sinks" else o for n, o in MODELS[model].items()}  # type: ignore[attr-defined]
    device = DEVICE if backend == "triton" else "cpu"
    cache: Cache = KVCache.allocate(2, 2, 32, 16, 8, dtype)
    if page is not None:
        cache = PagedKVCache.allocate(torch.randperm(16, generator=g).int().reshape(2, 8), 16, 2, page, 16, 8, dtype)
    cache, parts = on(device, cache), []
    with use_backend(backend):
        for chunk in torch.arange(15).split([6, 1, 1, 6, 1]):
            rope = on(device, (angles.cos(), angles.sin(), False))
            tokens = on(device, tuple(t[:, :, chunk] for t in (q, k, v)))
            parts.append(decode_attention(tokens[0], cache, *tokens[1:], rope=rope, **on(device, options)))
    assert cache.lengths.tolist() == [15, 15]

    def whole(acc: torch.dtype) -> Tensor:
        tables = Tables(angles.cos(), angles.sin(), None, False)
        turned = [rotate(t.to(acc if acc == torch.float64 else F32), tables).to(acc) for t in (q, k)]
        slopes = options.get("alibi_slopes")
        x = Inputs(*turned, v.to(acc), alibi_slopes=None if slopes is None else slopes[None])
        x = x._replace(sinks=options["sinks"].to(acc) if "sinks" in options else None)
        left, right = options.get("window", (None, None))
        spec = make_spec(x, Options("bottom_right", left, right, options.get("softcap")))
        return reference.forward(spec, x, acc).output

    out = torch.cat(parts, 2).cpu()  # type: ignore[arg-type]
    assert_close(out, whole(dtype), whole(torch.float64))


@EVERYWHERE
@pytest.mark.parametrize("page", [None, 16])
def test_batch_invariance(page: int | None, backend: str) -> None:
    """A sequence gives the same bits alone and among others, whatever these hold."""
    cache, arguments = make(Case("", (3, 2, 1, 2, 16, 16), 1030, page=page, batch_invariant=True, append=False))
    together, _ = run(backend, cache, arguments)
    for b in range(3):
        if isinstance(cache, PagedKVCache):
            one: Cache = replace(cache, block_table=cache.block_table[b : b + 1], lengths=cache.lengths[b : b + 1])
        else:
            one = replace(cache, **{n: t[b : b + 1] for n, t in vars(cache).items() if t is not None})
        alone, _ = run(backend, one, {**arguments, "query": arguments["query"][b : b + 1]})
        assert torch.equal(alone.output[0], together.output[b])
        assert torch.equal(alone.lse[0], together.lse[b])  # type: ignore[index]


def test_number_of_splits() -> None:
    splits = pytest.importorskip("fused_attention.backends.triton.decode").decode_splits
    assert splits(132, 1, 8, 1, 100) == 1, "too few keys to split"
    assert splits(132, 64, 8, 1, 1 << 17) == 1, "the batch fills the chip"
    assert splits(132, 1, 8, 1, 1 << 17) in range(28, 34), "8 programs for 264 places"
    for batch in (1, 3, 100):
        assert splits(132, batch, 8, 1, 8192, True) == splits(78, 1, 8, 1, 8192, True) == 16
    assert all(
        1 <= splits(132, b, h, t, n) <= 128 for b in (1, 7) for h in (1, 9) for t in (1, 5) for n in (0, 300, 1 << 20)
    )


@pytest.mark.parametrize("kv_dtype", [F32, I8, F8], ids=str)
@pytest.mark.parametrize("page", [None, 16])
def test_launches_are_made_without_looking_at_data(page: int | None, kv_dtype: torch.dtype) -> None:
    """What a CUDA graph needs: fake tensors, which have no data, raise at any attempt to read some."""
    kernels = pytest.importorskip("fused_attention.backends.triton.decode")
    cache, arguments = make(
        Case("", (3, 4, 2, 2, 16, 16), 600, kv_dtype=kv_dtype, page=page, rope=(8, True), sinks=True)
    )
    with FakeTensorMode() as mode:
        cache = replace(cache, **{n: None if t is None else mode.from_tensor(t) for n, t in vars(cache).items()})
        arguments = {n: mode.from_tensor(t) if isinstance(t, Tensor) else t for n, t in arguments.items()}
        arguments["rope"] = (*(mode.from_tensor(t) for t in arguments["rope"][:2]), True)
        spec, x = described(cache, arguments)
        launches, out = kernels.launches(spec, cache, x, "sm_90", 132)
    assert [k.kernel.__name__ for k in launches] == ["append_kernel", "decode_kernel", "combine_kernel"]
    assert out.output.shape == (3, 4, 2, 16)


# --- the choice of backend, and what surrounds a call -----------------------------------------------------------------


def test_choice_of_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    cache, arguments = make(Case("", dtype=torch.float64))
    with use_backend("triton"), pytest.raises(BackendError, match="float64|interpreter"):
        decode_attention(cache=cache, **arguments)
    assert cache.lengths.equal(make(Case(""))[0].lengths), "a refused call wrote something"
    with use_backend("triton", strict=False):
        decode_attention(cache=copy.deepcopy(cache), **arguments)
    monkeypatch.setattr(steps, "BACKENDS", {n: steps.BACKENDS[n] for n in ("triton", "reference")})
    with pytest.warns(FallbackWarning, match="triton: "):
        decode_attention(cache=cache, **arguments)


def test_gradients_are_refused() -> None:
    cache, arguments = make(Case(""))
    arguments["value"].requires_grad_()
    with pytest.raises(ArgumentError, match="value: .*requires grad"):
        decode_attention(cache=cache, **arguments)
    with torch.no_grad():
        out = decode_attention(cache=cache, **arguments)
    assert not out.requires_grad and not cache.value.requires_grad  # type: ignore[union-attr]


def test_autocast() -> None:
    cache, arguments = make(Case("", dtype=BF16))
    wide = {n: t.float() if isinstance(t, Tensor) else t for n, t in arguments.items()}
    with torch.autocast("cpu", dtype=BF16):
        out = decode_attention(cache=copy.deepcopy(cache), **wide)
    assert torch.equal(out, decode_attention(cache=cache, **arguments))  # type: ignore[arg-type]


@EVERYWHERE
def test_output_lies_as_the_query_does(backend: str) -> None:
    cache, arguments = make(Case("", (2, 4, 2, 3, 16, 16), layout="bnhd", rope=(8, False)))
    out, _ = run(backend, cache, arguments)
    assert arguments["query"].stride() == out.output.stride() == (192, 16, 64, 1)


def test_quantise() -> None:
    x = torch.tensor([[3.0, -127.0, 0.4], [0.0, 0.0, 0.0], [NAN, 1.0, 2.0], [INF, 1.0, 2.0], [1e-44, 0.0, 3e-45]])
    codes, scales = reference_decode.quantise(x, I8)
    assert codes.tolist()[:4] == [[3, -127, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]]
    assert scales[:2].tolist() == [1.0, 1.0] and scales[2:4].isnan().all() and scales[4] == 1.0
