"""Fetch remote sources to this machine: URLs that fsspec knows, and datasets of the hub through `datasets`.

A source is fetched once, into its own directory in `data.cache` with a record of its files. All later starts read from there:
the remote data may change, and a resumed run must see the same bytes. With data.max_samples only the first rows are read, one
after another, which is how to train on a stream. Their number is fixed and not derived from optimizer.max_steps: a step takes
its rows from a random order of all rows, so a resumed run with more rows would have different rows in every step. Only a run
with such a source imports this module.
"""

import hashlib
import itertools
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote

import fsspec

from common.durable_files import new_directory, write_json
from common.errors import DISK_FULL, UserError
from configs.config import Config
from data.files import DATASET_NAME, KINDS, SUFFIXES, data_suffix, expand, is_elsewhere
from data.node_lock import node_lock
from data.rows import read_rows

RECORD, ROWS = "source.json", "rows.jsonl"
FETCHED = "fetched"  # the directory in data.cache
FIRST_ROWS = "data.max_samples, or max_samples of a Source, reads the first rows only of what is trained on"
CHARACTERS = 300  # maximum length of a library's reason in a message
Say = Callable[[str], None]


def with_local_files(config: Config, say: Say) -> Config:
    """Return the config with local files in place of remote sources. `say` gets a line for each source.

    Raise UserError for a source that cannot be reached or read.
    """
    data, ewc = config.data, config.ewc

    def local(paths: Sequence[str], max_rows: int | None = None) -> tuple[str, ...]:
        return local_paths(paths, data.cache, max_rows, say)

    mix = tuple(
        replace(source, paths=local(source.paths, source.max_samples), validation=local(source.validation))
        for source in data.mix
    )
    train = local(data.train, data.max_samples)
    data = replace(data, train=train, validation=local(data.validation), mix=mix)
    return replace(config, data=data, ewc=replace(ewc, data=local(ewc.data)) if ewc.strength else ewc)


def local_paths(paths: Sequence[str], cache: str | None, max_rows: int | None, say: Say) -> tuple[str, ...]:
    """Return the paths, with local files in place of remote ones. Arguments as for `fetch`."""
    return tuple(
        file for path in paths for file in (fetch(path, cache, max_rows, say) if is_elsewhere(path) else [path])
    )


def fetch(path: str, cache: str | None, max_rows: int | None, say: Say) -> list[str]:
    """Return the files of a source as local paths, in order.

    cache: data.cache. max_rows: number of rows to read; None: all files as they are. The processes of a node share the
    directory: one fetches, the others wait. Raise UserError.
    """
    match = DATASET_NAME.fullmatch(path)
    if match and os.path.isdir(match["name"]) and "://" not in path:
        return [str(file) for file in expand(_files_of_dataset(path, match, say))]  # a local folder: nothing to fetch
    if cache is None:
        raise UserError(
            f"{path} is fetched into data.cache, where a resumed run finds it again; data.cache must not be None"
        )
    folder = fetched_into(path, cache, max_rows)
    directory = folder.parent
    directory.mkdir(parents=True, exist_ok=True)
    waiting = f"waiting for another process of this node, which fetches {path}"
    with node_lock(directory, folder.name[-8:], lambda: say(waiting)):
        if not (folder / RECORD).is_file():
            with new_directory(folder) as temporary:
                _fetch(path, temporary, max_rows, say)
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        files = [folder / file["name"] for file in record["files"]]
        whole = all(path.stat().st_size == file["size"] for path, file in zip(files, record["files"], strict=True))
    except (OSError, ValueError, KeyError, TypeError):
        files, record, whole = [], {}, False
    if not whole:
        raise UserError(f"{folder}, which has what was fetched of {path}, is damaged; remove it to fetch it again")
    size = sum(file["size"] for file in record["files"]) / 2**20
    rows = f"the first {record['rows']:,} rows" if max_rows else _files(files)
    say(f"{path}: {rows}, {size:,.1f} MiB, fetched on {record['date']} into {folder}; remove it to fetch them again")
    return list(map(str, files))


def fetched_into(path: str, cache: str, max_rows: int | None) -> Path:
    """Return the directory for the fetched files of a source. Arguments as for `fetch`."""
    key = hashlib.sha256(json.dumps([path, max_rows]).encode()).hexdigest()
    name = re.sub(r"[^\w.-]+", "-", path.partition("?")[0]).strip("-.")[-60:]
    return Path(cache, FETCHED, f"{name}-{key[:8]}")


