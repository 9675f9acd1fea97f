"""Adapters: the session protocols of agent frameworks, on a store of `persist`."""
