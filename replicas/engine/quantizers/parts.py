"""The layers of a run that are done, on disk.

    OUT.parts/settings.json            what the codes depend on; another run's are thrown away
    OUT.parts/layer-00000.safetensors  codes, scales, zeros, groups and whatever else of the layer was changed

A layer's file appears whole or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from replicas.engine.quantizers.block import LINEARS, Block
from replicas.engine.quantizers.grid import Codes
from replicas.engine.weights import read_json
from replicas.protocol import ConfigError


class Parts:
    """`settings`: whatever the layers depend on; the folder lies beside `out`."""

    def __init__(self, out: Path, settings: Mapping[str, Any]) -> None:
        self.folder = out.with_name(out.name + ".parts")
        record = self.folder / "settings.json"
        if self.folder.exists():
            if not record.is_file():
                raise ConfigError(
                    f"{str(self.folder)!r} is no earlier run's: name another folder or remove it", param="out"
                )
            if read_json(record) != settings:
                shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        if not record.exists():
            _replace(record, json.dumps(settings, indent=2).encode())

    def path(self, index: int) -> Path:
        return self.folder / f"layer-{index:05}.safetensors"

    def save(self, index: int, codes: dict[str, Codes], changed: dict[str, Tensor]) -> None:
        from safetensors.torch import save

        tensors = {f"other.{name}": tensor.contiguous() for name, tensor in changed.items()}
        for name, part in codes.items():
            for field in ("codes", "scales", "zeros", "group_of"):
                tensors[f"{field}.{name}"] = getattr(part, field).clone(memory_format=torch.contiguous_format)
        _replace(self.path(index), save(tensors))

    def load(self, index: int) -> tuple[dict[str, Codes], dict[str, Tensor]]:
        from safetensors.torch import load_file

        tensors = load_file(self.path(index))
        codes = {
            name: Codes(*(tensors[f"{field}.{name}"] for field in ("codes", "scales", "zeros", "group_of")))
            for name in LINEARS
        }
        return codes, {name[6:]: tensor for name, tensor in tensors.items() if name.startswith("other.")}

    def restore(self, index: int, block: Block) -> None:
        codes, changed = self.load(index)
        block.tensors |= changed | {f"{name}.weight": part.dequantise() for name, part in codes.items()}


def _replace(path: Path, content: bytes) -> None:
    part = path.with_suffix(".part")
    part.write_bytes(content)
    os.replace(part, path)
