"""Fine-tune a pretrained torchvision classifier on the images that two CSV files list.

    python train.py --train-csv train.csv --valid-csv valid.csv
    python predict.py --checkpoint runs/best.pt --test-csv test.csv

Both scripts only parse flags.  The work is here, in the order in which it is done: seeds,
CSV rows, images, batches, the model, one epoch, scores, files, and the whole run: `fit`.
"""

from __future__ import annotations

import contextlib
import csv
import ctypes
import functools
import hashlib
import math
import os
import random
import shlex
import signal
import sys
import time
import zipfile
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pandas as pd
import PIL
import torch
import torch.distributed as dist
import torchvision
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, WeightedRandomSampler, default_collate
from torchvision.transforms import v2

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet, for RGB in 0..1
VIEWS = {
    "none": 1,
    "flip": 2,
    "crop": 2,
    "d4": 8,
}  # how many of `d4_view` each draws from
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
RUN_FILES = ("last.pt", "best.pt", "log.csv", "losses.png")
# A resumed run may change these flags: none moves a weight.  (The CSVs' contents count.)
FREE = {"train_csv", "valid_csv", "image_root", "check_images", "workers", "device"}
FREE |= {"epochs", "early_stop", "out", "resume", "overwrite"}
RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
FLOAT32 = contextlib.nullcontext()  # in place of autocast
say = functools.partial(print, flush=True) if RANK == 0 else lambda *_, **__: None

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else not deterministic
if sys.platform == "linux":
    # glibc returns large buffers to the kernel and faults them in anew at each step; with
    # M_MMAP_MAX=0 and M_TRIM_THRESHOLD=max it keeps them: a third faster on a CPU.
    with contextlib.suppress(AttributeError):  # musl has no mallopt
        ctypes.CDLL(None).mallopt(-4, 0), ctypes.CDLL(None).mallopt(-1, 2**31 - 1)


class AlasaError(Exception):
    """A fault that the user can mend, in one line: what, and what caused it."""

    def __init__(self, what: str, cause: Exception | None = None) -> None:
        why = getattr(cause, "strerror", None) or " ".join(str(cause).split())[:300]
        text = f"{what}: {why or type(cause).__name__}" if cause else what
        super().__init__(text.replace("\n", "\\n"))


def refuse(faults: Iterable[str]) -> None:
    """Raise AlasaError with the first ten faults and their number, if there are any."""
    if faults := list(dict.fromkeys(faults)):
        more = f"; ... ({len(faults)} in all)" if len(faults) > 10 else ""
        raise AlasaError("; ".join(faults[:10]) + more)


def derive_seed(*key: object) -> int:
    """Return 64 bits that depend on the key alone, so that no state has to be saved."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big")


def seed_everything(seed: int) -> None:
    """Seed random, numpy and torch; choose deterministic kernels, with a warning where
    CUDA has none (the pooling of vgg and alexnet).
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # only costs time here
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = False  # it would round pixels to 10 bits


def read_csv(
    path: str,
    columns: dict[str, str],
    root: str | None = None,
    needed: str = "image label",
) -> pd.DataFrame:
    """Return the named columns as text; {"id": "image", "target": "label"} renames them.

    Adds `path` (relative images start at `root`, by default the CSV's folder) and `place`,
    the row's name in messages.  AlasaError says what is wrong, and in which line.
    """
    try:  # pandas would guess types, lose line numbers, and pass rows of odd lengths
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            header = next(reader, [])
            rows = {f"{path} line {reader.line_num}": row for row in reader if row}
    except (OSError, ValueError, csv.Error) as error:
        raise AlasaError(f"{path}: not a readable CSV", error) from error
    odd = [p for p, row in rows.items() if len(row) != len(header)]
    refuse(f"{place}: {len(rows[place])} cells, not {len(header)}" for place in odd)
    table = pd.DataFrame(list(rows.values()), columns=header, dtype=object)
    frame = pd.DataFrame({"place": list(rows)}, dtype=object)
    for column, name in columns.items():
        if header.count(column) == 1:
            frame[name] = table[column]
        elif name in needed:
            raise AlasaError(f"{path}: needs one column {column!r}, has {header}")
        if name in needed:
            empty = frame["place"][frame[name].str.strip() == ""]
            refuse(f"{place}: the {name} is empty" for place in empty)
    refuse([] if rows else [f"{path}: has no rows"])
    root = os.path.dirname(path) if root is None else root
    return frame.assign(path=[os.path.join(root, image) for image in frame["image"]])


