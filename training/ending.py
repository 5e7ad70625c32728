"""The export of a finished run: its weights, the files beside them with their SHA-256, and whether it exists already.

scripts/export.py writes and checks the same files (training/checkpoint_export.py).
"""

import copy
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from common.durable_files import publish, temporary_path, write_json
from common.errors import NotMet, UserError
from common.sha256 import sha256, sha256_of_all
from configs.config import Config
from data.chat_template import ChatSettings, write_chat_settings
from data.tokens import save_tokenizer
from distributed.checkpoint import load_parameters
from distributed.checkpoint_directory import checkpoint_name, marks_of
from distributed.export import export_model
from distributed.process_group import Ranks, gather_objects, read_on_first
from model.architectures import copy_licences, randomness
from model.dtypes import dtype_name
from model.language_model import merged, stored_form, tensors_in_files, trained_parameters, untrained_tensors
from model.rope import window
from model.text_part import is_part, processors, whole_config
from training.checkpointer import Record, RunRecord
from training.description import too_many_steps
from training.evaluations import Evaluations, best_in_words, is_better

if TYPE_CHECKING:
    from training.start import TrainingRun

FORMAT = 1  # of export.json
CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
EXPORT = "export.json"  # which weights an export holds, and the SHA-256 of its files
CERTIFICATE = "certificate.json"  # of a budget for forgetting (training/budget.py)
CARD, BOM, SIGNATURE = "README.md", "bom.json", "model.sig"  # written after the others, and may be renewed
ADAPTER_DIRECTORY = "adapter"  # beside the export, with LoRA
EXPORT_AGAIN = "remove it, and export again"


# ---- The export of a run -------------------------------------------------------------------------------------------------


def contents_of_export(
    config: Config,
    step: int,
    evaluations: Evaluations,
    model_config: PretrainedConfig,
    checkpoints: Path,
    keep: str = "",
) -> dict:
    """Describe the export of a run that has ended after `step`, as plain JSON. Read no weights.

    `weights` is last or best, `step` their step, `checkpoint` and `identity` the marks of their checkpoint (`marks_of`), and
    `dtype` describes the files. The base model is never exported: `best` is the best of the trained checkpoints. If no trained
    model was evaluated, the last weights stand in for the best. With a budget for forgetting the run itself chooses the
    weights, and this description is stored as `asked` in export.json.
    """
    best = evaluations.best_step if config.run.export == "best" else None
    exported = step if best is None else best
    loss = evaluations.loss if evaluations.evaluated.get("validation") == step else None
    contents = {
        "weights": "last" if best is None else "best",
        "step": exported,
        **marks_of(checkpoints / checkpoint_name(exported)),
        "steps_in_total": step,
        "validation_loss": loss if best is None else evaluations.best_loss,
        "dtype": dtype_name(getattr(model_config, "dtype", None) or torch.bfloat16),
    }
    if best is not None and evaluations.curve != "validation/loss":
        contents |= {"best_by": evaluations.best_by, "best_value": evaluations.best_value}
    if config.forgetting.has_budget:
        budget = {name: getattr(config.forgetting, name) for name in ("max_kl", "max_drop", "min_gain", "general_text")}
        metric = config.eval.metric if config.forgetting.max_drop is not None else None
        contents["budget"] = budget | {"by": evaluations.best_by, "keep": keep, "metric": metric}
    return contents


def damage_of_export(directory: Path, contents: dict, ranks: Ranks) -> list[str] | None:
    """Return a sentence for each damaged file of the export that `contents` describe, or None if `directory` is another export.

    Every rank must call this. It reads all files of the export, and with LoRA also the adapter.
    """

    def sums() -> dict[Path, str] | None:
        """Return file -> SHA-256 from export.json; None if `contents` do not describe it."""
        try:
            written = read_json(directory / EXPORT, EXPORT_AGAIN)
        except UserError:  # no export, or a damaged one
            return None
        written = _without_format(directory / EXPORT, written)
        files, adapter, _ = written.pop("files"), written.pop("adapter"), written.pop("head")
        if written.get("asked", written) != contents:
            return None
        parts = (directory, files), (directory.with_name(ADAPTER_DIRECTORY), adapter)
        return {folder / name: digest for folder, part in parts for name, digest in part.items()}

    sums_by_file = read_on_first(sums, ranks)
    return None if sums_by_file is None else damage(sums_by_file, ranks)


