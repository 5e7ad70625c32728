"""An 8B model with documents of up to 131,072 tokens: YaRN extends its window, and 8 GPUs of 80 GB share each micro-batch.

python scripts/fetch_base_model.py Qwen/Qwen3-8B
torchrun --nproc_per_node=8 train.py configs/long.py data.train=FILES

docs/long_context.md has the memory per GPU for fewer GPUs per document and for longer documents.
"""

from configs.config import Batch, Config, Data, Model, Optimizer, Run, Sharding

config = Config(
    model=Model(
        path="artifacts/models/Qwen3-8B",
        activation_checkpointing="full",
        # Qwen3 was trained on 32,768 tokens (config.json says 40,960, answer included). The new window is four times that.
        rope_type="yarn",
        rope_factor=4.0,
        rope_original_length=32768,
    ),
    # Long chats or texts in any form of docs/data.md. Shorter ones are packed, without attention to each other: a micro-batch
    # of a group of 8 GPUs has up to 131,072 tokens.
    data=Data(sequence_length=131072),
    # Target tokens per step. The step has this size for any number of GPUs and for any length of the documents.
    batch=Batch(global_tokens=1_000_000, micro_batch=1),
    optimizer=Optimizer(learning_rate=1e-5, epochs=1),
    # 8 GPUs of a node share the tokens of a micro-batch; with 16 GPUs there are two such groups. 32 heads divide by 8.
    sharding=Sharding(context=8),
    run=Run(name="long", eval_general=True, save_every=50),
)
