"""``PSViT``: timm's vision transformer with a schedule, and with stages of their own width."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from timm.layers import LayerNorm, get_act_layer, get_norm_layer
from timm.models._features import feature_take_indices
from timm.models.vision_transformer import Block as TimmBlock
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..adapters.timm import NAMES, FusedAttention, patch_grid
from ..block import Block
from ..layout import GridSource, Layout, RecordGrid
from ..numbers import check_number
from ..schedule import Schedule
from ..stack import Stack
from .arguments import (
    Size,
    global_pooling,
    is_inside,
    pair,
    patch_layout,
    stage_layouts,
    stage_widths,
)
from .pool import StageKind, StagePool, check_kind


class Stages(Stack):
    """Layers that were made for their schedule: no host's layers stand behind them."""

    built = True

    def pool(self, index: int) -> StagePool:
        found = self.pools[index]
        assert isinstance(found, StagePool)
        return found


class PSViT(VisionTransformer):
    """A vision transformer that pools tokens between stages and shares attention maps within them.

    With a schedule of all ``A`` it is timm's ``VisionTransformer``, names of parameters included. A
    layer that shares has no Q and K: its ``attn.qkv`` makes V alone.

    Args:
        schedule: one character a layer, ``|`` between stages: see ``psvit.Schedule``.
        widths: channels of each stage, or one number for all; multiples of ``head_dim``.
        dims: 2 (PSViT-2D) keeps the grid, has no class token and averages the tokens at the end;
            1 (PSViT-1D) takes the tokens as a sequence with the class token in it.
        pool: "conv", "depthwise", "max", "avg" or "stride": see ``StagePool``.
        pool_norm: LayerNorm after each pool.
        pool_positions: a position embedding is added again after each pool (HVT).
        prefix: "inside" pools the class token with the sequence (``dims=1`` only), "beside" lets it
            pass, through a linear layer where the width changes. None: inside for ``dims=1``.
        class_token: None: for ``dims=1`` only.
        global_pool: "token", "avg", "avgmax", "max" or "" (every token). None: "token" where there
            is a class token, else "avg".
        keep_unused: sharing layers keep rows for Q and K, unused, so that state dicts fit a model
            in which these layers attend.
        head_dim: channels of a head, in every stage.
        img_size, patch_size, in_chans, num_classes: as timm's. ``forward`` takes other sizes too:
            the position embedding is interpolated.
        mlp_ratio, qkv_bias, qk_norm, init_values, norm_layer, act_layer, fc_norm, drop_rate,
            pos_drop_rate, proj_drop_rate, attn_drop_rate, drop_path_rate, weight_init, device,
            dtype: as timm's.

    Raises:
        ValueError: no schedule, widths or an image size that don't fit it, unknown names.

    Source: PSViT, arXiv 2108.03428, section 3. What the paper leaves open is an argument here.
    """

    blocks: Stages  # type: ignore[assignment]

    def __init__(
        self,
        schedule: str | Schedule,
        widths: int | Sequence[int],
        *,
        dims: Literal[1, 2] = 2,
        pool: StageKind = "conv",
        pool_norm: bool = True,
        pool_positions: bool = False,
        prefix: Literal["inside", "beside"] | None = None,
        class_token: bool | None = None,
        global_pool: str | None = None,
        keep_unused: bool = False,
        head_dim: int = 64,
        img_size: Size = 224,
        patch_size: Size = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        init_values: float | None = None,
        norm_layer: Any = None,
        act_layer: Any = None,
        fc_norm: bool | None = None,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        weight_init: Literal["jax", "jax_nlhb", "moco", ""] = "",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        for name, value in (("head_dim", head_dim), ("in_chans", in_chans), ("img_size", img_size)):
            check_number(name, value, least=1)
        check_number("patch_size", patch_size, least=1)
        check_number("num_classes", num_classes, least=0)
        schedule = Schedule.parse(schedule)
        widths = stage_widths(widths, schedule, head_dim)
        check_kind(pool)  # where there are no pools too
        if dims not in (1, 2):
            raise ValueError(f"dims: got {dims!r}, expected 1 or 2")
        class_token = dims == 1 if class_token is None else class_token
        inside = is_inside(prefix, dims)
        factory = {"device": device, "dtype": dtype}
        patches = patch_layout(img_size, patch_size, int(class_token))
        pools = _pools(pool, widths, patches, dims, inside, pool_norm, pool_positions, factory)
        stage_layouts(img_size, patch_size, int(class_token), pools)
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,  # type: ignore[arg-type]
            in_chans=in_chans,
            num_classes=0,
            global_pool=global_pooling(global_pool, class_token),  # type: ignore[arg-type]
            embed_dim=widths[0],
            depth=0,
            class_token=class_token,
            fc_norm=fc_norm,
            dynamic_img_size=True,
            drop_rate=drop_rate,
            pos_drop_rate=pos_drop_rate,
            norm_layer=norm_layer,
            weight_init="skip",  # type: ignore[arg-type]
            **factory,
        )
        norm = get_norm_layer(norm_layer) or LayerNorm
        layers = _layers(
            schedule,
            widths,
            head_dim,
            drop_path_rate,
            mlp_ratio=mlp_ratio,
            qkv_bias=qkv_bias,
            qk_norm=qk_norm,
            init_values=init_values,
            proj_drop=proj_drop_rate,
            attn_drop=attn_drop_rate,
            norm_layer=norm,
            act_layer=get_act_layer(act_layer) or nn.GELU,
            **factory,
        )
        source = GridSource()
        self.blocks = Stages(
            nn.Sequential(),
            _blocks(layers, schedule, keep_unused),
            schedule,
            prefix=self.num_prefix_tokens,
            grid=source,
            pools=pools,
        )
        self.patch_embed.register_forward_hook(RecordGrid(source, patch_grid))
        self._widen_the_end(widths[-1], num_classes, norm, factory)
        self.feature_info = list(_feature_info(self.schedule, widths, dims, self.patch_embed))
        self.weight_init_mode = weight_init
        self.init_weights(weight_init)

    def _widen_the_end(
        self, width: int, num_classes: int, norm: Any, factory: dict[str, Any]
    ) -> None:
        """Norms and classifier, which timm made for the width of the embedding."""
        self.embed_dim = self.num_features = self.head_hidden_size = width
        for name in ("norm", "fc_norm"):
            if not isinstance(getattr(self, name), nn.Identity):
                setattr(self, name, norm(width, **factory))
        self.num_classes = num_classes
        self.head = nn.Linear(width, num_classes, **factory) if num_classes else nn.Identity()

    @property
    def schedule(self) -> Schedule:
        """What the layers do."""
        return self.blocks.schedule

    def layouts(self, img_size: Size | None = None) -> list[Layout]:
        """What the tokens of each stage are, for an image of a size (None: that of the model).

        Raises:
            ValueError: a size that the patches or the pools can't divide.
        """
        embedding = self.patch_embed
        size = embedding.img_size if img_size is None else img_size
        return stage_layouts(
            size, embedding.patch_size, self.num_prefix_tokens, self._stage_pools()
        )

    # timm's masks are left out: a mask doesn't say what it means for pooled tokens.
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Images `(B, in_chans, height, width)` to class scores `(B, num_classes)`."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Images to the tokens of the last stage, normalised: `(B, M, widths[-1])`.

        With ``global_pool`` "avg" the norm comes after the average, in ``forward_head``, as timm
        has it.

        Raises:
            ValueError: no images, or of a size that the patches or the pools can't divide.
        """
        self._check_images(x)
        return super().forward_features(x)

    def forward_intermediates(  # type: ignore[override]
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        expand: bool = False,
    ) -> Any:
        """Features of several layers, as timm's method of this name gives them.

        Args:
            x: images `(B, in_chans, height, width)`.
            indices: layers from 0, or how many of the last; None: all.
            norm: the model's last norm over each; for layers of the last stage only, as it has
                their width.
            stop_early: run no layer after the last one wanted; the final features are then those
                of that layer, without the norm.
            output_fmt: "NCHW": pictures, `(B, C, h, w)` with the grid of the layer's stage. Tokens
                pooled as a sequence (``dims=1``) have no grid any more: they are expanded. "NLC":
                tokens, without the prefix.
            expand: bring every feature to the grid of the patches, as dense prediction needs it:
                each cell gets the mean of the pooled tokens that it went into.
            return_prefix_tokens, intermediates_only, output_dict: as timm's.

        Raises:
            ValueError: an unknown format, ``norm`` with a layer of another width.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f'output_fmt: got "{output_fmt}", expected "NCHW" or "NLC"')
        self._check_images(x)
        layouts = self.layouts(tuple(x.shape[-2:]))  # type: ignore[arg-type]
        wanted, last = feature_take_indices(len(self.blocks), indices)
        if norm:
            self._check_norm(wanted)
        features, prefixes = [], []
        steps = self.blocks.steps()[: last + 1 if stop_early else None]
        x = self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))
        for i, step in enumerate(steps):
            x = checkpoint(step, x, use_reentrant=False) if self.grad_checkpointing else step(x)
            if i in wanted:
                stage = self.blocks.stages[i]
                tokens = self.norm(x) if norm else x
                prefixes.append(tokens[:, : self.num_prefix_tokens])
                features.append(self._feature(tokens, layouts[: stage + 1], output_fmt, expand))
        if len(steps) == len(self.blocks):
            x = self.norm(x)
        if not (self.num_prefix_tokens and return_prefix_tokens):
            prefixes = []
        return _assembled(x, features, prefixes, intermediates_only, output_dict)

    def _feature(self, x: Tensor, layouts: list[Layout], output_fmt: str, expand: bool) -> Tensor:
        pictures = output_fmt == "NCHW"
        grid = layouts[-1].grid
        if expand or (pictures and len(grid) == 1):
            for i in reversed(range(len(layouts) - 1)):
                x = self.blocks.pool(i).upsample(x, layouts[i])
            grid = layouts[0].grid
        x = x[:, self.num_prefix_tokens :]
        return x.transpose(1, 2).unflatten(2, grid).contiguous() if pictures else x

    def _check_norm(self, wanted: Sequence[int]) -> None:
        first = self.schedule.stages[-1][0]
        widths = [info["num_chs"] for info in self.feature_info]
        wrong = [i for i in wanted if widths[i] != self.num_features]
        if wrong:
            raise ValueError(
                f"norm: got True for layer {wrong[0]} of width {widths[wrong[0]]}, expected layers "
                f"of width {self.num_features} as the norm, {first} to {len(self.blocks) - 1}"
            )

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head for so many classes (0: none), and another pooling if one is named.

        Raises:
            ValueError: an unknown pooling, or "token" without a class token.
        """
        if global_pool is not None:
            global_pool = global_pooling(global_pool, self.has_class_token)
        super().reset_classifier(num_classes, global_pool)

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        """Another image size (or size of patches), the position embedding interpolated.

        Raises:
            ValueError: a size that the patches or the pools can't divide.
        """
        size = img_size or self.patch_embed.img_size
        patch = patch_size or self.patch_embed.patch_size
        stage_layouts(size, patch, self.num_prefix_tokens, self._stage_pools())
        super().set_input_size(pair(size), patch_size)

    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay leaves alone: class token, position embeddings."""
        again = {name for name, _ in self.named_parameters() if name.endswith(".pos_embed")}
        return super().no_weight_decay() | again

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """For timm's layer-wise learning rates: a pool belongs to the layer after it."""
        places = [
            (rf"^blocks\.pools\.{i}\.", (layer,)) for i, layer in enumerate(self.schedule.pools)
        ]
        matcher = super().group_matcher(coarse)
        return {**matcher, "blocks": [*places, *matcher["blocks"]]}

    def _stage_pools(self) -> list[StagePool]:
        return [self.blocks.pool(i) for i in range(len(self.schedule.pools))]

    def _check_images(self, x: Tensor) -> None:
        if x.dim() != 4 or x.shape[1] != self.in_chans:
            raise ValueError(
                f"x: got shape {tuple(x.shape)}, expected (B, {self.in_chans}, height, width)"
            )
        self.layouts(tuple(x.shape[-2:]))  # type: ignore[arg-type]


