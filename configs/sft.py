"""Fine-tune all weights of a model on your chats or completions. Name the model and your files; the rest follows from them.

python scripts/fetch_base_model.py Qwen/Qwen3-0.6B
torchrun --nproc_per_node=8 train.py configs/sft.py model.path=artifacts/models/Qwen3-0.6B data.train=chats.jsonl

The start prints the learning rate, sequence length and micro-batch that were chosen. `key=value` sets each of them.
"""

from configs.config import Batch, Config, Data, Model, Optimizer, Run

config = Config(
    # Full checkpointing: the largest model fits. With none a step is shorter, if its activations fit into memory.
    model=Model(activation_checkpointing="full"),
    data=Data(
        # To see whether the model learns more than its examples. data.validation=FILE takes its place; set it to 0 for a
        # handful of examples.
        validation_share=0.05,
        sequence_length="auto",  # holds the longest example, but for outliers
    ),
    batch=Batch(global_examples=32, micro_batch="auto"),
    optimizer=Optimizer(learning_rate="auto", epochs=3),
    run=Run(name="sft", eval_every=200),
)
