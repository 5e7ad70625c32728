"""A budget for forgetting: the best task score whose KL to the base on general text is at most `forgetting.max_kl`.

At the end of a run bisection finds, for every checkpoint that the run has, the largest alpha for which the weights
base + alpha (tuned - base) meet the budget (WiSE-FT, arXiv:2109.01903; for language models arXiv:2510.17426). Each is scored
on the task there (run.best_by), and the best is exported, with a certificate.

KL is KL(base || model) in nats per token on texts of this project's own, of three kinds: prose, code or tables, questions.
Nothing else reads them. An alpha meets the budget if the upper bounds of the 95% bootstrap intervals over the pieces of the
**selection** text are within it, for each kind. The **certificate**'s text is read once, by the weights that are exported:
the budget is met if the KL of its worst kind is within it as well.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from common.sha256 import sha256_of_all
from configs.config import Config
from configs.load import is_of_answers
from data.examples import Documents
from distributed.checkpoint import load_parameters
from distributed.checkpoint_directory import checkpoint_name, complete_checkpoints, read_manifest, weights_digest
from distributed.process_group import read_on_first
from distributed.sharding import local_shard
from eval.bootstrap import Interval, bootstrap
from eval.forgetting import (
    Reference,
    as_documents,
    compare_with_base,
    encode_texts,
    nats_of_documents,
    remember_base,
)
from eval.general_text import CERTIFICATE, SELECTION
from eval.in_step import Stopped
from model.fingerprint import fingerprint_of_base
from model.language_model import read_weights, trained_parameters, vocabulary_names
from model.weights import mix_
from training.evaluations import AgainstBase, Evaluations, WithAnswers, curve_of, is_better
from training.identity import fingerprint_of_checkpoint

TOLERANCE = 1 / 256  # of alpha; KL grows with about its square
ROUNDING = 1e-6  # nats: the measured KL of a model against itself is below it (eval/forgetting.py)
RESAMPLES = 1000  # of the validation's documents


def keep_budget(config: Config, step: int, evaluations: Evaluations, checkpoints: Path) -> dict | None:
    """Leave in the model the weights that are to be exported after `step`, and return their certificate, plain JSON.

    None after a signal. A collective. Nothing is kept of an interrupted search: the next start finds the same again, because
    all of it is computed from the checkpoints. Raises UserError if a checkpoint is damaged.
    """
    forgetting, max_kl = evaluations.functions["forgetting"], config.forgetting.max_kl
    assert isinstance(forgetting, AgainstBase) and max_kl is not None
    ranks, line = forgetting.stop.ranks, Line(forgetting, config)
    try:
        candidates = _candidates(max_kl, evaluations, line, checkpoints)
        best = _best(candidates, evaluations.best_by)
        line.load(checkpoints / checkpoint_name(best["step"]))
        judge = Texts(CERTIFICATE, line)
        line.go(best["alpha"])
        judged = judge.measure()
    except Stopped:
        return None
    checkpoint = checkpoints / checkpoint_name(best["step"])
    share = {"share_of_tuned": best["alpha"]} if best["alpha"] < 1 else None

    def certificate() -> dict:
        worst = max(judged, key=lambda kind: judged[kind].value)
        return {
            "max_kl": max_kl,
            "met": is_within(max_kl, [*_upper_bounds(best["kl"]), judged[worst].value]),
            "step": best["step"],
            "alpha": best["alpha"],
            "weights": {evaluations.best_step: "best", step: "last"}.get(best["step"], "kept"),
            "checkpoint": weights_digest(checkpoint),
            "identity": fingerprint_of_checkpoint(checkpoint),
            "averaged": share and share | {"base": fingerprint_of_base(config.model.path)},
            "validation_loss": best["validation_loss"],
            "task": {"curve": evaluations.best_by, **best["score"]},
            "selection": _of_text(SELECTION, best["kl"]),
            "certificate": {**_of_text(CERTIFICATE, judged), "worst": worst},
            "means": f"KL(base || model) in nats per token; 95% percentile bootstrap over pieces; alpha by bisection to {TOLERANCE}",
            "candidates": [
                {"step": one["step"], "alpha": one["alpha"], "score": one["score"]["value"]} for one in candidates
            ],
        }

    return read_on_first(certificate, ranks)


def _candidates(max_kl: float, evaluations: Evaluations, line: "Line", checkpoints: Path) -> list[dict]:
    """Of each checkpoint the largest alpha that meets the budget, what the selection text says of it, and the task's score."""
    ranks, say = line.stop.ranks, line.forgetting.say
    texts, candidates = Texts(SELECTION, line), []
    for step in read_on_first(lambda: [_step(path) for path in complete_checkpoints(checkpoints)], ranks):
        ranks.watch.at(f"the budget of step {step}")
        line.load(checkpoints / checkpoint_name(step))

        def meets(alpha: float) -> bool:
            line.go(alpha)
            return is_within(max_kl, _upper_bounds(texts.measure()))

        alpha = largest_alpha(meets)
        line.go(alpha)
        kl, (score, loss) = texts.measure(), _score(evaluations, line)
        candidates.append({"step": step, "alpha": alpha, "score": score, "validation_loss": loss, "kl": kl})
        say(
            f"budget: step {step}, alpha {alpha:.3f}: KL below {max(_upper_bounds(kl)):.4g} on each kind of the selection text, "
            f"{curve_of(evaluations.best_by)} {score['value']:.4g}"
        )
    return candidates


