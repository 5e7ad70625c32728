"""Continue the pre-training of a model on your texts. Name the model and your files; the rest follows from them.

python scripts/fetch_base_model.py Qwen/Qwen3-0.6B-Base
torchrun --nproc_per_node=8 train.py configs/cpt.py model.path=artifacts/models/Qwen3-0.6B-Base data.train=texts.jsonl

Add data.validation=FILE to measure the loss on held-out texts, and data.mix=FILE=0.05 for 5% general text against forgetting
(docs/forgetting.md). A large corpus is tokenised once by scripts/data.py build.
"""

from configs.config import Batch, Config, Data, Model, Optimizer, Run

config = Config(
    model=Model(activation_checkpointing="full"),
    data=Data(sequence_length="auto"),  # 2,048 tokens, or less if no text is so long. Longer texts are cut into pieces
    batch=Batch(global_tokens=65_536, micro_batch="auto"),
    # Every weight holds general knowledge: half of the rate for fine-tuning, a longer warm-up and a single epoch.
    optimizer=Optimizer(learning_rate="auto", epochs=1, warmup_ratio=0.1, stage="pre-training"),
    run=Run(name="cpt", eval_every=200),
)
