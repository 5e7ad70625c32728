"""Fine-tune on your chats: model.path and data.train are asked for."""

from configs.config import Batch, Config, Data, Model, Optimizer, Run

config = Config(
    model=Model(path="MODEL"),
    data=Data(train=("DATA",)),
    batch=Batch(global_examples=16, micro_batch="auto"),
    optimizer=Optimizer(learning_rate=2e-4, epochs=1),
    run=Run(name="sft"),
)
