"""Benchmark densities with exact normalizing constants, samplers and mode labels where they exist."""

from collections.abc import Callable

from diffsampler.target import Target
from diffsampler.targets.absorption import Absorption as Absorption
from diffsampler.targets.alanine_dipeptide import AlanineDipeptide as AlanineDipeptide
from diffsampler.targets.alanine_dipeptide import AlanineDipeptideInternal as AlanineDipeptideInternal
from diffsampler.targets.alanine_dipeptide import AlanineModel as AlanineModel
from diffsampler.targets.brownian import BrownianMotion as BrownianMotion
from diffsampler.targets.circular_molecule import CircularMolecule as CircularMolecule
from diffsampler.targets.double_well_particles import DoubleWell4 as DoubleWell4
from diffsampler.targets.eight_schools import EightSchools as EightSchools
from diffsampler.targets.fluid import LennardJonesFluid as LennardJonesFluid
from diffsampler.targets.funnel import Funnel as Funnel
from diffsampler.targets.gaussian import Gaussian as Gaussian
from diffsampler.targets.gaussian import StudentT as StudentT
from diffsampler.targets.inversion import LinearInversion as LinearInversion
from diffsampler.targets.inversion import TravelTimeInversion as TravelTimeInversion
from diffsampler.targets.label_switching import LabelSwitching as LabelSwitching
from diffsampler.targets.lattice import PhiFour as PhiFour
from diffsampler.targets.lennard_jones import LennardJones as LennardJones
from diffsampler.targets.logistic import LogisticRegression as LogisticRegression
from diffsampler.targets.mixtures import GaussianMixture as GaussianMixture
from diffsampler.targets.molecule import InternalMolecule as InternalMolecule
from diffsampler.targets.molecule import Molecule as Molecule
from diffsampler.targets.shapes import Banana as Banana
from diffsampler.targets.shapes import Rings as Rings
from diffsampler.targets.von_mises import VonMisesMixture as VonMisesMixture
from diffsampler.targets.wells import DoubleWells as DoubleWells
from diffsampler.targets.wells import ManyWell as ManyWell

REGISTRY: dict[str, Callable[[], Target]] = {
    "gaussian": Gaussian.correlated,
    "ill_scaled": Gaussian.ill_scaled,
    "student_t": StudentT,
    "gmm9": GaussianMixture.grid,
    "gmm25": lambda: GaussianMixture.grid(25),
    "gmm40": GaussianMixture.forty,
    "difficult": GaussianMixture.difficult,
    "seven": GaussianMixture.seven,
    "funnel": Funnel,
    "manywell8": lambda: ManyWell(dim=8),
    "manywell32": ManyWell,
    "manywell64": lambda: ManyWell(dim=64),
    "mw54": DoubleWells.mw54,
    "mw52": DoubleWells.mw52,
    "rings": Rings,
    "banana": Banana,
    "eight_schools": EightSchools,
    "brownian": BrownianMotion,
    "travel_time5": TravelTimeInversion,
    "travel_time20": lambda: TravelTimeInversion(20),
    "travel_time_linear5": LinearInversion.travel_time,
    "travel_time_linear20": lambda: LinearInversion.travel_time(20),
    "label_switching": LabelSwitching,
    "dw4": DoubleWell4,
    "lj13": LennardJones,
    "lj55": lambda: LennardJones(55),
    "lj_fluid16": LennardJonesFluid,
    "phi4": PhiFour,
    "alanine_dipeptide": AlanineDipeptideInternal,
    "von_mises": VonMisesMixture.basins,
}
"""Targets of the command line by their short names; call the value to build one."""
