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
import signal
import struct
import subprocess
import sys
import time
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
from torch.utils.data import DataLoader

import alasa
import predict
import train

HERE = Path(__file__).parent
TINY = "--train-csv train.csv --valid-csv valid.csv --arch squeezenet1_1 --weights none"
TINY += " --image-size 32 --batch-size 4 --epochs 2 --workers 0 --precision fp32"
TINY += " --schedule plateau --lr 3e-4"
RUN_FILES = ["batch.png", "best.pt", "last.pt", "log.csv", "losses.png"]
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
        patch.setattr(train, "plot_history", lambda _: Figure(figsize=(1, 1)))
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


def make_tree(folder: str, *names: str) -> None:
    for name in names:
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(len(name)).save(path, "PNG")


# ---------------------------------------------------------------- rows


def test_a_bad_csv_is_one_line_that_shows_what_is_there():
    no_image = "no column 'image' in its first line, only"
    faults = {
        b"": "bad.csv: cannot be read as a CSV in UTF-8",
        b"image,label\n": "bad.csv: has no rows",
        b'image,label\na,"b\n': "bad.csv: cannot be read as a CSV in UTF-8",
        b"PK\3\4\x8f\xe0": "bad.csv: cannot be read as a CSV in UTF-8",
        "image,label\na,caf\xe9\n".encode(
            "cp1252"
        ): "bad.csv: cannot be read as a CSV in UTF-8",
        b"a.jpg,ant\nb.jpg,bee\n": f"{no_image} .'a.jpg', 'ant'.*--image-column",
        b"image;label\na;b\n": f"{no_image} .'image;label'",
        b"image,ant,bee\na,0,1\n": "no column 'label' in .*'ant', 'bee'.*--label-column",
        b"image,label\na,b,c\n": "bad.csv: cannot be read as a CSV in UTF-8.*more cells than the first line",
    }
    for content, expected in faults.items():
        Path("bad.csv").write_bytes(content)
        refused(expected, partial(alasa.read_rows, "bad.csv", needs_labels=True))
    refused("typo.csv: .*No such file or directory", alasa.read_rows, "typo.csv")


def test_cells_stay_what_they_are_without_the_spaces_around_them():
    Path("sub").mkdir()
    mask = "1 1 " * 50_000
    text = f'\ufefftarget, id,more\r\nNA, "a, b.png",{mask}\r\n\r\n007 , c.png,2\r\n'
    Path("sub/odd.csv").write_text(text, newline="")
    frame = alasa.read_rows("sub/odd.csv", "id", "target")
    assert frame["label"].tolist() == ["NA", "007"]
    assert frame["path"].tolist() == ["sub/a, b.png", "sub/c.png"]
    assert frame.index.tolist() == ["sub/odd.csv row 1", "sub/odd.csv row 2"]
    frame = alasa.read_rows("sub/odd.csv", "id", "target", image_root="photos")
    assert frame["path"].tolist() == ["photos/a, b.png", "photos/c.png"]


def test_a_folder_is_read_as_torchvisions_image_folder_does(capsys):
    make_tree("tree", "b/2.png", "a/1.JPG", "b/deep/3.webp", "b/4.png", "a/note.txt")
    frame = alasa.read_rows("tree/")
    expected = torchvision.datasets.ImageFolder("tree")
    numbers = frame["label"].map(expected.class_to_idx)
    assert [*zip(frame["path"], numbers)] == expected.samples
    out = capsys.readouterr().out
    assert "left out, as no images: 1 files, first tree/a/note.txt" in out
    assert "label" not in alasa.read_rows("tree/a")
    make_tree("tree", ".ipynb_checkpoints/1.png", "a/.hidden.png")
    make_tree("tree", "a/6.gif", "b/7.jfif", "loose.png")
    more = alasa.read_rows("tree")
    new = {"tree/a/6.gif", "tree/b/7.jfif", "tree/loose.png"}
    assert sorted(more["path"]) == sorted([*frame["path"], *new])
    refused("no label: tree: 'tree/loose.png'", alasa.check_splits, more, more)
    refused("no folders named for classes", alasa.read_folder, "tree/a", True)
    Path("empty").mkdir()
    refused("empty: has no images", alasa.read_rows, "empty")


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
        (train, valid.assign(path="."), "not a file: .*valid.csv row 1"),
        (
            twice,
            valid,
            "several labels: train.csv row 13: 'train 12.png', 'ant'; .*'cat'",
        ),
        (train, valid.assign(path="valid 0.png"), "several labels: .*row 2"),
        (train, train.head(4), "a training image too: .*train.csv row 1"),
    ]
    for one, another, expected in faults:
        refused(expected, alasa.check_splits, one, another)
    alasa.check_splits(pd.concat([train, train]), valid)  # with one label: fine
    cats = valid[valid["label"] == "cat"]
    assert alasa.check_splits(train, cats, "accuracy") == ["ant", "cat"]


