"""Export a checkpoint of a run or a model directory: what is written, and the proof that it is what was trained.

The model card beside it is training/model_card.py. The export that a run itself writes at its end is training/ending.py.
"""

import json
import shutil
import typing
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerBase

from common.dtypes import DTYPES as COMPUTE_DTYPES
from common.dtypes import dtype_name
from common.durable_files import new_directory
from common.errors import UserError
from configs.config import Config, Source
from data.batches import MicroBatch
from data.chat_settings import read_chat_settings
from data.encoding import ExampleEncoder
from data.tokens import load_tokenizer
from distributed.checkpoint_directory import (
    check_whole,
    checkpoint_name,
    complete_checkpoints,
    latest_checkpoint,
    read_manifest,
    weights_digest,
)
from distributed.process_group import Ranks
from model.adapter import Adapter, adapter_of_checkpoint, merge, write_adapter
from model.architectures import read_model_config
from model.fingerprint import fingerprint_of_base
from model.language_model import PackedLanguageModel, build_on_meta, materialize, parameter_names
from model.vocabulary.rows import first_new_row
from model.weights import Weights, average, converted, weights_of_checkpoint, weights_of_directory, write_weights
from training.ending import RECORD
from training.export_files import read_json, write_files
from training.model_card import profile_of

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CHOOSE_STEP, COPY_AGAIN = "name a step with --step", "copy it again"
# In the directory of a run. What is written there would be taken for its own export, checkpoint or results.
OF_A_RUN = ("adapter", "checkpoints", "eval", "ewc", "export", "tensorboard")
# Of a model directory: the weights, and what describes other weights or was made for the directory as a whole.
NOT_COPIED = ("*.safetensors", "*.index.json", "*.bin", "*.gguf", "*.tmp", "README.md", RECORD, "fetched.json")


@dataclass(frozen=True)
class Run:
    """A run directory. config: of its newest start. state: that of the exported checkpoint; empty if it is not known."""

    directory: Path
    config: Config
    state: dict


@dataclass(frozen=True)
class Subject:
    """Weights to export and what goes with them.

    weights: of the model, with adapters merged; None if an adapter is exported as it is. adapter: of a LoRA run. identity:
    plain JSON that tells the weights from others, kept in export.json. words: the same for people. write_rest: writes
    config, tokenizer and generation settings to a folder. base: the directory of the base model, if known.
    """

    path: Path
    model_config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    weights: Weights | None
    adapter: Adapter | None
    identity: dict
    words: str
    write_rest: Callable[[Path], None]
    run: Run | None
    base: Path | None


def read_subject(path: Path, options: Namespace, ranks: Ranks) -> Subject:
    """The run or the model directory at `path`. Raises UserError if it is neither, or damaged.

    options: the command line of scripts/export.py. A run whose checkpoints are gone is represented by its `export/`. The
    base is that of --base, or the run's model.path.
    """
    run = _read_run(path)
    if run is None:
        if options.step is not None or options.best:
            raise UserError(f"{path} is not the directory of a run, so it has no steps; leave out --step and --best")
        return _of_directory(path, _read_run(path.parent) if path.name == "export" else None, options)
    checkpoint, kind = _choose_checkpoint(run, options)
    if checkpoint is not None:
        return _of_checkpoint(run, checkpoint, kind, options, ranks)
    if not (path / "export").is_dir():
        raise UserError(f"{path} has neither a checkpoint nor an export: let the run finish first")
    return _of_directory(path / "export", run, options)


def _read_run(directory: Path) -> Run | None:
    path = directory / "config.json"
    record = read_json(path, COPY_AGAIN) if path.is_file() else {}
    if not {"config", "start_step"} <= record.keys():  # that of a model
        return None
    checkpoints = directory / "checkpoints"
    newest = latest_checkpoint(checkpoints) if checkpoints.is_dir() and complete_checkpoints(checkpoints) else None
    state = read_manifest(newest, CHOOSE_STEP)["state"] if newest else {}
    return Run(directory, _config_of_record(record["config"], path), state)


