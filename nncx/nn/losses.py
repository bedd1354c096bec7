"""Losses of the papers that torch lacks, as criteria for `nncx.train.Supervised`."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SquaredHingeLoss(nn.Module):
    """One class against all others, each by the squared hinge: the loss of BinaryConnect.

    Forward: `mean(max(0, 1 - t * o)^2)` over all outputs o, with t = +1 for the label's, else -1.
    (`nn.MultiMarginLoss(p=2)` is another one: it compares each output with the label's.)
    Paper: Courbariaux et al., "BinaryConnect", NeurIPS 2015, after Tang, 2013.

    Outputs `[N, num_classes]` of any floating dtype, labels int64 `[N]` -> scalar.

    Raises:
        ValueError: for labels of another shape or dtype, or of a class that has no output.
    """

    def forward(self, outputs: Tensor, labels: Tensor) -> Tensor:
        if labels.dtype != torch.int64 or outputs.dim() != 2 or labels.shape != outputs.shape[:1]:
            raise ValueError(
                "SquaredHingeLoss: labels must be int64 [N] for outputs [N, num_classes], got"
                f" {labels.dtype} {list(labels.shape)} for {list(outputs.shape)}; pass class"
                " indices"
            )
        try:
            targets = torch.full_like(outputs, -1).scatter(1, labels[:, None], 1)
        except RuntimeError as error:  # on a GPU it comes later, as an assertion of the device
            raise ValueError(
                f"SquaredHingeLoss: labels must be from 0 to {outputs.shape[1] - 1}, got"
                f" {labels.min()} to {labels.max()}; give the network as many outputs as there are"
                " classes"
            ) from error
        return F.relu(1 - targets * outputs).square().mean()
