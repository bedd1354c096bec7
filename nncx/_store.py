"""save and load: a model in one file, rebuilt from a closed list of layers, without any pickle.

The tensors of the state dict stand beside the architecture, a JSON tree of nodes:

    {"type": "torch.nn.Conv2d", "config": {...}, "frozen": true, "children": {"name": node, ...}}
    {"type": "my.package.Net", "foreign": true, "children": {...}}      a class not on the list
    {"same_as": "path.of.a.node"}                                       a module with two names
    null                                                                a child that is None

`config` holds the constructor's arguments, without those at their default: of a `nncx.graph.Graph`
its nodes, so that a network of any class can be stored as one. The children in the file
are the truth: they override those that the constructor makes, which is how a converted network
comes back. A foreign class can stand inside a network of `nncx.models`, whose constructor makes it;
elsewhere `load` needs `into`.
A parameter with two names is stored once; "tied" in the metadata says who shares it. "coded" names
the tensors that are payloads of `nncx._entropy`.

`nncx._describe` makes the tree, `nncx._rebuild` makes modules of it. A file is untrusted: nothing
in it names code to run, and what does not fit is refused before anything is changed.
"""

import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import nncx.models
from nncx import _entropy, _files
from nncx._describe import describe, join, stored_tensors
from nncx._rebuild import ForeignError, RefusalError, plan, whole_state
from nncx.graph import Graph
from nncx.nn import (
    BinaryConnectConv2d,
    BinaryConnectLinear,
    ChannelShuffle,
    DepthwiseConv2d,
    DepthwiseSeparableConv2d,
    GroupedConv2d,
    HalfConv2d,
    HalfLinear,
    HashedLinear,
    INQConv2d,
    INQLinear,
    Int8Conv2d,
    Int8Linear,
    PackedLayer,
    PrunedConv2d,
    PrunedLinear,
    SharedConv2d,
    SharedLinear,
    TTQConv2d,
    TTQLinear,
    XNORConv2d,
    XNORLinear,
)

# Layers whose constructor's arguments are attributes of the same name (`bias`: is there one?).
_TORCH_TYPES = """
    Module Sequential ModuleList ModuleDict Identity
    Linear Bilinear Conv1d Conv2d Conv3d ConvTranspose1d ConvTranspose2d ConvTranspose3d
    Embedding EmbeddingBag RNN LSTM GRU RNNCell LSTMCell GRUCell
    BatchNorm1d BatchNorm2d BatchNorm3d InstanceNorm1d InstanceNorm2d InstanceNorm3d
    GroupNorm LayerNorm RMSNorm LocalResponseNorm
    CELU ELU GELU GLU Hardshrink Hardsigmoid Hardswish Hardtanh LeakyReLU LogSigmoid LogSoftmax
    Mish PReLU RReLU ReLU ReLU6 SELU SiLU Sigmoid Softmax Softmax2d Softmin Softplus Softshrink
    Softsign Tanh Tanhshrink Threshold
    AdaptiveAvgPool1d AdaptiveAvgPool2d AdaptiveAvgPool3d
    AdaptiveMaxPool1d AdaptiveMaxPool2d AdaptiveMaxPool3d
    AvgPool1d AvgPool2d AvgPool3d LPPool1d LPPool2d LPPool3d
    MaxPool1d MaxPool2d MaxPool3d MaxUnpool1d MaxUnpool2d MaxUnpool3d
    AlphaDropout Dropout Dropout1d Dropout2d Dropout3d FeatureAlphaDropout
    ChannelShuffle Flatten Fold PixelShuffle PixelUnshuffle Unflatten Unfold
    Upsample UpsamplingBilinear2d UpsamplingNearest2d CosineSimilarity
    CircularPad1d CircularPad2d CircularPad3d ConstantPad1d ConstantPad2d ConstantPad3d
    ReflectionPad1d ReflectionPad2d ReflectionPad3d
    ReplicationPad1d ReplicationPad2d ReplicationPad3d ZeroPad1d ZeroPad2d ZeroPad3d
""".split()
_MODELS = """
    FitNet19 LeNet300100 LeNet4 LeNet5 MLP MobileNet NiN ResNet ShuffleNet ShuffleNetV2 VGG9
""".split()

