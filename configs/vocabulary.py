"""How the rows of new tokens begin, compared: the same steps on passages of bank reports, once for each initialisation.

Models and passages: docs/vocabulary.md. Then, for INIT in subtokens, mean and random:
    python train.py configs/vocabulary.py model.path=artifacts/vocabulary/INIT run.name=vocabulary-INIT
"""

from configs.config import Batch, Config, Data, Model, Optimizer, Run

config = Config(
    model=Model(path="artifacts/vocabulary/subtokens"),
    data=Data(
        train=("artifacts/vocabulary/train.jsonl",),
        validation=("artifacts/vocabulary/test.jsonl",),  # passages of banks that training never sees
        sequence_length=512,  # a passage has some 130 tokens of the extended vocabulary, and twice as many without it
    ),
    # 16 steps of 8 passages: 16 of the 40 steps of an epoch, 2 of them warm-up.
    batch=Batch(global_examples=8, micro_batch=4),
    optimizer=Optimizer(learning_rate=3e-4, epochs=1, max_steps=16, warmup_steps=2),
    run=Run(name="vocabulary-subtokens", eval_every=4),
)
