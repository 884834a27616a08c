"""Fine-tune a pretrained torchvision classifier on the images that two CSV files list.

    python train.py --train-csv train.csv --valid-csv valid.csv
    python predict.py --checkpoint runs/best.pt --test-csv test.csv

Both scripts only parse flags.  The work is here, in the order in which it is done: seeds,
CSV rows, images, batches, the model, one epoch, scores, files, and the whole run: `fit`.
"""

import contextlib
import csv
import ctypes
import hashlib
import math
import multiprocessing
import os
import random
import signal
import sys
import time
import zipfile
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # DDP warns of no fault

import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
import torchvision
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.transforms import v2

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet, for RGB in 0..1
VIEWS = {"none": 1, "flip": 2, "crop": 2, "d4": 8}  # how many each augmentation shows
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OPTIMIZERS = {"adamw": partial(torch.optim.AdamW, fused=True)}
# Not fused, as then its momentum would stay uninitialised if fp16 skips the first step.
OPTIMIZERS |= {"sgd": partial(torch.optim.SGD, momentum=0.9)}
VERSIONS = {m.__name__: str(m.__version__) for m in (torch, torchvision, Image, np)}
RUN_FILES = ("last.pt", "best.pt", "log.csv", "losses.png")
# A resumed run may change these flags: by themselves they move no weight.
FREE = {"train_csv", "valid_csv", "image_root", "check_images", "workers", "device"}
FREE |= {"epochs", "early_stop", "out", "resume", "overwrite"}
RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
STOP: list[int] = []  # the signals met; the lock of an Event is not reentrant

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else not deterministic
# glibc returns large buffers to the kernel and faults them in anew at each step; with
# M_MMAP_MAX (-4) 0 and M_TRIM_THRESHOLD (-1) at most it keeps them: a third faster on a CPU.
with contextlib.suppress(AttributeError, TypeError):  # no other libc has mallopt
    ctypes.CDLL(None).mallopt(-4, 0)
    ctypes.CDLL(None).mallopt(-1, 2**31 - 1)


class AlasaError(Exception):
    """A fault that the user can mend, told in one line."""


@contextlib.contextmanager
def blame(what: str) -> Iterator[None]:
    """Turn any exception within into an AlasaError that tells of `what`."""
    try:
        yield
    except Exception as error:
        # torch.save hides a full disk's OSError behind a RuntimeError.
        cause = (isinstance(error, RuntimeError) and error.__context__) or error
        why = " ".join(str(cause).split())[:300] or type(cause).__name__
        raise AlasaError(f"{what}: {why}") from error


def refuse(faults: Iterable[str], most: int = 10) -> None:
    """Raise AlasaError with the first faults and their number, if there are any."""
    if faults := list(dict.fromkeys(faults)):
        more = f"; ... ({len(faults)} in all)" if len(faults) > most else ""
        raise AlasaError("; ".join(faults[:most]) + more)


def derive_seed(*key: object) -> int:
    """Return 64 bits that depend on the key alone, so that no state has to be saved."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big")


def seed_everything(seed: int) -> None:
    """Seed random, numpy and torch; choose deterministic kernels.
    Torch warns where CUDA has none: the pooling of vgg and alexnet."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # only costs time here
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = False  # it would round pixels to 10 bits


def read_csv(path: str, columns: dict, root=None, labelled=True) -> pd.DataFrame:
    """Return as text the columns that {"image": "id", "label": "target"} names, and `path`:
    relative images start at `root`, by default the CSV's folder.  The index is each row's
    place, "train.csv line 2".  Only if `labelled` must there be a label."""
    utf8 = {"newline": "", "encoding": "utf-8-sig"}
    with blame(f"{path}: not a readable CSV"), open(path, **utf8) as file:
        reader = csv.reader(file, strict=True)  # pandas would pass rows of odd lengths
        header = next(reader, [])
        rows = {f"{path} line {reader.line_num}": row for row in reader if row}
    if not rows:
        raise AlasaError(f"{path}: has no rows")
    odd = [place for place, row in rows.items() if len(row) != len(header)]
    refuse(f"{place}: not {len(header)} cells" for place in odd)
    frame = pd.DataFrame(index=list(rows))
    for name, column in columns.items():
        if header.count(column) == 1:
            frame[name] = [row[header.index(column)] for row in rows.values()]
            empty = frame.index[frame[name].str.strip() == ""]
            refuse(f"{place}: the {name} is empty" for place in empty)
        elif labelled or name == "image":
            what = f"{path}: needs one column {column!r}, has {header}"
            raise AlasaError(f"{what}; give --{name}-column")
    root = os.path.dirname(path) if root is None else root
    return frame.assign(path=[os.path.join(root, file) for file in frame["image"]])


