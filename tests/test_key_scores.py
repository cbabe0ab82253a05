"""`key_scores`: the column sums of the weights, for every option, on every backend, in little memory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_attention as fa
from fused_attention.backends import reference
from fused_attention.spec import Inputs, Options, make_spec

from .cases import CASES, Case, make
from .numerics import assert_close
from .triton_support import DEVICE, INTERPRETED, needs_triton

F32, BF16 = torch.float32, torch.bfloat16

SIZES = (2, 6, 2, 37, 51, 16, 16)
# fmt: off
PROBLEMS = [
    Case("plain"),
    Case("gqa", SIZES),
    Case("mqa", (2, 5, 1, 37, 51, 16, 16), causal="top_left"),
    Case("causal", SIZES, causal="bottom_right"),
    Case("window", SIZES, window=(7, 3)),
    Case("few-rows", (2, 4, 2, 3, 130, 32, 16), causal="bottom_right", key_lengths=True),
    Case("softcap-scale", SIZES, softcap=2.0, scale=0.7),
    Case("bool-mask", SIZES, mask="bool:bhmn", dead=True),
    Case("float-mask", SIZES, mask="float:b11n"),
    Case("bias", SIZES, bias="hiding:1hmn"),
    Case("alibi", SIZES, alibi="bh", causal="bottom_right"),
    Case("sinks", SIZES, sinks=True),
    Case("lengths", SIZES, key_lengths=True, dead=True),
    Case("lengths-nan", SIZES, key_lengths=True, nan_hidden=True),
    Case("bmhd", (2, 3, 3, 41, 41, 24, 24), layout="bmhd", causal="top_left"),
    Case("everything", SIZES, causal="bottom_right", window=(30, 5), softcap=4.0, mask="bool:b1mn", bias="half:1hmn",
         alibi="h", sinks=True, key_lengths=True, dead=True),
]
# fmt: on


def _expected(x: Inputs, o: Options, dtype: torch.dtype) -> Tensor:
    """The weights of plain eager attention, all of them, summed over the rows: [B, H, N]."""
    cast = Inputs(*(t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t for t in x))
    spec = replace(make_spec(cast, o._replace(weights="heads")), dtype=dtype)
    weights = reference.forward(spec, cast, dtype).weights
    assert weights is not None
    return weights.sum(2)


def _arguments(x: Inputs, o: Options) -> dict[str, Any]:
    tensors = {n: getattr(x, n) for n in ("query", "key", "mask", "bias", "alibi_slopes", "sinks", "key_lengths")}
    return {**tensors, **{n: getattr(o, n) for n in ("causal", "softcap", "scale")}, "window": (o[1], o[2])}


def check(case: Case, backend: str, dtype: torch.dtype) -> None:
    x, o = make(case, dtype)
    device = DEVICE if backend == "triton" else "cpu"
    arguments = {n: t.to(device) if isinstance(t, Tensor) else t for n, t in _arguments(x, o).items()}
    before = {n: t.clone() for n, t in arguments.items() if isinstance(t, Tensor)}
    with fa.use_backend(backend):
        per_head = fa.key_scores(**arguments, per_query_head=True).cpu()
        shared = fa.key_scores(**arguments).cpu()
    for name, t in before.items():
        assert torch.equal(t.nan_to_num(), arguments[name].nan_to_num()), f"{name} was modified"
    b, h, hk, _, n, _, _ = case.sizes
    assert per_head.shape == (b, h, n) and shared.shape == (b, hk, n) and per_head.dtype == shared.dtype == dtype
    same, exact = _expected(x, o, dtype), _expected(x, o, torch.float64)

    def grouped(t: Tensor) -> Tensor:
        return t.view(b, hk, -1, n).sum(2)

    assert_close(per_head, same, exact, grad=True, name="per query head")
    assert_close(shared, grouped(same), grouped(exact), grad=True, name="per key head")


@pytest.mark.fast
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("case", PROBLEMS, ids=str)
@pytest.mark.usefixtures("poison")
def test_is_the_sum_of_the_weights(case: Case, dtype: torch.dtype, backend: str) -> None:
    check(case, backend, dtype)


@pytest.mark.triton
@needs_triton
@pytest.mark.parametrize("name", ["mqa", "few-rows", "lengths-nan", "everything"])
def test_triton_kernels(name: str) -> None:
    """Enough to see what is asked of the backward kernels; that they know every option is tests/test_triton.py's."""
    case = next(case for case in PROBLEMS if case.name == name)
    check(case, "triton", F32 if INTERPRETED else BF16)


