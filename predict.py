"""Predict with a checkpoint of train.py; without flags, the demo's test images."""

import os
from argparse import ArgumentParser, Namespace

from train import WORKERS, Defaults

usage = "python predict.py [flags] [photo1.jpg photo2.jpg ...]"
parser = ArgumentParser(None, usage, __doc__, formatter_class=Defaults)
add = parser.add_argument_group("images").add_argument
add("images", nargs="*", help="image files; none: those of --test-csv")
add("--test-csv", help="None: test.csv beside the training CSV of the checkpoint")
add("--image-column", help="None: as in training")
add("--label-column", help="None: as in training; if it exists, scores are printed")
add("--image-root", help="where relative images start; None: at the CSV's folder")
add = parser.add_argument_group("prediction").add_argument
add("--checkpoint", default="runs/best.pt", help="of train.py")
add("--output", default="predictions.csv", help="CSV to write")
add("--tta", action="store_true", help="mean over the training augmentation's views")
add("--batch-size", type=int, default=0, help="0: as in training, for the same bits")
add("--workers", type=int, default=WORKERS, help="processes that decode images")
add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")


def main(args: Namespace) -> int:
    """Write the predictions, and where labels exist their scores; 1 if an image failed."""
    checkpoint = alasa.load_checkpoint(args.checkpoint)
    s, places = checkpoint["settings"], range(1, len(args.images) + 1)
    frame = pd.DataFrame({"image": args.images}, [f"image {n}" for n in places])
    csv = args.test_csv or os.path.join(os.path.dirname(s["train_csv"]), "test.csv")
    picture = f"{os.path.splitext(args.output)[0]}.png"
    if not args.images:
        image = args.image_column or s["image_column"]
        columns = {"image": image, "label": args.label_column or s["label_column"]}
        frame = alasa.read_csv(csv, columns, args.image_root, labelled=False)
    inputs = [csv, args.checkpoint, *frame.get("path", frame["image"])]
    outputs = {*map(os.path.realpath, (args.output, picture))}
    if len(outputs) < 2 or outputs & {*map(os.path.realpath, inputs)}:
        raise alasa.AlasaError(f"{args.output}: would replace an input, or itself")
    how = args.device, args.workers, args.batch_size, args.tta
    table = alasa.predict(checkpoint, frame, *how)
    how = {"mode": "wb", "index": False, "errors": "surrogateescape"}
    alasa.write_file(args.output, lambda file: table.to_csv(file, **how))
    good = (table["label"] != "").to_numpy()
    print(f"{len(table)} rows in {args.output}, {sum(~good)} of them with an error")
    if "label" in frame and good.any():
        with alasa.blame(f"{picture} cannot be drawn"):
            report(frame["label"][good], table[good], s["classes"], picture)
    if len(table) <= 20:
        print(table.to_string(index=False))
    return 0 if good.all() else 1


def report(labels, table: "pd.DataFrame", classes: list[str], picture: str) -> None:
    """Print the scores of labelled images; draw their confusion matrix and ROC curves."""
    from matplotlib.pyplot import Figure, rcParams
    from sklearn.metrics import ConfusionMatrixDisplay, RocCurveDisplay

    if unknown := sorted(set(labels) - set(classes)):
        print(f"not scored: the labels {unknown} are not among the classes {classes}")
        return
    p = table[[f"p_{name}" for name in classes]].to_numpy()
    scores = alasa.score([classes.index(label) for label in labels], p)
    print(", ".join(f"{name} {value:.6g}" for name, value in scores.items()))
    if absent := sorted(set(classes) - set(labels)):
        print(f"auc and wauc are undefined: no image is {absent}")
    rcParams["text.parse_math"] = False  # a class may be called $
    figure = Figure(figsize=(12, 5.5), layout="constrained")
    matrix, roc = figure.subplots(1, 2)
    how = {"labels": classes, "xticks_rotation": 90, "include_values": p.shape[1] <= 20}
    ConfusionMatrixDisplay.from_predictions(labels, table["label"], ax=matrix, **how)
    for k, name in enumerate(classes[:10]):
        if name not in absent and (k or len(classes) > 2):
            RocCurveDisplay.from_predictions(labels == name, p[:, k], name=name, ax=roc)
    roc.set(xlabel="false positive rate", ylabel="true positive rate")
    alasa.write_file(picture, lambda file: figure.savefig(file, dpi=120))
    print(f"confusion matrix and ROC curves in {picture}")


if __name__ == "__main__":
    args = parser.parse_args()
    if args.images and args.test_csv:
        parser.error("give images or --test-csv, not both")
    if min(args.workers, args.batch_size) < 0:
        parser.error("--workers and --batch-size are at least 0")
    import pandas as pd  # late, as in train.py

    import alasa

    alasa.run_script(lambda: main(args))
