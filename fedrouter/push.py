"""Upload of a bundle to the Hugging Face hub, with a model card for each adapter."""

import re
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub import errors as hub_errors

from fedrouter.bundle import MANIFEST, SIGNATURE, Bundle
from fedrouter.errors import ConfigError, ServingError, first_line
from fedrouter.layout import number_of
from fedrouter.types import TaskCluster

HTTPError: type[Exception] = hub_errors.HTTPError  # type: ignore[attr-defined]  # from its HTTP library
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def push(bundle: Bundle, repo: str, *, private: bool = False, revision: str | None = None) -> str:
    """Upload a bundle in one commit and return the commit's URL.

    A missing repository is created. The token comes from ``HF_TOKEN`` or ``hf auth login``. PEFT alone can
    load each adapter from the repository, with ``subfolder="adapters/NAME"``.

    Raises
    ------
    ConfigError
        If ``repo`` is not ``OWNER/NAME``.
    ServingError
        If the hub cannot be reached or refuses the upload.
    """
    if not HUB_ID.fullmatch(repo):
        raise ConfigError(f"hub repository {repo}: expected OWNER/NAME")
    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        commit = api.create_commit(
            repo,
            operations=_operations(bundle, repo),
            commit_message=f"FedRouter bundle, {len(bundle.clusters)} adapters",
            revision=revision,
        )
    except (HTTPError, OSError) as error:
        raise ServingError(
            f"hub repository {repo}: {first_line(error)}; check HF_TOKEN, the network and HF_HUB_OFFLINE"
        ) from error
    return str(commit.commit_url)


def _operations(bundle: Bundle, repo: str) -> list[CommitOperationAdd]:
    unlisted = [name for name in (MANIFEST, SIGNATURE, "README.md") if (bundle.path / name).is_file()]
    added = [CommitOperationAdd(name, bundle.path / name) for name in sorted([*unlisted, *bundle.files])]
    for cluster in bundle.clusters:
        card = Path("adapters") / cluster.adapter / "README.md"
        added.append(CommitOperationAdd(card.as_posix(), model_card(bundle, cluster, repo).encode()))
    return added


def model_card(bundle: Bundle, cluster: TaskCluster, repo: str) -> str:
    """Return the card of one adapter; its metadata names the base only if that is a hub id."""
    base = bundle.base.model
    on_hub = f"base_model: {base}\n" if HUB_ID.fullmatch(base) else ""
    tasks = ", ".join(f"{task} ({number_of(count, 'row')})" for task, count in cluster.task_counts.items())
    return (
        f"---\nlibrary_name: peft\n{on_hub}tags: [lora, federated-learning, fedrouter]\n---\n"
        f"# {cluster.adapter}\n\nLoRA adapter of rank {bundle.rank} on `{Path(base).name}` for the task "
        f"cluster `{cluster.name}`: {number_of(cluster.num_examples, 'training row')} of "
        f"{number_of(len(cluster.clients), 'client')} "
        f"that shared no data.{f' Tasks: {tasks}.' if tasks else ''}\n\n"
        f'`PeftModel.from_pretrained(base, "{repo}", subfolder="adapters/{cluster.adapter}")`\n'
    )
