"""The backbone that the options of a command name for an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .errors import OptionError


def read_adapter(address: str, revision: str | None) -> Any:
    """The checked configuration of an adapter in a folder or on the hub."""
    from .files import read_config
    from .locate import locate

    return read_config(locate(address, revision))


def named_backbone(adapter: str, revision: str | None, backbone: str | None, checkpoint: Path | None) -> Any:
    """The backbone as far as the options name one; None: as the adapter names it.

    Raises OptionError for a checkpoint of a network that no name stands for.
    """
    if checkpoint is None:
        return backbone
    from .backbone import build_backbone

    described = read_adapter(adapter, revision).backbone
    if backbone is None and described.source == "module":
        raise OptionError(
            "this adapter belongs to a module of one's own: load it in Python with posthoc.load(..., backbone=...)"
        )
    return build_backbone(backbone or described.name, checkpoint=checkpoint)
