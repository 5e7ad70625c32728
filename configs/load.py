"""Read a config file such as configs/quickstart.py, apply `section.key=value` overrides, and check every value.

Overrides are parsed by the type hints of configs/config.py. Every mistake raises a `UserError`: one sentence that names the
file or the key and the fix.
"""

import argparse
import ast
import dataclasses
import datetime
import difflib
import itertools
import json
import math
import os
import re
import traceback
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

import configs.config as schema
from common.errors import UserError, exit_code_of, exit_process
from configs.config import KEYS, SECTIONS, Config, Source

# Our key, or a sentence if there is none -> its names in other tools, if they differ (docs/runs.md has a table). An unknown key
# with such a name gets a suggestion and is not translated, because its values may mean something else here.
_ELSEWHERE = {
    "model.path": "model model.name model_name model_name_or_path base_model pretrained_model_name_or_path",
    "model.compute_dtype=bf16": "bf16 fp16 pure_bf16 dtype torch_dtype precision mixed_precision",
    "model.activation_checkpointing=full": "gradient_checkpointing use_gradient_checkpointing recompute "
    "gradient_checkpointing_kwargs enable_activation_checkpointing",
    "model.layer_class": "fsdp_transformer_layer_cls_to_wrap",
    "model.compile": "torch_compile",
    "model.rope_type": "rope_scaling rope_scaling_type",
    "data.train": "train_file train_files data.file data.files data_files dataset dataset_name dataset_path dataset_dir "
    "datasets data_path do_train",
    "data.validation": "validation_file eval_file eval_dataset test_datasets val_data eval_data data.test",
    "data.validation_share": "val_set_size val_size test_size",
    "data.fields": "dataset_text_field field_messages",
    "data.mix": "interleave_probs mix_strategy",
    "data.chat_template": "template chat_template_path chat_template_jinja",
    "data.max_samples": "max_train_samples",
    "data.sequence_length": "max_seq_length max_seq_len max_length sequence_len seq_len seq_length cutoff_len "
    "model_max_length block_size",
    "data.packing": "sample_packing pack_sequences packed padding_free group_by_length",
    "data.train_on=last": "mask_history train_on_last_turn",
    "batch.global_examples": "batch batch.size batch_size global_batch_size train_batch_size total_batch_size",
    "batch.global_examples decides it": "gradient_accumulation_steps grad_accum accumulate_grad_batches",
    "batch.micro_batch": "per_device_train_batch_size per_device_eval_batch_size micro_batch_size device_batch_size "
    "local_batch_size auto_find_batch_size",
    "optimizer.learning_rate": "lr peak_lr base_lr",
    "optimizer.epochs": "num_train_epochs num_epochs n_epochs max_epochs",
    "optimizer.max_steps": "steps max_iters train_steps num_steps",
    "optimizer.warmup_steps": "warmup num_warmup_steps warmup_iters",
    "optimizer.min_lr_ratio": "min_lr min_lr_rate cosine_min_lr_ratio",
    "optimizer.weight_decay": "wd decay",
    "optimizer.betas": "adam_beta1 adam_beta2 beta1 beta2",
    "optimizer.eps": "adam_epsilon epsilon adam_eps",
    "optimizer.max_grad_norm": "gradient_clipping grad_clip clip_grad clip_grad_norm gradient_clip_val max_norm",
    "lora.rank": "lora_r r lora_rank adapter use_peft peft use_lora",
    "lora.alpha": "lora_alpha",
    "lora.dropout": "lora_dropout",
    "lora.targets": "lora_target_modules target_modules lora_target lora_target_linear",
    "sharding.strategy": "fsdp fsdp_config fsdp_sharding_strategy zero_stage",
    "sharding.context": "context_parallel_size context_parallel_degree cp_size sequence_parallel_size sequence_parallel_degree",
    "run.directory": "output_dir output_directory logging_dir",
    "run.name": "run_name",
    "run.log_every": "logging_steps log_every_n_steps log_every_steps log_interval log_freq",
    "run.eval_every": "eval_steps eval_interval evals_per_epoch eval_strategy evaluation_strategy",
    "run.save_every": "save_steps save_interval saves_per_epoch save_strategy checkpoint_interval",
    "run.keep_last": "save_total_limit",
    "run.resume": "resume_from_checkpoint auto_resume_from_checkpoints overwrite_output_dir",
    "run.export=best": "load_best_model_at_end",
    "run.best_by": "metric_for_best_model",
    "run.stop_after_no_gain": "early_stopping_patience",
    "run.log_to": "report_to wandb_project use_wandb wandb logger metric_logger",
    "eval.max_new_tokens": "generation_max_length max_completion_length",
    "eval.metric": "compute_metrics predict_with_generate",
    "loss is on answers and completions alone": "train_on_inputs train_on_input train_on_prompt assistant_only_loss "
    "completion_only_loss roles_to_train train_on_eos",
    "it is edited in train.py (README.md, Edit the loop)": "lr_scheduler_type lr_scheduler optim optimizer _component_ loss "
    "loss_type label_smoothing label_smoothing_factor freeze_layers freeze_trainable_layers unfrozen_parameters",
    "it follows from the machine": "device use_cpu no_cuda flash_attention flash_attn "
    "use_flash_attention_2 sdp_attention attn_implementation dataloader_num_workers dataset_num_proc num_workers",
    "it needs no key: python scripts/export.py runs/NAME --out DIRECTORY --push ORG/NAME uploads a finished run": "push_to_hub "
    "hub_model_id hub_strategy hub_private_repo hub_token upload_to_hub",
    "it needs no key: the logits exist only in chunks, whatever the model (model/loss.py)": "use_liger_kernel use_liger "
    "liger_kernel use_liger_loss liger_fused_linear_cross_entropy cut_cross_entropy enable_liger_kernel",
    "it needs no key: tokenizer and special tokens are those of model.path": "tokenizer tokenizer_name tokenizer_name_or_path "
    "tokenizer_type pad_token eos_token special_tokens",
    "code from a model directory is never run": "trust_remote_code",
    "there is no counterpart here": "neftune_noise_alpha noisy_embedding_alpha load_in_4bit load_in_8bit quantization_bit",
    "give each example a message of the role system": "system system_prompt default_system",
    "it is an option, --deepspeed FILE": "deepspeed",
    "it was removed: delete those examples from the files, or let data.row return None for them": "exclude",
}
AS_JSON = {"True": "true", "False": "false", "None": "null"}  # how Python writes values
ALIASES = {name: key for key, names in _ELSEWHERE.items() for name in names.split()}
UNIONS = (types.UnionType, Union)
WORDS = {
    str: "a string",
    int: "an integer",
    float: "a number",
    bool: "True or False",
    types.NoneType: "None",
    tuple[str, ...]: "a tuple of strings",
    tuple[float, float]: "a tuple of 2 numbers",
    tuple[Source, ...]: "a tuple of Sources",
}
FORMATS: tuple[str, ...] = get_args(schema.Format)

