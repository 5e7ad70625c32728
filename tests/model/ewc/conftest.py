import pytest
import torch
import torch.distributed as dist

from distributed.process_group import Ranks
from tests.model.ewc.tiny_ewc import write_model


@pytest.fixture(scope="module")
def ranks():
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield Ranks(0, 1, 0, torch.device("cpu"), dist.group.WORLD)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))
