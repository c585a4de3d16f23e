"""Hydra: compose a `TrainingConfig` from configuration groups, and hold it to the engine's own strict rules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import attrs
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from drivetrain import ConfigError, DrivetrainError, Problem, TrainingConfig
from drivetrain.registry import candidates

__all__ = ["register", "training_config"]

_PROVIDER = "drivetrain"


def training_config(cfg: DictConfig) -> TrainingConfig:
    """The configuration that Hydra composed, as Drivetrain takes it; every key's origin is "hydra".

    Interpolations are resolved. In place of a list, `callbacks` may be a table of names with their options, which Hydra can override.

    Args:
        cfg: the table of `TrainingConfig`'s keys: the whole of what Hydra composed, or the part of it that is meant.

    Raises:
        ConfigError: for unknown keys and wrong values, missing values ("???"), and interpolations that lead nowhere.
    """
    if not isinstance(cfg, DictConfig):
        raise DrivetrainError(f"training_config takes what Hydra composed, a DictConfig, not a {type(cfg).__name__}")
    try:
        if missing := sorted(OmegaConf.missing_keys(cfg)):
            raise ConfigError(
                [Problem(key, "must be given; the configuration leaves it open (???)") for key in missing], "hydra"
            )
        table = cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True, enum_to_str=True))
    except OmegaConfBaseException as error:
        raise ConfigError([Problem(str(error.full_key or ""), str(error).partition("\n")[0])], "hydra") from error
    if isinstance(named := table.get("callbacks"), Mapping):
        table["callbacks"] = [_callback(str(name), options) for name, options in named.items()]
    return TrainingConfig.from_table(table, "hydra")


def _callback(name: str, options: Any) -> Any:
    if options is None:
        return name
    if not isinstance(options, Mapping):
        raise ConfigError([Problem(f"callbacks.{name}", f"expected a table of its options, or null, got {options!r}")], "hydra")
    return {"use": name, **options}


def register() -> None:
    """Put Drivetrain into Hydra's `ConfigStore`: before `@hydra.main` or `compose`. No plugin is imported.

    - the node `drivetrain`: every key of `TrainingConfig` with its default, so that Hydra refuses a key that does not exist;
    - a group for each key that names a component, with a choice for each installed plugin: `optimizer=sgd optimizer.lr=0.1`;
    - the group `callbacks`, of which several may be chosen: `callbacks=[checkpoint,ema] callbacks.ema.decay=0.99`.
    """
    store = ConfigStore.instance()
    store.store(name="drivetrain", node={**TrainingConfig().to_dict(), "callbacks": {}}, provider=_PROVIDER)
    for f in attrs.fields(TrainingConfig):
        if kind := f.metadata.get("kind"):
            for name in candidates(kind):
                store.store(name=name, group=f.name, node=_open({"use": name}), provider=_PROVIDER)
    for name in candidates("callback"):
        store.store(name=name, group="callbacks", node=_open({name: {}}), provider=_PROVIDER)


def _open(table: dict[str, Any]) -> DictConfig:
    """A table that takes further keys: which options a component has is for the component to say."""
    node = OmegaConf.create(table)
    OmegaConf.set_struct(node, False)
    return node
