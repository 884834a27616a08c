"""Fine-tune a pretrained classifier; keep the epoch with the best validation AUC.

python train.py                     # the demo: scikit-learn's handwritten digits
python train.py --train-csv train.csv --valid-csv valid.csv
python train.py --train-csv photos  # a folder or CSV only: a fifth of it validates
python train.py --resume            # goes on with the run in runs
torchrun --nproc-per-node=4 train.py --train-csv train.csv --valid-csv valid.csv
"""

import math
import os
import sys
import time
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau
from torch.utils.data import DataLoader

import alasa
from alasa import AlasaDataset, AlasaError, Draws, atomic_write, in_range, print0

DEMO_CSV = "digits/train.csv"
# Digits of 8x8 pixels: nothing to crop or mirror, and no pretrained weights to build on.
DEMO_FLAGS = f"--train-csv {DEMO_CSV} --valid-csv digits/valid.csv --image-size 16"
DEMO_FLAGS += " --augment none --arch shufflenet_v2_x0_5 --weights none --full-res-stem"
DEMO_FLAGS += " --epochs 4 --batch-size 64 --lr 0.02 --weight-decay 0.1"
DEMO_FLAGS += " --label-smoothing 0.1"

HELD_OUT = 0.2  # of each class, without --valid-csv
ALL_EPOCHS = 10**9
# Flags that may change when a run goes on, as no weight depends on them.
MAY_CHANGE = "train_csv valid_csv image_root check_images workers device early_stop"
MAY_CHANGE = {*MAY_CHANGE.split(), "out", "resume"}


def make_parser() -> ArgumentParser:
    """Return the parser of the flags; `parse_args` fills in the defaults None."""
    parser = ArgumentParser(
        description="Fine-tune a pretrained torchvision classifier; no data: the demo.",
        usage="%(prog)s [flags]; -h lists them",
        formatter_class=ArgumentDefaultsHelpFormatter,
    )
    add_data_flags(parser)
    add_training_flags(parser)
    return parser


def add_data_flags(parser: ArgumentParser) -> None:
    """Add what to train, on what, and where."""
    count = in_range(int, 0)
    workers = alasa.count_workers()
    add = parser.add_argument_group("data").add_argument
    add("--train-csv", help="images to train on: a CSV, or a folder of class folders")
    add("--valid-csv", help="images that choose the best epoch; None: a fifth of those")
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
    group = parser.add_argument_group("run")
    add = group.add_argument
    precisions = ["auto", *alasa.DTYPES]
    add("--precision", choices=precisions, default="auto", help="auto: what is fast")
    add("--compile", action="store_true", help="use torch.compile")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--seed", type=in_range(int, 0, 2**63 - 1), default=0, help="of all randomness")
    add("--out", default="runs", help="folder of the run's files")
    add = group.add_mutually_exclusive_group().add_argument
    add(
        "--resume", action="store_true", help="go on with the run in --out, as it began"
    )
    add("--overwrite", action="store_true", help="replace the run in --out")


def add_training_flags(parser: ArgumentParser) -> None:
    """Add how to train."""
    count, share = in_range(int, 0), in_range(float, 0, 1)
    rate = in_range(float, 0, sys.float_info.max)
    freeze = {"nargs": "?", "const": ALL_EPOCHS, "metavar": "N"}  # the flag without N
    freeze_help = "epochs of the last layer alone; no N: all; None: 1, from scratch 0"
    batch_norm_help = (
        "statistics of the weights, or new; None: keep, from scratch train"
    )
    schedule_help = (
        "of the rates: halved when the score stalls, or warm-up and cosine; "
    )
    schedule_help += "None: plateau, from scratch cosine"
    optimizers, schedules = ["adamw", "sgd"], ["plateau", "cosine"]
    monitors, statistics = alasa.MONITORS, ["keep", "train"]
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=in_range(int, 1), default=10, help="passes over the data")
    add("--batch-size", type=in_range(int, 2), default=32, help="over all processes")
    add("--freeze", type=count, help=freeze_help, **freeze)
    add("--lr", type=rate, help="learning rate; None: 3e-5, from scratch 2e-3")
    add("--head-lr", type=rate, help="of the last layer; None: 3e-3, from scratch --lr")
    add("--batch-norm", choices=statistics, help=batch_norm_help)
    add("--weight-decay", type=rate, default=0.01, help="of the optimizer")
    add("--optimizer", choices=optimizers, default="adamw", help="sgd: momentum 0.9")
    add("--schedule", choices=schedules, help=schedule_help)
    add("--label-smoothing", type=share, default=0.0, help="of the loss, 0..1")
    add("--monitor", choices=monitors, default="auc", help="chooses the best epoch")
    add("--early-stop", type=count, default=0, help="stalled epochs to wait; 0: never")


