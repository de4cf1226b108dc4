"""Flower's SuperNode, but polling every second: its default of three seconds would dominate an exchange.

Usage: python supernode.py OPTIONS, where OPTIONS are those of flower-supernode.
"""

import time
from types import SimpleNamespace

from flwr.supernode import start_client_internal
from flwr.supernode.cli import flower_supernode

POLL_S = 1.0

# The interval is not configurable, so replace ``time`` in the module of the polling loop only.
start_client_internal.time = SimpleNamespace(sleep=lambda seconds: time.sleep(min(seconds, POLL_S)))

if __name__ == "__main__":
    flower_supernode()
