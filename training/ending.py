"""The end of a run: which weights are exported, the files beside them with their SHA-256, and whether that is done already.

scripts/export.py writes and checks the same files (training/checkpoint_export.py).
"""

import copy
import json
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from common.dtypes import dtype_name
from common.durable_files import publish, temporary_path, write_json
from common.errors import NotMet, UserError
from common.sha256 import sha256, sha256_of_all
from configs.config import Config
from data.chat_template import write_chat_settings
from data.encoding import ExampleEncoder
from data.tokens import save_tokenizer
from distributed.checkpoint import load_parameters
from distributed.checkpoint_directory import checkpoint_name
from distributed.export import export_model
from distributed.process_group import Ranks, gather_objects, read_on_first
from model.architectures import copy_licences
from model.language_model import PackedLanguageModel, merged, parameter_names, stored_form, trained_parameters
from training.chat_settings import chat_settings
from training.description import too_many_steps
from training.evaluations import Evaluations, best_in_words, curve_of, is_better
from training.identity import marks_of
from training.record import Record, RunRecord

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
EXPORT = "export.json"  # which weights an export holds, and the SHA-256 of its files
CERTIFICATE = "certificate.json"  # of a budget for forgetting (training/budget.py)
CARD, BOM, SIGNATURE = "README.md", "bom.json", "model.sig"  # later than the others, and may be written anew
ADAPTER_DIRECTORY = "adapter"  # beside the export, with LoRA


# ---- The export of a run -------------------------------------------------------------------------------------------------


def contents_of_export(
    config: Config, step: int, evaluations: Evaluations, model_config: PretrainedConfig, checkpoints: Path
) -> dict:
    """What the export of a run that ended after `step` holds, as plain JSON: `weights` (last or best), their `step`, the `dtype`.

    `checkpoint` and `identity` are the marks of the checkpoint (training/identity.py).

    The base model is never exported: `best` is the best of the trained checkpoints. Without any evaluation of a trained
    model, the last weights stand in for the best. With a budget it is what was asked for: `asked` in export.json.
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
    if best is not None and curve_of(evaluations.best_by) != "validation/loss":
        contents |= {"best_by": evaluations.best_by, "best_value": evaluations.best_value}
    if config.forgetting.max_kl is not None:
        contents["budget"] = {"max_kl": config.forgetting.max_kl, "by": evaluations.best_by}
    return contents


def damage_of_export(export_directory: Path, contents: dict, ranks: Ranks) -> list[str] | None:
    """What is wrong with the files of the export that `contents` describe, [] if nothing. None: there is no such export.

    A collective, which reads all of its files, and with LoRA those of the adapter.
    """

    def sums() -> dict[Path, str] | None:
        """File -> SHA-256 as the export says; None if it is not the one that `contents` describe."""
        try:
            written = json.loads((export_directory / EXPORT).read_text(encoding="utf-8"))
            files, adapter, _ = written.pop("files"), written.pop("adapter"), written.pop("head")
        except (OSError, ValueError, KeyError, TypeError, AttributeError):  # no export, or one of an earlier version
            return None
        if written.get("asked", written) != contents:
            return None
        adapter_directory = export_directory.with_name(ADAPTER_DIRECTORY)
        parts = (export_directory, files), (adapter_directory, adapter)
        return {folder / name: digest for folder, part in parts for name, digest in part.items()}

    found = read_on_first(sums, ranks)
    return None if found is None else damage(found, ranks)


def is_finished(
    config: Config,
    step: int,
    total_steps: int,
    evaluations: Evaluations,
    is_changed: bool,
    model_config: PretrainedConfig,
    export_directory: Path,
    ranks: Ranks,
) -> bool:
    """Whether all steps are taken, and the export that exists is the one that is asked for and undamaged. Says so.

    A collective. Raises UserError if this start is of another identity: nothing is left to train with it.
    """
    checkpoints = export_directory.with_name("checkpoints")
    contents = read_on_first(lambda: contents_of_export(config, step, evaluations, model_config, checkpoints), ranks)
    finished = (step == total_steps or evaluations.is_stalled) and evaluations.is_judged
    problems = damage_of_export(export_directory, contents, ranks) if finished else None
    if problems is None:
        return False
    problems = problems or read_on_first(lambda: _cut_off(export_directory), ranks)
    if problems:
        if ranks.rank == 0:
            print(
                f"warning: {'; '.join(problems)}; the weights of step {contents['step']} are exported again", flush=True
            )
        return False
    if is_changed:
        raise UserError(
            f"{export_directory.parent} has taken all of its {step} steps before it was changed, and is exported: nothing is "
            "left to train with what is set now; raise optimizer.epochs or optimizer.max_steps, or choose another run.name"
        )
    read_on_first(lambda: check_recorded(export_directory.parent, export_directory), ranks)
    contents |= read_on_first(lambda: read_certificate(export_directory.parent), ranks)
    if ranks.rank == 0:
        why = evaluations.why_stalled(step) if step < total_steps else f"{total_steps} steps"
        left = "; ".join(["nothing to do", *too_many_steps(config, total_steps)])
        print(
            f"already finished: {why}; {export_directory} holds the {contents['weights']} weights (step {contents['step']}, "
            f"{contents['dtype']}); {left}",
            flush=True,
        )
    check_budget(config, export_directory, ranks)
    return True


def _cut_off(export_directory: Path) -> list[str]:
    """A sentence if a kill came between the entry of a later export, which was asked for otherwise, and its rename."""
    record, place = Record(export_directory.parent), export_directory.name
    entries = [entry for entry in record.read() if entry.kind == "export" and entry.content.get("directory") == place]
    digest = sha256(export_directory / EXPORT)
    if digest not in [entry.content["sha256"] for entry in entries[:-1]] or entries[-1].content["sha256"] == digest:
        return []
    return [f"a kill has cut off the export of {entries[-1]} of {record.path}, which was to replace {export_directory}"]


def check_recorded(run: Path, folder: Path) -> None:
    """Raise UserError unless the run's record names this export, and export.json its certificate, if there is one."""
    record, path, certificate = Record(run), folder / EXPORT, folder / CERTIFICATE
    known = path.is_file() and sha256(path) in [one.content["sha256"] for one in record.read() if one.kind == "export"]
    sums = read_json(path, "remove it")["files"] if known else {}
    if not known or (certificate.exists() and sums.get(CERTIFICATE) != sha256(certificate)):
        raise UserError(f"{folder} is not what {record.path} says of an export; remove it, and export again")


