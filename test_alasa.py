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
from unittest.mock import Mock

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
    """Train as the flags say, but leave out the curves: they take half of the time."""
    args = train.parse_args(f"{TINY} {more}".split())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "plot_history", lambda _: alasa.new_figure(1, 1))
        return train.main(args, criterion)


def run_predict(*flags: object) -> pd.DataFrame:
    return predict.main(predict.parse_args([*map(str, flags), "--workers=0"]))


@pytest.fixture(scope="session")
def reference(data, tmp_path_factory) -> Path:
    """A run of three epochs."""
    out = tmp_path_factory.mktemp("runs") / "reference"
    rows = f"--train-csv {data}/train.csv --valid-csv {data}/valid.csv"
    fit(f"--epochs 3 --out {out} {rows}")
    return out


@pytest.fixture
def runs(reference) -> Path:
    """A copy of that run, where the scripts look for one."""
    return Path(shutil.copytree(reference, "runs"))


def same_weights(*runs: str | Path) -> bool:
    for name in ("best.pt", "last.pt"):
        one, other = [alasa.load_checkpoint(f"{run}/{name}")["model"] for run in runs]
        if not all(torch.equal(one[key], other[key]) for key in one | other):
            return False
    return True


def contents(folder: str | Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


def refused(expected: str, act, *args: object) -> None:
    """Check that act(*args) is a mistake, told in one line that has this in it."""
    with pytest.raises(alasa.AlasaError, match=f"^.*({expected}).*$"):
        act(*args)


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
    labels = np.array([0, 1, 1, 0])
    scores = np.array([math.inf, math.inf, 0, -math.inf])
    for order in map(list, itertools.permutations(range(4))):
        auc = alasa.weighted_auc(labels[order], scores[order], doubled_below=0)
        assert auc == pytest.approx(0.625)


def test_a_sure_network_is_ranked_where_its_probabilities_round_to_one():
    for shift in (-99, 0, 99):
        logits = np.array([[0.0, 1, -1], [0, 2, -1], [0, -1, 3]])
        logits[:, 1:] += shift
        assert alasa.score([0, 1, 2], logits)["wauc"] == 1


def test_the_best_epoch_has_the_highest_score_then_the_lowest_loss():
    scores = [math.nan, 0.5, 0.7, math.inf, 0.7, 0.7]
    losses = [0.1, 0.1, 0.9, 0.1, 0.3, 0.3]
    log = pd.DataFrame({"epoch": range(1, 7), "auc": scores, "valid_loss": losses})
    history = log.to_dict("records")
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
    refused("transparency is of a kind that Pillow misreads", alasa.read_image, "image")
    for kind in (np.float32, np.int32):
        odd = Image.fromarray(np.full((2, 2), 9, kind))
        refused("not plain 16 bits", read, odd, "TIFF")


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
    body = kind + content
    return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))


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
            refused("bad: not a readable image", alasa.read_image, "bad")
    os.mkfifo("pipe")
    refused("pipe: not a readable image: not a file", alasa.read_image, "pipe")
    Path("page.jpg").write_text("<!DOCTYPE html>")
    refused("page.jpg: .* starts with b'<!DOCTYPE html>'", alasa.read_image, "page.jpg")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    refused("bomb", alasa.read_image, "whole.jpg")


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
            refused("a.png: not a readable image", alasa.read_image, "a.png")


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
        refused(expected, alasa.read_csv, "bad.csv")


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
    numbers = frame["label"].map(expected.class_to_idx)
    assert [*zip(frame["path"], numbers)] == expected.samples
    out = capsys.readouterr().out
    assert "left out, as no images: 1 files, first tree/a/note.txt" in out
    assert "label" not in alasa.read_rows("tree/a")
    make_tree("tree", ".ipynb_checkpoints/1.png", "a/.hidden.png")
    make_tree("tree", "a/6.gif", "b/7.jfif", "loose.png")
    for empty in ("tree/empty", "tree/hidden"):
        Path(empty).mkdir()
    Path("tree/hidden/.DS_Store").touch()
    Path("tree/a/loop").symlink_to(".")
    Path("tree/a/up").symlink_to("..")
    more = alasa.read_rows("tree")
    new = {"tree/a/6.gif", "tree/b/7.jfif", "tree/loose.png"}
    assert sorted(more["path"]) == sorted([*frame["path"], *new])
    out = capsys.readouterr().out
    assert "it is empty: tree/empty" in out and "it is empty: tree/hidden" in out
    refused("tree/empty: has no images", alasa.read_rows, "tree/empty")
    refused("tree: the label of 'loose.png' is empty", alasa.check_splits, more, more)


