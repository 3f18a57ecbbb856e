"""``lowdim watermark`` on a small run of images."""

import csv
import json

import numpy as np
import pytest

from lowdim_diffusion import data
from lowdim_diffusion.cli import main

TRAIN = (
    "train --preset digits --model.name mlp --model.width 32 --model.depth 1 --train.steps 60 "
    "--optim.lr 3e-3 --devices 1 --out"
).split()


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    out = tmp_path_factory.mktemp("watermark") / "r"
    assert main([*TRAIN, str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def marked(digits):
    argv = "--num-images 20 --seed 3 --steps 4 --message A --batch-size 16".split()
    assert main(["watermark", "embed", "--run", str(digits), *argv]) == 0
    return digits / "watermark"


@pytest.mark.slow
def test_marked_images_are_written_and_found(digits, marked, tmp_path, capsys):
    """And other images are not."""
    key = json.loads((marked / "key.json").read_text())
    assert key["shape"] == [8, 8, 1] and len(key["values"]) == 29 and key["message"] == "A"
    stored = np.load(marked / "watermarked.npz")["x"]
    assert stored.shape == (20, 8, 8, 1) and stored.dtype == np.uint8
    np.testing.assert_array_equal(data.load(marked / "images").images, stored)
    with open(marked / "table.csv", newline="") as file:
        table = list(csv.DictReader(file))
    x = data.digits().images[:20].astype(float)
    error = np.mean((stored - x) ** 2, axis=(1, 2, 3))
    expected = 10 * np.log10(255**2 / error)
    np.testing.assert_allclose([float(row["psnr"]) for row in table], expected, rtol=1e-3)
    out = tmp_path / "found.json"
    argv = ["watermark", "detect", "--run", str(digits), "--format", "plain"]
    assert main([*argv, "--out", str(out)]) == 0
    assert "20 of 20 marked (p < 0.01)" in capsys.readouterr().out
    rows = json.loads(out.read_text())
    assert {row["marked"] for row in rows} == {"yes"} and rows[0]["message"] == "A"
    same = [float(row["p_value"]) for row in table]
    np.testing.assert_allclose([row["p_value"] for row in rows], same, rtol=1e-2)
    np.savez(tmp_path / "other.npz", x=data.digits().images[100:400])
    argv += ["--images", str(tmp_path / "other.npz"), "--key", str(marked / "key.json")]
    assert main(argv) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert int(last.split()[0]) <= 10 and "of 300 marked" in last


@pytest.mark.slow
def test_a_threshold_from_clean_images_and_a_key_used_again(digits, marked, tmp_path, capsys):
    np.savez(tmp_path / "clean.npz", x=data.digits().images[100:400])
    detect = ["watermark", "detect", "--run", str(digits), "--clean", str(tmp_path / "clean.npz")]
    assert main([*detect, "--max-fpr", "0.01"]) == 0
    assert "20 of 20 marked (cosine > " in capsys.readouterr().out
    argv = ["--images", str(tmp_path / "clean.npz"), "--num-images", "3"]
    argv += ["--key", str(marked / "key.json"), "--out", str(tmp_path / "again")]
    assert main(["watermark", "embed", "--run", str(digits), *argv]) == 0
    assert {p.name for p in (tmp_path / "again").iterdir()} == {
        "images",
        "table.csv",
        "watermarked.npz",
    }
    images = ["--images", str(tmp_path / "again" / "images"), "--max-fpr", "0.001"]
    assert main([*detect, *images]) == 0
    said = capsys.readouterr()
    assert "3 of 3 marked" in said.out and "300 clean images are few" in said.err


def wrong(text, **changes):
    about = json.loads(text)
    about.update(changes)
    return json.dumps(about)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"shape": [8, 9, 1]}, "a key for images of 8x9x1, and the run's are 8x8x1"),
        ({"values": [1.0, 2.0]}, "expected (29,), got (2,)"),
        ({"values": [0.0] * 29}, "its numbers make no sense"),
        ({"format": 2}, "a key of format 2, only 1 is known"),
        ({"pattern": "stars"}, "unknown pattern"),
        ({"message": "much too long"}, "its numbers make no sense"),
        ({"sigma": 1e6}, "noise levels go from"),
        (None, "is not a key"),
    ],
)
def test_keys_that_do_not_fit_are_refused(
    digits, marked, changes, said, tmp_path, capsys, unchecked
):
    text = (marked / "key.json").read_text()
    file = tmp_path / "key.json"
    if changes and "shape" in changes:
        changes |= {
            "radius": 1.0,
            "values": [1.0],
            "pattern": "rings",
            "band": "low",
            "message": "",
        }
    file.write_text("{" if changes is None else wrong(text, **changes))
    assert main(["watermark", "detect", "--run", str(digits), "--key", str(file)]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "expected 'embed' or 'detect', got nothing"),
        (["find"], "expected 'embed' or 'detect', got 'find'"),
        (["embed"], "--run is needed"),
        (["detect", "--run", "RUN", "--max-fpr", "1.5"], "max-fpr"),
        (["detect", "--run", "RUN", "--key", "nowhere.json"], "no key file nowhere.json"),
        (["detect", "--run", "RUN", "--out", "found.txt"], "written as .csv or .json"),
        (["embed", "--run", "RUN", "--images", "nowhere"], "nowhere"),
        (["embed", "--run", "RUN", "--images", "molrg"], "the run was trained on 8x8x1"),
        (["embed", "--run", "RUN", "--sigma", "1000"], "noise levels go from"),
        (["embed", "--run", "RUN", "--radius", "9"], "radius out of range"),
        (["embed", "--run", "RUN", "--channels", "1"], "one or more of 0 .. 0"),
        (["embed", "--run", "RUN", "--message", "long"], "at most 29 bits for this mark, got 32"),
        (["embed", "--run", "RUN", "--strenght", "2"], "did you mean --strength"),
    ],
)
def test_bad_usage_is_one_line(digits, argv, said, capsys):
    assert main(["watermark", *(str(digits) if a == "RUN" else a for a in argv)]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
