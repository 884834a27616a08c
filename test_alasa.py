"""Tests of what README promises: `pytest test_alasa.py`.  No download, no network.

Each test works in a folder of its own, which holds train.csv, valid.csv and their images.
"""

import itertools
import math
import multiprocessing
import os
import re
import resource
import runpy
import shutil
import struct
import subprocess
import sys
import zlib
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
import torch
import torchvision
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

import alasa
import predict
import train

HERE = Path(__file__).parent
CSVS = "--train-csv train.csv --valid-csv valid.csv"
TINY = "--arch squeezenet1_1 --weights none --image-size 32 --batch-size 4 --epochs 2"
TINY += " --workers 0 --precision fp32 --schedule plateau --lr 3e-4"
SHUFFLENET = "shufflenet_v2_x0_5"
RUN_FILES = {"batch.png", "best.pt", "last.pt", "log.csv", "losses.png"}
os.environ["OMP_NUM_THREADS"] = "1"  # of the scripts
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # CUDA does not survive a fork
torch.set_num_threads(1)


# ---------------------------------------------------------------- helpers


def picture(seed: int, size=(32, 32), bright: bool = False) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 128, (*size[::-1], 3), np.uint8)
    return Image.fromarray(noise + np.uint8(100 * bright))


def make_tree(folder: str, *names: str) -> None:
    for name in names:
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(len(name)).save(path, "PNG")


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
    # The curves would take half of the time; the demo, a process of its own, draws them.
    monkeypatch.setattr(train, "plot_history", lambda _: Figure(figsize=(1, 1)))


def fit(more: str = "", criterion=None, data: str = CSVS) -> list[dict]:
    args = train.parse_args(f"{data} {TINY} {more}".split())
    return train.main(args, criterion)


def run_predict(*flags: str) -> pd.DataFrame:
    return predict.main(predict.parse_args([*flags, "--workers=0"]))


@pytest.fixture(scope="session")
def reference(data, tmp_path_factory) -> Path:
    """A run of three epochs."""
    out = tmp_path_factory.mktemp("runs") / "reference"
    rows = f"--train-csv {data}/train.csv --valid-csv {data}/valid.csv"
    fit(f"--epochs 3 --out {out}", data=rows)
    return out


@pytest.fixture
def runs(reference) -> Path:
    """A copy of that run, where the scripts look for one."""
    return Path(shutil.copytree(reference, "runs"))


def moved(old: dict, new: dict) -> set[str]:
    """Return what differs between two state dicts."""
    return {key for key in old | new if not torch.equal(old[key], new[key])}


def same_weights(*runs: str | Path) -> bool:
    for name in ("best.pt", "last.pt"):
        states = [alasa.load_checkpoint(f"{run}/{name}")["model"] for run in runs]
        if moved(*states):
            return False
    return True


