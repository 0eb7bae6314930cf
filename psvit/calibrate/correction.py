"""What a fit changes in a layer: V and output projection, output projection alone, or MLP.

Each is a linear map of something that the layer computes, so the parameters that bring the tokens
nearest to the original's are those of a least-squares problem. They are written into the layer's
own weights: nothing is added that would cost time when the model runs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..block import Block
from .lockstep import LayerPass
from .ridge import LeastSquares, low_rank

#: Of a fit of V and output projection together, whose sums take memory that grows with their
#: square and time that grows with their cube: for ViT-B (9216), 0.7 GB of sums. Beside a fit of
#: the output projection alone, which stays small, the gain is modest.
MOST_FEATURES = 2560


class Correction(ABC):
    """A part of a layer that is fitted.

    Args:
        block: the layer of the conversion.
        linear: of it, whose output is added to the tokens (but for layer scale, see ``branch``).
        branch: names of the block's modules between that linear and the tokens.

    Raises:
        ValueError: the layer hasn't got this part in a form that can be fitted.
    """

    part: str

    def __init__(self, block: Block, linear: nn.Linear, branch: Iterable[str]) -> None:
        self.block = block
        self.linear = linear
        self.scale = _factors([getattr(block, name) for name in branch], linear)

    @property
    @abstractmethod
    def features(self) -> int:
        """Columns of the problem, the intercept not counted."""

    @property
    def independent(self) -> int:
        """How many features can be linearly independent."""
        return self.features

    @abstractmethod
    def rows(self, seen: LayerPass) -> tuple[Tensor, Tensor, Tensor]:
        """Of a batch the features, `(B, M, features)`, the tokens that the part adds to, and what
        they should be then, `(B, M, C)`."""

    @abstractmethod
    def start(self) -> Tensor:
        """The layer's parameters as they are, as ``LeastSquares`` has them; layer scale in it."""

    @abstractmethod
    def solve(self, problem: LeastSquares, ridge: float) -> Tensor:
        """The fitted parameters."""

    @abstractmethod
    def write(self, parameters: Tensor) -> None:
        """Puts fitted parameters into the layer."""

    def problem(self) -> LeastSquares:
        """An empty one, of this correction's size."""
        return LeastSquares(
            self.features,
            self.linear.out_features,
            intercept=self.linear.bias is not None,
            device=self.linear.weight.device,
        )

    def _write_linear(self, weight: Tensor, bias: Tensor | None) -> None:
        """`(in, out)` and `(out,)`, layer scale in them; channels it shuts off stay as they are."""
        open_ = self.scale.abs() > 1e-6 * self.scale.abs().max()
        inverse = torch.where(open_, 1 / self.scale, 0.0)
        self.linear.weight[open_] = (weight * inverse).T.to(self.linear.weight.dtype)[open_]
        if bias is not None:
            self.linear.bias[open_] = (bias * inverse).to(self.linear.bias.dtype)[open_]


class _LinearFit(Correction):
    """A linear whose input the layer computes anyway."""

    @property
    def features(self) -> int:
        return self.linear.in_features

    @property
    def independent(self) -> int:
        return self.features - 1  # where a norm stands before it, its features lie on a hyperplane

    def start(self) -> Tensor:
        bias = self.linear.bias
        rows = [self.linear.weight.T] if bias is None else [self.linear.weight.T, bias[None]]
        return torch.cat(rows).detach().double() * self.scale

    def solve(self, problem: LeastSquares, ridge: float) -> Tensor:
        return problem.solve(self.start(), ridge)

    def write(self, parameters: Tensor) -> None:
        n = self.features
        self._write_linear(parameters[:n], parameters[n] if len(parameters) > n else None)


class OutputFit(_LinearFit):
    """The output projection, of heads as they are."""

    part = "output projection"

    def __init__(self, block: Block) -> None:
        linear = block.attention_layer.output_projection
        super().__init__(block, linear, block.names.after_attention)

    def rows(self, seen: LayerPass) -> tuple[Tensor, Tensor, Tensor]:
        return seen.heads, seen.tokens, seen.middle_target


class MLPFit(_LinearFit):
    """The last linear of the MLP."""

    part = "last linear of the MLP"

    def __init__(self, block: Block) -> None:
        linear = block.last_linear
        if linear is None or not _ends_with(getattr(block, block.names.mlp), linear):
            raise ValueError("the MLP doesn't end with a linear")
        super().__init__(block, linear, block.names.after_mlp)

    def rows(self, seen: LayerPass) -> tuple[Tensor, Tensor, Tensor]:
        assert seen.hidden is not None
        return seen.hidden, seen.middle, seen.after_target


