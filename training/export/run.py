"""A run directory as the export reads it: its config, its starts, and which of its checkpoints is exported."""

import json
import typing
from dataclasses import dataclass, fields
from pathlib import Path

from common.errors import UserError
from configs.config import Config, Source
from distributed.checkpoint_directory import checkpoint_name, complete_checkpoints, latest_checkpoint, read_manifest
from training.export_files import read_json

CHOOSE_STEP, COPY_AGAIN = "name a step with --step", "copy it again"


@dataclass(frozen=True)
class Run:
    """A run directory.

    record: its config.json. config: the settings in it. lora: the section `lora` of the settings if adapters were trained,
    else empty. state: the saved state of the exported checkpoint, or of the newest; empty without any.
    """

    directory: Path
    record: dict
    config: Config
    lora: dict
    state: dict

    def starts(self) -> list[dict]:
        """The records of all starts, the oldest first; lines that cannot be read are left out."""
        found = []
        path = self.directory / "starts.jsonl"
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
        return found or [self.record]


def is_run(record: dict) -> bool:
    """Whether a config.json is that of a run, not of a model."""
    return {"config", "start_step"} <= record.keys()


def read_run(directory: Path) -> Run | None:
    """The run in `directory`, or None if it is not that of a run. Raises UserError if its config.json is damaged."""
    path = directory / "config.json"
    record = read_json(path, COPY_AGAIN) if path.is_file() else {}
    if not is_run(record):
        return None
    lora = record["config"].get("lora") or {}
    config = config_of_record(record["config"], path)
    return Run(directory, record, config, lora if lora.get("rank") else {}, _newest_state(directory))


def choose_checkpoint(run: Run, step: int | None, best: bool) -> tuple[Path | None, str]:
    """(the checkpoint to export, what it is: last, best or chosen); (None, "") if the run has none.

    Without `step` and `best`, the one that the run itself exports. Raises UserError if there is no such checkpoint.
    """
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


def _newest_state(directory: Path) -> dict:
    folder = directory / "checkpoints"
    try:
        newest = latest_checkpoint(folder) if folder.is_dir() else None
        return read_manifest(newest)["state"] if newest else {}
    except UserError:
        return {}  # the export of the run is still there


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
