"""The superlink's list of nodes: shown, and made to hold the wanted keys and no others.

Usage: python roster.py CONNECTION < WANTED, a JSON map from public key to name, or null to look only.
Prints a JSON list: key, id, status and times of each node.
"""

import json
import sys

from cryptography.hazmat.primitives import serialization
from flwr.cli.flower_config import read_superlink_connection
from flwr.cli.utils import init_http_client_from_connection
from flwr.proto.control_pb2 import ListNodesRequest, RegisterNodeRequest, UnregisterNodeRequest
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, public_key_to_bytes


def line_of(key):
    """Return a public key as one line of OpenSSH's."""
    form = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    return bytes_to_public_key(key).public_bytes(*form).decode()


def listed(control):
    """Return the nodes by public key."""
    nodes = control.ListNodes(request=ListNodesRequest()).nodes_info
    return {line_of(node.public_key): node for node in nodes if node.status != "unregistered"}


def main(connection, wanted):
    """Make the list hold what is wanted; print it."""
    control = init_http_client_from_connection(read_superlink_connection(connection))
    there = listed(control)
    if wanted is not None:
        for key, node in there.items():
            if key not in wanted:
                control.UnregisterNode(request=UnregisterNodeRequest(node_id=node.node_id))
        for key, name in wanted.items():
            if key not in there:
                public = serialization.load_ssh_public_key(key.encode())
                asked = RegisterNodeRequest(public_key=public_key_to_bytes(public), name=name)
                control.RegisterNode(request=asked)
        there = listed(control)
    control.close()
    print(  # noqa: T201 - for the process that has started this one
        json.dumps(
            [
                {
                    "key": key,
                    "id": str(node.node_id),
                    "status": node.status,
                    "online": node.last_activated_at,
                    "offline": node.last_deactivated_at,
                }
                for key, node in there.items()
            ]
        )
    )


if __name__ == "__main__":
    main(sys.argv[1], json.load(sys.stdin))
