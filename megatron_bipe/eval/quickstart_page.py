"""Page that `make quickstart` ends with: results, how they were obtained, and next steps. Torch-free."""

import math
import os
import shlex
from collections.abc import Sequence
from html import escape
from pathlib import Path

from megatron_bipe.data.inspection.show import printable
from megatron_bipe.eval.chart import Chart, Line, draw_svg, line_styles, perplexity_chart
from megatron_bipe.eval.page import (
    Section,
    bars,
    commands,
    definitions,
    details,
    facts,
    figure,
    page,
    paragraph,
    readable_passage,
    segments_view,
    table,
    token_box,
)
from megatron_bipe.eval.quickstart_results import Quickstart, RunLosses, average_steps, read_quickstart
from megatron_bipe.runtime.environment import cpu_facts

PASSAGE_TOKENS = 128
PAPER = "https://arxiv.org/abs/2401.16421"
ABOUT = {
    "bipe_rope": "The position inside the segment is a learned embedding; the number of the segment goes to RoPE.",
    "bipe_alibi": "The position inside the segment is a learned embedding; the number of the segment goes to ALiBi.",
    "rope": "The baseline: the position of the token in the text goes to RoPE; segments are not used.",
}
SEGMENT_ENDS = {
    "reference": "at line breaks and full stops that stand alone",
    "sentence": "at full stops and line breaks",
    "newline": "at line breaks",
}
# Title, text, commands; {folder} is the quickstart's output folder.
NEXT_STEPS = (
    (
        "Use the results",
        "The exported models are Hugging Face models. Generate text with one, print statistics of the data, or view "
        "the curves of the runs:",
        """
python tools/generate.py --model {folder}/exported/bipe_rope --prompt 'The default value is'
python tools/inspect_data.py stats {folder}/data/train
tensorboard --logdir {folder}/runs
""",
    ),
    (
        "Use your own text",
        "The input may be .jsonl, .jsonl.zst, .jsonl.gz, .txt or .parquet files, a folder of them, or a Hub name:",
        """
python tools/train_tokenizer.py --input my.jsonl --vocab-size 8192 --output mine/tokenizer
python tools/preprocess.py --input my.jsonl --tokenizer mine/tokenizer --output mine/data \\
    --split train=0.99,valid=0.01
deepspeed pretrain.py --ds_config ds_configs/zero2.json \\
    --config examples/quickstart.yaml --set run_dir=mine/run --set model.vocab_size=8192 \\
    --set data.path=mine/data/train --set data.valid_path=mine/data/valid
python tools/export_hf.py --checkpoint mine/run --output mine/model
""",
    ),
    (
        "Train on the Pile at the paper's size",
        "151M parameters, sequences of 1,024 tokens. The dry run estimates a run's resources before it starts. "
        "docs/training.md continues with evaluation and export.",
        """
python tools/download_data.py --output pile
python tools/preprocess.py --input pile/train \\
    --tokenizer llama_tokenizer --output data/pile --workers 16
python tools/preprocess.py --input pile/val.jsonl.zst \\
    --tokenizer llama_tokenizer --output data/pile-val
deepspeed pretrain.py --ds_config ds_configs/zero2.json \\
    --config examples/bipe_rope_151m.yaml --dry-run
deepspeed pretrain.py --ds_config ds_configs/zero2.json \\
    --config examples/bipe_rope_151m.yaml
""",
    ),
    (
        "Train on a cluster",
        "1.6B parameters on 64 GPUs, under SLURM or on the hosts of a hostfile. The dry run estimates memory and "
        "communication of 64 ranks without starting them.",
        """
deepspeed pretrain.py --ds_config ds_configs/zero1.json \\
    --config examples/bipe_rope_1.6b.yaml --dry-run 64
sbatch examples/launch/slurm.sbatch
HOSTFILE=my_hosts examples/launch/hostfile.sh
""",
    ),
)


