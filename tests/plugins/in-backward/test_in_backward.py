"""Updates during backward, beside ordinary ones: the same bits, one gradient at a time, and clear refusals."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import drivetrain_optimizers
from drivetrain import (
    Callback,
    CallbackContext,
    ConfigError,
    ModelError,
    Precision,
    Trainer,
    TrainingConfig,
    component,
    make_component,
)
from drivetrain_in_backward import OptimizerInBackward
from drivetrain_testing import conformance

WIDTH = 16


class Net(nn.Module):
    """Layers of several sorts, with one matrix used twice and one that no loss reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.tied = nn.Linear(4, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm, self.drop, self.last = nn.LayerNorm(WIDTH), nn.Dropout(0.1), nn.Linear(WIDTH, 1)
        self.unused = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        for _ in range(2):
            x = self.norm(x + torch.tanh(self.tied(self.drop(x))))
        out: Tensor = self.last(x)
        return out


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net()


def rows(count: int = 24) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(4, generator=generator), torch.randn(1, generator=generator)) for _ in range(count)]


@component
class Gradients(Callback):
    """How many gradients are in memory when backward has ended, and at the most during it."""

    without_gradients = True

    def __attrs_post_init__(self) -> None:
        self.after: list[int] = []
        self.most = 0

    def on_run_start(self, ctx: CallbackContext) -> None:
        self.parameters = list(ctx.model.parameters())
        for parameter in self.parameters:
            parameter.register_hook(self.look)

    def look(self, gradient: Tensor) -> None:
        self.most = max(self.most, 1 + sum(p.grad is not None for p in self.parameters))

    def on_optimizer_step(self, ctx: CallbackContext) -> None:
        self.after.append(sum(p.grad is not None for p in self.parameters))


def trainer(
    *callbacks: Callback, steps: int = 8, optimizer: Any = None, model: nn.Module | None = None, **options: Any
) -> Trainer:
    given = {"max_grad_norm": None, "standard_callbacks": False, "log_interval": "2st", "per_device_batch_size": 4}
    parts = {name: options.pop(name) for name in ("precision", "step") if name in options}
    config = TrainingConfig(max_duration=f"{steps}st", device="cpu", **{**given, **options})
    chosen = optimizer or make_component("optimizer", {"use": "adamw", "lr": 0.01, "weight_decay": 0.1})
    parts.setdefault("precision", Precision())
    return Trainer(model or net(), config, rows(), loss=nn.MSELoss(), optimizer=chosen, callbacks=callbacks, **parts)


def state(trainer: Trainer) -> dict[str, Tensor]:
    """Weights and the optimizer's state by name."""
    found = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    for index, entries in trainer.ctx.optimizer.state_dict()["state"].items():
        found |= {f"{index}.{name}": torch.as_tensor(value).clone() for name, value in entries.items() if name[:2] != "__"}
    return found


def assert_same(one: Trainer, other: Trainer) -> None:
    torch.testing.assert_close(state(one), state(other), rtol=0, atol=0)
    assert one.output.losses == other.output.losses


_ALONE = "it is for one process, and says so"


@conformance(
    OptimizerInBackward(),
    config={"max_grad_norm": 0.0},
    unsupported={"two_ranks_equal_one": _ALONE, "steps_call_no_collective": _ALONE},
    budget=500,  # an optimizer's step for each parameter
)
def test_conformance(check: Any) -> None:
    check()


OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "adamw": lambda: make_component("optimizer", {"use": "adamw", "lr": 0.01}),
    "adamw of groups": lambda: make_component(
        "optimizer", {"use": "adamw", "lr": 0.01, "groups": [{"match": "last.*", "lr": 0.1}]}
    ),
    "unfused": lambda: make_component("optimizer", {"use": "adamw", "lr": 0.01, "fused": False}),
    "sgd": lambda: make_component("optimizer", {"use": "sgd", "lr": 0.05, "momentum": 0.9}),
    "lamb": lambda: make_component("optimizer", {"use": "lamb", "lr": 0.01}),
    "adafactor": lambda: make_component("optimizer", {"use": "adafactor", "lr": 0.01}),
    "lion": lambda: make_component("optimizer", {"use": "lion", "lr": 0.001}),
    "muon": lambda: make_component("optimizer", {"use": "muon", "lr": 0.01}),
    "adamw_8bit": lambda: make_component("optimizer", {"use": "adamw_8bit", "lr": 0.01}),
}


