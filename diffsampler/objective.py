r"""Losses of trajectories.

An :class:`Objective` is a function ``Trajectory -> scalar`` and declares what it needs. With
:math:`\log w` from formula (W):

=====================  =====================================================  ==================
reverse KL             :math:`-E_F[\log w]`                                   path gradient
score-function KL      the same                                               detached, fresh paths
log-variance           :math:`\mathrm{Var}(\log w)`                           detached, any paths
VarGrad                :math:`\frac12 E (\log w - \overline{\log w})^2`       detached, any paths
trajectory balance     :math:`\frac12 E (\log w - \log Z_\theta)^2`           detached, any paths
sub-trajectory LV      :math:`\frac1J \sum_j \mathrm{Var}(\log G_j)`            detached, any paths, anchors
sub-trajectory balance all pairs of steps, :class:`SubTrajectoryBalance`      detached, any paths, anchors
detailed balance       neighbouring steps, :class:`DetailedBalance`           detached, any paths, anchors
forward KL             :math:`-E_B \sum_k \log F_k`                           detached, backward paths
bridge likelihood      the same, at single steps of paths drawn in closed form  detached, no simulation
=====================  =====================================================  ==================

On policy, where the backward chain has no parameters, the detached gradients of half the log-variance, of VarGrad and
of trajectory balance at the true :math:`\log Z` all equal the pathwise gradient of the reverse KL divergence in
expectation. Where it has, only that of the score-function form does.

References:
    Solving high-dimensional HJB PDEs using neural networks (Nuesken, Richter, 2021), https://arxiv.org/abs/2005.05409
    VarGrad (Richter, Boustati, Nuesken, Ruiz, Akyildiz, 2020), https://arxiv.org/abs/2010.10436
    Trajectory balance (Malkin, Jain, Bengio, Sun, Bengio, 2022), https://arxiv.org/abs/2201.13259
    Learning GFlowNets from partial episodes (Madan et al., 2023), https://arxiv.org/abs/2209.12782 (sub-trajectories)
    Sequential controlled Langevin diffusions (Chen et al., 2025), https://arxiv.org/abs/2412.07081
    Improved sampling via learned diffusions (Richter, Berner, 2024), https://arxiv.org/abs/2307.01198
    Sticking the landing (Roeder, Wu, Duvenaud, 2017), https://arxiv.org/abs/1703.09194
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import final

import torch
from torch import Tensor, nn

from diffsampler.trajectory import Trajectory

__all__ = [
    "BridgeLikelihood",
    "DetailedBalance",
    "ForwardKL",
    "LogVariance",
    "Objective",
    "ReverseKL",
    "ScoreFunctionKL",
    "SubTrajectoryBalance",
    "SubTrajectoryLogVariance",
    "TrajectoryBalance",
    "VarGrad",
    "segment_edges",
]


class Objective(nn.Module, ABC):
    """A loss of trajectories; it may own parameters such as a learned ``log Z``."""

    needs_path_gradient: bool = False
    """Whether the states must carry a graph (pathwise losses)."""
    on_policy_only: bool = False
    """Whether paths must come from the current forward chain."""
    needs_backward_paths: bool = False
    """Whether paths must come from the backward chain, started at target samples or stored particles."""
    needs_anchors: bool = False
    """Whether the process must define densities at all steps (anchors, a flow function)."""
    needs_bridge: bool = False
    """Whether paths are single steps of closed-form bridges from stored particles, without any simulation."""
    trains_shared: bool = False
    """Whether parameters that forward and backward kernels share (step sizes, noise) get the slope of a divergence."""
    averages: bool = False
    """Whether the loss is a mean over paths, so that gradients of parts of a batch add up to that of the whole."""
    freezes_forward: bool = False
    """Whether forward densities enter at frozen parameters (sticking the landing)."""

    @abstractmethod
    def forward(self, trajectory: Trajectory) -> Tensor:
        """The loss, a scalar."""


@final
class ReverseKL(Objective):
    """Negative evidence lower bound, differentiated through the states.

    Arguments:
        stick_landing: Leave out the slope of the forward densities in their own parameters, whose mean is zero: less
            noise near the optimum, and none at it (with ``detach_score=False``).
    """

    needs_path_gradient = True
    on_policy_only = True
    trains_shared = True
    averages = True

    def __init__(self, *, stick_landing: bool = False) -> None:
        super().__init__()
        self.freezes_forward = stick_landing

    def forward(self, trajectory: Trajectory) -> Tensor:
        return -trajectory.log_weight.mean()


@final
class ScoreFunctionKL(Objective):
    r"""Negative evidence lower bound, differentiated at fixed fresh paths (REINFORCE, the batch's mean as baseline).

    .. math:: -E\big[(\log w - \overline{\log w})\, \nabla \log(p_0 F)\big] - E[\nabla \log(\rho B)]

    has the gradient of :class:`ReverseKL` as its mean, for every parameter that the paths depend on through kernels:
    those that both kernels share as well, which losses of the weights' variance mislead. No graph over time is kept.
    """

    on_policy_only = True
    trains_shared = True

    def forward(self, trajectory: Trajectory) -> Tensor:
        log_weight = trajectory.log_weight.detach()
        centred = (log_weight - log_weight.mean()) / (len(log_weight) - 1)
        ahead = trajectory.log_initial + trajectory.log_forward.sum(0)
        back = trajectory.log_terminal + trajectory.log_backward.sum(0)
        surrogate = -(centred * ahead).sum() - back.mean()
        # Its value is the bound; the surrogate gives the slope.
        return surrogate - surrogate.detach() - log_weight.mean()


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
class SubTrajectoryLogVariance(Objective):
    r"""Mean over equal segments of the variance of their log weights :math:`\log G_j`.

    The constants of the anchors drop out of each variance, so none has to be learned.

    Arguments:
        segments: Number of segments ``J``, at most the number of steps.
    """

    needs_anchors = True

    def __init__(self, segments: int) -> None:
        super().__init__()
        if segments < 1:
            raise ValueError(f"Expected segments >= 1; got {segments}.")
        self.segments = segments

    def forward(self, trajectory: Trajectory) -> Tensor:
        edges = segment_edges(trajectory.num_steps, self.segments)
        values = [trajectory.segment_log_weight(a, b).var() for a, b in zip(edges, edges[1:], strict=False)]
        return torch.stack(values).mean()


def segment_edges(num_steps: int, segments: int) -> list[int]:
    """Steps at which ``segments`` nearly equal segments begin and end, from 0 to ``num_steps``."""
    if not 1 <= segments <= num_steps:
        raise ValueError(f"Expected between 1 and {num_steps} segments; got {segments}.")
    return [round(j * num_steps / segments) for j in range(segments + 1)]


class _Balance(Objective):
    r"""Squared differences of :math:`g_k = f_k + \sum_{j<k} (\log B_j - \log F_j)` between steps of a path.

    The flow :math:`f_k` is the anchor plus a learned constant, as anchors are known up to their own normalizers:
    :math:`f_0 = \log Z_\theta + \log p_0` and :math:`f_K = \log\rho`.
    """

    needs_anchors = True

    def __init__(self, num_steps: int) -> None:
        super().__init__()
        if num_steps < 1:
            raise ValueError(f"Expected num_steps >= 1; got {num_steps}.")
        self.log_normalizers = nn.Parameter(torch.zeros(num_steps, dtype=torch.float64))

    @property
    def log_normalizer(self) -> Tensor:
        """The learned log Z."""
        return self.log_normalizers[0]

    def _levels(self, trajectory: Trajectory) -> Tensor:
        """``g_k``, shape ``(K + 1, B)``."""
        if trajectory.num_steps != len(self.log_normalizers):
            raise ValueError(f"Expected paths of {len(self.log_normalizers)} steps; got {trajectory.num_steps}.")
        assert trajectory.log_anchor is not None
        ends = [trajectory.log_initial.unsqueeze(0), trajectory.log_anchor[1:-1], trajectory.log_terminal.unsqueeze(0)]
        flow = torch.cat(ends) + nn.functional.pad(self.log_normalizers, (0, 1)).unsqueeze(-1)
        ratio = (trajectory.log_backward - trajectory.log_forward).cumsum(0)
        return flow + nn.functional.pad(ratio, (0, 0, 1, 0))


@final
class DetailedBalance(_Balance):
    """Balance at every single step, averaged over steps.

    Arguments:
        num_steps: Number of steps of the process; one learned constant each.
    """

    def forward(self, trajectory: Trajectory) -> Tensor:
        return 0.5 * self._levels(trajectory).diff(dim=0).square().mean()


@final
class SubTrajectoryBalance(_Balance):
    r"""Balance of all sub-trajectories, those of length ``l`` with total weight proportional to :math:`\lambda^l`.

    Small :math:`\lambda` approaches detailed balance, large :math:`\lambda` trajectory balance. The published value 2
    puts nearly all weight on nearly whole paths, which learn fastest on 25 modes; below 1 short pieces count.

    Arguments:
        num_steps: Number of steps of the process; one learned constant each.
        decay: The base :math:`\lambda`.
    """

    def __init__(self, num_steps: int, *, decay: float = 2.0) -> None:
        super().__init__(num_steps)
        if not decay > 0.0:
            raise ValueError(f"Expected decay > 0; got {decay}.")
        self.decay = decay

    def forward(self, trajectory: Trajectory) -> Tensor:
        levels = self._levels(trajectory)
        lag = torch.arange(1, trajectory.num_steps + 1, dtype=torch.float64, device=levels.device)
        # There are K + 1 - l pieces of length l.
        share = torch.softmax(lag * math.log(self.decay) + (trajectory.num_steps + 1 - lag).log(), 0)
        losses = [(levels[n:] - levels[:-n]).square().mean() for n in range(1, trajectory.num_steps + 1)]
        return 0.5 * (share * torch.stack(losses)).sum()


@final
class ForwardKL(Objective):
    """Maximum likelihood of backward paths under the forward chain."""

    needs_backward_paths = True
    averages = True

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
    averages = True

    def forward(self, trajectory: Trajectory) -> Tensor:
        return -trajectory.log_forward.mean()
