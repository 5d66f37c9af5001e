"""Models and measures of the Bayesian tables: densities against plain formulas, exact answers against each other."""

from __future__ import annotations

import json
import math
import zipfile
from pathlib import Path

import numpy as np
import pyro.distributions as dist
import pytest
import torch

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


@pytest.fixture(autouse=True)
def beside_the_scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_typed_in_posteriors_have_the_density_of_the_stan_program():
    from posteriordb_models import WITHOUT_FILES, build

    dims = {
        "mesquite-logmesquite": 8,
        "kilpisjarvi_mod-kilpisjarvi": 3,
        "eight_schools-eight_schools_noncentered": 10,
        "gp_pois_regr-gp_regr": 3,
        "gp_pois_regr-gp_pois_regr": 13,
        "hudson_lynx_hare-lotka_volterra": 8,
    }
    assert set(WITHOUT_FILES) == set(dims)
    for name, dim in dims.items():
        target = build(name)
        assert target.dim == dim and target.vectorized, name
        log_prob, score = target.log_prob_and_score(0.1 * normal(4, dim))
        assert log_prob.isfinite().all() and score.isfinite().all(), name


def test_the_gaussian_process_is_that_of_the_stan_program():
    from posteriordb_data import TYPED_IN
    from posteriordb_models import build

    target = build("gp_pois_regr-gp_regr")
    values = {"rho": torch.tensor([6.0]), "alpha": torch.tensor([2.0]), "sigma": torch.tensor([1.5])}
    x, y = (torch.tensor(TYPED_IN["gp_pois_regr"][key]).double() for key in "xy")
    # sigma, not its square, is the variance of the noise in that program.
    covariance = 4.0 * torch.exp(-0.5 * ((x[:, None] - x) / 6.0).square()) + 1.5 * torch.eye(11).double()
    exact = torch.distributions.MultivariateNormal(torch.zeros(11).double(), covariance).log_prob(y)
    exact = exact + dist.Gamma(25.0, 4.0).log_prob(torch.tensor(6.0)) + dist.HalfNormal(2.0).log_prob(torch.tensor(2.0))
    exact = exact + dist.HalfNormal(1.0).log_prob(torch.tensor(1.5)) + math.log(6.0 * 2.0 * 1.5)
    assert float(target.log_prob(target.unconstrain(values))) == pytest.approx(float(exact), abs=1e-4)


def test_recursions_and_orbits():
    from posteriordb_models import populations, recursion

    rows, factor = normal(3, 50), torch.tensor(0.7).double()
    expected = torch.zeros(3, 50).double()
    for t in range(50):
        expected[:, t] = rows[:, t] + (factor * expected[:, t - 1] if t else 0.0)
    assert torch.allclose(recursion(rows, factor), expected)
    theta, start = torch.tensor([0.55, 0.028, 0.8, 0.024]).double(), torch.tensor([34.0, 6.0]).double()
    coarse, fine = populations(theta, start, 20), populations(theta, start, 20, steps=50)
    assert float((coarse - fine).abs().max()) < 1e-3
    # The system conserves delta u - gamma log u + beta v - alpha log v.
    u, v = fine.exp().unbind(-1)
    constant = theta[3] * u - theta[2] * fine[:, 0] + theta[1] * v - theta[0] * fine[:, 1]
    assert float(constant.std()) < 1e-6


def test_a_normal_law_that_is_positive():
    from posteriordb_models import PositiveNormal

    law = PositiveNormal(torch.tensor(0.05), torch.tensor(0.05))
    line = torch.linspace(0.0, 0.6, 6001)
    assert float(torch.trapezoid(law.log_prob(line).exp(), line)) == pytest.approx(1.0, abs=1e-4)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        draws = law.sample((40_000,))
    mean = float(torch.trapezoid(law.log_prob(line).exp() * line, line))
    # Standard error 2e-4: false alarm about 1e-6.
    assert draws.min() > 0.0 and float(draws.mean()) == pytest.approx(mean, abs=1e-3)


