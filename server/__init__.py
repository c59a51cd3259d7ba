"""The server process: the round loop, cohorts, checkpoints and results."""

import client as client  # before Flower imports gRPC: see there
