"""Run a script of the project as a child of an evaluation."""

import subprocess
import sys
from pathlib import Path

from common.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


def launch(processes: int, script: str, *options: object) -> None:
    """Run a script of the project, with torchrun if there are several processes. Raises UserError if it fails."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    print("\n==", script, *options, flush=True)
    if subprocess.run([sys.executable, *launcher, str(ROOT / script), *map(str, options)]).returncode:
        raise UserError(
            f"{script} failed, see its output above; run the same command again to continue after what is finished"
        )
