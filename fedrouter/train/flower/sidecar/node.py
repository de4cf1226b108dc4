"""Executor of a site's SuperNode: passes each message to the resident client and sends the reply back.

It replaces Flower's own executor, which would start a process for each message and run code that the server
sends with it. Here no code from the server runs.

Usage: python node.py RUNTIME_ADDRESS SECRET_FILE SOCKET
"""

import sys
import time
from pathlib import Path

from flwr.app import Message
from flwr.app.error import Error
from flwr.common.constant import ErrorCode, SubStatus
from flwr.proto.runtime_pb2 import ClaimTaskRequest, PullPendingTasksRequest
from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.retry import make_simple_http_retry_invoker
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message, push_task_output
from link import connect, receive, send
from messages import body_of, content

POLL_S = 0.1
PROTECTED = frozenset({"/flwr.proto.Runtime/PullPendingTasks", "/flwr.proto.Runtime/ClaimTask"})


def client_of(address, *more, component):
    """Return a client of the SuperNode's local runtime."""
    return RuntimeHttpClient.from_server_address(
        server_address=address,
        insecure=True,  # on the loopback interface only
        root_certificates=None,
        interceptors=[RuntimeVersionHttpInterceptor(component_name=component), *more],
        retry_invoker=make_simple_http_retry_invoker(),
    )


def main(address, secret_file, socket):
    """Pass messages on until the process is ended."""
    secret = Path(secret_file).read_bytes()
    auth = SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=PROTECTED)
    runtime = client_of(address, auth, component="SuperExec")
    while True:
        tasks = runtime.PullPendingTasks(PullPendingTasksRequest()).tasks
        token = runtime.ClaimTask(ClaimTaskRequest(task_id=tasks[0].task_id)).token if tasks else ""
        if token:
            handle(client_of(address, RuntimeTokenHttpInterceptor(token), component="flwr-clientapp"), socket)
        else:
            time.sleep(POLL_S)


def handle(task, socket):
    """Answer one message."""
    heartbeat = HeartbeatSender(make_task_heartbeat_fn_http(task))
    heartbeat.start()
    try:
        message, context, _, _ = pull_task_input(task)
        try:
            with connect(socket) as link:
                send(link, {}, body_of(message))
                _, body = receive(link)
            reply = Message(content(body), reply_to=message)
        except (EOFError, OSError) as error:
            reason = f"the resident client does not answer: {error}"
            reply = Message(
                Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason=reason), reply_to=message
            )
        push_message(task, reply, context)
        push_task_output(task, context, SubStatus.COMPLETED, "")
    finally:
        heartbeat.stop()
        task.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
