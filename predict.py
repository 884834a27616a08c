"""Predict with a checkpoint of train.py; score the predictions where there are labels.

python predict.py                   # the demo's test images, with the demo's best model
python predict.py --checkpoint runs/best.pt --test-csv test.csv --tta
python predict.py photo1.jpg photo2.jpg some-folder
"""

import math
import os
import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace

import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from sklearn import metrics
from torch import Tensor

import alasa
from alasa import AlasaError, atomic_write

MOST_CURVES = 10  # that can be told apart
MOST_COUNTS = 20  # classes whose counts fit into a confusion matrix
MOST_NAMES = 50  # classes whose names can be read on an axis, and in a report
MOST_WRONG = 12  # images


def parse_args(argv: list[str] | None = None) -> Namespace:
    """Return the flags, by default those of the command line."""
    parser = ArgumentParser(
        description="Predict with a checkpoint of train.py; by default, the demo's.",
        usage="%(prog)s [flags] [images]; -h lists them",
        formatter_class=ArgumentDefaultsHelpFormatter,
    )
    count = alasa.in_range(int, 0)
    workers = alasa.count_workers()
    precisions = ["auto", *alasa.DTYPES]
    test_csv_help = "CSV or folder; None: test.csv beside the training CSV, or held out"
    add = parser.add_argument_group("images").add_argument
    add("images", nargs="*", help="image files and folders; none: those of --test-csv")
    add("--test-csv", help=test_csv_help)
    add("--image-column", help="None: as in training")
    add("--label-column", help="None: as in training; labels are scored, not needed")
    add("--image-root", help="where relative images start; None: as in training")
    add = parser.add_argument_group("prediction").add_argument
    add("--checkpoint", default="runs/best.pt", help="of train.py")
    add("--output", default="predictions.csv", help="CSV to write")
    add("--tta", action="store_true", help="mean over training's --augment views")
    add("--batch-size", type=count, default=0, help="0: as in training: the same bits")
    add("--workers", type=count, default=workers, help="processes that decode images")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--precision", choices=precisions, help="None: as in training: the same bits")
    args = parser.parse_args(argv)
    if args.images and args.test_csv:
        parser.error("give images or --test-csv, not both")
    return args


def find_test_csv(checkpoint_path: str, train_csv: str) -> str:
    """Return the test.csv beside the training CSV, or the test folder beside its folder; if
    there is none, the images that training held out."""
    name = "test" if os.path.isdir(train_csv) else "test.csv"
    beside = os.path.join(os.path.dirname(train_csv.rstrip("/")), name)
    held_out = os.path.join(os.path.dirname(checkpoint_path), "valid.csv")
    for path in (beside, held_out):
        if os.path.exists(path):
            return path
    raise AlasaError(f"there is no {beside}: give --test-csv, or images")


def read_inputs(args: Namespace, trained: Namespace) -> pd.DataFrame:
    """Return the images to predict, one a row, with labels where there are any."""
    if args.images:
        return read_arguments(args.images)
    return alasa.read_rows(
        args.test_csv or find_test_csv(args.checkpoint, trained.train_csv),
        args.image_column or trained.image_column,
        args.label_column or trained.label_column,
        trained.image_root if args.image_root is None else args.image_root,
        needs_labels=args.label_column is not None,
    )


def read_arguments(paths: list[str]) -> pd.DataFrame:
    """Return a row for each image file, and for each image in each folder."""
    frames = []
    for position, path in enumerate(paths, start=1):
        if os.path.isdir(path):
            frame = alasa.read_folder(path)
            frames.append(frame.assign(image=frame["path"]))
        else:
            image = {"image": path, "path": path}
            frames.append(pd.DataFrame(image, index=[f"image {position}"]))
    return pd.concat(frames).fillna("")  # the label of a file


def predict_logits(
    frame: pd.DataFrame, checkpoint: dict, args: Namespace, trained: Namespace
) -> tuple[Tensor, np.ndarray]:
    """Return for all images the logits [N, classes], and the error or "" [N].

    The logits of an image that could not be read are NaN.
    """
    device = alasa.start_process(args.device)
    data = alasa.TolerantDataset(frame, trained.image_size)
    batch_size = args.batch_size or trained.batch_size
    for_gpu = device.type == "cuda"
    loader = alasa.make_loader(data, batch_size, None, args.workers, for_gpu)
    batches = iter(loader)  # forks the workers, before the model makes the heap grow
    alasa.seed_everything(trained.seed)
    model = alasa.restore_model(checkpoint, device)
    model.precision = alasa.choose_precision(
        args.precision or trained.precision, device, trained.image_size
    )
    views = alasa.VIEWS[trained.augment] if args.tta else 1
    read_logits, batch_errors = alasa.infer(model, batches, views)

    errors = np.array([error for part in batch_errors for error in part], dtype=object)
    read = torch.from_numpy(errors == "")
    logits = torch.full((len(frame), len(checkpoint["classes"])), torch.nan)
    if read.any():
        logits[read] = read_logits
    overflowed = read & ~logits.isfinite().all(dim=1)
    errors[overflowed.numpy()] = "the model's logits are not finite"
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
    """Print the scores that are defined, each class's, and what is most often taken for
    what."""
    scores = alasa.score(labels, logits)
    defined = {name: value for name, value in scores.items() if not math.isnan(value)}
    print(alasa.describe(defined))
    predicted = logits.argmax(1).numpy()
    if len(classes) <= MOST_NAMES:
        numbers = range(len(classes))
        report = metrics.classification_report(
            labels, predicted, labels=numbers, target_names=classes, zero_division=0
        )
        print(report)
    pairs = pd.DataFrame({"true": labels, "predicted": predicted})
    wrong = pairs[pairs["true"] != pairs["predicted"]]
    for (true, taken_for), count in wrong.value_counts().head(5).items():
        total = (labels == true).sum()
        print(f"{classes[true]} taken for {classes[taken_for]}: {count} of {total}")


