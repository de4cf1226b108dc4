"""Flower's client part: refuses. A site's messages go to its resident client (node.py); no app runs there."""

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

app = ClientApp()


@app.query("fedrouter")
def refuse(_message: Message, _context: Context) -> Message:
    """Say that this site was not started by ``fedrouter client run``."""
    raise RuntimeError("start this site with fedrouter client run")
