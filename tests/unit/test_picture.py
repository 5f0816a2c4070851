"""Pictures as files: formats, titles, and bytes that do not depend on the process."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_bipe.errors import ConfigError
from megatron_bipe.picture import FORMATS, check_title, parse_formats, picture_format, printable
from tests.helpers.errors import raises
from tests.helpers.paths import ROOT

DRAW = """
import logging, sys
from megatron_bipe.eval.chart import Line, draw_chart, perplexity_chart
from megatron_bipe.picture import picture_files
logging.basicConfig(level=logging.INFO)  # as tools do
band = [(16, 19.0, 21.0), (32, 28.0, 33.0)]
lines = [Line("rope $x$ 5% <&>", [(16, 20.0), (32, 30.0)], 0, 16, band, encoding="rope")]
for name, content in picture_files("p", draw_chart(perplexity_chart(lines, "Häufig $a_b", band_label="seeds"))).items():
    open(f"{sys.argv[1]}/{name}", "wb").write(content)
"""


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Folders with the same pictures from two processes, which hash strings differently."""
    folders = [tmp_path_factory.mktemp(name) for name in ("one", "two")]
    for seed, folder in enumerate(folders):
        command = [sys.executable, "-c", DRAW, str(folder)]
        environment = {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": str(seed), "PATH": "", "MPLCONFIGDIR": str(folder)}
        with (folder / "log").open("w") as log:
            subprocess.run(command, check=True, env=environment, stderr=log)
    return folders


def test_pictures_have_the_same_bytes_in_every_process(drawn: list[Path]) -> None:
    one, two = drawn
    for kind in FORMATS:
        assert (one / f"p.{kind}").read_bytes() == (two / f"p.{kind}").read_bytes()
    assert (one / "p.png").read_bytes().startswith(b"\x89PNG")


def test_pdf_embeds_truetype_fonts_and_has_no_date(drawn: list[Path]) -> None:
    content = (drawn[0] / "p.pdf").read_bytes()
    assert b"/FontFile2" in content and b"/Type3" not in content
    assert b"CreationDate" not in content


def test_embedded_fonts_are_not_described_in_the_log(drawn: list[Path]) -> None:
    assert "fontTools" not in (drawn[0] / "log").read_text()


def test_svg_has_names_and_titles_as_text(drawn: list[Path]) -> None:
    content = (drawn[0] / "p.svg").read_text()
    assert ">rope $x$ 5% &lt;&amp;&gt;</text>" in content and ">Häufig $a_b</text>" in content
    assert ">shaded: seeds</text>" in content
    assert "<dc:date>" not in content


@pytest.mark.parametrize(
    ("title", "observed"), [("a\nb", r"\n"), ("\x1b[1m", r"\x1b"), ("a\udcff", r"\udcff"), ("位置 RoPE", "位置")]
)
def test_title_that_cannot_be_shown_is_refused(title: str, observed: str) -> None:
    with raises(ConfigError, observed, location="--title"):
        check_title(title)


@pytest.mark.parametrize("title", ["", "100% $x$ _^{}\\", "Длина – ‘longueur’ → ∞", "<b> & 'q'"])
def test_other_titles_are_accepted(title: str) -> None:
    check_title(title)


def test_names_that_cannot_be_printed_are_replaced() -> None:
    assert printable("a\udcff\x00b ok") == "a\ufffd\ufffdb ok"


def test_formats_are_known_names_each_once() -> None:
    assert parse_formats(" svg,PNG,svg") == ("png", "svg")
    for text, observed in (("png,jpg", "'jpg'"), ("", "''")):
        with raises(ConfigError, observed, location="--formats"):
            parse_formats(text)


def test_format_of_a_file_is_its_suffix() -> None:
    assert picture_format(Path("a/loss.PDF")) == "pdf"
    for name in ("loss.jpeg", "loss", "a.pdf/loss"):
        with raises(ConfigError, "suffix", location=name):
            picture_format(Path(name))
