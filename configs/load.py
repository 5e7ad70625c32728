"""Read a config file such as configs/quickstart.py, apply `section.key=value` overrides, and check every value.

The type hints of configs/config.py say how an override is read. Whatever is wrong raises a `UserError`: one sentence that
names the file or the key and says what to do.
"""

import argparse
import ast
import dataclasses
import datetime
import difflib
import json
import math
import re
import traceback
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

import configs.config as schema
from common.errors import UserError
from configs.config import Config, LoRA, Source

SECTIONS = get_type_hints(Config)
KEYS = {f"{name}.{key}": hint for name, section in SECTIONS.items() for key, hint in get_type_hints(section).items()}
# What other tools call our keys, where the names are not alike (docs/runs.md has a table of both).
ALIASES = {
    "lr": "optimizer.learning_rate",
    "batch_size": "batch.global_examples",
    "global_batch_size": "batch.global_examples",
    "per_device_train_batch_size": "batch.micro_batch",
    "val_set_size": "data.validation_share",
    "report_to": "run.log_to",
}

FORMATS = ("auto", "messages", "sharegpt", "alpaca", "completion", "text")
CHOICES = {
    "model.compute_dtype": ("bf16", "fp32"),
    "model.activation_checkpointing": ("none", "full", "selective", "offload"),
    "data.too_long": ("drop", "truncate", "error"),
    "data.format": FORMATS,
    "data.on_bad": ("error", "skip"),
    "data.train_on": ("all", "last"),
    "data.control_tokens": ("text", "error", "allow"),
    "optimizer.memory": ("16N", "14N", "12N", "8N", "6N"),
    "optimizer.stage": ("fine-tuning", "pre-training"),
    "ewc.estimator": ("model", "empirical"),
    "ewc.dtype": ("fp32", "bf16"),
    "ewc.device": ("device", "cpu"),
    "sharding.reduce_dtype": ("fp32", "bf16"),
    "sharding.strategy": ("full", "grad_op", "hybrid", "none"),
    "run.resume": ("auto", "changed", "previous", "never"),
    "run.export": ("last", "best"),
}
# (what the numbers of these keys must be, whether one is). All other numbers must be above 0.
RANGES: tuple[tuple[str, Callable[[float], bool], Sequence[str]], ...] = (
    (
        "0 or more",
        lambda number: 0 <= number < math.inf,
        (
            *("optimizer.weight_decay", "optimizer.warmup_steps", "ewc.strength", "lora.rank"),
            *("run.eval_every", "run.eval_generate", "run.save_every", "run.save_minutes", "run.stop_after_no_gain"),
        ),
    ),
    ("between 0 and 1", lambda number: 0 <= number <= 1, ("optimizer.warmup_ratio", "optimizer.min_lr_ratio")),
    ("at least 0 and below 1", lambda number: 0 <= number < 1, ("data.validation_share", "lora.dropout")),
    ("at least 0 and below 2^63", lambda number: 0 <= number < 2**63, ("run.seed", "ewc.seed")),
    ("above 0 and at most 10080 (a week)", lambda number: 0 < number <= 10080, ("run.timeout_minutes",)),
)
SINKS = ("tensorboard", "wandb", "mlflow")

# Our names of the keys of examples and messages (data/formats.py): what data.fields can rename.
EXAMPLE_FIELDS = (
    *("messages", "conversations", "instruction", "input", "output", "history", "system"),
    *("prompt", "completion", "text", "tools", "weight"),
)
MESSAGE_FIELDS = (
    *("role", "content", "from", "value", "tool_calls", "function_call", "tool_call_id", "name"),
    *("reasoning_content", "thinking", "weight", "train", "training"),
)

LOSS, NLL, GENERAL = "validation/loss", "validation/nll", "forgetting/"
# The curves whose better direction is known.
LOWER_IS_BETTER = (LOSS, NLL, "forgetting/perplexity_per_byte", "forgetting/kl")
HIGHER_IS_BETTER = (
    *(f"validation/{name}" for name in ("f1", "fact_f1", "exact_match", "rouge_l")),
    *("forgetting/agreement", "forgetting/questions"),
)