def check_budget(config: Config, export_directory: Path, ranks: Ranks) -> None:
    """Raise NotMet on all ranks if forgetting.strict is set and the budget of the export is not met. A collective.

    A signal may have ended the search of a budget without an export, or beside that of another budget.
    """
    if config.forgetting.strict:
        from training.budget import certificate_lines

        certificate = read_on_first(lambda: read_certificate(export_directory.parent), ranks)
        if certificate and certificate["max_kl"] == config.forgetting.max_kl and not certificate["met"]:
            what = certificate_lines(certificate)[0].removeprefix("budget: ")
            raise NotMet(f"{what}; forgetting.strict=True does not allow that")


def read_certificate(run: Path) -> dict:
    """The certificate of a run's export; empty without a budget for forgetting. Raises UserError if it is damaged."""
    path = run / "export" / CERTIFICATE
    return read_json(path, "remove it, and start the run again") if path.exists() else {}


def certificate_of(run: Path, contents: dict) -> dict:
    """The certificate of a run's export, if it is of the weights that `contents` describe; else empty."""
    found = read_certificate(run)
    return found if found and all(found[key] == contents[key] for key in ("checkpoint", "averaged")) else {}


def export_run(
    config: Config,
    step: int,
    total_steps: int,
    updates: int,
    evaluations: Evaluations,
    export_directory: Path,
    model: PackedLanguageModel,
    model_config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    record: RunRecord,
) -> list[str]:
    """Write the Hugging Face directory of a finished run, and return lines that say what it holds. A collective.

    The dtype is that of config.json. With `run.export=best` the parameters are first overwritten with those of the best
    checkpoint. With LoRA, adapters are merged in it, and `adapter/` beside it has them alone, as peft reads them. With
    a budget training/budget.py chooses the weights; a signal ends its search without an export. export.json has the head of the
    record before the export's own entry, which has the SHA-256 of export.json.
    """
    ranks = record.ranks
    checkpoints = export_directory.with_name("checkpoints")
    contents = read_on_first(lambda: contents_of_export(config, step, evaluations, model_config, checkpoints), ranks)
    certificate: dict | None = {}
    dtype = getattr(torch, str(contents["dtype"]))
    if config.forgetting.max_kl is not None:
        from training.budget import keep_budget

        certificate = keep_budget(config, step, evaluations, checkpoints, record, dtype)
        if certificate is None:
            return ["stopped by a signal before the export; start again to continue"]
        chosen = ("weights", "step", "checkpoint", "identity", "validation_loss", "averaged")
        kept = {name: contents[name] for name in ("steps_in_total", "dtype")}
        contents = kept | {name: certificate[name] for name in chosen} | {"asked": contents}
    elif contents["weights"] == "best":
        best = checkpoints / checkpoint_name(contents["step"])
        hint = "the best checkpoint cannot be exported: start again with run.export=last"
        load_parameters(best, trained_parameters(model), ranks, hint)

    def write_rest(folder: Path) -> None:
        write_files(folder, config, model_config, tokenizer)
        if certificate:
            write_json(folder / CERTIFICATE, certificate)
        sums = {"files": sums_of(folder), "adapter": sums_of(temporary_path(adapter)) if config.lora.rank else {}}
        write_contents(folder, contents | sums, record, export_directory.name)
        if config.lora.rank:
            publish(adapter)  # after the entry that has its sums

    adapter = export_directory.with_name(ADAPTER_DIRECTORY)
    if config.model.rope_type:
        tokenizer.model_max_length = model_config.max_position_embeddings  # other tools warn or truncate there
    if config.lora.rank:
        from model.lora import save_adapter

        save_adapter(adapter, model, config, ranks)
    form = stored_form(model_config)
    export_model(export_directory, parameter_names(model), dtype, ranks, write_rest, merge=merged(model), form=form)
    lines = [evaluations.why_stalled(step)] if step < total_steps else []
    if updates == 0:
        lines.append("warning: no step has changed the weights: the export is the base model")
    return lines + _lines(config, step, evaluations, contents, export_directory)


