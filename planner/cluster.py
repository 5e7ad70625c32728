"""The machines of a plan: their number, memory, and speeds."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """One GPU, or the part of a host that one CPU process has. Speeds are those of the data sheet."""

    name: str
    kind: str  # cuda | cpu
    memory: int  # bytes that a process may allocate on it at most
    flops: float  # dense bf16 FLOP/s with fp32 accumulation
    bandwidth: float  # bytes/s of its memory
    link: float  # bytes/s in one direction to the other devices of the node (NVLink, PCIe; on a CPU gloo)


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
