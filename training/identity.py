"""A run's identity: everything that decides its weights. A checkpoint of another identity is refused, by what differs.

It has the settings that decide (configs/config.py: DECIDES), the tokens of the data and the order of documents, the weights
and the tokenizer of the base model, torch and transformers, and the code that train.py loads. It is plain JSON, section ->
name -> value or digest, in the manifest of every checkpoint; its `fingerprint` is in the export and in starts.jsonl.
"""

import ast
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from common.errors import UserError
from common.sha256 import remembered_sha256
from configs.config import DECIDES, FREE, READ, Config, as_dict
from distributed.checkpoint_directory import read_manifest
from model.fingerprint import fingerprint_of_tokenizer
from model.weight_files import stored_tensors

if TYPE_CHECKING:
    from training.inputs import Inputs

ROOT = Path(__file__).resolve().parents[1]
# Of config.json: what decides nothing that is trained.
NOT_OF_THE_MODEL = ("_name_or_path", "architectures", "dtype", "transformers_version", "use_cache")
# Imported in functions by what measures and decides nothing.
MEASURES = ("eval", "training.answers", "training.asked")
SHOWN = 8  # files or keys of a kind, in a message
WIDTH = 120  # characters of a value in a message

Identity = dict[str, Any]


# ---- what a run is -------------------------------------------------------------------------------------------------------


def hash_files(config: Config, script: str, say: Callable[[str], None]) -> Identity:
    """The part of a run's identity that is read from files: its code and the weights of its base.

    `script` is train.py's __file__. Call it before the data is read, which may take hours: code that is edited meanwhile is
    not what this process runs. Raises UserError if the weights of model.path are damaged.
    """
    code, scores = code_of(Path(script), scores_module(config))
    return {"the weights": hash_weights(config.model.path, say), "the code": code, "the scores' code": scores}


def hash_weights(model: str | Path, say: Callable[[str], None] = lambda text: None) -> dict[str, str]:
    """File name -> SHA-256 of the weights in a model directory. Raises UserError if they are damaged."""
    files = sorted({tensor.file for tensor in stored_tensors(model).values()})
    return {file.name: digest for file, digest in remembered_sha256(files, say).items()}


