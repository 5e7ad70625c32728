"""What every rank must have alike before the first step: config, plan, data, base model, tokenizer, versions, device."""

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from configs.config import Config, as_dict
from distributed.agreement import check_agreement, library_versions
from distributed.process_group import Ranks
from model.fingerprint import fingerprint_of_base, fingerprint_of_tokenizer
from training.inputs import Inputs
from training.progress import Progress, fresh_progress, run_settings, step_meaning


def agree_on_start(
    config: Config,
    inputs: Inputs,
    model_config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    ranks: Ranks,
) -> Progress:
    """A run that has taken no step, the same on every rank. A collective.

    Raises UserError on all ranks if a rank read other files, another config or another model, or runs other versions.
    """
    meaning = step_meaning(config, inputs, model_config, fingerprint_of_base(config.model.path))
    settings = run_settings(config, inputs.total_steps, ranks.world_size)
    fresh = fresh_progress(meaning, settings, inputs.train, inputs.validation)
    check_agreement(
        {
            "the config": as_dict(config),
            "the plan": {"steps": inputs.total_steps, "warm-up steps": inputs.warmup_steps},
            "the meaning of a step": meaning,
            "data.validation": fresh.validation,
            "the tokenizer of model.path": fingerprint_of_tokenizer(tokenizer),
            "the model's config": model_config.to_dict(),
            "the versions": library_versions(),
            "the device type": ranks.device.type,
        },
        ranks,
    )
    return fresh


def check_resume(resume: str, run_directory: Path) -> None:
    """Raise UserError if run.resume=never and the run exists. A restart by torchrun (`--max-restarts`) continues it."""
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    if resume == "never" and run_directory.exists() and not restarted:
        raise UserError(f"{run_directory} exists and run.resume=never; choose another run.name or remove it")
