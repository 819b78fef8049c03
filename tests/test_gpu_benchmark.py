"""benchmarks/gpu.py runs whole without a card, keeps no figure of that, and survives faults."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
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

pytest.importorskip("triton")

from benchmarks import gpu  # noqa: E402
from benchmarks.agreement import DisagreementError  # noqa: E402
from benchmarks.floors import Need  # noqa: E402
from benchmarks.on_gpu import (  # noqa: E402
    against,
    encode,
    inputs,
    item,
    probes_rest,
    probes_sae,
    sanitize,
    sheet,
    supervise,
)
from benchmarks.on_gpu.device import Device  # noqa: E402
from benchmarks.on_gpu.item import AbsentError, Context, Item, Subject  # noqa: E402

from microtome.errors import BackendError  # noqa: E402
from microtome.ops import _registry, topk_encode  # noqa: E402
from microtome.ops._registry import OPS  # noqa: E402

DRY = Context(Device(dry=True), {"copy_gbs": 1.0, "l2_gbs": 1.0, "bf16_tflops": 1.0,
                                 "fp32_tflops": 1.0, "fp64_tflops": 1.0})  # fmt: skip
BASE = {"part": 2, "item": "x", "shape": "S"}
# Without the package, whose import takes seconds; the table then says that it is not installed.
WITHOUT_SPARSIFY = (
    "import sys; sys.modules['sparsify'] = None; sys.path[0] = sys.argv.pop(1);"
    "import benchmarks; sys.path.pop(0); from benchmarks import gpu;"
    "sys.exit(gpu.main(sys.argv[1:]))"
)


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[dict[str, Any]]]:
    """Output and results of all three parts, run dry in one process."""
    fails = _registry._interpreter_fails()
    if fails:
        pytest.skip(fails)
    out = tmp_path_factory.mktemp("dry")
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_SPARSIFY, str(ROOT), "--dry", "--out", str(out)],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    results = [json.loads((out / f"gpu-part{part}-dry.json").read_text()) for part in (1, 2, 3)]
    return done.stdout, results


def test_every_item_of_every_part_runs_without_a_card(dry: Any) -> None:
    output, results = dry
    for result in results:
        assert result["rows"][0]["item"] == "ceilings"
        for row in result["rows"]:
            assert row["status"] in ("ok", "absent"), row
    run = {row["item"] for result in results for row in result["rows"] if row["status"] == "ok"}
    assert {"topk_encode", "sae_loss", "sae_update", "step", "repeats of sae_update"} <= run
    assert {"memcheck", "torch.compile", "sweep resid_pre", "shapley network"} <= run
    assert {"losses of OpenAI-style", "losses of torch"} <= run
    assert output.index("part 1 on") < output.index("part 2 on") < output.index("part 3 on")
    assert "eai-sparsify: not installed" in output


def test_a_dry_run_keeps_no_figure(dry: Any) -> None:
    for result in dry[1]:
        assert result["ceilings"] == {}
        assert result["device"]["dry"] is True
        for row in result["rows"]:
            assert not set(row) & set(sheet.NUMBERS), row
            assert all("ms" not in other for other in row.get("beside", {}).values()), row
            assert all("value" not in goal for goal in row.get("goals", [])), row
            assert isinstance(row.get("figures", []), list), row


def test_the_acceptance_table_takes_nothing_from_a_dry_run(dry: Any, tmp_path: Path) -> None:
    path = tmp_path / "dry.json"
    path.write_text(json.dumps(dry[1][1]))
    assert sheet.read([path]) == []


def thing(go: Any, name: str = "x", seconds: float = 1.0, **more: Any) -> Item:
    return Item(2, name, "S", go, seconds, **more)


def rows_of(subject: Subject, **options: Any) -> list[dict[str, Any]]:
    return item.measure(DRY, dict(BASE), subject, **options)


def test_an_item_that_raises_is_a_row_that_says_so() -> None:
    (row,) = item.guarded(thing(lambda _: 1 / 0), DRY)
    assert row["status"] == "FAILED"
    assert row["note"].startswith("ZeroDivisionError: division by zero (test_gpu_benchmark.py:")


def test_an_item_that_answers_wrongly_is_not_timed() -> None:
    called = []

    def wrong() -> dict[str, Any]:
        msg = "out: error 1.0e+00, plain PyTorch allows 2.0e-07"
        raise DisagreementError(msg)

    (row,) = rows_of(Subject(lambda: called.append(1), wrong, beside={"torch": lambda: print}))
    assert (row["status"], row["note"][:10], called) == ("WRONG", "out: error", [])
    assert "ms" not in row


def test_a_call_that_gives_other_bits_is_wrong() -> None:
    state = torch.zeros(3)
    (row,) = rows_of(Subject(lambda: state.add_(1).clone()), repeats=3)
    assert row["status"] == "WRONG"
    assert "call 2 of 2 on the same inputs gave other bits: output 0" in row["note"]
    item.same_bits(lambda: torch.tensor([float("nan")]))


def test_a_contender_that_breaks_is_a_note_beside_the_rest() -> None:
    def absent() -> Any:
        msg = "not installed"
        raise AbsentError(msg)

    beside = {"a": lambda: lambda: None, "b": absent, "c": lambda: [][0]}
    (row,) = rows_of(Subject(lambda: None, need=Need(hbm=1e6), beside=beside))
    assert row["status"] == "ok"
    assert row["floor_ms"] == 1.0
    assert row["over_floor"] == row["ms"]
    assert row["beside"]["a"]["ratio"] > 0
    assert row["beside"]["b"] == {"note": "not installed"}
    assert row["beside"]["c"]["note"].startswith("IndexError: list index out of range")


def test_an_op_that_is_not_in_the_build_is_absent_by_name() -> None:
    (row,) = item.guarded(thing(lambda _: item.backends_here("no_such_op")), DRY)
    assert (row["status"], row["note"]) == ("absent", "no_such_op: not in this build")


def test_a_backend_that_refuses_inputs_is_absent_with_its_own_reason() -> None:
    msg = (
        "topk_encode: backend 'cuda' was demanded but cannot run here.\n"
        "  x: [2, 3] bfloat16 cuda:0\nbecause\n"
        "  cuda: dtype bfloat16 (has float32)\n  triton: can run it"
    )

    def refuses() -> None:
        raise BackendError(msg)

    (row,) = rows_of(Subject(refuses, check=lambda: refuses() or {}))
    assert (row["status"], row["note"]) == (
        "absent", "topk_encode by cuda: dtype bfloat16 (has float32)",
    )  # fmt: skip


def test_an_item_for_which_the_card_is_too_small_is_skipped(monkeypatch: Any) -> None:
    monkeypatch.setattr(Device, "gib_free", lambda _: 20.0)
    (row,) = item.guarded(thing(lambda _: [], gib=60), DRY)
    assert row["status"] == "skipped"
    assert row["note"] == "needs 60 GiB of card memory, 20 are free"


def test_a_spent_budget_skips_what_is_left_by_name() -> None:
    clock = iter([0.0, 0.0, 5.0, 6.0, 6.5, 7.0, 8.0])
    seen: list[dict[str, Any]] = []
    items = [thing(lambda _: [dict(BASE, status="ok")], name, 4.0) for name in ("a", "b", "c")]
    code = supervise.in_turn(
        items, DRY, 9.0, lambda _, rows, __: seen.extend(rows), clock=lambda: next(clock)
    )
    assert code == 0
    assert [row["status"] for row in seen] == ["ok", "skipped", "skipped"]
    assert [row["item"] for row in seen[1:]] == ["b", "c"]
    assert seen[1]["note"] == "3 s of the budget left, takes about 4 s"


def test_a_card_that_stopped_answering_ends_the_worker(monkeypatch: Any) -> None:
    monkeypatch.setattr(Device, "healthy", lambda _: False)
    seen: list[str] = []
    items = [thing(lambda _: 1 / 0, "a"), thing(lambda _: [], "b")]
    far = time.time() + 60
    code = supervise.in_turn(items, DRY, far, lambda key, *_: seen.append(key))
    assert (code, seen) == (supervise.UNHEALTHY, ["a S"])


WORKER = """
import json, os, sys, time
request = json.load(open(sys.argv[1]))
for key in request["keys"]:
    with open(request["lines"], "a") as file:
        file.write(json.dumps({"begin": key}) + "\\n")
    if key == "dies S":
        print("an illegal memory access")
        os._exit(5)
    if key == "hangs S":
        time.sleep(60)
    with open(request["lines"], "a") as file:
        file.write(json.dumps({"end": key, "rows": [{"item": key, "status": "ok"}], "seconds": 0}))
        file.write("\\n")
