"""Several processes as ``torchrun`` starts them: who they are, and how they share a model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..block import Block
from .config import Config


@dataclass(frozen=True)
class Group:
    """The processes that train together, as one of them sees it.

    Args:
        rank, world: its number, and how many there are.
        device: of this process.
    """

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process writes files and messages."""
        return self.rank == 0

    def summed(self, values: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def wait(self) -> None:
        """Until all processes are here."""
        if self.world > 1:
            dist.barrier()


@contextmanager
def join(config: Config) -> Iterator[Group]:
    """Joins the processes that ``torchrun`` started; alone where it didn't.

    Raises:
        ValueError: a device that isn't there, ``fsdp`` in a single process.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError('device: got "cuda", but PyTorch sees no CUDA device here')
    cuda = config.device != "cpu" and torch.cuda.is_available()
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if config.fsdp and world == 1:
        raise ValueError("fsdp: got true in one process, expected several, started by torchrun")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if world == 1:
        yield Group(0, 1, device)
        return
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield Group(dist.get_rank(), world, device)
    finally:
        dist.destroy_process_group()


def shard(model: nn.Module) -> None:
    """FSDP2: parameters of each layer, then of the rest, spread over all processes."""
    from timm.models.vision_transformer import Block as TimmBlock
    from torch.distributed.fsdp import fully_shard

    for module in list(model.modules()):
        if isinstance(module, (Block, TimmBlock)):
            fully_shard(module)
    fully_shard(model)
