"""`convert`: a dense Llama-, Qwen- or Mistral-style model becomes one of Native Sparse Attention."""

import copy
import json
import pickle
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from nsa_compile.storage import check_folder, naming, why_not_loaded

NOT_COPIED = ("config.json", "generation_config.json")
WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".index.json", ".gguf", ".h5", ".msgpack")


def convert(
    model: Any, *, layers: Iterable[int] | None = None, tie_kv: bool = True,
    l: int = 32, d: int = 16, l_sel: int = 64, n_sel: int = 16, w: int = 512, init_blocks: int = 1,
    local_blocks: int = 2, phi: str = "avg", gate: str = "softmax", gate_hidden: int | None = None, impl: str = "auto",
) -> Any:  # fmt: skip
    """Put Native Sparse Attention in the place of a transformers model's attention, in place.

    Projections, biases, norms and RoPE stay; gates are added. They start as (0, 1/2, 1/2) for compression, selection
    and window, so that up to min(w, n_sel*l_sel) tokens the logits are the dense model's within rounding. Beyond that
    the model is an approximation, which a short training at long context brings near the dense one.

    The model's class and config become `NSALlamaForCausalLM`, `NSALlamaConfig` and alike, of
    `nsa_compile.convert.classes`: `save_pretrained` writes a checkpoint for `load_converted`, `generate` works with a
    `DynamicCache` or `StaticCache` made after the conversion, at the cost of a pass over all cached keys per token.
    A converted layer sees the whole past, even where the dense one had a sliding window. The config is copied, so that
    other models made of the same one stay as they are.

    Args:
        model: LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM or MistralForCausalLM.
        layers: numbers of the layers to convert, from 0; default all.
        tie_kv: let the branches share the layer's keys and values, or give each a copy of its projections, to train
            apart (three times the cache).
        l, d, l_sel, n_sel, w, init_blocks, local_blocks, phi, gate, gate_hidden, impl: as in `NSAConfig`.

    Returns: the model.

    Raises: ImportError without transformers; ValueError or TypeError for another kind of model, layers out of range,
        sizes that do not fit, dropout in attention, RoPE that depends on the length (dynamic, longrope) or turns a part
        of the channels only, or a sliding window shorter than min(w, n_sel*l_sel); before anything is changed.
    """
    settings = {
        "tie_kv": tie_kv, "l": l, "d": d, "l_sel": l_sel, "n_sel": n_sel, "w": w, "init_blocks": init_blocks,
        "local_blocks": local_blocks, "phi": phi, "gate": gate, "gate_hidden": gate_hidden, "impl": impl,
    }  # fmt: skip
    classes = import_classes()
    chosen = check_model(model, layers, settings)
    config = own_config(model)
    config.nsa = {"layers": chosen, **settings}
    forget_sliding_window(config, chosen)
    model.__class__, config.__class__ = classes.CONVERTED[type(model)]
    config.architectures = [type(model).__name__]
    classes.put_attention(model)
    return model


def own_config(model: Any) -> Any:
    """A copy of a model's config in its place, everywhere in the model: other models may have the same object."""
    shared, own = model.config, copy.deepcopy(model.config)
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if value is shared:
                setattr(module, name, own)
    return own


def import_classes() -> Any:
    """The module of the transformers classes; takes seconds, so only where it is needed."""
    try:
        from nsa_compile.convert import classes
    except ImportError as error:
        raise ImportError(
            f"convert: expected transformers >= 5 (pip install 'nsa-compile[hf]'), got none that works: {error}"
        ) from error
    return classes


def check_model(model: Any, layers: Iterable[int] | None, settings: dict[str, Any]) -> list[int]:
    """The layers to convert, ascending; raises as `convert` does."""
    classes = import_classes()
    known = ", ".join(dense.__name__ for dense in classes.CONVERTED)
    if type(model) in {converted for converted, _ in classes.CONVERTED.values()}:
        raise ValueError(f"model: expected a dense model, got a converted one ({type(model).__name__})")
    if type(model) not in classes.CONVERTED:
        raise TypeError(f"model: expected one of {known}, got {type(model).__name__}")
    config = model.config
    n = len(model.model.layers)
    chosen = range(n) if layers is None else classes.check_layers(layers, n)
    sizes = classes.attention_sizes(config, settings)
    classes.check_dense(model)
    exact = min(sizes.w, sizes.n_sel * sizes.l_sel)
    for index in chosen:
        attention = model.model.layers[index].self_attn
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            projection = getattr(attention, name, None)
            if not classes.is_linear(projection):
                raise ValueError(
                    f"model: expected nn.Linear as {name} of layer {index} (convert before quantizing or adding "
                    f"adapters), got {type(projection).__name__}"
                )
        window = classes.sliding_window(config, index)
        if window is not None and window < exact:
            raise ValueError(
                f"w: expected min(w, n_sel*l_sel) of at most {window}, the dense model's sliding window in layer "
                f"{index}, got {exact}"
            )
    return list(chosen)


