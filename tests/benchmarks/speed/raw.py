"""Loops without an engine: as one knows them from tutorials, and as one writes them when each microsecond counts."""

from __future__ import annotations

from dataclasses import replace

import torch
from task import Task, Timed, autocast_of, build, data, loader, optimizer, schedule
from torch import nn


def textbook(task: Task) -> Timed:
    """DataLoader, AdamW as it comes, `clip_grad_norm_`, LambdaLR, `zero_grad`."""
    task = replace(task, best=False)
    model, loss = build(task)
    made = optimizer(model, task)
    rate = schedule(made, task)
    step = 0
    while step < task.steps:
        for x, y in loader(task):
            made.zero_grad()
            with autocast_of(task):
                value = loss(model(x), y)
            value.backward()
            nn.utils.clip_grad_norm_(model.parameters(), task.max_norm)
            made.step()
            rate.step()
            step += 1
            if step == task.steps:
                break
    return model


def tuned(task: Task) -> Timed:
    """Fused AdamW, lists of parameters made once, whole batches by index, the rate written as a number."""
    task = replace(task, best=True)
    model, loss = build(task)
    model.to(task.device)
    if task.compiled:
        for block in getattr(model, "blocks", [model]):
            block.compile()
    autocast = autocast_of(task)
    made = optimizer(model, task)
    group = made.param_groups[0]
    parameters = group["params"]
    tensors = data(task).tensors
    generator = torch.Generator().manual_seed(task.seed)
    size = len(tensors[0]) // task.batch * task.batch
    step = 0
    while step < task.steps:
        for indices in torch.randperm(len(tensors[0]), generator=generator)[:size].split(task.batch):
            x, y = (tensor.index_select(0, indices) for tensor in tensors)
            if task.device != "cpu":
                x, y = (tensor.pin_memory().to(task.device, non_blocking=True) for tensor in (x, y))
            group["lr"] = task.lr * (1 - step / task.steps)
            with autocast:
                value = loss(model(x), y)
            value.backward()
            nn.utils.clip_grad_norm_(parameters, task.max_norm, foreach=True)
            made.step()
            for parameter in parameters:
                parameter.grad = None
            step += 1
            if step == task.steps:
                break
    return model