def test_splits_with_an_undefined_or_flattering_score_are_refused():
    train, valid = map(alasa.read_csv, ("train.csv", "valid.csv"))
    assert alasa.check_splits(train, valid) == ["ant", "cat"]
    Path("empty").touch()
    Path("folder").mkdir()
    Path("loop").symlink_to("loop")
    missing = r"train.csv line 2: 'nowhere': No such file.*; \.\.\. \(13 in all\)"
    twice = pd.concat([train, train.tail(1).assign(label="cat")])
    faults = [
        (train.assign(label="ant"), valid, "one class only"),
        (train, valid.assign(label="dog"), "valid.csv line 2: no training label is"),
        (train, valid.assign(label="ant"), "no validation label is 'cat'"),
        (train, valid.assign(label=""), "line 2: the label of 'valid 0.png' is empty"),
        (train.drop(columns="label"), valid, "no label; give --label-column"),
        (train.assign(path="nowhere"), valid, missing),
        (train, valid.assign(path="empty"), "valid.csv line 2: 'empty' is empty"),
        (train, valid.assign(path="folder"), "'folder' is not a file"),
        (train, valid.assign(path="loop"), "'loop': Too many levels"),
        (twice, valid, "line 14: 'train 12.png' is one image, 'ant' and 'cat'"),
        (train, valid.assign(path="valid 0.png"), "line 3: 'valid 0.png' is one image"),
    ]
    for one, another, expected in faults:
        refused(expected, alasa.check_splits, one, another)


def test_labels_that_look_alike_and_images_in_both_splits_are_refused():
    train, valid = map(alasa.read_csv, ("train.csv", "valid.csv"))
    for twin in ("cat ", "c\u200bat", "cat\u2060"):
        odd = train.assign(label=["ant", twin, *train["label"][2:]])
        refused("'cat' and .* look the same", alasa.check_splits, odd, valid)
    Path("soft.png").symlink_to("train 0.png")
    Path("hard.png").hardlink_to("train 0.png")
    for twin in ("soft.png", "hard.png", "./train 0.png"):
        leaky = valid.assign(path=[twin, *valid["path"][1:]])
        expected = f"valid.csv line 2: '{twin}' is a training image too"
        refused(expected, alasa.check_splits, train, leaky)


def test_what_is_odd_in_splits_but_may_be_meant_is_said(capsys):
    train, valid = map(alasa.read_csv, ("train.csv", "valid.csv"))
    same_name = valid.assign(path=["sub/train 0.png", *valid["path"][1:]])
    Path("sub").mkdir()
    shutil.copy("train 0.png", "sub")
    twice = pd.concat([train, train])  # with the same labels: fine
    alasa.check_splits(twice, same_name)
    assert "1 file names are in both splits" in capsys.readouterr().out
    third = train.assign(label=["dog", *train["label"][1:]])
    assert alasa.check_splits(third, valid, "wauc") == ["ant", "cat", "dog"]
    cats = valid[valid["label"] == "cat"]
    expected = "wauc needs validation images of 'ant' and of another class"
    refused(expected, alasa.check_splits, train, cats, "wauc")
    capital = train.assign(label=["Cat", *train["label"][1:]])
    alasa.check_splits(capital, valid, "accuracy")
    out = capsys.readouterr().out
    assert "'Cat' and 'cat' are two classes" in out and "AUC is undefined" in out


def test_integers_sort_as_numbers_and_text_as_text():
    assert alasa.find_classes(["10", "9", "-1", "+2"]) == ["-1", "+2", "9", "10"]
    assert alasa.find_classes(["10", "9", "x"]) == ["10", "9", "x"]


# ---------------------------------------------------------------- the model

ARCHS = "resnet18 densenet121 squeezenet1_1 mobilenet_v3_small vit_b_32 swin_t"