def test_data_and_draws_are_read_from_a_folder_and_from_a_checkout(tmp_path):
    from posteriordb_data import read_data, read_reference

    assert read_data("eight_schools", None)["y"][0] == 28.0
    with pytest.raises(FileNotFoundError, match="Expected arma.json or a checkout of posteriordb"):
        read_data("arma", tmp_path)
    (tmp_path / "arma.json").write_text(json.dumps({"y": [1.0]}))
    assert read_data("arma", tmp_path) == {"y": [1.0]}
    draws = tmp_path / "posterior_database/reference_posteriors/draws/draws"
    draws.mkdir(parents=True)
    with zipfile.ZipFile(draws / "arma-arma11.json.zip", "w") as archive:
        archive.writestr("arma-arma11.json", json.dumps([{"mu": [1.0, 2.0]}, {"mu": [3.0, 4.0]}]))
    reference = read_reference("arma-arma11", tmp_path)
    assert reference is not None and reference.names == ["mu"] and reference.exact
    assert reference.draws[:, 0].tolist() == [1.0, 2.0, 3.0, 4.0] and reference.mean.tolist() == [2.5]


def test_weighted_draws_are_compared_with_a_reference():
    from posteriordb_data import Reference
    from posteriordb_table import compare, passed, worst

    draws = normal(20_000, 2).numpy()
    reference = Reference(["a", "b"], draws, draws.mean(0), draws.std(0), exact=True)
    # Draws of twice the width, weighted back.
    x = 2.0 * normal(20_000, 2, seed=1)
    log_weight = -0.5 * x.square().sum(-1) + 0.125 * x.square().sum(-1)
    row = {**compare(x, log_weight, reference), "failed": None, "pareto_k": 0.1}
    mean, low, high, shift = worst(row)
    assert mean < 0.06 and 0.95 < low < high < 1.05 and shift < 0.1 and passed(row)
    unweighted = {**compare(x, torch.zeros(len(x)).double(), reference), "failed": None, "pareto_k": 0.1}
    assert worst(unweighted)[1] > 1.9 and not passed(unweighted)


def test_stein_tells_a_wrong_port():
    from posteriordb_models import build, stein

    target = build("kilpisjarvi_mod-kilpisjarvi")
    # Draws of another posterior: those that the classical fit with known noise would give.
    values = {
        "alpha": 9.3 + normal(500),
        "beta": 0.001 * normal(500, seed=1),
        "sigma": 1.0 + 0.05 * normal(500, seed=2),
    }
    assert stein(target, values) > 10.0


def test_ranks_are_uniform_only_where_draws_are_right():
    from sbc_table import ranks, uniformity

    rng = np.random.default_rng(0)
    truth = rng.normal(size=(400, 6))
    centre = truth + rng.normal(size=(400, 6))
    draws = 0.5 * centre[:, None] + np.sqrt(0.5) * rng.normal(size=(400, 99, 6))
    rows = [{"draws": d.tolist(), "truth": t.tolist()} for d, t in zip(draws, truth, strict=True)]
    # Six p-values; one below 1e-4 happens in 6e-4 of the seeds.
    assert min(p for _, p in uniformity(ranks(rows) / 100)) > 1e-4
    assert max(p for _, p in uniformity(ranks(rows, shrink=0.7) / 100)) < 1e-3


