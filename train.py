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

import pandas as pd
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau
from torch.utils.data import DataLoader

import alasa
from alasa import AlasaDataset, AlasaError, Draws, atomic_write, in_range, print0

# Digits of 8x8 pixels: nothing to crop or mirror, and no pretrained weights to build on.
DEMO_FLAGS = """--train-csv digits/train.csv --valid-csv digits/valid.csv --epochs 6
    --image-size 16 --augment none --arch shufflenet_v2_x0_5 --weights none
    --full-res-stem --batch-size 64 --lr 0.02 --weight-decay 0.1 --label-smoothing 0.1"""

ALL_EPOCHS = 10**9
# Flags that may change when a run goes on, as no weight depends on them.
MAY_CHANGE = "train_csv valid_csv image_root check_images workers device early_stop"


def make_parser() -> ArgumentParser:
    """Return the parser of the flags; `parse_args` fills in the defaults None."""
    parser = ArgumentParser(
        description="Fine-tune a pretrained torchvision classifier; no data: the demo.",
        usage="%(prog)s [flags]; -h lists them",
        formatter_class=ArgumentDefaultsHelpFormatter,
    )
    count = in_range(int, 0)
    workers = alasa.count_workers()
    add = parser.add_argument_group("data").add_argument
    add("--train-csv", help="images to train on: a CSV, or a folder of class folders")
    add("--valid-csv", help="images that choose the best epoch; None: a fifth of those")
    add("--image-column", default="image", help="column of image files")
    add("--label-column", default="label", help="column of labels, text or integers")
    add("--image-root", help="where relative images start; None: at the CSV's folder")
    add("--image-size", type=count, default=224, help="pixels; 0: native")
    add("--augment", choices=alasa.VIEWS, default="crop", help="random views, to train")
    add("--balance", action="store_true", help="draw all classes equally often")
    add("--check-images", action="store_true", help="decode all images before training")
    add("--workers", type=count, default=workers, help="decoding processes, per split")
    add = parser.add_argument_group("model").add_argument
    add("--arch", default="resnet18", help="any torchvision classifier")
    add("--weights", default="DEFAULT", help="torchvision's name, a file, or none")
    add("--full-res-stem", action="store_true", help="stride 1 in the first layers")
    add = parser.add_argument_group("run").add_argument
    precisions = ["auto", *alasa.DTYPES]
    add("--precision", choices=precisions, default="auto", help="auto: what is fast")
    add("--compile", action="store_true", help="use torch.compile")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--seed", type=in_range(int, 0, 2**63 - 1), default=0, help="of all randomness")
    add("--out", default="runs", help="folder of the run's files")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--overwrite", action="store_true", help="replace the run in --out")
    add_training_flags(parser)
    return parser


def add_training_flags(parser: ArgumentParser) -> None:
    """Add how to train."""
    count, share = in_range(int, 0), in_range(float, 0, 1)
    rate = in_range(float, 0, sys.float_info.max)
    freeze = {"nargs": "?", "const": ALL_EPOCHS, "metavar": "N"}  # the flag without N
    freeze_help = "epochs of the last layer alone; no N: all; from scratch 0"
    schedule_help = "halve rates on a stall, or warm up and fall; from scratch cosine"
    optimizers, schedules = ["adamw", "sgd"], ["plateau", "cosine"]
    monitors, statistics = alasa.MONITORS, ["keep", "train"]
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=in_range(int, 1), default=10, help="passes over the data")
    add("--batch-size", type=in_range(int, 2), default=32, help="over all processes")
    add("--freeze", type=count, default=1, help=freeze_help, **freeze)
    add("--lr", type=rate, default=3e-5, help="learning rate; from scratch 2e-3")
    add("--head-lr", type=rate, default=3e-3, help="last layer's; from scratch --lr")
    add("--batch-norm", choices=statistics, default="keep", help="from scratch train")
    add("--weight-decay", type=rate, default=0.01, help="of the optimizer")
    add("--optimizer", choices=optimizers, default="adamw", help="sgd: momentum 0.9")
    add("--schedule", choices=schedules, default="plateau", help=schedule_help)
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
    parser.set_defaults(demo=args.train_csv is None)
    if args.train_csv is None:
        if args.valid_csv or args.weights != "DEFAULT":
            parser.error("give --train-csv too; without flags it is the demo")
        argv = DEMO_FLAGS.split() + argv
        print("the demo is this command: python train.py", *argv, flush=True)
    if parser.parse_args(argv).weights == "none":  # other flags' defaults depend on it
        parser.set_defaults(freeze=0, lr=2e-3, head_lr=None)
        parser.set_defaults(batch_norm="train", schedule="cosine")
    args = parser.parse_args(argv)
    if args.head_lr is None:
        args.head_lr = args.lr
    alasa.input_preset(args.arch, args.weights)  # fails unless there is such a model
    return args


def another_run(out: str) -> str:
    """Return how to go on from a run in a way that `--resume` refuses."""
    return f"for another run, give its flags and --weights {out}/best.pt --out again"


