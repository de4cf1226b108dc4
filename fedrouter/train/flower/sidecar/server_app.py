"""Flower's server part: sends what ``fedrouter train`` says, and hands it what comes back."""

import select
import time

from flwr.app import Context, Message
from flwr.serverapp import Grid, ServerApp
from link import connect, receive, send
from messages import KIND, body_of, content

LOOK_S = 0.5  # between looks at who is there
PULL_S = 0.1  # between looks for replies
TTL_S = 7 * 24 * 3600.0  # the server's own deadlines end before

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Serve the socket until its other end closes."""
    link = connect(str(context.run_config["socket"]))
    waiting: dict[str, int] = {}  # message → node
    known: list[int] | None = None
    looked = 0.0
    while True:
        readable, _, _ = select.select([link], [], [], PULL_S)
        if readable:
            try:
                head, body = receive(link)
            except (EOFError, OSError):
                return
            node = int(head["node"])
            message = Message(content(body), node, KIND, ttl=TTL_S)
            (number,) = grid.push_messages([message])
            if number is None:
                send(link, {"what": "reply", "node": str(node), "error": "the message could not be sent"})
            else:
                waiting[number] = node
        now = time.monotonic()
        if now - looked > LOOK_S:
            looked = now
            found = sorted(grid.get_node_ids())
            if found != known:
                known = found
                send(link, {"what": "nodes", "nodes": [str(node) for node in found]})
        if waiting:
            for reply in grid.pull_messages(list(waiting)):
                node = waiting.pop(reply.metadata.reply_to_message_id, None)
                if node is None:
                    continue
                if reply.has_error():
                    error = {"what": "reply", "node": str(node), "error": str(reply.error.reason)[:500]}
                    send(link, error)
                else:
                    send(link, {"what": "reply", "node": str(node), "error": ""}, body_of(reply))
