"""The configuration: what is read, and what each mistake is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from kwaainet_bridge.cli.init import TEMPLATE, write_node_files
from kwaainet_bridge.config import PRESETS, anchored, load_config, parse_config
from kwaainet_bridge.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"


def test_empty_configuration_is_a_bootstrap_peer():
    config = parse_config("", "x")
    assert config.model is None
    assert config.networks.petals is not None
    assert config.networks.kwaainet is None


def test_model_without_settings_is_the_embedded_one():
    assert parse_config("model: {}", "x").model.name == "austen"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_configurations_are_good(path):
    load_config(path)


def test_there_is_a_configuration_for_each_use():
    assert {p.stem for p in CONFIGS.glob("*.yaml")} == {"private-swarm", "petals-public", "kwaainet", "both"}


def test_common_beginnings_are_shared_by_whom_one_says():
    assert parse_config("model: {}", "x").model.share_prefixes == "peer"
    for text, meaning in {"off": "off", "'off'": "off", "all": "all"}.items():
        assert parse_config(f"model: {{share_prefixes: {text}}}", "x").model.share_prefixes == meaning
    for text in ("on", "some", "1"):
        with pytest.raises(ConfigError, match=r"model\.share_prefixes"):
            parse_config(f"model: {{share_prefixes: {text}}}", "node.yaml")


def test_template_is_good():
    config = parse_config(TEMPLATE.format(name="node.yaml", kind="rsa"), "template")
    assert config.model.name == "austen"


def test_presets_expand():
    config = parse_config("networks: {petals: {bootstrap: [petals-public]}}", "x")
    assert config.networks.petals.bootstrap == PRESETS["petals-public"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lissten: []", "lissten: unknown key; did you mean 'listen'?"),
        ("model: {dtpe: float32}", "model.dtpe: unknown key; did you mean 'dtype'?"),
        ("networks: {petals: {zzzz: 1}}", "networks.petals.zzzz: unknown key; known here: bootstrap, dht"),
        ("model: {blocks: '4:4'}", "model.blocks: 4:4 holds no block"),
        (
            "model: {blocks: auto}",
            "model: blocks: auto chooses which blocks, not how many: give num_blocks (--num-blocks)",
        ),
        (
            "model: {blocks: auto, num_blocks: 0}",
            "model.num_blocks: Input should be greater than 0 (found 0)",
        ),
        ("model: {blocks: all}", 'model.blocks: write it as "first:end" in quotes'),
        (
            "model:\n  blocks: 4:8",
            'model.blocks: write it as "first:end" in quotes, for example "0:4", or auto (found 248)',
        ),
        (
            "limits: {connections: 100, connections_high: 200}",
            "limits: connections_high (200) exceeds connections (100): lower it",
        ),
        (
            "limits: {connections_high: 200, connections_low: 300}",
            "limits: connections_low (300) exceeds connections_high (200): lower it",
        ),
        (
            "limits: {connections: 100, connections_low: 300}",
            "limits: connections_low (300) exceeds connections (100): lower it",
        ),
        ("limits: {connections: 0}", "limits.connections: Input should be greater than 0 (found 0)"),
        ("model: {dtype: int8}", "model.dtype: Input should be 'auto', 'float32', 'bfloat16' or 'float16'"),
        (
            "model: {dht_prefix: a.b}",
            "model.dht_prefix: dht_prefix 'a.b': must be non-empty, without dots and spaces",
        ),
        (
            "model: {cache_tokens: 8}",
            "model.cache_tokens: Input should be greater than or equal to 64 (found 8)",
        ),
        ("model: {throughput: fast}", "model.throughput: Input should be a number or 'auto' (found 'fast')"),
        (
            "kademlia: {protocol: kad}",
            "kademlia.protocol: Kademlia protocol 'kad': expected an id such as /ipfs/kad/1.0.0, without spaces",
        ),
        ("kademlia: {protocol: '/a b'}", "kademlia.protocol: Kademlia protocol '/a b'"),
        ("kademlia: {mode: auto}", "kademlia.mode: Input should be 'server' or 'client'"),
        ("limits: {strangers: -1}", "limits.strangers: Input should be greater than or equal to 0"),
        (
            "limits: {connections_per_network: {ipfs: 3}}",
            "limits.connections_per_network.ipfs: unknown key; known here: petals, kwaainet",
        ),
        ("drain_seconds: soon", "drain_seconds: Input should be a number (found 'soon')"),
        ("listen: /ip4/0.0.0.0/tcp/1", "listen: must be a list: each value on a line of its own"),
        ("networks: {petals: {bootstrap: petals-public}}", "networks.petals.bootstrap: must be a list"),
        (
            "networks: {petals: {bootstrap: [somewhere]}}",
            "networks.petals.bootstrap.0: bootstrap address 'somewhere' is malformed",
        ),
        ("listen: [31330]", "listen.0: Input should be a valid string (found 31330)"),
        ("listen: ['0.0.0.0:31330']", "listen.0: listen address '0.0.0.0:31330'"),
        ("networks: {petals: null}\nmodel: {}", "model is given but no network serves it"),
        ("listen: [/ip4/0.0.0.0/udp/31330]", "expected /ip4/<address>/tcp/<port>"),
        ("announce: [/foo/bar]", "announce.0: announced address '/foo/bar'"),
        ("networks: {petals: {bootstrap: [/ip4/1.2.3.4/tcp/1]}}", "nor is it a preset: petals-public"),
        ("networks: {petals: {bootstrap: [/ip4/1.2.3.4/tcp/1/p2p/x]}}", "networks.petals.bootstrap.0"),
        ("model: {}\nlisten: []", "nobody can dial this node"),
        ("model: {}\nnetworks: {petals: {dht: client}}", "nobody can dial this node"),
        ("identity:", "identity: holds keys and values (path, kind), or is left out"),
        ("drain_seconds: -1", "drain_seconds: Input should be greater than or equal to 0"),
        ("- a", "expected keys and values, found list"),
        ("a: [", "not YAML"),
    ],
)
def test_mistakes_name_the_key_and_the_remedy(text, message):
    with pytest.raises(ConfigError) as caught:
        parse_config(text, "node.yaml")
    assert message in str(caught.value)
    assert str(caught.value).startswith("node.yaml:")


def test_blocks_may_be_left_to_the_node():
    model = parse_config("model: {blocks: auto, num_blocks: 3}", "x").model
    assert (model.blocks_to_choose, model.block_range) == (3, None)
    named = parse_config("model: {blocks: '0:4', num_blocks: 3}", "x").model
    assert (named.blocks_to_choose, named.block_range) == (None, range(4))


def test_every_mistake_is_told_at_once():
    with pytest.raises(ConfigError) as caught:
        parse_config("lissten: []\nmodel: {dtpe: x}", "node.yaml")
    assert len(str(caught.value).splitlines()) == 3


def test_missing_file_points_to_init(tmp_path):
    with pytest.raises(ConfigError, match="kwaainet-bridge init"):
        load_config(tmp_path / "none.yaml")


def test_binary_file_is_named(tmp_path):
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_config(tmp_path / "x.yaml")


def test_identity_path_is_relative_to_the_file(tmp_path):
    (tmp_path / "node.yaml").write_text("identity: {path: keys/me.key}")
    assert load_config(tmp_path / "node.yaml").identity.path == tmp_path / "keys" / "me.key"
    absolute = anchored(parse_config("identity: {path: /etc/me.key}", "x"), tmp_path)
    assert absolute.identity.path == Path("/etc/me.key")


def test_overrides_replace_single_keys():
    config = parse_config("model: {name: m, dtype: float32}", "x", {"model": {"blocks": "0:2"}})
    assert (config.model.name, config.model.dtype, config.model.block_range) == ("m", "float32", range(2))


def test_init_writes_what_run_reads(tmp_path):
    lines = list(write_node_files(tmp_path / "node", "ed25519"))
    assert lines[0].startswith("peer id        12D3KooW")
    config = load_config(tmp_path / "node" / "node.yaml")
    assert config.identity.path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(ConfigError, match="exists already"):
        list(write_node_files(tmp_path / "node", "rsa"))


def test_init_refuses_unknown_keys(tmp_path):
    with pytest.raises(ConfigError, match="choose rsa or ed25519"):
        list(write_node_files(tmp_path, "dsa"))


def test_alternatives_of_a_type_are_not_named():
    with pytest.raises(ConfigError) as caught:
        parse_config("model: {throughput: fast}", "node.yaml")
    assert len(str(caught.value).splitlines()) == 2


def test_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "weights").mkdir()
    config = anchored(parse_config("identity: {path: ~/x.key}\nmodel: {name: ~/weights}", "x"), Path("/tmp"))
    assert (config.identity.path, config.model.name) == (tmp_path / "x.key", str(tmp_path / "weights"))
    with pytest.raises(ConfigError, match=r"identity.path: ~nobody-here/x"):
        anchored(parse_config("identity: {path: ~nobody-here/x}", "x"), tmp_path)


@pytest.mark.parametrize("name", ["/no/such/model", "./model", "../model", "~/no-such-model"])
def test_model_folder_that_is_missing_is_named(tmp_path, name):
    with pytest.raises(ConfigError, match=r"model.name: there is no folder /.*model$"):
        anchored(parse_config(f"model: {{name: {name}}}", "x"), tmp_path)


def test_names_that_are_no_paths_are_kept(tmp_path):
    (tmp_path / "austen").mkdir()
    for name in ("austen", "org/model"):
        assert anchored(parse_config(f"model: {{name: {name}}}", "x"), tmp_path).model.name == name


def test_init_where_nothing_can_be_written():
    with pytest.raises(ConfigError, match="/dev/null/x cannot be written: Not a directory"):
        list(write_node_files(Path("/dev/null/x"), "ed25519"))


def test_model_folder_is_relative_to_the_file(tmp_path):
    (tmp_path / "weights").mkdir()
    (tmp_path / "node.yaml").write_text("model: {name: weights}")
    assert load_config(tmp_path / "node.yaml").model.name == str(tmp_path / "weights")


TWO = "models: [{name: a/x, cache_tokens: 64}, {name: b/y, dht_prefix: z, blocks: '0:4'}]"


def test_several_models_have_the_keys_of_one_each():
    config = parse_config(TWO, "x")
    assert config.model is None
    assert [(m.key, m.cache_tokens, m.blocks) for m in config.served_models] == [
        ("a/x", 64, None),
        ("z", 16384, "0:4"),
    ]
    assert config.openai_models == ("a/x", "b/y")
    (only,) = parse_config("model: {name: a/x}", "x").served_models
    assert only.name == "a/x"
    assert parse_config("", "x").served_models == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {}\nmodels: [{}]", "model and models exclude each other: make model an entry of models"),
        (
            "models: [{name: a/x, blocks: '0:4'}, {name: a/x, blocks: '2:6'}]",
            (
                "models: the blocks of a/x (0:4), a/x (2:6) would have the same names, x: make one entry with all their "
                "blocks of it, or give each another dht_prefix"
            ),
        ),
        ("models: [{name: a/x.y}, {name: b/x-y}]", "would have the same names, x-y"),
        ("models: [{name: a/x, dht_prefix: z}, {name: b/y, dht_prefix: z}]", "would have the same names, z"),
        ("models: [{}, {}]", "would have the same names, austen"),
        (
            "models: [{name: a}, {name: b}]\nnetworks: {kwaainet: {}}",
            (
                "models: KwaaiNet's requests name no model, so only one of a, b can be served there: set networks: [petals] "
                "for the others, or protocols.kwaai_inference to false"
            ),
        ),
        (
            "models: [{threads: 1}, {name: b, threads: 2}]",
            "models: threads are 1, 2, but torch has one number",
        ),
        (
            "models: [{tensor_parallel: 2}, {name: b, tensor_parallel: 2}]",
            "models: only one model of a node can be split, and austen, b have tensor_parallel above 1",
        ),
        ("models: [{name: a, dtpe: x}]", "models.0.dtpe: unknown key; did you mean 'dtype'?"),
        ("models: [{name: a, networks: [kwaainet]}]", "models has 'a' but no network serves it"),
        ("models: [{name: a, networks: []}]", "models has 'a' but no network serves it"),
        ("averaging: {runs: [{prefix: a, x: 1}]}", "averaging.runs.0.x: unknown key; known here: network"),
        ("models: {name: a}", "models: must be a list"),
    ],
)
def test_models_that_cannot_be_together(text, message):
    with pytest.raises(ConfigError) as caught:
        parse_config(text, "node.yaml")
    assert message in str(caught.value)


def test_one_of_several_may_be_in_kwaainet():
    networks = "networks: {kwaainet: {}}"
    config = parse_config(f"models: [{{name: a}}, {{name: b, networks: [petals]}}]\n{networks}", "x")
    assert [m.networks for m in config.served_models] == [("petals", "kwaainet"), ("petals",)]
    off = "protocols: {kwaai_inference: false}"
    assert len(parse_config(f"models: [{{name: a}}, {{name: b}}]\n{networks}\n{off}", "x").models) == 2


def test_the_command_line_uses_one_of_several(tmp_path):
    def asked(**model):
        return parse_config(TWO, "x", {"model": model}, folder=tmp_path).model

    assert asked(name="a/x").cache_tokens == 64
    assert asked(name="b/y", blocks="1:2").blocks == "1:2"
    assert asked(name="c/new").cache_tokens == 16384
    with pytest.raises(ConfigError, match=r"several models \(a/x, b/y\): say with --model which one"):
        asked(blocks="0:1")
    one = parse_config("models: [{name: a, cache_tokens: 99}]", "x", {"model": {"blocks": "0:1"}})
    assert (one.model.name, one.model.cache_tokens, one.models) == ("a", 99, ())
    same = "models: [{name: a, dht_prefix: p}, {name: a, dht_prefix: q, cache_tokens: 77}]"
    assert parse_config(same, "x", {"model": {"name": "a", "dht_prefix": "q"}}).model.cache_tokens == 77
    with pytest.raises(ConfigError, match="several models"):
        parse_config(same, "x", {"model": {"name": "a"}})


def test_folders_of_several_models_are_relative_to_the_file(tmp_path):
    for name in ("m1", "m2"):
        (tmp_path / name).mkdir()
    text = "models: [{name: m1}, {name: ./m2, adapters: [./m1], dht_prefix: p}]"
    first, second = anchored(parse_config(text, "x"), tmp_path).models
    assert (first.name, second.name) == (str(tmp_path / "m1"), str(tmp_path / "m2"))
    assert second.adapters == (str(tmp_path / "m1"),)
    picked = parse_config(text, "x", {"model": {"name": str(tmp_path / "m2")}}, folder=tmp_path)
    assert picked.model.dht_prefix == "p"
    with pytest.raises(ConfigError, match=r"models\.name: there is no folder"):
        anchored(parse_config("models: [{name: ./none}]", "x"), tmp_path)
