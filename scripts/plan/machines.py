"""Machines: GPUs with the figures of their data sheets, clusters, and the machine that this process runs on."""

import difflib
import os
from dataclasses import dataclass, replace

import torch

from common.cores import available_cores
from common.errors import UserError
from configs.config import Config
from configs.load import replace as with_value
from distributed.host_memory import free_bytes
from distributed.process_group import world_size_from_environment
from model.dtypes import DTYPES, has_native_bf16
from model.flops import CUDA_BF16_PEAKS, data_sheet_peak, measured_flops

GIB = 2**30
PER_NODE = 8  # GPUs of a node by default


@dataclass(frozen=True)
class Device:
    """A GPU with the speeds of its data sheet, or one CPU process's part of a machine."""

    name: str
    kind: str  # cuda | cpu
    memory: int  # most bytes that a process can allocate
    flops: float  # dense bf16 FLOP/s with fp32 accumulation
    bandwidth: float  # bytes/s of its memory
    link: float  # bytes/s in one direction to the node's other devices (NVLink or PCIe; gloo on a CPU)
    host_link: float = 25e9  # bytes/s in one direction to the host's memory
    network: float = 12.5e9  # default bytes/s of the network cards of a node of such GPUs
    sustained: float = 0.8  # fraction of `flops` that the best large matrix product reaches
    attention: float = 0.7  # fraction of `flops` that FlashAttention-2 reaches at best


@dataclass(frozen=True)
class Cluster:
    """`devices` ranks on `nodes` nodes."""

    device: Device
    devices: int
    nodes: int = 1
    network: float = 0.0  # bytes/s in one direction of all network cards of a node; 0 on one node

    @property
    def per_node(self) -> int:
        """Return the number of ranks on a node."""
        return self.devices // self.nodes


_PCIE4, _PCIE5 = 25.0, 50.0  # x16: 32 and 64 GB/s less the protocol, as copies from pinned memory reach
_ONE_CARD = 12.5  # one card of 100 Gb/s in a node without NVLink (NVL and PCIe cards join pairs only)

# Per card: its name in CUDA_BF16_PEAKS, GiB that a process can allocate, GB/s of its memory, of its link in one direction
# (half of NVIDIA's figure), to the host, and of all network cards of a node; then `sustained` and `attention`. Sources:
# bandwidth, link: NVIDIA's data sheets (https://www.nvidia.com/en-us/data-center/ h100, h200, a100, l40s, l4, a10, gb200-nvl72;
#   DGX B200 and B300), the architecture whitepapers of the GeForce, RTX and RTX Blackwell PRO cards, and AMD's page
#   (https://www.amd.com/en/products/accelerators/instinct/mi300/mi300x.html; seven links of 64 GB/s each way). NVIDIA publishes
#   no data sheet of the H20: resellers print its figures.
# memory: the smallest "total capacity" in torch's out-of-memory messages for the card; it varies by 0.2 GiB with the driver.
#   For GB200, B300 and H20 it is nvidia-smi's figure (189,471, 275,040 and 97,871 MiB) less 0.7 GiB, as on the rest.
# host_link: PCIe. A GB200 has NVLink-C2C, 450 GB/s each way for two GPUs; copies are assumed to reach 0.8 of it.
# network: DGX A100 has eight cards of 200 Gb/s, DGX H100, H200 and B200 of 400, DGX B300 of 800. GB200 (four in a node; up to
#   72 are one node to NVLink), H20 and MI300X are assumed to have 400 Gb/s for each GPU.
# sustained: "maximum achievable matmul FLOPS" of https://github.com/stas00/ml-engineering/tree/master/compute/accelerator;
#   0.8 for cards that it does not list.
# attention: 0.5 to 0.73 on an A100 (arXiv:2307.08691, section 4.1), 0.35 on an H100, whose newer instructions the kernel does
#   not use (arXiv:2407.08608, abstract). The rest is assumed: Blackwell has 1.3 times the FLOP/s of an H100, MI300X has the
#   FLOP/s of an H100. The limit of an H100 does not apply to an H20, whose peak is a seventh.
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
    name: Device(cuda, "cuda", int(gib * GIB), CUDA_BF16_PEAKS[cuda], *(1e9 * speed for speed in rest[:4]), *rest[4:])
    for name, (cuda, gib, *rest) in _FIGURES.items()
}
GPU_NAMES = tuple(_CARDS)

# A CPU: SmolLM2-135M on two cores of an AMD EPYC. Elementwise operations, casts and AdamW move about 20 GB/s per core, partly
# from its cache; gloo moves 1.47 GB/s.
_CORE_BANDWIDTH = 20e9
_GLOO_LINK = 1.47e9


