"""What `scripts/bench` is made of: the peers, the measuring in turns, the tables, the targets and the plots."""
