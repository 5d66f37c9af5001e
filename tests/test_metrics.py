"""Distances between samples against closed forms, brute force, and what they must not see."""

from __future__ import annotations

import itertools
import math

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from diffsampler import metrics, targets
from diffsampler.metrics.alignment import _nuclear_norm


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def orthogonal(d: int, seed: int) -> torch.Tensor:
    q, r = torch.linalg.qr(normal(d, d, seed=seed))
    return q * r.diagonal().sign()


def moved(x: torch.Tensor, n: int, *, seed: int, order: list[int] | None = None) -> torch.Tensor:
    """Every configuration in a frame of its own, with its particles renamed."""
    points = x.reshape(len(x), n, -1)
    d = points.shape[-1]
    names = list(torch.randperm(n, generator=seeded(seed))) if order is None else order
    frames = torch.stack([orthogonal(d, seed + k) for k in range(len(x))])
    return (points[:, names] @ frames + normal(len(x), 1, d, seed=seed + 1)).flatten(1)


# --- numbers -------------------------------------------------------------------------------------------------------


@given(n=st.integers(1, 30), m=st.integers(1, 30), seed=st.integers(0, 1000))
def test_line_distance_agrees_with_scipy(n, m, seed):
    x, y, v, w = normal(n, seed=seed), normal(m, seed=seed + 1), normal(n, seed=seed + 2), normal(m, seed=seed + 3)
    expected = stats.wasserstein_distance(x, y, v.exp(), w.exp())
    found = metrics.wasserstein_line(x, y, order=1.0, x_log_weight=v, y_log_weight=w)
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)


@given(n=st.integers(1, 30), seed=st.integers(0, 1000), shift=st.floats(-5, 5))
def test_line_distance_of_equal_sizes_pairs_the_sorted(n, seed, shift):
    x, y = normal(n, seed=seed), normal(n, seed=seed + 1)
    expected = (x.sort().values - y.sort().values).square().mean().sqrt().item()
    assert metrics.wasserstein_line(x, y) == pytest.approx(expected, abs=1e-9)
    assert metrics.wasserstein_line(x, x + shift) == pytest.approx(abs(shift), abs=1e-9)


def test_weights_count_as_repetitions():
    x, y = normal(4), normal(9, seed=1)
    repeated = x[[0, 0, 1, 2, 2, 2, 3]]
    log_weight = torch.tensor([2.0, 1.0, 3.0, 1.0], dtype=torch.float64).log() + 700.0
    weighted = metrics.wasserstein_line(x, y, x_log_weight=log_weight)
    assert weighted == pytest.approx(metrics.wasserstein_line(repeated, y), rel=1e-9)
    ignored = metrics.wasserstein_line(
        torch.cat([x, x.new_tensor([50.0])]), x, x_log_weight=torch.tensor([0.0] * 4 + [-math.inf])
    )
    assert ignored == pytest.approx(0.0, abs=1e-6)
    tv = metrics.total_variation(x, y, limits=(-3, 3), bins=20, x_log_weight=log_weight)
    assert tv == pytest.approx(metrics.total_variation(repeated, y, limits=(-3, 3), bins=20), abs=1e-12)


def test_total_variation_in_closed_form():
    x = torch.tensor([0.1, 0.2, 0.6, 0.9])
    assert metrics.total_variation(x, x, bins=5) == 0.0
    assert metrics.total_variation(x, x + 2.0, bins=30) == pytest.approx(1.0)
    y = torch.tensor([0.1, 0.6, 0.6, 0.6])
    assert metrics.total_variation(x, y, bins=2, limits=(0.0, 1.0)) == pytest.approx(0.25)
    # Mass outside the limits is not forgotten, and the upper limit is inside.
    assert metrics.total_variation(x, torch.tensor([0.1, 0.2, 0.6, 7.0]), bins=2, limits=(0.0, 1.0)) == pytest.approx(
        0.25
    )
    assert metrics.total_variation(x, torch.tensor([0.1, 0.2, 0.6, 1.0]), bins=2, limits=(0.0, 1.0)) == 0.0
    assert metrics.total_variation(torch.ones(3), torch.ones(2)) == 0.0


