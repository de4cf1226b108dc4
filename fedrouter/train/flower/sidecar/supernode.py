"""Flower's SuperNode, asking for messages every second: it would sleep three, most of what an exchange costs.

Usage: python supernode.py OPTIONS, those of flower-supernode.
"""

import time
from types import SimpleNamespace

from flwr.supernode import start_client_internal
from flwr.supernode.cli import flower_supernode

POLL_S = 1.0

# The loop that asks has no setting for it; it reads ``time.sleep`` from its own module alone.
start_client_internal.time = SimpleNamespace(sleep=lambda seconds: time.sleep(min(seconds, POLL_S)))

if __name__ == "__main__":
    flower_supernode()
