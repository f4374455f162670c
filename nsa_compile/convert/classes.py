"""The transformers classes of converted models, registered with its Auto classes."""

from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from nsa_compile.config import NSAConfig, name_unknown, near_name
from nsa_compile.convert.attention import ConvertedAttention, rows_of_call
from nsa_compile.hf_generation import NsaGeneration
from nsa_compile.module import impl_of, set_impl

IMPL = property(impl_of, set_impl, doc="The implementation that the NSA layers run; see `nsa_compile.set_impl`.")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
SETTINGS = (
    "tie_kv", "l", "d", "l_sel", "n_sel", "w", "init_blocks", "local_blocks", "phi", "gate", "gate_hidden",
    "gate_temperature", "impl",
)  # fmt: skip
"""What `config.nsa` may have beside `layers`: the fields of `NSAConfig` that are not the dense model's to say."""


class NSALlamaConfig(LlamaConfig):
    """A Llama config with the settings of its NSA layers in `nsa`."""

    model_type = "nsa_llama"


class NSAQwen2Config(Qwen2Config):
    """A Qwen2 config with the settings of its NSA layers in `nsa`."""

    model_type = "nsa_qwen2"


class NSAQwen3Config(Qwen3Config):
    """A Qwen3 config with the settings of its NSA layers in `nsa`."""

    model_type = "nsa_qwen3"


class NSAMistralConfig(MistralConfig):
    """A Mistral config with the settings of its NSA layers in `nsa`."""

    model_type = "nsa_mistral"


def put_attention(model: Any) -> None:
    """Put NSA in the place of the attention of layers, as `model.config.nsa` says.

    Raises: ValueError naming what is wrong there, or what the config has that NSA does not do.
    """
    settings = getattr(model.config, "nsa", None)
    if not isinstance(settings, dict) or "layers" not in settings:
        raise ValueError(f"nsa: expected layers and sizes, got {str(settings)[:80]}")
    refuse_misplaced(model.config)
    check_dense(model)
    try:
        unknown = [name_unknown(str(name), SETTINGS) for name in settings if name not in ("layers", *SETTINGS)]
        if unknown:
            raise ValueError(f"expected the names layers, {', '.join(SETTINGS)}, got {', '.join(unknown)}")
        layers = check_layers(settings["layers"], len(model.model.layers))
        sizes = attention_sizes(model.config, {name: value for name, value in settings.items() if name != "layers"})
    except (TypeError, ValueError) as error:
        raise ValueError(f"nsa: {error}") from error
    for index in layers:
        window = sliding_window(model.config, index)
        if window is not None:
            raise ValueError(f"sliding_window: expected none in layer {index}, which has nsa['w'], got {window}")
    for index in layers:
        layer = model.model.layers[index]
        layer.self_attn = ConvertedAttention(layer.self_attn, model.model.rotary_emb, sizes)
    model.model.register_forward_pre_hook(rows_of_call, with_kwargs=True)


def refuse_misplaced(config: Any) -> None:
    """Raise ValueError for a setting of NSA beside `nsa`, or a name like one, where nothing reads it."""
    dense = type(config)()
    for name in vars(config):
        if not hasattr(dense, name) and name != "nsa":
            near = name if name in SETTINGS else near_name(name, SETTINGS)
            if near is not None:
                raise ValueError(
                    f"{name}: expected settings of NSA within nsa, such as nsa[{near!r}], got it beside nsa"
                )


def check_dense(model: Any) -> None:
    """Raise ValueError for RoPE or dropout of a dense model that NSA in its place would not do."""
    rotary, expected = model.model.rotary_emb, head_dim(model.config)
    if rotary.rope_type not in ROPE_TYPES:
        raise ValueError(f"model: expected RoPE of type {', '.join(ROPE_TYPES)}, got {rotary.rope_type!r}")
    turned = 2 * rotary.inv_freq.shape[-1]
    if turned != expected or (model.config.rope_parameters or {}).get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"model: expected RoPE on all {expected} channels of a head, got it on {turned}")
    if getattr(model.config, "attention_dropout", 0.0):
        raise ValueError(f"model: expected attention_dropout 0 (NSA has none), got {model.config.attention_dropout}")


