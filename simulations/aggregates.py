"""What a participant sees: how the server's state changed, and no client's own update.

That is the difference of two states that were broadcast, so whatever the server did to
the updates is in it: clipping, noise, its optimiser. An aggregate is read as the update
of one client that holds the whole cohort's records: of one plain step it is just that.

The control is what the rule of the server would have made of the same rounds without
the client that is asked about. What exceeds it is what taking part gives away.

**Not guaranteed**: victims that are independent. Those of one cohort are in the same
aggregate, so an interval over them is of this run's cohorts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from fedpeft.aggregation import build_aggregator
from fedpeft.attacks.attack import Case, Knowledge, Observation, Seen
from fedpeft.interfaces import Update
from fedpeft.privacy import make_plan
from fedpeft.tensors import Tensors, add, subtract, zeros_like
from server.setup import private_rule


def only_aggregates(cases: Sequence[Case]) -> list[Case]:
    """Returns the cases with aggregates in place of updates.

    Of each client those rounds in which it took part: an adversary may know that. A
    round is left out where no later state is known.

    Args:
        cases: of one run, each with the updates of all clients that answered.
    """
    if not cases:
        return []
    broadcast = cases[0].observation.broadcast
    steps = {
        number: subtract(broadcast[number + 1], state)
        for number, state in broadcast.items()
        if number + 1 in broadcast
    }
    knowledge = _of_cohort(cases[0].observation.knowledge)
    return [_only_aggregates(case, steps, knowledge) for case in cases]


def _only_aggregates(
    case: Case, steps: Mapping[int, Tensors], knowledge: Knowledge
) -> Case:
    mine = [
        part
        for part in case.observation.seen
        if part.server_round in steps and not part.in_vain
    ]
    without = _without_victim(case.observation)
    own, control = (
        tuple(
            Seen(part.server_round, part.state, moved[part.server_round])
            for part in mine
        )
        for moved in (steps, without)
    )
    return Case(
        Observation(knowledge, own), case.secret, Observation(knowledge, control)
    )


def _without_victim(observation: Observation) -> dict[int, Tensors]:
    """Returns how the states had changed without the client, round by round.

    Each round starts from the state that was; the rule remembers its own past. Noise is
    drawn anew where it was drawn from the operating system.
    """
    config = observation.knowledge.config
    private = private_rule(config, make_plan(config))
    rule = build_aggregator(config.aggregation, private)
    others: dict[int, list[Update]] = {}
    for part in (part for rounds in observation.others for part in rounds):
        if not part.in_vain:
            update = Update(part.update, part.num_examples)
            others.setdefault(part.server_round, []).append(update)
    states = observation.broadcast
    memory = rule.init(next(iter(states.values()))) if states else {}
    steps = {}
    for number, state in states.items():
        updates, step = others.get(number, []), zeros_like(state)
        if updates or private is not None:  # a round of nobody is one of noise
            step, memory = rule.aggregate(updates, memory)
        # As it is broadcast: rounded to the state's precision.
        steps[number] = subtract(add(state, step), state)
    return steps


def _of_cohort(knowledge: Knowledge) -> Knowledge:
    """Returns the knowledge of one who takes a cohort for a client."""
    config = knowledge.config
    number = min(config.cohort.size, config.partition.num_clients)
    more = {
        key: number * value
        for key in ("nominal_examples", "nominal_persons")
        if (value := getattr(config.data, key)) is not None
    }
    batch = {"batch_size": number * config.training.batch_size}
    sections = {
        "data": config.data.model_copy(update=more),
        "training": config.training.model_copy(update=batch),
    }
    return replace(
        knowledge, config=config.model_copy(update=sections), sees_aggregates=True
    )
