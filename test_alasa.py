"""Tests of what README promises: `pytest test_alasa.py`.  No download, no network."""

import contextlib
import itertools
import math
import os
import pickle
import re
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
TINY = "--arch squeezenet1_1 --weights none --precision fp32 --batch-size 4 --epochs 2"
TINY += " --workers 0 --image-size 32"
torch.set_num_threads(1)


def picture(
    seed: int, size: tuple[int, int] = (32, 32), bright: bool = False
) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 128, (*size[::-1], 3), np.uint8)
    return Image.fromarray(noise + np.uint8(100 * bright))


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """A folder of 13 + 8 noise images: "cat" is brighter than "ant"; train.csv, valid.csv."""
    folder = tmp_path_factory.mktemp("data")
    for split, count in (("train", 13), ("valid", 8)):
        rows = [(f"{split} {i}.png", ("ant", "cat")[i % 2]) for i in range(count)]
        for i, (name, label) in enumerate(rows):
            picture(i + 100 * count, bright=label == "cat").save(folder / name)
        pd.DataFrame(rows, columns=["image", "label"]).to_csv(
            folder / f"{split}.csv", index=False
        )
    return folder


def flags(data: Path, out: Path, more: str = "", tiny: str = TINY) -> list[str]:
    csvs = [
        "--train-csv",
        str(data / "train.csv"),
        "--valid-csv",
        str(data / "valid.csv"),
    ]
    return [*csvs, "--out", str(out), *tiny.split(), *more.split()]


def fit(
    data: Path, out: Path, more: str = "", tiny: str = TINY, **kwargs
) -> list[dict]:
    return alasa.fit(train.parse_flags(flags(data, out, more, tiny)), **kwargs)


def script(
    *command: object, cwd: Path = HERE, threads: str = "1", **kwargs
) -> subprocess.CompletedProcess:
    command = [sys.executable, *map(str, command)]
    environment = os.environ | {"OMP_NUM_THREADS": threads}
    return subprocess.run(
        command,
        check=False,
        cwd=cwd,
        env=environment,
        text=True,
        capture_output=True,
        **kwargs,
    )


def assert_same_weights(one: Path, other: Path, names=("best.pt", "last.pt")) -> None:
    for name in names:
        states = [
            alasa.load_checkpoint(folder / name)["model"] for folder in (one, other)
        ]
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def frame_of(*paths: Path, label: int = 0) -> pd.DataFrame:
    return pd.DataFrame({"image": [str(path) for path in paths], "label": label})


# Scores


def test_weighted_auc_of_the_published_cases():
    cases = [
        ("000111", ".1 .2 .3 .7 .8 .9", 1),
        ("0011", ".5 .5 .5 .5", 0.5857142857),
        ("1011010100", ".95 .9 .8 .7 .6 .55 .5 .4 .3 .2", 0.7714285714),
        ("110110111011", ".9 .8 .7 .6 .6 .6 .6 .5 .4 .4 .2 .1", 0.5495590829),
    ]
    for labels, scores, expected in cases:
        labels, scores = (
            np.array(list(map(int, labels))),
            np.array(scores.split(), float),
        )
        assert alasa.weighted_auc(labels, scores) == pytest.approx(expected, abs=1e-9)


