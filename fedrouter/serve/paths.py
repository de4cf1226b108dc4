"""Every path that the hook knows: routed, answered as by the base, its own, or closed.

``tests/e2e/test_vllm_routes.py`` compares them with vLLM's routes, so that no new route goes unnoticed.
"""

import re

VIRTUAL_NAME = "fedrouter"  # the model name that requests routing
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
ROUTED = (CHAT, COMPLETIONS, RESPONSES, MESSAGES)
# No adapter changes what these compute: the virtual model means the base here.
AS_BASE = (
    "/tokenize",
    "/detokenize",
    f"{MESSAGES}/count_tokens",
    *(f"{path}/render" for path in ROUTED),
    f"{CHAT}/derender",
    f"{COMPLETIONS}/derender",
)
INVOCATIONS = "/invocations"  # takes the adapter from a header, not from the body
ADAPTER_HEADER = "x-amzn-sagemaker-adapter-identifier"
EMBEDDINGS = "/v1/embeddings"
# These compute with a model but are not routed: a request must name an adapter or the base.
UNROUTED = (
    f"{CHAT}/batch",
    "/inference/v1/generate",
    "/cohere/v2/chat",
    "/v1/systemone",
    "/generative_scoring",
    INVOCATIONS,
    *("/pooling", "/classify", "/score", "/v1/score", "/rerank", "/v1/rerank", "/v2/rerank"),
    *(EMBEDDINGS, "/v2/embed"),
)

MODELS, METRICS, HEALTH = "/v1/models", "/metrics", "/health"
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
CONSOLE = "/fedrouter/"
OWN = "/v1/fedrouter"
CLUSTERS, DRY_RUN = f"{OWN}/clusters", f"{OWN}/route"
READY, RELOAD = f"{OWN}/ready", f"{OWN}/reload"
FEEDBACK, DECISIONS = f"{OWN}/feedback", f"{OWN}/decisions"
NUMBERS, BUNDLES = f"{OWN}/numbers", f"{OWN}/bundles"
OWN_METHODS = {CLUSTERS: "GET", DRY_RUN: "POST", READY: "GET", RELOAD: "POST"}
OWN_METHODS |= {FEEDBACK: "POST", DECISIONS: "GET", NUMBERS: "GET", BUNDLES: "GET"}
# All other paths need the API key, if there is one: vLLM itself guards /v1, /v2, /inference and /cohere only.
OPEN = (HEALTH, "/ping", METRICS, "/version", READY)
FOR_TENANTS = (*ROUTED, *AS_BASE, MODELS, CLUSTERS, DRY_RUN, FEEDBACK, DECISIONS)
ADMIN = re.compile(r"load_lora_adapter|(^|/)adapters(/|$)")  # the second: SageMaker's names


def is_admin(path: str) -> bool:
    """Return whether a path is one of vLLM's endpoints for adapters, which are closed to clients."""
    return ADMIN.search(path) is not None


def is_own(path: str) -> bool:
    """Return whether a path is one of the hook's own, or below it."""
    return path == OWN or path.startswith(f"{OWN}/")
