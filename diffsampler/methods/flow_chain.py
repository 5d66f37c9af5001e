r"""Chains of flows and kernels: paths with exact weights, differentiable in every parameter.

The mathematics is that of :mod:`diffsampler.methods.snf`; here are the chain itself, and what hands its paths to the
library's training loop.
"""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor, nn

from diffsampler.kernel import Kernel, KernelParams, LogDensity
from diffsampler.methods.flows import Flow, couplings
from diffsampler.objective import Objective
from diffsampler.sources import Draw, Source
from diffsampler.space import Euclidean
from diffsampler.target import Target
from diffsampler.trajectory import Trajectory

__all__ = ["FlowChain", "FlowPaths", "PathKL"]


@final
class FlowChain(nn.Module):
    """Prior, flows and kernels: everything with parameters.

    Arguments:
        space: Euclidean.
        num_blocks: Number ``K`` of blocks.
        kernel: Transition that ends each block.
        num_moves: Kernel steps in each block.
        location: Mean of the prior, shape ``(D,)`` or a number.
        scale: Standard deviation of the prior, and the unit of flows and kernels.
        step_size: Step size of the kernels in that unit.
        flows: One flow for each block, in standardized coordinates; coupling layers by default.
        num_layers: Coupling layers in each block.
        width: Width of their networks.
        seed: Seed of their initial parameters.
    """

    # What the training loop asks of a chain before it starts; a pathwise loss trains everything here.
    has_anchors = False
    has_bridge = False
    learns_shift = False

    location: Tensor
    scale: Tensor

    def __init__(
        self,
        space: Euclidean,
        *,
        num_blocks: int,
        kernel: Kernel,
        num_moves: int,
        location: Tensor | float,
        scale: float,
        step_size: float,
        flows: list[Flow] | None,
        num_layers: int,
        width: int,
        seed: int,
    ) -> None:
        super().__init__()
        self.space = space
        self.kernel = kernel
        self.num_moves = num_moves
        self.num_steps = num_blocks
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("location", torch.as_tensor(location, dtype=torch.float32).expand(space.dim).clone())
        self.register_buffer("scale", torch.tensor([float(scale)]))
        if flows is None:
            options = {"num_layers": num_layers, "width": width}
            flows = [couplings(space.dim, generator=generator, **options) for _ in range(num_blocks)]
        # The training loop gives networks, told by this name, their own learning rate.
        self.control = nn.ModuleList(flows)
        log_step = torch.full((num_blocks,), math.log(step_size))
        self.log_step = nn.Parameter(log_step, requires_grad=not kernel.exact)

    def config(self) -> dict[str, object]:
        """What identifies the chain in a checkpoint."""
        return {
            "process": type(self).__name__,
            "space": repr(self.space),
            "num_steps": self.num_steps,
            "kernel": type(self.kernel).__name__,
            "num_moves": self.num_moves,
            "shapes": {name: tuple(p.shape) for name, p in self.named_parameters()},
        }

    def log_initial(self, x: Tensor) -> Tensor:
        """Log density of the prior, ``(..., D) -> (...)``, float64."""
        return self.space.log_gaussian(x, self.location.to(x), self.scale.to(x).square())

    def simulate(self, target: Target, n: int, *, generator: torch.Generator | None, path_gradient: bool) -> Trajectory:
        """Run ``n`` paths forward from the prior."""
        with torch.set_grad_enabled(path_gradient):
            x = self.location + self.scale * self.space.noise((n,), like=self.location, generator=generator)
            states, ratios = [x], []
            for k in range(self.num_steps):
                x, log_det = self._map(k, x)
                x, log_ratio = self._move(k, x, target, generator, path_gradient=path_gradient)
                states.append(x)
                ratios.append(log_det + log_ratio)
            return self._record(states, ratios, target, on_policy=True)

    def simulate_backward(
        self, target: Target, x: Tensor, *, generator: torch.Generator | None, path_gradient: bool
    ) -> Trajectory:
        """Run paths backward from terminal points ``x (n, D)``; every kernel is its own backward kernel."""
        with torch.set_grad_enabled(path_gradient):
            states, ratios = [x], []
            for k in reversed(range(self.num_steps)):
                x, log_ratio = self._move(k, x, target, generator, path_gradient=path_gradient)
                x, log_det = self._map(k, x, inverse=True)
                states.append(x)
                ratios.append(-(log_det + log_ratio))
            return self._record(states[::-1], ratios[::-1], target, on_policy=False)

    def _map(self, k: int, x: Tensor, *, inverse: bool = False) -> tuple[Tensor, Tensor]:
        """Flow ``k`` in units of the prior; the unit cancels in the Jacobian."""
        z = (x - self.location) / self.scale
        flow = self.control[k]
        assert isinstance(flow, Flow)
        z, log_det = flow.inverse(z) if inverse else flow(z)
        return self.location + self.scale * z, log_det

    def _move(
        self, k: int, x: Tensor, target: Target, generator: torch.Generator | None, *, path_gradient: bool
    ) -> tuple[Tensor, Tensor]:
        density = self._density((k + 1) / self.num_steps, target, path_gradient=path_gradient)
        params = KernelParams(self.log_step[k].exp(), self.scale)
        state = self.kernel.init(x, density, generator=generator)
        total = x.new_zeros(x.shape[:-1], dtype=torch.float64)
        for _ in range(self.num_moves):
            state, info = self.kernel.step(state, density, params, generator)
            total = total + info.log_ratio
        return state.x, total

    def _density(self, beta: float, target: Target, *, path_gradient: bool) -> LogDensity:
        def density(x: Tensor) -> tuple[Tensor, Tensor]:
            if path_gradient:
                x = x if x.requires_grad else x.detach().requires_grad_()
                log_target = target.log_prob(x)
                (score,) = torch.autograd.grad(log_target.sum(), x, create_graph=True)
            else:
                log_target, score = target.log_prob_and_score(x)
            pull = (self.location.to(x) - x) / self.scale.to(x).square()
            log_prob = (1.0 - beta) * self.log_initial(x) + beta * log_target.double()
            return log_prob, (1.0 - beta) * pull + beta * score.to(x)

        return density

    def _record(self, states: list[Tensor], ratios: list[Tensor], target: Target, *, on_policy: bool) -> Trajectory:
        ratio = torch.stack(ratios)
        return Trajectory(
            x=torch.stack(states),
            score=None,
            # Blocks know the ratio of their two laws, not each one: flows have no density of their own.
            log_forward=torch.zeros_like(ratio),
            log_backward=ratio,
            log_initial=self.log_initial(states[0]),
            log_terminal=target.log_prob(states[-1]).double(),
            log_anchor=None,
            on_policy=on_policy,
        )


