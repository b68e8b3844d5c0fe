"""The Hugging Face Hub: move bytes from it and to it. ``huggingface_hub`` is imported only when it is used."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from os import PathLike
from pathlib import Path
from typing import Any, cast

from learned_optim.weights.container import check_size
from learned_optim.weights.errors import WeightsError, WeightsNotFoundError
from learned_optim.weights.file_format import FILE
from learned_optim.weights.text import one_line

LIBRARY = "learned-optim"
PATIENCE = 4.0
"""Seconds that the Hub has to answer before a download."""

BUNDLED_HINT = "or use weights that come with the package: learned_optim.available_weights()"


def download(
    repo_id: str,
    revision: str | None = None,
    *,
    token: str | bool | None = None,
    cache_dir: str | PathLike[str] | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> tuple[Path, str]:
    """Fetch a repository's weight file into the Hub cache.

    Args:
        repo_id: ``"owner/repo"``.
        revision: Branch, tag or commit; a full commit hash needs no network once cached.
        token: Hub token.
        cache_dir: Hub cache.
        local_files_only: Never use the network.
        force_download: Fetch again even if cached.

    Returns:
        The cached file, and ``"owner/repo@commit"``.

    Raises:
        WeightsError: If there is no such repository, revision or file, or no network, or the file is too large to be an
            update rule, and is not fetched; the message says what to do.
    """
    from huggingface_hub import hf_hub_download

    _check_revision(repo_id, revision)
    if local_files_only and force_download:
        raise WeightsError(f"{repo_id}: force_download=True needs the network that local_files_only=True forbids; drop one")
    if not local_files_only:
        with _explained(repo_id, revision):
            size = _size_to_fetch(repo_id, revision, token, cache_dir, force_download)
        check_size(size, f"{FILE} of {repo_id}@{revision or 'main'}")
    with _explained(repo_id, revision, local_files_only=local_files_only):
        path = Path(
            hf_hub_download(
                repo_id,
                FILE,
                revision=revision,
                library_name=LIBRARY,
                token=token,
                cache_dir=None if cache_dir is None else Path(cache_dir),
                local_files_only=local_files_only,
                force_download=force_download,
                etag_timeout=PATIENCE,
            )
        )
    found = path.parent.name  # The cache keeps a file in a directory named by its commit.
    if not re.fullmatch("[0-9a-f]{40}", found):
        found = revision or "main"
    return path, f"{repo_id}@{found}"


def _size_to_fetch(
    repo_id: str, revision: str | None, token: str | bool | None, cache_dir: str | PathLike[str] | None, force: bool
) -> int:
    """Ask how large a file is that is not cached; 0 if the Hub does not say, for the download will say why.

    The question is asked once and waits :data:`PATIENCE`, where a download would try again for half a minute.

    Returns:
        Bytes.

    Raises:
        LocalEntryNotFoundError: If nothing answers.
    """
    from huggingface_hub import errors, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

    cache = None if cache_dir is None else Path(cache_dir)
    once: dict[str, Any] = {"retry_on_errors": False}
    if "retry_on_errors" not in signature(get_hf_file_metadata).parameters:
        once = {}
    answered = (errors.HfHubHTTPError, errors.HFValidationError, errors.LocalTokenNotFoundError, errors.OfflineModeIsEnabled)
    try:
        if not force and isinstance(try_to_load_from_cache(repo_id, FILE, cache, revision), str):
            return 0
        url = hf_hub_url(repo_id, FILE, revision=revision)
        return get_hf_file_metadata(url, token=token, library_name=LIBRARY, timeout=PATIENCE, **once).size or 0
    except answered:
        return 0
    except Exception as error:  # The transport's own, by version.
        if force:
            raise
        raise errors.LocalEntryNotFoundError(str(error)) from error


def create_repository(
    repo_id: str, *, private: bool = False, token: str | bool | None = None, revision: str | None = None
) -> str:
    """Make a repository if it is missing; one that exists stays as it is.

    Args:
        repo_id: ``"owner/repo"``.
        private: Create it private.
        token: Hub token with write access.
        revision: The branch that will be committed to; checked before a request is made.

    Returns:
        The repository's full id.

    Raises:
        WeightsError: If the Hub refuses or there is no network.
    """
    from huggingface_hub import HfApi

    _check_revision(repo_id, revision)
    with _explained(repo_id, revision):
        return HfApi(token=token, library_name=LIBRARY).create_repo(repo_id, private=private, exist_ok=True).repo_id


def commit(
    repo_id: str, files: Mapping[str, bytes], message: str, *, token: str | bool | None = None, revision: str | None = None
) -> str:
    """Put files into a repository, all in one commit.

    Args:
        repo_id: ``"owner/repo"``.
        files: Content by name; a file that is there already is replaced.
        message: Of the commit.
        token: Hub token with write access.
        revision: Branch to commit to.

    Returns:
        ``"owner/repo@commit"``.

    Raises:
        WeightsError: If the upload is refused or there is no network; the repository then has no new commit.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    with _explained(repo_id, revision):
        made = HfApi(token=token, library_name=LIBRARY).create_commit(
            repo_id,
            operations=[CommitOperationAdd(name, data) for name, data in files.items()],
            commit_message=message,
            revision=revision,
        )
    return f"{repo_id}@{made.oid}"


