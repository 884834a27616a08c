"""Fine-tune a pretrained classifier; keep the epoch with the best validation AUC.

python train.py                     # the demo: scikit-learn's handwritten digits
python train.py --train-csv train.csv --valid-csv valid.csv
python train.py --train-csv photos/train --valid-csv photos/val
torchrun --nproc-per-node=4 train.py --train-csv train.csv --valid-csv valid.csv
"""

import contextlib
import os
import sys
import time
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure  # not pyplot, which may want a display
from PIL import Image
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau
from torch.utils.data import DataLoader

import alasa
from alasa import AlasaDataset, AlasaError, atomic_write, print0

DEMO_CSV = "digits/train.csv"
# Upright figures of 8x8 pixels: nothing to crop or mirror, and no ImageNet to build on.
DEMO_FLAGS = f"--train-csv {DEMO_CSV} --valid-csv digits/valid.csv --image-size 32"
DEMO_FLAGS += " --augment none --weights none --batch-size 64 --epochs 8"

# A resumed run may change these flags: by themselves they move no weight.
MAY_CHANGE = {"train_csv", "valid_csv", "image_root", "image_column", "label_column"}
MAY_CHANGE |= {"workers", "device", "early_stop", "check_images"}
MAY_CHANGE |= {"epochs", "out", "resume", "overwrite"}


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(
        description="Fine-tune a pretrained torchvision classifier; without data, the demo.",
        formatter_class=ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument_group("data").add_argument
    add("--train-csv", help="images to train on: a CSV, or a folder of class folders")
    add("--valid-csv", help="images that choose the best epoch: likewise")
    add("--image-column", default="image", help="column of image files")
    add("--label-column", default="label", help="column of labels, text or integers")
    add("--image-root", help="where relative images start; None: at the CSV's folder")
    add("--image-size", type=int, help="pixels; 0: native; None: 224, or a ViT's own")
    add(
        "--augment",
        choices=alasa.VIEWS,
        default="crop",
        help="random views to train on",
    )
    add("--balance", action="store_true", help="draw all classes equally often")
    add("--check-images", action="store_true", help="decode all images before training")
    add(
        "--workers",
        type=int,
        default=alasa.count_workers(),
        help="to decode, per split",
    )
    add = parser.add_argument_group("model").add_argument
    add("--arch", default="resnet18", help="any torchvision classifier")
    add("--weights", default="DEFAULT", help="torchvision's name, a file, or none")
    add("--full-res-stem", action="store_true", help="stride 1 in the first layers")
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=int, default=10, help="passes over the data, in all")
    add("--batch-size", type=int, default=32, help="over all processes")
    freeze = "epochs that train the last layer alone; without a number: all; "
    freeze += "None: 1, from scratch 0"
    add("--freeze", type=int, nargs="?", const=10**9, metavar="EPOCHS", help=freeze)
    add("--lr", type=float, help="learning rate; None: 3e-5, from scratch 1e-3")
    add(
        "--head-lr", type=float, help="of the last layer; None: 3e-3, from scratch --lr"
    )
    keep = "statistics of batch normalisation; None: keep, from scratch train"
    add("--batch-norm", choices=["keep", "train"], help=keep)
    add("--weight-decay", type=float, default=0.01, help="of the optimizer")
    add(
        "--optimizer",
        choices=["adamw", "sgd"],
        default="adamw",
        help="sgd: momentum 0.9",
    )
    schedule = "of the rates: halved when the score stalls, or warm-up and cosine"
    add("--schedule", choices=["plateau", "cosine"], default="plateau", help=schedule)
    add("--label-smoothing", type=float, default=0.0, help="of the loss, 0..1")
    monitors = ["auc", "wauc", "accuracy"]
    add("--monitor", choices=monitors, default="auc", help="what makes an epoch best")
    add("--early-stop", type=int, default=0, help="stalled epochs to wait; 0: for ever")
    add = parser.add_argument_group("run").add_argument
    precisions = ["auto", *alasa.DTYPES]
    add("--precision", choices=precisions, default="auto", help="auto: what is fast")
    add("--compile", action="store_true", help="use torch.compile")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--seed", type=int, default=0, help="of all randomness")
    add("--out", default="runs", help="folder of the run's files")
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--overwrite", action="store_true", help="replace the run in --out")
    return parser


