"""The Hugging Face Hub: fetch a weight file, publish one. ``huggingface_hub`` is imported only when it is used."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from learned_optim.weights.errors import WeightsError
from learned_optim.weights.file_format import FORMAT_VERSION, to_bytes
from learned_optim.weights.model_card import model_card
from learned_optim.weights.weights import Weights

FILE = "model.safetensors"


def download(repo_id: str, revision: str | None = None, **options: Any) -> Path:
    """Fetch a repository's weight file into the Hub cache.

    Args:
        repo_id: ``"owner/repo"``.
        revision: Branch, tag or commit; a full commit hash needs no network once cached.
        **options: ``token``, ``cache_dir``, ``local_files_only`` and ``force_download`` of ``hf_hub_download``.

    Returns:
        The cached file.

    Raises:
        WeightsError: If there is no such repository, revision or file, or no network; the message says what to do.
    """
    from huggingface_hub import hf_hub_download

    with _explained(repo_id, revision):
        return Path(hf_hub_download(repo_id, FILE, revision=revision, library_name="learned-optim", **options))


def push_to_hub(
    weights: Weights,
    repo_id: str,
    *,
    private: bool = False,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
) -> str:
    """Publish weights: the file, its configuration and a model card, in one commit.

    Args:
        weights: What to publish.
        repo_id: ``"owner/repo"``; created if missing.
        private: Create it private.
        token: Hub token with write access.
        revision: Branch to commit to.
        commit_message: By default names the weights.

    Returns:
        The commit's hash: pin it as ``"owner/repo@hash"``.

    Raises:
        WeightsError: If the upload is refused or there is no network.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    config = {"format_version": FORMAT_VERSION, "family": weights.rule.family, **weights.rule.config.to_dict()}
    files = {
        FILE: to_bytes(weights),
        "config.json": (json.dumps(config, indent=2) + "\n").encode(),
        "README.md": model_card(weights, repo_id).encode(),
    }
    api = HfApi(token=token, library_name="learned-optim")
    with _explained(repo_id, revision):
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.create_commit(
            repo_id,
            operations=[CommitOperationAdd(name, data) for name, data in files.items()],
            commit_message=commit_message or f"Publish update rule {weights.name}",
            revision=revision,
        )
    return commit.oid


@contextmanager
def _explained(repo_id: str, revision: str | None) -> Iterator[None]:
    """Turn the Hub's exceptions into one that says what to do."""
    from huggingface_hub import errors

    at = f" at revision {revision!r}" if revision else ""
    try:
        yield
    except errors.RevisionNotFoundError as error:
        raise WeightsError(f"the Hub repository {repo_id!r} has no revision {revision!r}; check the hash") from error
    except errors.RepositoryNotFoundError as error:
        raise WeightsError(
            f"there is no Hub repository {repo_id!r} that you may see; check the name, or give a token if it is private"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise WeightsError(
            f"{FILE} of {repo_id!r}{at} is not cached and the Hub cannot be reached; connect once, or use weights that "
            "come with the package (learned_optim.available_weights())"
        ) from error
    except errors.EntryNotFoundError as error:
        raise WeightsError(f"the Hub repository {repo_id!r}{at} holds no {FILE}: not learned-optim weights") from error
    except errors.OfflineModeIsEnabled as error:
        raise WeightsError(f"offline mode is on (HF_HUB_OFFLINE), {repo_id!r} cannot be reached") from error
    except errors.HfHubHTTPError as error:
        raise WeightsError(f"the Hub refused a request for {repo_id!r}{at}: {error}") from error
    except ValueError as error:  # A malformed id, or `force_download` without an answer.
        raise WeightsError(f"{repo_id!r}{at} cannot be fetched: {error.__cause__ or error}") from error
    except OSError as error:
        raise WeightsError(f"the Hub could not be reached for {repo_id!r}{at}: {error}; try again") from error
