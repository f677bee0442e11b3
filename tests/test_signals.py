"""What networks say: probabilities in every form, taps that fire once or complain, and hooks that survive compilation,
checkpointing and copies."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from stillhouse import Distillation, Ensemble, FrozenTeacher, Momentum, PastSelf, Progress, Signals, Taps
from stillhouse.distillation.teachers import Reader
from stillhouse.errors import UserError
from stillhouse.objectives.ce import CrossEntropy
from stillhouse.objectives.fitnet import FitNet
from stillhouse.objectives.kd import KD
from stillhouse.objectives.nd import ND
from stillhouse.signals import TopK, call_model, first_tensor, read_logits


class Net(nn.Module):
    """Two stages and a head; `spare` is never called."""

    def __init__(self, width: int = 6, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layer1 = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.ReLU())
        self.layer2 = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU())
        self.spare = nn.Linear(2, 2)
        self.fc = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer2(self.layer1(x)).mean((2, 3)))


def batch(n: int = 8) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"input": torch.randn(n, 1, 6, 6, generator=generator), "label": torch.arange(n) % 4}


def hooks(*models: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for model in models for m in model.modules())


# ---- probabilities ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_probabilities_say_what_their_logits_say_at_every_temperature(temperature: float) -> None:
    logits = torch.randn(5, 7)
    expected = torch.log_softmax(logits / temperature, -1)
    assert torch.allclose(Signals(logits=logits).log_probs(temperature), expected, atol=1e-6)
    assert torch.allclose(Signals(probs=logits.softmax(-1)).log_probs(temperature), expected, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_an_ensemble_averages_its_members_probabilities_at_the_temperature_asked(temperature: float) -> None:
    a, b = torch.randn(2, 5, 7)
    said = Signals(members=(Signals(logits=a), Signals(probs=b.softmax(-1))))
    expected = ((a / temperature).softmax(-1) + (b / temperature).softmax(-1)) / 2
    assert torch.allclose(said.log_probs(temperature).exp(), expected, atol=1e-6)


def test_an_ensemble_of_logits_is_the_mean_logit() -> None:
    a, b = Net(seed=1).eval(), Net(seed=2).eval()
    said = Ensemble([FrozenTeacher(a), FrozenTeacher(b)], mean="logits")(batch())
    expected = torch.log_softmax((a(batch()["input"]) + b(batch()["input"])) / 2, -1)
    assert torch.allclose(said.log_probs(), expected, atol=1e-6)


def test_log_probabilities_are_finite_and_float32_where_inputs_are_neither() -> None:
    said = Signals(probs=torch.tensor([[0.0, 1.0]], dtype=torch.float16)).log_probs(2.0)
    assert said.dtype == torch.float32 and said.isfinite().all()
    half = Signals(logits=torch.tensor([[3e4, -3e4]], dtype=torch.float16)).log_probs()
    assert half.dtype == torch.float32 and half.isfinite().all()


def test_what_cannot_be_known_is_refused() -> None:
    top = TopK(torch.zeros(2, 1), torch.zeros(2, 1, dtype=torch.long), torch.zeros(2))
    with pytest.raises(UserError, match="knows only the top k"):
        Signals(top=top).log_probs()
    with pytest.raises(UserError, match="its teacher gives none"):
        Signals(embedding=torch.zeros(2, 3)).log_probs()


def test_detached_signals_share_their_values_and_leave_autograd() -> None:
    x = torch.randn(2, 3, requires_grad=True)
    said = Signals(logits=x * 2, embedding=x, taps={"a": x + 1}, members=(Signals(logits=x),)).detach()
    assert said.logits is not None and torch.equal(said.logits, x * 2) and said.embedding is not None
    assert not any(t.requires_grad for t in (said.logits, said.embedding, said.taps["a"], said.members[0].logits))


def test_logits_are_found_in_what_libraries_return() -> None:
    x = torch.randn(2, 3)
    assert all(read_logits(given) is x for given in (x, {"out": x, "aux": x + 1}, {"logits": x}, (x, x + 1), [x]))
    with pytest.raises(UserError, match="Could not find logits in the model's output, a dict with scores"):
        read_logits({"scores": x})
    named = call_model(_Named(), {"input": {"a": x, "b": x}})
    assert torch.equal(named, 2 * x)


class _Named(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b


# ---- taps ------------------------------------------------------------------------------------------------------------


def test_a_tap_is_what_its_module_returns_and_in_is_what_it_gets() -> None:
    net, x = Net(), batch()["input"]
    taps = Taps(net, ["layer1", "fc:in", "fc"])
    with taps.capture() as got:
        logits = net(x)
    assert torch.equal(got["layer1"], net.layer1(x)) and got["fc"] is logits
    assert torch.equal(got["fc:in"], net.layer2(net.layer1(x)).mean((2, 3)))
    taps.remove()
    assert hooks(net) == 0


def test_a_wrong_tap_is_told_with_the_nearest_names() -> None:
    with pytest.raises(UserError, match=r"The student has no submodule 'layr1' to tap; nearest: layer1"):
        Taps(Net(), ["layr1"], owner="student")


def test_a_tap_that_is_never_reached_is_an_error_and_not_a_silence() -> None:
    net = Net()
    with pytest.raises(UserError, match="never reached the tap 'spare'"), Taps(net, ["spare"]).capture():
        net(batch()["input"])
    vit = timm.create_model("test_vit", img_size=32, num_classes=3).eval()
    if vit.blocks[0].attn.fused_attn:
        with pytest.raises(UserError, match="fused attention"), Taps(vit, ["blocks.0.attn.attn_drop"]).capture():
            vit(torch.zeros(1, 3, 32, 32))


def test_taps_write_only_while_capturing_and_keep_nothing() -> None:
    net = Net()
    taps = Taps(net, ["layer1"])
    net(batch()["input"])
    with taps.capture() as got:
        assert not got
        net(batch()["input"])
        with taps.capture() as inner:
            net(batch(2)["input"])
        assert len(inner["layer1"]) == 2 and len(got["layer1"]) == 8
    net(batch(3)["input"])
    assert len(got["layer1"]) == 8


def test_a_forward_that_fails_leaves_the_taps_usable() -> None:
    net = Net()
    taps = Taps(net, ["layer1"])
    with pytest.raises(RuntimeError), taps.capture():
        net(torch.zeros(1, 5, 6, 6))
    with taps.capture() as got:
        net(batch()["input"])
    assert got["layer1"].shape[0] == 8


def test_a_module_that_returns_several_things_is_tapped_at_its_first_tensor() -> None:
    x = torch.ones(2)
    assert all(first_tensor(v) is x for v in (x, (None, x), [x, 1], {"a": 3, "b": x}, ((None, x), 1)))
    with pytest.raises(UserError, match="holds no tensor"):
        first_tensor({"a": 1})


@pytest.mark.parametrize(
    "copy_of", [copy.deepcopy, lambda net: AveragedModel(net).module], ids=["deepcopy", "moving average"]
)
def test_a_copy_of_a_tapped_model_stays_silent(copy_of: Callable[[nn.Module], nn.Module]) -> None:
    net = Net()
    taps = Taps(net, ["layer1", "fc:in"])
    other = copy_of(net)
    with taps.capture() as got:
        net(batch()["input"])
        mine = got["layer1"]
        other(batch(2)["input"])
    assert got["layer1"] is mine and len(got["fc:in"]) == 8


# ---- distillation with taps: compiled, checkpointed, closed ----------------------------------------------------------


def distillation(student: nn.Module, teacher: nn.Module) -> Distillation:
    fitnet = FitNet(student_layer="layer2", teacher_layer="layer2")
    return Distillation(student, teacher, [CrossEntropy(), KD(), (fitnet, 1.0)])


def gradients(module: Distillation) -> dict[str, Tensor]:
    module.zero_grad()
    module(batch(), Progress())["loss"].backward()
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_distillation_gives_the_gradients_of_an_eager_one(backend: str) -> None:
    torch._dynamo.reset()
    eager = distillation(Net(), Net(9, seed=1)).build(batch())
    compiled = distillation(Net(), Net(9, seed=1)).build(batch())
    compiled.compile(backend=backend)
    for _ in range(2):
        expected, given = gradients(eager), gradients(compiled)
    assert expected.keys() == given.keys() and any("regressor" in n for n in given)
    assert all(torch.allclose(given[n], expected[n], atol=1e-6) for n in expected)


def test_compiling_before_the_hooks_are_made_is_refused() -> None:
    with pytest.raises(UserError, match=r"Call build\(batch\) before compile"):
        distillation(Net(), Net()).compile()


class Checkpointed(Net):
    """Recomputes its stages in the backward pass."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        for stage in (self.layer1, self.layer2):
            x = checkpoint(stage, x, use_reentrant=self.reentrant)
        return self.fc(x.mean((2, 3)))


