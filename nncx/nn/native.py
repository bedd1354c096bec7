"""What nncx's own layers have in common."""

from typing import ClassVar

from torch import nn


class NativeLayer(nn.Module):
    """Mixin of a layer that runs an op of nncx: whatever traces a model takes it as a whole."""

    op: ClassVar[str]  # the native op in nncx.ops that computes the layer
