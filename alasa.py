"""The parts of a fine-tuned image classifier; train.py and predict.py put them together.

    python train.py --train-csv train.csv --valid-csv valid.csv
    python predict.py --checkpoint runs/best.pt --test-csv test.csv

Made for steganalysis, where the signal is a change of pixels by one grey level, so that
nothing here rounds, resizes or replaces a pixel unasked; right for any other images too.
Read it from top to bottom, in the order of the work: errors, seeds, rows, images, batches,
the model, several processes, one epoch, scores, files, pictures, and what a script does to
its process.
"""

import contextlib
import copy
import csv
import ctypes
import gc
import hashlib
import io
import itertools
import math
import multiprocessing
import os
import random
import re
import signal
import stat
import sys
import time
import unicodedata
import warnings
import zipfile
import zlib
from argparse import ArgumentTypeError, Namespace
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
import torchvision
from PIL import ExifTags, Image, TiffImagePlugin, UnidentifiedImageError
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    WeightedRandomSampler,
    default_collate,
)
from torch.utils.data.distributed import DistributedSampler
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.models.vision_transformer import (
    VisionTransformer,
    interpolate_embeddings,
)
from torchvision.transforms import v2

try:
    import fcntl
except ImportError:
    fcntl = None  # on Windows, where nothing keeps a second run out of a folder

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of RGB in 0..1
IMAGENET_STD = (0.229, 0.224, 0.225)
IMAGE_EXTENSIONS = (*IMG_EXTENSIONS, ".gif", ".jfif", ".jpe", ".jp2", ".avif")
# The least and the largest share of an image that a random crop shows.  torchvision's own
# 0.08 is for hundreds of epochs: in ten, what it shows is too often beside the point.
CROP_AREA = (0.35, 1)
FLAT_SPAN = 16  # grey levels: an image that spans no more shows nothing to a person
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# How many views of `d4_view` each augmentation of `make_transform` shows.
VIEWS = {"none": 1, "flip": 2, "crop": 2, "d4": 8}
# The column of the log that each choice of --monitor looks at.
MONITORS = {"auc": "auc", "wauc": "wauc", "accuracy": "valid_accuracy"}
RUN_FILES = ("best.pt", "last.pt", "log.csv", "losses.png", "batch.png")


# ---------------------------------------------------------------- errors


class AlasaError(Exception):
    """A fault that the user can mend, told in one line."""


@contextlib.contextmanager
def explain(
    what: str, kinds: tuple[type[Exception], ...] = (Exception,)
) -> Iterator[None]:
    """Raise an exception of these kinds within as an AlasaError: "<what>: <why>"."""
    try:
        yield
    except kinds as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise AlasaError(f"{what}: {why[:300]}") from error


def raise_if_any(faults: Iterable[str], shown: int = 10) -> None:
    """Raise AlasaError with the first faults and their number, if there are any."""
    faults = list(faults)
    if not faults:
        return
    message = "; ".join(faults[:shown])
    if len(faults) > shown:
        message += f"; ... ({len(faults)} in all)"
    raise AlasaError(message)


# ---------------------------------------------------------------- seeds


def stable_hash(*key: object) -> int:
    """Return 64 bits that depend on the key alone, in any process and at any time.

    As a seed: whoever knows the key, say (seed, epoch, row), draws the same, be it another
    worker or a resumed run.  So no state of a random generator is ever saved.
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    return int.from_bytes(digest[:8], "big")


def seed_everything(seed: int) -> None:
    """Seed random, numpy and torch, and choose deterministic kernels.

    Torch warns where CUDA has none: the pooling of vgg and alexnet.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS is not
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # only costs time here
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = False  # would round images to 10 bits of mantissa


@contextlib.contextmanager
def preserved_globals() -> Iterator[None]:
    """Give the caller back all that `seed_everything` changes."""
    random_state = random.getstate()
    numpy_state = np.random.get_state()
    cublas = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    benchmark = torch.backends.cudnn.benchmark
    allow_tf32 = torch.backends.cudnn.allow_tf32
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(random_state)
        np.random.set_state(numpy_state)
        if cublas is None:
            os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill
        torch.backends.cudnn.benchmark = benchmark
        torch.backends.cudnn.allow_tf32 = allow_tf32


# ---------------------------------------------------------------- rows


def read_rows(
    source: str,
    image_column: str = "image",
    label_column: str = "label",
    image_root: str | None = None,
) -> pd.DataFrame:
    """Return the rows of a CSV (`read_csv`) or of a folder (`read_folder`)."""
    if os.path.isdir(source):
        return read_folder(source)
    return read_csv(source, image_column, label_column, image_root)


def read_csv(
    path: str,
    image_column: str = "image",
    label_column: str = "label",
    image_root: str | None = None,
) -> pd.DataFrame:
    """Return a CSV's rows as a frame of text: `image`, `path`, and `label` if it has any.

    Relative images start at `image_root`, by default the CSV's folder.  The index tells
    where a row stands: "train.csv line 2".  AlasaError if a row has not as many cells as
    the header, which pandas would pass, or names no image.
    """
    header, rows = read_cells(path)
    if not rows:
        raise AlasaError(f"{path}: has no rows")
    image_at = find_column(path, header, image_column)
    raise_if_any(
        f"{path} line {line}: has {len(cells)} cells, not {len(header)}"
        for line, cells in rows.items()
        if len(cells) != len(header)
    )
    frame = pd.DataFrame(index=[f"{path} line {line}" for line in rows])
    frame["image"] = [cells[image_at] for cells in rows.values()]
    if label_column in header:
        label_at = find_column(path, header, label_column)
        frame["label"] = [cells[label_at] for cells in rows.values()]
    raise_if_any(
        f"{place}: {image!r} is no file name"
        for place, image in frame["image"].items()
        if not image.strip() or "\0" in image
    )
    root = os.path.dirname(path) if image_root is None else image_root
    frame["path"] = [os.path.join(root, image) for image in frame["image"]]
    return frame


def read_cells(path: str) -> tuple[list[str], dict[int, list[str]]]:
    """Return the header of a CSV, and the cells of each row by its line number."""
    # Some data sets keep masks in a cell, longer than the 131,072 characters of the default.
    old_limit = csv.field_size_limit(2**31 - 1)
    try:
        with (
            explain(f"{path}: not a readable CSV"),
            open(path, newline="", encoding="utf-8-sig") as file,
        ):
            reader = csv.reader(file, strict=True)
            header = [name.strip() for name in next(reader, [])]
            rows = {}
            line = reader.line_num + 1  # the first of a row's, if a cell has several
            for cells in reader:
                if cells:  # not an empty line
                    rows[line] = cells
                line = reader.line_num + 1
    finally:
        csv.field_size_limit(old_limit)
    return header, rows


def find_column(path: str, header: list[str], column: str) -> int:
    """Return the place of a column; AlasaError if it is not there, or there twice."""
    if header.count(column) == 1:
        return header.index(column)
    if column in header:
        raise AlasaError(f"{path}: has two columns {column!r}")
    if len(header) == 1:
        for mark in ";\t|":
            if mark in header[0]:
                raise AlasaError(f"{path}: looks separated by {mark!r}, not by ','")
    lacks = f"has no column {column!r}, only {header}"
    raise AlasaError(f"{path}: {lacks}; give --image-column and --label-column")


