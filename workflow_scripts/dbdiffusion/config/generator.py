"""config blocks `vae`, `diffusion` and `generation`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from dbdiffusion.config.base import Block


class VaeConfig(Block):
    """Autoencoder between expression and the latent space of the diffusion."""

    kind: Literal["vae", "autoencoder"] = "vae"
    """vae: reparameterised latent with KL term; autoencoder: published design (no KL, unit-norm latent)."""
    likelihood: Literal["gaussian", "nb"] = "nb"
    """Decoder: negative binomial on counts with the library size (zeros and variances as in real cells), or gaussian on log-normalised
    expression."""
    hidden: list[int] = Field([128], min_length=1)
    """Widths of the hidden layers, encoder order. Wider ones overfit some thousand cells; their held-out loss (training.png) tells."""
    latent: int = Field(32, ge=2)
    """Latent dimensions."""
    activation: Literal["silu", "prelu", "relu"] = "silu"
    """Activation of the hidden layers."""
    norm: Literal["layer", "batch", "none"] = "layer"
    """Normalisation of the hidden layers; batch uses running statistics when it decodes."""
    kl_weight: float = Field(1.0, ge=0)
    """Weight of the KL term; 1 is the evidence lower bound, less keeps more of each cell's noise in the latent."""
    kl_warmup_share: float = Field(0.05, ge=0, le=1)
    """Share of the steps over which the KL weight grows from 0."""
    free_bits: float = Field(0.0, ge=0)
    """KL per latent dimension that is not penalised, nats."""
    batch_size: int = Field(512, ge=2)
    """Cells per training step; of few cells halved, to 128 at least, until six steps are an epoch."""
    learning_rate: float = Field(4.0e-3, gt=0)
    """Peak learning rate of AdamW."""
    weight_decay: float = Field(0.01, ge=0)
    """Decoupled weight decay of AdamW."""
    max_epochs: int = Field(80, ge=1)
    """Passes over the training cells, at most."""
    max_steps: int = Field(20000, ge=1)
    """Training ends at the earlier of max_epochs and max_steps."""
    patience: int = Field(10, ge=0)
    """Stop after this many epochs without a better held-out loss; 0: never."""
    validation_share: float = Field(0.1, ge=0, lt=0.5)
    """Share of training cells held out for early stopping."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of products in training. auto: bf16 on GPUs and CPUs that multiply it (avx512_bf16, amx_bf16), else fp32; results then depend on the
    machine as they do on the device, which fp32 avoids."""
    cuda_graphs: bool = False
    """On a GPU, record the training step once as a CUDA graph and replay it; where that cannot be done, training goes on without. Not yet
    tried on a GPU."""
    checkpoint_seconds: float = Field(60.0, gt=0)
    """A killed training resumes from its last checkpoint."""


class DiffusionConfig(Block):
    """Denoiser in the latent space, conditioned on the perturbation."""

    condition: Literal["embedding", "features", "both"] = "both"
    """What stands for a perturbation: its place in the embedding (published; located for those not measured), the features of its
    genes, or both."""
    uncertain_conditions: bool = True
    """Train on places and features that are as uncertain as those of perturbations that were not measured, and say how certain they are."""
    widths: list[int] = Field([256, 128], min_length=1)
    """Widths of the MLP U-Net's levels."""
    prediction: Literal["epsilon", "v", "x0"] = "v"
    """What the network predicts. epsilon (published) learns the mean of a condition slowly: it shows at the noisiest levels alone."""
    schedule: Literal["linear", "cosine"] = "linear"
    """Noise schedule."""
    timesteps: int = Field(1000, ge=10)
    """Noise levels T of the training schedule."""
    min_snr_gamma: float | None = Field(None, gt=0)
    """Gamma of the min-SNR loss weight; null: unweighted."""
    label_dropout: float = Field(0.2, ge=0, lt=1)
    """Share of cells whose condition is replaced by the learned null token (classifier-free guidance)."""
    null_token: Literal["learned", "zero"] = "learned"
    """zero: published design, where null, control and the zero vector are one."""
    standardise_latent: bool = True
    """Unit variance per latent coordinate before diffusion."""
    mean_offsets: bool = True
    """Give back what the latent loses of a perturbation's mean, as a linear function of its embedding."""
    batch_size: int = Field(512, ge=2)
    """Cells per training step; of few cells halved, to 128 at least, until six steps are an epoch."""
    learning_rate: float = Field(2.0e-3, gt=0)
    """Peak learning rate of AdamW."""
    weight_decay: float = Field(1.0e-4, ge=0)
    """Decoupled weight decay of AdamW."""
    ema: float = Field(0.999, ge=0, lt=1)
    """Decay of the averaged weights that generate."""
    max_epochs: int = Field(120, ge=1)
    """Passes over the training cells, at most."""
    max_steps: int = Field(30000, ge=1)
    """Training ends at the earlier of max_epochs and max_steps."""
    validation_share: float = Field(0.1, ge=0, lt=0.5)
    """Share of training cells held out; the weights with the best held-out loss generate."""
    patience: int = Field(10, ge=0)
    """Stop after this many validations (40 over the whole training) without a better held-out loss; 0: never."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of products in training. auto: bf16 on GPUs and CPUs that multiply it (avx512_bf16, amx_bf16), else fp32; results then depend on the
    machine as they do on the device, which fp32 avoids."""
    cuda_graphs: bool = False
    """On a GPU, record the training step once as a CUDA graph and replay it; where that cannot be done, training goes on without. Not yet
    tried on a GPU."""
    checkpoint_seconds: float = Field(60.0, gt=0)
    """A killed training resumes from its last checkpoint."""


class GenerationConfig(Block):
    """Sampling of cells."""

    sampler: Literal["accelerated", "ddpm", "ddim", "dpmpp_2m"] = "accelerated"
    """accelerated: second-order stochastic (Li et al. 2024, published); ddpm: ancestral; ddim: deterministic; dpmpp_2m: DPM-Solver++ 2M."""
    steps: int = Field(50, ge=2)
    """Denoising steps."""
    guidance: Literal["tuned"] | float = "tuned"
    """Strength w of classifier-free guidance: (1 + w) conditional - w null, which stretches effects. tuned: the strength of the smallest
    error of pseudo-targets' effects in the fold (for each pseudo-target without its own error), shrunk towards none by its uncertainty.
    0: none."""
    cells: int = Field(500, ge=10)
    """Cells generated per perturbation and cross-fit model."""
    cells_kept: int = Field(200, ge=1)
    """Of these, cells written to generated.h5ad (all enter the means)."""

    @field_validator("guidance")
    @classmethod
    def _not_negative(cls, value: str | float) -> str | float:
        if value != "tuned" and not value >= 0:
            raise ValueError("must be 0 or more, or tuned")
        return value
