"""Errors that a caller catches.

    FedpeftError             something a user can mend; shown as one plain line
    |-- ConfigError          a configuration value, key or combination
    |-- DataError            a file or column of the user's data
    |-- AssetError           a pinned model or data set that cannot be had
    |-- LedgerError          a privacy ledger that is missing, shorter or altered
    |-- PrivacyBudgetExceeded  a release that the budget does not cover
    |-- RunError             a run that cannot go on: too few replies, no checkpoint
    |-- RunStopped           a run that was asked to stop and goes on another time
    `-- InvalidPayload       bytes that are no payload for the tensors expected

Every message says what was expected, what came, and what to do.
"""


class FedpeftError(ValueError):
    """Base of all errors that the command line shows as one plain line."""


class ConfigError(FedpeftError):
    """A configuration value, key or combination that cannot be used."""


class DataError(FedpeftError):
    """A data file that cannot be read as the configuration describes it."""


class AssetError(FedpeftError):
    """A pinned model or data set that cannot be fetched or fails its hash."""


class LedgerError(FedpeftError):
    """A privacy ledger that is missing, shorter than it was, or altered."""


class PrivacyBudgetExceeded(FedpeftError):
    """A release that would spend more than the client's budget."""


class RunError(FedpeftError):
    """A run that cannot start or go on."""


class RunStopped(FedpeftError):
    """A run that was asked to stop; nothing was lost, and it can go on."""


class InvalidPayload(FedpeftError):
    """Bytes that do not decode to the tensors expected."""
