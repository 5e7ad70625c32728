"""Named machines: GPUs with the figures of their data sheets, networks, and clusters of them."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, replace

from common.cores import available_cores
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
    network: float = 12.5e9  # bytes/s of the network cards of a node of such GPUs, where nothing else is said
    sustained: float = 0.8  # share of `flops` that the best large matrix product reaches
    attention: float = 0.7  # share of `flops` that FlashAttention-2 reaches at best


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


_PCIE4, _PCIE5 = 25.0, 50.0  # of x16: 32 and 64 GB/s less the protocol, as copies from pinned memory reach
_ONE_CARD = 12.5  # one card of 100 Gb/s in a node without NVLink (the NVLink of NVL and PCIe cards joins pairs only)

# Of each card its name in CUDA_BF16_PEAKS, GiB that a process may allocate, GB/s of its memory, of its link in one direction (half of
# the figure that NVIDIA prints), to the host and of a node's network cards together, sustained and attention. Sources:
# bandwidth, link: NVIDIA's data sheets (https://www.nvidia.com/en-us/data-center/ h100, h200, a100, l40s, l4, a10, gb200-nvl72; DGX
# B200 and B300) and the architecture whitepapers of the GeForce, RTX and RTX Blackwell PRO cards; AMD's page
# (https://www.amd.com/en/products/accelerators/instinct/mi300/mi300x.html; seven links of 64 GB/s each way). NVIDIA publishes no
# data sheet of the H20: its figures are those that resellers print.
# memory: the "total capacity" of torch's out-of-memory messages, the smallest one found for a card; it varies by 0.2 GiB with the
# driver. For GB200, B300 and H20 what nvidia-smi prints (189,471, 275,040 and 97,871 MiB), less 0.7 GiB as on other cards.
# host_link: of a GB200 NVLink-C2C, 450 GB/s each way for two GPUs, of which copies are taken to reach 0.8; else PCIe.
# network: DGX A100 has eight cards of 200 Gb/s, DGX H100, H200 and B200 of 400, DGX B300 of 800. GB200 (four in a node; up to 72 are
# one node to NVLink), H20 and MI300X are taken to have 400 Gb/s for each GPU.
# sustained: "maximum achievable matmul FLOPS" of https://github.com/stas00/ml-engineering/tree/master/compute/accelerator; 0.8
# where it lists none.
# attention: 0.5 to 0.73 of an A100 (arXiv:2307.08691, section 4.1), 0.35 of an H100, whose newer instructions the kernel does not
# use (arXiv:2407.08608, abstract). The rest is assumed: Blackwell 1.3 times the FLOP/s of an H100, MI300X as many; what limits an
# H100 does not limit an H20, whose peak is a seventh.
_FIGURES = {
    "A100-40": ("A100-SXM4-40GB", 39.38, 1555, 300, _PCIE4, 200, 0.869),
    "A100-80": ("A100-SXM4-80GB", 79.14, 2039, 300, _PCIE4, 200, 0.869),
    "A100-PCIe-80": ("A100 80GB PCIe", 79.14, 1935, _PCIE4, _PCIE4, _ONE_CARD, 0.811),
    "H100": ("H100 80GB HBM3", 79.1, 3350, 450, _PCIE5, 400, 0.803, 0.35),
    "H100-NVL": ("H100 NVL", 93.0, 3938, _PCIE5, _PCIE5, _ONE_CARD, 0.8, 0.35),
    "H100-PCIe": ("H100 PCIe", 79.1, 2000, _PCIE5, _PCIE5, _ONE_CARD, 0.8, 0.35),
    "H200": ("H200", 139.7, 4800, 450, _PCIE5, 400, 0.803, 0.35),
    "H20": ("H20", 94.9, 4000, 450, _PCIE5, 400),
    "B200": ("B200", 178.3, 8000, 900, _PCIE5, 400, 0.776, 0.2),
    "B300": ("B300 SXM6 AC", 267.9, 8000, 900, _PCIE5, 800, 0.786, 0.2),
    "GB200": ("GB200", 184.3, 8000, 900, 180.0, 200, 0.729, 0.18),
    "MI300X": ("AMD Instinct MI300X", 191.9, 5300, 448, _PCIE5, 400, 0.514, 0.26),
    "L40S": ("L40S", 44.3, 864, _PCIE4, _PCIE4, _ONE_CARD),
    "L4": ("L4", 22.0, 300, _PCIE4, _PCIE4, _ONE_CARD),
    "A10": ("A10", 22.0, 600, _PCIE4, _PCIE4, _ONE_CARD),
    "A10G": ("A10G", 22.0, 600, _PCIE4, _PCIE4, _ONE_CARD),
    "A40": ("A40", 44.3, 696, _PCIE4, _PCIE4, _ONE_CARD),
    "A6000": ("RTX A6000", 47.3, 768, _PCIE4, _PCIE4, _ONE_CARD),
    "RTX-PRO-6000": ("RTX PRO 6000 Blackwell Workstation Edition", 94.97, 1792, _PCIE5, _PCIE5, _ONE_CARD),
    "RTX-4090": ("GeForce RTX 4090", 23.5, 1008, _PCIE4, _PCIE4, _ONE_CARD),
    "RTX-5090": ("GeForce RTX 5090", 31.3, 1792, _PCIE5, _PCIE5, _ONE_CARD),
}
_CARDS = {
    name: Device(cuda, "cuda", int(gib * GIB), CUDA_BF16_PEAKS[cuda], *(1e9 * one for one in rest[:4]), *rest[4:])
    for name, (cuda, gib, *rest) in _FIGURES.items()
}
# Some operators cap an SXM H100 at 500 W instead of 700 W. The cap lowers its clock, whatever the data sheet says. That its
# products slow down with the square root of the power is an assumption.
_h100, _slower = _CARDS["H100"], (500 / 700) ** 0.5
_CARDS["H100-500W"] = replace(
    _h100, name="H100-500W", sustained=_slower * _h100.sustained, attention=_slower * _h100.attention
)
GPU_NAMES = tuple(_CARDS)

# Gb/s in one direction of all network cards of a node together.
NETWORKS = {
    "100GbE": 100.0,  # one Ethernet card
    "HDR": 200.0,  # one InfiniBand card
    "NDR": 400.0,
    "4x100": 400.0,  # AWS p4d
    "8x200": 1600.0,  # one for each GPU: DGX A100
    "8x400": 3200.0,  # one for each GPU: DGX H100, H200, B200; AWS p5
    "8x800": 6400.0,  # one for each GPU: DGX B300
}

# A CPU: SmolLM2-135M on two cores of an AMD EPYC. Elementwise operations, casts and AdamW move about 20 GB/s for each core,
# partly from its cache; gloo moves 1.47 GB/s.
_CORE_BANDWIDTH = 20e9
_GLOO_LINK = 1.47e9


def named_device(name: str) -> Device:
    """The GPU with this name: one of `GPU_NAMES`, or the name that CUDA gives it. Raises UserError for another one."""
    wanted = _plain(name)
    for key, device in _CARDS.items():
        if wanted in (_plain(key), _plain(device.name)):
            return replace(device, name=key)
    raise UserError(f"no GPU named {name} is known{_nearest(name, GPU_NAMES)}; there are {', '.join(GPU_NAMES)}")


def generic_device(gigabytes: float) -> Device:
    """A GPU of which only the memory is known, in the GB of a data sheet.

    It has the speeds of the oldest data-centre card with NVLink and so much memory: A100, then H200, then B200. Of the memory a
    process can allocate what the stingiest listed card of about this size leaves it, else 92%, which a card of 16 GB does.
    """
    least = 0.9 * gigabytes  # GiB that a card with so many GB leaves at the least
    alike = [device.memory for device in _CARDS.values() if least * GIB <= device.memory <= gigabytes * GIB]
    like = next((key for key in ("A100-40", "A100-80", "H200") if least * GIB <= _CARDS[key].memory), "B200")
    memory = min(alike, default=int(0.92 * gigabytes * GIB))
    return replace(_CARDS[like], name=f"{gigabytes:g} GB, as fast as {like}", memory=memory)


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
    gpus: int, nodes: int, gpu: str | Device, network: str | float | None = None, host_memory: int = 0
) -> Cluster:
    """`gpus` GPUs in total on `nodes` nodes.

    gpu: a device or its name (`named_device`). network: a name from `NETWORKS` or the Gb/s of a node in one direction; None:
    that of the DGX with this GPU, or one card of 100 Gb/s where the GPUs have no NVLink. host_memory: bytes of one node's host.
    Raises UserError.
    """
    if gpus < 1 or nodes < 1 or gpus % nodes:
        raise UserError(f"{gpus} GPUs cannot be spread evenly over {nodes} nodes")
    device = named_device(gpu) if isinstance(gpu, str) else gpu
    between = device.network if network is None else _network(str(network))  # a wrong name is an error on one node, too
    return Cluster(device, gpus, nodes, between if nodes > 1 else 0.0, host_memory)


def cpu_cluster(processes: int, peak_flops: float, memory: int, cores: int | None = None) -> Cluster:
    """`processes` CPU processes on one machine.

    peak_flops: measured FLOP/s of large matrix products in the compute dtype, of all processes together (`model.flops`).
    memory: bytes of the machine. cores: that the processes share; None: those that this process may use.
    """
    cores = cores or available_cores()
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


def _network(name: str) -> float:
    """Bytes/s of a node, by the name of its network or the Gb/s of it."""
    gigabits = {_plain(key): each for key, each in NETWORKS.items()}.get(_plain(name))
    if gigabits is None and not name.replace(".", "", 1).isdecimal():
        near = _nearest(name, NETWORKS)
        raise UserError(
            f"no network named {name} is known{near}; give one of {', '.join(NETWORKS)} or the Gb/s of a node"
        )
    if not (gigabits := gigabits or float(name)):
        raise UserError(f"a network of {name} Gb/s cannot connect nodes")
    return gigabits * 1e9 / 8


def _plain(name: str) -> str:
    """A name without what its writers disagree on."""
    name = name.lower().removeprefix("nvidia ").removeprefix("geforce ").removeprefix("rtx ")
    return "".join(c for c in name if c.isalnum()).removeprefix("rtx").removesuffix("sxm")


def _nearest(name: str, names: Iterable[str]) -> str:
    by_plain = {_plain(known): known for known in names}
    close = difflib.get_close_matches(_plain(name), by_plain, n=1, cutoff=0.4)
    return f" (did you mean {by_plain[close[0]]}?)" if close else ""