# Form of an example -> keys that it needs. An example that fits several forms has the first.
REQUIRED = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "completion": ("prompt", "completion"),
    "text": ("text",),
    "tokens": ("input_ids",),
}
# Form -> keys that it may have.
OPTIONAL = {
    "messages": ("system", "tools", "weight"),
    "sharegpt": ("system", "tools", "weight"),
    "alpaca": ("input", "system", "history", "tools", "weight"),
    "completion": ("tools", "weight"),
    "text": ("weight",),
    "tokens": ("labels", "mask", "attention_mask", "weight"),
}
# Our names of the keys of examples and messages (data/formats.py): the names that data.fields may map.
EXAMPLE_FIELDS = tuple(dict.fromkeys(itertools.chain(*REQUIRED.values(), *OPTIONAL.values())))
MESSAGE_FIELDS = (
    *("role", "content", "from", "value", "tool_calls", "function_call", "tool_call_id", "name"),
    *("reasoning_content", "thinking", "weight", "train", "training"),
)

LOSS, NLL, GENERAL = "validation/loss", "validation/nll", "forgetting/"
# The better direction of each curve for which it is known.
BETTER = {
    **dict.fromkeys((LOSS, NLL, "forgetting/perplexity_per_byte", "forgetting/kl"), "min"),
    **dict.fromkeys((f"validation/{score}" for score in ("f1", "exact_match", "rouge_l")), "max"),
    **dict.fromkeys(("forgetting/agreement", "forgetting/questions"), "max"),
}


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser that suggests a setting for an unknown option, such as --learning_rate 1e-5 of other tools."""

    def error(self, message: str) -> NoReturn:
        if option := re.match(r"unrecognized arguments: --(\S+)", message):
            meant = nearest(
                option[1].partition("=")[0].replace("-", "_"), list(KEYS), "configs/config.py describes them"
            )
            raise UserError(f"there is no option --{option[1]} (--help); settings are section.key=value{meant}")
        super().error(message)


def read_command_line(
    description: str | None,
    world_size: int,
    say: Callable[[str], None],
    add_options: Callable[[argparse.ArgumentParser], None] | None = None,
) -> tuple[Config, argparse.Namespace]:
    """Parse sys.argv. Return the config and all arguments: train.py's, and those of `add_options` for another program.

    A DeepSpeed JSON file is applied before the overrides; `say` gets a line for each of its settings. Raise UserError for a
    mistake.
    """
    parser = _Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a config file, e.g. configs/quickstart.py")
    overrides = "settings that replace those of the config file, e.g. batch.global_examples=32"
    parser.add_argument("overrides", nargs="*", default=[], metavar="section.key=value", help=overrides)
    deepspeed = "apply the settings of a DeepSpeed JSON file to the config (docs/runs.md)"
    parser.add_argument("--deepspeed", metavar="FILE", help=deepspeed)
    if add_options:
        add_options(parser)
    else:  # train.py handles these two options before it calls this function
        plan = "print the plan, its memory and its time, and end: scripts/plan.py --here, which has more options"
        parser.add_argument("--dry-run", action="store_true", help=plan)
        check = "prove the run and end, training nothing: scripts/check.py, which has more options"
        parser.add_argument("--check", action="store_true", help=check)
    arguments = parser.parse_intermixed_args()
    config, notes = load_with_deepspeed(arguments.config, arguments.overrides, arguments.deepspeed, world_size)
    for note in notes:
        say(note)
    return config, arguments


def load_with_deepspeed(
    path: str | Path, overrides: Sequence[str], deepspeed: str | None, world_size: int
) -> tuple[Config, list[str]]:
    """Load a config as `load_config` does, after a DeepSpeed JSON file was applied to it if `deepspeed` names one.

    Return the config, and a line for each key of ours that the file sets (before -> after) and for the keys that are ignored.
    """
    if not deepspeed:  # apply both at once: an override may correct an invalid value of the file
        return load_config(path, overrides), []
    from configs.deepspeed import from_deepspeed  # only for a run that names such a file

    base = load_config(path, required_of(overrides))
    config, notes = from_deepspeed(base, deepspeed, world_size)
    notes += [f"applied last, from the command line: {', '.join(overrides)}"] if overrides else []
    return override(config, overrides), [f"deepspeed: {note}" for note in notes]


def required_of(overrides: Sequence[str]) -> list[str]:
    """Return the overrides of the keys without a default, which a config file may leave to the command line."""
    return [text for text in overrides if text.partition("=")[0] in EXAMPLES]


def check_command_line(description: str | None, check: Callable[[Config], None]) -> None:
    """Exit if the command line, the config or a setting has a mistake, or if `check` raises UserError; else return."""

    def read() -> None:
        check(read_command_line(description, int(os.environ.get("WORLD_SIZE", 1)), lambda note: None)[0])

    if code := exit_code_of(read):
        exit_process(code)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Execute a config file, apply `section.key=value` overrides and check every value. Raises UserError."""
    path = Path(path)
    if not path.is_file():
        folder = path if path.is_dir() else path.parent if path.parent.is_dir() else Path("configs")
        runs = [str(file) for file in sorted(folder.glob("*.py")) if re.search(rb"(?m)^config\s*=", file.read_bytes())]
        if "=" in path.name:
            raise UserError(
                f"{path} stands where the config file is expected: name the config first, settings after it"
            )
        problem = "is a directory" if path.is_dir() else "does not exist"
        raise UserError(f"config file {path} {problem}; available: {', '.join(runs) or 'none there, see configs/'}")
    if path.suffix in (".yaml", ".yml", ".json", ".toml"):
        raise UserError(f"{path} is no config: that is a Python file; docs/runs.md has the keys of other tools")
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


