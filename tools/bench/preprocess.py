"""Speed and memory of preprocessing, against `tokenizers`, `sentencepiece`, `datasets.map` and Megatron's method.

Every contender reads the same .jsonl.zst in its own process; imports and loading the tokenizer are not timed. The slow
contenders get only the first part of the corpus, since their rate does not depend on the length. Contenders alternate;
the figures are medians.

Example: python tools/bench/preprocess.py --megabytes 190 --tokenizer llama_tokenizer --roots / --repeats 3
"""

import argparse
import io
import logging
import os
import resource
import statistics
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing import Pool, get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import orjson
import zstandard

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # tools/, where _cli is

from _cli import command
from bench._bench import collect_corpus, describe_machine
from megatron_bipe.data.tokenizer import load_tokenizer
from megatron_bipe.runtime.child_processes import leave_with_parent
from megatron_bipe.types import Document
from preprocessing import document_tokenizer
from preprocessing.build import BuildOptions, build
from preprocessing.document_tokenizer import CheckedBackend, Encoded, GigatokenBackend, StockBackend
from preprocessing.readers.documents import read_input
from preprocessing.readers.inputs import find_inputs
from preprocessing.readers.parse import Keys
from preprocessing.train_tokenizer import TrainOptions, train_tokenizer

BATCH = 1000  # documents; the default of `datasets.map`
VOCAB_SIZE = 8000  # of the tokenizer that is trained if none is given


class Job(NamedTuple):
    """Inputs of one run of one contender."""

    corpus: Path
    tokenizer: Path
    output: Path
    workers: int


class Cost(NamedTuple):
    """Time and memory of a run, and the number of tokens that it produced."""

    wall_s: float
    cpu_s: float  # of the process and its children
    peak_mb: float  # of the largest process
    tokens: int


def ours(job: Job, **more: Any) -> int:
    options = BuildOptions([str(job.corpus)], str(job.tokenizer), job.output / "made", workers=job.workers, **more)
    return sum(manifest.num_tokens for manifest in build(options).values())


def ours_without_tokenizer(job: Job) -> int:
    """Run `ours` with a tokenizer that takes no time and returns one id for every 3.7 characters."""

    class Instant:
        def encode(self, texts: Sequence[str]) -> Encoded:
            counts = [len(text) * 10 // 37 for text in texts]
            return Encoded(np.full(sum(counts), 1000, np.uint32), np.cumsum([0, *counts]))

    instant = CheckedBackend(Instant(), Instant(), 0.0)
    with mock.patch.object(document_tokenizer, "open_backend", return_value=instant):
        return ours(job, backend="stock")


def tokenizer_alone(kind: str, job: Job) -> int:
    """Run a backend over texts in memory, in the blocks of a worker."""
    tokenizer = load_tokenizer(job.tokenizer)
    backend = GigatokenBackend(tokenizer, False) if kind == "gigatoken" else StockBackend(tokenizer)
    return sum(backend.encode([document.text for document in part]).tokens_T.size for part in _parts(job.corpus))


def encode_batch(job: Job) -> int:
    """Run `encode_batch` of the `tokenizers` library over texts in memory; nothing is written."""
    import tokenizers

    backend = tokenizers.Tokenizer.from_file(str(job.tokenizer))
    parts = _parts(job.corpus)
    return sum(len(e.ids) for part in parts for e in backend.encode_batch([document.text for document in part]))


def sentence_piece(job: Job) -> int:
    """Run `sentencepiece` over texts in memory; nothing is written."""
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(job.tokenizer.with_name("tokenizer.model")))
    return sum(len(model.encode(document.text)) + 1 for part in _parts(job.corpus) for document in part)


def datasets_map(job: Job) -> int:
    """Map batches with the Hugging Face tokenizer, as the authors do, and write all ids to one file."""
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


