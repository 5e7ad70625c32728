"""The supervisor's case at full size: an 8B model on 8 GPUs of 80 GB, with the reference's settings.

python scripts/make_reports.py --out artifacts/xbrl --examples 6800
python scripts/fetch_base_model.py Qwen/Qwen3-8B
torchrun --nproc_per_node=8 train.py configs/xbrl.py

After continual pre-training (configs/xbrl_cpt.py) it starts from what that run exported:

torchrun --nproc_per_node=8 train.py configs/xbrl.py model.path=runs/xbrl_cpt/export
"""

from configs.config import Batch, Config, Data, Model, Optimizer, Run, Sharding

config = Config(
    # Ungated, Apache-2.0, 8.2B parameters, 36 layers, untied head.
    model=Model(path="artifacts/models/Qwen3-8B", compute_dtype="bf16", activation_checkpointing="full"),
    data=Data(
        train=("artifacts/xbrl/train.jsonl",),
        validation=("artifacts/xbrl/validation.jsonl",),
        sequence_length=8192,
    ),
    # 64 examples a step whatever the number of GPUs. Of 6,800 examples 4,896 are for training: 77 steps an epoch, 231 in
    # 3 epochs, 12 of them warm-up. A row of 8,192 tokens holds two or three reports, so 8 GPUs need about 4 micro-batches
    # of one row (the exact number is printed at the start).
    batch=Batch(global_examples=64, micro_batch=1),
    optimizer=Optimizer(learning_rate=2e-5, epochs=3, warmup_ratio=0.05, min_lr_ratio=0.1, weight_decay=0.1),
    # grad_op: gradients and optimizer state sharded, parameters gathered once a step (ZeRO-2-like). Memory of one GPU:
    # fp32 master, gradient and two moments 16 x 8.2e9 / 8 = 16.4 GB, gathered bf16 parameters and gradients 32.8 GB.
    sharding=Sharding(strategy="grad_op"),
    run=Run(name="xbrl", eval_every=50, eval_general=True, save_every=50, log_every=5),
)
