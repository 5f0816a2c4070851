"""The pieces that pages are made of: skeleton, charts, tokens with their ids, losses of runs."""

import math
import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from megatron_bipe.data.dataset import TokenDataset, open_tokenizer
from megatron_bipe.data.segments import bilevel_ids
from megatron_bipe.errors import DataError
from megatron_bipe.eval.curves import COLOURS
from megatron_bipe.eval.line_chart import Chart, Line, line_chart, nice_ticks
from megatron_bipe.eval.page import NUM_TINTS, Section, bars, commands, facts, page, table
from megatron_bipe.eval.run_losses import average_steps, loss_lines, read_losses
from megatron_bipe.eval.segments_view import read_passage, readable_passage, segments_view
from megatron_bipe.train.metrics_file import STEP_TIME, VALID_LOSS, MetricsFile
from tests.helpers.errors import raises
from tests.helpers.pages import Outline, assert_self_contained

WIDTHS = {"wide": 840, "narrow": 358}


def test_page_is_closed_self_contained_and_escapes_text():
    parts = facts([("<1>", "a & b")]) + bars([("<step>", 2.0), ("other", 1.0)]) + commands("run <x>\nthen y")
    html = page("T <b>&", "<p>lead</p>", [Section("H <b>&", parts + table(["a"], [["<b>1</b>"]]))])
    outline = assert_self_contained(html)
    assert [tag for tag, _ in outline.elements if tag in ("h1", "h2")] == ["h1", "h2"]
    for shown in ("T <b>&", "H <b>&", "<1>", "a & b", "<step>", "run <x> then y"):
        assert shown in outline.text
    shares = [attributes["style"] for tag, attributes in outline.elements if tag == "i" and "style" in attributes]
    assert shares == ["--share:1.0000", "--share:0.5000"]


def test_page_style_has_every_colour_in_both_schemes():
    html = page("T", "", [])
    for name, count in (("line", len(COLOURS)), ("tint", NUM_TINTS)):
        for number in range(count):
            assert html.count(f"--{name}{number}: #") == 2
            assert f"var(--{name}{number})" in html
        assert f"--{name}{count}:" not in html


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(36.0, 81.0, [40, 50, 60, 70, 80]), (2.95, 4.6, [3.0, 3.5, 4.0, 4.5]), (0, 1.7e6, [0, 5e5, 1e6, 1.5e6])],
)
def test_nice_ticks_are_round_numbers_inside(low, high, expected):
    assert nice_ticks(low, high, 7) == pytest.approx(expected)


def draw(lines, **changes):
    values = {"summary": "s <&>", "x_label": "length", "y_label": "perplexity", "lines": lines, "y_range": (10.0, 30.0)}
    html = line_chart(Chart(**values | changes))
    return {svg.get("class").split()[1]: svg for svg in ElementTree.fromstring(f"<p>{html}</p>")}


def positions(svg):
    """Points of each line, in the drawing's pixels."""
    inner = svg.find("svg")
    return [[tuple(map(float, p.split(","))) for p in line.get("points").split()] for line in inner.iter("polyline")]


RISING = Line("rising <1>", 0, [(64, 12.0), (128, 20.0), (256, 28.0)])
FALLING = Line("falling", 1, [(64, 28.0), (128, 20.0), (256, 12.0)])


@pytest.mark.parametrize("kind", WIDTHS)
def test_line_chart_places_points_by_value_and_all_text_inside(kind):
    svg = draw([RISING, FALLING], x_ticks=(64, 128, 256), x_mark=(64, "training length"))[kind]
    rising, falling = positions(svg)
    assert [x for x, _ in rising] == [x for x, _ in falling] == sorted(x for x, _ in rising)
    assert (rising[2][0] - rising[1][0]) == pytest.approx(2 * (rising[1][0] - rising[0][0]), abs=0.3)
    assert [y for _, y in rising] == [y for _, y in falling][::-1] == sorted((y for _, y in rising), reverse=True)
    area = svg.find("svg")
    assert rising[1][1] == pytest.approx(float(area.get("height")) / 2, abs=0.1)  # 20 is the middle of 10 to 30
    texts = [text.text for text in svg.iter("text")]
    assert {"rising <1>", "falling", "64", "256", "10", "30", "training length", "perplexity", "length"} <= set(texts)
    for text in svg.iter("text"):
        width = 6.5 * len(text.text)
        start = float(text.get("x")) - {"start": 0, "middle": width / 2, "end": width}[text.get("text-anchor")]
        assert start > -4 and start + width < WIDTHS[kind] + 4
    assert svg.get("aria-label") == "s <&>"


def test_line_chart_lines_differ_without_colour():
    svg = draw([RISING, FALLING])["wide"]
    dashes = [line.get("stroke-dasharray") for line in svg.iter("polyline")]
    shapes = [next(child.tag for child in dot if child.tag != "title") for dot in svg.iter("g")]
    assert len(set(dashes)) == 2 and set(shapes) == {"circle", "rect"}
    assert next(title.text for title in svg.iter("title")) == "rising <1>: 12.00 at 64"


def test_line_chart_names_keep_their_distance():
    lines = [Line(f"model {i}", i, [(0, 20.0), (1, 10.5 + 0.01 * i)]) for i in range(5)]
    for svg in draw(lines).values():
        heights = sorted(float(text.get("y")) for text in svg.iter("text") if text.get("class").startswith("name"))
        assert len(heights) == 5 and min(b - a for a, b in pairwise(heights)) > 15
        area = svg.find("svg")
        assert heights[-1] < float(area.get("y")) + float(area.get("height")) + 6


