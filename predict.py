"""Predict with a checkpoint of train.py; without flags, the demo's test images.

python predict.py
python predict.py --checkpoint runs/best.pt --test-csv test.csv --output predictions.csv
python predict.py photo1.jpg photo2.jpg
"""

import argparse
import os
import sys

from train import number


def parse_flags(flags: list[str]) -> argparse.Namespace:
    """Return the flags' values."""
    parser = argparse.ArgumentParser(
        usage="python predict.py [flags] [images]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    shown = " (default: %(default)s)"
    add = parser.add_argument_group("images").add_argument
    add("images", nargs="*", help="image files; none: those of --test-csv")
    add(
        "--test-csv", help="default: test.csv beside the training CSV of the checkpoint"
    )
    add("--image-column", help="default: as in training")
    add(
        "--label-column",
        help="default: as in training; scores are printed if it exists",
    )
    add("--image-root", help="where relative images start; default: the CSV's folder")
    add = parser.add_argument_group("prediction").add_argument
    add("--checkpoint", default="runs/best.pt", help="of train.py" + shown)
    add("--output", default="predictions.csv", help="CSV to write" + shown)
    add(
        "--tta", action="store_true", help="mean over the training augmentation's views"
    )
    add(
        "--batch-size",
        type=number(int, 1),
        help="default: as in training, for the same bits",
    )
    add(
        "--workers",
        type=number(int, 0),
        help="processes that decode; default: for the device",
    )
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps" + shown)
    return parser.parse_args(flags)


def main(args: argparse.Namespace) -> int:
    """Write the predictions, and where labels exist their scores; 1 if an image failed."""
    checkpoint = alasa.load_checkpoint(args.checkpoint)
    settings = checkpoint["settings"]
    if args.images:
        frame = pd.DataFrame({"image": args.images})
    else:
        beside = os.path.join(os.path.dirname(settings["train_csv"]), "test.csv")
        names = {
            key: getattr(args, key) or settings[key]
            for key in ("image_column", "label_column")
        }
        columns = {names["image_column"]: "image", names["label_column"]: "label"}
        frame = alasa.read_csv(
            args.test_csv or beside, columns, args.image_root, "image"
        )
    table, errors = alasa.predict(
        checkpoint, frame, args.device, args.workers, args.batch_size, args.tta
    )
    if errors:
        table["error"] = [errors.get(row, "") for row in range(len(table))]
    csv = table.to_csv(index=False).encode()
    alasa.write_file(Path(args.output), lambda file: file.write(csv))
    print(f"{len(table)} rows in {args.output}, {len(errors)} of them with an error")
    if "label" in frame and len(errors) < len(table):
        read = [row not in errors for row in range(len(table))]
        picture = Path(args.output).with_suffix(".png")
        report(frame["label"][read], table[read], checkpoint["classes"], picture)
    if len(table) <= 20:
        print(table.to_string(index=False))
    return 1 if errors else 0


def report(labels, table, classes: list[str], output) -> None:
    """Print the scores of labelled images; draw their confusion matrix and ROC curves."""
    if unknown := sorted(set(labels) - set(classes)):
        print(f"not scored: the labels {unknown} are not among the classes {classes}")
        return
    p = table[[f"p_{name}" for name in classes]]
    scores = alasa.score(labels.map(classes.index).to_numpy(), p.to_numpy())
    print(", ".join(f"{name} {value:.6g}" for name, value in scores.items()))
    if absent := sorted(set(classes) - set(labels)):
        print(f"auc and wauc are undefined: no image is {absent}")
    matplotlib.use("Agg")  # no display is needed
    figure = Figure(figsize=(12, 5.5), layout="constrained")
    matrix, roc = figure.subplots(1, 2)
    options = {"labels": classes, "ax": matrix, "xticks_rotation": "vertical"}
    many = len(classes) > 20
    ConfusionMatrixDisplay.from_predictions(
        labels, table["label"], include_values=not many, colorbar=many, **options
    )
    for name in classes[len(classes) == 2 :][:10]:
        if name not in absent:
            RocCurveDisplay.from_predictions(
                labels == name, p[f"p_{name}"], name=name, ax=roc
            )
    alasa.write_file(output, lambda file: figure.savefig(file, dpi=120))
    print(f"confusion matrix and ROC curves in {output}")


if __name__ == "__main__":
    args = parse_flags(sys.argv[1:])
    # Late, as torch takes seconds to import and --help should not.
    from pathlib import Path

    import matplotlib
    import pandas as pd
    from matplotlib.figure import Figure
    from sklearn.metrics import ConfusionMatrixDisplay, RocCurveDisplay

    import alasa

    alasa.run_script(lambda: main(args))
