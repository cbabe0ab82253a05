"""The one tolerance rule of the project.

A result passes when

    max|out - ref| <= factor * max|same - ref| + atol,    atol = 2 * max|(ref + 0.3 - 0.3) - ref| in the dtype

with factor 2, and 3 for gradients. `ref` is computed in a higher precision than the tested dtype, `same` is plain eager
PyTorch in the tested dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rounding(ref: Tensor, dtype: torch.dtype) -> float:
    """max|(ref + 0.3 - 0.3) - ref| in dtype, over finite values of ref in float64."""
    rounded = ref.to(dtype)
    return largest(((rounded + 0.3) - 0.3).double() - rounded.double())


def allowed(same_error: float, rounding: float, grad: bool) -> float:
    """The right side of the rule: same_error is max|same - ref|."""
    return (3.0 if grad else 2.0) * same_error + 2.0 * rounding


def largest(x: Tensor) -> float:
    """max|x|; 0 of nothing."""
    return float(x.abs().max()) if x.numel() else 0.0


def compare(out: Tensor, same: Tensor, ref: Tensor, grad: bool) -> dict[str, float]:
    """The figures {"error", "torch", "allowed"} of one result against ref in float64.

    error is infinite where the rule cannot hold: infinities that are not the reference's, or a NaN where it is finite.
    """
    got, plain, exact = (t.detach().flatten().double() for t in (out, same, ref))
    finite = exact.isfinite()
    ours = largest(got[finite] - exact[finite])
    if not torch.equal(got[~finite], exact[~finite]) or not got[finite].isfinite().all():
        ours = torch.inf
    # PyTorch answers NaN in some rows that see nothing, which says nothing about rounding there.
    both = finite & plain.isfinite()
    theirs = largest(plain[both] - exact[both])
    return {"error": ours, "torch": theirs, "allowed": allowed(theirs, rounding(exact[finite], out.dtype), grad)}
