"""Flower's server part: sends what ``fedrouter train`` says, and hands it what comes back."""

import logging
import select
import time

from flwr.app import Context, Message
from flwr.serverapp import Grid, ServerApp
from link import connect, receive, send
from messages import KIND, body_of, content

LOOK_S = 0.5  # between looks at who is there
PULL_S = 0.2  # between looks for replies
PATIENCE_S = 120.0  # for a superlink that does not answer
TTL_S = 7 * 24 * 3600.0  # the server's own deadlines end before

LOG = logging.getLogger("flwr")
app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Serve the socket until its other end closes."""
    link = connect(str(context.run_config["socket"]))
    waiting: dict[str, int] = {}  # message → node
    known: list[int] | None = None
    looked = failing = 0.0
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
            if now - looked > LOOK_S:
                looked, found = now, sorted(grid.get_node_ids())
                if found != known:
                    known = found
                    send(link, {"what": "nodes", "nodes": [str(node) for node in found]})
            for reply in grid.pull_messages(list(waiting)) if waiting else ():
                node = waiting.pop(reply.metadata.reply_to_message_id, None)
                if node is not None:
                    error = str(reply.error.reason)[:500] if reply.has_error() else ""
                    head = {"what": "reply", "node": str(node), "error": error}
                    send(link, head, b"" if error else body_of(reply))
            failing = 0.0
        except BrokenPipeError:
            return
        except Exception as error:  # the superlink is slow, or starts again
            failing = failing or time.monotonic()
            LOG.warning("%s: %s; it is asked again", type(error).__name__, error)
            if time.monotonic() - failing > PATIENCE_S:
                raise
            time.sleep(LOOK_S)


def push(grid: Grid, link: object, node: int, body: bytes, waiting: dict[str, int]) -> None:
    """Send one message; say so where that fails, for nobody knows whether it has arrived."""
    reason = "the message could not be sent"
    try:
        (number,) = grid.push_messages([Message(content(body), node, KIND, ttl=TTL_S)])
    except Exception as error:
        LOG.warning("%s: %s; the message is lost", type(error).__name__, error)
        number, reason = None, f"{reason}: {type(error).__name__}"
    if number is None:
        send(link, {"what": "reply", "node": str(node), "error": reason})
    else:
        waiting[number] = node
