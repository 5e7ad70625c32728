"""Plot the share that every mixed-in source has in every step of a run, from its config alone; nothing is trained.

python scripts/plot_shares.py configs/quickstart.py --out docs/shares.png

The upper panel is the plan of the run, where texts are cut; the lower one shows how the same sources would be mixed if
every document stayed whole (docs/data.md, "Mixing sources").
"""

import pathlib
import sys

sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError, run_script
from configs.loading.config_file import load_config, override
from data.batches import TrainingPlan, plan_training
from data.dealing import one_per_token
from data.sources import Corpus
from data.tokens import load_tokenizer
from eval.plots import plot_shares
from model.architectures import read_model_config
from training.inputs import read_inputs
from training.micro_batch import with_rows


class Whole:
    """A source of documents that are not cut: it does not say that all tokens but the first are targets."""

    def __init__(self, source: Any) -> None:
        self.source, self.lengths = source, source.lengths + 1

    def __getattr__(self, name: str) -> object:
        return getattr(self.source, name)

    def __len__(self) -> int:
        return len(self.source)


def shares(plan: TrainingPlan, names: tuple[str, ...]) -> dict[str, list[float]]:
    """For each mixed-in source its share of the target tokens of every step."""
    counts = np.array([plan.batch(step).targets_by_source for step in range(plan.num_steps)])
    found = counts / counts.sum(1, keepdims=True)
    return {name: found[:, number].tolist() for number, name in enumerate(names) if number}


def main() -> int:
    """Write the image."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a config file with data.mix")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="as for train.py")
    parser.add_argument("--out", type=Path, required=True, help="the .png or .svg file to write")
    arguments = parser.parse_intermixed_args()
    config = override(load_config(arguments.config), arguments.overrides)
    if not config.data.mix:
        raise UserError(f"{arguments.config} mixes no source in; name one in data.mix")
    vocabulary = read_model_config(config.model.path).vocab_size
    inputs = read_inputs(
        with_rows(config, 1), load_tokenizer(config.model.path), vocabulary, one_per_token, 1, show_progress=True
    )
    corpus = inputs.train
    # A token store has no `targets`; its windows stay cut.
    uncut: list[Any] = [Whole(source) if hasattr(source, "targets") else source for source in corpus.sources[1:]]
    whole = plan_training(
        Corpus((corpus.sources[0], *uncut), corpus.names, corpus.shares),
        config.optimizer.epochs,
        config.run.seed,
        config.batch.global_examples,
        config.batch.global_tokens,
    )
    panels = {"as planned": inputs.plan, "with whole documents": whole}
    figures = {title: shares(plan, corpus.names) for title, plan in panels.items()}
    asked = dict(zip(corpus.names[1:], corpus.shares[1:], strict=True))
    for title, found in figures.items():
        for name, values in found.items():
            even = np.mean([asked[name] / 2 <= value <= 2 * asked[name] for value in values])
            print(
                f"{title}: {name} has {min(values):.1%} to {max(values):.1%} of a step; {np.mean(np.equal(values, 0)):.0%} of "
                f"{len(values)} steps have nothing of it, {even:.0%} are within a factor of two of {asked[name]:.0%}"
            )
    plot_shares(figures, asked, arguments.out)
    print(f"wrote {arguments.out}")
    return 0


if __name__ == "__main__":
    run_script(main)
