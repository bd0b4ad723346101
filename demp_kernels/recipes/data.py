"""Data sets of the recipes. `load_data` gives batches on the device, ready for the network.

Sets that fit in memory live there as uint8 tensors, on the training device; cropping, flipping and normalising are a
few tensor operations a batch. On two CPU cores a batch of 128 Fashion-MNIST images costs 0.5 ms of a 200 ms step; a
DataLoader that decodes image by image would take cores from the training. Image folders go through a DataLoader.
"""
from __future__ import annotations

import copy
import gzip
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import RecipeError, need, one_line
from .folder import SCANNED, FolderBatches, load_folder, too_few_images
from .order import EpochOrder
from .ranks import Ranks

__all__ = ["DATA", "ImageData", "ImageTensors", "TensorBatches", "load_data"]

@dataclass(frozen=True)
class ImageTensors:
    """A whole data set: images (N, C, H, W) uint8, labels (N,) int64, of both parts."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    shift: int = 0
    """Training images are moved by up to this many pixels along each axis."""
    flip: bool = False
    """Training images are mirrored, every second one."""


@dataclass(frozen=True)
class ImageData:
    """What a training loop needs to know: batches of (x: (N, C, S, S) float32, y: (N,) int64) on the device."""

    name: str
    classes: int
    channels: int
    image_size: int
    train: TensorBatches | FolderBatches
    test: TensorBatches | FolderBatches
    train_total: int
    """Training images that the set has; `train.samples` of them are used."""


class TensorBatches:
    """Iterable over batches of tensors in memory; every pass draws a new order and new crops from its own generator.

    Two instances with the same seed give the same batches, whatever else draws random numbers meanwhile. One that has
    loaded the `state_dict` of another goes on with the batch behind the last one that the other gave.

    Args:
        images: (N, C, H, W) uint8. labels: (N,) int64. mean, std: (C,) of the pixels.
        training: shuffle, augment, drop the incomplete batch.
        resize: side of the images that come out, bilinear; None leaves them.
        ranks: all of them draw the same batches; each is given its share.
    """

    def __init__(
        self, images: Tensor, labels: Tensor, mean: Tensor, std: Tensor, *, batch_size: int, training: bool,
        seed: int = 0, shift: int = 0, flip: bool = False, resize: int | None = None, ranks: Ranks = Ranks(),
    ) -> None:
        self.images, self.labels = images, labels
        # (x - mean) / std as one multiplication and one addition
        self.scale = (1 / std).view(-1, 1, 1)
        self.offset = (-mean / std).view(-1, 1, 1)
        self.batch_size, self.training, self.shift, self.flip, self.resize = batch_size, training, shift, flip, resize
        self.order, self.ranks, self._seed = EpochOrder(seed), ranks, seed
        # of its own: a method that scans must get the same batches to train on as one that does not
        self._scans = torch.Generator().manual_seed(seed)

    @property
    def samples(self) -> int:
        return len(self.labels)

    def __len__(self) -> int:
        return self.samples // self.batch_size if self.training else -(-self.samples // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        device = self.images.device
        if not self.training:
            for index in torch.arange(self.samples, device=device).split(self.batch_size):
                index = index[self.ranks.share(len(index))]
                if len(index):
                    yield self._pixels(self.images[index]), self.labels[index]
            return
        order = self.order.begin(lambda generator: torch.randperm(self.samples, generator=generator), len(self))
        order = order.to(device)
        for batch in range(self.order.position, len(self)):
            index = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            share = self.ranks.share(len(index))
            images = self._pixels(self._augmented(index, share))
            self.order.position = batch + 1
            yield images, self.labels[index[share]]

    def again(self) -> TensorBatches:
        """The same batches from the first on, without moving this one's; the images are shared."""
        other = copy.copy(self)
        other.order = EpochOrder(self._seed)
        return other

    def scan(self, count: int = SCANNED) -> Iterator[Tensor]:
        """`count` images (or all there are), fresh ones each time, not augmented, in batches."""
        chosen = torch.randperm(self.samples, generator=self._scans)[:count].to(self.images.device)
        for index in chosen.split(self.batch_size):
            index = index[self.ranks.share(len(index))]
            if len(index):
                yield self._pixels(self.images[index])

    def state_dict(self) -> dict[str, Any]:
        """Where the passes over the data are, of training batches."""
        return {"order": self.order.state_dict(), "scans": self._scans.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.order.load_state_dict(state.get("order", state))  # of 0.1's first checkpoints, the order was all
        if "scans" in state:
            self._scans.set_state(state["scans"])

    def _pixels(self, images: Tensor) -> Tensor:
        images = torch.addcmul(self.offset, images.float(), self.scale)
        if self.resize is not None and self.resize != images.shape[-1]:
            images = F.interpolate(images, size=self.resize, mode="bilinear", antialias=True)
        return images

    def _augmented(self, index: Tensor, share: slice) -> Tensor:
        """The images `index[share]`, moved and mirrored by their part of what is drawn for all of `index`."""
        drawn, images = len(index), self.images[index[share]]
        count, _, height, width = images.shape
        if self.shift:
            padded = F.pad(images, (self.shift,) * 4)
            windows = padded.unfold(2, height, 1).unfold(3, width, 1)
            moves = torch.randint(2 * self.shift + 1, (2, drawn), generator=self.order.generator)
            top, left = moves[:, share].to(images.device, non_blocking=True)
            images = windows[torch.arange(count, device=images.device), :, top, left]
        if self.flip:
            mirrored = torch.rand(drawn, generator=self.order.generator)[share].to(images.device, non_blocking=True) < 0.5
            images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(3), images)
        return images


