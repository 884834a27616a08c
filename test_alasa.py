"""Tests of what README promises: `pytest test_alasa.py`.  No download, no network.

Each test works in a folder of its own, which holds train.csv, valid.csv and their images.
"""

import errno
import itertools
import math
import multiprocessing
import os
import random
import re
import resource
import runpy
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from argparse import Namespace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

import alasa
import predict
import train

HERE = Path(__file__).parent
TINY = "--train-csv train.csv --valid-csv valid.csv --arch squeezenet1_1 --weights none"
TINY += " --image-size 32 --batch-size 4 --epochs 2 --workers 0 --precision fp32"
os.environ["OMP_NUM_THREADS"] = "1"  # of the scripts
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # CUDA does not survive a fork
torch.set_num_threads(1)


# ---------------------------------------------------------------- helpers


def picture(seed: int, size=(32, 32), bright: bool = False) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 128, (*size[::-1], 3), np.uint8)
    return Image.fromarray(noise + np.uint8(100 * bright))


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """13 + 8 noise images, of which "cat" is brighter than "ant"."""
    folder = tmp_path_factory.mktemp("data")
    for split, count in (("train", 13), ("valid", 8)):
        rows = [(f"{split} {i}.png", ("ant", "cat")[i % 2]) for i in range(count)]
        for i, (name, label) in enumerate(rows):
            picture(i + 100 * count, bright=label == "cat").save(folder / name)
        table = pd.DataFrame(rows, columns=["image", "label"])
        table.to_csv(folder / f"{split}.csv", index=False)
    return folder


@pytest.fixture(autouse=True)
def work_in_a_copy_of_the_data(data, tmp_path, monkeypatch):
    monkeypatch.chdir(shutil.copytree(data, tmp_path, dirs_exist_ok=True))


def fit(more: str = "", criterion=None) -> list[dict]:
    return train.main(train.parse_args(f"{TINY} {more}".split()), criterion)


def run_predict(*flags: object) -> pd.DataFrame:
    return predict.main(predict.parse_args([*map(str, flags), "--workers=0"]))


@pytest.fixture(scope="session")
def reference(data, tmp_path_factory) -> Path:
    """A run of three epochs."""
    out = tmp_path_factory.mktemp("runs") / "reference"
    fit(
        f"--epochs 3 --out {out} --train-csv {data}/train.csv --valid-csv {data}/valid.csv"
    )
    return out


def same_weights(*runs: str | Path) -> bool:
    for name in ("best.pt", "last.pt"):
        one, other = [alasa.load_checkpoint(f"{run}/{name}")["model"] for run in runs]
        if not all(torch.equal(one[key], other[key]) for key in one | other):
            return False
    return True


def contents(folder: str | Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


def refused(expected: str):
    return pytest.raises(alasa.AlasaError, match=f"^.*({expected}).*$")


def as_script(main) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # nohup would ignore it
    with alasa.as_script("; --resume goes on"):
        main()


def script(*command: object) -> subprocess.CompletedProcess:
    command = [sys.executable, *map(str, command)]
    pipes = {"capture_output": True, "text": True}
    return subprocess.run(command, check=False, timeout=100, **pipes)


def fork(main, *args: object, seconds: float = 60) -> int | None:
    """Return how main(*args) exits in a process that need not import torch again."""
    process = multiprocessing.get_context("fork").Process(target=main, args=args)
    process.start()
    process.join(seconds)
    process.kill()
    process.join()
    return process.exitcode


# ---------------------------------------------------------------- scores


def test_weighted_auc_of_the_published_cases():
    cases = [
        ("000111", ".1 .2 .3 .7 .8 .9", 1),
        ("0011", ".5 .5 .5 .5", 0.5857142857),
        ("1011010100", ".95 .9 .8 .7 .6 .55 .5 .4 .3 .2", 0.7714285714),
        ("110110111011", ".9 .8 .7 .6 .6 .6 .6 .5 .4 .4 .2 .1", 0.5495590829),
    ]
    for labels, scores, expected in cases:
        wauc = alasa.weighted_auc(np.array([*map(int, labels)]), scores.split())
        assert wauc == pytest.approx(expected, abs=1e-9)


def brute_force_auc(labels: np.ndarray, scores: np.ndarray, twice: float) -> float:
    """Compare all pairs; among ties, let TPR rise in 10,000 steps."""
    negatives, positives = scores[labels == 0], scores[labels == 1, None]
    least, most = (positives > negatives).mean(0), (positives >= negatives).mean(0)
    tpr = np.linspace(least, most, 10001)
    areas = np.trapezoid(tpr + np.minimum(tpr, twice), dx=1e-4, axis=0)
    return areas.mean() / (1 + twice)


def test_scores_equal_independent_oracles_on_random_ties():
    rng = np.random.default_rng(0)
    for _ in range(200):
        labels = np.r_[0, 1, rng.integers(0, 2, rng.integers(1, 40))]
        scores = rng.integers(0, rng.integers(1, 12), len(labels)) / 16
        logits = np.stack([-scores, scores], axis=1)
        found = alasa.score(labels, logits)
        assert found["auc"] == pytest.approx(brute_force_auc(labels, scores, 0))
        assert found["wauc"] == pytest.approx(brute_force_auc(labels, scores, 0.4))
    p, labels = rng.dirichlet(np.ones(4), 50), np.arange(50) % 4
    found = alasa.score(labels, np.log(p))
    aucs = [brute_force_auc(labels == k, p[:, k], 0) for k in range(4)]
    assert found["auc"] == pytest.approx(np.mean(aucs))
    wauc = brute_force_auc(labels != 0, 1 - p[:, 0], 0.4)  # by P(not Cover) alone
    assert found["wauc"] == pytest.approx(wauc)


def test_an_undefined_score_is_an_error_or_nan_never_a_number():
    for labels, scores in (([0, 1], [0.5, math.nan]), ([1, 1], [0.1, 0.2])):
        with pytest.raises(ValueError):
            alasa.weighted_auc(np.array(labels), np.array(scores))
    assert math.isnan(alasa.score([1, 1], np.full((2, 2), 0.5))["auc"])
    nothing = alasa.score([0, 1], np.full((2, 2), math.nan))
    assert all(map(math.isnan, nothing.values()))
    one_class_absent = alasa.score([0, 1], np.eye(3)[:2])
    assert math.isnan(one_class_absent["auc"]) and one_class_absent["wauc"] == 1


def test_infinite_scores_tie_like_others():
    labels, scores = (
        np.array([0, 1, 1, 0]),
        np.array([math.inf, math.inf, 0, -math.inf]),
    )
    for order in itertools.permutations(range(4)):
        auc = alasa.weighted_auc(labels[[*order]], scores[[*order]], doubled_below=0)
        assert auc == pytest.approx(0.625)


def test_a_sure_network_is_ranked_where_its_probabilities_round_to_one():
    for shift in (-99, 0, 99):
        logits = np.array([[0.0, 1, -1], [0, 2, -1], [0, -1, 3]])
        logits[:, 1:] += shift
        assert alasa.score([0, 1, 2], logits)["wauc"] == 1


def test_the_best_epoch_has_the_highest_score_then_the_lowest_loss():
    scores = [math.nan, 0.5, 0.7, math.inf, 0.7, 0.7]
    losses = [0.1, 0.1, 0.9, 0.1, 0.3, 0.3]
    history = []
    for epoch, (auc, loss) in enumerate(zip(scores, losses), start=1):
        history.append({"epoch": epoch, "auc": auc, "valid_loss": loss})
    assert alasa.best_epoch(history, "auc") == 5
    assert alasa.best_epoch(history[:1], "auc") == 0


# ---------------------------------------------------------------- images


def test_native_pixels_are_the_decoded_ones_and_d4_only_moves_them():
    picture(1, (24, 24)).save("a.jpg", quality=90)
    decoded = torch.from_numpy(np.array(Image.open("a.jpg"))).permute(2, 0, 1)
    frame = pd.DataFrame({"image": ["a.jpg"], "label": 0})
    loader = DataLoader(alasa.AlasaDataset(frame, "valid"), batch_size=4)
    images, labels = next(iter(loader))
    assert torch.equal(images, decoded[None]) and labels.tolist() == [0]
    assert torch.equal(alasa.AlasaDataset(frame, "test")[0], decoded)
    turned = [torch.rot90(decoded, k, (1, 2)) for k in range(4)]
    eight = turned + [view.flip(2) for view in turned]
    dataset, seen = alasa.AlasaDataset(frame, "train"), set()
    for epoch in range(200):
        dataset.set_epoch(epoch)
        image, _ = dataset[0]
        seen.add(next(k for k in range(8) if torch.equal(image, eight[k])))
    assert seen == set(range(8))
    wide = torch.arange(12).reshape(1, 3, 4)
    views = {tuple(alasa.d4_view(wide, view).flatten().tolist()) for view in range(8)}
    assert len(views) == 4 and alasa.d4_view(wide, 7).shape == wide.shape


def read(image: Image.Image, kind: str = "PNG", **options) -> np.ndarray:
    image.save("image", kind, **options)
    return np.asarray(alasa.read_image("image")).astype(int)


def test_every_kind_of_pixel_is_read_right():
    grey16 = Image.fromarray(np.arange(0, 65536, 257, np.uint16).reshape(16, 16))
    assert (read(grey16)[..., 2].ravel() == np.arange(256)).all()
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    assert read(palette, transparency=0).tolist() == [[[255] * 3, [40, 50, 60]]]
    rgb = picture(2)
    assert np.abs(read(rgb.convert("CMYK"), "TIFF") - np.asarray(rgb)).max() <= 1
    film = read(rgb, "GIF", save_all=True, append_images=[picture(3)])
    assert (film == np.asarray(Image.open("image").convert("RGB"))).all()
    film = read(rgb, "PNG", save_all=True, append_images=[picture(3)])
    assert (film == np.asarray(rgb)).all()
    header = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)  # 16-bit RGB
    chunks = [png_chunk(b"IHDR", header), png_chunk(b"tRNS", bytes(6))]
    Path("image").write_bytes(alasa.PNG_SIGNATURE + b"".join(chunks))
    with refused("transparency is of a kind that Pillow misreads"):
        alasa.read_image("image")
    for kind in (np.float32, np.int32):
        with refused("not plain 16 bits"):
            read(Image.fromarray(np.full((2, 2), 9, kind)), "TIFF")