def is_finished(run: "TrainingRun", step: int, evaluations: Evaluations, is_changed: bool) -> bool:
    """Return whether all steps are taken and the requested export exists undamaged; then print it.

    is_changed: this start has another identity than the checkpoint (run.resume=changed). Every rank must call this. Raise
    UserError if a finished run is changed, because no step is left to train, and if the record does not name the export.
    """
    config, ranks, directory, total_steps = run.config, run.ranks, run.directory / "export", run.data.total_steps
    checkpoints = run.directory / "checkpoints"
    contents = read_on_first(
        lambda: contents_of_export(config, step, evaluations, run.model_config, checkpoints, run.data.kept), ranks
    )
    finished = (step == total_steps or evaluations.is_stalled) and evaluations.is_judged
    problems = damage_of_export(directory, contents, ranks) if finished else None
    if problems is None:
        return False
    problems = problems or read_on_first(lambda: _cut_off(directory), ranks)
    if problems:
        if ranks.rank == 0:
            print(
                f"warning: {'; '.join(problems)}; the weights of step {contents['step']} are exported again", flush=True
            )
        return False
    if is_changed:
        raise UserError(
            f"{run.directory} has taken all of its {step} steps before it was changed, and is exported: nothing is "
            "left to train with what is set now; raise optimizer.epochs or optimizer.max_steps, or choose another run.name"
        )
    read_on_first(lambda: check_recorded(run.directory, directory), ranks)
    contents |= read_on_first(lambda: read_certificate(run.directory), ranks)
    if ranks.rank == 0:
        why = evaluations.why_stalled(step) if step < total_steps else f"{total_steps} steps"
        left = "; ".join(["nothing to do", *too_many_steps(config, total_steps, run.data.plan.steps_per_epoch[0])])
        print(
            f"already finished: {why}; {directory} holds the {contents['weights']} weights (step {contents['step']}, "
            f"{contents['dtype']}); {left}",
            flush=True,
        )
    check_budget(run)
    return True


def _cut_off(directory: Path) -> list[str]:
    """Return a sentence if a kill came between the record's entry of a later export and the rename of that export."""
    record, place = Record(directory.parent), directory.name
    entries = [entry for entry in record.read() if entry.kind == "export" and entry.content.get("directory") == place]
    digest = sha256(directory / EXPORT)
    if digest not in [entry.content["sha256"] for entry in entries[:-1]] or entries[-1].content["sha256"] == digest:
        return []
    return [f"a kill has cut off the export of {entries[-1]} of {record.path}, which was to replace {directory}"]


def check_recorded(run: Path, folder: Path) -> None:
    """Raise UserError unless the record in `run` names this export, and export.json its certificate, if there is one."""
    record, path, certificate = Record(run), folder / EXPORT, folder / CERTIFICATE
    digests = [entry.content["sha256"] for entry in record.read() if entry.kind == "export"]
    is_recorded = path.is_file() and sha256(path) in digests
    sums = read_contents(folder)["files"] if is_recorded else {}
    if not is_recorded or (certificate.exists() and sums.get(CERTIFICATE) != sha256(certificate)):
        raise UserError(f"{folder} is not what {record.path} says of an export; {EXPORT_AGAIN}")


def check_budget(run: "TrainingRun") -> None:
    """Raise NotMet on all ranks if forgetting.strict is set and the export exceeds its budget. Every rank must call this.

    A signal may have ended the search of a budget without an export, or beside the export of another budget: neither is judged.
    """
    forgetting = run.config.forgetting
    if forgetting.strict:
        from training.budget import certificate_lines

        certificate = read_on_first(lambda: read_certificate(run.directory), run.ranks)
        budget = {name: certificate.get(name) for name in ("max_kl", "min_gain", "max_drop")}
        if budget == {name: getattr(forgetting, name) for name in budget} and not certificate["met"]:
            sentence = certificate_lines(certificate)[0].removeprefix("budget: ")
            raise NotMet(f"{sentence}; forgetting.strict=True does not allow that")


def read_certificate(run: Path) -> dict:
    """Return the certificate of a run's export; {} without a budget for forgetting. Raise UserError if it is damaged."""
    path = run / "export" / CERTIFICATE
    certificate = read_json(path, "remove it, and start the run again") if path.exists() else {}
    if certificate and "level" not in certificate:
        raise UserError(f"{path} has no level of confidence: an unreleased version wrote it; start the run again")
    return certificate


def certificate_of(run: Path, contents: dict) -> dict:
    """Return the certificate of a run's export if it is about the weights that `contents` describe; else {}."""
    certificate = read_certificate(run)
    is_same = certificate and all(certificate[key] == contents[key] for key in ("checkpoint", "averaged"))
    return certificate if is_same else {}