def identity_of(
    config: Config, inputs: "Inputs", model_config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> Identity:
    """Everything that decides the weights of a run, on this rank."""
    settings = {name: value for name, value in _settings(config).items() if name in DECIDES}
    if not config.ewc.strength:
        settings = {name: value for name, value in settings.items() if not name.startswith("ewc.")}
    if config.lora.rank:  # the alpha that holds: another default of a later version must not pass as the same run
        settings["lora.alpha"] = config.lora.effective_alpha
    mixture, old = inputs.train.mixture(), inputs.old_domain
    versions = {"torch": torch.__version__, "transformers": importlib.metadata.version("transformers")}
    if config.optimizer.memory == "6N":
        versions["torchao"] = importlib.metadata.version("torchao")
    shape = {name: value for name, value in model_config.to_dict().items() if name not in NOT_OF_THE_MODEL}
    return _as_json(
        {
            "settings": settings,
            "the data": {
                "data.train": inputs.train.sources[0].fingerprint,
                "data.mix": mixture and [mixture, list(inputs.plan.windows)],
                "ewc.data": old.fingerprint if old and config.ewc.strength else None,
                "the first step": hashlib.sha256(repr(inputs.plan.batch(0).items).encode()).hexdigest(),
            },
            "config.json": shape,
            "the tokenizer": {"of model.path": fingerprint_of_tokenizer(tokenizer)},
            "versions": versions,
            **inputs.files,
        }
    )


def free_settings(config: Config, inputs: "Inputs", world_size: int, device: str) -> dict:
    """What may change between two starts, name -> value: settings, and what follows from them and from the machine."""
    settings = {name: value for name, value in _settings(config).items() if name in READ + FREE}
    steps = {"steps in total": inputs.total_steps, "warm-up steps": inputs.warmup_steps}
    return _as_json(settings | steps | {"ranks": world_size, "computed on": device})


def fingerprint(identity: Identity) -> str:
    """The SHA-256 of an identity, as hexadecimal digits."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def fingerprint_of_checkpoint(checkpoint: Path) -> str | None:
    """The fingerprint of what trained a checkpoint. None if there is no such checkpoint."""
    try:
        return fingerprint(read_manifest(checkpoint)["state"]["identity"])
    except UserError:
        return None


def _settings(config: Config) -> dict:
    return {f"{section}.{key}": value for section, keys in as_dict(config).items() for key, value in keys.items()}


def _as_json(value: dict) -> dict:
    return json.loads(json.dumps(value, default=str))  # as a manifest will give it back: tuples become lists


# ---- whether a checkpoint is of the same run -----------------------------------------------------------------------------


def differences(saved: Identity, current: Identity) -> list[str]:
    """What differs between two identities, in words; nothing if they are the same."""
    found = []
    for section, of in (("settings", ""), ("config.json", " of config.json"), ("versions", "")):
        before, now = saved[section], current[section]
        found += [
            f"{name}{of}={_cut(before.get(name, 'not set'))}, now it is {_cut(now.get(name, 'not set'))}"
            for name in _differing(before, now)
        ]
    data = _differing(saved["the data"], current["the data"])
    found += [
        f"{'another' if name == 'data.mix' else 'other data in'} {name}" for name in data if name != "the first step"
    ]
    if data and not found:  # other data or another seed would give another order as well
        found.append("another order of documents")
    if weights := _differing(saved["the weights"], current["the weights"]):
        found.append(f"other weights in model.path ({_several(weights)})")
    if saved["the tokenizer"] != current["the tokenizer"]:
        found.append("another tokenizer in model.path")
    code = _differing(saved["the code"], current["the code"])
    # Scores decide the weights only where they choose or end: a run for which they did not has none recorded.
    before, now = saved["the scores' code"], current["the scores' code"]
    code += _differing(before, now) if before and now else []
    return [*found, f"other code in {_several(code)}"] if code else found


def check_identity(
    checkpoint: Path, saved: dict, identity: Identity, settings: dict, resume: str
) -> tuple[Identity, list[str]]:
    """(the identity of checkpoints after this start's first step, lines for the user) of a start that continues a run.

    saved: the state in the checkpoint's manifest. identity, settings: of this start, the latter from `free_settings`. An
    identity that was changed has a list `changed`, and so another fingerprint than that of a run which began with it.

    Raises UserError if the checkpoint has another identity and `resume` is not `changed`.
    """
    before, lines = saved["identity"], []
    changes = {
        name: f"{name}: {_cut(saved['settings'].get(name, 'not set'))} -> {_cut(settings.get(name, 'not set'))}"
        for name in _differing(saved["settings"], settings)
    }
    if found := differences(before, identity):
        what = "; ".join(found)
        if resume != "changed":
            is_content = any(before[part] != identity[part] for part in ("the data", "the weights", "the tokenizer"))
            causes = [change for name, change in changes.items() if name in READ and is_content]
            why = f"; it may come from {'; '.join(causes)}" if causes else ""
            raise UserError(
                f"{checkpoint} was made with {what}{why}; set it back, start a new run with another run.name, or continue with "
                "what is set now: run.resume=changed"
            )
        lines.append(f"warning: {checkpoint} was made with {what}; run.resume=changed continues with what is set now")
        change = {"step": saved["step"], "from": fingerprint(before), "differences": found}
        identity = identity | {"changed": [*before.get("changed", []), change]}
    else:
        identity = before
    if changes:
        lines += [f"changed since step {saved['step']} was saved:", *(f"    {change}" for change in changes.values())]
    return identity, lines


def _differing(saved: dict, current: dict) -> list[str]:
    return [name for name in sorted(saved | current) if saved.get(name) != current.get(name)]


def _cut(value: object) -> str:
    text = str(value)
    return text if len(text) <= WIDTH else f"{text[: WIDTH - 3]}..."


def _several(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


# ---- the code ------------------------------------------------------------------------------------------------------------


def scores_module(config: Config) -> str | None:
    """The module whose scores decide the weights, because they choose the best checkpoint or end the run; else None."""
    decide = config.run.export == "best" or config.run.stop_after_no_gain
    if not (config.run.eval_generate and decide):
        return None
    return config.eval.metric.partition(":")[0] if config.eval.metric else "eval.regulator.curves"


def code_of(script: Path, scores: str | None = None) -> tuple[dict[str, str], dict[str, str]]:
    """(the code that `script` loads, the code of the module `scores` that the other has not): file -> digest.

    That is the script and every module beside it or beside this package that it imports, at the top of a file or in a
    function, and so on. A digest is that of the syntax tree: comments, docstrings and formatting do not count. Imports of
    `eval` in a function are not followed: what is measured decides nothing, unless it scores (`scores_module`).
    """
    folders = list(dict.fromkeys((script.resolve().parent, ROOT)))
    code = _closure([script.resolve()], folders, MEASURES)
    if scores is None:
        return _by_name(code, folders), {}
    try:
        spec = importlib.util.find_spec(scores)  # as eval.metric is found: beside the script, or in PYTHONPATH
        file = Path(spec.origin if spec and spec.origin else "").resolve(strict=True)
        home = file.parents[scores.count(".") + (file.name == "__init__.py")]
        if "site-packages" not in file.parts:  # an installed package has a version; what it imports is no code of ours
            folders = list(dict.fromkeys((*folders, home)))
        found = _closure([file], folders, ())
    except (Exception, SystemExit):
        # An error in the user's code: eval/metric.py says in one sentence what is wrong, before anything is trained.
        return _by_name(code, folders), {scores: "cannot be imported"}
    more = {file: digest for file, digest in found.items() if file not in code}
    return _by_name(code, folders), _by_name(more, [*folders, home])


def _by_name(code: dict[Path, str], folders: list[Path]) -> dict[str, str]:
    """The code with names as a user knows them: relative to the folder that is imported from."""
    named = {}
    for file, digest in code.items():
        home = next(folder for folder in folders if file.is_relative_to(folder))
        named[file.relative_to(home).as_posix()] = digest
    return dict(sorted(named.items()))


def _closure(files: list[Path], folders: list[Path], not_late: Collection[str]) -> dict[Path, str]:
    """These files and all that they import from `folders` -> the digest of each. A function's imports of
    `not_late` are left out."""
    code: dict[Path, str] = {}
    while files:
        file = files.pop()
        if file in code:
            continue
        module = _Module(file)
        code[file] = module.digest
        for name, is_late in module.imports:
            if not (is_late and any(f"{name}.".startswith(f"{one}.") for one in not_late)):
                found = _files_of(name, folders)
                if not found and (home := _home_of(name.partition(".")[0])) and home not in folders:
                    folders.append(home)  # a module of the user in PYTHONPATH
                    found = _files_of(name, folders)
                files += found
    return code


@functools.cache
def _home_of(name: str) -> Path | None:
    """The folder from which a module is imported; None for the standard library and installed packages, which have versions."""
    if name in sys.stdlib_module_names:
        return None
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
    if spec is None or not spec.origin or {"site-packages", "dist-packages"} & set(Path(spec.origin).parts):
        return None
    if name in importlib.metadata.packages_distributions():  # installed as editable
        return None
    file = Path(spec.origin).resolve()
    return file.parents[1] if file.name == "__init__.py" else file.parent


def _files_of(name: str, folders: list[Path]) -> list[Path]:
    """The files that `import NAME` runs, if they are in one of the folders: of the packages above it, and its own."""
    parts = name.split(".")
    for folder in folders:
        paths = [folder.joinpath(*parts[:depth]) for depth in range(1, len(parts) + 1)]
        files = [file for path in paths for file in (path / "__init__.py", path.with_suffix(".py")) if file.is_file()]
        if files:
            return files
    return []


class _Module:
    """A file's syntax tree: its `digest`, and the names that it imports, each with whether a function does."""

    def __init__(self, file: Path) -> None:
        self.imports: list[tuple[str, bool]] = []
        self._file = file
        self._parts: list[str] = []
        self._visit(ast.parse(file.read_bytes(), file), in_function=False)
        self.digest = hashlib.sha256("\n".join(self._parts).encode()).hexdigest()[:32]

    def _visit(self, node: object, in_function: bool) -> None:
        if isinstance(node, list):
            self._parts.append(f"[{len(node)}")
            for part in node:
                self._visit(part, in_function)
        elif isinstance(node, ast.AST):
            self._parts.append(type(node).__name__)
            self._add_imports(node, in_function)
            is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            for name, value in ast.iter_fields(node):
                if name == "body" and (is_function or isinstance(node, ast.Module | ast.ClassDef)):
                    value = _without_docstring(value)
                # Empty fields are left out, because a later Python has more of them; `kind` is the u of u"text".
                if value not in (None, []) and name not in ("ctx", "kind"):
                    self._parts.append(name)
                    self._visit(value, in_function or is_function)
        else:
            self._parts.append(repr(node))

    def _add_imports(self, node: ast.AST, in_function: bool) -> None:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            # `from a import b` may import the module a.b.
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):  # relative: a metric of the user may have some
            above = self._file.parents[node.level - 1]
            package = []
            while (above / "__init__.py").is_file():
                package, above = [above.name, *package], above.parent
            package += [node.module] if node.module else []
            names = [".".join([*package, alias.name]) for alias in node.names]
        else:
            return
        self.imports += [(name, in_function) for name in names]


def _without_docstring(body: list[ast.stmt]) -> list[ast.stmt]:
    first = body[0] if body else None
    is_docstring = (
        isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and type(first.value.value) is str
    )
    return body[1:] if is_docstring else body