def parse_args(argv: list[str] | None = None) -> Namespace:
    """Return the flags, by default the command line's, with all defaults filled in."""
    parser = make_parser()
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    if args.resume:
        return parse_resumed(parser, argv, args.out)
    args.demo = args.train_csv is None
    if args.demo:
        if args.valid_csv:
            parser.error("--valid-csv needs --train-csv")
        argv = DEMO_FLAGS.split() + argv
        parser.parse_args(argv, args)
        print("the demo is this command: python train.py", *argv, flush=True)
    preset = alasa.input_preset(args.arch, args.weights)
    if args.image_size is None:  # vision transformers take one size only
        args.image_size = preset.crop_size[0] if args.arch.startswith("vit_") else 224
    defaults = {"freeze": 1, "lr": 3e-5, "head_lr": 3e-3}
    defaults |= {"batch_norm": "keep", "schedule": "plateau"}
    if args.weights == "none":
        lr = 2e-3 if args.lr is None else args.lr
        defaults = {"freeze": 0, "lr": lr, "head_lr": lr}
        defaults |= {"batch_norm": "train", "schedule": "cosine"}
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def parse_resumed(parser: ArgumentParser, argv: list[str], out: str) -> Namespace:
    """Return the flags of the run in `out`; AlasaError for one that may not change."""
    way_on = f"for another run, begin with --weights {out}/best.pt --out again"
    for name in ("last.pt", "best.pt"):
        if not os.path.exists(f"{out}/{name}"):
            raise AlasaError(f"--resume: there is no {out}/{name}; {way_on}")
    before = alasa.load_checkpoint(f"{out}/last.pt")["args"]
    before |= {"out": out, "resume": True}
    parser.set_defaults(**before)
    args = parser.parse_args(argv)
    may_change = MAY_CHANGE
    if args.schedule == "plateau":  # a cosine depends on the number of epochs
        may_change = MAY_CHANGE | {"epochs"}
    for name, value in vars(args).items():
        if value != before[name] and name not in may_change:
            was = f"--resume: {name} was {before[name]!r}, now {value!r}"
            raise AlasaError(f"{was}; {way_on}")
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
    """Return the checkpoint to resume, or None for a new run; AlasaError if that would
    replace another run than the demo."""
    last = f"{args.out}/last.pt"
    if args.resume:
        return alasa.load_checkpoint(last)
    if os.path.exists(last) and not args.overwrite:
        is_demo = alasa.load_checkpoint(last)["args"]["demo"]
        if not is_demo:
            what = f"{args.out} holds a run"
            raise AlasaError(f"{what}: --resume, --overwrite, or choose another --out")
    return None


def load_data(args: Namespace) -> tuple[pd.DataFrame, pd.DataFrame, list[str]]:
    """Return the rows of both splits, with class indices as labels, and the class names."""
    if args.demo:
        if alasa.get_rank() == 0 and not os.path.exists(DEMO_CSV):
            write_digits()
        alasa.gather_batches([])  # the others wait
    columns = args.image_column, args.label_column, args.image_root
    train = alasa.read_rows(args.train_csv, *columns, needs_labels=True)
    if args.valid_csv is None:
        train, valid = alasa.hold_out(train, HELD_OUT, args.seed)
        both = len(train) + len(valid)
        print0(f"a fifth of each class validates: {len(valid)} of {both} images")
    else:
        valid = alasa.read_rows(args.valid_csv, *columns, needs_labels=True)
    classes = alasa.check_splits(train, valid, args.monitor)
    counts = pd.DataFrame(index=classes)
    counts["train"] = train["label"].value_counts()
    counts["valid"] = valid["label"].value_counts()
    print0(counts.fillna(0).astype(int).to_string())
    if args.check_images:
        check_readable(pd.concat([train, valid]), args.workers)
    index_of = {name: index for index, name in enumerate(classes)}
    train = train.assign(label=train["label"].map(index_of))
    valid = valid.assign(label=valid["label"].map(index_of))
    return train, valid, classes


def check_readable(frame: pd.DataFrame, workers: int) -> None:
    """Print which images cannot be read; AlasaError if there are any."""
    loader = alasa.make_loader(alasa.TolerantDataset(frame), 1, None, workers)
    errors = alasa.gather_batches([error for _, (error,) in loader])
    bad = [error for error in errors if error]
    for error in bad:
        print0(error)
    if bad:
        raise AlasaError(f"{len(bad)} of {len(frame)} images cannot be read")


