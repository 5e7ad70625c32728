"""Build a token store: texts without spans, which training reads as windows (data/sources.py)."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from common.durable_files import temporary_path
from common.errors import UserError
from common.sha256 import sha256_of_all
from data.encoding import ExampleEncoder
from data.files import Reading, check_paths_exist, expand
from data.formats import Noticed
from data.node_lock import LOCK_FILE, node_lock
from data.remote import local_paths
from data.store import REBUILD, SHARD_TOKENS, STORE_FILE, Damaged, Store, StoreWriter, is_store, open_store, read_info
from data.tokenise import Placed, description, encoded, read_placed, with_bar, write
from data.tokens import load_tokenizer

LOCK = "0" * 32  # key of the lock on a token store that is being built (data/node_lock.py)


def build_and_describe(
    paths: Sequence[str], model: str, out: Path, shard_tokens: int, cache: str, max_samples: int | None
) -> str:
    """Build a token store with the tokenizer of a model. Return a sentence about it.

    paths, cache, max_samples: like data.train, data.cache and data.max_samples. Raise UserError.
    """
    check_paths_exist(paths)
    files = expand(local_paths(paths, cache, max_samples, lambda line: print(line, flush=True)))
    store = build_store(files, load_tokenizer(model), out, shard_tokens, max_samples=max_samples)
    return (
        f"{out}: {store.num_tokens:,} tokens of {store.num_documents:,} documents in {len(store.shards)} shards, "
        f"{'uint16' if store.info['dtype'] == '<u2' else 'uint32'}, tokenizer {store.info['tokenizer'][:12]}"
    )


def build_store(
    files: list[Path],
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    shard_tokens: int = SHARD_TOKENS,
    max_samples: int | None = None,
) -> Store:
    """Build a token store of the texts of `files` in the directory `out`, or finish an interrupted build there.

    If another process is building it, wait. Raise UserError for a bad file, and if `out` contains other files.
    """
    encoder = ExampleEncoder(tokenizer)
    digests = sha256_of_all(files)
    sources = [{"path": str(path), "bytes": path.stat().st_size, "sha256": digests[path]} for path in files]
    info = description(encoder) | {"files": sources, "max_samples": max_samples}
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; choose another directory")
    out.mkdir(parents=True, exist_ok=True)
    in_progress = {LOCK_FILE, temporary_path(out / STORE_FILE).name}  # another process may be creating the store
    if not {path.name for path in out.iterdir()} <= in_progress and not is_store(out):
        raise UserError(f"{out} contains other files; choose another directory")
    with node_lock(out, LOCK, lambda: print(f"waiting for another process, which is building {out}", flush=True)):
        if is_store(out):
            existing, expected = read_info(out), info | {"shard_tokens": shard_tokens}
            if differ := [key for key in expected if existing.get(key) != expected[key]]:
                raise UserError(
                    f"the store in {out} differs from what this command makes in its {', '.join(differ)}; remove that directory "
                    "or choose another one"
                )
            if existing["complete"]:
                return open_store(out)
        noticed = Noticed(Reading(max_samples=max_samples))
        with StoreWriter(out, info, shard_tokens) as writer:
            write(encoded(_texts(files, writer.next, noticed), encoder, files), writer, noticed, with_spans=False)
            return writer.finish({})


def _texts(files: list[Path], after: tuple[int, int], noticed: Noticed) -> Iterator[Placed]:
    """Yield the texts of all files in order, from example `after` = (file, example) on. Raise UserError for a chat or a weight."""
    first = 0 if noticed.reading.max_samples else after[0]
    for placed in with_bar(read_placed(files, noticed, first), ""):
        if "text" not in placed.example or "weight" in placed.example:
            problem = "a `weight`" if "text" in placed.example else "no `text`"
            raise UserError(
                f"{placed.where} has {problem}, and a token store takes only documents; put such files into data.train directly"
            )
        if (placed.file, placed.number) >= after:  # earlier texts are read again but not tokenised again
            yield placed


def verify_store(path: Path) -> Store:
    """Read and check every byte of a store. Raise UserError at the first damage."""
    if not is_store(path):
        raise UserError(f"{path} has no {STORE_FILE}: it is not a token store")
    store = open_store(path)
    for shard, entry in zip(store.shards, store.info["shards"], strict=True):
        shard.verify()
        if shard.digest() != entry["digest"]:
            raise Damaged(f"{shard.path} is not the file that was written; {REBUILD}")
    return store
