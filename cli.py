"""The `posthoc` command: fit, predict, info, check, cache."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.conf import Positional, arg, subcommand

from . import __version__
from .adapters.errors import OptionError, PosthocError

EXAMPLES = {
    "fit": "Example: posthoc fit resnet50.a1_in1k photos/ --head kappa loss --output adapter/",
    "predict": "Example: posthoc predict adapter/ new-photos/ --output scores.csv --abstain 0.95",
    "info": "Example: posthoc info adapter/",
    "check": "Example: posthoc check resnet50.a1_in1k",
    "cache": "Example: posthoc cache --prune --older-than-days 30",
}


@dataclass
class Fit:
    """Fit heads on a frozen backbone and write an adapter."""

    model: Positional[str]
    """timm name, or hf-hub: id"""
    data: Positional[str]
    """image folder (one subfolder per class, or flat), parquet file, or hub data set id"""
    output: Path
    """folder of the adapter"""
    head: tuple[str, ...] = ("kappa",)
    """one or several of kappa, temperature, loss, laplace"""
    checkpoint: Path | None = None
    """local weights, .safetensors or .pth"""
    pretrained: bool = True
    positives: str = "auto"
    """labels, soft-labels, views, or a column's name"""
    views: int = 8
    validation: float = 0.1
    epochs: int | None = None
    lr: float | None = None
    batch_size: int = 512
    seed: int = 0
    device: str | None = None
    cache_dir: Path | None = None
    run_dir: Path | None = None
    """where metrics and checkpoints go, from which the same fit resumes"""

    def run(self) -> None:
        from .adapters.model import wrap

        model = wrap(
            self.model, list(self.head), pretrained=self.pretrained, checkpoint=self.checkpoint, device=self.device
        )
        model.fit(
            self.data,
            positives=self.positives,
            views=self.views,
            validation=self.validation,
            epochs=self.epochs,
            lr=self.lr,
            batch_size=self.batch_size,
            seed=self.seed,
            cache_dir=self.cache_dir,
            output_dir=self.run_dir,
        )
        folder = model.save_pretrained(self.output)
        for name, report in model.report.items():
            held_out = report["held_out"]
            print(f"{name}: {report['rows']} rows in {report['seconds']:.1f} s; held-out scores {held_out}")
        print(f"adapter written to {folder}")


@dataclass
class Predict:
    """Score images with a fitted adapter; writes path, label, uncertainty and percentile to .csv or .parquet."""

    adapter: Positional[str]
    """folder, or hub id"""
    data: Positional[str]
    """image, image folder, parquet file, or hub data set id"""
    output: Path
    """a .csv or .parquet file"""
    abstain: Annotated[float | None, arg(metavar="COVERAGE")] = None
    """add a column that is true where to abstain, so that this share of images like the held-out ones is kept"""
    head: str | None = None
    """whose scores; default: the first head's"""
    backbone: str | None = None
    """timm name of the backbone, where the adapter does not name one"""
    checkpoint: Path | None = None
    """local weights of that backbone"""
    revision: str | None = None
    batch_size: int = 64

    def run(self) -> None:
        from .adapters.backbone import build_backbone
        from .adapters.data import open_source
        from .adapters.model import load

        if self.output.suffix not in (".csv", ".parquet"):
            raise OptionError(f"--output {self.output} was given; expected a file that ends in .csv or .parquet")
        backbone = None
        if self.checkpoint is not None:
            name = self.backbone or load_name(self.adapter, self.revision)
            backbone = build_backbone(name, checkpoint=self.checkpoint)
        model = load(self.adapter, self.revision, self.backbone if backbone is None else backbone)
        head = self.head or next(iter(model.heads))
        threshold = None if self.abstain is None else model.threshold(coverage=self.abstain, head=head)
        source = open_source(self.data)
        prediction = model.predict(source, fields=("uncertainty",), batch_size=self.batch_size)[head]
        score, percentile = prediction.uncertainty.tolist(), prediction.percentile.tolist()
        columns: dict[str, list[Any]] = {
            "path": source.names() or [str(i) for i in range(len(score))],
            "label": labels_of(source, len(score)),
            "uncertainty": score,
            "percentile": percentile,
        }
        if threshold is not None:
            columns["abstain"] = [u > threshold for u in score]
        write_table(self.output, columns)
        kept = "" if threshold is None else f"; abstaining on {sum(columns['abstain'])} above {threshold:.6g}"
        print(f"{len(score)} images scored by {head!r} ({model.kinds()[head]}), written to {self.output}{kept}")


