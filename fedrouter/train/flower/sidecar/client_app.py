"""Flower's client app, which only refuses: a site's messages go to its resident client (node.py) instead."""

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

app = ClientApp()


@app.query("fedrouter")
def refuse(_message: Message, _context: Context) -> Message:
    """Fail, because this site was not started by ``fedrouter client run``."""
    raise RuntimeError("start this site with fedrouter client run")
