"""Whatever a user may hand over by mistake: a clear error before work starts, or a finding."""

from __future__ import annotations

import builtins
import errno
import os
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import diffsampler as ds
from diffsampler import baselines, storage, targets
from diffsampler.particles import Particles

QUICK = {"method": "dis", "budget": ds.Budget(steps=2), "num_samples": 20}


NOISE = torch.Generator().manual_seed(0)


def gaussian(x):
    return -0.5 * x.square().sum(-1)


def density(function, dim=2, **options):
    return lambda: ds.sample(ds.Target.from_log_prob(function, dim=dim, **options), **QUICK)


def given(**options):
    return lambda: ds.sample(ds.Target.from_log_prob(gaussian, dim=2), **{**QUICK, **options})


def count_model():
    count = pyro.sample("count", dist.Poisson(2.0))
    pyro.sample("a", dist.Normal(count, 1.0))


def growing_model():
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    if x > 0:
        pyro.sample("y", dist.Normal(0.0, 1.0))


def sqrt_trick(x):
    # torch.where hides the value of the branch that is not taken, not its gradient.
    return gaussian(x) + torch.where(x[..., 0] > 0, x[..., 0].sqrt(), torch.zeros_like(x[..., 0]))


def sampler_of(function, dim=2):
    return ds.DIS(ds.Target.from_log_prob(function, dim=dim), num_steps=4)


