"""What a set's posteriors are worth in retrieval: credible sets, as they are and calibrated, and votes of drawn embeddings.

A posterior is a von Mises-Fisher round a direction: a head's, where it answers with kappa, or a score file's embedding and
`concentration`. Nominal sets are right when posteriors are; with classes for true neighbours only the calibrated ones claim
a loss.
"""

from __future__ import annotations

import numpy as np
import torch

from ..adapters.errors import DataError, OptionError
from ..adapters.vmf import VonMisesFisher
from .bootstrap import bootstrap
from .credible import CredibleSets, SetReport
from .inputs import Scored
from .retrieval_statistics import KnownMeans, VoteEce, label_hits, vote_confidence
from .search import neighbours
from .statistics import Mean
from .table import Cell, Table, fill

NAMES = ("missed", "none", "size", "share_of_gallery", "empty", "everything")
MODES = ("conformal", "pac")


def posterior(one: Scored) -> tuple[np.ndarray, np.ndarray, str]:
    """Mean directions [N, d], concentrations [N], and whose they are: of the first head that answers with kappa.

    Raises DataError where neither a head nor the score file has concentrations.
    """
    if one.concentration is not None:
        one.need("embedding")
        assert one.embedding is not None
        return np.asarray(one.embedding), np.asarray(one.concentration), "score file"
    if one.features is not None and hasattr(one.model, "heads"):
        from ..adapters.scoring import feature_batches

        found: dict[str, tuple[list[np.ndarray], list[np.ndarray]]] = {}
        for _, batch in feature_batches(one.features, np.arange(one.rows), one.model.device):
            with torch.no_grad():
                answer = one.model.answer(batch)
                for name, head in one.model.heads.items():
                    fields = answer[name]
                    if "kappa" not in fields.fields:
                        continue
                    if "expected_embedding" in fields.fields:
                        direction = fields.expected_embedding
                    else:
                        direction = head.posterior(batch.embedding)[0]
                    parts = found.setdefault(name, ([], []))
                    parts[0].append(direction.cpu().numpy())
                    parts[1].append(fields.kappa.cpu().numpy())
        for name, (directions, kappa) in found.items():
            return np.concatenate(directions), np.concatenate(kappa), name
    raise DataError(
        f"{one.name} has no posteriors: give an adapter whose head answers with kappa (kappa, metric-laplace), or a score "
        "file with `concentration`"
    )


def credible_table(
    one: Scored,
    gallery: Scored,
    held_out: Scored | None = None,
    *,
    share: float = 0.95,
    loss: str = "missed",
    delta: float = 0.1,
    uncertain_gallery: bool = False,
    device: torch.device | str = "cpu",
    name: str = "retrieval",
    resamples: int = 1000,
    seed: int = 0,
) -> Table:
    """Losses and sizes of the sets of all gallery images within a query's cap with `share` of its posterior.

    With `held_out` also of the sets whose radius keeps the expected `loss` at 1 - share (`conformal`), and keeps it there
    with probability 1 - delta (`pac`). Raises OptionError for numbers out of range, DataError without posteriors or true
    neighbours, or as `CredibleSets`.
    """
    if not 0.0 < share < 1.0:
        raise OptionError(f"--credible {share} was given; expected a share between 0 and 1, such as 0.95")
    alpha = 1.0 - share
    (direction, kappa, whose), (columns, others, _) = posterior(one), posterior(gallery)
    sets = CredibleSets(columns, gallery.label, others if uncertain_gallery else None, alpha=alpha, device=device)
    made, notes = {"posterior cap (uncalibrated)": sets.evaluate(direction, kappa, one.label)}, []
    if held_out is None:
        notes.append("no --held-out: no set is calibrated, and none claims coverage")
    else:
        theirs, concentration, _ = posterior(held_out)
        for mode in MODES:
            calibrated = sets.calibrate(
                theirs, concentration, held_out.label, alpha=alpha, mode=mode, delta=delta, loss=loss
            )
            made[mode] = calibrated.evaluate(direction, kappa, one.label)
            notes.append(f"{mode}: radius {calibrated.radius:.4g} nominal caps, from {held_out.rows} queries")
        notes.append(
            f"calibrated: the loss {loss!r} is at most {alpha:.3g}, expected (conformal), or with probability "
            f"{1 - delta:.3g} over calibration sets (pac)"
        )
    first = next(iter(made.values()))
    known = first.with_truth
    if not known.any():
        raise DataError(f"{one.name}: no query has a true neighbour in the gallery: sets can miss nothing")
    cells = fill({key: KnownMeans(_values(report)) for key, report in made.items()}, NAMES, (), None, resamples, seed)
    if not known.all():
        apart = ", ".join(f"{key} {report.size[~known].mean():.1f}" for key, report in made.items())
        notes.append(f"{int((~known).sum())} queries without a true neighbour are left out; their mean sizes: {apart}")
    caps = "query and gallery image convolved" if uncertain_gallery else "the query, gallery images are points"
    notes.insert(0, f"posteriors of {whose}, {direction.shape[1]} dimensions; caps hold {share:.3g} of {caps}")
    about = {"set": name, "rows": int(known.sum()), "gallery": gallery.rows, "share": share, "loss": loss, "seed": seed}
    return Table(f"{name}: credible sets", NAMES, cells, tuple(notes), about)


