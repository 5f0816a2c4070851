"""BiPE language models for transformers 5; self-contained, because the weights are distributed with this code.

B batch · T new tokens · D width · V vocabulary · N query heads · G key/value heads · H head width
"""

import hashlib
import os
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GenericForSequenceClassification, GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import ModelOutput

from .configuration_bipe import BipeConfig
from .encodings_bipe import Encoding, Tables, biased_mask, encode
from .functional_bipe import NUM_T5_BUCKETS, rotate, sinusoids
from .positions_bipe import PositionIds, find_position_ids, read_cache_positions, real_tokens, write_cache_positions

Output = TypeVar("Output", bound=ModelOutput)


class BipeRMSNorm(nn.Module):
    """RMSNorm: x / rms(x) * weight."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        return F.rms_norm(hidden_BTD, self.weight.shape, self.weight, self.eps)


class BipeMLP(nn.Module):
    """Gated feed-forward layer: down(silu(gate x) * up x)."""

    def __init__(self, config: BipeConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(hidden_BTD)) * self.up_proj(hidden_BTD))


class BipeAttention(nn.Module):
    """Grouped-query attention through the implementation that transformers selects."""

    def __init__(self, config: BipeConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx, self.is_causal = config, layer_idx, True
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        width, head_dim = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(width, config.num_attention_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(width, config.num_key_value_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(width, config.num_key_value_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * head_dim, width, bias=False)
        if config.relative == "t5":
            self.relative_bias = nn.Embedding(NUM_T5_BUCKETS, config.num_attention_heads)

    def forward(
        self, hidden_BTD: Tensor, encoding: Encoding, mask: Tensor | None, past_key_values: Cache | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Return the attention output [B, T, D], and the weights [B, N, T, S] if the implementation computes them."""
        heads = (-1, self.head_dim)
        q_BNTH = self.q_proj(hidden_BTD).unflatten(-1, heads).transpose(1, 2)
        k_BGTH = self.k_proj(hidden_BTD).unflatten(-1, heads).transpose(1, 2)
        v_BGTH = self.v_proj(hidden_BTD).unflatten(-1, heads).transpose(1, 2)
        if encoding.query_scale is not None:
            q_BNTH = q_BNTH * encoding.query_scale.to(q_BNTH.dtype)
        if encoding.rotation is not None:
            for_queries, for_keys = encoding.rotation
            q_BNTH, k_BGTH = _rotate(q_BNTH, for_queries), _rotate(k_BGTH, for_keys)
        if past_key_values is not None:
            if self.layer_idx == 0 and encoding.cached is not None:
                k_BGTH = torch.cat((k_BGTH, _expand_channels(k_BGTH, encoding.cached)), dim=-1)
            k_BGTH, v_BGTH = past_key_values.update(k_BGTH, v_BGTH, self.layer_idx)
            k_BGTH = k_BGTH[..., : self.head_dim]
        if encoding.channels is not None:
            queries, keys = encoding.channels
            keys = F.pad(keys, (0, 0, 0, k_BGTH.shape[2] - keys.shape[2]))  # a new static cache has empty slots
            pad = (0, -(self.head_dim + queries.shape[-1]) % 8)
            q_BNTH = F.pad(torch.cat((_expand_channels(q_BNTH, queries), q_BNTH), dim=-1), pad)
            k_BGTH = F.pad(torch.cat((_expand_channels(k_BGTH, keys), k_BGTH), dim=-1), pad)
            v_BGTH = F.pad(v_BGTH, (0, q_BNTH.shape[-1] - self.head_dim))  # fused kernels require equal widths
        if encoding.buckets is not None and mask is not None:
            mask = biased_mask(self.relative_bias(encoding.buckets), mask)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, _eager_attention)
        scaling = self.head_dim**-0.5
        mixed_BTNH, weights = attend(self, q_BNTH, k_BGTH, v_BGTH, mask, dropout=0.0, scaling=scaling, **kwargs)
        return self.o_proj(mixed_BTNH[..., : self.head_dim].flatten(2)), weights


def _rotate(x_BNTH: Tensor, tables: Tables) -> Tensor:
    cos_B1TH, sin_B1TH = tables
    return rotate(x_BNTH, cos_B1TH.to(x_BNTH.dtype), sin_B1TH.to(x_BNTH.dtype))


def _expand_channels(x_BNTH: Tensor, channels: Tensor) -> Tensor:
    """Expand the channels to all heads, in the dtype of `x_BNTH`."""
    return channels.to(x_BNTH.dtype).expand(*x_BNTH.shape[:3], -1)


