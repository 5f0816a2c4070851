"""Continue prompts with an exported model, through transformers' own `generate`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from _cli import (
    add_device_options,
    add_trust_option,
    check_model_folder,
    check_output_file,
    command,
    pick_device,
    pick_dtype,
)
from megatron_bipe.config import AUTO
from megatron_bipe.errors import writing


@command
def main(argv: Sequence[str] | None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, metavar="HF_DIR", help="folder made by tools/export_hf.py")
    parser.add_argument("--prompt", nargs="+", required=True, help="texts to continue")
    parser.add_argument("--max-new-tokens", type=int, default=60, help="default: %(default)s")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: greedy (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling (default: %(default)s)")
    add_device_options(parser, AUTO)
    add_trust_option(parser)
    parser.add_argument("--output", type=Path, help="also write the texts to this file")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    arguments = parser.parse_args(argv)
    if arguments.max_new_tokens < 1 or arguments.temperature < 0:
        parser.error("--max-new-tokens must be 1 or more, and --temperature 0 or more")
    if arguments.output:
        check_output_file(arguments.output, arguments.overwrite)
    check_model_folder(arguments.model)
    texts = continue_prompts(arguments)
    print("\n\n".join(texts))
    if arguments.output:
        with writing(arguments.output):
            arguments.output.write_text("\n\n".join(texts) + "\n", encoding="utf-8")


def continue_prompts(arguments: argparse.Namespace) -> list[str]:
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    from megatron_bipe.eval.generation import Sampling, continue_texts

    disable_progress_bar()
    set_verbosity_error()  # it warns about the training length, which these models may exceed
    device = pick_device(arguments.device)
    dtype = pick_dtype(arguments.dtype, device)
    sampling = Sampling(arguments.max_new_tokens, arguments.temperature, arguments.seed, device, dtype)
    return continue_texts(arguments.model, arguments.prompt, sampling, trust_remote_code=arguments.trust_remote_code)


if __name__ == "__main__":
    sys.exit(main())
