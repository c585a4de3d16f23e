"""What an optimizer must take: groups, parameters without gradients, closures, sparse gradients, other types."""

from __future__ import annotations

from typing import Any

import attrs
import torch
from torch import Tensor, nn

from drivetrain import DrivetrainError
from drivetrain_testing.harness import tiny_model
from drivetrain_testing.kit import check
from drivetrain_testing.subject import Subject

_KINDS_OF_NUMBERS = (torch.bfloat16, torch.float64)


@check("optimizer")
def every_parameter_is_in_one_group(subject: Subject) -> None:
    """All that is trainable, each once, and nothing frozen."""
    model = _model(subject)
    frozen = next(iter(model.parameters())).requires_grad_(False)
    held = [p for group in _optimizer(subject, model).param_groups for p in group["params"]]
    subject.require(
        not any(p is frozen for p in held),
        "it holds a parameter with requires_grad = False",
        "build the groups with self.parameter_groups(ctx.model)",
    )
    wanted = [p for p in model.parameters() if p.requires_grad]
    subject.require(
        sorted(map(id, held)) == sorted(map(id, wanted)),
        f"it holds {len(held)} parameters of {len(wanted)} trainable ones",
        "build the groups with self.parameter_groups(ctx.model), which has each once",
    )


@check("optimizer")
def options_of_groups_count(subject: Subject) -> None:
    """`groups = [{match = …, lr = 0.0}]` freezes those parameters and no others."""
    if "groups" not in {f.name for f in attrs.fields(subject.cls)}:
        subject.fail("it has no option `groups`", "derive it from OptimizerComponent and use self.parameter_groups(ctx.model)")
    model = _model(subject)
    name = next(iter(dict(model.named_parameters())))
    thing = subject.fresh()
    thing.groups = [{"match": name, "lr": 0.0, "weight_decay": 0.0}]
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    trainer = attrs.evolve(subject, thing=thing).trainer(model=model, steps=3, **_loss(subject))
    trainer.train()
    moved = {key for key, p in model.named_parameters() if not torch.equal(p.detach(), before[key])}
    subject.require(
        name not in moved,
        f"a group with lr = 0 and weight_decay = 0 moved ({name})",
        "take lr and weight_decay from each group of self.param_groups, not from the defaults",
    )
    subject.require(moved, "no parameter of the other groups moved", "update every group of self.param_groups")


@check("optimizer")
def the_learning_rate_counts(subject: Subject) -> None:
    """A schedule writes group["lr"] before each step: at 0 no weight moves."""
    model = _model(subject)
    optimizer = _optimizer(subject, model)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = _row(model)
    for _ in range(2):
        _give_gradients(model)
        optimizer.step()
    subject.require(
        torch.equal(_row(model), before),
        'weights move although group["lr"] is 0',
        'read group["lr"] in every step, for the decay too (θ ← θ(1 − ηλ))',
    )


@check("optimizer")
def parameters_without_gradient_stay(subject: Subject) -> None:
    """A parameter that a step did not reach (`grad is None`) neither moves nor decays, and does not stop the others."""
    model = _model(subject)
    optimizer = _optimizer(subject, model)
    _give_gradients(model)
    idle, *rest = model.parameters()
    idle.grad = None
    kept, others = idle.detach().clone(), [p.detach().clone() for p in rest]
    try:
        optimizer.step()
    except Exception as error:
        subject.fail(
            f"a parameter without gradient stops the step: {type(error).__name__}: {error}",
            "leave out parameters whose grad is None",
        )
    subject.require(torch.equal(idle.detach(), kept), "a parameter without gradient moves", "leave it out of the decay too")
    subject.require(
        any(not torch.equal(p.detach(), old) for p, old in zip(rest, others, strict=True)),
        "a parameter without gradient keeps the others from moving",
        "leave out that parameter only",
    )


