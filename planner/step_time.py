"""The time of a step by a roofline of compute, memory traffic and communication, as a range."""

from dataclasses import dataclass

from configs.config import Config
from planner.cluster import Cluster
from planner.shape import ModelShape
from planner.workload import Workload


@dataclass(frozen=True)
class Speed:
    """low and high bound of the tokens per second and device, and the hours of the whole run that follow from them."""

    tokens_per_second: tuple[float, float]  # of one device, low and high
    hours: tuple[float, float]  # of the run, short and long
    parts: dict[str, float]  # seconds of a mean step: compute, memory traffic, communication in the open, ...


def expected_speed(shape: ModelShape, config: Config, cluster: Cluster, workload: Workload) -> Speed:
    """The speed of a run of `config`."""
    raise NotImplementedError
