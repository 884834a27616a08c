"""Train a classifier; without CSVs, the demo: the handwritten digits of scikit-learn."""

import contextlib
import os
import sys
from argparse import ArgumentDefaultsHelpFormatter as Defaults
from argparse import ArgumentParser

# Upright figures of 8x8 pixels: nothing to flip, and no ImageNet to build on.
DEMO = "--train-csv digits/train.csv --valid-csv digits/valid.csv --image-size 32 "
DEMO += "--augment none --weights none --batch-size 64 --epochs 8"
RANGES = {"epochs": (1, 1e9), "batch_size": (2, 1e9), "label_smoothing": (0, 1)}
WORKERS = min(8, (os.cpu_count() or 1) // 2 // int(os.environ.get("WORLD_SIZE", "1")))

usage = "python train.py [--train-csv train.csv --valid-csv valid.csv] [flags]"
parser = ArgumentParser(None, usage, __doc__, formatter_class=Defaults)
add = parser.add_argument_group("data").add_argument
add("--train-csv", help="images to train on")
add("--valid-csv", help="images that choose the best epoch")
add("--image-column", default="image", help="column of image files")
add("--label-column", default="label", help="column of labels, text or integers")
add("--image-root", help="where relative images start; None: at the CSV's folder")
add("--image-size", type=int, default=0, help="pixels; 0: native, never resized")
add("--augment", choices=["d4", "flip", "crop", "none"], default="d4", help="at random")
add("--balance", action="store_true", help="draw all classes equally often")
add("--check-images", action="store_true", help="decode all images before training")
add("--workers", type=int, default=WORKERS, help="processes that decode, per CSV")
add = parser.add_argument_group("model").add_argument
add("--arch", default="resnet18", help="any torchvision classifier")
add("--weights", default="DEFAULT", help="torchvision's name, a file, or none")
add("--freeze", action="store_true", help="train the new last layer only")
add("--full-res-stem", action="store_true", help="stride 1 in the first layers")
add = parser.add_argument_group("training").add_argument
add("--epochs", type=int, default=10, help="passes over the data, in all")
add("--batch-size", type=int, default=32, help="over all processes")
add("--lr", type=float, default=3e-4, help="halved as the score stalls")
add("--weight-decay", type=float, default=0.01, help="of the optimizer")
add("--optimizer", choices=["adamw", "sgd"], default="adamw", help="sgd: momentum 0.9")
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


def parse(flags: list[str]) -> dict[str, object]:
    """Return the flags by name, as `alasa.fit` takes them."""
    settings = vars(parser.parse_args(flags))
    if bool(settings["train_csv"]) != bool(settings["valid_csv"]):
        parser.error("--train-csv and --valid-csv belong together")
    for name, value in settings.items():
        least, most = RANGES.get(name, (0, 1e18))
        if isinstance(value, int | float) and not least <= value <= most:
            parser.error(f"--{name.replace('_', '-')} {value} is out of range")
    return settings


def write_digits() -> None:
    """Write the digits as PNG files, and test.csv, valid.csv and train.csv."""
    import pandas as pd
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    os.makedirs("digits/images", exist_ok=True)
    names = [f"images/{row:04d}.png" for row in range(len(digits.images))]
    for name, pixels in zip(names, digits.images):
        Image.fromarray((pixels * 255 / 16).round().astype("u1")).save(f"digits/{name}")
    rows = pd.Series(digits.target, names, name="label").sample(frac=1, random_state=0)
    splits = {"test": rows[:300], "valid": rows[300:600], "train": rows[600:]}
    for split, part in splits.items():
        part.to_csv(f"digits/{split}.csv", index_label="image")


if __name__ == "__main__":
    settings = parse(flags := sys.argv[1:])
    import alasa  # late, as torch takes seconds to import and --help should not

    if not settings["train_csv"]:
        settings = parse(flags := DEMO.split() + flags)
        print("the demo is this command: python train.py", *flags, flush=True)
        if not os.path.exists("digits/train.csv"):
            write_digits()
        with contextlib.suppress(alasa.AlasaError):  # it may replace its own run
            last = alasa.load_checkpoint(f"{settings['out']}/last.pt")
            settings["overwrite"] |= last["settings"]["train_csv"] == "digits/train.csv"
    alasa.run_script(lambda: alasa.fit(settings) and 0)
