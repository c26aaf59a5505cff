"""Files are read strictly: what is wrong is named with file, line, place, what was got and what is wanted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fbgemm_gpu.split_embedding_configs import EmbOptimType

from tests.cli.files import described, write
from torchrec_turbossd.cli.spec import read_spec
from torchrec_turbossd.errors import ConfigError

TABLE = "tables:\n- {name: a, rows: 10, dim: 4"


def test_every_key_arrives(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(
        "batch_size: 1e3\nbatches_in_flight: 1\nreserve: 20%\nmachine: m.json\noptimizer: EXACT_ADAGRAD\n"
        "topology: {device: cuda, ranks: 16, ranks_per_host: 8, hbm: 80 GB, dram: 1, ssd: 2 TiB, \n"
        "  hbm_bandwidth: 3 TB/s, ssd_bandwidth: 6, ssd_reads_per_second: 5e5, ssd_writes_per_read: 0}\n"
        "tables:\n- &first {name: a, rows: 1.6e9, dim: 64, features: [x, y], lookups: [3, 0.5], data_type: fp16,\n"
        "  access: {trace: t.npy}, constraints: {compute_kernels: [key_value], sharding_types: row_wise,\n"
        "  min_partition: 32, load_factor: 0.5}}\n"
        "- {<<: *first, name: b, access: {zipf: 0}}\n"
    )
    spec = read_spec(path)
    assert (spec.batch_size, spec.batches_in_flight, spec.reserve) == (1000, 1, 0.2)
    assert spec.machine == tmp_path / "m.json" and spec.optimizer is EmbOptimType.EXACT_ADAGRAD
    machine = spec.hardware
    assert (machine.device, machine.ranks, machine.ranks_per_host) == ("cuda", 16, 8)
    assert (machine.hbm, machine.dram, machine.ssd) == (80 * 10**9, 1 << 30, 2 << 40)
    assert (machine.hbm_bandwidth, machine.ssd_bandwidth) == (3e12, 6e9)
    assert (machine.ssd_reads_per_second, machine.ssd_writes_per_read) == (5e5, 0)
    a, b = spec.tables
    assert (a.name, a.rows, a.dim, a.features, a.lookups, a.data_type) == (
        "a",
        1_600_000_000,
        64,
        ("x", "y"),
        (3, 0.5),
        "fp16",
    )
    assert a.access is not None and (a.access.kind, a.access.path) == ("trace", tmp_path / "t.npy")
    assert (a.limits.compute_kernels, a.limits.sharding_types) == (("key_value",), ("row_wise",))
    assert (a.limits.min_partition, a.limits.load_factor) == (32, 0.5)
    assert b.access is not None and (b.access.kind, b.access.alpha, b.rows) == ("zipf", 0.0, a.rows)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "got nothing, wanted a mapping of tables"),
        ("batch_size: 5", "plan.yaml:1: tables missing"),
        ("tables: {}", "plan.yaml:1: tables: got a mapping, wanted a list of tables"),
        ("tables: []", "got an empty list"),
        (f"{TABLE}, colour: red}}", "plan.yaml:2: tables[0].colour: unknown key; there are name, rows"),
        ("tables:\n- {name: a, dim: 4}", "plan.yaml:2: tables[0]: rows missing"),
        ("tables:\n- {name: a, rows: many, dim: 4}", "tables[0].rows: got 'many', wanted a whole number above 0"),
        ("tables:\n- {name: a, rows: 1, dim: true}", "tables[0].dim: got True, wanted a whole number"),
        ("tables:\n- {name: a, rows: 1, rows: 2, dim: 4}", "plan.yaml:2: tables[0].rows stands there twice"),
        (f"{TABLE}}}\n- {{name: a, rows: 10, dim: 4}}", "plan.yaml:3: tables[1]: a second table 'a'; the first is at"),
        ("tables:\n- {name: items, rows: 1, dim: 4}", "got 'items', wanted another name"),
        (f"{TABLE}, data_type: int8}}", "tables[0].data_type: got 'int8', wanted one of fp32, fp16"),
        (f"{TABLE}, kind: sequence, pooling: sum}}", "a sequence has no pooling"),
        (f"{TABLE}, features: [x, x]}}", "tables[0].features: 'x' stands there twice"),
        (f"{TABLE}, features: [x, 3]}}", "tables[0].features[1]: got 3, wanted a list of names"),
        (f"{TABLE}, lookups: [1, 2]}}", "got 2 numbers, wanted one for each of 1 features"),
        (f"{TABLE}, lookups: -1}}", "tables[0].lookups: got -1"),
        (f"{TABLE}, access: {{}}}}", "tables[0].access: got 0 of zipf, profile, counts, trace, wanted exactly one"),
        (f"{TABLE}, access: {{zipf: 1, trace: t}}}}", "got 2 of zipf"),
        (f"{TABLE}, access: {{zipf: x}}}}", "tables[0].access.zipf: got 'x', wanted an exponent"),
        (f"{TABLE}, constraints: {{compute_kernels: [uvm]}}}}", "got 'uvm', wanted one or more of fused"),
        (f"{TABLE}, constraints: {{load_factor: 1.5}}}}", "load_factor: got 1.5, wanted a share of the rows"),
        (f"{TABLE}}}\nbatch_size: 0", "plan.yaml:3: batch_size: got 0"),
        (f"{TABLE}}}\nreserve: 100", "reserve: got 100, wanted percent"),
        (f"{TABLE}}}\noptimizer: adamw", "optimizer: got 'adamw', wanted FBGEMM's name of an optimizer: adam"),
        (f"{TABLE}}}\ntopology: {{device: tpu}}", "topology.device: got 'tpu', wanted one of cpu, cuda"),
        (f"{TABLE}}}\ntopology: {{device: cpu, hbm: 1}}", "topology.hbm: a cpu has none"),
        (f"{TABLE}}}\ntopology: {{hbm: 1 XB}}", "topology.hbm: got '1 XB', wanted a size above 0"),
        (f"{TABLE}}}\ntopology: {{ssd_bandwidth: x}}", "topology.ssd_bandwidth: got 'x', wanted a speed"),
        (f"{TABLE}}}\ntopology: {{ssd_reads_per_second: 0}}", "got 0, wanted reads per second"),
        ("tables: [", "plan.yaml is no YAML: while parsing"),
        ("a: &a [*a]", "plan.yaml is no YAML"),
        ("? [1, 2]\n: 3", "has a key that is not text"),
    ],
)
def test_what_is_wrong_is_named(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_spec(path)
    assert said in str(caught.value) and str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_json_is_as_strict(tmp_path: Path) -> None:
    path = write(tmp_path / "plan.json", described("cpu", colour="red"))
    with pytest.raises(ConfigError, match=r"plan\.json: colour: unknown key"):
        read_spec(path)
    path.write_text('{"tables": [], "tables": []}')
    with pytest.raises(ConfigError, match="'tables' stands twice"):
        read_spec(path)
    path.write_text("{")
    with pytest.raises(ConfigError, match="is no JSON"):
        read_spec(path)
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_spec(tmp_path / "other.json")


def test_json_and_yaml_agree(tmp_path: Path) -> None:
    whole = described("cuda")
    one, other = read_spec(write(tmp_path / "a.json", whole)), read_spec(write(tmp_path / "a.yaml", whole))
    assert (one.hardware, one.batch_size, one.optimizer) == (other.hardware, other.batch_size, other.optimizer)
    assert [(t.name, t.rows, t.lookups) for t in one.tables] == [(t.name, t.rows, t.lookups) for t in other.tables]


def test_a_model_says_what_its_tables_are(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"tables": [{"name": "a", "lookups": [2, 3]}]}))
    (table,) = read_spec(path, of_model=True).tables
    assert table.rows is None and table.lookups == (2, 3)
    path.write_text(json.dumps({"tables": [{"name": "a", "rows": 5}]}))
    with pytest.raises(ConfigError, match=r"tables\[0\]\.rows: the model says that"):
        read_spec(path, of_model=True)
