"""The end of a finished run: which weights are exported, and the files beside them."""

import shutil
from pathlib import Path

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from configs.config import Config
from distributed.checkpoint import best_checkpoint, load_checkpoint
from distributed.export import export_model
from distributed.process_group import Ranks, read_on_first


def export_run(
    config: Config,
    checkpoints: Path,
    export_directory: Path,
    parameters: dict[str, nn.Parameter],
    model_config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    ranks: Ranks,
) -> None:
    """Write the Hugging Face directory of a finished run, in the dtype that config.json names. A collective.

    With `run.export=best` the parameters are first overwritten with those of the best checkpoint.
    """
    if config.run.export == "best":
        best = read_on_first(lambda: best_checkpoint(checkpoints), ranks)
        if best:
            load_checkpoint(best, parameters, None, ranks)

    def write_rest(folder: Path) -> None:
        model_config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        generation = Path(config.model.path) / "generation_config.json"
        if generation.is_file():
            shutil.copy(generation, folder)

    if config.model.rope_type:
        tokenizer.model_max_length = model_config.max_position_embeddings  # other tools warn or truncate there
    export_model(
        export_directory, parameters, getattr(model_config, "dtype", None) or torch.bfloat16, ranks, write_rest
    )
