"""Fine-tune a pretrained classifier; keep the epoch with the best validation AUC.

python train.py                     # the demo: scikit-learn's handwritten digits
python train.py --train-csv train.csv --valid-csv valid.csv
python train.py --train-csv photos/train --valid-csv photos/val
torchrun --nproc-per-node=4 train.py --train-csv train.csv --valid-csv valid.csv
"""

import contextlib
import math
import os
import sys
import time
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau
from torch.utils.data import DataLoader

import alasa
from alasa import AlasaDataset, AlasaError, atomic_write, number, print0

DEMO_CSV = "digits/train.csv"
# Digits of 8x8 pixels: nothing to crop or mirror, and no pretrained weights to build on.
DEMO_FLAGS = f"--train-csv {DEMO_CSV} --valid-csv digits/valid.csv --image-size 16"
DEMO_FLAGS += " --augment none --arch shufflenet_v2_x0_5 --weights none --full-res-stem"
DEMO_FLAGS += " --epochs 4 --batch-size 64 --lr 0.02 --weight-decay 0.1"
DEMO_FLAGS += " --schedule cosine --label-smoothing 0.1"

ALL_EPOCHS = 10**9
FREEZE_HELP = "epochs of the last layer alone; no N: all; None: 1, from scratch 0"
BATCH_NORM_HELP = "statistics of the weights, or new; None: keep, from scratch train"
SCHEDULE_HELP = "of the rates: halved when the score stalls, or warm-up and cosine"

# A resumed run may change these flags: they change no weight, but for another device's
# rounding.
MAY_CHANGE = {
    "train_csv",
    "valid_csv",
    "image_root",
    "image_column",
    "label_column",
    "check_images",
    "demo",
    "workers",
    "device",
    "epochs",
    "early_stop",
    "out",
    "resume",
    "overwrite",
}


def make_parser() -> ArgumentParser:
    """Return the parser of the flags; `parse_args` fills in the defaults None."""
    parser = ArgumentParser(
        description="Fine-tune a pretrained torchvision classifier; no data: the demo.",
        formatter_class=ArgumentDefaultsHelpFormatter,
    )
    add_data_flags(parser)
    add_training_flags(parser)
    add_run_flags(parser)
    return parser


def add_data_flags(parser: ArgumentParser) -> None:
    """Add what to train, and on what."""
    count = number(int, 0)
    workers = alasa.count_workers()
    add = parser.add_argument_group("data").add_argument
    add("--train-csv", help="images to train on: a CSV, or a folder of class folders")
    add("--valid-csv", help="images that choose the best epoch: likewise")
    add("--image-column", default="image", help="column of image files")
    add("--label-column", default="label", help="column of labels, text or integers")
    add("--image-root", help="where relative images start; None: at the CSV's folder")
    add("--image-size", type=count, help="pixels; 0: native; None: 224, or a ViT's own")
    add("--augment", choices=alasa.VIEWS, default="crop", help="random views, to train")
    add("--balance", action="store_true", help="draw all classes equally often")
    add("--check-images", action="store_true", help="decode all images before training")
    add("--workers", type=count, default=workers, help="decoding processes, per split")
    add = parser.add_argument_group("model").add_argument
    add("--arch", default="resnet18", help="any torchvision classifier")
    add("--weights", default="DEFAULT", help="torchvision's name, a file, or none")
    add("--full-res-stem", action="store_true", help="stride 1 in the first layers")


