"""The page of edits stands alone, and what a person sees and turns in it is what was given."""

import base64
import hashlib
import html.parser
import io
import json
import re

import numpy as np
import PIL.Image
import pytest

from lowdim_diffusion import editing, reporting

STRENGTHS = [-2.0, -0.5, 0.0, 1.0, 2.0]
IMAGES, WAYS, HEIGHT, WIDTH = 3, 2, 7, 10
MASK = np.zeros((HEIGHT, WIDTH), bool)
MASK[2:5, 3:8] = True
MASK[3, 5] = False


def example(channels, seed=0):
    """Originals in [-1, 1] and edits that are 0 at strength 0 and stronger inside the mask."""
    rng = np.random.default_rng(seed)
    originals = rng.uniform(-0.8, 0.8, (IMAGES, HEIGHT, WIDTH, channels))
    ways = rng.normal(size=(IMAGES, WAYS, 1, HEIGHT, WIDTH, channels))
    ways *= np.where(MASK, 0.3, 0.02)[None, None, None, :, :, None]
    size = np.sign(STRENGTHS) * np.abs(STRENGTHS) ** 1.2
    return originals, originals[:, None, None] + ways * size[None, None, :, None, None, None]


def written(path, channels=1, **kwargs):
    originals, edits = example(channels)
    arguments = {
        "originals": originals, "edits": edits, "strengths": STRENGTHS, "mask": MASK,
        "labels": ["first", "</script><b>", "third"], "directions": ["v & 1", 'v "2"'],
        "title": "Edits <1>", "subtitle": "Fashion & friends",
    }  # fmt: skip
    return reporting.write_edit_page(path, **(arguments | kwargs))


def content(path):
    """What the page was given, read back from its data block."""
    text = path.read_text(encoding="utf-8")
    block = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    return json.loads(block.group(1))


def picture(uri):
    raw = base64.b64decode(uri.removeprefix("data:image/png;base64,"))
    array = np.asarray(PIL.Image.open(io.BytesIO(raw)))
    return array[..., None] if array.ndim == 2 else array