def test_exact_distribution_functions_are_those_of_the_posterior():
    """Against exact draws by rejection from the prior; shrunk draws are told from right ones."""
    from sbc_table import PER_GROUP, exact_cdf, simulate, uniformity

    y = simulate(3)[1]
    z = torch.randn(1_500_000, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mu, log_tau = 2.0 * z[:, :1], z[:, 1:2] - 0.5
    theta = mu + log_tau.exp() * z[:, 2:]
    log_share = -0.5 * PER_GROUP * (y.mean(0) - theta).square().sum(1)
    accepted = log_share.exp() > torch.rand(len(z), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = torch.cat([mu, log_tau, theta], 1)[accepted].numpy()
    assert len(x) > 500
    # Five p-values; one below 1e-4 happens in 5e-4 of the seeds.
    assert min(p for _, p in uniformity(exact_cdf(x, y))) > 1e-4
    assert max(p for _, p in uniformity(exact_cdf(x.mean(0) + 0.7 * (x - x.mean(0)), y))) < 1e-3


def test_simulated_parameters_follow_the_prior_of_the_model():
    from sbc_table import simulate

    drawn = torch.stack([simulate(seed)[0] for seed in range(2000)])
    # Standard errors 0.045 and 0.022: false alarm about 1e-4 for both.
    assert float(drawn[:, 0].std()) == pytest.approx(2.0, abs=0.15)
    assert float(drawn[:, 1].mean()) == pytest.approx(-0.5, abs=0.1)
    assert torch.equal(simulate(3)[1], simulate(3)[1]) and not torch.equal(simulate(3)[1], simulate(4)[1])


@pytest.mark.parametrize("name", ["binomial", "poisson", "logistic", "regression3", "multinomial", "hierarchical"])
def test_known_evidences_agree_with_draws_from_the_prior(name):
    from evidence_models import KNOWN

    case = KNOWN[name]
    target = case.build()
    x = target.prior.sample(200_000, generator=torch.Generator().manual_seed(0)).double()
    log_weight = torch.cat([target.log_likelihood(part) for part in x.split(20_000)])
    value = float(torch.logsumexp(log_weight, 0)) - math.log(len(x))
    error = float((log_weight - value).exp().std()) / math.sqrt(len(x))
    assert target.dim == case.dim
    # Four standard errors in each of six models: false alarm about 4e-4.
    assert abs(value - case.evidence()) < 4.0 * error + 1e-4 and error < 0.05, (value, case.evidence(), error)


def test_the_evidence_of_eight_schools_is_the_known_one():
    from evidence_models import KNOWN

    assert KNOWN["schools"].evidence() == pytest.approx(-31.311347, abs=1e-4)


def test_modes_have_labels_and_weights():
    from modes_models import MULTIMODAL, shares

    for name, case in MULTIMODAL.items():
        target = case.build()
        values = target.constrain(target.prior.sample(50, generator=torch.Generator().manual_seed(0)))
        labels = case.label(values)
        assert labels.shape == (50,) and labels.min() >= 0 and labels.max() < case.modes, name
        if case.truth is not None:
            assert case.truth().shape == (case.modes,) and float(case.truth().sum()) == pytest.approx(1.0), name
    assert shares(torch.tensor([0, 1, -1, 1]), torch.ones(4), 2).tolist() == [0.25, 0.5]


def test_the_readings_of_theophylline_have_one_likelihood():
    from modes_models import HOURS, absorption_truth, concentration

    absorbed, eliminated, volume = torch.tensor([1.8, 0.05, 0.36]).double()
    flipped = concentration(HOURS, eliminated, absorbed, volume * eliminated / absorbed)
    assert torch.allclose(concentration(HOURS, absorbed, eliminated, volume), flipped)
    by_hand = (-eliminated * HOURS).exp() - (-absorbed * HOURS).exp()
    by_hand = 4.02 * absorbed / (volume * (absorbed - eliminated)) * by_hand
    assert torch.allclose(concentration(HOURS, absorbed, eliminated, volume), by_hand)
    # Where the data fix the curve, the prior of the volume decides: roughly the log odds of the two best volumes.
    best = torch.stack([volume, volume * eliminated / absorbed]).log()
    log_odds = (-0.5 * ((best - math.log(0.04)) / 1.2).square()).diff()
    assert float(absorption_truth().log().diff()) == pytest.approx(float(log_odds), abs=0.3)


def test_mirror_images_of_the_transmitter_have_the_weights_of_draws_from_the_prior():
    from modes_models import MULTIMODAL, shares, transmitter_label, transmitter_truth

    target = MULTIMODAL["transmitter"].build()
    x = target.prior.sample(1_000_000, generator=torch.Generator().manual_seed(0)).double()
    weight = torch.softmax(target.log_likelihood(x), 0)
    found = shares(transmitter_label(target.constrain(x)), weight, 2)
    # About 1,500 draws count: four standard errors are 0.032.
    assert 1.0 / float(weight.square().sum()) > 1000
    assert float((found - transmitter_truth())[0].abs()) < 0.032


def test_runs_of_the_findings_table_are_judged():
    from findings_table import BAD, GOOD, Settings, error, flagged, show

    assert len(GOOD) == len(BAD) == 20
    good = {"case": "g", "seed": 0, "refused": None, "findings": [], "exact": 0.0, "log_normalizer": [0.01, 0.0, ""]}
    bad = {**good, "findings": ["WARNING: x"]}
    refused = {**good, "refused": "Expected", "findings": []}
    assert not flagged(good) and flagged(bad) and flagged(refused)
    assert error(good) == 0.01 and error(refused) is None
    wrong = {**good, "log_normalizer": [0.5, 0.0, ""]}
    rows = {"sabotaged": {"a": [{**bad, "cpu": 1.0}]}, "good": {"b": [{**wrong, "cpu": 1.0}]}}
    assert "1 of 1 sabotaged runs flagged" in show(rows, Settings()) and "1 were not good" in show(rows, Settings())
