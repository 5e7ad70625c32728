"""Two ranks settle the date of a run, rank 1 after midnight; each writes it to RESULT.rank<rank>.txt.

torchrun --nproc_per_node=2 tests/training/chat_date_worker.py RUN_DIRECTORY RESULT FAMILY FAMILY

FAMILY: whose tokenizer rank 0 and rank 1 have (tests/chat_families.py).
"""

import datetime
import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from configs.config import Batch, Config, Data, Model, Optimizer, Run
from distributed import rendezvous
from tests.chat_families import family_tokenizer
from training import chat_settings


class Today(datetime.date):
    @classmethod
    def today(cls) -> datetime.date:
        return datetime.date(2026, 1, 31) + datetime.timedelta(days=int(os.environ["RANK"]))


chat_settings.datetime.date = Today
run_directory, result = map(Path, sys.argv[1:3])
tokenizer = family_tokenizer(sys.argv[3 + int(os.environ["RANK"])])
config = Config(Model("m"), Data(("a",)), Batch(1), Optimizer(1e-5), Run("r", timeout_minutes=5))
config = chat_settings.settle_chat_settings(config, tokenizer, run_directory, 2)
if config.data.chat_date is None:
    rendezvous.join(5)  # as train.py does next
result.with_suffix(f".rank{os.environ['RANK']}.txt").write_text(str(config.data.chat_date))
