"""The `posthoc` command: demo, fit, predict, eval, features, info, export, push, pull, search, zoo, check, cache."""

from __future__ import annotations

import json
import os
import shlex
import sys
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tyro
from tyro.conf import Positional, arg, subcommand

from . import __version__
from .adapters.command_backbone import named_backbone
from .adapters.errors import OptionError, PosthocError
from .adapters.export_command import Export
from .eval.feature_file import FeatureFile
from .hub.commands import Pull, Push, Search, Zoo

EXAMPLES = {
    "demo": "Example: posthoc demo",
    "fit": "Example: posthoc fit resnet50.a1_in1k photos/ --head kappa loss --output adapter/",
    "predict": "Example: posthoc predict adapter/ new-photos/ --output scores.csv --abstain 0.95",
    "eval": "Example: posthoc eval ood --id test.npz --ood textures.npz",
    "features": "Example: posthoc features resnet50.a1_in1k cifar10 --npz prior.npz",
    "info": "Example: posthoc info adapter/",
    "export": "Example: posthoc export adapter/ model.onnx",
    "push": "Example: posthoc push adapter/ org/resnet50-kappa --license mit",
    "pull": "Example: posthoc pull org/resnet50-kappa --revision v1.0",
    "search": "Example: posthoc search --backbone resnet50.a1_in1k --head kappa",
    "zoo": "Example: posthoc zoo build efficientnet-lite0-loss --data photos/ --ood textures/",
    "check": "Example: posthoc check resnet50.a1_in1k",
    "cache": "Example: posthoc cache --prune --older-than-days 30",
}


@dataclass
class Demo:
    """Give a real ImageNet network an uncertainty and check it by eye: unseen classes, blur, errors, and a picture."""


Evaluation = Literal[
    "ood",
    "calibration",
    "selective",
    "retrieval",
    "probe",
    "conformal",
    "shift",
    "ambiguity",
    "transfer",
    "report",
]
EVALUATIONS: tuple[str, ...] = get_args(Evaluation)
"""What `posthoc eval NAME` runs: the `main` of `posthoc.eval.NAME`."""


@dataclass
class Eval:
    """Tables with intervals: `posthoc eval ood`, `calibration`, `shift`, ...; each explains itself with --help."""

    what: Annotated[Positional[Evaluation], arg(metavar="WHAT")]
    """ood, calibration, selective, retrieval, probe, conformal, shift, ambiguity, transfer or report; its own options follow"""

    def run(self) -> None:
        import_module(f".eval.{self.what}", __package__).main([])


@dataclass
class Fit:
    """Fit heads on a frozen backbone and write an adapter."""

    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """timm name, or hf-hub: id"""
    data: Annotated[Positional[str], arg(metavar="DATA")]
    """image folder (one subfolder per class, or flat), parquet file, or hub data set id"""
    output: Path
    """folder of the adapter"""
    head: tuple[str, ...] = ("kappa",)
    """one or several of kappa, temperature, loss, laplace, metric-laplace"""
    checkpoint: Path | None = None
    """local weights, .safetensors or .pth"""
    pretrained: bool = True
    """with the model's pretrained weights"""
    split: str = "train"
    """of a hub data set, or of a folder of splits"""
    positives: str = "auto"
    """which images belong together: labels, soft-labels, views, a column's name; auto: labels if there are any"""
    views: int = 8
    """augmented views of each image, where positives are views"""
    validation: float = 0.1
    """share of the rows that is held out"""
    group: str | None = None
    """column whose rows of one value fall on one side of that split"""
    epochs: int | None = None
    """default: each head's own"""
    lr: float | None = None
    """default: each head's own"""
    batch_size: int = 512
    """rows in a training step"""
    seed: int = 0
    """of the split and the training"""
    device: str | None = None
    """where the network runs, such as cuda; without it: the CPU"""
    cache_dir: Path | None = None
    """feature store; default: $POSTHOC_CACHE or ~/.cache/posthoc/features"""
    run_dir: Path | None = None
    """where metrics and checkpoints go, from which the same fit resumes"""

    def run(self) -> None:
        from .adapters.command_line import command_words, published
        from .adapters.data import open_source
        from .adapters.model import wrap

        if not self.pretrained and self.checkpoint is None:
            warnings.warn(
                "--no-pretrained without --checkpoint: the weights are random and nowhere else, so this adapter can "
                "never be loaded again; this is for trying things out only",
                UserWarning,
                stacklevel=2,
            )
        model = wrap(
            self.model, list(self.head), pretrained=self.pretrained, checkpoint=self.checkpoint, device=self.device
        )
        model.fit(
            open_source(self.data, self.split),
            positives=self.positives,
            views=self.views,
            validation=self.validation,
            group=self.group,
            epochs=self.epochs,
            lr=self.lr,
            batch_size=self.batch_size,
            seed=self.seed,
            cache_dir=self.cache_dir,
            output_dir=self.run_dir,
        )
        kept = command_words(
            self, ("posthoc", "fit"), ("model", "data"), skip=("output", "cache_dir", "run_dir", "device")
        )
        model.fitted_on["fit"]["command"] = shlex.join(published(kept))
        folder = model.save_pretrained(self.output)
        for name, report in model.report.items():
            spread = _spread(report["held_out"])
            _tell(f"{name}: fitted on {report['rows']} rows in {report['seconds']:.1f} s; {spread}")
        _tell(f"adapter written to {folder}")