def contents(folder: str | Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


def refused(expected: str, act, *args: object, **options: object) -> None:
    """Check that act(*args) is a mistake, told in one line that has this in it."""
    with pytest.raises(alasa.AlasaError, match=f"^.*({expected}).*$"):
        act(*args, **options)


def as_script(main) -> None:
    with alasa.as_script():
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


# ---------------------------------------------------------------- rows


def test_a_bad_csv_is_one_line_that_shows_what_is_there():
    faults = {
        b"": "bad.csv: cannot be read as a CSV in UTF-8",
        b"image,label\na,caf\xe9\n": "bad.csv: cannot be read as a CSV in UTF-8",
        b"image,label\na,b,c\n": "bad.csv: .*more cells than the first line",
        b"image,label\n": "bad.csv: has no rows",
        b"image;label\na;b\n": "no 'image' .*'image;label'.*--image-column",
        b"image,ant,bee\na,0,1\n": "no 'label' .*'ant', 'bee'.*--label-column",
    }
    for content, expected in faults.items():
        Path("bad.csv").write_bytes(content)
        refused(expected, alasa.read_rows, "bad.csv", needs_labels=True)
    refused("typo.csv: .*No such file or directory", alasa.read_rows, "typo.csv")


def test_cells_stay_what_they_are_without_the_spaces_around_them():
    Path("sub").mkdir()
    text = '\ufefftarget, id,more\r\nNA, "a, b.png",1\r\n\r\n007 , c.png,2\r\n'
    Path("sub/odd.csv").write_text(text, newline="")
    frame = alasa.read_rows("sub/odd.csv", "id", "target")
    assert frame["label"].tolist() == ["NA", "007"]
    assert frame["path"].tolist() == ["sub/a, b.png", "sub/c.png"]
    assert frame.index.tolist() == ["sub/odd.csv row 1", "sub/odd.csv row 2"]
    frame = alasa.read_rows("sub/odd.csv", "id", "target", image_root="photos")
    assert frame["path"].tolist() == ["photos/a, b.png", "photos/c.png"]
    assert alasa.find_classes(["10", "9", "x"]) == ["10", "9", "x"]
    assert alasa.find_classes(["10", "9", "-1"]) == ["-1", "9", "10"]


def test_a_folder_is_read_as_torchvisions_image_folder_does(capsys):
    make_tree("tree", "b/2.png", "a/1.JPG", "b/deep/3.webp", "a/note.txt")
    frame = alasa.read_rows("tree/")
    expected = torchvision.datasets.ImageFolder("tree")
    numbers = frame["label"].map(expected.class_to_idx)
    assert [*zip(frame["path"], numbers)] == expected.samples
    assert "left out, as no images: 1 files, first tree" in capsys.readouterr().out
    make_tree("tree", ".ipynb_checkpoints/1.png", "a/.hidden.png", "loose.gif")
    more = alasa.read_rows("tree")
    assert sorted(more["path"]) == sorted([*frame["path"], "tree/loose.gif"])
    refused("no label: tree: 'tree/loose.gif'", alasa.check_splits, more, more)
    refused("no folders named for", alasa.read_rows, "tree/a", needs_labels=True)


def test_splits_with_an_undefined_or_flattering_score_are_refused():
    train, valid = map(alasa.read_rows, ("train.csv", "valid.csv"))
    assert alasa.check_splits(train, valid) == ["ant", "cat"]
    twice = pd.concat([train, train.tail(1).assign(label="cat")])
    missing = "not a file: 13 rows: train.csv row 1: 'no', 'ant'.*--image-root"
    faults = [
        (train.assign(label="ant"), valid, "one class only"),
        (train, valid.assign(label="dog"), "no training image has the label: .*'dog'"),
        (train, valid.assign(label="ant"), "no validation image is 'cat'"),
        (train, valid.assign(label=""), "no label: .*valid.csv row 1: 'valid 0.png'"),
        (train.assign(path="no"), valid, missing),
        (twice, valid, "several labels: train.csv row 13: .*'ant'; .*'cat'"),
        (train, valid.assign(path="valid 0.png"), "several labels: .*row 2"),
        (train, train.head(4), "a training image too: .*train.csv row 1"),
    ]
    for one, another, expected in faults:
        refused(expected, alasa.check_splits, one, another)


def test_a_fifth_of_each_class_is_held_out_and_a_name_stays_on_one_side():
    make_tree("alaska", *[f"{kind}/{k}.jpg" for kind in ("c", "u") for k in range(50)])
    make_tree("alaska", "one/a.jpg", "two/b.jpg", "two/c.jpg")
    frame = alasa.read_rows("alaska")
    train, valid = alasa.hold_out(frame, 0.2, seed=0)
    assert sorted([*train["path"], *valid["path"]]) == sorted(frame["path"])
    assert valid["label"].value_counts().to_dict() == {"c": 10, "u": 10, "two": 1}
    sides = [set(part["path"].map(os.path.basename)) for part in (train, valid)]
    assert not sides[0] & sides[1]
    again = alasa.hold_out(frame.sample(frac=1, random_state=0), 0.2, seed=0)
    assert set(again[1]["path"]) == set(valid["path"])
    assert set(alasa.hold_out(frame, 0.2, seed=1)[1]["path"]) != set(valid["path"])
    frame["label"] = frame["label"].replace({"c": "train", "u": "val"})
    refused("'train', .*'val'. are splits, not", alasa.hold_out, frame, 0.2, 0)


# ---------------------------------------------------------------- images


def test_native_pixels_are_the_decoded_ones_and_d4_only_moves_them():
    picture(1, (24, 24)).save("a.jpg", quality=90)
    decoded = torch.from_numpy(np.array(Image.open("a.jpg"))).permute(2, 0, 1)
    frame = pd.DataFrame({"image": ["a.jpg"], "label": 0})
    assert torch.equal(alasa.AlasaDataset(frame, "valid")[0][0], decoded)
    turned = [torch.rot90(decoded, k, (1, 2)) for k in range(4)]
    eight = turned + [view.flip(2) for view in turned]
    dataset, seen = alasa.AlasaDataset(frame, "train"), set()
    for _ in range(200):
        image, _ = dataset[0]  # an ordinary random view
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
    clear = Image.new("RGBA", (2, 1), (10, 20, 30, 0))
    assert (read(clear) == [10, 20, 30]).all()  # else nothing would be left
    clear.putpixel((1, 0), (10, 20, 30, 255))
    assert read(clear).tolist() == [[[255] * 3, [10, 20, 30]]]
    odd = Image.fromarray(np.full((2, 2), 9, np.float32))
    refused("grey levels are of 32 bits", read, odd, "TIFF")


def test_an_image_is_turned_upright_whatever_else_its_metadata_say():
    wide = picture(4, (20, 10))
    upright = np.rot90(np.asarray(wide), -1)
    assert (read(wide, "TIFF", tiffinfo={0x0112: 6}) == upright).all()
    odd = b"Exif\0\0II*\0\x08\0\0\0\x02\0" + struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
    odd += struct.pack("<HHI4sI", 0x0100, 2, 1, b"abc\0", 0)  # a width that is text
    assert (read(wide, "PNG", exif=odd) == upright).all()
    assert read(wide, "JPEG", exif=b"Exif\0\0damaged").shape == (10, 20, 3)


def test_a_large_photo_is_decoded_small_but_never_below_twice_its_size():
    grey = np.linspace(0, 255, 1200 * 900).reshape(900, 1200).astype(np.uint8)
    Image.fromarray(grey).convert("RGB").save("photo.jpg", quality=95)
    whole = alasa.read_image("photo.jpg")
    assert whole.size == alasa.read_image("photo.jpg", 451).size == (1200, 900)
    small = alasa.read_image("photo.jpg", 112)
    assert small.size == (300, 225)
    resized = np.asarray(whole.resize(small.size, Image.Resampling.BOX)).astype(int)
    assert np.abs(np.asarray(small) - resized).mean() < 2
    frame, look = pd.DataFrame({"image": ["photo.jpg"]}), Mock()
    alasa.AlasaDataset(frame, "test", look, image_size=112)[0]
    assert look.call_args.args[0].size == small.size


def test_a_bad_image_is_one_line_that_names_it(monkeypatch):
    for name in ("whole.jpg", "whole.png"):
        picture(5, (64, 64)).save(name)
        whole = Path(name).read_bytes()
        for tenth in range(10):
            Path("bad").write_bytes(whole[: len(whole) * tenth // 10])
            refused("bad: not a readable image", alasa.read_image, "bad")
    failing = Mock(side_effect=OSError(5, "Input/output error"))
    monkeypatch.setattr(Path, "read_bytes", failing)  # of the drive, not of the image
    refused("bad: cannot be read: .*Input/output", alasa.read_image, "bad")


def test_a_scan_of_any_size_is_read_by_a_script(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    refused("valid 0.png: .*exceeds limit", alasa.read_image, "valid 0.png")
    assert fork(as_script, partial(alasa.read_image, "valid 0.png")) == 0


def test_a_flipped_bit_never_changes_the_pixels_of_a_png():
    picture(5).convert("RGBA").save("a.png")
    content, caught = bytearray(Path("a.png").read_bytes()), 0
    for place in range(40, len(content), 29):  # decoding alone passes some of these
        content[place] ^= 2
        Path("a.png").write_bytes(content)
        content[place] ^= 2
        try:
            assert alasa.read_image("a.png").tobytes() == picture(5).tobytes()
        except alasa.AlasaError:
            caught += 1
    assert caught > 50
    start = content.index(b"IDAT")
    content[start + 100] ^= 2  # now with the checksum of what is damaged
    end = len(content) - 16  # of the checksum comes the last chunk
    content[end : end + 4] = struct.pack(">I", zlib.crc32(content[start:end]))
    Path("a.png").write_bytes(content)
    refused("a.png: not a readable image", alasa.read_image, "a.png")


# ---------------------------------------------------------------- batches


def test_an_epoch_has_each_image_once_in_one_process_or_two(monkeypatch):
    data = alasa.AlasaDataset(pd.DataFrame({"image": range(13), "label": 0}), "train")

    def to_train(epoch: int = 1, seed: int = 0) -> list[list[int]]:
        draws = alasa.Draws(data.labels, seed)
        draws.epoch = epoch
        batches = alasa.make_loader(data, 4, draws).batch_sampler
        return [[row for row, _ in batch] for batch in batches]

    def to_score() -> list[list[int]]:
        return list(alasa.make_loader(data, 4).batch_sampler)

    batches, whole = to_train(), to_score()
    assert [len(rows) for rows in batches] == [4, 4, 4]  # not the last single one
    assert len(np.unique(batches)) == 12
    assert batches == to_train() != to_train(epoch=2)
    assert batches != to_train(seed=1)
    assert np.concatenate(whole).tolist() == list(range(13))
    monkeypatch.setattr(alasa, "get_world_size", lambda: 2)
    halves = []
    for rank in (0, 1):
        monkeypatch.setattr(alasa, "get_rank", lambda rank=rank: rank)
        assert to_score() == whole[rank::2]  # whole batches
        halves.append(to_train())
    for one, other, both in zip(*halves, batches):
        assert sorted(one + other) == sorted(both)


def test_balance_shows_a_rare_class_as_often_and_never_twice_alike():
    frame = pd.DataFrame({"image": [f"train {i}.png" for i in range(13)]})
    data = alasa.AlasaDataset(frame.assign(label=[0] * 12 + [1]), "train")
    draws = alasa.Draws(data.labels, seed=0, balance=True)
    drawn = []
    for draws.epoch in range(1, 41):
        drawn += draws
    rare = [seed for row, seed in drawn if row == 12]
    assert 0.4 < len(rare) / len(drawn) < 0.6
    assert len(set(rare)) == len(rare)
    views = {data[12, seed][0].numpy().tobytes() for seed in rare}
    assert len(views) == 8


# ---------------------------------------------------------------- the model


def test_weights_of_files_are_taken_or_refused_in_a_line(capsys):
    build = partial(alasa.build_model, "resnet18")
    plain = torchvision.models.resnet18(num_classes=2).state_dict()
    wrapped = {f"module.{key}": tensor for key, tensor in plain.items()}
    files = {"a.pt": plain, "b.pt": {"state_dict": wrapped, "epoch": 3}}
    files["c.pt"] = {"model": plain, "classes": ["ant", "bee"]}
    for name, content in files.items():
        torch.save(content, name)
        model = build(2, name, class_names=["ant", "bee"])
        assert not moved(plain, model.net.state_dict())
        assert "kept the last layer" in capsys.readouterr().out
    build(2, "c.pt", class_names=["ant", "cat"])
    build(3, "a.pt")
    assert capsys.readouterr().out.count("the last layer, fc, is new") == 2
    refused("a.pt, --arch resnet34: ", alasa.build_model, "resnet34", 2, "a.pt")
    torch.save({"state_dict": plain, "accuracy": np.float64(0.9)}, "numpy.pt")
    refused("numpy.pt: .*holds more than tensors: save", build, 2, "numpy.pt")


def test_a_model_scales_pixels_as_its_weights_want_and_is_restored_to_predict(runs):
    pixels = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8)
    weights = torchvision.models.get_model_weights("efficientnet_v2_l").DEFAULT
    with torch.device("meta"):  # without the time to initialise it
        model = alasa.build_model("efficientnet_v2_l", 2, "none", device="meta")
    scaled = alasa.normalise(pixels, model.mean, model.std)
    as_torchvision = weights.transforms(crop_size=40, resize_size=40)(pixels)
    assert torch.allclose(scaled, as_torchvision, atol=1e-5)
    checkpoint = alasa.load_checkpoint("runs/best.pt")
    restored = alasa.restore_model(checkpoint | {"mean": model.mean, "std": model.std})
    assert not any(layer.training for layer in restored.modules())
    assert not moved(checkpoint["model"], restored.net.state_dict())
    assert torch.equal(restored(pixels), restored.net(scaled))
    assert torch.equal(restored(pixels), restored(scaled))
    restored.precision = "bf16"
    assert restored(pixels).dtype == torch.float32


def test_the_stem_keeps_every_pixel_and_computes_in_float32():
    images = alasa.normalise(torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8))
    net = alasa.build_model("efficientnet_b0", 2, "none", full_res_stem=True).net
    assert net.features[0](images).shape[2:] == (32, 32)
    net = alasa.build_model("resnet18", 2, "none", full_res_stem=True).net
    stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
    assert stem(images).shape[2:] == (32, 32)
    exact = net.conv1(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(net.conv1(images), exact.bfloat16())
    assert net.double()(images.double()).dtype == torch.float64


def test_on_a_cpu_depthwise_layers_train_in_float32_and_tiny_images_too():
    model = alasa.build_model("mobilenet_v2", 2, "none")
    depthwise, dense = model.net.features[1].conv[0][0], model.net.features[1].conv[1]
    features = torch.randn(2, 32, 16, 16).bfloat16()
    for layer, is_exact in ((depthwise, True), (dense, False)):
        exact = layer(features.float()).bfloat16()
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(layer(features), exact) == is_exact
    for side, is_exact in ((31, True), (32, False)):
        images = torch.randint(0, 256, (2, 3, 32, side), dtype=torch.uint8)
        model.precision = "fp32"
        exact = model(images)
        model.precision = "bf16"
        assert torch.equal(model(images), exact) == is_exact
    choose = partial(alasa.choose_precision, device=torch.device("cpu"))
    assert choose("auto", image_size=31) == "fp32"
    assert choose("bf16", image_size=32) == choose("bf16", image_size=0) == "bf16"


# ---------------------------------------------------------------- one epoch


def test_what_is_frozen_or_kept_stays_as_it_was():
    plain = torchvision.models.get_model(SHUFFLENET).state_dict()
    torch.save(plain, "weights.pt")
    statistics = {key for key in plain if "running" in key or "batches" in key}
    expected = {
        "--epochs 2 --freeze --batch-norm train": {"fc.weight", "fc.bias"},
        "--epochs 2 --freeze 1": plain.keys() - statistics,
        "--epochs 1 --freeze 0 --batch-norm train": plain.keys(),
    }
    plain |= {"fc.weight": torch.zeros(()), "fc.bias": torch.zeros(())}  # a new one
    for more, keys in expected.items():
        fit(f"--arch {SHUFFLENET} --weights weights.pt --overwrite {more}")
        trained = alasa.load_checkpoint("runs/last.pt")["model"]
        assert moved(plain, trained) == keys


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
    for _ in range(100):
        labels = np.r_[0, 1, rng.integers(0, 2, rng.integers(1, 40))]
        scores = rng.integers(0, rng.integers(1, 12), len(labels)) / 16
        found = alasa.score(labels, np.stack([-scores, scores], axis=1))
        assert found["auc"] == pytest.approx(brute_force_auc(labels, scores, 0))
        assert found["wauc"] == pytest.approx(brute_force_auc(labels, scores, 0.4))
    p, labels = rng.dirichlet(np.ones(4), 50), np.arange(50) % 4
    found = alasa.score(labels, np.log(p))
    aucs = [brute_force_auc(labels == k, p[:, k], 0) for k in range(4)]
    assert found["auc"] == pytest.approx(np.mean(aucs))
    wauc = brute_force_auc(labels != 0, 1 - p[:, 0], 0.4)  # by P(not Cover) alone
    assert found["wauc"] == pytest.approx(wauc)
    sure = np.array([[0, 100, 98], [0, 101, 98], [0, 98, 102]])  # P rounds to 1
    assert alasa.score([0, 1, 2], sure)["wauc"] == 1


def test_an_undefined_score_is_an_error_or_nan_never_a_number():
    for labels, scores in (([0, 1], [0.5, math.nan]), ([1, 1], [0.1, 0.2])):
        with pytest.raises(ValueError):
            alasa.weighted_auc(np.array(labels), np.array(scores))
    assert math.isnan(alasa.score([1, 1], np.full((2, 2), 0.5))["auc"])
    nothing = alasa.score([0, 1], np.full((2, 2), math.nan))
    assert all(map(math.isnan, nothing.values()))
    one_class_absent = alasa.score([0, 1], np.eye(3)[:2])
    assert math.isnan(one_class_absent["auc"]) and one_class_absent["wauc"] == 1


# ---------------------------------------------------------------- files


def test_a_damaged_or_foreign_checkpoint_runs_no_code(runs):
    class Evil:
        def __reduce__(self):
            return os.mkdir, ("executed",)

    whole = contents(runs)["best.pt"]
    flipped = whole[:60000] + bytes([whole[60000] ^ 1]) + whole[60001:]
    for number, content in enumerate([b"", whole[:-99], flipped]):
        Path(f"{number}.pt").write_bytes(content)
    torch.save(alasa.load_checkpoint("runs/best.pt") | {"more": Evil()}, "evil.pt")
    torch.save({"model": {}, "args": {}, "classes": []}, "earlier.pt")
    for path in ("missing.pt", *Path().glob("*.pt")):
        refused(f"{path}: not a checkpoint", alasa.load_checkpoint, path)
    refused("holds more than tensors", alasa.build_model, "resnet18", 2, "evil.pt")
    assert not os.path.exists("executed")


def test_a_full_disk_is_one_line_and_leaves_old_files_whole(runs, capfd):
    def fit_on_a_full_disk(more: str, room: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
        as_script(partial(fit, more))

    before = contents("runs")
    for more in ("--resume --epochs 4", "--out new", "--overwrite"):
        assert fork(fit_on_a_full_disk, more, 500_000) == 2
        fault = "error: .*/(last|best).pt: cannot be written: .*too large\n"
        assert re.fullmatch(fault, capfd.readouterr().err)
    after = contents("runs")
    assert after.keys() == before.keys()
    assert all(after[name] == before[name] for name in ("best.pt", "last.pt"))
    assert fork(fit_on_a_full_disk, "--overwrite", 4_000_000) == 2  # for best.pt alone
    assert "last.pt" not in contents("runs")  # which would go on with another best.pt


# ---------------------------------------------------------------- scripts


def test_importing_alasa_changes_nothing_in_the_process():
    program = """
import os, random, signal, warnings, matplotlib.figure, numpy, pandas, sklearn.metrics
import torch.distributed, torchvision.transforms.v2
def state():
    yield [signal.getsignal(number) for number in signal.valid_signals()]
    yield random.getstate(), numpy.random.get_state()[1].tolist()
    yield torch.get_rng_state().tolist(), torch.are_deterministic_algorithms_enabled()
    yield torch.backends.cudnn.benchmark, torch.get_num_threads()
    yield list(warnings.filters), dict(os.environ)
before = list(state())
import alasa, train, predict
assert list(state()) == before
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=HERE, check=False)
    assert done.returncode == 0


def test_a_mistake_is_one_line_and_leaves_nothing_behind(monkeypatch, capsys):
    monkeypatch.setenv("TORCH_HOME", "/dev/null")  # where nothing can be downloaded to
    mistakes = {
        "--augment crop --image-size 0": "--augment crop needs an --image-size",
        "--arch inception_v3": "inception_v3 is not supported; choose from.*resnet18",
        "--weights V7": "--weights V7: not a file of weights, nor of .*IMAGENET1K_V1",
        "--weights DEFAULT": "download.pytorch.org.*checkpoints.*--weights FILE or none",
        "--precision bf16 --image-size 31": "32 pixels",
        "--resume": "--resume: there is no runs/last.pt; .*--out again",
        "--image-root /nowhere": "'/nowhere/train 0.png', 'ant'; .*--image-root",
        "--out train.csv": "File exists: 'train.csv'",
        "--batch-size 1": "1 is not in 2..inf",
    }
    files = os.listdir()
    for more, expected in mistakes.items():
        with pytest.raises((alasa.AlasaError, OSError, SystemExit)) as fault:
            fit(more)
        told = f"{capsys.readouterr().err}{fault.value}"
        assert re.search(expected, told) and len(told.splitlines()) <= 3, more
        assert os.listdir() == files


def test_an_unreadable_image_stops_training_and_is_named(capfd):
    names = [f"train {i}.png" for i in range(12)]
    for name in names:
        os.truncate(name, 500)
    one = "error: train.csv row [0-9]+: train [0-9]+.png: not a readable image.*"
    one += "--check-images lists all such images\n"
    every = "error: 12 of 21 images cannot be read\n"
    for more, expected in (("", one), ("--workers 1", one), ("--check-images", every)):
        assert fork(as_script, partial(fit, f"{more} --out new")) == 2
        out, err = capfd.readouterr()
        assert re.fullmatch(expected, err)
        assert not os.path.exists("new/last.pt")
    assert all(f"{name}: not a readable image" in out for name in names)


def train_and_act(act) -> None:
    """Train with a worker, as a script does, and call act() for the loss of the second
    epoch's second step."""
    calls = itertools.count(1)  # chance, then three steps and two losses an epoch

    def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if next(calls) == 8:
            return act()
        return nn.functional.cross_entropy(logits, labels)

    as_script(partial(fit, "--workers 1 --overwrite", loss))


def test_a_bad_loss_is_one_line_and_a_bug_keeps_its_traceback(capfd):
    assert fork(train_and_act, lambda: torch.tensor(math.nan)) == 2
    err = capfd.readouterr().err
    assert re.fullmatch("error: epoch 2, batch 2: the loss became nan; .*\n", err)
    assert len(alasa.load_checkpoint("runs/last.pt")["history"]) == 1
    assert fork(train_and_act, lambda: {}["bug"]) == 1
    err = capfd.readouterr().err
    assert "Traceback" in err and "KeyError: 'bug'" in err


# ---------------------------------------------------------------- train.py


def test_any_number_of_workers_gives_the_same_bits(reference):
    def train_with(workers: int, how: str) -> None:
        multiprocessing.set_start_method(how, force=True)
        fit(f"--epochs 3 --workers {workers} --out {how}")

    for workers, how in ((3, "fork"), (1, "spawn")):
        assert fork(train_with, workers, how) == 0
        assert same_weights(how, reference)


@pytest.mark.parametrize(
    ("how", "fall"),
    [("bf16 --balance --schedule cosine", 0.654508), ("fp16 --optimizer sgd", 1)],
)
def test_a_resumed_run_ends_bit_identical(how, fall, monkeypatch):
    def loud(logits, labels):  # fp16 overflows, and skips the first steps
        return 99 * nn.functional.cross_entropy(logits, labels)

    more = f"--arch mobilenet_v3_small --precision {how}"
    fit(f"{more} --out whole", loud)
    stop = Mock(side_effect=["chance", KeyboardInterrupt])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(alasa, "describe", stop)  # once the first epoch is saved
        fit(more, loud)
    shutil.copytree(".", "moved", dirs_exist_ok=True)  # and the data may move
    elsewhere = "--train-csv moved/train.csv --valid-csv moved/valid.csv"
    train.main(train.parse_args(f"--resume --workers 1 {elsewhere}".split()), loud)
    assert same_weights("runs", "whole")
    rates = pd.read_csv("runs/log.csv")["lr"].tolist()
    assert rates == pytest.approx([3e-4, 3e-4 * fall], rel=1e-5)


def test_killed_at_random_moments_and_resumed_ends_bit_identical(reference):
    for seconds in (*np.random.default_rng(0).uniform(0, 0.6, 5), 60):
        more = "--resume" if os.path.exists("runs/last.pt") else "--overwrite"
        fork(fit, f"--epochs 3 {more}", seconds=seconds)
        for file in Path().glob("runs/*.pt"):
            alasa.load_checkpoint(file)
    assert same_weights("runs", reference)
    assert RUN_FILES < set(os.listdir("runs"))


def test_resuming_needs_one_flag_and_refuses_another_run(runs, capsys):
    before = contents("runs")
    for more in ("--seed 1", "--arch resnet18", "--batch-size 5", "--lr 1"):
        expected = "--resume: .* was .*, now .*--weights runs/best.pt --out again"
        refused(expected, train.parse_args, f"--resume {more}".split())
    shutil.move("runs", "elsewhere")  # as its folder may move
    resume = ["--resume", "--out", "elsewhere"]
    assert len(train.main(train.parse_args(resume))) == 3
    assert "all 3 epochs are done; --resume --epochs N" in capsys.readouterr().out
    assert contents("elsewhere") == before
    Path("elsewhere/best.pt").unlink()
    refused("there is no elsewhere/best.pt", train.parse_args, resume)


def test_a_run_is_replaced_only_when_asked_and_resumed_with_its_rows():
    fit("--epochs 1 --lr 0")
    before = contents("runs")
    refused("runs holds a run: --resume, --overwrite", fit)
    for split in ("train", "valid"):
        table = pd.read_csv(f"{split}.csv")
        table[::-1].to_csv(f"{split}.csv", index=False)
        refused("other names or labels", fit, "--resume --epochs 1 --lr 0")
        table.to_csv(f"{split}.csv", index=False)
    assert contents("runs") == before
    shutil.copytree("runs", "before")
    fit("--epochs 1 --lr 0 --seed 1 --overwrite")
    assert not same_weights("runs", "before")  # for another seed


def test_of_two_runs_in_one_folder_the_second_to_save_is_refused():
    def another_run(logits, labels):
        if torch.is_grad_enabled() and not os.path.exists("runs/last.pt"):
            assert fork(fit, "--epochs 1 --seed 1") == 0
            shutil.copytree("runs", "other")
        return nn.functional.cross_entropy(logits, labels)

    refused("another run is saving there", fit, "--epochs 1", another_run)
    assert contents("runs") == contents("other")
    assert RUN_FILES < set(os.listdir("runs"))


def test_best_epoch_rate_and_patience_look_at_score_then_loss(monkeypatch):
    scores = {
        "wauc": iter([math.nan, 0.9, 0.9, math.inf, 0.8, 0.8, 0.8]),
        "valid_loss": iter([1, 9, 8, 7, 7, 7, 7]),
    }
    real = alasa.evaluate

    def evaluate(*args) -> dict[str, float]:
        return real(*args) | {name: next(left) for name, left in scores.items()}

    monkeypatch.setattr(alasa, "evaluate", evaluate)
    fit("--monitor wauc --early-stop 4 --epochs 5")
    history = train.main(train.parse_args(["--resume", "--epochs=99"]))
    assert [row["lr"] / 3e-4 for row in history] == [1, 1, 1, 1, 1, 1, 0.5]
    assert len(alasa.load_checkpoint("runs/best.pt")["history"]) == 3


# ---------------------------------------------------------------- predict.py


def check_scores_are_as_logged(run: str, csv: str, capsys) -> None:
    best = alasa.load_checkpoint(f"{run}/best.pt")["history"][-1]
    capsys.readouterr()
    table = run_predict(f"--checkpoint={run}/best.pt", f"--test-csv={csv}")
    best["accuracy"] = best["valid_accuracy"]
    logged = {name: best[name] for name in ("accuracy", "auc", "wauc")}
    assert f"{alasa.describe(logged)}\n" in capsys.readouterr().out
    labels = pd.read_csv(csv)["label"]
    wauc = alasa.weighted_auc(labels == labels.max(), table["score"])
    assert wauc == pytest.approx(best["wauc"])
    p = [table[f"p_{label}"][row] for row, label in labels.items()]
    assert -np.log(p).mean() == pytest.approx(best["valid_loss"])


def test_predicting_on_the_validation_csv_gives_the_logged_scores(capsys):
    fit("--precision bf16")
    check_scores_are_as_logged("runs", "valid.csv", capsys)
    make_tree("photos", *[f"{kind}/{kind}{k}.png" for kind in "ab" for k in range(10)])
    fit("--precision bf16 --overwrite", data="--train-csv photos")
    check_scores_are_as_logged(
        "runs", "runs/validation.csv", capsys
    )  # what was held out


def run_predict_script(*flags: str) -> int | None:
    sys.argv = ["predict.py", "--workers=0", *flags]
    return fork(runpy.run_path, f"{HERE}/predict.py", {}, "__main__")


def test_predict_keeps_the_row_of_a_bad_image_and_says_so(runs, capfd):
    os.truncate("valid 1.png", 500)
    images = [f"valid {i}.png" for i in (0, 1, 99, 2)]
    assert run_predict_script(*images) == 1
    assert "2 of 4 failed, first image 2: valid 1.png: not" in capfd.readouterr().err
    table = pd.read_csv("predictions.csv")
    assert list(table) == ["image", "label", "score", "p_ant", "p_cat", "error"]
    assert table["image"].tolist() == images
    errors = table.pop("error").fillna("").str.split(".png").str[0].tolist()
    assert errors == ["", "image 2: valid 1", "image 3: valid 99", ""]
    assert table.isna().sum(axis=1).tolist() == [0, 4, 4, 0]  # all but the image


def test_predict_scores_what_is_labelled_and_prints_what_is_defined(runs, capsys):
    table = pd.read_csv("valid.csv")
    table["label"] = ["", "dog", *["ant"] * 6]  # these, as placeholders
    table.to_csv("test.csv", index=False)
    assert len(run_predict("--test-csv=test.csv")) == 8
    out = capsys.readouterr().out
    assert "not scored: 2 images, as '' is no class" in out
    assert "accuracy" in out and "nan" not in out


def test_predict_refuses_a_bad_output_and_torchrun_before_the_work(runs, monkeypatch):
    predict_to = partial(run_predict, "--test-csv", "valid.csv", "--output")
    refused("its folder cannot be written to", predict_to, "nowhere/p.csv")
    for output in ("./valid.csv", "valid 0.csv", "./runs/best.pt"):
        refused("would replace an input", predict_to, output)
    monkeypatch.setattr(predict.dist, "is_torchelastic_launched", lambda: True)
    refused("one process: start it without torchrun", predict_to, "new.csv")


def test_tta_of_an_image_and_of_its_quarter_turn_agree():
    fit("--augment d4 --epochs 1")
    picture(7).save("a.png")
    picture(7).transpose(Image.Transpose.ROTATE_90).save("b.png")
    for flags, least, most in (([], 1e-4, 1), (["--tta"], 0, 1e-6)):
        one, other = run_predict("a.png", "b.png", *flags)["score"]
        assert least <= abs(one - other) < most


# ---------------------------------------------------------------- README


def readme(section: str) -> str:
    return (HERE / "README.md").read_text().split(f"## {section}")[1].split("\n## ")[0]


def run_block(section: str, block: int, name: str = "block") -> dict:
    blocks = re.findall(r"(?s)```python(.*?)```", readme(section))
    Path("block.py").write_text(blocks[block])
    return runpy.run_path("block.py", run_name=name)


def run_flags(script: str, flags: str) -> None:
    """Run a command, if it trains, with a small network and images for an epoch."""
    if script == "predict":
        run_predict(*flags.split())
        return
    if "--resume" in flags:
        flags = flags.replace("--epochs 12", "--epochs 2")
    else:
        flags = f"--image-size 32 {flags} --workers 0 --epochs 1"
    args = train.parse_args(flags.split())
    args.arch = SHUFFLENET
    train.main(args)


def run_commands(section: str, monkeypatch) -> int:
    """Run a section's commands, with weights as if torchvision had downloaded them."""
    monkeypatch.setenv("TORCH_HOME", os.getcwd())
    plain = torchvision.models.get_model(SHUFFLENET).state_dict()
    url = torchvision.models.get_model_weights(SHUFFLENET).DEFAULT.url
    Path("hub/checkpoints").mkdir(parents=True)
    torch.save(plain, f"hub/checkpoints/{Path(url).name}")
    pattern = r"(?m)^    (?:python|torchrun \S+) (train|predict).py ?(.*)$"
    commands = re.findall(pattern, readme(section))
    for command in commands:
        run_flags(*command)
    return len(commands)


def test_the_demo_and_the_python_blocks_of_readme_run(capfd):
    done = script(HERE / "train.py", "--epochs=1", "--image-size=8", "--batch-size=128")
    assert done.returncode == 0 and done.stderr == "", done
    assert "python train.py --train-csv digits/train.csv" in done.stdout
    for name in ("runs/losses.png", "runs/batch.png"):
        assert min(Image.open(name).size) > 400
    assert run_predict_script() == 0
    out, err = capfd.readouterr()
    assert re.search(r"accuracy 0\.\d+, auc 0\.\d+", out) and err == ""
    assert len(pd.read_csv("predictions.csv")) == 300

    run_block("In Python", 0)
    label, p = capfd.readouterr().out.split()
    assert label in "0123456789" and 0.1 < float(p) <= 1
    pixels = torch.randint(0, 256, (1, 3, 8, 8), dtype=torch.uint8)
    model = alasa.restore_model(alasa.load_checkpoint("runs/best.pt"))
    net = run_block("In Python", 1)["net"]
    assert torch.allclose(net(alasa.normalise(pixels)), model(pixels), atol=1e-5)
    fit("--epochs 1")  # any run may replace the demo's


def test_the_commands_of_readme_run(monkeypatch):
    make_tree("photos", *[f"{kind}/{kind}{i}.jpg" for kind in "ab" for i in range(5)])
    make_tree("photos2/train", *[f"{kind}/{i}.jpg" for kind in "ab" for i in range(4)])
    make_tree("photos2/val", "a/8.jpg", "b/9.jpg")
    make_tree(".", "photo1.jpg", "photo2.jpg", "some-folder/3.jpg")
    shutil.copy("valid.csv", "test.csv")
    assert run_commands("Your own images", monkeypatch) == 9
    rows = re.findall(r"(?m)^\| .* \| `(--.*)` \|$", readme("Your own images"))
    for flags in rows:
        run_flags("train", f"{CSVS} {flags}")
    assert len(rows) == 8

    table = pd.read_csv("train.csv")
    table.columns = ["id", "target"]
    table.to_csv("kaggle.csv", index=False)
    run_block("Your own images", 0)
    folds = pd.concat(alasa.read_rows(f"valid{fold}.csv") for fold in range(5))
    assert sorted(folds["image"]) == sorted("images/" + table["id"] + ".jpg")


def test_the_alaska2_recipe_splits_by_name_and_runs(monkeypatch):
    names = [f"{number:05d}.jpg" for number in range(20)]
    for folder in ("Cover", "JMiPOD", "JUNIWARD", "UERD", "Test"):
        make_tree(folder, *names)
    for command in re.findall("(?m)^    (mkdir .*)$", readme("ALASKA2")):
        subprocess.run(command, shell=True, check=True)
    assert run_commands("ALASKA2", monkeypatch) == 2
    valid = pd.read_csv("runs/validation.csv")
    assert valid["label"].value_counts().tolist() == [4] * 4
    assert valid["image"].map(os.path.basename).nunique() == 4
    run_block("ALASKA2", 0)
    table = pd.read_csv("submission.csv")
    assert list(table) == ["Id", "Label"] and table["Id"].tolist() == names
    assert table["Label"].between(0, 1).all()


# ---------------------------------------------------------------- several processes


def print_scores() -> None:
    """Score five images, and one, over all processes."""
    alasa.start_process("cpu")
    torch.manual_seed(0)
    model = alasa.build_model("resnet18", 2, "none")
    for count in (5, 1):
        frame = pd.DataFrame({"image": [f"valid {i}.png" for i in range(count)]})
        data = alasa.AlasaDataset(frame.assign(label=frame.index % 2), "valid")
        loader = alasa.make_loader(data, 2)
        scores = alasa.evaluate(model, loader, nn.CrossEntropyLoss())
        logits, _ = alasa.infer(model, loader)
        print(f"{scores} {logits.tolist()}\n", end="", flush=True)


def test_two_processes_score_as_one_resume_and_fail_together(capsys):
    launcher = "-m torch.distributed.run --nproc-per-node=2 --master-port=29511"
    two = script(*launcher.split(), __file__)
    print_scores()
    one = capsys.readouterr().out
    for line in one.splitlines():
        assert two.stdout.count(f"{line}\n") == 2, two
    assert one.count("loss") == 2
    assert two.stdout.count("epoch 1, lr") == 2  # of two runs
    assert same_weights("whole", "runs") and RUN_FILES < set(os.listdir("runs"))
    assert two.returncode != 0 and "train.csv row 5: " in two.stderr, two
    assert not os.path.exists("new/last.pt")
    check_scores_are_as_logged("whole", "valid.csv", capsys)


if __name__ == "__main__":  # one of torchrun's processes
    print_scores()
    batch_norm = f"--arch {SHUFFLENET} --freeze 1"
    fit(f"{batch_norm} --out whole")
    fit(f"{batch_norm} --epochs 1")
    alasa.gather_batches([])  # until the first has saved
    fit(f"{batch_norm} --resume")
    os.truncate("train 4.png", 500)
    with alasa.as_script():
        fit("--out new")
