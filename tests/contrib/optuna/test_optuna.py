"""Studies with the real Optuna: what it is told, what it prunes, and what a crash leaves."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import FloatDistribution, IntDistribution
from torch import nn

from drivetrain import Callback, CallbackContext, DrivetrainError, Precision, Trainer, TrainingConfig, component, option
from drivetrain_optuna import Objective, PruningCallback, optimize_on_ranks, with_values
from drivetrain_testing import GlooStrategy, PlainSgd, run_processes, spawn_ranks, tiny_data, tiny_model

optuna.logging.set_verbosity(optuna.logging.WARNING)


def config(**options: Any) -> TrainingConfig:
    given = {"max_duration": "4ep", "per_device_batch_size": 16, "optimizer": {"use": "sgd", "lr": 0.05}, "device": "cpu"}
    return TrainingConfig(**{**given, "standard_callbacks": False, "distributed": "none", **options})


def trainer(config: TrainingConfig, *callbacks: Any) -> Trainer:
    return Trainer(
        tiny_model(), config, tiny_data(), tiny_data(seed=2), callbacks=callbacks, loss=nn.MSELoss(), precision=Precision()
    )


class Prune(optuna.pruners.BasePruner):
    """Prunes at a step, and remembers what it saw."""

    def __init__(self, at: int) -> None:
        self.at, self.seen = at, list[dict[int, float]]()

    def prune(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> bool:
        self.seen.append(dict(trial.intermediate_values))
        return max(trial.intermediate_values) >= self.at


class TestObjective:
    def test_a_study_finds_values_and_each_trial_is_the_run_with_them(self) -> None:
        space = {"optimizer.lr": FloatDistribution(1e-3, 1e-1, log=True), "per_device_batch_size": [8, 16]}
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
        study.optimize(Objective(trainer, config(), space), n_trials=4)
        assert all(trial.state.is_finished() for trial in study.trials)
        best = study.best_trial
        alone = trainer(with_values(config(), best.params)).train()
        assert alone.metrics["eval/loss"] == best.value == min(trial.value for trial in study.trials)
        assert len({trial.value for trial in study.trials}) == 4, "negative control: the values matter"
        per_epoch = -(-96 // best.params["per_device_batch_size"])
        assert sorted(best.intermediate_values) == [per_epoch * epoch for epoch in (1, 2, 3, 4)]

    def test_every_kind_of_distribution(self) -> None:
        space = {
            "seed": IntDistribution(0, 3),
            "max_grad_norm": FloatDistribution(0.5, 1.0, step=0.5),
            "optimizer": ["sgd", "adam"],
        }
        seen: list[TrainingConfig] = []
        study = optuna.create_study()
        study.enqueue_trial({"seed": 3, "max_grad_norm": 0.5, "optimizer": "adam"})
        study.optimize(Objective(lambda c: trainer(seen.append(c) or c), config(max_duration="2st"), space), n_trials=1)
        assert (seen[0].seed, seen[0].max_grad_norm, seen[0].optimizer) == (3, 0.5, "adam")

    def test_a_pruned_trial_ends_early(self) -> None:
        study = optuna.create_study(pruner=Prune(at=12))
        study.optimize(Objective(trainer, config(), {"seed": [1]}), n_trials=1)
        (trial,) = study.trials
        assert trial.state == optuna.trial.TrialState.PRUNED
        assert sorted(trial.intermediate_values) == [6, 12]

    def test_parallel_trials_equal_those_in_turn(self) -> None:
        """Threads of one process, as `n_jobs` starts them."""
        space = {"seed": [0, 1]}
        values = []
        for jobs in (1, 2):
            study = optuna.create_study()
            for seed in (0, 1):
                study.enqueue_trial({"seed": seed})
            study.optimize(Objective(trainer, config(max_duration="1ep"), space), n_trials=2, n_jobs=jobs)
            values.append({trial.params["seed"]: trial.value for trial in study.trials})
        assert values[0] == values[1]

    def test_an_interrupted_run_gives_no_value(self) -> None:
        def make(config: TrainingConfig) -> Trainer:
            made = trainer(config)
            made.stop("the machine is needed")
            return made

        study = optuna.create_study()
        with pytest.raises(DrivetrainError, match="the machine is needed"):
            study.optimize(Objective(make, config(), {"seed": [1]}), n_trials=1)
        assert study.trials[0].state == optuna.trial.TrialState.FAIL

    @pytest.mark.parametrize(
        ("space", "monitor", "options", "said"),
        [
            ({"optimizer.lrr": [1.0]}, "eval/loss", {}, r"optimizer\.sgd\.lrr: .*Did you mean 'lr'"),
            ({"callbacks.checkpoint": ["1st"]}, "eval/loss", {}, r"callbacks\.NAME\.OPTION"),
            ({"seeds": [1]}, "eval/loss", {}, "seeds: .*Did you mean 'seed'"),
            ({"seed": ["1"]}, "eval/loss", {}, "seed: expected a whole number"),
            ({}, "eval/acc", {}, "no metric 'eval/acc' to report; the evaluation gives eval/loss"),
            ({}, "eval/loss", {"eval_interval": False}, "eval_interval is false"),
        ],
    )
    def test_mistakes_are_said(self, space: Any, monitor: str, options: Any, said: str) -> None:
        with pytest.raises(DrivetrainError, match=said):
            optuna.create_study().optimize(Objective(trainer, config(**options), space, monitor), n_trials=1)

    def test_a_run_without_evaluation_gives_no_value(self) -> None:
        def unevaluated(config: TrainingConfig) -> Trainer:
            return Trainer(tiny_model(), config, tiny_data(), loss=nn.MSELoss(), precision=Precision())

        with pytest.raises(DrivetrainError, match="give it evaluation data"):
            optuna.create_study().optimize(Objective(unevaluated, config(), {}), n_trials=1)


class TestValues:
    def test_dotted_keys_reach_everywhere_and_leave_the_original(self) -> None:
        base = config(callbacks=["early_stopping", {"use": "checkpoint", "every": "1st"}], optimizer="sgd")
        values = {
            "optimizer.lr": 0.5,
            "callbacks.checkpoint.keep_last": 1,
            "callbacks.ema.decay": 0.9,
            "dataloader.num_workers": 1,
        }
        changed = with_values(base, {**values, "max_duration": "7st"})
        assert changed.optimizer == {"use": "sgd", "lr": 0.5}
        checkpoint = {"use": "checkpoint", "every": "1st", "keep_last": 1}
        assert changed.callbacks == ["early_stopping", checkpoint, {"use": "ema", "decay": 0.9}]
        assert (changed.dataloader.num_workers, str(changed.max_duration)) == (1, "7st")
        assert (base.optimizer, base.dataloader.num_workers, len(base.callbacks)) == ("sgd", 0, 2)

    def test_objects_stay_objects(self) -> None:
        given = PruningCallback()
        assert with_values(config(callbacks=[given]), {"callbacks.ema.decay": 0.9}).callbacks[0] is given


class TestCallback:
    def test_in_an_objective_of_ones_own(self) -> None:
        def objective(trial: optuna.Trial) -> float:
            pruning = PruningCallback(trial=trial)
            output = trainer(config(optimizer=PlainSgd(lr=trial.suggest_float("lr", 0.01, 0.1))), pruning).train()
            if pruning.pruned:
                assert output.stop_reason == pruning.pruned and output.completed
                raise optuna.TrialPruned
            return output.metrics["eval/loss"]

        study = optuna.create_study(pruner=Prune(at=18))
        study.optimize(objective, n_trials=1)
        assert [sorted(trial.intermediate_values) for trial in study.trials] == [[6, 12, 18]]

    def test_needs_a_trial(self) -> None:
        with pytest.raises(DrivetrainError, match="needs the trial"):
            trainer(config(), PruningCallback()).train()

    def test_evaluating_once_more_reports_nothing(self) -> None:
        pruner = Prune(at=99)
        study = optuna.create_study(pruner=pruner)
        made = trainer(config(max_duration="1ep"), PruningCallback(trial=study.ask()))
        made.train()
        made.evaluate()
        assert len(pruner.seen) == 1


@component
class Dies(Callback):
    at: int = option(help="the step that does not end")

    def on_backward(self, ctx: CallbackContext) -> None:
        if ctx.step + 1 == self.at and not ctx.resumed:
            os.kill(os.getpid(), signal.SIGKILL)


def sweep(folder: str, pruned_at: int, dies_at: int) -> dict[str, Any]:
    """One process of a study in a file; returns the newest trial."""
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(f"{folder}/study.log"))
    study = optuna.create_study(storage=storage, study_name="s", load_if_exists=True, pruner=Prune(pruned_at))
    callbacks = [{"use": "checkpoint", "every": "1st"}]
    found = config(output_dir=folder, callbacks=callbacks)
    study.optimize(Objective(lambda c: trainer(c, Dies(at=dies_at)), found, {"seed": [3]}), n_trials=1)
    trial = study.trials[-1]
    values = [[step, value] for step, value in trial.intermediate_values.items()]
    return {"state": trial.state.name, "value": trial.value, "reported": values, "run_name": trial.user_attrs["run_name"]}


@pytest.mark.parametrize("pruned_at", [99, 18])
def test_a_repeated_trial_goes_on_from_the_killed_ones_checkpoint(tmp_path: Path, pruned_at: int) -> None:
    for name in ("killed", "straight"):
        (tmp_path / name).mkdir()
    assert run_processes(sweep, [(str(tmp_path / "killed"), pruned_at, 14)], may_die=True) == [None]

    # what RetryHeartbeatStaleTrialCallback does when the heartbeat has stopped: the same values, the same attributes
    file = str(tmp_path / "killed" / "study.log")
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(file))
    study = optuna.load_study(study_name="s", storage=storage)
    (dead,) = study.trials
    assert sorted(dead.intermediate_values) == [6, 12]
    study.tell(dead.number, state=optuna.trial.TrialState.FAIL)
    study.enqueue_trial(dead.params, user_attrs=dead.user_attrs)

    resumed, straight = run_processes(
        sweep, [(str(tmp_path / "killed"), pruned_at, 14), (str(tmp_path / "straight"), pruned_at, 99)]
    )
    assert [path.name for path in (tmp_path / "killed").iterdir() if path.is_dir()] == [resumed.pop("run_name")]
    assert straight.pop("run_name") and resumed == straight
    assert len(straight["reported"]) == (3 if pruned_at == 18 else 4)
    assert straight["state"] == ("PRUNED" if pruned_at == 18 else "COMPLETE")


def on_a_rank(folder: str) -> list[Any]:
    """What the ranks' runs were, and on rank 0 what the study was told."""
    runs: list[list[Any]] = []

    def make(config: TrainingConfig) -> Trainer:
        return Trainer(
            tiny_model(),
            config,
            tiny_data(),
            tiny_data(seed=2),
            loss=nn.MSELoss(),
            precision=Precision(),
            strategy=GlooStrategy(),
            callbacks=[Notes(runs=runs)],
        )

    def make_study() -> optuna.Study:
        (Path(folder) / f"made-{os.getpid()}").touch()
        pruner = optuna.pruners.PercentilePruner(1e-9, n_startup_trials=1, n_warmup_steps=3)
        return optuna.create_study(pruner=pruner, sampler=optuna.samplers.RandomSampler(seed=1))

    space = {"optimizer.lr": FloatDistribution(1e-3, 1e-1, log=True)}
    study = optimize_on_ranks(make_study, Objective(make, config(per_device_batch_size=8), space), n_trials=4)
    told = (
        [] if study is None else [[t.state.name, list(t.intermediate_values), t.params["optimizer.lr"]] for t in study.trials]
    )
    return [told, runs]


@component
class Notes(Callback):
    runs: Any = option(help="where to")

    def on_run_end(self, ctx: CallbackContext) -> None:
        self.runs.append([ctx.config.optimizer["lr"], ctx.step, ctx.stop_reason])


def test_ranks_train_each_trial_together_and_stop_together(tmp_path: Path) -> None:
    (told, first), (nothing, second) = spawn_ranks(on_a_rank, str(tmp_path))
    assert nothing == [] and len(list(tmp_path.iterdir())) == 1, "rank 0 alone has the study"
    assert first == second
    assert [lr for _, _, lr in told] == [lr for lr, _, _ in first]
    assert [steps[-1] for _, steps, _ in told] == [step for _, step, _ in first]
    states = [state for state, _, _ in told]
    assert states[0] == "COMPLETE" and "PRUNED" in states, "else nothing was agreed on"
