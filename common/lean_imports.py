"""Importing torch and transformers faster: no garbage collection meanwhile, and nothing that training does not use.

    from common.lean_imports import begin_imports, end_imports

    begin_imports()
    import torch ...
    end_imports()

The figures are in docs/performance.md, "The start of a run".
"""

import gc
import sys
from pathlib import Path

# transformers imports these wherever they are installed: torchao for quantised models, which cannot be trained here, and
# scipy for the losses of object detection. Our own imports of them work as always.
NOT_FOR_TRANSFORMERS = ("torchao", "scipy")


def begin_imports() -> None:
    """Stop Python's garbage collector, and let transformers believe that the packages above are not installed.

    Modules stay for ever: looking for garbage among them takes a fifth of the time of the imports.
    """
    gc.disable()
    _list_models_once()
    for package in NOT_FOR_TRANSFORMERS:
        _hide_from_transformers(package)


def end_imports() -> None:
    """Start the garbage collector again. It does not look at the modules, in which nothing can become garbage."""
    gc.freeze()
    gc.enable()


def _list_models_once() -> None:
    """Keep transformers from reading all of its 1,700 files of models a second time.

    It does so for `import transformers`, which has happened here, and for the first class that is imported from there. Its own
    cache has room for 128 folders, and there are 560. What is listed for a file is what is listed for its folder. No-op with
    a version of transformers that has no such function.
    """
    from transformers.utils import import_utils

    of_folder = getattr(import_utils, "create_import_structure_from_path", None)
    if of_folder is None:
        return

    def of_file_or_folder(path: str | Path) -> object:
        return of_folder(Path(path).parent if Path(path).suffix == ".py" else path)

    import_utils.create_import_structure_from_path = of_file_or_folder


def _hide_from_transformers(package: str) -> None:
    """Have transformers ask once whether `package` is installed, and remember that it is not.

    No-op with a version of transformers that does not remember it, or if `package` is loaded already.
    """
    from transformers.utils import import_utils

    is_available = getattr(import_utils, f"is_{package}_available", None)
    if is_available is None or not hasattr(is_available, "cache_clear") or package in sys.modules:
        return
    is_available.cache_clear()
    sys.modules[package] = None  # pyright: ignore[reportArgumentType]  # find_spec then finds nothing
    try:
        is_available()
    finally:
        del sys.modules[package]
