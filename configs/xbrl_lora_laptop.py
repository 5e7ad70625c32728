"""configs/xbrl_laptop.py with LoRA in place of full fine-tuning: SmolLM2-135M on 2 CPU cores (docs/results.md).

python scripts/make_reports.py --profile laptop --examples 4000 --out artifacts/xbrl_laptop
python scripts/data.py replay --source topics --out artifacts/replay/topics.jsonl
torchrun --nproc_per_node=2 train.py configs/xbrl_lora_laptop.py

The data, their order, the batches and the schedule are those of configs/xbrl_laptop.py, so that the two can be compared.
"""

from configs.config import Batch, Config, Data, LoRA, Model, Optimizer, Run, Sharding, Source

config = Config(
    model=Model(path="artifacts/models/SmolLM2-135M-Instruct", compute_dtype="bf16"),
    data=Data(
        train=("artifacts/xbrl_laptop/train.jsonl",),
        validation=("artifacts/xbrl_laptop/validation.jsonl",),
        # Replay against forgetting: 5% of the target tokens of every step are general text.
        mix=(Source("replay", ("artifacts/replay/topics.jsonl",), 0.05),),
        sequence_length=512,  # the longest example has about 430 tokens
    ),
    # Rank 64 beside the 7 matrices of each of 30 layers: 64 x (576 + 576) for each of q and o, 64 x (576 + 192) for each of
    # k and v, 64 x (576 + 1,536) for each of gate, up and down. That is 651,264 a layer and 19.5M in all, 15% of the model.
    lora=LoRA(rank=64),
    # 80% of 4,000 examples are 3,200 training examples. Steps per epoch: 3,200 / 8 = 400.
    batch=Batch(global_examples=8, micro_batch=8),
    # Three times the 3e-4 of full fine-tuning. The best rates of LoRA were found about ten times as large as those of full
    # fine-tuning ("LoRA Without Regret", Schulman et al., 2025), but on larger models: compare 5e-4 to 3e-3 by the validation
    # loss before a comparison of the methods (arXiv:2405.09673). Warm-up: 5% of 400 steps are 20.
    optimizer=Optimizer(learning_rate=1e-3, epochs=1, warmup_ratio=0.05, min_lr_ratio=0.1),
    # Memory: frozen weights in bf16 take 2 bytes x 135M = 0.27 GB, the adapters 16 bytes x 19.5M = 0.31 GB, over 2 ranks.
    # Full fine-tuning takes 16 bytes x 135M = 2.2 GB.
    sharding=Sharding(strategy="grad_op"),
    run=Run(name="xbrl_lora_laptop", eval_every=100, eval_general=True, save_every=50, keep_last=1),
)
