"""Adapters on the hub: publish, find, download.

>>> from posthoc import hub
>>> hub.push("adapter/", "org/resnet50-kappa")  # doctest: +SKIP
>>> hub.search(backbone="resnet50.a1_in1k", head="kappa")  # doctest: +SKIP
>>> hub.pull("org/resnet50-kappa", revision="v1.0")  # doctest: +SKIP
"""

from .pull import pull
from .push import push
from .search import list_adapters as search

__all__ = ["pull", "push", "search"]
