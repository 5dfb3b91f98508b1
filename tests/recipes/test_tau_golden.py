"""The recipe tau against numbers of the released code: its head, its scores, its AUROC, its learning rates."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from posthoc.adapters.losses.tau import temperature
from posthoc.eval.search import as_unit
from posthoc.recipes.pretraining_evaluation import auroc, ood_tables
from posthoc.recipes.pretraining_networks import projection_head
from posthoc.recipes.running import scheduled
from posthoc.recipes.tau import TauConfig
from posthoc.recipes.tau_methods import LEAST_STD, posterior
from posthoc.recipes.tau_scores import papers_neighbours, spread


@pytest.mark.parametrize("name", ["gaussian_n12_f16_d8_s150", "gaussian_hib_n10_f12_d6_s151"])
def test_the_head_is_the_papers(shared: Path, name: str) -> None:
    with np.load(shared / "golden" / "tau" / f"head_{name}.npz") as file:
        known = {key: torch.from_numpy(file[key]) for key in file.files}
    outputs, size = known["l2_weight"].shape
    head = projection_head(size, size, outputs, "batch")
    names = {
        "0.weight": "l1_weight", "0.bias": "l1_bias", "1.weight": "bn_weight", "1.bias": "bn_bias",
        "1.running_mean": "bn_running_mean", "1.running_var": "bn_running_var", "3.weight": "l2_weight",
    }  # fmt: skip
    head.load_state_dict({ours: known[theirs] for ours, theirs in names.items()}, strict=False)
    assert [name for name in head.state_dict() if name not in names] == ["1.num_batches_tracked"]
    for mode in ("eval", "train"):
        found = head.train(mode == "train")(known["h"])
        torch.testing.assert_close(found[:, :-1], known[f"loc_{mode}"], rtol=1e-5, atol=1e-6)
        if "hib" in name:
            std = posterior(found).stddev[:, :1] - LEAST_STD
            torch.testing.assert_close(std, known[f"raw_{mode}"], rtol=1e-5, atol=1e-6)
        else:
            torch.testing.assert_close(found[:, -1:], known[f"raw_{mode}"], rtol=1e-5, atol=1e-6)
            if mode == "eval":
                torch.testing.assert_close(temperature(found[:, -1:], 0.1), known["tau_eff"], rtol=1e-5, atol=1e-6)
    assert isinstance(head[1], nn.BatchNorm1d)


@pytest.mark.parametrize("name", ["m10_n12_d8_s160", "m5_n20_d16_s161"])
def test_the_spread_is_the_papers(shared: Path, name: str) -> None:
    with np.load(shared / "golden" / "tau" / f"disagreement_{name}.npz") as file:
        np.testing.assert_allclose(spread([as_unit(one) for one in file["outputs"]]), file["score"], rtol=1e-5)


def test_neighbours_as_released(shared: Path) -> None:
    with np.load(shared / "golden" / "tau" / "knn_ood_in60_out40_d8_k10_average_s170.npz") as file:
        inside = papers_neighbours(file["emb_in"], file["emb_in"], own=True)
        outside = papers_neighbours(file["emb_out"], file["emb_in"], own=False)
        np.testing.assert_allclose(inside, file["score_in"], rtol=1e-5)
        np.testing.assert_allclose(outside, file["score_out"], rtol=1e-5)
        tables = ood_tables({"kNN": inside}, {"other": {"kNN": outside}}, 0)
        # not the folded one, which the paper's code reports
        assert auroc(tables, "other", "kNN") == pytest.approx(float(file["auroc"]), abs=1e-6)


def test_the_square_of_the_raw_number_ranks_worse(shared: Path) -> None:
    with np.load(shared / "golden" / "tau" / "auroc_in80_out60_s180.npz") as file:
        inside, outside = (
            {"tau": temperature(torch.from_numpy(raw), 0.1).numpy(), "-r^2, as released": -(raw**2)}
            for raw in (file["raw_in"], file["raw_out"])
        )
        tables = ood_tables(inside, {"other": outside}, 0, {"other": "a note"})
        assert auroc(tables, "other", "tau") == pytest.approx(float(file["auroc_sigmoid"]), abs=1e-6)
        assert auroc(tables, "other", "-r^2, as released") == pytest.approx(float(file["auroc_reference"]), abs=1e-6)
        assert "a note" in tables["other"]["notes"]


def test_learning_rates_are_the_papers_after_the_warm_up(shared: Path) -> None:
    with np.load(shared / "golden" / "tau" / "lr_schedule_lr0.0001_bs128_n1290_w10_e30.npz") as file:
        theirs = file["schedule"]
        each, warm = len(theirs) // int(file["epochs"]), int(file["warmup_epochs"])
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-4)
    schedule = scheduled("cosine", optimizer, len(theirs), warm * each / len(theirs))
    ours = []
    for _ in theirs:
        ours.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    np.testing.assert_allclose(ours[warm * each :], theirs[warm * each :], atol=1e-9)
    # theirs begins with a step of rate 0
    assert np.abs(np.subtract(ours, theirs))[: warm * each].max() < 1e-4 / (warm * each) + 1e-9
    assert TauConfig().warmup == 10 / 200
