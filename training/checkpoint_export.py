"""Export a checkpoint of a run, and prove that the export holds the weights that were trained.

The model card beside it is training/model_card.py. A run writes its own export at its end with training/ending.py.
"""

import dataclasses
import re
import tempfile
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from common.durable_files import new_directory, write_json
from common.errors import UserError
from common.sha256 import sha256
from configs.config import Config
from configs.load import config_of
from data.batches import collate
from data.chat_template import write_chat_settings
from data.encoding import ExampleEncoder
from data.tokens import load_tokenizer, save_tokenizer
from distributed.checkpoint_directory import (
    MANIFEST,
    check_whole,
    complete_checkpoints,
    marks_of,
    read_manifest,
    step_of,
)
from distributed.process_group import Ranks
from eval.forgetting import as_documents
from model.architectures import copy_licences, first_new_row
from model.build import model_config_of
from model.dtypes import DTYPES, dtype_name
from model.fingerprint import fingerprint_of_base
from model.language_model import (
    BUFFERS,
    PackedLanguageModel,
    build_on_meta,
    materialize,
    stored_form,
    tensors_in_files,
    untrained_tensors,
)
from model.lora import BASE, WEIGHTS, Adapter, adapter_of_checkpoint, merge, write_adapter
from model.lora import CONFIG as ADAPTER_CONFIG
from model.loss import visit_logits
from model.rope import window
from model.text_part import load_causal_lm
from model.weight_files import INDEX, SINGLE, StoredTensor, hash_weights, stored_tensors
from model.weights import (
    Weights,
    average,
    converted,
    rounded,
    tensors_of_checkpoint,
    weights_of_checkpoint,
    weights_of_directory,
    write_weights,
)
from training.chat_settings import chat_settings
from training.checkpointer import Record
from training.ending import (
    BOM,
    CARD,
    CERTIFICATE,
    EXPORT,
    SIGNATURE,
    certificate_of,
    check_recorded,
    read_certificate,
    read_json,
    sums_of,
    write_contents,
    write_files,
)
from training.identity import of_model_config

VARYING = (
    rb'\n *"(transformers_version|peft_version|local_files_only)": ("[\w.+-]*"|true|false),?(?=\n)'  # lines of JSON
)


@dataclass(frozen=True)
class Export:
    """A checkpoint of a run, and the weights that are written from it.

    start: config.json of the run, which describes its newest start. state: of the checkpoint. optimizer: its name. weights: of
    the whole model, in the dtype of training. adapter: set if it is written in place of the whole model. contents: the
    description of the weights in export.json. registered: names of the objects that the checkpoint also holds
    (checkpointer.register), such as an average, from which the run's own export may come. copied: tensors of the base that
    transformers does not load.
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
    copied: dict[str, StoredTensor] = field(default_factory=dict)

    @property
    def base(self) -> Path:
        """The directory of the base model."""
        return Path(self.config.model.path)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the files."""
        return getattr(torch, self.contents["dtype"])