# --- readers: folder (or None) -> ImageTensors ---


def read_digits(folder: Path | None) -> ImageTensors:
    """scikit-learn's 1,797 handwritten digits, 8x8, embedded in the package: 1,437 to train, 360 to test."""
    if folder is not None:
        raise RecipeError(f"data-dir does not apply to digits, which come with scikit-learn, got {folder}")
    datasets = need("sklearn.datasets", "data 'digits'")
    selection = need("sklearn.model_selection", "data 'digits'")
    digits = datasets.load_digits()
    parts = selection.train_test_split(
        digits.images, digits.target, test_size=0.2, random_state=0, stratify=digits.target
    )
    train_images, test_images, train_labels, test_labels = map(torch.from_numpy, parts)
    return ImageTensors(
        train_images[:, None].to(torch.uint8), train_labels.long(),
        test_images[:, None].to(torch.uint8), test_labels.long(),
        shift=1,
    )


def read_fashion_mnist(folder: Path | None) -> ImageTensors:
    """Fashion-MNIST from a folder of its four IDX files, compressed or not; without a folder, from where Debian's
    package dataset-fashion-mnist puts it, or torchvision's download."""
    mnist = need("torchvision.datasets.mnist", "data 'fashion-mnist'")
    packaged = Path("/usr/share/datasets/fashion-mnist")
    if folder is None and packaged.is_dir():
        folder = packaged
    if folder is None:
        folder = _cache()
        _downloaded("fashion-mnist", lambda: mnist.FashionMNIST(folder, download=True))
    names = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    for place in (folder, folder / "raw", folder / "FashionMNIST" / "raw"):
        files = [_plain_or_gz(place / name) for name in names]
        if any(files):
            break
    for name, file in zip(names, files):
        if file is None:
            raise RecipeError(f"data-dir is not a Fashion-MNIST folder: {folder} has no {name} or {name}.gz")
    readers = [mnist.read_image_file, mnist.read_label_file] * 2
    train_images, train_labels, test_images, test_labels = map(_read_idx, files, readers)
    # not augmented: with shifts and mirroring, the default 12 epochs of 10,000 images ended at 84.5% instead of 88.8%
    return ImageTensors(train_images[:, None], train_labels, test_images[:, None], test_labels)


def read_cifar10(folder: Path | None) -> ImageTensors:
    """CIFAR-10 by torchvision: from a folder with cifar-10-batches-py (or that folder itself, or
    cifar-10-python.tar.gz), or its download."""
    cifar = need("torchvision.datasets.cifar", "data 'cifar10'")

    class Unverified(cifar.CIFAR10):
        """The reader without the checksums: a smaller copy in the same format is as good. Downloads are verified."""

        train_list = [[name, None] for name, _ in cifar.CIFAR10.train_list]
        test_list = [[name, None] for name, _ in cifar.CIFAR10.test_list]
        meta = {**cifar.CIFAR10.meta, "md5": None}

    def read(root: Path) -> ImageTensors:
        try:
            train, test = (Unverified(root, train=part) for part in (True, False))
        except Exception as error:  # the reader unpickles: a foreign file can raise anything
            raise RecipeError(f"data-dir is not a CIFAR-10 folder: {folder}: {one_line(error)}") from error
        images = [torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous() for part in (train, test)]
        labels = [torch.tensor(part.targets) for part in (train, test)]
        return ImageTensors(images[0], labels[0], images[1], labels[1], shift=4, flip=True)

    if folder is None:
        folder = _cache()
        _downloaded("cifar10", lambda: cifar.CIFAR10(folder, download=True))
    if folder.name == Unverified.base_folder:
        return read(folder.parent)
    archive = folder / Unverified.filename
    if archive.is_file() and not (folder / Unverified.base_folder).is_dir():
        # the folder may be read-only, so not beside the archive
        with tempfile.TemporaryDirectory() as scratch:
            _unpack(archive, Path(scratch))
            return read(Path(scratch))
    if not (folder / Unverified.base_folder).is_dir():
        raise RecipeError(
            f"data-dir is not a CIFAR-10 folder: {folder} has no {Unverified.base_folder} or {Unverified.filename}"
        )
    return read(folder)


