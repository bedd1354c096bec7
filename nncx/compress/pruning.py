"""Magnitude pruning: the smallest weights go, the others are trained on.

method = nncx.Pruning(sparsity=0.9, rounds=3)
nncx.convert(model, method)
for step in method.steps(model):  # masks 54 %, 78 %, 90 % of the weights
    nncx.train.fit(model, batches, epochs=4, optimizer=optimizer)
nncx.freeze(model)
"""

import copy
import math
import numbers
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from nncx._table import text_table
from nncx.compress._convert import convert
from nncx.compress._counterpart import GEOMETRY, PRUNED, WEIGHTED, counterpart
from nncx.compress._scan import Scan, ScanRow
from nncx.nn.pruned import PrunedLayer
from nncx.nn.relative import check_gap_bits

Amount = float | Mapping[str, float]

_LAYERS = {plain: pruned for pruned, plain in PRUNED.items()}


@dataclass(frozen=True)
class PrunedRow:
    """What is left of one layer.

    Attributes:
        name: path of the layer.
        weights: how many it has, pruned ones included.
        survivors: how many of them are left.
    """

    name: str
    weights: int
    survivors: int


@dataclass(frozen=True)
class PruningStep:
    """What is left after a step of `Pruning.steps`; `str` is a table.

    Attributes:
        number: of the step, from 1 on.
        count: how many there are.
        layers: the pruned layers in order of registration; a weight that several share is counted
            for the first.
    """

    number: int
    count: int
    layers: tuple[PrunedRow, ...]

    @property
    def sparsity(self) -> float:
        """The share of the weights of all these layers that is pruned."""
        total = _total(self.layers)
        return 1 - total.survivors / max(total.weights, 1)

    def to_dict(self) -> dict:
        """Plain dicts, lists, strings and numbers, fit for `json.dumps`."""
        return {
            "number": self.number,
            "count": self.count,
            "sparsity": self.sparsity,
            "layers": [vars(row) for row in self.layers],
        }

    def __str__(self) -> str:
        lines = [
            [row.name, f"{row.weights:,}", f"{row.survivors:,}", _percent(row)]
            for row in (*self.layers, _total(self.layers))
        ]
        header = [f"step {self.number}/{self.count}", "weights", "left", "%"]
        return text_table([header, *lines], texts=1, footer=True)


