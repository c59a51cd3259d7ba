"""The few private names of Flower that our own runtimes need, in one place.

Flower 1.41 has no public way to run its apps without its own engine. Everything else in
this project uses public names only.
"""

from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.common.serde import (
    message_from_proto,
    message_to_proto,
    recorddict_to_proto,
)
from flwr.common.serde_utils import metadata_to_proto
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
    """Serialises a message, as Flower does.

    Flower copies an array's bytes at each of six levels of nesting; here they are put
    in when the rest stands.
    """
    if not message.has_content():
        data: bytes = message_to_proto(message).SerializeToString()
        return data
    content, hollow = message.content, RecordDict()
    for name, record in content.items():
        hollow[name] = _hollow(record) if isinstance(record, ArrayRecord) else record
    proto = ProtoMessage(metadata=metadata_to_proto(message.metadata))
    proto.content.CopyFrom(recorddict_to_proto(hollow))
    for item in proto.content.items:
        for entry in item.array_record.items:
            entry.value.data = content.array_records[item.key][entry.key].data
    data = proto.SerializeToString()
    return data


def _hollow(record: ArrayRecord) -> ArrayRecord:
    """Returns the arrays' descriptions without their bytes."""
    return ArrayRecord(
        {
            name: Array(dtype=a.dtype, shape=a.shape, stype=a.stype, data=b"")
            for name, a in record.items()
        }
    )


def from_bytes(data: bytes | bytearray) -> Message:
    """Reads :func:`to_bytes`."""
    proto = ProtoMessage()
    proto.ParseFromString(data)
    return message_from_proto(proto)