# --- pairs ---------------------------------------------------------------------------------------------------------


def test_pair_distances_of_a_triangle():
    x = torch.tensor([0.0, 0.0, 3.0, 0.0, 0.0, 4.0], dtype=torch.float64)
    assert metrics.pair_distances(x, n=3).tolist() == [3.0, 4.0, 5.0]
    assert metrics.pair_distances(x, n=3, box=4.5).tolist() == pytest.approx([1.5, 0.5, math.hypot(1.5, 0.5)])


def test_pair_distances_of_a_stretched_set_in_closed_form():
    """Stretching maps distances monotonically, so the transport is the stretch itself."""
    x = normal(50, 12)
    distances = metrics.pair_distances(x, n=4)
    expected = 0.3 * distances.square().mean().sqrt().item()
    assert metrics.pair_wasserstein(x, 1.3 * x, n=4) == pytest.approx(expected, rel=1e-9)
    assert metrics.pair_wasserstein(x, moved(x, 4, seed=3), n=4) == pytest.approx(0.0, abs=1e-9)
    assert metrics.pair_total_variation(x, moved(x, 4, seed=3), n=4, limits=(0.0, 9.0)) < 0.01
    weight = normal(50, seed=2)
    both = torch.cat([x, 1.3 * x]), torch.cat([weight, torch.full((50,), -math.inf)])
    assert metrics.pair_wasserstein(x, both[0], n=4, x_log_weight=weight, y_log_weight=both[1]) == pytest.approx(
        0, abs=1e-6
    )


@pytest.mark.parametrize("d", [1, 2, 3])
def test_ideal_gas_has_no_structure(d):
    n, box = 6, 3.0
    x = box * torch.rand(4000, n * d, generator=seeded(), dtype=torch.float64)
    counts = metrics.radial_distribution(x, n=n, bins=10, box=box)
    expected = 4000 * 15 * (counts.density * 0.15)
    # Pairs are nearly independent: ten bins at five standard errors, false alarm 6e-6.
    assert ((counts.radial - 1.0).abs() * expected.sqrt()).max() < 5.0
    assert counts.distance[0].item() == pytest.approx(0.075) and counts.distance[-1].item() == pytest.approx(1.425)


def test_radial_distribution_of_a_cluster_integrates_to_its_neighbours():
    x = normal(300, 15)
    counts = metrics.radial_distribution(x, n=5, bins=400)
    width = counts.distance[1] - counts.distance[0]
    assert (counts.density * width).sum().item() == pytest.approx(1.0, abs=1e-12)
    # 4 neighbours of each particle; shells at their centres are exact to second order of their width.
    shell = 4.0 * math.pi * counts.distance.square() * width
    assert (counts.radial * shell).sum().item() == pytest.approx(4.0, rel=1e-3)
    weight = normal(300, seed=1)
    weighted = metrics.radial_distribution(x, n=5, bins=7, cutoff=4.0, log_weight=weight)
    inside = (metrics.pair_distances(x, n=5) < 4.0).double().mean(-1)
    total = (weighted.density * 4.0 / 7).sum().item()
    assert total == pytest.approx(float(inside @ torch.softmax(weight, 0)), rel=1e-12)


# --- clouds and alignment ------------------------------------------------------------------------------------------


def test_cloud_distance_by_brute_force():
    x, y = normal(5, 3), normal(5, 3, seed=1)
    best = min((x - y[list(p)]).square().sum(-1).mean().item() for p in itertools.permutations(range(5)))
    assert metrics.wasserstein(x, y) == pytest.approx(math.sqrt(best), rel=1e-12)
    assert metrics.wasserstein(x, x.flip(0) + 2.0) == pytest.approx(2.0 * math.sqrt(3.0), rel=1e-12)