def read_command_line(
    description: str | None,
    world_size: int,
    say: Callable[[str], None],
    add_options: Callable[[argparse.ArgumentParser], None] | None = None,
) -> tuple[Config, argparse.Namespace]:
    """The config that sys.argv asks for, and all arguments: those of train.py, and the options of another program.

    A DeepSpeed JSON file is applied before the overrides; `say` gets a line for each of its settings. Raises UserError.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a config file, e.g. configs/quickstart.py")
    overrides = "settings that replace those of the config file, e.g. batch.global_examples=32"
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help=overrides)
    deepspeed = "apply the settings of a DeepSpeed JSON file to the config (docs/runs.md)"
    parser.add_argument("--deepspeed", metavar="FILE", help=deepspeed)
    if add_options:
        add_options(parser)
    else:  # train.py hands these two over before it comes here
        plan = "print the plan, its memory and its time, and end: scripts/plan.py --here, which has more options"
        parser.add_argument("--dry-run", action="store_true", help=plan)
        check = "prove the run and end, training nothing: scripts/check.py, which has more options"
        parser.add_argument("--check", action="store_true", help=check)
    arguments = parser.parse_intermixed_args()
    config = load_config(arguments.config)
    if arguments.deepspeed:
        from configs.deepspeed import from_deepspeed  # only for a run that names such a file

        config, notes = from_deepspeed(config, arguments.deepspeed, world_size)
        if arguments.overrides:
            notes.append(f"applied last, from the command line: {', '.join(arguments.overrides)}")
        for note in notes:
            say(f"deepspeed: {note}")
    return override(config, arguments.overrides), arguments


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Execute a config file, apply `section.key=value` overrides and check every value. Raises UserError."""
    path = Path(path)
    if not path.is_file():
        problem = "is a directory" if path.is_dir() else "does not exist"
        folder = path if path.is_dir() else path.parent if path.parent.is_dir() else Path("configs")
        files = [file for file in sorted(folder.glob("*.py")) if file.is_file()]
        runs = [str(file) for file in files if re.search(rb"^config\s*=", file.read_bytes(), re.MULTILINE)]
        available = ", ".join(runs) or f"none in {folder}, see configs/"
        raise UserError(f"config file {path} {problem}; available: {available}")
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
    config = namespace.get("config")
    if not isinstance(config, Config):
        raise UserError(f"{path} does not end with `config = Config(...)`")
    for name, section in SECTIONS.items():
        if type(getattr(config, name)) is not section:
            raise UserError(f"{path}: {name} must be {section.__name__}(...), not {getattr(config, name)!r}")
    return override(config, overrides)


def _explain(error: BaseException) -> str:
    """One sentence about an exception in a config file."""
    text = " ".join(str(error).split())
    unknown = re.match(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", text)
    missing = re.match(r"(\w+)\.__init__\(\) missing .*?: (.*)", text)
    undefined = re.match(r"name '(\w+)' is not defined|cannot import name '(\w+)' from 'configs.config'", text)
    if unknown and hasattr(schema, unknown[1]):
        section, key = unknown.groups()
        names = [field.name for field in dataclasses.fields(getattr(schema, section))]
        alias = ALIASES.get(key, "").rpartition(".")[2]
        return f"{section} has no key {key!r}{nearest(alias if alias in names else key, names)}"
    if missing:
        return f"{missing[1]} needs a value for {missing[2]}"
    if undefined:
        name = undefined[1] or undefined[2]
        sections = [section.__name__ for section in SECTIONS.values()]
        return f"{name} is not defined{nearest(name, ['Config', 'Source', *sections], 'a string needs quotes')}"
    if isinstance(error, SystemExit):
        return f"the file ends the program (SystemExit: {text or 0}); let it end with `config = Config(...)`"
    return f"{type(error).__name__}: {text}"


def override(config: Config, overrides: Sequence[str]) -> Config:
    """Apply overrides of the form `section.key=value` and check every value. Raises UserError."""
    for text in overrides:
        name, equals, raw = text.partition("=")
        if not equals or not re.fullmatch(r"([a-z_]+\.)?[a-z_]+", name):
            raise UserError(f"{text!r} is not an override; write section.key=value, e.g. optimizer.learning_rate=1e-5")
        if name not in KEYS:
            key = name.rpartition(".")[2]
            same = [ALIASES[key]] if key in ALIASES else [known for known in KEYS if known.endswith(f".{key}")]
            similar = nearest(name, list(KEYS), "configs/config.py describes all keys")
            raise UserError(f"unknown key {name}" + (f"; did you mean {same[0]}?" if same else similar))
        config = replace(config, name, _parse(raw, KEYS[name], name))
    check_config(config)
    return config


def replace(config: Config, name: str, value: object) -> Config:
    """The config with another value of `section.key`."""
    section, _, key = name.partition(".")
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **{key: value})})


