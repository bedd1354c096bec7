"""Data reconstruction: expanded layers give what the original ones give, on data."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import inf, isfinite, prod, sqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nncx._modes import evaluated
from nncx._table import text_table
from nncx.compress._batches import inputs_of
from nncx.compress._factors import Form, Moments, fit
from nncx.compress.low_rank import form_of, kernel_of

_RIDGE = 1e-3  # white noise among the data, as a share of their mean square


@dataclass(frozen=True)
class ReconstructionRow:
    """What data reconstruction did to one layer.

    Attributes:
        name: its path.
        rank: how many components it has, a group or channel.
        before, after: how far its outputs in the compressed network are from those in the original
            one, over all batches: `|y' - y| / |y|`, which counts the errors of earlier layers, too.
    """

    name: str
    rank: int
    before: float
    after: float


@dataclass(frozen=True)
class Reconstruction:
    """What data reconstruction did; `str` is a table.

    Attributes:
        layers: in order of execution.
    """

    layers: tuple[ReconstructionRow, ...]

    def __str__(self) -> str:
        header = ["layer", "rank", "error before", "after"]
        rows = (
            [row.name, str(row.rank), f"{row.before:.2%}", f"{row.after:.2%}"]
            for row in self.layers
        )
        return text_table([header, *rows], texts=1)


def reconstruct(
    model: nn.Module,
    original: nn.Module,
    batches: Iterable[object],
    *,
    inputs: str = "compressed",
    positions: int = 32,
) -> Reconstruction:
    """Fit the expansions of `nncx.LowRank` to what the original layers give on data; in place.

        original = copy.deepcopy(model)
        nncx.convert(model, nncx.LowRank(speedup=3))
        print(nncx.compress.reconstruct(model, original, batches))

    Layer by layer, in order of execution, the sum of `|y - E p|^2` over patches p of the layer's
    input is minimised over expansions E, where y is what the original layer gives in the original
    network. The paper does that by SGD. But an expansion is linear in each of its factors, and all
    that the data have to say is their second moments: alternating least squares on these need no
    learning rate, and read the data once a layer. The bias, if there is one, is fitted too. To a
    thousandth the data count as white noise, on which E shall be the original weight, so that
    directions in which they say nothing are not given away.

    Args:
        model: the original after `convert`; its expanded layers get better weights, in place, so
            that optimizers stay valid. Nothing else changes: both networks run in eval mode.
        original: the network as it was before, not changed.
        batches: inputs, or tuples as of a data loader, whose first item is the input; training data
            without labels. All are kept. There should be several times as many patches as a patch
            of the largest layer has entries.
        inputs: "compressed": p is what the layer gets in the compressed network, so that it makes
            good the errors of the layers before; "original": what it gets in the original one.
        positions: how many patches of an input a layer sees at most, drawn at random, with the same
            draw in every call. A linear layer sees all rows.

    Raises:
        ValueError: if `model` has no expansion of torch's layers in the place of one of `original`,
            if a layer is not called as often in both, if a batch leads to NaN or infinity, or for
            an argument out of range.
        TypeError: if a batch holds no tensor.

    Paper: Jaderberg, Vedaldi and Zisserman, "Speeding up Convolutional Neural Networks with Low
    Rank Expansions", BMVC 2014, section 2.2 (2); Zhang et al., "Accelerating Very Deep
    Convolutional Networks for Classification and Detection", 2015, for inputs of the compressed
    network.
    """
    if inputs not in ("compressed", "original"):
        raise ValueError(f"reconstruct: inputs must be 'compressed' or 'original', got {inputs!r}")
    if positions < 1:
        raise ValueError(f"reconstruct: positions must be at least 1, got {positions}")
    _, read = inputs_of(batches, "reconstruct")
    kept = list(read)
    pairs = _pairs(model, original)
    with evaluated(model), evaluated(original), torch.no_grad():
        before = _errors(model, original, pairs, kept)
        source = model if inputs == "compressed" else original
        for name in before:
            sums = _Sums(pairs[name], positions)
            for x, y in _seen(source, original, pairs[name], kept):
                sums.add(x, y)
            sums.refit()
        after = _errors(model, original, pairs, kept)
    return Reconstruction(
        tuple(
            ReconstructionRow(name, pairs[name].rank, error, after[name])
            for name, error in before.items()
        )
    )


@dataclass(frozen=True)
class _Pair:
    layer: nn.Module
    expansion: nn.Sequential
    form: Form

    @property
    def rank(self) -> int:
        """Of the first factor as many entries as of one of rank 1."""
        one = self.form.shapes(kernel_of(self.layer).shape, 1)[0]
        return self.expansion[0].weight.numel() // prod(one)


def _pairs(model: nn.Module, original: nn.Module) -> dict[str, _Pair]:
    """The layers of `original` that are expanded in `model`, by name."""
    there = dict(model.named_modules())
    pairs = {
        name: _Pair(layer, there[name], form)
        for name, layer in original.named_modules()
        if name in there and (form := form_of(layer, there[name]))
    }
    if not pairs:
        raise ValueError(
            "reconstruct: the model must have expansions in the place of layers of the original,"
            " got none; pass what nncx.convert(model, nncx.LowRank(...)) made, before other methods"
            " convert it, and a copy from before"
        )
    return pairs


_Calls = dict[str, list[tuple[Tensor, Tensor]]]  # inputs and outputs, in order of execution


@contextmanager
def _recorded(modules: Mapping[str, nn.Module]) -> Iterator[_Calls]:
    """What these modules get and give; copies, since operations in place may follow."""
    calls: _Calls = {}

    def record(name: str, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        calls.setdefault(name, []).append((args[0].clone(), output.clone()))

    hooks = [
        module.register_forward_hook(partial(record, name)) for name, module in modules.items()
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def _errors(
    model: nn.Module, original: nn.Module, pairs: Mapping[str, _Pair], batches: Iterable[Tensor]
) -> dict[str, float]:
    """|y' - y| / |y| of the layers that are called, in order of execution."""
    noise: Counter[str] = Counter()
    signal: Counter[str] = Counter()
    for batch in batches:
        with _recorded({name: pair.layer for name, pair in pairs.items()}) as wanted:
            original(batch)
        with _recorded({name: pair.expansion for name, pair in pairs.items()}) as got:
            model(batch)
        for name, calls in wanted.items():
            if len(calls) != len(got.get(name, ())):
                raise ValueError(
                    f"reconstruct: '{name}' must be called as often in both networks, got"
                    f" {len(calls)} and {len(got.get(name, ()))} calls; pass the original of the"
                    " model"
                )
            for (_, y), (_, found) in zip(calls, got[name], strict=True):
                signal[name] += y.double().square().sum().item()
                noise[name] += (found.double() - y.double()).square().sum().item()
    for name, value in noise.items():
        if not isfinite(value):
            raise ValueError(
                f"reconstruct: outputs of '{name}' must be finite, got NaN or infinity; pass other"
                " batches"
            )
    return {name: _relative(value, signal[name]) for name, value in noise.items()}


