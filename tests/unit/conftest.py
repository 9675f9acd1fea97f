"""Hypothesis for the unit tests: the same examples at every run, and no clock in the verdict."""

from __future__ import annotations

from hypothesis import HealthCheck, Phase, settings

# Derandomised: a build must not fail by luck. `pytest tests/unit --hypothesis-profile=search` looks further.
settings.register_profile("unit", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("search", settings.get_profile("unit"), derandomize=False, max_examples=2_000)
# The mutants ask only whether a test fails: no smaller example is looked for.
settings.register_profile("mutants", settings.get_profile("unit"), phases=[Phase.explicit, Phase.generate])
settings.load_profile("unit")
