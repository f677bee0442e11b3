"""LightGen: the diffusion head, masks and what the transformer may see, preference, captions, a run and its product."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from stillhouse.config.specs import DataSpec
from stillhouse.data import load
from stillhouse.errors import UserError
from stillhouse.methods.generation.lightgen import CaptionGenerator, method
from stillhouse.methods.generation.lightgen.captions import (
    CaptionsSpec,
    TextSpec,
    embedded,
    high_frequency,
    place_figures,
    places_of,
)
from stillhouse.methods.generation.lightgen.head import DiffusionHead, head_betas, respaced, tables
from stillhouse.methods.generation.lightgen.method import CaptionedImages, preference_loss
from stillhouse.methods.generation.lightgen.network import (
    Draws,
    MaskedGenerator,
    NetworkSpec,
    SamplingSpec,
    drawn_ratio,
    guidance_at,
    mask_of,
    masked_count,
    patchify,
    remaining,
    unpatchify,
)
from stillhouse.runs import recipe
from stillhouse.runs.execution import execute
from stillhouse.runs.prediction import predict
from stillhouse.runs.products import load_product

SMALL = {"patch": 2, "width": 16, "encoder": 1, "decoder": 1, "cross": 1, "text": 1, "heads": 2}
HEAD = {"head_width": 16, "head_depth": 1, "repeat": 2}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def shaken(module: torch.nn.Module) -> Any:
    """The module with every weight moved, as those that begin at 0 hide mistakes."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=draw))
    return module.eval()


@pytest.fixture
def generator() -> MaskedGenerator:
    torch.manual_seed(0)
    made: MaskedGenerator = shaken(MaskedGenerator(NetworkSpec(**SMALL, **HEAD), 3, 8, 12))
    return made


# ---- the head --------------------------------------------------------------------------------------------------------


def test_at_first_the_head_predicts_no_noise_whatever_it_is_given() -> None:
    head = DiffusionHead(4, 8, 16, 2)
    terms = head.terms(normal(20, 4), normal(20, 8), torch.arange(20) * 50, normal(20, 4, seed=1))
    assert terms.eps.abs().max() == 0 and terms.vb.isfinite().all()
    torch.testing.assert_close(terms.mse, normal(20, 4, seed=1).square().mean(1))


def test_the_bound_trains_the_variance_alone() -> None:
    head = shaken(DiffusionHead(4, 8, 16, 1))
    terms = head.terms(normal(6, 4), normal(6, 8), torch.tensor([0, 1, 10, 100, 500, 999]), normal(6, 4, seed=1))
    (gradient,) = torch.autograd.grad(terms.vb.sum(), terms.output)
    assert gradient[:, :4].abs().max() == 0 and bool((gradient[:, 4:].abs().sum(1) > 0).all())


