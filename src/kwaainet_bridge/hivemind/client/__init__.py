"""A client of Petals swarms: finds servers, runs sessions and training requests over them, makes text."""

from kwaainet_bridge.hivemind.client.coverage import Coverage
from kwaainet_bridge.hivemind.client.directory import Directory, RecordSource, Span
from kwaainet_bridge.hivemind.client.drafts import Candidates, Draft, LookupDraft
from kwaainet_bridge.hivemind.client.generation import GREEDY, ClientWeights, Sampling, generate
from kwaainet_bridge.hivemind.client.remote import ForwardPass, Gradients, backward, forward
from kwaainet_bridge.hivemind.client.session import InferenceSession, open_session
from kwaainet_bridge.hivemind.client.survey import (
    Check,
    SurveyedModel,
    SwarmModel,
    check_servers,
    registered_models,
    survey,
)
from kwaainet_bridge.hivemind.client.swarm import Swarm
from kwaainet_bridge.hivemind.client.text import TextStream

__all__ = [
    "GREEDY",
    "Candidates",
    "Check",
    "ClientWeights",
    "Coverage",
    "Directory",
    "Draft",
    "ForwardPass",
    "Gradients",
    "InferenceSession",
    "LookupDraft",
    "RecordSource",
    "Sampling",
    "Span",
    "SurveyedModel",
    "Swarm",
    "SwarmModel",
    "TextStream",
    "backward",
    "check_servers",
    "forward",
    "generate",
    "open_session",
    "registered_models",
    "survey",
]
