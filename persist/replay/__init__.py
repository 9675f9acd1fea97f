"""Replay: server processes play real conversations into one store while some of them are killed; then all is compared."""
