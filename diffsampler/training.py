r"""The training loop of learned diffusions, written once.

Detached losses never keep a graph over time (:mod:`diffsampler.gradient`); pathwise ones keep one through the states.

Checkpoints are written to a temporary file, synced and renamed, so that a kill or a full disk leaves the previous one
whole; a resumed run repeats the uninterrupted one bit for bit on the same device.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffsampler import estimators
from diffsampler.lessons import Bridges, Lesson, Paths, Taught, check_parts
from diffsampler.objective import Objective
from diffsampler.process import Process
from diffsampler.rates import Constant, Cosine, Rate
from diffsampler.sources import Draw, OnPolicy, Source, Stored
from diffsampler.storage import save_atomic
from diffsampler.target import Target

__all__ = ["Recipe", "fit", "load_checkpoint", "save_checkpoint"]

CHECKPOINT_NAME = "checkpoint.pt"
SCHEDULE_RATE = 5.0
"""Learning rate of schedules, step sizes and priors relative to networks: each is one number fed by every row."""
OBJECTIVE_RATE = 30.0
"""Learning rate of the objective's own parameters (a learned log Z) relative to networks."""
MAX_SKIPPED = 100
"""Consecutive steps without a usable gradient after which training is declared diverged."""


@dataclass(frozen=True)
class Recipe:
    """How to train. Every entry is part of a checkpoint's identity."""

    steps: int = 2000
    batch_size: int = 512
    learning_rate: float = 2e-3
    seed: int = 0
    clip_norm: float = 1.0
    ema_decay: float = 0.998
    bank_share: float = 0.5
    rate: Rate = Cosine()
    clip_rate: Rate = Constant()
    pieces: int = 1
    micro_batch: int | None = None

    def config(self) -> dict[str, object]:
        """What identifies the recipe in a checkpoint."""
        return {**vars(self), "rate": repr(self.rate), "clip_rate": repr(self.clip_rate)}

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "pieces"):
            if getattr(self, name) < 1:
                raise ValueError(f"Expected {name} >= 1; got {getattr(self, name)}.")
        if self.batch_size < 2:
            raise ValueError("Expected batch_size >= 2: a variance needs two trajectories.")
        if not self.learning_rate > 0.0:
            raise ValueError(f"Expected learning_rate > 0; got {self.learning_rate}.")
        if self.micro_batch is not None and self.micro_batch < 1:
            raise ValueError(f"Expected micro_batch >= 1 or None; got {self.micro_batch}.")
        if not self.clip_norm > 0.0:
            raise ValueError(f"Expected clip_norm > 0; got {self.clip_norm}.")
        if not 0.0 <= self.ema_decay < 1.0:
            raise ValueError(f"Expected ema_decay in [0, 1); got {self.ema_decay}.")
        if not 0.0 <= self.bank_share <= 1.0:
            raise ValueError(f"Expected bank_share in [0, 1]; got {self.bank_share}.")


