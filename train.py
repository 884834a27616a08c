"""Train a classifier; without CSVs, the demo: the handwritten digits of scikit-learn.

python train.py
python train.py --train-csv train.csv --valid-csv valid.csv
torchrun --nproc-per-node=4 train.py --train-csv train.csv --valid-csv valid.csv
"""

import argparse
import contextlib
import math
import os
import sys

# Upright figures of 8x8 pixels: nothing to flip, and no ImageNet to build on.
DEMO = "--train-csv digits/train.csv --valid-csv digits/valid.csv --image-size 32 "
DEMO += "--augment none --weights none --batch-size 64 --epochs 8"
LEAST = {"image_size": 0, "workers": 0, "epochs": 1, "batch_size": 2, "lr": 0}
LEAST |= {"weight_decay": 0, "label_smoothing": 0, "early_stop": 0, "seed": 0}
MOST = {"label_smoothing": 1}
WORLD = int(os.environ.get("WORLD_SIZE", "1"))  # processes of torchrun
WORKERS = min(8, (os.cpu_count() or 1) // 2 // WORLD)


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawTextHelpFormatter):
    """Keep the description's lines, and show each default."""


usage = "python train.py [flags]"
parser = argparse.ArgumentParser(None, usage, __doc__, formatter_class=Help)
add = parser.add_argument_group("data").add_argument
add("--train-csv", help="images to train on")
add("--valid-csv", help="images that choose the best epoch")
add("--image-column", default="image", help="column of image files")
add("--label-column", default="label", help="column of labels, text or integers")
add("--image-root", help="where relative images start; None: at the CSV's folder")
add("--image-size", type=int, default=0, help="pixels; 0: native, never resized")
augments = ["d4", "flip", "crop", "none"]
add("--augment", choices=augments, default="d4", help="d4: flips and quarter turns")
add("--balance", action="store_true", help="draw all classes equally often")
add("--check-images", action="store_true", help="decode all images before training")
add("--workers", type=int, default=WORKERS, help="processes that decode images")
add = parser.add_argument_group("model").add_argument
add("--arch", default="resnet18", help="any torchvision classifier")
add("--weights", default="DEFAULT", help="torchvision's name, a file, or none")
add("--freeze", action="store_true", help="train the new last layer only")
add("--full-res-stem", action="store_true", help="stride 1 in the first layer")
add = parser.add_argument_group("training").add_argument
add("--epochs", type=int, default=10, help="passes over the data, in all")
add("--batch-size", type=int, default=32, help="over all processes")
add("--lr", type=float, default=3e-4, help="halved as the score stalls")
add("--weight-decay", type=float, default=0.01, help="of the optimizer")
optimizers = ["adamw", "sgd"]
add("--optimizer", choices=optimizers, default="adamw", help="sgd: momentum 0.9")
add("--label-smoothing", type=float, default=0.0, help="of the loss, 0..1")
add("--monitor", choices=["auc", "wauc"], default="auc", help="what is best")
add("--early-stop", type=int, default=0, help="stalled epochs to wait; 0: for ever")
add = parser.add_argument_group("run").add_argument
precisions = ["auto", "fp32", "bf16", "fp16"]
add("--precision", choices=precisions, default="auto", help="auto: bf16 where fast")
add("--compile", action="store_true", help="use torch.compile")
add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
add("--seed", type=int, default=0, help="of all randomness")
add("--out", default="runs", help="folder of the run's files")
add("--resume", action="store_true", help="go on with the run in --out")
add("--overwrite", action="store_true", help="replace the run in --out")


def parse(flags: list[str]) -> argparse.Namespace:
    """Return the flags by the names that `alasa.fit` knows them by."""
    args = parser.parse_args(flags)
    if bool(args.train_csv) != bool(args.valid_csv):
        parser.error("--train-csv and --valid-csv belong together")
    for name, least in LEAST.items():
        if not least <= getattr(args, name) <= MOST.get(name, math.inf):
            parser.error(
                f"--{name.replace('_', '-')} {getattr(args, name)} is out of range"
            )
    return args


def write_digits(folder: str) -> None:
    """Write the digits as PNG files, and test.csv, valid.csv and train.csv."""
    import pandas as pd
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    os.makedirs(f"{folder}/images", exist_ok=True)
    rows = [(f"images/{i:04d}.png", label) for i, label in enumerate(digits.target)]
    for (name, _), pixels in zip(rows, digits.images):
        grey = (pixels * 255 / 16).round().astype("uint8")
        Image.fromarray(grey).save(f"{folder}/{name}")
    table = pd.DataFrame(rows, columns=["image", "label"]).sample(
        frac=1, random_state=0
    )
    for split, first, last in (
        ("test", 0, 300),
        ("valid", 300, 600),
        ("train", 600, None),
    ):
        table[first:last].to_csv(f"{folder}/{split}.csv", index=False)


def main(flags: list[str]) -> None:
    """Train as the flags say."""
    demo = not parse(flags).train_csv
    if demo:
        flags = DEMO.split() + flags
        print("the demo is this command: python train.py", *flags, flush=True)
        if not os.path.exists("digits/train.csv"):
            write_digits("digits")
    args = parse(flags)
    import alasa  # late, as torch takes seconds to import and --help should not

    if demo and not args.resume:  # it may overwrite its own run, and no other
        with contextlib.suppress(alasa.AlasaError):
            last = alasa.load_checkpoint(f"{args.out}/last.pt")
            args.overwrite |= last["settings"]["train_csv"] == args.train_csv
    alasa.run_script(lambda: alasa.fit(args) and 0)


if __name__ == "__main__":
    main(sys.argv[1:])