@check("optimizer")
def closures_are_called(subject: Subject) -> None:
    """`step(closure)` computes the loss again with gradients on, uses what that gives, and returns it."""
    model = _model(subject)
    optimizer, seen, losses = _optimizer(subject, model), [], []

    def closure() -> Tensor:
        seen.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = torch.stack([p.square().sum() for p in model.parameters()]).sum()
        if loss.requires_grad:
            loss.backward()
        losses.append(loss)
        return loss

    returned: Any = None
    try:
        returned = optimizer.step(closure)  # type: ignore[arg-type]  # torch asks for a float, and takes a tensor
    except Exception as error:
        if not seen:
            said = f"step takes no closure: {type(error).__name__}: {error}"
            subject.fail(said, "def step(self, closure=None), as in torch.optim.Optimizer")
    remedy = "with torch.enable_grad(): loss = closure(), before anything else, and return loss"
    subject.require(seen, "step(closure) does not call it", remedy)
    subject.require(all(seen), "step(closure) calls it with gradients off", remedy)
    same = isinstance(returned, Tensor) and torch.equal(returned, losses[0])
    subject.require(same, "step(closure) does not return its loss", remedy)


@check("optimizer")
def sparse_gradients_are_used_or_refused(subject: Subject) -> None:
    """A sparse gradient works, or is refused by an error that says so before any weight has moved."""
    model = _Table()
    model(torch.tensor([1, 4])).backward()
    before, table = _row(model), model.table.weight.detach().clone()
    try:
        _optimizer(subject, model).step()
    except Exception as error:
        subject.require(
            "sparse" in str(error).lower(),
            f"a sparse gradient raises {type(error).__name__}: {error}",
            'check grad.is_sparse first: raise ModelError("… is sparse, which NAME cannot use. Make the embedding '
            'dense (sparse=False)")',
        )
        subject.require(
            torch.equal(_row(model), before),
            "a sparse gradient is refused when some weights have moved already",
            "look at all gradients before the first update",
        )
        return
    subject.require(
        not torch.equal(model.table.weight.detach()[[1, 4]], table[[1, 4]]),
        "a sparse gradient is taken without an error, and the rows that it is of stay where they were",
        "use it (grad.coalesce() has indices and values), or refuse it: raise ModelError before the first update",
    )


@check("optimizer")
def parameters_keep_their_types(subject: Subject) -> None:
    """bfloat16 and float64 weights stay what they are, and finite, or are refused by name when the run begins."""
    for dtype in _KINDS_OF_NUMBERS if subject.model is None else ():
        model = tiny_model(dtype)
        try:
            optimizer = _optimizer(subject, model)
        except DrivetrainError as error:
            said = str(error)
            subject.require(str(dtype).removeprefix("torch.") in said, f"{dtype} weights are refused: {said}", "name the type")
            continue
        try:
            for _ in range(3):
                _give_gradients(model)
                optimizer.step()
        except Exception as error:
            subject.fail(
                f"a step on {dtype} weights raises {type(error).__name__}: {error}",
                "make the state with torch.zeros_like(parameter), or compute in float32 and copy_ the result back",
            )
        kept = all(p.dtype == dtype for p in model.parameters())
        subject.require(kept, f"{dtype} weights become another type", "update in place (add_, copy_), which keeps the type")
        subject.require(
            torch.isfinite(_row(model)).all(),
            f"{dtype} weights are not finite after 3 steps",
            "compute what can overflow or vanish in float32",
        )


class _Table(nn.Module):
    """An embedding with sparse gradients below two dense layers."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.out, self.hidden, self.table = nn.Linear(4, 4), nn.Linear(4, 4), nn.Embedding(6, 4, sparse=True)

    def forward(self, rows: Tensor) -> Tensor:
        found: Tensor = self.out(self.hidden(self.table(rows)).tanh()).square().mean()
        return found


def _model(subject: Subject) -> nn.Module:
    return tiny_model() if subject.model is None else subject.model()


def _loss(subject: Subject) -> dict[str, Any]:
    return {"loss": nn.functional.mse_loss} if subject.model is None else {}


def _optimizer(subject: Subject, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer as a run makes it."""
    return subject.trainer(model=model, **_loss(subject)).ctx.optimizer


def _give_gradients(model: nn.Module) -> None:
    for index, parameter in enumerate(model.parameters()):
        values = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
        parameter.grad = values.to(parameter.dtype)


def _row(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().float().reshape(-1).clone() for p in model.parameters()])
