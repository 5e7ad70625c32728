"""The identity of a run: everything that decides its weights. A checkpoint of another identity is refused with the differences.

The identity holds the settings that decide (configs/config.py: DECIDES), the tokens of the data and the order of documents, the
weights and the tokenizer of the base model, torch and transformers, and the code that train.py loads. It is plain JSON, section
-> name -> value or digest. Every checkpoint's manifest and record.jsonl hold the whole identity, an export its `fingerprint`.
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
from common.sha256 import sha256
from configs.config import DECIDES, FREE, READ, Config, as_dict
from configs.load import GENERAL, config_of, is_of_answers, parse_best_by
from data.tokens import load_tokenizer, tokenizer_fingerprint
from distributed.checkpoint_directory import checksum
from distributed.process_group import library_versions
from model.build import model_config_of
from model.weight_files import hash_weights, stored_tensors

if TYPE_CHECKING:
    from training.inputs import Inputs

ROOT = Path(__file__).resolve().parents[1]
# Keys of config.json that do not decide the weights.
NOT_OF_THE_MODEL = ("_name_or_path", "architectures", "dtype", "transformers_version", "use_cache")
# Modules that measure and do not decide the weights.
MEASURES = ("eval", "training.answers", "training.questions", "training.budget")
WITH_VERSIONS = ("torch", "transformers")  # also from a checkout, whose thousands of files are not read
OWN_SCORES = "eval.metric"  # scores answers if the user names no function
DOCUMENTED = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Module)
BODIES = ("body", "orelse", "finalbody", "handlers", "cases")
FIRST_STEP = "the first step"  # in "the data"
SHOWN = 8  # files or keys of a kind, in a message
WIDTH = 120  # characters of a value in a message

Identity = dict[str, Any]


# ---- The identity of a run -----------------------------------------------------------------------------------------------------


def hash_files(config: Config, script: str, say: Callable[[str], None]) -> Identity:
    """Return the part of a run's identity that is read from files: its code and the weights of its base.

    script: train.py's __file__. Call this before the data is read, which may take hours: this process does not run code that is
    edited meanwhile. Raise UserError if the weights of model.path are damaged.
    """
    code, scores = code_of(Path(script), scores_module(config))
    for source in (config.data, *config.data.mix):
        code |= code_of_row(source.row)
    return {"the weights": hash_weights(config.model.path, say), "the code": code, "the scores' code": scores}


def identity_of(
    config: Config, inputs: "Inputs", model_config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> Identity:
    """Return the identity of a run, as this rank has read it."""
    settings = {name: value for name, value in _settings(config).items() if name in DECIDES}
    if not config.ewc.strength:
        settings = {name: value for name, value in settings.items() if not name.startswith("ewc.")}
    if not inputs.train.anchored:
        settings.pop("forgetting.anchor_weight")
    mixture, old = inputs.train.mixture(), inputs.old_domain
    versions = {"torch": torch.__version__, "transformers": library_versions()["transformers"]}
    if config.optimizer.memory == "6N":
        versions["torchao"] = importlib.metadata.version("torchao")
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
            "the tokenizer": of_tokenizer(tokenizer, inputs.tokenizer_digest),
            "versions": versions,
            **inputs.files,
        }
    )


def of_tokenizer(tokenizer: PreTrainedTokenizerBase, digest: str) -> dict[str, str]:
    """Return the part of an identity that comes from the tokenizer and its template. digest: `tokenizer_fingerprint`."""
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    content = {"ids": digest, "special tokens": special, "chat template": tokenizer.chat_template}
    return {"of model.path": fingerprint(content)}


def of_model_config(model_config: PretrainedConfig) -> dict:
    """Return the part of an identity that comes from config.json of the base, with the RoPE of the training."""
    return _as_json({name: value for name, value in model_config.to_dict().items() if name not in NOT_OF_THE_MODEL})


def free_settings(config: Config, inputs: "Inputs", world_size: int, device: str) -> dict:
    """Return the settings that a resume may change, with the step counts and the machine's ranks and device, by name."""
    settings = {name: value for name, value in _settings(config).items() if name in READ + FREE}
    steps = {"steps in total": inputs.total_steps, "warm-up steps": inputs.warmup_steps}
    return _as_json(settings | steps | {"ranks": world_size, "computed on": device})


def fingerprint(identity: Identity) -> str:
    """Return the SHA-256 of an identity, as hexadecimal digits."""
    return checksum(identity)


def _settings(config: Config) -> dict:
    settings = {f"{section}.{key}": value for section, keys in as_dict(config).items() for key, value in keys.items()}
    # The alpha in use: another default of a later version must not pass as the same run.
    return settings | ({"lora.alpha": config.lora.effective_alpha} if config.lora.rank else {})


