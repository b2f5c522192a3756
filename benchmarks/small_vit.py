"""A small vision transformer for Imagenette at 64 pixels: six blocks, 96 wide, 64 patches.

    python benchmarks/train_baseline.py benchmarks/small_vit.py:small_vit .data/imagenette/train \
        .data/imagenette/val --size 64 --epochs 20 --lr 0.001 --optimizer adamw --threads 1 \
        --out .data/small_vit.safetensors
    python benchmarks/zero_training.py --network benchmarks/small_vit.py:small_vit \
        --weights .data/small_vit.safetensors --data .data/imagenette --size 64 --groups '*' \
        --keep --speed 1.5 2
"""

from __future__ import annotations

from torch import nn

from thinet.vision import torchvision


def small_vit(num_classes: int = 10) -> nn.Module:
    """timm's ViT of these sizes, with random weights."""
    torchvision()  # which timm imports
    import timm

    return timm.create_model(
        "vit_tiny_patch16_224", img_size=64, patch_size=8, embed_dim=96, depth=6, num_heads=4,
        num_classes=num_classes,
    )  # fmt: skip
