"""A linear layer on a CPU with its backward pass, for networks that are differentiated by hand."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Linear:
    """y = x W' + b, and what its backward pass needs. half: products of bfloat16; bias: None where what follows adds it."""

    weight: Tensor
    bias: Tensor | None
    half: bool

    def low(self, x: Tensor) -> Tensor:
        return x.bfloat16() if self.half else x

    def __call__(self, x: Tensor) -> Tensor:
        self.x, self.w = self.low(x), self.low(self.weight)
        return torch.mm(self.x, self.w.t()) if self.bias is None else torch.addmm(self.low(self.bias), self.x, self.w.t())

    def backward(self, grad: Tensor, wanted: bool = True) -> tuple[Tensor | None, Tensor]:
        """Gradients of x (None unless wanted) and of the weight; that of the bias is the sum of grad's rows."""
        grad = self.low(grad)
        return torch.mm(grad, self.w) if wanted else None, torch.mm(grad.t(), self.x).float()
