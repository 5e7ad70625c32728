"""Export a checkpoint of a run: what is written, and the proof that it is what was trained.

The model card beside it is training/model_card.py. The export that a run itself writes at its end is training/ending.py.
"""

import dataclasses
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from common.dtypes import DTYPES as COMPUTE_DTYPES
from common.dtypes import dtype_name
from common.durable_files import new_directory, write_json
from common.errors import UserError
from common.sha256 import sha256
from configs.config import Config
from configs.load import config_of, replace
from data.batches import collate
from data.chat_template import write_chat_settings
from data.tokens import load_tokenizer, save_tokenizer
from distributed.checkpoint_directory import (
    MANIFEST,
    check_whole,
    complete_checkpoints,
    read_manifest,
    step_of,
)
from distributed.process_group import Ranks
from eval.forgetting import as_documents
from model.architectures import first_new_row
from model.build import model_config_of
from model.fingerprint import fingerprint_of_base
from model.language_model import PackedLanguageModel, build_on_meta, materialize, parameter_names, stored_form
from model.lora import Adapter, adapter_of_checkpoint, merge, write_adapter
from model.loss import visit_logits
from model.weight_files import hash_weights
from model.weights import (
    Weights,
    average,
    converted,
    tensors_of_checkpoint,
    weights_of_checkpoint,
    weights_of_directory,
    write_weights,
)
from training.chat_settings import chat_settings
from training.ending import (
    CARD,
    CERTIFICATE,
    EXPORT,
    certificate_of,
    check_recorded,
    damage,
    read_certificate,
    read_json,
    sums_of,
    write_contents,
    write_files,
)
from training.identity import marks_of, of_model_config
from training.record import Record

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Export:
    """A checkpoint of a run, and the weights that are written of it.

    run: the directory. start: its config.json, what its newest start has recorded. config: its settings, with the directory of
    the base in model.path. state: of the checkpoint. optimizer: its name. weights: of the whole model, before they are converted to the dtype of
    the files. adapter: if it is written in place of the whole model. contents: what export.json says of the weights; two
    exports with the same contents hold the same weights. registered: what else the checkpoint has (checkpointer.register), such as an
    average, which the run's own export may hold.
    """

    run: Path
    start: dict
    config: Config
    state: dict
    optimizer: str
    model_config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    weights: Weights
    adapter: Adapter | None
    contents: dict
    registered: list[str]

    @property
    def base(self) -> Path:
        """The directory of the base model."""
        return Path(self.config.model.path)

    @property
    def dtype(self) -> torch.dtype:
        """That of the files."""
        return getattr(torch, self.contents["dtype"])


