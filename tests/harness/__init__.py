"""The parts of the proofs. Each module serves a short form in the tests, and most modules a long form in scripts/."""
