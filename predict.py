"""Predict with a checkpoint of train.py; score the predictions where there are labels.

python predict.py                   # the demo's test images, with the demo's best model
python predict.py --checkpoint runs/best.pt --test-csv test.csv --tta
python predict.py photo1.jpg photo2.jpg some-folder
"""

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
    add = parser.add_argument_group("images").add_argument
    add("images", nargs="*", help="image files and folders; none: those of --test-csv")
    add(
        "--test-csv",
        help="or a folder; None: test.csv beside the training CSV, or the validation images",
    )
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
    add("--precision", choices=["auto", *alasa.DTYPES], help="None: as in training")
    args = parser.parse_args(argv)
    if args.images and args.test_csv:
        parser.error("give images or --test-csv, not both")
    return args


def read_inputs(args: Namespace, trained: Namespace) -> pd.DataFrame:
    """Return the images to predict, one a row, with labels where there are any."""
    if args.test_csv:
        return alasa.read_rows(
            args.test_csv,
            args.image_column or trained.image_column,
            args.label_column or trained.label_column,
            trained.image_root if args.image_root is None else args.image_root,
            needs_labels=args.label_column is not None,
        )
    frames = []
    for position, path in enumerate(args.images, start=1):
        if os.path.isdir(path):
            frames.append(alasa.read_folder(path))
        else:
            frames.append(pd.DataFrame({"path": path}, index=[f"image {position}"]))
    rows = pd.concat(frames).fillna("")  # the label of a file
    return rows.assign(image=rows["path"])


def predict_logits(
    frame: pd.DataFrame, checkpoint: dict, args: Namespace, trained: Namespace
) -> tuple[Tensor, np.ndarray]:
    """Return for all images the logits [N, classes], and the error or "" [N].

    The logits of an image that could not be read are NaN.
    """
    device = alasa.start_process(args.device)
    data = alasa.TolerantDataset(frame, "test", image_size=trained.image_size)
    batch_size, for_gpu = args.batch_size or trained.batch_size, device.type == "cuda"
    loader = alasa.make_loader(data, batch_size, None, args.workers, for_gpu)
    batches = iter(loader)  # forks the workers, before the model makes the heap grow
    alasa.seed_everything(trained.seed)
    model = alasa.restore_model(checkpoint, device)
    precision = args.precision or trained.precision
    model.precision = alasa.choose_precision(precision, device, trained.image_size)
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
    table = table.join(pd.DataFrame(p, columns=[f"p_{name}" for name in classes]))
    if failed.any():
        table["error"] = errors
    return table


