"""The only door to names that torch does not promise to keep. A torch without them is named when a module is imported, not in
step 1,000. tests/common/test_torch_private.py looks up every name that the product uses.
"""

import importlib
from typing import Any

import torch

from common.errors import UserError


def private(path: str) -> Any:
    """Return the object at `torch.<path>`. Call it when a module is imported. Raise UserError if this torch has no such name."""
    value: Any = torch
    try:
        for name in path.split("."):
            if not hasattr(value, name):  # a module that torch has not imported yet
                importlib.import_module(f"{value.__name__}.{name}")
            value = getattr(value, name)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"torch {torch.__version__} has no `torch.{path}`, which this project uses; install a version that requirements.txt admits"
        ) from error
    return value
