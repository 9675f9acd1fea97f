"""The demonstration: what overwritten files do to conversations, and what `persist` does instead, in one run."""
