"""Arguments that several subcommands share, each described once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from thinet.budget import Budget
from thinet.criteria import get
from thinet.errors import OptionError
from thinet.images import find_images

ModelName = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="`torchvision:resnet50`, `timm:NAME`, or `path/file.py:function` (a function that "
        "takes no arguments and returns the dense network).",
    ),
]
Weights = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Weights: a safetensors file or a state dict that loads with weights_only. A file "
        "written by thinet is cut to its own widths first. Default: the model as it is made.",
    ),
]
Data = Annotated[
    Path,
    typer.Argument(metavar="DATA", help="Folder with one folder of images a class."),
]
Size = Annotated[
    int | None,
    typer.Option(
        metavar="PIXELS",
        help="Side of the input. Default: that of the model's `default_cfg`, else 224.",
    ),
]
Mean = Annotated[
    str | None,
    typer.Option(
        metavar="R,G,B",
        help="Mean of each channel, 0..1. Default: that of the model's `default_cfg`, else "
        "ImageNet's.",
    ),
]
Std = Annotated[
    str | None,
    typer.Option(metavar="R,G,B", help="Deviation of each channel, 0..1. Default: as for --mean."),
]
Classes = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Size of the classifier. Default: the model's own."),
]
Batch = Annotated[int, typer.Option("--batch", min=1, help="Images in a batch.")]
Device = Annotated[
    str | None,
    typer.Option(help="`cpu`, `cuda`, `cuda:1`, ... Default: the first GPU, else the CPU."),
]
RecipeName = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        metavar="NAME",
        help="A named strategy instead of a budget: `vgg16-conv`, `vgg16-gap`, `vgg16-tiny`, "
        "`resnet50-70`, `resnet50-50`, `resnet50-30`, or `resnet` for any ResNet.",
    ),
]
Mirror = Annotated[
    bool,
    typer.Option(
        "--mirror",
        help="Mirror every second calibration image, for networks that were trained so.",
    ),
]
MaxCorrupt = Annotated[
    float,
    typer.Option(
        help="Fraction of a folder's images that may be corrupt (one may always be); they are left "
        "out."
    ),
]
StartOver = Annotated[
    bool, typer.Option("--start-over", help="Forget the state that a stopped run has left.")
]
Seed = Annotated[int, typer.Option(min=0, help="Of everything random.")]
Choice = Annotated[
    list[str] | None,
    typer.Option(
        metavar="MODULE:KIND=VALUE",
        help="Where a layout leaves a choice, such as 'layer1.conv:groups=within'; repeatable. "
        "`thinet inspect` lists what can be chosen.",
    ),
]
Normalised = Annotated[
    bool,
    typer.Option(
        "--normalised",
        help="Also groups that a LayerNorm or its kin couples; cutting these is not exact.",
    ),
]
LossAware = Annotated[
    bool,
    typer.Option(
        "--loss-aware",
        help="Choose channels and widths by what their loss costs the network's loss, to second "
        "order; by the labels of the calibration folder, or where it has none by labels drawn from "
        "the model's own answers.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, errors too.")]
Force = Annotated[bool, typer.Option("--force", help="Write over files that exist.")]
ReportFile = Annotated[
    Path | None,
    typer.Option(
        "--report",
        metavar="FILE",
        help="Also write the result as .html, .md or .json.",
    ),
]


def triple(name: str, text: str | None) -> tuple[float, float, float] | None:
    """Three numbers separated by commas (one number stands for all three).

    Raises:
        OptionError: it is anything else.
    """
    if text is None:
        return None
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) == 1:
        numbers *= 3
    if len(numbers) != 3:
        raise OptionError(f"--{name} takes three numbers such as 0.485,0.456,0.406, got {text!r}")
    return numbers[0], numbers[1], numbers[2]


def choices(given: Sequence[str] | None) -> dict[str, str]:
    """What `thinet.find_groups` takes as choices.

    Raises:
        OptionError: not of the form MODULE:KIND=VALUE.
    """
    found: dict[str, str] = {}
    for text in given or ():
        key, equals, value = text.rpartition("=")
        if not equals or ":" not in key:
            raise OptionError(
                f"--choice takes MODULE:KIND=VALUE such as layer1.conv:groups=within, got {text!r}"
            )
        found[key] = value
    return found


def fixed(given: Sequence[str] | None) -> dict[str, int | float]:
    """Widths of single groups, as `thinet.prune` takes them.

    Raises:
        OptionError: not of the form GROUP=N.
    """
    found: dict[str, int | float] = {}
    for text in given or ():
        name, _, number = text.rpartition("=")
        try:
            found[name] = float(number) if "." in number else int(number)
        except ValueError:
            found.pop(name, None)
        if not name or name not in found:
            raise OptionError(
                f"--width takes GROUP=N such as layer1.0.conv1=24 or =0.5, got {text!r}"
            )
    return found


def strategy(
    recipe: str | None,
    only: Sequence[str] | None,
    skip: Sequence[str] | None,
    **budgets: float | None,
) -> dict[str, Any]:
    """A recipe or a budget, as `thinet.iterate` takes them.

    Args:
        budgets: the command's own, by their names in `Budget`; `keep` goes with a recipe too.

    Raises:
        OptionError: both, or neither, or a budget that is out of range.
    """
    given = {kind: fraction for kind, fraction in budgets.items() if fraction is not None}
    if recipe is None:
        if len(given) != 1:
            names = ", ".join(f"--{kind}" for kind in budgets)
            found = " and ".join(f"--{kind}" for kind in given) or "none"
            raise OptionError(f"give one of --recipe, {names}; {found} given")
        return {"budget": Budget(**given), "only": only or None, "skip": skip or None}
    keep = given.pop("keep", None)
    if given or only or skip:
        names = ", ".join(f"--{kind}" for kind in budgets if kind != "keep")
        raise OptionError(f"--recipe says what is cut; leave {names}, --only, --skip out")
    return {"recipe": recipe, "keep": keep}


def goes_on(what: str, start_over: bool) -> str:
    """What a stopped command leaves behind, and how it goes on."""
    return f"{what}; the same command{' without --start-over' if start_over else ''} goes on there"


def calibrated(images: int, folder: Path, mirror: bool) -> str:
    """For a report: what was calibrated on."""
    return f"{images} images of {folder}" + (", every second one mirrored" if mirror else "")


def asks_labels(criteria: Iterable[str], calibration: Path, *, loss_aware: bool) -> bool | None:
    """Whether labels are read, and are there: None where nothing asks for them.

    Raises:
        OptionError: there is no criterion of such a name.
        DataError: the folder is missing or holds no images.
    """
    asks = [get(name).reads_labels for name in criteria]
    if not (loss_aware or any(asks)):
        return None
    return find_images(calibration).labels is not None


def labelled_by(labels: bool | None) -> tuple[tuple[str, str], ...]:
    """For a report: whose labels were read, where any were."""
    if labels is None:
        return ()
    return (("labels", "those of the calibration folder" if labels else "the model's own answers"),)


def cut_as(only: Sequence[str] | None, skip: Sequence[str] | None) -> tuple[tuple[str, str], ...]:
    """For a report: the patterns that chose the groups, if any."""
    named = (("only", only), ("skip", skip))
    return tuple((name, ", ".join(patterns)) for name, patterns in named if patterns)


def shared_out(asked: Mapping[str, Any], **options: object) -> dict[str, object]:
    """The options that were given of those that say how a budget of costs is shared out.

    Raises:
        OptionError: there is no such budget.
    """
    given = {name: value for name, value in options.items() if value is not None}
    budget = asked.get("budget")
    if given and (budget is None or budget.kind == "keep"):
        names = " and ".join(f"--{name}" for name in given)
        raise OptionError(f"{names} says how --macs or --params is shared out; give one of these")
    return given


def freed(
    asked: Mapping[str, Any], *, choice: Sequence[str] | None, normalised: bool
) -> dict[str, object]:
    """The options that say which groups there are, as `thinet.prune` takes them.

    Raises:
        OptionError: a choice that is written wrongly, or beside a recipe.
    """
    if "budget" in asked:
        return {"choices": choices(choice), "normalised": normalised}
    if choice or normalised:
        raise OptionError("--recipe says what is cut; leave --choice and --normalised out")
    return {}