def parse_resumed(parser: ArgumentParser, argv: list[str], out: str) -> Namespace:
    """Return the flags of the run in `out`; AlasaError for one that may not change."""
    for name in ("last.pt", "best.pt"):
        if not os.path.exists(f"{out}/{name}"):
            raise AlasaError(f"--resume: there is no {out}/{name}; {another_run(out)}")
    saved = alasa.load_checkpoint(f"{out}/last.pt")
    if "optimizer" not in saved:
        raise AlasaError(f"--resume: last.pt is a best.pt; {another_run(out)}")
    before = saved["args"] | {"out": out, "resume": True}
    parser.set_defaults(**before)
    args = parser.parse_args(argv)
    may_change = MAY_CHANGE.split()
    if args.schedule == "plateau":  # on which a cosine depends
        may_change.append("epochs")
    for name, value in vars(args).items():
        if value != before[name] and name not in may_change:
            was = f"--resume: {name} was {before[name]!r}, now {value!r}"
            raise AlasaError(f"{was}; {another_run(out)}")
    return args


def write_digits() -> None:
    """Write the demo's images as PNG files, and test.csv, valid.csv and train.csv."""
    from sklearn.datasets import load_digits  # here, as it takes a second to import

    digits = load_digits()
    os.makedirs("digits/images", exist_ok=True)
    rows = pd.DataFrame({"label": digits.target})
    rows["image"] = [f"images/{index:04d}.png" for index in rows.index]
    for image, grey in zip(rows["image"], digits.images):  # 0..16
        pixels = (grey * 255 / 16).round().astype("uint8")
        Image.fromarray(pixels).save(f"digits/{image}")
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
        saved = alasa.load_checkpoint(last)
        if len(saved["history"]) >= args.epochs:
            longer = "--resume --epochs N trains longer, but not after a cosine"
            print0(f"all {args.epochs} epochs are done; {longer}")
        return saved
    kept = [path for path in (last, f"{args.out}/best.pt") if os.path.exists(path)]
    may_begin = args.overwrite or not kept
    if not may_begin and not alasa.load_checkpoint(kept[0])["args"]["demo"]:
        what = f"{args.out} holds a run"
        raise AlasaError(f"{what}: --resume, --overwrite, or choose another --out")
    return None


def load_data(args: Namespace) -> tuple[pd.DataFrame, pd.DataFrame, list[str]]:
    """Return the rows of both splits, with class indices as labels, and the class names."""
    if args.demo:
        if alasa.get_rank() == 0 and not os.path.exists(args.train_csv):
            write_digits()
        alasa.gather_batches([])  # the others wait
    columns = args.image_column, args.label_column, args.image_root
    train = alasa.read_rows(args.train_csv, *columns, needs_labels=True)
    if args.valid_csv is None:
        train, valid = alasa.hold_out(train, 0.2, args.seed)
        print0(
            f"no --valid-csv: {len(valid)} images are held out, a fifth by file name"
        )
    else:
        valid = alasa.read_rows(args.valid_csv, *columns, needs_labels=True)
    classes = alasa.check_splits(train, valid, args.monitor)
    counts = pd.DataFrame(index=classes)
    counts["train"] = train["label"].value_counts()
    counts["valid"] = valid["label"].value_counts()
    print0(counts.fillna(0).astype(int).to_string())
    if args.check_images:
        every = alasa.TolerantDataset(pd.concat([train, valid]), "test")
        loader = alasa.make_loader(every, 1, None, args.workers)
        errors = alasa.gather_batches([error for _, [error] in loader])
        bad = [error for error in errors if error]
        if bad:
            print0("\n".join(bad))
            raise AlasaError(f"{len(bad)} of {len(every)} images cannot be read")
    train = train.assign(label=pd.Index(classes).get_indexer(train["label"]))
    valid = valid.assign(label=pd.Index(classes).get_indexer(valid["label"]))
    return train, valid, classes


def make_loaders(
    train: pd.DataFrame, valid: pd.DataFrame, args: Namespace, device
) -> tuple[DataLoader, DataLoader, Draws]:
    """Return the loaders of both splits, and what the first draws; say how many images each
    epoch leaves out."""
    size, workers, world = args.batch_size, args.workers, alasa.get_world_size()
    if size < 2 * world:
        raise AlasaError(f"--batch-size: each of {world} processes needs 2 images")
    augmented = alasa.make_transform(args.image_size, args.augment)
    train_set = AlasaDataset(train, "train", augmented, args.image_size)
    valid_set = AlasaDataset(valid, "valid", image_size=args.image_size)
    draws = Draws(train_set.labels, args.seed, args.balance)
    for_gpu = device.type == "cuda"
    train_loader = alasa.make_loader(train_set, size, draws, workers, for_gpu)
    valid_loader = alasa.make_loader(valid_set, size, None, workers, for_gpu)
    used = sum(len(items) for items in train_loader.batch_sampler)
    left_out = len(train_set) - used * world
    if left_out > 0:
        print0(f"left out of each epoch: {left_out}, too few for a batch")
    return train_loader, valid_loader, draws


