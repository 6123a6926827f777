"""The variational autoencoder on a CPU, forward and backward by hand.

The same mathematics as `vae.CellVae` with LayerNorm and SiLU, which is the definition: products by torch, all between two products in one
loop each (`kernels`), from the rows of the data to the likelihood, and no graph in between. Under autocast products are of bfloat16, and so
is what goes into and comes out of them; what is in between is in single precision.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dbdiffusion.generative import kernels
from dbdiffusion.generative.by_hand import Both, Linear, Step, Value, empty
from dbdiffusion.generative.kernels import array


class _Intercepts:
    """One for each column, and of each batch where the layer knows it."""

    def __init__(self, bias: Value, of_batch: Value | None, n: int) -> None:
        self.bias, self.of_batch = bias, of_batch
        self.table = Both(bias.tensor[None]) if of_batch is None else empty(*of_batch.tensor.shape)
        self.by_table = Both(bias.grad.tensor[None]) if of_batch is None else of_batch.grad
        self.none = np.zeros(n, dtype=np.int64)

    def rows(self, batch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The table and where each row takes its intercepts."""
        if self.of_batch is None:
            return self.table.array, self.none
        torch.add(self.of_batch.tensor, self.bias.tensor, out=self.table.tensor)
        return self.table.array, batch

    def backward(self) -> None:
        """After the table's gradients: those of the common intercepts."""
        if self.of_batch is not None:
            torch.sum(self.by_table.tensor, 0, out=self.bias.grad.tensor)


class _Layer:
    """Linear layer, LayerNorm, SiLU."""

    def __init__(self, values: Iterator[Value | None], n: int, half: bool, epsilon: float) -> None:
        weight, bias, of_batch, self.gain, self.bias = (next(values) for _ in range(5))
        d = len(bias.array)
        self.linear, self.intercepts, self.epsilon = Linear(weight, n, half), _Intercepts(bias, of_batch, n), np.float32(epsilon)
        self.hat, self.inverse, self.out = empty(n, d), empty(n), empty(n, d, half=half)

    def __call__(self, x: Both, batch: np.ndarray) -> Both:
        (table, self.index), norm = self.intercepts.rows(batch), (self.gain.array, self.bias.array, self.epsilon)
        kernels.normalised(self.linear(x).array, table, self.index, *norm, self.hat.array, self.inverse.array, self.out.array)
        return self.out

    def backward(self, grad: Both, wanted: bool) -> Both | None:
        """Gradient of x (None unless wanted)."""
        # The gradient before the product lies where the output was, which no one needs any more.
        known, made = (self.gain, self.bias, self.hat, self.inverse), (self.intercepts.by_table, self.gain.grad, self.bias.grad)
        kernels.normalised_backward(grad.array, self.index, *(x.array for x in (*known, self.out, *made)))
        self.intercepts.backward()
        return self.linear.backward(self.out, wanted)


@dataclass(frozen=True)
class Seen:
    """What the loss sees of some cells: rows (n,) of matrices (N, G) of expression and of what is observed; log_size and batch (n,)."""

    expression: Tensor
    expression_rows: Tensor
    observed: Tensor
    observed_rows: Tensor
    log_size: Tensor
    batch: Tensor


@dataclass(frozen=True)
class Design:
    """What a network is beside its parameters. layers: of encoder and of decoder each; counts: whether its likelihood is the negative
    binomial (else the gaussian), with the largest ln r and ln(mean / r); limits: of the posterior's log variance; free_bits: of the KL
    term; half: products of bfloat16; epsilon: of LayerNorm."""

    layers: int
    counts: bool
    largest_log_r: float
    largest_gap: float
    limits: tuple[float, float]
    free_bits: float
    half: bool
    epsilon: float


class NegativeBound(Step):
    """Mean over n cells of the negative log-likelihood and of the weighted KL term, per gene.

    values: weight, bias and intercepts by batch (None but where the layer knows the batch) of each linear layer, gain and bias of its norm;
    and of each gene ln r or the log variance.
    """

    def __init__(self, values: Sequence[Value | None], n: int, design: Design) -> None:
        self.values, self.design, rest, half = [value for value in values if value is not None], design, iter(values), design.half
        self.encoder = [_Layer(rest, n, half, design.epsilon) for _ in range(design.layers)]
        self.to_latent, self.of_latent, _ = Linear(next(rest), n, half), next(rest), next(rest)
        self.decoder = [_Layer(rest, n, half, design.epsilon) for _ in range(design.layers)]
        self.to_genes, self.intercepts, self.spread = Linear(next(rest), n, half), _Intercepts(next(rest), next(rest), n), next(rest)
        genes, latent = len(self.spread.array), len(self.of_latent.array) // 2
        self.limits, self.weight = [np.float32(limit) for limit in design.limits], np.float32(1 / (n * genes))
        self.scaled, self.by_decoded = (empty(n, genes, half=half) for _ in range(2))
        self.moments, self.divergence, self.latent = empty(n, 2 * latent), empty(latent), empty(n, latent, half=half)
        self.by_divergence, self.by_encoded = empty(latent), empty(n, 2 * latent, half=half)

    def forward(self, seen: Seen, noise: Tensor, factor: Tensor, offset: Tensor, kl_weight: float) -> float:
        """noise (n, latent); factor, offset (G,): of the encoder's input."""
        batch, self.noise = array(seen.batch), array(noise)
        kernels.scaled(*map(array, (seen.expression, seen.expression_rows, factor, offset)), self.scaled.array)
        x = self.scaled
        for layer in self.encoder:
            x = layer(x, batch)
        made = self.moments, self.latent, self.divergence
        kernels.posterior(self.to_latent(x).array, self.of_latent.array, self.noise, *self.limits, *(value.array for value in made))
        x = self.latent
        for layer in self.decoder:
            x = layer(x, batch)
        known = array(seen.observed), array(seen.observed_rows), self.to_genes(x).array, *self.intercepts.rows(batch)
        made = [value.array for value in (self.by_decoded, self.intercepts.by_table, self.spread.grad)]
        if self.design.counts:
            largest = np.float32(self.design.largest_log_r), np.float32(self.design.largest_gap)
            misfit = kernels.negative_binomial(*known, array(seen.log_size), self.spread.array, *largest, self.weight, *made)
        else:
            misfit = kernels.gaussian(*known, self.spread.array, self.weight, *made)
        self.intercepts.backward()
        over = self.divergence.array - np.float32(self.design.free_bits)
        counted = over >= 0 if self.design.free_bits > 0 else np.ones_like(over)
        np.multiply(counted, np.float32(kl_weight) * self.weight, out=self.by_divergence.array)
        return misfit + kl_weight * float((over * counted).sum()) / len(self.spread.array)

    def backward(self) -> None:
        grad = self.to_genes.backward(self.by_decoded)
        for layer in reversed(self.decoder):
            grad = layer.backward(grad, True)
        known, made = (self.by_divergence.array, self.by_encoded.array), self.of_latent.grad.array
        kernels.posterior_backward(grad.array, self.moments.array, self.noise, *self.limits, *known, made)
        grad = self.to_latent.backward(self.by_encoded)
        for layer in reversed(self.encoder):
            grad = layer.backward(grad, layer is not self.encoder[0])
