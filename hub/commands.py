"""The commands about the hub: `posthoc push`, `pull`, `search` and `zoo`."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from ..adapters.command_line import command_words, published
from ..adapters.distributed import check_launch
from ..adapters.errors import OptionError


@dataclass
class Push:
    """Publish an adapter on the hub in one commit, with its card and what was measured of it (FOLDER/evaluation)."""

    folder: Annotated[Positional[Path], arg(metavar="FOLDER")]
    """the adapter, as `posthoc fit` wrote it"""
    repo_id: Annotated[Positional[str], arg(metavar="ORG/NAME")]
    """where it goes; made if there is none"""
    revision: str | None = None
    """branch to commit to; default: main"""
    private: bool = False
    """a new repository is only for those it is shared with"""
    message: str | None = None
    """of the commit"""
    create_pr: bool = False
    """open a pull request instead"""
    license: str | None = None
    """the hub's word for the adapter's licence, such as mit"""

    def run(self) -> None:
        from .pushing import push

        def work() -> str:
            return push(
                self.folder,
                self.repo_id,
                revision=self.revision,
                private=self.private or None,
                commit_message=self.message,
                create_pr=self.create_pr,
                license=self.license,
            )

        _tell([check_launch().on_main(work)])


@dataclass
class Pull:
    """Download an adapter and say where it lies; without a connection, what the cache has."""

    repo_id: Annotated[Positional[str], arg(metavar="ORG/NAME")]
    """hub id, or zoo/NAME"""
    revision: str | None = None
    """branch, tag or commit"""

    def run(self) -> None:
        from .pulling import pull

        _tell([check_launch().on_main(lambda: str(pull(self.repo_id, self.revision)))])


@dataclass
class Search:
    """Find adapters on the hub, the most downloaded first."""

    query: Annotated[Positional[str | None], arg(metavar="WORDS")] = None
    """words of the id"""
    backbone: str | None = None
    """timm name or hub id that they belong to"""
    head: str | None = None
    """kappa, temperature, loss, laplace or metric-laplace"""
    author: str | None = None
    """user or organisation"""
    limit: int = 50
    """at most so many"""

    def run(self) -> None:
        from .searching import list_adapters

        found = check_launch().on_main(
            lambda: list_adapters(
                self.query, backbone=self.backbone, head=self.head, author=self.author, limit=self.limit
            )
        )
        width = max((len(one.repo_id) for one in found), default=0)
        lines = [
            f"{one.repo_id:<{width}}  {', '.join(one.heads)}  on {one.base_model or 'a module of its own'}  "
            f"{one.downloads} downloads"
            for one in found
        ]
        _tell(lines or ["no adapter fits"])


@dataclass
class Zoo:
    """The default adapters: list them, make them, publish them."""

    what: Annotated[Positional[Literal["list", "build", "publish"]], arg(metavar="list|build|publish")]
    """list: names and what each is fitted on; build: fit, evaluate, write card and plots; publish: push what was built"""
    names: Annotated[Positional[tuple[str, ...]], arg(metavar="NAME")] = ()
    """names such as efficientnet-lite0-loss, or patterns; default: all of them"""
    folder: Path = Path("zoo")
    """where the adapters are built"""
    data: str | None = None
    """another place of the images than the list's: folder, parquet file, hub data set id"""
    ood: tuple[str, ...] = ()
    """other OOD sets than the list's"""
    checkpoint: Path | None = None
    """the backbone's weights, where they cannot be downloaded"""
    device: str | None = None
    """where the network runs, such as cuda; without it: the CPU"""
    resamples: int = 1000
    """of the bootstrap of what is measured"""
    private: bool = False
    """publish in repositories that are only for those they are shared with"""
    license: str | None = None
    """the hub's word for the adapters' licence"""

    def run(self) -> None:
        from .zoo import chosen

        found = chosen(self.names)
        if self.what == "list":
            width = max(len(entry.name) for entry in found)
            _tell(
                [
                    f"{entry.name:<{width}}  {entry.head} on {entry.backbone}, {entry.images} ({entry.split})"
                    for entry in found
                ]
            )
            return
        if self.what == "build":
            if self.checkpoint is not None and len({entry.backbone for entry in found}) > 1:
                raise OptionError("--checkpoint is of one backbone; give names of that one's adapters only")
            self._build(found)
        else:
            self._publish(found)

    def _build(self, found: list) -> None:
        from .zoo_build import build

        for entry in found:
            words = command_words(
                replace(self, names=(entry.name,)), ("posthoc", "zoo"), ("what", "names"), ("folder", "device")
            )
            folder = build(
                entry,
                self.folder,
                data=self.data,
                ood=self.ood,
                checkpoint=self.checkpoint,
                device=self.device,
                command=shlex.join(published(words)),
                resamples=self.resamples,
            )
            _tell([f"{entry.name}: {folder}"])

    def _publish(self, found: list) -> None:
        from .pushing import push
        from .zoo import namespace

        there = [entry.name for entry in found if (self.folder / entry.name).is_dir()]
        missing = [name for name in self.names if name not in there and name in {entry.name for entry in found}]
        if missing or not there:
            lacking = ", ".join(missing or [entry.name for entry in found[:3]])
            raise OptionError(f"{self.folder} has no {lacking}: first `posthoc zoo build NAME`, or give --folder")
        for name in there:
            push_it = partial(
                push, self.folder / name, f"{namespace()}/{name}", private=self.private or None, license=self.license
            )
            _tell([f"{name}: {check_launch().on_main(push_it)}"])


def _tell(lines: list[str]) -> None:
    """Print from the main process of a launch."""
    if check_launch().is_main:
        print("\n".join(lines), flush=True)
