"""``lowdim edit`` on a small run of images."""

import pathlib
import shutil

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
    out = tmp_path_factory.mktemp("edit") / "r"
    unset = [f"--model.{name}=None" for name in ("channels", "channel-mult", "num-blocks")]
    unset += ["--model.attention=None", "--model.num-heads=None", "--model.dropout=None"]
    assert main([*TRAIN, str(out), *unset]) == 0
    return out


def edit(run, *argv):
    return main(["edit", "--run", str(run), "--steps", "4", "--num-strengths", "3", *argv])


def test_edit_writes_pictures_page_report_and_numbers(digits, tmp_path, capsys):
    out = tmp_path / "edits"
    argv = "--images 5 9 --box 0 0 4 8 --directions 2 --sigma 1 --strength 0.3 --out".split()
    assert edit(digits, *argv, str(out)) == 0
    said = capsys.readouterr().out
    for name in ("edits.html", "report.html", "edit_0.png", "edit_1.png"):
        assert (out / name).stat().st_size > 1000 and str(out / name) in said
    found = dict(np.load(out / "edits.npz"))
    assert found["images"].shape == (2, 3, 3, 8, 8, 1)  # two directions and a random one
    np.testing.assert_allclose(found["strengths"], [-0.3, 0, 0.3], atol=1e-12)
    np.testing.assert_array_equal(found["originals"], data.digits().floats([5, 9]))
    np.testing.assert_allclose(found["reconstruction"], found["images"][:, 0, 1], atol=1e-5)
    change = found["images"] - found["reconstruction"][:, None, None]
    inside = np.sqrt((change[..., :4, :, :] ** 2).mean((-3, -2, -1)))
    outside = np.sqrt((change[..., 4:, :, :] ** 2).mean((-3, -2, -1)))
    np.testing.assert_allclose(found["inside"], inside, atol=1e-5)
    np.testing.assert_allclose(found["outside"], outside, atol=1e-5)
    # The directions found act on the region, and more than the random one does.
    gain = found["direction_inside"]
    assert (gain[:, 0] > gain[:, 2]).all()
    assert "image 9 (" in (out / "report.html").read_text(encoding="utf-8")
    assert "--box 0 0 4 8" in (out / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_mask_files_and_other_images(digits, tmp_path):
    mask = np.zeros((8, 8), bool)
    mask[2:4] = True
    np.save(tmp_path / "mask.npy", mask)
    np.savez(tmp_path / "own.npz", x=np.full((2, 8, 8), 100, np.uint8))
    argv = ["--mask", str(tmp_path / "mask.npy"), "--data", str(tmp_path / "own.npz")]
    assert edit(digits, *argv, "--images", "1", "--directions", "1") == 0
    found = np.load(digits / "edit" / "edits.npz")
    np.testing.assert_array_equal(found["mask"][..., 0], mask)
    np.testing.assert_allclose(found["originals"], 100 / 127.5 - 1, atol=1e-6)


@pytest.mark.slow
def test_transfer_composition_and_supervision(digits, tmp_path, capsys):
    """Beside the directions found; pictures of a larger edit before it do not stay."""
    (tmp_path / "edit_7.png").write_bytes(b"old")
    (tmp_path / "edit_own.png").write_bytes(b"mine")
    argv = "--images 5 --directions 2 --compose 1 -2 --toward 9 --transfer 17 --max-iters 1".split()
    with pytest.warns(UserWarning, match="image 5 had not converged in 1 iter.*--max-iters"):
        assert edit(digits, *argv, "--out", str(tmp_path)) == 0
    assert "transferred to other images" in capsys.readouterr().out
    pictures = {path.name for path in tmp_path.glob("*.png")}
    assert pictures == {"edit_0.png", "edit_1.png", "edit_own.png"}
    found = dict(np.load(tmp_path / "edits.npz"))
    rows = ["direction 1", "direction 2", "1 − 2", "towards", "random"]
    assert found["rows"].tolist() == rows and found["images"].shape[:3] == (2, 5, 3)
    assert found["index"].tolist() == [5, 17]
    v = found["direction_v"].reshape(2, 5, 64)
    np.testing.assert_allclose(v[0], v[1], atol=1e-6)  # those of image 5, on image 17
    np.testing.assert_allclose(np.linalg.norm(v, axis=-1), 1, atol=1e-5)
    sums = v[0, 0] - v[0, 1]
    np.testing.assert_allclose(v[0, 2], sums / np.linalg.norm(sums), atol=1e-5)
    # The step towards image 9 raises its product with the difference inside the region.
    mask = found["mask"].astype(bool)
    slope = np.where(mask, data.digits().floats([9])[0] - found["originals"][0], 0)
    score = (found["images"][0, 3] * slope).sum((-3, -2, -1))
    assert score[0] < score[1] < score[2]
    assert found["direction_change"][0] > 1e-3 and found["direction_change"][1] == 0


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--images", "5000"], "expected numbers from 0 to 1796"),
        (["--box", "0", "0", "9", "4"], "rows outside the picture"),
        (["--box", "0", "0", "4"], "expected top left height width, got 3 numbers"),
        (["--box", "0", "0", "4", "4", "--mask", "m.png"], "give one"),
        (["--mask", "nowhere.png"], "no such file"),
        (["--sigma", "1000"], "noise levels go from"),
        (["--box", "0", "0", "1", "2", "--directions", "3"], "the entries inside the mask"),
        (["--data", "molrg"], "the run was trained on 8x8x1"),
        (["--strength", "0"], "strength"),
        (["--compose", "1", "5"], "expected numbers of directions, 1 to 4, got 5"),
        (["--transfer", "1797"], "--transfer: expected numbers from 0 to 1796"),
        (["--toward", "-1"], "--toward"),
        (["--direction", "3"], "did you mean --directions"),
    ],
)
def test_bad_input_is_one_line(digits, argv, said, capsys):
    assert edit(digits, *argv) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_a_mask_of_another_size_names_both(digits, tmp_path, capsys):
    np.save(tmp_path / "mask.npy", np.eye(16, dtype=bool))
    argv = ["--mask", str(tmp_path / "mask.npy"), "--directions", "1", "--images", "0"]
    assert edit(digits, *argv) == 2
    error = capsys.readouterr().err
    assert "8x8" in error and "16x16" in error and "--resize-mask" in error
    assert edit(digits, *argv, "--resize-mask") == 0