TYPES: dict[str, type[nn.Module]] = {
    **{f"torch.nn.{name}": getattr(nn, name) for name in _TORCH_TYPES},
    **{f"nncx.models.{name}": getattr(nncx.models, name) for name in _MODELS},
    "nncx.BinaryConnectConv2d": BinaryConnectConv2d,
    "nncx.BinaryConnectLinear": BinaryConnectLinear,
    "nncx.ChannelShuffle": ChannelShuffle,
    "nncx.DepthwiseConv2d": DepthwiseConv2d,
    "nncx.DepthwiseSeparableConv2d": DepthwiseSeparableConv2d,
    "nncx.GroupedConv2d": GroupedConv2d,
    "nncx.HalfConv2d": HalfConv2d,
    "nncx.HalfLinear": HalfLinear,
    "nncx.INQConv2d": INQConv2d,
    "nncx.INQLinear": INQLinear,
    "nncx.HashedLinear": HashedLinear,
    "nncx.Int8Conv2d": Int8Conv2d,
    "nncx.Int8Linear": Int8Linear,
    "nncx.SharedConv2d": SharedConv2d,
    "nncx.SharedLinear": SharedLinear,
    "nncx.TTQConv2d": TTQConv2d,
    "nncx.TTQLinear": TTQLinear,
    "nncx.PrunedConv2d": PrunedConv2d,
    "nncx.PrunedLinear": PrunedLinear,
    "nncx.XNORConv2d": XNORConv2d,
    "nncx.XNORLinear": XNORLinear,
    "nncx.graph.Graph": Graph,
}
_NAMES = {cls: name for name, cls in TYPES.items()}

_MAX_REASON = 500  # letters: a file may hold names of any length


def save(model: nn.Module, path: str | os.PathLike[str], *, entropy: bool = False) -> None:
    """Write the tensors and the architecture of `model` to one safetensors file.

    Layers of `nncx.freeze` are stored at their packed size. A model of any class can be saved, but
    `load` rebuilds only graphs, `nncx.models`, nncx layers, and of torch.nn: containers but
    ParameterList and ParameterDict; linear, convolution, embedding, recurrent, batch, instance,
    group, layer and RMS norm, dropout, padding, pooling (but for fractional) and upsampling
    layers; activations but MultiheadAttention (`nncx._store.TYPES` lists all). With any other class
    in it, `save` warns that `load` will want a new model of that class as `into`; the graph of such
    a model (`nncx.graph.trace`) needs none.

    Args:
        model: on any device; not changed.
        path: replaced as a whole or, should anything fail, not at all.
        entropy: code the packed weights of frozen layers near their entropy, where that makes them
            smaller (Huffman, relative indices: docs/files.md). It changes no bit of what `load`
            gives, takes time to save and to load, and needs an nncx that reads format 2.

    Raises:
        ValueError: if a layer holds something that the format has no place for, or was changed
            since its construction, so that its attributes do not describe its tensors.
        TypeError: if `model` is no nn.Module.
        OSError: if the file cannot be written.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"save: model must be an nn.Module, got {type(model).__name__}; pass the model itself"
        )
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    architecture = describe(model, _NAMES)
    tensors, tied = stored_tensors(model)
    _check_rebuildable(architecture, model)
    metadata = {"kind": "model", "architecture": architecture, "tied": tied}
    payloads = _payloads(model, tensors) if entropy else {}
    if not payloads:
        _files.write(path, tensors, metadata)
        return
    metadata["coded"] = list(payloads)
    _files.write(path, tensors | payloads, metadata, _files.COMPACT)


def load(
    path: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    into: nn.Module | None = None,
) -> nn.Module:
    """Read a model of `save`; it computes the same bits.

    Args:
        path: the file.
        device: where the model shall be.
        into: a new model of the class that was saved, needed if nncx cannot rebuild that class.
            Its layers are swapped for those of the file (packed instead of float ones, removed
            activations), and filled; if anything does not fit, it stays as it was.

    Returns:
        The model in eval mode. If it has frozen layers, no parameter requires a gradient.

    Raises:
        ValueError: if the file is damaged, holds no model, or does not fit `into` or itself.
        TypeError: if `into` is no nn.Module, as if its class were passed.
        OSError: if it cannot be opened.
    """
    if into is not None and not isinstance(into, nn.Module):
        raise TypeError(_not_a_model(into))
    tensors, metadata = _files.read(path)
    try:
        payloads = _payloads_of(tensors, metadata)
        shapes = whole_state(tensors | _outlines(payloads), metadata)
        planned = plan(metadata["architecture"], shapes, into, TYPES)
        state = whole_state(tensors | _decoded(payloads), metadata)
        model = planned.fill(state, metadata["tied"], device)
    except RefusalError as reason:
        short = str(reason) if len(str(reason)) <= _MAX_REASON else f"{reason!s:.{_MAX_REASON}}..."
        raise ValueError(f"{os.fspath(path)} cannot be loaded: {short}") from reason
    if any(isinstance(module, PackedLayer) and module.frozen for module in model.modules()):
        model.requires_grad_(False)
    return model if into is None else model.to(device)


def _payloads(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of `tensors` that are shorter as payloads, as such."""
    payloads = {}
    for path, layer in model.named_modules():
        if not isinstance(layer, PackedLayer) or not layer.frozen:
            continue
        for buffer, width in layer.code_widths().items():
            name = join(path, buffer)
            if name in tensors:  # else it is tied to one that is
                payload = _entropy.encode(tensors[name], width)
                if len(payload) < len(tensors[name]):
                    payloads[name] = payload
    return payloads