def _check_revision(repo_id: str, revision: str | None) -> None:
    """Refuse what is no revision before it becomes a part of an address or of a path in the cache."""
    if revision is None:
        return
    parts = revision.split("/")
    if not revision.isprintable() or "\\" in revision or any(part in ("", ".", "..") for part in parts):
        raise WeightsError(f"{repo_id}: {one_line(revision, 80)!r} is no revision; give a branch, a tag or a commit")


@contextmanager
def _explained(repo_id: str, revision: str | None, *, local_files_only: bool = False) -> Iterator[None]:
    """Turn the Hub's exceptions into ours, which say what to do.

    All of them: the transport below (requests, httpx, Xet, by version) has exceptions with no base in common.
    """
    try:
        yield
    except Exception as error:
        explained, message = _explain(error, repo_id, revision, local_files_only=local_files_only)
        raise explained(message) from error


def _explain(
    error: BaseException, repo_id: str, revision: str | None, *, local_files_only: bool
) -> tuple[type[WeightsError], str]:
    from huggingface_hub import errors

    while type(error) in (ValueError, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__  # `force_download` and uploads wrap the true reason.
    if isinstance(error, errors.LocalEntryNotFoundError) and _status(error.__cause__) in (401, 403):
        error = cast("BaseException", error.__cause__)  # The Hub was reached, and refused.
    at = f"{repo_id}@{revision}" if revision else repo_id
    status = _status(error)
    # Subclasses before their bases.
    if isinstance(error, errors.HFValidationError):
        return WeightsError, f"{repo_id!r} is not a Hub id: {error}"
    if isinstance(error, errors.GatedRepoError):
        return (
            WeightsError,
            f"{repo_id} is gated: ask for access on its page, then log in (hf auth login) or give a token",
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return WeightsNotFoundError, (
            f"there is no repository {repo_id} on the Hub that you may see (nor a file here of that name); check the name, "
            "and if it is private log in (hf auth login) or give a token"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return WeightsNotFoundError, f"{repo_id} on the Hub has no revision {revision!r}; check the branch, tag or commit"
    if isinstance(error, errors.LocalEntryNotFoundError):
        reason = error.__cause__ or error.__context__
        if local_files_only:
            why = "local_files_only=True forbids to fetch it; fetch it once without"
        elif isinstance(reason, errors.OfflineModeIsEnabled):
            why = "offline mode (HF_HUB_OFFLINE) forbids to fetch it; fetch it once without"
        else:
            why = f"the Hub cannot be reached ({_brief(reason or error)}); try again with a network"
        return WeightsNotFoundError, f"{at} is not in the Hub cache, and {why}, {BUNDLED_HINT}"
    if isinstance(error, errors.EntryNotFoundError):
        return WeightsNotFoundError, f"{at} on the Hub holds no {FILE}, so it is not an update rule of learned-optim"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return WeightsError, f"{at}: offline mode (HF_HUB_OFFLINE) is on, and this needs the Hub; unset it"
    if isinstance(error, errors.LocalTokenNotFoundError) or status == 401:
        return WeightsError, f"{at}: the Hub wants a valid token ({_brief(error)}); log in (hf auth login) or give token="
    if status == 403:
        return WeightsError, f"{at}: the token may not do this ({_brief(error)}); use one with that permission"
    if isinstance(error, errors.HfHubHTTPError):
        return WeightsError, f"{at}: the Hub refused ({_brief(error)})"
    return WeightsError, f"{at}: the Hub could not be used ({_brief(error)}); no file was changed, try again"


def _status(error: BaseException | None) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _brief(error: BaseException) -> str:
    """Return an error's type and the first line that says something; the whole of it is the cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {one_line(lines[0], 300)}" if lines else type(error).__name__
