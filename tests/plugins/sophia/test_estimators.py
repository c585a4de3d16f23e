"""Both estimates of the curvature against exact Hessians, by autograd in float64."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import drivetrain_sophia.gauss_newton as gauss_newton
from drivetrain import Callback, CallbackContext, Loss, ModelError, Precision, Trainer, TrainingConfig, component
from drivetrain_sophia import SophiaGComponent, SophiaHComponent, find_logits, sampled_cross_entropy


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def hessian_diagonal(loss: Any, *params: Tensor) -> Tensor:
    """Diagonal of the second derivative of `loss(*params)`, all parameters in a row."""
    blocks = torch.autograd.functional.hessian(loss, params)
    return torch.cat([blocks[i][i].reshape(p.numel(), p.numel()).diagonal() for i, p in enumerate(params)])


# -- Gauss-Newton-Bartlett


def gnb(weight: Tensor, inputs: Tensor, labels: Tensor | None, draws: int) -> Tensor:
    """Mean of B·ĝ⊙ĝ over many draws."""
    generator, total = torch.Generator().manual_seed(0), torch.zeros_like(weight)
    for _ in range(draws):
        w = weight.clone().requires_grad_()
        loss = sampled_cross_entropy(inputs @ w, labels, generator)
        (gradient,) = torch.autograd.grad(loss.mean(), w)
        total += loss.weight * gradient.square()
    return total.reshape(-1) / draws


def test_gauss_newton_bartlett_has_the_hessians_mean() -> None:
    """Softmax of a linear map: its Hessian is its Gauss-Newton matrix, whatever the true labels are."""
    inputs, weight, labels = random(6, 3, seed=1), random(3, 4, seed=2), torch.tensor([0, 3, -100, 1, 1, -100])
    exact = hessian_diagonal(lambda w: F.cross_entropy(inputs @ w, labels), weight)
    found = gnb(weight, inputs, labels, draws=3000)
    # of one entry ĥ's deviation is about √2·h: 5 % is three of them for the mean of 12 entries and more than two for each
    assert found.mean().item() == pytest.approx(exact.mean().item(), rel=0.03)
    assert ((found - exact).abs() < 0.12 * exact).all()
    everywhere = gnb(weight, inputs, None, draws=300)
    assert ((everywhere - exact).abs() > 0.12 * exact).any(), "control: positions that are -100 are left out"


def test_control_the_models_own_labels_are_needed() -> None:
    inputs, weight = random(6, 3, seed=1), random(3, 4, seed=2)
    labels = (inputs @ weight).argmin(dim=1)  # as unlikely as can be
    exact = hessian_diagonal(lambda w: F.cross_entropy(inputs @ w, labels), weight)
    w = weight.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(inputs @ w, labels), w)
    assert (6 * gradient.square()).mean() > 3 * exact.mean()


@pytest.mark.parametrize("chunk", [1 << 22, 10])
def test_labels_are_drawn_as_the_model_predicts(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(gauss_newton, "_CHUNK", chunk)
    logits = torch.tensor([0.0, 1.0, -2.0, 2.0], dtype=torch.float64)
    drawn: list[Tensor] = []
    draw = gauss_newton._draw
    monkeypatch.setattr(gauss_newton, "_draw", lambda part, generator: drawn.append(draw(part, generator)) or drawn[-1])
    count = 40_000 if chunk > 100 else 400
    loss = sampled_cross_entropy(logits.expand(count, 4), generator=torch.Generator().manual_seed(0))
    labels = torch.cat(drawn)
    assert {len(part) for part in drawn} == ({2} if chunk == 10 else {count})
    torch.testing.assert_close(
        labels.bincount(minlength=4) / count, logits.softmax(0), rtol=0, atol=3 * 0.5 / count**0.5, check_dtype=False
    )
    torch.testing.assert_close(loss.total, F.cross_entropy(logits.expand(count, 4), labels, reduction="sum"))
    assert loss.weight == count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits_are_drawn_without_overflow(dtype: torch.dtype) -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [-3e4, -3e4, -2e4]], dtype=dtype, requires_grad=True)
    loss = sampled_cross_entropy(logits.repeat(50, 1))
    assert loss.total.dtype == torch.float32
    loss.total.backward()
    assert loss.total.item() == 0.0
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_the_global_random_state_is_left_alone_and_the_same_generator_repeats() -> None:
    before, logits = torch.get_rng_state(), random(50, 7)
    first, second = (sampled_cross_entropy(logits, generator=torch.Generator().manual_seed(3)).total for _ in range(2))
    other = sampled_cross_entropy(logits, generator=torch.Generator().manual_seed(4)).total
    assert torch.equal(torch.get_rng_state(), before)
    assert first == second != other


def test_classes_may_be_the_second_dimension() -> None:
    logits, labels = random(3, 5, 7), torch.zeros(3, 7, dtype=torch.int64)
    labels[0] = -100
    second = sampled_cross_entropy(logits, labels, torch.Generator().manual_seed(0))
    last = sampled_cross_entropy(logits.movedim(1, -1), labels, torch.Generator().manual_seed(0))
    assert second.total == last.total
    assert second.weight == last.weight == 14


def test_a_batch_in_which_nothing_counts_gives_zero() -> None:
    logits = random(2, 3).requires_grad_()
    loss = sampled_cross_entropy(logits, torch.full((2,), -100))
    loss.total.backward()
    assert (loss.total.item(), float(loss.weight), logits.grad.abs().max().item()) == (0.0, 0.0, 0.0)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        ((4, 3), torch.zeros(4), "the labels are not integers.*use sophia_h"),
        ((4, 3), torch.zeros(5, dtype=torch.int64), r"shape \(4, 3\), the labels \(5,\).*override logits_and_labels"),
        ((4, 1), torch.zeros(4, dtype=torch.int64), "the model gives one number. Use sophia_h"),
    ],
)
def test_what_cannot_be_drawn_from_is_refused(logits: tuple[int, ...], labels: Tensor, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        sampled_cross_entropy(random(*logits), labels)


def test_where_logits_are_found() -> None:
    logits = random(2, 3)
    assert find_logits(logits) is logits
    assert find_logits({"loss": logits.sum(), "logits": logits}) is logits
    assert find_logits(SimpleNamespace(loss=logits.sum(), logits=logits)) is logits
    for nothing in (logits.sum(), Loss(logits.sum(), 2.0), {"loss": logits.sum()}, torch.zeros(2, 3, dtype=torch.int64), None):
        assert find_logits(nothing) is None


# -- in a run


@component
class Probe(Callback):
    """Calls a function in the first `on_step_start` and keeps what it returns."""

    function: Any

    def on_step_start(self, ctx: CallbackContext) -> None:
        if ctx.step == 0:
            self.found = self.function(ctx)


def probe(model: nn.Module, data: Any, optimizer: Any, function: Any, **given: Any) -> Any:
    """What `function(ctx)` gives at the start of a run whose first step has microbatches of 2, 2 and 1 samples."""
    callback = Probe(function=function)
    config = TrainingConfig(
        max_duration="1st",
        per_device_batch_size=2,
        gradient_accumulation_steps=3,
        dataloader={"shuffle": False},
        standard_callbacks=False,
    )
    options = {"precision": Precision(), "scheduler": lambda position: 1.0} | given
    Trainer(model, config, data, optimizer=optimizer, callbacks=[callback], **options).train()
    return callback.found


class Tokens(nn.Module):
    """A language model that returns a `Loss` when it is given labels, and logits when it is not."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3, dtype=torch.float64)
        self.head = nn.Linear(3, 4, dtype=torch.float64)
        with torch.no_grad():
            for index, p in enumerate(self.parameters()):
                p.copy_(random(*p.shape, seed=index))

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.head(self.embed(input_ids).tanh())
        if labels is None:
            return logits
        total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        return Loss(total, (labels != -100).sum())