DENSITIES = {
    "one column": (
        density(lambda x: gaussian(x)[:, None]),
        ValueError,
        r"shape \(16,\); got \(16, 1\)\. Drop the last",
    ),
    "scalar": (density(lambda x: gaussian(x).sum()), ValueError, r"got \(\)\. Sum over the event axis only"),
    "not summed": (density(lambda x: -0.5 * x.square()), ValueError, r"got \(16, 2\)\. Sum over the last axis"),
    "one point only": (
        density(lambda x: -(x[0] ** 2) - x[1] ** 2),
        ValueError,
        r"a coordinate is x\[\.\.\., i\], not x\[i\]",
    ),
    "one point only, d = 16": (density(lambda x: -x[0].square(), dim=16), ValueError, r"shape \(17,\); got \(16,\)"),
    "matrix product": (density(lambda x: -x @ x.mT), ValueError, r"is \(x \* y\)\.sum\(-1\), not x @ y"),
    "dot product": (
        density(lambda x: -0.5 * x @ x),
        ValueError,
        r"accept a batch of shape \(16, 2\); got RuntimeError: mat1",
    ),
    "int": (density(lambda x: gaussian(x).long()), TypeError, r"floating-point tensor; got torch\.int64"),
    "complex": (density(lambda x: gaussian(x) + 0j), TypeError, r"floating-point tensor; got torch\.complex128"),
    "half": (density(lambda x: gaussian(x.half())), TypeError, r"float32 or float64; got torch\.float16"),
    "nothing": (density(lambda x: None), TypeError, r"floating-point tensor; got NoneType"),
    "a number": (density(lambda x: 0.0), TypeError, r"floating-point tensor; got float"),
    "numpy result": (density(lambda x: gaussian(x).detach().numpy()), TypeError, r"floating-point tensor; got ndarray"),
    "numpy inside": (
        density(lambda x: torch.as_tensor(np.square(x.numpy()).sum(-1))),
        ValueError,
        r"differentiable; its result does not",
    ),
    "detached": (
        density(lambda x: gaussian(x.detach())),
        ValueError,
        r"without \.detach\(\), \.item\(\) or numpy, or pass",
    ),
    "item by item": (
        density(lambda x: torch.tensor([gaussian(v).item() for v in x])),
        ValueError,
        r"to be differentiable",
    ),
    "rounded": (density(lambda x: gaussian(x.round())), ValueError, r"to have a gradient; it is zero at all 16"),
    "coupled by mean": (
        density(lambda x: gaussian(x - x.mean(0))),
        ValueError,
        r"independently; at x = \[.*in a batch of 16 and",
    ),
    "coupled by branch": (
        density(lambda x: gaussian(x) if x.sum() > 0 else gaussian(2 * x)),
        ValueError,
        r"points of a batch independently",
    ),
    "random": (
        density(lambda x: gaussian(x) + torch.rand(len(x), generator=NOISE)),
        ValueError,
        r"points of a batch independently",
    ),
    "changes its input": (density(lambda x: gaussian(x.mul_(2))), ValueError, r"points of a batch independently"),
    "branches": (density(lambda x: gaussian(x) if x[:, 0] > 0 else -gaussian(x)), ValueError, r"use torch\.where"),
    "NaN at some": (
        density(lambda x: gaussian(x) + 0 * x[:, 0].log()),
        ValueError,
        r"got NaN at 1?\d of 16 .* first at x = \[",
    ),
    "inf at some": (
        density(lambda x: gaussian(x).masked_fill(x[:, 0] > 0, torch.inf)),
        ValueError,
        r"got \+inf at \d+ of 16",
    ),
    "zero everywhere": (
        density(lambda x: gaussian(x).masked_fill(x[:, 0] < 99, -torch.inf)),
        ValueError,
        r"-inf at all 16.*bounded support",
    ),
    "NaN gradient": (density(sqrt_trick), ValueError, r"finite gradient of log_prob; got \[nan, "),
    "infinite gradient": (
        density(lambda x: -1e300 * (x[..., 0] - x[..., 0].detach()) * 1e300 + gaussian(x)),
        ValueError,
        r"finite gradient of log_prob; got \[-?inf",
    ),
    "index": (
        density(lambda x: gaussian(x) - x[:, 5], dim=3),
        ValueError,
        r"IndexError: index 5 .*points of dimension 3",
    ),
    "wrong dim": (
        density(lambda x: gaussian(x - torch.zeros(5)), dim=3),
        ValueError,
        r"got RuntimeError: .*of dimension 3",
    ),
    "too few coordinates used": (
        density(lambda x: -(x[:, 0] ** 2), dim=3),
        ValueError,
        r"improper: along the direction \[0, 1, 0\]",
    ),
    "raises": (density(lambda x: 1 / 0), ValueError, r"got ZeroDivisionError: division by zero"),
    "energy's gradient": (
        density(gaussian, score=lambda x: x),
        ValueError,
        r"gradient of log_prob; .* Is it an energy's gradient",
    ),
    "score of another scale": (
        density(gaussian, score=lambda x: -3 * x),
        ValueError,
        r"Expected score to be the gradient",
    ),
    "score shape": (
        density(gaussian, score=lambda x: -x.sum(-1)),
        ValueError,
        r"score to return shape \(16, 2\); got \(16,\)",
    ),
    "score numpy": (
        density(gaussian, score=lambda x: -x.numpy()),
        TypeError,
        r"Expected score to return .*; got ndarray",
    ),
    "score nothing": (density(gaussian, score=lambda x: None), TypeError, r"Expected score to return .*; got NoneType"),
    "score NaN": (
        density(gaussian, score=lambda x: x * torch.nan),
        ValueError,
        r"finite gradient of log_prob; got \[nan, nan\]",
    ),
    "flat direction": (
        density(lambda x: -((x[..., 0] + x[..., 1]) ** 2)),
        ValueError,
        r"improper.*Give flat directions a proper",
    ),
    "slow decay": (
        density(lambda x: -torch.log1p(x.abs()).sum(-1), dim=1),
        ValueError,
        r"falls like 1/distance or more slowly",
    ),
    "growing": (density(lambda x: -gaussian(x)), ValueError, r"looks improper"),
    "not periodic": (
        lambda: ds.sample(ds.Target.from_log_prob(gaussian, space=ds.Torus(2)), **QUICK),
        ValueError,
        r"period 2 pi on Torus",
    ),
}

