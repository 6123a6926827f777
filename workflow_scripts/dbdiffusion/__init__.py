"""dbDiffusion: predict, test and benchmark the response to perturbations nobody measured."""

__version__ = "0.1.0"
