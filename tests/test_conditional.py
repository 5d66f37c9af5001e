"""Amortized samplers: one process for a family of densities, exact given each context."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import F64, deviation, perturb
from torch import Tensor

import diffsampler as ds
from diffsampler.methods.conditional import ConditionalDIS, ConditionalTarget, ContextLogVariance
from diffsampler.objective import BridgeLikelihood, LogVariance
from diffsampler.space import Euclidean
from diffsampler.trajectory import simulate, simulate_backward


class LinearGaussian(ConditionalTarget):
    r"""Posteriors of :math:`x \sim N(0, I_2)` given :math:`c = a \cdot x + s\,\epsilon`; log Z(c) is Gaussian."""

    def __init__(self) -> None:
        super().__init__(Euclidean(2), 1)
        self.a = torch.tensor([1.0, 0.5], dtype=F64)
        self.noise = 0.5

    def log_prob_given(self, x: Tensor, context: Tensor) -> Tensor:
        residual = (context[..., 0] - x @ self.a.to(x)) / self.noise
        log_norm = 1.5 * math.log(2.0 * math.pi) + math.log(self.noise)
        return -0.5 * (x.square().sum(-1) + residual.square()) - log_norm

    def sample_context(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        return math.sqrt(self.variance) * torch.randn(n, 1, generator=generator, dtype=F64)

    @property
    def variance(self) -> float:
        return float(self.a.square().sum()) + self.noise**2

    def log_evidence(self, context: Tensor) -> Tensor:
        return -0.5 * (context[..., 0].square() / self.variance + math.log(2.0 * math.pi * self.variance))

    def posterior_mean(self, context: Tensor) -> Tensor:
        return context * self.a / self.variance


def make(**options) -> ConditionalDIS:
    return ConditionalDIS(LinearGaussian(), num_steps=8, width=16, **options)


def test_weights_are_exact_at_each_context():
    """E[w] = Z(c) for random parameters: 4 contexts at 4.5 standard errors of 20,000 paths, false alarm 3e-5."""
    sampler = make()
    perturb(sampler.process.double(), 0.1)
    ratios = []
    for value in (-1.0, 0.0, 0.7, 1.5):
        context = torch.tensor([value], dtype=F64)
        log_weight = sampler.sample_given(context, 20_000, seed=1).log_weight
        ratios.append((log_weight - float(sampler.target.log_evidence(context))).exp())
        assert abs(deviation(ratios[-1], 1.0)) < 4.5
    assert abs(deviation(torch.cat(ratios), 1.05)) > 4.5, "five hundredths more are told apart"


def test_forward_and_backward_paths_agree():
    sampler = make()
    process = perturb(sampler.process.double(), 0.1)
    generator = torch.Generator().manual_seed(0)
    path = simulate(process, sampler.target, 12, generator=generator)
    assert path.x.shape == (9, 12, 3)
    assert torch.equal(path.x[0, :, 2:], path.x[-1, :, 2:]), "contexts stay"
    assert torch.equal(path.x[0, :8, 2], path.x[0, :1, 2].expand(8)), "eight paths of one context"
    back = simulate_backward(process, sampler.target, path.x[-1], generator=generator)
    assert torch.equal(back.x[0, :, 2:], path.x[-1, :, 2:])
    assert back.log_weight.isfinite().all()


def test_loss_ignores_the_evidence_of_contexts():
    """Adding any function of the context to the log density changes the plain variance, not the one within contexts."""
    sampler = make()
    process = sampler.process.double()
    path = simulate(process, sampler.target, 64, generator=torch.Generator().manual_seed(0))

    shifted = replace(path, log_terminal=path.log_terminal + 3.0 * path.x[0, :, 2].sin())
    within = ContextLogVariance(2)
    assert float(within(shifted)) == pytest.approx(float(within(path)), rel=1e-10)
    assert float(LogVariance()(shifted)) > float(LogVariance()(path)) + 0.1
    groups = path.log_weight.reshape(8, 8)
    assert float(within(path)) == pytest.approx(float(groups.var(1).mean()), rel=1e-10)


def test_training_learns_the_family():
    """After a few seconds: log Z of unseen contexts within 4 of its standard errors and 0.05, means too."""
    sampler = ConditionalDIS(LinearGaussian(), num_steps=16, width=32, point_features=0)
    context = torch.linspace(-3.0, 3.0, 7).unsqueeze(-1)
    untrained = sampler.sample_given(context[-1], 2000).ess
    sampler.fit(steps=200, batch_size=128, learning_rate=5e-3)
    value, error = sampler.log_normalizer_given(context, paths=512)
    truth = sampler.target.log_evidence(context).double()
    assert float((value - truth).abs().max()) < 0.05 + 4.0 * float(error.max())
    particles = sampler.sample_given(context[-1], 4000)
    assert particles.ess > max(1500.0, 1.5 * untrained)
    mean, mcse = particles.expectation(particles.x)
    expected = sampler.target.posterior_mean(context[-1].double())
    assert bool(((mean - expected).abs() < 5.0 * mcse + 1e-3).all())


def test_one_context_is_an_ordinary_target():
    family = LinearGaussian()
    target = family.given(torch.tensor([1.5], dtype=F64))
    fit = ds.sample(target, method="smc", num_samples=2000)
    truth = float(family.log_evidence(torch.tensor([1.5])))
    assert fit.log_normalizer.value == pytest.approx(truth, abs=0.1)
    x = torch.randn(4, 2, dtype=F64)
    log_prob, score = target.log_prob_and_score(x)
    y = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(target.log_prob(y).sum(), y)
    assert torch.allclose(score, expected) and torch.allclose(log_prob, target.log_prob(x))


def test_bridges_keep_the_context():
    sampler = make(objective=BridgeLikelihood())
    x = torch.cat([torch.randn(200, 2), torch.randn(200, 1)], 1)
    sampler.fit(steps=3, batch_size=16, bank=x)
    assert len(sampler.history) >= 1


def test_bad_input_is_refused():
    with pytest.raises(TypeError, match="Expected a ConditionalTarget; got Gaussian"):
        ConditionalDIS(ds.targets.Gaussian([0.0, 0.0], scale=1.0))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Expected repeats >= 2"):
        make(repeats=1)
    with pytest.raises(ValueError, match=r"Expected a context of shape \(1,\); got \(2,\)"):
        make().sample_given(torch.zeros(2), 10)
    with pytest.raises(ValueError, match=r"Expected a context of shape \(1,\)"):
        LinearGaussian().given(torch.zeros(3))


# The table of families


@pytest.fixture
def families(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "experiments"))
    import conditional_table

    return conditional_table


def test_answers_of_the_linear_family_are_those_of_plain_quadrature(families):
    """Moments of 200,000 prior draws weighted by their likelihood, at 5 standard errors of log Z: 6e-7."""
    family = families.LinearGaussian()
    context = torch.tensor([0.4, -0.8, 0.3], dtype=F64)
    exact = family.answer(context)
    x = torch.randn(200_000, 4, generator=torch.Generator().manual_seed(0), dtype=F64)
    log_prior = -0.5 * x.square().sum(-1) - 2.0 * math.log(2.0 * math.pi)
    log_weight = family.log_prob_given(x, context.expand(len(x), -1)) - log_prior
    weight = log_weight.exp()
    error = float(weight.std() / weight.mean()) / math.sqrt(len(x))
    assert abs(float(weight.mean().log()) - exact.log_evidence) < 5.0 * error
    share = weight / weight.sum()
    mean = share @ x
    assert torch.allclose(mean, exact.mean, atol=0.05)
    assert torch.allclose((share.unsqueeze(-1) * (x - mean)).mT @ (x - mean), exact.covariance, atol=0.05)


def test_the_table_of_families_runs_and_goes_on(families, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(families, "CASES", {"vae": lambda: families.Latents(steps=30)})
    small = families.Settings(steps=3, batch_size=16, num_steps=4, contexts=2, draws=100)
    monkeypatch.setattr(families, "Settings", lambda steps: small)
    monkeypatch.setattr(families.Settings, "steps", 3, raising=False)
    for _ in range(2):
        monkeypatch.setattr(
            "sys.argv", ["conditional_table.py", "--seeds", "1", "--steps", "3", "--out", str(tmp_path)]
        )
        families.main()
    (row,) = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
    assert len(row["contexts"]) == 2 and all(0.0 < c["ess_fraction"] <= 1.0 for c in row["contexts"])
    # Errors of log Z are within its noise even of an untrained network: weights are exact (5 standard errors).
    assert all(c["elbo_gap"] > -5.0 * c["std_error"] for c in row["contexts"])
    assert "vae" in (tmp_path / "table.txt").read_text() and capsys.readouterr().out.count("vae") == 3
