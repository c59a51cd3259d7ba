"""The Flower ClientApp: the same in every runtime."""

from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client.answer import answer
from client.messages import TrainRequest
from client.site import open_site

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Answers one train request.

    The context's ``run_config`` holds ``config`` (resolved, as TOML) and ``state`` (the
    directory of ledger and outbox); its ``node_config`` the ``partition-id``.
    """
    site = open_site(str(context.run_config["config"]))
    client = int(context.node_config["partition-id"])
    state = Path(str(context.run_config["state"]))
    request = TrainRequest.from_record(message.content)
    reply = answer(site, client, state, request)
    return Message(reply.to_record(), reply_to=message)