def ones_of(arch: str, **options) -> dict[str, torch.Tensor]:
    """Return an architecture's weights, all of them 1, which take no space in a file."""
    with torch.device("meta"):
        state = torchvision.models.get_model(arch, **options).state_dict()
    for key, old in state.items():
        state[key] = torch.ones((), dtype=old.dtype).expand(old.shape)
    return state


def cache_weights(arch: str, state: dict, monkeypatch) -> None:
    """Place an architecture's weights as if torchvision had downloaded them."""
    monkeypatch.setenv("TORCH_HOME", os.getcwd())
    url = torchvision.models.get_model_weights(arch).DEFAULT.url
    Path("hub/checkpoints").mkdir(parents=True)
    torch.save(state, f"hub/checkpoints/{Path(url).name}")


@pytest.mark.parametrize("arch", ARCHS.split())
def test_a_new_head_is_all_that_is_not_torchvisions_or_frozen(arch, monkeypatch):
    ones = ones_of(arch)
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
    build = alasa.build_model
    plain = torchvision.models.resnet18(num_classes=2).state_dict()
    wrapped = {f"module.{key}": tensor for key, tensor in plain.items()}
    files = {"a.pt": plain, "b.pt": {"state_dict": wrapped, "epoch": 3}}
    files["d.pt"] = {"model": {f"_orig_mod.{key}": plain[key[7:]] for key in wrapped}}
    files["d.pt"]["args"] = Namespace(lr=1)  # as torchvision's own scripts save
    files["e.pt"] = {"model": "resnet18", "state_dict": plain}
    files["c.pt"] = {"model": plain, "classes": ["ant", "bee"]}
    for name, content in files.items():
        torch.save(content, name)
        model = build("resnet18", 2, name, class_names=["ant", "bee"])
        assert moved(plain, model.state_dict()) == set()
        assert "kept the last layer" in capsys.readouterr().out
    build("resnet18", 2, "c.pt", class_names=["ant", "cat"])
    build("resnet18", 3, "a.pt")
    torch.save({"model": plain, "args": {"arch": "resnet18"}}, "own.pt")
    refused("own.pt: .* with --arch resnet18", build, "resnet34", 2, "own.pt")
    assert capsys.readouterr().out.count("the last layer, fc, is new") == 2

    torch.save({"net.weight": torch.zeros(1)}, "odd.pt")
    refused(r"odd.pt: it has \['net.weight'\]", build, "resnet18", 2, "odd.pt")
    old = {}
    for key, tensor in ones_of("densenet121").items():
        old[re.sub(r"(denselayer\d+\.\w+)([12])\.", r"\1.\2.", key)] = tensor
    torch.save(old, "densenet.pth")
    build("densenet121", 2, "densenet.pth")
    torch.save(ones_of("vit_b_32", image_size=64), "vit.pth")
    model = build("vit_b_32", 2, "vit.pth", image_size=96)
    assert model(torch.zeros(1, 3, 96, 96)).shape == (1, 2)
    assert alasa.default_image_size("vit_b_32", "vit.pth") == 64
    assert alasa.default_image_size("vit_b_16", "IMAGENET1K_SWAG_E2E_V1") == 384
    assert alasa.default_image_size("efficientnet_b2", "DEFAULT") == 224


def test_a_model_scales_pixels_as_its_weights_want():
    pixels = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8)
    for arch in ("resnet18", "efficientnet_v2_l"):
        weights = torchvision.models.get_model_weights(arch).DEFAULT
        wanted = weights.transforms(crop_size=40, resize_size=40)
        with torch.device("meta"):  # without the time to initialise it
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
    assert resnet.double()(images.double()).dtype == torch.float64


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


def moved(old: dict, new: dict) -> set[str]:
    return {key for key in old if not torch.equal(old[key], new[key])}


