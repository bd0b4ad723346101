"""Data sets in their real formats on the disk, small enough for tests."""
from __future__ import annotations

import gzip
import pickle
import struct
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

IDX_NAMES = {
    "train-images-idx3-ubyte": "train", "train-labels-idx1-ubyte": "train",
    "t10k-images-idx3-ubyte": "t10k", "t10k-labels-idx1-ubyte": "t10k",
}


def pictures(count: int, side: int, channels: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(count, side, side, channels) uint8 images that show their class as a bright block of rows, and the labels."""
    random = np.random.default_rng(seed)
    labels = np.arange(count, dtype=np.uint8) % 10
    images = random.integers(0, 60, (count, side, side, channels), dtype=np.uint8)
    for image, label in zip(images, labels.tolist()):
        start = label * side // 10
        image[start : start + max(side // 10, 1)] += 180
    return images, labels


def write_idx(folder: Path, *, compressed: bool, train: int = 60, test: int = 20) -> None:
    """The four files of Fashion-MNIST (and MNIST): big-endian header, then bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    opener = gzip.open if compressed else open
    for part, count in (("train", train), ("t10k", test)):
        images, labels = pictures(count, 28, 1)
        for name, array in ((f"{part}-images-idx3-ubyte", images[..., 0]), (f"{part}-labels-idx1-ubyte", labels)):
            header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
            with opener(folder / (name + ".gz" if compressed else name), "wb") as file:
                file.write(header + array.tobytes())


def write_cifar10(root: Path, *, archive: bool = False, a_batch: int = 20) -> None:
    """cifar-10-batches-py with its five training batches, its test batch and its names; or cifar-10-python.tar.gz."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for number, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        images, labels = pictures(a_batch, 32, 3, seed=number)
        rows = images.transpose(0, 3, 1, 2).reshape(a_batch, -1)
        with (folder / name).open("wb") as file:
            pickle.dump({"data": rows, "labels": labels.tolist(), "batch_label": name, "filenames": []}, file)
    with (folder / "batches.meta").open("wb") as file:
        pickle.dump({"label_names": [f"class {i}" for i in range(10)], "num_cases_per_batch": a_batch}, file)
    if archive:
        with tarfile.open(root / "cifar-10-python.tar.gz", "w:gz") as tar:
            tar.add(folder, arcname=folder.name)
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()


def write_folder(root: Path, parts: tuple[str, ...] = ("train", "val"), classes: int = 3, a_class: int = 8) -> None:
    """Image folders: part/class/image.png; with parts=("",) the classes lie in the root."""
    for part in parts:
        for label in range(classes):
            folder = root / part / f"class{label}"
            folder.mkdir(parents=True)
            images, _ = pictures(a_class, 40, 3, seed=label)
            for number, image in enumerate(images):
                Image.fromarray(image).save(folder / f"{number}.png")
