from __future__ import annotations

import html
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rectiflow.errors import InputError
from rectiflow.report import (
    Alignment,
    EditReport,
    Noise,
    report,
    write_edit_report,
    write_gallery,
)
from rectiflow.report.pictures import LARGEST
from tests.report.samples import PROMPT, TARGET, Page, decoded, drawing, entry, example

HOSTILE = "<script>alert('x')</script> & \"quotes\" 🍏 {{ 7 * 7 }} </style> ünï ‮rtl"
LINKS = {"src", "href", "srcset", "action", "data", "poster", "xlink:href", "background"}


def assert_self_contained(page: Page) -> None:
    for tag, attributes in page.elements:
        assert tag not in {"iframe", "object", "embed", "base", "form"}
        for name in LINKS & attributes.keys():
            value = attributes[name] or ""
            relative = tag == "a" and "//" not in value
            assert value.startswith(("data:", "#")) or relative, f"<{tag} {name}={value[:60]}>"
        if tag == "script":
            assert "src" not in attributes
    assert "@import" not in page.source
    for address in re.findall(r"url\(\s*['\"]?([^)]{0,40})", page.source):
        assert address.startswith(("data:", "#")), address
    # Namespaces inside a data URI of the style sheet are names, not addresses.
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg')", page.source)
    (policy,) = page.all("meta", **{"http-equiv": "Content-Security-Policy"})
    assert (policy["content"] or "").startswith("default-src 'none'")


def assert_described(page: Page) -> None:
    images = page.all("img")
    assert images
    for image in images:
        assert image["alt"]
        assert int(image["width"] or 0) > 0 and int(image["height"] or 0) > 0
    for drawn in page.all("svg"):
        assert drawn.get("aria-hidden") == "true" or drawn["aria-label"]
    identifiers = [found["id"] for _, found in page.elements if found.get("id")]
    assert len(identifiers) == len(set(identifiers))
    for used in page.all("use"):
        assert (used["href"] or "")[1:] in identifiers
    assert len(page.all("h1")) == 1
    assert page.all("html", lang="en")


@pytest.mark.parametrize("edits", [1, 5])
def test_a_page_is_complete(tmp_path: Path, edits: int) -> None:
    path = write_edit_report(example(edits), tmp_path / "new" / "edit.html")
    page = Page.read(path)
    assert_self_contained(page)
    assert_described(page)
    assert page.open == []
    assert len(page.having("slider")) == edits
    sliders = page.all("input", type="range")
    assert [slider["aria-label"] for slider in sliders] == [
        f"Compare source and edit: {TARGET}"
    ] * edits
    for words in ("Two apples", PROMPT, "emoji-sd3", "exact", "6.5 s", "True target", "PSNR"):
        assert words in page.text
    assert f"{42 + 32 * edits} 42 inverting, {32 * edits} editing" in page.text
    assert "No source prompt" not in page.text
    assert [p.name for p in path.parent.iterdir()] == ["edit.html"]


def test_everything_that_is_known_is_shown(tmp_path: Path) -> None:
    page = Page.read(write_edit_report(example(), tmp_path / "r.html"))
    assert "num inference steps 15 compensate both nested a: 1, 2" in page.text
    assert '--from "two red apples"' in page.text
    assert "date 2026-11-20 seed 7" in page.text
    assert "inside mse 0.0123" in page.text
    assert "Neighbour correlation 0.4 0 clearly off: the image still shows in it" in page.text
    assert "Excess kurtosis 0.5 0 somewhat off: outliers" in page.text
    assert len(page.having("plot")) == 2
    assert len(page.having("copy")) == 1
    assert "5 tokens kept. Removed: red apples. Added: green pears." in page.text
    states = [len(page.having(state)) for state in ("column", "replaced")]
    assert states == [7, 2]


