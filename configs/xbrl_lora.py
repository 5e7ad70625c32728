"""configs/xbrl.py with LoRA in place of full fine-tuning: an 8B model on bank reports, on 8 GPUs (docs/results.md).

python xbrl/scripts/make_reports.py --out artifacts/xbrl
python scripts/fetch_base_model.py Qwen/Qwen3-8B
torchrun --nproc_per_node=8 train.py configs/xbrl_lora.py

Model, data, their order, batches and schedule are the same as in configs/xbrl.py, so that the two can be compared.
It also runs on one GPU: torchrun --nproc_per_node=1 train.py configs/xbrl_lora.py
"""

from dataclasses import replace

from configs.config import LoRA
from configs.xbrl import config as full

config = replace(
    full,
    # Rank 64 beside the 7 matrices of each of 36 layers: 64 x (4,096 + 4,096) for each of q and o, 64 x (4,096 + 1,024) for
    # each of k and v, 64 x (4,096 + 12,288) for each of gate, up and down. That is 4.85M a layer and 175M in all, 2.1%.
    # Memory per GPU: the frozen weights in bf16 take 2 bytes x 8.2e9 / 8 GPUs = 2.0 GB, fp32 adapters, their gradients and
    # moments 16 bytes x 175e6 / 8 GPUs = 0.35 GB. The gathered bf16 parameters take 2 bytes x 8.4e9 = 16.7 GB. Activations
    # come on top. (Full fine-tuning: 16.4 GB in place of the first two.)
    lora=LoRA(rank=64),
    # Ten times the 2e-5 of full fine-tuning: B begins as zero, A and B change their product only together, and in many sweeps the
    # best rates of LoRA were about ten times as large ("LoRA Without Regret", Schulman et al., 2025). A comparison is
    # fair only if each method has the best rate of its own (arXiv:2405.09673).
    optimizer=replace(full.optimizer, learning_rate=2e-4),
    run=replace(full.run, name="xbrl_lora"),
)
