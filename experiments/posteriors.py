"""Real posteriors as Pyro models; they live in the library, where the demo of the command line uses them too."""

from __future__ import annotations

from diffsampler.integrations.examples import EFFECTS as EFFECTS
from diffsampler.integrations.examples import ERRORS as ERRORS
from diffsampler.integrations.examples import GALAXIES as GALAXIES
from diffsampler.integrations.examples import GALAXY_LOG_EVIDENCE as GALAXY_LOG_EVIDENCE
from diffsampler.integrations.examples import eight_schools as eight_schools
from diffsampler.integrations.examples import eight_schools_centered as eight_schools_centered
from diffsampler.integrations.examples import eight_schools_noncentered as eight_schools_noncentered
from diffsampler.integrations.examples import galaxies as galaxies
from diffsampler.integrations.examples import labelling as labelling
from diffsampler.integrations.examples import normal_mixture as normal_mixture
