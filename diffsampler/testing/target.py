"""Conformance of targets."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from diffsampler.space import Euclidean, EuclideanTorus, MeanFree, Space, Torus
from diffsampler.target import Target
from diffsampler.testing.common import FALSE_ALARM, normal_quantile, require

__all__ = ["check_target"]


def check_target(
    target: Target, *, generator: torch.Generator, points: Tensor | None = None, draws: int = 4096
) -> tuple[str, ...]:
    r"""Check that a target keeps the promises of :class:`~diffsampler.target.Target`.

    Always: any batch shape, both dtypes, no change of the input, fused score equal to autograd and to finite
    differences, symmetries of the space, ``constrain``. Where declared: the sampler (seeded, without the global
    generator, and distributed as the density by Stein's identity :math:`E_\pi[(x_i - c_i) \partial_i \log\pi] = -1`),
    the normalizer (bridge sampling between the target's draws and a Gaussian per mode, where these overlap enough for
    a standard error of 0.1), the mode labels and weights, and the prior.

    Arguments:
        target: The target.
        generator: Source of all randomness.
        points: Points with finite density, ``(n, D)`` float64; by default exact samples of the target or its prior,
            else standard Gaussian noise on the space.
        draws: Number of samples in the statistical checks; each fails by chance with probability 1e-6.

    Returns:
        Names of the checks that ran.

    Raises:
        AssertionError: At the first broken promise.
    """
    x = (_default_points(target, generator) if points is None else points).detach().double()
    require(
        x.ndim == 2 and x.shape[-1] == target.dim and len(x) >= 2,
        f"Expected at least two points of shape (n, {target.dim}); got {tuple(x.shape)}.",
    )
    checks: dict[str, Callable[[], None]] = {
        "batch shapes": lambda: _check_shapes(target, x),
        "precision": lambda: _check_precision(target, x),
        "score": lambda: _check_score(target, x, generator),
        "space": lambda: _check_space(target, x),
        "constrain": lambda: _check_constrain(target, x),
    }
    if target.log_normalizer is not None:
        checks["declared normalizer"] = lambda: require(
            isinstance(target.log_normalizer, float) and math.isfinite(target.log_normalizer),
            f"Expected log_normalizer to be a finite float or None; got {target.log_normalizer!r}.",
        )
    if target.has_sampler:
        checks["sampler"] = lambda: _check_sampler(target, generator)
        checks["sampler against density"] = lambda: _check_stein(target, draws, generator)
    if target.num_modes is not None:
        checks["modes"] = lambda: _check_modes(target, x, draws, generator)
    if target.prior is not None:
        checks["prior"] = lambda: _check_prior(target, draws, generator)
    for check in checks.values():
        check()
    done = list(checks)
    if target.has_sampler and target.log_normalizer is not None and isinstance(target.space, Euclidean):
        done += ["normalizer"] if _check_normalizer(target, draws, generator) else []
    return tuple(done)


def _default_points(target: Target, generator: torch.Generator) -> Tensor:
    if target.has_sampler:
        return target.sample(64, generator=generator)
    if target.prior is not None and target.prior.has_sampler:
        return target.prior.sample(64, generator=generator)
    like = torch.empty(0, dtype=torch.float64, device=generator.device)
    return target.space.project(target.space.noise((64,), like=like, generator=generator))


def _worst(a: Tensor, b: Tensor) -> float:
    """Largest difference relative to one plus the magnitude."""
    return ((a - b).abs() / (1.0 + b.abs())).max().item()


def _check_shapes(target: Target, x: Tensor) -> None:
    before, count = x.clone(), len(x) - len(x) % 2
    with torch.no_grad():
        flat = target.log_prob(x)
    require(torch.equal(before, x), "Expected log_prob to leave its input unchanged; it was written to.")
    require(flat.shape == x.shape[:1], f"Expected log_prob of shape {tuple(x.shape[:1])}; got {tuple(flat.shape)}.")
    bad = ~torch.isfinite(flat)
    require(not bad.any(), f"Expected log_prob to be finite at all points; got {bad.sum().item()} values that are not.")
    for view in (x[0], x[:1], x[:0], x[:count].unflatten(0, (2, -1)), x[:count].unflatten(0, (2, 1, -1))):
        shape = tuple(view.shape[:-1])
        with torch.no_grad():
            value = target.log_prob(view)
        fused, score = target.log_prob_and_score(view)
        require(
            value.shape == shape, f"Expected log_prob of shape {shape} for batch {shape}; got {tuple(value.shape)}."
        )
        require(
            fused.shape == shape and score.shape == view.shape,
            f"Expected log_prob_and_score of shapes {shape} and {tuple(view.shape)}; "
            f"got {tuple(fused.shape)} and {tuple(score.shape)}.",
        )
        if view.numel():
            error = _worst(value.reshape(-1), flat[: value.numel()])
            require(error < 1e-9, f"Expected the same log_prob in any batch shape; got {error:.2g} off for {shape}.")


def _check_precision(target: Target, x: Tensor) -> None:
    single = x.float()
    for dtype, points in ((torch.float64, x), (torch.float32, single)):
        log_prob, score = target.log_prob_and_score(points)
        with torch.no_grad():
            plain = target.log_prob(points)
        got = (plain.dtype, log_prob.dtype, score.dtype)
        require(got == (dtype,) * 3, f"Expected results in the dtype of x, {dtype}; got {got}.")
    # Compared at the rounded points, so only the arithmetic differs.
    exact, exact_score = target.log_prob_and_score(single.double())
    log_prob, score = target.log_prob_and_score(single)
    error = _worst(log_prob.double(), exact)
    require(error < 1e-3, f"Expected float32 and float64 log_prob to agree; relative difference {error:.2g}.")
    size = 1.0 + exact_score.abs().amax(-1, keepdim=True)
    error = ((score.double() - exact_score).abs() / size).max().item()
    require(error < 1e-3, f"Expected float32 and float64 scores to agree; relative difference {error:.2g}.")


def _check_score(target: Target, x: Tensor, generator: torch.Generator) -> None:
    log_prob, score = target.log_prob_and_score(x)
    require(
        not (log_prob.requires_grad or score.requires_grad), "Expected log_prob_and_score to return no graph; it did."
    )
    bad = ~torch.isfinite(score).all(-1)
    require(not bad.any(), f"Expected a finite score at all points; got {bad.sum().item()} points where it is not.")
    with torch.no_grad():
        error = _worst(log_prob, target.log_prob(x))
    require(error < 1e-9, f"Expected log_prob_and_score to return log_prob; relative difference {error:.2g}.")
    auto = target.score(x, create_graph=True).detach()
    size = 1.0 + auto.abs().amax(-1, keepdim=True)
    error = ((score - auto).abs() / size).max().item()
    require(error < 1e-8, f"Expected the fused score to equal autograd; relative difference {error:.2g}.")
    # A detached or in-place operation deceives autograd as well; finite differences see it.
    space = target.space
    spread = x.std(0) if isinstance(space, Euclidean) else x.new_ones(())
    v = space.project_vector(spread * torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device))
    v = 1e-4 * v / (1.0 + (score * v).abs().amax(-1, keepdim=True))
    with torch.no_grad():
        slope = (target.log_prob(x + v) - target.log_prob(x - v)) / 2.0
    error_each = (slope - (score * v).sum(-1)).abs()
    wrong = error_each > 1e-2 * (score * v).abs().sum(-1) + 1e-12 * (1.0 + log_prob.abs()) + 1e-7
    require(
        wrong.double().mean().item() <= 0.2,
        f"Expected autograd to match finite differences of log_prob; got {wrong.sum().item()} of {len(x)} points that "
        "do not. Look for detach, in-place or rounding operations in log_prob.",
    )


def _check_space(target: Target, x: Tensor) -> None:
    space = target.space
    if isinstance(space, Torus | EuclideanTorus):
        turn = torch.full_like(x, 2.0 * math.pi)
        turn[..., : space.n if isinstance(space, EuclideanTorus) else 0] = 0.0
        with torch.no_grad():
            error = _worst(target.log_prob(x + turn), target.log_prob(x))
        require(error < 1e-8, f"Expected log_prob to have period 2 pi on a Torus; got a difference of {error:.2g}.")
    if isinstance(space, MeanFree):
        shift = x.new_ones(space.n, space.d).flatten()
        with torch.no_grad():
            error = _worst(target.log_prob(x + shift), target.log_prob(x))
        require(error < 1e-8, f"Expected log_prob not to change under translation on MeanFree; got {error:.2g}.")


def _check_constrain(target: Target, x: Tensor) -> None:
    for name, value in target.constrain(x).items():
        require(
            value.shape[:1] == x.shape[:1],
            f"Expected constrain to keep the particle axis of length {len(x)} first; got {tuple(value.shape)} "
            f"for {name!r}.",
        )
        require(bool(torch.isfinite(value).all()), f"Expected finite constrained values; got others for {name!r}.")


def _check_sampler(target: Target, generator: torch.Generator) -> None:
    seed = int(torch.randint(2**31, (1,), generator=generator, device=generator.device))
    state = torch.get_rng_state()

    def draw(n: int) -> Tensor:
        return target.sample(n, generator=torch.Generator(generator.device).manual_seed(seed))

    first, again, single = draw(50), draw(50), draw(1)
    require(
        first.shape == (50, target.dim) and single.shape == (1, target.dim),
        f"Expected sample(50) of shape (50, {target.dim}); got {tuple(first.shape)}.",
    )
    require(first.dtype == torch.float64, f"Expected samples in float64; got {first.dtype}.")
    require(bool(torch.isfinite(first).all()), "Expected finite samples; got some that are not.")
    require(torch.equal(first, again), "Expected equal seeds to give equal samples; they differ.")
    other = target.sample(50, generator=generator)
    require(not torch.equal(first, other), "Expected other seeds to give other samples; they are equal.")
    require(torch.equal(state, torch.get_rng_state()), "Expected sample to leave the global generator alone; it moved.")
    error = _worst(target.space.project(first), first)
    require(error < 1e-9, f"Expected samples on the space; the projection moves them by {error:.2g}.")


def _check_stein(target: Target, draws: int, generator: torch.Generator) -> None:
    x = target.sample(draws, generator=generator)
    score = target.log_prob_and_score(x)[1]
    values = _stein_values(target.space, x, score)
    z = values.mean(0) / (values.std(0) / math.sqrt(draws) + 1e-12)
    limit = normal_quantile(FALSE_ALARM / values.shape[-1])
    worst = int(z.abs().argmax())
    require(
        z.abs().max().item() < limit,
        f"Expected samples to follow the density; Stein's identity fails in coordinate {worst % target.dim} by "
        f"{z.abs().max().item():.1f} standard errors (limit {limit:.1f}).",
    )


def _stein_values(space: Space, x: Tensor, score: Tensor) -> Tensor:
    """Functions ``(n, S)`` whose expectation under the density is zero by partial integration."""
    if isinstance(space, EuclideanTorus):
        sizes = (space.n, space.m)
        factors = zip((Euclidean(space.n), Torus(space.m)), x.split(sizes, -1), score.split(sizes, -1), strict=True)
        return torch.cat([_stein_values(*factor) for factor in factors], -1)
    if isinstance(space, Torus):
        # Periodic functions have no boundary terms: E[f' + f s] = 0 for f = 1, sin, cos.
        return torch.cat([score, x.cos() + x.sin() * score, x.cos() * score - x.sin()], -1)
    center = x.median(0).values
    # The score alone must average to zero as well, which sees shifts.
    width = (x - center).abs().median(0).values
    # A coordinate of the mean-free hyperplane moves by 1 - 1/n along its own projection.
    slope = 1.0 - 1.0 / space.n if isinstance(space, MeanFree) else 1.0
    return torch.cat([(x - center) * score + slope, width * score], -1)


def _check_modes(target: Target, x: Tensor, draws: int, generator: torch.Generator) -> None:
    count = target.num_modes
    assert count is not None
    labels, weights = target.mode_labels(x), target.mode_weights()
    require(labels.shape == x.shape[:1], f"Expected labels of shape {tuple(x.shape[:1])}; got {tuple(labels.shape)}.")
    require(labels.dtype == torch.int64, f"Expected labels in int64; got {labels.dtype}.")
    inside = (labels >= 0) & (labels < count)
    require(bool(inside.all()), f"Expected labels in [0, {count}); got {labels[~inside][:1].tolist()}.")
    require(target.mode_labels(x[0]).shape == (), "Expected a label without batch axes for a single point.")
    require(
        weights.shape == (count,) and weights.dtype == torch.float64,
        f"Expected mode_weights of shape ({count},) in float64; got {tuple(weights.shape)}, {weights.dtype}.",
    )
    total = weights.sum().item()
    require(
        bool((weights >= 0).all()) and abs(total - 1.0) < 1e-6,
        f"Expected mode_weights to be probabilities; they sum to {total:.6g}.",
    )
    if target.has_sampler:
        found = torch.bincount(target.mode_labels(target.sample(draws, generator=generator)), minlength=count)
        error = (weights * (1.0 - weights) * draws).sqrt()
        # Binomial tails are wider than Gaussian ones where few points are expected: two counts of slack.
        z = ((found - draws * weights).abs() - 2.0).clamp_min(0.0) / (error + 1e-12)
        worst, limit = int(z.argmax()), normal_quantile(FALSE_ALARM / count)
        require(
            z.max().item() < limit,
            f"Expected a share of {weights[worst].item():.4f} of samples in mode {worst}; "
            f"got {found[worst].item() / draws:.4f} ({z.max().item():.1f} standard errors).",
        )


def _check_prior(target: Target, draws: int, generator: torch.Generator) -> None:
    prior = target.prior
    assert prior is not None
    require(prior.space == target.space, f"Expected the prior on {target.space}; got {prior.space}.")
    require(prior.has_sampler, "Expected the prior to have an exact sampler; has_sampler is False.")
    require(prior.log_normalizer == 0.0, f"Expected a normalized prior (log_normalizer 0); got {prior.log_normalizer}.")
    check_target(prior, generator=generator, draws=draws)
    x = prior.sample(64, generator=generator)
    with torch.no_grad():
        finite = torch.isfinite(target.log_prob(x) - prior.log_prob(x))
    require(bool(finite.all()), "Expected a finite log likelihood at prior draws; got some that are not.")


def _check_normalizer(target: Target, draws: int, generator: torch.Generator) -> bool:
    """Bennett's acceptance ratio between exact samples and a Gaussian per mode; False where they hardly overlap."""
    assert target.log_normalizer is not None
    fit, x = target.sample(draws, generator=generator), target.sample(draws, generator=generator)
    labels = target.mode_labels(fit) if target.num_modes else torch.zeros(draws, dtype=torch.int64, device=fit.device)
    groups = [fit[labels == k] for k in range(target.num_modes or 1)]
    groups = [g for g in groups if len(g) > 4 * target.dim]
    if not groups:
        return False
    shares = torch.tensor([len(g) for g in groups], dtype=torch.float64, device=fit.device)
    shares = shares / shares.sum()
    means = torch.stack([g.mean(0) for g in groups])
    factors, info = torch.linalg.cholesky_ex(torch.stack([g.mT.cov().reshape(target.dim, -1) for g in groups]))
    if (info != 0).any():
        return False
    index = torch.multinomial(shares, draws, replacement=True, generator=generator)
    z = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
    y = means[index] + (factors[index] @ z.unsqueeze(-1)).squeeze(-1)

    def ratio(points: Tensor) -> Tensor:
        delta = (points.unsqueeze(-2) - means).unsqueeze(-1)
        white = torch.linalg.solve_triangular(factors.expand(len(points), -1, -1, -1), delta, upper=False).squeeze(-1)
        log_scale = factors.diagonal(dim1=-2, dim2=-1).log().sum(-1) + 0.5 * target.dim * math.log(2.0 * math.pi)
        with torch.no_grad():
            return target.log_prob(points) - torch.logsumexp(
                shares.log() - log_scale - 0.5 * white.square().sum(-1), -1
            )

    value, error = _acceptance_ratio(ratio(x), ratio(y))
    if not error < 0.1:
        return False
    z_score = abs(value - target.log_normalizer) / error
    limit = normal_quantile(FALSE_ALARM)
    require(
        z_score < limit,
        f"Expected log_normalizer {target.log_normalizer:.6g} to agree with the density and its samples; bridge "
        f"sampling gives {value:.6g} +- {error:.2g} ({z_score:.1f} standard errors).",
    )
    return True


def _acceptance_ratio(target_ratio: Tensor, proposal_ratio: Tensor) -> tuple[float, float]:
    """``log Z`` and its standard error from ``log rho - log q`` at equally many samples of both densities.

    Reference: Bennett, "Efficient estimation of free energy differences from Monte Carlo data" (1976,
    https://doi.org/10.1016/0021-9991(76)90078-4).
    """
    both = torch.cat([target_ratio, proposal_ratio])
    low, high = both.min(), both.max()
    for _ in range(100):
        middle = 0.5 * (low + high)
        excess = torch.sigmoid(proposal_ratio - middle).sum() - torch.sigmoid(middle - target_ratio).sum()
        low, high = (middle, high) if excess > 0 else (low, middle)
    n = target_ratio.numel()
    overlap = (0.5 / (1.0 + torch.cosh((both - low).clamp(-500.0, 500.0)))).sum().item()
    return low.item(), math.sqrt(max(1.0 / overlap - 2.0 / n, 1e-12)) if overlap > 0 else math.inf
