import math

import pytest
import torch

from diffsampler.particles import Particles
from diffsampler.pilot.guard import Guarded
from diffsampler.pilot.guide import Guide, Knowledge
from diffsampler.pilot.last_pass import imprecision, joined, last_pass
from diffsampler.pilot.passes import Job, adaptive_pass
from diffsampler.pilot.record import Meter
from diffsampler.pilot.reference import student_t
from diffsampler.pilot.transport import AffineMap
from diffsampler.smc import smc
from diffsampler.target import CountedTarget, Target
from diffsampler.tempering import TemperedPath

DIM = 3


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def job_on(target, *, num_particles, evaluations=None):
    guard = Guarded(target)
    counted = CountedTarget(guard)
    meter = Meter(counted, seconds=None, evaluations=evaluations)
    return Job(counted, guard, meter, generator(), lambda _: None, num_particles, 16, 8, 1000)


def guide_of(width):
    unit = AffineMap(torch.zeros(DIM).double(), torch.eye(DIM).double())
    return Guide(unit, student_t(torch.zeros(DIM).double(), torch.full((DIM,), width).double(), df=5.0), {"wide": 1.0})


def gaussian():
    return Target.from_log_prob(lambda x: -0.5 * x.square().sum(-1), dim=DIM)


def test_imprecision_is_the_error_of_independent_draws():
    x = torch.randn((8192, DIM), generator=generator(), dtype=torch.float64)
    iid = Particles(x, torch.zeros(8192, dtype=torch.float64), 64)
    # The largest of 2 D + 1 errors, each known to 9 % from 64 blocks.
    assert 0.9 / math.sqrt(8192) < imprecision(iid) < 1.5 / math.sqrt(8192)
    dependent = Particles(x[:512].repeat_interleave(16, 0), iid.log_weight, 64)
    assert imprecision(dependent) > 3.0 * imprecision(iid)


def test_joined_rounds_are_one_result():
    path = TemperedPath(student_t(torch.zeros(DIM).double(), torch.full((DIM,), 2.0).double()), gaussian())
    first = smc(path, n=256, num_islands=4, generator=generator())
    rounds = [smc(path, n=256, num_islands=4, generator=generator(s), schedule=first.schedule) for s in (1, 2, 3)]
    whole = joined(rounds)
    assert len(whole.particles) == 768 and whole.particles.replicates == 12
    torch.testing.assert_close(whole.particles.log_replicates, torch.cat([r.particles.log_replicates for r in rounds]))
    assert whole.evaluations == sum(r.evaluations for r in rounds)
    assert int(whole.ancestors.max()) < 768 and int(whole.ancestors[512:].min()) >= 512
    assert joined(rounds[:1]) is rounds[0]


@pytest.mark.parametrize(("width", "most"), [(1.2, 2), (6.0, 4)])
def test_rounds_are_added_until_moments_are_precise(width, most):
    job = job_on(gaussian(), num_particles=2048)
    passes = [adaptive_pass(job, job.target, guide_of(width), until=1.0, last=None)]
    final = last_pass(job, job.target, None, passes)
    assert len(final.particles) in [2048 * k for k in range(1, most + 1)]
    error = abs(final.particles.log_normalizer.value - 1.5 * math.log(2.0 * math.pi))
    # Five standard errors with at least 15 degrees of freedom: false alarm about 2e-4.
    assert error < 5.0 * final.particles.log_normalizer.std_error


def test_no_round_beyond_the_budget():
    job = job_on(gaussian(), num_particles=2048, evaluations=40_000)
    passes = [adaptive_pass(job, job.target, guide_of(6.0), until=0.4, last=None)]
    last_pass(job, job.target, None, passes)
    assert job.target.evaluations < 44_000


def test_reference_is_refitted_where_islands_disagree():
    # Two narrow measurements: from a reference 200 times too wide, reached in one step by few particles per island.
    target = Target.from_log_prob(lambda x: -0.5 * ((x - 30.0) / 0.05).square().sum(-1), dim=DIM)
    job = job_on(target, num_particles=512)
    guide = guide_of(20.0)
    path = TemperedPath(guide.reference, guide.pull_back(job.target))
    first = adaptive_pass(job, job.target, guide, until=1.0, last=None)
    assert first.path.reference is path.reference
    hasty = smc(path, n=512, num_islands=4, generator=generator(), conditional_ess=0.02, num_moves=2)
    passes = [type(first)(guide, path, hasty, 0.0)]
    final = last_pass(job, job.target, Knowledge(), passes)
    assert len(passes) > 1
    truth = 1.5 * math.log(2.0 * math.pi) + 3.0 * math.log(0.05)
    estimate = final.particles.log_normalizer
    assert abs(estimate.value - truth) < 5.0 * estimate.std_error + 0.02
    # Without the refit the same pass is wrong or says nothing.
    alone = last_pass(job, job.target, None, passes[:1])
    assert imprecision(alone.particles) > 2.0 * imprecision(final.particles)