def check_splits(train: pd.DataFrame, valid: pd.DataFrame, smoothing=0.0) -> list[str]:
    """Return the classes, integers in numerical order; the first is the negative one.
    Print how many images each has, and what chance would score.
    AlasaError if an image is missing, or if the AUC would be undefined or a lie."""
    labels = set(train["label"])
    numbers = all((x[1:] if x[0] in "+-" else x).isdecimal() for x in labels)
    classes = sorted(labels, key=lambda label: (int(label) if numbers else 0, label))
    if len(classes) == 1:
        raise AlasaError(f"training has one class only: {classes[0]!r}")
    wrong = valid["label"][~valid["label"].isin(labels)].items()
    refuse(f"{place}: no training label is {label!r}" for place, label in wrong)
    absent = sorted(labels - set(valid["label"]))
    refuse(f"no validation label is {x!r}: its AUC would be undefined" for x in absent)
    paths = pd.concat([train["path"], valid["path"]])
    whole = [os.path.isfile(path) and os.path.getsize(path) > 0 for path in paths]
    wrong = paths[np.logical_not(whole)].items()
    refuse(f"{place}: {path} is missing or empty" for place, path in wrong)
    # Two numbers, inode and device, are the same however a file is spelled or linked.
    seen = {os.stat(path)[1:3] for path in train["path"]}
    same = [os.stat(path)[1:3] in seen for path in valid["path"]]
    wrong = valid["path"][same].items()
    refuse(f"{place}: {path} is a training image too" for place, path in wrong)
    names = [set(map(os.path.basename, frame["path"])) for frame in (train, valid)]
    if both := len(names[0] & names[1]):
        print(f"warning: {both} file names are in both splits: the same scenes?")
    counts = [frame["label"].value_counts()[classes] for frame in (train, valid)]
    print(pd.DataFrame(counts, ["train", "valid"]).T.to_string(index_names=False))
    p, q = (count / count.sum() for count in counts)
    loss = -(((1 - smoothing) * q + smoothing / len(q)) * np.log(p)).sum()
    print(f"chance: loss {loss:.4f}, accuracy {q.max():.4f}, auc 0.5, wauc 0.5857")
    return classes


def read_image(path: str) -> Image.Image:
    """Decode an image's first frame, upright, as 8-bit RGB; AlasaError if that fails.
    16-bit grey levels are divided by 257, transparency is laid over white."""
    # Opened here, as Pillow scrambles TIFFs that EXIF turns if it is given their path.
    with blame(f"{path}: not a readable image"), open(path, "rb") as file:
        Image.open(file).verify()  # a PNG's checksums, which decoding skips
        image = Image.open(file)
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode[0] in "IF":  # Pillow's own conversion clips at 255
            grey = np.asarray(image)
            tags = getattr(image, "tag_v2", {})  # of a TIFF: bits, what 0 means
            odd = tags.get(258, (16,)) != (16,) or tags.get(262) == 0
            odd |= "transparency" in image.info or image.mode == "F"
            if odd or grey.min() < 0 or grey.max() > 65535:
                raise ValueError("grey levels that are not plain 16 bits")
            image = Image.fromarray((grey / 257).round().astype(np.uint8))
        elif image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        return image.convert("RGB")


def d4_view(image: Tensor, view: int) -> Tensor:
    """Return [..., H, W] as one of the square's eight symmetries shows it: 0 as it is, 1
    mirrored.  Unless it is square, views 4-7 are 0-3 again, which keep its shape."""
    image = image.flip(-1) if view & 1 else image
    image = image.flip(-2) if view & 2 else image
    square = image.shape[-1] == image.shape[-2]
    return image.transpose(-2, -1) if view & 4 and square else image


