"""A frozen backbone with heads that say how uncertain it is: wrap, fit, ask, save."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, MutableMapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from . import checks, export, fitting, persistence, predicting
from .backbone import Backbone, BackboneOutput, build_backbone
from .distributed import check_launch
from .errors import NotFittedError, OptionError, suggest
from .export import Exported
from .files import commit_of
from .heads import HEADS, make_head
from .heads.base import Head
from .locate import locate, publish
from .prediction import Prediction
from .scores import HeldOutScores
from .training import TrainOptions

Heads = str | Head | Sequence[str | Head]


def wrap(
    backbone: str | nn.Module | Backbone,
    head: Heads = "kappa",
    *,
    pretrained: bool = True,
    checkpoint: str | Path | None = None,
    transform: Any = None,
    feature_layer: str | None = None,
    classifier_layer: str | bool | None = None,
    device: str | torch.device | None = None,
    **head_options: Any,
) -> UncertainModel:
    """A pretrained network with unfitted heads; the network is frozen and stays as it is, bit for bit.

    Args:
        backbone: a timm name ("resnet50.a1_in1k"), a hub id ("hf-hub:timm/..."), or any `nn.Module` whose forward
            returns a tensor, a mapping or a transformers `ModelOutput`.
        head: "kappa", "temperature", "loss", "laplace", a head object, or a list of them, which share one pass of the
            backbone.
        pretrained: whether a named backbone gets its pretrained weights.
        checkpoint: local weights (.safetensors, or a .pth read with `weights_only=True`).
        transform: PIL image to tensor [3,H,W], for own modules.
        feature_layer, classifier_layer: names of an own module's layers where they cannot be told;
            `classifier_layer=False`: the output is the embedding.
        device: where everything runs.
        head_options: options of the one head, or, for several, a mapping for each: `kappa={"projection": 8}`.

    Raises BackboneError, OptionError; an unknown name suggests the nearest.
    """
    heads = _make_heads(head, head_options)
    frozen = build_backbone(
        backbone,
        pretrained=pretrained,
        checkpoint=checkpoint,
        transform=transform,
        feature_layer=feature_layer,
        classifier_layer=classifier_layer,
        device=device,
    )
    return UncertainModel(frozen, heads)


def load(
    folder_or_hub_id: str | Path,
    revision: str | None = None,
    backbone: str | nn.Module | Backbone | None = None,
    *,
    transform: Any = None,
    device: str | torch.device | None = None,
) -> UncertainModel:
    """A fitted model from an adapter: a folder that `save_pretrained` wrote, or a hub id (an existing folder wins).

    Args:
        revision: branch, tag or commit of a hub id.
        backbone: the backbone to attach to, where it is an own module or its weights are at hand; None: the timm or hub
            backbone that the adapter names, with its pretrained weights.
        transform: PIL image to tensor [3,H,W], for an own module; without it that takes preprocessed tensors only.
        device: where everything runs.

    Raises AdapterError for files that are missing, damaged, changed or of an unknown schema; BackboneError when the
    backbone is not the one the adapter was fitted on, with both fingerprints.
    """
    return UncertainModel.from_pretrained(folder_or_hub_id, revision, backbone, transform=transform, device=device)


def list_heads() -> list[str]:
    """Names that `wrap(head=...)` and `add_head` take."""
    return sorted(HEADS)


def _make_heads(head: Heads, options: dict[str, Any]) -> list[Head]:
    if isinstance(head, str | Head):
        return [make_head(head, **options)]
    names = [one if isinstance(one, str) else getattr(one, "name", str(one)) for one in head]
    if not names:
        raise OptionError("head=[] was given; expected at least one head")
    for name, value in options.items():
        if name not in names or not isinstance(value, dict):
            raise OptionError(
                f"{name}={value!r} was given beside the heads {', '.join(names)}: with several heads give each its "
                f"options as a mapping, such as {names[0]}={{...}}"
            )
    return [make_head(one, **options.get(name, {})) for one, name in zip(head, names, strict=True)]


class UncertainModel(nn.Module):
    """A frozen backbone and its heads; made by `wrap` and `load`.

    Attributes:
        backbone: the frozen `Backbone`; `backbone.extract(data)` stores its features.
        heads: the heads by name, the first one's scores being the plain ones.
        report: by head, what the last fit reported: losses, seconds, rows, held-out scores, share of scores at a bound,
            warnings.
        loaded_from: of a loaded model the SHA-256 of its weights ("weights"), the "address" that was given, its "revision"
            and the "commit" it stood for, where it came from a hub.
    """

    def __init__(self, backbone: Backbone, heads: Sequence[Head]) -> None:
        super().__init__()
        self.backbone = backbone
        self.heads = cast("MutableMapping[str, Head]", nn.ModuleDict())
        self.held_out = cast("MutableMapping[str, HeldOutScores]", nn.ModuleDict())
        self.report: dict[str, dict[str, Any]] = {}
        self.fitted_on: dict[str, Any] = {}
        self.loaded_from: dict[str, str | None] = {}
        self.fitted_heads: set[str] = set()
        for head in heads:
            self.add_head(head)
        self.eval()

    def add_head(self, head: str | Head, **options: Any) -> UncertainModel:
        """Add a head by name with its options, or an object; it is there to be fitted by the next `fit`.

        Raises OptionError for an unknown name or option, or when a head of that name is there already.
        """
        made = make_head(head, **options)
        if made.name in self.heads:
            raise OptionError(f"there is a head {made.name!r} already: wrap the backbone once more for a second one")
        self.heads[made.name] = made.to(self.device)
        self.held_out[made.name] = HeldOutScores().to(self.device)
        return self

    def each_head(self) -> Iterator[tuple[str, Head, HeldOutScores]]:
        """Name, head and held-out scores of every head, the first one first."""
        for name, head in self.heads.items():
            yield name, head, self.held_out[name]

    @property
    def device(self) -> torch.device:
        """Where the backbone is."""
        return self.backbone.device

    def get_base_model(self) -> nn.Module:
        """The network that was wrapped, unchanged."""
        return self.backbone.module

    def fit(
        self,
        data: Any,
        *,
        positives: str = "auto",
        views: int = 8,
        validation: float = 0.1,
        group: str | Sequence[Any] | np.ndarray | None = None,
        epochs: int | None = None,
        lr: float | None = None,
        batch_size: int = 512,
        seed: int = 0,
        cache_dir: str | Path | None = None,
        output_dir: str | Path | None = None,
    ) -> UncertainModel:
        """Fit every head on the backbone's stored features of `data`, and return the model.

        Args:
            data: a torch `Dataset` of (image, label), a `DataLoader`, a `datasets.Dataset`, an image folder, a hub data
                set id, arrays, or `Features`. Labels: int64 [N], or float [N,C] (soft).
            positives: which images belong together, for the heads trained on pairs: "labels", "soft-labels", "views"
                (augmented views of the same image), the name of a column of ids, or "auto": labels if there are any,
                else views.
            views: how many augmented views of each image are stored when positives are views.
            validation: share of the rows held out, by a seeded hash of the row, for early stopping and held-out scores.
            group: a column's name or one value per row; all rows of a group fall on one side of the split.
            epochs, lr: of the heads' training; None: each head's own default.
            batch_size: rows in a training step, over all processes.
            cache_dir: the feature store, `$POSTHOC_CACHE` or `~/.cache/posthoc/features` by default.
            output_dir: where config.json, metrics.jsonl, checkpoints (from which the same fit resumes) and results.json
                go.

        Raises DataError for data the heads cannot be fitted on (non-finite features, one class, too few rows, labels
        out of range, regression targets), OptionError for options out of range.
        """
        check_launch()
        folder = None if output_dir is None else Path(output_dir)
        training = TrainOptions(epochs=epochs, lr=lr, batch_size=batch_size, seed=seed, output_dir=folder)
        group = group if group is None or isinstance(group, str) else np.asarray(group)
        options = fitting.FitOptions(positives, views, validation, group, cache_dir)
        heads = [head for _, head, _ in self.each_head()]
        prepared = fitting.prepare(self.backbone, heads, data, options, training)
        facts, warning = checks.trained_on(prepared)
        described = fitting.describe(self.backbone, prepared, options, facts)
        persistence.write_run(folder, "config.json", {**described, "heads": {h.name: h.config() for h in heads}})
        self.fitted_heads.clear()
        self.report, self.fitted_on = {}, described
        caught: list[warnings.WarningMessage] = []
        for name, head, scores in self.each_head():
            self.report[name], told = fitting.fit_head(head, scores, prepared)
            self.report[name]["warnings"] += [warning] if warning else []
            self.fitted_heads.add(name)
            caught += told
        persistence.write_run(folder, "results.json", self.report)
        for again in caught:
            warnings.warn_explicit(again.message, again.category, again.filename, again.lineno)
        if warning:
            warnings.warn(warning, UserWarning, stacklevel=2)
        return self

    def forward(self, images: Image.Image | Sequence[Image.Image] | np.ndarray | Tensor) -> Prediction:
        """The uncertainty of a batch of images; differentiable with respect to float images.

        PIL and uint8 images get the backbone's preprocessing; float tensors [B,3,H,W] are taken as preprocessed.
        Raises NotFittedError before `fit`.
        """
        self._require_fitted()
        return self.answer(self.backbone(self.backbone.prepare(images)))

    def answer(self, features: BackboneOutput) -> Prediction:
        """What the heads say of the outputs of one backbone pass."""
        self._require_fitted()
        answers = {}
        for name, head, scores in self.each_head():
            outputs = head(features)
            uncertainty = outputs.pop("uncertainty")
            answers[name] = {"uncertainty": uncertainty, "percentile": scores.percentile(uncertainty), **outputs}
        return Prediction(answers, self.kinds(), features.embedding, features.logits)

    def kinds(self) -> dict[str, str]:
        """By head, what its score means: "aleatoric", "decision", "total" or "epistemic"."""
        return {name: head.kind for name, head, _ in self.each_head()}

    def predict(
        self,
        data: Any,
        fields: Sequence[str] = ("uncertainty", "logits"),
        batch_size: int = 64,
        output_dir: str | Path | None = None,
    ) -> Prediction:
        """The uncertainty of one image, of paths, or of a whole data set, streamed; on the CPU, in the data's order.

        In a launch of several processes each predicts its share, and each gets the whole answer.

        Args:
            data: an image, or anything `fit` takes, streams included.
            fields: what to keep, for every head: "uncertainty" (the percentile with it), "logits", "embedding", and
                fields of the heads. Memory holds nothing else.
            batch_size: images in one pass.
            output_dir: write the fields to .npy files there, and answer with memory maps of them.

        Raises NotFittedError before `fit`, DataError for images that cannot be read, OptionError for unknown fields.
        """
        self._require_fitted()
        return predicting.predict(self, data, fields, batch_size, output_dir)

    def threshold(
        self, *, coverage: float | None = None, risk: float | None = None, delta: float = 0.1, head: str | None = None
    ) -> float:
        """The score to abstain above, from the stored held-out scores; finite-sample valid (`HeldOutScores.threshold`).

        Args:
            coverage: share of new images to keep, if they are like the held-out ones.
            risk: share of wrong decisions of the backbone among the kept images, not exceeded with probability
                1 - delta.
            head: whose score; None: the first head's.
        """
        scores = {name: scores for name, _, scores in self.each_head()}
        name = next(iter(scores)) if head is None else head
        if name not in scores:
            raise OptionError(f"this model has no head {name!r}: {suggest(name, scores)}")
        if name not in self.fitted_heads:
            self._require_fitted()
        return scores[name].threshold(coverage=coverage, risk=risk, delta=delta)

    def save_pretrained(self, folder: str | Path) -> Path | str:
        """Write the adapter (adapter.safetensors, adapter_config.json, README.md) and return the folder.

        `folder` may be an fsspec address, such as s3://bucket/adapter. The backbone's weights are not in it. What was edited
        in a README.md that is there stays. Raises NotFittedError before `fit`, AdapterError when it cannot be
        written.
        """
        self._require_fitted()
        return check_launch().on_main(lambda: persistence.save(self, folder))

    def export(self, path: str | Path, heads: Sequence[str] | None = None) -> Exported:
        """Write backbone and heads as one graph that answers without posthoc, and its preprocessing beside it.

        The graph takes preprocessed images [B,3,H,W], B free, and gives "logits" (with a classifier), "embedding",
        "uncertainty" and "percentile" of the first head, and "HEAD.uncertainty" and "HEAD.percentile" of others. Before
        it gets its name it is run on the CPU and compared with the model.

        Args:
            path: a .onnx file (extra `export`), or a .pt2 file that `torch.export.load` reads. `path`.json is written
                beside it: preprocessing, outputs, thresholds, fingerprints.
            heads: which ones, and in which order; None: all.

        Raises NotFittedError before `fit`, OptionError for another ending or an unknown head, BackboneError where the
        size of the images is not known, AdapterError when the file cannot be written, or answers otherwise.
        """
        self._require_fitted()
        return check_launch().on_main(lambda: export.export(self, path, heads))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        revision: str | None = None,
        private: bool | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
        license: str | None = None,
        evaluation: str | Path | None = None,
    ) -> str:
        """Publish the adapter in one commit (`hub.push`), and return the commit's address.

        Args:
            repo_id: "org/name"; the repository is made if there is none.
            revision: branch to commit to, made if there is none; None: main.
            private: of a new repository; None: as the account's default is.
            create_pr: open a pull request instead of committing.
            license: the hub's word for the adapter's licence, such as "mit"; None: what the card says.
            evaluation: folder that `posthoc eval report --output` wrote for this adapter: figures and plots for the card.

        Raises NotFittedError before `fit`, AdapterError when the hub refuses or cannot be reached.
        """
        self._require_fitted()
        options = {"revision": revision, "private": private, "commit_message": commit_message, "create_pr": create_pr}
        return check_launch().on_main(lambda: publish(self, repo_id, license=license, evaluation=evaluation, **options))

    @classmethod
    def from_pretrained(
        cls,
        folder_or_hub_id: str | Path,
        revision: str | None = None,
        backbone: str | nn.Module | Backbone | None = None,
        *,
        transform: Any = None,
        device: str | torch.device | None = None,
    ) -> UncertainModel:
        """The same as `posthoc.load`."""
        launch = check_launch()
        folder = launch.on_main(lambda: locate(folder_or_hub_id, revision))
        model = persistence.load(cls, folder, backbone, transform, device)
        model.loaded_from |= {
            "address": str(folder_or_hub_id),
            "revision": revision,
            "commit": commit_of(folder),
        }
        return model

    def _require_fitted(self) -> None:
        missing = [name for name in self.heads if name not in self.fitted_heads]
        if missing:
            raise NotFittedError(
                f"the head(s) {', '.join(missing)} are not fitted yet: call model.fit(data) first, or load a fitted "
                "adapter with posthoc.load(...)"
            )