def read_folder(folder: str) -> pd.DataFrame:
    """Return the images of a folder as `read_csv` does: `image` is relative to the folder.

    The label of an image, at any depth, is the name of the topmost folder below this one,
    as in torchvision's ImageFolder.  Hidden files are skipped silently, others are reported.
    """
    images, others = find_images(folder)
    if others:
        print0(f"left out, as no images: {len(others)} files, first {others[0]}")
    if not images:
        raise AlasaError(f"{folder}: has no images")
    names = [os.path.relpath(path, folder) for path in images]
    labels = [os.path.dirname(name).split(os.sep)[0] for name in names]
    columns = {"image": names, "path": images}
    if any(labels):
        columns["label"] = labels
    return pd.DataFrame(columns, index=[folder] * len(images))


def find_images(folder: str) -> tuple[list[str], list[str]]:
    """Return the paths of a folder's images at any depth, sorted, and those of its other
    files; print which folders are empty."""
    images, others, seen = [], [], set()
    root = os.path.realpath(folder)

    def stop(error: OSError) -> None:
        """Name a folder that cannot be listed, which os.walk would pass in silence."""
        raise AlasaError(f"{folder}: {error}")

    for parent, folders, files in os.walk(folder, onerror=stop, followlinks=True):
        # Twice in one class is a link that leads back.  In two classes, it is taken twice,
        # and `check_contradictions` will say so.
        label = os.path.relpath(parent, folder).split(os.sep)[0]
        real = os.path.realpath(parent)
        # A link to the root, or to a folder above it.
        leads_back = parent != folder and Path(root).is_relative_to(real)
        if leads_back or (label, real) in seen:
            folders.clear()
            continue
        seen.add((label, real))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files = sorted(name for name in files if not name.startswith("."))
        if not folders and not files:
            print0(f"left out, as it is empty: {parent}")
        for name in files:
            path = os.path.join(parent, name)
            if name.lower().endswith(IMAGE_EXTENSIONS):
                images.append(path)
            else:
                others.append(path)
    return images, others


def find_classes(labels: Iterable[str]) -> list[str]:
    """Return the distinct labels, sorted; as numbers if all are integers."""
    classes = sorted(set(labels))  # as text, so that "1" and "01" have an order
    try:
        return sorted(classes, key=int)
    except ValueError:
        return classes


def identify_files(frame: pd.DataFrame) -> list[str]:
    """Return what tells each row's file from others, however it is linked or spelled.

    AlasaError with the rows whose file is missing, empty, or no file.
    """
    identities, faults = [], []
    for place, path in frame["path"].items():
        try:
            status = os.stat(path)
            # With the size, as some network file systems number files twice, or not at all.
            identity = f"{status.st_dev}:{status.st_ino}:{status.st_size}"
            if status.st_ino == 0:
                identity = os.path.realpath(path)
            identities.append(identity)
            if not stat.S_ISREG(status.st_mode):
                faults.append(f"{place}: {path!r} is not a file")
            elif status.st_size == 0:
                faults.append(f"{place}: {path!r} is empty")
        except OSError as error:
            faults.append(f"{place}: {path!r}: {error.strerror}")
    raise_if_any(faults)
    return identities


def check_labels(frame: pd.DataFrame) -> None:
    """Raise AlasaError if a row has no label."""
    if "label" not in frame:
        place = frame.index[0]
        raise AlasaError(f"{place}: no label; give --label-column, or class folders")
    raise_if_any(
        f"{place}: the label of {image!r} is empty"
        for place, image, label in zip(frame.index, frame["image"], frame["label"])
        if not label.strip()
    )


def check_look_alikes(labels: set[str]) -> None:
    """Raise AlasaError if two labels differ invisibly; warn if they differ in case."""
    seen, seen_in_lower_case = {}, {}
    for label in sorted(labels):
        looks = visible_part(label)
        if looks in seen:
            raise AlasaError(f"the labels {seen[looks]!a} and {label!a} look the same")
        seen[looks] = label
        lower = looks.casefold()
        if lower in seen_in_lower_case:
            twin = seen_in_lower_case[lower]
            print0(f"warning: {twin!r} and {label!r} are two classes")
        seen_in_lower_case[lower] = label


def visible_part(label: str) -> str:
    """Return the label without invisible differences: the encoding of accents,
    zero-width characters, and spacing."""
    composed = unicodedata.normalize("NFC", label)
    shown = [
        mark for mark in composed if unicodedata.category(mark) not in ("Cf", "Cc")
    ]
    return " ".join("".join(shown).split())


def check_contradictions(frame: pd.DataFrame, identities: list[str]) -> None:
    """Raise AlasaError if the same image has two labels."""
    seen, faults = {}, []
    rows = zip(identities, frame.index, frame["path"], frame["label"])
    for identity, place, path, label in rows:
        first_place, first_label = seen.setdefault(identity, (place, label))
        if label != first_label:
            both = f"{first_label!r} and {label!r}"
            faults.append(f"{first_place} and {place}: {path!r} is one image, {both}")
    raise_if_any(faults)


def check_leaks(train: pd.DataFrame, valid: pd.DataFrame) -> None:
    """Raise AlasaError if an image is missing, has two labels, or is in both splits."""
    train_identities = identify_files(train)
    valid_identities = identify_files(valid)
    check_contradictions(train, train_identities)
    check_contradictions(valid, valid_identities)
    trained_on = set(train_identities)
    raise_if_any(
        f"{place}: {path!r} is a training image too"
        for identity, (place, path) in zip(valid_identities, valid["path"].items())
        if identity in trained_on
    )
    train_names = set(map(os.path.basename, train["path"]))
    valid_names = set(map(os.path.basename, valid["path"]))
    shared = len(train_names & valid_names)
    if shared:
        print0(f"warning: {shared} file names are in both splits: the same scenes?")


def check_splits(
    train: pd.DataFrame, valid: pd.DataFrame, monitor: str = "auc"
) -> list[str]:
    """Check both splits, and return the classes in order; the first is the negative one.

    AlasaError if a label or an image is missing or contradicts another, if an image is in
    both splits, or if the monitored score would be undefined.
    """
    check_labels(train)
    check_labels(valid)
    train_labels, valid_labels = set(train["label"]), set(valid["label"])
    check_look_alikes(train_labels | valid_labels)
    classes = find_classes(train_labels)
    if len(classes) == 1:
        raise AlasaError(f"training has one class only: {classes[0]!r}")
    raise_if_any(
        f"{place}: no training label is {label!r}, only {classes[:10]}"
        for place, label in valid["label"].drop_duplicates().items()
        if label not in train_labels
    )
    absent = find_classes(train_labels - valid_labels)
    if absent:
        names = ", ".join(map(repr, absent[:10]))
        what = f"no validation label is {names}: the AUC is undefined"
        if monitor == "auc":
            raise AlasaError(f"{what}; --monitor accuracy does not need it")
        print0(what)
    has_negatives = classes[0] in valid_labels
    has_positives = len(valid_labels - {classes[0]}) > 0
    if monitor == "wauc" and not (has_negatives and has_positives):
        what = f"wauc needs validation images of {classes[0]!r} and of another class"
        raise AlasaError(what)
    check_leaks(train, valid)
    return classes