def read_export(run: Path, options: Namespace, ranks: Ranks) -> Export:
    """The checkpoint of the run that the command line of scripts/export.py asks for; no weights are read yet.

    Raises UserError if there is no such checkpoint or base, if they do not fit the options, if they are damaged, or if the record
    of the run does not name the checkpoint.
    """
    start, config = read_run(run)
    share, certificate = options.average_with_base, read_certificate(run)
    if certificate:
        check_recorded(run, run / "export")
    if config.forgetting.max_kl is not None and options.step is None and not options.best and share is None:
        if not certificate:
            what = "has no export under its budget for forgetting"
            raise UserError(f"{run} {what}: start it again to its end, or name --step, --best or --average-with-base")
        share = certificate["alpha"] if certificate["averaged"] else None
        options = Namespace(**vars(options) | {"step": certificate["step"]})
    checkpoint, which = _choose_checkpoint(run, config, options)
    check_whole(checkpoint, ranks, "name a step with --step, or train again")
    manifest = read_manifest(checkpoint)
    Record(run).named(step_of(checkpoint), sha256(checkpoint / MANIFEST))
    state, of_optimizer = manifest["state"], manifest["values"].get("optimizer", {})
    base = options.base or Path(config.model.path)
    if not (base / "config.json").is_file():
        raise UserError(f"the base model of {run}, {base}, is not there; name its directory with --base")
    config = replace(config, "model.path", str(base))
    settings, lora = config.model, config.lora
    model_config = model_config_of(settings)
    before, now = state["identity"]["config.json"], of_model_config(model_config)
    # Not what only one version of transformers has.
    if other := sorted(name for name in before.keys() & now.keys() if before[name] != now[name]):
        raise UserError(
            f"{checkpoint} was trained with another config.json or RoPE than {base} and {run / 'config.json'} have "
            f"({', '.join(other[:3])}); name its base with --base"
        )
    tokenizer = load_tokenizer(str(base), config.data.chat_template)
    if settings.rope_type:
        tokenizer.model_max_length = model_config.max_position_embeddings
    model = build_on_meta(model_config)

    def base_weights() -> Weights:
        if state["identity"]["the weights"] != hash_weights(base):
            raise UserError(
                f"the weights in {base} are not those that {run} was started from; name its base with --base"
            )
        return weights_of_directory(base, model)

    kind, adapter = "model", None
    if lora.rank:
        if settings.rope_type and not options.merge_lora:
            raise UserError(f"{run} has model.rope_type, which peft cannot be told: its adapter needs --merge-lora")
        adapter = adapter_of_checkpoint(checkpoint, lora)
        # peft adds an adapter to the base as it is stored; a merged one is added to what training has computed with.
        dtype = COMPUTE_DTYPES.get(settings.compute_dtype) if options.merge_lora else None
        weights = merge(base_weights(), adapter, dtype)
        kind, adapter = ("merged", None) if options.merge_lora else ("adapter", adapter)
    elif options.merge_lora:
        raise UserError(f"{run} trained all weights, not an adapter; leave out --merge-lora")
    else:
        weights = weights_of_checkpoint(checkpoint, model, base_weights)
    averaged = None
    if share is not None:
        if adapter:
            raise UserError(f"{run} has an adapter: an average with the base needs --merge-lora")
        averaged = {"share_of_tuned": share, "base": fingerprint_of_base(base)}
        weights = average(base_weights(), weights, share, first_new_row(base))
    stored = getattr(model_config, "dtype", None) or torch.bfloat16
    contents = {
        "weights": which,
        "step": state["step"],
        **marks_of(checkpoint),
        "kind": kind,
        # Adapters are small, and are kept in what they were trained in.
        "dtype": dtype_name(DTYPES.get(options.dtype, torch.float32 if adapter else stored)),
        "averaged": averaged,
    }
    registered = sorted({name.partition(".")[0] for name in tensors_of_checkpoint(checkpoint, "registered.").shapes})
    optimizer = of_optimizer.get("type", "not recorded").removeprefix("LowMemory")
    return Export(run, start, config, state, optimizer, model_config, tokenizer, weights, adapter, contents, registered)


def read_run(run: Path) -> tuple[dict, Config]:
    """(the config.json of a run, of its newest start; its settings).

    Raises UserError if `run` is not the directory of a run, or has settings that this version of the code does not have.
    """
    path = run / "config.json"
    start = read_json(path, "copy it again") if path.is_file() else {}
    if not {"config", "start_step"} <= start.keys():  # that of a model has neither
        raise UserError(f"{run} is not the directory of a run; name one, such as runs/quickstart")
    try:
        return start, config_of(start["config"])
    except TypeError as error:  # names a key that is unknown or missing
        raise UserError(f"{path}: {error}; export with the version of the code that trained the run") from error


def _choose_checkpoint(run: Path, config: Config, options: Namespace) -> tuple[Path, str]:
    """(the checkpoint to export, what it is: last, best or chosen). Raises UserError if there is no such checkpoint.

    Without --step and --best it is the one that the run itself exports; with a budget for forgetting `read_export` names it.
    """
    folder = run / "checkpoints"
    complete = {step_of(path): path for path in complete_checkpoints(folder)}
    if not complete:
        raise UserError(f"{run} has no checkpoint; what a finished run has exported is in {run / 'export'}")
    names, step, which = ", ".join(map(str, complete)), options.step, "chosen"
    if step is None:
        newest = complete[max(complete)]
        step, which = read_manifest(newest, "name a step with --step")["state"].get("best_step"), "best"
        if not options.best and (config.run.export == "last" or step is None):
            return newest, "last"
        if step is None:
            raise UserError(f"{run} has no evaluation of a trained model; name a step with --step: {names}")
    if step not in complete:
        raise UserError(f"{run} has no checkpoint of step {step}; those that it has: {names}")
    return complete[step], which