def config_of(values: dict) -> Config:
    """Rebuild a config from the JSON that `as_dict` has written.

    Raise TypeError for an unknown key, and for sections of another version of the code.
    """
    if values.keys() != SECTIONS.keys():
        raise TypeError(f"its sections are {', '.join(values)}, but this version has {', '.join(SECTIONS)}")
    parts = {}
    for section, kind in SECTIONS.items():
        settings = _with_tuples(values[section])
        if section == "data":
            settings["mix"] = tuple(Source(**_with_tuples(source)) for source in settings["mix"])
        parts[section] = kind(**settings)
    return Config(**parts)


def _with_tuples(values: dict) -> dict[str, Any]:
    """Return settings that were read from JSON with tuples instead of lists."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def _explain(error: BaseException) -> str:
    """Explain an exception in a config file in one sentence: Python's own, or a suggestion for an unknown key."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    keyword = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", text)
    if keyword and hasattr(schema, keyword[1]):
        names = [field.name for field in dataclasses.fields(getattr(schema, keyword[1]))]
        otherwise = f"known names: {', '.join(names)}"
        return f"{keyword[1]} has no key {keyword[2]!r}{nearest(keyword[2], [*names, *KEYS], otherwise)}"
    return text


def override(config: Config, overrides: Sequence[str]) -> Config:
    """Apply overrides of the form `section.key=value` and check every value. Raises UserError."""
    for text in overrides:
        name, equals, raw = text.partition("=")
        if not equals:
            raise UserError(f"{text!r} is not an override; write section.key=value, e.g. optimizer.learning_rate=1e-5")
        if name not in KEYS:
            raise UserError(f"unknown key {name}{nearest(name, list(KEYS), 'configs/config.py describes all keys')}")
        config = replace(config, name, _parse(raw, KEYS[name], name))
    names = {text.partition("=")[0] for text in overrides}
    if "data.validation" in names and "data.validation_share" not in names and config.data.validation:
        # Files that are named take the place of the config's share.
        config = replace(config, "data.validation_share", 0.0)
    check_config(config)
    return config