@dataclass
class Predict:
    """Score images with a fitted adapter; writes path, label, uncertainty and percentile to .csv or .parquet."""

    adapter: Annotated[Positional[str], arg(metavar="ADAPTER")]
    """folder, or hub id"""
    data: Annotated[Positional[str], arg(metavar="DATA")]
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
    """branch, tag or commit of a hub id"""
    split: str = "test"
    """of a hub data set, or of a folder of splits"""
    batch_size: int = 64
    """images in one pass"""
    device: str | None = None
    """where the network runs, such as cuda; without it: the CPU"""

    def run(self) -> None:
        from .adapters.data import open_source
        from .adapters.distributed import check_launch
        from .adapters.model import load
        from .adapters.score_table import labels_of, write_table

        if self.output.suffix not in (".csv", ".parquet"):
            raise OptionError(f"--output {self.output} was given; expected a file that ends in .csv or .parquet")
        backbone = named_backbone(self.adapter, self.revision, self.backbone, self.checkpoint)
        model = load(self.adapter, self.revision, backbone, device=self.device)
        head = self.head or next(iter(model.heads))
        threshold = None if self.abstain is None else model.threshold(coverage=self.abstain, head=head)
        source = open_source(self.data, self.split)
        prediction = model.predict(source, fields=("uncertainty",), batch_size=self.batch_size)[head]
        score, percentile = prediction.uncertainty.tolist(), prediction.percentile.tolist()
        columns: dict[str, list[Any]] = {
            "path": source.names() or [str(row) for row in range(len(score))],
            "label": labels_of(source, len(score)),
            "uncertainty": score,
            "percentile": percentile,
        }
        if threshold is not None:
            columns["abstain"] = [u > threshold for u in score]
        check_launch().on_main(lambda: write_table(self.output, columns))
        kept = "" if threshold is None else f"; abstaining on {sum(columns['abstain'])} above {threshold:.6g}"
        _tell(f"{len(score)} images scored by {head!r} ({model.kinds()[head]}), written to {self.output}{kept}")


@dataclass
class Info:
    """Say what an adapter is: heads, backbone, data, held-out scores. Loads no backbone."""

    adapter: Annotated[Positional[str], arg(metavar="ADAPTER")]
    """folder, or hub id"""
    revision: str | None = None
    """branch, tag or commit of a hub id"""
    json: bool = False
    """print the whole configuration"""

    def run(self) -> None:
        from dataclasses import asdict

        from .adapters.files import commit_of, read_config
        from .adapters.locate import locate

        folder = locate(self.adapter, self.revision)
        config = read_config(folder)
        if self.json:
            print(json.dumps(asdict(config), indent=2))
            return
        if commit := commit_of(folder):
            print(f"commit       {commit} of {self.adapter}")
        b = config.backbone
        revision = f", revision {b.revision}" if b.revision else ""
        print(f"backbone     {b.name} ({b.source}, weights {b.weights}{revision})")
        print(f"             embedding {b.embedding_dim}, classes {b.num_classes}")
        for scope, value in b.fingerprints.items():
            print(f"fingerprint  {scope}: {value}")
        for head in config.heads:
            print(f"head         {head.name} ({head.kind}): {head.options}")
            print(f"             {_spread(head.held_out)}")
        fit = config.fit
        print(f"data         {config.data.get('kind')} {config.data.get('name', '')}, {config.data.get('rows')} rows")
        print(
            f"fit          positives {fit.get('positives')}, seed {fit.get('seed')}, held out {fit.get('held_out_rows')}"
        )
        print(f"size         {config.weights.bytes:,} bytes; schema {config.schema_version}")
        print(f"written by   {', '.join(f'{name} {version}' for name, version in config.versions.items())}")