def test_integers_sort_as_numbers_and_text_as_text():
    assert alasa.find_classes(["10", "9", "-1", "+2"]) == ["-1", "+2", "9", "10"]
    assert alasa.find_classes(["10", "9", "x"]) == ["10", "9", "x"]


def test_a_fifth_of_each_class_is_held_out_and_a_name_stays_on_one_side():
    names = [f"{number}.jpg" for number in range(50)]
    make_tree(
        "alaska", *[f"{kind}/{name}" for kind in ("Cover", "UERD") for name in names]
    )
    make_tree("few", "a/1.jpg", "b/1.jpg", "b/2.jpg", "c/x/1.jpg", "c/y/1.jpg")
    make_tree("few", *[f"d/{number}.jpg" for number in range(20)])
    frame = alasa.read_rows("alaska")
    train, valid = alasa.hold_out(frame, 0.2, seed=0)
    assert sorted([*train["path"], *valid["path"]]) == sorted(frame["path"])
    assert valid["label"].value_counts().to_dict() == {"Cover": 10, "UERD": 10}
    sides = [set(part["path"].map(os.path.basename)) for part in (train, valid)]
    assert not sides[0] & sides[1]
    again = alasa.hold_out(frame.sample(frac=1, random_state=0), 0.2, seed=0)
    assert set(again[1]["path"]) == set(valid["path"])
    assert set(alasa.hold_out(frame, 0.2, seed=1)[1]["path"]) != set(valid["path"])
    for seed in range(9):
        train, valid = alasa.hold_out(alasa.read_rows("few"), 0.2, seed)
        held = valid["label"].value_counts().to_dict()
        assert held["b"] == 1 and held["d"] in (4, 5) and "a" not in held
        assert set(train["label"]) == set("abcd")
    os.rename("alaska/Cover", "alaska/train")
    os.rename("alaska/UERD", "alaska/val")
    splits = alasa.read_rows("alaska")
    refused("'train', 'val'. are splits, not classes", alasa.hold_out, splits, 0.2, 0)
    expected = "no label has two images"
    refused(expected, alasa.hold_out, frame.drop_duplicates("label"), 0.2, 0)


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
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    assert read(palette, transparency=0).tolist() == [[[255] * 3, [40, 50, 60]]]
    rgb = picture(2)
    assert np.abs(read(rgb.convert("CMYK"), "TIFF") - np.asarray(rgb)).max() <= 1
    film = read(rgb, "GIF", save_all=True, append_images=[picture(3)])
    assert (film == np.asarray(Image.open("image").convert("RGB"))).all()
    clear = Image.new("RGBA", (2, 1), (10, 20, 30, 0))
    for kind in ("PNG", "TIFF", "WEBP"):  # all is transparent: nothing would be left
        options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
        assert (read(clear, kind, **options) == [10, 20, 30]).all()
    clear.putpixel((1, 0), (10, 20, 30, 255))
    assert read(clear).tolist() == [[[255] * 3, [10, 20, 30]]]
    for kind in (np.float32, np.int32):
        odd = Image.fromarray(np.full((2, 2), 9, kind))
        refused("grey levels are of 32 bits", read, odd, "TIFF")


def test_an_image_is_turned_upright_whatever_else_its_metadata_say():
    wide = picture(4, (20, 10))
    upright = np.rot90(np.asarray(wide), -1)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    for kind, how in (("PNG", {"exif": exif}), ("TIFF", {"tiffinfo": {0x0112: 6}})):
        assert (read(wide, kind, **how) == upright).all()
    odd = b"Exif\0\0II*\0\x08\0\0\0\x02\0" + struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
    odd += (
        struct.pack("<HHI", 0x0100, 2, 1) + b"abc\0" + bytes(4)
    )  # a width that is text
    assert read(wide, "JPEG", exif=odd).shape == upright.shape
    assert read(wide, "JPEG", exif=b"Exif\0\0damaged").shape == (10, 20, 3)


