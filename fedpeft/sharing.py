"""What travels of the trainable state, and what a client keeps to itself.

``[peft] share`` names what travels. The rest is a client's *local part*: it starts from
the same seeded values everywhere, is trained together with what travels, and goes on
from round to round at its client alone: a head of its own, LoRA's B (FedSA-LoRA), a
set of scales and shifts.

**Guarantees**: the local part never leaves its client, but what leaves depends on it,
since the next update is trained with it. So it is exempt from nothing:

* unit ``example`` or ``person``: every local step clips and noises one vector, the
  gradients of what travels and of the local part together. The local part is itself a
  release of the mechanism that the ledger charges; whatever is trained with it later
  depends on the records through that release, which is paid for, and through new ones.
* unit ``client``: the local part is not noised. A client's update, however its local
  part shaped it, is clipped as a whole at the server: it moves a round's sum by the
  clipping norm at most. What remains to be shown is that the *others'* updates depend
  on the client through released models alone. Their local parts depend on those, on
  their own records and on the rounds in which they took part. In a public rotation
  these rounds are known; in Poisson cohorts everybody is drawn independently, so that
  they may be taken as known, and the client's own draw of a round is independent of all
  that came before. Correlated noise and the adaptive norm rest on the same. In a cohort
  of a fixed size, that others were drawn tells that the client was not, and their local
  parts would carry this to later rounds: amplification is proved there for clients
  without memory, so the configuration refuses it.
* nothing is fitted after the last release.

Source: Guo et al. (2025), Selective Aggregation for Low-Rank Adaptation in Federated
Learning (FedSA-LoRA), ICLR, https://arxiv.org/abs/2410.01463; Arivazhagan et al.
(2019), Federated Learning with Personalization Layers, arXiv:1912.00818.
"""

from collections.abc import Sequence

from fedpeft.errors import ConfigError
from fedpeft.tensors import Tensors


def split_state(
    trainable: Tensors, share: Sequence[str] | None
) -> tuple[Tensors, Tensors]:
    """Returns what travels and what stays, each in the order of `trainable`.

    A fragment is one or more whole parts of a name, between its dots: ``layer.1`` is
    not in ``layer.10.bias``.

    Args:
        trainable: every trainable tensor.
        share: fragments of the names that travel; None lets all travel.

    Raises:
        ConfigError: if a fragment is in no name; says which parts there are.

    Example:
        >>> from torch import zeros
        >>> state = {"query.lora_A": zeros(1), "query.lora_B": zeros(1)}
        >>> state["head.bias"] = zeros(1)
        >>> shared, local = split_state(state, ["lora_A", "head"])
        >>> list(shared), list(local)
        (['query.lora_A', 'head.bias'], ['query.lora_B'])
    """
    if share is None:
        return dict(trainable), {}
    for fragment in share:
        if not any(_holds(name, fragment) for name in trainable):
            raise ConfigError(
                "[peft] share: expected parts of the names of trainable tensors, got "
                f"{fragment!r} (there are: {', '.join(_parts(trainable))})."
            )
    travels = {name for name in trainable if any(_holds(name, f) for f in share)}
    shared = {name: t for name, t in trainable.items() if name in travels}
    return shared, {name: t for name, t in trainable.items() if name not in travels}


def _holds(name: str, fragment: str) -> bool:
    return f".{fragment}." in f".{name}."


def _parts(trainable: Tensors) -> list[str]:
    """Returns the parts of the names once each, in order; no numbers."""
    parts = (part for name in trainable for part in name.split("."))
    return [part for part in dict.fromkeys(parts) if not part.isdigit()]