def is_written(out: Path, contents: dict) -> bool:
    """Whether `out` already is the export with these contents. Raises UserError if something else is there."""
    if not out.exists():
        return False
    written = read_json(out / EXPORT, "name another directory with --out") if (out / EXPORT).is_file() else {}
    if written | contents != written:
        raise UserError(
            f"{out} exists and does not hold these weights; remove it, or name another directory with --out"
        )
    return True


def write_export(out: Path, export: Export, profile: str | None, base_name: str, card: str) -> int:
    """Write the directory `out`, which is complete or absent. Returns the bytes of the weights.

    profile: how scripts/analyze.py must ask the model. base_name: the base in the settings of an adapter.
    """
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    with new_directory(out) as folder:
        if export.adapter:
            size = write_adapter(
                folder,
                export.adapter,
                export.base,
                base_name,
                lambda name, tensor: converted(name, tensor, export.dtype),
            )
            save_tokenizer(export.tokenizer, folder)
            write_chat_settings(folder, chat_settings(export.config.data))
        else:
            size = write_weights(folder, export.weights, export.dtype, form=stored_form(export.model_config))
            export.model_config.dtype = export.dtype  # in which servers load the weights
            write_files(folder, export.config, export.model_config, export.tokenizer)
        if certificate := certificate_of(export.run, export.contents):
            write_json(folder / CERTIFICATE, certificate)
        contents = export.contents | {"profile": profile, "files": sums_of(folder)}
        write_contents(folder, contents, Record(export.run), str(out.absolute()))
        (folder / CARD).write_text(card, encoding="utf-8")
    return size


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


def damage_of(out: Path, ranks: Ranks) -> list[str]:
    """What is wrong with the files of an export, by their SHA-256 in export.json: one sentence each. A collective."""
    sums = read_json(out / EXPORT, "remove the directory and export again").get("files", {})  # earlier ones have none
    problems = damage({out / name: digest for name, digest in sums.items()}, ranks)
    return [f"{problem}; remove {out} and export again" for problem in problems]


def verify(out: Path, export: Export) -> tuple[bool, list[str]]:
    """(whether `out` is what was trained and is ready to be used, one line for each finding).

    transformers, for an adapter with peft, loads `out`. Its logits in fp32 must be those of the trained weights, rounded to
    the dtype of the export and put into the model as it is trained here. What that rounding costs is said beside it: the
    logits of the export as it is served against those of the trained weights. Needs the memory of one model in fp32.
    """
    tokenizer = load_tokenizer(str(out))
    documents = [np.array(tokenizer(text)["input_ids"]) for text in TEXTS]
    model = build_on_meta(export.model_config)
    materialize(model, torch.device("cpu"))
    if export.adapter:
        base = weights_of_directory(export.base, model)
        rounded_adapter = _rounded(export.adapter.weights, export.dtype)
        rounded = merge(base, dataclasses.replace(export.adapter, weights=rounded_adapter))
    else:
        rounded = _rounded(export.weights, export.dtype)
    trained, expected = (_logits_as_trained(model, each, documents) for each in (export.weights, rounded))
    kept = kept_by_rounding(weights_of_directory(export.base, model), export, rounded) if _has_base(export) else ""
    del model
    loaded = _load(out, export, torch.float32)
    found = _logits(loaded, documents)
    difference, tolerance = (found - expected).abs().max().item(), FP32_ROUNDING * expected.abs().max().item()
    # The logits show how the weights are used; a row of a token that no document has is seen in the tensors alone.
    other = [
        name
        for name in rounded.shapes
        if not export.adapter and not torch.equal(loaded.get_parameter(name), rounded.read(name).float())
    ]
    if not difference <= tolerance or other:
        which = f"; {len(other)} tensors are not the trained ones: {', '.join(other[:3])}" if other else ""
        return False, [
            f"{out} is NOT the weights that were trained: its logits, computed in fp32 by transformers, differ by up to "
            f"{difference:.3g} from theirs, where rounding explains {tolerance:.1g}{which}; remove it and export again"
        ]
    dtype = export.contents["dtype"]
    if export.dtype != torch.float32:
        del loaded
        found = _logits(_load(out, export, export.dtype), documents)
    if not torch.isfinite(found).all():
        return False, [f"the logits of {out} are not finite in {dtype}; export with --dtype bf16"]
    kl = F.kl_div(found.log_softmax(-1), trained.log_softmax(-1), log_target=True, reduction="batchmean").item()
    agreement = (found.argmax(-1) == trained.argmax(-1)).float().mean().item()
    of_weights, as_served = ((each - trained).abs().max().item() for each in (expected, found))
    whose = "the averaged weights" if export.contents["averaged"] else "the trained weights"
    return True, [
        f"verified: transformers computes from {out} the logits of {whose} in {dtype}: in fp32 they differ by at most "
        f"{difference:.2g}, where rounding explains {tolerance:.1g}",
        f"against {whose} in fp32, over {len(found)} tokens of text: rounding the weights changes a logit by at most "
        f"{of_weights:.2g}, computing in {dtype} as well by {as_served:.2g}; then KL {kl:.2g} nats per token, the same most "
        f"probable token at {agreement:.1%}{kept}",
    ]


