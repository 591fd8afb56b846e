"""safetensors files that this engine writes and reads itself: whole or not there, and what is wrong named."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from replicas.protocol import ConfigError


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """The whole file or none, readable for whoever may read other new files."""
    from safetensors.torch import save_file

    partial = file.with_name(file.name + ".part")
    partial.touch()
    mode = partial.stat().st_mode
    save_file(dict(tensors), partial, metadata={"format": "pt"})
    partial.chmod(mode)  # safetensors lets only its writer read a file
    partial.replace(file)


def read_tensors(file: Path, param: str) -> dict[str, Tensor]:
    """All tensors; ConfigError for `param` if the file is missing, truncated or corrupt."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors: dict[str, Tensor] = load_file(file)
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{file.name} is missing, truncated or corrupt: {error}", param=param) from error
    return tensors


def check_numbers(tensor: Tensor, name: str, param: str) -> None:
    """ConfigError for `param` unless `tensor` holds finite numbers of a float type."""
    if not tensor.is_floating_point():
        raise ConfigError(f"{name} is of {tensor.dtype}, expected a float type", param=param)
    if not tensor.isfinite().all():
        raise ConfigError(f"{name} holds numbers that are not finite", param=param)
