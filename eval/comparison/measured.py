"""Read the results of every arm, and measure the missing ones.

An existing result is used if its task, data and weights are the same. Otherwise scripts/evaluate.py or `scripts/measure.py
forgetting` measures it, as a child process.
"""

import hashlib
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common.child_process import under_torchrun
from common.errors import UserError
from eval.comparison.arms import Arm, Seed, Source
from eval.results import prepare_output, read_result
from model.fingerprint import fingerprint_of_base

ROOT = Path(__file__).resolve().parents[2]
# Arguments of `read_result`: the keys of a result of `scripts/measure.py forgetting`, and the advice if one is missing.
GENERAL = ("per_text", "per_question", "weights"), "remove it, and it is measured again with --general"


@dataclass(frozen=True)
class Measuring:
    """How to measure missing results. base: None without --general. task: the module. options: more for scripts/evaluate.py."""

    data: Path
    train: Path | None
    base: str | None
    general: bool
    out: Path
    processes: int = 1
    task: str = ""
    options: tuple[str, ...] = ()

    def arms(self, sources: dict[str, list[Source]]) -> list[Arm]:
        """Read the results of every seed, and measure the missing ones. Raise UserError if they do not belong together."""
        arms = [
            Arm(name, tuple(self._seed(source, name, number) for number, source in enumerate(seeds, 1)))
            for name, seeds in sources.items()
        ]
        _check([seed for arm in arms for seed in arm.seeds])
        return arms

    def _seed(self, source: Source, name: str, number: int) -> Seed:
        folder, stem = source.path.parent, ""
        if source.kind == "run":
            folder = source.path / "eval"
        elif source.kind == "model":  # nothing is written into a model directory, which may be shared
            folder, stem = self.out / "eval", f"{re.sub(r'[^A-Za-z0-9.-]+', '_', name)}-{number}-"
        task = self._task(source, folder, stem)
        return Seed(source, task, self._general(source, folder / f"{stem}general.json", task), source.tokens)

    def _task(self, source: Source, folder: Path, stem: str) -> dict:
        """Return the result of the task's examples, measured if it is missing or of another task, other data or weights."""
        digest = hashlib.sha256(self.data.read_bytes()).hexdigest()
        if source.kind == "result":
            result = read_result(source.path)
            if result["data_sha256"] != digest:
                raise UserError(
                    f"{source.path} was measured on other data ({result.get('data')}) than {self.data}: name the file that was "
                    "evaluated, or evaluate again"
                )
            return result
        path = folder / f"{stem}{self.data.stem}-{digest[:8]}.json"
        result = read_result(path) if path.is_file() else {}
        if (
            result.get("data_sha256") == digest
            and result.get("task") == self.task
            and result.get("weights") == fingerprint_of_base(source.model)
        ):
            return result
        options = ["--data", self.data, *self.options, "--json", path, "--show", 0]
        options += ["--train", self.train] if self.train else []
        options += ["--task", self.task] if self.task else []
        self._measure(path, "scripts/evaluate.py", source.model, *options)
        return read_result(path)

    def _general(self, source: Source, path: Path, task: dict) -> dict | None:
        """Return the result on general text, measured if --general asks for it; None if there is none."""
        result = read_result(path, *GENERAL) if path.is_file() else None
        base = None if source.kind == "result" else self.base  # a file of results is used whatever its base
        if (
            result
            and result["weights"]["tuned"] == task.get("weights")
            and (base is None or result["weights"]["base"] == fingerprint_of_base(base))
        ):
            return result
        if source.kind == "result" or not self.general:
            return None
        self._measure(path, "scripts/measure.py", "forgetting", base, source.model, "--json", path)
        return read_result(path, *GENERAL)

    def _measure(self, path: Path, script: str, *options: object) -> None:
        """Run a script that writes `path`."""
        if path.is_file():
            print(f"{path} is of another task, other data or weights: it is measured again", flush=True)
        prepare_output(path)
        launch(self.processes, script, *options)


def _check(seeds: Sequence[Seed]) -> None:
    """Raise UserError unless all results are of the same examples and, if measured, of the same general text and base."""
    first = seeds[0]
    general = [(seed.source.path, seed.general) for seed in seeds if seed.general]
    for seed in seeds:
        names = f"{seed.source.path} and {first.source.path}"
        for key, mend in (("data_sha256", "--data"), ("n_examples", "--limit")):
            if seed.task[key] != first.task[key]:
                raise UserError(
                    f"{names} were evaluated on different examples ({key} differs): evaluate both with the same {mend} of "
                    "scripts/evaluate.py"
                )
        if _truth(seed.task) != _truth(first.task):
            raise UserError(
                f"{names} do not agree on the true answers: evaluate both again with the same version of scripts/evaluate.py"
            )
    for path, result in general:
        if _text(result) != _text(general[0][1]):
            raise UserError(
                f"the general text, or the base model, of {path} differs from that of {general[0][0]}: remove their "
                "general.json and compare again with --general"
            )


def _truth(task: dict) -> list:
    return [(answer.get("id"), answer.get("cluster"), answer.get("true")) for answer in task.get("answers", ())]


def _text(general: dict) -> list:
    return [*map(general.get, ("text", "bytes", "texts")), general["weights"]["base"]]


def launch(processes: int, script: str, *options: object) -> None:
    """Run a script of the project, with torchrun if there are several processes. Raises UserError if it fails."""
    print("\n==", script, *options, flush=True)
    if subprocess.run([sys.executable, *under_torchrun(processes), str(ROOT / script), *map(str, options)]).returncode:
        raise UserError(
            f"{script} failed, see its output above; run the same command again to continue after what is finished"
        )