def _has_base(export: Export) -> bool:
    """Whether the weights that the run was started from are still there."""
    there = any(export.base.glob("*.safetensors"))
    return there and hash_weights(export.base) == export.state["identity"]["the weights"]


def kept_by_rounding(base: Weights, export: Export, rounded: Weights) -> str:
    """Which part of what training has changed is left in the rounded weights, in words; empty where nothing is rounded.

    It is 100% where the errors of rounding cancel. A base in bf16 gets them all in one direction: what changes a weight by less
    than half of the gap to its neighbour is lost, and neither KL nor the logits of a model that has hardly changed show that.
    """
    if export.adapter or export.dtype == torch.float32:
        return ""
    frozen = COMPUTE_DTYPES.get(export.config.model.compute_dtype) if export.contents["kind"] == "merged" else None
    kept = changed = 0.0
    for name in rounded.shapes:
        before = base.read(name)
        before = before.to(frozen or before.dtype).float()
        change = export.weights.read(name).float() - before
        kept += (change * (rounded.read(name).float() - before)).sum().item()
        changed += change.square().sum().item()
    return f"; rounding keeps {kept / changed:.1%} of what training has changed" if changed else ""


def _rounded(weights: Weights, dtype: torch.dtype) -> Weights:
    return Weights(weights.shapes, lambda name: converted(name, weights.read(name), dtype))


def _logits_as_trained(model: PackedLanguageModel, weights: Weights, documents: list[np.ndarray]) -> torch.Tensor:
    """The logits `(tokens, vocabulary)` of all documents by the model with these weights."""
    for name, parameter in parameter_names(model).items():
        tensor = weights.read(name)
        target = parameter.data if parameter.shape == tensor.shape else parameter.data[: len(tensor)]  # rows of padding
        target.copy_(tensor)
    return packed_logits(model.eval(), documents, np.arange(sum(map(len, documents))))


def packed_logits(model: PackedLanguageModel, documents: list[np.ndarray], where: np.ndarray) -> torch.Tensor:
    """fp32 logits `(positions, vocabulary)` at the positions `where` of packed documents, on the CPU."""
    batch = collate(
        tuple(range(len(documents))), as_documents([(ids.tolist(), [False] * len(ids)) for ids in documents])
    )
    positions, found = torch.from_numpy(where), []
    batch = dataclasses.replace(batch, target_positions=positions, target_ids=torch.zeros_like(positions))
    with torch.no_grad():
        hidden = model(batch.to(next(model.parameters()).device))
        visit_logits(model.head, hidden, lambda logits, start: found.append(logits.cpu()))
    return torch.cat(found)


def _logits(model: torch.nn.Module, documents: list[np.ndarray]) -> torch.Tensor:
    """The same by a model of transformers, each document on its own."""
    with torch.no_grad():
        return torch.cat([model(input_ids=torch.from_numpy(ids)[None]).logits[0].float() for ids in documents])


def _load(out: Path, export: Export, dtype: torch.dtype) -> torch.nn.Module:
    """The model that transformers, for an adapter with peft, makes of `out`. It warns of tensors that are missing."""
    transformers_logging.disable_progress_bar()
    # Tensors that are missing or of another shape get initial values, which the comparison finds.
    home = export.base if export.adapter else out
    model = AutoModelForCausalLM.from_pretrained(home, dtype=dtype, ignore_mismatched_sizes=True)
    if export.adapter:
        from peft import PeftModel  # needed for adapters alone

        model = PeftModel.from_pretrained(model, out)
    return model.eval()
