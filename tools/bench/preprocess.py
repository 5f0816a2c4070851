"""Preprocessing against what people use: `datasets.map` with the same tokenizer, and `tokenizers` by itself.

Every contender gets the same .jsonl.zst of Python library sources and runs in a process of its own; imports and
loading the tokenizer are timed for none. Medians of the repeats, which take turns.

Example: python tools/bench/preprocess.py --megabytes 20 --tokenizer llama_tokenizer
"""

import argparse
import logging
import os
import resource
import statistics
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import numpy as np
import orjson
import zstandard

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # tools/, where _cli is

from _cli import run_tool
from bench._machine import describe_machine
from megatron_bipe.data.tokenizer import load_tokenizer
from preprocessing.build import BuildOptions, build
from preprocessing.readers import parse_block, read_blocks
from preprocessing.train_tokenizer import TrainOptions, train_tokenizer

BATCH = 1000  # documents; the default of `datasets.map`
VOCAB_SIZE = 8000  # of the tokenizer trained here when none is given


class Job(NamedTuple):
    """One run of one contender."""

    corpus: Path
    tokenizer: Path
    output: Path
    workers: int


class Cost(NamedTuple):
    """What a run took, and the tokens it gave."""

    wall_s: float
    cpu_s: float  # of this process and its children
    tokens: int


def ours(job: Job) -> int:
    """Run tools/preprocess.py's library: zst in, shards, segment ends and manifest out."""
    options = BuildOptions([str(job.corpus)], str(job.tokenizer), job.output, segments="newline", workers=job.workers)
    return sum(manifest.num_tokens for manifest in build(options).values())


def ours_without_tokenizing(job: Job) -> int:
    """Read and parse alone: how little of the time is not the tokenizer's."""
    for block in read_blocks(job.corpus):
        parse_block(block, "text", None)
    return 0


def datasets_map(job: Job) -> int:
    """Load, batched map with the Hugging Face tokenizer, then all ids into one file."""
    import datasets
    from transformers import PreTrainedTokenizerFast

    datasets.disable_progress_bars()
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(job.tokenizer), bos_token="<s>")
    cache = str(job.output / "cache")
    data = datasets.load_dataset("json", data_files=str(job.corpus), split="train", cache_dir=cache)
    encoded = data.map(
        lambda batch: {"input_ids": tokenizer(batch["text"])["input_ids"]},
        batched=True,
        batch_size=BATCH,
        num_proc=job.workers if job.workers > 1 else None,
        remove_columns=data.column_names,
    )
    total = 0
    with (job.output / "tokens.bin").open("wb") as stream:
        for batch in encoded.with_format("numpy").iter(BATCH):
            for ids in batch["input_ids"]:
                stream.write(np.asarray(ids).astype(np.uint16).tobytes())
                total += len(ids)
    return total


def stock_tokenizers(job: Job) -> int:
    """`encode_batch` of the `tokenizers` library over texts in memory, on all cores; nothing is written."""
    import tokenizers

    backend = tokenizers.Tokenizer.from_file(str(job.tokenizer))
    return sum(len(e.ids) for part in _batches(job.corpus) for e in backend.encode_batch(part))


CONTENDERS: dict[str, tuple[Callable[[Job], int], int, bool]] = {  # what to run, workers, tokenizer on one core
    "preprocess.py, 1 worker": (ours, 1, True),
    "preprocess.py, 2 workers": (ours, 2, True),
    "datasets.map, 1 process, 1 thread": (datasets_map, 1, True),
    "datasets.map, 1 process, all cores": (datasets_map, 1, False),
    "datasets.map, 2 processes": (datasets_map, 2, True),
    "tokenizers.encode_batch, 1 thread": (stock_tokenizers, 1, True),
    "tokenizers.encode_batch, all cores": (stock_tokenizers, 1, False),
    "reading and parsing only": (ours_without_tokenizing, 1, True),
}
BASE = "datasets.map, 1 process, 1 thread"  # the ratios' denominator


