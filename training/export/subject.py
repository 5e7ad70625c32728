"""What is exported: a checkpoint of a run, or a model directory, with the files that belong beside its weights."""

import json
import shutil
import typing
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

from transformers import PretrainedConfig

from common.errors import UserError
from configs.config import Config, Source
from data.tokens import load_tokenizer
from distributed.checkpoint_directory import (
    check_whole,
    checkpoint_name,
    complete_checkpoints,
    latest_checkpoint,
    read_manifest,
    weights_digest,
)
from distributed.process_group import Ranks
from model.architectures import read_model_config
from model.fingerprint import fingerprint_of_base
from model.language_model import PackedLanguageModel, build_on_meta
from model.weights import Weights, weights_of_checkpoint, weights_of_directory
from training.ending import RECORD
from training.export_files import write_files

# Of a model directory: everything but weights, and what describes other weights or was made for the directory as a whole.
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
CHOOSE_STEP = "name a step with --step"


@dataclass(frozen=True)
class Run:
    """A run directory. record: its config.json. state: the saved state of the exported checkpoint; empty without one."""

    directory: Path
    record: dict
    config: Config
    state: dict


@dataclass(frozen=True)
class Subject:
    """Weights to export and what goes with them.

    identity: plain JSON that tells the weights from others, kept in export.json. words: the same for people.
    write_rest: writes config, tokenizer and generation settings to a folder. base: the directory of the base model, if known.
    """

    path: Path
    model_config: PretrainedConfig
    model: PackedLanguageModel  # on meta
    weights: Weights
    identity: dict
    words: str
    write_rest: Callable[[Path], None]
    run: Run | None
    base: Path | None


def read_subject(path: Path, step: int | None, best: bool, base: Path | None, ranks: Ranks) -> Subject:
    """The run or the model directory at `path`. Raises UserError if it is neither, or damaged.

    step, best: which checkpoint of a run; without them, the one that the run itself exports. `base` replaces the run's
    model.path. A run whose checkpoints are gone is represented by its `export/`.
    """
    record = _read_json(path / "config.json")
    if not {"config", "start_step"} <= record.keys():
        if step is not None or best:
            raise UserError(f"{path} is a model directory, which has no steps; leave out --step and --best")
        run = _read_run(path.parent) if path.absolute().name == "export" else None
        return _directory(path, run, base)
    run = _read_run(path)
    assert run is not None
    checkpoint, kind = _choose(run, step, best)
    if checkpoint is not None:
        return _checkpoint(run, checkpoint, kind, base, ranks)
    if step is not None or best or not (path / "export").is_dir():
        raise UserError(
            f"{path} has no {'such checkpoint' if step is not None or best else 'checkpoint and no export'}"
        )
    return _directory(path / "export", run, base)


def _checkpoint(run: Run, checkpoint: Path, kind: str, base: Path | None, ranks: Ranks) -> Subject:
    check_whole(checkpoint, ranks, f"{CHOOSE_STEP}, or train again")
    settings = run.config.model
    source = base or Path(settings.path)
    if not (source / "config.json").is_file():
        raise UserError(f"the base model of {run.directory}, {source}, is not there; name its directory with --base")
    model_config = read_model_config(
        str(source), settings.rope_type, settings.rope_factor, settings.rope_original_length
    )
    model = build_on_meta(model_config)
    weights = weights_of_checkpoint(checkpoint, model)
    state = read_manifest(checkpoint)["state"]
    tokenizer = load_tokenizer(str(source), run.config.data.chat_template)
    if settings.rope_type:
        tokenizer.model_max_length = model_config.max_position_embeddings
    run = Run(run.directory, run.record, run.config, state)
    return Subject(
        checkpoint,
        model_config,
        model,
        weights,
        {"weights": kind, "step": state["step"], "checkpoint": weights_digest(checkpoint)},
        f"the {kind} weights of {run.directory} (step {state['step']})",
        lambda folder: write_files(folder, run.config, model_config, tokenizer),
        run,
        source,
    )