def check_splits(train: pd.DataFrame, valid: pd.DataFrame) -> list[str]:
    """Return the classes, integers in numerical order; the first is the negative one.

    AlasaError if images are missing, or if the validation AUC would be undefined or a lie.
    """
    try:
        classes = sorted(set(train["label"]), key=lambda label: (int(label), label))
    except ValueError:
        classes = sorted(set(train["label"]))
    if len(classes) < 2:
        raise AlasaError(
            f"every training label is {classes[0]!r}: two classes are needed"
        )
    unknown = valid[~valid["label"].isin(classes)]
    refuse(
        f"{p}: no training label is {x!r}"
        for p, x in unknown[["place", "label"]].values
    )
    absent = sorted(set(classes) - set(valid["label"]))
    refuse(f"no validation label is {x!r}: its AUC would be undefined" for x in absent)
    files = {}
    for frame in (train, valid):
        rows = frame[["place", "path"]].values.tolist()
        good = [os.path.isfile(path) and os.path.getsize(path) > 0 for _, path in rows]
        refuse(
            f"{p}: {f} is missing or empty" for (p, f), ok in zip(rows, good) if not ok
        )
        # Device and inode are the same however a file is spelled or linked.
        ids = [(os.stat(f).st_dev, os.stat(f).st_ino) for _, f in rows]
        both = [(row, files[i]) for row, i in zip(rows, ids) if i in files]
        refuse(f"{p}: {f} is a training image too, {first}" for (p, f), first in both)
        files = dict(zip(ids, frame["place"]))
    names = [set(map(os.path.basename, frame["path"])) for frame in (train, valid)]
    if n := len(names[0] & names[1]):
        say(
            f"warning: {n} file names are in both splits: the same scenes, leaking scores?"
        )
    return classes


def read_image(path: str) -> Image.Image:
    """Decode an image's first frame, upright, as 8-bit RGB; AlasaError if that fails.

    16-bit grey levels are divided by 257, transparency is laid over white.
    """
    try:
        Image.open(path).verify()  # a PNG's checksums, which decoding skips
        image = Image.open(path)
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode[0] in "IF":  # Pillow's own conversion clips at 255
            grey = np.asarray(image)
            if image.mode == "F" or grey.min() < 0 or grey.max() > 65535:
                raise ValueError("32-bit grey levels")
            image = Image.fromarray((grey / 257).round().astype(np.uint8))
        elif image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        return image.convert("RGB")
    except Exception as error:  # decoders raise nearly every kind there is
        raise AlasaError(f"{path}: not a readable image", error) from error


def d4_view(image: Tensor, view: int) -> Tensor:
    """Return [..., H, W] as one of the square's eight symmetries shows it.

    View 0 is the image, 1 its mirror image; of an image that is not square, views 4-7 are
    0-3 again, which keep its shape.
    """
    if view & 1:
        image = image.flip(-1)
    if view & 2:
        image = image.flip(-2)
    square = image.shape[-1] == image.shape[-2]
    return image.transpose(-2, -1) if view & 4 and square else image


def random_view(image: Tensor, views: int) -> Tensor:
    """Return one of the first `views` views of [..., H, W]."""
    return d4_view(image, int(torch.randint(views, ())))


def make_transform(
    split: str, size: int | None = None, augment: str = "d4"
) -> v2.Compose:
    """Return what turns a PIL image into uint8 [3, H, W]; random for "train" alone."""
    augment = augment if split == "train" else "none"
    if augment == "crop" and not size:
        raise AlasaError("--augment crop needs --image-size")
    resize = [v2.Resize(size), v2.CenterCrop(size)] if size else []
    crop = [v2.RandomResizedCrop(size)] if augment == "crop" else resize
    view = functools.partial(random_view, views=VIEWS[augment])
    return v2.Compose([*crop, v2.PILToTensor(), view])