def largest_alpha(meets: Callable[[float], bool]) -> float:
    """The largest alpha in [0, 1] that meets a budget, to TOLERANCE and from below; 0, the base, if none above it is found.

    It looks at 1 first, then bisects, which supposes that what holds at an alpha holds below it.
    """
    if meets(1.0):
        return 1.0
    low, high = 0.0, 1.0
    while high - low > TOLERANCE:
        middle = (low + high) / 2
        low, high = (middle, high) if meets(middle) else (low, middle)
    return low


def is_within(max_kl: float, values: Sequence[float]) -> bool:
    """Whether all these KL are within the budget. One that is not a number is not."""
    return all(value <= max_kl + ROUNDING for value in values)


class Line:
    """The weights base + alpha (tuned - base) in the parameters of the sharded model, in place.

    The base is read from its files for each alpha, every rank its slices. This rank's part of the tuned weights lies in host
    memory. Every point is computed from both in fp32 and rounded once to the dtype of the parameters. Rows of new tokens are
    always the tuned ones. With LoRA, alpha multiplies B, and so what the adapters add.
    """

    def __init__(self, forgetting: AgainstBase, config: Config) -> None:
        self.forgetting, self.model, self.stop = forgetting, forgetting.model, forgetting.stop
        self.path, self.is_lora, self.new_row = config.model.path, config.lora.rank > 0, forgetting.data.first_new_row
        self.tuned: dict[str, torch.Tensor] = {}

    def moved(self) -> dict[str, torch.nn.Parameter]:
        """The parameters that differ along the line."""
        return {name: p for name, p in trained_parameters(self.model).items() if ".lora_A." not in name}

    def load(self, checkpoint: Path) -> None:
        """Let the tuned weights be those of a checkpoint. A collective."""
        load_parameters(
            checkpoint, trained_parameters(self.model), self.stop.ranks, "remove it, and start again to export"
        )
        self.tuned = {name: local_shard(p)[0].to("cpu", copy=True) for name, p in self.moved().items()}

    def to_base(self) -> None:
        """Go to the base, new rows too."""
        if not self.is_lora:
            read_weights(self.model, self.path)
            return
        for parameter in self.moved().values():
            local_shard(parameter)[0].zero_()

    def go(self, alpha: float) -> None:
        """Go to base + alpha (tuned - base)."""
        self.to_base()
        of_tokens = vocabulary_names(self.model)
        for name, parameter in self.moved().items():
            here, start = local_shard(parameter)
            mixed = self.tuned[name].to(here.device, torch.float32, copy=True)
            old = ...
            if self.new_row is not None and name in of_tokens:
                old = slice(max(0, self.new_row - start))  # this rank's rows of tokens that the base has
            mix_(mixed[old], here[old], alpha)
            here.copy_(mixed)


class Texts:
    """The texts of a file with their kinds, and the base's distributions on them."""

    def __init__(self, path: Path, line: Line) -> None:
        """A collective, which leaves the base in the model."""
        rows = [json.loads(row) for row in path.read_text(encoding="utf-8").splitlines()]
        self.kinds = np.array([row["kind"] for row in rows])
        self.model, self.stop = line.model, line.stop
        data, tokenizer = line.forgetting.data, line.forgetting.tokenizer
        documents = as_documents(encode_texts(tokenizer, [row["text"] for row in rows]))
        line.to_base()
        tokens = data.first_new_row or len(tokenizer)
        self.base: Reference = remember_base(self.model, documents, data.dealer, tokens, self.stop)

    def measure(self) -> dict[str, Interval]:
        """KL per token of each kind, the same on every rank: all branch by it. A collective. Raises Stopped after a signal."""
        sums = compare_with_base(self.base, self.model, self.stop)
        if sums is None:
            raise Stopped
        kl_and_tokens = sums[:, [1, 3]].numpy()
        return read_on_first(lambda: self._intervals(kl_and_tokens), self.stop.ranks)

    def _intervals(self, kl_and_tokens: np.ndarray) -> dict[str, Interval]:
        return {
            str(kind): bootstrap(kl_and_tokens[self.kinds == kind], lambda sums: {"kl": sums[..., 0] / sums[..., 1]})[
                "kl"
            ]
            for kind in dict.fromkeys(self.kinds)
        }