def test_what_is_unknown_is_left_out(tmp_path: Path) -> None:
    bare = EditReport(
        title="t", model="m", preset="p", source=drawing(0), source_prompt="x",
        edits=[entry(target=None, mask=None, alignment=None, metrics={}, nfe=None, seconds=None)],
    )  # fmt: skip
    page = Page.read(write_edit_report(bare, tmp_path / "r.html"))
    assert_self_contained(page)
    assert_described(page)
    for words in (
        "True target",
        "Reconstruction",
        "Inversion",
        "Network samples",
        "Time",
        "None",
        "How it",
    ):
        assert words not in page.text
    assert not page.having("plot") and not page.having("copy") and not page.having("legend")


@pytest.mark.parametrize("prompt", [None, ""])
def test_a_missing_source_prompt_is_said(tmp_path: Path, prompt: str | None) -> None:
    nothing = Alignment([], TARGET.split(), [])
    made = example(source_prompt=prompt, edits=[entry(alignment=nothing)])
    page = Page.read(write_edit_report(made, tmp_path / "r.html"))
    assert "No source prompt was given" in page.text
    assert len(page.having("added")) == 7 + 1  # and one in the legend


def test_texts_are_escaped(tmp_path: Path) -> None:
    hostile = example(
        title=HOSTILE,
        model=HOSTILE,
        preset=HOSTILE,
        source_prompt=HOSTILE,
        command=HOSTILE,
        settings={HOSTILE: HOSTILE},
        environment={HOSTILE: HOSTILE},
        warnings=[HOSTILE],
        kind=HOSTILE,
        edits=[
            entry(prompt=HOSTILE, alignment=Alignment([HOSTILE], [HOSTILE, HOSTILE], [(0, 0)])),
            entry(prompt=HOSTILE, alignment=None, metrics={HOSTILE: HOSTILE}),
        ],
    )
    single = write_edit_report(hostile, tmp_path / "r.html")
    gallery = write_gallery(
        [hostile], tmp_path / "g.html", title=HOSTILE, introduction=HOSTILE, command=HOSTILE
    )
    for path in (single, gallery):
        page = Page.read(path)
        assert_self_contained(page)
        assert_described(page)
        assert len(page.all("script")) == 1 and len(page.all("style")) == 1
        assert HOSTILE in " ".join(page.pieces)
        assert "{{ 7 * 7 }}" in page.source and str(html.escape("<script>alert(")) in page.source
        assert "<script>alert(" not in page.source


def test_warnings_are_shown(tmp_path: Path) -> None:
    made = example(warnings=["The prompt was cut after 77 tokens.", "Twice."])
    assert (
        "The prompt was cut after 77 tokens. Twice."
        in Page.read(write_edit_report(made, tmp_path / "r.html")).text
    )
    assert not Page.read(write_edit_report(example(), tmp_path / "r.html")).having("warnings")


@pytest.mark.parametrize("size", [(64, 64), (48, 128), (200, 60), (33, 400), (1, 1)])
def test_sizes_and_ratios(tmp_path: Path, size: tuple[int, int]) -> None:
    made = example(size=size, edits=[entry(size=size)])
    page = Page.read(write_edit_report(made, tmp_path / "r.html"))
    images = page.all("img")
    assert {(int(i["width"] or 0), int(i["height"] or 0)) for i in images} == {size}
    assert all(decoded(image["src"]).size == size for image in images)
    assert bool(page.having("pixels")) is (max(size) <= 128)
    (slider,) = page.having("slider")
    assert f"aspect-ratio: {size[0]} / {size[1]}" in (slider["style"] or "")
    assert "Pictures are shown at" not in page.text


def test_large_pictures_are_shown_smaller(tmp_path: Path) -> None:
    size = (2400, 1600)
    made = example(size=size, edits=[entry(size=size), entry(2, size=size)])
    path = write_edit_report(made, tmp_path / "r.html")
    page = Page.read(path)
    assert max(int(image["width"] or 0) for image in page.all("img")) == LARGEST
    assert "Pictures are shown at 1024 × 683; the files are 2400 × 1600." in page.text
    assert path.stat().st_size < 6_000_000