def main() -> None:
    """Collect the corpus, run everyone in turn, print the table."""
    arguments = _parser().parse_args()
    logging.getLogger().setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus, text_bytes, documents = _collect(folder / "corpus.jsonl.zst", arguments.megabytes * 1e6)
        tokenizer = arguments.tokenizer or train_tokenizer(
            TrainOptions([str(corpus)], VOCAB_SIZE, folder / "tokenizer")
        )
        definition = load_tokenizer(tokenizer).definition
        costs: dict[str, list[Cost]] = {label: [] for label in CONTENDERS}
        for _ in range(arguments.repeats):
            for label in CONTENDERS:
                with tempfile.TemporaryDirectory(dir=folder) as output:
                    costs[label].append(_run_apart(label, corpus, definition, Path(output)))
    print(describe_machine("tokenizers", "datasets", "transformers"))
    print(f"{documents} documents, {text_bytes / 1e6:.1f} MB of text, median of {arguments.repeats} runs")
    _print_table(costs, text_bytes)


def _run_apart(label: str, corpus: Path, definition: Path, output: Path) -> Cost:
    receiver, sender = get_context("spawn").Pipe(duplex=False)
    process = get_context("spawn").Process(target=_timed, args=(label, corpus, definition, output, sender))
    process.start()
    sender.close()
    try:
        cost: Cost = receiver.recv()
    finally:
        process.join()
    return cost


def _timed(label: str, corpus: Path, definition: Path, output: Path, sender: Connection) -> None:
    run, workers, one_core = CONTENDERS[label]
    os.environ["TOKENIZERS_PARALLELISM"] = "false" if one_core else "true"
    logging.disable(logging.WARNING)
    if run is datasets_map:  # its imports take seconds
        import datasets
        import transformers

        datasets.disable_caching()
        transformers.logging.set_verbosity_error()
    load_tokenizer(definition)
    began_s, cpu_before_s = time.perf_counter(), _cpu_s()
    target = output / "made" if run is ours else output
    tokens = run(Job(corpus, definition, target, workers))
    sender.send(Cost(time.perf_counter() - began_s, _cpu_s() - cpu_before_s, tokens))


def _cpu_s() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _collect(file: Path, max_bytes: float) -> tuple[Path, int, int]:
    """Library sources of this interpreter, as lines of JSON; returns the file, bytes of text and documents."""
    text_bytes = documents = 0
    with file.open("wb") as raw, zstandard.ZstdCompressor().stream_writer(raw) as stream:
        for folder in (sysconfig.get_paths()["stdlib"], sysconfig.get_paths()["purelib"]):
            for source in sorted(Path(folder).rglob("*.py")):
                text = source.read_bytes()
                if text_bytes + len(text) > max_bytes:
                    break
                try:
                    line = orjson.dumps({"text": text.decode(), "meta": {"file": source.name}})
                except UnicodeDecodeError:
                    continue
                if b"<s>" in text or b"</s>" in text or b"<unk>" in text or not text:
                    continue  # the others take these for special tokens: the counts must be comparable
                stream.write(line + b"\n")
                text_bytes += len(text)
                documents += 1
    return file, text_bytes, documents


def _batches(corpus: Path) -> Iterator[list[str]]:
    for block in read_blocks(corpus):
        yield [document.text for document in parse_block(block, "text", None).documents]


def _print_table(costs: dict[str, list[Cost]], text_bytes: int) -> None:
    base_s = statistics.median(cost.wall_s for cost in costs[BASE])
    print(f"{'':36} {'MB/s':>8} {'ratio':>7} {'MB per CPU-s':>13} {'tokens':>12}")
    for label, runs in costs.items():
        wall_s = statistics.median(cost.wall_s for cost in runs)
        cpu_s = statistics.median(cost.cpu_s for cost in runs)
        rates = f"{text_bytes / 1e6 / wall_s:8.2f} {base_s / wall_s:7.2f} {text_bytes / 1e6 / cpu_s:13.2f}"
        print(f"{label:36} {rates} {runs[0].tokens or '':>12}")
    print(f"ratio: against {BASE}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=20.0, help="size of the corpus (default: %(default)s)")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="default: one of 8000 tokens, trained here")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="runs of each (default: %(default)s)")
    return parser


if __name__ == "__main__":
    run_tool(main)