@pytest.mark.fast
def test_problems_cover_the_options_of_the_suite() -> None:
    def used(case: Case) -> set[str]:
        plain = Case("plain")
        options = ("causal", "softcap", "scale", "mask", "bias", "alibi", "sinks", "key_lengths", "window")
        return {n for n in options if getattr(case, n) != getattr(plain, n)}

    assert set().union(*map(used, PROBLEMS)) == set().union(*map(used, CASES))


@pytest.mark.fast
def test_scores_add_up_to_the_rows_that_see_a_key() -> None:
    q, k = torch.randn(2, 4, 33, 16, dtype=torch.float64), torch.randn(2, 2, 40, 16, dtype=torch.float64)
    lengths = torch.tensor([40, 12])
    scores = fa.key_scores(q, k, key_lengths=lengths, causal="bottom_right", per_query_head=True)
    assert not scores[1, :, 12:].any()
    torch.testing.assert_close(scores.sum(2), torch.tensor([[33.0] * 4, [12.0] * 4], dtype=torch.float64))


@pytest.mark.fast
def test_what_a_cache_can_do_without() -> None:
    """Over what a cache holds, padded rows of the storage left out; as `explain` says, by the same backend."""
    cache = fa.KVCache.allocate(2, 2, 50, 16)
    q, k, v = torch.randn(2, 4, 30, 16), torch.randn(2, 2, 30, 16), torch.randn(2, 2, 30, 16)
    fa.decode_attention(q, cache, k, v)
    seen = fa.key_scores(q[:, :, -5:], cache.key, key_lengths=cache.lengths, causal="bottom_right")
    weights = fa.attention(q[:, :, -5:], k, v, causal="bottom_right", return_weights="heads").weights
    assert weights is not None and not seen[..., 30:].any()
    torch.testing.assert_close(seen[..., :30], weights.sum(2).view(2, 2, 2, 30).sum(2))


@pytest.mark.fast
def test_compiled_autocast_and_inference_mode() -> None:
    q, k = torch.randn(2, 4, 33, 16), torch.randn(2, 2, 40, 16)
    expected = fa.key_scores(q, k, window=(9, 9))
    torch._dynamo.reset()
    compiled = torch.compile(lambda q, k: fa.key_scores(q, k, window=(9, 9)), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(q, k), expected)
    with torch.inference_mode():
        assert torch.equal(fa.key_scores(q, k, window=(9, 9)), expected)
    with torch.no_grad():
        assert torch.equal(fa.key_scores(q.requires_grad_(), k, window=(9, 9)), expected)
    with torch.autocast("cpu", BF16):
        low = fa.key_scores(q.detach(), k, window=(9, 9))
    assert torch.equal(low, fa.key_scores(q.detach().bfloat16(), k.bfloat16(), window=(9, 9)))


@pytest.mark.fast
@pytest.mark.parametrize("sizes", [(0, 4, 2, 5, 7), (2, 4, 2, 0, 7), (2, 4, 2, 5, 0)], ids=str)
def test_sizes_of_zero(sizes: tuple[int, ...]) -> None:
    b, h, hk, m, n = sizes
    q, k = torch.randn(b, h, m, 8), torch.randn(b, hk, n, 8)
    for per_head, heads in ((True, h), (False, hk)):
        found = fa.key_scores(q, k, per_query_head=per_head)
        assert found.shape == (b, heads, n) and (m == 0) <= (not found.any())


