"""Remote sources: fetched once into data.cache, cut by data.max_samples, and one sentence if a fetch fails."""

import gzip
import json
from pathlib import Path

import fsspec
import pytest

from common.errors import UserError
from configs.load import load_config
from data.files import Reading, check_paths_exist, expand, is_elsewhere
from data.formats import read_files
from data.remote import fetch, with_local_files
from data.token_store import build_and_describe, verify_store
from tests.in_memory import json_lines, parquet
from tests.tiny import SENTENCES, tiny_tokenizer

CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}
OTHER = {"role": "assistant", "tool_calls": [{"function": {"name": "g", "arguments": {"y": [2], "z": None}}}]}
ROWS = [{"messages": [{"role": "user", "content": "?"}, answer], "id": i} for i, answer in enumerate([CALL, OTHER] * 3)]


MAKE = {
    "jsonl": json_lines,
    "jsonl.gz": lambda rows: gzip.compress(json_lines(rows)),
    "json": lambda rows: json.dumps(rows).encode(),
    "parquet": parquet,
}


@pytest.fixture
def memory():
    """Write {name: bytes} into fsspec's file system in memory, which is emptied afterwards."""
    system = fsspec.filesystem("memory")
    yield lambda files: [system.pipe_file(f"/{name}", content) for name, content in files.items()]
    system.store.clear()


def read(files: list[str], **reading) -> list[dict]:
    return [example for _, example in read_files(files, Reading(**reading))]


def fetched(path: str, cache: Path | None, most: int | None = None) -> list[str]:
    return fetch(path, str(cache) if cache else None, most, lambda text: None)


def calls(examples: list[dict]) -> list[dict]:
    return [example["messages"][1]["tool_calls"][0]["function"] for example in examples]


def dataset_folder(folder: Path, card: str = "") -> Path:
    """Write a folder as on the hub: shards of two splits, and a card."""
    (folder / "data").mkdir(parents=True)
    for name, rows in [("train-00000-of-00002", ROWS[:4]), ("train-00001-of-00002", ROWS[4:]), ("test-0", ROWS[:1])]:
        (folder / "data" / f"{name}.jsonl").write_bytes(json_lines(rows))
    (folder / "README.md").write_text(card)
    return folder


def test_remote_sources_are_told_from_paths(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "there").mkdir(parents=True)
    (tmp_path / "here" / "a:b").touch()
    names = ["org/name", "org/name:train", "org/na.me@main:config:train", "here:train"]
    elsewhere = [*names, "s3://b/a.jsonl", "hf://datasets/o/n"]
    here = ["here", "here/there", "here/a:b", "here/typo", "here/typo.jsonl"]
    paths = [*here, "org/name.jsonl.gz", "a.jsonl", "o/n/*.json", "o/n/m"]
    assert [path for path in (*elsewhere, *paths) if is_elsewhere(path)] == elsewhere
    check_paths_exist(elsewhere)
    for path, words in [("x" * 300, "File name too long"), ("a\0b", "embedded null")]:
        with pytest.raises(UserError, match=f"cannot be read: {words}"):
            check_paths_exist([path])
    with pytest.raises(UserError, match="here/typo does not exist; data files are"):
        check_paths_exist(["here/typo"])
    with pytest.raises(UserError, match="org/name is not on this machine; only data.train, "):
        expand(["org/name"])


