"""The README.md of an adapter: what it is, in facts."""

from __future__ import annotations

import json

from .config import AdapterConfig, BackboneConfig


def render_card(config: AdapterConfig) -> str:
    """Markdown with a metadata block: heads, backbone, fingerprints, data, held-out numbers, how to load it."""
    backbone = config.backbone
    lines = [
        "---",
        "library_name: posthoc",
        f"tags: {json.dumps(['uncertainty', *(head.name for head in config.heads)])}",
        *_base_model(backbone),
        "---",
        "",
        f"# Uncertainty for {backbone.name}",
        "",
        "Scores for the images of one frozen backbone: one uncertainty per image and head, higher = less certain.",
        "",
        "```python",
        "import posthoc",
        "",
        f'model = posthoc.load("this folder or its hub id"{_backbone_argument(backbone)})',
        "prediction = model(images)  # .uncertainty, .percentile",
        "```",
        "",
        "## Heads",
        "",
        "| head | kind | held-out rows | median score | 95 % of scores up to | at a bound |",
        "|---|---|---|---|---|---|",
    ]
    for head in config.heads:
        held = head.held_out
        bound = head.report.get("share_at_bound")
        cells = [head.name, head.kind, _number(held.get("rows")), _number(held.get("median"))]
        cells += [_number(held.get("q95")), "" if bound is None else f"{bound:.1%}"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "## Backbone", "", f"- {backbone.source}: `{backbone.name}`, embedding of {backbone.embedding_dim}"]
    lines += [f"- fingerprint ({scope}): `{digest}`" for scope, digest in sorted(backbone.fingerprints.items())]
    lines += ["", "The adapter refuses a backbone whose fingerprint differs.", "", "## Fitted on", ""]
    lines += [f"- {name}: {json.dumps(value)}" for name, value in {**config.data, **config.fit}.items()]
    versions = ", ".join(f"{name} {version}" for name, version in config.versions.items())
    return "\n".join([*lines, "", f"Written with {versions}.", ""])


def _base_model(backbone: BackboneConfig) -> list[str]:
    if backbone.source == "timm":
        return [f"base_model: timm/{backbone.name}"]
    if backbone.source == "hub":
        return [f"base_model: {backbone.name.removeprefix('hf-hub:').removeprefix('hf_hub:')}"]
    return []


def _backbone_argument(backbone: BackboneConfig) -> str:
    return ", backbone=your_model" if backbone.source == "module" or backbone.weights != "pretrained" else ""


def _number(value: object) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else ""
