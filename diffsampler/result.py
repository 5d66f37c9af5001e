"""The answer: weighted draws, the evidence with its error, and what was noticed on the way."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from diffsampler.estimators import Estimate, expectation, systematic_resample
from diffsampler.particles import Particles
from diffsampler.storage import save_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from diffsampler.sampler import Sampler
    from diffsampler.target import Target

__all__ = ["Finding", "Fit", "diagnose", "load"]

TRANSIENT = ("sampler", "target")
"""Fields that are not saved."""
MAX_ROWS = 20
"""Scalar parameters shown by ``print(fit)``; the rest is counted."""


class Finding(NamedTuple):
    """Something that a reader of the answer must know."""

    level: Literal["note", "warning", "error"]
    message: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.level.upper()}: {self.message} {self.remedy}".rstrip()


def diagnose(particles: Particles) -> list[Finding]:
    """What the weights themselves say about a result; a diagnostic that is no number is no pass."""
    findings = []
    n = len(particles)
    if particles.nonfinite:
        findings.append(
            Finding(
                "warning",
                f"{particles.nonfinite} particles were lost to non-finite values.",
                "Check the density where it is steep; they count as particles of weight zero.",
            )
        )
    if particles.divergences:
        findings.append(
            Finding(
                "warning",
                f"{particles.divergences} trajectories diverged: chains may avoid a region of high curvature.",
                "Reparametrize the model (non-centred scales), or use method='smc'.",
            )
        )
    if particles.has_normalizer and not particles.pareto_k <= 0.7:
        findings.append(
            Finding(
                "warning",
                f"Pareto k-hat is {particles.pareto_k:.2f} (limit 0.7): a few particles carry the weight, "
                "and error bars are too small.",
                "Train longer, use more steps, or method='auto'.",
            )
        )
    if not particles.ess >= 100.0:
        findings.append(
            Finding(
                "warning",
                f"The effective sample size is {particles.ess:.0f} of {n} (limit 100).",
                "Draw more particles or train longer.",
            )
        )
    if particles.replicates > 1 and particles.has_normalizer:
        spread = particles.log_normalizer.std_error * particles.replicates**0.5
        if not spread <= 1.0:
            findings.append(
                Finding(
                    "warning",
                    f"Replicate estimates of Z disagree: their relative spread is {spread:.2f} (limit 1).",
                    "Use more particles per island.",
                )
            )
    if particles.replicates > 1 and (particles.known_replicates is not None or not particles.has_normalizer):
        worst = _worst_r_hat(particles)
        if not worst <= 1.05:
            findings.append(
                Finding(
                    "warning",
                    f"Chains disagree: R-hat is {worst:.2f} (limit 1.05).",
                    "Chains may sit in different modes; use method='auto' or 'smc'.",
                )
            )
    return findings


def _worst_r_hat(particles: Particles) -> float:
    chains = particles.x.double().reshape(particles.replicates, -1, particles.x.shape[-1])
    length = chains.shape[1]
    within = chains.var(1).mean(0)
    between = chains.mean(1).var(0)
    return float(((length - 1) / length + between / within).sqrt().max())


@dataclass(frozen=True, eq=False)
class Fit:
    """What :func:`diffsampler.sample` returns.

    Arguments:
        particles: Weighted points in unconstrained space.
        posterior: Named, constrained draws, each ``(n, *event)``, weighted by ``particles.log_weight``.
        findings: Warnings; empty when all is well.
        evaluations: Points at which the density or its gradient was computed, training included.
        seconds: Wall-clock time.
        method: The method that made the particles.
        choices: Everything that was chosen, in values that JSON keeps; ``sample(target, choices=...)`` repeats it.
        history: Training history, a list of dicts, empty for methods that do not train.
        true_log_normalizer: The exact value where the target declares it.
        notes: What cannot be excluded, and other remarks that are no warnings.
        sampler: Draws more particles, where the method made a sampler; not saved.
        target: What was sampled; not saved.
    """

    particles: Particles
    posterior: dict[str, Tensor]
    findings: list[Finding]
    evaluations: int
    seconds: float
    method: str
    choices: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)
    true_log_normalizer: float | None = None
    notes: list[str] = field(default_factory=list)
    sampler: Sampler | None = field(default=None, repr=False)
    target: Target | None = field(default=None, repr=False)

    @property
    def log_normalizer(self) -> Estimate:
        """Log normalizing constant, the log evidence of a model."""
        return self.particles.log_normalizer

    @property
    def elbo(self) -> float:
        """Lower bound of the log normalizing constant."""
        return self.particles.elbo

    @property
    def ess(self) -> float:
        """Effective sample size, a count."""
        return self.particles.ess

    @property
    def pareto_k(self) -> float:
        """Tail shape of the weights."""
        return self.particles.pareto_k

    @property
    def reliable(self) -> bool:
        """Whether no finding warns against using the answer."""
        return not any(finding.level in ("warning", "error") for finding in self.findings)

    def resample(self, n: int, *, seed: int = 0) -> dict[str, Tensor]:
        """Draw ``n`` equally weighted draws of every parameter, in random order."""
        if n < 1:
            raise ValueError(f"Expected n >= 1; got {n}.")
        log_weight = self.particles.log_weight
        generator = torch.Generator(log_weight.device).manual_seed(seed)
        index = systematic_resample(log_weight, n, generator=generator)
        index = index[torch.randperm(n, generator=generator, device=index.device)]
        return {name: value[index] for name, value in self.posterior.items()}

    def predict(
        self,
        num_samples: int = 1000,
        *,
        args: tuple[Any, ...] | None = None,
        kwargs: dict[str, Any] | None = None,
        deterministic: bool = False,
        seed: int = 0,
    ) -> dict[str, Tensor]:
        """Draw data from a Pyro model given the posterior: what was observed once more, or new data.

        Arguments:
            num_samples: Number of draws, of equal weight.
            args: Positional arguments of the model instead of its own, such as new covariates.
            kwargs: Keyword arguments of the model instead of its own.
            deterministic: Whether to return deterministic sites too.
            seed: Seed of everything.

        Raises:
            TypeError: If the target is no Pyro model, or the fit was loaded from a file and does not have it.
        """
        from diffsampler.integrations.pyro_predict import predict
        from diffsampler.integrations.pyro_target import PyroTarget

        if not isinstance(self.target, PyroTarget):
            raise TypeError(f"Expected a fit of a PyroTarget, which has data; got one of {_kind(self.target)}.")
        values = self.resample(num_samples, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        return predict(self.target, values, args=args, kwargs=kwargs, deterministic=deterministic, generator=generator)

    def to_arviz(
        self, *, weights: Literal["resample", "keep"] = "resample", num_chains: int = 4, data: bool = True
    ) -> Any:
        """Convert to ArviZ (``InferenceData`` or ``DataTree``).

        Arguments:
            weights: Resample to equal weights, or keep the draws with ``sample_stats.log_weight``.
            num_chains: Number of chains to divide the draws into.
            data: Whether the fit of a Pyro model has the groups ``posterior_predictive``, ``log_likelihood`` and
                ``observed_data`` too.
        """
        from diffsampler.integrations.arviz import to_arviz

        log_z = self.log_normalizer
        attrs = {
            "inference_library": "diffsampler",
            "method": self.method,
            "log_z": log_z.value,
            "log_z_se": log_z.std_error,
            "pareto_k": self.pareto_k,
            "ess": self.ess,
        }
        return to_arviz(
            self.posterior,
            self.particles.log_weight,
            weights=weights,
            num_chains=num_chains,
            attrs=attrs,
            **(self._data_groups() if data else {}),
        )

    def _data_groups(self) -> dict[str, Any]:
        """What a Pyro model says about its data, one row for each particle."""
        # Pyro is there if the target is a model of it; nobody else loads it for an export.
        if self.target is None or "diffsampler.integrations.pyro_target" not in sys.modules:
            return {}
        from diffsampler.integrations.pyro_predict import log_likelihoods, observed_data, predict
        from diffsampler.integrations.pyro_target import PyroTarget

        if not isinstance(self.target, PyroTarget):
            return {}
        return {
            "posterior_predictive": predict(self.target, self.posterior, generator=torch.Generator().manual_seed(0)),
            "log_likelihood": log_likelihoods(self.target, self.particles.x),
            "observed_data": observed_data(self.target),
        }

    def plot(self, kind: Literal["pair", "weights", "training"] = "pair", **options: Any) -> Figure:
        """Draw weighted pair plots, the weights, or training curves; options go to :mod:`diffsampler.plotting`.

        Raises:
            ValueError: If the kind is unknown, or there is nothing to show.
            ImportError: If matplotlib is not installed.
        """
        try:
            return self._plot(kind, options)
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] != "matplotlib":
                raise
            raise ImportError("Expected matplotlib to be installed: pip install matplotlib.") from error

    def _plot(self, kind: str, options: dict[str, Any]) -> Figure:
        from diffsampler import plotting

        if kind == "pair":
            return plotting.pair(self.posterior, self.particles.log_weight, **options)
        if kind == "weights":
            return plotting.weights(self.particles.log_weight, **options)
        if kind == "training":
            if not self.history:
                raise ValueError(f"Method {self.method!r} keeps no training history.")
            return plotting.training(self.history, log_normalizer=self.true_log_normalizer, **options)
        raise ValueError(f"Expected kind 'pair', 'weights' or 'training'; got {kind!r}.")

    def save(self, path: str | Path) -> None:
        """Write the fit to one file, whole or not at all."""
        content = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in TRANSIENT}
        content["particles"] = {name: getattr(self.particles, name) for name in self.particles.__dataclass_fields__}
        content["findings"] = [tuple(finding) for finding in self.findings]
        save_atomic(path, content)

    @cached_property
    def summary(self) -> list[tuple[str, float, float, float]]:
        """Name, weighted mean, standard deviation and Monte Carlo error of every scalar parameter."""
        rows = []
        for name, value in self.posterior.items():
            flat = value.reshape(value.shape[0], -1).double()
            mean, error = self.particles.expectation(flat)
            second, _ = expectation((flat - mean).square(), self.particles.log_weight)
            labels = [name] if value.ndim == 1 else [f"{name}{list(i)}" for i in _indices(value.shape[1:])]
            rows += list(zip(labels, mean.tolist(), second.sqrt().tolist(), error.tolist(), strict=True))
        return rows

    def __str__(self) -> str:
        return _table(self)


def _kind(target: Target | None) -> str:
    return "an unknown target" if target is None else type(target).__name__


def _indices(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    return [tuple(i) for i in torch.cartesian_prod(*[torch.arange(s) for s in shape]).reshape(-1, len(shape)).tolist()]


def _table(fit: Fit) -> str:
    rows = fit.summary
    width = max([9, *(len(name) for name, *_ in rows[:MAX_ROWS])])
    lines = [f"{'parameter':<{width}} {'mean':>11} {'sd':>11} {'mcse':>10}"]
    lines += [f"{name:<{width}} {mean:>11.5g} {sd:>11.5g} {error:>10.2g}" for name, mean, sd, error in rows[:MAX_ROWS]]
    if len(rows) > MAX_ROWS:
        lines.append(f"... and {len(rows) - MAX_ROWS} more")
    log_z = fit.log_normalizer
    evidence = f"log Z {log_z}" if fit.particles.has_normalizer else "log Z not estimated by this method"
    if fit.true_log_normalizer is not None and fit.particles.has_normalizer:
        evidence += f" (exact {fit.true_log_normalizer:.4f})"
    facts = [evidence, f"ess {fit.ess:.0f} of {len(fit.particles)}"]
    if fit.particles.has_normalizer:
        failed = not fit.pareto_k <= 0.7 or any(finding.level == "error" for finding in fit.findings)
        # Weights that are bounded by equal ones have no tail.
        tail = "none" if fit.pareto_k == -math.inf else f"{fit.pareto_k:.2f}"
        facts.append(f"k-hat {tail} {'unreliable' if failed else 'good'}")
    facts += [f"{fit.evaluations:.3g} evaluations"] if fit.evaluations else []
    lines.append(" | ".join([*facts, f"{fit.seconds:.1f} s", fit.method]))
    return "\n".join([*lines, *(str(finding) for finding in fit.findings), *(f"Note: {note}" for note in fit.notes)])


def load(path: str | Path) -> Fit:
    """Read a fit that :meth:`Fit.save` wrote; onto the CPU if its device is not there.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged or holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"Expected a file written by Fit.save; there is none at {path}.")
    place = None if torch.cuda.is_available() else "cpu"
    try:
        content = torch.load(path, weights_only=True, map_location=place)
    except Exception as error:  # what a damaged archive raises depends on where it is damaged
        reason = str(error).partition("\n")[0][:200]
        raise ValueError(
            f"Expected a file written by Fit.save; got {path}, which cannot be read ({type(error).__name__}: {reason})."
        ) from error
    fields = set(Fit.__dataclass_fields__) - set(TRANSIENT)
    if not isinstance(content, dict) or set(content) != fields:
        raise ValueError(f"Expected a file written by Fit.save; got {path}, which holds something else.")
    content["particles"] = Particles(**content["particles"])
    content["findings"] = [Finding(*finding) for finding in content["findings"]]
    return Fit(**content)
