"""Tests of what README promises: `pytest test_alasa.py`.  No download, no network."""

import itertools
import math
import multiprocessing
import os
import pickle
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torchvision
from PIL import Image
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.utils.data import DataLoader

import alasa
import train

HERE = Path(__file__).parent
COLUMNS = {"image": "image", "label": "label"}
TINY = "--arch squeezenet1_1 --weights none --precision fp32 --batch-size 4 --epochs 2"
TINY += " --workers 0 --image-size 32"
os.environ["OMP_NUM_THREADS"] = "1"  # of the scripts
torch.set_num_threads(1)


def picture(seed: int, size=(32, 32), bright: bool = False) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 128, (*size[::-1], 3), np.uint8)
    return Image.fromarray(noise + np.uint8(100 * bright))


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """13 + 8 noise images, of which "cat" is brighter than "ant"; train.csv, valid.csv."""
    folder = tmp_path_factory.mktemp("data")
    for split, count in (("train", 13), ("valid", 8)):
        rows = [(f"{split} {i}.png", ("ant", "cat")[i % 2]) for i in range(count)]
        for i, (name, label) in enumerate(rows):
            picture(i + 100 * count, bright=label == "cat").save(folder / name)
        table = pd.DataFrame(rows, columns=["image", "label"])
        table.to_csv(folder / f"{split}.csv", index=False)
    return folder


def copy(data: Path, folder: Path, *broken: str) -> Path:
    shutil.copytree(data, folder)
    for name in broken:
        (folder / name).write_bytes((data / name).read_bytes()[:500])
    return folder


def frame_of(*paths: Path) -> pd.DataFrame:
    return pd.DataFrame({"image": [str(path) for path in paths], "label": 0})


def split_frames(data: Path) -> list[pd.DataFrame]:
    csvs = [f"{data}/{split}.csv" for split in ("train", "valid")]
    return [alasa.read_csv(path, COLUMNS) for path in csvs]


def flags(data: Path, out: Path, more: str = "") -> list[str]:
    csvs = f"--train-csv {data}/train.csv --valid-csv {data}/valid.csv --out {out}"
    return f"{csvs} {TINY} {more}".split()


def fit(data: Path, out: Path, more: str = "", **kwargs) -> list[dict]:
    return alasa.fit(train.parse(flags(data, out, more)), **kwargs)


@pytest.fixture
def run(tmp_path) -> Path:
    """Where a run may go."""
    return tmp_path / "run"


@pytest.fixture(scope="session")
def reference(data, tmp_path_factory) -> Path:
    """A run of three epochs."""
    out = tmp_path_factory.mktemp("runs") / "reference"
    fit(data, out, "--epochs 3")
    return out


def same_weights(one: Path, other: Path) -> bool:
    for name in ("best.pt", "last.pt"):
        states = [alasa.load_checkpoint(run / name)["model"] for run in (one, other)]
        if not all(torch.equal(states[0][key], states[1][key]) for key in states[0]):
            return False
    return states[0].keys() == states[1].keys()


def fork(main, *args: object) -> multiprocessing.Process:
    """Start main(*args) in a process that need not import torch again."""

    def lead() -> None:
        os.setsid()  # a group of its own for signals
        main(*args)

    process = multiprocessing.get_context("fork").Process(target=lead)
    process.start()
    return process


@pytest.fixture
def forked(capfd):
    """Return what main(*args) exits with and prints, on stdout and on stderr."""

    def result(main, *args: object) -> tuple[int, str, str]:
        process = fork(main, *args)
        process.join(60)
        process.kill()
        return process.exitcode, *capfd.readouterr()

    return result


def predict_script(*flags: object) -> None:
    sys.argv = ["predict.py", *map(str, flags)]
    runpy.run_path(f"{HERE}/predict.py", run_name="__main__")


def script(*command: object, cwd: Path = HERE) -> subprocess.CompletedProcess:
    how = {"check": False, "capture_output": True, "text": True, "timeout": 100}
    return subprocess.run([sys.executable, *map(str, command)], cwd=cwd, **how)


def refused(expected: str):
    return pytest.raises(alasa.AlasaError, match=f"^.*({expected}).*$")


# Scores


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


