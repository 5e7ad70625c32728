"""The quickstart: fine-tune SmolLM2-135M on short bank reports on 2 CPU cores. scripts/quickstart.sh runs these commands.

python xbrl/scripts/make_reports.py --profile quickstart --seed 0 --out artifacts/quickstart
python scripts/data.py replay --source topics --out artifacts/replay/topics.jsonl
torchrun --nproc_per_node=2 train.py configs/quickstart.py

With data.mix=none there is no replay (docs/forgetting.md).
"""

from configs.config import Batch, Config, Data, Eval, Model, Optimizer, Run, Sharding, Source

config = Config(
    model=Model(path="artifacts/models/SmolLM2-135M-Instruct", compute_dtype="bf16"),
    data=Data(
        train=("artifacts/quickstart/train.jsonl",),
        validation=("artifacts/quickstart/validation.jsonl",),
        # Replay against forgetting: 5% of the target tokens are general text.
        mix=(Source("replay", ("artifacts/replay/topics.jsonl",), 0.05),),
        sequence_length=160,  # the longest training example has 143 tokens
    ),
    # 544 examples make 68 steps of 8 in an epoch. Tokens per step: 8 x 105 on average, plus the replay.
    batch=Batch(global_examples=8, micro_batch=8),
    # Warm-up: 5% of 136 steps, rounded up to 7. A small model takes a larger learning rate than an 8B one (2e-5).
    optimizer=Optimizer(learning_rate=3e-4, epochs=2, warmup_ratio=0.05, min_lr_ratio=0.1),
    # The gathered bf16 parameters are small (270 MB), and grad_op gathers them once per step instead of twice.
    sharding=Sharding(strategy="grad_op"),
    # The task that scores the answers of run.eval_generate=N.
    eval=Eval(metric="xbrl.task"),
    run=Run(name="quickstart", eval_every=25, save_every=25, keep_last=1),
)
