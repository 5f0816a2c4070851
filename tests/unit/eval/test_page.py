"""Pages: skeleton, elements, and tokens with their ids."""

import re

import pytest

from megatron_bipe.data.dataset import TokenDataset, open_tokenizer
from megatron_bipe.data.segments import bilevel_ids
from megatron_bipe.eval.page import (
    NUM_TINTS,
    Section,
    bars,
    commands,
    facts,
    page,
    read_passage,
    readable_passage,
    segments_view,
    table,
)
from megatron_bipe.picture import COLOURS
from tests.helpers.pages import Outline, assert_self_contained


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
