"""The hub's client, with its errors in our words: what was asked for, why it failed, how to mend it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import errors

from ..adapters.errors import AdapterError

LOGIN = "log in with `hf auth login`, or set HF_TOKEN"


class FileMissingError(AdapterError):
    """The repository is there but lacks one file."""


class UnreachableError(AdapterError):
    """The hub gave no answer, or none of sense: a cached copy may do."""


@contextmanager
def told(action: str, repo_id: str, revision: str | None = None, file: str = "") -> Iterator[None]:
    """Raises what the hub's client raises as AdapterError; `action`: what was being done, such as "push to".

    `file`: the one that was asked for.

    FileMissingError where only a file is missing, UnreachableError where trying again later, or a cached copy, may help.
    """
    at = f"{repo_id!r}" if revision is None else f"{repo_id!r} at revision {revision!r}"
    try:
        yield
    except AdapterError:
        raise
    except errors.GatedRepoError as error:
        raise AdapterError(f"{repo_id!r} is gated: accept its terms on its hub page, then {LOGIN}") from error
    except errors.RepositoryNotFoundError as error:
        raise AdapterError(
            f"there is no adapter {repo_id!r} on the hub, or it is private: check the spelling, or {LOGIN}"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise AdapterError(
            f"{repo_id!r} has no revision {revision!r}: give one of its branches, tags or commits"
        ) from error
    except errors.LocalEntryNotFoundError as error:  # which is an EntryNotFoundError too
        raise _unreachable(action, at, error) from error
    except errors.EntryNotFoundError as error:
        raise FileMissingError(f"{at} has no {file or 'such file'}: it is not a posthoc adapter") from error
    except errors.HFValidationError as error:
        raise AdapterError(f"{repo_id!r} is not a hub id like 'org/resnet50-kappa': {error}") from error
    except errors.LocalTokenNotFoundError as error:
        raise AdapterError(f"cannot {action} {at}: nobody is logged in to the hub; {LOGIN}") from error
    except errors.HfHubHTTPError as error:
        raise _refused(action, at, error) from error
    except ValueError as error:  # what the client itself, or the hub through it, finds wrong with what is sent
        raise AdapterError(f"cannot {action} {at}: {' '.join(str(error).split())}") from error
    except (TypeError, AttributeError, NameError, LookupError, AssertionError):
        raise  # a mistake of ours, not of the network's
    except Exception as error:  # whatever the client's transport library of the day raises
        raise _unreachable(action, at, error) from error


def _refused(action: str, at: str, error: errors.HfHubHTTPError) -> AdapterError:
    """What a status of the hub means."""
    status = getattr(error.response, "status_code", None)
    if status in (401, 403):
        return AdapterError(
            f"cannot {action} {at}: the hub refuses this account (status {status}); {LOGIN}, with a token that may do this"
        )
    if status is not None and 400 <= status < 500 and status not in (408, 429):
        return AdapterError(
            f"cannot {action} {at}: the hub says {error.server_message or _cause(error)} (status {status})"
        )
    return _unreachable(action, at, error)


def _unreachable(action: str, at: str, error: BaseException) -> UnreachableError:
    return UnreachableError(
        f"cannot {action} {at}: the hub cannot be reached; check the connection and HF_ENDPOINT, or try again later "
        f"(HF_HUB_OFFLINE=1 allows the cache only) [{_cause(error)}]"
    )


def _cause(error: BaseException) -> str:
    root = error.__cause__ or error
    return f"{type(root).__name__}: {str(root).splitlines()[0] if str(root) else ''}"
