"""Export a checkpoint of a run or a model directory: what is written, and the proof that it is what was trained.

The model card beside it is training/model_card.py. The export that a run itself writes at its end is training/ending.py.
"""

import json
import shutil
import typing
from argparse import Namespace
from dataclasses import dataclass, field, fields, replace
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
from model.loss import visit_logits
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
class Subject:
    """Weights to export and what goes with them.

    path: a checkpoint, or the directory of a model. weights: of the model, with adapters merged; None if an adapter is
    exported as it is. adapter: of a LoRA run. identity: plain JSON that tells the weights from others, kept in export.json.
    words: the same for people. base: the directory of the base model, if known. run, config: the directory and the settings
    of the run. state: that of its exported checkpoint; empty if it is not known.
    """

    path: Path
    model_config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    weights: Weights | None
    adapter: Adapter | None
    identity: dict
    words: str
    base: Path | None
    run: Path | None = None
    config: Config | None = None
    state: dict = field(default_factory=dict)


def read_subject(path: Path, options: Namespace, ranks: Ranks) -> Subject:
    """The run or the model directory at `path`. Raises UserError if it is neither, or damaged.

    options: the command line of scripts/export.py. A run whose checkpoints are gone is represented by its `export/`. The
    base is that of --base, or the run's model.path.
    """
    config = read_run_config(path)
    if config is None:
        if options.step is not None or options.best:
            raise UserError(f"{path} is not the directory of a run, so it has no steps; leave out --step and --best")
        inside = read_run_config(path.parent) if path.name == "export" else None
        return _of_directory(path, path.parent if inside else None, inside, options)
    checkpoint, kind = _choose_checkpoint(path, config, options)
    if checkpoint is not None:
        check_whole(checkpoint, ranks, f"{CHOOSE_STEP}, or train again")
        return _of_checkpoint(checkpoint, kind, path, config, options)
    if not (path / "export").is_dir():
        raise UserError(f"{path} has neither a checkpoint nor an export: let the run finish first")
    return _of_directory(path / "export", path, config, options)


def read_run_config(directory: Path) -> Config | None:
    """The settings of the run in `directory`; None if it is not that of a run.

    Raises UserError if its config.json is damaged, or has keys that this version of the code does not have.
    """
    path = directory / "config.json"
    record = read_json(path, COPY_AGAIN) if path.is_file() else {}
    if not {"config", "start_step"} <= record.keys():  # that of a model
        return None
    parts = {}
    for section, kind in typing.get_type_hints(Config).items():
        values = _with_tuples(record["config"].get(section, {}))
        unknown = sorted(values.keys() - {key.name for key in fields(kind)})
        if unknown:
            raise UserError(
                f"{path}: {section}.{unknown[0]} is no setting of this version of the code; export with the version that "
                "trained the run"
            )
        if section == "data":
            values["mix"] = tuple(Source(**_with_tuples(source)) for source in values.get("mix", ()))
        parts[section] = kind(**values)
    return Config(**parts)


