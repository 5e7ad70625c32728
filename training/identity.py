"""A run's identity: everything that decides its weights. A checkpoint of another identity is refused, by what differs.

It has the settings that decide (configs/config.py: DECIDES), the tokens of the data and the order of documents, the weights
and the tokenizer of the base model, torch and transformers, and the code that train.py loads. It is plain JSON, section ->
name -> value or digest, in the manifest of every checkpoint; its `fingerprint` is in the export, and all of it in record.jsonl.
"""

import ast
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from common.errors import UserError
from configs.config import DECIDES, FREE, READ, Config, as_dict
from configs.load import GENERAL, is_of_answers, parse_best_by
from distributed.checkpoint_directory import checksum
from distributed.process_group import library_versions
from model.weight_files import hash_weights

if TYPE_CHECKING:
    from training.inputs import Inputs

ROOT = Path(__file__).resolve().parents[1]
# Of config.json: what decides nothing that is trained.
NOT_OF_THE_MODEL = ("_name_or_path", "architectures", "dtype", "transformers_version", "use_cache")
# What measures and decides nothing.
MEASURES = ("eval", "training.answers", "training.asked", "training.budget")
WITH_VERSIONS = ("torch", "transformers")  # also from a checkout, whose thousands of files are not read
OWN_SCORES = "eval.metric"  # of answers, without a function of the user's
DOCUMENTED = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Module)
BODIES = ("body", "orelse", "finalbody", "handlers", "cases")
FIRST_STEP = "the first step"  # in "the data"
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
    versions = {"torch": torch.__version__, "transformers": library_versions()["transformers"]}
    if config.optimizer.memory == "6N":
        versions["torchao"] = importlib.metadata.version("torchao")
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    of_chats = {"special tokens": special, "chat template": tokenizer.chat_template}
    return _as_json(
        {
            "settings": settings,
            "the data": {
                "data.train": inputs.train.sources[0].fingerprint,
                "data.mix": mixture,
                "ewc.data": old.fingerprint if old and config.ewc.strength else None,
                FIRST_STEP: hashlib.sha256(repr(inputs.plan.batch(0).items).encode()).hexdigest(),
            },
            "config.json": of_model_config(model_config),
            "the tokenizer": {"of model.path": fingerprint({"ids": inputs.of_tokenizer, **of_chats})},
            "versions": versions,
            **inputs.files,
        }
    )


def of_model_config(model_config: PretrainedConfig) -> dict:
    """The part of an identity that config.json of the base decides, with RoPE as it is trained."""
    return _as_json({name: value for name, value in model_config.to_dict().items() if name not in NOT_OF_THE_MODEL})


def free_settings(config: Config, inputs: "Inputs", world_size: int, device: str) -> dict:
    """What may change between two starts, name -> value: settings, and what follows from them and from the machine."""
    settings = {name: value for name, value in _settings(config).items() if name in READ + FREE}
    steps = {"steps in total": inputs.total_steps, "warm-up steps": inputs.warmup_steps}
    return _as_json(settings | steps | {"ranks": world_size, "computed on": device})