def _relative(noise: float, signal: float) -> float:
    if not signal:
        return inf if noise else 0.0
    return sqrt(noise / signal)


def _seen(
    source: nn.Module, original: nn.Module, pair: _Pair, batches: Iterable[Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """What the layer gets in `source`, and gives in `original`."""
    for batch in batches:
        with _recorded({"": pair.layer}) as calls:
            original(batch)
        wanted = got = calls[""]
        if source is not original:
            with _recorded({"": pair.expansion}) as calls:
                source(batch)
            got = calls[""]
        for (x, _), (_, y) in zip(got, wanted, strict=True):
            yield x, y


class _Sums:
    """The second moments of what a layer gets and gives."""

    def __init__(self, pair: _Pair, positions: int) -> None:
        self._pair = pair
        self._positions = positions
        self._kernel = kernel_of(pair.layer)
        groups, filters, *patch = self._kernel.shape
        self._inputs = self._kernel.new_zeros(groups, prod(patch), prod(patch))
        self._products = self._kernel.new_zeros(groups, filters, prod(patch))
        self._outputs = 0.0
        self._input_sum = self._kernel.new_zeros(groups, 1, prod(patch))
        self._output_sum = self._kernel.new_zeros(groups, filters, 1)
        self._count = 0
        self._generator = torch.Generator().manual_seed(0)

    def add(self, x: Tensor, y: Tensor) -> None:
        patches, outputs = self._drawn(x, y)
        p = patches.double().reshape(len(patches), len(self._kernel), -1).transpose(0, 1)
        t = outputs.double().reshape(len(outputs), len(self._kernel), -1).permute(1, 2, 0)
        self._inputs += p.mT @ p
        self._products += t @ p
        self._outputs += t.square().sum().item()
        self._input_sum += p.sum(1, keepdim=True)
        self._output_sum += t.sum(2, keepdim=True)
        self._count += len(patches)

    def refit(self) -> None:
        """Give the expansion the weights, and the bias, that suit these moments best."""
        moments = self._moments()
        layers, form = self._pair.expansion, self._pair.form
        shapes = form.shapes(self._kernel.shape, self._pair.rank)
        factors = [
            layer.weight.double().view(shape) for layer, shape in zip(layers, shapes, strict=True)
        ]
        factors = fit(form, factors, moments)
        for layer, factor in zip(layers, factors, strict=True):
            layer.weight.copy_(factor.reshape(layer.weight.shape))
        if layers[-1].bias is not None:
            given = form.product(factors).flatten(2) @ self._input_sum.mT
            layers[-1].bias.copy_((self._output_sum - given).flatten() / self._count)

    def _moments(self) -> Moments:
        """Around the mean where a bias takes care of that; with white noise."""
        inputs, products, outputs = self._inputs, self._products, self._outputs
        if self._pair.layer.bias is not None:
            inputs = inputs - self._input_sum.mT @ self._input_sum / self._count
            products = products - self._output_sum @ self._input_sum / self._count
            outputs -= self._output_sum.square().sum().item() / self._count
        diagonal = inputs.diagonal(dim1=1, dim2=2)
        noise = _RIDGE * diagonal.mean().item() or 1.0  # all inputs may be the same
        white = Moments.of_kernel(self._kernel)
        return Moments(
            inputs + noise * torch.eye(inputs.shape[-1]).to(inputs),
            products.view_as(self._kernel) + noise * white.products,
            outputs + noise * white.outputs,
        )

    def _drawn(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Some patches, each `[C, I, J]`, and the outputs there, `[N]`."""
        layer = self._pair.layer
        if isinstance(layer, nn.Linear):
            return x.flatten(0, -2), y.flatten(0, -2)
        windows = _windows(layer, x.reshape(-1, *x.shape[-3:]))
        y = y.reshape(-1, *y.shape[-3:]).flatten(2)
        images, width, count = len(y), windows.shape[3], y.shape[2]
        at = torch.arange(count).expand(images, -1)
        if count > self._positions:
            at = torch.randint(count, (images, self._positions), generator=self._generator)
        at = at.to(y.device)
        image = torch.arange(images, device=y.device).unsqueeze(1)
        patches = windows[image, :, at // width, at % width]
        return patches.flatten(0, 1), y[image, :, at].flatten(0, 1)


def _windows(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """A view of the patch of each output, `[N, C, H', W', I, J]`."""
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, layer._reversed_padding_repeated_twice, mode)
    for axis in (0, 1):
        dilation = layer.dilation[axis]
        extent = (layer.kernel_size[axis] - 1) * dilation + 1
        x = x.unfold(2 + axis, extent, layer.stride[axis])[..., ::dilation]
    return x
