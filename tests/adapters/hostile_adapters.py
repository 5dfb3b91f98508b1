"""The written list of hostile adapters: each changes a copy of a good one, or gives another address to load."""

from __future__ import annotations

import json
import os
import typing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from posthoc.adapters import files
from posthoc.adapters.heads import HEADS

from .hostile_changes import (
    MEAN,
    Case,
    as_pickle,
    as_torch,
    at,
    backbone,
    bound_socket,
    cached,
    config,
    filled,
    first,
    flipped,
    folder_link,
    giant,
    headed,
    held_out,
    inner_link,
    length,
    linked,
    literal,
    million,
    one,
    only_more,
    only_pickles,
    option,
    other_blobs,
    outside,
    pickled_config,
    replaced,
    sparse_header,
    special,
    tensors,
    text,
    to,
    truncated,
    weights,
    write_config,
    write_weights,
)

OFFSETS = [
    [4, 36],
    [0, 2**63],
    [0, 2**64],
    [-32, 0],
    [32, 0],
    [0, 33],
    [0],
    [],
    None,
    "0",
    [0.0, 32.0],
    [2**62, 2**62 + 32],
]
SHAPES: list[Any] = [
    [],
    [0],
    [2**32, 2**32],
    [2**63],
    [2**64],
    [-8],
    [8.0],
    ["8"],
    8,
    None,
    [[8]],
    [1] * 100_000,
    [8, 1],
]
LIES: list[Any] = [
    "F64",
    "I32",
    "BF16",
    "F16",
    "F8_E4M3",
    "F8_E5M2",
    "F4",
    "BOOL",
    "C64",
    "U64",
    "f32",
    "X",
    "",
    7,
    None,
    ["F32"],
]