def nearest(name: str, names: Sequence[str], otherwise: str = "") -> str:
    """The end of an error message for an unknown name: the most similar of `names`.

    If none is similar, the message ends with `otherwise`, or with all `names` if that is empty.
    """
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; {otherwise or 'known names: ' + ', '.join(names)}"


def _parse(raw: str, hint: object, name: str) -> object:
    """Convert the value of an override to the type of the key `name`. Raises UserError."""
    options = get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    kind = next(option for option in options if option is not type(None))
    none = raw.lower() in ("none", "null")
    if none and type(None) in options:
        return None
    if kind is str:
        return raw
    if kind is bool and raw.lower() in ("true", "false"):
        return raw.lower() == "true"
    if get_origin(kind) is dict:
        return parse_dict(raw, get_args(kind)[1], name)
    if kind == tuple[str, ...]:
        return () if none else _split(raw)
    if kind == tuple[Source, ...]:
        return () if none else tuple(map(_parse_source, _split(raw, ";")))
    try:
        value = ast.literal_eval(raw)
    except (ValueError, SyntaxError):
        value = raw
    if kind is float and type(value) is int:
        value = float(value)
    if kind is int and type(value) is float and value.is_integer() and "e" in raw.lower():
        value = int(value)  # e.g. 1e6 tokens
    if has_type(value, kind):
        return value
    if str in options:
        return raw
    raise UserError(f"{name} must be {type_name(hint)}, not {raw!r}")


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


def _split(text: str, separator: str = ",") -> tuple[str, ...]:
    return tuple(part for part in text.split(separator) if part)


def has_type(value: object, hint: object) -> bool:
    """Whether a value has the type of a field. A bool is not an int, an int is a float, tuple items are checked."""
    kinds = get_args(hint)
    if isinstance(hint, types.UnionType):
        return any(has_type(value, kind) for kind in kinds)
    if get_origin(hint) is dict:
        return isinstance(value, dict) and all(
            has_type(key, kinds[0]) and has_type(item, kinds[1]) for key, item in value.items()
        )
    if get_origin(hint) is tuple:
        if not isinstance(value, tuple):
            return False
        kinds = kinds[:1] * len(value) if kinds[-1] is Ellipsis else kinds
        return len(value) == len(kinds) and all(map(has_type, value, kinds))
    if hint is float:
        return type(value) in (int, float)
    return hint is object or type(value) is hint


def type_name(hint: object) -> str:
    """The type of a field in words, for error messages."""
    kinds = get_args(hint)
    if isinstance(hint, types.UnionType):
        return " or ".join(map(type_name, kinds))
    if get_origin(hint) is tuple:
        number = "" if kinds[-1] is Ellipsis else f"{len(kinds)} "
        return f"a tuple of {number}{type_name(kinds[0]).split()[-1]}s"
    if get_origin(hint) is dict:
        return "a dictionary of names and values"
    names = {Source: "a Source", str: "a string", int: "an integer", float: "a number", bool: "True or False"}
    return names.get(hint, "None")  # pyright: ignore


def check_config(config: Config) -> None:
    """Check types, choices, ranges and what goes together. Raises UserError for the first mistake."""
    for sentence in _mistakes(config):
        raise UserError(sentence)


