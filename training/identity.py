"""A run's identity: everything that decides its weights. A checkpoint of another identity is refused, by what differs.

It has the settings that decide (configs/config.py: DECIDES), the tokens of the data and the order of documents, the weights
and the tokenizer of the base model, torch and transformers, and the code that train.py loads. It is plain JSON, section ->
name -> value or digest, in the manifest of every checkpoint; its `fingerprint` is in the export, and all of it in record.jsonl.
"""

import ast
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import sys
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from common.errors import UserError
from configs.config import DECIDES, FREE, READ, Config, as_dict
from configs.load import GENERAL, is_of_answers, parse_best_by
from distributed.agreement import library_versions
from distributed.checkpoint_directory import read_manifest
from model.fingerprint import fingerprint_of_tokenizer
from model.weight_files import hash_weights

if TYPE_CHECKING:
    from training.inputs import Inputs

ROOT = Path(__file__).resolve().parents[1]
# Of config.json: what decides nothing that is trained.
NOT_OF_THE_MODEL = ("_name_or_path", "architectures", "dtype", "transformers_version", "use_cache")
# Imported in functions by what measures and decides nothing.
MEASURES = ("eval", "training.answers", "training.asked", "training.budget")
OWN_SCORES = "eval.metric"  # of answers, without a function of the user's
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
INSIDE = ("body", "handlers", "cases", "orelse", "finalbody")  # fields of a statement that hold statements
FIRST_STEP, EXCLUDED = "the first step", "data.exclude"  # in "the data"
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
    for source in (config.data, *config.data.mix):
        code |= code_of_row(source.row)
    return {"the weights": hash_weights(config.model.path, say), "the code": code, "the scores' code": scores}