def token_data() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    ids, labels = (torch.randint(0, high, (5, 6), generator=generator) for high in (5, 4))
    labels[1, 2:], labels[4, :5] = -100, -100
    return [{"input_ids": x, "labels": y} for x, y in zip(ids, labels, strict=True)]


def test_sophia_g_counts_the_positions_of_all_microbatches() -> None:
    """The same draws, on the whole step at once and by hand."""
    model, optimizer = Tokens(), SophiaGComponent()
    found = probe(model, token_data(), optimizer, lambda ctx: (optimizer.estimate(ctx), optimizer.generator(ctx, 0)))
    expected, rows, generator = Tokens(), token_data(), found[1]
    losses = []
    for first in (0, 2, 4):
        batch = {key: torch.stack([row[key] for row in rows[first : first + 2]]) for key in ("input_ids", "labels")}
        losses.append(sampled_cross_entropy(expected(batch["input_ids"]), batch["labels"], generator))
    positions = sum(int((row["labels"] != -100).sum()) for row in rows)
    assert sum(int(loss.weight) for loss in losses) == positions == 21
    gradients = torch.autograd.grad(torch.stack([loss.total for loss in losses]).sum() / positions, list(expected.parameters()))
    assert len(found[0]) == 3
    for estimate, gradient in zip(found[0], gradients, strict=True):
        torch.testing.assert_close(estimate, positions * gradient.square(), rtol=1e-6, atol=1e-12)


def exact_products(model: nn.Module, rows: list[dict[str, Tensor]], vectors: list[Tensor]) -> list[Tensor]:
    """∇²L·u for the loss of all samples at once."""
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    params = list(model.parameters())
    loss = model(**batch)
    gradients = torch.autograd.grad(loss.mean(), params, create_graph=True)
    inner = torch.stack([(g * u).sum() for g, u in zip(gradients, vectors, strict=True)]).sum()
    return list(torch.autograd.grad(inner, params))


