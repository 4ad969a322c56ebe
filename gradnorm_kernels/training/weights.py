"""Reads the weights of a model from checkpoints as people have them, and names them as timm does today.

Files are read as data: torch's restricted unpickler, or safetensors. No code in them is run.
"""

import argparse
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .options import TrainingError

# Where checkpoints keep their weights, averaged ones first.
_TABLES = (
    *("ema", "state_dict_ema", "model_ema", "ema_state_dict", "ema_model"),
    *("state_dict", "model_state_dict", "model", "net", "module"),
)
# Of Normalize and RobustBench, of DistributedDataParallel, of torch.compile.
_WRAPPER = re.compile(r"^(model|module|_orig_mod)\.")
# Last parts of the names under which wrappers keep their normalisation.
_NORMALIZATION = {"mean": "mean", "mu": "mean", "new_mean": "mean"}
_NORMALIZATION |= {"std": "std", "sigma": "std", "new_std": "std"}
# Buffers of Swin's that timm kept in checkpoints before 0.9, and computes now.
_COMPUTED = ("attn_mask", "relative_position_index")
# In a checkpoint of timm's trainer: its command line. It is a plain holder of attributes.
_HARMLESS: list[Any] = [argparse.Namespace]
_LISTED = 4


@dataclass(frozen=True)
class Weights:
    """A file's weights under the names that a model of today has for them.

    Attributes:
        table: the keys that lead to them in the file, such as ``state_dict_ema``, or nothing.
        tensors: by name.
        normalization: ``mean`` and ``std`` of the pixels, each a number a channel, where the file has them.
        left_out: what did not fit and was left out, or nothing.
    """

    table: str
    tensors: dict[str, Tensor]
    normalization: dict[str, Tensor]
    left_out: str = ""

    def problems(self, own: Mapping[str, Tensor]) -> str:
        """What in the file does not fit a model whose ``state_dict`` is ``own``, and what it lacks."""
        unknown = self.tensors.keys() - own.keys()
        # PyTorch counts batches only for a momentum that no model here has.
        missing = {key for key in own.keys() - self.tensors.keys() if not key.endswith("num_batches_tracked")}
        shapes = [
            f"{key} {tuple(self.tensors[key].shape)} for {tuple(own[key].shape)}"
            for key in own
            if key in self.tensors and self.tensors[key].shape != own[key].shape
        ]
        lists = {"unknown": sorted(unknown), "missing": sorted(missing), "of another shape": shapes}
        return "; ".join(f"{len(keys)} {what}: {_some(keys)}" for what, keys in lists.items() if keys)

    def drop_misfits(self, own: Mapping[str, Tensor]) -> None:
        """Keeps what fits."""
        for key in [*self.tensors]:
            if key not in own or self.tensors[key].shape != own[key].shape:
                del self.tensors[key]


def read_weights(path: Path, own: Mapping[str, Tensor]) -> Weights:
    """The weights in a file, under the names that a model has whose ``state_dict`` is ``own``. Known are:

    - tables inside tables, of which averaged weights (``state_dict_ema``, ``model_ema``, ``ema``) are taken
      first; prefixes of wrappers (``module.``, ``model.``, ``_orig_mod.``);
    - mean and std of a wrapper that normalises, as RobustBench's;
    - Swin as timm named it before 0.9: buffers that are computed now, downsampling that belonged to the stage
      before it, and ``head.weight``.

    Args:
        path: a file of safetensors, whatever its name, or of ``torch.save``.

    Raises:
        TrainingError: if there is no such file, or no weights in it; the message says what there is.
    """
    table, tensors = _table(_read(path), path)
    named: dict[str, Tensor] = {}
    normalization: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = key
        while name not in own and _WRAPPER.match(name):
            name = _WRAPPER.sub("", name)
        last = name.rpartition(".")[2]
        if name not in own and last in _COMPUTED:
            continue
        if name not in own and last in _NORMALIZATION:
            normalization[_NORMALIZATION[last]] = tensor
        elif name in named:
            raise TrainingError(f"{path} has {name} twice, once as {key}")
        else:
            named[name] = tensor
    return Weights(table, _todays_swin(named, own), normalization)


def _read(path: Path) -> Any:
    if not path.is_file():
        raise TrainingError(f"there is no file {path}")
    with path.open("rb") as file:
        start = file.read(64)
    # A length in eight bytes, then JSON.
    if start[8:9] == b"{":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise TrainingError(f"cannot read {path} as safetensors: {error}") from error
    # torch.save's older format, too, is a pickle: it begins with the protocol.
    if not (zipfile.is_zipfile(path) or start[:1] == b"\x80"):
        raise TrainingError(
            f"cannot read {path}: neither torch.save nor safetensors wrote it; it begins {start!r}"
        )
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds
        # Its advice is to load without this safety.
        reason = re.search(r"(Unsupported global: GLOBAL \S+|Trying to .*?\.)", str(error))
        found = reason[1] if reason else str(error).partition("\n")[0]
        raise TrainingError(f"cannot read {path} as plain data: {found}") from error


def _table(content: Any, path: Path) -> tuple[str, dict[str, Tensor]]:
    """The innermost table of weights, and the keys that lead there."""
    keys: list[str] = []
    while isinstance(content, Mapping):
        inner = next((key for key in _TABLES if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
            if tensors:
                return ".".join(keys), tensors
            found = _some([f"{key} ({type(value).__name__})" for key, value in content.items()])
            raise TrainingError(f"{path} has no table of weights; it has: {found or 'nothing'}")
        keys.append(inner)
        content = content[inner]
    raise TrainingError(f"{path} has no table of weights; it is of type {type(content).__name__}")


def _todays_swin(tensors: dict[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Where these are of timm before 0.9, whose stages ended, not began, by downsampling."""
    first = "layers.0.downsample.reduction.weight"
    if first not in tensors or first in own:
        return tensors

    def renamed(key: str) -> str:
        key = re.sub(r"^layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) + 1}.downsample", key)
        return re.sub(r"^head\.(weight|bias)$", r"head.fc.\1", key)

    return {renamed(key): tensor for key, tensor in tensors.items()}


def _some(names: list[str]) -> str:
    """The first few."""
    return ", ".join(names[:_LISTED]) + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")
