"""The networks by name, as config.json names them."""

from __future__ import annotations

from typing import Any

from fsdfm.core.errors import ConfigError
from fsdfm.model.causal import CausalConfig, CausalNetwork
from fsdfm.model.config import ModelConfig
from fsdfm.model.transformer import FlowNetwork, Transformer

PUBLISHED = "published"
"""The network of a config that names none."""
NETWORKS: dict[str, tuple[type[ModelConfig], type[FlowNetwork]]] = {
    PUBLISHED: (ModelConfig, Transformer),
    "causal": (CausalConfig, CausalNetwork),
}


def config_to_dict(config: ModelConfig) -> dict[str, Any]:
    """Fields as plain JSON values, with the network's name where it is not the published one."""
    name = next(name for name, (kind, _) in NETWORKS.items() if type(config) is kind)
    return ({} if name == PUBLISHED else {"network": name}) | config.to_dict()


def config_from_dict(values: dict[str, Any]) -> ModelConfig:
    """Inverse of `config_to_dict`.

    Raises:
        ConfigError: an unknown network, or a field that is missing, unknown or out of range.
    """
    name = values.get("network", PUBLISHED)
    if not isinstance(name, str) or name not in NETWORKS:
        raise ConfigError(
            f"Model config: network must be one of {', '.join(NETWORKS)}, got {name!r}."
        )
    kind, _ = NETWORKS[name]
    return kind.from_dict({key: value for key, value in values.items() if key != "network"})


def build_network(config: ModelConfig) -> FlowNetwork:
    """A network with initial weights."""
    for kind, network in NETWORKS.values():
        if type(config) is kind:
            return network(config)
    raise TypeError(f"no network has a {type(config).__name__}")
