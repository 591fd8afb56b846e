"""A checkpoint seen through the setting `quantization`: which matrices stay or become quantised.

auto   as stored; blocks of a GGUF only where the device multiplies with them as they are, else in full
none   everything in full: quantised weights are dequantised at load
int8   full-precision (and GGUF) matrices are rounded to 8 bits at load, the head included; see rounding.py
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from replicas.engine.gguf_file import GGUFFile
from replicas.engine.model_config import ModelConfig
from replicas.engine.quantized.rounding import int8
from replicas.engine.quantized.weight import QuantizedWeight
from replicas.engine.weights import Checkpoint, linear_matrices
from replicas.protocol import ConfigError

CHOICES = ("auto", "none", "int8")


def seen_as(checkpoint: Checkpoint, quantization: str, *, keep_gguf: bool) -> Checkpoint:
    """ConfigError for a setting that is unknown or does not go with what is stored.

    keep_gguf: whether "auto" keeps a GGUF's blocks.
    """
    if quantization not in CHOICES:
        raise ConfigError(
            f"quantization {quantization!r} is not supported; use {', '.join(CHOICES)}", param="quantization"
        )
    stored = checkpoint.quantization
    if quantization == "int8":
        if stored not in (None, "gguf"):
            raise ConfigError(
                f"quantization 'int8' rounds weights in full precision, and this checkpoint's are {stored} already; "
                "use auto or none",
                param="quantization",
            )
        return Rounded(checkpoint)
    if quantization == "none" or (stored == "gguf" and not keep_gguf):
        return Dequantised(checkpoint)
    return checkpoint


class Dequantised:
    """Every matrix in full precision."""

    quantization: str | None = None

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._of = checkpoint
        self.folder: Path = checkpoint.folder
        self.config: ModelConfig = checkpoint.config
        self.revision: str = checkpoint.revision
        self.gguf: GGUFFile | None = checkpoint.gguf
        self.kv_scales: Tensor | None = checkpoint.kv_scales

    def tensor(self, name: str) -> Tensor:
        return self._of.tensor(name)

    def matrix(self, module: str) -> Tensor | QuantizedWeight:
        return self.tensor(f"{module}.weight")


class Rounded(Dequantised):
    """Every matrix, and the head's with it, rounded to 8 bits. `tensor` gives what they stand for, so that what is
    compared with this checkpoint (reference.py) computes with the same numbers."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        self.quantization = "int8"
        self.revision = f"{checkpoint.revision}-int8"  # other numbers: keys and values of the two must not mix
        head = "model.embed_tokens" if checkpoint.config.tie_word_embeddings else "lm_head"
        self._names = {f"{name}.weight" for name in (head, *linear_matrices(checkpoint.config))}

    def tensor(self, name: str) -> Tensor:
        held = self._of.tensor(name)
        return int8(held).dequantise() if name in self._names else held

    def matrix(self, module: str) -> Tensor | QuantizedWeight:
        return int8(self._of.tensor(f"{module}.weight"))
