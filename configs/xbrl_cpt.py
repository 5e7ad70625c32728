"""Continual pre-training before configs/xbrl.py: an 8B model on 8 GPUs of 80 GB reads the EBA's reporting framework.

python scripts/make_cpt_corpus.py --out artifacts/cpt
python scripts/fetch_base_model.py Qwen/Qwen3-8B
python scripts/build_tokens.py artifacts/cpt/train.jsonl --model artifacts/models/Qwen3-8B --out artifacts/tokens/cpt-Qwen3-8B
torchrun --nproc_per_node=8 train.py configs/xbrl_cpt.py
torchrun --nproc_per_node=8 train.py configs/xbrl.py model.path=runs/xbrl_cpt/export
"""

from configs.config import Batch, Config, Data, Model, Optimizer, Run, Sharding, Source

config = Config(
    model=Model(path="artifacts/models/Qwen3-8B", compute_dtype="bf16", activation_checkpointing="full"),
    data=Data(
        # A token store: more text of your own joins it as further FILES of build_tokens.py, and memory stays the same.
        train=("artifacts/tokens/cpt-Qwen3-8B",),
        validation=("artifacts/cpt/validation.jsonl",),  # tables that training never saw
        # General text against forgetting. 5% are 0.2M tokens an epoch, and this file has 0.08M, so that it is gone through
        # five times: better is text like that of the model's own pre-training, up to 25% where the domain is far from it.
        mix=(Source("general", ("artifacts/cpt/general.jsonl",), 0.05, ("artifacts/cpt/general_held_out.jsonl",)),),
        sequence_length=8192,
    ),
    # An example is a window of 8,192 tokens here. 15 of them, and a row with the general text of a step, are 16 rows (in one
    # step of five 17): two on each of 8 GPUs, 130,000 tokens a step. With 16 windows most steps would need a third round, in
    # which nearly all GPUs wait. 3.8M tokens (counted with SmolLM2's tokenizer) are 462 windows: 31 steps an epoch, 62 in two, 7 of them warm-up.
    batch=Batch(global_examples=15, micro_batch=1),
    # At most 1e-5: the weights hold all that the model knows, and there is no instruction data here to hold it in place.
    optimizer=Optimizer(
        learning_rate=1e-5, epochs=2, warmup_ratio=0.1, min_lr_ratio=0.1, weight_decay=0.1, stage="pre-training"
    ),
    # Memory as in configs/xbrl.py.
    sharding=Sharding(strategy="grad_op"),
    run=Run(name="xbrl_cpt", eval_every=20, save_every=20, log_every=1),
)