def quickstart_page(folder: Path, verdict: str, prompts: Sequence[str] = (), machine: str = "") -> str:
    """Return the page about a finished quickstart as HTML.

    Args:
        folder: output folder of the quickstart.
        verdict: a sentence or two that say if the effect shows; line breaks are kept.
        prompts: prompts of the generated texts, in order; they are highlighted.
        machine: hardware description; by default this machine's processor.

    Raises:
        BipeError: a file in the folder is missing or damaged; the error names it.
    """
    found = read_quickstart(folder)
    machine = machine or _machine()
    sections = (
        Section("Perplexity beyond the training length", _perplexity_section(found)),
        Section("Training and validation loss", _losses(found)),
        Section("Segments and position ids", _segments(found)),
        Section("Generated text", _generated(found.generated, prompts)),
        Section("Sizes and times", _sizes(found, machine)),
        Section("Next steps", _next_steps(folder)),
    )
    return page(
        f"{_number_of_models(found)} language models, one question",
        _lead(found, verdict),
        sections,
        "megatron_bipe quickstart",
    )


def _machine() -> str:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return f"{cores} {'core' if cores == 1 else 'cores'} of {' '.join(cpu_facts().name.split())}"


def _lead(found: Quickstart, verdict: str) -> str:
    run = found.runs[0][0]
    num_tokens = [losses.num_tokens for _, losses in found.runs]
    rate = sum(num_tokens) / max(sum(sum(losses.steps_s) for _, losses in found.runs), 1e-9)
    parameters = max(model.num_parameters for model in found.evaluation.models)
    lead = (
        f"This machine trained {_number_of_models(found).lower()} small language models on the same text, in sequences "
        f"of {run.train.seq_len_tokens:,} tokens. They differ only in their positional encoding. Which of them works "
        "on sequences that are longer than in training?"
    )
    tiles = [
        (_with_prefix(parameters), "parameters per model"),
        (_with_prefix(max(num_tokens)), "training tokens per model"),
        (f"{rate:,.0f}", f"tokens per second, in {run.train.precision}"),
    ]
    if found.times.total_s:
        tiles.append((_duration(found.times.total_s), "from text to this page"))
    return paragraph(escape(lead), "lead") + f'<div class="verdict">{escape(verdict.strip())}</div>\n' + facts(tiles)


def _perplexity_section(found: Quickstart) -> str:
    models = found.evaluation.models
    lines = [
        Line(model.name, model.points, style, model.train_len_tokens, encoding=model.encoding)
        for style, model in enumerate(models)
    ]
    trained = models[0].train_len_tokens
    described = "; ".join(
        f"{line.name}: " + ", ".join(f"{value:.1f} at {length:,}" for length, value in line.points) for line in lines
    )
    chart = perplexity_chart(lines)
    svg = draw_svg(chart, f"Perplexity by sequence length in tokens. {described}. Training length: {trained:,}.")
    means, note = found.evaluation.protocol_means, f" {chart.note}." if chart.note else ""
    caption = f"Perplexity on held-out text. {means[:1].upper()}{means[1:]}.{note}"
    numbers = _numbers("sequence length, tokens", [line.points for line in lines], ",.2f", found, trained)
    key = "".join(
        f'<li class="s{style.colour}"><b>{escape(model.name)}</b>: {escape(ABOUT[model.name])}</li>\n'
        for style, model in zip(line_styles(lines), models, strict=True)
        if model.name in ABOUT
    )
    return (
        figure(svg, escape(caption))
        + details("The numbers", numbers)
        + (f'<ul class="key">\n{key}</ul>\n' if key else "")
    )


def _numbers(
    heading: str, points: Sequence[Sequence[tuple[float, float]]], form: str, found: Quickstart, marked: int = 0
) -> str:
    """Return a table of each model's values by x, with the row of `marked` highlighted."""
    by_x = [dict(each) for each in points]
    xs = sorted({x for values in by_x for x in values})
    rows = [[f"{x:,.0f}", *(f"{values[x]:{form}}" if x in values else "" for values in by_x)] for x in xs]
    kinds = ["trained" if x == marked else "" for x in xs]
    return table([heading, *(escape(model.name) for model in found.evaluation.models)], rows, kinds)