class AlasaDataset(Dataset):
    """The images that a frame lists: (image, label), or only the image if split is "test".

    `frame` has the columns `image` or `path`, and `label`: class indices.  `transform`
    takes an RGB PIL image and returns [3, H, W]: uint8 pixels, or floats of its own scale.
    dataset[row] is one item; dataset[epoch, rows] is a batch, its randomness derived from
    (seed, epoch, row): rows that were read, images [B, 3, H, W], {other row: error}.
    """

    def __init__(
        self,
        frame: pd.DataFrame,
        split: str,
        transform: Callable | None = None,
        seed: int = 0,
    ) -> None:
        self.split, self.seed = split, seed
        self.paths = frame["path" if "path" in frame else "image"].tolist()
        self.places = frame["place" if "place" in frame else "image"].tolist()
        self.labels = None if split == "test" else torch.tensor(frame["label"].tolist())
        self.transform = transform or make_transform(split)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, key: int | tuple[int, list[int]]) -> tuple | Tensor:
        if isinstance(key, tuple):
            return self.read_batch(*key)
        image = self.transform(read_image(self.paths[key]))
        return image if self.split == "test" else (image, int(self.labels[key]))

    def read_batch(self, epoch: int, rows: list[int]) -> tuple[list[int], Tensor, dict]:
        """Return rows that were read, their images [B, 3, H, W], {other row: error}."""
        images, errors = {}, {}
        for row in rows:
            with torch.random.fork_rng(devices=[]):
                seed = derive_seed("image", self.seed, epoch, row)
                torch.default_generator.manual_seed(seed)
                try:
                    images[row] = self.transform(read_image(self.paths[row]))
                except AlasaError as error:
                    errors[row] = f"{self.places[row]}: {error}"
        sizes = {image.shape[:0:-1]: self.paths[row] for row, image in images.items()}
        if len(sizes) > 1:
            named = "; ".join(f"{path} is {w}x{h}" for (w, h), path in sizes.items())
            mixed = f"a batch needs one size (--image-size, --batch-size 1): {named}"
            errors |= dict.fromkeys(images, mixed)
        if len(sizes) != 1:
            return [], torch.empty(0), errors
        # Channels last, as decoded and as convolutions like it; in a worker default_collate
        # stacks straight into shared memory.
        stacked = default_collate([image.permute(1, 2, 0) for image in images.values()])
        return list(images), stacked.permute(0, 3, 1, 2), errors


def leave_to_main(worker: int) -> None:
    """In a worker, leave Ctrl-C and SIGTERM, which reach all processes, to the main one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # Faults go to the main process; this hook would only report that it has left.
    sys.excepthook = lambda *_: None


class Reader:
    """Reads a dataset by the batch, with worker processes, normalised on the device."""

    def __init__(
        self,
        dataset: AlasaDataset,
        batch_size: int,
        device: torch.device | str = "cpu",
        workers: int = 0,
        balance: bool = False,
    ) -> None:
        self.dataset, self.batch_size, self.device = dataset, batch_size, device
        self.balance, self.plan = balance, []
        options = {"num_workers": workers, "persistent_workers": workers > 0}
        options["worker_init_fn"] = leave_to_main
        options["pin_memory"] = torch.device(device).type == "cuda"
        # Without a generator each pass would draw its seed from the global one.
        options["generator"] = torch.Generator()
        self.loader = DataLoader(dataset, sampler=self.plan, batch_size=None, **options)
        # Read an empty plan: workers start now, while a process is cheap to copy.
        list(self.loader)

    def read(
        self, epoch: int = 0
    ) -> Iterator[tuple[list[int], Tensor, dict[int, str]]]:
        """Yield (rows, images, errors) of each batch of this process, with progress."""
        self.plan[:] = [(epoch, rows) for rows in self.batches(epoch)]
        watched = sys.stderr.isatty() and RANK == 0
        for step, (rows, images, errors) in enumerate(self.loader, 1):
            if watched:
                text = f"\r{self.dataset.split} {step}/{len(self.plan)} "
                print(text, end="", file=sys.stderr)
            yield rows, normalise(images.to(self.device, non_blocking=True)), errors
        if watched:
            print(end="\r\033[K", file=sys.stderr)

    def batches(self, epoch: int) -> list[list[int]]:
        """Return rows by the batch: in training a new order each epoch and, of each batch,
        this process's share; else in order, every so many whole batches: an image with
        the same neighbours gets the same bits, in any number of processes.
        """
        n, labels = len(self.dataset), self.dataset.labels
        if self.dataset.split != "train":
            batches = torch.arange(n).split(self.batch_size)[RANK::WORLD]
            return [rows.tolist() for rows in batches]
        key = derive_seed("order", self.dataset.seed, epoch)
        generator = torch.Generator().manual_seed(key)
        order = torch.randperm(n, generator=generator)
        if self.balance:
            weights = 1 / labels.bincount()[labels].double()
            drawn = WeightedRandomSampler(weights, n, generator=generator)
            order = torch.tensor(list(drawn))
        batches = order.split(self.batch_size)
        batches = [rows[: len(rows) // WORLD * WORLD] for rows in batches]
        # Batch normalisation cannot train on one image: a last batch of one is dropped.
        return [rows[RANK::WORLD].tolist() for rows in batches if len(rows) > WORLD]


def normalise(images: Tensor) -> Tensor:
    """Scale uint8 [B, 3, H, W] to ImageNet's float32; floats stay as they are."""
    if images.is_floating_point():
        return images
    mean, std = torch.tensor((MEAN, STD), device=images.device).view(2, 3, 1, 1) * 255
    return images.float().sub_(mean).div_(std)  # in place: five times faster


