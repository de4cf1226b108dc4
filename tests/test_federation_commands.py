"""The federation commands that do not need Flower: directories, keys, what a site reveals."""

import json
import re
import stat
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from cryptography import x509

from fedrouter.config_file import load_config
from fedrouter.errors import ConfigError, DataError
from fedrouter.train.client.site import Site, load_site
from fedrouter.train.client.site_files import make_site, preview
from fedrouter.train.flower.certificates import MARK
from fedrouter.train.flower.federation import load_directory, make_directory
from fedrouter.train.wire.keys import load_private, new_key, public_text

SUM = {"SumKey", "SumSealed", "Masked", "SumOpened"}


def fedrouter(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fedrouter", *arguments], cwd=cwd, capture_output=True, text=True, check=False
    )


@pytest.fixture
def made(tmp_path: Path) -> Path:
    rows = [{"prompt": f"What is {i}?", "completion": "x", "task": "a"} for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    make_site(tmp_path / "ulm", "ulm", "../rows.jsonl", "127.0.0.1:9092")
    (tmp_path / "ulm" / "ca.crt").touch()
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
    ((found, key),) = tomllib.loads(done.stdout.splitlines()[-1]).items()
    assert (found, key) == (name, (tmp_path / "site" / "site.pub").read_text().strip())


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


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ('name = "ulm"', "", "missing key name$"),
        ('data = "../rows.jsonl"', 'data = ""', "data: String should have at least 1 character"),
        (
            '["fedrouter"]',
            '["fedruter"]',
            "policy.methods: unknown method 'fedruter'; did you mean fedrouter?",
        ),
        ("127.0.0.1:9092", "127.0.0.1", "server '127.0.0.1': expected HOST:PORT"),
        ("127.0.0.1:9092", "https://x:9092", "expected HOST:PORT"),
        ("127.0.0.1:9092", "x:99999", "expected HOST:PORT"),
    ],
)
def test_a_setting_that_is_wrong_is_named_without_the_other_values(
    made: Path, old: str, new: str, why: str
) -> None:
    file = made / "ulm" / "site.toml"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))
    with pytest.raises(ConfigError, match=f"^{file}: .*{why}".replace("?", r"\?")):
        load_site(made / "ulm")


def test_a_server_that_is_none_is_refused_before_a_key_is_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="client init: server 'nowhere': expected HOST:PORT"):
        make_site(tmp_path / "ulm", "ulm", "rows.jsonl", "nowhere")
    assert not (tmp_path / "ulm").exists()


def test_missing_data_names_the_setting(made: Path) -> None:
    (made / "rows.jsonl").unlink()
    with pytest.raises(DataError, match=r"ulm/site.toml: data '../rows.jsonl': no such file .* relative to"):
        preview(load_site(made / "ulm"))


def test_check_names_every_message_of_the_privacy_page(made: Path) -> None:
    page = (Path(__file__).parents[1] / "docs" / "privacy.md").read_text()
    listed = set(re.findall(r"^\| `([A-Z]\w+)` \|", page, re.MULTILINE)) - {"Subset"}  # part of Assignment
    assert {"TrainReply", "Reread"} < listed

    def named(site: Site) -> set[str]:
        found = preview(site)
        assert not found.problems
        return {name for name in {*listed, *SUM} if any(f": {name}: " in line for line in found.lines)}

    site = load_site(made / "ulm")
    assert named(site) == listed
    summed = site.settings.policy.model_copy(update={"secure_sum": True})
    site = Site(site.directory, site.settings.model_copy(update={"policy": summed}))
    assert named(site) == listed - {"TrainReply"} | SUM


def test_check_knows_the_size_of_an_adapter_on_a_base_at_hand(made: Path) -> None:
    site = load_site(made / "ulm")
    rule = next(line for line in preview(site).lines if "TrainReply: an adapter" in line)
    assert "(4 bytes × rank × the inputs and outputs of each linear layer of the base)" in rule
    known = Site(site.directory, site.settings.model_copy(update={"base": "builtin:tiny"}))
    line = next(line for line in preview(known).lines if "TrainReply: an adapter" in line)
    assert re.search(r"of rank 64 at most \(at most \d+ [KM]iB\)", line)


def break_site(made: Path, name: str) -> None:
    """Make one thing wrong that keeps a site from taking part."""
    directory = made / "ulm"
    match name:
        case "rows":
            rows = (made / "rows.jsonl").read_text().splitlines(keepends=True)
            (made / "rows.jsonl").write_text("".join(rows[:3]))
        case "base":
            file = directory / "site.toml"
            file.write_text(file.read_text().replace('# base = "/models/base"', 'base = "/models/none"'))
        case "pair":
            other = new_key(made / "other.key").public_key()
            (directory / "site.pub").write_text(public_text(other))
        case _:
            (directory / name).unlink()


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("rows", "3 rows, fewer than policy.min_cluster_size 5; add rows"),
        ("base", "site.toml: base '/models/none': no such directory"),
        ("pair", "site.pub: not the public half of "),
        ("ca.crt", "site.toml: ca 'ca.crt': no such file; put the federation's ca.crt there"),
        ("site.key", "site.key: cannot read a private key"),
        ("site.pub", "site.pub: cannot be read"),
    ],
)
def test_check_names_what_keeps_a_site_out(made: Path, name: str, why: str) -> None:
    break_site(made, name)
    (problem,) = preview(load_site(made / "ulm")).problems
    assert why in problem


def test_check_fails_with_one_line_per_problem(made: Path) -> None:
    break_site(made, "rows")
    break_site(made, "ca.crt")
    done = fedrouter("client", "check", "ulm", cwd=made)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 2)
    assert all(line.startswith("error: ulm/site.toml: ") for line in done.stderr.splitlines())


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
