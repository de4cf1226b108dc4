"""Pack bytes into Flower's messages and unpack them."""

from flwr.app import Array, ArrayRecord, Message, RecordDict

NAME = "body"
KIND = "query.fedrouter"


def content(body: bytes) -> RecordDict:
    """Return a record that holds the bytes; Flower splits large ones into chunks."""
    array = Array(dtype="uint8", shape=(len(body),), stype="fedrouter", data=body)
    return RecordDict({NAME: ArrayRecord({NAME: array})})


def body_of(message: Message) -> bytes:
    """Return the bytes in a message."""
    return message.content.array_records[NAME][NAME].data
