"""Taking a finished run's model away: files that load without fedpeft.

What is written holds the trained tensors and a model card, and nothing of the data, of
the clients or of the machine that it was trained on.
"""

from fedpeft.export.formats import FORMATS, check_export, write_export
from fedpeft.export.stored import StoredRun, Trained, read_run, rebuild

__all__ = [
    "FORMATS",
    "StoredRun",
    "Trained",
    "check_export",
    "read_run",
    "rebuild",
    "write_export",
]
