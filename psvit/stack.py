"""The container of blocks that runs a schedule: it hands maps on and pools tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from psvit_kernels import TokenGroups, match_tokens

from .attention import MapSlot, class_attention
from .block import Block
from .host import adopt
from .layout import GridSource, Layout, size_bias
from .pooling import GridPool
from .schedule import Schedule
from .token_map import IndexMap, Pool

if TYPE_CHECKING:  # methods of slimming run a stack's blocks
    from .slimming.method import Method


class Stack(nn.Module):
    """Blocks in a row, under a schedule; stands where a host keeps its container of blocks.

    A host may call it (``x = blocks(x)``), or loop over it (``for block in blocks: x = block(x)``),
    with gradient checkpointing or without. What a loop gets are steps: each calls its block with
    what the pass has so far, so that tokens go in and tokens come out. All that a pass carries
    (maps, layouts) lives in the steps of that pass; nothing is left on a module.

    A host that checkpoints layer by layer (timm) keeps the map of a group until its backward; it
    must not do so with ``use_reentrant=True``, which would cut the map off from its donor: that is
    an error. Where the stack itself does it (transformers), the map is computed again.

    Indexing by a number gives the block itself, a slice ``[:n]`` a stack of the first n.

    Args:
        host: the container it stands for.
        blocks: by their names in the host.
        schedule: one character for each block.
        prefix: number of prefix tokens.
        grid: tells the grid of the patch tokens.
        pools: one for each pool of the schedule.
        size_bias: whether keys of pooled tokens get the log of the number of tokens they stand
            for.
        merge: pairs of tokens that each block merges; none if empty.
        protect: how much the class token's attention to a patch keeps it from being merged.
        slimming: the method that chooses which tokens go through each block, if there is one; with
            a schedule whose layers all attend.
    """

    #: Called with the map of each layer, if somebody wants them: see ``record_maps``.
    recorder: Callable[[Tensor], object] | None = None

    #: Called with what the tokens are after each layer, if somebody wants it: see
    #: ``record_merges``.
    merge_recorder: Callable[[Layout], object] | None = None

    #: Whether the blocks were made for the schedule, and not converted: nothing to restore then.
    built = False

    def __init__(
        self,
        host: nn.Module,
        blocks: Mapping[str, Block],
        schedule: Schedule,
        *,
        prefix: int,
        grid: GridSource,
        pools: Sequence[Pool],
        size_bias: bool = False,
        merge: Sequence[int] = (),
        protect: float = 0.0,
        slimming: Method | None = None,
    ) -> None:
        super().__init__()
        adopt(self, host, children=False)
        for name, block in blocks.items():
            self.add_module(name, block)
        if pools:
            self.pools = nn.ModuleList(pools)
        self.block_names = tuple(blocks)
        self.schedule = schedule
        self.prefix = prefix
        self.grid = grid
        self.size_bias = size_bias
        self.merge = tuple(merge) or (0,) * schedule.depth
        self.protect = protect
        self.slimming = slimming
        # What a pass asks the schedule, as plain tuples: tracing can't follow cached properties.
        self.stages = tuple(s for s, layers in enumerate(schedule.stages) for _ in layers)
        self.donors = schedule.donors
        self.groups = schedule.groups

    def forward(self, x: Tensor) -> Tensor:
        """`(B, N, C)` to `(B, M, C)`, M tokens being left after the last pool."""
        for step in self.steps():
            x = step(x)
        return x

    def steps(self) -> list[Step]:
        """One callable a block, to be called in order: a pass through the stack."""
        flow = Flow(self)
        return [Step(self, i, flow) for i in range(len(self))]

    def __iter__(self) -> Iterator[Step]:
        return iter(self.steps())

    def __len__(self) -> int:
        return len(self.block_names)

    def block(self, index: int) -> Block:
        found = self._modules[self.block_names[index]]
        assert isinstance(found, Block)
        return found

    def __getitem__(self, index: int | slice) -> Block | Stack:
        if not isinstance(index, slice):
            return self.block(index)
        start, stop, step = index.indices(len(self))
        if (start, step) != (0, 1) or stop < 1:
            raise ValueError(
                f"blocks[{index.start}:{index.stop}:{index.step}]: a stack runs from its first "
                f"block; expected [:n] with n from 1 to {len(self)}"
            )
        return self._first(stop)

    def _first(self, count: int) -> Stack:
        kept = [stage[: max(0, count - stage[0])] for stage in self.schedule.stages]
        text = "|".join("".join(self.schedule.kinds[i] for i in stage) for stage in kept if stage)
        schedule = Schedule(text, self.schedule.carried)
        make = type(self)
        stack = make(
            self._host[0],  # type: ignore[index,arg-type]
            {name: self.block(i) for i, name in enumerate(self.block_names[:count])},
            schedule,
            prefix=self.prefix,
            grid=self.grid,
            pools=[self.pool(i) for i in range(len(schedule.pools))],
            size_bias=self.size_bias,
            merge=self.merge[:count],
            protect=self.protect,
            slimming=self.slimming,
        )
        stack.training = self.training
        stack.recorder, stack.merge_recorder = self.recorder, self.merge_recorder
        return stack

    def pool(self, index: int) -> Pool:
        found = self.pools[index]
        assert isinstance(found, Pool)
        return found

    @property
    def keeps_grid(self) -> bool:
        """Whether every patch has a token after every layer."""
        slims = self.slimming is not None and self.slimming.drops
        return not (self.schedule.pools or any(self.merge) or slims)

    def layouts(self, tokens: int) -> list[Layout]:
        """What the tokens are in each stage, for so many at the input.

        Raises:
            ValueError: their grid isn't known, or a pool's window doesn't fit it.
        """
        layout = Layout(self.prefix, self.grid.of(tokens - self.prefix))
        layouts = [layout.with_sizes() if self.size_bias else layout]
        for i in range(self.stages[-1]):
            layouts.append(self.pool(i).reduced(layouts[-1]))
        return layouts

    def restored(self) -> nn.Module:
        """The host's container with the host's layers, their parameters as they are now."""
        host: Any = self._host[0]  # type: ignore[index]
        for i, name in enumerate(self.block_names):
            host._modules[name] = self.block(i).restored()
        host.training = self.training
        return host if len(host) == len(self) else host[: len(self)]

    def extra_repr(self) -> str:
        parts = f'schedule="{self.schedule}", prefix={self.prefix}, size_bias={self.size_bias}'
        parts += f", merge={self.merge}" if any(self.merge) else ""
        parts += f", protect={self.protect}" if self.protect else ""
        return parts if self.slimming is None else f"{parts}, {self.slimming}"


class Flow:
    """What one pass through a stack carries from step to step."""

    def __init__(self, stack: Stack, record: Callable[[Tensor], object] | None = None) -> None:
        self.stack = stack
        self.layouts: list[Layout] | None = None
        #: What the tokens are that enter a block, for those after the first that merges. By block,
        #: so that a checkpoint which runs one again finds what it found before.
        self.merged: dict[int, Layout] = {}
        #: What a method of slimming knows when it enters a block, kept as ``merged`` is.
        self.known: dict[int, Any] = {}
        #: Outputs that a checkpointed group has made already, each with the input it belongs to.
        self.ready: list[tuple[Tensor, Tensor]] = []
        self.open(stack.recorder if record is None else record)

    def open(self, record: Callable[[Tensor], object] | None) -> None:
        """A slot for each group whose map or keys somebody else wants."""
        merge, slimming = self.stack.merge, self.stack.slimming
        #: By donor; and by layer, for those of a group that come after its tokens became fewer.
        self.slots: dict[int, MapSlot] = {}
        self.followers: dict[int, MapSlot] = {}
        for group in self.stack.groups:
            first, stage = group[0], self.stack.stages[group[0]]
            merging = [
                layer for layer in group if merge[layer] or (slimming and slimming.looks(layer))
            ]
            here = [layer for layer in group if self.stack.stages[layer] == stage]
            last = min(merging[0] if merging else here[-1], here[-1])
            followed = last < group[-1]
            if last > first or merging or followed or record is not None:
                self.slots[first] = MapSlot(record, last - first, bool(merging), followed)

    def run(self, index: int, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """One block, after the pool that stands before it, if one does."""
        stack = self.stack
        stage, donor = stack.stages[index], stack.donors[index]
        if index == 0:
            x = x.contiguous()  # where nothing is in front of the patches they may be a view
        if self.layouts is None and stack.stages[-1]:
            self.layouts = stack.layouts(x.shape[1])
        if index and stage > stack.stages[index - 1]:
            x = self._pool(index, x)
        bias = self._bias(index, x, mask) if donor == index else None
        slot = self.followers.get(index) or self.slots.get(donor)
        if stack.slimming is not None:
            out = stack.slimming.run(self, index, x, slot)
        else:
            merge = partial(self._merge, index, slot) if stack.merge[index] else None
            out = stack.block(index)(x, slot=slot, bias=bias, merge=merge)
        if index in self.merged:
            self.merged.setdefault(index + 1, self.merged[index])
        if stack.merge_recorder is not None:
            stack.merge_recorder(self.merged.get(index + 1) or self._each(index, out))
        last = index + 1 == len(stack) or stack.donors[index + 1] != donor
        if last and slot is not None and not torch.is_grad_enabled():
            # With gradients on, a checkpoint may run the sharing layers again.
            slot.map = slot.keys = slot.query = None
        return out

    def _pool(self, index: int, x: Tensor) -> Tensor:
        """The tokens that enter a block after a pool; the map that it shares follows them."""
        assert self.layouts is not None
        stack, stage = self.stack, self.stack.stages[index]
        layout, pool = self.layouts[stage - 1], stack.pool(stage - 1)
        if stack.donors[index] != index:
            assert isinstance(pool, GridPool)
            groups = pool.groups(layout, x.device)
            self._follow(index - 1, groups, lambda keys: pool.reduce(keys, layout)[0])
        return pool.reduce(x, layout)[0]

    def _follow(self, index: int, groups: TokenGroups, mean: Callable[[Tensor], Tensor]) -> None:
        """What blocks after one (``index``) of a group share, now that tokens became fewer."""
        donor = self.stack.donors[index]
        slot = self.followers.get(index) or self.slots[donor]
        after = slot.followed_by(groups, mean)
        later = range(index + 1, len(self.stack))
        self.followers |= {i: after for i in later if self.stack.donors[i] == donor}

    def _merge(
        self, index: int, slot: MapSlot | None, x: Tensor, branch: Tensor, norm: nn.Module
    ) -> tuple[Tensor, Tensor]:
        """x + branch with pairs of tokens merged, and what the norm makes of it."""
        assert slot is not None and slot.keys is not None
        stack, before = self.stack, self.layout(index, x)
        penalty = self._penalty(index, slot, before, x) if stack.protect else None
        match = match_tokens(slot.keys, stack.merge[index], prefix=stack.prefix, penalty=penalty)
        assert isinstance(before.sizes, Tensor)
        pairs = IndexMap(match, before.sizes)
        tokens, normed, after = pairs.add_and_reduce(x, branch, norm, before)
        self.merged[index + 1] = after
        if index + 1 < len(stack) and stack.donors[index + 1] == stack.donors[index]:
            groups = pairs.groups(after.counted(tokens))
            self._follow(index, groups, lambda keys: pairs.reduce(keys, before)[0])
        if not torch.is_grad_enabled():
            slot.keys = slot.query = None  # a whole projection, which the MLP doesn't need
        return tokens, normed

    def _penalty(self, index: int, slot: MapSlot, layout: Layout, x: Tensor) -> Tensor:
        """What keeps tokens from being merged, `(B, N)`: attention of the class token to patches,
        mean over the heads, in units of its mean over the patches."""
        prefix = self.stack.prefix
        if slot.map is not None:
            row = slot.map.dense()[:, :, 0, prefix:]
        else:
            assert slot.query is not None and slot.keys is not None
            scale, bias = self.stack.block(index).attention_layer.scale, size_bias(layout, x)
            row = class_attention(slot.query, slot.keys, scale, prefix, bias)
        paid = row.mean(1, dtype=torch.promote_types(row.dtype, torch.float32))
        return F.pad(self.stack.protect * paid / paid.mean(1, keepdim=True), (prefix, 0)).detach()

    def layout(self, index: int, x: Tensor) -> Layout:
        """What the tokens are that enter a block, image by image."""
        return self.merged.get(index) or self._each(index, x)

    def _each(self, index: int, x: Tensor) -> Layout:
        """What the tokens of a layer are while none is merged."""
        stack = self.stack
        layout = Layout(stack.prefix, (x.shape[1] - stack.prefix,))
        if self.layouts is not None:
            layout = self.layouts[stack.stages[index]]
        itself = torch.arange(x.shape[1], device=x.device).repeat(len(x), 1)
        return layout.merged(itself, layout.counted(x))

    def _bias(self, index: int, x: Tensor, mask: Tensor | None) -> Tensor | None:
        stage = self.stack.stages[index]
        layout = self.merged.get(index) or (self.layouts and self.layouts[stage])
        sizes = size_bias(layout, x) if layout and self.stack.slimming is None else None
        if mask is not None and (any(self.stack.merge) or self.stack.slimming is not None):
            raise ValueError(
                "attn_mask: got a mask for a model that merges tokens, expected None; a mask "
                "doesn't say what it means for merged tokens"
            )
        if mask is None:
            return sizes
        if stage:
            raise ValueError(
                "attn_mask: got a mask for a model whose schedule pools tokens, expected None; "
                "a mask doesn't say what it means for pooled tokens"
            )
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=x.dtype).masked_fill(~mask, -torch.inf)
        return mask.to(x.dtype) if sizes is None else mask.to(x.dtype) + sizes


class Step:
    """One block of one pass: what a host's loop over its blocks gets.

    It has the attributes of its block (parameters, children), so that loops which freeze or
    inspect layers work on it.
    """

    def __init__(self, stack: Stack, index: int, flow: Flow) -> None:
        self._stack = stack
        self._index = index
        self._flow = flow

    def __call__(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        if is_causal:
            raise ValueError("is_causal: got True, expected False; a shared map can't be causal")
        return self._flow.run(self._index, x, attn_mask)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._stack.block(self._index), name)


def find_stack(model: nn.Module) -> Stack:
    """The stack in a converted model.

    Raises:
        ValueError: the model isn't converted.
    """
    for module in model.modules():
        if isinstance(module, Stack):
            return module
    raise ValueError(
        f"model: got {type(model).__name__} that isn't converted; call psvit.accelerate on it"
    )


@contextmanager
def record_merges(model: nn.Module) -> Iterator[list[Layout]]:
    """What the tokens of a converted model are after each layer, during the ``with`` block.

    Gives a list that each forward pass extends by one ``psvit.Layout`` a layer, in order, with
    ``sizes`` and ``into`` as tensors: for each token that entered the first layer (or the first
    after the last pool) the one that it is a part of. Outside of the block nothing is recorded.

    Raises:
        ValueError: the model isn't converted.
    """
    stack = find_stack(model)
    found: list[Layout] = []
    before = stack.merge_recorder

    def record(merged: Layout) -> None:
        found.append(merged)
        if before is not None:
            before(merged)

    stack.merge_recorder = record
    try:
        yield found
    finally:
        stack.merge_recorder = before


@contextmanager
def record_maps(model: nn.Module) -> Iterator[list[Tensor]]:
    """The attention maps of every layer of a converted model, during the ``with`` block.

    Gives a list that each forward pass extends by one tensor a layer, in order: probabilities
    `(B, H, N, N)` in the dtype of the layer; for a layer that shares, those it shares, before any
    attention dropout. They are part of the graph if gradients are on. Outside of the block nothing
    is recorded and nothing paid.

    Raises:
        ValueError: the model isn't converted.
    """
    stack = find_stack(model)
    maps: list[Tensor] = []
    before = stack.recorder
    stack.recorder = maps.append
    try:
        yield maps
    finally:
        stack.recorder = before
