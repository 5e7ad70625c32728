"""How evenly the ranks are loaded over a run, and which batch size would mend it."""

from collections.abc import Iterator

from configs.config import Config
from data.dealing import Deal, balance
from training.inputs import Inputs

ENOUGH = 0.9  # a run warns below it
AIM = 0.95  # of what the warning proposes, with room for the steps that were not looked at
FACTORS = (2, 3, 4, 6, 8, 12, 16)  # of the batch size, and divisors of the number of ranks, that are tried


def steps_looked_at(inputs: Inputs, at_most: int = 20) -> list[int]:
    """Up to `at_most` steps, evenly spaced over the run.

    The last step of an epoch may be smaller and is left out, unless it is the only one of its epoch.
    """
    sizes, total_steps = inputs.plan.steps_per_epoch, inputs.total_steps
    ends = {sum(sizes[: epoch + 1]) - 1 for epoch, steps in enumerate(sizes) if steps > 1}
    count = min(at_most, total_steps)
    steps = {i * total_steps // count for i in range(count)}
    # The step before a left-out one stands for it; it is of the same epoch.
    return sorted({step - (step in ends) for step in steps})


def balance_of_ranks(config: Config, inputs: Inputs, ranks: int) -> tuple[str, list[str], list[str]]:
    """(how long the ranks wait for each other, a warning if that is long, the figures), in words."""
    deals = [inputs.deal(step) for step in steps_looked_at(inputs)]
    share = f"; ranks wait for each other in {1 - balance(deals):.0%} of it"
    return share, balance_warnings(config, inputs, deals, ranks), [balance_line(deals)]


def balance_line(deals: list[Deal]) -> str:
    """The balance of the steps looked at, which the curve `train/balance` shows for all steps."""
    found, least = balance(deals), min(balance([deal]) for deal in deals)
    steps = f" (the least of {len(deals)} steps: {least:.2f})" if len(deals) > 1 else ""
    return f"balance {found:.2f}: by FLOPs, a mean rank waits for others in {1 - found:.0%} of a step{steps}"


def balance_warnings(config: Config, inputs: Inputs, deals: list[Deal], ranks: int) -> list[str]:
    """A warning if ranks wait for each other, with a batch size and a number of ranks that mend it."""
    found = balance(deals)
    if round(found, 2) >= ENOUGH:
        return []
    batch, examples = config.batch, inputs.plan.batch(0).num_examples
    key, size = (
        ("global_tokens", batch.global_tokens) if batch.global_tokens else ("global_examples", batch.global_examples)
    )
    mends = [
        f"batch.{key}={(size or 0) * factor} would make it about {value:.2f}"
        for factor, value in _first_enough(_with_larger_batch(inputs, factor, ranks) for factor in FACTORS)
    ] + [
        f"{ranks // factor} rank{'s' if ranks > factor else ''} would make it about {value:.2f}"
        for factor, value in _first_enough(_with_fewer_ranks(inputs, factor, ranks) for factor in FACTORS)
    ]
    what = "1 example" if examples == 1 else f"{examples:,} examples"
    return [
        f"the ranks wait for each other: the balance is {found:.2f}, because a step has {what} of different lengths for "
        f"{ranks} ranks; {', and '.join(mends) or 'raise batch.' + key + ' or use fewer ranks'}"
    ]


def _first_enough(tried: Iterator[float | None]) -> list[tuple[int, float]]:
    """[(factor, balance)] of the first factor whose balance is enough, or []."""
    for factor, value in zip(FACTORS, tried, strict=False):
        if value is not None and value >= AIM:
            return [(factor, value)]
    return []


def _with_larger_batch(inputs: Inputs, factor: int, ranks: int) -> float | None:
    """The balance of steps that have the documents of `factor` steps; None if an epoch has fewer."""
    if inputs.plan.steps_per_epoch[0] < factor:
        return None
    starts = [i for i in steps_looked_at(inputs, 10) if i + factor <= inputs.plan.num_steps]
    merged = [[item for step in range(i, i + factor) for item in inputs.plan.batch(step).items] for i in starts]
    return balance([inputs.dealer.deal(items, inputs.train, ranks) for items in merged])


def _with_fewer_ranks(inputs: Inputs, factor: int, ranks: int) -> float | None:
    if ranks % factor:
        return None
    steps = map(inputs.plan.batch, steps_looked_at(inputs, 10))
    return balance([inputs.dealer.deal(step.items, inputs.train, ranks // factor) for step in steps])
