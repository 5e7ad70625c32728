"""How busy the ranks are in every step of three plans, dealt as whole rows (as this code did before) and as documents.

    python -m bench.balance artifacts/xbrl/train.jsonl --model artifacts/models/SmolLM2-135M-Instruct

The first plan is that of FILE, with 64 examples in a step and micro-batches of 1 and 2 x 8,192 tokens unless told otherwise. The
two others do not depend on it. No model is run: the time of a micro-batch is its FLOPs on the slowest rank, with those of an 8B model (the shape of
Qwen3-8B: 36 layers, hidden size 4,096, 32 heads, intermediate size 12,288). FILE is tokenised with the tokenizer of
--model. Each cell is the mean over the maximum of all steps of an epoch, as `train/balance`. `most`: what no deal can
exceed, because the longest document of a step is on one rank.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from common.errors import UserError, run_script
from data.batches import Plan, plan_training
from data.dealing import Dealer
from data.examples import Documents, load_documents
from data.files import check_paths_exist
from data.tokens import load_tokenizer
from model.architectures import check_model_directory
from model.flops import Work

SEQUENCE_LENGTH, EXAMPLES = 8192, 64  # of the two synthetic plans, and the default of FILE: as in configs/xbrl.py
RANKS = (2, 4, 8, 16, 32, 64)
WORK_8B = Work(
    per_token=6.0 * 36 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 12288),
    per_target=6.0 * 4096 * 151_936,
    per_pair=12.0 * 32 * 128,
    windows=((None, 36),),
)


class Lengths(Documents):
    """Items with given document lengths, and no tokens. The second half of each item's tokens are targets."""

    def __init__(self, documents: Sequence[tuple[int, ...]]) -> None:
        lengths = np.array([sum(one) for one in documents], dtype=np.int64)
        super().__init__([], [], lengths, np.maximum(1, lengths // 2), fingerprint="", report="")
        object.__setattr__(self, "documents", documents)  # a frozen dataclass

    def __len__(self) -> int:
        return len(self.documents)

    def document_lengths(self, index: int) -> tuple[int, ...]:
        """Number of tokens of each document in an item."""
        return self.documents[index]


def skewed_chats(count: int = 6800, shortest: int = 80, seed: int = 0) -> Lengths:
    """Chats whose lengths are log-uniform from 1 to 100 times `shortest`."""
    rng = np.random.default_rng(seed)
    return Lengths([(int(n),) for n in np.exp(rng.uniform(np.log(shortest), np.log(100 * shortest), count))])


def token_store(windows: int = 6400, seed: int = 0) -> Lengths:
    """Full windows of SEQUENCE_LENGTH tokens over documents of 50 to 20,000 tokens, log-uniform, one after another."""
    rng = np.random.default_rng(seed)
    ends = np.cumsum(np.exp(rng.uniform(np.log(50), np.log(20_000), windows * 8)).astype(int))
    edges = np.unique(np.concatenate([ends, np.arange(windows + 1) * SEQUENCE_LENGTH]))
    lengths: list[list[int]] = [[] for _ in range(windows)]
    for low, high in zip(edges, edges[1:], strict=False):
        if low < windows * SEQUENCE_LENGTH:
            lengths[low // SEQUENCE_LENGTH].append(int(high - low))
    return Lengths([tuple(one) for one in lengths])


def whole_rows(
    costs: np.ndarray, tokens: np.ndarray, ranks: int, micro_batch: int, row_length: int
) -> tuple[float, float]:
    """(mean, slowest) cost of a step whose rows are packed first and then dealt whole, by their tokens."""
    rows: list[list[int]] = []
    room: list[int] = []
    for i in np.argsort(-tokens, kind="stable").tolist():
        fits = [r for r in range(len(rows)) if room[r] >= tokens[i]]
        if fits:
            best = min(fits, key=lambda r: room[r])
        else:
            best = len(rows)
            rows.append([])
            room.append(row_length)
        rows[best].append(i)
        room[best] -= int(tokens[i])
    count = -(-len(rows) // (ranks * micro_batch))
    load, mine = [0] * ranks, [[] for _ in range(ranks)]
    for row in sorted(rows, key=lambda row: -int(tokens[row].sum())):
        chosen = min((r for r in range(ranks) if len(mine[r]) < count * micro_batch), key=lambda r: load[r])
        mine[chosen].append(float(costs[row].sum()))
        load[chosen] += int(tokens[row].sum())
    slowest = sum(max(sum(rank[m::count]) for rank in mine) for m in range(count))
    return sum(map(sum, mine)) / ranks, slowest


def measure(plan: Plan, source: Documents, ranks: int, micro_batch: int, row_length: int) -> tuple[float, float, float]:
    """Balance over all steps: as whole rows, as documents, and the most that any deal could reach."""
    dealer = Dealer(micro_batch * row_length, WORK_8B.costs)
    sums = np.zeros(5)
    for step in range(plan.num_steps):
        items = plan.batch(step).items
        costs = dealer.costs_of_items(items, source)
        deal = dealer.deal(items, source, ranks)
        tokens = np.array([source.num_tokens(item) for item in items])
        rows = whole_rows(costs, tokens, ranks, micro_batch, row_length)
        sums += (*rows, deal.mean, deal.slowest, max(deal.mean, float(costs.max())))
    return sums[0] / sums[1], sums[2] / sums[3], sums[2] / sums[4]


def table(sources: dict[str, tuple[Documents, int, int]], say: Callable[[str], None]) -> None:
    """Print a line for each source and size of a micro-batch, and a column for each number of ranks.

    sources: name -> (source, examples of a step, tokens of a row).
    """
    say(f"{'':40}" + "".join(f"{f'{ranks} ranks':>10}" for ranks in RANKS))
    for name, (source, examples, row_length) in sources.items():
        plan = plan_training(source, 1, 0, global_examples=examples)
        for micro_batch in (1, 2):
            found = [measure(plan, source, ranks, micro_batch, row_length) for ranks in RANKS]
            for label, column in (("whole rows", 0), ("documents", 1), ("most", 2)):
                start = f"{name}, micro_batch={micro_batch}" if column == 0 else ""
                say(f"{start:28} {label:>11}" + "".join(f"{values[column]:>10.2f}" for values in found))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="the examples of the first plan")
    parser.add_argument(
        "--model", default="artifacts/models/SmolLM2-135M-Instruct", help="whose tokenizer to use (%(default)s)"
    )
    parser.add_argument("--examples", type=int, default=EXAMPLES, help="of FILE in a step (%(default)s)")
    parser.add_argument("--sequence-length", type=int, default=SEQUENCE_LENGTH, help="of FILE, in tokens (%(default)s)")
    arguments = parser.parse_args()
    for option in ("examples", "sequence_length"):
        if getattr(arguments, option) < 1:
            raise UserError(f"--{option.replace('_', '-')} must be 1 or more, not {getattr(arguments, option)}")
    check_paths_exist([arguments.file])
    check_model_directory(arguments.model, "--model")
    corpus = load_documents((arguments.file,), load_tokenizer(arguments.model), arguments.sequence_length, "drop")
    print(f"{arguments.file}: {corpus.report}; {corpus.lengths.mean():,.0f} tokens on average")
    rest = (EXAMPLES, SEQUENCE_LENGTH)
    table(
        {
            Path(arguments.file).stem[:13]: (corpus, arguments.examples, arguments.sequence_length),
            "chats 1:100": (skewed_chats(), *rest),
            "token store": (token_store(), *rest),
        },
        print,
    )


if __name__ == "__main__":
    run_script(main)
