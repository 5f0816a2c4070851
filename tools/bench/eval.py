"""Perplexity by window length: this project's evaluator, and the installed transformers' Llama in the usual loop.

All read the same windows of one dataset of random tokens, in the same batches, and take turns. The peer is
LlamaForCausalLM (SDPA) that gets windows as input and labels, so that its logits exist at once, in its own precision
and again in fp32.

Example: python tools/bench/eval.py --set model.num_layers=12 --lengths 1024,8192,32768
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # tools/, where _cli is

from _cli import command
from bench._device import device, native_precision
from bench._machine import describe_machine
from bench._peer import PEER, make_peer
from bench._random_data import make_dataset
from bench._turns import Prepare, take_turns
from megatron_bipe.config.load import load_run_config
from megatron_bipe.config.schema import ModelConfig
from megatron_bipe.data.dataset import TokenDataset
from megatron_bipe.eval.eval_model import EvalModel
from megatron_bipe.eval.perplexity import EvalSettings, evaluate_perplexity
from megatron_bipe.model.precision import DTYPES
from megatron_bipe.model.transformer import build_model


@command
def main(argv: Sequence[str] | None) -> None:
    """A table for each length."""
    arguments = _parser().parse_args(argv)
    model = load_run_config(None, arguments.set).model
    print(describe_machine("torch", "transformers"))
    print(f"{model.num_layers} blocks x {model.hidden_size}, {native_precision()}, {arguments.repeats} turns")
    with tempfile.TemporaryDirectory() as name:
        folder, lengths = Path(name), [int(length) for length in arguments.lengths.split(",")]
        make_dataset(folder, max(lengths) + arguments.batch_tokens)
        for length in lengths:
            tokens = max(length, arguments.batch_tokens) // length * length
            contenders: dict[str, Prepare] = {
                encoding: partial(prepare_ours, model, encoding, folder, length, tokens)
                for encoding in arguments.encodings.split(",")
            }
            if length <= arguments.peer_longest:
                contenders[PEER] = partial(prepare_peer, model, folder, length, tokens)
            found = take_turns(contenders, arguments.repeats)
            print(f"\nwindows of {length} tokens, {tokens} tokens a batch")
            for contender, turns in found.items():
                times = f"{found[PEER].median_s / turns.median_s:6.2f} x" if PEER in found else ""
                rate = tokens / turns.median_s
                print(f"  {contender:32} {rate:9.0f} tokens/s {turns.peak_gib:7.2f} GiB {times}", flush=True)


def prepare_ours(model: ModelConfig, encoding: str, folder: Path, length: int, tokens: int) -> Callable[[], None]:
    """One batch of `tools/evaluate.py perplexity`."""
    config, dataset = model.model_copy(update={"encoding": encoding}), TokenDataset(folder)
    eval_model = EvalModel(encoding, encoding, build_model(config), config, None, dataset.rule)
    settings = EvalSettings(
        max_tokens=tokens + 1, batch_tokens=tokens, device=str(device()), dtype=DTYPES[native_precision()]
    )
    return lambda: print(evaluate_perplexity(eval_model, dataset, length, settings).perplexity, file=sys.stderr)


def prepare_peer(model: ModelConfig, folder: Path, length: int, tokens: int) -> Callable[[], None]:
    """The same windows in one call of the model, which computes the loss itself."""
    peer, dataset = make_peer(model, length).to(device(), DTYPES[native_precision()]).eval(), TokenDataset(folder)

    @torch.inference_mode()
    def evaluate() -> None:
        corpus = torch.from_numpy(dataset.tokens(0, tokens + 1).astype("int64")).to(device())
        sequences, labels = corpus[:-1].view(-1, length), corpus[1:].view(-1, length)
        print(float(peer(input_ids=sequences, labels=labels, shift_labels=labels).loss.exp()), file=sys.stderr)

    return evaluate


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", action="append", default=["model.num_layers=2"], metavar="KEY=VALUE")
    parser.add_argument("--lengths", default="1024,4096", metavar="N,N,...")
    parser.add_argument("--encodings", default="bipe_rope,bipe_alibi,rope", metavar="NAME,NAME,...")
    parser.add_argument("--batch-tokens", type=int, default=8192, help="windows are batched up to so many tokens")
    parser.add_argument("--peer-longest", type=int, default=8192, help="longest window of the peer, in tokens")
    parser.add_argument("--repeats", type=int, default=3)
    return parser


if __name__ == "__main__":
    sys.exit(main())
