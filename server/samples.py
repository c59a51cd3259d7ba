"""What the model goes on with, before and after: for people to read."""

import json
from typing import Literal

from fedpeft.durable import write_atomically
from fedpeft.model import load_trainable_state
from fedpeft.tasks import CausalLanguageModelling
from fedpeft.tensors import Tensors
from server.setup import Server


def write_samples(
    server: Server, when: Literal["before", "after"], state: Tensors
) -> None:
    """Adds the completions of the scenario's prompts to ``samples.json``.

    Args:
        server: whose model goes on with them; nothing is done without prompts.
        when: before the first round, or after the last.
        state: the trainable state of that moment.
    """
    task, prompts = server.model.task, server.config.model.samples
    if not prompts or not isinstance(task, CausalLanguageModelling):
        return
    load_trainable_state(server.model, state)
    module = server.model.module.eval()
    path = server.output / "samples.json"
    samples = json.loads(path.read_text()) if path.exists() else {}
    for prompt in prompts:
        samples.setdefault(prompt, {})[when] = task.complete(module, prompt)
    write_atomically(path, (json.dumps(samples, indent=2) + "\n").encode())
