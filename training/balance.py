"""How evenly the ranks are loaded over a run."""

from configs.config import Config
from data.dealing import balance
from training.inputs import Inputs

ENOUGH = 0.9  # a run warns below it
MOST_STEPS = 20  # that are looked at


def steps_looked_at(inputs: Inputs) -> list[int]:
    """Steps of the first epoch, evenly spaced. Its last step may be smaller, and is left out unless it is the only one."""
    last = min(inputs.total_steps, max(1, inputs.plan.steps_per_epoch[0] - 1))
    count = min(MOST_STEPS, last)
    return [i * last // count for i in range(count)]


def balance_of_ranks(config: Config, inputs: Inputs, ranks: int) -> tuple[str, list[str]]:
    """(how long the ranks wait for each other, a warning if that is long), in words."""
    found = balance(inputs.deal(step) for step in steps_looked_at(inputs))
    warnings = []
    if round(found, 2) < ENOUGH:
        key = "global_tokens" if config.batch.global_tokens else "global_examples"
        warnings.append(
            f"the ranks wait for each other in {1 - found:.0%} of a step, because its documents have different lengths and are "
            f"few for {ranks} ranks; raise batch.{key} or use fewer ranks"
        )
    return f"; ranks wait for each other in {1 - found:.0%} of it", warnings