SHARES = (0.0, 0.0001, 0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.999)
PLACES = (0.01, 0.07, 0.13, 0.21, 0.34, 0.42, 0.55, 0.63, 0.78, 0.86, 0.93)
NAMES = (
    "../../x",
    "/etc/passwd",
    "a\x00b",
    "..\\..\\x",
    "%2e%2e%2fx",
    "__class__",
    "",
    "other.weight",
    "kappa",
    "backbone.fc.weight",
)
CLASSES = (
    "os.system",
    "subprocess.Popen",
    "builtins.eval",
    "posthoc.adapters.heads.kappa.KappaHead",
    "../kappa",
    "__import__",
)
LAYERS = (
    "__class__.__init__.__globals__",
    "forward.__globals__",
    "conv.__dict__",
    "../conv",
    "x" * 10_000,
    "",
    3,
    ["conv"],
)
HUB = (
    "hf-hub:../../etc",
    "hf-hub:/etc/passwd",
    "../../x",
    "org/../x",
    "a/b/c",
    "org/x@../../y",
    "file:///etc",
    "org\\x",
    "%2e%2e/x",
    "x",
)
TIMM = (
    "local-dir:/etc",
    "resnet18/../../x",
    "hf-hub:org/x",
    "/etc/passwd",
    "../resnet18",
    "os.system()",
    "resnet18\x00",
    "",
    "a" * 500,
)
REVISIONS = (
    "..",
    "../..",
    "main/../../x",
    "a..b",
    "/etc",
    "main/",
    "a//b",
    "-x",
    "a\x00b",
    "%2e%2e",
    "x" * 500,
    "refs/../../..",
    "",
)
ADDRESSES = (
    "../../etc/passwd",
    "/etc/passwd",
    "/etc",
    "/dev/zero",
    "a/../b",
    "org/..",
    "org/na\x00me",
    "..\\..\\x",
    "%2e%2e/x",
    "~nobody_of_that_name/x",
    "x" * 5000,
    f"{'x/' * 5000}y",
    "",
    "hf-hub:../../etc",
    "local-dir:/etc",
    "file:///etc",
    "file:///dev/zero",
    "file://../../etc",
    "nothing://x/y",
    "org/\ud800",
)
RAW: dict[str, str | bytes] = {
    "empty": "",
    "blanks": "   \n",
    "list": "[]",
    "string": '"adapter"',
    "number": "1",
    "null": "null",
    "brackets": "[" * 100_000,
    "braces": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "closed brackets": "[" * 100_000 + "]" * 100_000,
    "many empty lists": f'{{"a": [{"[]," * 200_000}1]}}',
    "many fields": "{" + ",".join(f'"{i}":0' for i in range(90_000)) + "}",
    "many fields and a twin": "{" + ",".join(f'"{i}":0' for i in range(90_000)) + ',"89999":1}',
    "a long name": f'{{"schema_version": 1, "{"x" * 900_000}": 1}}',
    "5 MB": " " * 5_000_000 + "{}",
    "python": "__import__('os').system('touch executed')",
    "yaml": "!!python/object/apply:os.system ['touch executed']",
    "utf-16": "{}".encode("utf-16"),
    "binary": bytes(range(256)),
    "nul": b"\x00" * 1000,
}
VALUES = (
    *(
        "NaN",
        "Infinity",
        "-Infinity",
        "1e999",
        "-1e999",
        "1" + "0" * 300,
        "9" * 5000,
        "-" + "9" * 400,
        '"\\ud800"',
        '"\\udc00x"',
    ),
    *(
        '"\\u001b[2J"',
        '"\\u0000"',
        "[" * 40 + "]" * 40,
        "[" * 900 + "]" * 900,
        '{"a":' * 500 + "1" + "}" * 500,
        '{"a": 1, "a": 2}',
    ),
    *("01", "+1", ".5", "1.", "0x10", "'x'", "undefined", "/* */ 1", "true false", '{"__proto__"}', '"\x01"'),
)
FIELDS: list[tuple[tuple[Any, ...], Any]] = [
    *((("schema_version",), v) for v in ("1", 1.0, True, None, 0, -1, 2, 10**30, [1])),
    *((("backbone", "embedding_dim"), v) for v in ("8", 8.0, True, None, 0, -8, 9, 2**24, 2**60)),
    *((("backbone", "penultimate_dim"), v) for v in ("8", 8.0, True, None, 0, 7, 2**24)),
    *((("backbone", "num_classes"), v) for v in ("3", 3.0, True, None, -1, 4, 2**24)),
    *(
        (("backbone", "fingerprints"), v)
        for v in ([], None, {}, {"embedding": "a" * 64}, {"embedding": 5}, {"../x": "a" * 64})
    ),
    *((("backbone", "weights"), v) for v in ("pickle", "", None, 5, "/etc/passwd")),
    *((("backbone", "source"), v) for v in ("pickle", "http", "os.system", None, ["module"])),
    *((("weights", "bytes"), v) for v in ("1", -1, 0, 2**70, True, 1e3)),
    *((("weights", "sha256"), v) for v in ("", "A" * 64, "a" * 63, None, 5, "../" + "a" * 61)),
    *((("heads",), v) for v in ([], {}, None, [None], [[]], ["kappa"])),
    *((("heads", 0, "kind"), v) for v in ("epistemic", "", None, 5)),
    *((("heads", 0, "scope"), v) for v in ("", "all", None, "../x", "logits")),
    *((("heads", 0, "classes"), v) for v in ("3", -1, 2**60, True, None)),
    *(
        (("heads", 0, "options"), v)
        for v in ([], None, {"self": 1}, {"head": "loss"}, {"__class__": 1}, {"more": 1}, {"width": 2**20})
    ),
    *((("heads", 0, "held_out"), v) for v in ({}, None, [], {"rows": 10}, {"rows": "27"})),
    *(
        (("heads", 0, "report"), v)
        for v in (None, [], {"share_at_bound": "x"}, {"share_at_bound": 2}, {"share_at_bound": []})
    ),
    *(((name,), v) for name in ("preprocessing", "data", "fit", "versions") for v in (None, [], "x")),
    (("versions", "posthoc"), 1),
    (("versions", "posthoc"), "1\n\n# heading"),
    *(((name,), True) for name in ("trust_remote_code", "custom_code", "__class__", "_target_")),
    (("auto_map",), {"AutoModel": "modeling.Model"}),
    (("backbone", "trust_remote_code"), True),
    (("backbone", "class"), "os.system"),
    (("heads", 0, "module"), "os"),
    (("heads", 0, "class"), "subprocess.Popen"),
]


