"""The few private names of Flower that our own runtimes need, in one place.

Flower 1.41 has no public way to run its apps without its own engine. Everything else in
this project uses public names only.
"""

from flwr.app import Message
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.supercore.task_identity import TaskIdentity

RUN_ID = 1
SERVER_NODE_ID = 1


def set_identity() -> None:
    """Lets this process create messages."""
    TaskIdentity.task_id = 1
    TaskIdentity.run_id = RUN_ID
    TaskIdentity.node_id = SERVER_NODE_ID


def set_message_id(message: Message, message_id: str) -> None:
    """Names a message, as a SuperLink would; replies refer to the name."""
    message.metadata.__dict__["_message_id"] = message_id


def to_bytes(message: Message) -> bytes:
    """Serialises a message."""
    data: bytes = message_to_proto(message).SerializeToString()
    return data


def from_bytes(data: bytes) -> Message:
    """Reads :func:`to_bytes`."""
    proto = ProtoMessage()
    proto.ParseFromString(data)
    return message_from_proto(proto)
