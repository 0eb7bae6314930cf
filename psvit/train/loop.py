"""Training: epochs, tests, checkpoints, and the stop when the loss is no number any more."""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict

from .. import checkpoint, console
from ..files import clear_unfinished
from .config import Config
from .data import Loading, order, steps, test_batches, train_batches
from .distributed import Group, join
from .model import image_size, make_model, make_teacher
from .record import Events, write_curves, write_epoch
from .run import WHOLE, Run
from .sources import Source, open_source

Progress = Callable[[str, float], AbstractContextManager[Any]]

#: Steps between two looks at the losses: each look waits for the device.
LOOK = 20


class LossError(RuntimeError):
    """The loss became infinite or no number; the message says where. What was saved stays."""


def train(
    config: Config, *, resume: bool = False, progress: Progress = console.progress
) -> list[dict[str, float]]:
    """Trains a model from ``config``, in one process or in those that ``torchrun`` started.

    ``config.output`` gets ``last.pt``, from which a stopped run goes on; ``model.safetensors``,
    the weights after the last whole epoch (their average where ``config.ema`` is on);
    ``metrics.jsonl``, one line an epoch; ``curves.png``; ``config.yaml``; ``tensorboard/``.

    All that is random is a function of seed, epoch, step and process: on a CPU a resumed run ends
    with the same weights, bit for bit, as one that was never stopped.

    Args:
        config: what to do.
        resume: go on from ``last.pt``.
        progress: shows a bar, as ``psvit.console.progress`` does.

    Returns:
        One dict an epoch, as in ``metrics.jsonl``: ``epoch``, ``loss`` (mean of the training
        steps), ``lr``, ``accuracy`` (0 to 1, of the test images; ``ema_accuracy`` of the averaged
        weights), ``images_per_second``, ``seconds``, and with CUDA ``peak_memory`` in bytes.

    Raises:
        ValueError, TypeError: a config that doesn't fit the data, the model or the checkpoint; an
            image that can't be read.
        LossError: the loss became infinite or no number.
        OSError: a file can't be written; what was there before is whole.
    """
    with prepared(config, resume=resume, progress=progress) as trainer:
        trainer.train()
        return trainer.run.history


@contextmanager
def prepared(
    config: Config, *, resume: bool = False, progress: Progress = console.progress
) -> Iterator[Trainer]:
    """What ``train`` does before the first step: all that can be wrong with a config shows here.

    Nothing is written.
    """
    saved = _saved(config, Path(config.output), resume)
    with join(config) as group:
        trainer = Trainer(config, open_source(config.data), group, progress)
        if saved is not None:
            trainer.run.restore(saved)
        yield trainer


def _saved(config: Config, folder: Path, resume: bool) -> dict[str, Any] | None:
    """The checkpoint to go on from, if that is wanted; nothing is written yet."""
    saved = checkpoint.stopped(folder, "training run", resume=resume)
    differences = Config.of(saved["config"]).differences(config) if saved else []
    if differences:
        raise ValueError(f"resume: {folder} was made with another config: {'; '.join(differences)}")
    return saved


