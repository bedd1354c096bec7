"""Kernels as products of thin factors, fitted to a kernel or to data.

A kernel is a tensor `W[g, n, c, i, j]`: G groups of N filters of C channels of I x J taps; that of
a linear layer has one group and one tap. A `Form` says of which factors a kernel of low rank is
the product, in the notation of einsum: `r` counts the components, and is summed over.

What a product E is fitted to is the quadratic form of `Moments`,

    error(E) = sum_b |y_b - E p_b|^2 = <E S, E> - 2 <E, T> + |y|^2,    S = sum p p',  T = sum y p'

where p are patches of an input and y what shall come out. S = 1 and T = W are |W - E|^2: fitting to
a kernel is fitting to white noise.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_KERNEL = "gncij"
_ROUNDS = 30  # over all factors
_STEPS = 5  # of conjugate gradients, for one factor
_PROGRESS = 1e-3  # of the error: a round that gains less is the last one
_RESIDUAL = 1e-8


@dataclass(frozen=True)
class Form:
    """A product of factors.

    Attributes:
        factors: the indices of each factor.
        apart: the indices under which nothing but the components is mixed.
        energies: of a kernel: what share of its square each component of `start` takes over, the
            largest first, all in all the square. As many as a kernel can need.
        start: of (kernel, rank): factors.
    """

    factors: tuple[str, ...]
    apart: str
    energies: Callable[[Tensor], Tensor]
    start: Callable[[Tensor, int], list[Tensor]]

    def shapes(self, kernel: Sequence[int], rank: int) -> list[list[int]]:
        """Of the factors."""
        sizes = dict(zip(_KERNEL, kernel, strict=True)) | {"r": rank}
        return [[sizes[index] for index in factor] for factor in self.factors]

    def product(self, factors: Sequence[Tensor]) -> Tensor:
        return torch.einsum(f"{','.join(self.factors)}->{_KERNEL}", *factors)


@dataclass(frozen=True)
class Moments:
    """What is to be approximated, as sums over the data.

    Attributes:
        inputs: S, `[G, C*I*J, C*I*J]`; None is the unit matrix.
        products: T, shaped like a kernel.
        outputs: |y|^2.
    """

    inputs: Tensor | None
    products: Tensor
    outputs: float

    @staticmethod
    def of_kernel(kernel: Tensor) -> "Moments":
        return Moments(None, kernel, kernel.square().sum().item())

    def seen(self, kernel: Tensor) -> Tensor:
        """E S."""
        if self.inputs is None:
            return kernel
        return (kernel.flatten(2) @ self.inputs).view_as(kernel)

    def error(self, kernel: Tensor) -> float:
        return (kernel * (self.seen(kernel) - 2 * self.products)).sum().item() + self.outputs


def fit(form: Form, factors: Sequence[Tensor], moments: Moments) -> list[Tensor]:
    """Better factors, by alternating least squares: the error falls in every step.

    A product is linear in each factor, so while the others stand still the best one solves linear
    equations: of the last factor as many as it has entries for one filter, which is done exactly;
    of another as many as it has entries, where some steps of conjugate gradients must do. One
    factor after the other, until a round over all gains nothing.

    Args:
        factors: to begin with, in float64.
    """
    factors = list(factors)
    error = moments.error(form.product(factors))
    for _ in range(_ROUNDS):
        for index in range(len(factors) - 1):
            factors[index] = _improved(form, factors, index, moments)
        factors[-1] = _last(form, factors, moments)
        before, error = error, moments.error(form.product(factors))
        if before - error <= _PROGRESS * before:
            break
    return _balanced(form, factors)


def _last(form: Form, factors: list[Tensor], moments: Moments) -> Tensor:
    """The best last factor, which alone knows the filters."""
    groups, filters, *entries = factors[-1].shape
    units = torch.eye(math.prod(entries)).to(factors[-1]).view(1, -1, *entries)
    features = form.product([*factors[:-1], units.expand(groups, *units.shape[1:])])
    gram = torch.einsum("gucij,gvcij->guv", features, moments.seen(features))
    right = torch.einsum("gncij,gucij->gnu", moments.products, features)
    return (right @ torch.linalg.pinv(gram, hermitian=True)).view(groups, filters, *entries)


def _improved(form: Form, factors: list[Tensor], index: int, moments: Moments) -> Tensor:
    """A better factor in the place of `index`.

    The normal equations of the unit matrix mix only components, by `mixing`. Its inverse therefore
    solves those at once, and makes the others as well conditioned as the data are.
    """
    own = form.factors[index]
    names = [name for name in form.factors if name != own]
    others = [factor for at, factor in enumerate(factors) if at != index]
    adjoint = f"{','.join((_KERNEL, *names))}->{own}"
    twins = [name.replace("r", "s") for name in names]
    mixing = torch.einsum(f"{','.join((*names, *twins))}->{form.apart}rs", *others, *others)
    inverse = torch.linalg.pinv(mixing, hermitian=True)
    unmix = f"{form.apart}rs,{own.replace('r', 's')}->{own}"

    def product(factor: Tensor) -> Tensor:
        return form.product([*factors[:index], factor, *factors[index + 1 :]])

    def normal(factor: Tensor) -> Tensor:
        return torch.einsum(adjoint, moments.seen(product(factor)), *others)

    return _conjugate_gradients(
        normal,
        torch.einsum(adjoint, moments.products, *others),
        factors[index],
        lambda residual: torch.einsum(unmix, inverse, residual),
    )


def _conjugate_gradients(
    matrix: Callable[[Tensor], Tensor],
    right: Tensor,
    x: Tensor,
    inverse: Callable[[Tensor], Tensor],
) -> Tensor:
    """Solves `matrix(x) = right` from x on; `inverse` is roughly that of the matrix."""
    residual = right - matrix(x)
    direction = step = inverse(residual)
    first = size = (residual * step).sum()
    for _ in range(_STEPS):
        if size <= _RESIDUAL * first or size <= 0:
            break
        image = matrix(direction)
        curvature = (direction * image).sum()
        if curvature <= 0:  # rounding: the data say nothing on it
            break
        x = x + size / curvature * direction
        residual = residual - size / curvature * image
        step = inverse(residual)
        before, size = size, (residual * step).sum()
        direction = step + size / before * direction
    return x


def _balanced(form: Form, factors: list[Tensor]) -> list[Tensor]:
    """Each component as large in every factor, so that one learning rate suits all."""
    norms = [
        torch.einsum(f"{name},{name}->{form.apart}r", factor, factor).sqrt()
        for name, factor in zip(form.factors, factors, strict=True)
    ]
    mean = math.prod(norms) ** (1 / len(norms))
    return [
        torch.einsum(f"{name},{form.apart}r->{name}", factor, (mean / norm).nan_to_num(posinf=0))
        for name, factor, norm in zip(form.factors, factors, norms, strict=True)
    ]


def _as_matrix(kernel: Tensor) -> Tensor:
    """`[G, C*I, N*J]`, whose rank is the number of components."""
    return kernel.permute(0, 2, 3, 1, 4).flatten(3).flatten(1, 2)


def _squared_singular_values(kernel: Tensor) -> Tensor:
    return torch.linalg.svdvals(_as_matrix(kernel)).square().sum(0)


def _truncated_svd(kernel: Tensor, rank: int) -> list[Tensor]:
    """The best factors: no others come closer to the kernel."""
    groups, filters, channels, height, width = kernel.shape
    u, s, vh = torch.linalg.svd(_as_matrix(kernel), full_matrices=False)
    root = s[:, :rank].sqrt()
    first = (u[:, :, :rank] * root.unsqueeze(1)).mT
    second = root.unsqueeze(2) * vh[:, :rank]
    return [
        first.reshape(groups, rank, channels, height),
        second.view(groups, rank, filters, width).transpose(1, 2),
    ]


def _principal_filters(kernel: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Orthonormal columns `[g, c, i, a]` and rows `[g, c, j, b]` for each input channel, and the
    kernel in these, `[g, n, c, a, b]`."""
    columns = torch.linalg.eigh(torch.einsum("gncij,gnckj->gcik", kernel, kernel)).eigenvectors
    rows = torch.linalg.eigh(torch.einsum("gncij,gncik->gcjk", kernel, kernel)).eigenvectors
    return columns, rows, torch.einsum("gncij,gcia,gcjb->gncab", kernel, columns, rows)


