"""Step sizes of controlled annealed Langevin chains: what may train them."""

import pytest
import torch

import diffsampler as ds
from diffsampler import targets
from diffsampler.gradient import accumulate_gradient
from diffsampler.methods.cmcd import CMCDProcess
from diffsampler.objective import LogVariance, ReverseKL
from diffsampler.trajectory import simulate


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def modes():
    return targets.GaussianMixture([[-3.0, 0.0], [3.0, 0.0]], scales=0.5)


def chain(log_factor):
    process = CMCDProcess(modes().space, 12, scale=3.0, local_scale=0.2, width=8, seed=0)
    with torch.no_grad():
        process.log_step += log_factor
    return process


def test_fixed_paths_ask_for_larger_steps_where_fresh_ones_ask_for_smaller():
    """The derivative of the log-variance with respect to all step sizes at once, at fixed paths and of fresh ones."""
    target, wide = modes(), 1.3
    process = chain(wide)
    path = simulate(process, target, 20_000, generator=generator())
    accumulate_gradient(process, LogVariance(), path)
    fixed = float(process.log_step.grad.sum())

    def variance(log_factor):
        return float(simulate(chain(log_factor), target, 20_000, generator=generator()).log_weight.var())

    fresh = (variance(wide + 0.1) - variance(wide - 0.1)) / 0.2
    # Measured -0.39 and 2.7.
    assert fixed < -0.1
    assert fresh > 0.5


@pytest.mark.parametrize("kind", [ds.CMCD, ds.MCD, ds.AnnealedULA, ds.GBS])
def test_step_sizes_learn_from_pathwise_losses_only(kind):
    def moved(**options):
        sampler = kind(modes(), num_steps=4, scale=3.0, local_scale=0.3, **options)
        before = sampler.process.log_step.detach().clone()
        sampler.fit(steps=2, batch_size=32, learning_rate=1e-2, ema_decay=0.0)
        return not torch.equal(before, sampler.process.log_step)

    assert not moved()
    assert not moved(objective=LogVariance())
    assert moved(objective=ReverseKL())
    assert moved(learn_steps=True)


def test_pieces_keep_their_step_sizes_unless_told():
    for told in (False, True):
        options = {"learn_steps": True} if told else {}
        sampler = ds.SCLD(modes(), num_steps=4, segments=2, scale=3.0, local_scale=0.3, **options)
        before = sampler.process.log_step.detach().clone()
        sampler.fit(steps=2, batch_size=32, learning_rate=1e-2, ema_decay=0.0)
        assert torch.equal(before, sampler.process.log_step) != told


def test_what_a_method_leaves_out_cannot_be_asked_for():
    for kind, option in (
        (ds.MCD, "forward_control"),
        (ds.AnnealedULA, "backward_control"),
        (ds.LDVI, "forward_control"),
        (ds.UHA, "backward_control"),
    ):
        with pytest.raises(TypeError, match=f"multiple values for keyword argument '{option}'"):
            kind(modes(), **{option: True})


def test_a_carried_chain_remembers_what_is_learned():
    space = modes().space
    assert not CMCDProcess(space, 4, learn_steps=False).regridded(8).log_step.requires_grad
    assert CMCDProcess(space, 4).regridded(8).log_step.requires_grad