def _config_of_record(sections: dict, where: Path) -> Config:
    """The Config in a run's config.json. Raises UserError for keys that this version of the code does not have."""
    parts = {}
    for section, kind in typing.get_type_hints(Config).items():
        values = _with_tuples(sections.get(section, {}))
        unknown = sorted(values.keys() - {field.name for field in fields(kind)})
        if unknown:
            raise UserError(
                f"{where}: {section}.{unknown[0]} is no setting of this version of the code; export with the version that "
                "trained the run"
            )
        if section == "data":
            values["mix"] = tuple(Source(**_with_tuples(source)) for source in values.get("mix", ()))
        parts[section] = kind(**values)
    return Config(**parts)


def _with_tuples(values: dict) -> dict[str, typing.Any]:
    """Settings from JSON, whose lists were tuples."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def _choose_checkpoint(run: Run, options: Namespace) -> tuple[Path | None, str]:
    """(the checkpoint to export, what it is: last, best or chosen); (None, "") if the run has none and none is named.

    Without --step and --best it is the one that the run itself exports. Raises UserError if there is no such checkpoint.
    """
    folder = run.directory / "checkpoints"
    steps = [int(path.name.removeprefix("step-")) for path in complete_checkpoints(folder)] if folder.is_dir() else []
    names = ", ".join(map(str, steps)) or "none"
    if options.step is not None:
        if options.step not in steps:
            raise UserError(f"{run.directory} has no checkpoint of step {options.step}; those that it has: {names}")
        return folder / checkpoint_name(options.step), "chosen"
    best = run.state.get("best_step")
    if (options.best or run.config.run.export == "best") and best in steps:
        return folder / checkpoint_name(best), "best"
    if options.best:
        why = "no evaluation of a trained model" if best is None else f"no longer the best checkpoint, step {best}"
        raise UserError(f"{run.directory} has {why}; {CHOOSE_STEP}: {names}")
    return (folder / checkpoint_name(run.state["step"]), "last") if steps else (None, "")


def _of_checkpoint(run: Run, checkpoint: Path, kind: str, options: Namespace, ranks: Ranks) -> Subject:
    check_whole(checkpoint, ranks, f"{CHOOSE_STEP}, or train again")
    settings, lora = run.config.model, run.config.lora
    if options.merge_lora and not lora.rank:
        raise UserError(f"{run.directory} trained all weights, not an adapter; leave out --merge-lora")
    base = options.base or Path(settings.path)
    if not (base / "config.json").is_file():
        raise UserError(f"the base model of {run.directory}, {base}, is not there; name its directory with --base")
    model_config = read_model_config(str(base), settings.rope_type, settings.rope_factor, settings.rope_original_length)
    model = build_on_meta(model_config)
    tokenizer = load_tokenizer(str(base), run.config.data.chat_template)
    if settings.rope_type:
        tokenizer.model_max_length = model_config.max_position_embeddings
    state = read_manifest(checkpoint)["state"]
    weights, adapter = None, None
    if lora.rank:
        adapter = adapter_of_checkpoint(checkpoint, lora.rank, lora.effective_alpha, lora.dropout)
        if options.merge_lora:
            frozen = COMPUTE_DTYPES.get(settings.compute_dtype)
            weights = merge(weights_of_directory(base, model), adapter, frozen)
    else:
        weights = weights_of_checkpoint(checkpoint, model)

    def write_rest(folder: Path) -> None:
        if weights is None:
            tokenizer.save_pretrained(folder)
        else:
            write_files(folder, run.config, model_config, tokenizer)

    return Subject(
        checkpoint,
        model_config,
        tokenizer,
        weights,
        adapter,
        {"weights": kind, "step": state["step"], "checkpoint": weights_digest(checkpoint)},
        f"the {kind} weights of {run.directory} (step {state['step']}){', an adapter' if weights is None else ''}",
        write_rest,
        replace(run, state=state),
        base,
    )


def _of_directory(path: Path, run: Run | None, options: Namespace) -> Subject:
    if not (path / "config.json").is_file():
        raise UserError(f"{path} is neither the directory of a run nor that of a model: it has no config.json")
    if options.merge_lora and not (run and run.config.lora.rank):
        raise UserError(f"{path} is no run with a checkpoint of an adapter; leave out --merge-lora")
    model_config = read_model_config(str(path))
    exported = read_json(path / RECORD, COPY_AGAIN) if (path / RECORD).is_file() else {}
    identity = {key: exported[key] for key in ("weights", "step", "checkpoint") if key in exported}
    if run and run.state.get("step") != identity.get("step"):  # the newest checkpoint is not the one in the export
        run = replace(run, state={key: run.state[key] for key in ("meaning", "settings") if key in run.state})

    def write_rest(folder: Path) -> None:
        for file in sorted(path.iterdir()):
            if file.is_file() and not any(file.match(pattern) for pattern in NOT_COPIED):
                shutil.copyfile(file, folder / file.name)

    return Subject(
        path,
        model_config,
        load_tokenizer(str(path)),
        weights_of_directory(path, build_on_meta(model_config)),
        None,
        identity | {"fingerprint": fingerprint_of_base(path)},
        f"the weights of {path}",
        write_rest,
        run,
        options.base or (Path(run.config.model.path) if run else None),
    )


def base_of(subject: Subject) -> Path:
    """The directory of the base model. Raises UserError if it is unknown or gone."""
    if subject.base is None or not (subject.base / "config.json").is_file():
        gone = "is unknown" if subject.base is None else f"is not at {subject.base}"
        raise UserError(f"the base model of {subject.path} {gone}; name its directory with --base")
    return subject.base


def final_weights(subject: Subject, options: Namespace) -> Weights:
    """The weights to write: of the model, or of the adapter. Raises UserError if they cannot be averaged."""
    if options.average_with_base is None:
        return subject.weights or typing.cast(Adapter, subject.adapter).weights
    if subject.weights is None:
        raise UserError(f"{subject.path} has an adapter: --average-with-base needs --merge-lora")
    path = base_of(subject)
    base = weights_of_directory(path, build_on_meta(read_model_config(str(path))))
    return average(base, subject.weights, options.average_with_base, first_new_row(path))


def record_of(subject: Subject, options: Namespace) -> dict:
    """What export.json says of the weights: two exports with the same record hold the same weights."""
    averaged, dtype = None, DTYPES.get(options.dtype)
    if options.average_with_base is not None:
        averaged = {"share_of_tuned": options.average_with_base, "base": fingerprint_of_base(base_of(subject))}
    if dtype is None:  # auto; adapters are small, and are kept in what they were trained in
        stored = getattr(subject.model_config, "dtype", None) or torch.bfloat16
        dtype = stored if subject.weights else torch.float32
    kind = "model" if subject.adapter is None else "merged" if subject.weights else "adapter"
    return subject.identity | {"kind": kind, "dtype": dtype_name(dtype), "averaged": averaged}


def default_out(subject: Subject, record: dict) -> Path:
    """RUN/export-step-000120-bfloat16 and the like. Raises UserError if the subject is no run."""
    if subject.run is None:
        raise UserError("name the directory to write with --out")
    parts = ["export", *([f"step-{record['step']:06d}"] if record.get("step") else []), record["dtype"]]
    parts += [record["kind"]] * (record["kind"] != "model")
    parts += [f"average-{record['averaged']['share_of_tuned']:g}"] if record["averaged"] else []
    return subject.run.directory / "-".join(parts)


def is_written(out: Path, record: dict, run: Run | None) -> bool:
    """Whether `out` already is this export. Raises UserError if something else is there, or belongs there."""
    if run and out.resolve().is_relative_to(run.directory.resolve()):
        inside = out.resolve().relative_to(run.directory.resolve()).parts
        if inside and inside[0] in OF_A_RUN:
            raise UserError(f"{run.directory / inside[0]} belongs to the run; name another directory with --out")
    if not out.exists():
        return False
    try:
        written = json.loads((out / RECORD).read_text(encoding="utf-8"))
        sizes, _ = written.pop("files"), written.pop("profile", None)
        whole = all((out / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"{out} exists and is not an export of this script; name another directory with --out"
        ) from None
    if written != record or not whole:
        what = "an export of other weights" if written != record else "a damaged export of these weights"
        raise UserError(f"{out} is {what}; remove it, or name another directory with --out")
    return True


def write_export(out: Path, subject: Subject, weights: Weights, record: dict, base: dict, card: str) -> int:
    """Write the directory `out`, which is complete or absent. Returns the bytes of the weights.

    weights, record: from `final_weights` and `record_of`. base, card: from training/model_card.py.
    """
    dtype = getattr(torch, record["dtype"])
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    with new_directory(out) as folder:
        if subject.weights is None:
            named, adapter = base["hub_id"] or str(base_of(subject)), typing.cast(Adapter, subject.adapter)
            size = write_adapter(folder, adapter, named, lambda name, tensor: converted(name, tensor, dtype))
        else:
            size = write_weights(folder, weights, dtype)
        subject.write_rest(folder)
        if subject.weights is not None:
            # Servers load the weights in the dtype that config.json names.
            path = folder / "config.json"
            content = json.loads(path.read_text(encoding="utf-8"))
            keys = [key for key in ("dtype", "torch_dtype") if key in content] or ["dtype"]
            path.write_text(json.dumps(content | dict.fromkeys(keys, record["dtype"]), indent=2) + "\n")
        for file in base["files"]:  # many licences ask to keep their text with the weights
            if not (folder / file.name).exists():
                shutil.copyfile(file, folder / file.name)
        sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
        # The profile says how scripts/analyze.py must ask. It is no part of the weights: its data card may be gone later.
        profile = profile_of(subject.run.config) if subject.run else None
        content = json.dumps(record | {"profile": profile, "files": sizes}, indent=1)
        (folder / RECORD).write_text(content + "\n", encoding="utf-8")
        (folder / "README.md").write_text(card, encoding="utf-8")
    return size


def base_warning(subject: Subject, record: dict) -> str | None:
    """A warning if weights are averaged with another base, or an adapter merged into another, than that of the run."""
    trained_from = subject.run and subject.run.state.get("meaning", {}).get("the weights of model.path")
    is_used = record["averaged"] or record["kind"] == "merged"
    if not (is_used and trained_from) or fingerprint_of_base(base_of(subject)) == trained_from:
        return None
    return f"warning: the weights in {subject.base} are not those that the run was started from"


# ---- the proof ----------------------------------------------------------------------------------------------------------

# Largest difference of two logits that rounding in fp32 explains, as a share of the largest logit: between this project's
# forward over packed documents and transformers' over each, it was at most FIGURE (26 architectures, SmolLM2-135M).
FP32_ROUNDING = 1e-4
TEXTS = (
    "The competent authority shall require the institution to hold own funds of at least 8% of its total risk exposure.",
    "Total assets: EUR 1,284,930,551\nCommon Equity Tier 1 ratio: 13.42%\nLiquidity coverage ratio: 141.7%\nLeverage: 5.1%",
    "A train leaves at 9:40 and arrives at 11:05. It therefore takes 85 minutes, of which it stands still for seven.",
    "def mean(values):\n    if not values:\n        raise ValueError('no values')\n    return sum(values) / len(values)\n",
)
SWEEP = 64  # tokens spread evenly over the vocabulary: their rows of the embedding are compared too


def verify(out: Path, subject: Subject, weights: Weights, record: dict) -> tuple[bool, list[str]]:
    """(whether `out` is what was trained and is ready to be used, one line for each finding).

    transformers, for an adapter with peft, loads `out`. Its logits in fp32 must be those of the trained weights, rounded to
    the dtype of the export and put into the model as it is trained here. What that rounding costs is said beside it: the
    logits of the export as it is served against those of the trained weights. Needs the memory of one model in fp32.
    """
    dtype = getattr(torch, record["dtype"])
    tokenizer = load_tokenizer(str(out))
    rows = subject.model_config.vocab_size
    if len(tokenizer) > rows:
        return False, [f"the tokenizer has {len(tokenizer)} tokens, the embedding {rows} rows"]
    documents = [torch.tensor(tokenizer(text)["input_ids"]) for text in TEXTS]
    documents.append(torch.linspace(0, rows - 1, min(SWEEP, rows)).long())
    model = build_on_meta(subject.model_config)
    home = subject.path if (subject.path / "config.json").is_file() else base_of(subject)  # of the same shapes
    materialize(model, str(home), torch.device("cpu"))
    stored = weights  # of the model, or of the adapter alone
    rounded = Weights(stored.shapes, lambda name: converted(name, stored.read(name), dtype))
    if subject.weights is None:
        adapter, base = typing.cast(Adapter, subject.adapter), weights_of_directory(base_of(subject), model)
        weights, rounded = merge(base, adapter), merge(base, replace(adapter, weights=rounded))
    trained, expected = (_logits_as_trained(model, each, documents) for each in (weights, rounded))
    del model
    loaded, problem = _load(out, subject, torch.float32)
    if problem:
        return False, [problem]
    found = _logits(loaded, documents)
    difference, tolerance = (found - expected).abs().max().item(), FP32_ROUNDING * expected.abs().max().item()
    other = [name for name in rounded.shapes if subject.weights and not _holds(loaded, name, rounded)]
    if not difference <= tolerance or other:
        which = f"; {len(other)} tensors are not the trained ones: {', '.join(other[:3])}" if other else ""
        return False, [
            f"{out} is NOT the weights that were trained: its logits, computed in fp32 by transformers, differ by up to "
            f"{difference:.3g} from theirs, where rounding explains {tolerance:.1g}{which}; remove it and export again"
        ]
    if subject.weights is not None:  # an adapter has no generation_config.json of its own
        stops = loaded.generation_config.eos_token_id
        untaught = set(ExampleEncoder(tokenizer, read_chat_settings(out)).stop_ids) - set(_as_list(stops))
        if untaught:
            return False, [f"generation from {out} does not stop at {sorted(untaught)}, which end an answer"]
    if dtype != torch.float32:
        del loaded
        found = _logits(_load(out, subject, dtype)[0], documents)
    if not torch.isfinite(found).all():
        return False, [f"the logits of {out} are not finite in {record['dtype']}; export with --dtype bf16"]
    kl = F.kl_div(found.log_softmax(-1), trained.log_softmax(-1), log_target=True, reduction="batchmean").item()
    agreement = (found.argmax(-1) == trained.argmax(-1)).float().mean().item()
    whose = "the trained weights" if record["averaged"] is None else "the averaged weights"
    return True, [
        f"verified: transformers computes from {out} the logits of {whose} rounded to {record['dtype']}: in fp32 they differ "
        f"by at most {difference:.2g} over {len(found)} tokens, where rounding explains {tolerance:.2g}",
        f"as it is served, in {record['dtype']}, against {whose} in fp32: logits differ by at most "
        f"{(found - trained).abs().max().item():.3g}, KL {kl:.2g} nats per token, the same most probable token at {agreement:.1%}",
    ]


def _logits_as_trained(model: PackedLanguageModel, weights: Weights, documents: list[torch.Tensor]) -> torch.Tensor:
    """The logits `(tokens, vocabulary)` of all documents, packed, by the model with these weights."""
    for name, parameter in parameter_names(model).items():
        tensor = weights.read(name)
        target = parameter.data if parameter.shape == tensor.shape else parameter.data[: len(tensor)]  # rows of padding
        target.copy_(tensor)
    lengths = [len(document) for document in documents]
    ids, found = torch.cat(documents), []
    batch = MicroBatch(
        input_ids=ids[None],
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
        document_lengths=tuple(lengths),
        cu_seq_lens=F.pad(torch.tensor(lengths, dtype=torch.int32).cumsum(0, dtype=torch.int32), (1, 0)),
        target_positions=torch.arange(len(ids)),
        target_ids=ids,  # of no meaning: no loss is computed
    )
    with torch.no_grad():
        model.eval()(batch, visit=lambda logits, start: found.append(logits))
    return torch.cat(found)


def _logits(model: torch.nn.Module, documents: list[torch.Tensor]) -> torch.Tensor:
    """The same by a model of transformers, each document on its own."""
    with torch.no_grad():
        return torch.cat([model(input_ids=document[None]).logits[0].float() for document in documents])


def _load(out: Path, subject: Subject, dtype: torch.dtype) -> tuple[typing.Any, str | None]:
    """(the model that transformers, or peft, makes of `out`, what is wrong with its tensors by name)."""
    home = out if subject.weights is not None else base_of(subject)
    loaded: typing.Any = AutoModelForCausalLM.from_pretrained(
        home, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
    )
    model, info = loaded
    wrong = [str(name) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in info[kind]]
    if wrong:
        return (
            model,
            f"{home}: transformers finds {len(wrong)} tensors missing, unexpected or of another shape: {wrong[0]}",
        )
    if subject.weights is None:
        from peft import PeftModel  # needed for adapters alone

        model = PeftModel.from_pretrained(model, out)
    return model.eval(), None


def _holds(model: torch.nn.Module, name: str, weights: Weights) -> bool:
    return torch.equal(model.get_parameter(name), weights.read(name).float())


def _as_list(value: object) -> list:
    return value if isinstance(value, list) else [] if value is None else [value]
