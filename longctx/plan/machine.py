"""What a plan assumes of the machines; every number can be set and is printed with the plan."""

from dataclasses import dataclass

from longctx.config.typed import positive

GIB = 2**30


@dataclass(frozen=True)
class Machine:
    """GPUs and what joins them; a CPU counts as one whose memory is the host's.

    Args:
        gpus: ranks of the run.
        gpu_memory: of one, GiB.
        host_memory: CPU memory that one rank may use, GiB.
        reserve: of `gpu_memory`, for the device's libraries and for gaps between tensors, GiB.
        peak: bf16 FLOP/s of one GPU, in 10^12; the data sheet's.
        fraction: of it that a step reaches.
        gpus_per_node: GPUs that share a node's links.
        link: bytes per second a GPU sends inside a node, in 10^9.
        network: bytes per second a GPU sends to other nodes, in 10^9.
        host_link: bytes per second between a GPU and CPU memory, in 10^9.
        is_gpu: whether it is one: buckets, temporaries and the host's share differ on a CPU.
    """

    gpus: int = 1
    gpu_memory: float = 80.0
    host_memory: float = 200.0
    reserve: float = 3.0
    peak: float = 989.0
    fraction: float = 0.4
    gpus_per_node: int = 8
    link: float = 300.0
    network: float = 40.0
    host_link: float = 25.0
    is_gpu: bool = True

    def __post_init__(self) -> None:
        for name in ("gpus", "gpu_memory", "host_memory", "peak", "fraction", "gpus_per_node",
                     "link", "network", "host_link"):  # fmt: skip
            positive(getattr(self, name), name)

    @property
    def bandwidth(self) -> float:
        """Bytes per second that a rank sends to all others: of the slowest link in between."""
        return 1e9 * (self.network if self.gpus > self.gpus_per_node else self.link)