def hash_rows(frame: pd.DataFrame) -> int:
    """Return 64 bits that depend on the rows, and not on where their folder is."""
    return stable_hash(frame["image"].tolist(), frame["label"].tolist())


# ---------------------------------------------------------------- images


# What turns an image upright, by its EXIF orientation.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Chunks of a PNG that may be damaged.  Any other kind may not, even if it is not needed: it
# may be pixels, whose kind is what is damaged.
PNG_METADATA = {b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"eXIf", b"tIME", b"pHYs"}
# Bit depth and colour type, bytes 24 and 25, of a PNG whose transparent colour Pillow takes
# for another.
PNG_MISREAD = {(2, 0), (4, 0), (16, 2)}


def read_image(path: str) -> Image.Image:
    """Decode an image's first frame or page, upright, as 8-bit RGB.

    16-bit grey levels are divided by 257, of other 16-bit colours the high byte is taken.
    Transparency is laid over white, unless all is transparent.  Metadata other than the
    orientation does not matter.  AlasaError if the image cannot be decoded whole, or if a
    checksum of a PNG is wrong.
    """
    with explain(f"{path}: not a readable image"):
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise OSError("not a file")  # a pipe would keep it waiting
        data = Path(path).read_bytes()
        if data.startswith(PNG_SIGNATURE):
            data = needed_png_chunks(data)
        try:
            image = Image.open(io.BytesIO(data))
        except UnidentifiedImageError:
            raise ValueError(f"unknown to Pillow, it starts with {data[:24]}") from None
        if not isinstance(image.info.get("xmp"), bytes):
            image.info.pop("xmp", None)  # getexif searches it, and needs bytes
        image.load()
        upright = to_rgb(image)
        method = UPRIGHT.get(read_orientation(image))
        if method is not None:
            upright = upright.transpose(method)
        return upright


def needed_png_chunks(data: bytes) -> bytes:
    """Return a PNG without the chunks that its pixels do not need, such as texts and
    profiles; ValueError if the checksum of one that they may need is wrong.

    Pillow itself checks no checksum of pixels, and refuses some images for their texts.
    """
    # A chunk is its length (4 bytes), kind (4), content, and checksum (4).
    kept = [PNG_SIGNATURE]
    start = len(PNG_SIGNATURE)
    kind = b""
    while kind != b"IEND":
        if start + 12 > len(data):
            raise ValueError("the file is truncated")
        length = int.from_bytes(data[start : start + 4], "big")
        end = start + 12 + length
        chunk = data[start:end]
        kind = chunk[4:8]
        is_whole = zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")
        if not is_whole and kind not in PNG_METADATA:
            raise ValueError(f"the checksum of its chunk {kind} is wrong")
        if kind == b"tRNS" and tuple(data[24:26]) in PNG_MISREAD:
            raise ValueError("its transparency is of a kind that Pillow misreads")
        is_needed = kind[:1].isupper() or kind == b"tRNS"
        has_orientation = kind == b"eXIf" and is_whole
        if is_needed or has_orientation:
            kept.append(chunk)
        start = end
    return b"".join(kept)


def read_orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; 1 is upright, and where EXIF cannot be read.

    Pillow's exif_transpose would fail where other tags are damaged, as it rewrites them.
    """
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # noqa: BLE001 - of many kinds, as EXIF is damaged in many ways
        return 1


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an image of any mode as 8-bit RGB, as `read_image` says."""
    tags = getattr(image, "tag_v2", {})  # of a TIFF
    if image.mode.startswith(("I", "F")):  # Pillow's own conversion clips at 255
        return grey_to_rgb(image, tags)
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    # A fourth channel that a TIFF does not call alpha is often infrared.
    is_alpha = not tags or TiffImagePlugin.EXTRASAMPLES in tags
    all_is_transparent = image.getchannel("A").getextrema() == (0, 0)
    if not is_alpha or all_is_transparent:
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def grey_to_rgb(image: Image.Image, tags: dict) -> Image.Image:
    """Return 16-bit grey levels as 8-bit RGB; ValueError if their scale is not plain."""
    grey = np.asarray(image)
    bits = tags.get(TiffImagePlugin.BITSPERSAMPLE, (16,))
    white_is_zero = tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0
    if image.mode == "F" or bits != (16,) or grey.min() < 0 or grey.max() > 65535:
        raise ValueError("its grey levels are not plain 16 bits")
    if white_is_zero or "transparency" in image.info:
        raise ValueError("its grey levels are not plain: inverted or transparent")
    scaled = (grey / 257).round().astype(np.uint8)
    return Image.fromarray(scaled).convert("RGB")


def d4_view(image: Tensor, view: int) -> Tensor:
    """Return [..., H, W] as one of the square's eight symmetries shows it.

    View 0 is the image as it is, 1 mirrors it.  Views 4-7 of an image that is not square
    are 0-3 again, which keep its shape.
    """
    if view & 1:
        image = image.flip(-1)
    if view & 2:
        image = image.flip(-2)
    if view & 4 and image.shape[-1] == image.shape[-2]:
        image = image.transpose(-2, -1)
    return image


def centre_square(image: Tensor) -> Tensor:
    """Return the largest square in the middle of an image [..., H, W]."""
    return v2.functional.center_crop(image, [min(image.shape[-2:])])


def make_transform(size: int = 0, augment: str = "none") -> v2.Compose:
    """Return what turns a PIL image into uint8 [3, size, size], at native size if 0.

    `augment`, one of VIEWS, is what training draws at random; "crop" is a random resized
    crop, mirrored or not.
    """
    steps = [v2.PILToTensor()]  # first, as torch resizes faster than Pillow
    if augment == "crop":
        if size == 0:
            raise AlasaError("--augment crop needs an --image-size; or give d4")
        steps.append(v2.RandomResizedCrop(size, scale=CROP_AREA))
    elif size > 0:
        steps.append(centre_square)  # first, or a thin image would become a huge one
        steps.append(v2.Resize([size, size]))
    if augment != "none":
        views = [partial(d4_view, view=view) for view in range(VIEWS[augment])]
        steps.append(v2.RandomChoice(views))
    return v2.Compose(steps)


# ---------------------------------------------------------------- batches


def check_sizes(images: list[Tensor]) -> None:
    """Raise AlasaError unless all images have one size, as a batch needs."""
    sizes = sorted({f"{image.shape[-1]}x{image.shape[-2]}" for image in images})
    if len(sizes) > 1:
        mixed = f"a batch has images of {sizes[0]} and of {sizes[1]} pixels"
        raise AlasaError(f"{mixed}: give --image-size, or to predict --batch-size 1")


