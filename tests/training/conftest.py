"""A process group of one."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from distributed.process_group import Ranks


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield Ranks(0, 1, 0, torch.device("cpu"), dist.group.WORLD)
    dist.destroy_process_group()
