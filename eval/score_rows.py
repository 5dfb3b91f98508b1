"""The rows of an OOD or selective table: given scores, heads, and every free score and detector that the data allow.

Whatever is fitted is fitted on training images, whatever is tuned on held-out ID images, and no scored image is among them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..adapters.errors import BackboneError, DataError, OptionError
from ..adapters.features import Features
from ..adapters.files import CONFIG_NAME
from ..adapters.source_base import Source
from ..adapters.store import read_manifest
from . import augmentation, baselines
from .command import TableCommand
from .detectors import Training, ensemble, fit_detectors, last_layer
from .inputs import Scored, head_scores, open_model, overlap, read, same_network
from .live_detectors import check_live, live_scores
from .scaling import TemperatureScaling, fit_scaling
from .tuning import methods, tune

REFERENCE = "max-softmax"


def score_all(
    sets: Sequence[Scored],
    train: Scored | None = None,
    k: int = 50,
    *,
    held_out: Scored | None = None,
    views: Sequence[Features] | None = None,
    live: Sequence[str] = (),
    tuned: bool = False,
) -> tuple[list[dict[str, np.ndarray]], list[str]]:
    """Given scores and every free one that what is stored allows, for each set, and notes on what was left out.

    Args:
        train: features of training images; kNN and the detectors are fitted on them alone.
        held_out: labelled ID images that are neither scored nor trained on: the softmax's temperature is fitted on them.
        views: augmented views of each set's images; None: those of the sets themselves, where they have several.
        live: detectors that run the network on the images (`live_detectors.LIVE`).
        tuned: adds a row for each setting chosen on `held_out` (`tuning`).

    A score that one set cannot have is left out everywhere, and noted; so is a set that the heads were fitted on. Raises
    DataError where scored, training and held-out images are not apart or features are of several networks, OptionError for
    `tuned` without `held_out`.
    """
    check_live(live)
    if tuned and held_out is None:
        raise OptionError("--tune needs --held-out: labelled ID images that settings are chosen on")
    same_network([*sets, train, held_out])
    _check_apart(sets, train, held_out)
    found = [dict(one.scores) for one in sets]
    notes = [
        f"the heads were fitted on these very images of {name}: their scores are too good"
        for name in dict.fromkeys(one.name for one in sets if seen_by_heads(one.model, one.features))
    ]
    for scores, one in zip(found, sets, strict=True):
        scores.update(ensemble_of_heads(one.model, one.scores))
        if one.logits is not None:
            scores.update({name: score(one.logits) for name, score in baselines.LOGIT_SCORES.items()})
        if one.embedding is not None:
            scores["1/feature-norm"] = baselines.inverse_norm(one.embedding)
    notes += _scaled(found, sets, held_out)
    _augmented(found, sets, views)
    training = None
    if train is None:
        notes.append("no --train: neither kNN nor detectors")
    else:
        training, more = _fitted(found, sets, train, k)
        notes += more
    if live:
        notes += _live(found, sets, live, training)
    if tuned and held_out is not None:
        notes.append(tune(found, list(sets), held_out, methods(train, training)))
    for name in sorted(set.intersection(*map(set, found)) - set(sets[0].scores)):
        parts = [scores[name] for scores in found]
        if min(part.min() for part in parts) == max(part.max() for part in parts):
            notes.append(f"left out {name}: it is {parts[0][0]:g} for every image")
            for scores in found:
                del scores[name]
    common = set.intersection(*map(set, found))
    for name in sorted(set.union(*map(set, found)) - common):
        notes.append(f"left out {name}: not every set has it")
    return [{name: values for name, values in scores.items() if name in common} for scores in found], notes


def ensemble_of_heads(model: Any, scores: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The row "ensemble of heads" of a model with several heads, all of them scored; nothing for another model."""
    names = list(getattr(model, "heads", ()))
    if len(names) < 2 or not set(names) <= set(scores):
        return {}
    kept = [model.held_out[name].quantiles[1:].cpu() for name in names]
    return {"ensemble of heads": ensemble([scores[name] for name in names], kept)}


def seen_by_heads(model: Any, images: Features | Source | None) -> bool:
    """Whether the heads of a fitted model were fitted on some of these images, by the fingerprint of the whole data set.

    Where heads were fitted on some rows of a data set and others are asked about, only numbers tell: it is so if both
    together are more than there are.
    """
    told = getattr(model, "fitted_on", {}).get("data", {})
    if images is None or told.get("fingerprint") is None:
        return False
    source = images.source if isinstance(images, Features) else images
    if source is not None:
        source = getattr(source, "taken_from", None) or source
        fingerprint, rows = source.fingerprint(), source.length
    else:
        assert isinstance(images, Features)
        manifest = {} if images.folder is None else read_manifest(images.folder) or {}
        fingerprint, rows = manifest.get("data", {}).get("fingerprint"), manifest.get("rows")
    return fingerprint == told["fingerprint"] and (rows is None or told["rows"] + len(images) > rows)