def read_export(run: Path, options: Namespace, ranks: Ranks) -> Export:
    """Return the checkpoint that the command line of scripts/export.py names; no weights are read yet.

    Raise UserError if there is no such checkpoint or base, if they do not fit the options, if they are damaged, or if the
    record of the run does not name the checkpoint.
    """
    start, config = _read_run(run)
    checkpoint, which, share = _choose_checkpoint(run, config, options)
    check_whole(checkpoint, ranks, "name a step with --step, or train again")
    manifest = read_manifest(checkpoint)
    Record(run).named(step_of(checkpoint), sha256(checkpoint / MANIFEST))
    state, base, settings = manifest["state"], Path(config.model.path), config.model
    if not (base / "config.json").is_file():
        raise UserError(f"the base model of {run}, {base}, is not there; put it there, or a link to it")
    model_config = model_config_of(settings)
    before, now = state["identity"]["config.json"], of_model_config(model_config)
    # Keys that only one version of transformers has are ignored.
    if differing := sorted(name for name in before.keys() & now.keys() if before[name] != now[name]):
        raise UserError(
            f"{checkpoint} was trained with another config.json or RoPE than {base} and {run / 'config.json'} have "
            f"({', '.join(differing[:3])})"
        )
    tokenizer = load_tokenizer(str(base), config.data.chat_template)
    if settings.rope_type:
        tokenizer.model_max_length = window(model_config)
    model = build_on_meta(model_config)

    def base_weights() -> Weights:
        if state["identity"]["the weights"] != hash_weights(base):
            raise UserError(f"the weights in {base} are not those that {run} was started from; put them there")
        return weights_of_directory(base, model)

    if options.merge_lora and not config.lora.rank:
        raise UserError(f"{run} trained all weights, not an adapter; leave out --merge-lora")
    if config.lora.rank and not options.merge_lora and (settings.rope_type or share is not None):
        raise UserError(f"{run} has an adapter: its RoPE, or its average with the base, needs --merge-lora")
    adapter = None
    if config.lora.rank:
        adapter = adapter_of_checkpoint(checkpoint, config.lora)
        # peft adds an adapter to the base as it is stored; a merged one is added to the base as training has computed with it.
        weights = merge(base_weights(), adapter, DTYPES.get(settings.compute_dtype) if options.merge_lora else None)
        adapter = None if options.merge_lora else adapter
    else:
        weights = weights_of_checkpoint(checkpoint, model, base_weights)
    averaged = None
    if share is not None:
        averaged = {"share_of_tuned": share, "base": fingerprint_of_base(base)}
        weights = average(base_weights(), weights, share, first_new_row(base))
    # Adapters are small, and keep the dtype of their training.
    stored = torch.float32 if adapter else getattr(model_config, "dtype", None) or torch.bfloat16
    contents = {
        "weights": which,
        "step": state["step"],
        **marks_of(checkpoint),
        "kind": "adapter" if adapter else "merged" if options.merge_lora else "model",
        "dtype": dtype_name(DTYPES.get(options.dtype, stored)),
        "averaged": averaged,
    }
    copied = {} if adapter else untrained_tensors(model, base, config.run.export_mtp)
    names = {name.partition(".")[0] for name in tensors_of_checkpoint(checkpoint, "registered.").shapes}
    optimizer = manifest["values"]["optimizer"]["type"].removeprefix("LowMemory")
    return Export(
        run,
        start,
        config,
        state,
        optimizer,
        model_config,
        tokenizer,
        weights,
        adapter,
        contents,
        sorted(names - {BUFFERS}),
        copied,
    )


def _read_run(run: Path) -> tuple[dict, Config]:
    """Return the config.json of a run, which describes its newest start, and the settings in it.

    Raise UserError if `run` is not the directory of a run, or has settings that this version of the code does not know.
    """
    path = run / "config.json"
    start = read_json(path, "copy it again") if path.is_file() else {}
    if not {"config", "start_step"} <= start.keys():  # the config.json of a model has neither
        raise UserError(f"{run} is not the directory of a run; name one, such as runs/quickstart")
    try:
        return start, config_of(start["config"])
    except TypeError as error:  # names a key that is unknown or missing
        raise UserError(f"{path}: {error}; export with the version of the code that trained the run") from error


def _choose_checkpoint(run: Path, config: Config, options: Namespace) -> tuple[Path, str, float | None]:
    """Return (the checkpoint to export, its role, the share of its weights in an average with the base or None).

    The role is last, best or chosen. Without --step and --best it is the checkpoint that the run itself exports; with a budget
    for forgetting the certificate names it. Raise UserError if there is no such checkpoint.
    """
    folder, step, share = run / "checkpoints", options.step, options.average_with_base
    certificate = read_certificate(run)
    if certificate:
        check_recorded(run, run / "export")
    if config.forgetting.has_budget and step is None and not options.best and share is None:
        if not certificate:
            hint = "start it again to its end, or name --step, --best or --average-with-base"
            raise UserError(f"{run} has no export under its budget for forgetting: {hint}")
        step, share = certificate["step"], certificate["alpha"] if certificate["averaged"] else None
    complete = {step_of(path): path for path in complete_checkpoints(folder)}
    if not complete:
        raise UserError(f"{run} has no checkpoint; what a finished run has exported is in {run / 'export'}")
    steps, which = ", ".join(map(str, complete)), "chosen"
    if step is None:
        which = "best" if options.best or config.run.export == "best" else "last"
        last = max(complete)
        step = (
            read_manifest(complete[last], "name a step with --step")["state"]["best_step"] if which == "best" else last
        )
    if step not in complete:
        missing = "evaluation of a trained model" if step is None else f"checkpoint of step {step}"
        raise UserError(f"{run} has no {missing}; name a step with --step: {steps}")
    return complete[step], which, share