CALLS = {
    "callable": (lambda: ds.sample(gaussian), TypeError, r"got function\. Wrap a density with Target\.from_log_prob"),
    "Pyro model": (
        lambda: ds.sample(count_model),
        TypeError,
        r"a Pyro model with ds\.pyro\.PyroTarget\(model, \*args\)",
    ),
    "class": (lambda: ds.sample(targets.Funnel), TypeError, r"Expected a Target; got the class Funnel"),
    "no function": (lambda: ds.Target.from_log_prob(3, dim=2), TypeError, r"log_prob to be a function .*; got int"),
    "no energy": (lambda: ds.Target.from_energy("x", dim=2), TypeError, r"energy to be a function .*; got str"),
    "no space": (lambda: ds.Target.from_log_prob(gaussian, space=2), TypeError, r"Euclidean\(2\); got int"),
    "dim 0": (lambda: ds.Target.from_log_prob(gaussian, dim=0), ValueError, r"positive integer; got 0"),
    "dim -1": (lambda: ds.Target.from_log_prob(gaussian, dim=-1), ValueError, r"positive integer; got -1"),
    "dim 2.0": (lambda: ds.Target.from_log_prob(gaussian, dim=2.0), ValueError, r"positive integer; got 2\.0"),
    "no dim": (lambda: ds.Target.from_log_prob(gaussian), ValueError, r"exactly one of dim and space"),
    "discrete latent": (
        lambda: ds.pyro.PyroTarget(count_model),
        ValueError,
        r"got 'count', which cannot be summed out",
    ),
    "sites differ": (lambda: ds.pyro.PyroTarget(growing_model), ValueError, r"same latent sites"),
    "no model": (lambda: ds.pyro.PyroTarget(3), TypeError, r"Expected a Pyro model, a callable; got int"),
    "budget 0 s": (lambda: ds.Budget(seconds=0), ValueError, r"positive budget of seconds; got 0\. Leave it out"),
    "budget NaN": (lambda: ds.Budget(seconds=float("nan")), ValueError, r"positive budget of seconds; got nan"),
    "budget -3": (lambda: ds.Budget(steps=-3), ValueError, r"positive budget of steps; got -3"),
    "budget 1.5 steps": (lambda: ds.Budget(steps=1.5), ValueError, r"whole number as budget of steps; got 1\.5"),
    "budget text": (lambda: ds.Budget(evaluations="9"), TypeError, r"number as budget of evaluations; got '9'"),
    "budget plain": (given(budget=60), TypeError, r"such as ds\.Budget\(seconds=60\); got int"),
    "method misspelt": (given(method="cmdc"), ValueError, r"got 'cmdc'\. Did you mean 'cmcd'\?"),
    "method upper case": (given(method="DDS"), ValueError, r"got 'DDS'\. Did you mean 'dds'\?"),
    "method far off": (given(method="xyz"), ValueError, r"A classical sampler is passed as an object"),
    "method class": (given(method=ds.DIS), TypeError, r"such as ds\.CMCD\(target\); got the class DIS"),
    "method function": (given(method=gaussian), TypeError, r"a method or a Sampler.*; got function"),
    "sampler of another density": (
        given(method=sampler_of(lambda x: gaussian(x - 1))),
        ValueError,
        r"one of another: log_prob is -?\d.* at x = \[",
    ),
    "chains of another density": (
        given(method=baselines.HMC(ds.Target.from_log_prob(lambda x: gaussian(x - 1), dim=2))),
        ValueError,
        r"one of another",
    ),
    "sampler of another space": (given(method=sampler_of(gaussian, dim=3)), ValueError, r"on Euclidean\(dim=2.*dim=3"),
    "num_samples 0": (given(num_samples=0), ValueError, r"num_samples >= 1; got 0"),
    "num_samples 10.0": (given(num_samples=10.0), TypeError, r"num_samples to be an integer; got 10\.0"),
    "seed text": (given(seed="7"), TypeError, r"seed to be an integer; got '7'"),
    "dtype": (given(dtype=torch.float16), ValueError, r"torch\.float32 or torch\.float64; got torch\.float16"),
    "no such device": (given(device="gpu"), ValueError, r"that is there \(cpu.*\); got 'gpu'"),
    "device without memory": (given(device="meta"), ValueError, r"that is there \(cpu.*\); got 'meta'"),
    "resume from nowhere": (given(resume=True), ValueError, r"checkpoint=folder with resume=True"),
    "auto keeps no checkpoint": (given(method="auto", checkpoint="x"), ValueError, r"learned method .*; got 'auto'"),
    "chains keep no checkpoint": (
        given(method=baselines.HMC(ds.Target.from_log_prob(gaussian, dim=2)), checkpoint="x"),
        ValueError,
        r"got 'HMC'",
    ),
    "steps of a method": (
        lambda: ds.DIS(ds.Target.from_log_prob(gaussian, dim=2), num_steps=0),
        ValueError,
        r"num_steps >= 1; got 0",
    ),
    "scale of a method": (
        lambda: ds.CMCD(ds.Target.from_log_prob(gaussian, dim=2), scale=-1.0),
        ValueError,
        r"scale > 0; got -1",
    ),
    "scale of a target": (lambda: targets.Funnel(dim=10, scale=-3.0), ValueError, r"scale to be positive; got -3"),
    "space of dimension 0": (lambda: ds.Euclidean(0), ValueError, r"at least one degree of freedom"),
    "one mean-free particle": (lambda: ds.MeanFree(1, 2), ValueError, r"at least one degree of freedom"),
}


