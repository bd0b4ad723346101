"""Image folders (one sub-folder a class) through torchvision's ImageFolder and a DataLoader."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, Sampler, SequentialSampler, Subset

from .errors import RecipeError, need, one_line
from .order import EpochOrder
from .ranks import Ranks

__all__ = ["SCANNED", "FolderBatches", "load_folder", "too_few_images"]

# mean and standard deviation of ImageNet's pixels (0..255), the usual ones for photographs
MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)


SCANNED = 1536
"""Images that a scan for dead units looks at, as many as the authors' on CIFAR-10."""


class FolderBatches:
    """Batches of a DataLoader of uint8 images, normalised on the device.

    Args:
        loader: of training or test images. plain: for training, a loader of a random choice of them, not augmented.
        order: of the training loader's sampler.
        again: for training, makes another one of these, of the same batches from the first on.
    """

    again: Callable[[], FolderBatches]

    def __init__(
        self, loader: DataLoader, device: torch.device, plain: DataLoader | None = None, order: EpochOrder | None = None,
        again: Callable[[], FolderBatches] | None = None,
    ) -> None:
        if again is not None:
            self.again = again
        self.loader, self.device, self.plain, self.order = loader, device, plain, order
        self.mean = torch.tensor(MEAN, device=device).view(-1, 1, 1)
        self.std = torch.tensor(STD, device=device).view(-1, 1, 1)

    @property
    def samples(self) -> int:
        return len(self.loader.dataset)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in self.loader:
            if self.order is not None:
                self.order.position += 1
            yield self._pixels(images), labels.to(self.device, non_blocking=True)

    def scan(self) -> Iterator[Tensor]:
        """Images for a scan, fresh ones each time, not augmented, in batches."""
        for images, _ in self.plain:
            yield self._pixels(images)

    def state_dict(self) -> dict[str, Any]:
        """Where the passes over the data are, of training batches."""
        shares: Any = self.plain.batch_sampler
        return {"order": self.order.state_dict(), "scans": shares.sampler.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.order.load_state_dict(state["order"])
        shares: Any = self.plain.batch_sampler
        shares.sampler.generator.set_state(state["scans"])

    def _pixels(self, images: Tensor) -> Tensor:
        return (images.to(self.device, non_blocking=True).float() - self.mean) / self.std


class SeededOrder(Sampler[tuple[int, int]]):
    """Training images in the order of an `EpochOrder`, each with a seed of its own for its augmentation."""

    def __init__(self, samples: int, batch_size: int, order: EpochOrder) -> None:
        self.samples, self.batch_size, self.order = samples, batch_size, order

    def __len__(self) -> int:
        return self.samples

    def __iter__(self) -> Iterator[tuple[int, int]]:
        indices, seeds = self.order.begin(self._draw, self.samples // self.batch_size)
        first = self.order.position * self.batch_size
        yield from zip(indices[first:].tolist(), seeds[first:].tolist())

    def _draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return torch.randperm(self.samples, generator=generator), torch.randint(2**62, (self.samples,), generator=generator)


class Shares(BatchSampler):
    """A rank's shares of the batches of all ranks."""

    def __init__(self, order: Sampler[Any], batch_size: int, drop_last: bool, ranks: Ranks) -> None:
        super().__init__(order, batch_size, drop_last)
        self.ranks = ranks

    def __iter__(self) -> Iterator[list[Any]]:
        for batch in super().__iter__():
            if share := batch[self.ranks.share(len(batch))]:
                yield share


class SeededImages(Dataset):
    """Images that are augmented from a seed, whichever process does it: batches depend on neither the number of workers
    nor what a worker did before."""

    def __init__(self, images: Dataset) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, item: tuple[int, int]) -> Any:
        index, seed = item
        present = torch.get_rng_state()
        torch.default_generator.manual_seed(seed)
        try:
            return self.images[index]
        finally:
            torch.set_rng_state(present)


def load_folder(
    folder: Path | None, *, batch_size: int, seed: int, device: torch.device, train_size: int | None, image_size: int,
    workers: int, ranks: Ranks = Ranks(),
) -> tuple[int, FolderBatches, FolderBatches, int]:
    """(classes, training batches, test batches, training images there are).

    `folder` has train/ and val/ (or test/), each with one sub-folder a class; or only the sub-folders of the classes,
    of which a fifth of the images, the same in every run, then becomes the test set. Training images are cropped and
    mirrored at random, test images at the centre. All ranks draw the same batches, each loads its share.
    """
    if folder is None:
        raise RecipeError("data-dir is required for data 'folder', got none")
    augmented, centred = _transforms(image_size)
    classes, train, plain, test = _parts(folder, augmented, centred)
    total = len(train)
    if train_size is not None and train_size < total:
        chosen = _fixed_order(total)[:train_size]
        train, plain = Subset(train, chosen), Subset(plain, chosen)
    if batch_size > len(train):
        raise too_few_images(len(train), batch_size)

    def loader(images: Dataset, order: Sampler[Any], drop_last: bool = False, stay: bool = True) -> DataLoader:
        # a generator of its own: a loader draws seeds for its workers, which must not move torch's global one
        return DataLoader(
            images, batch_sampler=Shares(order, batch_size, drop_last, ranks), num_workers=workers,
            persistent_workers=stay and workers > 0, pin_memory=device.type == "cuda",
            generator=torch.Generator().manual_seed(seed),
        )

    some = RandomSampler(plain, num_samples=min(SCANNED, len(plain)), generator=torch.Generator().manual_seed(seed))
    plain_loader = loader(plain, some, stay=False)

    def training(stay: bool = False) -> FolderBatches:
        order = EpochOrder(seed)
        batches = loader(SeededImages(train), SeededOrder(len(train), batch_size, order), drop_last=True, stay=stay)
        return FolderBatches(batches, device, plain_loader, order, again=training)

    return classes, training(stay=True), FolderBatches(loader(test, SequentialSampler(test)), device), total


def too_few_images(images: int, batch_size: int) -> RecipeError:
    return RecipeError(f"batch-size must be at most the number of training images, {images}, got {batch_size}")


def _transforms(size: int) -> tuple[Any, Any]:
    transforms = need("torchvision.transforms", "data 'folder'")
    augmented = transforms.Compose([
        transforms.RandomResizedCrop(size, scale=(0.25, 1.0)), transforms.RandomHorizontalFlip(),
        transforms.PILToTensor(),
    ])
    centred = transforms.Compose([
        transforms.Resize(round(size * 8 / 7)), transforms.CenterCrop(size), transforms.PILToTensor(),
    ])
    return augmented, centred


def _parts(folder: Path, augmented: Any, centred: Any) -> tuple[int, Dataset, Dataset, Dataset]:
    """(classes, training images, the same not augmented, test images)."""
    if not (folder / "train").is_dir():
        whole, plain = _images(folder, augmented), _images(folder, centred)
        order = _fixed_order(len(whole))
        cut = max(len(order) // 5, 1)
        return len(whole.classes), Subset(whole, order[cut:]), Subset(plain, order[cut:]), Subset(plain, order[:cut])
    held_out = next((folder / name for name in ("val", "test") if (folder / name).is_dir()), None)
    if held_out is None:
        raise RecipeError(f"data-dir must have val or test beside train, got {folder}")
    train, plain, test = (_images(place, how) for place, how in (
        (folder / "train", augmented), (folder / "train", centred), (held_out, centred)
    ))
    if train.classes != test.classes:
        raise RecipeError(f"data-dir must have the same classes in train and {held_out.name}, which differ in {folder}")
    return len(train.classes), train, plain, test


def _fixed_order(count: int) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()


def _images(folder: Path, transform: Any) -> Any:
    datasets = need("torchvision.datasets", "data 'folder'")
    try:
        return datasets.ImageFolder(str(folder), transform)
    except OSError as error:
        raise RecipeError(f"data-dir must hold one sub-folder of images a class, got {folder} ({one_line(error)})") from error