def write_contents(folder: Path, contents: dict, record: Record, place: str) -> None:
    """Write export.json with the head of the run's record, to which this appends the entry of the export. For rank 0 alone.

    folder: under its temporary name. place: the directory that it will be.
    """
    write_json(folder / EXPORT, contents | {"head": record.head()})
    exported = {name: contents[name] for name in ("step", "weights", "checkpoint", "dtype")}
    record.append("export", directory=place, sha256=sha256(folder / EXPORT), **exported)


def _lines(config: Config, step: int, evaluations: Evaluations, contents: dict, export_directory: Path) -> list[str]:
    loss, base, best = contents["validation_loss"], evaluations.base_value, evaluations.best_value
    words = best_in_words(evaluations.best_by)
    judged = "" if loss is None else f", validation loss {loss:.4g}"
    judged += f", {curve_of(evaluations.best_by)} {best:.4g}" if "best_by" in contents else ""
    lines = [
        f"exported the {contents['weights']} weights (step {contents['step']}{judged}, {contents['dtype']}) to {export_directory}"
    ]
    if config.run.export == "best" and evaluations.best_step is None:
        what = "loss" if words.endswith("loss") else curve_of(evaluations.best_by)
        lines.append(f"warning: run.export=best, but no evaluation of a trained model gave a finite {what}")
    if config.run.export == "last" and evaluations.best_step not in (None, step) and "asked" not in contents:
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
    folder: Path, config: Config, model_config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Write everything but the weights to `folder`. Raises UserError if generation_config.json of the base is damaged.

    transformers and the servers that read its directories stop at `eos_token_id` of generation_config.json. It becomes the list
    of the tokens that end an answer (`ExampleEncoder.stop_ids`): those that training has taught, and those of the base's file.
    """
    model_config = copy.copy(model_config)
    vars(model_config).pop("auto_map", None)  # names files with the base's own code (Phi-3), which an export has not
    model_config.save_pretrained(folder)
    name_rope_as_before(folder / CONFIG)
    save_tokenizer(tokenizer, folder)
    settings = chat_settings(config.data)
    write_chat_settings(folder, settings)
    file = Path(config.model.path, GENERATION_CONFIG)
    generation = read_json(file, "remove it or copy it again, and start again to export") if file.is_file() else {}
    generation.pop("_from_model_config", None)  # some versions would then take `eos_token_id` of config.json
    generation["eos_token_id"] = list(ExampleEncoder(tokenizer, settings).stop_ids)
    write_json(folder / GENERATION_CONFIG, generation)
    copy_licences(config.model.path, folder)


def name_rope_as_before(path: Path) -> None:
    """Give a config.json the settings of RoPE also under the names that transformers before 5 knows, and servers with it
    (vllm#42624). Without them they take a base of 10,000 and no scaling, and say nothing.
    """
    config = json.loads(path.read_text(encoding="utf-8"))
    rope = config.get("rope_parameters") or {}
    full = rope.get("full_attention", rope)
    apart = {key: full[key] for key in ("rope_theta", "partial_rotary_factor") if key in full}
    if full.get("rope_type", "default") not in ("default", "longrope"):  # Phi 3 had other fields for that
        apart |= {"rope_scaling": {key: value for key, value in full.items() if key not in apart}}
    write_json(path, config | apart)


def sums_of(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file of an export but export.json and its card, by its path in `folder`."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in (EXPORT, CARD)]
    return {str(path.relative_to(folder)): digest for path, digest in sha256_of_all(files).items()}


def damage(sums: dict[Path, str], ranks: Ranks) -> list[str]:
    """What is wrong with files that must have these SHA-256 sums, one sentence each. A collective; the ranks share the files.

    Every byte is read. Files that nobody knows, such as a user's, are not looked at.
    """
    mine = sorted(sums)[ranks.rank :: ranks.world_size]
    there = [path for path in mine if path.is_file()]
    problems = [f"{path} is missing" for path in mine if path not in there]
    try:
        found = sha256_of_all(there)
    except OSError as error:
        problems.append(f"{error.filename or there[0].parent} cannot be read ({error.strerror})")
    else:
        problems += [
            f"{path} has changed: its SHA-256 is not that of export.json" for path in there if found[path] != sums[path]
        ]
    return sorted(problem for part in gather_objects(problems, ranks) for problem in part)


def read_json(path: Path, mend: str) -> dict:
    """The JSON object in a file. Raises UserError, which says what to do about it, if there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
        return content
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); {mend}") from error
