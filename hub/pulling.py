"""Fetch an adapter from the hub: its config and its weights, and nothing else of the repository unless it is asked for."""

from __future__ import annotations

import re
import warnings
from contextlib import suppress
from pathlib import Path

import huggingface_hub

from ..adapters.errors import AdapterError
from ..adapters.files import (
    CARD_NAME,
    CONFIG_NAME,
    MAX_CARD_BYTES,
    MAX_CONFIG_BYTES,
    MAX_WEIGHTS_BYTES,
    WEIGHTS_NAME,
    read_config,
)
from .client import FileMissingError, UnreachableError, told
from .zoo import hub_id

COMMIT = re.compile(r"[0-9a-f]{40}")
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib")


def pull(repo_id: str, revision: str | None = None, *, card: bool = True) -> Path:
    """Download an adapter, or find it in the hub's cache; returns the folder that `posthoc.load` reads.

    All files come from one commit, the one `revision` (branch, tag or commit; None: main) stands for when the config is
    downloaded; the folder has its name. Sizes are asked for before anything is downloaded, and the config is checked before
    the weights are. Without a connection a cached copy is used, with a warning that says which commit it is.

    Args:
        repo_id: "org/name", or "zoo/NAME" for one of the zoo's.
        card: the README.md too.

    Raises AdapterError: no such repository, revision or file, a private or gated repository, no connection, an invalid
    config, files larger than any adapter's, a repository of pickles.
    """
    repo_id = hub_id(repo_id)
    try:
        path, online = _config(repo_id, revision)
        config, commit = read_config(path.parent), path.parent.name
        _fetch(repo_id, WEIGHTS_NAME, commit, MAX_WEIGHTS_BYTES, config.weights.bytes)
    except FileMissingError as error:
        raise _not_an_adapter(repo_id, revision, error) from error
    if card and online:
        with suppress(FileMissingError, UnreachableError):  # an adapter works without its card
            _fetch(repo_id, CARD_NAME, commit, MAX_CARD_BYTES)
    return path.parent


def _config(repo_id: str, revision: str | None) -> tuple[Path, bool]:
    """The config at a revision, in a folder named after its commit, and whether the hub was asked.

    It is downloaded by the revision and not by the commit, for the cache to know what the revision stands for.
    """
    cached = _cached(repo_id, CONFIG_NAME, revision)
    if cached is not None and revision is not None and COMMIT.fullmatch(revision):
        return cached, False  # a commit does not change
    try:
        _check_size(repo_id, CONFIG_NAME, revision, MAX_CONFIG_BYTES)
        with told(f"download {CONFIG_NAME} of", repo_id, revision, CONFIG_NAME):
            return Path(huggingface_hub.hf_hub_download(repo_id, CONFIG_NAME, revision=revision)), True
    except UnreachableError:
        if cached is None:
            raise
        warnings.warn(
            f"the hub cannot be reached: {repo_id!r} is used from the cache, at commit {cached.parent.name}",
            UserWarning,
            stacklevel=4,
        )
        return cached, False


def _cached(repo_id: str, name: str, revision: str | None) -> Path | None:
    with told(f"look for {name} of", repo_id, revision):
        found = huggingface_hub.try_to_load_from_cache(repo_id, name, revision=revision)
    return Path(found) if isinstance(found, str) else None


def _fetch(repo_id: str, name: str, commit: str, largest: int, expected: int | None = None) -> Path:
    """Another file of the commit, from the cache or the hub."""
    cached = _cached(repo_id, name, commit)
    if cached is not None:
        return cached
    _check_size(repo_id, name, commit, largest, expected)
    with told(f"download {name} of", repo_id, commit, name):
        return Path(huggingface_hub.hf_hub_download(repo_id, name, revision=commit))


def _check_size(repo_id: str, name: str, revision: str | None, largest: int, expected: int | None = None) -> None:
    """Raises AdapterError unless the hub's file has at most `largest` bytes, and as many as are `expected`."""
    with told(f"look up {name} of", repo_id, revision, name):
        size = huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(repo_id, name, revision=revision)).size
    if size is None or size > largest:
        raise AdapterError(
            f"{name} of {repo_id!r} has {size} bytes, more than any adapter's ({largest}): it was not downloaded"
        )
    if expected is not None and size != expected:
        raise AdapterError(
            f"{name} of {repo_id!r} has {size} bytes, its {CONFIG_NAME} says {expected}: they are not of one adapter, and it was "
            "not downloaded. Tell its author, or give another revision"
        )


def _not_an_adapter(repo_id: str, revision: str | None, error: AdapterError) -> AdapterError:
    """Says which pickles the repository offers in place of an adapter, if it does."""
    try:
        names = huggingface_hub.HfApi().list_repo_files(repo_id, revision=revision)
    except Exception:  # the first error tells enough
        return error
    pickles = [name for name in names if name.endswith(PICKLES)]
    if not pickles:
        return error
    return AdapterError(
        f"{error}. It has {', '.join(pickles[:3])}: pickles, which can run code and which posthoc never reads; ask its author "
        f"for {WEIGHTS_NAME} and {CONFIG_NAME} as save_pretrained writes them"
    )