def test_a_head_that_knows_the_token_draws_it() -> None:
    head, x = DiffusionHead(2, 2, 8, 1), normal(50, 2)
    bar = (1 - head_betas()).cumprod(0)

    def knows(noisy: torch.Tensor, t: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        a = bar[t].float()[:, None]
        return torch.cat([(noisy - a.sqrt() * x) / (1 - a).sqrt(), torch.zeros_like(x)], 1)

    head.forward = knows  # type: ignore[method-assign]
    found = head.sample(x, normal(50, 2, seed=1), lambda i: normal(50, 2, seed=2 + i), steps=25)
    torch.testing.assert_close(found, x, atol=0.02, rtol=0)


def test_fewer_steps_have_the_noise_of_the_steps_they_stand_for() -> None:
    betas = head_betas()
    places, few = respaced(betas, 10)
    assert places == [0, 111, 222, 333, 444, 555, 666, 777, 888, 999]
    torch.testing.assert_close((1 - few).cumprod(0), (1 - betas).cumprod(0)[places])
    assert respaced(betas, 1)[0] == [0] and all(t.isfinite().all() for t in tables(few))
    with pytest.raises(UserError, match="1 to 1000"):
        respaced(betas, 1001)


# ---- masks and the transformer ---------------------------------------------------------------------------------------


def test_tokens_go_back_to_their_image() -> None:
    x = normal(2, 3, 8, 8)
    tokens = patchify(x, 2)
    assert tokens.shape == (2, 16, 12)
    torch.testing.assert_close(tokens[0, 1].view(3, 2, 2), x[0, :, :2, 2:4])
    assert torch.equal(unpatchify(tokens, 2, 3), x)
    with pytest.raises(UserError, match="do not divide"):
        patchify(x, 3)


def test_masked_tokens_are_not_seen_and_the_order_does_not_matter(generator: MaskedGenerator) -> None:
    tokens, orders = patchify(normal(2, 3, 8, 8), 2), torch.stack([torch.randperm(16) for _ in range(2)])
    mask = mask_of(orders, 12)
    condition = generator.condition(normal(2, 5, 12))
    z = generator.vectors(tokens, mask, condition, 12)
    hidden = torch.where(mask[..., None] == 1, 100.0, tokens)
    torch.testing.assert_close(generator.vectors(hidden, mask, condition, 12), z)
    seen = torch.where(mask[..., None] == 0, tokens + 1, tokens)
    assert not torch.allclose(generator.vectors(seen, mask, condition, 12), z, atol=1e-3)
    other = generator.condition(normal(2, 5, 12, seed=3))
    assert not torch.allclose(generator.vectors(tokens, mask, other, 12), z, atol=1e-3)


def test_no_token_may_be_left_to_see(generator: MaskedGenerator) -> None:
    tokens = patchify(normal(2, 3, 8, 8), 2)
    condition = generator.condition(normal(2, 5, 12))
    z = generator.vectors(tokens, torch.ones(2, 16), condition, 16)
    assert z.shape == (2, 16, 16) and z.isfinite().all()
    draws, masked = generator.draws(tokens, 1.0)
    assert masked == 16 and bool((draws.mask == 1).all())
    generator.loss(normal(2, 3, 8, 8), condition, draws, masked).backward()
    assert generator.mask_token.grad is not None and generator.mask_token.grad.abs().sum() > 0


def test_a_dropped_caption_says_nothing(generator: MaskedGenerator) -> None:
    found = generator.condition(normal(2, 5, 12), torch.tensor([True, False]))
    assert torch.equal(found[0], generator.no_text[0].expand(5, -1))
    torch.testing.assert_close(found[1], generator.condition(normal(2, 5, 12))[1])
    with pytest.raises(UserError, match="features of 7"):
        generator.condition(normal(2, 5, 7))


def test_another_grid_takes_interpolated_positions(generator: MaskedGenerator) -> None:
    tokens = patchify(normal(1, 3, 12, 12), 2)
    z = generator.vectors(tokens, mask_of(torch.randperm(36)[None], 30), generator.condition(normal(1, 5, 12)), 30)
    assert z.shape == (1, 36, 16)


def test_masking_ratios_lie_in_their_range() -> None:
    torch.manual_seed(0)
    ratios = [drawn_ratio(0.7) for _ in range(300)]
    assert 0.7 <= min(ratios) < 0.75 and 0.95 < max(ratios) <= 1 and drawn_ratio(1.0) == 1.0
    assert masked_count(16, 0.75) == 12 and masked_count(16, 0.76) == 13


@pytest.mark.parametrize("iterations", [1, 3, 16, 40])
def test_every_token_is_drawn_once(generator: MaskedGenerator, iterations: int) -> None:
    left, counts = 16, []
    for i in range(iterations - 1):
        left = remaining(16, i, iterations, left)
        counts.append(left)
    assert all(a > b or a == b == 1 for a, b in zip([16, *counts], counts))
    spec = SamplingSpec(iterations=iterations, steps=2, guidance=1.5, schedule="linear")
    draw = torch.Generator().manual_seed(0)
    found = generator.sample(
        normal(2, 5, 12),
        torch.stack([torch.randperm(16) for _ in range(2)]),
        spec,
        lambda *shape: torch.randn(shape, generator=draw),
    )
    assert found.shape == (2, 3, 8, 8) and bool((patchify(found, 2).abs().sum(-1) > 0).all())
    assert guidance_at(spec, 16, 16) == 1 and guidance_at(spec, 16, 1) == pytest.approx(1 + 0.5 * 15 / 16)


# ---- preference ------------------------------------------------------------------------------------------------------


def test_preference_begins_at_log_two_and_its_argument_turns_with_the_pair() -> None:
    a, b, c, d = (normal(5, seed=i).abs() for i in range(4))
    assert preference_loss(a, a, b, b, 500.0).item() == pytest.approx(math.log(2))
    argument = -3 / 2 * ((a - b) - (c - d))
    difference = preference_loss(a, b, c, d, 3.0) - preference_loss(c, d, a, b, 3.0)
    torch.testing.assert_close(difference, -argument.mean())
    assert preference_loss(a - 1, a, b + 1, b, 3.0) < math.log(2) < preference_loss(a + 1, a, b - 1, b, 3.0)


def test_a_step_asks_both_alike_and_leaves_the_reference_alone(generator: MaskedGenerator) -> None:
    texts = normal(4, 5, 12)
    spec = method.DPOSpec(anchor=0.0)
    module = method.PreferenceTraining(generator, texts, 0.1, spec)
    batch = {"input": normal(6, 3, 8, 8), "lost": normal(6, 3, 8, 8, seed=1), "label": torch.arange(6) % 4}
    module.build(batch)
    module.train()
    terms = module(batch, None)
    assert terms["loss"].item() == pytest.approx(math.log(2), abs=1e-5), "dropout is off"
    terms["loss"].backward()
    assert all(p.grad is None for p in module._reference[0].parameters())
    assert sum(float(p.grad.abs().sum()) for p in generator.parameters() if p.grad is not None) > 0
    assert not any(n.startswith("_reference") for n in module.state_dict())


def test_the_error_is_that_of_masked_tokens(generator: MaskedGenerator) -> None:
    x, condition = normal(2, 3, 8, 8), generator.condition(normal(2, 5, 12))
    draws, masked = generator.draws(patchify(x, 2), 0.75)
    error = generator.noise_error(x, condition, draws, masked)
    noise = torch.where(draws.mask.flatten().repeat(2)[:, None] == 1, draws.noise, draws.noise + 9)
    other = generator.noise_error(x, condition, Draws(draws.mask, draws.t, noise), masked)
    assert error.shape == (2,)
    torch.testing.assert_close(error, other)


# ---- captions --------------------------------------------------------------------------------------------------------


def test_captions_say_where_things_are() -> None:
    assert places_of("three left of seven") == ("three", "seven", True)
    assert places_of("seven below three") == ("three", "seven", False) and places_of("cat") is None
    wanted = ["one left of two", "one left of two", "one left of two", "cat"]
    found = ["one left of two", "two left of one", "one above three", "dog"]
    figures = place_figures(wanted, found)
    assert figures == {"object_accuracy": pytest.approx((1 + 1 + 0.5) / 3), "relation_accuracy": pytest.approx(1 / 3)}
    assert place_figures(["cat"], ["dog"]) == {}


def test_words_have_the_same_features_everywhere_and_their_order_counts() -> None:
    spec = TextSpec()
    a, b = embedded(["one left of two", "two left of one"], spec, Path())
    assert a.shape == (6, 32) and torch.equal(a, embedded(["One left of two"], spec, Path())[0])
    assert not torch.equal(a, b) and bool((a[4:] == 0).all())
    with pytest.raises(UserError, match="words, or hf"):
        embedded(["x"], TextSpec(model="bert"), Path())


def test_a_share_of_the_captions_is_shown_to_nobody() -> None:
    seen, unseen = CaptionsSpec(unseen=0.25).split(20)
    few, same = CaptionsSpec(unseen=0.25, seen=4).split(20)
    assert sorted([*seen, *unseen]) == list(range(20)) and unseen == same
    assert len(few) == 4 and set(few) <= set(seen)


def test_fine_detail_is_what_blurring_takes() -> None:
    x = normal(4, 1, 16, 16)
    blurred = torch.nn.functional.avg_pool2d(x, 3, 1, 1)
    assert high_frequency(blurred) < 0.2 * high_frequency(x)
    assert high_frequency(torch.ones(2, 1, 8, 8)) == pytest.approx(0, abs=1e-20)


def test_pictures_are_what_their_captions_say() -> None:
    bundle = load(DataSpec(name="arranged", options={"count": 3, "digits": 3}))
    assert len(bundle.classes) == 12 and "two above zero" in bundle.classes
    dataset = bundle.dataset("train", train=False)
    assert len(dataset) == 36 and dataset[0]["input"].shape == (1, 16, 16)
    low = dataset[0]["input"].min()
    for i in range(36):
        sample = dataset[i]
        x = sample["input"][0] - low
        side = " left of " in bundle.classes[int(sample["label"])]
        halves = (x[:, :8], x[:, 8:]) if side else (x[:8], x[8:])
        assert all(float(h.sum()) > 0 for h in halves)
        across = (halves[0].sum(1) if side else halves[0].sum(0)) > 1e-4
        assert int(across.sum()) <= 8


def test_a_mirrored_image_is_mirrored_with_its_pair() -> None:
    from stillhouse.data.dataset import BatchKey

    images = (normal(20, 1, 4, 4) * 50 + 100).clamp(0, 255).to(torch.uint8)
    data = CaptionedImages(images, torch.zeros(20, dtype=torch.long), (0.0,), (1.0,), True, {"lost": images})
    key = BatchKey(0, torch.arange(20).numpy(), 0, 20)
    batch = data.batch(key, 0)
    plain = images.float() / 255
    same = (batch["input"] == plain).flatten(1).all(1)
    assert torch.equal(batch["input"], batch["lost"]) and 0 < int(same.sum()) < 20
    assert torch.equal(batch["input"][~same], plain.flip(-1)[~same])


# ---- runs ------------------------------------------------------------------------------------------------------------


def settings(**keys: Any) -> Any:
    training = {"epochs": 2, "batch_size": 12, "eval_every": 0, "optimizer": {"name": "adamw", "lr": 1e-3}}
    return recipe.validate(
        {
            "method": "lightgen",
            "data": {"name": "arranged", "options": {"count": 3, "digits": 3}},
            "teachers": [
                {
                    "model": "stillhouse:dit",
                    "options": {"width": 8, "depth": 1, "heads": 2, "patch": 4},
                    "train": {**training, "epochs": 1},
                }
            ],
            "synthetic": {"images": 24, "sampler": {"steps": 2}},
            "network": {**SMALL, **HEAD, "patch": 8},
            "train": training,
            "dpo": {"pairs": 12, "train": {**training, "batch_size": 4, "log_every": 1, "checkpoint_seconds": 0}},
            "sampling": {"iterations": 2, "steps": 2},
            "probe": {"options": {"widths": [8]}, "train": {**training, "epochs": 1}},
            "judge": {"samples": 2},
            **keys,
        }
    )


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path_factory.getbasetemp() / "lightgen_cache"))


