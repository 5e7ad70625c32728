"""The arm TRL `SFTTrainer`: python -m bench.trl SPEC.json

matched: as in bench/trainer.py; packed means `padding_free=True`: the batch of our step flattened into one row. TRL asks for
flash attention there and warns without it; under SDPA transformers masks the documents from each other, so nothing leaks.
defaults: `SFTConfig()` as it is: 8 rows a step, bf16, gradient checkpointing, learning rate 2e-5; packed adds only
`packing=True`, which fills rows of max_length=1024 (8 rows a step, flattened into one) by best-fit decreasing.
"""

import sys

from datasets import Dataset
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from bench.peer import CountingCollator, StepLog, load_examples
from bench.spec import read_spec
from bench.trainer import Rows, matched_arguments, reporting


def main() -> None:
    """Train as the spec says."""
    spec = read_spec(sys.argv[1])
    if spec.setting == "defaults":
        arguments = {"packing": spec.packed}
    else:
        arguments = matched_arguments(spec) | {"padding_free": spec.packed, "max_length": None}
    log = StepLog(spec)
    trainer = SFTTrainer(
        model=spec.model,
        args=SFTConfig(**arguments, **reporting(spec)),
        train_dataset=Dataset.from_list(load_examples(spec)),
        processing_class=AutoTokenizer.from_pretrained(spec.model),
        callbacks=[Rows(log)],
    )
    trainer.data_collator = CountingCollator(trainer.data_collator, log)
    trainer.train()


if __name__ == "__main__":
    main()
