"""The command line: ``persist --help``."""

from persist.cli.entry import main as main