def write_export(out: Path, export: Export, base_name: str) -> int:
    """Write the directory `out`, which is complete or absent, without its model card. Return the bytes of the weights.

    base_name: the name of the base model in the settings of an adapter.
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
        else:
            form = stored_form(export.model_config)
            size = write_weights(folder, export.weights, export.dtype, form=form, copied=export.copied)
        write_beside_weights(folder, export.config, export.contents)
        if certificate := certificate_of(export.run, export.contents):
            write_json(folder / CERTIFICATE, certificate)
        contents = export.contents | {"files": sums_of(folder)}
        write_contents(folder, contents, Record(export.run), str(out.absolute()))
    return size


def write_beside_weights(folder: Path, config: Config, contents: dict) -> None:
    """Write the files of an export that follow from the base and the settings of its run: all but weights and certificate.

    contents: `kind` and `dtype` of its export.json. Paths in `config` are relative to this directory.
    """
    tokenizer, chats = load_tokenizer(config.model.path, config.data.chat_template), chat_settings(config.data)
    model_config = model_config_of(config.model)
    if config.model.rope_type:
        tokenizer.model_max_length = window(model_config)
    if contents.get("kind") == "adapter":
        copy_licences(config.model.path, folder)
        save_tokenizer(tokenizer, folder)
        write_chat_settings(folder, chats)
        return
    stop_ids, dtype = ExampleEncoder(tokenizer, chats).stop_ids, getattr(torch, contents["dtype"])
    write_files(folder, config, model_config, tokenizer, chats, stop_ids, dtype)


def differing_files(out: Path, config: Config, contents: dict) -> list[str]:
    """Return the files of an export, beside its weights, that are not as base and settings make them, and those that are missing.

    Also return a model.safetensors beside an index, because transformers would read it in place of the index.
    """
    names = {path.relative_to(out).as_posix() for path in out.rglob("*") if not path.is_dir()}
    names -= {EXPORT, CARD, BOM, SIGNATURE, CERTIFICATE}
    if contents.get("kind") == "adapter":
        names -= {WEIGHTS, ADAPTER_CONFIG, BASE}
    else:
        weights = {tensor.file.relative_to(out).as_posix() for tensor in stored_tensors(out).values()}
        names -= weights - {SINGLE} | {INDEX} if INDEX in names else {SINGLE}
    with tempfile.TemporaryDirectory() as folder:
        write_beside_weights(Path(folder), config, contents)
        expected = {path.name for path in Path(folder).iterdir()}
        same = [name for name in names & expected if content(out / name) == content(Path(folder, name))]
    return sorted((names | expected) - {*same})


def content(path: Path) -> bytes:
    """Return the bytes of a file without lines on versions, and on whether the hub could be asked (HF_HUB_OFFLINE)."""
    return re.sub(VARYING, b"", path.read_bytes())


# ---- the proof ----------------------------------------------------------------------------------------------------------

# Largest difference of two logits that rounding in fp32 explains, as a share of the largest logit. Between this project's
# forward over packed TEXTS and transformers' forward over each of them it was 0 in all 31 tiny models of tests/tiny.py without
# experts, tied and untied, and at most 3.5e-7 in the 4 with experts (torch 2.13, one thread of an x86 CPU). The rest is for
# other CPUs, numbers of threads and larger models.
FP32_ROUNDING = 1e-5
TEXTS = (
    "The owner of a boat shall keep it in such a state that it can carry at least 8% more than its usual load.",
    "Rainfall: 1,284,930 mm\nMean temperature: 13.42 C\nRelative humidity: 71.7%\nCloud cover: 5.1%",
    "A train leaves at 9:40 and arrives at 11:05. It therefore takes 85 minutes, of which it stands still for seven.",
    "def mean(values):\n    if not values:\n        raise ValueError('no values')\n    return sum(values) / len(values)\n",
)


def verify(out: Path, export: Export) -> tuple[bool, str]:
    """Return whether `out` holds the weights that were trained, and a sentence for the user.

    The files beside the weights must be those that the base and the settings of the run give.

    transformers loads `out`. Its logits in fp32 must equal the logits of our own model with the trained weights, rounded to the
    dtype of the export. Every tensor must equal the rounded one, too: no logit shows the row of a token that no text has. Needs
    the memory of one model in fp32, and whole weights, not an adapter.
    """
    if differing := differing_files(out, export.config, export.contents):
        return False, (
            f"{out} is NOT what the base and the settings of {export.run} give: {', '.join(differing)}; remove it and export again"
        )
    tokenizer = load_tokenizer(str(out))
    documents = [np.array(tokenizer(text)["input_ids"]) for text in TEXTS]
    model = build_on_meta(export.model_config)
    materialize(model, torch.device("cpu"))
    weights = export.weights
    exported = Weights(weights.shapes, lambda name: rounded(weights, name, export.dtype))
    expected = _logits_as_trained(model, exported, documents)
    del model
    transformers_logging.disable_progress_bar()
    # Tensors that are missing or of another shape get initial values, which the comparison reveals.
    loaded = load_causal_lm(out, dtype=torch.float32, ignore_mismatched_sizes=True).eval()
    with torch.no_grad():
        logits = torch.cat([loaded(input_ids=torch.from_numpy(ids)[None]).logits[0] for ids in documents])
    difference, tolerance = (logits - expected).abs().max().item(), FP32_ROUNDING * expected.abs().max().item()
    # No logit shows the row of a token that occurs in no document, so all tensors are compared as well.
    tensors = loaded.state_dict()
    differing = [
        name for name in exported.shapes if not torch.equal(tensors[name].float(), exported.read(name).float())
    ]
    files = stored_tensors(out)
    differing += [
        name
        for name, tensor in export.copied.items()
        if name not in files or not torch.equal(files[name].copy(), tensor.copy())
    ]
    if not difference <= tolerance or differing:
        which = f"; {len(differing)} tensors are not as they must be: {', '.join(differing[:3])}" if differing else ""
        return False, (
            f"{out} is NOT the weights that were trained: its logits, computed in fp32 by transformers, differ by up to "
            f"{difference:.3g} from theirs, where rounding explains {tolerance:.1g}{which}; remove it and export again"
        )
    whose = "the averaged weights" if export.contents["averaged"] else "the trained weights"
    return True, (
        f"verified: transformers computes from {out} the logits of {whose} in {export.contents['dtype']}: in fp32 they differ by "
        f"at most {difference:.2g}, where rounding explains {tolerance:.1g}"
    )


def _logits_as_trained(model: PackedLanguageModel, weights: Weights, documents: list[np.ndarray]) -> torch.Tensor:
    """Return the logits `(tokens, vocabulary)` of all documents by our model with these weights."""
    for name, parameter in tensors_in_files(model).items():
        tensor = weights.read(name)
        target = parameter.data if parameter.shape == tensor.shape else parameter.data[: len(tensor)]  # rows of padding
        target.copy_(tensor)
    return packed_logits(model.eval(), documents, np.arange(sum(map(len, documents))))


def packed_logits(model: PackedLanguageModel, documents: list[np.ndarray], where: np.ndarray) -> torch.Tensor:
    """Return fp32 logits `(positions, vocabulary)` at the positions `where` of packed documents, on the CPU."""
    batch = collate(
        tuple(range(len(documents))), as_documents([(ids.tolist(), [False] * len(ids)) for ids in documents])
    )
    positions, parts = torch.from_numpy(where), []
    batch = dataclasses.replace(batch, target_positions=positions, target_ids=torch.zeros_like(positions))
    with torch.no_grad():
        hidden = model(batch.to(next(model.parameters()).device))
        visit_logits(model.head, hidden, lambda logits, start: parts.append(logits.cpu()))
    return torch.cat(parts)