def test_what_is_frozen_or_kept_stays_as_it_was():
    plain = torchvision.models.shufflenet_v2_x0_5().state_dict()
    torch.save(plain, "weights.pt")
    statistics = {key for key in plain if "running" in key or "batches" in key}
    expected = {
        "--epochs 2 --freeze": {"fc.weight", "fc.bias"},
        "--epochs 2 --freeze 1": plain.keys() - statistics,
        "--epochs 1 --freeze 0 --batch-norm train": plain.keys(),
    }
    for more, keys in expected.items():
        fit(f"--arch shufflenet_v2_x0_5 --weights weights.pt --overwrite {more}")
        trained = alasa.load_checkpoint("runs/last.pt")["model"]
        assert moved(plain, trained) == keys
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
    pd.read_csv("train.csv")[:12].to_csv("train.csv", index=False)
    shutil.copytree(".", "copies", dirs_exist_ok=True)
    how = "--arch shufflenet_v2_x0_5 --augment none --lr 0 --epochs 1 --batch-norm keep"
    row = fit(f"{how} --valid-csv copies/train.csv", Strange())[-1]
    assert row["train_loss"] == pytest.approx(row["valid_loss"])
    assert row["train_accuracy"] == row["valid_accuracy"]
    assert modes == [False, True, True, True, False, False]  # chance, 3 steps, 2 losses


# ---------------------------------------------------------------- the same bits


def test_any_number_of_workers_gives_the_same_bits(reference):
    assert fork(fit, "--epochs 3 --workers 3") == 0
    assert same_weights("runs", reference)


def test_a_forked_or_spawned_worker_reads_the_same_batches_in_every_epoch():
    def two_epochs(workers: int) -> list:
        frame = alasa.read_csv("train.csv").assign(label=[0, 1] * 6 + [0])
        crop = alasa.make_transform(32, "crop")
        data = alasa.AlasaDataset(frame, "train", crop, balance=True)
        loader = alasa.make_loader(data, 4, workers)
        return [*alasa.begin_pass(loader, 1), *alasa.begin_pass(loader, 2)]

    def compare(how: str):
        multiprocessing.set_start_method(how, force=True)
        for one, other in zip(two_epochs(0), two_epochs(1), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)

    assert fork(compare, "fork") == 0
    assert fork(compare, "spawn") == 0


@pytest.mark.parametrize(
    "more",
    (
        "--balance --schedule cosine",
        "--precision bf16 --freeze 1",
        "--augment crop --optimizer sgd --precision fp16",
    ),
)
def test_a_resumed_run_ends_bit_identical(more):
    more += " --arch mobilenet_v3_small"
    fit(f"{more} --out whole")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "warn_of_flat_images", Mock(side_effect=KeyboardInterrupt))
        fit(more)
    shutil.copytree(".", "moved", dirs_exist_ok=True)  # and the data may move
    elsewhere = "--train-csv moved/train.csv --valid-csv moved/valid.csv"
    history = fit(f"{more} --resume --workers 1 {elsewhere}")
    assert same_weights("runs", "whole")
    log = pd.read_csv("runs/log.csv")
    assert log["epoch"].tolist() == [1, 2] == [row["epoch"] for row in history]


def test_the_seed_alone_decides_the_first_weights():
    for out, seed in (("one", 1), ("same", 1), ("other", 2)):
        torch.rand(7)  # another state of the caller's generator
        fit(f"--epochs 1 --lr 0 --head-lr 0 --seed {seed} --out {out}")
    assert same_weights("one", "same")
    assert not same_weights("one", "other")


def test_killed_at_random_moments_and_resumed_ends_bit_identical(reference):
    for seconds in (*np.random.default_rng(0).uniform(0, 0.6, 5), 60):
        more = "--resume" if os.path.exists("runs/last.pt") else "--overwrite"
        fork(fit, f"--epochs 3 {more}", seconds=seconds)
        for file in Path().glob("runs/*.pt"):
            alasa.load_checkpoint(file)
    assert same_weights("runs", reference)
    assert not any(name.endswith(".part") for name in os.listdir("runs"))


def test_fine_tuning_in_two_stages_keeps_the_trained_head():
    head = fit("--freeze --out head --head-lr 1e-2")
    best = head[alasa.best_epoch(head, "auc") - 1]
    second = "--weights head/best.pt --freeze 0 --lr 0 --head-lr 0 --epochs 1"
    row = fit(f"{second} --out all")[-1]
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


