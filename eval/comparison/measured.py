"""The results of every arm. Those that exist are used if they are of the same data and weights; missing ones are measured
by scripts/evaluate.py and `scripts/measure.py forgetting`, as child processes.
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
# What a result of `scripts/measure.py forgetting` has, and what to do where it has not.
GENERAL = ("per_text", "per_question", "weights"), "remove it, and it is measured again with --general"


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

    def arms(self, sources: dict[str, list[Source]]) -> list[Arm]:
        """The results of every seed: read where they exist, measured where not. Raises UserError if they do not belong together."""
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
        elif source.kind == "model":  # the directory of someone else stays as it is
            folder, stem = self.out / "eval", f"{re.sub(r'[^A-Za-z0-9.-]+', '_', name)}-{number}-"
        task = self._task(source, folder, stem)
        return Seed(source, task, self._general(source, folder / f"{stem}general.json", task), source.tokens)

    def _task(self, source: Source, folder: Path, stem: str) -> dict:
        digest = hashlib.sha256(self.data.read_bytes()).hexdigest()
        if source.kind == "result":
            found = read_result(source.path)
            if found["data_sha256"] != digest:
                raise UserError(
                    f"{source.path} was measured on other data ({found.get('data')}) than {self.data}: name the file that was "
                    "evaluated, or evaluate again"
                )
            return found
        path = folder / f"{stem}{self.data.stem}-{digest[:8]}.json"
        found = read_result(path) if path.is_file() else {}
        if found.get("data_sha256") == digest and found.get("weights") == fingerprint_of_base(source.model):
            return found
        options = ["--data", self.data, *self.read, "--json", path, "--show", 0]
        options += ["--train", self.train] if self.train else []
        self._measure(path, "scripts/evaluate.py", source.model, *options)
        return read_result(path)

    def _general(self, source: Source, path: Path, task: dict) -> dict | None:
        found = read_result(path, *GENERAL) if path.is_file() else None
        base = None if source.kind == "result" else self.base  # which a result is not asked for
        if (
            found
            and found["weights"]["tuned"] == task.get("weights")
            and (base is None or found["weights"]["base"] == fingerprint_of_base(base))
        ):
            return found
        if source.kind == "result" or not self.general:
            return None
        self._measure(path, "scripts/measure.py", "forgetting", base, source.model, "--json", path)
        return read_result(path, *GENERAL)

    def _measure(self, path: Path, script: str, *options: object) -> None:
        """Run a script that writes `path`."""
        if path.is_file():
            print(f"{path} is of other data or weights: it is measured again", flush=True)
        prepare_output(path)
        launch(self.processes, script, *options)


def _check(seeds: Sequence[Seed]) -> None:
    """Raise UserError unless all results are of the same examples and, where known, of the same general text and base."""
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
    for path, found in general:
        if _text(found) != _text(general[0][1]):
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
