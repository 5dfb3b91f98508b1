"""Fetch an adapter from the hub: its config and its weights, and nothing else of the repository unless it is asked for."""

from __future__ import annotations

import re
import warnings
from contextlib import suppress
from pathlib import Path

import huggingface_hub

from ..adapters.errors import AdapterError
from ..adapters.files import CARD_NAME, CONFIG_NAME, MAX_CONFIG_BYTES, MAX_WEIGHTS_BYTES, WEIGHTS_NAME, read_config
from .client import FileMissingError, UnreachableError, told

COMMIT = re.compile(r"[0-9a-f]{40}")
MAX_CARD_BYTES = 2**22
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib")


def pull(repo_id: str, revision: str | None = None, *, card: bool = True) -> Path:
    """Download an adapter, or find it in the hub's cache; returns the folder that `posthoc.load` reads.

    All files come from one commit, the one `revision` (branch, tag or commit; None: main) stands for when the first is
    asked for; the folder has its name. Sizes are asked for before anything is downloaded, and the config is checked before
    the weights are. Without a connection a cached copy is used, with a warning that says which commit it is.

    Args:
        card: the README.md too.

    Raises AdapterError: no such repository, revision or file, a private or gated repository, no connection, an invalid
    config, files larger than any adapter's, a repository of pickles.
    """
    commit, there = _resolve(repo_id, revision)
    try:
        folder = _fetch(repo_id, CONFIG_NAME, commit, MAX_CONFIG_BYTES, there).parent
        config = read_config(folder)
        _fetch(repo_id, WEIGHTS_NAME, commit, MAX_WEIGHTS_BYTES, there, config.weights.bytes)
    except FileMissingError as error:
        raise _not_an_adapter(repo_id, commit, error) from error
    if card:
        with suppress(FileMissingError, UnreachableError):  # an adapter works without its card
            _fetch(repo_id, CARD_NAME, commit, MAX_CARD_BYTES, there)
    return folder


def _resolve(repo_id: str, revision: str | None) -> tuple[str, bool]:
    """The commit a revision stands for, and whether the hub said so (else the cache)."""
    cached = _cached(repo_id, CONFIG_NAME, revision)
    if cached is not None and revision is not None and COMMIT.fullmatch(revision) and _cached(repo_id, WEIGHTS_NAME, revision):
        return revision, False
    try:
        with told(f"look up {CONFIG_NAME}", repo_id, revision, CONFIG_NAME):
            url = huggingface_hub.hf_hub_url(repo_id, CONFIG_NAME, revision=revision)
            commit = huggingface_hub.get_hf_file_metadata(url).commit_hash
    except UnreachableError as error:
        if cached is None:
            raise AdapterError(f"{error}; {repo_id!r} is not in the hub's cache either") from error
        commit = cached.parent.name
        warnings.warn(
            f"the hub cannot be reached: {repo_id!r} is used from the cache, at commit {commit}", UserWarning, stacklevel=4
        )
        return commit, False
    except FileMissingError as error:
        raise _not_an_adapter(repo_id, revision, error) from error
    if commit is None:
        raise AdapterError(f"the hub does not say which commit of {repo_id!r} it answers with; is HF_ENDPOINT a hub?")
    return commit, True


def _cached(repo_id: str, name: str, revision: str | None) -> Path | None:
    with told(f"look for {name}", repo_id, revision):
        found = huggingface_hub.try_to_load_from_cache(repo_id, name, revision=revision)
    return Path(found) if isinstance(found, str) else None


def _fetch(repo_id: str, name: str, commit: str, largest: int, online: bool, expected: int | None = None) -> Path:
    """One file of a commit, of at most `largest` bytes, and of the `expected` number where that is known."""
    cached = _cached(repo_id, name, commit)
    if cached is not None:
        return cached
    with told(f"download {name}", repo_id, commit, name):
        if online:
            url = huggingface_hub.hf_hub_url(repo_id, name, revision=commit)
            size = huggingface_hub.get_hf_file_metadata(url).size
            if size is None or size > largest:
                raise AdapterError(
                    f"{name} of {repo_id!r} has {size} bytes, more than any adapter's ({largest}): it was not downloaded"
                )
            if expected is not None and size != expected:
                raise AdapterError(
                    f"{name} of {repo_id!r} has {size} bytes, its {CONFIG_NAME} says {expected}: they are not of one adapter; it "
                    "was not downloaded. Tell its author, or give another revision"
                )
        return Path(huggingface_hub.hf_hub_download(repo_id, name, revision=commit))


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