@dataclass(frozen=True)
class Pruning:
    """The method of magnitude pruning for `nncx.convert`: every `nn.Conv2d` and `nn.Linear`.

    `convert` puts layers in that have a mask; `steps` prunes, and between its steps the survivors
    train, in any loop and by any optimizer: no pruned weight comes back. Biases stay.

    Args:
        sparsity: the share of its weights that each layer loses, at least 0 and below 1; or by
            layer, `{name: share}`, where a layer that is not named loses nothing; or a list of
            these, one a step. The weights of least magnitude go, rounded to a whole number of them;
            one stays always.
        deviations: instead of a sparsity: the weights go whose magnitude is below so many standard
            deviations of the layer's surviving weights; a number, by layer, or a list, as above.
        rounds: steps towards the sparsity, if that is no list. Each keeps the same share of what is
            left: `1 - (1 - sparsity)**(i / rounds)` is pruned after step i. `deviations` are
            applied so many times, each time of those weights that survived.
        scope: "layer", or "global": the sparsity is that of all layers together, whichever the
            weights belong to. Then it is one number a step.
        structure: "connection": weights one by one; "neuron": the rows of a linear layer and the
            filters of a convolution as a whole, by the root mean square of their weights, which
            stands for the magnitude above. Shares are of neurons then, and the last layer of the
            network, whose neurons are its outputs, loses none unless it is named.
        regrow: whether a step chooses among pruned weights as well, each with the value that it had
            (and that a weight decay has left of it). By default what is pruned stays so.
        gap_bits: as of `nncx.PrunedConv2d`.

    Raises:
        ValueError: for settings that are not those above.

    Paper: Han et al., "Learning both Weights and Connections for Efficient Neural Networks",
    NeurIPS 2015.
    """

    sparsity: Amount | Sequence[Amount] | None = None
    deviations: Amount | Sequence[Amount] | None = None
    rounds: int = 1
    scope: str = "layer"
    structure: str = "connection"
    regrow: bool = False
    gap_bits: int = 5

    keeps_first_and_last: ClassVar[bool] = False
    binarizes_input: ClassVar[bool] = False
    folds: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_settings(self)

    def replaces(self, module: nn.Module) -> bool:
        """Whether the method has a layer for `module`; subclasses may mean something else."""
        return type(module) in GEOMETRY

    def replace(self, module: nn.Module) -> nn.Module:
        """The layer with a mask, and with the very Parameters of `module`."""
        return counterpart(module, _LAYERS[type(module)], gap_bits=self.gap_bits)

    def steps(self, model: nn.Module, done: int = 0) -> Iterator[PruningStep]:
        """Prune `model` step by step, in place; between them it is to be trained.

        A step is a function of the weights and masks alone. A model whose state was loaded goes on
        as the one did that was saved.

        Args:
            model: of `nncx.convert` with this method.
            done: how many steps were taken before.

        Raises:
            ValueError: at once, if the model has no such layer, or a name of a layer is not one.
                In a step, before it changes anything, if a weight is not finite or a layer would
                lose all its weights.
        """
        weights = _weights(model, "Pruning")
        amounts = self._amounts()
        if not 0 <= done <= len(amounts):
            raise ValueError(f"Pruning: done must be 0 to {len(amounts)} steps, got {done}")
        outputs = _output_layer(model) if self.structure == "neuron" else None
        return self._steps(weights, [_by_weight(a, weights, outputs) for a in amounts], done)

    def _steps(
        self, weights: list["_Weight"], amounts: list[dict["_Weight", float]], done: int
    ) -> Iterator[PruningStep]:
        for number, amount in enumerate(amounts[done:], done + 1):
            self._prune(amount)
            rows = (PrunedRow(w.name, w.layer.mask.numel(), w.layer.survivors) for w in weights)
            yield PruningStep(number, len(amounts), tuple(rows))

    def _amounts(self) -> list[Amount]:
        """One a step."""
        amount = self.deviations if self.sparsity is None else self.sparsity
        if isinstance(amount, (list, tuple)):
            return list(amount)
        if self.sparsity is None:
            return [amount] * self.rounds
        return [_part_of(amount, i / self.rounds) for i in range(1, self.rounds + 1)]

    @torch.no_grad()
    def _prune(self, amounts: dict["_Weight", float]) -> None:
        """Change the masks of these weights, all of them or none."""
        for weight in amounts:
            if not weight.layer.weight.isfinite().all():
                raise ValueError(
                    f"Pruning: weights must be finite, got NaN or infinity in '{weight.name}'; load"
                    " the state before the training that led there"
                )
        scores = {weight: self._scores(weight.layer) for weight in amounts}
        if self.sparsity is None:
            bounds = {w: q * _deviation(w.layer) for w, q in amounts.items()}
            kept = {w: score >= bounds[w] for w, score in scores.items()}
        elif self.scope == "global":
            together = _all_but_the_least(
                torch.cat([*scores.values()]), next(iter(amounts.values()))
            )
            parts = together.split([len(score) for score in scores.values()])
            kept = dict(zip(scores, parts, strict=True))
        else:
            kept = {w: _all_but_the_least(score, amounts[w]) for w, score in scores.items()}
        masks = {weight: self._mask(weight.layer, keep) for weight, keep in kept.items()}
        for weight, mask in masks.items():
            if mask.numel() and not mask.any():
                raise ValueError(
                    f"Pruning: every layer must keep a weight, got none left of '{weight.name}';"
                    " ask for less of it, or skip it in convert"
                )
        for weight, mask in masks.items():
            weight.put(mask)

    def _scores(self, layer: PrunedLayer) -> Tensor:
        """The magnitude of each unit, float64 `[units]`; -1 where all of it is pruned already."""
        weight = layer.weight if self.regrow else layer.masked_weight()
        magnitudes = self._units(weight.double()).square().mean(1).sqrt()  # of one weight: exact
        if self.regrow:
            return magnitudes
        return torch.where(self._units(layer.mask).any(1), magnitudes, -1.0)

    def _mask(self, layer: PrunedLayer, keep: Tensor) -> Tensor:
        """The new mask, of what each unit is to become."""
        mask = keep.view(-1, 1).expand_as(self._units(layer.mask)).reshape(layer.mask.shape)
        return mask if self.regrow else mask & layer.mask

    def _units(self, tensor: Tensor) -> Tensor:
        """`[units, weights of each]`: what is pruned as a whole."""
        return tensor.flatten(1) if self.structure == "neuron" else tensor.reshape(-1, 1)


