"""The server process: the round loop, cohorts, checkpoints and results."""