def test_vectors_have_no_region(tmp_path, capsys):
    out = tmp_path / "r"
    argv = "train --preset molrg --data.num-examples 64 --train.steps 1 --devices 1 --out".split()
    assert main([*argv, str(out)]) == 0
    assert edit(out) == 2
    assert "edits are of images" in capsys.readouterr().err


@pytest.mark.slow
def test_pretrained_networks_are_sampled_and_edited(tmp_path, capsys):
    """A folder of diffusers and a file of EDM in the place of a run."""
    source = pathlib.Path(__file__).resolve().parents[1] / "networks" / "fixtures"
    folder, file = tmp_path / "ddpm", tmp_path / "edm.safetensors"
    shutil.copytree(source / "ddpm-tiny", folder)
    shutil.copy(source / "edm-ddpmpp-tiny" / "model.safetensors", file)
    for path, out in ((folder, folder), (file, tmp_path / "edm")):
        assert main(["sample", "--run", str(path), "--num-samples", "2", "--steps", "2"]) == 0
        assert np.load(out / "samples" / "step0-heun-2-seed0.npz")["x"].shape[0] == 2
    capsys.readouterr()
    assert edit(folder) == 2
    assert "--data is needed" in capsys.readouterr().err
    argv = "--data digits --images 1 --directions 1 --null-rank 1".split()
    assert edit(folder, *argv) == 0
    assert (folder / "edit" / "report.html").is_file()
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"sample_size": 8', '"sample_size": [8, 4]'))
    np.savez(tmp_path / "oblong.npz", x=np.full((1, 8, 4, 3), 100, np.uint8))
    argv = f"--data {tmp_path / 'oblong.npz'} --images 0 --directions 1 --null-rank 1".split()
    assert edit(folder, *argv) == 0
    assert np.load(folder / "edit" / "edits.npz")["images"].shape[3:] == (8, 4, 3)
    assert main(["sample", "--run", str(tmp_path / "net.pkl")]) == 2
    assert "pickle" in capsys.readouterr().err
