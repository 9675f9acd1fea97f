"""`python -m persist`: the command line."""

from persist.cli import main

main()
