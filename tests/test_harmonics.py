"""Fourier series in every coordinate of a control."""

import math

import pytest
import torch

import diffsampler as ds
from diffsampler import targets
from diffsampler.networks import Control, CoordinateSeries
from diffsampler.objective import VarGrad
from diffsampler.schedule import variance_exploding
from diffsampler.space import Euclidean, EuclideanTorus, MeanFree, Torus


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def filled(space, **options):
    control = Control(space, generator=generator(), width=8, **options).double()
    with torch.no_grad():
        for parameter in control.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator(1), dtype=torch.float64))
    return control


def test_series_is_the_sum_that_its_docstring_states():
    series = CoordinateSeries(Euclidean(3), generator=generator(), width=5, parts=2, harmonics=4).double()
    with torch.no_grad():
        series.out.weight.normal_(generator=generator())
        series.out.bias.normal_(generator=generator())
    time = torch.randn(2, 1, 5, generator=generator(), dtype=torch.float64)
    x = torch.randn(2, 7, 3, generator=generator(), dtype=torch.float64)
    table = series.out(torch.nn.functional.silu(time)).reshape(2, 2, 3, 8)
    expected = torch.zeros(2, 7, 2, 3, dtype=torch.float64)
    for step in range(2):
        for part in range(2):
            for m in range(4):
                turn = (m + 1) * 0.25 * math.pi * x[step]
                expected[step, :, part] += (
                    table[step, part, :, m] * turn.sin() + table[step, part, :, 4 + m] * turn.cos()
                )
    torch.testing.assert_close(series(time, x), expected, rtol=1e-5, atol=1e-5)


def test_controls_agree_without_trained_series_and_refuse_spaces_without_coordinates():
    plain = Control(Euclidean(3), generator=generator(), extra_outputs=3)
    rich = Control(Euclidean(3), generator=generator(), extra_outputs=3, harmonics=4)
    t, x = torch.rand(4, 1, generator=generator()), torch.randn(4, 5, 3, generator=generator())
    for a, b in zip(plain(t, x, x), rich(t, x, x), strict=True):
        assert torch.equal(a, b), "series start at zero"
    with pytest.raises(ValueError, match="Expected harmonics=0: MeanFree"):
        Control(MeanFree(3, 2), generator=generator(), harmonics=4)
    with pytest.raises(ValueError, match="Expected harmonics >= 0; got -1"):
        Control(Euclidean(2), generator=generator(), harmonics=-1)


@pytest.mark.parametrize("space", [Torus(2), EuclideanTorus(1, 1)])
def test_series_on_circles_have_their_period(space):
    control = filled(space, harmonics=3)
    t = torch.full((6,), 0.4, dtype=torch.float64)
    x = torch.randn(6, 2, generator=generator(), dtype=torch.float64)
    turned = x + torch.tensor([0.0, 2.0 * math.pi])
    torch.testing.assert_close(control(t, x, 0.0 * x)[0], control(t, turned, 0.0 * x)[0], rtol=1e-4, atol=1e-5)
    moved = x + torch.tensor([0.0, 1.0])
    assert not torch.allclose(control(t, x, 0.0 * x)[0], control(t, moved, 0.0 * x)[0], atol=0.05), "control"


@pytest.mark.parametrize("factors", [0, 1, 3])
def test_series_of_extra_outputs_belong_to_coordinates(factors):
    control = filled(Euclidean(3), extra_outputs=factors, harmonics=2)
    assert control.series.shape[0] == (2 if factors == 3 else 1)
    t, x = torch.rand(4, generator=generator()).double(), torch.randn(4, 3, generator=generator()).double()
    assert control(t, x, x)[1].shape == (4, factors)


KINDS = {
    "dis": lambda target, **o: ds.DIS(target, num_steps=8, point_features=0, **o),
    "dds": lambda target, **o: ds.DDS(target, num_steps=8, **o),
    "pis": lambda target, **o: ds.PIS(target, num_steps=8, **o),
    "gfn": lambda target, **o: ds.GFN(target, num_steps=8, **o),
    "cmcd": lambda target, **o: ds.CMCD(target, num_steps=8, **o),
    "gbs": lambda target, **o: ds.GBS(target, num_steps=8, **o),
    "ucmcd": lambda target, **o: ds.UCMCD(target, num_steps=8, **o),
}


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_weights_stay_exact_and_series_are_trained(kind):
    """E[w] = Z at parameters far from trained: 5 standard errors, false alarm below 1e-6 for a mean of 20,000."""
    target = targets.GaussianMixture([[-0.9, 0.0], [0.8, 0.6]], scales=0.7, weights=[0.4, 0.6])
    sampler = KINDS[kind](target, scale=1.3, harmonics=3, width=8)
    sampler.fit(steps=3, batch_size=64, learning_rate=3e-2, ema_decay=0.0)
    assert float(sampler.process.control.series.out.weight.detach().abs().max()) > 1e-3
    weight = sampler.sample(20_000, seed=1).log_weight.exp()
    assert abs(float(weight.mean()) - 1.0) < 5.0 * float(weight.std()) / math.sqrt(len(weight))


def test_separate_wells_are_learned_in_a_fraction_of_the_steps():
    """Sixteen wells: at equal steps the gap with series is a third of the plain network's at most."""
    target = targets.ManyWell(16)

    def gap(harmonics):
        sampler = ds.DIS(target, schedule=variance_exploding(16, noise_min=0.1, noise_max=2.5), scale=1.5,
                         objective=VarGrad(), harmonics=harmonics, point_features=0)  # fmt: skip
        sampler.fit(steps=150, batch_size=128, learning_rate=4e-3, ema_decay=0.98)
        return target.log_normalizer - sampler.sample(2000, seed=1).elbo

    plain, rich = gap(0), gap(8)
    assert rich < plain / 3.0, (plain, rich)
