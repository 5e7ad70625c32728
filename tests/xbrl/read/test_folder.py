"""Reports of a folder over worker processes."""

import signal

from xbrl.read.folder import in_parallel


def test_workers_leave_ctrl_c_to_the_process_that_started_them():
    """A worker that dies of Ctrl-C prints a traceback, and the pool may wait for it forever."""
    before = signal.getsignal(signal.SIGINT)
    handlers = list(in_parallel(signal.getsignal, [signal.SIGINT] * 2, 2, "handlers"))
    assert handlers == [signal.SIG_IGN] * 2 and signal.getsignal(signal.SIGINT) == before
