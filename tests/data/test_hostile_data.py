"""Broken and hostile files: one clear line each, nothing run, nothing written, memory bounded."""

import gzip
import io
import os
import pathlib
import pickle
import re
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib

import numpy as np
import pytest
import scipy.io
from bombs import MIB, deflated_zeros, zip_bomb
from PIL import Image

from lowdim_diffusion import data

pytestmark = pytest.mark.fault("F33")

GIB = 2**30


def refused(path, message, **options):
    """Load must fail with one clear line that names the file, within 1 GiB."""
    clear, status = pathlib.Path("/proc/self/clear_refs"), pathlib.Path("/proc/self/status")
    if clear.exists():
        clear.write_text("5")  # resets the high-water mark
    with pytest.raises(data.DataError, match=message) as caught:
        data.load(path, **options)
    line = str(caught.value)
    assert line.startswith(str(path)), line
    assert line.isprintable()
    assert len(line) < 700
    if clear.exists():
        now, peak = (
            int(re.search(rf"{k}:\s+(\d+)", status.read_text())[1]) for k in ("VmRSS", "VmHWM")
        )
        assert (peak - now) * 1024 < GIB
    return line


def png(width, height, grey=0):
    """A PNG with an honest header and, whatever its size, rows of zeros packed a thousandfold."""
    chunk = lambda kind, body: (
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    )
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = zlib.compress((b"\0" + bytes([grey]) * width) * min(height, 100))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )


def make_tar(path, files, mode="w:gz"):
    with tarfile.open(path, mode) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def make_zip(path, files):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def gzip_bomb(path, head=b""):
    path.write_bytes(b"\x1f\x8b\x08" + bytes(7) + deflated_zeros(2048, head) + bytes(8))
    return path


# --- paths and unknown kinds --------------------------------------------------------------------


def test_missing_paths(tmp_path):
    refused(tmp_path / "no.npz", "no such file or folder; built in are digits and molrg")
    refused("digit", "no such file or folder; did you mean 'digits'?")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "gone")
    refused(link, "a link that leads nowhere")
    refused("/dev/null", "neither a file nor a folder")


def test_empty_things(tmp_path):
    (tmp_path / "empty.npz").touch()
    refused(tmp_path / "empty.npz", "empty file: expected a folder, zip")
    (tmp_path / "folder").mkdir()
    refused(tmp_path / "folder", "no data found in it: expected pictures .* got no files")
    (tmp_path / "folder" / "notes.txt").write_text("hello")
    refused(tmp_path / "folder", "got files such as notes.txt")
    refused(make_zip(tmp_path / "empty.zip", {}), "no data found in it")
    refused(make_tar(tmp_path / "empty.tar.gz", {}), "no data found in it|unknown kind of file")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"hello, world\n", "unknown kind of file: expected a folder, .* got text"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"\x89HDF\r\n\x1a\n" + bytes(64), "got HDF5 .*; in MATLAB save with -v7"),
        (b"BZh91AY&SY" + bytes(64), "got bzip2; unpack it"),
        (png(4, 4), "got one PNG picture; give the folder that holds the pictures"),
        (bytes(range(200, 256)), "got bytes c8 c9"),
        (b"\x1f\x8b\x08", "truncated"),
        (gzip.compress(b"plain text", mtime=0), "unknown kind of file: .* got text"),
    ],
)
def test_unknown_kinds(tmp_path, content, message):
    path = tmp_path / "file.dat"
    path.write_bytes(content)
    refused(path, message)


def test_unreadable(tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, np.zeros((3, 2)))
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")
    refused(path, "no permission to read it")


# --- IDX ----------------------------------------------------------------------------------------


def idx(shape, values, kind=8):
    return bytes([0, 0, kind, len(shape)]) + b"".join(n.to_bytes(4, "big") for n in shape) + values


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (idx((3, 4, 4), bytes(40)), r"truncated: expected 48 values for sizes \[3, 4, 4\], got 40"),
        (idx((3, 4, 4), bytes(50)), "the header does not fit: expected 48 values, got more"),
        (
            idx((2**32 - 1,) * 3, bytes(50)),
            "too large when decoded: .* got .* GB; its header claims",
        ),
        (idx((60000, 90, 90), bytes(50)), "truncated: expected 486000000 values .* got 50"),
        (idx((0, 4, 4), b""), "empty IDX file"),
        (idx((3, 4, 4), bytes(192), kind=13), "unfit IDX values: expected type 0x08.* got 0xd"),
        (idx((48,), bytes(48)), "not a stack of pictures.*; give the images file"),
        (b"\0\0\x08\x03\0\0", "empty IDX file"),
    ],
)
def test_lying_idx(tmp_path, pack, content, message):
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(pack(content))
    refused(path, message)


