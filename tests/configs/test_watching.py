"""run.best_by, run.eval_generate, run.log_to and eval.metric: what is refused, in which words, and what a name means."""

import pytest

from common.errors import UserError
from configs.config import Batch, Config, Data, Model, Optimizer, Run
from configs.load import override, parse_best_by

CONFIG = Config(Model("m"), Data(("d",)), Batch(1), Optimizer(1e-3), Run("r"))
VALIDATED = "data.validation=v"
ANSWERS = (VALIDATED, "run.eval_generate=4")


@pytest.mark.parametrize(
    ("text", "curve", "direction"),
    [
        ("validation/loss", "validation/loss", "min"),
        ("validation/loss/general", "validation/loss/general", "min"),
        ("f1", "validation/f1", "max"),
        ("forgetting/kl", "forgetting/kl", "min"),
        ("errors:min", "validation/errors", "min"),
    ],
)
def test_a_name_has_a_curve_and_a_direction(text, curve, direction):
    assert parse_best_by(text) == (curve, direction)


BY_KL = (VALIDATED, "run.eval_general=True", "run.best_by=forgetting/kl")


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (("run.export=best",), "run.export=best needs data.validation or data.validation_share"),
        (("run.stop_after_no_gain=2", "run.eval_every=5"), "run.stop_after_no_gain=2 needs data.validation"),
        (("run.eval_generate=4",), "run.eval_generate=4 needs data.validation or"),
        (("run.best_by=f1", VALIDATED), "run.best_by=f1 needs run.eval_generate"),
        (("run.best_by=forgetting/kl",), "run.best_by=forgetting/kl needs run.eval_general=True"),
        (("forgetting.max_kl=0.2", VALIDATED), "forgetting.max_kl=0.2 needs run.eval_general=True, which shows"),
        (("forgetting.max_kl=0.2", *BY_KL), "forgetting.max_kl=0.2 needs a run.best_by that scores the task"),
        (("run.best_by=validation/loss/x",), "needs a source of data.mix with that name and validation files"),
        (("run.best_by=fi", *ANSWERS), "run.best_by=fi must be the name of a curve, and NAME:max or NAME:min where"),
        (("run.profile=5",), "run.profile must be STEP:COUNT, such as 100:3 for steps 100 to 102, not '5'"),
        (("run.log_to=tensorboard,wanb",), "run.log_to must be each of tensorboard, wandb, mlflow at most once"),
        (("eval.metric=scores", *ANSWERS), "eval.metric must be MODULE:FUNCTION, not 'scores'"),
    ],
)
def test_what_cannot_work_is_one_sentence(overrides, sentence):
    with pytest.raises(UserError) as error:
        override(CONFIG, overrides)
    assert sentence in str(error.value)


def test_what_can_work_is_accepted():
    config = override(CONFIG, (*ANSWERS, "run.best_by=mine:max", "eval.metric=pkg.scores:mine", "run.log_to=none"))
    assert (config.run.log_to, config.eval.metric) == ((), "pkg.scores:mine")
    override(CONFIG, ("run.export=best", "run.best_by=forgetting/kl", "run.eval_general=True"))
