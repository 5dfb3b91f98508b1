"""What scripts in processes of their own do with the hub, and the small network they do it for."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def network() -> nn.Module:
    """Always the same weights."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 6 * 6, 16), nn.ReLU(), nn.Linear(16, 4))


def images() -> Tensor:
    return torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(1))


STEPS = f"""
import dataclasses, json, sys, warnings
import huggingface_hub, torch
import posthoc
from posthoc import hub
sys.path.insert(0, {str(__file__).rpartition("/")[0]!r})
from steps import images, network

def load(repo_id, revision):
    model = posthoc.load(repo_id, revision=revision, backbone=network())
    prediction = model(images())
    return {{name: prediction[name].uncertainty.tolist() for name in model.heads}} | {{"from": model.loaded_from}}

def search(options):
    return [dataclasses.asdict(one) | {{"last_modified": None}} for one in hub.search(**options)]

steps = {{
    "push": lambda folder, repo_id, options: hub.push(folder, repo_id, **options),
    "tag": lambda repo_id, tag: huggingface_hub.HfApi().create_tag(repo_id, tag=tag),
    "load": load,
    "pull": lambda repo_id, revision: str(hub.pull(repo_id, revision)),
    "search": search,
}}
answers = []
for name, *arguments in json.loads(sys.argv[1]):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            answer = steps[name](*arguments)
        except posthoc.PosthocError as error:
            answer = {{"error": str(error)}}
    answers.append({{"answer": answer, "warnings": [str(one.message) for one in caught]}})
print(json.dumps(answers))
"""
"""Runs the steps of its argument, [name, *arguments] each, and prints their answers and warnings."""
