"""Train a classifier; without CSVs, the demo: the handwritten digits of scikit-learn.

python train.py
python train.py --train-csv train.csv --valid-csv valid.csv
torchrun --nproc-per-node=4 train.py --train-csv train.csv --valid-csv valid.csv
"""

import argparse
import contextlib
import os
import shlex
import sys

# Upright figures of 8x8 pixels: nothing to flip, and no ImageNet to build on.
DEMO = "--train-csv digits/train.csv --valid-csv digits/valid.csv --image-size 32 "
DEMO += "--augment none --weights none --batch-size 64 --epochs 8"


def number(kind: type, low: float, high: float = float("inf")):
    """Return an argparse type: a number in low..high."""

    def parse(text: str) -> float:
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not in {low}..{high}")
        return kind(text)

    parse.__name__ = kind.__name__
    return parse


def parse_flags(flags: list[str]) -> argparse.Namespace:
    """Return the flags by the names that `alasa.fit` knows them by."""

    class Shown(
        argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter
    ):
        """Keep the description's lines, and add each default."""

    about = {"usage": "python train.py [flags]", "description": __doc__}
    parser = argparse.ArgumentParser(**about, formatter_class=Shown, allow_abbrev=False)
    add_data_and_model(parser)
    add_training_and_run(parser)
    args = parser.parse_args(flags)
    if bool(args.train_csv) != bool(args.valid_csv):
        parser.error("--train-csv and --valid-csv belong together")
    if args.image_column == args.label_column:
        parser.error("--image-column and --label-column are the same")
    return args


def add_data_and_model(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say what is learnt from, and by what."""
    add = parser.add_argument_group("data").add_argument
    add("--train-csv", help="images to train on")
    add("--valid-csv", help="images that choose the best epoch")
    add("--image-column", default="image", help="column of image files")
    add("--label-column", default="label", help="column of labels, text or integers")
    add("--image-root", help="where relative images start, if not at the CSV's folder")
    add("--image-size", type=number(int, 1), help="pixels; None: native, never resized")
    augments = ["d4", "flip", "crop", "none"]
    add("--augment", choices=augments, default="d4", help="d4: flips and quarter turns")
    add("--balance", action="store_true", help="draw all classes equally often")
    add(
        "--check-images", action="store_true", help="decode every image before training"
    )
    add(
        "--workers", type=number(int, 0), help="decoding processes; None: by the device"
    )
    add = parser.add_argument_group("model").add_argument
    add("--arch", default="resnet18", help="any torchvision classifier")
    add("--weights", default="DEFAULT", help="torchvision's name, a file, or none")
    add("--freeze", action="store_true", help="train the new last layer only")
    add("--full-res-stem", action="store_true", help="stride 1 in the first layer")


def add_training_and_run(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say how it is learnt."""
    add = parser.add_argument_group("training").add_argument
    add(
        "--epochs", type=number(int, 1), default=10, help="passes over the data, in all"
    )
    add("--batch-size", type=number(int, 2), default=32, help="over all processes")
    add("--lr", type=number(float, 0), default=3e-4, help="halved as the score stalls")
    add("--weight-decay", type=number(float, 0), default=0.01, help="of the optimizer")
    add(
        "--optimizer",
        choices=["adamw", "sgd"],
        default="adamw",
        help="sgd: momentum 0.9",
    )
    add("--label-smoothing", type=number(float, 0, 1), default=0.0, help="in the loss")
    add("--monitor", choices=["auc", "wauc"], default="auc", help="what is best")
    add("--early-stop", type=number(int, 0), default=0, help="stalled epochs; 0: never")
    add = parser.add_argument_group("run").add_argument
    precisions = ["auto", "fp32", "bf16", "fp16"]
    add("--precision", choices=precisions, default="auto", help="auto: bf16 where fast")
    add("--compile", action="store_true", help="use torch.compile")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--seed", type=number(int, 0), default=0, help="of all randomness")
    add("--out", default="runs", help="folder of the run's files")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--overwrite", action="store_true", help="replace the run in --out")


def write_digits(folder: str) -> None:
    """Write the digits as PNG files, and train.csv, valid.csv and test.csv, once."""
    import numpy as np
    import pandas as pd
    from PIL import Image
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    os.makedirs(os.path.join(folder, "images"), exist_ok=True)
    names = [f"images/{index:04d}.png" for index in range(len(digits.target))]
    for name, pixels in zip(names, digits.images):
        grey = (pixels * 255 / 16).round().astype(np.uint8)
        Image.fromarray(grey).save(os.path.join(folder, name))
    rest = pd.DataFrame({"image": names, "label": digits.target})
    for split in ("test", "valid"):
        rest, part = train_test_split(
            rest, test_size=300, stratify=rest["label"], random_state=0
        )
        part.to_csv(os.path.join(folder, f"{split}.csv"), index=False)
    rest.to_csv(os.path.join(folder, "train.csv"), index=False)


def main(flags: list[str]) -> None:
    args = parse_flags(flags)
    demo = not args.train_csv
    if demo:
        flags = shlex.split(DEMO) + flags
        args = parse_flags(flags)
        print(
            "the demo is this command: python train.py", shlex.join(flags), flush=True
        )
        if not os.path.exists("digits/train.csv"):
            write_digits("digits")
    import alasa  # late, as torch takes seconds to import and --help should not

    if demo and not args.resume:  # it may overwrite its own run, and no other
        with contextlib.suppress(alasa.AlasaError):
            last = alasa.load_checkpoint(os.path.join(args.out, "last.pt"))
            args.overwrite |= last["settings"]["train_csv"] == args.train_csv
    alasa.run_script(lambda: alasa.fit(args) and 0)


if __name__ == "__main__":
    main(sys.argv[1:])
