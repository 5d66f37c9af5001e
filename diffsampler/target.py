r"""Unnormalized densities.

A :class:`Target` is an unnormalized density :math:`\rho = Z \pi` on a :class:`~diffsampler.space.Space`. What is known
about it is *declared*, never probed: the exact ``log_normalizer`` :math:`\log Z`, an exact sampler, mode labels, a
normalized ``prior`` for likelihood tempering, and named constrained parameters.

Convention: ``log_prob`` is unnormalized, ``energy`` is its negative, ``score`` its gradient with respect to ``x``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import final

import torch
from torch import Tensor, nn

from diffsampler.space import Euclidean, EuclideanTorus, Space, Torus

__all__ = ["AffineTarget", "CastTarget", "CountedTarget", "ForwardingTarget", "FunctionTarget", "Target"]


class Target(nn.Module, ABC):
    r"""An unnormalized density :math:`\rho(x) = Z \pi(x)` on ``space``.

    Concrete targets implement :meth:`log_prob` for any batch shape. They may replace :meth:`log_prob_and_score`
    (analytic or fused gradients are several times faster than autograd), :meth:`sample`, :meth:`mode_labels` and
    :meth:`constrain`. Buffers are kept in float64 and brought to the dtype of ``x`` on use.

    Arguments:
        space: Where the particles live.
        log_normalizer: Exact :math:`\log Z`, or None if unknown.
        prior: A normalized target with an exact sampler such that ``log_prob - prior.log_prob`` is a log likelihood.
        num_modes: Number of labels that :meth:`mode_labels` returns, or None if modes are not known.
        has_sampler: Whether :meth:`sample` draws exactly from the normalized density.
    """

    def __init__(
        self,
        space: Space,
        *,
        log_normalizer: float | None = None,
        prior: Target | None = None,
        num_modes: int | None = None,
        has_sampler: bool = False,
    ) -> None:
        super().__init__()
        self.space = space
        self.log_normalizer = log_normalizer
        self.prior = prior
        self.num_modes = num_modes
        self.has_sampler = has_sampler

    @property
    @final
    def dim(self) -> int:
        """Length ``D`` of a particle's vector."""
        return self.space.dim

    @abstractmethod
    def log_prob(self, x: Tensor) -> Tensor:
        """Unnormalized log density, shape ``(..., D) -> (...)``; differentiable in ``x``."""

    def log_prob_and_score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Log density ``(...)`` and its gradient ``(..., D)``, both without a graph."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            log_prob = self.log_prob(x)
            (score,) = torch.autograd.grad(log_prob.sum(), x)
        return log_prob.detach(), score

    @final
    def score(self, x: Tensor, *, create_graph: bool = False) -> Tensor:
        """Gradient of the log density, ``(..., D) -> (..., D)``.

        Arguments:
            x: Points, shape ``(..., D)``.
            create_graph: Keep the graph, so that the score itself can be differentiated with respect to ``x``.
        """
        if not create_graph:
            return self.log_prob_and_score(x)[1]
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_()
            (score,) = torch.autograd.grad(self.log_prob(x).sum(), x, create_graph=True)
        return score

    @final
    def energy(self, x: Tensor) -> Tensor:
        """``-log_prob(x)``, shape ``(..., D) -> (...)``."""
        return -self.log_prob(x)

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw ``n`` exact samples of the normalized density, shape ``(n, D)``, float64.

        Raises:
            NotImplementedError: If the target has no exact sampler (``has_sampler`` is False).
        """
        raise NotImplementedError(f"{type(self).__name__} has no exact sampler (has_sampler is False).")

    def mode_labels(self, x: Tensor) -> Tensor:
        """Index of the mode that each point belongs to, ``(..., D) -> (...)`` int64, in ``[0, num_modes)``."""
        raise NotImplementedError(f"{type(self).__name__} declares no modes (num_modes is None).")

    def mode_weights(self) -> Tensor:
        """Exact probability of each mode label, shape ``(num_modes,)``, float64."""
        raise NotImplementedError(f"{type(self).__name__} declares no modes (num_modes is None).")

    def constrain(self, x: Tensor) -> dict[str, Tensor]:
        """Named parameters in their own (constrained) space: ``(n, D)`` to a dict of ``(n, *event)``."""
        return {"x": x}

    @staticmethod
    def from_log_prob(
        log_prob: Callable[[Tensor], Tensor],
        *,
        dim: int | None = None,
        space: Space | None = None,
        score: Callable[[Tensor], Tensor] | None = None,
        log_normalizer: float | None = None,
        prior: Target | None = None,
    ) -> FunctionTarget:
        """Wrap a batched log density ``(n, D) -> (n,)``. ``dim`` is short for ``space=Euclidean(dim)``."""
        return FunctionTarget(log_prob, _space_of(dim, space), score=score, log_normalizer=log_normalizer, prior=prior)

    @staticmethod
    def from_energy(
        energy: Callable[[Tensor], Tensor],
        *,
        dim: int | None = None,
        space: Space | None = None,
        force: Callable[[Tensor], Tensor] | None = None,
        log_normalizer: float | None = None,
    ) -> FunctionTarget:
        """Wrap a batched energy in units of kT; ``force`` is minus its gradient, that is the score."""
        _check_callable(energy, "energy")
        return FunctionTarget(lambda x: -energy(x), _space_of(dim, space), score=force, log_normalizer=log_normalizer)


def _space_of(dim: int | None, space: Space | None) -> Space:
    if (dim is None) == (space is None):
        raise ValueError("Expected exactly one of dim and space.")
    if space is not None:
        return space
    if not isinstance(dim, int) or isinstance(dim, bool) or dim < 1:
        raise ValueError(f"Expected dim to be a positive integer; got {dim!r}.")
    return Euclidean(dim)


def _check_callable(function: object, name: str) -> None:
    if not callable(function):
        raise TypeError(f"Expected {name} to be a function of batched points; got {type(function).__name__}.")


@final
class FunctionTarget(Target):
    """A target made from a batched Python function ``(n, D) -> (n,)``.

    The function sees exactly one batch axis: other batch shapes are flattened before the call and restored after it.

    Raises:
        ValueError: If the function's result has the wrong shape.
        TypeError: If the function's result is not a floating-point tensor.
    """

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        space: Space,
        *,
        score: Callable[[Tensor], Tensor] | None = None,
        log_normalizer: float | None = None,
        prior: Target | None = None,
    ) -> None:
        _check_callable(function, "log_prob")
        if score is not None:
            _check_callable(score, "score")
        if not isinstance(space, Space):
            raise TypeError(f"Expected space to be a Space such as Euclidean(2); got {type(space).__name__}.")
        super().__init__(space, log_normalizer=log_normalizer, prior=prior)
        self._function = function
        self._score = score

    def log_prob(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, self.dim)
        value = self._function(flat)
        if not isinstance(value, Tensor) or not value.is_floating_point():
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"Expected log_prob to return a floating-point tensor; got {kind}.")
        if value.shape != flat.shape[:1]:
            raise ValueError(shape_message(tuple(flat.shape[:1]), tuple(value.shape), self.dim))
        return value.reshape(x.shape[:-1])

    def log_prob_and_score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self._score is None:
            return super().log_prob_and_score(x)
        with torch.no_grad():
            flat = x.reshape(-1, self.dim)
            score = self._score(flat)
            if not isinstance(score, Tensor) or not score.is_floating_point():
                kind = score.dtype if isinstance(score, Tensor) else type(score).__name__
                raise TypeError(f"Expected score to return a floating-point tensor; got {kind}.")
            if score.shape != flat.shape:
                raise ValueError(f"Expected score to return shape {tuple(flat.shape)}; got {tuple(score.shape)}.")
            return self.log_prob(x), score.reshape(x.shape)


def shape_message(expected: tuple[int, ...], got: tuple[int, ...], dim: int) -> str:
    """What is wrong with the shape of a log density, and the likely remedy."""
    message = f"Expected log_prob to return shape {expected}; got {got}."
    if got == (*expected, 1):
        return message + " Drop the last axis."
    if got == ():
        return message + " Sum over the event axis only (dim=-1), not over the batch."
    if got == (*expected, dim):
        return message + " Sum over the last axis."
    if got == 2 * expected:
        return message + " A product of batches is (x * y).sum(-1), not x @ y."
    if got == (dim,):
        return message + " The function sees a batch (n, D); a coordinate is x[..., i], not x[i]."
    return message


class ForwardingTarget(Target):
    """The same density evaluated in another way: everything declared about it is that of ``target``."""

    def __init__(self, target: Target) -> None:
        super().__init__(
            target.space,
            log_normalizer=target.log_normalizer,
            prior=target.prior,
            num_modes=target.num_modes,
            has_sampler=target.has_sampler,
        )
        self.target = target

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        return self.target.sample(n, generator=generator)

    def mode_labels(self, x: Tensor) -> Tensor:
        return self.target.mode_labels(x)

    def mode_weights(self) -> Tensor:
        return self.target.mode_weights()

    def constrain(self, x: Tensor) -> dict[str, Tensor]:
        return self.target.constrain(x)


@final
class CountedTarget(ForwardingTarget):
    """A target that counts what is spent on it: ``evaluations`` = points whose density or gradient was computed."""

    def __init__(self, target: Target) -> None:
        super().__init__(target)
        self.evaluations = 0

    def log_prob(self, x: Tensor) -> Tensor:
        self.evaluations += x[..., 0].numel()
        return self.target.log_prob(x)

    def log_prob_and_score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.evaluations += x[..., 0].numel()
        return self.target.log_prob_and_score(x)


@final
class AffineTarget(Target):
    r"""A target in standardized coordinates, :math:`x = m + s z`: :math:`\log\rho_z(z) = \log\rho(x) + \sum\log s`.

    The normalizing constant is that of the original target. The map is computed in float64, so that a particle in
    float32 can stand for a location of 1e5 and a scale of 1e-3.

    Arguments:
        target: The original target.
        location: ``m``, shape ``(D,)``, a point of its space.
        scale: ``s > 0``, shape ``(D,)``, or ``(1,)`` for all coordinates alike (the only choice off Euclidean space).
    """

    location: Tensor
    scale: Tensor

    def __init__(self, target: Target, location: Tensor, scale: Tensor) -> None:
        if not bool((scale > 0.0).all()):
            raise ValueError("Expected positive scales.")
        if scale.shape != (1,) and not isinstance(target.space, Euclidean):
            raise ValueError(f"Expected one scale of shape (1,) on {target.space}; got {tuple(scale.shape)}.")
        if isinstance(target.space, Torus | EuclideanTorus) and bool((scale != 1.0).any()):
            raise ValueError(f"Expected scale 1 on {target.space}: the period of angles is what it is; got {scale}.")
        super().__init__(
            target.space,
            log_normalizer=target.log_normalizer,
            num_modes=target.num_modes,
            has_sampler=target.has_sampler,
        )
        self.target = target
        self.register_buffer("location", location.double())
        self.register_buffer("scale", scale.double())
        self.log_volume = float(scale.double().log().sum()) * (target.space.dof if scale.shape == (1,) else 1)

    def to_original(self, z: Tensor) -> Tensor:
        """``z (..., D)`` to ``x``, float64."""
        return self.location + self.scale * z.double()

    def to_standard(self, x: Tensor) -> Tensor:
        """``x (..., D)`` to ``z``, float64."""
        return (x.double() - self.location) / self.scale

    def log_prob(self, x: Tensor) -> Tensor:
        return self.target.log_prob(self.to_original(x)) + self.log_volume

    def log_prob_and_score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_prob, score = self.target.log_prob_and_score(self.to_original(x))
        return log_prob + self.log_volume, (score * self.scale).to(x.dtype)

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        return self.to_standard(self.target.sample(n, generator=generator))

    def mode_labels(self, x: Tensor) -> Tensor:
        return self.target.mode_labels(self.to_original(x))

    def mode_weights(self) -> Tensor:
        return self.target.mode_weights()

    def constrain(self, x: Tensor) -> dict[str, Tensor]:
        return self.target.constrain(self.to_original(x))


@final
class CastTarget(ForwardingTarget):
    """A target whose density is evaluated in ``dtype`` (its function refuses others) and answers in that of ``x``."""

    def __init__(self, target: Target, dtype: torch.dtype) -> None:
        super().__init__(target)
        self.dtype = dtype

    def log_prob(self, x: Tensor) -> Tensor:
        return self.target.log_prob(x.to(self.dtype)).to(x.dtype)

    def log_prob_and_score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_prob, score = self.target.log_prob_and_score(x.to(self.dtype))
        return log_prob.to(x.dtype), score.to(x.dtype)
