"""Importing torch and transformers faster: no garbage collection meanwhile, and nothing that training does not use.

    from common.lean_imports import begin_imports, end_imports

    begin_imports()
    import torch ...
    end_imports()

The figures are in docs/LOG.md, "the start of a run".
"""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# transformers imports these wherever they are installed: torchao for quantised models, which cannot be trained here, scipy
# for the losses of object detection, and accelerate, which peft brings along, for models split over devices. Our own imports
# of them work as always.
NOT_FOR_TRANSFORMERS = ("torchao", "scipy", "accelerate")


def begin_imports() -> None:
    """Stop Python's garbage collector, and let transformers believe that the packages above are not installed.

    Modules stay for ever: looking for garbage among them takes a fifth of the time of the imports.
    """
    gc.disable()
    for package in NOT_FOR_TRANSFORMERS:
        _hide_from_transformers(package)


def end_imports() -> None:
    """Start the garbage collector again. It does not look at the modules, in which nothing can become garbage."""
    gc.freeze()
    gc.enable()


def _hide_from_transformers(package: str) -> None:
    """Have transformers ask once whether `package` is installed, and remember that it is not.

    No-op with a version of transformers that does not remember it, or if `package` is loaded already.
    """
    from transformers.utils import import_utils

    is_available = getattr(import_utils, f"is_{package}_available", None)
    if is_available is None or not hasattr(is_available, "cache_clear") or package in sys.modules:
        return
    is_available.cache_clear()
    with hidden(package):
        is_available()


@contextmanager
def hidden(package: str) -> Iterator[None]:
    """Inside the block `package` seems not to be installed. No-op if it is loaded already."""
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # pyright: ignore[reportArgumentType]  # find_spec then finds nothing
    try:
        yield
    finally:
        del sys.modules[package]
