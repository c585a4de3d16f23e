"""Which of our own distributions provides which name, for the `pip install` line of an error. Data only, nothing is imported."""

from __future__ import annotations

FIRST_PARTY: dict[str, dict[str, tuple[str, ...]]] = {
    "optimizer": {
        "drivetrain-optimizers": (
            "adamw",
            "adam",
            "sgd",
            "adafactor",
            "adagrad",
            "rmsprop",
            "nadam",
            "radam",
            "muon_torch",
            "lamb",
            "routed",
        ),
        "drivetrain-bitsandbytes": (
            "adamw_8bit",
            "paged_adamw_8bit",
            "adam_8bit",
            "lion_8bit",
            "paged_lion_8bit",
            "ademamix_8bit",
            "paged_ademamix_8bit",
            "sgd_8bit",
            "rmsprop_8bit",
        ),
        "drivetrain-lion": ("lion",),
        "drivetrain-sophia": ("sophia", "sophia_h"),
        "drivetrain-muon": ("muon",),
        "drivetrain-schedulefree": ("schedulefree_adamw", "schedulefree_sgd"),
    },
    "scheduler": {
        "drivetrain-schedulers": (
            "constant",
            "linear",
            "cosine",
            "cosine_with_restarts",
            "polynomial",
            "wsd",
            "inverse_sqrt",
            "one_cycle",
        ),
    },
    "precision": {
        "drivetrain-precision": ("auto", "fp32", "tf32", "bf16", "bf16_true", "fp16", "fp64"),
        "drivetrain-fp8": ("fp8",),
    },
    "strategy": {
        "drivetrain-ddp": ("ddp",),
        "drivetrain-fsdp": ("fsdp",),
        "drivetrain-mpi": ("mpi",),
        "drivetrain-xla": ("xla",),
    },
    "device": {"drivetrain-xla": ("xla", "tpu")},
    "callback": {
        "drivetrain-progress": ("progress",),
        "drivetrain-logging": ("logging",),
        "drivetrain-checkpoint": ("checkpoint",),
        "drivetrain-early-stopping": ("early_stopping",),
        "drivetrain-throughput": ("throughput",),
        "drivetrain-profiler": ("profiler",),
        "drivetrain-ema": ("ema",),
        "drivetrain-anomaly": ("anomaly",),
        "drivetrain-audit": ("audit",),
        "drivetrain-cuda-graphs": ("cuda_graphs",),
        "drivetrain-finders": ("lr_finder", "batch_size_finder", "workers_finder"),
        "drivetrain-gc": ("gc",),
        "drivetrain-goodput": ("goodput",),
        "drivetrain-gradient-stats": ("gradient_stats",),
        "drivetrain-in-backward": ("optimizer_in_backward",),
        "drivetrain-ledger": ("ledger",),
        "drivetrain-lm": ("sample_text",),
        "drivetrain-transformers": ("sample_prompts",),
        "drivetrain-watchdog": ("watchdog",),
    },
    "tracker": {
        "drivetrain-logging": ("jsonl", "csv"),
        "drivetrain-tensorboard": ("tensorboard",),
        "drivetrain-wandb": ("wandb",),
        "drivetrain-mlflow": ("mlflow",),
    },
    "mode": {"drivetrain-modes": ("full_finetune", "pretraining"), "drivetrain-qlora": ("qlora",)},
    "preset": {"drivetrain-qlora": ("qlora",), "drivetrain-lm": ("pretraining",)},
    "model": {"drivetrain-lm": ("gpt",), "drivetrain-transformers": ("transformers",)},
    "dataset": {"drivetrain-lm": ("text",), "drivetrain-transformers": ("chat", "text_files")},
    "config_format": {"drivetrain-yaml": ("yaml", "yml")},
    "command": {
        "drivetrain-cli": ("train", "resume", "plugins", "config"),
        "drivetrain-bench": ("bench",),
        "drivetrain-checkpoint": ("checkpoint",),
        "drivetrain-doctor": ("doctor",),
        "drivetrain-launch": ("launch",),
        "drivetrain-ledger": ("ledger",),
        "drivetrain-plan": ("plan",),
        "drivetrain-qlora": ("export",),
        "drivetrain-report": ("report", "runs"),
        "drivetrain-scaffold": ("new",),
        "drivetrain-testing": ("check",),
        "drivetrain-verify": ("verify-resume",),
        "drivetrain-watchdog": ("hang",),
    },
}

# Active in every run in which they are installed, unless `standard_callbacks = false`; this is also their order.
STANDARD_CALLBACKS = ("gc", "throughput", "progress", "logging", "checkpoint")


def distribution_of(kind: str, name: str) -> str | None:
    """The first-party distribution that provides `name` of `kind`, whether installed or not."""
    return next((dist for dist, names in FIRST_PARTY.get(kind, {}).items() if name in names), None)


def names_of(kind: str) -> list[str]:
    """Every first-party name of `kind`."""
    return [name for names in FIRST_PARTY.get(kind, {}).values() for name in names]
