"""The page stands alone, is well formed, shows what was given and nothing as markup."""

import base64
import html.parser
import importlib.util
import io

import numpy as np
import PIL.Image
import pytest

from lowdim_diffusion import reporting
from lowdim_diffusion.reporting import figures

VOID = {"meta", "img", "br", "hr", "input", "link"}


class Page(html.parser.HTMLParser):
    """Collects what the tests ask about, and checks that tags close in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text.append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def full_report(path, **kwargs):
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (6, 8, 8, 1), dtype=np.uint8)
    sigmas = np.geomspace(80, 0.01, 10)
    values = -np.sort(-rng.random((10, 3, 20)))
    arguments = {
        "title": "run <1>",
        "subtitle": 'a & "b"',
        "summary": {"parameters": 1234567, "speed": (812.34, "images/s")},
        "neighbors": reporting.Neighbors(pictures, pictures[::-1], np.arange(6) / 4),
        "memorized": 0.125,
        "copies": reporting.Copies(
            {"copies": ("3 of 9", "so many")},
            *(pictures[:2], pictures[1:3], ["row 7, 2 x", "row 9, 1 x"]),
            *([[7, 2, "0.100", "8, 30"]], 2),
        ),
        "loss": (np.arange(50), np.linspace(3, 0.1, 50)),
        "trajectory": (rng.standard_normal((10, 2, 8, 8, 1)), sigmas),
        "spectra": reporting.Spectra(
            sigmas, values, np.full((10, 3), 0.5), values, np.ones((10, 3))
        ),
        "angles": {"0 and 1": [0.0, np.pi / 2]},
        "config": "[data]\nname = '<script>alert(1)</script>'",
        "versions": {"jax": "0.10"},
        "next_commands": [("more", "lowdim train --out 'a b'")],
        "notes": ["A note."],
    }
    return reporting.write_html(path, **(arguments | kwargs))


def test_full_report_is_one_self_contained_page(tmp_path):
    path = full_report(tmp_path / "new" / "report.html")
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    names = {name for name, _ in page.tags}
    assert not names & {"script", "link", "iframe", "object", "base", "form"}
    for _, attrs in page.tags:
        for key, value in attrs.items():
            assert not key.startswith("on")
            if key in ("src", "href", "xlink:href"):
                assert value.startswith(("data:image/png;base64,", "#")), value
    assert "url(http" not in text and "@import" not in text
    policy = next(m for m in page.all("meta") if m.get("http-equiv"))
    assert policy["content"].startswith("default-src 'none'")
    assert any("width=device-width" in m.get("content", "") for m in page.all("meta"))
    assert all(image["alt"] for image in page.all("img"))
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in page.all("svg"))
    assert len(page.all("svg")) == 4
    identities = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(identities) == len(set(identities))
    targets = [a["href"][1:] for a in page.all("a")]
    assert len(targets) == 8 and set(targets) <= set(identities)
    used = [a.get("xlink:href", a.get("href", "")) for a in page.all("use")]
    assert used and {u[1:] for u in used} <= set(identities)
    assert figures.INK not in text.split("</style>", 1)[1]  # the ink follows the page
    words = " ".join(page.text)
    for shown in (
        "run <1>", 'a & "b"', "1,234,567", "812.3", "images/s", "12.5 %", "d = 1.25", "90.0°",
        "<script>alert(1)</script>", "lowdim train --out 'a b'", "0.10", "A note.", "0.707",
        "3 of 9", "row 9, 1 x", "8, 30", "1 more are in analysis.npz.",
    ):  # fmt: skip
        assert shown in words, shown


def test_pictures_survive_pixel_by_pixel():
    rng = np.random.default_rng(0)
    left = rng.integers(0, 256, (2, 5, 4, 3), dtype=np.uint8)
    right = rng.integers(0, 256, (2, 5, 4, 3), dtype=np.uint8)
    page = Page(reporting.Report("t").pairs(left, right, ["a", "b"]).html())
    found = [
        np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(i["src"].split(",")[1]))))
        for i in page.all("img")
    ]
    np.testing.assert_array_equal(found, [left[0], right[0], left[1], right[1]])
    assert [i["alt"] for i in page.all("img")][:2] == ["sample 1", "nearest training example 1"]


def test_parts_that_are_not_given_are_left_out(tmp_path):
    path = reporting.write_html(tmp_path / "r.html", title="empty")
    page = Page(path.read_text(encoding="utf-8"))
    assert page.all("section") == [] and page.all("nav") == []
    vectors = np.random.default_rng(0).standard_normal((4, 48))
    neighbors = reporting.Neighbors(vectors, vectors, np.zeros(4))
    path = reporting.write_html(tmp_path / "r.html", title="vectors", neighbors=neighbors)
    page = Page(path.read_text(encoding="utf-8"))
    assert "Above: drawn from the model" in " ".join(page.text)
    assert len(page.all("img")) == 8


def test_without_matplotlib_the_rest_is_written(tmp_path, monkeypatch):
    real = importlib.util.find_spec
    absent = lambda name, *a: None if name == "matplotlib" else real(name, *a)
    monkeypatch.setattr(importlib.util, "find_spec", absent)
    page = Page(full_report(tmp_path / "r.html").read_text(encoding="utf-8"))
    assert page.all("svg") == [] and len(page.all("img")) == 16
    words = " ".join(page.text)
    assert "pip install 'lowdim-diffusion[plots]'" in words
    assert "largest singular value" in words  # the numbers stay


def test_report_parts_and_escaping():
    report = reporting.Report("t <i>").section("A b!").section("A b!")
    report.text("one\n\ntwo <b>").note("quiet").cards({"x": None, "y": True, "z": np.float32(0.5)})
    report.table(["name", "value"], [["<u>", 1.5], ["v", np.int64(20000)]], caption="c & d")
    report.picture(np.zeros((4, 6, 1), np.uint8), "black", width=12)
    report.code("x < 1", summary="more")
    page = Page(report.html())
    assert [s["id"] for s in page.all("section")] == ["a-b", "a-b-2"]
    assert [td.get("class") for td in page.all("td")] == [None, "number", None, "number"]
    words = [w for w in page.text if w.strip()]
    assert {"two <b>", "–", "yes", "0.5", "20,000", "<u>", "c & d", "x < 1"} <= set(words)
    image = page.all("img")[0]
    assert (image["width"], image["height"], image["alt"]) == ("12", "8", "black")
    assert not {"b", "u", "i"} & {name for name, _ in page.tags}


def test_wrong_lengths_are_refused():
    report = reporting.Report("t")
    with pytest.raises(ValueError, match="wrong length of a row: expected 2, got 1"):
        report.table(["a", "b"], [[1]])
    with pytest.raises(ValueError, match="one partner and one caption per picture"):
        report.pairs(np.zeros((2, 4, 4)), np.zeros((2, 4, 4)), ["a"])


def test_failed_write_leaves_the_old_report_and_no_rubbish(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    reporting.Report("old").write(path)
    old = path.read_bytes()

    def broken(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", broken)
    with pytest.raises(OSError, match="No space left"):
        reporting.Report("new").write(path)
    assert path.read_bytes() == old and [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_the_same_content_gives_the_same_bytes(tmp_path):
    first = full_report(tmp_path / "a.html").read_bytes()
    assert full_report(tmp_path / "b.html").read_bytes() == first