def make_transform(split: str, size: int = 0, augment: str = "d4") -> v2.Compose:
    """Return what turns a PIL image into uint8 [3, H, W]; random for "train" alone."""
    augment = augment if split == "train" else "none"
    if augment == "crop" and not size:
        raise AlasaError("--augment crop needs --image-size")
    resize = [v2.Resize(size), v2.CenterCrop(size)] if size else []
    crop = [v2.RandomResizedCrop(size)] if augment == "crop" else resize
    views = [partial(d4_view, view=view) for view in range(VIEWS[augment])]
    return v2.Compose([*crop, v2.PILToTensor(), v2.RandomChoice(views)])


class AlasaDataset(Dataset):
    """The images that a frame lists: (image, label), or only the image if split is "test".
    The frame has the columns `image`, maybe `path`, and class indices `label`; its index is
    what an error calls a row.  `transform` takes an RGB PIL image and returns [3, H, W]:
    uint8, or floats of any scale.  dataset[epoch, rows] is what `read_batch` returns."""

    def __init__(self, frame: pd.DataFrame, split: str, transform=None, seed: int = 0):
        self.split, self.seed, self.places = split, seed, frame.index.tolist()
        self.transform = transform or make_transform(split)
        self.paths = frame.get("path", frame["image"]).tolist()
        self.labels = [-1] * len(frame) if split == "test" else frame["label"].tolist()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, key: int | tuple[int, list[int]]) -> tuple | Tensor:
        if isinstance(key, tuple):
            return self.read_batch(*key)
        with blame(self.places[key]):
            image = read_image(self.paths[key])
        image = self.transform(image)
        return image if self.split == "test" else (image, self.labels[key])

    def read_batch(self, epoch: int, rows: list[int]) -> tuple:
        """Return {row that was read: path}, images [B, 3, H, W], {other row: error}, a seed
        for the step.  What torch draws depends on (seed, epoch, row) alone; rows beyond the
        last are the same images again, seen in other ways."""
        paths, images, errors = {}, {}, {}
        for row in rows:
            torch.manual_seed(derive_seed("image", self.seed, epoch, row))
            index = row % len(self)
            try:
                images[row] = self[index] if self.split == "test" else self[index][0]
                paths[row] = self.paths[index]
            except AlasaError as error:
                errors[row] = str(error)
        sizes = {images[row].shape[:0:-1]: path for row, path in paths.items()}
        if len(sizes) > 1:
            named = [f"{path} is {w}x{h}" for (w, h), path in sizes.items()][:2]
            flag = "--batch-size 1" if self.split == "test" else "--image-size"
            mixed = f"a batch needs one size: {', '.join(named)}; give {flag}"
            paths, errors = {}, errors | dict.fromkeys(paths, mixed)
        # Channels last, as decoded and as convolutions like it.  A worker's default_collate
        # stacks into shared memory, where torch.stack would leave that to a silent thread.
        pixels = [images[row].permute(1, 2, 0) for row in paths]
        stacked = default_collate(pixels or [torch.empty(0, 0, 3)]).permute(0, 3, 1, 2)
        return paths, stacked, errors, derive_seed("step", self.seed, epoch, rows)

    def plan(self, epoch: int, batch_size: int, balance=False) -> list[list[int]]:
        """Return the batches that this process reads, as lists of rows.  In training, its
        share of each batch of the epoch's own order.  In evaluation, and in epoch 0, which
        checks images, every WORLD-th batch whole: its size moves the last bits of logits."""
        if self.split != "train" or epoch == 0:
            batches = torch.arange(len(self)).split(batch_size)[RANK::WORLD]
            return [rows.tolist() for rows in batches]
        generator = torch.Generator()
        generator.manual_seed(derive_seed("order", self.seed, epoch))
        order = torch.randperm(len(self), generator=generator)
        if balance:
            weights = torch.tensor(1 / np.bincount(self.labels)[self.labels])
            order = torch.multinomial(weights, len(self), True, generator=generator)
            # What is drawn twice is to look new, so that no two rows are the same.
            order += torch.arange(len(self)) * len(self)
        whole = [rows[: len(rows) // WORLD * WORLD] for rows in order.split(batch_size)]
        # Batch normalisation cannot train on one image: a last batch of one is dropped.
        return [rows[RANK::WORLD].tolist() for rows in whole if len(rows) > WORLD]


def read_ahead(data: AlasaDataset, epochs: Iterable[int], device, workers: int, *how):
    """Yield, for each epoch, a pass over data.plan(epoch, *how): batches of {row: path},
    images [B, 3, H, W] on the device, labels [B], {row that could not be read: error}.
    Workers start at once, and read on while other things happen."""
    plan = ((epoch, rows) for epoch in epochs for rows in data.plan(epoch, *how))
    own = torch.Generator()  # else the loader draws a seed from the global one
    more = {"pin_memory": device.type == "cuda", "generator": own}
    loader = DataLoader(data, None, sampler=plan, num_workers=workers, **more)
    with blame("the workers cannot start, try --workers 0"):
        batches = iter(loader)
    # Torch's handler would raise anywhere; that a worker is lost, the next batch tells too.
    with contextlib.suppress(AttributeError, ValueError):  # Windows, or in a thread
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    lost = (OSError, EOFError, RuntimeError) if workers else ()

    def one_pass(count: int) -> Iterator[tuple]:
        """Yield the next `count` batches, with a progress line if a terminal watches."""
        for step in range(1, count + 1):
            if STOP:
                raise KeyboardInterrupt
            if sys.stderr.isatty() and RANK == 0:
                print(f"{data.split} {step}/{count}\033[K", end="\r", file=sys.stderr)
            try:
                rows, images, errors, seed = next(batches)
            except lost as error:
                why = str(error).strip().split("\n")[-1]  # less the worker's traceback
                what = "the workers failed, try --workers 0"
                raise AlasaError(f"{what}: {why}") from error
            torch.manual_seed(seed)  # for dropout
            labels = [data.labels[row % len(data)] for row in rows]
            labels = torch.tensor(labels, device=device)
            yield rows, normalise(images.to(device, non_blocking=True)), labels, errors

    return (one_pass(len(data.plan(epoch, *how))) for epoch in epochs)


def normalise(images: Tensor) -> Tensor:
    """Scale uint8 [B, 3, H, W] to ImageNet's float32; floats stay as they are."""
    if images.is_floating_point():
        return images
    mean, std = torch.tensor((MEAN, STD), device=images.device).view(2, 3, 1, 1) * 255
    return images.float().sub_(mean).div_(std)  # in place: five times faster


class Float32Conv2d(nn.Conv2d):
    """A convolution that computes in float32 under autocast too: bfloat16 would move a
    normalised pixel by up to 0.45 grey levels, and the data hidden in it move it by 1."""

    def forward(self, images: Tensor) -> Tensor:
        """Return float32's features [B, C, H, W], cast to autocast's type."""
        kind, dtype = images.device.type, images.dtype
        if torch.is_autocast_enabled(kind):  # a quarter of the memory, 3 % of the time
            dtype = torch.get_autocast_dtype(kind)
        with torch.autocast(kind, enabled=False):
            return super().forward(images).to(dtype)


def build_model(
    arch: str, classes: int, weights="DEFAULT", freeze=False, full_res_stem=False
) -> nn.Module:
    """Return a torchvision classifier with pretrained weights and a new last layer.
    `weights` is a name of torchvision's, a file, or "none".  `freeze` leaves only the last
    layer trainable.  `full_res_stem` sets the stride of the first convolution, and of
    pooling right behind it, to 1, so that the stem keeps every pixel."""
    auxiliary = ["googlenet", "inception_v3"]  # they have more heads than one
    known = torchvision.models.list_models(torchvision.models, exclude=auxiliary)
    if arch not in known:
        raise AlasaError(f"--arch {arch} is not supported; choose from {known}")
    model = torchvision.models.get_model(arch, num_classes=classes)
    kinds = (nn.Conv2d, nn.MaxPool2d, nn.Linear)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, kinds)}
    (stem, second, *_), (name, head) = layers.values(), list(layers.items())[-1]
    if full_res_stem:
        if stem.stride != (2, 2):
            raise AlasaError(f"--full-res-stem: {arch} has no stem of stride 2")
        stem.stride = (1, 1)
        second.stride = 1 if isinstance(second, nn.MaxPool2d) else second.stride
    if weights != "none":
        new = {f"{name}.{key}": tensor for key, tensor in head.state_dict().items()}
        with blame(f"--weights {weights}"):
            model.load_state_dict(load_pretrained(arch, weights) | new)
    model.requires_grad_(not freeze)
    head.requires_grad_(True)
    stem.__class__ = Float32Conv2d
    return model.to(memory_format=torch.channels_last)