def test_a_small_page_is_small(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)  # the worst case for PNG
    made = example(source=picture, edits=[entry(i, image=picture) for i in range(5)])
    assert write_edit_report(made, tmp_path / "r.html").stat().st_size < 400_000


def test_the_pictures_in_the_page_are_the_pictures(tmp_path: Path) -> None:
    made = example()
    page = Page.read(write_edit_report(made, tmp_path / "r.html"))
    by_alt = {image["alt"]: decoded(image["src"]) for image in page.all("img")}
    for alt, picture in ((f"Edit: {TARGET}", made.edits[0].image), ("Source", made.source)):
        assert np.array_equal(np.asarray(by_alt[alt].convert("RGB")), np.asarray(picture))


def test_the_same_report_is_the_same_file(tmp_path: Path) -> None:
    once, twice = (write_edit_report(example(), tmp_path / f"{i}.html") for i in range(2))
    assert once.read_bytes() == twice.read_bytes()


@pytest.mark.parametrize("mode", ["RGBA", "L", "CMYK", "P"])
def test_any_mode_of_picture(tmp_path: Path, mode: str) -> None:
    made = example(source=drawing(0).convert(mode), edits=[entry(image=drawing(1).convert(mode))])
    assert_described(Page.read(write_edit_report(made, tmp_path / "r.html")))


def test_what_does_not_fit_together_is_refused() -> None:
    with pytest.raises(InputError, match="at least one edit"):
        example(edits=[])
    with pytest.raises(InputError, match=r"edit 1 is .* back to the source's size"):
        example(edits=[entry(image=drawing(1, (32, 64)), target=None, mask=None)])
    with pytest.raises(InputError, match="mask of edit 1"):
        example(edits=[entry(mask=np.zeros((3, 3), dtype=bool))])
    with pytest.raises(InputError, match="3 residuals for a grid of 15 steps"):
        example(residuals=[1, 2, 3])
    with pytest.raises(InputError, match="ascend"):
        Alignment(["a", "b"], ["b", "a"], [(0, 1), (1, 0)])


def test_the_public_function_takes_results_and_reports(tmp_path: Path) -> None:
    class Result:
        def edit_report(self) -> EditReport:
            return example()

    once = report(Result(), tmp_path / "a.html")
    assert once.read_bytes() == report(example(), tmp_path / "b.html").read_bytes()


def test_a_gallery_shows_every_case(tmp_path: Path) -> None:
    cases = [example(kind="background"), example(2, kind="count"), example(kind="style")]
    path = write_gallery(
        cases,
        tmp_path / "gallery.html",
        title="Six kinds",
        introduction="An introduction.",
        links=["0.html", None, "2.html"],
        command="rectiflow demo",
        environment={"date": "today"},
    )
    page = Page.read(path)
    assert_self_contained(page)
    assert_described(page)
    assert len(page.having("slider")) == 4
    assert [link["href"] for link in page.all("a")] == ["0.html", "2.html"]
    for words in ("Background", "Count", "Style", "Ours", "mean PSNR", "rectiflow demo", "today"):
        assert words in page.text
    assert page.text.count("the right answer") == 4


def test_a_gallery_without_targets(tmp_path: Path) -> None:
    unknown = example(edits=[entry(target=None)], noise=None, residuals=(), compensation=())
    page = Page.read(write_gallery([unknown], tmp_path / "g.html"))
    assert_described(page)
    assert "PSNR" not in page.text
    with pytest.raises(InputError, match="at least one report"):
        write_gallery([], tmp_path / "g.html")
    with pytest.raises(InputError, match="2 links for 1 reports"):
        write_gallery([unknown], tmp_path / "g.html", links=["a", "b"])


def test_noise_that_cannot_be_computed_is_said(tmp_path: Path) -> None:
    made = example(noise=Noise(float("nan"), float("inf"), 0.0))
    text = Page.read(write_edit_report(made, tmp_path / "r.html")).text
    assert "Norm not a number 1 cannot be computed" in text
    assert "Excess kurtosis ∞ 0 cannot be computed" in text
