"""Print the superlink's list of nodes, after registering the wanted keys and unregistering all others.

Usage: python roster.py CONNECTION < WANTED, a JSON map from public key to name, or null to change nothing.
Prints a JSON list with key, id, status and times of each node.
"""

import json
import sys

from cryptography.hazmat.primitives import serialization
from flwr.cli.flower_config import read_superlink_connection
from flwr.cli.utils import init_http_client_from_connection
from flwr.proto.control_pb2 import ListNodesRequest, RegisterNodeRequest, UnregisterNodeRequest
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, public_key_to_bytes


def line_of(key):
    """Return a public key as one line in OpenSSH's format."""
    form = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    return bytes_to_public_key(key).public_bytes(*form).decode()


def listed(control):
    """Return the nodes by public key."""
    nodes = control.ListNodes(request=ListNodesRequest()).nodes_info
    return {line_of(node.public_key): node for node in nodes if node.status != "unregistered"}


def main(connection, wanted):
    """Update the list of nodes to ``wanted`` (unless None) and print it."""
    control = init_http_client_from_connection(read_superlink_connection(connection))
    nodes = listed(control)
    if wanted is not None:
        for key, node in nodes.items():
            if key not in wanted:
                control.UnregisterNode(request=UnregisterNodeRequest(node_id=node.node_id))
        for key, name in wanted.items():
            if key not in nodes:
                public = serialization.load_ssh_public_key(key.encode())
                request = RegisterNodeRequest(public_key=public_key_to_bytes(public), name=name)
                control.RegisterNode(request=request)
        nodes = listed(control)
    control.close()
    print(  # noqa: T201 - the parent process reads it
        json.dumps(
            [
                {
                    "key": key,
                    "id": str(node.node_id),
                    "status": node.status,
                    "online": node.last_activated_at,
                    "offline": node.last_deactivated_at,
                }
                for key, node in nodes.items()
            ]
        )
    )


if __name__ == "__main__":
    main(sys.argv[1], json.load(sys.stdin))