@pytest.mark.parametrize("d", [1, 2, 3, 4])
def test_nuclear_norm(d):
    matrices = normal(50, d, d)
    torch.testing.assert_close(_nuclear_norm(matrices.permute(1, 2, 0)), torch.linalg.svdvals(matrices).sum(-1))


ALIGNMENTS = {
    "exact plane": (metrics.ExactAlignment(n=4, d=2), 4),
    "exact space": (metrics.ExactAlignment(n=3, d=3), 3),
    "exact line": (metrics.ExactAlignment(n=5, d=1), 5),
}


@given(name=st.sampled_from(list(ALIGNMENTS)), seed=st.integers(0, 10_000), data=st.data())
def test_exact_alignment_knows_neither_frame_nor_labels(name, seed, data):
    alignment, n = ALIGNMENTS[name]
    x, y = normal(4, n * alignment.d, seed=seed), normal(5, n * alignment.d, seed=seed + 1)
    order = data.draw(st.permutations(range(n)))
    square = alignment.squared_distances(x, y)
    torch.testing.assert_close(alignment.squared_distances(x, moved(y, n, seed=seed, order=order)), square)
    torch.testing.assert_close(alignment.squared_distances(y, x), square.T)
    assert alignment.squared_distances(x, moved(x, n, seed=seed, order=order)).diagonal().max() < 1e-9


def test_exact_alignment_by_brute_force_in_the_plane():
    x, y = normal(3, 8), normal(4, 8, seed=1)
    found = metrics.ExactAlignment(n=4, d=2).squared_distances(x, y)
    a, b = (z.reshape(-1, 4, 2) - z.reshape(-1, 4, 2).mean(1, keepdim=True) for z in (x, y))
    angle = torch.linspace(0, 2 * math.pi, 4001, dtype=torch.float64)
    turn = torch.stack([torch.stack([angle.cos(), angle.sin()]), torch.stack([-angle.sin(), angle.cos()])]).permute(
        2, 0, 1
    )
    flip = torch.tensor([[1.0, 0.0], [0.0, -1.0]], dtype=torch.float64)
    frames = torch.cat([turn, turn @ flip])
    for i, j in itertools.product(range(3), range(4)):
        best = min(
            (a[i] - b[j][list(p)] @ frames).square().sum((1, 2)).min().item() for p in itertools.permutations(range(4))
        )
        assert found[i, j].item() == pytest.approx(best, abs=1e-4)
        assert found[i, j].item() <= best + 1e-9


def test_alternation_bounds_the_exact_distance_from_above():
    x, y = normal(12, 8), normal(15, 8, seed=1)
    exact = metrics.ExactAlignment(n=4, d=2).squared_distances(x, y)
    once, often, many = (
        metrics.AlternatingAlignment(n=4, d=2, rounds=r, starts=s).squared_distances(x, y)
        for r, s in ((1, 1), (5, 1), (5, 40))
    )
    assert (once >= often - 1e-9).all() and (often >= many - 1e-9).all() and (many >= exact - 1e-9).all()
    assert (once > exact + 1e-6).double().mean() > 0.1
    torch.testing.assert_close(many, exact)


def test_one_round_is_an_assignment_and_then_a_rotation():
    """In a common frame the assignment alone undoes a renaming."""
    x = normal(6, 39)
    renamed = x.reshape(6, 13, 3)[:, torch.randperm(13, generator=seeded())].flatten(1)
    alignment = metrics.AlternatingAlignment(n=13, d=3)
    assert alignment.squared_distances(x, renamed).diagonal().max() < 1e-9
    # Turned as well, one round from the given frame may miss it: it is an upper bound.
    turned = moved(x, 13, seed=5)
    once = alignment.squared_distances(x, turned).diagonal()
    better = metrics.AlternatingAlignment(n=13, d=3, rounds=10, starts=30).squared_distances(x, turned).diagonal()
    assert once.max() > 1.0 and better.min() < 1e-9 and (better <= once + 1e-9).all()


