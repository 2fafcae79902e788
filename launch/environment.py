"""What ranks find in their environment. The only room of the house that reads environment variables is this one."""

from __future__ import annotations

import os

from training.distributed.cores import usable_cores
from training.errors import UserError

_OF_A_RANK = (
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "CROSS_RANK"),
    *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "CROSS_SIZE"),
    *("MASTER_ADDR", "MASTER_PORT"),
)
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")

OF_EVERY_RANK = (*_THREADS, "TOKENIZERS_PARALLELISM", "DS_ACCELERATOR")
"""What `rank_environment` sets."""


def rank_environment(num_ranks: int, threads_per_rank: int = 0) -> dict[str, str]:
    """This environment for a launcher of `num_ranks` processes on this host.

    The stock launcher sets no thread counts, so every rank would take all cores; here they are shared evenly, unless
    the recipe (`threads_per_rank`) or the user has set them. Variables that would make a process think it is a rank
    already are removed.
    """
    environment = {key: value for key, value in os.environ.items() if key not in _OF_A_RANK}
    if threads_per_rank:
        environment |= dict.fromkeys(_THREADS, str(threads_per_rank))
    for name in _THREADS:
        environment.setdefault(name, str(max(1, usable_cores() // max(1, num_ranks))))
    # Every loader worker has a tokenizer: threads of each on all cores would stand in each other's way.
    environment.setdefault("TOKENIZERS_PARALLELISM", "false")
    if environment.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        # The launcher overwrites CUDA_VISIBLE_DEVICES in the ranks, which would bring the hidden GPUs back.
        environment.setdefault("DS_ACCELERATOR", "cpu")
    return environment


def num_gpus() -> int:
    """GPUs for ranks on this machine; none where DS_ACCELERATOR=cpu puts the ranks on the CPU."""
    if _ranks_on_cpu():
        return 0
    import torch

    return torch.cuda.device_count()


def has_accelerator() -> bool:
    """Whether torch finds one of any kind on this machine."""
    import torch

    return torch.accelerator.is_available()


def _ranks_on_cpu() -> bool:
    return os.environ.get("DS_ACCELERATOR") == "cpu"


def chosen_gpus(num_ranks: int) -> list[str] | None:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves to this run, one per rank; None when it names none.

    DeepSpeed ignores the variable beside `--num_accelerators` and takes the first GPUs of the machine, somebody else's
    perhaps. Raises UserError when there are fewer than ranks, or when they are named other than by number.
    """
    value = "" if _ranks_on_cpu() else os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if value in ("", "-1"):
        available = num_gpus()
        if 0 < available < num_ranks:
            raise UserError(
                f"--ranks {num_ranks}: this machine has {available} GPUs; lower --ranks, or set DS_ACCELERATOR=cpu"
            )
        return None
    gpus = [name.strip() for name in value.split(",")]
    if not all(name.isdigit() for name in gpus):
        raise UserError(
            f"CUDA_VISIBLE_DEVICES: expected GPU numbers as in 0,1 (all that DeepSpeed's launcher takes), got {value!r}"
        )
    if len(gpus) < num_ranks:
        raise UserError(f"--ranks {num_ranks}: CUDA_VISIBLE_DEVICES leaves {len(gpus)} GPUs ({value}); lower --ranks")
    return gpus[:num_ranks]
