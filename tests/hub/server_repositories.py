"""The hub's addresses for repositories: who asks, lists, making and describing one, its branches, tags and history."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from .server_protocol import (
    API,
    KINDS,
    PAGE,
    PREFIXES,
    HubError,
    Protocol,
    Request,
    Response,
    as_json,
    date,
    page,
    route,
)
from .server_store import card_metadata, tags_of


@route("GET", "/api/whoami-v2")
def whoami(hub: Protocol, request: Request, at: dict[str, str]) -> Response:
    user = hub.user(request)
    if user is None:
        raise HubError(401, "Invalid username or password.")
    token = {"type": "access_token", "accessToken": {"displayName": "tests", "role": "write"}}
    return as_json({"type": "user", "id": user, "name": user, "fullname": user, "orgs": [], "auth": token})


@route("POST", "/api/validate-yaml")
def validate_yaml(hub: Protocol, request: Request, at: dict[str, str]) -> Response:
    """A card's metadata is checked before it is pushed: errors forbid it, warnings do not."""
    try:
        card = card_metadata(request.json()["content"])
    except yaml.YAMLError as error:
        return as_json({"errors": [{"message": f"the metadata is not YAML: {error}"}], "warnings": []}, 400)
    if not card:
        return as_json({"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]})
    wrong = [name for name in ("license", "library_name", "pipeline_tag") if not isinstance(card.get(name, ""), str)]
    lists = [name for name in ("tags", "datasets", "base_model", "language", "metrics") if name in card]
    wrong += [name for name in lists if not _is_text_or_list(card[name])]
    results = card.get("model-index", [])
    if not isinstance(results, list) or any("name" not in row or "results" not in row for row in results):
        wrong.append("model-index")
    errors = [{"message": f'"{name}" is not of the type the metadata asks for'} for name in wrong]
    return as_json({"errors": errors, "warnings": []}, 400 if errors else 200)


def _is_text_or_list(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(v, str) for v in value))


@route("GET", r"/api/(?P<kinds>models|datasets|spaces)")
def list_repositories(hub: Protocol, request: Request, at: dict[str, str]) -> Response:
    """Those the user may see, the last changed first: of an author, with all tags of `filter`, `search` in the id."""
    user, kind, query = hub.user(request), KINDS[at["kinds"]], request.query
    wanted = set(query.get("filter", []) + query.get("pipeline_tag", []))
    rows = []
    for repository in hub.store.repositories.values():
        if repository.kind != kind or (repository.private and user not in repository.members):
            continue
        commit = hub.commit(repository, "main")
        tags = tags_of(hub.store.card(commit), commit.files)
        author = request.first("author")
        fits = wanted <= set(tags) and (not author or repository.id.startswith(f"{author}/"))
        if fits and request.first("search").lower() in repository.id.lower():
            rows.append(
                (commit.date, hub.info(request, repository, commit, "full" if request.flag("full") else "short"))
            )
    rows.sort(key=lambda row: row[0], reverse=True)
    return page(request, [row for _, row in rows], int(request.first("limit") or PAGE))


# A repository: made, changed, deleted, described.


@route("POST", "/api/repos/create")
def create(hub: Protocol, request: Request, at: dict[str, str]) -> Response:
    user, asked = hub.user(request), request.json()
    if user is None:
        raise HubError(401, "Invalid username or password.")
    kind, namespace = asked.get("type") or "model", asked.get("organization") or user
    repo_id = f"{namespace}/{asked['name']}"
    if user not in ("owner", namespace):
        raise HubError(403, f'You don\'t have the rights to create a {kind} under the namespace "{namespace}"')
    found = {"url": f"{request.base}/{PREFIXES[kind]}{repo_id}", "name": repo_id, "id": repo_id}
    if (kind, repo_id) in hub.store.repositories:
        return as_json({"error": f"You already created this {kind} repo: {repo_id}", **found}, 409)
    private = asked.get("visibility") == "private" or asked.get("private") is True
    hub.store.create(kind, repo_id, user, private)
    return as_json(found)


@route("DELETE", "/api/repos/delete")
def delete(hub: Protocol, request: Request, at: dict[str, str]) -> Response:
    asked = request.json()
    kind, repo_id = asked.get("type") or "model", f"{asked.get('organization') or hub.user(request)}/{asked['name']}"
    hub.repository(request, {"kinds": f"{kind}s", "id": repo_id}, write=True)
    del hub.store.repositories[kind, repo_id]
    return as_json({})


@route("PUT", f"{API}/settings")
def settings(hub: Protocol, request: Request, at: dict[str, str]) -> Response:
    repository, asked = hub.repository(request, at, write=True), request.json()
    repository.gated = asked.get("gated", repository.gated)
    if "visibility" in asked:
        repository.private = asked["visibility"] == "private"
    return as_json({"private": repository.private, "gated": repository.gated})


@route("GET", rf"{API}(?:/revision/(?P<revision>[^/]+))?")
def describe(hub: Protocol, request: Request, at: dict[str, str]) -> Response:
    repository = hub.repository(request, at)
    return as_json(hub.info(request, repository, hub.commit(repository, at.get("revision", "main"))))


@route("GET", f"{API}/auth-check")
def auth_check(hub: Protocol, request: Request, at: dict[str, str]) -> Response:
    hub.readable(request, at)
    return as_json({})


# Branches, tags and history.


@route("GET", f"{API}/refs")
def refs(hub: Protocol, request: Request, at: dict[str, str]) -> Response:
    repository = hub.repository(request, at)

    def rows(found: Mapping[str, str], folder: str) -> list[dict[str, str]]:
        return [{"name": name, "ref": f"refs/{folder}/{name}", "targetCommit": oid} for name, oid in found.items()]

    answer = {"branches": rows(repository.branches, "heads"), "tags": rows(repository.tags, "tags"), "converts": []}
    if request.flag("include_prs"):
        answer["pullRequests"] = rows({str(n): oid for n, oid in repository.pulls.items()}, "pr")
    return as_json(answer)


@route("GET", rf"{API}/commits/(?P<revision>[^/]+)")
def commits(hub: Protocol, request: Request, at: dict[str, str]) -> Response:
    repository = hub.repository(request, at)
    rows = [
        {"id": c.oid, "title": c.title, "message": c.message, "authors": [{"user": c.author}], "date": date(c.date)}
        for c in repository.history(hub.commit(repository, at["revision"]))
    ]
    return page(request, rows)


@route("POST DELETE", rf"{API}/(?P<what>branch|tag)/(?P<revision>[^/]+)")
def branch_or_tag(hub: Protocol, request: Request, at: dict[str, str]) -> Response:
    """Deleting names the branch or tag; making a branch too, but making a tag names what is tagged."""
    repository, asked = hub.repository(request, at, write=True), request.json()
    known = repository.branches if at["what"] == "branch" else repository.tags
    if request.method == "DELETE":
        if at["revision"] not in known:
            raise HubError(404, f"Invalid rev id: {at['revision']}", "RevisionNotFound")
        del known[at["revision"]]
        return as_json({})
    name, start = at["revision"], asked.get("startingPoint") or "main"
    if at["what"] == "tag":
        name, start = asked["tag"], name
    if name in known:
        raise HubError(409, f"Reference already exists: {name}")
    known[name] = hub.commit(repository, start).oid
    return as_json({})
