"""Conformance suites that users can run on their own classes.

A suite raises AssertionError with the reason at the first promise that is broken, and returns what it checked.
"""

from diffsampler.testing.kernel import check_kernel
from diffsampler.testing.process import check_process
from diffsampler.testing.sampler import check_sampler
from diffsampler.testing.target import check_target

__all__ = ["check_kernel", "check_process", "check_sampler", "check_target"]
