"""Settings reach the hook through its environment, complete and validated."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from fedrouter.errors import ServingError
from fedrouter.serve.decision_log import LogOptions
from fedrouter.serve.limits import Limits
from fedrouter.serve.settings import VARIABLE, Settings, read_settings


def test_every_setting_arrives_as_it_was_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    every = Settings(
        bundle=tmp_path / "bündle",
        bundle_root=tmp_path,
        base="org/base",
        embedder_url="http://h",
        fallback="reject",
        signed_by=tmp_path / "key",
        limits=Limits("reject", 7, float("inf"), 2.0),
        keys_file=tmp_path / "keys.json",
        log=LogOptions(tmp_path / "log.jsonl", prompts=True, max_mib=2),
        watch=tmp_path / "current",
        second=tmp_path / "two",
        canary=0.1,
        console=False,
    )
    assert every.model_fields_set == set(Settings.model_fields)
    for settings in (every, Settings(bundle=tmp_path)):
        monkeypatch.setenv(VARIABLE, settings.to_env()[VARIABLE])
        assert read_settings() == settings


def test_each_of_several_api_processes_has_a_log_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = LogOptions(tmp_path / "log.jsonl", vectors=True)
    monkeypatch.setenv(VARIABLE, Settings(bundle=tmp_path, log=log).to_env()[VARIABLE])
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    assert read_settings().log == replace(log, path=tmp_path / f"log.{os.getpid()}.jsonl")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "Invalid JSON"),
        ("{}", "bundle"),
        ('{"bundle": 3}', "bundle"),
        ('{"bundle": "b", "console": 1}', "console"),
        ('{"bundle": "b", "fallbck": "base"}', "fallbck"),
        ('{"bundle": "b", "limits": {"max_quue": 1}}', "max_quue"),
        ('{"bundle": "b", "limits": {"max_queue": 0}}', "max_queue"),
        ('{"bundle": "b", "log": {"path": "log", "max_mib": -1}}', "decision-log-mib"),
    ],
)
def test_invalid_settings_are_refused_by_name(monkeypatch: pytest.MonkeyPatch, text: str, says: str) -> None:
    monkeypatch.setenv(VARIABLE, text)
    with pytest.raises(ServingError, match=says):
        read_settings()


def test_missing_settings_say_how_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(ServingError, match=r"FEDROUTER_SETTINGS is not set.*fedrouter serve"):
        read_settings()
