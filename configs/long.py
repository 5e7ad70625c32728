"""Documents of up to 131,072 tokens: an 8B model whose window is extended by YaRN, on 8 GPUs with 80 GB that share each of them.

python scripts/fetch_base_model.py Qwen/Qwen3-8B
torchrun --nproc_per_node=8 train.py configs/long.py data.train=FILES

docs/long_context.md says what each GPU needs with fewer GPUs to a document, and what a longer one needs.
"""

from configs.config import Batch, Config, Data, Model, Optimizer, Run, Sharding

config = Config(
    model=Model(
        path="artifacts/models/Qwen3-8B",
        activation_checkpointing="full",
        # Qwen3 was trained on 32,768 tokens; its config.json has 40,960 with the answer. Four times that is the new window.
        rope_type="yarn",
        rope_factor=4.0,
        rope_original_length=32768,
    ),
    # Long chats or texts in any form of docs/data.md. Shorter ones are packed: a micro-batch of a group of 8 GPUs holds as many
    # as fit into 131,072 tokens, and each sees itself alone.
    data=Data(train=("artifacts/long/train.jsonl",), sequence_length=131072),
    # Target tokens of a step, on any number of GPUs: the same for a few long documents and for many short ones.
    batch=Batch(global_tokens=1_000_000, micro_batch=1),
    optimizer=Optimizer(learning_rate=1e-5, epochs=1),
    # 8 GPUs of a node share the tokens of a micro-batch; with 16 GPUs there are two such groups. 32 heads divide by 8.
    sharding=Sharding(context=8),
    run=Run(name="long", eval_general=True, save_every=50),
)
