r"""Compiled loops for densities whose Python call is the whole cost.

One gradient of a ten-dimensional model for 64 chains is a few microseconds of arithmetic inside hundreds of
microseconds of Python. A :class:`CompiledDensity` holds the density as a graph of tensor operations, traced once, and
compiles whole functions around it, such as the leapfrog loop of a transition with its Metropolis test, into one call.

Kernels take part by calling their arithmetic through :func:`evaluate` and their loops through :func:`while_loop`: with
an ordinary density both are plain Python, with a compiled one they are one graph. Random numbers are drawn outside, by
the same calls in the same order, so that compiled and eager chains differ by rounding only; how far that rounding
grows is a property of the target's dynamics.

A trace freezes whatever the density's Python does beside tensor operations. Control flow that depends on values and
random operations are refused, constants and data are frozen, and the traced values are compared with the original's at
several points. Whatever cannot be compiled is evaluated by the original density, and ``failure`` says why.

Cost: about 0.1 s to trace and 2 to 5 s of CPU time to compile a function; a C++ compiler must be installed.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from types import FunctionType
from typing import Any, NamedTuple, final

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from diffsampler.kernel import LogDensity

__all__ = ["CompiledDensity", "Frame", "evaluate", "while_loop", "whiten"]

Tensors = tuple[Tensor, ...]
_COUNTER = itertools.count()


class Frame(NamedTuple):
    r"""Coordinates :math:`z` with :math:`x = m + L z`, in which a kernel of unit scale has the metric :math:`L L^T`."""

    location: Tensor
    """:math:`m`, shape ``(D,)``."""
    factor: Tensor
    """:math:`L`, lower triangular, shape ``(D, D)``."""

    def to_original(self, z: Tensor) -> Tensor:
        """``z (..., D)`` to ``x``."""
        return self.location.to(z) + z @ self.factor.to(z).mT

    def to_frame(self, x: Tensor) -> Tensor:
        """``x (..., D)`` to ``z``, solved in float64."""
        centred = (x.double() - self.location).reshape(-1, x.shape[-1])
        z = torch.linalg.solve_triangular(self.factor, centred.mT, upper=False).mT
        return z.reshape(x.shape).to(x.dtype)


def whiten(log_density: LogDensity, frame: Frame | None) -> LogDensity:
    r"""The density as a function of :math:`z`, with score :math:`L^T s(x)`; its constant Jacobian is left out."""
    if frame is None:
        return log_density
    if isinstance(log_density, CompiledDensity):
        return log_density.in_frame(frame)
    return _whitened(log_density, frame)


def _whitened(log_density: LogDensity, frame: Frame) -> LogDensity:
    def density(z: Tensor) -> tuple[Tensor, Tensor]:
        log_prob, score = log_density(frame.to_original(z))
        return log_prob, score @ frame.factor.to(z)

    return density


def evaluate(log_density: LogDensity, function: Callable[..., Tensors], *tensors: Tensor) -> Tensors:
    """``function(log_density, *tensors)``: one compiled call if the density is compiled, plain Python otherwise.

    Arguments:
        log_density: The density.
        function: Takes the density and tensors and returns a tuple of tensors; no other effects, no draws.
        tensors: Its arguments; positions ``(n, D)`` come first.
    """
    if isinstance(log_density, CompiledDensity):
        return log_density.run(function, *tensors)
    return function(log_density, *tensors)


def while_loop(condition: Callable[..., Tensor], body: Callable[..., Tensors], carry: Tensors) -> Tensors:
    """Repeat ``carry = body(*carry)`` while ``condition(*carry)`` holds, inside a compiled graph or in Python.

    Arguments:
        condition: Boolean of shape ``()`` from the carried tensors.
        body: New tensors of the same shapes and dtypes, none of them an argument handed back.
        carry: Tensors to start from.
    """
    if torch.compiler.is_compiling():
        # Not public, so reached only from inside a compilation, whose failure is caught.
        from torch._higher_order_ops import while_loop as compiled_loop

        result: Tensors = compiled_loop(condition, body, tuple(tensor.clone() for tensor in carry))
        return result
    while bool(condition(*carry)):
        carry = body(*carry)
    return carry


def _value(log_density: LogDensity, x: Tensor) -> Tensors:
    return log_density(x)


@final
class CompiledDensity:
    """A density and the functions compiled around it, for one shape, dtype and device of the positions.

    Arguments:
        log_density: The density, ``x (n, D) -> (log_prob (n,), score (n, D))``.
        x: Points to trace at, shape ``(n, D)``, where the density is finite.
        backend: Backend of ``torch.compile``.

    Attributes:
        failure: Why something is evaluated by the original density, None if all is compiled.
        num_operations: Tensor operations of one evaluation, 0 if the density could not be traced.
        like: The points that it was traced at; positions of their shape, dtype and device are compiled.
    """

    def __init__(self, log_density: LogDensity, x: Tensor, *, backend: str = "inductor") -> None:
        self.failure: str | None = None
        self.num_operations = 0
        self._original = log_density
        self._frame: Frame | None = None
        self.like = x
        self._backend = backend
        self._compiled: dict[Any, Callable[..., Tensors] | None] = {}
        self._constants: Tensors = ()
        self._graph: GraphModule | None = None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._graph, self._constants = _trace(log_density, x)
        except Exception as error:  # whatever a tracer may raise, the original density is there
            self.failure = _say(error)
        else:
            self.num_operations = sum(node.op == "call_function" for node in self._graph.graph.nodes)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Log density ``(n,)`` and score ``(n, D)``, without a graph for gradients."""
        log_prob, score = self.run(_value, x)
        return log_prob, score

    def in_frame(self, frame: Frame) -> CompiledDensity:
        """The density in the coordinates of ``frame``; compiled functions are shared between frames."""
        copy = object.__new__(CompiledDensity)
        copy.__dict__ = self.__dict__ | {"_frame": frame}
        return copy

    def run(self, function: Callable[..., Tensors], *tensors: Tensor) -> Tensors:
        """``function(density, *tensors)`` in one compiled call, see :func:`evaluate`."""
        x, like = tensors[0], self.like
        if self._graph is None or (x.shape, x.dtype, x.device) != (like.shape, like.dtype, like.device):
            return function(self._eager(), *tensors)
        operands = (*self._constants, *(() if self._frame is None else self._frame))
        key = (function, self._frame is None)
        # torch.compile switches the validation of distributions off for good, for everybody.
        switch = torch.distributions.Distribution._validate_args
        try:
            with torch.no_grad():
                if key not in self._compiled:
                    return self._first(key, function, operands, tensors)
                compiled = self._compiled[key]
                if compiled is not None:
                    return compiled(operands, *tensors)
        except torch.linalg.LinAlgError:
            # One singular matrix takes a whole compiled batch down; the original may know better.
            pass
        except Exception as error:  # a shape that cannot be compiled after all
            self._give_up(key, error)
        finally:
            torch.distributions.Distribution._validate_args = switch
        return function(self._eager(), *tensors)

    def _eager(self) -> LogDensity:
        return self._original if self._frame is None else _whitened(self._original, self._frame)

    def _give_up(self, key: Any, error: Exception) -> None:
        self._compiled[key] = None
        self.failure = _say(error)

    def _first(self, key: Any, function: Callable[..., Tensors], operands: Tensors, tensors: Tensors) -> Tensors:
        """Compile, run, and compare with the original, whose answer is returned where they differ."""
        expected = function(self._eager(), *tensors)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                compiled = self._compile(function)
                got = compiled(operands, *tensors)
            if not all(_mostly_close(a, b) for a, b in zip(got, expected, strict=True)):
                raise ValueError("compiled and eager values differ")
            self._compiled[key] = compiled
            return got
        except Exception as error:  # whatever a compiler may raise
            self._give_up(key, error)
            return expected

    def _compile(self, function: Callable[..., Tensors]) -> Callable[..., Tensors]:
        graph, framed, size = self._graph, self._frame is not None, len(self._constants)

        def program(operands: Tensors, *tensors: Tensor) -> Tensors:
            def density(x: Tensor) -> tuple[Tensor, Tensor]:
                log_prob, score = graph(x, *operands[:size])  # type: ignore[misc]
                # A loop must not hand its arguments back, and a score may be its point.
                return log_prob.clone(), score.clone()

            whole = _whitened(density, Frame(*operands[size:])) if framed else density
            return function(whole, *tensors)

        # The compiler keeps a limited number of graphs per code object: every program needs its own.
        assert isinstance(program, FunctionType)
        program.__code__ = program.__code__.replace(co_name=f"program_{next(_COUNTER)}")
        compiled: Callable[..., Tensors] = torch.compile(program, fullgraph=True, dynamic=False, backend=self._backend)
        return compiled


