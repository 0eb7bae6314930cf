"""What each process of a data-parallel test runs; a fresh process imports it by its name."""

from __future__ import annotations

import gc
import warnings
from pathlib import Path

import hosts
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import psvit

MODELS = [
    ("timm", lambda: hosts.timm_vit(qk_norm=True)),
    ("transformers", dict(hosts.HUB)["vit-classifier"]),
    ("torchvision", hosts.torchvision_vit),
]


def train(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = (Path(folder) / "store").as_uri()
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    for name, make in MODELS:
        _train_one(rank, make, Path(folder) / name)
    # What holds on to the process group goes first, in both processes: gloo's threads abort a
    # process that ends while they are still at work.
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


def _train_one(rank: int, make, path: Path) -> None:
    model = seeded(make)
    parallel = DistributedDataParallel(model, find_unused_parameters=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for x in batches():  # a second step fails if a gradient was missing in the first
        optimizer.zero_grad()
        hosts.answer(parallel, x[rank::2]).square().mean().backward()
        optimizer.step()
    if rank == 0:
        torch.save(model.state_dict(), path)


def seeded(make):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return psvit.accelerate(make(), "AS|AS").train()


def batches():
    torch.manual_seed(1)
    return [hosts.images(4, 3, 32, 32) for _ in range(2)]
