"""`--sweep`: what else could be tried, and which of it is cheapest, fastest, or needs the fewest devices."""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import attrs

from drivetrain import ConfigError, DrivetrainError, Problem, Trainer, TrainingConfig, is_installed
from drivetrain_plan.planning import Plan, for_device, plan, taken_apart, why_in_a_line
from drivetrain_plan.profiles import DeviceProfile, load_profile
from drivetrain_plan.report import amount, count, said, seconds
from drivetrain_plan.roofline import Times, weights_of
from drivetrain_plan.scaling import Family, Size
from drivetrain_plan.simulate import GRADIENTS, PARAMETERS, STATE, Simulation, simulate

_CHECKPOINTING: tuple[Any, ...] = (False, "selective", True)
_MOST_PER_DEVICE = 64  # samples in a microbatch
_MOST_RANKS = 4096
_MOST_NODES = 16  # up to here every number of machines, beyond only powers of two
_OFF = 0.05  # how far a step's samples may be from what was asked for, where ranks do not divide them
_WORTH = 1.25  # what is learned changes with the optimizer: another one has to be cheaper by this factor
_TRIES = 12  # candidates simulated whole for each place of the frontier
_OPTIMIZERS = ("adamw_8bit", "adafactor", "lion")  # with a smaller state than adamw's
_TENSOR = (2, 4, 8)


@attrs.frozen(eq=False)
class Candidate:
    """One way to run it.

    Attributes:
        samples: of a step of all ranks.
        peak: bytes of a rank, as fitted; `plan` has the simulated ones once the candidate has been simulated whole.
    """

    size: Size
    changes: dict[str, Any]
    strategy: str
    samples: int
    tokens: int
    peak: int
    time: Times
    retuned: bool = False  # whether what is learned changes
    plan: Plan | None = None

    @property
    def ranks(self) -> int:
        """Processes, one for each device."""
        return self.size.ranks

    @property
    def cost(self) -> float:
        """Device seconds of a sample: what is paid for."""
        return self.ranks * self.time.likely / self.samples

    @property
    def pace(self) -> float:
        """Seconds of a sample."""
        return self.time.likely / self.samples

    def named(self) -> str:
        """In a few words."""
        parts = [self.strategy]
        if (tensor := _tensor_of(self.changes)) > 1:
            parts[0] += f" × tensor parallel {tensor}"
        elif self.strategy == "hsdp":
            parts[0] += f" (shards {self.size.shards})"
        parts.append(f"{self.size.microbatch} × {self.size.accumulation} samples")
        parts.append(_checkpointing(self.changes["activation_checkpointing"]))
        parts += [_name_of(self.changes[key]) for key in ("optimizer", "precision") if key in self.changes]
        return ", ".join(part for part in parts if part)


def _checkpointing(kept: Any) -> str:
    return {False: "", True: "checkpointing", "selective": "selective checkpointing"}[kept]


def _name_of(spec: Any) -> str:
    return str(spec["use"]) if isinstance(spec, Mapping) else str(spec)


def _tensor_of(changes: Mapping[str, Any]) -> int:
    strategy = changes.get("distributed")
    tensor = strategy.get("tensor_parallel") if isinstance(strategy, Mapping) else None
    return int(tensor["size"]) if tensor else 1


@attrs.frozen
class Sweep:
    """What was tried.

    Attributes:
        config: the run's, as it would turn out on that device.
        samples: of a step, as asked for.
        frontier: "cheapest", "fastest" and "fewest devices", each the best that fits, simulated whole.
        tried: all, the ones that do not fit included.
        notes: what could not be tried, and why.
    """

    config: TrainingConfig
    device: DeviceProfile
    samples: int
    frontier: dict[str, Candidate]
    tried: list[Candidate]
    notes: list[str]

    def chosen(self) -> TrainingConfig:
        """The cheapest as a configuration, what was changed with the origin "plan".

        Raises:
            DrivetrainError: when nothing fits.
        """
        if not self.frontier:
            raise DrivetrainError(f"nothing that was tried fits {self.device.name}.")
        return _applied(self.config, self.frontier["cheapest"])

    def __str__(self) -> str:
        return text(self)


