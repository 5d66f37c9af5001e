"""Kernels for Pyro's MCMC: known posteriors, one and several chains, starts, summaries, ArviZ, pickles, resuming."""

from __future__ import annotations

import logging
import math
import pickle
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, Predictive
from pyro.infer.mcmc import StreamingMCMC
from pyro.infer.mcmc import api as pyro_api

import diffsampler as ds
from diffsampler.integrations.pyro_kernel import BlockKernel, Chart, SiteTransform
from diffsampler.integrations.pyro_proposals import PathProposal
from diffsampler.methods.cmcd import AnnealedULA
from diffsampler.priors import GaussianPrior, MixturePrior

Y = torch.tensor([1.0, 2.5, 0.3])
PRECISION = 3.25
MEAN = float(Y.sum()) / PRECISION
"""Of the conjugate model's posterior."""
LOG_Z = -2.9247
"""Of the bimodal model, by quadrature."""


def conjugate(y):
    theta = pyro.sample("theta", dist.Normal(0.0, 2.0))
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(theta, 1.0), obs=y)
    pyro.deterministic("twice", 2.0 * scale)


def bimodal(y):
    theta = pyro.sample("theta", dist.Normal(0.0, 3.0).expand([2]).to_event(1))
    pyro.sample("y", dist.Normal(theta[0] ** 2, 0.5), obs=y)


def dependent(y):
    """A support that depends on another site, which Pyro's own kernels get wrong."""
    a = pyro.sample("a", dist.Uniform(1.0, 3.0))
    pyro.sample("b", dist.Uniform(0.0, a))
    pyro.sample("c", dist.Dirichlet(torch.ones(3)))
    pyro.sample("y", dist.Normal(a, 10.0), obs=y)


def annealed(target):
    """Untrained, from near the posterior: its chains are exact all the same."""
    prior = GaussianPrior(target.space, mean=torch.tensor([1.2, -0.6]), scale=1.2)
    return AnnealedULA(target, num_steps=4, prior=prior)


def two_modes(target):
    prior = MixturePrior(target.space, torch.tensor([[2.0, 0.0], [-2.0, 0.0]]))
    with torch.no_grad():
        prior.log_scale.copy_(torch.tensor([0.25, 3.0]).log())
    return AnnealedULA(target, num_steps=4, prior=prior, local_scale=0.1)


def kernel_of(name, model, **options):
    if name == "chees":
        return ds.pyro.ChEESKernel(model, num_chains=32, thin=1, **options)
    if name == "nuts":
        return ds.pyro.BatchedNUTSKernel(model, num_chains=16, thin=1, **options)
    if name == "diffusion":
        return ds.pyro.DiffusionKernel(model, sampler=annealed, prefetch=256, **options)
    return ds.pyro.InterleavedKernel(model, sampler=annealed, num_chains=16, block=16, **options)


KERNELS = ("chees", "nuts", "diffusion", "interleaved")


@pytest.fixture(autouse=True)
def _seeded():
    with torch.random.fork_rng(), warnings.catch_warnings():
        # Two cores: Pyro says that it draws chains one after the other.
        warnings.filterwarnings("ignore", "num_chains=.* is more than available_cpu")
        torch.manual_seed(0)
        yield


def run(kernel, *args, num_samples=512, warmup_steps=60, **options):
    mcmc = MCMC(kernel, num_samples, warmup_steps=warmup_steps, disable_progbar=True, **options)
    mcmc.run(*args)
    return mcmc


def within(draws, ess, mean, sd):
    """Whether a mean is within 4.5 standard errors, with the error itself uncertain: false alarm below 1e-4."""
    return abs(float(draws.double().mean()) - mean) < 4.5 * sd / math.sqrt(ess)


@pytest.mark.parametrize("name", KERNELS)
def test_kernel_gives_the_known_posterior(name, capsys):
    n = 1024
    mcmc = run(kernel_of(name, conjugate), Y, num_samples=n)
    samples, diagnostics = mcmc.get_samples(), mcmc.diagnostics()
    theta, sd = samples["theta"], PRECISION**-0.5
    assert theta.shape == (n,) and theta.dtype == torch.get_default_dtype()
    ess = min(float(diagnostics["theta"]["n_eff"]), float(diagnostics["inner_ess"]["chain 0"]))
    assert ess > 100
    assert within(theta, ess, MEAN, sd)
    # Mean of (theta - mean)^2 is the variance, with standard deviation sqrt(2) times that.
    assert within((theta - MEAN) ** 2, ess / 2, sd**2, math.sqrt(2.0) * sd**2)
    assert within(samples["scale"], ess / 2, math.sqrt(2.0 / math.pi), math.sqrt(1.0 - 2.0 / math.pi))
    # Negative control: the prior's mean is far outside.
    assert not within(theta, ess, 0.0, sd)
    mcmc.summary()
    assert "Number of divergences" in capsys.readouterr().out


