"""Charts as PNG and as SVG: what they show, and where."""

import math
import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_bipe.config import ENCODINGS
from megatron_bipe.eval.chart import (
    PAGE_SIZES,
    Chart,
    Line,
    draw_chart,
    draw_panels,
    draw_svg,
    line_styles,
    perplexity_chart,
)
from megatron_bipe.eval.chart_axes import line_look
from megatron_bipe.eval.chart_content import round_ticks, spread, thin_ticks, values_beyond, visible_range
from megatron_bipe.picture import COLOURS, DASHES, PictureSettings, save_figure

FLAT = Line("flat", [(16, 20.0), (32, 19.0), (64, 21.0)], train_len_tokens=16)
EXPLODING = Line("bursting", [(16, 20.0), (32, 90.0), (64, math.inf)], train_len_tokens=16)
RISING = Line("rising <1>", [(64, 12.0), (128, 20.0), (256, 28.0)], train_len_tokens=64)
FALLING = Line("falling", [(64, 28.0), (128, 20.0), (256, 12.0)], 1, train_len_tokens=64)
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
SVG = "{http://www.w3.org/2000/svg}"


def test_visible_range_holds_everything_where_nothing_explodes():
    low, high = visible_range([FLAT])
    assert low < 19 and high > 21
    assert values_beyond([FLAT], high) == ""


def test_visible_range_is_not_stretched_by_an_exploding_line():
    low, high = visible_range([FLAT, EXPLODING])
    assert low < 19 and 21 < high == 50.0
    assert values_beyond([FLAT, EXPLODING], high) == "bursting 90 at 32, infinite at 64"


def test_visible_range_of_nearly_equal_values_does_not_magnify_noise():
    low, high = visible_range([Line("one", [(16, 20.0), (32, 20.01)], train_len_tokens=16)])
    assert high - low > 2


def test_spread_keeps_order_and_distance():
    placed = spread([0.50, 0.10, 0.51, 0.52], gap=0.05)
    order = sorted(placed)
    assert [placed[1], placed[0], placed[2], placed[3]] == order
    assert min(b - a for a, b in pairwise(order)) >= 0.05 - 1e-9
    assert spread([0.1, 0.9], gap=0.05) == [0.1, 0.9]
    assert spread([], gap=0.05) == []


def test_thin_ticks_keeps_the_training_length_and_what_fits():
    assert thin_ticks([128, 256, 512, 1024, 8192], [256], smallest_gap=400) == [256, 1024, 8192]
    assert thin_ticks([1024, 2048], [1024], smallest_gap=60) == [1024, 2048]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(36.0, 81.0, [40, 50, 60, 70, 80]), (2.95, 4.6, [3.0, 3.5, 4.0, 4.5]), (0, 1.7e6, [0, 5e5, 1e6, 1.5e6])],
)
def test_round_ticks_are_round_numbers_inside(low, high, expected):
    assert round_ticks(low, high, 7) == pytest.approx(expected)


def _draw_png(chart):
    return save_figure(draw_chart(chart), "png")


@pytest.mark.parametrize(
    "lines", [[FLAT], [FLAT, EXPLODING], [EXPLODING], [Line("point", [(64, 12.0)], train_len_tokens=16)]]
)
def test_draw_png_gives_a_picture_of_readme_size(lines):
    picture = _draw_png(perplexity_chart(lines, "Perplexity"))
    assert picture.startswith(PNG_MAGIC)
    width, height = (int.from_bytes(picture[at : at + 4], "big") for at in (16, 20))
    assert 1000 < width < 1800 and 600 < height < 900
    assert _draw_png(perplexity_chart(lines, "Perplexity")) == picture


def test_draw_png_line_to_infinity_is_drawn_out_of_the_plot(monkeypatch):
    drawn = []
    plot = Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda self, x, y, **style: drawn.append(y) or plot(self, x, y, **style))
    gone = Line("gone", [(16, 20.0), (32, math.inf)], 1, train_len_tokens=16)
    _draw_png(perplexity_chart([FLAT, gone]))
    flat, _, [first, last], _, _ = drawn  # each line, its markers, and the arrow where one leaves
    assert flat == (20.0, 19.0, 21.0)
    assert first == 20.0 and 50.0 < last < math.inf


def test_draw_png_many_models_reuse_colours():
    lines = [Line(f"model {i}", [(16, 20.0 + i), (32, 20.0 + i)], i, 16) for i in range(9)]
    assert _draw_png(perplexity_chart(lines)).startswith(PNG_MAGIC)


