"""What holds in vLLM holds before it as well: the same tests, through ``fedrouter serve --upstream``."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from inspect import signature
from typing import Any

import openai
import pytest
import test_apis
import test_serve

from fedrouter.serve.checks import free_port

# These start a vLLM of their own.
NOT_HERE = {
    "test_a_flag_that_vllm_does_not_know_is_one_clear_line",
    "test_weights_that_are_not_those_of_training_are_one_clear_line",
}

for module in (test_serve, test_apis):
    globals().update(
        {
            name: test
            for name, test in vars(module).items()
            if name.startswith("test_") and name not in NOT_HERE and "server" in signature(test).parameters
        }
    )


@pytest.fixture(scope="module")
def server(server: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The session's server with a proxy before it, in the server's place."""
    keys, port = tmp_path_factory.mktemp("proxy") / "keys.json", free_port()
    hashes = {hashlib.sha256(key.encode()).hexdigest(): client for client, key in server.tenants.items()}
    keys.write_text(json.dumps(hashes))
    arguments = ["serve", str(server.bundle.path), "--port", str(port), "--upstream", server.url]
    arguments += ["--api-key-env", "FEDROUTER_TEST_KEY", "--keys-file", str(keys)]
    process = subprocess.Popen(
        [sys.executable, "-m", "fedrouter", *arguments],
        env={**os.environ, "FEDROUTER_TEST_KEY": server.key, "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        url, ready = f"http://127.0.0.1:{port}", [process.stdout.readline() for _ in range(2)]
        with openai.OpenAI(base_url=f"{url}/v1", api_key=server.key, max_retries=0, timeout=120) as client:
            yield replace(server, url=url, ready=ready, client=client)
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