def _eager_attention(
    _module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, **_: Any
) -> tuple[Tensor, Tensor]:
    """Compute attention with plain matrix products and return its weights; transformers always passes a mask.

    Scores are fp32, also under autocast: with ALiBi's bias those of masked keys exceed the range of fp16, and those of
    other keys the precision of bf16. Masked scores are replaced, because a large bias would outweigh fp16's minimum.
    """
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    wide = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        scores = q.to(wide) @ k.to(wide).transpose(-1, -2) * scaling
        if mask is not None:
            masked = mask <= torch.finfo(mask.dtype).min
            scores = (scores + mask).masked_fill(masked, torch.finfo(wide).min)
        weights = F.softmax(scores, dim=-1).to(v.dtype)
    return (weights @ v).transpose(1, 2), weights


class BipeDecoderLayer(GradientCheckpointingLayer):
    """Transformer layer with pre-norm attention and feed-forward."""

    def __init__(self, config: BipeConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = BipeAttention(config, layer_idx)
        self.mlp = BipeMLP(config)
        self.input_layernorm = BipeRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = BipeRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden_BTD: Tensor,
        encoding: Encoding,
        mask: Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        attended, weights = self.self_attn(self.input_layernorm(hidden_BTD), encoding, mask, past_key_values, **kwargs)
        hidden_BTD = hidden_BTD + attended
        return hidden_BTD + self.mlp(self.post_attention_layernorm(hidden_BTD)), weights


class BipePreTrainedModel(PreTrainedModel):
    """Base class; transformers initialises matrices from N(0, initializer_range) and norms to one."""

    config: BipeConfig
    config_class = BipeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["BipeDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], is_main_process: bool = True, *args: Any, **kwargs: Any
    ) -> None:
        """Save as transformers does, with the code that the folder needs and the checksums of weights and code."""
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        if not is_main_process:
            return
        folder = Path(save_directory)
        lines = []
        for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*_bipe.py")]):
            with file.open("rb") as content:
                lines.append(f"{hashlib.file_digest(content, 'sha256').hexdigest()}  {file.name}\n")
        (folder / "SHA256SUMS").write_text("".join(lines), "utf-8")

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Resize as transformers does; the last row is then a token like any other, which is trained."""
        before = self.config.vocab_size
        resized: nn.Embedding = super().resize_token_embeddings(*args, **kwargs)
        if self.config.vocab_size != before and self.config.zero_last_row:
            self.config.zero_last_row = False
            for module in self.modules():
                if isinstance(module, nn.Embedding):
                    module.padding_idx = None
        return resized


class BipeModel(BipePreTrainedModel):
    """Embeddings, layers and final norm."""

    def __init__(self, config: BipeConfig) -> None:
        super().__init__(config)
        config.validate_architecture()
        width, unused_row = config.hidden_size, -1 if config.zero_last_row else None
        self.embed_tokens = nn.Embedding(config.vocab_size, width, unused_row)
        if config.absolute == "learned" and config.bilevel:
            self.embed_intra = nn.Embedding(config.intra_size, width, unused_row)
        elif config.absolute == "learned":
            self.embed_positions = nn.Embedding(config.train_len_tokens, width, unused_row)
        self.layers = nn.ModuleList(BipeDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = BipeRMSNorm(width, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """Return final hidden states [B, T, D] of the new tokens.

        `input_ids` excludes the tokens in `past_key_values`; `attention_mask` [B, S] covers the cached tokens too and
        is 0 at padding, which may be on the left, the right or both.

        Raises:
            ValueError: the arguments do not determine the positions of the tokens, or ask for weights that the
                attention implementation does not compute.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        if kwargs.get("position_ids") is not None:
            raise ValueError("position_ids are not accepted: positions are derived from input_ids and attention_mask")
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if output_attentions and self.config._attn_implementation != "eager":
            raise ValueError(
                f"output_attentions=True needs attn_implementation='eager', not {self.config._attn_implementation!r}, "
                "which does not compute the weights: model.set_attn_implementation('eager')"
            )
        recomputes = self.gradient_checkpointing and self.training
        if use_cache and past_key_values is None and not recomputes:
            past_key_values = DynamicCache(config=self.config)
        cached = read_cache_positions(past_key_values, self.config.head_dim, hidden.device)
        if cached is not None and recomputes:
            raise ValueError("gradient checkpointing cannot train on past_key_values: pass all tokens")
        real_BT = real_tokens(attention_mask, hidden, cached, past_key_values)
        position_ids = find_position_ids(self.config, input_ids, real_BT, cached)
        encoding = encode(self.config, position_ids, cached, attention_mask)
        if past_key_values is not None:
            encoding = encoding._replace(cached=write_cache_positions(position_ids))
        hidden = self._add_absolute_encoding(hidden, position_ids, real_BT)
        fused = encoding.buckets is None
        if not fused and self.config._attn_implementation not in ("sdpa", "eager"):
            raise ValueError(f"{self.config.encoding} adds a score bias: use attn_implementation='sdpa' or 'eager'")
        mask = create_causal_mask(self.config, hidden, attention_mask, past_key_values, allow_is_causal_skip=fused)
        states, attentions = [hidden], []
        for layer in self.layers:
            hidden, weights = layer(hidden, encoding, mask, past_key_values=past_key_values, **kwargs)
            states += [hidden] if output_hidden_states else []
            attentions += [weights] if output_attentions else []
        hidden = self.norm(hidden)
        result = BaseModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=past_key_values,
            hidden_states=(*states[:-1], hidden) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )
        return _returned(result, return_dict, self.config)

    def _add_absolute_encoding(self, hidden_BTD: Tensor, position_ids: PositionIds, real_BT: Tensor) -> Tensor:
        """Add the absolute part of the encoding to the hidden states."""
        config, position_BT = self.config, position_ids.intra
        if config.absolute == "sinusoidal":
            added_BTD = sinusoids(position_BT, config.hidden_size) * config.initializer_range
            return hidden_BTD + added_BTD.to(hidden_BTD.dtype)
        if config.absolute == "none":
            return hidden_BTD
        if config.bilevel:
            return hidden_BTD + self.embed_intra(position_BT.clamp(max=config.intra_size - 1))
        rows, position_BT = config.train_len_tokens, position_BT.where(real_BT, 0)
        if not torch.compiler.is_compiling() and int(position_BT.max()) >= rows:
            raise ValueError(f"{int(position_BT.max()) + 1} tokens exceed the {rows} rows of the learned embedding")
        return hidden_BTD + self.embed_positions(position_BT)


