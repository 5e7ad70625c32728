"""The end of a run: which weights are exported, the files beside them, and a stop because of weights that are not good."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from common.dtypes import dtype_name
from common.errors import UserError
from configs.config import Config
from data.batches import Plan
from distributed.checkpoint import load_checkpoint
from distributed.checkpoint_directory import check_whole, checkpoint_name, set_aside_after, weights_digest
from distributed.export import export_model
from distributed.process_group import Ranks, read_on_first
from distributed.saver import Saver
from model.language_model import PackedLanguageModel, parameter_names, trained_parameters
from model.lora import adapters_sum, save_adapter
from training.criterion import best_in_words, curve_of, is_better
from training.export_files import RECORD, damage, sums_of, write_files
from training.identity import fingerprint_of_checkpoint
from training.progress import Progress

ADAPTER_DIRECTORY = "adapter"  # beside the export, with LoRA


def export_record(config: Config, progress: Progress, model_config: PretrainedConfig, checkpoints: Path) -> dict:
    """What the export of a finished run holds, as plain JSON: `weights` (last or best), their `step`, and the `dtype`.

    `checkpoint` tells the checkpoint from another one of the same step, `identity` is the fingerprint of what trained it.

    The base model is never exported: `best` is the best of the trained checkpoints. Without any evaluation of a trained
    model, the last weights stand in for the best.
    """
    best = progress.best_step if config.run.export == "best" else None
    step = progress.step if best is None else best
    checkpoint = checkpoints / checkpoint_name(step)
    loss = progress.loss if progress.evaluated.get("validation") == progress.step else None
    record = {
        "weights": "last" if best is None else "best",
        "step": step,
        "checkpoint": weights_digest(checkpoint),
        "identity": fingerprint_of_checkpoint(checkpoint),
        "steps_in_total": progress.step,
        "validation_loss": loss if best is None else progress.best_loss,
        "dtype": dtype_name(getattr(model_config, "dtype", None) or torch.bfloat16),
    }
    if best is not None and curve_of(progress.best_by) != "validation/loss":
        record |= {"best_by": progress.best_by, "best_value": progress.best_value}
    return record


def damage_of_export(export_directory: Path, record: dict, ranks: Ranks) -> list[str] | None:
    """What is wrong with the files of the export that `record` describes, [] if nothing. None: there is no such export.

    A collective, which reads all of its files, and with LoRA those of the adapter.
    """

    def sums() -> dict[Path, str] | None:
        try:
            written = json.loads((export_directory / RECORD).read_text(encoding="utf-8"))
            files, adapter = written.pop("files"), written.pop("adapter")
        except (OSError, ValueError, KeyError, TypeError, AttributeError):  # no export, or one of an earlier version
            return None
        if written != record:
            return None
        folder = export_directory.with_name(ADAPTER_DIRECTORY)
        return {export_directory / name: digest for name, digest in files.items()} | {
            folder / name: digest for name, digest in adapter.items()
        }

    found = read_on_first(sums, ranks)
    return None if found is None else damage(found, ranks)


def is_finished(
    config: Config,
    progress: Progress,
    fresh: Progress,
    model_config: PretrainedConfig,
    export_directory: Path,
    total_steps: int,
    ranks: Ranks,
) -> bool:
    """Whether all steps are taken, and the export that exists is the one that is asked for. A collective; says so."""
    judged = progress.best_by == fresh.best_by and (not fresh.validation or progress.validation == fresh.validation)
    record = read_on_first(
        lambda: export_record(config, progress, model_config, export_directory.with_name("checkpoints")), ranks
    )
    stalled = has_ended_early(progress, config)
    if not (progress.is_finished(total_steps, config.run.stop_after_no_gain) and judged):
        return False
    problems = damage_of_export(export_directory, record, ranks)
    if problems is None:
        return False
    if problems:
        if ranks.rank == 0:
            print(
                f"warning: {'; '.join(problems)}; the weights of step {record['step']} are exported again", flush=True
            )
        return False
    if progress.identity != fresh.identity:
        raise UserError(
            f"{export_directory.parent} has taken all of its {progress.step} steps before it was changed, and is exported: "
            "nothing is left to train with what is set now; raise optimizer.epochs or optimizer.max_steps, or choose another "
            "run.name"
        )
    if ranks.rank == 0:
        print(
            f"already finished: {early_end(progress) if stalled else f'{total_steps} steps'}; {export_directory} holds the {record['weights']} weights (step "
            f"{record['step']}, {record['dtype']}); nothing to do{_no_more_steps(config, total_steps)}",
            flush=True,
        )
    return True


def has_ended_early(progress: Progress, config: Config) -> bool:
    """Whether a finished run has ended for want of a gain; not if that was at its last step."""
    return progress.is_stalled(config.run.stop_after_no_gain) and progress.step < progress.settings["steps in total"]


def early_end(progress: Progress) -> str:
    """Why a run has ended before its last step, in words."""
    count = progress.without_gain
    found = "1 evaluation has" if count == 1 else f"{count} evaluations in a row have"
    return (
        f"ended early after step {progress.step}: {found} found nothing better than "
        f"{best_in_words(progress.best_by)}, {progress.best_value:.4g} at step {progress.best_step}"
    )


def _no_more_steps(config: Config, total_steps: int) -> str:
    """Why a larger optimizer.max_steps has not made the run longer; nothing if it is not larger."""
    wanted, epochs = config.optimizer.max_steps, config.optimizer.epochs
    if wanted is None or wanted <= total_steps:
        return ""
    return f" (optimizer.max_steps={wanted}, but optimizer.epochs={epochs} has only {total_steps} steps)"


def check_last_weights(
    progress: Progress, plan: Plan, saver: Saver, validate: Callable[[Plan], dict[str, float] | None]
) -> bool:
    """Whether the loss of the last step is finite with the final weights. A collective. False after a signal.

    `validate` computes the losses over a plan. Raises UserError on all ranks if one is not finite: a run does not end well
    with weights that are not good.
    """
    losses = validate(Plan(1, lambda step: plan.batch(progress.step - 1)))  # the last step alone
    if losses is None:
        return False
    if not all(map(math.isfinite, losses.values())):
        what = f"the loss of the last steps is not finite with the weights after step {progress.step}"
        stop_for_bad_weights(what, progress, saver)
    return True


def export_run(
    config: Config,
    progress: Progress,
    export_directory: Path,
    model: PackedLanguageModel,
    model_config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    ranks: Ranks,
) -> list[str]:
    """Write the Hugging Face directory of a finished run, and return lines that say what it holds. A collective.

    The dtype is that of config.json. With `run.export=best` the parameters are first overwritten with those of the best
    checkpoint. With LoRA, adapters are merged in it, and `adapter/` beside it has them alone, as peft reads them.
    """
    checkpoints = export_directory.with_name("checkpoints")
    record = read_on_first(lambda: export_record(config, progress, model_config, checkpoints), ranks)
    if record["weights"] == "best":
        best = checkpoints / checkpoint_name(record["step"])
        check_whole(best, ranks, "the best checkpoint cannot be exported: start again with run.export=last")
        load_checkpoint(best, trained_parameters(model), None, ranks)

    def write_rest(folder: Path) -> None:
        write_files(folder, config, model_config, tokenizer)
        sums = {"files": sums_of(folder), "adapter": sums_of(adapter) if config.lora.rank else {}}
        (folder / RECORD).write_text(json.dumps(record | sums, indent=1) + "\n", encoding="utf-8")

    adapter = export_directory.with_name(ADAPTER_DIRECTORY)
    if config.model.rope_type:
        tokenizer.model_max_length = model_config.max_position_embeddings  # other tools warn or truncate there
    if config.lora.rank:
        save_adapter(adapter, model, config.lora, config.model.path, ranks)
    dtype = getattr(torch, record["dtype"])
    export_model(export_directory, parameter_names(model), dtype, ranks, write_rest, added=adapters_sum(model))
    return _lines(config, progress, record, export_directory)


def stop_for_bad_weights(what: str, progress: Progress, saver: Saver) -> NoReturn:
    """Let the run continue from the newest checkpoint that is known to be good, and raise UserError. A collective.

    A checkpoint is known to be good when a finite loss has been computed from its weights. Later ones are renamed.
    """
    saver.wait()
    good = progress.good_checkpoint()
    renamed = read_on_first(lambda: set_aside_after(saver.directory, good), saver.ranks)
    aside = f"; {', '.join(renamed)} in {saver.directory} may hold bad weights and will not be used" if renamed else ""
    start = f"the checkpoint of step {good}, which is good" if good else "the base model"
    again = " with run.resume=changed" if good else ""
    raise UserError(
        f"{what}{aside}; lower optimizer.learning_rate, or check the data of these steps, and start again{again}: the run "
        f"continues from {start}"
    )


def _lines(config: Config, progress: Progress, record: dict, export_directory: Path) -> list[str]:
    loss, base, best = record["validation_loss"], progress.base_value, progress.best_value
    words = best_in_words(progress.best_by)
    judged = "" if loss is None else f", validation loss {loss:.4g}"
    judged += f", {curve_of(progress.best_by)} {best:.4g}" if "best_by" in record else ""
    lines = [early_end(progress)] if has_ended_early(progress, config) else []
    lines.append(
        f"exported the {record['weights']} weights (step {record['step']}{judged}, {record['dtype']}) to {export_directory}"
    )
    if config.run.export == "best" and record["weights"] == "last":
        what = "loss" if words.endswith("loss") else curve_of(progress.best_by)
        lines.append(f"warning: run.export=best, but no evaluation of a trained model gave a finite {what}")
    if config.run.export == "last" and progress.best_step not in (None, progress.step):
        lines.append(
            f"{words}, {best:.4g}, was that of step {progress.best_step}: start again with run.export=best to export it"
        )
    if progress.updates == 0:
        lines.append("warning: no step has changed the weights: the export is the base model")
    if base is not None and best is not None and not is_better(progress.best_by, best, base):
        lines.append(
            f"warning: no trained checkpoint is better than the base model on data.validation: {best:.4g} at step "
            f"{progress.best_step}, {base:.4g} at step 0"
        )
    return lines
