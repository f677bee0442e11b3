"""ALBEF: soft targets and their limits, queues, draws of negatives and of masked words, published weights, a step over
two processes, a run that resumes to the same bits, and captions with wrong words."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from stillhouse.config.specs import DataSpec, ModelSpec
from stillhouse.data import BatchKey, load
from stillhouse.errors import UserError
from stillhouse.methods.image_text.albef.evaluation import Collected, ranked_again, telling
from stillhouse.methods.image_text.albef.losses import (
    Contrast,
    contrast,
    drawn,
    mask_words,
    masked_places,
    masked_word_loss,
    matching_loss,
    negative_weights,
    right_keys,
)
from stillhouse.methods.image_text.albef.training import NOBODY, FusionTraining, Terms
from stillhouse.models import build
from stillhouse.models.fusion import FusedEncoders, begin_from
from stillhouse.runs import recipe
from stillhouse.runs.execution import execute
from stillhouse.runs.prediction import predict
from stillhouse.runs.products import load_product
from stillhouse.training import engine
from stillhouse.training.context import Progress

HALF = {"width": 16, "layers": 1, "heads": 2}
LATER = Progress(epoch=3, steps_per_epoch=4, epochs=5)


def network(seed: int = 0, **options: Any) -> FusedEncoders:
    torch.manual_seed(seed)
    options = {"dim": 8, "vocabulary": 30, "context": 12, "dropout": 0.0, "input_shape": (3, 16, 16), **options}
    return FusedEncoders({**HALF, "patch": 8}, {**HALF, "fusion": 1}, **options)


def batch(count: int = 6, seed: int = 0, ids: list[int] | None = None) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(5, 30, (count, 7), generator=draw)
    tokens[:, 0] = 1
    inside = torch.ones_like(tokens)
    inside[::2, 5:] = 0
    images = torch.randn(count, 3, 16, 16, generator=draw)
    label = torch.arange(count) if ids is None else torch.tensor(ids)
    given = {"pixel_values": images, "input_ids": tokens * inside, "attention_mask": inside}
    return {"input": given, "label": label}


def training(net: FusedEncoders | None = None, queue: int = 12, momentum: float = 0.9, **terms: Any) -> FusionTraining:
    net = net or network()
    torch.manual_seed(1)
    return FusionTraining(net, Terms(**terms), queue, momentum, begin=1, mask=4)


def unit(rows: int, dim: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)), dim=-1)


# ---- soft targets ----------------------------------------------------------------------------------------------------


def embeddings() -> list[Tensor]:
    return [unit(4, 6, seed) for seed in range(4)]


def test_without_the_momentum_network_contrast_is_cross_entropy_with_the_right_keys():
    image, text, their_image, their_text = embeddings()
    right = right_keys(torch.arange(4), torch.arange(4))
    t = torch.tensor(0.1)
    found = contrast(image, text, their_image, their_text, their_image, their_text, right, t, 0.0)
    own = torch.arange(4)
    rows = F.cross_entropy(image @ their_text.T / t, own), F.cross_entropy(text @ their_image.T / t, own)
    torch.testing.assert_close(found.loss, sum(rows) / 2)


def test_at_full_share_the_right_keys_say_nothing_and_a_network_that_is_its_average_has_no_gradient():
    image, text, _, _ = embeddings()
    t, losses = torch.tensor(0.1), []
    for ids in (torch.arange(4), torch.arange(4).flip(0)):
        right = right_keys(ids, torch.arange(4))
        losses.append(contrast(image, text, image, text, image, text, right, t, 1.0).loss)
    assert torch.equal(*losses)
    z = (image @ text.T / t).requires_grad_()
    (-(z.detach().softmax(-1) * z.log_softmax(-1)).sum(-1).mean()).backward()
    assert z.grad.abs().max() < 1e-6
    free = image.clone().requires_grad_()
    contrast(free, text, image, text, image, text, right, t, 1.0).loss.backward()
    assert free.grad.abs().max() < 1e-5


def test_samples_of_one_id_are_equally_right_and_the_empty_queue_is_nobodys():
    right = right_keys(torch.tensor([3, 5, 3]), torch.tensor([3, 5, 3, 5, NOBODY]))
    assert torch.equal(right[0], torch.tensor([0.5, 0, 0.5, 0, 0]))
    assert torch.equal(right[1], torch.tensor([0, 0.5, 0, 0.5, 0]))
    assert right[:, -1].sum() == 0


def test_soft_words_are_hard_words_at_share_0_and_weigh_masked_words_alone():
    logits, theirs = torch.randn(2, 5, 9, requires_grad=True), torch.randn(2, 5, 9)
    labels = torch.tensor([[-100, 3, -100, 1, -100], [-100] * 5])
    torch.testing.assert_close(
        masked_word_loss(logits, labels, theirs, 0.0), F.cross_entropy(logits[0, [1, 3]], labels[0, [1, 3]])
    )
    masked_word_loss(logits, labels, theirs, 0.4).backward()
    assert logits.grad.abs().sum(-1).bool().tolist() == (labels != -100).tolist()
    assert masked_word_loss(logits, torch.full_like(labels, -100), theirs, 0.4) == 0


@pytest.mark.parametrize("epochs", [1.0, 2.0])
def test_the_share_rises_from_0_over_the_first_epochs(epochs: float):
    terms = Terms(ramp=epochs)
    assert terms.risen(Progress(epoch=0, batch=0, steps_per_epoch=10)) == 0
    assert terms.risen(Progress(epoch=0, batch=5, steps_per_epoch=10)) == pytest.approx(0.5 / epochs)
    assert terms.risen(Progress(epoch=2, batch=0, steps_per_epoch=10)) == 1
    assert Terms(ramp=0).risen(Progress()) == 1


def test_negatives_may_be_random_in_the_first_epochs():
    terms = Terms(random_until=2)
    assert [terms.hard(Progress(epoch=e)) for e in range(4)] == [False, False, True, True]
    assert not Terms(negatives="random").hard(LATER) and Terms().hard(Progress())
    module, ids = training(), torch.arange(6)
    found = module(batch(), LATER)  # fills the queue
    assert found["loss"].isfinite()
    similar = Contrast(torch.zeros(()), torch.eye(6) * 9, torch.randn(6, 6))
    uniform = module.weights(similar, module.apart(ids), hard=False)
    assert torch.allclose(uniform[0], module.apart(ids) / 6.0) and torch.equal(*uniform)


# ---- draws -----------------------------------------------------------------------------------------------------------


def test_negatives_are_drawn_by_similarity_and_are_never_right():
    torch.manual_seed(0)
    similarity = torch.tensor([[9.0, 2.0, 1.0, 0.0]]).repeat(4000, 1)
    allowed = torch.tensor([[False, True, True, True]]).repeat(4000, 1)
    found = drawn(negative_weights(similarity, allowed), allowed)
    shares = torch.bincount(found, minlength=4) / 4000
    expected = similarity[0].masked_fill(~allowed[0], -torch.inf).softmax(0)
    torch.testing.assert_close(shares, expected, atol=0.03, rtol=0)
    far = torch.tensor([[500.0, 0, 0, 0]])  # the weights of all that is allowed vanish
    assert int(drawn(negative_weights(far, allowed[:1]), allowed[:1])) != 0


def test_a_sample_without_a_negative_counts_for_nothing_and_a_batch_of_one_is_refused():
    module = training(targets="ids")
    same = module(batch(4, ids=[7, 7, 7, 7]), LATER)
    assert same["loss"].isfinite()
    yes, no = torch.randn(2, 2), torch.randn(4, 2)
    there = torch.tensor([1, 0, 1, 0])
    torch.testing.assert_close(matching_loss(yes, no, there), matching_loss(yes, no[::2]))
    with pytest.raises(UserError, match="two pairs at least"):
        module(batch(1), LATER)


def test_masked_words_are_a_share_without_marks_and_padding_and_at_least_one():
    torch.manual_seed(0)
    ids = torch.randint(5, 30, (400, 12))
    ids[:, 0] = 1
    inside = torch.ones_like(ids)
    inside[:, 9:] = 0
    found = mask_words(ids, inside, first=1, mask=4, vocabulary=30)
    chosen = found.labels != -100
    assert not chosen[:, 0].any() and not chosen[:, 9:].any()
    assert 0.13 < chosen[:, 1:9].float().mean() < 0.17
    assert torch.equal(found.labels[chosen], ids[chosen]) and torch.equal(found.ids[~chosen], ids[~chosen])
    assert 0.75 < (found.ids[chosen] == 4).float().mean() < 0.85
    for seed in range(20):
        torch.manual_seed(seed)
        assert (mask_words(ids[:1, :3], inside[:1, :3], 1, 4, 30, 0.01).labels != -100).sum() >= 1
    assert set(masked_places(found.labels, 0.15).tolist()) >= set(chosen.flatten().nonzero()[:, 0].tolist())
    assert len(masked_places(found.labels, 0.15)) < ids.numel() / 3


# ---- average and queues ----------------------------------------------------------------------------------------------


def test_the_average_shares_no_memory_learns_nothing_and_follows_once_a_step():
    module = training(momentum=0.9)
    net, average = module.student, module.average
    assert not {p.data_ptr() for p in net.parameters()} & {p.data_ptr() for p in average.parameters()}
    before = copy.deepcopy(average.state_dict())
    optimizer = torch.optim.SGD(module.param_groups()[0]["params"], lr=0.5)
    module.train()
    module(batch(), LATER)["loss"].backward()
    assert not average.training and all(p.grad is None for p in average.parameters())
    optimizer.step()
    assert all(torch.equal(v, before[k]) for k, v in average.state_dict().items())
    module.after_step(batch(), LATER, False)
    assert all(torch.equal(v, before[k]) for k, v in average.state_dict().items()), "gradients were only gathered"
    module.after_step(batch(), LATER, True)
    own = net.visual_projection.weight
    torch.testing.assert_close(average.visual_projection.weight, 0.9 * before["visual_projection.weight"] + 0.1 * own)


@pytest.mark.parametrize(("momentum", "moves"), [(1.0, False), (0.0, True)])
def test_an_average_that_keeps_all_is_frozen_and_one_that_keeps_nothing_is_a_copy(momentum: float, moves: bool):
    module = training(momentum=momentum)
    before = module.average.text_projection.weight.clone()
    with torch.no_grad():
        module.student.text_projection.weight.add_(1)
    module.follow()
    expected = module.student.text_projection.weight if moves else before
    assert torch.equal(module.average.text_projection.weight, expected)


def test_a_queue_holds_the_last_embeddings_whether_or_not_batches_divide_it():
    module = training(queue=5)
    seen: list[int] = []
    for step in range(4):
        ids = torch.arange(3) + 3 * step
        module.enqueue(unit(3, 8, step), unit(3, 8, step + 9), ids)
        seen += ids.tolist()
        assert set(module.id_queue.tolist()) - {NOBODY} == set(seen[-5:])
    assert int(module.pointer) == 12 % 5
    place = module.id_queue.tolist().index(11)
    assert torch.equal(module.image_queue[place], unit(3, 8, 3)[2])
    assert torch.equal(module.text_queue[place], unit(3, 8, 12)[2])
    with pytest.raises(UserError, match="the queue holds 5, but a batch of all processes has 6"):
        module(batch(6), LATER)
    assert training(queue=0)(batch(), LATER)["loss"].isfinite()


def test_the_temperature_is_put_back_into_its_range():
    module = training()
    for wild, expected in ((-3.0, 0.001), (7.0, 0.5)):
        module.student.temperature.data.fill_(wild)
        assert module(batch(), LATER)["loss"].isfinite()
        assert module.student.temperature.item() == pytest.approx(expected)


def test_every_weight_of_the_network_learns_and_losses_can_be_left_out():
    module = training().train()
    module(batch(), LATER)["loss"].backward()
    without = [k for k, p in module.student.named_parameters() if p.grad is None]
    assert without == []
    module = training(words=0.0).train()
    terms = module(batch(), LATER)
    assert set(terms) == {"loss", "contrast", "matching"}


# ---- several processes -----------------------------------------------------------------------------------------------


def _step(rank: int, world: int) -> dict[str, Tensor]:
    """Loss, gradient and queue of a contrast of 8 pairs and of masked words in unequal numbers, shared by processes."""
    module, whole = training(targets="ids", queue=16), batch(8, ids=[0, 1, 2, 0, 3, 4, 1, 5])
    own = slice(rank * 8 // world, (rank + 1) * 8 // world)
    given, net = {k: v[own] for k, v in whole["input"].items()}, module.student
    images, ids, inside = given["pixel_values"], given["input_ids"], given["attention_mask"]
    seen, read, theirs = net.image_tokens(images), net.text_tokens(ids, inside), module.their_image_tokens(images)
    found = module.contrasted(seen, read, theirs, ids, inside, whole["label"][own], 0.4)
    labels = torch.where(
        torch.arange(7)[None] < torch.tensor([1, 0, 2, 0, 3, 3, 1, 2])[:, None], whole["input"]["input_ids"], -100
    )
    words = masked_word_loss(net.words(net.fused(read, inside, seen)), labels[own], None, 0.0)
    (found.loss + words).backward()
    grads = {k: p.grad for k, p in net.named_parameters() if p.grad is not None}
    if world > 1:
        for grad in grads.values():
            torch.distributed.all_reduce(grad)
    return {"loss": found.loss.detach(), "queue": module.image_queue, **{k: g / world for k, g in grads.items()}}


def _rank(rank: int, folder: str, world: int) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    torch.save(_step(rank, world), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_have_the_contrast_the_words_and_the_queue_of_one(tmp_path: Path):
    torch.multiprocessing.spawn(_rank, (str(tmp_path), 2), nprocs=2)
    alone = _step(0, 1)
    for rank in range(2):
        for name, value in torch.load(tmp_path / f"{rank}.pt", weights_only=True).items():
            atol = 1e-5 * max(1.0, float(alone[name].abs().max()))
            torch.testing.assert_close(value, alone[name], rtol=1e-4, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


# ---- published weights and figures -----------------------------------------------------------------------------------


def test_a_network_begins_from_the_halves_of_a_bert_and_from_a_vision_transformer():
    sizes = {"hidden_size": 16, "intermediate_size": 64, "num_attention_heads": 2, "vocab_size": 30}
    options = {**sizes, "num_hidden_layers": 2, "max_position_embeddings": 20, "task": "masked"}
    bert = build(ModelSpec(model="hf:config:bert", options=options)).eval()
    vit_options = {"embed_dim": 16, "depth": 1, "num_heads": 2, "patch_size": 8}
    vit = build(ModelSpec(model="timm:vit_tiny_patch16_224", options=vit_options), 10, (3, 16, 16)).eval()
    net = network().eval()
    begin_from(net, vit, bert)
    given = batch()["input"]
    ids, inside = given["input_ids"], given["attention_mask"]
    with torch.no_grad():
        theirs = bert(input_ids=ids, attention_mask=inside, output_hidden_states=True)
        real = inside.bool()
        torch.testing.assert_close(
            net.text_tokens(ids, inside)[real], theirs.hidden_states[1][real], rtol=1e-4, atol=1e-5
        )
        for layer in net.fusion_layers:
            layer.crossattention = None
        words = net.words(net.fused(net.text_tokens(ids, inside), inside, net.image_tokens(given["pixel_values"])))
        torch.testing.assert_close(words[real], theirs.logits[real], rtol=1e-4, atol=1e-5)
        image = given["pixel_values"]
        torch.testing.assert_close(net.image_tokens(image), vit.forward_features(image), rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="image encoder to begin from does not fit"):
        begin_from(network(input_shape=(3, 32, 32)), vit)


def test_ranking_again_finds_what_matching_knows_among_the_nearest_alone():
    net = network().eval()
    count = 6
    image, text = unit(count, 8, 0), unit(count, 8, 0)
    tokens, words = torch.randn(count, 5, 16), torch.randn(count, 7, 16)
    ids = torch.arange(count)
    every = Collected(
        tokens, image, words, text, batch(count)["input"]["input_ids"], torch.ones(count, 7).long(), ids, ids
    )
    alone = ranked_again(net, every, 1, torch.device("cpu"))
    assert alone["matched_image_to_text_r1"] == alone["matched_text_to_image_r1"] == 1
    several = ranked_again(net, every, 3, torch.device("cpu"))
    assert several["matched_image_to_text_r5"] == 1, "the right one is among the three"


def test_words_that_most_captions_have_tell_nothing_apart():
    rows = torch.tensor([[1, 8, 9, 20, 2], [1, 8, 9, 21, 2], [1, 8, 9, 22, 2]])
    inside = torch.ones_like(rows)
    none = torch.zeros(3, 1)
    found = telling(Collected(none, none, none, none, rows, inside, none[:, 0], none[:, 0]), [1, 2])
    assert found.tolist() == [[False, False, False, True, False]] * 3


# ---- captions and runs -----------------------------------------------------------------------------------------------

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "grey": (90, 90, 92)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base, draw = tmp_path_factory.mktemp("colours"), np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 4)):
        for name, colour in COLOURS.items():
            (base / split / name).mkdir(parents=True)
            for i in range(count):
                image = np.clip(np.array(colour) + draw.integers(-9, 9, (16, 16, 1)), 0, 255).astype(np.uint8)
                Image.fromarray(image).save(base / split / name / f"{i}.png")
    return base


def data(folder: Path, **options: Any) -> dict[str, Any]:
    options = {"tokenizer": "bytes", "templates": ["a {}"], "context": 40, "look": True, **options}
    return {"name": f"captions:imagefolder:{folder}", "image_size": 16, "augment": "plain", "options": options}


def texts(bundle: Any, split: str, train: bool, epoch: int = 0) -> list[str]:
    dataset = bundle.dataset(split, train=train)
    rows = np.arange(len(dataset))
    ids = dataset.batch(BatchKey(epoch, rows, 0, len(rows)), 0)["input"]["input_ids"]
    return bundle.task.tokenizer.batch_decode(ids, skip_special_tokens=True)


def test_captions_say_how_an_image_looks(folder: Path):
    bundle = load(DataSpec.model_validate(data(folder)))
    wanted = {"a red, dark and reddish", "a green, dark and greenish", "a grey, dark and grey"}
    assert set(texts(bundle, "train", True)) == wanted == set(texts(bundle, "test", False))
    assert bundle.task.classes == ()
    ids = bundle.dataset("train", train=True).labels()
    assert len(ids.unique()) == 3


def test_a_share_of_the_words_of_training_captions_is_wrong_and_of_no_others(folder: Path):
    bundle = load(DataSpec.model_validate(data(folder, noise=0.4)))
    clean = [
        f"a {n}, dark and {c}"
        for n, c in (("green", "greenish"), ("grey", "grey"), ("red", "reddish"))
        for _ in range(20)
    ]
    noisy = texts(bundle, "train", True)
    assert noisy == texts(bundle, "train", True, epoch=5), "the same in every epoch"
    wrong = [a != b for one, two in zip(clean, noisy) for a, b in zip(one.split(), two.split())]
    assert 0.2 < np.mean(wrong) * 5 / 3 < 0.6
    assert set(texts(bundle, "test", False)) == set(clean)
    assert set(bundle.dataset("train", train=False).captions(i)[0] for i in range(60)) == set(clean)
    train = bundle.dataset("train", train=True)
    pairs = {(int(i), t) for i, t in zip(train.labels(), noisy)}
    assert len(pairs) == len({i for i, _ in pairs}) == len({t for _, t in pairs}), "an id is a caption"
    other = load(DataSpec.model_validate(data(folder, noise=0.2)))
    assert other.fingerprint != bundle.fingerprint


def config(folder: Path, **further: Any) -> Any:
    train = {
        "epochs": 2,
        "batch_size": 20,
        "eval_every": 0,
        "log_every": 1,
        "checkpoint_seconds": 0,
        "optimizer": {"name": "adamw", "lr": 1e-3},
    }
    return recipe.validate(
        {
            "method": "albef",
            "data": data(folder, noise=0.2),
            "student": {
                "model": "stillhouse:fusion",
                "options": {"vision": {**HALF, "patch": 8}, "text": {**HALF, "fusion": 1}, "dim": 8},
            },
            "queue": 40,
            "targets": "ids",
            "rerank": 4,
            "train": train,
            **further,
        }
    )


class Stop(Exception):
    pass


def test_a_run_that_was_stopped_resumes_with_its_queues_to_the_same_bits(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole = execute(config(folder), tmp_path / "whole", cpu=True)
    assert {"matched_image_to_text_r1", "masked_accuracy", "image_to_text_r1", "matching_accuracy"} <= set(whole)
    collect = engine.Loop._collect

    def stop(self: Any, i: int, terms: Any) -> None:
        collect(self, i, terms)
        if i == 4:
            raise Stop

    monkeypatch.setattr(engine.Loop, "_collect", stop)
    with pytest.raises(Stop):
        execute(config(folder), tmp_path / "again", cpu=True)
    monkeypatch.setattr(engine.Loop, "_collect", collect)
    execute(config(folder), tmp_path / "again", cpu=True)
    for name in ("product/model.safetensors", "metrics.csv"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    net = load_product(tmp_path / "whole").module
    assert isinstance(net, FusedEncoders)
    picture = next((folder / "test" / "red").iterdir())
    line = next(predict(tmp_path / "whole", [str(picture)], names=["red", "green"]))
    assert "red" in line and "%" in line


def test_retrieval_is_tuned_on_images_of_another_size(folder: Path, tmp_path: Path):
    larger = {**data(folder), "image_size": 32}
    train = {"epochs": 1, "batch_size": 20, "optimizer": {"name": "adamw", "lr": 1e-3}}
    tuned = config(
        folder, words_weight=0, finetune={"queue": 20, "train": train}, data=larger, pretraining=data(folder)
    )
    figures = execute(tuned, tmp_path / "run", cpu=True)
    assert "masked_accuracy" not in figures and figures["image_to_text_r10"] > 0


def test_what_cannot_be_is_refused(folder: Path, tmp_path: Path):
    with pytest.raises(UserError, match="nothing to learn"):
        config(folder, contrast_weight=0, matching_weight=0, words_weight=0)
    clip = {"model": "stillhouse:clip", "options": {"vision": {**HALF, "patch": 8}, "text": HALF, "dim": 8}}
    with pytest.raises(UserError, match="no fusion of image and text"):
        execute(config(folder, student=clip), tmp_path / "clip", cpu=True)
    with pytest.raises(UserError, match="no classes, so none of them is new"):
        load(DataSpec.model_validate(data(folder, new=["red"])))
