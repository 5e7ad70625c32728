"""What is exported: a checkpoint of a run, a model directory or an adapter, with the files that belong beside its weights."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from common.dtypes import DTYPES
from common.errors import UserError
from data.tokens import load_tokenizer
from distributed.checkpoint_directory import check_whole, read_manifest, weights_digest
from distributed.process_group import Ranks
from model.adapter import CONFIG, WEIGHTS, Adapter, adapter_of_checkpoint, adapter_of_directory, merge
from model.architectures import read_model_config
from model.fingerprint import fingerprint_of_base
from model.hub import sha256
from model.language_model import build_on_meta
from model.weights import Weights, weights_of_checkpoint, weights_of_directory
from training.ending import RECORD
from training.export.run import CHOOSE_STEP, COPY_AGAIN, Run, choose_checkpoint, is_run, read_run
from training.export_files import read_json, write_files

# Of a model directory: the weights, and what describes other weights or was made for the directory as a whole.
NOT_COPIED = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*.bin",
    "*.gguf",
    "*.tmp",
    "README.md",
    RECORD,
    "fetched.json",
)


@dataclass(frozen=True)
class Subject:
    """Weights to export and what goes with them.

    weights: of the model, with adapters merged; None if an adapter is exported as it is. adapter: of a LoRA run. identity:
    plain JSON that tells the weights from others, kept in export.json. words: the same for people. write_rest: writes
    config, tokenizer and generation settings to a folder. base: the directory of the base model, if known.
    """

    path: Path
    model_config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    weights: Weights | None
    adapter: Adapter | None
    identity: dict
    words: str
    write_rest: Callable[[Path], None]
    run: Run | None
    base: Path | None


@dataclass(frozen=True)
class Choice:
    """Which weights: of which checkpoint of a run, with which base, and whether an adapter is merged into it."""

    step: int | None = None
    best: bool = False
    base: Path | None = None
    merge_lora: bool = False


def read_subject(path: Path, choice: Choice, ranks: Ranks) -> Subject:
    """The run, model directory or adapter of peft at `path`. Raises UserError if it is none of them, or damaged.

    A run whose checkpoints are gone is represented by its `export/`. The base is that of `choice`, or the run's model.path,
    or what the adapter names.
    """
    run = read_run(path)
    if run is None:
        if choice.step is not None or choice.best:
            raise UserError(f"{path} is not the directory of a run, so it has no steps; leave out --step and --best")
        inside = read_run(path.parent) if path.absolute().name in ("export", "adapter") else None
        return _of_directory(path, inside, choice)
    checkpoint, kind = choose_checkpoint(run, choice.step, choice.best)
    if checkpoint is not None:
        return _of_checkpoint(run, checkpoint, kind, choice, ranks)
    if not (path / "export").is_dir():
        raise UserError(f"{path} has neither a checkpoint nor an export: let the run finish first")
    return _of_directory(path / ("export" if choice.merge_lora or not run.lora else "adapter"), run, choice)


def _of_checkpoint(run: Run, checkpoint: Path, kind: str, choice: Choice, ranks: Ranks) -> Subject:
    check_whole(checkpoint, ranks, f"{CHOOSE_STEP}, or train again")
    if choice.merge_lora and not run.lora:
        raise UserError(f"{run.directory} trained all weights, not an adapter; leave out --merge-lora")
    settings = run.config.model
    base = choice.base or Path(settings.path)
    if not (base / "config.json").is_file():
        raise UserError(f"the base model of {run.directory}, {base}, is not there; name its directory with --base")
    model_config = read_model_config(str(base), settings.rope_type, settings.rope_factor, settings.rope_original_length)
    model = build_on_meta(model_config)
    tokenizer = load_tokenizer(str(base), run.config.data.chat_template)
    if settings.rope_type:
        tokenizer.model_max_length = model_config.max_position_embeddings
    state = read_manifest(checkpoint)["state"]
    weights, adapter = None, None
    if run.lora:
        rank, alpha = run.lora["rank"], run.lora["alpha"]
        adapter = adapter_of_checkpoint(
            checkpoint, rank, 2.0 * rank if alpha is None else alpha, run.lora.get("dropout", 0.0)
        )
    if adapter is None:
        weights = weights_of_checkpoint(checkpoint, model)
    elif choice.merge_lora:
        weights = merge(weights_of_directory(base, model), adapter, DTYPES.get(settings.compute_dtype))

    def write_rest(folder: Path) -> None:
        if weights is None:
            tokenizer.save_pretrained(folder)
        else:
            write_files(folder, run.config, model_config, tokenizer)

    return Subject(
        checkpoint,
        model_config,
        tokenizer,
        weights,
        adapter,
        {"weights": kind, "step": state["step"], "checkpoint": weights_digest(checkpoint)},
        f"the {kind} weights of {run.directory} (step {state['step']}){_how(adapter, weights)}",
        write_rest,
        replace(run, state=state),
        base,
    )


def _of_directory(path: Path, run: Run | None, choice: Choice) -> Subject:
    base = choice.base or (Path(run.config.model.path) if run else None)
    adapter = adapter_of_directory(path) if (path / CONFIG).is_file() else None
    if adapter is None and choice.merge_lora and not (run and run.lora):
        raise UserError(f"{path} has no {CONFIG}: it is no adapter; leave out --merge-lora")
    if adapter is None and not (path / "config.json").is_file():
        raise UserError(f"{path} is neither the directory of a run nor that of a model: it has no config.json")
    home = path
    if adapter is not None:
        named = adapter.settings.get("base_model_name_or_path")
        base = base or (Path(named) if named and Path(named).is_dir() else None)
        if base is None:
            raise UserError(
                f"the base model of {path}, {named}, is not a directory here; name its directory with --base"
            )
        home = base
    if is_run(read_json(home / "config.json", COPY_AGAIN)):
        raise UserError(f"{home} is the directory of a run, not of a model; the run's model is {home / 'export'}")
    model_config = read_model_config(str(home))
    tokenizer = load_tokenizer(str(path if _has_tokenizer(path) else home))
    weights = None
    if adapter is None or choice.merge_lora:
        weights = weights_of_directory(home, build_on_meta(model_config))
        weights = weights if adapter is None else merge(weights, adapter)
    exported = read_json(path / RECORD, COPY_AGAIN) if (path / RECORD).is_file() else {}
    identity = {key: exported[key] for key in ("weights", "step", "checkpoint") if key in exported}
    if run and run.state.get("step") != identity.get("step"):  # the newest checkpoint is not the one in the export
        run = replace(run, state={key: run.state[key] for key in ("meaning", "settings") if key in run.state})
    fingerprint = fingerprint_of_base(path) if adapter is None else sha256(path / WEIGHTS)

    def write_rest(folder: Path) -> None:
        if weights is not None:
            _copy_files(home, folder)
        tokenizer.save_pretrained(folder)

    return Subject(
        path,
        model_config,
        tokenizer,
        weights,
        adapter,
        identity | {"fingerprint": fingerprint},
        f"the weights of {path}{_how(adapter, weights)}",
        write_rest if adapter is not None else lambda folder: _copy_files(home, folder),
        run,
        base,
    )


def _how(adapter: Adapter | None, weights: Weights | None) -> str:
    return "" if adapter is None else ", an adapter" if weights is None else ", with its adapter merged"


def _has_tokenizer(path: Path) -> bool:
    return any(path.glob("tokenizer*"))


def _copy_files(source: Path, folder: Path) -> None:
    for file in sorted(source.iterdir()):
        if file.is_file() and not any(file.match(pattern) for pattern in NOT_COPIED):
            shutil.copyfile(file, folder / file.name)
