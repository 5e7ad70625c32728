"""Write an export: complete or absent, never over another one."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from common.dtypes import dtype_name
from common.durable_files import new_directory, write_durably
from common.errors import UserError
from model.adapter import write_adapter
from model.architectures import read_model_config
from model.fingerprint import fingerprint_of_base
from model.language_model import build_on_meta
from model.vocabulary.rows import first_new_row
from model.weights import Weights, average, converted, weights_of_directory, write_weights
from training.ending import RECORD
from training.export.base_model import BaseModel
from training.export.card_data import profile_of
from training.export.subject import Subject

CARD = "README.md"
# In the directory of a run. What is written there would be taken for its own export, checkpoint or results.
OF_A_RUN = ("adapter", "checkpoints", "eval", "ewc", "export", "tensorboard")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Request:
    """How the weights are changed on their way. dtype: a key of DTYPES or auto, that of config.json."""

    dtype: str = "auto"
    average_with_base: float | None = None


def record_of(subject: Subject, request: Request) -> dict:
    """What export.json says of the weights: two exports with the same record hold the same weights."""
    averaged, dtype = None, DTYPES.get(request.dtype)
    if request.average_with_base is not None:
        averaged = {"share_of_tuned": request.average_with_base, "base": fingerprint_of_base(base_of(subject))}
    if dtype is None:
        of_adapter = torch.float32  # what adapters are trained in; they are small
        dtype = getattr(subject.model_config, "dtype", None) or torch.bfloat16 if subject.weights else of_adapter
    kind = "model" if subject.adapter is None else "merged" if subject.weights else "adapter"
    return subject.identity | {"kind": kind, "dtype": dtype_name(dtype), "averaged": averaged}


def base_of(subject: Subject) -> Path:
    """The directory of the base model. Raises UserError if it is unknown or gone."""
    if subject.base is None:
        raise UserError(f"the base model of {subject.path} is unknown; name its directory with --base")
    if not (subject.base / "config.json").is_file():
        raise UserError(f"the base model, {subject.base}, is not there; name its directory with --base")
    return subject.base


def final_weights(subject: Subject, request: Request) -> Weights:
    """The weights to write, or those of the adapter. Raises UserError if they cannot be averaged."""
    if subject.weights is None:
        assert subject.adapter is not None
        if request.average_with_base is not None:
            raise UserError(f"{subject.path} has an adapter: --average-with-base needs --merge-lora")
        return subject.adapter.weights
    if request.average_with_base is None:
        return subject.weights
    path = base_of(subject)
    base = weights_of_directory(path, build_on_meta(read_model_config(str(path))))
    return average(base, subject.weights, request.average_with_base, first_new_row(path))


def base_warning(subject: Subject, record: dict) -> str | None:
    """A warning if weights are averaged with another base, or an adapter merged into another, than that of the run."""
    trained_from = subject.run and subject.run.state.get("meaning", {}).get("the weights of model.path")
    is_used = record["averaged"] or record["kind"] == "merged"
    if not (is_used and trained_from) or fingerprint_of_base(base_of(subject)) == trained_from:
        return None
    return f"warning: the weights in {subject.base} are not those that the run was started from"


def check_out(out: Path, run: Path | None) -> None:
    """Raise UserError if `out` is in a place where a run keeps, or will look for, something else."""
    if run is None or not out.resolve().is_relative_to(run.resolve()):
        return
    inside = out.resolve().relative_to(run.resolve()).parts
    if inside and inside[0] in OF_A_RUN:
        raise UserError(f"{run / inside[0]} belongs to the run; name another directory with --out")


def find_export(out: Path, record: dict) -> bool:
    """Whether `out` already is this export. Raises UserError if something else is there."""
    if not out.exists():
        return False
    try:
        written = json.loads((out / RECORD).read_text(encoding="utf-8"))
        sizes, _ = written.pop("files"), written.pop("profile", None)
        whole = all((out / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"{out} exists and is not an export of this script; name another directory with --out"
        ) from None
    if written != record or not whole:
        what = "an export of other weights" if written != record else "a damaged export of these weights"
        raise UserError(f"{out} is {what}; remove it, or name another directory with --out")
    return True


def write_export(out: Path, subject: Subject, weights: Weights, record: dict, base: BaseModel, card: str) -> int:
    """Write the directory `out`, which is complete or absent. Returns the bytes of the weights.

    `weights` comes from `final_weights`, `record` from `record_of`. `card` is the text of the model card.
    """
    dtype = getattr(torch, record["dtype"])
    needed = sum(torch.Size(shape).numel() for shape in weights.shapes.values()) * dtype.itemsize
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out.absolute().parent).free
    if free < needed:
        raise UserError(
            f"{out}: the export needs {needed / 2**20:,.0f} MiB, but the disk has {free / 2**20:,.0f} MiB free; free some space"
        )
    with new_directory(out) as folder:
        if record["kind"] == "adapter":
            assert subject.adapter is not None
            named = base.hub_id or str(base_of(subject))
            size = write_adapter(folder, subject.adapter, named, lambda name, tensor: converted(name, tensor, dtype))
        else:
            size = write_weights(folder, weights, dtype)
        subject.write_rest(folder)
        if record["kind"] != "adapter":
            _set_dtype(folder / "config.json", record["dtype"])
        base.copy_licences(folder)
        sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
        # The profile says how scripts/analyze.py must ask. It is no part of the weights: its data card may be gone later.
        profile = profile_of(subject.run) if subject.run else None
        content = json.dumps(record | {"profile": profile, "files": sizes}, indent=1)
        (folder / RECORD).write_text(content + "\n", encoding="utf-8")
        (folder / CARD).write_text(card, encoding="utf-8")
    return size


def renew_card(out: Path, card: str) -> bool:
    """Replace the card of an existing export, as results may have been added. Returns whether it has changed."""
    path = out / CARD
    if path.is_file() and path.read_text(encoding="utf-8") == card:
        return False
    write_durably(path, card)
    return True


def _set_dtype(path: Path, dtype: str) -> None:
    """Let config.json name the dtype of the files, in which servers load them."""
    content = json.loads(path.read_text(encoding="utf-8"))
    old = [key for key in ("dtype", "torch_dtype") if key in content]
    path.write_text(json.dumps(content | dict.fromkeys(old or ["dtype"], dtype), indent=2) + "\n", encoding="utf-8")
