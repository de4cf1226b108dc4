"""The federation commands that do not need Flower: directories, keys, what a site reveals."""

import json
import stat
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from cryptography import x509

from fedrouter.config_file import load_config
from fedrouter.errors import ConfigError
from fedrouter.train.client.site import load_site
from fedrouter.train.flower.certificates import MARK
from fedrouter.train.flower.federation import load_directory, make_directory
from fedrouter.train.wire.keys import load_private, public_text


def fedrouter(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fedrouter", *arguments], cwd=cwd, capture_output=True, text=True, check=False
    )


@pytest.fixture
def made(tmp_path: Path) -> Path:
    rows = [{"prompt": f"What is {i}?", "completion": "x", "task": "a"} for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = fedrouter("client", "init", "ulm", "--data", "../rows.jsonl", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith('ulm = "ecdsa-sha2-nistp384 ')
    return tmp_path


def test_a_site_keeps_its_key_to_itself_and_is_made_once(made: Path) -> None:
    key = made / "ulm" / "site.key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert (made / "ulm" / "site.pub").read_text().strip() == public_text(load_private(key).public_key())
    before = key.read_bytes()
    again = fedrouter("client", "init", "ulm", cwd=made)
    assert (again.returncode, again.stderr) == (
        1,
        "error: ulm already belongs to a site; choose another directory\n",
    )
    assert key.read_bytes() == before


@pytest.mark.parametrize("name", ["st. mary's", "köln", "a-1_b"])
def test_the_line_for_the_operator_is_toml_whatever_the_name(tmp_path: Path, name: str) -> None:
    done = fedrouter("client", "init", name, "--dir", "site", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert list(tomllib.loads(done.stdout.splitlines()[-1])) == [name]


def test_with_a_federation_processes_are_refused(tmp_path: Path) -> None:
    done = fedrouter("train", "--federation", "fed", "--processes", "2", cwd=tmp_path)
    assert done.returncode == 1
    assert "error: --processes: the sites train" in done.stderr


def test_check_says_what_would_be_revealed_and_quotes_no_row(made: Path) -> None:
    done = fedrouter("client", "check", "ulm", cwd=made)
    assert done.returncode == 0, done.stderr
    assert "ulm: 20 rows" in done.stdout
    assert "task labels of 5 rows or more, by name: a" in done.stdout
    assert "What is" not in done.stdout
    assert not (made / "ulm" / "audit.jsonl").exists(), "nothing was sent"
    file = made / "ulm" / "site.toml"
    file.write_text(file.read_text().replace("labels = true", "labels = false"))
    assert "no labels" in fedrouter("client", "check", "ulm", cwd=made).stdout


def test_a_setting_that_is_none_is_named(made: Path) -> None:
    file = made / "ulm" / "site.toml"
    file.write_text(file.read_text().replace("max_rank", "max_rang"))
    with pytest.raises(ConfigError, match=r"unknown key policy\.max_rang; did you mean max_rank\?"):
        load_site(made / "ulm")


def test_the_federation_s_certificates_are_marked_as_a_trial(tmp_path: Path) -> None:
    directory = make_directory(tmp_path / "fed", "server.example.org", 9092, 9093)
    authority, server = (
        x509.load_pem_x509_certificate((tmp_path / "fed" / name).read_bytes())
        for name in ("ca.crt", "server.crt")
    )
    assert MARK in authority.subject.rfc4514_string().replace("\\", "")
    server.verify_directly_issued_by(authority)
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert "server.example.org" in names.get_values_for_type(x509.DNSName)
    assert stat.S_IMODE((tmp_path / "fed" / "server.key").stat().st_mode) == 0o600
    with pytest.raises(ConfigError, match="no clients"):
        directory.roster()
    with pytest.raises(ConfigError, match="holds a federation already"):
        make_directory(tmp_path / "fed", "x", 1, 2)


@pytest.mark.parametrize(
    ("host", "listen"),
    [
        ("server.example.org", "0.0.0.0:9092"),
        ("127.0.0.1", "127.0.0.1:9092"),
        ("127.1.2.3", "127.1.2.3:9092"),
        ("localhost", "localhost:9092"),
        ("::1", "[::1]:9092"),
    ],
)
def test_a_public_name_need_not_be_an_address_of_this_machine(tmp_path: Path, host: str, listen: str) -> None:
    command = make_directory(tmp_path / "fed", host, 9092, 9093).superlink()
    assert command[command.index("--fleet-api-address") + 1] == listen


@pytest.mark.parametrize(
    ("host", "ports", "reason"),
    [
        (
            "https://server.example.org",
            (9092, 9093),
            "'https://server.example.org': expected a host name",
        ),
        ("server.example.org:9092", (9092, 9093), "without https:// and port"),
        ("müller.example", (9092, 9093), "as xn--"),
        ("", (9092, 9093), "expected a host name"),
        ('a b"c', (9092, 9093), "expected a host name"),
        ("a" * 300, (9092, 9093), "expected a host name"),
        ("localhost", (9092, 9092), "both 9092; choose two ports"),
        ("localhost", (9092, 99999999), "control_port: .*65535"),
    ],
)
def test_a_federation_that_nobody_can_reach_is_refused_before_anything_is_made(
    tmp_path: Path, host: str, ports: tuple[int, int], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        make_directory(tmp_path / "fed", host, *ports)
    assert not (tmp_path / "fed").exists()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=f"{tmp_path / 'file'}"):
        make_directory(tmp_path / "file", "localhost", 9092, 9093)


def test_what_a_federation_lacks_is_named(made: Path) -> None:
    directory = make_directory(made / "fed", "localhost", 9092, 9093)
    key = (made / "ulm" / "site.pub").read_text().strip()
    with (made / "fed" / "federation.toml").open("a") as file:
        file.write(f'ulm = "{key}"\nzwilling = "{key}"\n')
    with pytest.raises(ConfigError, match="clients ulm and zwilling have the same key"):
        load_directory(directory.path).roster()
    (made / "fed" / "ca.crt").unlink()
    with pytest.raises(ConfigError, match=r"ca.crt is missing; restore it"):
        load_directory(directory.path)


def test_the_roster_names_the_key_that_is_none(made: Path) -> None:
    make_directory(made / "fed", "127.0.0.1", 9092, 9093)
    file = made / "fed" / "federation.toml"
    text = file.read_text()
    file.write_text(text + f'ulm = "{(made / "ulm" / "site.pub").read_text().strip()}"\n')
    assert list(load_directory(made / "fed").roster()) == ["ulm"]
    file.write_text(text + 'bern = "ssh-rsa nothing"\n')
    with pytest.raises(ConfigError, match="client bern: no public key"):
        load_directory(made / "fed").roster()


def test_with_a_federation_the_file_says_nothing_of_data(tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_text("[train]\nrounds = 3\n")
    config = load_config(tmp_path / "plan.toml", ["cluster.every=2"], clients=["ulm", "bern"])
    assert sorted(config.data.clients) == ["bern", "ulm"]
    assert config.train.rounds == 3
    (tmp_path / "plan.toml").write_text('[data]\nsource = "x.jsonl"\n')
    with pytest.raises(ConfigError, match=r"--federation the sites configure their data; remove \[data\]"):
        load_config(tmp_path / "plan.toml", clients=["ulm"])
