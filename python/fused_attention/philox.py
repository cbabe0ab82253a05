"""The dropout mask that every backend draws, bit for bit: Philox-4x32-10 (Salmon et al., SC 2011).

The element (batch, head, row, column) reads word `column % 4` of the block with the counter
`(column // 4, row, head, batch)` under the 64-bit key `seed`; it is kept iff the word is at least `floor(p * 2^32)`.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF
_MULTIPLIER = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def _multiply(factor: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 32 x 32 bit product; int64 wraps, and its bits are those of the unsigned product."""
    product = word * factor
    return (product >> 32) & _LOW, product & _LOW


def philox(seed: Tensor, counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    """Four 32-bit words per counter, in int64: broadcast shape of the counter's words + [4]."""
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(10):
        high0, low0 = _multiply(_MULTIPLIER[0], c0)
        high1, low1 = _multiply(_MULTIPLIER[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return torch.stack((c0, c1, c2, c3), dim=-1)


def keep_mask(seed: Tensor, p: float, batch: Tensor, heads: int, rows: int, columns: int) -> Tensor:
    """True where dropout keeps the element: bool [len(batch), heads, rows, columns].

    seed: int64 [1]. batch: int64 [B], the batch indices that enter the counter.
    """
    device = seed.device
    blocks = torch.arange((columns + 3) // 4, device=device)
    counter = (
        blocks,
        torch.arange(rows, device=device)[:, None],
        torch.arange(heads, device=device)[:, None, None],
        batch[:, None, None, None],
    )
    words = philox(seed, counter).flatten(-2)[..., :columns]
    return words >= int(p * 4294967296.0)


def draw_seed(device: torch.device) -> Tensor:
    """A fresh Philox key, int64 [1], from torch's generator of the device, so that torch.manual_seed governs it."""
    return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device)