@dataclass
class _Run:
    """Everything that a checkpoint holds besides its identity."""

    process: Process
    objective: Objective
    optimizer: torch.optim.Optimizer
    ema: dict[str, Tensor]
    generator: torch.Generator
    lesson: Lesson
    step: int = 0
    seconds: float = 0.0
    skipped: int = 0
    history: list[dict[str, float]] = field(default_factory=list)

    def state(self) -> dict[str, Any]:
        return {
            "process": self.process.state_dict(),
            "objective": self.objective.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema,
            "generator": self.generator.get_state(),
            "step": self.step,
            "seconds": self.seconds,
            "skipped": self.skipped,
            "history": self.history,
            "lesson": self.lesson.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        # Schedules, scales and random frequencies are constants; loading them would change the process silently.
        constants = {name: (state["process"][name].to(value), value) for name, value in self.process.named_buffers()}
        if differing := [name for name, (stored, value) in constants.items() if not torch.equal(stored, value)]:
            raise ValueError(f"The checkpoint was made with other constants of the process: {', '.join(differing)}.")
        self.process.load_state_dict(state["process"])
        self.objective.load_state_dict(state["objective"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.ema = {name: value.to(self.ema[name].device) for name, value in state["ema"].items()}
        self.generator.set_state(state["generator"].cpu())
        self.step, self.seconds, self.skipped = state["step"], state["seconds"], state["skipped"]
        self.history = state["history"]
        self.lesson.restore(state["lesson"], self.generator.device)


def fit(
    process: Process,
    target: Target,
    objective: Objective,
    recipe: Recipe,
    *,
    bank: Tensor | None = None,
    lesson: Lesson | None = None,
    spent: Callable[[], float] = lambda: 0.0,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 200,
    resume: bool = False,
    identity: dict[str, Any] | None = None,
    callback: Callable[[dict[str, float]], None] | None = None,
    log_every: int = 20,
) -> list[dict[str, float]]:
    """Train ``process`` in place; at the end it holds the exponential moving average of its parameters.

    Arguments:
        process: The chain.
        target: The density.
        objective: The loss.
        recipe: Steps, batch size, learning rate, seed.
        bank: Terminal points ``(m, D)`` to replay backward as ``recipe.bank_share`` of every batch.
        lesson: Where gradients come from, instead of fresh paths and the bank.
        spent: Share of an outside budget (seconds, evaluations) that is used up; training ends at 1.
        checkpoint: Folder for ``checkpoint.pt``; None keeps nothing.
        checkpoint_every: Steps between checkpoints.
        resume: Continue from the folder's checkpoint if there is one.
        identity: What the checkpoint must agree with, besides the recipe.
        callback: Called with every history entry.
        log_every: Steps between history entries.

    Returns:
        The history: dicts with step, seconds, loss, elbo, log_normalizer, ess (a fraction), learning_rate, and the
        number of steps skipped so far because they had no finite gradient.

    Raises:
        ValueError: If the objective needs what is not given, or a checkpoint belongs to another configuration.
        RuntimeError: If training diverges.
    """
    lesson = _default_lesson(objective, recipe, bank) if lesson is None else lesson
    lesson.check(process, objective)
    check_parts(lesson, objective, micro_batch=recipe.micro_batch, pieces=recipe.pieces)
    if not 1 <= recipe.pieces <= process.num_steps:
        raise ValueError(f"Expected between 1 and {process.num_steps} pieces of the chain; got {recipe.pieces}.")
    identity = {**(identity or {}), **process.config(), **_config(objective, recipe, bank, lesson)}
    run = _start(process, objective, recipe, lesson)
    folder = None if checkpoint is None else Path(checkpoint)
    if folder is not None and resume and (folder / CHECKPOINT_NAME).exists():
        run.restore(load_checkpoint(folder, identity))
    began = time.monotonic() - run.seconds
    skipped_before = run.skipped
    while run.step < recipe.steps:
        share = max(run.step / recipe.steps, spent())
        if share >= 1.0:
            break
        rate = recipe.rate(min(share, 1.0))
        for group in run.optimizer.param_groups:
            group["lr"] = recipe.learning_rate * group["factor"] * rate
        entry = _step(run, _use(run, target, recipe, min(share, 1.0)), recipe)
        run.step += 1
        run.seconds = time.monotonic() - began
        skipped_before = run.skipped if entry is not None else skipped_before
        if run.skipped - skipped_before >= MAX_SKIPPED:
            raise RuntimeError(
                f"Training diverged: {MAX_SKIPPED} consecutive steps had no finite gradient. "
                "Use a smaller learning_rate, or a scale that fits the target."
            )
        if entry is not None and (run.step % log_every == 0 or run.step in (1, recipe.steps)):
            entry.update(step=run.step, seconds=run.seconds, learning_rate=recipe.learning_rate * rate)
            entry["skipped"] = run.skipped
            run.history.append(entry)
            if callback is not None:
                callback(entry)
        if folder is not None and run.step % checkpoint_every == 0:
            _try_save(folder, identity, run)
    if folder is not None:
        _try_save(folder, identity, run)
    process.load_state_dict({**process.state_dict(), **run.ema})
    return run.history


def _config(objective: Objective, recipe: Recipe, bank: Tensor | None, lesson: Lesson) -> dict[str, object]:
    """What identifies training in a checkpoint."""
    name = type(objective).__name__ + (", sticking the landing" if objective.freezes_forward else "")
    points = None if bank is None else tuple(bank.shape)
    return {"objective": name, **recipe.config(), "bank": points, "lesson": lesson.config()}


def _use(run: _Run, target: Target, recipe: Recipe, progress: float) -> Draw:
    return Draw(
        run.process,
        target,
        run.generator,
        progress,
        run.objective.needs_path_gradient,
        freeze=run.objective.freezes_forward,
        pieces=recipe.pieces,
        micro_batch=recipe.micro_batch,
    )


def _default_lesson(objective: Objective, recipe: Recipe, bank: Tensor | None) -> Lesson:
    """Fresh paths, and backward ones from the bank if there is one; single bridges for losses that want them."""
    if objective.needs_backward_paths and bank is None:
        name = type(objective).__name__
        raise ValueError(f"{name} needs backward trajectories; pass bank=particles (target samples or stored points).")
    if bank is None:
        return Paths([(OnPolicy(), 1.0)])
    if objective.needs_bridge:
        return Bridges(bank)
    share = 1.0 if objective.needs_backward_paths else recipe.bank_share
    pairs: list[tuple[Source, float]] = [(OnPolicy(), 1.0 - share), (Stored(bank), share)]
    return Paths([pair for pair in pairs if pair[1] > 0.0])


def _start(process: Process, objective: Objective, recipe: Recipe, lesson: Lesson) -> _Run:
    named = [("control." in name, p) for name, p in process.named_parameters()]
    network, schedule = [p for yes, p in named if yes], [p for yes, p in named if not yes]
    own = [p for p in objective.parameters() if p.requires_grad]
    groups = [
        {"params": params, "factor": factor}
        for params, factor in ((network, 1.0), (schedule, SCHEDULE_RATE), (own, OBJECTIVE_RATE))
        if params
    ]
    # The fused update is several times faster than the default one on small networks.
    optimizer = torch.optim.Adam(groups, lr=recipe.learning_rate, betas=(0.9, 0.99), fused=True)
    device = next(process.parameters()).device
    ema = {name: p.detach().clone() for name, p in process.named_parameters()}
    generator = torch.Generator(device).manual_seed(recipe.seed)
    return _Run(process, objective, optimizer, ema, generator, lesson)


def _step(run: _Run, use: Draw, recipe: Recipe) -> dict[str, float] | None:
    """One gradient step; None when no finite gradient was found and the parameters stayed as they were."""
    run.optimizer.zero_grad()
    taught = run.lesson.accumulate(run.objective, use, recipe.batch_size, weight=1.0 / run.process.space.dof)
    if not _update(run, recipe, taught.loss, recipe.clip_norm * recipe.clip_rate(use.progress)):
        return None
    run.lesson.made(use)
    return _summary(taught)


def _update(run: _Run, recipe: Recipe, loss: float, clip_norm: float) -> bool:
    """Move the parameters and their average; False if the gradient is not finite."""
    parameters = [p for group in run.optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, clip_norm) if math.isfinite(loss) else torch.tensor(math.nan)
    if not bool(norm.isfinite()):
        run.skipped += 1
        return False
    run.optimizer.step()
    # Early averages would remember the untrained network: the horizon grows with the number of steps.
    decay = min(recipe.ema_decay, (1.0 + run.step) / (10.0 + run.step))
    with torch.no_grad():
        pairs = [(run.ema[name], p) for name, p in run.process.named_parameters()]
        torch._foreach_lerp_([a for a, _ in pairs], [p for _, p in pairs], 1.0 - decay)
    return True


def _summary(taught: Taught) -> dict[str, float]:
    log_weight = taught.log_weight
    if log_weight.numel() == 0:
        return {"loss": taught.loss}
    if log_weight.numel() < 2:
        return {"loss": taught.loss, "elbo": math.nan, "log_normalizer": math.nan, "ess": math.nan}
    return {
        "loss": taught.loss,
        "elbo": float(log_weight.mean()),
        "log_normalizer": estimators.log_mean_exp(log_weight),
        "ess": estimators.effective_sample_size(log_weight) / log_weight.numel(),
    }


def _try_save(folder: Path, identity: dict[str, Any], run: _Run) -> None:
    """A failed write must cost neither the previous checkpoint nor the training in memory."""
    try:
        save_checkpoint(folder, identity, run.state())
    except OSError as error:
        warnings.warn(
            f"Could not write the checkpoint of step {run.step} to {folder}: {error}. "
            "Training goes on; the previous checkpoint, if any, is intact.",
            stacklevel=3,
        )


def save_checkpoint(folder: str | Path, identity: dict[str, Any], state: dict[str, Any]) -> None:
    """Write ``checkpoint.pt`` into ``folder`` so that either the old or the new one is there, whole."""
    save_atomic(Path(folder) / CHECKPOINT_NAME, {"identity": identity, "state": state})


def load_checkpoint(folder: str | Path, identity: dict[str, Any]) -> dict[str, Any]:
    """The state in ``folder``'s checkpoint.

    Raises:
        ValueError: If it belongs to another configuration; the message says what differs.
    """
    path = Path(folder) / CHECKPOINT_NAME
    content = torch.load(path, weights_only=True, map_location="cpu")
    stored = content["identity"]
    differing = [
        f"{key}: checkpoint {stored.get(key)!r}, now {identity.get(key)!r}"
        for key in sorted(set(stored) | set(identity))
        if stored.get(key) != identity.get(key)
    ]
    if differing:
        raise ValueError(
            f"The checkpoint in {folder} belongs to another configuration ({'; '.join(differing)}). "
            "Use the same settings, another folder, or resume=False."
        )
    return content["state"]
