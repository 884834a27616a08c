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
from sklearn.metrics import classification_report, confusion_matrix, roc_curve
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
        formatter_class=ArgumentDefaultsHelpFormatter,
    )
    count = alasa.number(int, 0)
    workers = alasa.count_workers()
    precisions = ["auto", *alasa.DTYPES]
    add = parser.add_argument_group("images").add_argument
    add("images", nargs="*", help="image files and folders; none: those of --test-csv")
    add("--test-csv", help="a CSV or a folder; None: test.csv beside the training CSV")
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


def default_test_csv(trained_args: Namespace) -> str:
    """Return the test.csv beside the training CSV, or the test folder beside its folder."""
    folder = os.path.dirname(trained_args.train_csv.rstrip("/"))
    name = "test" if os.path.isdir(trained_args.train_csv) else "test.csv"
    return os.path.join(folder, name)


def read_inputs(args: Namespace, trained_args: Namespace) -> pd.DataFrame:
    """Return the images to predict, one a row, with labels where there are any."""
    if args.images:
        return read_arguments(args.images)
    test_csv = args.test_csv or default_test_csv(trained_args)
    if not os.path.exists(test_csv):
        raise AlasaError(f"there is no {test_csv}: give --test-csv, or images")
    image_root = trained_args.image_root if args.image_root is None else args.image_root
    frame = alasa.read_rows(
        test_csv,
        args.image_column or trained_args.image_column,
        args.label_column or trained_args.label_column,
        image_root,
    )
    if args.label_column and "label" not in frame:
        raise AlasaError(f"{test_csv}: has no column {args.label_column!r}")
    return frame


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
    frame = pd.concat(frames)
    if "label" in frame:
        frame["label"] = frame["label"].fillna("")
    return frame


def check_outputs(inputs: list[str], outputs: list[str]) -> None:
    """Raise AlasaError if an output would replace an input or cannot be written."""
    read = {os.path.realpath(path) for path in inputs}
    for path in outputs:
        if os.path.realpath(path) in read or outputs.count(path) > 1:
            raise AlasaError(f"--output: {path} would replace an input, or itself")
        alasa.check_writable(path)


def predict_logits(
    frame: pd.DataFrame, checkpoint: dict, args: Namespace, trained_args: Namespace
) -> tuple[Tensor, np.ndarray]:
    """Return for all images the logits [N, classes], and the error or "" [N].

    The logits of an image that could not be read are NaN.
    """
    device = alasa.start_process(args.device)
    precision = alasa.choose_precision(args.precision or trained_args.precision, device)
    data = alasa.TolerantDataset(frame, alasa.make_transform(trained_args.image_size))
    batch_size = args.batch_size or trained_args.batch_size
    for_gpu = device.type == "cuda"
    loader = alasa.make_loader(data, batch_size, args.workers, for_gpu)
    batches = iter(loader)  # forks the workers, before the model makes the heap grow
    with alasa.preserved_globals():
        alasa.seed_everything(trained_args.seed)
        model = alasa.restore_model(checkpoint).to(device)
        views = alasa.VIEWS[trained_args.augment] if args.tta else 1
        if args.tta and views == 1:
            print("--tta changes nothing, as training had --augment none")
        read_logits, batch_errors = alasa.infer(model, batches, precision, views)

    errors = np.concatenate([np.array(part, dtype=object) for part in batch_errors])
    logits = torch.full((len(frame), len(checkpoint["classes"])), torch.nan)
    read = torch.from_numpy(errors == "")
    if len(read_logits) > 0:
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
        total = (labels == true).sum()
        print(f"{classes[true]} taken for {classes[taken_for]}: {count} of {total}")


