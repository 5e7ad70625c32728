"""All types of data files, compressed and uncompressed, folders and globs, and the error messages for damaged ones."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from common.errors import UserError
from data.files import DEFAULT, Reading, check_paths_exist, expand, left_out
from data.formats import Noticed, read_files
from data.rows import column_names, read_rows
from tests.in_memory import json_lines, load_documents, parquet, table
from tests.tiny import tiny_tokenizer

TEXTS = ["The bank shall hold own funds.", "Grüße: die LCR beträgt 97,3 %."]
CHAT = [{"role": "user", "content": "LCR?"}, {"role": "assistant", "content": "97.3%"}]
ROWS = [{"messages": CHAT, "tools": [{"name": "lookup"}]}, {"messages": CHAT[:1], "weight": 0.5}]


def write(path: Path, data: bytes) -> Path:
    if path.suffix == ".gz":
        data = gzip.compress(data)
    elif path.suffix in (".bz2", ".xz"):
        data = {".bz2": bz2, ".xz": lzma}[path.suffix].compress(data)
    elif path.suffix == ".zst":
        zstandard = pytest.importorskip("zstandard")
        # Two frames, as from tools that compress in parallel.
        half = len(data) // 2
        data = b"".join(zstandard.ZstdCompressor().compress(part) for part in (data[:half], data[half:]))
    path.write_bytes(data)
    return path


def arrow(rows: list[dict], kind: str = "stream") -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    with getattr(pyarrow.ipc, f"new_{kind}")(sink := io.BytesIO(), table(rows).schema) as writer:
        writer.write_table(table(rows), max_chunksize=2)
    return sink.getvalue()


def csv_file(rows: list[list], delimiter: str = ",") -> bytes:
    csv.writer(sink := io.StringIO(), delimiter=delimiter).writerows(rows)
    return sink.getvalue().encode()


def examples(path: Path, **reading) -> list[dict]:
    return [example for _, example in read_files([path], Reading(**reading))]


def described(paths: list[Path], reading: Reading = DEFAULT) -> list[str]:
    """Return the log's lines on the forms of files after they were read."""
    noticed = Noticed(replace(reading, on_bad="skip"))
    list(read_files(paths, noticed.reading, noticed))
    return noticed.forms()


@pytest.mark.parametrize("compression", ["", ".gz", ".bz2", ".xz", ".zst"])
def test_every_file_type_is_read(tmp_path, compression) -> None:
    texts = [{"text": text} for text in TEXTS]
    assert examples(write(tmp_path / f"a.jsonl{compression}", json_lines(texts))) == texts
    whole = "\ufeff" + "\r\n".join(TEXTS)
    assert examples(write(tmp_path / f"a.txt{compression}", whole.encode())) == [{"text": "\n".join(TEXTS)}]
    assert examples(tmp_path / f"a.txt{compression}", fields={"text": "body"}) == [{"text": "\n".join(TEXTS)}]
    path = write(tmp_path / f"a.parquet{compression}", parquet([{"id": 1} | text for text in texts]))
    assert list(read_files([path])) == [(f"{path}, row {i}", text) for i, text in enumerate(texts, 1)]
    documents = load_documents((str(tmp_path / f"a.jsonl{compression}"), str(path)), tiny_tokenizer(), 512, "error")
    assert len(documents) == 4
    cells = [
        ["messages", "tools", "weight"],
        *([json.dumps(r["messages"]), json.dumps(r.get("tools", [])), r.get("weight")] for r in ROWS),
    ]
    for name, content in [
        ("b.jsonl", json_lines(ROWS)),
        ("b.json", json.dumps(ROWS, indent=1).encode()),
        ("lines.json", json_lines(ROWS)),
        ("b.csv", csv_file(cells)),
        ("B.TSV", csv_file(cells, "\t")),
        ("b.parquet", parquet(ROWS)),
        ("b.arrow", arrow(ROWS)),
        ("file.arrow", arrow(ROWS, "file")),
    ]:
        assert examples(write(tmp_path / f"{name}{compression}", content)) == ROWS, name


