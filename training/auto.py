"""The settings with the value "auto" that follow from the model and the data: peak learning rate and sequence length.

Every rank computes them from the same files, and `check_agreement` compares the results. The run's identity and config.json
have the numbers. They follow from inputs that the identity holds too, so a resume computes them again.
"""

from collections.abc import Callable

import numpy as np

from configs.config import Config, Data
from configs.load import replace
from data.reader import Reader

# ---- The learning rate -------------------------------------------------------------------------------------------------------

# Published peak rates of full fine-tuning, (parameters, rate): SmolLM2-135M and -360M (1e-3) and -1.7B (3e-4), SmolLM3-3B and
# Zephyr-7B (2e-5; alignment-handbook/recipes), OLMo 2 7B, 13B and 32B (1e-5, 7.5e-6 and 4e-6; allenai/open-instruct), Tulu 3 8B
# and 70B (5e-6 and 2e-6; arXiv:2411.15124), Llama 3 1B, 8B and 70B in torchtune (2e-5).
RECIPES = (
    *((0.135e9, 1e-3), (0.36e9, 1e-3), (1.2e9, 2e-5), (1.7e9, 3e-4), (3.1e9, 2e-5), (7.2e9, 2e-5), (7.3e9, 1e-5)),
    *((8.0e9, 5e-6), (8.0e9, 2e-5), (13.7e9, 7.5e-6), (32.2e9, 4e-6), (70.6e9, 2e-6), (70.6e9, 2e-5)),
)
# A power law near the least-squares line through the logarithms of `RECIPES`. At 135M it gives the 3e-4 of configs/quickstart.py,
# where 6e-4 was worse (docs/LOG.md).
RATE_OF_8B, EXPONENT = 2e-5, -2 / 3
# The best rates of LoRA are about ten times those of full fine-tuning ("LoRA Without Regret", Schulman et al., 2025).
LORA_FACTOR = 10
PRETRAINING_FACTOR = 0.5  # every weight holds general knowledge, and no instruction data preserve it
HIGHEST_RATE = 1e-3  # of all recipes; above it LoRA diverges on many models
SMALLEST = 1e8  # parameters of the smallest model for which a recipe is known
FAR = 5  # a rate that differs by more than this factor gives a warning; recipes for one size differ by up to 10


def suggested_rate(parameters: int, is_lora: bool, stage: str = "fine-tuning") -> float:
    """Return a peak learning rate to start from, to two digits, for a model with this number of parameters in its base.

    stage: optimizer.stage. Rates of published recipes scatter by a factor of about 3 around it (`RECIPES`), so sweep it.
    """
    rate = RATE_OF_8B * (max(parameters, SMALLEST) / 8e9) ** EXPONENT
    rate *= (LORA_FACTOR if is_lora else 1) * (PRETRAINING_FACTOR if stage == "pre-training" else 1)
    return float(f"{min(rate, HIGHEST_RATE):.1e}")


def rate_for(config: Config, parameters: int) -> tuple[float, str]:
    """Return the suggested rate for a run, and the training that it is for, in words. parameters: of the base."""
    is_lora, stage = config.lora.rank > 0, config.optimizer.stage
    kind = "LoRA" if is_lora else "full fine-tuning" if stage == "fine-tuning" else "continual pre-training"
    size = f"{parameters / 1e9:.2g}B" if parameters >= 1e9 else f"{parameters / 1e6:.3g}M"
    return suggested_rate(parameters, is_lora, stage), f"{kind} of {size} parameters"


def rate_warnings(config: Config, parameters: int) -> list[str]:
    """Return a warning if optimizer.learning_rate is far from the suggested rate. Smaller models than 100M have no recipe."""
    rate, (suggested, training) = config.optimizer.peak, rate_for(config, parameters)
    if parameters < SMALLEST or suggested / FAR <= rate <= suggested * FAR:
        return []
    return [
        f"learning rate {rate:g} is {'higher' if rate > suggested else 'lower'} than usual: published recipes for {training} are near "
        f"{suggested:g} (training/auto.py); optimizer.learning_rate=auto takes that"
    ]


def settle_rate(config: Config, parameters: int, say: Callable[[str], None]) -> Config:
    """Return the config with a number in optimizer.learning_rate. parameters: of the base, without adapters."""
    if config.optimizer.learning_rate != "auto":
        return config
    rate, training = rate_for(config, parameters)
    say(f"optimizer.learning_rate=auto: {rate:g}, as published recipes for {training} suggest")
    return replace(config, "optimizer.learning_rate", rate)


# ---- The sequence length -----------------------------------------------------------------------------------------------------

UNIT = 256  # the length is a multiple of it
LEFT_OUT = 0.01  # at most this share of the examples is left out, and only if the longest needs more than twice the length of the rest
TEXT_LENGTH = 2048  # longer texts are cut into pieces, which loses no token


def length_for(lengths: np.ndarray, is_text: np.ndarray, positions: int, may_drop: bool) -> int:
    """Return the sequence length for examples of these lengths, both arrays `(examples,)`: a multiple of 256, or `positions`.

    It holds all chats and completions. But if 99% of them need less than half of that and `may_drop`, it holds these alone: a
    few outliers would decide the memory of the run. Texts ask for at most 2,048 tokens. A token store has no examples here.
    """
    chats, texts = lengths[~is_text], lengths[is_text]
    needed = np.array([0 if len(lengths) else TEXT_LENGTH, *np.minimum(texts, TEXT_LENGTH)])
    length = _rounded_up(needed.max())
    if len(chats):
        longest = _rounded_up(chats.max())
        most = _rounded_up(np.quantile(chats, 1 - LEFT_OUT, method="higher"))
        length = max(length, most if may_drop and 2 * most < longest else longest)
    return min(length, positions)


def _rounded_up(length: float) -> int:
    return UNIT * max(1, -(-int(length) // UNIT))


def length_of(reader: Reader, data: Data, positions: int, say: Callable[[str], None]) -> int:
    """Return the value of data.sequence_length=auto, from the lengths of the examples of data.train.

    reader: of the run. It tokenises the examples into data.cache, where the run then finds them; without a cache the run
    tokenises them again. positions: the model's context window in tokens. Raise UserError for a bad file.
    """
    lengths, is_text = reader.lengths(data.train)
    length = length_for(lengths, is_text, positions, data.too_long == "drop")
    longer = lengths[~is_text & (lengths > length)]
    holds = f"{length:,} tokens"
    if not len(lengths):
        holds += f", the windows of the token store {data.train[0]}"
    elif len(longer):
        done = {"drop": "left out", "truncate": "cut off", "error": "refused"}[data.too_long]
        mend = f"data.sequence_length={min(_rounded_up(longer.max()), positions)} keeps more of them"
        if length == positions:
            mend = f"the model has only {positions:,} positions, which model.rope_type extends (docs/long_context.md)"
        holds += (
            f"; {len(longer):,} of {len(lengths):,} examples are longer (up to {longer.max():,}) and are {done}: {mend}"
        )
    else:
        holds += f" hold the longest of {len(lengths):,} examples, {lengths.max():,} tokens"
        holds += ", or a piece of it" if lengths.max() > length else ""
    say(f"data.sequence_length=auto: {holds}")
    return length