def _as_json(value: dict) -> dict:
    return json.loads(json.dumps(value, default=str))  # as a manifest returns it: tuples become lists


# ---- Comparing a checkpoint with a run -----------------------------------------------------------------------------


def changes_here(start: dict) -> list[str]:
    """Return a phrase for each difference between a start's identity, and its settings and base as they are now.

    start: its entry in the record, whose working directory is the current one. The base is the one that settings name.
    """
    saved, config = start["identity"], config_of(start["config"])
    base, read = Path(config.model.path).resolve(), start["files"]["the base"]  # which are compared already
    names = {tensor.file.relative_to(base).as_posix() for tensor in stored_tensors(base).values()}
    tokenizer = load_tokenizer(config.model.path, config.data.chat_template)
    now = saved | {"the tokenizer": of_tokenizer(tokenizer, tokenizer_fingerprint(tokenizer))}
    now["the weights"] = {name: read.get(str(base / name)) or sha256(base / name) for name in names}
    parts = {"settings": _as_json(_settings(config)), "config.json": of_model_config(model_config_of(config.model))}
    for part, content in parts.items():  # keys that only one version has are ignored
        now[part] = {name: content.get(name, value) for name, value in saved[part].items()}
    return differences(saved, now)


def differences(saved: Identity, current: Identity) -> list[str]:
    """Return a phrase for each difference between two identities; [] if they are equal."""
    phrases = []
    for section, suffix in (("settings", ""), ("config.json", " of config.json"), ("versions", "")):
        before, now = saved[section], current[section]
        phrases += [
            f"{name}{suffix}={_cut(before.get(name, 'not set'))}, now it is {_cut(now.get(name, 'not set'))}"
            for name in _differing(before, now)
        ]
    data = _differing(saved["the data"], current["the data"])
    phrases += [f"{'another' if name == 'data.mix' else 'other data in'} {name}" for name in data if name != FIRST_STEP]
    if data and not phrases:  # other data or another seed would give another order as well
        phrases.append("another order of documents")
    if weights := _differing(saved["the weights"], current["the weights"]):
        phrases.append(f"other weights in model.path ({_several(weights)})")
    if saved["the tokenizer"] != current["the tokenizer"]:
        phrases.append("another tokenizer in model.path")
    code = _differing(saved["the code"], current["the code"])
    # Scores decide the weights only if they choose the checkpoint or end the run. Other runs have none recorded.
    before, now = saved["the scores' code"], current["the scores' code"]
    code += _differing(before, now) if before and now else []
    code = [name for name in code if not any(part.endswith(f" of {name}") for part in code)]  # a function says more
    return [*phrases, f"other code in {_several(code)}"] if code else phrases


def check_identity(
    checkpoint: Path, saved: dict, identity: Identity, settings: dict, resume: str
) -> tuple[Identity, list[str]]:
    """Return the identity of the checkpoints after this start's first step, and messages for the user.

    saved: the state in the manifest of the checkpoint that is resumed. identity: of this start. settings: from `free_settings`.
    A changed identity lists its changes in `changed`, so its fingerprint differs from a run that began with the new settings.
    Raise UserError if the checkpoint has another identity and `resume` is not `changed`.
    """
    before, lines = saved["identity"], []
    changes = {
        name: f"{name}: {_cut(saved['settings'].get(name, 'not set'))} -> {_cut(settings.get(name, 'not set'))}"
        for name in _differing(saved["settings"], settings)
    }
    if phrases := differences(before, identity):
        difference = "; ".join(phrases)
        if resume != "changed":
            is_content = any(before[part] != identity[part] for part in ("the data", "the weights", "the tokenizer"))
            causes = [change for name, change in changes.items() if name in READ and is_content]
            why = f"; it may come from {'; '.join(causes)}" if causes else ""
            raise UserError(
                f"{checkpoint} was made with {difference}{why}; set it back, start a new run with another run.name, or continue with "
                "what is set now: run.resume=changed (not if tensors of the checkpoint have another shape or dtype now)"
            )
        lines.append(
            f"warning: {checkpoint} was made with {difference}; run.resume=changed continues with what is set now"
        )
        change = {"step": saved["step"], "from": fingerprint(before), "differences": phrases}
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


# ---- The code ------------------------------------------------------------------------------------------------------------


