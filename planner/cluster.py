"""The machines of a plan: their number, memory, and speeds."""

import difflib
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace

from common.errors import UserError
from model.flops import CUDA_BF16_PEAKS

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """One GPU, or the part of a host that one CPU process has. Speeds are those of the data sheet."""

    name: str
    kind: str  # cuda | cpu
    memory: int  # bytes that a process may allocate on it at most
    flops: float  # dense bf16 FLOP/s with fp32 accumulation
    bandwidth: float  # bytes/s of its memory
    link: float  # bytes/s in one direction to the other devices of the node (NVLink, PCIe; on a CPU gloo)
    host_link: float = 25e9  # bytes/s in one direction to the host's memory
    sustained: float = 0.8  # share of `flops` that the best large matrix product reaches
    attention: float = 0.7  # share of `flops` that FlashAttention-2 reaches at best
    network: float = 12.5e9  # bytes/s of the network cards of a node of such GPUs, where nothing else is said


@dataclass(frozen=True)
class Cluster:
    """`devices` ranks on `nodes` nodes."""

    device: Device
    devices: int
    nodes: int = 1
    network: float = 0.0  # bytes/s in one direction of a node's network cards together; 0: one node
    host_memory: int = 0  # bytes of one node's host; 0: unknown

    @property
    def per_node(self) -> int:
        """Ranks of one node."""
        return self.devices // self.nodes


@dataclass(frozen=True)
class _Card:
    """cuda: its name in CUDA_BF16_PEAKS. gigabytes: of the data sheet. memory: GiB that CUDA reports (`mem_get_info`).
    bandwidth and link: GB/s of the data sheet; a link in one direction is half of the figure that NVIDIA prints. network:
    Gb/s of a node's cards together, where nothing else is said."""

    cuda: str
    gigabytes: int
    memory: float
    bandwidth: float
    link: float
    host_link: float
    network: float
    sustained: float = 0.8
    attention: float = 0.7


_PCIE4, _PCIE5 = 25.0, 50.0  # of x16: 32 and 64 GB/s less the protocol, as copies from pinned memory reach
_ONE_CARD = 100.0  # one card of 100 Gb/s in a node without NVLink (the NVLink of NVL and PCIe cards joins pairs only)

# Bandwidths: NVIDIA's data sheets (https://www.nvidia.com/en-us/data-center/ h100, h200, a100, l40s, l4, a10) and the
# architecture whitepapers of the GeForce and RTX cards. Memory: the "total capacity" of torch's out-of-memory messages, the
# smallest figure found for a card; it varies by 0.2 GiB with the driver. `sustained`: "maximum achievable matmul FLOPS"
# of https://github.com/stas00/ml-engineering/tree/master/compute/accelerator; 0.8 where it lists none. `network`: DGX A100
# has eight cards of 200 Gb/s beside its GPUs, DGX H100, H200 and B200 eight of 400 Gb/s. `attention`: 0.5 to 0.73 of an A100
# (arXiv:2307.08691, section 4.1), 0.35 of an H100, whose newer instructions the kernel does not use (arXiv:2407.08608,
# abstract). For the B200 it is an assumption: 1.3 times the FLOP/s of an H100.
_CARDS = {
    "A100-40": _Card("A100-SXM4-40GB", 40, 39.38, 1555, 300, _PCIE4, 1600, 0.869),
    "A100-80": _Card("A100-SXM4-80GB", 80, 79.14, 2039, 300, _PCIE4, 1600, 0.869),
    "A100-PCIe-80": _Card("A100 80GB PCIe", 80, 79.14, 1935, _PCIE4, _PCIE4, _ONE_CARD, 0.811),
    "H100": _Card("H100 80GB HBM3", 80, 79.1, 3350, 450, _PCIE5, 3200, 0.803, 0.35),
    "H100-NVL": _Card("H100 NVL", 94, 93.0, 3938, _PCIE5, _PCIE5, _ONE_CARD, 0.8, 0.35),
    "H100-PCIe": _Card("H100 PCIe", 80, 79.1, 2000, _PCIE5, _PCIE5, _ONE_CARD, 0.8, 0.35),
    "H200": _Card("H200", 141, 139.7, 4800, 450, _PCIE5, 3200, 0.803, 0.35),
    "B200": _Card("B200", 180, 178.3, 8000, 900, _PCIE5, 3200, 0.776, 0.2),
    "L40S": _Card("L40S", 48, 44.3, 864, _PCIE4, _PCIE4, _ONE_CARD),
    "L4": _Card("L4", 24, 22.0, 300, _PCIE4, _PCIE4, _ONE_CARD),
    "A10": _Card("A10", 24, 22.0, 600, _PCIE4, _PCIE4, _ONE_CARD),
    "A10G": _Card("A10G", 24, 22.0, 600, _PCIE4, _PCIE4, _ONE_CARD),
    "A40": _Card("A40", 48, 44.3, 696, _PCIE4, _PCIE4, _ONE_CARD),
    "A6000": _Card("RTX A6000", 48, 47.3, 768, _PCIE4, _PCIE4, _ONE_CARD),
    "RTX-4090": _Card("GeForce RTX 4090", 24, 23.5, 1008, _PCIE4, _PCIE4, _ONE_CARD),
    "RTX-5090": _Card("GeForce RTX 5090", 32, 31.3, 1792, _PCIE5, _PCIE5, _ONE_CARD),
}
# Some operators cap an SXM H100 at 500 W instead of 700 W. The cap lowers its clock, whatever the data sheet says. That its
# products slow down with the square root of the power is an assumption.
_CAPPED = {"H100-500W": ("H100", (500 / 700) ** 0.5)}
GPU_NAMES = (*_CARDS, *_CAPPED)