def sweep(run: Trainer | TrainingConfig, device: str | DeviceProfile = "auto", ranks: int | None = None, **given: Any) -> Sweep:
    """Try strategies, checkpointing, microbatch sizes, numbers of ranks, precisions and optimizers, with the same samples in each
    step (within 5 % where ranks do not divide them).

    Of each way two steps are simulated, and all sizes are fitted from these; what is put on the frontier has been simulated whole.

    Raises:
        DrivetrainError: when the run cannot be put together.
    """
    if isinstance(run, Trainer):
        run, given = taken_apart(run)
    profile = load_profile(device) if isinstance(device, str) else device
    search = _Search(run, profile, ranks, given)
    search.first()
    if not search.tried:
        why = "; ".join(search.notes) or f"{search.samples} samples of a step cannot be shared among {ranks} ranks"
        raise ConfigError([Problem("--sweep", why)]) if ranks is None else ConfigError([Problem("--ranks", why)])
    search.further()
    return Sweep(search.config, profile, search.samples, search.frontier(), search.tried, search.notes)


class _Search:
    """The ways that are tried, from those that most depends on to those that are tried around the best of them."""

    def __init__(self, run: TrainingConfig, device: DeviceProfile, ranks: int | None, given: dict[str, Any]) -> None:
        self.notes: list[str] = []
        self.config = for_device(run, device, self.notes)
        self.device, self.given = device, {**given, "seen": {}}
        self.samples = run.global_batch_size or run.per_device_batch_size * run.gradient_accumulation_steps * (ranks or 1)
        self.ranks = _all_ranks(device.per_node) if ranks is None else (ranks,)
        self.tried: list[Candidate] = []
        self._fsdp = _fsdp_options(run, self.notes)

    # -- what is tried -----------------------------------------------------------------------------------------------------

    def first(self) -> None:
        """Whole on each device or divided, with each sort of checkpointing."""
        divided = is_installed("strategy", "fsdp") and self.ranks != (1,)
        whole = 0
        for checkpointing in _CHECKPOINTING if divided else ():
            if (family := self._family(self._fsdp, 2, {"activation_checkpointing": checkpointing})) is not None:
                whole = 2 * sum(family.small.largest.get(kind, 0) for kind in (PARAMETERS, GRADIENTS, STATE))
        if whole > self.device.usable:
            self.notes.append(
                f"one process, and ddp, were left out: weights, gradients and optimizer state take {amount(whole)}"
            )
            return
        for checkpointing in _CHECKPOINTING:
            self._family("none", 1, {"activation_checkpointing": checkpointing})

    def further(self) -> None:
        """Tensor parallelism, precisions and optimizers, with the checkpointing of the cheapest and of the smallest so far."""
        fitting = self._fitting()
        best = min(fitting, key=lambda c: c.cost) if fitting else min(self.tried, key=lambda c: c.peak)
        kept = {"activation_checkpointing": best.changes["activation_checkpointing"]}
        if is_installed("strategy", "fsdp") and best.strategy in ("fsdp", "hsdp"):
            for size in _TENSOR:
                if size <= self.device.per_node and any(ranks % size == 0 for ranks in self.ranks):
                    table = {**self._fsdp, "tensor_parallel": {**(self._fsdp.get("tensor_parallel") or {}), "size": size}}
                    self._family({k: v for k, v in table.items() if k != "shards"}, 2 * size, kept)
        ways: list[tuple[Any, int]] = [("none", 1)] if best.strategy in ("single", "ddp") else [(self._fsdp, 2)]
        smallest = {"activation_checkpointing": True}
        for precision in self._precisions():
            for strategy, ranks in ways:
                self._family(strategy, ranks, {**kept, "precision": precision})
        if all(c.peak <= self.device.usable for c in self.tried):
            self.notes.append("other optimizers were not tried: everything fits with this one")
            return
        for optimizer in self._optimizers():
            for strategy, ranks in [*ways, *([("none", 1)] if ways != [("none", 1)] else [])]:
                for extra in (kept, smallest) if kept != smallest else (kept,):
                    self._family(strategy, ranks, {**extra, "optimizer": optimizer}, retuned=True)

    def _precisions(self) -> Iterator[str]:
        now = _name_of(self.config.precision or "fp32")
        wanted = {"fp32": ("tf32", "bf16"), "tf32": ("bf16",), "fp16": ("bf16",)}
        if "fp8" in self.device.rates and is_installed("precision", "fp8") and now != "fp8":
            self.notes.append("fp8 was not tried: it needs a device that has it, even to be simulated")
        for name in wanted.get(now, ()) if not self.device.waits else ():
            if name in self.device.rates and is_installed("precision", name):
                yield name

    def _optimizers(self) -> Iterator[Any]:
        spec = self.config.optimizer
        name = "adamw" if spec is None else _name_of(spec) if isinstance(spec, (str, Mapping)) else ""
        for other in _OPTIMIZERS if name in ("adam", "adamw") else ():
            if is_installed("optimizer", other):
                kept = {k: v for k, v in spec.items() if k in ("lr", "weight_decay")} if isinstance(spec, Mapping) else {}
                yield {**kept, "use": other}

    def _family(self, strategy: Any, ranks: int, changes: dict[str, Any], retuned: bool = False) -> Family | None:
        """Simulate two sizes of one way, and add all others; None when it cannot be simulated, which is noted."""
        changes = {**changes, "distributed": strategy}
        tensor = _tensor_of(changes)
        try:
            small, large = (self._simulated(changes, ranks, samples) for samples in (2, 4))
            family = Family(small, large, tensor)
        except Exception as error:  # whatever a model or a plugin raises: the other ways can be tried all the same
            told = ", ".join(filter(None, [_described(changes), _checkpointing(changes["activation_checkpointing"])]))
            said_why = why_in_a_line(error)
            self.notes += [f"{told}: {said_why}"] if not any(said_why in note for note in self.notes) else []
            return None
        self.tried += list(self._sizes(family, changes, tensor, retuned))
        return family

    def _simulated(self, changes: dict[str, Any], ranks: int, samples: int) -> Simulation:
        config = _changed(self.config, {**changes, "per_device_batch_size": samples})
        if isinstance(config.distributed, Mapping) and ranks == 2:  # the groups of the run may be larger than two
            config.distributed = {k: v for k, v in config.distributed.items() if k != "shards"}
        found = simulate(config, ranks, self.device.per_node, **self.given)
        if not found.complete:
            raise DrivetrainError(found.problems[0])
        return found

    def _sizes(self, family: Family, changes: dict[str, Any], tensor: int, retuned: bool) -> Iterator[Candidate]:
        compiled, tf32 = bool(self.config.compile), family.small.precision == "tf32"
        per_sample = family.small.tokens // max(1, family.small.samples_per_microbatch)
        for ranks in self.ranks:
            if ranks % tensor or (family.sharded and ranks == 1):
                continue
            data_ranks = ranks // tensor
            share = max(1, round(self.samples / data_ranks))
            if abs(share * data_ranks - self.samples) > _OFF * self.samples:
                continue
            for shards in self._groups(family, data_ranks, tensor):
                for micro in (n for n in range(1, min(share, _MOST_PER_DEVICE) + 1) if share % n == 0):
                    size = Size(ranks, shards, micro, share // micro)
                    time = family.time(size, self.device, compiled, tf32).total
                    settings = {**changes, **_settings(family, size, tensor, changes["distributed"], share * data_ranks)}
                    name, total = family._name(size), share * data_ranks
                    yield Candidate(size, settings, name, total, total * per_sample, family.peak(size), time, retuned)

    def _groups(self, family: Family, data_ranks: int, tensor: int) -> list[int]:
        """The numbers of shards: all ranks, one machine's, or what the configuration says."""
        if not family.sharded:
            return [1]
        own = max(1, self.device.per_node // tensor)
        asked = self._fsdp.get("shards")
        return sorted({data_ranks, *(n for n in (own, asked) if n and 1 < n < data_ranks and data_ranks % n == 0)})

    # -- the best of it ----------------------------------------------------------------------------------------------------

    def _fitting(self) -> list[Candidate]:
        return [c for c in self.tried if c.peak <= self.device.usable]

    def frontier(self) -> dict[str, Candidate]:
        """The best that fits by each measure. Candidates are simulated whole before; the numbers of those replace the fitted ones."""
        ways: dict[str, Callable[[Candidate], Any]] = {
            "cheapest": lambda c: (c.cost * (_WORTH if c.retuned else 1), c.ranks),
            "fastest": lambda c: (c.pace * (_WORTH if c.retuned else 1), c.ranks),
            "fewest devices": lambda c: (c.ranks, c.retuned, c.cost),
        }
        found = {}
        for name, key in ways.items():
            if (best := self._best(key)) is not None:
                found[name] = best
        return found

    def _best(self, key: Callable[[Candidate], Any]) -> Candidate | None:
        """The first by `key` that keeps its place, and fits, once it has been simulated whole."""
        for _ in range(_TRIES):
            fitting = self._fitting()
            if not fitting:
                return None
            best = min(fitting, key=key)
            if best.plan is not None:
                return best
            self.tried[self.tried.index(best)] = self._whole(best)
        whole = [c for c in self._fitting() if c.plan is not None]
        return min(whole, key=key) if whole else None

    def _whole(self, candidate: Candidate) -> Candidate:
        try:
            found = plan(_applied(self.config, candidate), candidate.ranks, self.device, **self.given)
            if not found.simulation.complete or found.ranks != candidate.ranks:
                raise DrivetrainError(found.simulation.problems[0])
        except Exception as error:
            self.notes.append(f"{candidate.named()} on {candidate.ranks}: {why_in_a_line(error)}")
            return attrs.evolve(candidate, peak=2**63)  # fits nowhere
        return attrs.evolve(candidate, peak=found.simulation.peak, time=found.step.total, plan=found)


def _all_ranks(per_node: int) -> tuple[int, ...]:
    powers = {2**i for i in range(_MOST_RANKS.bit_length())}
    nodes = {per_node * n for n in range(1, _MOST_NODES + 1)} if per_node > 1 else set()
    return tuple(sorted(n for n in powers | set(range(1, per_node + 1)) | nodes if n <= _MOST_RANKS))


def _fsdp_options(config: TrainingConfig, notes: list[str]) -> dict[str, Any]:
    """The run's own options of fsdp, so that they are tried with it."""
    spec = config.distributed
    if isinstance(spec, Mapping) and spec.get("use") == "fsdp":
        return dict(spec)
    if spec not in ("auto", "none", "ddp", "fsdp", None) and not (isinstance(spec, Mapping) and spec.get("use") == "ddp"):
        notes.append(
            f"distributed: {_name_of(spec) if isinstance(spec, (str, Mapping)) else spec!r} is not among what is tried"
        )
    return {"use": "fsdp"}


def _settings(family: Family, size: Size, tensor: int, strategy: Any, samples: int) -> dict[str, Any]:
    distributed: Any = "none" if size.ranks == 1 else "ddp"
    if family.sharded:
        table = {k: v for k, v in strategy.items() if k != "shards"}
        if size.shards * tensor < size.ranks:
            table["shards"] = size.shards
        distributed = "fsdp" if table == {"use": "fsdp"} else table
    return {"distributed": distributed, "per_device_batch_size": size.microbatch, "global_batch_size": samples}


def _described(changes: Mapping[str, Any]) -> str:
    words = ["one process" if changes["distributed"] == "none" else "fsdp"]
    if (tensor := _tensor_of(changes)) > 1:
        words.append(f"tensor parallel {tensor}")
    return ", ".join([*words, *(_name_of(changes[key]) for key in ("precision", "optimizer") if key in changes)])


def _changed(config: TrainingConfig, changes: dict[str, Any]) -> TrainingConfig:
    changed = copy.copy(config)
    changed.gradient_accumulation_steps, changed.global_batch_size = 1, None
    for key, value in changes.items():
        setattr(changed, key, value)
    return changed


def _applied(config: TrainingConfig, candidate: Candidate) -> TrainingConfig:
    """A candidate as a configuration; what the sweep decided has the origin "plan"."""
    changed = _changed(config, candidate.changes)
    changed._origins |= dict.fromkeys([*candidate.changes, "gradient_accumulation_steps"], "plan")
    return changed


# -- showing -------------------------------------------------------------------------------------------------------------------


def command(config: TrainingConfig, arguments: argparse.Namespace) -> int:
    """Print the frontier; 1 when nothing fits."""
    found = sweep(config, arguments.device, arguments.ranks)
    print(json.dumps(_data(found), indent=2) if arguments.json else text(found, arguments.price))
    if arguments.write is not None and found.frontier:
        write(found, arguments.write)
        if not arguments.json:
            print(f"wrote {arguments.write}: the cheapest")
    return 0 if found.frontier else 1


def write(found: Sweep, path: Any) -> None:
    """The chosen configuration as a file; where its format has comments, its head says what the plan decided, and why.

    Raises:
        DrivetrainError: when it cannot be written.
    """
    chosen, best = found.chosen(), found.frontier["cheapest"]
    try:
        chosen.save(path)
        if path.suffix in (".toml", ".yaml", ".yml"):
            keys = sorted(key for key, origin in chosen._origins.items() if origin == "plan")
            head = [f"Chosen by drivetrain plan --sweep: the cheapest on {best.ranks} × {found.device.name}."]
            head += [f"origin plan: {key} = {getattr(chosen, key)!r}" for key in keys]
            head += [line.strip() for block in why(found) for line in block.splitlines()]
            path.write_text("".join(f"# {line}\n" for line in head) + "\n" + path.read_text(encoding="utf-8"), encoding="utf-8")
    except OSError as error:
        raise DrivetrainError(f"{path} cannot be written: {error.strerror or error}") from error


def _data(found: Sweep) -> dict[str, Any]:
    return {
        "device": found.device.name,
        "samples_per_step": found.samples,
        "tried": len(found.tried),
        "notes": found.notes,
        "why": why(found) if found.frontier else [],
        "frontier": {
            name: {"ranks": c.ranks, "peak": c.peak, "step_seconds": c.time.likely, "samples": c.samples, "changes": c.changes}
            for name, c in found.frontier.items()
        },
    }


def text(found: Sweep, price: float | None = None) -> str:
    """For people, in 80 columns."""
    usable = found.device.usable
    fitting = sum(c.peak <= usable for c in found.tried)
    lines = [f"{len(found.tried)} ways tried on {found.device.name}, {fitting} fit; {found.samples} samples in each step", ""]
    notes = [said("-", note) for note in found.notes]
    if not found.frontier:
        least = min(found.tried, key=lambda c: c.peak)
        lines.append(f"nothing fits: the least memory is {amount(least.peak)} of {amount(usable)} on {least.ranks} ranks:")
        return "\n".join([*lines, f"  {least.named()}", *notes])
    unit = "tokens/s" if all(c.tokens for c in found.frontier.values()) else "samples/s"
    paid = "device s" if price is None else "a step"
    lines.append(f"  {'devices':>9}{'memory':>12}{'a step':>11}{unit:>11}{paid:>10}")
    for c, names in _merged(found.frontier):
        spent = c.ranks * c.time.likely
        cost = f"{spent if price is None else spent / 3600 * price:.3g}"
        rate = count((c.tokens or c.samples) / c.time.likely)
        changed = f", {c.samples} samples a step" if c.samples != found.samples else ""
        lines.append(said("", f"{', '.join(names)}: {c.named()}{changed}").strip())
        lines.append(f"  {c.ranks:>9,}{amount(c.peak):>12}{seconds(c.time.likely):>11}{rate:>11}{cost:>10}")
    return "\n".join([*lines, "", *why(found), *([""] if notes else []), *notes])


def _merged(frontier: Mapping[str, Candidate]) -> list[tuple[Candidate, list[str]]]:
    rows: list[tuple[Candidate, list[str]]] = []
    for name, candidate in frontier.items():
        known = next((names for c, names in rows if c is candidate), None)
        if known is None:
            rows.append((candidate, [name]))
        else:
            known.append(name)
    return rows


def why(found: Sweep) -> list[str]:
    """Why the cheapest is: the best of what differs from it in one respect, and what that would cost or need."""
    best, usable = found.frontier["cheapest"], found.device.usable
    taken = f"{best.peak / usable:.0%}" if best.peak > 0.01 * usable else "less than 1%"
    lines = [f"why the cheapest: it takes {taken} of the {amount(usable)} usable on each device;"]
    lines += [f"  {line}" for line in _bound_by(best)]
    respects: dict[str, Callable[[Candidate], bool]] = {
        "fewer devices": lambda c: c.ranks < best.ranks,
        "more devices": lambda c: c.ranks > best.ranks,
        "less checkpointing": lambda c: _order(c) < _order(best),
        "more checkpointing": lambda c: _order(c) > _order(best),
        "larger microbatches": lambda c: c.size.microbatch > best.size.microbatch and c.ranks == best.ranks,
        "another strategy": lambda c: c.strategy != best.strategy and c.ranks == best.ranks,
        "another optimizer": lambda c: c.retuned != best.retuned,
        "another precision": lambda c: c.changes.get("precision") != best.changes.get("precision"),
    }
    for what, differs in respects.items():
        others = [c for c in found.tried if differs(c) and (c.retuned == best.retuned or what == "another optimizer")]
        if others:
            lines.append(said(" ", f"{what}: {_compared(others, best, usable)}"))
    if best.samples != found.samples:
        lines.append(f"  {best.samples} samples in a step instead of {found.samples}, which {best.ranks} ranks do not divide")
    if best.retuned:
        lines.append("  another optimizer learns differently: choose its learning rate anew")
    fewest = found.frontier["fewest devices"]
    if (fewer := [c for c in found.tried if c.ranks < fewest.ranks]) and fewest is not best:
        lines.append(f"fewest devices: on fewer the least memory is {amount(min(c.peak for c in fewer))}")
    return lines


def _bound_by(candidate: Candidate) -> Iterator[str]:
    """What the length of its step is made of, where one thing decides."""
    if candidate.plan is None:
        return
    step, found, device = candidate.plan.step, candidate.plan.simulation, candidate.plan.device
    weights = weights_of(found)
    launches = sum(count * weights.get(operation.phase, 1) for operation, count in found.operations.items())
    if not device.waits and launches * device.launch > 0.8 * step.compute:
        yield f"its step is as long as the host needs to launch {launches:,} operations,"
        yield "which more devices do not shorten"
    elif step.exposed > 0.1 * step.total.likely:
        yield f"{step.exposed / step.total.likely:.0%} of its step waits for communication"


def _order(candidate: Candidate) -> int:
    return _CHECKPOINTING.index(candidate.changes["activation_checkpointing"])


def _compared(others: list[Candidate], best: Candidate, usable: float) -> str:
    fitting = [c for c in others if c.peak <= usable]
    if not fitting:
        least = min(others, key=lambda c: c.peak)
        return f"does not fit, {amount(least.peak)} at the least ({_on(least)})"
    other = min(fitting, key=lambda c: c.cost)
    cost, pace = other.cost / best.cost - 1, best.pace / other.pace
    return f"{_percent(cost)}, {pace:.2f} × the speed, {amount(other.peak)} ({_on(other)})"


def _on(candidate: Candidate) -> str:
    return f"{candidate.named()}, {candidate.ranks:,} device{'s' if candidate.ranks > 1 else ''}"


def _percent(more: float) -> str:
    if abs(more) < 0.005:
        return "costs the same"
    return f"costs {abs(more):.0%} {'more' if more > 0 else 'less'}"
