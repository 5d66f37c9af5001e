r"""Discrete latent sites, summed out exactly and batched.

Every discrete latent site with finite support is enumerated along a tensor dimension of its own, to the left of all
plates, as Pyro's ``config_enumerate`` does. The sites' log densities are then factors of a tree of plates,

.. math:: \log p(\theta, y) = \log \sum_z \prod_i f_i(\theta, y, z),

and the sum is eliminated variable by variable inside its plates (tensor variable elimination). Pyro's own evaluator
cannot be used: it reads ``.data`` and has autograd functions that ``torch.func.vmap`` refuses. Its contraction is used,
over a ring of ours. Cost and memory grow with the product of the sizes of variables that meet in one factor, so
``pyro.markov`` chains cost their length times the square of the number of states.

Reference:
    Tensor Variable Elimination for Plated Factor Graphs (Obermeyer et al., 2019), https://arxiv.org/abs/1902.03210
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any, NamedTuple, final

import torch
from opt_einsum import get_symbol
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.distributions.util import scale_and_mask
from pyro.ops.contract import contract_to_tensor
from pyro.ops.rings import Ring
from pyro.poutine.enum_messenger import EnumMessenger
from torch import Tensor

from diffsampler.integrations.pyro_laws import law_log_prob

__all__ = ["Enumeration", "Factor", "is_enumerated", "marginal", "pointwise"]


class Factor(NamedTuple):
    """A sample site of a run under :class:`Enumeration`; its enumerated dimensions are known after the run."""

    name: str
    fn: Any
    value: Tensor
    scale: Any
    mask: Any
    plates: tuple[Any, ...]
    infer: dict[str, Any]

    @staticmethod
    def of(msg: Any) -> Factor:
        plates = tuple(frame for frame in msg["cond_indep_stack"] if frame.vectorized)
        return Factor(msg["name"], msg["fn"], msg["value"], msg["scale"], msg["mask"], plates, msg["infer"])


def is_enumerated(msg: Any) -> bool:
    """Whether a site of a message is a discrete latent one."""
    fn = msg["fn"]
    return not msg["is_observed"] and isinstance(fn, TorchDistributionMixin) and bool(fn.support.is_discrete)


@final
class Enumeration(EnumMessenger):
    """Enumerates all discrete latent sites in parallel, also under vmap.

    Arguments:
        first_dim: First dimension (negative) to the left of all plates.
    """

    def __init__(self, first_dim: int) -> None:
        super().__init__(first_dim)

    def _pyro_sample(self, msg: Any) -> None:
        if is_enumerated(msg) and not msg["done"]:
            msg["infer"] = {**msg["infer"], "enumerate": "parallel", "expand": False}
        super()._pyro_sample(msg)
        # Already here: a model may be left before its sites are looked at for the second time.
        msg["infer"].setdefault("_dim_to_id", {}).update(self._param_dims.get(msg["name"], {}))

    def _pyro_post_sample(self, msg: Any) -> None:
        # As the base class, which reads value.data.
        value, infer = msg["value"], msg["infer"]
        if value is None or not isinstance(msg["fn"], TorchDistributionMixin):
            return
        shape = value.shape[: value.dim() - msg["fn"].event_dim]
        dims = infer.setdefault("_dim_to_id", {})
        dims.update(self._param_dims.get(msg["name"], {}))
        self._value_dims[msg["name"]] = {d: i for d, i in dims.items() if len(shape) >= -d and shape[d] > 1}


@final
class _LogSumProduct(Ring):
    """Sums of products of exponentials, one variable after the other; cheap ones first."""

    def sumproduct(self, terms: Iterable[Tensor], dims: Iterable[str]) -> Tensor:
        left, pending = list(terms), set(dims)
        while pending:
            sizes = {d: n for term in left for d, n in zip(term._pyro_dims, term.shape, strict=True)}  # type: ignore[attr-defined]

            def cost(dim: str, sizes: dict[str, int] = sizes, left: list[Tensor] = left) -> tuple[int, str]:
                touched = {d for term in left if dim in term._pyro_dims for d in term._pyro_dims}  # type: ignore[attr-defined]
                return math.prod(sizes[d] for d in touched), dim

            dim = min(pending, key=cost)
            pending.remove(dim)
            joint = [term for term in left if dim in term._pyro_dims]  # type: ignore[attr-defined]
            if joint:
                left = [term for term in left if dim not in term._pyro_dims]  # type: ignore[attr-defined]
                left.append(_log_sum(_multiply(joint), dim))
        return _multiply(left)

    def product(self, term: Tensor, ordinal: Iterable[str]) -> Tensor:
        dims = term._pyro_dims  # type: ignore[attr-defined]
        kept = "".join(d for d in dims if d not in ordinal)
        summed = [i for i, d in enumerate(dims) if d not in kept]
        return _named(term.sum(summed) if summed else term, kept)

    def inv(self, term: Tensor) -> Tensor:
        raise NotImplementedError("Marginal densities need no inverse.")


def _named(value: Tensor, dims: str) -> Tensor:
    # A view: the name of a tensor's dimensions must not follow it elsewhere.
    value = value.view_as(value)
    value._pyro_dims = dims  # type: ignore[attr-defined]
    return value


def _multiply(terms: list[Tensor]) -> Tensor:
    dims = "".join(sorted({d for term in terms for d in term._pyro_dims}))  # type: ignore[attr-defined]
    total = None
    for term in terms:
        own = term._pyro_dims  # type: ignore[attr-defined]
        aligned = term.permute([own.index(d) for d in dims if d in own])
        for place, d in enumerate(dims):
            aligned = aligned if d in own else aligned.unsqueeze(place)
        total = aligned if total is None else total + aligned
    assert total is not None
    return _named(total, dims)


def _log_sum(term: Tensor, dim: str) -> Tensor:
    """Log-sum-exp along a named dimension, with gradients also where all its terms are impossible."""
    dims = term._pyro_dims  # type: ignore[attr-defined]
    place = dims.index(dim)
    largest = term.detach().amax(place, keepdim=True)
    largest = torch.where(largest.isfinite(), largest, torch.zeros_like(largest))
    total = (term - largest).exp().sum(place)
    none = total == 0.0
    log_total = torch.where(none, torch.ones_like(total), total).log() + largest.squeeze(place)
    return _named(torch.where(none, torch.full_like(log_total, -math.inf), log_total), dims.replace(dim, ""))


class _Names:
    """One letter for every plate and every enumerated variable."""

    def __init__(self) -> None:
        self.letters: dict[Any, str] = {}
        self.variables: set[str] = set()

    def letter(self, key: Any) -> str:
        return self.letters.setdefault(key, get_symbol(len(self.letters)))

    def term(self, factor: Factor) -> tuple[frozenset[str], Tensor]:
        """The plates of a factor, and its log density with named dimensions."""
        log_prob = scale_and_mask(law_log_prob(factor.fn, factor.value), factor.scale, factor.mask)
        plates = {frame.dim: self.letter(frame.name) for frame in factor.plates}
        variables = factor.infer.get("_dim_to_id", {})
        kept, loose, names = [], [], ""
        for place, size in enumerate(log_prob.shape):
            dim = place - log_prob.dim()
            if size == 1:
                continue
            if dim in plates:
                letter = plates[dim]
            elif dim in variables:
                letter = self.letter(("variable", variables[dim]))
                self.variables.add(letter)
            else:
                loose.append(place)
                continue
            kept.append(size)
            names += letter
        if loose and "_enumerate_dim" in factor.infer:
            raise ValueError(
                f"Expected discrete site {factor.name!r} to declare its batch of shape {tuple(log_prob.shape)}; "
                "put it into a pyro.plate, so that its entries are summed out one by one."
            )
        if loose:
            log_prob = log_prob.sum(loose)
        return frozenset(plates.values()), _named(log_prob.reshape(kept), names)


def marginal(factors: Iterable[Factor]) -> Tensor:
    """Log of the sum over all enumerated variables of the product of all factors, shape ``()``.

    Raises:
        ValueError: If an enumerated variable depends on two plates of which neither contains the other.
    """
    names = _Names()
    tree: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()
    for factor in factors:
        plates, term = names.term(factor)
        tree.setdefault(plates, []).append(term)
    try:
        total: Tensor = contract_to_tensor(tree, names.variables, ring=_LogSumProduct())
    except NotImplementedError as error:
        raise ValueError(
            f"Expected discrete sites whose plates are nested; got one that needs an exponential sum ({error})."
        ) from error
    # Without the name that the contraction gave it.
    return total.view_as(total)


def pointwise(factors: list[Factor], name: str) -> Tensor | None:
    """Log density of every entry of one observed site, its own variables summed out; None if entries share any.

    Exact where the site's variables live in the site's plates, and nowhere else.
    """
    names = _Names()
    terms = {factor.name: names.term(factor) for factor in factors}
    plates, observed = terms[name]
    near = set(observed._pyro_dims) & names.variables  # type: ignore[attr-defined]
    joint = {name: observed}
    while True:
        found = {key: term for key, (_, term) in terms.items() if near & set(term._pyro_dims)} | joint  # type: ignore[attr-defined]
        if any(terms[key][0] != plates for key in found):
            return None
        if set(found) == set(joint):
            break
        joint = found
        near |= {d for term in joint.values() for d in term._pyro_dims if d in names.variables}  # type: ignore[attr-defined]
    value = _LogSumProduct().sumproduct(joint.values(), near)
    order = sorted((frame.dim, names.letter(frame.name)) for frame in terms_plates(factors, name))
    dims = value._pyro_dims  # type: ignore[attr-defined]
    return value.permute([dims.index(letter) for _, letter in order if letter in dims])


def terms_plates(factors: list[Factor], name: str) -> tuple[Any, ...]:
    """Plates of one site."""
    return next(factor.plates for factor in factors if factor.name == name)