def brute_force_wauc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Integrate threshold by threshold, cutting each trapezium at TPR 0.4 by hand."""
    area, x0, y0 = 0.0, 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        x1 = np.mean(scores[labels == 0] >= threshold)
        y1 = np.mean(scores[labels == 1] >= threshold)
        area += (x1 - x0) * (y0 + y1) / 2
        cut = x1 if y1 <= 0.4 else x0
        if y0 < 0.4 < y1:
            cut = x0 + (x1 - x0) * (0.4 - y0) / (y1 - y0)
        area += (cut - x0) * (y0 + min(y1, 0.4)) / 2 + (x1 - cut) * 0.4
        x0, y0 = x1, y1
    return area / 1.4


def test_scores_equal_independent_oracles_on_random_ties():
    rng = np.random.default_rng(0)
    for trial in range(200):
        labels = np.r_[0, 1, rng.integers(0, 2, rng.integers(1, 40))]
        scores = rng.integers(0, rng.integers(1, 12), len(labels)) / 16
        wauc = alasa.weighted_auc(labels, scores)
        assert wauc == pytest.approx(brute_force_wauc(labels, scores))
        pairs = itertools.product(scores[labels == 1], scores[labels == 0])
        wins = [(p > n) + (p == n) / 2 for p, n in pairs]
        auc = alasa.score(labels.tolist(), np.stack([1 - scores, scores], 1))["auc"]
        assert auc == pytest.approx(np.mean(wins))
    p, labels = rng.dirichlet(np.ones(4), 50), np.arange(50) % 4
    expected = roc_auc_score(labels, p, multi_class="ovr")
    assert alasa.score(labels.tolist(), p)["auc"] == pytest.approx(expected)


def test_an_undefined_auc_is_an_error_or_nan_never_a_number():
    for labels, scores in (([0, 1], [0.5, math.nan]), ([1, 1], [0.1, 0.2])):
        with pytest.raises(ValueError):
            alasa.weighted_auc(np.array(labels), np.array(scores))
    assert math.isnan(alasa.score([1, 1], np.full((2, 2), 0.5))["auc"])
    assert math.isnan(alasa.score([0, 1], np.full((2, 2), math.nan))["wauc"])
    history = [{"auc": value} for value in (math.nan, 0.5, 0.7, math.inf, 0.7)]
    assert alasa.best_epoch(history, "auc") == 2  # the first highest finite one
    assert alasa.best_epoch(history[:1], "auc") == -1


def test_the_score_is_p_not_cover_whatever_the_largest_class():
    cover_wins = [0.4, 0.3, 0.3, 0.0]  # P(not Cover) = 0.6: likelier stego than ...
    stego_wins = [0.45, 0.55, 0.0, 0.0]  # ... this one, 0.55
    p = np.array([stego_wins, cover_wins, [0.1, 0, 0, 0.9], [0.1, 0, 0, 0.9]])
    assert alasa.score([0, 1, 2, 3], p)["wauc"] == 1


# Images


def test_native_pixels_are_the_decoded_ones_and_d4_only_moves_them(tmp_path):
    picture(1, (24, 24)).save(tmp_path / "a.jpg", quality=90)
    pixels = np.array(Image.open(tmp_path / "a.jpg"))
    decoded = torch.from_numpy(pixels).permute(2, 0, 1)
    frame = frame_of(tmp_path / "a.jpg")
    assert torch.equal(alasa.AlasaDataset(frame, "valid")[0][0], decoded)
    assert torch.equal(alasa.AlasaDataset(frame, "test")[0], decoded)
    turned = [torch.rot90(decoded, k, (1, 2)) for k in range(4)]
    eight = turned + [view.flip(2) for view in turned]
    dataset, seen = alasa.AlasaDataset(frame, "train"), set()
    for epoch in range(200):
        image = dataset[epoch, [0]][1][0]
        seen.add(next(k for k in range(8) if torch.equal(image, eight[k])))
    assert seen == set(range(8))
    wide = torch.arange(12).reshape(1, 3, 4)
    views = {tuple(alasa.d4_view(wide, view).flatten().tolist()) for view in range(8)}
    assert len(views) == 4 and alasa.d4_view(wide, 7).shape == wide.shape


def test_every_kind_of_image_is_read_right(tmp_path):
    def read(image: Image.Image, kind: str = "PNG", **options) -> np.ndarray:
        image.save(tmp_path / "image", kind, **options)
        return np.asarray(alasa.read_image(tmp_path / "image")).astype(int)

    grey16 = Image.fromarray(np.arange(0, 65536, 257, np.uint16).reshape(16, 16))
    assert (read(grey16)[..., 2].ravel() == np.arange(256)).all()
    clear = Image.new("RGBA", (2, 2), (10, 20, 30, 0))
    clear.putpixel((1, 1), (10, 20, 30, 255))
    assert read(clear)[[0, 1], [0, 1]].tolist() == [[255] * 3, [10, 20, 30]]
    rgb = picture(2)
    palette = rgb.convert("P")
    first = palette.getpixel((0, 0))
    seen = (np.asarray(palette) != first)[..., None]
    plain = np.where(seen, np.asarray(palette.convert("RGB")), 255)
    assert (read(palette, transparency=first) == plain).all()
    assert np.abs(read(rgb.convert("CMYK"), "TIFF") - np.asarray(rgb)).max() <= 1
    film = read(rgb, "GIF", save_all=True, append_images=[picture(3)])
    assert (film == np.asarray(Image.open(tmp_path / "image").convert("RGB"))).all()
    exif, wide = Image.Exif(), picture(4, (20, 10))
    exif[0x0112] = 6  # to be turned by a quarter
    assert (read(wide, exif=exif) == np.rot90(np.asarray(wide), -1)).all()
    with refused("32-bit"):
        read(Image.fromarray(np.full((2, 2), 1e6, np.float32)), "TIFF")


def test_a_bad_image_is_one_line_that_names_it(tmp_path, monkeypatch):
    picture(5, (64, 64)).save(tmp_path / "whole.jpg")
    whole = (tmp_path / "whole.jpg").read_bytes()
    cuts = {f"cut{i}.jpg": whole[: len(whole) * i // 10] for i in range(10)}
    for name, content in (cuts | {"text.png": b"no image"}).items():
        (tmp_path / name).write_bytes(content)
        with refused(f"{name}: not a readable image"):
            alasa.read_image(tmp_path / name)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with refused("bomb"):
        alasa.read_image(tmp_path / "whole.jpg")


def test_a_flipped_bit_never_changes_the_pixels_of_a_png(tmp_path):
    path, whole, caught = tmp_path / "a.png", picture(5).convert("RGBA"), 0
    whole.save(path)
    content = bytearray(path.read_bytes())
    for place in range(40, len(content), 29):  # Pillow alone decodes some of these
        content[place] ^= 2
        path.write_bytes(content)
        content[place] ^= 2
        try:
            assert (np.asarray(alasa.read_image(path)) == np.asarray(picture(5))).all()
        except alasa.AlasaError:
            caught += 1
    assert caught > 50


def test_mixed_sizes_are_named(tmp_path):
    for name, size in (("a.png", (8, 6)), ("b.png", (9, 6))):
        picture(6, size).save(tmp_path / name)
    dataset = alasa.AlasaDataset(
        frame_of(tmp_path / "a.png", tmp_path / "b.png"), "valid"
    )
    rows, _, errors, _ = dataset[0, [0, 1]]
    expected = "one size: .*a.png is 8x6, .*b.png is 9x6; give --image-size"
    assert not rows and re.search(expected, errors[0]) and errors[0] == errors[1]


# CSVs


BAD_CSVS = {
    b"": "bad.csv: has no rows",
    b"image,label\n": "bad.csv: has no rows",
    b'image,label\na,"b\n': "bad.csv: not a readable CSV",
    b"\xff\xfei\x00": "bad.csv: not a readable CSV",
    b"image,label,label\na,b,c\n": "needs one column 'label'",
    b"img,label\na,b\n": "needs one column 'image', has .*img.* give --image-column",
    b"image,label\na,b\n ,b\n": "bad.csv line 3: the image is empty",
    b"image,label\na,b\n\nc,\n": "bad.csv line 4: the label is empty",
    b"image,label\na,b\nc\n": "bad.csv line 3: not 2 cells",
    b"image,label\na,b,c\nd,e,f\n": "bad.csv line 2: not 2 cells; .*line 3",
    b'image,label\na,"b\nc"\nd,\n': "bad.csv line 4: the label is empty",
}


def test_a_bad_csv_is_one_line_that_names_file_and_line(tmp_path):
    for content, expected in BAD_CSVS.items():
        (tmp_path / "bad.csv").write_bytes(content)
        with refused(expected):
            alasa.read_csv(f"{tmp_path}/bad.csv", COLUMNS)


def test_cells_stay_what_they_are(tmp_path):
    text = '\ufefftarget,id,more\r\nNA,"a, b.png",1\r\n\r\n007,c.png,2\r\n'
    (tmp_path / "odd.csv").write_text(text, newline="")
    columns = {"image": "id", "label": "target"}
    frame = alasa.read_csv(f"{tmp_path}/odd.csv", columns)
    assert frame["label"].tolist() == ["NA", "007"]
    assert frame["path"].tolist() == [f"{tmp_path}/a, b.png", f"{tmp_path}/c.png"]
    assert frame.index.str.endswith("line 4").tolist() == [False, True]
    frame = alasa.read_csv(f"{tmp_path}/odd.csv", columns, "/elsewhere")
    assert frame["path"].tolist()[1] == "/elsewhere/c.png"


def test_splits_with_an_undefined_or_flattering_auc_are_refused(data, tmp_path, capsys):
    train, valid = split_frames(data)
    assert alasa.check_splits(train, valid) == ["ant", "cat"]
    numbers = [str(i) for i in range(12, -1, -1)]
    twins = train.assign(label=numbers, path=f"{data}/valid 0.png")
    assert alasa.check_splits(train.assign(label=numbers), twins) == numbers[::-1]
    with refused("one class only"):
        alasa.check_splits(train.assign(label="ant"), valid)
    with refused("valid.csv line 2: no training label is 'dog'"):
        alasa.check_splits(train, valid.assign(label="dog"))
    with refused("no validation label is 'cat'"):
        alasa.check_splits(train, valid.assign(label="ant"))
    with refused(r"train.csv line 2: .*nowhere.*; \.\.\. \(13 in all\)"):
        alasa.check_splits(train.assign(path="nowhere"), valid)
    (tmp_path / "empty").touch()
    (tmp_path / "soft.png").symlink_to(data / "train 0.png")
    (tmp_path / "hard.png").hardlink_to(data / "train 0.png")
    names = ("soft.png", "hard.png", f"../{tmp_path.name}/soft.png", "empty")
    for twin, fault in zip(names, ["training image too"] * 3 + ["missing or empty"]):
        with refused(f"valid.csv line 2: .*{twin} is .*{fault}"):
            alasa.check_splits(train, valid.assign(path=str(tmp_path / twin)))
    capsys.readouterr()
    (tmp_path / "train 0.png").write_bytes(b"x")
    alasa.check_splits(train, valid.assign(path=str(tmp_path / "train 0.png")))
    assert "1 file names are in both splits" in capsys.readouterr().out


# The model


def test_smoke(data, tmp_path):
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "weights.pt")
    frame, _ = split_frames(data)
    frame["label"] = (frame["label"] == "cat").astype(int)
    loader = DataLoader(alasa.AlasaDataset(frame, "train"), batch_size=4)
    model = alasa.build_model("resnet18", 2, str(tmp_path / "weights.pt"))
    images, labels = next(iter(loader))
    assert images.dtype == torch.uint8 and images.shape == (4, 3, 32, 32)
    loss = nn.CrossEntropyLoss()(model(alasa.normalise(images)), labels)
    assert math.isfinite(loss.item())


@pytest.mark.parametrize("arch", ["resnet18", "densenet121", "squeezenet1_1"])
def test_weights_are_torchvisions_and_the_head_is_new(arch, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    plain = torchvision.models.get_model(arch)
    url = torchvision.models.get_model_weights(arch).DEFAULT.url
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(plain.state_dict(), tmp_path / "hub" / "checkpoints" / Path(url).name)
    for classes in (5, 1000):
        model, old = alasa.build_model(arch, classes), plain.state_dict()
        state = model.state_dict()
        new = [key for key in old if not torch.equal(state[key], old[key])]
        layers = {key.rsplit(".", 1)[0] for key in new}
        assert layers in ({"fc"}, {"classifier"}, {"classifier.1"})
        assert model.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, classes)


ARCHS = "efficientnet_b0 mobilenet_v3_small vgg11 vit_b_16 swin_t convnext_tiny"


@pytest.mark.parametrize("arch", ARCHS.split())
def test_any_classifier_gets_its_head_and_freeze_trains_only_that(arch, monkeypatch):
    for name in ("kaiming_normal_", "kaiming_uniform_", "trunc_normal_", "normal_"):
        monkeypatch.setattr(nn.init, name, lambda x, *_, **__: x)  # it takes seconds
    model = alasa.build_model(arch, 3, "none", freeze=True).eval()
    plain = torchvision.models.get_model(arch, num_classes=3)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert [len(p) for p in model.parameters() if p.requires_grad] == [3, 3]
    with torch.inference_mode():
        assert model(torch.zeros(1, 3, 224, 224)).shape == (1, 3)


BAD_MODELS = {
    ("inception_v3", 2): "inception_v3 is not supported",
    ("fcn_resnet50", 2): "not supported; choose from.*resnet18",
    ("resnet18", 2, "V7"): "--weights V7: not a file of weights nor of .*IMAGENET1K_V1",
    ("resnet18", 2): "download.pytorch.org.*checkpoints.*--weights FILE or none",
    ("vit_b_16", 2, "none", False, True): "vit_b_16 has no stem",
}


def test_a_model_that_cannot_be_built_is_one_line(monkeypatch):
    monkeypatch.setenv("TORCH_HOME", "/nowhere")
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_, **__: 1 / 0)
    for arguments, expected in BAD_MODELS.items():
        with refused(expected):
            alasa.build_model(*arguments)


def test_the_stem_keeps_every_pixel_and_computes_in_float32():
    images = alasa.normalise(torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8))
    how = {"weights": "none", "full_res_stem": True}
    efficientnet = alasa.build_model("efficientnet_b0", 2, **how).eval()
    assert efficientnet.features[0](images).shape[2:] == (32, 32)
    resnet = alasa.build_model("resnet18", 2, **how).eval()
    stem = nn.Sequential(resnet.conv1, resnet.bn1, resnet.relu, resnet.maxpool)
    assert stem(images).shape[2:] == (32, 32)
    exact = resnet.conv1(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(resnet.conv1(images), exact.bfloat16())


def test_freeze_leaves_the_backbone_and_its_statistics_as_they_were(data, tmp_path):
    plain, out = torchvision.models.resnet18().state_dict(), tmp_path / "run"
    torch.save(plain, tmp_path / "w.pt")
    fit(data, out, f"--arch resnet18 --weights {tmp_path}/w.pt --freeze")
    new = alasa.load_checkpoint(out / "last.pt")["model"]
    moved = [key for key in plain if not torch.equal(plain[key], new[key])]
    assert moved == ["fc.weight", "fc.bias"]


# Reproducibility


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_any_number_of_workers_gives_the_same_bits(data, run, reference, workers):
    fit(data, run, f"--epochs 3 --workers {workers}")
    assert same_weights(run, reference)


def test_spawned_workers_give_the_same_bits(data, run, reference):
    multiprocessing.set_start_method("spawn", force=True)
    try:
        fit(data, run, "--epochs 3 --workers 1")
    finally:
        multiprocessing.set_start_method(None, force=True)
    assert same_weights(run, reference)


def test_another_seed_gives_other_bits(data, run, reference):
    fit(data, run, "--epochs 3 --seed 1")
    assert not same_weights(run, reference)


@pytest.mark.parametrize("stop, workers", [(1, 0), (2, 2)])
def test_a_resumed_run_ends_bit_identical(data, run, reference, stop, workers):
    fit(data, run, f"--epochs {stop}")
    history = fit(data, run, f"--epochs 3 --resume --workers {workers}")
    assert same_weights(run, reference)
    log = pd.read_csv(run / "log.csv")
    assert log["epoch"].tolist() == [1, 2, 3] == [row["epoch"] for row in history]


MORE = ["--balance", "--precision bf16", "--augment crop --optimizer sgd"]


@pytest.mark.parametrize("more", [*MORE, "--label-smoothing 0.1"])
def test_resuming_is_exact_with_dropout_and_every_setting(data, tmp_path, more):
    more += " --arch mobilenet_v3_small"
    fit(data, tmp_path / "whole", more)
    fit(data, tmp_path / "parts", f"{more} --epochs 1")
    fit(data, tmp_path / "parts", f"{more} --resume --workers 1")
    assert same_weights(tmp_path / "whole", tmp_path / "parts")


def flat(lists: list[list[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(lists))


def test_every_image_once_an_epoch_but_a_last_single_one_and_balance(data):
    frame = split_frames(data)[0].assign(label=[0] * 12 + [1])
    dataset = alasa.AlasaDataset(frame, "train")
    assert [len(rows) for rows in dataset.plan(1, 4)] == [4, 4, 4]
    assert len(set(flat(dataset.plan(1, 4)))) == 12
    assert dataset.plan(1, 4) == dataset.plan(1, 4) != dataset.plan(2, 4)
    assert flat(alasa.AlasaDataset(frame, "valid").plan(1, 4)) == list(range(13))
    assert [len(rows) for rows in dataset.plan(1, 99)] == [13]
    rows = flat(flat(dataset.plan(epoch, 4, True)) for epoch in range(1, 101))
    assert 0.45 < rows.count(12) / len(rows) < 0.55


def test_two_processes_share_the_batches_of_one(data, monkeypatch):
    frame = split_frames(data)[0].assign(label=0)
    splits = [alasa.AlasaDataset(frame, split) for split in ("train", "valid")]
    (train, valid), shares = [split.plan(1, 4) for split in splits], []
    monkeypatch.setattr(alasa, "WORLD", 2)
    for rank in (0, 1):
        monkeypatch.setattr(alasa, "RANK", rank)
        shares.append([split.plan(1, 4) for split in splits])
    assert [valid[::2], valid[1::2]] == [share[1] for share in shares]  # whole batches
    halves = zip(shares[0][0], shares[1][0])
    assert [sorted(a + b) for a, b in halves] == [sorted(rows) for rows in train]


# Faults


MISTAKES = {
    "--augment crop --image-size 0": "--augment crop needs --image-size",
    "--arch nonsense": "--arch nonsense is not supported",
    "--device cuda:7": "--device cuda:7",
    "--resume": "best.pt: not a checkpoint of train.py: .*No such file",
    "--weights missing.pt": "missing.pt",
    "--arch vit_b_16": "vit_b_16 cannot take such images: .*224",
    "--image-root /nowhere": "missing",
    "--image-column img": "needs one column 'img'",
    "--workers -1": "out of range",
    "--epochs 0": "out of range",
    "--lr nan": "out of range",
    "--label-smoothing 2.0": "out of range",
    "--valid-csv ": "belong together",
}


def test_a_mistake_is_one_line_and_leaves_nothing_behind(data, run, capsys):
    for more, expected in MISTAKES.items():
        if expected in ("out of range", "belong together"):
            with pytest.raises(SystemExit, match="2"):
                train.parse([*flags(data, run), *more.split(" ")])
            assert f"{expected}\n" in capsys.readouterr().err
        else:
            with refused(expected):
                fit(data, run, more)
    assert not run.exists()


def test_an_unreadable_image_stops_training_and_is_named(data, tmp_path, run):
    broken = copy(data, tmp_path / "data", "train 4.png", "valid 1.png")
    for more in ("", "--workers 1"):
        with refused("train.csv line 6: .*train 4.png: not a readable image"):
            fit(broken, run, more)
    assert not run.exists()


def test_check_images_lists_every_bad_one(data, tmp_path, run):
    names = [f"train {i}.png" for i in range(12)]
    with refused(".*".join(f"{name}: not a readable image" for name in names)):
        fit(copy(data, tmp_path / "data", *names), run, "--check-images")


def test_a_run_is_neither_overwritten_nor_resumed_by_another(data, tmp_path, run):
    copied = copy(data, tmp_path / "data")
    fit(copied, run, "--epochs 1")
    before = {file: file.read_bytes() for file in run.iterdir()}
    others = ["--seed 1", "--arch resnet18", "--batch-size 5"]
    for more in ["", *(f"--resume {other}" for other in others)]:
        with refused("--resume"):
            fit(copied, run, more)
    table = pd.read_csv(copied / "valid.csv")
    table[::-1].to_csv(copied / "valid.csv", index=False)
    with refused("--resume: rows was"):
        fit(copied, run, "--resume")
    assert before == {file: file.read_bytes() for file in run.iterdir()}
    fit(copied, run, "--epochs 1 --seed 1 --overwrite")
    assert before[run / "last.pt"] != (run / "last.pt").read_bytes()


def test_a_worse_epoch_leaves_best_and_patience_survives(
    data, run, monkeypatch, capsys
):
    values, real = iter([0.6, 0.9, 0.5, math.nan, 0.9, 0.9]), alasa.score
    monkeypatch.setattr(alasa, "score", lambda *a: real(*a) | {"wauc": next(values)})
    more = "--monitor wauc --early-stop 3 --epochs"
    fit(data, run, f"{more} 2")
    best = (run / "best.pt").read_bytes()
    monkeypatch.setitem(alasa.VERSIONS, "torch", "0.1")
    history = fit(data, run, f"{more} 9 --resume")
    assert len(history) == 5  # the second is best, and three did not improve on it
    assert (run / "best.pt").read_bytes() == best
    begun = f"begun with .*{re.escape(torch.__version__)}"
    assert re.search(begun, capsys.readouterr().out)


def acting(act):
    """A loss that acts at the second epoch's second step, and is what comes of it, if any."""
    calls = itertools.count(1)  # three steps and one evaluation an epoch

    def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        value = act() if next(calls) == 6 else None
        return value or nn.functional.cross_entropy(logits, labels)

    return loss


