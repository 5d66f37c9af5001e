r"""Parameter gradients of detached losses, in constant memory.

Paths are simulated without a graph. The loss is differentiated with respect to the per-step log densities only, which
gives one coefficient per (step, particle); the exact parameter gradient is the coefficient-weighted sum of
:math:`\log B_k - \log F_k`, taken in blocks of rows, for any paths: fresh, replayed or backward.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from diffsampler.objective import Objective
from diffsampler.process import Process
from diffsampler.target import Target
from diffsampler.trajectory import CHUNK_ROWS, Trajectory, chunks, log_kernels

__all__ = ["accumulate_bridge_gradient", "accumulate_gradient"]


def accumulate_gradient(
    process: Process, objective: Objective, trajectory: Trajectory, *, weight: float = 1.0, rows: int = CHUNK_ROWS
) -> float:
    """Add the exact gradient of ``weight * objective`` at fixed paths to ``.grad`` and return the loss.

    Arguments:
        process: The chain that is trained.
        objective: A detached loss.
        trajectory: Paths without a graph, from any source, with log densities of the current process.
        weight: Factor of the gradient.
        rows: Largest number of (step, particle) rows per network call.
    """
    names = ["log_forward", "log_backward", "log_initial"]
    if process.learns_anchors and trajectory.log_anchor is not None:
        names.append("log_anchor")
    if process.learns_carried:
        names.append("log_terminal")
    leaves = {name: getattr(trajectory, name).detach().requires_grad_() for name in names}
    loss = objective(replace(trajectory, **leaves))
    (weight * loss).backward()
    zero = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    grads = {name: zero[name] if leaf.grad is None else leaf.grad for name, leaf in leaves.items()}
    num_steps, batch = trajectory.log_forward.shape
    for steps, particles in chunks(num_steps, batch, rows):
        log_f, log_b = log_kernels(
            process, trajectory.x, trajectory.score, steps, particles, backward=process.learns_backward
        )
        assert log_f is not None
        surrogate = (grads["log_forward"][steps, particles] * log_f).sum()
        if log_b is not None:
            surrogate = surrogate + (grads["log_backward"][steps, particles] * log_b).sum()
        surrogate.backward()
    if process.learns_initial:
        first = None if trajectory.log_prob is None else trajectory.log_prob[0]
        (grads["log_initial"] * process.log_start(trajectory.x[0], first)).sum().backward()
    if process.learns_carried:
        score = None if trajectory.score is None else trajectory.score[-1]
        # Where the target's own density is not recorded it is a constant of the gradient.
        last = trajectory.log_terminal if trajectory.log_prob is None else trajectory.log_prob[-1]
        (grads["log_terminal"] * process.log_end(trajectory.x[-1], last, score)).sum().backward()
    if "log_anchor" in leaves and leaves["log_anchor"].grad is not None:
        _backward_anchors(process, trajectory, grads["log_anchor"], rows)
    return loss.item()


def _backward_anchors(process: Process, trajectory: Trajectory, weight: Tensor, rows: int) -> None:
    """Add the gradient of the weighted sum of anchors."""
    assert trajectory.log_prob is not None
    for steps, particles in chunks(weight.shape[0], weight.shape[1], rows):
        k = torch.arange(steps.start, steps.stop, device=weight.device).unsqueeze(-1)
        x, log_prob = trajectory.x[steps, particles], trajectory.log_prob[steps, particles]
        (weight[steps, particles] * process.log_anchor(k, x, log_prob)).sum().backward()


def accumulate_bridge_gradient(
    process: Process,
    objective: Objective,
    target: Target,
    bank: Tensor,
    rows: int,
    *,
    generator: torch.Generator,
    weight: float = 1.0,
) -> float:
    """Add the gradient of ``weight * objective`` on ``rows`` single steps of closed-form bridges, and return the loss.

    Arguments:
        process: A chain with bridges.
        objective: A loss of single steps.
        target: Gives the scores.
        bank: Terminal states ``(m, S)``.
        rows: Number of steps, each of its own bridge.
        generator: Source of randomness.
        weight: Factor of the gradient.
    """
    with torch.no_grad():
        end = bank[torch.randint(bank.shape[0], (rows,), generator=generator, device=bank.device)]
        k = torch.randint(process.num_steps, (rows,), generator=generator, device=bank.device)
        after = process.sample_bridge(k + 1, end, generator=generator)
        kernel = process.backward(k, after, None)
        noise = process.drawn_space.noise((rows,), like=kernel.mean, generator=generator)
        before = process.place(after, process.drawn_space.project(kernel.mean + kernel.variance.sqrt() * noise))
        score = None
        if process.needs_score:
            score = target.log_prob_and_score(process.observed(before))[1].to(before.dtype)
    log_forward = process.drawn_space.log_gaussian(process.drawn(after), *process(k, before, score))
    nothing = torch.zeros_like(log_forward.detach())
    pair = Trajectory(
        x=torch.stack([before, after]),
        score=None,
        log_forward=log_forward.unsqueeze(0),
        log_backward=nothing.unsqueeze(0),
        log_initial=nothing,
        log_terminal=nothing,
        log_anchor=None,
        on_policy=False,
    )
    loss = objective(pair)
    (weight * loss).backward()
    return loss.item()