def load_pretrained(arch: str, weights: str) -> dict[str, Tensor]:
    """Return the state dict in a file, or torchvision's weights of that name."""
    names = torchvision.models.get_model_weights(arch).__members__
    if weights in names:
        cache = f"{torch.hub.get_dir()}/checkpoints, or give --weights FILE or none"
        with blame(f"cannot load {names[weights].url}; put it into {cache}"):
            return torchvision.models.get_model(arch, weights=weights).state_dict()
    with blame(f"not a file of weights nor of {list(names)}"):
        state = torch.load(weights, map_location="cpu", weights_only=True)
        return state.get("model", state)


def exchange(value: object) -> list:
    """Return the value of every process, by rank."""
    values = [value] * WORLD
    if WORLD > 1:
        dist.all_gather_object(values, value)
    return values


def train_one_epoch(
    model: nn.Module, batches: Iterable[tuple], criterion, optimizer, scaler, amp, epoch
) -> dict[str, float]:
    """Train on every batch once; return the mean loss and the accuracy over the images."""
    # A frozen backbone keeps its pretrained statistics, so it stays in eval mode.
    model.train(all(p.requires_grad for p in model.parameters()))
    totals = np.zeros(3)
    for rows, images, labels, errors in batches:
        refuse(errors.values())
        with amp:
            logits = model(images)
        loss = criterion(logits.float(), labels)
        if not math.isfinite(value := loss.item()):
            where = f"epoch {epoch}, {', '.join(rows.values())}"
            raise AlasaError(f"{where}: the loss became {value}")
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        correct = (logits.argmax(1) == labels).sum().item()
        totals += (value * len(rows), correct, len(rows))
    loss, correct, count = map(float, sum(exchange(totals)))
    return {"train_loss": loss / count, "train_accuracy": correct / count}