def export_run(run: "TrainingRun", state: dict, evaluations: Evaluations, record: RunRecord) -> dict | None:
    """Write the Hugging Face directory of a finished run, and return the contents of its export.json. Every rank must call
    this.

    The files have the dtype of config.json. With run.export=best the best checkpoint is first loaded into the parameters. With
    LoRA the adapters are merged into the export, and `adapter/` beside it has them alone, as peft reads them. With a budget
    training/budget.py chooses the weights; a signal ends its search, and the function returns None without an export.
    export.json holds the head of the record before the export's own entry, which has the SHA-256 of export.json.
    """
    config, ranks, model, model_config, tokenizer = run.config, run.ranks, run.model, run.model_config, run.tokenizer
    directory, checkpoints = run.directory / "export", run.directory / "checkpoints"
    adapter = directory.with_name(ADAPTER_DIRECTORY)
    contents = read_on_first(
        lambda: contents_of_export(config, state["step"], evaluations, model_config, checkpoints, run.data.kept), ranks
    )
    certificate: dict | None = {}
    dtype = getattr(torch, str(contents["dtype"]))
    if config.forgetting.has_budget:
        from training.budget import keep_budget

        certificate = keep_budget(run, state["step"], evaluations, record, dtype)
        if certificate is None:
            return None
        chosen = ("weights", "step", "checkpoint", "identity", "validation_loss", "averaged")
        kept = {name: contents[name] for name in ("steps_in_total", "dtype")}
        contents = kept | {name: certificate[name] for name in chosen} | {"asked": contents}
    elif contents["weights"] == "best":
        best = checkpoints / checkpoint_name(contents["step"])
        hint = "the best checkpoint cannot be exported: start again with run.export=last"
        load_parameters(best, trained_parameters(model), ranks, hint)

    def write_rest(folder: Path) -> None:
        write_files(folder, config, model_config, tokenizer, run.data.chats, run.data.stop_ids, dtype)
        if certificate:
            write_json(folder / CERTIFICATE, certificate)
        sums = {"files": sums_of(folder), "adapter": sums_of(temporary_path(adapter)) if config.lora.rank else {}}
        write_contents(folder, contents | sums, record, directory.name)
        if config.lora.rank:
            publish(adapter)  # after the entry that has its sums

    if config.model.rope_type:
        tokenizer.model_max_length = window(model_config)  # other tools warn or truncate there
    if config.lora.rank:
        from model.lora import save_adapter

        save_adapter(adapter, model, config, ranks)
    copied = untrained_tensors(model, config.model.path, config.run.export_mtp)
    export_model(
        directory,
        tensors_in_files(model),
        dtype,
        ranks,
        write_rest,
        merge=merged(model),
        form=stored_form(model_config),
        copied=copied,
    )
    return contents


def write_contents(folder: Path, contents: dict, record: Record, place: str) -> None:
    """Write export.json with the head of the run's record, and append the entry of the export to it. For rank 0 alone.

    folder: under its temporary name. place: its final name.
    """
    write_json(folder / EXPORT, {"format": FORMAT} | contents | {"head": record.head()})
    exported = {name: contents[name] for name in ("step", "weights", "checkpoint", "dtype")}
    record.append("export", directory=place, sha256=sha256(folder / EXPORT), **exported)


def read_contents(folder: Path) -> dict:
    """Return export.json without its format; {} if there is none. Raise UserError if it is damaged or of another format."""
    path = folder / EXPORT
    return _without_format(path, read_json(path, EXPORT_AGAIN)) if path.is_file() else {}


def _without_format(path: Path, contents: dict) -> dict:
    if contents.get("format") != FORMAT:
        raise UserError(
            f"{path} has format {contents.get('format')}, and this version of the code reads format {FORMAT}; {EXPORT_AGAIN}"
        )
    return {name: value for name, value in contents.items() if name != "format"}


def lines_of_export(run: "TrainingRun", state: dict, evaluations: Evaluations, contents: dict | None) -> list[str]:
    """Return messages on the export with these contents: which weights it holds, and warnings about them."""
    if contents is None:
        return ["stopped by a signal before the export; start again to continue"]
    export, step = run.config.run.export, state["step"]
    loss, base, best = contents["validation_loss"], evaluations.base_value, evaluations.best_value
    words = best_in_words(evaluations.best_by)
    judged = "" if loss is None else f", validation loss {loss:.4g}"
    judged += f", {evaluations.curve} {best:.4g}" if "best_by" in contents else ""
    lines = [evaluations.why_stalled(step)] if step < run.data.total_steps else []
    if state["updates"] == 0:
        lines.append("warning: no step has changed the weights: the export is the base model")
    share = (contents.get("averaged") or {}).get("share_of_tuned")  # with a budget for forgetting
    name = f"the {contents['weights']} weights" if share != 0 else "the base's weights: no other meet the budget"
    average = f", alpha {share:.3f} of their average with the base" if share else ""
    lines.append(
        f"exported {name} (step {contents['step']}{average}{judged}, {contents['dtype']}) to {run.directory / 'export'}"
        + (f", and the adapter to {run.directory / 'adapter'}" if run.config.lora.rank else "")
    )
    if export == "best" and evaluations.best_step is None:
        criterion = "loss" if words.endswith("loss") else evaluations.curve
        lines.append(f"warning: run.export=best, but no evaluation of a trained model gave a finite {criterion}")
    if export == "last" and evaluations.best_step not in (None, step) and "asked" not in contents:
        lines.append(
            f"{words}, {best:.4g}, was that of step {evaluations.best_step}: start again with run.export=best to export it"
        )
    if base is not None and best is not None and not is_better(evaluations.best_by, best, base):
        lines.append(
            f"warning: no trained checkpoint is better than the base model on data.validation: {best:.4g} at step "
            f"{evaluations.best_step}, {base:.4g} at step 0"
        )
    return lines


