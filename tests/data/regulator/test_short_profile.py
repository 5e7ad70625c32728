"""The quickstart trains on the short profile, so its bytes must not change when the full profile is extended."""

import hashlib
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[3]
SHA256 = "33286e21601c6edaaf9e4ba3b4f691c035d1f433629ef8892cd0c98ce0bac2b5"


def test_the_bytes_of_the_short_corpus(tmp_path):
    command = [sys.executable, "scripts/make_reports.py", "--profile", "short", "--examples", "60", "--seed", "0"]
    command += ["--processes", "1", "--out", str(tmp_path / "short")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    texts = [(tmp_path / "short" / f"{split}.jsonl").read_bytes() for split in ("train", "validation", "test")]
    assert [text.count(b"\n") for text in texts] == [48, 6, 6]
    assert hashlib.sha256(b"".join(texts)).hexdigest() == SHA256
