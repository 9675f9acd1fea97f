"""What the processes of one test run share; `persist.pytest_plugin` is its face to pytest."""