def _score(evaluations: Evaluations, line: Line) -> tuple[dict, float | None]:
    """(the task's score with the bounds of its interval, None where it has none; the validation loss). Raises Stopped."""
    stop, data, curve = line.stop, line.forgetting.data, curve_of(evaluations.best_by)
    figures = evaluations.measure("validation", stop.ranks)
    if figures is None:
        raise Stopped
    value, bounds, over = figures.get(curve, math.nan), None, None
    validation = evaluations.functions["validation"]
    if is_of_answers(curve):
        assert isinstance(validation, WithAnswers)
        name = curve.removeprefix("validation/")
        bounds, over = read_on_first(lambda: validation.answers.interval(name), stop.ranks), "answers"
    elif math.isclose(value, figures["validation/nll"], rel_tol=1e-3):  # a loss of the user's is not known by document
        assert data.validation is not None
        documents = data.validation.sources[0]
        if isinstance(documents, Documents) and documents.targets.dtype.kind == "i":  # without weights
            deal = data.dealer.deal(range(len(documents)), documents, stop.ranks.world_size)
            nats = nats_of_documents(line.model, documents, deal, stop)
            if nats is None:
                raise Stopped
            both = np.stack([nats.numpy(), documents.targets], axis=1)
            mean = bootstrap(both, lambda sums: {"nll": sums[..., 0] / sums[..., 1]}, resamples=RESAMPLES)["nll"]
            bounds, over = (mean.low, mean.high), "documents"
    low, high = bounds or (None, None)
    score = {"value": value, "low": low, "high": high, "over": over and f"{over} of data.validation"}
    return score, figures.get("validation/loss")


def _upper_bounds(kl: dict[str, Interval]) -> list[float]:
    return [interval.high for interval in kl.values()]


def _best(candidates: list[dict], best_by: str) -> dict:
    """The candidate with the best score; of equal ones the last, and the last if no score is a number."""
    best = candidates[-1]
    for one in reversed(candidates[:-1]):
        value, other = one["score"]["value"], best["score"]["value"]
        if math.isfinite(value) and (not math.isfinite(other) or is_better(best_by, value, other)):
            best = one
    return best


def _step(checkpoint: Path) -> int:
    return read_manifest(checkpoint, "remove it, and start again to export")["state"]["step"]


def _of_text(path: Path, kl: dict[str, Interval]) -> dict:
    kinds = {kind: asdict(interval) for kind, interval in kl.items()}
    return {"file": f"eval/texts/{path.name}", "sha256": sha256_of_all([path])[path], "kl": kinds}


# ---- the certificate in words -------------------------------------------------------------------------------------------


def certificate_lines(certificate: dict) -> list[str]:
    """What a certificate says, for the log and the model card."""
    alpha, task = certificate["alpha"], certificate["task"]
    judged, selection = certificate["certificate"], certificate["selection"]
    what = "the base itself (alpha 0)" if alpha == 0 else f"step {certificate['step']}, alpha {alpha:.3f}"
    interval = "" if task["low"] is None else f" ({task['low']:.4g} to {task['high']:.4g} over {task['over']})"
    return [
        f"budget: {sentence(certificate)}; exported: {what} of base + alpha (tuned - base)",
        f"    KL on {judged['file']}, read once, with 95% intervals over pieces: {_kinds(judged['kl'])}",
        f"    KL on {selection['file']}, which chose alpha: {_kinds(selection['kl'])}",
        f"    {curve_of(task['curve'])} on data.validation, which chose the checkpoint: {task['value']:.4g}{interval}",
    ]


def sentence(certificate: dict) -> str:
    """Whether the budget is met."""
    judged = certificate["certificate"]
    worst = judged["kl"][judged["worst"]]["value"]
    return (
        f"forgetting.max_kl={certificate['max_kl']:g} is {'met' if certificate['met'] else 'NOT met'}: the KL to the base is "
        f"{worst:.4g} nats per token on the worst kind of text, {judged['worst']}"
    )


def _kinds(kl: dict[str, dict]) -> str:
    return ", ".join(f"{kind} {one['value']:.4g} ({one['low']:.4g} to {one['high']:.4g})" for kind, one in kl.items())