def add_training_flags(parser: ArgumentParser) -> None:
    """Add how to train."""
    count, share = number(int, 0), number(float, 0, 1)
    rate = number(float, 0, sys.float_info.max)
    at_least_1, at_least_2 = number(int, 1), number(int, 2)
    freeze = {"nargs": "?", "const": ALL_EPOCHS, "metavar": "N"}  # the flag without N
    optimizers, schedules = ["adamw", "sgd"], ["plateau", "cosine"]
    monitors, statistics = alasa.MONITORS, ["keep", "train"]
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=at_least_1, default=10, help="passes over the data, in all")
    add("--batch-size", type=at_least_2, default=32, help="over all processes")
    add("--freeze", type=count, help=FREEZE_HELP, **freeze)
    add("--lr", type=rate, help="learning rate; None: 3e-5, from scratch 3e-4")
    add("--head-lr", type=rate, help="of the last layer; None: 3e-3, from scratch --lr")
    add("--batch-norm", choices=statistics, help=BATCH_NORM_HELP)
    add("--weight-decay", type=rate, default=0.01, help="of the optimizer")
    add("--optimizer", choices=optimizers, default="adamw", help="sgd: momentum 0.9")
    add("--schedule", choices=schedules, default="plateau", help=SCHEDULE_HELP)
    add("--label-smoothing", type=share, default=0.0, help="of the loss, 0..1")
    add("--monitor", choices=monitors, default="auc", help="chooses the best epoch")
    add("--early-stop", type=count, default=0, help="stalled epochs to wait; 0: never")


def add_run_flags(parser: ArgumentParser) -> None:
    """Add where to train, and what to keep."""
    seed = number(int, 0, 2**63 - 1)
    precisions = ["auto", *alasa.DTYPES]
    add = parser.add_argument_group("run").add_argument
    add("--precision", choices=precisions, default="auto", help="auto: what is fast")
    add("--compile", action="store_true", help="use torch.compile")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--seed", type=seed, default=0, help="of all randomness")
    add("--out", default="runs", help="folder of the run's files")
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--overwrite", action="store_true", help="replace the run in --out")


def parse_args(argv: list[str] | None = None) -> Namespace:
    """Return the flags, by default the command line's, with all defaults filled in."""
    parser = make_parser()
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    is_demo = args.train_csv is None and args.valid_csv is None
    if is_demo:
        argv = DEMO_FLAGS.split() + argv
        args = parser.parse_args(argv)
        print("the demo is this command: python train.py", *argv, flush=True)
    if args.train_csv is None or args.valid_csv is None:
        parser.error("--train-csv and --valid-csv belong together")

    args.demo = is_demo
    alasa.input_preset(args.arch, args.weights)  # fails unless there is such a model
    pretrained = args.weights != "none"
    if args.freeze is None:
        args.freeze = 1 if pretrained else 0
    if args.lr is None:
        args.lr = 3e-5 if pretrained else 3e-4
    if args.head_lr is None:
        args.head_lr = 3e-3 if pretrained else args.lr
    if args.batch_norm is None:
        args.batch_norm = "keep" if pretrained else "train"
    if args.image_size is None:
        args.image_size = alasa.default_image_size(args.arch, args.weights)
    return args


def write_digits() -> None:
    """Write the demo's images as PNG files, and test.csv, valid.csv and train.csv."""
    from sklearn.datasets import load_digits  # here, as it takes a second to import

    digits = load_digits()
    os.makedirs("digits/images", exist_ok=True)
    names = []
    for index, grey in enumerate(digits.images):  # 0..16
        names.append(f"images/{index:04d}.png")
        pixels = (grey * 255 / 16).round().astype(np.uint8)
        Image.fromarray(pixels).save(f"digits/{names[-1]}")
    rows = pd.DataFrame({"image": names, "label": digits.target})
    rows = rows.sample(frac=1, random_state=0)
    splits = {"test": rows[:300], "valid": rows[300:600], "train": rows[600:]}
    for split, part in splits.items():
        with atomic_write(f"digits/{split}.csv") as file:
            part.to_csv(file, index=False)


def load_saved(args: Namespace) -> dict | None:
    """Return the checkpoint to resume, or None for a new run.

    AlasaError if that would replace another run than the demo.
    """
    last = f"{args.out}/last.pt"
    if args.resume:
        saved = alasa.load_checkpoint(last)
        if "optimizer" not in saved:
            raise AlasaError(f"{last}: has no optimizer: is it a copy of best.pt?")
        if alasa.best_epoch(saved["history"], args.monitor) > 0:
            # Better to fail now than to end without it.
            alasa.load_checkpoint(f"{args.out}/best.pt")
        return saved
    paths = [Path(args.out, name) for name in alasa.RUN_FILES]
    found = [path.name for path in paths if path.exists()]
    if found and not args.overwrite and not is_demo_run(last):
        what = f"{args.out} holds a run ({', '.join(found)})"
        raise AlasaError(f"{what}: --resume, --overwrite, or choose another --out")
    return None