def _directory(path: Path, run: Run | None, base: Path | None) -> Subject:
    model_config = read_model_config(str(path))
    load_tokenizer(str(path))  # a damaged one is said now
    model = build_on_meta(model_config)
    exported = _read_json(path / RECORD)
    identity = {key: exported.get(key) for key in ("weights", "step", "checkpoint")} if exported else {}

    def copy_files(folder: Path) -> None:
        for file in sorted(path.iterdir()):
            if file.is_file() and not any(file.match(pattern) for pattern in NOT_COPIED):
                shutil.copyfile(file, folder / file.name)

    return Subject(
        path,
        model_config,
        model,
        weights_of_directory(path, model),
        identity | {"fingerprint": fingerprint_of_base(path)},
        f"the weights of {path}",
        copy_files,
        run,
        base or (Path(run.config.model.path) if run else None),
    )


def _choose(run: Run, step: int | None, best: bool) -> tuple[Path | None, str]:
    """(the checkpoint to export, what it is: last, best or chosen); (None, "") if the run has none."""
    folder = run.directory / "checkpoints"
    complete = complete_checkpoints(folder) if folder.is_dir() else []
    names = ", ".join(str(int(path.name.removeprefix("step-"))) for path in complete) or "none"
    if step is not None:
        if folder / checkpoint_name(step) not in complete:
            raise UserError(f"{run.directory} has no checkpoint of step {step}; those that it has: {names}")
        return folder / checkpoint_name(step), "chosen"
    newest = latest_checkpoint(folder) if complete else None
    if newest is None:
        return None, ""
    if best or run.config.run.export == "best":
        number = read_manifest(newest, CHOOSE_STEP)["state"].get("best_step")
        if number is not None and folder / checkpoint_name(number) in complete:
            return folder / checkpoint_name(number), "best"
        if best:
            why = (
                "no evaluation of a trained model"
                if number is None
                else f"no longer the best checkpoint, step {number}"
            )
            raise UserError(f"{run.directory} has {why}; {CHOOSE_STEP}: {names}")
    return newest, "last"


def _read_run(directory: Path) -> Run | None:
    record = _read_json(directory / "config.json")
    if not {"config", "start_step"} <= record.keys():
        return None
    return Run(
        directory, record, config_of_record(record["config"], directory / "config.json"), _newest_state(directory)
    )


def _newest_state(directory: Path) -> dict:
    """The saved state of a run's newest checkpoint; empty if there is none."""
    folder = directory / "checkpoints"
    try:
        newest = latest_checkpoint(folder) if folder.is_dir() else None
        return read_manifest(newest)["state"] if newest else {}
    except UserError:
        return {}


def config_of_record(sections: dict, where: Path) -> Config:
    """The Config in a run's config.json. Raises UserError for keys that this version of the code does not have."""
    parts = {}
    for section, kind in typing.get_type_hints(Config).items():
        values = _with_tuples(sections.get(section, {}))
        unknown = sorted(values.keys() - {field.name for field in fields(kind)})
        if unknown:
            raise UserError(
                f"{where}: {section}.{unknown[0]} is no setting of this version of the code; export with the version that "
                "trained the run"
            )
        if section == "data":
            values["mix"] = tuple(Source(**_with_tuples(source)) for source in values.get("mix", ()))
        parts[section] = kind(**values)
    return Config(**parts)


def _with_tuples(values: dict) -> dict[str, typing.Any]:
    """Settings from JSON, whose lists were tuples."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def _read_json(path: Path) -> dict:
    """The JSON object in a file; empty if there is no such file. Raises UserError if it is damaged."""
    if not path.is_file():
        if path.name == "config.json":
            what = "neither the directory of a run nor that of a model: it has no config.json"
            raise UserError(f"{path.parent} is {what}")
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
        return content
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); copy it again") from error
