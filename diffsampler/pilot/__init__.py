"""The automatic pilot: from a log density alone to weighted particles, with nothing to tune."""

from diffsampler.pilot.pilot import Pilot, PilotResult, run_pilot

__all__ = ["Pilot", "PilotResult", "run_pilot"]