def fingerprint(identity: Identity) -> str:
    """Return the SHA-256 of an identity, as hexadecimal digits."""
    return checksum(identity)


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
                "what is set now: run.resume=changed (not if tensors of the checkpoint have another shape or dtype now)"
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

    That is the script and every module beside it, beside this package, in PYTHONPATH or installed as editable that it imports, at
    the top of a file or in a function, and so on; others have versions. A digest is that of the syntax tree: comments, docstrings
    and formatting do not count. `MEASURES` are left out: what is measured decides nothing, unless it scores (`scores_module`). What
    scores answers does so with what generates them.
    """
    folders = _folders(scores, script.resolve().parent)
    code, more = _imported(folders, str(script.resolve()), excluded=MEASURES), {}
    # Of the loop, which its users edit, each function has a digest as well.
    functions = [node for node in ast.parse(script.read_bytes()).body if isinstance(node, ast.FunctionDef)]
    loop = {f"{node.name} of {script.name}": _digest(node) for node in functions}
    if scores:
        answers = () if scores == "eval.forgetting" else ("training.answers",)
        more = _imported(folders, scores, excluded=()) | _imported(folders, *answers, excluded=(OWN_SCORES,))
    return code | loop, {name: digest for name, digest in more.items() if name not in code}


def code_of_row(row: str | None) -> dict[str, str]:
    """The code of the module that data.row names and of what it imports, as `code_of`; empty without one."""
    module = row and row.partition(":")[0]
    return _imported(_folders(module), module, excluded=()) if module else {}


def digest_of_row(row: str | None) -> str:
    """A digest of the code of data.row, on which the tokenised data depend; an empty text without one."""
    code = code_of_row(row)
    return fingerprint(code) if code else ""


def _folders(module: str | None, *first: Path) -> list[Path]:
    """Where modules of ours and of the user are, `module` among them."""
    more = [Path(folder).resolve() for folder in sys.path if folder]  # PYTHONPATH, and what is installed as editable
    name, spec = (module or "").partition(".")[0], None
    if name and name not in sys.stdlib_module_names:
        with suppress(ImportError, ValueError):
            spec = importlib.util.find_spec(name)  # beside the loop, which may be elsewhere, or installed as editable
    if spec and (place := next(iter(spec.submodule_search_locations or ()), spec.origin)):
        more.append(Path(place).resolve().parent)
    libraries = {"site-packages", "dist-packages", Path(ast.__file__).parent.name}  # the last is python3.11, say
    return list(dict.fromkeys((*first, ROOT, *(folder for folder in more if not libraries & set(folder.parts)))))


def _imported(folders: list[Path], *names: str, excluded: Collection[str]) -> dict[str, str]:
    """The files in `folders` of these modules, or of the script at a path, and of all that they import -> the digest of each.

    A module that is not there or has an error is left out: what needs it says so in one sentence, before anything is trained.
    """
    digests: dict[str, str] = {}
    waiting, seen = list(names), set()
    for name in waiting:
        if name in seen or any(f"{name}.".startswith(f"{other}.") for other in (*excluded, *WITH_VERSIONS)):
            continue
        seen.add(name)
        package = "" if os.path.isabs(name) else name.rpartition(".")[0]
        waiting += [package] if package else []  # its __init__.py is run first
        if file := _file_of(name, folders):
            with suppress(ImportError, SyntaxError, ValueError):
                digest, imported = read_module(file, name if file.name == "__init__.py" else package)
                digests[_name_of(file, folders)] = digest
                waiting += imported
    return dict(sorted(digests.items()))


def _file_of(name: str, folders: list[Path]) -> Path | None:
    """The file of a module or package, or of the script at a path; None if it is in none of the folders."""
    if os.path.isabs(name):
        return Path(name)
    places = (folder.joinpath(*name.split(".")) for folder in folders)
    files = (file for place in places for file in (place / "__init__.py", place.with_suffix(".py")))
    return next(filter(Path.is_file, files), None)


def _name_of(file: Path, folders: list[Path]) -> str:
    """The file as a user knows it: relative to the folder that is imported from."""
    return file.relative_to(next(folder for folder in folders if file.is_relative_to(folder))).as_posix()


def read_module(file: Path, package: str) -> tuple[str, list[str]]:
    """(the digest of a module's syntax tree, the names that it imports, which need not be those of modules)."""
    tree, names = ast.parse(file.read_bytes(), file), []
    for node in _statements(tree):
        if isinstance(node, ast.Import):
            names += (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            names += (f"{module}.{alias.name}" for alias in node.names)
    return _digest(tree), names


def _statements(tree: ast.FunctionDef | ast.Module) -> list[Any]:
    """A syntax tree, and all statements in it: an expression imports nothing and has no docstring."""
    nodes: list[Any] = [tree]
    for node in nodes:
        nodes += (child for name in BODIES for child in getattr(node, name, ()))
    return nodes


def _digest(tree: ast.FunctionDef | ast.Module) -> str:
    """A digest of a syntax tree, from which this removes the docstrings."""
    for node in _statements(tree):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            del node.body[0]
    return hashlib.sha256(_text_of(tree).encode()).hexdigest()[:32]


def _text_of(node: Any) -> str:
    """A syntax tree as `ast.dump` writes it, without empty fields, of which a later Python has more; in a third of its time."""
    if isinstance(node, list):
        return f"[{', '.join(map(_text_of, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    kind, fields = type(node), []
    for name in node._fields:
        value = getattr(node, name, None)
        if value != [] and (value is not None or getattr(kind, name, ...) is not None):  # a constant may be None
            fields.append(f"{name}={_text_of(value)}")
    return f"{kind.__name__}({', '.join(fields)})"