def _losses(found: Quickstart) -> str:
    losses_by_name = {
        model.name: losses for model, (_, losses) in zip(found.evaluation.models, found.runs, strict=True)
    }
    lines = [
        line._replace(encoding=model.encoding)
        for style, (model, item) in enumerate(zip(found.evaluation.models, losses_by_name.items(), strict=True))
        for line in loss_lines(*item, style)
    ]
    described = "; ".join(
        "{}: {:.3f} after {:,.0f} tokens".format(name, *reversed(losses.valid[-1]))
        for name, losses in losses_by_name.items()
        if losses.valid
    )
    low, high = _loss_range(lines)
    chart = Chart(lines, "training tokens", "loss, nats per token", (low, high), show_x=_with_prefix)
    summary = f"Training and validation loss against training tokens. Last validation losses: {described or 'none'}."
    cut = "; its first steps lie above the chart" if any(y > high for line in lines for _, y in line.points) else ""
    caption = (
        "Thick lines: validation loss, on held-out text. Thin lines: training loss, averaged over neighbouring "
        f"steps{cut}. Both use the sequence length of training."
    )
    numbers = _numbers("training tokens", [losses.valid for losses in losses_by_name.values()], ".3f", found)
    shown = details("The validation losses", numbers) if described else ""
    return figure(draw_svg(chart, summary), escape(caption)) + shown


def loss_lines(name: str, losses: RunLosses, style: int, max_points: int = 100) -> list[Line]:
    """Return chart lines: validation loss with the run's name, training loss as a line in the background.

    Args:
        name: name of the run.
        losses: metrics of the run.
        style: index of its colour.
        max_points: maximum points of the averaged training loss; without validations that line has the name.
    """
    averaged = average_steps(losses.train, max_points)
    if not losses.valid:
        return [Line(name, averaged, style)]
    return [Line(name, losses.valid, style), Line("", averaged, style)]


def _loss_range(lines: Sequence[Line]) -> tuple[float, float]:
    """Return limits around the named lines; the first training steps lie far above them."""
    named = [y for line in lines if line.name for _, y in line.points if math.isfinite(y)] or [0.0]
    everything = [y for line in lines for _, y in line.points if math.isfinite(y)] or [0.0]
    room = max(named) - min(named) or 1.0
    return min(everything) - 0.1 * room, min(max(everything) + 0.1 * room, max(named) + 0.5 * room)


def _segments(found: Quickstart) -> str:
    valid = found.valid
    passage = readable_passage(valid, found.tokenizer, PASSAGE_TOKENS)
    rule = valid.rule.spec
    where = f", here {SEGMENT_ENDS[rule]}," if rule in SEGMENT_ENDS else ""
    described = (
        f"A bilevel encoding splits text into segments{where} and gives every token two ids: the <b>inter id</b> is "
        "the number of its segment, the <b>intra id</b> its position inside that segment."
    )
    legend = (
        f'<div class="legend t0" aria-hidden="true">{token_box("token", "intra id", "inter id")}'
        f"<p>The inter id is above each token, the intra id below it. Each row is a segment.</p></div>\n"
    )
    source = (
        f"The beginning of document {passage.document} of the held-out text, split by the rule "
        f"<code>{escape(valid.rule.spec)}</code>. A dot stands for a space, ↵ for a line break. To show others: "
        f"<code>python tools/inspect_data.py show {escape(_quoted(valid.path))} --document N</code>"
    )
    return paragraph(described) + legend + segments_view(passage) + paragraph(source, "note")


def _generated(generated: str, prompts: Sequence[str]) -> str:
    described = (
        "A model this small, trained for minutes, has learned what its corpus looks like, not what it means."
        f"{' Prompts are in colour; the model generated the rest.' if prompts else ''}"
    )
    texts = "".join(
        f'<pre class="text">{f"<b>{_printable_html(prompt)}</b>" if prompt else ""}{_printable_html(rest)}</pre>\n'
        for prompt, rest in split_by_prompts(generated.strip("\n"), prompts)
    )
    return paragraph(escape(described)) + texts