def test_a_bad_loss_stops_the_run_and_a_bad_plot_warns(data, run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with refused("epoch 2, .*train [0-9]+.png.*: the loss became nan"):
        fit(data, run, criterion=acting(lambda: torch.tensor(math.nan)))
    assert len(alasa.load_checkpoint(run / "last.pt")["history"]) == 1
    printed = capsys.readouterr().out
    assert "warning: losses.png" in printed and "too few for a batch: 1 of" in printed


def limited(size: int, *flags: str) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    train.main([*flags])


def test_a_full_disk_is_one_line_and_leaves_old_files_whole(
    data, run, reference, forked
):
    shutil.copytree(reference, run)
    before = {file: file.read_bytes() for file in run.iterdir()}
    for out, more in ((run, "--resume --epochs 4"), (run / "new", "")):
        code, _, err = forked(limited, 500_000, *flags(data, out, more))
        assert code == 2 and err.count("\n") == 1, err
        assert re.match("error: .*(last|best).pt: cannot be written: .*too large", err)
    after = {file: file.read_bytes() for file in run.iterdir()}
    assert after.keys() == before.keys()  # and no run / "new"
    assert all(after[file] == before[file] for file in after if file.suffix == ".pt")


class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_a_damaged_or_foreign_checkpoint_runs_no_code(reference, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole = (reference / "best.pt").read_bytes()
    flipped = whole[:60000] + bytes([whole[60000] ^ 1]) + whole[60001:]
    contents = {f"cut{i}.pt": whole[: len(whole) * i // 10] for i in range(10)}
    contents |= {"flipped.pt": flipped, "pickle.pt": pickle.dumps(Evil())}
    for name, content in contents.items():
        Path(name).write_bytes(content)
    torch.save({"model": Evil(), "settings": {}, "history": []}, "evil.pt")
    torch.save({"weight": torch.zeros(1)}, "other.pt")
    for path in [*tmp_path.iterdir(), tmp_path / "missing.pt"]:
        with refused(f"{path}: not a checkpoint"):
            alasa.load_checkpoint(path)
    assert not os.path.exists("executed")


def test_killed_at_random_moments_and_resumed_ends_bit_identical(data, run, reference):
    for seconds in (*np.random.default_rng(0).uniform(0, 0.7, 5), 60):
        more = "--resume" if (run / "last.pt").exists() else "--overwrite"
        process = fork(fit, data, run, f"--epochs 3 {more}")
        process.join(seconds)
        process.kill()
        process.join()
        for file in run.glob("*.pt"):
            alasa.load_checkpoint(file)
    assert same_weights(run, reference)


def acting_script(data: Path, out: Path, act) -> None:
    """A script that trains with a worker, and acts meanwhile."""
    alasa.run_script(lambda: fit(data, out, "--workers 1", criterion=acting(act)) and 0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_says_what_was_saved_and_how_to_go_on(
    data, run, number, forked
):
    def interrupt():
        os.killpg(0, number)  # the workers too, as Ctrl-C and `timeout` do

    code, out, err = forked(acting_script, data, run, interrupt)
    assert (code, err) == (130, "")
    assert out.endswith(f"interrupted; {run} holds 1 epochs, --resume goes on\n")
    assert len(alasa.load_checkpoint(run / "last.pt")["history"]) == 1


def test_an_interrupt_that_a_library_swallows_stops_at_the_next_batch(data, run):
    with pytest.raises(KeyboardInterrupt):
        fit(data, run, criterion=acting(alasa.STOP.set))
    alasa.STOP.clear()
    assert len(alasa.load_checkpoint(run / "last.pt")["history"]) == 1


def test_workers_leave_signals_to_the_main_process(data, run):
    def act():
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, signal.SIGINT)
            os.kill(worker.pid, signal.SIGTERM)

    assert len(fit(data, run, "--workers 1 --epochs 4", criterion=acting(act))) == 4


def test_a_lost_worker_or_exhausted_shared_memory_is_one_line(data, run, forked):
    def lose():
        multiprocessing.active_children()[0].kill()
        time.sleep(9)  # torch's handler of the signal ends it at once

    code, _, err = forked(limited, 999, *flags(data, run, "--workers 1"))
    assert code == 2 and not run.exists()
    assert re.fullmatch("error: .*large.*; try --workers 0\n", err)
    code, _, err = forked(acting_script, data, run, lose)
    assert code == 2 and re.fullmatch("error: .*; try --workers 0\n", err), err


# The scripts


def test_predicting_on_the_validation_csv_prints_the_logged_scores(
    data, tmp_path, monkeypatch, forked
):
    seen, real = [], alasa.score
    monkeypatch.setattr(alasa, "score", lambda y, p: seen.append(p) or real(y, p))
    best = alasa.best_epoch(fit(data, tmp_path, "--precision bf16"), "auc")
    files = ["--checkpoint", tmp_path / "best.pt", "--output", tmp_path / "p.csv"]
    code, out, _ = forked(predict_script, *files, "--test-csv", data / "valid.csv")
    log = pd.read_csv(tmp_path / "log.csv", dtype=str).loc[best]
    scores = "accuracy {valid_accuracy}, auc {auc}, wauc {wauc}\n".format(**log)
    assert code == 0 and scores in out
    table = pd.read_csv(tmp_path / "p.csv", dtype=str)
    assert list(table) == ["image", "label", "score", "p_ant", "p_cat"]
    assert (table[["p_ant", "p_cat"]].astype(float).to_numpy() == seen[best]).all()
    assert table["image"].tolist() == [f"valid {i}.png" for i in range(8)]
    for name in ("p.png", "losses.png"):
        assert Image.open(tmp_path / name).size > (999, 400)


def test_predict_keeps_the_row_of_a_bad_image(data, reference, tmp_path, forked):
    broken = copy(data, tmp_path / "data", "valid 1.png")
    images = [broken / f"valid {i}.png" for i in (0, 1, 99, 2)]
    files = ["--checkpoint", reference / "best.pt", "--output", tmp_path / "p.csv"]
    assert forked(predict_script, *files, *images)[0] == 1
    table = pd.read_csv(tmp_path / "p.csv")
    assert table["image"].tolist() == [str(image) for image in images]
    errors = table.pop("error").fillna("").str.split(": not a").str[0].tolist()
    assert errors == ["", f"image 2: {images[1]}", f"image 3: {images[2]}", ""]
    assert table.isna().sum(axis=1).tolist() == [0, 4, 4, 0]  # all but the image
    frame = frame_of(images[3], images[0])
    rows = alasa.predict(alasa.load_checkpoint(reference / "best.pt"), frame)
    assert rows["score"].tolist() == table["score"].tolist()[::-3]


def test_tta_of_an_image_and_of_its_quarter_turn_agree(reference, tmp_path):
    picture(7).save(tmp_path / "a.png")
    picture(7).transpose(Image.Transpose.ROTATE_90).save(tmp_path / "b.png")
    frame = frame_of(tmp_path / "a.png", tmp_path / "b.png")
    checkpoint = alasa.load_checkpoint(reference / "best.pt")
    for tta, least, most in ((False, 1e-4, 1), (True, 0, 1e-6)):
        one, other = alasa.predict(checkpoint, frame, tta=tta)["score"]
        assert least <= abs(one - other) < most


def run_readme(section: str, block: int) -> dict:
    text = (HERE / "README.md").read_text().split(f"## {section}")[1].split("\n## ")[0]
    code = re.findall(r"```python(.*?)```", text, re.DOTALL)[block]
    Path("block.py").write_text(code)
    return runpy.run_path("block.py")


def test_the_demo_and_the_library_block_of_readme_run(tmp_path, monkeypatch):
    done = script(HERE / "train.py", "--epochs", 1, cwd=tmp_path)
    assert done.returncode == 0 and "python train.py --train-csv digits" in done.stdout
    done = script(HERE / "predict.py", cwd=tmp_path)
    assert re.search(r"accuracy 0\.[89].*, auc 0\.9", done.stdout), done
    assert len(pd.read_csv(tmp_path / "predictions.csv")) == 300
    monkeypatch.chdir(tmp_path)
    run_readme("In Python", 0)
    assert len(run_readme("In Python", 1)["table"]) == 300


def test_the_alaska2_recipe_splits_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("Cover", "JMiPOD", "JUNIWARD", "UERD", "Test"):
        Path(folder).mkdir()
        for name in range(20):
            Path(folder, f"{name:05d}.jpg").touch()
    run_readme("ALASKA2", 0)
    train, valid = pd.read_csv("train.csv"), pd.read_csv("valid.csv")
    names = [set(split["image"].str.split("/").str[1]) for split in (train, valid)]
    assert len(train) == 72 and len(valid) == 8 and not names[0] & names[1]
    assert set(train[train["label"] == 0]["image"].str.split("/").str[0]) == {"Cover"}
    pd.read_csv("test.csv").assign(score=0.5).to_csv("predictions.csv", index=False)
    run_readme("ALASKA2", 1)
    table = pd.read_csv("submission.csv")
    assert list(table) == ["Id", "Label"] and table["Id"][3] == "00003.jpg"


def test_the_recipe_for_a_folder_of_class_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for split, label in itertools.product(("train", "val"), ("ant", "bee")):
        Path("photos", split, label).mkdir(parents=True)
        Path("photos", split, label, "a b-c.png").touch()
    run_readme("Your own images", 0)
    frame = alasa.read_csv("val.csv", COLUMNS)
    assert frame["label"].tolist() == ["ant", "bee"]
    assert all(map(os.path.exists, frame["path"]))


def print_scores(csv: str) -> None:
    """Score five images, and one, over all processes."""
    device, _, amp = alasa.start("cpu", "fp32")
    torch.manual_seed(0)
    model, loss = alasa.build_model("resnet18", 2, "none"), nn.CrossEntropyLoss()
    for count in (5, 1):
        frame = alasa.read_csv(csv, COLUMNS)[:count].assign(label=np.arange(count) % 2)
        data = alasa.AlasaDataset(frame, "valid")
        batches = next(alasa.read_ahead(data, [0], device, 0, 4))
        print(alasa.evaluate(model, batches, data.labels, loss, amp), flush=True)


def test_two_processes_score_as_one_to_the_bit_train_together_and_fail_together(
    data, tmp_path, capsys
):
    broken, out = copy(data, tmp_path / "data", "train 4.png"), tmp_path / "run"
    launcher = "-m torch.distributed.run --nproc-per-node=2 --master-port=29511"
    two = script(*launcher.split(), __file__, data, out, broken, tmp_path / "new")
    print_scores(f"{data}/valid.csv")
    one = capsys.readouterr().out
    assert two.stdout.startswith(one) and one.count("loss") == 2, two
    assert two.stdout.count("epoch 1, lr") == 1
    assert sorted(os.listdir(out)) == sorted(alasa.RUN_FILES)
    assert len(fit(data, out, "--resume --epochs 3")) == 3
    assert two.returncode != 0 and "train.csv line 6: " in two.stderr, two
    assert not (tmp_path / "new").exists()


if __name__ == "__main__":  # one of torchrun's processes
    data, out, broken, new = sys.argv[1:]
    print_scores(f"{data}/valid.csv")
    fit(data, out, "--epochs 1")
    train.main(flags(broken, new))