# Gb/s in one direction of all network cards of a node together.
NETWORKS = {
    "100GbE": 100.0,  # one Ethernet card
    "HDR": 200.0,  # one InfiniBand card
    "NDR": 400.0,
    "4x100": 400.0,  # AWS p4d
    "8x200": 1600.0,  # one for each GPU: DGX A100
    "8x400": 3200.0,  # one for each GPU: DGX H100, H200, B200; AWS p5
}

# A CPU: SmolLM2-135M on two cores of an AMD EPYC (docs/performance.md, "Where the time goes"). Elementwise operations, casts
# and AdamW move about 20 GB/s for each core, partly from its cache; gloo moves 1.47 GB/s.
_CORE_BANDWIDTH = 20e9
_GLOO_LINK = 1.47e9


def named_device(name: str) -> Device:
    """The GPU with this name: one of `GPU_NAMES`, or the name that CUDA gives it. Raises UserError for another one."""
    wanted = _plain(name)
    capped = next((_CAPPED[key] for key in _CAPPED if _plain(key) == wanted), None)
    if capped:
        base = named_device(capped[0])
        return replace(base, name=name, sustained=base.sustained * capped[1], attention=base.attention * capped[1])
    for key, card in _CARDS.items():
        if wanted in (_plain(key), _plain(card.cuda)):
            return Device(
                name=key,
                kind="cuda",
                memory=int(card.memory * GIB),
                flops=CUDA_BF16_PEAKS[card.cuda],
                bandwidth=card.bandwidth * 1e9,
                link=card.link * 1e9,
                host_link=card.host_link * 1e9,
                sustained=card.sustained,
                attention=card.attention,
                network=card.network * 1e9 / 8,
            )
    raise UserError(f"no GPU named {name} is known{_nearest(name, GPU_NAMES)}; there are {', '.join(GPU_NAMES)}")


def generic_device(gigabytes: float) -> Device:
    """A GPU of which only the memory is known, in the GB of a data sheet.

    It has the speeds of the oldest data-centre card with NVLink and so much memory: A100, then H200, then B200. Of the memory a
    process can allocate what the stingiest listed card of this size leaves it, else 92%, which a card of 16 GB does.
    """
    if gigabytes <= 0:
        raise UserError(f"the memory of a GPU must be positive, and not {gigabytes:g} GB")
    like = next((key for key in ("A100-40", "A100-80", "H200", "B200") if gigabytes <= _CARDS[key].gigabytes), "B200")
    alike = [card.memory for card in _CARDS.values() if card.gigabytes == gigabytes]
    memory = min(alike) if alike else 0.92 * gigabytes
    return replace(named_device(like), name=f"{gigabytes:g} GB, as fast as {like}", memory=int(memory * GIB))