@torch.inference_mode()
def infer(model: nn.Module, batches: Iterable[tuple], amp, views: int = 1) -> list:
    """Return for each row its logits, float32 [classes], or why it could not be read.
    The logits are the mean over the first `views` views: test-time augmentation."""
    model.eval()
    for buffer in model.buffers() if WORLD > 1 else ():
        dist.broadcast(buffer, 0)  # batch statistics differ by process
    results = {}
    for rows, images, _, errors in batches:
        results |= errors
        if rows:
            with amp:
                logits = [model(d4_view(images, view)).float() for view in range(views)]
            results |= zip(rows, torch.stack(logits).mean(0).cpu().numpy())
    found = {row: result for part in exchange(results) for row, result in part.items()}
    return [found[row] for row in range(len(found))]


def evaluate(model, batches, labels: list[int], criterion, amp) -> dict[str, float]:
    """Return the loss and the `score` of a labelled split, over all processes."""
    results = infer(model, batches, amp)
    refuse(result for result in results if isinstance(result, str))
    logits, y = torch.from_numpy(np.stack(results)), torch.tensor(labels)
    device = next(model.parameters()).device  # where a criterion has its weights
    loss = criterion(logits.to(device), y.to(device)).item()
    scores = score(labels, logits.double().softmax(1).numpy())
    return {"valid_loss": loss, "valid_accuracy": scores.pop("accuracy")} | scores


def score(labels: list[int], p: np.ndarray) -> dict[str, float]:
    """Return accuracy, auc and wauc for class indices [N] and probabilities [N, classes].
    auc is the mean over each class against the rest, wauc that of P(not class 0).  They are
    NaN where a class has no image, and all three where p is not finite."""
    y, scores = np.array(labels), dict.fromkeys(("accuracy", "auc", "wauc"), math.nan)
    if np.isfinite(p).all():
        scores["accuracy"] = float((p.argmax(1) == y).mean())
        if len(set(labels)) == p.shape[1]:
            with np.errstate(divide="ignore"):  # odds rank where p is rounded to 1
                odds = [np.delete(p, k, 1).sum(1) / p[:, k] for k in range(p.shape[1])]
            aucs = [weighted_auc(y != k, against, 0) for k, against in enumerate(odds)]
            scores["auc"] = float(np.mean(aucs))
            scores["wauc"] = weighted_auc(y != 0, odds[0])
    return scores


