"""Low-rank expansion: a layer as a few thinner ones, with fewer multiplications."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from nncx.compress._counterpart import GEOMETRY
from nncx.compress._factors import CROSSED, SEPARABLE, Form

_FORMS = {1: SEPARABLE, 2: CROSSED}
_SCHEMES = {len(form.factors): scheme for scheme, form in _FORMS.items()}


@dataclass(frozen=True)
class LowRank:
    """The method of low-rank expansions for `nncx.convert`: `nn.Conv2d` and `nn.Linear`.

    A layer becomes an `nn.Sequential` of torch's own layers, without activations between them, that
    computes about the same. Of a convolution of N filters I x J over C channels,

    - scheme 2 makes K filters I x 1 over all channels, then N filters 1 x J over these: K rows of
      rank one of the matrix `(C*I) x (N*J)` that the weight is. The truncated singular value
      decomposition is the closest there is; its error is the tail of the singular values.
    - scheme 1 makes of each channel K separable filters, I x 1 and then 1 x J, and N sums of all
      these. Alternating least squares, from the principal columns and rows of each channel.

    An `nn.Linear` becomes two, in both schemes, by the singular value decomposition. Groups are
    expanded each for itself, K a group. The last layer has the bias. Multiplications of an output
    position are counted for inputs as large as outputs, of stride (S, S'):

        layer       C*I*J*N / groups
        scheme 2    K*(C*I*S' + N*J)
        scheme 1    K*C*(I*S' + J + N/groups)

    A layer is left alone where there is no K of at least 1 that the setting allows and that takes
    fewer multiplications than the layer.

    The weights are new Parameters, unlike with other methods: make optimizers afterwards. The
    factors are those closest to the weights. `nncx.compress.reconstruct` makes them closest in what
    they give on data; training on does the rest.

    Args:
        scheme: 2 or 1.
        rank: K, of all layers; or a dictionary of K by the layers' names, whose keys alone change.
        energy: keep this share of the squares of the weight, with the least K that does. (Of scheme
            1 it is the share before the least squares, which only raise it.)
        speedup: take so many times fewer multiplications, with the largest K that does. Exactly one
            of these three is given.

    Raises:
        ValueError: for a setting out of range, not exactly one of the three, or by `convert` where
            a dictionary names what is no layer, or a K that is too large.

    Paper: Jaderberg, Vedaldi and Zisserman, "Speeding up Convolutional Neural Networks with Low
    Rank Expansions", BMVC 2014.
    """

    scheme: int = 2
    rank: int | Mapping[str, int] | None = None
    energy: float | None = None
    speedup: float | None = None

    keeps_first_and_last: ClassVar[bool] = False
    binarizes_input: ClassVar[bool] = False
    folds: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.scheme not in _FORMS:
            raise ValueError(f"LowRank: scheme must be 1 or 2, got {self.scheme!r}")
        given = {
            name: getattr(self, name)
            for name in ("rank", "energy", "speedup")
            if getattr(self, name) is not None
        }
        if len(given) != 1:
            raise ValueError(
                "LowRank: exactly one of rank, energy and speedup must be given, got"
                f" {', '.join(given) or 'none'}"
            )
        if self.energy is not None and not 0 < self.energy < 1:
            raise ValueError(f"LowRank: energy must lie between 0 and 1, got {self.energy}")
        if self.speedup is not None and not 1 < self.speedup < math.inf:
            raise ValueError(f"LowRank: speedup must be above 1, got {self.speedup}")
        ranks = self.rank.values() if isinstance(self.rank, Mapping) else [self.rank]
        for rank in ranks if self.rank is not None else ():
            if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
                raise ValueError(f"LowRank: a rank must be an integer of at least 1, got {rank!r}")

    def for_layers(self, names: Mapping[nn.Module, list[str]]) -> "LowRank":
        """The method for a model with these modules: what is named is found.

        Raises:
            ValueError: if `rank` names what is no layer, or gives one too large a rank.
        """
        if not isinstance(self.rank, Mapping):
            return self
        modules = {name: module for module, its in names.items() for name in its}
        for name, rank in self.rank.items():
            module = modules.get(name)
            if type(module) not in GEOMETRY:
                found = "is not there" if module is None else f"is {type(module).__name__}"
                raise ValueError(
                    f"LowRank: rank must name nn.Conv2d and nn.Linear layers, got {name!r}, which"
                    f" {found}; take names from model.named_modules()"
                )
            most = _most(module, self.scheme)
            if rank > most:
                raise ValueError(
                    f"LowRank: the rank of '{name}' must be at most {most}, beyond which nothing is"
                    f" saved, got {rank}; lower it or leave the layer out"
                )
        return replace(self, rank={modules[name]: rank for name, rank in self.rank.items()})

    def replaces(self, module: nn.Module) -> bool:
        """Whether the method has layers for `module`; subclasses may mean something else."""
        return type(module) in GEOMETRY and self._rank(module) is not None

    def replace(self, module: nn.Module) -> nn.Module:
        """Its expansion, with the very bias of `module`."""
        return expand(module, self._rank(module), self.scheme)

    def _rank(self, layer: nn.Module) -> int | None:
        """How many components the layer shall have, None if it shall stay as it is."""
        most = _most(layer, self.scheme)
        if most < 1:
            return None
        if isinstance(self.rank, Mapping):
            rank = self.rank.get(layer, 0)
        elif self.rank is not None:
            rank = self.rank
        elif self.speedup is not None:
            rank = int(layer.weight.numel() / (self.speedup * _cost(layer, self.scheme)))
        else:
            rank = _rank_of_energy(_form(layer, self.scheme), kernel_of(layer), self.energy)
        return rank if 1 <= rank <= most else None


@torch.no_grad()
def expand(layer: nn.Module, rank: int, scheme: int = 2) -> nn.Sequential:
    """The layers that `LowRank` puts in the place of one, of any rank, a saving or not.

    Args:
        layer: an `nn.Conv2d` or `nn.Linear`; not changed.
        rank: K.

    Returns:
        With new weights, the very bias, and the mode of `layer`.

    Raises:
        ValueError: for a rank that is larger than any kernel of this shape has, or weights that are
            not finite.
    """
    kernel, form = kernel_of(layer), _form(layer, scheme)
    full = len(form.energies(kernel))
    if not 1 <= rank <= full:
        raise ValueError(f"LowRank: the rank of {layer} must be from 1 to {full}, got {rank}")
    expansion = skeleton(layer, rank, scheme)
    for factor, values in zip(expansion, form.start(kernel, rank), strict=True):
        weight = values.reshape(factor.weight.shape).to(layer.weight.dtype).contiguous()
        factor.weight = nn.Parameter(weight, requires_grad=layer.weight.requires_grad)
    expansion[-1].bias = layer.bias
    return expansion.train(layer.training)


def skeleton(layer: nn.Module, rank: int, scheme: int) -> nn.Sequential:
    """The layers of an expansion, on the meta device."""
    bias = layer.bias is not None
    if type(layer) is nn.Linear:
        return nn.Sequential(
            nn.Linear(layer.in_features, rank, bias=False, device="meta"),
            nn.Linear(rank, layer.out_features, bias=bias, device="meta"),
        )
    columns, rows = _along(layer, 0), _along(layer, 1)
    inputs, outputs, groups = layer.in_channels, layer.out_channels, layer.groups
    if scheme == 2:
        inner = groups * rank
        return nn.Sequential(
            nn.Conv2d(inputs, inner, groups=groups, bias=False, **columns),
            nn.Conv2d(inner, outputs, groups=groups, bias=bias, **rows),
        )
    inner = inputs * rank
    return nn.Sequential(
        nn.Conv2d(inputs, inner, groups=inputs, bias=False, **columns),
        nn.Conv2d(inner, inner, groups=inner, bias=False, **rows),
        nn.Conv2d(inner, outputs, 1, groups=groups, bias=bias, device="meta"),
    )


def _along(layer: nn.Conv2d, axis: int) -> dict[str, object]:
    """The geometry of a factor that does what `layer` does along one axis, and else nothing.

    Padding along the other axis, of whatever mode, is the same before as behind it.
    """

    def only(values: tuple[int, int], other: int) -> tuple[int, ...]:
        return tuple(value if at == axis else other for at, value in enumerate(values))

    padding = layer.padding
    return {
        "kernel_size": only(layer.kernel_size, 1),
        "stride": only(layer.stride, 1),
        "padding": padding if isinstance(padding, str) else only(padding, 0),
        "dilation": only(layer.dilation, 1),
        "padding_mode": layer.padding_mode,
        "device": "meta",
    }


def expansion_like(layer: nn.Module, count: int, first: nn.Module) -> nn.Sequential | None:
    """The skeleton of `count` factors that `LowRank` puts in the place of `layer`, where the first
    one is as wide as `first`; None if it makes none such."""
    scheme = _SCHEMES.get(count)
    if type(layer) not in GEOMETRY or scheme is None or len(_form(layer, scheme).factors) != count:
        return None
    if type(layer) is nn.Linear:
        width, parts = getattr(first, "out_features", 0), 1
    else:
        width = getattr(first, "out_channels", 0)
        parts = layer.groups if scheme == 2 else layer.in_channels
    return skeleton(layer, width // parts, scheme) if width >= parts else None


def form_of(layer: nn.Module, expansion: nn.Module) -> Form | None:
    """Of what factors `expansion` consists, if `LowRank` puts one like it in the place of `layer`.

    Its layers must be torch's, with real weights.
    """
    if type(expansion) is not nn.Sequential or len(expansion) == 0:
        return None
    like = expansion_like(layer, len(expansion), expansion[0])
    return _form(layer, _SCHEMES[len(like)]) if like and repr(like) == repr(expansion) else None


def kernel_of(layer: nn.Module) -> Tensor:
    """The weight as `[groups, filters, channels, height, width]` in float64.

    Raises:
        ValueError: if it is not finite.
    """
    weight = layer.weight.detach().double()
    if not weight.isfinite().all():
        raise ValueError(f"LowRank: weights must be finite, got NaN or infinity in {layer}")
    if isinstance(layer, nn.Linear):
        return weight[None, :, :, None, None]
    return weight.unflatten(0, (layer.groups, -1))


def _form(layer: nn.Module, scheme: int) -> Form:
    return CROSSED if isinstance(layer, nn.Linear) else _FORMS[scheme]


def _rank_of_energy(form: Form, kernel: Tensor, energy: float) -> int:
    shares = form.energies(kernel).cumsum(0)
    return int((shares < energy * shares[-1]).sum()) + 1


def _most(layer: nn.Module, scheme: int) -> int:
    """The largest rank that saves multiplications."""
    return (layer.weight.numel() - 1) // _cost(layer, scheme)


def _cost(layer: nn.Module, scheme: int) -> int:
    """Multiplications of one component, at one position of the output.

    Columns come first, so they are computed also where a stride along the rows skips them.
    """
    if isinstance(layer, nn.Linear):
        return layer.in_features + layer.out_features
    height, width = layer.kernel_size
    column = height * layer.stride[1]
    if scheme == 2:
        return layer.in_channels * column + layer.out_channels * width
    return layer.in_channels * (column + width + layer.out_channels // layer.groups)