@dataclass(frozen=True, eq=False)
class _Weight:
    """A weight, and the layers that share it by all their names."""

    layers: dict[str, PrunedLayer]

    @property
    def name(self) -> str:
        return next(iter(self.layers))

    @property
    def layer(self) -> PrunedLayer:
        return self.layers[self.name]

    def put(self, mask: Tensor) -> None:
        for layer in self.layers.values():
            layer.mask.copy_(mask)
            layer.repack()


def _weights(model: nn.Module, task: str) -> list[_Weight]:
    """Those of unfrozen pruned layers, in order of registration."""
    found: dict[nn.Parameter, dict[str, PrunedLayer]] = {}
    for name, layer in model.named_modules(remove_duplicate=False):
        if isinstance(layer, PrunedLayer) and not layer.frozen:
            found.setdefault(layer.weight, {})[name] = layer
    if not found:
        raise ValueError(
            f"{task}: {type(model).__name__} must have pruned layers with float weights, got none;"
            " call nncx.convert(model, nncx.Pruning(...)) first"
        )
    return [_Weight(layers) for layers in found.values()]


def _output_layer(model: nn.Module) -> nn.Module | None:
    """The last layer with weights, in order of registration."""
    return next((m for m in reversed([*model.modules()]) if isinstance(m, WEIGHTED)), None)


def _all_but_the_least(scores: Tensor, share: float) -> Tensor:
    """bool `[n]`: False for the `share` of lowest score, but for one; of equals the first ones."""
    keep = torch.ones_like(scores, dtype=torch.bool)
    count = min(round(share * len(scores)), max(len(scores) - 1, 0))
    keep[scores.argsort(stable=True)[:count]] = False
    return keep


def _deviation(layer: PrunedLayer) -> float:
    """The standard deviation of the survivors."""
    survivors = layer.weight[layer.mask].double()
    return survivors.std(correction=0).item() if len(survivors) else 0.0


def _part_of(sparsity: Amount, way: float) -> Amount:
    """What is pruned on the way to `sparsity`, of which each part keeps the same share."""
    if isinstance(sparsity, Mapping):
        return {name: _part_of(each, way) for name, each in sparsity.items()}
    return 1 - (1 - sparsity) ** way


def _by_weight(
    amount: Amount, weights: list[_Weight], outputs: nn.Module | None
) -> dict[_Weight, float]:
    """What of an amount is each weight's; `outputs` has none unless it is named."""
    if not isinstance(amount, Mapping):
        if all(weight.layer is outputs for weight in weights):
            raise ValueError(
                "Pruning: with structure='neuron' the model must have a layer before the outputs,"
                f" got only '{weights[0].name}'; name it in the sparsity to prune outputs"
            )
        return {weight: amount for weight in weights if weight.layer is not outputs}
    known = [name for weight in weights for name in weight.layers]
    for name in amount:
        if name not in known:
            raise ValueError(
                f"Pruning: an amount must be of a pruned layer, got {name!r}; the model has"
                f" {', '.join(known)}"
            )
    found = {}
    for weight in weights:
        its = {amount[name] for name in weight.layers if name in amount}
        if len(its) > 1:
            raise ValueError(
                f"Pruning: layers that share a weight must lose the same, got {sorted(its)} for"
                f" {', '.join(weight.layers)}; name one of them"
            )
        if its:
            found[weight] = its.pop()
    return found


def _total(rows: Iterable[PrunedRow]) -> PrunedRow:
    rows = tuple(rows)
    return PrunedRow("all", sum(r.weights for r in rows), sum(r.survivors for r in rows))


def _percent(row: PrunedRow) -> str:
    return f"{100 * row.survivors / max(row.weights, 1):.2f}"


