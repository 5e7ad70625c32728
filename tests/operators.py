"""What torch's operators are given and make, as a test sees it."""

from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Seeing(TorchDispatchMode):
    """Calls `see(operator, its arguments, what it returned)` after each operator, those of a backward inside included."""

    def __init__(self, see: Callable[[object, tuple, object], object]) -> None:
        super().__init__()
        self.see = see

    def __torch_dispatch__(self, func: torch._ops.OpOverload, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.see(func, args, out)
        return out