def is_demo_run(path: str) -> bool:
    """Tell whether the demo trained this checkpoint."""
    return os.path.exists(path) and alasa.load_checkpoint(path)["args"].get("demo")


def make_run(
    args: Namespace,
    precision: str,
    train: pd.DataFrame,
    valid: pd.DataFrame,
    classes: list[str],
    saved: dict | None,
) -> dict:
    """Return what a checkpoint holds beside states: flags, classes, rows, history.

    AlasaError if a run to be resumed began with other flags or rows.
    """
    run = {"args": vars(args) | {"precision": precision}, "classes": classes}
    run["data"] = {"train": alasa.hash_rows(train), "valid": alasa.hash_rows(valid)}
    run["history"] = []
    if saved:
        check_same_run(saved, run)
        run["history"] = saved["history"]
    return run


def check_same_run(saved: dict, run: dict) -> None:
    """Raise AlasaError if a run to be resumed began with other flags or rows."""
    may_change = MAY_CHANGE
    if run["args"]["schedule"] == "cosine":
        may_change = MAY_CHANGE - {"epochs"}  # which the rates depend on
    for name, value in sorted(run["args"].items()):
        before = saved["args"].get(name)
        if name not in may_change and before != value:
            raise AlasaError(f"--resume: {name} was {before!r}, now {value!r}")
    for split, rows_hash in run["data"].items():
        if saved["data"][split] != rows_hash:
            raise AlasaError(
                f"--resume: --{split}-csv had other rows when the run began"
            )


def load_data(args: Namespace) -> tuple[pd.DataFrame, pd.DataFrame, list[str]]:
    """Return the rows of both splits, checked, and the names of the classes."""
    if args.demo:
        if alasa.get_rank() == 0 and not os.path.exists(DEMO_CSV):
            write_digits()
        alasa.all_gather(None)  # the others wait
    columns = args.image_column, args.label_column, args.image_root
    train = alasa.read_rows(args.train_csv, *columns)
    valid = alasa.read_rows(args.valid_csv, *columns)
    classes = alasa.check_splits(train, valid, args.monitor)
    counts = pd.DataFrame(index=classes)
    counts["train"] = train["label"].value_counts()
    counts["valid"] = valid["label"].value_counts()
    print0(counts.fillna(0).astype(int).to_string())
    if args.check_images:
        check_readable(pd.concat([train, valid]), args.workers)
    return train, valid, classes


def check_readable(frame: pd.DataFrame, workers: int) -> None:
    """Raise AlasaError with all images that cannot be read."""
    loader = alasa.make_loader(alasa.TolerantDataset(frame), 1, workers)
    errors = alasa.gather_batches([error for _, (error,) in loader])
    alasa.raise_if_any(filter(None, errors), shown=len(frame))


def make_datasets(
    train: pd.DataFrame, valid: pd.DataFrame, classes: list[str], args: Namespace
) -> tuple[AlasaDataset, AlasaDataset]:
    """Return the datasets of both splits, whose labels are class indices."""
    index_of = {name: index for index, name in enumerate(classes)}
    train = train.assign(label=train["label"].map(index_of))
    valid = valid.assign(label=valid["label"].map(index_of))
    augmented = alasa.make_transform(args.image_size, args.augment)
    plain = alasa.make_transform(args.image_size)
    train_set = AlasaDataset(train, "train", augmented, args.seed, args.balance)
    return train_set, AlasaDataset(valid, "valid", plain)