def plot_confusion(
    ax, labels: np.ndarray, predicted: np.ndarray, classes: list[str]
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
    if len(classes) <= MOST_COUNTS:
        for true, taken_for in np.ndindex(counts.shape):
            color = "white" if shares[true, taken_for] > 0.5 else "black"
            count = counts[true, taken_for]
            ax.text(taken_for, true, count, ha="center", va="center", color=color)


def plot_roc(ax, labels: np.ndarray, logits: Tensor, classes: list[str]) -> None:
    """Draw each class's ROC curve against the rest; of two classes, only the second's."""
    candidates = [1] if len(classes) == 2 else range(len(classes))
    drawn = [k for k in candidates if 0 < (labels == k).sum() < len(labels)]
    not_class = alasa.log_odds_not_class(logits.double().numpy())
    for k in drawn[:MOST_CURVES]:
        fpr, tpr, _ = roc_curve(labels == k, -not_class[:, k])
        ax.plot(fpr, tpr, label=alasa.short_name(classes[k]))
    title = "ROC" if len(classes) == 2 else "ROC of each class against the rest"
    if len(drawn) > MOST_CURVES:
        title += f", the first {MOST_CURVES}"
    ax.set(title=title, xlabel="false positive rate", ylabel="true positive rate")
    if drawn:
        ax.legend(loc="lower right")


def plot_report(
    labels: np.ndarray, logits: Tensor, classes: list[str], paths: list[str]
):
    """Show the confusion matrix, the ROC curves, and the most wrong images."""
    p = logits.double().softmax(1).numpy()
    predicted = logits.argmax(1).numpy()
    p_of_true = p[np.arange(len(labels)), labels]
    rising = p_of_true.argsort(kind="stable")
    most_wrong = [row for row in rising if predicted[row] != labels[row]][:MOST_WRONG]

    figure = alasa.new_figure(12, 10, layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[3, 2])
    left, right = top.subplots(1, 2)
    plot_confusion(left, labels, predicted, classes)
    plot_roc(right, labels, logits, classes)

    images, titles = [], []
    for row in most_wrong:
        image = alasa.read_image(paths[row])
        image.thumbnail((224, 224))
        images.append(np.asarray(image))
        true = alasa.short_name(classes[labels[row]], 16)
        taken_for = alasa.short_name(classes[predicted[row]], 16)
        name = alasa.short_name(os.path.basename(paths[row]))
        titles.append(f"{name}\n{true}\ntaken for {taken_for}")
    if titles:
        bottom.suptitle("the most wrong images")
        alasa.draw_images(bottom, MOST_WRONG // 2, images, titles)
    return figure


def score_predictions(
    frame: pd.DataFrame, logits: Tensor, classes: list[str], picture: str
) -> bool:
    """Print and draw the scores of the images whose label is one of the classes; return
    whether there are any."""
    known = frame["label"].isin(classes).to_numpy()
    if not known.all():
        first = frame["label"][~known].iloc[0]
        print(f"not scored: {(~known).sum()} images, as {first!r} is no class")
    scored = known & logits.isfinite().all(dim=1).numpy()
    if not scored.any():
        return False
    index_of = {name: index for index, name in enumerate(classes)}
    labels = frame["label"][scored].map(index_of).to_numpy()
    paths = frame["path"][scored].tolist()
    print_report(labels, logits[scored], classes)
    figure = plot_report(labels, logits[scored], classes, paths)
    with atomic_write(picture) as file:
        figure.savefig(file, dpi=100)
    print(f"confusion matrix, ROC curves and the most wrong images in {picture}")
    return True


def main(args: Namespace) -> pd.DataFrame:
    """Write predictions.csv and return its rows; score them if there are labels."""
    if dist.is_torchelastic_launched():
        raise AlasaError("predict.py is one process: start it without torchrun")
    checkpoint = alasa.load_checkpoint(args.checkpoint)
    trained_args, classes = Namespace(**checkpoint["args"]), checkpoint["classes"]
    frame = read_inputs(args, trained_args)
    picture = f"{os.path.splitext(args.output)[0]}.png"
    outputs = [args.output, picture] if "label" in frame else [args.output]
    run_folder = os.path.dirname(args.checkpoint)
    inputs = [os.path.join(run_folder, name) for name in alasa.RUN_FILES]
    inputs += [args.checkpoint, trained_args.train_csv, trained_args.valid_csv]
    inputs += [args.test_csv or default_test_csv(trained_args), *frame["path"]]
    check_outputs(inputs, outputs)

    logits, errors = predict_logits(frame, checkpoint, args, trained_args)
    table = make_table(frame["image"].tolist(), classes, logits, errors)
    with atomic_write(args.output) as file:
        table.to_csv(file, index=False, errors="surrogateescape")
    print(f"{len(table)} rows in {args.output}")
    failures = errors[errors != ""]
    if len(failures) > 0:
        count = f"{len(failures)} of {len(table)} failed"
        print(f"{count}, first {failures[0]}", file=sys.stderr)
    if len(table) <= 20:
        shown = table if len(classes) <= 10 else table[["image", "label", "score"]]
        print(shown.to_string(index=False))
    scored = "label" in frame and score_predictions(frame, logits, classes, picture)
    if not scored and os.path.exists(picture):
        print(f"{picture} is of other predictions: these have no labels to score")
    return table


if __name__ == "__main__":
    with alasa.as_script():
        table = main(parse_args())
        some_failed = "error" in table
        sys.exit(1 if some_failed else 0)