@pytest.mark.parametrize("name", DENSITIES)
def test_density_is_refused(name):
    call, kind, message = DENSITIES[name]
    with pytest.raises(kind, match=message):
        call()


@pytest.mark.parametrize("name", CALLS)
def test_call_is_refused(name):
    call, kind, message = CALLS[name]
    with pytest.raises(kind, match=message):
        call()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_device_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"Expected a device that is there \(cpu\); got 'cuda'"):
        given(device="cuda")()


@pytest.mark.parametrize(
    "function",
    [
        gaussian,
        lambda x: gaussian(x.double()),
        lambda x: gaussian(x.float()),
        lambda x: gaussian(x @ torch.eye(2)),
        lambda x: gaussian(1e-7 * x),
        lambda x: 1e4 + gaussian(x.float()).double(),
        lambda x: gaussian(x).masked_fill(x[..., 0].abs() > 2.0, -torch.inf),
        lambda x: -1.01 * torch.log1p(x.abs()).sum(-1) - 0.1 * x.abs().sum(-1),
        lambda x: torch.distributions.Normal(0.0, x[..., 0].exp()).log_prob(x[..., 1]) + gaussian(x),
    ],
    ids=["plain", "double", "float", "float constants", "wide", "rough", "bounded", "kink", "torch's own validation"],
)
def test_sound_densities_pass(function):
    from diffsampler.checks import check_target

    check_target(ds.Target.from_log_prob(function, dim=2))


def test_a_bounded_density_is_sampled_with_a_finding():
    target = ds.Target.from_log_prob(lambda x: gaussian(x).masked_fill(x[..., 0] < 0, -torch.inf), dim=2)
    fit = ds.sample(target, method="smc", num_samples=512)
    assert any("log_prob is -inf at" in finding.message for finding in fit.findings)
    assert (fit.particles.x[:, 0] >= 0).all()


def test_a_model_that_branches_on_a_value_is_looped_over_with_a_warning():
    def model(y):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x, 1.0 if x > 0 else 2.0), obs=y)

    with pytest.warns(UserWarning, match="Python loop over points, which is slow: it branches on a sampled value"):
        target = ds.pyro.PyroTarget(model, torch.tensor(1.0))
    fit = ds.sample(
        target, method=ds.DIS(target, num_steps=2), num_samples=4, budget=ds.Budget(steps=1, evaluations=10)
    )
    assert fit.posterior["x"].shape[0] >= 4