def forget_sliding_window(config: Any, layers: list[int]) -> None:
    """Make caches and masks for the converted layers those of full attention."""
    if getattr(config, "sliding_window", None) is None:
        return
    types = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    types = ["full_attention" if i in layers else kind for i, kind in enumerate(types)]
    if getattr(config, "layer_types", None) is None and "sliding_attention" not in types:
        config.sliding_window = None  # one window for all layers, as in Mistral
    else:
        config.layer_types = types


def load_converted(folder: str | Path, **options: Any) -> Any:
    """Load a converted model that `save_pretrained` or `nsa-compile convert` wrote.

    `options` go to `AutoModelForCausalLM.from_pretrained` (dtype, device_map, ...), which does the same once
    `nsa_compile.convert.classes` is imported.

    Raises: ImportError without transformers; ValueError for a folder without such a model, or weights that do not fit.
    """
    classes = import_classes()
    build_empty(folder, [config.model_type for _, config in classes.CONVERTED.values()])
    return load_complete(folder, **options)


def build_empty(folder: str | Path, expected: list[str]) -> Any:
    """The model that a checkpoint's config.json describes, of one of the expected types, without weights.

    Raises: ValueError naming the file for one that cannot be read, is of another type, or describes no model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"folder: expected one with config.json as save_pretrained writes it, got {folder}")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"folder: expected JSON in {path}, got {error}") from error
    kind = config.get("model_type") if isinstance(config, dict) else config
    if kind not in expected:
        raise ValueError(f"folder: expected a model of type {', '.join(expected)}, got {str(kind)[:80]!r} in {path}")
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    except Exception as error:  # transformers and torch have no one type for it
        raise ValueError(f"folder: expected settings of a model in {path}, got: {error}") from error


def load_complete(folder: str | Path, **options: Any) -> Any:
    """`AutoModelForCausalLM.from_pretrained`, but a missing, unknown, misshapen or cut weight is a ValueError."""
    from transformers import AutoModelForCausalLM

    load: Any = AutoModelForCausalLM.from_pretrained
    try:
        model, report = load(folder, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    except SafetensorError as error:
        raise ValueError(f"folder: expected whole files of weights, got {find_broken(folder)}: {error}") from error
    except (pickle.UnpicklingError, EOFError) as error:  # of weights that are no safetensors
        raise ValueError(f"folder: expected files of weights in {folder}, got {why_not_loaded(error)}") from error
    for kind, names in report.items():
        if names:
            shown = ", ".join(sorted(map(str, names))[:3])
            raise ValueError(f"folder: expected weights that fit {folder}/config.json, got {kind}: {shown}")
    return model


def find_broken(folder: str | Path) -> Path:
    """The first file of weights that cannot be opened; the folder if none is."""
    for path in sorted(Path(folder).glob("*.safetensors")):
        try:
            with safe_open(path, "pt"):
                pass
        except (SafetensorError, OSError):
            return path
    return Path(folder)


def convert_folder(source: str | Path, out: str | Path, **options: Any) -> Any:
    """Convert the checkpoint in `source` to a new one in `out`, with the tokenizer's and other small files beside it.

    `options` as in `convert`. Everything but the weights is checked before those are read, and `out` appears as a whole
    or not at all.

    Returns: the converted model.

    Raises: as `convert`; ValueError for a folder without a fitting model, or one that exists as `out`.
    """
    classes = import_classes()
    source, out = Path(source), Path(out)
    check_folder("out", out)
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"out: expected a new or empty folder, got {out}")
    empty = build_empty(source, [config.model_type.removeprefix("nsa_") for _, config in classes.CONVERTED.values()])
    with torch.device("meta"):
        layers = convert(empty, **options).config.nsa["layers"]
    model = convert(load_complete(source, dtype="auto"), **options | {"layers": layers})
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        folder.chmod(0o755)
        with naming(out):
            model.save_pretrained(folder)
        for path in source.iterdir():
            if path.is_file() and path.name not in NOT_COPIED and not path.name.endswith(WEIGHT_FILES):
                shutil.copy2(path, folder / path.name)
        if out.exists():
            out.rmdir()
        folder.rename(out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return model