def make_loaders(
    train_set: AlasaDataset, valid_set: AlasaDataset, args: Namespace, device
) -> tuple[DataLoader, DataLoader]:
    """Return the loaders of both splits; say how many images each epoch leaves out."""
    size, workers = args.batch_size, args.workers
    world = alasa.get_world_size()
    if size < 2 * world:
        raise AlasaError(f"--batch-size: each of {world} processes needs 2 images")
    for_gpu = device.type == "cuda"
    train_loader = alasa.make_loader(train_set, size, workers, for_gpu)
    valid_loader = alasa.make_loader(valid_set, size, workers, for_gpu)
    used = sum(len(items) for items in train_loader.batch_sampler) * world
    if used == 0:
        raise AlasaError(f"{len(train_set)} training images are too few to train on")
    if used < len(train_set):
        print0(f"left out of each epoch: {len(train_set) - used}, too few for a batch")
    return train_loader, valid_loader


def make_model(args: Namespace, classes: list[str], saved: dict | None) -> nn.Module:
    """Return the model that the flags describe, or that of the run to be resumed."""
    if saved:
        return alasa.restore_model(saved)
    return alasa.build_model(
        args.arch,
        len(classes),
        args.weights,
        full_res_stem=args.full_res_stem,
        image_size=args.image_size,
        class_names=classes,
    )


def check_model(model: nn.Module, datasets: list[AlasaDataset], precision: str) -> None:
    """Raise AlasaError if the model cannot take the first image of each dataset."""
    for data in datasets:
        image, label = data[0]
        alasa.infer(model, [(image[None], [label])], precision)


def make_criterion(criterion, args: Namespace, device: torch.device):
    """Return the criterion, by default cross entropy, on the device."""
    if criterion is None:
        criterion = nn.CrossEntropyLoss(label_smoothing=args.label_smoothing)
    if isinstance(criterion, nn.Module):
        criterion.to(device)  # its class weights, for one
    return criterion


def make_optimizer(model: nn.Module, args: Namespace) -> torch.optim.Optimizer:
    """Return the optimizer, whose second group of parameters is the last layer."""
    head = alasa.find_head(model)
    backbone_group = {"params": [], "lr": args.lr}
    head_group = {"params": [], "lr": args.head_lr}
    for name, parameter in model.named_parameters():
        group = head_group if name.startswith(f"{head}.") else backbone_group
        group["params"].append(parameter)
    groups = [backbone_group, head_group]
    decay = args.weight_decay
    if args.optimizer == "adamw":
        return torch.optim.AdamW(groups, weight_decay=decay, fused=True)
    # Not fused: its momentum would stay uninitialised if fp16 skips the first step.
    return torch.optim.SGD(groups, args.lr, momentum=0.9, weight_decay=decay)


def learning_rate(optimizer: torch.optim.Optimizer, frozen: bool) -> float:
    """Return the backbone's rate, or the last layer's while that alone is trained."""
    backbone_group, head_group = optimizer.param_groups
    return head_group["lr"] if frozen else backbone_group["lr"]