@dataclass
class Info:
    """Say what an adapter is: heads, backbone, data, held-out scores. Loads no backbone."""

    adapter: Positional[str]
    """folder, or hub id"""
    revision: str | None = None
    json: bool = False
    """print the whole configuration"""

    def run(self) -> None:
        from dataclasses import asdict

        config = read_adapter(self.adapter, self.revision)
        if self.json:
            print(json.dumps(asdict(config), indent=2))
            return
        b = config.backbone
        print(f"backbone     {b.name} ({b.source}), embedding {b.embedding_dim}, classes {b.num_classes}")
        for scope, value in b.fingerprints.items():
            print(f"fingerprint  {scope}: {value}")
        for head in config.heads:
            print(f"head         {head.name} ({head.kind}): {head.options}")
            print(f"             held-out scores: {head.report.get('held_out')}")
        print(f"data         {config.data}")
        print(f"size         {config.weights.bytes:,} bytes; schema {config.schema_version}; {config.versions}")


@dataclass
class Check:
    """Say what wrap finds in a model: embedding, classifier, preprocessing, cost."""

    model: Positional[str]
    """timm name, or hf-hub: id"""
    pretrained: bool = False
    """with the pretrained weights, which are then downloaded"""
    device: str | None = None

    def run(self) -> None:
        from .adapters.backbone import build_backbone

        described = build_backbone(self.model, pretrained=self.pretrained, device=self.device).describe()
        width = max(len(key) for key in described)
        for key, value in described.items():
            print(f"{key:<{width}}  {'-' if value is None else value}")


@dataclass
class Cache:
    """List the feature store, its sizes, and prune it."""

    cache_dir: Path | None = None
    """default: $POSTHOC_CACHE or ~/.cache/posthoc/features"""
    prune: bool = False
    """delete what the other options name; with none of them, everything"""
    older_than_days: float | None = None
    keys: tuple[str, ...] = ()
    partial_only: bool = False

    def run(self) -> None:
        from .adapters.store import default_cache_dir, list_stores, prune

        if self.prune:
            freed = prune(self.cache_dir, self.older_than_days, list(self.keys) or None, self.partial_only)
            print(f"{freed / 1e6:.1f} MB freed")
            return
        stores = list_stores(self.cache_dir)
        print(f"{self.cache_dir or default_cache_dir()}: {sum(s.bytes for s in stores) / 1e6:.1f} MB in {len(stores)}")
        for s in stores:
            state = "complete" if s.complete else "partial"
            print(
                f"{s.key[:12]}  {s.bytes / 1e6:>9.1f} MB  {s.rows or '?':>8} rows  {state:<8}  {s.backbone}  {s.data}"
            )


def labels_of(source: Any, rows: int) -> list[Any]:
    """The label of each row as far as the data has any, without decoding an image."""
    from .adapters.errors import DataError
    from .adapters.source_base import LABEL_COLUMNS

    for name in LABEL_COLUMNS:
        try:
            return list(source.column(name).tolist())
        except DataError:
            continue
    return [None] * rows


def read_adapter(address: str, revision: str | None) -> Any:
    """The checked configuration of an adapter in a folder or on the hub."""
    from .adapters.files import read_config
    from .adapters.locate import locate

    return read_config(locate(address, revision))


def load_name(address: str, revision: str | None) -> str:
    """The timm name of the backbone an adapter was fitted on."""
    described = read_adapter(address, revision).backbone
    if described.source == "module":
        raise OptionError(
            "this adapter belongs to an own module: load it in Python with posthoc.load(..., backbone=...)"
        )
    return str(described.name)


def write_table(path: Path, columns: dict[str, list[Any]]) -> None:
    """Write columns of equal length under a temporary name, then rename."""
    part = path.with_name(f".{path.name}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table(columns), part)
    else:
        with part.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            writer.writerows(zip(*columns.values(), strict=True))
    part.replace(path)


def _commands() -> Any:
    commands: dict[str, type] = {"fit": Fit, "predict": Predict, "info": Info, "check": Check, "cache": Cache}
    annotated: Iterable[Any] = [
        Annotated[c, subcommand(name=n, description=f"{c.__doc__}\n\n{EXAMPLES[n]}")] for n, c in commands.items()
    ]
    union: Any = None
    for one in annotated:
        union = one if union is None else union | one
    return union


def main(argv: list[str] | None = None) -> None:
    """Run the command line; a `PosthocError` is one line on stderr and exit status 2."""
    arguments = sys.argv[1:] if argv is None else argv
    if arguments in (["--version"], ["-V"]):
        print(f"posthoc {__version__}")
        return
    description = "posthoc: honest uncertainty for any pretrained vision model, after the fact."
    command = tyro.cli(_commands(), prog="posthoc", description=description, args=arguments)
    run: Callable[[], None] = command.run
    try:
        run()
    except PosthocError as error:
        print(f"posthoc: {error}", file=sys.stderr)
        raise SystemExit(2) from None