def plot_report(
    labels: np.ndarray, logits: Tensor, classes: list[str], paths: list[str]
) -> Figure:
    """Show the confusion matrix, the ROC curves, and the most wrong images."""
    figure = Figure(figsize=(12, 10), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[3, 2])
    left, right = top.subplots(1, 2)
    predicted = logits.argmax(1).numpy()
    # Short, and without what Matplotlib would take for a formula.
    names = [name[:24].replace("$", r"\$") for name in classes]
    counts_fit, names_fit = len(classes) <= MOST_COUNTS, len(classes) <= MOST_NAMES
    metrics.ConfusionMatrixDisplay.from_predictions(
        labels,
        predicted,
        labels=range(len(classes)),
        display_labels=names if names_fit else None,
        normalize=None if counts_fit else "true",
        include_values=counts_fit,
        xticks_rotation="vertical",
        cmap="Blues",
        colorbar=False,
        ax=left,
    )
    if not names_fit:
        left.set(xticks=[], yticks=[])
    plot_roc(right, labels, logits, names)

    p_of_true = logits.softmax(1).numpy()[np.arange(len(labels)), labels]
    wrong = np.flatnonzero(predicted != labels)
    most_wrong = wrong[p_of_true[wrong].argsort(kind="stable")][:MOST_WRONG]
    images, titles = [], []
    for row in most_wrong:
        image = alasa.read_image(paths[row], 224)
        image.thumbnail((224, 224))
        images.append(np.asarray(image))
        true, taken_for = classes[labels[row]], classes[predicted[row]]
        titles.append(f"{os.path.basename(paths[row])}\n{true}\ntaken for {taken_for}")
    if titles:
        bottom.suptitle("the most wrong images")
        alasa.draw_images(bottom, MOST_WRONG // 2, images, titles)
    return figure


def plot_roc(axes, labels: np.ndarray, logits: Tensor, names: list[str]) -> None:
    """Draw each class's ROC curve against the rest; of two classes, only the second's."""
    not_class = alasa.log_odds_not_class(logits.double().numpy())
    candidates = [1] if len(names) == 2 else range(len(names))
    drawn = [k for k in candidates if 0 < (labels == k).sum() < len(labels)]
    for k in drawn[:MOST_CURVES]:
        metrics.RocCurveDisplay.from_predictions(
            labels == k, -not_class[:, k], name=names[k], ax=axes
        )
    title = f"ROC, the first {MOST_CURVES}" if len(drawn) > MOST_CURVES else "ROC"
    axes.set_title(title if drawn else "no ROC of one class")


def score_predictions(
    frame: pd.DataFrame, logits: Tensor, classes: list[str], picture: str
) -> None:
    """Print and draw the scores of the images whose label is one of the classes."""
    known = frame["label"].isin(classes).to_numpy()
    if not known.all():
        first = frame["label"][~known].iloc[0]
        print(f"not scored: {(~known).sum()} images, as {first!r} is no class")
    scored = known & logits.isfinite().all(dim=1).numpy()
    if not scored.any():
        return
    index_of = {name: index for index, name in enumerate(classes)}
    labels = frame["label"][scored].map(index_of).to_numpy()
    paths = frame["path"][scored].tolist()
    print_report(labels, logits[scored], classes)
    with atomic_write(picture) as file:
        plot_report(labels, logits[scored], classes, paths).savefig(file, dpi=100)
    print(f"confusion matrix, ROC curves and the most wrong images in {picture}")


def main(args: Namespace) -> pd.DataFrame:
    """Write predictions.csv and return its rows; score them if there are labels.

    All generators are seeded anew: `alasa.seed_everything`.
    """
    if dist.is_torchelastic_launched():
        raise AlasaError("predict.py is one process: start it without torchrun")
    checkpoint = alasa.load_checkpoint(args.checkpoint)
    trained, classes = Namespace(**checkpoint["args"]), checkpoint["classes"]
    frame = read_inputs(args, trained)
    picture = f"{os.path.splitext(args.output)[0]}.png"
    outputs = [os.path.normpath(args.output), os.path.normpath(picture)]
    inputs = [args.checkpoint, args.test_csv, trained.train_csv, trained.valid_csv]
    if args.output in inputs or frame["path"].isin(outputs).any():
        raise AlasaError(f"--output {args.output} would replace an input")
    if not os.access(os.path.dirname(args.output) or ".", os.W_OK):
        raise AlasaError(f"--output {args.output}: its folder cannot be written to")

    logits, errors = predict_logits(frame, checkpoint, args, trained)
    table = make_table(frame["image"].tolist(), classes, logits, errors)
    with atomic_write(args.output) as file:
        table.to_csv(file, index=False)
    print(f"{len(table)} rows in {args.output}")
    failures = errors[errors != ""]
    if len(failures) > 0:
        count = f"{len(failures)} of {len(table)} failed"
        print(f"{count}, first {failures[0]}", file=sys.stderr)
    if len(table) <= 20:
        print(table[["image", "label", "score"]].to_string(index=False))
    if "label" in frame:
        score_predictions(frame, logits, classes, picture)
    return table


if __name__ == "__main__":
    with alasa.as_script():
        table = main(parse_args())
        some_failed = "error" in table
        sys.exit(1 if some_failed else 0)