def test_diffusions_jump_between_modes_and_give_the_evidence():
    for kernel, share in (
        (ds.pyro.DiffusionKernel(bimodal, sampler=two_modes, num_proposals=2), 0.08),
        (ds.pyro.InterleavedKernel(bimodal, sampler=two_modes, num_chains=16), 0.08),
    ):
        mcmc = run(kernel, torch.tensor(4.0), num_samples=2048, warmup_steps=20)
        right = (mcmc.get_samples()["theta"][:, 0] > 0.0).double()
        diagnostics = mcmc.diagnostics()
        # About 700 independent jumps: a standard error of 0.02 and four of them.
        assert abs(float(right.mean()) - 0.5) < share
        error = diagnostics["log_z_se"]["chain 0"]
        assert abs(diagnostics["log_z"]["chain 0"] - LOG_Z) < 4.5 * error < 0.8
        assert 0.02 < diagnostics["jumps"]["chain 0"] <= 1.0


def test_local_chains_stay_in_their_modes():
    """Negative control of the test above, and what the summary over inner chains is for."""
    mcmc = run(ds.pyro.ChEESKernel(bimodal, num_chains=16, thin=1), torch.tensor(4.0), num_samples=256)
    assert mcmc.diagnostics()["inner_r_hat"]["chain 0"] > 1.5


def test_path_weights_are_of_the_extended_space():
    """E[w] = Z forward, and E[1 / w] = 1 / Z backward from exact draws; a defence changes neither."""
    target = ds.pyro.PyroTarget(conjugate, Y)
    generator = torch.Generator().manual_seed(0)
    covariance = torch.eye(3) + 4.0
    log_z = float(torch.distributions.MultivariateNormal(torch.zeros(3), covariance).log_prob(Y))
    inner = annealed(target)
    n = 4000
    exact = target.prior.sample(n, generator=generator)
    exact[:, 0] = MEAN + PRECISION**-0.5 * torch.randn(n, generator=generator, dtype=torch.float64)
    for reference in (None, target.prior):
        proposal = PathProposal(target, inner, reference=reference)
        forward = (proposal.draw(n, generator).log_weight - log_z).exp()
        backward = (log_z - proposal.weigh(exact, generator)).exp()
        for ratio in (forward, backward):
            # 4.5 standard errors: false alarm 7e-6 each.
            assert abs(float(ratio.mean()) - 1.0) < 4.5 * float(ratio.std()) / math.sqrt(n) < 0.5
        # Negative control: weights that forget the backward path.
        wrong = forward * (1.0 + 0.2 * proposal.draw(n, generator).x[:, 0].abs())
        assert abs(float(wrong.mean()) - 1.0) > 4.5 * float(wrong.std()) / math.sqrt(n)


@pytest.mark.parametrize("name", KERNELS)
def test_several_chains_in_one_process(name):
    mcmc = run(kernel_of(name, conjugate), Y, num_samples=64, warmup_steps=8, num_chains=2)
    theta = mcmc.get_samples(group_by_chain=True)["theta"]
    assert theta.shape == (2, 64) and not torch.equal(theta[0], theta[1])
    diagnostics = mcmc.diagnostics()
    assert set(diagnostics["divergences"]) == {"chain 0", "chain 1"}
    assert math.isfinite(float(diagnostics["theta"]["r_hat"]))


@pytest.mark.parametrize("name", ["chees", "diffusion"])
def test_several_chains_in_several_processes(name, monkeypatch):
    monkeypatch.setattr(pyro_api.mp, "cpu_count", lambda: 3)
    try:
        mcmc = run(kernel_of(name, conjugate), Y, num_samples=64, warmup_steps=20, num_chains=2, mp_context="fork")
    finally:
        # Pyro's logging thread leaves its handlers behind.
        logging.getLogger("pyro.infer.mcmc.api").handlers.clear()
    theta = mcmc.get_samples(group_by_chain=True)
    assert theta["theta"].shape == (2, 64) and not torch.equal(theta["theta"][0], theta["theta"][1])
    # The parent was set up for the transforms only, and they were used.
    assert (theta["scale"] > 0.0).all()


