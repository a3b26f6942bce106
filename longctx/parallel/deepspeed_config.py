"""The DeepSpeed configuration of a run, derived from typed fields; written nowhere else.

Does not import deepspeed, so a plan or a test makes one quickly.
"""

from typing import Any

import torch

from longctx.config import RunConfig

BUCKET_GPU, BUCKET_CPU = 200_000_000, 5_000_000  # communication buckets, elements
# DeepSpeed reports the gradient norm only where it clips; this bound never does.
NEVER_CLIPS = 1e30


def bucket_elements(gpu: bool) -> int:
    """Elements of a communication bucket."""
    return BUCKET_GPU if gpu else BUCKET_CPU


def deepspeed_config(run: RunConfig, ranks: int, gpu: bool | None = None) -> dict[str, Any]:
    """The DeepSpeed configuration of a run.

    The optimizer stays torch's AdamW where it is offloaded: DeepSpeed's own for the CPU is C++ that
    it compiles for minutes, and rounds differently.

    Args:
        run: the run.
        ranks: data-parallel size.
        gpu: for GPUs; None: what this machine has.
    """
    gpu = torch.cuda.is_available() if gpu is None else gpu
    bucket, parallel = bucket_elements(gpu), run.parallel
    stage = parallel.zero_stage
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": bucket}
    if stage in (1, 2):
        zero["allgather_bucket_size"] = bucket
    if stage == 3:
        zero["stage3_prefetch_bucket_size"] = bucket
        zero["stage3_param_persistence_threshold"] = min(100_000, bucket)
    host = {"device": "cpu", "pin_memory": gpu}
    if parallel.offload_optimizer:
        zero["offload_optimizer"] = host
    if parallel.offload_parameters:
        zero["offload_param"] = host
    own = {"zero_force_ds_cpu_optimizer": False} if parallel.offload_optimizer else {}
    return {
        "train_micro_batch_size_per_gpu": run.train.micro_batch_rows,
        "gradient_accumulation_steps": run.train.accumulation(ranks),
        "zero_optimization": zero,
        "bf16": {"enabled": run.train.dtype == "bf16"},
        "gradient_clipping": run.optim.clip or NEVER_CLIPS,
        "steps_per_print": None,
        "wall_clock_breakdown": False,
        **own,
    }
