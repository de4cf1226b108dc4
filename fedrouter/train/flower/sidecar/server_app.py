"""Flower's server app: sends messages from ``fedrouter train`` to nodes and passes the replies back."""

import logging
import select
import time

from flwr.app import Context, Message
from flwr.serverapp import Grid, ServerApp
from link import connect, receive, send
from messages import KIND, body_of, content

NODES_S = 0.5  # between checks of which nodes are connected
PULL_S = 0.2  # between checks for replies
PATIENCE_S = 120.0  # for a superlink that does not answer
TTL_S = 7 * 24 * 3600.0  # longer than any timeout of the server

LOG = logging.getLogger("flwr")
app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Serve the socket until its other end closes."""
    link = connect(str(context.run_config["socket"]))
    waiting: dict[str, int] = {}  # message id → node
    known: list[int] | None = None
    last_check = failing_since = 0.0
    while True:
        readable, _, _ = select.select([link], [], [], PULL_S)
        if readable:
            try:
                head, body = receive(link)
            except (EOFError, OSError):
                return
            push(grid, link, int(head["node"]), body, waiting)
        try:
            now = time.monotonic()
            if now - last_check > NODES_S:
                last_check, found = now, sorted(grid.get_node_ids())
                if found != known:
                    known = found
                    send(link, {"what": "nodes", "nodes": [str(node) for node in found]})
            for reply in grid.pull_messages(list(waiting)) if waiting else ():
                node = waiting.pop(reply.metadata.reply_to_message_id, None)
                if node is not None:
                    error = str(reply.error.reason)[:500] if reply.has_error() else ""
                    head = {"what": "reply", "node": str(node), "error": error}
                    send(link, head, b"" if error else body_of(reply))
            failing_since = 0.0
        except BrokenPipeError:
            return
        except Exception as error:  # the superlink may be slow or restarting
            failing_since = failing_since or time.monotonic()
            LOG.warning("%s: %s; trying again", type(error).__name__, error)
            if time.monotonic() - failing_since > PATIENCE_S:
                raise
            time.sleep(NODES_S)


def push(grid: Grid, link: object, node: int, body: bytes, waiting: dict[str, int]) -> None:
    """Send one message; if that fails, reply with an error at once: no reply to it may ever arrive."""
    reason = "the message could not be sent"
    try:
        (message_id,) = grid.push_messages([Message(content(body), node, KIND, ttl=TTL_S)])
    except Exception as error:
        LOG.warning("%s: %s; the message is lost", type(error).__name__, error)
        message_id, reason = None, f"{reason}: {type(error).__name__}"
    if message_id is None:
        send(link, {"what": "reply", "node": str(node), "error": reason})
    else:
        waiting[message_id] = node
