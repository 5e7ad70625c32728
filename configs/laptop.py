"""The quickstart: fine-tune SmolLM2-135M on short bank reports on 2 CPU cores. scripts/quickstart.sh does all of this.

python scripts/make_reports.py --profile short --examples 2300 --splits 0.88 0.06 0.06 --seed 0 --out artifacts/quickstart
python scripts/make_replay.py --source topics --out artifacts/replay/topics.jsonl
torchrun --nproc_per_node=2 train.py configs/laptop.py

With data.mix=none there is no replay: the task is learned a little faster, but general text is forgotten
(docs/results.md).
"""

from configs.config import Batch, Config, Data, Model, Optimizer, Run, Sharding, Source

config = Config(
    model=Model(path="artifacts/models/SmolLM2-135M-Instruct", compute_dtype="bf16"),
    data=Data(
        train=("artifacts/quickstart/train.jsonl",),
        validation=("artifacts/quickstart/validation.jsonl",),
        # Replay against forgetting: 5% of the target tokens of every step are general text.
        mix=(Source("replay", ("artifacts/replay/topics.jsonl",), 0.05),),
        sequence_length=256,  # the longest example has 222 tokens; short rows can be split evenly between the ranks
    ),
    # 88% of 2,300 examples are 2,024 training examples. Steps per epoch: 2,024 / 8 = 253.
    # Tokens per step: 8 x 122 on average, about 1,000, plus the replay.
    # The loss stays on a plateau until about step 80: the model has learned the form of an answer but does not yet read
    # the figures. With 16 examples per step there are half as many steps, and a run may end on the plateau
    # (docs/results.md, "Leaving the plateau").
    batch=Batch(global_examples=8, micro_batch=8),
    # Warm-up: 5% of 253 steps, rounded up to 13. A small model takes a larger learning rate than an 8B one (2e-5).
    optimizer=Optimizer(learning_rate=3e-4, epochs=1, warmup_ratio=0.05, min_lr_ratio=0.1),
    # The gathered bf16 parameters are small (270 MB), and grad_op gathers them once per step instead of twice.
    sharding=Sharding(strategy="grad_op"),
    run=Run(name="laptop", eval_every=120, eval_general=True, save_every=40, keep_last=1),
)
