"""configs/xbrl.py with LoRA in place of full fine-tuning: an 8B model on bank reports, on 8 GPUs (docs/results.md).

python scripts/make_reports.py --out artifacts/xbrl --examples 6800
python scripts/fetch_base_model.py Qwen/Qwen3-8B
torchrun --nproc_per_node=8 train.py configs/xbrl_lora.py

The data, their order, the batches and the schedule are those of configs/xbrl.py, so that the two can be compared. It also
runs on one GPU: torchrun --nproc_per_node=1 train.py configs/xbrl_lora.py
"""

from configs.config import Batch, Config, Data, LoRA, Model, Optimizer, Run, Sharding

config = Config(
    # 8.2B parameters, 36 layers, untied embedding and head. Apache-2.0, downloadable without an account.
    model=Model(path="artifacts/models/Qwen3-8B", compute_dtype="bf16", activation_checkpointing="full"),
    data=Data(
        train=("artifacts/xbrl/train.jsonl",),
        validation=("artifacts/xbrl/validation.jsonl",),
        sequence_length=8192,  # tokens of a micro-batch: two or three reports
    ),
    # Rank 64 beside the 7 matrices of each of 36 layers: 64 x (4,096 + 4,096) for each of q and o, 64 x (4,096 + 1,024) for
    # each of k and v, 64 x (4,096 + 12,288) for each of gate, up and down. That is 4.85M a layer and 175M in all, 2.1%.
    lora=LoRA(rank=64),
    # 64 examples per step, whatever the number of GPUs: 231 steps in 3 epochs, as in configs/xbrl.py.
    batch=Batch(global_examples=64, micro_batch=1),
    # Ten times the 2e-5 of full fine-tuning: B begins as zero, A and B change their product only together, and the best rates of
    # LoRA were found about ten times as large in many sweeps ("LoRA Without Regret", Schulman et al., 2025). A comparison is
    # fair only if each method has the best rate of its own (arXiv:2405.09673). Warm-up: 5% of 231 steps, rounded up to 12.
    optimizer=Optimizer(learning_rate=2e-4, epochs=3, warmup_ratio=0.05, min_lr_ratio=0.1, weight_decay=0.1),
    # Memory per GPU: the frozen weights in bf16 take 2 bytes x 8.2e9 / 8 GPUs = 2.0 GB, fp32 adapters, their gradients and
    # moments 16 bytes x 175e6 / 8 GPUs = 0.35 GB. The gathered bf16 parameters take 2 bytes x 8.4e9 = 16.7 GB. Activations
    # come on top. (Full fine-tuning: 16.4 GB in place of the first two.)
    sharding=Sharding(strategy="grad_op"),
    run=Run(name="xbrl_lora", eval_every=50, eval_general=True, save_every=50, log_every=5),
)
