"""A client of canaries, asked as a server asks: does the protocol keep its promises?

Nobody's data are in it, and nothing of it enters a model that is released. The trials
of :mod:`fedpeft.audit.trials` look at what the noise hides; these checks look at what
stands around it: one answer a request, one charge an answer, nothing told beside.

    python -m simulations.canaries SCENARIO --seconds 30
"""

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path

import torch

from client.answer import answer
from client.messages import TrainReply, TrainRequest
from client.site import Site, assemble
from fedpeft.audit.canaries import as_examples, canary_model, tensor_sizes
from fedpeft.audit.results import Check, DpTrial
from fedpeft.audit.trials import (
    dp_trials,
    hiding_check,
    ledger_checks,
)
from fedpeft.compression import Dense
from fedpeft.config import RunConfig
from fedpeft.data import Encoded, load
from fedpeft.errors import RunError
from fedpeft.model import TaskModel, build_model, trainable_state
from fedpeft.privacy import (
    ENROLMENT,
    Plan,
    PrivateMean,
    SecureRandomness,
    make_plan,
)
from fedpeft.privacy.ledger import ledger_as_it_stands
from fedpeft.scenarios import find_scenario
from fedpeft.tensors import flatten, zeros_like
from server.checkpoint import Progress
from server.rounds import run_rounds
from server.setup import Server
from simulations.grid import InProcessGrid
from simulations.workers import WorkerPool

_SOURCE = "canaries"
_RUN = "ca" * 8
_VALUES = 256
_EXAMPLES = 8
_DRAWS = 20


def examine(
    config: RunConfig,
    model: TaskModel,
    *,
    seconds: float = 60.0,
    seed: int = 0,
    samples: Encoded | None = None,
) -> tuple[list[DpTrial], list[Check]]:
    """Returns all trials and checks of a configuration's claim; none if it has none.

    Args:
        config: of the run.
        model: the run's own; its trainable tensors' sizes are looked at.
        seconds: for the trials; the checks take about two more.
        seed: of canaries and coins.
        samples: public examples that become canaries too, see :func:`dp_trials`.
    """
    trials, checks = dp_trials(
        config, model, seconds=seconds, seed=seed, samples=samples
    )
    return trials, [*checks, *protocol_checks(config, model)]


def protocol_checks(config: RunConfig, model: TaskModel) -> list[Check]:
    """Asks a client of canaries twice, and looks at what it told and charged."""
    plan = make_plan(config)
    if plan is None:
        return []
    config = config.model_copy(
        update={"run": config.run.model_copy(update={"id": None})}
    )
    canaries = canary_model(tensor_sizes(model, most=_VALUES))
    with tempfile.TemporaryDirectory() as folder:
        checks = _client_checks(_site(config, plan, canaries), Path(folder))
    if plan.sampling == "poisson" and not plan.is_dp_sgd:
        with tempfile.TemporaryDirectory() as folder:
            checks += _server_checks(_server(config, plan, canaries, Path(folder)))
    return checks


def _site(config: RunConfig, plan: Plan, model: TaskModel) -> Site:
    examples = as_examples(torch.eye(_EXAMPLES, _total(model)), range(_EXAMPLES))
    return assemble(config, plan, model, {_SOURCE: examples}, is_own=False)


def _client_checks(site: Site, state: Path) -> list[Check]:
    plan = site.plan
    assert plan is not None
    request = _request(site, plan)
    rounds = [ENROLMENT, 1] if plan.is_secret else [1]
    try:
        for server_round in rounds:
            asked = dataclasses.replace(request, server_round=server_round)
            first = answer(site, 0, state, asked)
    except ValueError as error:
        return [Check("reply: a client of canaries answers", "failed", str(error))]
    ledger = ledger_as_it_stands(state, _SOURCE)
    found = ledger_checks(ledger, answers=len(rounds), delta=plan.target_delta)
    again = answer(site, 0, state, request)
    charged = len(ledger_as_it_stands(state, _SOURCE).entries)
    other = answer(site, 0, state, dataclasses.replace(request, plan_hash="looser"))
    return [
        *found,
        _told_nothing(first),
        _once(first, again, charged, len(rounds)),
        _own_plan(other),
    ]


def _request(site: Site, plan: Plan) -> TrainRequest:
    start = trainable_state(site.model)
    return TrainRequest(
        run=_RUN,
        server_round=1,
        config_hash=site.config.hash,
        plan_hash=plan.hash,
        backbone=site.model.fingerprint,
        state=Dense().compress(start, torch.Generator()).to_bytes(),
    )