@pytest.mark.parametrize(("product", "tolerance"), [("difference", 1e-5), ("double_backward", 1e-7)])
def test_sophia_h_multiplies_the_hessian_of_the_whole_step(product: Any, tolerance: float) -> None:
    model, optimizer = Tokens(), SophiaHComponent(product=product)
    before = [p.detach().clone() for p in model.parameters()]
    estimate, generator = probe(
        model, token_data(), optimizer, lambda ctx: (optimizer.estimate(ctx), optimizer.generator(ctx, 0))
    )
    vectors = [torch.empty_like(p).normal_(generator=generator) for p in before]
    expected = exact_products(Tokens(), token_data(), vectors)
    size = torch.cat([e.reshape(-1) for e in expected]).abs().max()
    for found, u, hu in zip(estimate, vectors, expected, strict=True):
        torch.testing.assert_close(found, u * hu, rtol=tolerance, atol=tolerance * size.item())


@pytest.mark.parametrize("product", ["difference", "double_backward"])
def test_hutchinson_has_the_hessians_mean(product: Any) -> None:
    inputs, targets = random(5, 2, seed=1), random(5, 1, seed=2)
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1)).double()
    with torch.no_grad():
        for index, p in enumerate(model.parameters()):
            p.copy_(random(*p.shape, seed=3 + index))
    params = [p.detach().clone() for p in model.parameters()]

    def loss(*weights: Tensor) -> Tensor:
        names = [name for name, _ in model.named_parameters()]
        return F.mse_loss(torch.func.functional_call(model, dict(zip(names, weights, strict=True)), inputs), targets)

    exact = hessian_diagonal(loss, *params)
    optimizer = SophiaHComponent(product=product, decay="all")  # one group, in the model's order
    seeds = iter(range(10_000))
    optimizer.generator = lambda ctx, rank: torch.Generator().manual_seed(next(seeds))  # type: ignore[method-assign]

    def mean(ctx: CallbackContext) -> Tensor:
        draws = [torch.cat([e.reshape(-1) for e in optimizer.estimate(ctx) if e is not None]) for _ in range(250)]
        return torch.stack(draws)

    draws = probe(model, TensorDataset(inputs, targets), optimizer, mean, loss=F.mse_loss)
    error = (draws.mean(0) - exact).abs() / (draws.std(0) / len(draws) ** 0.5)
    assert error.max() < 4, "standard errors"
    assert (exact.abs() > 8 * draws.std(0) / len(draws) ** 0.5).sum() >= 3, "control: several are far from zero"


@pytest.mark.parametrize("product", ["difference", "double_backward"])
def test_weights_come_back_bit_equal_and_dropout_is_the_same_at_both_ends(product: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 32), nn.Dropout(0.5), nn.Tanh(), nn.Linear(32, 3))
    optimizer = SophiaHComponent(product=product)
    data = TensorDataset(random(5, 4).float(), torch.arange(5) % 3)

    def look(ctx: CallbackContext) -> Any:
        before = [p.detach().clone() for p in model.parameters()]
        estimate = optimizer.estimate(ctx)
        same = all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        return same, torch.cat([e.reshape(-1) for e in estimate if e is not None])

    same, estimate = probe(model, data, optimizer, look, loss=nn.CrossEntropyLoss())
    assert same
    assert estimate.abs().max() < 50  # masks that differ would give a difference of gradients over 2ε, about 1e3


def test_autocast_is_left_for_the_difference() -> None:
    """With 8 bits the difference would be noise; the run itself computes in bfloat16."""

    class Half(Precision):
        def forward(self) -> Any:
            return torch.autocast("cpu", torch.bfloat16)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 3))
    data = TensorDataset(random(5, 4).float(), torch.arange(5) % 3)
    results = []
    for precision in (Precision(), Half()):
        optimizer = SophiaHComponent()
        estimate = probe(model, data, optimizer, optimizer.estimate, loss=nn.CrossEntropyLoss(), precision=precision)
        results.append(torch.cat([e.reshape(-1) for e in estimate if e is not None]))
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 3))
    assert torch.equal(*results)


def test_double_backward_takes_weights_of_both_widths() -> None:
    """As bf16_true has them: matrices in bfloat16, vectors in float32, made to fit by autocast."""

    class Half(Precision):
        def forward(self) -> Any:
            return torch.autocast("cpu", torch.bfloat16)

    data = TensorDataset(random(5, 4).float(), torch.arange(5) % 3)
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 32), nn.LayerNorm(32), nn.Tanh(), nn.Linear(32, 3))
        for p in model.parameters():
            p.data = p.data.bfloat16().to(dtype if p.ndim == 2 else torch.float32)
        optimizer = SophiaHComponent(product="double_backward")
        estimate = probe(model, data, optimizer, optimizer.estimate, loss=nn.CrossEntropyLoss(), precision=Half())
        results.append([e.float() for e in estimate if e is not None])
    exact, rough = results
    # vectors of float32: of matrices in bfloat16 u itself is rounded
    assert (exact[-1] - rough[-1]).norm() < 0.2 * exact[-1].norm()
    assert all(e.isfinite().all() for e in rough)