"""


def supervised(tmp_path: Path, script: str, lanes: Any, seconds: float = 30.0) -> dict[str, Any]:
    worker = tmp_path / "worker.py"
    worker.write_text(script)
    seen: dict[str, Any] = {}
    command = lambda path: [sys.executable, "-S", str(worker), str(path)]  # noqa: E731
    supervisor = supervise.Supervisor(
        command, tmp_path / "w", {}, lambda key, rows, _: seen.update({key: rows[0]})
    )
    supervisor.run(lanes, time.time() + seconds, "lane")
    return seen


def test_a_worker_that_dies_or_hangs_costs_one_item(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(supervise, "LEAST", 0.3)
    names = ("first", "dies", "between", "hangs", "last")
    items = [thing(None, name, 0.1) for name in names]
    seen = supervised(tmp_path, WORKER, [items, [thing(None, "beside", 0.1)]])
    assert {key: row["status"] for key, row in seen.items()} == {
        "first S": "ok", "dies S": "DIED", "between S": "ok", "hangs S": "DIED", "last S": "ok",
        "beside S": "ok",
    }  # fmt: skip
    assert seen["dies S"]["note"] == "exit code 5. an illegal memory access"
    assert seen["hangs S"]["note"] == "ran past 0 s"


def test_a_worker_that_cannot_start_is_named_in_every_row(tmp_path: Path) -> None:
    seen = supervised(tmp_path, "raise SystemExit('no torch')", [[thing(None, n) for n in "ab"]])
    assert {row["status"] for row in seen.values()} == {"DIED"}
    assert seen["b S"]["note"] == "the worker does not start: exit code 1. no torch"


def test_the_end_of_the_budget_ends_workers_too(tmp_path: Path) -> None:
    items = [thing(None, name) for name in ("hangs", "last")]
    seen = supervised(tmp_path, WORKER, [items], seconds=0.5)
    assert seen["hangs S"]["note"] == "the budget ended while it ran"
    assert seen["last S"]["note"] == "the budget ended before it began"
    assert {row["status"] for row in seen.values()} == {"skipped"}


def test_a_comparison_refuses_what_is_wrong() -> None:
    exact = torch.linspace(1, 2, 64, dtype=torch.float64)
    plain = exact.float()
    assert against.compare("out", plain.clone(), plain, exact)["out_error"] < 1e-6
    holes = plain.clone()
    holes[3] = float("nan")
    with pytest.raises(DisagreementError, match="entries are finite where the reference's are not"):
        against.compare("out", holes, plain, exact)
    with pytest.raises(DisagreementError, match="out: error"):
        against.compare("out", plain * 1.001, plain, exact)
    with pytest.raises(DisagreementError, match="1 of 3 entries differ"):
        against.compare("i", torch.tensor([1, 2, 3]), torch.arange(3), torch.tensor([1, 2, 4]))
    with pytest.raises(DisagreementError, match=r"\[2\] torch.float32, expected \[64\]"):
        against.compare("out", plain[:2], plain, exact)


def test_every_op_with_a_kernel_for_a_card_has_a_probe() -> None:
    table = [*probes_sae.probes(), *probes_rest.probes()]
    have = {op.name for op in OPS.values() if any(b.name in item.ON_CARD for b in op.backends)}
    through_autograd = {name for name in have if "_grad_" in name}
    assert not have - through_autograd - {probe.op for probe in table}


def test_a_code_that_lacks_a_feature_or_names_one_twice_is_refused() -> None:
    b = inputs.batch(Device(dry=True), inputs.Shape("", 8, 16, 96, 4))
    values, indices, _ = topk_encode(b.x, b.W_enc, b.b_enc, b.b_dec, k=5)
    assert encode.check_topk(b, values[:, :4], indices[:, :4])["rows"] == 8
    left_out = (
        torch.cat([values[:, :3], values[:, 4:]], 1),
        torch.cat([indices[:, :3], indices[:, 4:]], 1),
    )
    with pytest.raises(DisagreementError, match="lies below the smallest that belongs there"):
        encode.check_topk(b, *left_out)
    twice = indices[:, [0, 0, 1, 2]]
    with pytest.raises(DisagreementError, match="a feature is named twice"):
        encode.check_topk(b, values[:, [0, 0, 1, 2]], twice)
    with pytest.raises(DisagreementError, match="values do not descend"):
        encode.check_topk(b, values.flip(1), indices.flip(1))


def test_the_sanitizer_is_read_from_its_words() -> None:
    clean = "sanitize: a triton done\nsanitize: b: not in this build\n==== ERROR SUMMARY: 0 errors"
    assert sanitize.judged(0, clean) == {"status": "ok", "note": "1 ops; 0 errors"}
    found = sanitize.judged(sanitize.FOUND, "Invalid __global__ read\nERROR SUMMARY: 3 errors")
    assert (found["status"], found["note"]) == ("WRONG", "3 errors")
    assert "Invalid __global__ read" in found["output"]
    assert sanitize.judged(None, clean)["status"] == "skipped"
    assert sanitize.judged(0, "sanitize: a raised OSError: no")["status"] == "FAILED"
    assert sanitize.watch([sys.executable, "-S", "-c", "print('x')"], 20) == (0, "x\n")
    slow = [sys.executable, "-S", "-c", "import time; time.sleep(9)"]
    assert sanitize.watch(slow, 0.2)[0] is None


def test_without_a_card_the_script_says_what_to_do(capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--part", "1"]) == 2
    assert "--dry runs everything on the processor" in capsys.readouterr().out