def _squares_by_filter(core: Tensor) -> Tensor:
    """`[g, c, a * b]`."""
    return core.square().sum(1).flatten(2)


def _sorted_squares(kernel: Tensor) -> Tensor:
    *_, core = _principal_filters(kernel)
    return _squares_by_filter(core).sort(descending=True).values.sum((0, 1))


def _alternated_from_principal_filters(kernel: Tensor, rank: int) -> list[Tensor]:
    """The separable filters of most energy, then alternating least squares.

    The former alone are exact with as many components as there are taps.
    """
    columns, rows, core = _principal_filters(kernel)
    best = _squares_by_filter(core).topk(rank).indices  # [g, c, r]
    width = rows.shape[-1]

    def chosen(basis: Tensor, which: Tensor) -> Tensor:
        return basis.mT.gather(2, which.unsqueeze(3).expand(*which.shape, basis.shape[2]))

    of_filter = best.unsqueeze(1).expand(-1, len(kernel[0]), -1, -1)
    factors = [
        chosen(columns, best // width),
        chosen(rows, best % width),
        core.flatten(3).gather(3, of_filter),
    ]
    return fit(SEPARABLE, factors, Moments.of_kernel(kernel))


CROSSED = Form(("grci", "gnrj"), "g", _squared_singular_values, _truncated_svd)
"""Columns that see all channels, then rows: a layer of `r` filters I x 1, then one of 1 x J."""

SEPARABLE = Form(
    ("gcri", "gcrj", "gncr"), "gc", _sorted_squares, _alternated_from_principal_filters
)
"""`r` separable filters for each input channel, and how the outputs combine them."""
