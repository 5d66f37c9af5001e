r"""Forward paths with a graph through their states, for losses that are differentiated along the path.

The graph of a whole chain holds every activation of ``K`` network calls. Cut into pieces, only the states at their ends
are kept; in the backward pass each piece is run again with its graph, from the same noise, and forgotten. The gradient
is the same number, the memory that of one piece, the cost half as much again (a third forward pass).

Sticking the landing takes the forward densities at frozen parameters: their own slope has mean zero,

.. math:: E_F[\nabla_\theta \log p_0(x_0) + \sum_k \nabla_\theta \log F_k(x_{k+1} | x_k)] = 0,

and only adds noise; without it the gradient of the reverse divergence vanishes path by path where both chains agree
(in the true gradient, ``detach_score=False``; a score taken as a constant bends it there too).

References:
    Training deep nets with sublinear memory cost (Chen et al., 2016), https://arxiv.org/abs/1604.06174
    Sticking the landing (Roeder, Wu, Duvenaud, 2017), https://arxiv.org/abs/1703.09194
    Denoising Diffusion Samplers (Vargas, Grathwohl, Doucet, 2023), https://arxiv.org/abs/2302.13834
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from diffsampler.process import Gaussian, Process
from diffsampler.target import Target
from diffsampler.trajectory import Seen, Trajectory, drawn_along, log_kernels, observe, record, step_noise, walk

__all__ = ["simulate_pathwise"]


def simulate_pathwise(
    process: Process,
    target: Target,
    n: int,
    *,
    generator: torch.Generator,
    pieces: int = 1,
    freeze: bool = False,
) -> Trajectory:
    """Run the forward chain from ``n`` draws of the initial law, with a graph through the states.

    Paths whose weight is not finite would make the gradient of all others NaN, so they are left out: the chain is run
    again for the finite ones, from the same noise. If no path is finite, all are returned.

    Arguments:
        process: The chain.
        target: The density at its end.
        n: Number of paths.
        generator: Source of randomness.
        pieces: Pieces of the chain whose graphs are built one after another in the backward pass; 1 builds the graph
            of the whole chain at once. The square root of the number of steps is a good choice.
        freeze: Take the forward densities at frozen parameters (sticking the landing).

    Raises:
        ValueError: If there are more pieces than steps.
    """
    if not 1 <= pieces <= process.num_steps:
        raise ValueError(f"Expected between 1 and {process.num_steps} pieces of the chain; got {pieces}.")
    before = generator.get_state()
    path = _simulate(process, target, n, generator, pieces, None, freeze=freeze)
    finite = path.log_weight.detach().isfinite()
    if bool(finite.all()) or not bool(finite.any()):
        return path
    again = torch.Generator(generator.device)
    again.set_state(before)
    return _simulate(process, target, n, again, pieces, finite, freeze=freeze)


def _simulate(
    process: Process,
    target: Target,
    n: int,
    generator: torch.Generator,
    pieces: int,
    only: Tensor | None,
    *,
    freeze: bool,
) -> Trajectory:
    with torch.enable_grad():
        x = process.sample_initial(n, generator=generator)
        whole, kept = x, slice(None) if only is None else only
        x = x[kept]
        seen = observe(process, target, x, path_gradient=True)
        cuts = [round(j * process.num_steps / pieces) for j in range(pieces + 1)]
        states, log_f, log_b = [x.unsqueeze(0)], [], []
        scores = [None if seen.score is None else seen.score.unsqueeze(0)]
        levels = [None if seen.log_prob is None else seen.log_prob.unsqueeze(0)]
        for start, stop in zip(cuts, cuts[1:], strict=False):
            noise = torch.stack([step_noise(process, whole, generator)[kept] for _ in range(start, stop)])
            piece = _Piece(process, target, range(start, stop), noise, freeze=freeze)
            done = piece.run(x, seen.score) if pieces == 1 else piece.rerun(x, seen.score)
            x = done.states[-1]
            seen = Seen(None, None if done.score is None else done.score[-1])
            states.append(done.states)
            scores.append(done.score)
            levels.append(done.log_prob)
            log_f.append(done.log_forward)
            log_b.append(done.log_backward)
        path, score = torch.cat(states), _cat(scores)
        trajectory = record(process, path, score, _cat(levels), (torch.cat(log_f), torch.cat(log_b)), on_policy=True)
        if freeze and process.learns_initial:
            first = None if trajectory.log_prob is None else trajectory.log_prob[0]
            return replace(trajectory, log_initial=_frozen(process, Process.log_start, path[0], first))
        return trajectory


def _cat(parts: list[Tensor | None]) -> Tensor | None:
    known = [part for part in parts if part is not None]
    return torch.cat(known) if known else None


class _Run(NamedTuple):
    """What a piece of ``s`` steps adds to a record."""

    states: Tensor
    score: Tensor | None
    log_prob: Tensor | None
    log_forward: Tensor
    log_backward: Tensor


class _Method(nn.Module):
    """A method of a process as a module's call, so that it can be called with other parameters."""

    def __init__(self, process: Process, method: Callable[..., Any]) -> None:
        super().__init__()
        self.process = process
        self.method = method

    def forward(self, *arguments: Any) -> Any:
        return self.method(self.process, *arguments)


