"""Backbone, images and adapter from one hub: fitted in one process, used in another that knows the adapter's id only."""

from __future__ import annotations

import io

import datasets
import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save
from sklearn.datasets import load_digits

FIT = """
import json, sys, warnings
import timm, torch
import posthoc

torch.manual_seed(0)
timm.models.push_to_hf_hub(timm.create_model("test_resnet.r160_in1k", num_classes=7).eval(), "org/net", safe_serialization=True)
warnings.simplefilter("ignore", UserWarning)  # a network of random weights: its heads have doubts to report
model = posthoc.wrap("hf-hub:org/net", ["kappa", "loss"])
model.fit("org/digits", epochs=1, batch_size=32, validation=0.3, cache_dir=sys.argv[2])
address = model.push_to_hub("org/digits-uncertainty", license="mit", private=True)
scores = model.predict(sys.argv[1])
print(json.dumps({"address": address, **{name: scores[name].uncertainty.tolist() for name in model.heads}}))
"""
USE = """
import json, sys
import posthoc

model = posthoc.UncertainModel.from_pretrained("org/digits-uncertainty")
scores = model.predict(sys.argv[1])
print(json.dumps({"revision": model.backbone.revision, "loaded": model.loaded_from["commit"],
                  **{name: scores[name].uncertainty.tolist() for name in model.heads}}))
"""


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray((image * 15.9).astype(np.uint8)).convert("RGB").save(buffer, format="PNG")
    return buffer.getvalue()


def test_everything_comes_from_one_hub(hub_server, child, tmp_path):
    digits = load_digits()
    rows = [{"bytes": png(image), "path": None} for image in digits.images[:80]]
    table = datasets.Dataset.from_dict({"image": rows, "label": digits.target[:80].tolist()})
    table = table.cast_column("image", datasets.Image())
    table.to_parquet(tmp_path / "train.parquet")
    hub_server.store.add(
        "org/digits", {"data/train.parquet": (tmp_path / "train.parquet").read_bytes()}, kind="dataset"
    )
    (tmp_path / "new").mkdir()
    for k in range(5):
        (tmp_path / "new" / f"{k}.png").write_bytes(png(digits.images[100 + k]))
    there = child(FIT, [tmp_path / "new", tmp_path / "store"])
    here = child(USE, [tmp_path / "new"], HF_HOME=str(tmp_path / "elsewhere"))
    assert (here["kappa"], here["loss"]) == (there["kappa"], there["loss"])
    assert there["address"].endswith(here["loaded"])
    network = hub_server.store.repositories["model", "org/net"].find("main").oid
    assert here["revision"] == network  # the backbone of the commit it was fitted on
    card = hub_server.store.read(
        hub_server.store.repositories["model", "org/digits-uncertainty"].find("main"), "README.md"
    )
    assert b"base_model: org/net" in card
    assert b'posthoc.load("org/digits-uncertainty")\n' in card
    assert hub_server.store.repositories["model", "org/digits-uncertainty"].private


MOVES = """
import json, sys, warnings
import numpy as np
import posthoc

warnings.simplefilter("ignore", UserWarning)
images = np.load(sys.argv[1])
if sys.argv[2] == "fit":
    model = posthoc.wrap("test_resnet.r160_in1k", "kappa")
    model.fit((images, np.arange(len(images)) % 4), epochs=1, batch_size=16, validation=0.3)
    model.push_to_hub("org/moved")
model = posthoc.load("org/moved")
print(json.dumps([model.backbone.revision, model.predict(images[:4]).uncertainty.tolist()]))
"""


def test_a_backbone_whose_repository_moved_on_is_loaded_as_it_was(hub_server, child, tmp_path):
    def weights(seed: int) -> bytes:
        torch.manual_seed(seed)
        return save(timm.create_model("test_resnet.r160_in1k", pretrained=False).state_dict())

    np.save(tmp_path / "images.npy", np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), dtype=np.uint8))
    environment = {"POSTHOC_CACHE": str(tmp_path / "store")}
    first = hub_server.store.add("timm/test_resnet.r160_in1k", {"model.safetensors": weights(0)})
    before = child(MOVES, [tmp_path / "images.npy", "fit"], **environment)
    hub_server.store.add("timm/test_resnet.r160_in1k", {"model.safetensors": weights(1)})
    after = child(MOVES, [tmp_path / "images.npy", "use"], HF_HOME=str(tmp_path / "elsewhere"), **environment)
    assert before[0] == first
    assert after == before
