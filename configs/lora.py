"""configs/sft.py with LoRA in place of full fine-tuning: low-rank adapters beside frozen weights, on fewer GPUs.

python scripts/fetch_base_model.py Qwen/Qwen3-0.6B
torchrun --nproc_per_node=1 train.py configs/lora.py model.path=artifacts/models/Qwen3-0.6B data.train=chats.jsonl

runs/lora/export has the model with the adapter merged into it, and runs/lora/adapter the adapter alone.
"""

from dataclasses import replace

from configs.config import LoRA
from configs.sft import config as full

config = replace(
    full,
    lora=LoRA(rank=64),  # beside every matrix of a layer. The suggested learning rate is ten times as high
    run=replace(full.run, name="lora"),
)