def scores_module(config: Config) -> str | None:
    """Return the module whose scores choose the best checkpoint or end the run, and so decide the weights; None without one.

    The losses of data.validation need no module: train.py computes them.
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
    """Return file -> digest of the code that `script` loads, and of the further code that the module `scores` loads.

    The code is the script and, transitively, every module that it imports at the top of a file or in a function, if the module
    lies beside the script, beside this package, in PYTHONPATH or in an editable installation. Other modules have versions. A
    digest is computed from the syntax tree, so comments, docstrings and formatting do not count. `MEASURES` are left out,
    because measurements do not decide the weights, unless they score (`scores_module`). Scores of answers include the code that
    generates the answers.
    """
    folders = _folders(scores, script.resolve().parent)
    code, more = _imported(folders, str(script.resolve()), excluded=MEASURES), {}
    # Users edit the loop, so each of its functions has a digest of its own.
    functions = [node for node in ast.parse(script.read_bytes()).body if isinstance(node, ast.FunctionDef)]
    loop = {f"{node.name} of {script.name}": _digest(node) for node in functions}
    if scores:
        answers = () if scores == "eval.forgetting" else ("training.answers",)
        more = _imported(folders, scores, excluded=()) | _imported(folders, *answers, excluded=(OWN_SCORES,))
    return code | loop, {name: digest for name, digest in more.items() if name not in code}


def code_of_row(row: str | None) -> dict[str, str]:
    """Return file -> digest of the module that data.row names and of its imports; {} without data.row."""
    module = row and row.partition(":")[0]
    return _imported(_folders(module), module, excluded=()) if module else {}


def digest_of_row(row: str | None) -> str:
    """Return a digest of the code of data.row, on which the tokenised data depend; an empty text without data.row."""
    code = code_of_row(row)
    return fingerprint(code) if code else ""


def _folders(module: str | None, *first: Path) -> list[Path]:
    """Return the folders of our modules and of the user's, including the folder of `module`."""
    more = [Path(folder).resolve() for folder in sys.path if folder]  # PYTHONPATH, and editable installations
    name, spec = (module or "").partition(".")[0], None
    if name and name not in sys.stdlib_module_names:
        with suppress(ImportError, ValueError):
            spec = importlib.util.find_spec(name)  # beside the loop, which may be elsewhere, or installed as editable
    if spec and (place := next(iter(spec.submodule_search_locations or ()), spec.origin)):
        more.append(Path(place).resolve().parent)
    libraries = {"site-packages", "dist-packages", Path(ast.__file__).parent.name}  # the last is python3.11, say
    return list(dict.fromkeys((*first, ROOT, *(folder for folder in more if not libraries & set(folder.parts)))))


def _imported(folders: list[Path], *names: str, excluded: Collection[str]) -> dict[str, str]:
    """Return file -> digest of these modules, or of the script at a path, and of all modules in `folders` that they import.

    A missing or broken module is left out: the import itself fails before anything is trained.
    """
    digests: dict[str, str] = {}
    waiting, seen = list(names), set()
    for name in waiting:
        if name in seen or any(f"{name}.".startswith(f"{package}.") for package in (*excluded, *WITH_VERSIONS)):
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
    """Return the file of a module or package, or of the script at a path; None if no folder has it."""
    if os.path.isabs(name):
        return Path(name)
    places = (folder.joinpath(*name.split(".")) for folder in folders)
    files = (file for place in places for file in (place / "__init__.py", place.with_suffix(".py")))
    return next(filter(Path.is_file, files), None)


def _name_of(file: Path, folders: list[Path]) -> str:
    """Return the file's path relative to the folder from which it is imported."""
    return file.relative_to(next(folder for folder in folders if file.is_relative_to(folder))).as_posix()


def read_module(file: Path, package: str) -> tuple[str, list[str]]:
    """Return the digest of a module's syntax tree, and the names that it imports, which may be functions as well as modules."""
    tree, names = ast.parse(file.read_bytes(), file), []
    for node in _statements(tree):
        if isinstance(node, ast.Import):
            names += (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            names += (f"{module}.{alias.name}" for alias in node.names)
    return _digest(tree), names


def _statements(tree: ast.FunctionDef | ast.Module) -> list[Any]:
    """Return a syntax tree and all statements in it, without expressions: these import nothing and have no docstring."""
    nodes: list[Any] = [tree]
    for node in nodes:
        nodes += (child for name in BODIES for child in getattr(node, name, ()))
    return nodes


def _digest(tree: ast.FunctionDef | ast.Module) -> str:
    """Return a digest of a syntax tree, after removing its docstrings in place."""
    for node in _statements(tree):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            del node.body[0]
    return hashlib.sha256(_text_of(tree).encode()).hexdigest()[:32]


def _text_of(node: Any) -> str:
    """Return the text of a syntax tree as `ast.dump` does, in a third of the time.

    Empty fields are left out, because a later Python has more fields.
    """
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
