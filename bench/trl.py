"""The arm TRL `SFTTrainer`: python -m bench.trl SPEC.json

matched, skewed: as in bench/trainer.py. The packed arm sets `padding_free=True`, which flattens the examples of a forward
pass into one row. TRL recommends flash attention for this and warns without it; under SDPA transformers masks the documents
from each other, so there is no cross-document attention.
defaults: `SFTConfig()` unchanged: 8 rows per step, bf16, gradient checkpointing, learning rate 2e-5. The packed arm adds only
`packing=True`, which fills rows of max_length=1024 by best-fit decreasing (8 rows per step, flattened into one).
"""

import sys

from datasets import Dataset
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from bench.peer import CountingCollator, StepLog, load_examples
from bench.spec import read_spec
from bench.trainer import StepLogCallback, matched_arguments, output_arguments


def main() -> None:
    """Train as the specification says."""
    spec = read_spec(sys.argv[1])
    if spec.setting == "defaults":
        arguments = {"packing": spec.packed}
    else:
        arguments = matched_arguments(spec) | {"padding_free": spec.packed, "max_length": None}
    log = StepLog(spec, arguments.get("gradient_accumulation_steps", 1))
    trainer = SFTTrainer(
        model=spec.model,
        args=SFTConfig(**arguments, **output_arguments(spec)),
        train_dataset=Dataset.from_list(load_examples(spec)),
        processing_class=AutoTokenizer.from_pretrained(spec.model),
        callbacks=[StepLogCallback(log)],
    )
    trainer.data_collator = CountingCollator(trainer.data_collator, log)
    trainer.train()


if __name__ == "__main__":
    main()