def _check_settings(method: Pruning) -> None:
    given = [each for each in (method.sparsity, method.deviations) if each is not None]
    if len(given) != 1:
        raise ValueError(
            f"Pruning: sparsity or deviations must be given, one of them, got {len(given)} of them;"
            " for example sparsity=0.9"
        )
    what = "sparsity" if method.deviations is None else "deviations"
    several = isinstance(given[0], (list, tuple))
    amounts = given[0] if several else [given[0]]
    if not amounts:
        raise ValueError(f"Pruning: {what} must be a number, by layer or a list, got an empty list")
    for amount in amounts:
        for each in amount.values() if isinstance(amount, Mapping) else [amount]:
            _check_amount(what, each)
    if isinstance(method.rounds, bool) or not isinstance(method.rounds, int) or method.rounds < 1:
        raise ValueError(f"Pruning: rounds must be an integer of at least 1, got {method.rounds!r}")
    if several and method.rounds != 1:
        raise ValueError(
            f"Pruning: a list has a step for each of its items, got rounds={method.rounds} as well;"
            " leave rounds out"
        )
    if method.scope not in ("layer", "global"):
        raise ValueError(f"Pruning: scope must be 'layer' or 'global', got {method.scope!r}")
    by_layer = any(isinstance(amount, Mapping) for amount in amounts)
    if method.scope == "global" and (by_layer or what == "deviations"):
        raise ValueError(
            "Pruning: with scope='global' a step must have one sparsity for all layers, got"
            f" {what}={given[0]!r}; leave scope out"
        )
    if method.structure not in ("connection", "neuron"):
        raise ValueError(
            f"Pruning: structure must be 'connection' or 'neuron', got {method.structure!r}"
        )
    check_gap_bits(method.gap_bits)


def _check_amount(what: str, amount: object) -> None:
    number = isinstance(amount, numbers.Real) and not isinstance(amount, bool)
    if what == "sparsity" and not (number and 0 <= amount < 1):
        raise ValueError(
            f"Pruning: a sparsity must be a share of at least 0 and below 1, got {amount!r}; 0.9"
            " prunes nine weights of ten"
        )
    if not (number and 0 <= amount < math.inf):
        raise ValueError(
            f"Pruning: deviations must be at least 0 and finite, got {amount!r}; values from 0.25"
            " to 1 are usual"
        )


# ---------------------------------------------------------------------------------------------
# how much of which layer


def pruning_sensitivity(
    model: nn.Module,
    metric: Callable[[nn.Module], float],
    amounts: Sequence[float] = tuple(i / 10 for i in range(1, 10)),
    *,
    structure: str = "connection",
) -> Scan:
    """What `metric` becomes as each layer alone is pruned, without any training.

    It tells how much to prune of each: `nncx.Pruning(sparsity={name: ...})`.

    Args:
        model: float or pruned so far; not changed, since all is done to a copy.
        metric: a figure of a network, such as its error on validation data.
        amounts: the sparsities.
        structure: as of `nncx.Pruning`.

    Returns:
        A row for each layer of `nncx.Pruning`; with "neuron", but the last.

    Raises:
        ValueError: if the model has no such layer, or a sparsity is not at least 0 and below 1.
    """
    methods = {amount: Pruning(sparsity=amount, structure=structure) for amount in amounts}
    method = Pruning(sparsity=0.0, structure=structure)
    trial = copy.deepcopy(model)
    if any(method.replaces(module) for module in trial.modules()):
        convert(trial, method, rewire=False)
    outputs = _output_layer(trial) if structure == "neuron" else None
    rows = []
    for weight in _weights(trial, "pruning_sensitivity"):
        if weight.layer is outputs:
            continue
        mask, metrics = weight.layer.mask.clone(), []
        for amount, pruning in methods.items():
            pruning._prune({weight: amount})
            metrics.append(float(metric(trial)))
            weight.put(mask)
        kind = type(model.get_submodule(weight.name)).__name__
        rows.append(ScanRow(weight.name, kind, len(method._units(mask)), tuple(metrics)))
    unit = "neurons" if structure == "neuron" else "weights"
    return Scan(unit, tuple(amounts), tuple(rows), float(metric(trial)))