def brute_force_wauc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Integrate threshold by threshold, cutting each trapezium at TPR 0.4 by hand."""
    area, x0, y0 = 0.0, 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        x1 = np.mean(scores[labels == 0] >= threshold)
        y1 = np.mean(scores[labels == 1] >= threshold)
        area += (x1 - x0) * (y0 + y1) / 2
        if y1 <= 0.4:
            area += (x1 - x0) * (y0 + y1) / 2
        elif y0 >= 0.4:
            area += (x1 - x0) * 0.4
        else:
            cut = x0 + (x1 - x0) * (0.4 - y0) / (y1 - y0)
            area += (cut - x0) * (y0 + 0.4) / 2 + (x1 - cut) * 0.4
        x0, y0 = x1, y1
    return area / 1.4


def test_scores_equal_independent_oracles_on_random_ties():
    rng = np.random.default_rng(0)
    for trial in range(200):
        labels = np.r_[0, 1, rng.integers(0, 2, rng.integers(1, 40))]
        scores = rng.integers(0, rng.integers(1, 12), len(labels)) / 7
        assert alasa.weighted_auc(labels, scores) == pytest.approx(
            brute_force_wauc(labels, scores)
        )
        pairs = [
            (p > n) + (p == n) / 2
            for p in scores[labels == 1]
            for n in scores[labels == 0]
        ]
        p = np.stack([1 - scores, scores], 1)
        assert alasa.score(labels, p)["auc"] == pytest.approx(np.mean(pairs))
    p = rng.random((50, 4))
    p /= p.sum(1, keepdims=True)
    labels = np.arange(50) % 4
    assert alasa.score(labels, p)["auc"] == pytest.approx(
        roc_auc_score(labels, p, multi_class="ovr")
    )


def test_an_undefined_auc_is_an_error_or_nan_never_a_number():
    for labels, scores in (([0, 1], [0.5, math.nan]), ([1, 1], [0.1, 0.2])):
        with pytest.raises(ValueError):
            alasa.weighted_auc(np.array(labels), np.array(scores))
    assert math.isnan(alasa.score(np.array([1, 1]), np.full((2, 2), 0.5))["auc"])
    assert math.isnan(alasa.score(np.array([0, 1]), np.full((2, 2), math.nan))["wauc"])


def test_the_score_is_p_not_cover_whatever_the_largest_class():
    cover_wins = [0.4, 0.3, 0.3, 0.0]  # P(not Cover) = 0.6: likelier stego than ...
    stego_wins = [0.45, 0.55, 0.0, 0.0]  # ... this one, 0.55
    likely = [0.1, 0.0, 0.0, 0.9]
    p, labels = (
        np.array([stego_wins, cover_wins, likely, likely]),
        np.array([0, 1, 2, 3]),
    )
    assert alasa.score(labels, p)["wauc"] == 1


def test_only_the_first_highest_finite_score_is_best():
    history = [{"auc": value} for value in (math.nan, 0.5, 0.7, math.inf, 0.7)]
    assert alasa.best_epoch(history, "auc") == 2
    assert alasa.best_epoch(history[:1], "auc") == -1


# Images


def test_native_pixels_are_the_decoded_ones_and_d4_only_moves_them(tmp_path):
    picture(1, (24, 24)).save(tmp_path / "a.jpg", quality=90)
    decoded = torch.from_numpy(np.array(Image.open(tmp_path / "a.jpg"))).permute(
        2, 0, 1
    )
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
    rgb, path = picture(2), tmp_path / "image"
    grey16 = Image.fromarray(np.arange(0, 65536, 257, np.uint16).reshape(16, 16))
    grey16.save(path, "PNG")
    levels = np.asarray(alasa.read_image(path))
    assert (levels[..., 0].ravel() == np.arange(256)).all()
    clear = Image.new("RGBA", (2, 2), (10, 20, 30, 0))
    clear.putpixel((1, 1), (10, 20, 30, 255))
    clear.save(path, "PNG")
    assert alasa.read_image(path).getpixel((0, 0)) == (255, 255, 255)
    assert alasa.read_image(path).getpixel((1, 1)) == (10, 20, 30)
    rgb.convert("P").save(path, "PNG", transparency=3)
    assert alasa.read_image(path).mode == "RGB"
    rgb.convert("CMYK").save(path, "TIFF")
    assert (
        np.abs(np.asarray(alasa.read_image(path)).astype(int) - np.asarray(rgb)).max()
        <= 1
    )
    rgb.save(path, "GIF", save_all=True, append_images=[picture(3)])
    first = Image.open(path).convert("RGB")
    assert (np.asarray(alasa.read_image(path)) == np.asarray(first)).all()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    picture(4, (20, 10)).save(path, "PNG", exif=exif)
    upright = np.rot90(np.asarray(picture(4, (20, 10))), -1)
    assert (np.asarray(alasa.read_image(path)) == upright).all()


def test_a_bad_image_is_one_line_that_names_it(tmp_path, monkeypatch):
    picture(5, (64, 64)).save(tmp_path / "whole.jpg")
    whole = (tmp_path / "whole.jpg").read_bytes()
    cuts = {f"cut{i}.jpg": whole[: len(whole) * i // 10] for i in range(10)}
    for name, content in (cuts | {"text.png": b"no image"}).items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(
            alasa.AlasaError, match=f"^.*{name}.*not a readable image.*$"
        ):
            alasa.read_image(str(tmp_path / name))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(alasa.AlasaError, match="bomb"):
        alasa.read_image(str(tmp_path / "whole.jpg"))


def test_a_flipped_bit_never_changes_the_pixels_of_a_png(tmp_path):
    path, whole = tmp_path / "a.png", picture(5).convert("RGBA")
    whole.save(path)
    content = bytearray(path.read_bytes())
    for place in range(40, len(content), 29):  # Pillow alone decodes some of these
        content[place] ^= 2
        path.write_bytes(content)
        content[place] ^= 2
        with contextlib.suppress(alasa.AlasaError):
            assert (np.asarray(alasa.read_image(path)) == np.asarray(picture(5))).all()


def test_mixed_sizes_are_named(tmp_path):
    for name, size in (("a.png", (8, 6)), ("b.png", (9, 6))):
        picture(6, size).save(tmp_path / name)
    dataset = alasa.AlasaDataset(
        frame_of(tmp_path / "a.png", tmp_path / "b.png"), "valid"
    )
    message = dataset[0, [0, 1]][2][0]
    assert re.search("--image-size.*a.png is 8x6.*b.png is 9x6", message)


# CSVs


@pytest.mark.parametrize(
    "content, expected",
    [
        (b"", "needs one column 'image'"),
        (b'image,label\na,"b\n', "not a readable CSV"),
        (b"image,label,label\na,b,c\n", "needs one column 'label'"),
        (b"image,label\n", "no rows"),
        (b"img,label\na,b\n", "needs one column 'image'"),
        (b"image,label\na,b\n ,b\n", "line 3: the image is empty"),
        (b"image,label\na,b\n\nc,\n", "line 4: the label is empty"),
        (b"image,label\na,b\nc\n", "line 3: 1 cells, not 2"),
        (b"image,label\na,b,c\nd,e,f\n", "line 2: 3 cells, not 2"),
        (b'image,label\na,"b\nc"\nd,\n', "line 4: the label is empty"),
        (b"\xff\xfei\x00", "not a readable CSV"),
    ],
)
def test_a_bad_csv_is_one_line_that_names_file_and_line(tmp_path, content, expected):
    (tmp_path / "bad.csv").write_bytes(content)
    with pytest.raises(alasa.AlasaError, match=f"^.*bad.csv.*{expected}.*$"):
        frame = alasa.read_csv(
            str(tmp_path / "bad.csv"), {"image": "image", "label": "label"}
        )
        print(frame)


def test_cells_stay_what_they_are(tmp_path):
    text = '\ufefftarget,id,more\r\nNA,"a, b.png",1\r\n\r\n007,c.png,2\r\n'
    (tmp_path / "odd.csv").write_text(text, newline="")
    frame = alasa.read_csv(
        str(tmp_path / "odd.csv"), {"id": "image", "target": "label"}
    )
    assert frame["label"].tolist() == ["NA", "007"]
    assert frame["path"].tolist() == [
        str(tmp_path / "a, b.png"),
        str(tmp_path / "c.png"),
    ]
    assert frame["place"].str.endswith("line 4").tolist() == [False, True]


def split_frames(data: Path) -> list[pd.DataFrame]:
    columns = {"image": "image", "label": "label"}
    return [
        alasa.read_csv(str(data / f"{name}.csv"), columns)
        for name in ("train", "valid")
    ]


def test_splits_that_would_give_an_undefined_or_flattering_auc_are_refused(
    data, tmp_path, capsys
):
    frames = split_frames(data)
    assert alasa.check_splits(*frames) == ["ant", "cat"]
    frames[0]["label"] = [str(i) for i in range(13)]
    frames[1] = frames[0].iloc[::-1].assign(path=lambda f: data / "valid 0.png")
    assert alasa.check_splits(*frames) == [str(i) for i in range(13)]

    def refused(expected: str, which: int, **columns) -> None:
        frames = split_frames(data)
        frames[which] = frames[which].assign(**columns)
        with pytest.raises(alasa.AlasaError, match=expected):
            alasa.check_splits(*frames)

    refused("two classes", 0, label="ant")
    refused("valid.csv line 2: no training label is 'dog'", 1, label="dog")
    refused("no validation label is 'cat'", 1, label="ant")
    refused(r"train.csv line 2: .*nowhere.*; \.\.\. \(13 in all\)", 0, path="nowhere")
    (tmp_path / "empty").touch()
    refused("missing or empty", 1, path=str(tmp_path / "empty"))
    (tmp_path / "soft.png").symlink_to(data / "train 0.png")
    (tmp_path / "hard.png").hardlink_to(data / "train 0.png")
    for twin in ("soft.png", "hard.png", "../" + tmp_path.name + "/soft.png"):
        refused(
            "is a training image too, .*train.csv line 2", 1, path=str(tmp_path / twin)
        )
    capsys.readouterr()
    (tmp_path / "train 0.png").write_bytes(b"x")
    frames = split_frames(data)
    frames[1].loc[0, "path"] = str(tmp_path / "train 0.png")
    alasa.check_splits(*frames)
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


def test_pretrained_weights_are_torchvisions_and_the_head_is_new(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    for arch in ("resnet18", "densenet121", "squeezenet1_1"):
        plain = torchvision.models.get_model(arch)
        url = torchvision.models.get_model_weights(arch).DEFAULT.url
        torch.save(
            plain.state_dict(), tmp_path / "hub" / "checkpoints" / Path(url).name
        )
        for classes in (5, 1000):
            model, old = alasa.build_model(arch, classes), plain.state_dict()
            new = [
                k for k, v in model.state_dict().items() if not torch.equal(v, old[k])
            ]
            assert {name.rsplit(".", 1)[0] for name in new} in (
                {"fc"},
                {"classifier"},
                {"classifier.1"},
            )
            assert model.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, classes)


@pytest.mark.parametrize(
    "arch",
    [
        "efficientnet_b0",
        "mobilenet_v3_small",
        "vgg11",
        "vit_b_16",
        "swin_t",
        "convnext_tiny",
    ],
)
def test_any_classifier_gets_a_head_of_the_right_size_and_freeze_trains_only_it(arch):
    model = alasa.build_model(arch, 3, "none", freeze=True).eval()
    plain = torchvision.models.get_model(arch, num_classes=3)
    assert model.state_dict().keys() == plain.state_dict().keys()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert [len(p) for p in trained] == [3, 3]
    with torch.inference_mode():
        assert model(torch.zeros(1, 3, 224, 224)).shape == (1, 3)


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (("inception_v3", 2), "inception_v3 is not supported"),
        (("fcn_resnet50", 2), "not supported; choose from.*resnet18"),
        (("resnet18", 2, "V7"), "not a file of weights nor of .*IMAGENET1K_V1"),
        (
            ("resnet18", 2, "DEFAULT"),
            "download.pytorch.org.*checkpoints.*--weights none",
        ),
        (("vit_b_16", 2, "none", False, True), "vit_b_16 has no stem"),
        (("swin_t", 2, "none", False, True), "swin_t has no stem"),
        (("convnext_tiny", 2, "none", False, True), "convnext_tiny has no stem"),
    ],
)
def test_a_model_that_cannot_be_built_is_one_line(
    arguments, expected, tmp_path, monkeypatch
):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_, **__: 1 / 0)
    with pytest.raises(alasa.AlasaError, match=f"^.*{expected}.*$"):
        alasa.build_model(*arguments)


def test_full_res_stem_keeps_every_pixel():
    images = torch.zeros(1, 3, 32, 32)
    resnet = alasa.build_model("resnet18", 2, "none", full_res_stem=True).eval()
    stem = nn.Sequential(resnet.conv1, resnet.bn1, resnet.relu, resnet.maxpool)
    assert stem(images).shape[2:] == (32, 32)
    efficientnet = alasa.build_model(
        "efficientnet_b0", 2, "none", full_res_stem=True
    ).eval()
    assert efficientnet.features[0](images).shape[2:] == (32, 32)


def test_the_first_convolution_sees_the_pixels_in_float32_under_autocast():
    model = alasa.build_model("resnet18", 2, "none").eval()
    images = alasa.normalise(torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8))
    exact = model.conv1(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.conv1(images), exact.bfloat16())


def test_freeze_leaves_the_backbone_and_its_statistics_as_they_were(data, tmp_path):
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "w.pt")
    fit(
        data,
        tmp_path / "run",
        f"--arch resnet18 --weights {tmp_path / 'w.pt'} --freeze",
    )
    old, new = (
        torch.load(tmp_path / "w.pt"),
        alasa.load_checkpoint(tmp_path / "run/last.pt"),
    )
    same = [
        torch.equal(old[key], value)
        for key, value in new["model"].items()
        if key[:2] != "fc"
    ]
    assert all(same) and len(same) == len(old) - 2


# Reproducibility


@pytest.fixture(scope="session")
def reference(data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "reference"
    fit(data, out, "--epochs 3")
    return out


@pytest.mark.parametrize("more", ["", "--workers 1", "--workers 2", "--workers 3"])
def test_weights_are_bit_identical_for_any_number_of_workers(
    data, tmp_path, reference, more
):
    fit(data, tmp_path / "run", f"--epochs 3 {more}")
    assert_same_weights(tmp_path / "run", reference)


def test_another_seed_gives_other_weights(data, tmp_path, reference):
    fit(data, tmp_path / "run", "--epochs 3 --seed 1")
    with pytest.raises(AssertionError):
        assert_same_weights(tmp_path / "run", reference)


def test_resuming_a_finished_run_mends_its_log(data, tmp_path, reference):
    shutil.copytree(reference, tmp_path / "run")
    (tmp_path / "run/log.csv").unlink()
    fit(data, tmp_path / "run", "--epochs 3 --resume")
    assert (tmp_path / "run/log.csv").read_text() == (reference / "log.csv").read_text()


def test_a_plot_that_fails_is_a_warning(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    fit(data, tmp_path / "run", "--epochs 1")
    printed = capsys.readouterr().out
    assert (
        "losses.png was not drawn" in printed and "1 training images sit out" in printed
    )


@pytest.mark.parametrize("stop, workers", [(1, 0), (2, 2)])
def test_a_stopped_and_resumed_run_ends_bit_identical(
    data, tmp_path, reference, stop, workers
):
    fit(data, tmp_path / "run", f"--epochs {stop}")
    history = fit(data, tmp_path / "run", f"--epochs 3 --resume --workers {workers}")
    assert_same_weights(tmp_path / "run", reference)
    log = pd.read_csv(tmp_path / "run/log.csv")
    assert log["epoch"].tolist() == [1, 2, 3] == [row["epoch"] for row in history]


@pytest.mark.parametrize(
    "more",
    [
        "--balance",
        "--precision bf16",
        "--augment crop --optimizer sgd",
        "--label-smoothing 0.1",
    ],
)
def test_resuming_is_exact_with_dropout_and_every_setting(data, tmp_path, more):
    more += " --arch mobilenet_v3_small"
    fit(data, tmp_path / "whole", more)
    fit(data, tmp_path / "parts", f"{more} --epochs 1")
    fit(data, tmp_path / "parts", f"{more} --resume --workers 1")
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")


def test_spawned_workers_give_the_same_bits(data, tmp_path, reference):
    code = "import multiprocessing, sys, train; multiprocessing.set_start_method('spawn'); "
    code += "train.main(sys.argv[1:])"
    more = "--epochs 3 --workers 1"
    done = script("-c", code, *flags(data, tmp_path / "run", more))
    assert done.returncode == 0, done.stderr
    assert_same_weights(tmp_path / "run", reference)


def test_balance_draws_all_classes_equally_often(data):
    frame = split_frames(data)[0].assign(label=[0] * 12 + [1])
    reader = alasa.Reader(alasa.AlasaDataset(frame, "train"), 4, balance=True)
    rows = list(
        itertools.chain(*itertools.chain(*(reader.batches(e) for e in range(100))))
    )
    assert 0.45 < rows.count(12) / len(rows) < 0.55


def test_every_image_once_an_epoch_but_a_last_single_one(data):
    frame = split_frames(data)[0].assign(label=0)
    reader = alasa.Reader(alasa.AlasaDataset(frame, "train"), 4)
    sizes = [len(rows) for rows in reader.batches(1)]
    assert sizes == [4, 4, 4] and len(set(itertools.chain(*reader.batches(1)))) == 12
    assert reader.batches(1) == reader.batches(1) != reader.batches(2)
    valid = alasa.Reader(alasa.AlasaDataset(frame, "valid"), 4)
    assert list(itertools.chain(*valid.batches(1))) == list(range(13))
    assert [len(rows) for rows in alasa.Reader(reader.dataset, 99).batches(1)] == [13]


# Faults


@pytest.mark.parametrize(
    "more, expected",
    [
        ("--augment crop --image-size 32 --arch nonsense", "--arch nonsense"),
        ("--device cuda:7", "--device cuda:7"),
        ("--resume", "last.pt|best.pt"),
        ("--weights missing.pt", "missing.pt"),
        ("--arch vgg11 --image-size 8", "vgg11 cannot take 8x8 images"),
        ("--image-root /nowhere", "missing"),
        ("--image-column img", "needs one column 'img'"),
    ],
)
def test_a_users_mistake_is_one_line_and_leaves_nothing_behind(
    data, tmp_path, more, expected
):
    with pytest.raises(alasa.AlasaError, match=f"^.*({expected}).*$"):
        fit(data, tmp_path / "run", more)
    assert not (tmp_path / "run").exists()


def test_an_unreadable_image_stops_training_and_is_named(data, tmp_path):
    for file in data.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    cut = tmp_path / "train 4.png"
    cut.write_bytes(cut.read_bytes()[:500])
    for more in ("", "--workers 1", "--check-images"):
        with pytest.raises(
            alasa.AlasaError, match="^.*train.csv line 6: .*train 4.png: .*$"
        ):
            fit(tmp_path, tmp_path / "run", more)
        assert not (tmp_path / "run").exists()


def test_a_run_is_neither_overwritten_nor_resumed_by_another(data, tmp_path):
    out = tmp_path / "run"
    fit(data, out, "--epochs 1")
    before = {file: file.read_bytes() for file in out.iterdir()}
    mistakes = [
        "",
        "--resume --seed 1",
        "--resume --arch resnet18",
        "--resume --batch-size 5",
    ]
    for more in mistakes:
        with pytest.raises(alasa.AlasaError, match="--resume"):
            fit(data, out, more)
    table = (data / "valid.csv").read_text()
    try:
        (data / "valid.csv").write_text(table + "\n")
        with pytest.raises(alasa.AlasaError, match="--resume: valid"):
            fit(data, out, "--resume")
    finally:
        (data / "valid.csv").write_text(table)
    assert before == {file: file.read_bytes() for file in out.iterdir()}
    fit(data, out, "--epochs 1 --seed 1 --overwrite")
    assert before[out / "last.pt"] != (out / "last.pt").read_bytes()


def test_a_worse_epoch_leaves_best_and_patience_survives_resuming(
    data, tmp_path, monkeypatch
):
    values, real = iter([0.6, 0.9, 0.5, math.nan, 0.9, 0.9]), alasa.score
    fake = lambda *a: real(*a) | {"wauc": next(values)}
    monkeypatch.setattr(alasa, "score", fake)
    more = "--monitor wauc --early-stop 3 --epochs"
    fit(data, tmp_path / "run", f"{more} 2")
    best = (tmp_path / "run/best.pt").read_bytes()
    history = fit(data, tmp_path / "run", f"{more} 9 --resume")
    assert len(history) == 5  # the second is best, and three did not improve on it
    assert (tmp_path / "run/best.pt").read_bytes() == best


def test_a_loss_that_is_not_finite_stops_and_keeps_what_was_saved(data, tmp_path):
    class Breaks(nn.CrossEntropyLoss):
        calls = 0

        def forward(self, logits, labels):
            self.calls += 1
            return super().forward(logits, labels) * (
                math.nan if self.calls == 6 else 1
            )

    with pytest.raises(
        alasa.AlasaError, match="epoch 2: the loss became nan on .*train"
    ):
        fit(data, tmp_path / "run", criterion=Breaks())
    assert alasa.load_checkpoint(tmp_path / "run/last.pt")["epoch"] == 1


def test_files_are_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    code = "import alasa, resource, pathlib, torch; p = pathlib.Path('file')\n"
    code += "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
    code += (
        "try: alasa.write_file(p, lambda file: torch.save(torch.zeros(9999), file))\n"
    )
    code += "except alasa.AlasaError as error: print(error)"
    done = script(
        "-c", f"import sys; sys.path.append({str(HERE)!r})\n{code}", cwd=tmp_path
    )
    assert re.fullmatch("file: cannot be written: .*\n", done.stdout), done
    assert os.listdir(tmp_path) == ["file"] and path.read_bytes() == b"old"


class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_a_damaged_or_foreign_checkpoint_is_refused_and_its_code_not_run(
    reference, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    whole = (reference / "best.pt").read_bytes()
    torch.save({"model": Evil(), "settings": {}, "classes": []}, tmp_path / "evil.pt")
    Path("pickle.pt").write_bytes(pickle.dumps(Evil()))
    torch.save({"weight": torch.zeros(1)}, "other.pt")
    Path("flipped.pt").write_bytes(
        whole[:60000] + bytes([whole[60000] ^ 1]) + whole[60001:]
    )
    for i in range(10):
        Path(f"cut{i}.pt").write_bytes(whole[: len(whole) * i // 10])
    for path in [*tmp_path.iterdir(), tmp_path / "missing.pt"]:
        with pytest.raises(alasa.AlasaError, match=f"^{path}: not a checkpoint.*$"):
            alasa.load_checkpoint(path)
    assert not os.path.exists("executed")


def test_killed_at_random_moments_and_resumed_ends_bit_identical(
    data, tmp_path, reference
):
    rng, out = np.random.default_rng(0), tmp_path / "run"
    command = [sys.executable, "train.py", *flags(data, out, "--epochs 3")]
    for _ in range(3):
        more = ["--resume"] if (out / "last.pt").exists() else ["--overwrite"]
        process = subprocess.Popen(
            command + more,
            cwd=HERE,
            stdout=subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        process.stdout.readline()
        time.sleep(rng.uniform(0, 1.5))
        process.kill()
        process.wait()
        for file in out.glob("*.pt"):
            alasa.load_checkpoint(file)
    more = "--resume" if (out / "last.pt").exists() else "--overwrite"
    fit(data, out, f"--epochs 3 {more}")
    assert_same_weights(out, reference)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_says_what_was_saved_and_how_to_go_on(
    data, tmp_path, number
):
    command = [
        sys.executable,
        "train.py",
        *flags(data, tmp_path / "run", "--epochs 999 --workers 1"),
    ]
    process = subprocess.Popen(
        command, cwd=HERE, stdout=-1, stderr=-1, text=True, start_new_session=True
    )
    while not (tmp_path / "run/log.csv").exists() and process.poll() is None:
        time.sleep(0.05)
    os.killpg(process.pid, number)  # as Ctrl-C and `timeout` do
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in err
    assert re.search(
        r"interrupted; .*run holds \d+ epochs. To go on: python .*--resume", out
    )
    alasa.load_checkpoint(tmp_path / "run/last.pt")


def test_a_killed_worker_is_one_line_that_says_workers_0(data, tmp_path):
    code = """import multiprocessing, os, sys, threading, time, train