@pytest.mark.parametrize(
    "name, data, words",
    [
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:-6], "is damaged or not a gzip file"),
        ("a.txt", b"  \n", "contains no text"),
        ("a.txt", b"\xff\xfe", "a.txt is not UTF-8"),
        ("a.jsonl.zst", b"hello", "is damaged or not a zstd file"),
        ("a.parquet", b"hello", "is damaged or not a parquet file"),
        ("a.parquet", parquet([{"prompt": "a", "completion": "b", "label": False}]), "row 1 has `label`, as data of preferences"),
        ("a.parquet", parquet([{"prompt": "a", "completion": "b", "chat_template_kwargs": {"a": 1}}]), "row 1 has `chat_template_kwargs`"),
        ("a.parquet", parquet([{"input_ids": [5], "assistant_masks": [1]}]), "row 1 has `assistant_masks`, which is a `mask` here;"),
        ("a.parquet", parquet([{"prompt": "a", "completion": None}, ROWS[0]]), "row 1 has .*: its keys are prompt, completion .null."),
        ("a.parquet", parquet([{"chosen": "a", "rejected": "b", "id": 1}]), "row 1 is a row of preferences"),
        ("a.parquet", parquet([{"messages": [], "chosen": [], "rejected": []}]), "row 1 is a row of preferences"),
        ("a.parquet", parquet([{"question": "a", "label": 1}]), "no column of a known form .* its columns are question, label;"),
        ("a.jsonl", b'[{"text": "a"}]', "line 1 is not an object .*; the name of a file with one array must end in .json"),
        ("a.jsonl", b'{"text": ' + b"[" * 100_000, "line 1 is not valid JSON: it is nested too deeply"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b', "line 2 is not valid JSON: Unterminated string starting at column 10$"),
        ("a.md", b"# A note\n", "line 1 is not valid JSON: .* column 1; a name that does not end in .txt, .csv or the like means"),
        ("a.jsonl", b'{\n "text": "a"\n}', "line 1 is not valid JSON: .*; objects of several lines are read if the name ends in .json$"),
        ("a.json", b'[{"text": "a"},\n{"text": "b', "line 2 is not valid JSON: Unterminated string"),
        ("a.json", b'[{"text": "a"},\n\n{"text": a},' + b" " * 99 + b"]", "line 3 is not valid JSON: Expecting value$"),
        # Python would keep the last of the two values and silently drop the first.
        ("a.jsonl", b'{"messages": [{"content": "a", "content": "b"}]}', "line 1 is not valid JSON: an object has the key content twice"),
        # The line is not known either: the array begins in line 1.
        ("a.json", b'[{"text": "a"},\n{"text": "a", "text": "b"}]', "a.json is not valid JSON: an object has the key text twice"),
        ("a.json", b"[]", "contains no examples"),
        ("a.csv", b"", "contains no examples"),
        ("a.csv", b'text\na\n"b\nc\n', "line 3 is not valid CSV: unexpected end of data; is a quote not closed"),
        ("a.csv", b"text,id\na,1\nb\n", "line 3 has 1 cells, but the header has 2"),
        ("a.csv", b'text\n"a"b\n', "line 2 is not valid CSV: ',' expected after"),
        ("a.csv", b"text,text\na,b\n", "line 1: the column 'text' occurs twice"),
        ("a.csv", b"text\ncaf\xe9\n", "a.csv, line 2 is not UTF-8 text: invalid continuation byte"),
        ("a.csv", b"prompt,completion\ra,b\r", "line 1 has a carriage return alone outside of quotes"),
        ("a.csv", b"messages\n\"[{'role': 'user'}]\"\n", "line 2: `messages` is text that is not JSON, but looks like Python"),
    ],
)  # fmt: skip
def test_the_error_names_a_damaged_file(tmp_path, name, data, words) -> None:
    if "zst" in name or "parquet" in name:
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=words) as error:
        list(read_files([tmp_path / name]))
    assert str(error.value).startswith(str(tmp_path / name)) and "\n" not in str(error.value)