class ValueFit(Correction):
    """V and output projection, together.

    Head h adds P_h X W_h to the tokens, where W_h = V_h O_h is any `(C, C)` matrix of rank d. In
    a layer that shares, this also finds which head makes what use of which map.
    """

    part = "V and output projection"

    def __init__(self, block: Block) -> None:
        self.attention = block.attention_layer
        linear = self.attention.output_projection
        super().__init__(block, linear, block.names.after_attention)

    @staticmethod
    def fits(block: Block) -> bool:
        """Whether a layer's output is linear in V, with a bias, and the problem isn't too large."""
        attention = block.attention_layer
        linear = attention.finishes_linearly and attention.output_projection.bias is not None
        return linear and attention.num_heads * attention.values[0].shape[1] <= MOST_FEATURES

    @property
    def features(self) -> int:
        return self.attention.num_heads * self.attention.values[0].shape[1]

    @property
    def independent(self) -> int:
        # What layer normalisation gives lies on a hyperplane, and so do averages of it.
        return self.features - self.attention.num_heads

    def rows(self, seen: LayerPass) -> tuple[Tensor, Tensor, Tensor]:
        mixed = seen.map @ seen.normed[:, None]  # (B, H, M, C)
        return mixed.transpose(1, 2).flatten(2), seen.tokens, seen.middle_target

    def start(self) -> Tensor:
        weight, bias = self.attention.values
        output = self.linear.weight.detach().double().T * self.scale  # (H d, C)
        constant = self.linear.bias.detach().double() * self.scale
        if bias is not None:  # the rows of a map sum to 1
            constant = constant + bias.detach().double() @ output
        heads = self.attention.num_heads
        pairs = zip(weight.detach().double().chunk(heads), output.chunk(heads), strict=True)
        return torch.cat([*(v.T @ o for v, o in pairs), constant[None]])

    def solve(self, problem: LeastSquares, ridge: float) -> Tensor:
        heads = self.attention.num_heads
        rank = self.linear.in_features // heads
        return low_rank(problem, self.start(), groups=heads, rank=rank, ridge=ridge)

    def write(self, parameters: Tensor) -> None:
        heads = self.attention.num_heads
        weight, bias = self.attention.values
        rank = self.linear.in_features // heads
        # Balanced factors: neither V nor the output projection outgrows a small dtype.
        pairs = [_factorised(part, rank) for part in parameters[:-1].chunk(heads)]
        weight.copy_(torch.cat([v.T for v, _ in pairs]))
        if bias is not None:
            bias.zero_()
        self._write_linear(torch.cat([o for _, o in pairs]), parameters[-1])


def _factorised(product: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """`(C, rank)` and `(rank, C)` whose product is the given matrix of that rank."""
    u, s, vh = torch.linalg.svd(product, full_matrices=False)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * vh[:rank]


@torch.no_grad()
def _factors(modules: list[nn.Module], linear: nn.Linear) -> Tensor:
    """What modules in a row multiply each channel by, float64 `(C,)`.

    Raises:
        ValueError: they do something else.
    """
    like = linear.weight
    rows = torch.stack([like.new_ones(like.shape[0]), like.new_zeros(like.shape[0])])
    rows = torch.cat([rows, torch.linspace(-2, 2, like.shape[0]).to(like)[None]])[None]
    out = rows
    for module in modules:
        out = module(out)
    if not torch.allclose(out, rows * out[:, :1], rtol=1e-2):
        names = ", ".join(type(module).__name__ for module in modules)
        raise ValueError(f"{names} after it does more than to scale channels")
    return out[0, 0].double()


@torch.no_grad()
def _ends_with(mlp: nn.Module, linear: nn.Linear) -> bool:
    """Whether what an MLP gives is what one of its linears gives."""
    seen: list[Tensor] = []
    hook = linear.register_forward_hook(lambda module, args, out: seen.append(out))
    try:
        width, like = linear.out_features, linear.weight
        out = mlp(torch.linspace(-2, 2, 2 * width).view(1, 2, width).to(like))
    finally:
        hook.remove()
    return len(seen) == 1 and torch.equal(seen[0], out)
