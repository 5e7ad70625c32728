"""The Hugging Face hub: what a model has there, the files to download, and what the hub's refusals mean in one sentence.

Which exception stands for what follows huggingface_hub/utils/_http.py (`hf_raise_for_status`). Without a token the hub
answers 401 for a model that does not exist as well as for a private one. For a wrong or expired token it answers 401 even
if the model is public.
"""

import errno
import fnmatch
import glob
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

from common.errors import UserError
from model.weight_files import INDEX, SINGLE

HUB_TIMEOUT = 5.0  # seconds after which the hub counts as unreachable
# Besides the weights. Only files in the root of the repository are fetched.
SMALL_FILES = ["config.json", "generation_config.json", "tokenizer*", "vocab.json", "merges.txt", "LICENSE*", "NOTICE*"]
SMALL_FILES += ["special_tokens_map.json", "added_tokens.json", "chat_template*", "USE_POLICY*"]
SMALL_FILES += ["README.md"]  # names the licence, which the card of an export states
OTHER_VOCABULARIES = ["tekken.json", "vocab.txt", "*.model", "*.tiktoken"]  # needed where there is no tokenizer.json
LARGE = 100 * 2**20  # bytes; larger files that are left out are named
LOG_IN = "log in with `hf auth login` or set HF_TOKEN"


class HubUnreachable(Exception):
    """The hub did not answer, or something on the way to it did. The message is the reason, a part of a sentence."""


def hub_info(model_id: str):  # noqa: ANN201 (huggingface_hub is imported late)
    """The hub's listing of the model.

    Raises HubUnreachable if the hub cannot be reached, and UserError if it can but does not give the model.
    """
    from huggingface_hub import HfApi

    try:
        return HfApi().model_info(model_id, timeout=HUB_TIMEOUT, files_metadata=True)
    except Exception as error:  # every HTTP client has its own exception classes
        raise explain(error, model_id) from error


def fetch_from_hub(info, model_id: str, directory: Path) -> str:  # noqa: ANN001 (huggingface_hub is imported late)
    """Download weights, config and tokenizer, verify them against the hub's hashes, and return the commit.

    `directory` may hold files of an interrupted download, which continues. Raises UserError.
    """
    siblings = {sibling.rfilename: sibling for sibling in info.siblings}
    index = None
    if INDEX in siblings:
        _download(model_id, info.sha, directory, [INDEX])
        index = (directory / INDEX).read_text(encoding="utf-8")
    names = files_to_fetch(list(siblings), index, model_id)
    sizes = {name: getattr(sibling, "size", None) or 0 for name, sibling in siblings.items()}
    print(f"{model_id}: {len(names)} files, {_megabytes(sum(sizes[name] for name in names))}", flush=True)
    large = [f"{name} ({_megabytes(size)})" for name, size in sizes.items() if name not in names and size >= LARGE]
    if large:
        print(f"not needed and not downloaded: {', '.join(large)}", flush=True)
    for path in directory.iterdir():  # what an earlier attempt has left
        if path.is_file() and path.name not in names:
            path.unlink()
    _download(model_id, info.sha, directory, names)
    for name in names:
        path, lfs = directory / name, siblings[name].lfs
        if lfs and sha256(path) != lfs.sha256:
            path.unlink()
            raise UserError(f"{path} does not have the hub's hash and was deleted; run this again to download it")
    return info.sha