def weighted_auc(y_true: np.ndarray, y_score: np.ndarray, twice: float = 0.4) -> float:
    """Return the area under the ROC curve, in 0..1, where TPR below `twice` counts twice:
    (AUC + integral of min(TPR, twice) dFPR) / (1 + twice), as in the ALASKA2 competition.
    ValueError if a score is NaN or a class is missing."""
    y_true, y_score = np.asarray(y_true, bool), np.asarray(y_score, float)
    if np.isnan(y_score).any() or y_true.all() or not y_true.any():
        raise ValueError("an ROC curve needs positives, negatives and no NaN")
    # From 0, the curve has a point for each score: ties are one straight segment.
    point = np.unique(-y_score, return_inverse=True)[1] + 1
    fpr, tpr = (np.bincount(point, y).cumsum() / y.sum() for y in (~y_true, y_true))
    # And a corner where it crosses `twice`: both axes only rise, so sorting places it.
    fpr = np.sort(np.append(fpr, np.interp(twice, tpr, fpr)))
    tpr = np.sort(np.append(tpr, twice))
    return float(np.trapezoid(tpr + np.minimum(tpr, twice), fpr)) / (1 + twice)


def best_epoch(history: list[dict[str, float]], monitor: str) -> int:
    """Return the index of the first highest finite score, or -1 if there is none."""
    finite = [i for i, row in enumerate(history) if math.isfinite(row[monitor])]
    return max(finite, key=lambda i: history[i][monitor], default=-1)


