"""ChEES-HMC: Hamiltonian Monte Carlo for many chains, with the trajectory length learned from all of them."""

from __future__ import annotations

from typing import Unpack, final

from diffsampler.baselines.chains import ChainOptions, ChainSampler
from diffsampler.kernels import chees, hmc
from diffsampler.target import Target

__all__ = ["ChEES"]


@final
class ChEES(ChainSampler):
    """Hamiltonian Monte Carlo that learns step size, metric and trajectory length from all chains at once.

    No chain waits for another, so it is the sampler to have for many chains of a unimodal density; it needs at least 16
    of them to learn from, better 64. It fails where one length cannot suit all places: on funnels chains get stuck in
    the neck (R-hat tells), and it does not travel between separated modes.

    Reference:
        An Adaptive-MCMC Scheme for Setting Trajectory Lengths in Hamiltonian Monte Carlo (Hoffman, Radul & Sountsov,
        2021), https://proceedings.mlr.press/v130/hoffman21a.html

    Takes the options of :class:`~diffsampler.baselines.chains.ChainSampler`, and:

    Arguments:
        target: The density.
        max_steps: Largest number of leapfrog steps of a transition.

    Raises:
        ValueError: If ``length`` is given: use :class:`~diffsampler.baselines.Chains` with a fixed one.
    """

    def __init__(self, target: Target, *, max_steps: int = 1000, **options: Unpack[ChainOptions]) -> None:
        if options.get("length") is not None:
            raise ValueError("Expected no length, which ChEES learns; use Chains with the HMC kernel for a fixed one.")
        kernel = hmc.HMC(target.space, num_steps=max_steps)
        trajectory = chees.ChEES(target.space)
        super().__init__(target, kernel, trajectory=trajectory, typical_evaluations=8.0, **options)
