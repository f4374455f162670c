"""Native Sparse Attention in transformers (extra `hf`): importing this module registers config and models with Auto*.

    import nsa_compile.hf
    model = AutoModelForCausalLM.from_config(nsa_compile.hf.NsaConfig(dim=512, n_heads=16, ...))

A padded batch comes with `attention_mask` [b, t], its rows padded on the left or the right. Packed sequences come as
the library's collator passes them: `position_ids` that start anew, or `cu_seq_lens_q`. `generate` decodes through an
`NsaCache`: an `NSACache` with the interface of a transformers cache.
"""

import copy
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from nsa_compile.graphs.cache import NSACache, key_dtype
from nsa_compile.hf_config import CACHE, NsaConfig
from nsa_compile.hf_generation import NsaGeneration
from nsa_compile.model import NORM_EPS, LlamaBlockNSA, NSALanguageModel
from nsa_compile.module import MLPCompressor, impl_of, set_impl
from nsa_compile.ops.checks import check_tensor, has_shape, values_are_visible
from nsa_compile.rows import can_look, lay_out

ROOM = 128
"""Least capacity of a cache that a model makes by itself; it doubles when it is full."""


class NsaCache(Cache):
    """An `NSACache` that transformers' `generate` can drive, for `batch` rows of `capacity` tokens, padding counted.

    In eager calls it grows when it is full; `generate` makes it as long as its call needs, so that it stays where it
    is. Rows follow beams (`reorder_cache`); tokens are not taken back, so assisted decoding is refused by the library.
    """

    is_compileable = True
    is_croppable = False
    is_initialized = True

    def __init__(self, model: PreTrainedModel, batch: int, capacity: int) -> None:
        super().__init__(layers=[])
        parts = model.modules() if isinstance(model, nn.Module) else ()
        found = next((part for part in parts if isinstance(part, NsaModel)), None)
        if found is None:
            raise TypeError(f"model: expected an NsaModel or NsaForCausalLM, got {type(model).__name__}")
        self._model = found
        self._placement = _placement(model)
        self.nsa = self._allocate(batch, capacity)
        with torch.inference_mode(False):
            self.columns = torch.zeros(1, dtype=torch.int64, device=self.nsa.positions.device)
        torch._dynamo.mark_static_address(self.columns)

    def _allocate(self, batch: int, capacity: int) -> NSACache:
        dtype, _ = self._placement
        return NSACache.for_model(self._model, batch, capacity, dtype=dtype, device=_single_device(self._model))

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """As of an `NSACache`: it goes on with the same model, or with one copied before it in the same call."""
        other = copy.copy(self)
        other._model = memo.get(id(self._model), self._model)
        other.nsa = copy.deepcopy(self.nsa, memo)
        with torch.inference_mode(False):
            other.columns = copy.deepcopy(self.columns, memo)
        return other

    def __len__(self) -> int:
        return len(self.nsa.layers)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(layers={len(self)}, batch={self.nsa.batch}, capacity={self.nsa.capacity})"

    @property
    def batch_size(self) -> int:
        """Rows."""
        return self.nsa.batch

    @property
    def is_sliding(self) -> list[bool]:
        """False for every layer."""
        return [False] * len(self)

    @property
    def is_linear(self) -> list[bool]:
        """False for every layer."""
        return [False] * len(self)

    @property
    def is_dummy(self) -> list[bool]:
        """False for every layer."""
        return [False] * len(self)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns fed so far, padding counted; a look at the device."""
        return int(self.columns)

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """The capacity."""
        return self.nsa.capacity

    get_max_cache_shape = get_max_length  # its name in earlier versions

    def get_mask_sizes(self, query_length: Any, layer_idx: int = 0) -> tuple[int, int]:
        """Length and offset of the keys."""
        return self.nsa.capacity, 0

    def reset(self) -> None:
        """Empty all rows."""
        self.nsa.reset()
        self.columns.zero_()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row i continue what row `beam_idx[i]` holds."""
        for tensor in self.nsa.tensors():
            tensor.copy_(tensor.index_select(0, beam_idx.to(tensor.device)))

    def crop(self, tokens_to_remove: int) -> None:
        """Refused, but for no tokens."""
        if tokens_to_remove:
            raise ValueError(f"{CACHE}: expected no crop (no tokens are taken back), got one by {tokens_to_remove}")

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Refused."""
        raise ValueError(f"{CACHE}: expected as many rows as it was made for, got {repeats} times as many")

    def batch_select_indices(self, indices: Tensor) -> None:
        """Refused."""
        raise ValueError(f"{CACHE}: expected as many rows as it was made for, got a selection of them")

    def make_room(self, t: int) -> None:
        """Count t more columns on the host, and grow where they do not fit."""
        held = max(self.nsa.host_lengths)
        if held + t > self.nsa.capacity:
            grown = self._allocate(self.nsa.batch, max(held + t, 2 * self.nsa.capacity))
            for new, old in zip(grown.tensors(), self.nsa.tensors(), strict=True):
                # what is in order stays in order, and a ring keeps its length
                (new[:, : old.shape[1]] if old.ndim == 4 else new).copy_(old)
            for layer in grown.layers:  # of a row that compiled calls drove past its capacity tokens are missing
                lost = layer.positions > self.nsa.capacity
                layer.positions.masked_fill_(lost, torch.iinfo(torch.int32).max)
            grown.host_lengths, grown.host_peaks = self.nsa.host_lengths, self.nsa.host_peaks
            self.nsa = grown
        self.nsa.reserve(t)

    def check_mask(self, mask: Tensor) -> None:
        """Raise ValueError for a mask [batch, n] of the cached columns that keeps other tokens than the cache holds."""
        kept, held = (mask != 0).sum(1), self.nsa.positions
        if not has_shape(kept, *held.shape):
            raise ValueError(f"{CACHE}: expected one of {len(kept)} rows as attention_mask has, got {len(held)}")
        message = f"attention_mask: expected as many tokens in the first {mask.shape[1]} columns as the cache holds"
        if not can_look(held):
            torch._assert_async((kept == held).all(), message)
        elif not (kept == held.to(kept.device)).all():
            raise ValueError(f"{message}, {held.tolist()} in its rows, got {kept.tolist()}")

    def count_columns(self) -> int:
        """Take the columns from the device, where compiled calls count them; returns how many there are."""
        held = self.get_seq_length()
        self.nsa.host_lengths = [held] * self.nsa.batch
        return held

    def serves(self, batch: int, capacity: int, model: PreTrainedModel) -> bool:
        """Whether it can be used again for another call of `generate`."""
        return self.nsa.batch == batch and self.nsa.capacity >= capacity and self._placement == _placement(model)


def _placement(model: PreTrainedModel) -> tuple[torch.dtype, set[torch.device]]:
    """Type of the keys and values that a model computes, and the devices of its weights."""
    kind = (_single_device(model) or model.device).type
    return key_dtype(model, kind), {parameter.device for parameter in model.parameters()}


def _single_device(model: nn.Module) -> torch.device | None:
    """Where all layers of a model compute, if their weights lie elsewhere until they do (offloading); else None."""
    if all(parameter.device.type != "meta" for parameter in model.parameters()):
        return None
    hooks: list[Any] = [getattr(module, "_hf_hook", None) for module in model.modules()]
    places = (getattr(hook, "execution_device", None) for hook in hooks)
    return torch.device(next((place for place in places if place is not None), "meta"))


class NsaBlock(GradientCheckpointingLayer, LlamaBlockNSA):
    """`LlamaBlockNSA` with the library's gradient checkpointing."""


