"""Fetch an adapter from the hub: its config, its weights and its card, and nothing else of the repository."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import huggingface_hub
from huggingface_hub import errors

from ..adapters.errors import AdapterError
from ..adapters.files import CARD_NAME, CONFIG_NAME, WEIGHTS_NAME, read_config


def pull(repo_id: str, revision: str | None = None) -> Path:
    """Download an adapter, or find it in the hub's cache; returns the folder that `posthoc.load` reads.

    All files come from one commit, the one `revision` (branch, tag or commit; None: main) stands for when the first is
    asked for. The config is checked before the weights are downloaded. Without a connection a cached copy is used.

    Raises AdapterError: no such repository, revision or file, a gated repository, no connection, an invalid config.
    """
    config = _fetch(repo_id, CONFIG_NAME, revision)
    folder = config.parent
    read_config(folder)
    commit = folder.name  # the cache keeps a commit's files in a folder of its name
    _fetch(repo_id, WEIGHTS_NAME, commit)
    with suppress(FileMissingError):  # an adapter works without its card
        _fetch(repo_id, CARD_NAME, commit)
    return folder


class FileMissingError(AdapterError):
    """The repository is there but lacks one file."""


def _fetch(repo_id: str, name: str, revision: str | None) -> Path:
    at = f"{repo_id!r}" if revision is None else f"{repo_id!r} at revision {revision!r}"
    try:
        return Path(huggingface_hub.hf_hub_download(repo_id, name, revision=revision))
    except errors.GatedRepoError as error:
        raise AdapterError(
            f"{repo_id!r} is gated: accept its terms on its hub page, then log in with `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise AdapterError(
            f"there is no adapter {repo_id!r} on the hub, or it is private: check the spelling, or `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise AdapterError(
            f"{repo_id!r} has no revision {revision!r}: give one of its branches, tags or commits"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise AdapterError(
            f"{name} of {at} is not in the hub's cache and the hub cannot be reached: check the connection and "
            f"HF_ENDPOINT (HF_HUB_OFFLINE=1 allows the cache only) [{_cause(error)}]"
        ) from error
    except errors.EntryNotFoundError as error:
        raise FileMissingError(f"{at} has no {name}: it is not a posthoc adapter") from error
    except errors.HFValidationError as error:
        raise AdapterError(f"{repo_id!r} is not a hub id like 'org/resnet50-kappa': {error}") from error
    except Exception as error:  # the hub's status codes, and whatever its transport library of the day raises
        raise AdapterError(f"{name} of {at} could not be downloaded: {_cause(error)}; try again later") from error


def _cause(error: BaseException) -> str:
    root = error.__cause__ or error
    return f"{type(root).__name__}: {str(root).splitlines()[0] if str(root) else ''}"
