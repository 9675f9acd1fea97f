"""The parts of `scripts/bench`: the peers, the measuring in turns, the tables, the targets and the plots."""
