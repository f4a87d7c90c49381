"""Several processes as one: who they are, what they agree on, and weights split over them.

Data-parallel training (DDP) copies the network to every process, FSDP splits it. Checkpoints are
the same files whatever the number of processes: what is split is put together to be saved and
split again when it is read.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from rectiflow.errors import InputError, WorkError
from rectiflow.straighten.config import TrainConfig
from rectiflow.straighten.launched import check_meeting

SMALLEST_UNIT = 1_000_000
"""Blocks of fewer parameters than this are not gathered by themselves."""


def start(config: TrainConfig) -> Accelerator:
    """Join the other processes, if torchrun started this one as one of several.

    What `accelerate launch` says through the environment beyond who the processes are does not
    count: the configuration does.

    Raises:
        InputError: The environment says of the processes what cannot be, FSDP with fp16, or a
            launcher that would put another loop in place of this one.
    """
    check_meeting()
    if config.fsdp and config.mixed_precision == "fp16":
        raise InputError("fsdp does not go with mixed_precision fp16: take bf16, or no fsdp")
    _check_launcher(config)
    # Without an accelerator torchrun's processes count only if the CPU is asked for.
    return Accelerator(
        cpu=not torch.accelerator.is_available(),
        mixed_precision="no",  # the learner's own autocast does it
        dynamo_backend="no",
        gradient_accumulation_steps=1,
    )


def _check_launcher(config: TrainConfig) -> None:
    """Warn where `accelerate launch` was told otherwise than the configuration.

    Raises:
        InputError: It was told to use its own FSDP, DeepSpeed or Megatron-LM.
    """
    for name, remedy in (
        ("FSDP", "launch without --use_fsdp, and give --set fsdp=true"),
        ("DEEPSPEED", "launch without --use_deepspeed"),
        ("MEGATRON_LM", "launch without --use_megatron_lm"),
    ):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() in ("true", "1"):
            raise InputError(f"accelerate launch asks for {name}, which is not used here: {remedy}")
    for name, silent, ours in (
        ("mixed_precision", "no", config.mixed_precision),
        ("gradient_accumulation_steps", "1", str(config.gradient_accumulation_steps)),
        ("dynamo_backend", "no", "inductor" if config.compile else "no"),
    ):
        theirs = os.environ.get(f"ACCELERATE_{name.upper()}", silent).lower()
        if theirs not in (silent, ours):  # silent: what accelerate says if it is told nothing
            setting = "compile" if name == "dynamo_backend" else name
            value = getattr(config, setting)
            warnings.warn(
                f"accelerate launch says {name} {theirs}, and the run's own setting holds: "
                f"{setting} is {value}; change it with --set {setting}=...",
                stacklevel=2,
            )


def prepare(accelerator: Accelerator, network: nn.Module, fsdp: bool, compiled: bool) -> Any:
    """The network for the number of processes there are, its weights those of the first.

    FSDP is PyTorch's `fully_shard` itself: accelerate's plugin does nothing on CPUs.
    """
    if fsdp and accelerator.num_processes > 1:
        for tensor in [*network.parameters(), *network.buffers()]:
            dist.broadcast(tensor.data, 0)
        for block in _blocks(network):
            fully_shard(block)
        fully_shard(network)
        return torch.compile(network) if compiled else network
    return accelerator.prepare_model(torch.compile(network) if compiled else network)


def _blocks(network: nn.Module) -> Iterator[nn.Module]:
    """The outermost large blocks of a network's lists of blocks: one is whole at a time."""
    for module in network.children():
        if isinstance(module, nn.ModuleList):
            sizes = ((block, sum(p.numel() for p in block.parameters())) for block in module)
            yield from (block for block, size in sizes if size >= SMALLEST_UNIT)
        else:
            yield from _blocks(module)


@contextmanager
def adding_up(accelerator: Accelerator, network: Any, last: bool) -> Iterator[None]:
    """Keep the gradients of all micro-batches but the last to this process."""
    if isinstance(network, FSDPModule):
        network.set_requires_gradient_sync(last)
        yield
        return
    with nullcontext() if last else accelerator.no_sync(network):
        yield


class Agreement:
    """What any process wishes, all do.

    Wishes meet in main memory, over gloo, whatever the network is trained on: nothing waits for
    an accelerator, and the reduction, a fraction of a millisecond on one machine, can be made in
    every step.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._group: Any = None
        if accelerator.num_processes > 1:
            ours = accelerator.device.type == "cpu"
            self._group = dist.group.WORLD if ours else dist.new_group(backend="gloo")

    def __call__(self, *wishes: bool) -> list[bool]:
        """The wishes of all; every process calls it alike."""
        if self._group is None:
            return list(wishes)
        asked = torch.tensor(wishes, dtype=torch.uint8)
        dist.all_reduce(asked, dist.ReduceOp.MAX, group=self._group)
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


def whole(state: Any, keep: bool = True) -> Any:
    """Nested state with every split tensor put together, in memory beside the accelerator.

    All processes call it alike; those that do not `keep` the whole get a part that means nothing.
    """
    if isinstance(state, DTensor):
        full = state.full_tensor()
        return full.cpu() if keep else full[:0]
    if isinstance(state, dict):
        return {key: whole(value, keep) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return [whole(value, keep) for value in state]
    return state


def split_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor split as another of its shape is, or laid out in memory as that one is.

    A checkpoint keeps no layouts, and a fused optimiser takes a weight's momenta element by element
    as they lie in memory: those of a weight in `channels_last` must lie likewise.
    """
    if tensor.shape != like.shape:
        return tensor
    if not isinstance(like, DTensor):
        laid_out = torch.empty_like(like, dtype=tensor.dtype, device=tensor.device)
        return laid_out.copy_(tensor)
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


@contextmanager
def assembled(network: nn.Module) -> Iterator[None]:
    """Put the weights of a network that FSDP has split together for any one process to use."""
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
