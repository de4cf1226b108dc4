"""Create a site's directory, and list in advance what the site would reveal."""

import json
from pathlib import Path

from fedrouter import data
from fedrouter.errors import ConfigError
from fedrouter.files import check_directory, write_atomically
from fedrouter.layout import number_of
from fedrouter.train.client.cluster import MAX_LOCAL
from fedrouter.train.client.site import Site, load_site
from fedrouter.train.wire.keys import new_key, public_text, read_public
from fedrouter.types import A_NAME, is_label

TEMPLATE = """\
name = {name}  # as in the federation's roster
data = {data}  # file or directory with this site's rows, which never leave the site
server = {server}
ca = "ca.crt"  # the federation's CA certificate
# base = "/models/base"  # path of the base model; by default the server's name for it is used
# fields = {{ prompt = "question", completion = "answer" }}

[policy]  # the site refuses anything beyond these limits
methods = ["fedrouter"]
max_rank = 64  # of an adapter
max_steps = 200  # per request
min_cluster_size = 5  # minimum number of rows in any revealed group
centroid_noise = 0.0  # minimum noise multipliers (docs/privacy.md)
update_noise = 0.0
labels = true  # false: remove task labels when rows are read, so that they are never revealed
secure_sum = false  # true: take part only if the server sees sums of updates, never one site's
min_sum = 3  # minimum number of sites in a secure sum, including this one
max_requests_per_day = 10000
max_mib_per_day = 10000.0
"""


def make_site(directory: Path, name: str, source: str, server: str) -> tuple[Site, str]:
    """Create a site's directory; return the site and the line of its public key.

    Raises
    ------
    ConfigError
        If the name is invalid, or the directory already belongs to a site.
    """
    if not is_label(name):
        raise ConfigError(f"client {name!r}: {A_NAME}")
    if (directory / "site.toml").exists():
        raise ConfigError(f"{directory} already belongs to a site; choose another directory")
    check_directory(directory, "--dir")
    key = new_key(directory / "site.key")
    values = {k: json.dumps(v) for k, v in (("name", name), ("data", source), ("server", server))}
    write_atomically(directory / "site.toml", TEMPLATE.format(**values))
    return load_site(directory), public_text(key.public_key())


def revealed(site: Site) -> list[str]:
    """List what the site would reveal: messages, their content and their maximum size.

    Raises
    ------
    ConfigError, DataError
        If its data or its key cannot be read.
    """
    own, policy = site.settings, site.settings.policy
    notes: list[str] = []
    reads = data.read_source(
        site.place(own.data), own.split, own.fields, own.ignore, notes.append, options=data.IN_SITE
    )
    records = [record for read in reads for record in read.records]
    public = read_public(site.directory / "site.pub")
    labels = sorted({record.task for record in records if record.task is not None})
    sizes = {d: 8 * (MAX_LOCAL * (1 + d) + d * d) / 2**20 for d in (128, 384, 1024)}
    groups = ", ".join(f"{size:.1f} MiB with {d} numbers a vector" for d, size in sizes.items())
    least, named = policy.min_cluster_size, ", ".join(labels[:10]) or "none"
    shown = f"task labels of {least} rows or more, by name: {named}" if policy.labels else "no labels"
    summed = "; summed with other sites' before the server sees it" if policy.secure_sum else ""
    return [
        *notes,
        f"{own.name}: {number_of(len(records), 'row')}, key {public_text(public)[:60]}…",
        f"joining: Member: the name, the number of rows ({len(records)}), a digest of the rows",
        f"before the rounds: LocalClusters: counts and means of groups of {least} rows or more, one scatter "
        f"matrix; at most {groups}",
        "before the rounds: Assignment: number of rows and 101 distance quantiles per task cluster, "
        f"{shown}; about 1 KiB per task cluster",
        f"each round: TrainReply: an adapter of rank {policy.max_rank} at most, examples trained, mean loss, "
        f"seconds{summed}",
        f"per day: at most {policy.max_requests_per_day} requests and {policy.max_mib_per_day:g} MiB",
        f"methods: {', '.join(policy.methods)}; every message is recorded in {site.audit}",
        "never: a row, a prompt, a completion, the vector of a single row, the private key",
    ]
