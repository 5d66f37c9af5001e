"""The training loop: progress, resuming bit for bit, failures of disk and arithmetic, refused combinations."""

from __future__ import annotations

import errno
import math
import os
import resource
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import EUCLIDEAN, F64, MAKERS, gaussian, mixture
from torch import Tensor

from diffsampler import lessons, storage, training
from diffsampler.gradient import accumulate_gradient
from diffsampler.lessons import Paths
from diffsampler.methods.cmcd import CMCD, CMCDProcess
from diffsampler.methods.dds import DDS
from diffsampler.methods.dis import DIS
from diffsampler.methods.pis import PIS
from diffsampler.objective import (
    BridgeLikelihood,
    ForwardKL,
    LogVariance,
    Objective,
    ReverseKL,
    ScoreFunctionKL,
    TrajectoryBalance,
    VarGrad,
)
from diffsampler.process import Process
from diffsampler.sampler import DiffusionSampler
from diffsampler.schedule import variance_preserving
from diffsampler.sources import Draw, OnPolicy
from diffsampler.space import Euclidean
from diffsampler.target import Target
from diffsampler.training import Recipe, fit, load_checkpoint
from diffsampler.trajectory import simulate

SMALL = Recipe(steps=12, batch_size=16, learning_rate=5e-3)


class Stop(Exception):
    """Stands for a kill in the middle of training."""


def sampler(kind: str = "dds", *, objective: Objective | None = None, seed: int = 0) -> DiffusionSampler:
    target = gaussian()
    if kind == "cmcd":
        return CMCD(target, num_steps=5, scale=1.3, width=16, objective=objective, seed=seed)
    if kind == "dis":
        schedule = variance_preserving(5)
        return DIS(target, num_steps=5, schedule=schedule, width=16, point_features=8, objective=objective, seed=seed)
    return DDS(target, num_steps=5, scale=1.4, width=16, objective=objective, seed=seed)


def stop_at(step: int):
    def callback(entry: dict[str, float]) -> None:
        if entry["step"] >= step:
            raise Stop

    return callback


def parameters(process: Process) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in process.named_parameters()}


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def without_clock(history: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{key: value for key, value in entry.items() if key != "seconds"} for entry in history]


# Resuming

RUNS: dict[str, dict[str, Any]] = {
    "dds": {},
    "cmcd": {},
    "dis": {"bank": True},
    "balance": {"objective": TrajectoryBalance},
    "reverse": {"objective": ReverseKL},
    "bridge": {"objective": BridgeLikelihood, "bank": True},
}


