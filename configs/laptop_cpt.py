"""Continual pre-training on 2 CPU cores, before configs/laptop.py: SmolLM2-135M reads some of the EBA's reporting framework.

python scripts/make_cpt_corpus.py --out artifacts/cpt
awk 'NR % 12 == 0' artifacts/cpt/validation.jsonl > artifacts/cpt/validation_small.jsonl
python scripts/build_tokens.py artifacts/cpt/train.jsonl --model artifacts/models/SmolLM2-135M-Instruct --out artifacts/tokens/cpt-SmolLM2
torchrun --nproc_per_node=2 train.py configs/laptop_cpt.py
torchrun --nproc_per_node=2 train.py configs/laptop.py model.path=runs/laptop_cpt/export run.name=laptop_after_cpt
"""

from configs.config import Batch, Config, Data, Model, Optimizer, Run, Sharding, Source

config = Config(
    model=Model(path="artifacts/models/SmolLM2-135M-Instruct", compute_dtype="bf16"),
    data=Data(
        train=("artifacts/tokens/cpt-SmolLM2",),
        validation=("artifacts/cpt/validation_small.jsonl",),  # 40 documents of tables that training never saw
        mix=(Source("general", ("artifacts/cpt/general.jsonl",), 0.05, ("artifacts/cpt/general_held_out.jsonl",)),),
        sequence_length=512,  # windows of the store; a document has some 420 tokens
    ),
    # 4 windows are 2,048 tokens a step, two on each of 2 ranks, and now and then a piece of general text. 72 steps are
    # 150,000 tokens: 4% of the corpus, some 7 minutes at 350 tokens/s. All of it would take 3 hours.
    batch=Batch(global_examples=4, micro_batch=3),
    # A small model wants more than the 1e-5 of a large one; a third of what its fine-tuning takes.
    optimizer=Optimizer(
        learning_rate=1e-4, epochs=1, max_steps=72, warmup_ratio=0.1, min_lr_ratio=0.1, stage="pre-training"
    ),
    sharding=Sharding(strategy="grad_op"),
    run=Run(name="laptop_cpt", save_every=24, keep_last=1),
)
