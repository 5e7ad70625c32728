"""Exit codes and error messages of scripts."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.durable_files import check_can_write, write_durably, write_json_lines
from common.errors import UserError, exit_code_of

ROOT = Path(__file__).resolve().parents[2]


def raising(error: BaseException) -> None:
    raise error


def test_full_disk_error_names_the_file(tmp_path, capsys) -> None:
    (tmp_path / "manifest.json.tmp").symlink_to("/dev/full")
    assert exit_code_of(lambda: write_durably(tmp_path / "manifest.json", "{}")) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}/manifest.json: the disk is full; ")


def test_user_error_prints_one_line_bug_is_raised(capsys) -> None:
    assert exit_code_of(lambda: None) == 0 and exit_code_of(lambda: 3) == 3
    assert exit_code_of(lambda: raising(UserError("a file, line 3: what is wrong"))) == 2
    assert exit_code_of(lambda: raising(OSError(errno.ENOSPC, "No space left on device", "a/file"))) == 2
    assert exit_code_of(lambda: raising(OSError(errno.ENOSPC, "No space left on device"))) == 2
    assert exit_code_of(lambda: raising(KeyboardInterrupt())) == 130
    full = "the disk is full; free some space and run the same command again\n"
    assert capsys.readouterr().err == f"error: a file, line 3: what is wrong\nerror: a/file: {full}error: {full}"
    for number in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
        assert exit_code_of(lambda: raising(OSError(number, "what the system says", "a/file"))) == 2  # noqa: B023
        ours = "error: a/file: what the system says; look at what is there and whose it is, or name another place\n"
        assert capsys.readouterr().err == ours
    for place, where in ((("a/file",), "a/file: "), ((), "")):  # NFS may lose a row of curves without naming the file
        assert exit_code_of(lambda: raising(OSError(errno.ESTALE, "Stale file handle", *place))) == 2  # noqa: B023
        mend = f"error: {where}Stale file handle; mend the disk and run the same command again\n"
        assert capsys.readouterr().err == mend
    for bug in (PermissionError(errno.EACCES, "of no file"), OSError(errno.ENOENT, "No such file", "a/file")):
        with pytest.raises(OSError):
            exit_code_of(lambda: raising(bug))  # noqa: B023


def test_common_error_is_printed_once_per_node(tmp_path, capsys, monkeypatch) -> None:
    for rank, sentence in ((1, "the same"), (0, "the same"), (3, "only here"), (2, "the same")):
        folder = tmp_path / "attempt_0" / str(rank)
        folder.mkdir(parents=True)
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(folder / "error.json"))
        assert exit_code_of(lambda: raising(UserError(sentence))) == 2  # noqa: B023
    assert capsys.readouterr().err == "error: the same\nerror: only here\n"


@pytest.mark.parametrize("code", [0, 2])
def test_under_torchrun_interpreter_shutdown_is_skipped(code) -> None:
    script = (
        "import atexit; from common.errors import exit_process; atexit.register(print, 'shut down'); print('done'); "
        f"exit_process({code})"
    )
    environment = {key: value for key, value in os.environ.items() if key != "RANK"}
    for worker, expected in (({}, "done\nshut down\n"), ({"RANK": "0"}, "done\n")):
        command = [sys.executable, "-c", script]
        done = subprocess.run(command, cwd=ROOT, env=environment | worker, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (code, expected)


def test_unprintable_characters_are_printed_as_codes(tmp_path) -> None:
    write_json_lines(tmp_path / "answers.jsonl", [row := {"id": "\ud83d", "answer": "\u27e6"}])
    assert json.loads((tmp_path / "answers.jsonl").read_text(encoding="utf-8")) == row
    script = """
from common.errors import UserError, run_script

def main():
    print("\u27e6 M\\udcfcller")
    raise UserError("M\\udcfcller does not exist")

run_script(main)
"""
    (tmp_path / "attempt_0" / "0").mkdir(parents=True)
    of_rank = {"RANK": "0", "TORCHELASTIC_ERROR_FILE": str(tmp_path / "attempt_0" / "0" / "error.json")}
    environment = os.environ | of_rank | {"PYTHONIOENCODING": "latin-1", "PYTHONUTF8": "0"}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "\\u27e6 M\\udcfcller\n")
    assert done.stderr == "error: M\\udcfcller does not exist\n"


def test_unwritable_output_is_refused_before_the_work(tmp_path, monkeypatch) -> None:
    """A new file replaces an existing one by a rename, so the folder's permissions count, not the file's."""
    (tmp_path / "result.json").touch()
    check_can_write(tmp_path / "result.json", "--json")
    with pytest.raises(UserError, match=r"--json .*: it is a directory"):
        check_can_write(tmp_path, "--json")
    monkeypatch.setattr("common.durable_files.os.access", lambda path, mode: path != tmp_path)
    with pytest.raises(UserError, match=rf"{tmp_path} is not writable; name a file that can be written"):
        check_can_write(tmp_path / "result.json", "--json")
