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
from diffsampler.trajectory import Trajectory, ends, simulate, simulate_backward

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
    if process.has_shift:
        checks["shift"] = lambda: _check_shift(process, trajectory)
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
    points = process.point(first)
    shape = (50, process.space.dim)
    require(points.shape == shape, f"Expected sample_initial(50) of shape {shape}; got {tuple(points.shape)}.")
    require(torch.equal(first, again), "Expected equal seeds to give equal initial points; they differ.")
    dtype = next(process.parameters()).dtype
    require(first.dtype == dtype, f"Expected initial points in the dtype of the process, {dtype}; got {first.dtype}.")
    error = (process.space.project(points) - points).abs().max().item()
    require(error < 1e-5, f"Expected initial points on the space; the projection moves them by {error:.2g}.")
    log_prob = process.log_initial(first)
    require(
        log_prob.shape == (50,) and log_prob.dtype == torch.float64 and bool(log_prob.isfinite().all()),
        f"Expected log_initial finite, of shape (50,) in float64; got {tuple(log_prob.shape)}, {log_prob.dtype}.",
    )


def _check_initial_law(process: Process, paths: int, generator: torch.Generator) -> None:
    """Stein's identity, the mean of ``-y grad log p_0(y)`` counts the degrees of freedom; not for a point mass."""
    state = process.sample_initial(paths, generator=generator).detach().requires_grad_()
    log_prob = process.log_initial(state)
    if not log_prob.requires_grad:
        return
    (gradient,) = torch.autograd.grad(log_prob.sum(), state, allow_unused=True)
    if gradient is None:
        return
    parts = [(process.space, process.point)]
    if process.point(state).shape != state.shape:
        parts.append((process.drawn_space, process.drawn))
    for space, part in parts:
        score = space.project_vector(part(gradient))
        if isinstance(space, Torus) or not bool(score.any()):
            continue
        y = part(state.detach())
        counted = -(y - y.mean(0)).mul(score).sum(-1).double()
        z = abs(counted.mean().item() - space.dof) / (counted.std().item() / math.sqrt(paths))
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
    x, num_steps = trajectory.x, process.num_steps
    starts = ends(process, x, trajectory.score, slice(0, num_steps), slice(0, x.shape[1]))
    for name, kernel, (points, scores) in zip(
        ("forward", "backward"), (process.forward, process.backward), starts, strict=True
    ):
        with torch.no_grad():
            steps = torch.arange(num_steps, device=x.device)
            drawn = process.drawn(points)
            mean, variance = kernel(steps.unsqueeze(-1), points, scores)
            require(
                mean.shape == drawn.shape and variance.shape[-1] in (1, process.space.dim),
                f"Expected {name} to return a mean of shape {tuple(drawn.shape)} and a variance of shape (..., 1) or "
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
            moved = mean - drawn
            error = (process.drawn_space.project_vector(moved) - moved).abs().max().item()
            require(error < 1e-4, f"Expected {name} means on the space; the projection moves them by {error:.2g}.")


def _check_declarations(process: Process, target: Target, trajectory: Trajectory, generator: torch.Generator) -> None:
    """Parameters that are declared not to exist must get no gradient; those declared must get one or none."""
    x, score = trajectory.x, trajectory.score
    require((score is not None) == process.needs_score, f"Expected needs_score={process.needs_score} to be kept.")
    parameters = [p for p in process.parameters() if p.requires_grad]
    k = torch.arange(process.num_steps, device=x.device).unsqueeze(-1)
    (here, _), (there, seen) = ends(process, x, score, slice(0, process.num_steps), slice(0, x.shape[1]))
    log_b = process.drawn_space.log_gaussian(process.drawn(here), *process.backward(k, there, seen))
    require(
        process.learns_backward or not _depends(log_b, parameters),
        "Expected backward kernels without parameters (learns_backward is False); their gradient would be lost.",
    )
    require(
        process.learns_initial or not _depends(process.log_initial(x[0]), parameters),
        "Expected an initial law without parameters (learns_initial is False); its gradient would be lost.",
    )
    log_carried = process.log_carried(x[-1], None if score is None else score[-1])
    require(
        process.learns_carried or not _depends(log_carried, parameters),
        "Expected log_carried without parameters (learns_carried is False); its gradient would be lost.",
    )
    require(
        process.learns_shift or not _depends(process.shift(k, x[:-1]), parameters),
        "Expected a shift without parameters (learns_shift is False): losses at fixed paths cannot train it.",
    )
    path = simulate(process, target, 4, generator=generator, path_gradient=True)
    require(_depends(path.x[-1], parameters), "Expected a graph through the states with path_gradient=True; got none.")


def _check_shift(process: Process, trajectory: Trajectory) -> None:
    """The shift has an inverse, moves only what is not drawn, and keeps volumes."""
    x = trajectory.x[:-1]
    k = torch.arange(process.num_steps, device=x.device).unsqueeze(-1)
    with torch.no_grad():
        moved = process.shift(k, x)
        back = process.unshift(k, moved)
    # Angles may come back a turn away: compare points on the space.
    error = (process.space.project(process.point(back) - process.point(x))).abs().max().item()
    error = max(error, (process.drawn(back) - process.drawn(x)).abs().max().item())
    require(error < (1e-9 if x.dtype == torch.float64 else 1e-3), f"Expected unshift to undo shift; {error:.2g} off.")
    require(
        torch.equal(process.drawn(moved), process.drawn(x)),
        "Expected a shift that leaves the drawn part alone; it moved.",
    )
    # In ambient coordinates the projection of a hyperplane is singular.
    for step in {0, process.num_steps - 1} if process.space.dof == process.space.dim else ():
        index = torch.tensor(step, device=x.device)

        def shift(state: Tensor, index: Tensor = index) -> Tensor:
            return process.shift(index, state)

        jacobian = torch.autograd.functional.jacobian(shift, x[step, 0])
        volume = torch.linalg.slogdet(jacobian.double()).logabsdet.item()
        require(abs(volume) < 1e-5, f"Expected a shift of unit Jacobian; its logarithm is {volume:.2g} at step {step}.")


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