def _mistakes(config: Config) -> Iterator[str]:
    """One sentence for each mistake. Only the first is sure: later checks rely on what earlier ones saw."""
    model, data, batch, optimizer, ewc = config.model, config.data, config.batch, config.optimizer, config.ewc
    sharding, lora, run, metric = config.sharding, config.lora, config.run, config.eval.metric
    if type(batch.micro_batch) is not int and batch.micro_batch != "auto":
        yield f'batch.micro_batch must be an integer or "auto", not {batch.micro_batch!r}'
    values = {name: attrgetter(name)(config) for name in KEYS}
    for name, hint in KEYS.items():
        if not has_type(values[name], hint):
            comma = f"; write ({values[name]!r},)" if has_type((values[name],), hint) else ""
            yield f"{name} must be {type_name(hint)}, not {values[name]!r}{comma}"
    for name, choices in CHOICES.items():
        if values[name] not in choices:
            yield f"{name} must be one of {', '.join(choices)}, not {values[name]!r}"
    ranges = {name: (words, holds) for words, holds, names in RANGES for name in names}
    for name, number in values.items():
        words, holds = ranges.get(name, ("above 0", lambda number: 0 < number < math.inf))
        if type(number) in (int, float) and not holds(number):
            yield f"{name} must be {words}, not {number!r}"

    if (batch.global_examples is None) == (batch.global_tokens is None):
        yield (
            "set exactly one of batch.global_examples (examples per step) and batch.global_tokens (target tokens per "
            "step), and the other to None"
        )
    if not all(0 <= beta < 1 for beta in optimizer.betas):
        yield f"optimizer.betas must be in [0, 1), not {optimizer.betas!r}"
    if not run.name or "/" in run.name or run.name.startswith(".") or len(run.name) > 200 or not run.name.isprintable():
        yield f"run.name must be a plain directory name, not {run.name!r}"

    if not data.train:
        yield "data.train is empty; name at least one file"
    yield from _mistakes_of_mix(data.mix)
    check_fields(data.fields, "data.fields")
    if data.cache == "":
        yield "data.cache is empty; name a directory, or set it to None"
    if data.validation_share and data.validation:
        yield "set data.validation (files) or data.validation_share (a part of data.train), not both"
    try:
        datetime.date.fromisoformat("2026-01-31" if data.chat_date is None else data.chat_date)
    except ValueError:
        yield f"data.chat_date must be a date like 2026-01-31, not {data.chat_date!r}"

    if sharding.reduce_dtype != "fp32" and sharding.strategy in ("none", "hybrid"):
        yield (
            f"sharding.reduce_dtype={sharding.reduce_dtype} needs sharding.strategy=full or grad_op: under "
            f"{sharding.strategy} the gradients of a step's micro-batches would be added up in it too"
        )
    if sharding.shard_size is not None and sharding.strategy != "hybrid":
        yield "sharding.shard_size applies to sharding.strategy=hybrid only; remove it or set sharding.strategy=hybrid"
    for name in ("lora.alpha", "lora.dropout", "lora.targets"):
        if not lora.rank and values[name] != getattr(LoRA(), name.partition(".")[2]):
            yield f"{name} applies to LoRA only; set lora.rank above 0, or remove {name}"
    if lora.dropout and model.activation_checkpointing != "none":
        yield (
            f"lora.dropout={lora.dropout:g} needs model.activation_checkpointing=none, because the second forward would "
            "drop other elements; set one of the two back"
        )
    if lora.rank and ewc.strength:
        yield (
            "ewc.strength above 0 needs lora.rank=0: the penalty holds trained weights at the base model's, and LoRA "
            "trains none of the base model's weights"
        )
    if ewc.strength and bool(ewc.data) == bool(ewc.fisher):
        yield "ewc.strength above 0 needs either ewc.data (old-domain files) or ewc.fisher (runs/NAME/ewc of another run)"

    # What is watched: curves, answers at evaluations, the best checkpoint.
    if set(run.log_to) - set(SINKS) or len(set(run.log_to)) < len(run.log_to):
        yield f"run.log_to must name each of {', '.join(SINKS)} at most once, not {', '.join(run.log_to)}"
    has_validation = bool(data.validation or data.validation_share)
    if run.eval_generate and not has_validation:
        yield "run.eval_generate answers examples of data.validation; set it or data.validation_share"
    if metric is not None and not re.fullmatch(r"(\w+\.)*\w+:\w+", metric):
        yield f"eval.metric must be MODULE:FUNCTION, not {metric!r}"
    if metric is not None and not run.eval_generate:
        yield "eval.metric scores the answers of run.eval_generate; set it to a number of examples"
    if run.profile is not None:
        parse_profile(run.profile)
    if run.stop_after_no_gain and not run.eval_every:
        yield "run.stop_after_no_gain counts evaluations; set run.eval_every to a number of steps"
    curve, _ = parse_best_by(run.best_by)
    if curve.startswith(GENERAL) and not run.eval_general:
        yield f"run.best_by={run.best_by} needs run.eval_general=True, which measures it"
    if is_of_answers(curve) and not run.eval_generate:
        yield f"run.best_by={run.best_by} needs run.eval_generate: it is a score of generated answers"
    if curve.startswith(f"{LOSS}/") and curve not in [
        f"{LOSS}/{source.name}" for source in data.mix if source.validation
    ]:
        yield f"run.best_by={run.best_by} needs a source of data.mix with that name and validation files"
    for name, asked in (("run.export=best", run.export == "best"), ("run.stop_after_no_gain", run.stop_after_no_gain)):
        if asked and curve in (LOSS, NLL) and not has_validation:
            yield (
                f"{name} needs data.validation or data.validation_share, because run.best_by={run.best_by} is measured "
                "on it"
            )


