"""Bytes in Flower's messages and out of them."""

from flwr.app import Array, ArrayRecord, Message, RecordDict

NAME = "body"
KIND = "query.fedrouter"


def content(body: bytes) -> RecordDict:
    """Return a record that holds bytes as they are; Flower cuts large ones into chunks."""
    array = Array(dtype="uint8", shape=(len(body),), stype="fedrouter", data=body)
    return RecordDict({NAME: ArrayRecord({NAME: array})})


def body_of(message: Message) -> bytes:
    """Return the bytes that a message holds."""
    return message.content.array_records[NAME][NAME].data
