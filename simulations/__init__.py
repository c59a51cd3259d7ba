"""Many clients on one machine: shipped scenarios and the in-process engine."""