def test_a_callers_generators_and_settings_are_left_as_they_were():
    def states():
        numpy_state = np.random.get_state()[1].tolist()
        return random.getstate(), numpy_state, torch.get_rng_state().tolist()

    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    torch.use_deterministic_algorithms(False)
    before = states()
    fit("--epochs 1")
    assert states() == before
    run_predict("valid 0.png")
    assert states() == before
    assert not torch.are_deterministic_algorithms_enabled()


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
    Path("odd/log.csv").mkdir(parents=True)  # for another
    mistakes = {
        "--image-size 0 --augment d4": "32x32 and of 9x6 pixels: give --image-size",
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
        "--valid-csv train.csv": "is a training image too",
        "--out train.csv": "--out train.csv: .*File exists",
        "--out odd": "odd/log.csv: cannot be written: not a regular file",
    }
    bounds = ["--workers -1", "--epochs 0", "--batch-size 99999999999999999999"]
    bounds += ["--seed -1", "--seed 20240101123456789012"]
    bounds += ["--lr nan", "--label-smoothing 2.0"]
    mistakes |= dict.fromkeys(bounds, "out of range")
    for more, expected in mistakes.items():
        with pytest.raises((alasa.AlasaError, SystemExit)) as fault:
            fit(more)
        told = capsys.readouterr().err
        if isinstance(fault.value, alasa.AlasaError):
            told = f"error: {alasa.one_line(fault.value)}\n"
        line = f"(usage: (.*\n)*.*)?.*error: .*({expected}).*\n"
        assert re.fullmatch(line, told), more
        assert not os.path.exists("runs")


def test_an_unreadable_image_stops_training_and_is_named(capfd):
    names = [f"train {i}.png" for i in range(12)]
    for name in names:
        os.truncate(name, 500)
    one = "error: train.csv line [0-9]+: train [0-9]+.png: not a readable image.*\n"
    every = ".*".join(["error: ", *[f"{name}: not a readable" for name in names], "\n"])
    expected_of = {"": one, "--workers 1": one, "--check-images": every}
    for more, expected in expected_of.items():
        assert fork(as_script, partial(fit, more)) == 2
        assert re.fullmatch(expected, capfd.readouterr().err)
        assert not os.path.exists("runs")


def test_flat_images_and_a_folder_without_locks_are_warned_of(monkeypatch, capsys):
    no_locks = OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr(alasa.fcntl, "lockf", Mock(side_effect=no_locks))
    for name in ("train 3.png", "train 5.png"):
        Image.fromarray(np.arange(1024, dtype=np.uint16).reshape(32, 32)).save(name)
    fit("--epochs 1")
    out = capsys.readouterr().out
    flat = "warning: 2 images are of nearly one colour, first train.csv line 5: "
    assert flat + "train 3.png" in out and "warning: runs cannot be locked" in out


def test_a_run_is_neither_overwritten_nor_resumed_by_another():
    fit("--epochs 1")
    before = contents("runs")
    for more in ("--seed 1", "--arch resnet18", "--batch-size 5", "--lr 1"):
        refused("--resume: .* was .*, now ", fit, f"--resume {more}")
    refused("runs holds a run .*: --resume, --overwrite", fit)
    pd.read_csv("valid.csv")[::-1].to_csv("valid.csv", index=False)
    refused("--valid-csv had other rows when the run began", fit, "--resume")
    assert contents("runs") == before
    shutil.copytree("runs", "before")
    pd.read_csv("valid.csv")[::-1].to_csv("valid.csv", index=False)
    fit("--epochs 1 --seed 1 --overwrite")
    assert not same_weights("runs", "before")  # for another seed


def test_a_folder_has_one_writer(capfd):
    def begin_another_run(logits, labels):
        assert fork(as_script, partial(fit, "--overwrite")) == 2
        fault = "error: --out runs: another run is writing there\n"
        assert capfd.readouterr().err == fault
        return nn.functional.cross_entropy(logits, labels)

    fit("--epochs 1", begin_another_run)
    assert sorted(os.listdir("runs")) == sorted(alasa.RUN_FILES)


def test_a_users_files_in_the_folder_of_a_run_stay(capsys):
    Path("mine").mkdir()
    shutil.copy("train 0.png", "mine/batch.png")
    Path("empty").mkdir()
    for out in ("mine", "empty"):
        more = f"--train-csv typo.csv --out {out} --overwrite"
        refused("typo.csv: not a readable CSV", fit, more)
    assert os.listdir("mine") == ["batch.png"] and os.listdir("empty") == []
    refused(r"mine holds a run \(batch.png\)", fit, "--out mine")


