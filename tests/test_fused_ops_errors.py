"""What `fused_softmax` and `rope_qk_norm` refuse: bad arguments by name, and backends that have no kernel."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import fused_attention as fa
from fused_attention.ops import fused_softmax, rope_qk_norm

from .triton_support import DEVICE, needs_triton


@pytest.mark.fast
def test_choice_of_backend() -> None:
    x = torch.randn(1, 2, 3, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = fused_softmax(x)
        rope_qk_norm(x, x)
    for call in (lambda: fused_softmax(x), lambda: rope_qk_norm(x, None)):
        with fa.use_backend("cpu"), pytest.raises(fa.BackendError, match="'cpu'.*no kernel for"):
            call()
        with fa.use_backend("reference"):
            call()
    with fa.use_backend("cpu", strict=False):
        torch.testing.assert_close(fused_softmax(x), expected)
    double = x.double()
    with fa.use_backend("triton"), pytest.raises(fa.BackendError, match="triton"):
        fused_softmax(double)
    with fa.use_backend("triton", strict=False):
        torch.testing.assert_close(fused_softmax(double), F.softmax(double, -1))


@pytest.mark.triton
@needs_triton
def test_rows_too_long_for_registers() -> None:
    x = torch.randn(1, 1, 1, 8193, device=DEVICE)
    with fa.use_backend("triton"), pytest.raises(fa.BackendError, match="head dims up to 8192, not 8193"):
        rope_qk_norm(x, None)


# --- bad arguments --------------------------------------------------------------------------------------------------

X, Q, K = torch.zeros(2, 3, 5, 7), torch.zeros(2, 4, 5, 8), torch.zeros(2, 2, 5, 8)
C, W = torch.zeros(9, 4), torch.zeros(8)
P = torch.zeros(2, 5, dtype=torch.int64)
GRADIENT = torch.zeros(9, 4, requires_grad=True)
OTHER = torch.zeros(2, 2, 5, 8, device="meta")

# fmt: off
BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "scores-type": (lambda: fused_softmax([1.0]), TypeError, "scores: got list"),  # type: ignore[arg-type]
    "scores-dim": (lambda: fused_softmax(torch.zeros(3)), ValueError, "scores: got 1 dimensions"),
    "scores-dtype": (lambda: fused_softmax(X.long()), ValueError, r"scores\.dtype"),
    "scores-sparse": (lambda: fused_softmax(X[0, 0].to_sparse()), ValueError, r"scores\.layout"),
    "mask-type": (lambda: fused_softmax(X, 3), TypeError, "mask: got int"),  # type: ignore[arg-type]
    "mask-dtype": (lambda: fused_softmax(X, X.int()), ValueError, r"mask\.dtype"),
    "mask-shape": (lambda: fused_softmax(X, torch.zeros(5, 6)), ValueError, r"mask: got shape \[5, 6\]"),
    "mask-dims": (lambda: fused_softmax(X, X[None]), ValueError, "mask: got shape"),
    "mask-device": (lambda: fused_softmax(X, X.to("meta")), ValueError, r"mask\.device"),
    "scale-type": (lambda: fused_softmax(X, scale="1"), TypeError, "scale"),  # type: ignore[arg-type]
    "scale-nan": (lambda: fused_softmax(X, scale=float("nan")), ValueError, "scale: got nan"),
    "softcap-zero": (lambda: fused_softmax(X, softcap=0.0), ValueError, "softcap: got 0.0"),
    "softcap-infinite": (lambda: fused_softmax(X, softcap=float("inf")), ValueError, "softcap: got inf"),
    "causal-name": (lambda: fused_softmax(X, causal="left"), ValueError, "causal: got 'left'"),  # type: ignore[arg-type]
    "causal-bool": (lambda: fused_softmax(X, causal=True), TypeError, "causal: got True"),  # type: ignore[arg-type]
    "nothing": (lambda: rope_qk_norm(None, None), ValueError, "query: got None"),
    "query-type": (lambda: rope_qk_norm(1, K), TypeError, "query: got int"),  # type: ignore[arg-type]
    "query-dims": (lambda: rope_qk_norm(Q[0], K), ValueError, "query: got 3 dimensions"),
    "query-dtype": (lambda: rope_qk_norm(Q.int(), None), ValueError, r"query\.dtype"),
    "head-dim-0": (lambda: rope_qk_norm(Q[..., :0], None), ValueError, "query: got head dim 0"),
    "key-dtype": (lambda: rope_qk_norm(Q, K.half()), ValueError, r"key\.dtype"),
    "key-device": (lambda: rope_qk_norm(Q, OTHER), ValueError, r"key\.device"),
    "key-batch": (lambda: rope_qk_norm(Q, K[:1]), ValueError, "key: got batch size 1"),
    "key-head-dim": (lambda: rope_qk_norm(Q, K[..., :6]), ValueError, "key: got head dim 6"),
    "cos-alone": (lambda: rope_qk_norm(Q, K, C), ValueError, "sin: got None"),
    "sin-alone": (lambda: rope_qk_norm(Q, K, None, C), ValueError, "cos: got None"),
    "cos-dims": (lambda: rope_qk_norm(Q, K, C[0], C[0]), ValueError, "cos: got shape"),
    "cos-wide": (lambda: rope_qk_norm(Q, K, torch.zeros(9, 5), C), ValueError, "cos: got shape"),
    "cos-short": (lambda: rope_qk_norm(Q, K, C[:4], C[:4]), ValueError, "cos: got 4 rows.*length 5"),
    "cos-dtype": (lambda: rope_qk_norm(Q, K, C.half(), C.half()), ValueError, r"cos\.dtype"),
    "cos-double": (lambda: rope_qk_norm(Q, K, C.double(), C.double()), ValueError, r"cos\.dtype"),
    "cos-gradient": (lambda: rope_qk_norm(Q, K, GRADIENT, C), ValueError, "cos: got a tensor that requires gradients"),
    "sin-gradient": (lambda: rope_qk_norm(Q, K, C, GRADIENT), ValueError, "sin: got a tensor that requires gradients"),
    "sin-shape": (lambda: rope_qk_norm(Q, K, C, C[:8]), ValueError, "sin: got shape"),
    "positions-alone": (lambda: rope_qk_norm(Q, K, positions=P), ValueError, "positions: got a tensor"),
    "positions-dtype": (lambda: rope_qk_norm(Q, K, C, C, positions=P.float()), ValueError, r"positions\.dtype"),
    "positions-shape": (lambda: rope_qk_norm(Q, K, C, C, positions=P[:, :4]), ValueError, "positions: got shape"),
    "positions-flat": (lambda: rope_qk_norm(Q, K, C, C, positions=P[0]), ValueError, "positions: got shape"),
    "positions-batch": (lambda: rope_qk_norm(Q, K, C, C, positions=P.repeat(2, 1)), ValueError, "positions: got shape"),
    "positions-key": (lambda: rope_qk_norm(Q, K[:, :, :3], C, C, positions=P), ValueError, "key's length"),
    "positions-low": (lambda: rope_qk_norm(Q, K, C, C, positions=P - 1), ValueError, "a position of -1"),
    "positions-high": (lambda: rope_qk_norm(Q, K, C, C, positions=P + 9), ValueError, "a position of 9"),
    "weight-type": (lambda: rope_qk_norm(Q, K, query_weight=1.0), TypeError, "query_weight"),  # type: ignore[arg-type]
    "weight-shape": (lambda: rope_qk_norm(Q, K, key_weight=W[:4]), ValueError, "key_weight: got shape"),
    "weight-dtype": (lambda: rope_qk_norm(Q, K, key_weight=W.int()), ValueError, r"key_weight\.dtype"),
    "weight-alone": (lambda: rope_qk_norm(Q, None, key_weight=W), ValueError, "key_weight: got a tensor"),
    "eps-negative": (lambda: rope_qk_norm(Q, K, eps=-1.0), ValueError, "eps: got -1.0"),
    "eps-type": (lambda: rope_qk_norm(Q, K, eps=None), TypeError, "eps"),  # type: ignore[arg-type]
    "interleaved": (lambda: rope_qk_norm(Q, K, interleaved=1), TypeError, "interleaved: got 1"),  # type: ignore[arg-type]
}
# fmt: on


@pytest.mark.fast
@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name: str) -> None:
    call, error, words = BAD[name]
    with pytest.raises(error, match=words):
        call()
