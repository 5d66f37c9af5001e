"""Sampling from densities that are known only up to their normalizing constant."""

__version__ = "0.1.0"
