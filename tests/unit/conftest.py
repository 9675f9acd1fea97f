"""Hypothesis for the unit tests: each run tries the same examples, and no clock decides a verdict."""

from __future__ import annotations

from hypothesis import HealthCheck, Phase, settings

# The examples are derandomised because a build must not fail by luck. `pytest tests/unit --hypothesis-profile=search`
# looks further.
settings.register_profile("unit", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("search", settings.get_profile("unit"), derandomize=False, max_examples=2_000)
# The mutants ask only whether a test fails, so Hypothesis does not look for a smaller example.
settings.register_profile("mutants", settings.get_profile("unit"), phases=[Phase.explicit, Phase.generate])
settings.load_profile("unit")