class TestBits:
    @pytest.mark.parametrize("name", OPTIMIZERS)
    def test_equal_those_of_updates_after_backward(self, name: str) -> None:
        plain, early = trainer(optimizer=OPTIMIZERS[name]()), trainer(OptimizerInBackward(), optimizer=OPTIMIZERS[name]())
        plain.train()
        early.train()
        assert_same(plain, early)
        begun = trainer()
        assert not torch.equal(begun.model.state_dict()["tied.weight"], early.model.state_dict()["tied.weight"])

    def test_one_number_of_a_gradient_changed_is_seen(self) -> None:
        """The negative control."""
        early, other = trainer(OptimizerInBackward()), trainer(OptimizerInBackward())
        early.train()
        handle = other.model.get_parameter("last.bias").register_hook(lambda gradient: gradient + 1e-3)
        other.train()
        handle.remove()
        with pytest.raises(AssertionError):
            assert_same(early, other)

    @pytest.mark.parametrize("schedule", ["cosine", {"use": "linear", "warmup": "3st"}], ids=["cosine", "warm-up"])
    def test_with_a_schedule(self, schedule: Any) -> None:
        plain, early = trainer(scheduler=schedule), trainer(OptimizerInBackward(), scheduler=schedule)
        plain.train()
        early.train()
        assert_same(plain, early)

    def test_with_a_scheduler_of_torch(self) -> None:
        def make(*callbacks: Callback) -> Trainer:
            model = net()
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
            schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
            config = TrainingConfig(
                max_duration="8st", max_grad_norm=None, standard_callbacks=False, per_device_batch_size=4, device="cpu"
            )
            return Trainer(
                model, config, rows(), loss=nn.MSELoss(), optimizer=optimizer, scheduler=schedule, callbacks=callbacks
            )

        plain, early = make(), make(OptimizerInBackward())
        plain.train()
        early.train()
        assert_same(plain, early)

    @pytest.mark.parametrize("how", ["recomputed", "bf16"])
    def test_with_blocks(self, how: str) -> None:
        def make(*callbacks: Callback) -> Trainer:
            torch.manual_seed(0)
            blocks = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1), nn.Tanh()) for _ in range(3)))
            options: dict[str, Any] = {"activation_checkpointing": True} if how == "recomputed" else {"precision": Bf16()}
            return trainer(*callbacks, model=nn.Sequential(blocks, nn.Linear(4, 1)), **options)

        plain, early = make(), make(OptimizerInBackward())
        plain.train()
        early.train()
        assert_same(plain, early)

    @pytest.mark.parametrize("before,after", [(True, True), (False, True), (True, False)])
    def test_going_on(self, before: bool, after: bool) -> None:
        """The state is the same with and without, so one may take over from the other."""
        whole = trainer(steps=8)
        whole.train()
        first = trainer(*[OptimizerInBackward()] * before, steps=8)
        for step in first.steps():
            if step.number == 5:
                saved = copy.deepcopy(first.state_dict())
                break
        second = trainer(*[OptimizerInBackward()] * after, steps=8)
        second.load_state_dict(saved)
        second.train()
        assert second.output.losses[-1] == whole.output.losses[-1]
        torch.testing.assert_close(state(second), state(whole), rtol=0, atol=0)

    def test_a_second_sitting(self) -> None:
        plain, early = trainer(), trainer(OptimizerInBackward())
        for made in (plain, early):
            for step in made.steps():
                if step.number == 3:
                    break
            made.train()
        assert_same(plain, early)

    def test_an_averaged_model_follows(self) -> None:
        ends = []
        for callbacks in ([], [OptimizerInBackward()]):
            made = trainer(*callbacks, make_component("callback", {"use": "ema", "use_at_end": True}))  # type: ignore[arg-type]
            made.train()
            ends.append(made)
        assert_same(*ends)

    def test_gradients_beside_the_training_update_nothing(self) -> None:
        @component
        class Aside(Callback):
            def on_step_start(self, ctx: CallbackContext) -> None:
                before = [p.detach().clone() for p in ctx.model.parameters()]
                gradients, _ = ctx.gradients_of()
                assert sum(g is not None for g in gradients) == 8
                assert all(map(torch.equal, before, ctx.model.parameters()))

        plain, early = trainer(Aside()), trainer(OptimizerInBackward(), Aside())
        plain.train()
        early.train()
        assert_same(plain, early)


