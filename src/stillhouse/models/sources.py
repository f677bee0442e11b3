"""Networks of other libraries and of the user's files: timm, torchvision, transformers (a local folder or a config),
and a class in a file.

Each library is imported when one of its models is built.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from stillhouse.config.specs import ModelSpec
from stillhouse.errors import MissingExtra, UserError, nearest, unknown
from stillhouse.models.class_names import label_maps
from stillhouse.models.published import TORCHVISION, published

Shape = tuple[int, ...]
Options = Mapping[str, Any]
TASKS = {  # options.task: the Auto class, and its mapping from config classes to models
    "image": ("AutoModelForImageClassification", "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING"),
    "segmentation": ("AutoModelForSemanticSegmentation", "MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING"),
    "restoration": ("AutoModelForImageToImage", "MODEL_FOR_IMAGE_TO_IMAGE_MAPPING"),
    "detection": ("AutoModelForObjectDetection", "MODEL_FOR_OBJECT_DETECTION_MAPPING"),
    "text": ("AutoModelForSequenceClassification", "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING"),
    "causal": ("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING"),
    "masked": ("AutoModelForMaskedLM", "MODEL_FOR_MASKED_LM_MAPPING"),
    "seq2seq": ("AutoModelForSeq2SeqLM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING"),
    "features": ("AutoModel", "MODEL_MAPPING"),
}

DTYPES = ("float32", "bfloat16", "float16", "auto")


def check_timm(name: str) -> None:
    """Raises `UserError` for a name that timm does not know."""
    import timm

    if not timm.is_model(name):
        raise unknown("timm model", f"timm:{name}", [f"timm:{n}" for n in timm.list_models()])


def published_normalisation(spec: ModelSpec, model: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and standard deviation per channel that a network's published weights were trained with, where its library
    says them."""
    kind, _, name = spec.model.partition(":")
    found: tuple[Any, Any] = (None, None)
    if kind == "timm":
        facts = getattr(model, "pretrained_cfg", None) or {}
        found = facts.get("mean"), facts.get("std")
    elif kind == "torchvision":
        from torchvision import models

        transforms = models.get_model_weights(name).DEFAULT.transforms()
        found = getattr(transforms, "mean", None), getattr(transforms, "std", None)
    elif kind == "hf" and (Path(name).expanduser() / "preprocessor_config.json").is_file():
        facts = json.loads((Path(name).expanduser() / "preprocessor_config.json").read_text())
        found = facts.get("image_mean"), facts.get("image_std")
    mean, std = found
    return (tuple(mean), tuple(std)) if mean and std else None


def check_torchvision(name: str) -> None:
    """Raises `UserError` for a name that torchvision does not know."""
    from torchvision import models

    if name not in models.list_models():
        raise unknown("torchvision model", f"torchvision:{name}", [f"torchvision:{n}" for n in models.list_models()])


def from_timm(
    name: str, num_classes: int | None, input_shape: Shape | None, options: Options, pretrained: bool
) -> nn.Module:
    """A timm model; channels, and image size where the model has one, from `input_shape`."""
    import timm

    check_timm(name)
    arguments = dict(options)
    if num_classes is not None:
        arguments.setdefault("num_classes", num_classes)
    sized = dict(arguments)
    if input_shape is not None and len(input_shape) == 3:
        arguments.setdefault("in_chans", input_shape[0])
        height, width = input_shape[1:]
        sized = {"img_size": height if height == width else (height, width), **arguments}

    def make(kwargs: dict[str, Any]) -> nn.Module:
        return published(
            name, pretrained, lambda: _call(timm.create_model, f"timm:{name}", name, pretrained=pretrained, **kwargs)
        )

    try:
        return make(sized)
    except _UnknownOption as error:
        if error.key != "img_size" or "img_size" in options:
            raise
        return make(arguments)  # a convolutional net takes any size


def from_torchvision(
    name: str, num_classes: int | None, input_shape: Shape | None, options: Options, pretrained: bool
) -> nn.Module:
    """A torchvision model. With published weights and another number of classes, all but the classifier is loaded."""
    from torchvision import models

    check_torchvision(name)
    if input_shape is not None and input_shape[0] != 3:
        raise UserError(
            f"torchvision models take 3 channels, but the data has {input_shape[0]}; use a timm: or stillhouse: "
            "model, which adapt."
        )
    arguments = dict(options)
    if num_classes is not None:
        arguments.setdefault("num_classes", num_classes)
    if name.startswith("vit_") and input_shape is not None:
        arguments.setdefault("image_size", input_shape[1])
    if "weights_backbone" in inspect.signature(models.get_model_builder(name)).parameters:
        arguments.setdefault("weights_backbone", None)
    owner = f"torchvision:{name}"
    if not pretrained:
        return _call(models.get_model, owner, name, weights=None, **arguments)
    weights = models.get_model_weights(name).DEFAULT
    if arguments.get("num_classes") == len(weights.meta.get("categories", ())):
        make = lambda: _call(models.get_model, owner, name, weights=weights, **arguments)  # noqa: E731
        return published(name, True, make, TORCHVISION)
    model = _call(models.get_model, owner, name, weights=None, **arguments)
    state = published(name, True, lambda: weights.get_state_dict(progress=False, check_hash=True), TORCHVISION)
    ours = model.state_dict()
    model.load_state_dict({k: v for k, v in state.items() if k in ours and v.shape == ours[k].shape}, strict=False)
    return model


