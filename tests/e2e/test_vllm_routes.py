"""What the hook knows against what vLLM has: no route that computes may slip by."""

import json
import subprocess
import sys

from fedrouter.serve.paths import ADMIN, AS_BASE, ROUTED, UNROUTED, is_own

ROUTES = """
import json
from vllm.entrypoints.launchers.api_server import routers
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.tasks import POOLING_TASKS
from vllm.utils.argparse_utils import FlexibleArgumentParser

args = make_arg_parser(FlexibleArgumentParser()).parse_args([])
app = build_app(args, ("generate", "render", "transcription", "realtime", *POOLING_TASKS))

def walk(routes, prefix=""):
    for route in routes:
        path = prefix + getattr(route, "path", "")
        if getattr(route, "methods", None):
            yield [path, sorted(route.methods)]
        yield from walk(getattr(route, "routes", None) or [], path)

print("ROUTES", json.dumps([*walk(app.routes)]))
"""
# Take no model to compute with, or are of servers that a bundle's is not: they take sound, not text.
LEFT_ALONE = {
    "/v1/responses/{response_id}/cancel",
    "/inference/v1/abort_requests",
    "/ping",
    "/scale_elastic_ep",
    "/is_scaling_elastic_ep",
    "/v1/audio/transcriptions",
    "/v1/audio/translations",
}
# Of servers of pooling models, which the application here is not built for.
POOLED = {"/classify", "/pooling", "/score", "/v1/score", "/rerank", "/v1/rerank", "/v2/rerank"}
POOLED |= {"/v1/embeddings", "/v2/embed"}


def test_every_route_of_vllm_is_known() -> None:
    done = subprocess.run([sys.executable, "-c", ROUTES], capture_output=True, text=True, timeout=500)
    lines = [line for line in done.stdout.splitlines() if line.startswith("ROUTES ")]
    assert lines, done.stderr[-3000:]
    routes = {path: set(methods) for path, methods in json.loads(lines[0].removeprefix("ROUTES "))}
    posts = {path for path, methods in routes.items() if methods - {"GET", "HEAD", "OPTIONS"}}
    known = {*ROUTED, *AS_BASE, *UNROUTED}
    unknown = {path for path in posts - known - LEFT_ALONE if not ADMIN.search(path)}
    assert not unknown, "decide in serve/paths.py what model fedrouter, and no model, mean there"
    assert not {path for path in routes if is_own(path)}, "vLLM has what is ours"
    assert set(ROUTED) <= posts
    assert not set(UNROUTED) - posts - POOLED - {"/cohere/v2/chat"}, "vLLM has it no longer"