def _mistakes_of_mix(mix: tuple[Source, ...]) -> Iterator[str]:
    for source in mix:
        for key, hint in get_type_hints(Source).items():
            if not has_type(getattr(source, key), hint):
                yield f"data.mix: `{key}` of a Source must be {type_name(hint)}, not {getattr(source, key)!r}"
        if not re.fullmatch(r"[\w.-]+", source.name) or source.name == "main":
            yield (
                f"data.mix: {source.name!r} is not a valid source name; use letters, digits, `_`, `.` and `-`, but not "
                "the name main"
            )
        if not source.paths:
            yield f"data.mix: source {source.name} has no files; name at least one"
        if source.format not in FORMATS:
            yield f"data.mix: `format` of {source.name} must be one of {', '.join(FORMATS)}, not {source.format!r}"
        check_fields(source.fields, f"data.mix: `fields` of {source.name}")
        if not 0 < source.share < 1:
            yield f"data.mix: the share of {source.name} must be between 0 and 1, not {source.share!r}"
    names = [source.name for source in mix]
    if len(set(names)) < len(names):
        yield f"data.mix: the source names must be different from each other: {', '.join(names)}"
    if sum(source.share for source in mix) >= 1:
        yield "data.mix: the shares must add up to less than 1; data.train gets the rest"


def check_fields(fields: Mapping[str, str], name: str) -> None:
    """Check that the keys of a mapping from our names to those in the files are ours. Raises UserError."""
    known = list(dict.fromkeys((*EXAMPLE_FIELDS, *MESSAGE_FIELDS)))
    for ours, theirs in fields.items():
        if ours not in known:
            hint = f"; write KEY=NAME IN THE FILES: {theirs}={ours}" if theirs in known else nearest(ours, known)
            raise UserError(f"{name}: unknown key {ours!r}{hint}")
        if not theirs:
            raise UserError(f"{name}: {ours} has no name; write KEY=NAME IN THE FILES")


def parse_profile(text: str) -> tuple[int, int]:
    """(first step, counted from 1; number of steps) of a value of run.profile. Raises UserError."""
    if not re.fullmatch(r"[1-9]\d*:[1-9]\d*", text):
        raise UserError(f"run.profile must be STEP:COUNT, such as 100:3 for steps 100 to 102, not {text!r}")
    first, _, count = text.partition(":")
    return int(first), int(count)


def parse_best_by(text: str) -> tuple[str, str]:
    """(name of the curve, max or min) of a value of run.best_by. Raises UserError if the direction is not known.

    A name without a slash is one of `validation/`: f1 is validation/f1.
    """
    name, colon, direction = text.partition(":")
    curve = name if "/" in name else f"validation/{name}"
    if colon and direction in ("max", "min") and name:
        return curve, direction
    if colon or not name:
        raise UserError(f"run.best_by must be the name of a curve, NAME:max or NAME:min, not {text!r}")
    if curve in LOWER_IS_BETTER or curve.startswith(f"{LOSS}/"):
        return curve, "min"
    if curve in HIGHER_IS_BETTER:
        return curve, "max"
    raise UserError(
        f"run.best_by={text}: it is not known whether a high or a low {curve} is better; write run.best_by={name}:max or "
        f"run.best_by={name}:min{nearest(curve, (*LOWER_IS_BETTER, *HIGHER_IS_BETTER))}"
    )


def is_of_answers(curve: str) -> bool:
    """Whether a curve is a score of the answers of run.eval_generate."""
    return not curve.startswith((GENERAL, f"{LOSS}/")) and curve not in (LOSS, NLL)


def check_world(config: Config, world_size: int, ranks_per_node: int) -> None:
    """Check settings that depend on the number of ranks. Raises UserError.

    Under `hybrid` all copies of the model must have the same number of ranks. Without packing a step must fill every
    micro-batch on every rank.
    """
    shard_size = config.sharding.shard_size or ranks_per_node
    if config.sharding.strategy == "hybrid" and world_size % shard_size:
        divisors = ", ".join(str(n) for n in range(1, world_size + 1) if world_size % n == 0)
        raise UserError(
            f"sharding.strategy=hybrid: {world_size} ranks cannot be divided into groups of sharding.shard_size={shard_size}; "
            f"set it to one of {divisors}"
        )
    examples = config.batch.global_examples
    if config.data.packing or examples is None or config.batch.micro_batch == "auto":
        return
    rows = world_size * config.batch.rows
    if examples % rows:
        raise UserError(
            f"data.packing=False: batch.global_examples={examples} is not divisible by {world_size} ranks x batch.micro_batch="
            f"{config.batch.micro_batch}; set it to {max(1, examples // rows) * rows}, for example"
        )
