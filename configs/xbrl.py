"""The banking supervisor's task at full size: fine-tune an 8B model on bank reports, on 8 GPUs with 80 GB each.

python xbrl/scripts/make_reports.py --out artifacts/xbrl
python scripts/fetch_base_model.py Qwen/Qwen3-8B
torchrun --nproc_per_node=8 train.py configs/xbrl.py

To start from a model that was pre-trained further with configs/xbrl_cpt.py:

torchrun --nproc_per_node=8 train.py configs/xbrl.py model.path=runs/xbrl_cpt/export
"""

from configs.config import Batch, Config, Data, Eval, Model, Optimizer, Run, Sharding

config = Config(
    # 8.2B parameters, 36 layers, untied embedding and head. Apache-2.0, downloadable without an account.
    model=Model(path="artifacts/models/Qwen3-8B", compute_dtype="bf16", activation_checkpointing="full"),
    data=Data(
        train=("artifacts/xbrl/train.jsonl",),
        validation=("artifacts/xbrl/validation.jsonl",),
        sequence_length=8192,  # tokens of a micro-batch: two or three reports
        # The answers have no thinking. With this, Qwen3's prompt ends in an empty <think></think> block, in training and in
        # evaluation; without it the model would be trained to write that block. A model that knows no thinking ignores it.
        chat_template_options={"enable_thinking": False},
    ),
    # 64 examples per step, whatever the number of GPUs. 4,898 of the 5,500 examples are for training.
    # Steps: 4,898 / 64 = 77 per epoch, 231 in 3 epochs.
    # Micro-batches: 64 examples of 3,250 tokens (SmolLM2's tokenizer), two in each of 8,192 tokens, are dealt to 8 GPUs. The
    # exact numbers are printed at the start. On a GPU with more memory, micro_batch="auto" takes larger micro-batches.
    batch=Batch(global_examples=64, micro_batch=1),
    # Warm-up: 5% of 231 steps, rounded up to 12. After it the rate follows a cosine down to 10% of its peak.
    optimizer=Optimizer(learning_rate=2e-5, epochs=3, warmup_ratio=0.05, min_lr_ratio=0.1, weight_decay=0.1),
    # grad_op (like ZeRO-2): gradients and optimizer state are sharded, and parameters are gathered once per step.
    # Memory per GPU: fp32 weights, gradients and two moments take 16 bytes x 8.2e9 / 8 GPUs = 16.4 GB. The gathered
    # bf16 parameters take 2 bytes x 8.2e9 = 16.4 GB. Activations and the gradients that are being reduced come on top.
    sharding=Sharding(strategy="grad_op"),
    # The task that scores the answers of run.eval_generate=N.
    eval=Eval(metric="xbrl.task"),
    run=Run(name="xbrl", eval_every=50, eval_general=True, save_every=50, log_every=5),
)
