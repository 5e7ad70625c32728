"""Which files of a folder are reports, and reading them over worker processes."""

import shutil
import signal
from pathlib import Path

from xbrl.read.folder import in_parallel, read_files, report_files
from xbrl.read.xbrl import is_package

SAMPLE = Path(__file__).with_name("eba_lcr_sample")


def test_no_report_is_passed_over_beside_an_unpacked_package(tmp_path):
    """A folder is a package if it has the files of one, or a single folder that has them, as a zip is unpacked."""
    package, noise = shutil.copytree(SAMPLE, tmp_path / "LEI1"), tmp_path / "__MACOSX"
    noise.mkdir()
    assert is_package(package) and is_package(tmp_path)
    others = [shutil.copytree(SAMPLE, tmp_path / "LEI2"), shutil.copytree(SAMPLE / "reports", tmp_path / "LEI3")]
    zipped = shutil.make_archive(str(tmp_path / "LEI4"), "zip", SAMPLE)
    assert not is_package(tmp_path) and not is_package(others[1])
    files = report_files(tmp_path)
    assert files == [package, others[0], others[1] / "report.json", Path(zipped)]
    reports, refused = read_files(files, 1)
    assert not refused and len({report.facts for report in reports}) == 1 and len(reports) == 4


def test_workers_leave_ctrl_c_to_the_process_that_started_them():
    """A worker that dies of Ctrl-C prints a traceback, and the pool may wait for it forever."""
    before = signal.getsignal(signal.SIGINT)
    handlers = list(in_parallel(signal.getsignal, [signal.SIGINT] * 2, 2, "handlers"))
    assert handlers == [signal.SIG_IGN] * 2 and signal.getsignal(signal.SIGINT) == before
