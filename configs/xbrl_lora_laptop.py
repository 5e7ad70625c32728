"""configs/xbrl_laptop.py with LoRA in place of full fine-tuning: SmolLM2-135M on 2 CPU cores (docs/results.md).

python xbrl/scripts/make_reports.py --style short --out artifacts/xbrl_short
python scripts/data.py replay --source topics --out artifacts/replay/topics.jsonl
torchrun --nproc_per_node=2 train.py configs/xbrl_lora_laptop.py

Model, data, their order, batches and schedule are the same as in configs/xbrl_laptop.py, so that the two can be compared.
"""

from dataclasses import replace

from configs.config import LoRA
from configs.xbrl_laptop import config as full

config = replace(
    full,
    # Rank 64 beside the 7 matrices of each of 30 layers: 64 x (576 + 576) for each of q and o, 64 x (576 + 192) for each of
    # k and v, 64 x (576 + 1,536) for each of gate, up and down. That is 651,264 a layer and 19.5M in all, 15% of the model.
    # Memory: frozen weights in bf16 take 2 bytes x 135M = 0.27 GB, the adapters 16 bytes x 19.5M = 0.31 GB, over 2 ranks.
    # Full fine-tuning takes 16 bytes x 135M = 2.2 GB.
    lora=LoRA(rank=64),
    # Three times the 3e-4 of full fine-tuning. The best rates of LoRA were found to be about ten times the best
    # rates of full fine-tuning ("LoRA Without Regret", Schulman et al., 2025), but on larger models: compare 5e-4 to 3e-3 by the
    # validation loss before you compare the methods (arXiv:2405.09673).
    optimizer=replace(full.optimizer, learning_rate=1e-3),
    run=replace(full.run, name="xbrl_lora_laptop"),
)
