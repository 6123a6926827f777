"""Autoencoder and latent diffusion: training, checkpoints and sampling."""
