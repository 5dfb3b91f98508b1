"""What the metrics of the tables mean, in a sentence each, and which direction is better.

>>> words("fpr95").better
'lower'
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Words:
    """`label` as a column's head, `better` "higher", "lower" or "" (neither), `meaning` a sentence without its subject."""

    label: str
    better: str = ""
    meaning: str = ""


METRICS = {
    "auroc": Words("AUROC", "higher", "the chance that an OOD image is less certain than an ID image; .5 is guessing"),
    "aupr_out": Words("AUPR out", "higher", "the mean precision when the least certain images are called OOD"),
    "aupr_in": Words("AUPR in", "higher", "the mean precision when the most certain images are called ID"),
    "fpr95": Words("FPR 95", "lower", "the share of ID images flagged when 95 % of the OOD images are"),
    "ood_accepted_at_95_id": Words(
        "OOD accepted", "lower", "the share of OOD images that pass when 95 % of the ID images do"
    ),
    "scod_auroc": Words("SCOD AUROC", "higher", "AUROC where mistakes and OOD images are both to be rejected"),
    "scod_aurc": Words(
        "SCOD AURC", "lower", "the area under risk against coverage, mistakes and OOD images both wrong"
    ),
    "accuracy": Words("accuracy", "higher", "the share of right decisions"),
    "nll": Words("NLL", "lower", "the mean negative log-likelihood of the label, in nats"),
    "brier": Words(
        "Brier", "lower", "the mean squared distance of the probabilities from the label, summed over classes"
    ),
    "reliability": Words("reliability", "lower", "the part of the Brier score that calibration could remove"),
    "ece": Words("ECE", "lower", "the mean gap between confidence and accuracy, in bins of equal width"),
    "adaptive_ece": Words("adaptive ECE", "lower", "the same gap in bins of equally many images"),
    "smooth_ece": Words("smooth ECE", "lower", "the same gap without bins, by kernel smoothing"),
    "classwise_ece": Words(
        "classwise ECE", "lower", "the gap for the probability of every class, averaged over classes"
    ),
    "aurc": Words("AURC", "lower", "the mean error rate of the most certain images, over all shares kept"),
    "excess_aurc": Words("excess AURC", "lower", "AURC less that of the best order, which puts every mistake last"),
    "augrc": Words("AUGRC", "lower", "the mean share of all images that are kept and wrong, over all shares kept"),
    "error_auroc": Words("error AUROC", "higher", "the chance that a mistake is less certain than a right answer"),
    "r_auroc": Words("R-AUROC", "higher", "the chance that a query whose neighbour has another class is less certain"),
    "map_at_r": Words("MAP@R", "higher", "the mean average precision among as many neighbours as the class has images"),
    "ausc": Words(
        "AUSC", "higher", "the mean accuracy of what is left, over the shares of least certain images dropped"
    ),
    "lam_ausc": Words("LAM's AUSC", "higher", "AUSC with the scores of a query and of its neighbour added up"),
    "lam_map_at_10": Words("LAM's mAP@10", "higher", "mAP@10 where a query without an image of its class counts as 1"),
    "missed": Words("missed", "lower", "the share of a query's images of its class that lie outside its set"),
    "none": Words("none inside", "lower", "the share of queries whose set holds no image of their class"),
    "size": Words("set size", "lower", "the classes in an image's set, or the images in a query's"),
    "share_of_gallery": Words("share of gallery", "lower", "the same as a share of all images that are searched"),
    "empty": Words("empty", "lower", "the share of images or queries whose set is empty"),
    "everything": Words("everything", "lower", "the share of queries whose set holds every image"),
    "coverage": Words(
        "coverage", "", "the share of images whose true class is in their set; near the promise is right"
    ),
    "single": Words("single", "higher", "the share of images whose set is one class"),
    "worst_class_coverage": Words("worst class", "", "the coverage of the class that is covered least"),
    "mean_class_coverage": Words("mean over classes", "", "the coverage of each class, averaged over classes"),
    "crop_spearman": Words(
        "crop Spearman", "higher", "the rank correlation of the score with how much is cropped away"
    ),
    "crop_less_certain": Words("crops less certain", "higher", "the share of crops that score above their whole image"),
    "human_spearman": Words(
        "human Spearman", "higher", "the rank correlation of the score with the entropy of people's votes"
    ),
    "confidence": Words("share of votes", "", "the mean share of draws that vote for the label with most votes"),
    "vote_ece": Words("vote ECE", "lower", "the mean gap between a label's share of votes and how often it is right"),
}
PREFIXES = {
    "accuracy_at_": ("accuracy at ", "higher", "the accuracy of that share of images, the most certain ones"),
    "top_": ("top ", "higher", "the share of images whose class is among that many likeliest ones"),
    "recall_at_": ("recall@", "higher", "the share of queries with an image of their class among that many neighbours"),
    "map_at_": ("mAP@", "higher", "the mean average precision among that many neighbours"),
}


def words(metric: str) -> Words:
    """The words for a metric; one that is unknown keeps its name and gets neither direction nor meaning."""
    known = METRICS.get(metric)
    if known is not None:
        return known
    for prefix, (label, better, meaning) in PREFIXES.items():
        if metric.startswith(prefix):
            return Words(label + metric.removeprefix(prefix), better, meaning)
    return Words(metric.replace("_", " "))
