"""Distances between two sets of samples, as the tables on particle systems and molecules report them.

No distance is zero for a perfect sampler. What 2,000 exact samples score against 2,000 others, to be stated next to a
figure (five repeats; experiments/make_references.py measures it):

=====================================  ======================================  ============  =====  =====
published as                           here                                    DW-4          LJ-13  LJ-55
=====================================  ======================================  ============  =====  =====
energy W2                              ``wasserstein_line`` of the energies    0.12 +- 0.04  0.40   0.84
W2 of particles, exact alignment       ``aligned_wasserstein`` with            0.24 +- 0.04
                                       ``ExactAlignment``
the same, one round of alignment       ``AlternatingAlignment``                              1.58
pair distances, W2 (squared there)     ``pair_wasserstein``                    0.05          0.008  0.001
pair distances, TV                     ``pair_total_variation``                0.06          0.013  0.004
KL of torsions (200 bins)              ``torsion_divergence``
W2 of two torsions                     ``angle_wasserstein``
=====================================  ======================================  ============  =====  =====

Distances of whole configurations grow with the dimension and shrink slowly with the number of samples: compare figures
of equal numbers only. They are read on both sides: samples that are too narrow may score below the floor.
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
