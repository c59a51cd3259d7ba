"""Measurements to repeat: ``python -m simulations.benchmarks.NAME --json``."""
