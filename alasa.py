"""The parts of a fine-tuned image classifier; train.py and predict.py put them together.

Made for steganalysis, where the signal is a change of pixels by one grey level, so that
nothing here rounds, resizes or replaces a pixel unasked; right for any other images too.
Read it from top to bottom, in the order of the work: errors, several processes, seeds, rows,
images, batches, the model, one epoch, scores, files, and what a script does to its process.
"""

import contextlib
import copy
import ctypes
import gc
import hashlib
import io
import itertools
import math
import os
import pickle
import random
import signal
import sys
import time
import warnings
import zipfile
from argparse import ArgumentTypeError
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
import torchvision
from matplotlib.figure import Figure
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of RGB in 0..1
IMAGENET_STD = (0.229, 0.224, 0.225)
IMAGE_EXTENSIONS = (*IMG_EXTENSIONS, ".gif", ".jfif", ".jp2", ".avif")
# The least and the largest share of an image that a random crop shows.  torchvision's own
# 0.08 is for hundreds of epochs: in ten, what it shows is too often beside the point.
CROP_AREA = (0.35, 1)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Below this many pixels a side, a stride meets features of one pixel, and there oneDNN (in
# torch 2.6 to 2.14) leaves gradients of weights in bfloat16 uninitialised.
LEAST_BF16_SIZE = 32
# How many views of `d4_view` each augmentation of `make_transform` shows.
VIEWS = {"none": 1, "flip": 2, "crop": 2, "d4": 8}
# The column of the log that each choice of --monitor looks at.
MONITORS = {"auc": "auc", "wauc": "wauc", "accuracy": "valid_accuracy"}
# Images [B, 3, H, W], and beside them labels [B] or errors.
Batches = Collection[tuple[Tensor, Tensor | list]]


# ---------------------------------------------------------------- errors


class AlasaError(Exception):
    """A fault that the user can mend, told in one line."""


@contextlib.contextmanager
def explain(what: str) -> Iterator[None]:
    """Raise what a library raises of bad input within as an AlasaError: "<what>: <why>"."""
    try:
        yield
    except Exception as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise AlasaError(f"{what}: {why[:300]}") from error


def refuse(rows: pd.DataFrame, what: str, advice: str) -> None:
    """Raise AlasaError if there are any rows, with the first three of them."""
    if not rows.empty:
        shown = []
        for place, row in rows.head(3).iterrows():
            shown.append(f"{place}: {row['path']!r}, {row['label']!r}")
        count = f"{len(rows)} rows: " if len(rows) > 3 else ""
        raise AlasaError(f"{what}: {count}{'; '.join(shown)}; {advice}")


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


def gather_batches(mine: list) -> list:
    """Return the results of all batches in order, which were dealt to the processes in turn:
    [[0, 2, 4], [1, 3]] gives [0, 1, 2, 3, 4]."""
    parts = [mine] * get_world_size()
    if len(parts) > 1:
        dist.all_gather_object(parts, mine)
    rounds = itertools.zip_longest(*parts)
    return [result for dealt in rounds for result in dealt if result is not None]


def start_process(name: str) -> torch.device:
    """Return the device to work on; under torchrun, join the other processes."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and dist.is_torchelastic_launched():
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    with explain(f"--device {name}"):
        device = torch.empty(0, device=name).device  # fails if there is no such device
        if device.type == "cuda":
            torch.cuda.set_device(device)
    # Not by WORLD_SIZE: one left over in the environment would make this wait for ever.
    if dist.is_torchelastic_launched() and not dist.is_initialized():
        dist.init_process_group()
    return device


# ---------------------------------------------------------------- seeds


def stable_hash(*key: object) -> int:
    """Return 64 bits that depend on the key alone, in any process and at any time.

    As a seed: a resumed run, which knows (seed, epoch), draws the same, so that no state of
    a random generator is ever saved.
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    return int.from_bytes(digest[:8], "big")


def seed_everything(seed: int) -> None:
    """Seed random, numpy and torch, and choose deterministic kernels.  Torch warns where
    CUDA has none: the pooling of vgg and alexnet."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or cuBLAS may differ
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # only costs time here
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = False  # would round images to 10 bits of mantissa


# ---------------------------------------------------------------- rows


def read_rows(
    source: str,
    image_column: str = "image",
    label_column: str = "label",
    image_root: str | None = None,
    needs_labels: bool = False,
) -> pd.DataFrame:
    """Return the rows of a CSV or of a folder as text: `image`, `path`, `label` if it has any.

    A CSV's relative images start at `image_root`, by default the CSV's folder.  The index
    says where a row stands: "train.csv row 1".
    """
    if os.path.isdir(source):
        return read_folder(source, needs_labels)
    with explain(f"{source}: cannot be read as a CSV in UTF-8"):
        table = pd.read_csv(
            source,
            dtype=str,
            keep_default_na=False,  # "NA" is a label
            skipinitialspace=True,
            encoding="utf-8-sig",
        )
        if not table.index.equals(pd.RangeIndex(len(table))):  # an index of first cells
            raise ValueError("a row has more cells than the first line")
    table = table.fillna("").rename(columns=str.strip)  # "": what a short row lacks
    table = table[(table != "").any(axis=1)]  # spreadsheets end in empty rows
    needed = [image_column, label_column] if needs_labels else [image_column]
    lacking = [column for column in needed if column not in table]
    if lacking:
        lacks = (
            f"no {lacking[0]!r} among the columns of its first line, {list(table)[:3]}"
        )
        raise AlasaError(f"{source}: {lacks}; give --image-column and --label-column")
    if table.empty:
        raise AlasaError(f"{source}: has no rows")
    frame = pd.DataFrame({"image": table[image_column].str.strip()})
    root = os.path.dirname(source) if image_root is None else image_root
    with_slashes = frame["image"].str.replace("\\", "/", regex=False)  # as of Windows
    paths = [os.path.join(root, image) for image in with_slashes]
    frame["path"] = [os.path.normpath(path) for path in paths]
    if label_column in table:
        frame["label"] = table[label_column].str.strip()
    frame.index = [f"{source} row {index + 1}" for index in frame.index]
    return frame


def read_folder(folder: str, needs_labels: bool = False) -> pd.DataFrame:
    """Return the images of a folder, sorted, as `read_rows` does; skip hidden files.  The
    label, at any depth, is the topmost folder below this one, as in torchvision's ImageFolder.
    """
    images, others = [], []
    for parent, folders, files in os.walk(os.path.normpath(folder), followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if "last.pt" in files:
            continue  # a run of train.py
        for name in sorted(name for name in files if not name.startswith(".")):
            is_image = name.lower().endswith(IMAGE_EXTENSIONS)
            kind = images if is_image else others
            kind.append(os.path.join(parent, name))
    if others:
        print0(f"left out, as no images: {len(others)} files, first {others[0]}")
    if not images:
        raise AlasaError(f"{folder}: has no images")
    names = [os.path.relpath(path, folder) for path in images]
    labels = [os.path.dirname(name).split(os.sep)[0] for name in names]
    frame = pd.DataFrame({"image": names, "path": images}, index=[folder] * len(images))
    if any(labels):
        frame["label"] = labels
    elif needs_labels:
        raise AlasaError(f"{folder}: has no folders named for classes, only images")
    return frame


def find_classes(labels: Iterable[str]) -> list[str]:
    """Return the distinct labels, sorted; as numbers if all are integers."""
    classes = sorted(set(labels))  # as text, so that "1" and "01" have an order
    try:
        return sorted(classes, key=int)
    except ValueError:
        return classes


def check_rows(frame: pd.DataFrame) -> None:
    """Raise AlasaError if a row has no label, or no image, or if two contradict."""
    missing = ~frame["path"].map(os.path.isfile)
    refuse(frame[missing], "not a file", "give --image-root, and file endings")
    refuse(frame[frame["label"] == ""], "no label", "give it one, or leave it out")
    labels_of_image = frame.groupby("path")["label"].transform("nunique")
    several = frame[labels_of_image > 1].sort_values("path", kind="stable")
    refuse(several, "one image has several labels", "keep one of them")


def check_splits(train: pd.DataFrame, valid: pd.DataFrame, monitor="auc") -> list[str]:
    """Return the classes in order, the first is the negative one; AlasaError if a row is
    wrong, an image is in both splits, or the monitored score would be undefined."""
    check_rows(train)
    check_rows(valid)
    classes = find_classes(train["label"])
    if len(classes) == 1:
        raise AlasaError(f"training has one class only: {classes[0]!r}")
    unknown = valid[~valid["label"].isin(classes)]
    refuse(unknown, "no training image has the label", f"training has {classes[:3]}")
    trained_on = train["path"].map(os.path.abspath)
    in_both = valid[valid["path"].map(os.path.abspath).isin(trained_on)]
    refuse(in_both, "a training image too", "keep it in one of the splits")
    absent = find_classes(set(classes) - set(valid["label"]))
    if absent and monitor != "accuracy":
        what = f"no validation image is {absent[0]!r}: the AUC is undefined"
        raise AlasaError(f"{what}; --monitor accuracy does not need it")
    return classes


def hold_out(
    frame: pd.DataFrame, share: float, seed: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the rows to train on, and a random share of each class to validate on: at least
    one image of a class that has two names, and never all of it.

    Files of one name stay together, such as a cover and its stego versions.
    """
    total = Counter(frame["label"])
    splits = {"train", "training", "val", "valid", "validation", "test", "testing"}
    if len(splits & {label.lower() for label in total}) > 1:
        what = f"{frame.index[0]}: {sorted(total)} are splits, not classes"
        raise AlasaError(f"{what}; give --train-csv one, --valid-csv another")
    names = frame["path"].map(os.path.basename)
    labels_of_name = frame["label"].groupby(names).agg(list)
    held, held_names = Counter(), set()
    for name in sorted(labels_of_name.index, key=partial(stable_hash, "held", seed)):
        counts = Counter(labels_of_name[name])
        wanted = any(held[label] < share * total[label] for label in counts)
        spared = all(held[label] + counts[label] < total[label] for label in counts)
        if wanted and spared:
            held.update(counts)
            held_names.add(name)
    if not held:
        raise AlasaError("no label has files of two names; give --valid-csv")
    is_held = names.isin(held_names)
    return frame[~is_held], frame[is_held]


# ---------------------------------------------------------------- images


def read_image(path: str, image_size: int = 0) -> Image.Image:
    """Decode an image's first frame or page, upright, as 8-bit RGB.

    If it will be resized to `image_size` pixels, a large JPEG is decoded at a half, a quarter
    or an eighth, while both sides keep twice as many: a photo of 12 megapixels takes a fourth
    of the time.  AlasaError if it cannot be decoded whole, or if a PNG's checksum is wrong.
    """
    with explain(f"{path}: cannot be read"):  # the drive's fault, not the image's
        data = io.BytesIO(Path(path).read_bytes())
    with explain(f"{path}: not a readable image"):
        try:
            image = Image.open(data)
        except UnidentifiedImageError:
            raise ValueError(f"it starts with {data.getvalue()[:20]}") from None
        if image_size > 0:
            image.draft(None, (2 * image_size, 2 * image_size))
        if image.format == "PNG":
            image.verify()  # the checksums, which decoding does not look at
            image = Image.open(data)
        image.load()  # before `turn_upright`, to which damage is no fault
        return to_rgb(turn_upright(image))


def turn_upright(image: Image.Image) -> Image.Image:
    """Return an image as its EXIF orientation says; as it is, if EXIF cannot be read."""
    try:
        image.getexif()
    except Exception:  # noqa: BLE001 - of many kinds, as EXIF is damaged in many ways
        return image
    image.info.pop("exif", None)  # to be written anew, it would fail of an odd tag
    return ImageOps.exif_transpose(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an image of any mode as 8-bit RGB: 16-bit grey levels divided by 257,
    transparency laid over white, unless all is transparent."""
    if image.mode.startswith("I;16"):  # Pillow's own conversion clips at 255
        grey = (np.asarray(image) / 257).round().astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError("its grey levels are of 32 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema() != (0, 0):
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def d4_view(image: Tensor, view: int) -> Tensor:
    """Return [..., H, W] as one of the square's eight symmetries shows it: 0 as it is, 1
    mirrored.  Views 4-7 of an image that is not square are 0-3 again, which keep its shape.
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


def make_transform(image_size: int = 0, augment: str = "none") -> v2.Compose:
    """Return what turns a PIL image into uint8 [3, size, size], at native size if 0.
    `augment`, one of VIEWS, is drawn at random; "crop" is a random resized crop, mirrored or
    not."""
    steps = [v2.PILToTensor()]  # first, as torch resizes faster than Pillow
    if augment == "crop":
        if image_size == 0:
            raise AlasaError("--augment crop needs an --image-size; or give d4")
        steps.append(v2.RandomResizedCrop(image_size, scale=CROP_AREA))
    elif image_size > 0:
        steps.append(centre_square)  # first, or a thin image would become a huge one
        steps.append(v2.Resize([image_size, image_size]))
    if augment != "none":
        views = [partial(d4_view, view=view) for view in range(VIEWS[augment])]
        steps.append(v2.RandomChoice(views))
    return v2.Compose(steps)


# ---------------------------------------------------------------- batches


class AlasaDataset(Dataset):
    """The images that a frame lists: (image, label) pairs, or images only to "test".

    The frame is `read_rows`'s, or has images alone, with class indices for labels.
    `transform` takes an RGB PIL image and returns [3, H, W]: uint8, or floats that are
    normalised already.  If it resizes, give `image_size` too: see `read_image`.  By default
    images keep their size, and training sees them in a random view of D4.

    An index is a row, or a (row, seed) of `Draws`: then what the transform draws from torch
    depends on the seed alone, and on no worker or earlier epoch.
    """

    def __init__(self, frame: pd.DataFrame, split: str, transform=None, image_size=0):
        if transform is None:
            augment = "d4" if split == "train" else "none"
            transform = make_transform(image_size, augment)
        self.transform = transform
        self.image_size = image_size
        self.places = frame.index.tolist()
        self.paths = frame["path" if "path" in frame else "image"].tolist()
        self.labels = None if split == "test" else frame["label"].tolist()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int | tuple[int, int]) -> Tensor | tuple[Tensor, int]:
        row, seed = index if isinstance(index, tuple) else (index, None)
        with explain(self.places[row]):
            image = read_image(self.paths[row], self.image_size)
        with torch.random.fork_rng(devices=[], enabled=seed is not None):
            if seed is not None:
                torch.default_generator.manual_seed(seed)  # the CPU's alone
            image = self.transform(image)
        if self.labels is None:
            return image
        return image, self.labels[row]


class TolerantDataset(AlasaDataset):
    """The images of a "test" split: pairs (image, ""), or (None, why it cannot be read)."""

    def __getitem__(self, index: int) -> tuple[Tensor | None, str]:
        try:
            return super().__getitem__(index), ""
        except AlasaError as error:
            return None, str(error)


class Draws(Sampler):
    """This process's share of a random order of the rows, as (row, seed) pairs.

    They depend on (seed, epoch) alone; set `epoch` before each pass.  With `balance`, every
    class is drawn as often, and a row that is drawn twice has two seeds.
    """

    def __init__(self, labels: list[int], seed: int, balance: bool = False):
        self.labels = torch.tensor(labels)
        self.seed = seed
        self.balance = balance
        self.epoch = 1

    def __len__(self) -> int:
        return len(self.labels) // get_world_size()

    def __iter__(self) -> Iterator[tuple[int, int]]:
        count, world = len(self.labels), get_world_size()
        generator = torch.Generator()
        generator.manual_seed(stable_hash("order", self.seed, self.epoch))
        rows = torch.randperm(count, generator=generator)
        if self.balance:
            weights = (1 / self.labels.bincount())[self.labels]
            rows = torch.multinomial(
                weights, count, replacement=True, generator=generator
            )
        seeds = torch.randint(2**63 - 1, (count,), generator=generator)
        mine = slice(get_rank(), len(self) * world, world)  # all have equally many
        return iter(zip(rows[mine].tolist(), seeds[mine].tolist()))


def collate_tolerant(samples: list[tuple]) -> tuple[Tensor, list[str]]:
    """Return the images that could be read [B, 3, H, W], and of each sample its error or ""."""
    images = [image for image, _ in samples if image is not None]
    errors = [error for _, error in samples]
    stack = torch.utils.data.default_collate
    return stack(images) if images else torch.empty(0), errors


def trust_images() -> None:
    """Let Pillow read scans of up to 1,000 megapixels, and not warn of damaged metadata."""
    Image.MAX_IMAGE_PIXELS = 500_000_000  # it refuses twice as many
    warnings.filterwarnings("ignore", module="PIL")


def start_worker(_: int, gives_way: bool) -> None:
    """Ignore Ctrl-C, which the main process handles.  If it gives way, decode when the model
    leaves processors idle: else each thread of the model would wait for the one whose
    processor it takes, twice as long as it works."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    trust_images()
    if gives_way and hasattr(os, "nice"):  # Windows has none
        os.nice(19)


def count_workers() -> int:
    """Return how many workers decode the images of each split; a GPU can use more."""
    processors = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):  # a container may have fewer than the machine
        processors = len(os.sched_getaffinity(0))
    processors //= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # of torchrun
    if torch.cuda.is_available():
        return min(16, max(0, processors - 1))
    return min(8, processors)


def make_loader(
    data: AlasaDataset,
    batch_size: int,
    draws: Draws | None = None,
    workers: int = 0,
    for_gpu: bool = False,
) -> DataLoader:
    """Return the batches of this process, for a model on the CPU or on a GPU.

    With draws, to train: its share of each batch.  Else: every world-th batch, whole, as the
    size of a batch moves the last bits of its logits, which are to be the same for any
    number of processes.
    """
    if draws is None:
        batches = list(BatchSampler(range(len(data)), batch_size, drop_last=False))
        batches = batches[get_rank() :: get_world_size()]
    else:
        share = batch_size // get_world_size()
        # Batch normalisation cannot train on one image: a last batch of one is left out.
        batches = BatchSampler(draws, share, drop_last=len(draws) % share == 1)
    return DataLoader(
        data,
        batch_sampler=batches,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=for_gpu,
        collate_fn=collate_tolerant if isinstance(data, TolerantDataset) else None,
        worker_init_fn=partial(start_worker, gives_way=not for_gpu),
        generator=torch.Generator(),  # else each pass would draw from the global one
    )


def show_progress(what: str, step: int, steps: int, began: float) -> None:
    """Say on a terminal how far a pass is, and how long it still takes, by time.monotonic."""
    if sys.stderr.isatty() and get_rank() == 0:
        seconds_left = (time.monotonic() - began) / step * (steps - step)
        line = f"{what} {step}/{steps}, {seconds_left:.0f} s left"
        if step == steps:
            line = ""
        print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)


# ---------------------------------------------------------------- the model


def normalise(images: Tensor, mean=IMAGENET_MEAN, std=IMAGENET_STD) -> Tensor:
    """Scale uint8 [B, 3, H, W] to float32 of that mean and std; floats stay as they are."""
    if images.is_floating_point():
        return images
    means = torch.tensor(mean, device=images.device).view(3, 1, 1) * 255
    stds = torch.tensor(std, device=images.device).view(3, 1, 1) * 255
    images = images.to(torch.float32, memory_format=torch.channels_last)
    return images.sub_(means).div_(stds)  # in place: five times faster


def choose_precision(name: str, device: torch.device, image_size: int) -> str:
    """Return the precision; "auto" is what the hardware is made for."""
    is_tiny = device.type == "cpu" and 0 < image_size < LEAST_BF16_SIZE
    if name == "bf16" and is_tiny:
        raise AlasaError(f"--precision bf16 on a CPU needs {LEAST_BF16_SIZE} pixels")
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
        and not is_tiny
        and hasattr(torch.cpu, "get_capabilities")  # since torch 2.8
        and torch.cpu.get_capabilities().get("avx512_bf16")
    ):
        return "bf16"
    return "fp32"


class Classifier(nn.Module):
    """A torchvision network that takes images [B, 3, H, W] of uint8, or floats that are
    normalised already, computes in `precision`, and returns float32 logits [B, classes]."""

    def __init__(self, net: nn.Module, mean: list[float], std: list[float]):
        super().__init__()
        self.net = net
        self.mean = mean
        self.std = std
        self.precision = "fp32"  # one of DTYPES

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits; on a CPU, those of tiny images are computed in float32."""
        device = images.device.type
        dtype = DTYPES[self.precision]
        # Images of native size may be tiny, whatever `choose_precision` was told.
        is_tiny = device == "cpu" and min(images.shape[-2:]) < LEAST_BF16_SIZE
        in_16_bits = dtype != torch.float32 and not is_tiny
        images = normalise(images, self.mean, self.std)
        with torch.autocast(device, dtype, enabled=in_16_bits):
            return self.net(images).float()


class Float32Conv2d(nn.Conv2d):
    """A convolution that computes in float32 under autocast too; a depthwise one only in
    training."""

    def forward(self, images: Tensor) -> Tensor:
        """Return features [B, C, H, W], in autocast's type if it is on."""
        is_trained = torch.is_grad_enabled() and self.weight.requires_grad
        if self.groups > 1 and not is_trained:
            return super().forward(images)
        device = images.device.type
        with torch.autocast(device, enabled=False):
            features = super().forward(images.to(self.weight.dtype))
        if torch.is_autocast_enabled(device):
            # Going on in 16 bits: a quarter of the memory for 3 % of the time.
            features = features.to(torch.get_autocast_dtype(device))
        return features


def use_float32(net: nn.Module, device: torch.device) -> None:
    """Let the stem compute in float32, and on a CPU train the depthwise convolutions so.

    The stem, as hidden data change a pixel by one grey level, and rounding to bfloat16 by up
    to 0.45.  The others, as their gradients in bfloat16 take several times as long.
    """
    convolutions = [layer for layer in net.modules() if isinstance(layer, nn.Conv2d)]
    for layer in convolutions:
        is_depthwise = layer.groups == layer.in_channels > 1
        if layer is convolutions[0] or (is_depthwise and device.type == "cpu"):
            layer.__class__ = Float32Conv2d  # same weights, same names, another forward


def input_preset(arch: str, weights: str):
    """Return how torchvision prepares images for these weights, by default for those of the
    architecture: mean, std, crop_size.  AlasaError unless it is a classifier with one head.
    """
    several_heads = ["googlenet", "inception_v3"]
    archs = torchvision.models.list_models(torchvision.models, exclude=several_heads)
    if arch not in archs:
        raise AlasaError(f"--arch {arch} is not supported; choose from {archs}")
    known = torchvision.models.get_model_weights(arch).__members__
    return known.get(weights, known["DEFAULT"]).transforms()


def build_model(
    arch: str,
    num_classes: int,
    weights: str = "DEFAULT",
    full_res_stem: bool = False,
    class_names: list[str] | None = None,
    device: str | torch.device = "cpu",
) -> Classifier:
    """Return a classifier with pretrained weights and a new last layer, in evaluation mode.

    `weights` is a name of torchvision's, a file, or "none".  A last layer of the right shape
    is kept if its classes are `class_names`, or if a file does not tell them.
    `full_res_stem` is `keep_stem_resolution`.
    """
    preset = input_preset(arch, weights)
    net = torchvision.models.get_model(arch, num_classes=num_classes)
    if full_res_stem:
        keep_stem_resolution(net)
    if weights != "none":
        state, trained_classes = load_pretrained(arch, weights)
        same_classes = trained_classes is None or trained_classes == class_names
        with explain(f"--weights {weights}, --arch {arch}"):
            load_state(net, state, same_classes)
    use_float32(net, torch.device(device))
    net = net.to(device, memory_format=torch.channels_last)
    return Classifier(net, list(preset.mean), list(preset.std)).eval()


def keep_stem_resolution(net: nn.Module) -> None:
    """Set the stride of the first convolution, and of pooling right behind it, from 2 to 1,
    so that the stem keeps every pixel; AlasaError if it is not 2."""
    kinds = nn.Conv2d | nn.MaxPool2d
    layers = [layer for layer in net.modules() if isinstance(layer, kinds)]
    if layers[0].stride != (2, 2):
        raise AlasaError("--full-res-stem: this architecture has no stem of stride 2")
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


def load_tensors(path: str) -> dict:
    """Read a file of torch.save; an error if it is damaged, or holds more than tensors and
    plain values, which could run code."""
    if zipfile.is_zipfile(path):
        damaged = zipfile.ZipFile(path).testzip()  # torch.load checks no CRC
        if damaged:
            raise ValueError(f"{damaged} is damaged")
    return torch.load(path, map_location="cpu", weights_only=True)


def load_pretrained(arch: str, weights: str) -> tuple[dict, list[str] | None]:
    """Return the state dict of torchvision's weights of that name, or of a file: a checkpoint
    of train.py, or a state dict; and the classes that it was trained on, if they are known.
    """
    known = torchvision.models.get_model_weights(arch).__members__
    if weights in known:
        cache = f"{torch.hub.get_dir()}/checkpoints, or give --weights FILE or none"
        with explain(f"cannot load {known[weights].url}; put it into {cache}"):
            model = torchvision.models.get_model(arch, weights=weights)
        return model.state_dict(), known[weights].meta["categories"]
    with explain(f"--weights {weights}: not a file of weights, nor of {list(known)}"):
        try:
            content = load_tensors(weights)
        except pickle.UnpicklingError:
            what = "it holds more than tensors: save model.state_dict() alone"
            raise AlasaError(what) from None
        trained_arch = content.get("args", {}).get("arch", arch)
        if trained_arch != arch:
            raise AlasaError(f"it is of --arch {trained_arch}")
        # A checkpoint of train.py, one of another program, or a state dict itself.
        state = content.get("model", content.get("state_dict", content))
        nn.modules.utils.consume_prefix_in_state_dict_if_present(state, "module.")
        return state, content.get("classes")


def load_state(net: nn.Module, state: dict[str, Tensor], same_classes: bool) -> None:
    """Load a state dict, whose last layer gives way to the network's if it does not fit."""
    name = find_head(net)
    head = net.get_submodule(name)
    weight = state.get(f"{name}.weight", torch.empty(0))
    if same_classes and weight.shape == head.weight.shape:
        print0(f"kept the last layer of the weights, {name}")
    else:
        print0(f"the last layer, {name}, is new")
        state |= head.state_dict(prefix=f"{name}.")  # so that loading is strict
    net.load_state_dict(state)


def restore_model(checkpoint: dict, device: str | torch.device = "cpu") -> Classifier:
    """Return the model of a checkpoint of train.py, in evaluation mode."""
    args, classes = checkpoint["args"], checkpoint["classes"]
    model = build_model(
        args["arch"], len(classes), "none", args["full_res_stem"], device=device
    )
    model.net.load_state_dict(checkpoint["model"])
    model.mean, model.std = checkpoint["mean"], checkpoint["std"]
    return model


# ---------------------------------------------------------------- one epoch


def set_training_mode(model: nn.Module, keep_batch_norm: bool) -> None:
    """Put a model into training mode, except what keeps its statistics: all of it where the
    head alone is trained, so that nothing is dropped out either, and all batch normalisation
    if `keep_batch_norm`."""
    first_parameter = next(model.parameters())  # the head's is the last
    model.train(first_parameter.requires_grad)
    if keep_batch_norm:
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.eval()


def train_one_epoch(
    model: nn.Module,
    batches: Batches,
    criterion,
    optimizer: torch.optim.Optimizer,
    scheduler=None,
    scaler: torch.amp.GradScaler | None = None,
    keep_batch_norm: bool = False,
    name: str = "training",
) -> dict[str, float]:
    """Train on every batch once; return train_loss and train_accuracy.

    Both are of all images at once, as in `evaluate`, each seen before its step's update.
    `batches` has a length.  `scheduler` steps with each batch; `scaler` is for fp16; `name`,
    for messages.  AlasaError if the loss of a batch is not finite.
    """
    device = next(model.parameters()).device
    scaler = scaler or torch.amp.GradScaler(device.type, enabled=False)
    set_training_mode(model, keep_batch_norm)
    if isinstance(criterion, nn.Module):
        criterion.train()
    if dist.is_initialized():
        # Anew in each epoch: it groups gradients by what is frozen, and after its first
        # step in another way, which a resumed run would not know.
        model = nn.parallel.DistributedDataParallel(model)
    all_logits, all_labels = [], []
    began = time.monotonic()
    for step, (images, labels) in enumerate(batches, start=1):
        labels = labels.to(device, non_blocking=True)
        logits = model(images.to(device, non_blocking=True))
        batch_loss = criterion(logits, labels)
        if not batch_loss.isfinite():
            raise AlasaError(f"{name}, batch {step}: the loss became {batch_loss:g}")
        optimizer.zero_grad()
        scaler.scale(batch_loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if scheduler is not None:
            scheduler.step()
        all_logits.append(logits.detach().cpu())
        all_labels.append(labels.cpu().clone())  # a worker's tensor holds a file open
        show_progress(f"{name}, loss {batch_loss:.4f}", step, len(batches), began)
    if dist.is_initialized():
        for buffer in model.buffers():  # batch statistics, of each process its own
            dist.broadcast(buffer, src=0)
    epoch_logits = torch.cat(gather_batches(all_logits))
    epoch_labels = torch.cat(gather_batches(all_labels))
    loss = total_loss(criterion, epoch_logits, epoch_labels, device)
    accuracy = (epoch_logits.argmax(1) == epoch_labels).double().mean().item()
    return {"train_loss": loss, "train_accuracy": accuracy}


@torch.no_grad()
def total_loss(criterion, logits: Tensor, labels: Tensor, device) -> float:
    """Return the criterion, out of training mode, of all logits [N, classes] at once."""
    if isinstance(criterion, nn.Module):
        criterion.eval()
    return criterion(logits.to(device), labels.to(device)).item()


@torch.inference_mode()
def infer(model: nn.Module, batches: Batches, views: int = 1) -> tuple[Tensor, list]:
    """Return the logits of all images in order, over all processes: float32 [N, classes],
    and of each batch its extras, which stood beside the images: labels, or errors.

    The logits are the mean over the first `views` of `d4_view`: test-time augmentation.
    """
    device = next(model.parameters()).device
    model.eval()
    all_logits, all_extras = [], []
    began = time.monotonic()
    for step, (images, extras) in enumerate(batches, start=1):
        all_extras.append(copy.deepcopy(extras))  # a worker's tensor holds a file open
        batch_logits = torch.empty(0)  # of no image: it keeps the batch's place
        if len(images) > 0:
            images = images.to(device, non_blocking=True)
            seen = [model(d4_view(images, view)) for view in range(views)]
            batch_logits = torch.stack(seen).mean(dim=0).cpu()
        all_logits.append(batch_logits)
        show_progress("evaluation", step, len(batches), began)
    return torch.cat(gather_batches(all_logits)), gather_batches(all_extras)


def evaluate(model: nn.Module, batches: Batches, criterion) -> dict[str, float]:
    """Return valid_loss, valid_accuracy, auc and wauc of labelled images."""
    logits, batch_labels = infer(model, batches)
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
    """Return the number of the epoch with the highest finite score, 0 if there is none; of
    ties, as a score of ranks is soon at its highest, that with the lowest validation loss."""
    column = MONITORS[monitor]
    finite = [row for row in history if math.isfinite(row[column])]
    finite.sort(key=lambda row: (-row[column], row["valid_loss"]))
    return finite[0]["epoch"] if finite else 0


# ---------------------------------------------------------------- files


@contextlib.contextmanager
def atomic_write(path: str) -> Iterator[io.BufferedWriter]:
    """Open a file that replaces `path` once it is whole, or not at all, even if the disk is
    full or the power fails."""
    part = Path(f"{path}.part")
    if os.path.exists(path) and not os.path.isfile(path):
        raise AlasaError(f"{path}: cannot be written: not a file")  # /dev/null, say
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:
        # torch.save raises a RuntimeError in place of what happened.
        cause = error.__context__ or error
        if isinstance(cause, KeyboardInterrupt):
            raise cause from None
        raise AlasaError(f"{path}: cannot be written: {cause}") from error
    finally:
        part.unlink(missing_ok=True)


def load_checkpoint(path: str) -> dict:
    """Read a checkpoint of train.py; AlasaError if it is damaged or not one."""
    with explain(f"{path}: not a checkpoint of train.py"):
        checkpoint = load_tensors(path)
        if not {"model", "classes", "args", "rows_hash"} <= checkpoint.keys():
            raise ValueError("it is of another program, or of an earlier version")
        return checkpoint


def draw_images(figure: Figure, columns: int, images: list, titles: list[str]) -> None:
    """Show images [H, W, 3] with their titles in rows of so many."""
    rows = math.ceil(len(images) / columns)
    for place, (image, title) in enumerate(zip(images, titles), start=1):
        axes = figure.add_subplot(rows, columns, place)
        axes.imshow(image)
        axes.set_title(title, fontsize=8, parse_math=False)
        axes.set_axis_off()


# ---------------------------------------------------------------- scripts


def in_range(kind: type, least: float, most: float = math.inf):
    """Return the `type` of an argparse flag that is an int or a float within a range."""

    def number(text: str) -> float:
        """Return the number; argparse tells its user of a ValueError in one line."""
        value = kind(text)
        if not least <= value <= most:  # true of NaN too
            raise ArgumentTypeError(f"{text} is not in {least}..{most}")
        return value

    return number


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
    trust_images()
    warnings.filterwarnings(
        "ignore", message="Glyph .* missing"
    )  # of Matplotlib's font


SEVERAL_SIZES = "give --image-size, or to predict --batch-size 1"
# What to do, by a part of the message.
ADVICE = {
    "out of memory": "give a lower --batch-size or --image-size",
    "stack expects each tensor": SEVERAL_SIZES,
    "storage that is not resizable": SEVERAL_SIZES,  # as a worker may say instead
    "can't allocate memory": "give a lower --batch-size or --image-size",
    "DataLoader worker (pid": "a worker was lost: try --workers 0",
    "file </torch_": "no room for shared memory: try --workers 0",
    "not a readable image": "--check-images lists all such images",
    "the loss became": "lower --lr and --head-lr",
}


@contextlib.contextmanager
def as_script(advice: str = "") -> Iterator[None]:
    """Tune the process; tell in one line what the user can mend, with exit code 2, and of
    Ctrl-C with an advice, with 130."""
    tune_process()
    try:
        yield
    except KeyboardInterrupt:
        print(f"interrupted{advice}", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        text = str(error)
        advices = [what_to_do for sign, what_to_do in ADVICE.items() if sign in text]
        if not advices and not isinstance(error, AlasaError | OSError):
            raise  # a bug keeps its traceback
        # A worker's error is a traceback, and in its last line "alasa.AlasaError: ...".
        message = text.strip().rsplit("\n", 1)[-1].removeprefix("alasa.AlasaError: ")
        print("error:", "; ".join([message, *advices]), file=sys.stderr)
        sys.exit(2)
