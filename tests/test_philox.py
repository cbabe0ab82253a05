"""The dropout generator against its published vectors, and the mask's bits on every backend."""

from __future__ import annotations

import pytest
import torch

import fused_attention as fa
from fused_attention import philox
from fused_attention.dispatch import BACKENDS
from fused_attention.spec import Inputs, Options, make_spec

from .triton_support import DEVICE, needs_triton

pytestmark = pytest.mark.fast

# Salmon et al., Random123 1.14, kat_vectors: philox4x32 with 10 rounds.
VECTORS = [
    ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, -1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        0x299F31D0A4093822,
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), VECTORS)
def test_published_vectors(counter: tuple[int, ...], key: int, words: tuple[int, ...]) -> None:
    c0, c1, c2, c3 = (torch.tensor(c) for c in counter)
    assert tuple(philox.philox(torch.tensor(key), (c0, c1, c2, c3)).tolist()) == words


def _marks(backend: str) -> list[pytest.MarkDecorator]:
    return [pytest.mark.triton, needs_triton] if backend == "triton" else []


# Those that give the weights, which show the mask; tests/test_cuda_emulated.py reads that of "cuda" from the output.
@pytest.mark.parametrize("backend", [pytest.param(n, marks=_marks(n)) for n in BACKENDS if n != "cuda"])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("columns", [1, 5, 130])
def test_backend_draws_the_mask_bit_for_bit(backend: str, p: float, columns: int) -> None:
    """With equal scores every kept weight is the same number, so that the weights show the mask itself."""
    b, h, rows = 3, 4, 67
    x = Inputs(torch.zeros(b, h, rows, 8), torch.zeros(b, 2, columns, 8), torch.randn(b, 2, columns, 8))
    x = x._replace(seed=torch.tensor([0x7EDCBA9876543210]))
    spec = make_spec(x, Options(dropout_p=p, weights="heads"))
    place = DEVICE if backend == "triton" else "cpu"
    placed = Inputs(*(None if t is None else t.to(place) for t in x))  # type: ignore[arg-type]
    weights = BACKENDS[backend].forward(spec, placed).weights
    assert weights is not None and x.seed is not None
    expected = philox.keep_mask(x.seed, p, torch.arange(b), h, rows, columns)
    assert torch.equal(weights.cpu() != 0, expected)


def test_manual_seed_governs_dropout() -> None:
    q = torch.randn(2, 4, 30, 16)

    def run(seed: int, backend: str) -> torch.Tensor:
        torch.manual_seed(seed)
        with fa.use_backend(backend):
            return fa.attention(q, q, q, dropout_p=0.4)

    assert torch.equal(run(0, "cpu"), run(0, "cpu"))
    assert not torch.equal(run(0, "cpu"), run(1, "cpu"))
    torch.testing.assert_close(run(3, "cpu"), run(3, "reference"))


def test_share_of_dropped_weights() -> None:
    keep = philox.keep_mask(torch.tensor([11]), 0.3, torch.arange(4), 8, 100, 100)
    share = 1.0 - keep.double().mean().item()
    assert abs(share - 0.3) < 4 * (0.3 * 0.7 / keep.numel()) ** 0.5