def make_loaders(
    train: pd.DataFrame, valid: pd.DataFrame, args: Namespace, device
) -> tuple[DataLoader, DataLoader]:
    """Return the loaders of both splits; say how many images each epoch leaves out."""
    size, workers, world = args.batch_size, args.workers, alasa.get_world_size()
    if size < 2 * world:
        raise AlasaError(f"--batch-size: each of {world} processes needs 2 images")
    augmented = alasa.make_transform(args.image_size, args.augment)
    plain = alasa.make_transform(args.image_size)
    train_set = AlasaDataset(train, "train", augmented, args.image_size)
    valid_set = AlasaDataset(valid, "valid", plain, args.image_size)
    draws = Draws(train_set.labels, args.seed, args.balance)
    for_gpu = device.type == "cuda"
    train_loader = alasa.make_loader(train_set, size, draws, workers, for_gpu)
    valid_loader = alasa.make_loader(valid_set, size, None, workers, for_gpu)
    used = sum(len(items) for items in train_loader.batch_sampler) * world
    if used == 0:
        raise AlasaError(f"{len(train_set)} training images are too few to train on")
    if used < len(train_set):
        print0(f"left out of each epoch: {len(train_set) - used}, too few for a batch")
    return train_loader, valid_loader


def make_model(
    args: Namespace, classes: list[str], saved: dict | None, device
) -> alasa.Classifier:
    """Return the model that the flags describe, or that of the run to be resumed."""
    if saved:
        model = alasa.restore_model(saved, device)
    else:
        stem = args.full_res_stem
        model = alasa.build_model(
            args.arch, len(classes), args.weights, stem, classes, device
        )
    model.precision = args.precision
    if args.compile:
        # Not dynamic, as it would adapt to steps that a resumed run has not seen.
        model.compile(dynamic=False)
    return model


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
    images, titles = [], []
    for item in next(iter(loader.batch_sampler))[:16]:
        image, label = loader.dataset[item]
        images.append(image.permute(1, 2, 0).numpy())
        titles.append(classes[label])
    figure = Figure(figsize=(8, 9))
    alasa.draw_images(figure, 4, images, titles)
    os.makedirs(out, exist_ok=True)
    with atomic_write(f"{out}/batch.png") as file:
        figure.savefig(file, dpi=100)


def plot_history(history: list[dict[str, float]]) -> Figure:
    """Show the losses, the accuracies and the AUCs by epoch."""
    log = pd.DataFrame(history)
    figure = Figure(figsize=(12, 3.6), layout="constrained")
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


def save_held_out(valid: pd.DataFrame, classes: list[str], args: Namespace) -> None:
    """Write the rows that validate, for `predict.py --test-csv`."""
    rows = pd.DataFrame()
    rows[args.image_column] = valid["path"].map(os.path.abspath)
    rows[args.label_column] = [classes[index] for index in valid["label"]]
    with atomic_write(f"{args.out}/valid.csv") as file:
        rows.to_csv(file, index=False)


def time_saved(out: str) -> int | None:
    """Return when last.pt was written, None if there is none."""
    last = Path(out, "last.pt")
    return last.stat().st_mtime_ns if last.exists() else None


def save_epoch(run: dict, parts: dict, last_saved: int | None) -> int | None:
    """Write the files of the run, and return when; AlasaError if another run has saved there
    since this one did.

    last.pt is written last: an epoch that was not saved whole is trained again.
    """
    history, out = run["history"], run["args"]["out"]
    best, last = Path(out, "best.pt"), Path(out, "last.pt")
    if time_saved(out) != last_saved:
        raise AlasaError(f"{out}: another run is saving there; choose another --out")
    states = {name: part.state_dict() for name, part in parts.items()}
    if alasa.best_epoch(history, run["args"]["monitor"]) == len(history):
        with atomic_write(best) as file:
            torch.save(run | {"model": states["model"]}, file)
            if len(history) == 1:
                # There is room: a former run's last.pt must not go on beside this best.pt.
                last.unlink(missing_ok=True)
    elif len(history) == 1:
        best.unlink(missing_ok=True)
    with atomic_write(f"{out}/log.csv") as file:
        pd.DataFrame(history).to_csv(file, index=False, float_format="%.6g")
    with atomic_write(f"{out}/losses.png") as file:
        plot_history(history).savefig(file, dpi=120)
    with atomic_write(last) as file:
        torch.save(run | states, file)
    return time_saved(out)


