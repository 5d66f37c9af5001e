r"""Adjoint Schroedinger bridge sampler: adjoint sampling from any Gaussian start law.

The chain of :mod:`diffsampler.methods.reference_process` from a law :math:`\mu` under a driftless or an
Ornstein-Uhlenbeck reference. Paths remember where they began, so the control needs the corrector
:math:`h = \nabla\log\hat\varphi_1` of the Schroedinger bridge, and the two are matched in turns or together
(:mod:`diffsampler.methods.matching`). The corrector is learned at all times, not only at the last: it makes the
backward kernels, and with them exact weights,

.. math:: \log w = \log\rho(x_K) - \log\mu(x_0) + \sum_k [\log B_k(x_k | x_{k+1}) - \log F_k(x_{k+1} | x_k)].

It starts at the corrector of the reference, that is after the first round of corrector matching. Under the stationary
Ornstein-Uhlenbeck reference that forgets its start this is exact already, and training it only adds noise.

Angles start uniform by default, which a Brownian motion on circles leaves as it is; real coordinates beside them start
Gaussian. In internal coordinates of molecules (:class:`~diffsampler.targets.circular_molecule.CircularMolecule`) an
Ornstein-Uhlenbeck reference for the stiff ones and a Brownian motion for the rotors keep the prior that is known, and
the control has only the rest to learn: ``reference=product(variance_preserving(K), geometric(K, sigma_max=3.0))``.

Use it in place of adjoint sampling where particles should start spread out (nothing is gained by breaking the symmetry
of a point first) or joined by bonds. It trains two networks, and weights cost another evaluation a step. Its weights
are worse than those from a point for the same control: two learned parts must agree.

References:
    Adjoint Schroedinger bridge sampler (Liu et al., 2025), https://arxiv.org/abs/2506.22565
"""

from __future__ import annotations

from typing import Any, final

from diffsampler.methods.matching import Matching, PathDivergence
from diffsampler.methods.reference_process import GaussianStart, ReferenceProcess, Start, UniformStart
from diffsampler.objective import Objective
from diffsampler.reference import Reference, geometric
from diffsampler.sampler import DiffusionSampler
from diffsampler.space import EuclideanTorus, Torus
from diffsampler.target import Target

__all__ = ["ASBS"]


@final
class ASBS(DiffusionSampler):
    """Adjoint Schroedinger bridge sampler.

    Example:
        ``ASBS(target, num_steps=64, scale=1.0, sigma_max=1.0).fit(steps=5000).sample(4096)``

    Arguments:
        target: The density to sample.
        num_steps: Number of steps ``K``.
        objective: A loss of weights that trains the same chain on its own paths, in place of matching.
        start: The start law in place of an isotropic Gaussian with uniform angles.
        scale: Standard deviation of that Gaussian.
        reference: The reference in place of a geometric one.
        sigma_min: Noise still to come near the end of the geometric reference.
        sigma_max: Noise that it adds altogether.
        lesson: How end points are drawn, kept and matched.
        options: As in :class:`~diffsampler.methods.reference_process.ReferenceProcess`.
    """

    def __init__(
        self,
        target: Target,
        *,
        num_steps: int = 64,
        objective: Objective | None = None,
        start: Start | None = None,
        scale: float = 1.0,
        reference: Reference | None = None,
        sigma_min: float = 0.03,
        sigma_max: float = 1.5,
        lesson: Matching | None = None,
        **options: Any,
    ) -> None:
        circular = isinstance(target.space, Torus | EuclideanTorus)
        if start is None:
            start = UniformStart(target.space, scale=scale) if circular else GaussianStart(target.space, scale=scale)
        if reference is None:
            reference = geometric(num_steps, sigma_min=sigma_min, sigma_max=sigma_max)
        process = ReferenceProcess(target.space, reference, start=start, **options)
        if objective is None:
            objective, lesson = PathDivergence(), Matching() if lesson is None else lesson
        super().__init__(target, process, objective, lesson=lesson)
