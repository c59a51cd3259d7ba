"""Sizes that follow from others, so that one key makes a scenario larger."""

from collections.abc import Mapping
from typing import Any


def derive_sizes(table: Mapping[str, Any]) -> dict[str, Any]:
    """Fills in ``nominal_examples`` and a batch size of ``"nominal"``.

    Both from constants of the file: without `nominal_examples`, a client's equal share
    of what `max_examples` leaves to training; and a batch of all of it. What is not
    there, or not a number, is left for the sections to complain of.

    >>> data = {"max_examples": 1000, "test_fraction": 0.2}
    >>> partition, training = {"num_clients": 8}, {"batch_size": "nominal"}
    >>> table = {"data": data, "partition": partition, "training": training}
    >>> derived = derive_sizes(table)
    >>> derived["data"]["nominal_examples"], derived["training"]["batch_size"]
    (100, 100)
    """
    parts = [table.get(name) for name in ("data", "partition", "training")]
    if not all(isinstance(part, dict) for part in parts):
        return dict(table)
    data, partition, training = ({**part} for part in parts if part is not None)
    held_out = data.get("test_fraction", 0.16), data.get("validation_fraction", 0.0)
    most: Any = data.get("max_examples")
    clients: Any = partition.get("num_clients")
    if "nominal_examples" not in data and _are_numbers(most, clients, *held_out):
        share = most * (1 - sum(held_out)) / max(1, clients)
        data["nominal_examples"] = max(1, round(share))
    if training.get("batch_size") == "nominal" and "nominal_examples" in data:
        training["batch_size"] = data["nominal_examples"]
    return {**table, "data": data, "training": training}


def _are_numbers(*values: object) -> bool:
    return all(isinstance(value, int | float) for value in values)
