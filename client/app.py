"""The Flower ClientApp: the same in every runtime."""

import logging
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client.answer import answer
from client.messages import TrainReply, TrainRequest
from client.site import open_site

app = ClientApp()
logger = logging.getLogger(__name__)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Answers one train request.

    The context's ``run_config`` holds ``config`` (resolved, as TOML) and ``state`` (the
    directory of ledger and outbox); its ``node_config`` the ``partition-id``.
    """
    client = int(context.node_config["partition-id"])
    try:
        site = open_site(str(context.run_config["config"]))
        state = Path(str(context.run_config["state"]))
        request = TrainRequest.from_record(message.content)
        reply = answer(site, client, state, request)
    except Exception:
        # An error's text may quote data: it stays here, and the server gets a code.
        logger.exception("client=%d", client)
        reply = TrainReply("failed")
    return Message(reply.to_record(), reply_to=message)