def fitted() -> ds.Fit:
    x = torch.randn(200, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return ds.Fit(Particles(x, torch.zeros(200, dtype=torch.float64)), {"x": x}, [], 10, 1.0, "smc")


def forbid(monkeypatch, name):
    real = builtins.__import__

    def fake(module, *args, **kwargs):
        if module.split(".")[0] == name:
            raise ModuleNotFoundError(f"No module named {name!r}", name=module)
        return real(module, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", fake)


def test_missing_arviz_is_named(monkeypatch):
    forbid(monkeypatch, "arviz")
    with pytest.raises(ImportError, match=r"Expected arviz to be installed: pip install 'arviz"):
        fitted().to_arviz()


def test_missing_matplotlib_is_named(monkeypatch):
    forbid(monkeypatch, "matplotlib")
    with pytest.raises(ImportError, match=r"Expected matplotlib to be installed: pip install matplotlib"):
        fitted().plot("pair")


def test_missing_tqdm_is_named(monkeypatch):
    forbid(monkeypatch, "tqdm")
    with pytest.raises(ImportError, match=r"Expected tqdm to be installed: pip install tqdm"):
        given(progress=True)()


def test_plots_that_cannot_be_drawn():
    with pytest.raises(ValueError, match=r"Expected kind 'pair', 'weights' or 'training'; got 'trace'"):
        fitted().plot("trace")
    with pytest.raises(ValueError, match=r"'smc' keeps no training history"):
        fitted().plot("training")
    with pytest.raises(ValueError, match=r"Expected n >= 1; got 0"):
        fitted().resample(0)


def test_files_that_cannot_be_read(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"Expected a file written by Fit\.save; there is none at .*absent"):
        ds.load(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"there is none at"):
        ds.load(tmp_path)
    (tmp_path / "text").write_text("not a fit")
    with pytest.raises(ValueError, match=r"which cannot be read"):
        ds.load(tmp_path / "text")
    fitted().save(tmp_path / "fit")
    whole = (tmp_path / "fit").read_bytes()
    (tmp_path / "half").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"which cannot be read"):
        ds.load(tmp_path / "half")
    torch.save({"particles": {}}, tmp_path / "other")
    with pytest.raises(ValueError, match=r"which holds something else"):
        ds.load(tmp_path / "other")


def test_a_full_disk_leaves_the_previous_file(tmp_path: Path, monkeypatch):
    path = tmp_path / "fit"
    fitted().save(path)
    before = path.read_bytes()

    def full(content, stream):
        stream.write(b"some of it")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(storage.torch, "save", full)
    with pytest.raises(OSError, match="No space left on device"):
        fitted().save(path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["fit"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, r"another configuration \(.*seed: checkpoint 0, now 1"),
        ({"method": "pis"}, r"another configuration \(.*checkpoint 'DIS', now 'PIS'"),
        ({"budget": ds.Budget(steps=3)}, r"another configuration \(.*steps: checkpoint 2, now 3"),
    ],
)
def test_checkpoints_of_another_configuration_are_refused(tmp_path: Path, change, message):
    given(checkpoint=tmp_path)()
    with pytest.raises(ValueError, match=message):
        given(checkpoint=tmp_path, resume=True, **change)()


def test_checkpoints_of_another_density_are_refused(tmp_path: Path):
    given(checkpoint=tmp_path)()
    other = ds.Target.from_log_prob(lambda x: -x.square().square().sum(-1), dim=2)
    with pytest.raises(ValueError, match=r"checkpoint.* (another configuration|other constants)"):
        ds.sample(other, checkpoint=tmp_path, resume=True, **QUICK)