def parse_args(argv: list[str] | None = None) -> Namespace:
    """Return the flags, by default those of the command line, with all defaults filled in."""
    parser = make_parser()
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    if args.train_csv is None and args.valid_csv is None:
        argv = DEMO_FLAGS.split() + argv
        args = parser.parse_args(argv)
        print("the demo is this command: python train.py", *argv, flush=True)
    if args.train_csv is None or args.valid_csv is None:
        parser.error("--train-csv and --valid-csv belong together")

    least = {"epochs": 1, "batch_size": 2}
    for name, value in vars(args).items():
        is_number = isinstance(value, int | float)
        if is_number and not least.get(name, 0) <= value < float("inf"):
            parser.error(f"--{name.replace('_', '-')} {value} is out of range")
    if args.label_smoothing > 1:
        parser.error("--label-smoothing is at most 1")

    pretrained = args.weights != "none"
    if args.freeze is None:
        args.freeze = 1 if pretrained else 0
    if args.lr is None:
        args.lr = 3e-5 if pretrained else 1e-3
    if args.head_lr is None:
        args.head_lr = 3e-3 if pretrained else args.lr
    if args.batch_norm is None:
        args.batch_norm = "keep" if pretrained else "train"
    if args.image_size is None:
        args.image_size = alasa.default_image_size(args.arch, args.weights)
    return args