class AlasaDataset(Dataset):
    """The images that a frame lists: (image, label) pairs, or images only to "test".

    The frame is `read_rows`'s, or has images alone, with class indices for labels.
    `transform` takes an RGB PIL image and returns [3, H, W]: uint8, or floats that are
    normalised already.  By default images keep their size, and training sees them in a
    random view of D4.

    What the transform draws from torch depends on (seed, epoch, item) alone; call
    `set_epoch` before each pass.  With `balance`, each epoch draws its items anew, so that
    every class is drawn as often, and a row that is drawn twice is seen in two ways.
    """

    def __init__(
        self, frame: pd.DataFrame, split: str, transform=None, seed=0, balance=False
    ):
        if transform is None:
            transform = make_transform(augment="d4" if split == "train" else "none")
        self.split = split
        self.transform = transform
        self.seed = seed
        self.balance = balance
        self.places = frame.index.tolist()
        self.paths = frame["path" if "path" in frame else "image"].tolist()
        self.labels = None if split == "test" else frame["label"].tolist()
        # Shared memory, as workers live on from epoch to epoch: they would not see the
        # main process change its attributes, nor it theirs.
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self.rows = torch.arange(len(frame)).share_memory_()  # the row of each item
        self.flat = torch.zeros(len(frame), dtype=torch.bool).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Choose the augmentation, and with `balance` the items, of the next pass."""
        self.epoch.fill_(epoch)
        if self.balance:
            labels = torch.tensor(self.labels)
            weights = (1 / labels.bincount())[labels]
            generator = torch.Generator()
            generator.manual_seed(stable_hash("balance", self.seed, epoch))
            draw = WeightedRandomSampler(weights, len(labels), generator=generator)
            self.rows.copy_(torch.tensor(list(draw)))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, item: int) -> Tensor | tuple[Tensor, int]:
        row = int(self.rows[item])
        epoch = int(self.epoch)
        with explain(self.places[row]):
            image = read_image(self.paths[row])
        if epoch == 1:  # once is enough, for `find_flat`
            spans = [high - low for low, high in image.getextrema()]
            self.flat[row] = max(spans) <= FLAT_SPAN
        with torch.random.fork_rng(devices=[]):
            seed = stable_hash("image", self.seed, epoch, item)
            torch.default_generator.manual_seed(seed)  # the CPU's alone
            image = self.transform(image)
        if self.split == "test":
            return image
        return image, self.labels[row]

    def find_flat(self) -> list[int]:
        """Return the rows of the first epoch's images that were of nearly one colour."""
        flat = torch.stack(all_gather(self.flat)).any(dim=0)
        return flat.nonzero().flatten().tolist()

    def collate(self, samples: list) -> Tensor | list[Tensor]:
        """Return a batch: images [B, 3, H, W] and labels [B], or images only to "test"."""
        images = samples if self.split == "test" else [image for image, _ in samples]
        check_sizes(images)
        return default_collate(samples)


class TolerantDataset(AlasaDataset):
    """The images to predict; one that cannot be read is the AlasaError that says why."""

    def __init__(self, frame: pd.DataFrame, transform=None):
        super().__init__(frame, "test", transform)

    def __getitem__(self, item: int) -> Tensor | AlasaError:
        try:
            return super().__getitem__(item)
        except AlasaError as error:
            return error

    def collate(self, samples: list[Tensor | AlasaError]) -> tuple[Tensor, list[str]]:
        """Return a batch: the images that could be read, and of each sample its error or ""."""
        images, errors = [], []
        for sample in samples:
            if isinstance(sample, AlasaError):
                errors.append(str(sample))
            else:
                errors.append("")
                images.append(sample)
        check_sizes(images)
        stacked = torch.stack(images) if images else torch.empty(0)
        return stacked, errors


def start_worker(_: int, gives_way: bool) -> None:
    """Ignore Ctrl-C, which the main process handles, and warnings of damaged metadata.

    If it gives way, it decodes when the model leaves processors idle.  Else each thread of
    the model would wait for the one whose processor it takes: twice as long as it works.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.filterwarnings("ignore", module="PIL")
    if gives_way and hasattr(os, "nice"):  # Windows has none
        os.nice(19)


def count_workers() -> int:
    """Return how many workers may decode images of each split: all processors, at most 8;
    where a GPU does the rest, all but one, at most 16."""
    processors = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):  # a container may have fewer than the machine
        processors = len(os.sched_getaffinity(0))
    processors //= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # of torchrun
    if torch.cuda.is_available():
        return min(16, max(0, processors - 1))
    return min(8, processors)


def make_loader(
    data: AlasaDataset, batch_size: int, workers: int = 0, for_gpu: bool = False
) -> DataLoader:
    """Return the batches of this process, for a model on the CPU or on a GPU.

    Training: its share of each shuffled batch.  Else: every world-th batch, whole, as the
    size of a batch moves the last bits of its logits, which are to be the same for any
    number of processes.
    """
    rank, world = get_rank(), get_world_size()
    if data.split == "train":
        # Not the seed itself: the sampler adds the epoch to it, so epoch 2 of seed 0 would
        # have the order of epoch 1 of seed 1.  Of 32 bits, so that the sum has at most 64.
        seed = stable_hash("order", data.seed) % 2**32
        sampler = DistributedSampler(data, world, rank, seed=seed, drop_last=True)
        share = batch_size // world
        # Batch normalisation cannot train on one image: a last batch of one is left out.
        batches = BatchSampler(sampler, share, drop_last=len(sampler) % share == 1)
    else:
        batches = list(BatchSampler(range(len(data)), batch_size, drop_last=False))
        batches = batches[rank::world]
    return DataLoader(
        data,
        batch_sampler=batches,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=for_gpu,
        collate_fn=data.collate,
        worker_init_fn=partial(start_worker, gives_way=not for_gpu),
        generator=torch.Generator(),  # else each pass would draw from the global one
    )


def begin_pass(loader: DataLoader, epoch: int) -> Iterator:
    """Return the batches of an epoch, which the workers begin to read at once."""
    loader.dataset.set_epoch(epoch)
    if loader.dataset.split == "train":
        loader.batch_sampler.sampler.set_epoch(epoch)
    return iter(loader)


def show_progress(what: str, step: int, steps: int, began: float) -> None:
    """Say on a terminal how far a pass is, and how long it still takes; else nothing.

    `step` counts from 1; `began` is time.monotonic()'s.
    """
    if not sys.stderr.isatty() or get_rank() > 0:
        return
    seconds_left = (time.monotonic() - began) / step * (steps - step)
    line = f"{what} {step}/{steps}, {seconds_left:.0f} s left"
    if step == steps:
        line = ""
    print(f"\r{line}\033[K", end="", file=sys.stderr, flush=True)


# ---------------------------------------------------------------- the model


def normalise(images: Tensor, mean=IMAGENET_MEAN, std=IMAGENET_STD) -> Tensor:
    """Scale uint8 [B, 3, H, W] to float32 of that mean and std; floats stay as they are."""
    if images.is_floating_point():
        return images
    means = torch.tensor(mean, device=images.device).view(3, 1, 1) * 255
    stds = torch.tensor(std, device=images.device).view(3, 1, 1) * 255
    images = images.to(torch.float32, memory_format=torch.channels_last)
    return images.sub_(means).div_(stds)  # in place: five times faster


class Float32Conv2d(nn.Conv2d):
    """A convolution that computes in float32 under autocast too.

    Hidden data change a pixel by one grey level; rounding to bfloat16, by up to 0.45.
    """

    def forward(self, images: Tensor) -> Tensor:
        """Return features [B, C, H, W], in autocast's type if it is on."""
        device = images.device.type
        with torch.autocast(device, enabled=False):
            features = super().forward(images.to(self.weight.dtype))
        if torch.is_autocast_enabled(device):
            # Going on in 16 bits: a quarter of the memory for 3 % of the time.
            features = features.to(torch.get_autocast_dtype(device))
        return features


