"""The Flower ClientApp: the same in every runtime."""

import logging
from collections.abc import Mapping

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from client.answer import answer
from client.context import configuration, introduction, state_directory
from client.messages import TrainReply, TrainRequest
from client.site import open_site

Config = Mapping[str, str | int | float | bool]

_CRASHED = 3
"""Flower's error code for a client app that raised."""

app = ClientApp()
logger = logging.getLogger(__name__)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Answers one train request.

    The context's ``run_config`` holds the configuration, as :mod:`client.context` reads
    it. Its ``node_config`` holds ``partition-id`` (the client's index) and, for a
    client with records of its own, ``data`` (JSON of an ``OwnDataSection``), ``state``
    (the directory of ledger and outbox) and perhaps ``budget-epsilon`` (over all runs).
    In a simulation ``state`` stands in the ``run_config``.
    """
    node = context.node_config
    client = int(node["partition-id"])
    try:
        own, limit = str(node.get("data", "")), node.get("budget-epsilon")
        site = open_site(configuration(context), own)
        request = TrainRequest.from_record(message.content)
        reply = answer(
            site,
            client,
            state_directory(context),
            request,
            budget_epsilon=None if limit is None else float(limit),
        )
    except Exception:
        # An error's text may quote data: it stays here, and the server gets a code.
        logger.exception("client=%d", client)
        reply = TrainReply("failed")
    return Message(reply.to_record(), reply_to=message)


@app.query()
def introduce(message: Message, context: Context) -> Message:
    """Says which client this is, where nodes are not numbered as the clients are."""
    return Message(introduction(context), reply_to=message)


def deliver(message: Message, run_config: Config, node_config: Config) -> Message:
    """Gives a message to the app, as Flower would; an exception becomes an error."""
    context = Context(
        run_id=message.metadata.run_id,
        node_id=message.metadata.dst_node_id,
        node_config=dict(node_config),
        state=RecordDict(),
        run_config=dict(run_config),
    )
    try:
        return app(message, context)
    except Exception:
        logger.exception("client=%s", node_config["partition-id"])
        return Message(Error(code=_CRASHED, reason="crashed"), reply_to=message)
