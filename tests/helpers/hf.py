"""Common parts of tests of Hugging Face models."""

import sentencepiece
import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from megatron_bipe.data.segments import SegmentRule, bilevel_ids, segment_ends, sequence_ends
from megatron_bipe.data.tokenizer import load_tokenizer
from megatron_bipe.hf.tokenizer_files import TokenizerSource
from tests.helpers.ranks import run_programs

PUBLISHED_ENCODINGS = ("bipe_rope", "bipe_alibi", "rope", "alibi")
# Logits reach about 10. Most seen: 2.1e-5 and, on another CPU, 5.1e-5, both BiPE-ALiBi with log_scale.
NEAR = {"rtol": 0, "atol": 1e-4}


def ids_of(tokens, config, rule=None):
    rule = rule or SegmentRule(spec="[3,5]", token_ids=(3, 5))
    ends = sequence_ends(segment_ends(tokens.numpy(), rule), rule)
    return tuple(torch.from_numpy(ids) for ids in bilevel_ids(ends, config.intra_clip))


def run_python(code, folder, tmp_path):
    """Run `code` with `folder` without importing our package; return the words of lines that start with ">"."""
    [ended] = run_programs(
        exec, [ISOLATED + code, {"folder": str(folder), "cache": str(tmp_path / "cache")}], tmp_path / "log"
    )
    assert ended.code == 0, ended.output
    return [word for line in ended.output.splitlines() if line.startswith("> ") for word in line[2:].split()]


# The cache of remote code is chosen when transformers is imported, which has happened; it may be on the path, too.
ISOLATED = """
import sys
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, dynamic_module_utils

if dynamic_module_utils.HF_MODULES_CACHE in sys.path:
    sys.path.remove(dynamic_module_utils.HF_MODULES_CACHE)
dynamic_module_utils.HF_MODULES_CACHE = cache
for name in [name for name in sys.modules if name.partition(".")[0] == "megatron_bipe"]:
    del sys.modules[name]
"""
WITHOUT_THE_PACKAGE = """
class Absent:
    def find_spec(self, name, *_):
        if name.split(".")[0] == "megatron_bipe":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
load = AutoModelForCausalLM.from_pretrained
"""


def source_of(folder, special_in_text=False):
    tokenizer = load_tokenizer(folder, special_in_text)
    more = (tokenizer.special_ids, tokenizer.encode_batch, tokenizer.special_in_text)
    return TokenizerSource(tokenizer.definition, tokenizer.to_json(), *more)


def sentencepiece_folder(folder, text_file):
    folder.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        input=str(text_file),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=500,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        minloglevel=2,
    )
    return folder


def byte_level_folder(folder, text_file):
    folder.mkdir()
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    tokenizer.train([str(text_file)], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
