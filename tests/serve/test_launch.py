"""From a bundle to vLLM's command line, and what is refused before vLLM starts."""

import json
import os
import shutil
import socket
from dataclasses import replace
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import write_word_bundle
from safetensors.numpy import load_file, save_file

from fedrouter.bundle import Bundle
from fedrouter.errors import ConfigError, ModelError, ServingError
from fedrouter.serve import launch
from fedrouter.serve.checks import check_adapter, check_port, free_port
from fedrouter.serve.decision_log import LogOptions
from fedrouter.serve.launch import Options, build_command, prepare
from fedrouter.serve.limits import Limits
from fedrouter.serve.process import Command
from fedrouter.serve.settings import VARIABLE, Settings


def build(bundle: Bundle, **more: Any) -> Command:
    """Build a command from options and arguments of ``build_command``."""
    own = {name: more.pop(name) for name in Options.__slots__ if name in more and name != "second"}
    options = more.pop("options", Options(**own))
    return build_command(bundle, Path("/models/base"), options, **{"rank": bundle.rank} | more)


def value(command: Command, flag: str) -> str:
    return command.argv[command.argv.index(flag) + 1]


def settings(command: Command) -> Settings:
    return Settings.model_validate_json(command.env[VARIABLE])


def modules(command: Command) -> dict[str, str]:
    rest = command.argv[command.argv.index("--lora-modules") + 1 :]
    entries = [
        json.loads(one) for one in rest[: next(i for i, one in enumerate(rest) if one.startswith("--"))]
    ]
    return {entry["name"]: entry["path"] for entry in entries}


def test_command_serves_every_adapter_of_the_bundle(word_bundle: Bundle) -> None:
    command = build(word_bundle)
    assert modules(command) == {name: str(path) for name, path in word_bundle.adapter_paths.items()}
    assert word_bundle.generalist in modules(command)
    assert value(command, "--model") == "/models/base"
    assert command.argv[command.argv.index("--served-model-name") + 1 :][:2] == ["base", "fedrouter"]
    assert (value(command, "--max-loras"), value(command, "--max-cpu-loras")) == ("4", "8")  # two bundles
    assert value(command, "--max-lora-rank") == "8"
    assert value(command, "--middleware") == "fedrouter.serve.middleware.FedRouterMiddleware"
    assert settings(command).bundle == word_bundle.path
    assert settings(command).base == "/models/base"
    assert "--chat-template" not in command.argv


def test_middleware_can_be_loaded_as_vllm_loads_it(word_bundle: Bundle) -> None:
    module, name = value(build(word_bundle), "--middleware").rsplit(".", 1)
    assert isinstance(getattr(__import__(module, fromlist=[name]), name), type)


def test_more_adapters_count_for_the_limits(word_bundle: Bundle, tmp_path: Path) -> None:
    command = build(word_bundle, adapters={"own": tmp_path, "other": tmp_path}, rank=20)
    assert modules(command)["own"] == str(tmp_path)
    assert value(command, "--max-cpu-loras") == "10"
    assert value(command, "--max-lora-rank") == "32"


def test_a_canary_brings_its_adapters_and_a_shadow_none(word_bundle: Bundle, tmp_path: Path) -> None:
    two = write_word_bundle(tmp_path / "two", seeds=(0, 11, 12))
    shadow = build(word_bundle, second=two, options=Options(second=two.path))
    assert modules(shadow).keys() == word_bundle.adapter_paths.keys()
    canary = build(word_bundle, second=two, options=Options(second=two.path, canary=0.1))
    assert modules(canary).keys() == {*word_bundle.adapter_paths, *two.adapter_paths}
    assert len(modules(canary)) == 7, "one adapter is the same in both"
    assert value(canary, "--max-cpu-loras") == "11", "room for a reload"
    for command, share in ((shadow, 0), (canary, 0.1)):
        assert (settings(command).second, settings(command).canary) == (two.path, share)
    assert settings(build(word_bundle)).second is None


def test_console_and_log_reach_vllms_processes(word_bundle: Bundle, tmp_path: Path) -> None:
    log = LogOptions(tmp_path / "log.jsonl", prompts=True, max_mib=2)
    given = settings(build(word_bundle, log=log, console=False))
    assert (given.console, given.log) == (False, log)
    given = settings(build(word_bundle))
    assert (given.console, given.log) == (True, None)