def test_draw_panels_keep_their_room_next_to_long_notes(monkeypatch):
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: figures.append(figure) or save(figure, *a, **k))
    chart = perplexity_chart([FLAT, EXPLODING], "Title")._replace(note="a long note " * 30)
    assert save_figure(draw_panels([[chart, chart], [chart, chart]]), "png").startswith(PNG_MAGIC)
    [figure] = figures
    boxes = [axes.get_position() for axes in figure.axes]
    assert len(boxes) == 4 and all(box.width > 0.35 and box.height > 0.2 for box in boxes)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["flat", "bursting", "training length"]


def named(encodings, **fields):
    return [Line(f"{n} {e}", [(16, 20.0), (32, 21.0)], n, encoding=e, **fields) for n, e in enumerate(encodings)]


def test_every_encoding_has_a_style_of_its_own_which_no_other_line_changes():
    alone = {encoding: line_styles(named([encoding]))[0] for encoding in ENCODINGS}
    assert len(set(alone.values())) == len(ENCODINGS)
    order = list(ENCODINGS)[::-1]
    assert line_styles(named(order)) == [alone[encoding] for encoding in order]


@pytest.mark.parametrize("relative", ["rope", "alibi", "xpos", "t5", "nope"])
def test_a_bilevel_encoding_is_solid_and_its_flat_counterpart_dashed_in_the_same_colour(relative):
    bilevel, flat = line_styles(named([f"bipe_{relative}", relative]))
    assert bilevel.colour == flat.colour and bilevel.marker == flat.marker
    assert (DASHES[bilevel.dashes], bilevel.is_hollow) == ("-", False) and flat.is_hollow
    assert DASHES[flat.dashes] == (0, (4, 2))


def test_lines_of_one_encoding_differ_in_colour_and_several_of_two_encodings_in_dashes():
    assert [style.colour for style in line_styles(named(["rope"] * 3))] == [0, 1, 2]
    styles = line_styles(named(["rope", "alibi", "rope", "rope"]))
    assert len(set(styles)) == 4 and {styles[i].colour for i in (0, 2, 3)} == {0}
    assert [style.colour for style in line_styles(named(["rope", "of mine"]))] == [0, 1]


def test_lines_that_encodings_cannot_distinguish_are_numbered():
    lines = [Line(f"{name} {lr}", [(16, 20.0)], lr, encoding=name) for name in ("rope", "bipe_rope") for lr in range(4)]
    looks = [(style.colour, DASHES[style.dashes]) for style in line_styles(lines)]
    assert len(set(looks)) == 8


@pytest.mark.parametrize("encodings", [("bipe_rope", "rope"), ("rope", "rope", "alibi"), ("", "")])
def test_background_lines_look_like_their_models(encodings):
    models = named(encodings)
    behind = [line._replace(name="") for line in models]
    mixed = [line for pair in zip(behind, models, strict=True) for line in pair]
    styles = line_styles(mixed)
    assert styles[::2] == styles[1::2] == line_styles(models)
    looks = [line_look(line, style) for line, style in zip(mixed, styles, strict=True)]
    dashes = [(look["color"], look["linestyle"]) for look in looks]
    assert dashes[::2] == dashes[1::2] and len(set(dashes)) == len(encodings)


def test_a_chart_of_many_encodings_becomes_panels_of_flat_against_bilevel():
    chart = perplexity_chart(named(ENCODINGS, train_len_tokens=16), "All")
    figure = draw_chart(chart)
    panels = [[text.get_text().split()[1] for text in axes.get_legend().get_texts()] for axes in figure.axes]
    assert {"bipe_rope", "rope", "randomized_rope"} in map(set, panels) and {"bipe_t5", "t5"} in map(set, panels)
    assert sorted(name for panel in panels for name in panel) == sorted(ENCODINGS) and len(panels) == 6
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["the other lines", "training length"]
    assert len(draw_chart(chart._replace(lines=chart.lines[:8])).axes) == 1
    assert len(draw_chart(perplexity_chart(named(["rope"] * 9))).axes) == 1


