"""Which files of a folder are reports, and reading them over worker processes."""

import shutil
import signal
from pathlib import Path

from xbrl.read.folder import in_parallel, read_files, report_files

SAMPLE = Path(__file__).with_name("eba_lcr_sample")


def test_no_report_is_passed_over_beside_an_unpacked_package(tmp_path):
    """A folder is a package by its own files alone. What stands in `reports/` without the rest is a report, too."""
    packages = [shutil.copytree(SAMPLE, tmp_path / name) for name in ("LEI1", "LEI2")]
    alone = shutil.copytree(SAMPLE / "reports", tmp_path / "LEI3") / "report.json"
    zipped = shutil.make_archive(str(tmp_path / "LEI4"), "zip", SAMPLE)
    files = report_files(tmp_path)
    assert files == [*packages, alone, Path(zipped)] and report_files(packages[0]) == packages[:1]
    reports, refused = read_files(files, 1)
    assert not refused and len(reports) == 4 and len({report.facts for report in reports}) == 1


def test_workers_leave_ctrl_c_to_the_process_that_started_them():
    """A worker that dies of Ctrl-C prints a traceback, and the pool may wait for it forever."""
    before = signal.getsignal(signal.SIGINT)
    handlers = list(in_parallel(signal.getsignal, [signal.SIGINT] * 2, 2, "handlers"))
    assert handlers == [signal.SIG_IGN] * 2 and signal.getsignal(signal.SIGINT) == before