def _check_apart(sets: Sequence[Scored], train: Scored | None, held_out: Scored | None) -> None:
    # altered copies stand behind their own images; to hash them would be to make them all once more
    sets = [one for one in sets if one.features is None or getattr(one.features.source, "change", None) is None]
    for one in sets:
        shared = [] if train is None else trained_rows(one, train)
        if train is not None and shared:
            raise DataError(
                f"{len(shared)} of {one.rows} images of {one.name} are among the training images of {train.name} (first: row "
                f"{shared[0]} of {one.name}): give training images that are not scored"
            )
    if held_out is None:
        return
    for one, why in [*((one, "scored") for one in sets), *([] if train is None else [(train, "trained on")])]:
        shared, _ = overlap(held_out, one)
        if shared:
            raise DataError(
                f"{len(shared)} images of --held-out {held_out.name} are also in {one.name} (first: row {shared[0]}): images "
                f"that are {why} cannot be held out"
            )


def trained_rows(one: Scored, train: Scored) -> list[int]:
    """Rows of a set whose image is among the training images, by content, pixels, or else embedding.

    Embeddings tell images only where they are not one number throughout, as those of a dead layer are; logits never do.
    """
    for kind in ("content", "pixels"):
        mine, theirs = one.keys(kind), train.keys(kind)
        if mine is not None and theirs is not None:
            known = set(theirs)
            return [row for row, key in enumerate(mine) if key in known]
    mine, theirs = one.keys("embedding"), train.keys("embedding")
    if mine is None or theirs is None or one.embedding is None:
        return []
    known = set(theirs)
    flat = one.embedding.min(1) == one.embedding.max(1)
    return [row for row, key in enumerate(mine) if key in known and not flat[row]]


def _scaled(found: list[dict[str, np.ndarray]], sets: Sequence[Scored], held_out: Scored | None) -> list[str]:
    if any(one.logits is None for one in sets):
        return [] if held_out is None else ["no temperature-scaled softmax: not every set has logits"]
    if held_out is None:
        return ["no --held-out: no temperature-scaled softmax"]
    held_out.need("label", "logits")
    assert held_out.logits is not None
    assert held_out.label is not None
    scaling = fit_scaling("temperature", held_out.logits, held_out.label)
    assert isinstance(scaling, TemperatureScaling)
    temperature = scaling.temperature
    for scores, one in zip(found, sets, strict=True):
        scores["temperature-scaled softmax"] = baselines.max_softmax(np.asarray(one.logits) / temperature)
    return [f"temperature {temperature:.3g}, fitted on {held_out.rows} labelled ID images of {held_out.name}"]


def _augmented(found: list[dict[str, np.ndarray]], sets: Sequence[Scored], views: Sequence[Features] | None) -> None:
    own = [one.features for one in sets]
    given = [one for one in (own if views is None else views) if one is not None and one.views > 1]
    if len(given) == len(sets):
        for scores, more in zip(found, augmentation.augmented_scores(given), strict=True):
            scores.update(more)


def _fitted(
    found: list[dict[str, np.ndarray]], sets: Sequence[Scored], train: Scored, k: int
) -> tuple[Training | None, list[str]]:
    if train.embedding is not None and all(one.embedding is not None for one in sets):
        k = min(k, train.rows)
        for scores, one in zip(found, sets, strict=True):
            scores[f"kNN (k={k})"] = baselines.knn(one.embedding, train.embedding, k=k)
    if train.penultimate is None or train.logits is None or train.label is None:
        return None, ["no detectors: the training features lack a penultimate input, logits or labels"]
    if any(one.penultimate is None for one in sets):
        return None, ["no detectors: not every set has penultimate features"]
    try:
        training = Training(train.penultimate, train.label, *_layer(train))
    except DataError as error:
        return None, [f"no detectors: {error}"]
    detectors = fit_detectors(training)
    for scores, one in zip(found, sets, strict=True):
        scores.update(detectors.scores(one.penultimate))
    return training, [f"left out {name}: {why}" for name, why in detectors.left_out.items()]


def _layer(train: Scored) -> tuple[np.ndarray, np.ndarray]:
    """The last layer itself where the network that made these features is at hand, else read from features and logits."""
    backbone = getattr(train.model, "backbone", train.model)
    made_by = None if train.features is None else train.features.backbone_fingerprint
    known = backbone is not None and backbone.is_read and backbone.structure.linear is not None
    if not known or made_by != backbone.fingerprint("logits"):
        return last_layer(train.penultimate, train.logits)
    linear = backbone.classifier()
    bias = linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias
    return linear.weight.detach().float().cpu().numpy(), bias.detach().float().cpu().numpy()