def test_a_large_photo_is_decoded_small_but_never_below_twice_its_size():
    grey = np.linspace(0, 255, 1200 * 900).reshape(900, 1200).astype(np.uint8)
    photo = Image.merge("RGB", [Image.fromarray(grey).rotate(k) for k in (0, 90, 180)])
    exif = Image.Exif()
    exif[0x0112] = 6
    for image in (photo, photo.convert("L"), photo.convert("CMYK")):
        image.save("photo.jpg", quality=95, exif=exif)
        whole = alasa.read_image("photo.jpg")
        assert whole.size == (900, 1200)
        for image_size, sides in ((451, (900, 1200)), (112, (225, 300))):
            small = alasa.read_image("photo.jpg", image_size)
            assert small.size == sides and small.mode == "RGB"
        resized = np.asarray(whole.resize(sides, Image.Resampling.BOX)).astype(int)
        assert np.abs(np.asarray(small) - resized).mean() < 2
    frame = pd.DataFrame({"image": ["photo.jpg"], "label": 0})
    seen = []
    data = alasa.AlasaDataset(
        frame, "valid", lambda image: seen.append(image.size), 112
    )
    data[0], alasa.TolerantDataset(frame, "test", image_size=112)[0]
    assert seen == [(225, 300)]


def test_a_bad_image_is_one_line_that_names_it(monkeypatch):
    picture(5, (64, 64)).save("whole.jpg")
    picture(5, (64, 64)).save("whole.png")
    for whole in (Path("whole.jpg").read_bytes(), Path("whole.png").read_bytes()):
        for tenth in range(10):
            Path("bad").write_bytes(whole[: len(whole) * tenth // 10])
            refused("bad: not a readable image", alasa.read_image, "bad")
    failing = Mock(side_effect=OSError(5, "Input/output error"))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", failing)  # of the drive, not of the image
        refused(
            "whole.jpg: cannot be read: .*Input/output", alasa.read_image, "whole.jpg"
        )


def test_a_scan_of_any_size_is_read_by_a_script(monkeypatch):
    def read_scan():
        with alasa.as_script():
            alasa.read_image("valid 0.png")

    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    refused("valid 0.png: .*exceeds limit", alasa.read_image, "valid 0.png")
    assert fork(read_scan) == 0


def test_a_thin_image_costs_no_more_than_another():
    thin = Image.fromarray(np.zeros((20_000, 3, 3), np.uint8))
    assert alasa.make_transform(224)(thin).shape == (3, 224, 224)
    square = alasa.make_transform(16)(picture(1, (40, 30)))
    assert square.shape == (3, 16, 16)


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


def test_a_forked_or_spawned_worker_reads_the_same_batches_in_every_epoch():
    def two_epochs(workers: int) -> list:
        frame = alasa.read_rows("train.csv").assign(label=[0, 1] * 6 + [0])
        data = alasa.AlasaDataset(frame, "train", alasa.make_transform(32, "crop"), 32)
        draws = alasa.Draws(data.labels, seed=0, balance=True)
        loader = alasa.make_loader(data, 4, draws, workers)
        first = list(loader)
        draws.epoch = 2
        return first + list(loader)

    def compare(how: str):
        multiprocessing.set_start_method(how, force=True)
        for one, other in zip(two_epochs(0), two_epochs(1), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)

    assert fork(compare, "fork") == 0
    assert fork(compare, "spawn") == 0


def test_an_epoch_has_each_image_once_in_one_process_or_two(monkeypatch):
    frame = pd.DataFrame({"image": range(13), "label": [0] * 12 + [1]})
    data = alasa.AlasaDataset(frame, "train")

    def rows_of(batch_size: int, epoch: int = 1, seed: int = 0) -> list[list[int]]:
        draws = alasa.Draws(data.labels, seed)
        draws.epoch = epoch
        loader = alasa.make_loader(data, batch_size, draws)
        return [[row for row, _ in batch] for batch in loader.batch_sampler]

    def in_order() -> list[list[int]]:
        return list(alasa.make_loader(data, 4).batch_sampler)

    batches, whole = rows_of(4), in_order()
    assert [len(rows) for rows in batches] == [4, 4, 4]  # not the last single one
    assert len(np.unique(batches)) == 12
    assert [len(rows) for rows in rows_of(99)] == [13]
    assert np.concatenate(whole).tolist() == list(range(13))
    assert batches == rows_of(4) != rows_of(4, epoch=2) != rows_of(4, seed=1)
    monkeypatch.setattr(alasa, "get_world_size", lambda: 2)
    halves = []
    for rank in (0, 1):
        monkeypatch.setattr(alasa, "get_rank", lambda rank=rank: rank)
        assert in_order() == whole[rank::2]  # whole batches
        halves.append(rows_of(4))
    for one, other, both in zip(*halves, batches):
        assert sorted(one + other) == sorted(both)


def test_balance_shows_a_rare_class_as_often_and_never_twice_alike():
    frame = pd.DataFrame({"image": [f"train {i}.png" for i in range(13)]})
    frame["label"] = [0] * 12 + [1]
    data = alasa.AlasaDataset(frame, "train")
    draws = alasa.Draws(data.labels, seed=0, balance=True)
    loader = alasa.make_loader(data, 13, draws)
    shown, views, rare_views = [], [set(), set()], []
    for epoch in range(1, 41):
        draws.epoch = epoch
        for images, labels in loader:
            shown += labels.tolist()
            rare_views.append(len(np.unique(images[labels == 1].numpy(), axis=0)))
            for image, label in zip(images, labels):
                views[label].add(image.numpy().tobytes())
    assert 0.4 < np.mean(shown) < 0.6
    assert np.mean(rare_views) > 3  # of about six draws in one epoch
    assert len(views[0]) > 80 and len(views[1]) == 8


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
    net = alasa.build_model(arch, 1000).net
    alasa.set_frozen(net, True)
    new = {key for key, tensor in net.state_dict().items() if (tensor != 1).any()}
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    assert net.state_dict().keys() == ones.keys()
    assert new == trained and len(new) == 2
    with torch.inference_mode():
        assert net(torch.zeros(1, 3, 224, 224)).shape == (1, 1000)


def test_weights_of_files_are_taken_or_refused_in_a_line(capsys):
    build = alasa.build_model
    plain = torchvision.models.resnet18(num_classes=2).state_dict()
    wrapped = {f"module.{key}": tensor for key, tensor in plain.items()}
    files = {"a.pt": plain, "b.pt": {"state_dict": wrapped, "epoch": 3}}
    files["c.pt"] = {"model": plain, "classes": ["ant", "bee"]}
    for name, content in files.items():
        torch.save(content, name)
        model = build("resnet18", 2, name, class_names=["ant", "bee"])
        assert moved(plain, model.net.state_dict()) == set()
        assert "kept the last layer" in capsys.readouterr().out
    build("resnet18", 2, "c.pt", class_names=["ant", "cat"])
    build("resnet18", 3, "a.pt")
    assert capsys.readouterr().out.count("the last layer, fc, is new") == 2
    refused("a.pt, --arch resnet34: ", build, "resnet34", 2, "a.pt")
    torch.save({"state_dict": plain, "accuracy": np.float64(0.9)}, "numpy.pt")
    torch.save(torchvision.models.resnet18(num_classes=2), "whole.pt")
    for name in ("numpy.pt", "whole.pt"):
        expected = f"{name}: .*holds more than tensors; save its state dict alone"
        refused(expected, build, "resnet18", 2, name)


def test_a_model_scales_pixels_as_its_weights_want_and_is_ready_to_predict():
    pixels = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8)
    for arch in ("resnet18", "efficientnet_v2_l"):
        weights = torchvision.models.get_model_weights(arch).DEFAULT
        wanted = weights.transforms(crop_size=40, resize_size=40)
        with torch.device("meta"):  # without the time to initialise it
            model = alasa.build_model(arch, 2, "none", device="meta")
        scaled = alasa.normalise(pixels, model.mean, model.std)
        assert torch.allclose(scaled, wanted(pixels), atol=1e-5)
    model = alasa.build_model("resnet18", 2, "none")
    assert not any(layer.training for layer in model.modules())
    model.mean, model.std = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
    scaled = alasa.normalise(pixels, model.mean, model.std)
    assert torch.equal(model(pixels), model(scaled))
    assert not torch.equal(model(pixels), model(alasa.normalise(pixels)))
    model.precision = "bf16"
    assert model(pixels).dtype == torch.float32
    assert model.net.double()(scaled.double()).dtype == torch.float64


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


def test_on_a_cpu_depthwise_layers_train_in_float32_and_tiny_images_too():
    model = alasa.build_model("mobilenet_v2", 2, "none")
    depthwise, dense = model.net.features[1].conv[0][0], model.net.features[1].conv[1]
    features = torch.randn(2, 32, 16, 16).bfloat16()
    for layer, in_training, is_exact in (
        (depthwise, True, True),
        (depthwise, False, False),  # where bfloat16 is the faster one
        (dense, True, False),
    ):
        with torch.set_grad_enabled(in_training):
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
    refused("--precision bf16", fit, "--precision bf16 --image-size 31")


# ---------------------------------------------------------------- one epoch


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


# ---------------------------------------------------------------- files


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
    torch.save({"model": {}, "args": {}, "classes": []}, "earlier.pt")
    for path in ("missing.pt", *Path().glob("*.pt")):
        refused(f"{path}: not a checkpoint", alasa.load_checkpoint, path)
    refused("of an earlier version", alasa.load_checkpoint, "earlier.pt")
    refused("holds more than tensors", alasa.build_model, "resnet18", 2, "evil.pt")
    assert not os.path.exists("executed")


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
    assert after.keys() == before.keys()
    assert all(after[name] == before[name] for name in ("best.pt", "last.pt"))
    with open("runs/last.pt", "rb") as reader:  # it sees the old file or the new
        with alasa.atomic_write("runs/last.pt") as file:
            file.write(b"new")
        assert reader.read() == before["last.pt"]


def test_no_batch_keeps_a_workers_file_open():
    for split in ("train", "valid"):
        rows = [pd.read_csv(f"{split}.csv")] * 8
        pd.concat(rows).to_csv(f"{split}.csv", index=False)
    more = "--workers 1 --batch-size 2 --epochs 1"
    assert fork(limited, resource.RLIMIT_NOFILE, 50, more) == 0


# ---------------------------------------------------------------- scripts


def test_importing_alasa_changes_nothing_in_the_process():
    program = """
import random, signal, os, warnings, numpy as np, pandas, sklearn.metrics, torch
import torch.distributed, torchvision.transforms.v2, matplotlib.figure
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


def test_a_script_takes_numbers_that_slow_a_processor_down_for_zero():
    def halve_the_smallest():
        with alasa.as_script():
            smallest = torch.tensor([torch.finfo(torch.float32).tiny])
            assert smallest > 0 and smallest / 2 == 0

    assert fork(halve_the_smallest) == 0


def test_a_mistake_is_one_line_and_leaves_nothing_behind(monkeypatch, capsys):
    monkeypatch.setenv("TORCH_HOME", "/nowhere")
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_, **__: 1 / 0)
    mistakes = {
        "--augment crop --image-size 0": "--augment crop needs an --image-size",
        "--arch inception_v3": "inception_v3 is not supported",
        "--arch fcn_resnet50": "not supported; choose from.*resnet18",
        "--arch vit_b_16 --full-res-stem": "no stem of stride 2",
        "--weights V7": "--weights V7: not a file of weights, nor of .*IMAGENET1K_V1",
        "--weights DEFAULT": "download.pytorch.org.*checkpoints.*--weights FILE or none",
        "--device cuda:7": "--device cuda:7",
        "--resume": "--resume: there is no runs/last.pt; .*--out again",
        "--resume --overwrite": "not allowed with",
        "--image-root /nowhere": "'/nowhere/train 0.png', 'ant'; .*--image-root",
        "--image-column img": "no column 'img'",
        "--valid-csv train.csv": "a training image too",
        "--out train.csv": "File exists: 'train.csv'",
        "--batch-size 1": "1 is not in 2..inf",
    }
    bounds = ["--workers -1", "--epochs 0", "--lr nan", "--label-smoothing 2.0"]
    bounds += ["--seed -1", "--seed 20240101123456789012"]
    mistakes |= dict.fromkeys(bounds, "is not in")
    for more, expected in mistakes.items():
        with pytest.raises((alasa.AlasaError, OSError, SystemExit)) as fault:
            fit(more)
        told = f"{capsys.readouterr().err}{fault.value}"
        assert re.search(expected, told) and len(told.splitlines()) <= 3, more
        assert not os.path.exists("runs")


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
    """Train with a worker, as a script does, and call act() at the second epoch's second
    step; what it returns, if anything, is the loss."""
    calls = itertools.count(1)  # chance, then three steps and two losses an epoch

    def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        value = act() if next(calls) == 8 else None
        return value or nn.functional.cross_entropy(logits, labels)

    os.setsid()  # a group of processes that can be sent a signal
    as_script(partial(fit, "--workers 1 --epochs 4 --overwrite", loss))


def test_a_bad_loss_stops_the_run_and_names_epoch_and_batch(capfd):
    assert fork(train_and_act, lambda: torch.tensor(math.nan)) == 2
    out, err = capfd.readouterr()
    assert re.fullmatch("error: epoch 2, batch 2: the loss became nan; .*\n", err)
    assert len(alasa.load_checkpoint("runs/last.pt")["history"]) == 1
    assert "left out of each epoch: 1, " in out


def test_a_bug_keeps_its_traceback_and_ends_the_workers(capfd, monkeypatch):
    assert fork(train_and_act, lambda: {}["bug"]) == 1
    assert "KeyError: 'bug'" in capfd.readouterr().err
    broken = Mock(side_effect=RuntimeError("a bug"))
    monkeypatch.setattr(alasa, "d4_view", broken)
    assert fork(as_script, partial(fit, "--workers 1 --overwrite")) == 1
    assert "RuntimeError: " in capfd.readouterr().err


def test_a_lost_worker_or_exhausted_shared_memory_is_one_line(runs, capfd):
    def lose():
        multiprocessing.active_children()[0].kill()
        time.sleep(0.5)

    exhaust = partial(limited, resource.RLIMIT_FSIZE, 9999)
    for how in ((exhaust, "--resume --epochs 4 --workers 1"), (train_and_act, lose)):
        assert fork(*how) == 2
        err = capfd.readouterr().err
        assert re.fullmatch("error: .*\n", err) and "--workers 0" in err


def test_ctrl_c_ends_in_a_line_that_says_how_to_go_on(capfd):
    interrupt = partial(os.killpg, 0, signal.SIGINT)  # workers too, as a terminal does
    assert fork(train_and_act, interrupt) == 130
    assert capfd.readouterr().err == "interrupted; --resume goes on\n"
    assert len(alasa.load_checkpoint("runs/last.pt")["history"]) == 1


# ---------------------------------------------------------------- train.py


def test_any_number_of_workers_gives_the_same_bits(reference):
    assert fork(fit, "--epochs 3 --workers 3") == 0
    assert same_weights("runs", reference)


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
        patch.setattr(
            alasa, "describe", Mock(side_effect=["chance", KeyboardInterrupt])
        )
        fit(more)
    shutil.copytree(".", "moved", dirs_exist_ok=True)  # and the data may move
    elsewhere = "--train-csv moved/train.csv --valid-csv moved/valid.csv"
    args = train.parse_args(f"--resume --workers 1 {elsewhere}".split())
    history = train.main(args)  # with the flags that it began with
    assert same_weights("runs", "whole")
    log = pd.read_csv("runs/log.csv")
    assert log["epoch"].tolist() == [1, 2] == [row["epoch"] for row in history]


def test_killed_at_random_moments_and_resumed_ends_bit_identical(reference):
    for seconds in (*np.random.default_rng(0).uniform(0, 0.6, 5), 60):
        more = "--resume" if os.path.exists("runs/last.pt") else "--overwrite"
        fork(fit, f"--epochs 3 {more}", seconds=seconds)
        for file in Path().glob("runs/*.pt"):
            alasa.load_checkpoint(file)
    assert same_weights("runs", reference)
    assert not any(name.endswith(".part") for name in os.listdir("runs"))


def test_the_seed_alone_decides_the_first_weights():
    for out, seed in (("one", 1), ("same", 1), ("other", 2)):
        torch.rand(7)  # another state of the caller's generator
        fit(f"--epochs 1 --lr 0 --head-lr 0 --seed {seed} --out {out}")
    assert same_weights("one", "same")
    assert not same_weights("one", "other")


def test_resuming_needs_one_flag_and_refuses_another_run(runs, capsys):
    before = contents("runs")
    for more in ("--seed 1", "--arch resnet18", "--batch-size 5", "--lr 1"):
        expected = "--resume: .* was .*, now .*--weights runs/best.pt --out again"
        refused(expected, train.parse_args, f"--resume {more}".split())
    shutil.move("runs", "elsewhere")  # as its folder may move
    args = train.parse_args(["--resume", "--out", "elsewhere"])
    assert len(train.main(args)) == 3
    assert "all 3 epochs are done; --resume --epochs N" in capsys.readouterr().out
    assert contents("elsewhere") == before
    Path("elsewhere/best.pt").unlink()
    refused(
        "there is no elsewhere/best.pt",
        train.parse_args,
        ["--resume", "--out", "elsewhere"],
    )


def test_a_run_is_replaced_only_when_asked_and_resumed_with_its_rows():
    fit("--epochs 1")
    before = contents("runs")
    refused("runs holds a run: --resume, --overwrite", fit)
    pd.read_csv("valid.csv")[::-1].to_csv("valid.csv", index=False)
    refused("other names or labels", fit, "--resume --epochs 1")
    assert contents("runs") == before
    shutil.copytree("runs", "before")
    fit("--epochs 1 --seed 1 --overwrite")
    assert not same_weights("runs", "before")  # for another seed


def test_of_two_runs_in_one_folder_the_second_to_save_is_refused():
    def another_run(logits, labels):
        if torch.is_grad_enabled() and not os.path.exists("runs/last.pt"):
            assert fork(fit, "--epochs 1 --seed 1") == 0
            shutil.copytree("runs", "other")
        return nn.functional.cross_entropy(logits, labels)

    refused("another run is saving there", fit, "--epochs 1", another_run)
    assert contents("runs") == contents("other")
    assert sorted(os.listdir("runs")) == RUN_FILES


def test_fine_tuning_in_two_stages_keeps_the_trained_head():
    head = fit("--freeze --out head --head-lr 1e-2")
    best = head[alasa.best_epoch(head, "auc") - 1]
    second = "--weights head/best.pt --freeze 0 --lr 0 --head-lr 0 --epochs 1"
    row = fit(f"{second} --out all")[-1]
    assert row["auc"] == pytest.approx(best["auc"])
    assert row["valid_loss"] == pytest.approx(best["valid_loss"], rel=1e-5)


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


# ---------------------------------------------------------------- predict.py


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


def test_one_folder_is_enough_to_train_and_to_predict_what_was_held_out(capsys):
    make_tree("photos", *[f"{kind}/{kind}{k}.png" for kind in "ab" for k in range(10)])
    flags = f"{TINY} --train-csv photos --epochs 1".replace("--valid-csv valid.csv", "")
    (row,) = train.main(train.parse_args(flags.split()))
    assert "a fifth of each class validates: 4 of 20" in capsys.readouterr().out
    assert sorted(os.listdir("runs")) == sorted([*RUN_FILES, "valid.csv"])
    assert len(run_predict()) == 4
    scores = {"accuracy": row["valid_accuracy"], "auc": row["auc"], "wauc": row["wauc"]}
    assert alasa.describe(scores) in capsys.readouterr().out


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
    errors = table.pop("error").fillna("").str.split(".png").str[0].tolist()
    assert errors == ["", "image 2: valid 1", "image 3: valid 99", ""]
    assert table.isna().sum(axis=1).tolist() == [0, 4, 4, 0]  # all but the image
    assert run_predict("none.png")["label"].tolist() == [""]


def test_predict_scores_what_is_labelled_and_prints_what_is_defined(runs, capsys):
    table = pd.read_csv("valid.csv")
    table["label"] = ["", "dog", *table["label"][2:]]
    table.to_csv("test.csv", index=False)
    p = run_predict("--test-csv", "test.csv")[["p_ant", "p_cat"]].to_numpy()
    out = capsys.readouterr().out
    assert len(p) == 8 and "not scored: 2 images, as '' is no class" in out
    labels = (table["label"][2:] == "cat").to_numpy().astype(int)
    assert alasa.describe(alasa.score(labels, np.log(p[2:]))) in out
    table.assign(label="ant").to_csv("test.csv", index=False)  # placeholders
    run_predict("--test-csv", "test.csv")
    out = capsys.readouterr().out
    assert "accuracy" in out and "nan" not in out


def test_predict_takes_folders_and_mixed_sizes_one_by_one(capfd):
    make_tree("photos", "ant/1.png", "cat/12.png")
    fit("--epochs 1 --image-size 0 --augment d4")
    capfd.readouterr()
    found = run_predict("photos", "valid 0.png")["image"].tolist()
    assert found == ["photos/ant/1.png", "photos/cat/12.png", "valid 0.png"]
    assert "accuracy" in capfd.readouterr().out
    picture(6, (40, 50)).save("big.png")
    assert run_predict_script("photos", "big.png") == 2
    assert "give --image-size, or to predict --batch-size 1" in capfd.readouterr().err
    assert len(run_predict("photos", "big.png", "--batch-size=1")) == 3


def test_predict_refuses_a_bad_output_and_torchrun_before_the_work(runs, monkeypatch):
    predict_to = partial(run_predict, "--test-csv", "valid.csv", "--output")
    refused("its folder cannot be written to", predict_to, "nowhere/p.csv")
    for output in ("./valid.csv", "valid 0.csv", "./runs/best.pt"):
        refused("would replace an input", predict_to, output)
    os.mkfifo("device")
    refused("device: cannot be written: not a file", predict_to, "device")
    refused("test.csv: .*No such file or directory", run_predict)
    monkeypatch.setattr(predict.dist, "is_torchelastic_launched", lambda: True)
    refused("one process: start it without torchrun", predict_to, "new.csv")


def test_tta_of_an_image_and_of_its_quarter_turn_agree():
    fit("--augment d4 --epochs 1")
    picture(7).save("a.png")
    picture(7).transpose(Image.Transpose.ROTATE_90).save("b.png")
    for flags, least, most in (([], 1e-4, 1), (["--tta"], 0, 1e-6)):
        one, other = run_predict("a.png", "b.png", *flags)["score"]
        assert least <= abs(one - other) < most


@pytest.mark.parametrize("count", [2, 200])
def test_pictures_and_words_of_any_classes_are_drawn_in_silence(count, capfd):
    names = ["$x^$", "\u9e1f" * 5, "x" * 190][:count]
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


def run_flags(script: str, flags: str) -> None:
    """Run a command, if it trains, with a small network and images for one epoch."""
    if script == "predict":
        run_predict(*flags.split())
        return
    if "--resume" not in flags:
        flags = f"--image-size 32 {flags} --workers 0 --epochs 1"
    args = train.parse_args(flags.split())
    args.arch = "shufflenet_v2_x0_5"
    train.main(args)


def run_commands(section: str, monkeypatch) -> int:
    arch = "shufflenet_v2_x0_5"
    cache_weights(arch, torchvision.models.get_model(arch).state_dict(), monkeypatch)
    pattern = r"(?m)^    (?:python|torchrun \S+) (train|predict).py ?(.*)$"
    commands = re.findall(pattern, readme(section))
    for command in commands:
        run_flags(*command)
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


def test_the_python_blocks_of_readme_run(capsys):
    args = train.parse_args(["--epochs", "1", "--workers", "0"])
    train.main(args)
    capsys.readouterr()
    label, p = (run_block("In Python", 0), capsys.readouterr().out.split())[1]
    assert label in "0123456789" and 0.1 < float(p) <= 1
    image = alasa.read_image("digits/images/0000.png", 16)
    pixels = alasa.make_transform(16)(image)[None]
    model = alasa.restore_model(alasa.load_checkpoint("runs/best.pt"))
    net = run_block("In Python", 1)["net"]
    assert torch.allclose(net(alasa.normalise(pixels)), model(pixels), atol=1e-5)
    pd.read_csv("digits/train.csv")[:600].to_csv("digits/train.csv", index=False)
    assert run_block("In Python", 2)["row"]["auc"] > 0.5
    assert len(run_block("In Python", 3, "__main__")["table"]) == 300


def test_the_commands_of_readme_run(monkeypatch):
    table = pd.read_csv("train.csv")
    table.columns = ["id", "target"]
    table["id"] = table["id"].str.removesuffix(".png")
    table.to_csv("kaggle.csv", index=False)
    run_block("Your own images", 0)
    folds = [alasa.read_rows(f"valid{fold}.csv")["image"].tolist() for fold in range(5)]
    images = [f"images/train {i}.jpg" for i in range(13)]
    assert sorted(itertools.chain(*folds)) == sorted(images)

    make_tree("photos", *[f"{kind}/{kind}{i}.jpg" for kind in "ab" for i in range(5)])
    make_tree("photos2/train", *[f"{kind}/{i}.jpg" for kind in "ab" for i in range(4)])
    make_tree("photos2/val", "a/8.jpg", "b/9.jpg")
    make_tree("some-folder", "1.jpg")
    make_tree(".", "photo1.jpg", "photo2.jpg")
    shutil.copy("valid.csv", "test.csv")
    assert run_commands("Your own images", monkeypatch) == 9
    rows = re.findall(r"(?m)^\| .* \| `(--.*)` \|$", readme("Your own images"))
    for flags in rows:
        run_flags("train", f"--train-csv train.csv --valid-csv valid.csv {flags}")
    assert len(rows) == 9


def test_the_alaska2_recipe_splits_by_name_and_runs(monkeypatch):
    names = [f"{number:05d}.jpg" for number in range(20)]
    for folder in ("Cover", "JMiPOD", "JUNIWARD", "UERD", "Test"):
        make_tree(folder, *names)
    for command in re.findall("(?m)^    (mkdir .*)$", readme("ALASKA2")):
        subprocess.run(command, shell=True, check=True)
    assert run_commands("ALASKA2", monkeypatch) == 2
    valid = pd.read_csv("runs/valid.csv")
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
        loader = alasa.make_loader(data, 4)
        scores = alasa.evaluate(model, loader, nn.CrossEntropyLoss())
        print(f"{scores}\n", end="", flush=True)


def test_two_processes_score_as_one_resume_and_fail_together(capsys):
    launcher = "-m torch.distributed.run --nproc-per-node=2 --master-port=29511"
    two = script(*launcher.split(), __file__)
    print_scores()
    one = capsys.readouterr().out
    for line in one.splitlines():
        assert two.stdout.count(f"{line}\n") == 2, two
    assert one.count("loss") == 2
    assert two.stdout.count("epoch 1, lr") == 2  # of two runs
    assert same_weights("whole", "runs") and sorted(os.listdir("runs")) == RUN_FILES
    assert two.returncode != 0 and "train.csv row 5: " in two.stderr, two
    assert not os.path.exists("new/last.pt")


if __name__ == "__main__":  # one of torchrun's processes
    print_scores()
    batch_norm = "--arch shufflenet_v2_x0_5 --freeze 1"
    fit(f"{batch_norm} --epochs 3 --out whole")
    fit(f"{batch_norm} --epochs 1")
    alasa.gather_batches([])  # until the first has saved
    fit(f"{batch_norm} --epochs 3 --resume")
    os.truncate("train 4.png", 500)
    with alasa.as_script():
        fit("--out new")