def megatron_style(job: Job) -> int:
    """Send lines to a pool of processes, and write their ids with megatron-core's dataset builder."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(job.output / "made.bin"), dtype=np.uint16)
    total = 0
    with Pool(job.workers, initializer=_start_encoder, initargs=(job.tokenizer,)) as pool:
        for ids in pool.imap(_encode_line, _lines(job.corpus), 32):
            builder.add_document(ids, [len(ids)])
            total += len(ids)
    builder.finalize(str(job.output / "made.idx"))
    return total


_encoder: Any = None  # in a process of the pool above


def _start_encoder(definition: Path) -> None:
    leave_with_parent()
    import tokenizers

    globals()["_encoder"] = tokenizers.Tokenizer.from_file(str(definition))


def _encode_line(line: bytes) -> list[int]:
    ids: list[int] = _encoder.encode(orjson.loads(line)["text"]).ids
    return ids


def _lines(corpus: Path) -> Iterator[bytes]:
    with corpus.open("rb") as raw:
        yield from io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(raw))


class Contender(NamedTuple):
    """Function and number of workers of a contender."""

    run: Callable[[Job], int]
    workers: int = 1
    is_fast: bool = False  # then it reads the complete corpus


CONTENDERS = {
    "preprocess.py, 1 worker": Contender(ours, 1, True),
    "preprocess.py, 2 workers": Contender(ours, 2, True),
    "  its tokenizer alone (gigatoken)": Contender(partial(tokenizer_alone, "gigatoken"), 1, True),
    "  without the tokenizer": Contender(ours_without_tokenizer, 1, True),
    "  --backend stock": Contender(partial(ours, backend="stock")),
    "tokenizers, encode_batch": Contender(encode_batch),
    "tokenizers, one text per call": Contender(partial(tokenizer_alone, "stock")),
    "sentencepiece": Contender(sentence_piece),
    "datasets.map, 1 process": Contender(datasets_map),
    "datasets.map, 2 processes": Contender(datasets_map, 2),
    "Megatron's method, 1 process": Contender(megatron_style),
    "Megatron's method, 2 processes": Contender(megatron_style, 2),
}
BASE = "tokenizers, encode_batch"  # ratios are relative to its rate


@command
def main(argv: Sequence[str] | None) -> None:
    arguments = _parser().parse_args(argv)
    logging.getLogger().setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        roots = arguments.roots or [Path(sysconfig.get_paths()[key]) for key in ("stdlib", "purelib")]
        megabytes = {True: arguments.megabytes, False: min(arguments.megabytes, arguments.peer_megabytes)}
        files = {True: folder / "corpus.jsonl.zst", False: folder / "part.jsonl.zst"}
        sizes = {is_fast: collect_corpus(files[is_fast], roots, megabytes[is_fast] * 1e6) for is_fast in files}
        tokenizer = arguments.tokenizer or train_tokenizer(
            TrainOptions([str(files[False])], VOCAB_SIZE, folder / "tokenizer")
        )
        definition = load_tokenizer(tokenizer).definition
        costs: dict[str, list[Cost]] = {label: [] for label in CONTENDERS}
        for _ in range(arguments.repeats):
            for label, contender in CONTENDERS.items():
                with tempfile.TemporaryDirectory(dir=folder) as output:
                    costs[label].append(_run_in_process(label, files[contender.is_fast], definition, Path(output)))
    print(describe_machine("gigatoken", "tokenizers", "sentencepiece", "datasets", "megatron-core"))
    print(
        f"{sizes[True] / 1e6:.1f} MB of text, {sizes[False] / 1e6:.1f} MB for the slow; median of {arguments.repeats}"
    )
    _print_table(costs, sizes)


def _run_in_process(label: str, corpus: Path, definition: Path, output: Path) -> Cost:
    receiver, sender = get_context("spawn").Pipe(duplex=False)
    process = get_context("spawn").Process(target=_timed, args=(label, corpus, definition, output, sender))
    process.start()
    sender.close()
    try:
        cost: Cost = receiver.recv()
    except BaseException:
        process.terminate()
        raise
    finally:
        process.join()
    return cost


def _timed(label: str, corpus: Path, definition: Path, output: Path, sender: Connection) -> None:
    leave_with_parent()
    contender = CONTENDERS[label]
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    logging.disable(logging.WARNING)
    if contender.run is datasets_map:  # its imports take seconds and are not timed
        import datasets
        import transformers

        datasets.disable_caching()
        transformers.logging.set_verbosity_error()
    elif contender.run is megatron_style:
        import megatron.core.datasets.indexed_dataset  # noqa: F401
    GigatokenBackend(load_tokenizer(definition), False).encode(["warm"])
    began_s, cpu_before_s = time.perf_counter(), _usage()[0]
    tokens = contender.run(Job(corpus, definition, output, contender.workers))
    cpu_s, peak_mb = _usage()
    sender.send(Cost(time.perf_counter() - began_s, cpu_s - cpu_before_s, peak_mb, tokens))


def _usage() -> tuple[float, float]:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in usages), max(u.ru_maxrss for u in usages) / 1e3


def _parts(corpus: Path) -> Iterator[list[Document]]:
    (item,) = find_inputs([str(corpus)])
    return (parsed.documents for parsed in read_input(item, Keys()))


def _print_table(costs: dict[str, list[Cost]], sizes: dict[bool, int]) -> None:
    per_core = {
        label: sizes[CONTENDERS[label].is_fast] / 1e6 / statistics.median(cost.cpu_s for cost in runs)
        for label, runs in costs.items()
    }
    print(f"{'':36} {'MB/s':>7} {'MB per CPU-s':>13} {'ratio':>7} {'peak MB':>8} {'tokens':>12}")
    for label, runs in costs.items():
        rate = sizes[CONTENDERS[label].is_fast] / 1e6 / statistics.median(cost.wall_s for cost in runs)
        peak_mb = max(cost.peak_mb for cost in runs)
        figures = f"{rate:7.2f} {per_core[label]:13.2f} {per_core[label] / per_core[BASE]:7.2f} {peak_mb:8.0f}"
        print(f"{label:36} {figures} {runs[0].tokens:>12}")
    print(f"ratio: MB per CPU-second relative to {BASE}")
    ideal = 1 / (1 / per_core["  its tokenizer alone (gigatoken)"] + 1 / per_core["  without the tokenizer"])
    share = per_core["preprocess.py, 1 worker"] / ideal
    print(
        f"1 worker reaches {share:.0%} of the rate that follows from the times of its tokenizer and of all else alone"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--megabytes", type=float, default=20.0, metavar="MB", help="size of the corpus (default: %(default)s)")
    add(
        "--peer-megabytes", type=float, default=20.0, metavar="MB", help="part for the slow ones (default: %(default)s)"
    )
    add("--roots", type=Path, nargs="+", metavar="DIR", help="folders to search for text (default: Python's libraries)")
    add("--tokenizer", type=Path, metavar="DIR", help="default: one with 8000 tokens, trained on the corpus")
    add("--repeats", type=int, default=3, metavar="N", help="runs of each (default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