class Bf16(Precision):
    """Autocast, as the precision plugin does it."""

    name, dtype = "bf16", torch.bfloat16

    def forward(self) -> Any:
        return torch.autocast("cpu", torch.bfloat16)


class TestMemory:
    def test_one_gradient_at_a_time(self) -> None:
        plain, early = Gradients(), Gradients()
        trainer(plain).train()
        trainer(early, OptimizerInBackward()).train()
        assert (set(plain.after), plain.most) == ({8}, 8)
        assert set(early.after) == {0}
        assert early.most <= 2  # a layer's weight and bias come together

    def test_nothing_stays_behind(self) -> None:
        made = trainer(OptimizerInBackward())
        made.train()
        made.model(torch.randn(3, 4)).sum().backward()
        assert sum(p.grad is not None for p in made.model.parameters()) == 8


ROUTED = {"use": "routed", "routes": [{"match": "*.bias", "use": "sgd"}], "default": "adamw"}


def refusal(*callbacks: Callback, **options: Any) -> str:
    with pytest.raises(ConfigError) as found:
        trainer(OptimizerInBackward(), *callbacks, **options).train()
    return str(found.value)


@component
class Watching(Callback):
    def on_clipped(self, ctx: CallbackContext) -> None: ...


@component
class Changing(Callback):
    def on_gradients(self, ctx: CallbackContext) -> None: ...


class TestRefused:
    def test_clipping(self) -> None:
        assert "max_grad_norm: must be false with optimizer_in_backward" in refusal(max_grad_norm=1.0)

    def test_several_microbatches(self) -> None:
        assert "gradient_accumulation_steps: must be 1" in refusal(gradient_accumulation_steps=2)

    def test_a_loss_scale(self) -> None:
        class Scaling(Precision):
            name, scales = "fp16", True

        assert "precision: cannot be fp16" in refusal(precision=Scaling())

    @pytest.mark.parametrize(
        "callback,event", [(Watching(), "on_clipped"), (Changing(), "on_gradients")], ids=["read", "write"]
    )
    def test_who_needs_gradients(self, callback: Callback, event: str) -> None:
        assert f"callbacks: callback:{type(callback).__name__} needs gradients ({event})" in refusal(callback)

    @pytest.mark.parametrize(
        "spec,why",
        [
            ("schedulefree_adamw", "changes what is kept for all parameters together"),
            (ROUTED, "does not go by its parameter groups"),
        ],
    )
    def test_optimizers_of_several_parameters(self, spec: Any, why: str) -> None:
        message = refusal(optimizer=make_component("optimizer", spec))
        assert "optimizer: " in message
        assert why in message

    def test_one_whose_update_depends_on_the_others(self) -> None:
        class Normalized(torch.optim.SGD):
            @torch.no_grad()
            def step(self, closure: Any = None) -> None:  # type: ignore[override]
                parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
                norm = torch.stack([p.grad.norm() for p in parameters]).norm() if parameters else 1.0
                for parameter in parameters:
                    parameter -= 0.1 * parameter.grad / norm

        model = net()
        message = refusal(model=model, optimizer=Normalized(model.parameters(), lr=0.1))
        assert (
            "Normalized cannot be used with optimizer_in_backward: its update of one parameter depends on the others" in message
        )

    def test_one_with_hooks(self) -> None:
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer.register_step_post_hook(lambda *_: None)
        assert "hooks are registered on its step" in refusal(model=model, optimizer=optimizer)

    def test_everything_at_once_and_before_the_first_step(self) -> None:
        message = refusal(Watching(), max_grad_norm=1.0, gradient_accumulation_steps=2)
        assert message.startswith("configuration: 3 problems")

    def test_trying_out_draws_no_random_number(self) -> None:
        random = torch.get_rng_state()
        trainer(OptimizerInBackward()).train()
        assert torch.equal(torch.get_rng_state(), random)

    def test_a_gradient_in_parts(self) -> None:
        class Reentrant(Net):
            def forward(self, x: Tensor) -> Tensor:
                x = torch.tanh(self.first(x))
                for _ in range(2):
                    x = torch.utils.checkpoint.checkpoint(lambda x: torch.tanh(self.tied(x)), x, use_reentrant=True)
                out: Tensor = self.last(x)
                return out

        with pytest.raises(ModelError, match=r"the gradient of 'tied.\w+' comes in several parts"):
            trainer(OptimizerInBackward(), model=Reentrant()).train()

    def test_out_of_memory_in_the_middle(self) -> None:
        made = trainer(OptimizerInBackward())
        count = iter(range(1000))

        def fail(gradient: Tensor) -> None:
            if next(count) == 2:
                raise torch.OutOfMemoryError("out of memory")

        made.model.get_parameter("first.weight").register_hook(fail)
        with pytest.warns(UserWarning, match="memory"), pytest.raises(ModelError, match="cannot be repeated in smaller parts"):
            made.train()
        assert made.output.steps == 2


