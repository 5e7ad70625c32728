"""All types of data files, compressed and uncompressed, and the error messages for damaged ones."""

import gzip
import json
from pathlib import Path

import pytest

from common.errors import UserError
from data.examples import load_documents
from data.files import read_file
from tests.tiny import tiny_tokenizer

TEXTS = ["The bank shall hold own funds.", "Grüße: die LCR beträgt 97,3 %."]
CHAT = [{"role": "user", "content": "LCR?"}, {"role": "assistant", "content": "97.3%"}]


def write(path: Path, data: bytes) -> Path:
    if path.suffix == ".gz":
        data = gzip.compress(data)
    elif path.suffix == ".zst":
        zstandard = pytest.importorskip("zstandard")
        # Two frames, as written by tools that compress in parallel.
        half = len(data) // 2
        data = b"".join(zstandard.ZstdCompressor().compress(part) for part in (data[:half], data[half:]))
    path.write_bytes(data)
    return path


def parquet(column: str, values: list) -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.table({"id": list(range(len(values))), column: values}), sink)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
def test_every_file_type_is_read(tmp_path, compression) -> None:
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in TEXTS).encode()
    assert [e["text"] for _, e in read_file(write(tmp_path / f"a.jsonl{compression}", lines))] == TEXTS
    whole = "\ufeff" + "\r\n".join(TEXTS)
    assert [e for _, e in read_file(write(tmp_path / f"a.txt{compression}", whole.encode()))] == [
        {"text": "\n".join(TEXTS)}
    ]
    path = write(tmp_path / f"a.parquet{compression}", parquet("text", TEXTS))
    assert list(read_file(path)) == [(f"{path}, row {i}", {"text": text}) for i, text in enumerate(TEXTS, 1)]
    path = write(tmp_path / f"chat.parquet{compression}", parquet("messages", [CHAT]))
    assert [e for _, e in read_file(path)] == [{"messages": CHAT}]
    made = load_documents((str(tmp_path / f"a.jsonl{compression}"), str(path)), tiny_tokenizer(), 512, "error")
    assert len(made) == 3


@pytest.mark.parametrize(
    "name, data, words",
    [
        ("a.jsonl.gz", b"hello", "is damaged or not a gzip file"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99)[:-6], "is damaged or not a gzip file"),
        ("a.txt", b"  \n", "contains no examples"),
        ("a.txt", b"\xff\xfe", "a.txt is not UTF-8"),
        ("a.csv", b"id,text\n", "a.csv contains no examples"),
        ("a.jsonl.zst", b"hello", "is damaged or not a zstd file"),
        ("a.parquet", b"hello", "is damaged or not a parquet file"),
    ],
)
def test_the_error_names_a_damaged_file(tmp_path, name, data, words) -> None:
    if "zst" in name:
        pytest.importorskip("zstandard")
    if "parquet" in name:
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=words):
        list(read_file(tmp_path / name))


def test_a_directory_is_refused(tmp_path) -> None:
    with pytest.raises(UserError, match="is a directory; name the files in it instead"):
        list(read_file(tmp_path))


def test_a_truncated_zst_file_and_a_parquet_file_without_known_columns_are_refused(tmp_path) -> None:
    zstandard = pytest.importorskip("zstandard")
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(b'{"text": "a"}\n' * 100)[:-4])
    with pytest.raises(UserError, match="ends in the middle of a zstd frame"):
        list(read_file(tmp_path / "a.jsonl.zst"))
    (tmp_path / "a.parquet").write_bytes(parquet("body", TEXTS))
    with pytest.raises(UserError, match="no column of a known form .* its columns are id, body; data.fields"):
        list(read_file(tmp_path / "a.parquet"))


@pytest.mark.parametrize("missing, name", [("pyarrow", "a.parquet"), ("zstandard", "a.txt.zst")])
def test_a_missing_library_gives_a_one_line_error(tmp_path, monkeypatch, missing, name) -> None:
    monkeypatch.setitem(__import__("sys").modules, missing, None)
    (tmp_path / name).write_bytes(b"data")
    with pytest.raises(UserError, match=f"requires {missing}; pip install {missing}"):
        list(read_file(tmp_path / name))