class Trainer:
    """A run with its data, its processes and its files: see ``train``."""

    def __init__(self, config: Config, source: Source, group: Group, progress: Progress) -> None:
        self.config, self.source, self.group, self.progress = config, source, group, progress
        self.folder = Path(config.output)
        self.loading = Loading(
            size=image_size(config, source),
            batch=config.batch,
            workers=min(config.workers, os.cpu_count() or 1),
            seed=config.seed,
            auto_augment=config.auto_augment,
            random_erasing=config.random_erasing,
            skip_corrupt=config.skip_corrupt,
        )
        self.run = Run(
            config,
            make_model(config, source),
            make_teacher(config, source),
            group,
            steps(source, self.loading, group.world),
        )
        self.mix = _mixup(config, source)
        _check_shares(config, group)
        self._batches()  # an unknown policy of augmentation shows now

    def train(self) -> None:
        """The epochs that are left."""
        run, first = self.run, self.group.first
        if first:
            self.folder.mkdir(parents=True, exist_ok=True)
            clear_unfinished(self.folder)
        if run.history:  # a kill may have come between the checkpoint and the files beside it
            self._write_epoch()
        events = Events(self.folder, wanted=first and self.config.tensorboard, updates=run.updates)
        try:
            while run.epoch < self.config.epochs:
                self._epoch(events)
        finally:
            events.close()
        if first:
            write_curves(self.folder, self.config, run.history)

    def _epoch(self, events: Events) -> None:
        run, start, begin = self.run, time.perf_counter(), self.run.step
        run.begin_epoch()
        if self.group.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self._learn(events)
        seconds = time.perf_counter() - start
        row = {
            "epoch": run.epoch + 1,
            "loss": run.losses / run.steps,
            "lr": run.lr,
            **self._accuracies(),
            "images_per_second": round((run.steps - begin) * self.config.batch / seconds, 1),
            "seconds": round(seconds, 2),
        }
        if self.group.device.type == "cuda":
            row["peak_memory"] = torch.cuda.max_memory_allocated()
        run.history.append(row)
        run.epoch, run.step, run.losses = run.epoch + 1, 0, 0.0
        self._save()
        self._write_epoch()
        events.add(run.updates, {k: v for k, v in row.items() if k != "epoch"})
        if self.group.first:
            console.say(_line(row, self.config.epochs))

    # --- one epoch --------------------------------------------------------------------------

    def _learn(self, events: Events) -> None:
        """The steps of the epoch that are left."""
        run = self.run
        run.learner.train()
        recent: list[Tensor] = []
        title = f"epoch {run.epoch + 1}/{self.config.epochs}"
        with self._bar(title, run.steps - run.step) as step:
            for images, labels in self._batches():
                self._seed()
                images = images.to(self.group.device, non_blocking=True)
                labels = labels.to(self.group.device, non_blocking=True)
                images, targets = self.mix(images, labels) if self.mix else (images, labels)
                recent.append(run.update(images, targets))
                every = self.config.save_every
                saves = bool(every) and run.step % every == 0 and run.step < run.steps
                if len(recent) == LOOK or saves or run.step == run.steps:
                    self._look(recent, events)
                    recent.clear()
                if saves:
                    self._save()
                step()

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's share of the batches that are left of the epoch."""
        return train_batches(
            self.source,
            self.loading,
            epoch=self.run.epoch,
            start=self.run.step,
            rank=self.group.rank,
            world=self.group.world,
        )

    def _seed(self) -> None:
        """What mixup, drop path and dropout draw from depends on the position alone."""
        run = self.run
        position = (self.config.seed, run.epoch, run.step, self.group.rank)
        numbers = np.random.SeedSequence(position).generate_state(2)
        np.random.seed(numbers[0])
        torch.manual_seed(int(numbers[1]))

    def _look(self, recent: list[Tensor], events: Events) -> None:
        """Adds the losses of the last steps, mean over processes; stops if one is no number."""
        run = self.run
        values = (self.group.summed(torch.stack(recent)) / self.group.world).tolist()
        for i, value in enumerate(values):
            if not np.isfinite(value):
                raise LossError(self._where(run.step - len(values) + i, value))
            run.losses += value
        events.add(run.updates, {"step/loss": value, "step/lr": run.lr})

    def _where(self, step: int, value: float) -> str:
        indices = order(self.source, self.loading, self.run.epoch)[step].tolist()
        first = ", ".join(self.source.describe(index, "train") for index in indices[:3])
        return (
            f"loss is {value} in epoch {self.run.epoch + 1}, step {step + 1}, a batch of "
            f"{len(indices)} images: {first}, ..."
        )

    @torch.no_grad()
    def _accuracies(self) -> dict[str, float]:
        run = self.run
        run.learner.eval()
        found = {"accuracy": self._accuracy(run.learner)}
        if run.ema is not None:
            found["ema_accuracy"] = self._accuracy(run.ema.module)
        return found

    def _accuracy(self, model: nn.Module) -> float:
        counts = torch.zeros(2, dtype=torch.int64, device=self.group.device)  # right, all
        for images, labels in self._test_batches():
            with self.run.autocast():
                scores = model(images.to(self.group.device))
            labels = labels.to(self.group.device)
            counts += torch.stack([(scores.argmax(1) == labels).sum(), (labels >= 0).sum()])
        right, total = self.group.summed(counts).tolist()
        return right / total

    def _test_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's share, filled up to as many batches as the others have.

        Sharded parameters are gathered in every pass: all processes must make as many. The label
        -1 is that of no class.
        """
        source, loading, group = self.source, self.loading, self.group
        share = max(1, loading.batch // group.world)
        most = math.ceil(math.ceil(len(source.test) / group.world) / share)
        filling = torch.zeros(1, source.channels, *loading.size), torch.tensor([-1])
        batches = test_batches(source, loading, rank=group.rank, world=group.world)
        return itertools.islice(itertools.chain(batches, itertools.repeat(filling)), most)

    # --- files ------------------------------------------------------------------------------

    def _bar(self, title: str, total: float) -> AbstractContextManager[Any]:
        if self.group.first:
            return self.progress(title, total)
        return nullcontext(lambda count=1: None)

    def _save(self) -> None:
        state = self.run.state()
        if self.group.first:
            checkpoint.save(self.folder, "training run", state)
        self.group.wait()

    def _write_epoch(self) -> None:
        weights: Any = get_model_state_dict(self.run.best_model, options=WHOLE)
        if self.group.first:
            write_epoch(self.folder, self.config, self.run.history, weights)


def _check_shares(config: Config, group: Group) -> None:
    """What a process gets of a batch must be parts of one size; mixup makes pairs of it."""
    share, parts = config.batch // group.world, config.accumulate
    if share % parts:
        raise ValueError(
            f"accumulate: got {parts}, expected a number that divides {share}, the images of a "
            f"step in each process"
        )
    if (config.mixup or config.cutmix) and share % 2:
        raise ValueError(
            f"batch: got {config.batch}, {share} images in each process; expected an even number, "
            f"as mixup and cutmix take pairs"
        )


def _mixup(config: Config, source: Source) -> Any:
    """timm's mixup and cutmix, or None."""
    if not (config.mixup or config.cutmix):
        return None
    from timm.data import Mixup

    return Mixup(
        mixup_alpha=config.mixup,
        cutmix_alpha=config.cutmix,
        label_smoothing=config.label_smoothing,
        num_classes=config.num_classes or source.classes,
    )


def _line(row: dict[str, float], epochs: int) -> str:
    """An epoch in one line."""
    accuracy = f"accuracy {100 * row['accuracy']:.1f}%"
    if "ema_accuracy" in row:
        accuracy += f" (averaged weights {100 * row['ema_accuracy']:.1f}%)"
    return (
        f"epoch {row['epoch']}/{epochs}: loss {row['loss']:.4f}, {accuracy}, "
        f"lr {row['lr']:.2e}, {row['images_per_second']:.0f} images/s"
    )
