"""Which checkpoint is the best: by which curve, in which direction, and of which answers."""

from configs.config import Config
from configs.load import is_of_answers, parse_best_by


def criterion_of(config: Config) -> str:
    """What run.best_by means in this config, "CURVE:DIRECTION ...": values of different texts cannot be compared."""
    curve, direction = parse_best_by(config.run.best_by)
    text = f"{curve}:{direction}"
    if is_of_answers(curve):
        text += f" of {config.run.eval_generate} answers"
        text += f" of at most {config.eval.max_new_tokens} tokens" if config.eval.max_new_tokens else ""
        text += f" by {config.eval.metric}" if config.eval.metric else ""
    return text


def curve_of(criterion: str) -> str:
    """The name of the curve in a criterion."""
    return criterion.partition(":")[0]


def is_better(criterion: str, value: float, other: float) -> bool:
    """Whether `value` is better than `other`; of two equal ones none is."""
    return value > other if criterion.partition(":")[2].startswith("max") else value < other


def best_in_words(criterion: str) -> str:
    """ "the lowest validation loss", "the highest validation/f1"."""
    curve = curve_of(criterion)
    extreme = "highest" if is_better(criterion, 1, 0) else "lowest"
    return f"the {extreme} {'validation loss' if curve == 'validation/loss' else curve}"