@pytest.mark.parametrize("name", ["nuts", "diffusion"])
def test_seed_of_pyro_decides(name):
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(run(kernel_of(name, conjugate), Y, num_samples=32, warmup_steps=4).get_samples()["theta"])
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("name", KERNELS)
def test_pickled_kernel_goes_on_as_the_original(name):
    kernel = kernel_of(name, conjugate)
    run(kernel, Y, num_samples=40, warmup_steps=12)
    copy = pickle.loads(pickle.dumps(kernel))
    first, second = (run(k, Y, num_samples=300, warmup_steps=0).get_samples()["theta"] for k in (kernel, copy))
    assert torch.equal(first, second)
    # What was left of the block is not lost, and nothing is handed out twice.
    assert len(first.unique()) > 10
    with pytest.raises(ValueError, match="Expected the data of the warm-up to go on with it; got others"):
        run(kernel, Y + 1.0, num_samples=4, warmup_steps=0)
    with pytest.raises(ValueError, match="Expected warmup_steps > 0 for a kernel that is not warm"):
        run(kernel_of(name, conjugate), Y, num_samples=4, warmup_steps=0)


@pytest.mark.parametrize("name", ["chees", "interleaved"])
def test_initial_params_for_one_and_for_all_chains(name):
    kernel = kernel_of(name, conjugate)
    start = {"theta": torch.tensor(0.4), "scale": torch.tensor(-0.2)}
    seen = []
    run(kernel, Y, num_samples=4, warmup_steps=2, initial_params=start, hook_fn=lambda k, p, s, i: seen.append((s, p)))
    assert [stage for stage, _ in seen] == ["Warmup"] * 2 + ["Sample"] * 4
    assert float(seen[0][1]["theta"]) == pytest.approx(0.4)
    n = kernel.num_chains
    every = {"theta": torch.linspace(0.0, 1.0, n), "scale": torch.linspace(-1.0, 1.0, n)}
    assert run(kernel_of(name, conjugate), Y, num_samples=4, warmup_steps=2, initial_params=every)
    for bad, message in (
        ({"theta": torch.tensor(0.4)}, r"of the sites \['scale', 'theta'\]; got \['theta'\]"),
        (start | {"scale": torch.zeros(2, 2, 2)}, r"initial_params\['scale'\] of shape \(\)"),
        (start | {"scale": torch.zeros(n + 1), "theta": torch.zeros(n + 1)}, f"of 1 or {n} points; got {n + 1}"),
        (start | {"scale": torch.zeros(n + 1)}, "one number of points"),
    ):
        with pytest.raises(ValueError, match=message):
            run(kernel_of(name, conjugate), Y, num_samples=4, warmup_steps=2, initial_params=bad)


def test_support_that_depends_on_another_site_is_passed_by_value():
    mcmc = run(ds.pyro.ChEESKernel(dependent, num_chains=32), torch.tensor(0.0), num_samples=1024, warmup_steps=60)
    samples = mcmc.get_samples()
    assert ((samples["b"] > 0.0) & (samples["b"] < samples["a"])).all()
    assert set(mcmc.transforms) == {"a", "c"}
    torch.testing.assert_close(samples["c"].sum(-1), torch.ones(1024))
    # b / a is uniform, whatever a is: standard error of 1,024 draws with half of that effective, four and a half times.
    assert abs(float((samples["b"] / samples["a"]).mean()) - 0.5) < 4.5 * math.sqrt(1.0 / 12.0 / 500)
    chart = Chart(ds.pyro.PyroTarget(dependent, torch.tensor(0.0)))
    x = torch.tensor([[0.3, -1.2, 0.1, 0.7]], dtype=torch.float64)
    torch.testing.assert_close(chart.points(chart.params(x[0])), x, rtol=1e-5, atol=1e-5)


def test_transform_of_a_site_survives_pickling():
    transform = SiteTransform(torch.distributions.biject_to(dist.constraints.simplex))
    copy = pickle.loads(pickle.dumps(transform))
    x = torch.tensor([[0.2, 0.3, 0.5]])
    torch.testing.assert_close(copy.inv(copy(x)), x)
    torch.testing.assert_close(
        copy.inv.log_abs_det_jacobian(copy(x), x), transform.bijection.log_abs_det_jacobian(copy(x), x)
    )
    assert copy.forward_shape(torch.Size([4, 3])) == (4, 2) and copy.inverse_shape(torch.Size([4, 2])) == (4, 3)


