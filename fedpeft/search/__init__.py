"""Which method, rank and placement suits a task: candidates, halving, front."""

from fedpeft.search.candidates import Candidate, read_candidates, shipped_candidates
from fedpeft.search.halving import Trial, front, halving, pareto_front, rungs

__all__ = [
    "Candidate",
    "Trial",
    "front",
    "halving",
    "pareto_front",
    "read_candidates",
    "rungs",
    "shipped_candidates",
]