def replace(config: Config, name: str, value: object) -> Config:
    """Return the config with another value of `section.key`. An int becomes a float if the key has that type."""
    section, _, key = name.partition(".")
    if type(value) is int and has_type(0.5, KEYS[name]):
        value = float(value)
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **{key: value})})


def nearest(name: str, names: Sequence[str], otherwise: str = "") -> str:
    """Return the end of an error message for an unknown name: a suggestion from `names`.

    The suggestion is the key of that meaning if another tool uses the name (`ALIASES`), else a name with the same last part,
    else the most similar name. Without a suggestion the message ends with `otherwise`, or with all `names` if that is empty.
    """
    last = name.rpartition(".")[2]
    meant = ALIASES.get(name) or ALIASES.get(last) or last
    key = re.split("[=,]", meant)[0]
    same = [known for known in names if known in (key, key.rpartition(".")[2])]  # all keys, or those of one section
    if same:
        suggestion = same[0] + meant.removeprefix(key)
    elif " " in meant and KEYS.keys() <= set(names):
        return f"; {meant}"
    else:
        # Compare a name without a section with the keys alone, not with section.key.
        parts = {known if "." in name else known.rpartition(".")[2]: known for known in reversed(names)}
        close = [known for known in names if known.rpartition(".")[2] == last]
        suggestion = next(iter(close or map(parts.get, difflib.get_close_matches(name, parts, n=1, cutoff=0.7))), "")
    return f"; did you mean {suggestion}?" if suggestion else f"; {otherwise or 'known names: ' + ', '.join(names)}"


def _parse(raw: str, hint: object, name: str) -> object:
    """Parse an override to the type of its key. Return text that cannot be parsed unchanged; `check_config` refuses it."""
    value = {"none": None, "null": None, "true": True, "false": False}.get(raw.lower(), raw)
    if has_type(value, hint):
        return value
    if get_origin(hint) is dict:
        return parse_dict(raw, get_args(hint)[1], name)
    if get_origin(hint) is tuple and value is None:
        return ()
    if hint == tuple[str, ...]:
        return _split(raw)
    if hint == tuple[Source, ...]:
        return tuple(map(_parse_source, _split(raw, ";")))
    try:
        value = ast.literal_eval(raw)
    except (ValueError, SyntaxError):
        return raw
    if type(value) is float and value.is_integer() and not has_type(value, hint):
        return int(value)  # e.g. 1e6 tokens
    return value if has_type(value, hint) else raw


