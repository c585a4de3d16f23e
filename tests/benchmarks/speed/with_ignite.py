"""Ignite: an `Engine` around a step by hand; nothing is attached by default."""

from __future__ import annotations

from typing import Any

from ignite.engine import Engine, Events
from ignite.handlers import LRScheduler
from task import Task, Timed, autocast_of, build, loader, optimizer, schedule
from torch import nn


def train(task: Task) -> Timed:
    """As its documentation shows."""
    model, loss = build(task)
    made = optimizer(model, task)
    parameters = list(model.parameters())

    def step(engine: Engine, batch: Any) -> Any:
        x, y = batch
        model.train()
        made.zero_grad()
        with autocast_of(task):
            value = loss(model(x), y)
        value.backward()
        nn.utils.clip_grad_norm_(parameters, task.max_norm)
        made.step()
        return value.detach()

    trainer = Engine(step)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, LRScheduler(schedule(made, task)))
    trainer.run(loader(task), max_iters=task.steps)
    return model
