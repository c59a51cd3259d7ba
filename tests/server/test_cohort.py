from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from server.cohort import rotation


@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 40))
def test_no_client_takes_part_more_often_than_its_cap(clients, size, rounds) -> None:
    size = min(size, clients)
    taken = Counter()
    for server_round in range(1, rounds + 1):
        cohort = rotation(server_round, size, clients)
        assert len(set(cohort)) == size
        taken.update(cohort)
    assert max(taken.values()) <= -(-rounds * size // clients)
