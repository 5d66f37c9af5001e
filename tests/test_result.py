"""The record of a run: table, findings, export, files."""

from __future__ import annotations

import math
import pickle
import re
from pathlib import Path

import pytest
import torch

import diffsampler as ds
from diffsampler.particles import Particles
from diffsampler.result import diagnose

F64 = torch.float64


def particles(n=4000, *, spread=0.3, seed=0, **options) -> Particles:
    """Draws of a standard normal law with noisy weights of mean one."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 2, generator=generator, dtype=F64)
    noise = spread * torch.randn(n, generator=generator, dtype=F64) - 0.5 * spread**2
    return Particles(x, noise, **options)


def make(cloud: Particles | None = None, **changes) -> ds.Fit:
    cloud = particles() if cloud is None else cloud
    x = cloud.x[:, [0, -1]]
    posterior = {
        "mu": x[:, 0],
        "theta": torch.stack([x[:, 0], x[:, 1], x.sum(-1)], -1),
        "covariance": (x.unsqueeze(-1) * x.unsqueeze(-2)),
    }
    options = {
        "particles": cloud,
        "posterior": posterior,
        "findings": diagnose(cloud),
        "evaluations": 123_456,
        "seconds": 1.25,
        "method": "smc",
        "choices": {"seed": 0, "betas": [0.0, 0.5, 1.0], "prior": None, "transport": "AffineMap"},
        "history": [],
        "true_log_normalizer": 0.0,
        "notes": ["Something that cannot be excluded."],
    }
    return ds.Fit(**{**options, **changes})


# Table ----------------------------------------------------------------------------------------------------------------


def test_table_names_every_scalar_and_states_the_evidence():
    fit = make()
    lines = str(fit).splitlines()
    names = [line.split()[0] for line in lines[1:9]]
    assert names[:4] == ["mu", "theta[0]", "theta[1]", "theta[2]"]
    text = str(fit)
    for i in range(2):
        for j in range(2):
            assert f"covariance[{i}, {j}]" in text
    verdict = next(line for line in lines if line.startswith("log Z"))
    assert str(fit.log_normalizer) in verdict
    assert "(exact 0.0000)" in verdict
    assert "of 4000 | k-hat" in verdict
    assert "good | 1.23e+05 evaluations | 1.2 s | smc" in verdict
    assert lines[-1] == "Note: Something that cannot be excluded."


def test_table_is_short_for_many_parameters():
    x = torch.zeros(200, 50, dtype=F64)
    lines = str(make(particles(200), posterior={"x": x})).splitlines()
    assert "... and 30 more" in lines
    assert sum(line.startswith("x[") for line in lines) == 20


def test_summary_is_weighted():
    """Weights exp(x) shift a standard normal law by one: five standard errors, false alarm below 1e-6."""
    x = torch.randn(20_000, 1, generator=torch.Generator().manual_seed(0), dtype=F64)
    rows = {name: row for name, *row in make(Particles(x, x[:, 0]), posterior={"x": x[:, 0]}).summary}
    mean, sd, error = rows["x"]
    assert 0.0 < error < 0.05
    assert abs(mean - 1.0) < 5.0 * error
    assert abs(sd - 1.0) < 0.1
    unweighted = {name: row for name, *row in make(particles(), posterior={"x": particles().x[:, 0]}).summary}
    assert abs(unweighted["x"][0]) < 0.2, "control: without the shift the mean is zero"


def test_chains_print_without_an_evidence():
    cloud = Particles(particles().x, torch.zeros(4000, dtype=F64), replicates=4, has_normalizer=False, effective=812.0)
    text = str(make(cloud, method="HMC"))
    assert "log Z not estimated by this method | ess 812 of 4000 |" in text
    assert "k-hat" not in text
    assert "exact" not in text


def test_equal_weights_have_no_tail():
    equal = Particles(particles().x, torch.zeros(4000, dtype=F64))
    assert "k-hat none good" in str(make(equal))


def test_what_is_not_counted_is_not_printed():
    assert "evaluations" not in str(make(evaluations=0))


def test_an_error_is_never_called_good():
    error = ds.Finding("error", "The budget ended at temperature 0.", "Raise the budget.")
    text = str(make(findings=[error]))
    assert "unreliable" in text
    assert "good" not in text
    assert text.splitlines()[-2] == "ERROR: The budget ended at temperature 0. Raise the budget."


# Findings -------------------------------------------------------------------------------------------------------------


def messages(cloud: Particles) -> str:
    return "\n".join(str(finding) for finding in diagnose(cloud))


def chains(offset: float) -> Particles:
    shift = torch.arange(4, dtype=F64).repeat_interleave(1000).unsqueeze(-1)
    zeros = torch.zeros(4000, dtype=F64)
    return Particles(particles().x + offset * shift, zeros, replicates=4, has_normalizer=False, effective=900.0)


def islands(spread: float) -> Particles:
    noise = torch.randn(16, generator=torch.Generator().manual_seed(1), dtype=F64).repeat_interleave(250)
    return Particles(particles().x, spread * noise, replicates=16)


RULES = {
    "heavy weights": (particles(spread=4.0), particles(spread=0.3), r"Pareto k-hat is \d.* \(limit 0\.7\)"),
    "few draws": (particles(60), particles(400), r"effective sample size is \d+ of 60 \(limit 100\)"),
    "lost particles": (particles(nonfinite=3), particles(), r"3 particles were lost to non-finite values"),
    "islands": (islands(3.0), islands(0.1), r"Replicate estimates of Z disagree"),
    "chains": (chains(1.0), chains(0.0), r"Chains disagree: R-hat is \d\.\d+ \(limit 1\.05\)"),
}


@pytest.mark.parametrize("rule", RULES)
def test_findings_follow_their_rules(rule):
    bad, good, message = RULES[rule]
    found = diagnose(bad)
    assert any(re.search(message, finding.message) for finding in found), messages(bad)
    assert all(finding.level == "warning" and finding.remedy for finding in found)
    assert not diagnose(good), f"control: {messages(good)}"
    assert not make(bad).reliable
    assert make(good).reliable


def test_diagnostics_that_are_no_number_are_no_pass():
    x = particles(400).x
    frozen = Particles(torch.zeros_like(x), torch.zeros(400, dtype=F64), 4, has_normalizer=False, effective=math.nan)
    text = messages(frozen)
    assert "effective sample size is nan" in text
    assert "R-hat is nan" in text


def test_notes_do_not_make_a_fit_unreliable():
    assert make(findings=[ds.Finding("note", "A remark.", "")]).reliable
    assert str(ds.Finding("note", "A remark.", "")) == "NOTE: A remark."


# Draws ----------------------------------------------------------------------------------------------------------------


def test_resampled_draws_follow_the_weighted_law_and_stay_together():
    x = torch.randn(20_000, 1, generator=torch.Generator().manual_seed(0), dtype=F64)
    fit = make(Particles(x, x[:, 0]), posterior={"x": x, "twice": 2.0 * x[:, 0]})
    draws = fit.resample(10_000, seed=1)
    assert draws["x"].shape == (10_000, 1)
    torch.testing.assert_close(draws["twice"], 2.0 * draws["x"][:, 0])
    # The law is N(1, 1). The weights hold about 7000 effective draws: six standard errors, false alarm below 1e-8.
    assert abs(float(draws["x"].mean()) - 1.0) < 6.0 * math.sqrt(1.0 / 4000)
    half = [draws["x"][:5000].mean(), draws["x"][5000:].mean()]
    assert abs(float(half[0] - half[1])) < 6.0 * math.sqrt(2.0 / 2500), "draws are not in random order"
    assert torch.equal(fit.resample(50, seed=1)["x"], fit.resample(50, seed=1)["x"])
    assert not torch.equal(fit.resample(50, seed=1)["x"], fit.resample(50, seed=2)["x"])
    assert fit.resample(30_000)["x"].shape == (30_000, 1)


def test_estimates_are_those_of_the_particles():
    fit = make()
    cloud = fit.particles
    assert (fit.log_normalizer, fit.elbo, fit.ess, fit.pareto_k) == (
        cloud.log_normalizer,
        cloud.elbo,
        cloud.ess,
        cloud.pareto_k,
    )


def test_fits_are_compared_by_identity():
    fit = make()
    assert fit == fit
    assert fit != make()
    assert len({fit, make()}) == 2


# Export ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["resample", "keep"])
def test_export_to_arviz(weights):
    fit = make()
    data = fit.to_arviz(weights=weights)
    assert data.posterior["covariance"].shape == (4, 1000, 2, 2)
    assert data.attrs["method"] == "smc"
    assert data.attrs["log_z"] == fit.log_normalizer.value
    assert data.attrs["ess"] == fit.ess
    assert ("sample_stats" in data.groups() or "sample_stats" in str(data.groups())) == (weights == "keep")


def test_figures():
    fit = make(history=[{"step": float(i), "loss": 1.0 / i, "elbo": -1.0 / i, "ess": 0.5} for i in range(1, 9)])
    assert len(fit.plot("pair", names=["mu", "theta"]).axes) >= 16
    assert fit.plot().axes
    assert fit.plot("weights").axes
    assert fit.plot("training").axes


# Files ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["weights", "chains"])
def test_every_field_survives_a_file(tmp_path: Path, kind):
    cloud = particles(nonfinite=2, replicates=8) if kind == "weights" else chains(0.0)
    fit = make(cloud, history=[{"step": 1.0, "loss": math.inf}], findings=[ds.Finding("error", "a", "b")])
    path = tmp_path / "new" / "fit"
    fit.save(path)
    back = ds.load(str(path))
    for name in ds.Fit.__dataclass_fields__:
        mine, theirs = getattr(fit, name), getattr(back, name)
        if name == "particles":
            for part in Particles.__dataclass_fields__:
                a, b = getattr(mine, part), getattr(theirs, part)
                assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, part
        elif name == "posterior":
            assert list(mine) == list(theirs)
            assert all(torch.equal(mine[key], theirs[key]) for key in mine)
        else:
            assert mine == theirs, name
    assert str(back) == str(fit)
    assert isinstance(back.findings[0], ds.Finding)
    fit.save(path)
    assert [entry.name for entry in path.parent.iterdir()] == ["fit"]


def test_a_file_runs_no_code(tmp_path: Path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    with (tmp_path / "fit").open("wb") as stream:
        pickle.dump(Bomb(), stream)
    with pytest.raises(ValueError, match="cannot be read"):
        ds.load(tmp_path / "fit")
    assert not (tmp_path / "ran").exists()


def test_a_real_run_survives_a_file(tmp_path: Path):
    target = ds.Target.from_log_prob(lambda x: -0.5 * x.square().sum(-1), dim=2)
    fit = ds.sample(target, method="smc", num_samples=512)
    fit.save(tmp_path / "fit")
    back = ds.load(tmp_path / "fit")
    assert str(back) == str(fit)
    assert back.choices == fit.choices
    assert back.sampler is None
