"""Judges models on the server's own public held-out data."""

from fedpeft.evaluation import evaluate
from fedpeft.model import load_trainable_state
from fedpeft.tensors import Tensors
from server.setup import Server

Metrics = dict[str, float]


def judge(server: Server, state: Tensors) -> Metrics:
    """Returns the metrics of a state on the held-out data.

    Where clients keep a part to themselves, the state alone is nobody's model. In a
    simulation every client's is judged instead, the state with its local part, or with
    the initial one before it has taken part: each metric is the mean over the clients,
    and the main one is also given of the client that fares worst. All are judged on the
    same data; how they fare on records like their own is not asked.

    **Guarantees**: for unit ``example`` and ``person`` local parts are releases that
    were paid for, and so are metrics of them. For unit ``client`` nothing noises them:
    there, and wherever the server does not see them, there are no metrics.

    Args:
        server: whose data, and whose model, which is overwritten.
        state: the shared state.
    """
    if not server.model.local_start:
        return _judge(server, state)
    if server.runtime.local_parts is None or server.hides_clients:
        return {}
    return _over_clients(server, state, server.runtime.local_parts())


def _judge(server: Server, state: Tensors) -> Metrics:
    load_trainable_state(server.model, state)
    precision = server.config.training.precision
    return evaluate(server.model, server.held_out, precision, kept=server.kept)


def _over_clients(server: Server, state: Tensors, parts: list[Tensors]) -> Metrics:
    """Returns the means, and the worst; clients without a part are judged as one."""
    found = [_judge(server, {**state, **part}) for part in parts if part]
    absent = len(parts) - len(found)
    if absent:
        found += [_judge(server, state)] * absent
    task = server.model.task
    worst = (max if task.is_loss else min)(metrics[task.metric] for metrics in found)
    means = {name: sum(m[name] for m in found) / len(found) for name in found[0]}
    return {**means, f"{task.metric}_worst": worst}