DATA: dict[str, Callable[[Path | None], ImageTensors] | None] = {
    "digits": read_digits,
    "fashion-mnist": read_fashion_mnist,
    "cifar10": read_cifar10,
    "folder": None,
}
"""Name -> reader; "folder" is read while training."""


def load_data(
    name: str, folder: Path | None, *, batch_size: int, seed: int, device: torch.device,
    train_size: int | None = None, image_size: int | None = None, channels: int | None = None, workers: int = 2,
    ranks: Ranks = Ranks(),
) -> ImageData:
    """A data set by name.

    Args:
        name: one of `DATA`.
        folder: where it is. None: embedded, packaged or downloaded (not for "folder").
        batch_size: of training. seed: of the order and the augmentation.
        train_size: use that many training images, the same ones for every seed. None: all.
        image_size: resize to this side. None: as they are (224 for "folder").
        channels: 3 repeats grey images, for networks that want colour. None: as they are.
        workers: processes that decode images, for "folder".
        ranks: each is given its share of every batch.

    Raises RecipeError in one line for a missing folder, a folder that is not the data set, or too few images.
    """
    if name not in DATA:
        raise RecipeError(f"data must be one of {', '.join(DATA)}, got {name!r}")
    if folder is not None and not folder.is_dir():
        raise RecipeError(f"data-dir must be an existing folder, got {folder}")
    reader = DATA[name]
    if reader is None:
        classes, train, test, total = load_folder(
            folder, batch_size=batch_size, seed=seed, device=device, train_size=train_size,
            image_size=image_size or 224, workers=workers, ranks=ranks,
        )
        found_channels, size = 3, image_size or 224
    else:
        tensors = reader(folder)
        _check(name, tensors)
        found_channels = channels or tensors.train_images.shape[1]
        size = image_size or tensors.train_images.shape[-1]
        classes, total = int(tensors.train_labels.max()) + 1, len(tensors.train_labels)
        train, test = _batches(tensors, batch_size, seed, device, train_size, image_size, found_channels, ranks)
    if len(train) == 0:
        raise too_few_images(train.samples, batch_size)
    return ImageData(name, classes, found_channels, size, train, test, total)


def _batches(
    tensors: ImageTensors, batch_size: int, seed: int, device: torch.device, train_size: int | None,
    resize: int | None, channels: int, ranks: Ranks,
) -> tuple[TensorBatches, TensorBatches]:
    images, labels = tensors.train_images, tensors.train_labels
    if train_size is not None and train_size < len(labels):
        chosen = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:train_size]
        images, labels = images[chosen], labels[chosen]
    pixels = images.float()
    mean, std = pixels.mean((0, 2, 3)), pixels.std((0, 2, 3)).clamp_min(1e-3)

    def placed(images: Tensor) -> Tensor:
        return images.expand(-1, channels, -1, -1).contiguous().to(device)

    stats = (mean.expand(channels).to(device), std.expand(channels).to(device))
    train = TensorBatches(
        placed(images), labels.to(device), *stats, batch_size=batch_size, training=True, seed=seed,
        shift=tensors.shift, flip=tensors.flip, resize=resize, ranks=ranks,
    )
    test = TensorBatches(
        placed(tensors.test_images), tensors.test_labels.to(device), *stats, batch_size=max(batch_size, 256),
        training=False, resize=resize, ranks=ranks,
    )
    return train, test


def _check(name: str, tensors: ImageTensors) -> None:
    for part, images, labels in (
        ("training", tensors.train_images, tensors.train_labels), ("test", tensors.test_images, tensors.test_labels)
    ):
        if len(images) != len(labels) or len(labels) == 0:
            raise RecipeError(f"{name} must have one label for each {part} image, got {len(images)} and {len(labels)}")


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "demp_kernels"


def _downloaded(name: str, download: Callable[[], object]) -> None:
    try:
        download()
    except Exception as error:  # network, disk and checksum errors come in many classes
        raise RecipeError(f"{name} cannot be downloaded ({one_line(error)}); name a folder: data-dir") from error


def _plain_or_gz(path: Path) -> Path | None:
    return next((file for file in (path, path.with_name(path.name + ".gz")) if file.is_file()), None)


def _read_idx(file: Path, read: Callable[[str], Tensor]) -> Tensor:
    try:
        if file.suffix != ".gz":
            return read(str(file))
        with gzip.open(file) as packed, tempfile.NamedTemporaryFile() as plain:
            shutil.copyfileobj(packed, plain)
            plain.flush()
            return read(plain.name)
    except Exception as error:  # a foreign file fails anywhere in gzip or in the reader, an AssertionError included
        raise RecipeError(f"data-dir has a file that is not of the IDX format: {file}: {one_line(error)}") from error


def _unpack(archive: Path, target: Path) -> None:
    extract_archive = need("torchvision.datasets.utils", "data 'cifar10'").extract_archive
    try:
        extract_archive(archive, target)
    except Exception as error:  # tarfile, gzip and zlib each have errors of their own
        raise RecipeError(f"data-dir has a damaged archive: {archive}: {one_line(error)}") from error