def make_model(
    args: Namespace, classes: list[str], saved: dict | None, device
) -> alasa.Classifier:
    """Return the model that the flags describe, or that of the run to be resumed."""
    if saved:
        model = alasa.restore_model(saved, device)
    else:
        model = alasa.build_model(
            args.arch, len(classes), args.weights, args.full_res_stem, classes, device
        )
    print0(f"{args.arch} on {alasa.get_world_size()} x {device}, {args.precision}")
    model.precision = args.precision
    if args.compile:
        # Not dynamic, as it would adapt to steps that a resumed run has not seen.
        model.compile(dynamic=False)
    return model


def make_optimizer(model: nn.Module, args: Namespace) -> torch.optim.Optimizer:
    """Return the optimizer, whose second group of parameters is the last layer."""
    head = list(model.get_submodule(alasa.find_head(model)).parameters())
    backbone = list(model.parameters())[: -len(head)]  # the head's come last
    groups = [{"params": backbone, "lr": args.lr}, {"params": head, "lr": args.head_lr}]
    decay = args.weight_decay
    if args.optimizer == "adamw":
        return torch.optim.AdamW(groups, weight_decay=decay, fused=True)
    # Not fused: its momentum would stay uninitialised if fp16 skips the first step.
    return torch.optim.SGD(groups, momentum=0.9, weight_decay=decay)


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
    log = pd.DataFrame(history).set_index("epoch")
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    for axes, name in zip(figure.subplots(1, 3), ["loss", "accuracy", "auc"]):
        columns = log.filter(like=name)  # train_ and valid_; auc and wauc
        axes.plot(columns, marker=".", label=list(columns))
        axes.set(xlabel="epoch", ylabel=name)
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        axes.legend()
    return figure


def save_validation(valid: pd.DataFrame, classes: list[str], args: Namespace) -> None:
    """Write the rows that validate, for `predict.py --test-csv`."""
    rows = pd.DataFrame({args.image_column: valid["path"].map(os.path.abspath)})
    rows[args.label_column] = [classes[index] for index in valid["label"]]
    with atomic_write(f"{args.out}/validation.csv") as file:
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
    is_first = len(history) == 1
    if is_first or alasa.best_epoch(history, run["args"]["monitor"]) == len(history):
        with atomic_write(best) as file:
            torch.save(run | {"model": states["model"]}, file)
            if is_first:
                # A former run's last.pt must not go on beside this best.pt, now whole.
                last.unlink(missing_ok=True)
    with atomic_write(f"{out}/log.csv") as file:
        pd.DataFrame(history).to_csv(file, index=False, float_format="%.6g")
    with atomic_write(f"{out}/losses.png") as file:
        plot_history(history).savefig(file, dpi=120)
    with atomic_write(last) as file:
        torch.save(run | states, file)
    return time_saved(out)


def main(args: Namespace, criterion: Callable | None = None) -> list[dict]:
    """Train as the flags say, write the files of the run, and return the rows of its log.

    criterion(logits [B, classes], labels [B]) is a mean loss, by default cross entropy; a
    resumed run needs the same.  All generators are seeded anew.
    """
    device = alasa.start_process(args.device)
    args.precision = alasa.choose_precision(args.precision, device, args.image_size)
    saved = load_saved(args)
    last_saved = time_saved(args.out)
    alasa.seed_everything(args.seed)
    train, valid, classes = load_data(args)
    rows = [frame[["image", "label"]].values.tolist() for frame in (train, valid)]
    rows_hash = alasa.stable_hash(rows)
    if saved and saved["rows_hash"] != rows_hash:
        what = "--resume: its images had other names or labels"
        raise AlasaError(f"{what}; {another_run(args.out)}")
    train_loader, valid_loader, draws = make_loaders(train, valid, args, device)
    history = saved["history"] if saved else []
    first_epoch = len(history) + 1
    # Fork the workers before the heap grows: less is copied when it is written to.
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

    print_chance(criterion, train_loader.dataset, valid_loader.dataset, device)
    if first_epoch == 1 and alasa.get_rank() == 0:
        save_batch(train_loader, classes, args.out)

    for epoch in range(first_epoch, args.epochs + 1):
        # Before the epoch, as a resumed run may have stalled already.
        stalled = len(history) - alasa.best_epoch(history, args.monitor)
        if 0 < args.early_stop <= stalled:
            print0(f"no better {args.monitor} in {stalled} epochs: stopped early")
            break
        began = time.perf_counter()
        frozen = epoch <= args.freeze
        group = optimizer.param_groups[1 if frozen else 0]  # the head's, or the rest's
        row = {"epoch": epoch, "lr": group["lr"]}
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
            save_validation(valid, classes, args)
        print0(alasa.describe(row))
    best = alasa.best_epoch(history, args.monitor)
    found = f"epoch {best}" if best > 0 else f"no finite {args.monitor}"
    print0(f"best: {found}, in {args.out}/best.pt")
    return history


if __name__ == "__main__":
    with alasa.as_script("; --resume goes on after the last epoch that was saved"):
        main(parse_args())