def test_aligned_distance_of_moved_sets_and_its_control():
    alignment = metrics.ExactAlignment(n=4, d=2)
    x = targets.DoubleWell4().sample(60, generator=seeded())
    shuffled = moved(x, 4, seed=1)[torch.randperm(60, generator=seeded(2))]
    assert metrics.aligned_wasserstein(x, shuffled, alignment) < 1e-6
    assert metrics.wasserstein(x, shuffled) > 0.5
    # A stretched set is as far away as the stretch, as long as that is small.
    size = (x.square().sum(-1)).mean().sqrt().item()
    assert metrics.aligned_wasserstein(x, 1.001 * x, alignment) == pytest.approx(0.001 * size, rel=1e-6)


@pytest.mark.slow
def test_floor_of_four_particles():
    """What 2,000 exact samples score against 2,000 others: 0.127 (sd 0.042) in energy, 0.235 (sd 0.021) aligned."""
    target, alignment = targets.DoubleWell4(), metrics.ExactAlignment(n=4, d=2)
    energy, aligned, stretched = [], [], []
    for seed in range(4):
        x, y = (target.sample(2000, generator=seeded(2 * seed + k)) for k in range(2))
        energy.append(metrics.wasserstein_line(target.energy(x), target.energy(y)))
        aligned.append(metrics.aligned_wasserstein(x, y, alignment))
        stretched.append(metrics.aligned_wasserstein(1.05 * x, y, alignment))
    # Four published standard deviations of the mean of four runs.
    assert numpy.mean(energy) == pytest.approx(0.127, abs=0.084)
    assert numpy.mean(aligned) == pytest.approx(0.235, abs=0.042)
    assert numpy.mean(stretched) > numpy.mean(aligned) + 0.042


# --- angles --------------------------------------------------------------------------------------------------------


def test_angle_distance_goes_the_short_way():
    x = torch.tensor([[math.pi - 0.1, 0.0], [0.0, 1.0]], dtype=torch.float64)
    y = torch.tensor([[0.0, 1.0 + 6 * math.pi], [-math.pi + 0.1, 0.0]], dtype=torch.float64)
    assert metrics.angle_wasserstein(x, y) == pytest.approx(math.sqrt(0.5 * 0.2**2), rel=1e-9)
    assert metrics.angle_wasserstein(x, x + 2 * math.pi) == pytest.approx(0.0, abs=1e-9)


def test_torsion_divergence_in_closed_form():
    reference = torch.tensor([0.5, 0.5, 0.5, -0.5], dtype=torch.float64)
    x = torch.tensor([0.5, -0.5, 0.5 + 2 * math.pi, -0.5 - 4 * math.pi], dtype=torch.float64)
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert metrics.torsion_divergence(reference, x, bins=2, floor=1e-12).item() == pytest.approx(expected, rel=1e-9)
    assert metrics.torsion_divergence(
        reference, x[:2], bins=2, floor=1e-12, log_weight=torch.tensor([math.log(3.0), 0.0])
    ).item() == pytest.approx(0.0, abs=1e-6)
    # A basin that is missing altogether costs its mass times the logarithm of the floor.
    missing = metrics.torsion_divergence(reference, x[:1], bins=2, floor=1e-5).item()
    assert missing == pytest.approx(0.75 * math.log(0.75) + 0.25 * math.log(0.25 / 1e-5), rel=1e-3)
    both = metrics.torsion_divergence(torch.stack([reference, x], -1), torch.stack([x, x], -1), bins=2, floor=1e-12)
    assert both.tolist() == pytest.approx([expected, 0.0], abs=1e-9)


