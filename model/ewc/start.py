"""Where a run's EWC penalty comes from: its own saved anchor, another run's, or a new estimate of the Fisher diagonal."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from common.dtypes import DTYPES
from common.errors import UserError
from configs.config import EWC
from distributed.process_group import Ranks, StopSignal, agree_any, read_on_first
from distributed.sharding import local_shard, reshard
from model.ewc.anchor import Anchor, load_anchor, read_made, save_anchor, scaled_to_dtype
from model.ewc.batches import FisherBatches
from model.ewc.fisher import estimate_fisher
from model.ewc.penalty import Penalty, make_penalty
from model.language_model import PackedLanguageModel, trained_parameters

Say = Callable[[str], None]


def start_penalty(
    model: PackedLanguageModel,
    settings: EWC,
    directory: Path,
    batches: FisherBatches | None,
    strategy: str,
    stop: StopSignal,
    say: Say = lambda text: None,
    first_new_row: int | None = None,
) -> Penalty | None:
    """The penalty of a run whose model holds its initial weights. A collective, called before the optimizer is made.

    The anchor in `directory` (runs/NAME/ewc) is loaded if there is one. Otherwise the one at `settings.fisher` is reused,
    or a new one is estimated from `batches`; either is then saved to `directory`. From `first_new_row` on, the rows of
    embedding and head belong to new tokens, whose Fisher diagonal is zero. Returns None if a signal came during the
    estimate. Raises UserError if the saved anchor was made with other settings or from another model.
    """
    reshard(model)
    parameters = trained_parameters(model)
    if read_on_first(directory.is_dir, stop.ranks):
        anchor = load_saved(directory, anchor_settings(settings, batches), model, stop.ranks, say)
    else:
        if settings.fisher:
            anchor = reuse(Path(settings.fisher), anchor_settings(settings, batches), model, say)
        else:
            assert batches is not None  # a config with neither ewc.data nor ewc.fisher is refused
            anchor = estimate(model, settings, batches, strategy, stop, say, first_new_row)
            if anchor is None:
                return None
        anchor = scaled_to_dtype(anchor, DTYPES[settings.dtype], stop.ranks)
        save_anchor(directory, anchor, parameters, stop.ranks)
        say(f"EWC: Fisher diagonal and reference saved to {directory}")
    penalty = make_penalty(settings.strength, parameters, anchor, settings.device, settings.seed)
    say(penalty.line())
    return penalty


def anchor_settings(settings: EWC, batches: FisherBatches | None) -> dict:
    """What determines a run's anchor, as plain JSON: runs with equal values have the same anchor."""
    if settings.fisher or batches is None:
        return {"fisher": settings.fisher, "dtype": settings.dtype}
    return {
        "fisher": None,
        "estimator": settings.estimator,
        "documents": batches.num_documents,
        "batch": settings.batch,
        "seed": settings.seed,
        "dtype": settings.dtype,
        "data": batches.source.fingerprint,
    }


def load_saved(directory: Path, expected: dict, model: PackedLanguageModel, ranks: Ranks, say: Say) -> Anchor:
    """The anchor that this run saved earlier. A collective. Raises UserError if it is not the `expected` one."""
    made = read_made(directory)
    for key, value in expected.items():
        if made.get(key) != value:
            raise UserError(
                f"{directory} was made with ewc.{key}={made.get(key)}, now it is {value}; set it back, remove the "
                "directory or choose another run.name"
            )
    parameters = trained_parameters(model)
    anchor = load_anchor(directory, parameters, _vocabulary_names(model))
    if made["fisher"] is None and agree_any(not _equal(anchor.reference, parameters), ranks):
        raise UserError(f"{directory} has the weights of another model than model.path; choose another run.name")
    say(f"EWC: Fisher diagonal ({made['estimator']}, {made['documents']} documents) read from {directory}")
    return anchor


def reuse(directory: Path, made: dict, model: PackedLanguageModel, say: Say) -> Anchor:
    """The anchor of another run: its Fisher diagonal and its reference."""
    anchor = load_anchor(directory, trained_parameters(model), _vocabulary_names(model))
    anchor = replace(anchor, made=anchor.made | made)
    say(
        f"EWC: Fisher diagonal ({anchor.made['estimator']}, {anchor.made['documents']} documents) and reference reused "
        f"from {directory}"
    )
    return anchor


def estimate(
    model: PackedLanguageModel,
    settings: EWC,
    batches: FisherBatches,
    strategy: str,
    stop: StopSignal,
    say: Say,
    first_new_row: int | None,
) -> Anchor | None:
    """A new Fisher diagonal, with the current weights as the reference. A collective. None after a signal."""
    started = time.perf_counter()
    error = (2 * settings.batch / batches.num_documents) ** 0.5
    say(
        f"EWC: estimating the Fisher diagonal ({settings.estimator}) from {batches.num_documents} documents in groups of "
        f"{settings.batch}; expected relative error {error:.0%}"
    )
    if settings.batch < stop.ranks.world_size:
        say(f"warning: ewc.batch={settings.batch} leaves some of the {stop.ranks.world_size} ranks idle")
    fisher = estimate_fisher(model, batches, settings.estimator, settings.seed, strategy, stop, say)
    if fisher is None:
        return None
    parameters = trained_parameters(model)
    if first_new_row is not None:
        for name in _vocabulary_names(model):
            start = local_shard(parameters[name])[1]
            fisher[name][max(0, first_new_row - start) :] = 0.0
    reference = {name: local_shard(p)[0].clone() for name, p in parameters.items()}
    say(f"EWC: Fisher diagonal estimated in {time.perf_counter() - started:.1f} s")
    made = anchor_settings(settings, batches) | {"target_tokens": batches.num_targets}
    return Anchor(fisher, dict.fromkeys(fisher, 0), reference, made)


def _vocabulary_names(model: PackedLanguageModel) -> set[str]:
    weights = model.vocabulary_weights()
    return {name for name, p in trained_parameters(model).items() if any(p is weight for weight in weights)}


def _equal(reference: dict[str, torch.Tensor], parameters: dict[str, nn.Parameter]) -> bool:
    return all(torch.equal(reference[n].to(p.dtype), local_shard(p)[0]) for n, p in parameters.items())
