"""Which clients take part in a round."""


def rotation(server_round: int, size: int, num_clients: int) -> list[int]:
    """Returns the cohort of a round, from 1, in a public rotation, sorted.

    **Guarantees**: over any number of rounds a client takes part at most
    ``ceil(rounds * size / num_clients)`` times, which is the cap of the privacy plan.
    The epsilon of an example gains nothing from who is in a cohort, so there is nothing
    to hide and nothing to draw.

    >>> rotation(1, 2, 5), rotation(2, 2, 5), rotation(3, 2, 5)
    ([0, 1], [2, 3], [0, 4])
    """
    first = (server_round - 1) * size
    return sorted((first + i) % num_clients for i in range(size))