def identity_of(
    config: Config, inputs: "Inputs", model_config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> Identity:
    """Everything that decides the weights of a run, on this rank."""
    settings = {name: value for name, value in _settings(config).items() if name in DECIDES}
    if not config.ewc.strength:
        settings = {name: value for name, value in settings.items() if not name.startswith("ewc.")}
    if not inputs.train.anchored:
        settings.pop("forgetting.anchor_weight")
    if config.lora.rank:  # the alpha that holds: another default of a later version must not pass as the same run
        settings["lora.alpha"] = config.lora.effective_alpha
    mixture, old = inputs.train.mixture(), inputs.old_domain
    excluded = {EXCLUDED: inputs.exclusion.fingerprint} if inputs.exclusion else {}
    versions = {"torch": torch.__version__, "transformers": library_versions()["transformers"]}
    if config.optimizer.memory == "6N":
        versions["torchao"] = importlib.metadata.version("torchao")
    shape = {name: value for name, value in model_config.to_dict().items() if name not in NOT_OF_THE_MODEL}
    return _as_json(
        {
            "settings": settings,
            "the data": {
                "data.train": inputs.train.sources[0].fingerprint,
                "data.mix": mixture,
                "ewc.data": old.fingerprint if old and config.ewc.strength else None,
                FIRST_STEP: hashlib.sha256(repr(inputs.plan.batch(0).items).encode()).hexdigest(),
                **excluded,
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
    found += [f"{'another' if name == 'data.mix' else 'other data in'} {name}" for name in data if name != FIRST_STEP]
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
    code = [name for name in code if not any(other.endswith(f" of {name}") for other in code)]  # a function says more
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
    """The module whose figures decide the weights, because they choose the best checkpoint or end the run; else None.

    The losses of data.validation are none of these: train.py computes them.
    """
    curve, _ = parse_best_by(config.run.best_by)
    if config.run.export != "best" and not config.run.stop_after_no_gain:
        return None
    if curve.startswith(GENERAL):
        return "eval.forgetting"
    if not is_of_answers(curve):
        return None
    return config.eval.metric.partition(":")[0] if config.eval.metric else OWN_SCORES


def code_of(script: Path, scores: str | None = None) -> tuple[dict[str, str], dict[str, str]]:
    """(the code that `script` loads, the code of the module `scores` that the other has not): file -> digest.

    That is the script and every module beside it or beside this package that it imports, at the top of a file or in a
    function, and so on. A digest is that of the syntax tree: comments, docstrings and formatting do not count. Imports of
    `MEASURES` in a function are not followed: what is measured decides nothing, unless it scores (`scores_module`). What
    scores answers does so with what generates them.
    """
    folders = list(dict.fromkeys((script.resolve().parent, ROOT)))
    code = _closure([script.resolve()], folders, MEASURES)
    functions = ast.parse(
        script.read_bytes(), script
    ).body  # of the loop, which its users edit, each has a digest as well
    loop = {f"{node.name} of {script.name}": _digest(node) for node in functions if isinstance(node, ast.FunctionDef)}
    if scores is None:
        return _by_name(code, folders) | loop, {}
    try:
        spec = importlib.util.find_spec(scores)  # as eval.metric is found: beside the script, or in PYTHONPATH
        file = Path(spec.origin if spec and spec.origin else "").resolve(strict=True)
        home = file.parents[scores.count(".") + (file.name == "__init__.py")]
        if "site-packages" not in file.parts:  # an installed package has a version; what it imports is no code of ours
            folders = list(dict.fromkeys((*folders, home)))
        found = _closure([file], folders, ())
        if scores != "eval.forgetting":
            found |= _closure([ROOT / "training" / "answers.py"], folders, (OWN_SCORES,))
    except (Exception, SystemExit):
        # An error in the user's code: eval/metric.py says in one sentence what is wrong, before anything is trained.
        return _by_name(code, folders) | loop, {scores: "cannot be imported"}
    more = {file: digest for file, digest in found.items() if file not in code}
    return _by_name(code, folders) | loop, _by_name(more, [*folders, home])


def code_of_row(row: str | None) -> dict[str, str]:
    """The code of the module that data.row names and of what it imports, as `code_of`; empty without one."""
    if row is None:
        return {}
    try:
        spec = importlib.util.find_spec(row.partition(":")[0])
        file = Path(spec.origin if spec and spec.origin else "").resolve()
        folders = [file.parent, ROOT]
        return _by_name(_closure([file], folders, ()), folders)
    except (Exception, SystemExit):
        return {}  # data/formats.py says in one sentence what is wrong, before anything is trained


def digest_of_row(row: str | None) -> str:
    """A digest of the code of data.row, on which the tokenised data depend; an empty text without one."""
    code = code_of_row(row)
    return fingerprint(code) if code else ""


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
    known: set[str] = set()  # modules whose files have been looked for in these folders
    while files:
        file = files.pop()
        if file in code:
            continue
        imports, code[file] = read_module(file)
        for name, is_late in imports:
            if name in known or (is_late and any(f"{name}.".startswith(f"{one}.") for one in not_late)):
                continue
            found = _files_of(name, folders)
            if not found and (home := _home_of(name.partition(".")[0])) and home not in folders:
                folders.append(home)  # a module of the user in PYTHONPATH
                known.clear()
                found = _files_of(name, folders)
            known.add(name)
            files += found
    return code


def read_module(file: Path) -> tuple[list[tuple[str, bool]], str]:
    """(the modules that a file may import, as `_imports`, and the digest of its syntax tree)."""
    tree = ast.parse(file.read_bytes(), file)
    return list(_imports(tree.body, file)), _digest(tree)


@functools.cache
def _home_of(name: str) -> Path | None:
    """The folder from which a module is imported; None for the standard library and installed packages, which have versions."""
    if name in sys.stdlib_module_names:
        return None
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
    folders = list(spec.submodule_search_locations or ()) if spec else []  # of a package, also without an __init__.py
    place = folders[0] if folders else spec and spec.origin
    if not place or {"site-packages", "dist-packages"} & set(Path(place).parts):
        return None
    if name in importlib.metadata.packages_distributions():  # installed as editable; asked last: it reads all packages
        return None
    return Path(place).resolve().parent


def _files_of(name: str, folders: list[Path]) -> list[Path]:
    """The files that `import NAME` runs, if they are in one of the folders: of the packages above it, and its own."""
    parts = name.split(".")
    for folder in folders:
        paths = [folder.joinpath(*parts[:depth]) for depth in range(1, len(parts) + 1)]
        files = [file for path in paths for file in (path / "__init__.py", path.with_suffix(".py")) if file.is_file()]
        if files:
            return files
    return []


def _imports(statements: list[ast.stmt], file: Path, in_function: bool = False) -> Iterator[tuple[str, bool]]:
    """The modules that these statements of `file` may import, each with whether only a call of a function does so."""
    for node in statements:
        for name in _imported_by(node, file):
            yield name, in_function
        inside = in_function or isinstance(node, FUNCTIONS)
        # No process loads what is imported for types.
        is_for_types = isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for field in INSIDE[is_for_types:]:
            if statements_inside := getattr(node, field, None):
                yield from _imports(statements_inside, file, inside)


def _imported_by(node: ast.AST, file: Path) -> list[str]:
    """The modules that a statement of this file may import."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    package = [node.module] if node.module else []
    if node.level:  # relative: a metric of the user may have some
        above = file.parents[node.level - 1]
        while (above / "__init__.py").is_file():
            package, above = [above.name, *package], above.parent
    # `from a import b` may import the module a.b.
    return [".".join([*package, alias.name]) for alias in node.names]


def _digest(tree: ast.FunctionDef | ast.Module) -> str:
    """A digest of a syntax tree, from which this removes the docstrings."""
    _remove_docstrings(tree)
    return hashlib.sha256(_in_words(tree).encode()).hexdigest()[:32]


def _remove_docstrings(node: ast.AST) -> None:
    """From a statement, and from those inside it: every start of a run does this with all of its code."""
    if isinstance(node, (*FUNCTIONS, ast.ClassDef, ast.Module)) and ast.get_docstring(node, clean=False) is not None:
        del node.body[0]
    for field in INSIDE:
        for statement in getattr(node, field, ()):
            _remove_docstrings(statement)


def _in_words(node: object) -> str:
    """A syntax tree as text. It has no empty fields, because a later Python has more of them, and not the u of u"text"."""
    if isinstance(node, list):
        return f"[{', '.join(map(_in_words, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    words = [
        f"{name}={_in_words(value)}"
        for name in _fields_of(type(node))
        if (value := getattr(node, name, None)) is not None and value != []
    ]
    return f"{type(node).__name__}({', '.join(words)})"


@functools.cache
def _fields_of(kind: type[ast.AST]) -> tuple[str, ...]:
    return tuple(name for name in kind._fields if name not in ("ctx", "kind"))
