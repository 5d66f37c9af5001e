"""Conformance of processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from diffsampler.process import Process
from diffsampler.space import Torus
from diffsampler.target import Target
from diffsampler.testing.common import FALSE_ALARM, moments, normal_quantile, require, require_same_law
from diffsampler.trajectory import Trajectory, simulate, simulate_backward

__all__ = ["check_process"]


def check_process(
    process: Process, target: Target, *, generator: torch.Generator, paths: int = 4096
) -> tuple[str, ...]:
    r"""Check that a process keeps the promises of :class:`~diffsampler.process.Process` on a target.

    Always: the initial law, kernels that are the same for one step and for many, for one particle and for a batch, on
    the space; what is declared about learning; records whose segments sum to the log weight; no graph where none is
    wanted. Where declared: anchors, and closed-form bridges against the backward chain. With an exact sampler and a
    known constant: the crossing of forward and backward weights (bounded, so heavy tails do no harm),

    .. math:: E_F[\sigma(\log w - \log Z)] = E_B[\sigma(\log Z - \log w)],

    which fails if any kernel is not a normalized density of its own draws. Train or perturb the process first to check
    it away from its initial state; nothing is changed here except that gradients are cleared.

    Arguments:
        process: The process, in float64 for the sharpest comparison.
        target: A target on the same space.
        generator: Source of all randomness.
        paths: Number of paths in the statistical checks; each fails by chance with probability 1e-6.

    Returns:
        Names of the checks that ran.

    Raises:
        AssertionError: At the first broken promise.
    """
    require(process.space == target.space, f"Expected a process on {target.space}; got one on {process.space}.")
    state = torch.get_rng_state()
    _check_initial(process, generator)
    _check_initial_law(process, paths, generator)
    trajectory = simulate(process, target, 16, generator=generator)
    checks: dict[str, Callable[[], None]] = {
        "record": lambda: _check_record(process, trajectory),
        "kernels": lambda: _check_transitions(process, trajectory),
        "declarations": lambda: _check_declarations(process, target, trajectory, generator),
    }
    if process.has_anchors:
        checks["anchors"] = lambda: _check_anchors(trajectory)
    if process.has_bridge:
        checks["bridge"] = lambda: _check_bridge(process, trajectory.x[-1][:1], paths, generator)
    if target.has_sampler and target.log_normalizer is not None:
        checks["weights"] = lambda: _check_weights(process, target, paths, generator)
    for check in checks.values():
        check()
    require(torch.equal(state, torch.get_rng_state()), "Expected an explicit generator; the global one moved.")
    return ("initial law", *checks)


def _check_initial(process: Process, generator: torch.Generator) -> None:
    seed = int(torch.randint(2**31, (1,), generator=generator, device=generator.device))
    first, again = (
        process.sample_initial(50, generator=torch.Generator(generator.device).manual_seed(seed)) for _ in range(2)
    )
    shape = (50, process.space.dim)
    require(first.shape == shape, f"Expected sample_initial(50) of shape {shape}; got {tuple(first.shape)}.")
    require(torch.equal(first, again), "Expected equal seeds to give equal initial points; they differ.")
    dtype = next(process.parameters()).dtype
    require(first.dtype == dtype, f"Expected initial points in the dtype of the process, {dtype}; got {first.dtype}.")
    error = (process.space.project(first) - first).abs().max().item()
    require(error < 1e-5, f"Expected initial points on the space; the projection moves them by {error:.2g}.")
    log_prob = process.log_initial(first)
    require(
        log_prob.shape == (50,) and log_prob.dtype == torch.float64 and bool(log_prob.isfinite().all()),
        f"Expected log_initial finite, of shape (50,) in float64; got {tuple(log_prob.shape)}, {log_prob.dtype}.",
    )


def _check_initial_law(process: Process, paths: int, generator: torch.Generator) -> None:
    """Stein's identity, the mean of ``-x grad log p_0(x)`` counts the degrees of freedom; not for a point mass."""
    if isinstance(process.space, Torus):
        return
    x = process.sample_initial(paths, generator=generator).detach().requires_grad_()
    log_prob = process.log_initial(x)
    if not log_prob.requires_grad:
        return
    (score,) = torch.autograd.grad(log_prob.sum(), x, allow_unused=True)
    if score is None or not bool(score.any()):
        return
    score = process.space.project_vector(score)
    counted = -(x.detach() - x.detach().mean(0)).mul(score).sum(-1).double()
    z = abs(counted.mean().item() - process.space.dof) / (counted.std().item() / math.sqrt(paths))
    limit = normal_quantile(FALSE_ALARM) + 1.0
    require(
        z < limit,
        f"Expected log_initial to be the log density of sample_initial; Stein's identity fails by {z:.1f} standard "
        f"errors (limit {limit:.1f}).",
    )