@pytest.mark.parametrize(
    ("rank", "limit"), [(1, 1), (2, 8), (8, 8), (9, 16), (65, 128), (257, 320), (512, 512)]
)
def test_rank_limit_is_the_smallest_that_fits(word_bundle: Bundle, rank: int, limit: int) -> None:
    assert value(build(word_bundle, rank=rank), "--max-lora-rank") == str(limit)


def test_a_rank_beyond_vllm_is_refused(word_bundle: Bundle) -> None:
    with pytest.raises(ServingError, match="rank 513"):
        build(word_bundle, rank=513)


def test_many_adapters_share_the_slots_of_a_batch(word_bundle: Bundle) -> None:
    many = replace(
        word_bundle, clusters=tuple(replace(word_bundle.clusters[0], adapter=f"a{i}") for i in range(40))
    )
    command = build(many)
    assert (value(command, "--max-loras"), value(command, "--max-cpu-loras")) == ("16", "82")


def test_the_embedder_url_reaches_the_server(word_bundle: Bundle) -> None:
    assert settings(build(word_bundle, embedder_url="http://h")).embedder_url == "http://h"
    assert settings(build(word_bundle)).embedder_url is None


def test_a_watched_bundle_must_be_a_link(checked: Any, word_bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(ServingError, match="is not a symbolic link"):
        checked(watch=True)
    link = tmp_path / "current"
    link.symlink_to(word_bundle.path)
    _, command = prepare(link, Options(port=free_port(), watch=True))
    assert settings(command).watch == link
    assert settings(command).bundle_root == tmp_path
    assert settings(command).bundle == word_bundle.path


def test_limits_reach_the_server(word_bundle: Bundle) -> None:
    limits = Limits("reject", max_queue=3)
    assert settings(build(word_bundle, limits=limits)).limits == limits


def test_the_key_is_in_the_environment_only(word_bundle: Bundle) -> None:
    command = build(word_bundle, api_key="sesame")
    assert command.env["VLLM_API_KEY"] == "sesame"
    assert not any("sesame" in argument for argument in command.argv)


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch, word_bundle: Bundle) -> Any:
    """``prepare`` for the word bundle, whose base model and embedder do not exist."""
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    monkeypatch.setattr(util, "find_spec", lambda name: object())
    monkeypatch.setattr(launch, "find_base", lambda *_: Path("/models/base"))
    monkeypatch.setattr(launch, "find_model", lambda *_: None)

    def run(**options: Any) -> Command:
        return prepare(word_bundle.path, Options(port=free_port(), **options))[1]

    return run