def sliding_window(config: Any, index: int) -> int | None:
    """The dense model's sliding window in a layer, None for full attention."""
    types = getattr(config, "layer_types", None)
    if types is not None and types[index] != "sliding_attention":
        return None
    return getattr(config, "sliding_window", None)


def check_layers(layers: Any, n: int) -> list[int]:
    """Different numbers of layers in 0 … n - 1, ascending. Raises TypeError or ValueError at the first that is not."""
    if not isinstance(layers, Iterable):
        raise TypeError(f"layers: expected numbers of layers, got {layers!r}")
    chosen: set[int] = set()
    for index in layers:
        if isinstance(index, bool) or not isinstance(index, int):
            raise TypeError(f"layers: expected numbers of layers, got {str(index)[:40]!r} among them")
        if not 0 <= index < n or index in chosen:
            twice = " twice" if index in chosen else ""
            raise ValueError(f"layers: expected different numbers in 0 … {n - 1}, got {index}{twice}")
        chosen.add(index)
    if not chosen:
        raise ValueError(f"layers: expected different numbers in 0 … {n - 1}, got none")
    return sorted(chosen)


def attention_sizes(config: Any, settings: dict[str, Any]) -> NSAConfig:
    """The sizes of a layer: the dense model's, and those chosen. Raises ValueError or TypeError naming the argument."""
    return NSAConfig(
        dim=config.hidden_size, n_heads=config.num_attention_heads, n_kv_groups=config.num_key_value_heads,
        d_k=head_dim(config), d_v=head_dim(config), **settings,
    )  # fmt: skip


def head_dim(config: Any) -> int:
    """Channels of a head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


class NSALlamaForCausalLM(NsaGeneration, LlamaForCausalLM):
    """A Llama model with NSA in the layers that `config.nsa` names."""

    config_class = NSALlamaConfig
    impl = IMPL

    def __init__(self, config: NSALlamaConfig) -> None:
        super().__init__(config)
        put_attention(self)


class NSAQwen2ForCausalLM(NsaGeneration, Qwen2ForCausalLM):
    """A Qwen2 model with NSA in the layers that `config.nsa` names."""

    config_class = NSAQwen2Config
    impl = IMPL

    def __init__(self, config: NSAQwen2Config) -> None:
        super().__init__(config)
        put_attention(self)


class NSAQwen3ForCausalLM(NsaGeneration, Qwen3ForCausalLM):
    """A Qwen3 model with NSA in the layers that `config.nsa` names."""

    config_class = NSAQwen3Config
    impl = IMPL

    def __init__(self, config: NSAQwen3Config) -> None:
        super().__init__(config)
        put_attention(self)


class NSAMistralForCausalLM(NsaGeneration, MistralForCausalLM):
    """A Mistral model with NSA in the layers that `config.nsa` names."""

    config_class = NSAMistralConfig
    impl = IMPL

    def __init__(self, config: NSAMistralConfig) -> None:
        super().__init__(config)
        put_attention(self)


CONVERTED: dict[type, tuple[type, type]] = {
    LlamaForCausalLM: (NSALlamaForCausalLM, NSALlamaConfig),
    Qwen2ForCausalLM: (NSAQwen2ForCausalLM, NSAQwen2Config),
    Qwen3ForCausalLM: (NSAQwen3ForCausalLM, NSAQwen3Config),
    MistralForCausalLM: (NSAMistralForCausalLM, NSAMistralConfig),
}
"""Dense classes, and what a model of each becomes."""

for _model, _config in CONVERTED.values():
    AutoConfig.register(_config.model_type, _config)  # type: ignore[attr-defined]
    AutoModelForCausalLM.register(_config, _model)


def is_linear(module: object) -> bool:
    """Whether a projection is a plain one of floating-point weights."""
    return type(module) is nn.Linear and module.weight.is_floating_point()