def options() -> list[Case]:
    """Of every option of every head: negative, enormous, of another type."""
    cases = []
    for head, cls in HEADS.items():
        for name, hint in typing.get_type_hints(cls.__init__).items():
            if name == "return":
                continue
            allowed = typing.get_args(hint) or (hint,)
            bad: list[Any] = [[1], {"a": 1}, "os.system"]
            if int in allowed:
                bad += [-1, 2**40, 10**300, 1.5, "8", True]
            elif float in allowed:
                bad += [-1.0, 1e300, 2**70, "0.5", True]
            else:
                bad += [2, -1e300, None]
            cases += [Case(f"option {head} {name}={value!r:.20}", option(head, name, value)) for value in bad]
    return cases


def cases() -> list[Case]:
    """All of them, numbered."""
    found = [
        *(Case(f"truncated to {s}, repaired {r}", truncated(s, r)) for s in SHARES for r in (False, True)),
        *(
            Case(f"bit {b} of byte {i}, repaired {r}", flipped(i, b, r))
            for i in (0, 1, 3, 7)
            for b in (0, 7)
            for r in (False, True)
        ),
        *(Case(f"header flipped at {p}, repaired {r}", flipped(p, 1, r, True)) for p in PLACES for r in (False, True)),
        *(Case(f"flipped at {p}", flipped(p, 5, False)) for p in PLACES),
        *(
            Case(f"header length {n}", length(n))
            for n in (0, 1, 63, 65, 2**20, 100_000_000, 2**31, 2**32, 2**63, 2**64 - 1)
        ),
        Case("a header of 100 MB", sparse_header),
        Case("a million tensors", headed(million)),
        Case("a file of 1 TB", giant),
        Case("header deep", headed(lambda raw: b"[" * 100_000)),
        Case("header deep objects", headed(lambda raw: b'{"a":' * 100_000)),
        Case("header empty", headed(lambda raw: {})),
        Case("header a list", headed(lambda raw: [])),
        Case("header binary", headed(lambda raw: bytes(range(128, 256)))),
        Case(
            "header twice the same",
            headed(lambda raw: json.dumps(raw).encode()[:-1] + json.dumps(raw).encode().replace(b"{", b",", 1)),
            intact=True,
        ),
        Case("header metadata a number", headed(lambda raw: raw.update(__metadata__=1))),
        Case("header metadata nested", headed(lambda raw: raw.update(__metadata__={"a": {"b": 1}}))),
        Case(
            "header metadata",
            headed(lambda raw: raw.update(__metadata__={"format": "pt", "run": "os.system"})),
            intact=True,
        ),
        Case("header without dtype", headed(lambda raw: raw[MEAN].pop("dtype"))),
        Case("header field more", first(more=1), intact=True),
        *(Case(f"offsets {o}", first(data_offsets=o)) for o in OFFSETS),
        *(Case(f"shape {s!s:.30}", first(shape=s)) for s in SHAPES),
        *(Case(f"dtype {d}", first(dtype=d)) for d in LIES),
        Case("two tensors of one place", headed(lambda raw: raw["kappa.log_range"].update(data_offsets=[0, 8]))),
        Case("tail", lambda folder: write_weights(folder, weights(folder) + b"x" * 100)),
        *(
            Case(f"{n} in {t}", one(t, float(n)))
            for n in ("nan", "inf", "-inf")
            for t in (MEAN, "loss.held_out.quantiles", "laplace.temperature")
        ),
        *(
            Case(f"without {t}", tensors(lambda found, t=t: found.pop(t)))
            for t in (MEAN, "loss.held_out.rows", "laplace.temperature")
        ),
        *(Case(f"tensor more {n!r}", tensors(lambda found, n=n: found.update({n: torch.zeros(1)}))) for n in NAMES),
        Case("no tensors", tensors(lambda found: found.clear())),
        *(
            Case(f"{t} of {d}", replaced(t, lambda value, d=d: value.to(d)))
            for t in (MEAN, "loss.held_out.rows")
            for d in (torch.float64, torch.float16, torch.int32, torch.bool, torch.float8_e4m3fn, torch.complex64)
        ),
        *(
            Case(f"shape of {t}", replaced(t, lambda value: torch.cat([value, value])))
            for t in (
                MEAN,
                "loss.network.layers.0.weight",
                "laplace.curvature.input_vectors",
                "metric-laplace.posterior.weight",
            )
        ),
        Case("quantiles fall", replaced("loss.held_out.quantiles", lambda v: v.flip(0))),
        *(Case(f"held-out rows {n}", held_out("rows", n)) for n in (0, -1, 26, 28, 2**62, -(2**63))),
        *(Case(f"accepted {n}", held_out("accepted", n)) for n in (0, -1, 1, 28, 2**62, -(2**63))),
        *(Case(f"errors {n}", held_out("errors", n)) for n in (-2, 28, 2**62, -(2**63))),
        Case("errors fall", replaced("loss.held_out.errors", lambda v: torch.arange(20, 0, -1))),
        *(Case(f"laplace temperature {n}", filled("laplace.temperature", n)) for n in (0.0, -0.0)),
        *(
            Case(f"laplace precision {n}", other=True, change=filled("laplace.prior_precision", n))
            for n in (0.0, -1.0, -1e30)
        ),
        Case("laplace curvature negative", other=True, change=filled("laplace.curvature.input_values", -1e30)),
        *(Case(f"kappa calibration {n}", filled("kappa.calibration", n)) for n in (0.0, -1.0)),
        *(Case(f"kappa range {n}", other=True, change=filled("kappa.log_range", n)) for n in (0.0, -1e30)),
        Case("temperature base negative", filled("temperature.base", -1.0)),
        Case("weights that overflow", filled("loss.network.layers.0.weight", 3e38)),
        Case("metric precision negative", other=True, change=filled("metric-laplace.posterior.prior_precision", -1e30)),
        *(Case(f"config cut at {s}", text(lambda t, s=s: t[: int(len(t) * s)])) for s in SHARES[3:]),
        *(Case(f"config {name}", text(lambda t, raw=raw: raw)) for name, raw in RAW.items()),
        *(Case(f"literal {v:.30}", literal(v)) for v in VALUES),
        Case("config with BOM", text(lambda t: b"\xef\xbb\xbf" + t.encode())),
        Case("config invalid UTF-8", text(lambda t: t.encode().replace(b"Tiny", b"Ti\xff\xfe"))),
        Case("config overlong UTF-8", text(lambda t: t.encode().replace(b"Tiny", b"Ti\xc0\xaf"))),
        Case("config twice", text(lambda t: t + t)),
        Case("config with a comma more", text(lambda t: t.rstrip()[:-1] + ",}")),
        Case("config field twice", text(lambda t: t.replace('"heads"', '"heads": [],\n"heads"', 1))),
        *(Case(f"field {'.'.join(map(str, p))}={v!r:.30}", at(*p, to=v)) for p, v in FIELDS),
        *(
            Case(
                f"field {name} missing",
                lambda f, name=name: write_config(f, {k: v for k, v in config(f).items() if k != name}),
            )
            for name in ("heads", "weights", "backbone", "data", "schema_version")
        ),
        Case("a head twice", lambda f: write_config(f, {**config(f), "heads": config(f)["heads"] * 2})),
        Case("a hundred thousand heads", lambda f: write_config(f, {**config(f), "heads": [None] * 100_000})),
        *(Case(f"head {c}", at("heads", 0, "name", to=c)) for c in (*CLASSES, "kapa", "loss", 5, None)),
        *(Case(f"class {c}", backbone(source="module", name=f"{c}()"), own=False) for c in CLASSES),
        *(Case(f"class {c} as it is", backbone(source="module", name=c), own=False) for c in CLASSES),
        *(Case(f"feature layer {n!s:.30}", backbone(feature_layer=n)) for n in LAYERS),
        *(Case(f"classifier layer {n!s:.30}", backbone(classifier_layer=n)) for n in (*LAYERS, True)),
        *(Case(f"hub {n!r}", backbone(source="hub", name=n, weights="pretrained"), own=False) for n in HUB),
        *(Case(f"timm {n!r:.40}", backbone(source="timm", name=n, weights="pretrained"), own=False) for n in TIMM),
        *(
            Case(
                f"revision {r!r:.40}", backbone(source="hub", name="org/x", weights="pretrained", revision=r), own=False
            )
            for r in REVISIONS
        ),
        *options(),
        *(Case(f"pickle, repaired {r}", as_pickle(r)) for r in (False, True)),
        Case("torch file", as_torch),
        Case("pickle for a config", pickled_config),
        Case("only pickles", only_pickles),
        *(
            Case(f"{n} linked outside", linked(n, lambda f, n=n: outside(f) / n))
            for n in (files.CONFIG_NAME, files.WEIGHTS_NAME)
        ),
        *(
            Case(f"{n} linked outside, relative", linked(n, lambda f, n=n: f"../good/{n}"))
            for n in (files.CONFIG_NAME, files.WEIGHTS_NAME)
        ),
        *(Case(f"{n} linked to itself", linked(n, lambda f, n=n: n)) for n in (files.CONFIG_NAME, files.WEIGHTS_NAME)),
        *(
            Case(f"{n} linked to {t}", linked(n, lambda f, t=t: t))
            for n in (files.CONFIG_NAME, files.WEIGHTS_NAME)
            for t in ("/dev/zero", "/dev/stdin", "/proc/self/environ", "/etc/passwd", "/nowhere", ".")
        ),
        *(
            Case(f"{n} a {made.__name__}", special(n, made))
            for n in (files.CONFIG_NAME, files.WEIGHTS_NAME)
            for made in (Path.mkdir, os.mkfifo, bound_socket)
        ),
        Case("cache linked out", cached(lambda repository, folder: outside(folder) / files.WEIGHTS_NAME)),
        Case("cache blobs linked out", cached(other_blobs)),
        Case(
            "cache linked to another repository's folder", cached(lambda repository, folder: folder / files.CARD_NAME)
        ),
        *(Case(f"address {a!r:.40}", to(a)) for a in ADDRESSES),
        # what means the same must load to the same scores
        Case("config indented otherwise", text(lambda t: json.dumps(json.loads(t), indent=7) + "\n\n"), intact=True),
        Case(
            "config fields in another order", lambda f: write_config(f, dict(reversed(config(f).items()))), intact=True
        ),
        Case("config escaped", text(lambda t: t.replace("Tiny", "\\u0054iny")), intact=True),
        Case("another README", lambda f: (f / files.CARD_NAME).write_text("x" * 10**6), intact=True),
        Case("no README", lambda f: (f / files.CARD_NAME).unlink(), intact=True),
        Case("README linked outside", linked(files.CARD_NAME, lambda f: "/etc/passwd"), intact=True),
        Case("other data", at("data", "where", to="somewhere else"), intact=True),
        Case("files more", only_more, intact=True),
        Case("weights linked in the folder", inner_link, intact=True),
        Case("a link to the folder", folder_link, intact=True),
        Case(
            "cache as the hub's client makes it",
            cached(lambda repository, folder: repository / "blobs" / "abc"),
            intact=True,
        ),
    ]
    return [replace(case, name=f"{number}: {case.name}") for number, case in enumerate(found)]