def _check_record(process: Process, trajectory: Trajectory) -> None:
    tensors = {name: value for name, value in vars(trajectory).items() if isinstance(value, Tensor)}
    for name, value in tensors.items():
        require(not value.requires_grad, f"Expected no graph in a detached trajectory; {name} carries one.")
        require(bool(value.isfinite().all()), f"Expected finite numbers at ordinary points; {name} has others.")
    edges = sorted({0, process.num_steps // 3, 2 * process.num_steps // 3, process.num_steps})
    total = sum(
        (trajectory.segment_log_weight(a, b) for a, b in zip(edges, edges[1:], strict=False)),
        torch.zeros_like(trajectory.log_initial),
    )
    error = (total - trajectory.log_weight).abs().max().item()
    require(error < 1e-8, f"Expected segments to sum to the log weight; they are {error:.2g} off.")


def _tolerance(x: Tensor) -> float:
    return 1e-9 if x.dtype == torch.float64 else 2e-3


def _check_transitions(process: Process, trajectory: Trajectory) -> None:
    """One call for all steps must equal one call per step, and particles must not see each other."""
    x, score, num_steps = trajectory.x, trajectory.score, process.num_steps
    for name, kernel, shift in (("forward", process.forward, 0), ("backward", process.backward, 1)):
        with torch.no_grad():
            steps = torch.arange(num_steps, device=x.device)
            points = x[shift : num_steps + shift]
            scores = None if score is None else score[shift : num_steps + shift]
            mean, variance = kernel(steps.unsqueeze(-1), points, scores)
            require(
                mean.shape == points.shape and variance.shape[-1] in (1, process.space.dim),
                f"Expected {name} to return a mean of shape {tuple(points.shape)} and a variance of shape (..., 1) or "
                f"(..., {process.space.dim}); got {tuple(mean.shape)} and {tuple(variance.shape)}.",
            )
            require(bool((variance >= 0.0).all()), f"Expected {name} variances >= 0; got {variance.min().item():.3g}.")
            variance = variance.expand(*mean.shape[:-1], variance.shape[-1])
            for k in (0, num_steps // 2, num_steps - 1):
                for part in (slice(None), slice(0, 3)):
                    alone = kernel(steps[k], points[k, part], None if scores is None else scores[k, part])
                    pairs = ((alone[0], mean[k, part]), (alone[1], variance[k, part]))
                    error = max(((a - b).abs() / (1.0 + b.abs())).max().item() for a, b in pairs)
                    require(
                        error < _tolerance(x),
                        f"Expected {name} at step {k} to be the same alone and in a block of steps and particles; "
                        f"relative difference {error:.2g}.",
                    )
            error = (process.space.project_vector(mean - points) - (mean - points)).abs().max().item()
            require(error < 1e-4, f"Expected {name} means on the space; the projection moves them by {error:.2g}.")


def _check_declarations(process: Process, target: Target, trajectory: Trajectory, generator: torch.Generator) -> None:
    """Parameters that are declared not to exist must get no gradient; those declared must get one or none."""
    x, score = trajectory.x, trajectory.score
    require((score is not None) == process.needs_score, f"Expected needs_score={process.needs_score} to be kept.")
    parameters = [p for p in process.parameters() if p.requires_grad]
    k = torch.arange(process.num_steps, device=x.device).unsqueeze(-1)
    log_b = process.space.log_gaussian(x[:-1], *process.backward(k, x[1:], None if score is None else score[1:]))
    require(
        process.learns_backward or not _depends(log_b, parameters),
        "Expected backward kernels without parameters (learns_backward is False); their gradient would be lost.",
    )
    require(
        process.learns_initial or not _depends(process.log_initial(x[0]), parameters),
        "Expected an initial law without parameters (learns_initial is False); its gradient would be lost.",
    )
    path = simulate(process, target, 4, generator=generator, path_gradient=True)
    require(_depends(path.x[-1], parameters), "Expected a graph through the states with path_gradient=True; got none.")


def _depends(value: Tensor, parameters: Sequence[Tensor]) -> bool:
    if not value.requires_grad:
        return False
    gradients = torch.autograd.grad(value.sum(), parameters, allow_unused=True)
    return any(g is not None for g in gradients)


def _check_anchors(trajectory: Trajectory) -> None:
    anchor = trajectory.log_anchor
    require(anchor is not None, "Expected anchors in the record of a process with has_anchors=True; got None.")
    assert anchor is not None
    for name, got, expected in (
        ("initial law", anchor[0], trajectory.log_initial),
        ("target", anchor[-1], trajectory.log_terminal),
    ):
        error = (got - expected).abs().max().item()
        require(error < 1e-4, f"Expected the anchor at the end to be the {name}; it is {error:.2g} off.")


def _check_bridge(process: Process, end: Tensor, paths: int, generator: torch.Generator) -> None:
    """Draws in one step against the chain run backwards, from one end point."""
    space = process.space
    with torch.no_grad():
        end = end.expand(paths, -1).contiguous()
        x = end
        checked = {process.num_steps - 1, process.num_steps // 2, 1 if process.num_steps > 1 else 0}
        for k in range(process.num_steps - 1, -1, -1):
            mean, variance = process.backward(torch.tensor(k, device=x.device), x, None)
            noise = space.noise((paths,), like=x, generator=generator)
            x = space.project(mean + variance.sqrt() * noise)
            if k in checked:
                steps = torch.full((paths,), k, device=x.device)
                bridge = process.sample_bridge(steps, end, generator=generator)
                name = f"Expected sample_bridge at step {k} to have the law of the backward chain"
                require_same_law(name, moments(space, x), moments(space, bridge))
        last = process.sample_bridge(torch.full((paths,), process.num_steps, device=x.device), end, generator=generator)
    error = (last - end).abs().max().item()
    require(error < 1e-4, f"Expected sample_bridge at the last step to return the end point; it is {error:.2g} off.")


def _check_weights(process: Process, target: Target, paths: int, generator: torch.Generator) -> None:
    assert target.log_normalizer is not None
    x = target.sample(paths, generator=generator).to(next(process.parameters()))
    forward = simulate(process, target, paths, generator=generator).log_weight - target.log_normalizer
    backward = simulate_backward(process, target, x, generator=generator).log_weight - target.log_normalizer
    a, b = torch.sigmoid(forward), torch.sigmoid(-backward)
    error = (a.var() / paths + b.var() / paths).sqrt().item() + 1e-7
    z, limit = abs(a.mean().item() - b.mean().item()) / error, normal_quantile(FALSE_ALARM)
    require(
        z < limit,
        f"Expected forward and backward weights to cross at log Z = {target.log_normalizer:.6g}; they are {z:.1f} "
        f"standard errors off (limit {limit:.1f}). Some kernel is not the normalized density of its draws.",
    )