class Float32Conv2d(nn.Conv2d):
    """A convolution that computes in float32 under autocast too: bfloat16 would move a
    normalised pixel by up to 0.45 grey levels, and the data hidden in it move it by 1.
    """

    def forward(self, images: Tensor) -> Tensor:
        kind = images.device.type
        with torch.autocast(kind, enabled=False):
            features = super().forward(images.float())
        if torch.is_autocast_enabled(kind):  # half the memory for the layers behind
            features = features.to(torch.get_autocast_dtype(kind))
        return features


def build_model(
    arch: str, classes: int, weights="DEFAULT", freeze=False, full_res_stem=False
) -> nn.Module:
    """Return a torchvision classifier with pretrained weights and a new last layer.

    `weights` is a name of torchvision's, a file, or "none".  `freeze` leaves only the last
    layer trainable.  `full_res_stem` sets the stride of the first convolution, and of
    pooling right behind it, to 1, so that the stem keeps every pixel.
    """
    known = set(torchvision.models.list_models(module=torchvision.models))
    known -= {"googlenet", "inception_v3"}  # they have auxiliary heads
    if arch not in known:
        raise AlasaError(f"--arch {arch} is not supported; choose from {sorted(known)}")
    model = torchvision.models.get_model(arch, num_classes=classes)
    kinds = (nn.Conv2d, nn.MaxPool2d, nn.Linear)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, kinds)}
    (stem, second, *_), (name, head) = layers.values(), list(layers.items())[-1]
    if full_res_stem:
        if stem.stride != (2, 2):
            raise AlasaError(f"--full-res-stem: {arch} has no stem of stride 2")
        stem.stride = (1, 1)
        if isinstance(second, nn.MaxPool2d):
            second.stride = 1
    if weights != "none":
        new = {f"{name}.{key}": tensor for key, tensor in head.state_dict().items()}
        try:
            model.load_state_dict(load_pretrained(arch, weights) | new)
        except (RuntimeError, TypeError, AttributeError) as error:
            raise AlasaError(f"--weights {weights}", error) from error
    model.requires_grad_(not freeze)
    head.requires_grad_(True)
    stem.__class__ = Float32Conv2d
    return model.to(memory_format=torch.channels_last)


def load_pretrained(arch: str, weights: str) -> dict[str, Tensor]:
    """Return the state dict in a file, or torchvision's weights of that name."""
    names = torchvision.models.get_model_weights(arch).__members__
    try:
        if weights in names:
            model = torchvision.models.get_model(arch, weights=names[weights])
            return model.state_dict()
        state = torch.load(weights, map_location="cpu", weights_only=True)
        return state.get("model", state)
    except Exception as error:  # no network, no such file, a damaged one, ...
        if weights in names:
            cache = f"{torch.hub.get_dir()}/checkpoints"
            what = f"cannot load {names[weights].url}; put it into {cache}, "
            what += "or give --weights FILE or --weights none"
        else:
            what = f"--weights {weights}: not a file of weights nor of {list(names)}"
        raise AlasaError(what, error) from error


@torch.inference_mode()
def check_size(model: nn.Module, arch: str, image: Tensor) -> None:
    """Raise AlasaError if the model cannot take images of this size, [3, H, W]."""
    try:
        model.eval()(normalise(image[None]))
    except (RuntimeError, AssertionError) as error:
        size = f"{image.shape[2]}x{image.shape[1]}"
        raise AlasaError(f"{arch} cannot take {size} images", error) from error


def train_one_epoch(
    model: nn.Module,
    reader: Reader,
    criterion: nn.Module,
    optimizer: torch.optim.Optimizer,
    epoch: int = 1,
    amp: contextlib.AbstractContextManager = FLOAT32,
    scaler: torch.amp.GradScaler | None = None,
) -> tuple[float, float]:
    """Train on every batch once; return the mean loss and the accuracy over the images."""
    dataset, totals = reader.dataset, np.zeros(3)
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    # A frozen backbone keeps its pretrained statistics, so it stays in eval mode.
    model.train(all(p.requires_grad for p in model.parameters()))
    for rows, images, errors in reader.read(epoch):
        refuse(errors.values())
        torch.manual_seed(derive_seed("step", dataset.seed, epoch, rows))
        labels = dataset.labels[rows].to(images.device)
        with amp:
            logits = model(images)
        loss = criterion(logits.float(), labels)
        if not math.isfinite(value := loss.item()):
            paths = [dataset.paths[row] for row in rows]
            raise AlasaError(f"epoch {epoch}: the loss became {value} on {paths}")
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        correct = (logits.argmax(1) == labels).sum().item()
        totals += (value * len(rows), correct, len(rows))
    loss, correct, count = map(float, sum(exchange(totals)))
    return loss / count, correct / count


