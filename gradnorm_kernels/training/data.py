"""Training and evaluation data whose order and augmentation depend on (seed, epoch, index) alone.

So a run that resumes in the middle of an epoch sees what the uninterrupted run would have seen, with any
number of workers. Of several processes each is given its part of every batch. Reading, transforms and mixing
are timm's; scikit-learn bundles the default data.
"""

import random
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import Mixup, create_transform
from timm.data.mixup import mixup_target
from timm.data.readers import create_reader
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, Subset, TensorDataset

from .config import TrainConfig
from .distributed import rank, world_size
from .models import InputSpec, input_spec
from .options import TrainingError

EVALUATION_FOLDERS = ("val", "validation", "test")


def seed_everything(*key: int) -> None:
    """Seeds Python, NumPy and torch from ``key``, whose integers are at least 0."""
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    # torch.manual_seed takes 0.1 ms where CUDA is built in but idle, too long for one small image.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


@dataclass
class Data:
    """A training set and a held-out set, with what a model needs to know of them.

    Items of both are an image (C, H, W), float32 with pixels in [0, 1], and its class.
    """

    config: TrainConfig
    train: "TensorDataset | _ImageFolder"
    evaluation: "TensorDataset | _ImageFolder"
    classes: list[str]
    spec: InputSpec
    mixup: Mixup | None = None

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.classes)

    def soften(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mixes a batch, in place, and turns its classes (B,) into probabilities (B, C), as configured."""
        if self.mixup:
            return self.mixup(images, labels)
        smoothing = self.config.label_smoothing
        return images, mixup_target(labels, self.num_classes, smoothing=smoothing)

    @property
    def steps_per_epoch(self) -> int:
        """Full batches in the training set; an incomplete last one is dropped."""
        return len(self.train) // self.config.batch_size

    def training_batches(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of ``epoch`` (from 0), from the step ``start`` on, in an order of its own."""
        self._order.epoch, self._order.start = epoch, start
        return iter(self._training_loader)

    def first_batch(self) -> tuple[Tensor, Tensor]:
        """The images of the first step, softened."""
        return self.soften(*next(self.training_batches(epoch=0, start=0)))

    def evaluation_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The held-out set, in its order; of several processes, each has its share of it."""
        own = range(rank(), len(self.evaluation), world_size())
        return iter(self._loader(self.evaluation if world_size() == 1 else Subset(self.evaluation, own)))

    def evaluation_sample(self, count: int) -> tuple[Tensor, Tensor]:
        """``count`` held-out images (N, C, H, W) and classes (N,), or all if there are fewer.

        A fixed sample in the folder's order, because the first would be of few classes.
        """
        order = np.random.default_rng(0).permutation(len(self.evaluation))
        subset = Subset(self.evaluation, sorted(order[:count].tolist()))
        images, labels = zip(*self._loader(subset), strict=True)
        return torch.cat(images), torch.cat(labels)

    @cached_property
    def _order(self) -> "_EpochOrder":
        return _EpochOrder(self.config.seed, len(self.train), self.config.batch_size)

    @cached_property
    def _training_loader(self) -> DataLoader[Any]:
        items = _Seeded(self.train, self.config.seed)
        return self._loader(items, sampler=self._order, drop_last=True, persistent=True)

    def _loader(self, items: Dataset[Any], *, persistent: bool = False, **options: Any) -> DataLoader[Any]:
        workers = self.config.workers if self.config.data else 0
        return DataLoader(
            items,
            self.config.batch_size // world_size(),
            num_workers=workers,
            persistent_workers=persistent and workers > 0,
            worker_init_fn=_ignore_interrupts,
            pin_memory=torch.cuda.is_available(),
            **options,
        )


def load_data(config: TrainConfig) -> Data:
    """The data that ``config`` names, as its model wants to see it.

    Raises:
        TrainingError: if there is none; the message names the path or the option.
    """
    data = _digits(config) if config.data is None else _image_folder(config, Path(config.data))
    size, processes = config.batch_size, world_size()
    if size % (config.accumulate * processes):
        parts = f"{processes} processes times {config.accumulate} parts"
        raise TrainingError(f"batch_size: {size} does not split into {parts}")
    if not data.steps_per_epoch:
        raise TrainingError(f"batch_size: {size} exceeds the number of training images, {len(data.train)}")
    return data


def load_digits() -> tuple[TensorDataset, TensorDataset]:
    """scikit-learn's handwritten digits: 1,437 to train on and 360 held out (every fifth).

    Images are (1, 8, 8), float32 with pixels in [0, 1]; classes are int64 from 0 to 9. Source: UCI ML
    Repository, Optical Recognition of Handwritten Digits, https://archive.ics.uci.edu/dataset/80.
    """
    from sklearn.datasets import load_digits as load_sklearn_digits

    bundle = load_sklearn_digits()
    images = torch.from_numpy(bundle.images / 16).float().unsqueeze(1)
    targets = torch.from_numpy(bundle.target).long()
    held_out = torch.arange(len(targets)) % 5 == 0
    train, evaluation = (TensorDataset(images[part], targets[part]) for part in (~held_out, held_out))
    return train, evaluation


def _digits(config: TrainConfig) -> Data:
    if config.image_size not in (None, 8):
        raise TrainingError(f"image_size: the digits have 8 pixels, got {config.image_size}")
    train, evaluation = load_digits()
    classes = [str(digit) for digit in range(10)]
    return Data(config, train, evaluation, classes, input_spec(config.model, 1, 8))


def _image_folder(config: TrainConfig, root: Path) -> Data:
    spec = input_spec(config.model, 3, config.image_size)
    if not root.is_dir():
        raise TrainingError(f"data: {root} is no folder")
    held_out = [root / name for name in EVALUATION_FOLDERS if (root / name).is_dir()]
    if not held_out:
        raise TrainingError(f"data: {root} has none of the folders {', '.join(EVALUATION_FOLDERS)}")
    classes = _classes(root / "train")
    if unknown := _classes(held_out[0]).keys() - classes.keys():
        raise TrainingError(f"data: {root / 'train'} lacks the classes {sorted(unknown)} of {held_out[0]}")

    mixup = None
    if config.mixup or config.cutmix:
        if (size := config.batch_size) // world_size() % 2:
            raise TrainingError(f"batch_size: mixup and cutmix need an even one a process, got {size}")
        smoothing = {"label_smoothing": config.label_smoothing, "num_classes": len(classes)}
        mixup = Mixup(config.mixup, config.cutmix, **smoothing)
    train = _ImageFolder(root / "train", classes, _training_transform(config, spec))
    evaluation = _ImageFolder(held_out[0], classes, _evaluation_transform(spec))
    return Data(config, train, evaluation, list(classes), spec, mixup)


def _classes(folder: Path) -> dict[str, int]:
    """Class name to index, of a folder laid out as <class>/*."""
    if not folder.is_dir():
        raise TrainingError(f"data: {folder} is no folder")
    try:
        classes = create_reader("", root=str(folder)).class_to_idx
    except RuntimeError as error:  # names the folder and the file types
        raise TrainingError(f"data: {error}") from error
    if "" in classes:
        raise TrainingError(f"data: {folder} holds images outside folders that name their class")
    return classes


class _ImageFolder(Dataset[tuple[Tensor, int]]):
    """Images under a folder. timm's own dataset would skip an unreadable one; this reports it."""

    def __init__(self, folder: Path, classes: dict[str, int], transform: Any) -> None:
        self.reader = create_reader("", root=str(folder), class_map=classes)
        self.transform = transform

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        file, target = self.reader[index]
        with file:
            try:
                image = Image.open(file).convert("RGB")
            except Exception as error:  # Pillow's decoders raise many kinds
                path = self.reader.filename(index, absolute=True)
                raise TrainingError(f"cannot read the image {path}: {error}") from error
        return self.transform(image), target


def _training_transform(config: TrainConfig, spec: InputSpec) -> Any:
    try:
        augmented = create_transform(
            spec.size,
            is_training=True,
            scale=(config.crop_min, 1.0),
            ratio=(3 / 4, 4 / 3) if config.crop_min < 1 else (1.0, 1.0),
            hflip=config.hflip,
            color_jitter=config.color_jitter,
            auto_augment=config.auto_augment,
            interpolation=config.interpolation or spec.interpolation,
            re_prob=config.reprob,
            re_mode=config.remode,
            mean=spec.mean,
            std=spec.std,
        )
    except Exception as error:  # timm's parser of it raises many kinds
        raise TrainingError(f"auto_augment: timm cannot use {config.auto_augment}: {error!r}") from error
    return _InPixels(augmented, spec)


def _evaluation_transform(spec: InputSpec) -> Any:
    # With this mean and std timm's transforms end in pixels in [0, 1].
    pixels: dict[str, Any] = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    return create_transform(spec.size, crop_pct=spec.crop_pct, interpolation=spec.interpolation, **pixels)


class _InPixels:
    """Undoes a transform's normalisation, which random erasing needs: it fills with N(0, 1)."""

    def __init__(self, transform: Any, spec: InputSpec) -> None:
        self.transform = transform
        self.mean, self.std = (torch.tensor(x).view(-1, 1, 1) for x in (spec.mean, spec.std))

    def __call__(self, image: Image.Image) -> Tensor:
        return (self.transform(image) * self.std + self.mean).clamp_(0, 1)


class _Seeded(Dataset[tuple[Tensor, int]]):
    """Seeds every generator before an item is made, from the keys (epoch, index) of :class:`_EpochOrder`."""

    def __init__(self, dataset: Dataset[Any], seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        seed_everything(self.seed, _ITEM, *key)
        return self.dataset[key[1]]


class _EpochOrder(Sampler[tuple[int, int]]):
    """A permutation an epoch, from the step ``start`` on: of each step's images, this process's part."""

    epoch = 0
    start = 0

    def __init__(self, seed: int, images: int, batch_size: int) -> None:
        self.seed, self.images, self.batch_size = seed, images, batch_size

    def __len__(self) -> int:
        return (self.images // self.batch_size - self.start) * (self.batch_size // world_size())

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = np.random.default_rng((self.seed, _ORDER, self.epoch)).permutation(self.images)
        share = self.batch_size // world_size()
        for step in range(self.start, self.images // self.batch_size):
            first = step * self.batch_size + rank() * share
            yield from ((self.epoch, int(index)) for index in order[first : first + share])


# Tell apart the streams drawn from one seed.
_ORDER, _ITEM = 1, 2


def _ignore_interrupts(worker: int) -> None:
    """Ctrl-C reaches the whole process group, but the training process still wants its current batch."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
