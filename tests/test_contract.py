"""The public interface, line by line, as a script outside the repository would use it."""

from __future__ import annotations

import importlib
import inspect
import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import diffsampler as ds
from diffsampler import baselines, targets

LOG_Z = math.log(2.0 * math.pi)


def energy(x):
    return 0.5 * x.square().sum(-1)


def regression(features, y):
    slope = pyro.sample("slope", dist.Normal(0.0, 2.0).expand([2]).to_event(1))
    noise = pyro.sample("noise", dist.LogNormal(0.0, 0.5))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(features @ slope, noise), obs=y)


@pytest.fixture
def target():
    return ds.Target.from_log_prob(lambda x: -energy(x), dim=2)


@pytest.fixture(scope="module")
def fit():
    """One answer of the default method, with short training: what a fit offers is asked of it below."""
    with pytest.MonkeyPatch.context() as patch:
        refine = importlib.import_module("diffsampler.refinement.stages")
        patch.setattr(refine, "BRIDGE_COUNT", 20)
        patch.setattr(refine, "POLISH_COUNT", 10)
        return ds.sample(ds.Target.from_log_prob(lambda x: -energy(x), dim=2), num_samples=4000, seed=0)


def test_names_are_exported():
    methods = "PIS DDS DIS CMCD Sampler sample Budget"
    names = f"Target Euclidean MeanFree Torus Particles Estimate {methods} Fit Finding load pyro"
    assert [name for name in names.split() if not hasattr(ds, name)] == []
    assert isinstance(ds.__version__, str)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ds.nothing


@pytest.mark.parametrize(
    "build",
    [
        lambda: ds.Target.from_log_prob(lambda x: -0.5 * x.square().sum(-1), dim=2),
        lambda: ds.Target.from_energy(energy, dim=2),
        lambda: targets.GaussianMixture.grid(9),
        lambda: targets.Funnel(dim=10, scale=3.0),
        lambda: targets.ManyWell(dim=32),
    ],
    ids=["log_prob", "energy", "grid", "funnel", "manywell"],
)
def test_targets(build):
    built = build()
    x = torch.randn(4, 3, built.dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert built.log_prob(x).shape == (4, 3)
    assert built.score(x).shape == x.shape
    torch.testing.assert_close(built.energy(x), -built.log_prob(x))
    assert built.log_normalizer is None or isinstance(built.log_normalizer, float)
    if built.has_sampler:
        assert built.sample(7, generator=torch.Generator().manual_seed(0)).shape == (7, built.dim)


def test_energy_has_the_opposite_sign():
    x = torch.ones(1, 2)
    assert ds.Target.from_energy(energy, dim=2).log_prob(x).item() == -1.0


def test_signature_of_sample():
    parameters = inspect.signature(ds.sample).parameters
    positional = [name for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == ["target"]
    given = {"method", "num_samples", "seed", "device", "dtype", "budget", "progress", "checkpoint", "resume"}
    assert given <= set(parameters)
    assert parameters["method"].default == "auto"
    assert parameters["progress"].default is False


def test_every_option_at_once(target, capfd):
    budget = ds.Budget(seconds=60, steps=3)
    options = {"method": "dis", "num_samples": 100, "seed": 0, "device": "cpu", "dtype": torch.float32}
    fit = ds.sample(target, budget=budget, progress=True, **options)
    assert len(fit.particles) == 100
    assert capfd.readouterr().out == ""


def test_particles_and_numbers(fit):
    n = fit.particles.x.shape[0]
    assert n >= 4000
    assert fit.particles.x.shape == (n, 2)
    assert fit.particles.log_weight.shape == (n,)
    assert fit.particles.log_weight.dtype == torch.float64
    estimate = fit.log_normalizer
    assert isinstance(estimate, ds.Estimate)
    assert abs(estimate.value - LOG_Z) < 0.05
    assert 0.0 < estimate.std_error < 0.05
    assert isinstance(estimate.kind, str)
    assert fit.elbo <= estimate.value + 1e-9
    assert 100.0 < fit.ess <= n
    assert fit.pareto_k < 0.7
    assert fit.evaluations > n
    assert fit.findings == []


def test_posterior_and_draws(fit):
    assert set(fit.posterior) == {"x"}
    assert fit.posterior["x"].shape == fit.particles.x.shape
    draws = fit.resample(1000, seed=1)
    assert draws["x"].shape == (1000, 2)


def test_table(fit):
    text = str(fit)
    for word in ("mean", "sd", "mcse", "ess", "log Z", "+-", "k-hat", "evaluations", " s |"):
        assert word in text


def test_export_figures_and_files(fit, tmp_path):
    assert fit.to_arviz() is not None
    assert fit.plot("pair") is not None
    fit.save(tmp_path / "fit")
    assert torch.equal(ds.load(tmp_path / "fit").particles.x, fit.particles.x)


def test_findings_have_three_parts():
    assert ds.Finding._fields == ("level", "message", "remedy")


@pytest.mark.parametrize("name", ["PIS", "DDS", "DIS", "CMCD"])
def test_training_apart_from_drawing(target, name, tmp_path):
    sampler = getattr(ds, name)(target, num_steps=8)
    sampler.fit(steps=4, batch_size=32, seed=0, checkpoint=tmp_path, resume=True)
    particles = sampler.sample(40, seed=1)
    assert particles.x.shape == (40, 2)
    assert particles.log_weight.shape == (40,)
    again = getattr(ds, name)(target, num_steps=8)
    again.fit(steps=4, batch_size=32, seed=0, checkpoint=tmp_path, resume=True)
    assert torch.equal(again.sample(40, seed=1).x, particles.x), "the finished checkpoint was not taken up"
    by_object = ds.sample(target, method=sampler, num_samples=40, seed=0, budget=ds.Budget(steps=2))
    by_name = ds.sample(target, method=name.lower(), num_samples=40, seed=0, budget=ds.Budget(steps=2))
    assert len(by_object.particles) == len(by_name.particles) == 40


def test_classical_samplers_are_passed_as_objects(target):
    for sampler in (
        baselines.ULA(target, num_chains=4, warmup=10, step_size=0.1),
        baselines.MALA(target, num_chains=4, warmup=10),
        baselines.HMC(target, num_chains=4, warmup=10),
        baselines.SMC(target, reference_scale=3.0),
    ):
        fit = ds.sample(target, method=sampler, num_samples=64)
        assert len(fit.particles) >= 64
        assert type(sampler).__name__ == fit.method


def test_a_model_with_data():
    features = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
    model = ds.pyro.PyroTarget(regression, features, y=features.sum(-1))
    fit = ds.sample(model, method="smc", num_samples=512, seed=0)
    assert fit.posterior["noise"].min() > 0.0
    assert fit.posterior["slope"].shape == (len(fit.particles), 2)
    mean = fit.particles.expectation(fit.posterior["slope"])[0]
    assert ((mean - 1.0).abs() < 0.3).all()
    assert "slope[1]" in str(fit)
    assert math.isfinite(fit.log_normalizer.value)
