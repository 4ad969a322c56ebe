"""The files of a run: ``checkpoint.pt``, ``config.json``, ``metrics.jsonl``; each whole, whatever happens."""

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from .config import TrainConfig
from .options import TrainingError

CHECKPOINT = "checkpoint.pt"


def write_file(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Writes a file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_text(path: Path, text: str) -> None:
    """Writes a text whole or not at all."""
    write_file(path, lambda file: file.write(text.encode()))


def write_lines(path: Path, items: Iterable[Any]) -> None:
    """Writes a line of JSON an item."""
    write_text(path, "".join(json.dumps(item) + "\n" for item in items))


def checkpoint_path(run: Path) -> Path:
    """The checkpoint of a run given by its directory or by the checkpoint itself."""
    return run / CHECKPOINT if run.is_dir() else run


def load_checkpoint(path: Path) -> dict[str, Any]:
    """What a run's state was when its checkpoint was written.

    Args:
        path: the run's directory or its checkpoint.

    Raises:
        TrainingError: if there is no such file, or it cannot be read.
    """
    path = checkpoint_path(path)
    if not path.exists():
        raise TrainingError(f"there is no checkpoint {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds
        raise TrainingError(f"cannot read the checkpoint {path}: {error}") from error
    if not isinstance(state, dict) or not {"config", "classes", "model", "ema"} <= state.keys():
        raise TrainingError(f"cannot read the checkpoint {path}: it is none of a run of this version")
    return state


def resumed_config(output: Path, changes: dict[str, Any]) -> TrainConfig:
    """The config of the run in ``output``, with ``changes`` to it.

    Raises:
        TrainingError: if there is no readable checkpoint.
    """
    return TrainConfig(**{**load_checkpoint(output / CHECKPOINT)["config"], **changes})


def write_tensorboard(folder: Path, history: list[dict[str, Any]]) -> None:
    """Writes the last epoch's numbers."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise TrainingError(f"tensorboard: {error}; run: pip install tensorboard") from error
    epoch = history[-1]["epoch"] if history else 0
    # Purges what an interrupted run wrote of epochs that are done again.
    with SummaryWriter(str(folder), purge_step=epoch) as writer:
        for name, value in history[-1].items() if history else ():
            writer.add_scalar(name, value, epoch)