def print_report(labels: np.ndarray, logits: Tensor, classes: list[str]) -> None:
    """Print the scores that are defined, each class's, and what is most often taken for
    what."""
    scores = alasa.score(labels, logits)
    defined = {name: value for name, value in scores.items() if np.isfinite(value)}
    print(alasa.describe(defined))
    names = np.array(classes)
    true, predicted = names[labels], names[logits.argmax(1)]
    if len(classes) <= MOST_NAMES:
        report = metrics.classification_report
        print(report(true, predicted, labels=classes, zero_division=0))
    pairs = pd.DataFrame({"true": true, "predicted": predicted})
    wrong = pairs[true != predicted]
    for (name, taken_for), count in wrong.value_counts().head(5).items():
        print(f"{name} taken for {taken_for}: {count} of {(true == name).sum()}")


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
    names_fit = len(classes) <= MOST_NAMES
    metrics.ConfusionMatrixDisplay.from_predictions(
        labels,
        predicted,
        labels=range(len(classes)),
        display_labels=names if names_fit else None,
        include_values=len(classes) <= MOST_COUNTS,
        xticks_rotation="vertical",
        cmap="Blues",
        colorbar=False,
        ax=left,
    )
    if not names_fit:
        left.set(xticks=[], yticks=[])
    not_class = alasa.log_odds_not_class(logits.double().numpy())
    first = 1 if len(classes) == 2 else 0  # of two classes, both curves are the same
    for k in range(first, min(len(classes), MOST_CURVES)):
        if 0 < (labels == k).sum() < len(labels):  # else no curve is defined
            metrics.RocCurveDisplay.from_predictions(
                labels == k, -not_class[:, k], name=names[k], ax=right
            )
    right.set(xlabel="false positive rate", ylabel="true positive rate")

    p_of_true = logits.softmax(1).numpy()[np.arange(len(labels)), labels]
    wrong = np.flatnonzero(predicted != labels)
    most_wrong = wrong[p_of_true[wrong].argsort(kind="stable")][:MOST_WRONG]
    images, titles = [], []
    for row in most_wrong:
        image = alasa.read_image(paths[row], 224)
        image.thumbnail((224, 224))
        images.append(image)
        true, taken_for = classes[labels[row]], classes[predicted[row]]
        titles.append(f"{os.path.basename(paths[row])}\n{true}\ntaken for {taken_for}")
    bottom.suptitle(f"the {len(titles)} most wrong images")
    alasa.draw_images(bottom, MOST_WRONG // 2, images, titles)
    return figure


def score_predictions(
    frame: pd.DataFrame, logits: Tensor, classes: list[str], picture: str
) -> None:
    """Print and draw the scores of the images whose label is one of the classes."""
    labels = pd.Index(classes).get_indexer(frame["label"])  # -1 of what is no class
    unknown = frame["label"][labels < 0]
    if len(unknown) > 0:
        print(f"not scored: {len(unknown)} images, as {unknown.iloc[0]!r} is no class")
    scored = (labels >= 0) & logits.isfinite().all(dim=1).numpy()
    if not scored.any():
        return
    labels, logits = labels[scored], logits[scored]
    print_report(labels, logits, classes)
    figure = plot_report(labels, logits, classes, frame["path"][scored].tolist())
    with atomic_write(picture) as file:
        figure.savefig(file, dpi=100)
    print(f"confusion matrix, ROC curves and the most wrong images in {picture}")


def main(args: Namespace) -> pd.DataFrame:
    """Write predictions.csv and return its rows; score them if there are labels."""
    if dist.is_torchelastic_launched():
        raise AlasaError("predict.py is one process: start it without torchrun")
    checkpoint = alasa.load_checkpoint(args.checkpoint)
    trained, classes = Namespace(**checkpoint["args"]), checkpoint["classes"]
    if not args.images and not args.test_csv:
        beside = os.path.join(os.path.dirname(trained.train_csv), "test.csv")
        validation = os.path.join(os.path.dirname(args.checkpoint), "validation.csv")
        args.test_csv = beside if os.path.exists(beside) else validation
    frame = read_inputs(args, trained)
    picture = f"{os.path.splitext(args.output)[0]}.png"
    inputs = [args.checkpoint, args.test_csv, trained.train_csv, trained.valid_csv]
    taken = {os.path.abspath(path) for path in [*inputs, *frame["path"]] if path}
    outputs = {os.path.abspath(args.output), os.path.abspath(picture)}
    if len(outputs) == 1 or outputs & taken:
        raise AlasaError(f"--output {args.output} would replace an input, or itself")
    if not os.access(os.path.dirname(args.output) or ".", os.W_OK):
        raise AlasaError(f"--output {args.output}: its folder cannot be written to")

    logits, errors = predict_logits(frame, checkpoint, args, trained)
    table = make_table(frame["image"].tolist(), classes, logits, errors)
    with atomic_write(args.output) as file:
        table.to_csv(file, index=False)
    print(f"{len(table)} rows in {args.output}")
    failed = errors[errors != ""]
    if len(failed) > 0:
        told = f"{len(failed)} of {len(table)} failed, first {failed[0]}"
        print(told, file=sys.stderr)
    if len(table) <= 20:
        p_of_label = table.filter(regex="^p_").max(axis=1)
        print(table[["image", "label"]].assign(p=p_of_label).to_string(index=False))
    if "label" in frame:
        score_predictions(frame, logits, classes, picture)
    return table


if __name__ == "__main__":
    with alasa.as_script():
        table = main(parse_args())
        sys.exit(1 if "error" in table else 0)  # where an image failed