class Page(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.scripts, self.words, self.inside = [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = tag

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside == "script":
            self.scripts.append((self.tags[-1][1], data))
        self.words.append(data)


# ---- the file ---------------------------------------------------------------------------------


def test_the_page_is_one_file_that_asks_for_nothing(tmp_path):
    path = written(tmp_path / "new" / "edits.html")
    text = path.read_text(encoding="utf-8")
    assert "http:" not in text and "https:" not in text and "@import" not in text
    page = Page(text)
    assert not {"link", "iframe", "object", "base", "form"} & {name for name, _ in page.tags}
    for _, attrs in page.tags:
        assert not any(key.startswith("on") or key in ("src", "href", "style") for key in attrs)
    policy = next(a["content"] for _, a in page.tags if "http-equiv" in a)
    assert policy.startswith("default-src 'none';") and "connect-src" not in policy
    allowed = re.search(r"script-src 'sha256-([^']+)'$", policy).group(1)
    (kind, _), (own, script) = page.scripts  # hostile labels opened no third
    assert kind["type"] == "application/json" and own == {}
    assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() == allowed
    assert "Edits <1>" in page.words and "Fashion & friends" in page.words
    assert content(path)["labels"][1] == "</script><b>"
    identities = [a["id"] for _, a in page.tags if "id" in a]
    assert len(identities) == len(set(identities))


def test_the_same_content_gives_the_same_bytes(tmp_path):
    assert written(tmp_path / "a.html").read_bytes() == written(tmp_path / "b.html").read_bytes()


@pytest.mark.parametrize("channels", [1, 3])
def test_strips_hold_every_picture_in_the_order_of_strengths(tmp_path, channels):
    originals, edits = example(channels)
    shuffled = [3, 0, 4, 2, 1]
    path = written(
        tmp_path / "a.html", channels, edits=edits[:, :, shuffled],
        strengths=np.array(STRENGTHS)[shuffled], captions=[["a", "b"]] * 3,
    )  # fmt: skip
    found = content(path)
    assert found["size"] == [HEIGHT, WIDTH, channels] and found["strengths"] == STRENGTHS
    for i in range(IMAGES):
        np.testing.assert_array_equal(
            picture(found["originals"][i]), reporting.as_pictures(originals)[i]
        )
        for d in range(WAYS):
            strip = picture(found["strips"][i][d]).reshape(HEIGHT, 5, WIDTH, channels)
            np.testing.assert_array_equal(
                strip.transpose(1, 0, 2, 3), reporting.as_pictures(edits[i, d])
            )
    assert found["captions"] == [["a", "b"]] * 3


def test_changes_are_those_of_the_scores_at_and_between_strengths(tmp_path):
    originals, edits = example(3)
    found = content(written(tmp_path / "a.html", 3))
    for k, w in [(0, 0.0), (1, 0.25), (2, 0.5), (3, 0.9)]:
        blend = (1 - w) * edits[:, :, k] + w * edits[:, :, k + 1]
        for d in range(WAYS):
            wanted = editing.inside_outside_change(originals, blend[:, d], MASK)
            for name, numbers in zip(("inside", "outside"), wanted, strict=True):
                square = np.array(found[name]["square"])[:, d]
                cross = np.array(found[name]["cross"])[:, d]
                total = (1 - w) ** 2 * square[:, k] + 2 * w * (1 - w) * cross[:, k]
                total += w**2 * square[:, k + 1]
                np.testing.assert_allclose(np.sqrt(total), numbers, rtol=1e-5, atol=1e-6)


def test_zero_is_added_where_it_is_missing(tmp_path):
    _, edits = example(1)
    keep = [0, 1, 3, 4]
    metrics = {"m": np.arange(IMAGES * WAYS * 4.0).reshape(IMAGES, WAYS, 4), "n": np.ones((3, 2))}
    found = content(
        written(
            tmp_path / "a.html", edits=edits[:, :, keep], metrics=metrics,
            strengths=[STRENGTHS[k] for k in keep],
        )
    )  # fmt: skip
    assert found["strengths"] == STRENGTHS
    strip = picture(found["strips"][1][0]).reshape(HEIGHT, 5, WIDTH, 1)
    np.testing.assert_array_equal(strip[:, 2], picture(found["originals"][1]))
    assert found["inside"]["square"][0][0][2] == 0
    assert found["metrics"][0][1][0][1] == [4, 5, None, 6, 7]
    assert found["metrics"][1][1][2][1] == [1]
    positive = content(written(tmp_path / "b.html", edits=edits[:, :, 3:], strengths=[1, 2]))
    assert positive["strengths"] == [0, 1, 2]


def test_bytes_and_floats_may_be_mixed(tmp_path):
    originals, edits = example(3)
    as_bytes = reporting.as_pictures(originals)
    found = content(written(tmp_path / "a.html", 3, originals=as_bytes))
    np.testing.assert_array_equal(picture(found["originals"][2]), as_bytes[2])
    assert max(np.ravel(found["inside"]["square"])) < 1  # not in units of 255
    gray = content(
        written(tmp_path / "b.html", originals=originals[..., 0], edits=edits[..., 0], mask=None)
    )
    assert gray["size"] == [HEIGHT, WIDTH, 1] and "whole" in gray and "inside" not in gray


def test_what_diverged_is_shown_as_unknown(tmp_path):
    _, edits = example(1)
    edits[0, 0, 4, 0, 0] = np.nan
    found = content(written(tmp_path / "a.html", edits=edits))
    assert found["outside"]["square"][0][0][4] is None
    assert found["outside"]["cross"][0][0][3] is None
    assert found["inside"]["square"][0][0][4] > 0


def test_outline_goes_round_the_pixels_inside(tmp_path):
    found = content(written(tmp_path / "a.html"))
    (path,) = found["outlines"]
    sides = set()
    for x, y, kind, length in re.findall(r"M(\d+) (\d+)([hv])(\d+)", path):
        for step in range(int(length)):
            dx, dy = (step, 0) if kind == "h" else (0, step)
            side = (kind, int(x) + dx, int(y) + dy)
            assert side not in sides
            sides.add(side)
    padded = np.pad(MASK, 1)
    wanted = set()
    for i, j in np.ndindex(HEIGHT + 2, WIDTH + 2):
        if i and padded[i, j] != padded[i - 1, j]:
            wanted.add(("h", j - 1, i - 1))
        if j and padded[i, j] != padded[i, j - 1]:
            wanted.add(("v", j - 1, i - 1))
    assert sides == wanted and len(wanted) == 20
    many = np.stack([MASK, np.roll(MASK, 1, 0), np.ones_like(MASK)])
    found = content(written(tmp_path / "b.html", mask=many))
    assert len(set(found["outlines"])) == 3
    assert content(written(tmp_path / "c.html", 3, mask=np.ones((7, 10, 3))))["outlines"]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"originals": np.zeros((3, 7, 9, 1))}, r"shape of edits: expected \(3, D, S, 7, 9, 1\)"),
        ({"originals": np.zeros((3, 70))}, "shape of originals"),
        ({"strengths": [1, 2]}, r"number of strengths: expected \(5,\)"),
        ({"strengths": [0, 1, 1, 2, 3]}, "strengths: expected different and finite"),
        ({"strengths": [0, 1, 2, 3, np.inf]}, "different and finite"),
        ({"labels": ["a"]}, "number of labels: expected 3, got 1"),
        ({"directions": ["a"]}, "number of directions: expected 2, got 1"),
        ({"captions": [["a"]] * 3}, "captions: expected 3 rows of 2 texts"),
        ({"metrics": {"m": np.zeros((3, 5))}}, "shape of metric 'm'"),
        ({"mask": np.zeros((7, 10))}, "mask has no pixel inside"),
        ({"mask": np.ones((10, 7))}, "wrong shape of the mask"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        written(tmp_path / "a.html", **change)
    assert list(tmp_path.iterdir()) == []


def test_only_strength_zero_is_refused(tmp_path):
    _, edits = example(1)
    with pytest.raises(ValueError, match="one that is not 0"):
        written(tmp_path / "a.html", edits=edits[:, :, :1], strengths=[0])


# ---- in a browser -----------------------------------------------------------------------------

LIGHT = {"low": (0x15, 0x59, 0x9B), "middle": (0xF3, 0xF4, 0xF6), "high": (0xC2, 0x4E, 0x08)}


def pixels(browser, name):
    """RGB values of a canvas as ``[h, w, 3]``."""
    values = browser.run(
        f"(() => {{ const c = document.getElementById('{name}'); return [c.height, c.width, "
        "...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]; })()"
    )
    rgba = np.array(values[2:]).reshape(values[0], values[1], 4)
    assert (rgba[..., 3] == 255).all()
    return rgba[..., :3]


def text(browser, name):
    return browser.run(f"document.getElementById('{name}').textContent")


def shown(browser, address):
    """Wait until the page shows a view, and its address says so."""
    browser.until(f"document.body.dataset.shown === '#{address}'")
    browser.until(f"location.hash === '#{address}'")


def cards(browser):
    """The numbers that the page shows, by their labels."""
    pairs = browser.run(
        "[...document.querySelectorAll('#numbers div')].map((d) => [...d.children].map("
        "(c) => c.textContent))"
    )
    return dict(pairs)


def expected_map(edited, original, scale, ends=LIGHT):
    """Colours of the change of 8-bit pictures ``[h, w, c]``, computed the slow way."""
    out = np.zeros((*edited.shape[:2], 3))
    for i, j in np.ndindex(edited.shape[:2]):
        change = (edited[i, j].astype(float) - original[i, j]) / 127.5
        most = change[np.argmax(np.abs(change))]
        share = min(abs(most) / scale, 1)
        end = ends["low"] if most < 0 else ends["high"]
        out[i, j] = (1 - share) * np.array(ends["middle"]) + share * np.array(end)
    return out


@pytest.fixture(scope="module", params=[1, 3], ids=["gray", "rgb"])
def page(request, tmp_path_factory):
    channels = request.param
    metrics = {"SSIM": np.linspace(0, 1, 30).reshape(3, 2, 5)}
    path = written(
        tmp_path_factory.mktemp("page") / "edits.html", channels,
        metrics=metrics, captions=[[f"caption {i}{d}" for d in range(2)] for i in range(3)],
    )  # fmt: skip
    originals, edits = example(channels)
    floats = {"originals": originals, "edits": edits, "metrics": metrics}
    rgb = lambda x: np.broadcast_to(x, (*x.shape[:-1], 3))
    pictures = {
        "original": rgb(reporting.as_pictures(originals)),
        "edited": np.stack([[rgb(reporting.as_pictures(e)) for e in row] for row in edits]),
    }
    return path.as_uri(), pictures, floats, content(path)["scale"]


def test_a_linked_view_shows_its_image_direction_and_strength(browser, page):
    url, pictures, floats, scale = page
    browser.screen(1280, 900)
    browser.open(f"{url}#image=2&direction=1&strength=1")
    shown(browser, "image=2&direction=1&strength=1")
    assert text(browser, "now") == 'third, v "2"'
    assert text(browser, "caption") == "caption 21"
    assert text(browser, "reading") == "+1" and "Computed at strength +1" in text(browser, "how")
    original, edited = pictures["original"][2], pictures["edited"][2, 1, 3]
    np.testing.assert_array_equal(pixels(browser, "original"), original)
    np.testing.assert_array_equal(pixels(browser, "edited"), edited)
    np.testing.assert_allclose(
        pixels(browser, "difference"), expected_map(edited, original, scale), atol=0.51
    )
    change = editing.inside_outside_change(floats["originals"][2:], floats["edits"][2:, 1, 3], MASK)
    numbers = cards(browser)
    inside, outside = float(change.inside[0]), float(change.outside[0])
    assert float(numbers["change inside the mask"]) == pytest.approx(inside, rel=6e-3)
    assert float(numbers["change outside"]) == pytest.approx(outside, rel=6e-3)
    assert float(numbers["inside / outside"]) == pytest.approx(inside / outside, rel=6e-3)
    assert float(numbers["SSIM"]) == pytest.approx(floats["metrics"]["SSIM"][2, 1, 3], rel=6e-3)
    checked = "document.querySelector('input[name=%s]:checked').value"
    assert browser.run(checked % "image") == "2" and browser.run(checked % "direction") == "1"
    assert browser.run("document.querySelectorAll('.frame path')[0].getAttribute('d')")
    names = browser.run("[...document.querySelectorAll('.picks span')].map((e) => e.textContent)")
    assert names == ["first", "</script><b>", "third", "v & 1", 'v "2"']
    assert browser.requests()[0].startswith("file:")
    assert all(u.startswith("data:image/png") for u in browser.requests()[1:])
    assert browser.complaints() == []


def test_between_strengths_the_blend_and_at_zero_no_difference(browser, page):
    url, pictures, floats, _ = page
    browser.open(f"{url}#image=1&direction=0&strength=-1.4")
    shown(browser, "image=1&direction=0&strength=-1.4")
    a, b = pictures["edited"][1, 0, 0].astype(float), pictures["edited"][1, 0, 1]
    w = (-1.4 - -2.0) / 1.5
    blend = np.rint(a + w * (b - a))
    np.testing.assert_allclose(pixels(browser, "edited"), blend, atol=1)
    assert (pixels(browser, "edited") != blend).mean() < 0.05
    assert text(browser, "how").startswith("Blend of the computed strengths −2 and −0.5, 40 %")
    between = (1 - w) * floats["edits"][1:2, 0, 0] + w * floats["edits"][1:2, 0, 1]
    change = editing.inside_outside_change(floats["originals"][1:2], between, MASK)
    found = float(cards(browser)["change inside the mask"])
    assert found == pytest.approx(float(change.inside[0]), rel=6e-3)
    m = floats["metrics"]["SSIM"][1, 0]
    assert float(cards(browser)["SSIM"]) == pytest.approx((1 - w) * m[0] + w * m[1], rel=6e-3)

    browser.click("#zero")
    shown(browser, "image=1&direction=0&strength=0")
    assert (pixels(browser, "difference") == LIGHT["middle"]).all()
    np.testing.assert_array_equal(pixels(browser, "edited"), pixels(browser, "original"))
    assert cards(browser)["change inside the mask"] == "0"
    assert cards(browser)["inside / outside"] == "–"


def test_keys_and_clicks_choose(browser, page):
    url, pictures, _, _ = page
    browser.open(url)
    browser.until("document.body.dataset.shown === '#image=0&direction=0&strength=2'")
    browser.click("#images label:nth-child(2)")
    shown(browser, "image=1&direction=0&strength=2")
    np.testing.assert_array_equal(pixels(browser, "edited"), pictures["edited"][1, 0, 4])
    browser.press("ArrowRight")  # the focus is on the images: real arrow keys go through them
    shown(browser, "image=2&direction=0&strength=2")
    ring = "getComputedStyle(document.activeElement.nextElementSibling).outlineStyle"
    assert browser.run(ring) == "solid"  # and the focus is visible
    browser.press("ArrowRight")
    shown(browser, "image=0&direction=0&strength=2")
    browser.press("Tab")
    browser.press("ArrowDown")
    shown(browser, "image=0&direction=1&strength=2")
    browser.click("#strength", x=0.02)
    browser.press("Home")
    shown(browser, "image=0&direction=1&strength=-2")
    np.testing.assert_array_equal(pixels(browser, "edited"), pictures["edited"][0, 1, 0])
    browser.press("PageUp")
    shown(browser, "image=0&direction=1&strength=-0.5")
    np.testing.assert_array_equal(pixels(browser, "edited"), pictures["edited"][0, 1, 1])
    browser.press("ArrowRight")
    shown(browser, "image=0&direction=1&strength=-0.42")
    browser.press("PageDown")
    browser.press("PageDown")
    browser.press("PageDown")
    shown(browser, "image=0&direction=1&strength=-2")
    browser.press("End")
    shown(browser, "image=0&direction=1&strength=2")
    assert browser.run("document.getElementById('strength').getAttribute('aria-valuetext')") == "+2"
    width = browser.run("document.getElementById('strength').getBoundingClientRect().width")
    knob = 22  # its middle travels over the width less its own
    middle = knob / 2 + 0.75 * (width - knob)
    browser.click("#strength", x=(middle + 3) / width)  # beside +1, into which the slider falls
    shown(browser, "image=0&direction=1&strength=1")
    assert browser.complaints() == []


def test_difference_options_and_outline(browser, page):
    url, pictures, _, scale = page
    browser.open(f"{url}#image=0&direction=1&strength=2&gain=4")
    shown(browser, "image=0&direction=1&strength=2&gain=4")
    original, edited = pictures["original"][0], pictures["edited"][0, 1, 4]
    np.testing.assert_allclose(
        pixels(browser, "difference"), expected_map(edited, original, scale / 4), atol=0.51
    )
    legend = lambda: [text(browser, name) for name in ("low", "middle", "high")]
    assert legend() == [f"−{scale / 4:g}", "0", f"+{scale / 4:g}"]
    browser.click("#absolute")
    shown(browser, "image=0&direction=1&strength=2&difference=absolute&gain=4")
    violet = (0x6D, 0x3F, 0xA8)
    ends = {"low": violet, "middle": LIGHT["middle"], "high": violet}
    np.testing.assert_allclose(
        pixels(browser, "difference"), expected_map(edited, original, scale / 4, ends), atol=0.51
    )
    assert legend() == ["0", "size", f"{scale / 4:g}"]
    outline = "getComputedStyle(document.querySelector('.frame svg')).display"
    assert browser.run(outline) != "none"
    browser.click("#outline")
    browser.until(f"{outline} === 'none'")


@pytest.mark.slow
def test_play_sweeps_back_and_forth_until_paused(browser, page):
    browser.open(f"{page[0]}#image=0&direction=0&strength=1.9")
    shown(browser, "image=0&direction=0&strength=1.9")
    strength = "Number(document.getElementById('strength').value)"
    browser.click("#play")
    assert text(browser, "play") == "Pause"
    browser.until(f"{strength} < 1")  # over the top and down again
    assert "strength=1.9" in browser.run("location.hash")  # the address waits
    browser.until(f"{strength} < -1")
    browser.until(f"{strength} > 0")
    browser.click("#play")
    assert text(browser, "play") == "Play"
    rest = browser.run(strength)
    shown(browser, f"image=0&direction=0&strength={rest:.6g}")
    assert browser.run(strength) == rest
    assert browser.complaints() == []


@pytest.mark.parametrize(
    ("given", "address"),
    [
        ("image=9&direction=-1&strength=99", "image=0&direction=0&strength=2"),
        ("image=1.5&direction=x&strength=NaN", "image=0&direction=0&strength=2"),
        ("image=1&strength=-1e9&gain=3&difference=<b>", "image=1&direction=0&strength=-2"),
        ("image=&strength=", "image=0&direction=0&strength=2"),
        ("%", "image=0&direction=0&strength=2"),
    ],
)
def test_wrong_addresses_do_no_harm(browser, page, given, address):
    browser.open(f"{page[0]}#{given}")
    browser.until(f"document.body.dataset.shown === '#{address}'")
    assert browser.complaints() == []
    browser.run("location.hash = '#image=2&direction=1&strength=0.5'")
    browser.until("document.body.dataset.shown === '#image=2&direction=1&strength=0.5'")


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_it_fits_phones_and_desktops_in_both_themes(browser, page, width, dark):
    browser.screen(width, 844, dark)
    browser.open(f"{page[0]}#strength=1.3")
    shown(browser, "image=0&direction=0&strength=1.3")
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run("getComputedStyle(document.querySelector('canvas')).imageRendering") == (
        "pixelated"
    )
    box = lambda e: browser.run(
        f"(({{left, right, top, bottom, width, height}}) => ({{left, right, top, bottom, width, "
        f"height}}))(document.getElementById('{e}').getBoundingClientRect())"
    )
    before, after, change = map(box, ("original", "edited", "difference"))
    assert max(abs(e["width"] - before["width"]) for e in (after, change)) < 0.1
    assert before["width"] / before["height"] == pytest.approx(WIDTH / HEIGHT, rel=0.01)
    assert before["top"] == after["top"] and after["left"] > before["right"]
    assert (change["top"] == after["top"]) == (width > 760)
    # picture and slider together on one screen
    assert 0 < box("strength")["bottom"] - after["top"] < 560
    small = browser.run(
        "[...document.querySelectorAll('button, select, #strength, .picks label')].filter((e) => "
        "e.getBoundingClientRect().height < 32 || e.getBoundingClientRect().width < 32).length"
    )
    assert small == 0  # room for a finger
    middle = (0x1C, 0x22, 0x2B) if dark else LIGHT["middle"]
    browser.click("#zero")
    shown(browser, "image=0&direction=0&strength=0")
    assert (pixels(browser, "difference") == middle).all()
    browser.screen(1280, 900)


def test_without_a_mask_there_is_one_number_and_no_outline(browser, tmp_path):
    path = written(tmp_path / "a.html", mask=None)
    browser.open(f"{path.as_uri()}#strength=1")
    shown(browser, "image=0&direction=0&strength=1")
    assert list(cards(browser)) == ["change"]
    assert browser.run("document.getElementById('outline-label').hidden")
    assert browser.run("getComputedStyle(document.getElementById('outline-label')).display") == (
        "none"
    )


def test_many_images_real_pictures(browser, data_root, tmp_path):
    from lowdim_diffusion import data

    x = data.load(data_root / "fashion-mnist", num_examples=24).images
    base = x / 127.5 - 1
    strengths = np.linspace(-3, 3, 7)
    edits = base[:, None, None] + 0.2 * strengths[None, None, :, None, None, None]
    path = reporting.write_edit_page(
        tmp_path / "a.html", originals=x, edits=edits, strengths=strengths
    )
    assert path.stat().st_size < 24 * 8 * 784 * 4 / 3 + 60_000
    browser.screen(390, 844)
    browser.open(f"{path.as_uri()}#image=20&strength=-2")
    shown(browser, "image=20&direction=0&strength=-2")
    np.testing.assert_array_equal(
        pixels(browser, "edited"),
        np.broadcast_to(reporting.as_pictures(edits[20, 0, 1][None])[0], (28, 28, 3)),
    )
    box = "document.getElementById('images').getBoundingClientRect()"
    item = "document.querySelectorAll('#images label')[20].getBoundingClientRect()"
    assert browser.run(f"{item}.left >= {box}.left && {item}.right <= {box}.right")
    browser.screen(1280, 900)