@torch.inference_mode()
def infer(
    model: nn.Module,
    reader: Reader,
    amp: contextlib.AbstractContextManager = FLOAT32,
    views: int = 1,
) -> tuple[list[int], Tensor, dict[int, str]]:
    """Return the rows that could be read, their float32 logits, and {other row: error}.

    Every process reads its share and gets the whole, in order.  Logits are the mean over
    the first `views` views of each image: test-time augmentation.
    """
    model.eval()
    rows, logits, errors = [], [torch.empty(0)], {}
    for good, images, bad in reader.read():
        rows, errors = rows + good, errors | bad
        if good:
            with amp:
                outputs = [
                    model(d4_view(images, view)).float() for view in range(views)
                ]
            logits.append(torch.stack(outputs).mean(0).cpu())
    parts = exchange((rows, torch.cat(logits), errors))
    rows = [row for part in parts for row in part[0]]
    logits = torch.cat([part[1] for part in parts])[np.argsort(rows)]
    return sorted(rows), logits, {k: v for part in parts for k, v in part[2].items()}


def evaluate(
    model: nn.Module,
    reader: Reader,
    criterion: nn.Module,
    amp: contextlib.AbstractContextManager = FLOAT32,
) -> dict[str, float]:
    """Return the loss and the `score` of a labelled split, over all processes."""
    rows, logits, errors = infer(model, reader, amp)
    refuse(errors.values())
    labels = reader.dataset.labels
    assert rows == list(range(len(labels))), "a row was lost or read twice"
    loss = criterion(logits.to(reader.device), labels.to(reader.device)).item()
    return {"loss": loss} | score(
        labels.numpy(), torch.softmax(logits.double(), 1).numpy()
    )


def score(labels: np.ndarray, p: np.ndarray) -> dict[str, float]:
    """Return accuracy, auc and wauc for class indices [N] and probabilities [N, classes].

    auc is that of P(class 1), or with more classes the mean over each against the rest;
    wauc that of P(not class 0).  Both are NaN where a class has no image or p is not finite.
    """
    auc = wauc = math.nan
    if np.isfinite(p).all() and len(set(labels)) == p.shape[1]:
        aucs = [roc_areas(labels == k, p[:, k])[0] for k in range(p.shape[1])]
        auc = aucs[1] if len(aucs) == 2 else float(np.mean(aucs))
        wauc = weighted_auc(labels != 0, p[:, 1:].sum(1))
    return {"accuracy": float((p.argmax(1) == labels).mean()), "auc": auc, "wauc": wauc}


def weighted_auc(y_true: np.ndarray, y_score: np.ndarray) -> float:
    """Return the ALASKA2 competition's area under the ROC curve, in 0..1.

    TPR below 0.4 counts twice: (AUC + integral of min(TPR, 0.4) dFPR) / 1.4.
    """
    return sum(roc_areas(y_true, y_score)) / 1.4


def roc_areas(y_true: np.ndarray, y_score: np.ndarray) -> tuple[float, float]:
    """Return the areas under the piecewise linear ROC curve and under its TPR <= 0.4 part.

    ValueError if a score is NaN or a class is missing.
    """
    y_true, y_score = np.asarray(y_true, bool), np.asarray(y_score, float)
    if np.isnan(y_score).any() or y_true.all() or not y_true.any():
        raise ValueError("an ROC curve needs positives, negatives and no NaN")
    order = np.argsort(-y_score, kind="stable")
    # The curve has a point where the score changes: ties are one straight segment.
    last = np.append(np.flatnonzero(np.diff(y_score[order])), len(order) - 1)
    hits = np.cumsum(y_true[order])[last]
    tpr = np.append(0, hits / hits[-1])
    fpr = np.append(0, (last + 1 - hits) / (len(order) - hits[-1]))
    # And a corner where it crosses 0.4: both axes only rise, so sorting puts it in place.
    fpr = np.sort(np.append(fpr, np.interp(0.4, tpr, fpr)))
    tpr = np.sort(np.append(tpr, 0.4))
    return float(np.trapezoid(tpr, fpr)), float(np.trapezoid(np.minimum(tpr, 0.4), fpr))


