"""Sections of a card, and how what a user changed in it outlives the next save.

A section stands between `<!-- posthoc:NAME DIGEST -->` and `<!-- /posthoc:NAME -->`; the digest is of its text as it was
written. Where it no longer fits, a user has changed the section. The last line holds digests of all the rest, one for each
time that the card was written with another: which of two cards came from the other can be told by them.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Collection, Sequence
from typing import Any

import yaml

from .errors import AdapterError

SECTION = re.compile(
    r"<!-- posthoc:(?P<name>[a-z]+)(?: (?P<digest>[0-9a-f]{12}))? -->\n(?P<body>.*?)<!-- /posthoc:(?P=name) -->", re.S
)
MADE_BY = "posthoc"
"""The argument that marks a result in the metadata as ours to replace."""
LINEAGE = re.compile(r"\s*<!-- posthoc(?P<digests>( [0-9a-f]{12})+) -->\s*\Z")
LONGEST = 20
"""Digests that are kept of a card's past."""
HEADER = re.compile(r"\A---\n(?P<yaml>.*?)\n---\n", re.S)


def seal(card: str) -> str:
    """The card with the digest of every section's text in its opening marker, and that of the rest in its last line."""
    return _signed(SECTION.sub(lambda found: _section(found["name"], found["body"]), card), ())


def holds_edits(card: str, fresh: str, words: Collection[str] = ()) -> bool:
    """Whether anything in a card is a user's: whether `merge` into a fresh one makes another of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return LINEAGE.sub("", merge(card, fresh, words)) != LINEAGE.sub("", merge(fresh, fresh, words))


def descends(card: str, ancestor: str) -> bool:
    """Whether a card is one of before with what was written and edited since."""
    return _rest(ancestor) in (*_lineage(card), _rest(card))


def merge(previous: str, fresh: str, words: Collection[str] = ()) -> str:
    """The fresh card, with what a user wrote into the previous one.

    Text outside the sections is the previous card's. A section that was changed, or taken out, stays so; a warning names
    those that were changed. The metadata's fields and tags that are not in the fresh card stay, save tags among `words`,
    which only posthoc sets, and so do results that posthoc did not measure. A previous card without a section of ours is a
    user's own: its text stands below the fresh one's.
    """
    previous = previous.replace("\r\n", "\n")
    new = {found["name"]: found[0] for found in SECTION.finditer(fresh)}
    kept = _changed(previous)
    if kept:
        warnings.warn(
            f"the card's section(s) {', '.join(kept)} were changed by hand and stay as they are; delete them to get them anew",
            UserWarning,
            stacklevel=3,
        )

    def renewed(found: re.Match[str]) -> str:
        return found[0] if found["name"] in kept else new.get(found["name"], found[0])

    text = LINEAGE.sub("", _split(previous)[1])
    if SECTION.search(text):
        text = SECTION.sub(renewed, text)
    else:
        text = f"{LINEAGE.sub('', _split(fresh)[1]).rstrip()}\n\n{text.strip()}"
    card = f"---\n{_merged(metadata(previous), metadata(fresh), words)}\n---\n{text.rstrip()}\n"
    return _signed(card, (*_lineage(previous), _rest(previous)))


def metadata(card: str) -> dict[str, Any]:
    """The block on top of a card; empty where there is none. Raises AdapterError where it is not YAML."""
    header = _split(card)[0]
    try:
        found = yaml.safe_load(header)
    except yaml.YAMLError as error:
        raise AdapterError(
            f"the block on top of the card is not YAML ({str(error).splitlines()[0]}): mend README.md, or delete it to get "
            "a new one"
        ) from error
    return found if isinstance(found, dict) else {}


def _changed(card: str) -> list[str]:
    """Names of the sections whose text is not what was written."""
    return [found["name"] for found in SECTION.finditer(card) if found["digest"] != _digest(found["body"])]


def _signed(card: str, past: Sequence[str]) -> str:
    card = LINEAGE.sub("", card).rstrip() + "\n"
    digests = [digest for digest in dict.fromkeys(past) if digest != _rest(card)]
    return f"{card}\n<!-- posthoc {' '.join([*digests, _rest(card)][-LONGEST:])} -->\n"


def _lineage(card: str) -> list[str]:
    found = LINEAGE.search(card)
    return [] if found is None else found["digests"].split()


def _rest(card: str) -> str:
    """Digest of what a user may have changed: everything but the sections as they were written."""
    card = card.replace("\r\n", "\n")
    changed = _changed(card)
    rest = SECTION.sub(lambda found: found[0] if found["name"] in changed else "", LINEAGE.sub("", card))
    return _digest(rest.strip())


def _section(name: str, body: str) -> str:
    return f"<!-- posthoc:{name} {_digest(body)} -->\n{body}<!-- /posthoc:{name} -->"


def _digest(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()[:12]


def _split(card: str) -> tuple[str, str]:
    """The metadata block and the text below it."""
    card = card.removeprefix("\ufeff").replace("\r\n", "\n")
    found = HEADER.match(card)
    return ("", card) if found is None else (found["yaml"], card[found.end() :])


def _merged(old: dict[str, Any], new: dict[str, Any], words: Collection[str]) -> str:
    """Fields of both, the fresh ones first; tags of both; results of the fresh card and those that others gave."""
    tags = old.get("tags")
    merged = {**new, **{key: value for key, value in old.items() if key not in new}}
    kept = [tag for tag in tags if tag not in words] if isinstance(tags, list) else []
    merged["tags"] = list(dict.fromkeys([*new["tags"], *kept]))
    results = [*_results(new), *_of_others(_results(old))]
    merged.pop("model-index", None)
    if results:
        name = (new.get("model-index") or old["model-index"])[0].get("name", "")
        merged["model-index"] = [{"name": name, "results": results}]
    return yaml.safe_dump(merged, sort_keys=False, allow_unicode=True).rstrip()


def _results(card: dict[str, Any]) -> list[dict[str, Any]]:
    index = card.get("model-index")
    if not isinstance(index, list) or not index or not isinstance(index[0], dict):
        return []
    return [one for one in index[0].get("results") or [] if isinstance(one, dict)]


def _of_others(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The results without the metrics that posthoc measured."""
    kept = []
    for one in results:
        metrics = [
            m for m in one.get("metrics") or [] if isinstance(m, dict) and not (m.get("args") or {}).get(MADE_BY)
        ]
        if metrics:
            kept.append({**one, "metrics": metrics})
    return kept
