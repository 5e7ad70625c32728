"""Own the run directory DIRECTORY and wait to be killed, with a forked child that outlives this process.

python tests/training/lock_holder.py DIRECTORY CHILD_PID_FILE
"""

import os
import signal
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from common.durable_files import write_durably
from distributed.process_group import start_process_group
from training.owner import own_directory

with own_directory(Path(sys.argv[1]), start_process_group()):
    child = os.fork()
    if child:
        write_durably(Path(sys.argv[2]), str(child))
    signal.pause()
