"""Publish an adapter: its weights, its config, its card and what was measured of it, in one commit."""

from __future__ import annotations

import warnings
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, errors, hf_hub_download

from ..adapters.card import WORDS, render_card
from ..adapters.card_sections import descends, holds_edits
from ..adapters.config import AdapterConfig
from ..adapters.errors import AdapterError
from ..adapters.files import (
    CARD_NAME,
    CONFIG_NAME,
    WEIGHTS_NAME,
    commit_of,
    read_card,
    read_config,
    read_weights,
    replace_file,
)
from .client import UnreachableError, told
from .evaluation import FOLDER, OURS, RESULTS, evaluation_files, published_file, read_evaluation
from .pulling import COMMIT
from .zoo import hub_id

TRIES = 8
"""How often a commit is made anew because somebody else's came in between."""


def push(
    folder: str | Path,
    repo_id: str,
    *,
    revision: str | None = None,
    private: bool | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    license: str | None = None,
) -> str:
    """Publish the adapter of a folder in one commit, and return the commit's address.

    Only the adapter's files go: weights, config, card, and of `evaluation/` its results.json and plots. Files that the hub
    has already are not sent again; without any change there is no new commit. What was edited in the hub's card stays; what was
    edited in the folder's goes along. The folder's card is the pushed one afterwards.

    Args:
        repo_id: "org/name"; the repository is made if there is none.
        revision: branch to commit to, made from main if there is none; None: main.
        private: of a new repository; None: as the account's default is.
        create_pr: open a pull request instead of committing.
        license: the hub's word for the adapter's licence, such as "mit"; None: what the card says.

    Raises AdapterError: the folder holds no sound adapter, its evaluation is of another one, the hub refuses.
    """
    folder = Path(folder)
    config = read_config(folder)
    read_weights(folder, config.weights)  # nothing that could not be loaded is published
    evaluation = read_evaluation(folder, config)
    if revision is not None and COMMIT.fullmatch(revision):
        raise AdapterError(f"revision {revision!r} is a commit, which nothing can be added to: give a branch")
    api = HfApi()
    with told("create the repository", repo_id):
        repo_id = api.create_repo(hub_id(repo_id), private=private, exist_ok=True).repo_id
    if revision is not None:
        with told(f"make the branch {revision!r} of", repo_id):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
    message = commit_message or f"{', '.join(head.name for head in config.heads)} on {config.backbone.name}"
    names = [WEIGHTS_NAME, CONFIG_NAME, *evaluation_files(folder)]
    own = read_card(folder)
    for _ in range(TRIES):
        parent, theirs, stale = _there(api, repo_id, revision, names, private)
        card, whole = _card(config, repo_id, own, theirs, evaluation=evaluation, license=license)
        operations: list[Any] = [CommitOperationAdd(name, published_file(folder, name)) for name in names]
        operations += [CommitOperationAdd(CARD_NAME, card.encode()), *map(CommitOperationDelete, stale)]
        try:
            with told("push to", repo_id, revision):
                commit = api.create_commit(
                    repo_id,
                    operations,
                    commit_message=message,
                    revision=revision,
                    create_pr=create_pr,
                    parent_commit=parent,
                )
        except AdapterError as error:
            if _came_between(error):
                continue
            raise
        if whole and commit_of(folder) is None:  # a folder of the hub's cache stays as it was downloaded
            with suppress(
                OSError
            ):  # the next push knows what was edited since; a folder that cannot be written was not
                replace_file(folder / CARD_NAME, card.encode())
        return str(commit.pr_url if create_pr else commit.commit_url)
    raise UnreachableError(f"others committed to {repo_id!r} {TRIES} times while this was pushed: push again")


def _there(
    api: HfApi, repo_id: str, revision: str | None, names: list[str], private: bool | None
) -> tuple[str, str | None, list[str]]:
    """The commit that is there, its card, and files of an earlier evaluation that the new adapter does not have."""
    with told("look up", repo_id, revision), TemporaryDirectory() as place:
        info = api.model_info(repo_id, revision=revision)
        if private and not info.private:
            raise AdapterError(f"{repo_id!r} is there already and is public: nothing was pushed; make it private first")
        assert info.sha is not None
        files = [one.rfilename for one in info.siblings or []]
        card = None
        if CARD_NAME in files:
            hf_hub_download(repo_id, CARD_NAME, revision=info.sha, local_dir=place)
            card = read_card(place)
    stale = [name for name in files if OURS.fullmatch(name) and name not in names]
    return info.sha, card, stale if f"{FOLDER}/{RESULTS}" in files else []


def _card(config: AdapterConfig, repo_id: str, own: str | None, theirs: str | None, **given: Any) -> tuple[str, bool]:
    """The card to push, and whether it holds all that was edited in the folder's.

    Of two cards with edits the later one is taken. Where neither came from the other the hub's is, with a warning.
    """
    fresh = render_card(config, address=repo_id, **given)
    previous, whole = own, True
    if theirs is not None and (own is None or not holds_edits(own, fresh, WORDS)):
        previous = theirs
    elif own is not None and theirs is not None and holds_edits(theirs, fresh, WORDS) and not descends(own, theirs):
        previous, whole = theirs, descends(theirs, own)
        if not whole:
            warnings.warn(
                f"{CARD_NAME} was edited both here and on the hub: the hub's edits stay; those of the folder's were not pushed, "
                "and stay there",
                UserWarning,
                stacklevel=4,
            )
    return render_card(config, address=repo_id, previous=previous, **given), whole


def write_card(folder: Path, address: str) -> None:
    """Write the card of a folder anew, with what was measured since; `address`: what its example loads."""
    config = read_config(folder)
    evaluation = read_evaluation(folder, config)
    card = render_card(config, address=address, previous=read_card(folder), evaluation=evaluation)
    replace_file(folder / CARD_NAME, card.encode())


def _came_between(error: AdapterError) -> bool:
    """Whether the hub refused the commit because its parent is not the newest any more."""
    cause = error.__cause__
    return isinstance(cause, errors.HfHubHTTPError) and getattr(cause.response, "status_code", None) in (409, 412)


def push_model(model: Any, repo_id: str, *, evaluation: str | Path | None = None, **options: Any) -> str:
    """The same for a model in memory; `evaluation`: a folder that `posthoc eval report --output` wrote."""
    from .evaluation import copy_evaluation

    with TemporaryDirectory() as place:
        folder = Path(place)
        model.save_pretrained(folder)
        if evaluation is not None:
            copy_evaluation(Path(evaluation), folder)
        return push(folder, repo_id, **options)