def main(args: Namespace, criterion: Callable | None = None) -> list[dict]:
    """Train as the flags say, write the files of the run, and return the rows of its log.

    criterion(logits [B, classes], labels [B]) is a mean loss, by default cross entropy.
    A resumed run needs the same.  All generators are seeded anew: `alasa.seed_everything`.
    """
    device = alasa.start_process(args.device)
    args.precision = alasa.choose_precision(args.precision, device, args.image_size)
    saved = load_saved(args)
    last_saved = time_saved(args.out)
    alasa.seed_everything(args.seed)
    train, valid, classes = load_data(args)
    columns = [train["image"], train["label"], valid["image"], valid["label"]]
    rows_hash = alasa.stable_hash(*[column.tolist() for column in columns])
    if saved and saved["rows_hash"] != rows_hash:
        raise AlasaError("--resume: the images had other names or labels in this run")
    train_loader, valid_loader = make_loaders(train, valid, args, device)
    history = saved["history"] if saved else []
    first_epoch = len(history) + 1
    # Fork the workers before the heap grows: less is copied when it is written to.
    draws = train_loader.batch_sampler.sampler
    draws.epoch = first_epoch
    train_batches, valid_batches = iter(train_loader), iter(valid_loader)

    model = make_model(args, classes, saved, device)
    criterion = criterion or nn.CrossEntropyLoss(label_smoothing=args.label_smoothing)
    if isinstance(criterion, nn.Module):
        criterion.to(device)  # its class weights, for one
    optimizer = make_optimizer(model, args)
    scheduler = make_scheduler(optimizer, args, len(train_loader))
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
    parts = {"optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
    if saved:
        for name, part in parts.items():
            part.load_state_dict(saved[name])
    parts["model"] = model.net
    run = {"args": vars(args), "classes": classes, "history": history}
    run |= {"rows_hash": rows_hash, "mean": model.mean, "std": model.std}

    print0(f"{args.arch} on {alasa.get_world_size()} x {device}, {args.precision}")
    print_chance(criterion, train_loader.dataset, valid_loader.dataset, device)
    if first_epoch == 1 and alasa.get_rank() == 0:
        save_batch(train_loader, classes, args.out)
        if args.valid_csv is None:
            save_held_out(valid, classes, args)
    if first_epoch > args.epochs:
        longer = "--resume --epochs N trains longer"
        if args.schedule == "cosine":  # it has fallen to zero
            longer = f"--weights {args.out}/best.pt --out again trains on"
        print0(f"all {args.epochs} epochs are done; {longer}")

    for epoch in range(first_epoch, args.epochs + 1):
        # Before the epoch, as a resumed run may have stalled already.
        stalled = len(history) - alasa.best_epoch(history, args.monitor)
        if 0 < args.early_stop <= stalled:
            print0(f"no better {args.monitor} in {stalled} epochs: stopped early")
            break
        began = time.perf_counter()
        frozen = epoch <= args.freeze
        backbone_group, head_group = optimizer.param_groups
        row = {"epoch": epoch, "lr": (head_group if frozen else backbone_group)["lr"]}
        alasa.seed_everything(alasa.stable_hash(args.seed, epoch, alasa.get_rank()))
        alasa.set_frozen(model, frozen)
        row |= alasa.train_one_epoch(
            model,
            train_batches,
            criterion,
            optimizer,
            scheduler if args.schedule == "cosine" else None,
            scaler,
            keep_batch_norm=args.batch_norm == "keep",
            name=f"epoch {epoch}",
        )
        row |= alasa.evaluate(model, valid_batches, criterion)
        if epoch < args.epochs:  # the workers read on while the epoch is saved
            draws.epoch = epoch + 1
            train_batches, valid_batches = iter(train_loader), iter(valid_loader)
        row["seconds"] = time.perf_counter() - began
        row["images_per_second"] = (len(train) + len(valid)) / row["seconds"]
        history.append(row)
        if args.schedule == "plateau":
            # The best epoch's number, as of equal scores a lower loss is progress.
            scheduler.step(alasa.best_epoch(history, args.monitor))
        if alasa.get_rank() == 0:
            last_saved = save_epoch(run, parts, last_saved)
        print0(alasa.describe(row))
    best = alasa.best_epoch(history, args.monitor)
    print0(f"best: epoch {best}, in {args.out}/best.pt")
    return history


if __name__ == "__main__":
    with alasa.as_script("; --resume goes on after the last epoch that was saved"):
        main(parse_args())