def test_gradient_checkpointing_changes_no_gradient_of_a_tap() -> None:
    plain = distillation(Net(), Net(9, seed=1)).build(batch())
    saving = distillation(Checkpointed(reentrant=False), Net(9, seed=1)).build(batch())
    expected, given = gradients(plain), gradients(saving)
    assert expected.keys() == given.keys() and all(torch.allclose(given[n], expected[n], atol=1e-6) for n in expected)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpointing_which_would_train_nothing_is_refused() -> None:
    module = distillation(Checkpointed(reentrant=True), Net(9, seed=1)).build(batch())
    with pytest.raises(UserError, match="student's tap 'layer2' carries no gradient"):
        module(batch(), Progress())


def test_timms_own_gradient_checkpointing_trains_a_tapped_block() -> None:
    student = timm.create_model("test_vit", img_size=32, num_classes=4, in_chans=1)
    student.set_grad_checkpointing()
    images = {"input": torch.randn(2, 1, 32, 32), "label": torch.tensor([0, 1])}
    teacher = timm.create_model("test_vit", img_size=32, num_classes=4, in_chans=1)
    module = Distillation(student, teacher, [(FitNet("blocks.1", "blocks.3"), 1.0)]).build(images)
    module(images, Progress())["loss"].backward()
    assert student.blocks[1].mlp.fc1.weight.grad.abs().max() > 0 and student.blocks[2].mlp.fc1.weight.grad is None
    module.close()
    assert hooks(student, teacher) == 0


