"""One thread for PyTorch, and the list of slow test files."""

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # on matrices this small, threads only wait for each other

# Files, or single tests in them, that start processes or take more than about two seconds. `-m "not slow"` leaves them out.
# Files in which only some tests are slow may use the mark itself, as all files in tests/distributed do.
SLOW = ("bench/test_bench.py::test_a_model_that_is_not_there_is_one_sentence",)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    root = Path(__file__).parent
    for item in items:
        name = f"{item.path.relative_to(root).as_posix()}::{getattr(item, 'originalname', item.name)}"
        if any(name == slow or name.startswith(f"{slow}::") for slow in SLOW):
            item.add_marker(pytest.mark.slow)
