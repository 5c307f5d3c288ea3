"""Encoders in folders: `model.safetensors` and, written last, `config.json`.

`config.json` holds the encoder's configuration, in it the digest of the store it was made for, and the
checksum of the weights; so a folder whose two files are not of one encoder is never taken for one.
"""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from pydantic import Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed

from model.config import EncoderConfig
from pipeline.errors import ConfigError
from pipeline.scorers.config import Frozen

if TYPE_CHECKING:
    from model.encoder import APTEncoder

WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"
E = TypeVar("E", bound="APTEncoder")


class SavedEncoder(Frozen):
    """What `config.json` holds."""

    format: Literal["aptile encoder 1"] = Field(
        "aptile encoder 1", description="Version of the folder's layout."
    )
    weights_sha256: str = Field(description="SHA-256 of model.safetensors, in hexadecimal.")
    encoder: EncoderConfig = Field(description="The encoder's configuration.")


def save(encoder: "APTEncoder", folder: Path) -> None:
    """Write an encoder into `folder`, which is made if need be; one in it is replaced.

    Both files are written beside their places and then moved there, `config.json` last: saving that is
    interrupted leaves what was there, or a folder that is refused, never a mixture.

    Of a sharded encoder (FSDP2) every process must call this; the first one writes.
    """
    weights = {name: _whole(tensor) for name, tensor in encoder.state_dict().items()}
    sharded = any(_is_sharded(tensor) for tensor in encoder.state_dict().values())
    if not sharded or distributed.get_rank() == 0:
        _write(weights, encoder.config, folder)
    if sharded:
        distributed.barrier()


def load(kind: type[E], folder: Path) -> E:
    """The encoder of class `kind` in `folder`, on the CPU, in float32.

    Raises ConfigError, which says what is wrong, if the folder's files are not those of one encoder.
    """
    saved = _read_config(folder / CONFIG_FILE)
    weights = _read_weights(folder / WEIGHTS_FILE, saved.weights_sha256)
    encoder = kind(saved.encoder)
    try:
        encoder.load_state_dict(weights)
    except RuntimeError as error:
        raise _refusal(folder, f"its weights are not of its configuration: {error}") from None
    return encoder


def _write(weights: dict[str, Tensor], config: EncoderConfig, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    partial = {name: folder / f"{name}.partial" for name in (WEIGHTS_FILE, CONFIG_FILE)}
    try:
        save_file(weights, partial[WEIGHTS_FILE])
        saved = SavedEncoder(weights_sha256=_sha256(partial[WEIGHTS_FILE]), encoder=config)
        partial[CONFIG_FILE].write_text(saved.model_dump_json(indent=2) + "\n")
        for path in partial.values():
            _sync(path)
        for name, path in partial.items():
            path.replace(folder / name)
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)


def _read_config(path: Path) -> SavedEncoder:
    try:
        return SavedEncoder.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise _refusal(
            path.parent, f"it has no {path.name}, which is written last; save the encoder again"
        ) from None
    except (OSError, ValidationError) as error:
        raise _refusal(path.parent, f"{path.name} is not an encoder's: {error}") from None


def _read_weights(path: Path, sha256: str) -> dict[str, Tensor]:
    try:
        found = _sha256(path)
        if found != sha256:
            raise _refusal(
                path.parent,
                f"{path.name} is damaged or of another encoder: its SHA-256 is {found}, "
                f"{CONFIG_FILE} names {sha256}; save or copy the encoder again",
            )
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise _refusal(path.parent, f"{path.name} cannot be read: {error}") from None


def _refusal(folder: Path, reason: str) -> ConfigError:
    return ConfigError(f"{folder}: not a saved encoder: {' '.join(reason.split()):.500}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _is_sharded(tensor: Tensor) -> bool:
    return _gather_of(tensor) is not None


def _whole(tensor: Tensor) -> Tensor:
    """On the CPU and in one piece; a step of all processes if sharded."""
    gather = _gather_of(tensor)
    return (gather() if gather else tensor).detach().cpu().contiguous()


def _gather_of(tensor: Tensor) -> Callable[[], Tensor] | None:
    # Every DTensor, and nothing else, has it; importing the class takes half a second.
    return getattr(tensor, "full_tensor", None)
