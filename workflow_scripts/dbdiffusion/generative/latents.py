"""Posteriors of the training cells in the coordinates that are diffused."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dbdiffusion.generative.vae import CellTensors, CellVae, encode_all


@dataclass
class Latents:
    """What the diffusion model learns from, on the device.

    mean, deviation: (n, coordinates) posterior of each cell in standardised coordinates (deviation 0 for the library size and the
    autoencoder); label: (n,) rows of `conditions` (u, dimensions).
    """

    mean: Tensor
    deviation: Tensor
    label: Tensor
    conditions: Tensor

    def draw(self, rows: Tensor, noise: Tensor) -> Tensor:
        """Draws from the cells' posteriors, given standard normal noise."""
        return torch.addcmul(self.mean.index_select(0, rows), self.deviation.index_select(0, rows), noise)


def latents_of(network: CellVae, data: CellTensors, label: np.ndarray, conditions: np.ndarray, standardise: bool) -> Latents:
    """Posteriors of the training cells in the coordinates that are diffused."""
    mean, deviation = encode_all(network, data)
    if not standardise:
        network.keep_latent_scale()
    mean = network.standardised(mean, data.log_library, data.batch)
    deviation = deviation / network.latent_sd
    if network.counts:
        deviation = torch.cat([deviation, torch.zeros_like(deviation[:, :1])], dim=1)
    device = mean.device
    return Latents(mean, deviation, torch.from_numpy(label).to(device), torch.from_numpy(conditions).float().to(device))
