"""Several processes as one: who they are, what they agree on, and weights split over them.

Data-parallel training (DDP) copies the network to every process, FSDP splits it. Checkpoints are
the same files whatever the number of processes: what is split is put together to be saved and
split again when it is read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from rectiflow.errors import InputError, WorkError


def start(fsdp: bool, mixed_precision: str) -> Accelerator:
    """Join the other processes, if torchrun started this one as one of several.

    Raises:
        InputError: FSDP with fp16.
    """
    plugin = None
    if fsdp and several():
        if mixed_precision == "fp16":
            raise InputError("fsdp does not go with mixed_precision fp16: take bf16, or no fsdp")
        from accelerate import FullyShardedDataParallelPlugin

        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="size_based_wrap",
            min_num_params=1_000_000,
            cpu_ram_efficient_loading=False,
        )
    return Accelerator(fsdp_plugin=plugin)


def several() -> bool:
    """Whether this is one of several processes."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def prepare(
    accelerator: Accelerator, network: nn.Module, optimizers: list[torch.optim.Optimizer]
) -> tuple[Any, list[torch.optim.Optimizer]]:
    """Network and optimisers for the number of processes there are (DDP, or FSDP if chosen)."""
    if not getattr(accelerator, "is_fsdp2", False):
        return accelerator.prepare_model(network), optimizers
    prepared, *wrapped = accelerator.prepare(network, *optimizers)
    return prepared, [wrapper.optimizer for wrapper in wrapped]


def agreed(accelerator: Accelerator, wishes: Sequence[bool]) -> list[bool]:
    """What any process wishes, all do: one reduction, whose order is that of the processes."""
    if accelerator.num_processes == 1:
        return list(wishes)
    asked = torch.tensor([float(wish) for wish in wishes], device=accelerator.device)
    dist.all_reduce(asked, dist.ReduceOp.MAX)
    return [bool(wish) for wish in asked.tolist()]


@contextmanager
def together(accelerator: Accelerator) -> Iterator[None]:
    """Turn the loss of another process into one line.

    Raises:
        WorkError: another process of the run has gone.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        lost = isinstance(error, dist.DistError) or any(
            word in text for word in ("gloo", "Gloo", "NCCL", "Connection closed by peer")
        )
        if accelerator.num_processes == 1 or not lost:
            raise
        raise WorkError(
            f"process {accelerator.process_index} of {accelerator.num_processes} has lost "
            "another one, which died or was stopped; the same command goes on from the last "
            "checkpoint"
        ) from error


def whole(state: Any) -> Any:
    """Nested state with every split tensor put together; all processes call it alike."""
    if isinstance(state, DTensor):
        return state.full_tensor()
    if isinstance(state, dict):
        return {key: whole(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return [whole(value) for value in state]
    return state


def split_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor split as another of its shape is; as it is where that one is whole."""
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


@contextmanager
def assembled(network: nn.Module) -> Iterator[None]:
    """Put the weights of a network that FSDP has split together for any one process to use."""
    from torch.distributed.fsdp import FSDPModule

    parts = [module for module in network.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(True, recurse=False)
