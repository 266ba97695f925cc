"""What a training step takes on the device beside torch's allocator, which ``nvidia-smi`` counts too."""

from __future__ import annotations

from pytest_lora.facts.memory_choices import Parallel

CUDA_CONTEXT = 512 * 2**20
"""Bytes that CUDA's context takes on the device; 0.4 to 0.6 GiB is usual."""

OF_TWO, OF_MORE = 544 * 2**20, 688 * 2**20
"""Bytes that one communicator of NCCL takes on each GPU after its first collective, among two and among more: measured
on A100s with NVLink (NVIDIA/nccl, issue 964). Each connection of each of its 24 channels has a buffer for every
protocol, 12 MiB for both directions (``initTransportsRank``, ``p2pSendSetup`` and ``p2pRecvSetup``). Cards without
NVLink have fewer channels and take less; H100s behind an NVSwitch take up to 1.5 GiB more for each
(``nvlsPerRankSize`` in nvls.cc)."""

COMMUNICATORS = {"device_map": 0, "hsdp": 2, "zero1": 2, "zero2": 2, "zero3": 2}
"""How many a strategy has, where that is not one: layers on several GPUs are one process; ``hsdp`` has one to divide
and one to repeat; DeepSpeed clones the group of all ranks (``_clone_world_group`` in deepspeed/utils/groups.py), and
accelerate waits in the first."""


def communication_of(parallel: Parallel | None) -> int:
    """Bytes that NCCL takes on each GPU; 0 with one."""
    if parallel is None or parallel.gpus == 1:
        return 0
    each = OF_TWO if parallel.gpus == 2 else OF_MORE
    return each * COMMUNICATORS.get(parallel.strategy, 1)