@pytest.mark.parametrize("kind", MAKE)
def test_source_is_fetched_once_and_read_locally(tmp_path, memory, kind) -> None:
    """Tool calls in remote JSON have only their own arguments. Later changes of the remote file have no effect."""
    memory({f"b/a.{kind}": MAKE[kind](ROWS)})
    lines = []
    files = fetch(f"memory://b/a.{kind}", str(tmp_path), None, lines.append)
    assert files == [str(next(tmp_path.glob(f"fetched/*/a.{kind}")))]
    expected = [{"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": {"y": [2], "z": None}}]
    if kind == "parquet":  # a column cannot tell null from absent
        expected[1]["arguments"].pop("z")
    assert calls(read(files)) == expected * 3
    memory({f"b/a.{kind}": b"changed"})
    assert (
        fetch(f"memory://b/a.{kind}", str(tmp_path), None, lines.append) == files and calls(read(files)) == expected * 3
    )
    assert lines[0] == f"memory://b/a.{kind}: 1 file, is fetched"
    assert lines[1] == lines[2] and lines[1].startswith(f"memory://b/a.{kind}: 1 file, 0.0 MiB, fetched on ")
    record = json.loads(Path(files[0]).with_name("source.json").read_text())
    assert record["urls"] == [f"memory://b/a.{kind}"] and record["files"][0]["size"] == Path(files[0]).stat().st_size


def test_remote_folders_and_globs_are_sorted(tmp_path, memory) -> None:
    memory({"b/x/1.jsonl": json_lines(ROWS[:1]), "b/x/2.parquet": parquet(ROWS[1:2])})
    memory({"b/a.jsonl": json_lines(ROWS[2:3]), "b/README.md": b"#"})
    for path, ids in [("memory://b", [2, 0, 1]), ("memory://b/x/*.jsonl", [0]), ("memory://b/**/*.parquet", [1])]:
        files = fetched(path, tmp_path)
        rows = [row for file in files for row in read([file], row=f"{__name__}:only_the_id")]
        assert [row["text"] for row in rows] == [f"id {i}" for i in ids]
    with pytest.raises(UserError, match=r"memory://b/\*.csv contains no data files; data files are .jsonl"):
        fetched("memory://b/*.csv", tmp_path)


def only_the_id(row: dict) -> dict:
    return {"text": f"id {row['id']}"}


@pytest.mark.parametrize("kind", ["jsonl.gz", "parquet"])
def test_only_max_samples_of_a_stream_are_read(tmp_path, memory, monkeypatch, kind) -> None:
    make = MAKE[kind]
    memory({f"b/0.{kind}": make(ROWS[:2]), f"b/1.{kind}": make(ROWS[2:]), f"b/2.{kind}": b"nobody gets here"})
    lines = []
    files = fetch("memory://b", str(tmp_path), 3, lines.append)
    assert [json.loads(line)["id"] for line in Path(files[0]).read_text().splitlines()] == [0, 1, 2]
    assert calls(read(files))[0] == {"name": "f", "arguments": {"x": 1}}
    assert lines[0].startswith("memory://b: the first 3 rows, ")
    fsspec.filesystem("memory").store.clear()  # a resumed run reads the fetched files
    assert fetch("memory://b", str(tmp_path), 3, lines.append) == files


def test_bytes_are_no_text_in_a_stream_either(tmp_path, memory) -> None:
    memory({"bytes.parquet": parquet([{"text": b"picture", "id": 1}])})
    with pytest.raises(UserError, match="has none of the forms"):
        read(fetched("memory://bytes.parquet", tmp_path, most=1))


def test_split_of_folder_is_found_by_datasets(tmp_path) -> None:
    pytest.importorskip("datasets")
    card = "---\nconfigs:\n- config_name: one\n  data_files:\n  - split: train\n    path: data/train*\n---\n"
    folder = dataset_folder(tmp_path / "set", card)
    files = fetched(f"{folder}:train", None)
    assert [Path(file).name for file in files] == ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"]
    assert [f["arguments"] for f in calls(read(files))] == [{"x": 1}, {"y": [2], "z": None}] * 3
    assert fetched(f"{folder}:one:train", None) == files
    with pytest.raises(UserError, match=f"{folder}:dev has the splits train; name one: {folder}:SPLIT"):
        fetched(f"{folder}:dev", None)
    with pytest.raises(UserError, match="set is a dataset with a card that names its files; name a split: .*set:train"):
        expand([folder])
    assert len(expand([f"{folder}/*/*"])) == 3