def test_transparency_is_laid_over_white_unless_nothing_would_be_left():
    clear = Image.new("RGBA", (2, 1), (10, 20, 30, 0))
    for kind in ("PNG", "TIFF", "WEBP", "BMP"):
        options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
        assert (read(clear, kind, **options) == [10, 20, 30]).all()
    clear.putpixel((1, 0), (10, 20, 30, 255))
    assert read(clear).tolist() == [[[255] * 3, [10, 20, 30]]]
    # Red, green, blue and infrared, as no tag says that the fourth is alpha.
    read(clear, "TIFF")
    tiff = bytearray(Path("image").read_bytes())
    place = tiff.index(struct.pack("<HH", 338, 3))
    tiff[place : place + 2] = struct.pack("<H", 65000)
    Path("image").write_bytes(tiff)
    assert (np.asarray(alasa.read_image("image")) == [10, 20, 30]).all()


def png_chunk(kind: bytes, content: bytes) -> bytes:
    checksum = zlib.crc32(kind + content)
    return (
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)
    )


def test_an_image_is_turned_upright_whatever_else_its_metadata_say():
    wide = picture(4, (20, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    upright = np.rot90(np.asarray(wide), -1)
    for kind, how in (("PNG", {"exif": exif}), ("TIFF", {"tiffinfo": {0x0112: 6}})):
        assert (read(wide.convert("RGBA"), kind, **how) == upright).all()

    def odd_exif(tag: int, kind: int, value: bytes) -> bytes:
        entries = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
        entries += struct.pack("<HHI", tag, kind, 1) + value
        return b"Exif\0\0II*\0\x08\0\0\0\x02\0" + entries + bytes(4)

    odd = [odd_exif(0x0100, 2, b"abc\0"), odd_exif(0x011A, 5, b"\xff\xff\xff\x7f")]
    odd += [odd_exif(0x011A, 10, b"\x26\0\0\0") + struct.pack("<ii", -1, 0)]
    for exif in odd:
        turned = read(wide, "JPEG", exif=exif, quality=95)
        assert turned.shape == upright.shape and np.abs(turned - upright).mean() < 30
    read(wide, "JPEG", exif=b"Exif\0\0damaged")

    read(wide)
    png = Path("image").read_bytes()
    text = b"Comment\0\0" + zlib.compress(bytes(9_000_000))
    chunks = [png_chunk(b"zTXt", text), png_chunk(b"iCCP", b"x\0\0broken")]
    chunks.append(png_chunk(b"eXIf", b"damaged")[:-1] + b"?")
    for chunk in chunks:
        Path("image").write_bytes(png[:33] + chunk + png[33:])
        assert (np.asarray(alasa.read_image("image")) == np.asarray(wide)).all()


def test_a_bad_image_is_one_line_that_names_it(monkeypatch):
    picture(5, (64, 64)).save("whole.jpg")
    picture(5, (64, 64)).save("whole.png")
    for whole in (Path("whole.jpg").read_bytes(), Path("whole.png").read_bytes()):
        for tenth in range(10):
            Path("bad").write_bytes(whole[: len(whole) * tenth // 10])
            with refused("bad: not a readable image"):
                alasa.read_image("bad")
    os.mkfifo("pipe")
    with refused("pipe: not a readable image: not a file"):
        alasa.read_image("pipe")
    Path("page.jpg").write_text("<!DOCTYPE html>")
    with refused("page.jpg: .* starts with b'<!DOCTYPE html>'"):
        alasa.read_image("page.jpg")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with refused("bomb"):
        alasa.read_image("whole.jpg")


def test_a_thin_image_costs_no_more_than_another():
    thin = Image.fromarray(np.zeros((20_000, 3, 3), np.uint8))
    assert alasa.make_transform(224)(thin).shape == (3, 224, 224)
    square = alasa.make_transform(16)(picture(1, (40, 30)))
    assert square.shape == (3, 16, 16)


def test_a_flipped_bit_never_changes_the_pixels_of_a_png():
    picture(5).convert("RGBA").save("a.png")
    content, caught = bytearray(Path("a.png").read_bytes()), 0
    for place in range(40, len(content), 29):  # Pillow alone decodes some of these
        content[place] ^= 2
        Path("a.png").write_bytes(content)
        content[place] ^= 2
        try:
            assert alasa.read_image("a.png").tobytes() == picture(5).tobytes()
        except alasa.AlasaError:
            caught += 1
    assert caught > 50
    palette = picture(5).quantize(8)
    palette.info["transparency"] = 0
    palette.save("a.png")
    whole = Path("a.png").read_bytes()
    for kind in (b"PLTE", b"tRNS", b"IDAT"):
        for bit in range(8):
            content = bytearray(whole)
            content[whole.index(kind)] ^= 1 << bit  # now it may pass for a text
            Path("a.png").write_bytes(content)
            with refused("a.png: not a readable image"):
                alasa.read_image("a.png")


# ---------------------------------------------------------------- rows


def test_a_bad_csv_is_one_line_that_names_file_and_line():
    faults = {
        b"": "bad.csv: has no rows",
        b"image,label\n": "bad.csv: has no rows",
        b'image,label\na,"b\n': "bad.csv: not a readable CSV",
        b"\xff\xfei\x00": "bad.csv: not a readable CSV",
        b"image,label,label\na,b,c\n": "has two columns 'label'",
        b"img,label\na,b\n": "has no column 'image', only .*img.* give --image-column",
        b"image;label\na;b\n": "looks separated by ';'",
        b"image\tlabel\na\tb\n": "looks separated by",
        b"image;label;w\na;b;1,5\n": "looks separated by ';'",
        b"image,label\na\0.png,b\n": "line 2: 'a.x00.png' is no file name",
        b"image,label\na,b\n ,b\n": "bad.csv line 3: ' ' is no file name",
        b"image,label\na,b\nc\n": "bad.csv line 3: has 1 cells, not 2",
        b"image,label\na,b,c\nd,e,f\n": "bad.csv line 2: has 3 cells.*line 3",
        b'image,label\na,"b\nc"\n,d\n': "bad.csv line 4: '' is no file name",
    }
    for content, expected in faults.items():
        Path("bad.csv").write_bytes(content)
        with refused(expected):
            alasa.read_csv("bad.csv")


def test_cells_stay_what_they_are():
    Path("sub").mkdir()
    mask = "1 1 " * 50_000
    text = f'\ufefftarget, id,more\r\nNA,"a, b.png",{mask}\r\n\r\n007,c.png,2\r\n'
    Path("sub/odd.csv").write_text(text, newline="")
    frame = alasa.read_csv("sub/odd.csv", "id", "target")
    assert frame["label"].tolist() == ["NA", "007"]
    assert frame["path"].tolist() == ["sub/a, b.png", "sub/c.png"]
    assert frame.index.tolist() == ["sub/odd.csv line 2", "sub/odd.csv line 4"]
    frame = alasa.read_csv("sub/odd.csv", "id", "target", image_root="photos")
    assert frame["path"].tolist() == ["photos/a, b.png", "photos/c.png"]


def make_tree(folder: str, *names: str) -> None:
    for name in names:
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(len(name)).save(path, "PNG")


def test_a_folder_is_read_as_torchvisions_image_folder_does(capsys):
    make_tree("tree", "b/2.png", "a/1.JPG", "b/deep/3.webp", "b/4.png", "a/note.txt")
    frame = alasa.read_rows("tree")
    expected = torchvision.datasets.ImageFolder("tree")
    assert [*zip(frame["path"], frame["label"])] == [
        (path, expected.classes[number]) for path, number in expected.samples
    ]
    assert (
        "left out, as no images: 1 files, first tree/a/note.txt"
        in capsys.readouterr().out
    )
    make_tree(
        "tree", ".ipynb_checkpoints/1.png", "a/.hidden.png", "a/6.gif", "b/7.jfif"
    )
    assert len(alasa.read_rows("tree")) == len(frame) + 2  # the GIF and the JFIF
    assert "label" not in alasa.read_rows("tree/a")
    Path("tree/empty").mkdir()
    Path("tree/a/loop").symlink_to(".")
    Path("tree/a/up").symlink_to("..")
    Path("tree/hidden").mkdir()
    Path("tree/hidden/.DS_Store").touch()
    make_tree("tree", "loose.png")
    frame = alasa.read_rows("tree")
    out = capsys.readouterr().out
    assert "it is empty: tree/empty" in out and "it is empty: tree/hidden" in out
    assert len(frame) == 7 and not any("up" in path for path in frame["path"])
    assert frame["label"].tolist().count("") == 1
    assert sum(path.endswith("6.gif") for path in frame["path"]) == 1
    with refused("tree/empty: has no images"):
        alasa.read_rows("tree/empty")
    with refused("tree: the label of 'loose.png' is empty"):
        alasa.check_splits(frame, frame)


def read_splits() -> tuple[pd.DataFrame, pd.DataFrame]:
    return alasa.read_csv("train.csv"), alasa.read_csv("valid.csv")


def test_splits_with_an_undefined_or_flattering_score_are_refused():
    train, valid = read_splits()
    assert alasa.check_splits(train, valid) == ["ant", "cat"]
    numbers = [f"{i:+}" for i in range(6, -7, -1)]
    other = train.assign(label=numbers, path="valid 0.png")
    other["path"] = [f"valid {i % 8}.png" for i in range(13)]
    with refused("line 10: 'valid 0.png' is one image, '\\+6' and '-2'"):
        alasa.check_splits(train.assign(label=numbers), other)
    missing = r"train.csv line 2: 'nowhere': No such file.*; \.\.\. \(13 in all\)"
    Path("empty").touch()
    Path("folder").mkdir()
    Path("loop").symlink_to("loop")
    twice = pd.concat([train, train.tail(1).assign(label="cat")])
    faults = [
        (train.assign(label="ant"), valid, "one class only"),
        (train, valid.assign(label="dog"), "valid.csv line 2: no training label is"),
        (train, valid.assign(label="ant"), "no validation label is 'cat'"),
        (
            train,
            valid.assign(label=""),
            "valid.csv line 2: the label of 'valid 0.png' is",
        ),
        (train.drop(columns="label"), valid, "no label; give --label-column"),
        (train.assign(path="nowhere"), valid, missing),
        (train, valid.assign(path="empty"), "valid.csv line 2: 'empty' is empty"),
        (train, valid.assign(path="folder"), "'folder' is not a file"),
        (train, valid.assign(path="loop"), "'loop': Too many levels"),
        (twice, valid, "line 14: 'train 12.png' is one image, 'ant' and 'cat'"),
    ]
    for one, another, expected in faults:
        with refused(expected):
            alasa.check_splits(one, another)


def test_labels_that_look_alike_and_images_in_both_splits_are_refused():
    train, valid = read_splits()
    for twin in ("cat ", "c\u200bat", "cat\u2060"):
        odd = train["label"].where(train.index != train.index[1], twin)
        with refused("'cat' and .* look the same"):
            alasa.check_splits(train.assign(label=odd), valid)
    Path("soft.png").symlink_to("train 0.png")
    Path("hard.png").hardlink_to("train 0.png")
    for twin in ("soft.png", "hard.png", "./train 0.png"):
        paths = [twin, *valid["path"][1:]]
        with refused(f"valid.csv line 2: '{twin}' is a training image too"):
            alasa.check_splits(train, valid.assign(path=paths))


def test_what_is_odd_in_splits_but_may_be_meant_is_said(capsys):
    train, valid = read_splits()
    same_name = valid.assign(path=["sub/train 0.png", *valid["path"][1:]])
    Path("sub").mkdir()
    shutil.copy("train 0.png", "sub")
    twice = pd.concat([train, train])  # with the same labels: fine
    alasa.check_splits(twice, same_name)
    assert "1 file names are in both splits" in capsys.readouterr().out
    third = train.assign(label=["dog", *train["label"][1:]])
    assert alasa.check_splits(third, valid, "wauc") == ["ant", "cat", "dog"]
    with refused("wauc needs validation images of 'ant' and of another class"):
        alasa.check_splits(train, valid[valid["label"] == "cat"], "wauc")
    capital = train.assign(label=["Cat", *train["label"][1:]])
    alasa.check_splits(capital, valid, "accuracy")
    out = capsys.readouterr().out
    assert "'Cat' and 'cat' are two classes" in out and "AUC is undefined" in out


def test_integers_sort_as_numbers_and_text_as_text():
    assert alasa.find_classes(["10", "9", "-1", "+2"]) == ["-1", "+2", "9", "10"]
    assert alasa.find_classes(["10", "9", "x"]) == ["10", "9", "x"]


# ---------------------------------------------------------------- the model

ARCHS = (
    "resnet18 densenet121 squeezenet1_1 mobilenet_v3_small mnasnet0_5 vit_b_16 swin_t"
)


def cache_weights(arch: str, state: dict, monkeypatch) -> None:
    """Place an architecture's weights as if torchvision had downloaded them."""
    monkeypatch.setenv("TORCH_HOME", os.getcwd())
    url = torchvision.models.get_model_weights(arch).DEFAULT.url
    Path("hub/checkpoints").mkdir(parents=True)
    torch.save(state, f"hub/checkpoints/{Path(url).name}")


@pytest.mark.parametrize("arch", ARCHS.split())
def test_a_new_head_is_all_that_is_not_torchvisions_or_frozen(arch, monkeypatch):
    ones = torchvision.models.get_model(arch).state_dict()
    for key, old in ones.items():
        ones[key] = torch.ones((), dtype=old.dtype).expand_as(old)  # no space in a file
    cache_weights(arch, ones, monkeypatch)
    model = alasa.build_model(arch, 1000).eval()
    alasa.set_frozen(model, True)
    new = {key for key, tensor in model.state_dict().items() if (tensor != 1).any()}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert model.state_dict().keys() == ones.keys()
    assert new == trained and len(new) == 2
    with torch.inference_mode():
        assert model(torch.zeros(1, 3, 224, 224)).shape == (1, 1000)


def test_weights_of_other_tools_and_of_other_sizes_are_taken(capsys):
    plain = torchvision.models.resnet18(num_classes=2).state_dict()
    wrapped = {f"module.{key}": tensor for key, tensor in plain.items()}
    files = {"a.pt": plain, "b.pt": {"state_dict": wrapped, "epoch": 3}}
    files["d.pt"] = {"model": {f"_orig_mod.{key}": plain[key[7:]] for key in wrapped}}
    files["d.pt"]["args"] = Namespace(lr=1)  # as torchvision's own scripts save
    files["e.pt"] = {"model": "resnet18", "state_dict": plain}
    files["c.pt"] = {"model": plain, "classes": ["ant", "bee"]}
    for name, content in files.items():
        torch.save(content, name)
        model = alasa.build_model("resnet18", 2, name, class_names=["ant", "bee"])
        assert all(
            torch.equal(plain[key], new) for key, new in model.state_dict().items()
        )
        assert "kept the last layer" in capsys.readouterr().out
    alasa.build_model("resnet18", 2, "c.pt", class_names=["ant", "cat"])
    alasa.build_model("resnet18", 3, "a.pt")
    torch.save({"model": plain, "args": {"arch": "resnet18"}}, "own.pt")
    with refused("own.pt: .* trained with --arch resnet18"):
        alasa.build_model("resnet34", 2, "own.pt")
    assert capsys.readouterr().out.count("the last layer, fc, is new") == 2

    torch.save({"net.conv1.weight": torch.zeros(1)}, "odd.pt")
    with refused(r"odd.pt: it has \['net.conv1.weight'\], which this"):
        alasa.build_model("resnet18", 2, "odd.pt")
    old = {}
    for key, tensor in torchvision.models.densenet121().state_dict().items():
        old[re.sub(r"(denselayer\d+\.\w+)([12])\.", r"\1.\2.", key)] = tensor
    torch.save(old, "densenet.pth")
    alasa.build_model("densenet121", 2, "densenet.pth")
    vit = torchvision.models.vit_b_32(image_size=64).state_dict()
    torch.save(vit, "vit.pth")
    model = alasa.build_model("vit_b_32", 2, "vit.pth", image_size=96)
    assert model(torch.zeros(1, 3, 96, 96)).shape == (1, 2)
    assert alasa.default_image_size("vit_b_32", "vit.pth") == 64
    assert alasa.default_image_size("vit_b_16", "IMAGENET1K_SWAG_E2E_V1") == 384
    assert alasa.default_image_size("efficientnet_b2", "DEFAULT") == 224


def test_a_model_scales_pixels_as_its_weights_want():
    pixels = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8)
    for arch in ("resnet18", "efficientnet_v2_l"):
        weights = torchvision.models.get_model_weights(arch).DEFAULT
        wanted = weights.transforms(crop_size=40, resize_size=40)
def test_a_weight_that_sees_only_padding_has_no_gradient():
    model = alasa.build_model("mobilenet_v2", 2, "none")
    strided = [
        layer
        for layer in model.modules()
        if isinstance(layer, nn.Conv2d) and layer.stride == (2, 2)
    ]
    for layer in 3 * strided:
        image = torch.rand(4, layer.in_channels, 1, 1)
        with torch.autocast("cpu", torch.bfloat16):
            loss = layer(image).float().pow(2).sum()
        used = [torch.full((2**k,), 7.0) for k in range(4, 19) for _ in range(8)]
        del used  # the memory is free now, and keeps what it held
        (gradient,) = torch.autograd.grad(loss, layer.weight)
        centre = gradient[:, :, 1, 1].clone()
        gradient[:, :, 1, 1] = 0
        assert centre.any() and not gradient.any()


        model = alasa.build_model(arch, 2, "none")
        scaled = alasa.normalise(pixels, model.mean, model.std)
        assert torch.allclose(scaled, wanted(pixels), atol=1e-5)
    model = alasa.build_model("resnet18", 2, "none").eval()
    model.mean, model.std = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
    scaled = alasa.normalise(pixels, model.mean, model.std)
    assert torch.equal(model(pixels), model(scaled))
    assert not torch.equal(model(pixels), model(alasa.normalise(pixels)))


def test_the_stem_keeps_every_pixel_and_computes_in_float32():
    images = alasa.normalise(torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8))
    efficientnet = alasa.build_model("efficientnet_b0", 2, "none", full_res_stem=True)
    assert efficientnet.features[0](images).shape[2:] == (32, 32)
    resnet = alasa.build_model("resnet18", 2, "none", full_res_stem=True)
    stem = nn.Sequential(resnet.conv1, resnet.bn1, resnet.relu, resnet.maxpool)
    assert stem(images).shape[2:] == (32, 32)
    exact = resnet.conv1(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(resnet.conv1(images), exact.bfloat16())


def moved(old: dict, new: dict) -> set[str]:
    return {key for key in old if not torch.equal(old[key], new[key])}


def test_what_is_frozen_or_kept_stays_as_it_was():
    plain = torchvision.models.shufflenet_v2_x0_5().state_dict()
    torch.save(plain, "weights.pt")
    how = "--arch shufflenet_v2_x0_5 --weights weights.pt --overwrite"
    fit(f"{how} --freeze")
    head = {"fc.weight", "fc.bias"}
    frozen = alasa.load_checkpoint("runs/last.pt")["model"]
    assert moved(plain, frozen) == head
    fit(f"{how} --freeze 1")
    thawed = alasa.load_checkpoint("runs/last.pt")["model"]
    statistics = {key for key in plain if "running" in key or "batches" in key}
    assert moved(plain, thawed) == plain.keys() - statistics
    fit(f"{how} --freeze 0 --batch-norm train")
    assert moved(plain, alasa.load_checkpoint("runs/last.pt")["model"]) == plain.keys()
    model = alasa.build_model("shufflenet_v2_x0_5", 2, "none")
    model.conv1.requires_grad_(False)  # by the user: no reason to keep statistics
    alasa.set_training_mode(model, keep_batch_norm=False)
    assert all(layer.training for layer in model.modules())


def test_a_criterion_that_is_a_module_knows_training_from_validation():
    class Strange(nn.Module):
        weight = torch.tensor([1.0, 5.0])

        def forward(self, logits, labels):
            modes.append(self.training)
            loss = nn.functional.cross_entropy(logits, labels, self.weight)
            return loss * 1000 if self.training else loss

    modes = []
    shutil.copytree(".", "copies", dirs_exist_ok=True)
    copies = pd.read_csv("train.csv")[:12]
    copies.to_csv("train.csv", index=False)
    copies.to_csv("copies/train.csv", index=False)
    how = "--arch resnet18 --augment none --lr 0 --epochs 1 --batch-norm keep"
    row = fit(f"{how} --valid-csv copies/train.csv", Strange())[-1]
    assert row["train_loss"] == pytest.approx(row["valid_loss"])
    assert row["train_accuracy"] == row["valid_accuracy"]
    assert modes == [False, True, True, True, False, False]  # chance, 3 steps, 2 losses


# ---------------------------------------------------------------- the same bits


@pytest.mark.parametrize("how, workers", [("fork", 0), ("fork", 3), ("spawn", 1)])
def test_any_number_of_workers_gives_the_same_bits(reference, how, workers):
    def fit_so():
        multiprocessing.set_start_method(how, force=True)
        fit(f"--epochs 3 --workers {workers}")

    assert fork(fit_so) == 0
    assert same_weights("runs", reference)


@pytest.mark.parametrize(
    "more",
    [
        "--balance --schedule cosine",
        "--precision bf16 --freeze 1",
        "--augment crop --optimizer sgd --precision fp16",
    ],
)
def test_a_resumed_run_ends_bit_identical(more):
    more += " --arch mobilenet_v3_small"
    fit(f"{more} --out whole")

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "warn_of_flat_images", stop)
        fit(more)
    history = fit(f"{more} --resume --workers 1")
    assert same_weights("runs", "whole")
    log = pd.read_csv("runs/log.csv")
    assert log["epoch"].tolist() == [1, 2] == [row["epoch"] for row in history]


def test_killed_at_random_moments_and_resumed_ends_bit_identical(reference):
    for seconds in (*np.random.default_rng(0).uniform(0, 0.7, 5), 60):
        more = "--resume" if os.path.exists("runs/last.pt") else "--overwrite"
        fork(fit, f"--epochs 3 {more}", seconds=seconds)
        for file in Path().glob("runs/*.pt"):
            alasa.load_checkpoint(file)
    assert same_weights("runs", reference)
    assert not any(name.endswith(".part") for name in os.listdir("runs"))


def test_fine_tuning_in_two_stages_keeps_the_trained_head():
    fit("--freeze --out head --head-lr 1e-2 --epochs 3")
    second = "--weights head/best.pt --freeze 0 --lr 0 --head-lr 0 --epochs 1"
    row = fit(f"{second} --out all")[-1]
    log = pd.read_csv("head/log.csv")
    best = log.sort_values(["auc", "valid_loss"], ascending=[False, True]).iloc[0]
    assert row["auc"] == pytest.approx(best["auc"])
    assert row["valid_loss"] == pytest.approx(best["valid_loss"], rel=1e-5)


def test_importing_alasa_changes_nothing_in_the_process():
    program = """
import random, signal, os, warnings, numpy as np, pandas, sklearn.metrics, torch
import torch.distributed, torchvision.transforms.v2
def state():
    signals = [signal.getsignal(number) for number in signal.valid_signals()]
    generators = random.getstate(), np.random.get_state()[1].tolist()
    flags = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    state = torch.get_rng_state().tolist(), torch.get_num_threads(), list(warnings.filters)
    return signals, generators, flags, state, dict(os.environ)
before = state()
import alasa, train, predict
assert state() == before
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=HERE, check=False)
    assert done.returncode == 0


def test_a_callers_generators_and_settings_are_left_as_they_were(reference):
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    torch.use_deterministic_algorithms(False)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    run_predict("--checkpoint", reference / "best.pt", "--test-csv", "valid.csv")
    fit("--epochs 1")
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    assert after[:2] == before[:2] and torch.equal(after[2], before[2])
    assert not torch.are_deterministic_algorithms_enabled()


# ---------------------------------------------------------------- batches


def test_an_epoch_has_each_image_once_in_one_process_or_two(monkeypatch):
    frame = pd.DataFrame({"image": range(13), "label": [0] * 12 + [1]})
    train_set = alasa.AlasaDataset(frame, "train")
    valid_set = alasa.AlasaDataset(frame, "valid")

    def batches_of(data, epoch: int, batch_size: int) -> list[list[int]]:
        loader = alasa.make_loader(data, batch_size)
        alasa.begin_pass(loader, epoch)
        return list(loader.batch_sampler)

    batches, in_order = batches_of(train_set, 1, 4), batches_of(valid_set, 1, 4)
    assert [len(items) for items in batches] == [4, 4, 4]  # not the last single one
    assert len(np.unique(batches)) == 12
    assert [len(items) for items in batches_of(train_set, 1, 99)] == [13]
    assert np.concatenate(in_order).tolist() == list(range(13))
    assert batches == batches_of(train_set, 1, 4) != batches_of(train_set, 2, 4)
    other_seed = alasa.AlasaDataset(frame, "train", seed=1)
    assert batches_of(train_set, 2, 4) != batches_of(other_seed, 1, 4)
    monkeypatch.setattr(alasa, "get_world_size", lambda: 2)
    halves = []
    for rank in (0, 1):
        monkeypatch.setattr(alasa, "get_rank", lambda rank=rank: rank)
        assert batches_of(valid_set, 1, 4) == in_order[rank::2]  # whole batches
        halves.append(batches_of(train_set, 1, 4))
    for one, other, both in zip(*halves, batches):
        assert sorted(one + other) == sorted(both)


def test_balance_shows_a_rare_class_as_often_and_never_twice_alike():
    frame = pd.DataFrame({"image": [f"train {i}.png" for i in range(13)]})
    frame["label"] = [0] * 12 + [1]
    data = alasa.AlasaDataset(frame, "train", balance=True)
    loader = alasa.make_loader(data, 13)
    shown, views, rare_views = [], [set(), set()], []
    for epoch in range(1, 41):
        for images, labels in alasa.begin_pass(loader, epoch):
            shown += labels.tolist()
            rare_views.append(len(np.unique(images[labels == 1].numpy(), axis=0)))
            for image, label in zip(images, labels):
                views[label].add(image.numpy().tobytes())
    assert 0.4 < np.mean(shown) < 0.6
    assert np.mean(rare_views) > 3  # of about six draws in one epoch
    assert len(views[0]) > 80 and len(views[1]) == 8


# ---------------------------------------------------------------- mistakes


def test_a_mistake_is_one_line_and_leaves_nothing_behind(monkeypatch, capsys):
    monkeypatch.setenv("TORCH_HOME", "/nowhere")
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_, **__: 1 / 0)
    picture(6, (9, 6)).save("valid 3.png")  # for the first of the mistakes
    native = "--image-size 0 --augment d4"
    mistakes = {
        native: "images of 32x32 and of 9x6 pixels: give --image-size",
        "--augment crop --image-size 0": "--augment crop needs an --image-size",
        "--arch inception_v3": "inception_v3 is not supported",
        "--arch fcn_resnet50": "not supported; choose from.*resnet18",
        "--arch vit_b_16 --full-res-stem": "vit_b_16 has no stem",
        "--arch vit_b_16 --image-size 33": "--arch vit_b_16: Input shape indivisible",
        "--weights V7": "--weights V7: not a file of weights nor of .*IMAGENET1K_V1",
        "--weights DEFAULT": "download.pytorch.org.*checkpoints.*--weights FILE or none",
        "--device cuda:7": "--device cuda:7",
        "--resume": "last.pt: not a checkpoint of train.py: .*No such file",
        "--image-root /nowhere": "line 2: '/nowhere/train 0.png': No such file",
        "--image-column img": "has no column 'img'",
        "--workers -1": "out of range",
        "--epochs 0": "out of range",
        "--lr nan": "out of range",
        "--batch-size 99999999999999999999": "out of range",
        "--label-smoothing 2.0": "out of range",
        "--seed -1": "out of range",
        "--seed 20240101123456789012": "out of range",
        "--valid-csv train.csv": "is a training image too",
        "--out train.csv": "--out train.csv: .*File exists",
    }
    for more, expected in mistakes.items():
        with pytest.raises((alasa.AlasaError, SystemExit)) as fault:
            fit(more)
        told = capsys.readouterr().err
        if isinstance(fault.value, alasa.AlasaError):
            told = f"error: {alasa.one_line(fault.value)}\n"
        assert re.fullmatch(f"(usage: (.*\n)*.*)?.*error: .*({expected}).*\n", told), (
            more
        )
        assert not os.path.exists("runs")


def test_an_unreadable_image_stops_training_and_is_named(capfd):
    names = [f"train {i}.png" for i in range(12)]
    for name in names:
        os.truncate(name, 500)
    one = "error: train.csv line [0-9]+: train [0-9]+.png: not a readable image.*\n"
    every = (
        "error: .*" + ".*".join(f"{name}: not a readable" for name in names) + ".*\n"
    )
    for more in ("", "--workers 1", "--check-images"):
        assert fork(as_script, partial(fit, more)) == 2
        expected = every if more == "--check-images" else one
        assert re.fullmatch(expected, capfd.readouterr().err)
        assert not os.path.exists("runs")


def test_images_of_one_colour_are_warned_of(capsys):
    for name in ("train 3.png", "train 5.png"):
        Image.fromarray(np.arange(1024, dtype=np.uint16).reshape(32, 32)).save(name)
    fit("--epochs 1")
    expected = "warning: 2 images are of nearly one colour, first train.csv line 5: "
    assert expected + "train 3.png" in capsys.readouterr().out


def test_a_run_is_neither_overwritten_nor_resumed_by_another(reference):
    fit("--epochs 1")
    before = contents("runs")
    for more in ("--seed 1", "--arch resnet18", "--batch-size 5", "--lr 1"):
        with refused("--resume: .* was .*, now "):
            fit(f"--resume {more}")
    with refused("runs holds a run .*: --resume, --overwrite"):
        fit()
    pd.read_csv("valid.csv")[::-1].to_csv("valid.csv", index=False)
    with refused("--valid-csv had other rows when the run began"):
        fit("--resume")
    assert contents("runs") == before
    fit("--epochs 3 --seed 1 --overwrite")
    assert not same_weights("runs", reference)  # for another seed


def test_a_run_goes_on_where_its_data_have_moved(reference):
    shutil.copytree(reference, "runs")
    shutil.copytree(".", "moved", dirs_exist_ok=True)
    how = "--resume --train-csv moved/train.csv --valid-csv moved/valid.csv"
    assert len(fit(f"{how} --epochs 4")) == 4


def test_a_folder_has_one_writer(capfd):
    started, go_on = multiprocessing.Event(), multiprocessing.Event()

    def wait(logits, labels):
        started.set()
        go_on.wait(30)
        return nn.functional.cross_entropy(logits, labels)

    first = multiprocessing.get_context("fork").Process(target=fit, args=("", wait))
    first.start()
    assert started.wait(30)
    assert fork(as_script, partial(fit, "--overwrite")) == 2
    assert capfd.readouterr().err == "error: --out runs: another run is writing there\n"
    go_on.set()
    first.join()
    assert sorted(os.listdir("runs")) == sorted(alasa.RUN_FILES)


def test_a_users_files_in_the_folder_of_a_run_stay(capsys):
    Path("mine").mkdir()
    shutil.copy("train 0.png", "mine/batch.png")
    Path("empty").mkdir()
    for out in ("mine", "empty"):
        with refused("typo.csv: not a readable CSV"):
            fit(f"--train-csv typo.csv --out {out} --overwrite")
    assert os.listdir("mine") == ["batch.png"] and os.listdir("empty") == []
    with refused(r"mine holds a run \(batch.png\)"):
        fit("--out mine")


def test_a_folder_without_locks_is_used_with_a_warning(monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(alasa.fcntl, "lockf", no_locks)
    fit("--epochs 1")
    assert "warning: runs cannot be locked" in capsys.readouterr().out


def test_a_target_is_found_unfit_before_the_work(reference):
    Path("runs/log.csv").mkdir(parents=True)
    with refused("runs/log.csv: cannot be written: not a regular file"):
        fit()
    os.mkfifo("device")
    model = ("--checkpoint", reference / "best.pt", "--test-csv", "valid.csv")
    trained_on = alasa.load_checkpoint(reference / "best.pt")["args"]["train_csv"]
    for output in ("device", "nowhere/p.csv"):
        with refused(f"{output}: cannot be written"):
            run_predict(*model, "--output", output)
    for output in (
        "valid.csv",
        "new.png",
        "valid 0.csv",
        reference / "best.pt",
        trained_on,
    ):
        with refused("would replace an input, or itself"):
            run_predict(*model, "--output", output)


def test_a_worse_epoch_leaves_best_and_patience_survives(monkeypatch):
    values, real = iter([0.6, 0.9, 0.5, math.nan, 0.8]), alasa.evaluate

    def evaluate(*args):
        return real(*args) | {"wauc": next(values)}

    monkeypatch.setattr(alasa, "evaluate", evaluate)
    more = "--monitor wauc --early-stop 3 --epochs"
    fit(f"{more} 2")
    best = contents("runs")["best.pt"]
    history = fit(f"{more} 9 --resume")
    assert len(history) == 5  # three did not improve on the second
    assert contents("runs")["best.pt"] == best


@pytest.mark.parametrize("monitor", alasa.MONITORS)
def test_each_score_can_be_monitored(monitor, capsys):
    if monitor == "accuracy":
        table = pd.read_csv("valid.csv")
        table[table["label"] == "ant"].to_csv("valid.csv", index=False)
    fit(f"--monitor {monitor}")
    assert "best: epoch" in capsys.readouterr().out


def test_a_cosine_rises_to_the_rate_and_falls_towards_zero():
    for steps in range(1, 40):
        factors = [train.cosine_factor(step, steps) for step in range(steps)]
        assert max(factors) == 1 and min(factors) > 0
        assert factors[-1] < 0.26 or steps < 4


def test_the_rate_is_halved_when_neither_score_nor_loss_improves(monkeypatch):
    losses, real = iter([9, 8, 7, 6, 6, 6, 6, 6]), alasa.evaluate

    def evaluate(*args):
        return real(*args) | {"auc": 1.0, "valid_loss": next(losses)}

    monkeypatch.setattr(alasa, "evaluate", evaluate)
    history = fit("--epochs 8 --early-stop 4")
    rates = [row["lr"] / 3e-4 for row in history]
    assert rates == [1, 1, 1, 1, 1, 1, 1, 0.5]
    best = alasa.load_checkpoint("runs/best.pt")
    assert len(best["history"]) == 4


def train_and_act(act) -> None:
    """Train with a worker, as a script does, and call act() at the second epoch's second
    step; what it returns, if anything, is the loss."""
    calls = itertools.count(1)  # chance, then three steps and two losses an epoch

    def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        value = act() if next(calls) == 8 else None
        return value or nn.functional.cross_entropy(logits, labels)

    os.setsid()  # a group of processes that can be sent a signal
    as_script(partial(fit, "--workers 1 --epochs 4 --overwrite", loss))


def test_a_bad_loss_stops_the_run_and_names_the_images(capfd):
    assert fork(train_and_act, lambda: torch.tensor(math.nan)) == 2
    out, err = capfd.readouterr()
    data = alasa.AlasaDataset(alasa.read_csv("train.csv"), "train")
    loader = alasa.make_loader(data, 4)
    alasa.begin_pass(loader, 2)
    _, second, _ = loader.batch_sampler
    images = ", ".join(f"train {item}.png" for item in second)
    assert re.fullmatch(
        f"error: epoch 2: the loss became nan in batch 2, of {images}; .*\n", err
    )
    assert len(alasa.load_checkpoint("runs/last.pt")["history"]) == 1
    assert "left out of each epoch: 1, " in out


def test_a_bug_keeps_its_traceback_and_ends_the_workers(capfd, monkeypatch):
    assert fork(train_and_act, lambda: {}["bug"]) == 1
    assert "KeyError: 'bug'" in capfd.readouterr().err
    monkeypatch.setattr(alasa, "check_sizes", lambda _: torch.ones(2) @ torch.ones(3))
    assert fork(as_script, partial(fit, "--workers 1 --overwrite")) == 1
    assert "RuntimeError: " in capfd.readouterr().err


def test_a_run_without_a_finite_score_says_so_and_can_be_resumed(reference, capsys):
    more = "--optimizer sgd --lr 1e18 --batch-size 13 --epochs 1"
    fit(more)
    fit(f"{more} --resume")
    assert capsys.readouterr().out.count("best: none yet") == 2
    shutil.copytree(reference, "copied")
    shutil.copy("copied/best.pt", "copied/last.pt")
    with refused("copied/last.pt: has no optimizer"):
        fit("--resume --out copied")
    shutil.copytree(reference, "lost")
    os.remove("lost/best.pt")
    with refused("lost/best.pt: not a checkpoint.*No such file"):
        fit("--resume --out lost")


def test_sgd_survives_a_first_step_that_fp16_skips(monkeypatch):
    garbage = partial(torch.full_like, fill_value=math.inf)
    monkeypatch.setattr(torch, "empty_like", garbage)
    fit("--optimizer sgd --precision fp16")


# ---------------------------------------------------------------- files and signals


def limited(size: int, more: str) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    with alasa.as_script():
        fit(more)


def test_a_full_disk_is_one_line_and_leaves_old_files_whole(reference, capfd):
    shutil.copytree(reference, "runs")
    before = contents("runs")
    for more in ("--resume --epochs 4", "--out new", "--overwrite"):
        assert fork(limited, 500_000, more) == 2
        fault = "error: .*/(last|best).pt: cannot be written: .*too large\n"
        assert re.fullmatch(fault, capfd.readouterr().err)
    after = contents("runs")
    assert after.keys() == before.keys() and not os.path.exists("new/batch.png")
    assert all(after[name] == before[name] for name in ("best.pt", "last.pt"))
    with open("runs/last.pt", "rb") as reader:  # it sees the old file or the new
        with alasa.atomic_write("runs/last.pt") as file:
            file.write(b"new")
        assert reader.read() == before["last.pt"]


def test_a_lost_worker_or_exhausted_shared_memory_is_one_line(reference, capfd):
    def lose():
        multiprocessing.active_children()[0].kill()
        time.sleep(0.5)

    shutil.copytree(reference, "runs")
    exhausted = (limited, 999, "--resume --epochs 4 --workers 1")
    for how in (exhausted, (train_and_act, lose)):
        assert fork(*how) == 2
        err = capfd.readouterr().err
        assert re.fullmatch("error: .*\n", err) and "--workers 0" in err


def test_no_batch_keeps_a_workers_file_open():
    for split in ("train", "valid"):
        rows = [pd.read_csv(f"{split}.csv")] * 20
        pd.concat(rows).to_csv(f"{split}.csv", index=False)

    def fit_so():
        resource.setrlimit(resource.RLIMIT_NOFILE, (70, 70))
        fit("--workers 1 --batch-size 2 --epochs 1")

    assert fork(fit_so) == 0


def test_ctrl_c_ends_in_a_line_that_says_how_to_go_on(capfd):
    def interrupt():
        os.killpg(0, signal.SIGINT)  # the workers too, as a terminal does

    assert fork(train_and_act, interrupt) == 130
    assert capfd.readouterr().err == "interrupted; --resume goes on\n"
    assert len(alasa.load_checkpoint("runs/last.pt")["history"]) == 1

    def interrupt_at_once(*_):
        os.kill(os.getpid(), signal.SIGINT)

    assert fork(as_script, partial(fit, "--out new", interrupt_at_once)) == 130
    assert capfd.readouterr().err == "interrupted; --resume goes on\n"
    assert not os.path.exists("new")


def test_a_damaged_or_foreign_checkpoint_runs_no_code(reference):
    class Evil:
        def __reduce__(self):
            return os.mkdir, ("executed",)

    whole = contents(reference)["best.pt"]
    flipped = whole[:60000] + bytes([whole[60000] ^ 1]) + whole[60001:]
    cuts = [whole[: len(whole) * i // 10] for i in range(10)]
    for number, content in enumerate([flipped, *cuts]):
        Path(f"{number}.pt").write_bytes(content)
    torch.save({"model": Evil(), "args": {}, "classes": [], "history": []}, "evil.pt")
    torch.save({"weight": torch.zeros(1)}, "other.pt")
    for path in ("missing.pt", *Path().glob("*.pt")):
        with refused(f"{path}: not a checkpoint"):
            alasa.load_checkpoint(path)
    with refused("--weights evil.pt: not a file of weights"):
        alasa.build_model("resnet18", 2, "evil.pt")
    assert not os.path.exists("executed")


# ---------------------------------------------------------------- prediction


def test_predicting_on_the_validation_csv_gives_the_logged_scores(capsys):
    history = fit("--precision bf16")
    best = history[alasa.best_epoch(history, "auc") - 1]
    capsys.readouterr()
    table = run_predict("--test-csv=valid.csv")
    scores = {
        "accuracy": best["valid_accuracy"],
        "auc": best["auc"],
        "wauc": best["wauc"],
    }
    assert f"{alasa.describe(scores)}\n" in capsys.readouterr().out
    labels = (pd.read_csv("valid.csv")["label"] == "cat").to_numpy()
    wauc = alasa.weighted_auc(labels, table["score"])
    assert wauc == pytest.approx(best["wauc"])
    written = pd.read_csv("predictions.csv")
    assert list(written) == ["image", "label", "score", "p_ant", "p_cat"]
    pd.testing.assert_frame_equal(written, table, check_dtype=False, rtol=1e-14)
    assert written["image"].tolist() == [f"valid {i}.png" for i in range(8)]
    for name in ("predictions.png", "runs/losses.png", "runs/batch.png"):
        assert min(Image.open(name).size) > 400


def test_predict_keeps_the_row_of_a_bad_image_and_says_so(reference, capfd):
    os.truncate("valid 1.png", 500)
    images = [f"valid {i}.png" for i in (0, 1, 99, 2)]
    flags = ["--checkpoint", str(reference / "best.pt"), "--workers=0", *images]
    sys.argv = ["predict.py", *flags]
    assert fork(runpy.run_path, f"{HERE}/predict.py", {}, "__main__") == 1
    assert "2 of 4 failed, first image 2: valid 1.png: not" in capfd.readouterr().err
    table = pd.read_csv("predictions.csv")
    assert table["image"].tolist() == images
    errors = table.pop("error").fillna("").str.split(": not a").str[0].tolist()
    assert errors == ["", "image 2: valid 1.png", "image 3: valid 99.png", ""]
    assert table.isna().sum(axis=1).tolist() == [0, 4, 4, 0]  # all but the image
    nothing = run_predict("--checkpoint", reference / "best.pt", "none.png")
    assert nothing["label"].tolist() == [""]


def test_predict_is_content_with_blank_and_unknown_labels(reference, capsys):
    table = pd.read_csv("valid.csv")
    table["label"] = ["", "dog", *table["label"][2:]]
    table.to_csv("test.csv", index=False)
    checkpoint = ("--checkpoint", reference / "best.pt")
    assert len(run_predict(*checkpoint, "--test-csv", "test.csv")) == 8
    out = capsys.readouterr().out
    assert "not scored: 2 images, as '' is no class" in out
    logits = np.log(pd.read_csv("predictions.csv")[["p_ant", "p_cat"]].to_numpy()[2:])
    labels = (table["label"][2:] == "cat").to_numpy().astype(int)
    assert alasa.describe(alasa.score(labels, logits)) in out
    table.assign(label="").to_csv("test.csv", index=False)
    assert len(run_predict(*checkpoint, "--test-csv", "test.csv")) == 8


def test_predict_takes_folders_and_mixed_sizes_one_by_one(capsys):
    make_tree("photos", "ant/1.png", "cat/12.png")
    fit("--epochs 1 --image-size 0 --augment d4")
    capsys.readouterr()
    table = run_predict("photos", "valid 0.png")
    images = ["photos/ant/1.png", "photos/cat/12.png", "valid 0.png"]
    assert table["image"].tolist() == images
    assert "accuracy" in capsys.readouterr().out
    picture(6, (40, 50)).save("big.png")
    with refused("give --image-size, or to predict --batch-size 1"):
        run_predict("photos", "big.png")
    os.rename("big.png", "odd \udcff.png")
    odd = partial(run_predict, "photos", "odd \udcff.png", "--batch-size=1")
    assert fork(as_script, odd) == 0
    assert b"\nodd \xff.png," in Path("predictions.csv").read_bytes()


def test_predict_is_one_process(reference, monkeypatch):
    monkeypatch.setattr(predict.dist, "is_torchelastic_launched", lambda: True)
    with refused("predict.py is one process: start it without torchrun"):
        run_predict("--checkpoint", reference / "best.pt", "valid 0.png")


def test_tta_of_an_image_and_of_its_quarter_turn_agree():
    fit("--augment d4 --epochs 1")
    picture(7).save("a.png")
    picture(7).transpose(Image.Transpose.ROTATE_90).save("b.png")
    for flags, least, most in (([], 1e-4, 1), (["--tta"], 0, 1e-6)):
        one, other = run_predict("a.png", "b.png", *flags)["score"]
        assert least <= abs(one - other) < most


@pytest.mark.parametrize("count", [2, 200])
def test_pictures_and_words_of_any_classes_are_drawn_in_silence(count, capfd):
    odd = ["_background_", "_", "$x^$", "\u9e1f" * 5, "x" * 190, "caf\udce9\t"]
    names = odd[: count - 1]
    names += [f"class {k}" for k in range(count - len(names))]
    labels, logits = np.arange(count).repeat(2), torch.randn(2 * count, count)

    def draw():
        with alasa.as_script():
            predict.print_report(labels, logits, names)
            paths = np.array([f"valid {k % 8}.png" for k in range(2 * count)])
            predict.plot_report(labels, logits, names, paths).savefig("report.png")

    assert fork(draw) == 0
    out, err = capfd.readouterr()
    assert err == "" and " taken for " in out and out.count("\n") < 60
    assert min(Image.open("report.png").size) > 400


# ---------------------------------------------------------------- README


def readme(section: str) -> str:
    return (HERE / "README.md").read_text().split(f"## {section}")[1].split("\n## ")[0]


def run_block(section: str, block: int, name: str = "block") -> dict:
    blocks = re.findall(r"(?s)```python(.*?)```", readme(section))
    Path("block.py").write_text(blocks[block])
    return runpy.run_path("block.py", run_name=name)


def run_commands(section: str, monkeypatch) -> int:
    """Run the commands of a section, with few epochs of small images and one network."""
    arch = "shufflenet_v2_x0_5"
    cache_weights(arch, torchvision.models.get_model(arch).state_dict(), monkeypatch)
    pattern = r"(?m)^    (?:python|torchrun \S+) (train|predict).py (.*)$"
    commands = re.findall(pattern, readme(section))
    for name, flags in commands:
        if name == "predict":
            run_predict(*flags.split())
            continue
        more = "--workers 0 --epochs " + ("2" if "--resume" in flags else "1")
        if "--image-size" not in flags:
            more += " --image-size 32"
        args = train.parse_args(f"{flags} {more}".split())
        alasa.input_preset(args.arch, args.weights)  # there is such an architecture
        args.arch = arch
        train.main(args)
    return len(commands)


def test_the_demo_runs_as_readme_says():
    done = script(HERE / "train.py", "--epochs", 1)
    assert done.returncode == 0 and done.stderr == "", done
    assert "python train.py --train-csv digits/train.csv" in done.stdout
    done = script(HERE / "predict.py")
    assert done.returncode == 0 and done.stderr == "", done
    assert re.search(r"accuracy 0\.\d+, auc 0\.\d+", done.stdout)
    assert len(pd.read_csv("predictions.csv")) == 300
    fit("--epochs 1")  # any run may replace the demo's
    Path("digits/valid.csv").write_text("of the user")
    os.remove("digits/train.csv")
    with refused("digits/train.csv: not a readable CSV"):  # not the demo
        fit("--train-csv digits/train.csv --valid-csv digits/valid.csv --out own")
    assert Path("digits/valid.csv").read_text() == "of the user"


def test_the_python_blocks_of_readme_run(capsys):
    train.write_digits()
    own_loop = run_block("In Python", 0)
    assert own_loop["row"]["auc"] > 0.5
    assert len(run_block("In Python", 1, "__main__")["table"]) == 300
    plain = torchvision.models.shufflenet_v2_x0_5(num_classes=10)
    plain.load_state_dict(torch.load("mine/best.pt")["model"])


def test_the_commands_of_readme_run(monkeypatch):
    table = pd.read_csv("train.csv")
    table.columns = ["id", "target"]
    table["id"] = table["id"].str.removesuffix(".png")
    table.to_csv("kaggle.csv", index=False)
    run_block("Your own images", 0)
    folds = [alasa.read_csv(f"valid{fold}.csv")["image"].tolist() for fold in range(5)]
    images = [f"train {i}.jpg" for i in range(13)]
    assert sorted(itertools.chain(*folds)) == sorted(images)

    make_tree("images", *images)
    make_tree("photos/train", *[f"{name}/{i}.jpg" for name in "ab" for i in range(4)])
    make_tree("photos/val", "a/8.jpg", "b/9.jpg")
    make_tree("some-folder", "1.jpg")
    make_tree(".", "photo1.jpg", "photo2.jpg")
    shutil.copy("valid.csv", "test.csv")
    make_tree("test-images", "3.jpg")
    assert run_commands("Your own images", monkeypatch) == 11


def test_closed_streams_and_a_notebooks_backend_do_no_harm(reference):
    command = f"{sys.executable} {HERE}/predict.py --checkpoint {reference}/best.pt "
    command += "--test-csv valid.csv 2>&- >&-"
    environment = os.environ | {"MPLBACKEND": "nowhere", "WORLD_SIZE": "2"}
    assert (
        subprocess.run(command, shell=True, env=environment, check=False).returncode
        == 0
    )
    assert os.path.exists("predictions.png")


def test_a_script_takes_numbers_that_slow_a_processor_down_for_zero():
    def halve_the_smallest():
        with alasa.as_script():
            smallest = torch.tensor([torch.finfo(torch.float32).tiny])
            assert smallest > 0 and smallest / 2 == 0

    assert fork(halve_the_smallest) == 0


def test_the_alaska2_recipe_splits_by_name_and_runs(monkeypatch):
    names = [f"{number:05d}.jpg" for number in range(20)]
    for folder in ("Cover", "JMiPOD", "JUNIWARD", "UERD", "Test"):
        make_tree(folder, *names)
    run_block("ALASKA2", 0)
    train_rows, valid_rows = pd.read_csv("train.csv"), pd.read_csv("valid.csv")
    train_names = set(train_rows["image"].str.split("/").str[1])
    valid_names = set(valid_rows["image"].str.split("/").str[1])
    assert len(train_rows) == 72 and len(valid_rows) == 8
    assert train_names | valid_names == set(names) and not train_names & valid_names
    covers = train_rows[train_rows["label"] == 0]["image"]
    assert set(covers.str.split("/").str[0]) == {"Cover"}
    assert run_commands("ALASKA2", monkeypatch) == 2
    run_block("ALASKA2", 1)
    table = pd.read_csv("submission.csv")
    assert list(table) == ["Id", "Label"] and table["Id"].tolist() == names
    assert table["Label"].between(0, 1).all()


# ---------------------------------------------------------------- several processes


def print_scores() -> None:
    """Score five images, and one, over all processes."""
    alasa.start_process("cpu")
    torch.manual_seed(0)
    model = alasa.build_model("resnet18", 2, "none")
    model.bn1.running_mean += alasa.get_rank()  # as batch statistics differ by process
    for count in (5, 1):
        frame = pd.DataFrame({"image": [f"valid {i}.png" for i in range(count)]})
        data = alasa.AlasaDataset(frame.assign(label=frame.index % 2), "valid")
        loader = alasa.make_loader(data, 4)
        scores = alasa.evaluate(model, loader, nn.CrossEntropyLoss())
        print(f"{scores}\n", end="", flush=True)


def test_two_processes_score_as_one_to_the_bit_and_fail_together(capsys):
    launcher = "-m torch.distributed.run --nproc-per-node=2 --master-port=29511"
    two = script(*launcher.split(), __file__)
    print_scores()
    one = capsys.readouterr().out
    for line in one.splitlines():
        assert two.stdout.count(f"{line}\n") == 2, two
    assert one.count("loss") == 2
    assert two.stdout.count("epoch 1, lr") == 1
    assert sorted(os.listdir("runs")) == sorted(alasa.RUN_FILES)
    assert two.returncode != 0 and "train.csv line 6: " in two.stderr, two
    assert not os.path.exists("new")
    picture(0).save("train 4.png")
    assert len(fit("--resume --epochs 3 --freeze 1")) == 3


if __name__ == "__main__":  # one of torchrun's processes
    print_scores()
    fit("--epochs 2 --freeze 1")
    os.truncate("train 4.png", 500)
    with alasa.as_script():
        fit("--out new")