def write_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Replace a file whole or not at all, though the disk be full or the power fail."""
    part = path.with_name(f"{path.name}.part")
    try:
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch.save wraps the one in the other
        cause = error if isinstance(error, OSError) else error.__context__ or error
        raise AlasaError(f"{path}: cannot be written", cause) from error
    finally:
        part.unlink(missing_ok=True)


def load_checkpoint(path: str | Path) -> dict:
    """Read a checkpoint that `fit` wrote; AlasaError if it is damaged or another's."""
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():  # torch.load checks no CRC
                raise ValueError(f"{damaged} is damaged")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        [
            checkpoint[key]
            for key in ("model", "classes", "settings", "sha256", "history")
        ]
        return checkpoint
    except Exception as error:  # a damaged file can raise anything
        raise AlasaError(f"{path}: not a checkpoint of train.py", error) from error


def plot_history(path: Path, history: list[dict[str, float]]) -> None:
    """Draw the two losses, and beside them the two scores, by epoch; or warn."""
    try:
        from matplotlib.figure import Figure  # not pyplot, which may want a display

        log = pd.DataFrame(history)
        figure = Figure(figsize=(10, 4), layout="constrained")
        panels = {"loss": ["train_loss", "valid_loss"], "validation": ["auc", "wauc"]}
        for axes, (title, columns) in zip(figure.subplots(1, 2), panels.items()):
            for column in columns:
                axes.plot(log["epoch"], log[column], marker=".", label=column)
            axes.set(xlabel="epoch", ylabel=title)
            axes.legend()
        write_file(path, lambda file: figure.savefig(file, format="png", dpi=120))
    except (AlasaError, ImportError, OSError, RuntimeError, ValueError) as error:
        say(f"warning: {AlasaError(f'{path} was not drawn', error)}")


def exchange(value: object) -> list:
    """Return the value of every process, by rank."""
    values = [value] * WORLD
    if WORLD > 1:
        dist.all_gather_object(values, value)
    return values