@final
class PathKL(Objective):
    """Divergence between the path laws in the direction in which the batch was drawn, up to ``log Z``."""

    needs_path_gradient = True

    def forward(self, trajectory: Trajectory) -> Tensor:
        mean = trajectory.log_weight.mean()
        return -mean if trajectory.on_policy else mean


@final
class FlowPaths(Source):
    """Batches that run forward, or backward from samples: each wholly in one direction, drawn at random.

    In expectation that is the mixture of both losses.
    """

    def __init__(self, chain: FlowChain, samples: Tensor | None, share: float) -> None:
        self.chain = chain
        self.samples = samples
        self.share = 0.0 if samples is None else share
        self.on_policy = True

    def draw(self, n: int, use: Draw) -> Trajectory:
        device = use.generator.device
        forward = bool(torch.rand((), generator=use.generator, device=device) >= self.share)
        # Forward paths alone have weights that say something about the sampler.
        self.on_policy = forward
        if forward or self.samples is None:
            return self.chain.simulate(use.target, n, generator=use.generator, path_gradient=True)
        index = torch.randint(self.samples.shape[0], (n,), generator=use.generator, device=device)
        x = self.samples[index]
        return self.chain.simulate_backward(use.target, x, generator=use.generator, path_gradient=True)

    def config(self) -> str:
        shape = None if self.samples is None else tuple(self.samples.shape)
        return f"FlowPaths({shape}, {self.share:g})"
