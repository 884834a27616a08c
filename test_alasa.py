"""Tests of what README promises: `pytest test_alasa.py`.  No download, no network.
Each works in a folder of its own, which holds train.csv, valid.csv and their images."""

import itertools
import math
import multiprocessing
import os
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import time
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
import train

HERE = Path(__file__).parent
SPLITS = ("train", "valid")
COLUMNS = {"image": "image", "label": "label"}
TINY = "--train-csv train.csv --valid-csv valid.csv --arch squeezenet1_1 --weights none"
TINY += " --image-size 32 --batch-size 4 --epochs 2 --workers 0 --precision fp32"
os.environ["OMP_NUM_THREADS"] = "1"  # of the scripts
torch.set_num_threads(1)


def picture(seed: int, size=(32, 32), bright: bool = False) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 128, (*size[::-1], 3), np.uint8)
    return Image.fromarray(noise + np.uint8(100 * bright))


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """13 + 8 noise images, of which "cat" is brighter than "ant"."""
    folder = tmp_path_factory.mktemp("data")
    for split, count in zip(SPLITS, (13, 8)):
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
    settings = train.parse(f"{TINY} {more}".split())
    return alasa.fit(settings, criterion)


@pytest.fixture(scope="session")
def reference(data, tmp_path_factory) -> Path:
    """A run of three epochs."""
    out = tmp_path_factory.mktemp("runs") / "reference"
    csvs = f"--train-csv {data}/train.csv --valid-csv {data}/valid.csv"
    fit(f"--epochs 3 --out {out} {csvs}")
    return out


def same_weights(*runs: str | Path) -> bool:
    for name in ("best.pt", "last.pt"):
        one, other = [alasa.load_checkpoint(f"{run}/{name}")["model"] for run in runs]
        if not all(torch.equal(one[key], other[key]) for key in one | other):
            return False
    return True


def contents(folder: str) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


def refused(expected: str):
    return pytest.raises(alasa.AlasaError, match=f"^.*({expected}).*$")


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
    for trial in range(200):
        labels = np.r_[0, 1, rng.integers(0, 2, rng.integers(1, 40))]
        scores = (rng.integers(0, rng.integers(1, 12), len(labels)) / 16) ** 20
        found = alasa.score(labels.tolist(), np.stack([1 - scores, scores], 1))
        assert found["auc"] == pytest.approx(brute_force_auc(labels, scores, 0))
        assert found["wauc"] == pytest.approx(brute_force_auc(labels, scores, 0.4))
    p, labels = rng.dirichlet(np.ones(4), 50), np.arange(50) % 4
    found = alasa.score(labels.tolist(), p)
    aucs = [brute_force_auc(labels == k, p[:, k], 0) for k in range(4)]
    assert found["auc"] == pytest.approx(np.mean(aucs))
    wauc = brute_force_auc(labels != 0, 1 - p[:, 0], 0.4)  # by P(not Cover) alone
    assert found["wauc"] == pytest.approx(wauc)


def test_an_undefined_auc_is_an_error_or_nan_never_a_number():
    for labels, scores in (([0, 1], [0.5, math.nan]), ([1, 1], [0.1, 0.2])):
        with pytest.raises(ValueError):
            alasa.weighted_auc(np.array(labels), np.array(scores))
    assert math.isnan(alasa.score([1, 1], np.full((2, 2), 0.5))["auc"])
    nothing = alasa.score([0, 1], np.full((2, 2), math.nan))
    assert all(map(math.isnan, nothing.values()))
    for shift in (-99, 0, 99):  # softmax rounds one or the other to 1
        logits = torch.tensor([[0.0, 1, -1], [0, 2, -1], [0, -1, 3]]).double()
        logits[:, 1:] += shift
        assert alasa.score([0, 1, 2], logits.softmax(1).numpy())["wauc"] == 1
    history = [{"auc": value} for value in (math.nan, 0.5, 0.7, math.inf, 0.7)]
    assert alasa.best_epoch(history, "auc") == 2  # the first highest finite one
    assert alasa.best_epoch(history[:1], "auc") == -1


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
        image = dataset[epoch, [0]][1][0]
        seen.add(next(k for k in range(8) if torch.equal(image, eight[k])))
    assert seen == set(range(8))
    wide = torch.arange(12).reshape(1, 3, 4)
    views = {tuple(alasa.d4_view(wide, view).flatten().tolist()) for view in range(8)}
    assert len(views) == 4 and alasa.d4_view(wide, 7).shape == wide.shape