def test_bands_are_inside_the_axes_and_in_the_legend():
    banded = FLAT._replace(band=[(16, 15.0, 22.0), (32, 17.0, 26.0), (64, 20.0, 24.0)])
    chart = perplexity_chart([banded], band_label="range of 3 seeds")
    assert chart.y_range[0] < 15 and chart.y_range[1] > 26
    figure = draw_chart(chart)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["shaded: range of 3 seeds"]
    low, high = chart.y_range
    [shaded] = figure.axes[0].collections
    heights = shaded.get_paths()[0].vertices[:, 1]
    assert low <= heights.min() == 15.0 and heights.max() == 26.0 <= high


def test_a_large_ratio_makes_the_axis_logarithmic_and_the_label_says_so():
    far = Line("far", [(16, 200.0), (32, 210.0), (64, 220.0)], 1, train_len_tokens=16)
    chart = perplexity_chart([FLAT, far])
    assert chart.is_log and "log" in chart.y_label and chart.y_range[0] > 0
    assert chart.height(chart.y_range[0]) == pytest.approx(0) and chart.height(chart.y_range[1]) == pytest.approx(1)
    assert draw_chart(chart).axes[0].get_yscale() == "log"
    assert not perplexity_chart([FLAT, EXPLODING]).is_log


def test_losses_use_the_height_too():
    lines = [Line("m", [(16, 3.0), (32, 3.1)], 0, 16), Line("n", [(16, 3.05), (32, 90.0)], 1, 16)]
    chart = perplexity_chart(lines, measure="nats")
    assert chart.y_range[0] > 2.5 and chart.y_range[1] < 4.5 and "nats" in chart.y_label
    assert "n 90 at 32" in chart.note


@pytest.mark.parametrize(("width", "inches"), [("column", 3.3), ("page", 6.8)])
def test_figures_have_the_width_of_a_paper_and_nothing_is_cut_off(width, inches):
    long = Line("a-model-with-a-name-of-some-length/step-00001000", [(16, 20.0), (32, 22.0)], 1, 16)
    for lines in ([FLAT, FALLING, RISING], [FLAT, EXPLODING, long]):
        figure = draw_chart(perplexity_chart(lines, "A title that needs two lines in a column of a paper " * 2),
                            PictureSettings(width=width))  # fmt: skip
        assert figure.get_figwidth() == inches
        box = figure.get_tightbbox()
        assert box.x0 > -0.02 and box.x1 < inches + 0.02
        assert box.y0 > -0.02 and box.y1 < figure.get_figheight() + 0.02


def draw(lines, **changes):
    values = {"lines": lines, "x_label": "length", "y_label": "perplexity", "y_range": (10.0, 30.0)}
    html = draw_svg(Chart(**values | changes), "s <&>")
    return {svg.get("class").split()[1]: svg for svg in ElementTree.fromstring(f"<p>{html}</p>")}


def style(element):
    return dict(item.split(": ", 1) for item in element.get("style").split("; ") if ": " in item)


def paths(svg, number):
    """Points of each drawn line of a style, in the drawing's pixels."""
    lines = [path for path in svg.iter(f"{SVG}path") if style(path).get("stroke") == f"var(--line{number})"]
    lines = [path for path in lines if "clip-path" in path.attrib]
    return [[tuple(map(float, point)) for point in re.findall(r"([-\d.]+) ([-\d.]+)", p.get("d"))] for p in lines]


def texts(svg):
    return {text.text: text for text in svg.iter(f"{SVG}text")}


def area(svg):
    """Left, top, right and bottom of the axes: its background is the second path."""
    background = list(svg.iter(f"{SVG}path"))[1]
    corners = re.findall(r"([-\d.]+) ([-\d.]+)", background.get("d"))
    xs, ys = zip(*(map(float, corner) for corner in corners), strict=True)
    return min(xs), min(ys), max(xs), max(ys)


@pytest.mark.parametrize("kind", PAGE_SIZES)
def test_draw_svg_places_points_by_value_and_all_text_inside(kind):
    svg = draw([RISING, FALLING], x_ticks=(64, 128, 256))[kind]
    [rising], [falling] = paths(svg, 0), paths(svg, 1)
    assert [x for x, _ in rising] == [x for x, _ in falling] == sorted(x for x, _ in rising)
    assert (rising[2][0] - rising[1][0]) == pytest.approx(2 * (rising[1][0] - rising[0][0]), abs=0.3)
    assert [y for _, y in rising] == [y for _, y in falling][::-1] == sorted((y for _, y in rising), reverse=True)
    _, top, _, bottom = area(svg)
    assert rising[1][1] == pytest.approx((top + bottom) / 2, abs=0.1)  # 20 is the middle of 10 to 30
    found = texts(svg)
    assert {"rising <1>", "falling", "64", "256", "10", "30", "training length", "perplexity", "length"} <= set(found)
    for word, text in found.items():
        width = 6.5 * len(word)
        start = float(text.get("x")) - {"middle": width / 2, "end": width}.get(style(text).get("text-anchor"), 0)
        assert start > -4 and start + width < PAGE_SIZES[kind][0] + 4
    assert svg.get("aria-label") == "s <&>" and svg.get("role") == "img"