class NsaPreTrainedModel(PreTrainedModel):
    """What `NsaModel` and `NsaForCausalLM` share."""

    config_class = NsaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["NsaBlock"]  # noqa: RUF012
    _can_compile_fullgraph = True
    impl = property(impl_of, set_impl, doc="The implementation that its layers run; see `nsa_compile.set_impl`.")

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any
    ) -> Any:
        """The library's; missing weights other than the head's are a ValueError, unless the loading info is wanted."""
        path = pretrained_model_name_or_path
        model, info = super().from_pretrained(path, *args, output_loading_info=True, **kwargs)
        if output_loading_info:
            return model, info
        missing = sorted(name for name in info["missing_keys"] if not name.startswith("lm_head."))
        if missing and path is not None:
            raise ValueError(
                f"pretrained_model_name_or_path: expected all weights of the config in {path}, got none for "
                f"{len(missing)} of its parameters: {', '.join(missing[:3])}"
            )
        return model

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As `NSALanguageModel.reset_parameters`, with biases of 0.

        The library asks for modules with weights of their own only, so a layer knows its width itself.
        """
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=getattr(module, "initial_std", 0.02))
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, (nn.RMSNorm, nn.Conv1d, MLPCompressor)):
            module.reset_parameters()


class NsaModel(NsaPreTrainedModel):
    """Embedding, blocks and RMSNorm of an `NSALanguageModel`."""

    def __init__(self, config: NsaConfig) -> None:
        super().__init__(config)
        sizes = config.sizes()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(NsaBlock(config=sizes) for _ in range(config.n_layers))
        self.norm = nn.RMSNorm(config.dim, eps=NORM_EPS)
        for name, module in self.layers.named_modules():
            if name.endswith((".out", ".down")):  # they write to the residual stream
                module.initial_std = 0.02 / (2 * config.n_layers) ** 0.5
            elif name.endswith(".fc2"):  # gates and φ start even
                module.initial_std = 0.0
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None, cache: NsaCache | None = None, inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None, output_hidden_states: bool | None = None,
        output_attentions: bool | None = None, cu_seq_lens_q: Tensor | None = None,
        past_key_values: NsaCache | None = None, **kwargs: Any,
    ) -> BaseModelOutputWithPast:  # fmt: skip
        """Hidden states of the next tokens.

        Args:
            input_ids, inputs_embeds: int [b, t] or float [b, t, dim], one of them.
            attention_mask: [b, t], 0 for padding on the left or right of a row; with a cache also [b, past + t], with
                as many tokens in the past columns as the cache holds.
            position_ids: [b, t]. Without a cache a sequence begins wherever they do not count on; in a compiled call
                leave out the mask then, also one of ones.
            cache, past_key_values: an `NsaCache` that the tokens continue, under either of its names.
            use_cache: True without a cache: make one and return it. The config's `use_cache` does not ask for one.
            output_hidden_states: return the inputs of all blocks and the last hidden state.
            output_attentions: must not be True: no attention weights are there.
            cu_seq_lens_q: int32 or int64 [N + 1], ends of packed sequences, for b = 1.
            kwargs: what the library passes besides, ignored.

        Raises: ValueError or TypeError naming the argument, before anything is written.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids: expected exactly one of input_ids and inputs_embeds")
        name, tokens = ("input_ids", input_ids) if inputs_embeds is None else ("inputs_embeds", inputs_embeds)
        tokens = check_tensor(name, tokens)
        axes = "" if inputs_embeds is None else ", dim"
        if tokens.ndim != (3 if axes else 2) or 0 in tokens.shape:
            raise ValueError(f"{name}: expected shape [b, t{axes}] with b, t >= 1, got {tuple(tokens.shape)}")
        if output_attentions or (output_attentions is None and self.config.output_attentions):
            raise ValueError("output_attentions: expected False (no attention weights are computed), got True")
        b, t = tokens.shape[:2]
        vocab = self.embed_tokens.num_embeddings
        if inputs_embeds is None and values_are_visible(tokens) and not 0 <= tokens.min() <= tokens.max() < vocab:
            low, high = (int(x) for x in tokens.aminmax())
            raise ValueError(f"input_ids: expected values in 0 … {vocab - 1}, got {low} … {high}")
        cache = past_key_values if cache is None else cache
        if isinstance(cache, NSACache):  # from `generate`, `DecodeGraph` and the like
            raise TypeError("model: expected an NSALanguageModel, e.g. by to_language_model(), got one of transformers")
        if cache is not None and not isinstance(cache, NsaCache):
            raise TypeError(f"{CACHE}: expected an NsaCache, as generate makes it, got {type(cache).__name__}")
        rows = lay_out(b, t, attention_mask, position_ids, cu_seq_lens_q, cache is not None)
        if cache is not None and attention_mask is not None and attention_mask.shape[1] > t:
            cache.check_mask(attention_mask[:, :-t])
        if cache is None and use_cache:
            cache = NsaCache(self, b, max(t, ROOM))
        if cache is not None and not torch.compiler.is_compiling():
            cache.make_room(t)

        x = rows.arrange(tokens)
        x = self.embed_tokens(x) if inputs_embeds is None else x
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        hidden_states = []
        for layer in self.layers:
            hidden_states.append(x)
            x = layer(x, cache=None if cache is None else cache.nsa, cu_seqlens=rows.cu_seqlens, lengths=rows.lengths)
        x = rows.restore(self.norm(x), b)
        if cache is not None:
            cache.columns.add_(t)
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            hidden_states=(*(rows.restore(h, b) for h in hidden_states), x) if wanted else None,
            **{CACHE: cache},
        )