def test_truncated_gz_and_bomb_of_idx(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, 4800, np.uint8).tobytes()
    whole = gzip.compress(idx((300, 4, 4), values))
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(whole[: len(whole) // 2])
    refused(path, "truncated: it ends too early; fetch it again")
    path.write_bytes(whole[:2000] + bytes(8) + whole[2008:])
    refused(path, "damaged or unreadable")
    refused(gzip_bomb(path, idx((3, 4, 4), b"")), "more than that")


def test_idx_labels_of_another_set(tmp_path):
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx((3, 2, 2), bytes(12)))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx((4,), bytes(4)))
    with pytest.raises(
        data.DataError, match=r"labels do not match: expected \[3\], got \[4\] labels"
    ):
        data.load(tmp_path)


# --- pickles ------------------------------------------------------------------------------------


class Trap:
    """Pickles to a call that writes a file when it is loaded."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_pickles_with_code_are_not_run(tmp_path, protocol):
    canary = tmp_path / "canary"
    traps = [
        Trap(os.system, f"touch {canary}"),
        Trap(eval, f"open({str(canary)!r}, 'w')"),
        Trap(pathlib.Path.touch, canary),
        {"data": Trap(open, str(canary), "w"), "labels": [0]},
        Trap(np.fromfile, str(canary)),
    ]
    for trap in traps:
        content = pickle.dumps(trap, protocol)
        for path in (
            make_tar(tmp_path / "cifar.tar.gz", {"cifar-10-batches-py/data_batch_1": content}),
            make_zip(tmp_path / "cifar.zip", {"data_batch_1": content}),
        ):
            refused(path, "refused: the pickle asks to run .*; nothing in it was run")
        file = tmp_path / "test_batch"
        file.write_bytes(content)
        refused(file, "the pickle asks to run")
        assert not canary.exists()
    # The trap works where pickles are trusted: the test can fail.
    pickle.loads(pickle.dumps(traps[0], protocol))
    assert canary.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps([1, 2]), "unfit pickle: expected a dictionary, got list"),
        (pickle.dumps({"labels": [1]}), "unfit 'data': expected uint8 .* got NoneType"),
        (
            pickle.dumps({"data": np.zeros((2, 5), np.uint8)}),
            r"unfit 'data': .* got uint8 \[2, 5\]",
        ),
        (pickle.dumps({"data": np.zeros((2, 3072))}), "unfit array in the pickle"),
        (pickle.dumps({"data": np.array([{}, None])}), "unfit array in the pickle"),
        (
            pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [1]}),
            "labels do not match: expected 2 of them, got 1",
        ),
        (
            pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [1, "x"]}),
            "unfit 'labels': expected a list of ints",
        ),
        (
            pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": [-1]}),
            "label out of range|unfit",
        ),
        (pickle.dumps({"data": np.zeros((2, 3072), np.uint8)})[:-400], "damaged pickle"),
        (b"\x80\x04]r\xff\xff\xff\x7f.", "damaged pickle: expected a small memo index"),
        (b"\x80\x05\x96" + (2**45).to_bytes(8, "little") + b".", "damaged pickle"),
        (b"\x80\x04\x8d" + (2**45).to_bytes(8, "little") + b".", "damaged pickle"),
        (b"\x80\x02cnumpy\nndarray\n(J\xff\xff\xff\x7ftR.", "damaged pickle"),
        (b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n(J\xff\xff\xff\x7ftR.", "unfit pickle"),
        (b"\x80\x02P42\n.", "damaged pickle|refused"),
        (b"\x80\x02}\x82\x01R.", "damaged pickle|refused"),
        (b"\x80\x02c_codecs\nencode\nX\x01\0\0\0aX\x05\0\0\0rot13\x86R.", "other than latin1"),
    ],
)
def test_unfit_pickles(tmp_path, content, message):
    path = tmp_path / "data_batch_1"
    path.write_bytes(content)
    if "label out of range" in message:  # a batch alone has no class names: -1 becomes a class
        assert data.load(path).class_names == ("-1",)
        return
    refused(path, message)


def test_a_pickle_cannot_pile_up_memory(tmp_path):
    text = b"a" * 10**6
    push = b"X" + len(text).to_bytes(4, "little") + text
    again = b"c_codecs\nencode\nh\x01h\x02\x86R"
    content = b"\x80\x02](" + push + b"q\x01X\x06\0\0\0latin1q\x02" + again * 5000 + b"e."
    path = tmp_path / "data_batch_1"
    path.write_bytes(content)
    refused(path, "it unfolds to many times its size")


def test_cifar_archive_of_the_wrong_size(tmp_path):
    path = make_tar(tmp_path / "c.tar", {"data_batch_1.bin": bytes(3072)}, "w")
    refused(path, "wrong file size: expected a multiple of 3073 bytes, got 3072")
    bad = {"data_batch_1.bin": bytes([12]) + bytes(3072), "batches.meta.txt": b"a\nb"}
    refused(make_tar(path, bad, "w"), "label out of range: expected 0 to 1, got 12 to 12")


# --- arrays -------------------------------------------------------------------------------------


def npy(header, body=b""):
    header = header.encode() + b"\n"
    return b"\x93NUMPY\x01\0" + len(header).to_bytes(2, "little") + header + body


def dictionary(shape, descr="<f8"):
    return repr({"descr": descr, "fortran_order": False, "shape": shape})


NPY = {
    "objects": (npy(dictionary((2,), "|O"), pickle.dumps([1])), "holds pickled objects"),
    "huge": (
        npy(dictionary((2**40, 4))),
        r"too large when decoded: .* claims shape \[1099511627776",
    ),
    "overflow": (npy(dictionary((2**40, 2**40)), bytes(64)), "too large when decoded"),
    "short": (npy(dictionary((3, 2)), bytes(40)), "expected 48 bytes for shape .*, got 40"),
    "long": (npy(dictionary((3, 2)), bytes(50)), "expected 48 bytes for shape .*, got 50"),
    "negative": (npy(dictionary((-3, 2)), bytes(48)), "truncated or damaged|damaged .npy header"),
    "code": (npy("__import__('os').system('touch canary')"), "damaged .npy header"),
    "strings": (npy(dictionary((2,), "<U3"), bytes(24)), "unfit dtype: expected real numbers"),
    "record": (npy(dictionary((2,), [("a", "<f8")]), bytes(16)), "unfit dtype"),
    "version": (b"\x93NUMPY\x07\0" + bytes(40), "unfit .npy version|damaged .npy header"),
    "deep": (npy("(" * 60000), "damaged .npy header"),
    "nothing": (b"\x93NUMPY", "damaged .npy header|truncated"),
}


@pytest.mark.parametrize("kind", NPY)
@pytest.mark.parametrize("packed", [False, True])
def test_hostile_arrays(tmp_path, monkeypatch, kind, packed):
    monkeypatch.chdir(tmp_path)
    content, message = NPY[kind]
    path = tmp_path / ("x.npz" if packed else "x.npy")
    if packed:
        make_zip(path, {"x.npy": content})
    else:
        path.write_bytes(content)
    refused(path, message)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_values_that_are_no_numbers(tmp_path):
    path = tmp_path / "x.npy"
    for bad in (np.nan, np.inf, -np.inf):
        np.save(path, np.array([[0, 1], [bad, 3], [4, bad]]))
        refused(path, "NaN or infinity in 2 of 3 examples, first in number 1; drop or repair them")


def test_npz_without_the_right_names(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, weights=np.zeros(3), bias=np.zeros(3))
    refused(path, "no examples: expected an array named x, images or data, got weights, bias")
    np.savez(path, x=np.zeros((3, 2)), y=np.zeros(4))
    refused(path, r"labels do not match the examples: expected \[3\], got \[4\]")


def test_npz_bomb_and_damage(tmp_path):
    path = tmp_path / "x.npz"
    zip_bomb(path, "x.npy", 2048, npy(dictionary((2**21, 1024), "|u1")))
    assert path.stat().st_size < 4 * 2**20
    refused(path, "too large when decoded: expected at most 537 MB, got 2.15 GB; .* max_bytes=")
    np.savez(path, x=np.random.default_rng(0).normal(size=(300, 5)))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refused(path, "damaged or unreadable|no data found")
    path.write_bytes(whole[:3000] + bytes([whole[3000] ^ 1]) + whole[3001:])
    refused(path, "damaged or unreadable .*CRC")


def test_pytorch_files(tmp_path):
    path = make_zip(tmp_path / "model.pt", {"archive/data.pkl": b"x", "archive/data/0": b"y"})
    refused(path, "a PyTorch file, which is a program")


def test_hostile_mat(tmp_path):
    path = tmp_path / "x.mat"
    scipy.io.savemat(path, {"fea": np.zeros((9, 16)), "gnd": np.zeros((3, 1))}, do_compression=True)
    refused(path, r"labels do not match the examples: expected \[9\], got \[3, 1\]")
    whole = path.read_bytes()
    path.write_bytes(whole[:150])
    refused(path, "truncated|damaged")
    path.write_bytes(whole[:140] + bytes(20) + whole[160:])
    refused(path, "damaged|cannot be read")
    packed = b"\x78\xda" + deflated_zeros(1024)
    tag = struct.pack("<II", 15, len(packed))
    path.write_bytes(whole[:128] + tag + packed)
    refused(path, "too large when decoded", max_bytes=2**28)
    inner = zlib.compress(struct.pack("<II", 14, 2**32 - 8) + bytes(64))
    path.write_bytes(whole[:128] + struct.pack("<II", 15, len(inner)) + inner)
    refused(path, "damaged|cannot be read|no arrays")
    scipy.io.savemat(path, {"other": np.zeros(3), "words": "text"})
    refused(path, "no examples: expected an array named x, images or data, got other, words")
    scipy.io.savemat(path, {"x": {"a": 1}})
    refused(path, "no arrays in it|no examples|unfit")


# --- archives and pictures ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["../../evil.png", "/tmp/evil.png", "a/../../evil.png", "C:\\evil.png"]
)
def test_names_that_point_outside(tmp_path, name):
    inside = tmp_path / "deep" / "er"
    inside.mkdir(parents=True)
    files = {"a.png": png(4, 4), name: png(4, 4)}
    refused(make_tar(inside / "x.tar.gz", files), "points out of the archive")
    refused(make_zip(inside / "x.zip", files), "points out of the archive")
    assert not list(tmp_path.rglob("evil*"))


def test_links_in_archives_are_not_followed(tmp_path):
    (tmp_path / "secret.png").write_bytes(png(4, 4, grey=99))
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            info = tarfile.TarInfo(f"{kind.decode()}.png")
            info.type, info.linkname = kind, str(tmp_path / "secret.png")
            tar.addfile(info)
    refused(path, "no data found in it")


def test_tar_bombs(tmp_path):
    header = tarfile.TarInfo("data_batch_1")
    header.size = 2**31
    refused(
        gzip_bomb(tmp_path / "a.tar.gz", header.tobuf()), "too large when decoded: .* got 2.15 GB"
    )
    long_header = tarfile.TarInfo("x")
    long_header.size, long_header.type = 2**31, tarfile.XHDTYPE  # attributes of 2 GiB
    path = gzip_bomb(tmp_path / "b.tar.gz", long_header.tobuf())
    refused(path, "damaged or unreadable .*a header claims 2147483648 bytes")


def test_damaged_tar(tmp_path):
    files = {f"{i}.png": os.urandom(5000) for i in range(3)}
    path = make_tar(tmp_path / "x.tar.gz", files)
    whole = path.read_bytes()
    path.write_bytes(whole[:8000])
    refused(path, "truncated|damaged")
    path = make_tar(tmp_path / "x.tar", files, "w")
    path.write_bytes(path.read_bytes()[:8000])
    refused(path, "truncated|damaged")


def test_zip_bombs(tmp_path):
    path = tmp_path / "x.zip"
    refused(zip_bomb(path, "a.png", 2048), "too large when decoded")
    refused(zip_bomb(path, "a.png", 2048, claim=100), "damaged|Bad CRC")
    refused(zip_bomb(path, "a.png", 64), "damaged picture|Bad CRC")
    with zipfile.ZipFile(path) as archive:  # the construction is a zip file that others can read
        assert archive.infolist()[0].file_size == 64 * MIB


def test_locked_zip(tmp_path):
    path = make_zip(tmp_path / "x.zip", {"a.png": png(4, 4)})
    content = bytearray(path.read_bytes())
    content[6] |= 1  # says: encrypted
    content[content.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(content)
    refused(path, "encrypted")


def test_picture_bombs(tmp_path):
    for side, message in ((9000, "too large"), (12000, "too large"), (60000, "too large")):
        (tmp_path / "a.png").write_bytes(png(side, side))
        refused(tmp_path, f"a.png: picture {message}")
    (tmp_path / "a.png").write_bytes(png(5000, 5000))
    for i in range(30):
        (tmp_path / f"b{i}.png").write_bytes(png(5000, 5000))
    refused(tmp_path, "damaged picture|too large when decoded")


def test_many_large_pictures(tmp_path):
    out = io.BytesIO()
    Image.fromarray(np.zeros((3000, 3000), np.uint8)).save(out, "PNG")
    for i in range(80):
        (tmp_path / f"{i}.png").write_bytes(out.getvalue())
    refused(tmp_path, "too large when decoded: .* got 720 MB; pass num_examples=, a smaller size=")
    assert data.load(tmp_path, num_examples=1).data_shape == (3000, 3000, 1)
    assert data.load(tmp_path, size=8, num_examples=2).data_shape == (8, 8, 1)


@pytest.mark.parametrize(
    "content", [b"", b"junk", png(4, 4)[:40], b"\xff\xd8\xff" + bytes(50), b"P5\n9 9\n255\n123"]
)
def test_damaged_pictures(tmp_path, content):
    (tmp_path / "good.png").write_bytes(png(4, 4))
    (tmp_path / "zz.png").write_bytes(content)
    line = refused(tmp_path, "zz.png: damaged picture .*; fetch it again")
    assert "0x" not in line


def test_programs_in_disguise_are_not_started(tmp_path):
    """PostScript would be handed to Ghostscript; that decoder is not among those used."""
    (tmp_path / "a.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\n"
    )
    refused(tmp_path, "damaged picture .*cannot identify image file")


def test_pictures_that_differ(tmp_path):
    (tmp_path / "a.png").write_bytes(png(4, 4))
    (tmp_path / "b.png").write_bytes(png(5, 4))
    line = refused(tmp_path, "pictures differ: expected one shape, .*; resize with size=")
    assert "a.png is 4x4 grey (rows x columns), b.png is 4x5 grey" in line
    assert data.load(tmp_path, size=4).num_examples == 2
    Image.new("RGB", (4, 4)).save(tmp_path / "b.png")
    refused(tmp_path, "a.png is 4x4 grey .*, b.png is 4x4 colour .*; convert with channels=1 or 3")
    assert data.load(tmp_path, channels=3).data_shape == (4, 4, 3)


def test_pictures_beside_class_folders(tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "a.png").write_bytes(png(4, 4))
    (tmp_path / "b.png").write_bytes(png(4, 4))
    refused(tmp_path, "pictures beside class folders: .* got 'b.png' beside 'cat'")


def test_options_that_do_not_fit(tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, np.zeros((3, 2)))
    refused(path, "size and channels are for 8-bit pictures", size=4)
    refused(path, "classes asked for: expected labels, got none", classes=[0])
    refused(path, "unknown options: expected none for a file, got rank", rank=3)
    refused(path, "no such split", split="test")


def test_names_cannot_break_the_line(tmp_path):
    path = make_zip(tmp_path / "x.zip", {"a\n\x1b[31mFAKE\x07.png": b"junk"})
    assert "\x1b" not in refused(path, "damaged picture")


def test_without_pillow_and_scipy(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(png(4, 4))
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    refused(tmp_path, r'needs Pillow; pip install "lowdim-diffusion\[data\]"')
    mat = tmp_path / "x.mat"
    mat.write_bytes(b"MATLAB 5.0 MAT-file".ljust(128))
    refused(mat, r'needs scipy; pip install "lowdim-diffusion\[data\]"')


def test_importing_is_light():
    code = (
        "import sys, lowdim_diffusion.data;"
        "print([m for m in ('PIL', 'scipy.io', 'flax') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
