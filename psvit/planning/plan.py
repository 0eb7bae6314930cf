"""``Plan``: a conversion of a trained model with its corrections, as a value that can be saved."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from ..accelerate import convert_quietly
from ..console import table, text_of
from ..files import whole_folder
from ..merging import merge_counts
from ..pooling import CARRYING, Kind
from ..schedule import Schedule

Model = TypeVar("Model", bound=nn.Module)

#: Of the JSON file; another form is refused.
FORM = 3


@dataclass(frozen=True)
class Plan:
    """What to do with a trained model: a schedule, how it pools and merges, corrected weights.

    Args:
        schedule: of the converted model.
        pool, dims, size_bias: as for ``psvit.accelerate``.
        merge: pairs of tokens that each layer merges.
        protect: as for ``psvit.accelerate``.
        corrections: parameters that differ from the original's, by name.
        shapes: of every parameter and buffer of the original, by name: what it fits.
        found: numbers and remarks about it, plain values; for people and programs.
    """

    schedule: Schedule
    pool: Kind
    dims: Literal[1, 2]
    size_bias: bool
    merge: tuple[int, ...]
    protect: float
    corrections: Mapping[str, Tensor]
    shapes: Mapping[str, tuple[int, ...]]
    found: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        original: nn.Module,
        converted: nn.Module,
        *,
        schedule: Schedule,
        pool: Kind,
        dims: Literal[1, 2],
        size_bias: bool,
        merge: int | Sequence[int] = 0,
        protect: float = 0.0,
        found: Mapping[str, Any] | None = None,
    ) -> Plan:
        """From a model and its conversion, whose weights may have been corrected or tuned."""
        before, after = original.state_dict(), converted.state_dict()
        changed = {
            name: value.detach().cpu().clone()
            for name, value in after.items()
            if name not in before or not torch.equal(value.cpu(), before[name].cpu())
        }
        shapes = {name: tuple(value.shape) for name, value in before.items()}
        counts = merge_counts(merge, schedule)
        how = (schedule, pool, dims, size_bias, counts, protect)
        return cls(*how, changed, shapes, dict(found or {}))

    def with_weights(
        self, original: nn.Module, converted: nn.Module, found: Mapping[str, Any]
    ) -> Plan:
        """The same conversion with other weights, those of ``converted``."""
        return Plan.of(
            original,
            converted,
            schedule=self.schedule,
            pool=self.pool,
            dims=self.dims,
            size_bias=self.size_bias,
            merge=self.merge,
            protect=self.protect,
            found=found,
        )

    def apply(self, model: Model) -> Model:
        """A converted copy of a model, with the corrections in place.

        Args:
            model: the one that the plan was made for, or one with the same parameters.

        Raises:
            ValueError: a model with other parameters; the message names what differs.
        """
        self._check(model)
        converted = convert_quietly(
            model,
            self.schedule,
            pool=self.pool,
            dims=self.dims,
            size_bias=self.size_bias,
            merge=self.merge,
            protect=self.protect,
        )
        state = converted.state_dict()
        converted.load_state_dict({**state, **self.corrections})
        return converted

    def _check(self, model: nn.Module) -> None:
        own = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        wrong = [
            *(f"it lacks {name}" for name in self.shapes if name not in own),
            *(f"it has {name}" for name in own if name not in self.shapes),
            *(
                f"{name} is {own[name]}, not {shape}"
                for name, shape in self.shapes.items()
                if own.get(name, shape) != shape
            ),
        ]
        if wrong:
            more = "" if len(wrong) < 4 else f" and {len(wrong) - 3} more"
            raise ValueError(
                f"model: the plan was made for another one: {'; '.join(wrong[:3])}{more}"
            )

    def table(self) -> Any:
        """For ``psvit.console.print_tables``: the schedules that were tried, this one marked.

        Cost is a part of the original's; the error is the squared one of the class scores, relative
        to theirs; it, KL(original || converted) in nats and top-1 agreement are means over images
        that nothing was fitted to.
        """
        rows = [
            (
                one["schedule"],
                str(sum(one["merge"]) or ""),
                f"{one['cost']:.3f}",
                f"{one['predicted_error']:.3f}",
                f"{one['error']:.3f}",
                f"{one['kl']:.3f}",
                f"{one['agreement']:.1%}",
                "chosen" if self._is(one) else "",
            )
            for one in self.found.get("tried", ())
        ]
        header = (
            *("schedule", "merged", "cost", "error, predicted", "measured", "KL", "agreement"),
            "",
        )
        made = table(f"{self.schedule}, {self.pool} pool", header, rows)
        made.caption = "\n".join((self._remarks(), *self._left_alone()))
        return made

    def _is(self, tried: Mapping[str, Any]) -> bool:
        return (tried["schedule"], tuple(tried["merge"])) == (self.schedule.text, self.merge)

    def _remarks(self) -> str:
        remarks = [f"{len(self.corrections)} corrected tensors"]
        if any(self.merge):
            remarks.append(f"layers merge {', '.join(map(str, self.merge))} pairs of tokens")
        if "budget" in self.found:
            remarks.insert(0, f"for {self.found['budget']}")
            if self.schedule.pools and not self.schedule.shared:
                remarks.append("no layer shares: pooling alone did best")
        measured = self.found.get("measured")
        if measured:
            score = f"error {measured['error']:.3f}, agreement {measured['agreement']:.1%}"
            remarks.append(f"{score} on images held out of all but the last fit")
        if "distillation" in self.found:
            distilled = self.found["distillation"]
            remarks.append(
                f"distilled, {distilled['steps']} steps"
                if distilled["gained"]
                else "distillation was no gain"
            )
        return "; ".join(remarks)

    def _left_alone(self) -> list[str]:
        left = self.found.get("left_alone", ())
        return [f"layer {layer + 1} left alone: {why}" for layer, why in left]

    def __str__(self) -> str:
        return text_of(self.table())

    def save(self, path: str | Path) -> None:
        """Writes ``path`` (JSON, for people and programs) and, beside it, ``.safetensors``.

        Raises:
            OSError: they can't be written; older ones stay.
            ValueError: a path that doesn't end with .json.
        """
        path = _json(path)
        from safetensors.torch import save_file

        weights = {name: value.contiguous() for name, value in self.corrections.items()}
        fields = {
            "form": FORM,
            "schedule": self.schedule.text,
            "pool": self.pool,
            "dims": self.dims,
            "size_bias": self.size_bias,
            "merge": self.merge,
            "protect": self.protect,
            "found": self.found,
            "shapes": self.shapes,
        }
        with whole_folder(path.parent) as work:  # neither without the other
            save_file(weights, work / path.with_suffix(".safetensors").name)
            text = json.dumps(fields, indent=1) + "\n"
            (work / path.name).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """What ``save`` wrote.

        Raises:
            ValueError: no such files, damaged ones, or others; the message names them.
        """
        path = _json(path)
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror}") from error
        except ValueError as error:
            raise ValueError(f"{path}: not a plan: {error}") from error
        if not isinstance(fields, dict) or fields.pop("form", None) != FORM:
            raise ValueError(f"{path}: not a plan of psvit, or one of another version")
        corrections = _tensors(path.with_suffix(".safetensors"))
        try:
            shapes = {name: tuple(shape) for name, shape in fields.pop("shapes").items()}
            schedule = Schedule(fields.pop("schedule"), carried=fields["pool"] in CARRYING)
            counts = merge_counts(fields.pop("merge"), schedule)
            return cls(
                schedule=schedule, merge=counts, corrections=corrections, shapes=shapes, **fields
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: not a whole plan of psvit: {error!r}") from error


def _json(path: str | Path) -> Path:
    path = Path(path)
    if path.suffix != ".json":
        raise ValueError(f"path: got {path}, expected a name that ends with .json")
    return path


def _tensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: not the weights of a plan: {error}") from error