def test_every_kind_of_image_is_read_right():
    def read(image: Image.Image, kind: str = "PNG", **options) -> np.ndarray:
        image.save("image", kind, **options)
        return np.asarray(alasa.read_image("image")).astype(int)

    grey16 = Image.fromarray(np.arange(0, 65536, 257, np.uint16).reshape(16, 16))
    assert (read(grey16)[..., 2].ravel() == np.arange(256)).all()
    clear = Image.new("RGBA", (2, 1), (10, 20, 30, 0))
    clear.putpixel((1, 0), (10, 20, 30, 255))
    assert read(clear).tolist() == [[[255] * 3, [10, 20, 30]]]
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    assert read(palette, transparency=0).tolist() == [[[255] * 3, [40, 50, 60]]]
    rgb = picture(2)
    assert np.abs(read(rgb.convert("CMYK"), "TIFF") - np.asarray(rgb)).max() <= 1
    film = read(rgb, "GIF", save_all=True, append_images=[picture(3)])
    assert (film == np.asarray(Image.open("image").convert("RGB"))).all()
    exif, wide = Image.Exif(), picture(4, (20, 10))
    exif[0x0112] = 6  # to be turned by a quarter
    for kind, how in (("PNG", {"exif": exif}), ("TIFF", {"tiffinfo": {0x0112: 6}})):
        turned = read(wide.convert("RGBA"), kind, **how)
        assert (turned == np.rot90(np.asarray(wide), -1)).all()
    for kind in (np.float32, np.int32):
        with refused("not plain 16 bits"):
            read(Image.fromarray(np.full((2, 2), 9, kind)), "TIFF")