class LineConv2d(Float32Conv2d):
    """A convolution that computes in float32 where its input is one pixel high or wide.

    In bfloat16 on a CPU, the gradient of weights that see nothing but padding would be what
    the memory happened to hold (oneDNN, in torch 2.6 to 2.14).
    """

    def forward(self, images: Tensor) -> Tensor:
        """Return features [B, C, H, W], in autocast's type if it is on."""
        if 1 in images.shape[-2:]:
            return super().forward(images)
        return nn.Conv2d.forward(self, images)


def input_preset(arch: str, weights: str):
    """Return how torchvision prepares images for these weights: mean, std, crop_size.

    A file, and no weights at all, are taken like the architecture's default weights.
    AlasaError unless it is a torchvision classifier with one head.
    """
    several_heads = ["googlenet", "inception_v3"]
    archs = torchvision.models.list_models(torchvision.models, exclude=several_heads)
    if arch not in archs:
        raise AlasaError(f"--arch {arch} is not supported; choose from {archs}")
    known = torchvision.models.get_model_weights(arch).__members__
    return known.get(weights, known["DEFAULT"]).transforms()


def default_image_size(arch: str, weights: str) -> int:
    """Return 224; for a vision transformer, which has one size, that of the weights."""
    preset = input_preset(arch, weights)
    if not arch.startswith("vit_"):
        return 224
    if os.path.isfile(weights):
        state, _ = load_pretrained(arch, weights)
        patch_size = int(arch.rsplit("_", maxsplit=1)[-1])
        if "encoder.pos_embedding" in state:  # [1, 1 + patches, width]
            patches = state["encoder.pos_embedding"].shape[1] - 1
            return math.isqrt(patches) * patch_size
    return preset.crop_size[0]


def build_model(
    arch: str,
    num_classes: int,
    weights: str = "DEFAULT",
    full_res_stem: bool = False,
    image_size: int = 0,
    class_names: list[str] | None = None,
) -> nn.Module:
    """Return a torchvision classifier with pretrained weights and a new last layer.

    It takes images [B, 3, H, W] and returns logits [B, num_classes].  Images of uint8 are
    scaled by its attributes `mean` and `std`, those of the weights; floats are not.

    `weights` is a name of torchvision's, a file, or "none".  A last layer of the right shape
    is kept if its classes are `class_names`, or if a file does not tell them.
    `full_res_stem` sets the stride of the first convolution, and of pooling right behind it,
    to 1, so that the stem keeps every pixel.  `image_size` is for vision transformers, which
    are made for one size.
    """
    preset = input_preset(arch, weights)
    options = {"num_classes": num_classes}
    if arch.startswith("vit_") and image_size > 0:
        options["image_size"] = image_size
    with explain(f"--arch {arch}"):
        model = torchvision.models.get_model(arch, **options)
    if full_res_stem:
        keep_stem_resolution(model, arch)
    if weights != "none":
        state, trained_classes = load_pretrained(arch, weights)
        same_classes = trained_classes is None or trained_classes == class_names
        with explain(f"--weights {weights}"):
            load_state(model, state, same_classes)
    convolutions = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    for layer in convolutions:
        if layer.kernel_size != (1, 1):
            layer.__class__ = LineConv2d  # same weights, same names, another forward
    convolutions[0].__class__ = Float32Conv2d
    model.mean, model.std = list(preset.mean), list(preset.std)
    model.register_forward_pre_hook(normalise_input)
    return model.to(memory_format=torch.channels_last)


def normalise_input(model: nn.Module, inputs: tuple[Tensor]) -> Tensor:
    """Scale the images that are about to enter a model of `build_model`."""
    return normalise(inputs[0], model.mean, model.std)


def keep_stem_resolution(model: nn.Module, arch: str) -> None:
    """Set the stride of the stem to 1; AlasaError if it is not 2."""
    kinds = nn.Conv2d | nn.MaxPool2d
    layers = [layer for layer in model.modules() if isinstance(layer, kinds)]
    if layers[0].stride != (2, 2):
        raise AlasaError(f"--full-res-stem: {arch} has no stem of stride 2")
    layers[0].stride = (1, 1)
    if isinstance(layers[1], nn.MaxPool2d):
        layers[1].stride = 1


def find_head(model: nn.Module) -> str:
    """Return the name of the last layer, which gives the logits."""
    kinds = nn.Conv2d | nn.Linear
    names = [name for name, layer in model.named_modules() if isinstance(layer, kinds)]
    return names[-1]


def set_frozen(model: nn.Module, frozen: bool) -> None:
    """Make all layers trainable, or the last one alone."""
    model.requires_grad_(not frozen)
    model.get_submodule(find_head(model)).requires_grad_(True)


def load_pretrained(
    arch: str, weights: str
) -> tuple[dict[str, Tensor], list[str] | None]:
    """Return the state dict of torchvision's weights of that name, or of a file, and the
    classes that it was trained on, if they are known.

    A file may be a checkpoint of train.py or another tool's, if its parameters have
    torchvision's names.
    """
    known = torchvision.models.get_model_weights(arch).__members__
    if weights in known:
        cache = f"{torch.hub.get_dir()}/checkpoints, or give --weights FILE or none"
        with explain(f"cannot load {known[weights].url}; put it into {cache}"):
            model = torchvision.models.get_model(arch, weights=weights)
        return model.state_dict(), known[weights].meta["categories"]
    what = f"--weights {weights}: not a file of weights nor of {list(known)}"
    with explain(what), torch.serialization.safe_globals([Namespace]):
        content = torch.load(weights, map_location="cpu", weights_only=True)
        args, trained_classes = content.get("args"), content.get("classes")
        if isinstance(args, dict) and args.get("arch", arch) != arch:
            raise ValueError(f"it was trained with --arch {args['arch']}")
        state = content
        for wrapper in ("model", "state_dict", "model_state_dict"):
            if isinstance(content.get(wrapper), dict):
                state = content[wrapper]
                break
        # What wrapped the model left its prefix; two may have, in any order.
        for prefix in 2 * ("module.", "_orig_mod.", "model."):
            consume_prefix_in_state_dict_if_present(state, prefix)
        for key in list(state):
            # torchvision's file of densenet has "denselayer1.norm.1" for "denselayer1.norm1".
            new_key = re.sub(r"(denselayer\d+\.\w+)\.([12])\.", r"\1\2.", key)
            state[new_key] = state.pop(key)
        return state, trained_classes


def load_state(model: nn.Module, state: dict[str, Tensor], same_classes: bool) -> None:
    """Load a state dict, whose last layer gives way to the model's if it does not fit."""
    if isinstance(model, VisionTransformer):
        size, patch = model.image_size, model.patch_size
        state.update(interpolate_embeddings(size, patch, state))
    unknown = sorted(state.keys() - model.state_dict().keys())
    if unknown:
        raise ValueError(f"it has {unknown[:3]}, which this architecture has not")
    name = find_head(model)
    new_head = model.get_submodule(name).state_dict(prefix=f"{name}.")
    same_shapes = all(
        key in state and state[key].shape == tensor.shape
        for key, tensor in new_head.items()
    )
    if same_classes and same_shapes:
        print0(f"kept the last layer of the weights, {name}")
    else:
        print0(f"the last layer, {name}, is new")
        state.update(new_head)
    model.load_state_dict(state)


