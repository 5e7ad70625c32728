"""Finding the reports of a folder, and reading them in worker processes."""

import os
import shutil
import signal
from decimal import Decimal
from pathlib import Path

import pytest

from common.errors import UserError
from tests.xbrl.desk.reports import CLIENT, LCR, OTHER_CLIENT, SMALL, write
from xbrl.read.folder import in_parallel, join_modules, passed_over, read_files, report_files
from xbrl.rules.remittance import late_filings

SAMPLE = Path(__file__).with_name("eba_lcr_sample")


def test_reports_beside_an_unpacked_package_are_read(tmp_path):
    """Only its own files make a folder a package. A report.json without a package around it is a report, too."""
    packages = [shutil.copytree(SAMPLE, tmp_path / name) for name in ("LEI1", "LEI2")]
    alone = shutil.copytree(SAMPLE / "reports", tmp_path / "LEI3") / "report.json"
    zipped = shutil.make_archive(str(tmp_path / "LEI4"), "zip", SAMPLE)
    files, _ = report_files(tmp_path)
    assert files == [*packages, alone, Path(zipped)] and report_files(packages[0]) == (packages[:1], [])
    reports, refused = read_files(files, 1)
    assert not refused and len(reports) == 4 and len({report.facts for report in reports}) == 1


def test_a_link_to_a_parent_is_followed_once(tmp_path):
    """Two such links would be read 2^40 times."""
    far = shutil.copytree(SAMPLE, tmp_path / "reports" / "q2" / "LEI2")
    here = tmp_path / "reports" / "q1"
    shutil.copytree(SAMPLE, here / "LEI1")
    for name, target in (("up", here.parent), ("self", here), ("other", far.parent), ("again", far.parent)):
        (here / name).symlink_to(target)
    (here / "LEI3_2026-03-31.7z").touch()
    files, ignored = report_files(here.parent)
    assert sorted(path.resolve() for path in files) == sorted((here / "LEI1", far)) and ignored == [
        here / "LEI3_2026-03-31.7z"
    ]
    line = f"not read: 1 files that are no reports by their names, the first {ignored[0]}\n"
    assert passed_over(ignored) == line and passed_over([]) == ""


def test_links_out_of_the_folder_are_not_opened(tmp_path):
    """A bank that may write into the folder must not have other files of the machine read."""
    secret = shutil.copytree(SAMPLE, tmp_path / "elsewhere" / "LEI2")
    (tmp_path / "secret.json").write_text("{}")
    folder = tmp_path / "reports"
    shutil.copytree(SAMPLE, folder / "LEI1")
    (folder / "LEI2").symlink_to(secret)
    (folder / "deep").symlink_to(secret.parent)
    (folder / "x.json").symlink_to(tmp_path / "secret.json")
    files, ignored = report_files(folder)
    assert files == [folder / "LEI1"] and len(ignored) == 3
    line = f"not read: 3 links that do not lead to a report in the folder, the first {folder / 'LEI2'}\n"
    assert passed_over(ignored) == line


def corrected(tmp_path, changes, **more):
    """Read the report of a folder with all files of `SOUND` and a later file on large exposures with `changes`."""
    write(tmp_path / "files")
    (later,) = (path for path in write(tmp_path / "later", changes, **more) if "COREPLE_" in path.name)
    files = [
        *(tmp_path / "files").iterdir(),
        later.rename(tmp_path / "files" / later.name.replace("120000000.", "120000001.")),
    ]
    reports, refused = read_files(files, 1)
    (report,) = join_modules(reports, refused)
    return report, files[-1]


def test_of_a_corrected_return_the_latest_file_counts(tmp_path):
    """The bank removes a client from its return. If both files were read, the client would be a finding."""
    report, later = corrected(tmp_path, {CLIENT: None, OTHER_CLIENT: "0.30"})
    shares = {fact.keys["qINC"]: fact.value for fact in report.facts if fact.cell == ("C_28.00", "*", "c350")}
    assert shares == {"B34": Decimal("0.30")} and not report.incomplete and len(report.files) == 6
    earlier = later.name.replace("120000001.", "120000000.")
    assert report.warnings == (f"{earlier} does not count: {later.name} was made later",)
    assert [result.state for result in late_filings(report)] == ["ok"] * 5  # the return was in time


def test_an_unreadable_or_smaller_correction_leaves_reports_incomplete(tmp_path):
    (_, later) = corrected(tmp_path, {})
    good = later.read_text()
    later.write_text("{")
    files = list(later.parent.iterdir())
    (report,) = join_modules(*read_files(files, 1))
    assert len(report.files) == 5 and report.incomplete[0].endswith("; obtain the file again")
    (first,) = (path for path in files if path.name == later.name.replace("120000001.", "120000000."))
    first.write_text("{")
    later.write_text(good.replace('"C_28.00"', '"C_29.00"'))
    (report,) = join_modules(*read_files(files, 1))
    assert not report.incomplete  # the first file was refused, and the bank has filed it again
    first.write_text(good)
    (report,) = join_modules(*read_files(files, 1))
    assert report.incomplete[0].endswith(
        f"{later} corrects {first} and leaves out C_28.00; remove the one that does not count"
    )


def test_differing_files_of_one_template_need_a_person(tmp_path):
    """Their names do not tell which file counts. Equal files need no person."""
    files = write(tmp_path / "files", {LCR: "0.93"}, SMALL)
    files += [
        path.rename(path.with_name(f"copy{number}.json"))
        for number, path in enumerate(write(tmp_path / "other", {}, SMALL))
    ]
    (report,) = join_modules(*read_files(files, 1))
    (reason,) = report.incomplete
    assert "both have C_76.00.a and differ; remove the one that does not count" in reason


def test_workers_ignore_ctrl_c():
    """A worker that dies of Ctrl-C prints a traceback, and the pool may wait for it forever."""
    before = signal.getsignal(signal.SIGINT)
    handlers = list(in_parallel(signal.getsignal, [signal.SIGINT] * 2, 2, "handlers"))
    assert handlers == [signal.SIG_IGN] * 2 and signal.getsignal(signal.SIGINT) == before


def test_a_worker_that_is_killed_is_one_sentence():
    with pytest.raises(
        UserError, match="a worker process was killed, .*; run the command again with fewer workers, or on fewer files"
    ):
        list(in_parallel(os._exit, [9] * 2, 2, "files"))
