"""Create a site's directory, and list in advance what the site would reveal."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from fedrouter import data
from fedrouter.builtin import is_builtin
from fedrouter.config_file import fitted
from fedrouter.errors import ConfigError, ModelError
from fedrouter.files import check_directory, write_atomically
from fedrouter.layout import number_of, size_text
from fedrouter.models import empty_model, quieten, resolve_base
from fedrouter.train.client.cluster import MAX_LOCAL
from fedrouter.train.client.site import Site, SiteSettings, load_site
from fedrouter.train.wire.keys import load_private, new_key, public_text, read_public
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
        If a value is invalid, or the directory already belongs to a site or cannot be made.
    """
    if not is_label(name):
        raise ConfigError(f"client {name!r}: {A_NAME}")
    given = {"name": name, "data": source, "server": server}
    fitted(given, SiteSettings, "client init")
    if (directory / "site.toml").exists():
        raise ConfigError(f"{directory} already belongs to a site; choose another directory")
    check_directory(directory, "--dir")
    key = new_key(directory / "site.key")
    values = {key: json.dumps(value) for key, value in given.items()}
    write_atomically(directory / "site.toml", TEMPLATE.format(**values))
    return load_site(directory), public_text(key.public_key())


@dataclass(frozen=True, slots=True)
class Preview:
    """What a site would reveal, and why it could not take part."""

    lines: list[str]
    problems: list[str]


def preview(site: Site) -> Preview:
    """List what the site would reveal: messages, their content and their maximum size.

    Raises
    ------
    DataError
        If its data cannot be read.
    """
    own, policy = site.settings, site.settings.policy
    notes: list[str] = []
    reads = data.read_source(
        site.source(), own.split, own.fields, own.ignore, notes.append, options=data.IN_SITE
    )
    records = [record for read in reads for record in read.records]
    labels = sorted({record.task for record in records if record.task is not None})
    sizes = {d: 8 * (MAX_LOCAL * (1 + d) + d * d) / 2**20 for d in (128, 384, 1024)}
    groups = ", ".join(f"{size:.1f} MiB with {d} numbers a vector" for d, size in sizes.items())
    least, named = policy.min_cluster_size, ", ".join(labels[:10]) or "none"
    shown = f"task labels of {least} rows or more, by name: {named}" if policy.labels else "no labels"
    size, problems = _adapter_size(site)
    problems = [*_problems(site, len(records)), *problems]
    adapter = f"an adapter of rank {policy.max_rank} at most ({size})"
    rounds = [f"each round: TrainReply: {adapter}, examples trained, mean loss, seconds"]
    if policy.secure_sum:
        rounds = [
            "each round: SumKey: public keys, signed; less than 1 KiB",
            "each round: SumSealed: one encrypted share per other site; less than 1 KiB each",
            f"each round: Masked: the update of {adapter}, twice its size, with weight and mean loss; "
            "masked, so that the server sees only sums with other sites'",
            "each round: SumOpened: one share per site; less than 1 KiB each",
        ]
    return Preview(
        [
            *notes,
            f"{own.name}: {number_of(len(records), 'row')}",
            f"joining: Member: the name, the number of rows ({len(records)}), a digest of the rows",
            f"before the rounds: LocalClusters: counts and means of groups of {least} rows or more, one "
            f"scatter matrix; at most {groups}",
            "before the rounds: Assignment: number of rows and 101 distance quantiles per task cluster, "
            f"{shown}; about 1 KiB per task cluster",
            *rounds,
            "each round, with train.validation: ValidationReply: mean loss on validation rows, number of "
            "tokens; less than 1 KiB",
            "in place of a TrainReply: TrainFailure: the error's type and its place in the code; "
            "less than 1 KiB",
            "with fedrouter join: Comparison: how many rows lie near each task cluster, in groups of "
            f"{least} rows or more; less than 1 KiB per task cluster",
            "with cluster.every: Reread: the error's type and its place in the code, if the rows could not "
            "be read again; less than 1 KiB",
            f"per day: at most {number_of(policy.max_requests_per_day, 'request')} and "
            f"{policy.max_mib_per_day:g} MiB",
            f"methods: {', '.join(policy.methods)}; every message is recorded in {site.audit}",
            "never: a row, a prompt, a completion, the vector of a single row, the private key",
        ],
        problems,
    )


def _problems(site: Site, num_rows: int) -> list[str]:
    """Return why the site could not take part, one line each."""
    own, toml = site.settings, site.directory / "site.toml"
    problems = []
    if num_rows < own.policy.min_cluster_size:
        problems.append(
            f"{toml}: {number_of(num_rows, 'row')}, fewer than policy.min_cluster_size "
            f"{own.policy.min_cluster_size}; add rows"
        )
    if not Path(site.place(own.ca)).is_file():
        problems.append(
            f"{toml}: ca {own.ca!r}: no such file; put the federation's ca.crt there "
            f"(a relative path is relative to {site.directory})"
        )
    try:
        public = site.directory / "site.pub"
        key = load_private(site.key).public_key()
        if public_text(read_public(public)) != public_text(key):
            problems.append(f"{public}: not the public half of {site.key}; restore both from a copy")
    except ConfigError as error:
        problems.append(str(error))
    return problems


def _adapter_size(site: Site) -> tuple[str, list[str]]:
    """Return the size of an adapter of the policy's maximum rank, and problems of the base."""
    rule = "4 bytes × rank × the inputs and outputs of each linear layer of the base"
    base, rank = site.settings.base, site.settings.policy.max_rank
    if base is None:
        return rule, []
    path = Path(site.place(base)).expanduser()
    if not path.is_dir() and not is_builtin(base):
        if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", base):  # may be a hub id, and nothing is downloaded here
            return f"{rule}; {base} is no directory in {site.directory}, so it is taken as a hub id", []
        return rule, [
            f"{site.directory / 'site.toml'}: base {base!r}: no such directory; "
            f"a relative path is relative to {site.directory}"
        ]
    from fedrouter.train.client.targets import ALL, adapted

    quieten()
    try:
        shapes = adapted(empty_model(resolve_base(str(path) if path.is_dir() else base)), ALL).values()
    except ModelError as error:
        return rule, [f"{site.directory / 'site.toml'}: {error}"]
    return f"at most {size_text(4 * rank * sum(i + o for i, o in shapes))}", []
