"""Accelerate: `prepare`, `accumulate`, `backward`, `clip_grad_norm_`, as its documentation shows."""

from __future__ import annotations

from accelerate import Accelerator
from task import Task, Timed, build, loader, optimizer, schedule


def train(task: Task) -> Timed:
    """The loop is the user's, its parts are Accelerate's."""
    built, loss = build(task)
    if task.compiled:
        for block in getattr(built, "blocks", [built]):
            block.compile()
    accelerator = Accelerator(cpu=task.device == "cpu", mixed_precision="bf16" if task.bf16 else "no")
    made = optimizer(built, task)
    model, made, rows, rate = accelerator.prepare(built, made, loader(task), schedule(made, task))
    step = 0
    while step < task.steps:
        for x, y in rows:
            with accelerator.accumulate(model):
                accelerator.backward(loss(model(x), y))
                accelerator.clip_grad_norm_(model.parameters(), task.max_norm)
                made.step()
                rate.step()
                made.zero_grad()
            step += 1
            if step == task.steps:
                break
    return built
