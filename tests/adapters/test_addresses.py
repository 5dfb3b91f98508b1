"""Adapters at fsspec addresses: the same scores, nothing half-written, and no more bytes than an adapter has."""

from __future__ import annotations

import fsspec
import numpy as np
import pytest
import torch
from torch import nn

import posthoc
from posthoc.adapters import addresses, files
from posthoc.adapters.errors import AdapterError
from posthoc.adapters.locate import is_address

pytestmark = pytest.mark.filterwarnings("ignore:the backbone's accuracy")


@pytest.fixture
def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 6 * 6, 16), nn.ReLU(), nn.Linear(16, 4))


@pytest.fixture
def model(network):
    images = torch.randn(40, 3, 6, 6, generator=torch.Generator().manual_seed(2))
    return posthoc.wrap(network, "loss").fit((images, np.arange(40) % 4), epochs=1, batch_size=16)


@pytest.fixture
def place(request):
    """An address of this test's own in memory."""
    address = f"memory://{request.node.name}"
    yield address
    files_of, root = fsspec.url_to_fs(address)
    if files_of.exists(root):
        files_of.rm(root, recursive=True)


IMAGES = torch.randn(5, 3, 6, 6, generator=torch.Generator().manual_seed(3))


def test_what_is_saved_at_an_address_is_loaded_from_it(model, network, place, tmp_path):
    for address in (place, f"file://{tmp_path}/adapter"):
        assert model.save_pretrained(address) == address
        again = posthoc.load(address, backbone=network)
        assert torch.equal(again(IMAGES).uncertainty, model(IMAGES).uncertainty)
        assert again.loaded_from["address"] == address
    held, root = fsspec.url_to_fs(place)
    names = {path.rpartition("/")[2] for path in held.ls(root, detail=False)}
    assert names == {files.CONFIG_NAME, files.WEIGHTS_NAME, files.CARD_NAME}
    assert f'posthoc.load("{place}"' in held.cat_file(f"{root}/README.md").decode()


def test_saving_anew_is_seen(model, network, place):
    model.save_pretrained(place)
    first = posthoc.load(place, backbone=network)(IMAGES).uncertainty
    images = torch.randn(40, 3, 6, 6, generator=torch.Generator().manual_seed(4))
    model.fit((images, np.arange(40) % 4), epochs=1, batch_size=16, seed=1)
    model.save_pretrained(place)
    assert not torch.equal(posthoc.load(place, backbone=network)(IMAGES).uncertainty, first)


def test_half_an_adapter_is_refused(model, network, place):
    with pytest.raises(AdapterError, match=r"has no adapter_config\.json"):
        posthoc.load(place, backbone=network)
    model.save_pretrained(place)
    held, root = fsspec.url_to_fs(place)
    held.pipe_file(f"{root}/{files.WEIGHTS_NAME}", held.cat_file(f"{root}/{files.WEIGHTS_NAME}")[:-5])
    with pytest.raises(AdapterError, match="truncated"):
        posthoc.load(place, backbone=network)
    held.rm(f"{root}/{files.WEIGHTS_NAME}")
    with pytest.raises(AdapterError, match=r"has no adapter\.safetensors"):
        posthoc.load(place, backbone=network)


def test_large_files_are_not_read(place, monkeypatch):
    monkeypatch.setattr(addresses, "MAX_CONFIG_BYTES", 10)
    held, root = fsspec.url_to_fs(place)
    held.pipe_file(f"{root}/{files.CONFIG_NAME}", b"x" * 11)
    with pytest.raises(AdapterError, match="has 11 bytes, more than any adapter needs"):
        posthoc.load(place)


def test_an_unknown_protocol_is_one_clear_error(model):
    with pytest.raises(AdapterError, match="cannot read nowhere://x"):
        posthoc.load("nowhere://x")
    with pytest.raises(AdapterError, match="cannot write nowhere://x"):
        model.save_pretrained("nowhere://x")


def test_paths_are_no_addresses(tmp_path):
    assert is_address("s3://bucket/adapter")
    for name in ("adapter", "./a:b", "/a//b", "org/name", tmp_path):
        assert not is_address(name)