MEMORY = """
import pathlib, torch, fused_attention as fa
torch.set_num_threads(1)
q, k = torch.randn(1, 1, 8192, 64), torch.randn(1, 1, 8192, 64)
fa.key_scores(q[:, :, :64], k[:, :, :64])
def status(field):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
pathlib.Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again here
before = status("VmRSS")
fa.key_scores(q, k, causal="bottom_right")
print(status("VmHWM") - before)
"""


def test_memory(say: Callable[[str], None]) -> None:
    """At 8192 by 8192 the weights would be 256 MiB."""
    done = subprocess.run([sys.executable, "-c", MEMORY], check=True, capture_output=True, text=True, timeout=300)
    extra = int(done.stdout)
    say(f"extra memory of key_scores at S 8192, D 64, fp32: {extra / 1e6:.1f} MB")
    assert extra < 16 * 2**20


# --- malformed ------------------------------------------------------------------------------------------------------

Q, K = torch.zeros(2, 4, 5, 8), torch.zeros(2, 2, 7, 8)
N = torch.nested.nested_tensor([torch.zeros(3, 4, 8)], layout=torch.jagged).transpose(1, 2)
GRAD = torch.zeros(2, 4, 5, 8, requires_grad=True)


def call(q: Any = Q, k: Any = K, **given: Any) -> Callable[[], Any]:
    return lambda: fa.key_scores(q, k, **given)


CALLS: list[tuple[str, Callable[[], Any], type[Exception], str]] = [
    ("query is None", call(None), TypeError, "query"),
    ("key is a list", call(Q, [1.0]), TypeError, "key"),
    ("query of 3 dims", call(Q[0]), ValueError, "query"),
    ("key of 5 dims", call(Q, K[None]), ValueError, "key"),
    ("nested query", call(N, N), ValueError, "query"),
    ("sparse key", call(Q, K.to_sparse()), ValueError, "key"),
    ("integer query", call(Q.long(), K.long()), ValueError, "query.dtype"),
    ("key in another dtype", call(Q, K.half()), ValueError, "key.dtype"),
    ("key of another head dim", call(Q, K[..., :7]), ValueError, "key"),
    ("heads that do not divide", call(Q, torch.zeros(2, 3, 7, 8), per_query_head=True), ValueError, "key"),
    ("no key heads", call(Q, K[:, :0]), ValueError, "key"),
    ("mask of another length", call(mask=torch.ones(5, 8, dtype=torch.bool)), ValueError, "mask"),
    ("sinks of other heads", call(sinks=torch.ones(5)), ValueError, "sinks"),
    ("length past the end", call(key_lengths=torch.tensor([1, 8])), ValueError, "key_lengths"),
    ("causal=True", call(causal=True), TypeError, "causal"),
    ("window is a number", call(window=3), TypeError, "window"),
    ("softcap 0", call(softcap=0.0), ValueError, "softcap"),
    ("per_query_head is a number", call(per_query_head=1), TypeError, "per_query_head"),
    ("query requires grad", call(GRAD), ValueError, "query"),
    ("bias requires grad", call(bias=torch.zeros(5, 7, requires_grad=True)), ValueError, "bias"),
    ("in a transform", lambda: torch.func.vmap(lambda q: fa.key_scores(q, K))(Q[None]), ValueError, "query"),
]


@pytest.mark.fast
@pytest.mark.parametrize(("make", "error", "name"), [c[1:] for c in CALLS], ids=[c[0] for c in CALLS])
def test_malformed(make: Callable[[], Any], error: type[Exception], name: str) -> None:
    with pytest.raises(error) as caught:
        make()
    assert str(caught.value).startswith(f"{name}:")
    assert type(caught.value) in (fa.ArgumentError, TypeError)