def parse_dict(raw: str, kind: object, name: str) -> dict[str, object]:
    """Parse `key=value,key=value`. Values are read as JSON or as True, False or None, unless `kind` is str."""
    values: dict[str, object] = {}
    for part in _split(raw):
        key, equals, text = part.partition("=")
        if not key or not equals:
            raise UserError(f"{name}: {part!r} is not a pair; write key=value,key=value")
        try:
            values[key] = text if kind is str else json.loads(AS_JSON.get(text, text))
        except ValueError:
            values[key] = text
    return values


def _parse_source(text: str) -> Source:
    """Parse NAME:SHARE:FILES, NAME:SHARE:FILES:VALIDATION FILES, or FILES=SHARE. A path may be a split of a dataset.

    SHARE may be SHARE:anchor. Raise UserError for any other text.
    """
    plain, anchors = re.subn(r"([:=][\d.e+-]+):anchor(?=:|$)", r"\1", text, count=1)
    parts = re.split(r":(?!//)", plain)  # the colon of a URL separates nothing
    files, equals, share = plain.rpartition("=")
    with suppress(ValueError):
        if len(parts) in (3, 4) and not (len(parts) == 4 and _is_split(f"{parts[2]}:{parts[3]}")):
            validation = _split("".join(parts[3:]))
            return Source(parts[0], _split(parts[2]), float(parts[1]), validation, anchor=bool(anchors))
    with suppress(ValueError):
        if files and equals:
            return Source(_name_of(_split(files)[0]), _split(files), float(share), anchor=bool(anchors))
    raise UserError(
        f"data.mix: {text!r} is not a source; write NAME:SHARE:FILE,FILE or NAME:SHARE:FILE,FILE:VALIDATION FILES, e.g. "
        "general:0.05:general.jsonl, or FILE,FILE=SHARE, e.g. ORG/NAME:SPLIT=0.05, write SHARE:anchor to train by KL to the "
        "base, and separate sources by ;"
    )


