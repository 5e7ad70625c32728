"""Continual pre-training on 2 CPU cores before configs/quickstart.py: SmolLM2-135M reads part of a reporting framework.


python xbrl/scripts/regulator.py cpt --out artifacts/cpt
awk 'NR % 12 == 0' artifacts/cpt/validation.jsonl > artifacts/cpt/validation_small.jsonl
python scripts/data.py build artifacts/cpt/train.jsonl --model artifacts/models/SmolLM2-135M-Instruct --out artifacts/tokens/cpt-SmolLM2
torchrun --nproc_per_node=2 train.py configs/xbrl_cpt_laptop.py
torchrun --nproc_per_node=2 train.py configs/quickstart.py model.path=runs/xbrl_cpt_laptop/export run.name=after_cpt
"""

from configs.config import Batch, Config, Data, Model, Optimizer, Run, Sharding, Source

config = Config(
    model=Model(path="artifacts/models/SmolLM2-135M-Instruct", compute_dtype="bf16"),
    data=Data(
        train=("artifacts/tokens/cpt-SmolLM2",),  # a token store: an example is a window of sequence_length tokens
        validation=("artifacts/cpt/validation_small.jsonl",),  # 40 documents of tables that training does not use
        # Against forgetting: 5% of the target tokens are general text, which has its own validation file.
        mix=(Source("general", ("artifacts/cpt/general.jsonl",), 0.05, ("artifacts/cpt/general_held_out.jsonl",)),),
        sequence_length=512,  # a document has about 420 tokens
    ),
    # Tokens per step: 4 windows x 512 = 2,048, two windows on each of 2 ranks. Some steps have general text too, hence
    # micro_batch=3. In total 72 steps x 2,048 = 150,000 tokens, which is 4% of the 3.6M tokens of the corpus
    # and takes about 7 minutes at 350 tokens/s. The whole corpus would take 3 hours.
    batch=Batch(global_examples=4, micro_batch=3),
    # Warm-up: 10% of 72 steps, rounded up to 8. The learning rate is a third of the rate in configs/quickstart.py. Large models
    # take at most 1e-5 in this stage.
    optimizer=Optimizer(
        learning_rate=1e-4, epochs=1, max_steps=72, warmup_ratio=0.1, min_lr_ratio=0.1, stage="pre-training"
    ),
    sharding=Sharding(strategy="grad_op"),  # as in configs/quickstart.py
    run=Run(name="xbrl_cpt_laptop", save_every=24, keep_last=1),
)
