"""The hub of the tests, asked by the libraries that users of a hub come with: torch, timm and datasets."""

from __future__ import annotations

import io

import pyarrow as pa
import pyarrow.parquet as pq

from .conftest import Child
from .server import HubServer

MODELS = """
import json
import timm, torch
from huggingface_hub import PyTorchModelHubMixin

class Net(torch.nn.Module, PyTorchModelHubMixin, library_name="tests", tags=["a-tag"]):
    def __init__(self, width: int = 3):
        super().__init__()
        self.layer = torch.nn.Linear(width, 2)

torch.manual_seed(0)
net = Net(width=5)
net.push_to_hub("org/net")
again = Net.from_pretrained("org/net")
same = torch.equal(net.layer.weight, again.layer.weight)

model = timm.create_model("test_resnet.r160_in1k", num_classes=7).eval()
timm.models.push_to_hf_hub(model, "org/timm", safe_serialization=True)
loaded = timm.create_model("hf-hub:org/timm", pretrained=True).eval()
images = torch.randn(2, 3, 160, 160)
with torch.inference_mode():
    print(json.dumps({"same": same, "width": again.layer.in_features, "logits": list(loaded(images).shape),
                      "difference": (loaded(images) - model(images)).abs().max().item()}))
"""


def test_torch_and_timm_models_go_and_come_back(hub_server: HubServer, child: Child) -> None:
    got = child(MODELS)
    assert got == {"same": True, "width": 5, "logits": [2, 7], "difference": 0.0}
    repository = hub_server.store.repositories["model", "org/timm"]
    files = hub_server.protocol.commit(repository, "main").files
    assert {"config.json", "model.safetensors"} <= set(files)
    assert files["model.safetensors"].sha256 is not None


DATA = """
import json
from datasets import load_dataset
rows = load_dataset("org/rows", split="train")
stream = load_dataset("org/rows", split="train", streaming=True, revision="v1")
print(json.dumps({"rows": rows["number"][:], "streamed": [row["number"] for row in stream]}))
"""


def test_a_parquet_file_is_loaded_and_streamed_by_datasets(hub_server: HubServer, child: Child) -> None:
    def parquet(numbers: list[int]) -> dict[str, bytes]:
        file = io.BytesIO()
        pq.write_table(pa.table({"number": numbers}), file)
        return {"data/train-00000-of-00001.parquet": file.getvalue()}

    first = hub_server.store.add("org/rows", parquet([1, 2]), kind="dataset")
    hub_server.store.add("org/rows", parquet([1, 2, 3]), kind="dataset")
    hub_server.store.repositories["dataset", "org/rows"].tags["v1"] = first
    assert child(DATA) == {"rows": [1, 2, 3], "streamed": [1, 2]}