def _fetch(path: str, folder: Path, max_rows: int | None, say: Say) -> None:
    """Fill `folder` with the files of a source, or with its first rows, and a record of them."""
    urls, names, count = _urls(path, say), [], 0
    with _reached(path):
        if max_rows:
            names.append(ROWS)
            with (folder / ROWS).open("w", encoding="utf-8") as file:
                for _, row in itertools.islice(itertools.chain.from_iterable(map(read_rows, urls)), max_rows):
                    # Keep an unreadable row as its error message, so that the reader reports it with its place.
                    row = str(row) if isinstance(row, UserError) else row
                    # Bytes are not text and may be a picture: write null. Other types that JSON lacks, such as dates, become text.
                    text = json.dumps(row, default=lambda value: None if isinstance(value, bytes) else str(value))
                    file.write(text + "\n")
                    count += 1
        else:
            say(f"{path}: {_files(urls)}, {'are' if len(urls) > 1 else 'is'} fetched")
            for number, url in enumerate(urls):
                name = unquote(url.partition("?")[0]).rpartition("/")[2]
                names.append(name if len(urls) == 1 else f"{number:05}-{name}")
                system, inside = fsspec.url_to_fs(url)
                system.get_file(inside, str(folder / names[-1]))
    files = [{"name": name, "size": (folder / name).stat().st_size} for name in names]
    record = {"source": path, "urls": urls, "date": time.strftime("%Y-%m-%d"), "rows": count, "files": files}
    write_json(folder / RECORD, record)


def _files(files: Sequence) -> str:
    return f"{len(files)} file{'s' if len(files) > 1 else ''}"


def _urls(path: str, say: Say) -> list[str]:
    """Return the URLs of a source's files."""
    scheme, _, rest = path.rpartition("://")
    match = DATASET_NAME.fullmatch(rest.removeprefix("datasets/"))
    if not scheme or (scheme == "hf" and match and match["name"].count("/") == 1):
        assert match is not None, "data/files.py has checked it"
        return _files_of_dataset(path, match, say)
    with _reached(path):
        system, inside = fsspec.url_to_fs(path)
        is_web = scheme in ("http", "https")  # there ? begins the query, and folders cannot be listed
        if is_web or not re.search(r"[*?[]", inside):
            names = system.find(inside) if not is_web and system.isdir(inside) else [inside]
            is_single_file = names == [inside]
        else:
            names, is_single_file = [file for file in system.glob(inside) if not system.isdir(file)], False
        urls = [path] if is_single_file else [system.unstrip_protocol(file) for file in sorted(names)]
        if is_single_file and not system.exists(inside):
            raise UserError(f"{path} does not exist")
    urls = urls if is_single_file else [url for url in urls if data_suffix(url) in SUFFIXES]
    if not urls:
        raise UserError(f"{path} contains no data files; {KINDS}")
    return urls


def _files_of_dataset(path: str, match: re.Match, say: Say) -> list[str]:
    """Return the files of one split of a hub dataset, or of a folder laid out like one, as `datasets` finds them."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{path}: reading it requires datasets; pip install datasets") from error
    with _reached(path):
        builder = datasets.load_dataset_builder(match["name"], match["config"], revision=match["revision"])
        splits = {str(split): list(map(str, files)) for split, files in (builder.config.data_files or {}).items()}
    split = match["split"] or ("train" if "train" in splits else next(iter(splits)) if len(splits) == 1 else None)
    if split not in splits:
        raise UserError(f"{path} has the splits {', '.join(splits) or 'none'}; name one: {match['name']}:SPLIT")
    if match["split"] is None and len(splits) > 1:
        say(f"{path} has the splits {', '.join(splits)}: {split} is read; {match['name']}:SPLIT names another one")
    if unknown := [file for file in splits[split] if data_suffix(file) not in SUFFIXES]:
        raise UserError(f"{path} has files of another kind, such as {unknown[0]}; {KINDS}")
    return splits[split]


@contextmanager
def _reached(path: str) -> Iterator[None]:
    """Turn any exception of a library that reads remote data into a UserError. Put nothing but such reads inside."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:CHARACTERS] or type(error).__name__
        if getattr(error, "errno", None) in DISK_FULL:
            raise UserError(
                f"{path} does not fit on the disk of data.cache; free some space there; {FIRST_ROWS}"
            ) from error
        kinds = {
            ImportError: "needs a package that is not installed",
            FileNotFoundError: "is not on this machine and is not found elsewhere",
            ValueError: "cannot be read",
            Exception: "cannot be reached from this machine",
        }
        problem = next(words for kind, words in kinds.items() if isinstance(error, kind))
        raise UserError(f"{path} {problem}: {reason}") from error
