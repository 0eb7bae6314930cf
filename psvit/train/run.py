"""``Run``: model, optimiser and position of a training run: all that a checkpoint holds."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.nn.parallel import DistributedDataParallel

from ..slimming import begin_epoch
from .config import Config
from .distributed import Group, shard
from .model import Learner

#: Whole tensors on the CPU, whatever the processes shard: a checkpoint fits any number of them.
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


class Run:
    """What changes while a model is trained.

    Args:
        config: of the run.
        model: to train; timm's interface.
        teacher: or None.
        group: the processes.
        steps: of an epoch.

    Attributes:
        epoch, step: the next to come, counted from 0; steps within the epoch.
        losses: sum of the epoch's losses so far.
        history: one dict of numbers an epoch.
    """

    def __init__(
        self, config: Config, model: nn.Module, teacher: nn.Module | None, group: Group, steps: int
    ) -> None:
        from timm.optim import create_optimizer_v2
        from timm.scheduler import create_scheduler_v2
        from timm.utils import ModelEmaV3

        self.config, self.group, self.steps = config, group, steps
        self.epoch = self.step = 0
        self.losses = 0.0
        self.history: list[dict[str, float]] = []
        self.model = model.to(group.device)
        # Before sharding: a sharded model can't be copied.
        self.ema = ModelEmaV3(model, config.ema, use_warmup=True) if config.ema else None
        learner = Learner(self.model, teacher and teacher.to(group.device), config)
        self.learner: nn.Module = self._shared(learner.to(group.device))
        self.optimizer = create_optimizer_v2(
            self.model, opt="adamw", lr=config.peak_lr, weight_decay=config.weight_decay
        )
        aids = learner.aids()
        if aids:
            self.optimizer.add_param_group({"params": aids})
        self.scheduler, _ = create_scheduler_v2(
            self.optimizer,
            sched="cosine",
            num_epochs=config.epochs,
            warmup_epochs=config.warmup_epochs,
            warmup_lr=min(1e-6, config.peak_lr),
            min_lr=min(config.min_lr, config.peak_lr),
            step_on_epochs=False,
            updates_per_epoch=steps,
        )
        self.scheduler.step_update(0)
        half = config.amp == "float16"
        self.scaler = torch.amp.GradScaler(group.device.type, enabled=half)

    def _shared(self, learner: Learner) -> nn.Module:
        """The learner as several processes train it, compiled if that is wanted."""
        parallel: nn.Module = learner
        if self.config.fsdp:
            shard(learner)
            if self.ema is not None:
                shard(self.ema.module)
        elif self.group.world > 1:
            parallel = DistributedDataParallel(learner)
        if self.config.compile:
            parallel.compile()
        return parallel

    @property
    def updates(self) -> int:
        """Steps of the optimiser so far."""
        return self.epoch * self.steps + self.step

    @property
    def lr(self) -> float:
        """The highest learning rate of all parameters now."""
        return max(group["lr"] for group in self.optimizer.param_groups)

    @property
    def best_model(self) -> nn.Module:
        """The averaged weights where there are any, else the trained ones."""
        return self.model if self.ema is None else self.ema.module

    def autocast(self) -> AbstractContextManager[Any]:
        """Of the forward pass."""
        kind = self.config.amp
        if kind == "auto":
            kind = "bfloat16" if self.group.device.type == "cuda" else "none"
        if kind == "none":
            return nullcontext()
        return torch.autocast(self.group.device.type, dtype=getattr(torch, kind))

    def begin_epoch(self) -> None:
        """What methods of slimming do otherwise as the run goes on, they do for this epoch."""
        models = [self.model] if self.ema is None else [self.model, self.ema.module]
        for model in models:
            begin_epoch(model, self.epoch, self.config.epochs)

    def update(self, images: Tensor, targets: Tensor) -> Tensor:
        """One step of the optimiser on this process's share of a batch; returns its mean loss."""
        self.optimizer.zero_grad()
        parts = self.config.accumulate
        total = torch.zeros((), device=images.device)
        pairs = list(zip(images.chunk(parts), targets.chunk(parts), strict=True))
        for i, (some, wanted) in enumerate(pairs):
            with self._synchronised(i == len(pairs) - 1), self.autocast():
                loss = self.learner(some, wanted) * (len(some) / len(images))
            self.scaler.scale(loss).backward()
            total += loss.detach()
        self._step()
        return total

    def _synchronised(self, last: bool) -> AbstractContextManager[Any]:
        """Gradients are summed over the processes with the last part of a batch."""
        if last or not isinstance(self.learner, DistributedDataParallel):
            return nullcontext()
        return self.learner.no_sync()

    def _step(self) -> None:
        if self.config.clip_grad:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.learner.parameters(), self.config.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step += 1
        self.scheduler.step_update(self.updates)
        if self.ema is not None:
            self.ema.update(self.model, step=self.updates)

    def state(self) -> dict[str, Any]:
        """All of it, as a checkpoint holds it; every process must call it."""
        learner, optimizer = get_state_dict(self.learner, self.optimizer, options=WHOLE)
        ema = None if self.ema is None else get_model_state_dict(self.ema.module, options=WHOLE)
        return {
            "config": self.config.to_dict(),
            "epoch": self.epoch,
            "step": self.step,
            "losses": self.losses,
            "history": self.history,
            "learner": learner,
            "optimizer": optimizer,
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema": ema,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """What ``state`` gave, in this run's place; the number of processes may be another."""
        set_state_dict(
            self.learner,
            self.optimizer,
            model_state_dict=state["learner"],
            optim_state_dict=state["optimizer"],
            options=WHOLE,
        )
        if self.ema is not None:
            set_model_state_dict(self.ema.module, state["ema"], options=WHOLE)
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.step = state["epoch"], state["step"]
        self.losses, self.history = state["losses"], state["history"]
