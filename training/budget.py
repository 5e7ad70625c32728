"""A budget for forgetting: export the best task score whose KL to the base on general text is at most `forgetting.max_kl`.

At the end of a run, bisection determines for every checkpoint the largest alpha for which the weights base + alpha (tuned -
base) meet the budget (WiSE-FT, arXiv:2109.01903; for language models arXiv:2510.17426). The task score (run.best_by) of each
point decides which one is exported, with a certificate.

KL is KL(base || model) in nats per token on this project's own texts of three kinds: prose, code or tables, questions. No other
code reads them, and pieces that occur in the training data are left out. An alpha meets the budget if, for each kind, the upper
bound of the 95% bootstrap interval over the pieces of the selection text is within it. Only the exported weights are measured
on the certificate's text: the budget is met if the KL of its worst kind is within the budget as well.
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from common.errors import UserError
from common.sha256 import sha256
from configs.config import Config
from configs.load import is_of_answers
from data.examples import Documents
from data.sources import Corpus
from distributed.checkpoint import load_parameters
from distributed.checkpoint_directory import checkpoint_name, complete_checkpoints, marks_of
from distributed.process_group import Ranks, StopSignal, call_on_all, gather_objects, read_on_first
from distributed.sharding import local, local_shard
from eval import forgetting
from eval.bootstrap import Interval, bootstrap
from eval.general_text import CERTIFICATE, SELECTION
from model.dtypes import dtype_name
from model.fingerprint import fingerprint_of_base
from model.language_model import NEW_ROWS, PackedLanguageModel, read_weights, trained_parameters, vocabulary_names
from model.weight_files import hash_weights
from training.answers import Answers
from training.checkpointer import RunRecord
from training.description import counted
from training.evaluations import Evaluations, curve_of, is_better
from training.inputs import Inputs

TOLERANCE = 1 / 256  # of alpha; KL grows with about its square
ROUNDING = 1e-6  # nats: the measured KL of a model against itself is below it (eval/forgetting.py)
MIDDLE = 12  # tokens in the middle of a piece, by which it is recognised in training data


class Stopped(Exception):
    """All ranks have agreed to stop after a signal."""


class AgainstBase:
    """The evaluation "forgetting": the model against its base. A budget measures with it at the end of the run."""

    def __init__(
        self,
        model: PackedLanguageModel,
        dtype: torch.dtype,
        tokenizer: PreTrainedTokenizerBase,
        data: Inputs,
        stop: StopSignal,
        say: Callable[[str], None],
    ) -> None:
        """Remember the weights that the model has now, which computes in `dtype`. Every rank must call this."""
        self.model, self.dtype, self.tokenizer = model, dtype, tokenizer
        self.data, self.stop, self.say = data, stop, say
        prompts = forgetting.task_prompts(data.validation.sources[0]) if data.validation else None
        self.reference = forgetting.start_forgetting(model, tokenizer, data.dealer, stop, data.first_new_row, prompts)
        say(self.reference.line())

    def __call__(self) -> dict | None:
        """Return the curves; None after a signal."""
        return forgetting.measure_forgetting(self.reference, self.model, self.stop)


def keep_budget(
    config: Config, step: int, evaluations: Evaluations, checkpoints: Path, record: RunRecord, dtype: torch.dtype
) -> dict | None:
    """Choose the weights to export after `step` in `dtype`, leave them in the model, and return their certificate, plain JSON.

    Return None after a signal; the next start repeats the search, which depends on the checkpoints alone. Every rank must call
    this. Each measurement on the certificate's text is recorded first, because a text that has been looked at is no longer an
    independent test of weights chosen later. Raise UserError if a checkpoint is damaged, and if the base's weights have changed
    since this start.
    """
    run, max_kl = evaluations.functions["forgetting"], config.forgetting.max_kl
    assert isinstance(run, AgainstBase) and max_kl is not None
    line, ranks, best_by, candidates = Line(run, config, dtype), run.stop.ranks, evaluations.best_by, []
    if read_on_first(lambda: hash_weights(config.model.path), ranks) != run.data.files["the weights"]:
        raise UserError(f"the weights in {config.model.path} have changed since this start; put them back to export")
    try:
        texts = Texts(SELECTION, line)
        for path in read_on_first(lambda: complete_checkpoints(checkpoints), ranks):
            ranks.watch.at(f"the budget of {path.name}")
            line.load(path)
            alpha = largest_alpha(lambda alpha: upper_bound(texts.measure(alpha)) <= max_kl + ROUNDING)
            kl = texts.measure(alpha)
            point = {"step": int(path.name.removeprefix("step-")), "alpha": alpha, "bound": upper_bound(kl)}
            candidates.append(point | _score(evaluations, run) | {"text": texts.measured(kl)})
            run.say(
                f"budget: {path.name}, alpha {alpha:.3f}: KL below {point['bound']:.4g} on each kind of the selection text, "
                f"{curve_of(best_by)} {candidates[-1]['value']:.4g}"
            )
        best = candidates[-1]
        for candidate in candidates[-2::-1]:  # the last of equal candidates wins
            if math.isnan(best["value"]) or is_better(best_by, candidate["value"], best["value"]):
                best = candidate
        checkpoint = checkpoints / checkpoint_name(best["step"])
        line.load(checkpoint)
        record.add("certificate", sha256=read_on_first(lambda: sha256(CERTIFICATE), ranks))
        texts = Texts(CERTIFICATE, line)
        judged = texts.measure(best["alpha"])
    except Stopped:
        return None

    def certificate() -> dict:
        """Return the content of certificate.json about the weights that are exported."""
        base = {"share_of_tuned": best["alpha"], "base": fingerprint_of_base(config.model.path)}
        worst = float(np.max([interval.value for interval in judged.values()]))
        return best | {
            "max_kl": max_kl,
            "met": bool(np.max([worst, best["bound"]]) <= max_kl + ROUNDING),
            "worst": worst,
            "curve": best_by,
            "weights": {evaluations.best_step: "best", step: "last"}.get(best["step"], "kept"),
            "averaged": base if best["alpha"] < 1 else None,
            "means": means_of(config, run.data.train),
            "dtype": dtype_name(run.dtype),
            "readings": sum(entry.kind == "certificate" for entry in record.read()),
            **marks_of(checkpoint),
            "texts": [texts.measured(judged), best["text"]],
            "candidates": [{name: point[name] for name in ("step", "alpha", "bound", "value")} for point in candidates],
        }

    content = read_on_first(certificate, ranks)
    for line_of_certificate in certificate_lines(content):
        run.say(line_of_certificate)
    return content


def largest_alpha(meets: Callable[[float], bool]) -> float:
    """Return the largest alpha in [0, 1] that meets a budget, to within TOLERANCE and from below; 0, the base, if no other
    does.

    Try alpha = 1, then bisect. This assumes that KL grows with alpha.
    """
    if meets(1.0):
        return 1.0
    low, high = 0.0, 1.0
    while high - low > TOLERANCE:
        middle = (low + high) / 2
        low, high = (middle, high) if meets(middle) else (low, middle)
    return low


def upper_bound(kl: dict[str, Interval]) -> float:
    """Return the largest upper bound of all kinds. NaN, if a kind has no interval, exceeds every budget."""
    return float(np.max([interval.high for interval in kl.values()]))


class Line:
    """The weights base + alpha (tuned - base) in the parameters of the sharded model, in place.

    For each alpha every rank reads its slices of the base from the files. This rank's part of the tuned weights is kept in host
    memory. A point is computed from both in fp32 and rounded once to the dtype of the parameters; fp32 parameters are rounded
    to the dtype of the export, so that the measured weights equal its files. Rows of new tokens are always the tuned ones. With
    LoRA, alpha multiplies B, and so the change that the adapters make.
    """

    def __init__(self, run: AgainstBase, config: Config, dtype: torch.dtype) -> None:
        self.run, self.path, self.is_lora = run, config.model.path, config.lora.rank > 0
        self.dtype = torch.float32 if self.is_lora else dtype  # an adapter keeps fp32
        trained = trained_parameters(run.model)
        self.moved = {name: parameter for name, parameter in trained.items() if ".lora_A." not in name}
        self.tuned: dict[str, torch.Tensor] = {}

    def load(self, checkpoint: Path) -> None:
        """Load the tuned weights from a checkpoint. Every rank must call this."""
        hint = "remove it, and start again to export"
        load_parameters(checkpoint, trained_parameters(self.run.model), self.run.stop.ranks, hint)
        self.tuned = {name: local(p).to("cpu", copy=True) for name, p in self.moved.items()}

    def to_base(self) -> None:
        """Set the parameters to the base, with its rows of new tokens."""
        if not self.is_lora or self.run.data.first_new_row is not None:
            read_weights(self.run.model, self.path)
        for name, parameter in self.moved.items():
            if ".lora_B." in name:
                local(parameter).zero_()

    def go(self, alpha: float) -> None:
        """Set the parameters to base + alpha (tuned - base). Both ends are exact except for the rounding."""
        self.to_base()
        vocabulary, new_row = vocabulary_names(self.run.model), self.run.data.first_new_row
        for name, parameter in self.moved.items():
            here, _, start = local_shard(parameter)
            mixed = self.tuned[name].to(here.device, torch.float32, copy=True)
            old = ...
            if new_row is not None and name in vocabulary:
                old = slice(max(0, new_row - start))  # this rank's rows of tokens that the base has
            elif name.endswith(NEW_ROWS):
                old = slice(0)
            mixed[old].mul_(alpha).add_(here[old].float(), alpha=1 - alpha)
            here.copy_(mixed.to(self.dtype) if here.dtype == torch.float32 else mixed)


class Texts:
    """The texts of a file with their kinds and the base's distributions on them, without texts that are trained on."""

    def __init__(self, path: Path, line: Line) -> None:
        """Read the file and measure the base, which stays in the model. Every rank must call this."""
        rows = [json.loads(row) for row in path.read_text(encoding="utf-8").splitlines()]
        run, data = line.run, line.run.data
        encoded = forgetting.encode_texts(run.tokenizer, [row["text"] for row in rows])
        is_trained = trained_on([ids for ids, _ in encoded], data.train, run.stop.ranks)
        kept = np.flatnonzero(~is_trained)
        self.line, self.path, self.left_out = line, path, len(rows) - len(kept)
        self.all_kinds = list(dict.fromkeys(row["kind"] for row in rows))
        self.kinds = np.array([rows[number]["kind"] for number in kept])
        documents = forgetting.as_documents([encoded[number] for number in kept])
        line.to_base()
        shared = data.first_new_row or len(run.tokenizer)
        self.base = forgetting.remember_base(run.model, documents, data.dealer, shared, run.stop)

    def measure(self, alpha: float) -> dict[str, Interval]:
        """Return the KL per token of each kind at `alpha`, and leave the model there. Every rank must call this.

        The result is rank 0's on every rank, because all ranks branch by it. Raise Stopped after a signal.
        """
        self.line.go(alpha)
        run = self.line.run
        sums = _compare(self.base, run)[:, [2, 0]]
        return read_on_first(
            lambda: {kind: _ratio(sums[self.kinds == kind]) for kind in self.all_kinds}, run.stop.ranks
        )

    def measured(self, kl: dict[str, Interval]) -> dict:
        """Return the part of the certificate about this text."""
        of_kinds = {kind: asdict(interval) for kind, interval in kl.items()}
        file = {"file": f"eval/texts/{self.path.name}", "sha256": sha256(self.path)}
        return file | {"kl": of_kinds, "left_out": self.left_out}