def start(s: Namespace) -> tuple[torch.device, torch.autocast]:
    """Settle device, precision and workers in `s`, join torchrun's other processes."""
    if s.device == "auto":
        s.device = "cuda" if torch.cuda.is_available() else "cpu"
    if WORLD > 1 and s.device == "cuda":
        s.device = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        torch.empty(0, device=s.device)
    except (RuntimeError, AssertionError) as error:
        raise AlasaError(f"--device {s.device}", error) from error
    device = torch.device(s.device)
    if WORLD > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group()
    if s.workers is None:  # few where the CPU trains too
        s.workers = (
            1 if device.type == "cpu" else min(8, (os.cpu_count() or 1) // WORLD)
        )
    if s.precision == "auto":  # bf16 where the hardware is made for it: Ampere, AMX
        fast = {
            "cuda": torch.cuda.is_available()
            and torch.cuda.get_device_capability() >= (8, 0)
        }
        # torch before 2.10 cannot tell.
        fast["cpu"] = getattr(torch.cpu, "get_capabilities", dict)().get("amx_bf16")
        s.precision = "bf16" if fast.get(device.type) else "fp32"
    amp = torch.autocast(
        device.type, DTYPES[s.precision], enabled=s.precision != "fp32"
    )
    return device, amp


def best_epoch(history: list[dict[str, float]], monitor: str) -> int:
    """Return the index of the first highest finite score, or -1 if there is none."""
    finite = [i for i, row in enumerate(history) if math.isfinite(row[monitor])]
    return max(finite, key=lambda i: history[i][monitor], default=-1)


def open_run(s: Namespace, identity: dict) -> dict | None:
    """Return the checkpoint to resume, or None for a new run that may write to s.out."""
    found = [name for name in RUN_FILES if os.path.exists(os.path.join(s.out, name))]
    if not s.resume:
        if found and not s.overwrite:
            what = f"{s.out} holds a run ({', '.join(found)})"
            raise AlasaError(f"{what}: --resume, --overwrite, or choose another --out")
        return None
    load_checkpoint(Path(s.out, "best.pt"))  # or the best epoch would be lost silently
    previous = load_checkpoint(Path(s.out, "last.pt"))
    now, then = (
        c["settings"] | {"classes": c["classes"], **c["sha256"]}
        for c in (identity, previous)
    )
    changed = [key for key in now if key not in FREE and now[key] != then.get(key)]
    refuse(f"--resume: {k} was {then.get(k)!r}, now it is {now[k]!r}" for k in changed)
    return previous


def fit(s: Namespace, criterion: nn.Module | None = None) -> list[dict[str, float]]:
    """Train as the flags of train.py say, keep RUN_FILES in s.out; return the history.

    criterion(logits [B, classes], labels [B]) is a mean loss, by default cross entropy.
    """
    device, amp = start(s)
    columns = {s.image_column: "image", s.label_column: "label"}
    csvs = {"train": s.train_csv, "valid": s.valid_csv}
    frames = {k: read_csv(path, columns, s.image_root) for k, path in csvs.items()}
    classes = check_splits(*frames.values())
    digests = {
        k: hashlib.sha256(Path(v).read_bytes()).hexdigest() for k, v in csvs.items()
    }
    identity = {"classes": classes, "settings": vars(s), "sha256": digests}
    previous = open_run(s, identity)
    readers = make_readers(s, frames, classes, device)
    if s.check_images:
        refuse(e for r in readers for *_, errors in r.read() for e in errors.values())
    parts = build_parts(s, len(classes), device, previous)
    check_size(parts["model"], s.arch, readers[1].dataset[0][0].to(device))
    describe(s, readers, classes)
    criterion = criterion or nn.CrossEntropyLoss(label_smoothing=s.label_smoothing)
    history = previous["history"] if previous else []
    try:
        os.makedirs(s.out, exist_ok=True)
        run_epochs(s, parts, readers, criterion, amp, identity, history)
        say(f"best: epoch {best_epoch(history, s.monitor) + 1}, in {s.out}/best.pt")
    except KeyboardInterrupt:
        say(f"interrupted; {s.out} holds {len(history)} epochs", end=". ")
        again = [flag for flag in sys.argv if flag not in ("--resume", "--overwrite")]
        say(f"To go on: python {shlex.join(again)} --resume" if history else "")
        raise
    finally:
        if history and RANK == 0:
            write_log(Path(s.out), history)  # if a kill came between last.pt and it
            plot_history(Path(s.out, "losses.png"), history)
        with contextlib.suppress(OSError):
            os.rmdir(s.out)  # nothing was written
    return history


def make_readers(
    s: Namespace, frames: dict, classes: list[str], device
) -> list[Reader]:
    """Return a reader of each split; labels become indices of `classes`."""
    readers = []
    for split, frame in frames.items():
        frame["label"] = frame["label"].map(classes.index)
        transform = make_transform(split, s.image_size, s.augment)
        dataset = AlasaDataset(frame, split, transform, s.seed)
        readers.append(Reader(dataset, s.batch_size, device, s.workers, s.balance))
    return readers


def build_parts(s: Namespace, classes: int, device, previous: dict | None) -> dict:
    """Return all that has a state: model, optimizer, scheduler and gradient scaler."""
    seed_everything(s.seed)
    weights = "none" if previous else s.weights
    model = build_model(s.arch, classes, weights, s.freeze, s.full_res_stem).to(device)
    trained = [p for p in model.parameters() if p.requires_grad]
    options = {"lr": s.lr, "weight_decay": s.weight_decay, "fused": True}
    if s.optimizer == "sgd":
        optimizer = torch.optim.SGD(trained, momentum=0.9, **options)
    else:
        optimizer = torch.optim.AdamW(trained, **options)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "max", 0.5, 2)
    scaler = torch.amp.GradScaler(device.type, enabled=s.precision == "fp16")
    names = ("model", "optimizer", "scheduler", "scaler")
    parts = dict(zip(names, (model, optimizer, scheduler, scaler)))
    for name, part in parts.items() if previous else ():
        part.load_state_dict(previous[name])
    return parts


def describe(s: Namespace, readers: list[Reader], classes: list[str]) -> None:
    """Print what is about to run, the classes of both splits, and what chance scores."""
    say(f"{s.arch} on {s.device} x {WORLD}, {s.precision}, {s.workers} workers")
    counts = {r.dataset.split: r.dataset.labels.bincount() for r in readers}
    counts = pd.DataFrame(counts, index=classes)
    p, q = (counts / counts.sum()).to_numpy().T
    say(counts.to_string())
    loss = -(q * np.log(p)).sum()
    say(f"chance: loss {loss:.4f}, accuracy {q.max():.4f}, auc 0.5, wauc 0.5857")
    batches = readers[0].batches(1)
    if not batches:
        raise AlasaError("too few images, or too small a --batch-size, to train on")
    if left := len(readers[0].dataset) - WORLD * sum(map(len, batches)):
        say(
            f"{left} training images sit out each epoch: their batch would be too small"
        )