def test_json_columns_of_datasets_are_read(tmp_path) -> None:
    """`datasets` does so if rows differ: messages with and without tool calls, and the properties of tools."""

    def tool(name: str) -> dict:
        return {"name": name, "parameters": {"type": "object", "properties": {name: {"type": "string"}}}}

    call = {
        "role": "assistant",
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"a": None}}}],
    }
    rows = [
        {"messages": [CHAT[0], call | {"content": ""}], "tools": [tool("f")]},
        {"messages": CHAT, "tools": [tool("g")]},
    ]
    dataset = pytest.importorskip("datasets").Dataset.from_list(rows, on_mixed_types="use_json")
    dataset.to_parquet(tmp_path / "a.parquet")
    dataset.save_to_disk(tmp_path / "saved")
    for path in (tmp_path / "a.parquet", *(tmp_path / "saved").glob("*.arrow")):
        assert examples(path) == rows


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_damaged_column_file_is_one_sentence(tmp_path, kind) -> None:
    rows = [{"messages": CHAT, "id": i} for i in range(9)]
    whole = arrow(rows) if kind == "arrow" else parquet(rows, compression="none", use_dictionary=False)
    path, chosen, refused = tmp_path / f"a.{kind}", random.Random(0), 0
    for _ in range(40):
        damaged = bytearray(whole)
        place = chosen.randrange(len(whole))
        damaged[place] ^= 1 << chosen.randrange(8)
        path.write_bytes(damaged[: chosen.choice([place, None, None])])
        try:
            list(read_files([path], Reading(on_bad="skip")))
        except UserError as error:
            refused += 1
            assert str(error).startswith(str(path)) and "\n" not in str(error)
    assert refused > 15  # a flipped bit of a text may give another valid text


def test_on_bad_skip_leaves_out_and_names_examples(tmp_path) -> None:
    path = tmp_path / "a.jsonl"
    lines = b'{"text": "one"}', b"{", b'{"text": ""}', b"\xff", b'{"messages": []}', b'{"text": "two"}', b'{"txt": "a"}'
    path.write_bytes(b"\n".join([*lines, json_lines([{"messages": CHAT, "text": "a"}])]))
    noticed = Noticed(Reading(on_bad="skip"))
    examples_read = list(read_files([path], noticed.reading, noticed))
    assert examples_read == [(f"{path}, line 1", {"text": "one"}), (f"{path}, line 6", {"text": "two"})]
    assert noticed.counts == {"skipped": 6}
    first_five = ["2 is not val", "3: `text` mu", "4 is not UTF", "5: `messages", "7 has none o"]
    assert [problem.removeprefix(f"{path}, line ")[:12] for problem in noticed.bad] == first_five
    path.write_bytes(b"{\n{")
    with pytest.raises(UserError, match="contains no well-formed example; .*line 1 is not valid JSON"):
        list(read_files([path], noticed.reading, noticed))
    path.write_bytes(b'{\n{"text": "good"}')
    with pytest.raises(UserError, match="contains no well-formed example in its first 1 rows; .*line 1 is not valid"):
        list(read_files([path], Reading(on_bad="skip", max_samples=1)))
    texts = [write(tmp_path / "a.txt", b" \n"), write(tmp_path / "b.txt", b"two")]  # each file is one example
    noticed = Noticed(Reading(on_bad="skip"))
    assert list(read_files(texts, noticed.reading, noticed)) == [(str(texts[1]), {"text": "two"})]
    assert (noticed.counts, noticed.bad) == ({"skipped": 1}, [f"{texts[0]} contains no text"])