def write_digits() -> None:
    """Write the demo's images as PNG files, and test.csv, valid.csv and train.csv."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    os.makedirs("digits/images", exist_ok=True)
    names = []
    for number, grey in enumerate(digits.images):  # 0..16
        names.append(f"images/{number:04d}.png")
        pixels = (grey * 255 / 16).round().astype(np.uint8)
        Image.fromarray(pixels).save(f"digits/{names[-1]}")
    rows = pd.DataFrame({"image": names, "label": digits.target})
    rows = rows.sample(frac=1, random_state=0)
    rows[:300].to_csv("digits/test.csv", index=False)
    rows[300:600].to_csv("digits/valid.csv", index=False)
    rows[600:].to_csv(DEMO_CSV, index=False)


def load_saved(args: Namespace) -> dict | None:
    """Return the checkpoint to resume, None for a new run; AlasaError if it would replace
    another run, unless the demo replaces its own."""
    last, best = f"{args.out}/last.pt", f"{args.out}/best.pt"
    if args.resume:
        saved = alasa.load_checkpoint(last)
        if alasa.best_epoch(saved["history"], args.monitor) > 0:
            alasa.load_checkpoint(best)  # or its loss would go unseen
        return saved
    found = [path for path in (last, best) if os.path.exists(path)]
    if not found or args.overwrite:
        return None
    if args.train_csv == DEMO_CSV and os.path.exists(last):
        with contextlib.suppress(AlasaError):
            if alasa.load_checkpoint(last)["args"]["train_csv"] == DEMO_CSV:
                return None
    what = f"{args.out} holds a run ({', '.join(found)})"
    raise AlasaError(f"{what}: --resume, --overwrite, or choose another --out")


def make_run(
    args: Namespace,
    train: pd.DataFrame,
    valid: pd.DataFrame,
    classes: list[str],
    saved: dict | None,
) -> dict:
    """Return what a checkpoint tells of a run beside its states.

    AlasaError if a run to be resumed began with other flags or rows.
    """
    data = {"train": alasa.hash_rows(train), "valid": alasa.hash_rows(valid)}
    run = {"args": vars(args).copy(), "classes": classes, "data": data, "history": []}
    if saved is None:
        return run
    may_change = MAY_CHANGE
    if args.schedule == "cosine":
        may_change = MAY_CHANGE - {"epochs"}  # which the rates depend on
    for name, value in sorted(vars(args).items()):
        before = saved["args"].get(name)
        if name not in may_change and before != value:
            raise AlasaError(f"--resume: {name} was {before!r}, now {value!r}")
    for split, rows in data.items():
        if saved["data"][split] != rows:
            raise AlasaError(
                f"--resume: --{split}-csv had other rows when the run began"
            )
    run["history"] = saved["history"]
    return run


def check_readable(data: AlasaDataset, workers: int) -> None:
    """Raise AlasaError with all images that cannot be read."""
    frame = pd.DataFrame({"image": data.paths}, index=data.places)
    every_image = alasa.TolerantDataset(frame, data.transform)
    faults = []
    for _, errors in alasa.make_loader(every_image, 1, workers):
        faults += filter(None, errors)
    alasa.refuse(faults, most=len(data))


def print_classes(train: pd.DataFrame, valid: pd.DataFrame, classes: list[str]) -> None:
    counts = pd.DataFrame(index=classes)
    counts["train"] = train["label"].value_counts()
    counts["valid"] = valid["label"].value_counts()
    print0(counts.fillna(0).astype(int).to_string())


def print_chance(criterion, train: AlasaDataset, valid: AlasaDataset, device) -> None:
    """Print what a model scores that knows only how frequent each class is in training."""
    frequencies = torch.tensor(train.labels).bincount() / len(train)
    logits = frequencies.log().expand(len(valid), -1)
    labels = torch.tensor(valid.labels)
    loss = alasa.compute_loss(criterion, logits, labels, device)
    print0(f"chance: {alasa.describe({'loss': loss} | alasa.score(labels, logits))}")


def make_optimizer(model: nn.Module, args: Namespace) -> torch.optim.Optimizer:
    """Return the optimizer, whose second group of parameters is the last layer."""
    head = list(model.get_submodule(alasa.find_head(model)).parameters())
    backbone = [p for p in model.parameters() if all(p is not other for other in head)]
    groups = [{"params": backbone, "lr": args.lr}]
    groups.append({"params": head, "lr": args.head_lr})
    if args.optimizer == "adamw":
        decay = args.weight_decay
        return torch.optim.AdamW(groups, weight_decay=decay, fused=True)
    # Not fused: its momentum would stay uninitialised if fp16 skips the first step.
    return torch.optim.SGD(groups, momentum=0.9, weight_decay=args.weight_decay)


def make_scheduler(optimizer: torch.optim.Optimizer, args: Namespace, steps: int):
    """Return what changes the learning rates in an epoch of so many steps."""
    if args.schedule == "plateau":
        # It is told the number of the best epoch so far, which rises with each better one.
        return ReduceLROnPlateau(
            optimizer, mode="max", factor=0.5, patience=2, threshold=0
        )
    rates = [args.lr, args.head_lr]
    return OneCycleLR(
        optimizer,
        rates,
        total_steps=args.epochs * steps,
        pct_start=0.1,
        cycle_momentum=False,
    )


@contextlib.contextmanager
def naming_bad_images(loader: DataLoader, epoch: int) -> Iterator[None]:
    """Tell of a loss that is not finite in which epoch and for which images it was so."""
    try:
        yield
    except alasa.BadLoss as error:
        rows = list(loader.batch_sampler)[error.step]
        data = loader.dataset
        images = ", ".join(data.paths[data.rows[row]] for row in rows)
        advice = (
            "go on with --weights FILE of a whole epoch, a lower --lr, another --out"
        )
        what = f"epoch {epoch}: the loss became {error.loss} for {images}; {advice}"
        raise AlasaError(what) from error


def warn_of_flat_images(data: AlasaDataset) -> None:
    """Warn of images that decoded to nearly one colour, as wrongly scaled ones do."""
    flat = torch.stack(alasa.all_gather(data.flat)).any(dim=0)
    rows = flat.nonzero().flatten().tolist()
    if rows:
        first = f"first {data.places[rows[0]]}: {data.paths[rows[0]]}"
        print0(f"warning: {len(rows)} images are of nearly one colour, {first}")


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
    figure = Figure(figsize=(8, 8.5), layout="constrained")
    alasa.draw_images(figure, 4, images, titles)
    with atomic_write(f"{out}/batch.png") as file:
        figure.savefig(file, dpi=100)


def plot_history(history: list[dict[str, float]]) -> Figure:
    """Show the losses, the accuracies and the AUCs by epoch."""
    log = pd.DataFrame(history)
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    panels = {left: ("loss", ["train_loss", "valid_loss"])}
    panels[middle] = ("accuracy", ["train_accuracy", "valid_accuracy"])
    panels[right] = ("area under the ROC curve", ["auc", "wauc"])
    for axes, (name, columns) in panels.items():
        axes.plot(log["epoch"], log[columns], marker=".", label=columns)
        axes.set(xlabel="epoch", ylabel=name)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend()
    return figure


def print_best(history: list[dict[str, float]], args: Namespace) -> None:
    best = alasa.best_epoch(history, args.monitor)
    if best == 0:
        print0(f"best: none yet, as no {args.monitor} was finite")
    else:
        print0(f"best: epoch {best}, in {args.out}/best.pt")


def save_epoch(run: dict, parts: dict) -> None:
    """Write the files of the run.  last.pt comes last: what it lacks is done again."""
    if alasa.get_rank() > 0:
        return
    history, out = run["history"], run["args"]["out"]
    states = {name: part.state_dict() for name, part in parts.items()}
    if len(history) == 1:
        for name in ("best.pt", "last.pt"):  # of a run that this one replaces
            Path(out, name).unlink(missing_ok=True)
    if alasa.best_epoch(history, run["args"]["monitor"]) == len(history):
        with atomic_write(f"{out}/best.pt") as file:
            torch.save(run | {"model": states["model"]}, file)
    with atomic_write(f"{out}/log.csv") as file:
        pd.DataFrame(history).to_csv(file, index=False, float_format="%.6g")
    with atomic_write(f"{out}/losses.png") as file:
        plot_history(history).savefig(file, dpi=120)
    with atomic_write(f"{out}/last.pt") as file:
        torch.save(run | states, file)


def load_data(args: Namespace) -> tuple[pd.DataFrame, pd.DataFrame, list[str]]:
    """Return the rows of both splits, checked, and the names of the classes."""
    if args.train_csv == DEMO_CSV and not os.path.exists(DEMO_CSV):
        write_digits()
    columns = args.image_column, args.label_column, args.image_root
    train = alasa.read_rows(args.train_csv, *columns)
    valid = alasa.read_rows(args.valid_csv, *columns)
    classes = alasa.check_splits(train, valid, args.monitor)
    print_classes(train, valid, classes)
    return train, valid, classes


def make_datasets(
    train: pd.DataFrame, valid: pd.DataFrame, classes: list[str], args: Namespace
) -> tuple[AlasaDataset, AlasaDataset]:
    """Return the datasets of both splits, whose labels are numbers of classes."""
    number_of = {name: number for number, name in enumerate(classes)}
    train = train.assign(label=train["label"].map(number_of))
    valid = valid.assign(label=valid["label"].map(number_of))
    augmented = alasa.make_transform(args.image_size, args.augment)
    plain = alasa.make_transform(args.image_size)
    train_set = AlasaDataset(train, "train", augmented, args.seed, args.balance)
    valid_set = AlasaDataset(valid, "valid", plain)
    if args.check_images:
        check_readable(train_set, args.workers)
        check_readable(valid_set, args.workers)
    return train_set, valid_set


def make_loaders(
    train_set: AlasaDataset, valid_set: AlasaDataset, args: Namespace, device
) -> tuple[DataLoader, DataLoader]:
    """Return the loaders of both splits; say how many images each epoch leaves out."""
    world = alasa.get_world_size()
    if args.batch_size < 2 * world:
        raise AlasaError(f"--batch-size: each of {world} processes needs 2 images")
    how = args.batch_size, args.workers, device.type == "cuda"
    train_loader = alasa.make_loader(train_set, *how)
    valid_loader = alasa.make_loader(valid_set, *how)
    seen = sum(len(items) for items in train_loader.batch_sampler) * world
    if seen == 0:
        raise AlasaError(f"{len(train_set)} training images are too few to train on")
    if seen < len(train_set):
        print0(f"left out of each epoch: {len(train_set) - seen}, too few for a batch")
    return train_loader, valid_loader


def make_model(args: Namespace, classes: list[str], saved: dict | None) -> nn.Module:
    """Return the model that `args` describe, with the weights of a run to be resumed."""
    model = alasa.build_model(
        args.arch,
        len(classes),
        "none" if saved else args.weights,
        full_res_stem=args.full_res_stem,
        image_size=args.image_size,
        class_names=classes,
    )
    if saved:
        model.mean, model.std = saved["mean"], saved["std"]
    return model


def main(args: Namespace, criterion: nn.Module | None = None) -> list[dict]:
    """Train as the flags say, write the files of the run, and return the rows of its log.

    criterion(logits [B, classes], labels [B]) is a mean loss, by default cross entropy.
    A resumed run needs the same.
    """
    device = alasa.start_device(args.device)
    if args.precision == "auto":
        args.precision = alasa.choose_precision(device)
    with alasa.preserved_globals(), alasa.run_folder(args.out):
        saved = load_saved(args)
        alasa.seed_everything(args.seed)
        train, valid, classes = load_data(args)
        run = make_run(args, train, valid, classes, saved)
        history = run["history"]
        first = len(history) + 1

        train_set, valid_set = make_datasets(train, valid, classes, args)
        train_loader, valid_loader = make_loaders(train_set, valid_set, args, device)
        # Workers start here: forked later, they would share a grown heap, page by page.
        train_batches = alasa.begin_pass(train_loader, first)
        valid_batches = alasa.begin_pass(valid_loader, first)

        model = make_model(args, classes, saved).to(device)
        image, _ = valid_set[0]
        with alasa.explain(f"{args.arch} cannot take such images"):
            alasa.infer(model, [image[None]], args.precision)
        if criterion is None:
            criterion = nn.CrossEntropyLoss(label_smoothing=args.label_smoothing)
        optimizer = make_optimizer(model, args)
        scheduler = make_scheduler(optimizer, args, len(train_loader))
        scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
        # These have all the state of a run, beside its history.
        parts = {"model": model, "optimizer": optimizer}
        parts |= {"scheduler": scheduler, "scaler": scaler}
        if saved:
            for name, part in parts.items():
                part.load_state_dict(saved[name])
        run |= {"mean": model.mean, "std": model.std}
        if args.compile:
            model.compile(
                dynamic=False
            )  # or it adapts to what a resumed run has not seen

        world = alasa.get_world_size()
        print0(f"{args.arch} on {world} x {device.type}, {args.precision}")
        print_chance(criterion, train_set, valid_set, device)
        if first == 1:
            save_batch(train_loader, classes, args.out)
        for epoch in range(first, args.epochs + 1):
            stalled = len(history) - alasa.best_epoch(history, args.monitor)
            if 0 < args.early_stop <= stalled:
                print0(f"no better {args.monitor} in {stalled} epochs: stopped early")
                break
            began = time.perf_counter()
            row = {"epoch": epoch, "lr": optimizer.param_groups[0]["lr"]}
            alasa.seed_everything(alasa.derive_seed(args.seed, epoch, alasa.get_rank()))
            alasa.set_frozen(model, epoch <= args.freeze)
            with naming_bad_images(train_loader, epoch):
                row |= alasa.train_one_epoch(
                    model,
                    train_batches,
                    criterion,
                    optimizer,
                    scheduler if args.schedule == "cosine" else None,
                    scaler,
                    args.precision,
                    keep_batch_norm=args.batch_norm == "keep",
                )
            train_batches = alasa.begin_pass(train_loader, epoch + 1)  # reads ahead
            row |= alasa.evaluate(model, valid_batches, criterion, args.precision)
            valid_batches = alasa.begin_pass(valid_loader, epoch + 1)
            row["seconds"] = time.perf_counter() - began
            row["images_per_second"] = (len(train_set) + len(valid_set)) / row[
                "seconds"
            ]
            history.append(row)
            if args.schedule == "plateau":
                scheduler.step(alasa.best_epoch(history, args.monitor))
            save_epoch(run, parts)
            print0(alasa.describe(row))
            if epoch == 1:
                warn_of_flat_images(train_set)
                warn_of_flat_images(valid_set)
        print_best(history, args)
        return history


if __name__ == "__main__":
    with alasa.as_script():
        main(parse_args())
