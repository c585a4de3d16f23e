"""NaN, infinity and spikes of the loss or of the gradients: found on the device, kept out of the weights, told."""

from __future__ import annotations

from drivetrain_anomaly.callback import AnomalyCallback
from drivetrain_anomaly.record import EVENTS_FILE

__all__ = ["EVENTS_FILE", "AnomalyCallback"]
