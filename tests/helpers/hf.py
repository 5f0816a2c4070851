"""Common parts of tests of Hugging Face models."""

import torch

from megatron_bipe.data.segments import SegmentRule, bilevel_ids, segment_ends, sequence_ends

PUBLISHED_ENCODINGS = ("bipe_rope", "bipe_alibi", "rope", "alibi")
# Logits reach about 10. Most seen: 2.1e-5 and, on another CPU, 5.1e-5, both BiPE-ALiBi with log_scale.
NEAR = {"rtol": 0, "atol": 1e-4}


def ids_of(tokens, config, rule=None):
    rule = rule or SegmentRule(spec="[3,5]", token_ids=(3, 5))
    ends = sequence_ends(segment_ends(tokens.numpy(), rule), rule)
    return tuple(torch.from_numpy(ids) for ids in bilevel_ids(ends, config.intra_clip))
