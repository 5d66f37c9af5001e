"""Gradient-free estimates of the noised score from an ensemble, and the chains that they drive."""
