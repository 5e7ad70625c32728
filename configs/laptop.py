"""The embedded default: SmolLM2-135M on 2 CPU cores, the short bank reports that scripts/quickstart.sh prepares.

python scripts/make_reports.py --profile short --examples 2300 --splits 0.88 0.06 0.06 --seed 0 --out artifacts/quickstart
python scripts/make_replay.py --source topics --out artifacts/replay/topics.jsonl
torchrun --nproc_per_node=2 train.py configs/laptop.py

data.mix=none trains without replay: the task is learned a little sooner, and general text is forgotten (docs/results.md).
"""

from configs.config import Batch, Config, Data, Model, Optimizer, Run, Sharding, Source

config = Config(
    model=Model(path="artifacts/models/SmolLM2-135M-Instruct", compute_dtype="bf16"),
    data=Data(
        train=("artifacts/quickstart/train.jsonl",),
        validation=("artifacts/quickstart/validation.jsonl",),
        # Against forgetting: 5% of the target tokens are general text.
        mix=(Source("replay", ("artifacts/replay/topics.jsonl",), 0.05),),
        sequence_length=256,  # the longest example has 223 tokens; small rows spread evenly over the ranks
    ),
    # 2,024 examples of 124 tokens: 253 steps of about 1,000 tokens, 13 of them warm-up. The loss rests on a plateau (the
    # form is learned, the figures are not read yet) until about step 80. With 16 examples a step the run can end on it
    # (docs/results.md, "Leaving the plateau").
    batch=Batch(global_examples=8, micro_batch=8),
    # A small model far from its optimum wants a larger learning rate than the 2e-5 of an 8B one.
    optimizer=Optimizer(learning_rate=3e-4, epochs=1, warmup_ratio=0.05, min_lr_ratio=0.1),
    # Gathered parameters are small here (bf16: 270 MB), and one all-gather a step is cheaper than two.
    sharding=Sharding(strategy="grad_op"),
    run=Run(name="laptop", eval_every=120, eval_general=True, save_every=40, keep_last=1),
)
