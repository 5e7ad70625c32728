"""A launch of train.py for the modules of reliability/, on forked ranks: as torchrun does, without its imports."""

import os
import signal
from pathlib import Path

from torch.distributed import TCPStore

from reliability.launch import kill
from tests.processes import ROOT, _become, _warm_parent

PROGRAM = Path(__file__).with_name("rank.py")


class ForkedLaunch:
    """Ranks of `train.py ARGUMENTS`. The launcher is this process, so it cannot be killed."""

    launcher = None

    def __init__(self, arguments: list[str], world_size: int, output: Path) -> None:
        self.output = output
        output.touch()
        self.position = output.stat().st_size
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self.store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": "0",
        }
        argv = [str(PROGRAM), *map(str, arguments)]
        self.children = []
        for rank in range(world_size):
            own = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            arguments_of_child = (argv, str(ROOT), own, [output, output])
            self.children.append(_warm_parent().Process(target=_become, args=arguments_of_child))
            self.children[-1].start()

    def ranks(self) -> dict[int, int]:
        return {rank: child.pid for rank, child in enumerate(self.children) if child.pid and child.exitcode is None}

    def signal_all(self, number: int) -> None:
        for pid in self.ranks().values():
            kill(pid, number)

    def exit_code(self) -> int | None:
        """As torchrun: when a rank has failed, the others get SIGTERM. None while one is alive."""
        codes = [child.exitcode for child in self.children]
        if any(codes):
            self.signal_all(signal.SIGTERM)
        return None if None in codes else next((code for code in codes if code), 0)

    def text(self) -> str:
        return self.output.read_bytes()[self.position :].decode(errors="replace")

    def kill_all(self) -> None:
        self.signal_all(signal.SIGKILL)
        for child in self.children:
            child.join()
