"""adapter_config.json: what an adapter is made of, and the one place that reads it.

An adapter may come from a stranger. Reading one therefore never imports or unpickles anything, takes names only in the
patterns below, and refuses every field that it does not know.
"""

from __future__ import annotations

import dataclasses
import json
import re
import types
import typing
from dataclasses import dataclass, field
from typing import Any, NoReturn

from .errors import AdapterError, suggest

SCHEMA_VERSION = 1
SOURCES = ("timm", "hub", "module")
MAX_DIM = 2**24
MAX_OPTION = 2**20  # no option of a head is a larger whole number; larger ones would only exhaust memory
PATTERNS = {
    "timm": re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*"),
    "hub": re.compile(r"(hf-hub:|hf_hub:)?[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"),
    "module": re.compile(r"[\w.<>-]+"),
    "revision": re.compile(r"[A-Za-z0-9][\w./-]*"),
    "head": re.compile(r"[a-z][a-z0-9-]*"),
    "sha256": re.compile(r"[0-9a-f]{64}"),
}


@dataclass(frozen=True)
class BackboneConfig:
    """The backbone an adapter belongs to.

    source: "timm", "hub" or "module"; name: timm name, hub id or class; fingerprints: SHA-256 by scope ("embedding",
    "logits"), for the scopes that the heads depend on; weights: "pretrained", "checkpoint", "random" or "as given"; the
    layers are those given to `wrap`.
    """

    source: str
    name: str
    fingerprints: dict[str, str]
    embedding_dim: int
    penultimate_dim: int | None
    num_classes: int
    weights: str
    revision: str | None = None
    feature_layer: str | None = None
    classifier_layer: str | bool | None = None


