"""Bad calls of `scaled_dot_product_attention`: PyTorch's type of error, and a message that names the argument.

Each entry is also given to PyTorch's function. None stands where that computes something (NaN, or a result from memory
beyond a tensor) and this package raises instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

from fused_attention import ArgumentError, scaled_dot_product_attention

pytestmark = pytest.mark.fast


def r(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    return torch.ones(shape, dtype=dtype, device=device)


Q, K, V = r(2, 4, 5, 8), r(2, 4, 7, 8), r(2, 4, 7, 8)
K2, K3 = r(2, 2, 7, 8), r(2, 3, 7, 8)
RAGGED = torch.nested.nested_tensor([r(3, 4, 8), r(5, 4, 8)], layout=torch.jagged).transpose(1, 2)
Call = tuple[tuple[Any, ...], dict[str, Any]]


def call(*args: Any, **options: Any) -> Call:
    return args, options


# name: (call, what PyTorch raises, words of this package's message)
BAD: dict[str, tuple[Call, type[Exception] | None, str]] = {
    # not tensors
    "query-none": (call(None, K, V), TypeError, "query: got NoneType"),
    "key-list": (call(Q, [1.0], V), TypeError, "key: got list"),
    "value-array": (call(Q, K, np.ones((2, 4, 7, 8))), TypeError, "value: got ndarray"),
    "mask-int": (call(Q, K, V, 1), TypeError, "attn_mask: got int"),
    "mask-array": (call(Q, K, V, np.ones((5, 7))), TypeError, "attn_mask: got ndarray"),
    # options
    "positional-scale": (call(Q, K, V, None, 0.0, False, 1.0), TypeError, "positional"),
    "unknown-option": (call(Q, K, V, causal=True), TypeError, "causal"),
    "causal-int": (call(Q, K, V, is_causal=1), TypeError, "is_causal: got int"),
    "causal-none": (call(Q, K, V, is_causal=None), TypeError, "is_causal: got NoneType"),
    "causal-tensor": (call(Q, K, V, is_causal=torch.tensor(True)), TypeError, "is_causal: got Tensor"),
    "gqa-int": (call(Q, K, V, enable_gqa=1), TypeError, "enable_gqa: got int"),
    "dropout-none": (call(Q, K, V, dropout_p=None), TypeError, "dropout_p: got NoneType"),
    "dropout-text": (call(Q, K, V, dropout_p="0.5"), TypeError, "dropout_p: got str"),
    "dropout-above": (call(Q, K, V, dropout_p=1.5), RuntimeError, "dropout_p: got 1.5"),
    "dropout-below": (call(Q, K, V, dropout_p=-0.1), RuntimeError, "dropout_p: got -0.1"),
    "dropout-nan": (call(Q, K, V, dropout_p=float("nan")), RuntimeError, "dropout_p: got nan"),
    "scale-text": (call(Q, K, V, scale="1"), TypeError, "scale: got str"),
    "scale-complex": (call(Q, K, V, scale=1j), TypeError, "scale: got complex"),
    "scale-nan": (call(Q, K, V, scale=float("nan")), None, "scale: got nan"),
    "scale-inf": (call(Q, K, V, scale=float("inf")), None, "scale: got inf"),
    # shapes
    "one-dimension": (call(r(4), r(4), r(4)), RuntimeError, "query: got 1 dimension"),
    "key-one-dimension": (call(Q, r(8), V), RuntimeError, "key: got 1 dimension"),
    "head-dims": (call(Q, r(2, 4, 7, 9), V), RuntimeError, "key: got head dim 9"),
    "head-dim-one": (call(Q, r(2, 4, 7, 1), V), RuntimeError, "key: got head dim 1"),
    "value-shorter": (call(Q, K, r(2, 4, 6, 8)), None, "value: got length 6"),
    "value-longer": (call(Q, K, r(2, 4, 9, 8)), None, "value: got length 9"),
    "value-one": (call(Q, K, r(2, 4, 1, 8)), None, "value: got length 1"),
    "key-one": (call(Q, r(2, 4, 1, 8), V), None, "expected key's length 1"),
    "batches": (call(Q, r(3, 4, 7, 8), r(3, 4, 7, 8)), RuntimeError, r"leading dimensions: got \[2\], \[3\], \[3\]"),
    "heads": (call(Q, K2, K2), RuntimeError, r"heads \(enable_gqa=False\): got \[4\], \[2\], \[2\]"),
    "gqa-not-a-divisor": (call(Q, K3, K3, enable_gqa=True), RuntimeError, "key: got 3 heads"),
    "gqa-value": (call(Q, K2, K3, enable_gqa=True), RuntimeError, "value: got 3 heads"),
    "gqa-more": (call(K2, K, V, enable_gqa=True), RuntimeError, "key: got 4 heads"),
    "gqa-no-heads": (call(Q[0, 0], K[0, 0], V[0, 0], enable_gqa=True), IndexError, "heads dimension"),
    "gqa-zero-heads": (call(Q, r(2, 0, 7, 8), r(2, 0, 7, 8), enable_gqa=True), None, "key: got 0 heads"),
    # dtypes and devices
    "key-dtype": (call(Q, K.double(), V), RuntimeError, "key.dtype: got torch.float64"),
    "value-dtype": (call(Q, K, V.half()), RuntimeError, "value.dtype: got torch.float16"),
    "integers": (call(Q.long(), K.long(), V.long()), RuntimeError, "query.dtype: got torch.int64"),
    "booleans": (call(Q.bool(), K.bool(), V.bool()), RuntimeError, "query.dtype: got torch.bool"),
    "complex": (call(Q + 0j, K + 0j, V + 0j), RuntimeError, "query.dtype: got torch.complex64"),
    "key-device": (call(Q, K.to("meta"), V), RuntimeError, "key.device: got meta"),
    "sparse": (call(Q.to_sparse(), K, V), RuntimeError, "query.layout: got torch.sparse_coo"),
    # masks
    "mask-double": (call(Q, K, V, r(5, 7, dtype=torch.float64)), RuntimeError, "attn_mask.dtype: got torch.float64"),
    "mask-half": (call(Q, K, V, r(5, 7, dtype=torch.float16)), RuntimeError, "attn_mask.dtype: got torch.float16"),
    "mask-int64": (call(Q, K, V, r(5, 7, dtype=torch.int64)), RuntimeError, "attn_mask.dtype: got torch.int64"),
    "mask-uint8": (call(Q, K, V, r(5, 7, dtype=torch.uint8)), RuntimeError, "attn_mask.dtype: got torch.uint8"),
    "mask-turned": (call(Q, K, V, r(7, 5)), RuntimeError, "attn_mask: got shape"),
    "mask-rows": (call(Q, K, V, r(6, 7)), RuntimeError, "attn_mask: got shape"),
    "mask-no-rows": (call(Q, K, V, r(0, 7)), RuntimeError, "attn_mask: got shape"),
    "mask-heads": (call(Q, K, V, r(3, 5, 7)), RuntimeError, "attn_mask: got shape"),
    "mask-batch": (call(Q, K, V, r(3, 1, 5, 7)), RuntimeError, "attn_mask: got shape"),
    "mask-five": (call(Q, K, V, r(1, 2, 4, 5, 7)), RuntimeError, "attn_mask: got 5 dimensions|attn_mask: got shape"),
    "mask-four-for-three": (call(Q[0], K[0], V[0], r(1, 4, 5, 7)), RuntimeError, "attn_mask: got 4 dimensions"),
    "mask-three-for-two": (call(Q[0, 0], K[0, 0], V[0, 0], r(3, 5, 7)), RuntimeError, "attn_mask: got 3 dimensions"),
    "mask-lead-for-five": (
        call(Q.expand(3, 2, 4, 5, 8), K, V, r(2, 2, 1, 5, 7)),
        RuntimeError,
        "attn_mask leading dimensions",
    ),
    "mask-device": (call(Q, K, V, r(5, 7).to("meta")), None, "attn_mask.device: got meta"),
    # torch.nn.attention.bias
    "bias-causal": (call(Q, K, V, causal_upper_left(5, 7), is_causal=True), ValueError, "is_causal: got True"),
    "bias-size": (call(Q, K, V, causal_lower_right(9, 11)), RuntimeError, r"lengths \[9, 11\], expected \[5, 7\]"),
    "bias-square": (call(Q, K, V, causal_lower_right(1, 1)), None, r"lengths \[1, 1\], expected \[5, 7\]"),
    "bias-dtype": (call(Q, K.half(), V, causal_lower_right(5, 7)), ValueError, "key.dtype: got torch.float16"),
    # nested tensors
    "nested-mask": (call(RAGGED, RAGGED, RAGGED, r(5, 7)), ValueError, "attn_mask: got a Tensor"),
    "nested-and-dense": (call(RAGGED, K, V), ValueError, "key: got a dense"),
}


@pytest.mark.parametrize("name", BAD)
def test_raises_what_torch_raises(name: str) -> None:
    (args, options), type_of_torch, words = BAD[name]
    with pytest.raises(type_of_torch or ArgumentError, match=words):
        scaled_dot_product_attention(*args, **options)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [n for n, (_, error, _) in BAD.items() if error])
def test_torch_raises(name: str) -> None:
    """The table states PyTorch's side correctly; the calls that it answers are left out, they may read stray memory."""
    (args, options), error, _ = BAD[name]
    function: Callable[..., Any] = F.scaled_dot_product_attention
    with pytest.raises(error or Exception):
        function(*args, **options)


def test_number_of_bad_calls() -> None:
    assert len(BAD) >= 40


def test_argument_errors_are_both() -> None:
    assert issubclass(ArgumentError, ValueError) and issubclass(ArgumentError, RuntimeError)
