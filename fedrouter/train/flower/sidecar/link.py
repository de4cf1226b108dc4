"""Frames on a Unix socket between the two environments: a JSON head followed by a body of bytes."""

import json
import socket
import struct

MAX_HEAD = 1 << 20
MAX_BODY = 1 << 31
HEAD = struct.Struct(">IQ")


def send(link: socket.socket, head: dict, body: bytes = b"") -> None:
    """Send one frame."""
    text = json.dumps(head).encode()
    link.sendall(HEAD.pack(len(text), len(body)) + text)
    link.sendall(body)


def receive(link: socket.socket) -> tuple[dict, bytes]:
    """Return the next frame.

    Raises
    ------
    EOFError
        If the connection is closed, or the frame is too large.
    """
    head, body = HEAD.unpack(_exactly(link, HEAD.size))
    if head > MAX_HEAD or body > MAX_BODY:
        raise EOFError("the frame is too large")
    return json.loads(_exactly(link, head)), _exactly(link, body)


def connect(path: str) -> socket.socket:
    """Return a connection to a Unix socket."""
    link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    link.connect(path)
    return link


def _exactly(link: socket.socket, size: int) -> bytes:
    found = bytearray()
    while len(found) < size:
        part = link.recv(min(size - len(found), 1 << 20))
        if not part:
            raise EOFError("the connection is closed")
        found += part
    return bytes(found)