def restore_model(checkpoint: dict) -> nn.Module:
    """Return the model of a checkpoint of train.py."""
    args = checkpoint["args"]
    model = build_model(
        args["arch"],
        len(checkpoint["classes"]),
        "none",
        full_res_stem=args["full_res_stem"],
        image_size=args["image_size"],
    )
    model.load_state_dict(checkpoint["model"])
    model.mean, model.std = checkpoint["mean"], checkpoint["std"]
    return model


# ---------------------------------------------------------------- several processes


def get_rank() -> int:
    """Return which of torchrun's processes this is, 0 without it."""
    return dist.get_rank() if dist.is_initialized() else 0


def get_world_size() -> int:
    """Return how many processes torchrun started, 1 without it."""
    return dist.get_world_size() if dist.is_initialized() else 1


def print0(text: str) -> None:
    """Print in one process only."""
    if get_rank() == 0:
        print(text, flush=True)


def all_gather(value: object) -> list:
    """Return the value of every process, by rank."""
    values = [value] * get_world_size()
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def gather_batches(mine: list) -> list:
    """Return the results of all batches in order, which were dealt to the processes in turn:
    [[0, 2, 4], [1, 3]] gives [0, 1, 2, 3, 4]."""
    rounds = itertools.zip_longest(*all_gather(mine))
    return [result for dealt in rounds for result in dealt if result is not None]


def average_gradients(model: nn.Module) -> None:
    """Replace each gradient by its mean over the processes.

    Not by DistributedDataParallel: it regroups the gradients after its first step, so that
    a resumed run rounds differently, and what is frozen cannot change.  The weights are the
    same in all processes from the start, as all seed alike.
    """
    world = get_world_size()
    if world == 1:
        return
    parameters = [p for p in model.parameters() if p.grad is not None]
    flat = torch.cat([p.grad.flatten() for p in parameters])
    dist.all_reduce(flat)
    means = (flat / world).split([p.numel() for p in parameters])
    for parameter, mean in zip(parameters, means):
        parameter.grad.copy_(mean.view_as(parameter))


def share_buffers(model: nn.Module) -> None:
    """Give all processes the batch statistics of the first one: each trained its own."""
    if get_world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def start_process(name: str) -> torch.device:
    """Return the device to work on; under torchrun, join the other processes."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and dist.is_torchelastic_launched():
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    with explain(f"--device {name}"):
        device = torch.empty(0, device=name).device
        if device.type == "cuda":
            torch.cuda.set_device(device)
    # Not by WORLD_SIZE: one left over in the environment would make this wait for ever.
    if dist.is_torchelastic_launched() and not dist.is_initialized():
        dist.init_process_group()
    return device


def choose_precision(name: str, device: torch.device) -> str:
    """Return the precision; "auto" is what the hardware is made for."""
    if name != "auto":
        return name
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability >= (8, 0):
            return "bf16"
        if capability >= (7, 0):
            return "fp16"
    if (
        device.type == "cpu"
        and hasattr(torch.cpu, "get_capabilities")  # since torch 2.8
        and torch.cpu.get_capabilities().get("avx512_bf16")
    ):
        return "bf16"
    return "fp32"


# ---------------------------------------------------------------- one epoch


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return the context in which a model computes in this precision, one of DTYPES."""
    enabled = precision != "fp32"
    return torch.autocast(device.type, DTYPES[precision], enabled=enabled)


def set_training_mode(model: nn.Module, keep_batch_norm: bool) -> None:
    """Put a model into training mode, except what keeps its statistics.

    That is all of it where the head alone is trained, so that nothing is dropped out
    either, and all batch normalisation if `keep_batch_norm`.
    """
    head = find_head(model)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    head_alone = all(name.startswith(f"{head}.") for name in trained)
    model.train(not head_alone)
    if keep_batch_norm:
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.eval()


class BadLoss(AlasaError):
    """A training loss that is not finite; `step` counts the epoch's batches from 1.

    train.py adds the epoch and the images.
    """

    def __init__(self, loss: float, step: int):
        super().__init__(f"the loss became {loss} in batch {step}")
        self.step = step


def train_one_epoch(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    criterion,
    optimizer: torch.optim.Optimizer,
    scheduler=None,
    scaler: torch.amp.GradScaler | None = None,
    precision: str = "fp32",
    keep_batch_norm: bool = False,
) -> dict[str, float]:
    """Train on every batch once; return train_loss and train_accuracy.

    Both are computed, as in `evaluate`, from the logits of all images, which were collected
    in training, each before its step's update.  `batches` has a length.  `scheduler` steps
    with each batch; `scaler` is for fp16.  BadLoss if the loss of a batch is not finite.
    """
    device = next(model.parameters()).device
    scaler = scaler or torch.amp.GradScaler(device.type, enabled=False)
    set_training_mode(model, keep_batch_norm)
    if isinstance(criterion, nn.Module):
        criterion.train()
    all_logits, all_labels = [], []
    began = time.monotonic()
    for step, (images, labels) in enumerate(batches, start=1):
        labels = labels.to(device, non_blocking=True)
        with autocast(device, precision):
            logits = model(images.to(device, non_blocking=True)).float()
        batch_loss = criterion(logits, labels)
        if not batch_loss.isfinite():
            raise BadLoss(batch_loss.item(), step)
        optimizer.zero_grad()
        scaler.scale(batch_loss).backward()
        average_gradients(model)
        scaler.step(optimizer)
        scaler.update()
        if scheduler is not None:
            scheduler.step()
        all_logits.append(logits.detach().cpu())
        all_labels.append(labels.cpu().clone())  # a worker's holds a file open
        show_progress(f"training, loss {batch_loss:.4f}", step, len(batches), began)
    epoch_logits = torch.cat(gather_batches(all_logits))
    epoch_labels = torch.cat(gather_batches(all_labels))
    loss = total_loss(criterion, epoch_logits, epoch_labels, device)
    accuracy = (epoch_logits.argmax(1) == epoch_labels).double().mean().item()
    return {"train_loss": loss, "train_accuracy": accuracy}


@torch.no_grad()
def total_loss(
    criterion, logits: Tensor, labels: Tensor, device: torch.device
) -> float:
    """Return the criterion, out of training mode, of all logits [N, classes] at once."""
    if isinstance(criterion, nn.Module):
        criterion.eval()
    return criterion(logits.to(device), labels.to(device)).item()