@pytest.mark.parametrize("run", RUNS)
def test_resuming_repeats_the_uninterrupted_run_bit_for_bit(run: str, tmp_path: Path):
    options = RUNS[run]
    bank = gaussian().sample(50, generator=torch.Generator().manual_seed(9)) if options.get("bank") else None

    def build() -> DiffusionSampler:
        objective = options["objective"]() if "objective" in options else None
        return sampler(run if run in ("cmcd", "dis") else "dds", objective=objective)

    settings = {"steps": 45, "batch_size": 16, "learning_rate": 5e-3, "bank": bank, "seed": 3}
    whole = build().fit(**settings)
    broken = build()
    with pytest.raises(Stop):
        broken.fit(**settings, checkpoint=tmp_path, checkpoint_every=7, callback=stop_at(40))
    resumed = build().fit(**settings, checkpoint=tmp_path, checkpoint_every=7, resume=True)
    assert_same(parameters(whole.process), parameters(resumed.process))
    assert_same(dict(whole.objective.named_parameters()), dict(resumed.objective.named_parameters()))
    assert without_clock(whole.history) == without_clock(resumed.history)
    a, b = whole.sample(100, seed=4), resumed.sample(100, seed=4)
    assert torch.equal(a.x, b.x) and torch.equal(a.log_weight, b.log_weight)


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path):
    whole = sampler().fit(steps=10, batch_size=8, checkpoint=tmp_path)
    again = sampler(seed=5).fit(steps=10, batch_size=8, checkpoint=tmp_path, resume=True)
    assert_same(parameters(whole.process), parameters(again.process))
    # Without the word, a fresh start.
    fresh = sampler().fit(steps=10, batch_size=8, checkpoint=tmp_path)
    assert len(fresh.history) == len(whole.history)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 32}, "batch_size: checkpoint 16, now 32"),
        ({"learning_rate": 0.5}, "learning_rate: checkpoint 0.002, now 0.5"),
        ({"seed": 8}, "seed: checkpoint 0, now 8"),
    ],
)
def test_a_foreign_checkpoint_is_refused_with_the_difference(change: dict, message: str, tmp_path: Path):
    settings = {"steps": 5, "batch_size": 16}
    sampler().fit(**settings, checkpoint=tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        sampler().fit(**(settings | change), checkpoint=tmp_path, resume=True)
    assert "another folder, or resume=False" in str(caught.value)


def test_a_checkpoint_of_another_process_is_refused(tmp_path: Path):
    sampler("dds").fit(steps=3, batch_size=8, checkpoint=tmp_path)
    with pytest.raises(ValueError, match="process: checkpoint 'DDSProcess', now 'CMCDProcess'"):
        sampler("cmcd").fit(steps=3, batch_size=8, checkpoint=tmp_path, resume=True)
    with pytest.raises(ValueError, match="objective: checkpoint 'LogVariance', now 'VarGrad'"):
        sampler("dds", objective=VarGrad()).fit(steps=3, batch_size=8, checkpoint=tmp_path, resume=True)
    longer = DDS(gaussian(), num_steps=9, scale=1.4, width=16)
    with pytest.raises(ValueError, match="num_steps: checkpoint 5, now 9"):
        longer.fit(steps=3, batch_size=8, checkpoint=tmp_path, resume=True)


def test_a_checkpoint_of_other_constants_or_another_bank_is_refused(tmp_path: Path):
    settings = {"steps": 3, "batch_size": 8, "checkpoint": tmp_path}
    sampler().fit(**settings)
    wider = DDS(gaussian(), num_steps=5, scale=3.0, width=16)
    with pytest.raises(ValueError, match="other constants of the process: scale"):
        wider.fit(**settings, resume=True)
    assert float(wider.process.scale) == 3.0
    with pytest.raises(ValueError, match=r"bank: checkpoint None, now \(7, 2\)"):
        sampler().fit(**settings, bank=torch.zeros(7, 2), resume=True)


# Disk


def stored_step(folder: Path) -> int:
    return torch.load(folder / training.CHECKPOINT_NAME, weights_only=True)["state"]["step"]


@pytest.mark.parametrize("where", ["fdopen", "fsync", "replace", "mkstemp"])
def test_a_full_disk_keeps_the_previous_checkpoint_and_the_training(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    calls = []
    module = {"fdopen": os, "fsync": os, "replace": os, "mkstemp": storage.tempfile}[where]
    original = getattr(module, where)

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*args, **kwargs)

    monkeypatch.setattr(module, where, failing)
    with pytest.warns(UserWarning, match="Could not write the checkpoint of step .* No space left on device"):
        history = fit(
            MAKERS["pis"](Euclidean(2), 3), gaussian(), LogVariance(), SMALL, checkpoint=tmp_path, checkpoint_every=4
        )
    assert history[-1]["step"] == 12 and len(calls) == 4
    assert stored_step(tmp_path) == 4
    assert [path.name for path in tmp_path.iterdir()] == [training.CHECKPOINT_NAME], "no temporary file may stay"


def test_a_real_write_error_keeps_the_previous_checkpoint(tmp_path: Path):
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))

    fit(MAKERS["pis"](Euclidean(2), 3), gaussian(), LogVariance(), SMALL, checkpoint=tmp_path)
    before = (tmp_path / training.CHECKPOINT_NAME).read_bytes()
    script = f"""
        from diffsampler.storage import save_atomic
        import torch
        try:
            save_atomic({str(tmp_path / training.CHECKPOINT_NAME)!r}, {{"x": torch.zeros(100000)}})
        except OSError as error:
            print("refused", error.errno)
    """
    done = run_script(script, preexec_fn=limit)
    assert done.stdout.startswith("refused"), done.stderr
    assert (tmp_path / training.CHECKPOINT_NAME).read_bytes() == before


def run_script(script: str, **options: Any) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, **options)


