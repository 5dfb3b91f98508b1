"""Find adapters on the hub, by the tags and the base model that their cards state."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from huggingface_hub import HfApi

from ..adapters.card import base_model
from ..adapters.errors import OptionError, suggest
from ..adapters.heads import HEADS
from .client import told

BASE_MODEL = "base_model:"


@dataclass(frozen=True)
class Found:
    """An adapter on the hub: its id, heads, base model ("" where it is a module of somebody's own), and what the hub counts."""

    repo_id: str
    heads: tuple[str, ...]
    base_model: str
    downloads: int
    likes: int
    last_modified: datetime | None


def list_adapters(
    query: str | None = None,
    *,
    backbone: str | None = None,
    head: str | None = None,
    author: str | None = None,
    limit: int = 50,
) -> list[Found]:
    """Adapters on the hub, the most downloaded first; `posthoc.hub.search` is the same.

    Args:
        query: words of the id.
        backbone: timm name ("resnet50.a1_in1k") or hub id that they belong to.
        head: "kappa", "loss", ...
        author: user or organisation.
        limit: at most so many.

    Raises OptionError for an unknown head, AdapterError when the hub cannot be reached.
    """
    if head is not None and head not in HEADS:
        raise OptionError(f"there is no head {head!r}: {suggest(head, HEADS)}")
    if limit < 1:
        raise OptionError(f"limit={limit} was given; expected at least 1")
    wanted = ["posthoc", *([] if head is None else [head])]
    if backbone is not None:
        wanted.append(BASE_MODEL + base_model(backbone))
    with told("search the hub for", query or "adapters"):
        models = HfApi().list_models(
            filter=wanted, search=query, author=author, sort="downloads", limit=limit, full=True
        )
        return [
            Found(
                one.id,
                tuple(tag for tag in one.tags or [] if tag in HEADS),
                next((tag.removeprefix(BASE_MODEL) for tag in one.tags or [] if _is_base(tag)), ""),
                one.downloads or 0,
                one.likes or 0,
                one.last_modified,
            )
            for one in models
        ]


def _is_base(tag: str) -> bool:
    """The hub adds tags base_model:RELATION:ID; an id holds no colon."""
    return tag.startswith(BASE_MODEL) and tag.count(":") == 1