@pytest.mark.parametrize(
    "path, words",
    [
        ("memory://none.jsonl", "memory://none.jsonl does not exist|is not found elsewhere"),
        ("nowhere://a.jsonl", "nowhere://a.jsonl cannot be read: Protocol not known: nowhere"),
        ("memory://bad.parquet", "bad.parquet is damaged or not a parquet file"),
    ],
)
def test_failed_fetch_is_one_sentence(tmp_path, memory, path, words) -> None:
    memory({"bad.parquet": b"hello"})
    with pytest.raises(UserError, match=words) as error:
        fetched(path, tmp_path, 3)
    assert "\n" not in str(error.value) and not list(tmp_path.glob("fetched/*/source.json"))
    with pytest.raises(UserError, match="data.cache must not be None"):
        fetched(path, None)


def test_unreachable_source_is_one_sentence(tmp_path, monkeypatch) -> None:
    datasets = pytest.importorskip("datasets")

    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'org/name' on the Hub\n(LocalEntryNotFoundError)")

    monkeypatch.setattr(datasets, "load_dataset_builder", unreachable)
    with pytest.raises(
        UserError, match=r"^org/name:train cannot be reached from this machine: Couldn't reach 'org/name' on"
    ):
        fetched("org/name:train", tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(UserError, match="requires datasets; pip install datasets"):
        fetched("hf://datasets/org/name", tmp_path)


def test_damage_of_fetched_files_is_found(tmp_path, memory) -> None:
    memory({"a.jsonl": json_lines(ROWS)})
    (file,) = fetched("memory://a.jsonl", tmp_path)
    Path(file).write_bytes(json_lines(ROWS)[:-9])
    with pytest.raises(
        UserError, match=f"{Path(file).parent}, which has what was fetched of memory://a.jsonl, is damaged"
    ):
        fetched("memory://a.jsonl", tmp_path)


def test_all_sources_of_a_config_become_local(tmp_path, memory) -> None:
    memory({f"{name}.jsonl": json_lines(ROWS) for name in ("train", "held", "mix", "old")})
    settings = ["train=memory://train.jsonl", "validation=memory://held.jsonl", "max_samples=2", f"cache={tmp_path}"]
    settings.append("mix=general:0.1:memory://mix.jsonl:memory://old.jsonl")
    config = load_config("configs/quickstart.py", [f"data.{setting}" for setting in settings])
    data = with_local_files(config, lambda text: None).data
    (general,) = data.mix
    files = data.train, data.validation, general.paths, general.validation
    assert [len(read([*paths])) for paths in files] == [2, 6, 6, 6] and Path(general.validation[0]).name == "old.jsonl"


def test_token_store_takes_all_paths_of_data_train(tmp_path, memory) -> None:
    """Build from a URL, its first rows, a split of a folder, and a folder of files."""
    memory({"texts.jsonl": json_lines([{"text": text} for text in SENTENCES]), "chats.jsonl": json_lines(ROWS)})
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "set").mkdir()
    for split in ("train", "test"):
        (tmp_path / "set" / f"{split}.jsonl").write_bytes(json_lines([{"text": split}]))

    def documents(path: str, most: int | None = None) -> int:
        path, out = path if "://" in path else f"{tmp_path}/{path}", tmp_path / str(len([*tmp_path.iterdir()]))
        sentence = build_and_describe([path], str(tmp_path / "model"), out, 10**6, str(tmp_path / "cache"), most)
        assert sentence.startswith(f"{out}: ")
        return verify_store(out).num_documents

    assert [documents("memory://texts.jsonl"), documents("memory://texts.jsonl", 2)] == [len(SENTENCES), 2]
    assert [documents("set:test"), documents("set/*"), documents("set/*", 1)] == [1, 2, 1]
    with pytest.raises(UserError, match="chats.jsonl, line 1 has no `text`, and a token store takes only documents"):
        documents("memory://chats.jsonl")
    memory({"weighed.jsonl": json_lines([{"text": "a", "weight": 1}, {"text": "b", "weight": 0.5}])})
    with pytest.raises(UserError, match="weighed.jsonl, line 2 has a `weight`, and a token store takes only documents"):
        documents("memory://weighed.jsonl")