def _payloads_of(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a file that are payloads.

    Raises:
        RefusalError: if "coded" names others.
    """
    coded = metadata.get("coded", [])
    if not isinstance(coded, list):
        raise RefusalError("it does not say which of its tensors are coded")
    for name in coded:
        tensor = tensors.get(name) if isinstance(name, str) else None
        if tensor is None or tensor.dtype != torch.uint8 or tensor.dim() != 1:
            raise RefusalError(f"its tensor {name!r} cannot be a coded one")
    return {name: tensors[name] for name in coded}


def _outlines(payloads: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the payloads will give, on meta: to be compared with the layers first."""
    return _each(
        payloads,
        lambda payload: torch.empty(
            _entropy.decoded_size(payload), dtype=torch.uint8, device="meta"
        ),
    )


def _decoded(payloads: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return _each(payloads, _entropy.decode)


def _each(payloads: Mapping[str, Tensor], read: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """What `read` gives for each payload; RefusalError if one is not sound."""
    tensors = {}
    for name, payload in payloads.items():
        try:
            tensors[name] = read(payload)
        except ValueError as error:
            raise RefusalError(f"its tensor '{name}' cannot be decoded: {error}") from error
    return tensors


@contextmanager
def saved_temporarily(model: nn.Module) -> Iterator[Path]:
    """The file of `model`, to be looked at: nobody loads it, so any class will do."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the class cannot be rebuilt
            save(model, path)
        yield path


def _check_rebuildable(architecture: dict[str, Any], model: nn.Module) -> None:
    """Find out now, while the model is still there."""
    state = model.state_dict()
    try:
        try:
            plan(architecture, state, None, TYPES)
        except ForeignError as reason:
            plan(architecture, state, model, TYPES)  # load will ask for `into`
            _warn_of_into(reason)
    except RefusalError as reason:
        raise ValueError(f"save: the file could not be loaded again: {reason}") from reason


def _warn_of_into(reason: ForeignError) -> None:
    warnings.warn(f"nncx.save: load will not do without into=, because {reason}", stacklevel=4)


def _not_a_model(into: Any) -> str:
    if isinstance(into, type):
        return (
            f"load: into must be a model, got the class {into.__name__}; pass {into.__name__}(...)"
        )
    return f"load: into must be a model, got {type(into).__name__}; pass an nn.Module"