def test_predict_refuses_a_bad_output_and_torchrun_before_the_work(runs, monkeypatch):
    predict_to = partial(run_predict, "--test-csv", "valid.csv", "--output")
    trained_on = alasa.load_checkpoint("runs/best.pt")["args"]["train_csv"]
    os.mkfifo("device")
    for output in ("device", "nowhere/p.csv"):
        refused(f"{output}: cannot be written", predict_to, output)
    for output in ("valid.csv", "new.png", "valid 0.csv", "runs/best.pt", trained_on):
        refused("would replace an input, or itself", predict_to, output)
    monkeypatch.setattr(predict.dist, "is_torchelastic_launched", lambda: True)
    refused("one process: start it without torchrun", predict_to, "new.csv")


def let_epochs_find(monkeypatch, name: str, *values: float) -> None:
    """Replace a score in the rows of the log, epoch by epoch."""
    left, real = iter(values), alasa.evaluate
    monkeypatch.setattr(
        alasa, "evaluate", lambda *args: real(*args) | {name: next(left)}
    )


def test_a_worse_epoch_leaves_best_and_patience_survives(monkeypatch):
    let_epochs_find(monkeypatch, "wauc", 0.6, 0.9, 0.5, math.nan, 0.8)
    more = "--monitor wauc --early-stop 3 --epochs"
    fit(f"{more} 2")
    best = contents("runs")["best.pt"]
    history = fit(f"{more} 9 --resume")
    assert len(history) == 5  # three did not improve on the second
    assert contents("runs")["best.pt"] == best


def test_accuracy_can_be_monitored_where_auc_is_undefined(capsys):
    table = pd.read_csv("valid.csv")
    table[table["label"] == "ant"].to_csv("valid.csv", index=False)
    fit("--monitor accuracy --epochs 1")
    assert "best: epoch" in capsys.readouterr().out


def test_a_cosine_rises_to_the_rate_and_falls_towards_zero():
    for steps in range(1, 40):
        factors = [train.cosine_factor(step, steps) for step in range(steps)]
        assert max(factors) == 1 and min(factors) > 0
        assert factors[-1] < 0.26 or steps < 4
    rates = [row["lr"] / 3e-4 for row in fit("--schedule cosine")]
    assert rates == pytest.approx([1, train.cosine_factor(3, steps=6)])


def test_the_rate_is_halved_when_neither_score_nor_loss_improves(monkeypatch):
    let_epochs_find(monkeypatch, "auc", *[1.0] * 6)
    let_epochs_find(monkeypatch, "valid_loss", 9, 6, 6, 6, 6, 6)
    history = fit("--epochs 6 --early-stop 4")
    assert [row["lr"] / 3e-4 for row in history] == [1, 1, 1, 1, 1, 0.5]
    best = alasa.load_checkpoint("runs/best.pt")
    assert len(best["history"]) == 2


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
    expected = f"error: epoch 2: the loss became nan in batch 2, of {images}; .*\n"
    assert re.fullmatch(expected, err)
    assert len(alasa.load_checkpoint("runs/last.pt")["history"]) == 1
    assert "left out of each epoch: 1, " in out


def test_a_bug_keeps_its_traceback_and_ends_the_workers(capfd, monkeypatch):
    assert fork(train_and_act, lambda: {}["bug"]) == 1
    assert "KeyError: 'bug'" in capfd.readouterr().err
    monkeypatch.setattr(alasa, "check_sizes", lambda _: torch.ones(2) @ torch.ones(3))
    assert fork(as_script, partial(fit, "--workers 1 --overwrite")) == 1
    assert "RuntimeError: " in capfd.readouterr().err


def test_a_run_without_a_finite_score_says_so_and_can_be_resumed(capsys):
    more = "--optimizer sgd --lr 1e18 --batch-size 13 --epochs 1"
    train.plot_history(fit(more)).savefig("losses.png")
    fit(f"{more} --resume")
    assert capsys.readouterr().out.count("best: none yet") == 2


def test_a_run_that_lacks_what_it_needs_is_not_resumed(runs):
    shutil.move("runs/best.pt", "best.pt")
    refused("runs/best.pt: not a checkpoint.*No such file", fit, "--resume")
    shutil.move("best.pt", "runs/last.pt")
    refused("runs/last.pt: has no optimizer", fit, "--resume")


