"""A node's configuration: YAML, of which every key is documented in :mod:`.schema` and the sections that it names."""

from kwaainet_bridge.config.reading import anchored, load_config, merge_settings, parse_config
from kwaainet_bridge.config.running import IdleConfig, PeersConfig
from kwaainet_bridge.config.schema import NodeConfig
from kwaainet_bridge.config.sections import LimitsConfig, NetworksConfig, OpenAIConfig
from kwaainet_bridge.config.several import check_together
from kwaainet_bridge.config.values import AUTO, EMBEDDED_MODEL, PRESETS
from kwaainet_bridge.config.work import AveragingConfig, AveragingRun, ModelConfig

__all__ = [
    "AUTO",
    "EMBEDDED_MODEL",
    "PRESETS",
    "AveragingConfig",
    "AveragingRun",
    "IdleConfig",
    "LimitsConfig",
    "ModelConfig",
    "NetworksConfig",
    "NodeConfig",
    "OpenAIConfig",
    "PeersConfig",
    "anchored",
    "check_together",
    "load_config",
    "merge_settings",
    "parse_config",
]
