"""Federated, differentially private, parameter-efficient fine-tuning.

Start reading at :mod:`fedpeft.interfaces`.
"""

__version__ = "0.1.0"
