"""Predict with a checkpoint of train.py; score the predictions where there are labels.

python predict.py                   # the demo's test images, with the demo's best model
python predict.py --checkpoint runs/best.pt --test-csv test.csv --tta
python predict.py photo1.jpg photo2.jpg some-folder
"""

import os
import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from collections.abc import Iterator

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.metrics import classification_report, confusion_matrix, roc_curve
from torch import Tensor, nn

import alasa
from alasa import AlasaError, atomic_write

MOST_CURVES = 10  # that can be told apart
MOST_FIGURES = 20  # classes whose counts fit into a confusion matrix
MOST_NAMES = 50  # classes whose names can be read on an axis, and in a report
MOST_WRONG = 12  # images


def parse_args(argv: list[str] | None = None) -> Namespace:
    """Return the flags, by default those of the command line."""
    parser = ArgumentParser(
        description="Predict with a checkpoint of train.py; by default, the demo's.",
        formatter_class=ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument_group("images").add_argument
    add("images", nargs="*", help="image files and folders; none: those of --test-csv")
    add("--test-csv", help="a CSV or a folder; None: test.csv beside the training CSV")
    add("--image-column", help="None: as in training")
    add("--label-column", help="None: as in training; labels are scored, not needed")
    add("--image-root", help="where relative images start; None: as in training")
    add = parser.add_argument_group("prediction").add_argument
    add("--checkpoint", default="runs/best.pt", help="of train.py")
    add("--output", default="predictions.csv", help="CSV to write")
    add(
        "--tta", action="store_true", help="mean over the training augmentation's views"
    )
    add(
        "--batch-size", type=int, default=0, help="0: as in training, for the same bits"
    )
    workers = alasa.count_workers()
    add("--workers", type=int, default=workers, help="processes that decode images")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    precisions = ["auto", *alasa.DTYPES]
    add(
        "--precision",
        choices=precisions,
        help="None: as in training, for the same bits",
    )
    args = parser.parse_args(argv)
    if args.images and args.test_csv:
        parser.error("give images or --test-csv, not both")
    if min(args.workers, args.batch_size) < 0:
        parser.error("--workers and --batch-size are at least 0")
    return args


def read_inputs(args: Namespace, trained: Namespace) -> pd.DataFrame:
    """Return the images to predict, one a row, with labels where there are any."""
    if not args.images:
        source = args.test_csv
        if source is None:
            source = os.path.join(os.path.dirname(trained.train_csv), "test.csv")
        root = trained.image_root if args.image_root is None else args.image_root
        image_column = args.image_column or trained.image_column
        label_column = args.label_column or trained.label_column
        return alasa.read_rows(source, image_column, label_column, root)
    frames = []
    for number, path in enumerate(args.images, start=1):
        if os.path.isdir(path):
            frames.append(alasa.read_folder(path))
        else:
            image = {"image": path, "path": path}
            frames.append(pd.DataFrame(image, index=[f"image {number}"]))
    return pd.concat(frames)


def check_outputs(inputs: list[str], outputs: list[str]) -> None:
    """Raise AlasaError if an output would replace an input or cannot be written."""
    read = {os.path.realpath(path) for path in inputs}
    for path in outputs:
        if os.path.realpath(path) in read or outputs.count(path) > 1:
            raise AlasaError(f"--output: {path} would replace an input, or itself")
        alasa.check_writable(path)


def load_model(checkpoint: dict, trained: Namespace) -> nn.Module:
    model = alasa.build_model(
        trained.arch,
        len(checkpoint["classes"]),
        "none",
        full_res_stem=trained.full_res_stem,
        image_size=trained.image_size,
    )
    model.load_state_dict(checkpoint["model"])
    model.mean, model.std = checkpoint["mean"], checkpoint["std"]
    return model


def predict_logits(
    model: nn.Module, batches: Iterator, classes: int, precision: str, views: int
) -> tuple[Tensor, np.ndarray]:
    """Return of all images the logits [N, classes], and why one failed [N], or "".

    The logits of an image that could not be read are NaN.
    """
    errors = []

    def readable() -> Iterator[Tensor]:
        for images, batch_errors in alasa.Progress(batches, "prediction"):
            errors.extend(batch_errors)
            if len(images) > 0:
                yield images

    found = alasa.infer(model, readable(), precision, views)
    read = torch.tensor([error == "" for error in errors])
    logits = torch.full((len(errors), classes), torch.nan)
    if len(found) > 0:
        logits[read] = found
    overflown = read & ~logits.isfinite().all(dim=1)
    errors = np.array(errors, dtype=object)
    errors[overflown.numpy()] = "the model's logits are not finite"
    return logits, errors


def make_table(
    images: list[str], classes: list[str], logits: Tensor, errors: np.ndarray
) -> pd.DataFrame:
    """Return the rows of predictions.csv; one that failed has its image and error only."""
    failed = errors != ""
    p = logits.double().softmax(1).numpy()
    p[failed] = np.nan
    likeliest = np.array(classes, dtype=object)[logits.argmax(1).numpy()]
    likeliest[failed] = ""
    table = pd.DataFrame({"image": images, "label": likeliest})
    table["score"] = p[:, 1:].sum(axis=1).clip(max=1)  # P(not the first class)
    by_class = pd.DataFrame(p, columns=[f"p_{name}" for name in classes])
    table = pd.concat([table, by_class], axis=1)
    if failed.any():
        table["error"] = errors
    return table


def print_report(labels: np.ndarray, logits: Tensor, classes: list[str]) -> None:
    """Print the scores, each class's, and what is most often taken for what."""
    print(alasa.describe(alasa.score(labels, logits)))
    predicted = logits.argmax(1).numpy()
    if len(classes) <= MOST_NAMES:
        numbers = range(len(classes))
        report = classification_report(
            labels, predicted, labels=numbers, target_names=classes, zero_division=0
        )
        print(report)
    pairs = pd.DataFrame({"true": labels, "predicted": predicted})
    wrong = pairs[pairs["true"] != pairs["predicted"]]
    for (true, taken_for), count in wrong.value_counts().head(5).items():
        print(f"{count} x {classes[true]} taken for {classes[taken_for]}")


def plot_confusion(
    ax: Axes, labels: np.ndarray, predicted: np.ndarray, classes: list[str]
) -> None:
    """Draw which share of each class was taken for which; names and counts if they fit."""
    numbers = range(len(classes))
    counts = confusion_matrix(labels, predicted, labels=numbers)
    shares = counts / counts.sum(axis=1, keepdims=True).clip(min=1)
    ax.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    ax.set(title="confusion matrix", xlabel="predicted class", ylabel="true class")
    if len(classes) <= MOST_NAMES:
        names = [alasa.short_name(name) for name in classes]
        ax.set_xticks(numbers, names, rotation=90)
        ax.set_yticks(numbers, names)
    if len(classes) <= MOST_FIGURES:
        for true, taken_for in np.ndindex(counts.shape):
            color = "white" if shares[true, taken_for] > 0.5 else "black"
            count = counts[true, taken_for]
            ax.text(taken_for, true, count, ha="center", va="center", color=color)


def plot_roc(ax: Axes, labels: np.ndarray, p: np.ndarray, classes: list[str]) -> None:
    """Draw each class's ROC curve against the rest; of two classes, only the second's."""
    candidates = [1] if len(classes) == 2 else range(len(classes))
    drawn = [k for k in candidates if 0 < (labels == k).sum() < len(labels)]
    for k in drawn[:MOST_CURVES]:
        fpr, tpr, _ = roc_curve(labels == k, p[:, k])
        ax.plot(fpr, tpr, label=alasa.short_name(classes[k]))
    title = "ROC of each class against the rest"
    if len(drawn) > MOST_CURVES:
        title += f", the first {MOST_CURVES}"
    ax.set(title=title, xlabel="false positive rate", ylabel="true positive rate")
    if drawn:
        ax.legend(loc="lower right")


def plot_report(
    labels: np.ndarray, logits: Tensor, classes: list[str], paths: np.ndarray
) -> Figure:
    """Show the confusion matrix, the ROC curves, and the most wrong images."""
    p = logits.double().softmax(1).numpy()
    predicted = logits.argmax(1).numpy()
    p_of_true = p[np.arange(len(labels)), labels]
    wrong = np.flatnonzero(predicted != labels)
    most_wrong = wrong[p_of_true[wrong].argsort(kind="stable")][:MOST_WRONG]

    figure = Figure(figsize=(12, 10), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[3, 2])
    left, right = top.subplots(1, 2)
    plot_confusion(left, labels, predicted, classes)
    plot_roc(right, labels, p, classes)

    images, titles = [], []
    for row in most_wrong:
        image = alasa.read_image(paths[row])
        image.thumbnail((224, 224))
        images.append(np.asarray(image))
        true = alasa.short_name(classes[labels[row]], 16)
        taken_for = alasa.short_name(classes[predicted[row]], 16)
        titles.append(f"{true}\ntaken for {taken_for}")
    if titles:
        bottom.suptitle("the most wrong images")
        alasa.draw_images(bottom, MOST_WRONG // 2, images, titles)
    return figure


def main(args: Namespace) -> pd.DataFrame:
    """Write predictions.csv and return its rows; score them if there are labels."""
    if alasa.dist.is_torchelastic_launched():
        raise AlasaError("predict.py is one process: start it without torchrun")
    checkpoint = alasa.load_checkpoint(args.checkpoint)
    trained, classes = Namespace(**checkpoint["args"]), checkpoint["classes"]
    frame = read_inputs(args, trained)
    outputs = [args.output]
    if "label" in frame:
        outputs.append(f"{os.path.splitext(args.output)[0]}.png")
    check_outputs([args.checkpoint, args.test_csv or "", *frame["path"]], outputs)

    device = alasa.start_device(args.device)
    precision = args.precision or trained.precision
    if precision == "auto":
        precision = alasa.choose_precision(device)
    data = alasa.TolerantDataset(frame, alasa.make_transform(trained.image_size))
    batch_size = args.batch_size or trained.batch_size
    loader = alasa.make_loader(data, batch_size, args.workers)
    batches = alasa.begin_pass(loader, 0)  # before the model makes the heap grow
    with alasa.preserved_globals():
        alasa.seed_everything(trained.seed)
        model = load_model(checkpoint, trained).to(device)
        views = alasa.VIEWS[trained.augment] if args.tta else 1
        logits, errors = predict_logits(model, batches, len(classes), precision, views)

    table = make_table(frame["image"].tolist(), classes, logits, errors)
    with atomic_write(args.output) as file:
        table.to_csv(file, index=False, errors="surrogateescape")
    print(f"{len(table)} rows in {args.output}")
    failed = errors[errors != ""]
    if len(failed):
        first = f"first {failed[0]}"
        print(f"{len(failed)} of {len(table)} failed, {first}", file=sys.stderr)
    if len(table) <= 20:
        print(table.to_string(index=False))
    if "label" in frame:
        report(frame, errors, logits, classes, outputs[-1])
    return table


def report(
    frame: pd.DataFrame,
    errors: np.ndarray,
    logits: Tensor,
    classes: list[str],
    picture: str,
) -> None:
    """Score the images that did not fail and have a label of the model's classes."""
    known = frame["label"].isin(classes).to_numpy()
    if not known.all():
        label = frame["label"][~known].iloc[0]
        print(
            f"not scored: {(~known).sum()} images whose label is no class, as {label!r}"
        )
    rows = np.flatnonzero(known & (errors == ""))
    if len(rows) == 0:
        return
    number_of = {name: number for number, name in enumerate(classes)}
    labels = frame["label"].iloc[rows].map(number_of).to_numpy()
    print_report(labels, logits[rows], classes)
    with atomic_write(picture) as file:
        figure = plot_report(
            labels, logits[rows], classes, frame["path"].to_numpy()[rows]
        )
        figure.savefig(file, dpi=100)
    print(f"confusion matrix, ROC curves and the most wrong images in {picture}")


if __name__ == "__main__":
    with alasa.as_script():
        table = main(parse_args())
        sys.exit(1 if "error" in table else 0)