def from_transformers(
    name: str, num_classes: int | None, input_shape: Shape | None, options: Options, pretrained: bool
) -> nn.Module:
    """A transformers classifier (`options.task`: image, text) or language model (causal, masked, seq2seq).

    Args:
        name: a folder with config.json, whose weights are loaded where it has any; `config:TYPE` for a fresh model,
            whose further options are the config's; or, with `pretrained`, a repository of the Hugging Face hub.
        num_classes: labels of a classifier.
        input_shape: channels and image size of a fresh image model.
        options: `task`, `dtype` of the weights (float32 unless given; auto: as they were saved), and arguments of the
            config.
        pretrained: the name may be downloaded.
    """
    try:
        import transformers
    except ImportError:
        raise MissingExtra("A model of kind hf:", "text") from None
    arguments = dict(options)
    task = arguments.pop("task", "image")
    if task not in TASKS:
        raise unknown("options.task", str(task), TASKS)
    dtype = str(arguments.pop("dtype", "float32")).removeprefix("torch.")
    if dtype not in DTYPES:
        raise unknown("options.dtype", dtype, DTYPES)
    if num_classes is not None and task in ("image", "segmentation", "detection", "text"):
        arguments.setdefault("num_labels", num_classes)
    auto = getattr(transformers, TASKS[task][0])
    owner = f"hf:{name}"
    if name.startswith("config:"):
        kind = name.removeprefix("config:")
        if kind not in transformers.CONFIG_MAPPING:
            raise unknown(
                "transformers config", f"hf:config:{kind}", [f"hf:config:{k}" for k in transformers.CONFIG_MAPPING]
            )
        plain = transformers.AutoConfig.for_model(kind)
        if task in ("image", "segmentation", "detection") and input_shape is not None:
            if hasattr(plain, "num_channels"):
                arguments.setdefault("num_channels", input_shape[0])
            if isinstance(getattr(plain, "image_size", None), int) and input_shape[1] == input_shape[2]:
                arguments.setdefault("image_size", input_shape[1])
        _check_config(plain, arguments, owner)
        try:
            config = transformers.AutoConfig.for_model(kind, **arguments)
        except Exception as error:  # a value of the wrong type has a class of the hub's own
            raise UserError(f"'{owner}' refuses its options: {' '.join(str(error).split()).rstrip('.')}.") from None
        return _from_config(auto, config, task, owner, dtype)
    folder = Path(name).expanduser()
    if not (folder / "config.json").is_file() and not pretrained:
        raise UserError(
            f"'{owner}' names no folder with a config.json; give one, or hf:config:TYPE for a fresh model, or set "
            "`pretrained: true` to download it."
        )
    source = str(folder) if folder.is_dir() else name
    config = published(
        name, pretrained and not folder.is_dir(), lambda: transformers.AutoConfig.from_pretrained(source)
    )
    _check_config(config, arguments, owner)
    unnamed = (
        "id2label" in arguments and arguments.pop("id2label") is None
    )  # the user vouches for the order of the classes
    for key, value in arguments.items():
        setattr(config, key, value)
    if unnamed:
        config.id2label, config.label2id = label_maps([f"LABEL_{i}" for i in range(config.num_labels)])
    if folder.is_dir() and not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        return _from_config(auto, config, task, owner, dtype)
    _model_class(config, task, owner)
    return _load_folder(auto, source, config, owner, dtype, download=pretrained and not folder.is_dir())


def _without_padding_check(model: nn.Module) -> nn.Module:
    """A transformers model that does not look at every batch's ids for padding, to warn of an absent mask: on a GPU the
    host would wait for it, and our batches have a mask wherever they have padding."""
    for module in model.modules():
        if hasattr(module, "warn_if_padding_and_no_attention_mask"):
            module.warn_if_padding_and_no_attention_mask = _no_check  # type: ignore[assignment]
    return model


def _no_check(*arguments: Any) -> None:
    pass