def test_an_interrupted_second_stage_resumes_and_the_product_is_what_was_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = execute(settings(), tmp_path / "whole", cpu=True)
    assert {"relation_accuracy", "relation_accuracy_unseen", "high_frequency_ratio", "frechet"} <= set(whole)
    forward, done = method.PreferenceTraining.forward, []

    def failing(self: Any, *given: Any) -> Any:
        done.append(1)
        if len(done) == 4:
            raise RuntimeError("power")
        return forward(self, *given)

    monkeypatch.setattr(method.PreferenceTraining, "forward", failing)
    with pytest.raises(RuntimeError, match="power"):
        execute(settings(), tmp_path / "run", cpu=True)
    again = execute(settings(), tmp_path / "run", cpu=True)
    assert again["frechet"] == whole["frechet"] and len(done) == 7
    a, b = (load_product(tmp_path / n) for n in ("run", "whole"))
    assert isinstance(a, CaptionGenerator)
    assert all(torch.equal(v, b.module.state_dict()[k]) for k, v in a.module.state_dict().items())
    caption = a.blueprint.captions[0]
    assert torch.equal(a.samples(caption, 2), b.samples(caption, 2))
    assert a.samples("nine below eight", 1).shape == (1, 1, 16, 16), "words that it has not seen have features too"
    assert len(list(predict(tmp_path / "run", [caption], tmp_path / "shown"))) == 1


def test_the_datas_images_may_be_the_synthetic_ones_and_steps_may_go_to_positives(tmp_path: Path) -> None:
    config = settings(teachers=[])
    config.dpo.objective = "positives"
    figures = execute(config, tmp_path / "run", cpu=True)
    assert figures["parameters"] > 0
    rows = (tmp_path / "run" / "metrics.csv").read_text()
    assert "pair" not in rows


def test_mistakes_get_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="fewer than a batch"):
        config = settings()
        config.dpo.pairs = 3
        execute(config, tmp_path / "pairs", cpu=True)
    with pytest.raises(UserError, match="do not divide latents of 16 x 16"):
        execute(settings(network={**SMALL, "patch": 5}), tmp_path / "patch", cpu=True)