def kill():
    while not os.path.exists(sys.argv[-1]):
        time.sleep(0.05)
    multiprocessing.active_children()[0].kill()
threading.Thread(target=kill, daemon=True).start()
train.main(sys.argv[1:-1])"""
    command = flags(data, tmp_path / "run", "--epochs 9999 --workers 1")
    done = script("-c", code, *command, tmp_path / "run/log.csv", timeout=60)
    assert done.returncode == 2, done
    # Torch notices in whatever runs at that moment, be it the writing of a file.
    assert re.fullmatch("error: .*\n", done.stderr), done


# The scripts


def test_predicting_on_the_validation_images_prints_the_scores_of_the_best_epoch(
    data, tmp_path
):
    fit(data, tmp_path, "--augment d4 --precision bf16")
    log = pd.read_csv(tmp_path / "log.csv", dtype=str)
    best = log.iloc[alasa.best_epoch(log.astype(float).to_dict("records"), "auc")]
    common = ["--checkpoint", tmp_path / "best.pt", "--output", tmp_path / "p.csv"]
    done = script("predict.py", *common, "--test-csv", data / "valid.csv")
    line = (
        f"accuracy {best['valid_accuracy']}, auc {best['auc']}, wauc {best['wauc']}\n"
    )
    assert done.returncode == 0 and line in done.stdout, done
    table = pd.read_csv(tmp_path / "p.csv")
    assert list(table) == ["image", "label", "score", "p_ant", "p_cat"]
    assert table["image"].tolist() == [f"valid {i}.png" for i in range(8)]
    assert (
        (tmp_path / "p.png").stat().st_size
        > 9999
        < (tmp_path / "losses.png").stat().st_size
    )
    model = torchvision.models.squeezenet1_1(num_classes=2)
    model.load_state_dict(torch.load(tmp_path / "best.pt", weights_only=True)["model"])


def test_predict_keeps_the_row_of_a_bad_image_and_exits_with_1(
    data, reference, tmp_path
):
    (tmp_path / "bad.png").write_bytes((data / "valid 0.png").read_bytes()[:300])
    images = [
        data / "valid 1.png",
        tmp_path / "bad.png",
        tmp_path / "gone.png",
        data / "valid 0.png",
    ]
    common = ["--checkpoint", reference / "best.pt", "--output", tmp_path / "p.csv"]
    done = script("predict.py", *common, *images)
    assert done.returncode == 1, done
    table = pd.read_csv(tmp_path / "p.csv")
    assert table["image"].tolist() == [str(image) for image in images]
    assert (
        table["label"].isna().tolist() == table["p_ant"].isna().tolist() == [0, 1, 1, 0]
    )
    assert table["error"].str.contains("bad.png|gone.png").tolist()[1:3] == [True, True]


def test_tta_of_an_image_and_of_its_quarter_turn_agree(reference, tmp_path):
    picture(7).save(tmp_path / "a.png")
    picture(7).transpose(Image.Transpose.ROTATE_90).save(tmp_path / "b.png")
    frame = frame_of(tmp_path / "a.png", tmp_path / "b.png")
    checkpoint = alasa.load_checkpoint(reference / "best.pt")
    one, other = alasa.predict(checkpoint, frame, workers=0)[0]["score"]
    assert abs(one - other) > 1e-4
    one, other = alasa.predict(checkpoint, frame, workers=0, tta=True)[0]["score"]
    assert abs(one - other) < 1e-6


def test_the_demo_runs_and_predicts(tmp_path):
    done = script(HERE / "train.py", "--epochs", 1, cwd=tmp_path, threads="2")
    assert (
        done.returncode == 0
        and "python train.py --train-csv digits/train.csv" in done.stdout
    )
    done = script(HERE / "predict.py", cwd=tmp_path)
    assert re.search(r"accuracy 0\.[89].*, auc 0\.9", done.stdout), done
    assert len(pd.read_csv(tmp_path / "predictions.csv")) == 300
    text = (
        (HERE / "README.md").read_text().split("## In Python")[1].split("## ALASKA2")[0]
    )
    code = f"import sys; sys.path.append({str(HERE)!r})" + "".join(python_of(text))
    assert script("-c", code, cwd=tmp_path).returncode == 0


def python_of(text: str) -> list[str]:
    return re.findall(r"```python(.*?)```", text, re.DOTALL)


def test_the_recipes_of_the_readme_split_by_name_and_give_the_submission(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    folders, classes, submission = (
        python_of((HERE / "README.md").read_text())[:1],
        *python_of((HERE / "README.md").read_text().split("## ALASKA2")[1]),
    )
    for folder in ("Cover", "JMiPOD", "JUNIWARD", "UERD", "Test"):
        Path(folder).mkdir()
        for name in range(20):
            picture(name).save(f"{folder}/{name:05d}.jpg")
    assert script("-c", classes, cwd=tmp_path).returncode == 0
    train, valid = pd.read_csv("train.csv"), pd.read_csv("valid.csv")
    names = [set(split["image"].str.split("/").str[1]) for split in (train, valid)]
    assert len(train) == 72 and len(valid) == 8 and not names[0] & names[1]
    assert set(train[train["label"] == 0]["image"].str.split("/").str[0]) == {"Cover"}
    fit(tmp_path, tmp_path / "runs", "--monitor wauc --epochs 1")
    assert (
        script(HERE / "predict.py", "--test-csv", "test.csv", cwd=tmp_path).returncode
        == 0
    )
    assert script("-c", submission, cwd=tmp_path).returncode == 0
    table = pd.read_csv("submission.csv")
    assert list(table) == ["Id", "Label"] and table["Id"][3] == "00003.jpg"
    for split, label in itertools.product(("train", "val"), ("ant", "bee")):
        Path("photos", split, label).mkdir(parents=True)
        picture(8).save(f"photos/{split}/{label}/a b-c.png")
    assert script("-c", folders[0], cwd=tmp_path).returncode == 0
    assert pd.read_csv("val.csv")["label"].tolist() == ["ant", "bee"]


def torchrun(*command: object, **kwargs) -> subprocess.CompletedProcess:
    launcher = [
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "--master-port=29511",
    ]
    return script(*launcher, *command, **kwargs)


def test_two_processes_get_the_scores_of_one_to_the_bit(data, tmp_path):
    code = """import sys; sys.path.append(sys.argv[1])
