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
from fedpeft.config import RunConfig
from fedpeft.interfaces import State, Update
from fedpeft.privacy import make_plan
from fedpeft.tensors import Tensors, add, subtract, zeros_like
from server.setup import private_rule

Rounds = Mapping[int, Mapping[int, Seen]]
"""Round -> place of a client among all that were seen -> its part."""


def only_aggregates(cases: Sequence[Case]) -> list[Case]:
    """Returns the cases with aggregates in place of updates.

    Of each client those rounds in which it took part: an adversary may know that.

    Args:
        cases: of one run, each with the updates of all clients that answered.
    """
    return [_only_aggregates(case) for case in cases]


def _only_aggregates(case: Case) -> Case:
    observation, config = case.observation, case.observation.knowledge.config
    rounds = _by_round([observation.seen, *observation.others])
    seen = {
        server_round: Seen(server_round, state, step)
        for server_round, (state, step) in _broadcast(rounds, observation).items()
        if 0 in rounds[server_round]
    }
    without = _without_first(config, rounds) if seen else {}
    knowledge = _of_cohort(observation.knowledge)
    control = [
        replace(part, update=without[server_round])
        for server_round, part in seen.items()
    ]
    return Case(
        Observation(knowledge, tuple(seen.values())),
        case.secret,
        Observation(knowledge, tuple(control)),
    )


def _by_round(clients: Sequence[Sequence[Seen]]) -> Rounds:
    rounds: dict[int, dict[int, Seen]] = {}
    for place, parts in enumerate(clients):
        for part in parts:
            rounds.setdefault(part.server_round, {})[place] = part
    return dict(sorted(rounds.items()))


def _broadcast(
    rounds: Rounds, observation: Observation
) -> dict[int, tuple[Tensors, Tensors]]:
    """Returns each round's state and its change, where the next state is known.

    After the last round that is the final model, unless it is a mean of several.
    """
    config = observation.knowledge.config
    states = {number: next(iter(of.values())).state for number, of in rounds.items()}
    if observation.final is not None and config.run.average_last == 1:
        states[config.run.rounds + 1] = observation.final
    return {
        number: (states[number], subtract(states[number + 1], states[number]))
        for number in rounds
        if number + 1 in states
    }


def _without_first(config: RunConfig, rounds: Rounds) -> dict[int, Tensors]:
    """Returns how states had changed without the first client, round by round.

    Each round starts from the state that was; the rule remembers its own past. Noise is
    drawn anew where it was drawn from the operating system.
    """
    private = private_rule(config, make_plan(config))
    rule = build_aggregator(config.aggregation, private)
    steps: dict[int, Tensors] = {}
    memory: State | None = None
    for number, parts in rounds.items():
        state = next(iter(parts.values())).state
        memory = rule.init(state) if memory is None else memory
        updates = [
            Update(part.update, part.num_examples)
            for place, part in parts.items()
            if place != 0
        ]
        step = zeros_like(state)  # of nobody; if that is hidden, there is noise
        if updates or private is not None:
            step, memory = rule.aggregate(updates, memory)
        # As it is broadcast: rounded to the state's precision.
        steps[number] = subtract(add(state, step), state)
    return steps


def _of_cohort(knowledge: Knowledge) -> Knowledge:
    """Returns the knowledge of one who takes a cohort for a client."""
    config = knowledge.config
    number = min(config.cohort.size, config.partition.num_clients)
    data, training = config.data, config.training
    more = {
        key: number * value
        for key in ("nominal_examples", "nominal_persons")
        if (value := getattr(data, key)) is not None
    }
    batch = {"batch_size": number * training.batch_size}
    return replace(
        knowledge,
        config=config.model_copy(
            update={
                "data": data.model_copy(update=more),
                "training": training.model_copy(update=batch),
            }
        ),
    )
