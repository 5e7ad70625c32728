"""Which training examples a run has seen, in which steps and on which ranks: `scripts/verify.py --seen` (docs/check.md)."""

import contextlib
import math
import os
from collections.abc import Iterator
from itertools import groupby
from operator import attrgetter
from pathlib import Path

import torch

from common.errors import UserError
from configs.load import config_of
from data.find import find_examples, query_by_name, query_from_file, unmatched_names
from scripts.chaos.launch import ROOT
from scripts.verify.files import Differs
from training.checkpointer import Entry, not_given_up, plan_after
from training.identity import code_of_row


def seen(entries: list[Entry], query: str) -> Iterator[str]:
    """Yield a line for each training example that `query` names, with its steps and ranks, and then the totals.

    query: a file of examples, ids or hashes; a hash; an id; or a text that the examples contain. No line has the text of an
    example. Raise Differs if the data have changed since they were recorded.
    """
    from scripts.check.data import read_run  # loads the models of transformers

    history = not_given_up(entries)
    starts = [entry for entry in history if entry.kind == "start"]
    path = Path(query).absolute() if os.path.isfile(query) else None
    steps, places, last, warnings = dict[str, list[str]](), dict[str, str](), 0, list[str]()
    for start, following in zip(starts, [*starts[1:], None], strict=True):
        end = following.number if following else math.inf
        of_start = [entry for entry in history if start.number <= entry.number < end]
        last = following.step if following else max(entry.step for entry in of_start)
        directory = start.content["directory"]
        with contextlib.chdir(directory if os.path.isdir(directory) else "."):  # another machine may lack the directory
            config, ranks = config_of(start.content["config"]), start.content["world_size"]
            for source in (config.data, *config.data.mix):
                if source.row and not code_of_row(source.row):  # a function of a library may run what a row names
                    raise UserError(
                        f"data.row={source.row} is in no module beside train.py or in PYTHONPATH: not called"
                    )
            inputs = read_run(config, ranks, torch.device("cpu"), ROOT / "train.py").inputs
            data = inputs.local.data
            requested = query_from_file(path, data) if path else query_by_name(query)
            examples = find_examples(inputs.train, data, requested)
        warnings = unmatched_names(requested, examples, inputs.train)  # the newest start's replace the earlier ones
        copies = dict[str, list[str]]()
        for example in examples:  # copies have the same digest
            copies.setdefault(example.digest, []).append(example.where)
        places |= {digest: "; ".join(where) for digest, where in copies.items()}
        digest_of_item = {item: example.digest for example in examples for item in example.items}
        by_step = attrgetter("step")
        recorded = {step: list(group) for step, group in groupby(sorted(of_start, key=by_step), by_step)}
        plan, sources = start.content["plan"], [source.fingerprint for source in inputs.train.sources]
        for step in range(start.step, last):
            items = tuple(inputs.plan.items(step))
            plan = plan_after(plan, step + 1, sources, items)
            if wrong := [entry for entry in recorded.get(step + 1, ()) if entry.content.get("plan", plan) != plan]:
                raise Differs(
                    f"the documents of the steps up to {step + 1} are not those of {wrong[0]}: the data changed"
                )
            if digest_of_item.keys().isdisjoint(items):
                continue
            deal = inputs.deal(step)
            for group, dealt in (pair for micro_batch in deal.items for pair in enumerate(micro_batch)):
                for digest in {digest_of_item[item] for item in dealt if item in digest_of_item}:
                    steps.setdefault(digest, []).append(f"{step + 1} ({deal.ranks_of(group)})")
    for digest, where in places.items():
        yield f"{digest} | {where} | " + (f"steps {', '.join(steps[digest])}" if digest in steps else "in no step")
    yield f"{len(places)} examples of the training data, {len(steps)} of them in a step of the {last} that count"
    yield from (f"warning: {line}" for line in warnings)
