"""Block maps through the public functions: what they mean, what they cost, and who refuses them."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_attention as fa
from fused_attention import cli
from fused_attention.dispatch import BACKENDS
from fused_attention.spec import AttentionSpec, Device

pytestmark = pytest.mark.fast

B, H, HK, M, N, D = 2, 4, 2, 150, 200, 16


def qkv(seed: int = 0, grad: bool = True) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    sizes = ((H, M), (HK, N), (HK, N))
    return [torch.randn(B, h, s, D, generator=g).requires_grad_(grad) for h, s in sizes]


def blocks(rows: int, keys: int, share: float = 0.5, batch: int = B, heads: int = H) -> Tensor:
    g = torch.Generator().manual_seed(1)
    return torch.rand(batch, heads, -(-M // rows), -(-N // keys), generator=g) < share


def elements(block_map: Tensor, rows: int, keys: int) -> Tensor:
    """The same as a mask of single scores."""
    return block_map.repeat_interleave(rows, 2)[:, :, :M].repeat_interleave(keys, 3)[..., :N]


def results(tensors: list[Tensor], **options: Any) -> list[Tensor]:
    out = fa.attention(*tensors, return_lse=True, **options)
    assert out.lse is not None
    loss = out.output.square().sum() + torch.where(out.lse.isfinite(), out.lse, 0.0).sum()
    return [out.output, out.lse, *torch.autograd.grad(loss, tensors)]


@pytest.mark.parametrize("size", [(1, 16), (10, 48), (32, 32), (64, 64), (100, 128), (256, 512)], ids=str)
@pytest.mark.parametrize("options", [{}, {"causal": "bottom_right", "window": (90, 0)}], ids=["plain", "window"])
def test_a_block_map_is_a_mask(size: tuple[int, int], options: dict[str, Any]) -> None:
    shown = blocks(*size)
    found = results(qkv(), block_map=shown, block_size=size, **options)
    expected = results(qkv(), mask=elements(shown, *size), **options)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("shape", [(1, 1), (1, H), (B, 1)])
def test_maps_broadcast(shape: tuple[int, int]) -> None:
    shown = blocks(32, 16, batch=shape[0], heads=shape[1])
    found = results(qkv(), block_map=shown, block_size=(32, 16))
    for a, b in zip(found, results(qkv(), block_map=shown.expand(B, H, -1, -1), block_size=(32, 16)), strict=True):
        assert torch.equal(a, b)
    if shape == (1, 1):
        for a, b in zip(found, results(qkv(), block_map=shown[0, 0], block_size=(32, 16)), strict=True):
            assert torch.equal(a, b)


def test_rows_that_see_nothing_give_zero() -> None:
    shown = blocks(64, 64)
    shown[:, :, 1] = False
    output, lse, dq, *_ = results(qkv(), block_map=shown, block_size=(64, 64))
    assert not output[:, :, 64:128].any() and (lse[:, :, 64:128] == float("-inf")).all() and not dq[:, :, 64:128].any()
    for t in results(qkv(), block_map=torch.zeros_like(shown), block_size=(64, 64)):
        assert not torch.where(t == float("-inf"), 0.0, t).any()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_hidden_blocks_may_hold_anything(backend: str) -> None:
    """Keys of a block that no row sees, and rows that see no block."""
    shown = blocks(48, 32)
    shown[..., 2], shown[:, :, 1] = False, False
    clean, spoiled = qkv(), [t.detach().clone() for t in qkv()]
    spoiled[0][:, :, 48:96] = float("nan")
    spoiled[1][:, :, 64:96] = float("nan")
    spoiled[2][:, :, 64:96] = float("inf")
    with fa.use_backend(backend):
        expected = results(clean, block_map=shown, block_size=(48, 32))
        found = results([t.requires_grad_() for t in spoiled], block_map=shown, block_size=(48, 32))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("size", [(1, 16), (10, 48), (64, 64), (100, 128), (32, 176)], ids=str)
@pytest.mark.parametrize("mode", ["mean", "heads"])
def test_weights_of_hidden_blocks_are_zero(size: tuple[int, int], mode: Any) -> None:
    """Exactly, whatever the keys hold that no row sees; and the others are those of the same mask."""
    shown = blocks(*size)
    shown[..., 0] = False
    q, k, v = qkv(grad=False)
    expected = fa.attention(q, k, v, mask=elements(shown, *size), return_weights=mode)
    k[:, :, : size[1]] = float("nan")
    found = fa.attention(q, k, v, block_map=shown, block_size=size, return_weights=mode)
    assert found.weights is not None and expected.weights is not None
    seen = elements(shown, *size)
    assert not found.weights[~(seen.any(1) if mode == "mean" else seen)].any()
    torch.testing.assert_close(found.weights, expected.weights, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(found.output, expected.output, atol=2e-5, rtol=2e-5)


def test_any_number_of_threads_and_any_batch_gives_the_same_bits() -> None:
    shown = blocks(64, 48)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = results(qkv(), block_map=shown, block_size=(64, 48), batch_invariant=True)
        torch.set_num_threads(3)
        found = results(qkv(), block_map=shown, block_size=(64, 48), batch_invariant=True)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    one = [t.detach()[1:].requires_grad_() for t in qkv()]
    alone = results(one, block_map=shown[1:], block_size=(64, 48), batch_invariant=True)
    assert all(torch.equal(a, b[1:]) for a, b in zip(alone, expected, strict=True))


def test_time_falls_with_the_share_of_hidden_blocks(say: Callable[[str], None]) -> None:
    """Forward and backward; interleaved, one thread: a tenth of the blocks takes well under half of the time."""
    g = torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn(1, 2, 1024, 64, generator=g).requires_grad_() for _ in range(4))
    few = torch.zeros(64, dtype=torch.bool)
    few[torch.randperm(64, generator=g)[:6]] = True
    maps = [torch.ones(1, 1, 8, 8, dtype=torch.bool), few.view(1, 1, 8, 8)]
    times: list[list[float]] = [[], []]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        for _ in range(7):
            for shown, spent in zip(maps, times, strict=True):
                start = time.perf_counter()
                torch.autograd.grad(fa.attention(q, k, v, block_map=shown, block_size=(128, 128)), (q, k, v), dout)
                spent.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(before)
    share = median(b / a for a, b in zip(*times, strict=True))
    say(f"forward + backward at S 1024, 6 of 64 blocks visible: {share:.2f} of the time that all of them take")
    assert share < 0.4


def test_who_takes_which_blocks() -> None:
    def answers(rows: int, keys: int) -> dict[str, str | None]:
        spec = AttentionSpec(1, 2, 2, 64, 64, 64, 64, torch.bfloat16, 0.125, block_map=(rows, keys))
        return {name: backend.unsupported(spec) for name, backend in BACKENDS.items()}

    none = {"cpu": None, "triton": None, "reference": None, "cuda": "no block maps"}
    assert answers(16, 16) == answers(48, 80) == answers(128, 256) == none
    assert answers(10, 16) == {**none, "triton": "blocks of a multiple of 16 rows, not 10"}
    keys = "blocks of a multiple of 16 keys, not 20"
    assert answers(16, 20) == {**none, "cpu": keys, "triton": keys}


def test_explain_names_the_blocks() -> None:
    tensors = qkv(grad=False)
    found = fa.explain(*tensors, block_map=blocks(64, 64), block_size=(64, 64))
    assert found.backend == "cpu" and "block_map=64x64" in str(found)
    assert found.to_dict()["spec"]["block_map"] == (64, 64)
    odd = fa.explain(*tensors, block_map=blocks(64, 20), block_size=(64, 20))
    assert odd.backend == "reference" and "not 20" in str(odd.reasons["cpu"])
    there = fa.explain(*tensors, block_map=blocks(64, 64), block_size=(64, 64), device="cuda:sm_90")
    assert there.reasons["cuda"] != "" and there.device == Device("cuda", "sm_90")
    with pytest.warns(fa.FallbackWarning, match="multiple of 16 keys"):
        fa.attention(*tensors, block_map=blocks(64, 20), block_size=(64, 20))


def test_explain_from_a_shell(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", "--block-size", "64", "20"]) == 0
    assert "blocks of a multiple of 16 keys, not 20" in capsys.readouterr().out