import alasa, torch, argparse
s = argparse.Namespace(device="cpu", workers=0, precision="fp32")
alasa.start(s)
torch.manual_seed(0)
model = alasa.build_model("resnet18", 2, "none")
for rows in (5, 1):
    frame = alasa.read_csv(sys.argv[2], {"image": "image", "label": "label"})[:rows]
    frame["label"] = (frame["label"] == "cat").astype(int)
    reader = alasa.Reader(alasa.AlasaDataset(frame, "valid"), 4)
    alasa.say(alasa.infer(model, reader)[1].tolist())
    alasa.say(alasa.evaluate(model, reader, torch.nn.CrossEntropyLoss()))
"""
    (tmp_path / "code.py").write_text(code)
    arguments = [tmp_path / "code.py", HERE, data / "valid.csv"]
    one, two = script(*arguments), torchrun(*arguments)
    assert one.stdout == two.stdout and one.stdout.count("loss") == 2, (one, two)


def test_two_processes_train_together_and_a_fault_in_one_ends_both(data, tmp_path):
    assert torchrun("train.py", *flags(data, tmp_path / "run")).returncode == 0
    log = pd.read_csv(tmp_path / "run/log.csv")
    assert log["epoch"].tolist() == [1, 2]
    history = fit(data, tmp_path / "run", "--resume --epochs 3")
    assert len(history) == 3
    for file in data.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "train 4.png").write_bytes(b"no image")
    done = torchrun("train.py", *flags(tmp_path, tmp_path / "bad"), timeout=60)
    assert done.returncode != 0 and "train.csv line 6" in done.stderr
