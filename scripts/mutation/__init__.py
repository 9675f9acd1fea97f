"""Mutants of `persist`: the package with one mechanism taken out. `scripts/mutants` sees the tests notice each."""
