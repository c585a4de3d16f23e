"""scikit-learn estimators that train any `nn.Module` with the engine."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, Self

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.model_selection import train_test_split
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, column_or_1d, validate_data
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from drivetrain import ConfigError, Precision, Problem, Trainer, TrainingConfig

__all__ = ["DrivetrainClassifier", "DrivetrainEstimator", "DrivetrainRegressor", "mlp"]

# What scikit-learn's users expect of `fit`: no output, no file, one process.
_DEFAULTS = {"max_duration": "50ep", "per_device_batch_size": 32, "standard_callbacks": False, "distributed": "none"}
_TABLES = ("config", "module_options")


def mlp(n_features: int, n_outputs: int, hidden: int = 64) -> nn.Module:
    """One hidden layer; what an estimator trains when it is given no module."""
    return nn.Sequential(nn.Flatten(), nn.Linear(n_features, hidden), nn.ReLU(), nn.Linear(hidden, n_outputs))


class DrivetrainEstimator(BaseEstimator):  # type: ignore[misc]
    """Parameters and attributes of the classifier and the regressor.

    Args:
        module: `module(n_features, n_outputs, **module_options)` that builds the model, called by each `fit`; by default `mlp`. A ready
            `nn.Module` is copied. The model gets X as float32 [batch, ...] and returns [batch, n_outputs].
        module_options: further arguments of `module`.
        loss: `loss(outputs, targets)`, a mean.
        config: keys of `TrainingConfig` as a dict. `set_params` and searches reach into it: `config__optimizer__lr=1e-3`.
        validation_fraction: this part of the data is held out, evaluated as `eval_interval` says and seen by callbacks.
        random_state: fixes initial weights, order and dropout; None takes the configuration's `seed`.

    Attributes:
        module_: the trained module.
        output_: the run's `TrainOutput`.
        n_features_in_, feature_names_in_: as everywhere in scikit-learn.
    """

    def __init__(
        self,
        module: Callable[..., nn.Module] | nn.Module | None = None,
        *,
        module_options: Mapping[str, Any] | None = None,
        loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        config: Mapping[str, Any] | None = None,
        validation_fraction: float = 0.0,
        random_state: Any = None,
    ) -> None:
        self.module = module
        self.module_options = module_options
        self.loss = loss
        self.config = config
        self.validation_fraction = validation_fraction
        self.random_state = random_state

    def set_params(self, **params: Any) -> Self:
        """Set parameters; `config__optimizer__lr` and `module_options__hidden` change one value in a table."""
        inner = {key: value for key, value in params.items() if key.partition("__")[0] in _TABLES and "__" in key}
        super().set_params(**{key: value for key, value in params.items() if key not in inner})
        for key, value in inner.items():
            name, *path = key.split("__")
            setattr(self, name, _with(getattr(self, name), path, value, name))
        return self

    def _train(self, X: np.ndarray, targets: Tensor, n_outputs: int, labels: np.ndarray | None) -> None:
        config = TrainingConfig.from_table({**_DEFAULTS, **copy.deepcopy(dict(self.config or {}))}, type(self).__name__)
        if self.random_state is not None:
            config.seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        everything = TensorDataset(torch.from_numpy(X), targets)
        data, held_out = self._divided(everything, config.seed, labels)
        exact = Precision() if config.precision is None else None
        model = self._built(X, n_outputs, config.seed)
        trainer = Trainer(model, config, data, held_out, loss=self._loss, precision=exact)
        for _ in trainer.steps():  # unlike train(), this lets Ctrl-C through, which ends a search over estimators too
            pass
        self.output_ = trainer.output
        self.module_ = trainer.model.eval()

    def _built(self, X: np.ndarray, n_outputs: int, seed: int) -> nn.Module:
        make = mlp if self.module is None else self.module
        if isinstance(make, nn.Module):
            return copy.deepcopy(make)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return make(int(np.prod(X.shape[1:])), n_outputs, **(self.module_options or {}))

    def _divided(self, data: TensorDataset, seed: int, labels: np.ndarray | None) -> tuple[TensorDataset, TensorDataset | None]:
        if not self.validation_fraction:
            return data, None
        rows = np.arange(len(data))
        train, test = train_test_split(rows, test_size=self.validation_fraction, random_state=seed, stratify=labels)
        return TensorDataset(*data[train]), TensorDataset(*data[test])

    def _loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        raise NotImplementedError

    def _outputs(self, X: Any) -> Tensor:
        """What the module gives for X, on the host: float32 [samples, outputs]."""
        check_is_fitted(self, "module_")
        X = validate_data(self, X, dtype=np.float32, allow_nd=True, reset=False)
        device = next((p.device for p in self.module_.parameters()), torch.device("cpu"))
        with torch.inference_mode():
            return torch.cat([self.module_(part.to(device)).float().cpu() for part in torch.from_numpy(X).split(1024)])

    def __getstate__(self) -> dict[str, Any]:
        """On the CPU, so that another machine can read it."""
        state: dict[str, Any] = super().__getstate__()
        if "module_" in state:
            state = {**state, "module_": copy.deepcopy(state["module_"]).cpu()}
        return state


class DrivetrainClassifier(ClassifierMixin, DrivetrainEstimator):  # type: ignore[misc]
    """A classifier; see `DrivetrainEstimator` for its parameters.

    The module returns a logit for each class, in the order of the attribute `classes_`; the loss is the cross-entropy by default.
    """

    def fit(self, X: Any, y: Any) -> Self:
        """Train a new module on X [samples, ...] and labels y [samples]."""
        X, y = validate_data(self, X, y, dtype=np.float32, allow_nd=True)
        check_classification_targets(y)
        self.classes_, labels = np.unique(column_or_1d(y, warn=True), return_inverse=True)
        self._train(X, torch.from_numpy(labels.astype(np.int64)), len(self.classes_), labels)
        return self

    def predict_proba(self, X: Any) -> np.ndarray:
        """The probability of each class: float32 [samples, classes]."""
        return self._outputs(X).softmax(1).numpy()

    def predict(self, X: Any) -> np.ndarray:
        """The likeliest class of each sample."""
        found = self._outputs(X).argmax(1).numpy()
        return np.asarray(self.classes_[found])

    def _loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (self.loss or nn.functional.cross_entropy)(outputs, targets)


class DrivetrainRegressor(RegressorMixin, DrivetrainEstimator):  # type: ignore[misc]
    """A regressor; see `DrivetrainEstimator` for its parameters.

    The module returns a number for each target; the loss is the mean squared error by default.
    """

    def fit(self, X: Any, y: Any) -> Self:
        """Train a new module on X [samples, ...] and y [samples] or [samples, targets]."""
        X, y = validate_data(self, X, y, dtype=np.float32, allow_nd=True, multi_output=True, y_numeric=True)
        self._shape = y.shape[1:]
        targets = torch.from_numpy(y.astype(np.float32)).reshape(len(y), -1)
        self._train(X, targets, targets.shape[1], None)
        return self

    def predict(self, X: Any) -> np.ndarray:
        """The targets: float64, of the shape that y had in `fit`."""
        found = self._outputs(X)
        return found.double().reshape(len(found), *self._shape).numpy()

    def _loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (self.loss or nn.functional.mse_loss)(outputs.reshape(targets.shape), targets)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags


def _with(table: Any, path: list[str], value: Any, where: str) -> dict[str, Any]:
    """A copy of a table with another value; a component's name becomes a table."""
    key, *rest = path
    if isinstance(table, str):
        table = {"use": table}
    if not isinstance(table or {}, Mapping):
        raise ConfigError([Problem(where, f"is a {type(table).__name__}, so {key!r} cannot be set in it")])
    known = dict(table or {})
    return {**known, key: _with(known.get(key), rest, value, f"{where}.{key}") if rest else value}
