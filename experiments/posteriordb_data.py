"""Data and reference draws of posteriordb: small classics typed in, the rest read from a folder.

A folder is either a checkout of posteriordb (``git clone https://github.com/stan-dev/posteriordb``), or holds plain
files: ``<data>.json``, and ``<posterior>.npz`` with ``names``, ``draws``, and the ``mean`` and ``sd`` of all draws.

References:
    posteriordb: Testing, Benchmarking and Developing Bayesian Inference Algorithms (Magnusson et al., 2024),
    https://arxiv.org/abs/2407.04967
    Eight schools: Estimation in parallel randomized experiments (Rubin, 1981),
    https://doi.org/10.3102/10769986006004377
    Pelts of hare and lynx in thousands, 1900 to 1920: The Conservation of the Wild Life of Canada (Hewitt, 1921), as
    printed by Howard, Modeling basics (2009)
    Leaf weight and size of mesquite bushes: Data Analysis Using Regression and Multilevel/Hierarchical Models (Gelman
    and Hill, 2007), exercise 4.6
    Summer temperatures at Kilpisjarvi, 1952 to 2013: Finnish Meteorological Institute, as analysed in Bayesian Data
    Analysis demos (Vehtari), https://github.com/avehtari/BDA_course_Aalto
    Eleven simulated points of a Gaussian process: Stan's example models, https://github.com/stan-dev/example-models
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

__all__ = ["TYPED_IN", "Reference", "read_data", "read_reference"]


def _numbers(text: str) -> list[float]:
    return [float(word) for word in text.split()]


def _repeated(*pairs: tuple[float, int]) -> list[float]:
    return [value for value, count in pairs for _ in range(count)]


HARE = _numbers("47.2 70.2 77.4 36.3 20.6 18.1 21.4 22 25.4 27.1 40.3 57 76.6 52.3 19.5 11.2 7.6 14.6 16.2 24.7")
LYNX = _numbers("6.1 9.8 35.2 59.4 41.7 19 13 8.3 9.1 7.4 8 12.3 19.5 45.7 51.1 29.7 15.8 9.7 10.1 8.6")

TYPED_IN: dict[str, dict[str, Any]] = {
    "eight_schools": {"y": _numbers("28 8 -3 7 -1 1 18 12"), "sigma": _numbers("15 10 16 11 9 11 10 18")},
    "hudson_lynx_hare": {
        "ts": [float(year) for year in range(1, 21)],
        "y_init": [30.0, 4.0],
        "y": [list(pair) for pair in zip(HARE, LYNX, strict=True)],
    },
    "gp_pois_regr": {
        "x": [float(x) for x in range(-10, 11, 2)],
        "y": _numbers("4.75906 1.59423 2.99548 5.27501 1.66472 2.24347 2.8914 4.08681 4.60588 0.802364 3.92136"),
        "k": _numbers("40 37 29 12 4 3 9 19 77 82 33"),
    },
    "kilpisjarvi_mod": {
        "x": [float(x) for x in range(3952, 4014)],
        "y": _numbers(
            "8.3 10.9 9.4 8.1 8.1 7.7 8.6 9.1 11 10.1 7.6 8.8 8.3 7.2 9.3 8.8 7.6 10.5 11 8.9 11.3 10 10.1 6.4 "
            "8.2 8.4 9.5 9.9 10.6 7.6 7.7 8.1 8.4 9.7 9.5 7.3 10.3 9.6 10.3 9.8 9 9.1 9.5 8.7 9.9 10.5 9.4 9 9 "
            "9.7 11.4 10.7 10.1 10.8 10.4 10.3 8.8 9.8 8.8 10.8 8.6 11.1"
        ),
        "pmualpha": 9.31290322580645,
        "psalpha": 100.0,
        "pmubeta": 0.0,
        "psbeta": 0.0333333333333333,
    },
    "mesquite": {
        "canopy_height": _numbers(
            "1 1.33 0.6 1.2 1.05 1 0.9 1.3 0.6 0.8 0.6 0.95 1.2 0.7 1.2 1.1 0.64 1.2 1.2 1.3 1 0.9 1 0.5 0.9 "
            "0.6 1.4 2.5 1.4 1.3 1.1 1.5 0.8 1.1 1.3 0.85 1.5 1.2 1.15 1.5 0.7 1.9 1.5 1.5 1.5 0.62"
        ),
        "density": _numbers(
            "1 1 1 1 1 1 1 2 1 1 1 1 1 1 1 1 1 1 1 1 1 2 1 1 1 1 5 9 1 1 1 3 1 3 7 1 2 2 2 3 1 1 2 2 1 1"
        ),
        "diam1": _numbers(
            "1.8 1.7 2.8 1.3 3.3 1.4 1.5 3.9 1.8 2.1 0.8 1.3 1.2 1.5 2.8 1.4 1.5 2.4 1.9 2.3 2.1 2.4 1 1.3 1.1 "
            "1.3 2.5 5.2 2 1.6 1.4 3.2 1.9 2.4 2.5 2.1 2.4 2.4 1.9 2.7 1.3 2.9 2.1 4.1 2.8 1.27"
        ),
        "diam2": _numbers(
            "1.15 1.35 2.55 0.85 1.9 1.4 0.5 2.3 1.35 1.6 0.63 0.95 0.9 0.7 1.7 0.85 0.6 2.4 1.55 1.6 1.7 1.3 "
            "0.4 0.6 0.7 1.2 2.3 4 1.6 1.6 1 1.9 1.8 2.4 1.8 1.5 2.2 1.7 1.2 2.5 1.1 2.7 1 3.8 2.5 1"
        ),
        "group": _repeated((0.0, 26), (1.0, 20)),
        "total_height": _numbers(
            "1.3 1.35 2.16 1.8 1.55 1.2 1 1.7 0.8 1.2 0.9 1.35 1.4 1 1.7 1.5 0.65 1.5 1.7 1.7 1.5 1.5 1.2 0.7 "
            "1.2 0.8 1.7 3 1.7 1.6 1.5 1.9 1.1 1.6 2 1.25 2 1.3 1.45 2.2 0.7 1.9 1.8 2 2.2 0.92"
        ),
        "weight": _numbers(
            "401.3 513.7 1179.2 308 855.2 268.7 155.5 1253.2 328 614.6 60.2 269.6 448.4 120.4 378.7 266.4 138.9 "
            "1020.8 635.7 621.8 579.8 326.8 66.7 68 153.1 256.4 723 4052 345 330.9 163.5 1160 386.6 693.5 674.4 "
            "217.5 771.3 341.7 125.7 462.5 64.5 850.6 226 1745.1 908 213.5"
        ),
    },
}
"""Data of each set in the layout of posteriordb, without the counts."""

DATA = "posterior_database/data/data"
DRAWS = "posterior_database/reference_posteriors/draws/draws"


class Reference(NamedTuple):
    """Reference draws of a posterior."""

    names: list[str]
    """Scalar parameters, as Stan writes them: ``beta[1]``."""
    draws: np.ndarray
    """Draws, shape ``(n, len(names))``."""
    mean: np.ndarray
    """Means of all reference draws, which may be more than those kept."""
    sd: np.ndarray
    """Standard deviations of the same."""
    exact: bool
    """Whether the draws are in double precision."""


def _unzip(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        return json.loads(archive.read(archive.namelist()[0]))


def read_data(name: str, folder: Path | None) -> dict[str, Any]:
    """Data from a folder, or as typed in."""
    if folder is not None:
        plain, packed = folder / f"{name}.json", folder / DATA / f"{name}.json.zip"
        if plain.exists():
            return json.loads(plain.read_text())
        if packed.exists():
            return _unzip(packed)
    if name in TYPED_IN:
        return TYPED_IN[name]
    where = "name a folder" if folder is None else f"not found in {folder}"
    raise FileNotFoundError(f"Expected {name}.json or a checkout of posteriordb; {where} (--data).")


def read_reference(name: str, folder: Path | None) -> Reference | None:
    """Reference draws from a folder, or None."""
    if folder is None:
        return None
    plain, packed = folder / f"{name}.npz", folder / DRAWS / f"{name}.json.zip"
    if packed.exists():
        chains = _unzip(packed)
        names = list(chains[0])
        draws = np.stack([np.concatenate([chain[key] for chain in chains]) for key in names], -1).astype(float)
        return Reference(names, draws, draws.mean(0), draws.std(0, ddof=1), exact=True)
    if plain.exists():
        with np.load(plain) as content:
            names = [str(key) for key in content["names"]]
            draws = content["draws"].astype(float)
            return Reference(names, draws, content["mean"], content["sd"], exact=False)
    return None
