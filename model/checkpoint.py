"""Checkpoints without pickle: nested training state in one safetensors file.

Tensors are stored as such; everything else of the nesting becomes JSON in the file's metadata, with
a reference where a tensor was. The file is replaced atomically.
"""

import json
import os
from pathlib import Path
from typing import Any

from lightning.pytorch.plugins.io import CheckpointIO
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipeline.errors import StoreError

_STATE = "aptile_state"
# What a file can raise that is damaged, or was never ours.
_DAMAGE = (
    OSError, SafetensorError, ValueError, KeyError, TypeError, IndexError, RecursionError,
)  # fmt: skip


class SafetensorsCheckpointIO(CheckpointIO):
    """Lightning's checkpoints as one safetensors file."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        tensors: dict[str, Tensor] = {}
        state = json.dumps(_take_tensors(checkpoint, tensors))
        partial = Path(f"{path}.partial")
        partial.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, partial, metadata={_STATE: state})
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return read_checkpoint(Path(path))

    def remove_checkpoint(self, path: str | Path) -> None:
        Path(path).unlink(missing_ok=True)


def read_checkpoint(path: Path, with_tensors: bool = True) -> dict[str, Any]:
    """The nested state of a checkpoint; StoreError if the file is not one.

    Without tensors only the file's header is read, and their names stand in their place.
    """
    try:
        with safe_open(path, framework="pt") as file:
            state = json.loads((file.metadata() or {})[_STATE])
            names = file.keys() if with_tensors else []
            tensors = {name: file.get_tensor(name) for name in names}
        return dict(_put_tensors(state, tensors if with_tensors else None))
    except _DAMAGE as error:
        reason = " ".join(str(error).split())
        raise StoreError(
            f"{path}: not a checkpoint of aptile ({reason:.200}); remove it to train from the start"
        ) from None


def _take_tensors(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The nesting as JSON-able tagged lists; its tensors go into `tensors`."""
    match value:
        case Tensor():
            key = f"{len(tensors):06d}"
            # A copy: safetensors refuses tensors that share memory.
            tensors[key] = value.detach().cpu().contiguous().clone()
            return ["tensor", key]
        case dict():
            pairs = [
                [_take_tensors(k, tensors), _take_tensors(v, tensors)] for k, v in value.items()
            ]
            return ["dict", pairs]
        case list() | tuple():
            kind = "list" if isinstance(value, list) else "tuple"
            return [kind, [_take_tensors(item, tensors) for item in value]]
        case None | bool() | int() | float() | str():
            return ["value", value]
        case _:
            raise TypeError(f"a checkpoint cannot hold {type(value).__name__}")


def _put_tensors(tagged: Any, tensors: dict[str, Tensor] | None) -> Any:
    kind, content = tagged
    if kind == "tensor":
        return content if tensors is None else tensors[content]
    if kind == "dict":
        return {_put_tensors(k, tensors): _put_tensors(v, tensors) for k, v in content}
    if kind == "list":
        return [_put_tensors(item, tensors) for item in content]
    if kind == "tuple":
        return tuple(_put_tensors(item, tensors) for item in content)
    if kind == "value":
        return content
    raise ValueError(f"unknown tag {kind!r}")
