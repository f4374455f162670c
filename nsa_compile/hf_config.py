"""`NsaConfig`: an `NSAConfig` as a config of transformers, that takes no name without an effect."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any, Self

from transformers import PreTrainedConfig
from transformers.modeling_outputs import CausalLMOutputWithPast

from nsa_compile.config import NSAConfig, name_unknown, near_name

CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
"""What transformers calls a cache among a model's arguments and outputs; it was renamed within version 5."""
FIELDS = tuple(field.name for field in dataclasses.fields(NSAConfig) if field.name != "tie_embeddings")
ALIASES = {
    "hidden_size": "dim",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_groups",
    "num_hidden_layers": "n_layers",
    "tie_embeddings": "tie_word_embeddings",
}
ROPE = ("rope_parameters", "rope_scaling")
"""Where transformers keeps the base of RoPE: the new name and the old one."""
OWN = (*FIELDS, *ALIASES, *ROPE, "tie_word_embeddings", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id")
LIBRARY = (
    "_attn_implementation_autoset", "auto_map", "cls_token_id", "custom_pipelines",
    "decoder_start_token_id", "distributed_config", "gradient_checkpointing", "mask_token_id",
    "max_position_embeddings", "model_type", "prefix", "processor_class", "quantization_config", "sep_token_id",
    "task_specific_params", "tokenizer_class", "transformers_weights", "unk_token_id",
)  # fmt: skip
"""Names that transformers reads from or adds to a config of any kind, and that its base class does not know."""
ELSEWHERE = {
    "attention_bias": "projections have no biases",
    "attention_dropout": "there is no dropout",
    "head_dim": "d_k and d_v",
    "hidden_act": "the feed-forward layer's is SiLU",
    "hidden_dropout": "there is no dropout",
    "initializer_range": "weights start with a standard deviation of 0.02",
    "intermediate_size": "the feed-forward layer has 4*dim channels",
    "layer_types": "all layers are of one kind, attention",
    "mlp_bias": "projections have no biases",
    "partial_rotary_factor": "RoPE turns all channels",
    "per_layer_config": "all layers are alike",
    "rms_norm_eps": "it is 1e-6",
    "sliding_window": "w",
}
"""Names of other models' configs, and what is there in their place."""
FIXED = {"chunk_size_feed_forward": 0, "is_encoder_decoder": False}
"""Names of the base class that have an effect in other models only, with the value that says what is done here."""


class NsaConfig(PreTrainedConfig):
    """`NSAConfig` as a transformers config: the same names and defaults, the library's names as aliases.

    `rope_parameters` (or `rope_scaling`, its old name) of type "default" is taken for `rope_theta`. Names that the
    library gives a config of any kind pass. All others are refused, in a call as in a config.json. What else a library
    hangs on a config afterwards is not saved with it.

    Raises: ValueError or TypeError naming the argument, what was expected and what came.
    """

    model_type = "nsa"
    keys_to_ignore_at_inference = [CACHE]  # noqa: RUF012 (the library's name for it)
    attribute_map = ALIASES

    def __init__(
        self, *, use_cache: bool = True, pad_token_id: int | None = None, bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        refuse_unknown(kwargs)
        for alias, name in ALIASES.items():
            if alias in kwargs:
                value = kwargs.pop(alias)
                if kwargs.setdefault(name, value) != value:
                    raise ValueError(f"{alias}: expected {kwargs[name]!r}, as {name} beside it says, got {value!r}")
        thetas = {name: theta_of(name, kwargs.pop(name)) for name in ROPE if name in kwargs}
        for name, theta in thetas.items():
            if theta is not None and kwargs.setdefault("rope_theta", theta) != theta:
                expected = kwargs["rope_theta"]
                raise ValueError(f"{name}: expected {expected!r}, as rope_theta beside it says, got {theta!r}")
        for name, fixed in FIXED.items():
            if kwargs.get(name, fixed) != fixed:
                raise ValueError(f"{name}: expected {fixed!r}, all that this model knows, got {kwargs[name]!r}")
        tied = kwargs.pop("tie_word_embeddings", NSAConfig.tie_embeddings)
        sizes = NSAConfig(tie_embeddings=tied, **{name: kwargs.pop(name) for name in FIELDS if name in kwargs})
        for name in FIELDS:
            setattr(self, name, getattr(sizes, name))
        self.use_cache = use_cache
        self.pad_token_id, self.bos_token_id, self.eos_token_id = pad_token_id, bos_token_id, eos_token_id
        super().__init__(tie_word_embeddings=tied, **kwargs)

    def __setattr__(self, key: str, value: Any) -> None:
        refuse_mistaken([key])
        super().__setattr__(key, value)

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self._told() == other._told()

    def _told(self) -> dict[str, Any]:
        return {k: v for k, v in self.to_dict().items() if k not in ("_name_or_path", "transformers_version")}

    @property
    def rope_parameters(self) -> dict[str, Any]:
        """The base of RoPE as the library has it."""
        return {"rope_type": "default", "rope_theta": self.rope_theta}

    @rope_parameters.setter
    def rope_parameters(self, value: Mapping[str, Any] | None) -> None:
        theta = theta_of("rope_parameters", value)
        if theta is not None:
            self.rope_theta = theta

    @property
    def rope_scaling(self) -> dict[str, Any]:
        """The old name of `rope_parameters`."""
        return self.rope_parameters

    @rope_scaling.setter
    def rope_scaling(self, value: Mapping[str, Any] | None) -> None:
        self.rope_parameters = value

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> tuple[dict, dict]:
        """The library's, but a config of another model is refused."""
        told, rest = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        kind = told.get("model_type")
        if kind != cls.model_type:
            hint = "none: an NSALanguageModel loads by NSALanguageModel.from_pretrained, and from it a model of"
            hint += " transformers by NsaForCausalLM.from_language_model"
            raise ValueError(
                f"pretrained_model_name_or_path: expected a model of type {cls.model_type!r} in "
                f"{pretrained_model_name_or_path}, got {hint if kind is None else repr(kind)}"
            )
        return told, rest

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The library's, but what `kwargs` have for a setting of the model that is none is refused."""
        wanted = kwargs.pop("return_unused_kwargs", False)
        config, rest = super().from_dict(config_dict, return_unused_kwargs=True, **kwargs)
        if wanted:
            return config, rest
        refuse_mistaken(rest)
        return config

    def to_dict(self) -> dict[str, Any]:
        """The library's, without what it would not be made from again."""
        told = super().to_dict()
        return {name: value for name, value in told.items() if is_known(name)}

    def sizes(self) -> NSAConfig:
        """The config of the layers, checked anew."""
        values: dict[str, Any] = {name: getattr(self, name) for name in FIELDS}
        return NSAConfig(tie_embeddings=self.tie_word_embeddings, **values)

    @classmethod
    def from_sizes(cls, sizes: NSAConfig, **kwargs: Any) -> Self:
        """The config of an `NSALanguageModel`; `kwargs` as in `NsaConfig`."""
        return cls(**dataclasses.asdict(sizes), **kwargs)


def theta_of(name: str, value: Any) -> float | None:
    """The base in parameters of RoPE, None if there is none. Raises ValueError or TypeError for other RoPE."""
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise TypeError(f"{name}: expected a dict of rope_type and rope_theta, got {value!r}")
    expected = {"rope_type": "default", "type": "default", "partial_rotary_factor": 1.0}
    for key, given in value.items():
        if key in expected:
            if given is not None and given != expected[key]:
                raise ValueError(f"{name}: expected {key} {expected[key]!r}, all that this model knows, got {given!r}")
        elif key != "rope_theta":
            raise ValueError(f"{name}: expected rope_type and rope_theta, got {key!r}")
    return value.get("rope_theta")


@functools.cache
def base_names() -> frozenset[str]:
    """What the base class of the installed version keeps in any config, or sets by a property or class attribute."""
    fields = {name for name in dir(PreTrainedConfig) if not callable(getattr(PreTrainedConfig, name, None))}
    return frozenset((fields | vars(PreTrainedConfig()).keys()) - ELSEWHERE.keys())


def is_known(name: str) -> bool:
    """Whether a name is this config's, or the library's in any config."""
    return name in OWN or name in LIBRARY or name in base_names()


def refuse_unknown(names: Iterable[str]) -> None:
    """Raise ValueError for names that nothing reads.

    The base class of the installed version says which names are its own: those that it does not merely hang on a
    config, as it does with any that it does not know.
    """
    rest = [name for name in names if not is_known(name)]
    hung = vars(PreTrainedConfig(**{name: None for name in rest if name not in ELSEWHERE})).keys()
    unknown = [name for name in rest if name in ELSEWHERE or name in hung]
    if unknown:
        raise ValueError(f"config: {tell_unknown(unknown)}")


def refuse_mistaken(names: Iterable[str]) -> None:
    """Raise ValueError for names that would be taken for a setting of the model and are none.

    For where others may leave notes, or pass what is not for the config: any library assigns to a config, and the
    library's tokenizers and pipelines load one with their own arguments.
    """
    mistaken = [name for name in names if not is_known(name) and (name in ELSEWHERE or near_name(name, OWN))]
    if mistaken:
        raise ValueError(f"config: {tell_unknown(mistaken)}")


def tell_unknown(unknown: Iterable[str]) -> str:
    """What was expected, and the names that came, with what could have been meant."""
    told = (f"{name} (here: {ELSEWHERE[name]})" if name in ELSEWHERE else name_unknown(name, OWN) for name in unknown)
    return f"expected the names of NSAConfig, or those that transformers gives any model, got {', '.join(told)}"
