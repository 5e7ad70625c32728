"""Reports of a folder over worker processes."""

import signal
from functools import partial

from xbrl.read.folder import in_parallel


def test_workers_leave_ctrl_c_to_the_process_that_started_them():
    """A worker that dies of Ctrl-C prints a traceback, and the pool may wait for it forever."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    masks = list(in_parallel(partial(signal.pthread_sigmask, signal.SIG_BLOCK), [[], []], 2, "masks"))
    assert [signal.SIGINT in mask for mask in masks] == [True, True]
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before and signal.SIGINT not in before