# ---- What an export has beside the weights -------------------------------------------------------------------------------


def write_files(
    folder: Path,
    config: Config,
    model_config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    chats: ChatSettings,
    stop_ids: tuple[int, ...],
    dtype: torch.dtype,
) -> None:
    """Write everything but the weights, which have `dtype`, to `folder`. Raise UserError if generation_config.json of the base is damaged.

    transformers and the servers that read its directories stop at `eos_token_id` of generation_config.json. It becomes
    `stop_ids`, the tokens that end an answer (`ExampleEncoder.stop_ids`): the ends that training has taught, and the base's
    own.
    """
    model_config = copy.copy(model_config)
    model_config.dtype = dtype  # in which servers load the weights
    vars(model_config).pop("auto_map", None)  # names files with the base's own code (Phi-3), which an export has not
    base = read_json(Path(config.model.path, CONFIG), "copy it again, and start again to export")
    for name, value in randomness(base.get("text_config", base)).items():
        setattr(model_config, name, value)
    if is_part(model_config):
        model_config = whole_config(model_config)
        for path in processors(config.model.path):
            shutil.copyfile(path, folder / path.name)
    model_config.save_pretrained(folder)
    name_rope_as_before(folder / CONFIG)
    save_tokenizer(tokenizer, folder)
    write_chat_settings(folder, chats)
    file = Path(config.model.path, GENERATION_CONFIG)
    generation = read_json(file, "remove it or copy it again, and start again to export") if file.is_file() else {}
    generation.pop("_from_model_config", None)  # some versions would then take `eos_token_id` of config.json
    write_json(folder / GENERATION_CONFIG, generation | {"eos_token_id": list(stop_ids)})
    copy_licences(config.model.path, folder)


def name_rope_as_before(path: Path) -> None:
    """Repeat the RoPE settings of a config.json under the names that transformers before 5, and servers with it, read.

    Without them these use a base of 10,000 and no scaling, and say nothing (vllm#42624).
    """
    whole = json.loads(path.read_text(encoding="utf-8"))
    config = whole.get("text_config", whole)
    rope = config.get("rope_parameters") or {}
    full = rope.get("full_attention", rope)
    apart = {key: full[key] for key in ("rope_theta", "partial_rotary_factor") if key in full}
    # Phi 3 had other fields for longrope, and Gemma 4, with proportional, is younger than these names.
    if full.get("rope_type", "default") not in ("default", "longrope", "proportional"):
        apart |= {"rope_scaling": {key: value for key, value in full.items() if key not in apart}}
    config |= apart
    write_json(path, whole)


def sums_of(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file of an export by its path in `folder`, without export.json and the model card."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in (EXPORT, CARD)]
    return {str(path.relative_to(folder)): digest for path, digest in sha256_of_all(files).items()}


def damage(sums: dict[Path, str], ranks: Ranks) -> list[str]:
    """Return a sentence for each file whose SHA-256 differs from `sums`, or that is missing. Every rank must call this.

    The ranks share the files, and read every byte. Files that `sums` do not name, such as a user's, are ignored.
    """
    mine = sorted(sums)[ranks.rank :: ranks.world_size]
    present = [path for path in mine if path.is_file()]
    problems = [f"{path} is missing" for path in mine if path not in present]
    try:
        digests = sha256_of_all(present)
    except OSError as error:
        problems.append(f"{error.filename or present[0].parent} cannot be read ({error.strerror})")
    else:
        problems += [
            f"{path} has changed: its SHA-256 is not that of export.json"
            for path in present
            if digests[path] != sums[path]
        ]
    return sorted(problem for part in gather_objects(problems, ranks) for problem in part)


def read_json(path: Path, mend: str) -> dict:
    """Return the JSON object in a file. Raise UserError, which ends with `mend`, if the file holds none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
        return content
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}); {mend}") from error