class NsaForCausalLM(NsaGeneration, NsaPreTrainedModel, GenerationMixin):
    """`NSALanguageModel` for transformers: `generate`, `Trainer`, `from_pretrained` and the rest of the library."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: NsaConfig) -> None:
        super().__init__(config)
        self.model = NsaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
        self._generation_cache: NsaCache | None = None
        self.post_init()

    @can_return_tuple
    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None, cache: NsaCache | None = None, inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None, use_cache: bool | None = None, logits_to_keep: int | Tensor = 0,
        past_key_values: NsaCache | None = None, **kwargs: Any,
    ) -> CausalLMOutputWithPast:  # fmt: skip
        """Logits of the next tokens, and with `labels` int64 [b, t] (-100: none) their mean cross-entropy.

        Arguments as in `NsaModel.forward`, and `logits_to_keep`: columns, or the number of last columns that get
        logits, all by default; of a row padded on the right, those of its last tokens.
        """
        if labels is not None:
            check_tensor("labels", labels)
        outputs = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, inputs_embeds=inputs_embeds,
            use_cache=use_cache, cache=past_key_values if cache is None else cache, **kwargs | {"return_dict": True},
        )  # fmt: skip
        x = outputs.last_hidden_state
        if isinstance(logits_to_keep, Tensor):
            x = x[:, logits_to_keep]
        elif logits_to_keep and attention_mask is not None and x.shape[1] > 1:
            t = x.shape[1]
            padding = (attention_mask[:, -t:] != 0).flip(1).to(torch.int32).argmax(1)  # on the right
            columns = t - padding[:, None] + torch.arange(-min(logits_to_keep, t), 0, device=x.device)
            x = x.gather(1, columns.clamp_min(0)[..., None].expand(-1, -1, x.shape[-1]))
        elif logits_to_keep:
            x = x[:, -logits_to_keep:]
        logits = self.lm_head(x)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, **{CACHE: getattr(outputs, CACHE)}
        )

    def free_cache(self) -> None:
        """Give back the memory of the cache that `generate` keeps for its next call."""
        self._generation_cache = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_generation_cache": None}

    @staticmethod
    def create_masks_for_generate(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
        """The mask as it is: no mask of four axes is made."""
        return attention_mask

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, *args: Any, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """The library's, with a mask for the new tokens only: all decode steps then have one shape.

        Without a cache, where new tokens come behind the padding on the right of a row, padding goes to the left.
        """
        inputs = super().prepare_inputs_for_generation(input_ids, *args, inputs_embeds=inputs_embeds, **kwargs)
        mask = inputs.get("attention_mask")
        if mask is not None:
            tokens = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
            inputs["attention_mask"] = mask[:, -tokens.shape[1] :].clone(memory_format=torch.contiguous_format)
        if mask is not None and inputs.get(CACHE) is None:
            order = inputs["attention_mask"].argsort(dim=1, stable=True)
            for name in ("input_ids", "inputs_embeds", "attention_mask"):
                x = inputs.get(name)
                if x is not None:
                    inputs[name] = x.gather(1, order.view(*order.shape, *(1,) * (x.ndim - 2)).expand_as(x))
            inputs["position_ids"] = None  # the library's count on from the padding's
        return inputs

    def _prefill(self, input_ids: Tensor, generation_config: Any, model_kwargs: dict, *args: Any, **kwargs: Any) -> Any:
        mask = model_kwargs.get("attention_mask")
        if mask is not None and generation_config.prefill_chunk_size is not None and not mask[:, -1].all():
            raise ValueError("prefill_chunk_size: expected None for rows padded on the right, or pad on the left")
        return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict, generation_mode: Any, batch_size: int, max_cache_length: int
    ) -> None:
        """Put an `NsaCache` of the needed size among the arguments, the last call's one where it may be used again."""
        given = model_kwargs.get(CACHE)
        implementation = generation_config.cache_implementation
        if implementation not in (None, "static", "dynamic"):
            raise ValueError(f"cache_implementation: expected None, 'static' or 'dynamic', got {implementation!r}")
        if given is not None:
            if not isinstance(given, NsaCache):
                raise TypeError(f"{CACHE}: expected an NsaCache, got {type(given).__name__}")
            held, mask = given.count_columns(), model_kwargs.get("attention_mask")
            # the library leaves a mask of ones out
            given.check_mask(given.columns.new_ones(given.nsa.batch, held) if mask is None else mask[:, :held])
            given.make_room(max(0, max_cache_length - held))
            given.count_columns()
            return
        if generation_config.use_cache is False:
            return
        batch = batch_size * max(generation_config.num_beams, generation_config.num_return_sequences)
        capacity = max(max_cache_length, getattr(generation_config, "max_cache_len", None) or 0)
        cache = self._generation_cache
        if cache is None or not cache.serves(batch, capacity, self):
            cache = NsaCache(self, batch, capacity)
        cache.reset()
        # a step compiled for this cache serves the next call, unless the caller gets it
        self._generation_cache = None if generation_config.return_dict_in_generate else cache
        model_kwargs[CACHE] = cache

    @classmethod
    def from_language_model(cls, model: NSALanguageModel, **kwargs: Any) -> Self:
        """A model that shares the weights of an `NSALanguageModel`; `kwargs` as in `NsaConfig`."""
        if not isinstance(model, NSALanguageModel):
            raise TypeError(f"model: expected an NSALanguageModel, got {type(model).__name__}")
        with torch.device("meta"):
            new = cls(NsaConfig.from_sizes(model.config, **kwargs))
        new.load_state_dict({_rename(name): weight for name, weight in model.state_dict().items()}, assign=True)
        new.tie_weights()
        return new.train(model.training)

    def to_language_model(self) -> NSALanguageModel:
        """An `NSALanguageModel` that shares the weights, for `nsa_compile.generate`, `DecodeGraph` and the like."""
        with torch.device("meta"):
            new = NSALanguageModel(self.config.sizes())
        names = {_rename(name): name for name in new.state_dict()}
        new.load_state_dict({names[name]: weight for name, weight in self.state_dict().items()}, assign=True)
        if self.config.tie_word_embeddings:
            new.head.weight = new.embed.weight
        return new.train(self.training)


def _rename(name: str) -> str:
    """What the parameter `name` of an `NSALanguageModel` is called in an `NsaForCausalLM`."""
    if name == "head.weight":
        return "lm_head.weight"
    return f"model.{name.replace('embed.', 'embed_tokens.')}"


AutoConfig.register(NsaConfig.model_type, NsaConfig)
AutoModel.register(NsaConfig, NsaModel)
AutoModelForCausalLM.register(NsaConfig, NsaForCausalLM)
