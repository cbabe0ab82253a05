"""Products of bfloat16 matrices on a processor that has no instruction for them.

There PyTorch multiplies bfloat16 matrices slowly: those of this model, on AVX2, in 39 to 67 times the time
of float32. The product of two bfloat16 numbers is exact in float32, and the instructions that are missing add such
products up in float32 and round the sum once: so does a float32 product of the same operands.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

_aten = torch.ops.aten
_PRODUCTS = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten.baddbmm.default,
    _aten.convolution.default,
    _aten.convolution_backward.default,
}


class Float32Products(TorchDispatchMode):
    """Inside, forward and backward, matrix products and convolutions of bfloat16 on the CPU are computed in float32 and
    rounded to bfloat16 once. All else is untouched.
    """

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        narrow = isinstance(first, Tensor) and first.dtype is torch.bfloat16 and first.device.type == "cpu"
        if func not in _PRODUCTS or not narrow:
            return func(*args, **kwargs)
        wide = tree_map_only(Tensor, Tensor.float, (args, kwargs))
        return tree_map_only(Tensor, Tensor.bfloat16, func(*wide[0], **wide[1]))


def bfloat16_products() -> AbstractContextManager[Any]:
    """`Float32Products` where training is on a CPU that cannot multiply bfloat16, otherwise nothing."""
    if torch.cuda.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return contextlib.nullcontext()
    return Float32Products()
