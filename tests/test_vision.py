"""torchvision imports also where its compiled operators are missing; absence is a clear error."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from thinet.errors import MissingExtraError
from thinet.vision import torchvision

NEEDS_OPERATORS = """
import torch
for name in ("nms", "qnms"):
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"torchvision::{name}", "Meta"):
        torch.library.register_fake(f"torchvision::{name}")(lambda dets, scores, threshold: scores)
"""


def run_with(package: str, folder: Path, call: str) -> str:
    """What a new process prints that has this text as its torchvision."""
    (folder / "torchvision" / "models").mkdir(parents=True)
    (folder / "torchvision" / "__init__.py").write_text(package)
    (folder / "torchvision" / "models" / "__init__.py").touch()
    code = f"import sys; sys.path.insert(0, {str(folder)!r})\nimport thinet.vision\n{call}"
    command = [sys.executable, "-W", "error", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_the_installed_one_builds_models_and_is_imported_once() -> None:
    package = torchvision()
    assert package.models.resnet18(weights=None, num_classes=3).fc.out_features == 3
    assert torchvision() is package


def test_missing_operators_are_declared(tmp_path: Path) -> None:
    call = "print(thinet.vision.torchvision().__file__, len(thinet.vision._declared))"
    place, declared = run_with(NEEDS_OPERATORS, tmp_path, call).split()
    assert Path(place).is_relative_to(tmp_path)
    assert declared == "1"


def test_another_failure_is_told(tmp_path: Path) -> None:
    call = (
        "try: thinet.vision.torchvision()\n"
        "except thinet.errors.MissingExtraError as error: print(error)"
    )
    text = run_with("raise RuntimeError('built for the moon')", tmp_path, call)
    assert "cannot be imported with torch" in text
    assert "built for the moon" in text


def test_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(MissingExtraError, match=r"pip install thinet\[vision\]"):
        torchvision()
