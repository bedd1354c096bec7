"""Networks for the tests of graphs: what `nncx.graph.trace` must know, in a few lines each."""

import torch
import torch.nn.functional as F
from torch import nn

import nncx


def with_statistics(model: nn.Module) -> nn.Module:
    """BatchNorms as after a training: no mean, variance, weight or bias is what it is at first."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (module.weight, module.bias, module.running_mean):
                if tensor is not None:
                    nn.init.normal_(tensor)
            if module.running_var is not None:
                nn.init.uniform_(module.running_var, 0.5, 2)
    return model


class Padded(nn.Conv2d):
    """A convolution with a forward of its own."""

    def forward(self, x):
        return F.conv2d(F.pad(x, (1, 1, 1, 1)), self.weight, self.bias, self.stride)


class Everything(nn.Module):
    """Every form of a layer and many operations: images [N, 3, 8, 8] -> [N, 6]."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding="same", padding_mode="reflect")
        self.back = nn.Conv2d(4, 3, 1)
        self.alias = self.conv
        self.relu = nn.ReLU(inplace=True)
        self.block = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU6(), nn.Hardtanh(-2, 2))
        self.padded = Padded(4, 4, 3)
        self.keys = nn.Sequential(nncx.XNORConv2d(4, 4, 3))
        self.bn = nn.BatchNorm2d(4)
        self.dropout = nn.Dropout(0.5, inplace=True)
        self.mixing = nn.Parameter(torch.randn(4, 4))
        self.unused = nn.Linear(2, 2)

    def forward(self, x):
        x = self.relu(self.conv(self.back(self.conv(x))))
        x += self.alias(self.back(x)).mean((2, 3), keepdim=True)
        x = self.keys(self.padded(self.block(x)))
        x = F.interpolate(F.pad(x[:, :, ::2], (1, 0, 0, 0), value=-1.0), scale_factor=2)
        x = F.max_pool2d(self.dropout(self.bn(x)), 3, 2, ceil_mode=True)
        n, channels, height, width = x.shape
        x = x.view(n, 2, channels // 2, height, width).transpose(1, 2).reshape(x.shape)
        x = F.linear(F.linear(x.mean((2, 3)), self.mixing), self.mixing)
        first, second = x.chunk(2, 1)
        x = torch.cat([first, second, 1 - first * 2], 1)
        return F.log_softmax(x.view(x.size(0), -1), 1)


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(3, 4), nn.Linear(5, 4)

    def forward(self, a, b):
        a, b = self.left(a), self.right(b)
        return a + b, a


MODELS = {
    "everything": (Everything, (3, 8, 8)),
    "LeNet300100": (nncx.models.LeNet300100, (1, 28, 28)),
    "LeNet4": (nncx.models.LeNet4, (1, 28, 28)),
    "LeNet5": (lambda: nncx.models.LeNet5(norm=True), (1, 28, 28)),
    "MLP": (lambda: nncx.models.MLP(width=20, depth=2, dropout=0.5), (1, 28, 28)),
    "NiN": (nncx.models.NiN, (3, 32, 32)),
    "ResNet": (lambda: nncx.models.ResNet(8, width=4), (3, 16, 16)),
    "VGG9": (lambda: nncx.models.VGG9(width=4, hidden=8), (3, 32, 32)),
}
TORCHVISION = """
    alexnet resnet18 vgg11_bn mobilenet_v2 mobilenet_v3_small shufflenet_v2_x0_5 squeezenet1_1
    densenet121 googlenet regnet_y_400mf efficientnet_b0 mnasnet0_5 inception_v3
""".split()


def torchvision_model(models, name: str) -> tuple[nn.Module, tuple[int, ...]]:
    """A network of torchvision in eval mode, with random weights, and the shape of its images."""
    sizes = {"alexnet": 127, "inception_v3": 128}
    extras = {"googlenet": {"aux_logits": False, "init_weights": False, "transform_input": True}}
    extras["inception_v3"] = {"aux_logits": True, "init_weights": False}
    model = getattr(models, name)(weights=None, num_classes=10, **extras.get(name, {}))
    return with_statistics(model).eval(), (3, *[sizes.get(name, 64)] * 2)