def named_device(name: str) -> Device:
    """Return the GPU with a name of `GPU_NAMES`, or with the name that CUDA gives it. Raise UserError for unknown names."""
    plain = _plain(name)
    for key, device in _CARDS.items():
        if plain in (_plain(key), _plain(device.name)):
            return replace(device, name=key)
    by_plain = {_plain(known): known for known in GPU_NAMES}
    close = difflib.get_close_matches(plain, by_plain, n=1, cutoff=0.4)
    advice = f" (did you mean {by_plain[close[0]]}?)" if close else ""
    raise UserError(f"no GPU named {name} is known{advice}; there are {', '.join(GPU_NAMES)}")


def generic_device(gigabytes: float) -> Device:
    """Return a GPU with a given memory, in the GB of a data sheet, and assumed speeds.

    The speeds are those of the oldest data-centre card with NVLink and so much memory: an A100, an H200 or a B200. The memory
    that a process can allocate is the least of the listed cards of about this size, or 92% without such a card, as on cards
    of 16 GB.
    """
    least = 0.9 * gigabytes  # every card with so many GB leaves at least so many GiB
    alike = [device.memory for device in _CARDS.values() if least * GIB <= device.memory <= gigabytes * GIB]
    like = next((key for key in ("A100-40", "A100-80", "H200") if least * GIB <= _CARDS[key].memory), "B200")
    memory = min(alike, default=int(0.92 * gigabytes * GIB))
    return replace(_CARDS[like], name=f"{gigabytes:g} GB, as fast as {like}", memory=memory)


def found_device(name: str, memory: int, flops: float) -> Device:
    """Return the GPU of a process: CUDA reports its name and memory (bytes), the data sheet has the speeds.

    A GPU that is not listed has the `flops` that were measured in bf16. It is assumed to have PCIe 4.0, no NVLink, and an
    A100's ratio of FLOP/s to memory bandwidth.
    """
    try:
        return replace(named_device(name), name=name, memory=memory)
    except UserError:
        a100 = named_device("A100-40")
        bandwidth = flops * a100.bandwidth / a100.flops
        return Device(name, "cuda", memory, flops, bandwidth, link=_PCIE4 * 1e9, sustained=1.0)


def cluster_of(gpus: int, nodes: int, gpu: str | Device, network: float | None = None) -> Cluster:
    """Return a cluster of `gpus` GPUs in total on `nodes` nodes. Raise UserError if the nodes differ in size.

    `gpu` is a device or its name (`named_device`). `network` is the Gb/s of a node in one direction; the default is the
    network of the DGX with this GPU, or one card of 100 Gb/s for GPUs without NVLink.
    """
    if gpus < 1 or nodes < 1 or gpus % nodes:
        raise UserError(f"{gpus} GPUs cannot be spread evenly over {nodes} nodes")
    device = named_device(gpu) if isinstance(gpu, str) else gpu
    between = device.network if network is None else network * 1e9 / 8
    return Cluster(device, gpus, nodes, between if nodes > 1 else 0.0)


def cpu_cluster(processes: int, peak_flops: float, memory: int, cores: int | None = None) -> Cluster:
    """Return a cluster of `processes` CPU processes on one machine.

    `peak_flops` are the FLOP/s that all processes together reach in large matrix products in the compute dtype
    (`model.flops.measured_flops`). `memory` (bytes) and `cores` belong to the machine; by default `cores` are the cores
    that this process may use.
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
    return Cluster(device, processes)


def this_machine(config: Config) -> tuple[Config, Cluster]:
    """Return the config as this machine computes it, and the cluster of torchrun's ranks.

    Without torchrun it has one rank, or as many as `sharding.context` asks for.

    The FLOP/s of a CPU, and of a GPU without a data sheet, are measured.
    """
    ranks, per_node = world_size_from_environment()
    if "WORLD_SIZE" not in os.environ:
        ranks = per_node = config.sharding.context
    on_cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if on_cuda else torch.device("cpu")
    if not has_native_bf16(device):  # all ranks then compute in fp32 (training/start.py: agree_on_dtype)
        config = with_value(config, "model.compute_dtype", "fp32")
    dtype = DTYPES[config.model.compute_dtype]
    if not on_cuda:  # all processes share the cores
        return config, cpu_cluster(ranks, measured_flops(device, dtype, 1024), free_bytes(device, 1))
    card = torch.cuda.get_device_properties(device)
    flops = data_sheet_peak(card.name) or measured_flops(device, dtype, 8192)
    gpu = found_device(card.name, card.total_memory, flops)
    return config, cluster_of(ranks, max(1, ranks // per_node), gpu)


def _plain(name: str) -> str:
    """Return a name without the prefixes, spaces and hyphens that only some people write."""
    name = name.lower().removeprefix("nvidia ").removeprefix("geforce ").removeprefix("rtx ")
    return "".join(c for c in name if c.isalnum()).removeprefix("rtx").removesuffix("sxm")