@torch.inference_mode()
def infer(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, object]],
    precision: str = "fp32",
    views: int = 1,
) -> tuple[Tensor, list]:
    """Return the logits of all images in order, over all processes: float32 [N, classes],
    and of each batch its extras, which stood beside the images: labels, or errors.

    The logits are the mean over the first `views` of `d4_view`: test-time augmentation.
    The model ends in evaluation mode, with the batch statistics of the first process.
    """
    device = next(model.parameters()).device
    model.eval()
    share_buffers(model)
    all_logits, all_extras = [], []
    began = time.monotonic()
    for step, (images, extras) in enumerate(batches, start=1):
        all_extras.append(copy.deepcopy(extras))  # a worker's tensor holds a file open
        batch_logits = torch.empty(0)  # of no image: it keeps the batch's place
        if len(images) > 0:
            images = images.to(device, non_blocking=True)
            batch_logits = mean_logits(model, images, precision, views).cpu()
        all_logits.append(batch_logits)
        show_progress("evaluation", step, len(batches), began)
    return torch.cat(gather_batches(all_logits)), gather_batches(all_extras)


def mean_logits(model: nn.Module, images: Tensor, precision: str, views: int) -> Tensor:
    """Return the mean over the views of the logits of a batch; AlasaError if the model
    cannot take such images, which may be too small for it."""
    logits = []
    what = "the model cannot take such images"
    with explain(what, (RuntimeError, ValueError, AssertionError)):
        for view in range(views):
            with autocast(images.device, precision):
                logits.append(model(d4_view(images, view)).float())
    return torch.stack(logits).mean(dim=0)


def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    criterion,
    precision: str = "fp32",
) -> dict[str, float]:
    """Return valid_loss, valid_accuracy, auc and wauc of labelled images."""
    logits, batch_labels = infer(model, batches, precision)
    labels = torch.cat(batch_labels)
    device = next(model.parameters()).device
    loss = total_loss(criterion, logits, labels, device)
    scores = score(labels, logits)
    accuracy = scores.pop("accuracy")
    return {"valid_loss": loss, "valid_accuracy": accuracy} | scores


# ---------------------------------------------------------------- scores


def score(labels: Tensor, logits: Tensor) -> dict[str, float]:
    """Return accuracy, auc and wauc for class indices [N] and logits [N, classes].

    auc is the mean over each class against the rest, wauc that of P(not class 0).  They are
    NaN where a class has no image, and all three where a logit is not finite.
    """
    labels, logits = np.asarray(labels), np.asarray(logits, dtype=np.float64)
    scores = {"accuracy": math.nan, "auc": math.nan, "wauc": math.nan}
    if not np.isfinite(logits).all():
        return scores
    scores["accuracy"] = float((logits.argmax(axis=1) == labels).mean())
    classes = logits.shape[1]
    present = np.bincount(labels, minlength=classes) > 0
    not_class = log_odds_not_class(logits)
    if present.all():
        aucs = []
        for k in range(classes):  # "not k" against k has the same AUC
            aucs.append(weighted_auc(labels != k, not_class[:, k], doubled_below=0))
        scores["auc"] = float(np.mean(aucs))
    if present[0] and present[1:].any():
        scores["wauc"] = weighted_auc(labels != 0, not_class[:, 0])
    return scores


def describe(scores: dict[str, float]) -> str:
    """Return scores as the scripts print them."""
    return ", ".join(f"{name} {value:.6g}" for name, value in scores.items())


def log_odds_not_class(logits: np.ndarray) -> np.ndarray:
    """Return log(P(not class k) / P(class k)) as [N, classes]: it still ranks images where
    the probabilities of a sure network are rounded to 1.

    P(not class k) is the sum over the classes before k and over those after it, which the
    running sums from both ends hold.  A sum of all less class k would lose its digits.
    """
    log_0 = np.full((len(logits), 1), -np.inf)  # of no class at all
    up_to = np.logaddexp.accumulate(logits, axis=1)
    from_on = np.logaddexp.accumulate(logits[:, ::-1], axis=1)[:, ::-1]
    before = np.hstack([log_0, up_to[:, :-1]])
    after = np.hstack([from_on[:, 1:], log_0])
    return np.logaddexp(before, after) - logits


def weighted_auc(
    y_true: np.ndarray, y_score: np.ndarray, doubled_below: float = 0.4
) -> float:
    """Return the area under the ROC curve, in 0..1, where a true positive rate below 0.4
    counts twice: (AUC + integral of min(TPR, 0.4) dFPR) / 1.4, as in the ALASKA2
    competition.  `doubled_below` is that 0.4; 0 gives the plain AUC.

    `y_true` [N] is 0 or 1, `y_score` [N] is higher for a likelier 1; equal scores are one
    straight segment.  ValueError if a score is NaN or a class is missing.
    """
    y_true = np.asarray(y_true, dtype=bool)
    y_score = np.asarray(y_score, dtype=float)
    if y_true.all() or not y_true.any() or np.isnan(y_score).any():
        raise ValueError("an ROC curve needs positives, negatives and no NaN")
    # Not scikit-learn's roc_curve, whose import takes a second of each run.
    order = np.argsort(-y_score, kind="stable")
    positives = y_true[order].cumsum()
    negatives = (~y_true[order]).cumsum()
    falling = y_score[order]
    ends_a_tie = np.append(falling[1:] != falling[:-1], True)
    tpr = np.append(0, positives[ends_a_tie] / positives[-1])
    fpr = np.append(0, negatives[ends_a_tie] / negatives[-1])
    # A point more, where the curve crosses 0.4.  Along the curve both axes only rise, so
    # that sorting each puts it in its place.
    fpr = np.sort(np.append(fpr, np.interp(doubled_below, tpr, fpr)))
    tpr = np.sort(np.append(tpr, doubled_below))
    area = np.trapezoid(tpr + np.minimum(tpr, doubled_below), fpr)
    return float(area) / (1 + doubled_below)


def best_epoch(history: list[dict[str, float]], monitor: str) -> int:
    """Return the number of the epoch with the highest finite score, 0 if there is none.

    Ties go to the lowest validation loss, as a score of ranks alone is soon at its highest.
    """
    best, best_key = 0, (-math.inf, -math.inf)
    for row in history:
        monitored, loss = row[MONITORS[monitor]], row["valid_loss"]
        key = (monitored, -loss if math.isfinite(loss) else -math.inf)
        if math.isfinite(monitored) and key > best_key:
            best, best_key = row["epoch"], key
    return best


# ---------------------------------------------------------------- files


@contextlib.contextmanager
def atomic_write(path: str) -> Iterator[IO[bytes]]:
    """Open a file that replaces `path` once it is whole, or not at all, even if the disk is
    full or the power fails."""
    part = temporary_path(path)
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise AlasaError(f"{path}: cannot be written: {error}") from error
    except RuntimeError as error:
        # torch.save raises it in place of what happened to the file, or of Ctrl-C.
        cause = error.__context__ or error
        if isinstance(cause, KeyboardInterrupt):
            raise cause from None
        raise AlasaError(f"{path}: cannot be written: {cause}") from error
    finally:
        part.unlink(missing_ok=True)