def test_rows_of_different_clear_forms_are_read(tmp_path) -> None:
    path = write(tmp_path / "a.jsonl", json_lines([{"text": "a", "id": 1}, {"messages": CHAT, "id": 2}]))
    assert examples(path) == [{"text": "a", "id": 1}, {"messages": CHAT, "id": 2}]
    assert described([path]) == [f"{path}: text and messages (text, messages); ignored: id"]
    alpaca = {"instruction": "Sum", "output": "3", "text": "Below is an instruction: Sum. Response: 3"}
    lost = alpaca | {"output": None}
    path = write(tmp_path / "b.jsonl", json_lines([alpaca, lost]))
    with pytest.raises(UserError, match="line 2 has the form text, but also instruction, and the file began with alp"):
        examples(path)
    assert [example["text"] for example in examples(path, format="text")] == [alpaca["text"]] * 2


def test_the_form_of_each_file_is_described(tmp_path) -> None:
    alpaca = {"instruction": "Sum", "output": "3", "text": "Below is an instruction ...", "id": 7}
    first = write(tmp_path / "a.jsonl", json_lines([{"broken": 1}, alpaca, alpaca | {"input": "1 2"}]))
    second = write(tmp_path / "b.json", json.dumps([alpaca | {"input": "x"}]).encode())
    chat = write(tmp_path / "c.parquet", parquet([{"messages": [m | {"date": "today"} for m in CHAT], "id": 1}]))
    form = "alpaca (instruction, output, input); ignored: text, id"
    assert described([first]) == [f"{first}: {form}"]
    of_chat = f"{chat}: messages (messages); ignored: id, messages.date"
    assert described([first, second, chat]) == [f"{first} and 1 more: {form}", of_chat]
    named = Reading(fields={"text": "output"})
    for reading in (Reading("text", {"text": "output"}), named):
        assert described([second], reading) == [f"{second}: text (output); ignored: instruction, text, id, input"]
    with pytest.raises(UserError, match="does not exist"):
        described([tmp_path / "none"])


def test_folders_and_globs_expand_in_order(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "artifacts").mkdir()  # without it, artifacts/none would be a dataset of the hub
    for name in ["b.jsonl", "a.csv.gz", "README.md", "sub/c.PARQUET", "sub/x.bin", ".hidden/d.jsonl", "[e].json"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "sub" / "up").symlink_to(tmp_path / "sub")
    files = [tmp_path / name for name in ("[e].json", "a.csv.gz", "b.jsonl", "sub/c.PARQUET")]
    assert expand([tmp_path]) == files
    assert left_out([tmp_path]) == [tmp_path / "README.md", tmp_path / "sub/x.bin"]
    assert expand([f"{tmp_path}/*.jsonl", tmp_path / "[e].json"]) == [files[2], files[0]]
    assert expand([f"{tmp_path}/s*"]) == expand([f"{tmp_path}/**/*.PARQUET"]) == [files[3]]
    check_paths_exist([tmp_path, f"{tmp_path}/*.jsonl", tmp_path / "[e].json"])
    for path, words in [
        (f"{tmp_path}/*.txt", r"\*.txt matches no file; data files are .jsonl, "),
        (tmp_path / "none", "none does not exist; data files are"),
        ("artifacts/none", "none does not exist; the first lines of a config name the commands"),
    ]:
        with pytest.raises(UserError, match=words):
            check_paths_exist([path])
        with pytest.raises(UserError, match=words):
            expand([path])
    (tmp_path / "sub" / "c.PARQUET").unlink()
    with pytest.raises(UserError, match="sub contains no data files"):
        expand([tmp_path / "sub"])


def test_path_that_is_no_file_is_refused(tmp_path) -> None:
    (tmp_path / "link.jsonl").symlink_to("nowhere")
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    os.mkfifo(tmp_path / "pipe.jsonl")
    for name, words in [
        ("", "is a directory; name the files in it instead"),
        ("link.jsonl", "link.jsonl is a broken symbolic link"),
        ("loop.jsonl", "loop.jsonl cannot be read: "),
        ("pipe.jsonl", "pipe.jsonl is not a regular file"),
        ("x" * 300, "cannot be read: File name too long"),
        ("a\0b", "cannot be read: embedded null"),
    ]:
        with pytest.raises(UserError, match=words):
            examples(tmp_path / name)
    with pytest.raises(UserError, match="link.jsonl is a broken symbolic link"):
        expand([tmp_path])


