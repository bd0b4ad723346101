"""The readers, on files in the real formats, and the batches made of them."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch
from image_files import write_cifar10, write_folder, write_idx

from demp_kernels.recipes.data import TensorBatches, load_data
from demp_kernels.recipes.errors import RecipeError
from demp_kernels.recipes.ranks import Ranks

CPU = torch.device("cpu")


def load(name: str, folder: Path | None = None, **options: object):
    return load_data(name, folder, **{"batch_size": 10, "seed": 0, "device": CPU, **options})


def shown_classes_are_the_labels(data) -> bool:
    """The test pictures have a bright block that begins at row label * side // 10 and is side // 10 rows high."""
    images, labels = next(iter(data.test))
    row = images.mean((1, 3)).argmax(1) - labels * data.image_size // 10
    return bool(((row >= 0) & (row < data.image_size // 10)).all())


def test_digits_are_embedded() -> None:
    data = load("digits")
    assert (data.train.samples, data.test.samples) == (1437, 360)
    assert (data.classes, data.channels, data.image_size) == (10, 1, 8)
    images, labels = next(iter(data.train))
    assert images.shape == (10, 1, 8, 8) and images.dtype == torch.float32 and labels.dtype == torch.int64
    every = torch.cat([images for images, _ in data.test])
    assert abs(every.mean()) < 0.1 and 0.9 < every.std() < 1.1


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("place", ["", "raw", "FashionMNIST/raw"])
def test_fashion_mnist_folder(tmp_path: Path, compressed: bool, place: str) -> None:
    write_idx(tmp_path / place, compressed=compressed)
    data = load("fashion-mnist", tmp_path)
    assert (data.train.samples, data.test.samples, data.classes, data.channels, data.image_size) == (60, 20, 10, 1, 28)
    assert shown_classes_are_the_labels(data)


@pytest.mark.parametrize("archive", [False, True])
def test_cifar10_folder(tmp_path: Path, archive: bool) -> None:
    write_cifar10(tmp_path, archive=archive)
    data = load("cifar10", tmp_path)
    assert (data.train.samples, data.test.samples, data.classes, data.channels, data.image_size) == (100, 20, 10, 3, 32)
    assert shown_classes_are_the_labels(data)


def test_cifar10_batches_folder_itself(tmp_path: Path) -> None:
    write_cifar10(tmp_path)
    assert load("cifar10", tmp_path / "cifar-10-batches-py").train.samples == 100


@pytest.mark.parametrize("parts", [("train", "val"), ("train", "test"), ("",)])
def test_image_folder(tmp_path: Path, parts: tuple[str, ...]) -> None:
    write_folder(tmp_path, parts)
    data = load("folder", tmp_path, image_size=32, workers=0)
    assert (data.classes, data.channels, data.image_size) == (3, 3, 32)
    assert (data.train.samples, data.test.samples) == ((24, 24) if len(parts) == 2 else (20, 4))
    first, again = (
        [(images, labels) for images, labels in load("folder", tmp_path, image_size=32, workers=0).train]
        for _ in range(2)
    )
    assert [x.shape for x, _ in first] == [(10, 3, 32, 32)] * 2
    assert all(torch.equal(a[1], b[1]) for a, b in zip(first, again))
    assert sum(len(images) for images in data.train.scan()) == data.train.samples


def test_same_seed_same_batches_whatever_else_draws() -> None:
    first = [images for images, _ in load("digits", seed=3).train]
    torch.randn(1000)
    again = [images for images, _ in load("digits", seed=3).train]
    other = [images for images, _ in load("digits", seed=4).train]
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[0], other[0])


def test_part_of_the_training_images_is_the_same_for_every_seed() -> None:
    one, two = (load("digits", train_size=50, seed=seed) for seed in (0, 1))
    assert one.train.samples == 50 and one.train_total == 1437
    assert torch.equal(one.train.images, two.train.images)


def test_resize_and_grey_to_colour() -> None:
    data = load("digits", image_size=16, channels=3)
    images, _ = next(iter(data.train))
    assert images.shape == (10, 3, 16, 16)
    assert torch.equal(images[:, 0], images[:, 2])
    assert next(data.train.scan()).shape == (10, 3, 16, 16)


def test_augmentation_moves_and_mirrors_but_keeps_the_pixels() -> None:
    image = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    image[..., 3, 2] = 100
    batches = TensorBatches(
        image.repeat(500, 1, 1, 1), torch.zeros(500, dtype=torch.int64), torch.zeros(1), torch.ones(1), batch_size=500,
        training=True, shift=1, flip=True,
    )
    images, _ = next(iter(batches))
    assert (images.sum((1, 2, 3)) == 100).all()
    places = {tuple(place) for place in images.nonzero()[:, 2:].tolist()}
    assert places == {(row, column) for row in (2, 3, 4) for column in (1, 2, 3, 4, 5, 6)}


def test_incomplete_batches_are_dropped_in_training_only() -> None:
    data = load("digits", batch_size=100)
    assert len(data.train) == 14 and sum(1 for _ in data.train) == 14
    assert sum(len(labels) for _, labels in data.test) == 360


def damaged_idx(folder: Path) -> None:
    write_idx(folder, compressed=True)
    (folder / "train-images-idx3-ubyte.gz").write_bytes(b"not gzip")


def short_idx(folder: Path) -> None:
    write_idx(folder, compressed=False)
    (folder / "t10k-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01\0\0\0\x03abc")


def damaged_cifar(folder: Path) -> None:
    write_cifar10(folder)
    (folder / "cifar-10-batches-py" / "data_batch_3").write_bytes(b"no pickle")


@pytest.mark.parametrize(
    ("name", "make", "text"),
    [
        ("fashion-mnist", lambda folder: None, "has no train-images-idx3-ubyte or train-images-idx3-ubyte.gz"),
        ("fashion-mnist", damaged_idx, "not of the IDX format: .*train-images-idx3-ubyte.gz"),
        ("fashion-mnist", short_idx, "one label for each test image, got 20 and 3"),
        ("cifar10", lambda folder: None, "has no cifar-10-batches-py or cifar-10-python.tar.gz"),
        ("cifar10", damaged_cifar, "is not a CIFAR-10 folder"),
        ("cifar10", lambda f: (f / "cifar-10-python.tar.gz").write_bytes(b"no tar"), "damaged archive"),
        ("folder", lambda folder: None, "one sub-folder of images a class"),
        ("folder", lambda folder: write_folder(folder, ("train",)), "val or test beside train"),
        ("digits", lambda folder: None, "data-dir does not apply to digits"),
        ("mnist", lambda folder: None, "data must be one of digits, fashion-mnist, cifar10, folder, got 'mnist'"),
    ],
)
def test_a_folder_that_is_not_the_data_set_is_refused(tmp_path: Path, name: str, make, text: str) -> None:
    make(tmp_path)
    with pytest.raises(RecipeError, match=text) as caught:
        load(name, tmp_path)
    assert "\n" not in str(caught.value)


def test_missing_folder_and_too_few_images(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="data-dir must be an existing folder, got .*nowhere"):
        load("fashion-mnist", tmp_path / "nowhere")
    with pytest.raises(RecipeError, match="batch-size must be at most the number of training images, 5, got 10"):
        load("digits", train_size=5)
    with pytest.raises(RecipeError, match="data-dir is required for data 'folder', got none"):
        load("folder")


@pytest.mark.parametrize("name", ["cifar10", "folder"])
def test_shares_of_ranks_are_the_whole_batch(name: str, tmp_path: Path) -> None:
    write_cifar10(tmp_path) if name == "cifar10" else write_folder(tmp_path)
    options = {"batch_size": 5, "workers": 0} | ({"image_size": 40} if name == "folder" else {})
    whole = load(name, tmp_path, **options)
    parts = [load(name, tmp_path, **options, ranks=Ranks(rank, 2)) for rank in range(2)]
    for _ in range(2):  # a second pass draws another order, the same one on every rank
        for (images, labels), *shares in zip(whole.train, *(part.train for part in parts), strict=True):
            assert [len(share[1]) for share in shares] == [2, 3]
            assert torch.equal(torch.cat([share[1] for share in shares]), labels)
            assert torch.equal(torch.cat([share[0] for share in shares]), images)
        scanned = [len(torch.cat(list(part.train.scan()))) for part in (*parts, whole)]
        assert scanned[0] + scanned[1] == scanned[2] == whole.train.samples
    assert sum(len(labels) for part in parts for _, labels in part.test) == whole.test.samples


@pytest.mark.parametrize("name", ["cifar10", "folder"])
def test_the_same_batches_again_without_moving_those_of_the_run(name: str, tmp_path: Path) -> None:
    write_cifar10(tmp_path) if name == "cifar10" else write_folder(tmp_path)
    options = {"batch_size": 4, "workers": 0} | ({"image_size": 40} if name == "folder" else {})
    expected = [images for images, _ in load(name, tmp_path, **options).train]
    train = load(name, tmp_path, **options).train
    found = []
    for images, _ in train:
        found.append(images)
        again = [images for images, _ in train.again()]
        assert len(again) == len(expected) > 1 and all(map(torch.equal, again, expected))
    assert all(map(torch.equal, found, expected))


def test_scans_do_not_change_the_batches_and_go_on_after_a_resume() -> None:
    def batches(scanning: bool) -> TensorBatches:
        generator = torch.Generator().manual_seed(1)
        images = torch.randint(256, (50, 1, 6, 6), generator=generator, dtype=torch.uint8)
        labels, mean, std = torch.arange(50), torch.full((1,), 128.0), torch.full((1,), 64.0)
        made = TensorBatches(images, labels, mean, std, batch_size=10, training=True, shift=1, flip=True)
        found = []
        for _ in range(2):
            for pixels, _ in made:
                found.append(pixels)
                if scanning:
                    list(made.scan(20))
        seen.append(torch.stack(found))
        return made

    seen: list[torch.Tensor] = []
    scanned, plain = batches(True), batches(False)
    assert torch.equal(*seen)
    plain.load_state_dict(scanned.state_dict())
    assert torch.equal(torch.cat(list(plain.scan(20))), torch.cat(list(scanned.scan(20))))
