"""The estimators in scikit-learn's own hands: its checks, searches, pipelines, clones and pickles."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array
from sklearn.base import clone
from sklearn.datasets import load_iris, make_regression
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import nn
from torch.utils.data import TensorDataset

from drivetrain import Callback, CallbackContext, ConfigError, Precision, Trainer, TrainingConfig, component, state
from drivetrain_sklearn import DrivetrainClassifier, DrivetrainRegressor, mlp

QUICK = {"max_duration": "15ep", "per_device_batch_size": 16, "optimizer": {"use": "adamw", "lr": 0.02}, "device": "cpu"}


@parametrize_with_checks([DrivetrainClassifier(config=QUICK), DrivetrainRegressor(config=QUICK)])
def test_what_scikit_learn_expects_of_an_estimator(estimator: Any, check: Any) -> None:
    check(estimator)


def net(n_features: int, n_outputs: int, width: int = 16, dropout: float = 0.1) -> nn.Module:
    return nn.Sequential(nn.Linear(n_features, width), nn.Tanh(), nn.Dropout(dropout), nn.Linear(width, n_outputs))


@pytest.fixture(scope="module")
def iris() -> tuple[Any, Any]:
    X, y = load_iris(return_X_y=True)
    return StandardScaler().fit_transform(X), np.array(["setosa", "versicolor", "virginica"])[y]


def equal(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


class TestFit:
    def test_it_is_the_engines_own_run(self, iris: Any) -> None:
        X, y = iris
        fitted = DrivetrainClassifier(net, config=QUICK, random_state=3).fit(X, y)
        seed = int(np.random.RandomState(3).randint(2**31 - 1))
        torch.manual_seed(seed)
        model = net(4, 3)
        labels = np.unique(y, return_inverse=True)[1]
        data = TensorDataset(torch.tensor(X, dtype=torch.float32), torch.tensor(labels))
        config = TrainingConfig(**QUICK, seed=seed, standard_callbacks=False)
        Trainer(model, config, data, loss=nn.CrossEntropyLoss(), precision=Precision()).train()
        assert equal(fitted.module_, model)
        assert fitted.output_.steps == 15 * 10
        assert fitted.score(X, y) > 0.9
        assert not equal(DrivetrainClassifier(net, config=QUICK, random_state=4).fit(X, y).module_, model), "negative control"

    def test_without_a_random_state_the_configurations_seed_counts(self, iris: Any) -> None:
        first, same, other = (DrivetrainClassifier(net, config=QUICK | {"seed": seed}).fit(*iris).module_ for seed in (1, 1, 2))
        assert equal(first, same) and not equal(first, other)

    def test_the_callers_random_numbers_go_on_as_if_nothing_had_been_drawn(self, iris: Any) -> None:
        torch.manual_seed(0)
        expected = torch.rand(3)
        torch.manual_seed(0)
        DrivetrainClassifier(net, config=QUICK).fit(*iris)
        assert torch.equal(torch.rand(3), expected)

    def test_a_ready_module_is_copied(self, iris: Any) -> None:
        torch.manual_seed(0)
        module = net(4, 3)
        before = pickle.dumps(module.state_dict()["0.weight"].tolist())
        first = DrivetrainClassifier(module, config=QUICK).fit(*iris)
        assert pickle.dumps(module.state_dict()["0.weight"].tolist()) == before
        assert equal(clone(first).fit(*iris).module_, first.module_)

    def test_says_and_writes_nothing(self, iris: Any, tmp_path: Path, monkeypatch: Any, capfd: Any) -> None:
        monkeypatch.chdir(tmp_path)
        DrivetrainClassifier(config=QUICK).fit(*iris)
        assert (list(tmp_path.iterdir()), capfd.readouterr()) == ([], ("", ""))

    def test_more_dimensions(self) -> None:
        """Images into a convolution; scikit-learn looks at the number of features of the second dimension only."""
        generator = np.random.default_rng(0)
        X = generator.normal(size=(64, 1, 6, 6))
        y = (X[:, 0, :3].sum((1, 2)) > X[:, 0, 3:].sum((1, 2))).astype(int)

        def convolution(n_features: int, n_outputs: int) -> nn.Module:
            assert n_features == 36
            return nn.Sequential(nn.Conv2d(1, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(128, n_outputs))

        assert DrivetrainClassifier(convolution, config=QUICK).fit(X, y).score(X, y) > 0.9

    @pytest.mark.parametrize("columns", [(), (1,), (3,)])
    def test_targets_keep_their_shape(self, columns: tuple[int, ...]) -> None:
        X, y = make_regression(60, 5, n_targets=3, random_state=0)
        y = (y[:, 0] if not columns else y[:, : columns[0]]) / 100
        fitted = DrivetrainRegressor(net, config=QUICK | {"max_duration": "60ep"}, module_options={"dropout": 0.0}).fit(X, y)
        assert fitted.predict(X).shape == (60, *columns)
        assert fitted.score(X, y) > 0.9

    def test_a_module_without_a_dimension_for_outputs(self) -> None:
        """[batch] against targets [batch, 1] would be a mean over all pairs."""
        X, y = make_regression(60, 5, random_state=0)

        class Flat(nn.Module):
            def __init__(self, n_features: int, n_outputs: int) -> None:
                super().__init__()
                self.layer = nn.Linear(n_features, n_outputs)

            def forward(self, x: Any) -> Any:
                return self.layer(x).squeeze(1)

        config = QUICK | {"max_duration": "60ep"}
        flat, usual = (DrivetrainRegressor(m, config=config).fit(X, y / 100) for m in (Flat, nn.Linear))
        assert np.array_equal(flat.predict(X), usual.predict(X))

    def test_a_loss_of_ones_own(self) -> None:
        X = np.random.default_rng(0).normal(size=(200, 3))
        y = np.arange(200) % 4 // 3 * 10.0  # the mean is 2.5, the median 0
        given = {"module": nn.Linear, "config": QUICK | {"max_duration": "30ep"}}
        means = [DrivetrainRegressor(**given, loss=loss).fit(X, y).predict(X).mean() for loss in (None, nn.functional.l1_loss)]
        assert 1.5 < means[0] < 3.5
        assert -0.5 < means[1] < 0.5


@component
class Watcher(Callback):
    losses: list[float] = state(factory=list)

    def on_evaluate_end(self, ctx: CallbackContext) -> None:
        self.losses.append(ctx.eval_metrics["eval/loss"])
        if len(self.losses) == 2:
            ctx.stop("seen enough")


class TestConfiguration:
    def test_held_out_data_and_callbacks(self, iris: Any) -> None:
        watcher = Watcher()
        estimator = DrivetrainClassifier(net, config=QUICK | {"callbacks": [watcher]}, validation_fraction=0.2)
        for _ in range(2):  # the second is not disturbed by what the first has left
            estimator.fit(*iris)
            assert estimator.output_.stop_reason == "seen enough"
            assert estimator.output_.steps == 2 * -(-120 // 16)
        assert watcher.losses == []

    def test_tables_are_set_by_key_and_shared_with_nobody(self) -> None:
        estimator = DrivetrainClassifier(config={"optimizer": "sgd", "seed": 1})
        copied = clone(estimator)
        copied.set_params(config__optimizer__lr=0.5, module_options__hidden=3, config__seed=2, random_state=7)
        assert copied.config == {"optimizer": {"use": "sgd", "lr": 0.5}, "seed": 2}
        assert (copied.module_options, copied.random_state) == ({"hidden": 3}, 7)
        assert (estimator.config, estimator.module_options) == ({"optimizer": "sgd", "seed": 1}, None)
        with pytest.raises(ConfigError, match=r"config\.seed: is a int, so 'x' cannot be set in it"):
            estimator.set_params(config__seed__x=1)
        with pytest.raises(ValueError, match="Invalid parameter 'konfig'"):
            estimator.set_params(konfig__seed=1)

    def test_mistakes_are_said(self, iris: Any) -> None:
        with pytest.raises(ConfigError, match=r"DrivetrainClassifier: 1 problem\n  sed: .*Did you mean 'seed'"):
            DrivetrainClassifier(config={"sed": 1}).fit(*iris)
        with pytest.raises(ConfigError, match=r"optimizer\.sgd\.lr: expected a number"):
            DrivetrainClassifier(config={"optimizer": {"use": "sgd", "lr": "1e-3"}}).fit(*iris)
        with pytest.raises(TypeError, match="Sparse data was passed"):
            DrivetrainClassifier().fit(csr_array(iris[0]), iris[1])


class TestSearch:
    def test_grid_search_over_a_pipeline(self, iris: Any) -> None:
        pipeline = make_pipeline(StandardScaler(), DrivetrainClassifier(net, config=QUICK | {"max_duration": "4ep"}))
        name = "drivetrainclassifier"
        grid = {f"{name}__config__optimizer__lr": [1e-6, 0.05], f"{name}__module_options__width": [2, 16]}
        search = GridSearchCV(pipeline, grid, cv=3, error_score="raise").fit(*iris)
        scores = dict(zip(map(str, search.cv_results_["params"]), search.cv_results_["mean_test_score"], strict=True))
        assert len(scores) == 4
        assert search.best_params_ == {f"{name}__config__optimizer__lr": 0.05, f"{name}__module_options__width": 16}
        assert search.best_score_ > 0.85 > 0.6 > min(scores.values())
        assert search.best_estimator_[-1].module_[0].out_features == 16

    @pytest.mark.slow  # workers import torch
    def test_workers_of_joblib(self, iris: Any, monkeypatch: Any) -> None:
        """Processes that get the estimator by pickle give the scores of this one."""
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        estimator = DrivetrainClassifier(mlp, config=QUICK | {"max_duration": "2ep"})
        threads, _ = torch.get_num_threads(), torch.set_num_threads(1)
        try:
            here, there = (cross_val_score(estimator, *iris, cv=2, n_jobs=n, error_score="raise") for n in (1, 2))
        finally:
            torch.set_num_threads(threads)
        assert np.array_equal(here, there)


def test_a_fitted_estimator_is_pickled_and_cloned_unfitted(iris: Any) -> None:
    fitted = DrivetrainClassifier(net, config=QUICK, random_state=1).fit(*iris)
    read = pickle.loads(pickle.dumps(fitted))
    assert np.array_equal(read.predict_proba(iris[0]), fitted.predict_proba(iris[0]))
    assert np.allclose(read.predict_proba(iris[0]).sum(1), 1)
    assert not hasattr(clone(fitted), "module_")
