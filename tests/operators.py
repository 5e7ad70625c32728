"""A mode that shows a test the arguments and results of all operators of torch."""

from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class OperatorHook(TorchDispatchMode):
    """A mode that calls `see(operator, arguments, result)` after each operator, including operators of backward."""

    def __init__(self, see: Callable[[object, tuple, object], object]) -> None:
        super().__init__()
        self.see = see

    def __torch_dispatch__(self, func: torch._ops.OpOverload, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.see(func, args, out)
        return out