def test_closing_leaves_no_hook_and_the_teachers_mode_as_it_was() -> None:
    student, teacher, other = Net(), Net(9, seed=1).train(), Net(9, seed=2).eval()
    module = Distillation(
        student,
        {"teacher": Ensemble([FrozenTeacher(other)]), "wide": teacher},
        [CrossEntropy(), KD(), _reading(ND(), "wide")],
    )
    module.build(batch())
    assert not teacher.training and hooks(student) == 1 and hooks(teacher) == 1
    module.close()
    assert hooks(student, teacher, other) == 0 and teacher.training and not other.training


def _reading(objective: ND, teacher: str) -> ND:
    objective.teacher = teacher
    return objective


def test_frozen_teachers_are_outside_the_module_and_learning_ones_inside() -> None:
    student, teacher = Net(), Net(9, seed=1)
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    kd = KD(temperature=2.0)
    kd.teacher = kd.name = "own"
    module = Distillation(student, {"teacher": teacher, "own": Momentum(0.5)}, [CrossEntropy(), KD(), kd]).build(
        batch()
    )
    module.train()
    assert not teacher.training and not module.learning["own"].training
    assert {k.split(".")[0] for k in module.state_dict()} == {"student", "learning", "objectives"}
    optimizer = torch.optim.SGD(module.param_groups(), lr=0.5)
    module(batch(), Progress())["loss"].backward()
    optimizer.step()
    start = module.learning["own"].model.fc.weight.clone()
    module.after_step(batch(), Progress(), stepped=True)
    assert torch.allclose(module.learning["own"].model.fc.weight, (start + student.fc.weight) / 2)
    assert all(torch.equal(before[k], v) for k, v in teacher.state_dict().items()) and all(
        p.grad is None for p in teacher.parameters()
    )


def test_a_distillation_calls_each_network_once_a_batch() -> None:
    calls = []
    student, teacher = Net(), Net(9, seed=1)
    module = Distillation(student, teacher, [CrossEntropy(), KD(), ND(), (FitNet("layer2", "layer2"), 1.0)]).build(
        batch()
    )
    for name, net in (("student", student), ("teacher", teacher)):
        net.register_forward_hook(lambda *_, name=name: calls.append(name))
    module(batch(), Progress())
    assert sorted(calls) == ["student", "teacher"]


def test_unlike_class_counts_are_told_before_training() -> None:
    teacher = Net()
    teacher.fc = nn.Linear(6, 10)
    with pytest.raises(UserError, match="the teacher has 10 classes and the student 4"):
        Distillation(Net(), teacher, [KD()]).build(batch())


def test_a_build_that_fails_says_why_whatever_the_teacher() -> None:
    past = PastSelf()
    past.start(batch()["label"], 4)
    with pytest.raises(
        UserError, match="past-self teacher needs `index` in every batch, but the data gives only: input, label"
    ):
        Distillation(Net(), past, [CrossEntropy(), KD()]).build(batch())
    unbuilt = Distillation(Net(), Momentum(0.9), [_reading(ND(), "other")])
    with pytest.raises(UserError, match="reads the teacher 'other'"):
        unbuilt.build(batch())
    unbuilt.close()


def test_a_closed_reader_still_answers_without_taps():
    reader = Reader(nn.Sequential(nn.Linear(4, 3), nn.ReLU()), "teacher")
    batch = {"input": torch.ones(2, 4)}
    reader.attach(["tap:0"], batch)
    assert set(reader(batch).taps) == {"0"}
    reader.close()
    assert reader(batch).logits.shape == (2, 3) and not reader(batch).taps