def _with_tuples(values: dict) -> dict[str, typing.Any]:
    """Settings from JSON, whose lists were tuples."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def _choose_checkpoint(run: Path, config: Config, options: Namespace) -> tuple[Path | None, str]:
    """(the checkpoint to export, what it is: last, best or chosen); (None, "") if the run has none and none is named.

    Without --step and --best it is the one that the run itself exports. Raises UserError if there is no such checkpoint.
    """
    folder = run / "checkpoints"
    complete = complete_checkpoints(folder) if folder.is_dir() else []
    names = ", ".join(str(int(path.name.removeprefix("step-"))) for path in complete) or "none"
    if options.step is not None:
        if folder / checkpoint_name(options.step) not in complete:
            raise UserError(f"{run} has no checkpoint of step {options.step}; those that it has: {names}")
        return folder / checkpoint_name(options.step), "chosen"
    newest = latest_checkpoint(folder) if complete else None
    best = read_manifest(newest, CHOOSE_STEP)["state"].get("best_step") if newest else None
    if (
        best is not None
        and (options.best or config.run.export == "best")
        and folder / checkpoint_name(best) in complete
    ):
        return folder / checkpoint_name(best), "best"
    if options.best:
        why = "no evaluation of a trained model" if best is None else f"no longer the best checkpoint, step {best}"
        raise UserError(f"{run} has {why}; {CHOOSE_STEP}: {names}")
    return newest, "last"


def _of_checkpoint(checkpoint: Path, kind: str, run: Path, config: Config, options: Namespace) -> Subject:
    settings, lora = config.model, config.lora
    if options.merge_lora and not lora.rank:
        raise UserError(f"{run} trained all weights, not an adapter; leave out --merge-lora")
    base = options.base or Path(settings.path)
    if not (base / "config.json").is_file():
        raise UserError(f"the base model of {run}, {base}, is not there; name its directory with --base")
    model_config = read_model_config(str(base), settings.rope_type, settings.rope_factor, settings.rope_original_length)
    model = build_on_meta(model_config)
    tokenizer = load_tokenizer(str(base), config.data.chat_template)
    if settings.rope_type:
        tokenizer.model_max_length = model_config.max_position_embeddings
    weights, adapter = None, None
    if lora.rank:
        adapter = adapter_of_checkpoint(checkpoint, lora.rank, lora.effective_alpha, lora.dropout)
        if options.merge_lora:
            weights = merge(weights_of_directory(base, model), adapter, COMPUTE_DTYPES.get(settings.compute_dtype))
    else:
        weights = weights_of_checkpoint(checkpoint, model)
    state = read_manifest(checkpoint)["state"]
    identity = {"weights": kind, "step": state["step"], "checkpoint": weights_digest(checkpoint)}
    words = f"the {kind} weights of {run} (step {state['step']}){', an adapter' if weights is None else ''}"
    return Subject(checkpoint, model_config, tokenizer, weights, adapter, identity, words, base, run, config, state)


def _of_directory(path: Path, run: Path | None, config: Config | None, options: Namespace) -> Subject:
    if not (path / "config.json").is_file():
        raise UserError(f"{path} is neither the directory of a run nor that of a model: it has no config.json")
    if options.merge_lora:
        raise UserError(f"{path} has no checkpoint of an adapter; leave out --merge-lora")
    model_config = read_model_config(str(path))
    exported = read_json(path / RECORD, COPY_AGAIN) if (path / RECORD).is_file() else {}
    identity = {key: exported[key] for key in ("weights", "step", "checkpoint") if key in exported}
    checkpoint = run / "checkpoints" / checkpoint_name(identity["step"]) if run and "step" in identity else None
    return Subject(
        path,
        model_config,
        load_tokenizer(str(path)),
        weights_of_directory(path, build_on_meta(model_config)),
        None,
        identity | {"fingerprint": fingerprint_of_base(path)},
        f"the weights of {path}",
        options.base or (Path(config.model.path) if config else None),
        run,
        config,
        read_manifest(checkpoint)["state"] if checkpoint and checkpoint.is_dir() else {},
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
    return subject.run / "-".join(parts)


def is_written(out: Path, record: dict, run: Path | None) -> bool:
    """Whether `out` already is this export. Raises UserError if something else is there, or belongs there."""
    inside = (
        out.resolve().relative_to(run.resolve()).parts[:1] if run and run.resolve() in out.resolve().parents else ()
    )
    if inside and inside[0] in OF_A_RUN:
        raise UserError(f"{out} lies where the run keeps its own {inside[0]}; name another directory with --out")
    if not out.exists():
        return False
    written = read_json(out / RECORD, "name another directory with --out, or remove what is there")
    sizes = written.pop("files", {})
    written.pop("profile", None)
    if written != record:
        raise UserError(f"{out} is an export of other weights; remove it, or name another directory with --out")
    gone = [name for name, size in sizes.items() if not (out / name).is_file() or (out / name).stat().st_size != size]
    if gone:
        raise UserError(f"{out} is a damaged export of these weights ({gone[0]}); remove it, and export again")
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
        if subject.weights is None:
            subject.tokenizer.save_pretrained(folder)
        elif subject.config and not (subject.path / "config.json").is_file():  # a checkpoint
            write_files(folder, subject.config, subject.model_config, subject.tokenizer)
        else:
            for file in sorted(subject.path.iterdir()):
                if file.is_file() and not any(file.match(pattern) for pattern in NOT_COPIED):
                    shutil.copyfile(file, folder / file.name)
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
        profile = profile_of(subject.config) if subject.config else None
        content = json.dumps(record | {"profile": profile, "files": sizes}, indent=1)
        (folder / RECORD).write_text(content + "\n", encoding="utf-8")
        (folder / "README.md").write_text(card, encoding="utf-8")
    return size


def base_warning(subject: Subject, record: dict) -> str | None:
    """A warning if weights are averaged with another base, or an adapter merged into another, than that of the run."""
    trained_from = subject.state.get("meaning", {}).get("the weights of model.path")
    is_used = record["averaged"] or record["kind"] == "merged"
    if not (is_used and trained_from) or fingerprint_of_base(base_of(subject)) == trained_from:
        return None
    return f"warning: the weights in {subject.base} are not those that the run was started from"


# ---- the proof ----------------------------------------------------------------------------------------------------------

# Largest difference of two logits that rounding in fp32 explains, as a share of the largest logit. Between this project's
# forward over packed documents and transformers' over each it was 0 in 24 of 25 tiny models of different architectures and
# in SmolLM2-135M, and 2.5e-7 in Gemma 2, on a CPU. The rest is for other CPUs and numbers of threads.
FP32_ROUNDING = 1e-5
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
    texts = slice(sum(map(len, documents[:-1])))  # the sweep is no text
    found, expected, trained = found[texts], expected[texts], trained[texts]
    kl = F.kl_div(found.log_softmax(-1), trained.log_softmax(-1), log_target=True, reduction="batchmean").item()
    agreement = (found.argmax(-1) == trained.argmax(-1)).float().mean().item()
    of_weights, as_served = ((each - trained).abs().max().item() for each in (expected, found))
    whose = "the trained weights" if record["averaged"] is None else "the averaged weights"
    return True, [
        f"verified: transformers computes from {out} the logits of {whose} in {record['dtype']}: in fp32 they differ by at "
        f"most {difference:.2g}, where rounding explains {tolerance:.1g}",
        f"against {whose} in fp32, over {len(found)} tokens of text: rounding the weights changes a logit by at most "
        f"{of_weights:.2g}, computing in {record['dtype']} as well by {as_served:.2g}; then KL {kl:.2g} nats per token, the same "
        f"most probable token at {agreement:.1%}",
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
        visit_logits(model.head, model.eval()(batch), lambda logits, start: found.append(logits))
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
        found = f"{len(wrong)} tensors missing, unexpected or of another shape: {wrong[0]}"
        return model, f"{home} is NOT what was trained: transformers finds {found}"
    if subject.weights is None:
        from peft import PeftModel  # needed for adapters alone

        model = PeftModel.from_pretrained(model, out)
    return model.eval(), None


def _holds(model: torch.nn.Module, name: str, weights: Weights) -> bool:
    return torch.equal(model.get_parameter(name), weights.read(name).float())


def _as_list(value: object) -> list:
    return value if isinstance(value, list) else [] if value is None else [value]
