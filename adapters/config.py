"""adapter_config.json: what an adapter is made of, and the one place that reads it.

An adapter may come from a stranger. Reading one therefore never imports or unpickles anything, takes names only in the
patterns below, and refuses every field that it does not know.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
import types
import typing
from dataclasses import dataclass, field
from typing import Any, NoReturn

from .errors import AdapterError, suggest
from .migrations import migrate

SCHEMA_VERSION = 1
SOURCES = ("timm", "hub", "module")
SCOPES = ("embedding", "logits")
WEIGHTS = ("pretrained", "checkpoint", "random", "as given")
MAX_DIM = 2**24
MAX_OPTION = 2**20  # no option of a head is a larger whole number; larger ones would only exhaust memory
MAX_NUMBER = 1e30  # what a float32 holds with room for a product
MAX_DEPTH = 32  # of lists and objects in each other; what works on a deeper value may run out of stack
MAX_NAME = 200
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")  # moves a terminal's cursor, or is no text at all
PATTERNS = {
    "timm": re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*"),
    "hub": re.compile(r"(hf-hub:|hf_hub:)?[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"),
    "module": re.compile(r"[\w.<>-]+"),
    "revision": re.compile(r"(?!.*\.\.)[A-Za-z0-9][\w.-]*(/[\w-][\w.-]*)*"),  # the hub's cache makes a path of it
    "head": re.compile(r"[a-z][a-z0-9-]*"),
    "sha256": re.compile(r"[0-9a-f]{64}"),
    "version": re.compile(r"[A-Za-z0-9][\w.+!-]*"),
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
        raw = migrate(_parse(text, where), SCHEMA_VERSION, where)
        config = _read(cls, raw, where)
        _check(config, where)
        return config


def _parse(text: str, where: str) -> dict[str, Any]:
    def no_constant(name: str) -> NoReturn:
        raise AdapterError(f"{where}: {name} is not a JSON number")

    def no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            twin = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
            raise AdapterError(f"{where}: the field {_short(twin)} stands twice in one object")
        return found

    def finite(number: str) -> float:
        value = float(number)
        if math.isinf(value):  # 1e999, which Python reads as infinity
            raise AdapterError(f"{where}: {_short(number)} is too large a number")
        return value

    try:
        raw = json.loads(text, parse_constant=no_constant, parse_float=finite, object_pairs_hook=no_twins)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{where} is not valid JSON ({error}): it is truncated or damaged, get it again") from error
    if not isinstance(raw, dict):
        raise AdapterError(f"{where} holds a {type(raw).__name__}, expected one JSON object")
    _check_values(raw, where)
    return raw


def _check_values(raw: dict[str, Any], where: str) -> None:
    """Depth, characters and numbers of everything in the file, so that whatever works on it later need not ask."""
    level: list[Any] = [raw]
    for _ in range(MAX_DEPTH):
        for value in level:
            for text in value if isinstance(value, dict) else [value]:
                if isinstance(text, str) and CONTROL.search(text):
                    raise AdapterError(f"{where}: the text {_short(text)} holds control characters or broken ones")
            if type(value) is int and abs(value) >= 2**63:
                raise AdapterError(f"{where}: a whole number of {value.bit_length()} bits is too large")
        level = [
            item for v in level if isinstance(v, dict | list) for item in (v.values() if isinstance(v, dict) else v)
        ]
        if not level:
            return
    raise AdapterError(f"{where}: more than {MAX_DEPTH} lists and objects in each other")


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
        return {name: _read(args[1], item, f"{where}.{_short(name)}") for name, item in value.items()}
    if origin is None and type(value) is kind:
        return value
    expected = getattr(origin or kind, "__name__", str(kind))
    raise AdapterError(f"{where} holds {_short(value)}, expected {'an' if expected == 'int' else 'a'} {expected}")


_hints = functools.cache(typing.get_type_hints)  # evaluates the annotations, which are text


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
    hints = _hints(kind)
    return kind(**{name: _read(hints[name], item, f"{where}: {name}") for name, item in value.items()})


def _check(config: AdapterConfig, where: str) -> None:
    _check_backbone(config.backbone, where)
    _match("sha256", config.weights.sha256, f"{where}: fingerprint")
    for version in config.versions.values():
        _match("version", version, f"{where}: version")
    if not config.heads:
        raise AdapterError(f"{where} names no head")
    names = [head.name for head in config.heads]
    for name in names:
        _match("head", name, f"{where}: head name")
    if len(set(names)) != len(names):
        raise AdapterError(f"{where}: a head stands twice among {', '.join(names)[:200]}")
    for head in config.heads:
        if head.scope not in config.backbone.fingerprints:
            raise AdapterError(
                f"{where}: head {head.name!r} has the scope {_short(head.scope)}, which has no fingerprint"
            )
        _check_head(head, where)


def _check_backbone(backbone: BackboneConfig, where: str) -> None:
    if backbone.source not in SOURCES:
        raise AdapterError(f"{where}: backbone source {_short(backbone.source)}: {suggest(backbone.source, SOURCES)}")
    if backbone.weights not in WEIGHTS:
        raise AdapterError(
            f"{where}: backbone weights {_short(backbone.weights)}: {suggest(backbone.weights, WEIGHTS)}"
        )
    _match(backbone.source, backbone.name, f"{where}: backbone name")
    if backbone.revision is not None:
        _match("revision", backbone.revision, f"{where}: backbone revision")
    for layer in (backbone.feature_layer, backbone.classifier_layer):
        if layer is True or (isinstance(layer, str) and not 1 <= len(layer) <= MAX_NAME):
            raise AdapterError(f"{where}: {_short(layer)} is not the name of a layer")
    for name, value in (("embedding_dim", backbone.embedding_dim), ("penultimate_dim", backbone.penultimate_dim)):
        if value is not None and not 1 <= value <= MAX_DIM:
            raise AdapterError(f"{where}: {name} is {value}, expected 1 to {MAX_DIM}")
    if not 0 <= backbone.num_classes <= MAX_DIM:
        raise AdapterError(f"{where}: num_classes is {backbone.num_classes}, expected 0 to {MAX_DIM}")
    for scope, digest in backbone.fingerprints.items():
        if scope not in SCOPES:
            raise AdapterError(f"{where}: fingerprint of {_short(scope)}: {suggest(scope, SCOPES)}")
        _match("sha256", digest, f"{where}: fingerprint")


def _check_head(head: HeadConfig, where: str) -> None:
    if not 0 <= head.classes <= MAX_DIM:
        raise AdapterError(f"{where}: classes of head {head.name!r} is {head.classes}, expected 0 to {MAX_DIM}")
    for option, value in head.options.items():
        told = f"{where}: option {_short(option)[1:-1]} of head {head.name!r}"
        if isinstance(value, list | dict) or (isinstance(value, str) and len(value) > MAX_NAME):
            raise AdapterError(f"{told} is {_short(value)}, expected one number, word or null")
        if isinstance(value, int) and abs(value) > MAX_OPTION:
            raise AdapterError(f"{told} is {value}, above {MAX_OPTION}")
        if isinstance(value, float) and abs(value) > MAX_NUMBER:
            raise AdapterError(f"{told} is {value}, above {MAX_NUMBER}")
    bound = head.report.get("share_at_bound")
    if bound is not None and not (type(bound) in (int, float) and 0 <= bound <= 1):
        raise AdapterError(f"{where}: share_at_bound of head {head.name!r} is {_short(bound)}, expected 0 to 1")


def _match(pattern: str, value: str, where: str) -> None:
    if len(value) > MAX_NAME or not PATTERNS[pattern].fullmatch(value):
        raise AdapterError(f"{where} {_short(value)} is not a {pattern} name: the file is damaged or not to be trusted")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