class TestAnomaly:
    def make(self, **options: Any) -> tuple[Trainer, Any]:
        anomaly = make_component("callback", {"use": "anomaly", **options})
        return trainer(OptimizerInBackward(), anomaly, model=net()), anomaly  # type: ignore[arg-type]

    def test_good_steps_are_left_alone(self) -> None:
        plain = trainer()
        plain.train()
        watched, _ = self.make(nonfinite="rollback")
        watched.train()
        assert_same(plain, watched)

    def test_a_loss_that_is_no_number_ends_the_run_and_says_that_its_update_was_made(self, tmp_path: Any) -> None:
        anomaly = make_component("callback", {"use": "anomaly"})
        made = trainer(OptimizerInBackward(), anomaly, output_dir=tmp_path)  # type: ignore[arg-type]
        handle = made.model.register_forward_hook(lambda *args: args[2] * float("nan"))
        with pytest.raises(Exception, match=r"step 1.*Its update was made"):
            made.train()
        handle.remove()

    @pytest.mark.parametrize(
        "options,key", [({"nonfinite": "skip"}, "anomaly.nonfinite"), ({"spike": "rollback"}, "anomaly.loss_factor")]
    )
    def test_what_needs_gradients_is_refused(self, options: dict[str, Any], key: str) -> None:
        made, _ = self.make(**options)
        with pytest.raises(ConfigError, match=key):
            made.train()

    @pytest.mark.parametrize("snapshot_every", [2, 100])
    @pytest.mark.parametrize("optimizer", ["adamw", {"use": "sgd", "momentum": 0.9}], ids=["adamw", "sgd"])
    def test_going_back_is_the_same_as_with_ordinary_updates(self, tmp_path: Any, snapshot_every: int, optimizer: Any) -> None:
        @component
        class Bad(Callback):
            at: int = 5

            def on_batch(self, ctx: CallbackContext) -> None:
                if (ctx.epoch, ctx.step_in_epoch) == (0, self.at):
                    ctx.batch = (ctx.batch[0] * float("nan"), ctx.batch[1])

        ends = []
        for name, callbacks in (("plain", []), ("early", [OptimizerInBackward()])):
            anomaly = make_component("callback", {"use": "anomaly", "nonfinite": "rollback", "snapshot_every": snapshot_every})
            chosen = make_component("optimizer", optimizer)
            made = trainer(*callbacks, Bad(), anomaly, optimizer=chosen, output_dir=tmp_path / name)  # type: ignore[arg-type]
            made.train()
            assert anomaly.left_out == [(0, 5)]  # type: ignore[attr-defined]
            ends.append(made)
        assert_same(*ends)


def test_checkpoints_are_whole_while_weights_change_early(tmp_path: Any) -> None:
    """A save in the background copies what the next backward is about to change."""
    plain = trainer()
    plain.train()
    checkpoint = make_component("callback", {"use": "checkpoint", "every": "1st", "keep_last": 20})
    saving = trainer(OptimizerInBackward(), checkpoint, output_dir=tmp_path, run_name="r")  # type: ignore[arg-type]
    saving.train()
    assert_same(plain, saving)
    steps = sorted(path.name for path in (tmp_path / "r" / "checkpoints").iterdir() if path.name.startswith("step"))
    assert len(steps) == 8
    for name in steps[:-1]:
        again_with = make_component("callback", "checkpoint")
        again = trainer(OptimizerInBackward(), again_with, output_dir=tmp_path, run_name=f"from-{name}")  # type: ignore[arg-type]
        again.train(resume=str(tmp_path / "r" / "checkpoints" / name))
        torch.testing.assert_close(state(again), state(plain), rtol=0, atol=0)


def test_the_class_of_the_engines_own_optimizers_is_used() -> None:
    """That the direct kernel calls were tried above, not torch's ordinary step."""
    assert isinstance(trainer().ctx.optimizer, drivetrain_optimizers.direct.AdamW)
