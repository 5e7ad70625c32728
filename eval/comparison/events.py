"""The comparison in TensorBoard: metrics and hyper-parameters of each arm, and the figures."""

import io
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from matplotlib.image import imread
from torch.utils.tensorboard import SummaryWriter

from eval.comparison.pictures import Drawn


def write_events(result: dict, pictures: Sequence[Drawn], folder: Path) -> None:
    """Write event files to `folder`, which is this comparison's own and is emptied first.

    Each row is a run of TensorBoard: a scalar per metric and, of an arm, one row of the HPARAMS tab. The pictures are
    images of the run `figures`, with their captions as text.
    """
    shutil.rmtree(folder, ignore_errors=True)
    for number, row in enumerate(result["rows"]):
        values = {
            f"compare/{name}": found["value"] for name, found in row["metrics"].items() if found["value"] is not None
        }
        name = re.sub(r"[^A-Za-z0-9.-]+", "_", row["name"])
        with SummaryWriter(folder / f"{number:02}-{name}") as writer:
            for metric, value in values.items():
                writer.add_scalar(metric, value, 0)
            if row["kind"] == "arm":
                tokens = [seed["tokens"] for seed in row["seeds"] if seed["tokens"]]
                settings = {"arm": row["name"], "seeds": len(row["seeds"])}
                settings |= {"tokens": sum(tokens) / len(tokens)} if tokens else {}
                writer.add_hparams(settings, {f"hparams/{name}": value for name, value in values.items()}, run_name=".")
    with SummaryWriter(folder / "figures") as writer:
        for picture in pictures:
            writer.add_image(picture.name, imread(io.BytesIO(picture.png))[..., :3], 0, dataformats="HWC")
            writer.add_text(picture.name, picture.caption, 0)