def _values(report: SetReport) -> np.ndarray:
    size = np.where(report.with_truth, report.size, np.nan)
    empty, everything = (np.where(report.with_truth, report.size == n, np.nan) for n in (0, report.gallery))
    return np.stack([report.missed, report.none, size, size / report.gallery, empty, everything], 1)


def vote_table(
    one: Scored,
    gallery: Scored | None,
    draws: int,
    *,
    device: torch.device | str = "cpu",
    name: str = "retrieval",
    resamples: int = 1000,
    seed: int = 0,
) -> Table:
    """Each image's embedding is drawn from its posterior `draws` times; every time the first neighbour votes for its label.

    Accuracy of the label with most votes, its mean share, and the calibration error of the shares (LAM's retrieval ECE, a
    share of 1 counted in the last bin). Raises OptionError for fewer than 2 draws, DataError without posteriors.
    """
    if draws < 2:
        raise OptionError(f"--draws {draws} was given; expected at least 2")
    generator, sets = torch.Generator().manual_seed(seed), [one] if gallery is None else [one, gallery]
    posteriors = [posterior(each) for each in sets]
    laws = [_law(direction, kappa) for direction, kappa, _ in posteriors]
    labels, cast = np.asarray(sets[-1].label), []
    for _ in range(draws):
        drawn = [law.sample(generator=generator).numpy() for law in laws]
        searched = None if gallery is None else drawn[1]
        cast.append(labels[neighbours(drawn[0], searched, device=device)[:, 0]])
    predicted, confidence = vote_confidence(np.stack(cast))
    first = np.zeros((one.rows, 1), np.int64)
    known = label_hits(first, one.label, None if gallery is None else labels)[1] > 0
    correct, confidence = (predicted == one.label)[known], confidence[known]
    made = {"accuracy": Mean(correct), "confidence": Mean(confidence), "vote_ece": VoteEce(confidence, correct)}
    row = {key: Cell(bootstrap(statistic, resamples=resamples, seed=seed)) for key, statistic in made.items()}
    notes = (
        f"{draws} draws from the posteriors of {posteriors[0][2]}; {len(correct)} queries with a true neighbour, 10 bins",
    )
    about = {"set": name, "rows": len(correct), "draws": draws, "seed": seed}
    return Table(f"{name}: votes of drawn embeddings", tuple(made), {"votes": row}, notes, about)


def _law(direction: np.ndarray, kappa: np.ndarray) -> VonMisesFisher:
    mean, concentration = (torch.from_numpy(np.array(one, dtype=np.float32)) for one in (direction, kappa))
    return VonMisesFisher(mean, concentration)
