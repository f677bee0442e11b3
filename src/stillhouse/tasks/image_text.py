"""Image and text: networks that embed both into one space, and what follows from class names and captions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.config.specs import ModelSpec
from stillhouse.errors import UserError
from stillhouse.evaluation.image_text import GROUPS, ImageTextMeter
from stillhouse.evaluation.judge import Meter
from stillhouse.functional.pictures import normalise, resized, unnormalise, with_channels
from stillhouse.models import build, image_text, load_weights
from stillhouse.models.tokenizer import identity, size, texts_padded
from stillhouse.signals import Batch, Signals, evaluating, own_precision
from stillhouse.tasks.base import WEIGHTS, Task

MODEL, TOKENIZER, TEXT = "model", "tokenizer", "text"
SHOWN = 3  # retrieved images of a picture


@dataclass(frozen=True)
class ImageText(Task):
    """Embeddings of images and of texts, unit vectors in one space.

    A batch's `input` holds `pixel_values` (B, C, H, W), and `input_ids` and `attention_mask` (T, L) of its texts, or is
    images alone. `label` (B,) tells which texts describe an image: those of the same id, which are in `text_label` (T,)
    where they are not `label` itself; an id below the number of classes is a class.

    Attributes:
        size: (H, W) of an image.
        mean, std: the normalisation per channel.
        tokenizer: a transformers tokenizer.
        context: tokens of a text at most.
        classes: names, in label order; () where there are none.
        templates: texts with `{}` where a class name stands; the vector of a class is the mean over all of them.
        new: ids of classes that training does not see.
        vectors: (C, D) unit class vectors of one network; with them, its outputs are `logits` too (see `ready`).
    """

    name: ClassVar[str] = "image_text"
    reads: ClassVar[str] = "images"
    embeds: ClassVar[bool] = True
    supervised: ClassVar[tuple[str | dict[str, Any], ...]] = ("contrastive",)
    groups: ClassVar[tuple[str, ...]] = GROUPS
    parts: ClassVar[Mapping[str, str]] = {
        "image": "(B, D) unit embeddings of the images",
        "text": "(T, D) unit embeddings of the texts",
        "scale": "() what cosines are multiplied by",
        "bias": "() what is then added, where the network has it",
    }
    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    tokenizer: Any = field(repr=False, compare=False)
    context: int = 77
    classes: tuple[str, ...] = ()
    templates: tuple[str, ...] = ("a photo of a {}.",)
    new: tuple[int, ...] = ()
    vectors: Tensor | None = field(default=None, repr=False, compare=False)

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.classes

    @property
    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return self.mean, self.std

    @property
    def image_size(self) -> tuple[int, int] | None:
        return self.size

    # ---- a network ---------------------------------------------------------------------------------------------------

    def build(self, spec: ModelSpec) -> nn.Module:
        """A network that embeds images of this size and texts of this tokenizer.

        Raises:
            UserError: what `stillhouse.models.build` raises; a network of another task; a vocabulary smaller than the
                tokenizer's, or a context longer than the network's.
        """
        options, shape = dict(spec.options), (len(self.mean), *self.size)
        if spec.model.startswith("hf:"):
            options.setdefault("task", "features")
        if spec.model.startswith("hf:config:"):
            self._fit_config(options, spec.model.removeprefix("hf:config:"))
        if spec.model in ("stillhouse:clip", "stillhouse:fusion", "stillhouse:hybrid_clip"):
            options = {"vocabulary": size(self.tokenizer), "context": self.context, **options}
        if spec.model in ("stillhouse:hybrid_clip", "stillhouse:two_towers"):
            options.setdefault("normalised", self.normalisation)
        if spec.model == "stillhouse:two_towers":
            text = dict(options.get("text") or {})
            if str(text.get("model", "")).startswith("hf:config:"):
                text["options"] = {"vocab_size": size(self.tokenizer), **(text.get("options") or {})}
                options["text"] = text
        model = build(spec.model_copy(update={"options": options}), None, shape)
        image_text.check(model, spec.model)
        for config in _configs(model):
            rows = getattr(config, "vocab_size", None)
            if rows is not None and rows < size(self.tokenizer):
                raise UserError(
                    f"'{spec.model}' has {rows} tokens, but the tokenizer has {size(self.tokenizer)}; take the "
                    "network's own (data.options.tokenizer: hf:NAME)."
                )
            positions = getattr(config, "max_position_embeddings", None)
            if isinstance(positions, int) and positions < self.context:
                raise UserError(
                    f"data.options.context is {self.context}, but '{spec.model}' reads at most {positions} tokens; "
                    "lower it."
                )
        return model

    def _fit_config(self, options: dict[str, Any], kind: str) -> None:
        """Vocabulary, special tokens and image size of a fresh network, where the recipe leaves them open."""
        text, vision = dict(options.get("text_config") or {}), dict(options.get("vision_config") or {})
        text.setdefault("vocab_size", size(self.tokenizer))
        text.setdefault("max_position_embeddings", self.context)
        end = self.tokenizer.sep_token_id if self.tokenizer.eos_token_id is None else self.tokenizer.eos_token_id
        begin = self.tokenizer.cls_token_id if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id
        for name, value in (("eos", end), ("bos", begin), ("pad", self.tokenizer.pad_token_id)):
            text.setdefault(f"{name}_token_id", value)
        vision.setdefault("num_channels", len(self.mean))
        vision.setdefault("image_size", self.size[0])
        if self.size[0] != self.size[1]:
            raise UserError(f"'hf:config:{kind}' takes square images, but data.image_size is {list(self.size)}.")
        options.update(text_config=text, vision_config=vision)

    def call(self, model: nn.Module, batch: Batch, *, losses: bool = False) -> Any:
        given = batch["input"]
        inputs: Mapping[str, Tensor] = given if isinstance(given, Mapping) else {"pixel_values": given}
        weights = next(p.dtype for p in model.parameters())
        images = inputs["pixel_values"].to(weights)
        with own_precision(model):
            found = {"image": image_text.image_features(model, images)}
            tokens = {k: v for k, v in inputs.items() if k != "pixel_values"}
            if tokens:
                found["text"] = image_text.text_features(model, tokens)
        found = {name: F.normalize(x.float(), dim=-1) for name, x in found.items()}
        found["scale"] = image_text.scale(model)
        bias = image_text.bias(model)
        return found if bias is None else {**found, "bias": bias}

    def read(self, output: Any, batch: Batch) -> Signals:
        signals = Signals(embedding=output["image"], parts=dict(output))
        if self.vectors is not None:
            signals.logits = output["scale"] * output["image"] @ self.vectors.to(output["image"].device).T
        return signals

    def constrain(self, model: nn.Module) -> None:
        image_text.clamp_scale(model)

    def ready(self, model: nn.Module) -> ImageText:
        """This task with the class vectors of a network, which thereby gives logits; itself where it has them, or has
        no classes."""
        if self.vectors is not None or not self.classes:
            return self
        return replace(self, vectors=self.class_vectors(model, self.classes))

    def class_vectors(self, model: nn.Module, names: Sequence[str], templates: Sequence[str] = ()) -> Tensor:
        """(C, D) unit vectors of classes: of each name in each template the unit embedding, their mean, unit again
        (Radford et al. 2021, section 3.1.4).

        Args:
            model: the network.
            names: of the classes; underscores become spaces.
            templates: with `{}` where a name stands; default: the task's.
        """
        used = list(templates or self.templates)
        device = next(model.parameters()).device
        vectors = []
        with evaluating(model), own_precision(model):
            for name in names:
                texts = [t.format(name.replace("_", " ")) for t in used]
                unit = F.normalize(self._embedded(model, texts, device), dim=-1)
                vectors.append(F.normalize(unit.mean(0), dim=0))
        return torch.stack(vectors)

    @torch.no_grad()
    def embed_texts(self, model: nn.Module, texts: Sequence[str]) -> Tensor:
        """(T, D) unit embeddings of texts."""
        with evaluating(model), own_precision(model):
            return F.normalize(self._embedded(model, texts, next(model.parameters()).device), dim=-1)

    @torch.no_grad()
    def embed_images(self, model: nn.Module, images: Sequence[Tensor], at_once: int = 128) -> Tensor:
        """(n, D) unit embeddings of uint8 images (C, h, w) of any sizes."""
        device, out = next(model.parameters()).device, []
        with evaluating(model), own_precision(model):
            for first in range(0, len(images), at_once):
                x = self.prepared(images[first : first + at_once]).to(device)
                out.append(F.normalize(image_text.image_features(model, x).float(), dim=-1))
        return torch.cat(out) if out else torch.zeros(0, self.class_vectors(model, ["a"]).shape[1])

    def prepared(self, images: Sequence[Tensor]) -> Tensor:
        """(n, C, H, W) of uint8 images (C, h, w) of any sizes: bicubic, normalised."""
        channels = (with_channels(i, len(self.mean)) for i in images)
        sized = [F.interpolate(i[None].float(), self.size, mode="bicubic", antialias=True)[0] for i in channels]
        return normalise(torch.stack(sized).clamp(0, 255).round().to(torch.uint8), self.mean, self.std)

    def _embedded(self, model: nn.Module, texts: Sequence[str], device: torch.device) -> Tensor:
        tokens = {k: v.to(device) for k, v in texts_padded(self.tokenizer, texts, self.context).items()}
        return image_text.text_features(model, tokens).float()

    def serving(self, model: nn.Module, student: Task) -> tuple[nn.Module, Task]:
        """Of a student that tells classes apart, by whatever task: this network with the vectors of its classes."""
        names = student.class_names
        if not names or isinstance(student, ImageText):
            return model, self
        return model, replace(self, classes=tuple(names), new=(), vectors=self.class_vectors(model, names))

    def as_teacher(self, model: nn.Module, spec: Any, its: Task) -> nn.Module:
        theirs = cast(ImageText, its).tokenizer
        if identity(theirs) != identity(self.tokenizer):
            raise UserError(
                f"The teacher '{spec.model}' reads another tokenizer than the student; give both data sets the same "
                "data.options.tokenizer."
            )
        return model

    # ---- figures -----------------------------------------------------------------------------------------------------

    def meter(self, groups: Sequence[str]) -> Meter:
        return ImageTextMeter(groups, len(self.classes), self.new)

    def example(self) -> Batch:
        return {"input": torch.zeros(1, len(self.mean), *self.size)}

    # ---- on disk -----------------------------------------------------------------------------------------------------

    def facts(self, folder: Path) -> dict[str, Any]:
        self.tokenizer.save_pretrained(folder / TOKENIZER)
        names = ("size", "mean", "std", "context", "classes", "templates", "new")
        return {name: getattr(self, name) for name in names}

    @classmethod
    def restored(cls, facts: Mapping[str, Any], folder: Path) -> ImageText:
        import transformers

        plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in facts.items()}
        return cls(**plain, tokenizer=transformers.AutoTokenizer.from_pretrained(folder / TOKENIZER))

    def save_module(self, module: nn.Module, folder: Path) -> None:
        save: Any = getattr(module, "save_pretrained", None)
        if save is not None:
            save(folder / MODEL)
            self.tokenizer.save_pretrained(folder / MODEL)
            return
        text = getattr(module, "text", None)
        if text is not None and hasattr(text, "config"):  # so that the product stands without the encoder's own folder
            text.config.save_pretrained(folder / TEXT)
        super().save_module(module, folder)

    def load_module(self, spec: ModelSpec, folder: Path) -> nn.Module:
        if (folder / MODEL).is_dir():
            return self.build(spec.model_copy(update={"model": f"hf:{folder / MODEL}", "options": {}})).eval()
        if (folder / TEXT).is_dir():
            towers = {k: {**spec.options[k], "checkpoint": None, "pretrained": False} for k in ("image", "text")}
            towers["text"]["model"] = f"hf:{folder / TEXT}"
            spec = spec.model_copy(update={"options": {**spec.options, **towers}})
        module = self.build(spec)
        load_weights(module, folder / WEIGHTS, owner=f"model {spec.model}")
        return module.eval()

    def weights_file(self, folder: Path) -> Path:
        return folder / MODEL / "model.safetensors" if (folder / MODEL).is_dir() else folder / WEIGHTS

    # ---- for people --------------------------------------------------------------------------------------------------

    def seeing(self, normalisation: tuple[Sequence[float], Sequence[float]] | None) -> ImageText:
        """This task with images of another mean and standard deviation per channel; () and None: the same."""
        if normalisation is None or not normalisation[0]:
            return self
        return replace(self, mean=tuple(normalisation[0]), std=tuple(normalisation[1]))

    def among(self, names: Sequence[str], whole: bool = False) -> ImageText:
        templates = ("{}",) if whole else self.templates
        return replace(self, classes=tuple(names), templates=templates, new=(), vectors=None)

    @torch.no_grad()
    def predict(self, module: nn.Module, inputs: Sequence[Any]) -> list[dict[str, Any]]:
        """For each uint8 image (C, H, W): its `label`, and the five largest `probs` by class name."""
        if not self.classes:
            raise UserError(
                "This product has no classes of its own; name them: stillhouse predict … --class cat --class dog."
            )
        task = self.ready(module)
        device = next(module.parameters()).device
        found = []
        for image in inputs:
            plain = resized(with_channels(image, len(self.mean)), self.size)
            batch = {"input": normalise(plain[None], self.mean, self.std).to(device)}
            probs = task.read(task.call(module, batch), batch).require("logits")[0].softmax(-1).cpu()
            top = probs.topk(min(5, len(probs)))
            by_name = {self.classes[i]: round(p, 4) for p, i in zip(top.values.tolist(), top.indices.tolist())}
            found.append({"label": next(iter(by_name)), "probs": by_name})
        return found

    def pictures(self, batch: Batch, outputs: Signals) -> list[Tensor]:
        """For the class or caption of each sample, the images of the batch that are nearest to it, nearest first, side
        by side."""
        images, embedded = self._images(batch), outputs.parts["image"]
        queries = torch.stack([self._query(i, batch, outputs) for i in range(len(images))])
        near = (queries @ embedded.T).topk(min(SHOWN, len(images)), dim=1).indices.cpu()
        return [torch.cat([images[i] for i in row], 2) for row in near.tolist()]

    def _query(self, i: int, batch: Batch, outputs: Signals) -> Tensor:
        """(D,) of what describes sample i: the vector of its class, or its caption; of neither, its own embedding."""
        label, texts = int(batch["label"][i]), _text_ids(batch)
        if self.vectors is not None and label < len(self.vectors):
            return self.vectors[label].to(outputs.parts["image"])
        if "text" in outputs.parts and label in texts:
            return outputs.parts["text"][texts.index(label)]
        return outputs.parts["image"][i]

    def truth(self, batch: Batch) -> list[Tensor]:
        return self._images(batch)

    def _images(self, batch: Batch) -> list[Tensor]:
        given = batch["input"]
        x = unnormalise((given["pixel_values"] if isinstance(given, Mapping) else given).cpu(), self.mean, self.std)
        times = max(1, 96 // max(self.size))
        return [with_channels(i, 3).repeat_interleave(times, 1).repeat_interleave(times, 2) for i in x]

    def captions(self, batch: Batch, outputs: Signals | None) -> list[str]:
        if outputs is None:
            return [self._described(i, batch) for i in batch["label"].tolist()]
        if outputs.logits is None:
            return ["nearest to the caption"] * len(batch["label"])
        best = outputs.logits.softmax(-1).max(-1)
        return [
            f"nearest to the text; the image itself is called {self.classes[i]} ({p:.0%})"
            for p, i in zip(best.values.tolist(), best.indices.tolist())
        ]

    def _described(self, label: int, batch: Batch) -> str:
        if label < len(self.classes):
            return self.classes[label]
        ids, texts = _text_ids(batch), batch["input"].get("input_ids")
        if texts is None or label not in ids:
            return ""
        return str(self.tokenizer.decode(texts[ids.index(label)], skip_special_tokens=True))

    def disagreement(self, student: Signals, teacher: Signals, batch: Batch) -> Tensor:
        mine, theirs = student.parts["image"], teacher.parts["image"]
        if student.logits is not None and teacher.logits is not None:
            return super().disagreement(student, teacher, batch)
        difference: Tensor = (mine @ mine.T - theirs @ theirs.T).abs().mean(1)
        return difference


def _configs(model: nn.Module) -> list[Any]:
    """Configs of a network's text encoder, of transformers."""
    config = getattr(model, "config", None)
    text = getattr(getattr(model, "text", None), "config", None)
    return [c for c in (getattr(config, "text_config", None), text) if c is not None]


def _text_ids(batch: Batch) -> list[int]:
    """The id of each text of a batch: those of the images where the batch names none."""
    ids: list[int] = (batch["text_label"] if "text_label" in batch else batch["label"]).tolist()
    return ids
