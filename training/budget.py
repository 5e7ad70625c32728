"""A budget for forgetting: export the best task score whose KL to the base is at most `forgetting.max_kl`, with a certificate.

At the end of a run, bisection determines for every checkpoint the largest alpha for which the weights base + alpha (tuned -
base) are within the budget on the selection text (WiSE-FT, arXiv:2109.01903; for language models arXiv:2510.17426). The task
score (run.best_by) of these points chooses the checkpoint.

The certificate's text then tests a few of its alphas in ascending order, until one fails: for each kind of text, the upper bound
of the mean KL of a piece (eval/upper_bound.py) must be within the budget. The selection text alone decides the order, so weights
that exceed the budget pass with a probability of at most 1 - LEVEL, for any number of tests (arXiv:2110.01052).

KL is KL(base || model) in nats per token, averaged over the tokens of a piece, then over the pieces of a kind: prose, code or tables,
questions, of this project's own texts without pieces that occur in the training data. The kind `forgetting.keep` has the user's
prompts with the base's greedy answers, on which its KL is measured. With `forgetting.max_drop` these prompts are the kind DROP: the
mean of the base's score less the model's, each for its own greedy answer, must be at most that. KL and DROP must hold together.
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from common.errors import UserError
from common.sha256 import sha256
from configs.config import Config, Forgetting
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
from eval.metric import single_scores
from eval.questions import start_tokens
from eval.upper_bound import BETS, CAP, LEVEL, METHOD, BoundedMean, bounded_mean
from model.dtypes import dtype_name
from model.fingerprint import fingerprint_of_base
from model.language_model import NEW_ROWS, PackedLanguageModel, read_weights, trained_parameters, vocabulary_names
from model.weight_files import hash_weights
from training.answers import Answers
from training.checkpointer import RunRecord
from training.description import counted
from training.evaluations import Evaluations, curve_of, is_better
from training.inputs import Inputs, Questions
from training.questions import SELECTING

if TYPE_CHECKING:
    from training.start import TrainingRun

TOLERANCE = 1 / 256  # of alpha; KL grows with about its square
ROUNDING = 1e-6  # nats: the measured KL of a model against itself is below it (eval/forgetting.py)
MIDDLE = 12  # tokens in the middle of a piece, by which it is recognised in training data
TESTED = 4  # alphas that the certificate's text tests at most
KEEP = "forgetting.keep"  # the kind of the user's prompts
DROP = "drop"  # the kind of their scores
Kinds = dict[str, BoundedMean]  # the KL of each kind of text, and the drop of the scores at DROP


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
    training: "TrainingRun", step: int, evaluations: Evaluations, record: RunRecord, dtype: torch.dtype
) -> dict | None:
    """Choose the weights to export after `step` in `dtype`, leave them in the model, and return their certificate, plain JSON.

    Return None after a signal; the next start repeats the search, which depends on the checkpoints alone. Every rank must call
    this. Each measurement on the certificate's text is recorded first, because a text that has been looked at is no longer an
    independent test of weights chosen later. Raise UserError if a checkpoint is damaged, and if the base's weights have changed
    since this start.
    """
    config, checkpoints = training.config, training.directory / "checkpoints"
    run, settings = evaluations.functions["forgetting"], config.forgetting
    assert isinstance(run, AgainstBase)
    line, ranks, best_by, candidates = Line(run, config, dtype), run.stop.ranks, evaluations.best_by, []
    if read_on_first(lambda: hash_weights(config.model.path), ranks) != run.data.files["the weights"]:
        raise UserError(f"the weights in {config.model.path} have changed since this start; put them back to export")
    try:
        texts = Texts(SELECTION, line, config, training.model_config)
        for path in read_on_first(lambda: complete_checkpoints(checkpoints), ranks):
            ranks.watch.at(f"the budget of {path.name}")
            line.load(path)
            alpha = largest_alpha(lambda alpha: used(texts.measure(alpha), settings) <= 1)
            share, value = used(texts.measure(alpha), settings), _score(evaluations, run)["value"]
            candidate = {"alpha": alpha, "used": share, "value": value}
            candidates.append({"step": int(path.name.removeprefix("step-"))} | candidate)
            run.say(
                f"budget: {path.name}, alpha {alpha:.3f} uses {share:.1%} of the budget on the worst kind of the selection text, "
                f"{curve_of(best_by)} {value:.4g}"
            )
        best = candidates[-1]
        for candidate in candidates[-2::-1]:  # the last of equal candidates wins
            if math.isnan(best["value"]) or is_better(best_by, candidate["value"], best["value"]):
                best = candidate
        checkpoint = checkpoints / checkpoint_name(best["step"])
        line.load(checkpoint)
        texts = Texts(CERTIFICATE, line, config, training.model_config)
        record.add("certificate", files=texts.sha256)
        alpha, judged = last_within(best["alpha"], best["used"], texts.measure, settings)
        line.go(alpha)
        score, base_value = _score(evaluations, run), evaluations.base_value
        if base_value is None:  # run.best_by has changed since step 0
            line.go(0.0)
            base_value = _score(evaluations, run)["value"]
            line.go(alpha)
    except Stopped:
        return None

    def certificate() -> dict:
        """Return the content of certificate.json about the weights that are exported."""
        base = {"share_of_tuned": alpha, "base": fingerprint_of_base(config.model.path)}
        drop, kl = ({kind: judged[kind] for kind in judged if (kind == DROP) == is_drop} for is_drop in (True, False))
        tuned = math.nan if evaluations.best_value is None else evaluations.best_value
        gain = (score["value"] - base_value) / (tuned - base_value) if is_better(best_by, tuned, base_value) else 0.0
        holds = {
            "alpha 0 is the base": alpha > 0,
            "its KL is too large": used(kl, settings, "bound") <= 1,
            "its score drops too far": used(drop, settings, "bound") <= 1,
            "its gain is too small": max(gain, 0.0) >= settings.min_gain,
        }
        return score | {
            "step": best["step"],
            "alpha": alpha,
            "max_kl": settings.max_kl,
            "max_drop": settings.max_drop,
            "min_gain": settings.min_gain,
            "met": all(holds.values()),
            "misses": [miss for miss in holds if not holds[miss]],
            "bound": float(np.max([of_kind.bound for of_kind in kl.values()])) if kl else None,
            "gain": gain,
            "level": LEVEL,
            "method": METHOD,
            "cap": CAP * settings.max_kl if settings.max_kl is not None else None,
            "start": run.tokenizer.decode(start_tokens(run.tokenizer)),
            "curve": best_by,
            "weights": {evaluations.best_step: "best", step: "last"}.get(best["step"], "kept"),
            "averaged": base if alpha < 1 else None,
            "means": means_of(config, run.data.train),
            "dtype": dtype_name(run.dtype),
            "readings": sum(entry.kind == "certificate" for entry in record.read()),
            **marks_of(checkpoint),
            "texts": texts.measured(judged),
            "candidates": candidates,
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


def last_within(
    alpha: float, share: float, measure: Callable[[float], Kinds], settings: Forgetting
) -> tuple[float, Kinds]:
    """Return the alpha to export, and its measurement by `measure` on the certificate's text.

    `alpha` uses `share` of the budget on the selection text. Alphas are tested upwards, from that with half of it there (KL grows with
    about alpha's square; scores jump: half of alpha), to `alpha`. The first failure ends the tests, and the alpha before it is
    returned, or the first one. To go on behind a failure, or to let the certificate's text choose what is tested, would break the level.
    """
    first = alpha * math.sqrt(0.5 / share) if share > 0.5 else alpha
    first, last = first if settings.max_drop is None else alpha / 2, None
    for tested in dict.fromkeys(np.linspace(first, alpha, TESTED).tolist()):
        kinds = measure(tested)
        is_within = used(kinds, settings, "bound") <= 1
        if last is None or is_within:
            last = tested, kinds
        if not is_within:
            break
    assert last
    return last


def used(kinds: Kinds, settings: Forgetting, figure: str = "mean") -> float:
    """Return the largest share of its budget that the mean, or bound, of a kind uses. NaN, if a kind has no piece, exceeds it."""
    budgets = {kind: (settings.max_drop if kind == DROP else (settings.max_kl or 0.0) + ROUNDING) for kind in kinds}
    return float(np.max([getattr(kinds[kind], figure) / budget for kind, budget in budgets.items()], initial=0.0))


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
    """Texts of several kinds and the base's distributions on them, without texts of `path` that are trained on.

    `path` decides which prompts of forgetting.keep are among them. With max_drop these have the base's scores instead.
    """

    def __init__(self, path: Path, line: Line, config: Config, model_config: PretrainedConfig) -> None:
        """Read the file and measure the base, which stays in the model. Every rank must call this."""
        rows = [json.loads(row) for row in path.read_text(encoding="utf-8").splitlines()]
        run, data, settings = line.run, line.run.data, config.forgetting
        rows = rows if settings.general_text and settings.max_kl is not None else []
        encoded = forgetting.encode_texts(run.tokenizer, [row["text"] for row in rows])
        is_trained = trained_on([ids for ids, _ in encoded], data.train, run.stop.ranks)
        untrained = np.flatnonzero(~is_trained)
        line.to_base()
        self.scored, self.base_scores, mine = None, [], []
        if keep := data.keep:
            numbers = [i for i in range(len(keep.prompts)) if (i % SELECTING == 0) == (path == SELECTION)]
            examples, prompts = ([part[i] for i in numbers] for part in (keep.examples, keep.prompts))
            keep = replace(keep, examples=examples, prompts=prompts)
            rest = model_config, run.dtype, run.tokenizer, run.stop, run.say
            answers = Answers(dict, config.model.path, keep, run.model, *rest)
            if settings.max_drop is None:
                mine = _with_answers(keep, _generate(answers))
            else:
                self.scored, self.base_scores = answers, _scores(answers)
        self.metric = config.eval.metric or "exact_match"
        self.line, self.max_kl, self.left_out = line, settings.max_kl or 0.0, len(rows) - len(untrained)
        self.kinds = np.array([rows[number]["kind"] for number in untrained] + [KEEP] * len(mine))
        self.files = {path.name: list(dict.fromkeys(row["kind"] for row in rows))} if rows else {}
        self.sha256 = {path.name: read_on_first(lambda: sha256(path), run.stop.ranks)} if rows else {}
        if data.keep:
            self.files[KEEP], self.sha256[KEEP] = [DROP if self.scored else KEEP], data.kept
        documents = forgetting.as_documents([encoded[number] for number in untrained] + mine)
        shared = data.first_new_row or len(run.tokenizer)
        self.base = forgetting.remember_base(run.model, documents, data.dealer, shared, run.stop)

    def measure(self, alpha: float) -> Kinds:
        """Return the mean KL of the pieces of each kind, and the drop, at `alpha`, and leave the model there. Every rank must call this.

        The result is rank 0's on every rank, because all ranks branch by it. Raise Stopped after a signal, and UserError if the metric
        fails.
        """
        self.line.go(alpha)
        run = self.line.run
        sums = _compare(self.base, run)
        kl, cap = sums[:, 2] / sums[:, 0], CAP * (self.max_kl + ROUNDING)
        drops = np.subtract(self.base_scores, _scores(self.scored)) if self.scored else None
        kinds = [kind for kinds in self.files.values() for kind in kinds if kind != DROP]
        return read_on_first(
            lambda: (
                {kind: bounded_mean(kl[self.kinds == kind], cap) for kind in kinds}
                | ({} if drops is None else {DROP: bounded_mean(drops, 1.0, BETS)})
            ),
            run.stop.ranks,
        )

    def measured(self, kl: Kinds) -> list[dict]:
        """Return the part of the certificate about these texts, file by file. `left_out` counts pieces that are trained on."""
        parts = []
        for file, kinds in self.files.items():
            part = {"file": file, "sha256": self.sha256[file], "kl": {kind: asdict(kl[kind]) for kind in kinds}}
            if drop := part["kl"].pop(DROP, None):
                part[DROP] = drop | {"base": float(np.mean(self.base_scores)), "metric": self.metric}
            parts.append(part | {"left_out": 0 if file == KEEP else self.left_out})
        return parts


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


def _generate(answers: Answers) -> list[list[int]]:
    ids = answers.generate()
    if ids is None:
        raise Stopped
    return ids


def _with_answers(keep: Questions, answers: list[list[int]]) -> list[tuple[list[int], list[bool]]]:
    """Return (token ids, which of them are targets) of each prompt followed by its answer and its end, the targets."""
    ends = [list(keep.stop_ids[: len(answer) < keep.max_new_tokens]) for answer in answers]
    parts = zip(keep.prompts, answers, ends, strict=True)
    return [(p + a + end, [False] * len(p) + [True] * len(a + end)) for p, a, end in parts]


def _scores(answers: Answers) -> list[float]:
    """Return the metric's score of each answer of the model. Every rank must call this. All raise UserError if the metric fails."""
    texts, asked = answers.decode(_generate(answers)), answers.asked
    return read_on_first(lambda: single_scores(asked.metric, texts, asked.examples), answers.stop.ranks)


def _compare(reference: forgetting.Reference, run: AgainstBase) -> np.ndarray:
    sums = forgetting.compare(reference, run.model, run.stop)
    if sums is None:
        raise Stopped
    return sums.numpy()


def _ratio(columns: np.ndarray, resamples: int = 10_000) -> Interval:
    """Return the ratio of two columns' sums with its interval."""
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
    met = f"met with {certificate['level']:.0%} confidence: " if certificate["met"] else "NOT met: "
    claims = {}
    if certificate["max_kl"] is not None:
        claim = f"the KL to the base is below {certificate['bound']:.4g} nats per token on each kind of text"
        claims[f"forgetting.max_kl={certificate['max_kl']:g}"] = claim
    for drop in (text[DROP] for text in certificate["texts"] if DROP in text):
        claim = f"the mean score on {KEEP} is at most {drop['bound']:.4g} below the base's"
        claims[f"forgetting.max_drop={certificate['max_drop']:g}"] = claim
    lines = [
        f"budget: {', '.join(claims)} is {met}{''.join(f'{miss}; ' for miss in certificate['misses'])}"
        f"{', '.join(claims.values())}; chosen: step {certificate['step']}, alpha {alpha:.3f} of base + alpha (tuned - base)"
    ]
    for text in certificate["texts"]:
        if drop := text.get(DROP):
            lines.append(
                f"    {drop['metric']} on {text['file']}: {drop['base'] - drop['mean']:.4g}, the base's {drop['base']:.4g}; the drop is "
                f"{drop['mean']:.4g} (bound {drop['bound']:.4g}; {counted(drop['count'], 'prompt')})"
            )
        kinds = [
            f"{kind} {kl['mean']:.4g} (bound {kl['bound']:.4g}; {counted(kl['count'], 'piece')}, {kl['above_cap']} above the cap)"
            for kind, kl in text["kl"].items()
        ]
        lines += [f"    KL on {text['file']}: {', '.join(kinds)}"] if kinds else []
        if text["left_out"]:
            lines.append(f"    warning: {text['left_out']} pieces of it are left out: the training data have them")
    cap = "" if certificate["cap"] is None else f"; a KL above {certificate['cap']:g} counts as that"
    score = f"{certificate['value']:.4g}" + ("" if low is None else f" ({low:.4g} to {high:.4g})")
    return [
        *lines,
        f"    {curve_of(certificate['curve'])} on data.validation, which chose the checkpoint: {score}; "
        f"{certificate['gain']:.3g} of the gain of the unaveraged weights (forgetting.min_gain={certificate['min_gain']:g})",
        f"    {certificate['method']}{cap}; this run has read the certificate's "
        f"text {counted(certificate['readings'], 'time')}, and the level holds for the first",
        f"    trained with {', '.join(certificate['means']) or 'no remedy'}; measured in {certificate['dtype']}; each text begins "
        f"with {certificate['start']!r}",
    ]


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