def _told_nothing(reply: TrainReply) -> Check:
    tells = reply.num_examples != -1
    return Check(
        "reply: the number of examples stays at the client",
        "failed" if tells else "ok",
        f"Expected -1, got {reply.num_examples}.",
        falsifies=tells,
    )


def _once(first: TrainReply, again: TrainReply, charged: int, expected: int) -> Check:
    """A second answer that is charged costs budget; one that is not refutes it."""
    is_same = first.code == "ok" and first.payload == again.payload
    is_free = not is_same and again.code == "ok" and charged <= expected
    return Check(
        "reply: one request has one answer, whenever it is asked",
        "ok" if is_same else "failed",
        f"Expected the same bytes again and {expected} entries in the ledger, got "
        f"{'the same' if is_same else 'others'} ({first.code}, {again.code}) and "
        f"{charged}.",
        falsifies=is_free,
    )


def _own_plan(reply: TrainReply) -> Check:
    """What is trained follows the client's own plan, whatever a request may name."""
    return Check(
        "reply: a request under another plan is refused",
        "ok" if reply.code == "config-mismatch" else "failed",
        f"Expected the code config-mismatch, got {reply.code}.",
    )


def _server(config: RunConfig, plan: Plan, model: TaskModel, output: Path) -> Server:
    """Returns a server of two rounds that has had the first of them."""
    rounds = config.run.model_copy(update={"rounds": 2})
    rule = PrivateMean(
        plan.clipping_norm,
        plan.noise_multiplier,
        plan.nominal_batch,
        lambda server_round: SecureRandomness(),
    )
    return Server(
        run=_RUN,
        config=config.model_copy(update={"run": rounds}),
        plan=plan,
        model=model,
        aggregator=rule,
        compressor=Dense(),
        held_out=as_examples(torch.eye(1, _total(model))),
        output=output,
        randomness=lambda server_round: SecureRandomness(),
    )


def _server_checks(server: Server) -> list[Check]:
    """Runs a round whose cohort happens to be empty."""
    server.secrets.note({"round": 2, "cohort": []})
    once = _drawn_once(server)
    if once.status == "failed":  # then the round would have another cohort
        return [once]
    start = zeros_like(trainable_state(server.model))
    progress = Progress(1, start, server.aggregator.init(start), start)
    grid = InProcessGrid(WorkerPool(0, {}), server.config.partition.num_clients)
    try:
        progress = run_rounds(grid, server, progress)
        moved = bool(flatten(progress.trainable).any())
    except RunError:
        moved = False
    empty = Check(
        "round: an empty cohort is noise like any other",
        "ok" if moved else "failed",
        f"Expected a model that moved, got {'one' if moved else 'none'}.",
        falsifies=not moved,
    )
    return [once, empty, hiding_check(progress.records)]


def _drawn_once(server: Server) -> Check:
    """Asks again, as after a crash; nobody outside sees that there were two times."""
    cohorts = [
        [
            server.secrets.cohort(server.config, server_round, SecureRandomness())
            for _ in range(2)
        ]
        for server_round in range(3, 3 + _DRAWS)
    ]
    differ = sum(first != second for first, second in cohorts)
    return Check(
        "cohorts: a round that is tried again asks the same clients",
        "failed" if differ else "ok",
        f"Expected {_DRAWS} cohorts twice, found {differ} of them drawn anew.",
    )


def _total(model: TaskModel) -> int:
    return flatten(trainable_state(model)).numel()


def main() -> None:
    """Prints what was found; exits with 2 if the claim is refuted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scenario")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = RunConfig.from_file(find_scenario(arguments.scenario), arguments.set)
    labels = config.data.labels or load(config.data).label_names
    model = build_model(config, len(labels))
    trials, checks = examine(
        config, model, seconds=arguments.seconds, seed=arguments.seed
    )
    refuted = [trial.trial for trial in trials if trial.falsified]
    refuted += [c.check for c in checks if c.status == "failed" and c.falsifies]
    if arguments.json:
        found = {
            "refuted": refuted,
            "trials": [dataclasses.asdict(trial) for trial in trials],
            "checks": [dataclasses.asdict(check) for check in checks],
        }
        print(json.dumps(found, indent=2))
    else:
        for trial in trials:
            verdict = "REFUTED" if trial.falsified else "ok"
            print(f"{verdict:8}{trial.trial}: {trial.detail}")
        for check in checks:
            print(f"{check.status:8}{check.check}: {check.detail}")
    sys.exit(2 if refuted else 0)


if __name__ == "__main__":
    main()