def test_draw_svg_uses_the_colours_and_the_font_of_the_page_and_no_id_twice():
    html = draw_svg(perplexity_chart([FLAT, EXPLODING]), "one") + draw_svg(perplexity_chart([FLAT]), "two")
    assert not re.search(r"#[0-9a-f]{6}\b(?!\))", re.sub(r'(xlink:href|clip-path)="[^"]*"', "", html))
    assert not any(colour in html for colour in COLOURS) and "font-family" not in html and "<style" not in html
    ids = re.findall(r'\bid="([^"]*)"', html)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"#(\w+)", html)) == set(ids)


def test_draw_svg_lines_differ_without_colour():
    svg = draw([RISING, FALLING])["wide"]
    lines = [p for p in svg.iter(f"{SVG}path") if style(p).get("stroke", "").startswith("var(--line")]
    dashes = [style(line).get("stroke-dasharray") for line in lines if "clip-path" in line.attrib]
    shapes = {p.get("d") for p in svg.iter(f"{SVG}path") if p.get("id") and style(p)["stroke"] == "var(--page)"}
    assert len(set(dashes)) == 2 and len(shapes) == 2
    assert next(title.text for title in svg.iter(f"{SVG}title")) == "rising <1>: 12.00 at 64"


def test_draw_svg_of_many_encodings_has_panels_with_titles_of_their_own_points():
    chart = perplexity_chart([*named(ENCODINGS), Line("gone", [(16, 20.0), (32, math.inf)], encoding="rope")])
    html = draw_svg(chart, "all")
    wide, narrow = ElementTree.fromstring(f"<p>{html}</p>")
    for svg in (wide, narrow):
        titles = [title.text for title in svg.iter(f"{SVG}title")]
        assert sorted(titles) == sorted(
            f"{line.name}: {y:.2f} at {x}" for line in chart.lines for x, y in line.points if y < math.inf
        )
        assert {line.name for line in chart.lines} <= set(texts(svg))
        assert svg.get("fill") == "var(--line6)"  # of black markers, for which matplotlib writes no fill
    assert not any(colour in html for colour in (*COLOURS, "#d4d4d4"))


def test_draw_svg_names_keep_their_distance():
    lines = [Line(f"model {i}", [(0, 20.0), (1, 10.5 + 0.01 * i)], i) for i in range(5)]
    for svg in draw(lines).values():
        heights = sorted(float(text.get("y")) for word, text in texts(svg).items() if word.startswith("model"))
        assert len(heights) == 5 and min(b - a for a, b in pairwise(heights)) > 15
        assert heights[-1] < area(svg)[3] + 6


def test_draw_svg_infinite_values_leave_at_the_top_and_nan_is_a_gap():
    gone = Line("gone", [(64, 20.0), (128, math.inf)])
    broken = Line("broken", [(1, 20.0), (2, math.nan), (3, 20.0), (4, 21.0)])
    svg = draw([gone])["wide"]
    [[(_, first), (_, last)]] = paths(svg, 0)
    assert first > area(svg)[1] > last > -math.inf
    assert "gone ↑" in texts(svg)
    [line] = [p for p in draw([broken])["wide"].iter(f"{SVG}path") if style(p).get("stroke") == "var(--line0)"]
    assert [len(part.split("L")) for part in line.get("d").split("M")[1:]] in ([2], [1, 2])


def test_draw_svg_lines_in_the_background_have_no_name_and_no_markers():
    svg = draw([RISING, Line("", [(64, 11.0), (256, 29.0)])])["wide"]
    lines = [p for p in svg.iter(f"{SVG}path") if style(p).get("stroke") == "var(--line0)"]
    behind, front = lines
    assert float(style(behind)["stroke-width"]) < float(style(front)["stroke-width"])
    assert float(style(behind)["stroke-opacity"]) < 1
    assert len(list(svg.iter(f"{SVG}title"))) == 3
