"""MLflow: a tracker for the logging callback."""

from __future__ import annotations

import json
import logging
import os
import re
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import attrs
from mlflow import MlflowClient
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException

from drivetrain import Tracker, component, option, state
from drivetrain.tracking import printable

if TYPE_CHECKING:
    from drivetrain import CallbackContext

__all__ = ["MlflowTracker"]

_said = logging.getLogger("drivetrain.mlflow")
_UNNAMED = re.compile(r"[^\w\-. :/]")  # what MLflow refuses in a name
_LONGEST_VALUE = 6000
_REFUSED = ("INVALID_PARAMETER_VALUE", "INVALID_STATE")  # what MLflow says of a value, not of itself


@component
class MlflowTracker(Tracker):
    """Record a run with MLflow: values, configuration as parameters, texts as artifacts.

    By default into a SQLite file `mlflow.db` beside the run's directory; look at it with
    `mlflow ui --backend-store-uri sqlite:///runs/mlflow.db`. The run's id is part of every checkpoint: a resumed run goes on as the same
    one, and steps that the store has already are not written twice; nor are they when a run goes back to an earlier state, for MLflow
    takes no value back. A server that cannot be reached or refuses the login is said once,
    and the run is recorded into that file instead; so is the rest of a run whose server is lost later, until it is resumed.
    """

    uri: str | None = option(
        default=None, help="the tracking store: sqlite:///FILE or a server; by default OUTPUT_DIR/mlflow.db"
    )
    experiment: str = option(default="drivetrain", help="the experiment's name")
    name: str | None = option(default=None, help="the run's name; run_name by default")
    timeout: float = option(
        default=30.0, above=0, help="seconds to wait for a server, where MLFLOW_HTTP_REQUEST_TIMEOUT does not say"
    )

    run_id: str | None = state(default=None)
    where: str | None = state(default=None)  # the store that has the run of this id

    _client: Any = attrs.field(default=None, init=False, repr=False)
    _id: Any = attrs.field(default=None, init=False, repr=False)  # of the run in `_client`'s store
    _local: Any = attrs.field(default=None, init=False, repr=False)  # the file's address, its artifacts' and the run's name
    _is_local: bool = attrs.field(default=False, init=False, repr=False)
    _known: dict[str, int] = attrs.field(factory=dict, init=False, repr=False)  # by name: up to here nothing is written again
    _newest: dict[str, int] = attrs.field(factory=dict, init=False, repr=False)  # by name: the last step of this sitting
    _keys: dict[str, str] = attrs.field(factory=dict, init=False, repr=False)  # by MLflow's name: ours

    def start(self, ctx: CallbackContext) -> None:
        """Make a run in the store, or go on with it."""
        folder, name = ctx.run_dir.parent.absolute(), self.name or ctx.config.run_name
        self._local = f"sqlite:///{folder / 'mlflow.db'}", (folder / "mlflow-artifacts").as_uri(), name
        self._is_local = self.uri is None or self.uri.startswith("sqlite:")
        if not self._is_local:  # MLflow's own patience is minutes, for which each log would hold the training
            os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(max(1, round(self.timeout))))
            os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        try:
            self._open(self.uri or self._local[0], name, ctx.step, self._local[1] if self.uri is None else None)
        except (MlflowException, OSError) as error:
            if self._is_local:
                raise
            self._turn_local(error, "cannot be used", "This run")
            self.run_id, self.where = self._id, self._local[0]

    def _open(self, uri: str, name: str | None, step: int, artifacts: str | None) -> None:
        self._client = MlflowClient(tracking_uri=uri)
        self._known = {}
        if self.run_id is not None and self.where == uri and step > 0:
            metrics = self._client.get_run(self.run_id).data.metrics
            histories = {metric: self._client.get_metric_history(self.run_id, metric) for metric in metrics}
            self._known = {metric: max(value.step for value in values) for metric, values in histories.items()}
            self._client.update_run(self.run_id, status="RUNNING")
            self._id = self.run_id
        else:
            self._id = self.run_id = self._begin(name, artifacts)
        self.where = uri

    def _begin(self, name: str | None, artifacts: str | None) -> str:
        experiment = self._client.get_experiment_by_name(self.experiment)
        number = experiment.experiment_id if experiment else self._client.create_experiment(self.experiment, artifacts)
        return str(self._client.create_run(number, run_name=name).info.run_id)

    def _turn_local(self, error: Exception, why: str, what: str) -> None:
        """Go on in the file, and say so; the run at the server stays the one that a checkpoint remembers."""
        local, artifacts, name = self._local
        reason = printable(str(error).partition("\n")[0])
        _said.warning("MLflow at %s %s (%s). %s is recorded in %s.", self.uri, why, reason, what, local)
        self._client, self._is_local, self._known = MlflowClient(tracking_uri=local), True, {}
        self._id = self._begin(name, artifacts)

    def _send(self, call: Callable[[], None]) -> None:
        """Record something; in the file, if the server is lost on the way."""
        try:
            call()
        except (MlflowException, OSError) as error:
            if self._is_local or getattr(error, "error_code", None) in _REFUSED:
                raise
            self._turn_local(error, "was lost", "The rest of this run")
            call()

    def config(self, values: Mapping[str, Any], step: int) -> None:
        """Record the configuration: parameters, which MLflow never changes, and the whole of it as a file for each sitting."""
        self._send(lambda: self._configure(values, step))

    def _configure(self, values: Mapping[str, Any], step: int) -> None:
        present = self._client.get_run(self._id).data.params
        params = [Param(_named(name), str(value)[:_LONGEST_VALUE]) for name, value in _flat(values, "")]
        self._client.log_batch(self._id, params=[param for param in params if param.key not in present])
        self._client.log_text(self._id, json.dumps(values, indent=2, default=str), f"config/step-{step}.json")

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Record values. MLflow's database has no infinity, so it keeps the largest number in its place; NaN it has."""
        now, metrics = round(time.time() * 1000), []
        for name, value in values.items():
            key = self._key(name)
            if step > self._known.get(key, -1):
                metrics.append(Metric(key, float(value), now, step))
                self._newest[key] = step
        if metrics:
            self._send(lambda: self._client.log_batch(self._id, metrics=metrics))

    def _key(self, name: str) -> str:
        """A name that MLflow takes, and that no other name of this run has."""
        key = _named(name)
        if self._keys.setdefault(key, name) != name:
            key = f"{key[:240]}-{zlib.crc32(name.encode()):08x}"
        return key

    def rewind(self, step: int) -> None:
        """Leave out what is repeated: MLflow takes nothing back, and would have two values of a step."""
        self._known |= self._newest

    def text(self, name: str, text: str, step: int) -> None:
        """Record a text as an artifact."""
        self._send(lambda: self._client.log_text(self._id, text, f"{_named(name)}/step-{step}.txt"))

    def close(self) -> None:
        """End the run."""
        if self._client is not None:
            self._send(lambda: self._client.set_terminated(self._id))
        self._client = None


def _named(name: str) -> str:
    """A name that MLflow takes."""
    return _UNNAMED.sub("_", name)[:250]


def _flat(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Nested plain data as names with dots."""
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _flat(item, f"{name}.{key}" if name else str(key))
    else:
        yield name, value