def test_torsion_divergence_of_exact_samples_is_its_noise():
    mixture = targets.VonMisesMixture.basins()
    reference, x = mixture.sample(400_000, generator=seeded()), mixture.sample(10_000, generator=seeded(1))
    found = metrics.torsion_divergence(reference, x, floor=1e-9 + 1e-5)
    assert found.max() < 2.0 * 200 / (2 * 10_000)
    assert metrics.torsion_divergence(reference, x + 0.2).min() > 0.05


# --- errors --------------------------------------------------------------------------------------------------------

ROW = torch.zeros(3, 8)
BAD = [
    (lambda: metrics.wasserstein_line(ROW, ROW), r"Expected x of shape \(n,\); got \(3, 8\)"),
    (
        lambda: metrics.wasserstein_line(ROW[:, 0], torch.tensor([math.nan])),
        "Expected finite numbers in y; got 1 that are not",
    ),
    (lambda: metrics.wasserstein_line(ROW[:0, 0], ROW[:, 0]), "Expected at least one sample in x"),
    (lambda: metrics.wasserstein_line(ROW[:, 0], ROW[:, 0], order=0.5), "Expected order to be at least 1; got 0.5"),
    (
        lambda: metrics.wasserstein_line(ROW[:, 0], ROW[:, 0], x_log_weight=torch.zeros(2)),
        r"Expected log weights of x of shape \(3,\); got \(2,\)",
    ),
    (
        lambda: metrics.wasserstein_line(ROW[:, 0], ROW[:, 0], x_log_weight=torch.full((3,), -math.inf)),
        "Expected log weights of x that are finite or -inf, one of them finite",
    ),
    (lambda: metrics.total_variation(ROW[:, 0], ROW[:, 0], limits=(1.0, 0.0)), "Expected limits in increasing order"),
    (lambda: metrics.total_variation(ROW[:, 0], ROW[:, 0], bins=0), "Expected bins to be at least 1; got 0"),
    (
        lambda: metrics.pair_distances(ROW, n=3),
        "Expected positions of n=3 particles, at least 2, in x; got trailing length 8",
    ),
    (lambda: metrics.pair_wasserstein(ROW[0], ROW, n=4), r"Expected configurations of shape \(N, n \* d\); got \(8,\)"),
    (lambda: metrics.radial_distribution(ROW, n=4, box=2.0, cutoff=1.5), "at most half the box; got 1.5"),
    (lambda: metrics.wasserstein(ROW, ROW[:2]), r"the same shape \(N, D\); got \(3, 8\) and \(2, 8\)"),
    (lambda: metrics.wasserstein(ROW, ROW / 0.0), "Expected finite samples; got some that are not"),
    (lambda: metrics.ExactAlignment(n=8, d=2), "Expected at most 7 particles for enumeration; got 8"),
    (
        lambda: metrics.ExactAlignment(n=1, d=2),
        "Expected at least 2 particles in at least 1 dimension; got n=1 and d=2",
    ),
    (
        lambda: metrics.AlternatingAlignment(n=4, d=2, rounds=0),
        "Expected at least one round and one start; got 0 and 1",
    ),
    (
        lambda: metrics.ExactAlignment(n=3, d=2).squared_distances(ROW, ROW),
        r"Expected x of shape \(N, 6\); got \(3, 8\)",
    ),
    (
        lambda: metrics.aligned_wasserstein(ROW, ROW[:2], metrics.ExactAlignment(n=4, d=2)),
        r"the same shape \(N, n \* d\); got \(3, 8\) and \(2, 8\)",
    ),
    (lambda: metrics.angle_wasserstein(ROW, ROW[:2]), r"the same shape \(N, m\); got \(3, 8\) and \(2, 8\)"),
    (lambda: metrics.torsion_divergence(ROW, ROW[:, :2]), r"Expected the same angles in both"),
    (lambda: metrics.torsion_divergence(ROW, ROW, floor=0.0), "Expected at least one bin and a positive floor"),
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