def _frozen(process: Process, method: Callable[..., Any], *arguments: Any) -> Any:
    """Call a method of a process at its parameters as constants."""
    fixed = {f"process.{name}": p.detach() for name, p in process.named_parameters()}
    return functional_call(_Method(process, method), fixed, arguments)


@final
class _Piece:
    """Some steps of the forward chain with fixed noise ``(s, B, D)``."""

    def __init__(self, process: Process, target: Target, steps: range, noise: Tensor, *, freeze: bool) -> None:
        self.process = process
        self.target = target
        self.steps = steps
        self.noise = noise
        self.freeze = freeze

    def run(self, x: Tensor, score: Tensor | None) -> _Run:
        """From states ``(B, S)`` with the target's score there, in the graph of the caller."""
        process, steps = self.process, self.steps
        way = walk(process, self.target, x, Seen(None, score), steps, self.noise, path_gradient=True)
        path = torch.cat([x.unsqueeze(0), way.states])
        seen = [s.score for s in way.seen if s.score is not None]
        after = torch.stack(seen) if seen else None
        scores = None if after is None or score is None else torch.cat([score.unsqueeze(0), after])
        levels = [s.log_prob for s in way.seen if s.log_prob is not None]
        kernels = way.kernels
        if self.freeze:
            k = torch.arange(steps.start, steps.stop, device=x.device).unsqueeze(-1)
            here = None if scores is None else scores[:-1]
            kernels = Gaussian(*_frozen(process, type(process).forward, k, path[:-1], here))
        log_forward = process.drawn_space.log_gaussian(drawn_along(process, path, steps), *kernels)
        rows = slice(0, len(steps)), slice(0, len(x))
        log_backward = log_kernels(process, path, scores, *rows, forward=False, first=steps.start)[1]
        assert log_backward is not None
        return _Run(way.states, after, torch.stack(levels) if levels else None, log_forward, log_backward)

    def rerun(self, x: Tensor, score: Tensor | None) -> _Run:
        """The same, with a graph that is built when it is needed."""
        inputs = [x] if score is None else [x, score]
        parameters = [p for p in self.process.parameters() if p.requires_grad]
        values = iter(_Rerun.apply(self, len(inputs), *inputs, *parameters))
        has_level = self.process.has_anchors or self.steps.stop == self.process.num_steps
        return _Run(
            next(values),
            None if score is None else next(values),
            next(values) if has_level else None,
            next(values),
            next(values),
        )

    def outputs(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """What there is of a run, in order."""
        return tuple(value for value in self.run(inputs[0], *(inputs[1:] or (None,))) if value is not None)


@final
class _Rerun(torch.autograd.Function):
    """A piece without its graph, which is built anew in the backward pass."""

    @staticmethod
    def forward(ctx: Any, piece: _Piece, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.piece, ctx.parameters = piece, tensors[count:]
        ctx.save_for_backward(*tensors[:count])
        # A score that can be differentiated has a graph of its own even here.
        return tuple(value.detach() for value in piece.outputs(*tensors[:count]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        count = len(ctx.saved_tensors)
        needed = ctx.needs_input_grad[2 : 2 + count]
        inputs = [value.detach().requires_grad_(need) for value, need in zip(ctx.saved_tensors, needed, strict=True)]
        with torch.enable_grad():
            outputs = ctx.piece.outputs(*inputs)
        pairs = [(value, slope) for value, slope in zip(outputs, gradients, strict=True) if value.requires_grad]
        wanted = [value for value, need in zip(inputs, needed, strict=True) if need]
        got = iter(
            torch.autograd.grad(
                [value for value, _ in pairs],
                [*wanted, *ctx.parameters],
                [slope for _, slope in pairs],
                allow_unused=True,
            )
        )
        return None, None, *(next(got) if need else None for need in needed), *got