def write_file(path: str, write: Callable[[object], object]) -> None:
    """Let write(file) replace a file whole or not at all, be the disk full or power lost."""
    part = Path(f"{path}.part")
    with blame(f"{path}: cannot be written"):
        try:
            if os.path.exists(path) and not os.path.isfile(path):
                raise OSError("not a regular file")  # it may be /dev/null
            with open(part, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


def load_checkpoint(path: str) -> dict:
    """Read a checkpoint that `fit` wrote; AlasaError if it is damaged or another's."""
    with blame(f"{path}: not a checkpoint of train.py"):
        if damaged := zipfile.ZipFile(path).testzip():  # torch.load checks no CRC
            raise ValueError(f"{damaged} is damaged")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        for key in ("model", "settings", "history", "versions"):
            checkpoint[key]
        return checkpoint


def open_run(settings: dict) -> dict:
    """Return the checkpoint to resume, or that of a new run, which has no model yet."""
    out, run = settings["out"], {"history": []}
    found = [name for name in RUN_FILES if os.path.exists(f"{out}/{name}")]
    if settings["resume"]:
        run = load_checkpoint(f"{out}/last.pt")
        if best_epoch(run["history"], settings["monitor"]) >= 0:
            load_checkpoint(f"{out}/best.pt")  # or it would be lost silently
        then = {key: run["settings"].get(key) for key in settings.keys() - FREE}
        changed = sorted(key for key in then if then[key] != settings[key])
        refuse(f"--resume: {x} was {then[x]!r}, now {settings[x]!r}" for x in changed)
        if run["versions"] != VERSIONS:
            print(f"warning: begun with {run['versions']}: the bits may differ")
    elif found and not settings["overwrite"]:
        what = f"{out} holds a run ({', '.join(found)})"
        raise AlasaError(f"{what}: --resume, --overwrite, or choose another --out")
    return run | {"settings": settings, "versions": VERSIONS}


def save_epoch(run: dict, parts: dict) -> None:
    """Write the files of the run; last.pt at the end: what it lacks is done again."""
    out, log = run["settings"]["out"], pd.DataFrame(run["history"])
    states = {name: part.state_dict() for name, part in parts.items()}
    for name in RUN_FILES if len(log) == 1 else ():
        Path(out, name).unlink(missing_ok=True)  # of the run that this one overwrites
    if best_epoch(run["history"], run["settings"]["monitor"]) == len(log) - 1:
        best = run | {"model": states["model"]}
        write_file(f"{out}/best.pt", partial(torch.save, best))
    write_log = partial(log.to_csv, mode="wb", index=False, float_format="%.6g")
    write_file(f"{out}/log.csv", write_log)
    try:
        with blame("losses.png cannot be drawn"):
            from matplotlib.figure import Figure  # slow, and pyplot may want a display

            figure = Figure(figsize=(10, 4), layout="constrained")
            panels = {"loss": ["train_loss", "valid_loss"], "score": ["auc", "wauc"]}
            for axes, (name, columns) in zip(figure.subplots(1, 2), panels.items()):
                axes.plot(log["epoch"], log[columns], marker=".", label=columns)
                axes.set(xlabel="epoch", ylabel=name)
                axes.legend()
            write_file(f"{out}/losses.png", partial(figure.savefig, dpi=120))
    except AlasaError as error:  # the run is whole without it
        print(f"warning: {error}")
    write_file(f"{out}/last.pt", partial(torch.save, run | states))


def start(name: str, precision: str) -> tuple[torch.device, str, torch.autocast]:
    """Settle the device and the precision; join torchrun's other processes."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    with blame(f"--device {name}"):
        if name == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        device = torch.empty(0, device=name).device
    if WORLD > 1 and not dist.is_initialized():
        dist.init_process_group()
        if RANK:  # rank 0 alone speaks
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if precision == "auto":  # bf16 where the hardware is made for it
        cuda = device.type == "cuda" and torch.cuda.get_device_capability() >= (8, 0)
        cpu = device.type == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16")
        precision = "bf16" if cuda or cpu else "fp32"
    on = precision != "fp32"
    return device, precision, torch.autocast(device.type, DTYPES[precision], enabled=on)


def fit(settings: dict, criterion: nn.Module | None = None) -> list[dict[str, float]]:
    """Train as the flags of train.py say, keep RUN_FILES in `out`; return the history.
    criterion(logits [B, classes], labels [B]) is a mean loss, by default cross entropy;
    its tensors are on the device.  A resumed run needs the same, and the same images."""
    s = Namespace(**settings)
    device, s.precision, amp = start(s.device, s.precision)
    columns = {"image": s.image_column, "label": s.label_column}
    paths = s.train_csv, s.valid_csv
    frames = [read_csv(path, columns, s.image_root) for path in paths]
    classes = check_splits(*frames, s.label_smoothing)
    data_hash = derive_seed([frame[[*columns]].to_numpy().tolist() for frame in frames])
    run = open_run(vars(s) | {"classes": classes, "data_hash": data_hash})
    data = []
    for split, frame in zip(("train", "valid"), frames):
        frame["label"] = frame["label"].map(classes.index)
        transform = make_transform(split, s.image_size, s.augment)
        data.append(AlasaDataset(frame, split, transform, s.seed))
    for split in data if s.check_images else ():
        batches = next(read_ahead(split, [0], device, s.workers, s.batch_size))
        refuse((e for *_, errors in batches for e in errors.values()), sys.maxsize)
    epochs = range(len(run["history"]) + 1, s.epochs + 1)
    how = device, s.workers, s.batch_size, s.balance
    passes = [read_ahead(split, epochs, *how) for split in data]
    seed_everything(s.seed)
    weights = "none" if s.resume else s.weights
    model = build_model(s.arch, len(classes), weights, s.freeze, s.full_res_stem)
    model.to(device)
    print(f"{s.arch} on {WORLD} x {device}, {s.precision}, {s.workers} workers")
    left = len(data[0]) - WORLD * sum(map(len, data[0].plan(1, s.batch_size)))
    if left == len(data[0]):
        raise AlasaError("too few images, or too small a --batch-size, to train on")
    if left:
        print(f"left out of each epoch, as too few for a batch: {left} of the images")
    image = normalise(data[1][0][0][None].to(device))
    with blame(f"{s.arch} cannot take such images"), torch.inference_mode():
        model.eval()(image)
    criterion = criterion or nn.CrossEntropyLoss(label_smoothing=s.label_smoothing)
    run_epochs(run, model, data, passes, criterion, amp)
    return run["history"]


def prepare(model: nn.Module, compiled: bool) -> nn.Module:
    """Return the model as it is trained: compiled, shared by the processes of torchrun."""
    # Else both would adapt to the first steps, which a resumed run does not know.
    net = torch.compile(model, dynamic=False) if compiled else model
    if WORLD == 1:
        return net
    return nn.parallel.DistributedDataParallel(net, find_unused_parameters=True)


def run_epochs(run: dict, model: nn.Module, data, passes, criterion, amp) -> None:
    """Train, evaluate, step and save, until the epochs or the patience end."""
    s, history = Namespace(**run["settings"]), run["history"]
    rates = {"lr": s.lr, "weight_decay": s.weight_decay}
    optimizer = OPTIMIZERS[s.optimizer](model.parameters(), **rates)
    scheduler = ReduceLROnPlateau(optimizer, "max", factor=0.5, patience=2)
    scaler = torch.amp.GradScaler(amp.device, enabled=s.precision == "fp16")
    parts = {"model": model, "optimizer": optimizer}  # all that has a state
    parts |= {"scheduler": scheduler, "scaler": scaler}
    for name in parts if s.resume else ():
        parts[name].load_state_dict(run.pop(name))
    net = prepare(model, s.compile)
    try:
        os.makedirs(s.out, exist_ok=True)
        for train, valid in zip(*passes):
            stale = len(history) - 1 - best_epoch(history, s.monitor)
            if stale >= s.early_stop > 0:
                print(f"no better {s.monitor} in {stale} epochs: stopped early")
                break
            epoch, began = len(history) + 1, time.perf_counter()
            row = {"epoch": epoch, "lr": optimizer.param_groups[0]["lr"]}
            row |= train_one_epoch(net, train, criterion, optimizer, scaler, amp, epoch)
            # Every process goes by rank 0's scores: its own might round otherwise.
            row |= exchange(evaluate(model, valid, data[1].labels, criterion, amp))[0]
            row["seconds"] = time.perf_counter() - began
            row["images_per_second"] = sum(map(len, data)) / row["seconds"]
            scheduler.step(row[s.monitor])
            if RANK == 0:
                save_epoch(run | {"history": [*history, row]}, parts)
            history.append(row)
            print(", ".join(f"{name} {value:.6g}" for name, value in row.items()))
        best = best_epoch(history, s.monitor) + 1
        print(f"best: epoch {best}, in {s.out}/best.pt" if best else "best: none yet")
    finally:
        if STOP:
            print(f"interrupted; epochs in {s.out} for --resume: {len(history)}")
        if RANK == 0:  # another may be done before rank 0 has written anything
            with contextlib.suppress(OSError):
                os.rmdir(s.out)  # nothing was written


def predict(
    checkpoint: dict, frame: pd.DataFrame, device="auto", workers=0, batch=0, tta=False
) -> pd.DataFrame:
    """Return a row for each row of `frame`: image, label, score = P(not class 0), p_<class>;
    where an image could not be read they are empty, and the column error says why.  `tta`
    takes the mean of the logits over the views that training drew from."""
    s = Namespace(**checkpoint["settings"])
    device, _, amp = start(device, s.precision)
    data = AlasaDataset(frame, "test", make_transform("test", s.image_size))
    batches = next(read_ahead(data, [0], device, workers, batch or s.batch_size))
    seed_everything(s.seed)
    model = build_model(s.arch, len(s.classes), "none", False, s.full_res_stem)
    model.load_state_dict(checkpoint["model"])
    results = infer(model.to(device), batches, amp, VIEWS[s.augment] if tta else 1)
    nothing = np.full(len(s.classes), math.nan)
    logits = [nothing if isinstance(result, str) else result for result in results]
    p = torch.from_numpy(np.stack(logits)).double().softmax(1).numpy()
    good = np.isfinite(p).all(1)
    table = pd.DataFrame({"image": frame["image"].tolist()})
    table["label"] = np.where(good, np.array(s.classes)[p.argmax(1)], "")
    table["score"] = p[:, 1:].sum(1).clip(max=1)
    table[[f"p_{name}" for name in s.classes]] = p
    if not good.all():
        table["error"] = np.where(good, "", [str(result) for result in results])
    return table


def run_script(main: Callable[[], int | None]) -> None:
    """Run main() and leave with its exit code; 2 and one line for a fault, 130 for Ctrl-C."""

    def stop(number: int, _: object) -> None:
        """Stop at the next batch, as an exception may strike anywhere; if asked twice, now."""
        if number in STOP:
            raise KeyboardInterrupt
        STOP.append(number)

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    if sys.stdout:  # else it is closed
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    try:
        code = main() or 0
    except BaseException as error:
        if STOP:  # what fails then fails of it
            code = 130
        elif isinstance(error, AlasaError | OSError):
            print("error:", error, file=sys.stderr)
            code = 2
        else:
            raise
    finally:
        for worker in multiprocessing.active_children():
            worker.kill()  # else it would live on for seconds, and hold the pipes
    os._exit(code)  # all is written, and torch takes a second to tear itself down