def test_arviz_and_predictive_take_the_run(recwarn):
    import arviz

    mcmc = run(kernel_of("chees", conjugate), Y, num_samples=64, warmup_steps=8, num_chains=2)
    # ArviZ 1.x has no from_pyro.
    if hasattr(arviz, "from_pyro"):
        data = arviz.from_pyro(mcmc)
        assert data.posterior["theta"].shape == (2, 64)
        assert data.log_likelihood["y"].shape == (2, 64, 3)
        assert data.sample_stats["diverging"].shape == (2, 64)
        torch.testing.assert_close(torch.tensor(data.observed_data["y"].values), Y)
    drawn = Predictive(conjugate, posterior_samples=mcmc.get_samples())(Y)
    torch.testing.assert_close(drawn["twice"].reshape(128), 2.0 * mcmc.get_samples()["scale"])


def test_streaming_and_saved_parameters():
    mcmc = StreamingMCMC(kernel_of("nuts", conjugate), 64, warmup_steps=20, disable_progbar=True)
    mcmc.run(Y)
    assert float(mcmc.get_statistics()[(0, "scale")]["mean"]) > 0.0
    mcmc = run(kernel_of("nuts", conjugate), Y, num_samples=8, warmup_steps=4, save_params=["theta"])
    assert set(mcmc.get_samples()) == {"theta"}


def test_divergences_are_indices_of_draws():
    def funnel():
        v = pyro.sample("v", dist.Normal(0.0, 3.0))
        pyro.sample("x", dist.Normal(0.0, torch.exp(0.5 * v)).expand([4]).to_event(1))

    mcmc = run(
        ds.pyro.BatchedNUTSKernel(funnel, num_chains=16, block=8, thin=1, max_depth=4), num_samples=256, warmup_steps=20
    )
    found = mcmc.diagnostics()["divergences"]["chain 0"]
    assert len(found) > 0 and all(0 <= i < 256 for i in found) and found == sorted(set(found))


def test_kernel_without_a_run_says_so():
    kernel = kernel_of("chees", conjugate)
    assert kernel.transforms is None and isinstance(kernel, BlockKernel)
    for use in (lambda: kernel.initial_params, lambda: kernel.sample({})):
        with pytest.raises(ValueError, match="Expected setup"):
            use()
    assert kernel.diagnostics()["divergences"] == []
    kernel.cleanup()
    kernel.cleanup()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ds.pyro.ChEESKernel(3), TypeError, "Expected a Pyro model, a callable; got int"),
        (lambda: ds.pyro.ChEESKernel(conjugate, num_chains=1), ValueError, "Expected at least 2 chains; got 1"),
        (lambda: ds.pyro.ChEESKernel(conjugate, block=0), ValueError, "Expected block to be a positive integer; got 0"),
        (lambda: ds.pyro.DiffusionKernel(conjugate, sampler=3), TypeError, "Expected sampler to be a function"),
        (lambda: ds.pyro.DiffusionKernel(conjugate, num_proposals=0), ValueError, "num_proposals to be at least 1"),
        (lambda: ds.pyro.DiffusionKernel(conjugate, training_steps=0), ValueError, "training_steps to be at least 1"),
        (lambda: ds.pyro.InterleavedKernel(conjugate, num_local=0), ValueError, "num_local to be at least 1; got 0"),
    ],
)
def test_bad_arguments_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_sampler_that_is_none_is_refused():
    kernel = ds.pyro.DiffusionKernel(conjugate, sampler=lambda target: target)
    with pytest.raises(TypeError, match="Expected sampler.target. to return a DiffusionSampler; got PyroTarget"):
        run(kernel, Y)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["DiffusionKernel", "InterleavedKernel"])
def test_defaults_train_by_themselves(name):
    mcmc = run(getattr(ds.pyro, name)(bimodal), torch.tensor(4.0), num_samples=2000, warmup_steps=50)
    diagnostics = mcmc.diagnostics()
    assert diagnostics["jumps"]["chain 0"] > 0.6
    assert abs(diagnostics["log_z"]["chain 0"] - LOG_Z) < 4.5 * diagnostics["log_z_se"]["chain 0"] < 0.1
    right = (mcmc.get_samples()["theta"][:, 0] > 0.0).double()
    # A thousand effective draws: four and a half standard errors.
    assert abs(float(right.mean()) - 0.5) < 4.5 * 0.5 / math.sqrt(1000)