def _is_split(path: str) -> bool:
    """Return whether a path looks like ORG/NAME:SPLIT rather than like a file followed by a validation file."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+:\w+", path) is not None and not Path(path.partition(":")[0]).exists()


def _name_of(path: str) -> str:
    """Name a source after its path: the last part without suffixes; for a glob, its folder."""
    end = re.sub(r"/[^/]*[*\[].*", "", path).rstrip("/").rpartition("/")[2]
    return re.sub(r"[^\w.-]+", "-", end if ":" in end else end.partition(".")[0])


def _split(text: str, separator: str = ",") -> tuple[str, ...]:
    return tuple(part for part in text.split(separator) if part)


def has_type(value: object, hint: object) -> bool:
    """Return whether a value has the type of a key, items included. A bool is not an int; an int is a float."""
    origin, kinds = get_origin(hint), get_args(hint)
    if origin in UNIONS:
        return any(has_type(value, kind) for kind in kinds)
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in kinds)
    if origin is dict and isinstance(value, dict):
        return all(has_type(key, kinds[0]) and has_type(item, kinds[1]) for key, item in value.items())
    if origin is tuple and isinstance(value, tuple):
        kinds = kinds[:1] * len(value) if kinds[-1] is Ellipsis else kinds
        return len(value) == len(kinds) and all(map(has_type, value, kinds))
    return hint is object or type(value) is hint or (hint is float and type(value) is int)


def type_name(hint: object) -> str:
    """Return the type of a key in words, for error messages."""
    kinds = get_args(hint)
    if get_origin(hint) in UNIONS:
        return " or ".join(map(type_name, kinds))
    if get_origin(hint) is Literal:
        return ("one of " if len(kinds) > 1 else "") + ", ".join(map(str, kinds))
    return WORDS.get(hint, "a dictionary of names and values")  # pyright: ignore


# (words for a valid value, test of a value, the keys). Without a rule a number must be above 0, and a text not empty.
_RULES: tuple[tuple[str, Callable[[Any], object], str], ...] = (
    (
        "0 or more",
        lambda number: 0 <= number < math.inf,
        "optimizer.weight_decay optimizer.warmup_steps ewc.strength forgetting.max_kl lora.rank run.eval_every run.eval_generate run.save_every "
        "run.save_minutes run.stop_after_no_gain model.router_aux",
    ),
    ("between 0 and 1", lambda number: 0 <= number <= 1, "optimizer.warmup_ratio optimizer.min_lr_ratio"),
    (
        "at least 0 and below 1",
        lambda number: 0 <= number < 1,
        "data.validation_share lora.dropout forgetting.min_gain",
    ),
    ("above 0 and below 1", lambda number: 0 < number < 1, "data.mix.share forgetting.max_drop"),
    ("at least 0 and below 2^63", lambda number: 0 <= number < 2**63, "run.seed ewc.seed"),
    ("above 0 and at most 10080 (a week)", lambda number: 0 < number <= 10080, "run.timeout_minutes"),
    ("in [0, 1)", lambda betas: all(0 <= beta < 1 for beta in betas), "optimizer.betas"),
    ("a list of at least one file", bool, "data.train data.mix.paths"),
    ("made of letters, digits, _, . and -, but not main", re.compile(r"(?!main$)[\w.-]+").fullmatch, "data.mix.name"),
    ("a plain directory name", lambda name: re.fullmatch(r"[^./][^/]{0,199}", name) and name.isprintable(), "run.name"),
    ("a date like 2026-01-31", lambda text: _is_date(text), "data.chat_date"),
    ("MODULE:FUNCTION", re.compile(r"(\w+\.)*\w+:\w+").fullmatch, "data.row data.mix.row"),
    ("MODULE:FUNCTION, or the module of a task", re.compile(r"(\w+\.)*\w+(:\w+)?").fullmatch, "eval.metric"),
    ("STEP:COUNT, such as 100:3 for steps 100 to 102", re.compile(r"[1-9]\d*:[1-9]\d*").fullmatch, "run.profile"),
    (
        "each of tensorboard, wandb, mlflow at most once",
        lambda names: set(names) <= {"tensorboard", "wandb", "mlflow"} and len(set(names)) == len(names),
        "run.log_to",
    ),
)
RULES = {name: (words, holds) for words, holds, names in _RULES for name in names.split()}
# The keys that have no default, with the values of an example.
EXAMPLES = {"model.path": "artifacts/models/Qwen3-0.6B", "data.train": "chats.jsonl"}
ABOVE_0 = ("above 0", lambda number: 0 < number < math.inf)
NOT_EMPTY = ("a text that is not empty", lambda value: value != "")


def _is_date(text: str) -> bool:
    try:
        return bool(datetime.date.fromisoformat(text))
    except ValueError:
        return False


def check_config(config: Config) -> None:
    """Check types, choices, ranges and combinations. Raise UserError for the first mistake."""
    for sentence in filter(None, itertools.chain(_missing(config), _wrong_values(config), _wrong_together(config))):
        raise UserError(sentence)


def _missing(config: Config) -> Iterator[str]:
    """Yield a sentence if a config such as configs/sft.py still lacks its model or its data."""
    meanings = {
        "model.path": (
            config.model.path,
            "the directory of a model: scripts/fetch_base_model.py ORG/NAME downloads one",
        ),
        "data.train": (config.data.train, "your files: docs/data.md has their forms"),
    }
    missing = {key: meaning for key, (value, meaning) in meanings.items() if value in ("", ())}
    if missing:
        words = " and ".join(f"{key} ({meaning})" for key, meaning in missing.items())
        yield f"set {words}, e.g. {' '.join(f'{key}={EXAMPLES[key]}' for key in missing)}"


def _wrong_values(config: Config) -> Iterator[str | None]:
    """Yield for each value a sentence if it is invalid, else None. data.mix is read last, when its type has been checked."""
    for name, hint in KEYS.items():
        yield wrong_value(name, hint, attrgetter(name)(config))
    for source in config.data.mix:
        for key, hint in get_type_hints(Source).items():
            yield wrong_value(f"data.mix.{key}", hint, getattr(source, key))


def wrong_value(name: str, hint: object, value: Any) -> str | None:
    """Return a sentence if the key `name` of type `hint` cannot have this value, else None."""
    words, holds = RULES.get(name, ABOVE_0 if type(value) in (int, float) else NOT_EMPTY)
    if not has_type(value, hint):
        comma = f"; write ({value!r},)" if has_type((value,), hint) else ""
        return f"{name} must be {type_name(hint)}, not {value!r}{comma}"
    return None if value is None or holds(value) else f"{name} must be {words}, not {value!r}"


def _wrong_together(config: Config) -> Iterator[str]:
    """Yield a sentence for each invalid combination of values, each of which is valid by itself."""
    data, sharding, lora, run = config.data, config.sharding, config.lora, config.run
    if (config.batch.global_examples is None) == (config.batch.global_tokens is None):
        yield (
            "set exactly one of batch.global_examples (examples per step) and batch.global_tokens (target tokens per "
            "step), and the other to None"
        )
    if data.validation_share and data.validation:
        yield (
            "set data.validation (files) or data.validation_share (a part of data.train), not both; data.validation=none "
            "takes back the files of a config, data.validation_share=0 the share"
        )
    ewc_sources = bool(config.ewc.data) + bool(config.ewc.fisher)
    if config.ewc.strength and ewc_sources != (config.ewc.estimator != "l2"):
        yield (
            "ewc.strength above 0 needs either ewc.data (old-domain files) or ewc.fisher (runs/NAME/ewc of another run), and "
            "neither of them with ewc.estimator=l2"
        )
    check_fields(data.fields, "data.fields")
    for source in data.mix:
        check_fields(source.fields, f"data.mix: `fields` of {source.name}")
    if len({source.name for source in data.mix}) < len(data.mix) or sum(source.share for source in data.mix) >= 1:
        yield (
            "data.mix: the sources need different names, which NAME:SHARE:FILES gives them, and shares that add up to less than "
            "1; data.train gets the rest"
        )
    curve, _ = parse_best_by(run.best_by)
    curves_of_sources = [f"{LOSS}/{source.name}" for source in data.mix if source.validation]
    validation = "data.validation or data.validation_share"
    has_validation = data.validation or data.validation_share
    has_curve = has_validation or curve not in (LOSS, NLL)
    # (key, condition for any value but the key's default, the condition in words)
    needs = (
        ("sharding.shard_size", sharding.strategy == "hybrid", "sharding.strategy=hybrid"),
        # Under hybrid and none, FSDP would also sum the gradients of a step's micro-batches in that dtype.
        ("sharding.reduce_dtype", sharding.strategy in ("full", "grad_op"), "sharding.strategy=full or grad_op"),
        ("data.split_by", data.validation_share, "data.validation_share above 0"),
        *((f"lora.{key}", lora.rank, "lora.rank above 0") for key in ("alpha", "dropout", "targets")),
        # Checkpointing computes a layer twice, and the second pass would drop other elements.
        ("lora.dropout", config.model.activation_checkpointing == "none", "model.activation_checkpointing=none"),
        ("forgetting.anchor_weight", any(source.anchor for source in data.mix), "a source of data.mix with anchor"),
        ("sharding.context", not any(source.anchor for source in data.mix), "a data.mix without anchor"),
        ("lora.dropout", config.model.mlp_tiles == 1, "model.mlp_tiles=1"),
        # The selective policy would keep the products of all tiles.
        (
            "model.mlp_tiles",
            config.model.activation_checkpointing != "selective",
            "model.activation_checkpointing=full, offload or none",
        ),
        # torch.compile takes minutes to trace checkpoints of tiles with a symbolic length.
        ("model.mlp_tiles", not config.model.compile, "model.compile=False"),
        ("ewc.strength", not lora.rank, "lora.rank=0, because LoRA trains none of the weights that the penalty holds"),
        ("forgetting.max_drop", config.forgetting.keep, "forgetting.keep, whose answers eval.metric scores"),
        *(
            (f"forgetting.{key}", holds, requirement)
            for key in ("max_kl", "max_drop")
            for holds, requirement in (
                (run.eval_general, "run.eval_general=True, which shows the KL while the run trains"),
                (has_validation, f"{validation}, on which {curve} is measured"),
                (not curve.startswith(GENERAL), "a run.best_by that scores the task"),
            )
        ),
        *(
            (f"forgetting.{key}", config.forgetting.has_budget, "forgetting.max_kl or max_drop")
            for key in ("strict", "min_gain", "keep")
        ),
        ("forgetting.general_text", config.forgetting.keep, "forgetting.keep, on which the budget then holds alone"),
        ("forgetting.general_text", config.forgetting.max_drop is None, "no forgetting.max_drop, which leaves no KL"),
        ("run.eval_generate", has_validation, f"{validation}, whose examples are answered"),
        ("run.stop_after_no_gain", run.eval_every, "run.eval_every, because it counts evaluations"),
        ("run.stop_after_no_gain", has_curve, f"{validation}, on which {curve} is measured"),
        ("run.export", has_curve, f"{validation}, on which {curve} is measured"),
        ("run.best_by", run.eval_general or not curve.startswith(GENERAL), "run.eval_general=True, which measures it"),
        ("run.best_by", run.eval_generate or not is_of_answers(curve), "run.eval_generate, whose answers it scores"),
        (
            "run.best_by",
            curve in curves_of_sources or not curve.startswith(f"{LOSS}/"),
            "a source of data.mix with that name and validation files",
        ),
    )
    for name, holds, requirement in needs:
        section, _, key = name.partition(".")
        value = attrgetter(name)(config)
        if value != getattr(SECTIONS[section], key) and not holds:
            yield f"{name}={value} needs {requirement}"


def check_fields(fields: Mapping[str, str], name: str) -> None:
    """Check that the keys of a mapping from our names to the files' names are ours. Raise UserError."""
    known = list(dict.fromkeys((*EXAMPLE_FIELDS, *MESSAGE_FIELDS)))
    for ours, theirs in fields.items():
        if ours not in known:
            hint = f"; write KEY=NAME IN THE FILES: {theirs}={ours}" if theirs in known else nearest(ours, known)
            raise UserError(f"{name}: unknown key {ours!r}{hint}")
        if not theirs:
            raise UserError(f"{name}: {ours} has no name; write KEY=NAME IN THE FILES")


