"""Distances between two sets of samples, as the tables on particle systems and molecules report them.

Every distance here is zero only in the limit of many samples: two independent sets of 2,000 exact samples of four
particles in double wells are 0.13 apart in energy and 0.23 after alignment. State that floor next to a figure.
"""

from diffsampler.metrics.alignment import Alignment as Alignment
from diffsampler.metrics.alignment import AlternatingAlignment as AlternatingAlignment
from diffsampler.metrics.alignment import ExactAlignment as ExactAlignment
from diffsampler.metrics.circular import angle_wasserstein as angle_wasserstein
from diffsampler.metrics.circular import torsion_divergence as torsion_divergence
from diffsampler.metrics.clouds import aligned_wasserstein as aligned_wasserstein
from diffsampler.metrics.clouds import wasserstein as wasserstein
from diffsampler.metrics.line import total_variation as total_variation
from diffsampler.metrics.line import wasserstein_line as wasserstein_line
from diffsampler.metrics.pairs import PairCounts as PairCounts
from diffsampler.metrics.pairs import pair_distances as pair_distances
from diffsampler.metrics.pairs import pair_total_variation as pair_total_variation
from diffsampler.metrics.pairs import pair_wasserstein as pair_wasserstein
from diffsampler.metrics.pairs import radial_distribution as radial_distribution
