"""Train a network from random weights on an image folder, to have something to prune.

    python benchmarks/train_baseline.py torchvision:resnet18 DATA/train DATA/val \
        --size 64 --epochs 14 --out resnet18.safetensors

Prints one line an epoch and the top-1 at the end. Started again with the same arguments it goes on
where it was stopped.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file

from thinet.data import loader
from thinet.models import resolve
from thinet.train.config import FinetuneConfig
from thinet.train.finetune import EpochRecord, finetune


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="torchvision:NAME, timm:NAME or path/file.py:function")
    parser.add_argument("train", help="folder with one folder of images a class")
    parser.add_argument("val", help="the same, to measure on")
    parser.add_argument("--out", type=Path, required=True, help="safetensors file to write")
    parser.add_argument("--size", type=int, default=64, help="pixels")
    parser.add_argument("--crop", choices=("resized", "padded", "centre"), default="resized")
    parser.add_argument("--epochs", type=int, default=14)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--optimizer", choices=("sgd", "adamw"), default="sgd")
    parser.add_argument("--label-smoothing", type=float, default=0.1)
    parser.add_argument("--ema", type=float, default=None, help="decay of a weight average")
    parser.add_argument("--precision", choices=("no", "bf16", "fp16"), default="no")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    common = {"size": args.size, "batch_size": args.batch_size, "workers": args.threads}
    data = loader(args.train, train=True, crop=args.crop, seed=args.seed, **common)
    held_out = loader(args.val, **common)
    model = resolve(args.model, num_classes=len(data.classes))
    model = model.to(memory_format=torch.channels_last)
    adamw = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    result = finetune(
        model,
        data,
        epochs=args.epochs,
        config=FinetuneConfig(
            lr=args.lr,
            schedule="one-cycle",
            nesterov=True,
            label_smoothing=args.label_smoothing,
            ema_decay=args.ema,
            mixed_precision=args.precision,
            decay_norm_and_bias=False,
            seed=args.seed,
        ),
        optimizer=adamw if args.optimizer == "adamw" else None,
        validation=held_out,
        checkpoint=args.out.with_suffix(".run"),
        on_epoch=_print,
    )
    weights = {name: t.contiguous() for name, t in result.model.state_dict().items()}
    unfinished = args.out.with_suffix(".unfinished")
    save_file(weights, unfinished)
    unfinished.replace(args.out)
    last = result.history[-1].validation
    assert last is not None
    print(f"top-1 {last.top1:.2%} of {last.images} images: {args.out}")


def _print(record: EpochRecord) -> None:
    scored = record.validation
    assert scored is not None
    print(
        f"epoch {record.epoch:3d}  loss {record.loss:.3f}  training top-1 {record.top1:.1%}  "
        f"top-1 {scored.top1:.2%}  {record.seconds:.0f} s",
        flush=True,
    )


if __name__ == "__main__":
    main()