def test_line_chart_infinite_values_leave_at_the_top_and_others_are_gaps():
    gone = Line("gone", 0, [(64, 20.0), (128, math.inf)])
    broken = Line("broken", 1, [(1, 20.0), (2, math.nan), (3, 20.0), (4, 21.0)])
    svg = draw([gone])["wide"]
    [[(_, first), (_, last)]] = positions(svg)
    assert first > 0 > last > -math.inf
    assert "gone ↑" in [text.text for text in svg.iter("text")]
    assert [len(stretch) for stretch in positions(draw([broken])["wide"])] == [1, 2]


def test_line_chart_lines_in_the_background_have_no_name_and_no_markers():
    svg = draw([RISING, Line("", 0, [(64, 11.0), (256, 29.0)])])["wide"]
    behind, front = svg.iter("polyline")
    assert behind.get("class") == "line behind s0" and front.get("class") == "line s0"
    assert len(list(svg.iter("g"))) == 3


@pytest.fixture
def open_texts(write_text_dataset, tmp_path):
    def make(texts):
        write_text_dataset(tmp_path / "data", [texts])
        dataset = TokenDataset(tmp_path / "data")
        return dataset, open_tokenizer(dataset)

    return make


def test_segments_view_shows_the_ids_of_bilevel_ids(open_texts):
    dataset, tokenizer = open_texts(["a cat\nsat on\n\nmats.\n", "unused"])
    passage = read_passage(dataset, tokenizer, 0, max_tokens=100)
    count = len("<a cat\nsat on\n\nmats.\n")
    intra, inter = bilevel_ids(dataset.ends(0, count), clip=count)
    outline = Outline(segments_view(passage))
    labels = {"inter": [], "intra": []}
    boxes = re.findall(
        r'<small class="inter">(\d+)</small><b>(.*?)</b><small class="intra">(\d+)</small>', segments_view(passage)
    )
    for above, _, below in boxes:
        labels["inter"].append(int(above))
        labels["intra"].append(int(below))
    assert labels == {"inter": inter.tolist(), "intra": intra.tolist()}
    tints = [attributes["class"] for tag, attributes in outline.elements if tag == "div" and "class" in attributes]
    assert [tint for tint in tints if tint.startswith("segment")] == [f"segment t{i}" for i in range(4)]
    rows = re.findall(r'<th scope="row"><code>(.*?)</code></th><td>(\d+)</td><td>(\d+)</td>', segments_view(passage))
    assert [(int(inter_id), int(intra_id)) for _, inter_id, intra_id in rows] == list(zip(inter, intra, strict=True))


def test_segments_view_escapes_text_and_shows_blanks(open_texts):
    dataset, tokenizer = open_texts(["a <b>&\x1b\n", "unused"])
    html = segments_view(read_passage(dataset, tokenizer, 0, max_tokens=100))
    for shown in ("<b>&lt;bos&gt;</b>", "<b>&lt;</b>", "<b>&amp;</b>", "<b><i>·</i></b>", "<b><i>↵</i></b>", r"\x1b"):
        assert shown in html
    assert "\x1b" not in html


def test_read_passage_ends_with_a_segment_where_one_ends(open_texts):
    dataset, tokenizer = open_texts(["ab\ncd\nef\n", "abcdefgh"])
    assert "".join(read_passage(dataset, tokenizer, 0, max_tokens=8).texts) == "<bos>ab↵cd↵"
    assert "".join(read_passage(dataset, tokenizer, 1, max_tokens=4).texts) == "<bos>abc"


def test_readable_passage_is_prose_in_a_few_segments(open_texts):
    clear = "one sentence\nand another\nand a third\n"
    dataset, tokenizer = open_texts(["a\nb\nc\nd\n", "-----\n=====\n+++++\n.....\n", clear, "no end of a segment"])
    assert readable_passage(dataset, tokenizer, max_tokens=100).document == 2


@pytest.fixture
def run_dir(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl", last_step=0)
    for step in range(1, 7):
        loss = None if step == 2 else 6.0 - step / 2
        file.add({"step": step, "tokens": 100 * step, "loss/train_nats": loss, STEP_TIME: 0.5 if step > 1 else 2.5})
        if step % 3 == 0:
            file.add({"step": step, "tokens": 100 * step, VALID_LOSS: 5.0 - step / 3})
    file.close()
    return tmp_path


def test_read_losses_are_what_a_run_wrote(run_dir):
    losses = read_losses(run_dir)
    assert losses.train[0] == (100, 5.5) and math.isnan(losses.train[1][1])
    assert losses.valid == [(300, 4.0), (600, 3.0)]
    assert (losses.num_tokens, losses.step_s, losses.tokens_per_s) == (600, 0.5, 120.0)
    named, behind = loss_lines("m", 2, losses)
    assert (named.name, named.points) == ("m", losses.valid)
    assert (behind.name, len(behind.points)) == ("", 6)
    [alone] = loss_lines("m", 2, losses._replace(valid=[]))
    assert alone.name == "m"


def test_average_steps_keeps_the_mean():
    points = [(float(x), float(x * x)) for x in range(1, 8)]
    assert average_steps(points, 7) == points
    assert average_steps(points, 4) == [(1.5, 2.5), (3.5, 12.5), (5.5, 30.5), (7.0, 49.0)]


@pytest.mark.parametrize("damage", ['{"step": 7, "tok', "[1]", '{"step": 7}', '{"tokens": 1, "loss/train_nats": 1}'])
def test_read_losses_damaged_line_is_named(run_dir, damage):
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(damage)
    with raises(DataError, "line 9", damage, location=run_dir / "metrics.jsonl"):
        read_losses(run_dir)


def test_read_losses_without_steps_or_file_says_so(tmp_path):
    with raises(DataError, "No such file", location=tmp_path / "metrics.jsonl"):
        read_losses(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with raises(DataError, "training step", location=tmp_path / "metrics.jsonl"):
        read_losses(tmp_path)