def save_dataset(folder: Path, parts: list[list[dict]], **state) -> Path:
    """Write a folder like `datasets.Dataset.save_to_disk`."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05}-of-{len(parts):05}.arrow" for i in range(len(parts))]
    for name, rows in zip(names, parts, strict=True):
        (folder / name).write_bytes(arrow(rows))
    (folder / "dataset_info.json").write_text("{}")
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]} | state))
    return folder


def test_a_saved_dataset_is_read(tmp_path) -> None:
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1}'}}]}
    rows = [{"messages": [*CHAT, call], "id": 1}, {"messages": CHAT, "id": 2}]
    folder = save_dataset(tmp_path / "all" / "train", [rows, rows[1:]])
    files = expand([folder])
    assert [file.name for file in files] == ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    function = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    call = {"role": "assistant", "content": None, "tool_calls": [function]}
    assert examples(files[0]) == [{"messages": [*CHAT, call]}, {"messages": CHAT}]
    assert described([files[0]]) == [f"{files[0]}: messages (messages); ignored: id"]
    assert expand([tmp_path]) == files  # a dataset below a folder
    (tmp_path / "all" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    for broken, words in [
        (tmp_path / "all", "all is a saved dataset of several splits; name the folder of one"),
        (save_dataset(tmp_path / "old", [rows], _indices_data_files=[{}]), "old was saved by an old version"),
        (save_dataset(tmp_path / "bad", [rows], _data_files=3), "state.json is damaged"),
    ]:
        with pytest.raises(UserError, match=words):
            expand([broken])


def test_folder_of_several_splits_is_refused(tmp_path) -> None:
    """The names of its files or its card tell the splits."""
    for names in (("train-00000.jsonl", "test-00000.jsonl"), ("train/a.jsonl", "dev/a.jsonl")):
        folder = tmp_path / names[0][:6]
        for name in names:
            (folder / name).parent.mkdir(exist_ok=True, parents=True)
            (folder / name).write_text('{"text": "a"}\n')
        with pytest.raises(
            UserError, match=rf"has training files and {names[1]}; name a split, {folder}:train, or the"
        ):
            expand([folder])
        assert len(expand([f"{folder}/**/*.jsonl"])) == 2
    card = tmp_path / "train-" / "README.md"
    (card.parent / "test-00000.jsonl").unlink()
    card.write_text("---\nconfigs:\n- data_files:\n  - split: test\n    path: a.jsonl\n---\n# D\n")
    with pytest.raises(
        UserError, match=f"a dataset with a card that names its files; name a split: {card.parent}:train"
    ):
        expand([card.parent])
    card.write_text("# D\n\n- split: by hand\n")
    assert expand([card.parent]) == [card.parent / "train-00000.jsonl"]


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "file.arrow"])
def test_column_file_is_closed_after_the_last_row(tmp_path, monkeypatch, name) -> None:
    content = parquet(ROWS) if name == "a.parquet" else arrow(ROWS, "file" if name == "file.arrow" else "stream")
    path, opened = write(tmp_path / name, content), list[io.BufferedReader]()
    monkeypatch.setattr("data.rows.open_raw", lambda path: opened.append(path.open("rb")) or opened[-1])
    assert "messages" in column_names(path) and opened.pop().closed
    for read in (list, next):  # all rows, or the first one
        assert read(rows := read_rows(path))
        del rows
        assert opened.pop().closed


@pytest.mark.parametrize("name", ["a.parquet", "a.txt.zst"])
def test_a_missing_library_gives_a_one_line_error(tmp_path, monkeypatch, name) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / name).write_bytes(b"data")
    with pytest.raises(UserError, match="requires pyarrow; pip install pyarrow"):
        list(read_files([tmp_path / name]))


@pytest.mark.parametrize(
    "name, content",
    [("a.csv", "text;id\none, two;1\n"), ("a.csv", "text\tid\none, two\t1\n"), ("a.tsv", "text;id\none, two;1\n")],
)
def test_the_separator_of_a_csv_file_is_recognised(tmp_path, name, content) -> None:
    path = write(tmp_path / name, content.encode())
    assert [example["text"] for example in examples(path)] == ["one, two"]
    path.write_bytes(content.encode() + b"short\n")
    with pytest.raises(UserError, match=f"a...v, line {content.count(chr(10)) + 1} has 1 cells, but the header has 2"):
        examples(path)


HOOKS = """
def as_text(row):
    if row["n"] is None:
        return None
    return {"text": row["title"] + "!"}

