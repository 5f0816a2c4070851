"""Speed of perplexity and of generation against transformers.

    perplexity   this project's evaluator against LlamaForCausalLM (SDPA) in one call with input and labels, which holds
                 the logits of all tokens at once, in its own precision and again in fp32; by sequence length, over the
                 same sequences of random tokens in the same batches
    generation   the exported model's greedy `generate` in fp32, with both caches against none, on the same prompt

Contenders alternate; the figures are medians.

Example: python tools/bench/eval.py --set model.num_layers=12 --lengths 1024,8192,32768
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # tools/, where _cli is

from _cli import command
from bench._bench import describe_machine, make_dataset, median_seconds
from bench._models import PEER, SEGMENT_TOKENS, Prepare, device, make_peer, measure, native_precision
from megatron_bipe.config import ModelConfig, load_run_config
from megatron_bipe.data.dataset import TokenDataset
from megatron_bipe.eval.eval_model import EvalModel
from megatron_bipe.eval.perplexity import EvalSettings, evaluate_perplexity
from megatron_bipe.model import build_model
from megatron_bipe.runtime.hardware import DTYPES

SEPARATORS = (3, 5)
DYNAMIC, NO_CACHE = "dynamic cache", "no cache"
CACHES: dict[str, dict[str, Any]] = {
    DYNAMIC: {},
    "static cache": {"cache_implementation": "static"},
    NO_CACHE: {"use_cache": False},
}


@command
def main(argv: Sequence[str] | None) -> None:
    arguments = _parser().parse_args(argv)
    model, encodings = load_run_config(None, arguments.set).model, arguments.encodings.split(",")
    print(describe_machine("torch", "transformers"))
    print(f"{model.num_layers} blocks x {model.hidden_size}, {native_precision()}, {arguments.repeats} repeats")
    with tempfile.TemporaryDirectory() as name:
        folder, lengths = Path(name), [int(length) for length in arguments.lengths.split(",")]
        make_dataset(folder, max(lengths) + arguments.batch_tokens)
        for length in lengths:
            tokens = max(length, arguments.batch_tokens) // length * length
            contenders: dict[str, Prepare] = {
                encoding: partial(prepare_ours, model, encoding, folder, length, tokens) for encoding in encodings
            }
            if length <= arguments.peer_longest:
                contenders[PEER] = partial(prepare_peer, model, folder, length, tokens)
            found = measure(contenders, arguments.repeats)
            print(f"\nsequences of {length} tokens, {tokens} tokens per batch")
            for contender, (median_s, peak_gib) in found.items():
                ratio = f"{found[PEER].median_s / median_s:6.2f} x" if PEER in found else ""
                print(f"  {contender:32} {tokens / median_s:9.0f} tokens/s {peak_gib:7.2f} GiB {ratio}", flush=True)
    if arguments.new:
        for encoding in encodings:
            config = model.model_copy(update={"encoding": encoding})
            compare_generation(config, arguments.prompt, arguments.new, arguments.repeats)


def prepare_ours(model: ModelConfig, encoding: str, folder: Path, length: int, tokens: int) -> Callable[[], None]:
    """Set up one batch of `tools/evaluate.py perplexity`."""
    config, dataset = model.model_copy(update={"encoding": encoding}), TokenDataset(folder)
    eval_model = EvalModel(encoding, encoding, build_model(config), config, None, dataset.rule)
    settings = EvalSettings(
        max_tokens=tokens + 1, batch_tokens=tokens, device=str(device()), dtype=DTYPES[native_precision()]
    )
    return lambda: print(evaluate_perplexity(eval_model, dataset, length, settings).perplexity, file=sys.stderr)


def prepare_peer(model: ModelConfig, folder: Path, length: int, tokens: int) -> Callable[[], None]:
    """Set up the same sequences in one call of the peer, which computes the loss itself."""
    peer, dataset = make_peer(model, length).to(device(), DTYPES[native_precision()]).eval(), TokenDataset(folder)

    @torch.inference_mode()
    def evaluate() -> None:
        corpus = torch.from_numpy(dataset.tokens(0, tokens + 1).astype("int64")).to(device())
        sequences, labels = corpus[:-1].view(-1, length), corpus[1:].view(-1, length)
        print(float(peer(input_ids=sequences, labels=labels, shift_labels=labels).loss.exp()), file=sys.stderr)

    return evaluate


def compare_generation(config: ModelConfig, prompt_tokens: int, new_tokens: int, repeats: int) -> None:
    """Print the speed of each cache for a model with random weights, and whether all generate the same tokens."""
    from transformers.utils.logging import set_verbosity_error

    from megatron_bipe.hf import BipeConfig, BipeForCausalLM
    from megatron_bipe.hf.hf_config import DataFields, hf_settings

    set_verbosity_error()
    torch.manual_seed(0)
    settings = hf_settings(config, DataFields("[3,5]", SEPARATORS, None, {}), torch.float32) | {"model_type": "bipe"}
    model = BipeForCausalLM(BipeConfig(**settings)).eval()  # type: ignore[no-untyped-call]
    prompt = torch.randint(6, config.vocab_size, (1, prompt_tokens))
    prompt[:, ::SEGMENT_TOKENS] = SEPARATORS[0]
    outputs: dict[str, torch.Tensor] = {}

    def generate(cache: str, _: int) -> None:
        limits = {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens}
        outputs[cache] = model.generate(prompt, do_sample=False, **limits, **CACHES[cache])

    times_s = median_seconds({cache: partial(generate, cache) for cache in CACHES}, repeats)
    print(f"\ngeneration, {config.encoding}, fp32: {new_tokens} tokens after {prompt_tokens}")
    for cache, median_s in times_s.items():
        ratio = times_s[NO_CACHE] / median_s
        print(f"  {cache:32} {new_tokens / median_s:9.1f} tokens/s {ratio:6.2f} x", flush=True)
    same = all(torch.equal(output, outputs[DYNAMIC]) for output in outputs.values())
    print(f"  the generated tokens are {'the same' if same else 'DIFFERENT'}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, default = parser.add_argument, "(default: %(default)s)"
    overrides = ["model.num_layers=2"]
    add("--set", action="append", default=overrides, metavar="KEY=VALUE", help="default: 151M with two blocks")
    add("--lengths", default="1024,4096", metavar="N,N,...", help=f"sequence lengths in tokens {default}")
    add("--encodings", default="bipe_rope,bipe_alibi,rope", metavar="NAME,NAME,...", help=f"models {default}")
    add("--batch-tokens", type=int, default=8192, metavar="N", help=f"tokens per batch, at most {default}")
    add("--peer-longest", type=int, default=8192, metavar="N", help=f"longest sequence of the peer {default}")
    add("--prompt", type=int, default=512, metavar="N", help=f"prompt length in tokens {default}")
    add("--new", type=int, default=32, metavar="N", help=f"tokens to generate; 0: none {default}")
    add("--repeats", type=int, default=3, metavar="N", help=f"timed calls of each contender {default}")
    return parser


if __name__ == "__main__":
    sys.exit(main())
