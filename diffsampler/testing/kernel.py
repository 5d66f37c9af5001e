"""Conformance of Markov kernels."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import softplus

from diffsampler.kernel import Kernel, KernelParams
from diffsampler.space import Space, Torus
from diffsampler.testing.common import FALSE_ALARM, moments, normal_quantile, require, require_same_law

__all__ = ["check_kernel"]


def check_kernel(
    kernel: Kernel, *, generator: torch.Generator, step_size: float = 0.1, chains: int = 4096, steps: int = 8
) -> tuple[str, ...]:
    r"""Check that a kernel keeps the promises of :class:`~diffsampler.kernel.Kernel`.

    On a standard Gaussian (on a torus: von Mises angles) started from exact draws. Always: shapes and dtypes, a state
    that agrees with the density, seeds, refusal of non-finite proposals, and path weights of ``Info.log_ratio`` with
    mean one, or NaN where the kernel declares that it has none. For exact kernels: the ratio is that of the densities,
    the law stays, and so does the joint law of parameters and data of a logistic model whose data are drawn anew
    between steps (Geweke, "Getting it right: joint distribution tests of posterior simulators", 2004,
    https://doi.org/10.1198/016214504000001132), where densities are not Gaussian and differ from chain to chain.

    Arguments:
        kernel: The kernel.
        generator: Source of all randomness.
        step_size: Step size in units of the standard deviation at which the kernel moves and mostly accepts.
        chains: Number of independent chains; each statistical check fails by chance with probability 1e-6.
        steps: Number of transitions.

    Returns:
        Names of the checks that ran.

    Raises:
        AssertionError: At the first broken promise.
    """
    space, state = kernel.space, torch.get_rng_state()
    like = torch.empty(0, dtype=torch.float64, device=generator.device)
    params = KernelParams(like.new_tensor(step_size), like.new_ones(1))
    start = _exact_draws(space, chains, generator)
    _check_steps(kernel, start, params, generator)
    _check_refusal(kernel, start, params, generator)
    current, log_weight = kernel.init(start, _density(space), generator=generator), -_density(space)(start)[0]
    for _ in range(steps):
        current, info = kernel.step(current, _density(space), params, generator)
        log_weight = log_weight + info.log_ratio
    log_weight = log_weight + current.log_prob
    done = ["steps", "refusal"]
    if kernel.has_path_weight:
        weight = log_weight.exp()
        mean, error = weight.mean().item(), weight.std().item() / math.sqrt(chains)
        z, limit = abs(mean - 1.0) / (error + 1e-9), normal_quantile(FALSE_ALARM)
        require(z < limit, f"Expected path weights of mean one; got {mean:.4f} ({z:.1f} standard errors).")
        done.append("path weights")
    if kernel.exact:
        # Reversed under its own law, the ratio is that of the densities: nothing is random in the path weight.
        error = log_weight.abs().max().item()
        require(
            error < 1e-6, f"Expected log_ratio of an exact kernel to be log_prob(x) - log_prob(x'); {error:.2g} off."
        )
        name = "Expected an exact kernel to keep the law of exact draws"
        require_same_law(name, moments(space, current.x), moments(space, _exact_draws(space, chains, generator)))
        done.append("invariance")
        _check_joint_law(kernel, start, params, generator, steps=steps)
        done.append("joint law")
    require(torch.equal(state, torch.get_rng_state()), "Expected an explicit generator; the global one moved.")
    return tuple(done)


def _density(space: Space) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    if isinstance(space, Torus):
        return lambda x: (torch.cos(x).sum(-1), -torch.sin(x))
    return lambda x: (-0.5 * space.project_vector(x).square().sum(-1), -space.project_vector(x))


def _exact_draws(space: Space, n: int, generator: torch.Generator) -> Tensor:
    like = torch.empty(0, dtype=torch.float64, device=generator.device)
    if not isinstance(space, Torus):
        return space.noise((n,), like=like, generator=generator)
    shape = (n, space.dim, 60)
    angle = (2.0 * torch.rand(shape, generator=generator, dtype=like.dtype, device=like.device) - 1.0) * math.pi
    uniform = torch.rand(shape, generator=generator, dtype=like.dtype, device=like.device)
    first = (uniform.log() < torch.cos(angle) - 1.0).double().argmax(-1, keepdim=True)
    return angle.gather(-1, first).squeeze(-1)


def _check_joint_law(
    kernel: Kernel, start: Tensor, params: KernelParams, generator: torch.Generator, *, steps: int
) -> None:
    """Alternate steps of the kernel given the data with data given the parameters, from the joint law and back."""
    space = kernel.space

    def logits(x: Tensor) -> tuple[Tensor, Tensor]:
        return (1.5 * x.sin(), 1.5 * x.cos()) if isinstance(space, Torus) else (1.5 * x, torch.full_like(x, 1.5))

    def draw(x: Tensor) -> Tensor:
        uniform = torch.rand(x.shape, generator=generator, dtype=x.dtype, device=x.device)
        return (uniform < torch.sigmoid(logits(x)[0])).to(x)

    def posterior(data: Tensor) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        def density(x: Tensor) -> tuple[Tensor, Tensor]:
            log_prior, score = _density(space)(x)
            logit, slope = logits(x)
            log_likelihood = (data * logit - softplus(logit)).sum(-1)
            return log_prior + log_likelihood, score + space.project_vector(slope * (data - torch.sigmoid(logit)))

        return density

    def statistics(x: Tensor, data: Tensor) -> Tensor:
        features = moments(space, x)
        return torch.cat([features, data, (features.unsqueeze(-1) * data.unsqueeze(-2)).flatten(-2)], -1)

    state = kernel.init(start, posterior(draw(start)), generator=generator)
    for _ in range(2):
        data = draw(state.x)
        density = posterior(data)
        # What the kernel keeps beside positions is independent of the data, so it may stay.
        log_prob, score = density(state.x)
        state = state._replace(log_prob=log_prob, score=score)
        for _ in range(max(steps // 2, 1)):
            state, _ = kernel.step(state, density, params, generator)
    # With the data that led the last steps: were they drawn anew, a kernel that ignores them would pass.
    fresh = _exact_draws(space, len(start), generator)
    name = "Expected an exact kernel to keep the joint law of parameters and data"
    require_same_law(name, statistics(state.x, data), statistics(fresh, draw(fresh)))


def _check_steps(kernel: Kernel, start: Tensor, params: KernelParams, generator: torch.Generator) -> None:
    space = kernel.space
    seed = int(torch.randint(2**31, (1,), generator=generator, device=generator.device))
    x = start[:24].unflatten(0, (4, 6))
    state = kernel.init(x, _density(space), generator=generator)
    (new, info), (again, _) = (
        kernel.step(state, _density(space), params, torch.Generator(generator.device).manual_seed(seed))
        for _ in range(2)
    )
    require(torch.equal(new.x, again.x), "Expected equal seeds to give equal moves; they differ.")
    require(not torch.equal(new.x, x), "Expected the kernel to move some particle; it moved none.")
    require(torch.equal(x, start[:24].unflatten(0, (4, 6))), "Expected the state to be left unchanged; it was not.")
    for name, value, shape in (
        ("x", new.x, x.shape),
        ("log_prob", new.log_prob, x.shape[:-1]),
        ("score", new.score, x.shape),
        ("log_ratio", info.log_ratio, x.shape[:-1]),
        ("acceptance", info.acceptance, x.shape[:-1]),
        ("nonfinite", info.nonfinite, x.shape[:-1]),
    ):
        require(value.shape == shape, f"Expected {name} of shape {tuple(shape)}; got {tuple(value.shape)}.")
    require(info.log_ratio.dtype == torch.float64, f"Expected log_ratio in float64; got {info.log_ratio.dtype}.")
    require(info.evaluations >= 1, f"Expected evaluations >= 1; got {info.evaluations}.")
    inside = (info.acceptance >= 0.0) & (info.acceptance <= 1.0 + 1e-9)
    require(bool(inside.all()), "Expected acceptance probabilities in [0, 1]; got others.")
    log_prob, score = _density(space)(new.x)
    error = max((new.log_prob - log_prob).abs().max().item(), (new.score - score).abs().max().item())
    require(error < 1e-9, f"Expected a state that agrees with the density at its positions; it is {error:.2g} off.")
    if new.velocity is not None:
        require(new.velocity.shape == x.shape, f"Expected velocity of shape {tuple(x.shape)}; got another.")
        error = (space.project_vector(new.velocity) - new.velocity).abs().max().item()
        require(error < 1e-9, f"Expected velocities on the tangent space; the projection moves them by {error:.2g}.")
    if not kernel.has_path_weight:
        require(not kernel.exact, "Expected an exact kernel to have a path weight; it declares none.")
        require(bool(info.log_ratio.isnan().all()), "Expected a log_ratio of NaN without a path weight; got numbers.")
    error = (space.project(new.x) - new.x).abs().max().item()
    require(error < 1e-9, f"Expected positions on the space; the projection moves them by {error:.2g}.")


def _check_refusal(kernel: Kernel, start: Tensor, params: KernelParams, generator: torch.Generator) -> None:
    """A density that is not a number on half the space: nobody may go there, and every attempt is reported."""
    density = _density(kernel.space)

    def broken(x: Tensor) -> tuple[Tensor, Tensor]:
        log_prob, score = density(x)
        return torch.where(x[..., 0] > 0.0, log_prob, torch.full_like(log_prob, math.nan)), score

    x = start[start[:, 0] > 0.0]
    state, seen = kernel.init(x, broken, generator=generator), False
    for _ in range(5):
        state, info = kernel.step(state, broken, params, generator)
        seen = seen or bool(info.nonfinite.any())
        kept = (state.x[..., 0] > 0.0) & state.log_prob.isfinite()
        if kernel.has_path_weight:
            kept = kept & info.log_ratio.isfinite()
        require(bool(kept.all()), "Expected proposals without a finite density to be refused; some were taken.")
    require(seen, "Expected refused non-finite proposals in Info.nonfinite; none was reported.")
