"""The banking supervisor's task at a size for a laptop: fine-tune SmolLM2-135M on 2 CPU cores.

python xbrl/scripts/make_reports.py --style short --out artifacts/xbrl_short
python scripts/data.py replay --source topics --out artifacts/replay/topics.jsonl
torchrun --nproc_per_node=2 train.py configs/xbrl_laptop.py

Task and notes are the same as for configs/xbrl.py, but shorter: a report has only the ratios and amounts that rules and note
need, and a letter has only the orders (docs/xbrl.md). docs/results.md has the results.
"""

from configs.config import Batch, Config, Data, Eval, Model, Optimizer, Run, Sharding, Source

config = Config(
    model=Model(path="artifacts/models/SmolLM2-135M-Instruct", compute_dtype="bf16"),
    data=Data(
        train=("artifacts/xbrl_short/train.jsonl",),
        validation=("artifacts/xbrl_short/validation.jsonl",),
        # Replay against forgetting: 5% of the target tokens are general text.
        mix=(Source("replay", ("artifacts/replay/topics.jsonl",), 0.05),),
        # An example has 702 tokens on average (296 report, 382 answer), the longest 1,330. 244 of the 4,898 examples have more
        # than 1,024 tokens, and 4 have more than 1,280: these 4 are left out.
        sequence_length=1280,
    ),
    # 4,898 of the 5,500 examples are for training, and 4,894 fit. Steps per epoch: 4,894 / 8, rounded up: 612.
    # Tokens per step: 8 x 702 on average, about 5,600, plus the replay. The epoch has 3.4 million tokens; 1.9 million are
    # answers. A forward pass has at most 3 x 1,280 tokens: on two processes, the four examples of a step fit into one.
    batch=Batch(global_examples=8, micro_batch=3),
    # Warm-up: 5% of 612 steps are 31. A small model takes a larger learning rate than an 8B one (2e-5).
    optimizer=Optimizer(learning_rate=3e-4, epochs=1, warmup_ratio=0.05, min_lr_ratio=0.1),
    # The gathered bf16 parameters are small (270 MB), and grad_op gathers them once per step instead of twice.
    sharding=Sharding(strategy="grad_op"),
    # The task that scores the answers of run.eval_generate=N.
    eval=Eval(metric="xbrl.task"),
    run=Run(name="xbrl_laptop", eval_every=100, eval_general=True, save_every=50, keep_last=1),
)