def split_by_prompts(generated: str, prompts: Sequence[str]) -> list[tuple[str, str]]:
    """Split generated texts into (prompt, continuation); a prompt that is not found is skipped."""
    starts, begin = [], 0
    for prompt in prompts:
        at = 0 if not begin and generated.startswith(prompt) else generated.find(f"\n\n{prompt}", begin)
        if at >= 0:
            at += 0 if generated.startswith(prompt, at) else 2
            starts.append((at, prompt))
            begin = at + len(prompt)
    if not starts or starts[0][0] > 0:
        starts.insert(0, (0, ""))
    stops = [at for at, _ in starts[1:]] + [len(generated)]
    return [
        (prompt, generated[at + len(prompt) : stop].rstrip("\n"))
        for (at, prompt), stop in zip(starts, stops, strict=True)
    ]


def _sizes(found: Quickstart, machine: str) -> str:
    run, train, valid = found.runs[0][0], found.train.manifest, found.valid.manifest
    assert train.text_bytes is not None and valid.text_bytes is not None  # the quickstart makes them from text
    model, settings = run.model, run.train
    seen = found.runs[0][1].num_tokens
    sizes = [
        ("Machine", escape(machine)),
        ("Precision", escape(" and ".join(sorted({run.train.precision for run, _ in found.runs})))),
        (
            "Corpus",
            f"{_megabytes(train.text_bytes)} of text to train on ({train.num_documents:,} documents), "
            f"{_megabytes(valid.text_bytes)} held out ({valid.num_documents:,})",
        ),
        (
            "Tokenizer",
            f"{train.tokenizer.vocab_size:,} tokens, {train.text_bytes / max(train.num_tokens, 1):.1f} bytes each",
        ),
        ("Training data", f"{train.num_tokens:,} tokens in {train.num_segments:,} segments"),
        ("Held-out data", f"{valid.num_tokens:,} tokens in {valid.num_segments:,} segments"),
        ("Model", f"{model.num_layers} layers of width {model.hidden_size}, {model.num_heads} heads"),
        (
            "Training",
            f"{settings.steps:,} steps of {settings.global_batch:,} sequences of {settings.seq_len_tokens:,} tokens, "
            f"{seen / max(train.num_tokens, 1):.2g} epochs",
        ),
    ]
    rows = [
        [
            escape(m.name),
            f"{m.num_parameters:,}",
            f"{losses.step_s:.3f}",
            f"{losses.tokens_per_s:,.0f}",
            _duration(sum(losses.steps_s)),
        ]
        for m, (_, losses) in zip(found.evaluation.models, found.runs, strict=True)
    ]
    html = definitions(sizes) + table(["model", "parameters", "seconds per step", "tokens/s", "all steps"], rows)
    if found.times.steps_s:
        html += "<h3>Steps of the command</h3>\n" + bars(list(found.times.steps_s.items()), "{:,.1f} s")
    return html


def _next_steps(folder: Path) -> str:
    parts = "".join(
        f"<div>\n<h3>{escape(title)}</h3>\n{paragraph(escape(text))}"
        f"{commands(lines.strip().format(folder=_quoted(folder)))}</div>\n"
        for title, text, lines in NEXT_STEPS
    )
    paper = f'The method is from He et al., ICML 2024: <a href="{PAPER}">arXiv 2401.16421</a>. '
    inside = "The commands run in the project's folder, with its environment (<code>source .venv/bin/activate</code>)."
    return paragraph(paper + inside) + f'<div class="steps">\n{parts}</div>\n'


def _number_of_models(found: Quickstart) -> str:
    words = {1: "One", 2: "Two", 3: "Three", 4: "Four", 5: "Five", 6: "Six"}
    number = len(found.evaluation.models)
    return words.get(number, str(number))


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


def _printable_html(text: str) -> str:
    """Return text as HTML; unprintable characters are escaped."""
    return escape("".join(char if char in "\n\t" else printable(char) for char in text))


def _with_prefix(number: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g}"


def _megabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:,.2f} MB" if size_bytes < 1e7 else f"{size_bytes / 1e6:,.0f} MB"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d} min" if minutes else f"{rest} s"
