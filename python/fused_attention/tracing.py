"""Whether somebody watches a call in order to trace it, and what must not be traced."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")


def is_traced(query: object) -> bool:
    """Whether the call must stay one op: a tracer, a dispatch mode or a tensor without plain data."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return True
    if torch._C._get_tracing_state() is not None:  # torch.jit.trace, to which other results are constants
        return True
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    return isinstance(query, Tensor) and (
        type(query) not in (Tensor, torch.nn.Parameter) or query.device.type == "meta"
    )


def uncompiled(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """A function that torch.compile calls as it is."""

    @functools.wraps(function)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*args, **kwargs)  # here, because it imports the compiler
        return function(*args, **kwargs)

    return call