def test_a_keys_file_gives_vllm_a_key_of_its_own(
    checked: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = tmp_path / "keys.json"
    keys.write_text(json.dumps({"0" * 64: "ann"}))
    first, second = checked(keys_file=keys), checked(keys_file=keys)
    assert settings(first).keys_file == keys
    assert first.env["VLLM_API_KEY"] not in first.env[VARIABLE]
    assert len(first.env["VLLM_API_KEY"]) >= 32
    assert first.env["VLLM_API_KEY"] != second.env["VLLM_API_KEY"]
    monkeypatch.setenv("OPERATOR", "open")
    assert checked(api_key_env="OPERATOR", keys_file=keys).env["VLLM_API_KEY"] == "open"
    assert "VLLM_API_KEY" not in checked().env
    monkeypatch.setenv("VLLM_API_KEY", "inherited")
    assert checked(keys_file=keys).env["VLLM_API_KEY"] == "inherited"


def test_a_fallback_is_checked_and_passed_on(checked: Any, word_bundle: Bundle) -> None:
    assert settings(checked(fallback="reject")).fallback == "reject"
    assert settings(checked()).fallback is None
    with pytest.raises(ConfigError, match="fallback 'guess'"):
        checked(fallback="guess")


def test_cpu_settings_yield_to_the_user(word_bundle: Bundle) -> None:
    command = build(word_bundle, cpu=True, cores=2, vllm_args=["--dtype", "bfloat16"])
    assert command.argv[-2:] == ["--dtype", "bfloat16"]  # the last flag counts
    assert value(command, "--dtype") == "float32"
    assert command.defaults["OMP_NUM_THREADS"] == "1"
    assert value(command, "--distributed-executor-backend") == "uni"
    # two bundles and the empty slot
    assert value(command, "--max-loras") == value(command, "--max-cpu-loras") == "9"
    big = build(word_bundle, cpu=True, cores=64)
    assert "OMP_NUM_THREADS" not in big.defaults
    assert "uni" not in big.argv
    gpu = build(word_bundle)
    assert "--dtype" not in gpu.argv
    assert "--enforce-eager" not in gpu.argv
    assert command.defaults["TORCHDYNAMO_DISABLE"] == "1"
    for flag in ("--no-enforce-eager", "--no_enforce_eager"):  # vLLM accepts both spellings
        compiled = build(word_bundle, cpu=True, vllm_args=[flag])
        assert "TORCHDYNAMO_DISABLE" not in {**compiled.defaults, **gpu.defaults}


@pytest.mark.parametrize(
    "argument", ["--port=1", "--lora-modules", "--served_model_name", "--model", "--api-key"]
)
def test_reserved_flags_are_refused(word_bundle: Bundle, argument: str) -> None:
    with pytest.raises(ServingError, match=argument):
        build(word_bundle, vllm_args=[argument])


@pytest.mark.parametrize("arguments", [["--api-server-count", "2"], ["--seed=1", "--api_server_count=4"]])
def test_several_api_processes_start_with_vllms_serve_command(
    word_bundle: Bundle, arguments: list[str]
) -> None:
    several = build(word_bundle, vllm_args=arguments, cpu=True, cores=2)
    assert several.argv[2] == "fedrouter.serve.engine"
    assert several.env["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "0"  # vLLM refuses the combination
    assert "VLLM_ENABLE_V1_MULTIPROCESSING" not in several.defaults
    with pytest.raises(ServingError, match="several API processes cannot reload"):
        build(word_bundle, vllm_args=arguments, watch=True)
    one = build(word_bundle, vllm_args=["--api-server-count", "1"], cpu=True, cores=2)
    assert one.argv[2] == "fedrouter.serve.engine"
    assert one.env["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"


def test_the_empty_slot_on_cpu_cannot_be_taken_away(word_bundle: Bundle) -> None:
    with pytest.raises(ServingError, match="--max-loras must be above 4"):
        build(word_bundle, vllm_args=["--max-loras", "4"], cpu=True)
    build(word_bundle, vllm_args=["--max-loras", "5"], cpu=True)
    build(word_bundle, vllm_args=["--max-loras", "4"], cpu=False)


def test_changed_embedder_files_are_found_before_vllm_starts(
    word_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(util, "find_spec", lambda name: object())
    monkeypatch.setattr(launch, "find_base", lambda *_: tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="differ from those used in training"):
        prepare(word_bundle.path, Options(port=free_port()))


def test_bundles_are_loaded_from_where_the_served_one_is(word_bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "current").symlink_to(word_bundle.path)
    command = build(replace(word_bundle, path=tmp_path / "current"))
    assert settings(command).bundle_root == tmp_path
    assert settings(command).bundle == word_bundle.path, "a link that moves must not change what is served"
    assert set(modules(command).values()) == {str(path) for path in word_bundle.adapter_paths.values()}


def test_tls_flags_change_the_address(word_bundle: Bundle) -> None:
    assert build(word_bundle).url == "http://127.0.0.1:8000"
    assert build(word_bundle, vllm_args=["--ssl-certfile", "x.pem"]).url == "https://127.0.0.1:8000"


@pytest.mark.parametrize(
    ("host", "url"), [("0.0.0.0", "http://127.0.0.1:1"), ("::", "http://[::1]:1"), ("box", "http://box:1")]
)
def test_addresses_that_clients_can_use(host: str, url: str) -> None:
    assert Command([], {}, {}, host, 1).url == url


def test_a_port_in_use_is_refused() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ServingError, match=f"127.0.0.1:{port}.*--port"):
            check_port("127.0.0.1", port)
    check_port("127.0.0.1", free_port())


def test_missing_vllm_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(util, "find_spec", lambda name: None)
    with pytest.raises(ServingError, match=r"fedrouter\[serve\].*fedrouter\[serve-cpu\]"):
        prepare(tmp_path, Options())


def test_an_unset_key_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(util, "find_spec", lambda name: object())
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(ServingError, match="NO_SUCH_KEY"):
        prepare(tmp_path, Options(port=free_port(), api_key_env="NO_SUCH_KEY"))


@pytest.fixture
def own(word_bundle: Bundle, tmp_path: Path) -> Path:
    """A copy of one of the bundle's adapters, to be served as an additional one."""
    return Path(shutil.copytree(word_bundle.adapter_path(word_bundle.clusters[0]), tmp_path / "own"))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Weights of a base model with the one module that the adapters change."""
    (tmp_path / "base").mkdir()
    weights = {"model.layers.0.self_attn.q_proj.weight": np.zeros((16, 16), np.float32)}
    save_file(weights, tmp_path / "base" / "model.safetensors")
    return tmp_path / "base"


def fifo(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def leave(file: Path) -> None:
    file.rename(file.parent.with_name("outside"))
    file.symlink_to(file.parent.with_name("outside"))


def damage(config: dict[str, Any] | None = None, tensor: Any = None) -> Any:
    def apply(path: Path) -> None:
        if config:
            file = path / "adapter_config.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | config))
        if tensor is not None:
            file = path / "adapter_model.safetensors"
            tensors = load_file(file)
            name = sorted(tensors)[0]
            save_file(tensors | {name: tensor(tensors[name])}, file)

    return apply


@pytest.mark.parametrize(
    ("apply", "says"),
    [
        (damage({"use_dora": True}), "plain LoRA"),
        (damage({"bias": "all"}), "plain LoRA"),
        (damage({"modules_to_save": ["lm_head"]}), "plain LoRA"),
        (damage({"r": None}), "plain LoRA"),
        (damage({"r": 4}), "rank 4"),
        (damage({"lora_alpha": "16"}), "plain LoRA"),
        (damage(tensor=lambda array: array * np.nan), "not finite"),
        (damage(tensor=lambda array: array.astype(np.int8)), "damaged"),
        (damage(tensor=lambda array: array[:, :8].copy()), "does not fit the base model"),
        (lambda path: (path / "adapter_model.safetensors").write_bytes(b"\x10"), "damaged"),
        (lambda path: (path / "adapter_config.json").unlink(), "no such file"),
        (lambda path: (path / "adapter_config.json").write_text("[]"), "plain LoRA"),
        (lambda path: fifo(path / "adapter_config.json"), "not a regular file"),
        (lambda path: leave(path / "adapter_model.safetensors"), "leads out of"),
    ],
)
def test_an_adapter_that_would_harm_is_refused(
    word_bundle: Bundle, own: Path, base: Path, apply: Any, says: str
) -> None:
    assert check_adapter("own", own, word_bundle, base) == word_bundle.rank
    apply(own)
    with pytest.raises(ServingError, match=f"adapter own: .*{says}") as caught:
        check_adapter("own", own, word_bundle, base)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_an_adapter_in_half_precision_is_served(
    word_bundle: Bundle, own: Path, base: Path, dtype: str
) -> None:
    import torch
    from safetensors.torch import save_file as save_torch

    file = own / "adapter_model.safetensors"
    kind = getattr(torch, dtype)
    save_torch({name: torch.from_numpy(array).to(kind) for name, array in load_file(file).items()}, file)
    assert check_adapter("own", own, word_bundle, base) == word_bundle.rank


def test_an_adapter_of_another_base_is_refused_by_name(word_bundle: Bundle, own: Path, base: Path) -> None:
    file = own / "adapter_model.safetensors"
    save_file({name.replace("layers.0", "layers.7"): array for name, array in load_file(file).items()}, file)
    with pytest.raises(
        ServingError, match=r"adapter own: .*has no module model\.layers\.7\.self_attn\.q_proj"
    ):
        check_adapter("own", own, word_bundle, base)


def test_an_adapters_name_must_be_free(word_bundle: Bundle) -> None:
    path = word_bundle.adapter_path(word_bundle.clusters[0])
    assert word_bundle.generalist is not None
    for name in ("base", "fedrouter", "reject", word_bundle.generalist, word_bundle.clusters[0].adapter):
        with pytest.raises(ServingError, match="taken"):
            check_adapter(name, path, word_bundle, path)
