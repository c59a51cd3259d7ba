"""Taking a finished run's model away: files that load without fedpeft.

What is written holds the trained tensors and a model card, and nothing of the data, of
the clients or of the machine that it was trained on.
"""

from fedpeft.export.formats import FORMATS, write_export
from fedpeft.export.stored import StoredRun, Trained, read_run, rebuild

__all__ = [
    "FORMATS",
    "StoredRun",
    "Trained",
    "read_run",
    "rebuild",
    "write_export",
]
