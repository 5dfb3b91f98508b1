"""Examines a small network of every timm family and writes docs/backbones.md: `python docs/make_backbones.py`.

The tests run the same examination (tests/adapters/test_families.py). It takes about a minute of one core.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch

from posthoc.adapters.backbone import Backbone, build_backbone
from posthoc.adapters.errors import BackboneError
from posthoc.adapters.weights import dependent_tensors, tensor_fingerprint

PAGE = Path(__file__).resolve().parent / "backbones.md"
CLASSES = 10

Case = tuple[
    str, dict[str, Any]
]  # timm name, options that make it small ("side": pixels of the test image, 64 by default)
SMALL: dict[str, Any] = {"img_size": 64}  # for networks of a fixed input size

CASES: dict[str, list[Case]] = {
    "beit": [("beit_base_patch16_224", {**SMALL, "depth": 1})],
    "byoanet": [("botnet26t_256", SMALL)],
    "byobnet": [("test_byobnet", {})],
    "cait": [("cait_xxs24_224", {**SMALL, "depth": 2})],
    "coat": [("coat_tiny", SMALL)],
    "convit": [("convit_tiny", {**SMALL, "depth": 4})],
    "convmixer": [("convmixer_768_32", {})],
    "convnext": [("test_convnext", {})],
    "cpubone": [("cpubone_nano", {})],
    "crossvit": [("crossvit_tiny_240", {})],
    "csatv2": [("csatv2", {})],
    "cspnet": [("cs3darknet_focus_s", {})],
    "cspnext": [("cspnext_tiny", {})],
    "davit": [("davit_tiny", {"depths": (1, 1, 1, 1), "embed_dims": (32, 64, 96, 128), "num_heads": (1, 2, 3, 4)})],
    "deepseek_vit": [("deepseek_vit_412m", {"side": 70, "depth": 1, "embed_dim": 256, "num_heads": 4})],
    "deit": [
        ("deit_tiny_patch16_224", {**SMALL, "depth": 2}),
        ("deit_tiny_distilled_patch16_224", {**SMALL, "depth": 2}),
    ],
    "densenet": [("densenet121", {})],
    "dla": [("dla46x_c", {})],
    "dpn": [("dpn48b", {})],
    "edgenext": [("edgenext_xx_small", {})],
    "efficientformer": [("efficientformer_l1", {})],
    "efficientformer_v2": [("efficientformerv2_s0", SMALL)],
    "efficientnet": [("test_efficientnet", {})],
    "efficientvim": [("efficientvim_m1", {})],
    "efficientvit_mit": [("efficientvit_b0", {})],
    "efficientvit_msra": [("efficientvit_m0", SMALL)],
    "eva": [("vit_tiny_patch16_dinov3_qkvb", {**SMALL, "depth": 2})],
    "fasternet": [("fasternet_t0", {})],
    "fastvit": [("fastvit_t8", {})],
    "focalnet": [("focalnet_tiny_srf", {})],
    "gcvit": [("gcvit_xxtiny", SMALL)],
    "gemma4_vit": [("gemma4_vit_167m", {"depth": 1, "embed_dim": 192, "num_heads": 3})],
    "ghostnet": [("ghostnet_050", {})],
    "hardcorenas": [("hardcorenas_b", {})],
    "hgnet": [("hgnetv2_b0", {})],
    "hiera": [("hiera_tiny_224", {**SMALL, "embed_dim": 48})],
    "hieradet_sam2": [("sam2_hiera_tiny", {"embed_dim": 48})],
    "hrnet": [("hrnet_w18_small", {})],
    "iformer": [("iformer_t", {}), ("iformer_l_distilled", {})],
    "inception_next": [("inception_next_atto", {})],
    "inception_resnet_v2": [("inception_resnet_v2", {"side": 96})],
    "inception_v3": [("inception_v3", {"side": 96})],
    "inception_v4": [("inception_v4", {"side": 96})],
    "lcnetv2": [("lcnetv2_small", {})],
    "levit": [("levit_128s", SMALL)],
    "lowformer": [("lowformer_b0", {})],
    "mambaout": [("test_mambaout", {})],
    "maxxvit": [("test_coatnet", SMALL)],
    "metaformer": [("poolformerv2_s12", {}), ("caformer_s18", {})],
    "mlp_mixer": [("gmlp_ti16_224", SMALL)],
    "mobilenetv3": [("mobilenetv3_small_050", {})],
    "mobilenetv5": [("mobilenetv5_base", {"channel_multiplier": 0.25, "num_features": 256})],
    "mobilevit": [("mobilevit_xxs", {})],
    "mvitv2": [("mvitv2_tiny", SMALL)],
    "naflexvit": [("naflexvit_base_patch16_gap", {"depth": 1, "embed_dim": 192, "num_heads": 3})],
    "nasnet": [("nasnetalarge", {})],
    "nest": [("nest_tiny", SMALL)],
    "nextvit": [("nextvit_small", {})],
    "nfnet": [("test_nfnet", {})],
    "pit": [("pit_ti_224", SMALL), ("pit_ti_distilled_224", SMALL)],
    "pnasnet": [("pnasnet5large", {})],
    "pvt_v2": [("pvt_v2_b0", {})],
    "qwen3_vit": [("qwen3_vit_88m", {"depth": 1, "embed_dim": 192, "num_heads": 3})],
    "rdnet": [("rdnet_tiny", {})],
    "regnet": [("regnetx_002", {})],
    "repghost": [("repghostnet_050", {})],
    "repvit": [("repvit_m1", {})],
    "res2net": [("res2next50", {})],
    "resnest": [("resnest14d", {})],
    "resnet": [("test_resnet", {})],
    "resnetv2": [("resnetv2_18", {})],
    "rexnet": [("rexnet_100", {})],
    "selecsls": [("selecsls42", {})],
    "senet": [("legacy_seresnet18", {})],
    "sequencer": [("sequencer2d_s", SMALL)],
    "shvit": [("shvit_s1", {})],
    "sknet": [("skresnet18", {})],
    "starnet": [("starnet_s050", {})],
    "swiftformer": [("swiftformer_xs", SMALL)],
    "swin_transformer": [("swin_tiny_patch4_window7_224", {**SMALL, "depths": (1, 1, 1, 1), "embed_dim": 48})],
    "swin_transformer_v2": [("swinv2_tiny_window8_256", {**SMALL, "depths": (1, 1, 1, 1), "embed_dim": 48})],
    "swin_transformer_v2_cr": [("swinv2_cr_tiny_224", {**SMALL, "depths": (1, 1, 1, 1)})],
    "tiny_vit": [("tiny_vit_5m_224", {})],
    "tnt": [("tnt_s_legacy_patch16_224", {**SMALL, "depth": 2})],
    "tresnet": [("tresnet_m", {"width_factor": 0.5})],
    "twins": [("twins_svt_small", SMALL)],
    "vgg": [("vgg11", {"mlp_ratio": 0.02})],
    "visformer": [("visformer_tiny", SMALL)],
    "vision_transformer": [("test_vit", SMALL), ("vit_base_patch32_clip_224", {**SMALL, "depth": 1})],
    "vision_transformer_hybrid": [("vit_tiny_r_s16_p8_224", SMALL)],
    "vision_transformer_relpos": [("test_vit_relpos", SMALL)],
    "vision_transformer_sam": [
        ("samvit_base_patch16_224", {**SMALL, "depth": 1, "embed_dim": 192, "num_heads": 3, "global_attn_indexes": ()})
    ],
    "vitamin": [("vitamin_small_224", SMALL)],
    "volo": [("volo_d1_224", SMALL)],
    "vovnet": [("ese_vovnet19b_slim_dw", {})],
    "xception": [("legacy_xception", {})],
    "xception_aligned": [("xception41p", {})],
    "xcit": [("xcit_nano_12_p8_224", SMALL)],
}


@dataclass(frozen=True)
class Row:
    """What was found. problems: promises that do not hold; refused: why there is no one linear classifier."""

    family: str
    model: str
    embedding: int = 0
    penultimate: int | None = None
    kind: str = ""
    classifier: str | None = None
    refused: str | None = None
    not_built: str | None = None
    problems: tuple[str, ...] = ()


def cases() -> list[tuple[str, int]]:
    """Every family of the installed timm, with the number of its case."""
    return [(family, number) for family in timm.list_modules() for number in range(len(CASES.get(family, [0])))]


def case(family: str, number: int) -> Case:
    """The network of the table, or the smallest of a family that the table or this timm does not know."""
    if family in CASES and timm.is_model(CASES[family][number][0]):
        return CASES[family][number]

    def parameters(name: str) -> int:
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in timm.create_model(name).parameters())

    return min(timm.list_models(module=family), key=parameters), {"side": 224}


@functools.cache
def examine(family: str, number: int) -> Row:
    """Builds the network with random weights and checks every promise of a backbone on it."""
    name, options = case(family, number)
    options = dict(options)
    side = options.pop("side", 64)
    text = ", ".join([name, *(f"{key}={value}" for key, value in options.items())])
    torch.manual_seed(0)
    try:
        model = timm.create_model(name, num_classes=CLASSES, **options)
    except Exception as error:  # reported in the table, whatever it is
        return Row(family, text, not_built=f"{type(error).__name__}: {error}")
    backbone = build_backbone(model)
    structure = backbone.structure
    size = backbone.preprocessing["input_size"] if backbone.preprocessing["fixed_input_size"] else [3, side, side]
    return Row(
        family,
        text,
        structure.embedding_dim,
        structure.penultimate_dim,
        structure.kind,
        structure.linear_name,
        structure.refusal,
        problems=(*_output_problems(backbone, torch.randn(1, *size)), *_fingerprint_problems(backbone)),
    )


def _output_problems(backbone: Backbone, images: torch.Tensor) -> list[str]:
    with torch.no_grad():
        output, expected = backbone(images), backbone.module(images)
    problems = []
    if output.embedding.shape != (1, backbone.embedding_dim) or not output.embedding.isfinite().all():
        problems.append(f"embedding {tuple(output.embedding.shape)}, expected finite (1, {backbone.embedding_dim})")
    if backbone.num_classes != CLASSES or output.logits is None:
        return [*problems, f"{backbone.num_classes} classes found, expected {CLASSES}"]
    if not torch.allclose(output.logits, expected, rtol=1e-5, atol=1e-6):
        problems.append(f"logits differ from the model's by {float((output.logits - expected).abs().max()):.1e}")
    try:
        linear = backbone.classifier()
    except BackboneError:
        return problems if output.penultimate is None else [*problems, "a last-layer input without a classifier"]
    if output.penultimate is None or not torch.allclose(linear(output.penultimate), expected, rtol=1e-4, atol=1e-5):
        problems.append("classifier(penultimate) is not the logits")
    return problems


def _fingerprint_problems(backbone: Backbone) -> list[str]:
    """The fingerprint survives a copy and any change of the classifier, and notices every other change."""
    own, before = backbone.structure.own, backbone.fingerprint("embedding")

    def fingerprint(model: torch.nn.Module) -> str:
        return tensor_fingerprint(dependent_tensors(model, own))

    twin: Any = copy.deepcopy(backbone.module)
    twin.reset_classifier(CLASSES + 1)
    problems = [] if fingerprint(twin) == before else ["another classifier changes the fingerprint of the embedding"]
    with torch.no_grad():
        next(value for value in dependent_tensors(twin, own).values() if value.numel()).view(-1)[0] += 1
    if fingerprint(twin) == before:
        problems.append("a changed weight does not change the fingerprint of the embedding")
    if own and len(dependent_tensors(backbone.module)) == len(dependent_tensors(backbone.module, own)):
        problems.append(f"the classifier ({', '.join(own)}) has no weights")
    return problems


def page(rows: list[Row]) -> str:
    """The text of docs/backbones.md."""
    built = {row.family for row in rows if row.not_built is None}
    linear = {row.family for row in rows if row.classifier is not None}
    lines = [
        "# Backbones",
        "",
        "Written by `docs/make_backbones.py` from what the library itself finds; a test compares this page with it.",
        "",
        f"timm {timm.__version__} has {len({row.family for row in rows})} families. {len(built)} of them can be built here; a",
        f"small network of each, with random weights and {CLASSES} classes, was examined. Each gives, in one pass, an",
        "embedding [B,D] and the logits that the network itself gives, and has a fingerprint that does not depend on the",
        f"classifier. {len(linear)} families have a network with one linear classifier, which the heads that need one use",
        "(`model.backbone.classifier()`). For the others it is refused, for the reason in the last column.",
        "",
        "- **linear**: logits = linear(embedding).",
        "- **deep linear**: further layers lie between the embedding and the last linear layer, so that this layer's input",
        "  (`penultimate`) is another thing than the embedding.",
        "- **1x1 convolution**: on pooled maps that is a linear layer, and it is given as one.",
        "- **several classifiers**: the logits are their mean or another mixture, and no one linear layer gives them. Kappa",
        "  and temperature heads need none; a head that does can train a linear classifier of its own on the stored",
        "  features. `classifier_layer=` takes one of the classifiers alone; the logits are then those of that layer.",
        "",
        "A network built with `num_classes=0` has no logits. Where the last layer is a projection and no classifier (timm's",
        "CLIP networks), `classifier_layer=False` leaves it out.",
        "",
        "| family | examined | embedding | last-layer input | classifier | kind |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row.not_built is not None:
            lines.append(f"| {row.family} | `{row.model}` | not built: {row.not_built} | | | |")
            continue
        classifier = "refused" if row.classifier is None else f"`{row.classifier}`"
        width = "" if row.penultimate is None else row.penultimate
        lines.append(f"| {row.family} | `{row.model}` | {row.embedding} | {width} | {classifier} | {row.kind} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    PAGE.write_text(page([examine(*key) for key in cases()]), encoding="utf-8")
