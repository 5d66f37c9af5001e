"""Exact kernels are exact: energy distances, ranks among their own chains, calibration of a hierarchical posterior.

Three tests of growing strength, each with controls that must fail: exact draws of a mixture stay exact (permutation
test of the energy distance); the truth has a uniform rank at a random place of a stationary chain (Gandy & Scott, "Unit
testing for MCMC and other Monte Carlo methods", 2020, https://arxiv.org/abs/2001.06465), which holds at any length
and needs no convergence; simulation-based calibration (Talts et al., 2018, https://arxiv.org/abs/1804.06788).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from kernel_cases import F64, KERNELS, gaussian, mixture, mixture_draws, names_on, normal, permutation_p, run
from torch import Tensor

from diffsampler.kernel import Info, Kernel, KernelParams, LogDensity, State
from diffsampler.kernels import HMC, MALA, MAMS, ULA, EllipticalSlice
from diffsampler.kernels.metropolis import metropolis
from diffsampler.space import Euclidean, MeanFree, Space, Torus
from diffsampler.testing import check_kernel

EXACT = ["mala", "hmc", "ghmc", "mams", "barker", "random_walk", "elliptical", "mymala"]


class EnergyOnly(Kernel):
    """A wrong MALA: the Langevin proposal accepted by the energies alone."""

    exact = True
    target_acceptance = 0.574

    def step(self, state, log_density, params, generator=None):
        proposal, _ = ULA(self.space).step(state, log_density, params, generator)
        log_accept = proposal.log_prob - state.log_prob
        broken = torch.zeros_like(log_accept, dtype=torch.bool)
        state, acceptance, log_ratio = metropolis(state, proposal, log_accept, broken=broken, generator=generator)
        return state, Info(log_ratio, acceptance, 1, broken)


# Energy distance


@pytest.mark.parametrize("name", EXACT)
def test_exact_draws_stay_exact(name: str):
    maker, step_size = KERNELS[name]
    state, _ = run(maker(Euclidean(2)), mixture_draws(500, 1), mixture, step_size, steps=40)
    # False alarm 1e-3 per case.
    assert permutation_p(state.x, mixture_draws(500, 2)) > 1e-3


def test_energy_distance_sees_an_energy_only_acceptance():
    state, _ = run(EnergyOnly(Euclidean(2)), normal(500, 2), gaussian, 0.2, steps=40)
    assert permutation_p(state.x, normal(500, 2, seed=2)) <= 1e-3


# A small hierarchical model


class EightSchoolsLike:
    r"""Data of simulations ``y (m, 3)``: :math:`y_j \sim N(\theta_j, 1)`, :math:`\theta_j \sim N(\mu, \tau^2)`.

    Parameters ``x = (mu, log tau, theta)`` with :math:`\mu \sim N(0, 1)`, :math:`\log\tau \sim N(-0.5, 0.5^2)`.
    """

    space = Euclidean(5)

    def __init__(self, m: int, generator: torch.Generator) -> None:
        noise = torch.randn(m, 8, generator=generator, dtype=F64)
        mu, log_tau = noise[:, :1], -0.5 + 0.5 * noise[:, 1:2]
        theta = mu + log_tau.exp() * noise[:, 2:5]
        self.truth = torch.cat([mu, log_tau, theta], -1)
        self.y = theta + noise[:, 5:]

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mu, log_tau, theta = x[:, :1], x[:, 1:2], x[:, 2:]
        precision = torch.exp(-2.0 * log_tau)
        away, error = theta - mu, self.y - theta
        log_prob = -0.5 * (mu.square() + 4.0 * (log_tau + 0.5).square() + 6.0 * log_tau)
        log_prob = log_prob - 0.5 * (precision * away.square() + error.square()).sum(-1, keepdim=True)
        score_mu = -mu + (precision * away).sum(-1, keepdim=True)
        score_tau = -4.0 * (log_tau + 0.5) - 3.0 + (precision * away.square()).sum(-1, keepdim=True)
        score = torch.cat([score_mu, score_tau, error - precision * away], -1)
        return log_prob.squeeze(-1), score


SCALE = torch.tensor([0.7, 0.4, 0.7, 0.7, 0.7], dtype=F64)
STEPS = {
    "mala": 0.15,
    "hmc": 0.35,
    "ghmc": 0.35,
    "mams": 0.4,
    "barker": 0.8,
    "random_walk": 0.8,
    "mymala": 0.15,
    "elliptical": 1.0,
}


def statistics(x: Tensor, log_prob: Tensor) -> Tensor:
    """What is ranked: the hyperparameters, a school, and the density."""
    return torch.cat([x[:, :3], log_prob.unsqueeze(-1)], -1)


def walk(
    kernel: Kernel,
    density: LogDensity,
    state: State,
    step_size: float,
    generator: torch.Generator,
    *,
    n: int,
    thin: int,
) -> Tensor:
    """Statistics of the start and ``n`` later states, ``(n + 1, m, S)``."""
    sizes = KernelParams(torch.tensor(step_size, dtype=F64), SCALE)
    out = [statistics(state.x, state.log_prob)]
    for _ in range(n):
        for _ in range(thin):
            state, _ = kernel.step(state, density, sizes, generator)
        out.append(statistics(state.x, state.log_prob))
    return torch.stack(out)


def rank_p_values(ranks: Tensor, n: int) -> Tensor:
    """p-values of uniformity on ``0 .. n`` by chi-squared, one for each statistic of ``ranks (m, S)``."""
    count = torch.stack([(ranks == k).sum(0) for k in range(n + 1)]).double()
    expected = ranks.shape[0] / (n + 1)
    chi = ((count - expected).square() / expected).sum(0)
    return torch.special.gammaincc(torch.full_like(chi, 0.5 * n), 0.5 * chi)


def unit_test_ranks(kernel: Kernel, step_size: float, *, m: int, n: int = 9, thin: int = 4, seed: int = 0) -> Tensor:
    """Ranks of the truth in chains of which it is the start at a random place, ``(m, S)``.

    A chain to the past of a kernel that is reversible up to a flip of velocities is a chain to the future.
    """
    generator = torch.Generator().manual_seed(seed)
    model = EightSchoolsLike(m, generator)
    start = kernel.init(model.truth, model, generator=generator)
    past = start if start.velocity is None else start._replace(velocity=-start.velocity)
    ahead, behind = (walk(kernel, model, state, step_size, generator, n=n, thin=thin) for state in (start, past))
    place = torch.randint(n + 1, (m,), generator=generator)
    return _rank(ahead, behind, place, generator)


def _rank(ahead: Tensor, behind: Tensor, place: Tensor, generator: torch.Generator) -> Tensor:
    """Rank of the start among ``place`` states of the past and the rest of the future, ties broken at random."""
    n, truth = ahead.shape[0] - 1, ahead[0]
    index = torch.arange(1, n + 1).unsqueeze(-1)
    less, equal = torch.zeros_like(truth), torch.zeros_like(truth)
    for chain, size in ((behind[1:], place), (ahead[1:], n - place)):
        inside = (index <= size).unsqueeze(-1)
        less = less + (inside & (chain < truth)).sum(0)
        equal = equal + (inside & (chain == truth)).sum(0)
    uniform = torch.rand(truth.shape, generator=generator, dtype=F64)
    return less + (uniform * (equal + 1.0)).floor()


def wide_ellipse(space: Euclidean) -> EllipticalSlice:
    """A Gaussian factor near the prior of the hierarchical model."""
    mean = torch.tensor([0.0, -0.5, 0.0, 0.0, 0.0], dtype=F64)
    return EllipticalSlice(space, scale=torch.tensor([1.0, 0.5, 1.3, 1.3, 1.3], dtype=F64), mean=mean)


# A number of steps that all chains share would make their ranks dependent, which the chi-squared law is not made for.
MAKERS: dict[str, Callable[[Euclidean], Kernel]] = {
    "elliptical": wide_ellipse,
    "hmc": lambda space: HMC(space, num_steps=3, jitter_steps=False, smallest_step=0.5),
    "mams": lambda space: MAMS(space, num_steps=3, jitter_steps=False),
}


def kernel_for(name: str) -> tuple[Kernel, float]:
    maker = MAKERS.get(name, KERNELS[name][0])
    return maker(EightSchoolsLike.space), STEPS[name]


@pytest.mark.parametrize("name", EXACT)
def test_truth_ranks_uniformly_in_stationary_chains(name: str):
    kernel, step_size = kernel_for(name)
    # Four p-values of a chi-squared test with 2000 ranks in 10 bins: false alarm 4e-4 per case.
    assert float(rank_p_values(unit_test_ranks(kernel, step_size, m=2000), 9).min()) > 1e-4


@pytest.mark.parametrize(("kernel", "step_size"), [(ULA(Euclidean(5)), 0.15), (EnergyOnly(Euclidean(5)), 0.15)])
def test_ranks_see_wrong_kernels(kernel: Kernel, step_size: float):
    assert float(rank_p_values(unit_test_ranks(kernel, step_size, m=2000), 9).min()) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("name", EXACT)
def test_calibration_of_a_hierarchical_posterior(name: str):
    kernel, step_size = kernel_for(name)
    generator = torch.Generator().manual_seed(11)
    model = EightSchoolsLike(1000, generator)
    # Chains that start from the prior, far from the truth, and forget it.
    start = kernel.init(EightSchoolsLike(1000, generator).truth, model, generator=generator)
    chain = walk(kernel, model, start, step_size, generator, n=29, thin=20 if name == "elliptical" else 100)[11:]
    truth = statistics(model.truth, model(model.truth)[0])
    # 19 draws after a burn-in of 1100 steps (220 ellipses); 20 bins, four p-values: false alarm 4e-4 per case.
    assert float(rank_p_values((chain < truth).sum(0), 19).min()) > 1e-4


@pytest.mark.slow
def test_calibration_sees_a_biased_kernel():
    generator = torch.Generator().manual_seed(11)
    model = EightSchoolsLike(1000, generator)
    kernel = EnergyOnly(Euclidean(5))
    start = kernel.init(EightSchoolsLike(1000, generator).truth, model)
    chain = walk(kernel, model, start, 0.15, generator, n=29, thin=100)[11:]
    truth = statistics(model.truth, model(model.truth)[0])
    assert float(rank_p_values((chain < truth).sum(0), 19).min()) < 1e-6


# The suite for users: joint law of parameters and data


SPACES = [Euclidean(3), MeanFree(4, 2), Torus(2)]


@pytest.mark.parametrize(("space", "name"), [(space, name) for space in SPACES for name in names_on(space)])
def test_every_kernel_conforms_on_every_space(space: Space, name: str):
    maker, step_size = KERNELS[name]
    kernel = maker(space)
    done = check_kernel(kernel, generator=torch.Generator().manual_seed(0), step_size=step_size, chains=2048)
    wanted = {"steps", "refusal"} | ({"path weights"} if kernel.has_path_weight else set())
    assert set(done) == wanted | ({"invariance", "joint law"} if kernel.exact else set())
    assert kernel.exact == (name in EXACT)


def test_joint_law_finds_a_kernel_that_is_right_on_gaussians_only():
    class GaussianOnly(Kernel):
        """Leaves N(0, I) alone, whatever density it is given."""

        exact = True
        target_acceptance = 0.5

        def step(self, state, log_density, params, generator=None):
            def standard(x: Tensor) -> tuple[Tensor, Tensor]:
                return -0.5 * x.square().sum(-1), -x

            exact = HMC(self.space, num_steps=2)
            real = state._replace(log_prob=standard(state.x)[0], score=-state.x)
            new, info = exact.step(real, standard, params, generator)
            log_prob, score = log_density(new.x)
            bad = ~log_prob.isfinite()
            new = new._replace(
                x=torch.where(bad.unsqueeze(-1), state.x, new.x),
                log_prob=torch.where(bad, state.log_prob, log_prob),
                score=torch.where(bad.unsqueeze(-1), state.score, score),
            )
            return new, Info((state.log_prob - new.log_prob).double(), info.acceptance, 2, bad)

    with pytest.raises(AssertionError, match="joint law of parameters and data"):
        check_kernel(GaussianOnly(Euclidean(3)), generator=torch.Generator().manual_seed(0), step_size=0.5)


def test_suite_refuses_ratios_without_a_path_weight():
    class Guess(MALA.__base__):
        exact = False
        has_path_weight = False
        target_acceptance = 1.0

        def step(self, state, log_density, params, generator=None):
            return ULA(self.space).step(state, log_density, params, generator)

    with pytest.raises(AssertionError, match="Expected a log_ratio of NaN without a path weight"):
        check_kernel(Guess(Euclidean(2)), generator=torch.Generator().manual_seed(0))
