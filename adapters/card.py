"""The README.md of an adapter: what it measures and does not, how to use it, what was measured, in facts.

The text is `card_template.md` beside this file. What stands between its markers is written anew with every save; what a
user wrote elsewhere, or changed there, stays (`card_sections`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .card_sections import MADE_BY, merge, metadata, seal
from .config import AdapterConfig, BackboneConfig, HeadConfig

TEMPLATE = Path(__file__).with_name("card_template.md")
KINDS = ("aleatoric", "decision", "total", "epistemic")
MEASURES: dict[str, tuple[str, str]] = {
    "kappa": (
        "how ambiguous the image itself is: the spread of a von Mises-Fisher distribution around its embedding",
        "whether the backbone has seen such images",
    ),
    "temperature": (
        "how hard the image is to tell from others: the temperature its similarities call for",
        "whether the backbone has seen such images",
    ),
    "loss": (
        "how wrong the classifier's decision is likely to be: its predicted loss",
        "mistakes on classes it was not fitted with",
    ),
    "laplace": (
        "all of the doubt about the class: the entropy of the prediction over a posterior of the last layer's weights "
        "(`mutual_information` is the part that more data would take away)",
        "doubt in the layers below, which are taken as they are",
    ),
    "metric-laplace": (
        "how far the embedding moves over a posterior of the layer that makes it",
        "ambiguity that more data would leave",
    ),
}


WORDS = frozenset({*MEASURES, *KINDS})
"""Tags that posthoc alone sets."""


@dataclass(frozen=True)
class Measured:
    """One figure of an evaluation: `value` of a metric of a head's score on a data set, and its 95 % interval."""

    head: str
    task: str
    data: str
    metric: str
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Evaluation:
    """What was measured of an adapter: figures, tables in Markdown, and paths of plots within its folder."""

    measured: Sequence[Measured]
    tables: str
    plots: Sequence[str] = ()


def render_card(
    config: AdapterConfig,
    *,
    address: str = "path/to/this/folder",
    evaluation: Evaluation | None = None,
    license: str | None = None,
    previous: str | None = None,
) -> str:
    """The card as Markdown with the hub's metadata block on top.

    Args:
        address: what `posthoc.load` is given in the example: a hub id or a folder.
        evaluation: figures, which go into the metadata as results, tables and plots.
        license: the hub's word for it, such as "mit".
        previous: a card of before, whose edits are kept; so is its licence unless another is given.
    """
    from huggingface_hub import ModelCard

    if previous is not None and license is None:
        stated = metadata(previous).get("license")
        license = stated if isinstance(stated, str) else None
    backbone = config.backbone
    card = ModelCard.from_template(
        _metadata(config, evaluation, license),
        template_path=str(TEMPLATE),
        backbone=backbone,
        heads=[_row(head) for head in config.heads],
        address=address,
        backbone_argument=_backbone_argument(backbone),
        coverage=_coverage(config.heads[0].held_out.get("rows")),
        tables="" if evaluation is None else evaluation.tables,
        plots=[{"path": path, "name": Path(path).stem.replace("_", " ")} for path in _plots(evaluation)],
        revision="" if backbone.revision is None else f" at revision {backbone.revision}",
        fingerprints=sorted(backbone.fingerprints.items()),
        facts=[
            (name, _fact(value)) for name, value in {**config.data, **config.fit}.items() if value not in (None, {})
        ],
        versions=", ".join(f"{name} {version}" for name, version in config.versions.items()),
        license=license,
    )
    fresh = seal(str(card).rstrip() + "\n")
    return fresh if previous is None else merge(previous, fresh, WORDS)


def _metadata(config: AdapterConfig, evaluation: Evaluation | None, license: str | None) -> Any:
    from huggingface_hub import EvalResult, ModelCardData

    backbone = config.backbone
    own = backbone.source == "module"
    tags = ["posthoc", "uncertainty", *(head.name for head in config.heads), *(head.kind for head in config.heads)]
    results = [
        EvalResult(
            task_type="other",
            task_name=one.task,
            dataset_type="image",
            dataset_name=one.data,
            metric_type=one.metric,
            metric_name=f"{one.metric} of {one.head}, 95 % interval [{one.low:.4g}, {one.high:.4g}]",
            metric_value=_rounded(one.value),
            metric_args={
                "head": one.head,
                "low": _rounded(one.low),
                "high": _rounded(one.high),
                "confidence": 0.95,
                MADE_BY: True,
            },
        )
        for one in ([] if evaluation is None else evaluation.measured)
    ]
    return ModelCardData(
        library_name="posthoc",
        tags=list(dict.fromkeys(tags)),
        base_model=None if own else base_model(backbone.name),
        base_model_relation=None if own else "adapter",
        pipeline_tag="image-classification" if backbone.num_classes else "image-feature-extraction",
        license=license,
        eval_results=results or None,
        model_name=f"Uncertainty for {backbone.name}" if results else None,
    )


def _row(head: HeadConfig) -> dict[str, str]:
    held, bound = head.held_out, head.report.get("share_at_bound")
    measures, does_not = MEASURES.get(head.name, (f"see `posthoc info` of head {head.name}", ""))
    return {
        "name": head.name,
        "kind": head.kind,
        "measures": measures,
        "does_not": does_not,
        "rows": _number(held.get("rows")),
        **{name: _number(held.get(name)) for name in ("q05", "median", "q95")},
        "at_bound": "" if bound is None else f"{bound:.1%}",
    }


def _plots(evaluation: Evaluation | None) -> Sequence[str]:
    return () if evaluation is None else evaluation.plots


def base_model(backbone: str) -> str:
    """The hub id of a backbone's name: timm's networks are the organisation timm's."""
    name = backbone.removeprefix("hf-hub:").removeprefix("hf_hub:")
    return name if "/" in name else f"timm/{name}"


def _backbone_argument(backbone: BackboneConfig) -> str:
    return ", backbone=your_model" if backbone.source == "module" or backbone.weights != "pretrained" else ""


def _fact(value: Any) -> str:
    """A value in one line that neither ends a comment nor opens an element."""
    return json.dumps(value).replace("<", "&lt;").replace(">", "&gt;")


def _coverage(rows: object) -> float:
    """What the example asks for: 95 %, or what fewer than 19 held-out scores can promise."""
    return 0.95 if not isinstance(rows, int) or rows >= 19 else math.floor(100 * rows / (rows + 1)) / 100


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def _number(value: object) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else ""
