"""Evaluate a model directory on examples: loss of the response tokens, and scores of the generated answers."""

import functools
from collections.abc import Callable

from common.dtypes import dtype_name
from distributed.process_group import Ranks
from eval.asked_examples import ScoreAnswers
from eval.constrained import Grammar
from eval.generate import answer_work, greedy_answers, stop_tokens
from eval.inputs import EvaluationInputs, EvaluationOptions
from eval.load_over_ranks import agreed_dtype, is_sharded, load_causal_lm
from eval.over_ranks import compute_over_ranks
from eval.perplexity import LossSum, general_perplexity, loss_work, target_losses, total

GrammarOf = Callable[[list[dict]], tuple[str, str]]

GENERAL_WINDOW = 1024  # maximum context in tokens when the perplexity on general text is measured


def evaluate_examples(
    options: EvaluationOptions,
    inputs: EvaluationInputs,
    ranks: Ranks,
    score_answers: ScoreAnswers,
    grammar_of: GrammarOf | None = None,
) -> dict:
    """The result as it is written to JSON, without `seconds`. A collective: every rank gets the whole result.

    `score_answers` knows the task; see `xbrl.answers.scores.score_answers` for its arguments. So does `grammar_of`, which
    gives the (pattern, text after which everything is allowed) of the answers to examples, for `options.constrained`.
    """
    asked = [inputs.examples[i] for i in inputs.asked]
    pattern = grammar_of(asked) if options.constrained and grammar_of and asked else None
    dtype = agreed_dtype(options.dtype, ranks)
    sharded = is_sharded(options.sharding, [options.model], ranks)
    model, finish = load_causal_lm(options.model, dtype, sharded, ranks)
    losses = compute_over_ranks(
        functools.partial(target_losses, model),
        inputs.sequences,
        [loss_work(sequence) for sequence in inputs.sequences],
        ranks,
        "loss of the responses",
        finish,
    )
    stop_ids = stop_tokens(model, inputs.stop_ids)
    grammar = Grammar(*pattern, inputs.tokenizer, frozenset(stop_ids)) if pattern else None
    answers = compute_over_ranks(
        lambda share, advance: greedy_answers(
            model, share, stop_ids, inputs.max_new_tokens, options.batch_size, advance, grammar
        ),
        inputs.prompts,
        answer_work(model, inputs.prompts, inputs.max_new_tokens),
        ranks,
        "answers",
        finish,
    )
    loss = total(losses)
    by_example = [LossSum(0.0, 0) for _ in inputs.examples]
    for owner, part in zip(inputs.owners, losses, strict=True):
        by_example[owner] = total([by_example[owner], part])
    result = inputs.header | {
        "dtype": dtype_name(dtype),
        "processes": ranks.world_size,
        "sharding": "full" if sharded else "none",
        "cut_short": sum(len(answer) == inputs.max_new_tokens for answer in answers),
        "loss": {"mean": loss.mean, "targets": loss.targets},
        "losses": [(loss.nats, loss.targets) for loss in by_example],  # for intervals
    }
    if inputs.asked:
        texts = [inputs.tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in answers]
        result |= score_answers(asked, texts, str(options.data), inputs.training, str(options.train))
    if options.general:
        window = min(GENERAL_WINDOW, inputs.max_positions)
        result["general"] = general_perplexity(model, inputs.tokenizer, window, ranks, finish)
    return result