def cosine_factor(step: int, steps: int) -> float:
    """Return what the rates are multiplied by in a step, counted from 0: they rise over
    the first tenth of all steps, and fall to 0 as half a cosine."""
    warm_up = max(1, steps // 10)
    if step < warm_up:
        return (step + 1) / warm_up
    done = (step - warm_up) / max(1, steps - warm_up)
    return (1 + math.cos(math.pi * done)) / 2


def make_scheduler(
    optimizer: torch.optim.Optimizer, args: Namespace, steps_per_epoch: int
):
    """Return what changes the learning rates."""
    if args.schedule == "cosine":
        steps = args.epochs * steps_per_epoch
        return LambdaLR(optimizer, partial(cosine_factor, steps=steps))
    return ReduceLROnPlateau(optimizer, "max", factor=0.5, patience=2, threshold=0)


def load_states(parts: dict, saved: dict | None) -> None:
    """Give each part the state that it had in the run to be resumed, if there is one."""
    if saved:
        for name, part in parts.items():
            part.load_state_dict(saved[name])


@contextlib.contextmanager
def naming_bad_images(loader: DataLoader, epoch: int) -> Iterator[None]:
    """Name the epoch and the images of a loss that is not finite."""
    try:
        yield
    except alasa.BadLoss as error:
        data = loader.dataset
        items = list(loader.batch_sampler)[error.step - 1]
        images = ", ".join(data.paths[int(data.rows[item])] for item in items)
        advice = "start again with lower rates, from --weights best.pt or none"
        what = f"epoch {epoch}: {error}, of {images}; {advice}"
        raise AlasaError(what) from error


def warn_of_flat_images(data: AlasaDataset) -> None:
    """Warn of images that decoded to nearly one colour, as wrongly scaled ones do."""
    rows = data.find_flat()
    if rows:
        first = f"first {data.places[rows[0]]}: {data.paths[rows[0]]}"
        print0(f"warning: {len(rows)} images are of nearly one colour, {first}")


def print_chance(criterion, train: AlasaDataset, valid: AlasaDataset, device) -> None:
    """Print what a model scores that knows only how frequent each class is in training."""
    frequencies = torch.tensor(train.labels).bincount() / len(train)
    logits = frequencies.log().expand(len(valid), -1)
    labels = torch.tensor(valid.labels)
    loss = alasa.total_loss(criterion, logits, labels, device)
    scores = {"loss": loss} | alasa.score(labels, logits)
    print0(f"chance: {alasa.describe(scores)}")


def save_batch(loader: DataLoader, classes: list[str], out: str) -> None:
    """Draw the first 16 images of the first batch as the model sees them."""
    if alasa.get_rank() > 0:
        return
    items = next(iter(loader.batch_sampler))[:16]
    images, titles = [], []
    for item in items:
        image, label = loader.dataset[item]
        images.append(image.permute(1, 2, 0).numpy())
        titles.append(alasa.short_name(classes[label]))
    figure = alasa.new_figure(8, 9)
    alasa.draw_images(figure, 4, images, titles)
    with atomic_write(f"{out}/batch.png") as file:
        figure.savefig(file, dpi=100)


def plot_history(history: list[dict[str, float]]):
    """Show the losses, the accuracies and the AUCs by epoch."""
    log = pd.DataFrame(history)
    figure = alasa.new_figure(12, 3.6, layout="constrained")
    panels = [
        ("loss", ["train_loss", "valid_loss"]),
        ("accuracy", ["train_accuracy", "valid_accuracy"]),
        ("area under the ROC curve", ["auc", "wauc"]),
    ]
    for axes, (name, columns) in zip(figure.subplots(1, 3), panels):
        axes.plot(log["epoch"], log[columns], marker=".", label=columns)
        axes.set(xlabel="epoch", ylabel=name)
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        axes.legend()
    return figure


def save_epoch(run: dict, parts: dict) -> None:
    """Write the files of the run; in its first epoch, delete a former run's checkpoints, as
    soon as there is room for the new ones.

    last.pt is written last: an epoch that was not saved whole is trained again.
    """
    if alasa.get_rank() > 0:
        return
    history, out = run["history"], run["args"]["out"]
    states = {name: part.state_dict() for name, part in parts.items()}
    is_best = alasa.best_epoch(history, run["args"]["monitor"]) == len(history)
    if is_best:
        with atomic_write(f"{out}/best.pt") as file:
            torch.save(run | {"model": states["model"]}, file)
            if len(history) == 1:  # a former last.pt must not go on beside this best.pt
                Path(out, "last.pt").unlink(missing_ok=True)
    elif len(history) == 1:
        Path(out, "last.pt").unlink(missing_ok=True)
        Path(out, "best.pt").unlink(missing_ok=True)
    with atomic_write(f"{out}/log.csv") as file:
        pd.DataFrame(history).to_csv(file, index=False, float_format="%.6g")
    with atomic_write(f"{out}/losses.png") as file:
        plot_history(history).savefig(file, dpi=120)
    with atomic_write(f"{out}/last.pt") as file:
        torch.save(run | states, file)


def print_best(history: list[dict[str, float]], args: Namespace) -> None:
    """Say which epoch is in best.pt."""
    best = alasa.best_epoch(history, args.monitor)
    if best == 0:
        print0(f"best: none yet, as no {args.monitor} was finite")
    else:
        print0(f"best: epoch {best}, in {args.out}/best.pt")


def main(args: Namespace, criterion: Callable | None = None) -> list[dict]:
    """Train as the flags say, write the files of the run, and return the rows of its log.

    criterion(logits [B, classes], labels [B]) is a mean loss, by default cross entropy.
    A resumed run needs the same.
    """
    device = alasa.start_process(args.device)
    precision = alasa.choose_precision(args.precision, device)
    with alasa.preserved_globals(), alasa.run_folder(args.out):
        saved = load_saved(args)
        alasa.seed_everything(args.seed)
        train, valid, classes = load_data(args)
        run = make_run(args, precision, train, valid, classes, saved)
        history = run["history"]  # what is appended to it is saved
        first_epoch = len(history) + 1

        train_set, valid_set = make_datasets(train, valid, classes, args)
        train_loader, valid_loader = make_loaders(train_set, valid_set, args, device)
        # Fork the workers before the heap grows: less is copied when it is written to.
        train_batches = alasa.begin_pass(train_loader, first_epoch)
        valid_batches = alasa.begin_pass(valid_loader, first_epoch)

        model = make_model(args, classes, saved).to(device)
        check_model(model, [train_set, valid_set], precision)
        criterion = make_criterion(criterion, args, device)
        optimizer = make_optimizer(model, args)
        scheduler = make_scheduler(optimizer, args, len(train_loader))
        scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        parts = {"optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
        load_states(parts, saved)
        run |= {"mean": model.mean, "std": model.std}
        if args.compile:
            # Not dynamic, as it would adapt to steps that a resumed run has not seen.
            model.compile(dynamic=False)

        world = alasa.get_world_size()
        print0(f"{args.arch} on {world} x {device.type}, {precision}")
        print_chance(criterion, train_set, valid_set, device)
        if first_epoch == 1:
            save_batch(train_loader, classes, args.out)

        for epoch in range(first_epoch, args.epochs + 1):
            # Before the epoch, as a resumed run may have stalled already.
            stalled = len(history) - alasa.best_epoch(history, args.monitor)
            if 0 < args.early_stop <= stalled:
                print0(f"no better {args.monitor} in {stalled} epochs: stopped early")
                break
            began = time.perf_counter()
            frozen = epoch <= args.freeze
            row = {"epoch": epoch, "lr": learning_rate(optimizer, frozen)}
            alasa.seed_everything(alasa.stable_hash(args.seed, epoch, alasa.get_rank()))
            alasa.set_frozen(model, frozen)
            with naming_bad_images(train_loader, epoch):
                row |= alasa.train_one_epoch(
                    model,
                    train_batches,
                    criterion,
                    optimizer,
                    scheduler if args.schedule == "cosine" else None,
                    scaler,
                    precision,
                    keep_batch_norm=args.batch_norm == "keep",
                )
            row |= alasa.evaluate(model, valid_batches, criterion, precision)
            if epoch < args.epochs:  # the workers read on while the epoch is saved
                train_batches = alasa.begin_pass(train_loader, epoch + 1)
                valid_batches = alasa.begin_pass(valid_loader, epoch + 1)
            row["seconds"] = time.perf_counter() - began
            row["images_per_second"] = (len(train) + len(valid)) / row["seconds"]
            history.append(row)
            if args.schedule == "plateau":
                # The best epoch's number, as of equal scores a lower loss is progress.
                scheduler.step(alasa.best_epoch(history, args.monitor))
            save_epoch(run, parts | {"model": model})
            print0(alasa.describe(row))
            if epoch == 1:
                warn_of_flat_images(train_set)
                warn_of_flat_images(valid_set)
        print_best(history, args)
        return history


if __name__ == "__main__":
    with alasa.as_script("; --resume goes on after the last epoch that was saved"):
        main(parse_args())