number = 3

def list_of(row):
    return [row]
"""


def test_row_function_makes_examples(tmp_path, monkeypatch) -> None:
    """The function gets all columns, with a null of any file as None. It may leave rows out. Its mistakes name their line and the row's."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "hooks_of_a_test.py").write_text(HOOKS)
    rows, hook = [{"title": f"t{n}", "n": n or None, "text": "not this"} for n in (1, 0, 3)], "hooks_of_a_test:as_text"
    for path in (write(tmp_path / "a.jsonl", json_lines(rows)), write(tmp_path / "a.parquet", parquet(rows))):
        assert examples(path, row=hook) == [{"text": "t1!"}, {"text": "t3!"}]
    assert described([path], Reading(row=hook)) == [f"{path}: text (text); made by data.row={hook}"]
    documents = load_documents((str(path),), tiny_tokenizer(), 64, "error", reading=Reading(row=hook))
    assert "\nLEFT OUT 1 rows by data.row" in documents.report
    bad = write(tmp_path / "b.jsonl", json_lines([rows[0], {"n": 1}]))
    for name, words in [
        (hook, r"b.jsonl, line 2: data.row=.* fails: KeyError: 'title' \(.*hooks_of_a_test.py, line 5\)$"),
        ("hooks_of_a_test:list_of", "b.jsonl, line 1: data.row=.* returns list; it gets a row as a dictionary"),
        ("hooks_of_a_test:none", "hooks_of_a_test.py has no function none"),
        ("hooks_of_a_test:number", "hooks_of_a_test.py has no function number"),
        ("no_such_module:f", "data.row=no_such_module:f: module no_such_module is not found; put it beside train.py"),
    ]:
        with pytest.raises(UserError, match=words):
            examples(bad, row=name)


def test_max_samples_counts_rows_over_all_files(tmp_path) -> None:
    for number, texts in enumerate(["ab", "cd", "ef"]):
        write(tmp_path / f"{number}.jsonl", json_lines([{"text": text} for text in texts]))
    files = expand([tmp_path])
    files[2] = files[2].rename(tmp_path / "2.parquet")
    files[2].write_bytes(b"nobody gets here")
    for most in (1, 2, 3, 4):
        pairs = read_files(files, Reading(max_samples=most))
        assert "".join(example["text"] for _, example in pairs) == "abcd"[:most]
    documents = load_documents((str(tmp_path),), tiny_tokenizer(), 64, "error", reading=Reading(max_samples=1))
    assert len(documents) == 1 and documents.report.startswith("1 example from 1 file, ")
    assert f"\n{files[0]}: text (text)" in documents.report


def test_single_text_of_paragraphs_is_noted(tmp_path) -> None:
    book, page = (
        write(tmp_path / name, text) for name, text in (("b.txt", b"One.\n\nTwo.\n\nThree.\n\n"), ("p.txt", b"A\nB"))
    )
    line = f'{book}: its 3 paragraphs are one document; to have many, write each as a line {{"text": "..."}} of a .jsonl file'
    assert described([book])[0] == f"{book}: text (text)" and described([book])[1].startswith(line)
    assert described([page]) == [f"{page}: text (text)"]
    assert described([book, page]) == [f"{book} and 1 more: text (text)"]