def _load_folder(auto: Any, source: str, config: Any, owner: str, dtype: str, download: bool) -> nn.Module:
    """A model with its weights. A classifier may be new (a folder of a bare encoder), but of another size, or with most
    weights absent, it is refused."""
    options = {"config": config, "dtype": dtype, "ignore_mismatched_sizes": True, "output_loading_info": True}
    model, info = published(owner, download, lambda: auto.from_pretrained(source, **options))
    _without_padding_check(model)
    if info["mismatched_keys"]:
        name, given, ours = min(info["mismatched_keys"])
        raise UserError(
            f"The weights of '{owner}' do not fit: '{name}' is {tuple(given)} in its file, {tuple(ours)} in the model "
            "(another number of classes?)."
        )
    if 2 * len(info["missing_keys"]) > len(model.state_dict()):
        raise UserError(
            f"The weights of '{owner}' are of another architecture: {len(info['missing_keys'])} of "
            f"{len(model.state_dict())} tensors are not in its file."
        )
    return model


def _from_config(auto: Any, config: Any, task: str, owner: str, dtype: str) -> nn.Module:
    model = _model_class(config, task, owner)
    config.architectures = config.architectures or [model.__name__]
    return _without_padding_check(
        auto.from_config(config) if dtype == "auto" else auto.from_config(config, dtype=dtype)
    )


def _model_class(config: Any, task: str, owner: str) -> type[nn.Module]:
    """The model that a config has for a task; the first where it has several."""
    import transformers

    models = getattr(transformers, TASKS[task][1])
    if type(config) not in models:
        able = [t for t, (_, mapping) in TASKS.items() if type(config) in getattr(transformers, mapping)]
        raise UserError(
            f"'{owner}' has no model for options.task '{task}'; it has: "
            f"{', '.join(able) or 'none of ' + ', '.join(TASKS)}."
        )
    model = models[type(config)]
    return model[0] if isinstance(model, tuple | list) else model


def _check_config(config: Any, arguments: Options, owner: str) -> None:
    """transformers keeps any keyword as an attribute without a word, so a misspelt one is refused here."""
    for key in arguments:
        if not hasattr(config, key):
            raise unknown(f"option of '{owner}'", f"options.{key}", [f"options.{k}" for k in config.to_dict()])


def from_file(name: str, num_classes: int | None, options: Options) -> nn.Module:
    """The result of calling a class or function of one Python file, `path.py:Name`, with the options, and `num_classes`
    where it takes one."""
    place, _, attribute = name.rpartition(":")
    if not place or not attribute:
        raise UserError(f"A model from a file is named file:PATH.py:CLASS; given: 'file:{name}'.")
    module = _import(Path(place).expanduser())
    if not callable(getattr(module, attribute, None)):
        mine = [n for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", None) == module.__name__]
        raise unknown(f"class in {place}", attribute, mine)
    make = getattr(module, attribute)
    parameters = inspect.signature(make).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    arguments = dict(options)
    if num_classes is not None and ("num_classes" in parameters or takes_any):
        arguments.setdefault("num_classes", num_classes)
    for key in arguments:
        if key not in parameters and not takes_any:
            raise unknown(f"option of 'file:{name}'", f"options.{key}", [f"options.{p}" for p in parameters])
    model = make(**arguments)
    if not isinstance(model, nn.Module):
        raise UserError(f"'file:{name}' must return a torch.nn.Module, but returned a {type(model).__name__}.")
    return model


def _import(path: Path) -> ModuleType:
    """One file as a module of its own; the same file with the same text is imported once."""
    if not path.is_file():
        others = [p.name for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
        close = nearest(path.name, others)
        raise UserError(
            f"There is no file '{path}' to take a model from"
            + (f"; did you mean '{path.parent / close[0]}'?" if close else ".")
        )
    text = path.read_bytes()
    name = "stillhouse_file_" + hashlib.blake2b(str(path.resolve()).encode() + b"\0" + text, digest_size=8).hexdigest()
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"'{path}' is not a Python file; a model's file ends in .py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise UserError(f"Importing '{path}' failed: {type(error).__name__}: {error}.") from error
    return module


class _UnknownOption(UserError):
    def __init__(self, owner: str, key: str) -> None:
        super().__init__(f"'{owner}' takes no options.{key}.")
        self.key = key


def _call(make: Callable[..., Any], owner: str, *args: Any, **kwargs: Any) -> Any:
    """Call a library's constructor; a keyword that it does not know becomes a sentence that names the option."""
    try:
        return make(*args, **kwargs)
    except TypeError as error:
        match = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if match and match[1] in kwargs:
            raise _UnknownOption(owner, match[1]) from None
        match = re.search(r"multiple values for keyword argument '(\w+)'", str(error))
        if match and match[1] in kwargs:
            raise UserError(f"options.{match[1]}: '{owner}' fixes it by its name; choose another name.") from None
        raise
