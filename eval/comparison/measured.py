"""The results of every arm. Those that exist are used if they are of the same data and weights; missing ones are measured
by scripts/evaluate.py and `scripts/measure.py forgetting`, as child processes.
"""

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from eval.comparison.arms import Arm, Seed, Source, tokens_of
from eval.results import prepare_output, read_result
from model.fingerprint import fingerprint_of_base

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Measuring:
    """How missing results are measured. base: None if general text is not asked for. read: options of scripts/evaluate.py."""

    data: Path
    train: Path | None
    base: str | None
    general: bool
    out: Path
    processes: int = 1
    read: tuple[str, ...] = ()

    @property
    def data_sha256(self) -> str:
        """The digest that a result of the same data records."""
        return hashlib.sha256(self.data.read_bytes()).hexdigest()


def measure_arms(sources: dict[str, list[Source]], how: Measuring) -> list[Arm]:
    """The results of every seed: read where they exist, measured where not. Raises UserError if they do not belong together."""
    arms = []
    for name, seeds in sources.items():
        measured = []
        for number, source in enumerate(seeds, 1):
            folder, stem = _folder(name, number, source, how.out)
            task = _task_result(source, folder, stem, how)
            general = _general_result(source, folder, stem, task, how)
            measured.append(Seed(source, task, general, tokens_of(source)))
        arms.append(Arm(name, tuple(measured)))
    check_arms(arms, how)
    return arms


def _folder(name: str, number: int, source: Source, out: Path) -> tuple[Path, str]:
    """(directory of the results of a seed, beginning of their names). A model directory of someone else stays as it is."""
    if source.kind == "run":
        return source.path / "eval", ""
    if source.kind == "result":
        return source.path.parent, ""
    return out / "eval", f"{re.sub(r'[^A-Za-z0-9.-]+', '_', name)}-{number}-"


def _task_result(source: Source, folder: Path, stem: str, how: Measuring) -> dict:
    if source.kind == "result":
        result = read_result(source.path)
        if result["data_sha256"] != how.data_sha256:
            raise UserError(
                f"{source.path} was measured on other data ({result.get('data')}) than {how.data}: name the file that was "
                "evaluated, or evaluate again"
            )
        return result
    path = folder / f"{stem}{how.data.stem}-{how.data_sha256[:8]}.json"
    if path.is_file():
        result = read_result(path)
        weights = result.get("weights")
        if weights and result["data_sha256"] == how.data_sha256 and weights == fingerprint_of_base(source.model):
            return result
        print(f"{path} is not of {how.data} and the weights of {source.model}: it is measured again", flush=True)
    prepare_output(path)
    options = ["--data", how.data, *how.read, "--json", path, "--show", 0] + (
        ["--train", how.train] if how.train else []
    )
    launch(how.processes, "scripts/evaluate.py", source.model, *options)
    return read_result(path)


def _general_result(source: Source, folder: Path, stem: str, task: dict, how: Measuring) -> dict | None:
    path = folder / f"{stem}general.json"
    found = _read_general(path) if path.is_file() else None
    if found and found["weights"]["tuned"] == task.get("weights"):
        base = None if source.kind == "result" else how.base  # which a result is not asked for
        if base is None or found["weights"]["base"] == fingerprint_of_base(base):
            return found
    if source.kind == "result" or not how.general:
        return None
    if found:
        print(f"{path} is not of the weights of {source.model} and of the base: it is measured again", flush=True)
    prepare_output(path)
    launch(how.processes, "scripts/measure.py", "forgetting", how.base, source.model, "--json", path)
    return _read_general(path)


def _read_general(path: Path) -> dict:
    """The result of `scripts/measure.py forgetting`. Raises UserError if it is damaged or has another form."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(result, dict) or not {"per_text", "per_question", "weights"} <= result.keys():
            raise ValueError("it is no result of scripts/measure.py forgetting")
        return result
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); remove it, and it is measured again with --general") from None


def check_arms(arms: Sequence[Arm], how: Measuring) -> None:
    """Raise UserError unless all results are of the same examples and, where known, of the same general text and base."""
    seeds = [seed for arm in arms for seed in arm.seeds]
    first = seeds[0]
    for seed in seeds:
        for key, mend in (("data_sha256", "--data"), ("n_examples", "--limit")):
            if seed.task[key] != first.task[key]:
                raise UserError(
                    f"{seed.source.path} and {first.source.path} were evaluated on different examples ({key} differs): "
                    f"evaluate both with the same {mend} of scripts/evaluate.py"
                )
        if _truth(seed.task) != _truth(first.task):
            raise UserError(
                f"{seed.source.path} and {first.source.path} do not agree on the true answers: evaluate both again with the "
                "same version of scripts/evaluate.py"
            )
    general = [seed for seed in seeds if seed.general]
    for seed in general:
        one, other = ((s.general or {}) for s in (seed, general[0]))
        same_text = all(one.get(key) == other.get(key) for key in ("text", "bytes", "texts"))
        if not same_text or one["weights"]["base"] != other["weights"]["base"]:
            raise UserError(
                f"the general text, or the base model, of {seed.source.path} differs from that of {general[0].source.path}: "
                "remove their general.json and compare again with --general"
            )


def _truth(task: dict) -> list:
    return [(answer.get("id"), answer.get("cluster"), answer.get("true")) for answer in task.get("answers", ())]


def launch(processes: int, script: str, *options: object) -> None:
    """Run a script of the project, with torchrun if there are several processes. Raises UserError if it fails."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    print("\n==", script, *options, flush=True)
    if subprocess.run([sys.executable, *launcher, str(ROOT / script), *map(str, options)]).returncode:
        raise UserError(
            f"{script} failed, see its output above; run the same command again to continue after what is finished"
        )
