"""Files that other runtimes read, each compared with the torch model before it is kept."""

from __future__ import annotations

from thinet.export.check import Exported as Exported
from thinet.export.onnx import to_onnx as to_onnx
from thinet.export.program import to_exported_program as to_exported_program
