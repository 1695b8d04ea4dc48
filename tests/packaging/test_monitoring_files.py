"""The dashboard and the alerts ask for metrics that a node has, with labels that it has."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
FILES = ROOT / "packaging"
PAGE = (ROOT / "docs" / "monitoring.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\| `([a-z_]+)` \| (gauge|counter|histogram|info) \| ([^|]*)\|", re.MULTILINE)
PREFIX = "kwaainet_bridge_"
PROCESS = {
    "process_resident_memory_bytes",
    "process_cpu_seconds_total",
    "process_open_fds",
    "process_max_fds",
}
SCRAPED = {"instance", "job"}  # Prometheus adds these

BOARD = json.loads((FILES / "grafana" / "dashboard.json").read_text(encoding="utf-8"))
ALERTS_FILE = FILES / "prometheus" / "alerts.yml"
ALERTS = [
    pytest.param(rule, id=rule["alert"])
    for group in yaml.safe_load(ALERTS_FILE.read_text(encoding="utf-8"))["groups"]
    for rule in group["rules"]
]
PANELS = [p for p in BOARD["panels"] if p["type"] != "row"]
QUERIES = [
    pytest.param(target["expr"], id=f"{panel['title']} {target['refId']}")
    for panel in PANELS
    for target in panel["targets"]
]


def scraped_metrics() -> dict[str, set[str]]:
    """Each name as Prometheus stores it, and its labels."""
    found = {}
    for name, kind, cell in ROW.findall(PAGE):
        labels = set(re.findall(r"`(\w+)`", cell))
        if kind == "histogram":
            found |= {f"{name}_bucket": labels | {"le"}, f"{name}_sum": labels, f"{name}_count": labels}
        else:
            found[name + {"counter": "_total", "info": "_info"}.get(kind, "")] = labels
    return {PREFIX + name: labels for name, labels in found.items()} | {name: set() for name in PROCESS}


KNOWN = scraped_metrics()


def metrics_in(query: str) -> set[str]:
    return set(re.findall(r"\b(?:kwaainet_bridge|process)_\w+", query)) - {"kwaainet_bridge"}


def mistakes(query: str) -> list[str]:
    """What a query asks for and no node has."""
    wrong = [name for name in metrics_in(query) if name not in KNOWN]
    for name, matchers in re.findall(r"\b((?:kwaainet_bridge|process)_\w+)\{([^}]*)\}", query):
        labels = set(re.findall(r"(\w+)\s*=?[=~!]", matchers))
        wrong += [f"{name}: {label}" for label in labels - KNOWN.get(name, set()) - SCRAPED]
    any_label = set().union(*(KNOWN[name] for name in metrics_in(query) if name in KNOWN)) | SCRAPED
    for clause in re.findall(r"\b(?:by|without|on|ignoring)\s*\(([^()]*)\)", query):
        wrong += [label for label in re.findall(r"\w+", clause) if label not in any_label]
    return wrong


def test_the_table_is_read():
    assert KNOWN["kwaainet_bridge_step_seconds_bucket"] == {"model", "network", "phase", "le"}
    assert KNOWN["kwaainet_bridge_build_info"] == {"version"}


@pytest.mark.parametrize(
    ("query", "wrong"),
    [
        ("kwaainet_bridge_ready == 0", []),
        ("kwaainet_bridge_tokens", ["kwaainet_bridge_tokens"]),
        ('kwaainet_bridge_ready{peer="x"}', ["kwaainet_bridge_ready: peer"]),
        ("sum by (peer) (kwaainet_bridge_ready)", ["peer"]),
    ],
)
def test_mistakes_are_found(query, wrong):
    assert mistakes(query) == wrong


@pytest.mark.parametrize("query", QUERIES)
def test_a_panel_asks_for_what_there_is(query: str):
    assert mistakes(query) == []


@pytest.mark.parametrize("panel", [pytest.param(p, id=p["title"]) for p in PANELS])
def test_a_panels_legend_names_labels_that_there_are(panel):
    for target in panel["targets"]:
        labels = set().union(*(KNOWN[name] for name in metrics_in(target["expr"]))) | SCRAPED
        assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= labels
    assert panel["description"]


def test_every_documented_metric_is_on_the_dashboard():
    asked = {name for query in QUERIES for name in metrics_in(query.values[0])}
    families = {name for name, kind, _ in ROW.findall(PAGE)}
    shown = {name for name in families if any(a.startswith(PREFIX + name) for a in asked)}
    assert families - shown == set(), "give each a panel in packaging/grafana/dashboard.json"


def test_panels_have_places_of_their_own():
    ids = [panel["id"] for panel in BOARD["panels"]]
    assert len(ids) == len(set(ids))
    taken = set()
    for panel in BOARD["panels"]:
        grid = panel["gridPos"]
        places = {
            (x, y)
            for x in range(grid["x"], grid["x"] + grid["w"])
            for y in range(grid["y"], grid["y"] + grid["h"])
        }
        assert not places & taken
        assert grid["x"] + grid["w"] <= 24
        taken |= places


@pytest.mark.parametrize("rule", ALERTS)
def test_an_alert_asks_for_what_there_is_and_tells_the_remedy(rule):
    assert mistakes(rule["expr"]) == []
    assert metrics_in(rule["expr"]) or rule["expr"].startswith("up{")
    assert set(rule["annotations"]) == {"summary", "remedy"}
    assert all(text.strip() for text in rule["annotations"].values())
    assert rule["labels"]["severity"] in {"info", "warning", "critical"}


def test_alerts_are_listed_in_the_docs():
    told = set(re.findall(r"^\| `([A-Z]\w+)` \| (?:info|warning|critical) \|", PAGE, re.MULTILINE))
    assert told == {rule.values[0]["alert"] for rule in ALERTS}


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not on this machine")
@pytest.mark.parametrize(
    "what", [["check", "rules", str(ALERTS_FILE)], ["test", "rules", "alerts_test.yml"]], ids=" ".join
)
def test_prometheus_own_tool_is_content(what):
    result = subprocess.run(
        ["promtool", *what], check=False, cwd=Path(__file__).parent, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
