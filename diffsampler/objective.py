r"""Losses of trajectories.

An :class:`Objective` is a function ``Trajectory -> scalar`` and declares what it needs. With
:math:`\log w` from formula (W):

=====================  =====================================================  ==================
reverse KL             :math:`-E_F[\log w]`                                   path gradient
log-variance           :math:`\mathrm{Var}(\log w)`                           detached, any paths
VarGrad                :math:`\frac12 E (\log w - \overline{\log w})^2`       detached, any paths
trajectory balance     :math:`\frac12 E (\log w - \log Z_\theta)^2`           detached, any paths
forward KL             :math:`-E_B \sum_k \log F_k`                           detached, backward paths
bridge likelihood      the same, at single steps of paths drawn in closed form  detached, no simulation
=====================  =====================================================  ==================

On policy, where the backward chain has no parameters, the detached gradients of half the log-variance, of VarGrad and
of trajectory balance at the true :math:`\log Z` all equal the pathwise gradient of the reverse KL divergence in
expectation.

References:
    Solving high-dimensional HJB PDEs using neural networks (Nuesken, Richter, 2021), https://arxiv.org/abs/2005.05409
    VarGrad (Richter, Boustati, Nuesken, Ruiz, Akyildiz, 2020), https://arxiv.org/abs/2010.10436
    Trajectory balance (Malkin, Jain, Bengio, Sun, Bengio, 2022), https://arxiv.org/abs/2201.13259
    Improved sampling via learned diffusions (Richter, Berner, 2024), https://arxiv.org/abs/2307.01198
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import final

import torch
from torch import Tensor, nn

from diffsampler.trajectory import Trajectory

__all__ = ["BridgeLikelihood", "ForwardKL", "LogVariance", "Objective", "ReverseKL", "TrajectoryBalance", "VarGrad"]


class Objective(nn.Module, ABC):
    """A loss of trajectories; it may own parameters such as a learned ``log Z``."""

    needs_path_gradient: bool = False
    """Whether the states must carry a graph (pathwise losses)."""
    on_policy_only: bool = False
    """Whether paths must come from the current forward chain."""
    needs_backward_paths: bool = False
    """Whether paths must come from the backward chain, started at target samples or stored particles."""

    needs_bridge: bool = False
    """Whether paths are single steps of closed-form bridges from stored particles, without any simulation."""

    @abstractmethod
    def forward(self, trajectory: Trajectory) -> Tensor:
        """The loss, a scalar."""


@final
class ReverseKL(Objective):
    """Negative evidence lower bound, differentiated through the states."""

    needs_path_gradient = True
    on_policy_only = True

    def forward(self, trajectory: Trajectory) -> Tensor:
        return -trajectory.log_weight.mean()


@final
class LogVariance(Objective):
    """Variance of the log weights; zero exactly when forward and backward path laws agree."""

    def forward(self, trajectory: Trajectory) -> Tensor:
        return trajectory.log_weight.var()


@final
class VarGrad(Objective):
    """Half the mean squared deviation of the log weights from their batch mean."""

    def forward(self, trajectory: Trajectory) -> Tensor:
        log_weight = trajectory.log_weight
        return 0.5 * (log_weight - log_weight.mean()).square().mean()


@final
class TrajectoryBalance(Objective):
    """Half the mean squared deviation of the log weights from ``log Z``.

    Arguments:
        log_normalizer: Initial value of ``log Z``.
        learn: Whether ``log Z`` is a parameter; its learning rate should be 10 to 100 times the network's.
    """

    def __init__(self, log_normalizer: float = 0.0, *, learn: bool = True) -> None:
        super().__init__()
        self.log_normalizer = nn.Parameter(torch.tensor(log_normalizer, dtype=torch.float64), requires_grad=learn)

    def forward(self, trajectory: Trajectory) -> Tensor:
        return 0.5 * (trajectory.log_weight - self.log_normalizer).square().mean()


@final
class ForwardKL(Objective):
    """Maximum likelihood of backward paths under the forward chain."""

    needs_backward_paths = True

    def forward(self, trajectory: Trajectory) -> Tensor:
        return -(trajectory.log_forward.sum(0) + trajectory.log_initial).mean()


@final
class BridgeLikelihood(Objective):
    """Maximum likelihood of single steps ``x_k -> x_{k+1}`` of backward paths drawn in closed form.

    The same minimum as :class:`ForwardKL`, Rao-Blackwellized over the path, and far cheaper: no chain is simulated. The
    learned process inherits the particles' errors (mode weights); its weights stay exact.
    """

    needs_backward_paths = True
    needs_bridge = True

    def forward(self, trajectory: Trajectory) -> Tensor:
        return -trajectory.log_forward.mean()
