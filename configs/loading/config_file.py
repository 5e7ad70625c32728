"""Load a config file such as configs/quickstart.py and apply `section.key=value` overrides.

Values are checked for their types, and error messages suggest the nearest known name.
"""

import ast
import dataclasses
import json
import re
import traceback
import types
import typing
from collections.abc import Sequence
from pathlib import Path

import configs.config as schema
from common.errors import UserError
from configs.config import Config, Source
from configs.loading.checks import check_config, check_sections, has_type, type_name
from configs.loading.names import nearest


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Execute a config file, apply `section.key=value` overrides and check every value. Raises UserError."""
    path = Path(path)
    if not path.is_file():
        problem = "is a directory" if path.is_dir() else "does not exist"
        raise UserError(f"config file {path} {problem}; available: {_available_configs(path)}")
    config = _execute(path).get("config")
    if not isinstance(config, Config):
        raise UserError(f"{path} does not end with `config = Config(...)`")
    try:
        check_sections(config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return override(config, overrides)


def override(config: Config, overrides: Sequence[str]) -> Config:
    """Apply overrides of the form `section.key=value` and check every value. Raises UserError."""
    for text in overrides:
        config = _override(config, text)
    check_config(config)
    return config


def _execute(path: Path) -> dict:
    """Run a config file and return its global variables. Raises UserError for any exception in it, SystemExit included."""
    namespace: dict = {"__file__": str(path), "__name__": path.stem}
    try:
        exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), namespace)
    except SyntaxError as error:
        raise UserError(f"{path}, line {error.lineno}: {error.msg}") from error
    except (Exception, SystemExit) as error:  # exit() in a config file is a mistake, not the end of the run
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(path)]
        where = f"{path}, line {lines[-1]}" if lines else str(path)
        raise UserError(f"{where}: {_explain(error)}") from error
    return namespace


def _explain(error: BaseException) -> str:
    """One sentence about an exception in a config file."""
    unknown = re.match(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    missing = re.match(r"(\w+)\.__init__\(\) missing .*?: (.*)", str(error))
    undefined = re.match(r"name '(\w+)' is not defined|cannot import name '(\w+)' from 'configs.config'", str(error))
    if unknown and hasattr(schema, unknown[1]):
        names = [field.name for field in dataclasses.fields(getattr(schema, unknown[1]))]
        return f"{unknown[1]} has no key {unknown[2]!r}{nearest(unknown[2], names)}"
    if missing:
        return f"{missing[1]} needs a value for {missing[2]}"
    if undefined:
        name = undefined[1] or undefined[2]
        sections = [section.__name__ for section in typing.get_type_hints(Config).values()]
        return f"{name} is not defined{nearest(name, ['Config', 'Source', *sections], 'a string needs quotes')}"
    text = " ".join(str(error).split())
    if isinstance(error, SystemExit):
        return (
            f"the file ends the program ({type(error).__name__}: {text or 0}); let it end with `config = Config(...)`"
        )
    return f"{type(error).__name__}: {text}"


def _override(config: Config, text: str) -> Config:
    match = re.fullmatch(r"([a-z_]+)\.([a-z_]+)=(.*)", text, re.DOTALL)
    if not match:
        raise UserError(f"{text!r} is not an override; write section.key=value, e.g. optimizer.learning_rate=1e-5")
    section, key, raw = match.groups()
    keys = [
        f"{part.name}.{field.name}"
        for part in dataclasses.fields(Config)
        for field in dataclasses.fields(type(getattr(config, part.name)))
    ]
    if f"{section}.{key}" not in keys:
        elsewhere = [name for name in keys if name.endswith(f".{key}")]
        similar = nearest(f"{section}.{key}", keys, "configs/config.py describes all keys")
        hint = f"; did you mean {elsewhere[0]}?" if elsewhere else similar
        raise UserError(f"unknown key {section}.{key}{hint}")
    values = getattr(config, section)
    hint = typing.get_type_hints(type(values))[key]
    value = _parse(raw, hint, f"{section}.{key}")
    return dataclasses.replace(config, **{section: dataclasses.replace(values, **{key: value})})


def _parse(raw: str, hint: object, name: str) -> object:
    """Convert the value of an override to the type of the key `name`. Raises UserError."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if type(None) in options and raw.lower() in ("none", "null"):
        return None
    kind = next(option for option in options if option is not type(None))
    if kind is str:
        return raw
    if typing.get_origin(kind) is dict:
        return parse_dict(raw, typing.get_args(kind)[1], name)
    if kind is bool and raw.lower() in ("true", "false"):
        return raw.lower() == "true"
    if typing.get_origin(kind) is tuple and typing.get_args(kind)[0] is str:
        return () if raw.lower() in ("none", "null") else _split(raw)
    if typing.get_origin(kind) is tuple and typing.get_args(kind)[0] is Source:
        return () if raw.lower() in ("none", "null") else tuple(_parse_source(part) for part in raw.split(";") if part)
    try:
        value = ast.literal_eval(raw)
    except (ValueError, SyntaxError):
        value = raw
    if kind is float and type(value) is int:
        value = float(value)
    if kind is int and type(value) is float and value.is_integer() and "e" in raw.lower():
        value = int(value)  # e.g. 1e6 tokens
    if not has_type(value, kind):
        if str in options:
            return raw
        raise UserError(f"{name} must be {type_name(hint)}, not {raw!r}")
    return value


def parse_dict(raw: str, kind: object, name: str) -> dict[str, object]:
    """`key=value,key=value` as a dictionary. Unless only strings are allowed, a value is read as JSON where it is JSON."""
    values: dict[str, object] = {}
    for part in _split(raw):
        key, equals, text = part.partition("=")
        if not key or not equals:
            raise UserError(f"{name}: {part!r} is not a pair; write key=value,key=value")
        try:
            values[key] = text if kind is str else json.loads(text)
        except ValueError:
            values[key] = text
    return values


def _parse_source(text: str) -> Source:
    name, share, paths, validation = (*text.split(":"), *[""] * 4)[:4]
    try:
        if text.count(":") not in (2, 3):
            raise ValueError
        return Source(name, _split(paths), float(share), _split(validation))
    except ValueError as error:
        raise UserError(
            f"data.mix: {text!r} is not a source; write NAME:SHARE:FILE,FILE or NAME:SHARE:FILE,FILE:VALIDATION FILES, "
            "e.g. general:0.05:general.jsonl, and separate sources by ;"
        ) from error


def _split(text: str) -> tuple[str, ...]:
    return tuple(part for part in text.split(",") if part)


def _available_configs(path: Path) -> str:
    """The config files in the directory of `path`, for an error message: those that define `config`."""
    folder = path if path.is_dir() else path.parent if path.parent.is_dir() else Path("configs")
    files = [file for file in folder.glob("*.py") if file.is_file()]
    runs = [file for file in files if re.search(rb"^config\s*=", file.read_bytes(), re.MULTILINE)]
    return ", ".join(sorted(map(str, runs))) or f"none in {folder}, see configs/"