@dataclass(frozen=True)
class HeadConfig:
    """One head: its registered name, kind of score, fingerprint scope, number of classes of the labels it was fitted on
    (0: none), options, a summary of its held-out scores (the quantiles are tensors), and what its fit reported."""

    name: str
    kind: str
    scope: str
    classes: int
    options: dict[str, Any]
    held_out: dict[str, Any]
    report: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class WeightsConfig:
    """The weights file: its length in bytes and its SHA-256, so that damage and exchange are noticed."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class AdapterConfig:
    """Everything in adapter_config.json. `data` and `fit` describe what the heads were fitted on and how."""

    backbone: BackboneConfig
    heads: list[HeadConfig]
    weights: WeightsConfig
    preprocessing: dict[str, Any]
    data: dict[str, Any]
    fit: dict[str, Any]
    versions: dict[str, str]
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> str:
        """Indented JSON, ending in a newline. Raises AdapterError for values that JSON cannot hold."""
        try:
            return json.dumps(dataclasses.asdict(self), indent=2, allow_nan=False) + "\n"
        except (TypeError, ValueError) as error:
            raise AdapterError(f"adapter_config.json cannot hold this adapter's description: {error}") from error

    @classmethod
    def from_json(cls, text: str, where: str = "adapter_config.json") -> AdapterConfig:
        """Read and check a config. Raises AdapterError that names the field, what it holds and what was expected."""
        raw = _parse(text, where)
        version = raw.get("schema_version")
        if version != SCHEMA_VERSION or isinstance(version, bool):
            newer = isinstance(version, int) and version > SCHEMA_VERSION
            hint = "it was written by a newer posthoc: upgrade with `pip install -U posthoc`" if newer else "damaged?"
            raise AdapterError(
                f"{where}: schema_version is {version!r}, this posthoc reads {SCHEMA_VERSION} ({hint}), "
                "or fit the adapter again"
            )
        config = _read(cls, raw, where)
        _check(config, where)
        return config


def _parse(text: str, where: str) -> dict[str, Any]:
    def no_constant(name: str) -> NoReturn:
        raise AdapterError(f"{where}: {name} is not a JSON number")

    def no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if len(set(names)) != len(names):
            twin = next(name for name in names if names.count(name) > 1)
            raise AdapterError(f"{where}: the field {twin!r} stands twice in one object")
        return dict(pairs)

    try:
        raw = json.loads(text, parse_constant=no_constant, object_pairs_hook=no_twins)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{where} is not valid JSON ({error}): it is truncated or damaged, get it again") from error
    if not isinstance(raw, dict):
        raise AdapterError(f"{where} holds a {type(raw).__name__}, expected one JSON object")
    return raw


def _read(kind: Any, value: Any, where: str) -> Any:
    """`value` as the annotated type `kind`: dataclasses, lists, dicts, unions with None, and plain JSON types."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None or type(value) in args:
            return value
        return _read(args[0], value, where)
    if dataclasses.is_dataclass(kind):
        return _read_fields(kind, value, where)
    if origin is list and isinstance(value, list):
        return [_read(args[0], item, f"{where}[{i}]") for i, item in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {name: _read(args[1], item, f"{where}.{name}") for name, item in value.items()}
    if origin is None and type(value) is kind:
        return value
    expected = getattr(origin or kind, "__name__", str(kind))
    raise AdapterError(f"{where} holds {_short(value)}, expected {'an' if expected == 'int' else 'a'} {expected}")


def _read_fields(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise AdapterError(f"{where} holds {_short(value)}, expected an object with fields")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for name in value:
        if name not in fields:
            raise AdapterError(f"{where}: unknown field {_short(name)}: {suggest(name, fields)}")
    required = {n for n, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING}
    missing = sorted(required - value.keys())
    if missing:
        raise AdapterError(f"{where}: the field(s) {', '.join(missing)} are missing: the file is damaged or not ours")
    hints = typing.get_type_hints(kind)
    return kind(**{name: _read(hints[name], item, f"{where}: {name}") for name, item in value.items()})


def _check(config: AdapterConfig, where: str) -> None:
    backbone = config.backbone
    if backbone.source not in ("timm", "hub", "module"):
        raise AdapterError(
            f"{where}: backbone source {_short(backbone.source)}: {suggest(backbone.source, ('timm', 'hub', 'module'))}"
        )
    _match(backbone.source, backbone.name, f"{where}: backbone name")
    if backbone.revision is not None:
        _match("revision", backbone.revision, f"{where}: backbone revision")
    for name, value in (("embedding_dim", backbone.embedding_dim), ("penultimate_dim", backbone.penultimate_dim)):
        if value is not None and not 1 <= value <= MAX_DIM:
            raise AdapterError(f"{where}: {name} is {value}, expected 1 to {MAX_DIM}")
    if not 0 <= backbone.num_classes <= MAX_DIM:
        raise AdapterError(f"{where}: num_classes is {backbone.num_classes}, expected 0 to {MAX_DIM}")
    for digest in [*backbone.fingerprints.values(), config.weights.sha256]:
        _match("sha256", digest, f"{where}: fingerprint")
    if not config.heads:
        raise AdapterError(f"{where} names no head")
    names = [head.name for head in config.heads]
    if len(set(names)) != len(names):
        raise AdapterError(f"{where}: a head stands twice among {', '.join(names)}")
    for head in config.heads:
        _match("head", head.name, f"{where}: head name")
        if head.scope not in backbone.fingerprints:
            raise AdapterError(f"{where}: head {head.name!r} has the scope {head.scope!r}, which has no fingerprint")
        if not 0 <= head.classes <= MAX_DIM:
            raise AdapterError(f"{where}: classes of head {head.name!r} is {head.classes}, expected 0 to {MAX_DIM}")
        for option, value in head.options.items():
            if isinstance(value, int) and abs(value) > MAX_OPTION:
                raise AdapterError(f"{where}: option {option} of head {head.name!r} is {value}, above {MAX_OPTION}")


def _match(pattern: str, value: str, where: str) -> None:
    if len(value) > 200 or not PATTERNS[pattern].fullmatch(value):
        raise AdapterError(f"{where} {_short(value)} is not a {pattern} name: the file is damaged or not to be trusted")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
