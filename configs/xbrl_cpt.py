"""Continual pre-training before configs/xbrl.py: an 8B model reads the EBA's reporting framework on 8 GPUs of 80 GB.

python xbrl/scripts/regulator.py cpt --out artifacts/cpt
python scripts/fetch_base_model.py Qwen/Qwen3-8B
python scripts/data.py build artifacts/cpt/train.jsonl --model artifacts/models/Qwen3-8B --out artifacts/tokens/cpt-Qwen3-8B
torchrun --nproc_per_node=8 train.py configs/xbrl_cpt.py
torchrun --nproc_per_node=8 train.py configs/xbrl.py model.path=runs/xbrl_cpt/export
"""

from configs.config import Batch, Config, Data, Model, Optimizer, Run, Sharding, Source

config = Config(
    model=Model(path="artifacts/models/Qwen3-8B", compute_dtype="bf16", activation_checkpointing="full"),
    data=Data(
        # A token store: an example is a window of sequence_length tokens. To add your own texts, pass their files to
        # data.py build too; memory use stays the same.
        train=("artifacts/tokens/cpt-Qwen3-8B",),
        validation=("artifacts/cpt/validation.jsonl",),  # tables that are not in the training data
        # General text against forgetting. 5% is 0.2M tokens per epoch, but this file has only 0.08M, so two epochs read
        # it five times. Text like the model's own pre-training data is better. If the domain is far from the pre-training
        # data, a share of up to 25% is useful.
        mix=(Source("general", ("artifacts/cpt/general.jsonl",), 0.05, ("artifacts/cpt/general_held_out.jsonl",)),),
        sequence_length=8192,
    ),
    # Tokens per step: 15 windows x 8,192 = 123,000, and 5% general text makes it 130,000. The general text usually fits
    # into one micro-batch, so that a step has 16: two for each of 8 GPUs. With 16 windows most steps would have 17, and
    # nearly all GPUs would be idle in a third micro-batch.
    # Steps: the corpus has 3.6M tokens (counted with SmolLM2's tokenizer), which are 435 windows. 435 / 15 = 29 steps
    # per epoch, 58 in two epochs.
    batch=Batch(global_examples=15, micro_batch=1),
    # Warm-up: 10% of 58 steps, rounded up to 6. The learning rate is at most 1e-5, because every weight holds general
    # knowledge and this stage has no instruction data to preserve it.
    optimizer=Optimizer(
        learning_rate=1e-5, epochs=2, warmup_ratio=0.1, min_lr_ratio=0.1, weight_decay=0.1, stage="pre-training"
    ),
    sharding=Sharding(strategy="grad_op"),  # memory as in configs/xbrl.py
    run=Run(name="xbrl_cpt", eval_every=20, save_every=20, log_every=1),
)