def found_device(name: str, memory: int, flops: float) -> Device:
    """The GPU of a process: CUDA tells its name and memory (bytes), and its data sheet the speeds.

    flops: measured in bf16, for a GPU that is not listed. It is taken to have PCIe 4.0 and no NVLink, and as many FLOP per
    byte of its memory as an A100.
    """
    try:
        return replace(named_device(name), name=name, memory=memory)
    except UserError:
        a100 = named_device("A100-40")
        bandwidth = flops * a100.bandwidth / a100.flops
        return Device(name, "cuda", memory, flops, bandwidth, link=_PCIE4 * 1e9, sustained=1.0)


def cluster_of(
    gpus: int,
    nodes: int = 1,
    gpu: str | float | Device | None = None,
    network: str | float | None = None,
    host_memory: int = 0,
) -> Cluster:
    """`gpus` GPUs in total on `nodes` nodes.

    gpu: a name (`named_device`), the memory in GB (`generic_device`), or a device; None: 80 GB. network: a name from `NETWORKS` or the
    Gb/s of a node in one direction; None: that of the DGX with this GPU, or one card of 100 Gb/s where the GPUs have no NVLink.
    host_memory: bytes of one node's host. Raises UserError.
    """
    if gpus < 1 or nodes < 1 or gpus % nodes:
        raise UserError(f"{gpus} GPUs cannot be spread evenly over {nodes} nodes")
    if isinstance(gpu, Device):
        device = gpu
    elif isinstance(gpu, str) and not _is_number(gpu):
        device = named_device(gpu)
    else:
        device = generic_device(float(80 if gpu is None else gpu))
    between = _network(device, network)  # a mistake in it is one on a single node too
    if nodes == 1:
        between = 0.0
    return Cluster(device, gpus, nodes, between, host_memory)


def cpu_cluster(processes: int, peak_flops: float, memory: int, cores: int | None = None) -> Cluster:
    """`processes` CPU processes on one machine.

    peak_flops: measured FLOP/s of large matrix products in the compute dtype, of all processes together (`model.flops`).
    memory: bytes of the machine. cores: that the processes share; None: those that this process may use.
    """
    cores = cores or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    device = Device(
        name="CPU",
        kind="cpu",
        memory=memory // processes,
        flops=peak_flops / processes,
        bandwidth=_CORE_BANDWIDTH * cores / processes,
        link=_GLOO_LINK,
        sustained=1.0,  # measured, not from a data sheet
    )
    return Cluster(device, processes, host_memory=memory)


def _network(device: Device, network: str | float | None) -> float:
    """Bytes/s of a node."""
    if network is None:
        return device.network
    if isinstance(network, str) and not _is_number(network):
        for key, gigabits in NETWORKS.items():
            if _plain(key) == _plain(network):
                return gigabits * 1e9 / 8
        near = _nearest(network, NETWORKS)
        raise UserError(
            f"no network named {network} is known{near}; give one of {', '.join(NETWORKS)} or the Gb/s of a node"
        )
    if float(network) <= 0:
        raise UserError(f"a network of {network} Gb/s cannot connect nodes")
    return float(network) * 1e9 / 8


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).isdigit()


def _plain(name: str) -> str:
    """A name without what its writers disagree on."""
    name = name.lower().removeprefix("nvidia ").removeprefix("geforce ").removeprefix("rtx ")
    return "".join(c for c in name if c.isalnum()).removeprefix("rtx").removesuffix("sxm")


def _nearest(name: str, names: Iterable[str]) -> str:
    by_plain = {_plain(known): known for known in names}
    close = difflib.get_close_matches(_plain(name), by_plain, n=1, cutoff=0.4)
    return f" (did you mean {by_plain[close[0]]}?)" if close else ""