def temporary_path(path: str) -> Path:
    """Return the file that becomes `path`; AlasaError if that is no file, as /dev/null."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise AlasaError(f"{path}: cannot be written: not a regular file")
    return Path(f"{path}.{os.getpid()}.part")  # other processes have others


def check_writable(path: str) -> None:
    """Raise AlasaError if `atomic_write` could not even begin to write."""
    part = temporary_path(path)
    with explain(f"{path}: cannot be written"):
        part.touch()
        part.unlink()


@contextlib.contextmanager
def run_folder(folder: str) -> Iterator[None]:
    """Keep the folder of a run for this process alone, until the block ends or it dies.

    AlasaError if another run is writing there, or if a file of a run cannot be written.
    Where no epoch was saved, nothing is left behind, but for new parents of the folder.
    """
    if get_rank() > 0:
        yield
        return
    is_new = not os.path.exists(folder)
    has_batch = os.path.exists(f"{folder}/batch.png")
    with explain(f"--out {folder}"):
        os.makedirs(folder, exist_ok=True)
        check_writable(f"{folder}/.alasa.lock")
    with open(f"{folder}/.alasa.lock", "w") as lock:
        take_lock(lock, folder)
        try:
            for name in RUN_FILES:
                check_writable(f"{folder}/{name}")
                for part in Path(folder).glob(f"{name}.*.part"):
                    part.unlink()  # of a run that was killed
            yield
        finally:
            # batch.png alone is written before an epoch ends.
            if not has_batch and not os.path.exists(f"{folder}/last.pt"):
                Path(f"{folder}/batch.png").unlink(missing_ok=True)
            with contextlib.suppress(PermissionError):  # of Windows, as it is open
                Path(f"{folder}/.alasa.lock").unlink(missing_ok=True)
            if is_new and not os.listdir(folder):
                os.rmdir(folder)


def take_lock(lock: IO[str], folder: str) -> None:
    """Lock an open file until it is closed or this process dies, even by SIGKILL."""
    if fcntl is None:
        return
    try:
        # Not flock, which forked workers would hold for seconds after this process died.
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        what = f"--out {folder}: another run is writing there"
        raise AlasaError(what) from None
    except OSError:  # some network file systems have no locks
        print0(f"warning: {folder} cannot be locked against a second run")


def load_checkpoint(path: str) -> dict:
    """Read a checkpoint of train.py; AlasaError if it is damaged or not one."""
    with explain(f"{path}: not a checkpoint of train.py"):
        damaged = zipfile.ZipFile(path).testzip()  # torch.load checks no CRC
        if damaged:
            raise ValueError(f"{damaged} is damaged")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        needed = {"model", "classes", "args", "history", "data", "mean", "std"}
        lacking = needed - checkpoint.keys()
        if lacking:
            raise ValueError(f"it has no {sorted(lacking)}")
        return checkpoint


# ---------------------------------------------------------------- pictures


def short_name(name: str, most: int = 24) -> str:
    """Return a class name as a figure can show it."""
    name = "".join(mark if mark.isprintable() else "?" for mark in name)
    if len(name) > most:
        name = name[: most - 1] + "\u2026"
    # Matplotlib reads "$" as a formula, and leaves names that begin with "_" out of legends.
    if name.startswith("_"):
        name = f" {name}"
    return name.replace("$", r"\$")


def new_figure(width: float, height: float, layout: str | None = None):
    """Return a Matplotlib figure of that size in inches, without a window."""
    # Here, as a notebook's MPLBACKEND can make the import fail, unless `as_script` is first.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout=layout)


def draw_images(
    figure, columns: int, images: list[np.ndarray], titles: list[str]
) -> None:
    """Show images [H, W, 3] with their titles in rows of so many."""
    rows = math.ceil(len(images) / columns)
    every_axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in every_axes:
        axes.set_axis_off()
    for axes, image, title in zip(every_axes, images, titles):
        axes.imshow(image)
        axes.set_title(title, fontsize=8)


# ---------------------------------------------------------------- scripts


def number(kind: type, least: float, most: float = 2**31 - 1):
    """Return the `type` of an argparse flag that is an int or a float within a range."""

    def parse(text: str) -> float:
        """Return the number; argparse tells its user of a ValueError in one line."""
        value = kind(text)
        if not least <= value <= most:  # true of NaN too
            raise ArgumentTypeError(f"{value} is out of range")
        return value

    parse.__name__ = kind.__name__  # as argparse calls it: "invalid int value"
    return parse


NEED_LESS_MEMORY = "give a lower --batch-size or --image-size"
ADVICE = {
    "out of memory": NEED_LESS_MEMORY,
    "ALLOC_FAILED": NEED_LESS_MEMORY,
    "MemoryError": NEED_LESS_MEMORY,
    "can't allocate memory": NEED_LESS_MEMORY,
    "DataLoader worker (pid": "a worker was lost, try --workers 0",
    "file </torch_": "no room for shared memory, try --workers 0",
    "Too many open files": "try --workers 0",
}


def one_line(error: Exception) -> str | None:
    """Return what to tell of a fault that the user can mend; None of a bug."""
    # A worker's error is "Caught AlasaError in … Traceback … alasa.AlasaError: message".
    message = str(error).rsplit("alasa.AlasaError: ", maxsplit=1)[-1]
    message = " ".join(message.split()) or type(error).__name__
    if isinstance(error, RuntimeError | MemoryError | OSError | AlasaError):
        for sign, advice in ADVICE.items():
            if sign in message:
                return f"{advice}: {message[:300]}"
    if isinstance(error, AlasaError | OSError):
        return message
    return None


def tune_process() -> None:
    """Set what suits a script's process, and is not a library's to set."""
    # glibc returns large buffers to the kernel and faults them in anew at each step, unless
    # it is told to map none and to trim nothing: up to a fifth faster, for as much memory.
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h
    with contextlib.suppress(AttributeError, TypeError):  # no other libc has mallopt
        ctypes.CDLL(None).mallopt(M_MMAP_MAX, 0)
        ctypes.CDLL(None).mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    # Weights that die out become so small that a processor takes 25 times as long for them.
    torch.set_flush_denormal(True)
    gc.freeze()  # else each collection copies the memory that forked workers share
    os.environ["MPLBACKEND"] = "agg"  # a notebook's may not be installed
    pd.options.mode.string_storage = "python"  # Arrow cannot hold every file name
    # Pillow warns of damaged metadata, Matplotlib of letters that its font lacks.
    warnings.filterwarnings("ignore", module="PIL")
    warnings.filterwarnings("ignore", message="Glyph .* missing")
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # the caller closed it
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has it not
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")


@contextlib.contextmanager
def as_script(advice: str = "") -> Iterator[None]:
    """Tune the process, and end it: a fault that the user can mend is told in one line,
    and Ctrl-C with an advice.

    The exit code is 2 for such a fault, 130 for Ctrl-C, else that of sys.exit, or 0.
    """
    tune_process()
    code = 0
    try:
        yield
    except SystemExit as stop:
        code = stop.code or 0
    except KeyboardInterrupt:
        print(f"interrupted{advice}", file=sys.stderr)
        code = 130
    except Exception as error:
        line = one_line(error)
        if line is None:
            raise
        print("error:", line, file=sys.stderr)
        code = 2
    if "IPython" in sys.modules:  # %run: the notebook's process goes on
        sys.exit(code)
    for worker in multiprocessing.active_children():
        worker.kill()  # else it would live on for seconds, and hold the pipes
    with contextlib.suppress(OSError):  # a pipe whose reader has gone
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)  # all is written, and torch takes a second to tear itself down