def test_sgd_survives_a_first_step_that_fp16_skips(monkeypatch):
    garbage = partial(torch.full_like, fill_value=math.inf)
    monkeypatch.setattr(torch, "empty_like", garbage)
    fit("--optimizer sgd --precision fp16")


def limited(kind: int, most: int, more: str) -> None:
    resource.setrlimit(kind, (most, most))
    with alasa.as_script():
        fit(more)


def test_a_full_disk_is_one_line_and_leaves_old_files_whole(runs, capfd):
    before = contents("runs")
    for more in ("--resume --epochs 4", "--out new", "--overwrite"):
        assert fork(limited, resource.RLIMIT_FSIZE, 500_000, more) == 2
        fault = "error: .*/(last|best).pt: cannot be written: .*too large\n"
        assert re.fullmatch(fault, capfd.readouterr().err)
    after = contents("runs")
    assert after.keys() == before.keys() and not os.path.exists("new/batch.png")
    assert all(after[name] == before[name] for name in ("best.pt", "last.pt"))
    with open("runs/last.pt", "rb") as reader:  # it sees the old file or the new
        with alasa.atomic_write("runs/last.pt") as file:
            file.write(b"new")
        assert reader.read() == before["last.pt"]


def test_a_lost_worker_or_exhausted_shared_memory_is_one_line(runs, capfd):
    def lose():
        multiprocessing.active_children()[0].kill()
        time.sleep(0.5)

    exhaust = partial(limited, resource.RLIMIT_FSIZE, 999)
    for how in ((exhaust, "--resume --epochs 4 --workers 1"), (train_and_act, lose)):
        assert fork(*how) == 2
        err = capfd.readouterr().err
        assert re.fullmatch("error: .*\n", err) and "--workers 0" in err


def test_no_batch_keeps_a_workers_file_open():
    for split in ("train", "valid"):
        rows = [pd.read_csv(f"{split}.csv")] * 8
        pd.concat(rows).to_csv(f"{split}.csv", index=False)

    more = "--workers 1 --batch-size 2 --epochs 1"
    assert fork(limited, resource.RLIMIT_NOFILE, 50, more) == 0