def test_a_kill_in_the_middle_of_a_write_leaves_the_old_checkpoint(tmp_path: Path):
    script = f"""
        import os, signal
        from diffsampler import DDS
        from diffsampler.target import Target

        synced = []
        def dying(descriptor):
            synced.append(1)
            if len(synced) == 3:
                os.ftruncate(descriptor, 100)
                os.kill(os.getpid(), signal.SIGKILL)
        os.fsync = dying
        target = Target.from_log_prob(lambda x: -0.5 * x.square().sum(-1), dim=2)
        DDS(target, num_steps=3, width=8).fit(steps=20, batch_size=8, checkpoint={str(tmp_path)!r}, checkpoint_every=5)
    """
    done = run_script(script)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert stored_step(tmp_path) == 10
    target = Target.from_log_prob(lambda x: -0.5 * x.square().sum(-1), dim=2)
    settings = {"steps": 20, "batch_size": 8, "checkpoint_every": 5}
    resumed = DDS(target, num_steps=3, width=8).fit(**settings, checkpoint=tmp_path, resume=True)
    whole = DDS(target, num_steps=3, width=8).fit(**settings)
    assert_same(parameters(whole.process), parameters(resumed.process))


# Refused combinations


def test_wrong_sources_are_refused():
    target, process = gaussian(), MAKERS["dds"](Euclidean(2), 3)
    bank = torch.zeros(5, 2)
    with pytest.raises(ValueError, match="ReverseKL needs on-policy trajectories; Stored makes others"):
        fit(process, target, ReverseKL(), SMALL, bank=bank)
    for objective in (ForwardKL(), BridgeLikelihood()):
        with pytest.raises(ValueError, match="needs backward trajectories;.* bank="):
            fit(process, target, objective, SMALL)
    with pytest.raises(ValueError, match="BridgeLikelihood needs a process with closed-form bridges; CMCDProcess has"):
        fit(MAKERS["cmcd"](Euclidean(2), 3), target, BridgeLikelihood(), SMALL, bank=bank)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "Expected steps >= 1; got 0"),
        ({"batch_size": 1}, "Expected batch_size >= 2"),
        ({"learning_rate": 0.0}, "Expected learning_rate > 0; got 0.0"),
        ({"learning_rate": math.nan}, "Expected learning_rate > 0; got nan"),
        ({"bank_share": 1.5}, r"Expected bank_share in \[0, 1\]; got 1.5"),
        ({"micro_batch": 0}, "Expected micro_batch >= 1 or None; got 0"),
        ({"pieces": 0}, "Expected pieces >= 1; got 0"),
        ({"clip_norm": 0.0}, "Expected clip_norm > 0; got 0.0"),
        ({"ema_decay": 1.0}, r"Expected ema_decay in \[0, 1\); got 1.0"),
    ],
)
def test_bad_recipes_are_refused(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        Recipe(**options)


# Arithmetic


def test_divergence_is_an_error():
    broken = Target.from_log_prob(lambda x: x.sum(-1) * math.nan, dim=2)
    process = MAKERS["dds"](Euclidean(2), 3)
    before = parameters(process)
    with pytest.raises(RuntimeError, match="Training diverged: 100 consecutive steps .* Use a smaller learning_rate"):
        fit(process, broken, LogVariance(), Recipe(steps=300, batch_size=4))
    assert_same(before, parameters(process))


class Leaky(Target):
    """A standard Gaussian that fails beyond a wall, with a finite score."""

    def __init__(self, wall: float) -> None:
        super().__init__(Euclidean(2))
        self.wall = wall

    def log_prob(self, x: Tensor) -> Tensor:
        log_prob = -0.5 * x.square().sum(-1) - math.log(2.0 * math.pi)
        return log_prob.masked_fill(x[..., 0] > self.wall, math.nan)

    def log_prob_and_score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.log_prob(x), -x


def test_non_finite_paths_are_left_out():
    process = MAKERS["dds"](Euclidean(2), 4)
    before = parameters(process)
    history = fit(process, Leaky(1.0), LogVariance(), Recipe(steps=20, batch_size=64))
    assert all(math.isfinite(value) for entry in history for value in entry.values())
    after = parameters(process)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert all(bool(value.isfinite().all()) for value in after.values())


def test_a_batch_without_two_finite_paths_is_skipped_not_fatal():
    calls = []

    def sometimes(x: Tensor) -> Tensor:
        calls.append(1)
        bad = math.nan if len(calls) % 9 == 0 else 0.0
        return -0.5 * x.square().sum(-1) + bad

    process = MAKERS["pis"](Euclidean(2), 3)
    history = fit(process, Target.from_log_prob(sometimes, dim=2), LogVariance(), Recipe(steps=30, batch_size=8))
    assert history[-1]["step"] == 30
    assert all(bool(p.isfinite().all()) for p in process.parameters())


# Optimization


def test_parameters_learn_at_their_own_rates():
    process, objective = CMCDProcess(Euclidean(2), 4, width=8), TrajectoryBalance(0.0)
    run = training._start(process, objective, SMALL, Paths([(OnPolicy(), 1.0)]))
    groups = {group["factor"]: {id(p) for p in group["params"]} for group in run.optimizer.param_groups}
    assert groups.keys() == {1.0, training.SCHEDULE_RATE, training.OBJECTIVE_RATE}
    assert groups[training.OBJECTIVE_RATE] == {id(objective.log_normalizer)}
    assert groups[1.0] == {id(p) for p in process.control.parameters()}
    everything = {id(p) for p in [*process.parameters(), *objective.parameters()]}
    assert set.union(*groups.values()) == everything
    assert run.optimizer.defaults["fused"] is True


def test_the_rate_of_each_group_decays_together():
    rates = []
    process, objective = CMCDProcess(Euclidean(2), 3, width=8), TrajectoryBalance(0.0)
    recipe = Recipe(steps=10, batch_size=8, learning_rate=1e-2)
    fit(process, gaussian(), objective, recipe, callback=lambda e: rates.append(e["learning_rate"]), log_every=1)
    assert rates[0] == recipe.learning_rate and all(a > b for a, b in zip(rates, rates[1:], strict=False))
    assert rates[-1] > recipe.rate(1.0) * recipe.learning_rate


LOSSES: dict[str, tuple[Objective, bool]] = {
    "log variance": (LogVariance(), False),
    "vargrad": (VarGrad(), False),
    "balance": (TrajectoryBalance(0.0), False),
    "reverse": (ReverseKL(), False),
    "score function": (ScoreFunctionKL(), False),
    "replayed": (LogVariance(), True),
    "forward": (ForwardKL(), True),
    "bridge": (BridgeLikelihood(), True),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_learns_a_gaussian(loss: str):
    objective, replayed = LOSSES[loss]
    target = gaussian()
    bank = target.sample(2000, generator=torch.Generator().manual_seed(0)) if replayed else None
    model = sampler("dis", objective=objective)
    before = model.sample(1000, seed=1)
    model.fit(steps=100, batch_size=128, learning_rate=1e-2, bank=bank)
    after = model.sample(4000, seed=1)
    assert after.ess / 4000 > 0.9 > before.ess / 1000
    # 4 standard errors, false alarm 6e-5 per loss.
    assert abs(after.log_normalizer.value - 0.7) < 4.0 * after.log_normalizer.std_error
    assert model.history[-1]["loss"] < model.history[0]["loss"]
    if isinstance(objective, TrajectoryBalance):
        assert abs(objective.log_normalizer.item() - 0.7) < 0.1


@pytest.mark.parametrize("kind", ["pis", "dds", "cmcd"])
def test_every_method_learns_a_gaussian(kind: str):
    build = {"pis": PIS, "dds": DDS, "cmcd": CMCD}[kind]
    model = build(gaussian(), num_steps=16, scale=1.4, width=16)
    model.fit(steps=100, batch_size=128, learning_rate=1e-2)
    assert model.sample(4000, seed=1).ess / 4000 > 0.9


def test_an_outside_budget_ends_training():
    spent = iter([0.0, 0.3, 0.6, 1.0])
    model = sampler().fit(steps=1000, batch_size=8, spent=lambda: next(spent))
    assert model.history[-1]["step"] <= 3


def test_the_average_of_the_parameters_is_what_samples():
    process = MAKERS["dds"](Euclidean(2), 3)
    last: dict[str, Tensor] = {}
    recipe = Recipe(steps=40, batch_size=16, learning_rate=1e-2)
    fit(process, gaussian(), LogVariance(), recipe, log_every=1, callback=lambda _: last.update(parameters(process)))
    assert any(not torch.equal(last[name], p) for name, p in process.named_parameters())


# Graphs and memory


def test_detached_losses_keep_no_graph_over_time(monkeypatch: pytest.MonkeyPatch):
    seen = []

    def watching(process: Process, objective: Objective, trajectory: Any, **options: Any) -> float:
        seen.append([name for name, value in vars(trajectory).items() if getattr(value, "requires_grad", False)])
        return accumulate_gradient(process, objective, trajectory, **options)

    monkeypatch.setattr(lessons, "accumulate_gradient", watching)
    for loss in (LogVariance(), VarGrad(), TrajectoryBalance(0.0)):
        bank = gaussian().sample(20, generator=torch.Generator().manual_seed(0)).float()
        fit(MAKERS["cmcd"](Euclidean(2), 3), gaussian(), loss, Recipe(steps=2, batch_size=8), bank=bank)
    assert seen == [[]] * 6


def test_memory_of_a_large_off_policy_step():
    script = """
        import re, torch
        from diffsampler import targets
        from diffsampler.methods.dis import DISProcess
        from diffsampler.objective import LogVariance
        from diffsampler.schedule import variance_exploding
        from diffsampler.space import Euclidean
        from diffsampler.training import Recipe, fit

        target = targets.GaussianMixture.grid()
        process = DISProcess(Euclidean(2), variance_exploding(200), scale=5.0, point_features=64)
        bank = target.sample(2048, generator=torch.Generator().manual_seed(0)).float()

        def peak():
            # ru_maxrss would also count the parent process, from which this one was forked.
            return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])

        before = peak()
        fit(process, target, LogVariance(), Recipe(steps=1, batch_size=2048, bank_share=1.0), bank=bank)
        after = peak()
        print(before // 1024, after // 1024)
    """
    done = run_script(script)
    assert done.returncode == 0, done.stderr
    before, after = (int(word) for word in done.stdout.split())
    # The whole step adds this many MiB to the interpreter with its libraries; a graph over time takes gigabytes.
    assert after - before < 250
    assert after < 500


def test_float64_processes_train():
    model = sampler().to(dtype=F64)
    model.fit(steps=5, batch_size=8)
    assert all(p.dtype == F64 for p in model.process.parameters())
    assert model.sample(10).x.dtype == F64


def test_load_checkpoint_reads_what_was_saved(tmp_path: Path):
    training.save_checkpoint(tmp_path, {"a": 1}, {"step": 3})
    assert load_checkpoint(tmp_path, {"a": 1}) == {"step": 3}
    with pytest.raises(ValueError, match="a: checkpoint 1, now 2; b: checkpoint None, now 0"):
        load_checkpoint(tmp_path, {"a": 2, "b": 0})


def test_training_is_reproducible_and_seeded():
    runs = [sampler("dis").fit(steps=10, batch_size=16, seed=seed) for seed in (0, 0, 1)]
    assert_same(parameters(runs[0].process), parameters(runs[1].process))
    head = [run.process.control.net.head.weight for run in runs]
    assert not torch.equal(head[0], head[2])


def test_replayed_share_of_the_batch():
    process, target = MAKERS["dds"](Euclidean(2), 3), mixture()
    recipe = Recipe(steps=1, batch_size=16, bank_share=0.25)
    lesson = training._default_lesson(LogVariance(), recipe, torch.full((5, 2), 0.5))
    use = Draw(process, target, torch.Generator().manual_seed(0), 0.0)
    trajectory, origin = lesson.draw(use, 16)
    assert int((trajectory.x[-1] == 0.5).all(-1).sum()) == 4 and trajectory.x.shape[1] == 16
    assert bool((trajectory.x[-1, 12:] == 0.5).all()), "fresh paths come first"
    assert origin.tolist() == [0] * 12 + [1] * 4
    assert Paths([(OnPolicy(), 1.0)]).draw(use, 16)[0].on_policy


def test_history_describes_fresh_paths_only():
    target = EUCLIDEAN["gaussian"]()
    process = MAKERS["dds"](Euclidean(2), 4)
    recipe = Recipe(steps=1, batch_size=64, bank_share=0.5, seed=2)
    # Replayed paths from a point far away have tiny weights; they must not enter the summary.
    (entry,) = fit(process, target, LogVariance(), recipe, bank=torch.full((3, 2), 6.0))
    generator = torch.Generator().manual_seed(2)
    honest = simulate(MAKERS["dds"](Euclidean(2), 4), target, 32, generator=generator).log_weight
    assert math.isclose(entry["elbo"], float(honest.mean()), rel_tol=1e-9)
