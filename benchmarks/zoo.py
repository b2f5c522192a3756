"""The models of `coverage.py`: names and how to build them, without any download."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import grid_sample

from thinet.vision import torchvision

SMALL = (
    *("atto", "femto", "pico", "xxs", "nano", "xxsmall", "xs", "tiny", "mini", "micro", "_050"),
    *("small", "_s", "b0", "s0", "_a0", "_b1", "18", "_0", "x0", "lite", "26", "_s1", "_m0"),
)
LARGE = ("huge", "giant", "large", "xlarge", "so400m", "gigantic", "enormous", "_xl", "_1b", "_7b")
PER_FAMILY = 4


@dataclass(frozen=True)
class Case:
    """A model in eval mode and inputs on which it runs.

    `as_made`: its own first weights are the test's; with the wild ones of the oracle a detector
    would find no box.
    """

    model: nn.Module
    inputs: Any
    family: str
    as_made: bool = False


def image(*size: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(5))


# --- torchvision ----------------------------------------------------------------------------


def torchvision_names() -> list[str]:
    models = torchvision().models
    places = (models, models.segmentation, models.video, models.detection, models.optical_flow)
    return [name for place in places for name in models.list_models(module=place)]


def torchvision_case(name: str) -> Case:
    models = torchvision().models
    options: dict[str, Any] = {"weights": None}
    if name in models.list_models(module=models.segmentation):
        model = models.get_model(name, weights_backbone=None, **options)
        return Case(model, image(1, 3, 128, 128), "segmentation")
    if name in models.list_models(module=models.video):
        frames = 16 if name.startswith(("mvit", "s3d")) else 8
        size = 224 if name.startswith(("mvit", "s3d", "swin")) else 112
        return Case(models.get_model(name, **options), image(1, 3, frames, size, size), "video")
    if name in models.list_models(module=models.detection):
        define_operators()
        model = models.get_model(name, weights_backbone=None, **options)
        transform: Any = model.transform
        if not name.startswith("ssd"):  # theirs is fixed; the others take pictures as they come
            transform.min_size, transform.max_size = (SIDE,), SIDE
        few_boxes(model)
        return Case(model, ([image(3, SIDE, SIDE)],), "detection", as_made=True)
    if name in models.list_models(module=models.optical_flow):
        model = models.get_model(name, **options)
        return Case(model, (image(1, 3, 128, 128), image(1, 3, 128, 128)), "optical flow")
    if name in ("googlenet", "inception_v3"):
        options |= {"init_weights": False}
    size = 299 if name == "inception_v3" else 224
    model = models.get_model(name, **options)
    return Case(model, image(1, 3, size, size), type(model).__module__.rsplit(".", 1)[-1])


SIDE = 192
"""Of the pictures for detectors, in pixels."""


def few_boxes(model: Any) -> None:
    """Untrained detectors are sure of nothing: take boxes of any score, and not too many."""
    heads = [m for m in (model, getattr(model, "roi_heads", None)) if hasattr(m, "score_thresh")]
    for head in heads:
        head.score_thresh, head.detections_per_img = 0.0, 20
    if hasattr(model, "topk_candidates"):
        model.topk_candidates = 20
    if hasattr(model, "rpn"):
        model.rpn._pre_nms_top_n = model.rpn._post_nms_top_n = {"training": 60, "testing": 60}


def define_operators() -> None:
    """Detectors need two operators that this torchvision may lack; their plain meaning."""

    def nms(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
        left, kept = scores.argsort(descending=True, stable=True), []
        overlap = box_iou(boxes, boxes)
        while left.numel():
            kept.append(int(left[0]))
            left = left[1:][overlap[left[0], left[1:]] <= threshold]
        return torch.tensor(kept, dtype=torch.long)

    def roi_align(
        x: Tensor, rois: Tensor, scale: float, height: int, width: int, *_: Any
    ) -> Tensor:
        """One sample in the middle of each bin, of a batch of one picture."""
        left, top, right, bottom = (rois[:, 1:] * scale).unbind(1)
        steps = [(torch.arange(n) + 0.5) / n for n in (width, height)]
        across = left[:, None] + (right - left)[:, None] * steps[0]
        down = top[:, None] + (bottom - top)[:, None] * steps[1]
        places = [2 * v / n - 1 for v, n in ((across, x.shape[3]), (down, x.shape[2]))]
        grid = torch.stack(
            [places[0][:, None].expand(-1, height, -1), places[1][..., None].expand(-1, -1, width)],
            dim=-1,
        )
        every = x.expand(len(rois), -1, -1, -1)
        return grid_sample(every, grid.to(x.dtype), padding_mode="border", align_corners=False)

    if LIBRARIES or torch._C._dispatch_has_kernel_for_dispatch_key("torchvision::nms", "CPU"):
        return
    from torchvision.ops import box_iou, boxes

    pooling: Any = sys.modules["torchvision.ops.roi_align"]
    boxes._assert_has_ops = pooling._assert_has_ops = lambda: None
    pooling._has_ops = lambda: True
    LIBRARIES.append(torch.library.Library("torchvision", "FRAGMENT"))
    LIBRARIES[0].impl("nms", nms, "CPU")
    LIBRARIES[0].define(
        "roi_align(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, "
        "SymInt pooled_width, int sampling_ratio, bool aligned) -> Tensor"
    )
    LIBRARIES[0].impl("roi_align", roi_align, "CPU")


LIBRARIES: list[torch.library.Library] = []


# --- timm -----------------------------------------------------------------------------------


def size_rank(name: str) -> tuple[Any, ...]:
    """Small models first, by the usual words and numbers in their names."""
    large = sum(word in name for word in LARGE)
    numbers = [int(n) for n in re.findall(r"\d+", name)]
    return large, -sum(word in name for word in SMALL), numbers, name


def timm_names(per_family: int = PER_FAMILY) -> list[str]:
    """The smallest by name of every family, a family being a file of timm."""
    torchvision()
    from timm.models import _registry

    found = []
    for _, names in sorted(_registry._module_to_models.items()):
        current = [n for n in names if n not in _registry._deprecated_models]
        found += sorted(current, key=size_rank)[:per_family]
    return found


def timm_case(name: str) -> Case:
    torchvision()
    import timm

    model = timm.create_model(name, pretrained=False)
    config = model.default_cfg
    least = None if config.get("fixed_input_size") else config.get("min_input_size")
    size = least or config["input_size"]
    return Case(model, image(1, *size), type(model).__module__.rsplit(".", 1)[-1])


# --- transformers ---------------------------------------------------------------------------


def text(**more: Any) -> dict[str, Any]:
    return {"input_ids": torch.arange(3, 15).view(1, 12), **more}


def pixels(size: int = 64) -> dict[str, Any]:
    return {"pixel_values": image(1, 3, size, size)}


WIDTH = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
BERT = {**WIDTH, "intermediate_size": 128, "vocab_size": 100}
LLAMA = {**BERT, "num_key_value_heads": 2}
VIT = {**WIDTH, "intermediate_size": 128, "image_size": 64, "patch_size": 16}
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 100, "n_positions": 64}
SWIN = {"image_size": 64, "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
DISTIL = {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128, "vocab_size": 100}
T5 = {"d_model": 64, "d_ff": 128, "num_layers": 2, "num_heads": 4, "d_kv": 16, "vocab_size": 100}
OPT = {**WIDTH, "ffn_dim": 128, "vocab_size": 100, "word_embed_proj_dim": 64}
CONVNEXT = {"depths": [1, 1, 1, 1], "hidden_sizes": [16, 24, 32, 48], "image_size": 64}
RESNET = {"depths": [1, 1, 1, 1], "hidden_sizes": [16, 24, 32, 48], "embedding_size": 16}
NO_PAD = {"pad_token_id": 0}

TRANSFORMERS: dict[str, tuple[str, dict[str, Any], Callable[[], dict[str, Any]]]] = {
    "ViTForImageClassification": ("ViTConfig", VIT, pixels),
    "DeiTForImageClassification": ("DeiTConfig", VIT, pixels),
    "BeitForImageClassification": ("BeitConfig", VIT, pixels),
    "Dinov2Model": ("Dinov2Config", VIT, pixels),
    "SwinForImageClassification": ("SwinConfig", SWIN, pixels),
    "Swinv2ForImageClassification": ("Swinv2Config", SWIN, pixels),
    "ConvNextForImageClassification": ("ConvNextConfig", CONVNEXT, pixels),
    "ConvNextV2ForImageClassification": ("ConvNextV2Config", CONVNEXT, pixels),
    "ResNetForImageClassification": ("ResNetConfig", RESNET, pixels),
    "MobileNetV2ForImageClassification": ("MobileNetV2Config", {"image_size": 64}, pixels),
    "SegformerForImageClassification": ("SegformerConfig", {"depths": [1, 1, 1, 1]}, pixels),
    "BertForSequenceClassification": ("BertConfig", BERT, text),
    "RobertaForMaskedLM": ("RobertaConfig", BERT, text),
    "ElectraModel": ("ElectraConfig", BERT, text),
    "AlbertModel": ("AlbertConfig", BERT, text),
    "DebertaV2Model": ("DebertaV2Config", BERT, text),
    "DistilBertModel": ("DistilBertConfig", DISTIL, text),
    "GPT2LMHeadModel": ("GPT2Config", GPT2, text),
    "OPTForCausalLM": ("OPTConfig", OPT, text),
    "LlamaForCausalLM": ("LlamaConfig", LLAMA, text),
    "MistralForCausalLM": ("MistralConfig", LLAMA, text),
    "Qwen2ForCausalLM": ("Qwen2Config", LLAMA, text),
    "Qwen3ForCausalLM": ("Qwen3Config", {**LLAMA, "head_dim": 16}, text),
    "GemmaForCausalLM": ("GemmaConfig", {**LLAMA, "head_dim": 16}, text),
    "PhiForCausalLM": ("PhiConfig", BERT, text),
    "GPTNeoXForCausalLM": ("GPTNeoXConfig", BERT, text),
    "MixtralForCausalLM": ("MixtralConfig", {**LLAMA, "num_local_experts": 2}, text),
    "T5EncoderModel": ("T5Config", T5, text),
}


def transformers_names() -> list[str]:
    return list(TRANSFORMERS)


def transformers_case(name: str) -> Case:
    torchvision()
    import transformers

    config, options, inputs = TRANSFORMERS[name]
    settings = getattr(transformers, config)(**options)
    for flag in ("use_cache", "output_hidden_states"):
        if hasattr(settings, flag):
            setattr(settings, flag, False)
    model = getattr(transformers, name)(settings)
    return Case(model, inputs(), "transformers")


SUITES: dict[str, tuple[Callable[..., list[str]], Callable[[str], Case]]] = {
    "torchvision": (torchvision_names, torchvision_case),
    "timm": (timm_names, timm_case),
    "transformers": (transformers_names, transformers_case),
}


def build(suite: str, name: str) -> Case:
    torch.manual_seed(0)
    case = SUITES[suite][1](name)
    case.model.eval()
    return case