def _live(
    found: list[dict[str, np.ndarray]], sets: Sequence[Scored], names: Sequence[str], training: Training | None
) -> list[str]:
    if any(one.features is None or one.model is None for one in sets):
        raise DataError("--live runs the network on images: give images and --model, not score files")
    backbone = getattr(sets[0].model, "backbone", sets[0].model)
    made, left_out = live_scores(backbone, [one.features for one in sets if one.features is not None], names, training)
    for scores, more in zip(found, made, strict=True):
        scores.update(more)
    return [f"left out {name}: {why}" for name, why in left_out.items()]


@dataclass(kw_only=True)
class RowsCommand(TableCommand):
    """The options of a table whose rows are scores."""

    model: tuple[str, ...] = ()
    """adapter folder (its heads are scored) or timm name (free scores only); several adapters that differ in their seed:
    mean and standard deviation over them"""
    train: str | None = None
    """images or stored features of the training set: kNN and detectors are fitted on them alone"""
    held_out: str | None = None
    """labelled ID images that are neither scored nor trained on: the softmax's temperature is fitted on them"""
    tune: bool = False
    """also show each setting (k, percentiles, ...) chosen on --held-out beside its default"""
    views: int = 1
    """above 1: test-time augmentation with so many views of each image"""
    live: tuple[str, ...] = ()
    """detectors that run the network on the images: odin, mahalanobis-odin, rankfeat"""
    reference: str = REFERENCE
    """score that paired differences are taken from"""

    def models(self) -> list[Any]:
        """The adapters or the backbone of --model; [None] without."""
        if self.views < 1:
            raise OptionError(f"--views {self.views} was given; expected at least 1")
        check_live(self.live)
        if len(self.model) > 1 and not all((Path(name) / CONFIG_NAME).is_file() for name in self.model):
            raise OptionError("several --model must be folders of adapters that were fitted with different seeds")
        first = open_model(self.model[0] if self.model else None, self.checkpoint, self.device)
        return [first, *_further(self.model, first)]

    def rows(
        self, sets: Sequence[Scored], models: Sequence[Any]
    ) -> tuple[list[list[dict[str, np.ndarray]]], list[str]]:
        """For each model, the scores of each set; and notes."""
        train, held_out = (
            None if place is None else read(place, models[0], split)
            for place, split in ((self.train, "train"), (self.held_out, self.split))
        )
        views = None if self.views == 1 else [_views(one, self.views) for one in sets]
        first, notes = score_all(sets, train, held_out=held_out, views=views, live=self.live, tuned=self.tune)
        every = [first]
        for model in models[1:]:
            every.append([])
            for scores, one in zip(first, sets, strict=True):
                if one.features is None:
                    raise DataError(f"several --model need images or stored features of {one.name}, not a score file")
                heads = head_scores(model, one.features)
                every[-1].append(scores | heads | ensemble_of_heads(model, heads))
        if len(models) > 1:
            seeds = ", ".join(str(model.fitted_on["fit"]["seed"]) for model in models)
            notes.append(f"heads fitted with seeds {seeds}; scores that are no head's are the same for each")
        return every, notes


def _further(names: Sequence[str], first: Any) -> list[Any]:
    """The adapters after the first, on its backbone. Raises OptionError unless they differ in their seed alone."""
    if len(names) < 2:
        return []
    from ..adapters.model import load

    models = [first]
    for name in names[1:]:
        try:
            models.append(load(name, None, first.backbone))
        except BackboneError as error:
            raise OptionError(
                f"{name} is not on the backbone of {names[0]}, so they are not seeds of one fit: {error}"
            ) from None
    told = [_fit_of(model) for model in models]
    for name, other in zip(names[1:], told[1:], strict=True):
        for what, value in told[0].items():
            if what != "seed" and other[what] != value:
                raise OptionError(
                    f"{name} and {names[0]} differ in more than their seed, in {what}: {other[what]} and {value}; give adapters "
                    "of one fit that was repeated"
                )
    seeds = [fit["seed"] for fit in told]
    if len(set(seeds)) < len(seeds):
        raise OptionError(f"several --model must have different seeds to show a spread; these have {seeds}")
    return models[1:]


def _fit_of(model: Any) -> dict[str, Any]:
    fit = model.fitted_on["fit"]
    same = {key: fit[key] for key in ("positives", "views", "validation", "epochs", "lr", "batch_size", "seed")}
    return {"heads": {name: head.config() for name, head in model.heads.items()}, **same}


def _views(one: Scored, views: int) -> Features:
    """Augmented views of a set's images, in the order of its rows."""
    features = one.features
    if features is None or features.source is None:
        raise OptionError(
            f"--views augments images; {one.name} is a score file or stored features (store views instead)"
        )
    backbone = getattr(one.model, "backbone", one.model)
    made = backbone.extract(features.source, views=views)
    place = np.searchsorted(made.row, features.row)
    if len(made) <= place.max() or not np.array_equal(made.row[place], features.row):
        raise DataError(f"{one.name}: some images could be read before and cannot now")
    return made if len(made) == len(features) else made[place]
