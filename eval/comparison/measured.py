"""Read the results of every arm, and measure the missing ones.

An existing result is used if its task, data and weights are the same, whatever its name in RUN or RUN/eval. All existing
results are read and compared before scripts/evaluate.py or `scripts/measure.py forgetting` measures the first missing one, as a
child process.
"""

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common.child_process import under_torchrun
from common.errors import UserError
from eval.comparison.arms import Arm, Seed, Source
from eval.evaluate_examples import EvaluationOptions, read_inputs
from eval.results import prepare_output, read_result
from model.fingerprint import fingerprint_of_base

ROOT = Path(__file__).resolve().parents[2]
# Arguments of `read_result`: the keys of a result of `scripts/measure.py forgetting`, and the advice if one is missing.
GENERAL = ("per_text", "per_question", "weights"), "remove it, and it is measured again with --general"


@dataclass(frozen=True)
class Measuring:
    """How to measure missing results. base: None without --general. task: the module.

    options: `--format`, its value, `--fields` and its value, for scripts/evaluate.py.
    """

    data: Path
    train: Path | None
    base: str | None
    general: bool
    out: Path
    processes: int = 1
    task: str = ""
    options: tuple[str, ...] = ()

    def stored(self, sources: dict[str, list[Source]]) -> "Stored":
        """Read the existing results on the task without measuring anything. Raise UserError if they do not belong together."""
        digest = hashlib.sha256(self.data.read_bytes()).hexdigest()
        named = {source: self._named(source, digest) for seeds in sources.values() for source in seeds}
        existing = [Seed(source, result) for source, result in named.items() if result]
        _check(existing)
        task = existing[0].task if existing else {}
        limit = task.get("n_examples") if task.get("n_examples") != task.get("n_in_file") else None
        places = {
            source: self._place(source, name, number, digest)
            for name, seeds in sources.items()
            for number, source in enumerate(seeds, 1)
        }
        results = {
            source: result or self._stored_task(source, places[source][0], digest, limit)
            for source, result in named.items()
        }
        _check([Seed(source, result) for source, result in results.items() if result])
        return Stored(results, places, limit)

    def arms(self, sources: dict[str, list[Source]], stored: "Stored | None" = None) -> list[Arm]:
        """Return the results of every seed, and measure the missing ones. Raise UserError if they do not belong together."""
        stored = stored or self.stored(sources)
        arms = [Arm(name, tuple(self._seed(source, stored) for source in seeds)) for name, seeds in sources.items()]
        _check([seed for arm in arms for seed in arm.seeds])
        return arms

    def check(self, sources: dict[str, list[Source]], stored: "Stored") -> None:
        """Raise UserError for equal weights in one arm, and for an example that does not suit a model which must be measured."""
        for name, seeds in sources.items():
            seen: dict[str, Path] = {}
            for source in seeds if len(seeds) > 1 else ():
                weights = (stored.results[source] or {}).get("weights") or str(source.path.resolve())
                weights = fingerprint_of_base(source.model) if stored.results[source] is None else weights
                if weights in seen:
                    raise UserError(
                        f"{name}: {seen[weights]} and {source.path} are the same weights; name each training run once"
                    )
                seen[weights] = source.path
        for source in stored.missing:
            options = self.data, self.train, self.options[1], self.options[3], stored.limit
            read_inputs(EvaluationOptions(str(source.model), *options))

    def _seed(self, source: Source, stored: "Stored") -> Seed:
        path, general = stored.places[source]
        task = stored.results[source] or self._measured_task(source, path, stored.limit)
        return Seed(source, task, self._general(source, general, task), source.tokens)

    def _place(self, source: Source, name: str, number: int, digest: str) -> tuple[Path, Path]:
        """Return the paths of measured results on the task and on general text: in RUN/eval, or for a model directory in OUT/eval."""
        folder, stem = source.path.parent, ""
        if source.kind == "run":
            folder = source.path / "eval"
        elif source.kind == "model":  # nothing is written into a model directory, which may be shared
            folder, stem = self.out / "eval", f"{re.sub(r'[^A-Za-z0-9.-]+', '_', name)}-{number}-"
        return folder / f"{stem}{self.data.stem}-{digest[:8]}.json", folder / f"{stem}general.json"

    def _named(self, source: Source, digest: str) -> dict | None:
        """Return the result of a source that is one; None for a run or a model. Raise UserError if it is of other data."""
        if source.kind != "result":
            return None
        result = read_result(source.path)
        if result["data_sha256"] != digest:
            raise UserError(
                f"{source.path} was measured on other data ({result.get('data')}) than {self.data}: name the file that was "
                "evaluated, or evaluate again"
            )
        return result

    def _stored_task(self, source: Source, place: Path, digest: str, limit: int | None) -> dict | None:
        """Return an existing result of this task, data and number of examples with the weights of a run or model; None without one.

        `place` comes first, then every other JSON in RUN/eval and RUN that has no examples in its prompts.
        """
        others = [*source.path.glob("eval/*.json"), *source.path.glob("*.json")] if source.kind == "run" else []
        results = {path: _result_in(path) for path in [place, *sorted(others)] if path.is_file()}
        matching = [
            (path, result)
            for path, result in results.items()
            if (result.get("data_sha256"), result.get("task")) == (digest, self.task)
            and result["n_examples"] == (limit or result["n_in_file"])
            and (path == place or not result.get("shots"))
        ]
        weights = fingerprint_of_base(source.model) if matching else None
        for path, result in matching:
            if result.get("weights") == weights:
                if path != place:
                    print(f"{source.path}: its result {path} is used", flush=True)
                return result
        return None

    def _measured_task(self, source: Source, path: Path, limit: int | None) -> dict:
        reading = [word for pair in zip(self.options[::2], self.options[1::2], strict=True) if pair[1] for word in pair]
        options = ["--data", self.data, *reading, "--json", path, "--show", 0]
        options += ["--train", self.train] if self.train else []
        options += ["--limit", limit] if limit else []
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


@dataclass(frozen=True)
class Stored:
    """The results that exist. results: None for a source to measure. places: where measured results on
    the task and on general text are kept. limit: the --limit of all results; None for whole files.
    """

    results: dict[Source, dict | None]
    places: dict[Source, tuple[Path, Path]]
    limit: int | None

    @property
    def missing(self) -> list[Source]:
        """The sources whose result must be measured."""
        return [source for source, result in self.results.items() if not result]


def _result_in(path: Path) -> dict:
    """Return the result of scripts/evaluate.py in a JSON file; {} if the file has none."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return result if isinstance(result, dict) and {"n_examples", "n_in_file", "data_sha256"} <= result.keys() else {}


def _check(seeds: Sequence[Seed]) -> None:
    """Raise UserError unless all results are of the same examples and, if measured, of the same general text and base."""
    if not seeds:
        return
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