@dataclass
class Check:
    """Say what wrap finds in a model: embedding, classifier, preprocessing, cost."""

    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """timm name, or hf-hub: id"""
    pretrained: bool = False
    """with the pretrained weights, which are then downloaded"""
    device: str | None = None
    """where the network runs, such as cuda; without it: the CPU"""

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
    """what was not used for so long"""
    keys: tuple[str, ...] = ()
    """what has a key that begins so"""
    partial_only: bool = False
    """what is unfinished"""

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


def _tell(line: str) -> None:
    """Print from the main process of a launch."""
    from .adapters.distributed import check_launch

    if check_launch().is_main:
        print(line)


def _spread(held_out: dict[str, Any]) -> str:
    """A head's held-out scores in one line."""
    shown = ", ".join(f"{name} {held_out[name]:.4g}" for name in ("q05", "median", "q95") if name in held_out)
    return f"{held_out.get('rows', 0)} held-out scores: {shown}"


def _commands() -> Any:
    commands: dict[str, type] = {
        "fit": Fit,
        "predict": Predict,
        "eval": Eval,
        "features": FeatureFile,
        "info": Info,
        "export": Export,
        "push": Push,
        "pull": Pull,
        "search": Search,
        "zoo": Zoo,
        "check": Check,
        "cache": Cache,
    }
    if find_spec(f"{__package__}.recipes.demo"):
        commands = {"demo": Demo, **commands}
    annotated: Iterable[Any] = [
        Annotated[c, subcommand(name=n, description=f"{c.__doc__}\n\n{EXAMPLES[n]}")] for n, c in commands.items()
    ]
    union: Any = None
    for one in annotated:
        union = one if union is None else union | one
    return union


def _run(arguments: list[str]) -> None:
    if arguments[:1] == ["demo"]:
        _demo(arguments[1:])
        return
    if arguments[:1] == ["eval"] and arguments[1:2] and arguments[1] in EVALUATIONS:
        import_module(f".eval.{arguments[1]}", __package__).main(arguments[2:])
        return
    description = "posthoc: honest uncertainty for any pretrained vision model, after the fact."
    command = tyro.cli(_commands(), prog="posthoc", description=description, args=arguments)
    command.run()


def _demo(arguments: list[str]) -> None:
    """The demo brings its own options; it is imported only when it is asked for."""
    try:
        demo: Any = import_module(".recipes.demo", __package__)
    except ImportError as error:
        raise PosthocError(f"the demo needs {error.name}: pip install 'posthoc[demo]'") from error
    description = f"{Demo.__doc__}\n\n{EXAMPLES['demo']}"
    demo.main(tyro.cli(demo.DemoOptions, prog="posthoc demo", description=description, args=arguments))


def _warn(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"posthoc: warning: {message}", file=sys.stderr)


def main(argv: list[str] | None = None) -> None:
    """Run the command line; a `PosthocError` is one line on stderr and exit status 2."""
    arguments = sys.argv[1:] if argv is None else argv
    if arguments in (["--version"], ["-V"]):
        print(f"posthoc {__version__}")
        return
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warn
            _run(arguments)
            sys.stdout.flush()
    except BrokenPipeError:  # whoever reads our output has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except PosthocError as error:
        print(f"posthoc: {error}", file=sys.stderr)
        raise SystemExit(2) from None