def trained_on(texts: list[list[int]], corpus: Corpus, ranks: Ranks) -> np.ndarray:
    """Return which texts, as token ids, occur in the training data: bool `(texts,)`.

    Every rank must call this; the ranks share the data.
    """
    factors = np.random.default_rng(0).integers(2**63, size=MIDDLE).astype(np.uint64)

    def hashes(ids: np.ndarray) -> np.ndarray:
        """Return a 64-bit hash of every run of MIDDLE tokens, uint64 `(runs,)`."""
        if len(ids) < MIDDLE:
            return np.zeros(0, np.uint64)
        return (np.lib.stride_tricks.sliding_window_view(ids.astype(np.uint64), MIDDLE) * factors).sum(-1)

    middles = [np.array(ids)[max(0, len(ids) - MIDDLE) // 2 :][:MIDDLE] for ids in texts]
    hashes_of_texts = np.array([hashes(ids)[0] if len(ids) == MIDDLE else 0 for ids in middles], np.uint64)

    def find() -> np.ndarray:
        is_trained = np.zeros(len(texts), bool)
        for item in range(ranks.rank, len(corpus), ranks.world_size):
            is_trained |= np.isin(hashes_of_texts, hashes(corpus.get(item)[0]))
        return is_trained

    return np.any(gather_objects(call_on_all(find, ranks), ranks), axis=0)  # a store may be damaged


def _compare(reference: forgetting.Reference, run: AgainstBase) -> np.ndarray:
    sums = forgetting.compare(reference, run.model, run.stop)
    if sums is None:
        raise Stopped
    return sums.numpy()


def _ratio(columns: np.ndarray, resamples: int = 10_000) -> Interval:
    """Return the ratio of two columns' sums with its interval. It is NaN for fewer than two pieces, which meet no budget."""
    if len(columns) < 2:
        return Interval(math.nan, math.nan, math.nan)
    return bootstrap(columns, lambda sums: {"": sums[..., 0] / sums[..., 1]}, resamples=resamples)[""]


def _score(evaluations: Evaluations, run: AgainstBase) -> dict:
    """Return the task's score, `value`, with the bounds of its 95% interval over examples, and the validation loss.

    The bounds are None for a loss that is not the mean negative log-likelihood of targets of weight 1, and for a metric that
    cannot score resampled answers. Raise Stopped after a signal.
    """
    ranks, curve = run.stop.ranks, curve_of(evaluations.best_by)
    figures = evaluations.measure("validation", ranks)
    if figures is None:
        raise Stopped
    value, bounds, answers = figures.get(curve, math.nan), None, evaluations.functions["validation"]
    documents = run.data.validation.sources[0] if run.data.validation else None
    if isinstance(answers, Answers) and is_of_answers(curve):
        bounds = read_on_first(lambda: answers.interval(curve.removeprefix("validation/")), ranks)
    elif isinstance(documents, Documents) and documents.targets.dtype.kind == "i":
        deal = run.data.dealer.deal(range(len(documents)), documents, ranks.world_size)
        mean = _ratio(_compare(forgetting.Reference(documents, deal), run)[:, [1, 0]], resamples=1000)
        bounds = (mean.low, mean.high) if math.isclose(mean.value, value, rel_tol=1e-3) else None
    low, high = bounds or (None, None)
    return {"value": value, "low": low, "high": high, "validation_loss": figures.get("validation/loss")}


# ---- The certificate in words -------------------------------------------------------------------------------------------


def certificate_lines(certificate: dict) -> list[str]:
    """Return the content of a certificate in words, for the log and the model card."""
    alpha, low, high = (certificate[name] for name in ("alpha", "low", "high"))
    chosen = f"step {certificate['step']}, alpha {alpha:.3f}" if alpha else "the base itself, alpha 0"
    lines = [
        f"budget: forgetting.max_kl={certificate['max_kl']:g} is {'met' if certificate['met'] else 'NOT met'}: the KL to the base "
        f"is {certificate['worst']:.4g} nats per token on the worst kind of the certificate's text; chosen: {chosen} of base + "
        "alpha (tuned - base)"
    ]
    means, judged = (
        ", ".join(certificate["means"]),
        f"which this run has read {counted(certificate['readings'], 'time')}",
    )
    for text, use in zip(certificate["texts"], (judged, "which chose alpha"), strict=True):
        kinds = [f"{kind} {kl['value']:.4g} ({kl['low']:.4g} to {kl['high']:.4g})" for kind, kl in text["kl"].items()]
        lines.append(f"    KL on {text['file']}, {use}, with 95% intervals over pieces: {', '.join(kinds)}")
        if text["left_out"]:
            lines.append(f"    warning: {text['left_out']} pieces of it are left out: the training data have them")
    score = f"{certificate['value']:.4g}" + ("" if low is None else f" ({low:.4g} to {high:.4g})")
    lines.append(f"    {curve_of(certificate['curve'])} on data.validation, which chose the checkpoint: {score}")
    return [*lines, f"    trained with {means or 'no remedy'}; measured in {certificate['dtype']}"]


def means_of(config: Config, corpus: Corpus) -> list[str]:
    """Return the remedies against forgetting that a training uses, in words."""
    ewc, mixed = config.ewc, [name for name in corpus.names[1:] if name not in corpus.anchored]
    remedies = {
        f"data.mix of {', '.join(mixed)}": mixed,
        f"forgetting.anchor_weight={config.forgetting.anchor_weight:g} on {', '.join(corpus.anchored)}": corpus.anchored,
        f"ewc.strength={ewc.strength:g} (ewc.estimator={ewc.estimator})": ewc.strength,
        f"lora.rank={config.lora.rank}": config.lora.rank,
    }
    return [text for text, is_used in remedies.items() if is_used]
