"""The harness of the adapters' tests. It needs the frameworks."""