def test_ctrl_c_ends_in_a_line_that_says_how_to_go_on(capfd):
    interrupt = partial(os.killpg, 0, signal.SIGINT)  # workers too, as a terminal does
    assert fork(train_and_act, interrupt) == 130
    assert capfd.readouterr().err == "interrupted; --resume goes on\n"
    assert len(alasa.load_checkpoint("runs/last.pt")["history"]) == 1
    at_once = partial(fit, "--out new", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    assert fork(as_script, at_once) == 130
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
        refused(f"{path}: not a checkpoint", alasa.load_checkpoint, path)
    expected = "--weights evil.pt: not a file of weights"
    refused(expected, alasa.build_model, "resnet18", 2, "evil.pt")
    assert not os.path.exists("executed")


# ---------------------------------------------------------------- prediction


def test_predicting_on_the_validation_csv_gives_the_logged_scores(capsys):
    history = fit("--precision bf16")
    best = history[alasa.best_epoch(history, "auc") - 1]
    capsys.readouterr()
    table = run_predict("--test-csv=valid.csv")
    scores = {"accuracy": best["valid_accuracy"]}
    scores |= {"auc": best["auc"], "wauc": best["wauc"]}
    assert f"{alasa.describe(scores)}\n" in capsys.readouterr().out
    labels = (pd.read_csv("valid.csv")["label"] == "cat").to_numpy()
    wauc = alasa.weighted_auc(labels, table["score"])
    assert wauc == pytest.approx(best["wauc"])
    written = pd.read_csv("predictions.csv")
    assert list(written) == ["image", "label", "score", "p_ant", "p_cat"]
    pd.testing.assert_frame_equal(written, table, check_dtype=False, rtol=1e-14)
    assert written["image"].tolist() == [f"valid {i}.png" for i in range(8)]
    assert min(Image.open("predictions.png").size) > 400


def run_predict_script(*flags: str) -> int | None:
    sys.argv = ["predict.py", "--workers=0", *flags]
    return fork(runpy.run_path, f"{HERE}/predict.py", {}, "__main__")


def test_predict_keeps_the_row_of_a_bad_image_and_says_so(runs, capfd):
    os.truncate("valid 1.png", 500)
    images = [f"valid {i}.png" for i in (0, 1, 99, 2)]
    assert run_predict_script(*images) == 1
    assert "2 of 4 failed, first image 2: valid 1.png: not" in capfd.readouterr().err
    table = pd.read_csv("predictions.csv")
    assert table["image"].tolist() == images
    errors = table.pop("error").fillna("").str.split(": not a").str[0].tolist()
    assert errors == ["", "image 2: valid 1.png", "image 3: valid 99.png", ""]
    assert table.isna().sum(axis=1).tolist() == [0, 4, 4, 0]  # all but the image
    assert run_predict("none.png")["label"].tolist() == [""]


def test_predict_is_content_with_blank_and_unknown_labels(runs, capsys):
    table = pd.read_csv("valid.csv")
    table["label"] = ["", "dog", *table["label"][2:]]
    table.to_csv("test.csv", index=False)
    p = run_predict("--test-csv", "test.csv")[["p_ant", "p_cat"]].to_numpy()
    out = capsys.readouterr().out
    assert len(p) == 8 and "not scored: 2 images, as '' is no class" in out
    labels = (table["label"][2:] == "cat").to_numpy().astype(int)
    assert alasa.describe(alasa.score(labels, np.log(p[2:]))) in out
    capsys.readouterr()
    table.assign(label="").to_csv("test.csv", index=False)
    assert len(run_predict("--test-csv", "test.csv")) == 8
    assert "predictions.png is of other predictions" in capsys.readouterr().out


def test_predict_takes_folders_and_mixed_sizes_one_by_one(capsys):
    make_tree("photos", "ant/1.png", "cat/12.png")
    fit("--epochs 1 --image-size 0 --augment d4")
    capsys.readouterr()
    found = run_predict("photos", "valid 0.png")["image"].tolist()
    assert found == ["photos/ant/1.png", "photos/cat/12.png", "valid 0.png"]
    assert "accuracy" in capsys.readouterr().out
    picture(6, (40, 50)).save("big.png")
    expected = "give --image-size, or to predict --batch-size 1"
    refused(expected, run_predict, "photos", "big.png")
    os.rename("big.png", "odd \udcff.png")
    odd = partial(run_predict, "photos", "odd \udcff.png", "--batch-size=1")
    assert fork(as_script, odd) == 0
    assert b"\nodd \xff.png," in Path("predictions.csv").read_bytes()


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
        epochs = 2 if "--resume" in flags else 1
        flags = f"--image-size 32 {flags} --workers 0 --epochs {epochs}"
        args = train.parse_args(flags.split())
        alasa.input_preset(args.arch, args.weights)  # there is such an architecture
        args.arch = arch
        train.main(args)
    return len(commands)


def test_the_demo_runs_as_readme_says(capfd):
    small = "--epochs 1 --image-size 8 --batch-size 128"
    done = script(HERE / "train.py", *small.split())
    assert done.returncode == 0 and done.stderr == "", done
    assert "python train.py --train-csv digits/train.csv" in done.stdout
    for name in ("runs/losses.png", "runs/batch.png"):
        assert min(Image.open(name).size) > 400
    assert run_predict_script() == 0
    out, err = capfd.readouterr()
    assert re.search(r"accuracy 0\.\d+, auc 0\.\d+", out) and err == ""
    assert len(pd.read_csv("predictions.csv")) == 300
    fit("--epochs 1")  # any run may replace the demo's
    Path("digits/valid.csv").write_text("of the user")
    os.remove("digits/train.csv")
    not_the_demo = "--train-csv digits/train.csv --valid-csv digits/valid.csv --out own"
    refused("digits/train.csv: not a readable CSV", fit, not_the_demo)
    assert Path("digits/valid.csv").read_text() == "of the user"


def test_the_python_blocks_of_readme_run(capsys):
    train.write_digits()
    pd.read_csv("digits/train.csv")[:600].to_csv("digits/train.csv", index=False)
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


def test_closed_streams_and_a_notebooks_backend_do_no_harm(runs):
    command = f"{sys.executable} {HERE}/predict.py --test-csv valid.csv 2>&- >&-"
    environment = os.environ | {"MPLBACKEND": "nowhere", "WORLD_SIZE": "2"}
    done = subprocess.run(command, shell=True, env=environment, check=False)
    assert done.returncode == 0 and os.path.exists("predictions.png")


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
