"""The sections about whom a node lets in, and when it takes no work. Every key is documented here."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from kwaainet_bridge import defaults
from kwaainet_bridge.config.values import Section, as_peer_id, checked

Percent = Annotated[float, Field(ge=0, le=100)]
Wait = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PeerName = Annotated[str, checked(as_peer_id)]


class PeersConfig(Section):
    """Who may connect to this node, and be connected to, by peer id."""

    allow: tuple[PeerName, ...] = ()
    """The only peers that may, beside bootstrap peers and relays of this configuration. Left out: all."""
    deny: tuple[PeerName, ...] = ()
    """Peers that may not, whatever else says that they may. They make their ids themselves, and can make others."""


class IdleConfig(Section):
    """Pauses the node while others use this machine; see docs/operating.md."""

    watch: Literal["off", "gpu", "cpu"] = "off"
    """What others must not be using: the GPUs of the models, or all of them without a model on a GPU; or the
    processors, all together. Needs the packages of ``pip install 'kwaainet-bridge[idle]'``."""
    pause_above: Percent = defaults.IDLE_PAUSE_PERCENT
    """Percent that programs other than this node use, above which they count as using it."""
    pause_seconds: Wait = defaults.IDLE_PAUSE_SECONDS
    """For how long, before the node pauses."""
    resume_below: Percent = defaults.IDLE_RESUME_PERCENT
    """Percent below which they count as having left; at most ``idle.pause_above``."""
    resume_seconds: Wait = defaults.IDLE_RESUME_SECONDS
    """For how long, before the node resumes."""
    end_sessions: bool = False
    """Whether sessions that run end when the node pauses so; else they go on."""

    @field_validator("watch", mode="before")
    @classmethod
    def _check_watch(cls, value: Any) -> Any:
        return "off" if value is False else value  # YAML 1.1 reads off so

    @model_validator(mode="after")
    def _check_bounds(self) -> IdleConfig:
        if self.resume_below > self.pause_above:
            raise ValueError(
                f"resume_below ({self.resume_below:g}) exceeds pause_above ({self.pause_above:g}): lower it, or the "
                "node would pause and resume by turns"
            )
        return self
