"""A site's directory, made; and what the site would reveal, said beforehand."""

import json
from pathlib import Path

from fedrouter import data
from fedrouter.errors import ConfigError
from fedrouter.files import write_atomically
from fedrouter.train.client.cluster import MAX_LOCAL
from fedrouter.train.client.site import Site, load_site
from fedrouter.train.wire.keys import load_public, new_key, public_text

TEMPLATE = """\
name = {name}  # as in the federation's roster
data = {data}  # file or directory with this site's rows; they stay here
server = {server}
ca = "ca.crt"  # the federation's CA certificate
# base = "/models/base"  # where the base model is, if not where the server's name for it leads
# fields = {{ prompt = "question", completion = "answer" }}

[policy]  # what lies beyond is refused here, on the site
methods = ["fedrouter"]
max_rank = 64  # of an adapter
max_steps = 200  # of one request
min_cluster_size = 5  # nothing is told of fewer rows together
centroid_noise = 0.0  # least noise multipliers (docs/privacy.md)
update_noise = 0.0
labels = true  # task labels may be told; false takes them off the rows as these are read
secure_sum = false  # true: take part only where the server sees sums of updates
min_sum = 3  # fewest sites of a sum, this one counted
max_requests_per_day = 10000
max_mib_per_day = 10000.0
"""


def make_site(directory: Path, name: str, source: str, server: str) -> tuple[Site, str]:
    """Make a site's directory; return the site and the line of its public key.

    Raises
    ------
    ConfigError
        If the name cannot be a client's, or the directory is a site's already.
    """
    if not data.is_label(name):
        raise ConfigError(f"client {name!r}: expected a printable name on one line")
    if (directory / "site.toml").exists():
        raise ConfigError(f"{directory} is a site's already")
    directory.mkdir(parents=True, exist_ok=True)
    key = new_key(directory / "site.key")
    values = {k: json.dumps(v) for k, v in (("name", name), ("data", source), ("server", server))}
    write_atomically(directory / "site.toml", TEMPLATE.format(**values))
    return load_site(directory), public_text(key.public_key())


def revealed(site: Site) -> list[str]:
    """Say what the site would reveal: messages, kinds, and bytes at most.

    Raises
    ------
    ConfigError, DataError
        If its data or its key cannot be read.
    """
    own, policy = site.settings, site.settings.policy
    say: list[str] = []
    reads = data.read_source(site.place(own.data), own.split, None, own.fields, own.ignore, say.append)
    records = [record for read in reads for record in read.records]
    public = load_public((site.directory / "site.pub").read_text(encoding="utf-8"))
    labels = sorted({record.task for record in records if record.task is not None})
    sizes = {d: 8 * (MAX_LOCAL * (1 + d) + d * d) / 2**20 for d in (128, 384, 1024)}
    groups = ", ".join(f"{size:.1f} MiB with {d} numbers a vector" for d, size in sizes.items())
    least, named = policy.min_cluster_size, ", ".join(labels[:10]) or "none"
    told = f"task labels of {least} rows or more, by name: {named}" if policy.labels else "no labels"
    summed = "; summed with other sites' before the server sees it" if policy.secure_sum else ""
    return [
        *say,
        f"{own.name}: {len(records)} rows, key {public_text(public)[:60]}…",
        f"joining: Member: the name, the number of rows ({len(records)}), a digest that changes with them",
        f"before the rounds: LocalClusters: counts and means of {least} rows or more, one scatter matrix; "
        f"at most {groups}",
        f"before the rounds: Assignment: rows a task cluster, 101 quantiles of distances, {told}; "
        "about 1 KiB a task cluster",
        f"each round: TrainReply: an adapter of rank {policy.max_rank} at most, examples trained, mean loss, "
        f"seconds{summed}",
        f"in a day: {policy.max_requests_per_day} requests and {policy.max_mib_per_day:g} MiB at most",
        f"methods: {', '.join(policy.methods)}; every message is written to {site.audit}",
        "never: a row, a prompt, a completion, the vector of a single row, the private key",
    ]
