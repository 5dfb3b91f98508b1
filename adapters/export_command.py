"""`posthoc export`: an adapter and its backbone as one file that needs neither."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from .command_backbone import named_backbone

if TYPE_CHECKING:
    from .export import Exported


@dataclass
class Export:
    """Write backbone and heads as one graph, .onnx or .pt2, which answers without posthoc; preprocessing beside it."""

    adapter: Annotated[Positional[str], arg(metavar="ADAPTER")]
    """folder, or hub id"""
    file: Annotated[Positional[Path], arg(metavar="FILE")]
    """a .onnx or .pt2 file; FILE.json is written beside it"""
    head: tuple[str, ...] = ()
    """which heads, the first one with the plain names; default: all, as fitted"""
    backbone: str | None = None
    """timm name of the backbone, where the adapter does not name one"""
    checkpoint: Path | None = None
    """local weights of that backbone"""
    revision: str | None = None
    """branch, tag or commit of a hub id"""

    def run(self) -> None:
        from .distributed import check_launch
        from .export_formats import format_of
        from .model import load

        format_of(self.file).require()  # before a backbone is fetched
        model = load(
            self.adapter,
            self.revision,
            named_backbone(self.adapter, self.revision, self.backbone, self.checkpoint),
        )
        written = model.export(self.file, self.head or None)
        if check_launch().is_main:
            print(report(written))


def report(written: Exported) -> str:
    """What was written, in lines."""
    graph, *others = written.files
    largest = max(value for name, value in written.differences.items() if not name.endswith("percentile"))
    lines = [f"{graph}: {_size(graph)}, outputs {', '.join(written.differences)}"]
    for other in others:
        if other.suffix == ".json":
            lines.append(f"{other}: preprocessing, outputs, thresholds")
        else:
            why = "one .onnx holds no more than 2 GB, so the weights lie beside it; keep the two together"
            lines.append(f"{other}: {_size(other)}; {why}")
    return "\n".join([*lines, f"run and compared with PyTorch: largest relative difference {largest:.1e}"])


def _size(path: Path) -> str:
    return f"{path.stat().st_size / 1e6:.1f} MB"