def files_to_fetch(names: Iterable[str], index: str | None, model_id: str) -> list[str]:
    """Which of a repository's files make up the model: those that transformers reads, each weight once.

    index: the content of model.safetensors.index.json, if the repository has one. The weights are the files that it names,
    else model.safetensors. Other copies of the weights are left out: `consolidated.safetensors` of Mistral, `original/`
    of Llama, .pth, .bin, GGUF, ONNX. Raises UserError if there are no such weights.
    """
    names = sorted(names)
    if index is not None:
        try:
            weights = sorted(set(json.loads(index)["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{INDEX} of {model_id} names no files ({error!r}); choose another model") from error
        missing = [name for name in weights if name not in names]
        if missing or not weights:
            what = f"{missing[0]}, which is not there" if missing else "no files"
            raise UserError(f"{INDEX} of {model_id} on the hub names {what}; choose another model or revision")
        weights.append(INDEX)
    elif SINGLE in names:
        weights = [SINGLE]
    else:
        others = [name for name in names if name.endswith((".safetensors", ".bin", ".pth", ".gguf"))]
        has = f"only {', '.join(others[:3])}{', ...' if len(others) > 3 else ''}" if others else "no weights"
        raise UserError(
            f"{model_id} has {has} on the hub, not safetensors in transformers' layout ({SINGLE} or {INDEX}); choose another "
            "model"
        )
    patterns = SMALL_FILES + ([] if "tokenizer.json" in names else OTHER_VOCABULARIES)
    small = [name for name in names if "/" not in name and any(fnmatch.fnmatchcase(name, p) for p in patterns)]
    return sorted({*weights, *small})


def explain(error: Exception, model_id: str) -> Exception:
    """What to raise in place of an exception of the hub's client.

    A UserError if the hub refuses; HubUnreachable if it cannot be reached; the exception itself if it is neither, which is
    a bug or a full disk.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import (
        DisabledRepoError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # a download looks for a copy on the disk before it reports what the hub said
    token = get_token()
    held = "HF_TOKEN" if os.environ.get("HF_TOKEN") else "the token that `hf auth login` has stored"
    page = f"https://huggingface.co/{model_id}"
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if isinstance(error, HFValidationError):
        return UserError(f"{model_id!r} is not the id of a model; write ORGANISATION/NAME")
    if isinstance(error, GatedRepoError):
        if token:
            return UserError(
                f"{model_id} is gated, and {held} gives no access to it; accept its terms on {page} with the account of "
                "the token, wait until access is granted, and let the token read gated repositories"
            )
        return UserError(f"{model_id} is gated; accept its terms on {page}, then {LOG_IN}")
    if isinstance(error, RepositoryNotFoundError):
        if token:
            return UserError(
                f"the Hugging Face hub has no model {model_id} that {held} may read; check the name, or use a token with "
                "access if it is private"
            )
        return UserError(
            f"the Hugging Face hub has no public model {model_id}; check the name, or {LOG_IN} if it is private"
        )
    if isinstance(error, DisabledRepoError):
        return UserError(f"the Hugging Face hub has disabled {model_id}; choose another model")
    if status == 401:
        if not token:
            return UserError(f"the Hugging Face hub gives {model_id} only to users that are logged in; {LOG_IN}")
        instead = "set a valid one" if held == "HF_TOKEN" else "log in again with `hf auth login`"
        without = "unset HF_TOKEN" if held == "HF_TOKEN" else "log out with `hf auth logout`"
        return UserError(
            f"the Hugging Face hub does not accept {held}: it is wrong or has expired; {instead}, or {without}, as a public "
            "model needs no token"
        )
    # A proxy answers with 403 too, but without the hub's request id.
    if status == 403 and getattr(error, "request_id", None):
        if token:
            return UserError(
                f"the Hugging Face hub refuses {model_id} (403): {held} may not read it; give the token that permission, or use "
                "another one"
            )
        return UserError(f"the Hugging Face hub refuses {model_id} without a token (403); {LOG_IN}")
    if status == 429:
        return UserError(f"the Hugging Face hub limits the number of requests (429); wait a few minutes, or {LOG_IN}")
    if isinstance(error, OfflineModeIsEnabled):
        return HubUnreachable("HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set")
    if status is not None:
        return HubUnreachable(f"it, or a proxy on the way, answers with HTTP status {status}")
    is_client = type(error).__module__.split(".")[0] in ("httpx", "httpx2", "httpcore", "requests", "urllib3")
    if is_client or (isinstance(error, OSError) and error.errno not in (errno.ENOSPC, errno.EDQUOT)):
        said = " ".join(str(error).split())
        return HubUnreachable(f"{type(error).__name__}{f': {said}' if said else ''}")
    return error


def sha256(path: Path) -> str:
    """The file's sha256 in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(model_id: str, revision: str, directory: Path, names: list[str]) -> None:
    """Download these files, or continue to. Raises UserError if one cannot be downloaded."""
    from huggingface_hub import snapshot_download

    again = "run this again to continue"
    try:
        snapshot_download(
            model_id, revision=revision, local_dir=directory, allow_patterns=[glob.escape(name) for name in names]
        )
    except Exception as error:
        reason = explain(error, model_id)
        if isinstance(reason, HubUnreachable):
            raise UserError(f"the download of {model_id} broke off ({reason}); {again}") from error
        raise reason from error
    # Where the hub cannot be reached, the client takes what is in the directory for the whole model.
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise UserError(f"the download of {model_id} is not complete: {missing[0]} is missing; {again}")


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"