def parse_best_by(text: str) -> tuple[str, str]:
    """Return (curve, "max" or "min") for a value of run.best_by. Raise UserError if the direction is not known.

    A name without a slash is a curve of `validation/`: f1 is validation/f1.
    """
    name, _, chosen = text.partition(":")
    curve = name if "/" in name else f"validation/{name}"
    direction = chosen or BETTER.get(LOSS if curve.startswith(f"{LOSS}/") else curve)
    if name and direction in ("max", "min"):
        return curve, direction
    raise UserError(
        f"run.best_by={text} must be the name of a curve, and NAME:max or NAME:min where it is not known which value is the "
        f"better one{nearest(curve, list(BETTER))}"
    )


def is_of_answers(curve: str) -> bool:
    """Return whether a curve is a score of the answers of run.eval_generate."""
    return not curve.startswith((GENERAL, f"{LOSS}/")) and curve not in (LOSS, NLL)


def check_world(config: Config, world_size: int, ranks_per_node: int) -> None:
    """Check the settings that depend on the number of ranks. Raise UserError.

    Under `hybrid` all copies of the model must have the same number of ranks. Without packing a step must fill every
    micro-batch on every rank.
    """
    context = config.sharding.context
    if world_size % context:
        raise UserError(
            f"sharding.context={context}: groups of {context} ranks share a micro-batch, and {world_size} is not a multiple of "
            f"{context}; start so many ranks, or set it to a divisor of {world_size}"
        )
    shard_size = config.sharding.shard_size or ranks_per_node
    if config.sharding.strategy == "hybrid" and world_size % shard_size:
        raise UserError(
            f"sharding.strategy=hybrid: {world_size} ranks cannot be divided into groups of sharding.shard_size={shard_size}; "
            f"set it to a divisor of {world_size}"
        )
    examples = config.batch.global_examples
    if config.data.packing or examples is None or config.batch.micro_batch == "auto":
        return
    groups = world_size // context
    rows = groups * config.batch.rows
    if examples % rows:
        raise UserError(
            f"data.packing=False: batch.global_examples={examples} is not divisible by {groups} "
            f"{'ranks' if context == 1 else f'groups of {context} ranks'} x batch.micro_batch="
            f"{config.batch.micro_batch}; set it to {max(1, examples // rows) * rows}, for example"
        )
