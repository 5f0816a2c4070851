"""Generation with and without a cache, in tokens a second; a model of random weights, since weights do not matter here.

The peer is the same `generate` with use_cache=False. Where that would take too long, --plain-tokens measures it on so
many steps at the start and at the end of the sequence, and takes the mean of a step for all: a step's cost grows nearly
in proportion to the length.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from _machine import describe_machine
from transformers.utils.logging import set_verbosity_error

from megatron_bipe.config.schema import ModelConfig
from megatron_bipe.hf import BipeConfig, BipeForCausalLM
from megatron_bipe.hf.hf_config import DataFields, hf_settings

SEPARATORS = (3, 5)
CACHES: dict[str, dict[str, Any]] = {"dynamic cache": {}, "static cache": {"cache_implementation": "static"}}


def main() -> None:
    """Parse the command line, measure, and print a table for each encoding."""
    arguments = _parser().parse_args()
    set_verbosity_error()
    print(describe_machine("torch", "transformers"), f", {torch.get_num_threads()} threads", sep="")
    for encoding in arguments.encodings.split(","):
        _print_table(encoding, arguments)


def _print_table(encoding: str, arguments: argparse.Namespace) -> None:
    width = arguments.width
    config = ModelConfig(
        encoding=encoding, num_layers=arguments.layers, hidden_size=width, num_heads=width // 64, ffn_size=4 * width
    )
    torch.manual_seed(0)
    settings = hf_settings(config, DataFields("[3,5]", SEPARATORS, None, {}), torch.float32) | {"model_type": "bipe"}
    model = BipeForCausalLM(BipeConfig(**settings)).eval()
    prompt = torch.randint(6, config.vocab_size, (1, arguments.prompt))
    prompt[:, ::13] = SEPARATORS[0]
    new = arguments.new

    def generate(start: torch.Tensor, count: int, **options: Any) -> torch.Tensor:
        return model.generate(start, min_new_tokens=count, max_new_tokens=count, do_sample=False, **options)

    millions = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"\n{encoding}, {millions:.1f}M parameters, fp32: {new} tokens after {arguments.prompt}\n")
    outputs = {name: generate(prompt, new, **options) for name, options in CACHES.items()}  # warms up, too
    times = {
        name: _seconds(partial(generate, prompt, new, **options), arguments.repeats) for name, options in CACHES.items()
    }
    if arguments.plain_tokens is None:
        began_s = time.perf_counter()
        outputs["no cache"] = generate(prompt, new, use_cache=False)
        times["no cache"] = time.perf_counter() - began_s
    else:
        steps = arguments.plain_tokens
        ends = [prompt, outputs["dynamic cache"][:, :-steps]]
        plain = [_seconds(partial(generate, start, steps, use_cache=False), 1) for start in ends]
        times["no cache"] = sum(plain) / (2 * steps) * new
    same = all(torch.equal(output, outputs["dynamic cache"]) for output in outputs.values())
    print(f"{'':16} {'s':>9} {'tokens/s':>10} {'of no cache':>12}")
    for name, seconds in times.items():
        print(f"{name:16} {seconds:9.2f} {new / seconds:10.1f} {times['no cache'] / seconds:12.1f}")
    print(f"tokens of {', '.join(outputs)}: {'the same' if same else 'DIFFERENT'}", flush=True)


def _seconds(run: Callable[[], object], repeats: int) -> float:
    taken = []
    for _ in range(repeats):
        began_s = time.perf_counter()
        run()
        taken.append(time.perf_counter() - began_s)
    return median(taken)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, shown = parser.add_argument, "(default: %(default)s)"
    add("--encodings", default="bipe_rope", metavar="NAME,NAME,...", help=f"models {shown}")
    add("--layers", type=int, default=4, metavar="N", help=f"blocks {shown}")
    add("--width", type=int, default=256, metavar="N", help=f"hidden size; heads are 64 wide {shown}")
    add("--prompt", type=int, default=512, metavar="N", help=f"tokens of the prompt {shown}")
    add("--new", type=int, default=64, metavar="N", help=f"tokens to generate {shown}")
    add("--repeats", type=int, default=3, metavar="N", help=f"times with a cache; without, once {shown}")
    add("--plain-tokens", type=int, metavar="N", help="measure so many steps without a cache, twice (default: all)")
    return parser


if __name__ == "__main__":
    main()