def _returned(result: Output, return_dict: bool | None, config: BipeConfig) -> Output | tuple[Any, ...]:
    return result if (config.return_dict if return_dict is None else return_dict) else result.to_tuple()


class BipeForSequenceClassification(BipePreTrainedModel):
    """Classifier of texts: a linear layer over the last token that is not padding, as in transformers' LLaMA."""

    def __init__(self, config: BipeConfig) -> None:
        super().__init__(config)
        self.num_labels: int = config.num_labels  # type: ignore[assignment]
        self.model = BipeModel(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]

    # Its constructor is not inherited: it would look the model up in the Auto classes, which may not know it.
    forward = GenericForSequenceClassification.forward


class BipeForCausalLM(BipePreTrainedModel, GenerationMixin):
    """Language model with an output projection."""

    # Applies only with tie_word_embeddings.
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012  (no ClassVar in its base)

    def __init__(self, config: BipeConfig) -> None:
        super().__init__(config)
        self.model = BipeModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None, past_key_values: Cache, **_: Any) -> Tensor | None:
        """Return the mask [B, S] for `generate` with a static cache, since position ids are derived from it.

        It is padded to the width of the cache, so that compiled code sees only one shape.
        """
        if attention_mask is None:
            return None
        return F.pad(attention_mask, (0, past_key_values.get_max_length() - attention_mask.shape[1]))

    def _get_static_cache_init_shape(self) -> None:
        """Return None, so that a static cache infers its shapes: layer 0's keys are wider than the others."""

    def bilevel_ids(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return intra-segment ids (clipped to the embedding, if there is one) and inter-segment ids, int64 [B, T].

        The first real token of a row starts its first segment; ids at padding are meaningless.

        Raises:
            ValueError: the encoding has no segments.
        """
        if not self.config.bilevel:
            raise ValueError(f"encoding {self.config.encoding!r} has no segments")
        real_BT = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        position_ids = find_position_ids(self.config, input_ids, real_BT.bool())
        intra = position_ids.intra
        if self.config.absolute == "learned":
            intra = intra.clamp(max=self.config.intra_size - 1)
        return intra, position_ids.inter

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Return logits [B, T, V]; with `labels` (int64 [B, T], -100: ignored) also the mean loss in nats per token."""
        loss_options = {k: kwargs.pop(k) for k in ("num_items_in_batch",) if k in kwargs}
        return_dict = kwargs.pop("return_dict", None)
        if labels is not None and use_cache is None:
            use_cache = False
        kwargs["return_dict"] = True
        outputs = self.model(input_ids, attention_mask, past_key_values, inputs_embeds, use_cache, **kwargs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **loss_options)
        result = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return _returned(result, return_dict, self.config)