def test_a_bad_image_is_one_line_that_names_it(monkeypatch):
    picture(5, (64, 64)).save("whole.jpg")
    whole = Path("whole.jpg").read_bytes()
    for content in (b"no image", *(whole[: len(whole) * i // 10] for i in range(10))):
        Path("bad.jpg").write_bytes(content)
        with refused("bad.jpg: not a readable image"):
            alasa.read_image("bad.jpg")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with refused("bomb"):
        alasa.read_image("whole.jpg")


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


def test_a_bad_csv_is_one_line_that_names_file_and_line():
    faults = {
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
    for content, expected in faults.items():
        Path("bad.csv").write_bytes(content)
        with refused(expected):
            alasa.read_csv("bad.csv", COLUMNS)


def test_cells_stay_what_they_are():
    Path("sub").mkdir()
    text = '\ufefftarget,id,more\r\nNA,"a, b.png",1\r\n\r\n007,c.png,2\r\n'
    Path("sub/odd.csv").write_text(text, newline="")
    frame = alasa.read_csv("sub/odd.csv", {"image": "id", "label": "target"})
    assert frame["label"].tolist() == ["NA", "007"]
    assert frame["path"].tolist() == ["sub/a, b.png", "sub/c.png"]
    assert frame.index.tolist() == ["sub/odd.csv line 2", "sub/odd.csv line 4"]


def test_splits_with_an_undefined_or_flattering_auc_are_refused(capsys):
    train, valid = [alasa.read_csv(f"{split}.csv", COLUMNS) for split in SPLITS]
    assert alasa.check_splits(train, valid) == ["ant", "cat"]
    numbers = [f"{i:+}" for i in range(6, -7, -1)]
    other = train.assign(label=numbers, path="valid 0.png")
    assert alasa.check_splits(train.assign(label=numbers), other) == numbers[::-1]
    missing = r"train.csv line 2: nowhere is missing.*; \.\.\. \(13 in all\)"
    faults = [
        (train.assign(label="ant"), valid, "one class only"),
        (train, valid.assign(label="dog"), "valid.csv line 2: no training label is"),
        (train, valid.assign(label="ant"), "no validation label is 'cat'"),
        (train.assign(path="nowhere"), valid, missing),
        (train, valid.assign(path="empty"), "valid.csv line 2: empty is .*empty"),
    ]
    Path("empty").touch()
    Path("soft.png").symlink_to("train 0.png")
    Path("hard.png").hardlink_to("train 0.png")
    for twin in ("soft.png", "hard.png", "./train 0.png"):
        expected = f"valid.csv line 2: {twin} is a training image too"
        faults.append((train, valid.assign(path=twin), expected))
    for one, other, expected in faults:
        with refused(expected):
            alasa.check_splits(one, other)
    Path("sub").mkdir()
    shutil.copy("train 0.png", "sub")
    alasa.check_splits(train, valid.assign(path="sub/train 0.png"))
    assert "1 file names are in both splits" in capsys.readouterr().out


ARCHS = "resnet18 densenet121 squeezenet1_1 efficientnet_b0 mobilenet_v3_small alexnet"
ARCHS += " vit_b_16 swin_t convnext_tiny"


@pytest.mark.parametrize("arch", ARCHS.split())
def test_a_new_head_is_all_that_is_not_torchvisions_or_frozen(arch, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", os.getcwd())
    plain = torchvision.models.get_model(arch).state_dict()
    one = torch.ones(())  # expanded, it takes no space in the file
    ones = {key: one.to(old).expand_as(old) for key, old in plain.items()}
    url = torchvision.models.get_model_weights(arch).DEFAULT.url
    Path("hub/checkpoints").mkdir(parents=True)
    torch.save(ones, f"hub/checkpoints/{Path(url).name}")  # as if it were downloaded
    model = alasa.build_model(arch, 1000, freeze=True).eval()
    new = {key for key, tensor in model.state_dict().items() if (tensor != 1).any()}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert model.state_dict().keys() == ones.keys()
    assert new == trained and len(new) == 2
    with torch.inference_mode():
        assert model(torch.zeros(1, 3, 224, 224)).shape == (1, 1000)


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


def test_freeze_leaves_the_backbone_and_its_statistics_as_they_were():
    plain = torchvision.models.resnet18().state_dict()
    torch.save(plain, "weights.pt")
    fit("--arch resnet18 --weights weights.pt --freeze")
    new = alasa.load_checkpoint("runs/last.pt")["model"]
    moved = [key for key in plain if not torch.equal(plain[key], new[key])]
    assert moved == ["fc.weight", "fc.bias"]


@pytest.mark.parametrize("how, workers", [("fork", 0), ("fork", 3), ("forkserver", 1)])
def test_any_number_of_workers_gives_the_same_bits(reference, how, workers):
    def fit_so():
        multiprocessing.set_forkserver_preload(["alasa"])
        multiprocessing.set_start_method(how, force=True)
        fit(f"--epochs 3 --workers {workers}")

    fork(fit_so)
    assert same_weights("runs", reference)


@pytest.mark.parametrize(
    "more",
    [
        "--balance",
        "--precision bf16",
        "--augment crop --optimizer sgd --precision fp16",
    ],
)
def test_a_resumed_run_ends_bit_identical(more):
    more += " --arch mobilenet_v3_small"
    fit(f"{more} --out whole")
    fit(f"{more} --epochs 1")
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


def test_an_epoch_has_each_image_once_in_one_process_or_two(monkeypatch):
    frame = pd.DataFrame({"image": range(13), "label": [0] * 12 + [1]})
    train, valid = [alasa.AlasaDataset(frame, split) for split in SPLITS]
    batches, in_order = train.plan(1, 4), valid.plan(1, 4)
    assert [len(rows) for rows in batches] == [4, 4, 4]  # not the last single one
    assert len(np.unique(batches)) == 12
    assert [len(rows) for rows in train.plan(1, 99)] == [13]
    assert np.concatenate(in_order).tolist() == list(range(13))
    assert batches == train.plan(1, 4) != train.plan(2, 4)
    monkeypatch.setattr(alasa, "WORLD", 2)
    halves = []
    for rank in (0, 1):
        monkeypatch.setattr(alasa, "RANK", rank)
        assert valid.plan(1, 4) == in_order[rank::2]  # whole batches
        halves.append(train.plan(1, 4))
    assert [sorted(a + b) for a, b in zip(*halves)] == [*map(sorted, batches)]


def test_balance_shows_a_rare_class_as_often_and_never_twice_alike():
    frame = pd.DataFrame({"image": [f"train {i}.png" for i in range(13)]})
    data = alasa.AlasaDataset(frame.assign(label=[0] * 12 + [1]), "train")
    epochs = range(1, 41)
    passes = alasa.read_ahead(data, epochs, torch.device("cpu"), 0, 12, True)
    batches = [batch for batches in passes for batch in batches]
    assert all(len(images) == len(labels) == 12 for _, images, labels, _ in batches)
    assert 0.4 < np.mean([labels.tolist() for _, _, labels, _ in batches]) < 0.6
    views = [set(), set()]
    for _, images, labels, _ in batches:
        for image, label in zip(images, labels):
            views[label].add(image.numpy().tobytes())
    assert len(views[0]) > 80 and len(views[1]) == 8


def test_a_mistake_is_one_line_and_leaves_nothing_behind(monkeypatch, capsys):
    monkeypatch.setenv("TORCH_HOME", "/nowhere")
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_, **__: 1 / 0)
    picture(6, (9, 6)).save("valid 3.png")  # for the first of the mistakes
    mistakes = {
        "--image-size 0": "valid 2.png is 32x32, valid 3.png is 9x6; give --image-size",
        "--augment crop --image-size 0": "--augment crop needs --image-size",
        "--arch inception_v3": "inception_v3 is not supported",
        "--arch fcn_resnet50": "not supported; choose from.*resnet18",
        "--arch vit_b_16 --full-res-stem": "vit_b_16 has no stem",
        "--arch vit_b_16": "vit_b_16 cannot take such images: .*224",
        "--weights V7": "--weights V7: not a file of weights nor of .*IMAGENET1K_V1",
        "--weights DEFAULT": "download.pytorch.org.*checkpoints.*--weights FILE or none",
        "--device cuda:7": "--device cuda:7",
        "--resume": "last.pt: not a checkpoint of train.py: .*No such file",
        "--image-root /nowhere": "line 2: /nowhere/train 0.png is missing",
        "--image-column img": "needs one column 'img'",
        "--workers -1": "out of range",
        "--epochs 0": "out of range",
        "--lr nan": "out of range",
        "--label-smoothing 2.0": "out of range",
        "--valid-csv=": "belong together",
    }
    for more, expected in mistakes.items():
        with pytest.raises((alasa.AlasaError, SystemExit)) as fault:
            fit(more)
        told = capsys.readouterr().err or f"{fault.value}\n"
        assert re.fullmatch(f"(usage: .*\n)?.*({expected}).*\n", told)
    assert not os.path.exists("runs")


def test_an_unreadable_image_stops_training_and_is_named():
    names = [f"train {i}.png" for i in range(12)]
    for name in names:
        os.truncate(name, 500)
    one = "train.csv line [0-9]+: train [0-9]+.png: not a readable image"
    every = ".*".join(f"{name}: not a readable image" for name in names)
    for more in ("", "--workers 1", "--check-images"):
        with refused(every if more == "--check-images" else one):
            fit(more)
    assert not os.path.exists("runs")


def test_a_run_is_neither_overwritten_nor_resumed_by_another(reference):
    fit("--epochs 1")
    before = contents("runs")
    others = ["--seed 1", "--arch resnet18", "--batch-size 5"]
    for more in ("", *(f"--resume {other}" for other in others)):
        with refused("--resume"):
            fit(more)
    pd.read_csv("valid.csv")[::-1].to_csv("valid.csv", index=False)
    with refused("--resume: data_hash was"):
        fit("--resume")
    assert contents("runs") == before
    fit("--epochs 3 --seed 1 --overwrite")
    assert not same_weights("runs", reference)  # for another seed


def test_a_worse_epoch_leaves_best_and_patience_survives(monkeypatch, capsys):
    values, real = iter([0.6, 0.9, 0.5, math.nan, 0.9, 0.9]), alasa.score
    monkeypatch.setattr(alasa, "score", lambda *a: real(*a) | {"wauc": next(values)})
    more = "--monitor wauc --early-stop 3 --epochs"
    fit(f"{more} 2")
    best = contents("runs")["best.pt"]
    monkeypatch.setitem(alasa.VERSIONS, "torch", "0.1")
    assert len(fit(f"{more} 9 --resume")) == 5  # three did not improve on the second
    assert contents("runs")["best.pt"] == best
    assert f"begun with {{'torch': '{torch.__version__}'" in capsys.readouterr().out


def train_and_act(act) -> None:
    """Train with a worker, as a script does, and call act() at the second epoch's second
    step; what it returns, if anything, is the loss."""
    calls = itertools.count(1)  # three steps and one evaluation an epoch

    def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        value = act() if next(calls) == 6 else None
        return value or nn.functional.cross_entropy(logits, labels)

    os.setsid()  # a group of processes that can be sent a signal
    alasa.run_script(lambda: fit("--workers 1 --epochs 4 --overwrite", loss) and 0)


def test_a_bad_loss_stops_the_run_and_a_bad_plot_warns(monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert fork(train_and_act, lambda: torch.tensor(math.nan)) == 2
    out, err = capfd.readouterr()
    assert re.fullmatch("error: epoch 2, .*train .*.png: the loss became nan\n", err)
    assert len(alasa.load_checkpoint("runs/last.pt")["history"]) == 1
    assert "warning: losses.png" in out and "too few for a batch: 1 of" in out


def test_a_bug_keeps_its_traceback_and_ends_the_workers(capfd):
    assert fork(train_and_act, lambda: {}["bug"]) == 1
    assert "KeyError: 'bug'" in capfd.readouterr().err


def test_a_run_without_a_finite_score_says_so_and_can_be_resumed(reference, capsys):
    more = "--optimizer sgd --lr 1e18 --batch-size 13 --epochs 1"
    fit(more)
    fit(f"{more} --resume")
    assert capsys.readouterr().out.count("best: none yet\n") == 2
    shutil.copytree(reference, "lost")
    os.remove("lost/best.pt")
    with refused("lost/best.pt: not a checkpoint.*No such file"):
        fit("--resume --out lost")


def test_sgd_survives_a_first_step_that_fp16_skips(monkeypatch):
    garbage = partial(torch.full_like, fill_value=math.inf)
    monkeypatch.setattr(torch, "empty_like", garbage)
    fit("--optimizer sgd --precision fp16")


def limited(size: int, more: str) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    alasa.run_script(lambda: fit(more))


def test_a_full_disk_is_one_line_and_leaves_old_files_whole(reference, capfd):
    shutil.copytree(reference, "runs")
    before = contents("runs")
    for more in ("--resume --epochs 4", "--out new"):
        assert fork(limited, 500_000, more) == 2
        fault = "error: .*/(last|best).pt: cannot be written: .*too large\n"
        assert re.fullmatch(fault, capfd.readouterr().err)
    os.mkfifo("device")
    with refused("device: cannot be written: not a regular file"):
        alasa.write_file("device", bool)
    after = contents("runs")
    assert after.keys() == before.keys() and not os.path.exists("new")
    assert all(after[name] == before[name] for name in ("best.pt", "last.pt"))
    with open("runs/last.pt", "rb") as reader:  # it sees the old file or the new
        alasa.write_file("runs/last.pt", lambda file: file.write(b"new"))
        assert reader.read() == before["last.pt"]


def test_a_lost_worker_or_exhausted_shared_memory_is_one_line(capfd):
    def lose():
        multiprocessing.active_children()[0].kill()
        time.sleep(0.5)  # nothing shall strike here

    def lack_pipes():
        os.pipe = None
        alasa.run_script(lambda: fit("--workers 1"))

    for told, *how in (
        ("cannot start", lack_pipes),
        ("failed.*large", limited, 999, "--workers 1"),
        ("failed", train_and_act, lose),
    ):
        assert fork(*how) == 2
        fault = f"error: the workers {told}.*\n"
        assert re.fullmatch(fault, err := capfd.readouterr().err)
        assert "try --workers 0" in err


def test_an_interrupted_run_says_what_was_saved_and_how_to_go_on(capfd):
    for number in (signal.SIGINT, signal.SIGTERM):  # to the workers too, as Ctrl-C is
        assert fork(train_and_act, partial(os.killpg, 0, number)) == 130
        out, err = capfd.readouterr()
        assert err == "" and "interrupted; epochs in runs for --resume: 1\n" in out
        assert len(alasa.load_checkpoint("runs/last.pt")["history"]) == 1


def test_a_second_ctrl_c_does_not_wait_for_a_batch(capfd):
    def hang():
        while True:
            os.kill(os.getpid(), signal.SIGINT)

    assert fork(train_and_act, hang) == 130
    assert "interrupted; " in capfd.readouterr().out


def test_a_damaged_or_foreign_checkpoint_runs_no_code(reference):
    class Evil:
        def __reduce__(self):
            return os.mkdir, ("executed",)

    whole = contents(reference)["best.pt"]
    flipped = whole[:60000] + bytes([whole[60000] ^ 1]) + whole[60001:]
    cuts = [whole[: len(whole) * i // 10] for i in range(10)]
    for number, content in enumerate([flipped, *cuts]):
        Path(f"{number}.pt").write_bytes(content)
    torch.save({"model": Evil(), "settings": {}, "history": []}, "evil.pt")
    torch.save({"weight": torch.zeros(1)}, "other.pt")
    for path in ("missing.pt", *Path().glob("*.pt")):
        with refused(f"{path}: not a checkpoint"):
            alasa.load_checkpoint(path)
    assert not os.path.exists("executed")


def predict(*flags: object) -> None:
    sys.argv = ["predict.py", *map(str, flags)]
    runpy.run_path(f"{HERE}/predict.py", run_name="__main__")


def test_predicting_on_the_validation_csv_prints_the_logged_scores(monkeypatch, capfd):
    seen, real = [], alasa.score
    monkeypatch.setattr(alasa, "score", lambda y, p: seen.append(p) or real(y, p))
    best = alasa.best_epoch(fit("--precision bf16"), "auc")
    assert fork(predict, "--test-csv=valid.csv") == 0
    log = pd.read_csv("runs/log.csv", dtype=str).loc[best]
    scores = "accuracy {valid_accuracy}, auc {auc}, wauc {wauc}\n".format(**log)
    assert scores in capfd.readouterr().out
    table = pd.read_csv("predictions.csv", dtype=str)
    assert list(table) == ["image", "label", "score", "p_ant", "p_cat"]
    assert (table[["p_ant", "p_cat"]].astype(float).to_numpy() == seen[best]).all()
    assert table["image"].tolist() == [f"valid {i}.png" for i in range(8)]
    for name in ("predictions.png", "runs/losses.png"):
        assert Image.open(name).size > (999, 400)


def test_predict_keeps_the_row_of_a_bad_image(reference):
    os.truncate("valid 1.png", 500)
    images = [f"valid {i}.png" for i in (0, 1, 99, 2)]
    assert fork(predict, f"--checkpoint={reference}/best.pt", *images) == 1
    table = pd.read_csv("predictions.csv")
    assert table["image"].tolist() == images
    errors = table.pop("error").fillna("").str.split(": not a").str[0].tolist()
    assert errors == ["", "image 2: valid 1.png", "image 3: valid 99.png", ""]
    assert table.isna().sum(axis=1).tolist() == [0, 4, 4, 0]  # all but the image


def test_predict_overwrites_no_input_and_says_how_to_read_mixed_sizes(capfd):
    fit("--epochs 1 --image-size 0")
    for name in ("valid.csv", "new.png", "valid 0.csv", "runs/best.pt"):
        assert fork(predict, "--test-csv=valid.csv", f"--output={name}") == 2
        assert "would replace an input, or itself\n" in capfd.readouterr().err
    images = ["valid 1.png", "odd \udcff.png"]
    picture(6, (40, 50)).save(images[1])
    assert fork(predict, *images) == 1
    assert "give --batch-size 1" in capfd.readouterr().out
    assert fork(predict, *images, "--batch-size=1") == 0
    table = pd.read_csv("predictions.csv", encoding_errors="surrogateescape")
    assert table["image"].tolist() == images


def test_tta_of_an_image_and_of_its_quarter_turn_agree(reference):
    picture(7).save("a.png")
    picture(7).transpose(Image.Transpose.ROTATE_90).save("b.png")
    frame = pd.DataFrame({"image": ["a.png", "b.png"]})
    checkpoint = alasa.load_checkpoint(reference / "best.pt")
    for tta, least, most in ((False, 1e-4, 1), (True, 0, 1e-6)):
        one, other = alasa.predict(checkpoint, frame, tta=tta)["score"]
        assert least <= abs(one - other) < most


def run_readme(section: str, block: int) -> dict:
    text = (HERE / "README.md").read_text().split(f"## {section}")[1].split("\n## ")[0]
    Path("block.py").write_text(re.findall(r"(?s)```python(.*?)```", text)[block])
    return runpy.run_path("block.py")


def test_the_demo_and_the_library_block_of_readme_run():
    done = script(HERE / "train.py", "--epochs", 1)
    assert done.returncode == 0 and "python train.py --train-csv digits" in done.stdout
    done = script(HERE / "predict.py")
    assert re.search(r"accuracy 0\.[89].*, auc 0\.9", done.stdout), done
    assert len(pd.read_csv("predictions.csv")) == 300
    run_readme("In Python", 0)
    assert len(run_readme("In Python", 1)["table"]) == 300


def test_the_alaska2_recipe_splits_by_name():
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


def test_the_recipe_for_a_folder_of_class_folders():
    for split, label in itertools.product(("train", "val"), ("ant", "bee")):
        Path("photos", split, label).mkdir(parents=True)
        Path("photos", split, label, "a b-c.png").touch()
    run_readme("Your own images", 0)
    assert pd.read_csv("val.csv")["label"].tolist() == ["ant", "bee"]


def print_scores() -> None:
    """Score five images, and one, over all processes."""
    device, _, amp = alasa.start("cpu", "fp32")
    torch.manual_seed(0)
    model, loss = alasa.build_model("resnet18", 2, "none"), nn.CrossEntropyLoss()
    model.bn1.running_mean += alasa.RANK  # as batch statistics differ by process
    for count in (5, 1):
        frame = pd.DataFrame({"image": [f"valid {i}.png" for i in range(count)]})
        data = alasa.AlasaDataset(frame.assign(label=frame.index % 2), "valid")
        batches = next(alasa.read_ahead(data, [0], device, 0, 4))
        print(alasa.evaluate(model, batches, data.labels, loss, amp), flush=True)


def test_two_processes_score_as_one_to_the_bit_and_fail_together(capsys):
    launcher = "-m torch.distributed.run --nproc-per-node=2 --master-port=29511"
    two = script(*launcher.split(), __file__)
    print_scores()
    one = capsys.readouterr().out
    assert two.stdout.startswith(one) and one.count("loss") == 2, two
    assert two.stdout.count("epoch 1, lr") == 1
    assert sorted(os.listdir("runs")) == sorted(alasa.RUN_FILES)
    assert two.returncode != 0 and "train.csv line 6: " in two.stderr, two
    assert not os.path.exists("new")
    picture(0).save("train 4.png")
    assert len(fit("--resume --epochs 3")) == 3


if __name__ == "__main__":  # one of torchrun's processes
    print_scores()
    save = torch.save  # slowly: rank 1 shall be done before rank 0 has saved anything
    torch.save = lambda *args: (time.sleep(0.5), save(*args))
    fit("--epochs 1")
    os.truncate("train 4.png", 500)
    alasa.run_script(lambda: fit("--out new"))