# --- parts ----------------------------------------------------------------------------------


def _pools(
    kind: StageKind,
    widths: tuple[int, ...],
    layout: Layout,
    dims: Literal[1, 2],
    inside: bool,
    norm: bool,
    positions: bool,
    factory: dict[str, Any],
) -> list[StagePool]:
    pools = []
    for before, after in itertools.pairwise(widths):
        pool = StagePool(
            kind,
            before,
            after,
            dims=dims,
            prefix=layout.prefix,
            inside=inside,
            norm=norm,
            places=layout if positions else None,
            **factory,
        )
        pools.append(pool)
        layout = pool.reduced(layout)
    return pools


def _layers(
    schedule: Schedule, widths: tuple[int, ...], head_dim: int, drop_path: float, **options: Any
) -> list[TimmBlock]:
    """timm's own; drop path grows from 0 to its rate, as everywhere."""
    rates = [drop_path * i / max(1, schedule.depth - 1) for i in range(schedule.depth)]
    return [
        TimmBlock(width, width // head_dim, drop_path=rates[i], **options)
        for width, stage in zip(widths, schedule.stages, strict=True)
        for i in stage
    ]


def _blocks(layers: list[TimmBlock], schedule: Schedule, keep_unused: bool) -> dict[str, Block]:
    blocks = {}
    for i, (layer, donor) in enumerate(zip(layers, schedule.donors, strict=True)):
        attention = FusedAttention(layer.attn, donor != i, i)
        if attention.shares and not keep_unused:
            attention.strip()
        blocks[str(i)] = Block(layer, NAMES, attention, donor)
    return blocks


def _feature_info(
    schedule: Schedule, widths: tuple[int, ...], dims: int, embedding: Any
) -> Iterator[dict[str, Any]]:
    for stage, layers in enumerate(schedule.stages):
        # A pooled sequence is expanded where a picture is asked for.
        reduction = embedding.feat_ratio() * (2**stage if dims == 2 else 1)
        for i in layers:
            yield {"module": f"blocks.{i}", "num_chs": widths[stage], "reduction": reduction}


def _assembled(
    final: Tensor, features: list[Any], prefixes: list[Tensor], only: bool, as_dict: bool
) -> Any:
    """In the form that timm gives them."""
    if as_dict:
        found: dict[str, Any] = {"image_intermediates": features}
        found |= {"image_intermediates_prefix": prefixes} if prefixes else {}
        return found if only else {**found, "image_features": final}
    if prefixes:
        features = list(zip(features, prefixes, strict=True))
    return features if only else (final, features)
