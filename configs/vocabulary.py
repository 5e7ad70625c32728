"""Compare initialisations of new token embeddings: the same steps on passages of bank reports for each initialisation.

docs/vocabulary.md says how to make the models and the passages. Then run this for INIT = subtokens, mean and random:

python train.py configs/vocabulary.py model.path=artifacts/vocabulary/INIT run.name=vocabulary-INIT
"""

from configs.config import Batch, Config, Data, Model, Optimizer, Run

config = Config(
    model=Model(path="artifacts/vocabulary/subtokens"),
    data=Data(
        train=("artifacts/vocabulary/train.jsonl",),
        validation=("artifacts/vocabulary/test.jsonl",),  # passages from banks that are not in the training data
        # A passage has about 130 tokens of the extended vocabulary, and twice as many of the original one.
        sequence_length=512,
    ),
    # Tokens per step: 8 passages x 130, about 1,000. An epoch has 40 steps, of which 16 are run.
    batch=Batch(global_examples=8, micro_batch=4),
    optimizer=Optimizer(learning_rate=3e-4, epochs=1, max_steps=16, warmup_steps=2),
    run=Run(name="vocabulary-subtokens", eval_every=4),
)