def run_epochs(s, parts, readers, criterion, amp, identity, history) -> None:
    """Train, evaluate, step, note and save, until the epochs or the patience end."""
    model, optimizer, scheduler, scaler = parts.values()
    net = torch.compile(model) if s.compile else model
    net = nn.parallel.DistributedDataParallel(net) if WORLD > 1 else net
    while len(history) < s.epochs:
        stale = len(history) - 1 - best_epoch(history, s.monitor)
        if stale >= s.early_stop > 0:
            say(f"no better {s.monitor} in {stale} epochs: stopped early")
            break
        began, epoch = time.perf_counter(), len(history) + 1
        row = {"epoch": epoch, "lr": optimizer.param_groups[0]["lr"]}
        loss, accuracy = train_one_epoch(
            net, readers[0], criterion, optimizer, epoch, amp, scaler
        )
        row |= {"train_loss": loss, "train_accuracy": accuracy}
        for buffer in model.buffers() if WORLD > 1 else ():
            dist.broadcast(buffer, 0)  # batch statistics differ by process
        scores = exchange(evaluate(model, readers[1], criterion, amp))[0]
        row |= {
            "valid_loss": scores.pop("loss"),
            "valid_accuracy": scores.pop("accuracy"),
        }
        row |= scores | {"seconds": time.perf_counter() - began}
        row["images_per_second"] = sum(len(r.dataset) for r in readers) / row["seconds"]
        scheduler.step(row[s.monitor])
        history.append(row)
        if RANK == 0:
            save_epoch(s, parts, identity, history)
        say(", ".join(f"{name} {value:.6g}" for name, value in row.items()))


def save_epoch(s: Namespace, parts: dict, identity: dict, history: list[dict]) -> None:
    """Write the epoch's files, last.pt after best.pt: what a resumed run does not find in
    last.pt it does again, to the same bits.
    """
    out, states = Path(s.out), {name: part.state_dict() for name, part in parts.items()}
    versions = {m.__name__: str(m.__version__) for m in (torch, torchvision, PIL)}
    checkpoint = identity | {
        "epoch": len(history),
        "history": history,
        "versions": versions,
    }
    checkpoint["model"] = states["model"]
    for name in RUN_FILES if len(history) == 1 else ():
        (out / name).unlink(missing_ok=True)  # of the run that this one overwrites
    if best_epoch(history, s.monitor) == len(history) - 1:
        write_file(out / "best.pt", functools.partial(torch.save, checkpoint))
    write_file(out / "last.pt", functools.partial(torch.save, checkpoint | states))
    write_log(out, history)


def write_log(out: Path, history: list[dict[str, float]]) -> None:
    """Write log.csv, a row an epoch, six digits."""
    log = pd.DataFrame(history).to_csv(index=False, float_format="%.6g").encode()
    write_file(out / "log.csv", lambda file: file.write(log))


def predict(
    checkpoint: dict,
    frame: pd.DataFrame,
    device: str = "auto",
    workers: int | None = None,
    batch_size: int | None = None,
    tta: bool = False,
) -> tuple[pd.DataFrame, dict[int, str]]:
    """Return a row for each row of `frame`: image, label, score, p_<class>; and {row: error}.

    The score is P(not class 0).  Rows with an error are empty.  `tta`: the mean of logits
    over the views that training drew from.
    """
    s, classes = Namespace(**checkpoint["settings"]), checkpoint["classes"]
    s.device, s.workers = device, workers
    device, amp = start(s)
    seed_everything(s.seed)
    model = build_model(s.arch, len(classes), "none", full_res_stem=s.full_res_stem)
    model.load_state_dict(checkpoint["model"])
    dataset = AlasaDataset(frame, "test", make_transform("test", s.image_size))
    reader = Reader(dataset, batch_size or s.batch_size, device, s.workers)
    views = VIEWS[s.augment] if tta else 1
    rows, logits, errors = infer(model.to(device), reader, amp, views)
    p = np.full((len(frame), len(classes)), math.nan)
    p[rows] = torch.softmax(logits.double().reshape(-1, len(classes)), 1).numpy()
    errors |= {
        row: "the model's output is not finite"
        for row in rows
        if not np.isfinite(p[row]).all()
    }
    table = pd.DataFrame(p, columns=[f"p_{name}" for name in classes])
    best = [
        "" if row in errors else classes[p[row].argmax()] for row in range(len(frame))
    ]
    table.insert(0, "image", frame["image"].tolist())
    table.insert(1, "label", best)
    table.insert(2, "score", p[:, 1:].sum(1))
    return table, errors


def run_script(main: Callable[[], int]) -> None:
    """Run main() and leave with its exit code; 2 and one line for a fault, 130 for Ctrl-C."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        code = main()
    except (AlasaError, OSError, EOFError) as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except RuntimeError as error:
        hints = {"DataLoader worker": "--workers 0", "out of memory": "--batch-size"}
        hint = [f"try {flag}" for text, flag in hints.items() if text in str(error)]
        if not hint:
            raise
        print(f"error: {AlasaError(hint[0], error)}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        code = 130
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(code)  # all is written, and torch takes a second to tear itself down