def _trace(log_density: LogDensity, x: Tensor) -> tuple[GraphModule, Tensors]:
    """The density as a graph of ``(x, *constants)``, and its constants."""
    # Not a bound method: make_fx would count its first argument.
    graph = make_fx(lambda point: log_density(point))(x)
    random = [n for n in graph.graph.nodes if torch.Tag.nondeterministic_seeded in getattr(n.target, "tags", ())]
    if random:
        raise ValueError(f"the density draws random numbers ({random[0].target})")
    # Other points than those of the trace, so that frozen values show.
    for points in (x, x.flip(0), 0.9 * x):
        expected = log_density(points)
        for a, b in zip(graph(points), expected, strict=True):
            if not bool(_close(a, b).all()):
                raise ValueError("traced and original values differ")
    return _lift_constants(graph)


def _lift_constants(graph: GraphModule) -> tuple[GraphModule, Tensors]:
    """Make a graph's constants its arguments: inside a loop they must come from outside."""
    nodes = list(graph.graph.nodes)
    last = next(node for node in nodes if node.op == "placeholder")
    names: dict[str, torch.fx.Node] = {}
    constants: list[Tensor] = []
    storages: set[int] = set()
    for node in nodes:
        if node.op != "get_attr":
            continue
        name = str(node.target)
        if name not in names:
            value = getattr(graph, name).detach()
            # Two views of one storage would count as an alias.
            shared = value.untyped_storage().data_ptr()
            constants.append(value.clone() if shared in storages else value)
            storages.add(shared)
            with graph.graph.inserting_after(last):
                last = names[name] = graph.graph.placeholder(f"constant_{len(constants)}")
        node.replace_all_uses_with(names[name])
        graph.graph.erase_node(node)
    graph.recompile()
    return graph, tuple(constants)


def _close(a: Tensor, b: Tensor) -> Tensor:
    if not b.is_floating_point():
        return a == b
    tolerance = torch.finfo(b.dtype).eps ** 0.5
    return torch.isclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


def _mostly_close(a: Tensor, b: Tensor) -> bool:
    """Whether most entries agree; single trajectories may be chaotic, and a coin may fall on its edge."""
    return a.shape == b.shape and a.dtype == b.dtype and bool(_close(a, b).double().mean() > 0.8)


def _say(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
