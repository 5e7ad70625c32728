"""Bring sources that lie elsewhere onto this machine: URLs that fsspec knows, and datasets of the hub by `datasets`.

A source is fetched once into `data.cache`, into a directory of its own with a record of what was fetched, and read from
there by all later starts: what is elsewhere may change, and a resumed run must see the same bytes. With data.max_samples
only so many rows are read, one after another, which is how a stream is trained on. Their number is set and does not follow
from optimizer.max_steps: a step takes its rows from a random order of all of them, so that more rows in a resumed run would
be other rows in every step. Imported for a run that names such a source only.
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
from common.node_lock import node_lock
from configs.config import Config
from data.files import DATASET_NAME, KINDS, SUFFIXES, data_suffix, expand, is_elsewhere
from data.rows import read_rows

RECORD, ROWS = "source.json", "rows.jsonl"
FETCHED = "fetched"  # the directory in data.cache
FIRST_ROWS = "data.max_samples, or max_samples of a Source, reads the first rows only of what is trained on"
CHARACTERS = 300  # of the reason in a message
Say = Callable[[str], None]


def with_local_files(config: Config, say: Say) -> Config:
    """The config with the files on this machine in place of sources that lie elsewhere. `say` gets a line for each.

    Raises UserError for a source that cannot be reached or read.
    """
    data, ewc = config.data, config.ewc

    def local(paths: Sequence[str], most: int | None = None) -> tuple[str, ...]:
        return local_paths(paths, data.cache, most, say)

    mix = tuple(
        replace(source, paths=local(source.paths, source.max_samples), validation=local(source.validation))
        for source in data.mix
    )
    train = local(data.train, data.max_samples)
    data = replace(data, train=train, validation=local(data.validation), mix=mix)
    return replace(config, data=data, ewc=replace(ewc, data=local(ewc.data)) if ewc.strength else ewc)


def local_paths(paths: Sequence[str], cache: str | None, most: int | None, say: Say) -> tuple[str, ...]:
    """The paths, with the files on this machine in place of those that lie elsewhere. Arguments are those of `fetch`."""
    return tuple(file for path in paths for file in (fetch(path, cache, most, say) if is_elsewhere(path) else [path]))


def fetch(path: str, cache: str | None, most: int | None, say: Say) -> list[str]:
    """The files of a source as paths of this machine, in order.

    cache: data.cache. most: rows to read; None: all files as they are. The processes of a node share the directory: one
    fetches, the others wait. Raises UserError.
    """
    named = DATASET_NAME.fullmatch(path)
    if named and os.path.isdir(named["name"]) and "://" not in path:
        return [str(file) for file in expand(_files_of_dataset(path, named, say))]  # they are here already
    if cache is None:
        raise UserError(
            f"{path} is fetched into data.cache, where a resumed run finds it again; data.cache must not be None"
        )
    folder = fetched_into(path, cache, most)
    directory = folder.parent
    directory.mkdir(parents=True, exist_ok=True)
    waiting = f"waiting for another process of this node, which fetches {path}"
    with node_lock(directory, folder.name[-8:], lambda: say(waiting)):
        if not (folder / RECORD).is_file():
            with new_directory(folder) as temporary:
                _fetch(path, temporary, most, say)
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        files = [folder / file["name"] for file in record["files"]]
        whole = all(path.stat().st_size == file["size"] for path, file in zip(files, record["files"], strict=True))
    except (OSError, ValueError, KeyError, TypeError):
        files, record, whole = [], {}, False
    if not whole:
        raise UserError(f"{folder}, which has what was fetched of {path}, is damaged; remove it to fetch it again")
    size = sum(file["size"] for file in record["files"]) / 2**20
    rows = f"the first {record['rows']:,} rows" if most else _files(files)
    say(f"{path}: {rows}, {size:,.1f} MiB, fetched on {record['date']} into {folder}; remove it to fetch them again")
    return list(map(str, files))


def fetched_into(path: str, cache: str, most: int | None) -> Path:
    """The directory that has what is fetched of a source. Arguments are those of `fetch`."""
    key = hashlib.sha256(json.dumps([path, most]).encode()).hexdigest()
    name = re.sub(r"[^\w.-]+", "-", path.partition("?")[0]).strip("-.")[-60:]
    return Path(cache, FETCHED, f"{name}-{key[:8]}")


def _fetch(path: str, folder: Path, most: int | None, say: Say) -> None:
    """Fill `folder` with the files of a source, or with its first rows, and with the record of them."""
    urls, names, count = _urls(path, say), [], 0
    with _reached(path):
        if most:
            names.append(ROWS)
            with (folder / ROWS).open("w", encoding="utf-8") as file:
                for _, row in itertools.islice(itertools.chain.from_iterable(map(read_rows, urls)), most):
                    # A row that cannot be read stays one: the reader finds the sentence in its place.
                    row = str(row) if isinstance(row, UserError) else row
                    # Bytes are no text, and may be a picture; what else JSON does not have, such as a date, becomes one.
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
    """The URLs of the files of a source."""
    scheme, _, rest = path.rpartition("://")
    named = DATASET_NAME.fullmatch(rest.removeprefix("datasets/"))
    if not scheme or (scheme == "hf" and named and named["name"].count("/") == 1):
        assert named is not None, "data/files.py has checked it"
        return _files_of_dataset(path, named, say)
    with _reached(path):
        system, inside = fsspec.url_to_fs(path)
        is_web = scheme in ("http", "https")  # where a ? is no pattern, and a folder no list
        if is_web or not re.search(r"[*?[]", inside):
            found = system.find(inside) if not is_web and system.isdir(inside) else [inside]
            is_one = found == [inside]
        else:
            found, is_one = [file for file in system.glob(inside) if not system.isdir(file)], False
        urls = [path] if is_one else [system.unstrip_protocol(file) for file in sorted(found)]
        if is_one and not system.exists(inside):
            raise UserError(f"{path} does not exist")
    urls = urls if is_one else [url for url in urls if data_suffix(url) in SUFFIXES]
    if not urls:
        raise UserError(f"{path} contains no data files; {KINDS}")
    return urls


def _files_of_dataset(path: str, named: re.Match, say: Say) -> list[str]:
    """The files of one split of a dataset of the hub, or of a folder that looks like one, as `datasets` finds them."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{path}: reading it requires datasets; pip install datasets") from error
    with _reached(path):
        builder = datasets.load_dataset_builder(named["name"], named["config"], revision=named["revision"])
        found = {str(split): list(map(str, files)) for split, files in (builder.config.data_files or {}).items()}
    split = named["split"] or ("train" if "train" in found else next(iter(found)) if len(found) == 1 else None)
    if split not in found:
        raise UserError(f"{path} has the splits {', '.join(found) or 'none'}; name one: {named['name']}:SPLIT")
    if named["split"] is None and len(found) > 1:
        say(f"{path} has the splits {', '.join(found)}: {split} is read; {named['name']}:SPLIT names another one")
    if other := [file for file in found[split] if data_suffix(file) not in SUFFIXES]:
        raise UserError(f"{path} has files of another kind, such as {other[0]}; {KINDS}")
    return found[split]


@contextmanager
def _reached(path: str) -> Iterator[None]:
    """Turn whatever a library raises that reads from elsewhere into a UserError. Only what reads belongs inside."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        said = " ".join(str(error).split())[:CHARACTERS] or type(error).__name__
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
        what = next(words for kind, words in kinds.items() if isinstance(error, kind))
        raise UserError(f"{path} {what}: {said}") from error
